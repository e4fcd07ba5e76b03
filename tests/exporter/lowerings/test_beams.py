"""Several rows a sentence over one copy of its source, against eager rows with a copy each.

Letters: B rows, G sentences, V target vocabulary.
"""

from __future__ import annotations

import collections
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from kvx import BundleError
from kvx.models.eager import TorchBackend
from kvx.models.transformer import Transformer
from kvx.runtime.arrays import FloatArray, IntArray
from kvx.runtime.backends.onnx import STEP_FILE, OnnxBackend
from kvx.runtime.bundle.manifest import BEAMS_FILE, Manifest
from kvx.runtime.bundle.signature import StepFeatures, step_signature
from kvx.runtime.decoding.backend import Backend
from kvx.runtime.decoding.cache import Capacity, EncodedSource, KVCache

pytestmark = pytest.mark.usefixtures("plain_graphs")

FLOAT32_NOISE = 2e-5
SOURCE_LENGTHS = np.array([6, 1, 4])
CAPACITY = 9
STEPS = 6


def open_bundle(folder: Path) -> OnnxBackend:
    manifest = Manifest.read(folder)
    return OnnxBackend(folder, manifest.dimensions, manifest.features, threads=1)


def cache_of(backend: Backend, input_ids: IntArray, beams: int, lengths: IntArray = SOURCE_LENGTHS) -> KVCache:
    """Sentences [G, S], a seat each."""
    specs = backend.beam_cache_specs
    cache = KVCache(specs, Capacity(len(input_ids) * beams, CAPACITY, input_ids.shape[1], beams))
    encoded = backend.encode(input_ids, lengths)
    for index, length in enumerate(lengths.tolist()):
        cache.admit(EncodedSource(encoded, index, length))
    return cache


def logits(backend: Backend, cache: KVCache, ids: IntArray) -> Iterator[FloatArray]:
    """ids [steps, B] → the logits [B, V] of each step; the second sentence begins anew after two of them."""
    step, beams = backend.bind(cache), cache.capacity.beams
    for number, given in enumerate(ids):
        yield step(given[: cache.active]).logits.copy()
        cache.advance()
        if number == 1:
            cache.lengths[beams : 2 * beams] = 0


@pytest.fixture
def input_ids(tiny: Transformer) -> IntArray:
    """Source ids [3, 6], random beyond the lengths too."""
    ids: IntArray = np.random.default_rng(0).integers(0, tiny.config.source_vocab_size, (3, 6))
    return ids


@pytest.fixture(params=["ort", "standard"])
def bundle(request: pytest.FixtureRequest, tiny_bundle: Path, standard_bundle: Path) -> Path:
    return tiny_bundle if request.param == "ort" else standard_bundle


@pytest.mark.parametrize("beams", [1, 2, 5])
def test_rows_that_share_a_source_give_the_logits_of_rows_with_their_own(
    tiny: Transformer, bundle: Path, input_ids: IntArray, beams: int
) -> None:
    backend, eager = open_bundle(bundle), TorchBackend(tiny)
    shared, copied = cache_of(backend, input_ids, beams), cache_of(eager, input_ids, beams)
    assert (shared.shared_sources, copied.shared_sources) == (True, False)
    ids = np.random.default_rng(1).integers(0, tiny.config.target_vocab_size, (STEPS, 3 * beams))
    for got, expected in zip(logits(backend, shared, ids), logits(eager, copied, ids), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=FLOAT32_NOISE)


@pytest.mark.parametrize(("sentences", "source"), [(1, 1), (1, 7), (5, 1), (5, 3)])
def test_sentences_and_source_positions_are_free(tiny: Transformer, bundle: Path, sentences: int, source: int) -> None:
    backend, eager, random = open_bundle(bundle), TorchBackend(tiny), np.random.default_rng(source)
    sources = random.integers(0, tiny.config.source_vocab_size, (sentences, source))
    ids = random.integers(0, tiny.config.target_vocab_size, 3 * sentences)
    got, expected = (
        one.bind(cache_of(one, sources, 3, np.full(sentences, source)))(ids).logits for one in (backend, eager)
    )
    np.testing.assert_allclose(got, expected, rtol=0, atol=FLOAT32_NOISE)


def test_a_step_costs_the_seats_in_use_and_follows_the_cache_as_it_grows(
    tiny: Transformer, bundle: Path, input_ids: IntArray
) -> None:
    backend, eager = open_bundle(bundle), TorchBackend(tiny)
    ids = np.random.default_rng(2).integers(0, tiny.config.target_vocab_size, (3, 6))
    found: list[list[FloatArray]] = []
    for one in (backend, eager):
        cache = cache_of(one, input_ids, 2)
        step = one.bind(cache)
        collected = [step(ids[0]).logits.copy()]
        cache.advance()
        cache.release(0)
        cache.follow(np.array([1, 1, 2, 2]))
        collected.append(step(ids[1, :4]).logits.copy())
        cache.advance()
        cache.resize(Capacity(10, CAPACITY + 3, 8, 2))
        collected.append(step(ids[2, :4]).logits.copy())
        found.append(collected)
    for got, expected in zip(found[0], found[1], strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=FLOAT32_NOISE)


