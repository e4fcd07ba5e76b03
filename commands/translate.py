"""`kvx translate`: texts in, translations out, in order."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.core import TyperCommand

from kvx.commands.console import check_output, counting, say
from kvx.commands.machine import MachineOptions, load_and_say, open_bundle
from kvx.commands.options import Described, ModelOption, OutputOption, with_described_options
from kvx.commands.output import format_stats, translation_json, translation_lines
from kvx.commands.paragraphs import WholeTexts, refuse_options_of_lines
from kvx.commands.translation import OPTIONS_OF_A_TRANSLATION, resolved_options
from kvx.runtime.errors import InputError, OptionError, listed
from kvx.runtime.options import TranslateOptions
from kvx.runtime.text.lines import open_lines, open_standard_input, output_file, read_file, read_lines, write_lines

if TYPE_CHECKING:
    from kvx import Translation, Translator
    from kvx.runtime.bundle.framing import Framed, Framing
    from kvx.runtime.decoding.results import DecodeStats

NAMED_LINES = 10
AFTER_DASHES = "Put -- before a text that begins with a dash: kvx translate -- '-5 degrees'"


class CommandOfTexts(TyperCommand):
    """A command whose arguments are texts, which may begin with a dash."""

    def parse_args(self, *arguments: Any, **named: Any) -> list[str]:  # noqa: ANN401  # Typer's own differ by version
        """As Typer does; an option that does not exist may have been meant as a text."""
        try:
            return super().parse_args(*arguments, **named)
        except Exception as error:
            if hasattr(error, "possibilities"):  # it is NoSuchOption, which Typer has from click or as its own
                error.message, error.possibilities = f"{error.format_message()}. {AFTER_DASHES}", None  # type: ignore[attr-defined]
            raise


@with_described_options
def translate(
    *,
    text: Annotated[
        list[str] | None,
        typer.Argument(
            help="The texts to translate. Put -- before a text that begins with a dash.  "
            "[default: the lines of standard input]",
            show_default=False,
        ),
    ] = None,
    input_: Annotated[
        Path | None,
        typer.Option("-i", "--input", help="Read the texts from this file, one per line; - is standard input."),
    ] = None,
    output: OutputOption = None,
    model: ModelOption = None,
    machine: Annotated[MachineOptions, Described(MachineOptions)],
    given: Annotated[dict[str, Any], OPTIONS_OF_A_TRANSLATION],
    prefix_file: Annotated[
        Path | None, typer.Option(help="A file with the beginning of each translation, one per line.")
    ] = None,
    from_file: Annotated[
        Path | None, typer.Option(help="A file with the code of each text's language, one per line.")
    ] = None,
    to_file: Annotated[
        Path | None, typer.Option(help="A file with the code of the language of each translation, one per line.")
    ] = None,
    alternatives: Annotated[
        int | None, typer.Option(help="Give this many translations that differ in the first token after --prefix.")
    ] = None,
    plot_attention: Annotated[
        Path | None,
        typer.Option(
            help="Draw the attention of one translation as an HTML page, and write it to this file. The bundle must "
            "be exported --with-attention."
        ),
    ] = None,
    paragraphs: Annotated[
        bool,
        typer.Option(
            "--paragraphs",
            help="Take the whole input, or each argument, for one text: translate its sentences, and keep its white "
            "space.",
        ),
    ] = False,
    html: Annotated[
        bool,
        typer.Option(
            "--html",
            help="Take the whole input, or each argument, for HTML: translate what people read, and keep its markup.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each text.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed and cache size on standard error.")] = False,
) -> None:
    """Translate texts: one line in, one line out, in order.

    With --n-best, --samples or --alternatives a text has several lines. Each begins with the number of its text,
    from 1, and a tab. --scores puts a field before the translation and --align one after it, with tabs between.

    With --paragraphs or --html, texts are longer than a line, and their translations are written as they are.
    """
    task = Task(
        texts=tuple(text or ()),
        input=input_,
        output=output,
        prefix=given.get("prefix"),
        prefix_file=prefix_file,
        hypotheses=max(given.get("n_best") or 1, given.get("samples") or 1),
        alternatives=alternatives,
        plot_attention=plot_attention,
        align=given.get("align", False),
        as_json=as_json,
        stats=stats,
    )
    if paragraphs or html:
        own = {"as_json": as_json, "alternatives": alternatives, "plot_attention": plot_attention}
        files = {"prefix_file": prefix_file, "from_file": from_file, "to_file": to_file}
        mode = "html" if html else "paragraphs"
        refuse_options_of_lines(mode, given | own | files, interactive=task.interactive)
    for language, file in (("source_language", from_file), ("target_language", to_file)):
        if file is not None:
            given[language] = _languages(language, file, given, interactive=task.interactive)
    given |= {
        "window": 1 if task.interactive else len(task.texts) or None,
        "align": task.align or plot_attention is not None,
    }
    bundle = open_bundle(model)
    options = resolved_options(bundle.manifest, given)
    bulk = not task.texts and not task.interactive
    translator = load_and_say(bundle, machine, bulk=bulk, named=model is not None)
    if paragraphs or html:
        WholeTexts(texts=task.texts, input=input_, output=output, html=html, stats=stats).translate(translator, options)
        return
    if task.interactive:
        say("reading standard input, a text a line, until Ctrl-D")
    _run(translator, task, options)


def _languages(option: str, file: Path, given: dict[str, Any], *, interactive: bool) -> tuple[str | None, ...]:
    """The code of each line; none for an empty one. Raises OptionError."""
    if option in given or interactive:
        flags = {"source_language": "from_file", "target_language": "to_file"}
        raise OptionError(
            f"`{flags[option]}` is given {'for texts that are typed' if interactive else f'beside `{option}`'}",
            expected="texts from a file or pipe, and one of the two",
            remedy=f"Use `{option}`.",
            option=flags[option],
        )
    return tuple(line.strip() or None for line in read_file(file))


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Where texts come from, where translations go, and how they are written. Raises OptionError."""

    texts: tuple[str, ...]
    input: Path | None
    output: Path | None
    prefix: str | None
    prefix_file: Path | None
    hypotheses: int
    alternatives: int | None
    plot_attention: Path | None
    align: bool
    as_json: bool
    stats: bool

    def __post_init__(self) -> None:
        self._check_sources()
        if self.alternatives is not None and (self.stats or self.hypotheses > 1):
            raise OptionError(
                "`alternatives` is given together with `n_best`, `samples` or `stats`",
                expected="one translation after each alternative",
                remedy="Leave one of them out.",
                option="alternatives",
            )
        if self.plot_attention is not None and len(self.texts) != 1:
            raise OptionError(
                f"`plot_attention` is given for {len(self.texts) or 'a stream of'} texts",
                expected="one text, as an argument",
                remedy="Give the one text whose attention you want to see.",
                option="plot_attention",
            )
        check_output(self.output)

    def _check_sources(self) -> None:
        if self.texts and self.input:
            raise OptionError(
                "There are texts and `input`", expected="one of the two", remedy="Leave one out.", option="input"
            )
        if self.prefix and self.prefix_file is not None:
            raise OptionError(
                "There are `prefix` and `prefix_file`",
                expected="one of the two",
                remedy="Leave one out.",
                option="prefix_file",
            )
        if not self.texts and self.input is None and sys.stdin is None:
            raise OptionError(
                "Standard input is closed", expected="texts", remedy="Give them as arguments or in a file."
            )
        if self.prefix_file is not None and self.interactive:
            raise OptionError(
                "`prefix_file` is given for texts that are typed",
                expected="texts from a file or pipe",
                remedy="Use `prefix`.",
                option="prefix_file",
            )

    @property
    def several(self) -> bool:
        """Whether a text may have several translations."""
        return self.hypotheses > 1 or (self.alternatives or 1) > 1

    @property
    def interactive(self) -> bool:
        """Whether somebody types the texts, and waits for each answer."""
        return not self.texts and self.input is None and sys.stdin is not None and sys.stdin.isatty()


