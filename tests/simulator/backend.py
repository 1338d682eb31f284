"""What the simulator knows and decides, apart from HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import persona
from .catalog import Catalog, Resolved
from .ledger import Entry, Ledger
from .replies import AnyReply
from .scene import Scene, provider_name
from .script import Script
from .validation import Policy, Rejection, judge
from .wire import Ids

API_KEY = "sk-or-v1-simulator"
MANAGEMENT_KEY = "sk-or-v1-management"


@dataclass
class Settings:
    """How a simulator behaves where OpenRouter leaves a choice, or accounts differ."""

    api_key: str = API_KEY
    management_key: str = MANAGEMENT_KEY
    seed: int = 0
    pace: float = 0.025
    policy: Policy = field(default_factory=Policy)
    validate: bool = True
    error_style: str | None = None
    byok: bool = False
    key_limit: float | None = 100.0
    generation_lag: int = 1
    video_polls: int = 2
    video_outcome: str = "completed"
    absolute_polling_url: bool = False
    clock: Callable[[], float] = time.time


@dataclass
class Backend:
    """The state of one simulated OpenRouter."""

    settings: Settings = field(default_factory=Settings)
    catalog: Catalog = field(default_factory=Catalog)
    ledger: Ledger = field(default_factory=Ledger)
    script: Script = field(default_factory=Script)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget script, ledger, account and everything minted."""
        self.ids = Ids(self.settings.seed)
        self.script.clear()
        self.ledger.clear()
        self.spent = 0.0
        self.generations: dict[str, dict[str, Any]] = {}
        self.polls: dict[str, int] = {}
        self.videos: dict[str, dict[str, Any]] = {}

    def refuse_key(
        self, given: str | None, management: bool = False
    ) -> Rejection | None:
        """Judge the Authorization header."""
        if not given:
            return Rejection(401, "Missing Authentication header")
        key = given.removeprefix("Bearer ").strip()
        if key == self.settings.management_key:
            return None
        if key != self.settings.api_key:
            return Rejection(401, "User not found.")
        if management:
            return Rejection(403, "Only management keys can perform this operation")
        return None

    def judge(self, body: Any) -> Rejection | Resolved:
        """Judge a request body; without validation only the model is resolved."""
        if self.settings.validate:
            return judge(body, self.catalog, self.settings.policy)
        wished = body.get("model") if isinstance(body, dict) else None
        model = self.catalog.resolve(wished) or self.catalog.resolve(None)
        assert model is not None
        return model

    def scene(self, body: Any, model: Resolved, wants_metadata: bool = False) -> Scene:
        """Set the scene of a request that was accepted."""
        return Scene(
            body,
            model,
            self.ids,
            self.settings.clock(),
            byok=self.settings.byok,
            wants_metadata=wants_metadata,
            pace=self.settings.pace,
        )

    def reply(self, entry: Entry, scene: Scene) -> AnyReply:
        """Choose the scripted reply, or what the persona says."""
        return self.script.take(entry) or persona.answer(scene)

    def charge(self, scene: Scene, streamed: bool, cut: bool, api_type: str) -> None:
        """Book a finished or cut response."""
        usage = scene.usage
        cost = usage.get("cost") or 0.0
        self.spent += cost
        details = usage.get("output_tokens_details") or {}
        cached = (usage.get("input_tokens_details") or {}).get("cached_tokens", 0)
        self.generations[scene.generation] = {
            "id": scene.generation,
            "request_id": scene.generation.replace("gen-", "req-"),
            "api_type": api_type,
            "model": scene.model.slug,
            "provider_name": provider_name(scene.slug),
            "provider_responses": [],
            "created_at": scene.now,
            "streamed": streamed,
            "cancelled": cut,
            "finish_reason": None if cut else "stop",
            "native_finish_reason": None if cut else "stop",
            "latency": 120,
            "generation_time": 900,
            "tokens_prompt": usage.get("input_tokens", 0),
            "tokens_completion": usage.get("output_tokens", 0),
            "native_tokens_prompt": usage.get("input_tokens", 0),
            "native_tokens_completion": usage.get("output_tokens", 0),
            "native_tokens_reasoning": details.get("reasoning_tokens", 0),
            "native_tokens_cached": cached,
            "total_cost": cost,
            "usage": cost,
            "is_byok": usage.get("is_byok", False),
            "session_id": scene.body.get("session_id"),
            "external_user": scene.body.get("user"),
        }
