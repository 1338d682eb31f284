"""17 Turn, over its rounds: the model calls, tools run, the model goes on."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from importlib import import_module
from typing import Any

import pytest

from open_webui_openrouter_pipe import open_webui_openrouter_pipe as plugin
from tests.simulator import Simulator, replies, scenario
from tests.simulator.replies import (
    Call,
    compose,
    event_part,
    function_call,
    incomplete,
    message,
    server_item,
    silence,
)
from tests.turns import CHAT, Shown, answer, ask, ask_api, body, opened, whole
from tests.webui import pending_tasks, pieces

JSON = dict[str, Any]
PARAMETERS: JSON = {
    "type": "object",
    "properties": {"x": {"type": "string"}},
    "required": [],
}
ASKS = {**CHAT, "params": {"tool_approval_mode": "ask"}}


@pytest.fixture(scope="module", autouse=True)
def _host() -> None:
    """Import what the host helps with; it warns of its own ways."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_module("open_webui.utils.middleware")


def entry(name: str, function: Any, **more: Any) -> JSON:
    """Build an entry of `__tools__` as the host makes it for a workspace tool."""
    spec = {"name": name, "description": name, "parameters": PARAMETERS}
    return {"tool_id": "mine", "callable": function, "spec": spec, **more}


def kit(**functions: Any) -> JSON:
    """Build `__tools__` from functions."""
    return {
        name: value if isinstance(value, dict) else entry(name, value)
        for name, value in functions.items()
    }


def with_tools(tools: JSON, **more: Any) -> JSON:
    """Build a body that offers tools."""
    offered = [{"type": "function", "function": t["spec"]} for t in tools.values()]
    return body(tools=offered, **more)


async def run(
    simulator: Simulator,
    tools: JSON,
    *script: Any,
    valves: JSON | None = None,
    **more: Any,
) -> Shown:
    """Play a script in a chat that has tools."""
    simulator.script(*script)
    async with opened(simulator, **(valves or {})) as pipe:
        return await ask(pipe, with_tools(tools), __tools__=tools, **more)


def outputs(shown: Shown) -> dict[str, str]:
    """Return the text of each result by the name of its call."""
    names = {item["call_id"]: item["name"] for item in shown.items("function_call")}
    return {
        names[item["call_id"]]: item["output"][0]["text"]
        for item in shown.items("function_call_output")
    }


def all_answered(shown: Shown) -> bool:
    """Tell whether each call has exactly one result."""
    made = [item["call_id"] for item in shown.items("function_call")]
    answered = [item["call_id"] for item in shown.items("function_call_output")]
    return sorted(made) == sorted(answered)


async def echo(x: str = "nothing") -> str:
    return f"echo {x}"


async def test_results_go_back_with_the_reasoning_of_the_round(
    simulator: Simulator,
) -> None:
    calls = replies.tool_calls(
        [("echo", {"x": "a"}), ("echo", {"x": "b"})], think="Hm."
    )
    shown = await run(simulator, kit(echo=echo), calls, replies.text("Done."))

    first, second = simulator.posts
    said = second.body["input"][len(first.body["input"]) :]
    assert [item["type"] for item in said] == [
        "reasoning",
        "function_call",
        "function_call",
        "function_call_output",
        "function_call_output",
    ]
    assert said[0]["encrypted_content"]
    assert [item["output"] for item in said[3:]] == ["echo a", "echo b"]
    assert [item["call_id"] for item in said[1:3]] == [i["call_id"] for i in said[3:]]
    assert first.body["tools"] == second.body["tools"]
    assert shown.text == "Done."
    assert all_answered(shown)
    assert {item["status"] for item in shown.output} == {"completed"}


async def test_usage_of_all_rounds_is_summed_and_shown_once(
    simulator: Simulator,
) -> None:
    shown = await run(
        simulator, kit(echo=echo), replies.tool_calls(["echo"]), replies.text("Done.")
    )

    (usage,) = shown.usages
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["input_tokens"] > usage["prompt_tokens"] > 0
    assert usage["cost"] > 0


async def test_calls_run_side_by_side(simulator: Simulator) -> None:
    async def nap(x: str = "") -> str:
        await asyncio.sleep(0.4)
        return "slept"

    calls = replies.tool_calls([("nap", {"x": str(n)}) for n in range(8)])
    tools = kit(nap=nap)
    await run(simulator, tools, replies.tool_calls(["nap"]), replies.text("Warm."))
    begun = time.monotonic()
    shown = await run(simulator, tools, calls, replies.text("Done."))

    assert time.monotonic() - begun < 1.6  # 3.2 s one after another
    assert len(shown.items("function_call_output")) == 8


