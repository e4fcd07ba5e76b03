"""State dicts as training leaves them: wrapped, prefixed, with buffers, without what can be made, padded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

torch = pytest.importorskip("torch")

from kvx.models.importers import load_checkpoint  # noqa: E402
from kvx.models.importers.padding import cut_to_vocabularies  # noqa: E402
from kvx.models.importers.reference import reference_name  # noqa: E402
from kvx.runtime.errors import CheckpointError  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from kvx.models.transformer import Transformer

HEAD = "lm_head.weight"
StateDict = "dict[str, Tensor]"


@pytest.fixture
def state(tiny: Transformer) -> dict[str, Tensor]:
    return {reference_name(name): tensor.clone() for name, tensor in tiny.state_dict().items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.pt"


def assert_same_weights(model: Transformer, other: Transformer) -> None:
    expected, got = other.state_dict(), model.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["state_dict", "model_state_dict", "model"])
def test_the_weights_in_a_training_state_are_taken_and_that_is_said(
    path: Path, state: dict[str, Tensor], tiny: Transformer, name: str
) -> None:
    torch.save({name: state, "optimizer": {"state": {0: torch.ones(2)}, "lr": 0.1}, "epoch": 3}, path)
    checkpoint = load_checkpoint(path, heads=2)
    assert_same_weights(checkpoint.model, tiny)
    assert checkpoint.notes[0] == f"took the weights under {name!r}, beside epoch, optimizer"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_taken_off(
    path: Path, state: dict[str, Tensor], tiny: Transformer, prefix: str
) -> None:
    torch.save({f"{prefix}{name}": tensor for name, tensor in state.items()}, path)
    checkpoint = load_checkpoint(path, heads=2)
    assert_same_weights(checkpoint.model, tiny)
    assert checkpoint.notes == (f"took the names without the prefix {prefix}",)


def test_names_that_would_be_one_without_their_prefix_stay_two(path: Path, state: dict[str, Tensor]) -> None:
    torch.save({**state, f"module.{HEAD}": state[HEAD]}, path)
    with pytest.raises(CheckpointError, match=f"unexpected module.{HEAD}"):
        load_checkpoint(path, heads=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decoder.causal_mask", torch.ones(5, 5).tril()),
        ("decoder.mask", torch.ones(1, 1, 4, 4, dtype=torch.bool).triu(1)),
        ("decoder.tgt_mask", torch.full((4, 4), -torch.inf).triu(1)),
        ("encoder.position_ids", torch.arange(9)[None]),
    ],
)
def test_buffers_that_can_be_derived_are_left_out(
    path: Path, state: dict[str, Tensor], tiny: Transformer, name: str, value: Tensor
) -> None:
    torch.save({**state, name: value}, path)
    checkpoint = load_checkpoint(path, heads=2)
    assert_same_weights(checkpoint.model, tiny)
    assert checkpoint.notes == (f"left out {name}, which can be derived",)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decoder.mask", torch.rand(4, 4)),
        ("decoder.mask", torch.ones(4)),
        ("encoder.position_ids", torch.arange(9) + 1),
        ("decoder.gate", torch.ones(4, 4).tril()),
    ],
)
def test_what_only_has_the_name_of_one_is_not(path: Path, state: dict[str, Tensor], name: str, value: Tensor) -> None:
    torch.save({**state, name: value}, path)
    with pytest.raises(CheckpointError, match=f"unexpected {name}"):
        load_checkpoint(path, heads=2)


def test_a_head_that_is_missing_is_tied(path: Path, state: dict[str, Tensor]) -> None:
    del state[HEAD]
    torch.save(state, path)
    model = load_checkpoint(path, heads=2).model
    assert model.config.tied_head
    assert model.head.weight is model.target_embedding.tokens.weight


def test_tables_with_the_same_values_are_one(path: Path, state: dict[str, Tensor]) -> None:
    table = state[reference_name("target_embedding.tokens.weight")]
    torch.save({**state, HEAD: table.clone()}, path)
    assert load_checkpoint(path, heads=2).model.config.tied_head
    torch.save(state, path)
    assert not load_checkpoint(path, heads=2).model.config.tied_head


def test_positions_that_were_not_saved_are_sinusoids(path: Path, state: dict[str, Tensor], tiny: Transformer) -> None:
    for side in ("source", "target"):
        del state[reference_name(f"{side}_embedding.positions")]
    torch.save(state, path)
    model = load_checkpoint(path, heads=2).model
    made, expected = model.target_embedding.positions, tiny.target_embedding.positions
    assert made is not None
    assert expected is not None
    assert torch.equal(made[: tiny.config.target_positions], expected)


def test_safetensors_of_the_reference_names_are_read(
    tmp_path: Path, state: dict[str, Tensor], tiny: Transformer
) -> None:
    pytest.importorskip("safetensors.torch").save_file(state, tmp_path / "checkpoint.safetensors")
    assert_same_weights(load_checkpoint(tmp_path / "checkpoint.safetensors", heads=2).model, tiny)


def test_a_damaged_file_of_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"x" * 64)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(tmp_path / "checkpoint.safetensors")


class TestPadding:
    """Embeddings that are larger than the vocabulary, by what a multiple needs."""

    def test_is_cut_and_said(self, tiny: Transformer) -> None:
        config = tiny.config  # 64 and 72 rows
        model, notes = cut_to_vocabularies(tiny, config.source_vocab_size - 3, config.target_vocab_size - 2)
        assert (model.config.source_vocab_size, model.config.target_vocab_size) == (61, 70)
        assert [note.split(" to ")[0] for note in notes] == [
            "cut the source embedding from 64",
            "cut the target embedding from 72",
        ]
        assert torch.equal(model.head.weight, tiny.head.weight[:70])
        assert torch.equal(model.source_embedding.tokens.weight, tiny.source_embedding.tokens.weight[:61])

    def test_a_model_that_fits_stays_as_it_is(self, tiny: Transformer) -> None:
        config = tiny.config
        assert cut_to_vocabularies(tiny, config.source_vocab_size, config.target_vocab_size) == (tiny, ())

    def test_what_no_multiple_explains_is_not_cut(self, tiny: Transformer) -> None:
        assert cut_to_vocabularies(tiny, 20, 20) == (tiny, ())
