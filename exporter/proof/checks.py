"""The checks of a proof: one list, each with the condition under which it applies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from kvx.exporter.progress import Progress
from kvx.exporter.proof.greedy import check_drawn, check_greedy, translations
from kvx.exporter.proof.limits import ParityOptions
from kvx.exporter.proof.loop import bind_loop, check_loop
from kvx.exporter.proof.quality import Ids, VerificationText, check_lines, check_range, check_scores
from kvx.exporter.proof.report import Check
from kvx.exporter.proof.tables import Fed, check_distances, check_source_tables, check_target_tables
from kvx.exporter.proof.trial import ExportedGraphs, Trial, first_tokens, release_large, shares_sources
from kvx.models.transformer import Transformer
from kvx.runtime.bundle.graphs import BEAMS, CHUNK, LOOP, OWN_STEP, SHORTLIST, STEP, Graph
from kvx.runtime.bundle.precision import PRECISIONS, Precision
from kvx.runtime.decoding.backend import Step, shortlisting_of
from kvx.runtime.decoding.plan import Plan

NOWHERE = Path()


class Case:
    """What there is to prove: the graphs of one format in a folder that holds these `files`, the eager model, and a
    text to translate if there is one.
    """

    def __init__(
        self,
        model: Transformer,
        graphs: ExportedGraphs,
        plan: Plan,
        options: ParityOptions,
        *,
        precision: Precision = "fp32",
        text: VerificationText | None = None,
        folder: Path = NOWHERE,
        files: Collection[str] = (),
    ) -> None:
        self.model = model
        self.graphs = graphs
        self.plan = plan
        self.options = options
        self.arithmetic = PRECISIONS[precision]
        self.limits = options.limits(precision)
        self.text = text or VerificationText((), (), str)
        self.folder = folder
        self.files = files
        self.own = False
        self.precision = precision
        self.trial = Trial(model, options, self.limits.tolerance, graphs.features.attention)

    def holds(self, graph: Graph) -> bool:
        """Whether there is a file of this graph for the backend."""
        return graph.files.get(self.graphs.name) in self.files

    def turn_to_own(self, load: Callable[[], ExportedGraphs]) -> None:
        """Goes on with the graphs that have kvx's own operators, which are loaded once those of now are given up. What
        eager makes of the text is kept.
        """
        del self.graphs
        vars(self).pop("got", None)
        self.own = True
        self.graphs = load()
        self.limits = self.options.limits(self.precision, coded_cache=self.coded)
        self.trial = Trial(self.model, self.options, self.limits.tolerance, self.graphs.features.attention)

    @property
    def coded(self) -> bool:
        """Whether the cache is in codes."""
        return self.own and self.graphs.features.cache_bits is not None

    @property
    def exact(self) -> bool:
        """Whether translations must be those of float32."""
        return not (self.arithmetic.reduced or self.coded)

    @cached_property
    def expected(self) -> dict[int, Ids]:
        """Eager's translations of the text."""
        return translations(self.trial.eager, self.text.sources, self.plan)

    @cached_property
    def got(self) -> dict[int, Ids]:
        """The export's translations of the text."""
        return translations(self.graphs, self.text.sources, self.plan)


@dataclass(frozen=True, slots=True)
class Proof:
    """One check, or several that share their work, and when it applies. `phase` is announced before it."""

    run: Callable[[Case], Iterator[Check]]
    applies: Callable[[Case], bool] = lambda case: True
    phase: str | None = None


def _encoder(case: Case) -> Iterator[Check]:
    yield case.trial.check_encoder(case.graphs)


def _steps(case: Case) -> Iterator[Check]:
    yield from case.trial.check_steps(case.graphs)


def _chunks(case: Case) -> Iterator[Check]:
    yield case.trial.check_chunks(case.graphs)


def _beams(case: Case) -> Iterator[Check]:
    yield case.trial.check_beams(case.graphs)


def _shortlist(case: Case) -> Iterator[Check]:
    shortlisting = shortlisting_of(case.graphs)
    assert shortlisting is not None
    yield case.trial.check_shortlist(case.graphs, shortlisting)


def _neighbours(case: Case) -> Iterator[Check]:
    yield case.trial.check_neighbours(case.graphs, case.limits.neighbours)


def _source_tables(case: Case) -> Iterator[Check]:
    yield check_source_tables(case.trial, case.graphs, case.limits.tolerance)


def _target_tables(case: Case) -> Iterator[Check]:
    yield check_target_tables(case.trial, case.graphs, _fed(case), case.limits.tolerance)


