"""14 Request: one valid body for POST /responses."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_webui_openrouter_pipe import open_webui_openrouter_pipe as plugin
from tests.simulator.scene import default_catalog
from tests.simulator.validation import Rejection, judge

# The whole of openrouter.md 2.1.
FIELDS = frozenset(
    [
        "background",
        "cache_control",
        "debug",
        "frequency_penalty",
        "image_config",
        "include",
        "input",
        "instructions",
        "max_output_tokens",
        "max_tool_calls",
        "metadata",
        "modalities",
        "model",
        "models",
        "parallel_tool_calls",
        "plugins",
        "presence_penalty",
        "preset",
        "previous_response_id",
        "prompt",
        "prompt_cache_key",
        "prompt_cache_options",
        "provider",
        "reasoning",
        "route",
        "safety_identifier",
        "service_tier",
        "session_id",
        "stop_server_tools_when",
        "store",
        "stream",
        "temperature",
        "text",
        "tool_choice",
        "tools",
        "top_k",
        "top_logprobs",
        "top_p",
        "trace",
        "truncation",
        "user",
        "x_search_filter",
    ]
)
MODELS = plugin.Models(plugin.parse_catalog({"data": default_catalog().rows}))
CHAT = plugin.build_input([{"role": "user", "content": "Hi"}], MODELS.cards[0])
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def card(model_id: str = "a/b", **facts: Any) -> plugin.ModelCard:
    """Build the card of a model of which only some is known."""
    return plugin.ModelCard(model_id, model_id, **facts)


def known(model_id: str) -> plugin.ModelCard:
    """Return the card of a simulated model."""
    found = MODELS.explain(model_id)
    assert found is not None
    return found


def built(
    body: dict[str, Any], model: plugin.ModelCard | None = None
) -> dict[str, Any]:
    """Build a request of a chat's body."""
    return plugin.build_request(body, model or card(), CHAT)


