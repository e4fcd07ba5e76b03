"""kvx: encoder-decoder Transformers, exported once with an explicit cache, proven, and run without torch."""

from kvx import loading  # noqa: F401  # before all else
from kvx.runtime.arrays import FloatArray, IntArray
from kvx.runtime.bundle.framing import Framing, LanguageIds, Languages, SpecialIds
from kvx.runtime.bundle.manifest import Default, FileEntry, Manifest, TokenizerEntry
from kvx.runtime.bundle.signature import Dimensions, Signature, StepFeatures, TensorSpec
from kvx.runtime.decoding.decode import Cancelled
from kvx.runtime.decoding.filters import Filter, FilterRows
from kvx.runtime.decoding.results import DecodeStats, FinishReason
from kvx.runtime.decoding.search import BeamSearch, Greedy, Sampling
from kvx.runtime.engine.engine import Engine
from kvx.runtime.engine.handle import Handle
from kvx.runtime.engine.reply import Event, Result, Token
from kvx.runtime.engine.scoring import RankBy, Ranking, Score
from kvx.runtime.engine.workers import EngineLoad
from kvx.runtime.errors import (
    BundleError,
    CapacityError,
    CheckpointError,
    DeviceError,
    EngineClosed,
    InputError,
    KvxError,
    OptionError,
    Overloaded,
    ParityError,
    TokenizerError,
)
from kvx.runtime.options import TranslateKeywords, TranslateOptions
from kvx.runtime.text.sources import OnLong, Source
from kvx.runtime.text.targets import Target
from kvx.runtime.translation import Translation
from kvx.runtime.translator import Translator

__version__ = "0.1.0"

__all__ = [
    "BeamSearch",
    "BundleError",
    "Cancelled",
    "CapacityError",
    "CheckpointError",
    "DecodeStats",
    "Default",
    "DeviceError",
    "Dimensions",
    "Engine",
    "EngineClosed",
    "EngineLoad",
    "Event",
    "FileEntry",
    "Filter",
    "FilterRows",
    "FinishReason",
    "FloatArray",
    "Framing",
    "Greedy",
    "Handle",
    "InputError",
    "IntArray",
    "KvxError",
    "LanguageIds",
    "Languages",
    "Manifest",
    "OnLong",
    "OptionError",
    "Overloaded",
    "ParityError",
    "RankBy",
    "Ranking",
    "Result",
    "Sampling",
    "Score",
    "Signature",
    "Source",
    "SpecialIds",
    "StepFeatures",
    "Target",
    "TensorSpec",
    "Token",
    "TokenizerEntry",
    "TokenizerError",
    "TranslateKeywords",
    "TranslateOptions",
    "Translation",
    "Translator",
    "__version__",
]

for _public in __all__:
    if isinstance(_class := globals()[_public], type) and _class.__module__.startswith("kvx."):
        _class.__module__ = "kvx"
