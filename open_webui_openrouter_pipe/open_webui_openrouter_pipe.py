"""
title: OpenRouter
description: Every OpenRouter model in Open WebUI, through the Responses API.
version: 0.1.0
license: MIT
required_open_webui_version: 0.12.0
requirements: python-ulid, lz4

    Each section uses only sections above it; its `Uses` line says which.

    01 Foundations   JSON, text, secrets at rest
    02 Settings      the valves an admin sets
    03 Errors        what can go wrong, and the words for it
    04 Wire          Responses events and items, parsed once
    05 Guards        places in an orderly line, and rest for what fails
    07 Gateway       the only user of the HTTP library
    08 Catalog       OpenRouter's models: parsed, chosen, kept fresh
    09 Artifacts     what a provider wants back verbatim: markers, and sealed rows
    10 Stores        our table, a journal in Redis before it, and their upkeep
    11 Media         images that a model makes become Open WebUI files
    12 Input         chat messages become Responses input
    13 Tools         offered, judged, run in parallel, shown as the host does
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
import ast
import asyncio
import base64
import codecs
import difflib
import hashlib
import inspect
import io
import json
import logging
import os
import re
import secrets
import sys
import time
import weakref
from collections import defaultdict, deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import (
    aclosing,
    asynccontextmanager,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from enum import Enum
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from itertools import chain, groupby, islice
from types import TracebackType, coroutine
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self, cast
from urllib.parse import unquote, urlsplit

import aiohttp
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema
from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    LargeBinary,
    MetaData,
    String,
    Table,
    TableClause,
    Text,
    case,
    column,
    delete,
    exists,
    func,
    select,
    table,
    update,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.schema import CreateIndex, CreateTable
from starlette.responses import StreamingResponse
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception
from tenacity.stop import stop_after_attempt

try:  # Open WebUI brings it, and has not always done so
    from orjson import loads as _fast_loads
except ImportError:
    _fast_loads = json.loads

try:
    from ulid import ULID
except ImportError as _error:  # Open WebUI installs it, unless it was told not to
    raise ImportError(
        "The OpenRouter pipe needs a package: pip install python-ulid"
    ) from _error

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


def is_object_text(text: str) -> bool:
    """Say whether a text is a JSON object: providers take no other arguments."""
    return isinstance(parse_json(text), dict)


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


def first_text(*values: object) -> str:
    """Return the first of several strings that says something."""
    texts = [as_text(value) for value in values]
    return next(filter(None, texts), "")


def without_none(value: JsonObject) -> JsonObject:
    """Return an object without the keys that are null."""
    return {key: each for key, each in value.items() if each is not None}


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
        return without_none(as_object(values))


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


def _lists_servers(text: str) -> bool:
    servers = as_objects(parse_json(text))
    named = (as_text(s.get(k)) for s in servers for k in ("server_label", "server_url"))
    return bool(servers) and all(named)


class ToolValves(Valves):
    """What tools a model gets, who runs them, and within which limits."""

    TOOL_EXECUTION: Literal["pipe", "open_webui"] = Field(
        default="pipe",
        description="`pipe`: tools run here, in parallel and under guard; what needs an "
        "approval or the browser is handed to Open WebUI. `open_webui`: Open WebUI runs "
        "every tool, one after another.",
    )
    MAX_PARALLEL_TOOLS_PER_REQUEST: int = Field(
        default=10, ge=1, le=100, description="Tools that one chat runs at once."
    )
    MAX_PARALLEL_TOOLS_GLOBAL: int = Field(
        default=200, ge=1, le=10_000, description="Tools that all chats run at once."
    )
    TOOL_TIMEOUT_SECONDS: float = Field(
        default=120,
        gt=0,
        le=86_400,
        description="How long one tool call may take. The model is told when it ran out.",
    )
    TOOL_BATCH_TIMEOUT_SECONDS: float = Field(
        default=300,
        gt=0,
        le=86_400,
        description="How long the answer waits for all tools of one round.",
    )
    TOOL_RESULT_MAX_CHARS: int = Field(
        default=100_000,
        ge=1_000,
        le=10_000_000,
        description="Longer tool results are cut for the model and say so; the whole "
        "result is attached as a file.",
    )
    MAX_FUNCTION_CALL_LOOPS: int = Field(
        default=25,
        ge=1,
        le=1000,
        description="Rounds of tool calls per answer. After the last one the model "
        "answers with what it has.",
    )
    ENABLE_STRICT_TOOL_CALLING: bool = Field(
        default=False,
        description="Send tool schemas in strict mode, so that models that know it "
        "cannot miss them. A schema that does not fit strict mode is sent as it is.",
    )
    BREAKER_MAX_FAILURES: int = Field(
        default=5,
        ge=0,
        le=1000,
        description="Failures after which a tool rests for its user; 0 is never.",
    )
    BREAKER_WINDOW_SECONDS: float = Field(
        default=60,
        gt=0,
        le=86_400,
        description="Within which time failures count, and how long a tool then rests.",
    )
    REMOTE_MCP_SERVERS_JSON: Secret = Field(
        default=Secret(""),
        description="MCP servers that OpenRouter calls for the model, as a JSON list: "
        '[{"server_label": "docs", "server_url": "https://...", "authorization": '
        '"..."}]. Stored encrypted. Not offered in chats that ask before a tool runs.',
        json_schema_extra={"input": {"type": "password"}},
    )

    @field_validator("REMOTE_MCP_SERVERS_JSON", mode="before")
    @classmethod
    def _is_a_list_of_servers(cls, value: object) -> object:
        text = as_text(value).strip()
        if text and not text.startswith("encrypted:") and not _lists_servers(text):
            raise ValueError(
                "REMOTE_MCP_SERVERS_JSON must be a JSON list of objects with "
                "server_label and server_url"
            )
        return value


class SearchValves(Valves):
    """OpenRouter's web search."""

    ENABLE_WEB_SEARCH_TOOL: Literal["off", "when_asked", "always"] = Field(
        default="when_asked",
        description="`when_asked`: the chat's own web search switch gives the model "
        "OpenRouter's search instead of Open WebUI's. `always`: in every chat. "
        "Searches cost money. Chats that ask before a tool runs keep Open WebUI's.",
    )
    WEB_SEARCH_MAX_RESULTS: int = Field(
        default=5, ge=1, le=25, description="Results per search."
    )
    WEB_SEARCH_ENGINE: Literal[
        "auto", "native", "exa", "firecrawl", "parallel", "perplexity"
    ] = Field(
        default="auto",
        description="Who searches. `auto`: the model's provider where it can, else Exa.",
    )


Persistence = Literal["disabled", "next_reply", "conversation"]


class StorageValves(Valves):
    """What is kept so that a model can go on where it stopped."""

    PERSIST_REASONING_TOKENS: Persistence = Field(
        default="conversation",
        description="How long a model's encrypted reasoning is kept and sent back to "
        "it: not at all, until its next reply, or for the conversation. Users may "
        "choose less.",
    )
    PERSIST_TOOL_RESULTS: bool = Field(
        default=True,
        description="Keep the results of tools that OpenRouter runs, for the requests "
        "that need them again. Users may choose not to.",
    )
    ARTIFACT_ENCRYPTION_KEY: Secret = Field(
        default=Secret(""),
        description="A passphrase that encrypts what is kept, together with "
        "WEBUI_SECRET_KEY. To change it, put the new one first and leave the old ones "
        "behind it, separated by commas.",
        json_schema_extra={"input": {"type": "password"}},
    )
    ENCRYPT_ALL: bool = Field(
        default=True,
        description="Encrypt tool results too. Reasoning is always encrypted.",
    )
    MIN_COMPRESS_BYTES: int = Field(
        default=4096,
        ge=0,
        le=1_073_741_824,
        description="Compress what is larger than this, where it gets smaller.",
    )
    ARTIFACT_CLEANUP_DAYS: int = Field(
        default=90,
        ge=0,
        le=36_500,
        description="Days after which something that no chat has used is removed; 0 "
        "keeps it as long as a chat shows it.",
    )
    ARTIFACT_CLEANUP_INTERVAL_HOURS: float = Field(
        default=24, gt=0, le=8760, description="How often that is looked for."
    )


