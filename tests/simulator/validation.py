"""Judge a request: pure functions from a body to a verdict."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .catalog import Catalog, Resolved
from .minting import NATIVE, integrity_fault, reasoning_format
from .scene import Body, input_tokens, items_of, media_parts, provider_name
from .wire import to_json

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Issue:
    """One thing that the schema dislikes."""

    path: Path
    message: str


@dataclass(frozen=True)
class Rejection:
    """Why a request is refused, and with which status."""

    status: int
    message: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    issues: Sequence[Issue] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def body(self, style: str | None = None) -> dict[str, Any]:
        """Write the error body, as `responses` or as `envelope` (§9.2)."""
        if style == "responses" or (style is None and self.issues):
            return self._responses_style()
        error: dict[str, Any] = {"code": self.status, "message": self.message}
        metadata = dict(self.metadata) or {"error_type": "invalid_request"}
        if self.status != 400 and not self.metadata:
            metadata = {}
        error |= {"metadata": metadata} if metadata else {}
        return {"error": error | dict(self.extra), "user_id": "user_sim"}

    def _responses_style(self) -> dict[str, Any]:
        found = [
            {"code": "invalid_type", "path": list(i.path[1:]), "message": i.message}
            for i in self.issues
        ]
        top = self.issues[0].path[:1] if self.issues else ()
        union = {
            "code": "invalid_union",
            "path": list(top),
            "message": "Invalid input" if self.issues else self.message,
            "errors": [found],
        }
        error = {"code": "invalid_prompt", "message": "Invalid Responses API request"}
        return {"error": error, "metadata": {"raw": json.dumps([union])}}


@dataclass(frozen=True)
class Policy:
    """What the simulator is strict about where the schema is not."""

    assistant_input_text: bool = False
    image_without_detail: bool = False
    replay_integrity: bool = True


Judge = Callable[[Any, Path], Iterator[Issue]]


def expected(kind: str, value: Any) -> str:
    """Word a type mismatch as zod does."""
    names = {type(None): "null", bool: "boolean", dict: "object", list: "array"}
    got = names.get(type(value), "string" if isinstance(value, str) else "number")
    return f"expected {kind}, received {'undefined' if value is MISSING else got}"


class _Missing:
    """Stand for a key that is not there."""


MISSING = _Missing()


def string(value: Any, path: Path) -> Iterator[Issue]:
    """Want a string."""
    if not isinstance(value, str):
        yield Issue(path, expected("string", value))


def number(value: Any, path: Path) -> Iterator[Issue]:
    """Want a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        yield Issue(path, expected("number", value))


def boolean(value: Any, path: Path) -> Iterator[Issue]:
    """Want a boolean."""
    if not isinstance(value, bool):
        yield Issue(path, expected("boolean", value))


def mapping(value: Any, path: Path) -> Iterator[Issue]:
    """Want an object."""
    if not isinstance(value, dict):
        yield Issue(path, expected("object", value))


def array(value: Any, path: Path) -> Iterator[Issue]:
    """Want an array."""
    if not isinstance(value, list):
        yield Issue(path, expected("array", value))


def one_of(*allowed: Any) -> Judge:
    """Want one of some values."""

    def judge(value: Any, path: Path) -> Iterator[Issue]:
        if value not in allowed:
            yield Issue(path, f"Invalid option: expected one of {list(allowed)}")

    return judge


def nullable(inner: Judge) -> Judge:
    """Allow null too."""

    def judge(value: Any, path: Path) -> Iterator[Issue]:
        if value is not None:
            yield from inner(value, path)

    return judge


def each(inner: Judge) -> Judge:
    """Want an array of something."""

    def judge(value: Any, path: Path) -> Iterator[Issue]:
        yield from array(value, path)
        for index, member in enumerate(value if isinstance(value, list) else []):
            yield from inner(member, (*path, index))

    return judge


def short(limit: int) -> Judge:
    """Want a string of at most `limit` characters."""

    def judge(value: Any, path: Path) -> Iterator[Issue]:
        yield from string(value, path)
        if isinstance(value, str) and len(value) > limit:
            yield Issue(path, f"Too big: expected string to have <={limit} characters")

    return judge


def between(low: float, high: float) -> Judge:
    """Want a number in a range."""

    def judge(value: Any, path: Path) -> Iterator[Issue]:
        issues = list(number(value, path))
        yield from issues
        if not issues and not low <= value <= high:
            yield Issue(path, f"expected a number between {low} and {high}")

    return judge


