"""Markers, what is replayed, and the codec."""

from __future__ import annotations

import json
import os
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

JSON = dict[str, Any]
ULID_A = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
ULID_B = "01BX5ZZKBKACTAV9WEVGEMMVRZ"
SECRET = "a secret of the server"
NOW = 1_800_000_000.0


def reasoning(**fields: Any) -> JSON:
    item = {"type": "reasoning", "id": "rs_1", "summary": []}
    return {**item, "encrypted_content": "gAAAA.blob", **fields}


def artifact(plugin: ModuleType, item: JSON | None = None, **fields: Any) -> Any:
    facts = {"id": ULID_A, "user_id": "alice", "chat_id": "chat-1", "model": "a/b"}
    return plugin.Artifact(**{**facts, **fields}, item=item or reasoning())


def codec(plugin: ModuleType, listed: str = "", **options: Any) -> Any:
    return plugin.ArtifactCodec(plugin.artifact_keys(SECRET, listed), **options)


def assistant(*details: Any, **fields: Any) -> JSON:
    message = {"role": "assistant", "content": "", "reasoning_details": list(details)}
    return {**message, **fields}


def user(text: str = "Hello") -> JSON:
    return {"role": "user", "content": text}


# Markers ------------------------------------------------------------------------------


def test_a_marker_is_read_as_it_was_written(plugin: ModuleType) -> None:
    marker = plugin.Marker(ULID_A, "openai-responses-v1", 5, "call_1", ("commentary",))

    written = plugin.write_marker(marker)

    assert plugin.parse_markers(assistant(written)) == [marker]
    assert json.loads(json.dumps(written)) == written


def test_a_marker_says_no_more_than_it_must(plugin: ModuleType) -> None:
    written = plugin.write_marker(plugin.Marker(ULID_A))

    assert written == {"type": "openrouter_pipe.artifact", "id": ULID_A}


def test_no_hint_is_named_format_which_open_webui_judges(plugin: ModuleType) -> None:
    from open_webui.utils.misc import convert_output_to_messages

    written = plugin.write_marker(plugin.Marker(ULID_A, "anthropic-claude-v1"))
    shown = {"type": "reasoning", "summary": [], "reasoning_details": [written]}

    (message,) = convert_output_to_messages([shown], raw=True)

    assert message["reasoning_details"] == [written]


@pytest.mark.parametrize(
    "details",
    [
        None,
        "text",
        7,
        [None, 7, "text", []],
        {"type": "openrouter_pipe.artifact", "id": ULID_A},
        [{"type": "openrouter_pipe.artifact"}],
        [{"type": "openrouter_pipe.artifact", "id": None}],
        [{"type": "openrouter_pipe.artifact", "id": "../../etc/passwd"}],
        [{"type": "openrouter_pipe.artifact", "id": ULID_A.lower()}],
        [{"type": "openrouter_pipe.artifact", "id": f"{ULID_A}\n"}],
        [{"type": "openrouter_pipe.artifact", "id": "8" + ULID_A[1:]}],
        [{"type": "reasoning.encrypted", "id": ULID_A}],
    ],
)
def test_what_is_no_marker_is_passed_over(plugin: ModuleType, details: Any) -> None:
    assert plugin.parse_markers({"reasoning_details": details}) == []


def test_strange_markers_make_one_line_in_the_log(
    plugin: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    strange = [
        {"type": "openrouter_pipe.artifact", "id": str(n)} for n in range(10_000)
    ]

    messages = [assistant(*strange), user(), assistant(*strange), user()]
    card = plugin.ModelCard("a/b", "B")

    assert plugin.wanted_markers(messages, "conversation") == {}
    assert plugin.build_input(messages, card).items
    assert len(caplog.records) == 1


def test_ten_thousand_markers_are_cut_to_the_newest(
    plugin: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    from ulid import ULID

    ids = [str(ULID()) for _ in range(10_000)]
    details = [plugin.write_marker(plugin.Marker(id_)) for id_ in ids]

    wanted = plugin.wanted_markers([assistant(*details), user()], "conversation")

    assert list(wanted) == ids[-5000:]
    assert len(caplog.records) == 1


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda each: (
            st.lists(each)
            | st.dictionaries(
                st.sampled_from(
                    ["type", "id", "at", "of", "after", "phases", "role", "content"]
                ),
                each
                | st.sampled_from(
                    ["openrouter_pipe.artifact", ULID_A, "assistant", "user"]
                ),
            )
        ),
    )
)
def test_a_chat_edited_by_hand_raises_nothing(plugin: ModuleType, value: Any) -> None:
    messages = [
        assistant(value),
        {"role": "assistant", "content": value, "reasoning_details": value},
        {"role": "assistant", "content": "x", "tool_calls": value},
        user(),
    ]

    plugin.wanted_markers(messages, "conversation")
    plugin.wanted_markers(value, "conversation")
    card = plugin.ModelCard("a/b", "B")
    assert plugin.build_input(messages, card, {ULID_A: reasoning()}).items


