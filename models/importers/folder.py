"""The files of a folder that `save_pretrained` or a hub leaves: settings in JSON, weights in one file or in shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from kvx.models.importers.checkpoint import describe, read_file
from kvx.models.importers.tokenizer_settings import has, read_object
from kvx.runtime.bundle.files import is_lfs_pointer
from kvx.runtime.errors import CheckpointError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The tensors of a folder by name, mapped into memory where the format allows it, and the file or index that they
    come from. Raises CheckpointError.
    """
    for name in WEIGHTS:
        for file in (name, f"{name}.index.json"):
            path = folder / file
            if has(folder, file):
                return path, _read_shards(folder, path) if path.suffix == ".json" else read_tensors(path)
    raise CheckpointError(
        f"{folder} has no weights",
        expected=f"{' or '.join(WEIGHTS)}, or one of them in shards with an index",
        remedy="Save the model there with save_pretrained, or download all of its files.",
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of safetensors or of torch.save. Raises CheckpointError."""
    if is_lfs_pointer(path):
        raise _lfs(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = read_file(path, mapped=True)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"{path} holds {describe(content)}",
            expected="tensors by name",
            remedy="Save the model again with save_pretrained.",
        )
    return dict(content)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise CheckpointError(
            f"{path} cannot be read, because the package safetensors is not installed",
            expected="the packages that an export needs",
            remedy="Install them: pip install 'kvx[export]'",
        ) from None
    try:
        return load_file(path)
    except Exception as error:  # its own errors, and those of the system
        raise CheckpointError(
            f"{path} is truncated, damaged or no safetensors file ({str(error)[:120]})",
            expected="a file that save_pretrained wrote",
            remedy="Copy or download it again.",
        ) from None


def _read_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    """All tensors that an index lists, from the files that it names."""
    listed = read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise _unreadable(index, "it has no weight_map of tensors to files")
    shards = sorted(set(listed.values()))
    outside = [name for name in shards if Path(name).name != name]
    missing = [name for name in shards if name not in outside and not (folder / name).is_file()]
    if outside or missing:
        raise CheckpointError(
            f"{index} names {', '.join(outside or missing)}, {'outside the folder' if outside else 'not there'}",
            expected=f"{len(shards)} files in {folder}",
            remedy="Download the shards that are missing." if missing else "Do not use this checkpoint.",
        )
    tensors: dict[str, Tensor] = {}
    for name in shards:
        tensors |= read_tensors(folder / name)
    if lost := sorted(set(listed) - set(tensors)):
        raise CheckpointError(
            f"{index} lists {len(lost)} tensors that its files lack, such as {lost[0]}",
            expected="the tensors that the index lists",
            remedy="Download the shards again.",
        )
    return tensors


def _unreadable(path: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be used: {how}",
        expected="a JSON object, as save_pretrained writes it",
        remedy="Copy or download it again.",
    )


def _lfs(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a pointer of Git LFS, not the file itself",
        expected="the file itself",
        remedy="Fetch it with git lfs pull.",
    )
