from __future__ import annotations

import dataclasses
import itertools
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvx import BundleError, DeviceError, InputError, OptionError, Translation, Translator
from kvx.runtime.arrays import IntArray, Tensors
from kvx.runtime.backends.onnx import OnnxBackend
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.framing import LanguageIds
from kvx.runtime.decoding.backend import Step
from kvx.runtime.decoding.cache import KVCache
from kvx.runtime.decoding.results import DecodeStats
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.options import TranslateOptions
from kvx.runtime.text.sources import SourceReader

if TYPE_CHECKING:
    from kvx.models.transformer import Transformer

NUMBERS = {
    "one": "eins",
    "twelve": "zwölf",
    "twenty-one": "einundzwanzig",
    "one hundred and five": "einhundertfünf",
    "seventy-six thousand": "sechsundsiebzigtausend",
    "nine hundred and ninety-nine": "neunhundertneunundneunzig",
    "twelve thousand three hundred and four": "zwölftausenddreihundertvier",
}
UNITS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
TEXTS = [
    text
    for ten in TENS
    for unit in UNITS
    for text in (unit, f"{ten}-{unit}", f"{unit} hundred and {ten}-{unit}", f"{ten}-{unit} thousand {unit} hundred")
]
LONG = " ".join(["one"] * 100)


class RecordingBackend:
    """A backend that remembers what the encoder was asked."""

    def __init__(self, backend: OnnxBackend) -> None:
        self._backend = backend
        self.name, self.cache_specs, self.decodes = backend.name, backend.cache_specs, backend.decodes
        self.beam_cache_specs = backend.beam_cache_specs
        self.query_tokens = False
        self.encoded: list[tuple[int, ...]] = []

    def encode(self, input_ids: IntArray, source_lengths: IntArray) -> Tensors:
        pairs = zip(input_ids.tolist(), source_lengths.tolist(), strict=True)
        self.encoded += [tuple(ids[:length]) for ids, length in pairs]
        return self._backend.encode(input_ids, source_lengths)

    def bind(self, cache: KVCache) -> Step:
        return self._backend.bind(cache)

    def bind_chunk(self, cache: KVCache) -> Step:
        return self._backend.bind_chunk(cache)


@pytest.fixture(scope="module")
def model(numbers_bundle: Path) -> Transformer:
    pytest.importorskip("torch", reason="the oracle is eager PyTorch")
    from kvx.models.importers import load_checkpoint

    return load_checkpoint(numbers_bundle / "model.pt").model


@pytest.fixture(scope="module")
def truth(numbers_bundle: Path, model: Transformer) -> list[tuple[int, ...]]:
    """What eager makes of TEXTS without any cache."""
    from kvx.models.eager import NoCacheBackend

    eager = Translator(LoadedModel(Bundle.open(numbers_bundle), NoCacheBackend(model)))
    return [translation.ids for translation in eager.translate(TEXTS, rows=128)]


@pytest.fixture
def recording(numbers_bundle: Path, numbers_translator: Translator) -> tuple[Translator, RecordingBackend]:
    assert isinstance(numbers_translator._model.backend, OnnxBackend)
    backend = RecordingBackend(numbers_translator._model.backend)
    return Translator(LoadedModel(Bundle.open(numbers_bundle), backend)), backend


def ids_of(translations: Sequence[Translation]) -> list[tuple[int, ...]]:
    return [translation.ids for translation in translations]


def test_translations_are_right(numbers_translator: Translator) -> None:
    found = [translation.text for translation in numbers_translator.translate(list(NUMBERS))]
    assert found == list(NUMBERS.values())


@pytest.mark.parametrize("rows", [1, 2, 7, 32, 1000])
def test_answers_come_in_order_and_are_eagers_in_any_number_of_rows(
    numbers_translator: Translator, truth: list[tuple[int, ...]], rows: int
) -> None:
    assert ids_of(numbers_translator.translate(TEXTS, rows=rows)) == truth


@pytest.mark.parametrize(("rows", "window"), [(1, 1), (3, 4), (32, None)])
def test_iterating_gives_what_translating_gives(
    numbers_translator: Translator, truth: list[tuple[int, ...]], rows: int, window: int | None
) -> None:
    options = TranslateOptions(rows=rows, window=window)
    assert ids_of(list(numbers_translator.translate_iter(iter(TEXTS), options))) == truth


def test_no_texts_give_no_translations(numbers_translator: Translator) -> None:
    assert numbers_translator.translate([]) == []
    assert list(numbers_translator.translate_iter([])) == []


def test_texts_may_come_in_any_sequence(numbers_translator: Translator) -> None:
    assert [translation.text for translation in numbers_translator.translate(("one", "twelve"))] == ["eins", "zwölf"]