class CacheValves(Valves):
    """How Open WebUI's Redis is used, where it has one."""

    ENABLE_REDIS_CACHE: bool = Field(
        default=True,
        description="Write through Redis where Open WebUI has one: faster ends of "
        "turns, and other workers see what was written at once.",
    )
    REDIS_CACHE_TTL_SECONDS: int = Field(
        default=600,
        ge=1,
        le=604_800,
        description="How long recent rows stay in Redis, as encrypted as in the table.",
    )
    DB_BATCH_SIZE: int = Field(
        default=50,
        ge=1,
        le=1000,
        description="Rows that are written from Redis to the database at once.",
    )
    COSTS_REDIS_DUMP: bool = Field(
        default=False,
        description="Write one record per turn to Redis: user, model, tokens, cost.",
    )
    COSTS_REDIS_TTL_SECONDS: int = Field(
        default=86_400,
        ge=1,
        le=31_536_000,
        description="How long such a record stays.",
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


class UserSettings(Valves):
    """What a user may choose; a default means: as the admin set it."""

    ENABLE_WEB_SEARCH_TOOL: Literal["default", "off", "when_asked", "always"] = Field(
        default="default",
        description="`when_asked`: web search follows the chat's switch. `default`: as "
        "the admin set it. Has no effect where the admin switched it off.",
    )
    WEB_SEARCH_MAX_RESULTS: int = Field(
        default=0,
        ge=0,
        le=25,
        description="Results per search. 0: as the admin set it.",
    )
    WEB_SEARCH_ENGINE: Literal[
        "default", "auto", "native", "exa", "firecrawl", "parallel", "perplexity"
    ] = Field(
        default="default", description="Who searches. `default`: as the admin set it."
    )

    PERSIST_REASONING_TOKENS: Literal[
        "default", "disabled", "next_reply", "conversation"
    ] = Field(
        default="default",
        description="How long a model's encrypted reasoning is kept and sent back to "
        "it. `default` is as the admin set it; no choice keeps more than that.",
    )
    PERSIST_TOOL_RESULTS: Literal["default", "on", "off"] = Field(
        default="default",
        description="Keep the results of tools that OpenRouter runs. `default` is as "
        "the admin set it; `on` needs the admin's consent.",
    )

    @classmethod
    def read(cls, chosen: object) -> JsonObject:
        """Return what a user chose, from an instance of any load of this class."""
        values = chosen.model_dump() if isinstance(chosen, BaseModel) else chosen
        return {
            name: value
            for name, field_ in cls.model_fields.items()
            if (value := as_object(values).get(name, field_.default)) != field_.default
        }


_PERSISTENCE: tuple[Persistence, ...] = ("disabled", "next_reply", "conversation")


class Settings(
    LogValves,
    TaskValves,
    SearchValves,
    ToolValves,
    StreamValves,
    CacheValves,
    StorageValves,
    CatalogValves,
    ConnectionValves,
):
    """Every valve an admin can set, read once per request."""

    def for_user(self, chosen: object) -> Settings:
        """Return the settings with a user's choices, within the admin's bounds."""
        choices = UserSettings.read(chosen)
        if self.ENABLE_WEB_SEARCH_TOOL == "off":
            choices.pop("ENABLE_WEB_SEARCH_TOOL", None)
        if not self.PERSIST_TOOL_RESULTS:
            choices.pop("PERSIST_TOOL_RESULTS", None)
        bounds = (
            self.PERSIST_REASONING_TOKENS,
            choices.pop("PERSIST_REASONING_TOKENS", "conversation"),
        )
        kept = min(bounds, key=lambda each: (*_PERSISTENCE, each).index(each))
        if kept != self.PERSIST_REASONING_TOKENS:
            choices["PERSIST_REASONING_TOKENS"] = kept
        if not choices:
            return self
        try:
            return Settings.model_validate({**self.model_dump(), **choices})
        except ValidationError as error:
            LOG.warning("A user's settings were left out: %s", error.errors()[0]["msg"])
            return self


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


class Overloaded(Refused):
    """The line is full."""

    happened = "The server is busy: too many requests wait already."
    advice = "Try again in a moment."
    code, status = "overloaded", 503


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


class ToolLimit(Incomplete):
    """The rounds of tool calls are used up, and the model still said nothing."""

    happened = "The model kept calling tools until the limit was reached."
    advice = "Ask it to go on, or let an admin raise MAX_FUNCTION_CALL_LOOPS."
    code = "max_function_call_loops"


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
    advice = "Regenerate the reply; the lost request may have been charged."


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
    unparsed = raw if inner is None else ""
    words = first_text(nested.get("message"), unparsed, error.get("message"))
    said = ": ".join(filter(None, (as_text(metadata.get("provider_name")), words)))
    reasons = ", ".join(as_texts(metadata.get("reasons")))
    return f"{said} ({reasons})" if reasons else said


def _flat_error(outer: JsonObject) -> JsonObject:
    """Return the error of a body that does not nest it; empty when there is none."""
    message = first_text(outer.get("error"), outer.get("message"))
    return {"message": message, "code": outer.get("code")} if message else {}


def parse_fault(body: object) -> Fault | None:
    """Return the failure in a body, an event or a response object, if there is one.

    `error` may be nested or flat, its code a number, a string or missing, and a
    provider's own words a JSON text inside `metadata.raw` (openrouter.md 4.2).
    """
    outer = as_object(body)
    error = as_object(outer.get("error")) or _flat_error(outer)
    if not error:
        return None
    metadata = as_object(error.get("metadata") or outer.get("metadata"))
    code = error.get("code")
    kinds = (each.get("error_type") for each in (outer, metadata, error))
    return Fault(
        code="" if code is None else str(code),
        message=_provider_words(error, metadata),
        error_type=first_text(*kinds),
        retry_after=as_number(as_object(error.get("availability")).get("retry_after")),
        limit=as_text(metadata.get("limit_source")),
    )


def _as_status(code: str) -> int:
    return int(code) if code.isdecimal() and len(code) == 3 else 0


def _is_markup(words: str) -> bool:
    return any(mark in words.lower() for mark in ("<html", "<!doctype"))


def presentable(words: str) -> str:
    """Return somebody else's sentence for a card: short, no markup, no keys."""
    if _is_markup(words):
        return ""
    words = _KEYS.sub("sk-…", " ".join(words.split()))
    return words if len(words) <= _DETAIL_LIMIT else words[:_DETAIL_LIMIT] + "…"


def _kind_of(number: int, fault: Fault) -> type[Upstream]:
    """Return the error that a status, its name or its words stand for."""
    named = _BY_NAME.get(fault.error_type) or _BY_NAME.get(fault.code)
    if named is TooLong or "context length" in fault.message.lower():
        return TooLong
    if fault.limit == "openrouter_in_flight_budget":
        return BudgetInFlight
    is_ours = number in range(400, 500)
    return _BY_STATUS.get(number) or named or (Rejected if is_ours else ProviderFailed)


def classify(
    status: int, fault: Fault | None, retry_after: float | None = None
) -> PipeError:
    """Return the error for an HTTP status, a failure in words, or both.

    `status` is 0 for a failure inside a stream; its code may then be a number.
    """
    fault = fault or Fault("", "")
    number = status if status >= 400 else _as_status(fault.code)
    waits = fault.retry_after if retry_after is None else retry_after
    return _kind_of(number, fault)(presentable(fault.message), retry_after=waits)


def _seconds_until(date: str, now: float) -> float | None:
    try:
        return max(0.0, parsedate_to_datetime(date).timestamp() - now)
    except (ValueError, TypeError):
        return None


def parse_retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds to wait, from `Retry-After` in either form or a reset time.

    `now` is Unix time; `X-RateLimit-Reset` is in Unix milliseconds.
    """
    value = headers.get("Retry-After", "").strip()
    seconds = as_number(parse_json(value))
    if seconds is not None:
        return max(0.0, seconds)
    reset = as_number(parse_json(headers.get("X-RateLimit-Reset", "")))
    if reset is None:
        return _seconds_until(value, now)
    return max(0.0, reset / 1000 - now)


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
    texts = [first_text(part, as_object(part).get("text")) for part in parts]
    return "\n\n".join(filter(None, texts))


def parse_citation(data: object) -> Citation | None:
    """Return a `url_citation` in its flat or nested form, or None for other kinds."""
    raw = as_object(data)
    told = as_object(raw.get("url_citation")) or raw
    url = as_text(told.get("url"))
    if raw.get("type") != "url_citation" or not url:
        return None
    return Citation(
        url, first_text(told.get("title"), url), as_text(told.get("content"))
    )


def _call_item(raw: JsonObject) -> Item:
    arguments = raw.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments or {})
    call_id, name = as_text(raw.get("call_id")), as_text(raw.get("name"))
    return Item("function_call", raw, "", (), call_id, name, arguments)


def _content_text(parts: Iterable[JsonObject]) -> str:
    return "".join(first_text(p.get("text"), p.get("refusal")) for p in parts)


def parse_item(data: object) -> Item:
    """Return an output item as typed values, whatever its provider left out."""
    raw = as_object(data)
    type_ = as_text(raw.get("type"))
    if type_ == "function_call":
        return _call_item(raw)
    parts = as_objects(raw.get("content"))
    text = _content_text(parts)
    if type_ == "reasoning":
        return Item(type_, raw, _summary_text(raw) or text)
    noted = chain.from_iterable(as_list(part.get("annotations")) for part in parts)
    return Item(type_, raw, text, tuple(filter(None, map(parse_citation, noted))))


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


def _with_response(event: Event, raw: JsonObject) -> Event:
    """Return a lifecycle event with its snapshot, and the failure that it tells of."""
    snapshot = parse_snapshot(raw["response"]) if raw.get("response") else None
    if event.type not in _FAILURES:
        return event._replace(snapshot=snapshot)
    told = snapshot.fault if snapshot else None
    return event._replace(snapshot=snapshot, fault=told or parse_fault(raw))


def _with_body(event: Event, raw: JsonObject) -> Event:
    """Return the event with the item, citation, snapshot or failure that it carries."""
    if "item" in raw:
        return event._replace(item=parse_item(raw["item"]))
    if "annotation" in raw:
        return event._replace(citation=parse_citation(raw["annotation"]))
    return _with_response(event, raw)


def _event_text(type_: str, raw: JsonObject) -> str:
    """Return a delta as it is, half a surrogate pair included, or a final value."""
    is_delta = type_.endswith(".delta")
    text = raw.get("delta" if is_delta else _FINAL_TEXT.get(type_, ""))
    if isinstance(text, dict):  # some providers send arguments as an object
        return json.dumps(text)
    return text if isinstance(text, str) else ""


def _untyped(raw: JsonObject) -> Event | None:
    """Return a failure that came without a type; anything else is no event."""
    fault = parse_fault(raw)
    return Event("error", fault=fault) if fault else None


def parse_event(data: object) -> Event | None:
    """Return one decoded `data:` payload as an event, or None for what is none."""
    raw = as_object(data)
    type_ = as_text(raw.get("type"))
    if not type_:
        return _untyped(raw)
    slot = raw.get("output_index")
    text = _event_text(type_, raw)
    event = Event(type_, slot if isinstance(slot, int) else -1, _part_index(raw), text)
    return event if text else _with_body(event, raw)


# endregion


# region 05 Guards ─────────────────────────────────────────────────────────────────────
# Who may go on: places with an orderly line, and rest for what keeps failing.
# Uses: 03. Pure, one await.


class Limiter:
    """So many inside, the others in order of arrival; the limit may change."""

    def __init__(self) -> None:
        self._limit = 1
        self._inside = 0
        self._line: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def place(self, limit: int, line: int) -> AsyncGenerator[None]:
        """Wait for a place; raise Overloaded when `line` others wait already."""
        await self._enter(limit, line)
        try:
            yield
        finally:
            self._inside -= 1
            self._let_in()

    async def _enter(self, limit: int, line: int) -> None:
        self._limit = limit
        self._let_in()
        if self._inside < limit:
            self._inside += 1
            return
        if len(self._line) >= line:
            raise Overloaded
        ticket = asyncio.get_running_loop().create_future()
        self._line.append(ticket)
        try:
            await ticket
        except asyncio.CancelledError:
            if ticket.done() and not ticket.cancelled():  # let in at the same moment
                self._inside -= 1
                self._let_in()
            else:
                self._line.remove(ticket)
            raise

    def _let_in(self) -> None:
        while self._line and self._inside < self._limit:
            ticket = self._line.popleft()
            if not ticket.done():
                ticket.set_result(None)
                self._inside += 1


class Breaker:
    """Rest what failed too often within a window; one trial ends the rest.

    Times are seconds of one clock. A limit of 0 never rests.
    """

    def __init__(self) -> None:
        self._failures: deque[float] = deque()
        self._rests_since: float | None = None
        self._is_tried = False

    def admits(self, now: float, window: float) -> bool:
        """Say whether a call may go on; of many after the rest, one."""
        if self._rests_since is None:
            return True
        if self._is_tried or now < self._rests_since + window:
            return False
        self._is_tried = True
        return True

    def succeeded(self) -> None:
        """Take note of a success: what failed before counts no more."""
        self._failures.clear()
        self._rests_since, self._is_tried = None, False

    def failed(self, now: float, window: float, limit: int) -> bool:
        """Take note of a failure; say whether the rest begins with it."""
        while self._failures and self._failures[0] <= now - window:
            self._failures.popleft()
        self._failures.append(now)
        tried, self._is_tried = self._is_tried, False
        if not limit or (len(self._failures) < limit and not tried):
            return False
        begins = self._rests_since is None or tried
        self._rests_since = now
        return begins

    def released(self) -> None:
        """Take note of a call that ended as neither: cancelled, or never made."""
        self._is_tried = False

    def rest_seconds(self, now: float, window: float) -> float:
        """Return how long the rest still lasts."""
        if self._rests_since is None:
            return 0.0
        return max(0.0, self._rests_since + window - now)


class Breakers:
    """A breaker for each key; of very many, the ones used longest ago are forgotten."""

    _MOST: ClassVar[int] = 10_000

    def __init__(self) -> None:
        self._by_key: dict[tuple[str, ...], Breaker] = {}

    def get(self, *key: str) -> Breaker:
        """Return the breaker of a key."""
        breaker = self._by_key.pop(key, None) or Breaker()
        self._by_key[key] = breaker
        if len(self._by_key) > self._MOST:
            del self._by_key[next(iter(self._by_key))]
        return breaker


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
        known = self._without_variants(base)
        if known is None and base.startswith("~"):
            return ModelCard(model_id, model_id, efforts=None)
        return known

    def _without_variants(self, model_id: str) -> ModelCard | None:
        """Return the card of an id, its suffixes taken off as far as needed."""
        while model_id not in self._by_id:
            model_id, _, suffix = model_id.rpartition(":")
            if suffix not in _VARIANTS:
                return None
        return self._by_id[model_id]

    def nearest(self, model_id: str) -> list[str]:
        """Return up to three ids that look like the one that nobody knows."""
        by_lower = {card.id.lower(): card.id for card in self.cards}
        near = difflib.get_close_matches(model_id.lower(), by_lower, 3, 0.6)
        tail = model_id.lower().rpartition("/")[2] or "/"
        near = near or [low for low in by_lower if tail in low.rpartition("/")[2]][:3]
        return [by_lower[low] for low in near]


def _named(card: ModelCard, entry: str) -> ModelCard:
    """Return a card under the id that the valve names: a variant or a preset of it."""
    suffix = entry.removeprefix(card.id).strip(":@")
    return replace(card, id=entry, name=f"{card.name} ({suffix})" if suffix else entry)


def _matches(
    models: Models, chatting: Sequence[ModelCard], entry: str
) -> list[ModelCard]:
    if "*" in entry:
        pattern = entry.lower().replace("[", "[[]").replace("?", "[?]")
        return [card for card in chatting if fnmatchcase(card.id.lower(), pattern)]
    card = models.explain(entry)
    if card is None:
        return []
    return [card if card.id == entry else _named(card, entry)]


def _entries(wanted: str) -> list[str]:
    return [name for entry in wanted.split(",") if (name := entry.strip())]


def select_models(models: Models, wanted: str) -> tuple[list[ModelCard], list[str]]:
    """Return the cards that `MODEL_ID` asks for, and the entries that match nothing."""
    chatting = [card for card in models.cards if card.can_chat]
    entries = _entries(wanted)
    if not entries or "auto" in map(str.lower, entries):
        return chatting, []
    matches = {entry: _matches(models, chatting, entry) for entry in entries}
    chosen = {card.id: card for card in chain.from_iterable(matches.values())}
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


# region 09 Artifacts ──────────────────────────────────────────────────────────────────
# What a provider wants back verbatim: a marker in the chat, a sealed row elsewhere.
# Uses: 01 02. Pure.

try:
    from lz4.block import LZ4BlockError as _LZ4Error
    from lz4.block import compress as lz4_compress
    from lz4.block import decompress as _lz4_decompress
except ImportError:  # compression alone is off, and `ArtifactCodec` says so
    lz4_compress = _lz4_decompress = None
    _LZ4Error = ValueError

MARKER_TYPE = "openrouter_pipe.artifact"

_MARKER_ID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")

# More than any conversation holds; the newest count.
_MOST_MARKERS = 5000


def marker_ids(text: str) -> set[str]:
    """Return what may be the id of a marker in a text."""
    return set(_MARKER_ID.findall(text))


class Marker(NamedTuple):
    """What the chat holds of an artifact, and where the artifact stood.

    `at` counts the characters of its message's text before it, `after` names the call
    it follows, and `phases` are those of the texts behind it, up to the next marker.
    """

    id: str
    format: str = ""
    at: int = 0
    after: str = ""
    phases: tuple[str, ...] = ()


def write_marker(marker: Marker) -> JsonObject:
    """Return a marker as it stands in `reasoning_details`."""
    hints = {**marker._asdict(), "phases": list(marker.phases)}
    hints["of"] = hints.pop(
        "format"
    )  # Open WebUI judges a `format` by rules of its own
    return {"type": MARKER_TYPE, **without_blanks(hints)}


def _parse_marker(detail: JsonObject) -> Marker | None:
    id_, at = as_text(detail.get("id")), detail.get("at")
    if not _MARKER_ID.fullmatch(id_):
        return None
    return Marker(
        id_,
        as_text(detail.get("of")),
        at if isinstance(at, int) else 0,
        as_text(detail.get("after")),
        tuple(as_texts(detail.get("phases"))),
    )


def _marks(message: JsonObject) -> list[Marker | None]:
    details = as_objects(message.get("reasoning_details"))
    return [_parse_marker(d) for d in details if d.get("type") == MARKER_TYPE]


def parse_markers(message: JsonObject) -> list[Marker]:
    """Return the markers of a chat message, each id once; what is none is passed over."""
    return list({mark.id: mark for mark in _marks(message) if mark}.values())


def _replies(messages: Sequence[JsonObject]) -> list[int]:
    """Return how many questions stand behind each message."""
    behind, counts = 0, list[int]()
    for message in reversed(messages):
        counts.append(behind)
        behind += message.get("role") == "user"
    return counts[::-1]


class Wanted(NamedTuple):
    """An artifact to recall, as its marker tells of it."""

    in_loop: bool  # the tool loop that goes on
    in_reach: bool  # of what the policy says about reasoning


def wanted_markers(messages: object, policy: Persistence) -> dict[str, Wanted]:
    """Return what to recall, in order, by id.

    The policy is about reasoning. Where a marker names no format it may stand for a
    hosted tool's item, which is to be recalled from anywhere.
    """
    rows = as_objects(messages)
    reach = {"disabled": 0, "next_reply": 2, "conversation": len(rows) + 1}[policy]
    found = [
        (mark, behind)
        for message, behind in zip(rows, _replies(rows), strict=True)
        if message.get("reasoning_details")
        for mark in _marks(message)
    ]
    wanted = {
        mark.id: Wanted(behind == 0, behind < reach)
        for mark, behind in found
        if mark and (behind < reach or not mark.format)
    }
    if strange := sum(mark is None for mark, _ in found):
        LOG.warning("Passed over %d markers that are none", strange)
    if len(wanted) > _MOST_MARKERS:
        LOG.warning("Recalled the last %d of %d markers", _MOST_MARKERS, len(wanted))
    return dict(list(wanted.items())[-_MOST_MARKERS:])


@dataclass(frozen=True, slots=True)
class Artifact:
    """One item of a response, verbatim, and whose it is."""

    id: str
    user_id: str
    chat_id: str
    model: str
    item: JsonObject = field(repr=False)

    @property
    def kind(self) -> str:
        """Return the item's type."""
        return as_text(self.item.get("type"))

    @property
    def format(self) -> str:
        """Return the reasoning format, where the provider names one."""
        return as_text(self.item.get("format"))


# Providers that accept their own reasoning alone (openrouter.md 8.1).
_STRICT_FORMAT = re.compile(r"responses-v1$|^anthropic-")

# Hosted items that later turns need too (openrouter.md 8.2, rule 9).
_RESUMED = frozenset({"openrouter:advisor", "openrouter:subagent"})


def is_resumed(item: JsonObject) -> bool:
    """Say whether later turns need a hosted item, not its own tool loop alone."""
    return item.get("type") in _RESUMED


def is_replayed(item: JsonObject, *, in_loop: bool) -> bool:
    """Say whether a provider wants an item back (openrouter.md 8).

    Sealed and signed reasoning always; the open thoughts of open models and hosted
    items while their tool loop goes on.
    """
    if item.get("type") != "reasoning":
        return in_loop or is_resumed(item)
    if item.get("encrypted_content") or item.get("signature"):
        return True
    return in_loop and not _STRICT_FORMAT.search(as_text(item.get("format")))


def replayed(item: JsonObject) -> JsonObject:
    """Return an item as it goes back (openrouter.md 8.2, rule 6)."""
    if item.get("type") != "reasoning":
        return item
    whole = {**item, "summary": as_list(item.get("summary"))}
    if not whole.get("id"):
        whole["id"] = new_id("rs")
    if whole.get("status", "") is None:
        del whole["status"]
    return whole


class Sealed(NamedTuple):
    """An artifact as stores hold it; `payload` tells nothing without the key."""

    id: str
    user_id: str
    chat_id: str
    model: str
    kind: str
    key_id: str
    payload: bytes
    created_at: int  # Unix seconds, as `used_at`
    used_at: int


class Unreadable(Exception):
    """A row that does not open: another key, another owner, another version, damage."""


class ArtifactKey(NamedTuple):
    """A key for rows, and the name that rows know it by."""

    id: str
    fernet: Fernet


def _derived(master: str, use: bytes, length: int) -> bytes:
    info = b"openrouter_pipe/artifacts/" + use
    return HKDF(SHA256(), length, salt=None, info=info).derive(master.encode())


def artifact_keys(master: str, listed: str) -> tuple[ArtifactKey, ...]:
    """Return the keys for `WEBUI_SECRET_KEY` and a list, the one to seal with first.

    The secret's own key comes last: it opens what was kept before there was a list.
    """
    names = [name for each in listed.split(",") if (name := each.strip())]
    masters = [f"{master}\n{name}" for name in names] + ([master] if master else [])
    return tuple(
        ArtifactKey(
            _derived(each, b"id", 4).hex(),
            Fernet(base64.urlsafe_b64encode(_derived(each, b"key", 32))),
        )
        for each in masters
    )


_VERSION = 1

_IS_ENCRYPTED, _IS_COMPRESSED = 1, 2

_LARGEST_PAYLOAD = 256 * 1024 * 1024


def _decompressed(data: bytes) -> bytes:
    if _lz4_decompress is None:
        raise Unreadable("the package lz4 is missing here")
    if len(data) < 5 or int.from_bytes(data[:4], "little") > _LARGEST_PAYLOAD:
        raise Unreadable("damaged")
    return cast(bytes, _lz4_decompress(data))


def _exact(text: bytes) -> object:
    """Return a JSON value with its long integers, which faster parsers round."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Unreadable("damaged") from None


class ArtifactCodec:
    """Turn artifacts into rows and back: JSON, LZ4 when it helps, Fernet.

    A payload is a byte of version, a byte of flags and the data. The owner and the id
    stand inside what the key authenticates, so a row moved elsewhere does not open.
    """

    def __init__(
        self,
        keys: Sequence[ArtifactKey],
        *,
        encrypt_all: bool = True,
        min_compress_bytes: int = 4096,
    ) -> None:
        self.keys = tuple(keys)
        self._by_id = {key.id: key.fernet for key in keys}
        self._encrypt_all = encrypt_all
        self._min_compress_bytes = min_compress_bytes

    def can_seal(self, item: JsonObject) -> bool:
        """Say whether an item may be kept: what must be encrypted needs a key."""
        return bool(self.keys) or not self._is_secret(as_text(item.get("type")))

    def seal(self, artifact: Artifact, now: float) -> Sealed:
        """Return the row for an artifact."""
        inside = {
            "id": artifact.id,
            "user": artifact.user_id,
            "chat": artifact.chat_id,
            "model": artifact.model,
            "item": artifact.item,
        }
        text = json.dumps(inside, separators=(",", ":")).encode()
        key_id, payload = self._wrapped(text, artifact.kind)
        facts = (artifact.id, artifact.user_id, artifact.chat_id, artifact.model)
        return Sealed(*facts, artifact.kind, key_id, payload, int(now), int(now))

    def open(self, row: Sealed) -> Artifact:
        """Return the artifact of a row; raise Unreadable for anything else."""
        inside = as_object(_exact(self._text(row)))
        if (inside.get("id"), inside.get("user")) != (row.id, row.user_id):
            raise Unreadable("it belongs elsewhere")
        item = as_object(inside.get("item"))
        if item.get("type") == "reasoning" and not row.payload[1] & _IS_ENCRYPTED:
            raise Unreadable("it is not encrypted")
        model, chat_id = as_text(inside.get("model")), as_text(inside.get("chat"))
        return Artifact(row.id, row.user_id, chat_id, model, item)

    def resealed(self, row: Sealed) -> Sealed:
        """Return a row under the newest key; raise Unreadable when none opens it."""
        key_id, payload = self._wrapped(self._text(row), row.kind)
        return row._replace(key_id=key_id, payload=payload)

    def _is_secret(self, kind: str) -> bool:
        return self._encrypt_all or kind == "reasoning"

    def _wrapped(self, text: bytes, kind: str) -> tuple[str, bytes]:
        flags, key_id, data = 0, "", text
        if lz4_compress is not None and len(text) >= self._min_compress_bytes:
            smaller = cast(bytes, lz4_compress(text))
            if len(smaller) < len(text):
                flags, data = _IS_COMPRESSED, smaller
        if self._is_secret(kind):
            flags |= _IS_ENCRYPTED
            key_id, data = self.keys[0].id, self.keys[0].fernet.encrypt(data)
        return key_id, bytes((_VERSION, flags)) + data

    def _text(self, row: Sealed) -> bytes:
        if len(row.payload) < 2:
            raise Unreadable("empty")
        version, flags, data = row.payload[0], row.payload[1], row.payload[2:]
        if version != _VERSION:
            raise Unreadable(f"version {version} is of another release")
        try:
            if flags & _IS_ENCRYPTED:
                data = self._by_id[row.key_id].decrypt(data)
            return _decompressed(data) if flags & _IS_COMPRESSED else data
        except KeyError:
            raise Unreadable(f"its key {row.key_id} is not listed") from None
        except (InvalidToken, _LZ4Error) as error:
            raise Unreadable("damaged") from error


# endregion


# region 10 Stores ─────────────────────────────────────────────────────────────────────
# Where sealed rows live: our table, a journal in Redis before it, and their upkeep.
# Uses: 01 02 09. I/O.

try:
    from redis.exceptions import RedisError, ResponseError
except ImportError:  # without the package there is no client to raise them
    RedisError = ResponseError = ConnectionError

_Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]

_SQL_SECONDS = 10.0

_REDIS_SECONDS = 2.0

_DAY_SECONDS = 86_400

_LONGEST_TABLE_NAME = 50  # PostgreSQL cuts names at 63, those of our indexes too


class StoreDown(Exception):
    """A store that cannot be reached, or refuses to work."""


class RowsRefused(StoreDown):
    """Rows that a working database does not take."""


class ArtifactStore(Protocol):
    """Where rows are kept; each method raises StoreDown when it cannot."""

    async def save(self, rows: Sequence[Sealed]) -> None:
        """Keep rows in one transaction; one that is there already stays as it is."""
        ...

    async def load(self, ids: Collection[str], user_id: str) -> list[Sealed]:
        """Return the rows of a user that there are, in any order."""
        ...

    async def drop(self, ids: Collection[str], user_id: str) -> None:
        """Forget rows of a user."""
        ...

    async def sweep(self, now: float, days: int) -> int:
        """Remove what nobody can use any more, and return how many rows that were."""
        ...


class Outage:
    """Notice when a store is down: say so once, and let it be tried now and then."""

    def __init__(self, what: str, consequence: str, pause_seconds: float) -> None:
        self._what = what
        self._consequence = consequence
        self._pause_seconds = pause_seconds
        self._again = 0.0
        self.since: float | None = None

    @property
    def is_on(self) -> bool:
        """Say whether the store shall be left alone for now."""
        return self.since is not None and time.monotonic() < self._again

    def begin(self, error: BaseException) -> None:
        """Take note of a failure."""
        self._again = time.monotonic() + self._pause_seconds
        if self.since is None:
            self.since = time.monotonic()
            LOG.warning("%s is down (%s): %s", self._what, error, self._consequence)

    def end(self) -> None:
        """Take note of a success."""
        if self.since is not None:
            lasted = seconds_in_words(time.monotonic() - self.since)
            LOG.warning("%s is back after %s", self._what, lasted)
        self.since = None


def _cause(error: BaseException) -> str:
    """Return what a driver's error is, without values, statements or addresses."""
    inner = getattr(error, "orig", None) or error
    return type(inner).__name__


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


# What drivers raise for values that no column takes, unwrapped.
_UNFIT = (UnicodeError, OverflowError)


@contextmanager
def _stored() -> Generator[None]:
    """Turn the failures of a database or a Redis into ours."""
    try:
        yield
    except (SQLAlchemyError, RedisError, OSError, *_UNFIT) as error:
        if _is_cancelled():  # drivers then report troubles of their own
            raise asyncio.CancelledError from None
        is_refusal = isinstance(error, (DataError, IntegrityError, *_UNFIT))
        kind = RowsRefused if is_refusal else StoreDown
        raise kind(_cause(cast(BaseException, error))) from None


def table_name(function_id: str) -> str:
    """Return the name of a function's table, short enough for PostgreSQL."""
    name = f"pipe_{function_id}_artifacts"
    if len(name) <= _LONGEST_TABLE_NAME:
        return name
    digest = hashlib.sha256(function_id.encode()).hexdigest()[:8]
    return f"pipe_{function_id[:20]}_{digest}_artifacts"


def _artifacts_table(name: str, schema: str | None) -> Table:
    return Table(
        name,
        MetaData(schema=schema),  # our own, so that two loads do not meet
        Column("id", String(26), primary_key=True),
        Column("user_id", Text, nullable=False),
        Column("chat_id", Text, nullable=False),
        Column("model", Text, nullable=False),
        Column("kind", Text, nullable=False),
        Column("key_id", String(16), nullable=False),
        Column("payload", LargeBinary, nullable=False),
        Column("created_at", BigInteger, nullable=False),
        Column("used_at", BigInteger, nullable=False),
        Index(f"{name}_chat", "chat_id"),
        Index(f"{name}_key", "key_id"),
        Index(f"{name}_used", "used_at"),
    )


def _host_engine() -> tuple[AsyncEngine, str | None]:
    """Return Open WebUI's own engine, and the schema of its tables."""
    from open_webui.env import DATABASE_SCHEMA
    from open_webui.internal.db import async_engine

    return async_engine, DATABASE_SCHEMA


def _host_chats(schema: str | None) -> TableClause:
    """Return what is read, and never written, of Open WebUI's chats."""
    columns = (column("id", Text), column("user_id", Text), column("chat", Text))
    return table("chat", *columns, schema=schema)


def _homes(
    ids: Collection[str], chats: Iterable[tuple[str, str | None]]
) -> dict[str, str]:
    """Return which chat still shows an artifact, of those that one does."""
    return {
        id_: chat_id
        for chat_id, text in chats
        for id_ in marker_ids(text or "").intersection(ids)
    }


def _resealed(codec: ArtifactCodec, rows: Iterable[Sealed]) -> list[Sealed]:
    fresh: list[Sealed] = []
    for row in rows:
        try:
            fresh.append(codec.resealed(row))
        except Unreadable as error:
            LOG.warning("Artifact %s keeps its old key: %s", row.id, error)
    return fresh


_CREATION_LOCK = 0x6F70656E  # any number that every worker knows

_LEASE = "lease"

_SWEEP_BATCH = 200

_SWEEP_REST_SECONDS = 0.05

_CHATS_BATCH = 20  # each may be a megabyte

_ORPHAN_GRACE_SECONDS = _DAY_SECONDS


class SqlStore:
    """Rows in a table of our own, on the engine that Open WebUI lends."""

    def __init__(
        self,
        name: str = table_name(FUNCTION_ID),
        engine: Callable[[], tuple[AsyncEngine, str | None]] = _host_engine,
    ) -> None:
        self._name = name
        self._find_engine = engine
        self._opening = asyncio.Lock()
        self._opened: tuple[AsyncEngine, Table] | None = None
        self._schema: str | None = None

    async def prepare(self) -> None:
        """Make the table before the first row needs it; without a database, later."""
        try:
            async with self._transaction():
                pass
        except StoreDown as error:
            LOG.info("The artifacts' table is not there yet: %s", error)

    async def save(self, rows: Sequence[Sealed]) -> None:
        """Keep rows in one transaction; one that is there already stays as it is."""
        async with self._transaction() as (connection, table):
            await self._insert(connection, table, [row._asdict() for row in rows])

    async def load(self, ids: Collection[str], user_id: str) -> list[Sealed]:
        """Return the rows of a user that there are, by one query."""
        async with self._transaction() as (connection, table):
            query = select(table).where(
                table.c.id.in_(list(ids)), table.c.user_id == user_id
            )
            return [Sealed(*row) for row in await connection.execute(query)]

    async def drop(self, ids: Collection[str], user_id: str) -> None:
        """Forget rows of a user."""
        async with self._transaction() as (connection, table):
            mine = (table.c.id.in_(list(ids)), table.c.user_id == user_id)
            await connection.execute(delete(table).where(*mine))

    async def touch(self, ids: Collection[str], now: float) -> None:
        """Note that rows are in use, so that their time starts again."""
        async with self._transaction() as (connection, table):
            change = update(table).where(table.c.id.in_(list(ids)))
            await connection.execute(change.values(used_at=int(now)))

    async def claim(self, work: str, now: float, every_seconds: float) -> bool:
        """Return whether this worker is the one to do some work, if it is due."""
        id_ = f"{_LEASE}-{work}"[:26]
        lease = Sealed(id_, "", "", "", _LEASE, "", b"", int(now), 0)
        async with self._transaction() as (connection, table):
            await self._insert(connection, table, [lease._asdict()])
            due = (table.c.id == id_, table.c.used_at <= int(now - every_seconds))
            change = update(table).where(*due).values(used_at=int(now))
            return (await connection.execute(change)).rowcount == 1

    async def sweep(self, now: float, days: int) -> int:
        """Remove rows that are old or whose last chat is gone, a few at a time."""
        removed = 0
        while days and (count := await self._drop_old(now - days * _DAY_SECONDS)):
            removed += count
            await asyncio.sleep(_SWEEP_REST_SECONDS)
        last = ""
        while orphans := await self._orphans(now - _ORPHAN_GRACE_SECONDS, last):
            last = orphans[-1][0]
            removed += await self._judge_orphans(orphans)
            await asyncio.sleep(_SWEEP_REST_SECONDS)
        return removed

    async def reseal(self, codec: ArtifactCodec) -> int:
        """Encrypt the rows of older keys anew, and return how many those were."""
        done, last, newest = 0, "", codec.keys[0].id
        while rows := await self._sealed_otherwise(newest, last):
            last = rows[-1].id
            fresh = await asyncio.to_thread(_resealed, codec, rows)
            async with self._transaction() as (connection, table):
                for row in fresh:
                    same = table.c.id == row.id
                    values = {"key_id": row.key_id, "payload": row.payload}
                    await connection.execute(update(table).where(same).values(values))
            done += len(fresh)
            await asyncio.sleep(_SWEEP_REST_SECONDS)
        return done

    async def _sealed_otherwise(self, key_id: str, last: str) -> list[Sealed]:
        async with self._transaction() as (connection, table):
            old = (table.c.key_id.not_in(["", key_id]), table.c.id > last)
            query = select(table).where(*old).order_by(table.c.id).limit(_SWEEP_BATCH)
            return [Sealed(*row) for row in await connection.execute(query)]

    async def _drop_old(self, before: float) -> int:
        async with self._transaction() as (connection, table):
            old = (table.c.used_at < int(before), table.c.kind != _LEASE)
            ids = select(table.c.id).where(*old).limit(_SWEEP_BATCH)
            gone = await connection.execute(delete(table).where(table.c.id.in_(ids)))
            return gone.rowcount

    async def _orphans(self, before: float, last: str) -> list[tuple[str, str]]:
        """Return ids and owners of rows whose chat Open WebUI no longer has."""
        chat = _host_chats(self._schema)
        async with self._transaction() as (connection, table):
            gone = ~exists().where(chat.c.id == table.c.chat_id)
            quiet = (table.c.used_at < int(before), table.c.kind != _LEASE)
            query = (
                select(table.c.id, table.c.user_id)
                .where(gone, *quiet, table.c.id > last)
                .order_by(table.c.id)
                .limit(_SWEEP_BATCH)
            )
            return [(id_, user) for id_, user in await connection.execute(query)]

    async def _judge_orphans(self, orphans: Sequence[tuple[str, str]]) -> int:
        """Give rows to the chat that still shows them, remove the others."""
        owned = defaultdict[str, list[str]](list)
        for id_, user_id in orphans:
            owned[user_id].append(id_)
        removed = 0
        for user_id, ids in owned.items():
            homes = await self._found_homes(user_id, ids)
            async with self._transaction() as (connection, table):
                for id_, chat_id in homes.items():
                    row = update(table).where(table.c.id == id_)
                    await connection.execute(row.values(chat_id=chat_id))
                lost = [id_ for id_ in ids if id_ not in homes]
                await connection.execute(delete(table).where(table.c.id.in_(lost)))
            removed += len(lost)
        return removed

    async def _found_homes(self, user_id: str, ids: Collection[str]) -> dict[str, str]:
        """Return the chats of a user that show artifacts: a few chats per query."""
        homes: dict[str, str] = {}
        last = ""
        while chats := await self._chats_with_markers(user_id, last):
            last = chats[-1][0]
            homes |= await asyncio.to_thread(_homes, ids, chats)
            if len(homes) == len(ids):
                break
            await asyncio.sleep(_SWEEP_REST_SECONDS)
        return homes

    async def _chats_with_markers(
        self, user_id: str, last: str
    ) -> list[tuple[str, str | None]]:
        """Return the next chats of a user, with their text where it holds markers."""
        chat = _host_chats(self._schema)
        text = sql_cast(chat.c.chat, Text)
        query = (
            select(chat.c.id, case((text.like(f"%{MARKER_TYPE}%"), text)))
            .where(chat.c.user_id == user_id, chat.c.id > last)
            .order_by(chat.c.id)
            .limit(_CHATS_BATCH)
        )
        async with self._transaction() as (connection, _):
            return [(id_, body) for id_, body in await connection.execute(query)]

    @asynccontextmanager
    async def _transaction(self) -> AsyncGenerator[tuple[AsyncConnection, Table]]:
        with _stored():
            async with asyncio.timeout(_SQL_SECONDS):
                engine, table = self._opened or await self._open()
                try:
                    async with engine.begin() as connection:
                        yield connection, table
                except SQLAlchemyError:
                    self._opened = None  # whoever took the table away: make it again
                    raise

    async def _insert(
        self, connection: AsyncConnection, table: Table, rows: list[JsonObject]
    ) -> None:
        is_sqlite = connection.dialect.name == "sqlite"
        insert = sqlite.insert(table) if is_sqlite else postgresql.insert(table)
        await connection.execute(insert.on_conflict_do_nothing(), rows)

    async def _open(self) -> tuple[AsyncEngine, Table]:
        """Create the table, whichever of many workers comes first."""
        async with self._opening:
            if self._opened is None:
                engine, self._schema = self._find_engine()
                table = _artifacts_table(self._name, self._schema)
                async with engine.begin() as connection:
                    if engine.dialect.name == "postgresql":
                        lock = select(func.pg_advisory_xact_lock(_CREATION_LOCK))
                        await connection.execute(lock)
                    await connection.execute(CreateTable(table, if_not_exists=True))
                    for index in sorted(table.indexes, key=lambda each: str(each.name)):
                        await connection.execute(CreateIndex(index, if_not_exists=True))
                self._opened = (engine, table)
            return self._opened


_HELD_BYTES = 64 * 1024 * 1024

_RETRY_SECONDS = 1.0

_OUTAGE_PAUSE_SECONDS = 5.0


class Outbox:
    """A table that may be down for a while: rows wait in memory and are tried again."""

    def __init__(self, table: SqlStore, spawn: _Spawn) -> None:
        self.table = table
        self.outage = Outage(
            "The artifacts' table",
            "chats go on, and new rows wait in memory",
            _OUTAGE_PAUSE_SECONDS,
        )
        self._spawn = spawn
        self._held: dict[str, Sealed] = {}
        self._retrying: asyncio.Task[None] | None = None

    async def commit(self, rows: Sequence[Sealed]) -> None:
        """Write rows now, or raise StoreDown."""
        try:
            await self.table.save(rows)
        except RowsRefused:
            raise
        except StoreDown as error:
            self.outage.begin(error)
            raise
        self.outage.end()

    async def commit_each(self, rows: Sequence[Sealed]) -> None:
        """Write rows now, without those that the database does not take."""
        try:
            if rows:
                await self.commit(rows)
        except RowsRefused as error:
            if len(rows) == 1:
                LOG.error("Artifact %s was refused (%s)", rows[0].id, error)
                return
            for row in rows:
                await self.commit_each([row])

    async def save(self, rows: Sequence[Sealed]) -> None:
        """Write rows now or soon; raise StoreDown when too many wait already."""
        if not self.outage.is_on:
            try:
                await self.commit(rows)
                return
            except RowsRefused:
                raise
            except StoreDown:
                pass  # noted, and held below
        self.hold(rows)

    def hold(self, rows: Sequence[Sealed]) -> None:
        """Write rows soon; raise StoreDown when too many wait already."""
        waiting = sum(len(row.payload) for row in (*self._held.values(), *rows))
        if waiting > _HELD_BYTES:
            raise StoreDown("too many rows wait in memory")
        self._held |= {row.id: row for row in rows}
        if self._retrying is None:
            self._retrying = self._spawn(self._retry())

    async def load(self, ids: Collection[str], user_id: str) -> list[Sealed]:
        """Return the rows of a user that can be had: while the table is down, some."""
        rest = set(ids) - self._held.keys()
        held = [self._held[id_] for id_ in set(ids) - rest]
        found = [row for row in held if row.user_id == user_id]
        if self.outage.is_on or not rest:
            return found
        try:
            found += await self.table.load(rest, user_id)
        except StoreDown as error:
            self.outage.begin(error)
            return found
        self.outage.end()
        return found

    async def drop(self, ids: Collection[str], user_id: str) -> None:
        """Forget rows of a user."""
        for id_ in ids:
            self._held.pop(id_, None)
        if self.outage.is_on:
            raise StoreDown("the table is down")
        await self.table.drop(ids, user_id)

    async def sweep(self, now: float, days: int) -> int:
        """Remove what nobody can use any more, and return how many rows that were."""
        return await self.table.sweep(now, days)

    async def aclose(self) -> None:
        """Try once more to write what waits."""
        if rows := list(self._held.values()):
            try:
                await self.commit_each(rows)
            except StoreDown:
                LOG.error("%d artifacts are lost: the table is down", len(rows))

    async def _retry(self) -> None:
        while rows := list(self._held.values())[:_SWEEP_BATCH]:
            await asyncio.sleep(_RETRY_SECONDS)
            try:
                await self.commit_each(rows)
            except StoreDown:
                continue
            for row in rows:
                self._held.pop(row.id, None)
        self._retrying = None


def host_redis() -> tuple[Any, str] | None:
    """Return Open WebUI's Redis and the prefix of its keys, or None without one."""
    from open_webui import env
    from open_webui.utils import redis as host

    sentinels = host.get_sentinels_from_env(
        env.REDIS_SENTINEL_HOSTS, env.REDIS_SENTINEL_PORT
    )
    if not env.REDIS_URL and not sentinels:
        return None
    client = host.get_redis_connection(
        env.REDIS_URL,
        redis_sentinels=sentinels,
        redis_cluster=env.REDIS_CLUSTER,
        async_mode=True,
        decode_responses=False,
    )
    return (client, env.REDIS_KEY_PREFIX) if client is not None else None


def pack_row(row: Sealed) -> bytes:
    """Return a row as Redis holds it."""
    facts = json.dumps([*row._replace(payload=b"")._asdict().values()], default=str)
    return facts.encode() + b"\n" + row.payload


_ROW_TYPES = tuple(int if name.endswith("_at") else str for name in Sealed._fields)


def unpack_row(data: bytes | None) -> Sealed | None:
    """Return the row that was packed, or None for anything else."""
    facts, _, payload = (data or b"").partition(b"\n")
    values = as_list(parse_json(facts))
    if tuple(map(type, values)) != _ROW_TYPES:
        return None
    return Sealed(*values)._replace(payload=payload)


_GROUP = "flushers"

_NEW = b"new"

_DONE_ROWS = b"done "

_TICK_SECONDS = 1.0

_GATHER_SECONDS = 0.01

_STALE_MS = 5000

_UNCONFIRMED_SECONDS = 30.0

_DEAD_MS = 3_600_000


class RedisJournal:
    """Rows reach Redis at once and the table a little later, from whichever worker.

    Each row is an entry of a stream with a consumer group, and leaves it only once it
    is committed; entries of a worker that died are claimed by another. This worker's
    own rows stay in memory until somebody has confirmed them, so that a Redis which
    forgets everything loses none.
    """

    def __init__(
        self, store: Outbox, client: Any, prefix: str, *, ttl_seconds: int, batch: int
    ) -> None:
        self._store = store
        self._client = client
        self._ttl_seconds = ttl_seconds
        self._batch = batch
        base = f"{{{prefix}:pipe:{FUNCTION_ID}}}"  # one slot of a cluster
        self._stream = f"{base}:journal"
        self._news = f"{base}:news"
        self._cache = f"{base}:artifact:"
        self._consumer = new_id("worker")
        self._unconfirmed: dict[str, tuple[float, Sealed]] = {}
        self._unconfirmed_bytes = 0
        self._tried = asyncio.Event()  # whether there is a Redis is known
        self._is_up = False
        self._is_behind = False  # entries of ours wait for the table
        self._looked = 0.0
        self.outage = Outage("Redis", "rows go to the table directly", 0)

    # A store

    async def save(self, rows: Sequence[Sealed]) -> None:
        """Keep rows in Redis, or in the table when there is no Redis."""
        if not self._tried.is_set():  # a worker that has just started
            with suppress(TimeoutError):
                async with asyncio.timeout(_REDIS_SECONDS):
                    await self._tried.wait()
        if self._is_up:
            self._await_confirmation(rows)
            try:
                await self._append(rows)
                return
            except StoreDown as error:
                self._is_up = False
                self.outage.begin(error)
        await self._store.save(rows)
        self._confirm(row.id for row in rows)

    async def load(self, ids: Collection[str], user_id: str) -> list[Sealed]:
        """Return the rows of a user that there are, the recent ones by Redis."""
        waiting = self._unconfirmed
        mine = [waiting[id_][1] for id_ in waiting.keys() & set(ids)]
        recent = filter(self._is_recent, set(ids) - waiting.keys())
        mine += await self._cached(list(recent))
        rest = set(ids) - {row.id for row in mine}
        found = [row for row in mine if row.user_id == user_id]
        return [*found, *await self._store.load(rest, user_id)]

    async def drop(self, ids: Collection[str], user_id: str) -> None:
        """Forget rows of a user."""
        cached = await self.load(ids, user_id)
        if self._is_up and cached:
            with _stored():
                async with asyncio.timeout(_REDIS_SECONDS):
                    await self._client.delete(*(self._cache + row.id for row in cached))
        self._confirm(row.id for row in cached)
        await self._store.drop(ids, user_id)

    async def sweep(self, now: float, days: int) -> int:
        """Remove what nobody can use any more, and return how many rows that were."""
        return await self._store.sweep(now, days)

    # The way from Redis to the table

    async def run(self) -> None:
        """Write what comes, for ever; without Redis, wait until it is back."""
        while True:
            try:
                with _stored():
                    await self._serve()
            except StoreDown as error:
                self.outage.begin(error)
            finally:
                self._is_up = False
                self._tried.set()
            self._rescue(0)
            await asyncio.sleep(_RETRY_SECONDS)

    async def _serve(self) -> None:
        async with self._client.pubsub() as news:
            await news.subscribe(self._news)
            await self._open_group()
            self._is_behind = True
            while True:
                await self._drain()
                self.outage.end()
                self._is_up = True
                self._tried.set()
                self._rescue(_UNCONFIRMED_SECONDS)
                await self._listen(news)

    async def _open_group(self) -> None:
        try:
            await self._client.xgroup_create(
                self._stream, _GROUP, id="0", mkstream=True
            )
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def _listen(self, news: Any) -> None:
        """Wait until there is something to write, or for a tick."""
        until = time.monotonic() + _TICK_SECONDS
        while (left := until - time.monotonic()) > 0:
            message = await news.get_message(
                ignore_subscribe_messages=True, timeout=left
            )
            data = message["data"] if message else b""
            if data.startswith(_NEW):
                await asyncio.sleep(_GATHER_SECONDS)
                return
            self._confirm(data.removeprefix(_DONE_ROWS).decode().split())

    async def _drain(self) -> None:
        """Write everything that waits, a batch in one transaction."""
        while entries := await self._entries():
            rows = list(filter(None, [unpack_row(data) for _, data in entries]))
            if len(rows) < len(entries):
                LOG.error("%d entries of Redis are no rows", len(entries) - len(rows))
            try:
                await self._store.commit_each(rows)
            except StoreDown:
                self._is_behind = True
                return
            async with self._client.pipeline(transaction=True) as pipe:
                pipe.xack(self._stream, _GROUP, *(id_ for id_, _ in entries))
                pipe.xdel(self._stream, *(id_ for id_, _ in entries))
                ids = " ".join(row.id for row in rows)
                pipe.publish(self._news, _DONE_ROWS + ids.encode())
                await pipe.execute()
            self._confirm(row.id for row in rows)

    async def _entries(self) -> list[tuple[bytes, bytes | None]]:
        """Return entries to write: ours of before, of workers that died, new ones."""
        if time.monotonic() - self._looked > _STALE_MS / 1000:
            self._looked = time.monotonic()
            _, found, *_ = await self._client.xautoclaim(
                self._stream, _GROUP, self._consumer, _STALE_MS, count=self._batch
            )
            self._is_behind = self._is_behind or bool(found)
            if not found:
                await self._bury()
        start = "0" if self._is_behind else ">"
        found = await self._read(start)
        if not found and self._is_behind:
            self._is_behind = False
            found = await self._read(">")
        return found

    async def _bury(self) -> None:
        """Remove workers that died from the group, once nothing of theirs waits."""
        for each in await self._client.xinfo_consumers(self._stream, _GROUP):
            if each["idle"] > _DEAD_MS and not each["pending"]:
                await self._client.xgroup_delconsumer(
                    self._stream, _GROUP, each["name"]
                )

    async def _read(self, start: str) -> list[tuple[bytes, bytes | None]]:
        streams = {self._stream: start}
        found = await self._client.xreadgroup(
            _GROUP, self._consumer, streams, count=self._batch
        )
        if isinstance(found, dict):  # as RESP3 answers
            found = [[key, *value] for key, value in found.items()]
        return [
            (id_, fields.get(b"row") if fields else None)
            for _, entries in found or ()
            for id_, fields in entries
        ]

    async def _append(self, rows: Sequence[Sealed]) -> None:
        with _stored():
            async with (
                asyncio.timeout(_REDIS_SECONDS),
                self._client.pipeline(transaction=False) as pipe,
            ):
                for row in rows:
                    packed = pack_row(row)
                    pipe.xadd(self._stream, {"row": packed})
                    pipe.set(self._cache + row.id, packed, ex=self._ttl_seconds)
                pipe.publish(self._news, _NEW)
                await pipe.execute()

    async def _cached(self, ids: Sequence[str]) -> list[Sealed]:
        if not ids or not self._is_up:
            return []
        try:
            with _stored():
                async with asyncio.timeout(_REDIS_SECONDS):
                    found = await self._client.mget([self._cache + id_ for id_ in ids])
        except StoreDown:
            return []
        rows = zip(ids, map(unpack_row, found), strict=True)
        return [row for id_, row in rows if row and row.id == id_]

    def _rescue(self, older_seconds: float) -> None:
        """Write rows directly that nobody has confirmed: Redis may have lost them."""
        before = time.monotonic() - older_seconds
        lost = [row for at, row in self._unconfirmed.values() if at <= before]
        if lost:
            with suppress(StoreDown):  # too many wait already: these stay here
                self._store.hold(lost)
                self._confirm(row.id for row in lost)

    def _await_confirmation(self, rows: Iterable[Sealed]) -> None:
        """Hold rows until they are confirmed; the oldest then lie in Redis alone."""
        now = time.monotonic()
        self._confirm(row.id for row in rows)
        for row in rows:
            self._unconfirmed[row.id] = now, row
            self._unconfirmed_bytes += len(row.payload)
        while self._unconfirmed_bytes > _HELD_BYTES:
            self._confirm([next(iter(self._unconfirmed))])

    def _confirm(self, ids: Iterable[str]) -> None:
        for id_ in ids:
            if known := self._unconfirmed.pop(id_, None):
                self._unconfirmed_bytes -= len(known[1].payload)

    def _is_recent(self, id_: str) -> bool:
        return time.time() - ULID.from_str(id_).timestamp <= self._ttl_seconds


_OFF_LOOP_BYTES = 64 * 1024

_MOST_REFUSED = 10_000

_UPKEEP_SECONDS = 300.0

_RESEAL_SECONDS = 3600.0


def _weight(value: object) -> int:
    """Return about how many bytes a JSON value takes, without writing it."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_weight, cast(JsonObject, value).values()))
    if isinstance(value, list):
        return sum(map(_weight, cast("list[Any]", value)))
    return 8


def _fingerprint(chat_id: str, item: JsonObject) -> int:
    names = ("encrypted_content", "signature", "id")
    return hash((chat_id, *(as_text(item.get(name)) for name in names)))


def _opened(codec: ArtifactCodec, rows: Iterable[Sealed]) -> list[Artifact]:
    """Return the artifacts that open; one line tells of the others."""
    artifacts: list[Artifact] = []
    problems: dict[str, int] = defaultdict(int)
    for row in rows:
        try:
            artifacts.append(codec.open(row))
        except Unreadable as error:
            problems[str(error)] += 1
    if problems:
        told = "; ".join(f"{count}: {why}" for why, count in problems.items())
        LOG.warning("Artifacts that do not open were left out: %s", told)
    return artifacts


def _codec(valves: StorageValves) -> ArtifactCodec:
    """Return the codec for the valves and `WEBUI_SECRET_KEY`, and say what is amiss."""
    master = os.environ.get("WEBUI_SECRET_KEY", "")
    try:
        listed = valves.ARTIFACT_ENCRYPTION_KEY.reveal()
    except ValueError:
        LOG.error("ARTIFACT_ENCRYPTION_KEY cannot be read: WEBUI_SECRET_KEY changed")
        listed = ""
    keys = artifact_keys(master, listed)
    if not keys:
        LOG.warning(
            "Neither WEBUI_SECRET_KEY nor ARTIFACT_ENCRYPTION_KEY is set: what has to "
            "be encrypted is not kept, and models lose their reasoning between turns"
        )
    elif not master:
        LOG.warning(
            "WEBUI_SECRET_KEY is not set: ARTIFACT_ENCRYPTION_KEY lies unencrypted in "
            "the same database as the artifacts"
        )
    if lz4_compress is None:
        LOG.warning("The package lz4 is missing: artifacts are kept uncompressed")
    return ArtifactCodec(
        keys,
        encrypt_all=valves.ENCRYPT_ALL,
        min_compress_bytes=valves.MIN_COMPRESS_BYTES,
    )


class Memory:
    """What turns keep and recall: the codec, the stores behind it, and their upkeep."""

    def __init__(self, spawn: _Spawn) -> None:
        self._spawn = spawn
        self._valves: StorageValves | None = None
        self._cache_valves: CacheValves | None = None
        self._codec = ArtifactCodec(())
        self._outbox = Outbox(SqlStore(), spawn)
        self._store: ArtifactStore = self._outbox
        self._is_open = self._is_prepared = False
        self._running: list[asyncio.Task[None]] = []
        self._hurry = asyncio.Event()
        self._refused: dict[int, None] = {}  # fingerprints, the oldest first
        self._told: dict[str, float] = {}  # chats that know of an outage

    def refresh(self, settings: Settings) -> None:
        """Take over changed valves; they act on the next request."""
        storage = StorageValves.model_construct(
            **{name: getattr(settings, name) for name in StorageValves.model_fields}
        )
        cache = CacheValves.model_construct(
            **{name: getattr(settings, name) for name in CacheValves.model_fields}
        )
        if storage != self._valves:
            self._valves, self._codec = storage, _codec(storage)
            self._hurry.set()
        if cache != self._cache_valves:
            self._cache_valves, self._is_open = cache, False

    def _opened_store(self) -> ArtifactStore:
        """Return the store; the first turn with something to keep begins the upkeep."""
        if not self._is_open:
            self._open(self._cache_valves or CacheValves())
        return self._store

    def _open(self, valves: CacheValves) -> None:
        self._is_open = True
        for task in self._running:
            task.cancel()
        self._running = [self._spawn(self._keep_house())]
        self._store = self._outbox
        found = host_redis() if valves.ENABLE_REDIS_CACHE else None
        if found:
            journal = RedisJournal(
                self._outbox,
                *found,
                ttl_seconds=valves.REDIS_CACHE_TTL_SECONDS,
                batch=valves.DB_BATCH_SIZE,
            )
            self._running.append(self._spawn(journal.run()))
            self._store = journal

    def prepare(self) -> None:
        """Make the table in the background, once, ahead of the first row."""
        if not self._is_prepared:
            self._is_prepared = True
            self._spawn(self._outbox.table.prepare())

    def is_refused(self, chat_id: str, item: JsonObject) -> bool:
        """Say whether a provider did not take an item in a chat."""
        return _fingerprint(chat_id, item) in self._refused

    def can_keep(self, item: JsonObject) -> bool:
        """Say whether there is a key for what must be encrypted."""
        return self._codec.can_seal(item)

    async def keep(self, artifacts: Sequence[Artifact]) -> bool:
        """Keep artifacts in one transaction; return whether their rows are kept."""
        try:
            await self._opened_store().save(await self._sealed(artifacts))
        except StoreDown as error:
            LOG.warning("%d artifacts were not kept: %s", len(artifacts), error)
            return False
        return True

    async def recall(self, ids: Collection[str], user_id: str) -> list[Artifact]:
        """Return a user's artifacts, as far as they are there and open."""
        if not ids or not user_id:
            return []
        rows = await self._opened_store().load(ids, user_id)
        old = [row.id for row in rows if row.used_at < time.time() - _DAY_SECONDS]
        if old:
            self._spawn(self._touch(old))
        if sum(len(row.payload) for row in rows) > _OFF_LOOP_BYTES:
            return await asyncio.to_thread(_opened, self._codec, rows)
        return _opened(self._codec, rows)

    def refuse(self, chat_id: str, items: Iterable[JsonObject]) -> None:
        """Remember that a provider did not take some items in a chat."""
        self._refused |= {_fingerprint(chat_id, item): None for item in items}
        for mark in list(self._refused)[:-_MOST_REFUSED]:
            del self._refused[mark]

    async def forget(self, ids: Collection[str], user_id: str) -> None:
        """Remove artifacts, so that no worker recalls them again."""
        if not ids:
            return
        try:
            await self._opened_store().drop(ids, user_id)
        except StoreDown as error:
            LOG.warning("%d artifacts stay for now: %s", len(ids), error)

    def has_news(self, chat_id: str) -> bool:
        """Say, once to each chat, that the table is down."""
        since = self._outbox.outage.since
        if since is None or self._told.get(chat_id) == since:
            return False
        self._told = {k: v for k, v in self._told.items() if v == since}
        self._told[chat_id] = since
        return True

    async def aclose(self) -> None:
        """Write what still waits."""
        await self._outbox.aclose()

    async def upkeep(self, now: float) -> None:
        """Do what is due, if no other worker does: new keys, old rows."""
        valves, table = self._valves or StorageValves(), self._outbox.table
        keys = self._codec.keys
        if keys and await table.claim(f"key-{keys[0].id}", now, _RESEAL_SECONDS):
            count = await table.reseal(self._codec)
            LOG.info("Encrypted %d artifacts with the newest key", count)
        hours = valves.ARTIFACT_CLEANUP_INTERVAL_HOURS
        if await table.claim("sweep", now, hours * 3600):
            count = await table.sweep(now, valves.ARTIFACT_CLEANUP_DAYS)
            LOG.info("Removed %d artifacts that nobody can use any more", count)

    async def _keep_house(self) -> None:
        while True:
            self._hurry.clear()
            try:
                async with asyncio.timeout(_UPKEEP_SECONDS):
                    await self._hurry.wait()
            except TimeoutError:
                pass
            try:
                await self.upkeep(time.time())
            except StoreDown as error:
                LOG.info("The artifacts' upkeep waits: %s", error)

    async def _touch(self, ids: Sequence[str]) -> None:
        try:
            await self._outbox.table.touch(ids, time.time())
        except StoreDown as error:
            LOG.info("The use of %d artifacts was not noted: %s", len(ids), error)

    async def _sealed(self, artifacts: Sequence[Artifact]) -> list[Sealed]:
        codec, now = self._codec, time.time()

        def sealed() -> list[Sealed]:
            return [codec.seal(artifact, now) for artifact in artifacts]

        if sum(_weight(artifact.item) for artifact in artifacts) > _OFF_LOOP_BYTES:
            return await asyncio.to_thread(sealed)
        return sealed()


_TOKENS = ("input_tokens", "output_tokens", "total_tokens")


class CostExport:
    """One record per turn in Redis, for an admin's own billing."""

    async def record(self, valves: CacheValves, facts: JsonObject) -> None:
        """Write what a turn cost; without a Redis, say so."""
        found = host_redis()
        if found is None:
            LOG.warning("COSTS_REDIS_DUMP is on, but Open WebUI has no Redis")
            return
        client, prefix = found
        key = f"{prefix}:pipe:{FUNCTION_ID}:cost:{ULID()}"
        try:
            with _stored():
                async with asyncio.timeout(_REDIS_SECONDS):
                    text = json.dumps(facts)
                    await client.set(key, text, ex=valves.COSTS_REDIS_TTL_SECONDS)
        except StoreDown as error:
            LOG.warning("The cost of a turn was not exported: %s", error)


def cost_facts(usage: JsonObject) -> JsonObject:
    """Return what a billing script wants of a usage."""
    spent = {name: as_number(usage.get(name)) or 0 for name in _TOKENS}
    cached = as_object(usage.get("input_tokens_details")).get("cached_tokens")
    thought = as_object(usage.get("output_tokens_details")).get("reasoning_tokens")
    return {
        **spent,
        "cached_tokens": as_number(cached) or 0,
        "reasoning_tokens": as_number(thought) or 0,
        "cost": as_number(usage.get("cost")) or 0,
    }


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
# Uses: 01 03 08 09. Pure.


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


_RESULT_PARTS = frozenset({"input_text", "input_image", "input_file"})


def _cut(text: str, begin: int, at: int) -> int:
    """Return where an artifact parts a text; nowhere, once the text was edited."""
    return at if begin < at <= len(text) and text[at : at + 1] in ("", "\n") else begin


class _InputWriter:
    """Collect the items of one conversation, message by message."""

    def __init__(self, card: ModelCard, recalled: Mapping[str, JsonObject]) -> None:
        self._card = card
        self._recalled = recalled
        self._phases: list[str] = []  # of the texts to come, as a marker said
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
            self._phases = []
            self._add("user", self._content(message.get("content")))

    def _add(self, role: str, content: str | list[JsonObject]) -> None:
        if content:
            self.items.append(_message(role, content))

    def _assistant(self, message: JsonObject) -> None:
        """Add an answer: its text and calls as the chat has them, artifacts between."""
        text, markers = _plain(message.get("content")), parse_markers(message)
        begin = 0
        for marker in markers:
            if marker.after:
                continue
            end = _cut(text, begin, marker.at)
            if end > begin:
                self._say(text[begin:end])
                begin = end + 1
            self._replay(marker)
        self._say(text[begin:])
        for call in as_objects(message.get("tool_calls")):
            self._call(call)
            for marker in markers:
                if marker.after and marker.after == call.get("id"):
                    self._replay(marker)

    def _say(self, text: str) -> None:
        if text:
            phase = self._phases.pop(0) if self._phases else ""
            item = _message("assistant", text)
            self.items.append({**item, "phase": phase} if phase else item)

    def _replay(self, marker: Marker) -> None:
        self._phases = list(marker.phases)
        item = self._recalled.get(marker.id)
        if item is not None and marker.format == as_text(item.get("format")):
            self.items.append(item)

    def _call(self, call: JsonObject) -> None:
        function = as_object(call.get("function"))
        if ":" in as_text(function.get("name")):
            return  # the card of a hosted tool, which is no function
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments)
        self.items.append(
            {
                "type": "function_call",
                "call_id": as_text(call.get("id")),
                "name": as_text(function.get("name")),
                "arguments": arguments if is_object_text(arguments) else "{}",
            }
        )

    def _tool_result(self, message: JsonObject) -> None:
        content = self._content(message.get("content"))
        if not isinstance(content, str):  # a result may hold no sound and no film
            content = [part for part in content if part["type"] in _RESULT_PARTS]
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


