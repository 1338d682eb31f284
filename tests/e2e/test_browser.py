"""The pages that people see, in a real browser on a server of their own.

The tests take screenshots along the way: into docs/images/ when UPDATE_SCREENSHOTS=1
is set, else into a temporary folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Locator, Page, expect

from tests.server import OpenWebUI
from tests.simulator import Simulator, replies
from tests.simulator.ledger import Entry
from tests.simulator.replies import compose, message, thought, url_citation
from tests.webui import PLUGIN

pytestmark = pytest.mark.timeout(300)  # a server starts within the first test

FUNCTION_ID = "openrouter"
SOURCE = PLUGIN.read_text("utf-8")
IMAGES = Path(__file__).parents[2] / "docs" / "images"
PUBLISHED = {"functions", "valves", "models", "chat", "usage", "failure"}
MODEL = f"{FUNCTION_ID}.openai/gpt-5"
PATIENCE_MS = 60_000

QUESTION = "Which river is the longest?"
THOUGHTS = (
    "**Comparing lengths**\n\nThe Nile and the Amazon are close, so I check how each "
    "was measured.\n\n**Choosing a form**\n\nA small table says it best."
)
ANSWER = """The Nile, by a little [1]. How long the Amazon is depends on where one thinks
that it begins [2].

| River | Length | Ends in |
|:------|-------:|:--------|
| Nile | 6,650 km | the Mediterranean |
| Amazon | 6,400 km | the Atlantic |
| Danube | 2,850 km | the Black Sea |
"""
SOURCES = (
    url_citation("https://example.com/nile", "The length of the Nile", 0, 25),
    url_citation("https://example.org/amazon", "Where the Amazon begins", 26, 90),
)

Shoot = Callable[[str], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def fresh() -> Iterator[OpenWebUI]:
    """Run a server where nobody has installed anything."""
    with OpenWebUI() as server:
        server.admin.dismiss_news()
        yield server


@pytest.fixture
def ready(fresh: OpenWebUI, valves: dict[str, Any]) -> OpenWebUI:
    """Return the server with the pipe, whoever installed it."""
    if FUNCTION_ID not in fresh.admin.functions():
        fresh.admin.install_function(FUNCTION_ID, SOURCE, "OpenRouter")
    fresh.admin.set_valves(FUNCTION_ID, valves)
    return fresh


@pytest.fixture
async def tab(
    browser: Browser, fresh: OpenWebUI, simulator: Simulator
) -> AsyncIterator[Page]:
    """Open a browser window, signed in as the admin."""
    simulator.script(
        replies.text('{"title": "Rivers of the World"}').forever(), when=_asks_title
    )
    context = await browser.new_context(
        base_url=fresh.url,
        viewport={"width": 1280, "height": 800},
        permissions=["clipboard-read", "clipboard-write"],
    )
    context.set_default_timeout(PATIENCE_MS)
    await context.add_init_script(
        f"localStorage.token = {fresh.admin.token!r}; localStorage.locale = 'en-US';"
    )
    yield await context.new_page()
    await context.close()


@pytest.fixture
def shoot(tab: Page, tmp_path: Path) -> Shoot:
    """Return what takes a screenshot of the window under a name."""
    is_update = os.environ.get("UPDATE_SCREENSHOTS") == "1"

    async def take(name: str) -> None:
        folder = IMAGES if is_update and name in PUBLISHED else tmp_path
        toasts = tab.locator("[data-sonner-toast]")
        await expect(toasts).to_have_count(0, timeout=PATIENCE_MS)
        await tab.evaluate(
            "document.querySelector('#messages-container')?.scroll(0, 0)"
        )
        await tab.screenshot(path=folder / f"{name}.png", animations="disabled")

    return take


def _asks_title(entry: Entry) -> bool:
    return entry.last_user_text.startswith("### Task") and (
        '"title"' in entry.last_user_text
    )


def _asks_question(entry: Entry) -> bool:
    return entry.last_user_text == QUESTION


async def shows(place: Locator, text: str | re.Pattern[str] = "") -> None:
    """Wait until a place is visible, and says a text if one is given."""
    await expect(place).to_be_visible(timeout=PATIENCE_MS)
    if text:
        await expect(place).to_contain_text(text, timeout=PATIENCE_MS)


def answer(tab: Page) -> Locator:
    return tab.locator(".chat-assistant").last


async def set_valve(dialog: Locator, name: str, value: str) -> Locator:
    """Turn a valve from its default to a value, as the dialog asks for it."""
    row = dialog.locator("form > div > div").filter(
        has=dialog.page.get_by_text(name, exact=True)
    )
    await row.get_by_role("button", name="Default").click()
    field = row.locator("input, textarea")
    await field.fill(value)
    return field


async def search_models(tab: Page) -> Locator:
    """Open the chat's model selector and search; return the model's line in it."""
    await tab.locator("#model-selector-model-button").click()
    await tab.get_by_placeholder("Search a model").fill("gpt-5")
    line = tab.locator(f"[role=option][data-value='{MODEL}']")
    await shows(line)
    return line


async def ask(tab: Page, text: str) -> None:
    """Write a message and send it."""
    field = tab.locator("#chat-input")
    await field.click()
    await tab.keyboard.insert_text(text)
    await tab.keyboard.press("Enter")


async def is_over(tab: Page) -> None:
    """Wait until the answer has ended."""
    await shows(tab.get_by_role("button", name="Regenerate").last)


async def test_an_admin_pastes_the_file_and_chats(
    tab: Page, fresh: OpenWebUI, simulator: Simulator, shoot: Shoot
) -> None:
    # The Functions page: paste, save, switch on.
    await tab.goto("/admin/functions")
    await tab.get_by_text("Create", exact=True).click()
    await tab.get_by_placeholder("Function Name").fill("OpenRouter")
    await tab.get_by_placeholder("Function Description").fill("Every OpenRouter model")
    await tab.evaluate("text => navigator.clipboard.writeText(text)", SOURCE)
    await tab.get_by_label("Code Editor").click()
    await tab.keyboard.press("Control+A")
    await tab.keyboard.press("Control+V")
    await tab.get_by_role("button", name="Save & Create").click()
    await tab.get_by_role("button", name="Confirm").click()
    await tab.get_by_role("switch").click()
    await shows(tab.get_by_text("Every OpenRouter model"))
    installed = fresh.admin.call("GET", f"/api/v1/functions/id/{FUNCTION_ID}")
    assert installed["content"] == SOURCE
    await expect(tab.get_by_role("switch")).to_be_checked(timeout=PATIENCE_MS)
    await shoot("functions")

    # The gear: where OpenRouter is, and the key, which nobody can read.
    await tab.get_by_role("button", name="Valves").click()
    dialog = tab.locator("[role=dialog]").last
    await set_valve(dialog, "BASE_URL", simulator.base_url)
    key = await set_valve(dialog, "API_KEY", simulator.api_key)
    masked = await key.evaluate("e => getComputedStyle(e).webkitTextSecurity")
    assert await key.get_attribute("type") == "password" or masked == "disc"
    await shoot("valves")
    await dialog.get_by_role("button", name="Save").click()
    await shows(tab.get_by_text("Valves updated successfully"))
    assert simulator.api_key not in str(fresh.admin.get_valves(FUNCTION_ID))

    # The chat: choose a model, ask, and read the answer in the order it came.
    await tab.goto("/")
    line = await search_models(tab)
    await shoot("models")
    await line.click()
    reply = compose(
        thought(THOUGHTS, deltas=20, delay=0.15),
        message(ANSWER, delay=0.01, annotations=SOURCES),
    )
    simulator.script(reply, when=_asks_question)
    await ask(tab, QUESTION)
    await is_over(tab)
    await the_whole_answer_is_there(tab)
    await shoot("chat")
    await tab.get_by_role("button", name="Info").hover()
    await shows(tab.locator(".tippy-content").last, re.compile(r"cost: 0\.00\d"))
    await shoot("usage")

    # The same after a reload, and the clipboard holds what was read.
    await tab.reload()
    await the_whole_answer_is_there(tab)
    await answer(tab).hover()
    await tab.get_by_role("button", name="Copy").last.click()
    await shows(tab.get_by_text("Copying to clipboard was successful"))
    copied = await tab.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == ANSWER.strip()


async def the_whole_answer_is_there(tab: Page) -> None:
    """Look at everything that an answer shows, the thoughts unfolded."""
    place = answer(tab)
    thoughts = place.get_by_text(re.compile("Thought for [234] seconds"))
    await shows(thoughts)
    await expect(place.get_by_text("A small table says it best.")).to_have_count(0)
    await thoughts.click()
    await shows(place.get_by_text("A small table says it best."))
    await shows(place.get_by_role("cell", name="6,650 km"))
    await shows(tab.get_by_role("button", name="Toggle 2 sources"), "2 Sources")
    await shows(tab.get_by_role("button", name="View source: The length of the Nile"))


async def test_a_refused_key_is_named_on_a_card(
    tab: Page, ready: OpenWebUI, valves: dict[str, Any], shoot: Shoot
) -> None:
    ready.admin.set_valves(FUNCTION_ID, {**valves, "API_KEY": "sk-or-v1-wrong-key"})
    await tab.goto("/")
    await (await search_models(tab)).click()

    await ask(tab, QUESTION)

    await shows(answer(tab), "OpenRouter refused the API key")
    await shows(answer(tab), "set a valid key in the API_KEY valve")
    assert "sk-or-v1-wrong-key" not in await tab.content()
    await is_over(tab)
    await shoot("refused-key")


async def test_a_stream_that_breaks_keeps_its_text_and_says_so(
    tab: Page, ready: OpenWebUI, simulator: Simulator, shoot: Shoot
) -> None:
    begun = message(ANSWER.partition("| Danube")[0], delay=0.01, closes=False)
    cut = compose(begun, terminal=replies.silence)
    simulator.script(replace(cut, end="reset"), when=_asks_question)
    await tab.goto("/")
    await (await search_models(tab)).click()

    await ask(tab, QUESTION)

    await shows(answer(tab), "The connection to OpenRouter was lost")
    await shows(answer(tab).get_by_role("cell", name="6,650 km"))
    await is_over(tab)
    await shoot("failure")
    await tab.reload()
    await shows(answer(tab), "The connection to OpenRouter was lost")
    await shows(answer(tab).get_by_role("cell", name="6,650 km"))
    assert len(list(filter(_asks_question, simulator.posts))) == 1


async def test_stop_keeps_what_was_written(
    tab: Page, ready: OpenWebUI, simulator: Simulator, shoot: Shoot
) -> None:
    words = [f"word{number} " for number in range(2_000)]
    simulator.script(replies.text(deltas=words, delay=0.05), when=_asks_question)
    await tab.goto("/")
    await (await search_models(tab)).click()
    await ask(tab, QUESTION)
    await shows(answer(tab), "word9 ")

    await tab.get_by_role("button", name="Stop").click()

    await is_over(tab)
    assert simulator.wait_for(
        lambda entries: any(e.cut_by_client for e in entries if _asks_question(e)), 10
    )
    await shoot("stopped")
    await tab.reload()
    await shows(answer(tab), "word9 ")
    await expect(answer(tab)).not_to_contain_text("word1999")