BASE = built({})
TOOL = {"type": "function", "function": {"name": "get", "description": "Get."}}
FLAT = {
    "type": "function",
    "name": "get",
    "description": "Get.",
    "parameters": {"type": "object", "properties": {}},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


def test_the_plain_request() -> None:
    assert BASE == {
        "model": "a/b",
        "input": [{"type": "message", "role": "user", "content": "Hi"}],
        "stream": True,
        "store": False,
        "include": ["reasoning.encrypted_content"],
    }


# Parameters ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "added"),
    [
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
        ({"temperature": 0, "top_k": 3}, {"temperature": 0, "top_k": 3}),
        ({"temperature": None}, {}),
        ({"temperature": "0.5"}, {}),
        (
            {"presence_penalty": -1, "frequency_penalty": 1, "top_logprobs": 2},
            {"presence_penalty": -1, "frequency_penalty": 1, "top_logprobs": 2},
        ),
        ({"max_tokens": 100}, {"max_output_tokens": 100}),
        ({"max_completion_tokens": 100}, {"max_output_tokens": 100}),
        ({"max_output_tokens": 100, "max_tokens": 5}, {"max_output_tokens": 100}),
        ({"max_tokens": 0}, {}),
        ({"max_tokens": -1}, {}),
        ({"max_tokens": True}, {}),
        ({"verbosity": "low"}, {"text": {"verbosity": "low"}}),
        (
            {"response_format": {"type": "json_object"}},
            {"text": {"format": {"type": "json_object"}}},
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            {
                "text": {
                    "format": {
                        "type": "json_schema",
                        "name": "x",
                        "schema": SCHEMA,
                        "strict": True,
                    }
                }
            },
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            {
                "text": {
                    "format": {"type": "json_schema", "name": "answer", "schema": {}}
                }
            },
        ),
        ({"response_format": {"type": "grammar"}}, {}),
        ({"response_format": "json"}, {}),
        (
            {"text": {"verbosity": "high"}, "response_format": {"type": "text"}},
            {"text": {"verbosity": "high", "format": {"type": "text"}}},
        ),
        ({"reasoning_effort": "high"}, {"reasoning": {"effort": "high"}}),
        ({"reasoning_effort": "HIGH"}, {"reasoning": {"effort": "high"}}),
        ({"reasoning_effort": "enormous"}, {}),
        (
            {"reasoning": {"effort": "low", "summary": "concise"}},
            {"reasoning": {"effort": "low", "summary": "concise"}},
        ),
        (
            {"reasoning": {"max_tokens": 9}, "reasoning_effort": "low"},
            {"reasoning": {"max_tokens": 9, "effort": "low"}},
        ),
        ({"provider": {"sort": "price"}}, {"provider": {"sort": "price"}}),
        ({"plugins": [{"id": "web"}]}, {"plugins": [{"id": "web"}]}),
        (
            {"models": ["a/c"], "route": "fallback"},
            {"models": ["a/c"], "route": "fallback"},
        ),
        ({"modalities": ["text", "image"]}, {"modalities": ["text", "image"]}),
        ({"user": "somebody", "preset": None}, {"user": "somebody"}),
        ({"session_id": "s" * 300}, {"session_id": "s" * 256}),
        ({"tools": [TOOL]}, {"tools": [FLAT]}),
        ({"tools": [FLAT]}, {"tools": [FLAT]}),
        (
            {"tools": [TOOL], "tool_choice": "none"},
            {"tools": [FLAT], "tool_choice": "none"},
        ),
        (
            {
                "tools": [TOOL],
                "tool_choice": {"type": "function", "function": {"name": "get"}},
            },
            {"tools": [FLAT], "tool_choice": {"type": "function", "name": "get"}},
        ),
        (
            {"tools": [TOOL], "parallel_tool_calls": False},
            {"tools": [FLAT], "parallel_tool_calls": False},
        ),
        (
            {"tools": [{"type": "openrouter:web_search"}]},
            {"tools": [{"type": "openrouter:web_search"}]},
        ),
        ({"tool_choice": "auto", "parallel_tool_calls": True}, {}),
        ({"tools": [], "tool_choice": "required"}, {}),
        ({"tools": [None, "x", {}, {"type": "function"}]}, {}),
        (
            {
                "stop": ["x"],
                "seed": 1,
                "logit_bias": {},
                "logprobs": True,
                "min_p": 0.1,
                "top_a": 1,
                "repetition_penalty": 1,
                "prediction": {},
                "stream_options": {"include_usage": True},
                "audio": {},
                "n": 1,
                "metadata": {"chat_id": "x"},
                "store": True,
                "previous_response_id": "x",
            },
            {},
        ),
    ],
)
def test_b3_parameters_are_translated(
    body: dict[str, Any], added: dict[str, Any]
) -> None:
    assert built(body) == {**BASE, **added}


@pytest.mark.parametrize(
    ("entry", "flat"),
    [
        ({"type": "function", "function": {"name": "get"}}, {"name": "get"}),
        (
            {"type": "function", "function": {"name": "get", "parameters": None}},
            {"name": "get"},
        ),
        (
            {"type": "function", "function": {"name": "get", "parameters": SCHEMA}},
            {"name": "get", "parameters": SCHEMA},
        ),
        (
            {"type": "function", "function": {"name": "get", "strict": True}},
            {"name": "get", "strict": True},
        ),
        (
            {"type": "function", "function": {"name": "get", "strict": None}},
            {"name": "get"},
        ),
    ],
)
def test_a_function_is_flat_and_always_has_parameters(entry: Any, flat: Any) -> None:
    nothing = {"type": "object", "properties": {}}

    assert plugin.flat_tool(entry) == {
        "type": "function",
        "parameters": nothing,
        **flat,
    }


def test_b11_tools_are_the_same_bytes_each_time() -> None:
    assert str(built({"tools": [TOOL, FLAT]})) == str(built({"tools": [TOOL, FLAT]}))