def paired(items: list[JsonObject]) -> list[JsonObject]:
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
        if item["type"] in ("message", "function_call_output"):  # ends the round
            kept.extend(_answers(called, outputs))
            called = []
        if item["type"] != "function_call_output":
            kept.append(item)
    return [*kept, *_answers(called, outputs)]


def _with_followers(items: list[JsonObject]) -> list[JsonObject]:
    """Return the items without reasoning that nothing of its own answer follows.

    Providers refuse it: "provided without its required following item".
    """
    kept: list[JsonObject] = []
    for item in reversed(items):
        follower = kept[-1] if kept else {}
        is_other = follower.get("role", "assistant") != "assistant"
        is_other |= follower.get("type") in (None, "function_call_output")
        if item["type"] != "reasoning" or not is_other:
            kept.append(item)
    return kept[::-1]


def build_input(
    messages: object, card: ModelCard, recalled: Mapping[str, JsonObject] | None = None
) -> ChatInput:
    """Return a chat's messages as Responses input, with what was kept for the model.

    The system messages at the head become `instructions`. Raise BadInput when nothing
    is left to send.
    """
    rest = as_objects(messages)
    head: list[str] = []
    while rest and rest[0].get("role") in ("system", "developer"):
        head.append(_plain(rest.pop(0).get("content")))
    instructions = "\n\n".join(filter(None, head))
    writer = _InputWriter(card, recalled or {})
    for message in rest:
        writer.write(message)
    items = _with_followers(paired(writer.items))
    if not items and instructions:  # a system prompt alone is a request too
        items, instructions = [_message("system", instructions)], ""
    if not items:
        raise BadInput
    return ChatInput(instructions, items, tuple(dict.fromkeys(writer.notes)))


