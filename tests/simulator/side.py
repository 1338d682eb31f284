"""The endpoints beside inference: models, account, media."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from aiohttp import web

from .backend import Backend
from .catalog import Row
from .scene import provider_name
from .validation import Rejection
from .wire import to_json

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(
        body=to_json(value), status=status, content_type="application/json"
    )


def _refuse(rejection: Rejection) -> web.Response:
    return _json(rejection.body("envelope"), rejection.status)


def _error(status: int, message: str) -> web.Response:
    return _json({"error": {"code": status, "message": message}}, status)


# Models


def _split(value: str) -> set[str]:
    return {word.strip() for word in value.split(",") if word.strip()}


def _outputs(row: Row, value: str) -> bool:
    return value == "all" or bool(
        _split(value) & set(row["architecture"]["output_modalities"])
    )


def _inputs(row: Row, value: str) -> bool:
    return _split(value) <= set(row["architecture"]["input_modalities"])


def _parameters(row: Row, value: str) -> bool:
    return _split(value) <= set(row["supported_parameters"])


def _named(row: Row, value: str) -> bool:
    return value.lower() in f"{row['id']} {row['name']}".lower()


def _per_million(row: Row, key: str) -> float:
    return float(row["pricing"][key]) * 1_000_000


def is_zdr(row: Row) -> bool:
    """Tell whether a model is of the stable subset with zero data retention."""
    author, _, rest = row["id"].split(":")[0].lstrip("~").partition("/")
    if author in ("anthropic", "meta-llama"):
        return True
    return author in ("openai", "google", "mistralai") and len(rest) % 2 == 0


FILTERS: dict[str, Callable[[Row, str], bool]] = {
    "output_modalities": _outputs,
    "input_modalities": _inputs,
    "supported_parameters": _parameters,
    "q": _named,
    "context": lambda row, value: (row["context_length"] or 0) >= int(value),
    "min_price": lambda row, value: _per_million(row, "prompt") >= float(value),
    "max_price": lambda row, value: _per_million(row, "prompt") <= float(value),
    "min_output_price": lambda row, v: _per_million(row, "completion") >= float(v),
    "max_output_price": lambda row, v: _per_million(row, "completion") <= float(v),
    "arch": lambda row, value: row["architecture"]["tokenizer"] in _split(value),
    "model_authors": lambda row, value: row["id"].split("/")[0] in _split(value),
    "zdr": lambda row, value: value != "true" or is_zdr(row),
}
SORTS: dict[str, Callable[[Row], Any]] = {
    "newest": lambda row: -row["created"],
    "pricing-low-to-high": lambda row: _per_million(row, "prompt"),
    "pricing-high-to-low": lambda row: -_per_million(row, "prompt"),
    "context-high-to-low": lambda row: -(row["context_length"] or 0),
}
PAGE, LARGEST_PAGE = 500, 1_000


def select(rows: Iterable[Row], query: Mapping[str, str]) -> list[Row]:
    """Filter and sort rows as GET /models does."""
    wanted = {"output_modalities": "text", **query}
    tests = [(test, wanted[name]) for name, test in FILTERS.items() if name in wanted]
    kept = [row for row in rows if all(test(row, value) for test, value in tests)]
    order = SORTS.get(query.get("sort", ""))
    return sorted(kept, key=order) if order else kept


def page(rows: list[Row], query: Mapping[str, str], path: str) -> dict[str, Any]:
    """Cut a page out of rows, and link to the next."""
    paged = "limit" in query or "offset" in query
    offset = int(query.get("offset", 0))
    limit = min(int(query.get("limit", PAGE)), LARGEST_PAGE) if paged else len(rows)
    more = offset + limit < len(rows)
    following = f"{path}?offset={offset + limit}&limit={limit}" if more else None
    data = rows[offset : offset + limit]
    return {"data": data, "total_count": len(rows), "links": {"next": following}}


def endpoint_of(row: Row, provider: str, status: int = 0) -> dict[str, Any]:
    """Synthesize one endpoint of a model."""
    top = row["top_provider"]
    return {
        "name": f"{provider} | {row['id']}",
        "model_id": row["id"],
        "model_name": row["name"],
        "provider_name": provider,
        "tag": provider.lower().replace(" ", "-"),
        "context_length": row["context_length"],
        "max_completion_tokens": top["max_completion_tokens"],
        "max_prompt_tokens": None,
        "quantization": "unknown",
        "status": status,
        "supported_parameters": row["supported_parameters"],
        "pricing": row["pricing"],
        "supports_implicit_caching": "input_cache_read" in row["pricing"],
        "uptime_last_5m": 100,
        "uptime_last_30m": 99.9,
        "uptime_last_1d": 99.5,
        "latency_last_30m": None,
        "throughput_last_30m": None,
    }


def endpoints_of(row: Row) -> list[dict[str, Any]]:
    """Synthesize one to three endpoints of a model."""
    names = [provider_name(row["id"]), "Amazon Bedrock", "DeepInfra"]
    unique = list(dict.fromkeys(names))
    return [endpoint_of(row, name) for name in unique[: 1 + len(row["id"]) % 3]]


PROVIDER_NAMES = [
    "OpenAI",
    "Anthropic",
    "Google",
    "Mistral",
    "DeepSeek",
    "xAI",
    "Cohere",
    "Perplexity",
    "Minimax",
    "Groq",
    "Fireworks",
    "Together",
    "DeepInfra",
    "Nebius",
    "Parasail",
    "SambaNova",
    "Cerebras",
    "Novita",
    "Azure",
    "Venice",
]


def providers() -> list[dict[str, Any]]:
    """Synthesize the provider list; some know little about themselves."""
    listed = []
    for number, name in enumerate(
        [*PROVIDER_NAMES, "Amazon Bedrock", "Moonshot AI", "Z.AI"]
    ):
        slug = name.lower().replace(" ", "-").replace(".", "-")
        site = f"https://{slug}.example.com"
        listed.append(
            {
                "name": name,
                "slug": slug,
                "privacy_policy_url": f"{site}/privacy" if number % 4 else None,
                "terms_of_service_url": f"{site}/terms" if number % 3 else None,
                "status_page_url": None if number % 2 else f"{site}/status",
                "headquarters": ("US", "DE", "CN", None)[number % 4],
                "datacenters": None if number % 3 else ["US"],
            }
        )
    return listed


class Models:
    """Serve what there is to know about models and providers."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    async def listed(self, request: web.Request) -> web.Response:
        """Serve GET /models."""
        try:
            rows = select(self.backend.catalog.rows, request.query)
            return _json(page(rows, request.query, request.path))
        except ValueError as problem:
            return _error(400, f"Invalid query: {problem}")

    async def mine(self, request: web.Request) -> web.Response:
        """Serve GET /models/user: what the account's privacy settings leave."""
        if refused := self.backend.refuse_key(request.headers.get("Authorization")):
            return _refuse(refused)
        rows = select(self.backend.catalog.rows, request.query)
        allowed = [row for row in rows if not row["id"].startswith("stealth/")]
        return _json(page(allowed, request.query, request.path))

    async def count(self, request: web.Request) -> web.Response:
        """Serve GET /models/count."""
        rows = select(self.backend.catalog.rows, request.query)
        return _json({"data": {"count": len(rows)}})

    def only(self, modality: str) -> Handler:
        """Serve GET /<kind>/models."""

        async def handler(request: web.Request) -> web.Response:
            query = {**request.query, "output_modalities": modality}
            rows = select(self.backend.catalog.rows, query)
            return _json(page(rows, query, request.path))

        return handler

    def _row(self, request: web.Request) -> Row | None:
        id_ = f"{request.match_info['author']}/{request.match_info['slug']}"
        found = self.backend.catalog.resolve(id_)
        return found.row if found else None

    async def single(self, request: web.Request) -> web.Response:
        """Serve GET /model/{author}/{slug}."""
        row = self._row(request)
        return _json({"data": row}) if row else _error(404, "Model not found")

    async def endpoints(self, request: web.Request) -> web.Response:
        """Serve GET /models/{author}/{slug}/endpoints."""
        row = self._row(request)
        if row is None:
            return _error(404, "Model not found")
        shown = {
            k: row[k] for k in ("id", "name", "created", "description", "architecture")
        }
        return _json({"data": shown | {"endpoints": endpoints_of(row)}})

    async def zdr(self, request: web.Request) -> web.Response:
        """Serve GET /endpoints/zdr."""
        rows = [row for row in self.backend.catalog.rows if is_zdr(row)]
        return _json({"data": [end for row in rows for end in endpoints_of(row)]})

    async def providers(self, request: web.Request) -> web.Response:
        """Serve GET /providers."""
        return _json({"data": providers()})


