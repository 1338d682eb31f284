"""03 Errors: what can go wrong, and the words for it."""

from __future__ import annotations

from collections.abc import Iterator
from email.utils import formatdate
from typing import Any

import pytest

from open_webui_openrouter_pipe import open_webui_openrouter_pipe as plugin

NOW = 1_790_000_000.0


def kinds(base: type[plugin.PipeError] = plugin.PipeError) -> Iterator[Any]:
    """Yield every kind of error."""
    for kind in base.__subclasses__():
        yield kind
        yield from kinds(kind)


# The tree ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(kinds()))
def test_every_error_says_what_happened_and_what_to_do(kind: Any) -> None:
    text = plugin.render_error(kind())

    assert kind.happened.endswith(".")
    assert kind.advice.endswith(".")
    assert text == f"{kind.happened} {kind.advice}"
    assert 400 <= kind.status < 600
    assert kind.code.isidentifier()


def test_no_two_leaves_read_alike() -> None:
    leaves = [kind for kind in set(kinds()) if not kind.__subclasses__()]
    texts = [plugin.render_error(kind()) for kind in leaves]

    assert len(set(texts)) == len(texts) > 15


# Failures as OpenRouter words them -----------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code", "message", "error_type"),
    [
        ({"error": {"code": 502, "message": "Down"}}, "502", "Down", ""),
        ({"error": {"code": "server_error", "message": "x"}}, "server_error", "x", ""),
        ({"error": {"message": "x"}}, "", "x", ""),
        ({"error": {"code": None, "message": "x"}}, "", "x", ""),
        ({"error": "Just words"}, "", "Just words", ""),
        ({"type": "error", "code": 429, "message": "Slow"}, "429", "Slow", ""),
        (
            {"error": {"message": "x", "metadata": {"error_type": "timeout"}}},
            "",
            "x",
            "timeout",
        ),
        ({"error": {"message": "x", "error_type": "server"}}, "", "x", "server"),
        ({"error": {"message": "x"}, "error_type": "server"}, "", "x", "server"),
        ({"error": {"message": "x"}, "metadata": {"raw": "Words"}}, "", "Words", ""),
        (
            {
                "error": {
                    "message": "no",
                    "metadata": {"provider_name": "Google", "raw": "Busy"},
                }
            },
            "",
            "Google: Busy",
            "",
        ),
        (
            {
                "error": {
                    "message": "Provider returned error",
                    "metadata": {
                        "provider_name": "Anthropic",
                        "raw": '{"type":"error","error":{"message":"Bad signature"}}',
                    },
                }
            },
            "",
            "Anthropic: Bad signature",
            "",
        ),
        (
            {"error": {"message": "no", "metadata": {"raw": '{"message":"Inner"}'}}},
            "",
            "Inner",
            "",
        ),
        ({"error": {"message": "no", "metadata": {"raw": "[1]"}}}, "", "no", ""),
        (
            {
                "error": {
                    "message": "Flagged",
                    "metadata": {"reasons": ["violence", "hate"]},
                }
            },
            "",
            "Flagged (violence, hate)",
            "",
        ),
    ],
)
def test_a_failure_is_found_in_every_shape(
    body: Any, code: str, message: str, error_type: str
) -> None:
    fault = plugin.parse_fault(body)

    assert fault is not None
    assert (fault.code, fault.message, fault.error_type) == (code, message, error_type)


@pytest.mark.parametrize(
    "body",
    [None, [], "x", {}, {"error": None}, {"error": {}}, {"error": ""}, {"id": 1}],
)
def test_what_is_no_failure_is_none(body: Any) -> None:
    assert plugin.parse_fault(body) is None


@pytest.mark.parametrize(
    "metadata", ["x", None, [], {"raw": 7}, {"reasons": "x"}, {"provider_name": []}]
)
def test_nonsense_beside_a_failure_does_no_harm(metadata: Any) -> None:
    fault = plugin.parse_fault({"error": {"message": "Words", "metadata": metadata}})

    assert fault is not None
    assert fault.message == "Words"


def fault(code: str = "", message: str = "", **more: Any) -> plugin.Fault:
    """Build a failure of which only some is known."""
    return plugin.Fault(code, message, **more)


