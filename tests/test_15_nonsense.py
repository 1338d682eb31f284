"""Whatever a provider sends, a turn ends once and every caller can read it."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from open_webui_openrouter_pipe import open_webui_openrouter_pipe as plugin
from tests.simulator import SCENARIOS, replies, scenario, variants

JUNK: list[Any] = [
    None,
    True,
    -1,
    10**9,
    1.5,
    "",
    "x",
    "\ud800",
    [],
    [None],
    {},
    {"a": 1},
    [1, "x", {"type": "output_text"}],
]
WITHOUT_A_STREAM = {f"F{n}" for n in range(1, 14)} | {"F14", "F23", "F24", "F25"}
ROUNDS = 40


def stream_of(name: str, variant: str) -> list[Any]:
    """Return the decoded events of a scenario; what is no JSON is left out."""
    body = replies.body(
        scenario(name, variant),
        {"model": "openai/gpt-4o", "input": "hi", "stream": True},
    )
    lines = (line[6:] for line in body.split(b"\n") if line.startswith(b"data: {"))
    return [event for line in lines if (event := plugin.parse_json(line))]


def distorted(value: Any, dice: random.Random) -> Any:
    """Return a JSON value with something in it missing or replaced by junk."""
    if not isinstance(value, (dict, list)) or not value:
        return dice.choice(JUNK)
    copy = value.copy()
    key = dice.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    action = dice.choice(["drop", "junk", "deeper", "deeper"])
    if action == "drop":
        del copy[key]
    else:
        copy[key] = (
            dice.choice(JUNK) if action == "junk" else distorted(copy[key], dice)
        )
    return copy


def shuffled(events: list[Any], dice: random.Random) -> list[Any]:
    """Return a stream with events distorted, lost, doubled and out of order."""
    events = list(events)
    for _ in range(dice.randint(1, 6)):
        place, other = dice.randrange(len(events)), dice.randrange(len(events))
        action = dice.choice(["distort", "distort", "distort", "double", "swap"])
        if action == "distort":
            events[place] = distorted(events[place], dice)
        elif action == "double":
            events.insert(other, events[place])
        else:
            events[place], events[other] = events[other], events[place]
    return events


def relayed(events: list[Any]) -> list[plugin.Output]:
    relay = plugin.Relay()
    outputs: list[plugin.Output] = []
    for now, raw in enumerate(events):
        event = plugin.parse_event(raw)
        outputs += relay.feed(event, float(now)) if event else []
    return [*outputs, *relay.end()]


CASES = [
    (name, variant)
    for name in SCENARIOS
    if name not in WITHOUT_A_STREAM
    for variant in variants(name)
]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_nonsense_ends_the_turn_once_and_can_be_shown(name: str, variant: str) -> None:
    events = stream_of(name, variant)
    assert events
    for seed in range(ROUNDS):
        outputs = relayed(shuffled(events, random.Random(f"{name}{variant}{seed}")))

        last = [o for o in outputs if isinstance(o, (plugin.Finished, plugin.Failed))]
        assert last == outputs[-1:], seed
        completion = plugin.Completion("m")
        faces = plugin.ResponsesFace(), plugin.ChunksFace("m", has_cards=True)
        for output in plugin.merged(outputs):
            completion.add(output)
            for face in faces:
                for event in face.render(output):
                    json.dumps(event, ensure_ascii=False).encode()
        json.dumps(completion.result(), ensure_ascii=False).encode()
