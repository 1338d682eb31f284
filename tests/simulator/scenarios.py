"""The named scenarios of §9.4 and §9.5, each with its variants.

The first variant of a scenario is its default. What H5 mints depends on the model
that is asked: ask an Anthropic one. F25 by refusal, TLS or DNS needs no reply: see
`Simulator.refused_url`, `tls_url` and `unresolvable_url`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from email.utils import formatdate
from typing import Any

from . import replies
from .ledger import Entry
from .replies import (
    AnyReply,
    Call,
    Ending,
    HttpReply,
    Part,
    Reply,
    completed,
    compose,
    edited,
    event_part,
    failed,
    function_call,
    http_error,
    incomplete,
    message,
    saying,
    server_item,
    thought,
    url_citation,
    web_search,
    wrong,
)
from .scene import Stage, still_scene
from .validation import FAULTS, context_words
from .wire import Deltas, Event, Step, say, to_json

Builder = Callable[..., AnyReply]
SCENARIOS: dict[str, dict[str, Builder]] = {}
HELLO = ("Hel", "lo.")
THOUGHT = ("First I look ", "at the question.")
OSLO = Call("get_weather", {"city": "Oslo"})
ROME = Call("get_weather", {"city": "Rome"})


def stage_as(name: str, *names: str) -> Callable[[Builder], Builder]:
    """Register a builder as a variant, or as several that it is told apart by."""

    def register(builder: Builder) -> Builder:
        for variant in names or ("default",):
            table = SCENARIOS.setdefault(name, {})
            table[variant] = _named(builder, variant) if len(names) > 1 else builder
        return builder

    return register


def _named(builder: Builder, variant: str) -> Builder:
    def build(**options: Any) -> AnyReply:
        return builder(variant, **options)

    return build


def scenario(name: str, variant: str | None = None, **options: Any) -> AnyReply:
    """Build the reply of a scenario; `options` are its own, such as `retry_after`."""
    known = SCENARIOS[name]
    return known[variant or next(iter(known))](**options)


def variants(name: str) -> list[str]:
    """List the variants of a scenario, the default first."""
    return list(SCENARIOS[name])


def listing() -> dict[str, list[str]]:
    """List all scenarios with their variants."""
    return {name: variants(name) for name in SCENARIOS}


def has_reasoning(entry: Entry) -> bool:
    """Tell whether a request replays reasoning: the `when` of F12."""
    return any(item.get("type") == "reasoning" for item in entry.items)


# Happy paths


@stage_as("H1")
def h1(text: str = "Hello.", delay: float = 0.0) -> Reply:
    """Say a plain text in two deltas."""
    return replies.text(text, 2, delay)


@stage_as("H2", "late", "tidy")
def h2(variant: str, delay: float = 0.0) -> Reply:
    """Think aloud; the late variant closes the thought after the message."""
    late = variant == "late"
    thinks = thought(
        "".join(THOUGHT), THOUGHT, delay, style="text", late=late, other_id=late
    )
    return compose(thinks, message(deltas=HELLO, delay=delay))


@stage_as("H3", "one", "two")
def h3(variant: str, delay: float = 0.0) -> Reply:
    """Summarize the reasoning in one or two parts."""
    texts = ["**Plan**", " I look.", "\n\n**Check**", " It holds."]
    shown = texts[:2] if variant == "one" else texts
    return compose(
        thought(deltas=shown, delay=delay, style="summary"),
        message(deltas=HELLO, delay=delay, phase="final_answer"),
    )


@stage_as("H4")
def h4() -> Reply:
    """Think in secret."""
    return compose(thought(style="encrypted"), message(deltas=HELLO))


@stage_as("H5")
def h5(name: str = "get_weather", arguments: Any = None) -> Reply:
    """Think with a signature, then call."""
    call = Call(name, arguments or OSLO.arguments)
    return compose(thought(deltas=THOUGHT, style="signed"), function_call(call))


CALLS: dict[str, Call] = {
    "deltas": OSLO,
    "no-deltas": replace(OSLO, deltas=0),
    "empty": Call("get_time", ""),
    "empty-object": Call("get_time", "{}"),
    "unicode": Call("get_weather", '{"city":"\\u00c5s \\ud83c\\udf27"}', deltas=9),
}


@stage_as("H6", *CALLS)
def h6(variant: str, call: Call | None = None) -> Reply:
    """Call one function."""
    return compose(function_call(call or CALLS[variant]))


@stage_as("H6", "truncated")
def h6_truncated() -> Reply:
    """Run out of tokens inside the arguments."""
    return compose(
        function_call(Call("get_weather", '{"city":"Os')), terminal=incomplete()
    )


@stage_as("H6", "commentary")
def h6_commentary() -> Reply:
    """Say something before the call."""
    before = message("Let me look.", phase="commentary")
    return compose(before, function_call(OSLO))


@stage_as("H7", "sequential", "interleaved")
def h7(variant: str, calls: Sequence[Call] = (OSLO, ROME)) -> Reply:
    """Call several functions in one round."""
    return replies.tool_calls(calls, interleaved=variant == "interleaved")


@stage_as("H8", "answer")
def h8() -> Reply:
    """Answer after the tools."""
    return compose(message("It is 4 degrees in Oslo.", 2))


@stage_as("H8", "empty")
def h8_empty() -> Reply:
    """Say nothing after the tools."""
    return compose()


@stage_as("H8", "endless")
def h8_endless(call: Call = OSLO) -> Reply:
    """Call again and again."""
    return compose(function_call(call)).forever()


FJORDS = "https://example.com/fjords"
SEARCHES: dict[str, dict[str, Any]] = {
    "native": {},
    "openrouter": {"native": False},
    "openrouter-sub-events": {"native": False, "sub_events": True},
    "several": {"searches": 3},
    "zero-indices": {"sources": [url_citation(FJORDS, "Fjords", 0, 0)]},
    "final-part": {"announce": False},
    "repeated": {
        "sources": [url_citation(FJORDS, "Fjords", n, n + 3) for n in range(3)]
    },
    "untitled": {"sources": [url_citation(FJORDS, None, 0, 5)]},
    "excerpt": {
        "sources": [url_citation(FJORDS, "Fjords", 0, 5, content="deep [...] blue")]
    },
    "plugin": {"searches": 0},
    "failed": {"status": "failed"},
    "incomplete": {"native": False, "status": "incomplete"},
}


@stage_as("H9", *SEARCHES)
def h9(variant: str, **options: Any) -> Reply:
    """Search the web and cite."""
    return replies.citations(**(SEARCHES[variant] | options))


def _cite_last(response: dict[str, Any]) -> dict[str, Any]:
    *before, last = response["output"]
    part = last["content"][0] | {"annotations": list(replies.SOURCES)}
    return response | {"output": [*before, last | {"content": [part]}]}


@stage_as("H9", "completed-only")
def h9_completed_only() -> Reply:
    """Cite in the snapshot alone."""
    said = message("Hello fjords and boats.")
    return compose(web_search("fjords"), said, terminal=completed(_cite_last))


@stage_as("H9", "datetime")
def h9_datetime() -> Reply:
    """Look at the clock."""
    facts = {"datetime": "2026-09-21T14:13:20Z", "timezone": "UTC"}
    return compose(server_item("openrouter:datetime", "dt", **facts), message("Noon."))


@stage_as("H9", "web-fetch")
def h9_web_fetch() -> Reply:
    """Fetch a page."""
    facts = {"url": FJORDS, "title": "Fjords", "content": "Deep.", "httpStatus": 200}
    return compose(server_item("openrouter:web_fetch", "wf", **facts), message("Deep."))


IMAGES: dict[str, dict[str, Any]] = {
    "base64": {},
    "data_url": {"form": "data_url"},
    "url": {"form": "url"},
    "partials": {"partials": 2},
    "caption": {"caption": "A sun over hills."},
    "large": {"size": 3 << 20},
    "completed-only": {"streams": False},
}


@stage_as("H10", *IMAGES)
def h10(variant: str, **options: Any) -> Reply:
    """Draw."""
    return replies.image(**(IMAGES[variant] | options))


@stage_as("H10", "server-tool-url", "server-tool-b64", "server-tool-result")
def h10_server_tool(variant: str) -> Reply:
    """Draw with OpenRouter's own tool."""
    form = variant.rsplit("-", 1)[1]
    key = {"url": "imageUrl", "b64": "imageB64", "result": "result"}[form]
    value = "https://example.com/picture.png" if form == "url" else replies.png_base64()
    words = {"prompt": "a sun", "revisedPrompt": "A sun over hills"}
    item = server_item("openrouter:image_generation", "ig", **words, **{key: value})
    return compose(item, message("Here it is."))