# endregion


# region 13 Tools ──────────────────────────────────────────────────────────────────────
# What a model is offered, who runs a call, and running it: in parallel, under guard.
# Uses: 01 02 03 05 08.

# Strict schemas


class _NotStrict(Exception):
    """A schema says something that strict mode cannot say."""


_STRICT_DEPTH = 10

_TYPES = frozenset(
    {"array", "boolean", "integer", "null", "number", "object", "string"}
)

_KEPT_WORDS = (
    "type",
    "title",
    "description",
    "enum",
    "const",
    "pattern",
    "format",
    "multipleOf",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "minItems",
    "maxItems",
)

# Without these a schema only allows more, and strict mode refuses them.
_DROPPED_WORDS = frozenset(
    {
        "$comment",
        "$id",
        "$schema",
        "contentEncoding",
        "contentMediaType",
        "default",
        "deprecated",
        "discriminator",
        "example",
        "examples",
        "externalDocs",
        "maxLength",
        "minLength",
        "nullable",
        "readOnly",
        "uniqueItems",
        "writeOnly",
        "xml",
    }
)

_REBUILT_WORDS = frozenset(
    {
        "$defs",
        "$ref",
        "additionalProperties",
        "allOf",
        "anyOf",
        "definitions",
        "items",
        "oneOf",
        "properties",
        "required",
    }
)

_FORMATS = frozenset(
    {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time"}
    | {"uuid"}
)

_PYTHON_TYPES: tuple[tuple[type, str], ...] = (
    (bool, "boolean"),
    (int, "integer"),
    (float, "number"),
    (str, "string"),
    (type(None), "null"),
    (dict, "object"),
    (list, "array"),
)


def schema_types(schema: JsonObject) -> list[str]:
    """Return the types a schema names: none, one or several."""
    types = schema.get("type")
    return [types] if isinstance(types, str) else as_texts(types)


def _type_of(value: object) -> str:
    return next(name for kind, name in _PYTHON_TYPES if isinstance(value, kind))


def _accepts_null(schema: JsonObject) -> bool:
    types = schema_types(schema)
    if "anyOf" in schema:
        return any(_accepts_null(as_object(s)) for s in as_list(schema["anyOf"]))
    if "enum" in schema and None not in schema["enum"]:
        return False
    return "null" in types and schema.get("const") is None


def _is_plain(schema: JsonObject) -> bool:
    """Say whether null can simply stand among a schema's types."""
    types = set(schema_types(schema))
    return bool(types) and not types & {"object", "array"} and "const" not in schema


def _nullable(schema: JsonObject) -> JsonObject:
    """Return a strict schema that takes null too."""
    if _accepts_null(schema):
        return schema
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    if not _is_plain(schema):
        return {"anyOf": [schema, {"type": "null"}]}
    types = list(dict.fromkeys([*schema_types(schema), "null"]))
    values = {"enum": [*as_list(schema.get("enum")), None]} if "enum" in schema else {}
    return {**schema, "type": types, **values}


def _resolved(root: JsonObject, ref: str) -> JsonObject | None:
    """Return what a local `$ref` points at, or None."""
    place: object = root if ref.startswith("#") else None
    for step in ref[1:].split("/")[1:]:
        key = unquote(step).replace("~1", "/").replace("~0", "~")
        place = as_object(place).get(key)
    return cast(JsonObject, place) if isinstance(place, dict) else None


def _is_kept(word: str, value: object) -> bool:
    """Say whether strict mode takes a word; without it a schema only allows more."""
    refused = {
        "format": value not in _FORMATS if isinstance(value, str) else True,
        "pattern": "(?" in as_text(value),
        "exclusiveMinimum": isinstance(value, bool),  # an older JSON Schema
        "exclusiveMaximum": isinstance(value, bool),
    }
    return not refused.get(word, False)


def _implied_type(schema: JsonObject) -> JsonObject:
    """Return the type that the values of an `enum` or `const` have."""
    values = as_list(schema.get("enum")) + [
        schema[w] for w in ("const",) if w in schema
    ]
    types = list(dict.fromkeys(map(_type_of, values)))
    if "type" in schema or not types:
        return {}
    return {"type": types if len(types) > 1 else types[0]}


def _kept_words(schema: JsonObject) -> JsonObject:
    words = [word for word in _KEPT_WORDS if word in schema]
    kept = {word: schema[word] for word in words if _is_kept(word, schema[word])}
    return kept | _implied_type(kept)


# How many alternatives each word may have.
_CHOICES = {"anyOf": 1_000, "oneOf": 1_000, "allOf": 1}

_BESIDE_CHOICES = _DROPPED_WORDS | {"title", "description", "$defs", "definitions"}

_KNOWN_WORDS = _DROPPED_WORDS | _REBUILT_WORDS | frozenset(_KEPT_WORDS)


def _told(schema: JsonObject) -> JsonObject:
    return {word: schema[word] for word in ("title", "description") if word in schema}


def _known_types(schema: JsonObject) -> set[str]:
    types = set(schema_types(schema))
    if not types or not types <= _TYPES:
        raise _NotStrict("no type, or one that is none")
    return types


def _unknown_words(schema: JsonObject) -> list[str]:
    unknown = schema.keys() - _KNOWN_WORDS
    return [word for word in unknown if not word.startswith("x-")]


def _takes_other_names(schema: JsonObject, depth: int) -> bool:
    """Say whether an object is meant to have names that are not described."""
    if "additionalProperties" in schema:
        return schema["additionalProperties"] is not False
    return depth > 0 and not schema.get("properties")


class _StrictWriter:
    """Rewrite one schema; `root` is where its references point."""

    def __init__(self, root: JsonObject) -> None:
        self._root = root

    def write(self, data: object, depth: int = 0) -> JsonObject:
        """Return a schema in strict form; raise _NotStrict when there is none."""
        schema = as_object(data)
        if not schema or depth > _STRICT_DEPTH:
            raise _NotStrict("no object, or too deep")
        if _unknown_words(schema):
            raise _NotStrict("a word that strict mode does not know")
        written = self._written(schema, depth)
        return _nullable(written) if schema.get("nullable") is True else written

    def _written(self, schema: JsonObject, depth: int) -> JsonObject:
        if "$ref" in schema:
            return self._reference(schema)
        if any(word in schema for word in _CHOICES):
            return self._choice(schema, depth)
        written = _kept_words(schema)
        types = _known_types(written)
        if "object" in types:
            written |= self._closed(schema, depth)
        if "array" in types:
            written["items"] = self.write(schema.get("items"), depth + 1)
        return written

    def _reference(self, schema: JsonObject) -> JsonObject:
        ref = as_text(schema["$ref"])
        target = _resolved(self._root, ref)
        if target is None or target is schema or "properties" in schema:
            raise _NotStrict(ref)
        return {"$ref": ref}

    def _choice(self, schema: JsonObject, depth: int) -> JsonObject:
        """Return alternatives as `anyOf`; of `oneOf` it allows no less."""
        word = next(word for word in _CHOICES if word in schema)
        beside = schema.keys() - {word} - _BESIDE_CHOICES
        written = [self.write(branch, depth + 1) for branch in as_list(schema[word])]
        if beside or not 0 < len(written) <= _CHOICES[word]:
            raise _NotStrict("alternatives beside something else")
        return written[0] if word == "allOf" else {**_told(schema), "anyOf": written}

    def _closed(self, schema: JsonObject, depth: int) -> JsonObject:
        properties = as_object(schema.get("properties"))
        needed = set(map(as_text, as_list(schema.get("required"))))
        if _takes_other_names(schema, depth) or needed - properties.keys():
            raise _NotStrict("an object with names of its own")
        written = {n: self.write(sub, depth + 1) for n, sub in properties.items()}
        optional = {n: _nullable(written[n]) for n in written.keys() - needed}
        return {
            "properties": {name: optional.get(name, written[name]) for name in written},
            "required": list(written),
            "additionalProperties": False,
        }


def _written_root(root: JsonObject) -> JsonObject:
    writer = _StrictWriter(root)
    written = writer.write({"type": "object", **root})
    for word in ("$defs", "definitions"):
        named = as_object(root.get(word)).items()
        written |= {word: {n: writer.write(sub) for n, sub in named}} if named else {}
    return written


@lru_cache(maxsize=2048)
def _strict_from_text(text: str) -> JsonObject | None:
    try:
        written = _written_root(as_object(parse_json(text)))
    except _NotStrict:
        return None
    return written if schema_types(written) == ["object"] else None


def strict_schema(parameters: JsonObject) -> JsonObject | None:
    """Return parameters in strict form, or None when they cannot be made strict.

    Every object is closed, every property required, and what was optional may be
    null. The result is shared: read it, do not write to it.
    """
    try:
        return _strict_from_text(json.dumps(parameters))
    except (TypeError, ValueError, RecursionError):
        return None


def _fits(schema: JsonObject, value: object) -> bool:
    """Say whether a branch is meant for a value: for lists, or with its names."""
    if isinstance(value, list):
        return "items" in schema
    return as_object(value).keys() <= as_object(schema.get("properties")).keys()


def _followed(schema: JsonObject, root: JsonObject) -> JsonObject:
    """Return the schema behind references."""
    for _ in range(_STRICT_DEPTH):
        if "$ref" not in schema:
            return schema
        schema = _resolved(root, as_text(schema["$ref"])) or {}
    return {}


def _branch(
    schema: JsonObject, value: object, root: JsonObject, depth: int = 0
) -> JsonObject:
    """Return the schema among alternatives that a value most likely follows."""
    schema = _followed(schema, root)
    listed = (as_list(schema.get(word)) for word in _CHOICES)
    branches = list(map(as_object, chain.from_iterable(listed)))
    if not branches or depth > _STRICT_DEPTH:
        return schema
    reached = [_branch(branch, value, root, depth + 1) for branch in branches]
    return next((b for b in reached if _fits(b, value)), reached[0])


def _is_said(name: str, value: object, schema: JsonObject) -> bool:
    """Say whether a property was meant: a null may stand for one that was not."""
    is_optional = name not in as_list(schema.get("required"))
    return value is not None or not (
        is_optional and name in as_object(schema.get("properties"))
    )


def without_nulls(value: Any, schema: JsonObject, root: JsonObject) -> Any:
    """Return a value without the nulls that stand for what was left out."""
    chosen = _branch(schema, cast(object, value), root)
    if isinstance(value, list):
        items, listed = as_object(chosen.get("items")), cast("list[Any]", value)
        return [without_nulls(entry, items, root) for entry in listed]
    if not isinstance(value, dict):
        return value
    properties, entries = as_object(chosen.get("properties")), cast(JsonObject, value)
    said = {n: entry for n, entry in entries.items() if _is_said(n, entry, chosen)}
    return {
        name: without_nulls(entry, as_object(properties.get(name)), root)
        for name, entry in said.items()
    }


# What is offered


def _parameters(given: JsonObject) -> JsonObject:
    """Return a schema with the `properties` that OpenAI insists on."""
    bare: JsonObject = {"type": "object", "properties": {}}
    is_object = given.get("type") in (None, "object")
    return {**bare, **without_none(given)} if is_object else given


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
        "parameters": _parameters(as_object(function.get("parameters"))),
    }
    if as_text(function.get("description")):
        flat["description"] = function["description"]
    if isinstance(function.get("strict"), bool):
        flat["strict"] = function["strict"]
    return flat


