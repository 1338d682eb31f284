"""Figures of the pipe under load, against budgets.

A module of this package that defines `SCENARIOS`, functions from `Options` to rows by
their names, is found and run by `python -m tests.bench`.
"""

from __future__ import annotations

import importlib
import pkgutil

from .rows import Options, Row, Scenario

__all__ = ["Options", "Row", "Scenario", "scenarios"]


def scenarios() -> dict[str, Scenario]:
    """Return every scenario by its name."""
    names = sorted(each.name for each in pkgutil.iter_modules(__path__))
    modules = [
        importlib.import_module(f"{__name__}.{name}")
        for name in names
        if not name.startswith("_")
    ]
    found: dict[str, Scenario] = {}
    for module in modules:
        found |= getattr(module, "SCENARIOS", {})
    return found