@stage_as("H11")
def h11() -> Reply:
    """Refuse."""
    return replies.refusal()


@stage_as("H12", "plain", "padding")
def h12(variant: str) -> Reply:
    """Answer as one JSON, for a request that is not streamed."""
    padding = b"\n   \n\n" if variant == "padding" else b""
    return replace(replies.text("Hello.", HELLO), padding=padding)


def _usage(**changes: Any) -> Ending:
    return completed(lambda r: r | {"usage": r["usage"] | changes})


def _without_cost(response: dict[str, Any]) -> dict[str, Any]:
    usage = {key: v for key, v in response["usage"].items() if key != "cost"}
    return response | {"usage": usage}


def _without_usage(response: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in response.items() if key != "usage"}


CACHED = {"cached_tokens": 1024, "cache_write_tokens": 300}
UPSTREAM = {
    "upstream_inference_cost": 0.002,
    "upstream_inference_input_cost": 0.0012,
    "upstream_inference_output_cost": 0.0008,
}
USAGES: dict[str, Ending] = {
    "cached": _usage(input_tokens=2048, input_tokens_details=CACHED),
    "byok": _usage(is_byok=True, cost=0.0001, cost_details=UPSTREAM),
    "free": _usage(cost=0),
    "cost-null": _usage(cost=None),
    "cost-absent": completed(_without_cost),
    "scientific": _usage(cost=1.3e-05),
    "legacy-tools": _usage(server_tool_use={"web_search_requests": 1}),
    "missing": completed(_without_usage),
}


