"""The simulator's streams: scenarios, schemas, framings, persona; mostly no server."""

import base64
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.simulator import (
    FRAMINGS,
    SCENARIOS,
    Simulator,
    framing,
    replies,
    scenario,
    variants,
)
from tests.simulator.catalog import Catalog
from tests.simulator.framing import framed, sizes, split_at
from tests.simulator.persona import PROMPTS
from tests.simulator.replies import Reply
from tests.simulator.scenarios import has_reasoning
from tests.simulator.scene import still_scene
from tests.simulator.side import providers

REFERENCE = Path(
    os.environ.get("OPENROUTER_REFERENCE")
    or Path(__file__).parents[1].parent / "shared" / "reference"
)
CLAUDE = "anthropic/claude-sonnet-4.5"
STREAMED = {"model": "openai/gpt-4o", "input": "Hi", "stream": True}
ENCRYPTED = {"include": ["reasoning.encrypted_content"]}
ALL = [(name, variant) for name in SCENARIOS for variant in variants(name)]
BROKEN = {("F22", "mid-line"), ("F29", "default")}
STREAMS = [p for p in ALL if isinstance(scenario(*p), Reply) and p not in BROKEN]
HAPPY = [pair for pair in ALL if pair[0].startswith("H")]


def body_for(name: str) -> dict[str, Any]:
    model = {"H5": CLAUDE, "H2": "deepseek/deepseek-r1", "H3": "openai/gpt-5"}
    return STREAMED | ENCRYPTED | {"model": model.get(name, STREAMED["model"])}


def decode(data: bytes) -> list[str]:
    """Decode server-sent events as the HTML standard says: the payloads, in order."""
    text = data.decode("utf-8").removeprefix("\ufeff")
    payloads, lines = [], []
    for line in re.split(r"\r\n|\n|\r", text):
        if line.startswith("data:"):
            lines.append(line[5:].removeprefix(" "))
        elif not line and lines:
            payloads.append("\n".join(lines))
            lines = []
    return payloads


def events_of(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(payload) for payload in decode(data) if payload != "[DONE]"]


def events(
    name: str, variant: str | None = None, **options: Any
) -> list[dict[str, Any]]:
    return events_of(replies.body(scenario(name, variant, **options), body_for(name)))


def types(happened: list[dict[str, Any]]) -> list[str]:
    return [
        str(event.get("type", "untyped")).removeprefix("response.")
        for event in happened
    ]


def text_of(happened: list[dict[str, Any]]) -> str:
    deltas = (e for e in happened if e.get("type") == "response.output_text.delta")
    return "".join(event["delta"] for event in deltas)


# The sequences of §9.4

H1 = [
    "created",
    "in_progress",
    "output_item.added",
    "content_part.added",
    "output_text.delta",
    "output_text.delta",
    "output_text.done",
    "content_part.done",
    "output_item.done",
    "completed",
]
MESSAGE = H1[2:9]
OPENING = ["created", "in_progress"]
RAW = ["output_item.added", "content_part.added", *["reasoning_text.delta"] * 2]
RAW_END = ["reasoning_text.done", "content_part.done", "output_item.done"]
SUMMARY = [
    "reasoning_summary_part.added",
    *["reasoning_summary_text.delta"] * 2,
    "reasoning_summary_text.done",
    "reasoning_summary_part.done",
]
CALL = ["output_item.added", *["function_call_arguments.delta"] * 2]
CALL_END = ["function_call_arguments.done", "output_item.done"]
SEARCH = [
    "output_item.added",
    *(f"web_search_call.{verb}" for verb in ("in_progress", "searching", "completed")),
    "output_item.done",
]
PICTURE = ["output_item.added", "image_generation_call.in_progress"]
PICTURE_END = ["image_generation_call.completed", "output_item.done"]
GENERATING = "image_generation_call.generating"
PARTIAL = "image_generation_call.partial_image"
BARE = ["output_item.added", "output_item.done"]
SEQUENCES: dict[tuple[str, str], list[str]] = {
    ("H1", "default"): H1[2:9],
    ("H2", "late"): RAW + MESSAGE + RAW_END,
    ("H2", "tidy"): RAW + RAW_END + MESSAGE,
    ("H3", "one"): [BARE[0], *SUMMARY, BARE[1], *MESSAGE],
    ("H3", "two"): [BARE[0], *SUMMARY, *SUMMARY, BARE[1], *MESSAGE],
    ("H4", "default"): BARE + MESSAGE,
    ("H5", "default"): RAW + RAW_END + CALL + CALL_END,
    ("H6", "deltas"): CALL + CALL_END,
    ("H6", "no-deltas"): CALL[:1] + CALL_END,
    ("H7", "sequential"): 2 * (CALL + CALL_END),
    ("H7", "interleaved"): 2 * CALL[:1] + 4 * CALL[1:2] + 2 * CALL_END,
    ("H8", "empty"): [],
    ("H10", "base64"): [*PICTURE, GENERATING, *PICTURE_END],
    ("H10", "partials"): [*PICTURE, GENERATING, PARTIAL, PARTIAL, *PICTURE_END],
    ("H10", "completed-only"): [],
    ("H10", "server-tool-url"): BARE
    + MESSAGE[:2]
    + ["output_text.delta"]
    + MESSAGE[4:],
}


