"""Tools in a real server: run by the pipe, shown and stored as Open WebUI does."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.server import Account, Chat, Listener, OpenWebUI, Refused
from tests.simulator import Simulator, replies, scenario
from tests.simulator.ledger import Entry
from tests.toolservers import ToolServers, connected

JSON = dict[str, Any]
MODEL = "openrouter.openai/gpt-4o"
TOOLS = '''"""
title: Workshop
"""

import asyncio
import base64

PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9"
    "awAAAABJRU5ErkJggg=="
)


class Tools:
    async def get_weather(self, city: str, days: int = 1) -> str:
        """Tell the weather.

        :param city: Where
        :param days: For how many days
        """
        return f"{city}: 4 degrees for {days} day(s)"

    async def nap(self, seconds: float = 1) -> str:
        """Sleep."""
        await asyncio.sleep(seconds)
        return f"slept {seconds}"

    def fail(self) -> str:
        """Fail."""
        raise ValueError("the oven is cold")

    async def fetch_url(self, url: str) -> str:
        """Read a page."""
        return f"The page at {url} is about fjords."

    async def paint(self, subject: str = "") -> str:
        """Paint a picture."""
        return "data:image/png;base64," + PIXEL

    async def flood(self) -> str:
        """Return five million characters."""
        return "x" * 5_000_000

    async def write_file(self, path: str) -> dict:
        """Write a file."""
        return {"path": path, "written": True}
'''
SPECS = [
    {
        "name": "page_title",
        "description": "Read the title of the page",
        "parameters": {
            "type": "object",
            "properties": {"short": {"type": "boolean"}},
            "required": [],
        },
    }
]
SERVER = {
    "url": "http://tools.example",
    "openapi": {},
    "info": {},
    "specs": SPECS,
    "config": {},
}


@pytest.fixture(scope="module")
def workshop(installed: OpenWebUI) -> Iterator[str]:
    """Put a workspace tool into the server, and switch on what asks and what is direct."""
    admin = installed.admin
    form = {"id": "workshop", "name": "Workshop", "content": TOOLS}
    admin.call("POST", "/api/v1/tools/create", {**form, "meta": {"description": ""}})
    admin.call(
        "POST",
        "/api/v1/configs/connections",
        {
            "ENABLE_DIRECT_CONNECTIONS": False,
            "ENABLE_DIRECT_INTEGRATIONS": True,
            "ENABLE_BASE_MODELS_CACHE": False,
        },
    )
    config = admin.call("GET", "/api/v1/chats/config")
    admin.call(
        "POST", "/api/v1/chats/config", {**config, "ENABLE_TOOL_PERMISSIONS": True}
    )
    yield "workshop"
    admin.call("POST", "/api/v1/chats/config", config)
    admin.call("DELETE", "/api/v1/tools/id/workshop/delete")


@pytest.fixture
def chat(admin: Account, workshop: str) -> Callable[..., Chat]:
    """Chat with the workspace tools at hand."""

    def send(text: str = "Go.", **more: Any) -> Chat:
        return admin.chat(MODEL, text, tool_ids=[workshop], **more)

    return send


def results(chat: Chat) -> dict[str, JSON]:
    """Return each result by the name of its call."""
    names = {item["call_id"]: item["name"] for item in chat.items("function_call")}
    return {names[i["call_id"]]: i for i in chat.items("function_call_output")}


def text_of(item: JSON) -> str:
    return "".join(part.get("text", "") for part in item["output"])


def sent_outputs(entry: Entry) -> list[JSON]:
    return [i for i in entry.items if i.get("type") == "function_call_output"]


def test_d1_results_of_a_round_go_back_even_if_one_tool_raises(
    chat: Callable[..., Chat], simulator: Simulator
) -> None:
    simulator.script(
        replies.tool_calls([("get_weather", {"city": "Oslo"}), "fail"], think="Hm."),
        replies.text("It is cold."),
    )
    done = chat()

    assert done.text == "It is cold."
    assert len(simulator.posts) == 2
    found = results(done)
    assert text_of(found["get_weather"]) == "Oslo: 4 degrees for 1 day(s)"
    assert "the oven is cold" in text_of(found["fail"])
    statuses = {i["name"]: i["status"] for i in done.items("function_call")}
    assert statuses == {"get_weather": "completed", "fail": "failed"}
    assert len(sent_outputs(simulator.posts[1])) == 2
    assert done.usage["total_tokens"] > 0
    assert not done.error


def test_eight_naps_take_as_long_as_one(
    chat: Callable[..., Chat], simulator: Simulator
) -> None:
    calls = [("nap", {"seconds": 1}) for _ in range(8)]
    simulator.script(replies.tool_calls(calls), replies.text("Awake."))
    chat()

    first, second = simulator.posts
    assert second.at - first.at < 3  # eight seconds one after another


def test_the_next_turn_sees_what_happened(
    admin: Account, chat: Callable[..., Chat], simulator: Simulator, workshop: str
) -> None:
    simulator.script(
        replies.tool_calls([("get_weather", {"city": "Oslo"})], say="Let me look."),
        replies.text("It is cold."),
        replies.text("Yes."),
    )
    first = chat()
    admin.chat(MODEL, "Really?", after=first, tool_ids=[workshop])

    kinds = [i.get("type") or i["role"] for i in simulator.posts[2].items]
    assert kinds.count("function_call") == kinds.count("function_call_output") == 1
    (output,) = sent_outputs(simulator.posts[2])
    assert output["output"] == "Oslo: 4 degrees for 1 day(s)"


def test_b11_the_tools_are_the_same_bytes_in_every_turn(
    admin: Account, chat: Callable[..., Chat], simulator: Simulator, workshop: str
) -> None:
    simulator.script(replies.text("One."), replies.text("Two."))
    first = chat()
    admin.chat(MODEL, "Again.", after=first, tool_ids=[workshop])

    tools = [json.dumps(post.body["tools"]) for post in simulator.posts]
    assert tools[0] == tools[1]
    names = [tool["name"] for tool in simulator.posts[0].body["tools"]]
    assert names == sorted(set(names))
    assert "get_weather" in names


def test_d4_endless_calls_end_with_an_answer(
    webui: OpenWebUI,
    chat: Callable[..., Chat],
    simulator: Simulator,
    valves: JSON,
) -> None:
    webui.admin.set_valves("openrouter", {**valves, "MAX_FUNCTION_CALL_LOOPS": 3})
    simulator.script(
        scenario("H8", "endless").times(3), replies.text("It is cold everywhere.")
    )
    done = chat()

    bodies = [post.body for post in simulator.posts]
    assert [b.get("tool_choice") for b in bodies] == [None, None, None, "none"]
    assert all(b["tools"] == bodies[0]["tools"] for b in bodies)
    assert done.text == "It is cold everywhere."
    assert not done.error


def test_d5_an_api_clients_tools_are_its_own(
    admin: Account, workshop: str, simulator: Simulator
) -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
    simulator.script(scenario("H7").times(2))
    answer = admin.api_chat(MODEL, "Weather?", tools=[tool])
    message = answer.body["choices"][0]["message"]
    assert [c["function"]["name"] for c in message["tool_calls"]] == ["get_weather"] * 2

    streamed = admin.api_chat(MODEL, "Weather?", tools=[tool], stream=True)
    deltas = [c["delta"] for chunk in streamed.chunks for c in chunk["choices"]]
    assert sum(len(delta.get("tool_calls") or []) for delta in deltas) == 2
    assert len(simulator.posts) == 2

    simulator.script(replies.text("It is cold."))
    told = [
        {"role": "tool", "tool_call_id": call["id"], "content": "4 degrees"}
        for call in message["tool_calls"]
    ]
    question = {"role": "user", "content": "Weather?"}
    answer = admin.api_chat(MODEL, [question, message, *told], tools=[tool])
    assert answer.text == "It is cold."


def test_d6_a_huge_result_is_bounded_and_kept_in_a_file(
    admin: Account, chat: Callable[..., Chat], simulator: Simulator
) -> None:
    simulator.script(replies.tool_calls(["flood"]), replies.text("Much."))
    done = chat()

    (sent,) = sent_outputs(simulator.posts[1])
    assert len(sent["output"]) < 101_000
    assert "of 5000000 characters" in sent["output"]
    (file,) = results(done)["flood"]["files"]
    assert len(admin.download(file["url"])) == 5_000_000
    assert len(json.dumps(done.output)) < 200_000


def test_d7_a_tool_that_hangs_is_given_up(
    webui: OpenWebUI, chat: Callable[..., Chat], simulator: Simulator, valves: JSON
) -> None:
    webui.admin.set_valves("openrouter", {**valves, "TOOL_TIMEOUT_SECONDS": 0.5})
    calls = [("nap", {"seconds": 60}), ("get_weather", {"city": "Oslo"})]
    simulator.script(replies.tool_calls(calls), replies.text("Done."))
    done = chat()

    assert "did not answer within 0.5 seconds" in text_of(results(done)["nap"])
    assert "4 degrees" in text_of(results(done)["get_weather"])
    assert done.text == "Done."


@pytest.mark.parametrize("name", ["F33", "F34"])
def test_d8_broken_calls_are_each_answered_once(
    chat: Callable[..., Chat], simulator: Simulator, name: str
) -> None:
    simulator.script(scenario(name), replies.text("Done."))
    done = chat()

    made = [item["call_id"] for item in done.items("function_call")]
    assert sorted(made) == sorted(
        item["call_id"] for item in done.items("function_call_output")
    )
    assert len(set(made)) == len(made)
    assert done.text.endswith("Done.")
    assert len(simulator.posts) == 2


def test_d10_the_chats_switch_brings_the_search_its_sources_and_its_price(
    chat: Callable[..., Chat], simulator: Simulator
) -> None:
    simulator.script(replies.citations(native=False))
    done = chat(features={"web_search": True})

    sent = [t.get("name", t["type"]) for t in simulator.posts[0].body["tools"]]
    assert "openrouter:web_search" in sent
    assert "search_web" not in sent
    urls = [source["source"]["url"] for source in done.sources]
    assert urls == ["https://example.com/fjords", "https://example.org/boats"]
    (search,) = done.items("web_search_call")
    assert search["action"]["query"] == "fjords"
    assert done.usage["server_tool_use_details"]["web_search_requests"] == 1


def test_a_user_chooses_the_search(
    webui: OpenWebUI, chat: Callable[..., Chat], simulator: Simulator
) -> None:
    mine = {"WEB_SEARCH_MAX_RESULTS": 2, "WEB_SEARCH_ENGINE": "exa"}
    webui.admin.set_user_valves("openrouter", mine)
    simulator.script(replies.citations())
    chat(features={"web_search": True})
    webui.admin.set_user_valves("openrouter", {})

    (search,) = [
        t
        for t in simulator.posts[0].body["tools"]
        if t["type"].startswith("openrouter")
    ]
    assert search["parameters"] == {"max_results": 2, "engine": "exa"}


def test_stop_ends_ten_running_tools(
    admin: Account, simulator: Simulator, workshop: str
) -> None:
    calls = [("nap", {"seconds": 60}) for _ in range(10)]
    simulator.script(replies.tool_calls(calls, say="Good night."))
    with admin.listen() as tab:
        started = admin.start_chat(
            MODEL, "Sleep.", session_id=tab.sid, tool_ids=[workshop]
        )
        tab.wait(lambda seen: "Good night" in str(seen.data))
        time.sleep(0.5)
        begun = time.monotonic()
        admin.stop_chat(started)
        done = admin.wait_chat(started, timeout_seconds=5)

    assert time.monotonic() - begun < 3
    assert done.text == "Good night."
    simulator.script(replies.text("Again."))
    assert admin.chat(MODEL, "Hello", after=done).text == "Again."
    kinds = [item.get("type") for item in simulator.posts[-1].items]
    assert kinds.count("function_call") == kinds.count("function_call_output")
    assert {i["status"] for i in done.items("function_call")} == {"incomplete"}


# Approval ------------------------------------------------------------------------------

ASK: JSON = {"params": {"tool_approval_mode": "ask"}}


def resolve(admin: Account, chat: Chat, item: JSON, action: str, **more: Any) -> None:
    path = f"/api/v1/chats/{chat.id}/messages/{chat.message_id}/resolve"
    admin.call("POST", path, {"call_id": item["call_id"], "action": action, **more})


def go_on(admin: Account, chat: Chat, **more: Any) -> Chat:
    """Go on with an answer after its calls were resolved, as the browser does."""
    return admin.continue_answer(chat, tool_approval_resume=True, **more)


@pytest.mark.parametrize("execution", ["pipe", "open_webui"])
def test_d2_a_tool_that_is_refused_never_runs(
    webui: OpenWebUI,
    chat: Callable[..., Chat],
    simulator: Simulator,
    valves: JSON,
    workshop: str,
    execution: str,
) -> None:
    admin = webui.admin
    admin.set_valves("openrouter", {**valves, "TOOL_EXECUTION": execution})
    simulator.script(
        replies.tool_calls([("get_weather", {"city": "Oslo"})]),
        replies.text("As you like."),
    )
    waiting = chat(**ASK)
    (call,) = waiting.items("function_call")
    assert call["status"] == "pending"
    assert not waiting.items("function_call_output")
    assert len(simulator.posts) == 1

    resolve(admin, waiting, call, "reject")
    done = go_on(admin, waiting, tool_ids=[workshop], **ASK)

    assert done.text == "As you like."
    (sent,) = sent_outputs(simulator.posts[1])
    assert "rejected" in str(sent["output"])
    assert "degrees" not in json.dumps(done.output)


def test_a_temporary_chat_asks_in_the_browser(
    admin: Account, simulator: Simulator, workshop: str
) -> None:
    for allowed in (False, True):
        simulator.reset()
        simulator.script(
            replies.tool_calls([("get_weather", {"city": "Oslo"})]),
            replies.text("So."),
        )
        with admin.listen() as tab:
            tab.answers["confirmation"] = allowed
            admin.chat(
                MODEL, "Go.", temporary=True, listener=tab, tool_ids=[workshop], **ASK
            )
        (sent,) = sent_outputs(simulator.posts[1])
        assert len(tab.of(kind="confirmation")) == 1
        assert ("4 degrees" in str(sent["output"])) is allowed


# The same in both ways -----------------------------------------------------------------

QUESTION = {
    "questions": [
        {
            "id": "q1",
            "header": "Colour",
            "question": "Which colour?",
            "options": [
                {"label": "Red", "description": "Like fire"},
                {"label": "Blue", "description": "Like the sea"},
            ],
        }
    ]
}


def plain(value: Any) -> Any:
    """Return stored data without what differs from run to run."""
    text = json.dumps(value, sort_keys=True)
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}", "<uuid>", text)
    return json.loads(text)


def trace(chat: Chat) -> list[Any]:
    """Return what a chat holds, without ids, in the order of its calls."""
    order = [item["call_id"] for item in chat.items("function_call")]
    kept: list[Any] = []
    for item in chat.output:
        if item["type"] == "function_call":
            arguments = json.loads(item["arguments"])
            kept.append(("call", item["name"], arguments, item["status"]))
        elif item["type"] == "function_call_output":
            parts = plain(item["output"])
            kept.append(("result", order.index(item["call_id"]), item["status"], parts))
        elif item["type"] == "message":
            kept.append(("text", item["content"][0]["text"]))
    runs = [[]]
    for each in kept:  # results of one round may come in any order
        if each[0] != "result" and runs[-1] and runs[-1][-1][0] == "result":
            runs.append([])
        runs[-1].append(each)
    return [
        sorted(
            run, key=lambda e: (e[0] == "result", str(e[1]) if e[0] == "result" else "")
        )
        for run in runs
    ]


def conversation(admin: Account, simulator: Simulator, tab: Listener) -> list[Any]:
    """Lead the scripted conversation, and return what it leaves behind."""
    options: JSON = {
        "tool_ids": ["workshop"],
        "tool_servers": [SERVER],
        "session_id": tab.sid,
    }
    tab.answers["execute:tool"] = lambda data: [{"title": "Start"}, {}]
    simulator.script(
        replies.tool_calls(
            [
                ("get_weather", {"city": "Oslo"}),
                ("get_weather", {"city": "Rome", "days": 2}),
                "fail",
            ],
            say="Let me see.",
            think="Hm.",
        ),
        replies.tool_calls(
            [
                ("fetch_url", {"url": "https://example.com/fjords"}),
                ("paint", {"subject": "boat"}),
                ("page_title", {"short": True}),
                ("write_file", {"path": "/tmp/a.txt"}),
            ]
        ),
        replies.text("Here is all of it [1]."),
    )
    first = admin.chat(MODEL, "Go.", **options)

    simulator.script(
        replies.tool_calls([("get_weather", {"city": "Bergen"})]),
        replies.text("Rain."),
    )
    waiting = admin.chat(MODEL, "And Bergen?", after=first, **options, **ASK)
    resolve(admin, waiting, waiting.items("function_call")[0], "approve")
    second = go_on(admin, waiting, **options, **ASK)

    simulator.script(
        replies.tool_calls([("ask_user", QUESTION)]), replies.text("Blue it is.")
    )
    asking = admin.chat(MODEL, "Ask me.", after=second, **options)
    (call,) = asking.items("function_call")
    assert call["status"] == "pending"
    resolve(admin, asking, call, "answer", answers={"q1": {"answers": ["Blue"]}})
    third = go_on(admin, asking, **options)

    simulator.script(replies.text("You are welcome."))
    last = admin.chat(MODEL, "Thanks.", after=third, **options)
    history = [i for i in simulator.posts[-1].items if i.get("role") != "user"]
    said = [(i.get("type"), i.get("name"), plain(i.get("output"))) for i in history]
    return [
        *[trace(chat) for chat in (first, second, third, last)],
        [plain(chat.sources) for chat in (first, second, third)],
        [plain(chat.files) for chat in (first, second, third)],
        sorted(map(str, said)),
        [chat.error for chat in (first, second, third, last)],
        sorted(
            {seen.type for seen in tab.of(first) if seen.type.startswith("terminal")}
        ),
    ]


def test_both_ways_leave_the_same_messages_sources_and_files(
    webui: OpenWebUI, simulator: Simulator, valves: JSON, workshop: str
) -> None:
    left: dict[str, list[Any]] = {}
    posts: dict[str, int] = {}
    for execution in ("pipe", "open_webui"):
        webui.admin.set_valves("openrouter", {**valves, "TOOL_EXECUTION": execution})
        simulator.reset()
        with webui.admin.listen() as tab:
            left[execution] = conversation(webui.admin, simulator, tab)
        posts[execution] = len(simulator.posts)

    for ours, theirs in zip(left["pipe"], left["open_webui"], strict=True):
        assert ours == theirs
    assert posts["pipe"] == posts["open_webui"]
    assert left["pipe"][4][0]  # the page that was read is a source
    assert left["pipe"][-1] == ["terminal:write_file"]


def test_a_user_without_the_tool_does_not_get_it(
    webui: OpenWebUI, simulator: Simulator, workshop: str
) -> None:
    webui.admin.share_model(MODEL)
    stranger = webui.add_user()
    simulator.script(
        replies.tool_calls([("get_weather", {"city": "Oslo"})]), replies.text("No.")
    )
    done = stranger.chat(MODEL, "Go.", tool_ids=[workshop])

    assert "not found" in text_of(results(done)["get_weather"])
    with pytest.raises(Refused):
        stranger.call("DELETE", "/api/v1/tools/id/workshop/delete")


# Tool servers that an admin connected ---------------------------------------------------

CONNECTED: JSON = {
    "tool_ids": ["server:shop", "server:mcp:library"],
    "terminal_id": "box",
}
COMMAND = ("run_command", {"command": "echo hello"})


@pytest.fixture(scope="module")
def servers(installed: OpenWebUI, workshop: str) -> Iterator[ToolServers]:
    """Connect an OpenAPI server, an MCP server and a terminal."""
    with connected(installed.admin) as servers:
        yield servers


def served_conversation(
    admin: Account, simulator: Simulator, tab: Listener
) -> list[Any]:
    """Use each kind of server, and return what it leaves behind."""
    options: JSON = {**CONNECTED, "session_id": tab.sid}
    simulator.script(
        replies.tool_calls(
            [
                ("get_stock", {"item": "blue ink", "shelf": 2}),
                ("place_order", {"item": "ink", "count": 2}),
                "take_photo",
                "open_window",
                "open_till",
                ("library_find_book", {"title": "Fjords"}),
                ("library_shelf_mark", {"title": "Fjords"}),
                "library_cover",
                ("library_lend", {"title": "Fjörds"}),
            ],
            say="Let me see.",
        ),
        replies.tool_calls(
            [
                COMMAND,
                ("write_file", {"path": "a.txt", "content": "hello"}),
                ("display_file", {"path": "a.txt"}),
            ]
        ),
        replies.text("Here is all of it."),
    )
    first = admin.chat(MODEL, "Go.", **options)
    simulator.script(replies.text("You are welcome."))
    last = admin.chat(MODEL, "Thanks.", after=first, **options)

    history = [i for i in simulator.posts[-1].items if i.get("role") != "user"]
    said = [(i.get("type"), i.get("name"), plain(i.get("output"))) for i in history]
    shown = {
        name: (plain(item.get("files")), item.get("embeds"))
        for name, item in results(first).items()
    }
    seen = [(e.type, e.data) for e in tab.of(first) if e.type.startswith("terminal")]
    return [trace(first), trace(last), shown, sorted(map(str, said)), seen]


def test_tool_servers_leave_the_same_in_both_ways(
    webui: OpenWebUI, simulator: Simulator, valves: JSON, servers: ToolServers
) -> None:
    left: dict[str, list[Any]] = {}
    reached: dict[str, list[Any]] = {}
    for execution in ("pipe", "open_webui"):
        webui.admin.set_valves("openrouter", {**valves, "TOOL_EXECUTION": execution})
        simulator.reset()
        servers.seen.clear()
        with webui.admin.listen() as tab:
            left[execution] = served_conversation(webui.admin, simulator, tab)
        reached[execution] = sorted(map(str, servers.seen))

    for ours, theirs in zip(left["pipe"], left["open_webui"], strict=True):
        assert ours == theirs
    assert reached["pipe"] == reached["open_webui"]
    assert "'count': 2" in str(reached["pipe"])
    assert "'command': 'echo hello'" in str(reached["pipe"])
    assert len(reached["pipe"]) == 6
    shown = left["pipe"][2]
    assert shown["open_window"][1] == ["<h1>Shop</h1>"]
    assert shown["library_cover"][0][0]["type"] == "image"
    assert "Fjörds is lent" in str(left["pipe"][0])
    assert [type_ for type_, _ in left["pipe"][-1]] == [
        "terminal:run_command",
        "terminal:write_file",
        "terminal:display_file",
    ]


def test_the_pipe_runs_the_tools_of_servers_side_by_side(
    admin: Account, simulator: Simulator, servers: ToolServers
) -> None:
    """Leave the terminal's calls to Open WebUI, which alone runs those."""
    simulator.script(
        replies.tool_calls([("library_find_book", {"title": "Ice"}), COMMAND]),
        replies.text("Done."),
    )
    servers.seen.clear()
    done = admin.chat(MODEL, "Go.", **CONNECTED)

    assert text_of(results(done)["library_find_book"]) == "Ice (2000) stands in row 7"
    assert "hello" in text_of(results(done)["run_command"])
    assert [name for name, _ in servers.seen] == ["find_book", "run_command"]
    assert done.text == "Done."


