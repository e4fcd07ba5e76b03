"""p(target piece | source piece): learnt from parallel text, or read from a table; and the shortlist of the best.

Letters: N sentence pairs, T target tokens, P pairs of a source and a target piece that stood in one sentence pair.
A cell is a target token beside one piece of its source sentence, the null word included.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray

from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.errors import InputError
from kvx.runtime.rules import Option, count, number, refuse, wrong_values
from kvx.runtime.shortlist.candidates import Shortlist, Vocabulary
from kvx.runtime.text.sources import encode_text, load_tokenizer
from kvx.runtime.text.tokenizers.protocol import Tokenizer

Ids = NDArray[np.int32]

MOST_ITERATIONS = 10_000
MOST_TARGETS = 2**24  # no vocabulary is larger
MOST_CELLS = 2**26  # some 300,000 sentences of 14 pieces; beyond, memory is counted in gigabytes
CHUNK_CELLS = 2**20
MOST_ENTRIES = 2**26  # of a table, 16 bytes each
NULL_WORD = b"NULL"  # what tables call it
ROUNDING = 1e-3  # of printed probabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class LexiconOptions:
    """How a lexicon is learnt and what is kept of it. Raises OptionError."""

    iterations: Annotated[
        int, Option(count(MOST_ITERATIONS), "Training iterations of the word alignment (IBM Model 1).")
    ] = 5
    per_source: Annotated[
        int, Option(count(MOST_TARGETS), "Keep up to this many target pieces for each source piece.")
    ] = 50
    frequent: Annotated[
        int, Option(count(MOST_TARGETS), "Also allow this many of the most frequent target pieces for every text.")
    ] = 100
    least_probability: Annotated[
        float, Option(number(0, 1), "Least probability of a target piece that is kept.", hidden=True)
    ] = 1e-5

    def __post_init__(self) -> None:
        refuse(wrong_values(self))


@dataclass(frozen=True, slots=True, eq=False)
class ParallelIds:
    """The piece ids of N sources and of a translation of each, without special ids. Raises InputError where the
    numbers differ or a side has no piece at all.
    """

    sources: Sequence[Ids]
    targets: Sequence[Ids]

    def __post_init__(self) -> None:
        if len(self.sources) != len(self.targets):
            raise InputError(
                f"There are {len(self.sources)} sources and {len(self.targets)} targets",
                expected="one target for each source",
                remedy="Check that both files belong together.",
            )
        empty = [name for name in ("sources", "targets") if not any(map(len, getattr(self, name)))]
        if empty:
            raise InputError(
                f"There is no word in the {' and '.join(empty)}",
                expected="sentences and their translations",
                remedy="Check the files.",
            )

    @classmethod
    def read(
        cls, sources: Iterable[str], targets: Iterable[str], source_tokenizer: Tokenizer, target_tokenizer: Tokenizer
    ) -> Self:
        """The ids of two texts, line by line."""
        return cls(_encode(sources, source_tokenizer), _encode(targets, target_tokenizer))


@dataclass(frozen=True, slots=True, eq=False)
class Lexicon:
    """`probabilities` [P] of the `targets` [P] given the `sources` [P], no pair twice; `weights` [V_t] tell how common
    each target piece is.
    """

    sources: Ids
    targets: Ids
    probabilities: NDArray[np.float64]
    weights: NDArray[np.float64]

    def shortlist(self, source_vocab: Vocabulary, target_vocab: Vocabulary, options: LexiconOptions) -> Shortlist:
        """The best targets of every source piece and the most common ones; of equals, those of lower id."""
        kept = self.probabilities >= options.least_probability
        sources, targets, probabilities = self.sources[kept], self.targets[kept], self.probabilities[kept]
        order = np.lexsort((targets, -probabilities, sources))
        sources, targets = sources[order], targets[order]
        counts = np.bincount(sources, minlength=source_vocab.size)
        rank = np.arange(len(sources)) - (np.cumsum(counts) - counts)[sources]
        common = np.argsort(-self.weights, kind="stable")[: options.frequent]
        return Shortlist(
            source_vocab,
            target_vocab,
            offsets=np.concatenate([[0], np.cumsum(np.minimum(counts, options.per_source))]),
            targets=targets[rank < options.per_source],
            frequent=common[self.weights[common] > 0].astype(np.int32),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Cells:
    """The cells of some target tokens: `pairs` [U] are those that occur here, out of P; `index` [cells] tells which of
    these U a cell is; the cells of a token stand together, `widths` [tokens] of them.
    """

    pairs: Ids
    index: Ids
    widths: NDArray[np.int64]


class Model1:
    """IBM Model 1 (Brown et al. 1993): every target token comes from one piece of its source sentence, or from the null
    word, each as likely as the other. `iterate` improves p(target | source), which starts uniform, by EM.

    `source_size` and `target_size` are the vocabularies'. Raises InputError for more than MOST_CELLS cells.
    """

    def __init__(self, text: ParallelIds, source_size: int, target_size: int) -> None:
        self._null = source_size
        tokens = np.concatenate(text.targets)
        self._weights = np.bincount(tokens, minlength=target_size).astype(np.float64)
        keys, self._chunks = _cut_into_cells(text, tokens, null=source_size, target_size=target_size)
        self._sources, self._targets = (part.astype(np.int32) for part in np.divmod(keys, target_size))
        self._probabilities = np.full(len(keys), 1 / target_size)

    def iterate(self) -> float:
        """One iteration of EM → the text's log-likelihood (nats) by the probabilities before it."""
        expected, log_likelihood = np.zeros_like(self._probabilities), 0.0
        for chunk in self._chunks:
            cells = self._probabilities[chunk.pairs][chunk.index]
            totals = np.add.reduceat(cells, np.cumsum(chunk.widths) - chunk.widths)
            log_likelihood += float(np.log(totals / chunk.widths).sum())
            cells /= np.repeat(totals, chunk.widths)
            expected[chunk.pairs] += np.bincount(chunk.index, cells, minlength=len(chunk.pairs))
        self._probabilities = expected / np.bincount(self._sources, expected)[self._sources]
        return log_likelihood

    def lexicon(self) -> Lexicon:
        """The probabilities as they are now, without those of the null word."""
        words = self._sources != self._null
        return Lexicon(self._sources[words], self._targets[words], self._probabilities[words], self._weights)


