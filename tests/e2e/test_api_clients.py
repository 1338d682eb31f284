"""Clients of Open WebUI's API: the official OpenAI library, unchanged."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from tests.server import Account, OpenWebUI
from tests.simulator import Simulator, replies, scenario

MODEL = "openrouter.openai/gpt-5-mini"
PAINTER = "openrouter.google/gemini-2.5-flash-image"
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
CLOCK: Any = {  # named like a tool of Open WebUI's own, which must not run
    "type": "function",
    "function": {
        "name": "get_current_timestamp",
        "description": "Tell the time.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
FAILURES: dict[str, tuple[Any, type[openai.APIStatusError], int, str]] = {
    "400": (scenario("F1"), openai.BadRequestError, 400, "context_length_exceeded"),
    "401": (scenario("F13", "401"), openai.AuthenticationError, 401, "authentication"),
    "402": (scenario("F3"), openai.APIStatusError, 402, "payment_required"),
    "403": (scenario("F10"), openai.PermissionDeniedError, 403, "forbidden"),
    "404": (scenario("F11"), openai.NotFoundError, 404, "no_endpoint"),
    "413": (scenario("F13", "413"), openai.APIStatusError, 413, "payload_too_large"),
    "429": (scenario("F7", "long"), openai.RateLimitError, 429, "rate_limit_exceeded"),
    "500": (scenario("F9", "500"), openai.InternalServerError, 502, "provider_error"),
    "502": (scenario("F9", "502"), openai.InternalServerError, 502, "provider_error"),
    "503": (
        scenario("F9", "503-plain"),
        openai.InternalServerError,
        502,
        "provider_error",
    ),
    "524-html": (
        scenario("F9", "524-html"),
        openai.InternalServerError,
        504,
        "timeout",
    ),
    "200-error": (
        scenario("F14", "error"),
        openai.InternalServerError,
        502,
        "provider_error",
    ),
    "after-text": (scenario("F16"), openai.InternalServerError, 502, "provider_error"),
    "cut": (scenario("F22"), openai.InternalServerError, 502, "connection_lost"),
}


@pytest.fixture(scope="module")
def client(installed: OpenWebUI) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{installed.url}/api/v1",
        api_key=installed.admin.token,
        max_retries=0,
        http_client=httpx.Client(trust_env=False, timeout=30),
    ) as client:
        yield client


def joined(chunks: list[ChatCompletionChunk]) -> str:
    deltas = [choice.delta.content for chunk in chunks for choice in chunk.choices]
    return "".join(filter(None, deltas))


# Answers ------------------------------------------------------------------------------


def test_c8_a_stream_is_chunks_and_usage_once(
    client: openai.OpenAI, simulator: Simulator
) -> None:
    simulator.script(replies.reasoning("I look.", "One two three four.", 2))

    with client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)

    assert joined(chunks) == "One two three four."
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk.model for chunk in chunks} == {MODEL}
    assert len({chunk.id for chunk in chunks}) == 1
    [usage] = [chunk.usage for chunk in chunks if chunk.usage]
    [bill] = simulator.backend.generations.values()
    assert usage.prompt_tokens == bill["tokens_prompt"]
    assert usage.completion_tokens == bill["tokens_completion"]
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.model_extra is not None
    assert usage.model_extra["cost"] == pytest.approx(bill["usage"])
    ends = [c.finish_reason for each in chunks for c in each.choices if c.finish_reason]
    assert ends == ["stop"]
    thoughts = [
        (choice.delta.model_extra or {}).get("reasoning_content") or ""
        for chunk in chunks
        for choice in chunk.choices
    ]
    assert "".join(thoughts) == "I look."


@pytest.mark.parametrize("path", ["/api/v1/chat/completions", "/api/chat/completions"])
def test_c8_the_bytes_of_a_stream_are_chunks_and_one_end(
    path: str, admin: Account, simulator: Simulator
) -> None:
    answer = admin.api_chat(MODEL, "Hello", stream=True, path=path)

    lines = [line for _, line in answer.lines]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert lines.count("data: [DONE]") == 1
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in answer.chunks)
    assert answer.text
    assert len(simulator.posts) == 1


def test_c8_the_librarys_own_stream_accumulates(
    client: openai.OpenAI, simulator: Simulator
) -> None:
    simulator.script(replies.citations("Fjords are deep."))

    with client.chat.completions.stream(model=MODEL, messages=HELLO) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()

    message = final.choices[0].message
    assert message.content == "Fjords are deep."
    assert [each.url_citation.title for each in message.annotations or []] == [
        "Fjords of Norway",
        "Boats",
    ]
    assert final.choices[0].finish_reason == "stop"


def test_an_answer_that_is_not_streamed_is_a_completion(
    client: openai.OpenAI, simulator: Simulator
) -> None:
    simulator.script(replies.citations("Fjords are deep."))

    answer = client.chat.completions.create(model=MODEL, messages=HELLO)

    message = answer.choices[0].message
    assert answer.object == "chat.completion"
    assert message.content == "Fjords are deep."
    assert [each.url_citation.url for each in message.annotations or []] == [
        "https://example.com/fjords",
        "https://example.org/boats",
    ]
    assert answer.choices[0].finish_reason == "stop"
    [bill] = simulator.backend.generations.values()
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == bill["tokens_prompt"]
    assert answer.usage.completion_tokens == bill["tokens_completion"]


def test_a_client_can_have_responses_events_instead(
    admin: Account, simulator: Simulator, valves: dict[str, Any]
) -> None:
    admin.set_valves("openrouter", {**valves, "STREAM_FORMAT": "responses"})
    simulator.script(replies.reasoning("I look.", "Words."))

    answer = admin.api_chat(MODEL, "Hello", stream=True)

    types = [event["type"] for event in answer.chunks]
    assert all(type_.startswith("response.") for type_ in types)
    assert types[0] == "response.output_item.added"
    assert types[-1] == "response.completed"
    assert answer.chunks[-1]["response"]["usage"]["cost"] > 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("name", "reason"), [("F19", "length"), ("F20", "content_filter")]
)
def test_an_early_end_is_the_finish_reason(
    name: str,
    reason: str,
    stream: bool,
    client: openai.OpenAI,
    simulator: Simulator,
) -> None:
    simulator.script(scenario(name))

    if stream:
        chunks = list(
            client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        )
        text = joined(chunks)
        ends = [c.finish_reason for each in chunks for c in each.choices]
        end = next(filter(None, ends))
    else:
        answer = client.chat.completions.create(model=MODEL, messages=HELLO)
        text = answer.choices[0].message.content or ""
        end = answer.choices[0].finish_reason

    assert text == "Hello."
    assert end == reason


def test_structured_output_is_parsed_by_the_library(
    client: openai.OpenAI, simulator: Simulator
) -> None:
    simulator.script(replies.text('{"city": "Oslo"}'))
    schema: Any = {
        "type": "json_schema",
        "json_schema": {"name": "city", "schema": {"type": "object"}, "strict": True},
    }

    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, response_format=schema
    )

    assert json.loads(answer.choices[0].message.content or "") == {"city": "Oslo"}
    assert simulator.posts[0].body["text"]["format"]["name"] == "city"


def test_an_empty_answer_still_has_its_price(
    client: openai.OpenAI, simulator: Simulator
) -> None:
    simulator.script(scenario("F26"))

    answer = client.chat.completions.create(model=MODEL, messages=HELLO)

    assert not answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 0


def test_an_image_comes_as_a_data_url(
    client: openai.OpenAI, simulator: Simulator
) -> None:
    answer = client.chat.completions.create(
        model=PAINTER, messages=[{"role": "user", "content": "Draw an image"}]
    )

    [image] = (answer.choices[0].message.model_extra or {})["images"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert len(simulator.posts) == 1


def test_streamed_images_are_put_together_by_the_library(
    client: openai.OpenAI, simulator: Simulator
) -> None:
    picture = replies.picture(replies.png_base64())
    simulator.script(replies.compose(picture, picture))

    with client.chat.completions.stream(model=PAINTER, messages=HELLO) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()

    images = (final.choices[0].message.model_extra or {})["images"]
    assert len(images) == 2


# Tools --------------------------------------------------------------------------------


def check_call(post: Any) -> None:
    """Check that the client's tool alone was offered."""
    [tool] = post.body["tools"]
    assert tool["name"] == "get_current_timestamp"
    assert tool["parameters"]["required"] == ["city"]


