"""Loading the file where everything that Open WebUI imports is there already."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.server import SLIM
from tests.webui import PLUGIN, load

from .rows import Options, Row, Scenario, at_most, median

BUDGET_MS = 150.0
BUDGET_MB = 10.0
MEGABYTE = 1 << 20
_MARK = "measured:"  # among what the host prints while it is imported


def measure(options: Options) -> list[Row]:
    """Load in several processes that are forked behind the host's imports."""
    times = 1 if options.tiny else 3 * options.rounds
    with tempfile.TemporaryDirectory(prefix="open-webui-bench-") as home:
        for folder in ("data", "static"):
            Path(home, folder).mkdir()
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(times)],
            env={
                **os.environ,
                **SLIM,
                "DATA_DIR": f"{home}/data",
                "STATIC_DIR": f"{home}/static",
                "GLOBAL_LOG_LEVEL": "ERROR",
                "FROM_INIT_PY": "true",  # as `open-webui serve` says it
            },
            cwd=PLUGIN.parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    pairs = [json.loads(line.removeprefix(_MARK)) for line in lines]
    source = PLUGIN.read_bytes()
    return [
        Row(
            "the file",
            {
                "lines": source.count(b"\n"),
                "KB": len(source) / 1_000,
                "MB while it is compiled": median([each[1] for each in pairs]),
            },
        ),
        at_most(
            "time to load", "median ms", median([each[0] for each in pairs]), BUDGET_MS
        ),
        at_most(
            "memory that stays",
            "median MB",
            median([each[2] for each in pairs]),
            BUDGET_MB,
        ),
    ]


def load_in_children(times: int) -> None:
    """Import the host, then load in one fork after the other and print the figures."""
    importlib.import_module("open_webui.main")
    gc.collect()
    for _ in range(times):
        child = os.fork()
        if child == 0:
            _load_once()
        os.waitpid(child, 0)


def _load_once() -> None:
    """Print a load's milliseconds, its megabytes and those that stay, and leave."""
    process = psutil.Process()
    before, began = process.memory_info().rss, time.perf_counter()
    loaded = load("bench", publish=False)
    took = (time.perf_counter() - began) * 1_000
    grown = (process.memory_info().rss - before) / MEGABYTE
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # no such call beside glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    kept = (process.memory_info().rss - before) / MEGABYTE
    print(_MARK, json.dumps([took, grown, kept]), flush=True)
    del loaded
    os._exit(0)


SCENARIOS: dict[str, Scenario] = {"load": measure}

if __name__ == "__main__":
    load_in_children(int(sys.argv[1]))
