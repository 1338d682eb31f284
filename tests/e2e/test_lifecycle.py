"""Settings as an admin saves them, and a function that is saved while it works."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.server import Account, OpenWebUI, Refused
from tests.simulator import Simulator, replies
from tests.webui import PLUGIN

MODEL = "openrouter.openai/gpt-5-mini"
LONG = "bench deltas=30 delay_ms=50"

# Looks around inside the server's process.
PROBE = '''"""
title: Probe
"""

import asyncio
import gc
import json
import threading


class Pipe:
    async def pipe(self, body):
        gc.collect()
        kinds = [type(each) for each in gc.get_objects()]
        ours = [k for k in kinds if str(k.__module__).startswith("function_open")]
        frames = [task.get_coro() for task in asyncio.all_tasks()]
        return json.dumps({
            "modules": sorted({k.__module__ for k in ours}),
            "pipes": sorted(k.__module__ for k in ours if k.__name__ == "Pipe"),
            "tasks": sorted(
                coro.__qualname__ for coro in frames
                if coro.cr_code.co_filename == "<string>"
            ),
            "threads": sorted(each.name for each in threading.enumerate()),
        })
'''
POOLS = ("AnyIO", "Thread-", "asyncio_", "uvloop_")  # the host's, as many as it likes


@pytest.fixture(scope="module")
def probe(installed: OpenWebUI) -> Iterator[Callable[[], dict[str, list[str]]]]:
    def look() -> dict[str, list[str]]:
        return json.loads(installed.admin.api_chat("probe", "Look").text)

    installed.admin.install_function("probe", PROBE, "Probe")
    yield look
    installed.admin.delete_function("probe")


def soon(is_so: Callable[[], bool], timeout_seconds: float = 5) -> bool:
    """Wait until something is so, and say whether it came to that."""
    deadline = time.monotonic() + timeout_seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.05)
    return is_so()


def own_threads(names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith(POOLS)]


def upkeep_alone(tasks: list[str]) -> bool:
    """Say whether nothing runs but what the one living instance may keep running."""
    return tasks in ([], ["Memory._keep_house"])


# Saving while a chat runs -------------------------------------------------------------


def test_saved_again_a_running_chat_ends_and_the_old_instance_goes(
    admin: Account,
    webui: OpenWebUI,
    simulator: Simulator,
    probe: Callable[[], dict[str, list[str]]],
) -> None:
    source = PLUGIN.read_text("utf-8")
    admin.chat(MODEL, "Hello")
    before = probe()
    connections = webui.connections_to(simulator.port)

    with admin.listen() as tab:
        turns = [admin.start_chat(MODEL, LONG, session_id=tab.sid) for _ in range(2)]
        tab.wait(lambda seen: "word1 " in str(seen.data))
        admin.update_function("openrouter", f"{source}\n# again\n", "OpenRouter")
        meanwhile = probe()
        fresh = admin.chat(MODEL, "Hello")
        chats = [admin.wait_chat(turn) for turn in turns]
    admin.update_function("openrouter", source, "OpenRouter")
    last = admin.chat(MODEL, "Hello")

    whole = "".join(f"word{number} " for number in range(30))
    assert [chat.text for chat in chats] == [whole.strip()] * 2
    assert not any(chat.card for chat in (*chats, fresh, last))
    assert len(meanwhile["modules"]) == 2
    # Connections first: looking around collects garbage.
    assert soon(lambda: webui.connections_to(simulator.port) <= max(connections, 1))
    after = probe()
    assert len(before["modules"]) == len(after["modules"]) == 1
    assert len(after["pipes"]) == 1
    assert after["modules"] != before["modules"]
    assert upkeep_alone(after["tasks"])
    assert upkeep_alone(before["tasks"])
    assert own_threads(after["threads"]) == own_threads(before["threads"])


def test_deleted_nothing_of_it_stays(
    admin: Account,
    webui: OpenWebUI,
    simulator: Simulator,
    valves: dict[str, Any],
    probe: Callable[[], dict[str, list[str]]],
) -> None:
    admin.install_function("openother", PLUGIN.read_text("utf-8"), "Other")
    admin.set_valves("openother", valves)
    before = webui.connections_to(simulator.port)
    chat = admin.chat("openother.openai/gpt-5-mini", "Hello")
    assert len(probe()["pipes"]) == 2
    admin.delete_function("openother")

    assert chat.text
    assert not [m for m in admin.models() if m.startswith("openother")]
    assert soon(lambda: webui.connections_to(simulator.port) <= before)
    # Open WebUI keeps the module itself in `sys.modules`, and so its classes.
    assert len(probe()["pipes"]) == 1
    assert "openother" not in probe()["pipes"][0]
    assert upkeep_alone(probe()["tasks"])


def test_many_chats_use_few_connections(
    admin: Account, webui: OpenWebUI, simulator: Simulator
) -> None:
    for number in range(8):
        admin.chat(MODEL, f"Hello {number}")

    assert len({post.connection for post in simulator.posts}) <= 2
    assert webui.connections_to(simulator.port) <= 4


# The address --------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["openrouter.ai/api/v1", "not a url", "ftp://x/v1"])
def test_an_address_that_is_none_is_refused_and_the_old_one_stays(
    address: str,
    admin: Account,
    webui: OpenWebUI,
    simulator: Simulator,
    valves: dict[str, Any],
) -> None:
    length = len(webui.log())
    with pytest.raises(Refused) as refusal:
        admin.set_valves("openrouter", {**valves, "BASE_URL": address})

    assert refusal.value.status == 400
    # Open WebUI shows a sentence of its own, and puts ours into the log.
    assert "BASE_URL must be a web address such as" in webui.log()[length:]
    assert simulator.api_key not in webui.log()[length:]
    assert admin.get_valves("openrouter")["BASE_URL"] == valves["BASE_URL"]
    assert admin.chat(MODEL, "Hello").text


# The key ------------------------------------------------------------------------------


def test_the_key_is_stored_encrypted(
    admin: Account, webui: OpenWebUI, simulator: Simulator
) -> None:
    admin.chat(MODEL, "Hello")

    saved = admin.get_valves("openrouter")["API_KEY"]
    assert saved.startswith("encrypted:")
    assert simulator.api_key not in json.dumps(admin.get_valves("openrouter"))
    export = admin.http.get(
        "/api/v1/functions/export", params={"include_valves": "true"}
    )
    assert export.is_success
    assert simulator.api_key not in export.text
    with sqlite3.connect(webui.data_dir / "data" / "webui.db") as database:
        query = "SELECT valves FROM function WHERE id = 'openrouter'"
        [(stored,)] = database.execute(query)
    database.close()
    assert json.loads(stored)["API_KEY"] == saved
    for path in (webui.data_dir / "data").glob("webui.db*"):
        assert simulator.api_key.encode() not in path.read_bytes()
    assert simulator.api_key not in webui.log()


def test_the_key_that_the_page_sends_back_still_works(
    admin: Account, simulator: Simulator
) -> None:
    saved = admin.get_valves("openrouter")

    admin.set_valves("openrouter", {**saved, "STREAM_INTERVAL_MS": 50})
    chat = admin.chat(MODEL, "Hello")

    assert admin.get_valves("openrouter")["API_KEY"] == saved["API_KEY"]
    assert simulator.posts[0].headers["Authorization"] == (
        f"Bearer {simulator.api_key}"
    )
    assert chat.text


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("", "No usable OpenRouter key"),
        ("sk-or-ключ", "characters that no key has"),
        ("encrypted:gAAAAABno", "another WEBUI_SECRET_KEY"),
    ],
)
def test_a_key_that_cannot_work_is_never_sent(
    key: str,
    words: str,
    admin: Account,
    simulator: Simulator,
    valves: dict[str, Any],
) -> None:
    admin.set_valves("openrouter", {**valves, "API_KEY": key})

    chat = admin.chat(MODEL, "Hello")
    answer = admin.api_chat(MODEL, "Hello")

    assert words in chat.card
    assert "API_KEY" in chat.card
    assert answer.status == 401
    assert words in answer.body["error"]["message"]
    assert simulator.posts == []


# Other people -------------------------------------------------------------------------


def test_a_user_chats_with_a_shared_model_and_sees_no_valves(
    webui: OpenWebUI, admin: Account, simulator: Simulator
) -> None:
    user, model = webui.add_user(), "openrouter.openai/gpt-4o-mini"
    assert model not in user.models()
    admin.share_model(model)
    try:
        chat = user.chat(model, "Hello")
    finally:
        admin.call("POST", "/api/v1/models/model/delete", {"id": model})

    assert chat.text
    assert len(simulator.posts) == 1
    assert user.id not in simulator.posts[0].raw.decode()
    with pytest.raises(Refused):
        user.get_valves("openrouter")


# The list of models -------------------------------------------------------------------


def lists(simulator: Simulator) -> int:
    return sum(entry.path == "/models" for entry in simulator.ledger)


@pytest.fixture
def elsewhere(simulator: Simulator, valves: dict[str, Any]) -> dict[str, Any]:
    """Return the valves with another name of the same place, and a short refresh.

    The next test finds its own address again, and so a list that is fresh.
    """
    address = simulator.base_url.replace("127.0.0.1", "localhost")
    return {**valves, "BASE_URL": address, "MODEL_CATALOG_REFRESH_SECONDS": 1}


def test_a_shorter_refresh_counts_for_the_list_that_is_there(
    admin: Account, simulator: Simulator, elsewhere: dict[str, Any]
) -> None:
    admin.set_valves("openrouter", {**elsewhere, "MODEL_CATALOG_REFRESH_SECONDS": 99})
    assert lists(simulator) == 1

    admin.set_valves("openrouter", elsewhere)
    time.sleep(1.1)
    admin.models()

    assert soon(lambda: lists(simulator) >= 2)


def test_while_upstream_is_down_the_last_list_stays(
    admin: Account, simulator: Simulator, elsewhere: dict[str, Any]
) -> None:
    admin.set_valves("openrouter", elsewhere)
    before = set(admin.models())
    simulator.script(replies.http_error(503).forever(), path="/models")

    time.sleep(1.1)
    admin.models()
    assert soon(lambda: lists(simulator) >= 2)

    assert set(admin.models()) == before
    assert admin.chat(MODEL, "Hello").text


def test_another_address_is_asked_while_the_old_one_still_answers(
    admin: Account,
    simulator: Simulator,
    elsewhere: dict[str, Any],
    valves: dict[str, Any],
) -> None:
    body = replies.json_body({"data": simulator.backend.catalog.rows})
    admin.set_valves("openrouter", elsewhere)
    simulator.script(replace(body, wait=4), path="/models")

    time.sleep(1.1)
    admin.models()  # begins to read the list again, and does not wait for it
    assert soon(lambda: lists(simulator) == 2)
    admin.set_valves("openrouter", valves)

    assert MODEL in admin.models()
    assert lists(simulator) == 3
