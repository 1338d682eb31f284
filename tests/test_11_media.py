"""11 Media: images that a model makes become Open WebUI files."""

from __future__ import annotations

import base64
import types
import uuid
import warnings
from importlib import import_module
from typing import Any

import pytest

from open_webui_openrouter_pipe import open_webui_openrouter_pipe as plugin
from tests.simulator import Simulator, replies, scenario
from tests.simulator.media import png
from tests.turns import CHAT, USER, Shown, answer, ask, ask_api, body, opened, whole
from tests.webui import pieces

IMAGE_MODEL = "openai/gpt-5-image"
PNG = base64.b64encode(png()).decode()


@pytest.mark.parametrize(
    ("given", "url"),
    [
        (PNG, f"data:image/png;base64,{PNG}"),
        ("/9j/4AAQ", "data:image/jpeg;base64,/9j/4AAQ"),
        ("UklGRiQA", "data:image/webp;base64,UklGRiQA"),
        ("R0lGODlh", "data:image/gif;base64,R0lGODlh"),
        ("AAAAAAAA", "data:image/png;base64,AAAAAAAA"),
        ("data:image/webp;base64,AAAA", "data:image/webp;base64,AAAA"),
        ("https://example.com/a.png", "https://example.com/a.png"),
    ],
)
def test_an_image_has_an_address_in_every_form(given: str, url: str) -> None:
    assert plugin.image_url(given) == url


async def test_a_web_address_is_not_stored() -> None:
    url = "https://example.com/a.png"

    assert await plugin.save_image(url, None, {}, "nobody") == url


# With the host's own storage -----------------------------------------------------------


@pytest.fixture(scope="module")
def request_() -> Any:
    """Return a request of an application that serves the host's files."""
    with warnings.catch_warnings(action="ignore"):
        files = import_module("open_webui.routers.files")
        fastapi = import_module("fastapi")
    app = fastapi.FastAPI()
    app.include_router(files.router, prefix="/api/v1/files")
    return types.SimpleNamespace(app=app, state=types.SimpleNamespace())


@pytest.fixture
async def user(request_: Any) -> dict[str, Any]:
    """Return a user who is in the host's database."""
    users = import_module("open_webui.models.users").Users
    id_ = uuid.uuid4().hex
    made = await users.insert_new_user(id_, "User", f"{id_}@example.com", role="user")
    assert made
    return {**USER, "id": id_}


async def stored(url: str) -> Any:
    """Return the host's file behind a short address."""
    files = import_module("open_webui.models.files").Files
    return await files.get_file_by_id(url.split("/")[-2])


async def shown_to(
    pipe: plugin.Pipe, user: dict[str, Any], request: Any, stream: bool = True
) -> Shown:
    """Ask for a picture as a user who is known."""
    shown = Shown()

    async def emit(event: dict[str, Any]) -> None:
        shown.emitted.append(event)

    asked = {**body("Draw", IMAGE_MODEL), "stream": stream}
    reply = await pipe.pipe(asked, user, CHAT, request, emit)
    shown.events += [piece async for piece in pieces(reply)]
    return shown


@pytest.mark.parametrize(
    "variant", ["base64", "data_url", "partials", "completed-only"]
)
async def test_a_picture_is_a_file_of_the_chatting_user(
    simulator: Simulator, request_: Any, user: dict[str, Any], variant: str
) -> None:
    simulator.script(scenario("H10", variant))
    async with opened(simulator) as pipe:
        shown = await shown_to(pipe, user, request_)

    (url,) = shown.images
    file = await stored(url)
    assert url.startswith("/api/v1/files/")
    assert file.user_id == user["id"]
    assert "base64" not in str(shown)
    assert not shown.cards


async def test_a_picture_of_an_answer_in_one_piece_is_shown_beside(
    simulator: Simulator, request_: Any, user: dict[str, Any]
) -> None:
    simulator.script(scenario("H10", "caption"))
    async with opened(simulator) as pipe:
        shown = await shown_to(pipe, user, request_, stream=False)

    (files,) = [e for e in shown.emitted if e["type"] == "files"]
    assert files["data"]["files"][0]["url"].startswith("/api/v1/files/")
    assert "base64" not in str(shown)


@pytest.mark.parametrize("variant", ["url", "server-tool-url"])
async def test_a_web_picture_is_shown_by_its_address(
    simulator: Simulator, variant: str
) -> None:
    simulator.script(scenario("H10", variant))
    async with opened(simulator) as pipe:
        shown = await ask(pipe, body("Draw", IMAGE_MODEL))

    assert shown.images == ["https://example.com/picture.png"]


async def test_a_picture_that_cannot_be_stored_is_said(simulator: Simulator) -> None:
    simulator.script(scenario("H10", "caption"))
    async with opened(simulator) as pipe:
        shown = await ask(pipe, body("Draw", IMAGE_MODEL))

    assert shown.images == []
    assert any("could not be stored" in line for line in shown.lines)
    assert shown.text == "A sun over hills."
    assert not shown.cards


# For others ----------------------------------------------------------------------------


async def test_an_api_client_gets_the_picture_itself(simulator: Simulator) -> None:
    simulator.script(replies.image(png()))
    async with opened(simulator) as pipe:
        shown = await ask_api(pipe, body("Draw", IMAGE_MODEL))

    assert shown.images == [f"data:image/png;base64,{PNG}"]
    assert not shown.errors


async def test_an_api_client_gets_the_picture_in_one_piece_too(
    simulator: Simulator,
) -> None:
    simulator.script(replies.image(png()))
    async with opened(simulator) as pipe:
        completion = await whole(pipe, body("Draw", IMAGE_MODEL), metadata={})

    (image,) = completion["choices"][0]["message"]["images"]
    assert image["image_url"]["url"] == f"data:image/png;base64,{PNG}"
    assert PNG not in str(completion["output"])


async def test_several_pictures_are_all_shown(simulator: Simulator) -> None:
    urls = [f"https://example.com/{n}.png" for n in range(3)]
    simulator.script(replies.compose(*map(replies.picture, urls)))
    async with opened(simulator) as pipe:
        shown = await ask(pipe, body("Draw", IMAGE_MODEL))

    assert shown.images == urls
    assert await answer(pipe) is not None
