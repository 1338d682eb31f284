"""Tool rounds: eight calls at once here and in Open WebUI's loop, and what a round costs."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import AsyncGenerator
from importlib import import_module
from typing import Any

from tests.server import OpenWebUI
from tests.simulator import Simulator, replies
from tests.webui import PLUGIN, load, pieces

from .rows import Options, Row, Scenario, at_most, median

JSON = dict[str, Any]
MODEL = "openrouter.openai/gpt-4o"
PARALLEL_SECONDS = 1.3
ROUND_MS = 15.0
TOOLS = '''
import asyncio


class Tools:
    async def nap(self, seconds: float = 1) -> str:
        """Sleep."""
        await asyncio.sleep(seconds)
        return "slept"
'''


def parallel(options: Options) -> list[Row]:
    """Eight calls of a second each, in a real server: by the pipe and by its own loop."""
    seconds = 0.2 if options.tiny else 1.0
    took: dict[str, list[float]] = {"pipe": [], "open_webui": []}
    with Simulator() as simulator, OpenWebUI() as server:
        valves = {"BASE_URL": simulator.base_url, "API_KEY": simulator.api_key}
        admin = server.admin
        admin.install_function("openrouter", PLUGIN.read_text("utf-8"), "OpenRouter")
        form = {"id": "naps", "name": "Naps", "content": TOOLS, "meta": {}}
        admin.call("POST", "/api/v1/tools/create", form)
        for _ in range(1 if options.tiny else options.rounds):
            for execution, times in took.items():
                admin.set_valves("openrouter", {**valves, "TOOL_EXECUTION": execution})
                simulator.reset()
                calls = [("nap", {"seconds": seconds}) for _ in range(8)]
                simulator.script(replies.tool_calls(calls), replies.text("Awake."))
                admin.chat(MODEL, "Sleep.", tool_ids=["naps"])
                first, second = simulator.posts
                times.append(second.at - first.at)
    ours, theirs = (median(times) for times in took.values())
    return [
        at_most(
            "eight calls by the pipe",
            "median s",
            ours,
            PARALLEL_SECONDS - 1.0 + seconds,
        ),
        Row("eight calls by Open WebUI's loop", {"median s": theirs}, theirs / ours),
    ]


def overhead(options: Options) -> list[Row]:
    """Server CPU of a round of eight calls that take no time, without the request."""
    return asyncio.run(_overhead(options))


async def _overhead(options: Options) -> list[Row]:
    with warnings.catch_warnings(action="ignore"):
        import_module("open_webui.utils.middleware")
    rounds = 5 if options.tiny else 50
    costs: list[float] = []
    with Simulator() as simulator:
        valves = {"BASE_URL": simulator.base_url, "API_KEY": simulator.api_key}
        loaded = load("bench")
        for _ in range(1 + options.rounds):
            none = await _cpu_ms(loaded, simulator, valves, 0)
            many = await _cpu_ms(loaded, simulator, valves, rounds)
            costs.append((many - none) / rounds)
        await loaded.pipe._runtime.aclose()
    return [
        at_most("a round of eight calls", "median CPU ms", median(costs[1:]), ROUND_MS)
    ]


async def _cpu_ms(
    loaded: Any, simulator: Simulator, valves: JSON, rounds: int
) -> float:
    async def ready(x: str = "") -> str:
        return "ready"

    spec = {"name": "ready", "parameters": {"type": "object", "properties": {}}}
    tools = {"ready": {"tool_id": "bench", "callable": ready, "spec": spec}}
    simulator.reset()
    calls = replies.tool_calls([("ready", {}) for _ in range(8)])
    if rounds:
        simulator.script(calls.times(rounds))
    simulator.script(replies.text("Done."))
    body = {
        "model": "bench.openai/gpt-4o",
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [{"type": "function", "function": spec}],
        "stream": True,
    }
    begun = time.thread_time()  # the simulator has a thread of its own
    answer = await loaded.call(
        body,
        valves={**valves, "MAX_FUNCTION_CALL_LOOPS": 1000, "STREAM_INTERVAL_MS": 0},
        metadata={"chat_id": "chat-1", "message_id": "message-1"},
        __tools__=tools,
    )
    events: AsyncGenerator[Any] = pieces(answer)
    async for _ in events:
        pass
    return (time.thread_time() - begun) * 1_000


SCENARIOS: dict[str, Scenario] = {"tools": parallel, "tool-rounds": overhead}