def _identity(tool: JsonObject) -> tuple[str, str]:
    """Return what makes two tools the same one, and their order."""
    kind = as_text(tool.get("type"))
    if kind == "function":
        return "", as_text(tool["name"])
    if kind == "mcp":
        return kind, as_text(tool.get("server_label"))
    if kind.startswith("openrouter:"):
        return kind, ""
    return kind, json.dumps(tool, sort_keys=True)


def _strict_tool(tool: JsonObject) -> JsonObject:
    if tool.get("type") != "function" or "strict" in tool:
        return tool
    parameters = strict_schema(tool["parameters"])
    return {**tool, "parameters": parameters, "strict": True} if parameters else tool


def offered_tools(entries: Iterable[object], *, strict: bool) -> list[JsonObject]:
    """Return tools as they are sent: flat, each once, in an order that stays.

    Prompt caches rest on that order. Of two with one name the first counts.
    """
    tools: dict[tuple[str, str], JsonObject] = {}
    for entry in entries:
        if tool := flat_tool(entry):
            tools.setdefault(_identity(tool), tool)
    ordered = [tools[identity] for identity in sorted(tools)]
    return [_strict_tool(tool) for tool in ordered] if strict else ordered


def mcp_tools(servers: Secret) -> list[JsonObject]:
    """Return the MCP servers that OpenRouter calls for the model."""
    try:
        listed = as_list(parse_json(servers.reveal()))
    except ValueError:
        LOG.warning("REMOTE_MCP_SERVERS_JSON cannot be read: enter it again")
        return []
    return [
        {"type": "mcp", "require_approval": "never", **as_object(s)} for s in listed
    ]


_OPEN_WEBUI_SEARCH = frozenset({"search_web", "fetch_url"})


def without_search(tools: Iterable[object]) -> list[object]:
    """Return tools without those of Open WebUI's own web search."""
    flat = ((tool, as_object(flat_tool(tool))) for tool in tools)
    return [t for t, known in flat if known.get("name") not in _OPEN_WEBUI_SEARCH]


_MOST_RESULTS = {"perplexity": 20}


def refuses_search(card: ModelCard, effort: str) -> bool:
    """Say whether the provider takes no search with an effort (openrouter.md 7)."""
    return effort == "minimal" and card.id.startswith("openai/")


def is_search(tool: object) -> bool:
    """Say whether a tool is a web search that OpenRouter or a provider runs."""
    return "web_search" in as_text(as_object(tool).get("type"))


def search_tool(
    valves: SearchValves, card: ModelCard, effort: str, *, is_asked: bool
) -> JsonObject | None:
    """Return OpenRouter's web search, if this chat and this model get it."""
    wanted = {"off": False, "when_asked": is_asked, "always": True}
    if not wanted[valves.ENABLE_WEB_SEARCH_TOOL] or refuses_search(card, effort):
        return None
    engine, most = valves.WEB_SEARCH_ENGINE, valves.WEB_SEARCH_MAX_RESULTS
    parameters: JsonObject = {"max_results": min(most, _MOST_RESULTS.get(engine, most))}
    if engine != "auto":
        parameters["engine"] = engine
    return {"type": "openrouter:web_search", "parameters": parameters}


# Who runs a call

Verdict = Literal["run", "leave", "answer"]

# Open WebUI has to pause, ask or dispatch for these itself (open-webui.md 6).
_HOST_ONLY = frozenset({"ask_user", "delegate_task", "call_tool"})

# The kinds of `__tools__` entries that a plain call runs rightly.
_RUNNABLE_TYPES = frozenset({"", "action", "builtin", "external", "mcp"})


def _is_known_kind(entry: JsonObject) -> bool:
    is_terminal = as_text(entry.get("tool_id")).startswith("terminal:")
    is_here = not entry.get("direct") and not is_terminal
    return is_here and as_text(entry.get("type")) in _RUNNABLE_TYPES


def _is_connected(entry: JsonObject) -> bool:
    """Say whether an MCP server can be reached.

    Open WebUI hangs up before the stream of an API client begins.
    """
    return getattr(entry.get("client"), "client", True) is not None


def is_runnable(name: str, entry: JsonObject) -> bool:
    """Say whether calling an entry of `__tools__` is all that it takes."""
    is_ours = name not in _HOST_ONLY and _is_known_kind(entry)
    return is_ours and callable(entry.get("callable")) and _is_connected(entry)


def schema_of(entry: JsonObject | None) -> JsonObject:
    """Return the parameters that an entry of `__tools__` describes."""
    return as_object(as_object(as_object(entry).get("spec")).get("parameters"))


# What a request has not where Open WebUI cannot take over.
_LACKS = {True: "a person's approval", False: "the browser"}


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools of one request, and who may run them. Nothing writes to it.

    `asks` is set in chats where the user approves each call, `can_leave` where the
    caller runs what is left to it, `is_client` where the caller brought the tools.
    """

    entries: Mapping[str, JsonObject] = field(default_factory=dict[str, JsonObject])
    runs: bool = False
    asks: bool = True
    can_leave: bool = True
    is_client: bool = False
    strict: bool = False

    def judge(self, name: str) -> tuple[Verdict, str]:
        """Say who runs a tool, and what the model reads where nobody does."""
        entry = self.entries.get(name)
        if not self.runs or (self.can_leave and self._is_others(name, entry)):
            return "leave", ""
        if entry is None:
            return "answer", f'Error: Tool "{name}" not found.'
        if self.asks or not is_runnable(name, entry):
            return "answer", f"Error: {name} needs {_LACKS[self.asks]}. Do without it."
        return "run", ""

    def _is_others(self, name: str, entry: JsonObject | None) -> bool:
        if entry is None:
            return self.asks or self.is_client
        return self.asks or not is_runnable(name, entry)

    def schema(self, name: str) -> JsonObject:
        """Return the schema by which nulls are told from values, in strict mode."""
        schema = schema_of(self.entries.get(name)) if self.strict else {}
        return schema if strict_schema(schema) else {}


# Arguments


class Arguments(NamedTuple):
    """The arguments of one call, or why there are none."""

    values: JsonObject
    problem: str = ""


def _json_values(text: str) -> list[object] | None:
    """Return the JSON values that stand back to back in a text."""
    decoder, values, place = json.JSONDecoder(), list[object](), 0
    try:
        while place < len(text):
            value, place = decoder.raw_decode(text, place)
            values.append(value)
            while place < len(text) and text[place].isspace():
                place += 1
    except (ValueError, RecursionError):
        return None
    return values


_LITERAL_LIMIT = 100_000


def _python_objects(text: str) -> list[object]:
    """Return what some models write instead of JSON: `{'a': True}`."""
    try:
        value = ast.literal_eval(text) if len(text) <= _LITERAL_LIMIT else None
        value = json.loads(json.dumps(value))  # no sets, no bytes
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return []
    return [cast(JsonObject, value)] if isinstance(value, dict) else []


def _as_arguments(value: object, name: str) -> Arguments:
    if isinstance(value, str):  # JSON inside a JSON string
        value = parse_json(value)
    if isinstance(value, dict):
        return Arguments(cast(JsonObject, value))
    return Arguments(
        {}, f"Error: the arguments of `{name}` must be a JSON object. Please try again."
    )


def _calls_of(values: list[object]) -> list[object]:
    """Return values as those of several calls, if each can be one's."""
    is_mixed = not all(isinstance(value, dict) for value in values)
    return [None] if is_mixed and len(values) > 1 else values


def parse_arguments(text: str, name: str) -> list[Arguments]:
    """Return the arguments of a call; several objects in a row are several calls."""
    text = text.strip()
    if not text:
        return [Arguments({})]
    values = _json_values(text) or _python_objects(text)
    if not values:
        problem = (
            f"Error: the arguments of `{name}` are malformed or incomplete JSON. "
            "Please try again."
        )
        return [Arguments({}, problem)]
    return [_as_arguments(value, name) for value in _calls_of(values)]


@dataclass(frozen=True, slots=True)
class Call:
    """One call to make or to leave.

    `slot` is None for a call that was split off another; `is_mended` says that the
    arguments are not as the model wrote them.
    """

    slot: int | None
    call_id: str
    name: str
    arguments: JsonObject
    problem: str = ""
    verdict: Verdict = "leave"
    is_mended: bool = False


def _planned_call(
    box: Toolbox, name: str, written: Arguments, *, is_json: bool
) -> Call:
    verdict, problem = box.judge(name)
    schema = box.schema(name)
    values = without_nulls(written.values, schema, schema)
    wrong = problem or written.problem
    is_mended = not written.problem and (values != written.values or not is_json)
    verdict = "answer" if wrong else verdict
    return Call(None, new_id("call"), name, values, wrong, verdict, is_mended)


def planned_calls(
    box: Toolbox, slot: int, call_id: str, name: str, text: str
) -> list[Call]:
    """Return what one function call item asks for, and who does it."""
    parsed = parse_arguments(text, name)
    is_json = is_object_text(text.strip() or "{}")
    first, *more = (_planned_call(box, name, w, is_json=is_json) for w in parsed)
    is_left = box.judge(name)[0] == "leave"
    if is_left and (more or first.problem):  # whoever runs it reads it as it is
        return [Call(slot, call_id, name, {})]
    return [replace(first, slot=slot, call_id=call_id), *more]


def call_item(call: Call, status: str, item_id: str) -> JsonObject:
    """Return a call as the chat shall hold it."""
    return {
        "id": item_id,
        "type": "function_call",
        "status": status,
        "call_id": call.call_id,
        "name": call.name,
        "arguments": json.dumps(call.arguments, ensure_ascii=False),
    }


# Results


class Result(NamedTuple):
    """What became of a call: what the chat shows, and what the model reads."""

    call: Call
    status: Literal["completed", "failed", "incomplete"]
    text: str
    sent: str | list[JsonObject]
    files: tuple[JsonObject, ...] = ()
    embeds: tuple[Any, ...] = ()
    images: tuple[str, ...] = ()
    note: str = ""

    @property
    def shown(self) -> JsonObject:
        """Return the item that Open WebUI's own loop would have left."""
        pictures = [{"type": "input_image", "image_url": url} for url in self.images]
        item: JsonObject = {
            "type": "function_call_output",
            "id": new_id("fco"),
            "call_id": self.call.call_id,
            "output": [{"type": "input_text", "text": self.text}, *pictures],
            "status": self.status,
        }
        if self.files:
            item["files"] = list(self.files)
        if self.embeds:
            item["embeds"] = list(self.embeds)
        return item

    @property
    def item(self) -> JsonObject:
        """Return the item that the model reads."""
        return {
            "type": "function_call_output",
            "call_id": self.call.call_id,
            "output": self.sent,
        }


def refused(call: Call, text: str, note: str = "") -> Result:
    """Return the result of a call that was not made, or not to its end."""
    return Result(call, "failed", text, text, note=note)


def interrupted(call: Call) -> Result:
    """Return the result of a call that the end of the answer overtook."""
    text = "Error: the answer broke off before this tool was done."
    return Result(call, "incomplete", text, text)


def cut_text(text: str, limit: int) -> str:
    """Return a tool's result within a limit; a cut one says so."""
    if len(text) <= limit:
        return text
    return (
        f"{text[:limit]}\n\n[Cut: these are the first {limit} of {len(text)} "
        "characters. Ask for less, or for a part.]"
    )


_CUT_SLACK = 500  # what was cut once is not cut again


def bounded_results(items: Iterable[JsonObject], limit: int) -> list[JsonObject]:
    """Return input items, tool results among them cut to a limit."""
    return [
        (
            {**item, "output": cut_text(item["output"], limit)}
            if len(as_text(item.get("output"))) > limit + _CUT_SLACK
            else item
        )
        for item in items
    ]


# Running

# Words of a name that say that a call changes something.
_WRITING = re.compile(
    r"\b(?:"
    "add|append|apply|archive|assign|book|buy|cancel|clear|close|commit|copy|create|"
    "delete|deploy|disable|edit|enable|insert|install|invite|kill|make|mark|merge|"
    "modify|move|order|overwrite|patch|pay|post|publish|purge|push|put|record|"
    "register|remove|rename|replace|reply|reserve|reset|restart|revoke|save|"
    "schedule|send|set|share|start|stop|store|submit|toggle|transfer|trigger|unset|"
    "update|upload|upsert|write"
    r")\b"
)


def has_side_effects(name: str) -> bool:
    """Say whether calls of a tool must keep their order, judged by its name."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    return _WRITING.search(" ".join(words).lower()) is not None


_LAG_SECONDS = 0.5


@coroutine
def watched(work: Awaitable[Any], name: str) -> Generator[Any, Any, Any]:
    """Await a tool's work, and name the tool in the log when it holds up the server."""
    steps = work.__await__()
    resume: Callable[[], Any] = partial(next, steps)
    while True:
        begun = time.perf_counter()
        try:
            waits_for = resume()
        except StopIteration as done:
            return done.value
        finally:
            lag = time.perf_counter() - begun
            if lag >= _LAG_SECONDS:
                LOG.warning(
                    "The tool %s held up the whole server for %.1f s: it works "
                    "without awaiting. It should use asyncio.to_thread.",
                    name,
                    lag,
                )
        try:
            resume = partial(steps.send, (yield waits_for))
        except BaseException as error:  # whatever ends the wait is the tool's to see
            resume = partial(steps.throw, error)


class _Overdue(Exception):
    """A tool took longer than it may."""


_GRACE_SECONDS = 1.0

_MOST_PIECES = 10_000


async def in_time(work: Coroutine[Any, Any, Any], seconds: float) -> Any:
    """Return what work returns, or raise _Overdue; work that ignores it is left."""
    task = asyncio.get_running_loop().create_task(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if task.done():
            return task.result()
        raise _Overdue
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=_GRACE_SECONDS)


def _readable(value: Any) -> Any:
    if not isinstance(value, (bytes, bytearray)):
        return value
    try:
        return bytes(value).decode()
    except UnicodeDecodeError:
        return f"({len(value)} bytes that are no text)"


async def _pieces(value: Any) -> list[Any] | None:
    """Return what a generator yields, or None for what is none."""
    if isinstance(value, AsyncIterator):
        pieces: list[Any] = []
        async for piece in cast("AsyncIterator[Any]", value):
            pieces.append(_readable(piece))
            if len(pieces) >= _MOST_PIECES:
                break
        return pieces
    if isinstance(value, Generator):
        some = islice(cast("Generator[Any]", value), _MOST_PIECES)
        return list(map(_readable, await asyncio.to_thread(list, some)))
    return None


async def _collected(value: Any) -> Any:
    """Return a result as plain data: generators run, bytes read, awaitables awaited."""
    if inspect.isawaitable(value):
        value = await value
    pieces = await _pieces(value)
    if pieces is None:
        return _readable(value)
    is_text = all(isinstance(piece, str) for piece in pieces)
    return "".join(pieces) if is_text else pieces


@dataclass(frozen=True, slots=True)
class ToolScene:
    """What running the tools of one request needs to know of it."""

    valves: ToolValves
    entries: Mapping[str, JsonObject]
    user_id: str
    request: Any = field(repr=False)
    metadata: JsonObject = field(repr=False)
    messages: list[Any] = field(repr=False)
    emitter: Callable[[JsonObject], Awaitable[None]] | None = field(repr=False)
    reads_images: bool = True


def _shows_sources(metadata: JsonObject) -> bool:
    info = as_object(as_object(metadata.get("model")).get("info"))
    abilities = as_object(as_object(info.get("meta")).get("capabilities"))
    return abilities.get("citations", True) is not False


def _pictures(images: Iterable[str]) -> list[JsonObject]:
    return [
        {"type": "input_image", "image_url": data, "detail": "auto"}
        for data in images
        if data.startswith(("data:", "https://"))
    ]


def _linked(files: Iterable[JsonObject]) -> tuple[JsonObject, ...]:
    """Return the files that a card links to: those that are stored."""
    return tuple(f for f in files if not as_text(f.get("url")).startswith("data:"))


