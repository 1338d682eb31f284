"""Rows as tables on a terminal, in JSON files and in the page of the docs."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .rows import Figure, Row

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "bench-results"
PAGE = ROOT / "docs" / "benchmarks.md"


def shown(value: Figure | None) -> str:
    """Return a figure with as many digits as say something."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    digits = 0 if isinstance(value, int) or abs(value) >= 100 else 1
    digits = 3 if 0 < abs(value) < 1 else 2 if 0 < abs(value) < 10 else digits
    return f"{value:,.{digits}f}"


def verdict(row: Row) -> str:
    """Return whether a budget is kept."""
    return {None: "", True: "yes", False: "**no**"}[row.ok]


def table(rows: Sequence[Row]) -> str:
    """Return rows as a table that Markdown draws and a terminal shows well."""
    keys = list(dict.fromkeys(key for row in rows for key in row.figures))
    has_ratio = any(row.ratio is not None for row in rows)
    has_budget = any(row.budget for row in rows)
    head = ["", *keys, *(["ratio"] * has_ratio), *(["budget", "kept"] * has_budget)]
    lines = [head]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        lines.append(
            [
                row.name,
                *(shown(row.figures.get(key)) for key in keys),
                *([ratio] * has_ratio),
                *([row.budget, verdict(row)] * has_budget),
            ]
        )
    return _aligned(lines, words=1, tail=2 * has_budget)


def tables(rows: Sequence[Row]) -> str:
    """Return what was measured and what is asked of it, each as a table of its own."""
    groups = ([r for r in rows if r.ok is None], [r for r in rows if r.ok is not None])
    return "\n\n".join(table(group) for group in groups if group)


def _aligned(lines: list[list[str]], words: int, tail: int) -> str:
    """Return cells in columns: words to the left, figures to the right."""
    widths = [max(map(len, column), default=0) for column in zip(*lines, strict=True)]
    last = len(widths) - tail
    rendered: list[str] = []
    for number, line in enumerate(lines):
        cells = [
            cell.rjust(width) if words <= place < last else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        rendered.append(f"| {' | '.join(cells)} |")
        if number == 0:
            rules = [
                "-" * (width + 1) + ("-" if not words <= place < last else ":")
                for place, width in enumerate(widths)
            ]
            rendered.append(f"|{'|'.join(rules)}|")
    return "\n".join(rendered)


def machine() -> dict[str, Figure]:
    """Return where and when this was measured."""
    return {
        "at": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "python": platform.python_version(),
        "cores": os.cpu_count() or 0,
        "load": round(os.getloadavg()[0], 2),
    }


def save(name: str, rows: Sequence[Row], folder: Path = RESULTS) -> Path:
    """Write a scenario's rows as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    value = {"scenario": name, **machine(), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    return path


def with_table(page: str, name: str, rows: Sequence[Row]) -> str:
    """Return the page with the table between a scenario's two marks made anew."""
    begin, end = f"<!-- bench {name} -->", f"<!-- end {name} -->"
    made = f"{begin}\n\n{tables(rows)}\n\n{end}"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(page):
        return f"{page.rstrip()}\n\n## {name}\n\n{made}\n"
    return pattern.sub(lambda _: made, page)