def _distances(case: Case) -> Iterator[Check]:
    yield check_distances(case.trial, case.graphs, _fed(case))


def _fed(case: Case) -> Iterator[Fed]:
    """Every graph of the decoder that the backend has, or the only one with kvx's own operators."""
    graphs, shortlisting = case.graphs, shortlisting_of(case.graphs)
    if case.own:
        yield Fed(OWN_STEP.name, graphs.beam_cache_specs, graphs.bind)
        return
    yield Fed(STEP.name, graphs.cache_specs, graphs.bind)
    if graphs.query_tokens:
        yield Fed(CHUNK.name, graphs.cache_specs, lambda cache: _one_by_one(graphs.bind_chunk(cache)))
    if shares_sources(graphs):
        yield Fed(BEAMS.name, graphs.beam_cache_specs, graphs.bind)
    if shortlisting is not None:
        yield Fed(SHORTLIST.name, shortlisting.cache_specs, partial(first_tokens, shortlisting))
    if case.holds(LOOP):
        yield Fed(LOOP.name, graphs.cache_specs, partial(bind_loop, case.folder, case.trial.dimensions, case.plan))


def _one_by_one(step: Step) -> Step:
    """A step for several tokens of a row that is given one."""
    return lambda input_ids: step(input_ids[:, None])


def _drawn(case: Case) -> Iterator[Check]:
    yield check_drawn(case.trial, case.graphs, case.plan)


def _range(case: Case) -> Iterator[Check]:
    sources = [*case.trial.drawn_sources(), *case.text.sources]
    yield check_range(case.graphs, case.model, case.plan, sources)


def _greedy(case: Case) -> Iterator[Check]:
    yield check_greedy(case.trial, case.graphs, case.text.sources, case.plan, "greedy on the verification text")


def _lines(case: Case) -> Iterator[Check]:
    yield check_lines(case.graphs, case.expected, case.got, case.limits.equal_lines)


def _scores(case: Case) -> Iterator[Check]:
    yield check_scores(case.graphs, case.expected, case.got, case.text, case.limits.bleu_lost)


def _loop(case: Case) -> Iterator[Check]:
    yield check_loop(Trial(case.model, case.options, case.limits.tolerance), case.graphs, case.folder, case.plan)


ENCODER_OUTPUTS = Proof(_encoder)
STEPS = Proof(_steps)
CHUNKS = Proof(_chunks, lambda case: case.graphs.query_tokens)
ROWS_OF_A_SENTENCE = Proof(_beams, lambda case: shares_sources(case.graphs))
SHORTLISTED = Proof(_shortlist, lambda case: shortlisting_of(case.graphs) is not None)
NEIGHBOURS = Proof(_neighbours)
SOURCE_TABLES = Proof(_source_tables)
TARGET_TABLES = Proof(_target_tables, phase="proving every token and position")
DISTANCES = Proof(_distances, lambda case: case.model.config.positions == "relative")
# Quantised products move logits too far for greedy translations of noise.
DRAWN = Proof(_drawn, lambda case: not (case.arithmetic.quantized or case.coded))
RANGE = Proof(_range, lambda case: any(spec.dtype == "float16" for spec in case.graphs.cache_specs))
TEXT = Proof(_greedy, lambda case: bool(case.text.sources) and case.exact)
LINES = Proof(_lines, lambda case: bool(case.text.sources) and not case.exact)
SCORES = Proof(_scores, lambda case: bool(case.text.references) and not case.exact)
LOOPED = Proof(_loop, lambda case: case.holds(LOOP), phase="proving the decoder that feeds itself")

CHECKS = (
    ENCODER_OUTPUTS,
    STEPS,
    CHUNKS,
    ROWS_OF_A_SENTENCE,
    SHORTLISTED,
    NEIGHBOURS,
    SOURCE_TABLES,
    TARGET_TABLES,
    DISTANCES,
    DRAWN,
    RANGE,
    TEXT,
    LINES,
    SCORES,
    LOOPED,
)
OF_OTHER_GRAPHS = (CHUNKS, SHORTLISTED, LOOPED)  # none of which has kvx's own operators
OWN_CHECKS = tuple(proof for proof in CHECKS if proof not in OF_OTHER_GRAPHS)


def prove(case: Case, progress: Progress | None = None, checks: Sequence[Proof] = CHECKS) -> Iterator[Check]:
    """Those of the checks that apply, one by one as they are done."""
    for proof in checks:
        if proof.applies(case):
            if proof.phase is not None and progress is not None:
                progress.phase(proof.phase)
            yield from proof.run(case)
            release_large(case.model, case.graphs)
