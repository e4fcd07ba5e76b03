"""How the next tokens are chosen from a step's output.

Letters: n active rows, G seats, k beams of a seat, m candidates of a row, V target vocabulary.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self, get_args

import numpy as np
from numpy.typing import NDArray

from kvx.runtime.arrays import BoolArray, FloatArray, IntArray
from kvx.runtime.decoding.backend import StepOutput
from kvx.runtime.decoding.results import Hypothesis, Sentence
from kvx.runtime.decoding.rows import ActiveRows, Choice, Rows
from kvx.runtime.rules import Option, Problem, choice, count, flag, number, refuse, wrong_values

BeamRules = Literal["kvx", "transformers"]

LARGEST_SEED = 2**64 - 1
MOST_BEAMS = 2**16
MOST_SAMPLES = 2**16
BLOCK = 64  # logits among which one maximum is looked for first
FIRST_CANDIDATES = 64  # of a nucleus, which is seldom larger
FEW_BLOCKS = 4  # up to so many are not looked at block by block
MASSES_AT_ONCE = 2**16  # which stay in the processor's cache


class Search(Protocol):
    """A strategy that decides how rows go on and which targets result. What it knows of a target is in its seat."""

    @property
    def beams(self) -> int:
        """k: rows of a seat."""
        ...

    @property
    def samples(self) -> int:
        """How many targets of each source it looks for."""
        ...

    def begin(self, sentence: Sentence, target: int) -> object:
        """The state of a new seat."""
        ...

    def choose(self, output: StepOutput, logits: FloatArray, rows: ActiveRows) -> Choice:
        """logits [n, V] as constrained, and the output as the model gave it → how every row goes on."""
        ...

    def results(self, rows: Rows, seat: int) -> list[Hypothesis]:
        """The hypotheses of a seat that is over, the best first; at least one."""
        ...

    def decided(self, rows: Rows, seat: int) -> int:
        """How many ids its best hypothesis will begin with for certain, which each of its rows has."""
        ...


class OneRow:
    """What searches have in common that keep one row for a target."""

    __slots__ = ()
    beams: ClassVar[int] = 1

    def results(self, rows: Rows, seat: int) -> list[Hypothesis]:
        """The row."""
        return [rows.read(seat)]

    def decided(self, rows: Rows, seat: int) -> int:
        """All."""
        return max(0, int(rows.lengths[seat]) - rows.forced)


@dataclass(frozen=True, slots=True)
class Greedy(OneRow):
    """The most probable token, the lowest id on ties."""

    samples: ClassVar[int] = 1

    def begin(self, sentence: Sentence, target: int) -> None:
        """Nothing is remembered."""

    def choose(self, output: StepOutput, logits: FloatArray, rows: ActiveRows) -> Choice:
        """logits [n, V] → argmax [n]."""
        ids: IntArray = logits.argmax(axis=-1)
        failed = not_finite(output.logits, logits[rows.numbers, ids])
        _fix(ids, rows)
        scores = log_probabilities(output.logits, ids) if rows.scored else None
        return Choice(ids, ids == rows.eos, scores, failed=failed)


@dataclass(frozen=True, slots=True)
class Given(OneRow):
    """No search: the targets are fixed from beginning to end, and are only scored."""

    samples: ClassVar[int] = 1

    def begin(self, sentence: Sentence, target: int) -> None:
        """Nothing is remembered."""

    def choose(self, output: StepOutput, logits: FloatArray, rows: ActiveRows) -> Choice:
        """The fixed tokens; a target is over only at its end, whatever is in it."""
        fixed = rows.fixed_next()
        ids: IntArray = np.zeros(rows.n, np.int64)
        ids[fixed.rows] = fixed.tokens
        return Choice(ids, np.zeros(rows.n, np.bool_), log_probabilities(output.logits, ids))


GIVEN = Given()


@dataclass(frozen=True, slots=True)
class Sampling(OneRow):
    """Tokens drawn by their probability, after `temperature`, among the `top_k` most probable and, of these, among the
    fewest that together have the probability `top_p` (Holtzman et al. 2020).

    Every target has random numbers of its own, from the `seed`, its source, its number, and how many equal sources came
    before it in the same call: what else is decoded beside it changes nothing. Without a seed one is drawn for each
    call. Raises OptionError.
    """

    samples: Annotated[
        int,
        Option(
            count(MOST_SAMPLES), "Draw this many random translations of each text, instead of looking for the best."
        ),
    ] = 1
    temperature: Annotated[
        float,
        Option(
            number(0, math.inf, above=True),
            "Divide the logits by this before a sample is drawn: below 1 samples keep to probable tokens, above 1 "
            "they vary more.",
        ),
    ] = 1.0
    top_k: Annotated[
        int | None,
        Option(count(), "Draw only from this many of the most probable tokens (top-k sampling).", unset="all"),
    ] = None
    top_p: Annotated[
        float,
        Option(
            number(0, 1, above=True),
            "Draw only from the smallest set of tokens whose probabilities add up to this (nucleus sampling).",
        ),
    ] = 1.0
    seed: Annotated[
        int | None,
        Option(
            count(LARGEST_SEED, least=0),
            "Seed of the samples. The same seed gives the same samples, whatever else is translated beside them.",
            unset="a new one",
        ),
    ] = None

    def __post_init__(self) -> None:
        refuse(wrong_values(self))

    def seeded(self) -> Self:
        """With a seed, drawn where there is none."""
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(LARGEST_SEED))

    def begin(self, sentence: Sentence, target: int) -> np.random.Generator:
        """The target's own random numbers."""
        assert self.seed is not None, "samples without a seed"
        return np.random.default_rng([self.seed, target + sentence.repeat * MOST_SAMPLES, *sentence.ids])

    def choose(self, output: StepOutput, logits: FloatArray, rows: ActiveRows) -> Choice:
        """logits [n, V] → drawn ids [n]."""
        drawn = np.array([seat.state.random() for seat in rows.seats])
        peaks = logits.max(axis=-1)
        failed = not_finite(output.logits, peaks)
        if failed is not None:
            logits, peaks = np.where(failed[:, None], 0, logits), np.where(failed, 0, peaks)
        ids = self.draw(self._tempered(logits, peaks), drawn)
        _fix(ids, rows)
        scores = log_probabilities(output.logits, ids) if rows.scored else None
        return Choice(ids, ids == rows.eos, scores, failed=failed)

    def draw(self, logits: FloatArray, uniform: NDArray[np.float64]) -> IntArray:
        """logits [n, V], uniform numbers [n] → ids [n], where the cumulative probability, by id, passes the number.

        By id and not by rank, so that rounding, which may exchange ranks, moves nothing but a boundary.
        """
        ids, masses = self._candidates(logits)
        cumulative = masses.cumsum(axis=-1)
        passed = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(axis=-1)
        last = masses.shape[1] - 1 - (masses[:, ::-1] > 0).argmax(axis=-1)  # rounding must not pass what has a mass
        chosen: IntArray = np.take_along_axis(ids, np.minimum(passed, last)[:, None], axis=-1)[:, 0]
        return chosen

    def _tempered(self, logits: FloatArray, peaks: FloatArray) -> FloatArray:
        """logits [n, V], the largest ones [n] → the distances to these, in temperatures, always finite or −∞."""
        limits = np.finfo(np.float32)
        temperature = np.float32(min(max(self.temperature, float(limits.tiny)), float(limits.max)))
        with np.errstate(over="ignore", invalid="ignore"):  # filters may forbid all, a distance of −∞ to −∞
            tempered: FloatArray = (logits - peaks[:, None]) / temperature
        return tempered

    def _candidates(self, logits: FloatArray) -> tuple[IntArray, NDArray[np.float64]]:
        """ids [n, m], ascending, and their masses [n, m], 0 for those that may not be drawn."""
        vocabulary = logits.shape[1]
        largest_logit = logits.max(axis=-1, keepdims=True)
        if self.top_k is None and self.top_p == 1.0:
            ids = np.broadcast_to(np.arange(vocabulary), logits.shape)
            return ids, np.exp(logits - largest_logit, dtype=np.float64)
        total = None if self.top_k else np.exp(log_normalizers(logits)[:, None] - largest_logit)
        count = min(self.top_k or FIRST_CANDIDATES, vocabulary)
        while True:
            values, ids = largest(logits, count)
            masses = np.exp(values - largest_logit, dtype=np.float64)
            whole = masses.sum(axis=-1, keepdims=True) if total is None else total
            before = masses.cumsum(axis=-1) - masses
            if total is None or count == vocabulary or (before[:, -1:] >= self.top_p * whole).all():
                break
            count = min(8 * count, vocabulary)
        masses[before >= self.top_p * whole] = 0.0
        order = ids.argsort(axis=-1)
        return np.take_along_axis(ids, order, axis=-1), np.take_along_axis(masses, order, axis=-1)


