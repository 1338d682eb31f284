"""The /chat/completions skin: bodies translated in, replies translated out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from .media import data_url
from .scene import Scene, provider_name
from .wire import Chunk, Deltas, Event, Raw, Say, Step, data_line, to_json

RENAMED = {
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "verbosity": "verbosity",
}
DROPPED = frozenset(
    [
        "messages",
        "tools",
        "tool_choice",
        "stream_options",
        "response_format",
        "stop",
        "seed",
        "logit_bias",
        "logprobs",
        "reasoning_effort",
        "verbosity",
        "usage",
    ]
)


def as_responses_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a chat body, so that one validation and one persona serve both."""
    kept = {RENAMED.get(k, k): v for k, v in body.items() if k not in DROPPED}
    items = [i for m in body.get("messages") or [] for i in _items(m)]
    translated = kept | {"input": items}
    if body.get("tools"):
        translated["tools"] = [_flat_tool(tool) for tool in body["tools"]]
    if effort := body.get("reasoning_effort"):
        translated["reasoning"] = {"effort": effort}
    return translated


def _flat_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    inner = tool.get("function")
    if not isinstance(inner, dict):
        return dict(tool)
    return {"type": "function", "parameters": None, **inner}


def _items(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    role, content = message.get("role"), message.get("content")
    if role == "tool":
        output = content if isinstance(content, str) else _joined(content)
        id_ = message.get("tool_call_id", "")
        yield {"type": "function_call_output", "call_id": id_, "output": output}
        return
    if role == "assistant":
        yield from _assistant_items(message, content)
        return
    parts = content if isinstance(content, str) else [_part(p) for p in content or []]
    yield {"role": role, "content": parts}


def _joined(content: Any) -> str:
    return "".join(part.get("text") or "" for part in content or [])


def _assistant_items(
    message: Mapping[str, Any], content: Any
) -> Iterator[dict[str, Any]]:
    words = content if isinstance(content, str) else _joined(content)
    if words:
        yield {"role": "assistant", "content": words}
    for call in message.get("tool_calls") or []:
        function = call.get("function") or {}
        yield {
            "type": "function_call",
            "call_id": call.get("id", ""),
            "name": function.get("name", ""),
            "arguments": function.get("arguments", ""),
        }


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    kind = part.get("type")
    if kind == "image_url":
        url = part["image_url"]["url"]
        return {"type": "input_image", "detail": "auto", "image_url": url}
    if kind == "text":
        return {"type": "input_text", "text": part.get("text", "")}
    if kind == "input_audio":
        return dict(part)
    if kind == "video_url":
        return {"type": "input_video", "video_url": part["video_url"]["url"]}
    if kind == "file":
        return {"type": "input_file", **(part.get("file") or {})}
    return dict(part)


def chat_usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the usage keys."""
    costs = usage.get("cost_details") or {}
    return {
        "prompt_tokens": usage.get("input_tokens", 0),
        "completion_tokens": usage.get("output_tokens", 0),
        "total_tokens": usage.get("total_tokens", 0),
        "cost": usage.get("cost"),
        "is_byok": usage.get("is_byok", False),
        "prompt_tokens_details": usage.get("input_tokens_details") or {},
        "cost_details": {
            "upstream_inference_cost": costs.get("upstream_inference_cost"),
            "upstream_inference_prompt_cost": costs.get(
                "upstream_inference_input_cost"
            ),
            "upstream_inference_completions_cost": costs.get(
                "upstream_inference_output_cost"
            ),
        },
        "completion_tokens_details": usage.get("output_tokens_details") or {},
    }


def finish_reason(response: Mapping[str, Any]) -> str:
    """Name why a finished response ended, in chat terms."""
    details = response.get("incomplete_details") or {}
    if details:
        filtered = details.get("reason") == "content_filter"
        return "content_filter" if filtered else "length"
    kinds = {item.get("type") for item in response.get("output") or []}
    return "tool_calls" if "function_call" in kinds else "stop"


class ChatWriter:
    """Translate the steps of a response into chat chunks, one by one."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.calls: dict[int, int] = {}
        self.shell = {
            "id": scene.generation,
            "object": "chat.completion.chunk",
            "created": int(scene.now),
            "model": scene.model.slug,
            "provider": provider_name(scene.slug),
        }

    def render(self, steps: Iterable[Step]) -> Iterator[Chunk]:
        """Yield (delay before, bytes) pairs."""
        for step in steps:
            if isinstance(step, Raw):
                yield step.delay, step.data
            elif isinstance(step, Deltas):
                yield from self._deltas(step)
            else:
                yield from self._event(step)

    def chunk(self, delta: Event, finish: str | None = None, **extra: Any) -> bytes:
        """Write one chunk."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        native = {"native_finish_reason": finish}
        return data_line(to_json(self.shell | {"choices": [choice | native]} | extra))

    def _deltas(self, step: Deltas) -> Iterator[Chunk]:
        build = DELTAS.get(step.event["type"])
        if build is None:
            return
        mark = "\x00text\x00"
        head, _, tail = self.chunk(build(self, step.event, mark)).partition(
            to_json(mark)
        )
        parts = tail.split(to_json(mark))
        for text in step.texts:
            yield step.delay, head + to_json(text).join([b"", *parts])

    def _event(self, step: Say) -> Iterator[Chunk]:
        handler = EVENTS.get(str(step.event.get("type")))
        if handler is not None:
            for line in handler(self, step.event):
                yield step.delay, line
        elif "error" in step.event:
            yield step.delay, self._error(step.event["error"])

    def _error(self, error: Mapping[str, Any]) -> bytes:
        return self.chunk({"content": ""}, "error", error=dict(error))

    def _item_added(self, event: Event) -> Iterator[bytes]:
        item = event["item"]
        if item.get("type") != "function_call":
            return
        number = self.calls.setdefault(event["output_index"], len(self.calls))
        function = {"name": item.get("name"), "arguments": ""}
        call = {"index": number, "id": item.get("call_id"), "type": "function"}
        yield self.chunk(
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [call | {"function": function}],
            }
        )

    def _item_done(self, event: Event) -> Iterator[bytes]:
        item = event["item"]
        if item.get("type") == "image_generation_call":
            yield self.chunk(
                {"role": "assistant", "content": "", "images": [_image(item)]}
            )
        secret = item.get("encrypted_content") or item.get("signature")
        if item.get("type") == "reasoning" and secret:
            kind = "encrypted" if item.get("encrypted_content") else "text"
            key = "data" if kind == "encrypted" else "signature"
            detail = {"type": f"reasoning.{kind}", key: secret, "id": item["id"]}
            detail |= {"format": item.get("format"), "index": 0}
            yield self.chunk({"content": "", "reasoning_details": [detail]})

    def _annotation(self, event: Event) -> Iterator[bytes]:
        flat = event["annotation"]
        inner = {key: value for key, value in flat.items() if key != "type"}
        nested = {"type": flat["type"], flat["type"]: inner}
        yield self.chunk({"content": "", "annotations": [nested]})

    def _finished(self, event: Event) -> Iterator[bytes]:
        response = event["response"]
        reason, delta = finish_reason(response), {"role": "assistant", "content": ""}
        yield self.chunk(delta, reason)
        if usage := response.get("usage"):
            yield self.chunk(delta, reason, usage=chat_usage(usage))

    def _failed(self, event: Event) -> Iterator[bytes]:
        response = event["response"]
        metadata = {"error_type": response.get("error_type")}
        words = (response.get("error") or {}).get("message", "Error")
        yield self._error({"code": 502, "message": words, "metadata": metadata})

    def _flat_error(self, event: Event) -> Iterator[bytes]:
        error = event.get("error") or {"code": 502, "message": event.get("message")}
        yield self._error(error)


def _image(item: Event) -> dict[str, Any]:
    result = item.get("result") or ""
    is_url = result.startswith(("data:", "http"))
    url = result if is_url else data_url(b"") + result
    return {"type": "image_url", "image_url": {"url": url}, "index": 0}


def _text_delta(writer: ChatWriter, event: Event, mark: str) -> Event:
    return {"role": "assistant", "content": mark}


def _reasoning_delta(writer: ChatWriter, event: Event, mark: str) -> Event:
    summary = "summary" in event["type"]
    kind, key = ("summary", "summary") if summary else ("text", "text")
    detail = {"type": f"reasoning.{kind}", key: mark, "format": "unknown", "index": 0}
    return {
        "role": "assistant",
        "content": "",
        "reasoning": mark,
        "reasoning_details": [detail],
    }


def _call_delta(writer: ChatWriter, event: Event, mark: str) -> Event:
    number = writer.calls.get(event["output_index"], 0)
    call = {"index": number, "type": "function", "function": {"arguments": mark}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


DELTAS: dict[str, Callable[[ChatWriter, Event, str], Event]] = {
    "response.output_text.delta": _text_delta,
    "response.refusal.delta": _text_delta,
    "response.reasoning_text.delta": _reasoning_delta,
    "response.reasoning_summary_text.delta": _reasoning_delta,
    "response.function_call_arguments.delta": _call_delta,
}
EVENTS: dict[str, Callable[[ChatWriter, Event], Iterator[bytes]]] = {
    "response.output_item.added": ChatWriter._item_added,
    "response.output_item.done": ChatWriter._item_done,
    "response.output_text.annotation.added": ChatWriter._annotation,
    "response.completed": ChatWriter._finished,
    "response.incomplete": ChatWriter._finished,
    "response.failed": ChatWriter._failed,
    "error": ChatWriter._flat_error,
    "response.error": ChatWriter._flat_error,
}


def chat_completion(scene: Scene, response: Mapping[str, Any]) -> dict[str, Any]:
    """Fold a finished response into one chat completion."""
    output = response.get("output") or []
    reason = finish_reason(response)
    message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
    thoughts = ""
    for item in output:
        if item["type"] == "message":
            message["content"] += "".join(
                part.get("text") or part.get("refusal") or ""
                for part in item["content"]
            )
        elif item["type"] == "reasoning":
            shown = (item.get("content") or []) + item["summary"]
            thoughts += "".join(part["text"] for part in shown)
        elif item["type"] == "image_generation_call":
            message.setdefault("images", []).append(_image(item))
        elif item["type"] == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            calls = message.setdefault("tool_calls", [])
            shell = {"index": len(calls), "id": item["call_id"], "type": "function"}
            calls.append(shell | {"function": function})
    message |= {"reasoning": thoughts} if thoughts else {}
    choice = {"index": 0, "message": message, "finish_reason": reason}
    return {
        "id": scene.generation,
        "object": "chat.completion",
        "created": int(scene.now),
        "model": scene.model.slug,
        "provider": provider_name(scene.slug),
        "choices": [choice | {"native_finish_reason": reason}],
        "usage": chat_usage(response.get("usage") or {}),
    }
