"""Measure the pipe: `python -m tests.bench [scenario ...]`.

Prints tables, says which budgets are missed, and writes bench-results/*.json. Fails
only when a scenario cannot run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Generator
from pathlib import Path
from types import FrameType

from tests.server import SLIM

from . import Options, Row, Scenario, scenarios
from .report import PAGE, machine, save, tables, with_table


def main() -> int:
    """Run the command line."""
    known = scenarios()
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("names", nargs="*", metavar="scenario", help=", ".join(known))
    parser.add_argument("--rounds", type=int, default=Options.rounds)
    parser.add_argument("--tiny", action="store_true", help="only see that it works")
    parser.add_argument("--docs", action="store_true", help="renew docs/benchmarks.md")
    given = parser.parse_args()
    if unknown := set(given.names) - set(known):
        parser.error(
            f"no scenario {', '.join(sorted(unknown))}; there are {', '.join(known)}"
        )
    signal.signal(signal.SIGTERM, _leave)
    options = Options(given.rounds, given.tiny)
    names: list[str] = given.names or list(known)
    with _home():
        results = _measured({name: known[name] for name in names}, options)
    if given.docs:
        _renew(results)
    _tell_missed(results)
    return 0 if len(results) == len(names) else 1


def _measured(wanted: dict[str, Scenario], options: Options) -> dict[str, list[Row]]:
    """Run scenarios, and return the rows of those that could."""
    results: dict[str, list[Row]] = {}
    for name, scenario in wanted.items():
        print(f"\n## {name}  {machine()}\n", flush=True)
        try:
            results[name] = scenario(options)
        except Exception:  # the others are worth running all the same
            traceback.print_exc()
            continue
        print(tables(results[name]), flush=True)
        save(name, results[name])
    return results


@contextlib.contextmanager
def _home() -> Generator[None]:
    """Let the host's modules, if a scenario imports them here, find an empty home."""
    with tempfile.TemporaryDirectory(prefix="open-webui-bench-") as home:
        folders = {"DATA_DIR": f"{home}/data", "STATIC_DIR": f"{home}/static"}
        for folder in folders.values():
            Path(folder).mkdir()
        os.environ.update(SLIM, **folders, GLOBAL_LOG_LEVEL="ERROR")
        os.environ["FROM_INIT_PY"] = "true"  # as `open-webui serve` says it
        yield


def _renew(results: dict[str, list[Row]]) -> None:
    page = PAGE.read_text("utf-8")
    for name, rows in results.items():
        page = with_table(page, name, rows)
    PAGE.write_text(page, "utf-8")


def _tell_missed(results: dict[str, list[Row]]) -> None:
    missed = [
        f"{name}: {row.name} ({row.budget})"
        for name, rows in results.items()
        for row in rows
        if row.ok is False
    ]
    print("\nMissed budgets:" if missed else "\nEvery budget is kept.")
    print("".join(f"  {line}\n" for line in missed), end="", flush=True)


def _leave(number: int, frame: FrameType | None) -> None:
    """End by an exception, so that everything started here is stopped."""
    raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(main())
