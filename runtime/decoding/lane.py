"""A lane: rows that step together, each seat with options of its own, filled from a source that never blocks."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvx.runtime.arrays import BoolArray, FloatArray, IntArray
from kvx.runtime.decoding.backend import Backend, Step, shortlisting_of, specs_of
from kvx.runtime.decoding.cache import Capacity, EncodedSource, KVCache
from kvx.runtime.decoding.choosing import choose
from kvx.runtime.decoding.plan import GROUP_POSITIONS, Plan, rung
from kvx.runtime.decoding.results import Decided, DecodeStats, News, Outcome, Sentence, StopReason
from kvx.runtime.decoding.rows import Choice, Rows, Seat
from kvx.runtime.decoding.search import GIVEN, log_probabilities
from kvx.runtime.decoding.shortlisted import ShortlistedStep

_log = logging.getLogger("kvx")

SHRINK_BELOW = 4  # buffers this many times too large are worth a repack
TOKENS_AT_ONCE = 128  # of all rows together: what fills a matrix product (docs/performance.md)

Stopped = Callable[[Sentence], StopReason | None]


class Room(Protocol):
    """What a lane says of itself to where its sentences come from."""

    @property
    def running(self) -> bool:
        """Whether any row is active, which waits while sentences are encoded."""
        ...

    def fits(self, sentence: Sentence) -> bool:
        """Whether the bytes have room for a target of a sentence beside what is seated."""
        ...


class Source(Protocol):
    """Where a lane's sentences come from."""

    def take(self, most: int, room: Room) -> Sequence[Sentence]:
        """Up to `most` sentences with options, to be encoded together; none where there are none now. It never blocks.
        The first of them fits into the room, if anything does.
        """
        ...


class Drawn:
    """Sentences of an iterator, in order."""

    def __init__(self, sentences: Iterable[Sentence]) -> None:
        self._sentences = iter(sentences)
        self._held_back: list[Sentence] = []

    def take(self, most: int, room: Room) -> list[Sentence]:
        """See Source: as many as the encoder should get at once."""
        taken: list[Sentence] = []
        longest = 0
        for sentence in self:
            longest = max(longest, len(sentence.ids))
            if taken and longest * (len(taken) + 1) > GROUP_POSITIONS:
                self._held_back.append(sentence)
                break
            taken.append(sentence)
            if len(taken) == most:
                break
        return taken

    def __iter__(self) -> Iterator[Sentence]:
        """The sentences that have not been taken."""
        while (sentence := self._held_back.pop() if self._held_back else next(self._sentences, None)) is not None:
            yield sentence


