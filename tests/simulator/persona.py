"""What the simulator says when nobody scripted it: a persona worth looking at."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from . import replies
from .replies import AnyReply, Part, compose, message, thought, url_citation
from .scene import Scene, content_texts, items_of

BENCH = re.compile(r"bench\s+deltas=(\d+)(?:\s+delay_ms=([\d.]+))?(\s+stamped)?")
TASK = "### Task:"


@dataclass(frozen=True)
class Prompt:
    """Something to type, and what it shows."""

    name: str
    prompt: str
    shows: str


@dataclass(frozen=True)
class Act:
    """A prompt, the words that trigger it, and what it plays."""

    prompt: Prompt
    trigger: re.Pattern[str]
    play: Callable[[Scene], AnyReply]


def last_user_text(scene: Scene) -> str:
    """Return the text of the last user message."""
    for item in reversed(items_of(scene.body)):
        if item.get("role") == "user":
            return "".join(content_texts(item.get("content")))
    return ""


# Texts

TABLE = """Three rivers, side by side:

| River | Length | Ends in |
|:------|-------:|:--------|
| Nile | 6,650 km | the Mediterranean |
| Amazon | 6,400 km | the Atlantic |
| Danube | 2,850 km | the Black Sea |

The Danube touches **ten** countries, more than any other river.
"""
CODE = '''Here is a small function, and a test for it:

```python
from collections.abc import Iterator


def fibonacci() -> Iterator[int]:
    """Yield 0, 1, 1, 2, 3, 5, ... for ever."""
    a, b = 0, 1
    while True:
        yield a
        a, b = b, a + b


def test_fibonacci() -> None:
    numbers = fibonacci()
    assert [next(numbers) for _ in range(6)] == [0, 1, 1, 2, 3, 5]
```

It uses constant memory, and $F_n \\approx \\varphi^n / \\sqrt{5}$.
'''
CITED = (
    "Fjords are long, narrow inlets that glaciers carved [1]. The deepest in Norway is "
    "Sognefjord [2], which reaches 1,308 metres [1]."
)
CITED_SOURCES = (
    url_citation("https://example.com/fjords", "Fjords, an introduction", 0, 55),
    url_citation("https://example.org/sognefjord", "Sognefjord", 56, 103),
    url_citation("https://example.com/fjords", "Fjords, an introduction", 104, 130),
)
ROCKS = (
    "The boat followed it, turn by turn, past the rocks that had names and the ones "
    "that had none."
)
STORY = (
    "The lighthouse keeper counted ships the way others count sheep.",
    "One evening a small boat came that was on no list, and it had no lamp.",
    "She lit the great lens early, and the beam went out over the water like a road.",
    ROCKS,
    "When it landed, a boy stepped out with a cat, and asked if this was the sea's end.",
    "'No,' she said, 'but it is a good place to turn around.'",
    "They drank tea until the fog lifted, and the cat chose the chair by the stove.",
)
REFUSED = "I cannot help with that. Ask me about rivers, fjords or lighthouses instead."
THOUGHTS = """**Reading the question**

The user wants a clear answer; I look for what matters first.

**Choosing a form**