def _run(translator: Translator, task: Task, options: TranslateOptions) -> None:
    from kvx.runtime.decoding.results import DecodeStats

    stats, started, at_limit = DecodeStats(), time.perf_counter(), list[int]()
    counter = counting("translating", len(task.texts) or None, to_terminal=task.output is None and sys.stdout.isatty())
    with _texts(task) as texts, output_file(task.output) as out, counter as count:
        for number, translation in enumerate(_translations(translator, task, options, texts, stats), 1):
            _write(out, translation, number, task)
            out.flush()
            if task.plot_attention is not None:
                _plot_attention(task.plot_attention, translation, task.texts[0], translator.manifest.framing)
            if translation.truncated:
                say(f"line {number} was cut to the model's {translator.manifest.model['source_positions']} positions")
            if translation.finish_reason == "length":
                at_limit.append(number)
            count(number)
    if at_limit:
        shown = listed(at_limit, NAMED_LINES)
        say(f"{len(at_limit)} translations stopped at the limit of new tokens (lines {shown})")
    if task.stats:
        say(format_stats(stats, time.perf_counter() - started))


@contextlib.contextmanager
def _texts(task: Task) -> Iterator[Iterable[str]]:
    if task.texts:
        yield task.texts
    elif task.input:
        with open_lines(task.input) as stream:
            yield read_lines(stream)
    else:
        with open_standard_input() as stream:
            yield read_lines(stream)


