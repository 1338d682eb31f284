"""
title: OpenRouter
description: Every OpenRouter model in Open WebUI, through the Responses API.
version: 0.1.0
license: MIT
required_open_webui_version: 0.12.0

    Each section uses only sections above it; its `Uses` line says which.

    01 Foundations   JSON, text, secrets at rest
    02 Settings      the valves an admin sets
    03 Errors        what can go wrong, and the words for it
    04 Wire          Responses events and items, parsed once
    07 Gateway       the only user of the HTTP library
    08 Catalog       OpenRouter's models: parsed, chosen, kept fresh
    11 Media         images that a model makes become Open WebUI files
    12 Input         chat messages become Responses input
    14 Request       one valid body for POST /responses
    15 Relay         one response's events become outputs
    16 Chat          outputs become what Open WebUI or an API client reads
    17 Turn          one request's facts, and the way it goes
    18 Runtime       what lives as long as the plugin does
    19 Pipe          what Open WebUI sees
"""

from __future__ import annotations

# region 01 Foundations ────────────────────────────────────────────────────────────────
# Small words that every other section speaks.
# Uses: nothing. Pure.
import asyncio
import base64
import codecs
import difflib
import io
import json
import logging
import os
import re
import secrets
import sys
import time
import weakref
from collections import defaultdict
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import aclosing, closing, contextmanager
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from enum import Enum
from fnmatch import fnmatchcase
from itertools import groupby
from types import TracebackType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, cast
from urllib.parse import urlsplit

import aiohttp
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import CoreSchema, core_schema
from starlette.responses import StreamingResponse
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception
from tenacity.stop import stop_after_attempt

try:  # Open WebUI brings it, and has not always done so
    from orjson import loads as _fast_loads
except ImportError:
    _fast_loads = json.loads

JsonObject = dict[str, Any]

# The module is `function_<id>_<32 hex>` in Open WebUI 0.12, `function_<id>` before.
FUNCTION_ID = re.sub(r"^function_|_[0-9a-f]{32}$", "", __name__)

LOG = logging.getLogger(f"openrouter_pipe.{FUNCTION_ID}")


def new_id(prefix: str) -> str:
    """Return an id that is unique in a conversation, such as `msg_9f86d081884c7d65`."""
    return f"{prefix}_{secrets.token_hex(8)}"


def parse_json(data: str | bytes) -> Any:
    """Return the value of a JSON text, or None when it is not JSON."""
    for loads in (_fast_loads, json.loads):  # the first refuses lone surrogates
        try:
            return loads(data)
        except (ValueError, RecursionError):
            continue
    return None


def as_object(value: object) -> JsonObject:
    """Return a JSON object as it is, and anything else as an empty one."""
    return cast(JsonObject, value) if isinstance(value, dict) else {}


def as_list(value: object) -> list[Any]:
    """Return a JSON array as it is, and anything else as an empty one."""
    return cast("list[Any]", value) if isinstance(value, list) else []


def as_objects(value: object) -> list[JsonObject]:
    """Return a JSON array as objects; what is none of either is empty."""
    return [as_object(each) for each in as_list(value)]


def whole_text(text: str) -> str:
    """Return text that UTF-8 can carry: surrogate pairs joined, lone ones replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def as_text(value: object) -> str:
    """Return a JSON string that UTF-8 can carry, and anything else as an empty one."""
    return whole_text(value) if isinstance(value, str) else ""


def as_texts(value: object) -> list[str]:
    """Return a JSON array as strings; what is none of either is empty."""
    return [as_text(each) for each in as_list(value)]


def without_blanks(value: JsonObject) -> JsonObject:
    """Return an object without the keys that hold nothing."""
    return {key: each for key, each in value.items() if each}


def as_number(value: object) -> float | None:
    """Return a JSON number that a float can hold, or None; true is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) <= sys.float_info.max else None


def seconds_in_words(seconds: float) -> str:
    """Return a waiting time as people say it: `5 seconds`, `10 minutes`, `3 hours`."""
    for size, unit in ((3600, "hour"), (60, "minute")):
        if seconds >= 1.5 * size:
            return f"{round(seconds / size)} {unit}s"
    count = max(1, round(seconds))
    return f"{count} second{'s' if count > 1 else ''}"


class Secret(str):
    """A string that is written to the database encrypted, and shown nowhere.

    A plain value is sealed with a key derived from `WEBUI_SECRET_KEY` when it is
    validated, so what Open WebUI stores and hands back is ciphertext. Where there is
    no `WEBUI_SECRET_KEY`, it stays as it is.
    """

    __slots__ = ()
    _SEAL: ClassVar[str] = "encrypted:"

    @classmethod
    def __get_pydantic_core_schema__(
        cls, _source: object, _handler: object
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(
            cls.seal, core_schema.str_schema(strip_whitespace=True)
        )

    @classmethod
    def seal(cls, value: str) -> Secret:
        """Return the value encrypted; an empty or a sealed one comes back as it is."""
        fernet = cls._fernet()
        if not value or value.startswith(cls._SEAL) or fernet is None:
            return cls(value)
        return cls(cls._SEAL + fernet.encrypt(value.encode()).decode())

    def reveal(self) -> str:
        """Return the plain value; raise ValueError when the key has changed."""
        if not self.startswith(self._SEAL):
            return str(self)
        fernet = self._fernet()
        try:
            if fernet is None:
                raise InvalidToken
            return fernet.decrypt(self.removeprefix(self._SEAL).encode()).decode()
        except InvalidToken:
            raise ValueError("sealed with another WEBUI_SECRET_KEY") from None

    def __repr__(self) -> str:
        return "Secret(set)" if self else "Secret(empty)"

    @staticmethod
    def _fernet() -> Fernet | None:
        master = os.environ.get("WEBUI_SECRET_KEY", "")
        if not master:
            return None
        derived = HKDF(SHA256(), 32, salt=None, info=b"openrouter_pipe/valves")
        return Fernet(base64.urlsafe_b64encode(derived.derive(master.encode())))


# endregion


# region 02 Settings ───────────────────────────────────────────────────────────────────
# The valves, declared once. Environment variables are defaults here, and nowhere else.
# Uses: 01. Pure.

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]

_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def _log_level_from_environment() -> LogLevel:
    name = os.environ.get("GLOBAL_LOG_LEVEL", "INFO").upper()
    return name if name in _LOG_LEVELS else "INFO"


def _named_as_declared(name: str, _info: object) -> str:
    return name


class Valves(BaseModel):
    """A group of valves: frozen, blind to unknown keys, and None means the default."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", field_title_generator=_named_as_declared
    )

    @model_validator(mode="before")
    @classmethod
    def _none_means_default(cls, values: object) -> JsonObject:
        return {k: v for k, v in as_object(values).items() if v is not None}


def _key_from_environment() -> Secret:
    return Secret.seal(os.environ.get("OPENROUTER_API_KEY", ""))


def _host_of(address: str) -> str:
    """Return the host of a web address, and nothing for what is none."""
    try:
        url = urlsplit(address)
        is_known = url.scheme in ("http", "https") and url.port != 0
    except ValueError:  # a port that is no number, a bracket that does not close
        return ""
    return url.hostname or "" if is_known else ""


class ConnectionValves(Valves):
    """How OpenRouter is reached."""

    BASE_URL: str = Field(
        default=os.environ.get("OPENROUTER_API_BASE_URL")
        or "https://openrouter.ai/api/v1",
        description="Address of the OpenRouter API. Regional hosts such as "
        "https://eu.openrouter.ai/api/v1 work too.",
    )
    API_KEY: Secret = Field(
        default_factory=_key_from_environment,  # a default in the schema would show it
        description="Your OpenRouter key (sk-or-...). Stored encrypted with "
        "WEBUI_SECRET_KEY. Default: the environment's OPENROUTER_API_KEY.",
        # The page is told of an empty default: the environment's key stays here.
        json_schema_extra={"input": {"type": "password"}, "default": ""},
    )
    HTTP_CONNECT_TIMEOUT_SECONDS: float = Field(
        default=10, gt=0, le=300, description="How long connecting may take."
    )
    HTTP_TOTAL_TIMEOUT_SECONDS: float = Field(
        default=3600,
        ge=0,
        le=86_400,
        description="How long one answer may take from request to end; 0 is no limit.",
    )
    HTTP_STREAM_IDLE_SECONDS: float = Field(
        default=300,
        gt=0,
        le=86_400,
        description="How long a stream may stay without an event. Keep-alive comments "
        "do not count: models that think long and silently need a long limit.",
    )

    @field_validator("API_KEY")
    @classmethod
    def _empty_means_default(cls, value: Secret) -> Secret:
        return value or _key_from_environment()

    @field_validator("BASE_URL")
    @classmethod
    def _is_a_url(cls, value: str) -> str:
        if not _host_of(value.strip()):
            raise ValueError(
                "BASE_URL must be a web address such as https://openrouter.ai/api/v1"
            )
        return value.strip().rstrip("/")


class CatalogValves(Valves):
    """Which models appear, and how fresh the list is."""

    MODEL_ID: str = Field(
        default="auto",
        description="`auto` for every chat model, or a comma-separated list of model "
        "ids. `*` stands for anything: `anthropic/*, openai/gpt-5*`. Variants and "
        "presets can be named: `openai/gpt-4o:nitro`, `@preset/support`.",
    )
    MODEL_CATALOG_REFRESH_SECONDS: int = Field(
        default=3600,
        ge=1,
        le=604_800,
        description="Age at which the model list is read again, in the background.",
    )


class StreamValves(Valves):
    """How an answer is shown while it comes."""

    STREAM_FORMAT: Literal["auto", "responses", "chunks"] = Field(
        default="auto",
        description="`auto`: Responses events for chats, chat.completion chunks for "
        "API clients. `chunks`: chunks for chats too, for stream filters that know "
        "nothing else. `responses`: events for API clients too.",
    )
    STREAM_INTERVAL_MS: int = Field(
        default=40,
        ge=0,
        le=1000,
        description="Text that arrives within this time is sent to the browser at "
        "once. 0 sends every piece by itself and costs more server time.",
    )


class TaskValves(Valves):
    """Titles, tags, follow-ups and search queries."""

    TASK_MODEL_REASONING_EFFORT: Effort = Field(
        default="low",
        description="Reasoning effort for titles, tags and other background tasks. A "
        "model that does not offer it gets the nearest it has.",
    )


class LogValves(Valves):
    """What the server's log tells."""

    LOG_LEVEL: LogLevel = Field(
        default=_log_level_from_environment(),
        description="How much is written to the server's log. Never keys or messages.",
    )


class Settings(LogValves, TaskValves, StreamValves, CatalogValves, ConnectionValves):
    """Every valve an admin can set, read once per request."""


# endregion


# region 03 Errors ─────────────────────────────────────────────────────────────────────
# One tree, one translation of OpenRouter's failures, one way to say them.
# Uses: 01. Pure.


class PipeError(Exception):
    """Something that ends a turn and that a person should read about.

    `detail` holds the words of whoever failed, `retry_after` seconds to wait.
    """

    happened: ClassVar[str] = "Something went wrong."
    advice: ClassVar[str] = "Try again."
    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, detail: str = "", *, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after = retry_after


class Refused(PipeError):
    """We did not send the request."""


class NotConfigured(Refused):
    """The key is missing or cannot be read."""

    happened = "No usable OpenRouter key is set."
    advice = "An admin can set the API_KEY valve of this function."
    code, status = "not_configured", 401


class UnknownModel(Refused):
    """Neither the catalog nor its variants explain the model id."""

    happened = "OpenRouter has no such model."
    advice = "Choose another model, or correct the MODEL_ID valve."
    code, status = "model_not_found", 404


class Defect(Refused):
    """A mistake of ours; the log has the traceback under the id in `detail`."""

    happened = "The OpenRouter pipe failed by a mistake of its own."
    advice = "The server's log says more under this id."
    code = "internal_error"


class BadInput(PipeError):
    """The chat holds nothing that can be sent."""

    happened = "There is no message to send."
    advice = "Write a message and send it again."
    code, status = "invalid_request", 400


class Upstream(PipeError):
    """OpenRouter or a provider behind it said no."""


class Rejected(Upstream):
    """400, 422 and whatever has no better name."""

    happened = "OpenRouter did not accept the request."
    advice = "Change the chat's or the model's parameters, or choose another model."
    code, status = "rejected", 400


class TooLong(Upstream):
    """The conversation does not fit into the model."""

    happened = "The conversation is longer than this model can read."
    advice = (
        "Start a new chat, shorten the messages, or choose a model that reads more."
    )
    code, status = "context_length_exceeded", 400


