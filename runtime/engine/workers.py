"""The threads that decode: each steps its lanes in turn, over one copy of the weights and one queue of requests."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from kvx.runtime.decoding.backend import Backend
from kvx.runtime.decoding.device_loop import DeviceLane, LoopBackend
from kvx.runtime.decoding.lane import Lane, Room
from kvx.runtime.decoding.plan import DEFAULT_ROWS, Plan
from kvx.runtime.decoding.results import Decided, DecodeStats, News, Outcome, StopReason
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.engine.request import LaneKey, Owner, Request
from kvx.runtime.engine.waiting import Waiting
from kvx.runtime.errors import CapacityError, EngineClosed, Overloaded, is_out_of_threads, out_of_threads

GATHER_STEPS = 4  # that newcomers wait for others to be encoded with, while rows are active
NOTHING_TO_DO = 0.005  # seconds that a worker waits where nobody who waits can be let in
TRIM_TURNS = 16  # between two looks for room that lanes do not need
SMOOTHING = 0.05  # of the mean time between two requests that are over

_log = logging.getLogger("kvx")


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """How many `workers` there are, on all devices together; the `rows` of each one's lanes (None: as many as fit, up
    to a default); and the `cache_bytes` that they share (None: the default). After `idle_seconds` without work a worker
    ends, and its caches with it, until there is more.
    """

    workers: int
    rows: int | None = None
    cache_bytes: int | None = None
    idle_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine is busy with: the requests that are `waiting` for a seat, the `rows` that its next steps take, and
    the `cache_bytes` that its buffers hold.
    """

    waiting: int = 0
    rows: int = 0
    cache_bytes: int = 0


