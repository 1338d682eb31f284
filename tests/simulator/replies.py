"""Replies as values: what to answer one request, built from small parts.

A *part* plays one output item on a stage; `compose` plays parts between the
opening and the terminal event. The builders at the end are what tests use.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .media import data_url, heavy_png, png
from .minting import NATIVE, NONCE, encrypt, reasoning_format, sign
from .scene import Body, Scene, Stage, still_scene
from .wire import (
    DONE,
    KEEP_ALIVE,
    Chunk,
    Deltas,
    Event,
    Raw,
    Say,
    Step,
    pieces,
    render,
    say,
    to_json,
)

Part = Callable[[Stage], Iterator[Step]]
Ending = Callable[[Stage], Iterator[Step]]
Frame = Callable[[Iterable[Chunk]], Iterator[Chunk]]
Change = Callable[[dict[str, Any]], dict[str, Any]]
Texts = int | Sequence[str] | None

JSON = "application/json"
HTML = "text/html; charset=UTF-8"
FOREVER = 1 << 60


@dataclass(frozen=True)
class Reply:
    """Stream steps, then end: done, eof, abrupt, reset or stall."""

    play: Callable[[Scene], Iterator[Step]]
    end: str = "done"
    uses: int = 1
    frames: tuple[Frame, ...] = ()
    wait: float = 0.0
    padding: bytes = b""

    def times(self, count: int) -> Reply:
        """Use this reply for `count` requests."""
        return replace(self, uses=count)

    def forever(self) -> Reply:
        """Use this reply for every request from here on."""
        return self.times(FOREVER)

    def chunks(self, scene: Scene) -> Iterator[Chunk]:
        """Yield (delay before, bytes) as they go on the wire."""
        return self.framed(render(self.play(scene)))

    def framed(self, lines: Iterator[Chunk]) -> Iterator[Chunk]:
        """Close lines as this reply ends, and frame them as it is framed."""
        chunks = self._closed(lines)
        for frame in self.frames:
            chunks = frame(chunks)
        return chunks

    def _closed(self, lines: Iterator[Chunk]) -> Iterator[Chunk]:
        yield from lines
        if self.end == "done":
            yield 0.0, DONE


@dataclass(frozen=True)
class HttpReply:
    """Answer with a status and a body instead of a stream."""

    status: int
    payload: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = JSON
    uses: int = 1
    wait: float = 0.0
    end: str = "done"

    def times(self, count: int) -> HttpReply:
        """Use this reply for `count` requests."""
        return replace(self, uses=count)

    def forever(self) -> HttpReply:
        """Use this reply for every request from here on."""
        return self.times(FOREVER)


AnyReply = Reply | HttpReply


def body(reply: AnyReply, request_body: Body | None = None) -> bytes:
    """Return the raw bytes of a reply, without a server."""
    return b"".join(chunk for _, chunk in chunks(reply, request_body))


def chunks(reply: AnyReply, request_body: Body | None = None) -> list[Chunk]:
    """Return the (delay, bytes) pairs of a reply, without a server."""
    if isinstance(reply, HttpReply):
        return [(reply.wait, reply.payload)]
    return list(reply.chunks(still_scene(request_body or {})))


# Endings


def _same(response: dict[str, Any]) -> dict[str, Any]:
    return response


def ending(type_: str, status: str, change: Change = _same, **fields: Any) -> Ending:
    """Build a terminal event; `change` edits its response last."""

    def play(stage: Stage) -> Iterator[Step]:
        response = change(stage.finish(status, **fields))
        stage.scene.usage.update(response.get("usage") or {})
        yield say(type_, response=response)

    return play


def completed(change: Change = _same) -> Ending:
    """End well."""
    return ending("response.completed", "completed", change)


def incomplete(reason: str = "max_output_tokens", change: Change = _same) -> Ending:
    """End early, for a reason."""
    details = {"reason": reason}
    return ending(
        "response.incomplete", "incomplete", change, incomplete_details=details
    )


def failed(
    message: str = "Provider disconnected",
    code: str = "server_error",
    error_type: str = "provider_unavailable",
    change: Change = _same,
) -> Ending:
    """End in failure."""
    error = {"code": code, "message": message}
    fields = {"error": error, "error_type": error_type}
    return ending("response.failed", "failed", change, **fields)


def saying(*steps: Event | bytes) -> Ending:
    """End with given events or bytes."""

    def play(stage: Stage) -> Iterator[Step]:
        yield from (Raw(s) if isinstance(s, bytes) else Say(s) for s in steps)

    return play


def silence(stage: Stage) -> Iterator[Step]:
    """End with no terminal event at all."""
    return iter(())


# Parts


def message(
    text: str = "",
    deltas: Texts = None,
    delay: float = 0.0,
    *,
    annotations: Sequence[dict[str, Any]] = (),
    announce: bool = True,
    closes: bool = True,
    status: str = "completed",
    phase: str | None = None,
) -> Part:
    """Play a text message; one that does not close is left incomplete."""

    def play(stage: Stage) -> Iterator[Step]:
        texts = pieces(text, deltas)
        item: dict[str, Any] = {
            "id": stage.scene.ids.item("msg"),
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
            **({"phase": phase} if phase else stage.phase()),
        }
        index = stage.add(item)
        where = {"item_id": item["id"], "output_index": index, "content_index": 0}
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield say("response.output_item.added", output_index=index, item=dict(item))
        yield say("response.content_part.added", **where, part=part)
        if texts:
            yield Deltas({"type": "response.output_text.delta", **where}, texts, delay)
        whole = "".join(texts)  # now: some texts are made as they go out
        stage.text_length += len(whole)
        part = part | {"text": whole, "annotations": list(annotations)}
        final = status if closes else "incomplete"
        stage.output[index] = item | {"status": final, "content": [part]}
        if closes:
            yield from _annotated(where, annotations if announce else ())
            yield say("response.output_text.done", **where, text=whole, logprobs=[])
            yield from _closed(stage, where, part)

    return play


def _annotated(where: Event, annotations: Sequence[Event]) -> Iterator[Step]:
    for number, annotation in enumerate(annotations):
        event = {"annotation_index": number, "annotation": annotation}
        yield say("response.output_text.annotation.added", **where, **event)


def _closed(stage: Stage, where: Event, part: Event) -> Iterator[Step]:
    index = where["output_index"]
    yield say("response.content_part.done", **where, part=part)
    yield say("response.output_item.done", output_index=index, item=stage.output[index])


def refusal_part(text: str, deltas: Texts = None, delay: float = 0.0) -> Part:
    """Play a message that refuses."""

    def play(stage: Stage) -> Iterator[Step]:
        item: dict[str, Any] = {
            "id": stage.scene.ids.item("msg"),
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        index = stage.add(item)
        where = {"item_id": item["id"], "output_index": index, "content_index": 0}
        part = {"type": "refusal", "refusal": ""}
        yield say("response.output_item.added", output_index=index, item=dict(item))
        yield say("response.content_part.added", **where, part=part)
        texts = pieces(text, deltas)
        yield Deltas({"type": "response.refusal.delta", **where}, texts, delay)
        stage.text_length += len(text)
        part = part | {"refusal": text}
        stage.output[index] = item | {"status": "completed", "content": [part]}
        yield say("response.refusal.done", **where, refusal=text)
        yield from _closed(stage, where, part)

    return play


def thought(
    text: str = "",
    deltas: Texts = None,
    delay: float = 0.0,
    *,
    style: str = "auto",
    late: bool = False,
    other_id: bool = False,
) -> Part:
    """Play reasoning as the model's family does, or in a given style.

    Styles: `text` (raw chain of thought), `summary`, `encrypted` (no deltas),
    `signed` (Anthropic). A `late` one closes after all other items; `other_id`
    gives it another id in the final snapshot.
    """

    def play(stage: Stage) -> Iterator[Step]:
        kind = family_style(stage.scene.slug) if style == "auto" else style
        actor = _summarize if kind in ("summary", "encrypted") else _think_aloud
        shown = [] if kind == "encrypted" else pieces(text, deltas)
        yield from actor(stage, shown, delay, late)
        if other_id:
            stage.late.append(_renamed(stage, len(stage.output) - 1))

    return play


def family_style(model: str) -> str:
    """Name the reasoning style of a model's family."""
    format_ = reasoning_format(model)
    if format_ in NATIVE:
        return "summary"
    return "signed" if format_.startswith("anthropic") else "text"


