"""Items of an iterable as they come: those that are at hand, without waiting for more."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from kvx.runtime.errors import is_out_of_threads, out_of_threads

END = 0.1  # seconds that a thread gets to end
PAUSE = 0.01  # seconds without a further item, after which those at hand are enough

Item = TypeVar("Item")


class Supply(Protocol[Item]):
    """Where items come from. `error` is what ended it, if it did not end by itself. `tell` is called, in any thread,
    when something has come that was asked for.
    """

    error: BaseException | None
    exhausted: bool
    tell: Callable[[], None]

    def take(self, most: int, *, wait: bool) -> list[Item]:
        """Up to `most` items that are at hand. None where there is none: for good where it is `exhausted`, which is
        always so where it may `wait`. Raises CapacityError where the system has no thread to wait in.
        """
        ...

    def rest(self) -> list[Item]:
        """The items that have come but have not been taken. Nothing more is wanted."""
        ...


class Listed(Generic[Item]):
    """Items that never have to be waited for."""

    def __init__(self, items: Iterator[Item]) -> None:
        self.error: BaseException | None = None
        self.exhausted = False
        self.tell: Callable[[], None] = lambda: None
        self._items = items

    def take(self, most: int, *, wait: bool) -> list[Item]:
        """See Supply."""
        found: list[Item] = []
        try:
            for item in itertools.islice(self._items, most):
                found.append(item)
        except Exception as error:
            self.error = error
        self.exhausted = len(found) < most
        return found

    def rest(self) -> list[Item]:
        """See Supply."""
        self.exhausted = True
        return []


class Awaited(Generic[Item]):
    """Items that may be long in coming, as from a pipe or a queue. A thread of its own reads them, never more of them
    than were asked for.
    """

    def __init__(self, items: Iterator[Item]) -> None:
        self.error: BaseException | None = None
        self.exhausted = False
        self.tell: Callable[[], None] = lambda: None
        self._wanted = threading.Semaphore(0)
        self._asked_for = 0
        self._closed = False
        self._come: queue.SimpleQueue[_Come[Item] | BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, args=(items,), name="kvx reading", daemon=True)

    def take(self, most: int, *, wait: bool) -> list[Item]:
        """See Supply."""
        if self.exhausted:
            return []
        if not self._thread.ident:
            self._start()
        if most > self._asked_for:
            self._wanted.release(most - self._asked_for)
            self._asked_for = most
        found: list[Item] = []
        while len(found) < most and not self.exhausted:
            try:
                come = self._come.get(timeout=None if wait and not found else PAUSE)
            except queue.Empty:
                break
            if isinstance(come, _Come):
                found.append(come.item)
                self._asked_for -= 1
            else:
                self.error, self.exhausted = come, True
        return found

    def rest(self) -> list[Item]:
        """See Supply. The thread ends, at the latest when the item that it waits for has come."""
        self._closed = True
        self._wanted.release()
        if self._thread.ident:
            self._thread.join(END)
        found: list[Item] = []
        while not self.exhausted and not self._come.empty():
            come = self._come.get()
            if isinstance(come, _Come):
                found.append(come.item)
            else:
                self.error = come
                break
        self.exhausted = True
        return found

    def _start(self) -> None:
        try:
            self._thread.start()
        except RuntimeError as error:
            if is_out_of_threads(error):
                raise out_of_threads("The thread that reads the texts cannot be started") from error
            raise

    def _read(self, items: Iterator[Item]) -> None:
        try:
            while True:
                self._wanted.acquire()
                if self._closed:
                    return
                self._come.put(_Come(next(items)))
                self.tell()
        except StopIteration:
            self._come.put(None)
            self.tell()
        except BaseException as error:  # raised again in the consumer's thread
            self._come.put(error)
            self.tell()


class _Come(Generic[Item]):
    """An item, told from the end of all and from an error."""

    def __init__(self, item: Item) -> None:
        self.item = item


def supply_of(items: Iterable[Item], source: object) -> Supply[Item]:
    """The items that are made of a `source`: of a list or tuple they are all at hand."""
    return Listed(iter(items)) if isinstance(source, list | tuple) else Awaited(iter(items))