_STATUS: dict[bool, Literal["completed", "failed"]] = {
    True: "failed",
    False: "completed",
}


class _Finisher:
    """Turn a tool's value into a result, by Open WebUI's own functions."""

    def __init__(self, scene: ToolScene) -> None:
        self._scene = scene
        self._source_ids: dict[str, int] = {}
        self._user: Any = None
        self._lock = asyncio.Lock()

    async def finish(self, call: Call, value: Any) -> Result:
        """Return the result that Open WebUI would show, and what the model reads."""
        from open_webui.utils import middleware

        host: Any = middleware
        scene, entry = self._scene, self._scene.entries[call.name]
        async with self._lock:
            self._user = self._user or await self._found_user()
        terminal_file = host.build_terminal_file_tool_result(
            call.name, call.arguments, value, entry, scene.metadata
        )
        text, files, embeds = await host.process_tool_result(
            scene.request,
            call.name,
            terminal_file or value,
            as_text(entry.get("type")),
            False,
            scene.metadata,
            self._user,
        )
        await host.terminal_event_handler(
            call.name, call.arguments, text, scene.emitter
        )
        cited = await self._cite(host, call, text)
        whole = whole_text(host.tool_result_content(text))
        whole = whole or "(The tool returned nothing.)"
        status = _STATUS[bool(host._is_tool_result_error(whole))]
        shown = cut_text(whole, scene.valves.TOOL_RESULT_MAX_CHARS)
        kept = [*await self._file_of(call, whole, shown), *files]
        images = await self._images(host, kept)
        return Result(
            call,
            status,
            shown,
            self._sent(shown + cited, [data for _, data in images]),
            _linked(kept),
            tuple(embeds),
            tuple(url for url, _ in images),
        )

    async def _found_user(self) -> Any:
        from open_webui.models.users import Users

        return await Users.get_user_by_id(self._scene.user_id)

    async def _cite(self, host: Any, call: Call, text: str) -> str:
        """Show the sources of a result; return how the model can cite them."""
        scene = self._scene
        emit = scene.emitter if _shows_sources(scene.metadata) else None
        if emit is None or not text or call.name not in host.CITATION_TOOL_NAMES:
            return ""
        sources = host.get_citation_source_from_tool_result(
            tool_name=call.name,
            tool_params=call.arguments,
            tool_result=text,
            tool_id=as_text(scene.entries[call.name].get("tool_id")),
        )
        if not self._source_ids:  # what the chat's files count already
            host.get_source_context(
                as_list(scene.metadata.get("sources")), self._source_ids
            )
        marks = host.get_source_context(
            sources, self._source_ids, include_content=False
        )
        for source in sources:
            await emit({"type": "source", "data": source})
        said = "Cite what you use of this by its id in brackets, such as [1]:"
        return f"\n\n{said}\n{marks}" if marks else ""

    async def _file_of(self, call: Call, whole: str, shown: str) -> list[JsonObject]:
        """Return the whole of a cut result as a file of the user."""
        if whole is shown or self._scene.emitter is None or self._user is None:
            return []
        from fastapi import UploadFile
        from open_webui.routers.files import upload_file_handler
        from starlette.datastructures import Headers

        name = f"{call.name}.txt"
        upload = UploadFile(
            io.BytesIO(whole.encode("utf-8", "replace")),
            filename=name,
            headers=Headers({"content-type": "text/plain; charset=utf-8"}),
        )
        saved = await upload_file_handler(
            self._scene.request,
            file=upload,
            metadata={},
            process=False,
            user=self._user,
        )
        id_ = as_text(getattr(saved, "id", ""))
        url = f"/api/v1/files/{id_}/content"
        return [{"type": "file", "id": id_, "url": url, "name": name}] if id_ else []

    async def _images(
        self, host: Any, files: list[JsonObject]
    ) -> list[tuple[str, str]]:
        """Return each image as the chat refers to it, and as the model reads it."""
        urls = [as_text(f.get("url")) for f in files if f.get("type") == "image"]
        return [await self._image(host, url) for url in urls if url]

    async def _image(self, host: Any, url: str) -> tuple[str, str]:
        scene = self._scene
        if url.startswith("data:"):
            stored = await host.store_tool_result_image(
                scene.request, url, scene.metadata, self._user
            )
            return as_text(stored), url
        part: JsonObject = {"type": "image_url", "image_url": {"url": url}}
        message: JsonObject = {"role": "user", "content": [part]}
        await host.convert_url_images_to_base64(
            {"messages": [message]}, user=self._user
        )
        (part,) = message["content"]
        return url, as_text(as_object(part["image_url"]).get("url"))

    def _sent(self, text: str, images: list[str]) -> str | list[JsonObject]:
        pictures = _pictures(images)
        if not pictures:
            return text
        if not self._scene.reads_images:
            return f"{text}\n\n[An image is shown to the user. You cannot see it.]"
        return [{"type": "input_text", "text": text}, *pictures]


class ToolGuards:
    """What the tools of all requests share: places, and rest for what fails."""

    def __init__(self) -> None:
        self.places = Limiter()
        self.breakers = Breakers()


_LINE = 50  # calls of one request that wait for a place

_GLOBAL_LINE = 10_000  # the requests' own limits keep it far below


def _is_server_error(value: Any) -> bool:
    """Say whether a tool server could not answer: Open WebUI returns that as data."""
    first = cast("tuple[object, ...]", value)[:1] if isinstance(value, tuple) else ()
    return [list(as_object(part)) for part in first] == [["error"]]


class ToolRunner:
    """Run the calls of one turn: `async with`, and no task is left behind it."""

    def __init__(self, scene: ToolScene, guards: ToolGuards) -> None:
        self._scene = scene
        self._guards = guards
        self._finisher = _Finisher(scene)
        self._places = Limiter()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: dict[asyncio.Task[Result], Call] = {}
        self._deadline: float | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._cancel()

    async def start(self, call: Call) -> None:
        """Start a call; when the line is full, wait until one of it is done."""
        most = self._scene.valves.MAX_PARALLEL_TOOLS_PER_REQUEST + _LINE
        while len(running := self._running()) >= most:
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        task = asyncio.get_running_loop().create_task(self._in_turn(call))
        self._tasks[task] = call

    def _running(self) -> list[asyncio.Task[Result]]:
        return [task for task in self._tasks if not task.done()]

    def _done(self) -> list[Result]:
        done = [task for task in self._tasks if task.done()]
        return [self._taken(task) for task in done]

    async def next_results(self) -> list[Result]:
        """Return the results that are there next; none means that all are in.

        What is not done when the round's time is over is ended and says so.
        """
        if not self._tasks:
            self._deadline = None
            return []
        loop = asyncio.get_running_loop()
        seconds = self._scene.valves.TOOL_BATCH_TIMEOUT_SECONDS
        self._deadline = self._deadline or loop.time() + seconds
        await asyncio.wait(
            self._tasks,
            timeout=max(0.0, self._deadline - loop.time()),
            return_when=asyncio.FIRST_COMPLETED,
        )
        text = f"Error: the tools of this round took longer than {seconds:g} seconds."
        return self._done() or [refused(c, text) for c in await self._cancelled()]

    async def interrupt(self) -> list[Result]:
        """End every call that runs; return what became of all of them."""
        return [*self._done(), *map(interrupted, await self._cancelled())]

    async def _cancelled(self) -> list[Call]:
        """End every call that runs, and return them."""
        late = list(self._tasks.values())
        await self._cancel()
        return late

    def _taken(self, task: asyncio.Task[Result]) -> Result:
        call = self._tasks.pop(task)
        return interrupted(call) if task.cancelled() else task.result()

    async def _cancel(self) -> None:
        tasks, self._tasks, self._deadline = self._tasks, {}, None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=2 * _GRACE_SECONDS)

    async def _in_turn(self, call: Call) -> Result:
        """Run a call when it is its turn: in order where order matters."""
        valves = self._scene.valves
        order = self._locks[call.name] if has_side_effects(call.name) else nullcontext()
        try:
            async with (
                order,
                self._places.place(valves.MAX_PARALLEL_TOOLS_PER_REQUEST, _LINE + 1),
                self._guards.places.place(
                    valves.MAX_PARALLEL_TOOLS_GLOBAL, _GLOBAL_LINE
                ),
            ):
                return await self._guarded(call)
        except Overloaded:
            return refused(call, "Error: too many tools run at once. Try again later.")

    async def _guarded(self, call: Call) -> Result:
        valves = self._scene.valves
        window, now = valves.BREAKER_WINDOW_SECONDS, time.monotonic()
        breaker = self._guards.breakers.get(self._scene.user_id, call.name)
        if not breaker.admits(now, window):
            wait = seconds_in_words(breaker.rest_seconds(now, window) or 1)
            return refused(
                call,
                f"Error: {call.name} failed several times and is off for now. Go on "
                f"without it; it can be tried again in {wait}.",
                f"{call.name} failed several times and rests for {wait}.",
            )
        try:
            result, has_failed = await self._outcome(call)
        except BaseException:  # cancelled by the user, so it says nothing of the tool
            breaker.released()
            raise
        if not has_failed:
            breaker.succeeded()
        elif breaker.failed(time.monotonic(), window, valves.BREAKER_MAX_FAILURES):
            rest = seconds_in_words(window)
            note = f"{call.name} failed again and rests for {rest}: {result.text}"
            result = result._replace(note=presentable(note))
        return result

    async def _outcome(self, call: Call) -> tuple[Result, bool]:
        """Return what became of a call, and whether its tool is to blame."""
        seconds = self._scene.valves.TOOL_TIMEOUT_SECONDS
        try:
            value = await in_time(self._watched(call), seconds)
            return await self._finisher.finish(call, value), _is_server_error(value)
        except _Overdue:
            text = f"Error: {call.name} did not answer within {seconds:g} seconds."
            return refused(call, text), True
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return refused(call, f"Error: {call.name} was cancelled."), False
        except Exception as error:  # a tool may raise anything; the model reads it
            LOG.info("The tool %s raised %s", call.name, type(error).__name__)
            words = cut_text(whole_text(str(error)) or type(error).__name__, 10_000)
            told = json.dumps({"error": words}, indent=2, ensure_ascii=False)
            return refused(call, told), True

    async def _watched(self, call: Call) -> Any:
        return await watched(self._made(call), call.name)

    async def _made(self, call: Call) -> Any:
        """Call the tool as Open WebUI does: its own arguments, fresh context."""
        from open_webui.utils.tools import get_updated_tool_function

        scene, entry = self._scene, self._scene.entries[call.name]
        known = as_object(schema_of(entry).get("properties"))
        arguments = call.arguments
        if entry.get("type") != "mcp":  # MCP servers validate for themselves
            arguments = {k: v for k, v in arguments.items() if k in known}
        fresh = {
            "__messages__": scene.messages,
            "__files__": as_list(scene.metadata.get("files")),
        }
        function = await get_updated_tool_function(entry["callable"], fresh)
        try:
            return await _collected(function(**arguments))
        except (SystemExit, KeyboardInterrupt, BaseExceptionGroup) as error:
            text = f"the tool raised {type(error).__name__}: {error}"
            raise RuntimeError(text) from error  # and does not end the server


# endregion


# region 14 Request ────────────────────────────────────────────────────────────────────
# One valid body for POST /responses: flat fields, no key that only Chat Completions has.
# Uses: 01 02 08 09 12 13. Pure.

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
        "extra_tools",
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


def _offered_efforts(card: ModelCard) -> list[str]:
    """Return the efforts a model can be asked for, the lowest first."""
    offered = set(card.efforts or _EFFORTS)
    if card.reasoning_is_mandatory:
        offered.discard("none")
    return [effort for effort in _EFFORTS if effort in offered]


def fitting_effort(wanted: str, card: ModelCard) -> str:
    """Return the effort a model offers that is nearest; the lower of two as near."""
    offered = _offered_efforts(card)
    place = _EFFORTS.index(wanted)
    return min(offered, key=lambda e: abs(_EFFORTS.index(e) - place), default=wanted)


def reasoning_options(body: JsonObject, card: ModelCard) -> JsonObject:
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


def _tool_choice(body: JsonObject) -> JsonObject:
    choice = body.get("tool_choice")
    name = as_text(as_object(as_object(choice).get("function")).get("name"))
    if name:
        choice = {"type": "function", "name": name}
    return without_blanks({"tool_choice": choice})


def _tools(body: JsonObject, card: ModelCard) -> JsonObject:
    tools = list(filter(None, map(flat_tool, as_list(body.get("tools")))))
    if not tools or not card.takes("tools"):
        return {}
    sent = {"tools": tools, **_tool_choice(body)}
    parallel = body.get("parallel_tool_calls")
    if isinstance(parallel, bool) and card.takes("parallel_tool_calls"):
        sent["parallel_tool_calls"] = parallel
    return sent


def _sampling(body: JsonObject, card: ModelCard) -> JsonObject:
    taken = filter(card.takes, _SAMPLING)
    return {key: body[key] for key in taken if as_number(body.get(key)) is not None}


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
    session = first_text(session_id, body.get("session_id"))[:_SESSION_ID_LIMIT]
    named = {"instructions": chat.instructions, "session_id": session}
    request |= without_blanks(named)
    request |= _sampling(body, card)
    request |= without_none({key: body.get(key) for key in _AS_THEY_ARE})
    request |= _output_limit(body)
    request |= _text_options(body)
    request |= reasoning_options(body, card)
    request |= _tools(body, card)
    return request


def _replayed(item: JsonObject) -> JsonObject:
    """Return an item of this turn as it goes back: verbatim, but for what must be."""
    if not is_object_text(as_text(item.get("arguments")) or "{}"):
        return {**item, "arguments": "{}"}  # the call's result says what was wrong
    if item.get("type") != "reasoning":
        return item
    return without_none(replayed(item))


def with_results(
    request: JsonObject,
    items: Iterable[JsonObject],
    results: Iterable[JsonObject],
    *,
    is_last: bool = False,
) -> JsonObject:
    """Return the request of the next round: what the model said, and what came of it.

    The last one asks for an answer but keeps the tools: prompt caches rest on them.
    """
    said = [_replayed(item) for item in items]
    following = {**request, "input": paired([*request["input"], *said, *results])}
    if is_last:
        following["tool_choice"] = "none"
    elif following.get("tool_choice") not in (None, "auto", "none"):
        del following["tool_choice"]  # forced once, not for ever
    return following


def _task_reasoning(effort: str, card: ModelCard) -> JsonObject:
    if card.efforts == () and not card.reasoning_is_mandatory:
        return {"enabled": False}  # no choice of effort, so the lowest is none
    return {"effort": fitting_effort(effort, card)}


_NOT_FOR_TASKS = frozenset(
    {"tools", "tool_choice", "parallel_tool_calls", "plugins", "reasoning"}
)


def build_task_request(
    request: JsonObject, task: str, card: ModelCard, effort: Effort
) -> JsonObject:
    """Return a chat's request as one for a title, tags or another background task.

    No tools, no plugins, little reasoning, and a bounded answer where it is short.
    """
    if task == "moa_response_generation":  # a real answer, merged from several models
        return request
    request = {k: value for k, value in request.items() if k not in _NOT_FOR_TASKS}
    if card.reasons:
        request["reasoning"] = _task_reasoning(effort, card)
    if task in _SHORT_TASKS:
        request.setdefault("max_output_tokens", _SHORT_TASK_TOKENS)
    return request


def unsent(body: JsonObject, request: JsonObject) -> list[str]:
    """Return the names of parameters that were set and could not be sent."""
    return sorted(
        key
        for key in without_none(body)
        if key not in request and key not in _TRANSLATED
    )


# endregion


# region 15 Relay ──────────────────────────────────────────────────────────────────────
# One response's events become outputs: what to show and what to do.
# Uses: 01 03 04. Pure.

# A "card" is a hosted tool that Open WebUI has no own card for; an "output" is the
# result of a call or a card.
Kind = Literal["message", "reasoning", "function_call", "hosted", "card", "output"]


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


class CallTool(NamedTuple):
    """A call whose arguments are complete."""

    slot: int
    call_id: str
    name: str
    arguments: str


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


Output = (
    Opened
    | Delta
    | Closed
    | Keep
    | CallTool
    | Sourced
    | Pictured
    | Noted
    | Finished
    | Failed
)

# Hosted tools that Open WebUI draws as cards (open-webui.md 5.4 c).
_DRAWN = frozenset({"web_search_call", "file_search_call", "computer_call"})

# Hosted tools that are drawn as the card of a function call and its result.
_CARDS = frozenset(
    {
        "code_interpreter_call",
        "mcp_approval_request",
        "mcp_call",
        "mcp_list_tools",
        "openrouter:advisor",
        "openrouter:bash",
        "openrouter:browser_use",
        "openrouter:code_interpreter",
        "openrouter:datetime",
        "openrouter:experimental__search_models",
        "openrouter:file_search",
        "openrouter:files",
        "openrouter:fusion",
        "openrouter:mcp",
        "openrouter:memory",
        "openrouter:shell",
        "openrouter:subagent",
        "openrouter:text_editor",
        "openrouter:tool_search",
        "openrouter:web_fetch",
    }
)

_SEARCH = "openrouter:web_search"  # drawn as the web search that Open WebUI knows

_KIND: dict[str, Kind] = {
    "message": "message",
    "reasoning": "reasoning",
    "function_call": "function_call",
    _SEARCH: "hosted",
    **dict.fromkeys(_DRAWN, "hosted"),
    **dict.fromkeys(_CARDS, "card"),
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
    is_called: bool = False
    is_kept: bool = False
    is_cut: bool = False  # the answer ended before the item did

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
    "card": "fc",
    "output": "fco",
}

_PICTURES = frozenset({"image_generation_call", "openrouter:image_generation"})

_UNSTREAMED = -100

# Upstream's own indexes are not negative; these stand for those it did not give.
_NO_INDEX = {"message": -1, "reasoning": -2, "function_call": -3}


def _index(event: Event, kind: str) -> int:
    return event.slot if event.slot >= 0 else _NO_INDEX.get(kind, -4)


def _whole(item: Item) -> str:
    return item.arguments if item.type == "function_call" else item.text


# Where the outcome of a hosted tool stands; the rest of its item is what was asked.
_OUTCOMES = frozenset(
    {
        "advice",
        "analysis",
        "content",
        "datetime",
        "error",
        "exitCode",
        "failed_models",
        "failure_reason",
        "httpStatus",
        "outcome",
        "output",
        "outputs",
        "responses",
        "result",
        "results",
        "sources",
        "stderr",
        "stdout",
        "title",
        "tools",
    }
)

_CARD_TEXT_LIMIT = 20_000


def card_name(raw: JsonObject) -> str:
    """Return a hosted tool's name; the colon tells it from every function's."""
    type_ = as_text(raw.get("type"))
    if type_.startswith("mcp_"):
        parts = (raw.get("server_label"), raw.get("name") or type_)
        return ":".join(("mcp", *filter(None, map(as_text, parts))))
    return type_ if ":" in type_ else f"openrouter:{type_.removesuffix('_call')}"


def _card_call(state: _Open, status: str) -> JsonObject:
    raw = state.raw
    given = raw.get("arguments")
    asked = parse_json(given) if isinstance(given, str) else given
    if not isinstance(asked, dict):
        hidden = _OUTCOMES | _OPAQUE | {"id", "type", "status", "call_id", "name"}
        asked = {k: v for k, v in raw.items() if k not in hidden and v is not None}
    return {
        "id": state.id,
        "type": "function_call",
        "status": status,
        "call_id": state.call_id,
        "name": card_name(raw),
        "arguments": json.dumps(asked, ensure_ascii=False),
    }


def _hosted_status(state: _Open, status: str) -> str:
    """Return how a hosted tool ended: as it says itself, if it says that it failed."""
    said = as_text(state.raw.get("status"))
    if said in ("failed", "incomplete"):
        return said
    if state.raw.get("error"):
        return "failed"
    return "incomplete" if state.is_cut and status == "completed" else status


def _card_output(state: _Open) -> JsonObject:
    """Return the outcome of a hosted tool as the result of a call."""
    raw = state.raw
    outcome = {k: raw[k] for k in sorted(_OUTCOMES & raw.keys()) if raw[k] is not None}
    only = next(iter(outcome.values())) if len(outcome) == 1 else None
    text = (
        only
        if isinstance(only, str)
        else json.dumps(outcome, indent=2, ensure_ascii=False)
    )
    return {
        "type": "function_call_output",
        "id": f"{state.id}_out",
        "call_id": state.call_id,
        "output": [{"type": "input_text", "text": text[:_CARD_TEXT_LIMIT]}],
        "status": _hosted_status(state, "completed"),
    }