def test_the_policy_decides_how_far_back_it_goes(plugin: ModuleType) -> None:
    a, b, third = (
        plugin.write_marker(plugin.Marker(each, "openai-responses-v1"))
        for each in (ULID_A, ULID_B, "01BX5ZZKBKACTAV9WEVGEMMVS0")
    )
    messages = [user(), assistant(a), user(), assistant(b), user(), assistant(third)]

    def ids(policy: str) -> dict[str, bool]:
        wanted = plugin.wanted_markers(messages, policy)
        assert all(each.in_reach for each in wanted.values())
        return {id_: each.in_loop for id_, each in wanted.items()}

    assert ids("conversation") == {ULID_A: False, ULID_B: False, third["id"]: True}
    assert ids("next_reply") == {ULID_B: False, third["id"]: True}
    assert ids("disabled") == {}


def test_the_policy_is_about_reasoning_alone(plugin: ModuleType) -> None:
    hosted = plugin.write_marker(plugin.Marker(ULID_A))
    messages = [user(), assistant(hosted), user(), assistant(), user()]

    for policy in ("disabled", "next_reply"):
        assert plugin.wanted_markers(messages, policy) == {ULID_A: (False, False)}


# Replay -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "in_loop", "later"),
    [
        (reasoning(format="openai-responses-v1"), True, True),
        (reasoning(format="xai-responses-v1"), True, True),
        (reasoning(format="google-gemini-v1"), True, True),
        (reasoning(format="anthropic-claude-v1", signature="s"), True, True),
        (reasoning(encrypted_content=None, format="openai-responses-v1"), False, False),
        (reasoning(encrypted_content=None, format="anthropic-claude-v1"), False, False),
        (reasoning(encrypted_content=None, format="unknown"), True, False),
        (reasoning(encrypted_content=None), True, False),
        ({"type": "web_search_call", "id": "ws_1"}, True, False),
        ({"type": "openrouter:web_search"}, True, False),
        ({"type": "openrouter:advisor"}, True, True),
        ({"type": "openrouter:subagent"}, True, True),
    ],
)
def test_each_family_gets_back_what_it_wants(
    plugin: ModuleType, item: JSON, in_loop: bool, later: bool
) -> None:
    assert plugin.is_replayed(item, in_loop=True) is in_loop
    assert plugin.is_replayed(item, in_loop=False) is later


def test_an_item_goes_back_as_the_schema_wants_it(plugin: ModuleType) -> None:
    bare = {"type": "reasoning", "status": None, "signature": "s", "of_tomorrow": 1}

    sent = plugin.replayed(bare)

    assert sent["id"].startswith("rs_")
    assert sent["summary"] == []
    assert "status" not in sent
    assert sent["of_tomorrow"] == 1
    assert plugin.replayed(reasoning(status="completed")) == reasoning(
        status="completed"
    )


def replay(plugin: ModuleType, messages: list[JSON], recalled: dict[str, JSON]) -> Any:
    """Return the built items in short: texts, call ids, ids of artifacts."""
    items = plugin.build_input(messages, plugin.ModelCard("a/b", "B"), recalled).items
    return [
        item.get("content") or item.get("call_id") or item.get("id") for item in items
    ]


def call(id_: str) -> JSON:
    return {"id": id_, "function": {"name": "f", "arguments": "{}"}}


def mark(id_: str, **hints: Any) -> JSON:
    return {"type": "openrouter_pipe.artifact", "id": id_, **hints}


