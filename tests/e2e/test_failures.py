"""What a person sees when something fails, and how often OpenRouter is asked."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

from tests.server import Account, Chat, OpenWebUI
from tests.simulator import Simulator, replies, scenario
from tests.simulator.ledger import Entry
from tests.simulator.replies import AnyReply

MODEL = "openrouter.openai/gpt-5-mini"
ADVICE = re.compile(
    r"\b(add|ask|change|check|choose|raise|regenerate|remove|set|shorten|try|wait)\b"
)


class Case(NamedTuple):
    """A failure, the words its card must have, and how often we ask."""

    replies: Sequence[AnyReply]
    words: Sequence[str]
    posts: int = 1
    text: str = ""
    is_paid: bool = False


class Outcome(NamedTuple):
    """How a chat went: stored, in the ledger, and when its card was seen."""

    chat: Chat
    posts: list[Entry]
    seen_at: float


def once(reply: AnyReply, *words: str, **facts: Any) -> Case:
    """Return a case that fails for good: what is retried would fail again."""
    return Case([reply.forever()], words, **facts)


def in_stream(reply: AnyReply, *words: str, **facts: Any) -> Case:
    return once(reply, *words, text="Hello.", **facts)


BEFORE: dict[str, Case] = {
    "400-length": once(scenario("F1"), "longer than this model", "8192"),
    "401": once(scenario("F13", "401"), "refused the API key", "User not found"),
    "402": once(scenario("F3"), "not enough credit", "openrouter.ai/credits"),
    "402-key": once(scenario("F5"), "not enough credit", "spending limit"),
    "403": once(scenario("F10"), "refused this content", "violence"),
    "404": once(scenario("F11"), "No provider on OpenRouter", "data policy"),
    "413": once(scenario("F13", "413"), "larger than OpenRouter accepts"),
    "429": once(scenario("F7", "no-header"), "rate limit", "rate-limited", posts=3),
    "500": once(scenario("F9", "500"), "provider failed", posts=3),
    "502": once(scenario("F9", "502"), "provider failed", "OpenAI", posts=3),
    "503": once(scenario("F9", "503-plain"), "provider failed", posts=3),
    "524-html": once(scenario("F9", "524-html"), "took too long"),
    "429-long": once(scenario("F7", "long"), "rate limit", "10 minutes"),
    "200-error": once(
        scenario("F14", "error"), "provider failed", "Provider returned error", posts=3
    ),
    "200-failed": once(
        scenario("F14", "failed"), "provider failed", "Provider disconnected", posts=3
    ),
    "200-empty": once(scenario("F14", "empty"), "no answer"),
    "first-event": once(scenario("F15"), "Provider disconnected", posts=3),
    "first-failed": once(scenario("F15", "failed"), "Provider disconnected", posts=3),
    "no-answer": once(scenario("F26"), "no answer", is_paid=True),
    "no-json": once(replies.raw_body(b"", "text/plain"), "provider failed", posts=3),
}
LOST = ("connection", "lost", "may be incomplete")
DISCONNECTED = ("provider failed", "Provider disconnected")
AFTER: dict[str, Case] = {
    "F16": in_stream(scenario("F16"), *DISCONNECTED, is_paid=True),
    "F16-number": in_stream(scenario("F16", code=502), *DISCONNECTED, is_paid=True),
    "F16-slow": in_stream(scenario("F16", delay=0.1), *DISCONNECTED, is_paid=True),
    "F17": in_stream(scenario("F17"), *DISCONNECTED),
    "F17-no-done": in_stream(scenario("F17", "no-done"), *DISCONNECTED),
    "F17-slow": in_stream(scenario("F17", delay=0.1), *DISCONNECTED),
    "F18-nested": in_stream(scenario("F18", "nested"), *DISCONNECTED),
    "F18-response": in_stream(scenario("F18", "response.error"), *DISCONNECTED),
    "F18-untyped": in_stream(scenario("F18", "untyped"), "Rate limit exceeded"),
    "F18-slow": in_stream(scenario("F18", delay=0.1), *DISCONNECTED),
    "F19": in_stream(scenario("F19"), "length limit", "max_tokens", is_paid=True),
    "F20": in_stream(scenario("F20"), "content filter", is_paid=True),
    "F22-eof": in_stream(scenario("F22", "eof"), *LOST),
    "F22-reset": in_stream(scenario("F22", "reset"), *LOST),
    "F22-abrupt": in_stream(scenario("F22", "abrupt"), *LOST),
    "F22-done": in_stream(scenario("F22", "done"), *LOST),
    "F22-mid-line": in_stream(scenario("F22", "mid-line"), *LOST),
    "F22-slow": in_stream(scenario("F22", "reset", delay=0.1), *LOST),
}
RECOVERS = replies.text("Here at last.")
WAITS: dict[str, Case] = {
    "429-seconds": Case(
        [scenario("F7", "seconds").times(2), RECOVERS], (), 3, "Here at last."
    ),
    "402-in-flight": Case([scenario("F6"), RECOVERS], (), 2, "Here at last."),
    "reset-first": Case([scenario("F25"), RECOVERS], LOST[:2]),
}
CASES = BEFORE | AFTER | WAITS


@pytest.fixture(scope="module")
def outcomes(installed: OpenWebUI, openrouter: Simulator) -> dict[str, Outcome]:
    """Let every chat fail in its own way, all at once."""
    openrouter.reset()
    for name, case in CASES.items():
        openrouter.script(
            *case.replies, when=lambda entry, n=name: entry.last_user_text == n
        )
    with installed.admin.listen() as tab:
        chats = installed.admin.chats_at_once(MODEL, CASES, session_id=tab.sid)
        time.sleep(0.5)  # the last event may come a little after the end
        ends = {
            seen.message_id: seen.at
            for seen in tab.events
            if seen.type == "chat:completion" and "done" in seen.data
        }
    posts = {
        name: [post for post in openrouter.posts if post.last_user_text == name]
        for name in CASES
    }
    return {
        name: Outcome(chat, posts[name], ends.get(chat.message_id, math.inf))
        for name, chat in chats.items()
    }


def check_card(case: Case, outcome: Outcome) -> None:
    """Check that a card says what happened and what to do, and nothing private."""
    card = outcome.chat.card
    for word in case.words:
        assert word in card
    assert ADVICE.search(card.lower())
    for secret in ("<", "user_sim", "user_id", "sk-or", "Traceback", "{"):
        assert secret not in card
    assert len(card) < 700
    assert outcome.chat.message["done"]


@pytest.mark.parametrize("name", BEFORE)
def test_e1_a_failure_before_any_output_is_a_card(
    name: str, outcomes: dict[str, Outcome]
) -> None:
    case, outcome = BEFORE[name], outcomes[name]

    check_card(case, outcome)
    assert outcome.chat.text == ""
    assert len(outcome.posts) == case.posts
    assert len({post.raw for post in outcome.posts}) == 1
    # Each wait before another try is allowed: 0.5 s, then 1 s.
    assert outcome.seen_at - (outcome.posts[-1].ended or 0) <= 2
    assert ("cost" in outcome.chat.usage) == case.is_paid


def test_e3_a_rate_limit_is_waited_out(outcomes: dict[str, Outcome]) -> None:
    chat, posts, _ = outcomes["429-seconds"]

    assert len(posts) == 3
    assert len({post.raw for post in posts}) == 1
    assert posts[-1].at - posts[0].at >= 2
    assert chat.text == "Here at last."
    assert not chat.card
    assert sum("1 second" in status for status in chat.statuses) == 2


def test_e3_a_date_is_waited_for_too(admin: Account, simulator: Simulator) -> None:
    simulator.script(scenario("F7", "http-date", seconds=3), RECOVERS)

    chat = admin.chat(MODEL, "Hello")

    first, second = simulator.posts
    assert 0.9 <= second.at - first.at <= 5  # a date has whole seconds
    assert chat.text == "Here at last."


def test_e3_a_budget_in_flight_is_waited_for(outcomes: dict[str, Outcome]) -> None:
    chat, posts, _ = outcomes["402-in-flight"]

    assert len(posts) == 2
    assert posts[1].at - posts[0].at >= 2
    assert chat.text == "Here at last."


def test_e4_a_long_limit_is_not_waited_for(outcomes: dict[str, Outcome]) -> None:
    chat, posts, seen_at = outcomes["429-long"]

    assert "10 minutes" in chat.card
    assert len(posts) == 1
    assert seen_at - (posts[0].ended or 0) <= 2


@pytest.mark.parametrize("name", AFTER)
def test_e5_to_e7_a_failure_after_text_keeps_the_text(
    name: str, outcomes: dict[str, Outcome]
) -> None:
    case, outcome = AFTER[name], outcomes[name]

    check_card(case, outcome)
    assert outcome.chat.text == "Hello."
    assert len(outcome.posts) == 1
    assert ("cost" in outcome.chat.usage) == case.is_paid
    if case.is_paid:
        assert outcome.chat.usage["cost"] > 0
        assert outcome.chat.usage["output_tokens"] > 0


def test_e6_a_request_that_may_have_arrived_is_not_sent_again(
    outcomes: dict[str, Outcome],
) -> None:
    chat, posts, _ = outcomes["reset-first"]

    check_card(WAITS["reset-first"], outcomes["reset-first"])
    assert len(posts) == 1
    assert chat.text == ""


def test_e7_thoughts_that_used_everything_up_are_named(
    admin: Account, simulator: Simulator
) -> None:
    simulator.script(scenario("F21"))

    chat = admin.chat(MODEL, "Hello")

    assert "while thinking" in chat.card
    assert chat.items("reasoning")[0]["summary"][0]["text"]
    assert chat.usage["cost"] > 0
    assert len(simulator.posts) == 1


def test_the_turn_after_a_failure_is_a_good_one(
    admin: Account, simulator: Simulator
) -> None:
    simulator.script(scenario("F16"), scenario("F13"))

    cut = admin.chat(MODEL, "One")
    refused = admin.chat(MODEL, "Two", after=cut)
    good = admin.chat(MODEL, "Three", after=refused)

    assert good.text
    assert not good.card
    sent = [item["content"] for item in simulator.posts[-1].items]
    assert sent == ["One", "Hello.", "Two", "Three"]


# Limits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "variant", "text"),
    [("F23", "comments", "Hello."), ("F23", "silence", "Hello."), ("F24", None, "")],
)
def test_e11_silence_ends_with_a_card(
    name: str,
    variant: str | None,
    text: str,
    admin: Account,
    simulator: Simulator,
    valves: dict[str, Any],
) -> None:
    admin.set_valves("openrouter", {**valves, "HTTP_STREAM_IDLE_SECONDS": 1})
    options = {} if variant == "silence" else {"interval": 0.2}
    simulator.script(scenario(name, variant, **options))

    began = time.monotonic()
    chat = admin.chat(MODEL, "Hello", timeout_seconds=15)

    assert "silent for too long" in chat.card
    assert "HTTP_STREAM_IDLE_SECONDS" in chat.card
    assert chat.text == text
    assert 1 <= time.monotonic() - began <= 10
    assert len(simulator.posts) == 1
    simulator.wait_for(lambda entries: entries[-1].cut_by_client, 2)


def test_an_answer_that_takes_too_long_ends_with_a_card(
    admin: Account, simulator: Simulator, valves: dict[str, Any]
) -> None:
    admin.set_valves("openrouter", {**valves, "HTTP_TOTAL_TIMEOUT_SECONDS": 1})

    chat = admin.chat(MODEL, "bench deltas=100 delay_ms=100", timeout_seconds=15)

    assert "longer than this server allows" in chat.card
    assert chat.text.startswith("word0 ")
    assert len(simulator.posts) == 1


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("refused_url", "cannot be reached"),
        ("unresolvable_url", "cannot be reached"),
        ("tls_url", "cannot be reached"),
    ],
)
def test_a_place_that_cannot_be_reached_is_a_card(
    address: str,
    words: str,
    admin: Account,
    simulator: Simulator,
    valves: dict[str, Any],
) -> None:
    # The page's own request for the models would hide the model from the chat.
    body = {**valves, "BASE_URL": getattr(simulator, address)}
    admin.call("POST", "/api/v1/functions/id/openrouter/valves/update", body)

    chat = admin.chat(MODEL, "Hello", timeout_seconds=30)

    assert words in chat.card
    assert "BASE_URL" in chat.card
    assert simulator.posts == []
