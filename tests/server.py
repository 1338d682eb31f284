"""A real Open WebUI server, and the people who use it.

with OpenWebUI() as webui:
    webui.admin.install_function("echo", source)
    first = webui.admin.chat("echo", "Hello")
    second = webui.admin.chat("echo", "And again", after=first)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil
import socketio

JSON = dict[str, Any]

# The smallest Open WebUI: no local models, no vectors, no calls to the internet.
SLIM = {
    "USE_SLIM_DOCKER": "true",
    "OFFLINE_MODE": "true",
    "RAG_EMBEDDING_ENGINE": "openai",
    "BYPASS_EMBEDDING_AND_RETRIEVAL": "true",
    "ENABLE_OLLAMA_API": "false",
    "ENABLE_OPENAI_API": "false",
    "ENABLE_VERSION_UPDATE_CHECK": "false",
    "WEBUI_SECRET_KEY": "a secret for tests only, 32 bytes",
    "NO_PROXY": "127.0.0.1,localhost",
}
ADMIN = {"name": "Admin", "email": "admin@example.com", "password": "admin-password"}
EVERYBODY = [{"principal_type": "user", "principal_id": "*", "permission": "read"}]
START_SECONDS = 120


class StartFailed(Exception):
    """The server did not become healthy."""


class Refused(Exception):
    """The server answered with an HTTP error."""

    def __init__(self, status: int, detail: object) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.detail = detail


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def new_id() -> str:
    """Return a fresh message or chat id, as the browser makes them."""
    return str(uuid.uuid4())


def cluster_env(database_url: str, redis_url: str, workers: int = 3) -> dict[str, str]:
    """Return the settings of several workers that share PostgreSQL and a Redis."""
    return {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "WEBSOCKET_MANAGER": "redis",
        "WEBSOCKET_REDIS_URL": redis_url,
        "UVICORN_WORKERS": str(workers),
    }


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a server's processes use at one moment, its workers included."""

    cpu_seconds: float
    rss_bytes: int
    sockets: int
    threads: int
    files: int


@dataclass(frozen=True, slots=True)
class Started:
    """A chat turn on its way."""

    chat_id: str
    message_id: str
    user_message_id: str
    model: str
    session_id: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A finished turn, as Open WebUI stored it."""

    id: str
    message_id: str
    user_message_id: str
    message: JSON
    messages: dict[str, JSON] = field(repr=False)
    title: str = ""

    @property
    def text(self) -> str:
        """Return the text that is shown, copied and exported."""
        parts = [
            part.get("text", "")
            for item in self.items("message")
            for part in item.get("content", [])
        ]
        return self.message.get("content") or "".join(parts)

    @property
    def output(self) -> list[JSON]:
        """Return the Responses items of the answer."""
        return self.message.get("output") or []

    @property
    def usage(self) -> JSON:
        """Return tokens and cost as shown."""
        return self.message.get("usage") or {}

    @property
    def error(self) -> Any:
        """Return what the error card says, or None."""
        error = self.message.get("error")
        return error.get("content", error) if isinstance(error, dict) else error

    @property
    def card(self) -> str:
        """Return the words on the error card, or nothing."""
        error = self.error or ""
        if isinstance(error, dict):
            error = error.get("message") or error.get("detail") or json.dumps(error)
        return str(error)

    @property
    def sources(self) -> list[JSON]:
        """Return the citations."""
        return self.message.get("sources") or []

    @property
    def files(self) -> list[JSON]:
        """Return the files and images of the answer."""
        return self.message.get("files") or []

    @property
    def statuses(self) -> list[str]:
        """Return the status lines in the order in which they appeared."""
        history = self.message.get("statusHistory") or []
        return [status.get("description", "") for status in history]

    def items(self, kind: str) -> list[JSON]:
        """Return the output items of one type."""
        return [item for item in self.output if item.get("type") == kind]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a plain API client received."""

    status: int
    body: Any
    lines: list[tuple[float, str]]

    @property
    def chunks(self) -> list[JSON]:
        """Return the JSON of each `data:` line, in order."""
        data = [line[5:].strip() for _, line in self.lines if line.startswith("data:")]
        return [json.loads(each) for each in data if each != "[DONE]"]

    @property
    def text(self) -> str:
        """Return the answer's text, streamed or not."""
        if not self.lines:
            return self.body["choices"][0]["message"]["content"]
        choices = [choice for chunk in self.chunks for choice in chunk["choices"]]
        return "".join(choice["delta"].get("content") or "" for choice in choices)