class Account:
    """Serve what an account may know about itself."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def _refused(
        self, request: web.Request, management: bool = False
    ) -> web.Response | None:
        given = request.headers.get("Authorization")
        refused = self.backend.refuse_key(given, management)
        return _refuse(refused) if refused else None

    async def key(self, request: web.Request) -> web.Response:
        """Serve GET /key."""
        if refused := self._refused(request):
            return refused
        limit, spent = self.backend.settings.key_limit, self.backend.spent
        used = dict.fromkeys(
            ("usage", "usage_daily", "usage_weekly", "usage_monthly"), spent
        )
        byok = dict.fromkeys(
            (
                "byok_usage",
                "byok_usage_daily",
                "byok_usage_weekly",
                "byok_usage_monthly",
            ),
            0,
        )
        facts = {
            "label": "sk-or-v1-sim...tor",
            "limit": limit,
            "limit_remaining": None if limit is None else limit - spent,
            "limit_reset": None,
            "include_byok_in_limit": False,
            "is_free_tier": False,
            "is_management_key": False,
            "is_provisioning_key": False,
            "creator_user_id": "user_sim",
            "expires_at": None,
            "rate_limit": {"requests": -1, "interval": "10s", "note": "deprecated"},
        }
        return _json({"data": facts | used | byok})

    async def credits(self, request: web.Request) -> web.Response:
        """Serve GET /credits."""
        if refused := self._refused(request, management=True):
            return refused
        return _json(
            {"data": {"total_credits": 100.0, "total_usage": self.backend.spent}}
        )

    async def generation(self, request: web.Request) -> web.Response:
        """Serve GET /generation, not yet for the first polls."""
        if refused := self._refused(request):
            return refused
        id_ = request.query.get("id", "")
        seen = self.backend.polls.get(id_, 0)
        self.backend.polls[id_] = seen + 1
        known = self.backend.generations.get(id_)
        if known is None or seen < self.backend.settings.generation_lag:
            return _error(404, f"Generation {id_} not found")
        return _json({"data": known})


def keyed(
    backend: Backend, handler: Callable[..., Awaitable[web.StreamResponse]]
) -> Handler:
    """Want a key, and a JSON object with a known model for a POST."""

    async def guarded(request: web.Request) -> web.StreamResponse:
        if refused := backend.refuse_key(request.headers.get("Authorization")):
            return _refuse(refused)
        if request.method != "POST":
            return await handler(backend, request)
        try:
            body = json.loads(await request.read())
        except ValueError:
            return _error(400, "Invalid JSON")
        if not isinstance(body, dict) or not backend.catalog.resolve(body.get("model")):
            return _error(400, "This model is not a valid model ID")
        return await handler(backend, request, body)

    return guarded


def add_routes(app: web.Application, backend: Backend, prefix: str) -> None:
    """Add every route of this module and of the media endpoints."""
    from . import generate

    models, account = Models(backend), Account(backend)
    id_ = "{author}/{slug}"
    gets: dict[str, Handler] = {
        "/models": models.listed,
        "/models/user": models.mine,
        "/models/count": models.count,
        f"/models/{id_}/endpoints": models.endpoints,
        f"/model/{id_}": models.single,
        "/providers": models.providers,
        "/endpoints/zdr": models.zdr,
        "/images/models": models.only("image"),
        "/videos/models": models.only("video"),
        "/embeddings/models": models.only("embeddings"),
        "/key": account.key,
        "/credits": account.credits,
        "/generation": account.generation,
    }
    for path, handler in gets.items():
        app.router.add_get(prefix + path, handler)
    for method, path, maker in generate.ROUTES:
        app.router.add_route(method, prefix + path, keyed(backend, maker))
