"""02 Settings: the valves an admin sets."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from open_webui_openrouter_pipe import open_webui_openrouter_pipe as plugin
from tests.simulator import Simulator
from tests.turns import ask, opened
from tests.webui import load

KEY = "sk-or-v1-0123456789"
VALVES = plugin.Pipe.Valves


def valves(**given: Any) -> plugin.Pipe.Valves:
    """Build valves as the host does, from untyped values."""
    return VALVES.model_validate(given)


# Values --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(VALVES.model_fields))
def test_none_means_the_default(name: str) -> None:
    assert getattr(valves(**{name: None}), name) == getattr(valves(), name)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("HTTP_STREAM_IDLE_SECONDS", "12.5", 12.5),
        ("STREAM_INTERVAL_MS", "0", 0),
        ("MODEL_CATALOG_REFRESH_SECONDS", "60", 60),
        ("HTTP_TOTAL_TIMEOUT_SECONDS", "0", 0),
    ],
)
def test_numbers_may_come_as_text(name: str, text: str, value: float) -> None:
    assert getattr(valves(**{name: text}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP_STREAM_IDLE_SECONDS", 0),
        ("HTTP_CONNECT_TIMEOUT_SECONDS", -1),
        ("HTTP_TOTAL_TIMEOUT_SECONDS", -1),
        ("STREAM_INTERVAL_MS", 1001),
        ("MODEL_CATALOG_REFRESH_SECONDS", 0),
        ("STREAM_FORMAT", "html"),
        ("LOG_LEVEL", "LOUD"),
        ("TASK_MODEL_REASONING_EFFORT", "enormous"),
    ],
)
def test_a_value_out_of_bounds_names_its_valve(name: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=name):
        valves(**{name: value})


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("https://openrouter.ai/api/v1", "https://openrouter.ai/api/v1"),
        (" https://eu.openrouter.ai/api/v1/ ", "https://eu.openrouter.ai/api/v1"),
        ("http://127.0.0.1:8080/api/v1", "http://127.0.0.1:8080/api/v1"),
    ],
)
def test_an_address_is_kept_without_its_last_slash(given: str, address: str) -> None:
    assert address == valves(BASE_URL=given).BASE_URL


@pytest.mark.parametrize(
    "given",
    [
        "openrouter.ai/api/v1",
        "",
        "/",
        "ftp://openrouter.ai",
        "https://",
        "sk-or-v1-1",
        "http://[::1",
        "http://host:port/api/v1",
        "http://host:99999/api/v1",
    ],
)
def test_what_is_no_address_is_refused_with_a_sentence(given: str) -> None:
    with pytest.raises(ValidationError, match="BASE_URL must be a web address such as"):
        valves(BASE_URL=given)


def test_unknown_valves_are_passed_over() -> None:
    assert valves(A_VALVE_OF_LONG_AGO=1) == valves()


def test_valves_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        valves().LOG_LEVEL = "DEBUG"


# Secrets -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "show",
    [
        repr,
        str,
        lambda v: str(v.model_dump()),
        lambda v: v.model_dump_json(),
        lambda v: json.dumps(v.model_json_schema()),
    ],
)
def test_the_key_is_shown_nowhere(show: Any) -> None:
    assert KEY not in show(valves(API_KEY=KEY))


def test_the_key_is_sealed_at_rest_and_opens_again() -> None:
    stored = json.loads(json.dumps(valves(API_KEY=KEY).model_dump()))

    assert stored["API_KEY"].startswith("encrypted:")
    assert plugin.api_key(valves(**stored)) == KEY
    assert stored["API_KEY"] == valves(**stored).API_KEY


async def test_another_master_key_is_a_card_that_says_so(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = valves(API_KEY=simulator.api_key).model_dump()
    monkeypatch.setenv("WEBUI_SECRET_KEY", "another master key")
    async with opened(simulator, API_KEY=stored["API_KEY"]) as pipe:
        shown = await ask(pipe)

    (card,) = shown.cards
    assert "WEBUI_SECRET_KEY" in card
    assert "enter it again" in card
    assert not simulator.posts


# The environment -----------------------------------------------------------------------


def test_the_environment_gives_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENROUTER_API_BASE_URL", "https://eu.openrouter.ai/api/v1")
    monkeypatch.setenv("OPENROUTER_API_KEY", KEY)
    monkeypatch.setenv("GLOBAL_LOG_LEVEL", "debug")

    loaded = load("environment", publish=False)

    found = loaded.pipe.Valves()
    assert found.BASE_URL == "https://eu.openrouter.ai/api/v1"
    assert loaded.module.api_key(found) == KEY
    assert found.LOG_LEVEL == "DEBUG"
    assert loaded.module.__name__ not in sys.modules


def test_a_valve_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-or-v1-environment")

    assert plugin.api_key(valves(API_KEY=KEY)) == KEY


def test_an_empty_valve_means_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENROUTER_API_KEY", KEY)

    assert plugin.api_key(valves(API_KEY="")) == KEY


def test_the_environments_key_is_not_in_the_schema(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENROUTER_API_KEY", KEY)

    loaded = load("environment", publish=False)

    schema = loaded.pipe.Valves.model_json_schema()
    assert KEY not in json.dumps(schema)
    assert KEY not in str(loaded.pipe.Valves())


def test_an_unknown_log_level_of_the_host_is_info(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOBAL_LOG_LEVEL", "NOTSET")

    assert load("environment", publish=False).pipe.Valves().LOG_LEVEL == "INFO"


# The admin page ------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(VALVES.model_fields))
def test_every_valve_is_drawn_with_its_own_name(name: str) -> None:
    drawn = VALVES.model_json_schema()["properties"][name]

    assert drawn["title"] == name
    assert drawn["description"].endswith(".")
    assert drawn["type"] in ("string", "number", "integer", "boolean", "array")


def test_the_key_is_masked() -> None:
    drawn = VALVES.model_json_schema()["properties"]["API_KEY"]

    assert drawn["input"] == {"type": "password"}