def _renamed(stage: Stage, index: int) -> Iterator[Step]:
    renamed = {"id": stage.scene.ids.item("rs")}
    stage.output[index] = stage.output[index] | renamed
    return
    yield


def _secrets(stage: Stage, text: str) -> dict[str, Any]:
    """Mint what a family adds to a finished thought."""
    scene, format_ = stage.scene, reasoning_format(stage.scene.slug)
    if format_ == "unknown":
        return {}
    if format_.startswith("anthropic"):
        return {"signature": sign(scene.slug, text), "format": format_}
    if not scene.wants_encrypted:
        return {"format": format_}
    token = encrypt(scene.slug, scene.ids.take(NONCE))
    return {"encrypted_content": token, "format": format_}


def _think_aloud(
    stage: Stage, texts: Sequence[str], delay: float, late: bool
) -> Iterator[Step]:
    item: dict[str, Any] = {
        "type": "reasoning",
        "id": stage.scene.ids.item("rs"),
        "summary": [],
    }
    index = stage.add(item)
    where = {"item_id": item["id"], "output_index": index, "content_index": 0}
    part = {"type": "reasoning_text", "text": ""}
    yield say("response.output_item.added", output_index=index, item=dict(item))
    yield say("response.content_part.added", **where, part=part)
    yield Deltas({"type": "response.reasoning_text.delta", **where}, texts, delay)
    whole = "".join(texts)
    stage.reasoning_length += len(whole)
    part = part | {"text": whole}
    secrets = _secrets(stage, whole)
    stage.output[index] = item | {"status": "completed", "content": [part]} | secrets

    def close() -> Iterator[Step]:
        yield say("response.reasoning_text.done", **where, text=whole)
        yield from _closed(stage, where, part)

    if late:
        stage.late.append(close())
    else:
        yield from close()