@stage_as("H13", *USAGES)
def h13(variant: str) -> Reply:
    """Report usage in another way."""
    return compose(message(deltas=HELLO), terminal=USAGES[variant])


@stage_as("H14")
def h14() -> Reply:
    """Describe the routing, if the metadata header asked."""
    return replies.text("Hello.", HELLO)


# Refusals before the stream


@stage_as("F1")
def f1(limit: int = 8192, length: int = 8900, output: int = 100) -> HttpReply:
    """Find the input too long."""
    words = context_words(limit, length, output)
    return http_error(400, words, metadata={"error_type": "context_length_exceeded"})


@stage_as("F2", "empty", "partial")
def f2(variant: str) -> Reply:
    """Find the context full while generating."""
    parts = [message(deltas=HELLO, status="incomplete")] if variant == "partial" else []
    return compose(*parts, terminal=incomplete())


@stage_as("F3")
def f3() -> HttpReply:
    """Have no credit."""
    return http_error(402, metadata={"limit_source": "openrouter_credits"})


@stage_as("F4")
def f4(wanted: int = 65536, affordable: int = 1234) -> HttpReply:
    """Have too little credit for so many tokens."""
    words = (
        "This request requires more credits, or fewer max_tokens. You requested up to "
        f"{wanted} tokens, but can only afford {affordable}."
    )
    facts = {
        "limit_source": "openrouter_credits",
        "reason": "weight_exceeds_budget",
    }
    return http_error(402, words, metadata=facts)


