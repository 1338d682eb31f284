"""The HTTP face of the simulator: routes, streaming, and hanging up."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, Mapping
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from aiohttp import web

from . import control, side
from .backend import Backend
from .chat import ChatWriter, as_responses_body, chat_completion
from .ledger import Entry
from .replies import AnyReply, HttpReply, Reply, wrong
from .scene import Scene, provider_name, terminal_of
from .validation import Rejection
from .wire import Chunk, Deltas, Step, expand, render, to_json

API = "/api/v1"
JSON_TYPE = "application/json"
EXPOSED = "X-Generation-Id,X-Provider-Name,cf-ray"
BREATH = 64
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
ENTRY = web.RequestKey("entry", Entry)


def json_response(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """Answer with JSON."""
    return web.Response(
        body=to_json(value), status=status, headers=headers, content_type=JSON_TYPE
    )


def refusal_response(rejection: Rejection, style: str | None = None) -> web.Response:
    """Answer with why not."""
    return json_response(rejection.body(style), rejection.status)


def parsed(raw: bytes, content_type: str) -> Any:
    """Parse a JSON body; None when it is none."""
    if "json" not in content_type and raw[:1] not in b"{[":
        return None
    try:
        return json.loads(raw)
    except ValueError:
        return None


def is_worth_packing(request: web.Request, response: web.StreamResponse) -> bool:
    """Tell whether gzip is asked for, allowed and useful."""
    return (
        isinstance(response, web.Response)
        and response.content_type == JSON_TYPE
        and isinstance(response.body, bytes)
        and len(response.body) > 1_000
        and "gzip" in request.headers.get("Accept-Encoding", "")
    )


class Server:
    """Serve one backend."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.closing = False
        self._connections: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._numbers = count(1)

    def app(self) -> web.Application:
        """Build the aiohttp application."""
        app = web.Application(middlewares=[self._record], client_max_size=1 << 30)
        app.router.add_post(f"{API}/responses", self._responses)
        app.router.add_post(f"{API}/chat/completions", self._chat)
        side.add_routes(app, self.backend, API)
        control.add_routes(app, self.backend)
        return app

    # Recording

    def _connection(self, transport: Any) -> int:
        if transport not in self._connections:
            self._connections[transport] = next(self._numbers)
        return self._connections[transport]

    @web.middleware
    async def _record(
        self, request: web.Request, handler: Handler
    ) -> web.StreamResponse:
        """Write the ledger, and turn every failure into JSON."""
        if request.path.startswith(control.PREFIX):
            return await handler(request)
        raw = await request.read()
        entry = Entry(
            request.method,
            request.path.removeprefix(API),
            dict(request.query),
            request.headers.copy(),
            raw,
            parsed(raw, request.content_type),
            asyncio.get_running_loop().time(),
            self._connection(request.transport),
        )
        self.backend.ledger.add(entry)
        request[ENTRY] = entry
        return await self._watched(request, entry, handler)

    async def _watched(
        self, request: web.Request, entry: Entry, handler: Handler
    ) -> web.StreamResponse:
        """Run a handler, and note how its answer ended."""
        ledger, clock = self.backend.ledger, asyncio.get_running_loop().time
        try:
            response = await self._answered(request, entry, handler)
        except (asyncio.CancelledError, ConnectionError):
            if not self.closing:
                ledger.update(entry, cut_by_client=True, ended=clock())
            raise
        facts = {"status": response.status, "ended": clock()}
        ledger.update(entry, finished=entry.status != 0, **facts)
        if is_worth_packing(request, response):
            response.enable_compression(web.ContentCoding.gzip)
        return response

    async def _answered(
        self, request: web.Request, entry: Entry, handler: Handler
    ) -> web.StreamResponse:
        try:
            return await self._side_script(request, entry) or await handler(request)
        except web.HTTPException as problem:
            words = "Not Found" if problem.status == 404 else problem.reason
            return json_response(
                {"error": {"code": problem.status, "message": words}}, problem.status
            )

    async def _side_script(
        self, request: web.Request, entry: Entry
    ) -> web.StreamResponse | None:
        """Answer an endpoint beside inference from the script, if it says so."""
        if entry.path in ("/responses", "/chat/completions"):
            return None
        reply = self.backend.script.take(entry)
        if not isinstance(reply, HttpReply):
            return None
        return await self._http(request, reply, "")

    # Inference

    async def _responses(self, request: web.Request) -> web.StreamResponse:
        """Serve POST /responses."""
        return await self._inference(request, request[ENTRY].body, chat=False)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        """Serve POST /chat/completions."""
        body = request[ENTRY].body
        if isinstance(body, dict):
            body = as_responses_body(body)
        return await self._inference(request, body, chat=True)

    async def _inference(
        self, request: web.Request, body: Any, chat: bool
    ) -> web.StreamResponse:
        backend = self.backend
        if refused := backend.refuse_key(request.headers.get("Authorization")):
            return refusal_response(refused)
        verdict = backend.judge(body)
        if isinstance(verdict, Rejection):
            style = "envelope" if chat else backend.settings.error_style
            return refusal_response(verdict, style)
        header = "X-OpenRouter-Metadata"
        legacy = request.headers.get("X-OpenRouter-Experimental-Metadata", "")
        asked = request.headers.get(header, legacy).lower() == "enabled"
        scene = backend.scene(body if isinstance(body, dict) else {}, verdict, asked)
        reply = backend.reply(request[ENTRY], scene)
        return await self._perform(request, reply, scene, chat)

    async def _perform(
        self, request: web.Request, reply: AnyReply, scene: Scene, chat: bool
    ) -> web.StreamResponse:
        if isinstance(reply, HttpReply):
            return await self._http(request, reply, scene.generation)
        await asyncio.sleep(reply.wait)
        streamed, cut = bool(scene.body.get("stream")), True
        try:
            act = self._stream if streamed else self._whole
            response = await act(request, reply, scene, chat)
            cut = False
        finally:
            kind = "completions" if chat else "responses"
            self.backend.charge(scene, streamed, cut, kind)
        return response

    async def _http(
        self, request: web.Request, reply: HttpReply, generation: str
    ) -> web.StreamResponse:
        if reply.wait:
            await asyncio.sleep(reply.wait)
        if reply.end != "done":
            return await self._hang_up(request, web.Response(), reply.end)
        headers = dict(reply.headers)
        if generation:
            headers["X-Generation-Id"] = generation
        headers["Content-Type"] = reply.content_type
        return web.Response(body=reply.payload, status=reply.status, headers=headers)

    def _headers(self, scene: Scene, content_type: str) -> dict[str, str]:
        return {
            "Content-Type": content_type,
            "Cache-Control": "no-cache",
            "X-Generation-Id": scene.generation,
            "X-Provider-Name": provider_name(scene.slug),
            "CF-RAY": f"{scene.generation[-16:].lower()}-OSL",
            "Access-Control-Expose-Headers": EXPOSED,
        }

    async def _stream(
        self, request: web.Request, reply: Reply, scene: Scene, chat: bool
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=self._headers(scene, "text/event-stream"))
        await response.prepare(request)
        self.backend.ledger.update(request[ENTRY], status=200)
        steps = reply.play(scene)
        lines = ChatWriter(scene).render(steps) if chat else render(steps)
        await self._pour(response, reply.framed(lines))
        return await self._hang_up(request, response, reply.end)

    async def _pour(
        self, response: web.StreamResponse, chunks: Iterable[Chunk]
    ) -> None:
        """Write chunks, each at its time: one write per chunk, no drift."""
        clock = asyncio.get_running_loop().time
        due = clock()
        for number, (delay, chunk) in enumerate(chunks, 1):
            if delay:
                due += delay
                if (wait := due - clock()) > 0:
                    await asyncio.sleep(wait)
                else:
                    due = clock()
            elif number % BREATH == 0:
                await asyncio.sleep(0)
            if chunk:
                await response.write(chunk)

    async def _whole(
        self, request: web.Request, reply: Reply, scene: Scene, chat: bool
    ) -> web.StreamResponse:
        """Answer with one JSON: the response of the terminal event."""
        if reply.end == "stall":
            return await self._broken(request, reply, scene, None)
        steps = list(reply.play(scene))
        await asyncio.sleep(duration(steps))
        final = terminal_of(expand(steps))
        if final is None or "response" not in final:
            return await self._broken(request, reply, scene, final)
        value = final["response"]
        value = (
            chat_completion(scene, value) if chat and not value.get("error") else value
        )
        headers = self._headers(scene, JSON_TYPE)
        return web.Response(body=reply.padding + to_json(value), headers=headers)

    async def _broken(
        self, request: web.Request, reply: Reply, scene: Scene, final: Any
    ) -> web.StreamResponse:
        """Answer a request that is not streamed with what has no final response."""
        if final is not None:
            error = final.get("error") or {}
            words = error.get("message") or final.get("message") or "Provider error"
            return json_response(wrong(502, words, code=error.get("code", 502)), 502)
        response = web.StreamResponse(headers=self._headers(scene, JSON_TYPE))
        await response.prepare(request)
        await response.write(to_json(scene.response())[:200])
        return await self._hang_up(request, response, reply.end)

    async def _hang_up(
        self, request: web.Request, response: web.StreamResponse, end: str
    ) -> web.StreamResponse:
        """End a response: properly, or by the connection."""
        transport = request.transport
        if end == "stall":
            await asyncio.Event().wait()
        if end in ("reset", "abrupt") and transport is not None:
            self.backend.ledger.update(request[ENTRY], status=0)
            await asyncio.sleep(0.02)
            if end == "reset":
                linger_nothing(transport)
                transport.abort()
            else:
                transport.close()
        elif response.prepared:
            await response.write_eof()
        return response


def linger_nothing(transport: asyncio.Transport) -> None:
    """Make the kernel send RST instead of FIN."""
    connection = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def duration(steps: Iterable[Step]) -> float:
    """Add up the delays of steps."""
    return sum(s.delay * (len(s.texts) if isinstance(s, Deltas) else 1) for s in steps)