@pytest.mark.parametrize(
    ("status", "given", "kind"),
    [
        (400, None, plugin.Rejected),
        (400, fault(code="400"), plugin.Rejected),
        (400, fault(error_type="context_length_exceeded"), plugin.TooLong),
        (400, fault(message="the maximum context length is 8192"), plugin.TooLong),
        (401, None, plugin.BadKey),
        (402, None, plugin.NoCredit),
        (402, fault(limit="openrouter_key_limit"), plugin.NoCredit),
        (402, fault(limit="openrouter_in_flight_budget"), plugin.BudgetInFlight),
        (403, None, plugin.Forbidden),
        (404, None, plugin.NoEndpoint),
        (408, None, plugin.RequestTimeout),
        (413, None, plugin.TooLarge),
        (418, None, plugin.Rejected),
        (422, None, plugin.Rejected),
        (429, None, plugin.RateLimited),
        (500, None, plugin.ProviderFailed),
        (502, fault(code="502"), plugin.ProviderFailed),
        (503, None, plugin.ProviderFailed),
        (504, None, plugin.UpstreamTimeout),
        (520, None, plugin.UpstreamTimeout),
        (524, None, plugin.UpstreamTimeout),
        (529, None, plugin.ProviderFailed),
        (0, None, plugin.ProviderFailed),
        (0, fault(code="server_error"), plugin.ProviderFailed),
        (0, fault(code="429"), plugin.RateLimited),
        (0, fault(code="rate_limit_exceeded"), plugin.RateLimited),
        (0, fault(code="invalid_prompt"), plugin.Rejected),
        (0, fault(code="unheard_of"), plugin.ProviderFailed),
        (0, fault(code="99999"), plugin.ProviderFailed),
        (200, fault(code="402"), plugin.NoCredit),
        (0, fault(code="server_error", error_type="timeout"), plugin.UpstreamTimeout),
    ],
)
def test_a_status_or_a_word_gives_the_error(status: int, given: Any, kind: Any) -> None:
    assert type(plugin.classify(status, given)) is kind


RETRYABLE = {
    plugin.BudgetInFlight,
    plugin.RequestTimeout,
    plugin.RateLimited,
    plugin.ProviderFailed,
    plugin.ConnectFailed,
}


@pytest.mark.parametrize("kind", list(dict.fromkeys(kinds())))
def test_only_what_was_surely_not_started_may_be_sent_again(kind: Any) -> None:
    assert kind.retryable is any(issubclass(kind, each) for each in RETRYABLE)


def test_the_wait_in_the_header_wins_over_the_one_in_the_body() -> None:
    given = fault(retry_after=7.0)

    assert plugin.classify(503, given).retry_after == 7
    assert plugin.classify(503, given, 2.0).retry_after == 2
    assert plugin.classify(503, given, 0.0).retry_after == 0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "5"}, 5),
        ({"Retry-After": " 0.5 "}, 0.5),
        ({"Retry-After": "-3"}, 0),
        ({"Retry-After": formatdate(NOW + 90, usegmt=True)}, 90),
        ({"Retry-After": formatdate(NOW - 90, usegmt=True)}, 0),
        ({"Retry-After": "soon"}, None),
        ({"X-RateLimit-Reset": str(int(NOW + 30) * 1000)}, 30),
        ({"X-RateLimit-Reset": "soon"}, None),
        ({"Retry-After": "2", "X-RateLimit-Reset": str(int(NOW + 30) * 1000)}, 2),
        ({"Retry-After": "soon", "X-RateLimit-Reset": str(int(NOW + 9) * 1000)}, 9),
    ],
)
def test_the_wait_is_read_in_every_form(headers: Any, seconds: float | None) -> None:
    assert plugin.parse_retry_after(headers, NOW) == seconds


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e400", "9" * 400, "NaN"])
@pytest.mark.parametrize("header", ["Retry-After", "X-RateLimit-Reset"])
def test_a_wait_without_end_is_no_wait(header: str, text: str) -> None:
    assert plugin.parse_retry_after({header: text}, NOW) is None


# Cards ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("Plain words", "Plain words"),
        ("Two\n  lines ", "Two lines"),
        ("<!DOCTYPE html><html><body>x</body></html>", ""),
        ("key sk-or-v1-0123456789abcdef refused", "key sk-… refused"),
        ("a" * 600, "a" * 600),
        ("a" * 601, "a" * 600 + "…"),
        ("", ""),
    ],
)
def test_somebody_elses_words_are_short_and_harmless(words: str, shown: str) -> None:
    assert plugin.presentable(words) == shown


LIMITED, EMPTY = plugin.RateLimited, plugin.NoAnswer
CARDS = {
    LIMITED("Google: busy.", retry_after=600): f"""
        The rate limit for this model is reached (Google: busy).
        It can be tried again in 10 minutes.
        {LIMITED.advice}
    """,
    LIMITED(retry_after=0.2): f"{LIMITED.happened} {LIMITED.advice}",
    EMPTY("Really?"): f"The model returned no answer (Really?). {EMPTY.advice}",
}


@pytest.mark.parametrize(("error", "text"), CARDS.items())
def test_a_card_says_what_whose_words_when_and_what_to_do(
    error: plugin.PipeError, text: str
) -> None:
    assert plugin.render_error(error) == " ".join(text.split())