@pytest.mark.parametrize("pair", SEQUENCES, ids="-".join)
def test_happy_paths_happen_in_order(pair: tuple[str, str]) -> None:
    assert types(events(*pair)) == [*OPENING, *SEQUENCES[pair], "completed"]


def test_a_search_precedes_its_citations() -> None:
    happened = types(events("H9"))
    assert happened[2:7] == SEARCH
    assert happened.count("output_text.annotation.added") == 2
    assert happened.index("output_text.annotation.added") > happened.index(
        "output_text.delta"
    )
    assert happened.index("output_text.annotation.added") < happened.index(
        "output_text.done"
    )


@pytest.mark.parametrize("pair", STREAMS, ids="-".join)
def test_sequence_numbers_have_no_gap(pair: tuple[str, str]) -> None:
    happened = events(*pair)
    numbers = [e["sequence_number"] for e in happened if "type" in e]
    assert numbers == list(range(len(numbers)))


SPOKEN = [pair for pair in HAPPY if pair[1] != "completed-only"]


@pytest.mark.parametrize("pair", SPOKEN, ids="-".join)
def test_the_snapshot_agrees_with_the_stream(pair: tuple[str, str]) -> None:
    happened = events(*pair)
    items = {
        e["output_index"]: e["item"]
        for e in happened
        if "output_item.done" in e["type"]
    }
    output = happened[-1]["response"]["output"]
    streamed = [items[index] for index in sorted(items)]
    if pair == ("H2", "late"):
        assert output[0]["id"] != streamed[0]["id"]
        output, streamed = output[1:], streamed[1:]
    assert output == streamed
    parts = [p for item in output if item["type"] == "message" for p in item["content"]]
    assert "".join(p.get("text", "") for p in parts) == text_of(happened)


@pytest.mark.parametrize("pair", HAPPY, ids="-".join)
def test_streams_end_with_done(pair: tuple[str, str]) -> None:
    data = replies.body(scenario(*pair), body_for(pair[0]))
    assert data.startswith(b": OPENROUTER PROCESSING\n\n")
    assert data.endswith(b"\n\ndata: [DONE]\n\n")


def test_what_the_variants_differ_in() -> None:
    def search(variant: str) -> Any:
        return events("H9", variant)

    annotations = [e["annotation"] for e in search("repeated") if "annotation" in e]
    assert len({a["url"] for a in annotations}) == 1 < len(annotations)
    assert not [e for e in search("final-part") if "annotation" in e]
    assert search("final-part")[-2]["item"]["content"][0]["annotations"]
    assert not search("completed-only")[-2]["item"]["content"][0]["annotations"]
    assert search("completed-only")[-1]["response"]["output"][1]["content"][0][
        "annotations"
    ]
    assert (
        "title"
        not in next(e for e in search("untitled") if "annotation" in e)["annotation"]
    )
    assert "web_search" not in str(search("plugin")[:-1])
    usage = search("several")[-1]["response"]["usage"]
    assert usage["server_tool_use_details"]["web_search_requests"] == 3
    assert events("H6", "empty")[-1]["response"]["output"][0]["arguments"] == ""
    unicode = events("H6", "unicode")[-1]["response"]["output"][0]["arguments"]
    assert json.loads(unicode) == {"city": "Ås 🌧"}
    truncated = events("H6", "truncated")
    assert truncated[-1]["type"] == "response.incomplete"
    with pytest.raises(ValueError, match="Unterminated"):
        json.loads(truncated[-1]["response"]["output"][0]["arguments"])
    large = replies.body(scenario("H10", "large"), body_for("H10"))
    assert max(map(len, large.split(b"\n"))) > 4_000_000


def test_images_are_valid_and_come_in_three_forms() -> None:
    def result(variant: str) -> str:
        return events("H10", variant)[-1]["response"]["output"][0]["result"]

    bare = result("base64")
    assert base64.b64decode(bare).startswith(b"\x89PNG\r\n\x1a\n")
    assert result("data_url").startswith("data:image/png;base64,iVBOR")
    assert result("url").startswith("https://")


USAGES = {
    "cached": lambda u: u["input_tokens_details"]["cached_tokens"] == 1024,
    "byok": lambda u: u["is_byok"] and u["cost"] == 0.0001,
    "free": lambda u: u["cost"] == 0,
    "cost-null": lambda u: u["cost"] is None,
    "cost-absent": lambda u: "cost" not in u,
    "scientific": lambda u: u["cost"] == 1.3e-05,
    "legacy-tools": lambda u: "server_tool_use" in u,
}


@pytest.mark.parametrize("variant", USAGES)
def test_usage_comes_in_variants(variant: str) -> None:
    assert USAGES[variant](events("H13", variant)[-1]["response"]["usage"])


def test_usage_may_be_missing() -> None:
    assert "usage" not in events("H13", "missing")[-1]["response"]
    assert b"1.3e-05" in replies.body(scenario("H13", "scientific"), STREAMED)


# Schemas


@cache
def schemas() -> dict[str, Any]:
    path = REFERENCE / "openrouter-openapi.yaml"
    if not path.exists():
        pytest.skip("the OpenAPI document is not here")
    yaml = pytest.importorskip("yaml")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path.read_bytes(), Loader=loader)["components"]["schemas"]


