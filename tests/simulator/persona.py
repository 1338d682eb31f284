"""What the simulator says when nobody scripted it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from . import replies
from .replies import AnyReply
from .scene import Scene, content_texts, items_of

BENCH = re.compile(r"bench\s+deltas=(\d+)(?:\s+delay_ms=([\d.]+))?")


@dataclass(frozen=True)
class Prompt:
    """Something to type, and what it shows."""

    name: str
    prompt: str
    shows: str


PROMPTS: tuple[Prompt, ...] = ()


def last_user_text(scene: Scene) -> str:
    """Return the text of the last user message."""
    for item in reversed(items_of(scene.body)):
        if item.get("role") == "user":
            return "".join(content_texts(item.get("content")))
    return ""


def answer(scene: Scene) -> AnyReply:
    """Answer a request."""
    asked = last_user_text(scene)
    if found := BENCH.search(asked):
        texts = [f"word{n} " for n in range(int(found[1]))]
        return replies.text(deltas=texts, delay=float(found[2] or 0) / 1_000)
    return replies.text(f"You said: {asked}", delay=scene.pace)
