"""17 Turn: each of the simulator's scenarios, from the request to the last event."""

from __future__ import annotations

import asyncio
import logging
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest

from open_webui_openrouter_pipe import open_webui_openrouter_pipe as plugin
from tests.simulator import SCENARIOS, Entry, Simulator, replies, scenario, variants
from tests.simulator.replies import Call
from tests.simulator.wire import Raw, Step
from tests.turns import (
    CHAT,
    MODEL,
    USER,
    Shown,
    answer,
    ask,
    ask_api,
    body,
    hung_up,
    opened,
    posted,
    upstream_usage,
    whole,
)

ALL = [(name, variant) for name in SCENARIOS for variant in variants(name)]
MODELS = {
    "H2": "deepseek/deepseek-r1",
    "H3": "openai/gpt-5",
    "H5": "anthropic/claude-sonnet-4.5",
    "H10": "openai/gpt-5-image",
}
# Waits are shortened where a scenario lets us; F7 keeps a date, F9 its three seconds.
OPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("F6", "default"): {"retry_after": 0.05},
    ("F7", "seconds"): {"retry_after": 0.05},
    ("F24", "default"): {"seconds": 1, "interval": 0.1},
    ("H10", "large"): {"size": 1 << 20},
}
# Calls are the host's to run here, so that each scenario is one round.
HANDED_OVER = {**CHAT, "params": {"tool_approval_mode": "ask"}}

FJORDS = "Hello fjords and boats."
TEXTS: dict[str | tuple[str, str], str] = {
    **dict.fromkeys(("H5", "H6", "H7", "H8", "H10", "F21", "F26"), ""),
    **dict.fromkeys((f"F{n}" for n in (*range(1, 16), 25)), ""),
    ("H6", "commentary"): "Let me look.",
    ("H8", "answer"): "It is 4 degrees in Oslo.",
    "H9": FJORDS,
    ("H9", "datetime"): "Noon.",
    ("H9", "web-fetch"): "Deep.",
    ("H10", "caption"): "A sun over hills.",
    ("H10", "server-tool-url"): "Here it is.",
    ("H10", "server-tool-b64"): "Here it is.",
    ("H10", "server-tool-result"): "Here it is.",
    "H11": "I cannot help with that.",
    ("F2", "partial"): "Hello.",
    "F32": "<tool_call>get_weather\n<arg_key>city</arg_key>\n"
    "<arg_value>Oslo</arg_value>\n</tool_call>",
    "F33": "",
    "F34": "",
}

# What tells a card from all the others, and what it advises.
CREDIT = "not enough credit"
PROVIDER = "provider failed"
TIMEOUT = "took too long to answer"
LIMIT = "rate limit for this model is reached"
LENGTH = "length limit and ends early"
NOTHING = "returned no answer"
LOST = "connection to OpenRouter was lost"
SILENT = "stayed silent for too long"
CARDS: dict[str | tuple[str, str], str] = {
    ("H6", "truncated"): LENGTH,
    ("H8", "empty"): NOTHING,
    "F1": "longer than this model can read",
    "F2": LENGTH,
    "F3": CREDIT,
    "F4": CREDIT,
    "F5": CREDIT,
    "F6": "running requests hold",
    "F7": LIMIT,
    "F8": LIMIT,
    "F9": PROVIDER,
    **{("F9", v): TIMEOUT for v in ("504", "524", "520-html", "524-html")},
    "F10": "refused",
    ("F10", "as-400"): "did not accept the request",
    "F11": "can serve",
    "F12": "did not accept the request",
    ("F13", "401"): "API_KEY",
    ("F13", "413"): "larger than OpenRouter accepts",
    ("F13", "408"): TIMEOUT,
    ("F13", "422"): "did not accept the request",
    "F14": PROVIDER,
    ("F14", "empty"): NOTHING,
    "F15": PROVIDER,
    "F16": PROVIDER,
    "F17": PROVIDER,
    "F18": PROVIDER,
    ("F18", "untyped"): LIMIT,
    "F19": LENGTH,
    "F20": "content filter stopped",
    "F21": "while thinking",
    "F22": LOST,
    "F23": SILENT,
    "F25": LOST,
    "F26": NOTHING,
}
POSTS: dict[str | tuple[str, str], int] = {
    **dict.fromkeys(("F6", "F7", "F9", "F14", "F15"), 3),
    **{("F9", v): 1 for v in ("504", "524", "520-html", "524-html")},
    ("F7", "long"): 1,
    # The reset that F8 names is a date: worth waiting for when it has passed.
    "F8": 3 if time.time() > 1_790_000_000 - 30 else 1,
    ("F13", "408"): 3,
    ("F14", "empty"): 1,
}


