"""12 Input: chat messages become Responses input."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_webui_openrouter_pipe import open_webui_openrouter_pipe as plugin
from tests.simulator.scene import default_catalog
from tests.simulator.validation import Rejection, judge

ANY = plugin.ModelCard("openai/gpt-4o", "Any")
TEXT_ONLY = plugin.ModelCard("a/b", "Text only", inputs=frozenset({"text"}))
PNG = "data:image/png;base64,aGk="


def says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    """Build a chat message."""
    return {"role": role, "content": content, **more}


def text(content: str) -> dict[str, Any]:
    """Build a text part of a chat message."""
    return {"type": "text", "text": content}


def item(role: str, content: Any) -> dict[str, Any]:
    """Build a message item."""
    return {"type": "message", "role": role, "content": content}


def read(content: str) -> dict[str, Any]:
    """Build a text part of an input item."""
    return {"type": "input_text", "text": content}


def called(*ids: str) -> dict[str, Any]:
    """Build an assistant message that calls."""
    function = {"name": "get", "arguments": "{}"}
    calls = [{"id": id_, "type": "function", "function": function} for id_ in ids]
    return says("assistant", "", tool_calls=calls)


def told(id_: str, content: Any = "noon") -> dict[str, Any]:
    """Build a tool message."""
    return says("tool", content, tool_call_id=id_)


def kinds(items: list[dict[str, Any]]) -> list[str]:
    """Say what items are, calls and outputs with their ids."""
    return [" ".join(filter(None, (i["type"], i.get("call_id")))) for i in items]


def accepted(items: list[dict[str, Any]]) -> bool:
    """Tell whether the simulated OpenRouter takes items as input."""
    body = {"model": "openai/gpt-4o", "input": items, "stream": True}
    verdict = judge(body, default_catalog())
    assert not isinstance(verdict, Rejection), verdict
    return True


# Messages ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "instructions", "items"),
    [
        ([says("user", "Hi")], "", [item("user", "Hi")]),
        (
            [says("system", "Be kind."), says("user", "Hi")],
            "Be kind.",
            [item("user", "Hi")],
        ),
        (
            [says("system", "One."), says("developer", "Two."), says("user", "Hi")],
            "One.\n\nTwo.",
            [item("user", "Hi")],
        ),
        (
            [says("system", [text("One."), text("Two.")]), says("user", "Hi")],
            "One.\nTwo.",
            [item("user", "Hi")],
        ),
        ([says("system", "Be kind.")], "", [item("system", "Be kind.")]),
        (
            [says("user", "Hi"), says("system", "Later.")],
            "",
            [item("user", "Hi"), item("system", "Later.")],
        ),
        (
            [says("user", "Hi"), says("assistant", "Hello."), says("user", "Again")],
            "",
            [item("user", "Hi"), item("assistant", "Hello."), item("user", "Again")],
        ),
        ([says("narrator", "Hi")], "", [item("user", "Hi")]),
        ([says(None, "Hi")], "", [item("user", "Hi")]),  # type: ignore[arg-type]
        ([says("user", None), says("user", "Hi")], "", [item("user", "Hi")]),
        ([says("user", [text("Hi"), text("")])], "", [item("user", [read("Hi")])]),
        ([says("assistant", [text("Hello.")])], "", [item("assistant", "Hello.")]),
        ([says("assistant", None), says("user", "Hi")], "", [item("user", "Hi")]),
        (["x", None, says("user", "Hi")], "", [item("user", "Hi")]),
    ],
)
def test_messages_become_items(
    messages: Any, instructions: str, items: list[dict[str, Any]]
) -> None:
    chat = plugin.build_input(messages, ANY)

    assert chat == (instructions, items, ())
    assert accepted(chat.items)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        {},
        [says("user", None)],
        [says("user", "")],
        [says("user", [])],
        [says("system", "")],
        [says("assistant", None)],
        [None],
    ],
)
def test_nothing_to_send_is_refused(messages: Any) -> None:
    with pytest.raises(plugin.BadInput):
        plugin.build_input(messages, ANY)


# Parts ---------------------------------------------------------------------------------


PARTS: list[tuple[Any, Any]] = [
    (text("Hi"), read("Hi")),
    ({"type": "input_text", "text": "Hi"}, read("Hi")),
    (
        {"type": "image_url", "image_url": {"url": PNG}},
        {"type": "input_image", "image_url": PNG, "detail": "auto"},
    ),
    (
        {"type": "image_url", "image_url": PNG},
        {"type": "input_image", "image_url": PNG, "detail": "auto"},
    ),
    (
        {
            "type": "image_url",
            "image_url": {"url": "https://a.example/b.png", "detail": "high"},
        },
        {
            "type": "input_image",
            "image_url": "https://a.example/b.png",
            "detail": "high",
        },
    ),
    (
        {"type": "image_url", "image_url": {"url": PNG, "detail": "enormous"}},
        {"type": "input_image", "image_url": PNG, "detail": "auto"},
    ),
    (
        {"type": "input_image", "image_url": PNG, "detail": "low"},
        {"type": "input_image", "image_url": PNG, "detail": "low"},
    ),
    (
        {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:a"}},
        {"type": "input_file", "filename": "a.pdf", "file_data": "data:a"},
    ),
    (
        {
            "type": "input_file",
            "file_url": "https://a.example/a.pdf",
            "file_data": None,
        },
        {"type": "input_file", "file_url": "https://a.example/a.pdf"},
    ),
    (
        {"type": "input_audio", "input_audio": {"data": "aGk=", "format": "mp3"}},
        {"type": "input_audio", "input_audio": {"data": "aGk=", "format": "mp3"}},
    ),
    (
        {
            "type": "input_audio",
            "input_audio": {"data": "data:audio/wav;base64,aGk=", "format": "wav"},
        },
        {"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}},
    ),
    (
        {"type": "video_url", "video_url": {"url": "https://a.example/b.mp4"}},
        {"type": "input_video", "video_url": "https://a.example/b.mp4"},
    ),
]


@pytest.mark.parametrize(("part", "expected"), PARTS)
def test_parts_are_translated(part: Any, expected: Any) -> None:
    chat = plugin.build_input([says("user", [part])], ANY)

    assert chat.items == [item("user", [expected])]
    assert chat.notes == ()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "/api/v1/files/1/content"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url"},
        {"type": "file", "file": {"filename": "a.pdf"}},
        {"type": "input_audio", "input_audio": {"data": "aGk=", "format": "flac"}},
        {"type": "input_audio", "input_audio": {"format": "mp3"}},
        {"type": "hologram", "hologram": {}},
        {"type": None},
        {},
        "text",
    ],
)
def test_a_part_that_cannot_be_sent_is_named(part: Any) -> None:
    chat = plugin.build_input([says("user", [text("Hi"), part])], ANY)

    assert chat.items == [item("user", [read("Hi")])]
    assert len(chat.notes) == 1
    assert "left out" in chat.notes[0]
    assert "passwd" not in chat.notes[0]


@pytest.mark.parametrize(
    ("part", "modality"),
    [
        ({"type": "image_url", "image_url": {"url": PNG}}, "image"),
        (
            {"type": "input_audio", "input_audio": {"data": "aGk=", "format": "mp3"}},
            "audio",
        ),
        (
            {"type": "video_url", "video_url": {"url": "https://a.example/b.mp4"}},
            "video",
        ),
    ],
)
def test_what_a_model_does_not_read_is_said_once(part: Any, modality: str) -> None:
    chat = plugin.build_input([says("user", [text("Hi"), part, part])], TEXT_ONLY)

    assert chat.items == [item("user", [read("Hi")])]
    assert chat.notes == (f"This model reads no {modality}; it was left out.",)


def test_a_file_goes_to_every_model() -> None:
    part = {"type": "file", "file": {"file_data": "data:application/pdf;base64,aGk="}}

    chat = plugin.build_input([says("user", [part])], TEXT_ONLY)

    assert chat.items[0]["content"][0]["type"] == "input_file"


# Calls and their results ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (
            [called("a"), told("a")],
            ["function_call a", "function_call_output a"],
        ),
        (
            [called("a", "b"), told("b"), told("a")],
            [
                "function_call a",
                "function_call b",
                "function_call_output a",
                "function_call_output b",
            ],
        ),
        (
            [called("a"), told("a"), called("b"), told("b"), says("assistant", "x")],
            [
                "function_call a",
                "function_call_output a",
                "function_call b",
                "function_call_output b",
                "message",
            ],
        ),
        ([called("a")], ["function_call a", "function_call_output a"]),
        (
            [called("a"), says("user", "Well?"), told("a")],
            ["function_call a", "function_call_output a", "message"],
        ),
        ([told("a"), says("user", "Hi")], ["message"]),
        (
            [called("a", "a"), told("a"), told("a")],
            ["function_call a", "function_call_output a"],
        ),
        (
            [called("a"), told("a"), called("a"), told("a")],
            ["function_call a", "function_call_output a"],
        ),
        ([called(""), told(""), says("user", "Hi")], ["message"]),
    ],
)
def test_each_call_has_one_output_behind_it(
    messages: list[Any], expected: list[str]
) -> None:
    chat = plugin.build_input([says("user", "Hi"), *messages], ANY)

    assert kinds(chat.items)[1:] == expected
    assert accepted(chat.items)


def test_a_call_without_a_result_says_so() -> None:
    chat = plugin.build_input([called("a")], ANY)

    assert chat.items[-1]["output"] == "No result was returned."


def test_text_beside_a_call_comes_before_it() -> None:
    message = {**called("a"), "content": "Let me look."}

    chat = plugin.build_input([message, told("a")], ANY)

    assert kinds(chat.items) == ["message", "function_call a", "function_call_output a"]


@pytest.mark.parametrize(
    ("arguments", "sent"),
    [
        *[("", "{}"), (None, "{}"), ('{"a": 1}', '{"a": 1}'), ({"a": 1}, '{"a": 1}')],
        *[('{"a": ', "{}"), ("[1]", "{}"), ("{'a': 1}", "{}"), (3, "{}")],
    ],
)
def test_arguments_are_sent_as_a_json_object(arguments: Any, sent: str) -> None:
    call = {"id": "a", "function": {"name": "get", "arguments": arguments}}

    chat = plugin.build_input([says("assistant", "", tool_calls=[call])], ANY)

    assert chat.items[0]["arguments"] == sent


@pytest.mark.parametrize(
    ("content", "output"),
    [
        ("noon", "noon"),
        ("", ""),
        (None, ""),
        ([text("noon")], [read("noon")]),
        (
            [{"type": "image_url", "image_url": {"url": PNG}}],
            [{"type": "input_image", "image_url": PNG, "detail": "auto"}],
        ),
    ],
)
def test_results_are_text_or_parts(content: Any, output: Any) -> None:
    chat = plugin.build_input([called("a"), told("a", content)], ANY)

    assert chat.items[-1]["output"] == output
    assert accepted(chat.items)


# Any conversation ----------------------------------------------------------------------


IDS = st.sampled_from(["a", "b", "c", "", None])
CONTENTS = st.one_of(
    st.none(),
    st.text(max_size=5),
    st.lists(
        st.one_of(
            st.sampled_from([part for part, _ in PARTS]),
            st.sampled_from([None, "x", {}, {"type": "hologram"}]),
        ),
        max_size=3,
    ),
)
CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "id": IDS,
            "function": st.fixed_dictionaries(
                {
                    "name": st.just("get"),
                    "arguments": st.sampled_from(["{}", "", {}, None]),
                }
            ),
        }
    ),
    max_size=3,
)
MESSAGES = st.lists(
    st.one_of(
        st.builds(
            says, st.sampled_from(["user", "system", "developer", "x"]), CONTENTS
        ),
        st.builds(lambda c, t: says("assistant", c, tool_calls=t), CONTENTS, CALLS),
        st.builds(lambda i, c: says("tool", c, tool_call_id=i), IDS, CONTENTS),
        st.sampled_from([None, "x", {}]),
    ),
    max_size=8,
)


@settings(max_examples=300, deadline=None)
@given(MESSAGES)
def test_every_conversation_gives_valid_input_or_is_refused(messages: Any) -> None:
    before = json.dumps(messages)
    try:
        chat = plugin.build_input(messages, ANY)
    except plugin.BadInput:
        return

    audible = [  # the simulator's gpt-4o hears and watches nothing
        i for i in chat.items if "audio" not in str(i) and "video" not in str(i)
    ]
    assert not audible or accepted(audible)
    assert json.dumps(messages) == before
