"""A bundle in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.signature import Signature


def describe(bundle: Bundle) -> Iterator[str]:
    """Lines on a bundle's model, graphs, files, limits, cache and proof."""
    manifest = bundle.manifest
    model = manifest.model
    yield f"{bundle.folder}, created {manifest.created} by kvx {manifest.kvx_version}"
    yield (
        f"model: {model['encoder_layers']} + {model['decoder_layers']} layers, d_model {model['d_model']}, "
        f"{model['heads']} heads, d_ff {model['d_ff']}, vocabularies {model['source_vocab_size']} → "
        f"{model['target_vocab_size']}"
    )
    yield f"{', '.join(bundle.formats)}; {manifest.precision}, lowering {manifest.lowering}, opset {manifest.opset}"
    yield ""
    for name, signature in manifest.graphs.items():
        yield from _describe_signature(name, signature)
    yield "files"
    missing = bundle.missing
    for name, entry in manifest.files.items():
        note = "  (missing)" if name in missing else ""
        yield f"  {name:<24} {entry.bytes:>14,} bytes  sha256 {entry.sha256[:16]}…{note}"
    yield ""
    yield "limits"
    yield f"  source positions {model['source_positions']}, target positions {model['target_positions']}"
    yield f"  new tokens by default {manifest.max_new_tokens}"
    yield (
        f"  cache bytes per source token {manifest.cache_bytes(target=0, source=1):,}, "
        f"per target token {manifest.cache_bytes(target=1, source=0):,}"
    )
    yield ""
    yield from describe_parity(manifest.parity)


def describe_parity(parity: Mapping[str, Any] | None, *, tensors: bool = True) -> Iterator[str]:
    """Lines on a parity report in its JSON form, with the largest difference of each tensor or only of each check."""
    if parity is None:
        yield "parity: not proven (exported without a proof)"
        return
    yield f"parity with eager PyTorch: {'passed' if parity['passed'] else 'FAILED'} (tolerance {parity['tolerance']:g})"
    for check in parity["checks"]:
        yield f"  {'ok  ' if check['passed'] else 'FAIL'} {check['backend']}: {check['name']}: {check['detail']}"
        if tensors and len(check["differences"]) > 1:
            for tensor, difference in check["differences"].items():
                yield f"         {tensor:<44} {'not finite' if difference is None else f'{difference:.2g}'}"


def _describe_signature(name: str, signature: Signature) -> Iterator[str]:
    yield name
    for side, specs in (("in", signature.inputs), ("out", signature.outputs)):
        for spec in specs:
            yield f"  {side:<3} {spec.name:<36} {spec.dtype:<8} [{', '.join(map(str, spec.axes))}]"
    yield ""
