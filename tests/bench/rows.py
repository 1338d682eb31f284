"""What a scenario is given and what it returns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Figure = float | int | str


@dataclass(frozen=True)
class Options:
    """How thoroughly to measure."""

    rounds: int = 3  # of everything that is compared, in turn
    tiny: bool = False  # only try whether the scenario works


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a scenario's table.

    `ratio` compares with the first way of doing the same; `ok` is None where there is
    no budget.
    """

    name: str
    figures: Mapping[str, Figure] = field(default_factory=dict[str, Figure])
    ratio: float | None = None
    budget: str = ""
    ok: bool | None = None


Scenario = Callable[[Options], list[Row]]


def at_most(
    name: str, figure: str, value: float, limit: float, *, is_ratio: bool = False
) -> Row:
    """Return a row whose value must not be larger than a limit."""
    unit = "x" if is_ratio else figure.rpartition(" ")[2]
    return Row(
        name,
        {} if is_ratio else {figure: value},
        value if is_ratio else None,
        f"at most {limit:g}{'' if is_ratio else ' '}{unit}",
        value <= limit,
    )


def at_least(name: str, figure: str, value: float, limit: float) -> Row:
    """Return a row whose value must not be smaller than a limit."""
    unit = figure.rpartition(" ")[2]
    return Row(
        name, {figure: value}, None, f"at least {limit:,.0f} {unit}", value >= limit
    )


def median(values: Sequence[float]) -> float:
    """Return the middle value; 0 of none."""
    return statistics.median(values) if values else 0.0


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that so many percent do not exceed; 0 of none."""
    ranked = sorted(values)
    if not ranked:
        return 0.0
    return ranked[min(len(ranked) - 1, int(len(ranked) * percent / 100))]