def looked_up(table: dict[Any, Any], name: str, variant: str, default: Any) -> Any:
    """Return what a table says of a variant, or of all of its scenario."""
    return table.get((name, variant), table.get(name, default))


@dataclass
class Played:
    """One scenario, as a chat and an API client saw it."""

    reply: Any
    chat: Shown
    api: Shown
    chat_posts: list[Entry]
    api_posts: list[Entry]


@dataclass
class Stage:
    """All scenarios played, and what was logged meanwhile."""

    played: dict[tuple[str, str], Played]
    log: list[logging.LogRecord]
    api_key: str


class Keeper(logging.Handler):
    """Keep every record."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record in."""
        self.records.append(record)


async def play(
    simulator: Simulator, pipe: plugin.Pipe, name: str, variant: str, api: bool
) -> tuple[Any, Shown, list[Entry]]:
    """Play one scenario for one caller, told apart from all others by its question."""
    mark = f"{name} {variant} {'api' if api else 'chat'}"
    reply = scenario(name, variant, **OPTIONS.get((name, variant), {}))
    is_ours = lambda entry: entry.last_user_text == mark  # noqa: E731
    simulator.script(reply.forever(), when=is_ours)
    asked = body(mark, MODELS.get(name, MODEL))
    shown = await (
        ask_api(pipe, asked) if api else ask(pipe, asked, metadata=HANDED_OVER)
    )
    return reply, shown, [post for post in simulator.posts if is_ours(post)]


@pytest.fixture(scope="module")
async def stage() -> AsyncIterator[Stage]:
    """Play every scenario for a chat and for an API client, many at once."""
    with warnings.catch_warnings(action="ignore"):
        import_module("open_webui.utils.files")  # it sets logging up anew

    keeper, root = Keeper(), logging.getLogger()
    level = root.level
    root.addHandler(keeper)
    root.setLevel(logging.DEBUG)
    waits = asyncio.Semaphore(24)
    with Simulator() as simulator:
        async with (
            opened(simulator, LOG_LEVEL="DEBUG") as pipe,
            opened(simulator, LOG_LEVEL="DEBUG", HTTP_STREAM_IDLE_SECONDS=0.5) as hasty,
        ):

            async def both(name: str, variant: str) -> Played:
                chosen = hasty if name == "F23" else pipe
                async with waits:
                    (reply, chat, seen), (_, api, also) = await asyncio.gather(
                        play(simulator, chosen, name, variant, False),
                        play(simulator, chosen, name, variant, True),
                    )
                return Played(reply, chat, api, seen, also)

            played = await asyncio.gather(*(both(*pair) for pair in ALL))
        yield Stage(
            dict(zip(ALL, played, strict=True)), keeper.records, simulator.api_key
        )
    root.removeHandler(keeper)
    root.setLevel(level)