def shape(
    required: Mapping[str, Judge],
    optional: Mapping[str, Judge] | None = None,
    closed: bool = False,
) -> Judge:
    """Want an object with some keys; a closed one has no others."""

    def judge(value: Any, path: Path) -> Iterator[Issue]:
        yield from mapping(value, path)
        given = value if isinstance(value, dict) else {}
        for key, inner in required.items():
            yield from inner(given.get(key, MISSING), (*path, key))
        for key, inner in (optional or {}).items():
            if key in given:
                yield from inner(given[key], (*path, key))
        extra = set(given) - set(required) - set(optional or {})
        if closed and extra:
            yield Issue(path, f"Unrecognized keys: {sorted(extra)}")

    return judge


def anything(value: Any, path: Path) -> Iterator[Issue]:
    """Want the key, whatever it holds."""
    if value is MISSING:
        yield Issue(path, expected("value", value))


def tagged(table: Mapping[str, Judge], what: str, key: str = "type") -> Judge:
    """Want an object whose `type` picks its shape from a table."""

    def judge(value: Any, path: Path) -> Iterator[Issue]:
        tag = value.get(key) if isinstance(value, dict) else None
        if not isinstance(tag, str) or tag not in table:
            yield Issue((*path, key), f"Invalid {what}: {tag!r}")
        else:
            yield from table[tag](value, path)

    return judge


STATUS = one_of("in_progress", "completed", "incomplete")
BREAKPOINT = {"prompt_cache_breakpoint": nullable(mapping)}
AUDIO = shape({"data": string, "format": one_of("mp3", "wav")})
INPUT_PARTS = {
    "input_text": shape({"text": string}, BREAKPOINT),
    "input_image": shape(
        {"detail": one_of("auto", "high", "low", "original")},
        {"image_url": nullable(string), **BREAKPOINT},
    ),
    "input_file": shape(
        {},
        dict.fromkeys(
            ("filename", "file_data", "file_url", "file_id"), nullable(string)
        ),
    ),
    "input_audio": shape({"input_audio": AUDIO}),
    "input_video": shape({"video_url": string}),
}
LENIENT_IMAGE = shape({}, {"image_url": nullable(string)})
OUTPUT_PARTS = {
    "output_text": shape({"text": string}, {"annotations": array, "logprobs": array}),
    "refusal": shape({"refusal": string}),
}
TOOL_OUTPUT_PARTS = {
    k: INPUT_PARTS[k] for k in ("input_text", "input_image", "input_file")
}
PHASE = nullable(one_of("commentary", "final_answer"))


def content(parts: Mapping[str, Judge], what: str) -> Judge:
    """Want a string, null, or an array of parts."""
    listed = each(tagged(parts, what))

    def judge(value: Any, path: Path) -> Iterator[Issue]:
        if value is not None and not isinstance(value, str):
            yield from listed(value, path)

    return judge


INPUT_CONTENT = content(INPUT_PARTS, "content part")
OUTPUT_CONTENT = content(OUTPUT_PARTS, "content part")
TOOL_OUTPUT = content(TOOL_OUTPUT_PARTS, "output part")


def message(item: Any, path: Path) -> Iterator[Issue]:
    """Judge a message: easy, input or output form."""
    yield from one_of("user", "system", "assistant", "developer")(
        item.get("role"), (*path, "role")
    )
    inner, where = item.get("content", MISSING), (*path, "content")
    if inner is MISSING:
        yield Issue(where, expected("string", inner))
    elif item.get("role") == "assistant" and isinstance(inner, list):
        yield from _assistant_parts(item, inner, path)
    else:
        yield from INPUT_CONTENT(inner, where)
    if "phase" in item:
        yield from PHASE(item["phase"], (*path, "phase"))


def _assistant_parts(item: Any, parts: list[Any], path: Path) -> Iterator[Issue]:
    yield from OUTPUT_CONTENT(parts, (*path, "content"))
    if parts:
        yield from string(item.get("id", MISSING), (*path, "id"))
    if "status" in item:
        yield from STATUS(item["status"], (*path, "status"))


def tool_output(value: Any, path: Path) -> Iterator[Issue]:
    """Want a string or an array of parts."""
    if value is MISSING or value is None:
        yield Issue(path, expected("string", value))
    else:
        yield from TOOL_OUTPUT(value, path)


