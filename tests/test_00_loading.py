"""What Open WebUI's loader does to the file, fact by fact."""

from __future__ import annotations

import asyncio
import atexit
import gc
import logging
import socket
import sqlite3
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.server import Account, OpenWebUI
from tests.webui import (
    PLUGIN,
    Loaded,
    load,
    load_by_host,
    load_on_a_thread,
    pending_tasks,
    pieces,
)

if TYPE_CHECKING:
    from tests.simulator import Simulator

MODEL = "openai/gpt-5-mini"  # reasons, so there is something to keep
OPTIONAL = ("lz4", "redis")


@pytest.fixture
def fresh() -> Iterator[Loaded]:
    loaded = load("loading")
    yield loaded
    loaded.unload()


def source() -> str:
    return PLUGIN.read_text("utf-8")


def properties(loaded: Loaded, model: str = "Valves") -> dict[str, dict[str, Any]]:
    """Return what the admin page draws: the host calls the old name, `schema`."""
    with pytest.warns(DeprecationWarning, match="model_json_schema"):
        schema = getattr(loaded.pipe, model).schema()
    return schema["properties"]


def handlers() -> dict[str, list[logging.Handler]]:
    names = [None, *logging.root.manager.loggerDict]
    found = {str(name): list(logging.getLogger(name).handlers) for name in names}
    return {name: each for name, each in found.items() if each}


def callbacks() -> int:
    """Return how many functions wait for the interpreter's end."""
    return vars(atexit)["_ncallbacks"]()


# Text ---------------------------------------------------------------------------------


def test_the_loader_finds_nothing_to_rewrite(fresh: Loaded) -> None:
    from open_webui.utils.plugin import replace_imports

    assert replace_imports(source()) == source()
    assert fresh.frontmatter["title"]


def test_annotations_are_text_under_every_loader() -> None:
    module = types.ModuleType("function_older")
    sys.modules[module.__name__] = module
    try:
        code = compile(source(), "<string>", "exec", dont_inherit=True)
        exec(code, module.__dict__)
        older = Loaded("older", module, module.Pipe(), {})
        assert properties(older)
    finally:
        del sys.modules[module.__name__]


async def test_a_bare_exec_gives_the_same_pipe(fresh: Loaded) -> None:
    bare = await load_by_host("loading")

    assert properties(bare) == properties(fresh)
    assert bare.frontmatter == fresh.frontmatter
    bare.unload()


# Construction -------------------------------------------------------------------------


def test_it_is_constructed_without_a_loop_on_a_thread() -> None:
    before = threading.active_count()

    loaded = load_on_a_thread("loading")

    assert loaded.pipe.valves == loaded.pipe.Valves()
    assert threading.active_count() == before
    loaded.unload()


async def test_it_is_constructed_in_a_loop_without_starting_anything() -> None:
    tasks, threads = pending_tasks(), threading.active_count()

    loaded = load("loading")
    await asyncio.sleep(0)

    assert pending_tasks() == tasks
    assert threading.active_count() == threads
    loaded.unload()


def test_it_is_loaded_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection while loading")

    monkeypatch.setattr(socket.socket, "connect", refuse)

    load("loading").unload()


