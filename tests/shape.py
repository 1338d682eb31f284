"""Measure one Python file: its regions, its references, its functions."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from radon.complexity import cc_visit_ast

REGION = re.compile(r"^# region (\d\d) (\w+)\b")
USES = re.compile(r"^# Uses: ([^.]*)\.")
MAP_LINE = re.compile(r"^ {4}(\d\d) (\w+) {2,}\S")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.ClassDef | Function
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITION = (ast.ClassDef, *FUNCTION)
BLOCK = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.With,
    ast.AsyncWith,
    ast.Try,
    ast.TryStar,
    ast.Match,
)


@dataclass(frozen=True, slots=True)
class Region:
    """One section of the file, its first and last line included."""

    number: int
    title: str
    first: int
    last: int
    uses: frozenset[int]


@dataclass(frozen=True, slots=True)
class Reference:
    """A name of the file used in another of its top-level statements."""

    name: str
    line: int
    origin: int


def read_regions(source: str) -> list[Region]:
    """Return the regions in order; text that is no proper region raises."""
    regions: list[Region] = []
    opened: tuple[int, str, int] | None = None
    uses: frozenset[int] | None = None
    for number, line in enumerate(source.splitlines(), 1):
        if match := REGION.match(line):
            if opened:
                raise ValueError(f"line {number}: a region inside a region")
            opened, uses = (int(match[1]), match[2], number), None
        elif opened and (match := USES.match(line)) and uses is None:
            uses = _numbers(match[1])
        elif line.startswith("# endregion"):
            if opened is None or uses is None:
                raise ValueError(f"line {number}: no region, or no `Uses:` in it")
            regions.append(Region(*opened, number, uses))
            opened = None
        elif line.lstrip().startswith(("# region", "# endregion")):
            raise ValueError(f"line {number}: not a proper region line")
    if opened:
        raise ValueError(f"region {opened[0]:02d} does not end")
    return regions


def read_map(docstring: str) -> list[tuple[int, str]]:
    """Return the numbers and titles in the table of contents."""
    matches = (MAP_LINE.match(line) for line in docstring.splitlines())
    return [(int(match[1]), match[2]) for match in matches if match]


def read_definitions(tree: ast.Module) -> dict[str, int]:
    """Return the names that the module defines itself, and their first lines."""
    names: dict[str, int] = {}
    for statement in tree.body:
        for inner in _flatten([statement]):
            for name in _bound(inner):
                names.setdefault(name, statement.lineno)
    return names


def read_references(tree: ast.Module) -> list[Reference]:
    """Return every use of a top-level name outside the statement that defines it."""
    defined = read_definitions(tree)
    found: list[Reference] = []

    def visit(node: ast.AST, home: int, local: frozenset[str]) -> None:
        if isinstance(node, FUNCTION):
            local |= _locals(node)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            origin = defined.get(node.id)
            if origin is not None and origin != home and node.id not in local:
                found.append(Reference(node.id, node.lineno, origin))
        for child in ast.iter_child_nodes(node):
            visit(child, home, local)

    for statement in tree.body:
        visit(statement, statement.lineno, frozenset())
    return found


def region_of(regions: list[Region], line: int) -> Region | None:
    """Return the region that a line stands in."""
    return next((r for r in regions if r.first <= line <= r.last), None)


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Yield every class, function and closure with its dotted name."""
    for child in ast.iter_child_nodes(tree):
        name = prefix
        if isinstance(child, DEFINITION):
            name = f"{prefix}{child.name}"
            yield name, child
            name += "."
        yield from functions(child, name)


def length(node: Definition) -> int:
    """Return the lines from the keyword to the end, docstring included."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def nesting(node: ast.AST) -> int:
    """Return how deep blocks nest in a function; an `elif` chain is one block."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTION):
            continue  # a closure is measured by itself
        chained = (
            isinstance(node, ast.If)
            and isinstance(child, ast.If)
            and child in node.orelse
        )
        step = isinstance(child, BLOCK) and not chained
        deepest = max(deepest, nesting(child) + step)
    return deepest


