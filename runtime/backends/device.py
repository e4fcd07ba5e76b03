"""Devices by name, and what is missing where one cannot be used."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from kvx.runtime.errors import DeviceError

CUDA_EXTRA = "kvx[cuda]"
DRIVER = "libcuda.so"
MISSING = re.compile(r"^(.+\.so[^:]*): cannot open shared object file")


@dataclass(frozen=True, slots=True)
class Device:
    """Where sessions run and buffers are: the `kind`, "cpu" or "cuda", and the index among those of its kind."""

    kind: str = "cpu"
    index: int = 0

    @classmethod
    def parse(cls, name: str) -> Self:
        """The device called cpu, cuda or cuda:<index>. Raises DeviceError."""
        kind, colon, index = name.partition(":")
        known = (kind == "cuda" and (index.isdecimal() or not colon)) or name == "cpu"
        if not known:
            raise DeviceError(
                f"There is no device {name!r}",
                expected="cpu, cuda or cuda:<index>",
                remedy="Correct `device`.",
                option="device",
            )
        return cls(kind, int(index or 0))

    @classmethod
    def parse_list(cls, names: str) -> tuple[Self, ...]:
        """Several devices with commas between them, each named once. Raises DeviceError."""
        devices = tuple(cls.parse(name.strip()) for name in names.split(","))
        if len(set(devices)) < len(devices):
            raise DeviceError(
                f"The list of devices {names!r} names one of them twice",
                expected="each device once",
                remedy="Correct `device`.",
                option="device",
            )
        return devices

    def __str__(self) -> str:
        """As `parse` takes it."""
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


HOST = Device()


def unavailable(device: Device, got: str, library: str | None) -> DeviceError:
    """The error for a session that does not run on the device that was asked for, as `got` says. It names the library
    whose absence explains it, if there is one.
    """
    if library is None:
        remedy = "Check that a device of this index exists and that its driver is new enough for CUDA 13 (nvidia-smi)"
    elif library.startswith(DRIVER):
        remedy = f"The library {library} is missing: install NVIDIA's driver for CUDA 13 or newer"
    else:
        remedy = f"The library {library} is missing: install it with pip install '{CUDA_EXTRA}'"
    return DeviceError(got, expected=f"the device {device}", remedy=f"{remedy}, or use `device` cpu.", option="device")


def missing_library(provider: Path) -> str | None:
    """What keeps a provider from being loaded: the name of the library that is missing, if that is the reason. None
    where it can be loaded.
    """
    try:
        ctypes.CDLL(str(provider))
    except OSError as error:
        found = MISSING.match(str(error))
        return Path(found[1]).name if found else f"a part of {provider.name} ({error})"
    return None
