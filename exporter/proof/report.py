"""What a proof finds: differences, checks, and the report of all of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvx.runtime.decoding.backend import Backend


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: what was compared on which backend, the largest absolute difference per tensor, what was seen."""

    backend: str
    name: str
    passed: bool
    detail: str
    differences: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, in which an infinite difference is None."""
        finite = {tensor: worst if np.isfinite(worst) else None for tensor, worst in self.differences.items()}
        return asdict(self) | {"differences": finite}


@dataclass(frozen=True, slots=True)
class ParityReport:
    """All findings of one proof, and the tolerance they were judged by."""

    tolerance: float
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that the manifest holds."""
        return {
            "passed": self.passed,
            "tolerance": self.tolerance,
            "checks": [check.to_dict() for check in self.checks],
        }


class Differences:
    """The largest difference of each tensor, and the largest value that eager has in it."""

    def __init__(self) -> None:
        self.worst: dict[str, float] = {}
        self._scale: dict[str, float] = {}

    def add(self, name: str, expected: NDArray[Any], got: NDArray[Any], unit: float | None = None) -> None:
        """Compares two arrays; another shape, or a value on either side that is not finite, differs by infinity. The
        tolerance is in `unit`s where there is one, however large the values.
        """
        comparable = got.shape == expected.shape and bool(np.isfinite(got).all() and np.isfinite(expected).all())
        difference = float(np.abs(got - expected).max(initial=0.0)) if comparable else np.inf
        size = float(np.abs(expected).max(initial=0.0)) if comparable else 0.0
        self.worst[name] = max(self.worst.get(name, 0.0), difference)
        self._scale[name] = max(self._scale.get(name, 1.0), size) if unit is None else unit

    def require_equal(self, name: str, expected: NDArray[Any], got: NDArray[Any]) -> None:
        """Records any difference at all as infinite."""
        self.add(name, np.zeros(1), np.zeros(1) if np.array_equal(expected, got) else np.full(1, np.inf))

    def check(self, backend: Backend, name: str, tolerance: float) -> Check:
        """The finding: passed where no tensor is over the tolerance."""
        over = [tensor for tensor, worst in self.worst.items() if worst > tolerance * self._scale[tensor]]
        tensor = max(self.worst, key=lambda tensor: self.worst[tensor] / self._scale[tensor])
        detail = f"largest difference {self.worst[tensor]:.2g} in {tensor}"
        if over:
            detail += f", over {tolerance:g} × {self._scale[tensor]:.3g}; {len(over)} of {len(self.worst)} tensors"
        return Check(backend.name, name, not over, detail, dict(self.worst))
