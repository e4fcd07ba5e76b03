"""The eager model: steps over a cache equal the full forward pass, and padding is by length alone.

Letters: B rows, S source positions, T target positions or cache capacity, H heads, D head width, V target vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from kvx.models.importers import Checkpoint
from kvx.models.layers import KeyValue, ReferenceNorm, interleaved_positions
from kvx.models.operators import EAGER
from kvx.models.transformer import Transformer

if TYPE_CHECKING:
    from kvx.tests.conftest import Seed

POISON = 1e30
FLOAT32_NOISE = 1e-5
REFERENCE_TOLERANCE = 1e-4


class Batch(NamedTuple):
    """Sources [B, S] of `source_lengths` [B] and targets [B, T]; what lies beyond a source's length is random."""

    input_ids: Tensor
    source_lengths: Tensor
    target_ids: Tensor


@pytest.fixture
def batch(tiny: Transformer) -> Batch:
    random = torch.Generator().manual_seed(3)
    config = tiny.config
    return Batch(
        torch.randint(config.source_vocab_size, (4, 9), generator=random),
        torch.tensor([9, 3, 1, 6]),
        torch.randint(config.target_vocab_size, (4, 12), generator=random),
    )


def empty_cache(model: Transformer, rows: int, capacity: int) -> list[KeyValue]:
    shape = (rows, model.config.decoder_heads, capacity, model.config.decoder_head_width)
    return [KeyValue(torch.zeros(shape), torch.zeros(shape)) for _ in range(model.config.decoder_layers)]


def poison(pairs: list[KeyValue], lengths: Tensor) -> None:
    """Puts ±1e30 into [B, H, positions, D] beyond each row's length."""
    for tensor in (tensor for pair in pairs for tensor in pair):
        outside = torch.arange(tensor.shape[2]) >= lengths[:, None]
        signs = torch.where(torch.arange(tensor.numel()).reshape(tensor.shape) % 3 == 0, -POISON, POISON)
        tensor[outside[:, None, :, None].expand_as(tensor)] = signs[outside[:, None, :, None].expand_as(tensor)]


def step_logits(model: Transformer, batch: Batch, *, poisoned: bool = False) -> Tensor:
    """Logits [B, T, V] by single steps; row r starts r steps after the first, so no two rows share a position."""
    rows, positions = batch.target_ids.shape
    delays = torch.arange(rows)
    cross, past = model.encode(batch.input_ids, batch.source_lengths), empty_cache(model, rows, positions + 2)
    logits = torch.zeros(rows, positions, model.config.target_vocab_size)
    if poisoned:
        poison(cross, batch.source_lengths)
    for number in range(positions + rows - 1):
        lengths = (number - delays).clamp(0, positions - 1)  # before its start and after its end a row repeats a token
        if poisoned:
            poison(past, lengths)
        ids = batch.target_ids[delays, lengths]
        logits[delays, lengths], past, *_ = model.step(ids, lengths, batch.source_lengths, past, cross)
    return logits


def test_steps_over_a_cache_equal_the_full_forward_pass(tiny: Transformer, batch: Batch) -> None:
    torch.testing.assert_close(step_logits(tiny, batch), tiny(*batch), rtol=0, atol=FLOAT32_NOISE)


def test_what_lies_in_the_caches_beyond_the_lengths_changes_nothing(tiny: Transformer, batch: Batch) -> None:
    assert torch.equal(step_logits(tiny, batch, poisoned=True), step_logits(tiny, batch))


def test_a_step_writes_one_position_of_each_row_in_place(tiny: Transformer, batch: Batch) -> None:
    cross, past = tiny.encode(batch.input_ids, batch.source_lengths), empty_cache(tiny, 4, 8)
    lengths = torch.tensor([0, 3, 7, 5])
    _, present, *_ = tiny.step(batch.target_ids[:, 0], lengths, batch.source_lengths, past, cross)
    for before, after in zip(past, present, strict=True):
        assert after.key.data_ptr() == before.key.data_ptr()
        written = (after.key != 0).any(-1).any(1)
        assert torch.equal(written, torch.arange(8) == lengths[:, None])


@pytest.mark.parametrize("layer", [0, 1])
def test_the_attention_of_steps_is_that_of_the_full_pass(tiny: Transformer, batch: Batch, layer: int) -> None:
    cross, past = tiny.encode(batch.input_ids, batch.source_lengths), empty_cache(tiny, 4, 12)
    full = tiny.decode_weighed(batch.target_ids, cross, batch.source_lengths)[1][layer].mean(dim=1)
    poison(cross, batch.source_lengths)
    for position in range(12):
        lengths = torch.full((4,), position)
        poison(past, lengths)
        ids = batch.target_ids[:, position]
        attention = tiny.step(ids, lengths, batch.source_lengths, past, cross, attention_layer=layer).attention
        assert attention is not None
        torch.testing.assert_close(attention, full[:, position], rtol=0, atol=FLOAT32_NOISE)
        torch.testing.assert_close(attention.sum(dim=1), torch.ones(4), rtol=0, atol=FLOAT32_NOISE)
        assert not attention[torch.arange(9) >= batch.source_lengths[:, None]].any()