A, B = reasoning(id="A"), reasoning(id="B")
RECALLED = {ULID_A: A, ULID_B: B}
OUTPUT = {"role": "tool", "tool_call_id": "c1", "content": "4"}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([assistant(mark(ULID_A), content="Hi")], ["A", "Hi"]),
        ([assistant(mark(ULID_A), mark(ULID_B), content="Hi")], ["A", "B", "Hi"]),
        (
            [assistant(mark(ULID_A), mark(ULID_B, at=2), content="Hi\nyou")],
            ["A", "Hi", "B", "you"],
        ),
        (  # edited: the place in the text is gone
            [assistant(mark(ULID_A), mark(ULID_B, at=2), content="Howdy")],
            ["A", "B", "Howdy"],
        ),
        (  # nothing follows: left out
            [assistant(mark(ULID_A), mark(ULID_B, at=2), content="Hi")],
            ["A", "Hi"],
        ),
        ([assistant(mark(ULID_A)), user()], ["Hello"]),
        (
            [assistant(mark(ULID_A), tool_calls=[call("c1")]), OUTPUT],
            ["A", "c1", "c1"],
        ),
        (
            [
                assistant(
                    mark(ULID_A),
                    mark(ULID_B, after="c1"),
                    tool_calls=[call("c1"), call("c2")],
                ),
                OUTPUT,
            ],
            ["A", "c1", "B", "c2", "c1", "c2"],
        ),
        (  # the call it followed is gone
            [assistant(mark(ULID_A, after="gone"), content="Hi")],
            ["Hi"],
        ),
        (  # it followed the last call that is left
            [assistant(mark(ULID_A, after="c1"), tool_calls=[call("c1")]), OUTPUT],
            ["c1", "c1"],
        ),
        (  # the marker says another format than the item
            [assistant(mark(ULID_A, of="google-gemini-v1"), content="Hi")],
            ["Hi"],
        ),
        ([assistant(mark("01BX5ZZKBKACTAV9WEVGEMMVS0"), content="Hi")], ["Hi"]),
        (
            [
                assistant(mark(ULID_A), tool_calls=[call("c1")]),
                OUTPUT,
                assistant(mark(ULID_B), content="Four"),
            ],
            ["A", "c1", "c1", "B", "Four"],
        ),
    ],
)
def test_artifacts_stand_where_they_stood(
    plugin: ModuleType, messages: list[JSON], expected: list[str]
) -> None:
    assert replay(plugin, [user("?"), *messages], RECALLED) == ["?", *expected]


def test_phases_are_given_back_to_their_texts(plugin: ModuleType) -> None:
    first = assistant(
        mark(ULID_A, phases=["commentary", "final_answer"]),
        content="I look.",
        tool_calls=[call("c1")],
    )
    messages = [user(), first, OUTPUT, assistant(content="Four."), user(), assistant()]
    messages[-1]["content"] = "No marker, no phase."

    items = plugin.build_input(messages, plugin.ModelCard("a/b", "B"), RECALLED).items

    phases = {i["content"]: i.get("phase") for i in items if i.get("content")}
    assert phases == {
        "Hello": None,
        "I look.": "commentary",
        "Four.": "final_answer",
        "No marker, no phase.": None,
    }


# The codec ----------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda each: st.lists(each) | st.dictionaries(st.text(), each),
    max_leaves=20,
)


@given(
    st.dictionaries(st.text(), VALUES),
    st.booleans(),
    st.sampled_from([0, 100, 1 << 30]),
    st.sampled_from(["reasoning", "openrouter:web_search"]),
)
def test_what_is_opened_is_what_was_sealed(
    plugin: ModuleType, fields: JSON, encrypt_all: bool, minimum: int, kind: str
) -> None:
    kept = artifact(plugin, {**fields, "type": kind})
    subject = codec(plugin, encrypt_all=encrypt_all, min_compress_bytes=minimum)

    assert subject.open(subject.seal(kept, NOW)) == kept


def test_a_lone_surrogate_survives(plugin: ModuleType) -> None:
    kept = artifact(plugin, reasoning(summary=["half \ud83d of a pair"]))

    assert codec(plugin).open(codec(plugin).seal(kept, NOW)) == kept


def test_a_row_tells_nothing_without_the_key(plugin: ModuleType) -> None:
    row = codec(plugin).seal(artifact(plugin, reasoning(summary=["secret"] * 999)), NOW)

    assert b"secret" not in row.payload
    assert b"alice" not in row.payload