def test_the_tools_of_a_client_are_its_own_to_run(
    client: openai.OpenAI, simulator: Simulator
) -> None:
    call = ("get_current_timestamp", {"city": "Oslo"})
    simulator.script(replies.tool_calls([call], say="Let me look."))

    answer = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[CLOCK])
    choice = answer.choices[0]
    [called] = choice.message.tool_calls or []
    simulator.script(replies.text("Noon."))
    later = client.chat.completions.create(
        model=MODEL,
        messages=[
            *HELLO,
            choice.message.model_dump(exclude_none=True),  # type: ignore[list-item]
            {"role": "tool", "tool_call_id": called.id, "content": "12:00"},
        ],
        tools=[CLOCK],
    )

    assert choice.finish_reason == "tool_calls"
    assert called.type == "function"
    assert called.function.name == "get_current_timestamp"
    assert json.loads(called.function.arguments) == {"city": "Oslo"}
    assert later.choices[0].message.content == "Noon."
    assert len(simulator.posts) == 2
    check_call(simulator.posts[0])
    kinds = [item["type"] for item in simulator.posts[1].items]
    assert kinds == ["message", "message", "function_call", "function_call_output"]
    assert simulator.posts[1].items[-1]["output"] == "12:00"


def test_streamed_tool_calls_are_put_together_by_the_library(
    client: openai.OpenAI, simulator: Simulator
) -> None:
    cities = ["Oslo", "Rome"]
    calls = [("get_current_timestamp", {"city": city}) for city in cities]
    simulator.script(replies.tool_calls(calls, interleaved=True))

    with client.chat.completions.stream(
        model=MODEL, messages=HELLO, tools=[CLOCK]
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()

    calls_made = final.choices[0].message.tool_calls or []
    arguments = [json.loads(each.function.arguments) for each in calls_made]
    assert sorted(each["city"] for each in arguments) == ["Oslo", "Rome"]
    assert len({each.id for each in calls_made}) == 2
    assert final.choices[0].finish_reason == "tool_calls"
    assert len(simulator.posts) == 1
    check_call(simulator.posts[0])


# Failures -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def errors(
    client: openai.OpenAI, openrouter: Simulator
) -> dict[str, openai.APIError | None]:
    """Let every request fail in its own way, all at once."""
    openrouter.reset()
    for name, (reply, *_) in FAILURES.items():
        openrouter.script(
            reply.forever(), when=lambda entry, n=name: entry.last_user_text == n
        )

    def ask(name: str) -> openai.APIError | None:
        try:
            client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": name}]
            )
        except openai.APIError as error:
            return error
        return None

    with ThreadPoolExecutor(len(FAILURES)) as pool:
        return dict(zip(FAILURES, pool.map(ask, FAILURES), strict=True))


