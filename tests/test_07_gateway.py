"""07 Gateway: bytes in, events out, over a real socket."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_webui_openrouter_pipe import open_webui_openrouter_pipe as plugin
from tests.simulator import FRAMINGS, Simulator, framing, replies, scenario
from tests.simulator.framing import framed, split_at
from tests.simulator.replies import Call
from tests.turns import ask, hung_up, opened

SEQUENCES: dict[str, tuple[Any, str]] = {
    "plain": (replies.text("Hello."), "Hello."),
    "unicode": (
        replies.text("Blåbær 🌧 \u2028 \u2029 \x85 end", 9),
        "Blåbær 🌧 \u2028 \u2029 \x85 end",
    ),
    "surrogates": (
        replies.text("", ["rain \ud83c", "\udf27 and ", "\ud83c alone"]),
        "rain 🌧 and \ufffd alone",
    ),
    "reasoning": (replies.reasoning("I look.\n\nI see.", "So."), "So."),
    "calls": (replies.tool_calls([Call("get", {"a": "å"})], say="Look:"), "Look:"),
    "searched": (scenario("H9", "several"), "Hello fjords and boats."),
    "failed": (scenario("F16"), "Hello."),
    "incomplete": (scenario("F19"), "Hello."),
}


def decoded(*chunks: bytes) -> list[bytes]:
    """Feed chunks to a decoder and return all payloads."""
    decoder = plugin.SSEDecoder()
    return [
        *(payload for chunk in chunks for payload in decoder.feed(chunk)),
        *decoder.end(),
    ]


def feed_all(decoder: plugin.SSEDecoder, chunks: list[bytes]) -> None:
    """Feed chunks one by one."""
    for chunk in chunks:
        decoder.feed(chunk)


def told(payloads: list[bytes]) -> str:
    """Return the text that a relay makes of payloads, which must reach an end."""
    relay, text = plugin.Relay(), ""
    for payload in payloads:
        event = plugin.parse_event(plugin.parse_json(payload))
        for output in relay.feed(event, 0.0) if event else ():
            if isinstance(output, plugin.Delta) and output.kind == "message":
                text += output.text
    assert relay.finished
    return text


# The decoder ---------------------------------------------------------------------------


CASES: dict[str, tuple[bytes, list[bytes]]] = {
    "one": (b"data: a\n\n", [b"a"]),
    "crlf": (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
    "cr": (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
    "mixed ends": (b"data: a\r\n\ndata: b\n\r\n", [b"a", b"b"]),
    "no space": (b"data:a\n\n", [b"a"]),
    "two spaces": (b"data:  a\n\n", [b" a"]),
    "two lines": (b"data: a\ndata: b\n\n", [b"a\nb"]),
    "comments": (b": x\n\n:\n\ndata: a\n: y\n\n", [b"a"]),
    "other fields": (b"event: e\nid: 1\ndata: a\nretry: 3\n\n", [b"a"]),
    "no final blank": (b"data: a\n\ndata: b", [b"a", b"b"]),
    "bom": (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
    "bom inside": (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [b"a"]),
    "empty data": (b"data:\n\n", [b""]),
    "no data": (b"event: e\n\n\n\n", []),
    "almost a field": (b"dat: a\ndatax: b\n data: c\n\n", []),
    "separators": (
        "data: \u2028\u2029\x85\x0b\x0c\n\n".encode(),
        ["\u2028\u2029\x85\x0b\x0c".encode()],
    ),
    "nothing": (b"", []),
    "half a bom": (b"\xef\xbb", []),
}


@pytest.mark.parametrize(("data", "payloads"), CASES.values(), ids=list(CASES))
class TestDecoder:
    """Each case whole, byte by byte, and split at every offset."""

    def test_whole(self, data: bytes, payloads: list[bytes]) -> None:
        assert decoded(data) == payloads

    def test_byte_by_byte(self, data: bytes, payloads: list[bytes]) -> None:
        assert decoded(*(data[n : n + 1] for n in range(len(data)))) == payloads

    def test_split_at_every_offset(self, data: bytes, payloads: list[bytes]) -> None:
        for offset in range(len(data) + 1):
            assert decoded(data[:offset], data[offset:]) == payloads, offset

    def test_with_empty_chunks_between(
        self, data: bytes, payloads: list[bytes]
    ) -> None:
        chunks = [part for n in range(len(data)) for part in (data[n : n + 1], b"")]
        assert decoded(*chunks) == payloads


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.sampled_from("da:t \r\n\ufeffx"), max_size=40),
    st.lists(st.integers(0, 60), max_size=6),
)
def test_where_bytes_are_cut_makes_no_difference(text: str, cuts: list[int]) -> None:
    data = text.encode()
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    chunks = [data[a:b] for a, b in pairwise(places)]

    assert decoded(*chunks) == decoded(data)


@pytest.mark.parametrize("framed_as", FRAMINGS)
@pytest.mark.parametrize("sequence", SEQUENCES)
def test_every_framing_gives_the_same_text(sequence: str, framed_as: str) -> None:
    reply, text = SEQUENCES[sequence]
    chunks = [chunk for _, chunk in replies.chunks(framing(reply, framed_as))]

    assert told(decoded(*chunks)) == text


@pytest.mark.parametrize("sequence", ["unicode", "surrogates"])
def test_every_split_of_a_stream_gives_the_same_text(sequence: str) -> None:
    reply, text = SEQUENCES[sequence]
    data = replies.body(reply)
    expected = decoded(data)

    assert told(expected) == text
    for offset in range(1, len(data)):
        assert decoded(data[:offset], data[offset:]) == expected


def test_an_event_over_the_limit_is_a_lost_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugin, "_EVENT_LIMIT", 1000)
    decoder = plugin.SSEDecoder()

    assert decoder.feed(b"data: " + b"a" * 900 + b"\n\n") == [b"a" * 900]
    with pytest.raises(plugin.ConnectionLost, match="larger than"):
        feed_all(decoder, [b"b" * 100] * 20)


def test_what_came_with_an_event_over_the_limit_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugin, "_EVENT_LIMIT", 1000)
    decoder = plugin.SSEDecoder()

    assert decoder.feed(b"data: a\n\ndata: " + b"b" * 2000) == [b"a"]
    with pytest.raises(plugin.ConnectionLost, match="larger than"):
        decoder.feed(b"b")


def test_many_data_lines_are_under_the_limit_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugin, "_EVENT_LIMIT", 1000)
    decoder = plugin.SSEDecoder()

    with pytest.raises(plugin.ConnectionLost, match="larger than"):
        feed_all(decoder, [b"data: " + b"a" * 90 + b"\n"] * 100)


# Over HTTP -----------------------------------------------------------------------------


@pytest.mark.parametrize("framed_as", FRAMINGS)
async def test_c4_every_framing_is_read_over_http(
    simulator: Simulator, framed_as: str
) -> None:
    reply, text = SEQUENCES["surrogates"]
    simulator.script(framing(reply, framed_as))
    async with opened(simulator, STREAM_INTERVAL_MS=0) as pipe:
        shown = await ask(pipe)

    assert (shown.text, shown.cards) == (text, [])
    assert len(shown.usages) == 1


async def test_a_stream_cut_inside_a_character_is_read(simulator: Simulator) -> None:
    reply = replies.text("Blåbær")
    data = replies.body(reply)
    simulator.script(framed(reply, split_at(data.index("å".encode()) + 1)))
    async with opened(simulator) as pipe:
        shown = await ask(pipe)

    assert shown.text == "Blåbær"


async def test_one_large_event_is_read(simulator: Simulator) -> None:
    text = "word " * 800_000
    simulator.script(replies.text(text, 1))
    async with opened(simulator) as pipe:
        shown = await ask(pipe)

    assert shown.text == text


async def test_an_event_over_the_limit_is_a_card(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "_EVENT_LIMIT", 100_000)
    simulator.script(replies.text("", ["Hello.", "a" * 3_000_000]))
    async with opened(simulator) as pipe:
        shown = await ask(pipe)

    assert shown.text == "Hello."
    assert "connection to OpenRouter was lost" in shown.cards[0]


async def test_b1_what_is_posted(simulator: Simulator) -> None:
    async with opened(simulator) as pipe:
        await ask(pipe)

    (post,) = simulator.posts
    assert post.headers["Authorization"] == f"Bearer {simulator.api_key}"
    assert post.headers["Accept-Encoding"] == "identity"
    assert post.headers["Content-Type"].startswith("application/json")
    assert post.headers["HTTP-Referer"].startswith("https://")
    assert post.body["stream"] is True
    assert post.body["store"] is False
    assert post.body["include"] == ["reasoning.encrypted_content"]
    assert post.body["model"] == "openai/gpt-4o"


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("", "No usable OpenRouter key"),
        ("sk-or-v1-ключ", "characters that no key has"),
        ("sk-or\nv1", "characters that no key has"),
    ],
)
def test_a_key_that_cannot_be_one_is_refused(
    key: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    valves = plugin.ConnectionValves.model_validate({"API_KEY": key})

    with pytest.raises(plugin.NotConfigured) as caught:
        plugin.api_key(valves)
    assert words in plugin.render_error(caught.value)


# Answers that are no stream ------------------------------------------------------------


def response(**more: Any) -> Any:
    """Build a whole response object."""
    content = [{"type": "output_text", "text": "Hello."}]
    item = {"type": "message", "role": "assistant", "content": content}
    whole = {"object": "response", "status": "completed", "output": [item]}
    return {**whole, "usage": {"input_tokens": 1, "cost": 0.5}, **more}


@pytest.mark.parametrize(
    ("reply", "text", "card"),
    [
        (replies.json_body(response()), "Hello.", ""),
        (
            replies.raw_body(b"\n   \n" + json.dumps(response()).encode()),
            "Hello.",
            "",
        ),
        (
            replies.json_body(
                response(
                    status="incomplete",
                    incomplete_details={"reason": "max_output_tokens"},
                )
            ),
            "Hello.",
            "length limit",
        ),
        (
            replies.json_body(
                response(
                    status="failed", error={"code": "server_error", "message": "x"}
                )
            ),
            "Hello.",
            "provider failed (x)",
        ),
        (replies.json_body({"data": []}).forever(), "", "could not be understood"),
        (
            replies.raw_body(b"<html>Sign in</html>", "text/html").forever(),
            "",
            "could not be understood",
        ),
    ],
)
async def test_an_answer_that_is_no_stream_is_read(
    simulator: Simulator, reply: Any, text: str, card: str
) -> None:
    simulator.script(reply)
    async with opened(simulator) as pipe:
        shown = await ask(pipe)

    assert shown.text == text
    assert len(shown.cards) == bool(card)
    assert card in "".join(shown.cards)
    assert "<html" not in str(shown)


async def test_a_redirect_does_not_carry_the_key_elsewhere(
    simulator: Simulator,
) -> None:
    with Simulator() as other:
        reply = replies.http_error(
            307, "moved", headers={"Location": f"{other.base_url}/responses"}
        )
        simulator.script(reply.forever())
        async with opened(simulator) as pipe:
            shown = await ask(pipe)

        assert not [e for e in other.ledger if "Authorization" in e.headers]
    assert len(shown.cards) == 1


# Time ----------------------------------------------------------------------------------


async def test_comments_are_no_sign_of_life(simulator: Simulator) -> None:
    simulator.script(scenario("F23", "comments", interval=0.05))
    async with opened(simulator, HTTP_STREAM_IDLE_SECONDS=0.5) as pipe:
        shown = await asyncio.wait_for(ask(pipe), 10)

    assert shown.text == "Hello."
    assert "HTTP_STREAM_IDLE_SECONDS" in shown.cards[0]
    assert await hung_up(simulator)


async def test_a_slow_stream_is_alive_as_long_as_events_come(
    simulator: Simulator,
) -> None:
    simulator.script(replies.text("a" * 10, 10, delay=0.2))
    async with opened(simulator, HTTP_STREAM_IDLE_SECONDS=1) as pipe:
        shown = await ask(pipe)

    assert (shown.text, shown.cards) == ("a" * 10, [])


async def test_no_total_limit_is_no_limit(simulator: Simulator) -> None:
    async with opened(simulator, HTTP_TOTAL_TIMEOUT_SECONDS=0) as pipe:
        shown = await ask(pipe)

    assert shown.text
    assert not shown.cards