async def test_a_call_starts_while_the_model_still_talks(simulator: Simulator) -> None:
    started: list[float] = []

    async def note(x: str = "") -> str:
        started.append(time.monotonic())
        return "noted"

    talking = compose(function_call(Call("note")), message("a b c d", 4, 0.3))
    shown = await run(simulator, kit(note=note), talking, replies.text("Done."))

    over = time.monotonic()
    assert over - started[0] > 0.6
    assert shown.text == "a b c dDone."


async def test_calls_that_change_something_keep_their_order(
    simulator: Simulator,
) -> None:
    seen: list[str] = []

    async def add_line(x: str = "") -> str:
        await asyncio.sleep(0.1 if x == "first" else 0)
        seen.append(x)
        return "added"

    calls = [("add_line", {"x": x}) for x in ("first", "second", "third")]
    await run(
        simulator,
        kit(add_line=add_line),
        replies.tool_calls(calls),
        replies.text("Ok."),
    )

    assert seen == ["first", "second", "third"]


async def test_at_most_so_many_run_at_once(simulator: Simulator) -> None:
    inside, most = [0], [0]

    async def nap(x: str = "") -> str:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        await asyncio.sleep(0.01)
        inside[0] -= 1
        return "slept"

    calls = replies.tool_calls([("nap", {"x": str(n)}) for n in range(20)])
    for valve in ("MAX_PARALLEL_TOOLS_PER_REQUEST", "MAX_PARALLEL_TOOLS_GLOBAL"):
        most[0] = 0
        shown = await run(
            simulator, kit(nap=nap), calls, replies.text("Ok."), valves={valve: 3}
        )
        assert most == [3]
        assert len(shown.items("function_call_output")) == 20


async def test_a_hundred_calls_in_one_round_are_all_answered(
    simulator: Simulator,
) -> None:
    calls = replies.tool_calls([("echo", {"x": str(n)}) for n in range(100)])
    shown = await run(simulator, kit(echo=echo), calls, replies.text("Done."))

    assert len(shown.items("function_call_output")) == 100
    assert all_answered(shown)
    assert shown.text == "Done."


# What tools do


async def _raises(x: str = "") -> str:
    raise ValueError("kaputt")


async def _half(x: str = "") -> str:
    return "half \ud83d a face"


async def _raises_half(x: str = "") -> str:
    raise ValueError("Übel: \ud83d")


async def _group(x: str = "") -> str:
    raise BaseExceptionGroup("several", [KeyboardInterrupt()])


async def _exits(x: str = "") -> str:
    raise SystemExit(1)


async def _cancels_itself(x: str = "") -> str:
    raise asyncio.CancelledError


async def _nothing(x: str = "") -> None:
    return None


async def _bytes(x: str = "") -> bytes:
    return b"caf\xc3\xa9"


async def _binary(x: str = "") -> bytes:
    return b"\xff\xfe\x00"


async def _tuple(x: str = "") -> tuple[Any, Any]:
    return {"ok": 1}, {"content-type": "application/json"}


async def _listing(x: str = "") -> list[int]:
    return [1, 2]


async def _generator(x: str = "") -> Generator[str]:
    return (word for word in ("one ", "two"))


async def _stream(x: str = "") -> AsyncIterator[str]:
    async def words() -> AsyncGenerator[str]:
        yield "one "
        yield "two"

    return words()


async def _page(x: str = "") -> Any:
    from fastapi.responses import HTMLResponse

    return HTMLResponse("<b>hi</b>", headers={"Content-Disposition": "inline"})


ODD = {
    "raises": (_raises, "kaputt", "failed"),
    "half": (_half, "half \ufffd a face", "completed"),
    "raises_half": (_raises_half, "Übel: \ufffd", "failed"),
    "exits": (_exits, "SystemExit", "failed"),
    "group": (_group, "BaseExceptionGroup", "failed"),
    "cancels": (_cancels_itself, "cancelled", "failed"),
    "none": (_nothing, "returned nothing", "completed"),
    "bytes": (_bytes, "café", "completed"),
    "binary": (_binary, "3 bytes", "completed"),
    "tuple": (_tuple, '"ok": 1', "completed"),
    "list": (_listing, "results", "completed"),
    "generator": (_generator, "one two", "completed"),
    "stream": (_stream, "one two", "completed"),
    "html": (_page, "visible to the user", "completed"),
}


@pytest.mark.parametrize("name", ODD)
async def test_whatever_a_tool_returns_is_answered(
    simulator: Simulator, name: str
) -> None:
    function, words, status = ODD[name]
    tools = kit(**{name: function}, echo=echo)
    shown = await run(
        simulator, tools, replies.tool_calls([name, "echo"]), replies.text("Done.")
    )

    assert words in outputs(shown)[name]
    assert outputs(shown)["echo"] == "echo nothing"
    by_name = {item["name"]: item["status"] for item in shown.items("function_call")}
    assert by_name == {name: status, "echo": "completed"}
    assert shown.text == "Done."
    result, _ = shown.items("function_call_output")
    assert bool(result.get("embeds")) == (name == "html") or result["call_id"]


