"""The smallest pieces of a reply: ids, JSON, and stream steps as bytes."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

Event = dict[str, Any]
Chunk = tuple[float, bytes]

ALNUM = string.ascii_letters + string.digits
LOWER = string.ascii_lowercase + string.digits
KEEP_ALIVE = b": OPENROUTER PROCESSING\n\n"
DONE = b"data: [DONE]\n\n"


def to_json(value: Any) -> bytes:
    """Render JSON the way JavaScript does: raw UTF-8, lone surrogates escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


@dataclass
class Ids:
    """Draw every random-looking id from one seeded source."""

    seed: int = 0
    _random: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def take(self, length: int, alphabet: str = ALNUM) -> str:
        """Draw `length` characters."""
        return "".join(self._random.choices(alphabet, k=length))

    def generation(self, now: float) -> str:
        """Name a generation: `gen-<unix>-<20 alnum>`."""
        return f"gen-{int(now)}-{self.take(20)}"

    def item(self, prefix: str) -> str:
        """Name an output item: `msg_tmp_<11>` and its like."""
        return f"{prefix}_tmp_{self.take(11, LOWER)}"

    def native_reasoning(self) -> str:
        """Name a reasoning item as OpenAI does."""
        return "rs_" + self.take(32, "0123456789abcdef")

    def call(self, model: str, name: str, index: int) -> str:
        """Name a tool call as the model's provider does."""
        if model.startswith("anthropic/"):
            return f"toolu_{self.take(22)}"
        if model.startswith("google/"):
            return f"tool_{index}_{name}_{self.take(6)}"
        return f"call_{self.take(24)}"


@dataclass(frozen=True, slots=True)
class Say:
    """Send one event; its sequence number is filled in when absent."""

    event: Event
    delay: float = 0.0


@dataclass(frozen=True, slots=True)
class Deltas:
    """Send one delta event per text; `event` is what they have in common."""

    event: Event
    texts: Sequence[str]
    delay: float = 0.0


@dataclass(frozen=True, slots=True)
class Raw:
    """Send bytes as they are: a comment, a broken line."""

    data: bytes
    delay: float = 0.0


Step = Say | Deltas | Raw


def say(type_: str, delay: float = 0.0, /, **fields: Any) -> Say:
    """Build a `Say` of a typed event."""
    return Say({"type": type_, **fields}, delay)


def numbered(event: Event, number: int) -> Event:
    """Put the sequence number after the type of a typed event."""
    if "type" not in event or "sequence_number" in event:
        return event
    rest = {key: value for key, value in event.items() if key != "type"}
    return {"type": event["type"], "sequence_number": number, **rest}


def data_line(payload: bytes) -> bytes:
    """Frame one payload as a server-sent event."""
    return b"data: " + payload + b"\n\n"


def render(steps: Iterable[Step]) -> Iterator[Chunk]:
    """Turn steps into (delay before, bytes) pairs, one pair per event."""
    number = 0
    for step in steps:
        if isinstance(step, Raw):
            yield step.delay, step.data
        elif isinstance(step, Say):
            yield step.delay, data_line(to_json(numbered(step.event, number)))
            number += 1
        else:
            yield from _render_deltas(step, number)
            number += len(step.texts)


def _render_deltas(step: Deltas, number: int) -> Iterator[Chunk]:
    """Render a run of deltas around the constant parts of their line."""
    common = {key: value for key, value in step.event.items() if key != "type"}
    head = b'data: {"type":%b,"sequence_number":' % to_json(step.event["type"])
    middle = b"," + to_json(common)[1:-1] + b',"delta":'
    has_logprobs = step.event["type"] == "response.output_text.delta"
    tail = b',"logprobs":[]}\n\n' if has_logprobs else b"}\n\n"
    for offset, text in enumerate(step.texts, number):
        line = b"%b%d%b%b%b" % (head, offset, middle, to_json(text), tail)
        yield step.delay, line


def expand(steps: Iterable[Step]) -> Iterator[Event]:
    """List the events of steps as dicts, deltas one by one."""
    for step in steps:
        if isinstance(step, Say):
            yield step.event
        elif isinstance(step, Deltas):
            for text in step.texts:
                yield {**step.event, "delta": text}


def pieces(text: str, deltas: int | Sequence[str] | None = None) -> Sequence[str]:
    """Split a text into deltas: given ones, `deltas` even ones, or word by word."""
    if deltas is None:
        return _words(text)
    if isinstance(deltas, int):
        cuts = [len(text) * n // deltas for n in range(deltas + 1)]
        return [text[a:b] for a, b in pairwise(cuts)]
    return deltas


def _words(text: str, group: int = 3) -> list[str]:
    """Split after every few words, keeping every character."""
    words = [word + " " for word in text.split(" ")]
    words[-1] = words[-1][:-1]
    runs = range(0, len(words), group)
    return [run for n in runs if (run := "".join(words[n : n + group]))]
