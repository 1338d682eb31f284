"""Listing the models: Open WebUI asks at every reload of its page."""

from __future__ import annotations

import asyncio
import time

from tests.simulator import Simulator
from tests.simulator.catalog import build_rows
from tests.webui import load

from .rows import Options, Row, Scenario, at_most, median, percentile

MODELS = 450
BUDGET_MS = 5.0


def measure(options: Options) -> list[Row]:
    """Measure one cold listing and many warm ones."""
    count = 20 if options.tiny else MODELS
    return asyncio.run(_measure(count, 5 if options.tiny else 200))


async def _measure(count: int, calls: int) -> list[Row]:
    with Simulator(models=some_rows(count)) as simulator:
        loaded = load("bench", publish=False)
        loaded.set_valves({"BASE_URL": simulator.base_url, "API_KEY": "sk-or-v1-bench"})
        took: list[float] = []
        models: list[dict[str, str]] = []
        for _ in range(calls + 1):
            began = time.perf_counter()
            models = await loaded.pipe.pipes()
            took.append((time.perf_counter() - began) * 1_000)
        await loaded.pipe._runtime.aclose()
        cold, *warm = took
    figures = {"models": len(models), "median ms": median(warm)}
    figures |= {"p95 ms": percentile(warm, 95), "cold ms": cold}
    warm_row = at_most("pipes(), warm", "median ms", median(warm), BUDGET_MS)
    return [Row("pipes()", figures), warm_row]


def some_rows(count: int) -> list[dict[str, object]]:
    """Return so many models that chat, the simulator's own again and again."""
    rows = [
        row
        for row in build_rows()
        if row["architecture"]["output_modalities"] == ["text"]
        and not row.get("alias_target")
        and ":" not in row["id"]
    ]
    return [
        {**row, "id": f"{row['id']}-{turn}" if turn else row["id"]}
        for number in range(count)
        for turn, row in [(number // len(rows), rows[number % len(rows)])]
    ]


SCENARIOS: dict[str, Scenario] = {"catalog": measure}
