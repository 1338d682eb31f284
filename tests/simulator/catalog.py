"""A synthesized model catalog: every shape that OpenRouter's has, none of its rows."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Row = dict[str, Any]

BORN = 1_715_000_000
DEFAULT_MODEL = "openai/gpt-4o"
ALL_EFFORTS = ("max", "xhigh", "high", "medium", "low", "minimal", "none")
EFFORTS = ("high", "medium", "low", "minimal")
ABSENT = ("absent",)
DYNAMIC_VARIANTS = ("nitro", "floor", "exacto", "online")
STATIC_VARIANTS = ("free", "thinking", "extended")


@dataclass(frozen=True)
class Spec:
    """What makes a model differ from a plain text model."""

    id: str
    name: str
    context: int | None = 131_072
    output_limit: int | None = 16_384
    prompt: float = 0.5
    completion: float = 1.5
    inputs: str = "text"
    outputs: str = "text"
    tools: bool = True
    reasoning: bool = False
    mandatory: bool = False
    efforts: Sequence[str] | None = ABSENT
    budget: bool = False
    search: bool = False
    cache: bool = False
    tokenizer: str = "Other"


MULTI = "text image file"
OMNI = "text image file audio video"


def _thinker(spec: Spec, **changes: Any) -> Spec:
    return replace(spec, reasoning=True, **changes)


def _openai() -> Iterator[Spec]:
    base = Spec("", "", 400_000, 128_000, 1.25, 10, MULTI, tokenizer="GPT", cache=True)
    plain = replace(base, context=128_000, output_limit=16_384, prompt=2.5)
    deep = _thinker(base, efforts=EFFORTS, mandatory=True, search=True)
    yield replace(plain, id="gpt-4o", name="GPT-4o")
    yield replace(
        plain, id="gpt-4o-mini", name="GPT-4o-mini", prompt=0.15, completion=0.6
    )
    yield replace(plain, id="gpt-4.1", name="GPT-4.1", context=1_047_576, search=True)
    yield replace(
        plain, id="gpt-4.1-mini", name="GPT-4.1 Mini", prompt=0.4, search=True
    )
    yield replace(plain, id="gpt-4.1-nano", name="GPT-4.1 Nano", prompt=0.1)
    yield replace(plain, id="gpt-4-turbo", name="GPT-4 Turbo", prompt=10, completion=30)
    small = replace(plain, inputs="text", context=16_385, output_limit=4_096)
    yield replace(small, id="gpt-3.5-turbo", name="GPT-3.5 Turbo", cache=False)
    yield replace(small, id="gpt-3.5-turbo-instruct", name="Instruct", tools=False)
    yield replace(small, id="gpt-4", name="GPT-4", context=8_191, prompt=30)
    for slug, name in (("o1", "o1"), ("o3", "o3"), ("o3-mini", "o3 Mini")):
        yield replace(deep, id=slug, name=name, context=200_000, efforts=EFFORTS[:3])
    yield replace(deep, id="o4-mini", name="o4 Mini", context=200_000, prompt=1.1)
    for version in ("5", "5.1", "5.2", "5.4", "5.5"):
        soft = version in ("5.1", "5.2", "5.4", "5.5")
        efforts = (*EFFORTS[:3], "none") if soft else EFFORTS
        model = replace(deep, efforts=efforts, mandatory=not soft)
        yield replace(model, id=f"gpt-{version}", name=f"GPT-{version}")
        for size, price in (("mini", 0.25), ("nano", 0.05)):
            name = f"GPT-{version} {size.title()}"
            yield replace(model, id=f"gpt-{version}-{size}", name=name, prompt=price)
        pro = replace(model, prompt=15, completion=120, efforts=("high",))
        yield replace(
            pro, id=f"gpt-{version}-pro", name=f"GPT-{version} Pro", mandatory=True
        )
        chat = replace(
            base, id=f"gpt-{version}-chat", name=f"GPT-{version} Chat", tools=False
        )
        yield chat
        yield replace(model, id=f"gpt-{version}-codex", name=f"GPT-{version}-Codex")
    yield replace(
        deep, id="gpt-5.6-sol", name="GPT-5.6 Sol", efforts=ALL_EFFORTS, mandatory=False
    )
    yield replace(base, id="gpt-5-image", name="GPT-5 Image", outputs="text image")
    yield replace(
        base, id="gpt-5-image-mini", name="GPT-5 Image Mini", outputs="text image"
    )
    audio = replace(base, inputs="text audio", outputs="text audio", context=128_000)
    yield replace(audio, id="gpt-audio", name="GPT Audio")
    yield replace(audio, id="gpt-audio-mini", name="GPT Audio Mini")
    oss = replace(deep, inputs="text", cache=False, search=False, efforts=EFFORTS[:3])
    yield replace(
        oss, id="gpt-oss-120b", name="gpt-oss-120b", prompt=0.05, completion=0.25
    )
    yield replace(
        oss, id="gpt-oss-20b", name="gpt-oss-20b", prompt=0.03, completion=0.1
    )


def _anthropic() -> Iterator[Spec]:
    base = Spec("", "", 200_000, 64_000, 3, 15, MULTI, tokenizer="Claude", cache=True)
    think = _thinker(base, search=True)
    yield replace(base, id="claude-3-haiku", name="Claude 3 Haiku", prompt=0.25)
    yield replace(base, id="claude-3.5-haiku", name="Claude 3.5 Haiku", prompt=0.8)
    yield replace(base, id="claude-3.5-sonnet", name="Claude 3.5 Sonnet")
    old = replace(think, budget=True)
    yield replace(old, id="claude-3.7-sonnet", name="Claude 3.7 Sonnet")
    yield replace(
        old,
        id="claude-3.7-sonnet:thinking",
        name="Claude 3.7 Sonnet (thinking)",
        mandatory=True,
    )
    for name, price in (
        ("haiku-4.5", 1),
        ("sonnet-4", 3),
        ("opus-4", 15),
        ("opus-4.1", 15),
    ):
        yield replace(
            old, id=f"claude-{name}", name=_title(f"claude {name}"), prompt=price
        )
    big = replace(think, context=1_000_000)
    yield replace(big, id="claude-sonnet-4.5", name="Claude Sonnet 4.5")
    efforts = ("max", "high", "medium", "low")
    for name, price in (
        ("opus-4.5", 5),
        ("opus-4.6", 5),
        ("sonnet-4.6", 3),
        ("opus-4.7", 5),
    ):
        model = replace(big, efforts=efforts, prompt=price, completion=price * 5)
        yield replace(model, id=f"claude-{name}", name=_title(f"claude {name}"))


def _google() -> Iterator[Spec]:
    base = Spec(
        "", "", 1_048_576, 65_536, 1.25, 10, OMNI, tokenizer="Gemini", cache=True
    )
    think = _thinker(base, search=True)
    yield replace(
        think, id="gemini-2.5-pro", name="Gemini 2.5 Pro", mandatory=True, budget=True
    )
    yield replace(
        think, id="gemini-2.5-flash", name="Gemini 2.5 Flash", prompt=0.3, budget=True
    )
    yield replace(
        think, id="gemini-2.5-flash-lite", name="Gemini 2.5 Flash Lite", prompt=0.1
    )
    yield replace(base, id="gemini-2.0-flash-001", name="Gemini 2.0 Flash", prompt=0.1)
    new = replace(think, mandatory=True, efforts=("high", "low"))
    for slug in (
        "gemini-3-pro-preview",
        "gemini-3-flash-preview",
        "gemini-3.1-pro-preview",
    ):
        yield replace(new, id=slug, name=_title(slug))
    picture = replace(base, inputs="text image", outputs="text image", tools=False)
    for slug in (
        "gemini-2.5-flash-image",
        "gemini-3-pro-image",
        "gemini-3.1-flash-image",
    ):
        yield replace(picture, id=slug, name=_title(slug), context=32_768)
    music = replace(base, inputs="text image", outputs="text audio", tools=False)
    yield replace(music, id="lyria-3-pro-preview", name="Lyria 3 Pro Preview")
    gemma = replace(base, inputs="text image", tokenizer="Gemma", cache=False)
    for size in ("4b", "12b", "27b"):
        yield replace(
            gemma,
            id=f"gemma-3-{size}-it",
            name=f"Gemma 3 {size.upper()}",
            prompt=0.1,
            tools=False,
        )


TEXT = Spec("", "")
SEEING = replace(TEXT, inputs="text image")
SOFT = _thinker(TEXT, efforts=None)
RAW = _thinker(TEXT, mandatory=True)
GROK = _thinker(SEEING, context=256_000, search=True, cache=True)
DEEP: dict[str, Any] = {"tokenizer": "DeepSeek"}
LLAMA: dict[str, Any] = {"tokenizer": "Llama3"}
SMALL: dict[str, Any] = {"tools": False, "output_limit": None}
LEVELS: dict[str, Any] = {"efforts": EFFORTS[:3]}

# owner, what its models start from, their slugs, and how they differ
FAMILIES: tuple[tuple[str, Spec, str, dict[str, Any]], ...] = (
    ("deepseek", RAW, "deepseek-r1", DEEP | {"context": 64_000, "tools": False}),
    ("deepseek", RAW, "deepseek-r1-0528", DEEP),
    ("deepseek", TEXT, "deepseek-chat", DEEP),
    (
        "deepseek",
        SOFT,
        "deepseek-v3.1 deepseek-v3.2 deepseek-v4",
        DEEP | {"cache": True},
    ),
    ("x-ai", GROK, "grok-4", {"mandatory": True, "prompt": 3, "completion": 15}),
    ("x-ai", GROK, "grok-4-fast", {"context": 2_000_000}),
    ("x-ai", GROK, "grok-4.3", LEVELS),
    ("x-ai", GROK, "grok-3-mini", {"inputs": "text", "efforts": ("high", "low")}),
    ("x-ai", TEXT, "grok-3", {"tokenizer": "Grok"}),
    ("meta-llama", TEXT, "llama-3.1-8b-instruct llama-3.1-70b-instruct", LLAMA),
    ("meta-llama", TEXT, "llama-3.1-405b-instruct llama-3.3-70b-instruct", LLAMA),
    ("meta-llama", TEXT, "llama-3-8b-instruct", LLAMA | SMALL | {"context": 8_192}),
    ("meta-llama", TEXT, "llama-guard-4-12b", {"tokenizer": "Llama4", "tools": False}),
    ("meta-llama", SEEING, "llama-4-maverick llama-4-scout", {"context": 1_048_576}),
    ("qwen", SOFT, "qwen3-235b-a22b qwen3-32b qwen3-max", {"budget": True}),
    ("qwen", SOFT, "qwen3.5-plus qwen3-coder", {"tokenizer": "Qwen3", "budget": True}),
    (
        "qwen",
        RAW,
        "qwen-plus:thinking qwq-32b",
        {"tokenizer": "Qwen", "context": 32_768},
    ),
    ("qwen", TEXT, "qwen-plus", {"tokenizer": "Qwen"}),
    ("qwen", SEEING, "qwen3-vl-32b-instruct", {"inputs": "text image video"}),
    ("mistralai", SEEING, "mistral-large-2512 mistral-medium-3.1 pixtral-12b", {}),
    ("mistralai", SEEING, "mistral-small-3.2-24b-instruct", {"tokenizer": "Mistral"}),
    ("mistralai", SEEING, "voxtral-small-24b-2507", {"inputs": "text audio"}),
    ("mistralai", TEXT, "mistral-7b-instruct", {"tools": False, "context": 32_768}),
    ("mistralai", TEXT, "codestral-2508", {"tokenizer": "Mistral"}),
    ("z-ai", SOFT, "glm-4.5 glm-4.6 glm-5 glm-5.3", {}),
    ("moonshotai", SOFT, "kimi-k2 kimi-k2.5", {}),
    ("moonshotai", RAW, "kimi-k2-thinking", {}),
    ("minimax", RAW, "minimax-m1 minimax-m2 minimax-m2.5", {"context": 1_000_000}),
    ("perplexity", SEEING, "sonar sonar-pro", {"tools": False, "search": True}),
    ("perplexity", RAW, "sonar-deep-research", {"tools": False, "search": True}),
    (
        "amazon",
        SEEING,
        "nova-lite-v1 nova-pro-v1 nova-premier-v1",
        {"tokenizer": "Nova"},
    ),
    ("cohere", TEXT, "command-a", {"tokenizer": "Cohere"}),
    ("cohere", TEXT, "command-r-08-2024 command-r7b-12-2024", {"tools": False}),
    ("meta", _thinker(SEEING), "muse-spark", LEVELS),
    ("microsoft", TEXT, "phi-4", {"context": 16_384, "tools": False}),
    ("undi95", TEXT, "remm-slerp-l2-13b", SMALL | {"context": 6_144}),
    (
        "gryphe",
        TEXT,
        "mythomax-l2-13b",
        SMALL | {"tokenizer": "Llama2", "context": 4_096},
    ),
)


def _others() -> Iterator[tuple[str, Spec]]:
    for owner, base, slugs, changes in FAMILIES:
        for slug in slugs.split():
            yield owner, replace(base, id=slug, name=_title(slug), **changes)


FILLERS = (
    ("nvidia", "nemotron-nano", "Nemotron Nano"),
    ("nousresearch", "hermes", "Hermes"),
    ("thedrummer", "cydonia", "Cydonia"),
    ("sao10k", "l3-euryale", "L3 Euryale"),
    ("ibm-granite", "granite", "Granite"),
    ("allenai", "olmo", "Olmo"),
    ("arcee-ai", "trinity", "Trinity"),
    ("liquid", "lfm", "LFM"),
    ("baidu", "ernie", "ERNIE"),
    ("tencent", "hunyuan", "Hunyuan"),
    ("stepfun", "step", "Step"),
    ("inclusionai", "ling", "Ling"),
    ("bytedance-seed", "seed", "Seed"),
    ("xiaomi", "mimo", "MiMo"),
    ("upstage", "solar", "Solar"),
    ("aion-labs", "aion", "Aion"),
    ("qwen", "qwen-turbo", "Qwen Turbo"),
)


def _filler() -> Iterator[tuple[str, Spec]]:
    """Fill the list up with plausible small families."""
    for number, (owner, slug, name) in enumerate(FILLERS):
        for step, size in enumerate(("8b", "14b", "32b", "70b", "120b", "235b")):
            for kind in ("", "-instruct"):
                mark = number * 6 + step
                spec = Spec(
                    f"{slug}-{1 + number % 4}.{step}-{size}{kind}",
                    f"{name} {1 + number % 4}.{step} {size.upper()}{kind.title()}",
                    context=(32_768, 65_536, 131_072, 262_144)[mark % 4],
                    output_limit=(None, 8_192, 32_768)[mark % 3],
                    prompt=0.02 * (step + 1),
                    completion=0.07 * (step + 1),
                    inputs="text image" if mark % 4 == 0 else "text",
                    tools=mark % 5 != 0,
                    reasoning=mark % 3 == 0,
                    mandatory=mark % 9 == 0,
                    efforts=(ABSENT, None, EFFORTS[:3])[mark % 3]
                    if mark % 2
                    else ABSENT,
                    cache=mark % 2 == 0,
                )
                yield owner, spec


HIDDEN = (
    ("openai", "text-embedding-3-small", "text", "embeddings"),
    ("openai", "text-embedding-3-large", "text", "embeddings"),
    ("google", "gemini-embedding-001", "text", "embeddings"),
    ("qwen", "qwen3-embedding-8b", "text", "embeddings"),
    ("cohere", "rerank-v3.5", "text", "rerank"),
    ("black-forest-labs", "flux.2-pro", "text image", "image"),
    ("black-forest-labs", "flux.2-klein", "text", "image"),
    ("bytedance-seed", "seedream-4.5", "text image", "image"),
    ("google", "veo-3.1", "text image", "video"),
    ("openai", "sora-2", "text image", "video"),
    ("openai", "gpt-4o-mini-tts", "text", "speech"),
    ("hexgrad", "kokoro-82m", "text", "speech"),
    ("openai", "whisper-1", "audio", "transcription"),
    ("openai", "gpt-4o-transcribe", "audio", "transcription"),
)

ROUTERS = {
    "openrouter/auto": ("Auto Router", "anthropic/claude-sonnet-4.5"),
    "openrouter/auto-beta": ("Auto Router (beta)", "google/gemini-2.5-flash"),
    "openrouter/free": ("Free Models Router", "meta-llama/llama-3.3-70b-instruct:free"),
    "openrouter/fusion": ("Fusion", "openai/gpt-5.2"),
    "openrouter/pareto-code": ("Pareto Code Router", "qwen/qwen3-coder"),
    "openrouter/bodybuilder": ("Body Builder", "openai/gpt-4o-mini"),
}

ALIASES = {
    "~openai/gpt-latest": "openai/gpt-5.5",
    "~openai/gpt-mini-latest": "openai/gpt-5.5-mini",
    "~anthropic/claude-sonnet-latest": "anthropic/claude-sonnet-4.6",
    "~anthropic/claude-opus-latest": "anthropic/claude-opus-4.7",
    "~anthropic/claude-haiku-latest": "anthropic/claude-haiku-4.5",
    "~google/gemini-pro-latest": "google/gemini-2.5-pro",
    "~google/gemini-flash-latest": "google/gemini-2.5-flash",
    "~x-ai/grok-latest": "x-ai/grok-4.3",
    "~z-ai/glm-latest": "z-ai/glm-5.3",
    "~deepseek/deepseek-latest": "deepseek/deepseek-v4",
    "~moonshotai/kimi-latest": "moonshotai/kimi-k2.5",
    "~qwen/qwen-latest": "qwen/qwen3.5-plus",
}

FREE = (
    "deepseek/deepseek-r1-0528",
    "deepseek/deepseek-v3.1",
    "google/gemma-3-12b-it",
    "google/gemma-3-27b-it",
    "google/gemma-3-4b-it",
    "meta-llama/llama-3.1-405b-instruct",
    "meta-llama/llama-3.3-70b-instruct",
    "meta-llama/llama-4-maverick",
    "microsoft/phi-4",
    "minimax/minimax-m2",
    "mistralai/mistral-7b-instruct",
    "mistralai/mistral-small-3.2-24b-instruct",
    "moonshotai/kimi-k2",
    "openai/gpt-oss-120b",
    "openai/gpt-oss-20b",
    "qwen/qwen3-235b-a22b",
    "qwen/qwen3-coder",
    "z-ai/glm-4.5",
)
BRANDS = {
    "openai": "OpenAI",
    "deepseek": "DeepSeek",
    "mistralai": "Mistral",
    "gpt": "GPT",
    "glm": "GLM",
    "moonshotai": "MoonshotAI",
    "minimax": "MiniMax",
    "nvidia": "NVIDIA",
    "nousresearch": "Nous",
    "qwen": "Qwen",
    "ibm": "IBM",
}
INSTRUCT_TYPES = {"Llama3": "llama3", "Llama2": "alpaca", "Qwen": "chatml"}
OWNERS = {"x-ai": "xAI", "z-ai": "Z.ai", "meta-llama": "Meta", "allenai": "AllenAI"}
BATCH_AUTHORS = ("openai", "anthropic", "google")


def _title(slug: str) -> str:
    base, _, variant = slug.partition(":")
    words = base.replace("-", " ").split()
    title = " ".join(BRANDS.get(word, word[:1].upper() + word[1:]) for word in words)
    return f"{title} ({variant})" if variant else title


def _price(per_million: float) -> str:
    """Write a price per million tokens as a decimal string per token."""
    return f"{per_million / 1_000_000:.12f}".rstrip("0").rstrip(".")


def _pricing(spec: Spec) -> dict[str, Any]:
    pricing: dict[str, Any] = {
        "prompt": _price(spec.prompt),
        "completion": _price(spec.completion),
    }
    if spec.search:
        pricing["web_search"] = "0.01"
    if spec.cache:
        pricing["input_cache_read"] = _price(spec.prompt / 10)
    if "audio" in spec.inputs:
        pricing["audio"] = _price(spec.prompt)
    if "audio" in spec.outputs:
        pricing["audio_output"] = _price(spec.completion * 2)
    if "image" in spec.outputs:
        pricing |= {"image": _price(spec.prompt), "image_output": _price(30)}
    if spec.tokenizer == "Claude":
        pricing["input_cache_write"] = _price(spec.prompt * 1.25)
        pricing["input_cache_write_1h"] = _price(spec.prompt * 2)
    if spec.tokenizer == "Gemini":
        pricing["internal_reasoning"] = _price(spec.completion)
        pricing["input_audio_cache"] = _price(spec.prompt / 10)
    if (spec.context or 0) >= 1_000_000:
        pricing["overrides"] = [
            {
                "min_prompt_tokens": 200_000,
                "prompt": _price(spec.prompt * 2),
                "completion": _price(spec.completion * 1.5),
            }
        ]
    return pricing


SAMPLING = ("max_tokens", "seed", "stop", "temperature", "top_p")
STRUCTURE = ("response_format", "structured_outputs")
TOOLING = ("tool_choice", "tools")
THINKING = ("include_reasoning", "reasoning")


def _parameters(spec: Spec) -> list[str]:
    names = [*SAMPLING, *STRUCTURE]
    if spec.tools:
        names += TOOLING
    if spec.reasoning:
        names += THINKING
        names += ["reasoning_effort"] if spec.efforts != ABSENT else []
    if spec.tokenizer == "GPT":
        names += ["max_completion_tokens"]
    return sorted(names)


def _reasoning(spec: Spec) -> dict[str, Any]:
    shape: dict[str, Any] = {"mandatory": spec.mandatory}
    if spec.efforts is None:
        shape |= {"default_enabled": True, "supported_efforts": None}
    elif spec.efforts != ABSENT:
        middle = spec.efforts[len(spec.efforts) // 2]
        shape |= {"supported_efforts": list(spec.efforts), "default_effort": middle}
    if spec.budget:
        shape["supports_max_tokens"] = True
    return shape


def _defaults(mark: int) -> dict[str, Any] | None:
    empty: dict[str, Any] = dict.fromkeys(
        ("temperature", "top_p", "top_k", "frequency_penalty")
    )
    return (None, {}, empty, empty | {"temperature": 0.7, "top_p": 0.95})[mark % 4]


def row_of(owner: str, spec: Spec) -> Row:
    """Build the catalog row of a spec."""
    id_ = f"{owner}/{spec.id}"
    mark = zlib.crc32(id_.encode())
    slug = f"{id_.split(':', maxsplit=1)[0]}-2025{1 + mark % 12:02d}{1 + mark % 28:02d}"
    inputs, outputs = spec.inputs.split(), spec.outputs.split()
    modality = f"{'+'.join(inputs)}->{'+'.join(outputs)}"
    row: Row = {
        "id": id_,
        "canonical_slug": slug,
        "hugging_face_id": (None, "", id_)[mark % 3],
        "name": f"{OWNERS.get(owner) or _title(owner)}: {spec.name}",
        "created": BORN + mark % 50_000_000,
        "description": f"{spec.name} is a simulated model of [{owner}](https://example.com).",
        "context_length": spec.context,
        "architecture": {
            "modality": modality,
            "input_modalities": inputs,
            "output_modalities": outputs,
            "tokenizer": spec.tokenizer,
            "instruct_type": INSTRUCT_TYPES.get(spec.tokenizer),
        },
        "pricing": _pricing(spec),
        "top_provider": {
            "context_length": spec.context,
            "max_completion_tokens": spec.output_limit,
            "is_moderated": owner in ("openai", "anthropic"),
        },
        "per_request_limits": None,
        "supported_parameters": _parameters(spec),
        "default_parameters": _defaults(mark),
        "supported_voices": ["alloy", "nova"] if "speech" in outputs else None,
        "knowledge_cutoff": (None, "2025-01-31")[mark % 2],
        "expiration_date": "2098-12-31" if mark % 29 == 0 else None,
        "links": {"details": f"/api/v1/models/{slug}/endpoints"},
    }
    return row | ({"reasoning": _reasoning(spec)} if spec.reasoning else {})


def _bases() -> Iterator[Row]:
    for owner, specs in (
        ("openai", _openai()),
        ("anthropic", _anthropic()),
        ("google", _google()),
    ):
        yield from (row_of(owner, spec) for spec in specs)
    for owner, spec in (*_others(), *_filler()):
        yield row_of(owner, spec)


def _variant(row: Row, suffix: str, name: str, share: float) -> Row:
    """Derive a variant row whose prices are a share of its base's."""
    prices = {
        key: _price(float(value) * share * 1_000_000)
        for key, value in row["pricing"].items()
        if isinstance(value, str)
    }
    changes = {"id": f"{row['id']}:{suffix}", "name": f"{row['name']} ({name})"}
    return row | changes | {"pricing": {k: v or "0" for k, v in prices.items()}}


