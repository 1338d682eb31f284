"""Images, videos, embeddings, reranking and audio in a simple deterministic form."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from .backend import Backend
from .media import mp3, mp4, png
from .scene import tokens
from .wire import DONE, data_line, to_json

Body = dict[str, Any]
USAGE = {
    "prompt_tokens": 12,
    "completion_tokens": 1_290,
    "total_tokens": 1_302,
    "cost": 0.04,
}


def _json(backend: Backend, value: Any, status: int = 200) -> web.Response:
    headers = {"X-Generation-Id": backend.ids.generation(backend.settings.clock())}
    return web.Response(
        body=to_json(value),
        status=status,
        headers=headers,
        content_type="application/json",
    )


def _missing(*names: str, body: Body) -> web.Response | None:
    absent = [name for name in names if not body.get(name)]
    if not absent:
        return None
    error = {"code": 400, "message": f"Input required: specify {absent[0]!r}"}
    return web.Response(
        body=to_json({"error": error}), status=400, content_type="application/json"
    )


def _drawing(number: int) -> str:
    return base64.b64encode(png(64, 40, 20 * number)).decode()


async def images(
    backend: Backend, request: web.Request, body: Body
) -> web.StreamResponse:
    """Serve POST /images, as JSON or as a stream."""
    if refused := _missing("model", "prompt", body=body):
        return refused
    created = int(backend.settings.clock())
    drawn = [_drawing(number) for number in range(int(body.get("n") or 1))]
    backend.spent += USAGE["cost"] * len(drawn)
    if not body.get("stream"):
        data = [{"b64_json": one, "media_type": "image/png"} for one in drawn]
        return _json(backend, {"created": created, "data": data, "usage": USAGE})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    partial = {"type": "image_generation.partial_image", "partial_image_index": 0}
    final = {"type": "image_generation.completed", "media_type": "image/png"}
    final |= {"created": created, "usage": USAGE}
    for one in drawn:
        await response.write(data_line(to_json(partial | {"b64_json": one})))
        await response.write(data_line(to_json(final | {"b64_json": one})))
    await response.write(DONE)
    return response


async def videos(backend: Backend, request: web.Request, body: Body) -> web.Response:
    """Serve POST /videos."""
    if refused := _missing("model", body=body):
        return refused
    id_ = backend.ids.take(20)
    origin = str(request.url.origin()) if backend.settings.absolute_polling_url else ""
    job = {
        "id": id_,
        "polling_url": f"{origin}/api/v1/videos/{id_}",
        "status": "pending",
        "generation_id": backend.ids.generation(backend.settings.clock()),
    }
    backend.videos[id_] = {"polls": 0, "job": job}
    return _json(backend, job, 202)


async def video(backend: Backend, request: web.Request) -> web.Response:
    """Serve GET /videos/{id}: pending, in progress, then the outcome."""
    kept = backend.videos.get(request.match_info["id"])
    if kept is None:
        raise web.HTTPNotFound
    kept["polls"] += 1
    job = dict(kept["job"])
    if kept["polls"] <= backend.settings.video_polls:
        job["status"] = "in_progress" if kept["polls"] > 1 else "pending"
        return _json(backend, job)
    job["status"] = backend.settings.video_outcome
    if job["status"] == "completed":
        job["unsigned_urls"] = [f"{job['polling_url']}/content?index=0"]
        job["usage"] = {"cost": 0.4, "is_byok": False}
    else:
        job["error"] = f"Generation {job['status']}"
    return _json(backend, job)


async def video_content(backend: Backend, request: web.Request) -> web.Response:
    """Serve GET /videos/{id}/content."""
    kept = backend.videos.get(request.match_info["id"])
    if kept is None or kept["polls"] <= backend.settings.video_polls:
        raise web.HTTPNotFound
    return web.Response(body=mp4(), content_type="video/mp4")


def vector(text: str, dimensions: int) -> list[float]:
    """Embed a text: a unit vector that depends on nothing but the text."""
    seed = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    raw = [math.sin(seed[n % 32] + n) for n in range(dimensions)]
    length = math.sqrt(sum(value * value for value in raw)) or 1.0
    return [round(value / length, 6) for value in raw]


async def embeddings(
    backend: Backend, request: web.Request, body: Body
) -> web.Response:
    """Serve POST /embeddings."""
    if refused := _missing("model", "input", body=body):
        return refused
    given = body["input"] if isinstance(body["input"], list) else [body["input"]]
    size = int(body.get("dimensions") or 64)
    data = [
        {"object": "embedding", "index": index, "embedding": vector(str(text), size)}
        for index, text in enumerate(given)
    ]
    used = sum(tokens(len(str(text))) for text in given)
    usage = {"prompt_tokens": used, "total_tokens": used, "cost": used * 2e-8}
    shell = {"object": "list", "model": body["model"], "data": data}
    return _json(backend, shell | {"usage": usage})


def relevance(query: str, document: str) -> float:
    """Score a document by the words that it shares with the query."""
    asked, told = set(query.lower().split()), set(document.lower().split())
    return round(len(asked & told) / len(asked | told), 4) if asked | told else 0.0


async def rerank(backend: Backend, request: web.Request, body: Body) -> web.Response:
    """Serve POST /rerank."""
    if refused := _missing("model", "query", "documents", body=body):
        return refused
    scored: list[dict[str, Any]] = [
        {
            "index": n,
            "relevance_score": relevance(body["query"], str(d)),
            "document": {"text": d},
        }
        for n, d in enumerate(body["documents"])
    ]
    best = sorted(
        scored, key=lambda result: (-result["relevance_score"], result["index"])
    )
    results = best[: body.get("top_n") or len(best)]
    shell = {
        "id": backend.ids.generation(0),
        "model": body["model"],
        "provider": "Cohere",
    }
    usage = {"search_units": 1, "cost": 0.002}
    return _json(backend, shell | {"results": results, "usage": usage})


async def speech(backend: Backend, request: web.Request, body: Body) -> web.Response:
    """Serve POST /audio/speech."""
    if refused := _missing("model", "input", body=body):
        return refused
    if body.get("response_format", "pcm") == "mp3":
        return web.Response(body=mp3(), content_type="audio/mpeg")
    return web.Response(body=b"\0\0" * 2_400, content_type="audio/pcm")


async def transcriptions(
    backend: Backend, request: web.Request, body: Body
) -> web.Response:
    """Serve POST /audio/transcriptions, in its JSON form."""
    if refused := _missing("model", "input_audio", body=body):
        return refused
    length = len(body["input_audio"].get("data", ""))
    usage = {"seconds": 1.0, "input_tokens": 10, "output_tokens": 5, "total_tokens": 15}
    words = f"A recording of {length} base64 characters."
    return _json(backend, {"text": words, "usage": usage | {"cost": 0.0001}})


ROUTES: tuple[tuple[str, str, Callable[..., Awaitable[web.StreamResponse]]], ...] = (
    ("POST", "/images", images),
    ("POST", "/videos", videos),
    ("GET", "/videos/{id}", video),
    ("GET", "/videos/{id}/content", video_content),
    ("POST", "/embeddings", embeddings),
    ("POST", "/rerank", rerank),
    ("POST", "/audio/speech", speech),
    ("POST", "/audio/transcriptions", transcriptions),
)