def test_empty_texts_give_empty_translations_and_never_reach_the_model(
    recording: tuple[Translator, RecordingBackend],
) -> None:
    translator, backend = recording
    translations = translator.translate(["", "one", "  ", "\t", "twelve", "\u3000", ""])
    assert [translation.text for translation in translations] == ["", "eins", "", "", "zwölf", "", ""]
    for translation in translations:
        if not translation.text:
            assert (translation.ids, translation.tokens, translation.finish_reason) == ((), (), "end")
            assert not translation.truncated
    assert len(backend.encoded) == 2


@pytest.mark.parametrize("window", [1, 2, 100])
def test_nothing_but_empty_texts_runs_no_step(recording: tuple[Translator, RecordingBackend], window: int) -> None:
    translator, backend = recording
    stats = DecodeStats()
    translations = list(translator.translate_iter([""] * 5, TranslateOptions(window=window), stats))
    assert [translation.text for translation in translations] == [""] * 5
    assert backend.encoded == []
    assert stats.steps == 0


@pytest.mark.parametrize("method", ["translate", "translate_iter"])
def test_one_str_is_refused_at_once(numbers_translator: Translator, method: str) -> None:
    with pytest.raises(InputError, match=r"one str. Expected a sequence of texts"):
        getattr(numbers_translator, method)("one")


@pytest.mark.parametrize("bad", [None, 1, b"one", ["one"], "\ud800", "one \udcff"])
def test_what_is_no_text_is_refused_with_its_position_before_anything_is_decoded(
    recording: tuple[Translator, RecordingBackend], bad: object
) -> None:
    translator, backend = recording
    with pytest.raises(InputError, match="Line 3: ") as raised:
        translator.translate(["one", "", bad, "twelve"])  # type: ignore[list-item]
    assert raised.value.line == 3
    assert backend.encoded == []


@pytest.mark.parametrize("at", [0, 1, 4, 5, 7])
def test_iterating_gives_what_came_before_a_bad_text_and_then_raises(numbers_translator: Translator, at: int) -> None:
    texts: list[Any] = [*(list(NUMBERS) * 2)[:at], None, "one"]
    translations = numbers_translator.translate_iter(texts, TranslateOptions(rows=2, window=4))
    assert [next(translations).text for _ in range(at)] == [NUMBERS[text] for text in texts[:at]]
    with pytest.raises(InputError, match=f"Line {at + 1}: "):
        next(translations)


@pytest.mark.parametrize("limit", [0, -1, 65])
def test_limits_that_the_model_cannot_have_are_refused(numbers_translator: Translator, limit: int) -> None:
    with pytest.raises(OptionError, match=f"`max_new_tokens` is {limit}"):
        numbers_translator.translate(["one"], max_new_tokens=limit)


@pytest.mark.parametrize("rows", [0, -1])
def test_no_rows_are_refused(numbers_translator: Translator, rows: int) -> None:
    with pytest.raises(OptionError, match=f"`rows` is {rows}"):
        numbers_translator.translate(["one"], rows=rows)


def test_every_bad_option_is_named_at_once() -> None:
    with pytest.raises(
        OptionError, match=r"`max_new_tokens` is 0\. `on_long` is 'skip'\. `window` is 0\. `rows` is -1"
    ):
        TranslateOptions(max_new_tokens=0, rows=-1, window=0, on_long="skip")  # type: ignore[arg-type]


def test_a_limit_cuts_a_translation_and_says_so(numbers_translator: Translator) -> None:
    text = "nine hundred and ninety-nine"
    [whole] = numbers_translator.translate([text], max_new_tokens=64)
    length = len(whole.ids)
    for limit in range(1, length + 3):
        [translation] = numbers_translator.translate([text], max_new_tokens=limit)
        assert translation.ids == whole.ids[:limit]
        assert translation.finish_reason == ("end" if limit >= length else "length")
        assert len(translation.tokens) == min(limit, length - 1)


def test_ids_tokens_and_text_say_the_same(numbers_translator: Translator) -> None:
    eos = numbers_translator.manifest.framing.eos
    tokenizer = numbers_translator._model.targets.tokenizer
    for limit in (3, 64):
        for translation in numbers_translator.translate(TEXTS[:40], max_new_tokens=limit):
            ended = translation.finish_reason == "end"
            pieces = translation.ids[:-1] if ended else translation.ids
            assert ended == (translation.ids[-1] == eos)
            assert eos not in pieces
            assert translation.tokens == tokenizer.pieces(pieces)
            assert translation.text == tokenizer.decode(pieces)
            assert translation.text.replace(" ", "") == "".join(translation.tokens).replace("▁", "")


