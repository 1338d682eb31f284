"""The relay alone, and with decoding in front: how many deltas a process can take."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from tests.simulator import replies
from tests.webui import load

from .rows import Options, Row, Scenario, at_least, median

DELTAS = 20_000
BUDGET = 100_000  # deltas a second
CHUNK = 4_096  # bytes that arrive together


def stream(deltas: int) -> bytes:
    """Return a text answer's bytes."""
    words = [f"word{number} " for number in range(deltas)]
    body = {"model": "openai/gpt-4o", "stream": True}
    return replies.body(replies.text(deltas=words), body)


def payloads(data: bytes) -> list[Any]:
    """Return the decoded events of a stream."""
    lines = (line[6:] for line in data.split(b"\n") if line.startswith(b"data: {"))
    return [json.loads(line) for line in lines]


def relay_only(plugin: ModuleType, events: list[Any]) -> str:
    """Parse and relay decoded events; return the text."""
    relay, now = plugin.Relay(), time.monotonic()
    texts: list[str] = []
    for raw in events:
        outputs = relay.feed(plugin.parse_event(raw), now)
        texts += [o.text for o in outputs if isinstance(o, plugin.Delta)]
    return "".join(texts)


def from_bytes(plugin: ModuleType, chunks: list[bytes]) -> str:
    """Decode, parse and relay bytes; return the text."""
    decoder, relay = plugin.SSEDecoder(), plugin.Relay()
    texts: list[str] = []
    for chunk in chunks:
        now = time.monotonic()
        for payload in decoder.feed(chunk):
            event = plugin.parse_event(plugin.parse_json(payload))
            outputs = relay.feed(event, now) if event else ()
            texts += [o.text for o in outputs if isinstance(o, plugin.Delta)]
    return "".join(texts)


def rate(work: Callable[[], str], deltas: int, rounds: int) -> float:
    """Return how many deltas a second of this process' own time handles."""
    rates: list[float] = []
    for _ in range(rounds):
        began = time.process_time()
        text = work()
        rates.append(deltas / max(time.process_time() - began, 1e-6))
        if text.count(" ") != deltas:
            raise AssertionError("deltas were lost")
    return median(rates)


def measure(options: Options) -> list[Row]:
    """Measure both."""
    deltas = 200 if options.tiny else DELTAS
    rounds = 1 if options.tiny else 2 * options.rounds + 1
    plugin = load("bench", publish=False).module
    data = stream(deltas)
    events = payloads(data)
    one = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    each = [line + b"\n\n" for line in data.split(b"\n\n") if line]
    figure = "deltas/s"
    alone = rate(lambda: relay_only(plugin, events), deltas, rounds)
    joined = rate(lambda: from_bytes(plugin, one), deltas, rounds)
    apart = rate(lambda: from_bytes(plugin, each), deltas, rounds)
    return [
        Row("bytes, 4 KiB at a time", {figure: joined}),
        Row("bytes, an event at a time", {figure: apart}),
        at_least("parsed events", figure, alone, BUDGET),
    ]


SCENARIOS: dict[str, Scenario] = {"relay": measure}