def train(text: ParallelIds, source_size: int, target_size: int, iterations: int) -> Lexicon:
    """The lexicon of a text by this number of iterations of Model 1."""
    model = Model1(text, source_size, target_size)
    for _ in range(iterations):
        model.iterate()
    return model.lexicon()


def _cut_into_cells(
    text: ParallelIds, tokens: Ids, *, null: int, target_size: int
) -> tuple[NDArray[np.int64], list[_Cells]]:
    """All cells → the pairs [P] as source · target_size + target, ascending, and the cells of some tokens at a time."""
    pieces = np.concatenate([part for source in text.sources for part in (np.array([null], np.int32), source)])
    lengths = np.array([len(source) + 1 for source in text.sources])
    counts = np.array([len(target) for target in text.targets])
    starts, widths = np.repeat(np.cumsum(lengths) - lengths, counts), np.repeat(lengths, counts)  # [T]
    ends = np.cumsum(widths)
    if ends[-1] > MOST_CELLS:
        raise InputError(
            f"The parallel text has {ends[-1]:,} pairs of tokens within its sentences",
            expected=f"at most {MOST_CELLS:,}",
            remedy="Use fewer or shorter lines, which are enough for a shortlist.",
        )
    cuts = np.searchsorted(ends, np.arange(0, ends[-1] + CHUNK_CELLS, CHUNK_CELLS), side="right")
    found = []
    for first, last in itertools.pairwise(cuts):
        width = widths[first:last]
        within = np.arange(width.sum()) - np.repeat(np.cumsum(width) - width, width)
        sources = pieces[np.repeat(starts[first:last], width) + within].astype(np.int64)
        keys, index = np.unique(sources * target_size + np.repeat(tokens[first:last], width), return_inverse=True)
        found.append((keys, index.astype(np.int32), width))
    pairs = np.unique(np.concatenate([keys for keys, _, _ in found]))
    return pairs, [
        _Cells(np.searchsorted(pairs, keys).astype(np.int32), index, width)
        for keys, index, width in found
        if len(width)
    ]


@dataclass(frozen=True, slots=True)
class Table:
    """A lexical table as it was read: of its `entries`, `unknown` had a piece that the tokenizers do not know, the
    first of them on line `first_unknown`.
    """

    lexicon: Lexicon
    entries: int
    unknown: int
    first_unknown: int | None


def read_table(lines: Iterable[str], source_tokenizer: Tokenizer, target_tokenizer: Tokenizer) -> Table:
    """A table whose lines are "target source probability" with white space between them, as lex.s2t of fast_align and
    Marian.

    Lines with NULL or an unknown piece are skipped. A table does not say how common a target is: the sum of its
    probabilities stands for that. Raises InputError for any other line, and where most pieces are unknown.
    """
    source_ids, target_ids = _ids_by_piece(source_tokenizer), _ids_by_piece(target_tokenizer)
    sources, targets, probabilities = array("i"), array("i"), array("d")
    entries, unknown = 0, list[int]()
    for at, line in enumerate(lines, 1):
        if at > MOST_ENTRIES:
            raise _bad_entry("The table has more lines than can be read", at)
        target, source, probability = _read_entry(line, at)
        if NULL_WORD in (source, target):
            continue
        entries += 1
        if source in source_ids and target in target_ids:
            sources.append(source_ids[source])
            targets.append(target_ids[target])
            probabilities.append(probability)
        else:
            unknown.append(at)
    if entries == 0 or 2 * len(unknown) > entries:
        raise InputError(
            f"The tokenizers do not know the pieces of {len(unknown)} of {entries} entries in the table",
            expected="a table of the bundle's own pieces",
            remedy="Make it from text that the bundle's tokenizers have split into pieces.",
            line=unknown[0] if unknown else None,
        )
    lexicon = _without_repeats(np.array(sources), np.array(targets), np.array(probabilities), len(target_tokenizer))
    return Table(lexicon, entries, len(unknown), unknown[0] if unknown else None)