@dataclass(frozen=True, slots=True)
class Seen:
    """One event that reached the browser, and when by the monotonic clock."""

    at: float
    chat_id: str | None
    message_id: str | None
    type: str
    data: Any

    @property
    def kind(self) -> str:
        """Return the Responses type inside a completion event, else the event's own."""
        inner = self.data.get("type") if isinstance(self.data, dict) else None
        return inner if self.type == "response:completion" and inner else self.type


class Listener:
    """Be a browser tab: record every event, and answer what the server asks.

    `answers` maps the type of an event call (`confirmation`, `input`, `execute`...) to
    the answer, or to a function from the call's data to the answer.
    """

    def __init__(self, url: str, token: str) -> None:
        self.events: list[Seen] = []
        self.answers: dict[str, Any] = {}
        self.sid = ""
        self._url = url
        self._token = token
        self._news = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._client = socketio.AsyncClient(reconnection=False)
        self._client.on("events", self._receive)

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._join())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._run(self._client.disconnect())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def of(self, chat: Started | Chat | None = None, kind: str = "") -> list[Seen]:
        """Return what was seen so far, of one turn or one kind (a prefix) if given."""
        return [
            seen
            for seen in list(self.events)
            if (chat is None or seen.message_id == chat.message_id)
            and seen.kind.startswith(kind)
        ]

    def wait(
        self, wanted: Callable[[Seen], bool] | str, timeout_seconds: float = 30
    ) -> Seen:
        """Return the first event that is wanted (a predicate, or a kind's prefix)."""
        matches = (
            (lambda seen: seen.kind.startswith(wanted))
            if isinstance(wanted, str)
            else wanted
        )
        found: list[Seen] = []

        def has_come() -> bool:
            found.extend(seen for seen in self.events if matches(seen))
            return bool(found)

        with self._news:
            if not self._news.wait_for(has_come, timeout_seconds):
                kinds = [seen.kind for seen in self.events]
                raise TimeoutError(f"not among the {len(kinds)} events seen: {kinds}")
        return found[0]

    def clear(self) -> None:
        """Forget what was seen."""
        with self._news:
            self.events.clear()

    async def _join(self) -> None:
        auth = {"token": self._token}
        await self._client.connect(
            self._url,
            auth=auth,
            socketio_path="/ws/socket.io",
            transports=["websocket"],
        )
        await self._client.call("user-join", {"auth": auth})
        self.sid = self._client.get_sid() or ""

    async def _receive(self, event: JSON) -> Any:
        at = time.monotonic()
        body = event.get("data") or {}
        seen = Seen(
            at,
            event.get("chat_id"),
            event.get("message_id"),
            body.get("type", ""),
            body.get("data"),
        )
        with self._news:
            self.events.append(seen)
            self._news.notify_all()
        answer = self.answers.get(seen.type)
        if not callable(answer):
            return answer
        return await asyncio.to_thread(answer, seen.data)

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)


