"""Checkpoint files: the reference model's state dict and kvx's own, and everything that is neither."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

from kvx import CheckpointError
from kvx.models.config import ModelConfig
from kvx.models.importers import Checkpoint, load_checkpoint, save_checkpoint
from kvx.models.importers.checkpoint import NAMED_PROBLEMS
from kvx.models.importers.own import KVX_FORMAT
from kvx.models.importers.reference import reference_name
from kvx.models.transformer import Transformer

if TYPE_CHECKING:
    from kvx.tests.conftest import Seed

HEAD, BETA = "lm_head.weight", "transformer.encoder.norm.beta"
StateDict = dict[str, Tensor]


def reference_state(model: Transformer) -> StateDict:
    """The state dict that the original code would have saved for this model."""
    return {
        reference_name(name): (tensor[None] if name.endswith(".positions") else tensor).clone()
        for name, tensor in model.state_dict().items()
    }


def model_of(**sizes: int) -> Transformer:
    defaults = {"d_model": 128, "heads": 2, "d_ff": 8, "encoder_layers": 2, "decoder_layers": 1}
    tables = dict.fromkeys(("source_vocab_size", "target_vocab_size", "source_positions", "target_positions"), 5)
    return Transformer(ModelConfig.from_dict({**defaults, **tables, **sizes}))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.pt"


@pytest.fixture
def state(tiny: Transformer) -> StateDict:
    return reference_state(tiny)


@pytest.fixture
def own(tiny: Transformer) -> dict[str, object]:
    """The content of a file in kvx's own format."""
    parts = {"config": tiny.config.to_dict(), "max_new_tokens": 18, "state_dict": tiny.state_dict()}
    return {"format": KVX_FORMAT, **parts}


def refusal(path: Path, *, heads: int | None = 2) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, heads=heads)
    assert caught.value.expected
    assert caught.value.remedy
    return caught.value


def assert_same_weights(got: Transformer, expected: Transformer) -> None:
    assert got.config == expected.config
    assert got.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name


def test_the_seed_is_read_whole_and_the_head_count_is_said_to_be_assumed(seed: Seed) -> None:
    checkpoint = load_checkpoint(seed.checkpoint)
    assert checkpoint.model.config == ModelConfig(
        source_vocab_size=6000,
        target_vocab_size=6000,
        d_model=256,
        encoder_heads=4,
        decoder_heads=4,
        encoder_d_ff=1024,
        decoder_d_ff=1024,
        encoder_layers=3,
        decoder_layers=3,
        source_positions=512,
        target_positions=512,
    )
    assert checkpoint.max_new_tokens == 59
    (note,) = checkpoint.notes
    assert "4 heads of 64" in note
    assert "`heads`" in note
    original = torch.load(seed.checkpoint, weights_only=True)
    read = checkpoint.model.state_dict()
    assert {reference_name(name) for name in read} == original.keys()
    for name, tensor in read.items():
        assert torch.equal(tensor, original[reference_name(name)].reshape(tensor.shape)), name


def test_heads_override_the_assumption(seed: Seed) -> None:
    checkpoint = load_checkpoint(seed.checkpoint, heads=8)
    assert checkpoint.model.config.decoder_heads == 8
    assert not checkpoint.notes


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_state_dict_tells_every_size_but_the_heads(path: Path, bias: bool, zipped: bool) -> None:
    model = model_of(encoder_layers=3, source_vocab_size=7, target_positions=4, attention_bias=bias)
    torch.save(reference_state(model), path, _use_new_zipfile_serialization=zipped)
    checkpoint = load_checkpoint(path)
    assert_same_weights(checkpoint.model, model)
    assert not checkpoint.model.training


def test_the_token_limit_of_a_state_dict_never_exceeds_its_positions(path: Path) -> None:
    torch.save(reference_state(model_of(target_positions=4)), path)
    assert load_checkpoint(path).max_new_tokens == 4


def test_a_width_that_is_no_multiple_of_64_needs_heads(path: Path, state: StateDict) -> None:
    torch.save(state, path)
    assert "`heads`" in refusal(path, heads=None).remedy
    assert load_checkpoint(path, heads=8).model.config.decoder_heads == 8


