"""The one error tree. Every error says what was got, what was expected and what to do."""


class KvxError(Exception):
    """Root of all errors that kvx raises on purpose.

    `got` describes what was found, `expected` what should have been there, `remedy` what to do about it.
    """

    def __init__(self, got: str, *, expected: str, remedy: str) -> None:
        super().__init__(got, expected, remedy)
        self.got = got
        self.expected = expected
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.got}; expected {self.expected}. {self.remedy}"


class OptionError(KvxError):
    """An option or a configuration has a value that cannot work."""


class CheckpointError(KvxError):
    """A checkpoint cannot be read, or its tensors are not those of the model."""


class TokenizerError(KvxError):
    """A tokenizer cannot be read, lacks a special token, or does not belong to the model."""


class BundleError(KvxError):
    """A bundle is missing, damaged, altered, of another format version, or unsafe to open."""


class DeviceError(KvxError):
    """The device or backend asked for is not to be had here."""


class CapacityError(KvxError):
    """A row, a position or a plan is beyond the cache's capacity."""


class InputError(KvxError):
    """A text cannot be translated as it is. `line` counts from 1 where the text came from lines."""

    def __init__(self, got: str, *, expected: str, remedy: str, line: int | None = None) -> None:
        super().__init__(got if line is None else f"line {line}: {got}", expected=expected, remedy=remedy)
        self.line = line
        self._of_one_line = got

    def at(self, line: int | None) -> "InputError":
        """The same error for another line, or for a text that is none."""
        return InputError(self._of_one_line, expected=self.expected, remedy=self.remedy, line=line)


class ParityError(KvxError):
    """An export differs from eager PyTorch by more than the tolerance."""
