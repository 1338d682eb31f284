"""The same streams through Open WebUI's own connections and through the pipe.

One real server; the simulator and the browser's socket are in other processes than the
server, so that the figures are the server's alone. The three ways take turns, each turn
with another one first, and what is compared is compared within a turn.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field

from tests.server import Account, Listener, OpenWebUI, Seen, Started
from tests.simulator.backend import API_KEY
from tests.webui import PLUGIN

from .rows import Options, Row, Scenario, at_most, median, percentile

FUNCTION_ID = "openrouter"
MODEL = "openai/gpt-4o"
CHAT, RESPONSES, PIPE = "own chat completions", "own Responses", "the pipe"
WAYS = {
    CHAT: f"chat.{MODEL}",
    RESPONSES: f"responses.{MODEL}",
    PIPE: f"{FUNCTION_ID}.{MODEL}",
}
STREAM_INTERVAL_MS = 40
ADDED_DELAY_MS = STREAM_INTERVAL_MS / 2 + 10
ADDED_FIRST_MS = 10.0
STAMP = re.compile(r"(\d+)@([\d.]+) ")


@dataclass(frozen=True, slots=True)
class Load:
    """So many chats of so many deltas, at a pace, together or one after the other."""

    name: str
    chats: int
    deltas: int
    delay_ms: float
    together: bool
    cpu_budget: float | None

    @property
    def prompt(self) -> str:
        """Return what makes the simulator stream this."""
        return f"bench deltas={self.deltas} delay_ms={self.delay_ms} stamped"


LOADS = (
    Load("1,000 deltas at once", 4, 1_000, 0, False, 0.35),
    Load("10 chats of 1,000 deltas at 10 ms", 10, 1_000, 10, True, 0.8),
    Load("10 chats of 400 deltas at 30 ms", 10, 400, 30, True, 1.0),
    Load("short answers", 10, 3, 5, False, None),
)
TINY = (Load("tiny", 1, 20, 1, False, None),)


@dataclass(frozen=True, slots=True)
class Sample:
    """One load by one way, once."""

    cpu_seconds: float  # a 1,000 deltas
    events: float  # a chat
    delays_ms: list[float] = field(repr=False)
    first_ms: list[float] = field(repr=False)


class Bed:
    """A server with the three ways to the simulator, and one open tab."""

    def __init__(self, server: OpenWebUI, tab: Listener) -> None:
        self.server = server
        self._admin = server.admin
        self._tab = tab

    def run(self, load: Load, way: str) -> Sample:
        """Run a load once."""
        self._settle()
        self._tab.clear()
        before = self.server.footprint().cpu_seconds
        begun: dict[str, float] = {}
        for _ in range(load.chats):
            at = time.monotonic()
            started = self._start(WAYS[way], load)
            begun[started.message_id] = at
            if not load.together:
                self._wait_ends({started.message_id}, load)
        self._wait_ends(set(begun), load)
        time.sleep(1)  # what the server does behind the last event
        spent = self.server.footprint().cpu_seconds - before
        return _sample(load, spent, begun, list(self._tab.events))

    def idle_seconds(self, seconds: float = 3) -> float:
        """Return the CPU seconds that a second of nothing costs the server."""
        self._settle()
        before = self.server.footprint().cpu_seconds
        time.sleep(seconds)
        return (self.server.footprint().cpu_seconds - before) / seconds

    def _start(self, model: str, load: Load) -> Started:
        return self._admin.start_chat(model, load.prompt, session_id=self._tab.sid)

    def _wait_ends(self, wanted: set[str], load: Load) -> None:
        """Wait for the last events, without asking the server."""
        deadline = time.monotonic() + 60 + load.deltas * load.delay_ms / 100
        missing, seen = set(wanted), 0
        while missing:
            news = self._tab.events[seen:]
            seen += len(news)
            missing -= {each.message_id or "" for each in news if _is_end(each)}
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(missing)} chats did not end: {load.name}")
            time.sleep(0.005 if not load.together else 0.05)

    def _settle(self) -> None:
        """Wait until the server has nothing left to do."""
        for _ in range(20):
            before = self.server.footprint().cpu_seconds
            time.sleep(0.5)
            if self.server.footprint().cpu_seconds - before <= 0.03:
                return


def _is_end(seen: Seen) -> bool:
    return seen.type == "chat:completion" and bool(seen.data.get("done"))


def _sample(
    load: Load, spent: float, begun: dict[str, float], events: list[Seen]
) -> Sample:
    delays: list[float] = []
    first: list[float] = []
    for message_id, at in begun.items():
        mine = [each for each in events if each.message_id == message_id]
        pieces = list(_pieces(mine))
        if sum(text.count(" ") for _, text in pieces) != load.deltas:
            raise AssertionError(f"deltas were lost: {load.name}")
        delays += delays_ms(pieces)
        first.append((pieces[0][0] - at) * 1_000)
    deltas = load.chats * load.deltas
    return Sample(
        spent / deltas * 1_000,
        sum(each.message_id in begun for each in events) / load.chats,
        delays,
        first,
    )


def _pieces(events: Iterable[Seen]) -> Generator[tuple[float, str]]:
    """Yield when the listener had more text, and that text."""
    for seen in events:
        if seen.kind == "response.output_text.delta":
            yield seen.at, seen.data.get("delta", "")


def delays_ms(pieces: Sequence[tuple[float, str]]) -> list[float]:
    """Return how long each delta took; the next one's stamp says when it was sent.

    Of the last nobody says it.
    """
    arrived: list[float] = []
    stamps: list[float] = []
    held = ""
    for at, text in pieces:
        held += text
        whole, space, held = held.rpartition(" ")
        found = [float(stamp) for _, stamp in STAMP.findall(whole + space)]
        arrived += [at] * len(found)
        stamps += found
    return [(at - sent) * 1_000 for at, sent in zip(arrived, stamps[1:], strict=False)]


# The bed ------------------------------------------------------------------------------


@contextlib.contextmanager
def bed() -> Generator[Bed]:
    """Start the simulator and a server that reaches it in three ways."""
    with (
        simulator() as base_url,
        OpenWebUI() as server,
        Listener(server.url, server.admin.token) as tab,
    ):
        connect(server.admin, base_url)
        source = PLUGIN.read_text("utf-8")
        server.admin.install_function(FUNCTION_ID, source, "OpenRouter")
        valves = {
            "BASE_URL": base_url,
            "API_KEY": API_KEY,
            "STREAM_INTERVAL_MS": STREAM_INTERVAL_MS,
        }
        server.admin.set_valves(FUNCTION_ID, valves)
        bed = Bed(server, tab)
        for way in WAYS:  # what is imported or fetched once
            bed.run(TINY[0], way)
        yield bed


@contextlib.contextmanager
def simulator() -> Generator[str]:
    """Run the simulator in a process of its own, and yield its base URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.simulator", "--port", "0", "--pace", "0"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=PLUGIN.parent.parent,
        env=dict(os.environ),
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(10)