def _translations(
    translator: Translator, task: Task, options: TranslateOptions, texts: Iterable[str], stats: DecodeStats
) -> Iterator[Translation]:
    from kvx.runtime.engine.loaded import PREFIXES, paired, with_languages

    prefixes = None if task.prefix_file is None else read_file(task.prefix_file)
    if task.alternatives is None:
        yield from translator.translate_iter(texts, options, stats, prefixes=prefixes)
        return
    begins = itertools.repeat(task.prefix or "") if prefixes is None else prefixes
    pairs = paired(with_languages(texts, options), begins, "prefixes", PREFIXES)
    for number, ((text, source, target), prefix) in enumerate(pairs, 1):
        own = options.changed(source_language=source, target_language=target)
        first, *others = translator.alternatives(text, prefix, task.alternatives, own, number=number)
        yield replace(first, others=tuple(others))


def _write(out: TextIO, translation: Translation, number: int, task: Task) -> None:
    if not task.align:
        translation = replace(translation, alignment=None, source_tokens=None)
    if task.as_json:
        out.write(translation_json(translation) + "\n")
    else:
        out.writelines(f"{line}\n" for line in translation_lines(translation, number, several=task.several))


def _plot_attention(path: Path, translation: Translation, text: str, framing: Framing) -> None:
    """A row for each token, eos included where the translation has ended."""
    from kvx.runtime.measuring.heatmap import attention_html

    if translation.attention is None:
        raise InputError("An empty text has no attention", expected="a text with a word", remedy="Give another text.")
    tokens = (*translation.tokens, *(["eos"] if len(translation.ids) > len(translation.tokens) else []))
    title = f"{text} → {translation.text}"
    around = _labels(framing.prefix, "bos"), _labels(framing.suffix, "eos")
    page = attention_html(translation.attention, translation.source_tokens or (), tokens, title, around=around)
    write_lines(path, page.split("\n"))


def _labels(framed: tuple[Framed, ...], name: str) -> tuple[str, ...]:
    """What stands around a text, in a word each."""
    return tuple(name if isinstance(one, int) else "language" for one in framed)
