"""The simulator over HTTP: verdicts, catalog, account, ledger, hanging up."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.simulator import Remote, Simulator, replies, scenario
from tests.simulator.catalog import Catalog, Resolved
from tests.simulator.scene import compute_cost
from tests.simulator.validation import KNOWN_KEYS, Policy, judge

ROOT = Path(__file__).parents[1]
MODEL = "openai/gpt-4o"
CLAUDE = "anthropic/claude-sonnet-4.5"
ENCRYPTED = ["reasoning.encrypted_content"]
TOOL = {
    "type": "function",
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}


@pytest.fixture(scope="module")
def shared() -> Iterator[Simulator]:
    with Simulator(pace=0) as simulator:
        yield simulator


@pytest.fixture
def sim(shared: Simulator) -> Simulator:
    shared.reset()
    return shared


@contextmanager
def client_of(sim: Simulator, **headers: str) -> Generator[httpx.Client]:
    authorization = {"Authorization": f"Bearer {sim.api_key}"}
    with httpx.Client(
        base_url=sim.base_url,
        headers=authorization | headers,
        timeout=10,
        trust_env=False,
    ) as client:
        yield client


@pytest.fixture
def client(sim: Simulator) -> Iterator[httpx.Client]:
    with client_of(sim) as opened:
        yield opened


def ask(client: httpx.Client, input_: Any = "Hello", **fields: Any) -> httpx.Response:
    return client.post("/responses", json={"model": MODEL, "input": input_, **fields})


def events_of(data: bytes) -> list[dict[str, Any]]:
    lines = data.decode().replace("\r\n", "\n").split("\n")
    payloads = [line[6:] for line in lines if line.startswith("data: ")]
    return [json.loads(payload) for payload in payloads if payload != "[DONE]"]


# Verdicts (§9.2)

USER = {"role": "user", "content": "Hello"}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "fine"}
SAID = [{"type": "output_text", "text": "Hi", "annotations": []}]
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": []}
IMAGE = "data:image/png;base64,aGk="


def with_part(part: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": [part]}], **fields}


def with_items(*items: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"input": [USER, *items], **fields}


ACCEPTED: dict[str, dict[str, Any]] = {
    "easy assistant": with_items({"role": "assistant", "content": "Hi"}, USER),
    "assistant with id": with_items(
        {"type": "message", "role": "assistant", "id": "m", "content": SAID}, USER
    ),
    "assistant with id and status": with_items(
        {
            "type": "message",
            "role": "assistant",
            "id": "m",
            "status": "completed",
            "content": SAID,
        },
        USER,
    ),
    "function_call without id": with_items(CALL, OUTPUT),
    "output array": with_items(
        CALL, OUTPUT | {"output": [{"type": "input_text", "text": "fine"}]}
    ),
    "image": with_part({"type": "input_image", "detail": "auto", "image_url": IMAGE}),
    "file": with_part(
        {
            "type": "input_file",
            "filename": "a.pdf",
            "file_data": "data:application/pdf;base64,aA==",
        }
    ),
    "video": with_part(
        {"type": "input_video", "video_url": "https://example.com/v.mp4"},
        model="google/gemini-2.5-pro",
    ),
    "audio": with_part(
        {"type": "input_audio", "input_audio": {"data": "aA==", "format": "mp3"}},
        model="google/gemini-2.5-pro",
    ),
    "tool with null parameters": {"tools": [TOOL | {"parameters": None}]},
    "unknown top-level key": {"messages": []},
    "metadata at its limits": {"metadata": {f"{n:064}": "x" * 512 for n in range(16)}},
    "user of 256": {"user": "u" * 256, "session_id": "s" * 256},
    "raw reasoning to its family": with_items(
        THOUGHT | {"content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": "Hi"},
        USER,
        model="deepseek/deepseek-r1",
    ),
    "unsupported effort snaps": {
        "model": "openai/o3",
        "reasoning": {"effort": "xhigh"},
    },
    "reasoning off on an alias": {
        "model": "~google/gemini-pro-latest",
        "reasoning": {"effort": "none"},
    },
    "server tools": {"tools": [{"type": "openrouter:web_search", "parameters": {}}]},
    "online": {"model": f"{MODEL}:online"},
    "stacked variants": {"model": "meta-llama/llama-3.3-70b-instruct:free:online"},
    "preset": {"model": "@preset/mine"},
    "model at preset": {"model": f"{MODEL}@preset/mine"},
    "fallbacks": {"model": "no/body", "models": [CLAUDE]},
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepts(client: httpx.Client, case: str) -> None:
    response = ask(client, **{"input_": "Hello", **_moved(ACCEPTED[case])})
    assert response.status_code == 200, response.text
    assert response.json()["status"] == "completed"


def _moved(fields: dict[str, Any]) -> dict[str, Any]:
    return {("input_" if key == "input" else key): v for key, v in fields.items()}


SCHEMA_REJECTED: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "assistant without id": (
        with_items({"type": "message", "role": "assistant", "content": SAID}),
        [1, "id"],
    ),
    "assistant with input_text": (
        with_items(
            {
                "role": "assistant",
                "id": "m",
                "content": [{"type": "input_text", "text": "Hi"}],
            }
        ),
        [1, "content", 0, "type"],
    ),
    "reasoning without id": (
        with_items({"type": "reasoning", "summary": []}),
        [1, "id"],
    ),
    "reasoning without summary": (
        with_items({"type": "reasoning", "id": "rs"}),
        [1, "summary"],
    ),
    "reasoning summary null": (with_items(THOUGHT | {"summary": None}), [1, "summary"]),
    "function_call status null": (
        with_items(CALL | {"status": None}, OUTPUT),
        [1, "status"],
    ),
    "image without detail": (
        with_part({"type": "input_image", "image_url": IMAGE}),
        [0, "content", 0, "detail"],
    ),
    "image_url object": (
        with_part(
            {"type": "input_image", "detail": "auto", "image_url": {"url": IMAGE}}
        ),
        [0, "content", 0, "image_url"],
    ),
    "audio ogg": (
        with_part(
            {"type": "input_audio", "input_audio": {"data": "a", "format": "ogg"}}
        ),
        [0, "content", 0, "input_audio", "format"],
    ),
    "nested function tool": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        [0, "name"],
    ),
    "tool without parameters": (
        {"tools": [{"type": "function", "name": "f"}]},
        [0, "parameters"],
    ),
    "unknown tool type": ({"tools": [{"type": "teleport"}]}, [0, "type"]),
    "unknown plugin": ({"plugins": [{"id": "teleport"}]}, [0, "id"]),
    "unknown include": ({"include": ["everything"]}, [0]),
    "unknown effort": ({"reasoning": {"effort": "extreme"}}, ["effort"]),
    "unknown service tier": ({"service_tier": "gold"}, []),
    "audio modality": ({"modalities": ["audio"]}, [0]),
    "unknown provider key": ({"provider": {"zdr": True, "speed": 1}}, []),
    "metadata number": ({"metadata": {"a": 1}}, ["a"]),
    "metadata of 17": ({"metadata": {str(n): "" for n in range(17)}}, []),
    "metadata long key": ({"metadata": {"k" * 65: ""}}, ["k" * 65]),
    "metadata brackets": ({"metadata": {"a[0]": ""}}, ["a[0]"]),
    "metadata long value": ({"metadata": {"a": "x" * 513}}, ["a"]),
    "user too long": ({"user": "u" * 257}, []),
    "session too long": ({"session_id": "s" * 257}, []),
    "temperature": ({"temperature": 2.1}, []),
    "unknown item": (with_items({"type": "dream"}), [1, "type"]),
}


@pytest.mark.parametrize("case", SCHEMA_REJECTED)
def test_rejects_by_schema_and_names_the_place(client: httpx.Client, case: str) -> None:
    fields, path = SCHEMA_REJECTED[case]
    response = ask(client, **{"input_": "Hello", **_moved(fields)})
    body = response.json()
    assert response.status_code == 400
    assert body["error"]["code"] == "invalid_prompt"
    (union,) = json.loads(body["metadata"]["raw"])
    assert path in [issue["path"] for issue in union["errors"][0]]


PROVIDER = "Provider returned error"
RULE_REJECTED: dict[str, tuple[int, str, dict[str, Any]]] = {
    "store": (400, "store", {"store": True}),
    "previous response": (
        400,
        "previous_response_id",
        {"previous_response_id": "gen-1"},
    ),
    "no input": (400, "Input required", {"input": []}),
    "call without output": (400, PROVIDER, with_items(CALL)),
    "output without call": (400, PROVIDER, with_items(OUTPUT)),
    "output before call": (400, PROVIDER, with_items(OUTPUT, CALL)),
    "two outputs": (400, PROVIDER, with_items(CALL, OUTPUT, OUTPUT)),
    "mandatory reasoning by effort": (
        400,
        "Reasoning is mandatory",
        {"model": "google/gemini-2.5-pro", "reasoning": {"effort": "none"}},
    ),
    "mandatory reasoning by switch": (
        400,
        "Reasoning is mandatory",
        {"model": "openai/gpt-5", "reasoning": {"enabled": False}},
    ),
    "unknown model": (400, "not a valid model ID", {"model": "openai/gpt-99"}),
    "unknown suffix": (400, "not a valid model ID", {"model": f"{MODEL}:turbo"}),
    "tools": (404, "tool use", {"model": "deepseek/deepseek-r1", "tools": [TOOL]}),
    "image to text model": (
        404,
        "image input",
        with_part(
            {"type": "input_image", "detail": "low", "image_url": IMAGE},
            model="deepseek/deepseek-r1",
        ),
    ),
    "modalities": (404, "output modalities: image", {"modalities": ["image"]}),
    "context": (
        400,
        "maximum context length is 8192",
        {"model": "meta-llama/llama-3-8b-instruct", "input": "word " * 9_000},
    ),
    "local image": (
        400,
        PROVIDER,
        with_part({"type": "input_image", "detail": "low", "image_url": "/tmp/a.png"}),
    ),
}


@pytest.mark.parametrize("case", RULE_REJECTED)
def test_rejects_by_rule(client: httpx.Client, case: str) -> None:
    status, words, fields = RULE_REJECTED[case]
    response = ask(client, **{"input_": "Hello", **_moved(fields)})
    assert response.status_code == status
    error = response.json()["error"]
    assert error["code"] == status
    assert words in error["message"]
    if words == PROVIDER:
        assert error["metadata"]["provider_name"] == "OpenAI"


def test_an_unknown_model_is_named_in_the_availability(client: httpx.Client) -> None:
    availability = ask(client, model="no/body").json()["error"]["availability"]
    assert availability["code"] == "model_not_found"
    assert availability["requested_models"] == ["no/body"]


def test_pairing_words_are_the_providers(client: httpx.Client) -> None:
    def raw(*items: dict[str, Any]) -> str:
        return ask(client, [USER, *items]).json()["error"]["metadata"]["raw"]

    assert "No tool output found for function call c1." in raw(CALL)
    words = "No tool call found for function call output with call_id c1."
    assert words in raw(OUTPUT)


def test_both_body_styles_can_be_had() -> None:
    bad = [{"type": "reasoning", "summary": []}]
    with Simulator(error_style="envelope") as sim, client_of(sim) as client:
        assert ask(client, bad).json()["error"]["code"] == 400
    with Simulator(error_style="responses") as sim, client_of(sim) as client:
        assert ask(client, store=True).json()["error"]["code"] == "invalid_prompt"


def test_leniency_can_be_switched_on() -> None:
    easy = {"role": "assistant", "content": [{"type": "input_text", "text": "Hi"}]}
    image = with_part({"type": "input_image", "image_url": IMAGE})["input"]
    policy = Policy(assistant_input_text=True, image_without_detail=True)
    with Simulator(pace=0, policy=policy) as sim, client_of(sim) as client:
        assert ask(client, [USER, easy, USER]).status_code == 200
        assert ask(client, image).status_code == 200


NONSENSE: tuple[Any, ...] = (
    *(None, 1, True, "x", [], {}, [1], [None], [[]], [{}], {"type": []}),
    *([{"type": []}], [{"type": "message"}], [{"role": []}], [{"id": {}}]),
    *([{"role": "user", "content": [{}]}], [{"role": "assistant", "content": [1]}]),
    *([{"type": "function", "name": 1}], [{"type": "reasoning", "summary": [1]}]),
    {"format": {"type": {}}, "effort": [], "order": 1, "max_price": []},
)


@pytest.mark.parametrize("key", sorted(KNOWN_KEYS))
def test_nonsense_gets_a_verdict_too(key: str) -> None:
    catalog = Catalog()
    for value in NONSENSE:
        verdict = judge({"model": MODEL, "input": "Hi", key: value}, catalog)
        assert isinstance(verdict, Resolved) or 400 <= verdict.status < 500


def test_unknown_keys_are_listed(client: httpx.Client, sim: Simulator) -> None:
    assert ask(client, messages=[], max_tokens=1, seed=2).status_code == 200
    assert sim.posts[0].unknown_keys == ["max_tokens", "messages", "seed"]


# Reasoning integrity (F12)


def first_leg(
    client: httpx.Client, sim: Simulator, model: str, **fields: Any
) -> list[Any]:
    sim.script(replies.tool_calls([("get_weather", {"city": "Oslo"})], think="Look."))
    fields = {"include": ENCRYPTED} | fields
    answer = ask(client, model=model, tools=[TOOL], **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["output"]


def second_leg(client: httpx.Client, model: str, output: list[Any]) -> httpx.Response:
    calls = [item for item in output if item["type"] == "function_call"]
    outputs = [
        {"type": "function_call_output", "call_id": c["call_id"], "output": "4"}
        for c in calls
    ]
    return ask(client, [USER, *output, *outputs], model=model, tools=[TOOL])


FAMILIES = {
    "openai/gpt-5": "encrypted_content",
    "x-ai/grok-4": "encrypted_content",
    "google/gemini-2.5-pro": "encrypted_content",
    CLAUDE: "signature",
}


@pytest.mark.parametrize("model", FAMILIES)
def test_replayed_reasoning_is_accepted_unless_tampered_with(
    client: httpx.Client, sim: Simulator, model: str
) -> None:
    output = first_leg(client, sim, model)
    thought, key = output[0], FAMILIES[model]
    assert thought["type"] == "reasoning"
    assert second_leg(client, model, output).status_code == 200
    token = thought[key]
    thought[key] = token[:30] + ("A" if token[30] != "A" else "B") + token[31:]
    refused = second_leg(client, model, output)
    assert refused.status_code == 400
    raw = refused.json()["error"]["metadata"]["raw"]
    assert ("signature" if key == "signature" else "invalid_encrypted_content") in raw
    assert second_leg(client, model, output[1:]).status_code == 200


def test_a_signed_thought_must_keep_its_text(
    client: httpx.Client, sim: Simulator
) -> None:
    output = first_leg(client, sim, CLAUDE)
    output[0]["content"][0]["text"] += " "
    assert second_leg(client, CLAUDE, output).status_code == 400


def test_reasoning_of_another_family_is_refused(
    client: httpx.Client, sim: Simulator
) -> None:
    output = first_leg(client, sim, "openai/gpt-5")
    assert second_leg(client, "openai/gpt-5-mini", output).status_code == 200
    assert second_leg(client, CLAUDE, output).status_code == 400


def test_without_include_nothing_is_encrypted_and_the_second_leg_fails(
    client: httpx.Client, sim: Simulator
) -> None:
    output = first_leg(client, sim, "openai/gpt-5", include=[])
    assert "encrypted_content" not in output[0]
    assert "not found" in second_leg(client, "openai/gpt-5", output).text


def test_openai_reasoning_needs_its_following_item(
    client: httpx.Client, sim: Simulator
) -> None:
    thought = first_leg(client, sim, "openai/gpt-5")[0]
    refused = ask(client, [USER, thought, USER], model="openai/gpt-5")
    assert "without its required following item" in refused.text


# Auth and routes


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (None, "Missing Authentication header"),
        ("Bearer sk-or-wrong", "User not found."),
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/responses"),
        ("POST", "/chat/completions"),
        ("POST", "/embeddings"),
        ("GET", "/models/user"),
        ("GET", "/key"),
        ("GET", "/videos/x/content"),
    ],
)
def test_a_key_is_needed(
    sim: Simulator, method: str, path: str, header: str | None, words: str
) -> None:
    headers = {"Authorization": header} if header else {}
    url = sim.base_url + path
    response = httpx.request(method, url, headers=headers, trust_env=False)
    assert response.status_code == 401
    assert response.json()["error"]["message"] == words


@pytest.mark.parametrize(
    "path", ["/models", "/models/count", "/providers", "/endpoints/zdr"]
)
def test_some_endpoints_are_public(sim: Simulator, path: str) -> None:
    response = httpx.get(sim.base_url + path, trust_env=False)
    assert response.status_code == 200
    assert response.json()["data"]


def test_credits_want_the_management_key(sim: Simulator, client: httpx.Client) -> None:
    refused = client.get("/credits")
    assert refused.status_code == 403
    assert "Only management keys" in refused.json()["error"]["message"]
    with client_of(sim, Authorization=f"Bearer {sim.management_key}") as manager:
        assert manager.get("/credits").json()["data"]["total_credits"] == 100


def test_unknown_routes_answer_in_json(client: httpx.Client) -> None:
    response = client.get("/teapots")
    assert response.status_code == 404
    assert response.json() == {"error": {"code": 404, "message": "Not Found"}}
    assert client.get("/responses").status_code == 405


def test_headers_and_ids(client: httpx.Client) -> None:
    response = ask(client, stream=True)
    created = events_of(response.content)[0]["response"]
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-generation-id"] == created["id"]
    assert "cf-ray" in response.headers
    assert not [name for name in response.headers if name.startswith("x-ratelimit")]
    prefix, unix, tail = created["id"].split("-")
    assert (prefix, len(tail)) == ("gen", 20)
    assert abs(int(unix) - time.time()) < 60


def test_the_request_is_echoed(client: httpx.Client) -> None:
    fields: dict[str, Any] = {
        "instructions": "Be brief.",
        "tools": [TOOL],
        "tool_choice": "none",
        "temperature": 0.3,
        "top_p": 0.9,
        "max_output_tokens": 99,
        "metadata": {"a": "b"},
        "text": {"format": {"type": "json_object"}},
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low"},
        "prompt_cache_key": "k",
        "safety_identifier": "s",
    }
    echoed = ask(client, **fields).json()
    fields["tools"] = [TOOL | {"strict": None, "description": None}]
    assert {key: echoed[key] for key in fields} == fields


@pytest.mark.parametrize(
    ("asked", "served"),
    [
        (MODEL, MODEL),
        (f"{MODEL}:nitro", f"{MODEL}:nitro"),
        ("~openai/gpt-latest", "openai/gpt-5.5"),
        ("openrouter/auto", CLAUDE),
        ("@preset/mine", MODEL),
        (f"{CLAUDE}@preset/mine", CLAUDE),
    ],
)
def test_the_concrete_model_is_reported(
    client: httpx.Client, asked: str, served: str
) -> None:
    assert ask(client, model=asked).json()["model"] == served


def test_json_is_packed_on_wish_and_streams_never(client: httpx.Client) -> None:
    wish = {"Accept-Encoding": "gzip"}
    assert client.get("/models", headers=wish).headers["content-encoding"] == "gzip"
    plain = client.get("/models", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    body = {"model": MODEL, "input": "Tell me a story", "stream": True}
    assert (
        "content-encoding"
        not in client.post("/responses", json=body, headers=wish).headers
    )


def test_router_metadata_comes_only_on_wish(client: httpx.Client) -> None:
    body = {"model": "~openai/gpt-latest", "input": "Hello"}
    assert "openrouter_metadata" not in client.post("/responses", json=body).json()
    wish = {"X-OpenRouter-Metadata": "ENABLED"}
    told = client.post("/responses", json=body, headers=wish).json()[
        "openrouter_metadata"
    ]
    assert (told["requested"], told["strategy"]) == ("~openai/gpt-latest", "alias")


# Usage and cost


def test_cost_is_computed_from_the_prices() -> None:
    pricing = {
        "prompt": "0.000002",
        "completion": "0.00001",
        "input_cache_read": "0.0000005",
        "request": "0.001",
        "web_search": "0.01",
    }
    total, input_cost, output_cost = compute_cost(
        pricing, 1_000, 50, cached=400, searches=2
    )
    assert input_cost == pytest.approx(600 * 2e-6 + 400 * 5e-7)
    assert output_cost == pytest.approx(50 * 1e-5)
    assert total == pytest.approx(input_cost + output_cost + 0.001 + 0.02)


def test_long_prompts_cost_more_where_the_prices_say_so() -> None:
    row = Catalog().get("google/gemini-2.5-pro")
    assert row is not None
    below, above = (
        compute_cost(row["pricing"], n, 0)[0] / n for n in (199_999, 200_000)
    )
    assert above == pytest.approx(2 * below)


def test_a_router_costs_what_its_target_costs(client: httpx.Client) -> None:
    routed = ask(client, "Please refuse", model="openrouter/auto").json()["usage"]
    direct = ask(client, "Please refuse", model=CLAUDE).json()["usage"]
    assert routed == direct
    assert routed["cost"] > 0


def test_free_models_cost_nothing(client: httpx.Client) -> None:
    usage = ask(client, model="meta-llama/llama-3.3-70b-instruct:free").json()["usage"]
    assert usage["cost"] == 0
    assert usage["output_tokens"] > 0


def test_the_account_moves_with_each_answer(client: httpx.Client) -> None:
    before = client.get("/key").json()["data"]
    cost = ask(client).json()["usage"]["cost"]
    after = client.get("/key").json()["data"]
    assert after["usage"] - before["usage"] == pytest.approx(cost)
    assert before["limit_remaining"] - after["limit_remaining"] == pytest.approx(cost)


def test_own_keys_pay_only_the_fee() -> None:
    with Simulator(pace=0, byok=True) as sim, client_of(sim) as client:
        usage = ask(client).json()["usage"]
    assert usage["is_byok"]
    assert usage["cost"] < usage["cost_details"]["upstream_inference_cost"]


def test_a_generation_can_be_looked_up_after_a_while(client: httpx.Client) -> None:
    answer = ask(client, stream=True)
    final = events_of(answer.content)[-1]["response"]
    query = {"id": answer.headers["x-generation-id"]}
    assert client.get("/generation", params=query).status_code == 404
    found = client.get("/generation", params=query).json()["data"]
    assert found["total_cost"] == final["usage"]["cost"]
    assert found["tokens_completion"] == final["usage"]["output_tokens"]
    assert (found["streamed"], found["provider_name"]) == (True, "OpenAI")


# The catalog


def test_the_catalog_has_every_shape() -> None:
    rows = Catalog().rows
    ids = [row["id"] for row in rows]
    assert len(ids) == len(set(ids)) >= 400
    for known in ("openai/gpt-5", CLAUDE, "deepseek/deepseek-r1", "x-ai/grok-4"):
        assert known in ids
    assert sum(id_.endswith(":batch") for id_ in ids) >= 55
    assert sum(id_.endswith(":free") for id_ in ids) >= 18
    assert any(id_.endswith(":thinking") for id_ in ids)
    aliases = [row for row in rows if row["id"].startswith("~")]
    assert len(aliases) >= 10
    assert all(row["alias_target"]["slug"] in ids for row in aliases)
    routers = [row for row in rows if row["pricing"]["prompt"] == "-1"]
    assert "openrouter/auto" in [row["id"] for row in routers]
    shapes = [row["reasoning"] for row in rows if "reasoning" in row]
    assert any(shape["mandatory"] for shape in shapes)
    assert any(shape.get("supports_max_tokens") for shape in shapes)
    assert {type(s.get("supported_efforts", 0)) for s in shapes} == {
        list,
        type(None),
        int,
    }
    outputs = {o for row in rows for o in row["architecture"]["output_modalities"]}
    assert outputs >= {
        "text",
        "image",
        "audio",
        "video",
        "embeddings",
        "rerank",
        "speech",
    }
    assert any("tools" not in row["supported_parameters"] for row in rows)
    assert any((row["context_length"] or 9e9) <= 8_192 for row in rows)
    assert any(row["context_length"] is None for row in rows)
    known_keys = set(Catalog().get(MODEL) or {}) | {
        "reasoning",
        "alias_target",
        "benchmarks",
    }
    assert any(set(row) - known_keys for row in rows)


@pytest.mark.parametrize(
    ("query", "holds"),
    [
        ({}, lambda r: "text" in r["architecture"]["output_modalities"]),
        (
            {"output_modalities": "image"},
            lambda r: "image" in r["architecture"]["output_modalities"],
        ),
        (
            {"input_modalities": "image,audio"},
            lambda r: {"image", "audio"} <= set(r["architecture"]["input_modalities"]),
        ),
        (
            {"supported_parameters": "tools,reasoning"},
            lambda r: {"tools", "reasoning"} <= set(r["supported_parameters"]),
        ),
        ({"q": "CLAUDE"}, lambda r: "claude" in (r["id"] + r["name"]).lower()),
        ({"context": "1000000"}, lambda r: r["context_length"] >= 1_000_000),
        ({"model_authors": "x-ai"}, lambda r: r["id"].startswith("x-ai/")),
        ({"max_price": "0"}, lambda r: float(r["pricing"]["prompt"]) <= 0),
    ],
)
def test_models_are_filtered(
    client: httpx.Client, query: dict[str, str], holds: Any
) -> None:
    page = client.get("/models", params=query).json()
    everything = client.get("/models", params={"output_modalities": "all"}).json()
    assert 0 < page["total_count"] == len(page["data"]) < everything["total_count"]
    assert all(holds(row) for row in page["data"])


def test_models_come_in_pages(client: httpx.Client) -> None:
    total = client.get("/models/count").json()["data"]["count"]
    rows: list[Any] = []
    link: str | None = "/api/v1/models?limit=200&offset=0"
    while link:
        page = client.get(link.removeprefix("/api/v1")).json()
        assert len(page["data"]) <= 200
        rows += page["data"]
        link = page["links"]["next"]
    assert len(rows) == total == len({row["id"] for row in rows})


def test_models_are_sorted(client: httpx.Client) -> None:
    rows = client.get("/models", params={"sort": "pricing-low-to-high"}).json()["data"]
    prices = [float(row["pricing"]["prompt"]) for row in rows]
    assert prices == sorted(prices)


def test_my_models_are_a_part_of_all(client: httpx.Client) -> None:
    mine = {row["id"] for row in client.get("/models/user").json()["data"]}
    everything = {row["id"] for row in client.get("/models").json()["data"]}
    assert mine < everything


def test_one_model_and_its_endpoints(client: httpx.Client) -> None:
    assert client.get(f"/model/{MODEL}").json()["data"]["id"] == MODEL
    aliased = client.get("/model/~openai/gpt-latest").json()["data"]
    assert aliased["id"] == "openai/gpt-5.5"
    endpoints = client.get(f"/models/{MODEL}/endpoints").json()["data"]["endpoints"]
    assert 1 <= len(endpoints) <= 3
    assert endpoints[0]["latency_last_30m"] is None
    assert client.get("/models/no/body/endpoints").status_code == 404


def test_zero_retention_is_a_stable_subset(client: httpx.Client) -> None:
    zdr = {end["model_id"] for end in client.get("/endpoints/zdr").json()["data"]}
    listed = {row["id"] for row in client.get("/models").json()["data"]}
    assert CLAUDE in zdr
    assert not listed <= zdr


def test_another_catalog_can_be_served() -> None:
    row = (Catalog().get(MODEL) or {}) | {"id": "me/mine", "extra": 1}
    with Simulator(models=[row], pace=0) as sim, client_of(sim) as client:
        assert client.get("/models").json()["data"] == [row]
        assert ask(client, model="me/mine").status_code == 200
        assert ask(client, model=MODEL).status_code == 400


# Media endpoints


def test_images_come_as_json_and_as_a_stream(client: httpx.Client) -> None:
    body = {"model": "black-forest-labs/flux.2-pro", "prompt": "a sun", "n": 2}
    answer = client.post("/images", json=body).json()
    assert len(answer["data"]) == 2
    assert base64.b64decode(answer["data"][0]["b64_json"]).startswith(b"\x89PNG")
    streamed = client.post("/images", json=body | {"n": 1, "stream": True}).content
    kinds = [event["type"].rsplit(".", 1)[1] for event in events_of(streamed)]
    assert kinds == ["partial_image", "completed"]
    assert streamed.endswith(b"data: [DONE]\n\n")
    assert client.post("/images", json={"model": body["model"]}).status_code == 400


def test_a_video_takes_a_few_polls(client: httpx.Client, sim: Simulator) -> None:
    job = client.post("/videos", json={"model": "google/veo-3.1", "prompt": "a sun"})
    assert (job.status_code, job.json()["status"]) == (202, "pending")
    path = job.json()["polling_url"].removeprefix("/api/v1")
    polls = [client.get(path).json() for _ in range(3)]
    assert [p["status"] for p in polls] == ["pending", "in_progress", "completed"]
    content = client.get(f"{path}/content", params={"index": 0})
    assert content.headers["content-type"] == "video/mp4"
    assert b"ftyp" in content.content


def test_embeddings_and_scores_depend_on_the_text_alone(client: httpx.Client) -> None:
    body = {"model": "openai/text-embedding-3-small", "input": ["a", "b", "a"]}
    first, second, third = client.post("/embeddings", json=body).json()["data"]
    assert first["embedding"] == third["embedding"] != second["embedding"]
    query = {"query": "red fish", "documents": ["blue bird", "a red fish"], "top_n": 1}
    body = {"model": "cohere/rerank-v3.5", **query}
    (best,) = client.post("/rerank", json=body).json()["results"]
    assert best["index"] == 1


def test_audio_goes_both_ways(client: httpx.Client) -> None:
    say = {"model": "openai/gpt-4o-mini-tts", "input": "Hi", "response_format": "mp3"}
    assert (
        client.post("/audio/speech", json=say).headers["content-type"] == "audio/mpeg"
    )
    heard = {
        "model": "openai/whisper-1",
        "input_audio": {"data": "aaaa", "format": "wav"},
    }
    assert "4" in client.post("/audio/transcriptions", json=heard).json()["text"]


# Script and ledger


def test_replies_are_used_in_order_and_once(
    client: httpx.Client, sim: Simulator
) -> None:
    sim.script(replies.http_error(429), replies.text("one").times(2))
    assert sim.unused == 2
    answers = [ask(client) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [429, 200, 200, 200]
    texts = [a.json()["output"][-1]["content"][0]["text"] for a in answers[1:]]
    assert texts[:2] == ["one", "one"] != texts[1:]
    assert sim.unused == 0


def test_a_reply_can_wait_for_its_request(client: httpx.Client, sim: Simulator) -> None:
    sim.script(replies.empty().forever(), when=lambda entry: entry.model == CLAUDE)
    assert ask(client).json()["output"]
    assert ask(client, model=CLAUDE).json()["output"] == []
    assert ask(client, model=CLAUDE).json()["output"] == []


def test_other_endpoints_can_be_scripted(client: httpx.Client, sim: Simulator) -> None:
    sim.script(replies.http_error(500), replies.json_body({"data": []}), path="/models")
    assert ask(client).status_code == 200
    assert client.get("/models").status_code == 500
    assert client.get("/models").json() == {"data": []}
    assert client.get("/models").json()["total_count"] > 400


def test_an_invalid_request_does_not_use_up_a_reply(
    client: httpx.Client, sim: Simulator
) -> None:
    sim.script(replies.text("kept"))
    assert ask(client, store=True).status_code == 400
    assert "kept" in ask(client).text


def test_the_ledger_keeps_what_came(client: httpx.Client, sim: Simulator) -> None:
    raw = (
        b'{ "model":"openai/gpt-4o", "input":[{"role":"user","content":"H\xc3\xa9"}] }'
    )
    headers = {"Content-Type": "application/json", "X-Title": "Tests"}
    client.post("/responses?a=1", content=raw, headers=headers)
    client.get("/models")
    first, second = sim.ledger
    assert (first.method, first.path, first.query) == ("POST", "/responses", {"a": "1"})
    assert (first.raw, first.last_user_text, first.status) == (raw, "Hé", 200)
    assert first.headers["x-title"] == "Tests"
    assert first.finished
    assert not first.cut_by_client
    assert first.connection == second.connection
    assert first.at < second.at
    assert sim.posts == [first]
    with client_of(sim) as other:
        ask(other)
    assert sim.posts[-1].connection != first.connection
    sim.reset()
    assert sim.ledger == []


@pytest.mark.parametrize(
    "reply",
    [
        replies.text("word " * 3_000, 3_000, delay=0.01),
        scenario("F23"),
        scenario("F23", "comments", interval=0.05),
        replies.http_error(500, wait=30),
    ],
    ids=["streaming", "silent", "commenting", "before headers"],
)
def test_a_client_that_leaves_is_noticed_at_once(sim: Simulator, reply: Any) -> None:
    sim.script(reply)

    def leave() -> None:
        with client_of(sim) as client:
            client.timeout = httpx.Timeout(0.3 if reply.wait else 10)
            body = {"model": MODEL, "input": "Hi", "stream": True}
            with client.stream("POST", "/responses", json=body) as stream:
                next(stream.iter_bytes(64))

    if reply.wait:
        with pytest.raises(httpx.ReadTimeout):
            leave()
    else:
        leave()
    left = time.monotonic()
    (entry,) = sim.wait_for(lambda e: e if e and e[0].cut_by_client else None, 1)
    assert time.monotonic() - left < 0.5
    assert not entry.finished


def test_waiting_in_vain_says_so(sim: Simulator) -> None:
    with pytest.raises(TimeoutError):
        sim.wait_for(lambda entries: entries, timeout=0.05)


def test_stopping_does_not_wait_for_a_stalled_answer() -> None:
    with Simulator(pace=0) as sim:
        sim.script(scenario("F23"))
        got = threading.Event()

        def read() -> None:
            body = {"model": MODEL, "input": "Hi", "stream": True}
            with (
                client_of(sim) as client,
                client.stream("POST", "/responses", json=body) as stream,
            ):
                try:
                    for _ in stream.iter_bytes(64):
                        got.set()
                except httpx.TransportError:
                    pass

        reader = threading.Thread(target=read)
        reader.start()
        assert got.wait(5)
        began = time.monotonic()
    assert time.monotonic() - began < 2
    reader.join(5)
    assert not sim.posts[0].cut_by_client


def test_the_same_seed_gives_the_same_ids() -> None:
    def body(seed: int) -> dict[str, Any]:
        with (
            Simulator(seed=seed, clock=lambda: 1_790_000_000, pace=0) as sim,
            client_of(sim) as client,
        ):
            return ask(client).json()

    assert body(1) == body(1)
    assert body(1)["id"] != body(2)["id"]


# In another process


def test_it_runs_by_itself_and_is_controlled_from_outside() -> None:
    command = [sys.executable, "-m", "tests.simulator", "--port", "0", "--key", "sk-x"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONWARNINGS": ""},
    )
    try:
        assert process.stdout is not None
        remote = Remote(process.stdout.readline().decode().strip())
        remote.script({"scenario": "F7", "options": {"retry_after": 7}, "times": 2})
        remote.script({"kind": "text", "args": ["told"]})
        headers = {"Authorization": "Bearer sk-x"}
        with httpx.Client(
            base_url=remote.base_url, headers=headers, trust_env=False
        ) as c:
            answers = [ask(c) for _ in range(3)]
        assert [a.status_code for a in answers] == [429, 429, 200]
        assert answers[0].headers["retry-after"] == "7"
        assert "told" in answers[2].text
        assert [entry["body"]["model"] for entry in remote.ledger()] == [MODEL] * 3
        assert remote.prompts()[0]["prompt"]
        assert "reset" in remote.scenarios()["F22"]
        remote.reset()
        assert remote.ledger() == []
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