class BadKey(Upstream):
    """401."""

    happened = "OpenRouter refused the API key."
    advice = "An admin can set a valid key in the API_KEY valve of this function."
    code, status = "authentication", 401


class NoCredit(Upstream):
    """402."""

    happened = "The OpenRouter account or key has not enough credit for this request."
    advice = (
        "Add credit at https://openrouter.ai/credits, raise the key's limit, "
        "or ask for a shorter answer (max_tokens)."
    )
    code, status = "payment_required", 402


class BudgetInFlight(NoCredit):
    """402 that passes: other requests hold the budget for now."""

    happened = "Other running requests hold the credit of this OpenRouter account."
    advice = "Try again in a moment."
    retryable = True


class Forbidden(Upstream):
    """403."""

    happened = "OpenRouter or the provider refused this content or this access."
    advice = "Change the message, or choose a model or key without this rule."
    code, status = "forbidden", 403


class NoEndpoint(Upstream):
    """404."""

    happened = "No provider on OpenRouter can serve this request now."
    advice = (
        "Choose another model, or loosen the privacy, provider or tool settings "
        "that leave none."
    )
    code, status = "no_endpoint", 404


class UpstreamTimeout(Upstream):
    """408, 504, 524: somebody between us and the model stopped waiting."""

    happened = "The provider took too long to answer."
    advice = "Try again, or choose another model."
    code, status = "timeout", 504


class RequestTimeout(UpstreamTimeout):
    """408: OpenRouter did not start on the request, so it may be sent again."""

    code, status = "timeout", 408
    retryable = True


class TooLarge(Upstream):
    """413."""

    happened = "The request is larger than OpenRouter accepts."
    advice = "Remove large files or images, or start a new chat."
    code, status = "payload_too_large", 413


class RateLimited(Upstream):
    """429."""

    happened = "The rate limit for this model is reached."
    advice = "Wait, or choose another model."
    code, status = "rate_limit_exceeded", 429
    retryable = True


class ProviderFailed(Upstream):
    """5xx, and failures inside a stream."""

    happened = "The model's provider failed."
    advice = "Try again, or choose another model."
    code, status = "provider_error", 502
    retryable = True


class Incomplete(Upstream):
    """The model stopped before it was done; what it wrote is there."""

    happened = "The answer ends early."


class OutputLimit(Incomplete):
    """`incomplete_details.reason` is `max_output_tokens`."""

    happened = "The answer reached its length limit and ends early."
    advice = "Raise max_tokens, or ask the model to continue."
    code = "max_output_tokens"


class ThoughtLimit(Incomplete):
    """The limit was spent on reasoning alone."""

    happened = "The model used up its length limit while thinking."
    advice = "Raise max_tokens, or lower the reasoning effort."
    code = "max_output_tokens"


class Filtered(Incomplete):
    """`incomplete_details.reason` is `content_filter`."""

    happened = "The provider's content filter stopped the answer."
    advice = "Change the question, or choose another model."
    code = "content_filter"


class NoAnswer(Upstream):
    """A response that completed with nothing in it."""

    happened = "The model returned no answer."
    advice = "Regenerate the reply, or choose another model."
    code, status = "no_answer", 502


class Unreachable(PipeError):
    """The network between us and OpenRouter."""


class ConnectFailed(Unreachable):
    """No connection was made, so nothing was sent."""

    happened = "OpenRouter cannot be reached."
    advice = "Check the server's network and the BASE_URL valve, then try again."
    code, status = "connection_failed", 502
    retryable = True


class ConnectionLost(Unreachable):
    """The connection ended before the answer did."""

    happened = "The connection to OpenRouter was lost; the answer may be incomplete."
    advice = "Regenerate the reply, or ask the model to continue."
    code, status = "connection_lost", 502


class NotAnswered(ConnectionLost):
    """The connection ended behind the request, so it may have been accepted."""

    happened = "The connection to OpenRouter was lost before an answer came."
    advice = "Send the message again; the lost request may have been charged."


class TimedOut(Unreachable):
    """One of our own limits ran out."""

    happened = "OpenRouter stayed silent for too long, so the request was ended."
    advice = "Try again, or let an admin raise HTTP_STREAM_IDLE_SECONDS."
    code, status = "timeout", 504


class TookTooLong(TimedOut):
    """`HTTP_TOTAL_TIMEOUT_SECONDS` ran out."""

    happened = "The answer took longer than this server allows."
    advice = "Try again, or let an admin raise HTTP_TOTAL_TIMEOUT_SECONDS."


class Fault(NamedTuple):
    """A failure as OpenRouter words it, in a body or in a stream."""

    code: str
    message: str
    error_type: str = ""
    retry_after: float | None = None
    limit: str = ""


_BY_STATUS: dict[int, type[Upstream]] = {
    401: BadKey,
    402: NoCredit,
    403: Forbidden,
    404: NoEndpoint,
    408: RequestTimeout,
    413: TooLarge,
    429: RateLimited,
    504: UpstreamTimeout,
    520: UpstreamTimeout,
    524: UpstreamTimeout,
}

# OpenRouter's `error_type` and Responses `error.code` (openrouter.md 4.4).
_BY_NAME: dict[str, type[Upstream]] = {
    "authentication": BadKey,
    "content_policy_violation": Forbidden,
    "context_length_exceeded": TooLong,
    "image_content_policy_violation": Forbidden,
    "invalid_prompt": Rejected,
    "invalid_request": Rejected,
    "not_found": NoEndpoint,
    "payload_too_large": TooLarge,
    "payment_required": NoCredit,
    "permission_denied": Forbidden,
    "provider_overloaded": ProviderFailed,
    "provider_unavailable": ProviderFailed,
    "rate_limit_exceeded": RateLimited,
    "server": ProviderFailed,
    "server_error": ProviderFailed,
    "string_too_long": TooLong,
    "timeout": UpstreamTimeout,
    "token_limit_exceeded": TooLong,
    "unprocessable": Rejected,
}

_KEYS = re.compile(r"\bsk-[\w-]{6,}")

_DETAIL_LIMIT = 600


def _provider_words(error: JsonObject, metadata: JsonObject) -> str:
    """Return the most telling sentence: the provider's own where there is one."""
    raw = as_text(metadata.get("raw"))
    inner = parse_json(raw)
    nested = as_object(as_object(inner).get("error")) or as_object(inner)
    words = as_text(nested.get("message")) or (raw if inner is None else "")
    words = words or as_text(error.get("message"))
    said = ": ".join(filter(None, (as_text(metadata.get("provider_name")), words)))
    reasons = ", ".join(as_texts(metadata.get("reasons")))
    return f"{said} ({reasons})" if reasons else said


def parse_fault(body: object) -> Fault | None:
    """Return the failure in a body, an event or a response object, if there is one.

    `error` may be nested or flat, its code a number, a string or missing, and a
    provider's own words a JSON text inside `metadata.raw` (openrouter.md 4.2).
    """
    outer = as_object(body)
    error = as_object(outer.get("error"))
    if not error:
        flat = as_text(outer.get("error")) or as_text(outer.get("message"))
        if not flat:
            return None
        error = {"message": flat, "code": outer.get("code")}
    metadata = as_object(error.get("metadata") or outer.get("metadata"))
    availability = as_object(error.get("availability"))
    code = error.get("code")
    return Fault(
        code="" if code is None else str(code),
        message=_provider_words(error, metadata),
        error_type=as_text(outer.get("error_type"))
        or as_text(metadata.get("error_type"))
        or as_text(error.get("error_type")),
        retry_after=as_number(availability.get("retry_after")),
        limit=as_text(metadata.get("limit_source")),
    )


def _as_status(code: str) -> int:
    return int(code) if code.isdecimal() and len(code) == 3 else 0


def presentable(words: str) -> str:
    """Return somebody else's sentence for a card: short, no markup, no keys."""
    if "<html" in words.lower() or "<!doctype" in words.lower():
        return ""
    words = _KEYS.sub("sk-…", " ".join(words.split()))
    return words if len(words) <= _DETAIL_LIMIT else words[:_DETAIL_LIMIT] + "…"


def classify(
    status: int, fault: Fault | None, retry_after: float | None = None
) -> PipeError:
    """Return the error for an HTTP status, a failure in words, or both.

    `status` is 0 for a failure inside a stream; its code may then be a number.
    """
    fault = fault or Fault("", "")
    number = status if status >= 400 else _as_status(fault.code)
    named = _BY_NAME.get(fault.error_type) or _BY_NAME.get(fault.code)
    kind = _BY_STATUS.get(number) or named
    if named is TooLong or "context length" in fault.message.lower():
        kind = TooLong
    if kind is NoCredit and fault.limit == "openrouter_in_flight_budget":
        kind = BudgetInFlight
    if kind is None:
        kind = Rejected if 400 <= number < 500 else ProviderFailed
    waits = retry_after if retry_after is not None else fault.retry_after
    return kind(presentable(fault.message), retry_after=waits)


def parse_retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds to wait, from `Retry-After` in either form or a reset time.

    `now` is Unix time; `X-RateLimit-Reset` is in Unix milliseconds.
    """
    value = headers.get("Retry-After", "").strip()
    seconds = as_number(parse_json(value))
    if seconds is not None:
        return max(0.0, seconds)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError):
        pass
    reset = as_number(parse_json(headers.get("X-RateLimit-Reset", "")))
    return None if reset is None else max(0.0, reset / 1000 - now)


def render_error(error: PipeError) -> str:
    """Return the card's text: what happened, whose words, when, what to do."""
    words = error.detail.rstrip(" .")
    said = f" ({words})" if words else ""
    happened = f"{error.happened.rstrip('.')}{said}."
    if error.retry_after is not None and error.retry_after >= 1:
        wait = seconds_in_words(error.retry_after)
        return f"{happened} It can be tried again in {wait}. {error.advice}"
    return f"{happened} {error.advice}"


# endregion


# region 04 Wire ───────────────────────────────────────────────────────────────────────
# Responses events and items as typed values: parsed here, never wondered about later.
# Uses: 01 03. Pure.


class Citation(NamedTuple):
    """A web page that an answer rests on."""

    url: str
    title: str
    excerpt: str = ""


class Item(NamedTuple):
    """One output item. `text` is what a person reads of it, `raw` the item verbatim."""

    type: str
    raw: JsonObject
    text: str = ""
    citations: tuple[Citation, ...] = ()
    call_id: str = ""
    name: str = ""
    arguments: str = ""


class Snapshot(NamedTuple):
    """The `response` object of a lifecycle event or of an answer that did not stream."""

    status: str
    model: str
    items: tuple[Item, ...]
    usage: JsonObject | None
    fault: Fault | None
    incomplete: str


class Event(NamedTuple):
    """One event of a stream; what it does not carry is empty.

    `text` is the delta or the final value, `part` the content or summary index.
    """

    type: str
    slot: int = -1
    part: int = 0
    text: str = ""
    item: Item | None = None
    citation: Citation | None = None
    snapshot: Snapshot | None = None
    fault: Fault | None = None


# Where an event carries its text (openrouter.md 3.2); a delta has it in `delta`.
_FINAL_TEXT = {
    "response.output_text.done": "text",
    "response.reasoning_text.done": "text",
    "response.reasoning_summary_text.done": "text",
    "response.refusal.done": "refusal",
    "response.function_call_arguments.done": "arguments",
}

_FAILURES = frozenset({"error", "response.error", "response.failed"})


def _part_index(raw: JsonObject) -> int:
    index = raw.get("content_index", raw.get("summary_index"))
    return index if isinstance(index, int) else 0


def _summary_text(raw: JsonObject) -> str:
    """Return the summary, its parts set apart as paragraphs; some send plain strings."""
    parts = as_list(raw.get("summary"))
    texts = [as_text(part) or as_text(as_object(part).get("text")) for part in parts]
    return "\n\n".join(filter(None, texts))


def parse_citation(data: object) -> Citation | None:
    """Return a `url_citation` in its flat or nested form, or None for other kinds."""
    raw = as_object(data)
    if raw.get("type") != "url_citation":
        return None
    raw = as_object(raw.get("url_citation")) or raw
    url = as_text(raw.get("url"))
    return (
        Citation(url, as_text(raw.get("title")) or url, as_text(raw.get("content")))
        if url
        else None
    )


def _call_item(raw: JsonObject) -> Item:
    arguments = raw.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments or {})
    call_id, name = as_text(raw.get("call_id")), as_text(raw.get("name"))
    return Item("function_call", raw, "", (), call_id, name, arguments)