def _hosted_item(state: _Open, status: str) -> JsonObject:
    kept = {k: v for k, v in state.raw.items() if k not in _OPAQUE}
    item = {**kept, "id": state.id, "status": _hosted_status(state, status)}
    if item.get("type") == _SEARCH:
        item["type"] = "web_search_call"
        item.setdefault("action", {"type": "search", "query": ""})
    return item


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
    elif state.kind == "card":
        item = _card_call(state, _hosted_status(state, status))
    else:
        item = _hosted_item(state, status)
    return item


def whole_output(slot: int, item: JsonObject) -> list[Output]:
    """Return what shows a result, which has no middle."""
    return [Opened(slot, "output", item), Closed(slot, "output", item)]


class Relay:
    """Turn one response's events into outputs: no await, no clock, no I/O.

    `now` is in seconds and only ever compared with itself. After something final
    came, further input is normal and yields nothing.
    """

    def __init__(self, call_ids: Collection[str] = (), first_slot: int = 0) -> None:
        self.finished = False
        self.next_slot = first_slot
        self._items: dict[int, _Open] = {}  # by upstream's output_index
        self._order: list[_Open] = []
        self._thinking: list[_Open] = []  # thoughts that nothing has followed yet
        self._hidden: set[int] = set()  # indexes of items that are not shown
        self.call_ids = set(call_ids)
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
            self.take_slot(),
            kind,
            new_id(_ID_PREFIX[kind]),
            item.raw,
            self._now,
            self._now,
        )
        if kind in ("function_call", "card"):
            state.call_id, state.name = self._own_call_id(item.call_id), item.name
        settled = self._settle_thoughts()
        self._order.append(state)
        self._items[index] = state
        if kind == "reasoning":
            self._thinking.append(state)
        return [*settled, Opened(state.slot, kind, _shown(state, "in_progress"))]

    def take_slot(self) -> int:
        """Return the next free slot of the turn."""
        self.next_slot += 1
        return self.next_slot - 1

    def _own_call_id(self, call_id: str) -> str:
        """Return a call id that no other call of the conversation has.

        Some providers repeat theirs, and Open WebUI would take the second call as
        answered already.
        """
        if not call_id or call_id in self.call_ids:
            call_id = new_id("call")
        self.call_ids.add(call_id)
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
        return [o for s in thoughts if not s.is_closed for o in self._close(s)]

    def _close(self, state: _Open) -> list[Output]:
        is_first = state.shown is None
        if is_first and not state.text:
            state.touched = self._now  # thoughts that nobody may read take time too
        state.shown = state.text
        closed = Closed(state.slot, state.kind, _shown(state, "completed"))
        if state.kind != "card" or not is_first:
            return [closed]
        return [closed, *whole_output(self.take_slot(), _card_output(state))]

    def _close_all(self, *, is_whole: bool = False) -> list[Output]:
        """Close what is open; only a response that is whole makes its last calls."""
        self._thinking = []
        outputs: list[Output] = []
        for state in self._order:
            outputs += self._closed_last(state, is_whole=is_whole)
            outputs += self._called_last(state) if is_whole else []
        return outputs

    def _closed_last(self, state: _Open, *, is_whole: bool) -> list[Output]:
        state.is_cut = not is_whole and not state.is_closed
        return [] if state.is_closed else self._close(state)

    def _called_last(self, state: _Open) -> list[Output]:
        """Return the call of an item whose own end never came."""
        if state.kind != "function_call" or state.is_kept:
            return []
        return [self._kept(state), *self._called(state)]

    def _called(self, state: _Open) -> list[Output]:
        """Return the call of an item, once, when it is known what to call."""
        if state.kind != "function_call" or state.is_called or not state.name:
            return []
        state.is_called = True
        return [CallTool(state.slot, state.call_id, state.name, state.text)]

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
        if state is None:
            return outputs
        outputs += self._complete(state, event.text)
        return [*outputs, *(self._called(state) if state.text.strip() else [])]

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
            *self._close(state),
            *self._called(state),
        ]

    def _kept(self, state: _Open) -> Keep:
        """Return the item verbatim, but for a call id that had to be made ours."""
        state.is_kept = True
        if state.kind != "function_call":
            return Keep(state.slot, state.raw)
        own = {
            "type": "function_call",
            "call_id": state.call_id,
            "name": state.name,
            "arguments": state.text.strip() or "{}",
        }
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
        outputs = [*self._absorb(snapshot), *self._close_all(is_whole=cut is None)]
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
    "card": {},
    "output": {},
}

# A result comes whole: one event is enough, and it may be long.
_CLOSING: dict[Kind, str] = {**dict.fromkeys(_DELTAS, "done"), "output": "added"}


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
            case Opened(_, "output", _) | Keep() | CallTool():
                return []
            case Opened(slot, kind, item):
                place = {"item_id": item["id"], "output_index": slot}
                self._deltas[slot] = {**_DELTAS[kind], **place}
                return [_item_event("added", slot, item)]
            case Closed(slot, kind, item):
                return [_item_event(_CLOSING[kind], slot, item)]
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
            case Closed(_, "reasoning", {"reasoning_details": details}):
                return [self._chunk({"reasoning_details": details})]
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


def texts_of(closed: Iterable[Closed], kind: Kind) -> list[str]:
    """Return what can be read of the items of a kind."""
    parts = {"message": "content", "reasoning": "summary"}[kind]
    texts = (
        "".join(p["text"] for p in c.item[parts]) for c in closed if c.kind == kind
    )
    return [text for text in texts if text]


def _of_kind(closed: Iterable[Closed], kind: Kind) -> dict[str, JsonObject]:
    return {c.item["call_id"]: c.item for c in closed if c.kind == kind}


def _unanswered(closed: Sequence[Closed]) -> list[JsonObject]:
    """Return the calls that the caller has to make."""
    calls, answers = _of_kind(closed, "function_call"), _of_kind(closed, "output")
    return [tool_call(calls[call_id]) for call_id in calls if call_id not in answers]


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
        beside = {
            "reasoning_content": "\n\n".join(texts_of(closed, "reasoning")),
            "tool_calls": _unanswered(closed),
            "annotations": [annotation(citation) for citation in self._citations],
            "images": [_image(url) for url in self._images],
        }
        text = "\n\n".join(texts_of(closed, "message"))
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
# Uses: 01 02 03 04 07 08 09 10 11 12 13 14 15 16.

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
    tools: JsonObject = field(repr=False, default_factory=dict[str, Any])

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
        tools: object = None,
    ) -> Turn:
        """Read the arguments of `pipe()` (open-webui.md 3)."""
        facts, meta, person = as_object(body), as_object(metadata), as_object(user)
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
            user_id=as_text(person.get("id")),
            body=facts,
            metadata=meta,
            request=request,
            emitter=emitter if is_chat and not task else None,
            tools=as_object(tools),
        )

    @property
    def is_kept(self) -> bool:
        """Say whether what the provider needs again has a place to be kept."""
        is_channel = self.chat_id.startswith("channel:")
        return self.caller is Caller.CHAT and bool(self.user_id) and not is_channel

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


_REFUSALS = re.compile(
    r"signature|thinking block|encrypted.content|could not be (verified|decrypted)"
    r"|required following item|items are not persisted",
    re.IGNORECASE,
)

_REPAIRED = "The provider did not accept its earlier reasoning; it was left out."


def _is_reasoning(item: JsonObject) -> bool:
    return item.get("type") == "reasoning"


def is_replay_refusal(error: BaseException, request: JsonObject) -> bool:
    """Say whether a provider refused the reasoning in a request (openrouter.md 8.4)."""
    if not isinstance(error, PipeError) or not _REFUSALS.search(error.detail):
        return False
    return any(map(_is_reasoning, as_objects(request.get("input"))))


def without_reasoning(request: JsonObject) -> JsonObject:
    """Return a request without any replayed reasoning."""
    items = as_objects(request.get("input"))
    return {**request, "input": [item for item in items if not _is_reasoning(item)]}


class _Pull:
    """Draw batches from a generator, each when it is asked for, in one task.

    A batch can so be waited for beside something else, and what the generator opens is
    closed by the task that opened it.
    """

    def __init__(self, batches: AsyncGenerator[list[Output], None]) -> None:
        self._batches = batches
        self._asked = asyncio.Event()
        self._reply: asyncio.Future[list[Output]] | None = None

    async def __aenter__(self) -> Self:
        self.task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])

    def next(self) -> asyncio.Future[list[Output]]:
        """Return the batch to come; at the end only `task` is done."""
        if self._reply is None:
            self._reply = asyncio.get_running_loop().create_future()
            self._asked.set()
        return self._reply

    def take(self) -> list[Output]:
        """Return the batch that has come, so that the next one can be asked for."""
        batch, self._reply = self.next().result(), None
        return batch

    async def _run(self) -> None:
        await self._wanted()
        async with aclosing(self._batches):
            async for batch in self._batches:
                if self._reply is not None and not self._reply.done():
                    self._reply.set_result(batch)
                await self._wanted()

    async def _wanted(self) -> None:
        await self._asked.wait()
        self._asked.clear()


_SETTLE_SECONDS = 5.0

_NOT_KEPT = (
    "This server's database is not available: the answer goes on, but the model's "
    "reasoning may be missing later."
)


@dataclass(slots=True)
class _Placed:
    """An artifact, its marker, and whether its row is kept."""

    position: float  # among the slots
    marker: Marker
    is_kept: bool = False


class Keeper:
    """Keep one turn's artifacts: collected as items finish, written beside the stream.

    A marker is shown once its row is kept: what a client has seen is there.
    """

    def __init__(self, turn: Turn, memory: Memory) -> None:
        self._turn = turn
        self._memory = memory
        self._recalled: dict[str, JsonObject] = {}
        self._fresh: list[Artifact] = []
        self._writing: asyncio.Task[None] | None = None
        self._anchors: dict[int, list[_Placed]] = {}  # by the slot that shows them
        self._loose: list[tuple[float, JsonObject]] = []  # hosted items without one
        self._closed: dict[int, Closed] = {}
        self._due: set[int] = set()  # slots whose markers have changed
        self._slots = 0
        self._round_begin = self._text_begin = 0
        self._cards: set[str] = set()  # ids of calls that only show a hosted tool
        self._phased: tuple[str, int] | None = None

    # Before

    async def recall(self) -> dict[str, JsonObject]:
        """Return what the conversation's markers stand for, as far as it goes back."""
        turn = self._turn
        if not turn.is_kept:
            return {}
        if turn.request is not None:  # there is a server, and so its database
            self._memory.prepare()
        policy = turn.settings.PERSIST_REASONING_TOKENS
        wanted = wanted_markers(turn.body.get("messages"), policy)
        artifacts = await self._memory.recall(wanted, turn.user_id)
        self._recalled = {
            artifact.id: replayed(artifact.item)
            for artifact in artifacts
            if artifact.model == turn.model_id
            and self._is_allowed(artifact.item)
            and self._is_due(artifact.item, wanted[artifact.id])
        }
        if len(self._recalled) < len(wanted):
            LOG.info("Recalled %d of %d items", len(self._recalled), len(wanted))
        return self._recalled

    def accepted(self, request: JsonObject) -> JsonObject:
        """Return a request without what its provider has refused before."""
        items = as_objects(request.get("input"))
        kept = [item for item in items if not self._is_refused(item)]
        return request if len(kept) == len(items) else {**request, "input": kept}

    async def forget(self, request: JsonObject) -> None:
        """Remember that the provider did not take the reasoning in a request."""
        items = filter(_is_reasoning, as_objects(request.get("input")))
        self._memory.refuse(self._turn.chat_id, items)
        ids = [id_ for id_, item in self._recalled.items() if _is_reasoning(item)]
        await self._memory.forget(ids, self._turn.user_id)

    def _is_due(self, item: JsonObject, wanted: Wanted) -> bool:
        is_within = wanted.in_reach or not _is_reasoning(item)
        return is_within and is_replayed(item, in_loop=wanted.in_loop)

    def _is_refused(self, item: JsonObject) -> bool:
        return _is_reasoning(item) and self._memory.is_refused(self._turn.chat_id, item)

    def _is_allowed(self, item: JsonObject) -> bool:
        settings = self._turn.settings
        if _is_reasoning(item):
            return settings.PERSIST_REASONING_TOKENS != "disabled"
        return settings.PERSIST_TOOL_RESULTS

    # During

    async def kept(
        self, batches: AsyncGenerator[list[Output], None]
    ) -> AsyncGenerator[list[Output], None]:
        """Yield a turn's outputs, each marker as soon as its row is kept."""
        try:
            async with _Pull(batches) as pull:
                while batch := await self._next(pull):
                    if not isinstance(batch[-1], (Finished, Failed)):
                        yield batch
                        continue
                    yield [*batch[:-1], *await self._settled(batch[-1]), batch[-1]]
        finally:
            await self._written(_SETTLE_SECONDS)

    async def _next(self, pull: _Pull) -> list[Output] | None:
        """Return the next batch, or markers if those are ready first."""
        batch = pull.next()
        while not batch.done() and not pull.task.done():
            if marked := self._marked():
                return marked
            waits = {batch, pull.task, self._writing} - {None}
            await asyncio.wait(
                cast("set[asyncio.Future[object]]", waits),
                return_when=asyncio.FIRST_COMPLETED,
            )
        if batch.done():
            return self._taken(pull.take())
        await pull.task  # raises what the generator raised
        return None

    def _taken(self, outputs: list[Output]) -> list[Output]:
        """Collect what outputs ask to keep; add the markers that are ready."""
        for output in outputs:
            match output:
                case Opened(slot, kind, _):
                    self._opened(slot, kind)
                case Closed():
                    self._note_closed(output)
                case Keep(slot, item):
                    self._collect(slot, item)
                case _:
                    pass
        ready = self._marked()
        *most, last = outputs
        return [*most, *ready, last] if ready else outputs

    def _note_closed(self, closed: Closed) -> None:
        """Note what the chat holds; results part an answer into several messages."""
        self._closed[closed.slot] = closed
        call_id = as_text(closed.item.get("call_id"))
        if closed.kind == "card":
            self._cards.add(call_id)
        elif closed.kind == "output":
            self._text_begin = closed.slot + 1
            if call_id not in self._cards:
                self._round_begin = closed.slot + 1

    def _opened(self, slot: int, kind: Kind) -> None:
        self._slots = max(self._slots, slot + 1)
        if kind == "reasoning":
            self._anchors[slot] = []
            for position, item in self._loose:
                self._place(slot, position, item)
            self._loose = []

    def _collect(self, slot: int | None, item: JsonObject) -> None:
        type_ = as_text(item.get("type"))
        if slot is not None and type_ == "message":
            self._note_phase(slot, as_text(item.get("phase")))
        if type_ in ("message", "function_call") or not self._is_allowed(item):
            return
        position = self._slots - 0.5 if slot is None else slot
        if not self._memory.can_keep(item) or not is_replayed(item, in_loop=True):
            return
        if slot in self._anchors:
            self._place(slot, position, item)
        elif near := [s for s in self._anchors if self._round_begin <= s < position]:
            self._place(max(near), position, item)
        else:
            self._loose.append((position, item))

    def _place(self, anchor: int, position: float, item: JsonObject) -> None:
        """Give an item an id and a place; the last of a position counts."""
        turn, id_ = self._turn, str(ULID())
        marker = Marker(id_, as_text(item.get("format")), *self._where(position))
        others = [p for p in self._anchors[anchor] if p.position != position]
        placed = [*others, _Placed(position, marker)]
        self._anchors[anchor] = sorted(placed, key=lambda each: each.position)
        self._fresh.append(
            Artifact(id_, turn.user_id, turn.chat_id, turn.model_id, item)
        )
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())

    def _where(self, position: float) -> tuple[int, str]:
        """Return the text before a position of this round, and the call it follows."""
        before = [
            self._closed[slot]
            for slot in sorted(self._closed)
            if self._text_begin <= slot < position
        ]
        texts = texts_of(before, "message")
        if not self._text_begin:
            texts = [*filter(None, [self._prefix()]), *texts]
        calls = [c.item["call_id"] for c in before if c.kind == "function_call"]
        return len("\n".join(texts)), calls[-1] if calls else ""

    def _prefix(self) -> str:
        """Return the text of an answer that is being continued."""
        last = as_object((as_list(self._turn.body.get("messages")) or [None])[-1])
        return as_text(last.get("content")) if last.get("role") == "assistant" else ""

    def _note_phase(self, slot: int, phase: str) -> None:
        """Write a text's phase to the marker before it, the only place it survives."""
        behind = [
            (placed.position, anchor, placed)
            for anchor, all_ in self._anchors.items()
            for placed in all_
            if placed.position < slot
        ]
        if not phase or not behind:
            return
        _, anchor, placed = max(behind, key=lambda each: each[0])
        # Texts of one round come back as one.
        is_next = self._phased == (placed.marker.id, self._text_begin)
        earlier = placed.marker.phases[:-1] if is_next else placed.marker.phases
        self._phased = (placed.marker.id, self._text_begin)
        placed.marker = placed.marker._replace(phases=(*earlier, phase))
        if placed.is_kept:
            self._due.add(anchor)

    def _marked(self) -> list[Output]:
        """Return the items that get markers, as far as the chat holds them."""
        ready = [slot for slot in sorted(self._due) if slot in self._closed]
        self._due.difference_update(ready)
        return [self._with_markers(self._closed[slot]) for slot in ready]

    def _with_markers(self, closed: Closed) -> Closed:
        kept = [placed for placed in self._anchors[closed.slot] if placed.is_kept]
        details = [write_marker(placed.marker) for placed in kept]
        return closed._replace(item={**closed.item, "reasoning_details": details})

    # Behind

    async def _write(self) -> None:
        """Write what has been collected, and what is while that is written."""
        try:
            while fresh := self._fresh:
                self._fresh = []
                if await self._memory.keep(fresh):
                    self._note_kept({artifact.id for artifact in fresh})
        finally:  # even after a mistake of ours: nobody waits for a task that is over
            self._writing = None

    def _note_kept(self, ids: Collection[str]) -> None:
        for anchor, all_ in self._anchors.items():
            for placed in all_:
                if placed.marker.id in ids:
                    placed.is_kept = True
                    self._due.add(anchor)

    async def _written(self, seconds: float) -> None:
        """Wait for rows that are being written; they are even if we no longer wait."""
        if self._writing is not None:
            await asyncio.wait([self._writing], timeout=seconds)

    async def _settled(self, end: Finished | Failed) -> list[Output]:
        """Return the last markers, once every row is kept, and what went wrong."""
        carried = self._carried(end)
        await self._written(_SETTLE_SECONDS)
        missing = any(not p.is_kept for all_ in self._anchors.values() for p in all_)
        told = self._memory.has_news(self._turn.chat_id) or missing
        notes = [Noted(_NOT_KEPT)] if told and self._anchors else []
        return [*carried, *self._marked(), *notes]

    def _carried(self, end: Finished | Failed) -> list[Output]:
        """Return an item that carries markers of hosted tools, if nothing else can."""
        goes_on = isinstance(end, Finished) and end.reason == "tool_calls"
        carried = [each for each in self._loose if goes_on or is_resumed(each[1])]
        self._loose = []
        if not carried:
            return []
        slot = self._slots
        names = dict.fromkeys(as_text(item.get("type")) for _, item in carried)
        text = f"Used {', '.join(names)}."
        shown: JsonObject = {"id": new_id("rs"), "type": "reasoning", "content": []}
        shown |= {"summary": [{"type": "summary_text", "text": text}], "duration": 0}
        opened = Opened(slot, "reasoning", {**shown, "status": "in_progress"})
        self._closed[slot] = Closed(slot, "reasoning", {**shown, "status": "completed"})
        self._slots, self._anchors[slot] = slot + 1, []
        for position, item in carried:
            self._place(slot, position, item)
        return [opened, self._closed[slot]]


def rounds_so_far(messages: object) -> int:
    """Return how many rounds of tool calls stand behind the last question."""
    rounds = 0
    for message in reversed(as_objects(messages)):
        if message.get("role") not in ("assistant", "tool"):
            break
        rounds += bool(message.get("tool_calls"))
    return rounds


def _sum(old: Any, new: Any) -> Any:
    """Return two values of a usage together; what is no number is the last one's."""
    if isinstance(old, dict) and isinstance(new, dict):
        before, now = cast(JsonObject, old), without_none(cast(JsonObject, new))
        both = {key: _sum(before[key], now[key]) for key in before.keys() & now.keys()}
        return {**cast(JsonObject, new), **before, **now, **both}
    values = cast("tuple[object, object]", (old, new))
    numbers = [n for n in map(as_number, values) if n is not None]
    return sum(numbers) if len(numbers) == 2 else new


_ALIASES = {"input_tokens": "prompt_tokens", "output_tokens": "completion_tokens"}