class Workers:
    """The decode loops over a model's backends, and the requests that wait for them. Any thread may use it."""

    def __init__(self, model: LoadedModel, settings: WorkerSettings) -> None:
        self.model = model
        self.settings = settings
        self.waiting = Waiting()
        self.lock = threading.Condition()
        self.aborted = False
        self._stats = DecodeStats()  # of workers that have ended
        self._closed = False
        self._threads: dict[int, _Worker] = {}
        self._idle = 0
        self._between = 0.0  # seconds, the mean between two requests that are over
        self._last_over = 0.0
        _running.add(self)

    def add(self, requests: Sequence[Request], *, most: int | None = None) -> None:
        """They are decoded from now on. Raises Overloaded where more than `most` would wait then, EngineClosed, and
        CapacityError where the system gives no thread.
        """
        with self.lock:
            if self._closed:
                raise closed()
            if most is not None and self.waiting.submitted + len(requests) > most:
                raise Overloaded.of(self.waiting.submitted, most, self._retry_after())
            self._start(len(self.waiting) + len(requests))
            self.waiting.add(requests)
            self.lock.notify(len(requests))

    def withdraw(self, owner: Owner) -> list[Request]:
        """Takes out what waits of an owner's."""
        with self.lock:
            return self.waiting.withdraw(lambda request: request.owner is owner)

    def cancel(self, owner: Owner) -> None:
        """Ends what waits of an owner's, as it is."""
        for request in self.withdraw(owner):
            end(request, "cancelled")

    def stats(self) -> DecodeStats:
        """What has been done so far."""
        with self.lock:
            total = DecodeStats()
            for one in (self._stats, *(worker.stats for worker in self._threads.values())):
                total.add(one)
            total.cache_bytes = max(
                self._stats.cache_bytes, sum(worker.stats.cache_bytes for worker in self._threads.values())
            )
            return total

    def load(self) -> EngineLoad:
        """What they are busy with now."""
        with self.lock:
            lanes = [lane for worker in self._threads.values() for lane in worker.lanes]
            rows = sum(lane.active for lane in lanes if not lane.empty)  # what is over is active until others come
            return EngineLoad(len(self.waiting), rows, sum(lane.bytes for lane in lanes))

    def close(self, *, drain: bool) -> None:
        """Ends all workers: after all requests, or, without `drain`, at their next step."""
        with self.lock:
            self._closed = True
            self.aborted |= not drain
            threads = list(self._threads.values())
            self.lock.notify_all()
        if threading.current_thread() in threads:  # from a callback: it ends by itself
            return
        for thread in threads:
            thread.join()
        with self.lock:
            left = self.waiting.withdraw(lambda request: True)
        for request in left:
            end(request, "cancelled")

    def has_work(self, worker: _Worker) -> bool:
        """Waits until there is something to do for a worker. False where it has to end: it has been forgotten then."""
        if worker.busy:
            return True
        with self.lock:
            self._idle += 1
            try:
                self.lock.wait_for(
                    lambda: worker.busy or self.waiting.lanes or self._closed, self.settings.idle_seconds
                )
            finally:
                self._idle -= 1
            if worker.busy or self.waiting.lanes:
                return True
            self._leave(worker)
            return False

    def leave(self, worker: _Worker) -> None:
        """Forgets a worker that ends."""
        with self.lock:
            self._leave(worker)

    def noted_over(self, count: int) -> None:
        """Notes when requests were over."""
        now = time.monotonic()
        between = min(now - self._last_over, 1.0) / count if self._last_over else 0.0
        self._between += SMOOTHING * (between - self._between)
        self._last_over = now

    def plan(self, key: LaneKey) -> Plan:
        """What a lane of one worker may hold."""
        specs = self.model.specs(key.beams, shortlisted=key.shortlisted)
        rows = self.settings.rows or max(DEFAULT_ROWS, key.beams)
        plan = Plan.of(
            self.model.manifest,
            specs,
            rows=key.beams,
            cache_bytes=self.settings.cache_bytes,
            max_new_tokens=1,
            beams=key.beams,
        )
        return plan.with_rows(rows).share_of(self.settings.workers)

    def _retry_after(self) -> float:
        """Seconds until those who wait now should have been let in."""
        return round(max(0.1, self._between * len(self.waiting)), 1)

    def _start(self, waiting: int) -> None:
        """Starts workers for those who wait, up to as many as there may be."""
        free = self.settings.workers - len(self._threads)
        for _ in range(min(free, waiting - self._idle)):
            number = next(one for one in range(self.settings.workers) if one not in self._threads)
            backends = self.model.backends
            worker = _Worker(self, backends[number % len(backends)], number)
            try:
                worker.start()
            except CapacityError:
                if not self._threads:
                    raise
                return  # those that there are serve too
            self._threads[number] = worker

    def _leave(self, worker: _Worker) -> None:
        if self._threads.get(worker.number) is worker:  # and not its successor
            del self._threads[worker.number]
            peak = max(self._stats.cache_bytes, worker.stats.cache_bytes)
            self._stats.add(worker.stats)
            self._stats.cache_bytes = peak