Short paragraphs will do, and one example says more than three rules."""
PLAIN = (
    "I am a simulated {name}, so my wisdom is scripted. You wrote: “{asked}”.\n\n"
    "Some things to try: ask for **a table**, **some code**, **an image**, "
    "**a web search**, **a long story**, or type `fail 429` to see a failure."
)


# Speaking


def thoughtful(scene: Scene) -> bool:
    """Tell whether the serving model reasons, and was not told to leave it."""
    shape = scene.row.get("reasoning")
    wish = scene.body.get("reasoning") or {}
    off = wish.get("effort") == "none" or wish.get("enabled") is False
    return bool(shape) and not (off and not shape.get("mandatory"))


def thinking(scene: Scene) -> list[Part]:
    """Think first, if the model does."""
    if not thoughtful(scene):
        return []
    return [thought(THOUGHTS, delay=scene.pace)]


def spoken(scene: Scene, text: str) -> AnyReply:
    """Say a text at a human pace."""
    return compose(*thinking(scene), message(text, delay=scene.pace))


def said(text: str) -> Callable[[Scene], AnyReply]:
    """Build an act that says a text."""
    return lambda scene: spoken(scene, text)


def tell_story(scene: Scene) -> AnyReply:
    """Tell a long story."""
    chapters = [
        f"### Chapter {number}\n\n" + "\n\n".join(STORY) for number in range(1, 7)
    ]
    return spoken(scene, "\n\n".join(chapters))


def draw(scene: Scene) -> AnyReply:
    """Draw a picture, with a caption when the model speaks too."""
    gives = scene.row["architecture"]["output_modalities"]
    caption = "A sun over hills." if "text" in gives else None
    return replies.image(caption=caption, partials=2, delay=scene.pace * 10)


def search(scene: Scene) -> AnyReply:
    """Search the web and cite."""
    found = replies.web_search(
        "fjords of Norway", [s["url"] for s in CITED_SOURCES[:2]]
    )
    cited = message(CITED, delay=scene.pace, annotations=CITED_SOURCES)
    return compose(*thinking(scene), found, cited)


def refuse(scene: Scene) -> AnyReply:
    """Refuse."""
    return replies.refusal(REFUSED, delay=scene.pace)


def fail(scene: Scene) -> AnyReply:
    """Fail as the user wishes: by status, or in the middle."""
    from . import scenarios

    wish = re.search(r"fail\s+(\w+)", last_user_text(scene).lower())
    name = wish[1] if wish else "mid"
    if name.isdigit() and (build := FAILURES.get(int(name))):
        return scenarios.scenario(*build)
    if name.isdigit():
        return replies.http_error(int(name))
    if name in ("mid", "cut"):
        terminal = replies.failed() if name == "mid" else replies.silence
        begun = message(
            "Here is the beginning of an ans", delay=scene.pace, closes=False
        )
        return compose(
            begun, terminal=terminal, end="done" if name == "mid" else "reset"
        )
    return replies.empty()


FAILURES: dict[int, tuple[str, str]] = {
    400: ("F1", "default"),
    402: ("F3", "default"),
    403: ("F10", "moderation"),
    404: ("F11", "no_endpoints"),
    429: ("F7", "long"),
    502: ("F9", "502"),
    503: ("F9", "503"),
    524: ("F9", "524-html"),
}


def stall(scene: Scene) -> AnyReply:
    """Fall silent in the middle."""
    begun = message("I was about to say", delay=scene.pace, closes=False)
    return compose(begun, terminal=replies.silence, end="stall")


class Stamped(Sequence[str]):
    """Texts that are made when they are first read, as the one before has gone out.

    Each says its number and that moment, by the clock that processes share.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._made: list[str] = []

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(self._count))]
        if index >= self._count:
            raise IndexError(index)
        while len(self._made) <= index:
            self._made.append(f"{len(self._made)}@{time.monotonic():.6f} ")
        return self._made[index]


def bench(scene: Scene) -> AnyReply:
    """Stream exactly what the benchmark orders."""
    found = BENCH.search(last_user_text(scene))
    assert found is not None
    count = int(found[1])
    texts = Stamped(count) if found[3] else [f"word{n} " for n in range(count)]
    return replies.text(deltas=texts, delay=float(found[2] or 0) / 1_000)


def _act(
    name: str, trigger: str, prompt: str, shows: str, play: Callable[[Scene], AnyReply]
) -> Act:
    return Act(Prompt(name, prompt, shows), re.compile(trigger, re.IGNORECASE), play)


ACTS: tuple[Act, ...] = (
    _act(
        "Benchmark",
        BENCH.pattern,
        "bench deltas=1000 delay_ms=10",
        "exactly that many pieces of text, at that pace; with `stamped` behind it each "
        "says when the one before was sent",
        bench,
    ),
    _act(
        "Failure",
        r"\bfail \w+",
        "fail 429",
        "the card of a failure; also `fail 402`, `fail 524`, `fail mid`, `fail cut`, "
        "`fail empty`",
        fail,
    ),
    _act(
        "Stall",
        r"^\s*stall\b",
        "stall",
        "an answer that stops in the middle, until a timeout or the stop button",
        stall,
    ),
    _act("Table", r"\btable\b", "Show me a table", "a table that grows", said(TABLE)),
    _act(
        "Code",
        r"\bcode\b",
        "Write some code",
        "a highlighted block and a formula",
        said(CODE),
    ),
    _act(
        "Image",
        r"\b(image|picture|draw)\b",
        "Draw an image",
        "a picture, with previews while it is made",
        draw,
    ),
    _act(
        "Citations",
        r"\b(web search|citations?|sources)\b",
        "Do a web search for fjords",
        "a search, and an answer with two sources, one of them cited twice",
        search,
    ),
    _act(
        "Long story",
        r"\bstory\b",
        "Tell me a long story",
        "six chapters: time to press stop, or to scroll",
        tell_story,
    ),
    _act(
        "Refusal",
        r"\b(refuse|refusal)\b",
        "Please refuse",
        "a refusal by the model",
        refuse,
    ),
)
ORDERS = ACTS[:3]  # these win over tools
TOOL_PROMPT = Prompt(
    "Tool call",
    "Use a tool: what is the weather in Oslo?",
    "with a tool switched on in the chat: the call, its result, and an answer",
)
PROMPTS: tuple[Prompt, ...] = (*(act.prompt for act in ACTS), TOOL_PROMPT)


# Tools

WANTS_TOOL = re.compile(r"\b(tools?|call|use|look up|weather)\b", re.IGNORECASE)


def words_of(name: str) -> set[str]:
    """Split a tool's name into words."""
    return {word for word in re.split(r"[\W_]+", name.lower()) if len(word) > 2}