@pytest.mark.parametrize("heads", [0, -1, 3, 32])
def test_heads_that_do_not_divide_the_width_are_refused(path: Path, state: StateDict, heads: int) -> None:
    torch.save(state, path)
    error = refusal(path, heads=heads)
    assert f"{heads} heads" in error.got or f"heads = {heads}" in error.got
    assert "`heads`" in error.remedy


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_other_float_types_become_float32(path: Path, state: StateDict, dtype: torch.dtype) -> None:
    torch.save({name: tensor.to(dtype) for name, tensor in state.items()}, path)
    model = load_checkpoint(path, heads=2).model
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.head.weight, state[HEAD].to(dtype).float())


def test_kvxs_own_file_round_trips(path: Path, tiny: Transformer) -> None:
    save_checkpoint(Checkpoint(tiny, max_new_tokens=7, notes=("gone",)), path)
    checkpoint = load_checkpoint(path)
    assert_same_weights(checkpoint.model, tiny)
    assert (checkpoint.max_new_tokens, checkpoint.notes) == (7, ())


def test_kvxs_own_file_knows_its_head_count(path: Path, tiny: Transformer) -> None:
    save_checkpoint(Checkpoint(tiny, max_new_tokens=7), path)
    assert load_checkpoint(path, heads=4).model.config.decoder_heads == tiny.config.decoder_heads == 2


def test_a_missing_file_is_not_there(path: Path) -> None:
    assert f"{path} is not there" in refusal(path).got