def test_attention_is_the_mean_of_the_heads_softmax(tiny: Transformer, batch: Batch) -> None:
    cross, layer = tiny.encode(batch.input_ids, batch.source_lengths), tiny.decoder[1]
    seen: list[Tensor] = []
    hook = layer.cross_attention.query.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    _, attentions = tiny.decode_weighed(batch.target_ids, cross, batch.source_lengths)
    hook.remove()
    queries, keys = layer.cross_attention.query(seen[0]).numpy(), cross[1].key.numpy()
    width = tiny.config.decoder_head_width
    for row, length in enumerate(batch.source_lengths.tolist()):
        for head in range(tiny.config.decoder_heads):
            own = slice(head * width, (head + 1) * width)
            powers = np.exp(queries[row, :, own].astype(np.float64) @ keys[row, head, :length].T / math.sqrt(width))
            expected = powers / powers.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(attentions[1][row, head, :, :length], expected, rtol=0, atol=FLOAT32_NOISE)


def test_source_ids_beyond_the_length_change_nothing(tiny: Transformer, batch: Batch) -> None:
    outside = torch.arange(batch.input_ids.shape[1]) >= batch.source_lengths[:, None]
    other = batch._replace(input_ids=batch.input_ids.where(~outside, (batch.input_ids + 1) % 5))
    assert not torch.equal(other.input_ids, batch.input_ids)
    assert torch.equal(tiny(*other), tiny(*batch))


def test_a_sentence_in_a_ragged_batch_is_the_sentence_alone(tiny: Transformer, batch: Batch) -> None:
    together = tiny(*batch)
    for row, length in enumerate(batch.source_lengths.tolist()):
        alone = tiny(batch.input_ids[row : row + 1, :length], torch.tensor([length]), batch.target_ids[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=FLOAT32_NOISE)


def test_an_id_within_the_length_does_change_the_result(tiny: Transformer, batch: Batch) -> None:
    ids = batch.input_ids.clone()
    ids[0, 8] = (ids[0, 8] + 1) % tiny.config.source_vocab_size
    assert not torch.allclose(tiny(*batch._replace(input_ids=ids))[0], tiny(*batch)[0], atol=1e-3)


def test_a_target_token_changes_no_earlier_logits(tiny: Transformer, batch: Batch) -> None:
    ids = batch.target_ids.clone()
    ids[:, 7] = (ids[:, 7] + 1) % tiny.config.target_vocab_size
    before, after = tiny(*batch), tiny(*batch._replace(target_ids=ids))
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=0, atol=FLOAT32_NOISE)
    assert (after[:, 7:] - before[:, 7:]).abs().amax(-1).min() > 1e-3


def test_layer_norm_divides_by_the_unbiased_deviation_plus_epsilon() -> None:
    random = np.random.default_rng(0)
    # The last rows are so small that an ε under the root, or none, would show.
    x = random.normal(size=(5, 6)) * np.array([1, 100, 1e-3, 1e-6, 1e-7])[:, None]
    norm = ReferenceNorm(6, 1e-6)
    gamma, beta = random.normal(size=(2, 6))
    norm.load_state_dict({"gamma": torch.tensor(gamma).float(), "beta": torch.tensor(beta).float()})
    deviation = np.sqrt(((x - x.mean(-1, keepdims=True)) ** 2).sum(-1, keepdims=True) / (6 - 1))
    expected = gamma * (x - x.mean(-1, keepdims=True)) / (deviation + 1e-6) + beta
    with torch.no_grad():
        got = EAGER.normalize(norm, torch.tensor(x).float())
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("d_model", [6, 7])
def test_positions_are_sines_on_even_and_cosines_on_odd_channels(d_model: int) -> None:
    expected = [
        [
            (math.cos if channel % 2 else math.sin)(position / 10000 ** ((channel - channel % 2) / d_model))
            for channel in range(d_model)
        ]
        for position in range(50)
    ]
    np.testing.assert_allclose(interleaved_positions(50, d_model).numpy(), expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def reference_sentences(seed: Seed) -> list[tuple[Tensor, ...]]:
    """Source ids, target ids and the original code's logits of its first sentences."""
    with np.load(seed.folder / "reference" / "logits.npz") as arrays:
        names = ("source_ids", "target_ids", "logits")
        return [tuple(torch.from_numpy(arrays[f"{name}_{k}"]) for name in names) for k in range(12)]


def test_the_seeds_positions_are_the_sinusoidal_table(seed_checkpoint: Checkpoint) -> None:
    model = seed_checkpoint.model
    table = interleaved_positions(model.config.target_positions, model.config.d_model)
    torch.testing.assert_close(model.target_embedding.positions, table, rtol=0, atol=1e-4)


def test_full_passes_give_the_reference_logits(
    seed_checkpoint: Checkpoint, reference_sentences: list[tuple[Tensor, ...]]
) -> None:
    for source, target, expected in reference_sentences:
        got = seed_checkpoint.model(source[None], torch.tensor([len(source)]), target[None])[0]
        torch.testing.assert_close(got, expected, rtol=0, atol=REFERENCE_TOLERANCE)


def test_steps_of_one_ragged_batch_give_the_reference_logits(
    seed_checkpoint: Checkpoint, reference_sentences: list[tuple[Tensor, ...]]
) -> None:
    sources, targets, expected = zip(*reference_sentences, strict=True)
    pad = torch.nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(source) for source in sources])
    batch = Batch(pad(list(sources), batch_first=True), lengths, pad(list(targets), batch_first=True))
    got = step_logits(seed_checkpoint.model, batch, poisoned=True)
    for row, logits in zip(got, expected, strict=True):
        torch.testing.assert_close(row[: len(logits)], logits, rtol=0, atol=REFERENCE_TOLERANCE)