@stage_as("F5")
def f5() -> HttpReply:
    """Have a key at its cap."""
    words = "This key has reached its spending limit."
    return http_error(402, words, metadata={"limit_source": "openrouter_key_limit"})


@stage_as("F6")
def f6(retry_after: float = 2) -> HttpReply:
    """Have too much in flight for a moment."""
    facts = {
        "reason": "in_flight_budget_exhausted",
        "limit_source": "openrouter_in_flight_budget",
        "remedy_hint": "Wait for running requests to finish, or add credits.",
    }
    words = "Too many requests in flight for your balance."
    headers = {"Retry-After": f"{retry_after:g}"}
    return http_error(402, words, metadata=facts, headers=headers)


def _rate_limited(headers: Mapping[str, str]) -> HttpReply:
    raw = (
        "google/gemini-2.5-flash is temporarily rate-limited upstream. Please retry "
        "shortly, or add your own key to accumulate your rate limits."
    )
    facts = {
        "provider_name": "Google",
        "raw": raw,
        "error_type": "rate_limit_exceeded",
        "provider_code": "rate_limited",
    }
    return http_error(429, metadata=facts, headers=headers)


@stage_as("F7", "seconds")
def f7(retry_after: float = 1) -> HttpReply:
    """Be rate limited upstream."""
    return _rate_limited({"Retry-After": f"{retry_after:g}"})


@stage_as("F7", "no-header")
def f7_no_header() -> HttpReply:
    """Be rate limited for who knows how long."""
    return _rate_limited({})


@stage_as("F7", "http-date")
def f7_http_date(seconds: float = 1, now: float | None = None) -> HttpReply:
    """Be rate limited until a date."""
    import time

    until = (time.time() if now is None else now) + seconds
    return _rate_limited({"Retry-After": formatdate(until, usegmt=True)})


@stage_as("F7", "long")
def f7_long(retry_after: float = 600) -> AnyReply:
    """Be rate limited for too long."""
    return f7(retry_after)


@stage_as("F8")
def f8() -> HttpReply:
    """Be at OpenRouter's own limit."""
    headers = {
        "X-RateLimit-Limit": "50",
        "X-RateLimit-Remaining": "0",
        "X-RateLimit-Reset": "1790000000000",
    }
    words = (
        "Rate limit exceeded: free-models-per-day. Add 10 credits to unlock 1000 free "
        "model requests per day"
    )
    return http_error(429, words, metadata={"headers": headers}, headers=headers)


PROVIDER_DOWN = {
    "provider_name": "OpenAI",
    "raw": "upstream connect error or disconnect/reset before headers",
    "error_type": "provider_unavailable",
}
OVERLOADED = {
    "code": "temporarily_unavailable",
    "retryable": True,
    "retry_after": 3,
    "requested_models": ["openai/gpt-4o"],
    "docs_url": "https://openrouter.ai/docs",
}
OUTAGES: dict[str, Callable[[], HttpReply]] = {
    "502": lambda: http_error(502, metadata=PROVIDER_DOWN),
    "503": lambda: http_error(
        503,
        availability=OVERLOADED,
        metadata={"error_type": "provider_overloaded"},
        headers={"Retry-After": "3"},
    ),
    "503-plain": lambda: http_error(503),
    "500": lambda: http_error(500, metadata={"error_type": "server"}),
    "504": lambda: http_error(504, metadata={"error_type": "timeout"}),
    "524": lambda: http_error(524),
    "529": lambda: http_error(529, metadata=PROVIDER_DOWN),
    "502-html": lambda: http_error(502, html=True),
    "520-html": lambda: http_error(520, html=True),
    "524-html": lambda: http_error(524, html=True),
}


@stage_as("F9", *OUTAGES)
def f9(variant: str) -> HttpReply:
    """Be out of order."""
    return OUTAGES[variant]()


