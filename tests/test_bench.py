"""The benchmark itself: that it runs, and that its figures mean what they say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.bench import Options, Row, scenarios
from tests.bench.report import save, tables, with_table
from tests.bench.rows import at_least, at_most, percentile
from tests.bench.stream import delays_ms
from tests.simulator import replies
from tests.simulator.persona import Stamped
from tests.simulator.scene import still_scene

TINY = Options(rounds=1, tiny=True)
CHEAP = ("catalog", "relay")


def test_every_module_with_scenarios_is_found() -> None:
    assert {"stream", "load", "relay", "catalog"} <= set(scenarios())


@pytest.mark.parametrize("name", CHEAP)
def test_a_scenario_gives_rows_and_a_verdict(name: str) -> None:
    rows = scenarios()[name](TINY)

    judged = [row for row in rows if row.ok is not None]
    assert judged
    assert all(row.budget for row in judged)
    assert all(row.name and (row.figures or row.ratio is not None) for row in rows)
    assert len({row.name for row in rows}) == len(rows)


def test_a_budget_is_kept_up_to_its_limit() -> None:
    assert at_most("x", "median ms", 5.0, 5).ok is True
    assert at_most("x", "median ms", 5.1, 5).ok is False
    assert at_least("x", "deltas/s", 100, 100).ok is True
    assert at_least("x", "deltas/s", 99, 100).ok is False
    assert at_most("x", "", 0.4, 0.35, is_ratio=True) == Row(
        "x", {}, 0.4, "at most 0.35x", False
    )


def test_a_percentile_is_a_value_that_was_measured() -> None:
    assert percentile([], 95) == 0
    assert percentile([3, 1, 2], 95) == 3
    assert percentile(list(range(100)), 95) == 95


def test_a_delay_is_counted_from_the_sending_to_the_whole_text() -> None:
    # Delta 1 says when delta 0 went out, delta 2 when delta 1 did.
    pieces = [(10.010, "0@9.0 "), (10.050, "1@10.000 2@10."), (10.060, "020 ")]

    assert delays_ms(pieces) == pytest.approx([10, 30])


def test_the_simulator_stamps_each_delta_with_the_one_before() -> None:
    stamped = Stamped(3)
    reply = replies.text(deltas=stamped)
    scene = still_scene({"model": "openai/gpt-4o", "stream": True})
    data = b"".join(chunk for _, chunk in reply.chunks(scene)).decode()

    numbers, times = zip(*(text.strip().split("@") for text in stamped), strict=True)
    assert numbers == ("0", "1", "2")
    assert sorted(times) == list(times)
    assert data.count(json.dumps("".join(stamped))) == 4  # done, done, done, completed
    assert stamped[1:] == [stamped[1], stamped[2]]


def test_rows_become_tables_json_and_a_page(tmp_path: Path) -> None:
    rows = [
        Row("first", {"CPU s": 0.5, "events": 1234}),
        Row("second", {"CPU s": 0.25}, 0.5),
        at_most("cost", "", 0.5, 0.4, is_ratio=True),
    ]

    shown = tables(rows)
    assert "1,234" in shown
    assert "0.50x" in shown
    assert "**no**" in shown
    assert len({len(line) for line in shown.partition("\n\n")[0].splitlines()}) == 1

    saved = json.loads(save("some", rows, tmp_path).read_text("utf-8"))
    assert saved["rows"] == [dataclasses.asdict(row) for row in rows]

    page = "# Page\n\n<!-- bench some -->\nold\n<!-- end some -->\n\nAfter\n"
    renewed = with_table(page, "some", rows)
    assert "old" not in renewed
    assert shown in renewed
    assert renewed.endswith("After\n")
    assert with_table(renewed, "some", rows) == renewed
    assert "## other" in with_table(renewed, "other", rows)
