"""Out-of-band control under `/_sim/`, for a simulator in another process."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from . import persona, replies, scenarios
from .backend import Backend

PREFIX = "/_sim/"
KINDS = {
    "text": replies.text,
    "reasoning": replies.reasoning,
    "tool_calls": replies.tool_calls,
    "citations": replies.citations,
    "refusal": replies.refusal,
    "http_error": replies.http_error,
    "events": replies.events,
    "json": replies.json_body,
}


def wanted_reply(order: dict[str, Any]) -> replies.AnyReply:
    """Build the reply that an order names: a scenario, or a kind with arguments."""
    options = dict(order.get("options") or {})
    if name := order.get("scenario"):
        reply = scenarios.scenario(name, order.get("variant"), **options)
    else:
        reply = KINDS[order["kind"]](*order.get("args", []), **options)
    return reply.times(order["times"]) if order.get("times") else reply


def add_routes(app: web.Application, backend: Backend) -> None:
    """Add the control routes."""

    async def ledger(request: web.Request) -> web.Response:
        return web.json_response([entry.as_json() for entry in backend.ledger])

    async def script(request: web.Request) -> web.Response:
        order = await request.json()
        orders = order if isinstance(order, list) else [order]
        try:
            for one in orders:
                model = one.get("model")
                when = (lambda e, m=model: e.model == m) if model else None
                backend.script.add(wanted_reply(one), when=when, path=one.get("path"))
        except (KeyError, TypeError, ValueError) as problem:
            return web.json_response({"error": repr(problem)}, status=400)
        return web.json_response({"queued": len(backend.script.rules)})

    async def reset(request: web.Request) -> web.Response:
        backend.reset()
        return web.json_response({"ok": True})

    async def listing(request: web.Request) -> web.Response:
        return web.json_response(scenarios.listing())

    async def prompts(request: web.Request) -> web.Response:
        return web.json_response([vars(prompt) for prompt in persona.PROMPTS])

    async def pace(request: web.Request) -> web.Response:
        backend.settings.pace = float((await request.json())["pace"])
        return web.json_response({"pace": backend.settings.pace})

    app.router.add_get(PREFIX + "ledger", ledger)
    app.router.add_post(PREFIX + "script", script)
    app.router.add_post(PREFIX + "reset", reset)
    app.router.add_get(PREFIX + "scenarios", listing)
    app.router.add_get(PREFIX + "prompts", prompts)
    app.router.add_post(PREFIX + "pace", pace)
