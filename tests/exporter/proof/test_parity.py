"""The proof finds faults: backends and models that are wrong in one way each, and the check that must say so."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvx import OptionError, ParityError
from kvx.exporter.export import export
from kvx.exporter.graphs import RECIPES
from kvx.exporter.lowerings.standard import StandardOperators
from kvx.exporter.options import ExportOptions
from kvx.exporter.proof import checks
from kvx.exporter.proof.checks import Case
from kvx.exporter.proof.limits import ParityOptions
from kvx.exporter.proof.quality import VerificationText
from kvx.exporter.proof.report import Check, Differences, ParityReport
from kvx.exporter.proof.trial import ExportedGraphs, Trial
from kvx.exporter.writing.graphs import EncoderGraph, StepGraph
from kvx.exporter.writing.torchscript import write_torchscript
from kvx.models.eager import TorchBackend
from kvx.models.layers import Norm
from kvx.models.transformer import Transformer
from kvx.runtime.arrays import FloatArray, IntArray, Tensors
from kvx.runtime.backends import torchscript
from kvx.runtime.backends.onnx import OnnxBackend
from kvx.runtime.backends.torchscript import TorchScriptBackend
from kvx.runtime.bundle.graphs import GRAPHS
from kvx.runtime.bundle.manifest import Manifest
from kvx.runtime.bundle.signature import Dimensions, StepFeatures, cache_specs
from kvx.runtime.decoding.backend import Step, StepOutput
from kvx.runtime.decoding.cache import KVCache
from kvx.runtime.decoding.plan import Plan

ENCODER, LOGITS, CACHES, IN_PLACE, BEAMS, NEIGHBOURS, SOURCE_TABLES, TARGET_TABLES, GREEDY = CHECKS = (
    "encoder outputs",
    "logits of",
    "caches written",
    "in place against out of place",
    "several rows a sentence",
    "rows alone against rows among others",
    "source tables",
    "target tables",
    "greedy on drawn ids",
)
FEW_STEPS = ParityOptions(steps=6)
PLAIN_FEATURES, ORT_FEATURES = StepFeatures(), StepFeatures(source_presents=True)
SOURCES = [(2, 9, 8, 7, 3), (2, 5, 3)]


def prove(
    model: Transformer,
    graphs: ExportedGraphs,
    plan: Plan,
    options: ParityOptions,
    sources: Sequence[tuple[int, ...]] = (),
) -> Iterator[Check]:
    """The checks of one backend in float32, also on these sources."""
    return checks.prove(Case(model, graphs, plan, options, text=VerificationText(sources, (), str)))


class Faultless:
    """Graphs as they were exported; each fault overrides the one thing in which it is wrong."""

    name = "tried"
    decodes = 1
    query_tokens = False

    def __init__(self, graphs: ExportedGraphs) -> None:
        self.graphs = graphs
        self.features = graphs.features
        self.cache_specs = graphs.cache_specs
        self.beam_cache_specs = graphs.beam_cache_specs

    def encode(self, input_ids: IntArray, source_lengths: IntArray) -> Tensors:
        return self.graphs.encode(input_ids, source_lengths)

    def run_encoder(self, feeds: Tensors) -> Tensors:
        return self.graphs.run_encoder(feeds)

    def run_step(self, feeds: Tensors) -> Tensors:
        return self.graphs.run_step(feeds)

    def bind(self, cache: KVCache) -> Step:
        return self._altered(cache, self.graphs.bind(cache))

    def bind_chunk(self, cache: KVCache) -> Step:
        return self._altered(cache, self.graphs.bind_chunk(cache))

    def _altered(self, cache: KVCache, step: Step) -> Step:
        def altered(input_ids: IntArray) -> StepOutput:
            before = {name: buffer.copy() for name, buffer in cache.buffers.items() if ".decoder." in name}
            return self.alter(cache, before, step(input_ids))

        return altered

    def alter(self, cache: KVCache, before: Tensors, output: StepOutput) -> StepOutput:
        """What a bound step left in the cache and gave; `before` are the self-attention buffers it started from."""
        return output


class LogitsAreOff(Faultless):
    def run_step(self, feeds: Tensors) -> Tensors:
        outputs = super().run_step(feeds)
        return {**outputs, "logits": outputs["logits"] + np.float32(1e-3)}

    def alter(self, cache: KVCache, before: Tensors, output: StepOutput) -> StepOutput:
        return StepOutput(output.logits + np.float32(1e-3))


class BoundLogitsAreOff(Faultless):
    def alter(self, cache: KVCache, before: Tensors, output: StepOutput) -> StepOutput:
        return StepOutput(output.logits + np.float32(1e-3))


class RowsLeanOnTheFirst(Faultless):
    """As one scale for the whole batch does: what a row gives depends on who is beside it."""

    def alter(self, cache: KVCache, before: Tensors, output: StepOutput) -> StepOutput:
        lean = np.float32(1e-3) * (output.logits[:1] - output.logits)
        return StepOutput(output.logits + lean)


class TouchesTheSource(Faultless):
    def alter(self, cache: KVCache, before: Tensors, output: StepOutput) -> StepOutput:
        cache.buffers["past_key_values.0.encoder.key"][0, 0, -1, 0] += 1
        return output


class OfSharedSources(Faultless):
    """Right wherever a sentence has one row."""

    def alter(self, cache: KVCache, before: Tensors, output: StepOutput) -> StepOutput:
        return self.alter_beams(cache, output) if cache.shared_sources else output

    def alter_beams(self, cache: KVCache, output: StepOutput) -> StepOutput:
        raise NotImplementedError


class BeamsSwapPlaces(OfSharedSources):
    def alter_beams(self, cache: KVCache, output: StepOutput) -> StepOutput:
        by_sentence = output.logits.reshape(-1, cache.capacity.beams, output.logits.shape[-1])
        return StepOutput(np.roll(by_sentence, 1, axis=1).reshape(output.logits.shape))


class BeamsTouchTheSource(OfSharedSources):
    def alter_beams(self, cache: KVCache, output: StepOutput) -> StepOutput:
        cache.buffers["past_key_values.1.encoder.value"][-1, -1, -1, -1] = 0
        return output


class BeamsLeanOnTheFirst(OfSharedSources):
    def alter_beams(self, cache: KVCache, output: StepOutput) -> StepOutput:
        lean = np.float32(1e-3) * (output.logits[:1] - output.logits)
        return StepOutput(output.logits + lean)


class BeamsSeeTheNextSource(Faultless):
    """As where rows are laid out beam by beam instead of sentence by sentence."""

    def bind(self, cache: KVCache) -> Step:
        step = super().bind(cache)

        def shifted(input_ids: IntArray) -> StepOutput:
            sources = [name for name in cache.buffers if ".encoder." in name] if cache.shared_sources else []
            for array in (cache.source_lengths, *(cache.buffers[name] for name in sources)):
                array[...] = np.roll(array, len(sources) // 4, axis=0)
            output = step(input_ids)
            for array in (cache.source_lengths, *(cache.buffers[name] for name in sources)):
                array[...] = np.roll(array, -(len(sources) // 4), axis=0)
            return output

        return shifted


class OfAttention(Faultless):
    """Right in everything but the attention, in place and out of place."""

    def run_step(self, feeds: Tensors) -> Tensors:
        outputs = super().run_step(feeds)
        return {**outputs, "attention": self.blur(outputs["attention"])}

    def alter(self, cache: KVCache, before: Tensors, output: StepOutput) -> StepOutput:
        assert output.attention is not None
        return output._replace(attention=self.blur(output.attention))

    def blur(self, attention: FloatArray) -> FloatArray:
        raise NotImplementedError


class AttentionIsOff(OfAttention):
    def blur(self, attention: FloatArray) -> FloatArray:
        off = attention.copy()
        off[0, 0] += np.float32(1e-3)
        off[0, -1] -= np.float32(1e-3)
        return off


class AttentionLeaks(OfAttention):
    """So little that no tolerance would show it."""

    def blur(self, attention: FloatArray) -> FloatArray:
        return np.where(attention == 0, np.float32(1e-12), attention)


class AttentionSumsToLess(OfAttention):
    def blur(self, attention: FloatArray) -> FloatArray:
        return attention * np.float32(1 - 9e-5)


class AttentionIsStaleInPlace(Faultless):
    def alter(self, cache: KVCache, before: Tensors, output: StepOutput) -> StepOutput:
        return output._replace(attention=None)


class LogitsAreNaN(Faultless):
    def run_step(self, feeds: Tensors) -> Tensors:
        outputs = super().run_step(feeds)
        return {**outputs, "logits": np.where(np.arange(len(outputs["logits"][0])) == 7, np.nan, outputs["logits"])}


class RowsAreSwapped(Faultless):
    def run_step(self, feeds: Tensors) -> Tensors:
        outputs = super().run_step(feeds)
        return {**outputs, "logits": np.roll(outputs["logits"], 1, axis=0)}


def attending_to_everything(feeds: Tensors) -> Tensors:
    longest = feeds["source_lengths"].max()
    return {**feeds, "source_lengths": np.full_like(feeds["source_lengths"], longest)}


class EncoderIgnoresLengths(Faultless):
    def run_encoder(self, feeds: Tensors) -> Tensors:
        return super().run_encoder(attending_to_everything(feeds))


class StepIgnoresSourceLengths(Faultless):
    def run_step(self, feeds: Tensors) -> Tensors:
        return super().run_step(attending_to_everything(feeds))


class StepLooksFaintlyAtEverySource(Faultless):
    """What lies beyond a length weighs so little that only enormous values show it, as under a mask that adds −1e9."""

    side = "encoder"

    def run_step(self, feeds: Tensors) -> Tensors:
        outputs = super().run_step(feeds)
        values = feeds[f"past_key_values.0.{self.side}.value"].astype(np.float64)
        return {**outputs, "logits": outputs["logits"] + 1e-30 * values.max(axis=(1, 2, 3), keepdims=True)[:, 0, 0]}


class StepLooksFaintlyAtTheWholeCache(StepLooksFaintlyAtEverySource):
    side = "decoder"


class StepTakesOnePositionForAll(Faultless):
    def run_step(self, feeds: Tensors) -> Tensors:
        lengths = feeds["past_lengths"]
        return super().run_step({**feeds, "past_lengths": np.full_like(lengths, lengths.max())})


class StepKeepsThePast(Faultless):
    def run_step(self, feeds: Tensors) -> Tensors:
        pasts = {name.replace("past_key_values", "present"): array for name, array in feeds.items()}
        return {name: pasts.get(name, array) for name, array in super().run_step(feeds).items()}


class WritesTheNextPosition(Faultless):
    def alter(self, cache: KVCache, before: Tensors, output: StepOutput) -> StepOutput:
        rows, lengths = np.arange(cache.active), cache.lengths[: cache.active]
        for name, old in before.items():
            buffer = cache.buffers[name]
            written = buffer[rows, :, lengths].copy()
            buffer[...] = old
            buffer[rows, :, (lengths + 1) % buffer.shape[2]] = written
        return output


class WritesBeyondTheLengths(Faultless):
    def alter(self, cache: KVCache, before: Tensors, output: StepOutput) -> StepOutput:
        for name in before:
            buffer = cache.buffers[name]
            beyond = np.arange(buffer.shape[2]) > cache.lengths[:, None]
            buffer[...] = np.where(beyond[:, None, :, None], 7, buffer)
        return output


class GoesWrongAfterManySteps(Faultless):
    """The most probable token drops to the last place once ten tokens are written."""

    first_wrong = 10

    def alter(self, cache: KVCache, before: Tensors, output: StepOutput) -> StepOutput:
        logits, late = output.logits.copy(), np.flatnonzero(cache.lengths[: cache.active] >= self.first_wrong)
        logits[late, logits[late].argmax(axis=-1)] = -1e3
        return StepOutput(logits)


class PrefersOddIds(Faultless):
    nudge = 1e-5

    def run_step(self, feeds: Tensors) -> Tensors:
        outputs = super().run_step(feeds)
        return {**outputs, "logits": self.nudged(outputs["logits"])}

    def alter(self, cache: KVCache, before: Tensors, output: StepOutput) -> StepOutput:
        return StepOutput(self.nudged(output.logits))

    def nudged(self, logits: FloatArray) -> FloatArray:
        odd = np.arange(logits.shape[-1]) % 2 == 1
        return logits + np.where(odd, np.float32(self.nudge), np.float32(0))


class PrefersOddIdsByFar(PrefersOddIds):
    nudge = 1e-1


@pytest.fixture(scope="module")
def plan(tiny_bundle: Path) -> Plan:
    manifest = Manifest.read(tiny_bundle)
    return Plan.of(manifest, cache_specs(manifest.dimensions), rows=8)


@pytest.fixture(scope="module")
def graphs(tiny_bundle: Path, tiny: Transformer) -> OnnxBackend:
    return OnnxBackend(tiny_bundle, Dimensions.of_model(tiny.config.to_dict()), ORT_FEATURES, threads=1)


@pytest.fixture(scope="module")
def attentive(tiny: Transformer, tmp_path_factory: pytest.TempPathFactory) -> TorchScriptBackend:
    return traced(tiny, tmp_path_factory.mktemp("attentive"), StepFeatures(attention=1))


@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        (AttentionIsOff, "attention of layer 1"),
        (AttentionLeaks, "attention of layer 1"),
        (AttentionSumsToLess, "attention of layer 1"),
        (AttentionIsStaleInPlace, IN_PLACE),
    ],
)
def test_a_fault_in_the_attention_is_caught(
    tiny: Transformer, attentive: TorchScriptBackend, plan: Plan, fault: type[Faultless], caught_by: str
) -> None:
    assert all(check.passed for check in prove(tiny, Faultless(attentive), plan, FEW_STEPS))
    wrong = [check.name for check in prove(tiny, fault(attentive), plan, FEW_STEPS) if not check.passed]
    assert len(wrong) == 1
    assert wrong[0].startswith(caught_by)


def traced(model: Transformer, folder: Path, features: StepFeatures = PLAIN_FEATURES) -> TorchScriptBackend:
    write_torchscript(EncoderGraph(model), folder / torchscript.ENCODER_FILE)
    write_torchscript(StepGraph(model, features=features), folder / torchscript.STEP_FILE)
    return TorchScriptBackend(folder, Dimensions.of_model(model.config.to_dict()), features)


def failed(checks: Iterator[Check]) -> list[str]:
    """Which of CHECKS failed."""
    names = [check.name for check in checks if not check.passed]
    return [check for check in CHECKS if any(name.startswith(check) for name in names)]


def test_faultless_graphs_pass_every_check(tiny: Transformer, graphs: OnnxBackend, plan: Plan) -> None:
    checks = list(prove(tiny, Faultless(graphs), plan, ParityOptions(), SOURCES))
    assert [check.passed for check in checks] == [True] * (len(CHECKS) + 1)
    for name, check in zip(CHECKS, checks, strict=False):
        assert check.name.startswith(name)


@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        (LogitsAreOff, LOGITS),
        (LogitsAreNaN, LOGITS),
        (RowsAreSwapped, LOGITS),
        (StepIgnoresSourceLengths, LOGITS),
        (StepLooksFaintlyAtEverySource, LOGITS),
        (StepLooksFaintlyAtTheWholeCache, LOGITS),
        (StepTakesOnePositionForAll, LOGITS),
        (StepKeepsThePast, CACHES),
        (EncoderIgnoresLengths, ENCODER),
        (BoundLogitsAreOff, IN_PLACE),
        (WritesTheNextPosition, IN_PLACE),
        (WritesBeyondTheLengths, IN_PLACE),
        (TouchesTheSource, IN_PLACE),
        (BeamsSeeTheNextSource, BEAMS),
        (BeamsSwapPlaces, BEAMS),
        (BeamsTouchTheSource, BEAMS),
        (RowsLeanOnTheFirst, NEIGHBOURS),
        (BeamsLeanOnTheFirst, NEIGHBOURS),
        (GoesWrongAfterManySteps, GREEDY),
    ],
)
def test_a_fault_is_caught(
    tiny: Transformer, graphs: OnnxBackend, plan: Plan, fault: type[Faultless], caught_by: str
) -> None:
    assert caught_by in failed(prove(tiny, fault(graphs), plan, FEW_STEPS))


def test_a_fault_in_the_tokens_alone_is_caught_by_the_translations_alone(
    tiny: Transformer, graphs: OnnxBackend, plan: Plan
) -> None:
    assert failed(prove(tiny, GoesWrongAfterManySteps(graphs), plan, FEW_STEPS)) == [GREEDY]


@pytest.mark.parametrize(
    ("name", "caught_by"),
    [
        ("encoder_layers.0.self_attention.value.weight", ENCODER),
        ("encoder_norm.gamma", ENCODER),
        ("source_embedding.positions", ENCODER),
        ("decoder_layers.0.cross_attention.key.weight", ENCODER),
        ("decoder_layers.1.self_attention.key.weight", CACHES),
        ("decoder_layers.1.feed_forward.up.bias", LOGITS),
        ("decoder_norm.beta", LOGITS),
        ("head.weight", LOGITS),
    ],
)
def test_one_weight_that_differs_is_caught(
    tiny: Transformer, plan: Plan, tmp_path: Path, name: str, caught_by: str
) -> None:
    other = copy.deepcopy(tiny)
    other.state_dict()[name].view(-1)[0] += 1e-2
    assert caught_by in failed(prove(tiny, traced(other, tmp_path), plan, ParityOptions()))


def twins(model: Transformer, gap: float) -> Transformer:
    """A copy in which every odd id has the logit of the even id before it, less the share `gap`."""
    copied = copy.deepcopy(model)
    copied.head.weight[1::2] = copied.head.weight[::2] * (1 - gap)
    return copied


def test_ties_are_counted_and_do_not_fail(tiny: Transformer, plan: Plan, tmp_path: Path) -> None:
    model = twins(tiny, gap=0)
    checks = list(prove(model, PrefersOddIds(traced(model, tmp_path)), plan, ParityOptions()))
    assert all(check.passed for check in checks)
    assert "0 of 16 sentences equal, 16 near-ties fell the other way" in checks[-1].detail


@pytest.mark.parametrize(("gap", "is_tie"), [(1e-5, True), (1e-3, False)])
def test_a_token_may_fall_the_other_way_only_within_the_tolerance(
    tiny: Transformer, plan: Plan, tmp_path: Path, gap: float, is_tie: bool
) -> None:
    model = twins(tiny, gap)
    *_, check = prove(model, PrefersOddIdsByFar(traced(model, tmp_path)), plan, ParityOptions())
    assert check.name == GREEDY
    assert check.passed is is_tie


def test_a_report_gives_the_largest_difference_of_every_tensor(
    tiny: Transformer, graphs: OnnxBackend, plan: Plan
) -> None:
    report = ParityReport(1e-4, tuple(prove(tiny, LogitsAreOff(graphs), plan, FEW_STEPS)))
    written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert written["passed"] is False
    assert written["tolerance"] == 1e-4
    encoder, logits, caches = (check["differences"] for check in written["checks"][:3])
    assert logits["logits"] == pytest.approx(1e-3, rel=0.05)
    parts = [f"{layer}.{{}}.{part}" for layer in range(tiny.config.decoder_layers) for part in ("key", "value")]
    assert encoder.keys() == {"present." + part.format("encoder") for part in parts}
    assert caches.keys() == {"present." + part.format("decoder") for part in parts}
    assert max(*encoder.values(), *caches.values()) < 1e-4


@pytest.mark.parametrize("fault", [LogitsAreNaN, WritesBeyondTheLengths])
def test_a_report_is_valid_json_even_where_a_difference_is_infinite(
    tiny: Transformer, graphs: OnnxBackend, plan: Plan, fault: type[Faultless]
) -> None:
    report = ParityReport(1e-4, tuple(prove(tiny, fault(graphs), plan, FEW_STEPS)))
    assert not report.passed
    json.dumps(report.to_dict(), allow_nan=False)


def eager_greedy(model: Transformer, source: tuple[int, ...], plan: Plan) -> list[int]:
    """Ids after bos by one full pass for each token."""
    ids = [*plan.start]
    while len(ids) <= plan.max_new_tokens and plan.eos not in ids[1:]:
        logits = model(torch.tensor([source]), torch.tensor([len(source)]), torch.tensor([ids]))[0, -1]
        ids.append(int(logits.argmax()))
    return ids[1:]


def test_a_report_names_the_first_token_that_differs(tiny: Transformer, graphs: OnnxBackend, plan: Plan) -> None:
    truth = [eager_greedy(tiny, source, plan) for source in SOURCES]
    wrong_from = GoesWrongAfterManySteps.first_wrong
    first = next(index for index, ids in enumerate(truth) if len(ids) > wrong_from)
    *_, check = prove(tiny, GoesWrongAfterManySteps(graphs), plan, FEW_STEPS, SOURCES)
    assert check.name == "greedy on the verification text"
    said = re.search(r"sentence (\d+), token (\d+): \d+ instead of (\d+), which eager prefers by (\S+)", check.detail)
    assert said
    assert [int(number) for number in said.groups()[:3]] == [first + 1, wrong_from + 1, truth[first][wrong_from]]
    assert float(said[4]) > 0


@pytest.mark.parametrize(
    ("scale", "difference", "passes"),
    [(0.1, 9e-5, True), (0.1, 2e-4, False), (1000, 0.09, True), (1000, 0.2, False), (1, np.nan, False)],
)
def test_the_tolerance_is_absolute_below_one_and_relative_above(scale: float, difference: float, passes: bool) -> None:
    found, expected = Differences(), np.array([-scale, 0.0])
    found.add("logits", expected, expected + np.array([0, difference]))
    assert found.check(TorchBackend, "x", 1e-4).passed is passes  # type: ignore[arg-type]  # has the name


@pytest.mark.parametrize(
    "values",
    [
        {"tolerance": 0},
        {"tolerance": 1},
        {"tolerance": np.nan},
        {"steps": 0},
        {"seed": -1},
        {"equal_lines": 1.1},
        {"bleu_lost": 101},
    ],
)
def test_options_that_prove_nothing_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(OptionError) as caught:
        ParityOptions(**values)  # type: ignore[arg-type]
    assert caught.value.option == next(iter(values))


class BiasedNorm(StandardOperators):
    """Forgets that the reference divides by the unbiased deviation."""

    def normalize(self, norm: Norm, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, (x.shape[-1],), norm.gamma, norm.get_parameter("beta"))


def write_faulty_torchscript(graph: EncoderGraph | StepGraph, path: Path) -> None:
    graph.model = copy.deepcopy(graph.model)
    graph.model.head.weight[3, 0] += 1e-2
    write_torchscript(graph, path)


@pytest.mark.proof
def test_a_lowering_that_fails_its_proof_leaves_nothing(
    tiny_checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvx.exporter.lowerings.lowered.StandardOperators", BiasedNorm)
    output = tmp_path / "bundle"
    with pytest.raises(ParityError) as caught:
        export(
            ExportOptions(
                checkpoint=tiny_checkpoint_folder / "model.pt", output=output, format="onnx", lowering="standard"
            )
        )
    assert "onnx, encoder outputs: largest difference" in caught.value.got
    assert not list(tmp_path.iterdir())


def test_a_failing_proof_leaves_the_old_bundle_as_it_was(
    tiny_checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, output = tiny_checkpoint_folder / "model.pt", tmp_path / "bundle"
    export(ExportOptions(checkpoint=checkpoint, output=output, format="torchscript", verify=False))
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    monkeypatch.setattr("kvx.exporter.graphs.write_torchscript", write_faulty_torchscript)
    with pytest.raises(ParityError, match="torchscript, logits of"):
        export(ExportOptions(checkpoint=checkpoint, output=output, format="torchscript", force=True))
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_differ_on_either_side(value: float) -> None:
    for expected, got in (([value], [0.0]), ([0.0], [value]), ([value], [value])):
        found = Differences()
        found.add("x", np.array(expected, np.float32), np.array(got, np.float32))
        found.add("x", np.zeros(1, np.float32), np.zeros(1, np.float32))
        assert found.worst["x"] == np.inf
        assert not found.check(Faultless, "x", 1e-4).passed  # type: ignore[arg-type]  # has a name, which is enough


@pytest.mark.parametrize(("difference", "passes"), [(0.04, True), (0.06, False)])
def test_the_tolerance_may_have_a_unit_of_its_own(difference: float, passes: bool) -> None:
    found = Differences()
    found.add("x", np.full(1, 9.0), np.full(1, 9.0 + difference), 0.5)
    assert found.check(Faultless, "x", 0.1).passed == passes  # type: ignore[arg-type]  # has a name, which is enough


def test_arrays_of_other_shapes_differ() -> None:
    found = Differences()
    found.add("x", np.zeros((4, 3), np.float32), np.zeros((1, 3), np.float32))
    assert found.worst["x"] == np.inf


def test_several_tokens_at_once_are_proven(tiny: Transformer, graphs: OnnxBackend, plan: Plan) -> None:
    class Chunks(Faultless):
        query_tokens = True

    class OffByALittle(Chunks):
        def bind_chunk(self, cache: KVCache) -> Step:
            step = super().bind_chunk(cache)
            return lambda input_ids: StepOutput(step(input_ids).logits + np.float32(1e-2))

    assert all(check.passed for check in prove(tiny, Chunks(graphs), plan, FEW_STEPS))
    found = prove(tiny, OffByALittle(graphs), plan, FEW_STEPS)
    assert [check.name for check in found if not check.passed] == ["several tokens at once"]


class ChunksWrite(Faultless):
    """A number too many, after several tokens at once, into a place of the first row."""

    query_tokens = True

    def __init__(self, graphs: ExportedGraphs, name: str, beyond: int) -> None:
        super().__init__(graphs)
        self.written, self.beyond = name, beyond

    def bind_chunk(self, cache: KVCache) -> Step:
        step = super().bind_chunk(cache)

        def writing(input_ids: IntArray) -> StepOutput:
            output = step(input_ids)
            last = cache.lengths[0] + input_ids.shape[1] - 1 if ".decoder." in self.written else 0
            cache.buffers[self.written][0, 0, last + self.beyond, 0] = 7
            return output

        return writing


@pytest.mark.parametrize(
    ("name", "beyond"),
    [
        ("past_key_values.1.decoder.value", 0),
        ("past_key_values.0.decoder.key", 1),
        ("past_key_values.0.encoder.key", 0),
    ],
)
def test_what_several_tokens_at_once_write_is_proven(
    tiny: Transformer, graphs: OnnxBackend, name: str, beyond: int
) -> None:
    assert not Trial(tiny, FEW_STEPS, 1e-4).check_chunks(ChunksWrite(graphs, name, beyond)).passed


@pytest.mark.parametrize("positions", [1, 2, 5, 9])
def test_several_tokens_at_once_are_proven_with_however_few_positions(tiny: Transformer, positions: int) -> None:
    few = Transformer(replace(tiny.config, target_positions=positions)).eval()
    trial, backend = Trial(few, FEW_STEPS, 1e-4), TorchBackend(few)
    assert trial.check_chunks(backend).passed  # type: ignore[arg-type]  # which needs none of the graphs themselves
    assert trial.check_beams(backend).passed  # type: ignore[arg-type]


def test_every_check_of_the_list_is_there_once() -> None:
    found = [value for value in vars(checks).values() if isinstance(value, checks.Proof)]
    assert len(found) == len(checks.CHECKS)
    assert {id(proof) for proof in found} == {id(proof) for proof in checks.CHECKS}


def test_every_graph_of_a_bundle_has_a_recipe_and_a_check_that_proves_it() -> None:
    assert [recipe.graph for recipe in RECIPES] + [recipe.own for recipe in RECIPES if recipe.own] == list(GRAPHS)
    for recipe in RECIPES:
        assert recipe.proof in checks.CHECKS
    assert len({id(recipe.proof) for recipe in RECIPES}) == len(RECIPES)


def test_a_graph_shares_only_weights_that_are_written_before_it() -> None:
    written: list[str] = []
    for recipe in RECIPES:
        assert recipe.shares is None or recipe.shares.name in written
        written.append(recipe.graph.name)