def wanted_tools(scene: Scene) -> list[Mapping[str, Any]]:
    """Choose the offered functions that the last user text speaks of."""
    asked = last_user_text(scene)
    offered = [t for t in scene.body.get("tools") or [] if t.get("type") == "function"]
    if not offered or scene.body.get("tool_choice") == "none":
        return []
    named = [tool for tool in offered if tool["name"].lower() in asked.lower()]
    similar = [t for t in offered if words_of(t["name"]) & words_of(asked)]
    forced = scene.body.get("tool_choice") == "required"
    if named or similar:
        return named or (similar[:1] if forced or WANTS_TOOL.search(asked) else [])
    return (
        offered[:1] if forced or re.search(r"\btools?\b", asked, re.IGNORECASE) else []
    )


def sample_value(schema: Mapping[str, Any], name: str, asked: str) -> Any:
    """Make up a value that a JSON schema accepts."""
    if schema.get("enum"):
        return schema["enum"][0]
    if "default" in schema:
        return schema["default"]
    kind = schema.get("type", "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        return sample_arguments(schema, asked)
    if kind == "array":
        return [sample_value(schema.get("items") or {}, name, asked)]
    simple: dict[str, Any] = {
        "integer": 1,
        "number": 1.5,
        "boolean": True,
        "null": None,
    }
    return simple.get(kind, sample_text(name, asked))


def sample_text(name: str, asked: str) -> str:
    """Guess a text argument from the question: a quotation, a capital word, or all."""
    quoted = re.search(r"[\"“']([^\"”']+)[\"”']", asked)
    if quoted:
        return quoted[1]
    capital = re.findall(r"(?<=[a-z,:] )([A-Z]\w+)", asked)
    if capital and name.lower() in ("city", "location", "place", "country", "name"):
        return capital[-1]
    return asked.strip()[:200] or name


def sample_arguments(schema: Mapping[str, Any], asked: str) -> dict[str, Any]:
    """Make up arguments: the required ones, or all when none is required."""
    properties = schema.get("properties") or {}
    names = schema.get("required") or list(properties)
    return {n: sample_value(properties.get(n) or {}, n, asked) for n in names}


def call_tools(scene: Scene, tools: list[Mapping[str, Any]]) -> AnyReply:
    """Call the chosen functions."""
    asked = last_user_text(scene)
    calls = [
        replies.Call(
            tool["name"], sample_arguments(tool.get("parameters") or {}, asked)
        )
        for tool in tools
    ]
    parts = [replies.function_call(call, scene.pace) for call in calls]
    return compose(*thinking(scene), *parts)


def outputs(scene: Scene) -> list[str]:
    """List the tool outputs that came after the last user message."""
    found: list[str] = []
    for item in items_of(scene.body):
        if item.get("role") == "user":
            found = []
        elif item.get("type") == "function_call_output":
            found.append("".join(content_texts(item.get("output"))))
    return found


def report(scene: Scene, results: list[str]) -> AnyReply:
    """Answer with what the tools returned."""
    shown = "\n".join(f"> {result[:300]}" for result in results)
    return spoken(scene, f"The tool says:\n\n{shown}\n\nThat should answer it.")


# Open WebUI's own tasks

TASKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("follow_ups", {"follow_ups": ["And then?", "Why is that so?", "Show me a table"]}),
    ("queries", {"queries": ["fjords of Norway"]}),
    ("tags", {"tags": ["General", "Simulation"]}),
    ("title", {"title": "🚣 A Chat with the Simulator"}),
    ("text", {"text": " and so on."}),
)


def task_answer(prompt: str) -> str:
    """Answer a task with the JSON that its prompt asks for."""
    wanted = [(prompt.find(f'"{key}"'), value) for key, value in TASKS]
    present = [(place, value) for place, value in wanted if place >= 0]
    if not present:
        return "A Chat with the Simulator"
    _, value = min(present, key=lambda pair: pair[0])
    return json.dumps(value, ensure_ascii=False)


# Choosing


def answer(scene: Scene) -> AnyReply:
    """Answer a request that nobody scripted."""
    return next(_candidates(scene))


def _candidates(scene: Scene) -> Iterator[AnyReply]:
    asked = last_user_text(scene)
    if asked.lstrip().startswith(TASK):
        yield replies.text(task_answer(asked))
    acts = [act for act in ACTS if act.trigger.search(asked)]
    yield from (act.play(scene) for act in acts if act in ORDERS)
    if results := outputs(scene):
        yield report(scene, results)
    if tools := wanted_tools(scene):
        yield call_tools(scene, tools)
    yield from (act.play(scene) for act in acts)
    if "text" not in scene.row["architecture"]["output_modalities"]:
        yield draw(scene)
    name = scene.row["name"].partition(": ")[2] or scene.row["name"]
    yield spoken(scene, PLAIN.format(name=name, asked=asked[:400]))