def test_onnxs_own_evaluator_gives_the_rows_of_eager(
    tiny: Transformer, standard_bundle: Path, input_ids: IntArray
) -> None:
    dimensions, eager, beams = Manifest.read(standard_bundle).dimensions, TorchBackend(tiny), 2
    shared, copied = cache_of(open_bundle(standard_bundle), input_ids, beams), cache_of(eager, input_ids, beams)
    ids = np.random.default_rng(3).integers(0, tiny.config.target_vocab_size, 3 * beams)
    feeds = {"input_ids": ids, "past_lengths": shared.lengths, "source_lengths": shared.source_lengths}
    names = [spec.name for spec in step_signature(dimensions, StepFeatures().beams).outputs]
    evaluator = ReferenceEvaluator(onnx.load(standard_bundle / BEAMS_FILE))
    got, *_ = map(np.asarray, evaluator.run(names, {**feeds, **shared.buffers}))
    np.testing.assert_allclose(got, eager.bind(copied)(ids).logits, rtol=0, atol=FLOAT32_NOISE)


def test_only_the_attention_to_the_source_differs_from_the_steps(tiny: Transformer, tiny_bundle: Path) -> None:
    used, step = (
        collections.Counter(node.op_type for node in onnx.load(tiny_bundle / name).graph.node)
        for name in (BEAMS_FILE, STEP_FILE)
    )
    layers = tiny.config.decoder_layers
    assert used["Attention"] == used["GroupQueryAttention"] == layers
    assert used["Gemm"] == step["Gemm"]
    assert used["Transpose"] == 2 * layers


def test_what_serves_all_layers_is_there_once(bundle: Path) -> None:
    used = collections.Counter(node.op_type for node in onnx.load(bundle / BEAMS_FILE).graph.node)
    assert used["Concat"] == 1  # the shape of the queries by sentence
    assert used["Gather"] == 2  # the token's embedding and its position's
    assert used["Shape"] <= 2
    assert used["Cast"] <= 2


def test_a_cache_of_shared_sources_holds_each_source_once(bundle: Path, input_ids: IntArray) -> None:
    backend = open_bundle(bundle)
    cache = cache_of(backend, input_ids, 4)
    sources = [buffer for name, buffer in cache.buffers.items() if ".encoder." in name]
    assert {len(buffer) for buffer in sources} == {3}
    assert cache.source_lengths.tolist() == SOURCE_LENGTHS.tolist()


def test_without_the_graph_sources_are_copied_and_the_plain_step_runs(
    tiny: Transformer, tiny_bundle: Path, tmp_path: Path, input_ids: IntArray
) -> None:
    older = shutil.copytree(tiny_bundle, tmp_path / "older")
    (older / BEAMS_FILE).unlink()
    backend, eager = open_bundle(older), TorchBackend(tiny)
    assert backend.beam_cache_specs == backend.cache_specs
    ids = np.random.default_rng(4).integers(0, tiny.config.target_vocab_size, (STEPS, 6))
    caches = [cache_of(one, input_ids, 2) for one in (backend, eager)]
    for got, expected in zip(logits(backend, caches[0], ids), logits(eager, caches[1], ids), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=FLOAT32_NOISE)


def test_the_graph_is_loaded_once_and_only_where_sentences_share_their_rows(
    tiny_bundle: Path, input_ids: IntArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, session = [], onnxruntime.InferenceSession

    def noting(path: Path, *arguments: object, **named: object) -> onnxruntime.InferenceSession:
        loaded.append(path.name)
        return session(path, *arguments, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", noting)
    backend = open_bundle(tiny_bundle)
    assert BEAMS_FILE not in loaded
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: backend.bind(cache_of(backend, input_ids, 2)), range(8)))
    assert loaded.count(BEAMS_FILE) == 1


def test_another_graph_in_its_place_is_refused(tiny_bundle: Path, tmp_path: Path, input_ids: IntArray) -> None:
    other = shutil.copytree(tiny_bundle, tmp_path / "other")
    shutil.copyfile(other / STEP_FILE, other / BEAMS_FILE)
    backend = open_bundle(other)
    with pytest.raises(BundleError, match=r"decoder_beams\.onnx has the outputs"):
        backend.bind(cache_of(backend, input_ids, 2))