FLAGGED = {
    "reasons": ["violence"],
    "flagged_input": "first part...last part",
    "provider_name": "OpenAI",
    "model_slug": "openai/gpt-4o",
}


@stage_as("F10", "moderation", "guardrail", "as-400")
def f10(variant: str) -> HttpReply:
    """Be forbidden."""
    if variant == "guardrail":
        words = "Your input was blocked by a guardrail"
        return http_error(403, words, metadata={"patterns": ["secret-\\d+"]})
    return http_error(400 if variant == "as-400" else 403, metadata=FLAGGED)


ABSENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "privacy_restricted": (
        "No endpoints found matching your data policy.",
        {"excluded_by": ["data_policy:zdr"]},
    ),
    "constraint_filtered": (
        "No endpoints found that satisfy your constraints.",
        {"constraint": {"field": "max_price", "detail": "cheapest is 10"}},
    ),
    "no_endpoints": ("No allowed providers are available for the selected model.", {}),
}


@stage_as("F11", *ABSENCES, "plain")
def f11(variant: str) -> HttpReply:
    """Have no endpoint."""
    words, facts = ABSENCES.get(variant, ABSENCES["no_endpoints"])
    if variant == "plain":
        return http_error(404, words)
    shell = {
        "code": variant,
        "retryable": False,
        "requested_models": ["openai/gpt-4o"],
        "docs_url": "https://openrouter.ai/docs",
    }
    return http_error(404, words, availability=shell | facts)


@stage_as("F12", "anthropic", "openai")
def f12(variant: str) -> HttpReply:
    """Reject replayed reasoning; script it with `when=has_reasoning`."""
    words, code = FAULTS["signature" if variant == "anthropic" else "encrypted"]
    error = {"type": "invalid_request_error", "message": words}
    if variant == "anthropic":
        raw: dict[str, Any] = {"type": "error", "error": error}
    else:
        raw = {"error": error | {"param": None, "code": code}}
    name = {"anthropic": "Anthropic", "openai": "OpenAI"}[variant]
    facts = {"provider_name": name, "raw": to_json(raw).decode()}
    return http_error(400, "Provider returned error", metadata=facts)


@stage_as("F13", "401", "413", "408", "422")
def f13(variant: str) -> HttpReply:
    """Fail with a plain status."""
    return http_error(int(variant))


# Streams that go wrong


@stage_as("F14", "error", "failed", "empty")
def f14(variant: str) -> HttpReply:
    """Fail with status 200 and a JSON body."""
    if variant == "error":
        return replies.json_body(wrong(502, "Provider returned error"))
    fault = {"code": "server_error", "message": "Provider disconnected"}
    end = {"status": "completed", "completed_at": 1_790_000_001}
    if variant == "failed":
        end = {"status": "failed", "error": fault}
    return replies.json_body(still_scene({}).response(**end))


FLAT = {
    "type": "error",
    "code": "server_error",
    "message": "Provider disconnected",
    "param": None,
}
NESTED_ERROR = {"code": 502, "message": "Provider disconnected"}
LIMITED = {"code": 429, "message": "Rate limit exceeded"}


@stage_as("F15", "flat", "failed")
def f15(variant: str) -> Reply:
    """Fail in the first event."""
    if variant == "failed":
        fault = {"code": "server_error", "message": "Provider disconnected"}
        response = {"status": "failed", "error": fault}
        return replies.events([{"type": "response.failed", "response": response}])
    return replies.events([FLAT])


def _broken_off(terminal: Ending, end: str = "done", delay: float = 0.0) -> Reply:
    """Play H1 through event 5, then end otherwise."""
    said = message(deltas=HELLO, delay=delay, closes=False)
    return compose(said, terminal=terminal, end=end)