def _summarize(
    stage: Stage, texts: Sequence[str], delay: float, late: bool
) -> Iterator[Step]:
    """Play a summary; a blank line in the text begins another summary part."""
    item: dict[str, Any] = {
        "type": "reasoning",
        "id": stage.scene.ids.native_reasoning(),
        "summary": [],
    }
    index = stage.add(item)
    opened = dict(item) if texts else item | {"status": "in_progress"}
    yield say("response.output_item.added", output_index=index, item=opened)
    parts = []
    for number, run in enumerate(_paragraphs(texts)):
        where = {"item_id": item["id"], "output_index": index, "summary_index": number}
        part, whole = {"type": "summary_text", "text": ""}, "".join(run)
        parts.append(part | {"text": whole})
        yield say("response.reasoning_summary_part.added", **where, part=part)
        event = {"type": "response.reasoning_summary_text.delta", **where}
        yield Deltas(event, run, delay)
        yield say("response.reasoning_summary_text.done", **where, text=whole)
        yield say("response.reasoning_summary_part.done", **where, part=parts[-1])
    stage.reasoning_length += sum(map(len, texts)) or 256
    done = {"status": "completed", "summary": parts} | _secrets(stage, "")
    stage.output[index] = item | done
    yield say("response.output_item.done", output_index=index, item=stage.output[index])