class Account:
    """Somebody who is signed in, and what they can do over HTTP."""

    def __init__(self, url: str, token: str, info: JSON) -> None:
        self.url = url
        self.token = token
        self.id: str = info["id"]
        self.info = info
        self.http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=60,
            trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=50),
        )

    def close(self) -> None:
        """Drop the connections."""
        self.http.close()

    def call(self, method: str, path: str, body: Any = None, **params: Any) -> Any:
        """Send one request and return its JSON; an HTTP error raises `Refused`."""
        reply = self.http.request(method, path, json=body, params=params or None)
        return _read(reply)

    def dismiss_news(self) -> None:
        """Keep the "what is new" dialog away, as after closing it."""
        body = {"ui": {"showChangelog": False}}
        self.call("POST", "/api/v1/users/user/settings/update", body)

    # Functions and valves (an admin's) ------------------------------------------------
    # The admin page fetches the models after each change, and so do we: the server
    # routes chats by the list that it made last.

    def install_function(self, id: str, source: str, name: str = "") -> None:
        """Paste a function into the admin page and switch it on."""
        self.call("POST", "/api/v1/functions/create", _function(id, source, name))
        self.toggle_function(id)

    def toggle_function(self, id: str) -> None:
        """Switch a function on, or off again."""
        self.call("POST", f"/api/v1/functions/id/{id}/toggle")
        self.models()

    def update_function(self, id: str, source: str, name: str = "") -> None:
        """Save another source in the admin's editor."""
        body = _function(id, source, name)
        self.call("POST", f"/api/v1/functions/id/{id}/update", body)
        self.models()

    def delete_function(self, id: str) -> None:
        """Remove a function."""
        self.call("DELETE", f"/api/v1/functions/id/{id}/delete")
        self.models()

    def functions(self) -> dict[str, JSON]:
        """Return the installed functions by their ids."""
        return {each["id"]: each for each in self.call("GET", "/api/v1/functions/")}

    def set_valves(self, id: str, valves: Mapping[str, Any]) -> JSON:
        """Save a function's valves; what is not named goes back to its default."""
        path = f"/api/v1/functions/id/{id}/valves/update"
        saved = self.call("POST", path, dict(valves))
        self.models()
        return saved

    def get_valves(self, id: str) -> JSON:
        """Return the valves that are saved."""
        return self.call("GET", f"/api/v1/functions/id/{id}/valves") or {}

    def valves_spec(self, id: str) -> JSON:
        """Return the schema from which the admin page draws the valves."""
        return self.call("GET", f"/api/v1/functions/id/{id}/valves/spec")

    def set_user_valves(self, id: str, valves: Mapping[str, Any]) -> JSON:
        """Save this person's own valves of a function."""
        path = f"/api/v1/functions/id/{id}/valves/user/update"
        return self.call("POST", path, dict(valves))

    def user_valves_spec(self, id: str) -> JSON:
        """Return the schema from which a user's page draws the valves."""
        return self.call("GET", f"/api/v1/functions/id/{id}/valves/user/spec")

    # Models ---------------------------------------------------------------------------

    def models(self, refresh: bool = False) -> dict[str, JSON]:
        """Return the models this person sees, by their ids."""
        params = {"refresh": "true"} if refresh else {}
        data = self.call("GET", "/api/models", **params)["data"]
        return {model["id"]: model for model in data}

    def share_model(self, id: str, grants: list[JSON] | None = None) -> None:
        """Let everybody (or who is granted) use a model."""
        name = self.models()[id]["name"]  # a new row would show the id instead
        body = {"id": id, "name": name, "access_grants": grants or EVERYBODY}
        self.call("POST", "/api/v1/models/model/access/update", body)

    def save_model(self, id: str, **fields: Any) -> JSON:
        """Make or change a model's row: `name`, `meta`, `params`, `base_model_id`."""
        row = {"id": id, "name": id, "meta": {}, "params": {}, "is_active": True}
        row |= {"base_model_id": None} | fields
        try:
            return self.call("POST", "/api/v1/models/model/update", row, id=id)
        except Refused:
            return self.call("POST", "/api/v1/models/create", row)

    # Files ----------------------------------------------------------------------------

    def upload(self, name: str, content: bytes, mime: str) -> JSON:
        """Upload a file and return it as the browser attaches it to a message."""
        reply = self.http.post(
            "/api/v1/files/",
            params={"process": "false"},
            files={"file": (name, content, mime)},
        )
        row = _read(reply)
        return {
            "type": "file",
            "id": row["id"],
            "url": row["id"],
            "name": name,
            "size": len(content),
            "status": "uploaded",
            "content_type": mime,
            "file": row,
        }

    def download(self, url: str) -> bytes:
        """Return the bytes behind a URL of this server."""
        reply = self.http.get(url)
        if reply.is_error:
            raise Refused(reply.status_code, reply.text)
        return reply.content

    # Chats ----------------------------------------------------------------------------

    def chat(
        self, model: str, text: str, *, timeout_seconds: float = 60, **options: Any
    ) -> Chat:
        """Send a message, wait for the answer, and read it back.

        The options are those of `start_chat`.
        """
        if options.pop("temporary", False):
            return self._temporary_chat(model, text, timeout_seconds, **options)
        started = self.start_chat(model, text, **options)
        return self.wait_chat(started, timeout_seconds)

    def chats_at_once(
        self, model: str, texts: Iterable[str], **options: Any
    ) -> dict[str, Chat]:
        """Send each message in a new chat, all before the first is answered.

        A chat that does not end is stopped, and returned as it is.
        """
        started = {text: self.start_chat(model, text, **options) for text in texts}
        deadline = time.monotonic() + 60
        for each in started.values():
            try:
                self.wait_chat(each, max(1, deadline - time.monotonic()))
            except TimeoutError:
                self.stop_chat(each)
                self.wait_chat(each)
        return {
            text: self.read_chat(each.chat_id, each.message_id)
            for text, each in started.items()
        }

    def start_chat(
        self,
        model: str,
        text: str,
        *,
        after: Chat | None = None,
        chat_id: str | None = None,
        parent_id: str | None = None,
        session_id: str = "",
        files: list[JSON] | None = None,
        background_tasks: JSON | None = None,
        **body: Any,
    ) -> Started:
        """Send a message as the browser does; other keywords go into the body.

        `after` continues a chat; without it, or `chat_id` and `parent_id`, a new chat
        begins. Pass a listener's `sid` as `session_id` to answer the server's calls.
        """
        if after is not None:
            chat_id, parent_id = after.id, after.message_id
        question: JSON = {
            "id": new_id(),
            "parentId": parent_id,
            "role": "user",
            "content": text,
            "models": [model],
        }
        if files:
            question["files"] = files
            body.setdefault("files", files)
        return self._start(
            model, question, chat_id, session_id, background_tasks, **body
        )

    def regenerate(
        self, chat: Chat, model: str = "", *, timeout_seconds: float = 60, **body: Any
    ) -> Chat:
        """Ask for another answer to the same question."""
        question = chat.messages[chat.user_message_id]
        started = self._start(model or chat.message["model"], question, chat.id, **body)
        return self.wait_chat(started, timeout_seconds)

    def continue_answer(
        self, chat: Chat, *, timeout_seconds: float = 60, **body: Any
    ) -> Chat:
        """Ask the model to go on with the same answer."""
        question = chat.messages[chat.user_message_id]
        started = self._start(
            chat.message["model"],
            question,
            chat.id,
            message_id=chat.message_id,
            assistant_message_id=chat.message_id,
            **body,
        )
        return self.wait_chat(started, timeout_seconds)

    def edit_message(self, chat: Chat, message_id: str, content: str) -> Chat:
        """Change a message's text with the pencil: the page saves the whole history."""
        row = self.call("GET", f"/api/v1/chats/{chat.id}")
        message = row["chat"]["history"]["messages"][message_id]
        message["content"] = content
        for item in message.get("output") or []:
            if item["type"] == "message":
                item["content"] = [{**item["content"][0], "text": content}]
        history = {"history": row["chat"]["history"]}
        self.call("POST", f"/api/v1/chats/{chat.id}", {"chat": history})
        return self.read_chat(chat.id, chat.message_id)

    def stop_chat(self, chat: Started) -> None:
        """Press Stop."""
        self.call("POST", f"/api/tasks/chat/{chat.chat_id}/stop")

    def is_running(self, chat_id: str) -> bool:
        """Say whether a chat still has tasks."""
        return bool(self.call("GET", f"/api/tasks/chat/{chat_id}")["task_ids"])

    def wait_chat(self, started: Started, timeout_seconds: float = 60) -> Chat:
        """Wait until the turn ends, and read it back."""
        deadline = time.monotonic() + timeout_seconds
        pause = 0.02
        while self.is_running(started.chat_id):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the chat runs after {timeout_seconds} seconds")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.25)
        return self.read_chat(started.chat_id, started.message_id)

    def read_chat(self, chat_id: str, message_id: str = "") -> Chat:
        """Read a chat as after a reload; the last answer unless another is named."""
        row = self.call("GET", f"/api/v1/chats/{chat_id}")
        history = row["chat"]["history"]
        message_id = message_id or history["currentId"]
        message = history["messages"][message_id]
        return Chat(
            chat_id,
            message_id,
            message.get("parentId") or "",
            message,
            history["messages"],
            row.get("title", ""),
        )

    def api_chat(
        self,
        model: str,
        messages: list[JSON] | str,
        *,
        stream: bool = False,
        path: str = "/api/v1/chat/completions",
        **body: Any,
    ) -> Answer:
        """Chat as an API client: no chat id, no session; other keywords go along."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        body = {"model": model, "messages": messages, "stream": stream, **body}
        with self.http.stream("POST", path, json=body) as reply:
            if not reply.headers.get("content-type", "").startswith("text/event"):
                raw = reply.read()
                content = json.loads(raw) if raw else None
                return Answer(reply.status_code, content, [])
            lines = [(time.monotonic(), line) for line in reply.iter_lines() if line]
            return Answer(reply.status_code, None, lines)

    def listen(self) -> Listener:
        """Open a browser tab (a context manager)."""
        return Listener(self.url, self.token)

    def _start(
        self,
        model: str,
        question: JSON,
        chat_id: str | None,
        session_id: str = "",
        background_tasks: JSON | None = None,
        *,
        message_id: str = "",
        **body: Any,
    ) -> Started:
        message_id = message_id or new_id()
        session_id = session_id or f"test-{new_id()}"
        request: JSON = {
            "model": model,
            "stream": True,
            "session_id": session_id,
            "id": message_id,
            "parent_id": question["parentId"],
            "user_message": question,
            "messages": [],
            "background_tasks": background_tasks or {},
            **body,
        }
        if chat_id:
            request["chat_id"] = chat_id
        reply = self.call("POST", "/api/chat/completions", request)
        if not isinstance(reply, dict) or not reply.get("status"):
            raise Refused(200, reply)
        return Started(reply["chat_id"], message_id, question["id"], model, session_id)

    def _temporary_chat(
        self,
        model: str,
        text: str,
        timeout_seconds: float,
        *,
        after: Chat | None = None,
        listener: Listener | None = None,
        **body: Any,
    ) -> Chat:
        """Chat without a trace: the history travels with us, the answer in events."""
        with contextlib.ExitStack() as stack:
            tab = listener or stack.enter_context(self.listen())
            history = dict(after.messages) if after else {}
            started = self._start(
                model,
                {
                    "id": new_id(),
                    "parentId": after.message_id if after else None,
                    "role": "user",
                    "content": text,
                },
                after.id if after else f"temporary:{tab.sid}",
                tab.sid,
                messages=[
                    {
                        key: message[key]
                        for key in ("role", "content", "output", "model")
                        if key in message
                    }
                    for message in history.values()
                ]
                + [{"role": "user", "content": text}],
                **body,
            )
            tab.wait(lambda seen: _ends(seen, started), timeout_seconds)
            message: JSON = {"role": "assistant", "model": model, "content": ""}
            for seen in tab.of(started, "chat:completion"):
                message |= seen.data
        message["id"] = started.message_id
        history[started.user_message_id] = {"role": "user", "content": text}
        history[started.message_id] = message
        return Chat(
            started.chat_id,
            started.message_id,
            started.user_message_id,
            message,
            history,
        )


class OpenWebUI:
    """A real server in a process group of its own (a context manager).

    `env` overrides any setting: DATABASE_URL, REDIS_URL, UVICORN_WORKERS...
    `data_dir` keeps its data; without it they live in a temporary folder.
    """

    def __init__(
        self,
        env: Mapping[str, str] | None = None,
        *,
        port: int = 0,
        data_dir: Path | None = None,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start_seconds = 0.0
        self._own = None if data_dir else tempfile.mkdtemp(prefix="open-webui-")
        self.data_dir = data_dir or Path(self._own or "")
        self.log_path = self.data_dir / "server.log"
        self._env = {
            **os.environ,
            **SLIM,
            "DATA_DIR": str(self.data_dir / "data"),
            "STATIC_DIR": str(self.data_dir / "static"),
            **(env or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._accounts: list[Account] = []
        self._admin: Account | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        if self._own:
            shutil.rmtree(self._own, ignore_errors=True)

    # The process ----------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """Return the id of the server's first process."""
        if self._process is None:
            raise StartFailed("the server is not running")
        return self._process.pid

    def start(self) -> None:
        """Start the server and wait until it is healthy."""
        for folder in ("data", "static"):
            (self.data_dir / folder).mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        command = [Path(sys.executable).with_name("open-webui"), "serve"]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                cwd=self.data_dir,
                start_new_session=True,
            )
        try:
            self._wait_healthy()
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - began

    def stop(self, grace_seconds: float = 15) -> None:
        """End the server and all its workers; the data stay."""
        for account in self._accounts:
            account.close()
        self._accounts.clear()
        self._admin = None
        if self._process is None:
            return
        process, self._process = self._process, None
        processes = _family(process.pid) if process.poll() is None else []
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)  # the first of a session names its group
            psutil.wait_procs(processes, grace_seconds)
        process.wait()

    def restart(self) -> None:
        """Stop and start again on the same data."""
        self.stop()
        self.start()

    def log(self) -> str:
        """Return everything that the server has logged."""
        return self.log_path.read_text("utf-8", "replace")

    def log_tail(self, lines: int = 40) -> str:
        """Return the end of the log."""
        return "\n".join(self.log().splitlines()[-lines:])

    def footprint(self) -> Footprint:
        """Return what the server uses now, its workers included."""
        figures = [_measure(process) for process in self.processes()]
        return Footprint(*(sum(column) for column in zip(*figures, strict=True)))

    def connections_to(self, port: int) -> int:
        """Return how many TCP connections are open to a port, say the simulator's."""
        return sum(
            connection.raddr.port == port and connection.status == "ESTABLISHED"
            for process in self.processes()
            for connection in process.net_connections("tcp")
            if connection.raddr
        )

    def processes(self) -> list[psutil.Process]:
        """Return the server's processes, the first one first."""
        return _family(self.pid)

    def _wait_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self._process is not None and self._process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                health = httpx.get(f"{self.url}/health", timeout=5, trust_env=False)
                if health.is_success:
                    return
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        raise StartFailed(f"Open WebUI did not start; its log ends:\n{self.log_tail()}")

    # Its people -----------------------------------------------------------------------

    @property
    def admin(self) -> Account:
        """Return the first admin, signed up at the first use."""
        if self._admin is None:
            try:
                self._admin = self.sign_up(**ADMIN)
            except Refused:
                self._admin = self.sign_in(ADMIN["email"], ADMIN["password"])
        return self._admin

    def sign_up(self, name: str, email: str, password: str) -> Account:
        """Sign up; the first to do so is the admin, and the last, by default."""
        body = {"name": name, "email": email, "password": password}
        return self._enter("signup", body)

    def sign_in(self, email: str, password: str) -> Account:
        """Sign in."""
        return self._enter("signin", {"email": email, "password": password})

    def add_user(self, name: str = "", role: str = "user") -> Account:
        """Add a person and sign them in."""
        name = name or f"user-{new_id()[:8]}"
        email, password = f"{name.lower()}@example.com", "user-password"
        body = {"name": name, "email": email, "password": password, "role": role}
        self.admin.call("POST", "/api/v1/auths/add", body)
        return self.sign_in(email, password)

    def _enter(self, door: str, body: JSON) -> Account:
        with httpx.Client(base_url=self.url, timeout=30, trust_env=False) as http:
            info = _read(http.post(f"/api/v1/auths/{door}", json=body))
        account = Account(self.url, info["token"], info)
        self._accounts.append(account)
        return account


