"""The shape of the file: its regions, its directions, its budgets."""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import black
import pytest
from black.report import NothingChanged

from tests import shape
from tests.webui import PLUGIN

ROOT = Path(__file__).parent.parent
KEYS = {
    "title",
    "author",
    "author_url",
    "description",
    "funding_url",
    "icon_url",
    "id",
    "license",
    "project_url",
    "required_open_webui_version",
    "requirements",
    "version",
}
REWRITTEN = ("from utils", "from apps", "from main", "from config")
MARKERS = ("# fmt: off", "# fmt: skip", "# fmt:off", "# fmt:skip")
FORBIDDEN_WORDS = ("helper", "manager", "utils", "maybe", "safe", "ensure")

LARGEST_FILE = 300 * 1024
LONG = 60
MOST_LONG_FUNCTIONS = 5
LONGEST_FUNCTION = 80
LARGEST_MEDIAN = 10
DEEPEST_NESTING = 4
LARGEST_MEAN_COMPLEXITY = 3.5
LARGEST_COMPLEXITY = 15
LONGEST_CLASS = 400
MOST_BROAD_HANDLERS = 8


@cache
def source() -> str:
    return PLUGIN.read_text("utf-8")


@cache
def tree() -> ast.Module:
    return ast.parse(source())


@cache
def regions() -> list[shape.Region]:
    return shape.read_regions(source())


def functions() -> dict[str, shape.Function]:
    pairs = shape.functions(tree())
    return {name: node for name, node in pairs if not isinstance(node, ast.ClassDef)}


def frontmatter() -> dict[str, str]:
    from open_webui.utils.plugin import extract_frontmatter

    return extract_frontmatter(source())


# The page -----------------------------------------------------------------------------


def test_regions_are_numbered_in_order() -> None:
    numbers = [region.number for region in regions()]

    # A number is a name: docs and tests keep theirs when a section comes or goes.
    assert numbers == sorted(set(numbers))
    assert len(numbers) > 10


def test_the_map_in_the_docstring_names_the_regions() -> None:
    docstring = ast.get_docstring(tree(), clean=False) or ""

    assert shape.read_map(docstring) == [
        (region.number, region.title) for region in regions()
    ]


def test_only_the_docstring_and_the_future_import_stand_outside_the_regions() -> None:
    outside = [
        statement
        for statement in tree().body
        if shape.region_of(regions(), statement.lineno) is None
    ]

    first = [outside.pop(0)] if outside and _is_text(outside[0]) else []
    assert first, "the file begins with its docstring"
    assert all(
        isinstance(each, ast.ImportFrom) and each.module == "__future__"
        for each in outside
    ), [ast.unparse(each) for each in outside]


def test_a_section_uses_only_sections_above_it() -> None:
    below = {
        f"{region.number:02d} uses {sorted(region.uses)}"
        for region in regions()
        if any(used >= region.number for used in region.uses)
    }

    assert not below


def test_every_reference_points_upwards_or_to_its_own_section() -> None:
    wrong: list[str] = []
    for name, line, here, there in _crossings():
        if there.number > here.number:
            wrong.append(f"line {line}: {name} is in the lower section {there.number}")

    assert not wrong


def test_every_reference_is_to_a_section_that_is_listed() -> None:
    wrong = {
        f"section {here.number:02d} uses {name} of {there.number:02d}"
        for name, _, here, there in _crossings()
        if there.number not in here.uses
    }

    assert not wrong


def test_every_section_that_is_listed_is_used() -> None:
    used = {(here.number, there.number) for _, _, here, there in _crossings()}

    idle = {
        f"section {region.number:02d} lists {number:02d} and never uses it"
        for region in regions()
        for number in region.uses
        if (region.number, number) not in used
    }

    assert not idle


def test_a_private_name_stays_in_its_section() -> None:
    wrong = {
        f"line {line}: {name} is private to section {there.number:02d}"
        for name, line, _, there in _crossings()
        if name.startswith("_")
    }

    assert not wrong


def test_within_a_section_references_point_upwards_too() -> None:
    wrong = {
        f"line {reference.line}: {reference.name} is defined at {reference.origin}"
        for reference in shape.read_references(tree())
        if reference.origin > reference.line
    }

    assert not wrong


# What the host makes of it ------------------------------------------------------------


def test_the_first_line_opens_the_frontmatter() -> None:
    assert source().splitlines()[0] == '"""'


def test_the_frontmatter_has_the_keys_it_should() -> None:
    head = frontmatter()

    assert {"title", "version", "requirements"} <= set(head) <= KEYS
    assert all(head.values())
    assert not set(head["requirements"]) & set("<>=!~"), "requirements are unpinned"


def test_the_version_is_the_projects() -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())

    assert frontmatter()["version"] == project["project"]["version"]
    assert f"[{frontmatter()['version']}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("phrase", REWRITTEN)