@dataclass(slots=True)
class _Closed:
    """The hypotheses of a seat that have ended, and whether these are all that are wanted."""

    hypotheses: list[Hypothesis] = field(default_factory=list)
    done: bool = False


@dataclass(frozen=True, slots=True)
class BeamSearch:
    """The `size` best beginnings of a target side by side, and the `n_best` best targets found.

    A target is compared by the sum of its log-probabilities divided by its length to the power of `length_penalty`,
    bos counted and eos not. With `early_stopping` a search is over as soon as `patience` · `size` targets have ended
    (Kasai et al. 2022); without, when no open beam can get better than the worst of the `size` best ones.

    The `rules` of transformers differ in three things: without `early_stopping` a search is over when no open beam is
    better at its present length; at the limit only those of the `size` best continuations count that are open; and
    these are compared by their length without bos
    (https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/generation/utils.py). Raises OptionError.
    """

    size: Annotated[
        int, Option(count(MOST_BEAMS), "The number of beams in a beam search; 1 is greedy search.", keyword="beam_size")
    ]
    length_penalty: Annotated[
        float,
        Option(
            number(-50, 50),
            "Beams are ranked by log-probability / length^x, where x is this exponent and the length counts bos but "
            "not eos. Larger values favour longer translations.",
        ),
    ] = 1.0
    early_stopping: Annotated[
        bool,
        Option(
            flag(),
            "Stop as soon as `beam_size` translations have finished, or go on until no unfinished beam can become "
            "better.",
        ),
    ] = True
    n_best: Annotated[
        int,
        Option(count(MOST_BEAMS), "Give this many of the best translations of each text, up to the number of beams."),
    ] = 1
    patience: Annotated[
        float,
        Option(
            number(0, math.inf, above=True),
            "Stop after this many times `beam_size` finished translations, with early stopping.",
        ),
    ] = 1.0
    rules: Annotated[
        BeamRules,
        Option(
            choice(get_args(BeamRules)),
            "Whose beam search to follow where kvx and Hugging Face transformers differ: in when to stop without early "
            "stopping, and in how unfinished beams are ranked at the limit.",
            keyword="beam_rules",
        ),
    ] = "kvx"
    samples: ClassVar[int] = 1

    def __post_init__(self) -> None:
        refuse(list(wrong_values(self)) or self._contradictions())

    def _contradictions(self) -> Iterator[Problem]:
        if self.n_best > self.size:
            got = f"`n_best` is {self.n_best}, more than `beam_size` ({self.size})"
            yield Problem("n_best", got, "`n_best` up to `beam_size`")
        if self.patience != 1.0 and not self.early_stopping:
            got = f"`patience` is {self.patience:g}, but `early_stopping` is off"
            yield Problem("patience", got, "`patience` only with `early_stopping`")

    @property
    def beams(self) -> int:
        """k: the size."""
        return self.size

    def begin(self, sentence: Sentence, target: int) -> _Closed:
        """No target has ended."""
        return _Closed()

    def choose(self, output: StepOutput, logits: FloatArray, rows: ActiveRows) -> Choice:
        """logits [n, V] → of the 2·k best continuations of a seat's beams the first k that do not end; of the first k
        those that do end are closed.
        """
        k, normalizers = self.size, log_normalizers(output.logits)
        finite = np.isfinite(normalizers)  # [n]
        failed = None
        if not finite.all():
            broken = ~finite
            failed = (broken & (rows.scores[: rows.n] > -np.inf)).reshape(-1, k).max(axis=-1)
            logits, normalizers = np.where(broken[:, None], 0, logits), np.where(broken, 0.0, normalizers)
        parents, tokens, totals = best_continuations(logits, rows.scores[: rows.n], normalizers, k)
        if rows.begun:
            self._go_on_as_fixed(rows, output, normalizers, (parents, tokens, totals))
        ends = tokens == rows.eos
        self._close(output, normalizers, rows, parents, np.where(ends, totals, -np.inf)[:, :k])
        kept = ends.argsort(axis=-1, kind="stable")[:, :k]
        parents, tokens = np.take_along_axis(parents, kept, axis=-1), np.take_along_axis(tokens, kept, axis=-1)
        totals = np.take_along_axis(totals, kept, axis=-1)
        if self.rules == "transformers":
            totals[self._at_limit(rows)[:, None] & (kept >= k)] = -np.inf
        rows_of = _stay_with_parents(parents % k) + k * np.arange(len(parents))[:, None]
        return Choice(
            ids=_placed(tokens, rows_of),
            over=self._over(rows, totals[:, 0]),
            log_probabilities=_chosen(output.logits, parents, tokens, normalizers, rows_of) if rows.scored else None,
            parents=_placed(parents, rows_of),
            scores=_placed(totals, rows_of),
            failed=failed,
        )

    def _go_on_as_fixed(
        self,
        rows: ActiveRows,
        output: StepOutput,
        normalizers: NDArray[np.float64],
        found: tuple[IntArray, IntArray, NDArray[np.float64]],
    ) -> None:
        """Puts fixed tokens in the place of those that were found for their seats, parents, tokens and totals [G, m]:
        each beam goes on with its own, in the order of their totals, and nothing else does.
        """
        fixed, k = rows.fixed_next(), self.size
        if not fixed.rows.size:
            return
        parents, tokens, totals = found
        seats = fixed.rows[::k] // k
        model = output.logits[fixed.rows, fixed.tokens] - normalizers[fixed.rows]
        values = (rows.scores[fixed.rows] + np.where(fixed.free, 0.0, model)).reshape(-1, k)
        order = (-values).argsort(axis=-1, kind="stable")[:, : totals.shape[1]]
        parents[seats], tokens[seats], totals[seats] = fixed.rows[::k, None], fixed.tokens[::k, None], -np.inf
        for array, each in ((parents, fixed.rows), (tokens, fixed.tokens), (totals, values)):
            array[seats, : order.shape[1]] = np.take_along_axis(each.reshape(-1, k), order, axis=-1)

    def results(self, rows: Rows, seat: int) -> list[Hypothesis]:
        """The closed ones, and at the limit the open ones as they are."""
        closed: _Closed = rows.seats[seat].state
        found = list(closed.hypotheses)
        if not closed.done or not found:
            scores = enumerate(rows.scores[rows.of_seat(seat)].tolist(), rows.of_seat(seat).start)
            lengths = rows.cache.lengths
            bos = self.rules == "kvx"
            found += [
                rows.read(row, self._ranked(total, int(lengths[row]) + bos)) for row, total in scores if total > -np.inf
            ]
        return sorted(found, key=_rank_score, reverse=True)[: self.n_best] or [rows.read(rows.of_seat(seat).start)]

    def decided(self, rows: Rows, seat: int) -> int:
        """What all open beams and the best of the closed ones begin with: others of these never win."""
        own = rows.of_seat(seat)
        tokens = rows.tokens[own, rows.forced + 1 : int(rows.lengths[own.start]) + 1]
        tokens = tokens[rows.scores[own] > -np.inf]
        if not tokens.size:
            return 0
        closed: _Closed = rows.seats[seat].state
        best = max(closed.hypotheses, key=_rank_score).ids[: tokens.shape[1]] if closed.hypotheses else ()
        common = (tokens == tokens[:1]).all(axis=0)
        if closed.hypotheses:
            common = common[: len(best)] & (tokens[:1, : len(best)] == np.array(best)).all(axis=0)
        return len(common) if common.all() else int(common.argmin())

    def _close(
        self,
        output: StepOutput,
        normalizers: NDArray[np.float64],
        rows: ActiveRows,
        parents: IntArray,
        totals: NDArray[np.float64],
    ) -> None:
        """Keeps the targets that end: totals [G, k], −∞ where none does."""
        for seat, rank in np.argwhere(totals > -np.inf).tolist():
            row = int(parents[seat, rank])
            score = float(output.logits[row, rows.eos] - normalizers[row])
            ranked = self._ranked(float(totals[seat, rank]), int(rows.lengths[row]) + 1)
            state: _Closed = rows.seats[seat].state
            weights = None if output.attention is None else output.attention[row]
            state.hypotheses.append(rows.read_ended(row, score, ranked, weights))

    def _over(self, rows: ActiveRows, best: NDArray[np.float64]) -> NDArray[np.bool_]:
        """The seats that are done [G], with the total of each one's best open beam [G]."""
        lengths, limits = rows.lengths[:: self.size] + 1, rows.limits[: rows.n : self.size]
        for seat, total, length, limit in zip(
            rows.seats, best.tolist(), lengths.tolist(), limits.tolist(), strict=True
        ):
            if self.rules == "kvx":
                seat.state.done = self._enough(seat.state.hypotheses, total + rows.gain, (1, limit + 1))
            elif length < limit:
                seat.state.done = self._enough(seat.state.hypotheses, total + rows.gain, (length,))
        return np.array([seat.state.done for seat in rows.seats])

    def _at_limit(self, rows: ActiveRows) -> NDArray[np.bool_]:
        """The seats that have no place for a token after this one [G]."""
        last: NDArray[np.bool_] = (rows.lengths + 1 >= rows.limits[: rows.n])[:: self.size]
        return last

    def _enough(self, closed: list[Hypothesis], best: float, lengths: tuple[int, ...]) -> bool:
        """Whether no more targets are wanted, with the most that an open beam may have, before its length counts, and
        the lengths that it may be compared by.
        """
        if best == -np.inf:
            return True
        if len(closed) < max(self.n_best, self.size * (self.patience if self.early_stopping else 1)):
            return False
        if self.early_stopping:
            return True
        worst = sorted(map(_rank_score, closed), reverse=True)[self.size - 1]
        attainable = max(self._ranked(best, length) for length in lengths)
        return attainable <= worst

    def _ranked(self, total: float, length: int) -> float:
        return total / math.pow(length, self.length_penalty)


