"""ONNX Runtime with its telemetry off. All of kvx imports it from here, because it reads the variable at its import."""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else it writes below ~/.cache and looks up a host

import onnxruntime as ort

__all__ = ["ort"]