def test_a_folder_without_a_configuration_is_no_checkpoint(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(tmp_path).got


@pytest.mark.parametrize("zipped", [False, True])
def test_a_file_cut_anywhere_is_refused(path: Path, state: StateDict, zipped: bool) -> None:
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    whole = file.getvalue()
    for cut in (1, 2, 9, 40, 200, 1000, 4000, len(whole) // 3, len(whole) * 9 // 10, len(whole) - 1):
        path.write_bytes(whole[:cut])
        error = refusal(path)
        # A bare pickle may be cut within the name of a class, which is then a class that nobody knows.
        assert "damaged" in error.got or not zipped, cut


@pytest.mark.parametrize(
    "bad",
    [b"\x80\x02.", b"\x80\x02]a.", b"\x80\x02}(s.", b"\x80\x02K", b"\x80\x02Q.", b"PK\x03\x04"],
    ids=["nothing", "append to nothing", "odd items", "no byte", "no storage", "zip magic"],
)
def test_a_garbled_pickle_is_said_to_be_damaged(path: Path, bad: bytes) -> None:
    path.write_bytes(bad)
    assert "damaged" in refusal(path).got


@pytest.mark.parametrize(
    "content",
    [b"", b"hello world\n", b'{"d_model": 64}', b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n"],
    ids=["empty", "text", "json", "git-lfs pointer"],
)
def test_a_file_of_another_kind_is_not_said_to_carry_code(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    error = refusal(path)
    assert "no PyTorch file" in error.got
    assert "code" not in error.got


class Command:
    """Unpickles into a call of os.system that leaves a marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


def save_zipped(content: object, path: Path) -> None:
    torch.save(content, path)


def save_unzipped(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_pickled(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("save", [save_zipped, save_unzipped, save_pickled])
def test_code_in_a_file_is_refused_by_name_and_never_runs(
    path: Path, tmp_path: Path, save: Callable[[object, Path], None]
) -> None:
    marker = tmp_path / "marker"
    save({"weights": Command(marker)}, path)
    error = refusal(path)
    assert not marker.exists()
    assert "carries code" in error.got
    assert "system" in error.got
    assert "state_dict()" in error.remedy
    with contextlib.suppress(RuntimeError):  # a bare pickle is no PyTorch file, which torch notices too late
        torch.load(path, weights_only=False)
    assert marker.exists()  # so there was something to refuse


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_pickle_of_any_protocol_never_runs(path: Path, tmp_path: Path, protocol: int) -> None:
    path.write_bytes(pickle.dumps(Command(tmp_path / "marker"), protocol))
    refusal(path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("content", [types.SimpleNamespace(lr=1), {"weight": np.ones(2)}], ids=["namespace", "numpy"])
def test_objects_other_than_tensors_are_refused_by_their_class(path: Path, content: object) -> None:
    torch.save(content, path)
    error = refusal(path)
    assert "carries code" in error.got
    assert "Namespace" in error.got or "numpy" in error.got


def test_a_whole_pickled_model_is_refused(path: Path, tiny: Transformer) -> None:
    torch.save(tiny, path)
    error = refusal(path)
    assert "Transformer" in error.got
    assert "model.state_dict()" in error.remedy


@pytest.mark.parametrize(
    ("content", "described"), [([1, 2], "a list"), (None, "a NoneType"), (torch.ones(3), "float32 [3]"), ({}, "a dict")]
)
def test_anything_but_a_dict_of_tensors_is_described(path: Path, content: object, described: str) -> None:
    torch.save(content, path)
    assert f"holds {described}" in refusal(path).got


def test_a_training_checkpoint_is_described_by_its_keys(path: Path, state: StateDict) -> None:
    torch.save({"weights": state, "optimizer": {"lr": 0.1}, "epoch": 3}, path)
    error = refusal(path)
    for key in ("weights", "optimizer", "epoch"):
        assert key in error.got
    assert "torch.save(model.state_dict(), file)" in error.remedy


def test_every_wrong_tensor_is_named(path: Path, state: StateDict) -> None:
    del state[BETA]
    state["transformer.decoder.norm.gamma"] = torch.ones(3)
    state["extra.weight"] = torch.ones(1)
    torch.save(state, path)
    error = refusal(path)
    assert "3 wrong tensors" in error.got
    for expected in (f"missing {BETA}", "unexpected extra.weight", "transformer.decoder.norm.gamma of float32 [3]"):
        assert expected in error.got
    assert "[16]" in error.got


@pytest.mark.parametrize("count", [1, NAMED_PROBLEMS, NAMED_PROBLEMS + 1, 200])
def test_ten_wrong_tensors_are_named_and_all_are_counted(path: Path, state: StateDict, count: int) -> None:
    torch.save(state | {f"extra.{number}.weight": torch.ones(1) for number in range(count)}, path)
    got = refusal(path).got
    assert f" {count} wrong tensor{'s' if count > 1 else ''}:" in got
    assert got.count("unexpected extra.") == min(count, NAMED_PROBLEMS)


@pytest.mark.parametrize(
    "name",
    [
        "transformer.src_embedding.embed.weight",
        "transformer.tgt_embedding.embed.weight",
        "transformer.enc_pos.pe",
        "transformer.dec_pos.pe",
        "transformer.encoder.layers.0.ff.ff1.weight",
    ],
)
@pytest.mark.parametrize("value", [None, torch.ones(3), torch.tensor(1.0)], ids=["missing", "one axis", "no axis"])
def test_tensors_that_tell_the_sizes_may_be_missing_or_flat(
    path: Path, state: StateDict, name: str, value: Tensor | None
) -> None:
    del state[name]
    torch.save(state if value is None else {**state, name: value}, path)
    if value is None and name.endswith(".pe"):
        [note] = load_checkpoint(path, heads=2).notes
        assert f"made {name} of sinusoids" in note
    else:
        assert name in refusal(path).got


def test_a_gap_in_the_layers_is_named(path: Path, state: StateDict) -> None:
    last = {name.replace("encoder.layers.0", "encoder.layers.2"): tensor for name, tensor in state.items()}
    torch.save(state | last, path)
    assert "missing transformer.encoder.layers.1." in refusal(path).got


def test_integer_weights_are_refused(path: Path, state: StateDict) -> None:
    torch.save({**state, HEAD: state[HEAD].long()}, path)
    assert f"{HEAD} of int64" in refusal(path).got


def with_value(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.double()
    changed[0, -1] = value
    return changed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_weights_that_are_not_finite_in_float32_are_refused(path: Path, state: StateDict, value: float) -> None:
    torch.save({**state, HEAD: with_value(state[HEAD], value)}, path)
    error = refusal(path)
    assert f"{HEAD} with values that are not finite" in error.got


@pytest.mark.parametrize(
    "convert",
    [
        lambda tensor: tensor.to_sparse(),
        lambda tensor: tensor.flatten(1).to_sparse_csr(),
        lambda tensor: tensor.to("meta"),
        lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        lambda tensor: torch.nested.nested_tensor(list(tensor)),
        lambda tensor: torch.nested.nested_tensor(list(tensor), layout=torch.jagged),
        lambda tensor: torch.zeros(tensor.shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    ],
    ids=["sparse", "CSR", "meta", "quantised", "nested", "jagged", "float4"],
)
@pytest.mark.parametrize("name", [HEAD, "transformer.src_embedding.embed.weight", "transformer.enc_pos.pe"])
@pytest.mark.filterwarnings("ignore")  # torch warns of half of these itself
def test_tensors_without_plain_values_are_refused_by_name(
    path: Path, state: StateDict, name: str, convert: Callable[[Tensor], Tensor]
) -> None:
    torch.save({**state, name: convert(state[name])}, path)
    assert name in refusal(path).got


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_a_layer_number_of_any_length_is_refused_in_a_short_sentence(path: Path, state: StateDict, side: str) -> None:
    torch.save({**state, f"transformer.{side}.layers.{'9' * 5000}.ff.ff1.bias": torch.ones(1)}, path)
    assert "missing transformer." in refusal(path).got
    assert len(refusal(path).got) < 5000


def test_a_name_of_any_length_is_shortened(path: Path, own: dict[str, object], tiny: Transformer) -> None:
    torch.save(own | {"state_dict": {**tiny.state_dict(), "x" * 5000: torch.ones(1)}}, path)
    assert "unexpected xxx" in refusal(path).got
    assert len(refusal(path).got) < 1000


@pytest.mark.parametrize("name", ["itself", "x" * 5000, "zero\0byte"], ids=["loop", "long", "zero byte"])
def test_a_path_that_leads_to_no_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "itself").symlink_to("itself")
    assert "cannot be opened" in refusal(tmp_path / name).got


def test_a_key_that_is_no_string_is_refused(path: Path, state: StateDict) -> None:
    torch.save(dict([(987654, torch.ones(1)), *state.items()]), path)
    assert "987654" in refusal(path).got


@pytest.mark.parametrize(
    "changes",
    [
        {"config": [1]},
        {"config": None},
        {"state_dict": [1]},
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"max_new_tokens": "18"},
    ],
)
def test_a_garbled_part_of_kvxs_own_file_is_refused(
    path: Path, own: dict[str, object], changes: dict[str, object]
) -> None:
    torch.save(own | changes, path)
    assert "configuration, weights or token limit" in refusal(path).got


@pytest.mark.parametrize(
    ("field", "value"),
    [("d_model", "16"), ("heads", 0), ("attention_bias", 2), ("dropout", 1)],
)
def test_a_garbled_field_of_kvxs_own_configuration_is_named(
    path: Path, own: dict[str, object], tiny: Transformer, field: str, value: object
) -> None:
    torch.save(own | {"config": {**tiny.config.to_dict(), field: value}}, path)
    assert field in refusal(path, heads=None).got


@pytest.mark.parametrize("size", [2**62, 2**70])
@pytest.mark.parametrize("field", ["source_vocab_size", "d_model", "d_ff", "source_positions"])
def test_sizes_that_no_machine_could_hold_are_refused(
    path: Path, own: dict[str, object], tiny: Transformer, field: str, size: int
) -> None:
    torch.save(own | {"config": {**tiny.config.to_dict(), field: size}}, path)
    refusal(path)


def test_kvxs_own_weights_must_fit_its_configuration(path: Path, own: dict[str, object], tiny: Transformer) -> None:
    torch.save(own | {"config": {**tiny.config.to_dict(), "d_ff": 25}}, path)
    assert "encoder_layers.0.feed_forward.up.weight of float32 [24, 16] instead of [25, 16]" in refusal(path).got


def test_kvxs_own_weights_must_be_tensors(path: Path, own: dict[str, object], tiny: Transformer) -> None:
    torch.save(own | {"state_dict": dict.fromkeys(tiny.state_dict(), "x")}, path)
    assert "source_embedding.tokens.weight of a str" in refusal(path).got
