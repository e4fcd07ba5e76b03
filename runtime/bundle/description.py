"""A bundle in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kvx.runtime import kernels
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.framing import Framed, Languages
from kvx.runtime.bundle.graphs import OWN_STEP_FILE
from kvx.runtime.bundle.signature import Signature


def describe(bundle: Bundle) -> Iterator[str]:
    """Lines on a bundle's model, graphs, files, limits, cache and proof."""
    manifest = bundle.manifest
    model, framing = manifest.model, manifest.framing
    yield f"{bundle.folder}, created {manifest.created} by kvx {manifest.kvx_version}"
    yield (
        f"model: {manifest.family}, {model['encoder_layers']} + {model['decoder_layers']} layers, "
        f"d_model {model['d_model']}, {_both(model, 'heads')} heads, d_ff {_both(model, 'd_ff')}, "
        f"vocabularies {model['source_vocab_size']} → {model['target_vocab_size']}"
    )
    yield f"{', '.join(bundle.formats)}; {manifest.precision}, lowering {manifest.lowering}, opset {manifest.opset}"
    yield f"kvx's own operators: {_own_operators(bundle)}"
    yield ""
    for name, signature in manifest.graphs.items():
        yield from _describe_signature(name, signature)
    yield "files"
    missing = bundle.missing
    for name, entry in manifest.files.items():
        note = "  (missing)" if name in missing else ""
        yield f"  {name:<24} {entry.bytes:>14,} bytes  sha256 {entry.sha256[:16]}…{note}"
    yield ""
    yield "texts"
    yield f"  source: {_framed(framing.prefix)}pieces {_framed(framing.suffix)}".rstrip()
    if framing.text_prefix:
        yield f"  before every text: {framing.text_prefix!r}"
    yield f"  target: {_framed((framing.start, *framing.forced))}pieces {framing.eos}"
    if framing.never:
        yield f"  never in a target: {', '.join(map(str, framing.never))}"
    for side, tokenizer in manifest.tokenizers.items():
        files = f" ({', '.join(tokenizer.files.values())})" if tokenizer.files else ""
        yield f"  tokenizer of the {side}: {tokenizer.kind}{files}"
    yield from _describe_languages(manifest.languages)
    yield ""
    if manifest.defaults:
        yield "defaults of a translation"
        for name, default in manifest.defaults.items():
            yield f"  {name} {default.value}  ({default.origin})"
        yield ""
    yield "limits"
    if model.get("positions") == "relative":
        yield "  positions are relative: sources and targets of any length"
    else:
        yield f"  source positions {model['source_positions']}, target positions {model['target_positions']}"
    yield f"  new tokens by default {manifest.max_new_tokens}"
    yield (
        f"  cache bytes per source token {manifest.cache_bytes(target=0, source=1):,}, "
        f"per target token {manifest.cache_bytes(target=1, source=0):,}"
    )
    if (bits := manifest.features.cache_bits) is not None:
        coded = manifest.cache_bytes(target=1, source=0, cache_bits=bits)
        yield f"  cache bytes per target token {coded:,} in codes of {bits} bits, where kvx's own operators are used"
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


def _own_operators(bundle: Bundle) -> str:
    """Whether the bundle has graphs with them, and whether this machine runs these."""
    if OWN_STEP_FILE not in bundle.manifest.files:
        return "the bundle has no graphs with them"
    version = bundle.manifest.operators
    if kernels.run(version):
        return f"used on the CPU here, with {kernels.instructions()}"
    return f"not used here: {kernels.lacking(version)}"


def _both(model: Mapping[str, Any], size: str) -> str:
    """A size of the encoder and of the decoder, once where they are alike."""
    encoder, decoder = model[f"encoder_{size}"], model[f"decoder_{size}"]
    return str(encoder) if encoder == decoder else f"{encoder} + {decoder}"


def _framed(framed: Iterable[Framed]) -> str:
    """Ids and places of languages, each with a space after it."""
    return "".join(f"{one if isinstance(one, int) else f'<{one}>'} " for one in framed)


def _describe_languages(languages: Languages) -> Iterator[str]:
    for side, codes, default in (
        ("source", languages.source, languages.default_source),
        ("target", languages.target, languages.default_target),
    ):
        if codes:
            yield f"  {side} languages{f', {default} by default' if default else ''}: {', '.join(codes)}"
    if languages.marked:
        yield "  a text may begin with its target language: >>code<<"


def _describe_signature(name: str, signature: Signature) -> Iterator[str]:
    yield name
    for side, specs in (("in", signature.inputs), ("out", signature.outputs)):
        for spec in specs:
            yield f"  {side:<3} {spec.name:<36} {spec.dtype:<8} [{', '.join(map(str, spec.axes))}]"
    yield ""
