"""What a model needs back is there on the next turn, and nowhere to be read."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from tests.server import Account, Chat, OpenWebUI, cluster_env
from tests.simulator import Entry, Simulator, replies, scenario
from tests.simulator.replies import Reply, compose, function_call, message, thought
from tests.simulator.scenarios import OSLO, has_reasoning

JSON = dict[str, Any]
OPENAI = "openrouter.openai/gpt-5-mini"
CLAUDE = "openrouter.anthropic/claude-sonnet-4.5"
GEMINI = "openrouter.google/gemini-2.5-pro"
TABLE = "pipe_openrouter_artifacts"
TOOL = '''
class Tools:
    def get_weather(self, city: str) -> str:
        """Tell the weather.

        :param city: where
        """
        return "4 degrees"
'''


def answered(text: str = "Hello.", **options: Any) -> Reply:
    """Return an answer that was thought about."""
    return compose(thought("I look.", 2), message(text, 2, **options))


def markers(chat: Chat) -> list[JSON]:
    """Return the markers in an answer, in order."""
    items = [item.get("reasoning_details") or [] for item in chat.items("reasoning")]
    return [detail for details in items for detail in details]


def shape(entry: Entry) -> list[str]:
    """Return the types of a request's items, messages by their roles."""
    return [item.get("role") or item["type"] for item in entry.items]


def thoughts(entry: Entry) -> list[JSON]:
    """Return the reasoning that a request replays."""
    return [item for item in entry.items if item.get("type") == "reasoning"]


def ask(webui: OpenWebUI, query: str, *values: Any) -> list[tuple[Any, ...]]:
    """Ask the server's SQLite."""
    path = webui.data_dir / "data" / "webui.db"
    with closing(sqlite3.connect(path, timeout=10)) as database, database:
        return database.execute(query, values).fetchall()


def sealed_in(webui: OpenWebUI, chat: Chat) -> list[tuple[Any, ...]]:
    """Return the kinds and payloads that were kept for a chat."""
    query = f"SELECT kind, payload FROM {TABLE} WHERE chat_id = ?"
    return ask(webui, query, chat.id)


def wait_until(holds: Callable[[], Any], timeout_seconds: float = 10) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + timeout_seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("model", [OPENAI, CLAUDE, GEMINI])
def test_f1_reasoning_is_replayed_verbatim_before_what_it_preceded(
    admin: Account, simulator: Simulator, model: str
) -> None:
    first = admin.chat(model, "Hello")
    second = admin.chat(model, "Go on", after=first)
    third = admin.chat(model, "And now?", after=second)

    assert not third.error
    assert len(markers(first)) == 1
    _, again, last = simulator.posts
    assert shape(again) == ["user", "reasoning", "assistant", "user"]
    assert shape(last) == [*shape(again)[:3], *shape(again)]
    assert thoughts(last)[0] == thoughts(again)[0]
    # The simulator refuses reasoning that it has not minted itself, to the byte.
    assert all(post.status == 200 for post in simulator.posts)


def test_f1_the_chat_holds_a_marker_and_nothing_opaque(
    admin: Account, webui: OpenWebUI, simulator: Simulator
) -> None:
    first = admin.chat(OPENAI, "Hello")
    admin.chat(OPENAI, "Go on", after=first)

    secret = thoughts(simulator.posts[1])[0]["encrypted_content"]
    exported = json.dumps(admin.call("GET", f"/api/v1/chats/{first.id}"))
    # Where the sweep looks for the chats that still show a row.
    (stored,) = ask(webui, "SELECT chat FROM chat WHERE id = ?", first.id)[0]
    assert markers(first)[0]["id"] in stored
    assert secret not in exported
    assert "encrypted_content" not in exported
    assert markers(first)[0]["id"] in exported
    assert markers(first)[0]["id"] not in first.text


