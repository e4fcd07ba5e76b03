"""How the targets of one sentence are made, whoever is decoded beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvx.runtime.decoding.backend import Candidates
from kvx.runtime.decoding.filters import UNFILTERED, Filters
from kvx.runtime.decoding.search import GIVEN, Sampling, Search


@dataclass(frozen=True, slots=True, eq=False)
class SeatOptions:
    """What belongs to a seat: the `search`, the `filters`, the `limit` of tokens after the start, eos included, which
    eos takes where a target `ends_at_limit`; whether hypotheses are `scored` and come `with_attention`; and the
    `candidates` of a shortlist, which must know the source.
    """

    search: Search
    limit: int
    filters: Filters = UNFILTERED
    ends_at_limit: bool = False
    scored: bool = False
    with_attention: bool = False
    candidates: Candidates | None = None

    def steps_like(self, other: SeatOptions) -> bool:
        """Whether one call of the search and the filters can decide a step for seats of both: the limit is the seat's,
        and so is the state that a seed has given to it.
        """
        return self is other or (
            self.scored == other.scored
            and _unseeded(self.search) == _unseeded(other.search)
            and self.filters == other.filters
        )

    def limit_of(self, fixed: tuple[int, ...]) -> int:
        """The most tokens of a target with these fixed ids."""
        return len(fixed) if self.search is GIVEN else self.limit


def _unseeded(search: Search) -> Search:
    return replace(search, seed=None) if isinstance(search, Sampling) else search
