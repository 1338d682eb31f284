"""15 Relay: one response's events become outputs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_webui_openrouter_pipe import open_webui_openrouter_pipe as plugin
from tests.simulator import SCENARIOS, replies, scenario, variants
from tests.simulator.replies import Call, Reply
from tests.turns import payloads

OPENAPI = Path(__file__).parents[1].parent / "shared/reference/openrouter-openapi.yaml"

# The catalogue of openrouter.md 3.2, word by word.
PINNED = frozenset(
    [
        "error",
        "response.error",
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
        "response.output_item.added",
        "response.output_item.done",
        "response.content_part.added",
        "response.content_part.done",
        "response.output_text.delta",
        "response.output_text.done",
        "response.output_text.annotation.added",
        "response.refusal.delta",
        "response.refusal.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.custom_tool_call_input.delta",
        "response.custom_tool_call_input.done",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_part.done",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
        "response.image_generation_call.in_progress",
        "response.image_generation_call.generating",
        "response.image_generation_call.completed",
        "response.image_generation_call.partial_image",
        "response.web_search_call.in_progress",
        "response.web_search_call.searching",
        "response.web_search_call.completed",
        "response.code_interpreter_call.in_progress",
        "response.code_interpreter_call.interpreting",
        "response.code_interpreter_call.completed",
        "response.code_interpreter_call_code.delta",
        "response.code_interpreter_call_code.done",
        "response.apply_patch_call_operation_diff.delta",
        "response.apply_patch_call_operation_diff.done",
        "response.fusion_call.in_progress",
        "response.fusion_call.panel.added",
        "response.fusion_call.panel.delta",
        "response.fusion_call.panel.reasoning.delta",
        "response.fusion_call.panel.completed",
        "response.fusion_call.panel.failed",
        "response.fusion_call.analysis.in_progress",
        "response.fusion_call.analysis.completed",
        "response.fusion_call.completed",
        "response.debug",
    ]
)
MODELS = {
    "H2": "deepseek/deepseek-r1",
    "H3": "openai/gpt-5",
    "H4": "openai/gpt-5",
    "H5": "anthropic/claude-sonnet-4.5",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "F23": {},
    "F24": {"seconds": 2, "interval": 1},
}
STREAMS = [
    (name, variant)
    for name in SCENARIOS
    for variant in variants(name)
    if isinstance(scenario(name, variant), Reply)
]
HAPPY = [pair for pair in STREAMS if pair[0].startswith("H")]
ENDS = (plugin.Finished, plugin.Failed)


@cache
def events(name: str, variant: str | None = None) -> tuple[plugin.Event, ...]:
    """Return the events of a scenario; F23 falls silent, and that is its end."""
    request = {
        "model": MODELS.get(name, "openai/gpt-4o"),
        "include": ["reasoning.encrypted_content"],
        "stream": True,
    }
    options = OPTIONS.get(name, {})
    if (name, variant) == ("F23", "comments"):
        options = {"comments": 3}
    return read(replies.body(scenario(name, variant, **options), request))


def read(data: bytes) -> tuple[plugin.Event, ...]:
    """Return the events of plainly framed bytes."""
    return tuple(e for raw in payloads(data) if (e := plugin.parse_event(raw)))


def of(*raw: dict[str, Any]) -> list[plugin.Event]:
    """Return raw events as they are parsed."""
    return [event for each in raw if (event := plugin.parse_event(each))]


def fed(
    given: Iterable[plugin.Event], relay: plugin.Relay | None = None, pace: float = 0.0
) -> list[plugin.Output]:
    """Feed events to a relay, then say that the bytes stopped."""
    relay = relay or plugin.Relay()
    outputs = [o for n, e in enumerate(given) for o in relay.feed(e, n * pace)]
    return [*outputs, *relay.end()]


def text(outputs: Iterable[plugin.Output], kind: str = "message") -> str:
    """Return the text that outputs show of a kind."""
    deltas = (o for o in outputs if isinstance(o, plugin.Delta))
    return "".join(delta.text for delta in deltas if delta.kind == kind)


def last_closed(outputs: Iterable[plugin.Output], kind: str) -> list[dict[str, Any]]:
    """Return the items of a kind as they stand in the end."""
    closed = {o.slot: o for o in outputs if isinstance(o, plugin.Closed)}
    return [each.item for _, each in sorted(closed.items()) if each.kind == kind]


def of_type(outputs: Iterable[plugin.Output], type_: Any) -> list[Any]:
    """Return the outputs of a type."""
    return [output for output in outputs if isinstance(output, type_)]


def check(outputs: list[plugin.Output]) -> None:
    """Assert what holds of every response."""
    assert [type(o) for o in outputs if isinstance(o, ENDS)] == [type(outputs[-1])]
    opened = [o.slot for o in outputs if isinstance(o, plugin.Opened)]
    assert opened == list(range(len(opened)))
    assert {o.slot for o in outputs if isinstance(o, plugin.Closed)} == set(opened)
    for output in outputs:
        if isinstance(output, (plugin.Delta, plugin.Closed)):
            assert output.slot in opened
    for item in last_closed(outputs, "message"):
        assert [part["type"] for part in item["content"]] == ["output_text"]
    shown = (plugin.Opened, plugin.Delta, plugin.Closed)
    told = str([o for o in outputs if isinstance(o, shown)])
    for opaque in ("encrypted_content", "signature", "logprobs", "iVBOR", "base64"):
        assert opaque not in told


def closed_texts(outputs: Iterable[plugin.Output]) -> str:
    """Return the text of the messages as they stand in the end."""
    items = last_closed(outputs, "message")
    return "".join(part["text"] for item in items for part in item["content"])


# Event types ---------------------------------------------------------------------------


def test_every_type_of_the_catalogue_has_a_handler() -> None:
    assert set(plugin.Relay.HANDLERS) >= PINNED


def test_every_type_of_the_schema_has_a_handler() -> None:
    if not OPENAPI.is_file():
        pytest.skip(f"there is no OpenAPI file at {OPENAPI}")
    yaml = pytest.importorskip("yaml")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    schema = yaml.load(OPENAPI.read_text("utf-8"), loader)
    union = schema["components"]["schemas"]["StreamEvents"]
    types = set(union["discriminator"]["mapping"])

    assert len(types) > 40
    assert types <= set(plugin.Relay.HANDLERS)
    assert set(plugin.Relay.HANDLERS) == types | PINNED


# Whole and cut -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "variant"), STREAMS)
def test_a_stream_has_one_end_and_shows_nothing_opaque(name: str, variant: str) -> None:
    outputs = fed(events(name, variant))

    check(outputs)
    assert closed_texts(outputs) == text(outputs)


@pytest.mark.parametrize(("name", "variant"), STREAMS)
def test_a_stream_cut_at_any_event_keeps_its_text(name: str, variant: str) -> None:
    whole = text(fed(events(name, variant)))
    before = ""
    for place in range(len(events(name, variant))):
        outputs = fed(events(name, variant)[:place])
        check(outputs)
        shown = text(outputs)
        assert whole.startswith(shown)
        assert shown.startswith(before)
        assert closed_texts(outputs) == shown
        before = shown


@pytest.mark.parametrize(("name", "variant"), HAPPY)
def test_a_stream_without_deltas_has_the_same_text(name: str, variant: str) -> None:
    whole = list(events(name, variant))
    bare = [e for e in whole if not e.type.endswith((".delta", "_text.done"))]

    assert closed_texts(fed(bare)) == closed_texts(fed(whole))


@pytest.mark.parametrize(("name", "variant"), HAPPY)
def test_the_snapshot_alone_has_the_same_text(name: str, variant: str) -> None:
    whole = events(name, variant)
    outputs = fed(whole[-1:])

    check(outputs)
    assert closed_texts(outputs) == closed_texts(fed(whole))
    assert repr(outputs[-1]) == repr(fed(whole)[-1])


@pytest.mark.parametrize(("name", "variant"), HAPPY)
def test_a_second_time_around_yields_nothing(name: str, variant: str) -> None:
    given = events(name, variant)
    relay = plugin.Relay()
    once = [output for event in given for output in relay.feed(event, 0)]

    assert [output for event in given for output in relay.feed(event, 0)] == []
    assert relay.end() == []
    assert relay.fail(plugin.ConnectionLost()) == []
    assert isinstance(once[-1], plugin.Finished)


def test_what_comes_behind_the_end_yields_nothing() -> None:
    assert text(fed(events("F30", "delta-after"))) == "Hello."
    assert len(of_type(fed(events("F30", "completed-twice")), ENDS)) == 1


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_order_of_events_is_an_exception(data: Any) -> None:
    pool = [
        e
        for pair in (("H2", "late"), ("H7", "interleaved"), ("H9", "native"))
        for e in events(*pair)
    ]
    chosen = data.draw(st.lists(st.sampled_from(pool), max_size=25))

    outputs = fed(chosen)

    check(outputs)


# Reasoning -----------------------------------------------------------------------------


def test_thoughts_close_when_text_begins_though_their_end_comes_late() -> None:
    outputs = fed(events("H2", "late"))
    shown = of_type(outputs, (plugin.Delta, plugin.Closed))
    kinds = [(type(o).__name__, o.kind) for o in shown]

    closing = kinds.index(("Closed", "reasoning"))
    assert closing < kinds.index(("Delta", "message"))
    assert text(outputs, "reasoning") == "First I look at the question."
    assert text(outputs) == "Hello."


def test_c1_the_duration_is_the_time_of_the_thoughts() -> None:
    def thinks(index: int) -> dict[str, Any]:
        return {
            "type": "response.reasoning_text.delta",
            "output_index": 0,
            "delta": f"{index} ",
        }

    relay = plugin.Relay()
    item = {"type": "reasoning", "id": "rs", "summary": []}
    added = {"type": "response.output_item.added", "output_index": 0, "item": item}
    says = {"type": "response.output_text.delta", "output_index": 1, "delta": "So."}
    relay.feed(of(added)[0], 10.0)
    for n in range(20):
        relay.feed(of(thinks(n))[0], 10.1 + n / 10)
    outputs = relay.feed(of(says)[0], 30.0)

    (thought,) = last_closed(outputs, "reasoning")
    assert thought["duration"] == pytest.approx(2.0, abs=0.15)


def test_silent_thoughts_last_until_their_end() -> None:
    relay = plugin.Relay()
    outputs: list[plugin.Output] = []
    for number, event in enumerate(events("H4")):
        outputs += relay.feed(event, number * 1.0)

    (thought,) = last_closed(outputs, "reasoning")
    assert thought["duration"] >= 1
    assert thought["summary"] == []


def test_two_summary_parts_are_two_paragraphs() -> None:
    outputs = fed(events("H3", "two"))

    assert text(outputs, "reasoning") == "**Plan** I look.\n\n**Check** It holds."
    (thought,) = last_closed(outputs, "reasoning")
    assert thought["summary"][0]["text"] == text(outputs, "reasoning")


def test_a_summary_beside_raw_thoughts_is_not_shown_twice() -> None:
    where = {"output_index": 0}
    outputs = fed(
        of(
            {"type": "response.reasoning_text.delta", **where, "delta": "Raw."},
            {"type": "response.reasoning_summary_text.delta", **where, "delta": "Sum."},
        )
    )

    assert text(outputs, "reasoning") == "Raw."


# Text ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deltas", "shown"),
    [
        (["rain \ud83c", "\udf27."], "rain 🌧."),
        (["\ud83c", "\udf27", "\ud83c\udf27"], "🌧🌧"),
        (["a\ud83c", "b"], "a\ufffdb"),
        (["\udf27"], "\ufffd"),
        (["\u2028\u2029\x85"], "\u2028\u2029\x85"),
    ],
)
def test_pairs_that_two_deltas_share_are_joined(deltas: list[str], shown: str) -> None:
    where = {"type": "response.output_text.delta", "output_index": 0}
    outputs = fed(of(*({**where, "delta": delta} for delta in deltas)))

    assert text(outputs) == shown
    assert closed_texts(outputs) == shown
    assert text(outputs).encode()


def test_half_a_pair_at_the_very_end_is_no_exception() -> None:
    delta = {
        "type": "response.output_text.delta",
        "output_index": 0,
        "delta": "a\ud83c",
    }

    assert text(fed(of(delta))).startswith("a")


def test_c5_text_only_in_the_snapshot_is_shown() -> None:
    outputs = fed(events("F27", "only-completed"))

    assert text(outputs) == closed_texts(outputs) == "Hello."
    assert of_type(outputs, plugin.Finished)[0].remark is None


@pytest.mark.parametrize("variant", ["no-output", "other-ids"])
def test_a_snapshot_that_disagrees_adds_nothing(variant: str) -> None:
    outputs = fed(events("F27", variant))

    assert text(outputs) == "Hello."
    assert len(last_closed(outputs, "message")) == 1


def test_without_indexes_a_message_is_one_message() -> None:
    delta = {"type": "response.output_text.delta", "delta": "Hel"}
    outputs = fed(of(delta, {**delta, "delta": "lo."}))

    assert [closed_texts(outputs), len(of_type(outputs, plugin.Opened))] == [
        "Hello.",
        1,
    ]


def test_a_delta_for_another_kind_of_item_is_not_shown() -> None:
    item = {"type": "openrouter:advisor", "id": "x"}
    outputs = fed(
        of(
            {"type": "response.output_item.added", "output_index": 0, "item": item},
            {
                "type": "response.output_text.delta",
                "output_index": 0,
                "delta": "Advice",
            },
            {
                "type": "response.output_text.delta",
                "output_index": 1,
                "delta": "Answer",
            },
        )
    )

    assert text(outputs) == "Answer"


# Citations, pictures, unknown things ---------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "count"),
    [
        ("native", 2),
        ("repeated", 1),
        ("final-part", 2),
        ("completed-only", 2),
        ("untitled", 1),
        ("zero-indices", 1),
        ("excerpt", 1),
        ("plugin", 2),
    ],
)
def test_c7_each_address_is_cited_once(variant: str, count: int) -> None:
    sources = of_type(fed(events("H9", variant)), plugin.Sourced)

    assert len(sources) == len({s.citation.url for s in sources}) == count
    assert all(source.citation.title for source in sources)


def test_an_excerpt_is_kept() -> None:
    (source,) = of_type(fed(events("H9", "excerpt")), plugin.Sourced)

    assert source.citation.excerpt == "deep [...] blue"


@pytest.mark.parametrize("variant", variants("H10"))
def test_a_picture_is_one_picture(variant: str) -> None:
    outputs = fed(events("H10", variant))

    assert len(of_type(outputs, plugin.Pictured)) == 1
    assert of_type(outputs, plugin.Finished)[0].remark is None


def test_unknown_things_are_kept_and_passed_over() -> None:
    outputs = fed(events("F28"))

    assert text(outputs) == "Hello."
    hidden = [k.item for k in of_type(outputs, plugin.Keep) if k.slot is None]
    assert [item["type"] for item in hidden] == ["openrouter:future"]


# Calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "name", "arguments"),
    [
        ("deltas", "get_weather", '{"city": "Oslo"}'),
        ("no-deltas", "get_weather", '{"city": "Oslo"}'),
        ("empty", "get_time", "{}"),
        ("empty-object", "get_time", "{}"),
        ("unicode", "get_weather", '{"city":"\\u00c5s \\ud83c\\udf27"}'),
    ],
)
def test_a_call_has_its_name_and_arguments(
    variant: str, name: str, arguments: str
) -> None:
    outputs = fed(events("H6", variant))

    (call,) = last_closed(outputs, "function_call")
    assert (call["name"], call["arguments"]) == (name, arguments)
    assert of_type(outputs, plugin.Finished)[0].reason == "tool_calls"


@pytest.mark.parametrize("variant", ["sequential", "interleaved"])
def test_parallel_calls_do_not_mix(variant: str) -> None:
    calls = last_closed(fed(events("H7", variant)), "function_call")

    assert [call["arguments"] for call in calls] == [
        '{"city": "Oslo"}',
        '{"city": "Rome"}',
    ]


@pytest.mark.parametrize("variant", variants("F33"))
def test_d8_call_ids_are_there_and_unique(variant: str) -> None:
    outputs = fed(events("F33", variant))

    calls = last_closed(outputs, "function_call")
    ids = [call["call_id"] for call in calls]
    kept = {k.slot: k.item["call_id"] for k in of_type(outputs, plugin.Keep)}
    assert all(ids)
    assert len(set(ids)) == len(ids) == 2
    assert [kept[slot] for slot in sorted(kept)] == ids


def test_a_call_id_of_the_history_gets_another() -> None:
    data = replies.body(replies.tool_calls([Call("get", "", "call_0")]))

    (call,) = last_closed(fed(read(data), plugin.Relay({"call_0"})), "function_call")

    assert call["call_id"] not in ("", "call_0")


def test_arguments_as_an_object_are_text() -> None:
    (call,) = last_closed(fed(events("F34")), "function_call")

    assert call["arguments"] == '{"city": "Oslo"}'


def test_arguments_that_break_off_stay_as_they_are() -> None:
    outputs = fed(events("H6", "deltas")[:5])

    (call,) = last_closed(outputs, "function_call")
    assert '{"city": "Oslo"}'.startswith(call["arguments"])


# What the provider wants back ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "secret"),
    [("H3", "encrypted_content"), ("H4", "encrypted_content"), ("H5", "signature")],
)
def test_f1_items_are_kept_verbatim(name: str, secret: str) -> None:
    given = events(name)
    outputs = fed(given)

    done = [
        e.item.raw for e in given if e.type == "response.output_item.done" and e.item
    ]
    last = {k.slot: k.item for k in of_type(outputs, plugin.Keep)}
    kept = [last[slot] for slot in sorted(last)]
    assert kept == done
    assert kept[0][secret]


def test_what_only_the_snapshot_has_is_kept_too() -> None:
    given = events("H3", "one")
    bare = [
        e._replace(item=e.item._replace(raw=without_secrets(e.item.raw)))
        if e.item
        else e
        for e in given
    ]

    kept = of_type(fed(bare), plugin.Keep)

    last = [k.item for k in kept if k.item["type"] == "reasoning"][-1]
    assert last["encrypted_content"]


def without_secrets(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item without what the provider added."""
    return {k: v for k, v in item.items() if k not in ("encrypted_content", "format")}


# Ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "variant", "reason", "remark"),
    [
        ("H1", "default", "stop", None),
        ("H6", "deltas", "tool_calls", None),
        ("H6", "truncated", "length", plugin.OutputLimit),
        ("H11", "default", "stop", None),
        ("F2", "empty", "length", plugin.OutputLimit),
        ("F19", "default", "length", plugin.OutputLimit),
        ("F20", "default", "content_filter", plugin.Filtered),
        ("F21", "default", "length", plugin.ThoughtLimit),
        ("F26", "default", "stop", plugin.NoAnswer),
    ],
)
def test_the_end_says_why(name: str, variant: str, reason: str, remark: Any) -> None:
    end = fed(events(name, variant))[-1]

    assert isinstance(end, plugin.Finished)
    assert end.reason == reason
    assert type(end.remark) is (remark or type(None))
    assert end.usage


def test_f31_the_model_that_answered_is_known() -> None:
    end = fed(events("F31"))[-1]

    assert isinstance(end, plugin.Finished)
    assert end.model == "openai/gpt-4o-mini"


def test_a_failure_keeps_the_usage() -> None:
    end = fed(events("F16"))[-1]

    assert isinstance(end, plugin.Failed)
    assert end.usage
    assert end.error.detail == "Provider disconnected"


def test_slots_go_on_over_the_rounds_of_a_turn() -> None:
    outputs = fed(events("H7", "sequential"), plugin.Relay(first_slot=3))

    assert [o.slot for o in of_type(outputs, plugin.Opened)] == [3, 4]
    assert {o.slot for o in of_type(outputs, plugin.Closed)} == {3, 4}


def test_many_deltas_cost_no_quadratic_time() -> None:
    delta = of(
        {"type": "response.output_text.delta", "output_index": 0, "delta": "abcde"}
    )
    relay = plugin.Relay()
    for _ in range(200_000):
        relay.feed(delta[0], 0.0)

    assert len(closed_texts(relay.end())) == 1_000_000