class _Worker(threading.Thread):
    """One loop with its lanes, all on one backend."""

    def __init__(self, workers: Workers, backend: Backend, number: int) -> None:
        super().__init__(name=f"kvx worker {number}", daemon=True)
        self.number = number
        self.stats = DecodeStats()
        self._workers = workers
        self._backend = backend
        self._feeds: dict[LaneKey, _Feed] = {}
        self._turns = 0

    @property
    def busy(self) -> bool:
        """Whether any lane has something to do."""
        return any(feed.requests for feed in self._feeds.values())

    @property
    def lanes(self) -> list[Lane | DeviceLane]:
        """Its lanes, for any thread to look at."""
        return [feed.lane for feed in list(self._feeds.values())]

    def start(self) -> None:
        """Starts it. Raises CapacityError."""
        try:
            super().start()
        except RuntimeError as error:
            if is_out_of_threads(error):
                raise out_of_threads("A decode loop cannot be started") from error
            raise

    def run(self) -> None:
        """Turns, until there is nothing to do for long."""
        try:
            while self._workers.has_work(self):
                try:
                    self._turn()
                except BaseException as error:  # nobody may wait for what will never come
                    for feed in list(self._feeds.values()):
                        self._fail(feed, error)
        finally:
            self._workers.leave(self)
            for key in list(self._feeds):
                self._drop(key)

    def room_for(self, feed: _Feed) -> int:
        """Bytes that a lane may take beside the others."""
        others = sum(other.lane.reserved for other in self._feeds.values() if other is not feed)
        return max(0, feed.plan.cache_bytes - others)

    def make_room(self, feed: _Feed) -> bool:
        """Gives up what the other lanes do not need, for one that has no room; whether there was anything."""
        others = [(key, other) for key, other in self._feeds.items() if other is not feed]
        before = sum(other.lane.reserved for _, other in others)
        for key, other in others:
            if other.lane.empty and not self._workers.waiting.count(key):
                self._drop(key)
            elif other.lane.empty or self._turns % TRIM_TURNS == 0:
                other.lane.trim()
        return sum(other.lane.reserved for other in self._feeds.values() if other is not feed) < before

    def _turn(self) -> None:
        """A step of every lane, after those who are not wanted any more have left."""
        self._turns += 1
        self._end_the_unwanted()
        for key in self._workers.waiting.lanes:
            if key not in self._feeds:
                self._open(key)
        feeds = list(self._feeds.values())
        ran = [feed for feed in feeds if feed.key in self._feeds and self._step(feed)]  # some are given up meanwhile
        if len(self._feeds) > 1:
            self._look_after_lanes()
        if not ran and (self.busy or self._workers.waiting.lanes):
            with self._workers.lock:
                self._workers.lock.wait(NOTHING_TO_DO)

    def _step(self, feed: _Feed) -> bool:
        """A step of a lane; whether there was one to take."""
        try:
            running = feed.lane.fill()
            self._deliver(feed, feed.lane.broken())
            if running:
                feed.steps += 1
                self._deliver(feed, feed.lane.advance())
            elif not feed.lane.empty:
                self.make_room(feed)
        except BaseException as error:
            self._fail(feed, error)
            return False
        return running

    def _look_after_lanes(self) -> None:
        """Notes what all take together, and gives up those that have been empty for long."""
        self.stats.cache_bytes = max(self.stats.cache_bytes, sum(feed.lane.bytes for feed in self._feeds.values()))
        now = time.monotonic()
        for key, feed in list(self._feeds.items()):
            if not feed.lane.empty:
                feed.used = now
            elif now - feed.used > self._workers.settings.idle_seconds:
                self._drop(key)

    def _drop(self, key: LaneKey, error: BaseException | None = None) -> None:
        """Gives up a lane, of which nobody may expect anything any more."""
        feed = self._feeds.pop(key)
        try:
            feed.lane.close(error)
        except Exception:
            _log.exception("a lane could not be closed")

    def _open(self, key: LaneKey) -> None:
        """A lane of this kind. Who waits for it hears of it where there can be none."""
        try:
            feed = _Feed(key, self._workers, self)
            feed.open(self._backend, self.stats)
            self._feeds[key] = feed
            _log.debug("lane opened: %s, %s", key, feed.plan)
        except BaseException as error:
            with self._workers.lock:
                refused = self._workers.waiting.withdraw(lambda request: request.lane == key)
            for request in refused:
                fail(request, error)

    def _end_the_unwanted(self) -> None:
        workers, now = self._workers, time.monotonic()
        owners = {request.owner for feed in self._feeds.values() for request in feed.requests}
        over = {owner for owner in owners.union(workers.waiting.owners) if _wants_no_more(owner)}

        def reason(request: Request) -> StopReason | None:
            return "cancelled" if workers.aborted or request.owner in over else request.late(now)

        for feed in list(self._feeds.values()):
            stopped = {request: why for request in feed.requests if (why := reason(request)) is not None}
            if stopped:
                try:
                    self._deliver(feed, feed.lane.stop(stopped.get))  # type: ignore[arg-type]  # all are requests
                except BaseException as error:
                    self._fail(feed, error)
        if over or workers.aborted or now >= workers.waiting.earliest:
            with workers.lock:
                left = workers.waiting.withdraw(lambda request: reason(request) is not None)
            for request in left:
                end(request, reason(request) or "cancelled")

    def _deliver(self, feed: _Feed, news: Sequence[News]) -> None:
        """Puts outcomes down in their requests, and tells the owners, each once."""
        over: dict[Owner, list[Request]] = {}
        for one in news:
            request = one.sentence
            assert isinstance(request, Request)
            if isinstance(one, Decided):
                request.owner.decided(one)
                continue
            request.outcomes[one.target] = one
            if one.error is not None:
                request.error = _told(one.error)
            if request.finished:
                feed.requests.discard(request)
                over.setdefault(request.owner, []).append(request)
        for owner, requests in over.items():
            self._workers.noted_over(len(requests))
            owner.over(requests)

    def _fail(self, feed: _Feed, error: BaseException) -> None:
        """A lane has broken: whoever was in it hears of it, and the next who come get another."""
        _log.warning("a decode loop failed with %d requests: %r", len(feed.requests), error)
        for request in feed.requests:
            fail(request, error)
        feed.requests.clear()
        self._drop(feed.key, error)