# The scenarios -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_the_chat_holds_the_text_and_the_card(
    stage: Stage, name: str, variant: str
) -> None:
    shown = stage.played[name, variant].chat
    card = looked_up(CARDS, name, variant, "")

    assert shown.text == looked_up(TEXTS, name, variant, "Hello.")
    assert shown.text.startswith(shown.streamed)
    assert len(shown.cards) == bool(card)
    assert all(card in text for text in shown.cards)


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_nothing_is_blank(stage: Stage, name: str, variant: str) -> None:
    shown = stage.played[name, variant].chat
    calls = [item for item in shown.output if item["type"] == "function_call"]

    assert shown.text or shown.cards or calls or shown.images or shown.lines


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_the_chat_ends_once_and_in_order(stage: Stage, name: str, variant: str) -> None:
    types = [e.get("type") for e in stage.played[name, variant].chat.events]
    ends = [t for t in types if t in ("response.completed", "response.failed")]

    assert types[-1] in ("response.completed", "response.failed")
    assert ends in (
        ["response.completed"],
        ["response.failed"],
        ["response.completed", "response.failed"],
    )
    assert types[-len(ends) :] == ends


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_items_are_contiguous_unique_and_finished(
    stage: Stage, name: str, variant: str
) -> None:
    shown = stage.played[name, variant].chat
    added = [
        event["output_index"]
        for event in shown.events
        if event.get("type") == "response.output_item.added"
    ]
    ids = [item["id"] for item in shown.output]

    assert added == list(range(len(added)))
    assert len(set(ids)) == len(ids)
    ends = {"completed", variant} if name == "H9" else {"completed"}
    assert {item["status"] for item in shown.output} <= ends
    for item in shown.items("message"):
        assert {part["type"] for part in item["content"]} == {"output_text"}


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_usage_is_counted_once_and_is_upstreams(
    stage: Stage, name: str, variant: str
) -> None:
    played = stage.played[name, variant]
    usage = upstream_usage(played.reply, played.chat_posts[-1].body)
    spent = upstream_usage(played.reply, played.api_posts[-1].body)

    assert played.chat.usages == ([usage] if usage else [])
    assert len(played.api.usages) == bool(spent)
    for counted in played.api.usages:
        assert counted.items() >= (spent or {}).items()


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_a_request_is_sent_again_only_where_that_is_safe(
    stage: Stage, name: str, variant: str
) -> None:
    played = stage.played[name, variant]
    expected = looked_up(POSTS, name, variant, 1)

    for posts in (played.chat_posts, played.api_posts):
        assert len(posts) == expected
        assert len({post.raw for post in posts}) == 1


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_an_api_client_reads_the_same_text(
    stage: Stage, name: str, variant: str
) -> None:
    played = stage.played[name, variant]

    assert "".join(played.api.chunked("content")) == played.chat.text
    assert not [event for event in played.api.events if "event" in event]


CUT_SHORT = {
    ("H6", "truncated"): "length",
    ("H8", "empty"): "stop",
    **{("F2", v): "length" for v in variants("F2")},
    ("F14", "empty"): "stop",
    ("F19", "default"): "length",
    ("F20", "default"): "content_filter",
    ("F21", "default"): "length",
    ("F26", "default"): "stop",
}


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_an_api_client_reads_one_finish_or_one_error(
    stage: Stage, name: str, variant: str
) -> None:
    played = stage.played[name, variant]
    answered = {i["call_id"] for i in played.chat.items("function_call_output")}
    made = {item["call_id"] for item in played.chat.items("function_call")}
    calls = made - answered  # the cards of hosted tools are answered
    finish = CUT_SHORT.get((name, variant), "tool_calls" if calls else "stop")
    has_failed = bool(played.chat.cards) and (name, variant) not in CUT_SHORT

    assert played.api.finishes == ([] if has_failed else [finish])
    assert [e["message"] for e in played.api.errors] == (
        played.chat.cards if has_failed else []
    )


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_no_secret_reaches_a_reader(stage: Stage, name: str, variant: str) -> None:
    played = stage.played[name, variant]
    told = f"{played.chat} {played.api}"

    assert stage.api_key not in told
    assert "encrypted_content" not in told
    assert "user_sim" not in told
    assert "<html" not in told.lower()
    if name != "H10":
        assert "base64" not in told


def test_no_secret_reaches_the_log(stage: Stage) -> None:
    ours = [r for r in stage.log if r.name.startswith("openrouter_pipe")]
    told = "\n".join(f"{r.getMessage()} {r.exc_text}" for r in stage.log)

    assert len(ours) > 10
    assert stage.api_key not in told
    assert "F9 502 chat" not in told


