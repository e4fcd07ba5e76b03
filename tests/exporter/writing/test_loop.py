"""The graph that feeds itself, against eager greedy decoding.

Letters: B rows, T capacity of a row's cache.
"""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from kvx.exporter.lowerings.cuda import CudaOperators
from kvx.exporter.lowerings.standard import StandardOperators
from kvx.exporter.proof.bundle import verify
from kvx.exporter.proof.greedy import translations
from kvx.exporter.proof.limits import ParityOptions
from kvx.exporter.proof.loop import BoundLoop, State, check_loop
from kvx.exporter.proof.trial import Trial
from kvx.exporter.writing.loop import ForcedLoopGraph, LoopGraph
from kvx.exporter.writing.onnx import write_onnx
from kvx.models.eager import TorchBackend
from kvx.models.transformer import Transformer
from kvx.runtime.bundle.framing import Framing, SpecialIds
from kvx.runtime.bundle.manifest import LOOP_FILE, Manifest
from kvx.runtime.bundle.signature import Dimensions, StepFeatures, step_signature
from kvx.runtime.decoding.cache import Capacity, EncodedSource, KVCache
from kvx.runtime.decoding.device_loop import LoopState
from kvx.runtime.decoding.plan import Plan
from kvx.tests.conftest import NUMBERS

BOS, PAD, EOS = 1, 0, 2
LOOP_FEATURES = StepFeatures().loop
PLAN = Plan(
    start=(BOS,),
    eos=EOS,
    pad=PAD,
    rows=5,
    max_new_tokens=12,
    source_positions=24,
    cache_bytes=2**24,
    target_bytes=1,
    source_bytes=1,
)
SOURCES = [(5, 9, 3), (7,), (4, 4, 8, 6, 11, 3), (10, 3), (6, 5, 12, 9)]


def token_of(model: Transformer) -> int:
    """One that the model gives soon, but not at once, so that eos can be it."""
    every = translations(TorchBackend(model), SOURCES, replace(PLAN, eos=-1)).values()
    first, given = {ids[0] for ids in every}, [token for ids in every for token in set(ids[1:])]
    return max(set(given) - first, key=given.count)


def with_id(plan: Plan, name: str, one: int) -> Plan:
    return replace(plan, eos=one) if name == "eos" else replace(plan, pad=one)


@pytest.fixture(scope="session")
def plan(tiny: Transformer) -> Plan:
    return replace(PLAN, eos=token_of(tiny))