@pytest.mark.parametrize("variant", ["openai", "anthropic"])
def test_f2_refused_reasoning_is_left_out_once_and_for_all(
    admin: Account, simulator: Simulator, variant: str
) -> None:
    model = {"openai": OPENAI, "anthropic": CLAUDE}[variant]
    first = admin.chat(model, "Hello")
    simulator.script(scenario("F12", variant), when=has_reasoning)

    second = admin.chat(model, "Go on", after=first)
    third = admin.chat(model, "And now?", after=second)

    assert second.text
    assert not second.error
    assert len([line for line in second.statuses if "left out" in line]) == 1
    assert not third.error
    assert not [line for line in third.statuses if "left out" in line]
    _, refused, repaired, last = simulator.posts
    assert [refused.status, repaired.status, last.status] == [400, 200, 200]
    assert (len(thoughts(refused)), len(thoughts(repaired))) == (1, 0)
    assert len(thoughts(last)) == 1  # the second answer's own
    assert thoughts(last) != thoughts(refused)


def test_f4_stop_after_the_reasoning_keeps_it(
    admin: Account, webui: OpenWebUI, simulator: Simulator
) -> None:
    simulator.script(
        compose(thought("I look.", 2), message("One two three", 3, delay=2))
    )
    with admin.listen() as tab:
        started = admin.start_chat(OPENAI, "Hello", session_id=tab.sid)
        tab.wait("response.output_text.delta")
        tab.wait(lambda seen: "openrouter_pipe.artifact" in str(seen.data))
        admin.stop_chat(started)
        stopped = admin.wait_chat(started)

    assert len(markers(stopped)) == 1
    assert len(sealed_in(webui, stopped)) == 1
    second = admin.chat(OPENAI, "Go on", after=stopped)
    assert not second.error
    assert shape(simulator.posts[1]) == ["user", "reasoning", "assistant", "user"]


def test_f4_stop_before_any_text_leaves_a_valid_next_turn(
    admin: Account, webui: OpenWebUI, simulator: Simulator
) -> None:
    simulator.script(compose(thought("I look.", 2), message("One", ["", "One"], 5)))
    with admin.listen() as tab:
        started = admin.start_chat(OPENAI, "Hello", session_id=tab.sid)
        tab.wait(lambda seen: "openrouter_pipe.artifact" in str(seen.data))
        admin.stop_chat(started)
        stopped = admin.wait_chat(started)

    assert len(sealed_in(webui, stopped)) == 1
    second = admin.chat(OPENAI, "Go on", after=stopped)

    assert second.text
    assert not second.error
    assert not thoughts(simulator.posts[1])  # nothing follows it, so it is left out


def test_f6_a_marker_of_somebody_else_finds_nothing(
    admin: Account, webui: OpenWebUI, simulator: Simulator
) -> None:
    first = admin.chat(OPENAI, "Hello")
    admin.share_model(OPENAI)
    other = webui.add_user()
    chat = admin.call("GET", f"/api/v1/chats/{first.id}")["chat"]
    imported = other.call("POST", "/api/v1/chats/import", {"chats": [{"chat": chat}]})
    stolen = other.read_chat(imported[0]["id"])
    assert markers(stolen) == markers(first)

    second = other.chat(OPENAI, "Go on", after=stolen)

    assert second.text
    assert not second.error
    assert not thoughts(simulator.posts[-1])
    assert shape(simulator.posts[-1]) == ["user", "assistant", "user"]


def test_a_clone_and_an_import_go_on_and_outlive_their_original(
    admin: Account, simulator: Simulator
) -> None:
    first = admin.chat(OPENAI, "Hello")
    clone = admin.call("POST", f"/api/v1/chats/{first.id}/clone", {})
    chat = admin.call("GET", f"/api/v1/chats/{first.id}")["chat"]
    imported = admin.call("POST", "/api/v1/chats/import", {"chats": [{"chat": chat}]})
    admin.call("DELETE", f"/api/v1/chats/{first.id}")

    for id_ in (clone["id"], imported[0]["id"]):
        admin.chat(OPENAI, "Go on", after=admin.read_chat(id_))

    assert [len(thoughts(post)) for post in simulator.posts] == [0, 1, 1]
    assert all(post.status == 200 for post in simulator.posts)