# One request's facts -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "task", "form", "caller", "face"),
    [
        (CHAT, None, "auto", "CHAT", "ResponsesFace"),
        (CHAT, None, "responses", "CHAT", "ResponsesFace"),
        (CHAT, None, "chunks", "CHAT", "ChunksFace"),
        ({}, None, "auto", "API", "ChunksFace"),
        ({}, None, "responses", "API", "ResponsesFace"),
        ({}, None, "chunks", "API", "ChunksFace"),
        (None, None, "auto", "API", "ChunksFace"),
        ({"chat_id": "chat-1"}, None, "auto", "API", "ChunksFace"),
        ({"message_id": "message-1"}, None, "auto", "API", "ChunksFace"),
        (CHAT, "title_generation", "auto", "TASK", "ChunksFace"),
        (CHAT, "title_generation", "responses", "TASK", "ChunksFace"),
    ],
)
def test_the_caller_decides_the_face(
    metadata: Any, task: Any, form: Any, caller: str, face: str
) -> None:
    settings = plugin.Settings(STREAM_FORMAT=form)

    turn = plugin.Turn.from_webui(settings, body(), USER, metadata, None, None, task)

    assert turn.caller is plugin.Caller[caller]
    assert type(turn.face()).__name__ == face


@pytest.mark.parametrize(
    ("given", "model_id"),
    [
        ("pipe.openai/gpt-4o", "openai/gpt-4o"),
        (
            "pipe.anthropic/claude-3.7-sonnet:thinking",
            "anthropic/claude-3.7-sonnet:thinking",
        ),
        ("pipe.~openai/gpt-latest", "~openai/gpt-latest"),
        ("pipe.@preset/support", "@preset/support"),
        ("pipe", ""),
        (None, ""),
        (7, ""),
    ],
)
def test_the_model_id_is_what_follows_the_functions(given: Any, model_id: str) -> None:
    turn = plugin.Turn.from_webui(
        plugin.Settings(), {"model": given}, None, None, None, None, None
    )

    assert turn.model_id == model_id


def test_nonsense_from_outside_is_no_error() -> None:
    turn = plugin.Turn.from_webui(plugin.Settings(), [], "x", 3, None, None, None)

    assert (turn.user_id, turn.chat_id, turn.is_streamed) == ("", "", False)


def test_a_turn_does_not_show_what_it_holds() -> None:
    turn = plugin.Turn.from_webui(
        plugin.Settings(API_KEY=plugin.Secret("sk-or-v1-plain")),
        body("my secret question"),
        USER,
        CHAT,
        None,
        None,
        None,
    )

    assert "my secret question" not in repr(turn)
    assert "sk-or-v1-plain" not in repr(turn)


def test_the_ids_of_earlier_calls_are_found() -> None:
    messages = [
        {"role": "assistant", "tool_calls": [{"id": "call_1"}, {"id": "call_2"}]},
        {"role": "assistant", "tool_calls": None},
        None,
    ]

    assert plugin.call_ids(messages) == {"call_1", "call_2"}


# Trying again --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("F7", "no-header"),
        ("F7", "http-date"),
        ("F9", "502"),
        ("F13", "408"),
        ("F14", "error"),
        ("F15", "flat"),
        ("F15", "failed"),
    ],
)
async def test_what_shows_nothing_is_tried_again(
    simulator: Simulator, name: str, variant: str
) -> None:
    simulator.script(scenario(name, variant), replies.text("Hello."))
    async with opened(simulator) as pipe:
        shown = await ask(pipe)

    assert (shown.text, shown.cards) == ("Hello.", [])
    assert len({post.raw for post in simulator.posts}) == 1
    assert len(simulator.posts) == 2
    assert [line for line in shown.lines if "Trying again in" in line]


