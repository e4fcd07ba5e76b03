"""kvx: encoder-decoder Transformers, exported once with an explicit cache, proven, and run without torch."""

from kvx.runtime.engine.scoring import Ranking, Score
from kvx.runtime.errors import (
    BundleError,
    CapacityError,
    CheckpointError,
    DeviceError,
    InputError,
    KvxError,
    OptionError,
    ParityError,
    TokenizerError,
)
from kvx.runtime.options import TranslateOptions
from kvx.runtime.translation import Translation
from kvx.runtime.translator import Translator

__version__ = "0.1.0"

__all__ = [
    "BundleError",
    "CapacityError",
    "CheckpointError",
    "DeviceError",
    "InputError",
    "KvxError",
    "OptionError",
    "ParityError",
    "Ranking",
    "Score",
    "TokenizerError",
    "TranslateOptions",
    "Translation",
    "Translator",
    "__version__",
]
