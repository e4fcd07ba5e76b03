"""Devices by name, and what is missing where one cannot be had."""

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
    """Where sessions run and buffers are: the `kind`, "cpu" or "cuda", and which of its kind."""

    kind: str = "cpu"
    index: int = 0

    @classmethod
    def parse(cls, name: str) -> Self:
        """The device called cpu, cuda or cuda:<index>. Raises DeviceError."""
        kind, colon, index = name.partition(":")
        known = (kind == "cuda" and (index.isdecimal() or not colon)) or name == "cpu"
        if not known:
            raise DeviceError(f"device {name!r}", expected="cpu, cuda or cuda:<index>", remedy="Correct the device.")
        return cls(kind, int(index or 0))

    @classmethod
    def parse_list(cls, names: str) -> tuple[Self, ...]:
        """Several devices with commas between, each once. Raises DeviceError."""
        devices = tuple(cls.parse(name.strip()) for name in names.split(","))
        if len(set(devices)) < len(devices):
            raise DeviceError(f"device {names!r}", expected="each device once", remedy="Correct the device.")
        return devices

    def __str__(self) -> str:
        """As `parse` takes it."""
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


HOST = Device()


def not_to_be_had(device: Device, got: str, library: str | None) -> DeviceError:
    """The error for a device that a session did not get, with the library whose lack explains it, if one does."""
    if library is None:
        remedy = "Check that the index exists and that the driver is new enough for CUDA 13 (nvidia-smi)"
    elif library.startswith(DRIVER):
        remedy = f"{library} is missing: install NVIDIA's driver, at least for CUDA 13"
    else:
        remedy = f"{library} is missing: pip install '{CUDA_EXTRA}' brings it"
    return DeviceError(got, expected=f"device {device}", remedy=f"{remedy}, or use --device cpu.")


def missing_library(provider: Path) -> str | None:
    """What keeps a provider from being loaded, by its name where it is a library that is missing, or None."""
    try:
        ctypes.CDLL(str(provider))
    except OSError as error:
        found = MISSING.match(str(error))
        return Path(found[1]).name if found else f"a part of {provider.name} ({error})"
    return None