async def test_a_tool_that_hangs_is_timed_out_and_leaves_the_others_alone(
    simulator: Simulator,
) -> None:
    ended = asyncio.Event()

    async def hang(x: str = "") -> str:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        return ""

    shown = await run(
        simulator,
        kit(hang=hang, echo=echo),
        replies.tool_calls(["hang", "echo"]),
        replies.text("Done."),
        valves={"TOOL_TIMEOUT_SECONDS": 0.2},
    )

    assert "did not answer within 0.2 seconds" in outputs(shown)["hang"]
    assert outputs(shown)["echo"] == "echo nothing"
    assert ended.is_set()
    assert shown.text == "Done."


async def test_a_round_that_takes_too_long_is_ended_and_answered(
    simulator: Simulator,
) -> None:
    async def hang(x: str = "") -> str:
        await asyncio.sleep(60)
        return ""

    shown = await run(
        simulator,
        kit(hang=hang, echo=echo),
        replies.tool_calls(["hang", "hang", "echo"]),
        replies.text("Done."),
        valves={"TOOL_BATCH_TIMEOUT_SECONDS": 0.2},
    )

    assert "took longer than 0.2 seconds" in outputs(shown)["hang"]
    assert all_answered(shown)
    assert shown.text == "Done."


async def test_a_tool_that_blocks_the_server_is_named_in_the_log(
    simulator: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    async def sync_work(x: str = "") -> str:
        time.sleep(0.6)  # noqa: ASYNC251 - this is the mistake that is noticed
        return "done"

    with caplog.at_level(logging.WARNING):
        shown = await run(
            simulator,
            kit(sync_work=sync_work),
            replies.tool_calls(["sync_work"]),
            replies.text("Done."),
        )

    assert outputs(shown) == {"sync_work": "done"}
    assert any("sync_work held up the whole server" in m for m in caplog.messages)


async def test_d6_a_huge_result_is_cut_and_says_so(simulator: Simulator) -> None:
    async def flood(x: str = "") -> str:
        return "é" * 5_000_000

    shown = await run(
        simulator, kit(flood=flood), replies.tool_calls(["flood"]), replies.text("Ok.")
    )

    (sent,) = [i for i in simulator.posts[1].items if "output" in i]
    assert len(sent["output"]) < 101_000
    assert "first 100000 of 5000000 characters" in sent["output"]
    assert outputs(shown)["flood"] == sent["output"]


# What models do


async def test_d8_odd_calls_are_each_answered_once(simulator: Simulator) -> None:
    calls = [
        Call("echo", {"x": "a"}, call_id="same"),
        Call("echo", {"x": "b"}, call_id="same"),
        Call("echo", '{"x": "c"', call_id="bad"),
        Call("echo", "", call_id="empty"),
        Call("echo", "{'x': 'python'}", call_id="literal"),
        Call("echo", '"{\\"x\\": \\"text\\"}"', call_id="text"),
        Call("echo", "{'x': {1, 2}}", call_id="set"),
        Call("echo", "[1, 2]", call_id="list"),
        Call("nobody", {"x": "d"}, call_id="unknown"),
    ]
    shown = await run(
        simulator, kit(echo=echo), replies.tool_calls(calls), replies.text("Done.")
    )

    texts = [
        item["output"][0]["text"]
        for item in sorted(
            shown.items("function_call_output"), key=lambda i: i["output"][0]["text"]
        )
    ]
    assert [text for text in texts if text.startswith("echo")] == [
        "echo a",
        "echo b",
        "echo nothing",
        "echo python",
        "echo text",
    ]
    errors = " ".join(text for text in texts if text.startswith("Error"))
    assert "malformed or incomplete JSON" in errors
    assert "must be a JSON object" in errors
    assert 'Tool "nobody" not found' in errors
    assert len(texts) == 9
    assert all_answered(shown)
    assert shown.text == "Done."
    sent = [i for i in simulator.posts[1].items if i.get("type") == "function_call"]
    # Many providers refuse a history whose arguments are no JSON object.
    assert [json.loads(item["arguments"]) for item in sent] == [
        {"x": "a"},
        {"x": "b"},
        {},
        {},
        {"x": "python"},
        {"x": "text"},
        {},
        {},
        {"x": "d"},
    ]
    shown_ = [item["arguments"] for item in shown.items("function_call")]
    assert '{"x": "python"}' in shown_
    assert '{"x": "c"' in shown_  # the user sees what went wrong


@pytest.mark.parametrize("name", ["F33", "F34"])
async def test_d8_the_scenarios_of_broken_calls_go_on(
    simulator: Simulator, name: str
) -> None:
    from tests.simulator import variants

    async def get_weather(x: str = "") -> str:
        return "4 degrees"

    for variant in variants(name):
        simulator.reset()
        shown = await run(
            simulator,
            kit(get_weather=get_weather),
            scenario(name, variant),
            replies.text("Done."),
        )
        assert all_answered(shown), variant
        assert shown.text.endswith("Done."), variant


async def test_objects_in_a_row_are_several_calls(simulator: Simulator) -> None:
    call = Call("echo", '{"x": "a"} {"x": "b"}{"x": "c"}')
    shown = await run(
        simulator, kit(echo=echo), replies.tool_calls([call]), replies.text("Done.")
    )

    made = [json.loads(item["arguments"]) for item in shown.items("function_call")]
    assert made == [{"x": "a"}, {"x": "b"}, {"x": "c"}]
    assert all_answered(shown)
    sent = simulator.posts[1].items
    assert [i["arguments"] for i in sent if i.get("type") == "function_call"] == [
        '{"x": "a"}',
        '{"x": "b"}',
        '{"x": "c"}',
    ]


async def test_arguments_that_the_schema_does_not_know_are_left_out(
    simulator: Simulator,
) -> None:
    shown = await run(
        simulator,
        kit(echo=echo),
        replies.tool_calls([("echo", {"x": "a", "__user__": "evil"})]),
        replies.text("Done."),
    )

    assert outputs(shown) == {"echo": "echo a"}


async def test_d4_at_the_cap_the_model_answers_with_what_it_has(
    simulator: Simulator,
) -> None:
    async def get_weather(x: str = "") -> str:
        return "4 degrees"

    shown = await run(
        simulator,
        kit(get_weather=get_weather),
        scenario("H8", "endless").times(3),
        replies.text("It is cold."),
        valves={"MAX_FUNCTION_CALL_LOOPS": 3},
    )

    bodies = [post.body for post in simulator.posts]
    assert [b.get("tool_choice") for b in bodies] == [None, None, None, "none"]
    assert all(b["tools"] == bodies[0]["tools"] for b in bodies)
    assert shown.text == "It is cold."
    assert all_answered(shown)
    assert len(shown.usages) == 1


async def test_a_model_that_calls_beyond_the_cap_is_told_and_so_is_the_user(
    simulator: Simulator,
) -> None:
    shown = await run(
        simulator,
        kit(echo=echo),
        replies.tool_calls(["echo"]).forever(),
        valves={"MAX_FUNCTION_CALL_LOOPS": 2},
    )

    assert len(simulator.posts) == 3
    assert all_answered(shown)
    assert "limit was reached" in shown.cards[0]


async def test_an_empty_answer_after_tools_is_asked_for_once_more(
    simulator: Simulator,
) -> None:
    tools = kit(echo=echo)
    shown = await run(
        simulator,
        tools,
        replies.tool_calls(["echo"]),
        replies.empty(),
        replies.text("Now."),
    )
    assert shown.text == "Now."
    assert simulator.posts[1].body == simulator.posts[2].body

    simulator.reset()
    shown = await run(
        simulator, tools, replies.tool_calls(["echo"]), replies.empty().times(2)
    )
    assert len(simulator.posts) == 3
    assert "no answer" in shown.cards[0]


async def test_a_forced_tool_is_forced_once(simulator: Simulator) -> None:
    tools = kit(echo=echo)
    simulator.script(replies.tool_calls(["echo"]), replies.text("Done."))
    async with opened(simulator) as pipe:
        asked = with_tools(tools, tool_choice="required")
        await ask(pipe, asked, __tools__=tools)

    choices = [post.body.get("tool_choice") for post in simulator.posts]
    assert choices == ["required", None]


# When it breaks


async def test_a_stream_that_breaks_keeps_all_calls_answered(
    simulator: Simulator,
) -> None:
    async def hang(x: str = "") -> str:
        await asyncio.sleep(60)
        return ""

    cut = compose(
        message("Let me see."),
        function_call(Call("echo")),
        function_call(Call("hang")),
        terminal=silence,
        end="eof",
    )
    shown = await run(simulator, kit(echo=echo, hang=hang), cut)

    assert shown.text == "Let me see."
    assert all_answered(shown)
    assert "connection" in shown.cards[0]
    assert len(simulator.posts) == 1


async def test_a_second_round_that_fails_keeps_the_first(simulator: Simulator) -> None:
    shown = await run(
        simulator,
        kit(echo=echo),
        replies.tool_calls(["echo"], say="Let me see."),
        replies.http_error(400, "No."),
    )

    assert shown.text == "Let me see."
    assert all_answered(shown)
    assert len(shown.cards) == 1
    assert len(shown.usages) == 1


async def test_a_call_that_the_length_limit_cuts_is_not_run(
    simulator: Simulator,
) -> None:
    seen: list[str] = []

    async def get_weather(x: str = "") -> str:
        seen.append(x)
        return "4 degrees"

    shown = await run(
        simulator, kit(get_weather=get_weather), scenario("H6", "truncated")
    )
    assert seen == []
    assert all_answered(shown)
    assert shown.cards

    simulator.reset()
    both = compose(function_call(Call("echo")), terminal=incomplete())
    shown = await run(simulator, kit(echo=echo), both)
    assert outputs(shown) == {"echo": "echo nothing"}
    assert all_answered(shown)


@pytest.mark.parametrize("execution", ["pipe", "open_webui"])
async def test_a_call_that_only_began_is_nobodys_to_run(
    simulator: Simulator, execution: str
) -> None:
    begun: JSON = {"type": "response.output_item.added", "output_index": 0}
    begun["item"] = {"type": "function_call", "id": "f", "call_id": "c", "name": "echo"}
    shown = await run(
        simulator,
        kit(echo=echo),
        compose(event_part(begun), terminal=silence, end="eof"),
        valves={"TOOL_EXECUTION": execution},
    )

    assert shown.items("function_call")
    assert "broke off" in outputs(shown)["echo"]  # else Open WebUI would run it
    assert all_answered(shown)
    assert shown.cards


async def test_a_cancelled_chat_leaves_no_tool_behind(simulator: Simulator) -> None:
    ended: list[str] = []

    async def hang(x: str = "") -> str:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(x)
        return ""

    tools = kit(hang=hang)
    simulator.script(replies.tool_calls([("hang", {"x": str(n)}) for n in range(10)]))
    async with opened(simulator) as pipe:
        before = pending_tasks()

        async def chat() -> None:
            reply = await answer(pipe, with_tools(tools), __tools__=tools)
            async for _ in pieces(reply):
                pass

        task = asyncio.create_task(chat())
        while len(simulator.posts) < 1 or len(pending_tasks()) < 20:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.wait({task}, timeout=5)

        assert task.cancelled()
        assert sorted(ended) == sorted(map(str, range(10)))
        assert pending_tasks() - before <= {task}
        # The user's Stop is no failure of the tool.
        breaker = pipe._runtime.conversation._guards.breakers.get("user-1", "hang")
        assert breaker.admits(time.monotonic(), 60)


async def test_a_tool_that_keeps_failing_rests_and_both_are_told(
    simulator: Simulator,
) -> None:
    tries: list[str] = []

    async def broken(x: str = "") -> str:
        tries.append(x)
        raise OSError("disk on fire")

    tools = kit(broken=broken, echo=echo)
    valves = {"BREAKER_MAX_FAILURES": 2, "BREAKER_WINDOW_SECONDS": 30}
    shown = Shown()
    async with opened(simulator, **valves) as pipe:
        for _ in range(3):
            simulator.script(
                replies.tool_calls(["broken", "echo"]), replies.text("Ok.")
            )
            shown = await ask(pipe, with_tools(tools), __tools__=tools)
        assert len(tries) == 2
        assert "off for now" in outputs(shown)["broken"]
        assert any("rests for 30 seconds" in line for line in shown.lines)
        assert outputs(shown)["echo"] == "echo nothing"
        assert shown.text == "Ok."

        other = {"id": "user-2", "name": "Other"}
        simulator.script(replies.tool_calls(["broken"]), replies.text("Ok."))
        reply = await pipe.pipe(with_tools(tools), other, dict(CHAT), __tools__=tools)
        assert [piece async for piece in pieces(reply)]
        assert len(tries) == 3


# Who runs what


async def test_approval_is_honoured_whatever_the_path(simulator: Simulator) -> None:
    ran: list[str] = []

    async def spend(x: str = "") -> str:
        ran.append(x)
        return "spent"

    tools = kit(spend=spend)
    paths: list[tuple[JSON, bool]] = [
        (valves, stream)
        for valves in (
            {},
            {"STREAM_FORMAT": "chunks"},
            {"TOOL_EXECUTION": "open_webui"},
        )
        for stream in (True, False)
    ]
    chats: list[JSON] = [
        CHAT,
        {},
        {"session_id": "tab"},  # an API client that has one
        {**CHAT, "chat_id": "temporary:1"},
        {**CHAT, "chat_id": "channel:1"},
        {**CHAT, "internal": True},  # a sub-agent
        {**CHAT, "automation_id": "a", "tool_approval_resume": "tools"},
    ]
    for mode in ("ask", "something-new", ["full"], True):
        for valves, stream in paths:
            for facts in chats:
                simulator.reset()
                simulator.script(replies.tool_calls(["spend"]), replies.text("Ok."))
                metadata = {**facts, "params": {"tool_approval_mode": mode}}
                async with opened(simulator, **valves) as pipe:
                    asked = {**with_tools(tools), "stream": stream}
                    reply = await answer(
                        pipe, asked, metadata=metadata, __tools__=tools
                    )
                    assert [piece async for piece in pieces(reply)]
    assert ran == []

    simulator.reset()
    await run(simulator, tools, replies.tool_calls(["spend"]), replies.text("Ok."))
    assert ran == [""]  # the same tool does run where nobody has to ask


async def test_calls_that_are_the_hosts_are_left_and_ours_are_run(
    simulator: Simulator,
) -> None:
    direct = {"spec": entry("page", None)["spec"], "direct": True, "server": {}}
    tools = kit(
        echo=echo,
        ask_user=entry("ask_user", echo, type="builtin"),
        page=direct,
        shell=entry("shell", echo, type="terminal", tool_id="terminal:1"),
        strange=entry("strange", echo, type="new-kind"),
    )
    names = ["echo", "ask_user", "page", "shell", "strange"]
    shown = await run(simulator, tools, replies.tool_calls(names))

    assert outputs(shown) == {"echo": "echo nothing"}
    assert len(simulator.posts) == 1
    assert [i["name"] for i in shown.items("function_call")] == names
    assert shown.events[-1]["type"] == "response.completed"
    assert len(shown.usages) == 1


async def test_open_webui_runs_the_tools_where_an_admin_wants_it(
    simulator: Simulator,
) -> None:
    for valves in ({"TOOL_EXECUTION": "open_webui"}, {"STREAM_FORMAT": "chunks"}):
        simulator.reset()
        shown = await run(
            simulator, kit(echo=echo), replies.tool_calls(["echo"]), valves=valves
        )
        assert len(simulator.posts) == 1
        assert not shown.items("function_call_output")


async def test_d5_the_tools_of_an_api_client_go_back_to_it(
    simulator: Simulator,
) -> None:
    weather = {"type": "function", "function": entry("get_weather", None)["spec"]}
    async with opened(simulator) as pipe:
        simulator.script(scenario("H7"), scenario("H7"))
        shown = await ask_api(pipe, body(tools=[weather]))
        calls = [call for run in shown.chunked("tool_calls") for call in run]
        assert [call["function"]["name"] for call in calls] == ["get_weather"] * 2
        assert [call["index"] for call in calls] == [0, 1]
        assert shown.finishes == ["tool_calls"]

        answered = await whole(pipe, body(tools=[weather]), metadata={})
        message_ = answered["choices"][0]["message"]
        assert len(message_["tool_calls"]) == 2
        assert answered["choices"][0]["finish_reason"] == "tool_calls"

        simulator.script(replies.text("It is cold."))
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": "4"}
            for call in message_["tool_calls"]
        ]
        messages = [{"role": "user", "content": "Hi"}, message_, *results]
        shown = await ask_api(pipe, {**body(tools=[weather]), "messages": messages})
        assert "".join(shown.chunked("content")) == "It is cold."


