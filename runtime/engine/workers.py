"""Several loops side by side: one copy of the weights, one stream of sentences, one stream of results.

The consumer's thread alone draws the sentences, so that they may be anything, also what blocks or answers Ctrl-C.
"""

from __future__ import annotations

import atexit
import itertools
import queue
import threading
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence

from kvx.runtime.decoding.backend import Backend
from kvx.runtime.decoding.decode import Cancelled, Loop, never
from kvx.runtime.decoding.results import DecodeStats, Outcome, Sentence
from kvx.runtime.errors import CapacityError, is_out_of_threads, out_of_threads

SENTENCES_AT_ONCE = 16


def side_by_side(
    loops: Sequence[Loop],
    sentences: Iterable[Sentence],
    stats: DecodeStats,
    cancelled: Cancelled = never,
    *,
    at_once: int = SENTENCES_AT_ONCE,
) -> Generator[Outcome, None, None]:
    """What becomes of all sentences, as they are over, from these loops, each given up to `at_once` of them.

    Raises CapacityError where memory is short.
    """
    try:
        if len(loops) == 1:
            yield from loops[0].run(iter(sentences), stats, cancelled)
        else:
            yield from run_in_parallel(loops, sentences, stats, cancelled, at_once=at_once)
    except MemoryError as error:
        raise CapacityError(
            f"There is not enough memory for {len(loops)} decode loops ({error or 'an allocation failed'})",
            expected="memory for the cache, the logits and the texts of all rows",
            remedy="Use fewer rows (`rows`), fewer workers (`workers`) or a smaller cache (`cache_bytes`).",
            option="rows",
        ) from None


def run_in_parallel(
    loops: Sequence[Loop],
    sentences: Iterable[Sentence],
    stats: DecodeStats,
    cancelled: Cancelled = never,
    *,
    at_once: int = SENTENCES_AT_ONCE,
) -> Iterator[Outcome]:
    """Each loop in a thread of its own, all fed from `sentences` → what becomes of all, as they are over.

    An exception of one ends all and is raised here. Closing the iterator ends them at their next step. `stats`
    gets the sum of what they did.
    """
    drawn = iter(sentences)
    news: queue.SimpleQueue[_News] = queue.SimpleQueue()
    workers: list[_Worker] = []
    running = len(loops)
    try:
        for loop in loops:
            worker = _Worker(loop, cancelled, news)
            worker.start()
            workers.append(worker)
        while running:
            match news.get():
                case Outcome() as outcome:
                    yield outcome
                case _Worker() as asking:
                    asking.feed(list(itertools.islice(drawn, at_once)))
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


def shared_out(backends: Sequence[Backend], loops: int) -> list[Backend]:
    """The backend of each of `loops` loops: one after the other, and again."""
    return list(itertools.islice(itertools.cycle(backends), loops))


@atexit.register
def _stop_all() -> None:
    """At the end of the interpreter no loop may be inside a backend, which would crash."""
    for worker in list(_running):
        worker.stop()
    for worker in list(_running):
        worker.join()


class _Worker(threading.Thread):
    """One loop. What it finds, its asking for sentences (itself) and its end (None, or what went wrong) are news.

    Nothing else bounds the queue: a worker that is fed only after the news before have been taken cannot run away.
    """

    def __init__(self, loop: Loop, cancelled: Cancelled, news: queue.SimpleQueue[_News]) -> None:
        super().__init__(daemon=True)
        self.stats = DecodeStats()
        self._loop = loop
        self._cancelled = cancelled
        self._news = news
        self._fed: queue.SimpleQueue[list[Sentence]] = queue.SimpleQueue()
        self._stopped = False

    def start(self) -> None:
        """Starts it, to be stopped at the end of the interpreter at the latest. Raises CapacityError."""
        try:
            super().start()
        except RuntimeError as error:
            if is_out_of_threads(error):
                raise out_of_threads("A decode loop cannot be started") from error
            raise
        _running.add(self)

    def run(self) -> None:
        """Runs until there are no more sentences, or nobody wants the results."""
        try:
            for outcome in self._loop.run(self._sentences(), self.stats, self._over):
                self._news.put(outcome)
                if self._stopped:
                    return
            self._news.put(None)
        except BaseException as error:  # raised again in the consumer's thread
            self._news.put(error)

    def feed(self, sentences: list[Sentence]) -> None:
        """Gives the worker sentences; none means that there are no more."""
        self._fed.put(sentences)

    def stop(self) -> None:
        """Ends the worker at its next step."""
        self._stopped = True
        self.feed([])

    def _over(self) -> bool:
        return self._stopped or self._cancelled()

    def _sentences(self) -> Iterator[Sentence]:
        while not self._stopped:
            self._news.put(self)
            sentences = self._fed.get()
            if not sentences:
                return
            yield from sentences


_running: weakref.WeakSet[_Worker] = weakref.WeakSet()
_News = Outcome | _Worker | BaseException | None
