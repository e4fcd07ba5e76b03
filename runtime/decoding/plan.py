"""How large a decode may get: known, and refused if need be, before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

from kvx.runtime.bundle.manifest import Manifest
from kvx.runtime.bundle.signature import TensorSpec
from kvx.runtime.decoding.cache import Capacity
from kvx.runtime.errors import CapacityError, OptionError

DEFAULT_ROWS = 64
DEFAULT_CACHE_BYTES = 2**30
DEFAULT_GROUP = 16
GROUP_POSITIONS = 4096  # the most source positions, padding included, that the encoder gets at once
SMALLEST_CAPACITY = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where targets start and stop, and how much cache there may be.

    A target begins with the ids of `start`, or with as many of its sentence's own, none of which is chosen, and ends
    with `eos`, which takes the last place where it `ends_at_limit`; the ids of `never` do not come. `rows` at a time at
    the most, of which a sentence takes `beams`, side by side; sentences are encoded up to `group` at a time;
    `max_new_tokens` after the start, eos included; `source_positions` of the longest source; `cache_bytes` for all
    buffers, of which a sentence takes `target_bytes` and `source_bytes` for each of its positions.
    """

    start: tuple[int, ...]
    eos: int
    pad: int
    rows: int
    max_new_tokens: int
    source_positions: int
    cache_bytes: int
    target_bytes: int
    source_bytes: int
    beams: int = 1
    group: int = DEFAULT_GROUP
    ends_at_limit: bool = False
    never: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        specs: Iterable[TensorSpec],
        *,
        rows: int | None = None,
        cache_bytes: int | None = None,
        max_new_tokens: int | None = None,
        beams: int = 1,
        ends_at_limit: bool = False,
    ) -> Self:
        """The plan for a bundle and the cache buffers of a backend. By default as many rows as fit, up to 64 in 1 GiB.

        Raises OptionError for more new tokens than the model has positions or more beams than rows, CapacityError for
        rows that cannot fit.
        """
        specs, budget = tuple(specs), DEFAULT_CACHE_BYTES if cache_bytes is None else cache_bytes
        limit = manifest.max_new_tokens if max_new_tokens is None else max_new_tokens
        check_limit(limit, manifest.most_new_tokens)
        start = manifest.framing.start_ids(manifest.languages.usual)
        longest = limit + len(start) - 1
        if rows is not None and rows < beams:
            raise OptionError(
                f"There are {beams} beams, but only {rows} rows",
                expected="at least one row for every beam of a sentence",
                remedy="Use more rows (`rows`) or fewer beams (`beam_size`).",
                option="rows",
            )
        target_bytes = Capacity(beams, 1, 0, beams).bytes(specs)
        source_bytes = Capacity(beams, 0, 1, beams).bytes(specs)
        positions = manifest.model["source_positions"]
        smallest = longest * target_bytes + min(SMALLEST_CAPACITY, positions) * source_bytes
        seats = min(max(1, DEFAULT_ROWS // beams), budget // smallest) if rows is None else rows // beams
        if seats < 1 or seats * smallest > budget:
            unit, more = ("rows", "") if beams == 1 else ("sentences", f" of {beams} rows")
            raise CapacityError(
                f"A cache of {max(seats, 1)} {unit}{more} × {smallest:,} bytes ({longest} target and "
                f"{min(SMALLEST_CAPACITY, positions)} source positions) takes {max(seats, 1) * smallest:,} bytes",
                expected=f"at most {budget:,} bytes, which hold {budget // smallest} such {unit}",
                remedy="Use fewer rows (`rows`), fewer new tokens (`max_new_tokens`) or more bytes (`cache_bytes`).",
                option="cache_bytes",
            )
        room = budget - longest * target_bytes
        return cls(
            start=start,
            eos=manifest.framing.eos,
            pad=manifest.framing.pad,
            rows=seats * beams,
            max_new_tokens=limit,
            source_positions=min(positions, room // source_bytes),
            cache_bytes=budget,
            target_bytes=target_bytes,
            source_bytes=source_bytes,
            beams=beams,
            ends_at_limit=ends_at_limit,
            never=manifest.framing.never,
        )

    @property
    def forced(self) -> int:
        """How many of the ids that a target begins with come after the first."""
        return len(self.start) - 1

    @property
    def target_positions(self) -> int:
        """The positions of the longest target: the limit's, and those of the ids that are forced."""
        return self.max_new_tokens + self.forced

    @property
    def seats(self) -> int:
        """The most sentences at a time."""
        return self.rows // self.beams

    def with_rows(self, rows: int) -> Self:
        """The plan for up to this many rows, as many as fit."""
        seats = max(1, min(rows // self.beams, self.cache_bytes // self.smallest_seat_bytes))
        return replace(self, rows=seats * self.beams)

    def most_shares(self) -> int:
        """How many decodes could have all these rows, within the bytes, for short sources."""
        return max(1, self.cache_bytes // (self.seats * self.smallest_seat_bytes))

    def share_of(self, workers: int, *, least_rows: int = 1) -> Self:
        """One worker's plan where several share the bytes. Raises CapacityError where that leaves too few rows."""
        share = self.cache_bytes // workers
        seats = min(self.seats, share // self.smallest_seat_bytes)
        least = min(max(1, least_rows // self.beams), self.seats)
        if seats < least:
            raise CapacityError(
                f"The cache has {self.cache_bytes:,} bytes for {workers} workers, which is room for "
                f"{seats * self.beams} rows each",
                expected=f"{least} × {self.smallest_seat_bytes:,} bytes for each",
                remedy="Use fewer workers (`workers`), fewer rows (`rows`) or more bytes (`cache_bytes`).",
                option="cache_bytes",
            )
        room = (share - self.target_positions * self.target_bytes) // self.source_bytes
        positions = min(self.source_positions, room)
        return replace(self, rows=seats * self.beams, cache_bytes=share, source_positions=positions)

    @property
    def smallest_seat_bytes(self) -> int:
        """Bytes of a sentence at the smallest source capacity: no plan gives it less."""
        return self.seat_bytes(min(SMALLEST_CAPACITY, self.source_positions))

    def seat_bytes(self, source: int, target: int | None = None) -> int:
        """Bytes of a sentence with `source` positions and room for `target` ones, by default for all new tokens."""
        target = self.target_positions if target is None else target
        return target * self.target_bytes + source * self.source_bytes

    def seats_that_fit(self, *, longest: int, source: int, cache_bytes: int | None = None) -> int:
        """How many sentences, of the longest target and source in these positions, the bytes hold.

        They are counted at their full length, so that a sentence that was let in can always go on.
        """
        budget = self.cache_bytes if cache_bytes is None else cache_bytes
        return min(self.seats, budget // self.seat_bytes(self._held(source, longest, budget), longest))

    def capacity(
        self, *, seats: int, target: int, source: int, longest: int, cache_bytes: int | None = None
    ) -> Capacity:
        """The smallest size of the ladder that holds these seats and positions, where the longest target will have
        `longest` of these.
        """
        budget = self.cache_bytes if cache_bytes is None else cache_bytes
        fit = self.seats_that_fit(longest=longest, source=source, cache_bytes=budget)
        rows = max(seats, min(fit, _rung_of_seats(seats))) * self.beams
        return Capacity(rows, rung(target, longest), self._held(source, longest, budget), self.beams)

    def _held(self, source: int, longest: int, budget: int) -> int:
        """The source positions that are allocated for a need: less than a rung where one sentence has no more room."""
        room = (budget - longest * self.target_bytes) // self.source_bytes
        return rung(source, min(self.source_positions, max(source, room)))


def check_limit(limit: int, positions: int) -> None:
    """Raises OptionError unless `limit` new tokens fit the model's target positions."""
    if not 1 <= limit <= positions:
        raise OptionError(
            f"`max_new_tokens` is {limit}",
            expected=f"1 to {positions}, the target positions of the model",
            remedy="Correct it or leave it out.",
            option="max_new_tokens",
        )


def _rung_of_seats(need: int) -> int:
    """How many seats are allocated where some are needed: four times as many until they are enough."""
    size = 1
    while size < need:
        size *= 4
    return size


def rung(need: int, most: int) -> int:
    """The size that is allocated for a need: doubled from the smallest until it holds, `most` at the most."""
    size = SMALLEST_CAPACITY
    while size < need:
        size *= 2
    return min(size, most)
