"""Load the plugin as Open WebUI does, in this process.

`load` follows the host's loader step by step, but compiles with the plugin's path, so
that tracebacks and coverage point into the file. `load_by_host` calls the loader itself.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import sys
import types
import uuid
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JSON = dict[str, Any]

PLUGIN = (
    Path(__file__).parent.parent
    / "open_webui_openrouter_pipe"
    / "open_webui_openrouter_pipe.py"
)
USER: JSON = {
    "id": "user-1",
    "name": "User",
    "email": "user@example.com",
    "role": "user",
    "settings": {},
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """One load of a function: its module, its instance, what its head says."""

    id: str
    module: types.ModuleType
    pipe: Any
    frontmatter: dict[str, str]

    def set_valves(self, stored: Mapping[str, Any] | None = None) -> None:
        """Reassign the valves as the host does before every call."""
        valves = {k: v for k, v in (stored or {}).items() if v is not None}
        self.pipe.valves = self.module.Pipe.Valves(**valves)

    async def models(self, stored: Mapping[str, Any] | None = None) -> list[JSON]:
        """List the models under the ids and names that the host gives them."""
        self.set_valves(stored)
        prefix = getattr(self.pipe, "name", "")
        listed = self.pipe.pipes()
        if inspect.isawaitable(listed):
            listed = await listed
        return [
            {"id": f"{self.id}.{each['id']}", "name": f"{prefix}{each['name']}"}
            for each in listed
        ]

    async def call(
        self,
        body: JSON,
        *,
        valves: Mapping[str, Any] | None = None,
        user: Mapping[str, Any] | None = None,
        user_valves: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        **reserved: Any,
    ) -> Any:
        """Call the pipe with what the host would pass, and return what it returns.

        Other keywords are the host's reserved parameters: `__tools__`, `__task__`...
        """
        self.set_valves(valves)
        facts = dict(metadata or {})
        person = {**USER, **(user or {})}
        if hasattr(self.pipe, "UserValves"):
            person["valves"] = self.pipe.UserValves(**(user_valves or {}))
        offered = {
            "__event_emitter__": None,
            "__event_call__": None,
            "__chat_id__": facts.get("chat_id"),
            "__session_id__": facts.get("session_id"),
            "__message_id__": facts.get("message_id"),
            "__task__": None,
            "__task_body__": None,
            "__files__": facts.get("files") or [],
            "__user__": person,
            "__metadata__": facts,
            "__oauth_token__": None,
            "__request__": None,
            "__tools__": {},
            **reserved,
        }
        wanted = inspect.signature(self.pipe.pipe).parameters
        known = {name: value for name, value in offered.items() if name in wanted}
        answer = self.pipe.pipe(body=body, **known)
        return await answer if inspect.isawaitable(answer) else answer

    async def stream(self, body: JSON, **options: Any) -> list[Any]:
        """Call the pipe with `stream` on, and return everything it yields."""
        answer = await self.call({**body, "stream": True}, **options)
        return [each async for each in pieces(answer)]

    def unload(self) -> None:
        """Forget the module, as when the function is deleted and the worker restarts."""
        for name, module in list(sys.modules.items()):
            if module is self.module:
                del sys.modules[name]


def load(
    function_id: str = "openrouter", source: str | None = None, *, publish: bool = True
) -> Loaded:
    """Load a function as the host's `load_function_module_by_id` does.

    `publish` registers it for use afterwards, as a save in the editor does.
    """
    host = _loader()
    path = "<string>" if source is not None else str(PLUGIN)
    text = host.replace_imports(
        source if source is not None else PLUGIN.read_text("utf-8")
    )
    module = types.ModuleType(f"function_{function_id}_{uuid.uuid4().hex}")
    sys.modules[module.__name__] = module
    try:
        module.__dict__["__file__"] = "/a/file/that/is/gone"
        exec(compile(text, path, "exec"), module.__dict__)
        pipe = module.Pipe()
    finally:
        sys.modules.pop(module.__name__, None)
    loaded = Loaded(function_id, module, pipe, host.extract_frontmatter(text))
    if publish:
        _publish(loaded)
    return loaded


def load_on_a_thread(function_id: str = "openrouter") -> Loaded:
    """Load on a thread that has no event loop, as newer loaders do."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(load, function_id).result()


async def load_by_host(
    function_id: str = "openrouter", source: str | None = None
) -> Loaded:
    """Load by the host's own code, a bare `exec` of the text."""
    text = source if source is not None else PLUGIN.read_text("utf-8")
    pipe, kind, frontmatter, module = await _loader().load_function_module_by_id(
        function_id, text
    )
    if kind != "pipe":
        raise TypeError(f"loaded as a {kind}")
    loaded = Loaded(function_id, module, pipe, frontmatter)
    _publish(loaded)
    return loaded


async def pieces(answer: Any) -> AsyncGenerator[Any]:
    """Yield what the host reads from an answer: a generator's, a response's, or one."""
    answer = getattr(answer, "body_iterator", answer)
    if not hasattr(answer, "__aiter__"):
        yield answer
        return
    async for each in answer:
        yield each


def pending_tasks() -> set[asyncio.Task[Any]]:
    """Return the tasks of the running loop but the caller's."""
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


def _publish(loaded: Loaded) -> None:
    """Register the module under both names; the one before loses its own."""
    app = types.SimpleNamespace(state=types.SimpleNamespace())
    _loader().set_function_module_in_cache(
        types.SimpleNamespace(app=app), loaded.id, "", loaded.pipe, loaded.module
    )


def _loader() -> Any:
    """Return the host's plugin module; its import reads settings, so it comes late."""
    return importlib.import_module("open_webui.utils.plugin")