def _fix(ids: IntArray, rows: ActiveRows) -> None:
    """Puts the tokens that are fixed in the place of those that were chosen, ids [n]."""
    if rows.begun:
        fixed = rows.fixed_next()
        ids[fixed.rows] = fixed.tokens


def _rank_score(hypothesis: Hypothesis) -> float:
    assert hypothesis.rank_score is not None
    return hypothesis.rank_score


def _stay_with_parents(parents: IntArray) -> IntArray:
    """parents [G, k] of a seat's children, best first → a row for each child: its parent's, unless a better child has
    it, so that few rows have to be copied.
    """
    seats, k = parents.shape
    earlier = np.tri(k, k=-1, dtype=bool)  # [child, better child]
    first = ~((parents[:, :, None] == parents[:, None, :]) & earlier).any(axis=-1)
    free = np.ones((seats, k), bool)
    np.put_along_axis(free, np.where(first, parents, parents[:, :1]), values=False, axis=-1)  # the best always is first
    rows: IntArray = np.empty_like(parents)
    rows[first] = parents[first]
    rows[~first] = np.nonzero(free)[1]  # as many in each seat, in order
    return rows


def _placed(values: NDArray[Any], rows: IntArray) -> NDArray[Any]:
    """Values [G, k] of children → [n], each in its row."""
    placed = np.empty(values.size, values.dtype)
    placed[rows.reshape(-1)] = values.reshape(-1)
    return placed


