"""The named scenarios of §9.4 and §9.5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import replies
from .replies import AnyReply

SCENARIOS: dict[str, dict[str, Callable[..., AnyReply]]] = {"H1": {"": replies.text}}


def scenario(name: str, variant: str | None = None, **options: Any) -> AnyReply:
    """Build the reply of a scenario."""
    return SCENARIOS[name][variant or next(iter(SCENARIOS[name]))](**options)


def variants(name: str) -> list[str]:
    """List the variants of a scenario."""
    return list(SCENARIOS[name])


def listing() -> dict[str, list[str]]:
    """List all scenarios with their variants."""
    return {name: variants(name) for name in SCENARIOS}