@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty"]
)
def test_sampling_is_only_sent_to_models_that_have_it(name: str) -> None:
    has = card(parameters=frozenset({name}))
    lacks = card(parameters=frozenset({"max_tokens"}))

    assert built({name: 1}, has)[name] == 1
    assert name not in built({name: 1}, lacks)
    assert built({name: 1}, card())[name] == 1


def test_tools_are_only_sent_to_models_that_call() -> None:
    lacks = card(parameters=frozenset({"max_tokens"}))

    assert "tools" not in built({"tools": [TOOL], "tool_choice": "auto"}, lacks)


def test_the_chat_is_the_session() -> None:
    request = plugin.build_request(
        {"session_id": "other"}, card(), CHAT, session_id="chat-1"
    )

    assert request["session_id"] == "chat-1"


def test_what_was_set_and_not_sent_is_named() -> None:
    body = {
        "model": "x",
        "messages": [],
        "seed": 1,
        "stop": ["x"],
        "n": None,
        "user": "u",
    }

    assert plugin.unsent(body, built(body)) == ["seed", "stop"]


# Reasoning -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("efforts", "is_mandatory", "wanted", "fitting"),
    [
        (None, False, "max", "max"),
        ((), False, "low", "low"),
        (("high", "low"), False, "high", "high"),
        (("high", "low"), False, "medium", "low"),
        (("high",), False, "minimal", "high"),
        (("high", "medium", "low", "minimal"), True, "none", "minimal"),
        (("high", "medium", "low", "none"), True, "none", "low"),
        (("high", "medium", "low", "none"), False, "minimal", "none"),
        (None, True, "none", "minimal"),
        (("xhigh", "high"), False, "max", "xhigh"),
        (("unheard-of",), False, "low", "low"),
    ],
)
def test_the_nearest_effort_is_asked_for(
    efforts: Any, is_mandatory: bool, wanted: str, fitting: str
) -> None:
    model = card(efforts=efforts, reasoning_is_mandatory=is_mandatory, reasons=True)

    assert plugin.fitting_effort(wanted, model) == fitting


def test_a_summary_is_asked_of_those_who_reason() -> None:
    assert built({}, card(reasons=True))["reasoning"] == {"summary": "auto"}
    assert "reasoning" not in built({}, card(reasons=False))
    assert "reasoning" not in built({}, card())


def test_those_who_do_not_reason_are_not_asked_to() -> None:
    body = {"reasoning_effort": "high", "reasoning": {"max_tokens": 9}}

    assert built(body, card(reasons=False)) == BASE


# Tasks ---------------------------------------------------------------------------------


TASKS = (
    "title_generation",
    "tags_generation",
    "emoji_generation",
    "query_generation",
    "follow_up_generation",
    "image_prompt_generation",
    "autocomplete_generation",
    "function_calling",
)
RICH = {
    "tools": [TOOL],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "plugins": [{"id": "web"}],
    "reasoning_effort": "high",
    "temperature": 0.1,
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "model_id",
    [
        "openai/gpt-4o",
        "openai/o3",
        "anthropic/claude-sonnet-4.5",
        "deepseek/deepseek-r1",
    ],
)
@pytest.mark.parametrize("effort", EFFORTS)
def test_b12_a_task_asks_for_little(task: str, model_id: str, effort: Any) -> None:
    model = known(model_id)

    request = plugin.build_task_request(built(RICH, model), task, model, effort)

    assert not request.keys() & {
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "plugins",
    }
    assert 0 < request["max_output_tokens"] <= 8192
    assert not isinstance(judge(request, default_catalog()), Rejection)


