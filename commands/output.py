"""Results as lines of text or JSON: what was one text stays one line, or one for each hypothesis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvx.runtime.decoding.results import DecodeStats
from kvx.runtime.engine.scoring import Ranking
from kvx.runtime.text.lines import one_field, one_line
from kvx.runtime.translation import Translation, strict_json


def translation_lines(translation: Translation, number: int, *, several: bool) -> Iterator[str]:
    """A line of tab-separated fields: the score and the alignment where they were asked for, before and after the text.

    Where there may be `several` hypotheses, a line each, with the number of the text before them.
    """
    for one in translation.hypotheses if several else (translation,):
        cells = [str(number)] if several else []
        cells += [] if one.score is None else [f"{one.score:.4f}"]
        fields = several or one.score is not None or one.alignment is not None
        cells.append(one_field(one.text) if fields else one_line(one.text))
        if one.alignment is not None:  # source-target, as Pharaoh and fast_align write it
            cells.append(" ".join(f"{source}-{target}" for target, source in enumerate(one.alignment)))
        yield "\t".join(cells)


def translation_json(translation: Translation) -> str:
    """An object a line."""
    return strict_json(translation.to_dict())


def format_ranking(candidates: Sequence[str], ranking: Ranking, *, choices: bool, as_json: bool) -> str:
    """A line on the candidates of one source."""
    best = ranking.scores[ranking.best]
    if as_json:
        scores = [
            {
                "text": text,
                "sum": score.sum,
                "per_token": score.per_token,
                "tokens": score.tokens,
                "log_probabilities": score.log_probabilities,
            }
            for text, score in zip(candidates, ranking.scores, strict=True)
        ]
        return strict_json({"best": ranking.best, "margin": ranking.margin, "scores": scores})
    if choices:
        margin = "" if ranking.margin is None else f"{ranking.margin:.4f}"
        return f"{candidates[ranking.best]}\t{margin}\t{best.sum:.4f}"
    return f"{best.sum:.4f}\t{best.per_token:.4f}\t{best.tokens}"


def format_stats(stats: DecodeStats, seconds: float) -> str:
    """A line on what a decode did."""
    shortlisted = f", {stats.fallbacks} sentences that the shortlist does not know" if stats.fallbacks else ""
    if stats.listed_steps:
        shortlisted = f", {stats.columns / stats.listed_steps:.0f} candidates a step{shortlisted}"
    return (
        f"{stats.sentences} sentences in {seconds:.2f} s: {stats.sentences / seconds:.1f} sentences/s, "
        f"{stats.tokens / seconds:.0f} tokens/s, {stats.steps} steps, "
        f"{stats.occupancy:.0%} of the rows in use, {stats.repacks} repacks, "
        f"cache {stats.cache_bytes / 2**20:.1f} MiB{shortlisted}"
    )