def parse_item(data: object) -> Item:
    """Return an output item as typed values, whatever its provider left out."""
    raw = as_object(data)
    type_ = as_text(raw.get("type"))
    if type_ == "function_call":
        return _call_item(raw)
    parts = as_objects(raw.get("content"))
    text = "".join(as_text(p.get("text")) or as_text(p.get("refusal")) for p in parts)
    if type_ == "reasoning":
        return Item(type_, raw, _summary_text(raw) or text)
    noted = (parse_citation(a) for p in parts for a in as_list(p.get("annotations")))
    return Item(type_, raw, text, tuple(filter(None, noted)))


def parse_snapshot(data: object) -> Snapshot:
    """Return a `response` object as typed values."""
    raw = as_object(data)
    usage = as_object(raw.get("usage"))
    return Snapshot(
        status=as_text(raw.get("status")),
        model=as_text(raw.get("model")),
        items=tuple(parse_item(item) for item in as_list(raw.get("output"))),
        usage=usage or None,
        fault=parse_fault(raw) if raw.get("error") else None,
        incomplete=as_text(as_object(raw.get("incomplete_details")).get("reason")),
    )


def _with_body(event: Event, raw: JsonObject) -> Event:
    """Return the event with the item, citation, snapshot or failure that it carries."""
    if "item" in raw:
        return event._replace(item=parse_item(raw["item"]))
    if "annotation" in raw:
        return event._replace(citation=parse_citation(raw["annotation"]))
    snapshot = parse_snapshot(raw["response"]) if raw.get("response") else None
    fault = None
    if event.type in _FAILURES:
        fault = (snapshot.fault if snapshot else None) or parse_fault(raw)
    return event._replace(snapshot=snapshot, fault=fault)


def _event_text(type_: str, raw: JsonObject) -> str:
    """Return a delta as it is, half a surrogate pair included, or a final value."""
    is_delta = type_.endswith(".delta")
    text = raw.get("delta" if is_delta else _FINAL_TEXT.get(type_, ""))
    if isinstance(text, dict):  # some providers send arguments as an object
        return json.dumps(text)
    return text if isinstance(text, str) else ""


def parse_event(data: object) -> Event | None:
    """Return one decoded `data:` payload as an event, or None for what is none."""
    raw = as_object(data)
    type_ = as_text(raw.get("type"))
    if not type_:
        fault = parse_fault(raw)
        return Event("error", fault=fault) if fault else None
    slot = raw.get("output_index")
    text = _event_text(type_, raw)
    event = Event(type_, slot if isinstance(slot, int) else -1, _part_index(raw), text)
    if event.text:
        return event
    return _with_body(event, raw)


# endregion


# region 07 Gateway ────────────────────────────────────────────────────────────────────
# Bytes in, events out; foreign failures become ours here.
# Uses: 01 02 03 04.

_EVENT_LIMIT = 64 * 1024 * 1024  # one event; images of several MB are a single line

_BOM = codecs.BOM_UTF8

_DONE = b"[DONE]"


class SSEDecoder:
    """Turn the bytes of an event stream into the payloads of its events.

    Only CRLF, CR and LF end a line, wherever the bytes were cut (WHATWG HTML, 9.2.6).
    Comments and all fields but `data` are passed over.
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] = []  # the line that has not ended yet
        self._held = 0
        self._data: list[bytes] = []  # lines of the event that has not ended yet
        self._gathered = 0
        self._started = False
        self._cr = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the payloads that are complete now.

        An event that has grown too large is refused with the next chunk, so that
        what came before it is not lost.
        """
        if self._held + self._gathered > _EVENT_LIMIT:
            raise ConnectionLost("one event was larger than 64 MB")
        if not self._started:
            chunk = self._without_bom(chunk)
        if self._cr or b"\r" in chunk:
            chunk = self._with_plain_line_ends(chunk)
        head, newline, rest = chunk.partition(b"\n")
        self._hold(head)
        if not newline:
            return []
        lines = [b"".join(self._pieces), *rest.split(b"\n")]
        self._pieces, self._held = [], 0
        self._hold(lines.pop())
        return [payload for line in lines if (payload := self._take(line)) is not None]

    def end(self) -> list[bytes]:
        """Return the last payload of a stream that ends without its blank line."""
        last = [self._take(b"".join(self._pieces)), self._take(b"")]
        self._pieces, self._held = [], 0
        return [payload for payload in last if payload is not None]

    def _take(self, line: bytes) -> bytes | None:
        """Keep a data line; return the payload when the line is blank."""
        if line.startswith(b"data:"):
            self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            self._gathered += len(line)
        elif not line and self._data:
            payload = b"\n".join(self._data) if len(self._data) > 1 else self._data[0]
            self._data, self._gathered = [], 0
            return payload
        return None

    def _hold(self, piece: bytes) -> None:
        if piece:
            self._pieces.append(piece)
            self._held += len(piece)

    def _without_bom(self, chunk: bytes) -> bytes:
        """Return the stream's first bytes without a byte order mark, once decided."""
        chunk = b"".join(self._pieces) + chunk
        self._pieces, self._held = [], 0
        if len(chunk) < len(_BOM) and _BOM.startswith(chunk):
            self._hold(chunk)
            return b""
        self._started = True
        return chunk.removeprefix(_BOM)

    def _with_plain_line_ends(self, chunk: bytes) -> bytes:
        """Return the bytes with LF alone; a CR at the end may be half of a CRLF."""
        if self._cr and chunk:
            chunk, self._cr = chunk.removeprefix(b"\n"), False
        self._cr = self._cr or chunk.endswith(b"\r")
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


@contextmanager
def translated(lost: type[ConnectionLost] = ConnectionLost) -> Generator[None]:
    """Turn the HTTP library's failures into ours."""
    try:
        yield
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise ConnectFailed(presentable(str(error))) from error
    except aiohttp.InvalidURL as error:
        raise ConnectFailed("BASE_URL is not a web address") from error
    except (aiohttp.ClientError, ConnectionError) as error:
        raise lost from error


class _TimeLimit:
    """Raise our own error when the idle limit or the deadline passes first."""

    def __init__(self, idle: float, deadline: float | None) -> None:
        until = asyncio.get_running_loop().time() + idle
        self._is_last = deadline is not None and deadline <= until
        self._timeout = asyncio.timeout_at(deadline if self._is_last else until)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            raise (TookTooLong() if self._is_last else TimedOut()) from None


def _ahead_of_failure(content: aiohttp.StreamReader) -> bytes:
    """Return the bytes that aiohttp would withhold once it has met an error."""
    content.set_exception(cast(BaseException, None))
    return content.read_nowait()


# The end of the bytes follows the last event; a connection that saw it serves again.
_FINAL = frozenset({"response.completed", "response.incomplete", "response.failed"})

_LAST_BYTES_SECONDS = 0.25


class EventStream:
    """The events of one response, as many at a time as have arrived.

    Reading seldom is cheap: what came meanwhile is read at once.
    """

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        valves: ConnectionValves,
        deadline: float | None,
    ) -> None:
        self._response = response
        self._decoder = SSEDecoder()
        self._idle = valves.HTTP_STREAM_IDLE_SECONDS
        self._deadline = deadline
        self._failure: PipeError | None = None
        self._over = False
        self._last = ""

    async def read(self) -> list[Event]:
        """Return the next events, at least one; an empty list is the end.

        Raise TimedOut when only silence or comments come, ConnectionLost on a cut.
        """
        arrived = self._arrived()
        events = self._parsed(self._decoder.feed(arrived)) if arrived else []
        if events:
            return events
        async with _TimeLimit(self._idle, self._deadline):
            while not self._over:
                chunk = await self._chunk()
                payloads = self._decoder.feed(chunk) if chunk else self._decoder.end()
                self._over = not chunk
                events = self._parsed(payloads)
                if events:
                    return events
        return []

    def _arrived(self) -> bytes:
        """Return what is here already: no need to set a clock for that."""
        content, deadline = self._response.content, self._deadline
        if deadline is not None and asyncio.get_running_loop().time() >= deadline:
            raise TookTooLong
        return b"" if content.exception() else content.read_nowait()

    async def _chunk(self) -> bytes:
        """Return all that has arrived; what came ahead of a failure comes first."""
        if self._failure is not None:
            raise self._failure
        try:
            with translated():
                return await self._response.content.readany()
        except PipeError as failure:
            rest = _ahead_of_failure(self._response.content)
            if not rest:
                raise
            self._failure = failure
            return rest

    def _parsed(self, payloads: list[bytes]) -> list[Event]:
        events: list[Event] = []
        for payload in payloads:
            if payload.strip() == _DONE:
                self._over = True
                break
            event = parse_event(parse_json(payload))
            if event is None:
                LOG.warning("Passed over %d bytes that are no event", len(payload))
            else:
                self._last = event.type
                events.append(event)
        return events

    def close(self) -> None:
        """Close the connection, unless the end of its bytes comes in a moment."""
        if self._last in _FINAL:
            loop = asyncio.get_running_loop()
            loop.call_later(_LAST_BYTES_SECONDS, self._response.close)
        else:
            self._response.close()


class WholeAnswer:
    """An answer that came as one JSON body, read like a stream of one event."""

    def __init__(self, event: Event) -> None:
        self._events = [event]

    async def read(self) -> list[Event]:
        """Return the one event, then the end."""
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Nothing is open."""


Answer = EventStream | WholeAnswer

# Names the application to OpenRouter; SSE must not be compressed (openrouter.md 1).
_HEADERS = {
    "Accept": "text/event-stream",
    "Accept-Encoding": "identity",
    "Content-Type": "application/json",
    "HTTP-Referer": "https://openwebui.com/",
    "X-OpenRouter-Title": "Open WebUI",
}


def api_key(valves: ConnectionValves) -> str:
    """Return the plain key; raise NotConfigured when there is none to use."""
    try:
        key = valves.API_KEY.reveal()
    except ValueError:
        raise NotConfigured(
            "the stored key was encrypted with another WEBUI_SECRET_KEY; enter it again"
        ) from None
    if not key:
        raise NotConfigured
    if not key.isascii() or not key.isprintable():
        raise NotConfigured("the key holds characters that no key has")
    return key


def _timeout(valves: ConnectionValves) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(
        total=None, sock_connect=valves.HTTP_CONNECT_TIMEOUT_SECONDS
    )


def _is_event_stream(response: aiohttp.ClientResponse) -> bool:
    return response.content_type == "text/event-stream"


async def _whole_answer(response: aiohttp.ClientResponse) -> WholeAnswer:
    """Return a JSON answer as one terminal event, or raise the failure it is."""
    body = parse_json(await response.read())
    fault = parse_fault(body)
    if response.status >= 400 or (fault and not as_object(body).get("object")):
        waits = parse_retry_after(response.headers, time.time())
        raise classify(response.status, fault, waits)
    if as_object(body).get("object") != "response":
        raise ProviderFailed("OpenRouter's answer could not be understood")
    snapshot = parse_snapshot(body)
    kind = (
        snapshot.status if snapshot.status in ("failed", "incomplete") else "completed"
    )
    if snapshot.fault:
        kind = "failed"
    return WholeAnswer(
        Event(f"response.{kind}", snapshot=snapshot, fault=snapshot.fault)
    )


class Gateway:
    """OpenRouter's API over one pool of connections."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def open(self, body: JsonObject, valves: ConnectionValves) -> Answer:
        """Post a request; return its answer once the status is known to be good.

        Raise the PipeError that the status, the body or the network stands for.
        """
        loop = asyncio.get_running_loop()
        total = valves.HTTP_TOTAL_TIMEOUT_SECONDS
        deadline = loop.time() + total if total else None
        headers = {"Authorization": f"Bearer {api_key(valves)}", **_HEADERS}
        async with _TimeLimit(valves.HTTP_STREAM_IDLE_SECONDS, deadline):
            with translated(NotAnswered):
                response = await self._client().post(
                    f"{valves.BASE_URL}/responses",
                    data=io.BytesIO(json.dumps(body).encode()),
                    headers=headers,
                    timeout=_timeout(valves),
                )
                try:
                    if response.status < 400 and _is_event_stream(response):
                        return EventStream(response, valves, deadline)
                    whole = await _whole_answer(response)
                except BaseException:  # a cancelled turn too leaves no socket behind
                    response.close()
                    raise
                response.release()
                return whole

    async def models(self, valves: ConnectionValves) -> object:
        """Return the decoded body of `GET /models`, which needs no key."""
        with translated():
            timeout = aiohttp.ClientTimeout(
                total=60, sock_connect=valves.HTTP_CONNECT_TIMEOUT_SECONDS
            )
            async with self._client().get(
                f"{valves.BASE_URL}/models", timeout=timeout
            ) as response:
                body = await response.read()
                if response.status >= 400:
                    raise classify(response.status, parse_fault(parse_json(body)))
                return await asyncio.to_thread(parse_json, body)

    async def aclose(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                limit=0, keepalive_timeout=60, resolver=aiohttp.ThreadedResolver()
            )
            self._session = aiohttp.ClientSession(connector=connector, trust_env=True)
        return self._session


