"""The bundles of a service: loaded, found by languages or by name, and loaded anew while requests go on."""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.bundle.manifest import MANIFEST_FILE, Manifest
from kvx.runtime.engine.engine import Engine
from kvx.runtime.errors import OptionError, listed
from kvx.runtime.serving.languages import Pairs, Side
from kvx.runtime.translator import Translator

Load = Callable[[Bundle], Translator]

_CODE = r"[A-Za-z]{2,3}(?:_[A-Za-z0-9]{2,8})*"
GIVEN_PAIR = re.compile(rf"({_CODE})-({_CODE})=(.+)", re.DOTALL)
PAIR_OF_A_NAME = re.compile(r"([a-z]{2,3})-([a-z]{2,3})")
SHOWN = 5

_log = logging.getLogger("kvx")


@dataclass(frozen=True, slots=True)
class Place:
    """A bundle that is to be served: its folder, and its languages, where they are given and it has none itself."""

    folder: Path
    pair: tuple[str, str] | None = None

    @classmethod
    def of(cls, argument: str) -> Place:
        """artifacts/nllb, de-en=artifacts/my-model, or artifacts/de-en."""
        given = GIVEN_PAIR.fullmatch(argument)
        return cls(Path(argument)) if given is None else cls(Path(given[3]), (given[1], given[2]))

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.absolute().name


def places_of(arguments: Iterable[str]) -> list[Place]:
    """The bundles that arguments name: each one, or all those in a folder of bundles. Raises OptionError."""
    found: list[Place] = []
    for place in map(Place.of, arguments):
        inside = sorted(place.folder.glob(f"*/{MANIFEST_FILE}"))
        if (place.folder / MANIFEST_FILE).exists() or not place.folder.is_dir():
            found.append(place)
        elif inside and place.pair is None:
            found.extend(Place(manifest.parent) for manifest in inside)
        else:
            raise OptionError(
                f"{place.folder} holds {len(inside) or 'no'} bundles and is none itself",
                expected="a bundle, or a folder of bundles without languages before it",
                remedy="Check the path, and name languages for each bundle.",
                option="bundles",
            )
    return found


class Model:
    """A bundle that is loaded and served."""

    def __init__(self, name: str, translator: Translator, pair: tuple[str, str] | None = None) -> None:
        self.name = name
        self.translator = translator
        named = PAIR_OF_A_NAME.fullmatch(name)
        if pair is None and named is not None and not translator.manifest.languages.target:
            pair = named[1], named[2]
        self.pairs = Pairs.of(translator.manifest.languages, pair)
        self._users = 0
        self._retired = False

    @property
    def engine(self) -> Engine:
        """What translates."""
        return self.translator.engine

    @property
    def manifest(self) -> Manifest:
        """What the bundle is."""
        return self.translator.manifest

    def use(self) -> Callable[[], None]:
        """The model is there until what this gives is called, also where another one takes its place meanwhile."""
        self._users += 1
        return self._leave

    def retire(self) -> None:
        """Nobody will ask for it any more: it is closed after those who use it now."""
        self._retired = True
        self._close_unused()

    def _leave(self) -> None:
        self._users -= 1
        self._close_unused()

    def _close_unused(self) -> None:
        if self._retired and not self._users:
            threading.Thread(target=self.engine.close, name=f"kvx closing {self.name}", daemon=True).start()


@dataclass(frozen=True, slots=True)
class Leg:
    """A model on the way of a text, with the bundle's own codes of its languages; None where it has no choice."""

    model: Model
    source: str | None
    target: str | None


@dataclass(frozen=True, slots=True)
class Route:
    """How a text is translated: by one model, by several, through a `pivot`, or not at all, where it is in the `target`
    language already. `source` and `target` are public codes, None where no language was asked for.
    """

    legs: tuple[Leg, ...]
    source: str | None = None
    target: str | None = None
    pivot: str | None = None

    @property
    def name(self) -> str | None:
        """The name of the model whose translation is the result; None where the text stays as it is."""
        return self.legs[-1].model.name if self.legs else None


