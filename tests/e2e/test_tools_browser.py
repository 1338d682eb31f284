"""The cards of tools, as a person sees them in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.async_api import Page, expect

from tests.server import OpenWebUI
from tests.simulator import Simulator, replies
from tests.simulator.replies import Call, compose, function_call, message, server_item

pytestmark = pytest.mark.timeout(300)

MODEL = "openrouter.openai/gpt-4o"
PATIENCE_MS = 60_000
TOOLS = '''
import asyncio


class Tools:
    async def get_weather(self, city: str) -> str:
        """Tell the weather.

        :param city: Where
        """
        await asyncio.sleep(2)
        return f"{city}: 4 degrees"
'''


@pytest.fixture
def toolbelt(webui: OpenWebUI) -> Iterator[str]:
    """Put a workspace tool into the server."""
    form: dict[str, Any] = {"id": "belt", "name": "Belt", "content": TOOLS, "meta": {}}
    webui.admin.call("POST", "/api/v1/tools/create", form)
    yield "belt"
    webui.admin.call("DELETE", "/api/v1/tools/id/belt/delete")


async def test_cards_come_alive_and_survive_a_reload(
    page: Page, toolbelt: str, simulator: Simulator
) -> None:
    def is_question(entry: Any) -> bool:
        return entry.last_user_text == "Weather?" or len(entry.items) > 1

    simulator.script(
        compose(
            message("Let me look."),
            function_call(Call("get_weather", {"city": "Oslo"})),
            function_call(Call("get_weather", {"city": "Rome"})),
            server_item(
                "openrouter:web_fetch", "wf", url="https://a.example", content="Deep."
            ),
        ),
        replies.text("It is cold in both."),
        when=is_question,
    )
    await page.goto(f"/?models={MODEL}&tools={toolbelt}&q=Weather?")
    await page.get_by_role("button", name="Send message").click()

    answer = page.locator(".chat-assistant").last
    await expect(answer).to_contain_text("Let me look.", timeout=PATIENCE_MS)
    await expect(answer).to_contain_text("get_weather", timeout=PATIENCE_MS)
    await expect(answer).not_to_contain_text("It is cold")  # the tools still run
    await expect(answer).to_contain_text("It is cold in both.", timeout=PATIENCE_MS)
    await page.wait_for_url("**/c/**")

    for _ in range(2):
        answer = page.locator(".chat-assistant").last
        await expect(answer).to_contain_text("It is cold in both.", timeout=PATIENCE_MS)
        group = answer.get_by_text("3 tools").or_(answer.get_by_text("Explored")).first
        await expect(group).to_be_visible(timeout=PATIENCE_MS)
        await group.click()
        await expect(answer).to_contain_text("get_weather", timeout=PATIENCE_MS)
        await expect(answer).to_contain_text("web_fetch")
        card = answer.get_by_text("View Result from get_weather").first
        await card.click()
        await expect(answer).to_contain_text("Oslo: 4 degrees")
        await page.reload()