def _paragraphs(texts: Sequence[str]) -> Iterator[list[str]]:
    """Group deltas into paragraphs, parted where the text has a blank line."""
    run: list[str] = []
    for text in texts:
        before, mark, after = text.partition("\n\n")
        run += [before] if before else []
        if mark:
            yield run
            run = [after] if after else []
    if run:
        yield run


@dataclass(frozen=True)
class Call:
    """A function call to make; `arguments` that are a string go as they are."""

    name: str
    arguments: Any = None
    call_id: str | None = None
    deltas: Texts = 2

    def text(self) -> str:
        """Return the arguments as the JSON string of the wire."""
        if isinstance(self.arguments, str):
            return self.arguments
        return json.dumps(self.arguments or {}, ensure_ascii=False)


def _call_item(stage: Stage, call: Call) -> tuple[int, Event, Event]:
    id_ = call.call_id
    if id_ is None:
        id_ = stage.scene.ids.call(stage.scene.slug, call.name, len(stage.output))
    item = {
        "id": stage.scene.ids.item("fc"),
        "type": "function_call",
        "status": "in_progress",
        "call_id": id_,
        "name": call.name,
        "arguments": "",
    }
    index = stage.add(item)
    return index, item, {"item_id": item["id"], "output_index": index}


def _call_done(stage: Stage, index: int, item: Event, text: str) -> Iterator[Step]:
    where = {"item_id": item["id"], "output_index": index}
    done = {"name": item["name"], "arguments": text}
    stage.text_length += len(text)
    stage.output[index] = item | {"status": "completed", "arguments": text}
    yield say("response.function_call_arguments.done", **where, **done)
    yield say("response.output_item.done", output_index=index, item=stage.output[index])


def function_call(call: Call, delay: float = 0.0) -> Part:
    """Play one function call; with `deltas` of 0 its arguments come at once."""

    def play(stage: Stage) -> Iterator[Step]:
        index, item, where = _call_item(stage, call)
        text = call.text()
        yield say("response.output_item.added", output_index=index, item=dict(item))
        if call.deltas and text:
            event = {"type": "response.function_call_arguments.delta", **where}
            yield Deltas(event, pieces(text, call.deltas), delay)
        yield from _call_done(stage, index, item, text)

    return play


def interleaved_calls(calls: Sequence[Call], delay: float = 0.0) -> Part:
    """Play calls whose deltas alternate and which close in reverse order."""

    def play(stage: Stage) -> Iterator[Step]:
        opened = [(*_call_item(stage, call), pieces(call.text(), 2)) for call in calls]
        for index, item, _, _ in opened:
            yield say("response.output_item.added", output_index=index, item=dict(item))
        for turn in range(2):
            for _, _, where, texts in opened:
                event = {"type": "response.function_call_arguments.delta", **where}
                yield Deltas(event, texts[turn : turn + 1], delay)
        for index, item, _, texts in reversed(opened):
            yield from _call_done(stage, index, item, "".join(texts))

    return play


def web_search(
    query: str,
    urls: Sequence[str] = (),
    *,
    native: bool = True,
    sub_events: bool | None = None,
    status: str = "completed",
) -> Part:
    """Play a server-side search, as OpenAI's item or as OpenRouter's own."""

    def play(stage: Stage) -> Iterator[Step]:
        stage.searches += 1
        item: dict[str, Any] = {
            "type": "web_search_call" if native else "openrouter:web_search",
            "id": stage.scene.ids.item("ws"),
            "status": "in_progress",
        }
        search = {"type": "search", "query": query}
        opened = item | ({"action": search} if native else {})
        index = stage.add(item)
        where = {"item_id": item["id"], "output_index": index}
        yield say("response.output_item.added", output_index=index, item=opened)
        if native if sub_events is None else sub_events:
            for verb in ("in_progress", "searching", "completed"):
                yield say(f"response.web_search_call.{verb}", **where)
        sources = [{"type": "url", "url": url} for url in urls]
        done = item | {"status": status, "action": search | {"sources": sources}}
        stage.output[index] = done
        yield say("response.output_item.done", output_index=index, item=done)

    return play