def check_places(places: Sequence[Place]) -> list[Bundle]:
    """The bundles, opened. Raises OptionError where two have one name, and BundleError."""
    repeated = [name for name, count in Counter(place.name for place in places).items() if count > 1]
    if repeated:
        raise OptionError(
            f"There are several bundles with the name {repeated[0]}",
            expected="bundles with different folder names",
            remedy="Rename a folder, or leave one out.",
            option="bundles",
        )
    return [Bundle.open(place.folder) for place in places]


def load_models(places: Sequence[Place], load: Load) -> list[Model]:
    """All bundles in memory, their hashes checked: for any thread. Raises OptionError, BundleError and what loading
    raises.
    """
    models: list[Model] = []
    try:
        for place, bundle in zip(places, check_places(places), strict=True):
            models.append(Model(place.name, load(bundle), place.pair))
            _log.info("loaded %s", place.folder)
    except BaseException:
        for model in models:
            model.engine.close(drain=False)
        raise
    return models


class Models:
    """The models of a service, in the order of its arguments: the first that can translate a pair does. Only the
    thread of the event loop changes them.
    """

    def __init__(self, models: Iterable[Model] = (), pivots: Sequence[str] = ()) -> None:
        self._models = {model.name: model for model in models}
        self._pivots = tuple(pivots)
        self._pairs: dict[str, list[str]] | None = None

    @property
    def loaded(self) -> bool:
        """Whether there are any."""
        return bool(self._models)

    def __iter__(self) -> Iterator[Model]:
        return iter(list(self._models.values()))

    def take(self, models: Iterable[Model]) -> None:
        """From now on these answer; those before them are closed as soon as nobody uses them."""
        before, self._models = self._models, {model.name: model for model in models}
        self._pairs = None
        for model in before.values():
            model.retire()

    def close(self, *, drain: bool) -> None:
        """Closes all engines."""
        for model in self._models.values():
            model.engine.close(drain=drain)

    @property
    def sources(self) -> list[str]:
        """The public codes of all languages that texts may be in."""
        return list(dict.fromkeys(code for model in self for code in model.pairs.source.own))

    @property
    def targets(self) -> list[str]:
        """And of those that they may be translated to."""
        return list(dict.fromkeys(code for model in self for code in model.pairs.target.own))

    @property
    def pairs(self) -> dict[str, list[str]]:
        """All languages, each with those to which it may be translated, also through a pivot."""
        if self._pairs is None:
            every = dict.fromkeys([*self.sources, *self.targets])
            self._pairs = {code: self.targets_of(code) for code in every}
        return self._pairs

    def targets_of(self, source: str) -> list[str]:
        """The languages to which one may be translated, also through a pivot."""
        return [code for code in self.targets if self._between(source, code) is not None]

    def route(self, source: str | None, target: str | None, name: str | None = None) -> Route:
        """How to translate between two languages, or by the model of a name. Raises OptionError."""
        if name is not None:
            return self._by_name(name, source, target)
        if source is None and target is None:
            return self._by_name(self._only(), None, None)
        if len(self._models) == 1 and self.targets and not self.sources:  # it does not ask what a text is in
            return self._by_name(self._only(), source, target)
        source, target = self._known("source_language", source), self._known("target_language", target)
        found = self._between(source, target)
        if found is None:
            raise _no_pair(source, target, self.targets_of(source))
        return found

    def source(self, code: str) -> str | None:
        """The public code of a language that texts may be in, by any name that a bundle or a client has for it."""
        return _found(code, [model.pairs.source for model in self])

    def target(self, code: str) -> str | None:
        """The same for a language to translate to."""
        return _found(code, [model.pairs.target for model in self])

    def meant(self, target: str | None, name: str | None) -> str | None:
        """The public code of the language to translate to: the one that is named, or the only one of a named model."""
        if target is not None:
            return self.target(target)
        own = self._models[name].pairs.target.own if name in self._models else {}
        return next(iter(own)) if len(own) == 1 else None

    def _known(self, option: str, code: str | None) -> str:
        is_source = option == "source_language"
        codes = self.sources if is_source else self.targets
        if code is None:
            raise _missing(option, codes)
        found = self.source(code) if is_source else self.target(code)
        if found is None:
            raise _unknown(option, code, codes)
        return found

    def _between(self, source: str, target: str) -> Route | None:
        leg = self._leg(source, target)
        if leg is not None:
            return Route((leg,), source, target)
        for pivot in self._pivots:
            first, second = self._leg(source, pivot), self._leg(pivot, target)
            if first is not None and second is not None and source != target:
                return Route((first, second), source, target, pivot)
        return None

    def _leg(self, source: str, target: str) -> Leg | None:
        for model in self:
            pairs = model.pairs
            own = pairs.source.find(source), pairs.target.find(target)
            only = len(pairs.source.own) == len(pairs.target.own) == 1
            if own[0] is not None and own[1] is not None and (own[0] != own[1] or only):
                return Leg(model, pairs.source.own[own[0]], pairs.target.own[own[1]])
        return None

    def _by_name(self, name: str, source: str | None, target: str | None) -> Route:
        model = self._models.get(name)
        if model is None:
            raise OptionError(
                f"There is no model {name!r:.60}",
                expected=_one_of(self._models),
                remedy="Correct its name, or name languages instead.",
                option="model",
            )
        pairs = model.pairs
        if not pairs.target.own:
            _refuse_languages(model, source, target)
            return Route((Leg(model, None, None),))
        codes = [
            _chosen(option, code, side)
            for option, code, side in (
                ("source_language", source, pairs.source),
                ("target_language", target, pairs.target),
            )
        ]
        own = [None if code is None else side.own[code] for code, side in zip(codes, _sides(pairs), strict=True)]
        return Route((Leg(model, own[0], own[1]),), codes[0], codes[1])

    def _only(self) -> str:
        if len(self._models) == 1:
            return next(iter(self._models))
        raise OptionError(
            "There are several models, and the request names neither languages nor a model",
            expected=f"`source_language` and `target_language`, or {_one_of(self._models)}",
            remedy="Name the languages of the text and of the translation.",
            option="model",
        )