CALL_EXTRAS = {"id": string, "status": STATUS, "namespace": string}
NATIVE_STATUS = one_of(
    "completed", "searching", "in_progress", "failed", "incomplete", "generating"
)
ITEMS: dict[str, Judge] = {
    "message": message,
    "reasoning": shape(
        {"id": string, "summary": each(shape({"text": string}))},
        {
            "content": nullable(each(shape({"text": string}))),
            "encrypted_content": nullable(string),
            "signature": nullable(string),
            "format": nullable(string),
            "status": STATUS,
        },
    ),
    "function_call": shape(
        {"call_id": string, "name": string, "arguments": string}, CALL_EXTRAS
    ),
    "function_call_output": shape(
        {"call_id": string, "output": tool_output},
        {"id": nullable(string), "status": nullable(STATUS)},
    ),
    "custom_tool_call": shape({"call_id": string, "name": string, "input": string}),
    "custom_tool_call_output": shape({"call_id": string, "output": tool_output}),
    "web_search_call": shape({"id": string, "status": NATIVE_STATUS}),
    "file_search_call": shape({"id": string, "status": NATIVE_STATUS}),
    "image_generation_call": shape({"id": string, "status": NATIVE_STATUS}),
    "code_interpreter_call": shape({"id": string}),
    "computer_call": shape({"call_id": string}),
    "item_reference": shape({"id": string}),
    "compaction": shape({"encrypted_content": string}),
    "context_compaction": shape({}),
    "additional_tools": shape({"role": string, "tools": array}),
    "agent_message": shape(
        {"author": string, "recipient": string, "content": anything}
    ),
}
FREE_ITEMS = [
    "local_shell_call",
    "local_shell_call_output",
    "shell_call",
    "shell_call_output",
    "apply_patch_call",
    "apply_patch_call_output",
    "mcp_list_tools",
    "mcp_approval_request",
    "mcp_approval_response",
    "mcp_call",
    "computer_call_output",
]


def item(value: Any, path: Path) -> Iterator[Issue]:
    """Judge one input item."""
    issues = list(mapping(value, path))
    yield from issues
    if issues:
        return
    kind = value.get("type", "message")
    if not isinstance(kind, str):
        yield Issue((*path, "type"), expected("string", kind))
    elif kind in ITEMS:
        yield from ITEMS[kind](value, path)
    elif kind.startswith("openrouter:"):
        yield from shape({"status": NATIVE_STATUS})(value, path)
    elif kind not in FREE_ITEMS:
        yield Issue((*path, "type"), f"Invalid item type: {kind!r}")


def input_value(value: Any, path: Path) -> Iterator[Issue]:
    """Judge the whole input."""
    if not isinstance(value, str):
        yield from each(item)(value, path)


FUNCTION_TOOL = shape(
    {"name": string, "parameters": nullable(mapping)},
    {
        "description": nullable(string),
        "strict": nullable(boolean),
        "defer_loading": boolean,
    },
)


def _present(inner: Judge, key: str) -> Judge:
    def judge(value: Any, path: Path) -> Iterator[Issue]:
        if key not in value:
            yield Issue((*path, key), expected("object", MISSING))
        yield from inner(value, path)

    return judge


BUILT_IN_TOOLS = [
    "web_search_preview",
    "web_search_preview_2025_03_11",
    "web_search",
    "web_search_2025_08_26",
    "file_search",
    "computer_use_preview",
    "code_interpreter",
    "mcp",
    "image_generation",
    "local_shell",
    "shell",
    "apply_patch",
    "custom",
    "namespace",
]
SERVER_TOOLS = [
    "web_search",
    "web_fetch",
    "datetime",
    "image_generation",
    "advisor",
    "subagent",
    "fusion",
    "tool_search",
    "files",
    "shell",
    "bash",
    "apply_patch",
    "experimental__search_models",
]
TOOLS: dict[str, Judge] = {
    "function": FUNCTION_TOOL,
    **dict.fromkeys(BUILT_IN_TOOLS, shape({})),
    **{
        f"openrouter:{name}": shape({}, {"parameters": mapping})
        for name in SERVER_TOOLS
    },
}
PLUGINS = [
    "web",
    "web-fetch",
    "file-parser",
    "response-healing",
    "context-compression",
    "auto-router",
    "auto-beta-router",
    "pareto-router",
    "fusion",
    "moderation",
    "alignment",
]
INCLUDES = [
    "file_search_call.results",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "reasoning.encrypted_content",
    "code_interpreter_call.outputs",
]
EFFORTS = ("max", "xhigh", "high", "medium", "low", "minimal", "none")
QUANTIZATIONS = [
    "int4",
    "int8",
    "fp4",
    "mxfp4",
    "nvfp4",
    "fp6",
    "fp8",
    "mxfp8",
    "fp16",
    "bf16",
    "fp32",
    "unknown",
]
PROVIDER_KEYS: dict[str, Judge] = {
    **dict.fromkeys(("order", "only", "ignore"), nullable(each(string))),
    **dict.fromkeys(
        ("allow_fallbacks", "require_parameters", "zdr", "enforce_distillable_text"),
        nullable(boolean),
    ),
    "data_collection": nullable(one_of("allow", "deny")),
    "quantizations": nullable(each(one_of(*QUANTIZATIONS))),
    "sort": lambda value, path: iter(()),
    "max_price": nullable(mapping),
    "preferred_min_throughput": lambda value, path: iter(()),
    "preferred_max_latency": lambda value, path: iter(()),
}