async def test_a_wait_of_nothing_is_a_wait_all_the_same(simulator: Simulator) -> None:
    limited = replies.http_error(429, headers={"Retry-After": "0"})
    simulator.script(limited.times(2), replies.text("Hello."))
    async with opened(simulator) as pipe:
        shown = await ask(pipe)

    first, second, third = (post.at for post in simulator.posts)
    assert second - first >= 0.5
    assert third - second >= 1
    assert shown.text == "Hello."


async def test_e3_the_wait_that_is_asked_for_is_kept(simulator: Simulator) -> None:
    limited = scenario("F7", "seconds", retry_after=1)
    simulator.script(limited.times(2), replies.text("Hello."))
    async with opened(simulator) as pipe:
        shown = await ask(pipe)

    first, second, third = (post.at for post in simulator.posts)
    assert second - first >= 1
    assert third - second >= 1
    assert shown.text == "Hello."
    assert len(shown.usages) == 1


@pytest.mark.parametrize("variant", ["done", "no-done"])
async def test_after_visible_text_nothing_is_sent_again(
    simulator: Simulator, variant: str
) -> None:
    simulator.script(scenario("F17", variant), replies.text("Twice."))
    async with opened(simulator) as pipe:
        shown = await ask(pipe)

    assert shown.text == "Hello."
    assert len(simulator.posts) == 1


async def test_a_failure_after_reasoning_is_not_replayed(simulator: Simulator) -> None:
    thinks = replies.thought("I wonder.", style="text")
    simulator.script(replies.compose(thinks, terminal=replies.failed()))
    async with opened(simulator) as pipe:
        shown = await ask(pipe)

    assert shown.thoughts == "I wonder."
    assert len(shown.cards) == len(simulator.posts) == 1


# No connection -------------------------------------------------------------------------


async def test_f25_without_a_connection_the_card_names_the_network(
    simulator: Simulator,
) -> None:
    async def asked(address: str) -> list[str]:
        async with opened(simulator, BASE_URL=address) as pipe:
            return (await asyncio.wait_for(ask(pipe), 15)).cards

    addresses = simulator.refused_url, simulator.tls_url, simulator.unresolvable_url
    for cards in await asyncio.gather(*map(asked, addresses)):
        (card,) = cards
        assert "cannot be reached" in card
        assert "BASE_URL" in card
    assert not simulator.posts


async def test_e11_a_slow_first_token_ends_at_the_limit(simulator: Simulator) -> None:
    simulator.script(scenario("F24", seconds=30, interval=0.1))
    async with opened(simulator, HTTP_STREAM_IDLE_SECONDS=0.5) as pipe:
        shown = await asyncio.wait_for(ask(pipe), 10)

    assert "HTTP_STREAM_IDLE_SECONDS" in shown.cards[0]
    assert len(simulator.posts) == 1
    assert await hung_up(simulator)


async def test_headers_that_never_come_end_at_the_limit(simulator: Simulator) -> None:
    simulator.script(replies.text("Hello.", wait=30))
    async with opened(simulator, HTTP_STREAM_IDLE_SECONDS=0.5) as pipe:
        shown = await asyncio.wait_for(ask(pipe), 10)

    assert "stayed silent" in shown.cards[0]
    assert len(simulator.posts) == 1


async def test_a_long_answer_ends_at_the_total_limit(simulator: Simulator) -> None:
    simulator.script(replies.text("a" * 100, 100, delay=0.1))
    async with opened(simulator, HTTP_TOTAL_TIMEOUT_SECONDS=0.6) as pipe:
        shown = await asyncio.wait_for(ask(pipe), 10)

    assert "HTTP_TOTAL_TIMEOUT_SECONDS" in shown.cards[0]
    assert 0 < len(shown.text) < 100


async def test_an_answer_that_never_pauses_ends_at_the_total_limit_too(
    simulator: Simulator,
) -> None:
    simulator.script(replies.text("a" * 300, 300, delay=0.01))
    async with opened(simulator, HTTP_TOTAL_TIMEOUT_SECONDS=0.6) as pipe:
        shown = await asyncio.wait_for(ask(pipe), 10)

    assert "HTTP_TOTAL_TIMEOUT_SECONDS" in shown.cards[0]
    assert 0 < len(shown.text) < 300