def _chosen(
    logits: FloatArray, parents: IntArray, tokens: IntArray, normalizers: NDArray[np.float64], rows: IntArray
) -> NDArray[np.float64]:
    """The model's own log-probabilities of the children's tokens [n]."""
    return _placed(logits[parents, tokens] - normalizers[parents], rows)


def best_continuations(
    logits: FloatArray, scores: NDArray[np.float64], normalizers: NDArray[np.float64], k: int
) -> tuple[IntArray, IntArray, NDArray[np.float64]]:
    """logits [n, V], scores and normalizers [n], k rows a seat → the 2·k best continuations of each seat: the rows that
    they go on from, their tokens and their totals in falling order, score + logit − normalizer, each [G, 2·k].

    On ties lower rows come first, then larger logits, then lower ids. Where fewer are possible, the others have −∞.
    """
    n, vocabulary = logits.shape
    count, first = min(2 * k, k * vocabulary), np.arange(0, n, k)
    rows, tokens, totals = _contenders(logits, scores, normalizers, k, count)
    seats = rows // k
    ranks = np.arange(len(seats)) - np.searchsorted(seats, np.arange(len(first)))[seats]
    kept = ranks < count
    places = seats[kept], ranks[kept]
    parents, ids = first[:, None].repeat(count, axis=1), np.zeros((len(first), count), np.int64)
    best = np.full(ids.shape, -np.inf)
    parents[places], ids[places], best[places] = rows[kept], tokens[kept], totals[kept]
    return parents, ids, best


