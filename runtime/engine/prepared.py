"""Options made ready for a model: checked, planned, and what each text of theirs is read by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kvx.runtime.decoding.device_loop import feeds_itself
from kvx.runtime.decoding.plan import Plan
from kvx.runtime.decoding.search import GIVEN, Greedy, Sampling
from kvx.runtime.decoding.seat_options import SeatOptions
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.engine.request import LaneKey, Owner, Request
from kvx.runtime.errors import InputError
from kvx.runtime.options import TranslateOptions, filters_of
from kvx.runtime.shortlist.candidates import Shortlist
from kvx.runtime.text.sources import Source
from kvx.runtime.text.targets import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What one set of options asks of a model, with the `plan` of a worker for them alone.

    `begun` are the ids that every target begins with; `looped` tells that a device may feed itself.
    """

    model: LoadedModel
    options: TranslateOptions
    plan: Plan
    seat: SeatOptions
    begun: tuple[int, ...] = ()
    looped: bool = False
    _listed: dict[Shortlist, SeatOptions] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, model: LoadedModel, options: TranslateOptions, workers: int) -> Prepared:
        """For translations, by this many workers. Raises OptionError, InputError and CapacityError."""
        plan, _ = model.plan(options, workers=workers)
        _check_languages(model, options)
        model.shortlist(options)  # raises before anything is read
        filters = filters_of(options, model.targets, plan.never)
        seat = SeatOptions(
            options.search,
            plan.max_new_tokens,
            filters,
            ends_at_limit=plan.ends_at_limit,
            scored=options.scores,
            with_attention=options.with_attention,
        )
        begun = () if options.prefix is None else model.targets.prefix(options.prefix, plan.max_new_tokens, None)
        plain = isinstance(options.search, Greedy) and (filters.in_place or not filters.filters)
        more = options.scores or options.with_attention or options.shortlist is not None
        looped = plain and not more and feeds_itself(model.backend)
        return cls(model=model, options=options, plan=plan, seat=seat, begun=begun, looped=looped)

    @classmethod
    def for_scoring(cls, model: LoadedModel, options: TranslateOptions, workers: int, longest: int) -> Prepared:
        """For the log-probabilities of targets of up to `longest` ids. Raises OptionError and CapacityError."""
        plan, _ = model.plan(options, max_new_tokens=longest, workers=workers)
        _check_languages(model, options)
        seat = SeatOptions(GIVEN, longest, scored=True)
        return cls(model=model, options=options, plan=plan, seat=seat)

    def seeded(self) -> Prepared:
        """With a seed for samples, drawn where the options have none."""
        search = self.seat.search
        if not isinstance(search, Sampling) or search.seed is not None:
            return self
        return replace(self, seat=replace(self.seat, search=search.seeded()))

    def prefix(self, prefix: Target | None, number: int | None) -> tuple[int, ...]:
        """The ids of a prefix, or those that the options have for all. Raises InputError."""
        if prefix is None:
            return self.begun
        return self.model.targets.prefix(prefix, self.plan.max_new_tokens, number)

    def request(
        self,
        source: Source,
        owner: Owner,
        *,
        number: int,
        targets: Sequence[tuple[int, ...]] | None = None,
        prefix: Target | None = None,
        source_language: str | None = None,
        target_language: str | None = None,
        deadline: float | None = None,
        empty: bool = False,
    ) -> Request:
        """The request of a text, or of its ids, with this number: for `targets` that are given, or for as many as the
        search has, each of which goes on from the prefix. A text without a piece has no ids, or, with `empty`, those of
        an empty sentence. Raises InputError.
        """
        if targets is None:
            targets = (self.prefix(prefix, number),) * self.seat.search.samples
        read = self.model.sources.read_one(
            source,
            number,
            self.options.on_long,
            source_language=source_language,
            target_language=target_language,
            text_prefix=self.options.text_prefix,
            with_pieces=self.options.with_attention,
            empty=empty,
        )
        if len(read.ids) > self.plan.source_positions:
            raise _too_long(self.plan, len(read.ids), number)
        seat, key = self._seat(read.ids, begun=any(targets))
        return Request(
            number,
            read.ids,
            tuple(targets),
            start=read.start,
            options=seat,
            model=self.model,
            asked_for=self.options,
            lane=key,
            owner=owner,
            truncated=read.truncated,
            pieces=read.pieces,
            deadline=deadline,
        )

    def refused(self, error: InputError, owner: Owner, number: int) -> Request:
        """The request of a text that cannot be translated: it is over, and keeps its place among the others."""
        return Request(
            number,
            (),
            ((),),
            options=self.seat,
            model=self.model,
            asked_for=self.options,
            lane=LaneKey(self.seat.search.beams),
            owner=owner,
            error=error,
        )

    def _seat(self, ids: tuple[int, ...], *, begun: bool) -> tuple[SeatOptions, LaneKey]:
        """The options of a source's seats, and the lane that has such seats. A source that a shortlist does not know
        has the whole vocabulary.
        """
        beams = self.seat.search.beams
        shortlist = self.model.shortlist(self.options) if self.options.shortlist is not None else None
        if shortlist is not None and ids and shortlist.knows(ids):
            seat = self._listed.get(shortlist)
            if seat is None:
                seat = replace(self.seat, candidates=shortlist)
                self._listed.clear()
                self._listed[shortlist] = seat  # one for all texts, so that seats need not be compared
            return seat, LaneKey(beams, shortlisted=True)
        return self.seat, LaneKey(beams, looped=self.looped and not begun)


def _check_languages(model: LoadedModel, options: TranslateOptions) -> None:
    model.sources.check_languages(options.source_language, options.target_language)


def _too_long(plan: Plan, positions: int, number: int) -> InputError:
    return InputError(
        f"The text has {positions} tokens, which need a cache of {plan.seat_bytes(positions):,} bytes",
        expected=f"at most {plan.cache_bytes:,} bytes",
        remedy="Allow more bytes (`cache_bytes`) or fewer new tokens (`max_new_tokens`).",
        option="cache_bytes",
        line=number,
    )