def server_item(type_: str, prefix: str = "st", **fields: Any) -> Part:
    """Play a server-tool item that only opens and closes."""

    def play(stage: Stage) -> Iterator[Step]:
        item = {"type": type_, "id": stage.scene.ids.item(prefix)}
        opened, done = item | {"status": "in_progress"}, item | {"status": "completed"}
        index = stage.add(done | fields)
        needed = {k: v for k, v in fields.items() if k in ("datetime", "timezone")}
        yield say(
            "response.output_item.added", output_index=index, item=opened | needed
        )
        yield say("response.output_item.done", output_index=index, item=done | fields)

    return play


def picture(
    result: str, partials: Sequence[str] = (), delay: float = 0.0, streams: bool = True
) -> Part:
    """Play an image generation; one that does not stream is only in the snapshot."""

    def play(stage: Stage) -> Iterator[Step]:
        item = {
            "type": "image_generation_call",
            "id": stage.scene.ids.item("ig"),
            "status": "in_progress",
            "result": None,
        }
        index = stage.add(item | {"status": "completed", "result": result})
        stage.text_length += 4 * 1_290
        where = {"item_id": item["id"], "output_index": index}
        kind = "response.image_generation_call"
        if not streams:
            return
        yield say("response.output_item.added", output_index=index, item=item)
        yield say(f"{kind}.in_progress", **where)
        yield say(f"{kind}.generating", delay, **where)
        for number, partial in enumerate(partials):
            frame = {"partial_image_index": number, "partial_image_b64": partial}
            yield say(f"{kind}.partial_image", delay, **where, **frame)
        yield say(f"{kind}.completed", delay, **where)
        done = stage.output[index]
        yield say("response.output_item.done", output_index=index, item=done)

    return play


def event_part(*events: Event | bytes, delay: float = 0.0) -> Part:
    """Play given events or bytes between items."""

    def play(stage: Stage) -> Iterator[Step]:
        for event in events:
            is_raw = isinstance(event, bytes)
            yield Raw(event, delay) if is_raw else Say(event, delay)

    return play


def keep_alive(count: int, delay: float) -> Part:
    """Play only comments."""
    return event_part(*[KEEP_ALIVE] * count, delay=delay)


def compose(
    *parts: Part, terminal: Ending | None = None, end: str = "done", wait: float = 0.0
) -> Reply:
    """Play parts in order between the opening and the terminal event."""
    terminal = terminal or completed()

    def play(scene: Scene) -> Iterator[Step]:
        stage = Stage(scene)
        yield Raw(KEEP_ALIVE)
        yield from stage.opening()
        for part in parts:
            yield from part(stage)
        for closing in stage.late:
            yield from closing
        yield from terminal(stage)

    return Reply(play, end, wait=wait)


# Builders


def text(
    text: str = "Hello.",
    deltas: Texts = None,
    delay: float = 0.0,
    *,
    terminal: Ending | None = None,
    wait: float = 0.0,
) -> Reply:
    """Answer with a text."""
    return compose(message(text, deltas, delay), terminal=terminal, wait=wait)


def reasoning(
    thinking: str,
    answer: str = "Hello.",
    deltas: Texts = None,
    delay: float = 0.0,
    *,
    style: str = "auto",
    late: bool = False,
    other_id: bool = False,
    answer_deltas: Texts = None,
    answer_delay: float | None = None,
) -> Reply:
    """Think, then answer."""
    pace = delay if answer_delay is None else answer_delay
    options = {"style": style, "late": late, "other_id": other_id}
    thinks = thought(thinking, deltas, delay, **options)  # type: ignore[arg-type]
    return compose(thinks, message(answer, answer_deltas, pace))


def as_call(call: Call | tuple[Any, ...] | str) -> Call:
    """Accept a call as a `Call`, a tuple of its fields or a bare name."""
    if isinstance(call, Call):
        return call
    return Call(call) if isinstance(call, str) else Call(*call)