def test_f7_chats_go_on_while_the_database_refuses_and_nothing_is_lost(
    admin: Account, webui: OpenWebUI, simulator: Simulator
) -> None:
    before = admin.chat(OPENAI, "Hello")
    ask(
        webui,
        f"CREATE TRIGGER refuse BEFORE INSERT ON {TABLE} BEGIN "
        "SELECT is_out_of_order(); END",
    )
    try:
        first = admin.chat(OPENAI, "Hello")
        second = admin.chat(OPENAI, "Go on", after=first)
        assert sealed_in(webui, first) == []
    finally:
        ask(webui, "DROP TRIGGER refuse")

    assert first.text
    assert not first.error
    told = [line for line in first.statuses if "database" in line]
    told_again = [line for line in second.statuses if "database" in line]
    assert (len(told), len(told_again)) == (1, 0)
    assert len(thoughts(simulator.posts[2])) == 1  # from memory
    wait_until(lambda: len(sealed_in(webui, first)) == 2, 20)
    third = admin.chat(OPENAI, "And now?", after=second)
    assert len(thoughts(simulator.posts[-1])) == 2
    assert not [line for line in third.statuses if "database" in line]
    assert sealed_in(webui, before)


def test_f8_the_table_tells_nothing_and_rows_cannot_be_moved(
    admin: Account, webui: OpenWebUI, simulator: Simulator
) -> None:
    simulator.script(
        compose(
            thought("My innermost thoughts.", 2),
            replies.server_item("openrouter:advisor", advice="Buy low"),
            message("Hello."),
        )
    )
    first = admin.chat(OPENAI, "Hello")
    kept = sealed_in(webui, first)
    admin.share_model(OPENAI)
    other = webui.add_user()

    assert {kind for kind, _ in kept} == {"reasoning", "openrouter:advisor"}
    for _, payload in kept:
        assert b"innermost" not in payload
        assert b"Buy low" not in payload
    query = f"UPDATE {TABLE} SET user_id = ? WHERE chat_id = ?"
    ask(webui, query, other.id, first.id)
    chat = admin.call("GET", f"/api/v1/chats/{first.id}")["chat"]
    (stolen,) = other.call("POST", "/api/v1/chats/import", {"chats": [{"chat": chat}]})
    second = other.chat(OPENAI, "Go on", after=other.read_chat(stolen["id"]))
    assert second.text
    assert not second.error
    assert shape(simulator.posts[-1]) == ["user", "assistant", "user"]
    assert "do not open were left out" in webui.log()


# Other ways to go on ------------------------------------------------------------------


def test_another_model_gets_none_of_it_and_the_first_gets_it_back(
    admin: Account, simulator: Simulator
) -> None:
    first = admin.chat(OPENAI, "Hello")
    second = admin.chat(CLAUDE, "And you?", after=first)
    third = admin.chat(OPENAI, "Go on", after=second)

    assert not third.error
    assert shape(simulator.posts[1]) == ["user", "assistant", "user"]
    assert len(thoughts(simulator.posts[2])) == 1
    assert all(post.status == 200 for post in simulator.posts)


def test_regenerate_and_branches_replay_their_own_line(
    admin: Account, simulator: Simulator
) -> None:
    first = admin.chat(OPENAI, "Hello")
    second = admin.chat(OPENAI, "Go on", after=first)
    other = admin.regenerate(second)
    admin.chat(OPENAI, "Then?", after=second)
    admin.chat(OPENAI, "Then?", after=other)

    _, _, again, left, right = simulator.posts
    assert shape(again) == ["user", "reasoning", "assistant", "user"]
    assert thoughts(left)[0] == thoughts(right)[0] == thoughts(again)[0]
    assert thoughts(left)[1] != thoughts(right)[1]
    assert all(post.status == 200 for post in simulator.posts)


def test_continue_goes_on_behind_the_text(admin: Account, simulator: Simulator) -> None:
    first = admin.chat(OPENAI, "Hello")
    more = admin.continue_answer(first)
    last = admin.chat(OPENAI, "And now?", after=more)

    assert not last.error
    assert len(markers(more)) == 2
    assert shape(simulator.posts[1]) == ["user", "reasoning", "assistant"]
    assert shape(simulator.posts[2])[:5] == [
        "user",
        "reasoning",
        "assistant",
        "reasoning",
        "assistant",
    ]
    assert all(post.status == 200 for post in simulator.posts)