def metadata(value: Any, path: Path) -> Iterator[Issue]:
    """Judge the metadata map."""
    yield from mapping(value, path)
    pairs = value if isinstance(value, dict) else {}
    if len(pairs) > 16:
        yield Issue(path, "Metadata can have at most 16 key-value pairs")
    for key, held in pairs.items():
        if len(key) > 64 or re.search(r"[\[\]]", key):
            yield Issue((*path, key), "Metadata key is too long or has brackets")
        yield from short(512)(held, (*path, key))


def tool_choice(value: Any, path: Path) -> Iterator[Issue]:
    """Judge the tool choice."""
    kinds = ("function", "allowed_tools", "apply_patch", "shell")
    if isinstance(value, dict):
        kind = str(value.get("type"))
        if kind not in kinds and not kind.startswith("web_search_preview"):
            yield Issue((*path, "type"), f"Invalid tool choice: {kind}")
        if kind == "function":
            yield from string(value.get("name", MISSING), (*path, "name"))
    else:
        yield from one_of("auto", "none", "required")(value, path)


FORMATS = {
    "text": shape({}),
    "json_object": shape({}),
    "json_schema": shape({"name": string, "schema": mapping}),
}
TOP: dict[str, Judge] = {
    "model": string,
    "models": each(string),
    "input": input_value,
    "instructions": nullable(string),
    "stream": boolean,
    "store": anything,
    "include": nullable(each(one_of(*INCLUDES))),
    "max_output_tokens": nullable(number),
    "max_tool_calls": nullable(number),
    "temperature": nullable(between(0, 2)),
    "top_p": nullable(between(0, 1)),
    "top_k": nullable(number),
    "presence_penalty": nullable(between(-2, 2)),
    "frequency_penalty": nullable(between(-2, 2)),
    "top_logprobs": nullable(number),
    "tools": each(
        tagged(TOOLS | {"function": _present(FUNCTION_TOOL, "parameters")}, "tool")
    ),
    "tool_choice": tool_choice,
    "parallel_tool_calls": nullable(boolean),
    "text": nullable(
        shape(
            {},
            {
                "format": tagged(FORMATS, "format"),
                "verbosity": nullable(one_of("low", "medium", "high", "xhigh", "max")),
            },
        )
    ),
    "reasoning": nullable(
        shape(
            {},
            {
                "effort": nullable(one_of(*EFFORTS)),
                "summary": nullable(one_of("auto", "concise", "detailed")),
                "max_tokens": nullable(number),
                "enabled": nullable(boolean),
            },
        )
    ),
    "modalities": each(one_of("text", "image")),
    "image_config": mapping,
    "provider": nullable(shape({}, PROVIDER_KEYS, closed=True)),
    "plugins": each(tagged(dict.fromkeys(PLUGINS, shape({})), "plugin", key="id")),
    "service_tier": nullable(
        one_of("auto", "default", "fast", "flex", "priority", "scale")
    ),
    "truncation": nullable(one_of("auto", "disabled")),
    "metadata": nullable(metadata),
    "user": short(256),
    "session_id": short(256),
    "safety_identifier": nullable(string),
    "prompt_cache_key": nullable(string),
    "trace": mapping,
}
KNOWN_KEYS = frozenset(TOP) | frozenset(
    [
        "previous_response_id",
        "background",
        "prompt",
        "route",
        "stop_server_tools_when",
        "cache_control",
        "prompt_cache_options",
        "debug",
        "preset",
        "x_search_filter",
    ]
)