def tool_calls(
    calls: Sequence[Call | tuple[Any, ...] | str],
    *,
    say: str | None = None,
    think: str | None = None,
    interleaved: bool = False,
    delay: float = 0.0,
    terminal: Ending | None = None,
) -> Reply:
    """Call functions: `[("get_weather", {"city": "Oslo"}), ...]`."""
    wanted = [as_call(call) for call in calls]
    parts: list[Part] = [thought(think, delay=delay)] if think else []
    parts += [message(say, delay=delay)] if say else []
    if interleaved:
        parts.append(interleaved_calls(wanted, delay))
    else:
        parts += [function_call(call, delay) for call in wanted]
    return compose(*parts, terminal=terminal)


def url_citation(
    url: str, title: str | None = None, start: int = 0, end: int = 0, **extra: Any
) -> dict[str, Any]:
    """Build a flat citation, without a title when it is None."""
    titled = {"title": title} if title is not None else {}
    span = {"start_index": start, "end_index": end}
    return {"type": "url_citation", "url": url, **titled, **span, **extra}


SOURCES = (
    url_citation("https://example.com/fjords", "Fjords of Norway", 0, 5),
    url_citation("https://example.org/boats", "Boats", 6, 12),
)


def citations(
    answer: str = "Hello fjords and boats.",
    sources: Sequence[dict[str, Any]] = SOURCES,
    *,
    query: str = "fjords",
    searches: int = 1,
    native: bool = True,
    sub_events: bool | None = None,
    status: str = "completed",
    announce: bool = True,
    deltas: Texts = None,
    delay: float = 0.0,
    terminal: Ending | None = None,
) -> Reply:
    """Search (or not, with `searches=0`) and answer with citations."""
    urls = list(dict.fromkeys(source["url"] for source in sources))
    options = {"native": native, "sub_events": sub_events, "status": status}
    names = [query, *(f"{query} {n}" for n in range(2, searches + 1))][:searches]
    found = [web_search(name, urls, **options) for name in names]  # type: ignore[arg-type]
    cited = message(answer, deltas, delay, annotations=sources, announce=announce)
    return compose(*found, cited, terminal=terminal)


def image(
    data: bytes | None = None,
    form: str = "base64",
    *,
    caption: str | None = None,
    partials: int = 0,
    size: int = 0,
    url: str = "https://example.com/picture.png",
    streams: bool = True,
    delay: float = 0.0,
) -> Reply:
    """Answer with an image as `base64`, `data_url` or `url`; `size` pads it."""
    raw = data or (heavy_png(size) if size else png())
    bare = base64.b64encode(raw).decode()
    forms = {"base64": bare, "data_url": data_url(raw), "url": url}
    previews = [base64.b64encode(png(16, 10, n)).decode() for n in range(partials)]
    after = [message(caption)] if caption else []
    return compose(picture(forms[form], previews, delay, streams), *after)


def png_base64() -> str:
    """Draw a picture as bare base64."""
    return base64.b64encode(png()).decode()


def refusal(text: str = "I cannot help with that.", delay: float = 0.0) -> Reply:
    """Refuse."""
    return compose(refusal_part(text, delay=delay))


def empty() -> Reply:
    """Complete with nothing said."""
    return compose()


