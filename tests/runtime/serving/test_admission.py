"""Who is let in: first come first served, within bounds, and nobody keeps a place who has gone away."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import Any

import pytest

pytest.importorskip("starlette")

from kvx.runtime.serving.admission import Admission, Refusal, Refused
from kvx.runtime.serving.settings import ServeOptions

SOON = 0.02


def admission(**options: Any) -> Admission:  # noqa: ANN401
    return Admission(ServeOptions(**{"patience": 10.0, **options}))


async def settle() -> None:
    """All that is due now is over."""
    for _ in range(10):
        await asyncio.sleep(0)


async def refusal(entering: Admission, client: str = "a", most: int | None = None) -> Refusal:
    with pytest.raises(Refused) as found:
        await entering.enter(client, most)
    return found.value.reason


async def waiters(to: Admission, count: int, client: str = "a") -> list[asyncio.Task[float]]:
    """So many who come one after the other, and wait."""
    tasks = []
    for number in range(count):
        tasks.append(asyncio.create_task(to.enter(client), name=str(number)))
        await settle()
    return tasks


def test_requests_are_let_in_in_the_order_in_which_they_came() -> None:
    async def run() -> None:
        asked = admission(requests=2)
        assert [await asked.enter("a"), await asked.enter("a")] == [0.0, 0.0]
        tasks = await waiters(asked, 5)
        for number in range(5):
            assert [task.done() for task in tasks] == [one < number for one in range(5)]
            asked.leave("a")
            await settle()
        assert (asked.active, asked.waiting) == (2, 0)

    asyncio.run(run())


def test_who_waited_hears_for_how_long() -> None:
    async def run() -> None:
        asked = admission(requests=1)
        await asked.enter("a")
        [task] = await waiters(asked, 1)
        await asyncio.sleep(SOON)
        asked.leave("a")
        assert await task >= 0.9 * SOON

    asyncio.run(run())


def test_more_than_may_wait_are_refused_at_once() -> None:
    async def run() -> None:
        asked = admission(requests=1, waiting=2)
        await asked.enter("a")
        tasks = await waiters(asked, 2)
        begun = time.monotonic()
        assert await refusal(asked) == "full"
        assert time.monotonic() - begun < 1
        asked.leave("a")
        await settle()
        assert [task.done() for task in tasks] == [True, False]
        tasks[1].cancel()

    asyncio.run(run())


def test_without_a_line_who_is_not_let_in_is_refused() -> None:
    async def run() -> None:
        asked = admission(requests=1, waiting=0)
        await asked.enter("a")
        assert await refusal(asked) == "full"
        asked.leave("a")
        assert await asked.enter("a") == 0.0

    asyncio.run(run())


def test_one_client_cannot_keep_the_others_out() -> None:
    async def run() -> None:
        asked = admission(requests=4, client_requests=2)
        await asked.enter("a")
        await asked.enter("a")
        [third] = await waiters(asked, 1, "a")
        assert await asked.enter("b") == 0.0
        assert not third.done()
        asked.leave("a")
        await settle()
        assert third.done()

    asyncio.run(run())


def test_who_has_waited_for_its_own_requests_is_told_so() -> None:
    async def run() -> None:
        asked = admission(requests=4, client_requests=2, patience=SOON)
        await asked.enter("a")
        await asked.enter("a")
        assert await refusal(asked, "a") == "client"
        assert (asked.active, asked.waiting) == (2, 0)

    asyncio.run(run())


def test_requests_that_wait_count_for_their_client() -> None:
    async def run() -> None:
        asked = admission(requests=1, client_requests=2)
        await asked.enter("b")
        tasks = await waiters(asked, 2)
        assert await refusal(asked, "a") == "client"
        for task in tasks:
            task.cancel()
        await settle()
        assert asked.waiting == 0
        [again] = await waiters(asked, 1)
        again.cancel()

    asyncio.run(run())


def test_a_client_may_have_a_bound_of_its_own() -> None:
    async def run() -> None:
        asked = admission(client_requests=3, patience=SOON)
        await asked.enter("key a", 1)
        assert await refusal(asked, "key a", 1) == "client"
        for _ in range(3):
            await asked.enter("b")
        assert await refusal(asked, "b") == "client"

    asyncio.run(run())


def test_patience_ends() -> None:
    async def run() -> None:
        asked = admission(requests=1, patience=SOON)
        await asked.enter("a")
        begun = time.monotonic()
        assert await refusal(asked) == "patience"
        assert SOON * 0.9 <= time.monotonic() - begun < 1
        assert (asked.active, asked.waiting) == (1, 0)

    asyncio.run(run())


def test_without_patience_nobody_waits() -> None:
    async def run() -> None:
        asked = admission(requests=1, patience=0.0)
        await asked.enter("a")
        assert await refusal(asked) == "patience"

    asyncio.run(run())


def test_the_time_to_come_back_grows_with_the_line_and_with_the_time_of_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("kvx.runtime.serving.admission.time.monotonic", lambda: now)

    async def retry_after(asked: Admission) -> float:
        with pytest.raises(Refused) as found:
            await asked.enter("a")
        return found.value.retry_after

    async def run() -> None:
        nonlocal now
        asked = admission(requests=1, waiting=0)
        await asked.enter("a")
        assert await retry_after(asked) == 1
        for _ in range(200):
            now += 0.8
            asked.leave("a")
            await asked.enter("a")
        short = await retry_after(asked)
        asked = admission(requests=1, waiting=9)
        await asked.enter("a")
        for _ in range(200):
            now += 0.8
            asked.leave("a")
            await asked.enter("a")
        tasks = await waiters(asked, 9)
        assert short == 1
        assert await retry_after(asked) == 8
        for task in tasks:
            task.cancel()

    asyncio.run(run())


def test_the_time_to_come_back_is_bounded() -> None:
    async def run() -> None:
        asked = admission(requests=1, waiting=500, client_requests=1000)
        await asked.enter("a")
        asked._between = 1.0
        tasks = await waiters(asked, 500)
        with pytest.raises(Refused) as found:
            await asked.enter("a")
        assert found.value.retry_after == 60
        assert "60 s" in str(found.value)
        for task in tasks:
            task.cancel()

    asyncio.run(run())


def test_who_stops_waiting_leaves_nothing_behind() -> None:
    async def run() -> None:
        asked = admission(requests=1)
        await asked.enter("a")
        tasks = await waiters(asked, 3)
        tasks[0].cancel()
        await settle()
        assert asked.waiting == 2
        asked.leave("a")
        await settle()
        assert [task.done() for task in tasks] == [True, True, False]
        asked.leave("a")
        await settle()
        assert (asked.active, asked.waiting) == (1, 0)

    asyncio.run(run())


def test_who_stops_waiting_at_the_moment_of_being_let_in_passes_the_place_on() -> None:
    async def run() -> None:
        asked = admission(requests=1)
        await asked.enter("a")
        first, second = await waiters(asked, 2)
        asked.leave("a")
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        await asyncio.wait_for(second, 1)
        asked.leave("a")
        assert asked.active == 0

    asyncio.run(run())


def test_who_comes_while_others_stop_waiting_does_not_wait_for_nobody() -> None:
    async def run() -> None:
        asked = admission(requests=1)
        await asked.enter("a")
        [gone] = await waiters(asked, 1)
        gone.cancel()
        asked.leave("a")  # before it has left the line
        assert await asyncio.wait_for(asked.enter("a"), 1) == 0.0

    asyncio.run(run())


def test_a_service_that_ends_refuses_newcomers_and_lets_those_in_who_wait() -> None:
    async def run() -> None:
        asked = admission(requests=1)
        await asked.enter("a")
        [waiting] = await waiters(asked, 1)
        asked.close()
        assert await refusal(asked) == "closing"
        asked.leave("a")
        await asyncio.wait_for(waiting, 1)
        asked.leave("a")
        assert await refusal(asked) == "closing"
        assert asked.active == 0

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_bounds_hold_and_all_places_come_back(seed: int) -> None:
    chance = random.Random(seed)
    most = {"requests": chance.randint(1, 4), "waiting": chance.randint(0, 6), "client_requests": 5}
    outcomes: dict[str, int] = {}

    async def run() -> None:
        asked = admission(**most, patience=0.004)
        inside = 0

        async def client(name: str) -> None:
            nonlocal inside
            try:
                await asked.enter(name)
            except Refused as error:
                outcomes[error.reason] = outcomes.get(error.reason, 0) + 1
                return
            inside += 1
            try:
                assert inside <= most["requests"]
                await asyncio.sleep(chance.choice((0, 0.001, 0.003)))
                outcomes["done"] = outcomes.get("done", 0) + 1
            finally:
                inside -= 1
                asked.leave(name)

        tasks: list[asyncio.Task[None]] = []
        for _ in range(600):
            tasks.append(asyncio.create_task(client(chance.choice("abc"))))
            if chance.random() < 0.3:
                chance.choice(tasks[-10:]).cancel()
            if chance.random() < 0.4:
                await asyncio.sleep(chance.choice((0, 0, 0.002)))
            assert asked.waiting <= most["waiting"]
            assert 0 <= asked.active <= most["requests"]
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(one) for one in ended} <= {type(None), asyncio.CancelledError}
        assert (asked.active, asked.waiting, inside, {**asked._inside, **asked._outside}) == (0, 0, 0, {})
        assert await asked.enter("a") == 0.0

    asyncio.run(run())
    assert outcomes["done"] > 50
    assert sum(outcomes.values()) - outcomes["done"] > 50  # were refused
