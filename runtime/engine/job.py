"""All that one call asks of the backends, decided and refused in one place before anything is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from kvx.runtime.decoding.backend import Backend
from kvx.runtime.decoding.decode import Cancelled, decode, decode_known, never
from kvx.runtime.decoding.device_loop import LoopBackend, decode_in_blocks
from kvx.runtime.decoding.filters import Constraints
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.decoding.rows import Source
from kvx.runtime.decoding.schedule import DecodeStats, Outcome
from kvx.runtime.decoding.search import Greedy, Search
from kvx.runtime.engine.workers import Decode, shared_out
from kvx.runtime.options import TranslateOptions
from kvx.runtime.shortlist.candidates import Shortlist


@dataclass(frozen=True, slots=True)
class Job:
    """`decodes` side by side, each with the `plan`; `given` tells that something may be given of targets."""

    options: TranslateOptions
    plan: Plan
    decodes: int
    search: Search
    constraints: Constraints
    shortlist: Shortlist | None
    given: bool

    def on(self, backends: Sequence[Backend], cancelled: Cancelled) -> list[Decode]:
        """The decodes, shared out to the backends."""
        return [self._on(backend, cancelled) for backend in shared_out(backends, self.decodes)]

    def _on(self, backend: Backend, cancelled: Cancelled) -> Decode:
        def decode_them(sources: Iterator[Source], stats: DecodeStats, stopped: Cancelled) -> Iterator[Outcome]:
            def over() -> bool:
                return stopped() or cancelled()

            if self._tokens_only and isinstance(backend, LoopBackend) and backend.loops:
                return decode_in_blocks(backend, sources, self.plan, stats, cancelled=over)
            decode_some = partial(
                decode,
                backend,
                search=self.search,
                plan=self.plan,
                stats=stats,
                constraints=self.constraints,
                with_attention=self.options.with_attention,
                cancelled=over,
            )
            if self.shortlist is None:
                return decode_some(sources)
            return decode_known(decode_some, sources, self.shortlist, stats)

        return decode_them

    @property
    def _tokens_only(self) -> bool:
        """Whether nothing but greedy tokens is asked for, which a device gives without the host."""
        more = self.given or self.options.scores or self.options.with_attention or self.constraints.filters
        return isinstance(self.search, Greedy) and not more and self.shortlist is None


class Latch:
    """An answer that stays true once it was: several decodes ask, each in its own thread."""

    def __init__(self, asked: Cancelled | None) -> None:
        self._asked = asked or never
        self._over = False

    def __call__(self) -> bool:
        """Whether it ever was."""
        self._over = self._over or self._asked()
        return self._over
