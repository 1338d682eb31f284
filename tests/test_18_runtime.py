"""18 Runtime: what lives as long as the plugin does, and how it ends."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from open_webui_openrouter_pipe import open_webui_openrouter_pipe as plugin
from tests.simulator import Simulator, replies
from tests.turns import answer, ask, opened
from tests.webui import Loaded, load_on_a_thread, pending_tasks, pieces

BODY: dict[str, Any] = {
    "model": "life.openai/gpt-4o",
    "messages": [{"role": "user", "content": "Hi"}],
    "stream": True,
}
CHAT = {"chat_id": "chat-1", "message_id": "message-1"}


def sockets(simulator: Simulator) -> int:
    """Count this process's client connections to a simulator."""
    process = psutil.Process(os.getpid())
    return sum(
        1
        for each in process.net_connections("tcp")
        if each.raddr
        and each.raddr.port == simulator.port
        and each.status == "ESTABLISHED"
    )


async def gone(simulator: Simulator, tasks: set[asyncio.Task[Any]]) -> bool:
    """Tell whether connections and tasks go away within two seconds."""
    for _ in range(40):
        if not sockets(simulator) and pending_tasks() <= tasks:
            return True
        await asyncio.sleep(0.05)
    return False


@pytest.fixture(params=["collected", "not collected"])
def collection(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run with and without Python's collector of cycles."""
    gc.collect()
    if request.param == "not collected":
        gc.disable()
    yield
    gc.enable()


def loaded(simulator: Simulator) -> tuple[Loaded, dict[str, Any]]:
    """Load the plugin as the host does, with valves for a simulator."""
    valves = {"BASE_URL": simulator.base_url, "API_KEY": simulator.api_key}
    return load_on_a_thread("life"), valves


# The end of an instance ----------------------------------------------------------------


@pytest.mark.usefixtures("collection")
async def test_an_instance_that_is_dropped_leaves_nothing(simulator: Simulator) -> None:
    tasks, threads = pending_tasks(), threading.active_count()
    function, valves = loaded(simulator)
    await function.stream(BODY, valves=valves, metadata=CHAT)
    held = sockets(simulator)
    trace = weakref.ref(function.pipe)

    function.unload()
    del function

    assert held >= 1
    assert trace() is None
    assert await gone(simulator, tasks)
    assert threading.active_count() <= threads + 8  # the loop's own executor stays


@pytest.mark.usefixtures("collection")
async def test_a_turn_in_flight_ends_on_the_old_instance(simulator: Simulator) -> None:
    simulator.script(replies.text("Hello again.", 6, delay=0.1))
    tasks = pending_tasks()
    function, valves = loaded(simulator)
    events = pieces(await function.call(BODY, valves=valves, metadata=CHAT))
    first = await anext(events)

    function.unload()
    del function
    rest = [event async for event in events]
    del events

    assert first
    assert rest[-1]["type"] == "response.completed"
    assert await gone(simulator, tasks)


@pytest.mark.usefixtures("collection")
async def test_a_turn_that_is_stopped_leaves_nothing(simulator: Simulator) -> None:
    simulator.script(replies.text("a" * 100, 100, delay=0.1))
    tasks = pending_tasks()
    function, valves = loaded(simulator)
    events = await function.call(BODY, valves=valves, metadata=CHAT)
    assert await anext(events)

    await events.aclose()
    function.unload()
    del function, events

    assert await gone(simulator, tasks)


@pytest.mark.usefixtures("collection")
async def test_an_instance_that_never_spoke_leaves_nothing(
    simulator: Simulator,
) -> None:
    tasks = pending_tasks()
    function, _ = loaded(simulator)
    trace = weakref.ref(function.pipe)

    function.unload()
    del function
    await asyncio.sleep(0)

    assert trace() is None
    assert pending_tasks() <= tasks


async def test_a_refresh_does_not_outlive_its_runtime(simulator: Simulator) -> None:
    simulator.script(replies.http_error(500, wait=30), path="/models")
    tasks = pending_tasks()
    async with opened(simulator) as pipe:
        listing = asyncio.create_task(pipe.pipes())
        await asyncio.to_thread(simulator.wait_for, len)
        listing.cancel()
        await asyncio.wait([listing])
        during = pending_tasks() - tasks

    assert during
    assert await gone(simulator, tasks)


async def test_closing_twice_is_no_error(simulator: Simulator) -> None:
    async with opened(simulator) as pipe:
        await ask(pipe)
        await pipe._runtime.aclose()

    assert not sockets(simulator)


async def lived(pipe: plugin.Pipe) -> None:
    """Answer one chat, then close."""
    assert (await ask(pipe)).text
    await pipe._runtime.aclose()


def outlived(simulator: Simulator) -> weakref.ref[plugin.Pipe]:
    """Let a pipe live in a loop of its own until that is over."""
    pipe = plugin.Pipe()
    pipe.valves = pipe.Valves.model_validate(
        {"BASE_URL": simulator.base_url, "API_KEY": simulator.api_key}
    )
    worker = threading.Thread(target=asyncio.run, args=[lived(pipe)])
    worker.start()
    worker.join()
    return weakref.ref(pipe)


def test_an_instance_of_a_loop_that_is_over_can_be_dropped(
    simulator: Simulator,
) -> None:
    trace = outlived(simulator)
    gc.collect()

    assert trace() is None
    assert simulator.posts[0].finished


# Many ends -----------------------------------------------------------------------------


async def test_g6_many_cancelled_and_failed_turns_leave_nothing(
    simulator: Simulator,
) -> None:
    tasks = pending_tasks()
    async with opened(simulator) as pipe:
        await pipe.pipes()
        simulator.script(replies.text("a" * 50, 50, delay=0.1).times(40))

        async def begin() -> None:
            events = await answer(pipe)
            assert await anext(events)
            await events.aclose()

        await asyncio.gather(*(begin() for _ in range(40)))
        simulator.script(replies.http_error(402).times(40))
        failed = await asyncio.gather(*(ask(pipe) for _ in range(40)))
        during = pending_tasks() - tasks

    assert all(each.cards for each in failed)
    assert not during
    assert await gone(simulator, tasks)


# The log -------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])
async def test_h7_at_no_level_is_a_secret_in_the_log(
    simulator: Simulator, caplog: pytest.LogCaptureFixture, level: str
) -> None:
    before = plugin.LOG.level
    simulator.script(replies.http_error(401), replies.http_error(504))
    simulator.script(replies.http_error(500), path="/models")
    with caplog.at_level(logging.DEBUG):
        async with opened(simulator, LOG_LEVEL=level) as pipe:
            shown = [await ask(pipe), await ask(pipe)]
            now = plugin.LOG.level
    plugin.LOG.setLevel(before)

    assert now == getattr(logging, level)
    assert all(each.cards for each in shown)
    told = caplog.text + str(shown)
    assert simulator.api_key not in told
    assert "user@example.com" not in told
    ours = [r for r in caplog.records if r.name.startswith("openrouter_pipe")]
    assert bool(ours) is (level not in ("ERROR", "CRITICAL"))