def _read(reply: httpx.Response) -> Any:
    """Return a reply's JSON, or raise what the server said against it."""
    try:
        body = reply.json()
    except ValueError:
        body = reply.text
    if reply.is_error:
        detail = body.get("detail", body) if isinstance(body, dict) else body
        raise Refused(reply.status_code, detail)
    return body


def _function(id: str, source: str, name: str) -> JSON:
    """Return the form that the admin's editor sends."""
    return {
        "id": id,
        "name": name or id,
        "content": source,
        "meta": {"description": name or id},
    }


def _family(pid: int) -> list[psutil.Process]:
    """Return a process and all that it started."""
    first = psutil.Process(pid)
    return [first, *first.children(recursive=True)]


def _measure(process: psutil.Process) -> tuple[float, int, int, int, int]:
    """Return one process' figures in the order of `Footprint`."""
    with process.oneshot():
        cpu = process.cpu_times()
        return (
            cpu.user + cpu.system,
            process.memory_info().rss,
            len(process.net_connections("inet")),
            process.num_threads(),
            process.num_fds(),
        )


def _ends(seen: Seen, started: Started) -> bool:
    """Say whether an event is the last of a turn."""
    return (
        seen.message_id == started.message_id
        and seen.type == "chat:completion"
        and bool(seen.data.get("done"))
    )