def test_no_text_that_the_loader_rewrites(phrase: str) -> None:
    assert phrase not in source()


@pytest.mark.parametrize("marker", MARKERS)
def test_black_is_never_switched_off(marker: str) -> None:
    assert marker not in source()


def test_black_has_nothing_to_change() -> None:
    with pytest.raises(NothingChanged):
        black.format_file_contents(source(), fast=True, mode=black.Mode())


def test_the_file_is_small_enough_to_be_compared_at_every_call() -> None:
    assert len(source().encode()) <= LARGEST_FILE


# Budgets ------------------------------------------------------------------------------


def test_few_functions_are_long_and_none_is_very_long() -> None:
    lengths = {name: shape.length(node) for name, node in functions().items()}
    long = {name: lines for name, lines in lengths.items() if lines > LONG}

    assert len(long) <= MOST_LONG_FUNCTIONS, long
    assert max(lengths.values(), default=0) <= LONGEST_FUNCTION, long


def test_the_median_function_is_short() -> None:
    assert shape.median_length(tree()) <= LARGEST_MEDIAN


def test_blocks_do_not_nest_deeply() -> None:
    deep = {name: shape.nesting(node) for name, node in functions().items()}

    assert not {k: v for k, v in deep.items() if v > DEEPEST_NESTING}


def test_functions_are_simple() -> None:
    folded, alone = shape.complexities(tree())

    assert not {k: v for k, v in folded.items() if v > LARGEST_COMPLEXITY}
    assert sum(alone) / max(len(alone), 1) <= LARGEST_MEAN_COMPLEXITY


def test_no_class_is_long() -> None:
    lengths = {
        name: shape.length(node)
        for name, node in shape.functions(tree())
        if isinstance(node, ast.ClassDef)
    }

    assert not {k: v for k, v in lengths.items() if v > LONGEST_CLASS}


def test_broad_handlers_are_few_and_each_is_explained() -> None:
    handlers = shape.broad_handlers(tree())
    lines = source().splitlines()

    unexplained = [
        handler.lineno
        for handler in handlers
        if not any(
            "#" in line for line in lines[handler.lineno - 2 : handler.body[0].lineno]
        )
    ]

    assert len(handlers) <= MOST_BROAD_HANDLERS
    assert not unexplained


def test_everything_public_has_a_docstring() -> None:
    assert not shape.undocumented(tree())


def test_everything_is_annotated() -> None:
    assert not shape.unannotated(tree())


def test_names_say_what_they_mean() -> None:
    parts = {name: name.rpartition(".")[2].lower() for name in functions()}
    classes = {
        name: name.lower()
        for name in shape.read_definitions(tree())
        if name[:1].isupper() and not name.isupper()
    }

    vague = [
        name
        for name, text in (parts | classes).items()
        if any(word in text.split("_") for word in FORBIDDEN_WORDS)
        or any(text.endswith(word) for word in ("helper", "manager", "utils"))
    ]

    assert not vague


def test_nothing_is_nonlocal() -> None:
    found = [n.lineno for n in ast.walk(tree()) if isinstance(n, ast.Nonlocal)]

    assert not found


# The measures themselves --------------------------------------------------------------

SAMPLE = '''"""
    01 First    a
    02 Second   b
"""
# region 01 First ──
# Uses: none.
def _hidden(): return late()
# endregion
# region 02 Second ──
# Uses: 01.
def late(): return _hidden()
# endregion
'''


def test_the_measures_find_what_is_wrong() -> None:
    found = shape.read_references(ast.parse(SAMPLE))
    first, second = shape.read_regions(SAMPLE)

    assert [(each.name, each.line, each.origin) for each in found] == [
        ("late", 7, 11),
        ("_hidden", 11, 7),
    ]
    assert (first.uses, second.uses) == (frozenset(), frozenset({1}))
    assert shape.read_map(SAMPLE) == [(1, "First"), (2, "Second")]


@pytest.mark.parametrize(
    "text",
    [
        "# region 01 A\n# Uses: none.\n",
        "# region 01 A\n# endregion\n",
        "# region 01 A\n# region 02 B\n",
        "  # region 01 A\n",
        "# endregion\n",
    ],
)
def test_text_that_is_no_proper_region_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="region"):
        shape.read_regions(text)


def _crossings() -> list[tuple[str, int, shape.Region, shape.Region]]:
    """Return the references from one section to another."""
    found: list[tuple[str, int, shape.Region, shape.Region]] = []
    for reference in shape.read_references(tree()):
        here = shape.region_of(regions(), reference.line)
        there = shape.region_of(regions(), reference.origin)
        if here and there and here != there:
            found.append((reference.name, reference.line, here, there))
    return found


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