# endregion


# region 08 Catalog ────────────────────────────────────────────────────────────────────
# What OpenRouter offers: rows parsed once, chosen by a valve, refreshed behind the scenes.
# Uses: 01 02 03 07.

_COLD_WAIT_SECONDS = 3.0

_FAILURE_PAUSE_SECONDS = 15.0

# Suffixes that OpenRouter explains by itself, listed or not (openrouter.md 2.3).
_VARIANTS = frozenset(
    {"free", "nitro", "floor", "exacto", "online", "thinking", "extended"}
)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One model of the catalog. `parameters` is None when the row does not say.

    `reasons` is None for a model that is not listed. `efforts` holds the reasoning
    efforts on offer, highest first: empty for no choice, None for all of them.
    """

    id: str
    name: str
    inputs: frozenset[str] | None = None
    outputs: frozenset[str] | None = None
    parameters: frozenset[str] | None = None
    reasons: bool | None = None
    reasoning_is_mandatory: bool = False
    efforts: tuple[str, ...] | None = ()
    canonical: str = ""

    def takes(self, parameter: str) -> bool:
        """Say whether the model has a parameter; when in doubt, yes."""
        return self.parameters is None or parameter in self.parameters

    def reads(self, modality: str) -> bool:
        """Say whether the model reads `image`, `audio` ...; when in doubt, yes."""
        return self.inputs is None or modality in self.inputs

    @property
    def can_chat(self) -> bool:
        """Say whether the model answers in text or images."""
        speaks = self.outputs is None or bool(self.outputs & {"text", "image"})
        return speaks and not self.id.endswith(":batch")


def _names(value: object) -> frozenset[str] | None:
    return frozenset(as_texts(value)) or None


def _efforts(reasoning: JsonObject) -> tuple[str, ...] | None:
    """Return the efforts on offer: null is all of them, absent is no choice."""
    if "supported_efforts" not in reasoning:
        return ()
    efforts = reasoning["supported_efforts"]
    return None if efforts is None else tuple(as_texts(efforts))


def _parse_card(row: JsonObject) -> ModelCard | None:
    id_ = as_text(row.get("id")).strip()
    if not id_:
        return None
    architecture = as_object(row.get("architecture"))
    parameters = _names(row.get("supported_parameters"))
    reasoning = as_object(row.get("reasoning"))
    return ModelCard(
        id=id_,
        name=as_text(row.get("name")).strip() or id_,
        inputs=_names(architecture.get("input_modalities")),
        outputs=_names(architecture.get("output_modalities")),
        parameters=parameters,
        reasons=bool(reasoning) or "reasoning" in (parameters or ()),
        reasoning_is_mandatory=reasoning.get("mandatory") is True,
        efforts=_efforts(reasoning),
        canonical=as_text(row.get("canonical_slug")),
    )


def parse_catalog(body: object) -> list[ModelCard]:
    """Return the rows of `GET /models`; raise ProviderFailed when there is no list.

    A row without an id is left out; nulls and unknown keys harm nobody.
    """
    rows = as_objects(as_object(body).get("data"))
    cards = [card for row in rows if (card := _parse_card(row))]
    if not cards:
        raise ProviderFailed("the model list was empty or could not be understood")
    return cards


class Models:
    """A catalog as it was read: look a model up, or name what was perhaps meant."""

    def __init__(self, cards: Sequence[ModelCard]) -> None:
        self.cards = tuple(cards)
        self._by_id = {card.canonical: card for card in cards if card.canonical}
        self._by_id |= {card.id: card for card in cards}

    def explain(self, model_id: str) -> ModelCard | None:
        """Return the card of an id, or of what its variant, alias or preset rests on.

        None means that OpenRouter would not know the id either.
        """
        base, _, preset = model_id.partition("@preset/")
        if preset and not base:
            return ModelCard(model_id, f"Preset {preset}", efforts=None)
        while base not in self._by_id:
            head, colon, suffix = base.rpartition(":")
            if not colon or suffix not in _VARIANTS:
                break
            base = head
        if base.startswith("~") and base not in self._by_id:
            return ModelCard(model_id, model_id, efforts=None)
        return self._by_id.get(base)

    def nearest(self, model_id: str) -> list[str]:
        """Return up to three ids that look like the one that nobody knows."""
        by_lower = {card.id.lower(): card.id for card in self.cards}
        near = difflib.get_close_matches(model_id.lower(), by_lower, 3, 0.6)
        if not near:
            wanted = model_id.lower().rpartition("/")[2]
            near = [low for low in by_lower if wanted and wanted in low][:3]
        return [by_lower[low] for low in near]


def _matches(
    models: Models, chatting: Sequence[ModelCard], entry: str
) -> list[ModelCard]:
    if "*" in entry:
        pattern = entry.lower().replace("[", "[[]").replace("?", "[?]")
        return [card for card in chatting if fnmatchcase(card.id.lower(), pattern)]
    card = models.explain(entry)
    if card is None:
        return []
    if entry == card.id:
        return [card]
    suffix = entry.removeprefix(card.id).strip(":@")
    return [
        replace(card, id=entry, name=f"{card.name} ({suffix})" if suffix else entry)
    ]


def select_models(models: Models, wanted: str) -> tuple[list[ModelCard], list[str]]:
    """Return the cards that `MODEL_ID` asks for, and the entries that match nothing."""
    chatting = [card for card in models.cards if card.can_chat]
    entries = [name for entry in wanted.split(",") if (name := entry.strip())]
    if not entries or "auto" in map(str.lower, entries):
        return chatting, []
    matches = {entry: _matches(models, chatting, entry) for entry in entries}
    chosen = {card.id: card for cards in matches.values() for card in cards}
    return list(chosen.values()), [e for e, cards in matches.items() if not cards]


def did_you_mean(ids: Sequence[str]) -> str:
    """Return `; did you mean a, b or c?`, or nothing where there is no guess."""
    if not ids:
        return ""
    *most, last = ids
    return f"; did you mean {', '.join(most)}{' or ' if most else ''}{last}?"


class Catalog:
    """The model list of one address: one refresh at a time, stale rather than none."""

    def __init__(
        self,
        gateway: Gateway,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._gateway = gateway
        self._spawn = spawn
        self._models: Models | None = None
        self._address = ""
        self._checked_at = float("-inf")
        self._has_failed = False
        self._refreshing: asyncio.Task[None] | None = None
        self._rendered: tuple[Models, str, list[dict[str, str]]] | None = None

    async def models(self, settings: Settings) -> Models | None:
        """Return what is known: at once when warm, within 3 seconds when cold.

        None means that OpenRouter could not be asked yet.
        """
        if self._address != settings.BASE_URL:
            self._address, self._checked_at = settings.BASE_URL, float("-inf")
            self._models = self._refreshing = None  # the old one's refresh says nothing
        if self._is_due(settings) and self._refreshing is None:
            self._refreshing = self._spawn(self._refresh(settings))
        if self._models is None and self._refreshing is not None:
            await asyncio.wait([self._refreshing], timeout=_COLD_WAIT_SECONDS)
        return self._models

    async def listing(self, settings: Settings) -> list[dict[str, str]]:
        """Return `{"id", "name"}` of every model that Open WebUI should show."""
        models = await self.models(settings)
        if models is None:
            LOG.warning("No model list from %s yet", settings.BASE_URL)
            return []
        if self._rendered is None or self._rendered[:2] != (models, settings.MODEL_ID):
            cards, unknown = select_models(models, settings.MODEL_ID)
            for entry in unknown:
                LOG.warning(
                    "MODEL_ID names %s, which OpenRouter does not have%s",
                    entry,
                    did_you_mean(models.nearest(entry)),
                )
            rows = [{"id": card.id, "name": card.name} for card in cards]
            self._rendered = (models, settings.MODEL_ID, rows)
        return list(self._rendered[2])

    def _is_due(self, settings: Settings) -> bool:
        age = settings.MODEL_CATALOG_REFRESH_SECONDS
        pause = _FAILURE_PAUSE_SECONDS if self._has_failed else age
        return time.monotonic() >= self._checked_at + pause

    async def _refresh(self, settings: Settings) -> None:
        has_failed = True
        try:
            cards = parse_catalog(await self._gateway.models(settings))
            if self._address == settings.BASE_URL:
                self._models = Models(cards)
            has_failed = False
            LOG.info("Read %d models from %s", len(cards), settings.BASE_URL)
        except (PipeError, TimeoutError) as error:
            kept = "the last list stays" if self._models else "there is no list yet"
            reason = render_error(error) if isinstance(error, PipeError) else "Timeout."
            LOG.warning("The model list was not refreshed, %s. %s", kept, reason)
        finally:
            if self._refreshing is asyncio.current_task():
                self._checked_at, self._has_failed = time.monotonic(), has_failed
                self._refreshing = None


# endregion


# region 11 Media ──────────────────────────────────────────────────────────────────────
# Images that a model makes become files of the chatting user.
# Uses: 01. I/O.

_IMAGE_MAGIC = {"iVBOR": "png", "/9j/": "jpeg", "UklGR": "webp", "R0lGO": "gif"}


def image_url(image: str) -> str:
    """Return an image result as a URL: a data URL for bare base64 (H10 a-c)."""
    if image.startswith(("data:", "https://", "http://")):
        return image
    kind = next((k for m, k in _IMAGE_MAGIC.items() if image.startswith(m)), "png")
    return f"data:image/{kind};base64,{image}"


async def save_image(url: str, request: Any, metadata: JsonObject, user_id: str) -> str:
    """Return the short URL of an image, stored as a file that belongs to the user.

    A web address is returned as it is. Raise OSError when it cannot be stored.
    """
    if not url.startswith("data:"):
        return url
    from open_webui.models.users import Users
    from open_webui.utils.files import get_image_url_from_base64

    user = await Users.get_user_by_id(user_id)
    saved = await get_image_url_from_base64(request, url, metadata, user)
    if not saved:
        raise OSError("Open WebUI did not take the image")
    return cast(str, saved)


# endregion


# region 12 Input ──────────────────────────────────────────────────────────────────────
# Chat messages in, Responses input out. What is left out is named, never dropped quietly.
# Uses: 01 03 08. Pure.


class ChatInput(NamedTuple):
    """What a conversation becomes; `notes` name what could not be sent."""

    instructions: str
    items: list[JsonObject]
    notes: tuple[str, ...]


def _message(role: str, content: str | list[JsonObject]) -> JsonObject:
    return {"type": "message", "role": role, "content": content}


def _plain(content: object) -> str:
    """Return the text of a message's content, be it a string or a list of parts."""
    if isinstance(content, str):
        return content
    texts = [as_text(part.get("text")) for part in as_objects(content)]
    return "\n".join(filter(None, texts))


def _no_part(_part: JsonObject) -> None:
    return None


def _text_part(part: JsonObject) -> JsonObject | None:
    text = as_text(part.get("text"))
    return {"type": "input_text", "text": text} if text else None


def _image_part(part: JsonObject) -> JsonObject | None:
    source = part.get("image_url")
    url = as_text(source) or as_text(as_object(source).get("url"))
    detail = as_object(source).get("detail") or part.get("detail")
    if not url.startswith(("data:", "https://", "http://")):
        return None
    known = detail if detail in ("auto", "high", "low", "original") else "auto"
    return {"type": "input_image", "image_url": url, "detail": known}


def _file_part(part: JsonObject) -> JsonObject | None:
    source = as_object(part.get("file")) or part
    keys = ("filename", "file_data", "file_url", "file_id")
    sent = {key: source[key] for key in keys if as_text(source.get(key))}
    has_content = sent.keys() - {"filename"}
    return {"type": "input_file", **sent} if has_content else None


def _audio_part(part: JsonObject) -> JsonObject | None:
    audio = as_object(part.get("input_audio"))
    format_ = as_text(audio.get("format"))
    data = as_text(audio.get("data")).rpartition(",")[2]  # raw base64, no data URL
    if format_ not in ("mp3", "wav") or not data:
        return None
    return {"type": "input_audio", "input_audio": {"data": data, "format": format_}}


def _video_part(part: JsonObject) -> JsonObject | None:
    source = part.get("video_url")
    url = as_text(source) or as_text(as_object(source).get("url"))
    if not url.startswith(("data:", "https://", "http://")):
        return None
    return {"type": "input_video", "video_url": url}


