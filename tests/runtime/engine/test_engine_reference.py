"""One engine for many callers over the whole test set of the reference model, and for very many requests."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

from kvx import Engine, Handle, Result, TranslateOptions, Translator
from kvx.tests.memory import resident_bytes

if TYPE_CHECKING:
    from kvx.tests.conftest import Seed

THREADS = 64
UNDER_WAY = 300


@pytest.fixture(scope="module")
def engine(seed_translator: Translator) -> Engine:
    return seed_translator.engine


def expected(seed: Seed) -> list[tuple[int, ...]]:
    return [tuple(line["ids"]) for line in seed.greedy]  # type: ignore[arg-type]


def _from_threads(engine: Engine, seed: Seed, lines: int) -> None:
    """Every thread has its share of the lines; every other one reads the tokens as they come."""
    sources, found = seed.sources[:lines], dict[int, tuple[int, ...]]()

    def share(first: int) -> None:
        for number in range(first, lines, THREADS):
            handle = engine.submit(sources[number])
            if number % 2:
                *tokens, last = handle
                assert isinstance(last, Result)
                assert "".join(token.text for token in tokens if not isinstance(token, Result)) == last.translation.text
            found[number] = handle.result().ids

    threads = [threading.Thread(target=share, args=(first,), daemon=True) for first in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert [found.get(number) for number in range(lines)] == expected(seed)[:lines]


def _from_tasks(engine: Engine, seed: Seed, lines: int) -> None:
    async def main() -> None:
        translations = await asyncio.gather(*(engine.translate(text) for text in seed.sources[:lines]))
        assert [one.ids for one in translations] == expected(seed)[:lines]

    asyncio.run(main())


def test_threads_get_the_lines_of_the_reference(engine: Engine, seed: Seed) -> None:
    _from_threads(engine, seed, 128)


def test_tasks_get_the_lines_of_the_reference(engine: Engine, seed: Seed) -> None:
    _from_tasks(engine, seed, 100)


@pytest.mark.proof
def test_sixty_four_threads_get_every_line_of_the_reference(engine: Engine, seed: Seed) -> None:
    _from_threads(engine, seed, len(seed.sources))


@pytest.mark.proof
def test_a_thousand_tasks_get_every_line_of_the_reference(engine: Engine, seed: Seed) -> None:
    _from_tasks(engine, seed, 1000)


@pytest.mark.proof
def test_memory_does_not_grow_over_fifty_thousand_requests(numbers_translator: Translator) -> None:
    _memory_stays(numbers_translator.engine, 50_000)


def test_memory_does_not_grow_over_many_requests(numbers_translator: Translator) -> None:
    _memory_stays(numbers_translator.engine, 6_000)


def _memory_stays(engine: Engine, requests: int) -> None:
    """The most that is resident in the second half, against the first."""
    texts: Sequence[str] = ["one", "seven", "twelve thousand", "nine hundred and ninety-nine"]
    handles, halves = deque[Handle](), [0, 0]
    for number, text in enumerate(itertools.islice(itertools.cycle(texts), requests)):
        handles.append(engine.submit(text, TranslateOptions(beam_size=2 if number % 10 == 0 else 1)))
        if len(handles) == UNDER_WAY:
            handles.popleft().result()
        if number % 100 == 0:
            half = int(number >= requests // 2)
            halves[half] = max(halves[half], resident_bytes())
    assert halves[1] - halves[0] < 0.02 * halves[0] + 2 * 2**20
