"""Folders of small models of every family, as `save_pretrained` leaves them: made and trained here, in seconds.

The task: repeat the words of a sentence in the target language, in the same order or backwards, which the language
decides where a model has any. A model that was never trained says the same whatever it is asked.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvx import Translator
from kvx.runtime.text.tokenizers.protocol import Tokenizer
from kvx.runtime.text.tokenizers.registry import open_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")

WORDS = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf"]
LONGEST = 4  # words of a sentence
SIZES: Mapping[int, Mapping[str, int]] = {  # by seed
    0: {
        "d_model": 36,
        "encoder_layers": 2,
        "encoder_attention_heads": 3,
        "encoder_ffn_dim": 50,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 70,
    },
    1: {
        "d_model": 48,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_layers": 2,
        "decoder_attention_heads": 6,
        "decoder_ffn_dim": 40,
    },
}
RELATIVE_SIZES: Mapping[int, Mapping[str, int]] = {  # transformers has no cache for more decoder layers than encoder's
    0: {
        "d_model": 36,
        "d_kv": 10,
        "num_heads": 3,
        "num_layers": 2,
        "num_decoder_layers": 1,
        "d_ff": 50,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 10,
    },
    1: {"d_model": 48, "d_kv": 16, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2, "d_ff": 64},
}
STEPS, BATCH, RATE = 1600, 48, 4e-3  # at most so many
BEAMS: dict[str, Any] = {"beam_size": 4, "early_stopping": False, "beam_rules": "transformers"}
WARM_UP, LEARNT, WINDOW = 60, 0.03, 30  # the mean loss of the last steps at which it has learnt the task


@dataclass(frozen=True)
class Kind:
    """How the tokenizer and the model of a family are made. Of two target languages the second reads backwards."""

    tokenizer: Callable[[Path], Any]
    model: str
    config: Callable[[Any], dict[str, Any]]
    languages: tuple[str, str, str] | None = None  # source, and two targets
    relative: bool = False  # positions, with sizes by the names of T5
    after: bool = False  # a language stands after eos, and a target begins with its own


@dataclass(frozen=True)
class Made:
    """A folder, with the model and the tokenizer that wrote it."""

    name: str
    folder: Path
    kind: Kind
    model: Any
    tokenizer: Any

    @property
    def languages(self) -> tuple[str | None, ...]:
        """Those that a text can be translated to."""
        return (None,) if self.kind.languages is None else self.kind.languages[1:]

    @property
    def source_language(self) -> str | None:
        """That of every text."""
        return None if self.kind.languages is None else self.kind.languages[0]

    def source_ids(self, text: str, target: str | None = None) -> list[int]:
        """The ids of a text as the original has them."""
        if self.kind.model == "MarianMTModel" and target is not None:
            text = f">>{target}<< {text}"
        ids: list[int] = self.tokenizer(text).input_ids
        return ids

    def start_ids(self, target: str | None) -> list[int]:
        """The ids that a target begins with."""
        config = self.model.config
        if self.kind.model == "MarianMTModel" or target is None:
            return [config.decoder_start_token_id]
        language = self.language_id(target)
        return [language] if self.kind.after else [config.decoder_start_token_id, language]

    def language_id(self, code: str) -> int:
        """The id of a language."""
        if hasattr(self.tokenizer, "get_lang_id"):
            return int(self.tokenizer.get_lang_id(code))
        return int(self.tokenizer.convert_tokens_to_ids(code))

    def target_ids(self, text: str) -> list[int]:
        """The ids of a target's text and eos."""
        found = self.tokenizer(text_target=text).input_ids if self._marian else self.tokenizer(text).input_ids
        eos, special = self.model.config.eos_token_id, set(self.tokenizer.all_special_ids)
        kept = [one for one in found if one not in special or one == self.tokenizer.unk_token_id]
        if self.kind.languages is not None:
            codes = {self.language_id(code) for code in self.kind.languages} if not self._marian else set()
            kept = [one for one in kept if one not in codes]
        return [*kept, eos]

    def generate(self, text: str, target: str | None, **options: Any) -> list[int]:  # noqa: ANN401
        """What the original gives for one text, without the ids that a target begins with."""
        start = self.start_ids(target)
        forced = {"forced_bos_token_id": start[1]} if len(start) > 1 else {}
        begin = {"decoder_start_token_id": start[0]}
        ids = torch.tensor([self.source_ids(text, target)])
        with torch.inference_mode():
            found = self.model.generate(input_ids=ids, **begin, **forced, **options)
        return found[0].tolist()[len(start) :]  # type: ignore[no-any-return]

    def logits(self, text: str, target: str | None, given: Sequence[int]) -> Any:  # noqa: ANN401
        """Teacher-forced logits [T, V] of the ids of a target, from its start on."""
        source = torch.tensor([self.source_ids(text, target)])
        fed = torch.tensor([[*self.start_ids(target), *given]])
        with torch.inference_mode():
            return self.model(input_ids=source, decoder_input_ids=fed).logits[0]

    @property
    def _marian(self) -> bool:
        return self.kind.model == "MarianMTModel"