# A part's type: the modality that a model must read, and the translation.
_PARTS: dict[str, tuple[str, Callable[[JsonObject], JsonObject | None]]] = {
    "text": ("", _text_part),
    "input_text": ("", _text_part),
    "output_text": ("", _text_part),
    "image_url": ("image", _image_part),
    "input_image": ("image", _image_part),
    "file": ("", _file_part),  # OpenRouter parses files for models that cannot
    "input_file": ("", _file_part),
    "input_audio": ("audio", _audio_part),
    "video_url": ("video", _video_part),
    "input_video": ("video", _video_part),
}


class _InputWriter:
    """Collect the items of one conversation, message by message."""

    def __init__(self, card: ModelCard) -> None:
        self._card = card
        self.items: list[JsonObject] = []
        self.notes: list[str] = []

    def write(self, message: JsonObject) -> None:
        """Add one message; a role that nobody knows is a user's."""
        role = as_text(message.get("role"))
        if role == "assistant":
            self._assistant(message)
        elif role == "tool":
            self._tool_result(message)
        elif role in ("system", "developer"):
            self._add(role, _plain(message.get("content")))
        else:
            self._add("user", self._content(message.get("content")))

    def _add(self, role: str, content: str | list[JsonObject]) -> None:
        if content:
            self.items.append(_message(role, content))

    def _assistant(self, message: JsonObject) -> None:
        self._add("assistant", _plain(message.get("content")))
        for call in as_objects(message.get("tool_calls")):
            function = as_object(call.get("function"))
            arguments = function.get("arguments") or "{}"
            self.items.append(
                {
                    "type": "function_call",
                    "call_id": as_text(call.get("id")),
                    "name": as_text(function.get("name")),
                    "arguments": (
                        arguments
                        if isinstance(arguments, str)
                        else json.dumps(arguments)
                    ),
                }
            )

    def _tool_result(self, message: JsonObject) -> None:
        content = self._content(message.get("content"))
        self.items.append(
            {
                "type": "function_call_output",
                "call_id": as_text(message.get("tool_call_id")),
                "output": content or "",
            }
        )

    def _content(self, content: object) -> str | list[JsonObject]:
        if isinstance(content, str):
            return content
        return list(filter(None, map(self._part, as_objects(content))))

    def _part(self, part: JsonObject) -> JsonObject | None:
        kind = as_text(part.get("type"))
        modality, translate = _PARTS.get(kind, ("", _no_part))
        if modality and not self._card.reads(modality):
            self.notes.append(f"This model reads no {modality}; it was left out.")
            return None
        translated_part = translate(part)
        if translated_part is None and part.get("text") != "":
            self.notes.append(f"A message part of type {kind or 'none'} was left out.")
        return translated_part


def _answers(
    call_ids: Iterable[str], outputs: Mapping[str, JsonObject]
) -> list[JsonObject]:
    return [
        outputs.get(call_id)
        or {
            "type": "function_call_output",
            "call_id": call_id,
            "output": "No result was returned.",
        }
        for call_id in call_ids
    ]


def _paired(items: list[JsonObject]) -> list[JsonObject]:
    """Return the items with exactly one output behind each call, and none without.

    Providers refuse anything else (openrouter.md 8.2, rule 7).
    """
    outputs: dict[str, JsonObject] = {}
    for item in items:
        if item["type"] == "function_call_output":
            outputs.setdefault(item["call_id"], item)
    kept: list[JsonObject] = []
    called: list[str] = []  # calls of the round whose outputs are still to be placed
    seen: set[str] = set()
    for item in items:
        if item["type"] == "function_call":
            if item["call_id"] and item["call_id"] not in seen:
                seen.add(item["call_id"])
                called.append(item["call_id"])
                kept.append(item)
            continue
        kept.extend(_answers(called, outputs))  # an output too ends the round of calls
        called = []
        if item["type"] != "function_call_output":
            kept.append(item)
    return [*kept, *_answers(called, outputs)]


def build_input(messages: object, card: ModelCard) -> ChatInput:
    """Return a chat's messages as Responses input for a model.

    The system messages at the head become `instructions`. Raise BadInput when nothing
    is left to send.
    """
    rest = as_objects(messages)
    head: list[str] = []
    while rest and rest[0].get("role") in ("system", "developer"):
        head.append(_plain(rest.pop(0).get("content")))
    instructions = "\n\n".join(filter(None, head))
    writer = _InputWriter(card)
    for message in rest:
        writer.write(message)
    items = _paired(writer.items)
    if not items and instructions:  # a system prompt alone is a request too
        items, instructions = [_message("system", instructions)], ""
    if not items:
        raise BadInput
    return ChatInput(instructions, items, tuple(dict.fromkeys(writer.notes)))


# endregion


# region 14 Request ────────────────────────────────────────────────────────────────────
# One valid body for POST /responses: flat fields, no key that only Chat Completions has.
# Uses: 01 02 08 12. Pure.

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "presence_penalty",
    "frequency_penalty",
    "top_logprobs",
)

# Fields of /responses that a chat, a model row or a client may set as they are.
_AS_THEY_ARE = (
    "cache_control",
    "image_config",
    "max_tool_calls",
    "modalities",
    "models",
    "plugins",
    "preset",
    "prompt_cache_key",
    "prompt_cache_options",
    "provider",
    "route",
    "safety_identifier",
    "service_tier",
    "stop_server_tools_when",
    "trace",
    "truncation",
    "user",
    "x_search_filter",
)

# What `_translated` reads under a name of Chat Completions.
_TRANSLATED = frozenset(
    {
        "max_completion_tokens",
        "max_output_tokens",
        "max_tokens",
        "messages",
        "metadata",
        "model",
        "parallel_tool_calls",
        "reasoning",
        "reasoning_effort",
        "response_format",
        "session_id",
        "stream",
        "stream_options",
        "text",
        "tool_choice",
        "tools",
        "verbosity",
    }
)

# Tasks whose answers are short; the bound leaves room for a little reasoning.
_SHORT_TASKS = frozenset(
    {
        "autocomplete_generation",
        "emoji_generation",
        "follow_up_generation",
        "function_calling",
        "image_prompt_generation",
        "query_generation",
        "tags_generation",
        "title_generation",
    }
)

_SHORT_TASK_TOKENS = 4096

_SESSION_ID_LIMIT = 256  # openrouter.md 1

_EFFORTS: tuple[str, ...] = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def _output_limit(body: JsonObject) -> JsonObject:
    for name in ("max_output_tokens", "max_completion_tokens", "max_tokens"):
        limit = as_number(body.get(name))
        if limit is not None and limit >= 1:
            return {"max_output_tokens": int(limit)}
    return {}


def _text_options(body: JsonObject) -> JsonObject:
    """Return `text` from itself, `response_format` and `verbosity`."""
    text = dict(as_object(body.get("text")))
    wanted = as_object(body.get("response_format"))
    if wanted.get("type") == "json_schema":
        schema = as_object(wanted.get("json_schema"))
        text["format"] = {"name": "answer", **schema, "type": "json_schema"}
    elif wanted.get("type") in ("json_object", "text"):
        text["format"] = {"type": wanted["type"]}
    if as_text(body.get("verbosity")):
        text["verbosity"] = body["verbosity"]
    return {"text": text} if text else {}


def fitting_effort(wanted: str, card: ModelCard) -> str:
    """Return the effort a model offers that is nearest; the lower of two as near."""
    offered = [effort for effort in card.efforts or _EFFORTS if effort in _EFFORTS]
    if card.reasoning_is_mandatory:
        offered = [effort for effort in offered if effort != "none"]
    if wanted in offered or not offered:
        return wanted
    place = _EFFORTS.index(wanted)
    return min(
        offered, key=lambda e: (abs(_EFFORTS.index(e) - place), _EFFORTS.index(e))
    )


def _reasoning(body: JsonObject, card: ModelCard) -> JsonObject:
    """Return `reasoning` from itself and `reasoning_effort`; summaries are asked for."""
    if card.reasons is False:
        return {}
    reasoning: JsonObject = {"summary": "auto"} if card.reasons else {}
    reasoning |= as_object(body.get("reasoning"))
    effort = as_text(body.get("reasoning_effort")) or as_text(reasoning.get("effort"))
    reasoning.pop("effort", None)
    if effort.lower() in _EFFORTS:
        reasoning["effort"] = fitting_effort(effort.lower(), card)
    return {"reasoning": reasoning} if reasoning else {}


def flat_tool(entry: object) -> JsonObject | None:
    """Return a tool in the flat shape of /responses, always with `parameters`."""
    tool = as_object(entry)
    function = as_object(tool.get("function")) or tool
    if tool.get("type") != "function":
        return tool if as_text(tool.get("type")) else None
    if not as_text(function.get("name")):
        return None
    flat: JsonObject = {
        "type": "function",
        "name": function["name"],
        "parameters": as_object(function.get("parameters"))
        or {"type": "object", "properties": {}},
    }
    if as_text(function.get("description")):
        flat["description"] = function["description"]
    if isinstance(function.get("strict"), bool):
        flat["strict"] = function["strict"]
    return flat


def _tools(body: JsonObject, card: ModelCard) -> JsonObject:
    tools = list(filter(None, map(flat_tool, as_list(body.get("tools")))))
    if not tools or not card.takes("tools"):
        return {}
    sent: JsonObject = {"tools": tools}
    choice = body.get("tool_choice")
    name = as_text(as_object(as_object(choice).get("function")).get("name"))
    if name:
        sent["tool_choice"] = {"type": "function", "name": name}
    elif choice:
        sent["tool_choice"] = choice
    if isinstance(body.get("parallel_tool_calls"), bool) and card.takes(
        "parallel_tool_calls"
    ):
        sent["parallel_tool_calls"] = body["parallel_tool_calls"]
    return sent


def build_request(
    body: JsonObject,
    card: ModelCard,
    chat: ChatInput,
    *,
    session_id: str = "",
) -> JsonObject:
    """Return the request for a chat: `body` is what Open WebUI hands to `pipe()`."""
    request: JsonObject = {
        "model": card.id,
        "input": chat.items,
        "stream": True,
        "store": False,
        "include": ["reasoning.encrypted_content"],
    }
    if chat.instructions:
        request["instructions"] = chat.instructions
    if session := session_id or as_text(body.get("session_id")):
        request["session_id"] = session[:_SESSION_ID_LIMIT]
    for name in _SAMPLING:
        if as_number(body.get(name)) is not None and card.takes(name):
            request[name] = body[name]
    request |= {key: body[key] for key in _AS_THEY_ARE if body.get(key) is not None}
    request |= _output_limit(body)
    request |= _text_options(body)
    request |= _reasoning(body, card)
    request |= _tools(body, card)
    return request


def _task_reasoning(effort: str, card: ModelCard) -> JsonObject:
    if card.efforts == () and not card.reasoning_is_mandatory:
        return {"enabled": False}  # no choice of effort, so the lowest is none
    return {"effort": fitting_effort(effort, card)}


def build_task_request(
    request: JsonObject, task: str, card: ModelCard, effort: Effort
) -> JsonObject:
    """Return a chat's request as one for a title, tags or another background task.

    No tools, no plugins, little reasoning, and a bounded answer where it is short.
    """
    if task == "moa_response_generation":  # a real answer, merged from several models
        return request
    dropped = ("tools", "tool_choice", "parallel_tool_calls", "plugins", "reasoning")
    request = {key: value for key, value in request.items() if key not in dropped}
    if card.reasons:
        request["reasoning"] = _task_reasoning(effort, card)
    if task in _SHORT_TASKS:
        request.setdefault("max_output_tokens", _SHORT_TASK_TOKENS)
    return request


def unsent(body: JsonObject, request: JsonObject) -> list[str]:
    """Return the names of parameters that were set and could not be sent."""
    return sorted(
        key
        for key, value in body.items()
        if value is not None and key not in request and key not in _TRANSLATED
    )


# endregion


# region 15 Relay ──────────────────────────────────────────────────────────────────────
# One response's events become outputs: what to show and what to do.
# Uses: 01 03 04. Pure.

Kind = Literal["message", "reasoning", "function_call", "hosted"]


class Opened(NamedTuple):
    """An item begins at a slot; slots count up over the whole turn."""

    slot: int
    kind: Kind
    item: JsonObject


class Delta(NamedTuple):
    """More text of the item at a slot."""

    slot: int
    kind: Kind
    text: str


class Closed(NamedTuple):
    """The item at a slot as it shall stand in the chat."""

    slot: int
    kind: Kind
    item: JsonObject


class Keep(NamedTuple):
    """An item verbatim, as the provider wants it back; the last one of a slot counts.

    `slot` is None for an item that the chat does not show.
    """

    slot: int | None
    item: JsonObject


class Sourced(NamedTuple):
    """A citation, once per address."""

    citation: Citation


class Pictured(NamedTuple):
    """An image: a data URL or a web address."""

    url: str


