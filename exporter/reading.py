"""What is exported: a checkpoint, its limit, and everything that it needs to be given texts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from kvx.exporter.options import ExportOptions
from kvx.exporter.progress import Progress
from kvx.models.importers import Checkpoint, load_checkpoint
from kvx.models.importers.padding import cut_to_vocabularies
from kvx.models.importers.text import Text, TokenizerFiles
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.framing import Framing, Languages
from kvx.runtime.bundle.manifest import TOKENIZERS, TokenizerEntry
from kvx.runtime.decoding.plan import check_limit
from kvx.runtime.errors import OptionError, TokenizerError
from kvx.runtime.rules import Problem, refuse
from kvx.runtime.text.languages import expected_code
from kvx.runtime.text.sources import load_tokenizer
from kvx.runtime.text.tokenizers.sentencepiece import SentencePiece

FILES = {  # by role
    "model": "model",
    "vocabulary": "vocabulary.json",
    "tokenizer": "tokenizer.json",
    "codes": "bpe.codes",
}
SHARED_FILES = {**FILES, "model": "tokenizer.model"}


def read_checkpoint(options: ExportOptions, progress: Progress) -> tuple[Checkpoint, Text]:
    """The checkpoint with the limit that the bundle shall have, and its texts' side. Raises CheckpointError,
    TokenizerError and OptionError.
    """
    checkpoint = load_checkpoint(options.checkpoint, heads=options.heads, layout=options.layout)
    heads = checkpoint.model.config.decoder_heads
    if options.heads not in (None, heads):
        raise OptionError(
            f"`heads` is {options.heads}",
            expected=f"the checkpoint's own {heads}",
            remedy="Leave it out.",
            option="heads",
        )
    checkpoint, text = _with_text(checkpoint, options)
    for note in checkpoint.notes:
        progress.note(note)
    limit = checkpoint.max_new_tokens if options.max_new_tokens is None else options.max_new_tokens
    check_limit(limit, checkpoint.model.config.target_positions - len(text.framing.forced))
    if options.text_prefix is not None:
        text = replace(text, framing=replace(text.framing, text_prefix=options.text_prefix))
    return replace(checkpoint, max_new_tokens=limit), _with_default_languages(text, options)


def write_tokenizers(folder: Path, text: Text) -> dict[str, TokenizerEntry]:
    """The tokenizers' files in the folder of a bundle; one that serves both sides is there once."""
    if text.source == text.target:
        entry = _write_tokenizer(folder, text.source, SHARED_FILES)
        return dict.fromkeys(TOKENIZERS, entry)
    sides = zip(TOKENIZERS, (text.source, text.target), strict=True)
    return {
        side: _write_tokenizer(folder, tokenizer, {role: f"{side}.{name}" for role, name in FILES.items()})
        for side, tokenizer in sides
    }


def check_tokenizers(bundle: Bundle) -> None:
    """Raises TokenizerError where the tokenizers of a bundle cannot be loaded, or know more than its model."""
    for side in ("source", "target"):
        load_tokenizer(bundle, side)


def _write_tokenizer(folder: Path, tokenizer: TokenizerFiles, names: Mapping[str, str]) -> TokenizerEntry:
    for role, content in tokenizer.files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, folder / names[role])
        else:
            (folder / names[role]).write_bytes(content)
    return TokenizerEntry(tokenizer.kind, {role: names[role] for role in tokenizer.files})


def _with_text(checkpoint: Checkpoint, options: ExportOptions) -> tuple[Checkpoint, Text]:
    """The text side that comes with a checkpoint, or sentencepiece models beside it, to whose pieces it is cut."""
    if checkpoint.text is not None:
        refuse(_tokenizers_of_its_own(options))
        return checkpoint, checkpoint.text
    paths = _tokenizer_paths(options)
    tokenizers = [SentencePiece(path) for path in paths]
    sizes = len(tokenizers[0]), len(tokenizers[1])
    model, notes = cut_to_vocabularies(checkpoint.model, *sizes)
    _check_sizes(paths, sizes, (model.config.source_vocab_size, model.config.target_vocab_size))
    source, target = (TokenizerFiles("sentencepiece", {"model": path}) for path in paths)
    framing = Framing.plain(tokenizers[0].special_ids, tokenizers[1].special_ids)
    text = Text(source, target, framing, Languages(), ())
    return replace(checkpoint, model=model, notes=(*checkpoint.notes, *notes)), text


def _tokenizer_paths(options: ExportOptions) -> tuple[Path, Path]:
    return (
        options.tokenizer_path("source.model", options.source_tokenizer),
        options.tokenizer_path("target.model", options.target_tokenizer),
    )


def _check_sizes(paths: tuple[Path, Path], sizes: tuple[int, int], expected: tuple[int, int]) -> None:
    named = zip(paths, sizes, expected, ("source_tokenizer", "target_tokenizer"), strict=True)
    for path, size, rows, option in named:
        if size != rows:
            raise TokenizerError(
                f"{path} has {size} pieces",
                expected=f"{rows}, the rows of the model's embedding",
                remedy=f"Name the tokenizer that the model was trained with (`{option}`).",
                option=option,
            )


def _tokenizers_of_its_own(options: ExportOptions) -> Iterator[Problem]:
    for name in ("source_tokenizer", "target_tokenizer"):
        if getattr(options, name) is not None:
            yield Problem(
                name, f"`{name}` has no effect with this checkpoint", f"the tokenizers in {options.checkpoint}"
            )


def _with_default_languages(text: Text, options: ExportOptions) -> Text:
    """The text side with the default languages that the options name. Raises OptionError."""
    languages = text.languages
    for side in ("source", "target"):
        option = f"default_{side}_language"
        chosen, codes = getattr(options, option), getattr(languages, side)
        if chosen is None:
            continue
        if chosen not in codes:
            refuse([Problem(option, f"`{option}` is {chosen!r}", expected_code(chosen, codes))])
        languages = replace(languages, **{f"default_{side}": chosen})
    return replace(text, languages=languages)
