"""13 Tools: strict schemas, what is offered, arguments, who runs a call."""

from __future__ import annotations

import asyncio
import json
import random
from importlib import import_module
from types import SimpleNamespace as Client
from typing import Any

import pytest

from open_webui_openrouter_pipe import open_webui_openrouter_pipe as plugin

JSON = dict[str, Any]
VALIDATOR: Any = import_module("jsonschema").Draft202012Validator


def is_valid(value: Any, schema: JSON) -> bool:
    return bool(VALIDATOR(schema).is_valid(value))


def strict(schema: JSON) -> JSON:
    written = plugin.strict_schema(schema)
    assert written is not None
    VALIDATOR.check_schema(written)
    return written


def an_object(**properties: Any) -> JSON:
    return {"type": "object", "properties": properties}


def filled(value: Any, schema: JSON, root: JSON) -> Any:
    """Fill in null for what a value leaves out, as a model in strict mode does."""
    reached = plugin._branch(schema, value, root)
    if isinstance(value, list):
        return [filled(one, reached["items"], root) for one in value]
    if not isinstance(value, dict):
        return value
    properties = reached.get("properties", {})
    whole: JSON = dict.fromkeys(properties) | value
    return {name: filled(whole[name], properties.get(name, {}), root) for name in whole}


# Strict schemas

