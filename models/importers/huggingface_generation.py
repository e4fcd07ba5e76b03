"""How a Hugging Face checkpoint is searched with: generation_config.json, or where there is none config.json.
config.json.

What the settings mean is said by `GenerationConfig` and the processors of transformers 5
(https://github.com/huggingface/transformers/tree/v5.0.0/src/transformers/generation).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvx.models.importers.checkpoint import MOST_UNASKED
from kvx.runtime.bundle.framing import Framing
from kvx.runtime.bundle.manifest import Default

MOST_PENALTY = 50
ENDING = "forced_eos_token_id"

# What changes a search and has no equal here, with the values that change nothing.
WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "do_sample": (False,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1.0,),  # transformers counts the ids that a target begins with, and with beams probabilities
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "sequence_bias": (),
    "begin_suppress_tokens": ([],),
    "renormalize_logits": (False,),
    "guidance_scale": (1.0,),
    "stop_strings": (),
    "force_words_ids": (),
    "constraints": (),
    "remove_invalid_values": (False,),
}


class Generation:
    """The `settings` of one of the files; what is null is not set. `origin` is the name of that file."""

    def __init__(self, settings: Mapping[str, Any], origin: str) -> None:
        self.settings = {name: value for name, value in settings.items() if value is not None}
        self.origin = origin

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

    def defaults(self, framing: Framing, vocabulary: int, limit: int) -> tuple[dict[str, Default], tuple[str, ...]]:
        """The options of a translation that the checkpoint sets, by name, and notes on what has no equal here, for a
        target `vocabulary` and a `limit` of new tokens.
        """
        possible = set(range(vocabulary)) - {framing.eos}
        found = {name: Default(value, self.origin) for name, value in self._options(framing, possible, limit)}
        return found, tuple(self._unknown(framing))

    def _options(self, framing: Framing, possible: set[int], limit: int) -> Iterator[tuple[str, Any]]:
        """Name and value of each option. Only the `possible` ids can be kept out of targets."""
        beams, ngrams = self._count("num_beams"), self._count("no_repeat_ngram_size")
        if beams is not None and 1 < beams <= len(possible):
            yield "beam_size", beams
            yield from self._beams()
        if ngrams is not None:
            yield "no_repeated_ngrams", ngrams
        least = min(limit, self._least(len(framing.forced)))
        if least > 1:
            yield "min_new_tokens", least
        if self.settings.get(ENDING) in (framing.eos, [framing.eos]):
            yield "end_at_limit", True
        suppressed = [one for one in self._list("suppress_tokens") if one in possible]
        if suppressed:
            yield "suppress", suppressed
        lists = (ids for ids in self._list("bad_words_ids") if isinstance(ids, list) and len(ids) > 1)
        if several := [ids for ids in lists if possible.issuperset(ids)]:
            yield "banned", several

    def _beams(self) -> Iterator[tuple[str, Any]]:
        """What goes with beams, also where it is not set."""
        early = self.settings.get("early_stopping", False)
        yield "length_penalty", self._number("length_penalty", 1.0)
        yield "early_stopping", early is True
        if early != "never":
            yield "beam_rules", "transformers"

    def _least(self, forced: int) -> int:
        """The shortest translation in tokens after those that are forced, eos included."""
        new = self._count("min_new_tokens")
        return (self._count("min_length") or 1 if new is None else new + 1) - forced

    def _unknown(self, framing: Framing) -> Iterator[str]:
        for name, harmless in WITHOUT_EFFECT.items():
            value = self.settings.get(name)
            if value is not None and value not in harmless:
                yield f"left out {name} = {value!r:.60} of {self.origin}, which has no equal here"
        ending = self.settings.get(ENDING)
        if ending is not None and ending not in (framing.eos, [framing.eos]):
            yield f"left out {ENDING} = {ending!r:.60} of {self.origin}, which is not the end token"

    def _count(self, setting: str) -> int | None:
        value = self.settings.get(setting)
        return value if type(value) is int and value > 0 else None

    def _list(self, setting: str) -> list[Any]:
        value = self.settings.get(setting)
        return value if isinstance(value, list) else []

    def _number(self, setting: str, default: float) -> float:
        value = self.settings.get(setting)
        known = isinstance(value, int | float) and abs(value) <= MOST_PENALTY  # not so if it is no number
        return float(value) if known else default  # type: ignore[arg-type]
