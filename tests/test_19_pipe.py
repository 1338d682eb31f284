"""19 Pipe: what Open WebUI sees."""

from __future__ import annotations

import asyncio
import inspect
import json
from typing import Any

import pytest
from starlette.responses import StreamingResponse

from open_webui_openrouter_pipe import open_webui_openrouter_pipe as plugin
from tests.simulator import Simulator, replies, scenario
from tests.turns import CHAT, answer, ask, ask_api, hung_up, opened, whole


def test_it_takes_only_what_the_host_offers() -> None:
    offered = {
        "body",
        "__user__",
        "__metadata__",
        "__request__",
        "__event_emitter__",
        "__event_call__",
        "__task__",
        "__task_body__",
        "__tools__",
        "__files__",
        "__chat_id__",
        "__message_id__",
        "__session_id__",
    }

    assert set(inspect.signature(plugin.Pipe().pipe).parameters) <= offered


def test_it_is_made_without_a_loop() -> None:
    pipe = plugin.Pipe()

    assert pipe.valves == plugin.Pipe.Valves()


# Forms ---------------------------------------------------------------------------------


async def test_a_chat_gets_events(simulator: Simulator) -> None:
    async with opened(simulator) as pipe:
        reply = await answer(pipe)
        events = [event async for event in reply]

    assert inspect.isasyncgen(reply)
    assert all(isinstance(event, dict) for event in events)


async def test_an_api_client_gets_lines(simulator: Simulator) -> None:
    async with opened(simulator) as pipe:
        reply = await answer(pipe, metadata={})
        lines = [line async for line in reply.body_iterator]

    assert isinstance(reply, StreamingResponse)
    assert reply.media_type == "text/event-stream"
    assert all(line.startswith("data: ") and line.endswith("\n\n") for line in lines)
    assert lines.index("data: [DONE]\n\n") == len(lines) - 1


async def test_a_line_is_one_line_whatever_it_says(simulator: Simulator) -> None:
    text = "a\nb\r\nc\u2028d"
    simulator.script(replies.text(text, 1))
    async with opened(simulator) as pipe:
        shown = await ask_api(pipe)

    assert "".join(shown.chunked("content")) == text


@pytest.mark.parametrize("metadata", [CHAT, {}])
async def test_an_answer_in_one_piece_is_an_object(
    simulator: Simulator, metadata: dict[str, Any]
) -> None:
    simulator.script(replies.text("Hello."))
    async with opened(simulator) as pipe:
        completion = await whole(pipe, metadata=metadata)

    assert completion["choices"][0]["message"]["content"] == "Hello."
    assert json.loads(json.dumps(completion)) == completion


async def test_a_task_gets_chunks_or_an_object(simulator: Simulator) -> None:
    async with opened(simulator) as pipe:
        streamed = await ask(pipe, task="title_generation")
        completion = await whole(pipe, task="title_generation")

    assert "".join(streamed.chunked("content"))
    assert completion["choices"][0]["message"]["content"]
    assert not streamed.emitted


async def test_a_failed_task_is_an_error_object(simulator: Simulator) -> None:
    simulator.script(scenario("F13", "401"), scenario("F26"))
    async with opened(simulator) as pipe:
        refused = await whole(pipe, task="tags_generation")
        empty = await whole(pipe, task="tags_generation")

    assert set(refused) == {"error"}
    assert "API_KEY" in refused["error"]["message"]
    assert empty.get("choices") or empty.get("error")


@pytest.mark.parametrize(
    "asked", [{}, {"model": None}, {"model": "x", "messages": "no"}]
)
async def test_nonsense_is_a_card_and_no_exception(
    simulator: Simulator, asked: dict[str, Any]
) -> None:
    async with opened(simulator) as pipe:
        shown = await ask(pipe, {**asked, "stream": True})

    assert len(shown.cards) == 1
    assert not simulator.posts


# Valves --------------------------------------------------------------------------------


async def test_valves_are_read_once_per_request(simulator: Simulator) -> None:
    simulator.script(replies.text("abcdef", 6, delay=0.05))
    async with opened(simulator) as pipe:
        events = await answer(pipe)
        first = await anext(events)
        pipe.valves = pipe.Valves()
        rest = [event async for event in events]

    assert first
    assert rest[-1]["type"] == "response.completed"


# The model list ------------------------------------------------------------------------


async def test_a_list_that_fails_is_empty_and_no_exception(
    simulator: Simulator,
) -> None:
    simulator.script(replies.http_error(500).forever(), path="/models")
    async with opened(simulator) as pipe:
        listed = await pipe.pipes()

    assert listed == []


async def test_a_list_without_a_key_is_there(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    async with opened(simulator, API_KEY="") as pipe:
        listed = await pipe.pipes()

    assert listed
    assert "Authorization" not in simulator.ledger[0].headers


async def test_a_row_of_any_kind_cannot_hide_the_others(simulator: Simulator) -> None:
    rows: list[Any] = [{"id": "a/b"}, {"id": 3}, None, {"id": "c/d", "name": None}]
    simulator.script(replies.json_body({"data": rows}), path="/models")
    async with opened(simulator) as pipe:
        listed = await pipe.pipes()

    assert listed == [{"id": "a/b", "name": "a/b"}, {"id": "c/d", "name": "c/d"}]


# Stop ----------------------------------------------------------------------------------


async def test_an_api_client_that_leaves_ends_the_request(simulator: Simulator) -> None:
    simulator.script(replies.text("a" * 100, 100, delay=0.1))
    async with opened(simulator) as pipe:
        reply = await answer(pipe, metadata={})
        lines = reply.body_iterator
        first = await anext(lines)
        await lines.aclose()

        assert await hung_up(simulator)
    assert first.startswith("data: ")


async def test_stop_while_waiting_for_another_try_ends_it(simulator: Simulator) -> None:
    simulator.script(scenario("F7", "seconds", retry_after=20).forever())
    async with opened(simulator) as pipe:
        task = asyncio.create_task(ask(pipe))
        await asyncio.to_thread(simulator.wait_for, lambda _: simulator.posts)
        await asyncio.sleep(0.1)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=1)

    assert task in done
    assert task.cancelled()
    assert len(simulator.posts) == 1