def test_a_score_is_the_sum_of_eagers_log_probabilities(
    numbers_bundle: Path, numbers_translator: Translator, model: Transformer
) -> None:
    import torch

    reader = SourceReader(Bundle.open(numbers_bundle))
    bos = numbers_translator.manifest.framing.start
    texts = TEXTS[::7]
    for limit in (4, 64):
        translations = numbers_translator.translate(texts, scores=True, max_new_tokens=limit, rows=5)
        for translation, source in zip(translations, reader.read(texts), strict=True):
            target = torch.tensor([(bos, *translation.ids)])
            logits = model(torch.tensor([source.ids]), torch.tensor([len(source.ids)]), target[:, :-1])
            expected = logits.log_softmax(-1).gather(-1, target[:, 1:, None]).sum().item()
            assert translation.score == pytest.approx(expected, abs=1e-3)


def test_scores_come_only_where_asked_for_and_change_nothing_else(numbers_translator: Translator) -> None:
    plain, scored = (numbers_translator.translate(TEXTS[:20], scores=scores) for scores in (False, True))
    assert all(translation.score is None for translation in plain)
    assert all(translation.score is not None for translation in scored)
    assert [dataclasses.replace(each, score=None, log_probabilities=None) for each in scored] == plain


def test_a_source_too_long_is_refused_with_its_line(recording: tuple[Translator, RecordingBackend]) -> None:
    translator, backend = recording
    with pytest.raises(
        InputError, match=r"Line 2: The text has 102 tokens, 2 of them around it\. Expected at most 64"
    ) as raised:
        translator.translate(["one", LONG, "twelve"])
    assert raised.value.line == 2
    assert backend.encoded == []


def test_a_source_too_long_is_cut_where_asked_for(recording: tuple[Translator, RecordingBackend]) -> None:
    translator, backend = recording
    translations = translator.translate(["one", LONG, "twelve"], on_long="truncate")
    assert [translation.truncated for translation in translations] == [False, True, False]
    assert (translations[0].text, translations[2].text) == ("eins", "zwölf")
    framing = translator.manifest.framing
    one = next(source for source in backend.encoded if len(source) == 3)[1]
    cut = max(backend.encoded, key=len)
    assert cut == framing.source_ids([one] * 62, LanguageIds())


def test_a_source_that_just_fits_is_not_cut(recording: tuple[Translator, RecordingBackend]) -> None:
    translator, backend = recording
    assert not translator.translate([" ".join(["one"] * 62)])[0].truncated
    assert len(backend.encoded[0]) == 64
    with pytest.raises(InputError, match="65 tokens"):
        translator.translate([" ".join(["one"] * 63)])