def _sides(pairs: Pairs) -> tuple[Side, Side]:
    return pairs.source, pairs.target


def _found(code: str, sides: Sequence[Side]) -> str | None:
    """The public code on one of the sides; one that is spelled so comes first."""
    found = [public for side in sides if (public := side.find(code)) is not None]
    return code if code in found else next(iter(found), None)


def _chosen(option: str, code: str | None, side: Side) -> str | None:
    """A language of a model that was named, by default the only one that it has. None leaves it to the bundle."""
    if code is None:
        return next(iter(side.own)) if len(side.own) == 1 else None
    if not side.own:
        return None
    found = side.find(code)
    if found is None:
        raise _unknown(option, code, list(side.own))
    return found


def _refuse_languages(model: Model, source: str | None, target: str | None) -> None:
    for option, code in (("source_language", source), ("target_language", target)):
        if code is not None:
            raise OptionError(
                f"`{option}` is {code!r:.60}, but nobody has said which languages {model.name} is for",
                expected=f"no `{option}`",
                remedy="Leave it out, or have the service started with, say, de-en= before the folder of the bundle.",
                option=option,
            )


def _missing(option: str, codes: Sequence[str]) -> OptionError:
    return OptionError(
        f"There is no `{option}`",
        expected=_one_of(codes) if codes else "a `model`, as no language is known",
        remedy="Name the language.",
        option=option,
    )


def _unknown(option: str, code: str, codes: Sequence[str]) -> OptionError:
    return OptionError(
        f"No model has the language {code!r:.60}",
        expected=_one_of(codes) if codes else f"no `{option}`",
        remedy="Correct the code. /v1/models lists all languages.",
        option=option,
    )


def _no_pair(source: str, target: str, targets: Sequence[str]) -> OptionError:
    return OptionError(
        f"No model translates from {source} to {target}",
        expected=_one_of(targets) if targets else "another `source_language`",
        remedy="Choose another pair. /v1/models lists all.",
        option="target_language",
    )


def _one_of(names: Iterable[str]) -> str:
    found = list(names)
    shown = listed(found, SHOWN)
    return f"one of {shown}" if len(found) > 1 else shown
