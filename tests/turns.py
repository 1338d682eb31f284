"""One turn of the pipe, called as Open WebUI calls it, and what a reader sees of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

from open_webui_openrouter_pipe import open_webui_openrouter_pipe as plugin
from tests.simulator import Entry, Simulator, replies
from tests.simulator.replies import AnyReply, HttpReply
from tests.simulator.scene import terminal_of
from tests.webui import pieces

JSON = dict[str, Any]

MODEL = "openai/gpt-4o"
USER: JSON = {"id": "user-1", "name": "User", "email": "user@example.com"}
CHAT: JSON = {"chat_id": "chat-1", "message_id": "message-1"}


@asynccontextmanager
async def opened(
    simulator: Simulator | None = None, **valves: Any
) -> AsyncGenerator[plugin.Pipe]:
    """Give a pipe that speaks to a simulator, and close its runtime at the end."""
    pipe = plugin.Pipe()
    if simulator is not None:
        address = {"BASE_URL": simulator.base_url, "API_KEY": simulator.api_key}
        valves = address | valves
    pipe.valves = pipe.Valves(**valves)
    try:
        yield pipe
    finally:
        await pipe._runtime.aclose()


def body(text: str = "Hi", model: str = MODEL, **more: Any) -> JSON:
    """Build what Open WebUI hands over for one user message."""
    messages = [{"role": "user", "content": text}]
    return {"model": f"pipe.{model}", "messages": messages, "stream": True, **more}


@dataclass
class Shown:
    """Everything that a turn yielded, and what it emitted beside."""

    events: list[JSON] = field(default_factory=list)
    emitted: list[JSON] = field(default_factory=list)

    # In a chat

    @property
    def output(self) -> list[JSON]:
        """Return the items that the chat holds: Open WebUI's own code reads them."""
        output: list[JSON] = []
        for event in self.events:
            if str(event.get("type", "")).startswith("response."):
                output, _ = _host()(event, output)
        return output

    def items(self, type_: str) -> list[JSON]:
        """Return the chat's items of a type."""
        return [item for item in self.output if item["type"] == type_]

    @property
    def text(self) -> str:
        """Return the visible text of the chat."""
        parts = (part for m in self.items("message") for part in m["content"])
        return "".join(part["text"] for part in parts)

    @property
    def streamed(self) -> str:
        """Return the text that came in deltas."""
        return "".join(self.deltas("output_text"))

    def deltas(self, what: str) -> list[str]:
        """Return the deltas of `output_text`, `function_call_arguments` ..."""
        wanted = f"response.{what}.delta"
        return [e["delta"] for e in self.events if e.get("type") == wanted]

    @property
    def thoughts(self) -> str:
        """Return the visible reasoning of the chat."""
        parts = (part for r in self.items("reasoning") for part in r["summary"])
        return "".join(part["text"] for part in parts)

    @property
    def cards(self) -> list[str]:
        """Return the texts of the error cards."""
        failed = (e for e in self.events if e.get("type") == "response.failed")
        return [event["response"]["error"]["message"] for event in failed]

    @property
    def usages(self) -> list[JSON]:
        """Return every usage that the host would count."""
        found = (
            event.get("usage") or (event.get("response") or {}).get("usage")
            for event in self.events
        )
        return [usage for usage in found if usage]

    @property
    def sources(self) -> list[str]:
        """Return the addresses of the sources below the answer."""
        beside = (e["event"] for e in self.events if "event" in e)
        shown = [e for e in [*beside, *self.emitted] if e["type"] == "source"]
        return [event["data"]["source"]["url"] for event in shown]

    @property
    def lines(self) -> list[str]:
        """Return the status lines above the answer."""
        beside = (e["event"] for e in self.events if "event" in e)
        shown = [e for e in [*beside, *self.emitted] if e["type"] == "status"]
        return [event["data"]["description"] for event in shown]

    # In chunks

    def chunked(self, key: str) -> list[Any]:
        """Return what the chunks' deltas say under a key."""
        choices = (choice for e in self.events for choice in e.get("choices", ()))
        return [c["delta"][key] for c in choices if c["delta"].get(key)]

    @property
    def finishes(self) -> list[str]:
        """Return the reasons that chunks give for the end."""
        choices = (choice for e in self.events for choice in e.get("choices", ()))
        return [c["finish_reason"] for c in choices if c.get("finish_reason")]

    @property
    def errors(self) -> list[JSON]:
        """Return the errors among the chunks."""
        return [event["error"] for event in self.events if "error" in event]

    @property
    def images(self) -> list[str]:
        """Return the addresses of the images."""
        return [
            one["image_url"]["url"] for run in self.chunked("images") for one in run
        ]


@cache
def _host() -> Any:
    """Return Open WebUI's reader of events; its import is slow and comes late."""
    from open_webui.utils.response import handle_responses_streaming_event

    return handle_responses_streaming_event


async def answer(
    pipe: plugin.Pipe,
    asked: JSON | None = None,
    *,
    metadata: Mapping[str, Any] = CHAT,
    shown: Shown | None = None,
    task: str | None = None,
    **more: Any,
) -> Any:
    """Call a pipe, and return what it returns."""
    shown = shown or Shown()

    async def emit(event: JSON) -> None:
        shown.emitted.append(event)

    return await pipe.pipe(
        asked or body(),
        USER,
        dict(metadata),
        __event_emitter__=emit,
        __task__=task,
        **more,
    )


async def ask(pipe: plugin.Pipe, asked: JSON | None = None, **more: Any) -> Shown:
    """Call a pipe as a chat does, and read the answer to its end."""
    shown = Shown()
    reply = await answer(pipe, asked, shown=shown, **more)
    shown.events += [piece async for piece in pieces(reply)]
    return shown


async def ask_api(pipe: plugin.Pipe, asked: JSON | None = None, **more: Any) -> Shown:
    """Call a pipe as an API client does; the stream must end with [DONE]."""
    reply = await answer(pipe, asked, metadata={}, **more)
    lines = [piece async for piece in pieces(reply)]
    assert lines.pop() == "data: [DONE]\n\n"
    return Shown([json.loads(line.removeprefix("data: ")) for line in lines])


async def whole(pipe: plugin.Pipe, asked: JSON | None = None, **more: Any) -> Any:
    """Call a pipe for an answer in one piece."""
    return await answer(pipe, {**(asked or body()), "stream": False}, **more)


async def hung_up(simulator: Simulator, seconds: float = 1) -> bool:
    """Tell whether a client cuts a connection within some time."""

    def cut(ledger: list[Entry]) -> bool:
        return any(entry.cut_by_client for entry in ledger)

    try:
        return await asyncio.to_thread(simulator.wait_for, cut, seconds)
    except TimeoutError:
        return False


async def posted(simulator: Simulator, count: int = 1) -> None:
    """Wait until requests have reached the simulator."""
    await asyncio.to_thread(simulator.wait_for, lambda _: len(simulator.posts) >= count)


def payloads(data: bytes) -> Iterator[JSON]:
    """Yield the events of plainly framed bytes; what is no JSON is left out."""
    for line in data.split(b"\n"):
        event = plugin.parse_json(line.removeprefix(b"data: "))
        if isinstance(event, dict):
            yield cast(JSON, event)


def upstream_usage(reply: AnyReply, request: JSON) -> JSON | None:
    """Return the usage that a reply reports for a request, if it does."""
    if isinstance(reply, HttpReply):
        return None
    final = terminal_of(payloads(replies.body(reply, request)))
    return ((final or {}).get("response") or {}).get("usage")
