"""08 Catalog: OpenRouter's models, parsed, chosen, kept fresh."""

from __future__ import annotations

import asyncio
import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from open_webui_openrouter_pipe import open_webui_openrouter_pipe as plugin
from tests.simulator import Simulator, replies
from tests.simulator.catalog import build_rows
from tests.turns import ask, body, opened

REAL = Path(__file__).parents[1].parent / "shared/reference/openrouter-models.json"


@cache
def rows(which: str) -> list[dict[str, Any]]:
    """Return the rows of a catalog."""
    if which == "simulated":
        return build_rows()
    if not REAL.is_file():
        pytest.skip(f"there is no snapshot of the real catalog at {REAL}")
    return json.loads(REAL.read_text("utf-8"))["data"]


@pytest.fixture(params=["simulated", "real"])
def models(request: pytest.FixtureRequest) -> plugin.Models:
    """Return a catalog as it was read."""
    return plugin.Models(plugin.parse_catalog({"data": rows(request.param)}))


def ids(cards: Any) -> list[str]:
    """Return the ids of cards or rows."""
    return [each["id"] if isinstance(each, dict) else each.id for each in cards]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was warned of."""
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def grow_old(pipe: plugin.Pipe) -> None:
    """Make the list of a pipe old enough to be read again."""
    pipe._runtime.catalog._checked_at = float("-inf")


async def settled(pipe: plugin.Pipe) -> None:
    """Wait for the background tasks of a pipe."""
    while tasks := set(pipe._runtime._tasks):
        await asyncio.wait(tasks)


# Rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["simulated", "real"])
def test_every_row_is_read(which: str) -> None:
    cards = plugin.parse_catalog({"data": rows(which)})

    assert ids(cards) == ids(rows(which))
    assert all(card.name for card in cards)
    assert any(card.reasons for card in cards)
    assert any(card.reasoning_is_mandatory for card in cards)


BARE: dict[str, Any] = dict.fromkeys(
    (
        "name",
        "canonical_slug",
        "architecture",
        "supported_parameters",
        "reasoning",
        "pricing",
        "top_provider",
        "description",
        "created",
        "context_length",
    )
)


@pytest.mark.parametrize(
    "odd",
    [
        BARE,
        {},
        {"star": {"name": "Sirius"}, "name": 7},
        {"architecture": {"input_modalities": None, "output_modalities": None}},
        {"architecture": [], "supported_parameters": {}, "reasoning": []},
        {
            "architecture": {"input_modalities": "text"},
            "reasoning": {"supported_efforts": 3},
        },
    ],
)
def test_a6_an_odd_row_appears_and_harms_nobody(odd: dict[str, Any]) -> None:
    other = {"id": "a/b", "name": "B"}

    cards = plugin.parse_catalog({"data": [{**odd, "id": "odd/row"}, other]})

    assert ids(cards) == ["odd/row", "a/b"]
    assert cards[0].name == "odd/row"
    assert cards[0].can_chat
    assert cards[0].takes("tools")
    assert cards[0].reads("image")


def test_a_row_without_an_id_is_left_out() -> None:
    data = [{"id": None}, {"id": " "}, {}, None, "x", {"id": "a/b"}]

    assert ids(plugin.parse_catalog({"data": data})) == ["a/b"]


@pytest.mark.parametrize(
    "given", [None, [], "x", {}, {"data": []}, {"data": None}, {"data": [{"id": ""}]}]
)
def test_a_list_of_nothing_is_a_failure(given: Any) -> None:
    with pytest.raises(plugin.ProviderFailed, match="model list"):
        plugin.parse_catalog(given)


# Which id means what -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "card"),
    [
        ("openai/gpt-4o", "openai/gpt-4o"),
        ("openai/gpt-4o:nitro", "openai/gpt-4o"),
        ("openai/gpt-4o:free:online", "openai/gpt-4o"),
        ("openai/gpt-4o@preset/support", "openai/gpt-4o"),
        ("openai/gpt-4o:floor@preset/support", "openai/gpt-4o"),
        ("@preset/support", "@preset/support"),
        ("~openai/gpt-latest", "~openai/gpt-latest"),
        ("~openai/gpt-of-tomorrow", "~openai/gpt-of-tomorrow"),
        ("openai/gpt-4o:cheap", None),
        ("openai/gtp-4o", None),
        ("openai/gtp-4o:nitro", None),
        (":nitro", None),
        ("", None),
    ],
)
def test_variants_aliases_and_presets_are_explained(
    models: plugin.Models, asked: str, card: str | None
) -> None:
    found = models.explain(asked)

    assert (found.id if found else None) == card


def test_a_listed_variant_is_itself(models: plugin.Models) -> None:
    listed = [card.id for card in models.cards if card.id.endswith(":free")]

    assert listed
    for id_ in listed:
        found = models.explain(id_)
        assert found is not None
        assert found.id == id_


def test_every_id_and_canonical_slug_is_found(models: plugin.Models) -> None:
    for card in models.cards:
        assert models.explain(card.id) is card
        assert not card.canonical or models.explain(card.canonical) is not None


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("openai/gtp-4o", "openai/gpt-4o"),
        ("OpenAI/GPT-4o", "openai/gpt-4o"),
        ("claude-opus-4.5", "anthropic/claude-opus-4.5"),
    ],
)
def test_the_nearest_are_named(models: plugin.Models, asked: str, near: str) -> None:
    found = models.nearest(asked)

    assert near in found
    assert len(found) <= 3


def test_what_looks_like_nothing_has_no_nearest(models: plugin.Models) -> None:
    assert models.nearest("zzzzzzzzzzzz") == []
    assert models.nearest("") == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], ""),
        (["a"], "; did you mean a?"),
        (["a", "b"], "; did you mean a or b?"),
        (["a", "b", "c"], "; did you mean a, b or c?"),
    ],
)
def test_a_guess_is_said_as_people_say_it(given: list[str], words: str) -> None:
    assert plugin.did_you_mean(given) == words


# MODEL_ID ------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["auto", "AUTO", "", " , ", "auto, nonsense"])
def test_auto_is_every_chat_model(models: plugin.Models, wanted: str) -> None:
    chosen, unknown = plugin.select_models(models, wanted)

    assert len(chosen) > 100
    assert not [card.id for card in chosen if card.id.endswith(":batch")]
    assert all(
        card.outputs is None or card.outputs & {"text", "image"} for card in chosen
    )
    assert unknown == []


@pytest.mark.parametrize(
    ("wanted", "expected", "unknown"),
    [
        ("openai/gpt-4o", ["openai/gpt-4o"], []),
        (
            "openai/gpt-4o, openai/gtp-4o,\n anthropic/claude-sonnet-4.5",
            ["openai/gpt-4o", "anthropic/claude-sonnet-4.5"],
            ["openai/gtp-4o"],
        ),
        ("openai/gpt-4o,openai/gpt-4o", ["openai/gpt-4o"], []),
        ("openai/gpt-4o:nitro", ["openai/gpt-4o:nitro"], []),
        ("@preset/support", ["@preset/support"], []),
        ("openai/gpt-4o@preset/x", ["openai/gpt-4o@preset/x"], []),
        ("nobody/*", [], ["nobody/*"]),
        ("nothing", [], ["nothing"]),
    ],
)
def test_a4_a_list_chooses_and_names_what_is_unknown(
    models: plugin.Models, wanted: str, expected: list[str], unknown: list[str]
) -> None:
    chosen, missing = plugin.select_models(models, wanted)

    assert ids(chosen) == expected
    assert missing == unknown


@pytest.mark.parametrize("pattern", ["anthropic/*", "*claude*", "ANTHROPIC/*"])
def test_a_star_stands_for_anything(models: plugin.Models, pattern: str) -> None:
    chosen, unknown = plugin.select_models(models, pattern)

    expected = [
        card.id
        for card in models.cards
        if "claude" in card.id and card.can_chat and not card.id.startswith("~")
    ]
    assert set(expected) <= set(ids(chosen))
    assert unknown == []
    assert not [id_ for id_ in ids(chosen) if id_.endswith(":batch")]


@pytest.mark.parametrize("pattern", ["openai/gpt-[45]*", "openai/gpt-?o*"])
def test_only_the_star_is_special(models: plugin.Models, pattern: str) -> None:
    assert plugin.select_models(models, pattern) == ([], [pattern])


def test_a_variant_is_told_from_its_model_by_name(models: plugin.Models) -> None:
    chosen, _ = plugin.select_models(models, "openai/gpt-4o, openai/gpt-4o:nitro")

    assert len({card.name for card in chosen}) == 2
    assert chosen[1].name.endswith("(nitro)")


# The listing ---------------------------------------------------------------------------


async def test_the_listing_is_the_catalog(simulator: Simulator) -> None:
    async with opened(simulator) as pipe:
        listed = await pipe.pipes()

    assert {frozenset(row) for row in listed} == {frozenset({"id", "name"})}
    assert "openai/gpt-4o" in ids(listed)
    assert not [id_ for id_ in ids(listed) if id_.endswith(":batch")]
    assert len(ids(listed)) == len(set(ids(listed)))


async def test_a_warm_listing_asks_nobody(simulator: Simulator) -> None:
    async with opened(simulator) as pipe:
        first = await pipe.pipes()
        asked = len(simulator.ledger)
        second = [await pipe.pipes() for _ in range(5)]

    assert second == [first] * 5
    assert len(simulator.ledger) == asked


async def test_a_listing_is_the_callers_own(simulator: Simulator) -> None:
    async with opened(simulator) as pipe:
        first = await pipe.pipes()
        expected = list(first)
        first.clear()

        assert await pipe.pipes() == expected


async def test_many_listings_at_once_are_one_refresh(simulator: Simulator) -> None:
    body_ = {"data": rows("simulated")}
    simulator.script(
        replies.HttpReply(200, json.dumps(body_).encode(), wait=0.3), path="/models"
    )
    async with opened(simulator) as pipe:
        listings = await asyncio.gather(*(pipe.pipes() for _ in range(20)))

    assert all(listing == listings[0] for listing in listings)
    assert listings[0]
    assert [entry.path for entry in simulator.ledger] == ["/models"]


async def test_a_cold_listing_waits_three_seconds_at_most(
    simulator: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    simulator.script(replies.http_error(500, wait=30).forever(), path="/models")
    async with opened(simulator) as pipe:
        begun = time.monotonic()
        listed = await pipe.pipes()
        took = time.monotonic() - begun

    assert listed == []
    assert took < 5
    assert [text for text in warnings(caplog) if simulator.base_url in text]


async def test_a_list_that_came_late_is_there_the_next_time(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "_COLD_WAIT_SECONDS", 0.05)
    body_ = {"data": [{"id": "a/b"}]}
    simulator.script(
        replies.HttpReply(200, json.dumps(body_).encode(), wait=0.3), path="/models"
    )
    async with opened(simulator) as pipe:
        cold = await pipe.pipes()
        await settled(pipe)
        warm = await pipe.pipes()

    assert (cold, ids(warm)) == ([], ["a/b"])
    assert len(simulator.ledger) == 1


@pytest.mark.parametrize(
    "reply",
    [
        replies.http_error(500),
        replies.http_error(502, html=True),
        replies.json_body({"data": []}),
        replies.raw_body(b"<html>", "text/html"),
        replies.raw_body(b'{"data": [{"id": "a'),
        replies.HttpReply(0, b"", end="reset"),
    ],
)
async def test_an_outage_keeps_the_last_list(
    simulator: Simulator, caplog: pytest.LogCaptureFixture, reply: Any
) -> None:
    async with opened(simulator, MODEL_CATALOG_REFRESH_SECONDS=1) as pipe:
        first = await pipe.pipes()
        simulator.script(reply.forever(), path="/models")
        grow_old(pipe)
        second = await pipe.pipes()
        await settled(pipe)
        third = [await pipe.pipes() for _ in range(3)]
        answered = await ask(pipe)

    assert first
    assert [second, *third] == [first] * 4
    (line,) = [text for text in warnings(caplog) if "model list" in text]
    assert "last list stays" in line
    assert answered.text


async def test_after_an_outage_the_list_is_read_again(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "_FAILURE_PAUSE_SECONDS", 0.2)
    simulator.script(replies.http_error(500), path="/models")
    async with opened(simulator) as pipe:
        first = await pipe.pipes()
        second = await pipe.pipes()
        await asyncio.sleep(0.3)
        third = await pipe.pipes()

    assert (first, second) == ([], [])
    assert third
    assert len(simulator.ledger) == 2


async def test_an_old_list_is_served_while_a_new_one_is_read(
    simulator: Simulator,
) -> None:
    async with opened(simulator) as pipe:
        first = await pipe.pipes()
        body_ = {"data": [{"id": "new/model", "name": "New"}]}
        simulator.script(
            replies.HttpReply(200, json.dumps(body_).encode(), wait=0.2),
            path="/models",
        )
        grow_old(pipe)
        meanwhile = await pipe.pipes()
        await settled(pipe)
        later = await pipe.pipes()

    assert meanwhile == first
    assert later == [{"id": "new/model", "name": "New"}]


async def test_a_changed_valve_acts_on_the_next_listing(
    simulator: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(simulator) as pipe:
        everything = await pipe.pipes()
        pipe.valves = pipe.valves.model_copy(
            update={"MODEL_ID": "openai/gpt-4o, openai/gtp-4o"}
        )
        few = [await pipe.pipes() for _ in range(3)]
        asked = len(simulator.ledger)

    assert len(everything) > 100
    assert [ids(each) for each in few] == [["openai/gpt-4o"]] * 3
    assert asked == 1
    (line,) = [text for text in warnings(caplog) if "MODEL_ID" in text]
    assert "openai/gtp-4o" in line
    assert "did you mean openai/gpt-4o" in line


async def test_another_address_has_another_list(simulator: Simulator) -> None:
    with Simulator(models=build_rows()[:3]) as other:
        async with opened(simulator) as pipe:
            first = await pipe.pipes()
            pipe.valves = pipe.valves.model_copy(update={"BASE_URL": other.base_url})
            second = await pipe.pipes()
            pipe.valves = pipe.valves.model_copy(
                update={"BASE_URL": simulator.base_url}
            )
            third = await pipe.pipes()

    assert set(ids(second)) <= set(ids(build_rows()[:3]))
    assert first == third != second


async def test_a_late_list_of_another_address_is_not_taken(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "_COLD_WAIT_SECONDS", 0.05)
    body_ = {"data": [{"id": "old/address"}]}
    simulator.script(
        replies.HttpReply(200, json.dumps(body_).encode(), wait=0.4), path="/models"
    )
    with Simulator(models=build_rows()) as other:
        async with opened(simulator) as pipe:
            await pipe.pipes()
            pipe.valves = pipe.valves.model_copy(update={"BASE_URL": other.base_url})
            await pipe.pipes()
            await settled(pipe)
            listed = await pipe.pipes()
            await settled(pipe)
            listed = listed or await pipe.pipes()

    assert "old/address" not in ids(listed)
    assert "openai/gpt-4o" in ids(listed)


async def test_a_changed_key_acts_on_the_next_chat(simulator: Simulator) -> None:
    async with opened(simulator) as pipe:
        await ask(pipe)
        wrong = plugin.Secret.seal("sk-or-v1-wrong")
        pipe.valves = pipe.valves.model_copy(update={"API_KEY": wrong})
        refused = await ask(pipe)

    assert "API_KEY" in refused.cards[0]
    sent = [post.headers["Authorization"] for post in simulator.posts]
    assert sent == [f"Bearer {simulator.api_key}", "Bearer sk-or-v1-wrong"]


async def test_an_unlisted_model_of_the_valve_can_be_asked(
    simulator: Simulator,
) -> None:
    async with opened(simulator, MODEL_ID="openai/gpt-4o:nitro") as pipe:
        (listed,) = await pipe.pipes()
        shown = await ask(pipe, body("Hello", listed["id"]))

    assert simulator.posts[0].model == "openai/gpt-4o:nitro"
    assert shown.text