async def test_tools_of_the_server_run_for_an_api_client_too(
    simulator: Simulator,
) -> None:
    tools = kit(echo=echo)
    script = (replies.tool_calls(["echo"]), replies.text("Done."))
    async with opened(simulator) as pipe:
        simulator.script(*script, *script)
        shown = await ask_api(pipe, with_tools(tools), __tools__=tools)
        assert shown.chunked("tool_calls") == []
        assert "".join(shown.chunked("content")) == "Done."
        assert shown.finishes == ["stop"]
        assert len(shown.usages) == 1

        answered = await whole(pipe, with_tools(tools), metadata={}, __tools__=tools)
        assert answered["choices"][0]["message"]["content"] == "Done."
        assert "tool_calls" not in answered["choices"][0]["message"]


async def test_a_chat_that_does_not_stream_runs_its_tools(simulator: Simulator) -> None:
    tools = kit(echo=echo, page={"spec": entry("page", None)["spec"], "direct": True})
    simulator.script(replies.tool_calls(["echo", "page"]), replies.text("Done."))
    async with opened(simulator) as pipe:
        answered = await whole(pipe, with_tools(tools), __tools__=tools)

    kinds = [item["type"] for item in answered["output"]]
    assert kinds.count("function_call_output") == 2
    assert "needs the browser" in str(answered["output"])
    assert answered["choices"][0]["message"]["content"] == "Done."