TREE: JSON = {
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/node"}},
    "required": ["root"],
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["name"],
        }
    },
}
# A schema, a value that it accepts, and one that stays wrong.
CASES: dict[str, tuple[JSON, Any, Any]] = {
    "optional": (an_object(a={"type": "string"}), {}, {"a": 1}),
    "required": (
        an_object(a={"type": "string"}) | {"required": ["a"]},
        {"a": "x"},
        {"a": None},
    ),
    "nested": (
        an_object(a=an_object(b={"type": "integer"})),
        {"a": {}},
        {"a": {"b": "x"}},
    ),
    "enum": (an_object(a={"enum": ["x", "y"]}), {"a": "y"}, {"a": "z"}),
    "typed enum": (an_object(a={"type": "string", "enum": ["x"]}), {}, {"a": "z"}),
    "const": (an_object(a={"const": 5}), {"a": 5}, {"a": 6}),
    "any of": (
        an_object(a={"anyOf": [{"type": "string"}, an_object(b={"type": "number"})]}),
        {"a": {"b": 1.5}},
        {"a": 3},
    ),
    "one of": (
        an_object(a={"oneOf": [{"type": "string"}, {"type": "null"}]}),
        {"a": "x"},
        {"a": 3},
    ),
    "all of one": (
        an_object(a={"allOf": [{"type": "string"}], "description": "A"}),
        {"a": "x"},
        {"a": 3},
    ),
    "lists in lists": (
        an_object(
            a={
                "type": "array",
                "items": {"type": "array", "items": an_object(b={"type": "string"})},
            }
        ),
        {"a": [[{}], [{"b": "x"}]]},
        {"a": [[{"b": 1}]]},
    ),
    "several types": (
        an_object(a={"type": ["string", "integer"], "default": 3}),
        {"a": 4},
        {"a": []},
    ),
    "references": (
        TREE,
        {"root": {"name": "x", "children": [{"name": "y"}]}},
        {"root": {}},
    ),
    "openapi nullable": (
        an_object(a={"type": "string", "nullable": True}),
        {"a": "x"},
        {"a": 1},
    ),
    "no properties": ({"type": "object", "properties": {}}, {}, {"a": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_was_valid_is_valid_in_strict_mode_up_to_nulls(name: str) -> None:
    schema, right, wrong = CASES[name]
    written = strict(schema)
    full = filled(right, written, written)

    assert is_valid(right, schema)
    assert is_valid(full, written)
    assert plugin.without_nulls(full, schema, schema) == right
    assert not is_valid(filled(wrong, written, written), written)


@pytest.mark.parametrize("name", CASES)
def test_in_strict_mode_objects_are_closed_and_everything_is_required(
    name: str,
) -> None:
    def check(node: Any) -> None:
        if isinstance(node, dict):
            if "properties" in node and "type" in node:
                assert node["additionalProperties"] is False
                assert node["required"] == list(node["properties"])
            for value in node.values():
                check(value)
        for value in node if isinstance(node, list) else []:
            check(value)

    schema = CASES[name][0]
    before = json.dumps(schema)
    check(strict(schema))
    assert json.dumps(schema) == before


LOOSE: dict[str, JSON] = {
    "free names": an_object(a={"type": "object"}),
    "names of its own": an_object(a={"type": "object", "additionalProperties": True}),
    "values by schema": an_object(
        a={"type": "object", "additionalProperties": {"type": "string"}}
    ),
    "anything": an_object(a={}),
    "true": an_object(a=True),
    "list of anything": an_object(a={"type": "array"}),
    "tuple": an_object(a={"type": "array", "prefixItems": [{"type": "string"}]}),
    "pattern names": an_object(a={"type": "object", "patternProperties": {}}),
    "not": an_object(a={"not": {"type": "string"}}),
    "several all of": an_object(a={"allOf": [{"type": "string"}, {"type": "string"}]}),
    "foreign reference": an_object(a={"$ref": "https://example.com/schema"}),
    "broken reference": an_object(a={"$ref": "#/$defs/none"}),
    "reference to itself": an_object(a={"$ref": "#/properties/a"}),
    "unknown type": an_object(a={"type": "str"}),
    "no object": {"type": "string"},
    "required but not described": {**an_object(), "required": ["a"]},
}


@pytest.mark.parametrize("name", LOOSE)
def test_what_cannot_be_strict_is_sent_as_it_was(name: str) -> None:
    tool = {"type": "function", "name": "t", "parameters": LOOSE[name]}
    assert plugin.strict_schema(LOOSE[name]) is None
    assert plugin.offered_tools([tool], strict=True) == [tool]


def test_a_schema_that_is_too_deep_or_no_json_is_no_strict_one() -> None:
    deep: JSON = {"type": "string"}
    for _ in range(3_000):
        deep = an_object(a=deep)
    assert plugin.strict_schema(deep) is None
    assert (
        plugin.strict_schema({"type": "object", "properties": {"a": object()}}) is None
    )


def _any_schema(dice: random.Random, depth: int) -> JSON:
    kinds = ["string", "integer", "boolean", "enum", "nullable"]
    kinds += ["object", "array", "anyOf"] if depth else []
    kind = dice.choice(kinds)
    if kind == "enum":
        return {"type": "string", "enum": ["a", "b"]}
    if kind == "nullable":
        return {"type": ["integer", "null"]}
    if kind == "array":
        return {"type": "array", "items": _any_schema(dice, depth - 1)}
    if kind == "anyOf":
        return {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": _any_object(dice, 1)},
            ]
        }
    if kind == "object":
        return _any_object(dice, depth)
    return {"type": kind}


def _any_object(dice: random.Random, depth: int) -> JSON:
    names = [f"p{n}" for n in range(dice.randint(1, 4))]
    schema = an_object(**{name: _any_schema(dice, depth - 1) for name in names})
    schema["required"] = [name for name in names if dice.random() < 0.5]
    return schema


def _any_value(dice: random.Random, schema: JSON) -> Any:
    if "anyOf" in schema:
        return _any_value(dice, dice.choice(schema["anyOf"]))
    if "enum" in schema:
        return dice.choice(schema["enum"])
    kind = schema["type"]
    if kind == "object":
        return {
            name: _any_value(dice, sub)
            for name, sub in schema["properties"].items()
            if name in schema["required"] or dice.random() < 0.5
        }
    if kind == "array":
        return [_any_value(dice, schema["items"]) for _ in range(dice.randint(0, 3))]
    return {"string": "text", "boolean": True}.get(str(kind), 7)


def test_a_thousand_random_schemas_accept_what_they_accepted() -> None:
    dice = random.Random(13)
    for _ in range(1_000):
        schema = _any_object(dice, 3)
        value = _any_value(dice, schema)
        written = strict(schema)
        full = filled(value, written, written)

        assert is_valid(value, schema)
        assert is_valid(full, written), (schema, full)
        assert plugin.without_nulls(full, schema, schema) == value


# What is offered


def test_tools_are_flat_have_parameters_and_come_once_in_order() -> None:
    nested = {"type": "function", "function": {"name": "b", "description": "B"}}
    flat = {"type": "function", "name": "a", "parameters": an_object()}
    other = {"type": "function", "function": {"name": "b", "description": "Another"}}
    hosted = {"type": "openrouter:datetime", "parameters": {"timezone": "UTC"}}

    tools = plugin.offered_tools(
        [hosted, nested, flat, other, dict(hosted), 3], strict=False
    )

    assert [tool.get("name", tool["type"]) for tool in tools] == [
        "a",
        "b",
        "openrouter:datetime",
    ]
    assert tools[1]["description"] == "B"
    assert tools[1]["parameters"] == an_object()


@pytest.mark.parametrize(
    "given", [None, {}, {"type": "object"}, {"properties": None}, {"properties": {}}]
)
def test_a_tool_without_parameters_says_so(given: JSON | None) -> None:
    """Describe an object: OpenAI refuses `{"type": "object"}` without properties."""
    tool = {"type": "function", "function": {"name": "a", "parameters": given}}
    (sent,) = plugin.offered_tools([tool], strict=False)
    assert sent["parameters"] == {"type": "object", "properties": {}}


def test_nulls_are_taken_out_of_strict_tools_alone() -> None:
    loose = an_object(a={"type": ["string", "null"]}, b={"type": "object"})
    closed = an_object(a={"type": ["string", "null"]})
    for schema, values in ((loose, {"a": None}), (closed, {})):
        entry = {**RUNNABLE, "spec": {"parameters": schema}}
        box = plugin.Toolbox({"t": entry}, runs=True, asks=False, strict=True)
        (call,) = plugin.planned_calls(box, 0, "c", "t", '{"a": null}')
        assert call.arguments == values


def test_a_tool_that_says_whether_it_is_strict_keeps_its_word() -> None:
    tool = {
        "type": "function",
        "name": "a",
        "parameters": an_object(x={"type": "string"}),
    }
    for word in (True, False):
        (sent,) = plugin.offered_tools([{**tool, "strict": word}], strict=True)
        assert sent == {**tool, "strict": word}


def test_mcp_servers_that_are_not_servers_are_refused_when_saved() -> None:
    for wrong in ("{}", "[]", "nonsense", '[{"server_label": "a"}]'):
        with pytest.raises(ValueError, match="server_label"):
            plugin.ToolValves.model_validate({"REMOTE_MCP_SERVERS_JSON": wrong})
    right = '[{"server_label": "a", "server_url": "https://a.example", "authorization": "key-1"}]'
    valves = plugin.ToolValves.model_validate({"REMOTE_MCP_SERVERS_JSON": right})
    assert "key-1" not in valves.REMOTE_MCP_SERVERS_JSON
    assert (
        plugin.mcp_tools(valves.REMOTE_MCP_SERVERS_JSON)[0]["authorization"] == "key-1"
    )
    again = plugin.ToolValves(**valves.model_dump())
    assert plugin.mcp_tools(again.REMOTE_MCP_SERVERS_JSON)[0]["server_label"] == "a"


# Arguments


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", [{}]),
        ("  ", [{}]),
        ("{}", [{}]),
        ('{"a": 1}', [{"a": 1}]),
        ('{"a": 1}{"a": 2}\n{"a": 3}', [{"a": 1}, {"a": 2}, {"a": 3}]),
        ("{'a': True}", [{"a": True}]),
        ('"{\\"a\\": 1}"', [{"a": 1}]),
    ],
)
def test_arguments_are_read_leniently(text: str, values: list[JSON]) -> None:
    parsed = plugin.parse_arguments(text, "tool")
    assert [arguments.values for arguments in parsed] == values
    assert not any(arguments.problem for arguments in parsed)


