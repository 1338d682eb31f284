"""The simulator in a thread of its own, and a remote control for one elsewhere."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from .backend import Backend, Settings
from .catalog import Catalog, Row
from .ledger import Entry
from .replies import AnyReply
from .script import When
from .server import Server


async def serve(backend: Backend, host: str, port: int) -> tuple[Server, web.AppRunner]:
    """Start serving in the running loop."""
    server = Server(backend)
    runner = web.AppRunner(
        server.app(), handler_cancellation=True, access_log=None, shutdown_timeout=0.2
    )
    await runner.setup()
    await web.TCPSite(runner, host, port, backlog=1_024).start()
    return server, runner


class Simulator:
    """A simulated OpenRouter that serves while it is open.

    Keywords beside these are the fields of `Settings`: `pace=0` answers without
    waiting, `validate=False` accepts anything, `error_style`, `policy`, `byok`, ...
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        models: Iterable[Row] | None = None,
        **settings: Any,
    ) -> None:
        self.settings = Settings(**settings)
        self.backend = Backend(self.settings, Catalog(models))
        self.host, self.port = host, port
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._unheard: socket.socket | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Serve from a new thread, and return once it listens."""
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="simulator", daemon=True)
        self._thread.start()
        self._ready.wait(10)
        if self._failure:
            raise self._failure

    def stop(self) -> None:
        """Close every connection and the thread."""
        if self._thread is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._over.set)
            self._thread.join(10)
        if self._unheard is not None:
            self._unheard.close()

    def _run(self) -> None:
        try:
            asyncio.run(self._live())
        except BaseException as problem:  # told to the thread that started us
            self._failure = problem
        finally:
            self._ready.set()

    async def _live(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        server, runner = await serve(self.backend, self.host, self.port)
        self.port = runner.addresses[0][1]
        self._ready.set()
        await self._over.wait()
        server.closing = True
        await runner.cleanup()

    # Where

    @property
    def origin(self) -> str:
        """Return `http://host:port`."""
        return f"http://{self.host}:{self.port}"

    @property
    def base_url(self) -> str:
        """Return the base of the API."""
        return f"{self.origin}/api/v1"

    @property
    def refused_url(self) -> str:
        """Return a base where connections are refused."""
        if self._unheard is None:
            self._unheard = socket.socket()
            self._unheard.bind((self.host, 0))
        return f"http://{self.host}:{self._unheard.getsockname()[1]}/api/v1"

    @property
    def tls_url(self) -> str:
        """Return a base where the TLS handshake fails."""
        return self.base_url.replace("http:", "https:")

    unresolvable_url = "http://openrouter.invalid/api/v1"

    @property
    def api_key(self) -> str:
        """Return the inference key that is accepted."""
        return self.settings.api_key

    @property
    def management_key(self) -> str:
        """Return the management key."""
        return self.settings.management_key

    # What came, and what to answer

    @property
    def ledger(self) -> list[Entry]:
        """List every request so far."""
        return list(self.backend.ledger)

    @property
    def posts(self) -> list[Entry]:
        """List the POST /responses requests so far."""
        return [e for e in self.ledger if (e.method, e.path) == ("POST", "/responses")]

    def wait_for(
        self, predicate: Callable[[list[Entry]], Any], timeout: float = 5.0
    ) -> Any:
        """Wait until a predicate of the ledger holds, and return its value."""
        return self.backend.ledger.wait_for(predicate, timeout)

    def script(
        self,
        reply: AnyReply,
        *more: AnyReply,
        when: When | None = None,
        path: str | None = None,
    ) -> None:
        """Queue replies; `when` chooses by entry, `path` an endpoint beside inference."""
        self.backend.script.add(reply, *more, when=when, path=path)

    @property
    def unused(self) -> int:
        """Count the scripted replies that nobody fetched."""
        return len(self.backend.script.rules)

    def reset(self) -> None:
        """Forget script, ledger and minted state."""
        self.backend.reset()

    def set_models(self, rows: Iterable[Row]) -> None:
        """Serve another catalog."""
        self.backend.catalog = Catalog(rows)


class Remote:
    """Control a simulator in another process."""

    def __init__(self, origin: str) -> None:
        self.origin = origin.rstrip("/").removesuffix("/api/v1")
        self.base_url = f"{self.origin}/api/v1"

    def _call(self, name: str, value: Any = None) -> Any:
        data = None if value is None else json.dumps(value).encode()
        request = urllib.request.Request(f"{self.origin}/_sim/{name}", data)
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    def ledger(self) -> list[dict[str, Any]]:
        """List every request so far."""
        return self._call("ledger")

    def script(self, *orders: dict[str, Any]) -> int:
        """Queue replies: `{"scenario": "F22", "variant": "reset", "times": 2}`."""
        return self._call("script", list(orders))["queued"]

    def reset(self) -> None:
        """Forget script, ledger and minted state."""
        self._call("reset", {})

    def prompts(self) -> list[dict[str, str]]:
        """List what to type."""
        return self._call("prompts")

    def scenarios(self) -> dict[str, list[str]]:
        """List the scenarios and their variants."""
        return self._call("scenarios")
