"""The documentation is complete, and what it lists is true.

Some parts of the pages are made from the code: `UPDATE_DOCS=1 make test
ARGS=tests/test_docs.py` writes them anew.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tests.shape import read_map
from tests.simulator.persona import PROMPTS
from tests.webui import PLUGIN, load

ROOT = PLUGIN.parent.parent
DOCS = ROOT / "docs"
PAGES = (*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md")))
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
HOW = "UPDATE_DOCS=1 make test ARGS=tests/test_docs.py"

SOURCE = PLUGIN.read_text("utf-8")
HEAD = ast.get_docstring(ast.parse(SOURCE), clean=False) or ""
SECTIONS = [
    (number, name, line.split(maxsplit=2)[2])
    for number, name in read_map(HEAD)
    for line in HEAD.splitlines()
    if line.startswith(f"    {number:02} {name} ")
]

# Environment variables that pages may name beside the valves.
OTHER_DEFAULTS = {"GLOBAL_LOG_LEVEL", "OPENROUTER_API_BASE_URL", "OPENROUTER_API_KEY"}
OTHER_NAMES = OTHER_DEFAULTS | {
    "DATABASE_URL",
    "OPEN_WEBUI",
    "REDIS_URL",
    "UPDATE_DOCS",
    "UPDATE_SCREENSHOTS",
    "UVICORN_WORKERS",
    "WEBSOCKET_MANAGER",
    "WEBSOCKET_REDIS_URL",
    "WEBUI_SECRET_KEY",
}


@pytest.fixture(scope="module")
def plain() -> Iterator[ModuleType]:
    """Return the plugin as it is where no environment variable changes a default."""
    with pytest.MonkeyPatch.context() as patch:
        for name in OTHER_DEFAULTS:
            patch.delenv(name, raising=False)
        yield load("openrouter_docs").module


# What is made from the code


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _table(heads: str, rows: list[tuple[str, ...]]) -> str:
    names = heads.split(", ")
    lines = [_row(*names), "|" + "---|" * len(names), *(_row(*row) for row in rows)]
    return "\n".join(lines)


def _groups(settings: type[BaseModel]) -> list[type[BaseModel]]:
    """Return the classes that declare valves, in the order of the admin page."""
    own = [c for c in reversed(settings.__mro__) if "__annotations__" in vars(c)]
    fields = list(settings.model_fields)
    owners = {n: c for c in own for n in vars(c)["__annotations__"] if n in fields}
    return list(dict.fromkeys(owners[name] for name in fields))


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return f"`{value}`" if value not in ("", None) else "empty"


def _values(schema: dict[str, Any]) -> str:
    """Return what a valve accepts, in words."""
    if choices := schema.get("enum"):
        return ", ".join(f"`{choice}`" for choice in choices)
    least, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    most = schema.get("maximum")
    low = f"above {above}" if above is not None else f"from {least}"
    if least is None and above is None:
        low = ""
    high = f"{'up ' if low else 'Up '}to {most}" if most is not None else ""
    limits = " ".join(filter(None, (low, high)))
    return limits or {"boolean": "on or off"}.get(schema.get("type", ""), "text")


def _valve_tables(settings: type[BaseModel]) -> str:
    properties = settings.model_json_schema()["properties"]
    parts: list[str] = []
    for group in _groups(settings):
        rows = [
            (
                f"`{name}`",
                _default(settings.model_fields[name]),
                _values(properties[name]),
                settings.model_fields[name].description or "",
            )
            for name in settings.model_fields
            if name in vars(group)["__annotations__"]
        ]
        title = (group.__doc__ or "").strip().splitlines()[0]
        table = _table("Valve, Default, Values, What it does", rows)
        parts.append(f"### {title.rstrip('.')}\n\n{table}")
    return "\n\n".join(parts)


def make_valves(plugin: ModuleType) -> str:
    parts = [_valve_tables(plugin.Pipe.Valves)]
    if hasattr(plugin.Pipe, "UserValves"):
        parts += ["## What a user may set", _valve_tables(plugin.Pipe.UserValves)]
    return "\n\n".join(parts)


def _errors(kind: type[Any]) -> Iterator[type[Any]]:
    for sub in kind.__subclasses__():
        yield sub
        yield from _errors(sub)


def make_errors(plugin: ModuleType) -> str:
    vague = {plugin.PipeError.happened, plugin.Incomplete.happened}
    rows = [
        (
            f"`{error.code}`",
            str(error.status),
            error.happened,
            error.advice,
            "yes" if error.retryable else "no",
        )
        for error in _errors(plugin.PipeError)
        if error.happened not in vague
    ]
    heads = "Code, Status, What happened, What to do, Sent again"
    return _table(heads, rows)


def make_sections(_plugin: ModuleType) -> str:
    rows = [
        (f"[{number:02} {name}]({number:02}-{name.lower()}.md)", about)
        for number, name, about in SECTIONS
    ]
    return _table("Section, What it holds", rows)


def make_prompts(_plugin: ModuleType) -> str:
    rows = [(prompt.name, f"`{prompt.prompt}`", prompt.shows) for prompt in PROMPTS]
    return _table("What, Type this, What it shows", rows)


MADE: list[tuple[str, str, Callable[[ModuleType], str]]] = [
    ("docs/02-settings.md", "valves", make_valves),
    ("docs/03-errors.md", "errors", make_errors),
    ("docs/README.md", "sections", make_sections),
    ("README.md", "prompts", make_prompts),
    ("docs/simulator.md", "prompts", make_prompts),
]


def _block(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- made: {name} -->\n).*?(<!-- end -->)", re.DOTALL)


@pytest.mark.parametrize(("page", "name", "make"), MADE)
def test_what_is_made_from_the_code_is_up_to_date(
    plain: ModuleType, page: str, name: str, make: Callable[[ModuleType], str]
) -> None:
    path = ROOT / page
    text = path.read_text("utf-8")
    assert len(_block(name).findall(text)) == 1

    made = _block(name).sub(
        lambda found: f"{found[1]}\n{make(plain)}\n\n{found[2]}", text
    )

    if os.environ.get("UPDATE_DOCS") == "1":
        path.write_text(made, "utf-8")
    else:
        assert text == made, f"renew it: {HOW}"


@pytest.mark.parametrize("name", ["Valves", "UserValves"])
def test_every_valve_is_described(plain: ModuleType, name: str) -> None:
    text = (DOCS / "02-settings.md").read_text("utf-8")
    valves = getattr(plain.Pipe, name, None)
    for valve, field in (valves.model_fields if valves else {}).items():
        cell = field.description.replace("|", "\\|")
        assert f"| `{valve}` | {_default(field)} |" in text
        assert field.description
        assert cell in text


# What is written by hand


@pytest.mark.parametrize(("number", "name"), [(n, name) for n, name, _ in SECTIONS])
def test_every_section_has_a_page(number: int, name: str) -> None:
    page = DOCS / f"{number:02}-{name.lower()}.md"

    assert page.exists(), f"write {page.relative_to(ROOT)}"
    assert page.read_text("utf-8").startswith(f"# {number:02} {name}\n")


def test_the_index_leads_to_every_page() -> None:
    index = (DOCS / "README.md").read_text("utf-8")

    for page in DOCS.glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


def _anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    text = page.read_text("utf-8")
    code = "\n".join(a or b for a, b in _code(text))

    for target in re.findall(r"\bmake (?:[A-Z]\w*=\S+ )*([a-z][\w-]*)", code):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for module in re.findall(r"python -m (tests[\w.]*)", code):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or path.is_dir(), module


def _code(text: str) -> list[tuple[str, str]]:
    return re.findall(r"`([^`\n]+)`|^ {4,}(.+)$", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_tests_that_are_named_exist(page: Path) -> None:
    for path, name in re.findall(
        r"`?(tests/[\w/]+\.py)(?:::(\w+))?", page.read_text("utf-8")
    ):
        assert (ROOT / path).exists(), path
        assert not name or f"def {name}(" in (ROOT / path).read_text("utf-8"), name


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_names_in_capitals_are_valves_or_variables(
    plain: ModuleType, page: Path
) -> None:
    known = OTHER_NAMES | set(plain.Pipe.Valves.model_fields)
    if hasattr(plain.Pipe, "UserValves"):
        known |= set(plain.Pipe.UserValves.model_fields)

    for name in re.findall(r"`([A-Z]{2,}(?:_[A-Z]+)+)`", page.read_text("utf-8")):
        assert name in known, f"{name} is neither a valve nor a variable"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_no_page_points_to_lines(page: Path) -> None:
    assert not re.search(r"\.py:\d|#L\d", page.read_text("utf-8"))


def test_the_version_is_in_the_changelog(plain: ModuleType) -> None:
    version = re.search(r"^version: (\S+)$", HEAD, re.MULTILINE)
    assert version

    assert f"## [{version[1]}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_pictures_are_light() -> None:
    pictures = list((DOCS / "images").glob("*.png"))

    assert pictures
    assert all(picture.stat().st_size < 300_000 for picture in pictures)


# Tables of single pages


def _table_rows(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading."""
    text = (DOCS / page).read_text("utf-8").partition(f"\n## {heading}\n")[2]
    lines = [line for line in text.split("\n## ")[0].splitlines() if line[:1] == "|"]
    assert len(lines) > 2, f"{page} has no table under {heading}"
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]
    ]


