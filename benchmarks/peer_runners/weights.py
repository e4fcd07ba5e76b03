"""The weights of a kvx model as benchmarks/peers.py writes them for its peers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class Weights:
    """The arrays of the state dict, each read when it is asked for, and the model's `config`."""

    def __init__(self, folder: Path) -> None:
        self._arrays = np.load(folder / "weights.npz")
        self.config: dict[str, int] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if self.config["attention_bias"]:
            raise ValueError("a model with attention biases, which the runners do not copy")

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        array: NDArray[np.float32] = self._arrays[name]
        return array

    def norm(self, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """γ and β of a norm that divides by the biased standard deviation, where kvx takes the unbiased one."""
        gamma = self[f"{name}.gamma"]
        width = gamma.shape[0]
        return (gamma * np.sqrt((width - 1) / width)).astype(np.float32), self[f"{name}.beta"]