def unknown_keys(body: Body) -> list[str]:
    """List the top-level keys that /responses does not know."""
    return sorted(set(body) - KNOWN_KEYS)


def schema_issues(body: Body, policy: Policy) -> list[Issue]:
    """List everything that the request schema dislikes."""
    issues = [
        i for key, judge in TOP.items() if key in body for i in judge(body[key], (key,))
    ]
    return [issue for issue in issues if not _excused(issue, body, policy)]


def _excused(issue: Issue, body: Body, policy: Policy) -> bool:
    if policy.image_without_detail and issue.path[-1] == "detail":
        return True
    if policy.assistant_input_text and issue.path[:1] == ("input",):
        return _is_easy_assistant(body["input"][issue.path[1]])
    return False


def _is_easy_assistant(item: Any) -> bool:
    parts = item.get("content") if item.get("role") == "assistant" else None
    kinds = {part.get("type") for part in parts or [] if isinstance(part, dict)}
    return kinds == {"input_text"}


# What the schema allows and OpenRouter or a provider does not


def _provider_error(model: str, words: str, code: str | None = None) -> Rejection:
    error: dict[str, Any] = {"message": words, "type": "invalid_request_error"}
    raw: dict[str, Any] = {"error": error | {"param": "input", "code": code}}
    if provider_name(model) == "Anthropic":
        raw = {"type": "error", "error": {"type": error["type"], "message": words}}
    return Rejection(
        400,
        "Provider returned error",
        {"provider_name": provider_name(model), "raw": to_json(raw).decode()},
    )


def stateless(body: Body, model: Resolved) -> Rejection | None:
    """Refuse what would need stored responses."""
    if body.get("store") not in (None, False):
        return Rejection(400, "store: only false is supported")
    if body.get("previous_response_id") is not None:
        return Rejection(400, "previous_response_id is not supported")
    if not body.get("input"):
        return Rejection(400, 'Input required: specify "input"')
    return None


def reasoning_switch(body: Body, model: Resolved) -> Rejection | None:
    """Refuse to turn mandatory reasoning off."""
    wish = body.get("reasoning") or {}
    off = wish.get("effort") == "none" or wish.get("enabled") is False
    shape_ = model.row.get("reasoning") or {}
    if off and shape_.get("mandatory") and not model.is_alias:
        words = "Reasoning is mandatory for this endpoint and cannot be disabled."
        return Rejection(400, words)
    return None


def _no_endpoints(words: str, model: Resolved) -> Rejection:
    availability = {
        "code": "no_endpoints",
        "retryable": False,
        "requested_models": [model.slug],
        "docs_url": "https://openrouter.ai/docs",
    }
    return Rejection(404, words, extra={"availability": availability})


def abilities(body: Body, model: Resolved) -> Rejection | None:
    """Refuse tools and media that the model cannot take, or outputs it cannot give."""
    row = model.row
    functions = [t for t in body.get("tools") or [] if t.get("type") == "function"]
    if functions and "tools" not in row["supported_parameters"]:
        return _no_endpoints("No endpoints found that support tool use.", model)
    takes = row["architecture"]["input_modalities"]
    kinds = {"input_image": "image", "input_audio": "audio", "input_video": "video"}
    for part in media_parts(body):
        needed = kinds.get(part.get("type", ""))
        if needed and needed not in takes:
            words = f"No endpoints found that support {needed} input"
            return _no_endpoints(words, model)
    wanted, gives = (
        body.get("modalities") or [],
        row["architecture"]["output_modalities"],
    )
    if not set(wanted) <= set(gives):
        words = "No endpoints found that support the requested output modalities: "
        return _no_endpoints(words + ",".join(wanted), model)
    return None


IMAGE_ADDRESS = re.compile(r"https?://|data:image/[\w.+-]+;base64,")


def pictures(body: Body, model: Resolved) -> Rejection | None:
    """Refuse an image that is neither a web address nor a data URL."""
    parts = (p for p in media_parts(body) if p.get("type") == "input_image")
    urls = (url for part in parts if (url := part.get("image_url")) is not None)
    if all(IMAGE_ADDRESS.match(url) for url in urls):
        return None
    return _provider_error(model.slug, "Invalid image URL", "invalid_image_url")


def context_length(body: Body, model: Resolved) -> Rejection | None:
    """Refuse an input that is longer than the context."""
    limit, length = model.row.get("context_length"), input_tokens(body)
    compressed = any(
        plugin["id"] == "context-compression" and plugin.get("enabled", True)
        for plugin in body.get("plugins") or []
    )
    if limit is None or length <= limit or compressed:
        return None
    return Rejection(
        400, context_words(limit, length), {"error_type": "context_length_exceeded"}
    )


