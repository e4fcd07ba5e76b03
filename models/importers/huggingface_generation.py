"""How the owner of a Hugging Face checkpoint searches with it: generation_config.json, else config.json.

What the settings mean is said by `GenerationConfig` and the processors of transformers 5
(https://github.com/huggingface/transformers/tree/v5.0.0/src/transformers/generation).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvx.runtime.bundle.framing import Framing
from kvx.runtime.bundle.manifest import Default

MOST_UNASKED = 256  # tokens of a translation, where a checkpoint has no limit of its own
ENDING = "forced_eos_token_id"

# What changes a search and has no equal here, with the values that change nothing.
WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "do_sample": (False,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "sequence_bias": (),
    "begin_suppress_tokens": ([],),
    "renormalize_logits": (False,),
    "guidance_scale": (1.0,),
}


class Generation:
    """The settings of both files; one that is null is not set."""

    def __init__(self, generation: Mapping[str, Any], config: Mapping[str, Any], *origins: str) -> None:
        self._files = tuple(zip(origins, (generation, config), strict=True))
        self.settings = {**_set(config), **_set(generation)}

    def limit(self, most: int, forced: int) -> tuple[int, tuple[str, ...]]:
        """The default limit of a translation in tokens after those that are forced, `most` at the most, with notes."""
        new, length = self._count("max_new_tokens"), self._count("max_length")
        wanted = new if new is not None or length is None else length - 1
        if wanted is None:
            limit, none = min(most, MOST_UNASKED), "the checkpoint has none of its own; `max_new_tokens` overrides"
            return limit, (f"took {limit} tokens as the limit of a translation ({none})",)
        limit = max(1, wanted - forced)
        if limit <= most:
            return limit, ()
        more = f"took {most} tokens as the limit of a translation instead of {limit}, for which there are no positions"
        return most, (more,)

    def defaults(self, framing: Framing) -> tuple[dict[str, Default], tuple[str, ...]]:
        """The options of a translation that the checkpoint sets, by name, and notes on what has no equal here."""
        found = {name: Default(value, self._origin(theirs)) for name, value, theirs in self._options(framing)}
        return found, tuple(self._unknown(framing))

    def _options(self, framing: Framing) -> Iterator[tuple[str, Any, str]]:
        """Name and value of each option, and the setting that says so."""
        beams, ngrams = self._count("num_beams"), self._count("no_repeat_ngram_size")
        if beams is not None and beams > 1:
            yield "beam_size", beams, "num_beams"
            yield from self._beams()
        if ngrams is not None:
            yield "no_repeated_ngrams", ngrams, "no_repeat_ngram_size"
        penalty = self._number("repetition_penalty", 1.0)
        if penalty != 1.0:
            yield "repetition_penalty", penalty, "repetition_penalty"
        least = self._least(len(framing.forced))
        if least is not None and least[0] > 1:
            yield ("min_new_tokens", *least)
        if self.settings.get(ENDING) in (framing.eos, [framing.eos]):
            yield "end_at_limit", True, ENDING
        if self.settings.get("suppress_tokens"):
            yield "suppress", self.settings["suppress_tokens"], "suppress_tokens"
        several = [ids for ids in self.settings.get("bad_words_ids", ()) if isinstance(ids, list) and len(ids) > 1]
        if several:
            yield "banned", several, "bad_words_ids"

    def _beams(self) -> Iterator[tuple[str, Any, str]]:
        """What goes with beams. What is not set has a default of the number of beams."""
        early = self.settings.get("early_stopping", False)
        said = {name: name if name in self.settings else "num_beams" for name in ("length_penalty", "early_stopping")}
        yield "length_penalty", self._number("length_penalty", 1.0), said["length_penalty"]
        yield "early_stopping", early is True, said["early_stopping"]
        if early != "never":
            yield "beam_rules", "transformers", said["early_stopping"]

    def _least(self, forced: int) -> tuple[int, str] | None:
        """The shortest translation in tokens after those that are forced, eos included, and what says so."""
        new, length = self._count("min_new_tokens"), self._count("min_length")
        if new is not None:
            return new + 1 - forced, "min_new_tokens"
        return None if length is None else (length - forced, "min_length")

    def _unknown(self, framing: Framing) -> Iterator[str]:
        for name, harmless in WITHOUT_EFFECT.items():
            value = self.settings.get(name)
            if value is not None and value not in harmless:
                yield f"left out {name} = {value!r:.60} of {self._origin(name)}, which has no equal here"
        ending = self.settings.get(ENDING)
        if ending is not None and ending not in (framing.eos, [framing.eos]):
            yield f"left out {ENDING} = {ending!r:.60} of {self._origin(ENDING)}, which is not the end token"

    def _count(self, setting: str) -> int | None:
        value = self.settings.get(setting)
        return value if type(value) is int and value > 0 else None

    def _number(self, setting: str, default: float) -> float:
        value = self.settings.get(setting)
        return float(value) if isinstance(value, int | float) else default

    def _origin(self, setting: str) -> str:
        return next(file for file, values in self._files if values.get(setting) is not None)


def _set(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