def corrected(schema: Any) -> Any:
    """Merge `allOf` so that the override wins, and treat `oneOf` as `anyOf`."""
    if isinstance(schema, list):
        return [corrected(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {k: v for k, v in schema.items() if k not in ("example", "discriminator")}
    if "allOf" in schema:
        schema = merged(schema.pop("allOf"), schema)
    if "oneOf" in schema:
        schema["anyOf"] = schema.pop("oneOf")
    properties = schema.get("properties")
    if isinstance(properties, dict) and "usage" in properties:
        usage = {"anyOf": [properties["usage"], {"type": "null"}]}
        schema["properties"] = properties | {"usage": usage}
    return {key: corrected(value) for key, value in schema.items()}


def merged(parts: list[Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for part in [*parts, dict(rest)]:
        if "$ref" in part:
            part = schemas()[part["$ref"].rsplit("/", 1)[1]]
        if "allOf" in part:
            part = merged(
                part["allOf"], {k: v for k, v in part.items() if k != "allOf"}
            )
        properties = whole.get("properties", {}) | part.get("properties", {})
        required = sorted({*whole.get("required", []), *part.get("required", [])})
        whole = whole | part | {"properties": properties, "required": required}
    return {key: value for key, value in whole.items() if value not in ({}, [])}


@cache
def validator(name: str) -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    whole = {key: corrected(schema) for key, schema in schemas().items()}
    root = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": whole}}
    return jsonschema.Draft202012Validator(root)


@cache
def event_schemas() -> dict[str, str]:
    mapping = schemas()["StreamEvents"]["discriminator"]["mapping"]
    return {kind: reference.rsplit("/", 1)[1] for kind, reference in mapping.items()}


def faults(name: str, value: Any) -> list[str]:
    return [
        f"{list(e.path)}: {e.message:.300}" for e in validator(name).iter_errors(value)
    ]


# Off the schema on purpose, or merely large.
UNSCHEMED = {
    ("H13", "cost-null"),
    ("H13", "missing"),
    ("H9", "untitled"),
    ("H10", "large"),
}
TERMINALS = [("F2", v) for v in variants("F2")] + [
    (name, "default") for name in ("F16", "F19", "F20", "F21", "F26", "F31", "F32")
]
SCHEMED = [p for p in HAPPY if p not in UNSCHEMED] + TERMINALS


@pytest.mark.parametrize(
    "pair", [*SCHEMED, ("F15", "flat"), ("F17", "done")], ids="-".join
)
def test_events_fit_the_schemas(pair: tuple[str, str]) -> None:
    for event in events(*pair):
        assert not faults(event_schemas()[event["type"]], event), event


def test_the_schema_check_can_fail() -> None:
    event = events("H1")[4]
    assert not faults(event_schemas()[event["type"]], event)
    assert faults(event_schemas()[event["type"]], event | {"delta": 1})
    assert faults("StreamEventsResponseCompleted", event)


def test_json_answers_and_rows_fit_the_schemas() -> None:
    with Simulator(pace=0) as sim, opened(sim) as client:
        answer = client.post("/responses", json=STREAMED | {"stream": False}).json()
        rows = client.get("/models", params={"output_modalities": "all"}).json()
    assert not faults("OpenResponsesResult", answer)
    for row in rows["data"]:
        if row["id"] != "stealth/null-island":
            assert not faults("Model", row), row["id"]


def snapshot(name: str) -> list[dict[str, Any]]:
    path = REFERENCE / name
    if not path.exists():
        pytest.skip(f"{name} is not here")
    return json.loads(path.read_bytes())["data"]


def shape_of(rows: list[dict[str, Any]], *path: str) -> dict[str, set[str]]:
    """Map each key to the types of its values, in rows or in an object of theirs."""
    found: dict[str, set[str]] = {}
    for row in rows:
        inner: Any = row
        for key in path:
            inner = inner.get(key) or {}
        for key, value in inner.items():
            found.setdefault(key, set()).add(type(value).__name__)
    return found


@pytest.mark.parametrize(
    "path",
    [
        (),
        ("architecture",),
        ("pricing",),
        ("top_provider",),
        ("reasoning",),
        ("links",),
    ],
    ids="-".join,
)
def test_the_catalog_has_the_shapes_of_the_real_one(path: tuple[str, ...]) -> None:
    real = shape_of(snapshot("openrouter-models.json"), *path)
    ours = shape_of(Catalog().rows, *path)
    assert set(real) <= set(ours)
    for key in set(real) & set(ours):
        assert ours[key] >= real[key] - {"int"}, key


def test_providers_have_the_shape_of_the_real_ones() -> None:
    real = shape_of(snapshot("openrouter-providers.json"))
    assert shape_of(providers()) == real


# The faults of §9.5

STATUSES: dict[str, dict[str, int]] = {
    "F1": {"default": 400},
    "F3": {"default": 402},
    "F4": {"default": 402},
    "F5": {"default": 402},
    "F6": {"default": 402},
    "F7": dict.fromkeys(("seconds", "no-header", "http-date", "long"), 429),
    "F8": {"default": 429},
    "F9": {v: int(v[:3]) for v in variants("F9")},
    "F10": {"moderation": 403, "guardrail": 403, "as-400": 400},
    "F11": dict.fromkeys(variants("F11"), 404),
    "F12": {"anthropic": 400, "openai": 400},
    "F13": {v: int(v) for v in ("401", "413", "408", "422")},
    "F14": dict.fromkeys(("error", "failed", "empty"), 200),
}
LAST: dict[str, dict[str, str]] = {
    "F2": {"empty": "incomplete", "partial": "incomplete"},
    "F15": {"flat": "error", "failed": "failed"},
    "F16": {"default": "failed"},
    "F17": {"done": "error", "no-done": "error"},
    "F18": {"nested": "error", "response.error": "error", "untyped": "untyped"},
    "F19": {"default": "incomplete"},
    "F20": {"default": "incomplete"},
    "F21": {"default": "incomplete"},
    "F22": dict.fromkeys(("eof", "reset", "abrupt", "done"), "output_text.delta"),
    "F23": {"silence": "output_text.delta"},
    "F26": {"default": "completed"},
    "F27": dict.fromkeys(("no-output", "only-completed", "other-ids"), "completed"),
    "F28": {"default": "completed"},
    "F30": {"completed-twice": "completed", "delta-after": "output_text.delta"},
    "F31": {"default": "completed"},
    "F32": {"default": "completed"},
    "F33": dict.fromkeys(
        ("duplicate", "missing", "blank", "unknown-tool"), "completed"
    ),
    "F34": {"default": "completed"},
}


def test_every_scenario_of_the_reference_is_there() -> None:
    assert list(SCENARIOS) == [f"H{n}" for n in range(1, 15)] + [
        f"F{n}" for n in range(1, 35)
    ]


def opened(sim: Simulator, timeout: float = 10) -> httpx.Client:
    return httpx.Client(
        base_url=sim.base_url,
        headers={"Authorization": f"Bearer {sim.api_key}"},
        timeout=timeout,
        trust_env=False,
    )


@pytest.fixture(scope="module")
def shared() -> Iterator[Simulator]:
    with Simulator(pace=0) as simulator:
        yield simulator


@pytest.fixture(scope="module")
def client(shared: Simulator) -> Iterator[httpx.Client]:
    with opened(shared) as open_client:
        yield open_client


@pytest.fixture
def sim(shared: Simulator) -> Simulator:
    shared.reset()
    return shared


@pytest.mark.parametrize(
    ("name", "variant", "status"),
    [(n, v, status) for n, table in STATUSES.items() for v, status in table.items()],
)
def test_http_faults_have_their_status(
    sim: Simulator, client: httpx.Client, name: str, variant: str, status: int
) -> None:
    assert set(STATUSES[name]) == set(variants(name))
    sim.script(scenario(name, variant))
    response = client.post("/responses", json=STREAMED)
    assert response.status_code == status
    if variant.endswith("html"):
        assert response.headers["content-type"].startswith("text/html")
        assert "Cloudflare" in response.text
    elif status != 200:
        assert response.json()["error"]["code"] == status
    assert client.post("/responses", json=STREAMED).status_code == 200


@pytest.mark.parametrize(
    ("name", "variant", "last"),
    [(n, v, last) for n, table in LAST.items() for v, last in table.items()],
)
def test_stream_faults_end_as_written(name: str, variant: str, last: str) -> None:
    assert types(events(name, variant))[-1] == last


def test_what_the_http_faults_say(sim: Simulator, client: httpx.Client) -> None:
    def answer(*scene: str, **options: Any) -> tuple[httpx.Headers, Any]:
        sim.script(scenario(*scene, **options))
        response = client.post("/responses", json=STREAMED)
        return response.headers, response.json()

    def error(*scene: str) -> Any:
        return answer(*scene)[1]["error"]

    assert error("F1")["metadata"]["error_type"] == "context_length_exceeded"
    assert "can only afford 1234" in error("F4")["message"]
    limits = [error(name)["metadata"]["limit_source"] for name in ("F3", "F5", "F6")]
    assert limits == [
        "openrouter_credits",
        "openrouter_key_limit",
        "openrouter_in_flight_budget",
    ]
    assert answer("F6")[0]["retry-after"] == "2"
    assert "retry-after" not in answer("F3")[0]
    assert answer("F7", retry_after=3)[0]["retry-after"] == "3"
    assert "retry-after" not in answer("F7", "no-header")[0]
    assert answer("F7", "http-date")[0]["retry-after"].endswith(" GMT")
    assert answer("F7", "long")[0]["retry-after"] == "600"
    headers, body = answer("F8")
    said = body["error"]["metadata"]["headers"]
    assert headers["x-ratelimit-reset"] == said["X-RateLimit-Reset"] == "1790000000000"
    assert error("F9", "503")["availability"]["retryable"] is True
    assert error("F10")["metadata"]["reasons"] == ["violence"]
    assert error("F10", "guardrail")["metadata"]["patterns"]
    assert (
        error("F11", "privacy_restricted")["availability"]["code"]
        == "privacy_restricted"
    )
    assert "availability" not in error("F11", "plain")
    raw = json.loads(error("F12", "openai")["metadata"]["raw"])
    assert raw["error"]["code"] == "invalid_encrypted_content"
    assert answer("F14", "error")[1]["error"]["code"] == 502
    failed = answer("F14", "failed")[1]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
    assert answer("F14", "empty")[1]["output"] == []


def test_a_replay_is_rejected_only_when_it_holds_reasoning(
    sim: Simulator, client: httpx.Client
) -> None:
    sim.script(scenario("F12").forever(), when=has_reasoning)
    thought = {"type": "reasoning", "id": "rs_1", "summary": []}
    items = [
        {"role": "user", "content": "Hi"},
        thought,
        {"role": "assistant", "content": "Yo"},
    ]
    model = {"model": "deepseek/deepseek-r1"}
    refused = client.post("/responses", json=STREAMED | model | {"input": items})
    assert refused.status_code == 400
    del items[1]
    assert client.post(
        "/responses", json=STREAMED | model | {"input": items}
    ).is_success


def test_what_the_stream_faults_hold() -> None:
    failed = events("F16")[-1]["response"]
    assert failed["error"]["message"] == "Provider disconnected"
    assert failed["output"][0]["status"] == "incomplete"
    assert failed["output"][0]["content"][0]["text"] == "Hello."
    reasons = [
        events(n)[-1]["response"]["incomplete_details"]["reason"]
        for n in ("F19", "F20")
    ]
    assert reasons == ["max_output_tokens", "content_filter"]
    assert [i["type"] for i in events("F21")[-1]["response"]["output"]] == ["reasoning"]
    assert events("F26")[-1]["response"]["usage"]["output_tokens"] == 0
    assert text_of(events("F27", "only-completed")) == ""
    assert "Hello." in str(events("F27", "only-completed")[-1])
    assert events("F27", "no-output")[-1]["response"]["output"] == []
    streamed = {e["item"]["id"] for e in events("F27", "other-ids") if "item" in e}
    final = {i["id"] for i in events("F27", "other-ids")[-1]["response"]["output"]}
    assert not streamed & final
    strange = events("F28")
    assert "response.future.thing" in [e["type"] for e in strange]
    assert strange[-1]["response"]["status"] == "paused"
    assert text_of(strange) == "Hello."
    assert types(events("F30", "completed-twice"))[-2:] == ["completed", "completed"]
    assert events("F31")[0]["response"]["model"] == "openai/gpt-4o-mini"
    assert "<tool_call>" in text_of(events("F32"))

    def ids(variant: str) -> list[Any]:
        output = events("F33", variant)[-1]["response"]["output"]
        return [item.get("call_id") for item in output]

    assert ids("duplicate") == ["call_same", "call_same"]
    assert ids("missing") == [None, None]
    assert ids("blank")[0] == ""
    assert events("F34")[-1]["response"]["output"][0]["arguments"] == {"city": "Oslo"}


def test_broken_lines_are_broken() -> None:
    data = replies.body(scenario("F29"), STREAMED)
    assert b"data: {bad json\n\n" in data
    good = [p for p in decode(data) if not p.startswith("{bad") and p != "[DONE]"]
    assert text_of([json.loads(payload) for payload in good]) == "Hello."
    cut = replies.body(scenario("F22", "mid-line"), STREAMED)
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut.rsplit(b"data: ", 1)[1])


@pytest.mark.parametrize("pair", ALL, ids="-".join)
def test_done_is_sent_where_the_reference_has_it(pair: tuple[str, str]) -> None:
    reply = scenario(*pair)
    without = {
        ("F17", "no-done"),
        *(("F22", v) for v in variants("F22") if v != "done"),
    }
    has_done = isinstance(reply, Reply) and pair not in without and pair[0] != "F23"
    data = replies.body(reply, body_for(pair[0]))
    assert data.endswith(b"data: [DONE]\n\n") is has_done


@pytest.mark.parametrize(
    ("name", "variant", "problem"),
    [
        ("F22", "eof", None),
        ("F22", "mid-line", None),
        ("F22", "abrupt", httpx.RemoteProtocolError),
        ("F22", "reset", httpx.ReadError),
        ("F23", "silence", httpx.ReadTimeout),
        ("F25", "reset", httpx.ReadError),
        ("F25", "abrupt", httpx.RemoteProtocolError),
    ],
)
def test_connections_end_as_written(
    sim: Simulator, name: str, variant: str, problem: type[Exception] | None
) -> None:
    sim.script(scenario(name, variant))
    got = b""
    with (
        opened(sim, timeout=0.5 if name == "F23" else 10) as own,
        pytest.raises(problem) if problem else nullcontext(),
        own.stream("POST", "/responses", json=STREAMED) as response,
    ):
        for chunk in response.iter_bytes():
            got += chunk
    assert (b'"lo."' in got) is (name != "F25")
    if name != "F23":
        assert not sim.posts[0].cut_by_client


@pytest.mark.parametrize("address", ["refused_url", "tls_url", "unresolvable_url"])
def test_connections_can_fail_before_they_begin(sim: Simulator, address: str) -> None:
    with pytest.raises(httpx.ConnectError):
        httpx.post(getattr(sim, address) + "/responses", timeout=5, trust_env=False)


def test_waiting_for_the_first_token(sim: Simulator, client: httpx.Client) -> None:
    sim.script(scenario("F24", seconds=0.3, interval=0.1))
    began = time.monotonic()
    data = client.post("/responses", json=STREAMED).content
    assert 0.3 <= time.monotonic() - began < 3
    assert data.count(b": OPENROUTER PROCESSING") == 4
    assert text_of(events_of(data)) == "Hello."


# Not streamed


@pytest.mark.parametrize(
    ("pair", "status", "state"),
    [
        (("H1", "default"), 200, "completed"),
        (("H12", "padding"), 200, "completed"),
        (("F16", "default"), 200, "failed"),
        (("F19", "default"), 200, "incomplete"),
        (("F15", "flat"), 502, None),
    ],
)
def test_scenarios_answer_requests_that_are_not_streamed(
    sim: Simulator, client: httpx.Client, pair: tuple[str, str], status: int, state: Any
) -> None:
    sim.script(scenario(*pair))
    response = client.post("/responses", json=STREAMED | {"stream": False})
    assert response.status_code == status
    assert response.headers["content-type"].startswith("application/json")
    assert response.json().get("status") == state
    assert (response.content[:1] == b"\n") is (pair[1] == "padding")


# Framing (§9.6)

TRICKY = 'Naïve 🚣‍♀️ “quotes”\n\nline\u2028two\u2029three \\ "json" data: no'


@pytest.mark.parametrize("name", FRAMINGS)
@pytest.mark.parametrize("length", [3, 40])
def test_framings_keep_the_events(name: str, length: int) -> None:
    reply = replies.text(TRICKY, length)
    plain = events_of(replies.body(reply, STREAMED))
    data = replies.body(framing(reply, name), STREAMED)
    payloads = decode(data if name != "no-final-blank" else data + b"\n\n")
    ours = payloads[: payloads.index("[DONE]")]
    framed_events = [json.loads(payload) for payload in ours]
    for event in framed_events:
        event.pop("obfuscation", None)
    assert framed_events == plain
    assert text_of(plain) == TRICKY


MARKS: dict[str, Any] = {
    "crlf": lambda data, chunks: b"\r\n" in data and not re.search(rb"[^\r]\n", data),
    "crlf-torn": lambda data, chunks: any(c.startswith(b"\n") for c in chunks),
    "crlf-every-byte": lambda data, chunks: (
        b"\r" in chunks and max(map(len, chunks)) == 1
    ),
    "every-byte": lambda data, chunks: max(map(len, chunks)) == 1 < len(chunks),
    "per-line": lambda data, chunks: all(c.index(b"\n") == len(c) - 1 for c in chunks),
    "one-chunk": lambda data, chunks: len(chunks) == 1,
    "event-lines": lambda data, chunks: b"event: response.created\ndata: {" in data,
    "id-lines": lambda data, chunks: (
        b"\nretry: 3000\n\n" in data and b"id: 1\n" in data
    ),
    "no-space": lambda data, chunks: b'data:{"' in data and b"data: {" not in data,
    "multi-line-data": lambda data, chunks: b'",\ndata: "sequence_number"' in data,
    "comments": lambda data, chunks: b"\n:\n\n" in data and b"\n: data: {}\n" in data,
    "bom": lambda data, chunks: data.startswith(b"\xef\xbb\xbf"),
    "separators": lambda data, chunks: "\u2028".encode() in data and b"\\ud800" in data,
    "trailing": lambda data, chunks: not data.endswith(b"[DONE]\n\n"),
    "trailing-one-chunk": lambda data, chunks: len(chunks) == 1 and b"garbage" in data,
    "no-final-blank": lambda data, chunks: data.endswith(b"[DONE]"),
    "odd-sizes": lambda data, chunks: [len(c) for c in chunks[:2]] == [7, 1],
    "lf": lambda data, chunks: b"\r" not in data,
}


@pytest.mark.parametrize("name", FRAMINGS)
def test_framings_do_what_they_are_named_for(name: str) -> None:
    chunks = [
        c for _, c in replies.chunks(framing(replies.text("Hello."), name), STREAMED)
    ]
    assert MARKS[name](b"".join(chunks), chunks)


def test_a_stream_can_be_cut_anywhere() -> None:
    whole = replies.body(replies.text(TRICKY), STREAMED)
    for offset in range(0, len(whole), 7):
        reply = framed(replies.text(TRICKY), split_at(offset))
        parts = [chunk for _, chunk in replies.chunks(reply, STREAMED)]
        assert (len(parts[0]), b"".join(parts)) == (offset, whole)
    reply = framed(replies.text(TRICKY), sizes(5, 3))
    assert b"".join(c for _, c in replies.chunks(reply, STREAMED)) == whole


def test_lone_surrogates_are_escaped() -> None:
    data = replies.body(replies.text("bad \ud83d end"), STREAMED)
    assert b"\\ud83d" in data
    assert text_of(events_of(data)) == "bad \ud83d end"


@pytest.mark.parametrize("name", FRAMINGS)
def test_framings_travel_over_http(
    sim: Simulator, client: httpx.Client, name: str
) -> None:
    reply = framing(replies.text("Hello."), name)
    sim.script(reply)
    got = client.post("/responses", json=STREAMED).content
    assert len(got) == len(replies.body(reply, STREAMED))


# Raw events


def test_raw_events_are_completed_and_cut() -> None:
    happened = [
        {"type": "response.created", "response": {"status": "in_progress"}},
        b": hello\n\n",
        (0.5, {"type": "x.y", "sequence_number": 9}),
        {"no": "type"},
    ]
    chunks = replies.chunks(replies.events(happened), STREAMED)
    assert [delay for delay, _ in chunks] == [0, 0, 0.5, 0, 0]
    first, strange, bare = events_of(b"".join(chunk for _, chunk in chunks))
    assert first["response"]["object"] == "response"
    assert (strange["sequence_number"], bare) == (9, {"no": "type"})
    cut = replies.body(replies.events(happened, cut="mid-line"), STREAMED)
    assert cut.endswith(b'\ndata: {"no')


# Chat completions


def chat(client: httpx.Client, text: str = "Hi", **fields: Any) -> httpx.Response:
    messages = fields.pop("messages", [{"role": "user", "content": text}])
    body = {"model": "openai/gpt-4o", "messages": messages, "stream": True, **fields}
    return client.post("/chat/completions", json=body)


def joined(chunks: list[dict[str, Any]], key: str) -> str:
    return "".join(c["choices"][0]["delta"].get(key) or "" for c in chunks)


def test_chat_mirrors_the_plain_stream(sim: Simulator, client: httpx.Client) -> None:
    sim.script(scenario("H1"))
    response = chat(client)
    chunks = events_of(response.content)
    assert response.content.endswith(b"data: [DONE]\n\n")
    assert joined(chunks, "content") == "Hello."
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [
        None,
        None,
        "stop",
        "stop",
    ]
    assert [("usage" in c) for c in chunks] == [False, False, False, True]
    usage = chunks[-1]["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert chunks[0]["id"] == response.headers["x-generation-id"]
    assert chunks[0]["provider"] == "OpenAI"


def test_chat_streams_reasoning_and_calls(sim: Simulator, client: httpx.Client) -> None:
    calls = [("get_weather", {"city": "Oslo"}), ("get_time", {})]
    sim.script(replies.tool_calls(calls, think="Let me see now"))
    chunks = events_of(chat(client, model=CLAUDE).content)
    assert joined(chunks, "reasoning") == "Let me see now"
    built: dict[int, dict[str, str]] = {}
    for chunk in chunks:
        for call in chunk["choices"][0]["delta"].get("tool_calls") or []:
            slot = built.setdefault(
                call["index"], {"name": "", "arguments": "", "id": ""}
            )
            slot["id"] += call.get("id", "")
            slot["name"] += call["function"].get("name", "")
            slot["arguments"] += call["function"]["arguments"]
    assert [(s["name"], json.loads(s["arguments"])) for s in built.values()] == calls
    assert all(slot["id"].startswith("toolu_") for slot in built.values())
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    details = [
        d for c in chunks for d in c["choices"][0]["delta"].get("reasoning_details", [])
    ]
    assert any(detail.get("signature") for detail in details)


def test_chat_carries_images_citations_and_failures(
    sim: Simulator, client: httpx.Client
) -> None:
    sim.script(scenario("H10"), scenario("H9"), scenario("F16"), scenario("F3"))
    drawn = events_of(chat(client).content)
    (image,) = [c for c in drawn if "images" in c["choices"][0]["delta"]]
    url = image["choices"][0]["delta"]["images"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,iVBOR")
    cited = [
        c["choices"][0]["delta"].get("annotations")
        for c in events_of(chat(client).content)
    ]
    assert [a[0]["url_citation"]["title"] for a in cited if a] == [
        "Fjords of Norway",
        "Boats",
    ]
    failed = events_of(chat(client).content)[-1]
    assert failed["error"]["message"] == "Provider disconnected"
    assert failed["choices"][0]["finish_reason"] == "error"
    assert chat(client).status_code == 402


def test_chat_answers_in_one_piece_too(sim: Simulator, client: httpx.Client) -> None:
    sim.script(replies.tool_calls([("f", {"a": 1})], say="Wait.", think="Hm."))
    answer = chat(client, stream=False).json()
    message = answer["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == ("Wait.", "Hm.")
    assert message["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    assert answer["choices"][0]["finish_reason"] == "tool_calls"


def test_chat_history_is_understood(sim: Simulator, client: httpx.Client) -> None:
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "f", "arguments": "{}"},
    }
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Use the tool"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "forty-two"},
    ]
    nested = {"type": "function", "function": {"name": "f", "parameters": {}}}
    chunks = events_of(chat(client, messages=history, tools=[nested]).content)
    assert "forty-two" in joined(chunks, "content")
    assert chat(client, messages=history[:3]).status_code == 400


# Speed and pace


@pytest.mark.parametrize("path", ["/responses", "/chat/completions"])
def test_the_benchmark_gets_what_it_orders(
    sim: Simulator, client: httpx.Client, path: str
) -> None:
    order = "bench deltas=300 delay_ms=1"
    message = {"messages": [{"role": "user", "content": order}], "input": order}
    began = time.monotonic()
    data = client.post(path, json=STREAMED | message).content
    took = time.monotonic() - began
    happened = events_of(data)
    text = text_of(happened) if path == "/responses" else joined(happened, "content")
    assert text.split() == [f"word{n}" for n in range(300)]
    assert 0.3 <= took < 3


def test_many_deltas_are_rendered_in_linear_time() -> None:
    def cost(count: int) -> float:
        began = time.process_time()
        texts = ["word "] * count
        for _ in replies.text(deltas=texts).chunks(still_scene(STREAMED)):
            pass
        return time.process_time() - began

    cost(100)
    small, large = min(cost(10_000) for _ in range(3)), cost(100_000)
    assert large < 30 * small


# The persona


def persona(client: httpx.Client, prompt: str, **fields: Any) -> list[dict[str, Any]]:
    response = client.post("/responses", json=STREAMED | {"input": prompt} | fields)
    assert response.status_code == 200, response.text
    return events_of(response.content)


WEATHER = {
    "type": "function",
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"enum": ["celsius", "kelvin"]},
        },
        "required": ["city", "days", "unit"],
    },
}
SHOWN: dict[str, Any] = {
    "Table": lambda e: "| Danube |" in text_of(e),
    "Code": lambda e: "```python" in text_of(e),
    "Image": lambda e: (
        e[-1]["response"]["output"][0]["type"] == "image_generation_call"
    ),
    "Citations": lambda e: types(e).count("output_text.annotation.added") == 3,
    "Long story": lambda e: len(text_of(e)) > 3_000,
    "Refusal": lambda e: "refusal.done" in types(e),
    "Tool call": lambda e: e[-1]["response"]["output"][-1]["name"] == "get_weather",
    "Benchmark": lambda e: types(e).count("output_text.delta") == 1_000,
}


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda p: p.name)
def test_every_prompt_shows_what_it_promises(
    sim: Simulator, client: httpx.Client, prompt: Any
) -> None:
    if prompt.name == "Failure":
        asked = STREAMED | {"input": prompt.prompt}
        assert client.post("/responses", json=asked).status_code == 429
    elif prompt.name == "Stall":
        with opened(sim, 0.4) as own, pytest.raises(httpx.ReadTimeout):
            own.post("/responses", json=STREAMED | {"input": prompt.prompt})
    else:
        words = prompt.prompt.replace("delay_ms=10", "delay_ms=0")
        assert SHOWN[prompt.name](persona(client, words, tools=[WEATHER]))


