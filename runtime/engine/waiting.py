"""Requests that wait for a seat: who is let in next, and beside whom."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from kvx.runtime.decoding.lane import Room
from kvx.runtime.decoding.plan import GROUP_POSITIONS
from kvx.runtime.decoding.search import GIVEN
from kvx.runtime.engine.request import LaneKey, Owner, Request

MOST_OVERTAKEN = 64  # requests that came later and may be let in before one that waits
LOOKED_AT = 64  # waiting requests among which those of similar length are looked for
PADDING = 8  # positions that a shorter source may always be padded by


class Waiting:
    """Requests in the order in which they came, by lane. Its caller guards it.

    The one that waits longest is let in first, with others of similar length. One that has no room beside what is
    seated lets others pass, of any lane. Once MOST_OVERTAKEN that came later have passed, it is the next of its lane;
    if it still has no room, nobody else is let in before it.
    """

    def __init__(self) -> None:
        self._lanes: dict[LaneKey, list[Request]] = {}
        self._owners: Counter[Owner] = Counter()
        self.submitted = 0  # of them, by owners that do not bound their number
        self.earliest = math.inf  # no deadline is before this, in seconds of time.monotonic
        self._refused: set[Request] = set()  # had no room when they were looked at
        self._blocked: Request | None = None  # of these, the one that has been overtaken often enough
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        """How many wait."""
        return sum(map(len, self._lanes.values()))

    def __iter__(self) -> Iterator[Request]:
        """All that wait."""
        return (request for waiting in self._lanes.values() for request in waiting)

    @property
    def lanes(self) -> list[LaneKey]:
        """Those that somebody waits for."""
        return list(self._lanes)

    @property
    def owners(self) -> list[Owner]:
        """Those of all that wait who have to be asked whether they still want it."""
        return list(self._owners)

    def count(self, lane: LaneKey) -> int:
        """How many wait for a lane."""
        return len(self._lanes.get(lane, ()))

    def add(self, requests: Iterable[Request]) -> None:
        """They wait from now on, after those that do already."""
        for request in requests:
            request.arrival = next(self._arrivals)
            self._lanes.setdefault(request.lane, []).append(request)
            self.submitted += not request.owner.reads_ahead
            if request.owner.asked:
                self._owners[request.owner] += 1
            if request.deadline is not None:
                self.earliest = min(self.earliest, request.deadline)

    def take(self, lane: LaneKey, most: int, room: Room) -> list[Request]:
        """Up to `most` that are let into a lane together, the one that has waited longest first; none where none of
        them fits.
        """
        waiting = self._lanes.get(lane, [])
        if self._blocked is not None and (self._blocked.lane != lane or not room.fits(self._blocked)):
            return []
        first = self._first(waiting, room)
        if first is None:
            return []
        taken = [first, *_similar(first, waiting, most - 1, room)]
        self._remove(lane, set(taken))
        newest = max(one.arrival for one in taken)
        passed = {one for one in waiting[:LOOKED_AT] if one.arrival < newest}
        for request in passed.union(self._refused).difference(taken):
            request.overtaken += sum(one.arrival > request.arrival for one in taken)
            if request in self._refused and request.overtaken >= MOST_OVERTAKEN:
                self._blocked = self._blocked or request
        return taken

    def withdraw(self, unwanted: Callable[[Request], bool]) -> list[Request]:
        """Takes out all that are unwanted."""
        found = [request for request in self if unwanted(request)]
        for lane in {request.lane for request in found}:
            self._remove(lane, set(found))
        self.earliest = min((one.deadline for one in self if one.deadline is not None), default=math.inf)
        return found

    def _first(self, waiting: list[Request], room: Room) -> Request | None:
        """Who is next: the one that has been overtaken too often, else the first that fits."""
        for request in sorted(waiting[:LOOKED_AT], key=lambda one: one.overtaken < MOST_OVERTAKEN):
            if room.fits(request):
                self._refused.discard(request)
                return request
            self._refused.add(request)
            if request.overtaken >= MOST_OVERTAKEN:
                self._blocked = request
                return None
        return None

    def _remove(self, lane: LaneKey, found: set[Request]) -> None:
        gone = [request for request in self._lanes[lane] if request in found]
        self._lanes[lane] = [request for request in self._lanes[lane] if request not in found]
        if not self._lanes[lane]:
            del self._lanes[lane]
        self.submitted -= sum(not request.owner.reads_ahead for request in gone)
        self._owners -= Counter(request.owner for request in gone if request.owner.asked)
        self._refused -= found
        if self._blocked in found:
            self._blocked = None


def _similar(first: Request, waiting: list[Request], most: int, room: Room) -> list[Request]:
    """Up to `most` that may be encoded beside the first with little padding, the most similar first; those that have
    been overtaken too often before all others.
    """
    length = len(first.ids)
    near = [one for one in waiting[:LOOKED_AT] if one is not first]
    near.sort(key=lambda one: (one.overtaken < MOST_OVERTAKEN, abs(len(one.ids) - length)))
    found: list[Request] = []
    longest = shortest = length
    for request in near:
        if len(found) == most:
            break
        low, high = min(shortest, len(request.ids)), max(longest, len(request.ids))
        if high - low > max(PADDING, high // 4) or high * (len(found) + 2) > GROUP_POSITIONS:
            continue
        if (high == longest and _alike(request, first)) or room.fits(request):
            found.append(request)
            shortest, longest = low, high
    return found


def _alike(one: Request, other: Request) -> bool:
    """Whether their targets may become equally long."""
    return one.options is other.options and one.options is not None and one.options.search is not GIVEN