class Noted(NamedTuple):
    """A line about what is going on, or what was left out."""

    text: str


class Finished(NamedTuple):
    """The response ended. `remark` says what a person should know about the end."""

    usage: JsonObject | None
    model: str
    reason: Literal["stop", "length", "content_filter", "tool_calls"]
    remark: PipeError | None = None


class Failed(NamedTuple):
    """The response failed; what was shown stays."""

    error: PipeError
    usage: JsonObject | None = None


Output = Opened | Delta | Closed | Keep | Sourced | Pictured | Noted | Finished | Failed

# Hosted tools that Open WebUI draws as cards (open-webui.md 5.4 c).
_DRAWN = frozenset({"web_search_call", "file_search_call", "computer_call"})

_KIND: dict[str, Kind] = {
    "message": "message",
    "reasoning": "reasoning",
    "function_call": "function_call",
    **dict.fromkeys(_DRAWN, "hosted"),
}

# What the chat must not carry: opaque, heavy, or only the provider's.
_OPAQUE = frozenset({"encrypted_content", "signature", "format", "logprobs"})


@dataclass(slots=True)
class _Open:
    """One item while it grows."""

    slot: int
    kind: Kind
    id: str
    raw: JsonObject
    begun: float
    touched: float
    pieces: list[str] = field(default_factory=list)
    half: str = ""  # of a surrogate pair that two deltas share
    part: int = 0
    channel: str = ""
    call_id: str = ""
    name: str = ""
    shown: str | None = None  # the text it was closed with, if it was

    @property
    def text(self) -> str:
        """Return what has arrived so far, and keep it in one piece."""
        self.pieces = ["".join(self.pieces)]
        return self.pieces[0]

    @property
    def is_closed(self) -> bool:
        """Say whether the chat holds this item as it is."""
        return self.shown is not None and self.shown == self.text


_ID_PREFIX: dict[Kind, str] = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "hosted": "ws",
}

_PICTURES = frozenset({"image_generation_call", "openrouter:image_generation"})

_UNSTREAMED = -100

# Upstream's own indexes are not negative; these stand for those it did not give.
_NO_INDEX = {"message": -1, "reasoning": -2, "function_call": -3}


def _index(event: Event, kind: str) -> int:
    return event.slot if event.slot >= 0 else _NO_INDEX.get(kind, -4)


def _whole(item: Item) -> str:
    return item.arguments if item.type == "function_call" else item.text


def _shown(state: _Open, status: str) -> JsonObject:
    """Return an item as the chat shall hold it, in Open WebUI's shape."""
    item: JsonObject = {"id": state.id, "type": state.kind, "status": status}
    text = state.text
    if state.kind == "message":
        part: JsonObject = {"type": "output_text", "text": text, "annotations": []}
        item |= {"role": "assistant", "content": [part]}
    elif state.kind == "reasoning":
        summary = [{"type": "summary_text", "text": text}] if text else []
        item |= {"summary": summary, "content": []}
        if status == "completed":
            item["duration"] = round(state.touched - state.begun, 1)
    elif state.kind == "function_call":
        arguments = text if status != "completed" else text.strip() or "{}"
        item |= {"call_id": state.call_id, "name": state.name, "arguments": arguments}
    else:
        kept = {k: v for k, v in state.raw.items() if k not in _OPAQUE}
        item = {**kept, "id": state.id, "status": status}
    return item


class Relay:
    """Turn one response's events into outputs: no await, no clock, no I/O.

    `now` is in seconds and only ever compared with itself. After something final
    came, further input is normal and yields nothing.
    """

    def __init__(self, call_ids: Collection[str] = (), first_slot: int = 0) -> None:
        self.finished = False
        self._first_slot = first_slot
        self._items: dict[int, _Open] = {}  # by upstream's output_index
        self._order: list[_Open] = []
        self._thinking: list[_Open] = []  # thoughts that nothing has followed yet
        self._hidden: set[int] = set()  # indexes of items that are not shown
        self._call_ids = set(call_ids)
        self._cited: set[str] = set()
        self._pictured = 0
        self._now = 0.0

    def feed(self, event: Event, now: float) -> list[Output]:
        """Return what one event asks for."""
        if self.finished:
            return []
        self._now = now
        handle = self.HANDLERS.get(event.type, Relay._note_unknown)
        return handle(self, event)

    def end(self) -> list[Output]:
        """Return what is left to do when the bytes stopped: say so, unless it ended."""
        return self.fail(ConnectionLost())

    def fail(self, error: PipeError, usage: JsonObject | None = None) -> list[Output]:
        """Return the end of a response that broke off, its text kept."""
        if self.finished:
            return []
        self.finished = True
        return [*self._close_all(), Failed(error, usage)]

    # Items

    def _begin(self, index: int, item: Item) -> list[Output]:
        kind = _KIND.get(item.type)
        if kind is None:
            self._hidden.add(index)
            return []
        state = _Open(
            self._first_slot + len(self._order),
            kind,
            new_id(_ID_PREFIX[kind]),
            item.raw,
            self._now,
            self._now,
        )
        if kind == "function_call":
            state.call_id, state.name = self._own_call_id(item.call_id), item.name
        settled = self._settle_thoughts()
        self._order.append(state)
        self._items[index] = state
        if kind == "reasoning":
            self._thinking.append(state)
        return [*settled, Opened(state.slot, kind, _shown(state, "in_progress"))]

    def _own_call_id(self, call_id: str) -> str:
        """Return a call id that no other call of the conversation has.

        Some providers repeat theirs, and Open WebUI would take the second call as
        answered already.
        """
        if not call_id or call_id in self._call_ids:
            call_id = new_id("call")
        self._call_ids.add(call_id)
        return call_id

    def _at(self, event: Event, kind: Kind) -> tuple[_Open | None, list[Output]]:
        """Return the item an event speaks of; begin it when upstream did not."""
        index = _index(event, kind)
        if index in self._hidden:
            return None, []
        opened: list[Output] = []
        if index not in self._items:
            opened = self._begin(index, Item(kind, {}))
        state = self._items[index]
        return (state if state.kind == kind else None), opened

    def _append(self, event: Event, kind: Kind, channel: str = "") -> list[Output]:
        state, outputs = self._at(event, kind)
        if state is None or not event.text:
            return outputs
        state.channel = state.channel or channel
        if state.channel != channel:
            return outputs  # a summary and the raw thoughts say the same twice
        text = event.text
        if channel == "summary" and event.part != state.part and state.pieces:
            text = "\n\n" + text
        state.part = event.part
        return [*outputs, *self._grow(state, text)]

    def _grow(self, state: _Open, text: str) -> list[Output]:
        text, state.half = state.half + text, ""
        if "\ud800" <= text[-1] <= "\udbff":
            text, state.half = text[:-1], text[-1]
        text = whole_text(text)
        state.pieces.append(text)
        state.touched = self._now
        delta = Delta(state.slot, state.kind, text)
        if not self._thinking or state.kind == "reasoning":
            return [delta]
        return [*self._settle_thoughts(), delta]

    def _complete(self, state: _Open, whole: str) -> list[Output]:
        """Return the text that is in the final value and was never streamed."""
        whole = whole_text(whole)
        if not whole.startswith(state.text) or whole == state.text:
            return []
        state.half = ""
        return self._grow(state, whole[len(state.text) :])

    def _settle_thoughts(self) -> list[Output]:
        """Close thoughts when something follows them: their own end may come late."""
        thoughts, self._thinking = self._thinking, []
        return [self._close(state) for state in thoughts if not state.is_closed]

    def _close(self, state: _Open) -> Output:
        if state.shown is None and not state.text:
            state.touched = self._now  # thoughts that nobody may read take time too
        state.shown = state.text
        return Closed(state.slot, state.kind, _shown(state, "completed"))

    def _close_all(self) -> list[Output]:
        self._thinking = []
        return [self._close(state) for state in self._order if not state.is_closed]

    def _cite(self, citations: Iterable[Citation]) -> list[Output]:
        new = [c for c in citations if c.url not in self._cited]
        self._cited.update(c.url for c in new)
        return [Sourced(c) for c in dict.fromkeys(new)]

    def _picture(self, item: Item) -> list[Output]:
        raw = item.raw
        image = next(
            (as_text(raw[k]) for k in ("result", "imageB64", "imageUrl") if raw.get(k)),
            "",
        )
        self._pictured += bool(image)
        return [Pictured(image)] if image else []

    # Handlers

    def _nothing(self, _event: Event) -> list[Output]:
        return []

    def _note_unknown(self, event: Event) -> list[Output]:
        if event.fault:
            return self._failed(event)
        LOG.debug("Passed over an event of type %s", event.type)
        return []

    def _item_added(self, event: Event) -> list[Output]:
        if event.item is None:
            return []
        index = _index(event, event.item.type)
        return [] if index in self._items else self._begin(index, event.item)

    def _text_delta(self, event: Event) -> list[Output]:
        return self._append(event, "message")

    def _summary_delta(self, event: Event) -> list[Output]:
        return self._append(event, "reasoning", "summary")

    def _thought_delta(self, event: Event) -> list[Output]:
        return self._append(event, "reasoning", "content")

    def _arguments_delta(self, event: Event) -> list[Output]:
        return self._append(event, "function_call")

    def _text_done(self, event: Event) -> list[Output]:
        state, outputs = self._at(event, "message")
        return [*outputs, *(self._complete(state, event.text) if state else [])]

    def _arguments_done(self, event: Event) -> list[Output]:
        state, outputs = self._at(event, "function_call")
        return [*outputs, *(self._complete(state, event.text) if state else [])]

    def _annotation_added(self, event: Event) -> list[Output]:
        return self._cite([event.citation] if event.citation else [])

    def _item_done(self, event: Event) -> list[Output]:
        item = event.item
        if item is None:
            return []
        if item.type in _PICTURES:
            return self._picture(item)
        index = _index(event, item.type)
        opened = [] if index in self._items else self._begin(index, item)
        state = self._items.get(index)
        if state is None:
            return [Keep(None, item.raw)]
        return [*opened, *self._finish_item(state, item)]

    def _finish_item(self, state: _Open, item: Item) -> list[Output]:
        """Return what the final item adds to what was streamed of it."""
        state.raw = {**item.raw, **state.raw} if state.is_closed else item.raw
        state.name = state.name or item.name
        return [
            *self._complete(state, _whole(item)),
            *self._cite(item.citations),
            self._kept(state),
            self._close(state),
        ]

    def _kept(self, state: _Open) -> Keep:
        """Return the item verbatim, but for a call id that had to be made ours."""
        if state.kind != "function_call":
            return Keep(state.slot, state.raw)
        own = {"call_id": state.call_id, "arguments": state.text.strip() or "{}"}
        return Keep(state.slot, {**state.raw, **own})

    def _completed(self, event: Event) -> list[Output]:
        return self._end_with(event.snapshot, None)

    def _incomplete(self, event: Event) -> list[Output]:
        return self._end_with(event.snapshot, event.snapshot)

    def _failed(self, event: Event) -> list[Output]:
        snapshot = event.snapshot
        absorbed = self._absorb(snapshot) if snapshot else []
        error = classify(0, event.fault)
        return [*absorbed, *self.fail(error, snapshot.usage if snapshot else None)]

    def _end_with(
        self, snapshot: Snapshot | None, cut: Snapshot | None
    ) -> list[Output]:
        snapshot = snapshot or Snapshot("", "", (), None, None, "")
        outputs = [*self._absorb(snapshot), *self._close_all()]
        self.finished = True
        calls = any(state.kind == "function_call" for state in self._order)
        reason: Literal["stop", "length", "content_filter", "tool_calls"] = "stop"
        remark: PipeError | None = None
        if cut is not None:
            filtered = cut.incomplete == "content_filter"
            reason = "content_filter" if filtered else "length"
            remark = Filtered() if filtered else self._length_remark()
        elif calls:
            reason = "tool_calls"
        elif not self._has_answer():
            remark = NoAnswer()
        return [*outputs, Finished(snapshot.usage, snapshot.model, reason, remark)]

    def _has_answer(self) -> bool:
        texts = (s.text.strip() for s in self._order if s.kind == "message")
        return self._pictured > 0 or any(texts)

    def _length_remark(self) -> PipeError:
        kinds = {state.kind for state in self._order}
        return ThoughtLimit() if kinds == {"reasoning"} else OutputLimit()

    def _absorb(self, snapshot: Snapshot) -> list[Output]:
        """Return what stands only in the final snapshot.

        Ids differ between stream and snapshot, so items pair by kind and order.
        """
        streamed: defaultdict[str, list[_Open]] = defaultdict(list)
        for state in self._order:
            streamed[state.kind].append(state)
        outputs: list[Output] = []
        for item in snapshot.items:
            kind = _KIND.get(item.type)
            if item.type in _PICTURES and not self._pictured:
                outputs += self._picture(item)
            elif kind and streamed[kind]:
                state = streamed[kind].pop(0)
                outputs += self._cite(item.citations)
                says_more = len(_whole(item)) > len(state.text)
                if not state.is_closed or says_more or item.raw.keys() - state.raw:
                    outputs += self._finish_item(state, item)
            elif kind and (kind != "reasoning" or item.text):
                index = _UNSTREAMED - len(self._order)
                outputs += self._begin(index, item)
                outputs += self._finish_item(self._items[index], item)
        return outputs

    # Every type of OpenRouter's StreamEvents, and two that only its prose knows.
    HANDLERS: ClassVar[dict[str, Callable[[Relay, Event], list[Output]]]] = {
        "error": _failed,
        "response.error": _failed,
        "response.failed": _failed,
        "response.completed": _completed,
        "response.incomplete": _incomplete,
        "response.output_item.added": _item_added,
        "response.output_item.done": _item_done,
        "response.output_text.delta": _text_delta,
        "response.output_text.done": _text_done,
        "response.refusal.delta": _text_delta,
        "response.refusal.done": _text_done,
        "response.output_text.annotation.added": _annotation_added,
        "response.reasoning_text.delta": _thought_delta,
        "response.reasoning_summary_text.delta": _summary_delta,
        "response.function_call_arguments.delta": _arguments_delta,
        "response.function_call_arguments.done": _arguments_done,
        # The item's own events say all of this again.
        **dict.fromkeys(
            (
                "response.created",
                "response.in_progress",
                "response.content_part.added",
                "response.content_part.done",
                "response.reasoning_text.done",
                "response.reasoning_summary_part.added",
                "response.reasoning_summary_part.done",
                "response.reasoning_summary_text.done",
                "response.custom_tool_call_input.delta",
                "response.custom_tool_call_input.done",
                "response.image_generation_call.in_progress",
                "response.image_generation_call.generating",
                "response.image_generation_call.partial_image",
                "response.image_generation_call.completed",
                "response.web_search_call.in_progress",
                "response.web_search_call.searching",
                "response.web_search_call.completed",
                "response.code_interpreter_call.in_progress",
                "response.code_interpreter_call.interpreting",
                "response.code_interpreter_call.completed",
                "response.code_interpreter_call_code.delta",
                "response.code_interpreter_call_code.done",
                "response.apply_patch_call_operation_diff.delta",
                "response.apply_patch_call_operation_diff.done",
                "response.fusion_call.in_progress",
                "response.fusion_call.panel.added",
                "response.fusion_call.panel.delta",
                "response.fusion_call.panel.reasoning.delta",
                "response.fusion_call.panel.completed",
                "response.fusion_call.panel.failed",
                "response.fusion_call.analysis.in_progress",
                "response.fusion_call.analysis.completed",
                "response.fusion_call.completed",
                "response.debug",
            ),
            _nothing,
        ),
    }