@stage_as("F16")
def f16(code: Any = "server_error", delay: float = 0.0) -> Reply:
    """Fail after some text."""
    return _broken_off(failed(code=code), delay=delay)


@stage_as("F17", "done", "no-done")
def f17(variant: str, delay: float = 0.0) -> Reply:
    """Send a flat error after some text."""
    return _broken_off(saying(FLAT), "done" if variant == "done" else "eof", delay)


ERRORS: dict[str, Event] = {
    "nested": {"type": "error", "error": NESTED_ERROR},
    "response.error": {"type": "response.error", "error": NESTED_ERROR},
    "untyped": {"error": LIMITED},
}


@stage_as("F18", *ERRORS)
def f18(variant: str, delay: float = 0.0) -> Reply:
    """Send an error of another shape after some text."""
    return _broken_off(saying(ERRORS[variant]), delay=delay)


@stage_as("F19")
def f19() -> Reply:
    """Reach the token limit."""
    return compose(message(deltas=HELLO, status="incomplete"), terminal=incomplete())


@stage_as("F20")
def f20() -> Reply:
    """Be stopped by a filter."""
    said = message(deltas=HELLO, status="incomplete")
    return compose(said, terminal=incomplete("content_filter"))


@stage_as("F21")
def f21() -> Reply:
    """Think until nothing is left."""
    return compose(thought(deltas=THOUGHT), terminal=incomplete())


CUTS = {"eof": "eof", "reset": "reset", "abrupt": "abrupt", "done": "done"}


@stage_as("F22", *CUTS)
def f22(variant: str, delay: float = 0.0) -> Reply:
    """Lose the stream after some text."""
    return _broken_off(replies.silence, CUTS[variant], delay)


@stage_as("F22", "mid-line")
def f22_mid_line(delay: float = 0.0) -> Reply:
    """Lose the stream inside a JSON line."""
    said = message(deltas=(*HELLO, " And here the line"), delay=delay, closes=False)
    return replies.cut_mid_line(compose(said, terminal=replies.silence, end="eof"))


@stage_as("F23", "silence")
def f23() -> Reply:
    """Fall silent after some text."""
    return _broken_off(replies.silence, "stall")


@stage_as("F23", "comments")
def f23_comments(interval: float = 0.2, comments: int = 1_500) -> Reply:
    """Send nothing but comments after some text."""
    said = message(deltas=HELLO, closes=False)
    breath = replies.keep_alive(comments, interval)
    return compose(said, breath, terminal=replies.silence, end="stall")


@stage_as("F24")
def f24(seconds: float = 60, interval: float = 1.0) -> Reply:
    """Keep the client waiting for the first token."""
    waiting = replies.keep_alive(max(1, round(seconds / interval)), interval)
    return compose(waiting, message(deltas=HELLO))


@stage_as("F25", "reset", "abrupt")
def f25(variant: str) -> HttpReply:
    """Hang up before the headers."""
    return HttpReply(0, b"", end=variant)


@stage_as("F26")
def f26() -> Reply:
    """Complete without a word."""
    return compose()


def _no_output(response: dict[str, Any]) -> dict[str, Any]:
    return response | {"output": []}


def _said_after_all(response: dict[str, Any]) -> dict[str, Any]:
    part = {"type": "output_text", "text": "Hello.", "annotations": [], "logprobs": []}
    item = {"id": "msg_tmp_snapshot001", "type": "message", "role": "assistant"}
    return response | {"output": [item | {"status": "completed", "content": [part]}]}


def _other_ids(response: dict[str, Any]) -> dict[str, Any]:
    items = [i | {"id": i["id"][:-4] + "2222"} for i in response["output"]]
    return response | {"output": items}


@stage_as("F27", "no-output")
def f27_no_output() -> Reply:
    """Forget in the snapshot what was streamed."""
    return compose(message(deltas=HELLO), terminal=completed(_no_output))


@stage_as("F27", "only-completed")
def f27_only_completed() -> Reply:
    """Say everything in the snapshot, and nothing before."""
    return compose(terminal=completed(_said_after_all))


