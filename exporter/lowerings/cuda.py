"""The `cuda` lowering: in the decoder that feeds itself, what ONNX Runtime's CUDA provider has kernels for and what a
captured CUDA graph may hold. A test holds only that graph to it: of the others, none of which is captured, ONNX Runtime
may put some operators on the host.

In float16 and bfloat16, `GroupQueryAttention` with packed queries, keys and values over the decoder's own cache, as in
the `ort` lowering; over the source ai.onnx `Attention` with `nonpad_kv_seqlen`, which takes the flash kernel, gives
zeros for an empty source and has no cache of its own to give back. In float32 that provider has no
`GroupQueryAttention`, so there the `standard` operators are it: nothing of them in that graph runs on the host.

`GroupQueryAttention` reads total_sequence_length on the host. It is the capacity, from the shape of the cache, and
`Shape` and `Cast` of it run on the host when a graph is captured, never when it is replayed: that is right, since the
shapes of a captured graph do not change, and it leaves no copy between host and device, which capture would refuse
(https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html, using CUDA graphs).

Letters: B rows, S source positions, E model width, H heads, D head width.
"""

from __future__ import annotations

from torch import Tensor

from kvx.exporter.lowerings.ort import OrtOperators
from kvx.exporter.lowerings.standard import StandardOperators
from kvx.models.layers import Attention, KeyValue


class CudaOperators(OrtOperators):
    """The `ort` lowering without outputs for the source's keys and values."""

    def cross_attention(
        self, attention: Attention, x: Tensor, cross: KeyValue, source_lengths: Tensor
    ) -> tuple[Tensor, KeyValue]:
        """One token, x [B, E], or several, [B, Q, E]; cross [B, H, S, D], source_lengths [B] → like x, and cross."""
        return StandardOperators.cross_attention(self, attention, x, cross, source_lengths)