# endregion


# region 16 Chat ───────────────────────────────────────────────────────────────────────
# Outputs become what the caller reads: Responses events, chat chunks or one completion.
# Uses: 01 03 04 15.


def merged(outputs: Iterable[Output]) -> list[Output]:
    """Return outputs with neighbouring deltas of one item made one.

    Each event saved is one less JSON dump, socket emit and render in the browser.
    """
    result: list[Output] = []
    for _, run in groupby(
        outputs, lambda o: o.slot if isinstance(o, Delta) else object()
    ):
        first, *more = run
        if isinstance(first, Delta) and more:
            texts = [first.text, *(o.text for o in more if isinstance(o, Delta))]
            first = first._replace(text="".join(texts))
        result.append(first)
    return result


class Face(Protocol):
    """One way to show a turn."""

    def render(self, output: Output) -> list[JsonObject]:
        """Return what the reader gets for one output."""
        ...


async def paced(
    batches: AsyncGenerator[list[Output], None],
    face: Face,
    interval_seconds: float,
) -> AsyncGenerator[JsonObject, None]:
    """Yield a turn's events, text at most once per interval; the first goes at once.

    It rests after text and then reads whatever has arrived meanwhile: no timer, no
    queue, and a slow reader slows upstream down.
    """
    async with aclosing(batches):
        async for batch in batches:
            outputs = merged(batch) if interval_seconds else batch
            for output in outputs:
                for event in face.render(output):
                    yield event
            if not isinstance(outputs[-1], (Finished, Failed)):
                has_text = any(isinstance(output, Delta) for output in outputs)
                await asyncio.sleep(interval_seconds if has_text else 0)


_DELTAS: dict[Kind, JsonObject] = {
    "message": {"type": "response.output_text.delta", "content_index": 0},
    "reasoning": {"type": "response.reasoning_summary_text.delta", "summary_index": 0},
    "function_call": {"type": "response.function_call_arguments.delta"},
    "hosted": {},
}


def _item_event(what: str, slot: int, item: JsonObject) -> JsonObject:
    return {"type": f"response.output_item.{what}", "output_index": slot, "item": item}


def error_object(error: PipeError) -> JsonObject:
    """Return an error as a chat card and an API client both read it."""
    return {"message": render_error(error), "type": error.code, "code": error.status}


def _failure(error: PipeError) -> JsonObject:
    return {"type": "response.failed", "response": {"error": error_object(error)}}


def _image(url: str) -> JsonObject:
    return {"type": "image_url", "image_url": {"url": url}}


def source_data(citation: Citation) -> JsonObject:
    """Return a citation as the `source` event of Open WebUI."""
    return {
        "source": {"name": citation.title, "url": citation.url},
        "document": [citation.excerpt or citation.title],
        "metadata": [{"source": citation.url, "name": citation.title}],
    }


def status_event(text: str) -> JsonObject:
    """Return a line above the answer that stays in its history."""
    return {"type": "status", "data": {"description": text, "done": True}}


class ResponsesFace:
    """Show a turn as Responses events, which Open WebUI's chats read natively.

    The rules are those of open-webui.md 4.4.2: text parts declared as `output_text`,
    contiguous indexes, usage once, and a `response.completed` without `output`.
    """

    def __init__(self) -> None:
        self._deltas: dict[int, JsonObject] = {}  # what the deltas of a slot share

    def render(self, output: Output) -> list[JsonObject]:
        """Return the events for one output."""
        match output:
            case Delta(slot, _, text):
                return [{**self._deltas[slot], "delta": text}]
            case Opened(slot, kind, item):
                place = {"item_id": item["id"], "output_index": slot}
                self._deltas[slot] = {**_DELTAS[kind], **place}
                return [_item_event("added", slot, item)]
            case Closed(slot, _, item):
                return [_item_event("done", slot, item)]
            case Sourced(citation):
                return [{"event": {"type": "source", "data": source_data(citation)}}]
            case Pictured(url):
                return [{"choices": [{"index": 0, "delta": {"images": [_image(url)]}}]}]
            case Noted(text):
                return [{"event": status_event(text)}]
            case Finished(usage, _, _, remark):
                response = {"status": "completed", "usage": usage}
                completed = {"type": "response.completed", "response": response}
                return [completed, *([_failure(remark)] if remark else [])]
            case Failed(error, usage):
                spent = [{"choices": [], "usage": usage}] if usage else []
                return [*spent, _failure(error)]
            case Keep():
                return []


def tool_call(item: JsonObject) -> JsonObject:
    """Return a function call item in the shape of Chat Completions."""
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"id": item["call_id"], "type": "function", "function": function}


def annotation(citation: Citation) -> JsonObject:
    """Return a citation in the nested shape of Chat Completions."""
    url = {"url": citation.url, "title": citation.title}
    return {
        "type": "url_citation",
        "url_citation": {**url, "start_index": 0, "end_index": 0},
    }


def chat_usage(usage: JsonObject) -> JsonObject:
    """Return a usage with the names of Chat Completions beside those of Responses."""
    return {
        **usage,
        "prompt_tokens": usage.get("input_tokens", 0),
        "completion_tokens": usage.get("output_tokens", 0),
        "prompt_tokens_details": usage.get("input_tokens_details"),
        "completion_tokens_details": usage.get("output_tokens_details"),
    }


class ChunksFace:
    """Show a turn as chat.completion chunks.

    In a chat (`has_cards`) the end may carry a card; an API client reads the finish
    reason instead, since its library takes every `error` for a failed request.
    """

    def __init__(self, model: str, *, has_cards: bool) -> None:
        self._head: JsonObject = {
            "id": new_id("chatcmpl"),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }
        self._has_cards = has_cards
        self._speaking: int | None = None  # the message that text was last written to
        self._counts: defaultdict[str, int] = defaultdict(int)

    def render(self, output: Output) -> list[JsonObject]:
        """Return the chunks for one output."""
        match output:
            case Delta(slot, "message", text):
                return [self._chunk({"content": self._paragraph(slot) + text})]
            case Delta(_, "reasoning", text):
                return [self._chunk({"reasoning_content": text})]
            case Closed(_, "function_call", item):
                return [self._entry("tool_calls", tool_call(item))]
            case Sourced(citation):
                return [self._entry("annotations", annotation(citation))]
            case Pictured(url):
                return [self._entry("images", _image(url))]
            case Noted(text) if self._has_cards:
                return [{"event": status_event(text)}]
            case Finished():
                return self._finished(output)
            case Failed(error, usage):
                return [*self._usage(usage), {"error": error_object(error)}]
            case _:
                return []

    def _chunk(self, delta: JsonObject, finish: str | None = None) -> JsonObject:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return {**self._head, "choices": [choice]}

    def _paragraph(self, slot: int) -> str:
        """Return the gap between two messages of one turn."""
        is_next = self._speaking not in (None, slot)
        self._speaking = slot
        return "\n\n" if is_next else ""

    def _entry(self, name: str, entry: JsonObject) -> JsonObject:
        """Return the chunk for a list's next entry; OpenAI's library needs its index."""
        index = self._counts[name]
        self._counts[name] += 1
        return self._chunk({name: [{"index": index, **entry}]})

    def _usage(self, usage: JsonObject | None) -> list[JsonObject]:
        if not usage:
            return []
        return [{**self._head, "choices": [], "usage": chat_usage(usage)}]

    def _finished(self, output: Finished) -> list[JsonObject]:
        chunks = [self._chunk({}, output.reason), *self._usage(output.usage)]
        if output.remark and self._has_cards:
            chunks.append({"error": error_object(output.remark)})
        return chunks


def _texts(closed: Iterable[Closed], kind: Kind) -> list[str]:
    """Return what can be read of the items of a kind."""
    parts = {"message": "content", "reasoning": "summary"}[kind]
    texts = (
        "".join(p["text"] for p in c.item[parts]) for c in closed if c.kind == kind
    )
    return [text for text in texts if text]


