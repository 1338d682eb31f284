"""One request on stage: who asks, which model serves, and what is said so far."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from typing import Any

from .catalog import Catalog, Resolved, Row
from .minting import author
from .wire import Event, Ids, Step, say

Body = Mapping[str, Any]
STILL = 1_790_000_000
ECHOED = [
    "instructions",
    "tool_choice",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "top_logprobs",
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "text",
    "parallel_tool_calls",
    "reasoning",
    "prompt_cache_key",
    "safety_identifier",
    "truncation",
    "prompt_cache_options",
]
DEFAULTS: dict[str, Any] = {
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "temperature": 1,
    "top_p": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "top_logprobs": 0,
    "metadata": {},
    "truncation": "disabled",
    "instructions": None,
    "text": {"format": {"type": "text"}},
    "reasoning": None,
    "safety_identifier": None,
    "prompt_cache_key": None,
    "prompt_cache_options": None,
}
PHASED = ("gpt-5.3-codex", "gpt-5.4", "gpt-5.5", "gpt-5.6")
PROVIDERS = {
    "openai": "OpenAI",
    "anthropic": "Anthropic",
    "google": "Google",
    "deepseek": "DeepSeek",
    "x-ai": "xAI",
    "mistralai": "Mistral",
    "cohere": "Cohere",
    "perplexity": "Perplexity",
    "amazon": "Amazon Bedrock",
    "moonshotai": "Moonshot AI",
    "z-ai": "Z.AI",
    "minimax": "Minimax",
    "qwen": "Alibaba",
}


def provider_name(model: str) -> str:
    """Name the provider that serves a model."""
    return PROVIDERS.get(author(model), "DeepInfra")


def items_of(body: Body) -> list[dict[str, Any]]:
    """List the input items of a request; a plain string is one user message."""
    input_ = body.get("input")
    if isinstance(input_, str):
        return [{"role": "user", "content": input_}]
    return [item for item in input_ or [] if isinstance(item, dict)]


def content_texts(content: Any) -> Iterator[str]:
    """Yield the texts of a message's or an output's content."""
    if isinstance(content, str):
        yield content
    for part in content if isinstance(content, list) else []:
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            yield part["text"]


def _item_texts(item: Mapping[str, Any]) -> Iterator[str]:
    for key in ("content", "output", "summary"):
        yield from content_texts(item.get(key))
    yield from (v for k in ("arguments", "name") if isinstance(v := item.get(k), str))


def tokens(length: int) -> int:
    """Estimate tokens from characters, as everybody does."""
    return -(-length // 4)


def input_tokens(body: Body) -> int:
    """Estimate the input tokens of a request."""
    texts: Iterable[str] = (text for i in items_of(body) for text in _item_texts(i))
    length = sum(map(len, texts)) + len(body.get("instructions") or "")
    return tokens(length + len(str(body.get("tools") or ""))) + 3 * len(items_of(body))


def media_parts(body: Body) -> Iterator[dict[str, Any]]:
    """Yield every content part of every item."""
    for item in items_of(body):
        for key in ("content", "output"):
            parts = item.get(key)
            if isinstance(parts, list):
                yield from (part for part in parts if isinstance(part, dict))


def rates(pricing: Mapping[str, Any], prompt_tokens: int) -> dict[str, Decimal]:
    """Return the prices that apply to a request of this size."""
    prices = {k: v for k, v in pricing.items() if isinstance(v, str)}
    for override in pricing.get("overrides") or []:
        if prompt_tokens >= override.get("min_prompt_tokens", 0):
            prices |= {k: v for k, v in override.items() if isinstance(v, str)}
    return {key: Decimal(value) for key, value in prices.items()}


def compute_cost(
    pricing: Mapping[str, Any],
    input_: int,
    output: int,
    cached: int = 0,
    searches: int = 0,
) -> tuple[float, float, float]:
    """Return (total, input share, output share) in USD."""
    prices = rates(pricing, input_)
    nothing = Decimal(0)
    prompt = prices.get("prompt", nothing)
    cache = prices.get("input_cache_read", prompt)
    input_cost = (input_ - cached) * prompt + cached * cache
    output_cost = output * prices.get("completion", nothing)
    extras = prices.get("request", nothing)
    extras += searches * prices.get("web_search", nothing)
    total = input_cost + output_cost + extras
    return float(total), float(input_cost), float(output_cost)


def normalized_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Echo a function tool as OpenRouter does."""
    if tool.get("type") != "function":
        return dict(tool)
    return {"description": None, "strict": None, **tool}