@pytest.mark.parametrize("package", OPTIONAL)
def test_it_is_loaded_without_an_optional_package(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [package, *(n for n in sys.modules if n.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)

    load("loading").unload()


def test_without_the_package_it_needs_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ulid", None)

    with pytest.raises(ImportError, match=r"pip install.*python-ulid"):
        load("loading", publish=False)


# Loads side by side -------------------------------------------------------------------


def test_two_loads_live_side_by_side(fresh: Loaded) -> None:
    later = load("loading")

    assert later.module.__name__ != fresh.module.__name__
    assert sys.modules["function_loading"] is later.module
    assert fresh.module.__name__ not in sys.modules
    assert properties(fresh) == properties(later)
    fresh.set_valves({})
    later.unload()


def test_a_load_that_is_dropped_leaves_nothing() -> None:
    load("loading", publish=False)
    gc.collect()
    modules, logged = set(sys.modules), handlers()
    exits = callbacks()

    loaded = load("loading", publish=False)
    trace = weakref.ref(loaded.pipe)
    del loaded
    gc.collect()

    assert trace() is None
    assert set(sys.modules) == modules
    assert handlers() == logged
    assert callbacks() == exits


def test_the_hosts_tables_stay_the_hosts(fresh: Loaded) -> None:
    from open_webui.internal.db import Base

    assert not [name for name in Base.metadata.tables if name.startswith("pipe_")]
    assert fresh.module.__name__.startswith("function_loading_")


async def test_a_turn_in_flight_outlives_its_pipe(simulator: Simulator) -> None:
    loaded = load("loading")
    valves = {"BASE_URL": simulator.base_url, "API_KEY": simulator.api_key}
    body = {
        "model": f"loading.{MODEL}",
        "messages": [{"role": "user", "content": "bench deltas=20 delay_ms=10"}],
        "stream": True,
    }
    before = pending_tasks()
    answer = pieces(await loaded.call(body, valves=valves))
    first = await anext(answer)
    trace = weakref.ref(loaded.pipe)

    loaded.unload()
    del loaded
    load("loading").unload()
    gc.collect()
    rest = [each async for each in answer]
    del answer, first
    for _ in range(20):
        gc.collect()
        await asyncio.sleep(0.05)

    assert "word19" in str(rest)
    assert trace() is None
    assert pending_tasks() <= before


# Valves -------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["Valves", "UserValves"])
def test_every_valve_has_a_type_that_the_page_can_draw(
    fresh: Loaded, model: str
) -> None:
    wrong = {
        name: drawn
        for name, drawn in properties(fresh, model).items()
        if "type" not in drawn or {"anyOf", "$ref", "allOf", "const"} & set(drawn)
    }

    assert not wrong


@pytest.mark.parametrize("model", ["Valves", "UserValves"])
def test_every_valve_has_a_default_and_says_what_it_does(
    fresh: Loaded, model: str
) -> None:
    drawn = properties(fresh, model)

    assert getattr(fresh.pipe, model)()
    assert not [name for name, each in drawn.items() if "default" not in each]
    assert not [name for name, each in drawn.items() if not each.get("description")]


def test_secrets_are_masked(fresh: Loaded) -> None:
    words = ("KEY", "SECRET", "PASSWORD", "TOKEN")
    bare = [
        name
        for name, drawn in properties(fresh).items()
        if name.endswith(words)
        and drawn["type"] == "string"
        and drawn.get("input", {}).get("type") != "password"
    ]

    assert not bare


def test_no_value_means_the_default(fresh: Loaded) -> None:
    valves = fresh.pipe.Valves
    nothing = dict.fromkeys(valves.model_fields)

    assert valves(**nothing) == valves()


def test_valves_of_another_version_are_no_error(fresh: Loaded) -> None:
    fresh.set_valves({"A_VALVE_OF_LONG_AGO": "1"})

    assert fresh.pipe.valves == fresh.pipe.Valves()


def test_the_numbers_of_the_page_arrive_as_text(fresh: Loaded) -> None:
    drawn = properties(fresh)
    numbers = {
        name: str(each["default"])
        for name, each in drawn.items()
        if each["type"] in {"integer", "number"}
    }

    assert fresh.pipe.Valves(**numbers) == fresh.pipe.Valves()


# In a real server ---------------------------------------------------------------------


def tables(webui: OpenWebUI) -> set[str]:
    """Return the names of the tables that pipes made."""
    path = webui.data_dir / "data" / "webui.db"
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        names = {name for (name,) in rows if name.startswith("pipe_")}
    database.close()
    return names


def listed(admin: Account, function: str) -> set[str]:
    """Return the ids of a function's models, without its own id."""
    prefix = f"{function}."
    return {i.removeprefix(prefix) for i in admin.models() if i.startswith(prefix)}


def test_a1_saved_again_it_keeps_its_models_and_its_tables(
    webui: OpenWebUI, admin: Account
) -> None:
    models = listed(admin, "openrouter")
    answers = [admin.chat(f"openrouter.{MODEL}", "Hello")]
    for _ in range(2):
        admin.update_function("openrouter", source(), "OpenRouter")
        answers.append(admin.chat(f"openrouter.{MODEL}", "Hello"))

    assert all(answer.text and not answer.error for answer in answers)
    assert MODEL in models
    assert listed(admin, "openrouter") == models
    ours = {name for name in tables(webui) if name.startswith("pipe_openrouter")}
    assert ours == {"pipe_openrouter_artifacts"}


def test_a2_a_copy_under_another_id_has_its_own_models_and_tables(
    webui: OpenWebUI, admin: Account, valves: dict[str, Any]
) -> None:
    admin.install_function("my_or", source(), "Mine")
    try:
        admin.set_valves("my_or", valves)
        chats = [
            admin.chat(f"{function}.{MODEL}", "Hello")
            for function in ("openrouter", "my_or")
        ]
        both = [listed(admin, function) for function in ("openrouter", "my_or")]
    finally:
        admin.delete_function("my_or")

    assert all(chat.text and not chat.error for chat in chats)
    assert both[0] == both[1] != set()
    ours = {name for name in tables(webui) if "openrouter" in name or "my_or" in name}
    assert ours == {"pipe_openrouter_artifacts", "pipe_my_or_artifacts"}


def test_a8_a_better_key_helps_at_once(admin: Account, valves: dict[str, Any]) -> None:
    model = f"openrouter.{MODEL}"
    admin.set_valves("openrouter", {**valves, "API_KEY": "sk-or-v1-wrong"})
    refused = admin.chat(model, "Hello")
    admin.set_valves("openrouter", valves)
    answered = admin.chat(model, "Hello")

    assert "refused the API key" in refused.card
    assert not refused.text
    assert answered.text
    assert not answered.error
