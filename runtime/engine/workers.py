"""Several decodes side by side: one copy of the weights, one stream of sources, one stream of results.

The consumer's thread alone draws from the sources, so that they may be anything, also what blocks or answers Ctrl-C.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

from kvx.runtime.decoding.backend import Backend
from kvx.runtime.decoding.decode import Cancelled, never
from kvx.runtime.decoding.rows import Source
from kvx.runtime.decoding.schedule import DecodeStats, Outcome

Decode = Callable[[Iterator[Source], DecodeStats, Cancelled], Iterator[Outcome]]

SOURCES_AT_ONCE = 16


def side_by_side(
    decodes: Sequence[Decode], sources: Iterable[Source], stats: DecodeStats, *, at_once: int = SOURCES_AT_ONCE
) -> Generator[Outcome, None, None]:
    """What becomes of all sources, as they are over, from these decodes, each given up to `at_once` sources."""
    if len(decodes) == 1:
        yield from decodes[0](iter(sources), stats, never)
    else:
        yield from decode_in_parallel(decodes, sources, stats, at_once=at_once)


def decode_in_parallel(
    decodes: Sequence[Decode], sources: Iterable[Source], stats: DecodeStats, *, at_once: int = SOURCES_AT_ONCE
) -> Iterator[Outcome]:
    """Each decode in a thread of its own, all fed from `sources` → what becomes of all, as they are over.

    An exception of one ends all and is raised here. Closing the iterator ends them at their next step. `stats`
    gets the sum of what they did.
    """
    drawn = iter(sources)
    news: queue.SimpleQueue[_News] = queue.SimpleQueue()
    workers = [_Worker(decode, news) for decode in decodes]
    for worker in workers:
        worker.start()
    running = len(workers)
    try:
        while running:
            match news.get():
                case Outcome() as outcome:
                    yield outcome
                case _Worker() as hungry:
                    hungry.feed(list(itertools.islice(drawn, at_once)))
                case BaseException() as error:
                    raise error
                case None:
                    running -= 1
    finally:
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join()
            stats.add(worker.stats)
        stats.cache_bytes = max(stats.cache_bytes, sum(worker.stats.cache_bytes for worker in workers))


def shared_out(backends: Sequence[Backend], decodes: int) -> list[Backend]:
    """The backend of each of so many decodes: one after the other, and again."""
    return list(itertools.islice(itertools.cycle(backends), decodes))


class _Worker(threading.Thread):
    """One decode. What it finds, its hunger for sources (itself) and its end (None, or what went wrong) are news.

    Nothing bounds the queue but this: who is fed only after the news before have been taken cannot run away.
    """

    def __init__(self, decode: Decode, news: queue.SimpleQueue[_News]) -> None:
        super().__init__(daemon=True)
        self.stats = DecodeStats()
        self._decode = decode
        self._news = news
        self._food: queue.SimpleQueue[list[Source]] = queue.SimpleQueue()
        self._stopped = False

    def run(self) -> None:
        """Decodes until there are no more sources, or nobody wants the results."""
        try:
            for outcome in self._decode(self._sources(), self.stats, lambda: self._stopped):
                self._news.put(outcome)
                if self._stopped:
                    return
            self._news.put(None)
        except BaseException as error:  # raised again in the consumer's thread
            self._news.put(error)

    def feed(self, sources: list[Source]) -> None:
        """Gives the worker sources; none means that there are no more."""
        self._food.put(sources)

    def stop(self) -> None:
        """Ends the worker at its next step."""
        self._stopped = True
        self.feed([])

    def _sources(self) -> Iterator[Source]:
        while not self._stopped:
            self._news.put(self)
            food = self._food.get()
            if not food:
                return
            yield from food


_News = Outcome | _Worker | BaseException | None
