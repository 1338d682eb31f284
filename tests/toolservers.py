"""Tool servers as an admin connects them: OpenAPI, MCP and a terminal, over HTTP."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response
from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel

from tests.server import Account, free_port

JSON = dict[str, Any]
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6"
    "kgAAAABJRU5ErkJggg=="
)


class Order(BaseModel):
    """What a customer wants."""

    item: str
    count: int = 1


class Command(BaseModel):
    """What a shell is to do."""

    command: str


class Written(BaseModel):
    """What a file is to hold."""

    path: str
    content: str


@contextmanager
def served(app: Any) -> Generator[str]:
    """Serve an ASGI application on loopback, and give its address."""
    port = free_port()
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=port,
        log_level="critical",
        ws="none",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.started
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


@dataclass
class ToolServers:
    """Three tool servers, and each call that reached one of them."""

    seen: list[tuple[str, JSON]] = field(default_factory=list)

    def shop(self) -> FastAPI:
        """Build an OpenAPI tool server."""
        app = FastAPI(title="Shop")

        @app.get("/stock/{item}", operation_id="get_stock")
        def get_stock(item: str, shelf: int = 1) -> JSON:
            """Tell how many there are."""
            self.seen.append(("get_stock", {"item": item, "shelf": shelf}))
            return {"item": item, "shelf": shelf, "count": 3}

        @app.post("/orders", operation_id="place_order")
        def place_order(order: Order) -> JSON:
            """Order something."""
            self.seen.append(("place_order", order.model_dump()))
            return {"ordered": order.model_dump()}

        @app.get("/photo", operation_id="take_photo")
        def take_photo() -> Response:
            """Take a photo of the shop."""
            return Response(PIXEL, media_type="image/png")

        @app.get("/window", operation_id="open_window")
        def open_window() -> HTMLResponse:
            """Show the shop."""
            page = "<h1>Shop</h1>"
            return HTMLResponse(page, headers={"Content-Disposition": "inline"})

        @app.get("/till", operation_id="open_till")
        def open_till() -> Response:
            """Open the till, which is broken."""
            self.seen.append(("open_till", {}))
            return JSONResponse({"detail": "jammed"}, 500)

        return app

    def library(self) -> Any:
        """Build an MCP server."""
        server: MCPServer[Any] = MCPServer("library", log_level="ERROR")

        @server.tool()
        def find_book(title: str, year: int = 2000) -> str:
            """Find a book."""
            self.seen.append(("find_book", {"title": title, "year": year}))
            return f"{title} ({year}) stands in row 7"

        @server.tool()
        def shelf_mark(title: str) -> JSON:
            """Return where a book stands."""
            return {"title": title, "row": 7}

        @server.tool()
        def cover() -> Image:
            """Show a cover."""
            return Image(data=PIXEL, format="png")

        @server.tool()
        def lend(title: str) -> str:
            """Lend a book, which fails."""
            raise ToolError(f"{title} is lent")

        return server.streamable_http_app()

    def terminal(self) -> FastAPI:
        """Build a server that has what Open Terminal has."""
        app = FastAPI(title="Terminal")

        @app.post("/execute", operation_id="run_command")
        def run_command(call: Command) -> JSON:
            """Run a command."""
            self.seen.append(("run_command", call.model_dump()))
            return {"exit_code": 0, "output": "hello"}

        @app.post("/files/write", operation_id="write_file")
        def write_file(call: Written) -> JSON:
            """Write a file."""
            self.seen.append(("write_file", call.model_dump()))
            return {"path": call.path, "size": len(call.content)}

        @app.get("/files/display", operation_id="display_file")
        def display_file(path: str) -> JSON:
            """Show a file."""
            return {"path": path, "full_path": f"/home/{path}", "exists": True}

        return app


@contextmanager
def connected(admin: Account) -> Generator[ToolServers]:
    """Run the servers, and connect them to Open WebUI on its admin page."""
    servers = ToolServers()
    with ExitStack() as stack:
        shop, library, terminal = (
            stack.enter_context(served(app))
            for app in (servers.shop(), servers.library(), servers.terminal())
        )
        plain = {"auth_type": "none", "key": "", "config": {"enable": True}}
        connections = [
            {**plain, "url": shop, "path": "openapi.json", "info": {"id": "shop"}},
            {
                **plain,
                "url": f"{library}/mcp",
                "path": "",
                "type": "mcp",
                "info": {"id": "library", "name": "Library"},
            },
        ]
        _connect(admin, "tool", connections)
        _connect(admin, "terminal", [{**plain, "url": terminal, "id": "box"}])
        try:
            yield servers
        finally:
            _connect(admin, "tool", [])
            _connect(admin, "terminal", [])


def _connect(admin: Account, kind: str, connections: list[JSON]) -> None:
    key = f"{kind.upper()}_SERVER_CONNECTIONS"
    admin.call("POST", f"/api/v1/configs/{kind}_servers", {key: connections})