@pytest.mark.parametrize(
    "text", ['{"a": ', "[1]", "3", "null", "{} 4", "nonsense", "{" * 99_000]
)
def test_bad_arguments_come_back_as_an_error_that_can_be_mended(text: str) -> None:
    (arguments,) = plugin.parse_arguments(text, "tool")
    assert arguments.values == {}
    assert arguments.problem.startswith("Error: the arguments of `tool`")


# Who runs a call


async def _tool() -> str:
    return "done"


RUNNABLE: JSON = {"callable": _tool, "spec": {"parameters": an_object()}}
JUDGED: list[tuple[str, JSON, str]] = [
    ("mine", RUNNABLE, "run"),
    ("get_time", {**RUNNABLE, "type": "builtin"}, "run"),
    ("remote", {**RUNNABLE, "type": "external"}, "run"),
    ("docs_search", {**RUNNABLE, "type": "mcp"}, "run"),
    ("docs_find", {**RUNNABLE, "type": "mcp", "client": Client(client=1)}, "run"),
    ("docs_find", {**RUNNABLE, "type": "mcp", "client": Client(client=None)}, "leave"),
    ("ask_user", {**RUNNABLE, "type": "builtin"}, "leave"),
    ("delegate_task", {**RUNNABLE, "type": "builtin"}, "leave"),
    ("call_tool", {"type": "builtin"}, "leave"),
    ("page", {"direct": True}, "leave"),
    ("page", {**RUNNABLE, "direct": True}, "leave"),
    ("run_command", {**RUNNABLE, "type": "terminal"}, "leave"),
    ("run_command", {**RUNNABLE, "tool_id": "terminal:1"}, "leave"),
    ("later", {**RUNNABLE, "type": "kind-of-tomorrow"}, "leave"),
    ("later", {"spec": {}}, "leave"),
]