@pytest.mark.parametrize("name", FAILURES)
def test_e2_a_failure_is_an_error_object_with_its_status(
    name: str, errors: dict[str, openai.APIError | None]
) -> None:
    _, kind, status, type_ = FAILURES[name]
    error = errors[name]

    assert isinstance(error, kind)
    assert error.status_code == status
    assert error.type == type_
    assert isinstance(error.body, dict)
    assert len(error.body["message"]) > 20
    assert "<" not in error.body["message"]
    assert "user_sim" not in error.body["message"]


@pytest.mark.parametrize("name", ["F13", "F16", "F22"])
def test_a_failing_stream_raises_and_keeps_what_came(
    name: str, client: openai.OpenAI, simulator: Simulator
) -> None:
    simulator.script(scenario(name))
    chunks: list[ChatCompletionChunk] = []

    stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    with pytest.raises(openai.APIError) as caught:
        chunks.extend(stream)

    expected = {
        "F13": ("", "User not found"),
        "F16": ("Hello.", "Provider disconnected"),
        "F22": ("Hello.", "connection"),
    }[name]
    assert joined(chunks) == expected[0]
    assert expected[1] in caught.value.message
    assert len(simulator.posts) == 1


def test_a_client_that_leaves_closes_the_connection_upstream(
    client: openai.OpenAI, simulator: Simulator
) -> None:
    messages: list[Any] = [{"role": "user", "content": "bench deltas=200 delay_ms=50"}]

    stream = client.chat.completions.create(model=MODEL, messages=messages, stream=True)
    first = list(itertools.islice(stream, 3))
    [post] = simulator.posts
    left_at = time.monotonic()
    stream.close()
    simulator.wait_for(lambda _: post.cut_by_client and post.ended, 3)

    assert joined(first).startswith("word0 ")
    assert (post.ended or 0) - left_at <= 1