# Models and keys -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        "openai/gpt-4o:nitro",
        "openai/gpt-4o:floor:online",
        "openai/gpt-oss-20b:free",
        "~openai/gpt-latest",
        "openai/gpt-4o@preset/support",
        "@preset/support",
        "openrouter/auto",
        "openai/gpt-4o-20250214",
    ],
)
async def test_b5_a_model_id_goes_upstream_as_it_is(
    simulator: Simulator, model: str
) -> None:
    async with opened(simulator) as pipe:
        shown = await ask(pipe, body("Hello", model))

    assert shown.text
    assert simulator.posts[0].model == model


async def test_an_unknown_model_is_refused_with_what_is_near(
    simulator: Simulator,
) -> None:
    async with opened(simulator) as pipe:
        shown = await ask(pipe, body("Hello", "openai/gtp-4o"))

    (card,) = shown.cards
    assert "openai/gtp-4o; did you mean openai/gpt-4o" in card
    assert not simulator.posts


async def test_without_a_catalog_a_chat_still_works(simulator: Simulator) -> None:
    simulator.script(replies.http_error(500).forever(), path="/models")
    async with opened(simulator) as pipe:
        shown = await ask(pipe)

    assert shown.text
    assert len(simulator.posts) == 1


async def test_without_a_key_nothing_is_sent(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    async with opened(simulator, API_KEY="") as pipe:
        shown = await ask(pipe)

    assert "API_KEY" in shown.cards[0]
    assert not simulator.ledger


async def test_a8_a_better_key_helps_at_once(simulator: Simulator) -> None:
    async with opened(simulator, API_KEY="sk-or-v1-wrong") as pipe:
        refused = await ask(pipe)
        better = {"BASE_URL": simulator.base_url, "API_KEY": simulator.api_key}
        pipe.valves = pipe.Valves.model_validate(better)
        answered = await ask(pipe)

    assert "refused the API key" in refused.cards[0]
    assert not answered.cards
    assert answered.text


# In one piece --------------------------------------------------------------------------


async def test_an_answer_in_one_piece_has_everything(simulator: Simulator) -> None:
    reply = replies.reasoning("I look.", "Hello.", style="text")
    simulator.script(reply)
    async with opened(simulator) as pipe:
        completion = await whole(pipe, metadata={})

    message = completion["choices"][0]["message"]
    usage = upstream_usage(reply, simulator.posts[0].body) or {}
    assert completion["object"] == "chat.completion"
    assert message["content"] == "Hello."
    assert message["reasoning_content"] == "I look."
    assert completion["usage"].items() >= usage.items()
    assert completion["usage"]["prompt_tokens"] == usage["input_tokens"]
    assert [item["type"] for item in completion["output"]] == ["reasoning", "message"]


async def test_an_answer_in_one_piece_shows_sources_beside_the_chat(
    simulator: Simulator,
) -> None:
    simulator.script(scenario("H9", "repeated"))
    shown = Shown()
    async with opened(simulator) as pipe:
        completion = await whole(pipe, shown=shown)

    assert completion["choices"][0]["message"]["content"] == FJORDS
    assert shown.sources == ["https://example.com/fjords"]


@pytest.mark.parametrize(
    ("name", "variant", "status"),
    [
        ("F13", "401", 401),
        ("F3", "default", 402),
        ("F10", "moderation", 403),
        ("F11", "plain", 404),
        ("F13", "413", 413),
        ("F7", "long", 429),
        ("F9", "504", 504),
        ("F22", "eof", 502),
    ],
)
async def test_e2_an_api_client_gets_the_status_of_the_failure(
    simulator: Simulator, name: str, variant: str, status: int
) -> None:
    simulator.script(scenario(name, variant))
    async with opened(simulator) as pipe:
        response = await whole(pipe, metadata={})

    lines = [line async for line in response.body_iterator]
    error = plugin.parse_json("".join(lines))["error"]
    assert response.status_code == error["code"] == status
    assert response.media_type == "application/json"
    assert error["message"]
    assert error["type"]


async def test_a_failure_in_one_piece_keeps_the_text_in_a_chat(
    simulator: Simulator,
) -> None:
    simulator.script(scenario("F16"))
    async with opened(simulator) as pipe:
        completion = await whole(pipe)

    assert completion["choices"][0]["message"]["content"] == "Hello."
    assert PROVIDER in completion["error"]["message"]


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_b12_a_task_that_fails_is_an_error_and_no_title(
    simulator: Simulator, is_streamed: bool
) -> None:
    simulator.script(scenario("F9", "504"))
    async with opened(simulator) as pipe:
        asked = {**body(), "stream": is_streamed}
        reply = await answer(pipe, asked, task="title_generation")
        if is_streamed:
            *_, reply = [event async for event in reply]

    assert set(reply) == {"error"}
    assert TIMEOUT in reply["error"]["message"]


async def test_b12_a_task_asks_for_little(simulator: Simulator) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    async with opened(simulator, TASK_MODEL_REASONING_EFFORT="minimal") as pipe:
        asked = body("Hello", "openai/o3", tools=[tool], reasoning_effort="high")
        reply = await whole(
            pipe,
            {**asked, "plugins": [{"id": "web"}], "tool_choice": "auto"},
            task="title_generation",
        )

    sent = simulator.posts[0].body
    assert reply["choices"][0]["message"]["content"]
    assert not sent.keys() & {"tools", "plugins", "tool_choice"}
    assert sent["reasoning"]["effort"] == "low"
    assert sent["max_output_tokens"] <= 8192


# What is left out ----------------------------------------------------------------------


async def test_what_cannot_be_sent_is_said(simulator: Simulator) -> None:
    asked = body()
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    asked["messages"] = [
        {"role": "user", "content": [{"type": "text", "text": "Look"}, picture]}
    ]
    asked["model"] = "pipe.mistralai/mistral-7b-instruct"
    async with opened(simulator) as pipe:
        shown = await ask(pipe, asked)

    assert any("image" in line for line in shown.lines)
    assert shown.text
    assert not shown.cards


async def test_an_empty_chat_is_refused_before_any_request(
    simulator: Simulator,
) -> None:
    async with opened(simulator) as pipe:
        shown = await ask(pipe, {**body(), "messages": []})

    assert "no message to send" in shown.cards[0]
    assert not simulator.posts


async def test_a_defect_of_ours_is_a_card_with_an_id(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    class Broken(dict[str, Any]):
        def get(self, *_: Any) -> Any:
            raise RuntimeError("broken on purpose")

    asked = body()
    async with opened(simulator) as pipe:
        shown = await ask(pipe, {**asked, "messages": [Broken(role="user")]})

    (card,) = shown.cards
    mark = card.partition("(")[2].partition(")")[0]
    assert mark.startswith("defect_")
    assert mark in caplog.text
    assert "broken on purpose" not in card


# Many at once --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 50])
async def test_concurrent_chats_do_not_mix(simulator: Simulator, count: int) -> None:
    def told(number: int) -> str:
        return f"[{number}]" * 40

    for number in range(count):
        simulator.script(
            replies.text(told(number), 20, delay=0.005),
            when=lambda entry, mark=f"chat {number}": entry.last_user_text == mark,
        )
    async with opened(simulator) as pipe:
        shown = await asyncio.gather(
            *(
                ask(
                    pipe,
                    body(f"chat {number}"),
                    metadata={"chat_id": f"chat-{number}", "message_id": "m"},
                )
                for number in range(count)
            )
        )

    assert [each.text for each in shown] == [told(n) for n in range(count)]
    sessions = {
        (post.last_user_text, post.body["session_id"]) for post in simulator.posts
    }
    assert sessions == {(f"chat {n}", f"chat-{n}") for n in range(count)}
    ids = [item["id"] for each in shown for item in each.output]
    assert len(set(ids)) == count


async def test_one_failure_touches_no_other_chat(simulator: Simulator) -> None:
    simulator.script(
        scenario("F22", "reset", delay=0.05),
        when=lambda entry: entry.last_user_text == "unlucky",
    )
    simulator.script(
        replies.text("Fine.", 5, delay=0.1),
        when=lambda entry: entry.last_user_text == "lucky",
    )
    async with opened(simulator) as pipe:
        lucky, unlucky = await asyncio.gather(
            ask(pipe, body("lucky")), ask(pipe, body("unlucky"))
        )

    assert (lucky.text, lucky.cards) == ("Fine.", [])
    assert LOST in unlucky.cards[0]


async def test_g1_fifty_chats_one_after_another_share_connections(
    simulator: Simulator,
) -> None:
    async with opened(simulator, STREAM_INTERVAL_MS=0) as pipe:
        for _ in range(50):
            await ask(pipe, body("Hello"))

    assert len(simulator.posts) == 50
    assert len({entry.connection for entry in simulator.ledger}) <= 2


async def test_a_connection_whose_last_bytes_come_late_serves_again(
    simulator: Simulator,
) -> None:
    def late(stage: Any) -> Iterator[Step]:
        yield from replies.completed()(stage)
        yield Raw(b": the end is near\n\n", 0.05)

    simulator.script(replies.text("Hello.", terminal=late).times(5))
    async with opened(simulator) as pipe:
        for _ in range(5):
            await ask(pipe, body("Hello"))
            await asyncio.sleep(0.15)

    assert len({entry.connection for entry in simulator.posts}) == 1


# Stop ----------------------------------------------------------------------------------


async def test_stop_closes_the_upstream_connection(simulator: Simulator) -> None:
    simulator.script(replies.text("a" * 300, 300, delay=0.1))
    async with opened(simulator) as pipe:
        events = await answer(pipe)
        seen = [await anext(events) for _ in range(3)]
        await events.aclose()

        assert await hung_up(simulator)
    assert seen


async def test_a_cancelled_task_closes_the_upstream_connection(
    simulator: Simulator,
) -> None:
    simulator.script(replies.text("a" * 300, 300, delay=0.1))
    async with opened(simulator) as pipe:
        task = asyncio.create_task(ask(pipe))
        await posted(simulator)
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert await hung_up(simulator)


async def test_a_turn_cancelled_before_the_headers_leaves_no_request(
    simulator: Simulator,
) -> None:
    simulator.script(replies.text("Hello.", wait=30))
    async with opened(simulator) as pipe:
        task = asyncio.create_task(ask(pipe))
        await posted(simulator)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        assert await hung_up(simulator)


# Calls ---------------------------------------------------------------------------------


async def test_d5_the_tools_of_an_api_client_are_its_own_to_run(
    simulator: Simulator,
) -> None:
    oslo = Call("get_weather", {"city": "Oslo"}, "call_1")
    simulator.script(replies.tool_calls([oslo, Call("get_time", "", "call_2")]))
    tool = {"type": "function", "function": {"name": "get_weather"}}
    async with opened(simulator) as pipe:
        shown = await ask_api(pipe, body("Hi", tools=[tool]))

    calls = [call for run in shown.chunked("tool_calls") for call in run]
    assert [(c["index"], c["id"], c["function"]) for c in calls] == [
        (0, "call_1", {"name": "get_weather", "arguments": '{"city": "Oslo"}'}),
        (1, "call_2", {"name": "get_time", "arguments": "{}"}),
    ]
    assert shown.finishes == ["tool_calls"]
    assert len(simulator.posts) == 1


async def test_a_call_id_that_the_history_has_gets_another(
    simulator: Simulator,
) -> None:
    simulator.script(replies.tool_calls([Call("get_time", "", "call_0")]))
    asked = body()
    call = {"id": "call_0", "type": "function", "function": {"name": "get_time"}}
    asked["messages"] += [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "content": "noon"},
        {"role": "user", "content": "Again"},
    ]
    async with opened(simulator) as pipe:
        shown = await ask(pipe, asked, metadata=HANDED_OVER)

    (item,) = shown.items("function_call")
    assert item["call_id"] not in ("", "call_0")