class _Feed:
    """A lane of a worker, and where its sentences come from. Newcomers wait a few steps for others to be encoded with,
    unless nothing runs or there are enough.
    """

    lane: Lane | DeviceLane

    def __init__(self, key: LaneKey, workers: Workers, worker: _Worker) -> None:
        self.key = key
        self.plan = workers.plan(key)
        self.requests: set[Request] = set()
        self.steps = 0
        self.used = time.monotonic()
        self._workers = workers
        self._worker = worker
        self._noticed: int | None = None  # the step at which somebody was first seen to wait
        self._taken = -1  # and the last at which somebody was let in

    def open(self, backend: Backend, stats: DecodeStats) -> None:
        """Makes the lane."""
        if self.key.looped and isinstance(backend, LoopBackend):
            self.lane = DeviceLane(backend, self.plan, self, stats)
        else:
            shortlisted = self.key.shortlisted
            self.lane = Lane(
                backend, self.plan, self, stats, shortlisted=shortlisted, allowance=lambda: self._worker.room_for(self)
            )

    def take(self, most: int, room: Room) -> list[Request]:
        """See Source."""
        count = self._workers.waiting.count(self.key)
        if not self._due(count, most, room):
            return []
        found = self._let_in(most, room)
        if not found and self._worker.make_room(self):
            found = self._let_in(most, room)
        if found:
            self._taken = self._noticed = self.steps
            self.requests.update(found)
        return found

    def _let_in(self, most: int, room: Room) -> list[Request]:
        with self._workers.lock:
            return self._workers.waiting.take(self.key, most, room)

    def _due(self, count: int, most: int, room: Room) -> bool:
        if not count:
            self._noticed = None
            return False
        if self._noticed is None:
            self._noticed = self.steps
        gathered = self.steps - self._noticed >= GATHER_STEPS or self._taken == self.steps
        return gathered or count >= most or not room.running


def closed() -> EngineClosed:
    """The error of whoever asks a closed engine for something."""
    return EngineClosed("The engine is closed", expected="an engine that is open", remedy="Load the model again.")


def end(request: Request, reason: StopReason) -> None:
    """Gives a request that was never let in its outcomes, and tells its owner."""
    for target in range(len(request.targets)):
        request.outcomes[target] = Outcome.nothing(request, target, stopped=reason)
    request.owner.over([request])


def fail(request: Request, error: BaseException) -> None:
    """Gives a request an error in place of outcomes, and tells its owner."""
    request.error = _told(error)
    request.owner.over([request])


def _told(error: BaseException) -> BaseException:
    """What a caller hears of an error."""
    if not isinstance(error, MemoryError):
        return error
    return CapacityError(
        f"There is not enough memory for the decode loops ({error or 'an allocation failed'})",
        expected="memory for the cache, the logits and the texts of all rows",
        remedy="Use fewer rows (`rows`), fewer workers (`workers`) or a smaller cache (`cache_bytes`).",
        option="rows",
    )


def _wants_no_more(owner: Owner) -> bool:
    try:
        return owner.cancelled()
    except BaseException as error:
        owner.fail(error)
        return True


_running: weakref.WeakSet[Workers] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_running.clear)  # its threads did not come along, nor did its requests


@atexit.register
def _close_all() -> None:
    """At the end of the interpreter no loop may be inside a backend, which would crash."""
    for workers in list(_running):
        workers.close(drain=False)