def wrong(
    status: int,
    message: str,
    *,
    code: int | str | None = None,
    metadata: Mapping[str, Any] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Build an error body in OpenRouter's envelope."""
    error: dict[str, Any] = {
        "code": status if code is None else code,
        "message": message,
    }
    if metadata:
        error["metadata"] = dict(metadata)
    return {"error": error | fields, "user_id": "user_sim"}


MESSAGES = {
    400: "Invalid request",
    401: "User not found.",
    402: "Insufficient credits. Add more using https://openrouter.ai/credits",
    403: "Your chosen model requires moderation and your input was flagged",
    404: "No endpoints found for this model.",
    408: "Operation timed out. Please try again later.",
    413: "Request payload too large",
    422: "Invalid argument",
    429: "Provider returned error",
    500: "Internal Server Error",
    502: "Provider returned error",
    503: "Service temporarily unavailable",
    504: "Request timed out. Please try again later.",
    524: "Request timed out. Please try again later.",
    529: "Provider returned error",
}


def http_error(
    status: int,
    message: str | None = None,
    *,
    metadata: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    code: int | str | None = None,
    availability: Mapping[str, Any] | None = None,
    body: Any = None,
    html: bool = False,
    wait: float = 0.0,
) -> HttpReply:
    """Answer with an HTTP error before any stream."""
    if html:
        return HttpReply(
            status, cloudflare_page(status), headers or {}, HTML, wait=wait
        )
    if body is None:
        extra = {"availability": dict(availability)} if availability else {}
        words = message or MESSAGES.get(status, "Error")
        body = wrong(status, words, code=code, metadata=metadata, **extra)
    return HttpReply(status, to_json(body), headers or {}, wait=wait)


def cloudflare_page(status: int) -> bytes:
    """Write the HTML that an edge server shows instead of JSON."""
    title = f"openrouter.ai | {status}: A timeout occurred"
    return (
        f"<!DOCTYPE html>\n<html><head><title>{title}</title></head>\n"
        f"<body><h1>Error {status}</h1><p>Ray ID: 8f00c0ffee-OSL</p>"
        "<span>Cloudflare</span></body></html>\n"
    ).encode()


def json_body(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> HttpReply:
    """Answer with any JSON."""
    return HttpReply(status, to_json(value), headers or {})


def raw_body(
    data: bytes, content_type: str = JSON, status: int = 200, **options: Any
) -> HttpReply:
    """Answer with any bytes."""
    return HttpReply(status, data, content_type=content_type, **options)


def _step(entry: Any) -> Step:
    delay, what = entry if isinstance(entry, tuple) else (0.0, entry)
    if isinstance(what, str):
        what = what.encode()
    return Raw(what, delay) if isinstance(what, bytes) else Say(what, delay)


def events(entries: Iterable[Any], cut: str = "done") -> Reply:
    """Play raw events: dicts, bytes, or (delay, either) pairs.

    A `response` in an event is merged into the template of §9.3. `cut` is how it
    ends: `done`, `eof`, `abrupt`, `reset`, `stall`, or `mid-line`, which halves
    the last event.
    """
    listed = list(entries)

    def play(scene: Scene) -> Iterator[Step]:
        for step in map(_step, listed):
            if isinstance(step, Say) and isinstance(step.event.get("response"), dict):
                response = scene.response(**step.event["response"])
                step = Say(step.event | {"response": response}, step.delay)
            yield step

    if cut == "mid-line":
        return cut_mid_line(Reply(play, "eof"))
    return Reply(play, cut)


def edited(reply: Reply, change: Change) -> Reply:
    """Change every event of a reply but its deltas."""

    def play(scene: Scene) -> Iterator[Step]:
        for step in reply.play(scene):
            is_event = isinstance(step, Say)
            yield Say(change(step.event), step.delay) if is_event else step

    return replace(reply, play=play)


def served_by(reply: Reply, slug: str) -> Reply:
    """Report another model than the one that was asked."""

    def play(scene: Scene) -> Iterator[Step]:
        return reply.play(replace(scene, model=replace(scene.model, slug=slug)))

    return replace(reply, play=play)


def cut_mid_line(reply: Reply) -> Reply:
    """Cut the last event of a reply in half."""

    def halve(given: Iterable[Chunk]) -> Iterator[Chunk]:
        held: Chunk | None = None
        for chunk in given:
            if held is not None:
                yield held
            held = chunk
        if held is not None:
            yield held[0], held[1][: len(held[1]) // 2]

    return replace(reply, end="eof", frames=(*reply.frames, halve))