@pytest.mark.parametrize(
    ("model_id", "effort", "reasoning"),
    [
        ("openai/gpt-4o", "low", None),
        ("openai/o3", "none", {"effort": "low"}),
        ("openai/gpt-5-pro", "low", {"effort": "high"}),
        ("anthropic/claude-sonnet-4.5", "low", {"enabled": False}),
        ("deepseek/deepseek-r1", "low", {"effort": "low"}),
    ],
)
def test_a_tasks_effort_is_the_nearest_to_the_valve(
    model_id: str, effort: Any, reasoning: Any
) -> None:
    model = known(model_id)

    request = plugin.build_task_request(
        built(RICH, model), "title_generation", model, effort
    )

    assert request.get("reasoning") == reasoning


def test_a_tasks_own_bound_stays() -> None:
    request = built({"max_tokens": 50})

    task = plugin.build_task_request(request, "title_generation", card(), "low")

    assert task["max_output_tokens"] == 50


def test_a_merge_of_answers_is_a_real_answer() -> None:
    request = built(RICH, known("openai/o3"))

    assert (
        plugin.build_task_request(
            request, "moa_response_generation", known("openai/o3"), "low"
        )
        == request
    )


# Any body ------------------------------------------------------------------------------


CHAT_KEYS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(0, 100),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "max_tokens": st.integers(-1, 1000),
    "max_completion_tokens": st.integers(1, 1000),
    "reasoning_effort": st.sampled_from([*EFFORTS, "", "Low", "enormous"]),
    "reasoning": st.sampled_from([{}, {"effort": "low"}, {"max_tokens": 100}]),
    "verbosity": st.sampled_from(["low", "medium", "high", ""]),
    "response_format": st.sampled_from(
        [
            {"type": "text"},
            {"type": "json_object"},
            {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
            {},
            "json",
        ]
    ),
    "tools": st.lists(
        st.sampled_from([TOOL, FLAT, {"type": "openrouter:web_search"}, None, {}]),
        max_size=3,
    ),
    "tool_choice": st.sampled_from(
        ["auto", "none", "required", {"type": "function", "function": {"name": "get"}}]
    ),
    "parallel_tool_calls": st.booleans(),
    "stop": st.sampled_from([["x"], "x"]),
    "seed": st.integers(),
    "logit_bias": st.just({"1": 1}),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 20),
    "min_p": st.floats(0, 1),
    "top_a": st.floats(0, 1),
    "repetition_penalty": st.floats(0, 2),
    "prediction": st.just({"type": "content", "content": "x"}),
    "stream_options": st.just({"include_usage": True}),
    "metadata": st.just({"chat_id": "x", "features": {"a": True}}),
    "files": st.just([{"id": "x"}]),
    "features": st.just({"web_search": True}),
    "chat_id": st.just("x"),
    "n": st.just(2),
    "user": st.just("u"),
    "user_id": st.just("u"),
    "store": st.booleans(),
    "include": st.just(["nonsense"]),
    "previous_response_id": st.just("x"),
    "provider": st.just({"sort": "price"}),
    "service_tier": st.just("flex"),
    "session_id": st.text(max_size=300),
    "num_ctx": st.just(4096),
    "keep_alive": st.just("5m"),
    "mirostat": st.just(1),
}


@settings(max_examples=400, deadline=None)
@given(
    st.fixed_dictionaries(
        {}, optional={k: st.one_of(st.none(), v) for k, v in CHAT_KEYS.items()}
    ),
    st.sampled_from(
        [
            "openai/gpt-4o",
            "openai/gpt-5",
            "openai/o3",
            "anthropic/claude-sonnet-4.5",
            "deepseek/deepseek-r1",
            "mistralai/mistral-7b-instruct",
            "~openai/gpt-latest",
        ]
    ),
)
def test_any_body_gives_a_request_that_openrouter_takes(
    body: dict[str, Any], model_id: str
) -> None:
    request = built(body, known(model_id))

    assert set(request) <= FIELDS
    assert (request["stream"], request["store"]) == (True, False)
    verdict = judge(request, default_catalog())
    assert not isinstance(verdict, Rejection), verdict
