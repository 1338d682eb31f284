"""04 Wire: Responses events and items, parsed once."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_webui_openrouter_pipe import open_webui_openrouter_pipe as plugin
from tests.simulator import SCENARIOS, replies, scenario, variants
from tests.simulator.replies import Reply
from tests.turns import payloads

STREAMS = [
    (name, variant)
    for name in SCENARIOS
    for variant in variants(name)
    if isinstance(scenario(name, variant), Reply)
]
FLAT = {"type": "url_citation", "url": "https://a.example", "title": "A"}


# Citations -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "citation"),
    [
        (FLAT, ("https://a.example", "A", "")),
        (
            {**FLAT, "content": "deep [...] blue"},
            ("https://a.example", "A", "deep [...] blue"),
        ),
        ({**FLAT, "title": None}, ("https://a.example", "https://a.example", "")),
        (
            {"type": "url_citation", "url_citation": FLAT},
            ("https://a.example", "A", ""),
        ),
        ({**FLAT, "url": None}, None),
        ({**FLAT, "url": ""}, None),
        ({"type": "file_citation", "file_id": "f"}, None),
        ({"type": "future_citation"}, None),
        (None, None),
        ("https://a.example", None),
    ],
)
def test_a_citation_is_read_flat_or_nested(data: Any, citation: Any) -> None:
    assert plugin.parse_citation(data) == citation


# Items ---------------------------------------------------------------------------------


def part(text: Any, **more: Any) -> Any:
    """Build an `output_text` part."""
    return {"type": "output_text", "text": text, **more}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"type": "message", "content": [part("Hel"), part("lo.")]}, "Hello."),
        (
            {"type": "message", "content": [{"type": "refusal", "refusal": "No."}]},
            "No.",
        ),
        ({"type": "message", "content": [part(None), "x", None]}, ""),
        ({"type": "message"}, ""),
        ({"type": "message", "content": None}, ""),
        (
            {"type": "reasoning", "summary": [{"text": "One"}, {"text": "Two"}]},
            "One\n\nTwo",
        ),
        ({"type": "reasoning", "summary": ["plain"]}, "plain"),
        ({"type": "reasoning", "content": [{"text": "Raw"}]}, "Raw"),
        (
            {
                "type": "reasoning",
                "summary": [{"text": "Sum"}],
                "content": [{"text": "Raw"}],
            },
            "Sum",
        ),
        ({"type": "openrouter:future", "wonder": True}, ""),
    ],
)
def test_an_items_text_is_what_a_person_reads(data: Any, text: str) -> None:
    assert plugin.parse_item(data).text == text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"city": "Oslo"}', '{"city": "Oslo"}'),
        ("", ""),
        ({"city": "Oslo"}, '{"city": "Oslo"}'),
        (None, "{}"),
        ({}, "{}"),
    ],
)
def test_arguments_are_text_whatever_a_provider_sends(
    arguments: Any, expected: str
) -> None:
    item = plugin.parse_item({"type": "function_call", "arguments": arguments})

    assert item.arguments == expected


@pytest.mark.parametrize("data", [None, [], "message", 7, {}, {"type": None}])
def test_nonsense_is_an_item_without_anything(data: Any) -> None:
    item = plugin.parse_item(data)

    assert (item.type, item.text, item.citations, item.call_id) == ("", "", (), "")


def test_an_item_is_kept_verbatim() -> None:
    data = {
        "type": "reasoning",
        "id": "rs_1",
        "encrypted_content": "x.y",
        "future": [1],
    }

    assert plugin.parse_item(data).raw == data


# Snapshots -----------------------------------------------------------------------------


def test_a_snapshot_is_read() -> None:
    snapshot = plugin.parse_snapshot(
        {
            "status": "incomplete",
            "model": "openai/gpt-4o-mini",
            "output": [{"type": "message", "content": [part("Hel")]}, None],
            "usage": {"cost": 0.1},
            "incomplete_details": {"reason": "max_output_tokens"},
        }
    )

    assert snapshot.status == "incomplete"
    assert snapshot.model == "openai/gpt-4o-mini"
    assert [item.text for item in snapshot.items] == ["Hel", ""]
    assert snapshot.usage == {"cost": 0.1}
    assert snapshot.incomplete == "max_output_tokens"
    assert snapshot.fault is None


@pytest.mark.parametrize("data", [None, [], "x", {"output": {}, "usage": None}])
def test_nonsense_is_an_empty_snapshot(data: Any) -> None:
    assert plugin.parse_snapshot(data) == ("", "", (), None, None, "")


# Events --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "event"),
    [
        (
            {"type": "response.output_text.delta", "output_index": 2, "delta": "Hel"},
            {"type": "response.output_text.delta", "slot": 2, "text": "Hel"},
        ),
        (
            {
                "type": "response.reasoning_summary_text.delta",
                "summary_index": 1,
                "delta": "x",
            },
            {"slot": -1, "part": 1, "text": "x"},
        ),
        ({"type": "response.output_text.done", "text": "All"}, {"text": "All"}),
        ({"type": "response.refusal.done", "refusal": "No."}, {"text": "No."}),
        (
            {"type": "response.function_call_arguments.done", "arguments": {"a": 1}},
            {"text": '{"a": 1}'},
        ),
        (
            {"type": "response.function_call_arguments.delta", "delta": {"a": 1}},
            {"text": '{"a": 1}'},
        ),
        ({"type": "response.output_text.delta", "delta": None}, {"text": ""}),
        ({"type": "response.output_text.delta", "output_index": "0"}, {"slot": -1}),
        ({"error": {"code": 429, "message": "Slow"}}, {"type": "error"}),
        ({"type": "response.future.thing", "thing": [1, None, {}]}, {"text": ""}),
    ],
)
def test_an_event_is_read(data: Any, event: dict[str, Any]) -> None:
    parsed = plugin.parse_event(data)

    assert parsed is not None
    assert parsed._asdict().items() >= event.items()


@pytest.mark.parametrize("data", [None, [], "x", 7, {}, {"type": None}, {"type": 3}])
def test_what_is_no_event_is_none(data: Any) -> None:
    assert plugin.parse_event(data) is None


@pytest.mark.parametrize(
    "data",
    [
        {"type": "error", "code": "server_error", "message": "Down", "param": None},
        {"type": "error", "error": {"code": "server_error", "message": "Down"}},
        {
            "type": "response.error",
            "error": {"code": "server_error", "message": "Down"},
        },
        {
            "type": "response.failed",
            "response": {"error": {"code": "server_error", "message": "Down"}},
        },
        {"error": {"code": "server_error", "message": "Down"}},
    ],
)
def test_a_failure_inside_a_stream_is_found(data: Any) -> None:
    event = plugin.parse_event(data)

    assert event is not None
    assert event.fault == plugin.Fault("server_error", "Down")


@pytest.mark.parametrize(("name", "variant"), STREAMS)
def test_every_event_of_the_simulator_is_one(name: str, variant: str) -> None:
    for data in payloads(replies.body(scenario(name, variant, **SHORT.get(name, {})))):
        event = plugin.parse_event(data)

        assert event is not None
        assert event.type == data.get("type", "error")
        assert event.slot == data.get("output_index", -1)


SHORT: dict[str, dict[str, Any]] = {"F24": {"seconds": 2, "interval": 1}}

JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = [
    "delta",
    "output_index",
    "content_index",
    "summary_index",
    "text",
    "refusal",
    "arguments",
    "item",
    "annotation",
    "response",
    "error",
    "code",
    "message",
    "metadata",
    "part",
]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(plugin.Relay.HANDLERS)),
    st.dictionaries(st.sampled_from(KEYS), JSONS),
)
def test_no_nonsense_is_an_exception(type_: str, fields: dict[str, Any]) -> None:
    event = plugin.parse_event(json.loads(json.dumps({"type": type_, **fields})))

    assert event is not None
    assert isinstance(event.text, str)
    assert isinstance(event.slot, int)