class Lane:
    """Fills free seats from a source, takes a step for all active rows, and retires the seats that are over.

    A sentence takes the plan's `beams` rows. Where all targets are given and only scored, up to TOKENS_AT_ONCE tokens
    of all rows together go in one step. With `shortlisted`, every seat has candidates. `allowance` says how many bytes
    the lane may have now, by default the plan's.
    """

    def __init__(
        self,
        backend: Backend,
        plan: Plan,
        source: Source,
        stats: DecodeStats,
        *,
        shortlisted: bool = False,
        allowance: Callable[[], int] | None = None,
    ) -> None:
        specs = specs_of(backend, beams=plan.beams, shortlisted=shortlisted)
        self._nothing = Capacity(plan.beams, 0, 0, plan.beams)
        self.cache = KVCache(specs, self._nothing)
        self.rows = Rows(self.cache, plan)
        self._backend = backend
        self._plan = plan
        self._source = source
        self._stats = stats
        self._allowance = allowance or (lambda: plan.cache_bytes)
        self._ready: deque[Seat] = deque()
        self._broken: list[Outcome] = []
        self._over: list[int] = []  # places whose targets are over, ascending
        self._shortlisted = shortlisted
        self._step: Step
        several = backend.query_tokens and plan.beams == 1 and not shortlisted
        self._at_once = TOKENS_AT_ONCE if several else 1
        self._steps_left = 0  # for which there is room, if seats stay as they are
        self._chunk: Step | None = None  # bound, and its graph loaded, when it is first needed

    @property
    def active(self) -> int:
        """How many rows a step takes now."""
        return self.cache.active

    @property
    def running(self) -> bool:
        """Whether any row is active."""
        return self.active > 0

    @property
    def empty(self) -> bool:
        """Whether nothing is under way."""
        return self.cache.seated == len(self._over) and not self._ready

    @property
    def bytes(self) -> int:
        """What the buffers take now."""
        return self.cache.bytes

    @property
    def reserved(self) -> int:
        """Bytes that the buffers may come to take for what is seated, or for any of those that are encoded alone."""
        held, plan = self.cache.capacity, self._plan
        seated = held.seats * plan.seat_bytes(held.source, max(held.target, self.rows.longest))
        ready = (
            plan.seat_bytes(len(seat.sentence.ids), self._positions(seat.sentence, seat.target)) for seat in self._ready
        )
        return max(seated, *ready, 0)

    def fits(self, sentence: Sentence) -> bool:
        """See Room."""
        longest = max(self._positions(sentence, target) for target in range(len(sentence.targets)))
        seats = min(self._plan.seats, self.cache.seated - len(self._over) + 1)
        source = max(self.cache.longest_source, len(sentence.ids))
        return seats <= self._seats_that_fit(max(self.rows.longest, longest), source)

    def fill(self) -> bool:
        """Gives the seats of those that are over, and all that are free, to who waits; true while any row is active."""
        changed = bool(self._over)
        self._replace_over()
        while self.cache.seated < self._plan.seats and self._can_seat(self.cache.seated):
            self._seat(self.cache.seated)
            changed = True
        if changed:
            self._regroup()
        self._fit(self._tokens_ahead())
        return self.running

    def advance(self) -> list[News]:
        """A step for every active row → the tokens that it has decided for who is followed, and what became of the
        targets that are over with it.
        """
        if self._gives_only and (ahead := self._tokens_ahead()) > 1:
            return self._advance_given(ahead)
        output = self._step(self.rows.next_ids())
        return self._record(choose(output, self.rows), output.attention)

    def stop(self, stopped: Stopped) -> list[Outcome]:
        """Ends the targets of all sentences that are stopped, as far as they have come; their seats are free then."""
        self._vacate(self._over)
        found = [(place, stopped(seat.sentence)) for place, seat in enumerate(self.rows.seats)]
        places = [place for place, reason in found if reason is not None]
        outcomes = [self._outcome(place, found[place][1]) for place in places]
        self._vacate(places)
        self._regroup()
        waiting = [(seat, stopped(seat.sentence)) for seat in self._ready]
        self._ready = deque(seat for seat, reason in waiting if reason is None)
        for seat, reason in waiting:
            if reason is not None:
                outcomes.append(Outcome.nothing(seat.sentence, seat.target, stopped=reason))
        return outcomes

    def trim(self) -> None:
        """Gives up the room that nobody needs now."""
        cache = self.cache
        self._vacate(self._over)
        self._regroup()
        if not cache.active:
            cache.resize(self._nothing)
            return
        target, source = int(self.rows.lengths.max()) + self._tokens_ahead(), cache.longest_source
        self._resize(cache.seated, target, source, self.rows.longest, keep=False)

    def broken(self) -> list[Outcome]:
        """What became of sentences that could not be encoded, with the error, each once."""
        broken, self._broken = self._broken, []
        return broken

    def close(self, error: BaseException | None = None) -> None:
        """Nothing: the buffers go with the lane."""

    def _bind(self) -> None:
        """Anew whenever nothing runs, so that a backend sees whether its files are still those that it has loaded."""
        shortlisting = shortlisting_of(self._backend) if self._shortlisted else None
        self._chunk = None
        self._step = (
            self._backend.bind(self.cache)
            if shortlisting is None
            else ShortlistedStep(shortlisting, self.rows, self._stats)
        )

    @property
    def _gives_only(self) -> bool:
        return self._at_once > 1 and len(self.rows.groups) == 1 and self.rows.groups[0].options.search is GIVEN

    def _tokens_ahead(self) -> int:
        """How many tokens of each row the next step takes: several only where all targets are given."""
        n, lengths = self.rows.n, self.rows.lengths
        if n == 0 or not self._gives_only:
            return 1
        left, room = self.rows.limits[:n] - lengths, self.rows.longest - lengths
        return int(max(1, min(self._at_once // n, left.max(), room.min())))

    def _advance_given(self, ahead: int) -> list[News]:
        """A step for several tokens of each row, all of which are given."""
        self._chunk = self._chunk or self._backend.bind_chunk(self.cache)
        rows, n = self.rows, self.rows.n
        columns = np.minimum(rows.lengths[:, None] + np.arange(ahead), rows.tokens.shape[1] - 2)
        numbers = rows.numbers[:, None]
        input_ids, following = rows.tokens[numbers, columns], rows.tokens[numbers, columns + 1]
        output = self._chunk(input_ids)
        scores = log_probabilities(output.logits.reshape(following.size, -1), following.reshape(-1)).reshape(n, -1)
        taken = np.minimum(rows.limits[:n] - rows.lengths, ahead)
        for row, (start, count) in enumerate(zip(rows.lengths.tolist(), taken.tolist(), strict=True)):
            rows.log_probabilities[row, start : start + count] = scores[row, :count]
        self.cache.lengths[:n] += taken
        self._steps_left = 0
        self._count_step()
        failed = (np.isnan(scores) & (np.arange(ahead) < taken[:, None])).any(axis=-1)
        return self._finish(rows.at_limit() | failed, failed)

    def _record(self, choice: Choice, attention: FloatArray | None) -> list[News]:
        """Appends the chosen tokens → what became known with them."""
        self.rows.append(choice, attention)
        self._count_step()
        over = choice.over | self.rows.at_limit()
        failed = choice.failed if choice.log_probabilities is None else self._failed(choice)
        over = over if failed is None else over | failed
        return [*self._decided(over), *self._finish(over, failed)]

    def _decided(self, over: BoolArray) -> Iterator[Decided]:
        """What is certain now of the targets that are followed and not over."""
        for place, seat in enumerate(self.rows.seats):
            if seat.sentence.followed and seat.target == 0 and not over[place]:
                count = seat.options.search.decided(self.rows, place)
                if count > seat.shown:
                    yield self._read_decided(place, seat, count)

    def _read_decided(self, place: int, seat: Seat, count: int) -> Decided:
        rows, own = self.rows, self.rows.of_seat(place)
        row, first = own.start + int(rows.scores[own].argmax()), rows.forced + seat.shown
        some = slice(first, rows.forced + count)
        ids = tuple(rows.tokens[row, first + 1 : rows.forced + count + 1].tolist())
        scores = tuple(rows.log_probabilities[row, some].tolist()) if seat.options.scored else None
        seat.shown = count
        return Decided(seat.sentence, ids, scores)

    def _count_step(self) -> None:
        self._stats.steps += 1
        self._stats.row_steps += self.rows.n
        self._stats.row_places += self._plan.rows

    def _failed(self, choice: Choice) -> BoolArray | None:
        """The seats whose logits are not finite [G], if any: those that the search saw, and those whose filters hid it
        while a score shows it.
        """
        assert choice.log_probabilities is not None
        if not (nan := np.isnan(choice.log_probabilities)).any():
            return choice.failed
        nan &= self.rows.scores[: self.rows.n] > -np.inf
        seats: BoolArray = nan.reshape(-1, self._plan.beams).max(axis=-1)
        return seats if choice.failed is None else seats | choice.failed

    def _finish(self, over: NDArray[np.bool_], failed: BoolArray | None) -> list[News]:
        """What became of the seats that are `over`. They keep their places until the next are let in."""
        self._over = np.flatnonzero(over).tolist()
        return [
            self._failure(place) if failed is not None and failed[place] else self._outcome(place)
            for place in self._over
        ]

    def _replace_over(self) -> None:
        """The places of those that are over go to who waits, or to the last that are seated."""
        if len(self._over) == self.cache.seated:
            self._vacate(self._over)
        while self._over:  # from the end, so that a target that moves in is not over itself
            place = self._over[-1]
            if self._can_seat(place):
                self._seat(place)
            else:
                self.rows.vacate(place)
            self._over.pop()

    def _vacate(self, places: list[int]) -> None:
        """Gives seats back, and forgets their places."""
        while places:
            self.rows.vacate(places.pop())

    def _regroup(self) -> None:
        """Seats have changed."""
        self.rows.regroup()
        self._steps_left = 0

    def _outcome(self, place: int, stopped: StopReason | None = None) -> Outcome:
        seat = self.rows.seats[place]
        found = seat.options.search.results(self.rows, place)
        self._stats.sentences += 1
        self._stats.tokens += len(found[0].ids)
        return Outcome(seat.sentence, seat.target, tuple(found), stopped)

    def _failure(self, place: int) -> Outcome:
        """Of a seat whose numbers are not finite: none of them may stay for whoever takes it."""
        seat = self.rows.seats[place]
        self.cache.clear(place)
        self._stats.sentences += 1
        if seat.error is not None:
            return Outcome.broken(seat.sentence, seat.target, seat.error)
        return Outcome.nothing(seat.sentence, seat.target)

    def _can_seat(self, place: int) -> bool:
        """Whether a target is ready for this place, and the bytes have room for it beside the others."""
        if not self._ready:
            self._encode_next_group()
        if not self._ready:
            return False
        first, held = self._ready[0], self.cache.capacity
        positions, source = self._positions(first.sentence, first.target), len(first.sentence.ids)
        longest, seats = self.rows.longest, max(self.cache.seated, place + 1)
        if seats <= held.seats and source <= held.source and positions <= longest:
            return True  # it has been reserved
        return seats <= self._seats_that_fit(max(longest, positions), max(source, self.cache.longest_source))

    def _seats_that_fit(self, longest: int, source: int) -> int:
        return self._plan.seats_that_fit(longest=longest, source=source, cache_bytes=self._allowance())

    def _positions(self, sentence: Sentence, target: int) -> int:
        """The most target positions that a sentence's target may take."""
        return sentence.most_tokens(target) + self._plan.forced

    def _seat(self, place: int) -> None:
        seat = self._ready.popleft()
        held, source, options = self.cache.capacity, seat.sentence.ids, seat.options
        longest = max(self.rows.longest, self._positions(seat.sentence, seat.target))
        positions = max(len(source), self.cache.longest_source)
        seats = max(self.cache.seated, place + 1)
        first = not self.cache.active
        if first or seats > held.seats or len(source) > held.source or longest > self.rows.longest:
            fit = self._seats_that_fit(longest, positions)
            soon = max(seats, min(fit, seats + len(self._ready)))
            if len(source) > held.source or not (soon if first else seats) <= held.seats <= max(fit, seats):
                self._resize(soon, 1 if first else held.target, positions, longest)
        if first:
            self._bind()
        seat.state = options.search.begin(seat.sentence, seat.target)
        if options.candidates is not None:
            assert options.candidates.knows(source), "a source that the shortlist does not know"
            seat.candidates = np.union1d(options.candidates.candidates(source), np.array(seat.fixed, np.int64))
        self.rows.take(place, seat)

    def _encode_next_group(self) -> None:
        group = self._source.take(self._plan.group, self)
        if not group:
            return
        try:
            tensors = self._backend.encode(*padded(group, max(len(one.ids) for one in group), self._plan.pad))
        except Exception as error:  # which is theirs alone
            self._broken += [Outcome.broken(one, target, error) for one in group for target in range(len(one.targets))]
            return
        for index, sentence in enumerate(group):
            encoded = EncodedSource(tensors, index, len(sentence.ids))
            self._ready.extend(Seat(sentence, target, encoded) for target in range(len(sentence.targets)))

    def _fit(self, tokens: int) -> None:
        """Makes room for the next tokens of every row, or gives up room that nobody needs. There is nothing to do
        between, while seats stay as they are.
        """
        cache, held, plan = self.cache, self.cache.capacity, self._plan
        self._steps_left -= 1
        if not cache.active or (tokens == 1 and self._steps_left > 0):
            return
        target, longest, source = int(self.rows.lengths.max()) + tokens, self.rows.longest, cache.longest_source
        too_large = (
            rung(target, longest) * SHRINK_BELOW <= held.target
            or rung(source, plan.source_positions) * SHRINK_BELOW <= held.source
        )
        if target > held.target or too_large:
            self._resize(cache.seated, target, source, longest)
        self._steps_left = cache.capacity.target - target + 1
        self._stats.cache_bytes = max(self._stats.cache_bytes, cache.bytes)

    def _resize(self, seats: int, target: int, source: int, longest: int, *, keep: bool = True) -> None:
        """To what the plan gives for these, with no fewer seats than there are where they are kept and fit; counted
        where rows had to be repacked.
        """
        if keep:
            seats = max(seats, min(self.cache.capacity.seats, self._seats_that_fit(longest, source)))
        capacity = self._plan.capacity(
            seats=seats, target=target, source=source, longest=longest, cache_bytes=self._allowance()
        )
        if capacity == self.cache.capacity:
            return
        if self.cache.active:
            self._stats.repacks += 1
            _log.debug("cache repacked: %s → %s, %d rows active", self.cache.capacity, capacity, self.cache.active)
        self.cache.resize(capacity)


def padded(sentences: Sequence[Sentence], positions: int, pad: int) -> tuple[IntArray, IntArray]:
    """Sentences → what the encoder takes of them: input_ids [B, positions] and source_lengths [B]."""
    input_ids = np.full((len(sentences), positions), pad, np.int64)
    for row, sentence in zip(input_ids, sentences, strict=True):
        row[: len(sentence.ids)] = sentence.ids
    return input_ids, np.array([len(sentence.ids) for sentence in sentences], np.int64)
