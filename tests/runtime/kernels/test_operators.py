"""kvx's own operators against numpy, one by one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvx.runtime import kernels
from kvx.runtime.backends.ort import ort

onnx = pytest.importorskip("onnx")
quantize = pytest.importorskip("kvx.exporter.precision.quantize", exc_type=ImportError)
if kernels.library() is None:
    pytest.skip("kvx was installed without its own operators", allow_module_level=True)

Array = NDArray[Any]
FLOATS = np.float32
FLOAT = onnx.TensorProto.FLOAT


def session(
    operator: str, inputs: Mapping[str, Array | None], outputs: int, threads: int, **attributes: int
) -> ort.InferenceSession:
    """A model of one operator with these inputs."""
    given = {name: array for name, array in inputs.items() if array is not None}
    node = onnx.helper.make_node(
        operator,
        [name if name in given else "" for name in inputs],
        [f"out{number}" for number in range(outputs)],
        domain="kvx",
        **attributes,
    )
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
        for name, array in given.items()
    ]
    kinds = [onnx.TensorProto.INT8 if operator.startswith("Coded") and number else FLOAT for number in range(outputs)]
    results = [
        onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in zip(node.output, kinds, strict=True)
    ]
    graph = onnx.helper.make_graph([node], "one", values, results)
    versions = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("kvx", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(str(kernels.library()))
    model = onnx.helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(
    operator: str, inputs: Mapping[str, Array | None], *, outputs: int = 1, threads: int = 1, **attributes: int
) -> list[Array]:
    """What one operator gives."""
    feeds = {name: array for name, array in inputs.items() if array is not None}
    found: list[Array] = session(operator, inputs, outputs, threads, **attributes).run(None, feeds)
    return found


def attended(query: Array, key: Array, value: Array, count: int, bias: Array | float = 0.0) -> Array:
    """query [H, D], key and value [H, T, D] of which `count` positions are read, a bias [H, T] → [H, D], in float64."""
    query, key, value = (array.astype(np.float64) for array in (query, key[:, :count], value[:, :count]))
    scores = np.einsum("hd,htd->ht", query, key) / np.sqrt(query.shape[1])
    scores += bias[:, :count] if isinstance(bias, np.ndarray) else bias
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    result: Array = np.einsum("ht,htd->hd", weights / weights.sum(axis=1, keepdims=True), value)
    return result


class TestSelfAttention:
    """One token of each row over its cache."""

    @staticmethod
    def inputs(rows: int, heads: int, width: int, capacity: int, bias: str = "none") -> dict[str, Array | None]:
        """Rows at positions of their own; what lies beyond them is not a number."""
        random = np.random.default_rng([rows, heads, width, capacity])
        lengths = random.integers(0, capacity, rows)
        lengths[0] = capacity - 1
        key, value = (random.standard_normal((rows, heads, capacity, width)).astype(FLOATS) for _ in range(2))
        for row, length in enumerate(lengths):
            key[row, :, length:] = value[row, :, length:] = np.nan
        sizes = {"none": None, "shared": (1, heads, 1, capacity), "own": (rows, heads, 1, capacity)}[bias]
        return {
            "packed": random.standard_normal((rows, 3 * heads * width)).astype(FLOATS),
            "key": key,
            "value": value,
            "lengths": lengths,
            "bias": None if sizes is None else random.standard_normal(sizes).astype(FLOATS),
        }

    @pytest.mark.parametrize("bias", ["none", "shared", "own"])
    @pytest.mark.parametrize(("heads", "width"), [(1, 8), (3, 24), (2, 64), (2, 72), (1, 128)])
    @pytest.mark.parametrize("capacity", [1, 7, 8, 33, 1100])
    def test_it_attends_and_writes_one_position(self, heads: int, width: int, capacity: int, bias: str) -> None:
        rows = 3
        given = self.inputs(rows, heads, width, capacity, bias)
        packed, key, value, lengths = (given[name] for name in ("packed", "key", "value", "lengths"))
        assert packed is not None
        assert key is not None
        assert value is not None
        assert lengths is not None
        result, new_key, new_value = run("SelfAttention", given, outputs=3, num_heads=heads)
        query, own_key, own_value = packed.reshape(rows, 3, heads, width).transpose(1, 0, 2, 3)
        for row, length in enumerate(lengths.tolist()):
            key[row, :, length], value[row, :, length] = own_key[row], own_value[row]
            beside = given["bias"]
            added = 0.0 if beside is None else beside[row % len(beside), :, 0]
            expected = attended(query[row], key[row], value[row], length + 1, added)
            np.testing.assert_allclose(result[row].reshape(heads, width), expected, rtol=2e-5, atol=2e-6)
        np.testing.assert_array_equal(new_key, key)
        np.testing.assert_array_equal(new_value, value)

    def test_a_row_is_the_same_alone_and_among_others_whatever_the_threads(self) -> None:
        given = self.inputs(40, 8, 64, 90)
        one, two = (run("SelfAttention", given, outputs=3, threads=threads, num_heads=8)[0] for threads in (1, 2))
        np.testing.assert_array_equal(one, two)
        for row in range(40):
            alone = {name: None if array is None else array[[row]] for name, array in given.items()}
            np.testing.assert_array_equal(run("SelfAttention", alone, outputs=3, num_heads=8)[0][0], one[row])

    @pytest.mark.parametrize("length", [-1, 5, 2**63 - 1])
    def test_a_length_beyond_the_cache_is_refused(self, length: int) -> None:
        given = self.inputs(1, 1, 8, 5) | {"lengths": np.array([length])}
        with pytest.raises(Exception, match="a length beyond the cache"):
            run("SelfAttention", given, outputs=3, num_heads=1)

    @pytest.mark.parametrize(
        ("name", "array", "why"),
        [
            ("packed", np.zeros((1, 25), FLOATS), "of different sizes"),
            ("lengths", np.zeros(2, np.int64), "of different sizes"),
            ("key", np.zeros((1, 1, 5, 12), FLOATS), "a multiple of 8"),
            ("key", np.zeros((1, 1, 5, 0), FLOATS), "a multiple of 8"),
            ("bias", np.zeros((1, 1, 1, 4), FLOATS), r"the bias is not \[B or 1, H, 1, T\]"),
        ],
    )
    def test_sizes_that_do_not_fit_are_refused(self, name: str, array: Array, why: str) -> None:
        with pytest.raises(Exception, match=why):
            run("SelfAttention", self.inputs(1, 1, 8, 5) | {name: array}, outputs=3, num_heads=1)


class TestCodedSelfAttention:
    """The same where keys and values are codes of 8 bits with their step behind them."""

    @staticmethod
    def codes(array: Array) -> Array:
        """[..., D] → [..., D + 4]."""
        steps = (np.abs(array).max(axis=-1, keepdims=True) / FLOATS(127)).astype(FLOATS)
        return np.concatenate([np.rint(array / steps).astype(np.int8), steps.view(np.int8)], axis=-1)

    @staticmethod
    def numbers(codes: Array) -> Array:
        """[..., D + 4] → [..., D]."""
        return codes[..., :-4] * np.ascontiguousarray(codes[..., -4:]).view(FLOATS)

    @classmethod
    def inputs(cls, rows: int, heads: int, width: int, capacity: int, bias: str = "none") -> dict[str, Array | None]:
        given = TestSelfAttention.inputs(rows, heads, width, capacity, bias)
        for name in ("key", "value"):
            array = given[name]
            assert array is not None
            given[name] = cls.codes(np.nan_to_num(array, nan=1e30))
        return given

    @pytest.mark.parametrize("bias", ["none", "shared", "own"])
    @pytest.mark.parametrize(("heads", "width"), [(1, 8), (3, 24), (2, 64), (2, 72), (1, 128)])
    @pytest.mark.parametrize("capacity", [1, 7, 8, 33, 1100])
    def test_it_attends_and_writes_one_position(self, heads: int, width: int, capacity: int, bias: str) -> None:
        rows = 3
        given = self.inputs(rows, heads, width, capacity, bias)
        packed, key, value, lengths = (given[name] for name in ("packed", "key", "value", "lengths"))
        assert packed is not None
        assert key is not None
        assert value is not None
        assert lengths is not None
        result, new_key, new_value = run("CodedSelfAttention", given, outputs=3, num_heads=heads)
        query, own_key, own_value = packed.reshape(rows, 3, heads, width).transpose(1, 0, 2, 3)
        for row, length in enumerate(lengths.tolist()):
            for own, new in ((own_key, new_key), (own_value, new_value)):
                step = np.abs(own[row]).max(axis=-1, keepdims=True) / 127
                assert (np.abs(self.numbers(new[row, :, length]) - own[row]) <= 0.501 * step).all()
            beside = given["bias"]
            added = 0.0 if beside is None else beside[row % len(beside), :, 0]
            held = self.numbers(new_key[row]), self.numbers(new_value[row])
            expected = attended(query[row], *held, length + 1, added)
            np.testing.assert_allclose(result[row].reshape(heads, width), expected, rtol=2e-5, atol=2e-6)
            for old, new in ((key, new_key), (value, new_value)):
                others = np.arange(capacity) != length
                np.testing.assert_array_equal(new[row][:, others], old[row][:, others])

    def test_a_row_is_the_same_alone_and_among_others_whatever_the_threads(self) -> None:
        given = self.inputs(40, 8, 64, 90)
        one, two = (run("CodedSelfAttention", given, outputs=3, threads=threads, num_heads=8)[0] for threads in (1, 2))
        np.testing.assert_array_equal(one, two)
        for row in range(40):
            alone = {name: None if array is None else array[[row]] for name, array in given.items()}
            np.testing.assert_array_equal(run("CodedSelfAttention", alone, outputs=3, num_heads=8)[0][0], one[row])

    def test_a_key_of_zeros_stays_one(self) -> None:
        given = self.inputs(1, 1, 8, 1) | {"packed": np.zeros((1, 24), FLOATS)}
        result, key, _ = run("CodedSelfAttention", given, outputs=3, num_heads=1)
        np.testing.assert_array_equal(self.numbers(key), np.zeros((1, 1, 1, 8)))
        np.testing.assert_array_equal(result, np.zeros((1, 8)))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_does_not_get_lost(self, bad: float) -> None:
        given = self.inputs(1, 1, 8, 3)
        assert given["packed"] is not None
        given["packed"][0, 8 + 3] = bad  # of the key
        assert not np.isfinite(run("CodedSelfAttention", given, outputs=3, num_heads=1)[0]).all()

    @pytest.mark.parametrize(
        ("name", "array", "why"),
        [
            ("lengths", np.zeros(2, np.int64), "of different sizes"),
            ("key", np.zeros((1, 1, 5, 8), np.int8), "a multiple of 8"),
            ("key", np.zeros((1, 1, 5, 4), np.int8), "a multiple of 8"),
            ("lengths", np.array([5]), "a length beyond the cache"),
        ],
    )
    def test_sizes_that_do_not_fit_are_refused(self, name: str, array: Array, why: str) -> None:
        with pytest.raises(Exception, match=why):
            run("CodedSelfAttention", self.inputs(1, 1, 8, 5) | {name: array}, outputs=3, num_heads=1)


class TestSourceAttention:
    """Rows of a sentence over its source."""

    @pytest.mark.parametrize("rows_a_sentence", [1, 4])
    @pytest.mark.parametrize("width", [8, 40, 64])
    def test_the_rows_of_a_sentence_share_its_source(self, rows_a_sentence: int, width: int) -> None:
        random, heads, lengths = np.random.default_rng(width), 2, np.array([13, 0, 1, 20])
        rows = len(lengths) * rows_a_sentence
        query = random.standard_normal((rows, heads * width)).astype(FLOATS)
        key, value = (random.standard_normal((len(lengths), heads, 20, width)).astype(FLOATS) for _ in range(2))
        given = {"query": query, "key": key, "value": value, "lengths": lengths}
        [result] = run("SourceAttention", given, num_heads=heads)
        for row in range(rows):
            sentence = row // rows_a_sentence
            count = int(lengths[sentence])
            own = query[row].reshape(heads, width)
            expected = attended(own, key[sentence], value[sentence], count) if count else np.zeros_like(own)
            np.testing.assert_allclose(result[row].reshape(heads, width), expected, rtol=2e-5, atol=2e-6)

    def test_rows_that_are_not_shared_out_evenly_are_refused(self) -> None:
        source = np.zeros((2, 1, 4, 8), FLOATS)
        given = {"query": np.zeros((3, 8), FLOATS), "key": source, "value": source, "lengths": np.array([1, 1])}
        with pytest.raises(Exception, match="of different sizes"):
            run("SourceAttention", given, num_heads=1)


class TestBytesProduct:
    """Rows in 8 bits times weights in 7 bits, in whole numbers."""

    @staticmethod
    def weights(outputs: int, inputs: int) -> tuple[Array, dict[str, Array | None]]:
        """Codes [N, K], and the operator's inputs for them."""
        random = np.random.default_rng([outputs, inputs])
        codes = random.integers(-63, 64, (outputs, inputs)).astype(np.int8)
        filled = np.zeros((outputs + -outputs % 16, inputs + -inputs % 4), np.int8)
        filled[:outputs, :inputs] = codes
        packed = filled.reshape(-1, 16, filled.shape[1] // 4, 4).transpose(0, 2, 1, 3)
        scales = (random.random(outputs) + 0.5).astype(FLOATS) / 64
        sums = codes.sum(axis=1, dtype=np.int32)
        return codes, {"weights": np.ascontiguousarray(packed), "sums": sums, "scales": scales}

    @staticmethod
    def expected(x: Array, codes: Array, scales: Array, *, positive: bool, step: float | None = None) -> Array:
        """The same in numpy: products of whole numbers, exact."""
        levels, low = (255, 0) if positive else (127, -127)
        peak = np.abs(x).max(axis=1, keepdims=True)
        steps = np.where(peak > 0, peak, 1).astype(FLOATS) / FLOATS(levels) if step is None else FLOATS(step)
        rounded = np.rint(x * (FLOATS(1) / steps)).clip(low, levels).astype(np.int64)
        result: Array = (rounded @ codes.T.astype(np.int64)).astype(FLOATS) * (scales * steps)
        return result

    @pytest.mark.parametrize("positive", [False, True])
    @pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 64])
    @pytest.mark.parametrize(("outputs", "inputs"), [(16, 4), (1, 1), (17, 9), (40, 64), (130, 250)])
    def test_products_are_exact(self, rows: int, outputs: int, inputs: int, positive: bool) -> None:
        x = np.random.default_rng(rows).standard_normal((rows, inputs)).astype(FLOATS)
        x = np.abs(x) if positive else x
        x[0] = 0
        codes, stored = self.weights(outputs, inputs)
        scales = stored["scales"]
        assert scales is not None
        [result] = run("BytesProduct", {"x": x} | stored, outputs=1, positive_in=int(positive), **{"width": outputs})
        expected = self.expected(x, codes, scales, positive=positive)
        np.testing.assert_allclose(result, expected, rtol=1e-6, atol=0)

    def test_a_bias_a_relu_a_residual_and_a_step_are_part_of_it(self) -> None:
        random = np.random.default_rng(0)
        x, codes, stored = random.standard_normal((5, 32)).astype(FLOATS), *self.weights(21, 32)
        bias, residual = (random.standard_normal(shape).astype(FLOATS) for shape in ((21,), (5, 21)))
        scales, step = stored["scales"], np.array(0.01, FLOATS)
        assert scales is not None
        given = {"x": x} | stored | {"bias": bias, "residual": residual, "step": step}
        [result] = run("BytesProduct", given, positive_out=1, width=21)
        product = self.expected(x, codes, scales, positive=False, step=0.01) + bias
        assert (np.abs(x) > 1.27).any()  # some are held at the largest code
        np.testing.assert_allclose(result, np.maximum(product, 0) + residual, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("shape", [(2, 3, 8), (0, 8)])
    def test_other_axes_stay_as_they_are(self, shape: tuple[int, ...]) -> None:
        _, stored = self.weights(5, 8)
        assert run("BytesProduct", {"x": np.ones(shape, FLOATS)} | stored, width=5)[0].shape == (*shape[:-1], 5)

    def test_a_row_is_the_same_alone_and_among_others_whatever_the_threads(self) -> None:
        x = np.random.default_rng(1).standard_normal((37, 256)).astype(FLOATS)
        _, stored = self.weights(300, 256)
        one, two = (run("BytesProduct", {"x": x} | stored, threads=threads, width=300)[0] for threads in (1, 2))
        np.testing.assert_array_equal(one, two)
        for row in range(37):
            np.testing.assert_array_equal(run("BytesProduct", {"x": x[[row]]} | stored, width=300)[0][0], one[row])

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("step", [None, np.array(0.1, FLOATS)])
    def test_what_is_not_finite_spoils_its_row_and_no_other(self, bad: float, step: Array | None) -> None:
        x = np.ones((3, 20), FLOATS)
        x[1, 19] = bad
        _, stored = self.weights(18, 20)
        [result] = run("BytesProduct", {"x": x} | stored | {"bias": None, "residual": None, "step": step}, width=18)
        assert np.isnan(result[1]).all()
        assert np.isfinite(result[[0, 2]]).all()

    @pytest.mark.parametrize(
        ("name", "array", "why"),
        [
            ("x", np.zeros((1, 9), FLOATS), "the weights are not"),
            ("scales", np.zeros(4, FLOATS), r"are not \[N\]"),
            ("residual", np.zeros((2, 5), FLOATS), "the residual is not"),
        ],
    )
    def test_sizes_that_do_not_fit_are_refused(self, name: str, array: Array, why: str) -> None:
        given = {"x": np.zeros((1, 8), FLOATS)} | self.weights(5, 8)[1] | {"bias": None, "residual": None}
        with pytest.raises(Exception, match=why):
            run("BytesProduct", given | {name: array}, width=5)

    def test_a_lookup_gives_rows_of_the_same_table(self) -> None:
        codes, stored = self.weights(37, 30)
        scales = stored["scales"]
        assert scales is not None
        ids = np.array([[0, 36, 16], [5, 15, 0]])
        given = {"ids": ids, "weights": stored["weights"], "scales": scales}
        [result] = run("BytesLookup", given, width=30)
        np.testing.assert_array_equal(result, codes[ids] * scales[ids][..., None])

    @pytest.mark.parametrize("unknown", [-1, 37])
    def test_an_id_beyond_the_table_is_refused(self, unknown: int) -> None:
        _, stored = self.weights(37, 30)
        given = {"ids": np.array([unknown]), "weights": stored["weights"], "scales": stored["scales"]}
        with pytest.raises(Exception, match="an id is not of the vocabulary"):
            run("BytesLookup", given, width=30)


class TestNibblesProduct:
    """Blocks of rows in 8 bits times blocks of weights in 4 bits."""

    @staticmethod
    def weights(outputs: int, inputs: int) -> tuple[Array, dict[str, Array | None]]:
        """A matrix [N, K], and the operator's inputs for it."""
        matrix = np.random.default_rng([outputs, inputs]).standard_normal((outputs, inputs)).astype(FLOATS)
        packed = quantize.blocks(matrix, 4)
        both = np.stack([packed.codes & 15, packed.codes >> 4], axis=-1).reshape(outputs, -1, quantize.BLOCK)
        restored = (both.astype(FLOATS) - 8) * packed.scales[..., None]
        codes, scales = quantize.nibble_panels(matrix)
        return restored.reshape(outputs, -1)[:, :inputs], {"weights": codes, "scales": scales}

    @staticmethod
    def expected(x: Array, matrix: Array) -> Array:
        """The same in numpy, in float64."""
        rows, inputs = x.shape
        blocks = np.pad(x, ((0, 0), (0, -inputs % quantize.BLOCK))).reshape(rows, -1, quantize.BLOCK)
        peak = np.abs(blocks).max(axis=2, keepdims=True)
        steps = np.where(peak > 0, peak, 1).astype(FLOATS) / FLOATS(127)
        rounded = np.rint(blocks * (FLOATS(1) / steps)).astype(np.float64) * steps
        result: Array = rounded.reshape(rows, -1)[:, :inputs] @ matrix.astype(np.float64).T
        return result

    @pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 33])
    @pytest.mark.parametrize(("outputs", "inputs"), [(16, 128), (1, 1), (17, 130), (40, 512), (33, 384)])
    def test_products_are_those_of_numpy(self, rows: int, outputs: int, inputs: int) -> None:
        x = np.random.default_rng(rows).standard_normal((rows, inputs)).astype(FLOATS)
        x[0, : inputs // 2] = 0
        matrix, stored = self.weights(outputs, inputs)
        [result] = run("NibblesProduct", {"x": x} | stored, width=outputs)
        np.testing.assert_allclose(result, self.expected(x, matrix), rtol=1e-4, atol=1e-4)

    def test_the_largest_codes_do_not_overflow(self) -> None:
        x = np.full((4, 256), 127, FLOATS)
        weights, scales = np.full((1, 2, 16, 16, 4), 255, np.uint8), np.ones((1, 2, 16), FLOATS)
        [result] = run("NibblesProduct", {"x": x, "weights": weights, "scales": scales}, width=16)
        np.testing.assert_allclose(result, 256 * 127 * 7, rtol=1e-6)

    def test_a_bias_a_relu_and_a_residual_are_part_of_it(self) -> None:
        random = np.random.default_rng(0)
        x, (matrix, stored) = random.standard_normal((5, 200)).astype(FLOATS), self.weights(21, 200)
        bias, residual = (random.standard_normal(shape).astype(FLOATS) for shape in ((21,), (5, 21)))
        given = {"x": x} | stored | {"bias": bias, "residual": residual}
        [result] = run("NibblesProduct", given, positive_out=1, width=21)
        np.testing.assert_allclose(result, np.maximum(self.expected(x, matrix) + bias, 0) + residual, atol=1e-4)

    def test_a_row_is_the_same_alone_and_among_others_whatever_the_threads(self) -> None:
        x = np.random.default_rng(1).standard_normal((37, 256)).astype(FLOATS)
        x[3, 7] = np.nan
        _, stored = self.weights(300, 256)
        one, two = (run("NibblesProduct", {"x": x} | stored, threads=threads, width=300)[0] for threads in (1, 2))
        np.testing.assert_array_equal(one, two)
        assert np.isnan(one).any(axis=1).tolist() == [row == 3 for row in range(37)]
        for row in range(37):
            np.testing.assert_array_equal(run("NibblesProduct", {"x": x[[row]]} | stored, width=300)[0][0], one[row])

    def test_a_lookup_gives_rows_of_the_same_table(self) -> None:
        matrix, stored = self.weights(37, 300)
        ids: Array = np.array([[0, 36, 16], [5, 15, 0]])
        [result] = run("NibblesLookup", {"ids": ids} | stored, rows=37, width=300)
        np.testing.assert_array_equal(result, matrix[ids])

    def test_an_id_beyond_the_table_is_refused(self) -> None:
        with pytest.raises(Exception, match="an id is not of the vocabulary"):
            run("NibblesLookup", {"ids": np.array([37])} | self.weights(37, 300)[1], rows=37, width=300)

    def test_tables_that_only_claim_their_size_are_refused(self) -> None:
        empty: dict[str, Array | None]
        empty = {"ids": np.array([5]), "weights": np.zeros((2**40, 128, 0, 0, 0), np.uint8)}
        empty["scales"] = np.zeros(0, FLOATS)
        with pytest.raises(Exception, match="the weights are not"):
            run("NibblesLookup", empty, rows=2**44, width=128 * 128)

    def test_sizes_that_do_not_fit_are_refused(self) -> None:
        _, stored = self.weights(37, 300)
        with pytest.raises(Exception, match="the weights are not"):
            run("NibblesProduct", {"x": np.zeros((1, 100), FLOATS)} | stored, width=37)


def test_plain_c_passes_the_same_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels.instructions() == kernels.PLAIN:
        pytest.skip("these are plain C")
    monkeypatch.setenv(kernels.SWITCH, kernels.PLAIN)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