def test_what_gets_smaller_is_compressed_and_only_that(plugin: ModuleType) -> None:
    subject = codec(plugin, min_compress_bytes=1000)
    long_, random_ = "a" * 100_000, os.urandom(50_000).hex()

    sizes = [
        len(subject.seal(artifact(plugin, reasoning(summary=[text])), NOW).payload)
        for text in (long_, random_)
    ]
    plain = subject.seal(artifact(plugin, reasoning(summary=["a" * 100])), NOW)

    assert sizes[0] < 5_000
    assert sizes[1] > 100_000
    assert not plain.payload[1] & 2


def test_tool_results_are_encrypted_when_everything_is(plugin: ModuleType) -> None:
    kept = artifact(plugin, {"type": "openrouter:web_search", "found": "a fjord"})

    assert b"fjord" in codec(plugin, encrypt_all=False).seal(kept, NOW).payload
    assert b"fjord" not in codec(plugin, encrypt_all=True).seal(kept, NOW).payload


def test_without_a_key_nothing_secret_is_sealed(plugin: ModuleType) -> None:
    bare = plugin.ArtifactCodec(plugin.artifact_keys("", ""), encrypt_all=False)

    assert not bare.can_seal(reasoning())
    assert bare.can_seal({"type": "openrouter:web_search"})
    assert not plugin.ArtifactCodec(()).can_seal({"type": "openrouter:web_search"})


def test_keys_rotate_without_losing_a_row(plugin: ModuleType) -> None:
    kept = artifact(plugin)
    rows = [
        codec(plugin, listed).seal(kept, NOW)
        for listed in ("", "first", "second, first", "third,second,first")
    ]

    newest = codec(plugin, "third, second, first")

    assert [newest.open(row) for row in rows] == [kept] * 4
    assert len({row.key_id for row in rows}) == 4
    fresh = [newest.resealed(row) for row in rows]
    assert {row.key_id for row in fresh} == {newest.keys[0].id}
    assert codec(plugin, "third").open(fresh[0]) == kept


def damaged(row: Any, plugin: ModuleType) -> dict[str, Any]:
    payload = row.payload
    other = codec(plugin).seal(artifact(plugin, id=ULID_B), NOW)
    plain = json.dumps({"id": ULID_A, "user": "alice", "item": reasoning()}).encode()
    return {
        "empty": row._replace(payload=b""),
        "one byte": row._replace(payload=payload[:1]),
        "truncated": row._replace(payload=payload[:-9]),
        "headless": row._replace(payload=payload[2:]),
        "flipped": row._replace(payload=payload[:40] + b"!" + payload[41:]),
        "a future version": row._replace(payload=b"\x02" + payload[1:]),
        "another key": row._replace(key_id="0" * 8),
        "no key": row._replace(key_id=""),
        "another user": row._replace(user_id="bob"),
        "another id": row._replace(id=ULID_B),
        "another row's payload": row._replace(payload=other.payload),
        "not encrypted": row._replace(payload=b"\x01\x00" + plain, key_id=""),
        "no LZ4": row._replace(payload=b"\x01\x02\xff\xff\xff\x00junk"),
        "too short for LZ4": row._replace(payload=b"\x01\x02\x05"),
        "a bomb": row._replace(payload=b"\x01\x02\xff\xff\xff\x7f"),
        "no JSON": row._replace(payload=b"\x01\x00{"),
    }


@pytest.mark.parametrize("how", list(range(16)))
def test_a_row_that_is_not_whole_is_an_error_and_never_a_value(
    plugin: ModuleType, how: int
) -> None:
    cases = damaged(codec(plugin).seal(artifact(plugin), NOW), plugin)
    assert len(cases) == 16
    name, row = list(cases.items())[how]

    with pytest.raises(plugin.Unreadable) as caught:
        codec(plugin).open(row)

    assert "gAAAA" not in str(caught.value), name


def test_another_secret_opens_nothing(plugin: ModuleType) -> None:
    row = codec(plugin).seal(artifact(plugin), NOW)
    other = plugin.ArtifactCodec(plugin.artifact_keys("another secret", ""))

    with pytest.raises(plugin.Unreadable, match="not listed"):
        other.open(row)


def test_the_chat_is_recorded_and_not_enforced(plugin: ModuleType) -> None:
    row = codec(plugin).seal(artifact(plugin), NOW)

    assert codec(plugin).open(row._replace(chat_id="a clone")).chat_id == "chat-1"