@pytest.fixture(scope="session", params=["ort", "standard"])
def folder(
    request: pytest.FixtureRequest, tiny: Transformer, plan: Plan, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path: Path = tmp_path_factory.mktemp("loop")
    ops = CudaOperators(tiny) if request.param == "ort" else StandardOperators()
    ids = SpecialIds(pad=PAD, bos=BOS, eos=plan.eos)
    framing = Framing.plain(ids, ids)
    write_onnx(LoopGraph(tiny, framing, LOOP_FEATURES, ops), path / LOOP_FILE)
    return path


def start(model: Transformer, rows: int, limits: int) -> State:
    """The sources in the leading rows, the rest of them finished and empty."""
    eager, lengths = TorchBackend(model), np.array([len(source) for source in SOURCES])
    ids = np.array([source + (PAD,) * (lengths.max() - len(source)) for source in SOURCES])
    cache = KVCache(eager.cache_specs, Capacity(rows, limits + 1, int(lengths.max())))
    encoded = eager.encode(ids, lengths)
    for index, length in enumerate(lengths.tolist()):
        cache.admit(EncodedSource(encoded, index, length))
    finished = np.arange(rows) >= cache.active
    return {
        "input_ids": np.where(finished, PAD, BOS),
        "past_lengths": cache.lengths,
        "source_lengths": cache.source_lengths,
        "limits": np.where(finished, 0, limits),
        "past_finished": finished,
        "past_ids": np.zeros((rows, limits + 1), np.int64),
        **cache.buffers,
    }


def dimensions(model: Transformer) -> Dimensions:
    return Dimensions.of_model(model.config.to_dict())


def test_bound_onto_itself_it_translates_as_eager_does(tiny: Transformer, folder: Path, plan: Plan) -> None:
    state = start(tiny, len(SOURCES) + 3, plan.max_new_tokens)
    state["limits"][0] = 1
    loop, steps = BoundLoop(folder / LOOP_FILE, dimensions(tiny), state), 0
    while not state["past_finished"].all():
        loop()
        steps += 1
    rows = zip(state["past_ids"], state["past_lengths"], strict=True)
    got = [tuple(ids[:length].tolist()) for ids, length in rows]
    expected = translations(TorchBackend(tiny), SOURCES, plan)
    assert got == [expected[0][:1], *(expected[index] for index in range(1, len(SOURCES))), (), (), ()]
    assert steps == max(map(len, got))
    assert plan.eos in {ids[-1] for ids in got if ids}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_whose_logits_are_not_finite_is_finished_without_a_token_and_its_neighbours_go_on(
    tiny: Transformer, folder: Path, plan: Plan, value: float
) -> None:
    state = start(tiny, len(SOURCES), plan.max_new_tokens)
    state["past_key_values.1.encoder.value"][2] = value
    loop = BoundLoop(folder / LOOP_FILE, dimensions(tiny), state)
    loop()
    assert (state["past_finished"][2], state["past_lengths"][2]) == (True, 0)
    while not state["past_finished"].all():
        loop()
    got = [tuple(ids[:length].tolist()) for ids, length in zip(state["past_ids"], state["past_lengths"], strict=True)]
    expected = translations(TorchBackend(tiny), SOURCES, plan)
    assert got == [() if row == 2 else expected[row] for row in range(len(SOURCES))]


def test_a_row_may_end_at_the_last_position_and_wait_there(tiny: Transformer, folder: Path, plan: Plan) -> None:
    positions = tiny.config.target_positions
    state = start(tiny, len(SOURCES), positions)
    state["limits"][1:] = 2 * positions  # would go on, were it let
    loop = BoundLoop(folder / LOOP_FILE, dimensions(tiny), state)
    state["past_lengths"][0] = positions - 1
    loop()
    assert state["past_lengths"][0] == positions
    assert state["past_finished"][0]
    loop()
    assert state["past_lengths"][0] == positions
    assert state["input_ids"][0] == PAD


def test_onnxs_own_evaluator_reaches_the_same_state(tiny: Transformer, folder: Path, plan: Plan) -> None:
    if "GroupQueryAttention" in {node.op_type for node in onnx.load(folder / LOOP_FILE).graph.node}:
        pytest.skip("an operator of ONNX Runtime's own")
    state = start(tiny, len(SOURCES) + 1, plan.max_new_tokens)
    signature = step_signature(dimensions(tiny), LOOP_FEATURES)
    evaluator = ReferenceEvaluator(onnx.load(folder / LOOP_FILE))
    loop = BoundLoop(folder / LOOP_FILE, dimensions(tiny), state)
    for _ in range(4):
        outputs = evaluator.run(list(signature.presents), {name: array.copy() for name, array in state.items()})
        loop()
        for name, output in zip(signature.presents, outputs, strict=True):
            if not name.startswith("present."):
                np.testing.assert_array_equal(np.asarray(output), state[signature.presents[name]], err_msg=name)


def test_whatever_reads_an_input_comes_by_need_before_whatever_writes_over_it(tiny: Transformer, folder: Path) -> None:
    """In any legal order, that is: the writer needs what the other readers give, directly or not."""
    nodes = onnx.load(folder / LOOP_FILE).graph.node
    makers = {output: node for node in nodes for output in node.output}

    def needed(node: onnx.NodeProto) -> set[str]:
        found, waiting = set(), [node]
        while waiting:
            for name in waiting.pop().input:
                if name in makers and makers[name].output[0] not in found:
                    found.add(makers[name].output[0])
                    waiting.append(makers[name])
        return found

    for output, name in step_signature(dimensions(tiny), LOOP_FEATURES).presents.items():
        before = needed(makers[output])
        readers = [node for node in nodes if name in node.input and node is not makers[output]]
        assert {node.output[0] for node in readers} <= before, (output, name)


def test_the_proof_passes_and_covers_rows_that_end(tiny: Transformer, folder: Path, plan: Plan) -> None:
    check = check_loop(Trial(tiny, ParityOptions(), 1e-4), TorchBackend(tiny), folder, plan)
    assert check.passed, check.detail
    assert {"past_lengths", "past_finished", "past_ids", "input_ids out of place"} <= check.differences.keys()


def test_the_proof_says_how_many_rows_ended_by_eos(tiny: Transformer, folder: Path, plan: Plan) -> None:
    check = check_loop(Trial(tiny, ParityOptions(), 1e-4), TorchBackend(tiny), folder, plan)
    found = re.search(r"; (\d+) rows ended by eos$", check.detail)
    assert found is not None
    assert int(found[1]) > 0


@pytest.mark.parametrize("name", ["eos", "pad"])
def test_the_proof_finds_other_special_ids_even_where_no_row_ends(
    tiny: Transformer, folder: Path, plan: Plan, name: str
) -> None:
    other = with_id(plan, name, tiny.config.target_vocab_size)  # what no row can give
    check = check_loop(Trial(tiny, ParityOptions(steps=1), 1e-4), TorchBackend(tiny), folder, other)
    assert not check.passed
    assert check.differences[f"{name} in the graph"] == np.inf


def test_fillers_of_the_proof_are_those_of_the_runtime_and_empty_ones(
    tiny: Transformer, folder: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[State] = []

    class Recorded(BoundLoop):
        def __init__(self, file: Path, dimensions: Dimensions, state: State) -> None:
            starts.append({name: array.copy() for name, array in state.items()})
            super().__init__(file, dimensions, state)

    monkeypatch.setattr("kvx.exporter.proof.loop.BoundLoop", Recorded)
    assert check_loop(Trial(tiny, ParityOptions(steps=2), 1e-4), TorchBackend(tiny), folder, plan).passed
    [state] = starts
    idle = LoopState.idle(Capacity(1, state["past_ids"].shape[1], 1), forced=0)
    for field in fields(idle):
        np.testing.assert_array_equal(state[field.name][[-2]], getattr(idle, field.name), err_msg=field.name)
    assert state["past_finished"].tolist() == [False] * 5 + [True] * 2
    assert state["source_lengths"][-1] == state["limits"][-1] == 0


@pytest.mark.parametrize("wrong", [{"eos": 3}, {"pad": 5}])
def test_the_proof_finds_other_special_ids(tiny: Transformer, folder: Path, plan: Plan, wrong: dict[str, int]) -> None:
    [(name, one)] = wrong.items()
    other = with_id(plan, name, one)
    assert not check_loop(Trial(tiny, ParityOptions(), 1e-4), TorchBackend(tiny), folder, other).passed


def test_a_bundle_declares_and_proves_its_loop(loop_bundle: Path) -> None:
    assert "decoder_loop" in Manifest.read(loop_bundle).graphs
    weights = onnx.load(loop_bundle / LOOP_FILE, load_external_data=False).graph.initializer
    places = {entry.value for tensor in weights for entry in tensor.external_data if entry.key == "location"}
    assert places == {"decoder_step.onnx.data"}
    report = verify(loop_bundle, NUMBERS / "model.pt", ParityOptions(steps=4))
    assert [check.passed for check in report.checks if check.name.startswith("the loop")] == [True]


def test_without_being_asked_for_there_is_no_loop(tiny_bundle: Path) -> None:
    assert "decoder_loop" not in Manifest.read(tiny_bundle).graphs
    assert not (tiny_bundle / LOOP_FILE).exists()


def test_what_never_comes_and_what_is_forced_are_in_the_graph(tiny: Transformer, plan: Plan, tmp_path: Path) -> None:
    """The ids that the model likes best never come; each row begins with tokens of its own."""
    every = translations(TorchBackend(tiny), SOURCES, replace(plan, eos=-1)).values()
    never, forced = tuple({token for ids in every for token in ids}), (3, 5)
    framing = Framing(prefix=(), suffix=(), start=BOS, eos=plan.eos, pad=PAD, forced=forced, never=never)
    graph = ForcedLoopGraph(tiny, framing, StepFeatures(forced=2).loop, StandardOperators())
    write_onnx(graph, tmp_path / LOOP_FILE)
    asked = replace(plan, start=(BOS, *forced), never=never)
    check = check_loop(Trial(tiny, ParityOptions(), 1e-4), TorchBackend(tiny), tmp_path, asked)
    assert check.passed, check.detail
    for wrong in (replace(asked, never=()), replace(asked, never=tuple(range(60)))):
        assert not check_loop(Trial(tiny, ParityOptions(), 1e-4), TorchBackend(tiny), tmp_path, wrong).passed