def complexities(tree: ast.Module) -> tuple[dict[str, int], list[int]]:
    """Return radon's complexity with closures folded in by name, and each alone."""
    folded: dict[str, int] = {}
    alone: list[int] = []

    def visit(block: Any, prefix: str) -> int:
        name = f"{prefix}{block.name}"
        alone.append(block.complexity)
        inner = sum(visit(each, f"{name}.") for each in block.closures)
        folded[name] = block.complexity + inner
        return folded[name]

    def visit_class(block: Any) -> None:
        for method in block.methods:
            visit(method, f"{block.name}.")
        for each in block.inner_classes:
            visit_class(each)

    for block in cc_visit_ast(tree):
        if block.letter == "C":
            visit_class(block)
        elif block.letter == "F":  # methods come with their class
            visit(block, "")
    return folded, alone


def median_length(tree: ast.Module) -> float:
    """Return the median length of the functions."""
    lengths = [length(n) for _, n in functions(tree) if isinstance(n, FUNCTION)]
    return statistics.median(lengths or [0])


def undocumented(tree: ast.Module) -> list[str]:
    """Return the public definitions without a docstring."""
    return [
        name
        for name, node in _public(tree)
        if not ast.get_docstring(node) and not name.endswith("__")
    ]


def unannotated(tree: ast.Module) -> list[str]:
    """Return the functions with a parameter or a result that has no annotation."""
    return [
        name
        for name, node in functions(tree)
        if isinstance(node, FUNCTION) and not _is_annotated(node)
    ]


def broad_handlers(tree: ast.Module) -> list[ast.ExceptHandler]:
    """Return the handlers that catch `Exception`, everything, or more."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and _is_broad(node)
    ]


def _numbers(text: str) -> frozenset[int]:
    """Return the sections of a `Uses:` line: `01 03`, `01, 03`, `01-06`, or a dash."""
    numbers: set[int] = set()
    for match in re.finditer(r"(\d\d)(?:\s*[-\u2013]\s*(\d\d))?", text):
        numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(numbers)


def _flatten(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements, looking through `if` and `try`."""
    for statement in body:
        yield statement
        if isinstance(statement, (ast.If, ast.Try)):
            yield from _flatten(statement.body)
            yield from _flatten(statement.orelse)
        if isinstance(statement, ast.Try):
            yield from _flatten(statement.finalbody)
            for handler in statement.handlers:
                yield from _flatten(handler.body)


def _bound(statement: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement defines here (imports are not ours)."""
    if isinstance(statement, DEFINITION):
        yield statement.name
    elif isinstance(statement, ast.Assign):
        for target in statement.targets:
            yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))
    elif isinstance(statement, ast.AnnAssign) and isinstance(
        statement.target, ast.Name
    ):
        yield statement.target.id


def _locals(node: Function) -> frozenset[str]:
    """Return the names that a function binds, which hide the module's."""
    names = {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
    stored = {
        n.id
        for n in ast.walk(node)
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    return frozenset(names | stored)


def _public(
    node: ast.Module | ast.ClassDef, prefix: str = ""
) -> Iterator[tuple[str, Definition]]:
    """Yield definitions with no underscore on the path to them; no closures."""
    for child in _flatten(node.body):
        if isinstance(child, DEFINITION) and not child.name.startswith("_"):
            yield f"{prefix}{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from _public(child, f"{prefix}{child.name}.")


def _is_annotated(node: Function) -> bool:
    """Say whether all parameters and the result are annotated."""
    args = node.args
    given = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
    typed = all(
        arg.annotation is not None
        for arg in given
        if arg is not None and arg.arg not in {"self", "cls"}
    )
    return typed and (node.returns is not None or node.name == "__init__")


def _is_broad(handler: ast.ExceptHandler) -> bool:
    """Say whether a handler catches everything."""
    kind = handler.type
    caught = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    names = {getattr(each, "id", None) for each in caught}
    return kind is None or bool(names & {"Exception", "BaseException"})