def test_an_edited_answer_counts_and_its_reasoning_stays_valid(
    admin: Account, simulator: Simulator
) -> None:
    first = admin.chat(OPENAI, "Hello")
    edited = admin.edit_message(first, first.message_id, "I never said that.")
    second = admin.chat(OPENAI, "Go on", after=edited)

    assert not second.error
    assert simulator.posts[1].status == 200


def test_a_temporary_chat_goes_on(admin: Account, simulator: Simulator) -> None:
    with admin.listen() as tab:
        first = admin.chat(OPENAI, "Hello", temporary=True, listener=tab)
        admin.chat(OPENAI, "Go on", temporary=True, listener=tab, after=first)

    assert len(thoughts(simulator.posts[1])) == 1


@pytest.mark.parametrize("model", [OPENAI, CLAUDE, GEMINI])
@pytest.mark.parametrize("execution", ["pipe", "open_webui"])
def test_a_tool_loop_replays_the_whole_block(
    admin: Account, simulator: Simulator, valves: JSON, model: str, execution: str
) -> None:
    admin.set_valves("openrouter", {**valves, "TOOL_EXECUTION": execution})
    body = {"id": "weather", "name": "Weather", "content": TOOL}
    admin.call("POST", "/api/v1/tools/create", {**body, "meta": {"description": ""}})
    simulator.script(compose(thought("I need it.", 2), function_call(OSLO)))
    try:
        params = {"function_calling": "native"}
        chat = admin.chat(model, "Weather?", tool_ids=["weather"], params=params)
    finally:
        admin.call("DELETE", "/api/v1/tools/id/weather/delete")

    assert not chat.error
    second = next(p for p in simulator.posts[1:] if "function_call" in shape(p))
    assert shape(second) == [
        "user",
        "reasoning",
        "function_call",
        "function_call_output",
    ]
    assert all(post.status == 200 for post in simulator.posts)


@pytest.mark.parametrize("model", [OPENAI, CLAUDE, GEMINI])
@pytest.mark.parametrize("execution", ["pipe", "open_webui"])
def test_an_approval_pause_replays_the_whole_block(
    admin: Account, simulator: Simulator, valves: JSON, model: str, execution: str
) -> None:
    admin.set_valves("openrouter", {**valves, "TOOL_EXECUTION": execution})
    body = {"id": "weather", "name": "Weather", "content": TOOL}
    admin.call("POST", "/api/v1/tools/create", {**body, "meta": {"description": ""}})
    config = admin.call("GET", "/api/v1/chats/config")
    asking = {**config, "ENABLE_TOOL_PERMISSIONS": True}
    admin.call("POST", "/api/v1/chats/config", asking)
    simulator.script(compose(thought("I need it.", 2), function_call(OSLO)))
    params = {"function_calling": "native", "tool_approval_mode": "ask"}
    options: JSON = {"tool_ids": ["weather"], "params": params}
    try:
        waiting = admin.chat(model, "Weather?", **options)
        (call,) = waiting.items("function_call")
        path = f"/api/v1/chats/{waiting.id}/messages/{waiting.message_id}/resolve"
        approval = {"call_id": call["call_id"], "action": "approve"}
        admin.call("POST", path, approval)
        done = admin.continue_answer(waiting, tool_approval_resume=True, **options)
    finally:
        admin.call("POST", "/api/v1/chats/config", config)
        admin.call("DELETE", "/api/v1/tools/id/weather/delete")
    later = admin.chat(model, "Thanks.", after=done)

    assert call["status"] == "pending"
    assert not done.error
    assert not later.error
    _, resumed, last = simulator.posts
    block = ["user", "reasoning", "function_call", "function_call_output"]
    assert shape(resumed) == block
    assert shape(last)[:4] == block
    assert "4 degrees" in str(resumed.items[3]["output"])
    # The simulator refuses reasoning that it has not minted itself, to the byte.
    assert resumed.status == last.status == 200
    assert last.items[1] == resumed.items[1]
    assert resumed.items[1].get("encrypted_content") or model == CLAUDE


def test_the_phase_of_a_text_comes_back(admin: Account, simulator: Simulator) -> None:
    simulator.script(answered("Hello.", phase="final_answer"))
    first = admin.chat(OPENAI, "Hello")

    admin.chat(OPENAI, "Go on", after=first)

    (said,) = [i for i in simulator.posts[1].items if i.get("role") == "assistant"]
    assert said["phase"] == "final_answer"