@pytest.mark.parametrize(("name", "entry", "verdict"), JUDGED)
def test_each_kind_of_tool_is_run_by_who_can(
    name: str, entry: JSON, verdict: str
) -> None:
    box = plugin.Toolbox({name: entry}, runs=True, asks=False)
    assert box.judge(name)[0] == verdict

    for changed in ({"asks": True}, {"runs": False}):
        other = plugin.Toolbox(
            {name: entry}, **{"runs": True, "asks": False, **changed}
        )
        assert other.judge(name)[0] == "leave"

    alone = plugin.Toolbox({name: entry}, runs=True, asks=True, can_leave=False)
    assert alone.judge(name)[0] == "answer"


def test_a_box_that_nobody_filled_in_runs_nothing() -> None:
    assert plugin.Toolbox({"mine": RUNNABLE}).judge("mine")[0] == "leave"


@pytest.mark.parametrize(
    ("name", "writes"),
    [
        ("add_memory", True),
        ("notes_update", True),
        ("sendMail", True),
        ("get_time", False),
        ("search_web", False),
        ("address_lookup", False),
        ("settings_list", False),
    ],
)
def test_side_effects_are_told_by_the_name(name: str, writes: bool) -> None:
    assert plugin.has_side_effects(name) is writes


# Running


async def test_work_that_ignores_being_cancelled_is_left_behind() -> None:
    release = asyncio.Event()

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    with pytest.raises(plugin._Overdue):
        await plugin.in_time(stubborn(), 0.05)
    release.set()
    await asyncio.sleep(0)


async def test_watching_changes_nothing_of_what_work_does() -> None:
    async def work() -> str:
        try:
            await asyncio.wait_for(asyncio.Event().wait(), 0.01)
        except TimeoutError:
            await asyncio.sleep(0)
        return "done"

    assert await plugin.watched(work(), "work") == "done"

    async def fails() -> None:
        await asyncio.sleep(0)
        raise KeyError("a")

    with pytest.raises(KeyError):
        await plugin.watched(fails(), "fails")


def test_results_within_the_limit_stay_as_they_are() -> None:
    long = {"type": "function_call_output", "call_id": "c", "output": "x" * 3_000}
    cut = plugin.bounded_results([long, {"type": "message", "role": "user"}], 1_000)
    assert "first 1000 of 3000" in cut[0]["output"]
    assert plugin.bounded_results(cut, 1_000) == cut