def _contenders(
    logits: FloatArray, scores: NDArray[np.float64], normalizers: NDArray[np.float64], k: int, count: int
) -> tuple[IntArray, IntArray, NDArray[np.float64]]:
    """Rows, tokens and totals, seat by seat and the best first, of at least the `count` best of each that are possible:
    all that reach the place of `count` among the seat's maxima of blocks, which leaves little to sort.
    """
    n, vocabulary = logits.shape
    blocks = vocabulary // BLOCK if vocabulary > FEW_BLOCKS * BLOCK else 0
    bounds = scores[:, None] + block_maxima(logits, blocks) - normalizers[:, None]
    reached = -np.partition(-bounds.reshape(n // k, -1), count - 1, axis=-1)[:, count - 1]  # see _places_of_largest
    floors = np.maximum(reached, np.finfo(np.float64).min).repeat(k)  # above −∞
    rows, places = np.divmod(np.flatnonzero(bounds >= floors[:, None]), bounds.shape[1])
    rows, tokens = _members(rows, places, blocks)
    values = np.take(logits, rows * vocabulary + tokens)
    totals = scores[rows] + values - normalizers[rows]
    found = np.flatnonzero(totals >= floors[rows])
    order = found[np.lexsort((tokens[found], -values[found], rows[found], -totals[found], rows[found] // k))]
    return rows[order], tokens[order], totals[order]


def block_maxima(logits: FloatArray, blocks: int) -> FloatArray:
    """logits [n, V] → the maxima of so many blocks of each row, which take logits at equal distances, so that one pass
    finds them side by side, and behind them the logits that are in no block.
    """
    held = blocks * BLOCK
    if not held:
        return logits
    maxima = logits[:, :held].reshape(len(logits), BLOCK, blocks).max(axis=1)
    return np.concatenate([maxima, logits[:, held:]], axis=1)


def _members(rows: IntArray, places: IntArray, blocks: int) -> tuple[IntArray, IntArray]:
    """Rows and places among their block maxima → the rows and ids of all logits that these stand for."""
    whole = places < blocks
    ids = places[whole, None] + blocks * np.arange(BLOCK)
    single = places[~whole] + blocks * (BLOCK - 1)
    return np.concatenate([rows[whole].repeat(BLOCK), rows[~whole]]), np.concatenate([ids.reshape(-1), single])


def largest(logits: FloatArray, count: int) -> tuple[FloatArray, IntArray]:
    """logits [n, V] → the `count` largest of each row in falling order, and their ids, lower ones first on ties.

    They lie in the `count` blocks with the largest maxima: one pass over the logits finds these, side by side for all
    blocks, each of which takes logits at equal distances. Where more of a row equal the last than there is room for, it
    is sorted whole; which of the impossible ones are given is left open.
    """
    n, vocabulary = logits.shape
    candidates, ids = logits, np.broadcast_to(np.arange(vocabulary), logits.shape)
    maxima = logits[:, :0]
    if vocabulary > 4 * BLOCK * count:
        blocks = vocabulary // BLOCK
        maxima = logits[:, : blocks * BLOCK].reshape(n, BLOCK, blocks).max(axis=1)
        ids = (_places_of_largest(maxima, count)[:, :, None] + blocks * np.arange(BLOCK)).reshape(n, -1)
        tail = np.broadcast_to(np.arange(blocks * BLOCK, vocabulary), (n, vocabulary % BLOCK))
        ids = np.concatenate([ids, tail], axis=1)
        candidates = np.take_along_axis(logits, ids, axis=-1)
    values = candidates
    if count < values.shape[1]:
        kept = _places_of_largest(values, count)
        values, ids = np.take_along_axis(values, kept, axis=-1), np.take_along_axis(ids, kept, axis=-1)
    order = np.lexsort((ids, -values), axis=-1)
    values, ids = np.take_along_axis(values, order, axis=-1), np.take_along_axis(ids, order, axis=-1)
    last = values[:, -1:]
    crowded = ((candidates >= last).sum(axis=-1) > count) | ((maxima >= last).sum(axis=-1) > count)
    for row in np.flatnonzero(crowded & (last[:, 0] > -np.inf)).tolist():
        ids[row] = np.argsort(-logits[row], kind="stable")[:count]
    return values, ids


def _places_of_largest(values: FloatArray, count: int) -> IntArray:
    """values [n, m] → where the `count` largest of each row are, in any order.

    Negated, so that the many −∞ of a shortlist or a constraint come after the place that is looked for: before it they
    cost ten times as much.
    """
    places: IntArray = np.argpartition(-values, count - 1, axis=-1)[:, :count]
    return places


def log_normalizers(logits: FloatArray) -> NDArray[np.float64]:
    """logits [n, V] → log Σ exp [n], in float64; a few rows at a time, which stay in the processor's cache. NaN where
    any of them is NaN or +∞, or all are −∞.
    """
    n, vocabulary = logits.shape
    at_once = max(1, MASSES_AT_ONCE // vocabulary)
    peaks, totals = np.empty(n, logits.dtype), np.empty(n)
    masses = np.empty((min(at_once, n), vocabulary), np.float32)
    with np.errstate(invalid="ignore"):
        for first in range(0, n, at_once):
            some = slice(first, first + at_once)
            part = masses[: len(peaks[some])]
            logits[some].max(axis=-1, out=peaks[some])
            np.subtract(logits[some], peaks[some, None], out=part)
            np.exp(part, out=part)
            part.sum(axis=-1, out=totals[some])
    normalizers: NDArray[np.float64] = np.log(totals) + peaks
    return normalizers


def log_probabilities(logits: FloatArray, ids: IntArray) -> NDArray[np.float64]:
    """logits [n, V], ids [n] → log softmax(logits)[ids] [n], in nats and float64."""
    chosen = np.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
    difference: NDArray[np.float64] = chosen - log_normalizers(logits)
    return difference


def not_finite(logits: FloatArray, peaks: FloatArray) -> BoolArray | None:
    """logits [n, V] as the model gave them, the largest of each row after filters [n] → the rows that have no finite
    maximum [n]; None where all have one.

    A NaN is the maximum of its row, so that the logits are looked at only where a peak is odd: filters may forbid
    everything.
    """
    if math.isfinite(peaks.dot(peaks)):  # NaN and infinity stay what they are
        return None
    odd: BoolArray = ~np.isfinite(peaks)
    odd[odd] = ~np.isfinite(logits[odd].max(axis=-1))
    return odd if odd.any() else None