@dataclass(frozen=True)
class Exported:
    """A model, and the translator of its bundle."""

    made: Made
    translator: Translator

    def ids(self, texts: list[str], target: str | None, options: dict[str, Any], **more: Any) -> list[list[int]]:  # noqa: ANN401
        source = self.made.source_language if self.translator.manifest.languages.source else None
        forced = len(self.made.start_ids(target)) - 1
        counted = {
            name: value - forced if name in ("max_new_tokens", "min_new_tokens") else value
            for name, value in options.items()
        }
        found = self.translator.translate(texts, source_language=source, target_language=target, **counted, **more)
        return [list(one.ids) for one in found]


def sentences(count: int, seed: int) -> list[str]:
    """Sentences of few words."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, LONGEST))) for _ in range(count)]


def translation(text: str, target: str | None, kind: Kind) -> str:
    """What a trained model should say."""
    backwards = kind.languages is None or target == kind.languages[2]
    words = text.split()
    return " ".join(words[::-1] if backwards else words)


def make(
    name: str,
    folder: Path,
    seed: int = 0,
    *,
    tied: bool = True,
    steps: int = STEPS,
    generation: Mapping[str, Any] | None = None,
    heads: int | None = None,
) -> Made:
    """A folder of a family's model of random weights that was trained for this many steps, perhaps with as many heads
    on both sides.
    """
    kind = KINDS[name]
    tokenizer = kind.tokenizer(folder / "tokenizer")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    model_class = getattr(transformers, kind.model)
    if kind.relative:
        config = model_class.config_class(**RELATIVE_SIZES[seed], dropout_rate=0.0, **kind.config(tokenizer))
    else:
        values = {**SIZES[seed], "max_position_embeddings": 40, "dropout": 0.0, "attention_dropout": 0.0}
        values |= {f"{side}_attention_heads": heads for side in ("encoder", "decoder") if heads}
        config = model_class.config_class(**values, **kind.config(tokenizer), tie_word_embeddings=tied)
    model = model_class(config).eval()
    if kind.relative and not tied:  # which version 5 knows by the file alone
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    made = Made(name, folder, kind, model, tokenizer)
    _disturb(model, seed)
    if steps:
        _train(made, steps, seed)
    ids = {key: value for key, value in kind.config(tokenizer).items() if key.endswith("_token_id")}
    model.generation_config = transformers.GenerationConfig(**ids, max_length=24, **(generation or {}))
    if kind.model == "MarianMTModel":
        model.generation_config.bad_words_ids = [[config.pad_token_id]]
        model.generation_config.forced_eos_token_id = config.eos_token_id
    model.save_pretrained(folder)
    return made


def _disturb(model: Any, seed: int) -> None:  # noqa: ANN401
    """Random values also where a new model has zeros and ones: biases, norms, the bias of the logits."""
    chance = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in (one for one in model.parameters() if one.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=chance) * 0.05)
        pad = model.config.pad_token_id
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.copy_(torch.randn(model.final_logits_bias.shape, generator=chance) * 0.1)
            model.final_logits_bias[0, pad] = 0
        if model.config.model_type == "marian":
            model.get_decoder().embed_tokens.weight[pad] = 0


def _train(made: Made, steps: int, seed: int) -> None:
    """Teacher forcing on the task."""
    model, chance = made.model, random.Random(seed)
    pairs = [
        (
            made.source_ids(text, target),
            [*made.start_ids(target), *made.target_ids(translation(text, target, made.kind))],
        )
        for text in sentences(600, seed + 10)
        for target in made.languages
    ]
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) / (1 + step / 500)
    )
    losses: list[float] = []
    pad = model.config.pad_token_id
    model.train()
    for _ in range(steps):
        some = chance.sample(pairs, BATCH)
        source, target = (
            torch.nn.utils.rnn.pad_sequence([torch.tensor(one[side]) for one in some], True, -1) for side in (0, 1)
        )
        seen, fed, labels = source >= 0, target[:, :-1], target[:, 1:]
        logits = model(input_ids=source.clamp(min=0), attention_mask=seen, decoder_input_ids=fed.clamp(min=0)).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        if model.config.model_type == "marian":
            model.get_decoder().embed_tokens.weight.grad[pad] = 0
        optimizer.step()
        schedule.step()
        losses = [*losses[1 - WINDOW :], float(loss)]
        if len(losses) == WINDOW and sum(losses) < WINDOW * LEARNT:
            break
    model.eval()


def _padded(rows: Sequence[Sequence[int]]) -> Any:  # noqa: ANN401
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-1)


def _sentencepiece(path: Path, **ids: int) -> list[str]:
    """A small model of the words; its pieces."""
    return train_sentencepiece(path, sentences(300, 1), ids, vocab_size=45, model_type="unigram")


def train_sentencepiece(path: Path, corpus: Sequence[str], ids: Mapping[str, int], **options: Any) -> list[str]:  # noqa: ANN401
    """A model of a corpus, written to a path, with these special ids or the usual ones; its pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
        **(ids or {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [processor.id_to_piece(one) for one in range(processor.get_piece_size())]


def _write(path: Path, values: object) -> str:
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    return str(path)


def opened(files: Any, folder: Path) -> Tokenizer:  # noqa: ANN401
    """A tokenizer that an importer found, as a bundle has it."""
    folder.mkdir(exist_ok=True)
    paths = {}
    for role, content in files.files.items():
        paths[role] = folder / f"{files.kind}-{role}"
        paths[role].write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return open_tokenizer(files.kind, paths)


def numbered(*pieces: str) -> dict[str, int]:
    return {piece: one for one, piece in enumerate(dict.fromkeys(pieces))}


def _marian(folder: Path, languages: Sequence[str] = ()) -> Any:  # noqa: ANN401
    pieces = [_sentencepiece(folder / name) for name in ("source.spm", "target.spm")]
    marks = [f">>{code}<<" for code in languages]
    ids = numbered("</s>", "<unk>", *pieces[0][3:], *pieces[1][3:], *marks, "<pad>")
    spm = (str(folder / "source.spm"), str(folder / "target.spm"))
    return transformers.MarianTokenizer(*spm, _write(folder / "vocab.json", ids))


def _marian_apart(folder: Path) -> Any:  # noqa: ANN401
    source, target = (_sentencepiece(folder / name) for name in ("source.spm", "target.spm"))
    files = {
        "vocab.json": numbered("</s>", "<unk>", *source[3:], *"xyz", "<pad>"),
        "target_vocab.json": numbered("</s>", "<unk>", *target[3:], "<pad>"),
    }
    paths = [_write(folder / name, ids) for name, ids in files.items()]
    spm = (str(folder / "source.spm"), str(folder / "target.spm"))
    return transformers.MarianTokenizer(*spm, *paths, separate_vocabs=True)


def _m2m100(folder: Path) -> Any:  # noqa: ANN401
    pieces = _sentencepiece(folder / "sentencepiece.bpe.model")
    vocabulary = _write(folder / "vocab.json", numbered("<s>", "<pad>", "</s>", "<unk>", *pieces[3:]))
    return transformers.M2M100Tokenizer(vocabulary, str(folder / "sentencepiece.bpe.model"), src_lang="de")


def _nllb(folder: Path) -> Any:  # noqa: ANN401
    converting = importlib.import_module("transformers.convert_slow_tokenizer")
    bpe = pytest.importorskip("tokenizers").models.BPE
    path = folder / "sentencepiece.bpe.model"
    train_sentencepiece(path, sentences(300, 1), {}, vocab_size=60, model_type="bpe")
    values = converting.NllbConverter.convert_from_spm(**converting.SentencePieceExtractor(str(path)).extract(bpe))
    del values["additional_special_tokens"]
    return transformers.NllbTokenizer(**values, src_lang="deu_Latn")


def _from_sentencepiece(kind: str, name: str, **values: Any) -> Callable[[Path], Any]:  # noqa: ANN401
    def made(folder: Path) -> Any:  # noqa: ANN401
        ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} if name == "spiece.model" else {}
        _sentencepiece(folder / name, **ids)
        return getattr(transformers, kind).from_pretrained(folder, **values)

    return made


def _bart(folder: Path) -> Any:  # noqa: ANN401
    folder.mkdir(parents=True, exist_ok=True)
    bpe = pytest.importorskip("tokenizers").ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(sentences(300, 1), vocab_size=293, special_tokens=special, show_progress=False)
    bpe.save_model(str(folder))
    return transformers.BartTokenizer.from_pretrained(folder)


def _of_marian(tokenizer: Any) -> dict[str, Any]:  # noqa: ANN401
    last = len(tokenizer.encoder) - 1
    return {
        "vocab_size": last + 1,
        "pad_token_id": last,
        "decoder_start_token_id": last,
        "eos_token_id": 0,
        "activation_function": "swish",
        "scale_embedding": True,
    }


def _of_marian_apart(tokenizer: Any) -> dict[str, Any]:  # noqa: ANN401
    last = len(tokenizer.target_encoder) - 1
    return {
        **_of_marian(tokenizer),
        "decoder_vocab_size": last + 1,
        "share_encoder_decoder_embeddings": False,
        "pad_token_id": last,
        "decoder_start_token_id": last,
    }


def _of_fairseq(tokenizer: Any, **values: Any) -> dict[str, Any]:  # noqa: ANN401
    size = len(tokenizer.encoder) + 108 if hasattr(tokenizer, "num_madeup_words") else len(tokenizer)
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    return {"vocab_size": size, **ids, **values}


def _of_pegasus(tokenizer: Any) -> dict[str, Any]:  # noqa: ANN401
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return {"vocab_size": len(tokenizer), **ids, "scale_embedding": True, "activation_function": "relu"}


def _of_t5(tokenizer: Any, **values: Any) -> dict[str, Any]:  # noqa: ANN401
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return {"vocab_size": len(tokenizer) + 3, **ids, **values}


KINDS = {
    "marian": Kind(_marian, "MarianMTModel", _of_marian),
    "marian-apart": Kind(_marian_apart, "MarianMTModel", _of_marian_apart),
    "marian-languages": Kind(
        lambda folder: _marian(folder, ("fra", "nld")), "MarianMTModel", _of_marian, ("deu", "fra", "nld")
    ),
    "m2m100": Kind(_m2m100, "M2M100ForConditionalGeneration", _of_fairseq, ("de", "fr", "nl")),
    "nllb": Kind(_nllb, "M2M100ForConditionalGeneration", _of_fairseq, ("deu_Latn", "fra_Latn", "nld_Latn")),
    "bart": Kind(_bart, "BartForConditionalGeneration", _of_fairseq),
    "mbart50": Kind(
        _from_sentencepiece("MBart50Tokenizer", "sentencepiece.bpe.model", src_lang="de_DE"),
        "MBartForConditionalGeneration",
        lambda tokenizer: _of_fairseq(tokenizer, scale_embedding=True, activation_function="relu"),
        ("de_DE", "fr_XX", "nl_XX"),
    ),
    "mbart25": Kind(
        _from_sentencepiece("MBartTokenizer", "sentencepiece.bpe.model", src_lang="de_DE"),
        "MBartForConditionalGeneration",
        lambda tokenizer: _of_fairseq(tokenizer, scale_embedding=True) | {"decoder_start_token_id": None},
        ("de_DE", "fr_XX", "nl_XX"),
        after=True,
    ),
    "pegasus": Kind(
        _from_sentencepiece("PegasusTokenizer", "spiece.model"), "PegasusForConditionalGeneration", _of_pegasus
    ),
    "t5": Kind(_from_sentencepiece("T5Tokenizer", "spiece.model"), "T5ForConditionalGeneration", _of_t5, relative=True),
    "flan": Kind(
        _from_sentencepiece("T5Tokenizer", "spiece.model"),
        "T5ForConditionalGeneration",
        lambda tokenizer: _of_t5(tokenizer, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        relative=True,
    ),
    "mt5": Kind(
        _from_sentencepiece("T5Tokenizer", "spiece.model"), "MT5ForConditionalGeneration", _of_t5, relative=True
    ),
    "umt5": Kind(
        _from_sentencepiece("T5Tokenizer", "spiece.model"), "UMT5ForConditionalGeneration", _of_t5, relative=True
    ),
}