def test_an_advisor_without_reasoning_gets_a_line_that_carries_it(
    admin: Account, simulator: Simulator
) -> None:
    item = replies.server_item("openrouter:advisor", advice="Buy low")
    simulator.script(compose(item, message("Hello.")))
    first = admin.chat("openrouter.openai/gpt-4o-mini", "Hello")

    admin.chat("openrouter.openai/gpt-4o-mini", "Go on", after=first)

    assert "Used openrouter:advisor." in json.dumps(first.output)
    assert "openrouter:advisor" in shape(simulator.posts[1])
    assert simulator.posts[1].status == 200


# Choices ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allowed", "chosen", "replayed"),
    [
        ("conversation", "default", [0, 1, 2]),
        ("conversation", "next_reply", [0, 1, 1]),
        ("conversation", "disabled", [0, 0, 0]),
        ("next_reply", "conversation", [0, 1, 1]),
        ("disabled", "conversation", [0, 0, 0]),
    ],
)
def test_users_choose_within_what_the_admin_allows(
    admin: Account,
    webui: OpenWebUI,
    simulator: Simulator,
    valves: JSON,
    allowed: str,
    chosen: str,
    replayed: list[int],
) -> None:
    key = "PERSIST_REASONING_TOKENS"
    admin.set_valves("openrouter", {**valves, key: allowed})
    admin.set_user_valves("openrouter", {key: chosen})
    try:
        chat = None
        for _ in range(3):
            chat = admin.chat(OPENAI, "Hello", after=chat)
    finally:
        admin.set_user_valves("openrouter", {})

    assert [len(thoughts(post)) for post in simulator.posts] == replayed
    assert chat
    assert bool(sealed_in(webui, chat)) is any(replayed)


def test_a_rotated_key_opens_what_the_old_one_closed(
    admin: Account, simulator: Simulator, valves: JSON
) -> None:
    key = "ARTIFACT_ENCRYPTION_KEY"
    chat = admin.chat(OPENAI, "Hello")
    for listed in ("one", "two, one", "three, two, one"):
        admin.set_valves("openrouter", {**valves, key: listed})
        chat = admin.chat(OPENAI, "Go on", after=chat)

    assert [len(thoughts(post)) for post in simulator.posts] == [0, 1, 2, 3]
    assert "encrypted:" in admin.get_valves("openrouter")[key]


# Several workers ----------------------------------------------------------------------


def test_workers_share_what_was_kept(
    simulator: Simulator, valves: JSON, postgres_url: str, redis_url: str
) -> None:
    from tests.webui import PLUGIN

    with OpenWebUI(cluster_env(postgres_url, redis_url)) as server:
        source = PLUGIN.read_text("utf-8")
        server.admin.install_function("openrouter", source, "OpenRouter")
        costs = {"COSTS_REDIS_DUMP": True}
        server.admin.set_valves("openrouter", {**valves, **costs})
        chats: list[Chat | None] = [None] * 4
        for _ in range(4):
            chats = [server.admin.chat(OPENAI, "Go on", after=chat) for chat in chats]
        log = server.log()

    assert not any(chat and chat.error for chat in chats)
    counts = sorted(len(thoughts(post)) for post in simulator.posts)
    assert counts == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert all(post.status == 200 for post in simulator.posts)
    # Our statements and frames: the host's workers may race for rows of their own.
    assert "pipe_openrouter_artifacts" not in log
    assert 'File "<string>"' not in log

    import redis

    with redis.Redis.from_url(redis_url) as client:

        def values(pattern: str) -> list[bytes]:
            found = [client.get(key) for key in client.scan_iter(pattern)]
            return [each for each in found if isinstance(each, bytes)]

        spent = [json.loads(each) for each in values("*:cost:*")]
        stored = b"".join(values("*:artifact:*"))
    assert len(spent) == 16
    assert {each["model"] for each in spent} == {"openai/gpt-5-mini"}
    assert all(each["cost"] > 0 and each["user_id"] for each in spent)
    assert b"gAAAA" in stored
    assert b"encrypted_content" not in stored
