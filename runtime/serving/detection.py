"""Which language a text is in."""

from __future__ import annotations

import io
import lzma
import threading
from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

MOST_CHARACTERS = 4000  # that are looked at: more takes longer and changes nothing
LEAST = 0.01  # probability of a language that is worth telling


class Detected(NamedTuple):
    """A language, and how probable it is, 0 to 1."""

    language: str
    confidence: float


class Detector:
    """Tells languages apart: those that models translate from, and no others. Any thread may use it."""

    def __init__(self, codes: Iterable[str]) -> None:
        self._codes = tuple(dict.fromkeys(codes))
        self._lock = threading.Lock()
        self._identifier: LanguageIdentifier | None = None
        self._public: dict[str, str] = {}

    @property
    def useful(self) -> bool:
        """Whether there is any language to find."""
        return bool(self._codes)

    def load(self) -> None:
        """Loads its model, which takes a while."""
        with self._lock:
            if self._identifier is None and self._codes:
                identifier = _identifier()
                known = set(identifier.labels)
                for code in self._codes:  # the first of those that it does not tell apart, such as scripts
                    language = code.partition("-")[0]
                    if language in known:
                        self._public.setdefault(language, code)
                identifier.set_languages(list(self._public) or None)
                self._identifier = identifier

    def rank(self, text: str) -> list[Detected]:
        """The languages that a text may be in, the most probable first."""
        self.load()
        if not self._public or self._identifier is None:
            return [Detected(code, 0.0) for code in self._codes[:1]]
        found = self._identifier.rank(text[:MOST_CHARACTERS])
        ranked = [Detected(self._public[language], float(probability)) for language, probability in found]
        return [one for one in ranked if one.confidence >= LEAST] or ranked[:1]

    def detect(self, text: str) -> Detected:
        """The most probable language of a text."""
        return self.rank(text)[0]


def _identifier() -> LanguageIdentifier:
    """py3langid's, read in memory: its own loader writes a temporary file, and a service may have nowhere to write."""
    from py3langid.langid import MODEL_DIR, MODEL_FILE, LanguageIdentifier

    with lzma.open(MODEL_DIR / MODEL_FILE) as file, np.load(io.BytesIO(file.read()), allow_pickle=False) as data:
        moves, rows = (array(data[name].dtype.char, data[name].tobytes()) for name in ("nextmove", "nextmove_row"))
        classes, outputs = data["classes"].tolist(), data["out_feat"].tolist()
        return LanguageIdentifier(data["ptc"], data["pc"], classes, moves, outputs, norm_probs=True, tk_row=rows)
