"""16 Chat: outputs become what Open WebUI or an API client reads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from open_webui_openrouter_pipe import open_webui_openrouter_pipe as plugin
from tests.simulator import Simulator, replies, scenario
from tests.simulator.replies import Call
from tests.turns import CHAT, MODEL, Shown, answer, ask, ask_api, body, opened, whole

HANDED_OVER = {**CHAT, "params": {"tool_approval_mode": "ask"}}
ITEM: dict[str, Any] = {"id": "msg_1", "type": "message", "content": []}
THOUGHT: dict[str, Any] = {"id": "rs_1", "type": "reasoning", "summary": []}
CALL: dict[str, Any] = {
    "id": "fc_1",
    "type": "function_call",
    "call_id": "call_1",
    "name": "get",
    "arguments": "{}",
}
CITED = plugin.Citation("https://a.example", "A", "deep")
USAGE = {
    "input_tokens": 3,
    "output_tokens": 2,
    "input_tokens_details": {"cached_tokens": 1},
    "output_tokens_details": {"reasoning_tokens": 1},
    "total_tokens": 5,
    "cost": 0.5,
}
DONE = plugin.Finished(USAGE, MODEL, "stop")
LIMITED = plugin.Finished(USAGE, MODEL, "length", plugin.OutputLimit())
LOST = plugin.Failed(plugin.ConnectionLost(), USAGE)


def rendered(face: plugin.Face, *outputs: plugin.Output) -> list[Any]:
    """Return all events for outputs."""
    return [event for output in outputs for event in face.render(output)]


# Merging -------------------------------------------------------------------------------


def delta(slot: int, text: str) -> plugin.Delta:
    """Build a delta of a message."""
    return plugin.Delta(slot, "message", text)


@pytest.mark.parametrize(
    ("given", "result"),
    [
        ([], []),
        ([delta(0, "a")], [delta(0, "a")]),
        ([delta(0, "a"), delta(0, "b"), delta(0, "c")], [delta(0, "abc")]),
        ([delta(0, "a"), delta(1, "b")], [delta(0, "a"), delta(1, "b")]),
        (
            [delta(0, "a"), plugin.Noted("x"), delta(0, "b")],
            [delta(0, "a"), plugin.Noted("x"), delta(0, "b")],
        ),
        ([plugin.Noted("x"), plugin.Noted("x")], [plugin.Noted("x")] * 2),
    ],
)
def test_neighbouring_deltas_become_one(given: Any, result: Any) -> None:
    assert plugin.merged(given) == result


# Responses events ----------------------------------------------------------------------


def test_an_item_is_added_grows_and_is_done() -> None:
    events = rendered(
        plugin.ResponsesFace(),
        plugin.Opened(0, "reasoning", THOUGHT),
        plugin.Delta(0, "reasoning", "I look."),
        plugin.Closed(0, "reasoning", THOUGHT),
        plugin.Opened(1, "message", ITEM),
        plugin.Delta(1, "message", "Hello."),
        plugin.Opened(2, "function_call", CALL),
        plugin.Delta(2, "function_call", "{}"),
    )

    told = [
        (e["type"], e["output_index"], e.get("item_id"), e.get("delta")) for e in events
    ]
    assert told == [
        ("response.output_item.added", 0, None, None),
        ("response.reasoning_summary_text.delta", 0, "rs_1", "I look."),
        ("response.output_item.done", 0, None, None),
        ("response.output_item.added", 1, None, None),
        ("response.output_text.delta", 1, "msg_1", "Hello."),
        ("response.output_item.added", 2, None, None),
        ("response.function_call_arguments.delta", 2, "fc_1", "{}"),
    ]
    assert events[1]["summary_index"] == events[4]["content_index"] == 0


def test_what_the_provider_wants_back_is_not_shown() -> None:
    keep = plugin.Keep(0, {"encrypted_content": "x"})

    assert rendered(plugin.ResponsesFace(), keep) == []
    assert rendered(plugin.ChunksFace(MODEL, has_cards=True), keep) == []


def test_the_end_carries_the_usage_and_no_output() -> None:
    (event,) = rendered(plugin.ResponsesFace(), DONE)

    assert event["type"] == "response.completed"
    assert event["response"]["usage"] == USAGE
    assert "output" not in event["response"]


def test_an_early_end_is_complete_and_says_why() -> None:
    completed, failed = rendered(plugin.ResponsesFace(), LIMITED)

    assert completed["type"] == "response.completed"
    assert failed["type"] == "response.failed"
    assert "length limit" in failed["response"]["error"]["message"]


def test_a_failure_carries_its_usage_where_the_host_reads_it() -> None:
    spent, failed = rendered(plugin.ResponsesFace(), LOST)

    assert spent == {"choices": [], "usage": USAGE}
    assert failed["type"] == "response.failed"
    assert rendered(plugin.ResponsesFace(), plugin.Failed(plugin.NoCredit()))[0][
        "type"
    ] == ("response.failed")


def test_a_source_a_picture_and_a_line() -> None:
    source, picture, line = rendered(
        plugin.ResponsesFace(),
        plugin.Sourced(CITED),
        plugin.Pictured("https://a.example/b.png"),
        plugin.Noted("Trying again"),
    )

    assert source["event"]["type"] == "source"
    assert source["event"]["data"]["source"] == {
        "name": "A",
        "url": "https://a.example",
    }
    assert source["event"]["data"]["document"] == ["deep"]
    assert picture["choices"][0]["delta"]["images"][0]["image_url"]["url"].endswith(
        "b.png"
    )
    assert line["event"] == {
        "type": "status",
        "data": {"description": "Trying again", "done": True},
    }


# Chunks --------------------------------------------------------------------------------


def test_chunks_share_their_head() -> None:
    face = plugin.ChunksFace("pipe.a/b", has_cards=False)
    chunks = rendered(face, delta(0, "Hel"), delta(0, "lo."), DONE)

    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["model"] for chunk in chunks} == {"pipe.a/b"}
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]] == [
        None,
        None,
        "stop",
    ]


def test_two_messages_are_two_paragraphs() -> None:
    face = plugin.ChunksFace(MODEL, has_cards=False)
    shown = Shown(rendered(face, delta(0, "One."), delta(2, "Two."), delta(2, "!")))

    assert "".join(shown.chunked("content")) == "One.\n\nTwo.!"


def test_the_usage_has_the_names_of_both() -> None:
    face = plugin.ChunksFace(MODEL, has_cards=False)
    usage = rendered(face, DONE)[-1]["usage"]

    assert usage.items() >= USAGE.items()
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 2)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1}
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 1}


@pytest.mark.parametrize("has_cards", [False, True])
def test_an_early_end_is_a_card_in_a_chat_alone(has_cards: bool) -> None:
    face = plugin.ChunksFace(MODEL, has_cards=has_cards)
    shown = Shown(rendered(face, plugin.Noted("x"), delta(0, "Hel"), LIMITED))

    assert shown.finishes == ["length"]
    assert len(shown.errors) == has_cards
    assert len(shown.lines) == has_cards


def test_a_failure_is_an_error_for_everybody() -> None:
    face = plugin.ChunksFace(MODEL, has_cards=False)
    shown = Shown(rendered(face, delta(0, "Hel"), LOST))

    assert len(shown.errors) == 1
    assert shown.errors[0]["type"] == "connection_lost"
    assert shown.finishes == []
    assert len(shown.usages) == 1


# In one piece --------------------------------------------------------------------------


def test_a_completion_collects_a_turn() -> None:
    completion = plugin.Completion("pipe.a/b")
    part = {"type": "output_text", "text": "Hello."}
    thought = {"type": "summary_text", "text": "I look."}
    for output in (
        plugin.Closed(0, "reasoning", {**THOUGHT, "summary": []}),
        plugin.Closed(1, "message", {**ITEM, "content": [part]}),
        plugin.Closed(2, "function_call", CALL),
        plugin.Closed(0, "reasoning", {**THOUGHT, "summary": [thought]}),
        plugin.Sourced(CITED),
        plugin.Pictured("https://a.example/b.png"),
        plugin.Keep(0, {"encrypted_content": "x"}),
        plugin.Finished(USAGE, MODEL, "tool_calls"),
    ):
        completion.add(output)

    result = completion.result()
    message = result["choices"][0]["message"]
    assert message["content"] == "Hello."
    assert message["reasoning_content"] == "I look."
    assert message["tool_calls"][0]["function"] == {"name": "get", "arguments": "{}"}
    assert message["annotations"][0]["url_citation"]["url"] == "https://a.example"
    assert len(message["images"]) == 1
    assert [item["type"] for item in result["output"]] == [
        "reasoning",
        "message",
        "function_call",
    ]
    assert result["choices"][0]["finish_reason"] == "tool_calls"
    assert result["model"] == "pipe.a/b"
    assert "encrypted" not in str(result)


def test_an_empty_completion_has_empty_text() -> None:
    result = plugin.Completion("x").result()

    assert result["choices"][0]["message"] == {"role": "assistant", "content": ""}
    assert result["usage"] is None


# Pace ----------------------------------------------------------------------------------


async def batches(
    *given: list[plugin.Output],
) -> AsyncGenerator[list[plugin.Output], None]:
    """Yield batches at once."""
    for batch in given:
        yield batch


async def test_without_an_interval_every_piece_is_an_event() -> None:
    parts: list[plugin.Output] = [delta(0, "a"), delta(0, "b")]
    face = plugin.ChunksFace(MODEL, has_cards=False)

    events = [e async for e in plugin.paced(batches(parts, [DONE]), face, 0)]

    assert Shown(events).chunked("content") == ["a", "b"]


async def test_with_an_interval_what_came_together_goes_together() -> None:
    parts: list[plugin.Output] = [delta(0, "a"), delta(0, "b")]
    face = plugin.ChunksFace(MODEL, has_cards=False)

    events = [e async for e in plugin.paced(batches(parts, [DONE]), face, 0.01)]

    assert Shown(events).chunked("content") == ["ab"]


async def test_c3_a_thousand_deltas_are_few_events(simulator: Simulator) -> None:
    text = "word " * 1000
    simulator.script(replies.text(text, 1000))
    async with opened(simulator) as pipe:
        shown = await ask(pipe)

    assert shown.text == shown.streamed == text
    assert len(shown.events) <= 60


async def test_the_first_piece_goes_at_once(simulator: Simulator) -> None:
    simulator.script(replies.text("abcdef", 6, delay=0.3))
    async with opened(simulator, STREAM_INTERVAL_MS=1000) as pipe:
        await pipe.pipes()
        begun = time.monotonic()
        events = await answer(pipe)
        first = [await anext(events) for _ in range(2)][-1]
        took = time.monotonic() - begun
        await events.aclose()

    assert first["delta"] == "a"
    assert took < 0.9  # the delta is there after 0.3 s, the interval is 1 s


async def test_the_interval_is_kept(simulator: Simulator) -> None:
    simulator.script(replies.text("a" * 50, 50, delay=0.01))
    async with opened(simulator, STREAM_INTERVAL_MS=200) as pipe:
        shown = await ask(pipe)

    assert shown.text == "a" * 50
    assert 2 <= len(shown.deltas("output_text")) <= 6


async def test_g5_a_slow_reader_slows_upstream_down(simulator: Simulator) -> None:
    simulator.script(replies.text("a" * 20_000_000, 2_000))
    async with opened(simulator) as pipe:
        events = await answer(pipe)
        seen = [await anext(events) for _ in range(2)]
        await asyncio.sleep(0.5)
        finished = simulator.posts[0].finished
        await events.aclose()

    assert seen
    assert not finished


# Faces in a chat -----------------------------------------------------------------------


async def test_a_chat_can_be_shown_in_chunks(simulator: Simulator) -> None:
    simulator.script(scenario("F16"))
    async with opened(simulator, STREAM_FORMAT="chunks") as pipe:
        shown = await ask(pipe)

    assert "".join(shown.chunked("content")) == "Hello."
    assert len(shown.errors) == len(shown.usages) == 1
    assert not [e for e in shown.events if str(e.get("type")).startswith("response.")]


async def test_an_api_client_can_ask_for_events(simulator: Simulator) -> None:
    simulator.script(replies.text("Hello."))
    async with opened(simulator, STREAM_FORMAT="responses") as pipe:
        shown = await ask_api(pipe)

    assert shown.text == "Hello."
    assert len(shown.usages) == 1


async def test_c8_an_api_client_reads_reasoning_and_citations(
    simulator: Simulator,
) -> None:
    think = replies.thought("I look.", style="text")
    say = replies.message("Fjords.", annotations=replies.SOURCES)
    simulator.script(replies.compose(think, say))
    async with opened(simulator) as pipe:
        shown = await ask_api(pipe)

    assert "".join(shown.chunked("reasoning_content")) == "I look."
    assert "".join(shown.chunked("content")) == "Fjords."
    cited = [
        one["url_citation"]["url"]
        for run in shown.chunked("annotations")
        for one in run
    ]
    assert cited == [source["url"] for source in replies.SOURCES]


async def test_a_call_that_is_handed_over_streams_its_arguments(
    simulator: Simulator,
) -> None:
    oslo = Call("get_weather", {"city": "Oslo"}, deltas=3)
    simulator.script(replies.tool_calls([oslo]))
    async with opened(simulator, STREAM_INTERVAL_MS=0) as pipe:
        shown = await ask(pipe, metadata=HANDED_OVER)

    assert shown.deltas("function_call_arguments")
    (item,) = shown.items("function_call")
    assert item["arguments"] == oslo.text()
    assert item["status"] == "completed"


async def test_the_answer_in_one_piece_is_the_streamed_one(
    simulator: Simulator,
) -> None:
    simulator.script(scenario("H2", "late"), scenario("H2", "late"))
    async with opened(simulator) as pipe:
        streamed = await ask(pipe)
        completion = await whole(pipe, body())

    message = completion["choices"][0]["message"]
    assert message["content"] == streamed.text
    assert message["reasoning_content"] == streamed.thoughts