def connect(admin: Account, base_url: str) -> None:
    """Add Open WebUI's own connections of both kinds."""
    kinds = {"0": ("chat", ""), "1": ("responses", "responses")}
    configs = {
        place: {
            "enable": True,
            "model_ids": [MODEL],
            "prefix_id": prefix,
            "api_type": kind,
        }
        for place, (prefix, kind) in kinds.items()
    }
    body = {
        "ENABLE_OPENAI_API": True,
        "OPENAI_API_BASE_URLS": [base_url] * len(configs),
        "OPENAI_API_KEYS": [API_KEY] * len(configs),
        "OPENAI_API_CONFIGS": configs,
    }
    admin.call("POST", "/openai/config/update", body)


# The figures --------------------------------------------------------------------------


def rows_of(load: Load, taken: dict[str, list[Sample]]) -> list[Row]:
    """Return a load's lines: each way, and what the pipe may cost."""
    rows = [
        Row(f"{load.name}: {way}", _figures(samples), _ratio(taken, way))
        for way, samples in taken.items()
    ]
    if load.cpu_budget is not None:
        ratio = _ratio(taken, PIPE)
        name = f"{load.name}: CPU"
        rows.append(at_most(name, "", ratio, load.cpu_budget, is_ratio=True))
    pipe, own = (_figures(taken[way]) for way in (PIPE, CHAT))
    name, key = (
        (f"{load.name}: added delay", "delay, median ms")
        if load.cpu_budget is not None
        else (f"{load.name}: added to the first text", "first text ms")
    )
    limit = ADDED_DELAY_MS if load.cpu_budget is not None else ADDED_FIRST_MS
    added = pipe[key] - own[key]
    rows.append(at_most(name, "added ms", added, limit))
    return rows


def _ratio(taken: dict[str, list[Sample]], way: str) -> float:
    """Return the middle of the ratios to the first way, turn by turn."""
    pairs = zip(taken[way], taken[CHAT], strict=True)
    return median([mine.cpu_seconds / own.cpu_seconds for mine, own in pairs])


def _figures(samples: Sequence[Sample]) -> dict[str, float]:
    delays = [each for sample in samples for each in sample.delays_ms]
    first = [each for sample in samples for each in sample.first_ms]
    return {
        "CPU s / 1,000": median([sample.cpu_seconds for sample in samples]),
        "events / chat": median([sample.events for sample in samples]),
        "delay, median ms": median(delays),
        "delay, p95 ms": percentile(delays, 95),
        "first text ms": median(first),
    }


def measure(options: Options) -> list[Row]:
    """Measure every load by every way."""
    loads = TINY if options.tiny else LOADS
    rounds = 1 if options.tiny else options.rounds
    taken = {load: {way: list[Sample]() for way in WAYS} for load in loads}
    with bed() as it:
        idle = it.idle_seconds()
        order = list(WAYS)
        for _ in range(rounds):
            for load, way in itertools.product(loads, order):
                sample = it.run(load, way)
                taken[load][way].append(sample)
                print(f"{load.name}: {way}: {sample.cpu_seconds:.3f}", file=sys.stderr)
            order = [*order[1:], order[0]]
    rows = [row for load in loads for row in rows_of(load, taken[load])]
    return [Row("an idle second", {"CPU s": idle}), *rows]


SCENARIOS: dict[str, Scenario] = {"stream": measure}