@dataclass
class Scene:
    """Everything that a reply may look at while it is played."""

    body: Body
    model: Resolved
    ids: Ids = field(default_factory=Ids)
    now: float = STILL
    byok: bool = False
    wants_metadata: bool = False
    pace: float = 0.0
    generation: str = ""
    usage: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generation = self.generation or self.ids.generation(self.now)

    @property
    def row(self) -> Row:
        """Return the catalog row of the serving model."""
        return self.model.row

    @property
    def slug(self) -> str:
        """Return the serving model's id."""
        return self.model.row["id"]

    @property
    def wants_encrypted(self) -> bool:
        """Tell whether `include` asked for encrypted reasoning."""
        return "reasoning.encrypted_content" in (self.body.get("include") or [])

    def response(self, **changes: Any) -> dict[str, Any]:
        """Build the response template, echoing the request."""
        given = {k: self.body[k] for k in ECHOED if self.body.get(k) is not None}
        tools = [normalized_tool(tool) for tool in self.body.get("tools") or []]
        response = {
            "id": self.generation,
            "object": "response",
            "created_at": int(self.now),
            "completed_at": None,
            "model": self.model.slug,
            "status": "in_progress",
            "output": [],
            "error": None,
            "incomplete_details": None,
            "tools": tools,
            "background": False,
            "previous_response_id": None,
            "service_tier": "auto",
            "store": False,
            "usage": None,
            **copy.deepcopy(DEFAULTS),
        }
        return response | given | changes


@cache
def default_catalog() -> Catalog:
    """Build the default catalog once."""
    return Catalog()


def still_scene(body: Body, catalog: Catalog | None = None, seed: int = 0) -> Scene:
    """Set a scene without a server: a fixed clock, seeded ids."""
    catalog = catalog or default_catalog()
    model = catalog.resolve(body.get("model")) or catalog.resolve(None)
    assert model is not None
    return Scene(body, model, Ids(seed))


@dataclass
class Stage:
    """Collect what a response has put out so far."""

    scene: Scene
    output: list[dict[str, Any]] = field(default_factory=list)
    late: list[Iterator[Step]] = field(default_factory=list)
    text_length: int = 0
    reasoning_length: int = 0
    searches: int = 0

    def add(self, item: dict[str, Any]) -> int:
        """Reserve the next output index for an item."""
        self.output.append(item)
        return len(self.output) - 1

    def phase(self) -> dict[str, str]:
        """Return the phase of a final message, for the models that have phases."""
        slug = self.scene.slug.split("/")[-1]
        return {"phase": "final_answer"} if slug.startswith(PHASED) else {}

    def usage(self) -> dict[str, Any]:
        """Compute the usage of what was said."""
        thought = tokens(self.reasoning_length)
        input_, output = (
            input_tokens(self.scene.body),
            tokens(self.text_length) + thought,
        )
        pricing = self.scene.row["pricing"]
        total, in_cost, out_cost = compute_cost(
            pricing, input_, output, 0, self.searches
        )
        byok = self.scene.byok
        usage: dict[str, Any] = {
            "input_tokens": input_,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": input_ + output,
            "cost": total * 0.05 if byok else total,
            "is_byok": byok,
            "cost_details": {
                "upstream_inference_cost": total if byok else None,
                "upstream_inference_input_cost": in_cost,
                "upstream_inference_output_cost": out_cost,
            },
        }
        if self.searches:
            usage["server_tool_use_details"] = {
                "web_search_requests": self.searches,
                "tool_calls_requested": self.searches,
                "tool_calls_executed": self.searches,
            }
        return usage

    def finish(self, status: str, **changes: Any) -> dict[str, Any]:
        """Build the final response."""
        usage = self.usage()
        final = {
            "status": status,
            "completed_at": int(self.scene.now) + 1,
            "output": list(self.output),
            "usage": usage,
            "service_tier": "default",
        }
        if self.scene.wants_metadata:
            final["openrouter_metadata"] = self.router_metadata()
        return self.scene.response(**(final | changes))

    def router_metadata(self) -> dict[str, Any]:
        """Describe the routing, for those who sent the metadata header."""
        scene = self.scene
        endpoint = {
            "provider": provider_name(scene.slug),
            "model": scene.slug,
            "selected": True,
        }
        return {
            "requested": scene.body.get("model"),
            "strategy": scene.model.strategy,
            "region": None,
            "summary": f"Served by {endpoint['provider']}",
            "attempt": 1,
            "is_byok": scene.byok,
            "endpoints": {"total": 1, "available": [endpoint]},
        }

    def opening(self) -> Iterator[Step]:
        """Yield the two lifecycle events that begin every response."""
        yield say("response.created", response=self.scene.response())
        yield say("response.in_progress", response=self.scene.response())


def terminal_of(events: Iterable[Event]) -> Event | None:
    """Return the first event that ends a response."""
    ends = (
        "response.completed",
        "response.incomplete",
        "response.failed",
        "error",
        "response.error",
    )
    for event in events:
        if event.get("type") in ends or ("error" in event and "type" not in event):
            return event
    return None