class Completion:
    """Collect a turn for a caller who waits for all of it."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._items: dict[int, Closed] = {}
        self._citations: list[Citation] = []
        self._images: list[str] = []
        self.usage: JsonObject | None = None
        self.finish = "stop"
        self.error: PipeError | None = None
        self.remark: PipeError | None = None

    def add(self, output: Output) -> None:
        """Take one output in."""
        match output:
            case Closed(slot, _, _):
                self._items[slot] = output
            case Sourced(citation):
                self._citations.append(citation)
            case Pictured(url):
                self._images.append(url)
            case Finished(usage, _, reason, remark):
                self.usage, self.finish, self.remark = usage, reason, remark
            case Failed(error, usage):
                self.usage, self.error = usage, error
            case _:
                pass

    def result(self) -> JsonObject:
        """Return the turn as a `chat.completion` with its items beside it."""
        closed = [self._items[slot] for slot in sorted(self._items)]
        calls = [tool_call(c.item) for c in closed if c.kind == "function_call"]
        beside = {
            "reasoning_content": "\n\n".join(_texts(closed, "reasoning")),
            "tool_calls": calls,
            "annotations": [annotation(citation) for citation in self._citations],
            "images": [_image(url) for url in self._images],
        }
        text = "\n\n".join(_texts(closed, "message"))
        message = {"role": "assistant", "content": text, **without_blanks(beside)}
        return {
            "id": new_id("chatcmpl"),
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self._model,
            "choices": [{"index": 0, "message": message, "finish_reason": self.finish}],
            "output": [c.item for c in closed],
            "usage": chat_usage(self.usage) if self.usage else None,
        }


# endregion


# region 17 Turn ───────────────────────────────────────────────────────────────────────
# One request's facts, and the one way it goes: prepare, stream, finish.
# Uses: 01 02 03 04 07 08 11 12 14 15 16.

_ATTEMPTS = 3

_LONGEST_RETRY_WAIT_SECONDS = 30.0

Emitter = Callable[[JsonObject], Awaitable[None]]


class Caller(Enum):
    """Who asked, and so which form the answer takes."""

    CHAT = "chat"  # the browser, an automation: Open WebUI shows and stores it
    API = "api"  # a client of /api/chat/completions
    TASK = "task"  # Open WebUI itself, for a title, tags ...


@dataclass(frozen=True, slots=True)
class Turn:
    """What is known of one request; nothing writes to it."""

    settings: Settings
    caller: Caller
    task: str
    model_id: str  # OpenRouter's
    model_name: str  # the caller's: `<function id>.<model id>`
    is_streamed: bool
    chat_id: str
    user_id: str
    body: JsonObject = field(repr=False)
    metadata: JsonObject = field(repr=False)
    request: Any = field(repr=False)
    emitter: Emitter | None = field(repr=False)

    @classmethod
    def from_webui(
        cls,
        settings: Settings,
        body: object,
        user: object,
        metadata: object,
        request: Any,
        emitter: Emitter | None,
        task: object,
    ) -> Turn:
        """Read the arguments of `pipe()` (open-webui.md 3)."""
        facts, meta = as_object(body), as_object(metadata)
        is_chat = bool(meta.get("chat_id") and meta.get("message_id"))
        model_name = as_text(facts.get("model"))
        return cls(
            settings=settings,
            caller=Caller.TASK if task else Caller.CHAT if is_chat else Caller.API,
            task=str(task or ""),
            model_id=model_name.partition(".")[2],
            model_name=model_name,
            is_streamed=bool(facts.get("stream")),
            chat_id=as_text(meta.get("chat_id")),
            user_id=as_text(as_object(user).get("id")),
            body=facts,
            metadata=meta,
            request=request,
            emitter=emitter if is_chat and not task else None,
        )

    def face(self) -> Face:
        """Return the way this turn is shown."""
        wanted = self.settings.STREAM_FORMAT
        is_chat = self.caller is Caller.CHAT
        is_plain = self.caller is Caller.TASK or wanted == "chunks"
        if not is_plain and (is_chat or wanted == "responses"):
            return ResponsesFace()
        return ChunksFace(self.model_name, has_cards=is_chat)

    async def note(self, text: str) -> None:
        """Show a line in the chat, if there is one."""
        if self.emitter is not None:
            await self.emitter(status_event(text))


def call_ids(messages: object) -> set[str]:
    """Return the ids of the tool calls that a conversation holds already."""
    return {
        as_text(call.get("id"))
        for message in as_objects(messages)
        for call in as_objects(message.get("tool_calls"))
    }


def known_model(models: Models | None, model_id: str) -> ModelCard:
    """Return the card for a model id, under the id that was asked for.

    Without a catalog the id goes upstream as it is. Raise UnknownModel, with the
    nearest names, for an id that OpenRouter could not explain either.
    """
    if models is None:
        return ModelCard(model_id, model_id, efforts=None)
    card = models.explain(model_id)
    if card is None:
        raise UnknownModel(f"{model_id}{did_you_mean(models.nearest(model_id))}")
    return replace(card, id=model_id)


def _advanced(relay: Relay, events: Sequence[Event]) -> list[Output]:
    """Return what events ask for; no events are the end of the bytes."""
    if not events:
        return relay.end()
    now = time.monotonic()
    return [output for event in events for output in relay.feed(event, now)]


async def _with_file(turn: Turn, output: Output) -> Output:
    if not isinstance(output, Pictured):
        return output
    url = image_url(output.url)
    if turn.caller is not Caller.CHAT:
        return Pictured(url)
    try:
        return Pictured(
            await save_image(url, turn.request, turn.metadata, turn.user_id)
        )
    except Exception:  # Open WebUI's storage raises what its backend raises
        LOG.exception("An image could not be stored")
        return Noted("An image was made but could not be stored on this server.")


async def _emit_beside(turn: Turn, output: Output) -> None:
    """Show what a chat that does not stream has no place for in its completion."""
    if turn.emitter is None:
        return
    if isinstance(output, Sourced):
        await turn.emitter({"type": "source", "data": source_data(output.citation)})
    elif isinstance(output, Pictured):
        files = [{"type": "image", "url": output.url}]
        await turn.emitter({"type": "files", "data": {"files": files}})
    elif isinstance(output, Noted):
        await turn.note(output.text)


def _error_of(state: RetryCallState) -> PipeError:
    error = state.outcome.exception() if state.outcome else None
    return error if isinstance(error, PipeError) else Defect()


def _is_worth_another_try(error: BaseException) -> bool:
    """Say whether a request that has shown nothing may be sent again."""
    if not isinstance(error, PipeError) or not error.retryable:
        return False
    return (error.retry_after or 0) <= _LONGEST_RETRY_WAIT_SECONDS


def _pause(state: RetryCallState) -> float:
    """Return the seconds to wait: 0.5, then 1, or longer where upstream says so."""
    wanted = _error_of(state).retry_after or 0.0
    return max(wanted, 0.5 * 2 ** (state.attempt_number - 1))


class Conversation:
    """Lead a turn from the request to its last output."""

    def __init__(self, gateway: Gateway, catalog: Catalog) -> None:
        self._gateway = gateway
        self._catalog = catalog

    async def run(self, turn: Turn) -> AsyncGenerator[list[Output], None]:
        """Yield a turn's outputs as they come; the last is Finished or Failed.

        Failures become outputs: what was shown before them stays.
        """
        relay = Relay()
        try:
            request, notes = await self._prepare(turn)
            if notes:
                yield [Noted(note) for note in notes]
            answer, relay, outputs = await self._begin(turn, request)
            with closing(answer):
                yield await self._kept(turn, outputs)
                while not relay.finished:
                    outputs = _advanced(relay, await answer.read())
                    if outputs:
                        yield await self._kept(turn, outputs)
        except PipeError as error:
            yield relay.fail(error)
        except Exception:  # a mistake of ours must not cost the chat its text
            mark = new_id("defect")
            LOG.exception("A turn with %s failed (%s)", turn.model_id, mark)
            yield relay.fail(Defect(mark))

    async def complete(self, turn: Turn) -> Completion:
        """Return a turn as a whole."""
        completion = Completion(turn.model_name)
        async with aclosing(self.run(turn)) as batches:
            async for batch in batches:
                for output in batch:
                    completion.add(output)
                    await _emit_beside(turn, output)
        return completion

    async def _prepare(self, turn: Turn) -> tuple[JsonObject, tuple[str, ...]]:
        """Return the request, and notes about what it leaves out."""
        settings = turn.settings
        api_key(settings)  # the reason that needs no network comes first
        card = known_model(await self._catalog.models(settings), turn.model_id)
        chat = build_input(turn.body.get("messages"), card)
        request = build_request(turn.body, card, chat, session_id=turn.chat_id)
        if turn.task:
            effort = settings.TASK_MODEL_REASONING_EFFORT
            request = build_task_request(request, turn.task, card, effort)
        elif left_out := unsent(turn.body, request):
            LOG.info("Not sent to %s: %s", card.id, ", ".join(left_out))
        return request, chat.notes

    async def _begin(
        self, turn: Turn, request: JsonObject
    ) -> tuple[Answer, Relay, list[Output]]:
        """Return an answer that has begun to show; nothing was shown before."""

        async def announce(state: RetryCallState) -> None:
            error = _error_of(state)
            wait = seconds_in_words(_pause(state))
            LOG.info("Trying again in %s: %s", wait, render_error(error))
            await turn.note(f"{error.happened} Trying again in {wait} …")

        retrying = AsyncRetrying(
            stop=stop_after_attempt(_ATTEMPTS),
            wait=_pause,
            retry=retry_if_exception(_is_worth_another_try),
            before_sleep=announce,
            reraise=True,
        )
        return await retrying(self._attempt, turn, request)

    async def _attempt(
        self, turn: Turn, request: JsonObject
    ) -> tuple[Answer, Relay, list[Output]]:
        answer = await self._gateway.open(request, turn.settings)
        try:
            relay = Relay(call_ids(turn.body.get("messages")))
            outputs: list[Output] = []
            while not outputs:
                outputs = _advanced(relay, await answer.read())
            if isinstance(outputs[0], Failed):
                raise outputs[0].error
        except BaseException:  # a cancelled turn too leaves no socket behind
            answer.close()
            raise
        return answer, relay, outputs

    async def _kept(self, turn: Turn, outputs: list[Output]) -> list[Output]:
        """Return outputs with a chat's images stored as files of its user."""
        if not any(isinstance(output, Pictured) for output in outputs):
            return outputs
        return [await _with_file(turn, output) for output in outputs]


# endregion


# region 18 Runtime ────────────────────────────────────────────────────────────────────
# What lives as long as the plugin does: built on first use, closed with the last turn.
# Uses: 01 02 07 08 17.


class Runtime:
    """The collaborators and background tasks of one plugin instance."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._gateway = Gateway()
        self.catalog = Catalog(self._gateway, self.spawn)
        self.conversation = Conversation(self._gateway, self.catalog)

    def refresh(self, settings: Settings) -> None:
        """Take note of the settings and of the loop that everything runs on."""
        self._loop = asyncio.get_running_loop()
        if LOG.level != getattr(logging, settings.LOG_LEVEL):  # setting it is dear
            LOG.setLevel(settings.LOG_LEVEL)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a background task that ends with the runtime at the latest."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def close_soon(self) -> None:
        """Close from anywhere, once the plugin instance is gone."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(lambda: self.spawn(self.aclose()))

    async def aclose(self) -> None:
        """End the background tasks and close every connection."""
        others = self._tasks - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._gateway.aclose()


# endregion


# region 19 Pipe ───────────────────────────────────────────────────────────────────────
# What Open WebUI sees: it assigns `valves` before every call and calls two methods.
# Uses: 01 02 16 17 18.


class Pipe:
    """Every OpenRouter model as a model of Open WebUI."""

    class Valves(Settings):
        """What an admin sets."""

    def __init__(self) -> None:
        self.valves = self.Valves()
        self._runtime = Runtime()
        # Tasks hold the runtime, never the pipe; what `pipe()` returns holds the pipe.
        weakref.finalize(self, self._runtime.close_soon).atexit = False

    async def pipes(self) -> list[dict[str, str]]:
        """Return `{"id", "name"}` of every model to show; never raise."""
        settings = self.valves
        try:
            self._runtime.refresh(settings)
            return await self._runtime.catalog.listing(settings)
        except Exception:  # an error here would hide every model of this function
            LOG.exception("The model list could not be made")
            return []

    async def pipe(
        self,
        body: JsonObject,
        __user__: JsonObject | None = None,
        __metadata__: JsonObject | None = None,
        __request__: Any = None,
        __event_emitter__: Emitter | None = None,
        __task__: str | None = None,
    ) -> AsyncGenerator[JsonObject, None] | StreamingResponse | JsonObject:
        """Answer one request in the form that its caller reads."""
        turn = Turn.from_webui(
            self.valves,
            body,
            __user__,
            __metadata__,
            __request__,
            __event_emitter__,
            __task__,
        )
        self._runtime.refresh(turn.settings)
        if not turn.is_streamed:
            return await self._whole(turn)
        if turn.caller is Caller.API:
            return StreamingResponse(self._lines(turn), media_type="text/event-stream")
        return self._events(turn)

    async def _events(self, turn: Turn) -> AsyncGenerator[JsonObject, None]:
        """Yield what a chat shows, at the chat's pace."""
        interval = turn.settings.STREAM_INTERVAL_MS / 1000
        batches = self._runtime.conversation.run(turn)
        async with aclosing(paced(batches, turn.face(), interval)) as events:
            async for event in events:
                yield event

    async def _lines(self, turn: Turn) -> AsyncGenerator[str, None]:
        """Yield a stream for API clients, whose own end comes from us alone."""
        async with aclosing(self._events(turn)) as events:
            async for event in events:
                yield f"data: {json.dumps(event)}\n\n"
        yield "data: [DONE]\n\n"

    async def _whole(self, turn: Turn) -> StreamingResponse | JsonObject:
        """Return the finished answer; an API client gets errors with their status."""
        completion = await self._runtime.conversation.complete(turn)
        error = completion.error
        if error is not None and turn.caller is Caller.API:
            text = json.dumps({"error": error_object(error)})
            return StreamingResponse(
                iter([text]), error.status, media_type="application/json"
            )
        if error is not None and turn.caller is Caller.TASK:
            return {"error": error_object(error)}
        problem = error or completion.remark
        if problem is None or turn.caller is not Caller.CHAT:
            return completion.result()
        return {**completion.result(), "error": error_object(problem)}


# endregion