async def test_rounds_of_the_host_count_for_the_cap(simulator: Simulator) -> None:
    tools = kit(echo=echo)
    call: JSON = {"id": "c1", "type": "function"}
    call["function"] = {"name": "echo", "arguments": "{}"}
    asked = with_tools(tools)
    asked["messages"] += [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "echo"},
    ]
    simulator.script(replies.text("Done."))
    async with opened(simulator, MAX_FUNCTION_CALL_LOOPS=1) as pipe:
        await ask(pipe, asked, __tools__=tools)

    assert simulator.posts[0].body["tool_choice"] == "none"


# Hosted tools


async def test_hosted_tools_are_cards_that_nobody_runs(simulator: Simulator) -> None:
    fetched = server_item(
        "openrouter:web_fetch", "wf", url="https://example.com", content="Deep."
    )
    failed = server_item("openrouter:advisor", "ad", prompt="?", error="no model")
    shown = await run(
        simulator, kit(echo=echo), compose(fetched, failed, message("Deep."))
    )

    calls = {item["name"]: item for item in shown.items("function_call")}
    assert json.loads(calls["openrouter:web_fetch"]["arguments"]) == {
        "url": "https://example.com"
    }
    assert outputs(shown)["openrouter:web_fetch"] == "Deep."
    assert calls["openrouter:advisor"]["status"] == "failed"
    assert all_answered(shown)
    assert shown.text == "Deep."
    assert len(simulator.posts) == 1


