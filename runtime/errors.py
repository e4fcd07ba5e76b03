"""The one error tree. Every error says what is wrong, what was expected and what to do."""

from __future__ import annotations

import copy
import errno
from collections.abc import Sequence
from typing import Any, Self

REMEDIES = {  # for what a system says of a file or stream
    errno.EACCES: "Check permissions.",
    errno.EPERM: "Check permissions.",
    errno.ENOENT: "Check the path.",
    errno.ENOTDIR: "Check the path.",
    errno.EISDIR: "Name a file, not a folder.",
    errno.ELOOP: "Check where the links lead.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EROFS: "Choose a place that is not mounted read-only.",
    errno.ENOSPC: "Free space on the disk.",
    errno.EDQUOT: "Free space: the quota of the disk is used up.",
    errno.EFBIG: "Raise the limit of the size of files (ulimit -f).",
    errno.EIO: "Check the disk: it has failed.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n), or close some.",
    errno.ENFILE: "Close some files: the system has too many open.",
    errno.ENOMEM: "Free memory.",
    errno.EAGAIN: "Raise the limit of threads and processes (ulimit -u), or ask for fewer `threads`.",
}


def listed(names: Sequence[object], most: int) -> str:
    """The first of some names with commas between, and … where there are more."""
    return ", ".join(map(str, names[:most])) + (", …" if len(names) > most else "")


class KvxError(Exception):
    """Root of all errors that kvx raises on purpose.

    `got` is a sentence that says what is wrong, without its full stop; `expected` completes "Expected …"; `remedy` is a
    sentence that says what to do. Options are named in backticks, as the library spells them: the command line shows
    its own spelling. `option` is the option at fault, where there is one. Errors can be pickled and copied.
    """

    def __init__(self, got: str, *, expected: str, remedy: str, option: str | None = None) -> None:
        super().__init__(got)
        self.got = got
        self.expected = expected
        self.remedy = remedy
        self.option = option

    def __str__(self) -> str:
        """The three parts as sentences."""
        return f"{self.got}. Expected {self.expected}. {self.remedy}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Its type and what it holds."""
        return _restore, (type(self), self.args, self.__dict__)


def remedy_of(error: OSError, otherwise: str) -> str:
    """What to do about an error of the system, by its kind, or `otherwise`."""
    return REMEDIES.get(error.errno or 0, otherwise)


class OptionError(KvxError):
    """An option or a configuration has a value that cannot work."""


class CheckpointError(KvxError):
    """A checkpoint cannot be read, or its tensors are not those of the model."""


class TokenizerError(KvxError):
    """A tokenizer cannot be read, lacks a special token, or does not belong to the model."""


class BundleError(KvxError):
    """A bundle is missing, damaged, altered, of another format version, or unsafe to open."""


class DeviceError(KvxError):
    """The device or backend that was asked for is not available."""


class CapacityError(KvxError):
    """A row, a position or a plan is beyond the cache's capacity."""


class Overloaded(CapacityError):  # noqa: N818  # what it is called in the field
    """An engine has as many requests as it may hold. `retry_after`: seconds until there should be room."""

    def __init__(
        self, got: str, *, expected: str, remedy: str, option: str | None = None, retry_after: float = 1.0
    ) -> None:
        super().__init__(got, expected=expected, remedy=remedy, option=option)
        self.retry_after = retry_after

    @classmethod
    def of(cls, waiting: int, most: int, retry_after: float) -> Self:
        """Where this many wait, and no more than `most` may."""
        return cls(
            f"{waiting} requests wait already",
            expected=f"at most {most} (`max_waiting`)",
            remedy=f"Send it again in {retry_after:g} s.",
            option="max_waiting",
            retry_after=retry_after,
        )


class EngineClosed(KvxError):  # noqa: N818
    """A request was given to an engine that has been closed."""


class InputError(KvxError):
    """A text cannot be translated as it is. `line` counts from 1 where the text came from lines."""

    def __init__(
        self, got: str, *, expected: str, remedy: str, option: str | None = None, line: int | None = None
    ) -> None:
        super().__init__(got, expected=expected, remedy=remedy, option=option)
        self.line = line

    def __str__(self) -> str:
        """The line before the sentences."""
        return super().__str__() if self.line is None else f"Line {self.line}: {super().__str__()}"

    def at(self, line: int | None) -> Self:
        """The same error for another line, or for a text that is none."""
        return type(self)(self.got, expected=self.expected, remedy=self.remedy, option=self.option, line=line)


class ParityError(KvxError):
    """An export differs from eager PyTorch by more than the tolerance."""


def own_copy(error: BaseException) -> BaseException:
    """The same error for one caller: tracebacks of several would grow into each other."""
    try:
        return copy.copy(error).with_traceback(error.__traceback__)
    except Exception:  # it cannot be copied
        return error


SIGNS_OF_TOO_FEW_THREADS = ("can't start new thread", "pthread_create", "resource temporarily unavailable")


def is_out_of_threads(error: BaseException) -> bool:
    """Whether an exception of Python, torch or ONNX Runtime says that the system gives no more threads."""
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS_OF_TOO_FEW_THREADS)


def out_of_threads(got: str) -> CapacityError:
    """The error for it."""
    return CapacityError(
        f"{got}, because the system allows this process no more threads",
        expected="a limit on threads that leaves room for those of kvx",
        remedy="Use fewer `threads` and `workers`, or raise the limit (ulimit -u, or pids of the container).",
        option="threads",
    )


def _restore(kind: type[KvxError], args: tuple[Any, ...], state: dict[str, Any]) -> KvxError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error