def _codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


REQUEST_ROWS = _table_rows("14-request.md", "Translated")


@pytest.mark.parametrize(("given", "sent"), REQUEST_ROWS)
def test_parameters_are_translated_as_the_page_says(
    plain: ModuleType, given: str, sent: str
) -> None:
    card = plain.ModelCard("a/b", "B", reasons=True, efforts=None)
    body = json.loads(_codes(given)[0])
    wanted = json.loads(_codes(sent)[0])

    request = plain.build_request(body, card, plain.ChatInput("", [], ()))

    for name in body.keys() - wanted.keys():
        assert name not in request
    assert {name: request.get(name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("heading", "constant"),
    [
        ("Sent where the model has them", "_SAMPLING"),
        ("Sent as they are", "_AS_THEY_ARE"),
    ],
)
def test_parameters_that_pass_are_all_on_the_page(
    plain: ModuleType, heading: str, constant: str
) -> None:
    text = (DOCS / "14-request.md").read_text("utf-8").partition(f"## {heading}\n")[2]

    listed = _codes(text.split("\n## ")[0])

    assert sorted(listed) == sorted(getattr(plain, constant))


def test_every_event_has_a_row(plain: ModuleType) -> None:
    rows = _table_rows("15-relay.md", "Events")
    listed = [name for events, _ in rows for name in _codes(events)]

    assert sorted(listed) == sorted(plain.Relay.HANDLERS)
    for events, what in rows:
        handlers = {plain.Relay.HANDLERS[name].__name__ for name in _codes(events)}
        assert (handlers == {"_nothing"}) == what.startswith("nothing"), events