def _router(id_: str, name: str) -> Row:
    row = row_of(
        "openrouter", Spec("", name, 2_000_000, None, inputs=OMNI, reasoning=True)
    )
    outputs = ["text", "image"] if "auto" in id_ else ["text"]
    shape = row["architecture"] | {"output_modalities": outputs, "tokenizer": "Router"}
    row = {key: value for key, value in row.items() if key != "reasoning"}
    return row | {
        "id": id_,
        "canonical_slug": id_,
        "name": name,
        "architecture": shape,
        "pricing": {"prompt": "-1", "completion": "-1"},
        "top_provider": {
            "context_length": None,
            "max_completion_tokens": None,
            "is_moderated": False,
        },
        "links": {"details": f"/api/v1/models/{id_}/endpoints"},
    }


def _alias(id_: str, target: Row) -> Row:
    return target | {
        "id": id_,
        "canonical_slug": id_,
        "name": f"{_title(id_.split('/')[1])}",
        "alias_target": {"name": target["name"], "slug": target["id"]},
        "links": {"details": f"/api/v1/models/{id_}/endpoints"},
    }


def _oddities() -> Iterator[Row]:
    """Yield rows that a careless reader trips over."""
    bare = row_of("stealth", Spec("null-island", "Null Island", tools=False))
    optional = [
        "hugging_face_id",
        "context_length",
        "per_request_limits",
        "default_parameters",
        "supported_voices",
        "knowledge_cutoff",
        "expiration_date",
    ]
    top = dict.fromkeys(("context_length", "max_completion_tokens"))
    empty = {"top_provider": {**top, "is_moderated": False}, "supported_parameters": []}
    yield bare | dict.fromkeys(optional) | empty
    future = row_of("stealth", Spec("from-the-future", "From the Future"))
    yield future | {"aliases": ["tomorrow"], "quantum": {"qubits": [1, None]}}
    measured = row_of("stealth", Spec("measured", "Measured"))
    scores = {"intelligence_index": 59.5, "coding_index": None, "agentic_index": 41}
    marks = {"design_arena": [], "artificial_analysis": scores}
    limits = {"prompt_tokens": 4096, "completion_tokens": 512}
    yield measured | {"benchmarks": marks, "per_request_limits": limits}