def _read_entry(line: str, at: int) -> tuple[bytes, bytes, float]:
    """Fields are separated by ASCII white space: a piece may contain any other."""
    try:
        target, source, last = line.encode().split()
        probability = float(last)
    except ValueError:
        probability = math.nan
    if not 0 <= probability <= 1 + ROUNDING:
        raise _bad_entry(f"The line {line!r:.80} is not an entry", at)
    return target, source, probability


def _bad_entry(got: str, number: int) -> InputError:
    return InputError(
        got,
        expected=f'"target source probability" with a probability from 0 to 1, on at most {MOST_ENTRIES:,} lines',
        remedy="Check that this is a lexical table.",
        line=number,
    )


def _without_repeats(sources: Ids, targets: Ids, probabilities: NDArray[np.float64], target_size: int) -> Lexicon:
    """The lexicon with the most probable entry of each pair."""
    order = np.lexsort((-probabilities, targets, sources))
    keys = sources[order].astype(np.int64) * target_size + targets[order]
    first = order[np.diff(keys, prepend=-1) > 0]
    sources, targets, probabilities = sources[first], targets[first], probabilities[first]
    weights = np.bincount(targets, probabilities, minlength=target_size)
    return Lexicon(sources, targets, probabilities, weights.astype(np.float64))


def _ids_by_piece(tokenizer: Tokenizer) -> dict[bytes, int]:
    return {piece.encode(): number for number, piece in enumerate(tokenizer.pieces(range(len(tokenizer))))}


def _encode(texts: Iterable[str], tokenizer: Tokenizer) -> list[Ids]:
    return [np.array(encode_text(tokenizer, text, number), np.int32) for number, text in enumerate(texts, 1)]


@dataclass(frozen=True, slots=True)
class Coverage:
    """How a shortlist suits a text: `candidates` of a sentence on average, and the `share` (0 to 1) of the target
    tokens, eos left out, that the candidates of their sentences hold.
    """

    candidates: float
    share: float


def coverage(shortlist: Shortlist, text: ParallelIds) -> Coverage:
    """The coverage of a text."""
    candidates = covered = 0
    is_candidate = np.zeros(shortlist.target_vocab.size, np.bool_)
    for source, target in zip(text.sources, text.targets, strict=True):
        chosen = shortlist.candidates(source.tolist())
        is_candidate[chosen] = True
        candidates += len(chosen)
        covered += int(is_candidate[target].sum())
        is_candidate[chosen] = False
    return Coverage(candidates / len(text.sources), covered / sum(map(len, text.targets)))


def train_shortlist(
    bundle: Bundle, sources: Iterable[str], targets: Iterable[str], options: LexiconOptions
) -> tuple[Shortlist, Coverage]:
    """The shortlist of a parallel text, line by line, and how it suits that text. Raises BundleError, InputError and
    TokenizerError.
    """
    source, target = _tokenizers(bundle)
    text = ParallelIds.read(sources, targets, source, target)
    lexicon = train(text, len(source), len(target), options.iterations)
    shortlist = lexicon.shortlist(*_vocabularies(bundle), options)
    return shortlist, coverage(shortlist, text)


def import_shortlist(bundle: Bundle, table: Iterable[str], options: LexiconOptions) -> tuple[Shortlist, Table]:
    """The shortlist of a lexical table, and what was read of it. Raises BundleError, InputError and TokenizerError."""
    read = read_table(table, *_tokenizers(bundle))
    return read.lexicon.shortlist(*_vocabularies(bundle), options), read


def _tokenizers(bundle: Bundle) -> tuple[Tokenizer, Tokenizer]:
    names = {name for entry in bundle.manifest.tokenizers.values() for name in entry.files.values()}
    bundle.require(*names)
    bundle.check_hashes(names)  # which the shortlist will carry
    return load_tokenizer(bundle, "source"), load_tokenizer(bundle, "target")


def _vocabularies(bundle: Bundle) -> tuple[Vocabulary, Vocabulary]:
    return Vocabulary.of(bundle.manifest, "source"), Vocabulary.of(bundle.manifest, "target")