def summed_usage(
    before: JsonObject | None, now: JsonObject | None
) -> JsonObject | None:
    """Return the usage of two rounds together: numbers add up, the rest is the last's.

    `prompt_tokens` stays that of the last round: Open WebUI reads the length of the
    conversation from it (open-webui.md 4.6).
    """
    if before is None or now is None:
        return now if before is None else before
    total = as_object(_sum(before, now))
    last = {alias: now.get(name) for name, alias in _ALIASES.items()}
    return total | without_none(last)


def shows_results(turn: Turn) -> bool:
    """Say whether results of tools have a place: in chunks for a chat they do not."""
    is_chunks = turn.settings.STREAM_FORMAT == "chunks" and turn.is_streamed
    chunked = {Caller.CHAT: is_chunks, Caller.API: False, Caller.TASK: True}
    return not chunked[turn.caller]


def toolbox(turn: Turn) -> Toolbox:
    """Return the tools of a turn, and who may run them."""
    params = as_object(turn.metadata.get("params"))
    is_chat = turn.caller is Caller.CHAT
    return Toolbox(
        entries={name: as_object(entry) for name, entry in turn.tools.items()},
        runs=turn.settings.TOOL_EXECUTION == "pipe" and shows_results(turn),
        asks=params.get("tool_approval_mode") not in (None, "", "full"),
        can_leave=turn.is_streamed or not is_chat,
        is_client=not is_chat,
        strict=is_chat and turn.settings.ENABLE_STRICT_TOOL_CALLING,
    )


def _listed_tools(turn: Turn, box: Toolbox) -> list[Any]:
    """Return the body's tools; where it says nothing, those that stand beside it."""
    meta = turn.metadata
    is_legacy = as_object(meta.get("params")).get("function_calling") == "legacy"
    if "tools" in turn.body or is_legacy:
        return list(as_list(turn.body.get("tools")))
    hidden = as_list(meta.get("deferred_tools"))
    shown = (entry for name, entry in box.entries.items() if name not in hidden)
    return [{"type": "function", "function": entry.get("spec")} for entry in shown]


def _with_hosted(turn: Turn, card: ModelCard, tools: list[Any]) -> list[Any]:
    """Return tools with those that OpenRouter runs itself."""
    if turn.caller is Caller.CHAT:
        tools = [*tools, *mcp_tools(turn.settings.REMOTE_MCP_SERVERS_JSON)]
    features = as_object(turn.metadata.get("features"))
    reasoning = as_object(reasoning_options(turn.body, card).get("reasoning"))
    effort = as_text(reasoning.get("effort"))
    if refuses_search(card, effort):
        tools = [tool for tool in tools if not is_search(tool)]
    is_asked = features.get("web_search") is True
    search = search_tool(turn.settings, card, effort, is_asked=is_asked)
    return [*without_search(tools), search] if search else tools


def offered_body(turn: Turn, card: ModelCard, box: Toolbox) -> JsonObject:
    """Return the body with the tools that this chat offers to this model."""
    tools = [*_listed_tools(turn, box), *as_list(turn.body.get("extra_tools"))]
    plugins = turn.body.get("plugins")
    if box.asks:  # OpenRouter's own would run without a word
        tools = [tool for tool in tools if as_object(tool).get("type") == "function"]
        plugins = [p for p in as_objects(plugins) if p.get("id") != "web"] or None
    elif turn.caller is not Caller.TASK:
        tools = _with_hosted(turn, card, tools)
    offered = offered_tools(tools, strict=box.strict)
    return {**turn.body, "tools": offered, "plugins": plugins}


_BEYOND_LIMIT = "Error: the limit of tool calls is reached. Answer with what you have."


class Transcript:
    """What a turn has said, called and learnt so far, over all of its rounds."""

    def __init__(
        self, turn: Turn, box: Toolbox, keeper: Keeper, messages: object = ()
    ) -> None:
        self.keeper = keeper
        self.relay = Relay(call_ids(messages))
        self.end: Finished | Failed = Failed(ConnectionLost())
        self.usage: JsonObject | None = None
        self.calls: list[Call] = []
        self.has_asked_again = False
        self._box = box
        self._most = turn.settings.MAX_FUNCTION_CALL_LOOPS
        self._rounds = rounds_so_far(messages) if turn.caller is Caller.CHAT else 0
        self._hides_calls = turn.caller is Caller.API and turn.is_streamed
        self._shows_results = shows_results(turn)
        self._begin_round()

    def _begin_round(self) -> None:
        self.calls = []
        self._kept: dict[int, JsonObject] = {}
        self._unseen: list[JsonObject] = []
        self._items: dict[int, JsonObject] = {}  # function calls, as the chat has them
        self._mended: dict[int, JsonObject] = {}
        self._odd: set[int] = set()  # those not written as one JSON object
        self._results: dict[str, Result] = {}

    @property
    def is_last(self) -> bool:
        """Say whether this round may call no more tools."""
        return self._rounds >= self._most

    @property
    def follows_tools(self) -> bool:
        """Say whether the model is to answer upon results of tools."""
        return self._rounds > 0

    @property
    def has_left_calls(self) -> bool:
        """Say whether somebody else has to make calls before it goes on."""
        return any(call.verdict == "leave" for call in self.calls)

    def new_relay(self) -> Relay:
        """Return a relay for another response of this turn."""
        self.relay = Relay(self.relay.call_ids, self.relay.next_slot)
        return self.relay

    def take(self, outputs: Iterable[Output]) -> tuple[list[Output], list[Call]]:
        """Return what of a round is to be shown, and the calls that are to be run.

        The end of a round is kept back: it may not be the end of the turn.
        """
        shown: list[Output] = []
        started: list[Call] = []
        for output in outputs:
            if isinstance(output, CallTool):
                calls = self._planned(output)
                started += [call for call in calls if call.verdict == "run"]
                shown += self._mended_items(calls)
            else:
                shown += self._noted(output)
        return shown, started

    def _noted(self, output: Output) -> list[Output]:
        """Take note of an output; return what of it is shown."""
        match output:
            case Finished() | Failed():
                self.end = output
                self.usage = summed_usage(self.usage, output.usage)
                return []
            case Keep(None, item):
                self._unseen.append(item)
            case Keep(int(slot), item):
                self._kept[slot] = item
            case Opened(slot, "function_call", item):
                self._items[slot] = item
            case Closed(slot, "function_call", item):
                return self._closed_call(slot, item)
            case _:
                pass
        return [output]

    def _closed_call(self, slot: int, item: JsonObject) -> list[Output]:
        self._items[slot] = item
        if self._hides_calls and self._box.judge(item["name"])[0] != "leave":
            return []  # an API client is told of its own calls alone
        return [Closed(slot, "function_call", self._mended.get(slot, item))]

    def _planned(self, output: CallTool) -> list[Call]:
        slot, call_id, name, text = output
        calls = planned_calls(self._box, slot, call_id, name, text)
        if self.is_last:
            calls = [Call(slot, call_id, name, {}, _BEYOND_LIMIT, "answer")]
        first, *more = calls
        calls = [first, *(replace(c, slot=self.relay.take_slot()) for c in more)]
        self.relay.call_ids.update(call.call_id for call in calls)
        self.calls += calls
        if len(calls) > 1 or not is_object_text(text):
            self._odd |= {cast(int, call.slot) for call in calls}
        return calls

    def _mended_items(self, calls: list[Call]) -> list[Output]:
        """Return the items of calls whose arguments are not as they were written."""
        if len(calls) == 1 and not calls[0].is_mended:
            return []
        return [output for call in calls for output in self._mended_item(call)]

    def _mended_item(self, call: Call) -> list[Output]:
        slot = cast(int, call.slot)
        old = self._items.get(slot)
        item = call_item(call, "completed", old["id"] if old else new_id("fc"))
        self._items[slot] = self._mended[slot] = item
        closed = Closed(slot, "function_call", item)
        return [closed] if old else [Opened(slot, "function_call", item), closed]

    def settle(self, result: Result) -> list[Output]:
        """Return what shows the result of a call."""
        call, slot = result.call, cast(int, result.call.slot)
        self._results[call.call_id] = result
        shown: list[Output] = [Noted(result.note)] if result.note else []
        item = self._items.get(slot, {})
        if result.status != "completed" and item and not self._hides_calls:
            item = {**self._mended.get(slot, item), "status": result.status}
            shown.append(Closed(slot, "function_call", item))
        return [*shown, *whole_output(self.relay.take_slot(), result.shown)]

    def settle_all(self, results: Iterable[Result]) -> list[Output]:
        """Return what shows several results."""
        return [output for result in results for output in self.settle(result)]

    def answers(self) -> list[Result]:
        """Return the results of the calls that nobody makes."""
        return [
            refused(call, call.problem)
            for call in self._unsettled()
            if call.verdict == "answer"
        ]

    def unfinished(self) -> list[Result]:
        """Return results for calls that the model began and never ended.

        Open WebUI would run them, with half of their arguments.
        """
        if not self._shows_results:
            return []
        planned = {call.slot for call in self.calls}
        return [
            interrupted(Call(slot, item["call_id"], item["name"], {}))
            for slot, item in self._items.items()
            if slot not in planned
        ]

    def next_request(self, request: JsonObject) -> JsonObject:
        """Return the request of the next round, and begin it."""
        if not self.calls:  # an empty answer: the same question once more
            self.has_asked_again = True
            self._begin_round()
            return request
        self._rounds += 1
        odd = self._odd & self._mended.keys()
        items = self._kept | {slot: self._mended[slot] for slot in odd}
        sent = [*self._unseen, *(items[slot] for slot in sorted(items))]
        results = [result.item for result in self._results.values()]
        self._begin_round()
        return with_results(request, sent, results, is_last=self.is_last)

    def last(self) -> Output:
        """Return the turn's last output, with the usage of all rounds."""
        end = self.end._replace(usage=self.usage)
        if self.has_left_calls or not self.is_after_calls:
            return end
        said = any(item.get("type") == "message" for item in self._kept.values())
        remark = None if said else ToolLimit()
        return Finished(self.usage, "", "stop", remark)

    @property
    def is_after_calls(self) -> bool:
        """Say whether the round ended well, and with calls."""
        if not isinstance(self.end, Finished) or not self.calls:
            return False
        return self.end.reason == "tool_calls"

    @property
    def is_empty(self) -> bool:
        """Say whether the model had nothing to say upon the results of tools."""
        remark = self.end.remark if isinstance(self.end, Finished) else None
        return self.follows_tools and isinstance(remark, NoAnswer)

    def broken(self, error: PipeError) -> list[Output]:
        """Return the end of a turn that fails by a mistake of ours."""
        shown, _ = self.take(self.relay.fail(error) or [Failed(error)])
        left = [*map(interrupted, self._unsettled()), *self.unfinished()]
        return [*shown, *self.settle_all(left), self.last()]

    def _unsettled(self) -> list[Call]:
        """Return our calls that have no result yet."""
        ours = (call for call in self.calls if call.verdict != "leave")
        return [call for call in ours if call.call_id not in self._results]


async def begun(
    story: Transcript, tools: ToolRunner, outputs: list[Output]
) -> list[Output]:
    """Start the calls that are complete; return what is shown."""
    shown, calls = story.take(outputs)
    for call in calls:
        await tools.start(call)
    return shown


def goes_on(story: Transcript) -> bool:
    """Say whether the model is to speak again in this turn."""
    if story.is_empty:
        return not story.has_asked_again
    may_go_on = story.is_after_calls and not story.is_last
    return may_go_on and not story.has_left_calls


async def chained(
    *parts: AsyncGenerator[list[Output], None],
) -> AsyncGenerator[list[Output], None]:
    """Yield what one part yields after the other."""
    for part in parts:
        async with aclosing(part) as batches:
            async for batch in batches:
                yield batch


async def more_of(answer: Answer, relay: Relay) -> list[Output]:
    """Return the next outputs of a response, none when it has ended."""
    outputs: list[Output] = []
    while not outputs and not relay.finished:
        outputs = _advanced(relay, await answer.read())
    return outputs


def tool_scene(turn: Turn, box: Toolbox, card: ModelCard) -> ToolScene:
    """Return what running a turn's tools needs to know of it."""
    return ToolScene(
        valves=turn.settings,
        entries=box.entries,
        user_id=turn.user_id,
        request=turn.request,
        metadata=turn.metadata,
        messages=as_list(turn.body.get("messages")),
        emitter=turn.emitter,
        reads_images=card.reads("image"),
    )


class Conversation:
    """Lead a turn from the request to its last output."""

    def __init__(self, gateway: Gateway, catalog: Catalog, memory: Memory) -> None:
        self._gateway = gateway
        self._catalog = catalog
        self._guards = ToolGuards()
        self._memory = memory
        self._costs = CostExport()

    async def run(self, turn: Turn) -> AsyncGenerator[list[Output], None]:
        """Yield a turn's outputs as they come; the last is Finished or Failed.

        What the provider needs again is kept beside them.
        """
        keeper = Keeper(turn, self._memory)
        batches = self._answer(turn, keeper)
        async with aclosing(keeper.kept(batches) if turn.is_kept else batches) as all_:
            async for batch in all_:
                if isinstance(batch[-1], (Finished, Failed)):
                    await self._export_costs(turn, batch[-1].usage)
                yield batch

    async def _export_costs(self, turn: Turn, usage: JsonObject | None) -> None:
        if usage and turn.settings.COSTS_REDIS_DUMP:
            facts = {
                "at": int(time.time()),
                "user_id": turn.user_id,
                "chat_id": turn.chat_id,
                "model": turn.model_id,
                "task": turn.task,
                **cost_facts(usage),
            }
            await self._costs.record(turn.settings, facts)

    async def _answer(
        self, turn: Turn, keeper: Keeper
    ) -> AsyncGenerator[list[Output], None]:
        """Yield a turn's outputs.

        Failures become outputs: what was shown before them stays.
        """
        box = toolbox(turn)
        story = Transcript(turn, box, keeper)
        try:
            story = Transcript(turn, box, keeper, turn.body.get("messages"))
            request, notes, card = await self._prepare(turn, box, keeper)
            if notes:
                yield [Noted(note) for note in notes]
            async with ToolRunner(tool_scene(turn, box, card), self._guards) as tools:
                rounds = self._converse(turn, request, story, tools)
                async with aclosing(rounds) as batches:
                    async for batch in batches:
                        yield batch
        except PipeError as error:
            yield story.broken(error)
        except Exception:  # a mistake of ours must not cost the chat its text
            mark = new_id("defect")
            LOG.exception("A turn with %s failed (%s)", turn.model_id, mark)
            yield story.broken(Defect(mark))

    async def _converse(
        self, turn: Turn, request: JsonObject, story: Transcript, tools: ToolRunner
    ) -> AsyncGenerator[list[Output], None]:
        """Yield the rounds of a turn: the model speaks, tools answer, until it is done."""
        if story.is_last and "tools" in request:
            request = with_results(request, (), (), is_last=True)
        while True:
            spoken = self._spoken(turn, request, story, tools)
            async with aclosing(
                chained(spoken, self._answered(story, tools))
            ) as round_:
                async for batch in round_:
                    if batch:
                        yield batch
            if not goes_on(story):
                yield [story.last()]
                return
            request = story.next_request(request)

    async def _spoken(
        self, turn: Turn, request: JsonObject, story: Transcript, tools: ToolRunner
    ) -> AsyncGenerator[list[Output], None]:
        """Yield one response; its calls start the moment they are complete."""
        try:
            answer, outputs = await self._begin(turn, request, story)
            with closing(answer):
                while outputs:
                    yield await self._kept(turn, await begun(story, tools, outputs))
                    outputs = await more_of(answer, story.relay)
        except PipeError as error:
            yield story.take(story.relay.fail(error) or [Failed(error)])[0]

    async def _answered(
        self, story: Transcript, tools: ToolRunner
    ) -> AsyncGenerator[list[Output], None]:
        """Yield the results of a round's calls as they come, until each has one."""
        results = [*story.answers(), *story.unfinished()]
        if isinstance(story.end, Failed):
            results += await tools.interrupt()
        yield story.settle_all(results)
        while results := await tools.next_results():
            yield story.settle_all(results)

    async def complete(self, turn: Turn) -> Completion:
        """Return a turn as a whole."""
        completion = Completion(turn.model_name)
        async with aclosing(self.run(turn)) as batches:
            async for batch in batches:
                for output in batch:
                    completion.add(output)
                    await _emit_beside(turn, output)
        return completion

    async def _prepare(
        self, turn: Turn, box: Toolbox, keeper: Keeper
    ) -> tuple[JsonObject, tuple[str, ...], ModelCard]:
        """Return the request, notes about what it leaves out, and the model."""
        settings = turn.settings
        api_key(settings)  # the reason that needs no network comes first
        card = known_model(await self._catalog.models(settings), turn.model_id)
        recalled = await keeper.recall()
        chat = build_input(turn.body.get("messages"), card, recalled)
        items = bounded_results(chat.items, settings.TOOL_RESULT_MAX_CHARS)
        body = offered_body(turn, card, box)
        request = build_request(
            body, card, chat._replace(items=items), session_id=turn.chat_id
        )
        if turn.task:
            effort = settings.TASK_MODEL_REASONING_EFFORT
            request = build_task_request(request, turn.task, card, effort)
        elif left_out := unsent(turn.body, request):
            LOG.info("Not sent to %s: %s", card.id, ", ".join(left_out))
        return request, chat.notes, card

    async def _begin(
        self, turn: Turn, request: JsonObject, story: Transcript
    ) -> tuple[Answer, list[Output]]:
        """Return an answer that has begun to show, if need be after one repair."""
        request = story.keeper.accepted(request)
        try:
            return await self._begin_as_it_is(turn, request, story)
        except PipeError as error:
            if not is_replay_refusal(error, request):
                raise
            LOG.info("Earlier reasoning was refused: %s", render_error(error))
        await turn.note(_REPAIRED)
        bare = without_reasoning(request)
        begun = await self._begin_as_it_is(turn, bare, story)
        await story.keeper.forget(request)
        return begun

    async def _begin_as_it_is(
        self, turn: Turn, request: JsonObject, story: Transcript
    ) -> tuple[Answer, list[Output]]:
        """Return an answer that has begun to show; nothing was shown before."""

        async def announce(state: RetryCallState) -> None:
            error = _error_of(state)
            wait = seconds_in_words(_pause(state))
            LOG.info("Trying again in %s: %s", wait, render_error(error))
            await turn.note(f"{error.happened} Trying again in {wait} …")

        retrying = AsyncRetrying(
            stop=stop_after_attempt(_ATTEMPTS),
            wait=_pause,
            retry=retry_if_exception(
                lambda error: (
                    _is_worth_another_try(error)
                    and not is_replay_refusal(error, request)
                )
            ),
            before_sleep=announce,
            reraise=True,
        )
        return await retrying(self._attempt, turn, request, story)

    async def _attempt(
        self, turn: Turn, request: JsonObject, story: Transcript
    ) -> tuple[Answer, list[Output]]:
        answer = await self._gateway.open(request, turn.settings)
        try:
            relay = story.new_relay()
            outputs: list[Output] = []
            while not outputs:
                outputs = _advanced(relay, await answer.read())
            if isinstance(outputs[0], Failed):
                raise outputs[0].error
        except BaseException:  # a cancelled turn too leaves no socket behind
            answer.close()
            raise
        return answer, outputs

    async def _kept(self, turn: Turn, outputs: list[Output]) -> list[Output]:
        """Return outputs with a chat's images stored as files of its user."""
        if not any(isinstance(output, Pictured) for output in outputs):
            return outputs
        return [await _with_file(turn, output) for output in outputs]


# endregion


# region 18 Runtime ────────────────────────────────────────────────────────────────────
# What lives as long as the plugin does: built on first use, closed with the last turn.
# Uses: 01 02 07 08 10 17.


class Runtime:
    """The collaborators and background tasks of one plugin instance."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._gateway = Gateway()
        self.catalog = Catalog(self._gateway, self.spawn)
        self._memory = Memory(self.spawn)
        self.conversation = Conversation(self._gateway, self.catalog, self._memory)

    def refresh(self, settings: Settings) -> None:
        """Take note of the settings and of the loop that everything runs on."""
        self._loop = asyncio.get_running_loop()
        if LOG.level != getattr(logging, settings.LOG_LEVEL):  # setting it is dear
            LOG.setLevel(settings.LOG_LEVEL)
        self._memory.refresh(settings)

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
        await self._memory.aclose()
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

    class UserValves(UserSettings):
        """What a user may choose."""

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
        __tools__: JsonObject | None = None,
    ) -> AsyncGenerator[JsonObject, None] | StreamingResponse | JsonObject:
        """Answer one request in the form that its caller reads."""
        turn = Turn.from_webui(
            self.valves.for_user(as_object(__user__).get("valves")),
            body,
            __user__,
            __metadata__,
            __request__,
            __event_emitter__,
            __task__,
            __tools__,
        )
        self._runtime.refresh(self.valves)
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
