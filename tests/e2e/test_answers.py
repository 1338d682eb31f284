"""What Open WebUI shows and stores, read back as after a reload."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from tests.server import Account, Chat
from tests.simulator import Simulator, replies, scenario
from tests.simulator.media import png

MODEL = "openrouter.openai/gpt-5-mini"
PAINTER = "openrouter.google/gemini-2.5-flash-image"
FJORDS, BOATS = "https://example.com/fjords", "https://example.org/boats"
CITED = "Fjords are deep [1]. Boats like them [2], since they are deep [1]."
SOURCES = (
    replies.url_citation(FJORDS, "Fjords", 0, 20),
    replies.url_citation(BOATS, "Boats", 21, 41),
    replies.url_citation(FJORDS, "Fjords", 42, 67),
)
SUMMED = ("input_tokens", "output_tokens", "total_tokens", "cost")


def billed(simulator: Simulator) -> list[dict[str, Any]]:
    """Return what the simulator charged, one entry per generation."""
    return list(simulator.backend.generations.values())


def addresses(chat: Chat) -> list[str]:
    return [source["source"]["url"] for source in chat.sources]


# Usage --------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("face", ["auto", "chunks"])
def test_i1_the_saved_usage_is_upstreams_once(
    face: str,
    stream: bool,
    admin: Account,
    simulator: Simulator,
    valves: dict[str, Any],
) -> None:
    admin.set_valves("openrouter", {**valves, "STREAM_FORMAT": face})

    chat = admin.chat(MODEL, "Hello", params={"stream_response": stream})

    [bill] = billed(simulator)
    assert chat.usage["input_tokens"] == bill["tokens_prompt"]
    assert chat.usage["output_tokens"] == bill["tokens_completion"]
    assert chat.usage["cost"] == pytest.approx(bill["usage"], rel=1e-9)
    assert chat.usage["cost"] > 0
    assert chat.usage["output_tokens_details"] == {
        "reasoning_tokens": bill["native_tokens_reasoning"]
    }


def test_i1_two_turns_have_a_usage_each(admin: Account, simulator: Simulator) -> None:
    first = admin.chat(MODEL, "One")
    second = admin.chat(MODEL, "Two", after=first)

    stored = [admin.read_chat(first.id, each.message_id) for each in (first, second)]
    costs = [chat.usage["cost"] for chat in stored]
    assert costs == pytest.approx([bill["usage"] for bill in billed(simulator)])
    assert costs[1] > costs[0]


@pytest.mark.parametrize("name", ["cached", "byok", "free", "scientific"])
def test_every_figure_of_the_usage_is_kept(
    name: str, admin: Account, simulator: Simulator
) -> None:
    simulator.script(scenario("H13", name))

    usage = admin.chat(MODEL, "Hello").usage

    expected = {
        "cached": {"input_tokens": 2048},
        "byok": {"is_byok": True, "cost": 0.0001},
        "free": {"cost": 0},
        "scientific": {"cost": 1.3e-05},
    }[name]
    assert {key: usage[key] for key in expected} == expected
    if name == "cached":
        assert usage["input_tokens_details"]["cached_tokens"] == 1024


# A reload shows the same ---------------------------------------------------------------


def test_a_reload_shows_what_was_shown(admin: Account, simulator: Simulator) -> None:
    simulator.script(
        replies.compose(
            replies.thought("I look."),
            replies.message("Some words.", annotations=SOURCES),
            replies.picture(replies.png_base64()),
        )
    )

    with admin.listen() as tab:
        chat = admin.chat(MODEL, "Hello", session_id=tab.sid)
        tab.wait(lambda seen: bool(seen.data and "done" in seen.data))
        last = next(s for s in reversed(tab.of(chat)) if s.type == "chat:completion")
        shown = [seen.data for seen in tab.of(chat, "source")]
        files = tab.of(chat, "chat:message:files")[-1].data["files"]
    later = admin.read_chat(chat.id)

    assert later.message == chat.message
    assert last.data["output"] == later.output
    assert [each["source"] for each in shown] == [s["source"] for s in later.sources]
    assert [file["url"] for file in files] == [file["url"] for file in later.files]
    assert later.text == "Some words."


def test_the_stored_answer_has_nothing_opaque(
    admin: Account, simulator: Simulator
) -> None:
    simulator.script(replies.reasoning("I look.", "Words."))

    chat = admin.chat(MODEL, "Hello")

    stored = json.dumps(admin.call("GET", f"/api/v1/chats/{chat.id}"))
    for word in ("encrypted_content", "signature", "gAAAA", "gen-", "_tmp_"):
        assert word not in stored


# Sources ------------------------------------------------------------------------------


@pytest.mark.parametrize("announce", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_c7_two_citations_one_repeated_are_two_sources(
    stream: bool, announce: bool, admin: Account, simulator: Simulator
) -> None:
    simulator.script(replies.citations(CITED, SOURCES, announce=announce))

    chat = admin.chat(MODEL, "Hello", params={"stream_response": stream})

    assert addresses(chat) == [FJORDS, BOATS]
    # The page links [n] to the n-th different `metadata.source`.
    marked = [meta["source"] for each in chat.sources for meta in each["metadata"]]
    assert marked == [FJORDS, BOATS]
    assert [each["source"]["name"] for each in chat.sources] == ["Fjords", "Boats"]
    assert chat.text == CITED


def test_c7_sources_of_the_last_event_alone_are_shown(
    admin: Account, simulator: Simulator
) -> None:
    simulator.script(scenario("H9", "completed-only"))

    chat = admin.chat(MODEL, "Hello")

    assert addresses(chat) == [FJORDS, BOATS]


def test_a_search_is_shown_with_its_query(admin: Account, simulator: Simulator) -> None:
    simulator.script(scenario("H9", "native"))

    chat = admin.chat(MODEL, "Hello")

    [search] = chat.items("web_search_call")
    assert search["action"]["query"] == "fjords"
    assert search["status"] == "completed"


# Images -------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "variant", ["base64", "data_url", "partials", "caption", "completed-only"]
)
def test_an_image_becomes_a_file_of_the_user(
    variant: str, stream: bool, admin: Account, simulator: Simulator
) -> None:
    simulator.script(scenario("H10", variant))

    chat = admin.chat(PAINTER, "Draw", params={"stream_response": stream})

    [file] = chat.files
    assert file["type"] == "image"
    assert file["url"].startswith("/api/v1/files/")
    assert admin.download(file["url"]) == png()
    owner = admin.call("GET", file["url"].removesuffix("/content"))["user_id"]
    assert owner == admin.id
    assert chat.text == ("A sun over hills." if variant == "caption" else "")
    assert not chat.card
    stored = json.dumps(admin.call("GET", f"/api/v1/chats/{chat.id}"))
    assert base64.b64encode(png()).decode()[:60] not in stored


def test_an_image_never_passes_the_socket_as_base64(
    admin: Account, simulator: Simulator
) -> None:
    simulator.script(scenario("H10", "partials"))

    with admin.listen() as tab:
        chat = admin.chat(PAINTER, "Draw", session_id=tab.sid)
        tab.wait(lambda seen: bool(seen.data and "done" in seen.data))
        seen = json.dumps([each.data for each in tab.of(chat)])

    assert chat.files[0]["url"] in seen
    assert "base64" not in seen
    assert base64.b64encode(png()).decode()[:60] not in seen


def test_an_image_at_an_address_is_shown_from_there(
    admin: Account, simulator: Simulator
) -> None:
    simulator.script(scenario("H10", "url"))

    chat = admin.chat(PAINTER, "Draw")

    assert [file["url"] for file in chat.files] == ["https://example.com/picture.png"]


# Without streaming --------------------------------------------------------------------


def test_a_chat_that_does_not_stream_is_stored_alike(
    admin: Account, simulator: Simulator
) -> None:
    reply = replies.reasoning("I look.", "The answer.")
    simulator.script(reply, reply)

    streamed, whole = (
        admin.chat(MODEL, "Hello", params={"stream_response": stream})
        for stream in (True, False)
    )

    assert whole.text == streamed.text == "The answer."
    own = {"id": "", "duration": 0, "reasoning_details": None}  # each chat's own
    shapes = [
        [{**item, **own, "marked": "reasoning_details" in item} for item in chat.output]
        for chat in (streamed, whole)
    ]
    assert shapes[0] == shapes[1]
    assert [whole.usage[key] for key in SUMMED] == pytest.approx(
        [streamed.usage[key] for key in SUMMED]
    )


@pytest.mark.parametrize("name", ["F13", "F16"])
def test_a_chat_that_does_not_stream_has_cards_too(
    name: str, admin: Account, simulator: Simulator
) -> None:
    simulator.script(scenario(name))

    chat = admin.chat(MODEL, "Hello", params={"stream_response": False})

    said = {"F13": "User not found", "F16": "Provider disconnected"}[name]
    assert said in chat.card
    assert chat.text == ("" if name == "F13" else "Hello.")
    assert len(simulator.posts) == 1


# Tools --------------------------------------------------------------------------------


def test_two_rounds_of_the_hosts_own_tools_end_in_an_answer(
    admin: Account, simulator: Simulator, valves: dict[str, Any]
) -> None:
    admin.set_valves("openrouter", {**valves, "TOOL_EXECUTION": "open_webui"})
    simulator.script(
        replies.tool_calls([("get_current_timestamp", {})], say="Let me look."),
        replies.tool_calls([("calculate_timestamp", {"days_ago": 1})]),
        replies.text("It was Saturday."),
    )

    chat = admin.chat(MODEL, "Which day was yesterday?")

    assert not chat.card
    assert [item["type"] for item in chat.output] == [
        "message",
        "function_call",
        "function_call_output",
        "function_call",
        "function_call_output",
        "message",
    ]
    assert chat.text.endswith("It was Saturday.")
    results = [item["output"][0]["text"] for item in chat.items("function_call_output")]
    assert "current_timestamp" in results[0]
    assert "calculated_timestamp" in results[1]
    bills = billed(simulator)
    assert len(bills) == 3
    assert chat.usage["cost"] == pytest.approx(sum(bill["usage"] for bill in bills))
    for key, name in (
        ("input_tokens", "tokens_prompt"),
        ("output_tokens", "tokens_completion"),
    ):
        assert chat.usage[key] == sum(bill[name] for bill in bills)


def test_rounds_go_upstream_one_after_the_other(
    admin: Account, simulator: Simulator, valves: dict[str, Any]
) -> None:
    admin.set_valves("openrouter", {**valves, "TOOL_EXECUTION": "open_webui"})
    both = ["get_current_timestamp", "calculate_timestamp"]
    simulator.script(
        replies.tool_calls([("get_current_timestamp", {})]),
        replies.tool_calls([(name, {}) for name in both]),
        replies.text("Now."),
    )

    first = admin.chat(MODEL, "What time is it?")
    admin.chat(MODEL, "And now?", after=first)

    for post in simulator.posts[2:4]:
        kinds = [item["type"].removeprefix("function_") for item in post.items]
        assert kinds[:7] == [
            "message",
            "call",
            "call_output",
            "call",
            "call",
            "call_output",
            "call_output",
        ]
    ids = [post.items[1:3] for post in simulator.posts[1:4]]
    assert ids[0] == ids[1] == ids[2]
    tools = [post.body["tools"] for post in simulator.posts]
    assert tools[0] == tools[1] == tools[2] == tools[3]