@stage_as("F27", "other-ids")
def f27_other_ids() -> Reply:
    """Give items other ids in the snapshot."""
    parts = (thought(deltas=THOUGHT, style="text"), message(deltas=HELLO))
    return compose(*parts, terminal=completed(_other_ids))


@stage_as("F28")
def f28() -> Reply:
    """Speak of things unheard of."""
    future = {"type": "future_citation", "star": "Sirius"}
    return compose(
        event_part({"type": "response.future.thing", "thing": [1, None, {}]}),
        server_item("openrouter:future", "ft", wonder=True),
        message(deltas=HELLO, annotations=[future]),
        terminal=completed(lambda r: r | {"status": "paused", "mood": "bright"}),
    )


def _hello_with(*between: Event | bytes) -> Part:
    """Play a message with something between its deltas."""

    def play(stage: Stage) -> Any:
        for step in message(deltas=HELLO)(stage):
            if isinstance(step, Deltas):
                yield replace(step, texts=step.texts[:1])
                yield from event_part(*between)(stage)
                yield replace(step, texts=step.texts[1:])
            else:
                yield step

    return play


@stage_as("F29")
def f29() -> Reply:
    """Send a line that is no JSON."""
    return compose(_hello_with(b"data: {bad json\n\n"))


@stage_as("F30", "completed-twice", "delta-after")
def f30(variant: str) -> Reply:
    """Go on after the end."""

    def end(stage: Stage) -> Any:
        last: list[Step] = list(completed()(stage))
        late = say(
            "response.output_text.delta",
            item_id=stage.output[0]["id"],
            output_index=0,
            content_index=0,
            delta=" More!",
            logprobs=[],
        )
        yield from [*last, *(last if variant == "completed-twice" else [late])]

    return compose(message(deltas=HELLO), terminal=end)


@stage_as("F31")
def f31(model: str = "openai/gpt-4o-mini") -> Reply:
    """Answer with another model."""
    return replies.served_by(replies.text("Hello.", HELLO), model)


LEAKED = (
    "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
    "</tool_call>"
)


@stage_as("F32")
def f32() -> Reply:
    """Write a tool call as text."""
    return compose(message(LEAKED))


def _without_call_ids(event: Event) -> Event:
    if event.get("type") == "function_call":
        return {key: value for key, value in event.items() if key != "call_id"}
    return {key: _deep(value, _without_call_ids) for key, value in event.items()}


def _with_object_arguments(event: Event) -> Event:
    if event.get("arguments") == OSLO.text():
        return event | {"arguments": OSLO.arguments}
    return {key: _deep(v, _with_object_arguments) for key, v in event.items()}


def _deep(value: Any, change: Callable[[Event], Event]) -> Any:
    if isinstance(value, dict):
        return change(value)
    return [_deep(one, change) for one in value] if isinstance(value, list) else value


STRANGE_CALLS: dict[str, tuple[Call, ...]] = {
    "duplicate": (
        replace(OSLO, call_id="call_same"),
        replace(ROME, call_id="call_same"),
    ),
    "missing": (OSLO, ROME),
    "blank": (replace(OSLO, call_id=""), ROME),
    "unknown-tool": (Call("no_such_tool", {"x": 1}), OSLO),
}


@stage_as("F33", *STRANGE_CALLS)
def f33(variant: str) -> Reply:
    """Call with odd ids, or a tool that nobody offered."""
    reply = replies.tool_calls(STRANGE_CALLS[variant])
    return edited(reply, _without_call_ids) if variant == "missing" else reply


@stage_as("F34")
def f34() -> Reply:
    """Send arguments as an object."""
    return edited(
        compose(function_call(replace(OSLO, deltas=0))), _with_object_arguments
    )


__all__ = ["SCENARIOS", "has_reasoning", "listing", "scenario", "variants"]