@pytest.mark.parametrize("execution", ["pipe", "open_webui"])
def test_no_server_is_reached_before_somebody_has_said_yes(
    webui: OpenWebUI,
    simulator: Simulator,
    valves: JSON,
    servers: ToolServers,
    execution: str,
) -> None:
    admin = webui.admin
    admin.set_valves("openrouter", {**valves, "TOOL_EXECUTION": execution})
    servers.seen.clear()
    calls = [
        ("get_stock", {"item": "ink"}),
        ("library_find_book", {"title": "Ice"}),
        COMMAND,
    ]
    simulator.script(replies.tool_calls(calls), replies.text("So be it."))
    waiting = admin.chat(MODEL, "Go.", **CONNECTED, **ASK)
    assert servers.seen == []

    for call, action in zip(
        waiting.items("function_call"), ("reject", "approve", "reject"), strict=True
    ):
        resolve(admin, waiting, call, action)
    done = go_on(admin, waiting, **CONNECTED, **ASK)

    assert [name for name, _ in servers.seen] == ["find_book"]
    assert done.text == "So be it."
    assert len(sent_outputs(simulator.posts[-1])) == 3


def test_an_api_client_has_the_tools_of_servers_run(
    admin: Account, simulator: Simulator, servers: ToolServers
) -> None:
    """Show that no MCP server outlives the request: its calls go to the client."""
    calls = [("get_stock", {"item": "ink"}), ("library_find_book", {"title": "Ice"})]
    options: JSON = {"tool_ids": CONNECTED["tool_ids"]}
    simulator.script(replies.tool_calls(calls), replies.text("Row 7."))
    whole = admin.api_chat(MODEL, "Where?", **options)
    assert whole.text == "Row 7."
    stock, book = sent_outputs(simulator.posts[1])
    assert '"count": 3' in stock["output"]
    assert book["output"] == "Ice (2000) stands in row 7"

    simulator.reset()
    simulator.script(replies.tool_calls(calls[:1]), replies.text("Three."))
    assert admin.api_chat(MODEL, "Ink?", stream=True, **options).text == "Three."

    simulator.reset()
    simulator.script(replies.tool_calls(calls[1:]))
    streamed = admin.api_chat(MODEL, "Where?", stream=True, **options)
    (choice, *_) = [c for chunk in streamed.chunks for c in chunk["choices"]]
    (call,) = choice["delta"]["tool_calls"]
    assert call["function"]["name"] == "library_find_book"
    assert len(simulator.posts) == 1