def test_the_persona_thinks_as_its_family_does(client: httpx.Client) -> None:
    def kinds(model: str, **fields: Any) -> set[str]:
        return set(types(persona(client, "Hello", model=model, **fields)))

    assert "reasoning_summary_text.delta" in kinds("openai/gpt-5")
    assert "reasoning_text.delta" in kinds("deepseek/deepseek-r1")
    assert "reasoning_text.delta" in kinds(CLAUDE)
    assert not [kind for kind in kinds("openai/gpt-4o") if "reasoning" in kind]
    off = kinds(CLAUDE, reasoning={"enabled": False})
    assert not [kind for kind in off if "reasoning" in kind]


def test_the_persona_calls_a_tool_and_answers_with_its_output(
    sim: Simulator, client: httpx.Client
) -> None:
    fields = {
        "tools": [WEATHER],
        "include": ENCRYPTED["include"],
        "model": "openai/gpt-5",
    }
    asked = "Use a tool: what is the weather in Oslo?"
    output = persona(client, asked, **fields)[-1]["response"]["output"]
    call = output[-1]
    arguments = json.loads(call["arguments"])
    assert arguments == {"city": "Oslo", "days": 1, "unit": "celsius"}
    result = {
        "type": "function_call_output",
        "call_id": call["call_id"],
        "output": "4 °C",
    }
    items = [{"role": "user", "content": asked}, *output, result]
    assert "4 °C" in text_of(persona(client, items, **fields))  # type: ignore[arg-type]
    silent = persona(client, asked, tools=[WEATHER], tool_choice="none")
    assert silent[-1]["response"]["output"][-1]["type"] == "message"


@pytest.mark.parametrize(
    ("task", "key"),
    [
        ('Generate a title.\nJSON format: { "title": "your title" }', "title"),
        ('Generate tags.\nJSON format: { "tags": ["tag1", "title"] }', "tags"),
        ('Suggest questions.\n{ "follow_ups": ["Question 1?"] }', "follow_ups"),
        ('Generate queries.\n{"queries": ["query1"]}', "queries"),
    ],
)
def test_tasks_get_the_json_that_they_ask_for(
    client: httpx.Client, task: str, key: str
) -> None:
    answer = persona(client, f"### Task:\n{task}", model="openai/gpt-5")
    assert list(json.loads(text_of(answer))) == [key]


def test_the_persona_speaks_at_a_human_pace() -> None:
    with Simulator(pace=0.01) as sim, opened(sim) as own:
        began = time.monotonic()
        happened = persona(own, "Show me a table")
        took = time.monotonic() - began
    deltas = types(happened).count("output_text.delta")
    assert deltas > 10
    assert deltas * 0.01 <= took < deltas * 0.01 + 3