def build_rows() -> list[Row]:
    """Build the whole catalog, newest first, as OpenRouter lists it."""
    bases = {row["id"]: row for row in _bases()}
    batch = [r for r in bases.values() if r["id"].split("/")[0] in BATCH_AUTHORS]
    rows = [
        *bases.values(),
        *(_variant(bases[id_], "free", "free", 0) for id_ in FREE),
        *(
            _variant(row, "batch", "batch", 0.5)
            for row in batch
            if ":" not in row["id"]
        ),
        *(_router(id_, name) for id_, (name, _) in ROUTERS.items()),
        *(_alias(id_, bases[target]) for id_, target in ALIASES.items()),
        *(
            row_of(o, Spec(s, _title(s), 8_192, None, inputs=i, outputs=u, tools=False))
            for o, s, i, u in HIDDEN
        ),
        *_oddities(),
    ]
    return sorted(rows, key=lambda row: -row["created"])


@dataclass(frozen=True)
class Resolved:
    """The model that serves a request: its row and the slug to report."""

    row: Row
    slug: str
    is_alias: bool = False

    @property
    def strategy(self) -> str:
        """Name the routing strategy for the router metadata."""
        return "alias" if self.is_alias else "direct"


class Catalog:
    """Find rows by id, and decide which model a requested id means."""

    def __init__(self, rows: Iterable[Row] | None = None) -> None:
        self.rows: list[Row] = build_rows() if rows is None else list(rows)
        self._by_id: Mapping[str, Row] = {row["id"]: row for row in self.rows}

    def __contains__(self, id_: str) -> bool:
        return id_ in self._by_id

    def get(self, id_: str) -> Row | None:
        """Return a listed row, by id or by canonical slug."""
        found = self._by_id.get(id_)
        return found or next((r for r in self.rows if r["canonical_slug"] == id_), None)

    def resolve(self, requested: str | None) -> Resolved | None:
        """Return the model behind an id, alias, router, variant or preset."""
        wanted = (requested or DEFAULT_MODEL).split("@preset/")[0] or DEFAULT_MODEL
        row = self.get(wanted)
        if row is None:
            return self._variant_of(wanted)
        if target := row.get("alias_target"):
            concrete = self._by_id.get(target["slug"], row)
            return Resolved(concrete, concrete["id"], is_alias=True)
        if wanted in ROUTERS:
            concrete = self._by_id.get(ROUTERS[wanted][1], row)
            return Resolved(concrete, concrete["id"])
        return Resolved(row, wanted)

    def _variant_of(self, wanted: str) -> Resolved | None:
        base, *suffixes = wanted.split(":")
        known = set(DYNAMIC_VARIANTS + STATIC_VARIANTS)
        if not suffixes or not known.issuperset(suffixes):
            return None
        inner = self.resolve(base)
        return inner and replace(
            inner, slug=wanted if not inner.is_alias else inner.slug
        )
