"""A Translator without a bundle, for the tests of programs that translate."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

import kvx
from kvx.runtime.arrays import FloatArray, IntArray, Tensors
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.framing import Framing, Languages
from kvx.runtime.bundle.manifest import Manifest, TokenizerEntry
from kvx.runtime.bundle.signature import TensorSpec, cache_specs
from kvx.runtime.decoding.backend import Step, StepOutput
from kvx.runtime.decoding.cache import KVCache
from kvx.runtime.engine.core import SECONDS, EngineOptions
from kvx.runtime.engine.loaded import LoadedModel
from kvx.runtime.rules import count, refuse, wrong_value
from kvx.runtime.text.sources import refuse_string
from kvx.runtime.text.tokenizers.bytes import IDS, ByteTokenizer
from kvx.runtime.translator import Translator

Translations = Mapping[str, str] | Callable[[str], str]

PAD, EOS = IDS["<pad>"], IDS["</s>"]
FIRST_LANGUAGE = len(IDS)
MOST_POSITIONS = 2**16
KEPT = 4096  # translations
PROBABILITY = 0.9  # of the next character of a translation; nearly all of the rest is its rival's


class FakeTranslator(Translator):
    """A Translator whose model is made in memory. It reads no file and needs no ONNX Runtime; all else, from the
    options and the engine to the errors, is what runs in production.

    `translations` gives the translation of a text: a mapping, or a function, which must always give the same for the
    same text and whose errors reach the caller. By default, and for what a mapping does not have, it is the text in
    upper case. Every token is a byte. A character has the probability 0.9, and nearly all of the rest has the letter in
    the other case, or "?": beams and samples look like "HALLO", "hALLO", and a score is log 0.9 times the number of
    characters. After a prefix or a sample that the translation does not begin with, it goes on from the same number of
    bytes.

    `step_seconds`: how long each step takes. `failing`: texts for which the model gives logits that are not finite.
    `languages`: codes that texts may be translated from, the first by default, and to, where one has to be named. The
    text then begins with that one, as in ">>en<< Hallo"; a mapping may also have it without. `positions`: the most
    tokens of a text, with what stands around it, and of a translation, with its end. `rows`, `max_waiting` and
    `idle_seconds` are those of the engine. Raises OptionError and InputError.
    """

    def __init__(
        self,
        translations: Translations | None = None,
        *,
        step_seconds: float = 0.0,
        failing: Iterable[str] = (),
        languages: Sequence[str] = (),
        positions: int = 4096,
        rows: int | None = None,
        max_waiting: int = 1024,
        idle_seconds: float = 5.0,
    ) -> None:
        refuse(
            [
                *wrong_value("step_seconds", step_seconds, SECONDS),
                *wrong_value("positions", positions, count(MOST_POSITIONS, least=4)),
            ]
        )
        refuse_string(failing)
        refuse_string(languages)
        failing, languages = tuple(failing), tuple(languages)
        manifest = _manifest(languages, positions)
        backend = _FakeBackend(manifest, _Dictionary(translations, languages, failing), step_seconds)
        model = LoadedModel(Bundle(Path("fake"), manifest), backend)
        super().__init__(model, EngineOptions(rows=rows, max_waiting=max_waiting, idle_seconds=idle_seconds))
        self._made_of: dict[str, Any] = {
            "translations": translations,
            "step_seconds": step_seconds,
            "failing": failing,
            "languages": languages,
            "positions": positions,
            "rows": rows,
            "max_waiting": max_waiting,
            "idle_seconds": idle_seconds,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """It is pickled as what it was made of, which must be picklable: a mapping, or a function of a module."""
        return functools.partial(type(self), **self._made_of), ()

    @classmethod
    def load(cls, bundle: str | Path, **options: object) -> NoReturn:
        """It has no bundle. Raises TypeError."""
        raise TypeError(
            "A FakeTranslator has no bundle to load. Make it with FakeTranslator(…), and let Translator.load give it: "
            'monkeypatch.setattr(kvx.Translator, "load", lambda *_, **__: fake).'
        )


class _Dictionary:
    """Source ids → the target ids of their translation."""

    def __init__(self, translations: Translations | None, languages: tuple[str, ...], failing: tuple[str, ...]) -> None:
        given = translations if callable(translations) else dict(translations or {})
        self._translations = given
        self._languages = languages
        self._failing = frozenset(failing)
        self._tokenizer = ByteTokenizer()

    def __call__(self, ids: Sequence[int]) -> tuple[int, ...] | None:
        """Those of a translation, with eos; None for a text that fails. Raises TypeError for what is not a text."""
        text = self._tokenizer.decode(ids)
        marked = f">>{self._languages[ids[1] - FIRST_LANGUAGE]}<< " if self._languages else ""
        if not self._failing.isdisjoint((text, marked + text)):
            return None
        found = self._translation(text, marked)
        if not isinstance(found, str):
            raise TypeError(f"The translation of {text!r:.60} is {found!r:.60}. Give a str.")
        return (*self._tokenizer.encode(found), EOS)

    def _translation(self, text: str, marked: str) -> str:
        if callable(self._translations):
            return self._translations(marked + text)
        known = (self._translations[one] for one in (marked + text, text) if one in self._translations)
        return next(known, marked + text.upper())


class _FakeBackend:
    """A Backend whose encoder puts the source ids into the cross keys and values, and whose step knows only these and
    how many tokens a row has: float32 holds ids as they are.
    """

    name = "fake"
    decodes = 1
    query_tokens = False

    def __init__(self, manifest: Manifest, dictionary: _Dictionary, step_seconds: float) -> None:
        self._specs = cache_specs(manifest.dimensions)
        self._dictionary = functools.lru_cache(KEPT)(dictionary)
        self._step_seconds = step_seconds
        self._unlikely = _unlikely(manifest.dimensions.vocab_size)

    @property
    def cache_specs(self) -> tuple[TensorSpec, ...]:
        """Keys and values of one layer, with one head of one channel."""
        return self._specs

    @property
    def beam_cache_specs(self) -> tuple[TensorSpec, ...]:
        """The same: a source is there once for each beam."""
        return self._specs

    def encode(self, input_ids: IntArray, source_lengths: IntArray) -> Tensors:
        """input_ids [B, S], source_lengths [B] → cross keys and values [B, 1, S, 1], the ids themselves."""
        content = input_ids.astype(np.float32)[:, None, :, None]
        return {spec.name: content for spec in self._specs if "S" in spec.axes}

    def bind(self, cache: KVCache) -> Step:
        """The step over this cache."""
        own, cross = ([spec.name for spec in self._specs if axis in spec.axes] for axis in ("T", "S"))

        def step(input_ids: IntArray) -> StepOutput:
            if self._step_seconds:
                time.sleep(self._step_seconds)
            rows, lengths = np.arange(cache.active), cache.lengths[: cache.active]
            for name in own:
                cache.buffers[name][rows, 0, lengths, 0] = input_ids
            logits = np.tile(self._unlikely, (cache.active, 1))
            for row in rows.tolist():
                source = cache.buffers[cross[0]][row, 0, : cache.source_lengths[row], 0]
                self._point(logits[row], tuple(source.astype(int).tolist()), int(lengths[row]))
            return StepOutput(logits)

        return step

    def bind_chunk(self, cache: KVCache) -> Step:
        """Raises NotImplementedError: a step takes one token of a row."""
        raise NotImplementedError

    def _point(self, logits: FloatArray, source: tuple[int, ...], position: int) -> None:
        """Makes the next token of a translation the largest of the logits [V], and its rival, if any, the second."""
        target = self._dictionary(source)
        if target is None:
            logits[:] = np.nan
            return
        following = target[position] if position < len(target) else EOS
        rival = _rival(following)
        logits[following] = 0.0 if rival is None else math.log(PROBABILITY)
        if rival is not None:
            logits[rival] = math.log(1 - PROBABILITY)


def _unlikely(vocabulary: int) -> FloatArray:
    """Logits [V] of tokens that nobody expects: visible ones first, and no two alike, so that beams have an order."""
    from_first = (np.arange(vocabulary) - _id("!")) % vocabulary
    return (-25 - from_first / 1000).astype(np.float32)


def _rival(token: int) -> int | None:
    """What may come in the place of a token: a letter in the other case, or "?" instead of another character. The end
    and the later bytes of a character have none.
    """
    byte = token - _id("\0")
    if token == EOS or 0x80 <= byte < 0xC0:
        return None
    shown = chr(byte) if byte < 0x80 else ""
    other = shown.swapcase()
    return _id(other if other != shown else "!" if shown == "?" else "?")


def _id(character: str) -> int:
    return ByteTokenizer().encode(character)[0]


def _manifest(languages: tuple[str, ...], positions: int) -> Manifest:
    """Of a bundle whose files nobody needs."""
    codes = {code: FIRST_LANGUAGE + number for number, code in enumerate(languages)}
    special = (one for piece, one in IDS.items() if not piece.startswith("<0x") and one != EOS)
    sizes = dict.fromkeys(("source_vocab_size", "target_vocab_size"), FIRST_LANGUAGE + len(codes))
    sizes |= dict.fromkeys(("source_positions", "target_positions"), positions)
    parts = ("layers", "heads", "head_width", "d_ff")
    return Manifest(
        created="2025-01-01T00:00:00+00:00",
        kvx_version=kvx.__version__,
        family="fake",
        model=dict.fromkeys(("d_model", *(f"{side}_{part}" for side in ("encoder", "decoder") for part in parts)), 1)
        | sizes,
        precision="fp32",
        lowering="standard",
        opset=1,
        max_new_tokens=positions,
        framing=Framing(
            prefix=("source_language", "target_language") if codes else (),
            suffix=(EOS,),
            start=PAD,
            eos=EOS,
            pad=PAD,
            never=(*special, *codes.values()),
        ),
        languages=Languages(source=codes, target=codes, default_source=next(iter(codes), None)),
        tokenizers=dict.fromkeys(("source", "target"), TokenizerEntry("bytes", {})),
        files={},
        parity=None,
    )