async def test_the_cards_of_hosted_tools_never_go_back_as_calls(
    simulator: Simulator,
) -> None:
    call: JSON = {"id": "c1", "type": "function"}
    call["function"] = {"name": "openrouter:web_fetch", "arguments": "{}"}
    asked = body()
    asked["messages"] += [
        {"role": "assistant", "content": "Deep.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "Deep."},
        {"role": "user", "content": "And?"},
    ]
    simulator.script(replies.text("Done."))
    async with opened(simulator) as pipe:
        shown = await ask(pipe, asked)

    assert shown.text == "Done."
    assert "web_fetch" not in json.dumps(simulator.posts[0].body["input"])


async def test_openrouters_search_is_drawn_as_the_hosts(simulator: Simulator) -> None:
    shown = await run(simulator, {}, replies.citations(query="fjords", native=False))

    (search,) = shown.items("web_search_call")
    assert search["action"]["query"] == "fjords"
    assert search["action"]["sources"]
    assert search["status"] == "completed"
    assert shown.sources == ["https://example.com/fjords", "https://example.org/boats"]


SEARCH = {**CHAT, "features": {"web_search": True}}


async def _tools_sent(simulator: Simulator, asked: JSON, **more: Any) -> list[JSON]:
    simulator.reset()
    simulator.script(replies.text("Ok."))
    valves = more.pop("valves", {})
    async with opened(simulator, **valves) as pipe:
        await ask(pipe, asked, **more)
    return simulator.posts[0].body.get("tools", [])


async def test_d10_the_chats_switch_brings_openrouters_search(
    simulator: Simulator,
) -> None:
    tools = kit(search_web=echo, fetch_url=echo, echo=echo)
    asked = with_tools(tools)
    more: JSON = {"__tools__": tools}

    sent = await _tools_sent(simulator, asked, metadata=SEARCH, **more)
    assert [t.get("name", t["type"]) for t in sent] == ["echo", "openrouter:web_search"]
    assert sent[-1]["parameters"] == {"max_results": 5}

    sent = await _tools_sent(simulator, asked, **more)  # the switch is off
    assert "openrouter:web_search" not in [t["type"] for t in sent]
    assert len(sent) == 3

    valves = {"ENABLE_WEB_SEARCH_TOOL": "off"}
    sent = await _tools_sent(simulator, asked, metadata=SEARCH, valves=valves, **more)
    assert len(sent) == 3

    valves = {
        "ENABLE_WEB_SEARCH_TOOL": "always",
        "WEB_SEARCH_ENGINE": "perplexity",
        "WEB_SEARCH_MAX_RESULTS": 25,
    }
    sent = await _tools_sent(simulator, asked, valves=valves, **more)
    assert sent[-1]["parameters"] == {"max_results": 20, "engine": "perplexity"}

    asking = {**SEARCH, **ASKS}
    sent = await _tools_sent(simulator, asked, metadata=asking, **more)
    assert len(sent) == 3  # Open WebUI's own search asks first

    minimal = {**with_tools(tools), "model": "pipe.openai/gpt-5", "tools": []}
    minimal["reasoning_effort"] = "minimal"
    minimal["extra_tools"] = [{"type": "openrouter:web_search"}]
    assert not await _tools_sent(simulator, minimal, metadata=SEARCH)

    own = {"type": "openrouter:web_search", "parameters": {"max_results": 1}}
    filtered = body(extra_tools=[own])
    assert await _tools_sent(simulator, filtered, metadata=SEARCH) == [own]


async def test_a_user_chooses_within_what_the_admin_allows() -> None:
    valves = plugin.Settings(WEB_SEARCH_MAX_RESULTS=5)
    chosen = plugin.UserSettings(WEB_SEARCH_MAX_RESULTS=9, WEB_SEARCH_ENGINE="exa")
    mine = valves.for_user(chosen)
    assert (mine.WEB_SEARCH_MAX_RESULTS, mine.WEB_SEARCH_ENGINE) == (9, "exa")
    assert valves.for_user(plugin.UserSettings()) is valves
    assert valves.for_user(None) is valves
    assert valves.for_user({"WEB_SEARCH_MAX_RESULTS": 999}) is valves
    off = plugin.Settings(ENABLE_WEB_SEARCH_TOOL="off")
    always = plugin.UserSettings(ENABLE_WEB_SEARCH_TOOL="always")
    assert off.for_user(always).ENABLE_WEB_SEARCH_TOOL == "off"
    assert valves.for_user(always).ENABLE_WEB_SEARCH_TOOL == "always"


# What is offered


async def test_b11_the_order_of_tools_stays(simulator: Simulator) -> None:
    tools = kit(**{f"tool_{n}": echo for n in range(30)})
    asked = with_tools(tools)
    first = await _tools_sent(simulator, asked, __tools__=tools)
    again = {**asked, "tools": [*reversed(asked["tools"]), asked["tools"][3]]}
    second = await _tools_sent(simulator, again, __tools__=tools)

    assert json.dumps(first) == json.dumps(second)
    assert len(first) == 30


async def test_tools_of_filters_and_mcp_servers_are_offered(
    simulator: Simulator,
) -> None:
    servers = [{"server_label": "docs", "server_url": "https://mcp.example.com"}]
    valves = {"REMOTE_MCP_SERVERS_JSON": json.dumps(servers)}
    extra = [{"type": "openrouter:datetime"}, {"type": "openrouter:datetime"}]
    asked = with_tools(kit(echo=echo), extra_tools=extra)

    sent = await _tools_sent(simulator, asked, valves=valves)
    assert [tool["type"] for tool in sent] == ["function", "mcp", "openrouter:datetime"]
    assert sent[1] == {"type": "mcp", "require_approval": "never", **servers[0]}

    sent = await _tools_sent(simulator, asked, valves=valves, metadata=ASKS)
    assert [tool["type"] for tool in sent] == ["function"]  # whatever brought it

    plugins = [{"id": "web"}, {"id": "file-parser"}]
    for metadata, left in ((ASKS, plugins[1:]), (CHAT, plugins)):
        await _tools_sent(simulator, {**asked, "plugins": plugins}, metadata=metadata)
        assert simulator.posts[0].body["plugins"] == left

    plain = {**asked, "model": "pipe.openai/gpt-3.5-turbo-instruct"}
    assert await _tools_sent(simulator, plain, valves=valves) == []


async def test_tools_that_only_stand_beside_the_body_are_offered(
    simulator: Simulator,
) -> None:
    tools = kit(echo=echo, hidden=echo)
    facts = {**CHAT, "deferred_tools": ["hidden"]}
    sent = await _tools_sent(simulator, body(), __tools__=tools, metadata=facts)
    assert [tool["name"] for tool in sent] == ["echo"]

    legacy = {**CHAT, "params": {"function_calling": "legacy"}}
    assert not await _tools_sent(simulator, body(), __tools__=tools, metadata=legacy)


async def test_strict_schemas_are_sent_and_their_nulls_taken_out_again(
    simulator: Simulator,
) -> None:
    valves = {"ENABLE_STRICT_TOOL_CALLING": True}
    shown = await run(
        simulator,
        kit(echo=echo),
        replies.tool_calls([("echo", {"x": None})]),
        replies.text("Done."),
        valves=valves,
    )

    (tool,) = simulator.posts[0].body["tools"]
    assert tool["strict"] is True
    assert tool["parameters"]["required"] == ["x"]
    assert tool["parameters"]["properties"]["x"]["type"] == ["string", "null"]
    assert outputs(shown) == {"echo": "echo nothing"}
    assert shown.items("function_call")[0]["arguments"] == "{}"

    left = await run(
        simulator,
        kit(ask_user=echo),
        replies.tool_calls([("ask_user", {"x": None})]),
        valves=valves,
    )
    assert left.items("function_call")[0]["arguments"] == "{}"