def context_words(limit: int, length: int, output: int = 0) -> str:
    """Word a context overflow."""
    return (
        f"This endpoint's maximum context length is {limit} tokens. However, you "
        f"requested about {length + output} tokens ({length} of text input, {output} in "
        "the output). Please reduce the length of either one, or use the "
        "context-compression plugin to compress your prompt automatically."
    )


def pairing(body: Body, model: Resolved) -> Rejection | None:
    """Refuse a call without an output, or an output without a call."""
    waiting: list[str] = []
    answered: set[str] = set()
    for entry in items_of(body):
        id_ = entry.get("call_id", "")
        if entry.get("type") == "function_call":
            waiting.append(id_)
        elif entry.get("type") == "function_call_output":
            if id_ not in waiting or id_ in answered:
                words = (
                    f"No tool call found for function call output with call_id {id_}."
                )
                return _provider_error(model.slug, words)
            answered.add(id_)
    for id_ in waiting:
        if id_ not in answered:
            words = f"No tool output found for function call {id_}."
            return _provider_error(model.slug, words)
    return None


UNVERIFIED = (
    "The encrypted content could not be verified. Reason: Encrypted content could not be "
    "decrypted or parsed."
)
NOT_FOUND = (
    "Item with id '{id}' not found. Items are not persisted when `store` is set to "
    "false. Try again with `store` set to true, or remove this item from your input."
)
FAULTS: dict[str, tuple[str, str | None]] = {
    "signature": (
        "messages.1.content.0: Invalid `signature` in `thinking` block",
        None,
    ),
    "encrypted": (UNVERIFIED, "invalid_encrypted_content"),
    "not_found": (NOT_FOUND, None),
}
FOLLOWERS = ("function_call", "custom_tool_call", "reasoning", "web_search_call")


def integrity(body: Body, model: Resolved) -> Rejection | None:
    """Refuse reasoning that this simulator did not mint for this model's family."""
    entries, target = items_of(body), model.row["id"]
    for index, entry in enumerate(entries):
        if entry.get("type") != "reasoning":
            continue
        if fault := integrity_fault(entry, target):
            words, code = FAULTS[fault]
            return _provider_error(target, words.format(id=entry["id"]), code)
        following = entries[index + 1] if index + 1 < len(entries) else {}
        if reasoning_format(target) in NATIVE and not _follows(following):
            words = (
                f"Item '{entry['id']}' of type 'reasoning' was provided without its "
                "required following item."
            )
            return _provider_error(target, words)
    return None


def _follows(item: Mapping[str, Any]) -> bool:
    kind = item.get("type", "message" if item else "")
    if kind == "message":
        return item.get("role") == "assistant"
    return kind in FOLLOWERS or kind.endswith("_call") or kind.startswith("openrouter:")


CHECKS = (stateless, reasoning_switch, abilities, pictures, context_length, pairing)


def model_not_found(requested: Any) -> Rejection:
    """Refuse a model that nobody knows."""
    availability = {
        "code": "model_not_found",
        "retryable": False,
        "requested_models": [requested],
        "docs_url": "https://openrouter.ai/docs",
    }
    extra = {"availability": availability}
    return Rejection(400, f"{requested} is not a valid model ID", extra=extra)


def choose_model(body: Body, catalog: Catalog) -> Resolved | None:
    """Resolve the first routable of `model` and its fallbacks."""
    wishes = [body.get("model"), *(body.get("models") or [])]
    if body.get("model") is None and body.get("models"):
        wishes = list(body["models"])
    return next((found for wish in wishes if (found := catalog.resolve(wish))), None)


def judge(
    body: Any, catalog: Catalog, policy: Policy = Policy()
) -> Rejection | Resolved:
    """Decide about a /responses body: the model that serves it, or why none does."""
    if not isinstance(body, dict):
        return Rejection(400, "Invalid JSON", issues=[Issue((), "expected object")])
    if issues := schema_issues(body, policy):
        return Rejection(400, "Invalid Responses API request", issues=issues)
    model = choose_model(body, catalog)
    if model is None:
        return model_not_found(body.get("model"))
    checks = (*CHECKS, integrity) if policy.replay_integrity else CHECKS
    verdicts = (check(body, model) for check in checks)
    return next((verdict for verdict in verdicts if verdict), model)
