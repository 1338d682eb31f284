"""What reaches OpenRouter."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server import Account
from tests.simulator import Simulator, replies
from tests.simulator.ledger import Entry

MODEL = "openrouter.openai/gpt-5-mini"
OTHER = "openrouter.anthropic/claude-sonnet-4.5"
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "city",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def said(entry: Entry) -> list[tuple[str, Any]]:
    """Return the role and content of each message in a request."""
    messages = [item for item in entry.items if item["type"] == "message"]
    return [(item["role"], item["content"]) for item in messages]


# One message --------------------------------------------------------------------------


def test_b1_one_message_is_one_post(admin: Account, simulator: Simulator) -> None:
    chat = admin.chat(MODEL, "Hello")

    [post] = simulator.posts
    assert post.body["model"] == "openai/gpt-5-mini"
    assert post.body["stream"] is True
    assert post.body["store"] is False
    assert post.body["include"] == ["reasoning.encrypted_content"]
    assert post.items == [{"type": "message", "role": "user", "content": "Hello"}]
    assert post.headers["Authorization"] == f"Bearer {simulator.api_key}"
    assert post.finished
    assert chat.text


def test_b1_a_temporary_chat_is_one_post_and_goes_on(
    admin: Account, simulator: Simulator
) -> None:
    with admin.listen() as tab:
        first = admin.chat(MODEL, "One", temporary=True, listener=tab)
        second = admin.chat(MODEL, "Two", temporary=True, listener=tab, after=first)

    answer = first.items("message")[0]["content"][0]["text"]
    assert said(simulator.posts[1]) == [
        ("user", "One"),
        ("assistant", answer),
        ("user", "Two"),
    ]
    assert second.text
    assert len(simulator.posts) == 2


def test_nothing_of_the_host_goes_upstream(
    admin: Account, simulator: Simulator
) -> None:
    chat = admin.chat(MODEL, "Hello", params={"stream_response": True})

    [post] = simulator.posts
    sent = post.raw.decode() + str(dict(post.headers))
    assert admin.id not in sent
    assert admin.info["email"] not in sent
    assert chat.message_id not in sent
    known = {"model", "input", "stream", "store", "include", "reasoning", "tools"}
    assert set(post.body) - known <= {"session_id", "prompt_cache_key"}


# History ------------------------------------------------------------------------------


def test_b2_an_edited_answer_is_what_goes_upstream(
    admin: Account, simulator: Simulator
) -> None:
    system = [{"role": "system", "content": "You are terse."}]
    simulator.script(replies.reasoning("Hm.", "The first answer."))
    first = admin.chat(MODEL, "One", messages=system)
    edited = admin.edit_message(first, first.message_id, "What I made of it.")

    admin.chat(MODEL, "Two", after=edited, messages=system)

    assert [post.body["instructions"] for post in simulator.posts] == [
        "You are terse.",
        "You are terse.",
    ]
    assert said(simulator.posts[1]) == [
        ("user", "One"),
        ("assistant", "What I made of it."),
        ("user", "Two"),
    ]
    assert "The first answer" not in simulator.posts[1].raw.decode()


def test_b2_an_edited_question_is_what_goes_upstream(
    admin: Account, simulator: Simulator
) -> None:
    first = admin.chat(MODEL, "One")
    edited = admin.edit_message(first, first.user_message_id, "Won")

    admin.regenerate(edited)

    assert said(simulator.posts[1]) == [("user", "Won")]


def test_an_answer_is_continued_behind_its_beginning(
    admin: Account, simulator: Simulator
) -> None:
    simulator.script(replies.text("Once upon"), replies.text(" a time."))

    first = admin.chat(MODEL, "Tell me")
    second = admin.continue_answer(first)

    assert said(simulator.posts[1])[:2] == [
        ("user", "Tell me"),
        ("assistant", "Once upon"),
    ]
    assert second.message_id == first.message_id
    assert second.text.startswith("Once upon")
    assert second.text.endswith("a time.")


@pytest.mark.parametrize("model", [MODEL, OTHER])
def test_c9_the_next_turn_carries_the_words_and_nothing_else(
    model: str, admin: Account, simulator: Simulator
) -> None:
    simulator.script(replies.reasoning("A deep thought.", "Forty-two."))
    first = admin.chat(MODEL, "The question")
    second = admin.chat(model, "And now?", after=first)

    assert first.text == "Forty-two."
    assert first.message["content"] == "Forty-two."  # what is copied and spoken
    stored = json.dumps(admin.call("GET", f"/api/v1/chats/{first.id}"))
    assert "gAAAA" not in stored  # how encrypted reasoning begins
    assert not second.card
    assert said(simulator.posts[1]) == [
        ("user", "The question"),
        ("assistant", "Forty-two."),
        ("user", "And now?"),
    ]
    if model == OTHER:
        types = {item["type"] for item in simulator.posts[1].items}
        assert types == {"message"}
        assert "openrouter_pipe" not in simulator.posts[1].raw.decode()
        assert "gAAAA" not in simulator.posts[1].raw.decode()


# Parameters ---------------------------------------------------------------------------


def check_parameters(post: Entry) -> None:
    body = post.body
    assert (body["temperature"], body["top_p"]) == (0.3, 0.9)
    assert body["max_output_tokens"] == 77
    assert body["reasoning"]["effort"] == "low"
    expected = {"type": "json_schema", **SCHEMA["json_schema"]}  # type: ignore[dict-item]
    assert body["text"] == {"format": expected}
    left = {"max_tokens", "reasoning_effort", "response_format"}
    assert not left & set(body)


def test_b3_the_parameters_of_a_chat_are_translated(
    admin: Account, simulator: Simulator
) -> None:
    chat = admin.chat(
        MODEL,
        "Hello",
        params={
            "temperature": 0.3,
            "top_p": 0.9,
            "max_tokens": 77,
            "reasoning_effort": "low",
            "custom_params": {"response_format": json.dumps(SCHEMA)},
        },
    )

    assert not chat.card
    check_parameters(simulator.posts[0])


def test_b3_the_parameters_of_a_client_are_translated(
    admin: Account, simulator: Simulator
) -> None:
    answer = admin.api_chat(
        MODEL,
        "Hello",
        temperature=0.3,
        top_p=0.9,
        max_tokens=77,
        reasoning_effort="low",
        response_format=SCHEMA,
    )

    assert answer.status == 200
    check_parameters(simulator.posts[0])


# Models -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "typed",
    [
        "openai/gpt-4o:free",
        "openai/gpt-4o:nitro",
        "openai/gpt-4o@preset/support",
        "@preset/support",
        "~anthropic/claude-sonnet-latest",
    ],
)
def test_b5_variants_presets_and_aliases_go_upstream_as_typed(
    typed: str, admin: Account, simulator: Simulator, valves: dict[str, Any]
) -> None:
    admin.set_valves("openrouter", {**valves, "MODEL_ID": typed})

    chat = admin.chat(f"openrouter.{typed}", "Hello")

    assert simulator.posts[0].body["model"] == typed
    assert chat.text
    assert not chat.card


def test_a_model_that_is_gone_gets_a_card_with_the_nearest_names(
    admin: Account, simulator: Simulator, valves: dict[str, Any]
) -> None:
    before = simulator.backend.catalog.rows
    assert "openrouter.openai/gpt-4o-mini" in admin.models()
    simulator.set_models(row for row in before if row["id"] != "openai/gpt-4o-mini")
    try:
        # Another name of the same place: its list is read anew, the host's is not.
        address = valves["BASE_URL"].replace("127.0.0.1", "localhost")
        admin.call(
            "POST",
            "/api/v1/functions/id/openrouter/valves/update",
            {**valves, "BASE_URL": address},
        )
        chat = admin.chat("openrouter.openai/gpt-4o-mini", "Hello")
        answer = admin.api_chat("openrouter.openai/gpt-4o-mini", "Hello")
    finally:
        simulator.set_models(before)

    assert "no such model" in chat.card
    assert "did you mean" in chat.card
    assert "openai/gpt-4o" in chat.card
    assert answer.status == 404
    assert answer.body["error"]["type"] == "model_not_found"
    assert simulator.posts == []


# Nothing to send ----------------------------------------------------------------------


NOTHING: list[Any] = [
    [],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": []}],
    [{"role": "user"}],
    [{"role": "assistant", "content": None}],
    [{"role": "tool", "content": "4 degrees", "tool_call_id": "call_nobody"}],
]


@pytest.mark.parametrize("messages", NOTHING, ids=json.dumps)
def test_no_message_is_refused_with_a_reason(
    messages: Any, admin: Account, simulator: Simulator
) -> None:
    answer = admin.api_chat(MODEL, messages)

    assert answer.status == 400
    assert "Write a message" in answer.body["error"]["message"]
    assert simulator.posts == []


@pytest.mark.parametrize("messages", [None, [None], [{}]], ids=json.dumps)
def test_no_messages_at_all_are_refused_by_the_host(
    messages: Any, admin: Account, simulator: Simulator
) -> None:
    answer = admin.api_chat(MODEL, messages)

    assert answer.status == 400
    assert simulator.posts == []


def test_empty_messages_among_others_do_not_matter(
    admin: Account, simulator: Simulator
) -> None:
    messages = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Two"},
    ]

    answer = admin.api_chat(MODEL, messages)

    assert answer.status == 200
    assert said(simulator.posts[0]) == [("user", "One"), ("user", "Two")]