class Feed:
    """Endless texts, counted as they are taken."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[str]:
        while True:
            self.taken += 1
            yield TEXTS[self.taken % len(TEXTS)]


def test_iterating_reads_nothing_before_it_is_asked(numbers_translator: Translator) -> None:
    feed = Feed()
    numbers_translator.translate_iter(feed)
    assert feed.taken == 0


@pytest.mark.parametrize(("rows", "window"), [(1, 1), (2, 8), (4, 64)])
def test_iterating_reads_a_bounded_number_of_texts_ahead(
    numbers_translator: Translator, rows: int, window: int
) -> None:
    feed = Feed()
    translations = numbers_translator.translate_iter(feed, TranslateOptions(rows=rows, window=window, workers=1))
    for given, _ in zip(range(300), translations, strict=False):
        assert feed.taken - given <= 4 * window


def test_a_window_of_one_answers_every_text_before_it_reads_the_next(numbers_translator: Translator) -> None:
    feed = Feed()
    translations = numbers_translator.translate_iter(feed, TranslateOptions(window=1))
    for given, _ in zip(range(1, 20), translations, strict=False):
        assert feed.taken == given


def test_the_texts_of_a_call_are_decoded_longest_first(recording: tuple[Translator, RecordingBackend]) -> None:
    translator, backend = recording
    translator.translate(TEXTS[:60], rows=4, workers=1)
    lengths = [len(source) for source in backend.encoded]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 1


def test_empty_texts_leave_though_nothing_else_ever_comes(numbers_translator: Translator) -> None:
    def feed() -> Iterator[str]:
        yield "one"
        yield from itertools.repeat("", 500)
        raise AssertionError("read on and on")

    translations = numbers_translator.translate_iter(feed(), TranslateOptions(rows=2, window=4))
    assert [next(translations).text for _ in range(200)] == ["eins", *[""] * 199]


def test_iterating_may_stop_half_way(numbers_translator: Translator, truth: list[tuple[int, ...]]) -> None:
    feed = Feed()
    translations = numbers_translator.translate_iter(feed, TranslateOptions(rows=4, window=8))
    assert next(translations).ids == truth[1]
    translations.close()  # type: ignore[attr-defined]
    taken = feed.taken
    assert list(translations) == []
    assert feed.taken == taken
    assert ids_of(numbers_translator.translate(TEXTS[:9])) == truth[:9]


def test_threads_may_share_a_translator(numbers_translator: Translator, truth: list[tuple[int, ...]]) -> None:
    barrier = threading.Barrier(2)

    def work(rows: int) -> list[list[tuple[int, ...]]]:
        barrier.wait(timeout=30)
        return [ids_of(numbers_translator.translate(TEXTS, rows=rows)) for _ in range(3)]

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(work, (8, 13)):
            assert found == [truth] * 3


@pytest.mark.parametrize("backend", ["onnx", "torchscript"])
def test_one_thread_gives_the_same_answers(numbers_bundle: Path, truth: list[tuple[int, ...]], backend: str) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        translator = Translator.load(numbers_bundle, backend=backend, threads=1)
        assert ids_of(translator.translate(TEXTS)) == truth
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine may have CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:1"])
def test_cuda_where_there_is_none_is_an_error_and_not_the_cpu(numbers_bundle: Path, device: str) -> None:
    with pytest.raises(DeviceError, match=f"Expected the device {device}"):
        Translator.load(numbers_bundle, device=device)


@pytest.mark.parametrize("backend", ["onnx", "torchscript"])
@pytest.mark.parametrize("device", ["tpu", "", "cpu:0", "cuda:x", "CPU", "auto"])
def test_an_unknown_device_is_refused(numbers_bundle: Path, backend: str, device: str) -> None:
    with pytest.raises(DeviceError, match=f"device '{device}'"):
        Translator.load(numbers_bundle, backend=backend, device=device)


@pytest.mark.parametrize("backend", ["", "tensorrt", "ONNX"])
def test_an_unknown_backend_is_refused(numbers_bundle: Path, backend: str) -> None:
    with pytest.raises(DeviceError, match=f"backend '{backend}'"):
        Translator.load(numbers_bundle, backend=backend)


def test_a_translator_loads_from_a_str(numbers_bundle: Path, tmp_path: Path) -> None:
    assert Translator.load(str(numbers_bundle)).translate(["one"])[0].text == "eins"
    with pytest.raises(BundleError, match="nowhere"):
        Translator.load(str(tmp_path / "nowhere"))


def test_a_translation_is_frozen(numbers_translator: Translator) -> None:
    [translation] = numbers_translator.translate(["one"])
    for field in dataclasses.fields(translation):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(translation, field.name, None)
    assert hash(translation) == hash(numbers_translator.translate(["one"])[0])


def test_stats_count_what_was_done(numbers_translator: Translator) -> None:
    stats = DecodeStats()
    translations = list(numbers_translator.translate_iter(["one", "", "twelve"], stats=stats))
    tokens = [len(translation.ids) for translation in translations]
    assert (stats.sentences, stats.tokens, stats.row_steps) == (2, sum(tokens), sum(tokens))
    assert stats.steps == max(tokens)
    assert stats.cache_bytes >= numbers_translator.manifest.cache_bytes(target=max(tokens), source=3)


def test_a_translation_does_not_depend_on_those_before(numbers_translator: Translator) -> None:
    first = numbers_translator.translate(["one"])
    numbers_translator.translate(TEXTS[:50])
    assert numbers_translator.translate(["one"]) == first


def test_ids_are_plain_numbers(numbers_translator: Translator) -> None:
    [translation] = numbers_translator.translate(["one"], scores=True)
    assert {type(number) for number in translation.ids} == {int}
    assert type(translation.score) is float


def test_a_text_without_a_prefix_of_its_own_begins_as_the_options_say(numbers_translator: Translator) -> None:
    texts = ["seven", "twelve", "one"]
    both = numbers_translator.translate(texts, prefix="ein", prefixes=[None, "zw", None])
    assert [one.text[:2] for one in both] == ["ei", "zw", "ei"]
    alone = numbers_translator.translate(texts, prefix="ein")
    assert [both[0], both[2]] == [alone[0], alone[2]]


def test_an_empty_text_has_the_form_of_the_others(numbers_translator: Translator) -> None:
    full, empty = numbers_translator.translate(["one", " "], scores=True)
    assert (empty.text, empty.score, empty.log_probabilities) == ("", 0.0, ())
    assert full.log_probabilities is not None


@pytest.mark.parametrize("prefixes", [[7], [b"A"], [{"ein"}]])
def test_a_prefix_that_is_neither_text_nor_ids_is_refused(numbers_translator: Translator, prefixes: list[Any]) -> None:
    with pytest.raises(InputError, match="a text or a sequence of ids"):
        numbers_translator.translate(["one"], prefixes=prefixes)


def test_pieces_that_cannot_be_suppressed_are_refused_before_anything_is_read(numbers_translator: Translator) -> None:
    with pytest.raises(OptionError, match="nonsense"):
        numbers_translator.translate_iter(iter(["one"]), TranslateOptions(suppress=("nonsense",)))
