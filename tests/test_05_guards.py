"""05 Guards: places in an orderly line, and rest for what keeps failing."""

from __future__ import annotations

import asyncio

import pytest

from open_webui_openrouter_pipe import open_webui_openrouter_pipe as plugin


async def _stay(limiter: plugin.Limiter, seen: list[int], n: int, limit: int) -> None:
    async with limiter.place(limit, 10):
        seen.append(n)
        await asyncio.sleep(0.01)


async def test_places_are_given_in_order_and_never_more_than_the_limit() -> None:
    limiter, seen, inside, most = plugin.Limiter(), list[int](), 0, 0

    async def visit(n: int) -> None:
        nonlocal inside, most
        async with limiter.place(3, 20):
            seen.append(n)
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.005)
            inside -= 1

    await asyncio.gather(*(visit(n) for n in range(12)))

    assert seen == list(range(12))
    assert most == 3


async def test_a_full_line_refuses_at_once() -> None:
    limiter = plugin.Limiter()
    async with limiter.place(1, 1):
        waiting = asyncio.create_task(_stay(limiter, [], 1, 1))
        await asyncio.sleep(0)

        with pytest.raises(plugin.Overloaded):
            async with limiter.place(1, 1):
                pass

    await waiting


async def test_who_gives_up_waiting_leaves_the_line_and_its_place() -> None:
    limiter, seen = plugin.Limiter(), list[int]()
    async with limiter.place(1, 5):
        first = asyncio.create_task(_stay(limiter, seen, 1, 1))
        second = asyncio.create_task(_stay(limiter, seen, 2, 1))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
    await second
    assert seen == [2]

    async with limiter.place(1, 5):  # let in and cancelled in one breath
        third = asyncio.create_task(_stay(limiter, seen, 3, 1))
        await asyncio.sleep(0)
    third.cancel()
    await asyncio.wait({third})
    await asyncio.wait_for(_stay(limiter, seen, 4, 1), 1)
    assert seen == [2, 4]


async def test_a_raised_limit_lets_those_in_who_wait() -> None:
    limiter, seen = plugin.Limiter(), list[int]()
    async with limiter.place(1, 5):
        waiting = asyncio.create_task(_stay(limiter, seen, 1, 1))
        await asyncio.sleep(0)
        assert seen == []

        await _stay(limiter, seen, 2, 3)

        assert sorted(seen) == [1, 2]
    await waiting


def test_failures_within_the_window_begin_a_rest_and_one_trial_ends_it() -> None:
    breaker = plugin.Breaker()
    assert not breaker.failed(0, 60, 3)
    assert not breaker.failed(1, 60, 3)
    assert breaker.failed(2, 60, 3)

    assert not breaker.admits(3, 60)
    assert breaker.rest_seconds(3, 60) == 59
    assert breaker.admits(62, 60)
    assert not breaker.admits(62, 60)  # one trial, not two
    breaker.succeeded()

    assert breaker.admits(62, 60)
    assert breaker.rest_seconds(62, 60) == 0


def test_a_failed_trial_rests_again_and_a_released_one_lets_the_next_try() -> None:
    breaker = plugin.Breaker()
    for now in (0, 1):
        breaker.failed(now, 60, 2)
    assert breaker.admits(61, 60)
    assert breaker.failed(61, 60, 2)
    assert not breaker.admits(62, 60)
    assert breaker.admits(121, 60)
    breaker.released()
    assert breaker.admits(121, 60)


def test_failures_that_are_long_ago_do_not_count_and_zero_never_rests() -> None:
    breaker = plugin.Breaker()
    for now in (0, 70, 140):
        assert not breaker.failed(now, 60, 2)
    never = plugin.Breaker()
    assert not any(never.failed(now, 60, 0) for now in range(100))
    assert never.admits(100, 60)


def test_of_very_many_breakers_the_oldest_are_forgotten() -> None:
    breakers = plugin.Breakers()
    first = breakers.get("user", "tool")
    assert breakers.get("user", "tool") is first
    for number in range(10_001):
        breakers.get("user", str(number))
    assert breakers.get("user", "tool") is not first
