"""Titles, tags, follow-ups and queries, which Open WebUI asks for by itself."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server import Account
from tests.simulator import Simulator, replies, scenario
from tests.simulator.ledger import Entry
from tests.simulator.replies import AnyReply

MODEL = "openrouter.openai/gpt-5-mini"
TASKS = {
    "title_generation": True,
    "tags_generation": True,
    "follow_up_generation": True,
}


def is_task(entry: Entry) -> bool:
    return entry.last_user_text.startswith("### Task:")


def tasks(simulator: Simulator) -> list[Entry]:
    """Return the requests of tasks, after the chat has all that it wanted."""
    return [post for post in simulator.posts if is_task(post)]


def tags(admin: Account, chat_id: str) -> list[str]:
    return [tag["name"] for tag in admin.call("GET", f"/api/v1/chats/{chat_id}/tags")]


def check_modest(post: Entry) -> None:
    """Check that a task costs little: no tools, no plugins, little thought, an end."""
    assert not {"tools", "tool_choice", "plugins"} & set(post.body)
    assert post.body["reasoning"] == {"effort": "low"}
    assert post.body["max_output_tokens"] <= 4096
    assert post.finished


def test_b12_a_new_chat_gets_its_title_tags_and_follow_ups(
    admin: Account, simulator: Simulator
) -> None:
    # The parameters of a model's row reach its tasks too; those of a chat do not.
    extras = {"plugins": [{"id": "web"}], "tools": [{"type": "openrouter:datetime"}]}
    params = {
        "reasoning_effort": "high",
        "custom_params": {key: json.dumps(value) for key, value in extras.items()},
    }
    admin.save_model("busy", base_model_id=MODEL, params=params)
    admin.models()
    try:
        chat = admin.chat("busy", "Hello there", background_tasks=TASKS)
    finally:
        admin.call("POST", "/api/v1/models/model/delete", {"id": "busy"})

    assert admin.read_chat(chat.id).title == "🚣 A Chat with the Simulator"
    assert tags(admin, chat.id) == ["General", "Simulation"]
    assert chat.message["followUps"] == [
        "And then?",
        "Why is that so?",
        "Show me a table",
    ]
    assert chat.text
    assert len(tasks(simulator)) == 3
    for post in tasks(simulator):
        check_modest(post)
    [turn] = [post for post in simulator.posts if not is_task(post)]
    assert turn.body["reasoning"]["effort"] == "high"
    assert turn.body["plugins"] == [{"id": "web"}]
    assert turn.body["tools"]


def test_the_effort_of_tasks_is_a_valve(
    admin: Account, simulator: Simulator, valves: dict[str, Any]
) -> None:
    wanted = {**valves, "TASK_MODEL_REASONING_EFFORT": "minimal"}
    admin.set_valves("openrouter", wanted)

    admin.chat(MODEL, "Hello", background_tasks={"title_generation": True})

    [post] = tasks(simulator)
    assert post.body["reasoning"] == {"effort": "minimal"}


def test_a_file_is_searched_with_queries_of_the_model(
    admin: Account, simulator: Simulator
) -> None:
    file = admin.upload("fjord.txt", b"The fjord is deep.", "text/plain")

    chat = admin.chat(MODEL, "What does the file say?", files=[file])

    history = chat.message["statusHistory"]
    queries = [each["queries"] for each in history if "queries" in each]
    assert queries == [["fjords of Norway"]]
    [post] = tasks(simulator)[:1]
    check_modest(post)
    assert not chat.card


FAILING: dict[str, AnyReply] = {
    "500": scenario("F9", "500"),
    "html": scenario("F9", "524-html"),
    "cut": scenario("F22", "reset"),
    "no-answer": scenario("F26"),
    "thoughts-alone": scenario("F21"),
}


@pytest.mark.parametrize("name", FAILING)
def test_b12_a_failed_task_leaves_no_bogus_title(
    name: str, admin: Account, simulator: Simulator
) -> None:
    simulator.script(FAILING[name].forever(), when=is_task)

    with admin.listen() as tab:
        chat = admin.chat(
            MODEL, "My own words", background_tasks=TASKS, session_id=tab.sid
        )
        told = tab.of(kind="notification")

    # Without a title Open WebUI shows what the user wrote.
    assert admin.read_chat(chat.id).title in ("My own words", "New Chat")
    assert tags(admin, chat.id) == []
    assert not chat.message.get("followUps")
    assert chat.text
    assert not chat.card
    assert not told
    assert tasks(simulator)


def test_a_task_never_reaches_the_chats_page(
    admin: Account, simulator: Simulator
) -> None:
    simulator.script(replies.reasoning("I look.", '{"title": "Ours"}'), when=is_task)

    with admin.listen() as tab:
        chat = admin.chat(
            MODEL,
            "Hello",
            background_tasks={"title_generation": True},
            session_id=tab.sid,
        )
        tab.wait("chat:title")
        seen = json.dumps([each.data for each in tab.of(chat, "response.")])

    assert admin.read_chat(chat.id).title == "Ours"
    assert "Ours" not in seen
    assert "I look." not in seen
    [bill] = [
        bill
        for bill in simulator.backend.generations.values()
        if bill["usage"] == pytest.approx(chat.usage["cost"])
    ]
    assert bill["tokens_prompt"] == chat.usage["input_tokens"]
