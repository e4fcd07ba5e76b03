"""The bundles of a service: which of them translates what, and that none is closed before its last user has left."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterable
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")
pytest.importorskip("langcodes")
pytest.importorskip("py3langid")
pytest.importorskip("msgspec")

from kvx import Translator
from kvx.runtime.errors import BundleError, EngineClosed, OptionError
from kvx.runtime.serving.admission import Admission
from kvx.runtime.serving.metrics import Metrics
from kvx.runtime.serving.models import Model, Models, Place, check_places, load_models, places_of
from kvx.runtime.serving.service import Service
from kvx.runtime.serving.settings import ServeOptions
from kvx.testing import FakeTranslator

MANY = ["deu_Latn", "eng_Latn", "fra_Latn"]


def models(*names: str, pivots: Iterable[str] = (), **languages: list[str]) -> Models:
    """Models of these names, most of which say their pair, and some with `languages` of their own."""
    own = [Model(name, FakeTranslator(languages=codes)) for name, codes in languages.items()]
    return Models([*(Model(name, FakeTranslator()) for name in names), *own], tuple(pivots))


def legs(found: Models, *asked: str | None, name: str | None = None) -> list[tuple[str, str | None, str | None]]:
    return [(leg.model.name, leg.source, leg.target) for leg in found.route(asked[0], asked[1], name).legs]


@pytest.mark.parametrize(
    ("argument", "folder", "pair"),
    [
        ("artifacts/nllb", "artifacts/nllb", None),
        ("de-en=artifacts/x", "artifacts/x", ("de", "en")),
        ("deu_Latn-zho_Hans=x", "x", ("deu_Latn", "zho_Hans")),
        ("de-en=a=b", "a=b", ("de", "en")),
        ("./a=b", "./a=b", None),
        ("a=b", "a=b", None),
        ("de-en", "de-en", None),
        ("de-en=", "de-en=", None),
    ],
)
def test_an_argument_is_a_folder_perhaps_with_a_pair(argument: str, folder: str, pair: tuple[str, str] | None) -> None:
    assert Place.of(argument) == Place(Path(folder), pair)


def test_a_folder_of_bundles_is_all_of_them(numbers_bundle: Path, tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).symlink_to(numbers_bundle)
    (tmp_path / "other").mkdir()
    assert [place.name for place in places_of([str(tmp_path)])] == ["a", "b"]
    assert [place.name for place in places_of([str(tmp_path / "b")])] == ["b"]
    assert [place.folder.name for place in places_of([str(tmp_path / "none")])] == ["none"]


def test_a_name_says_a_pair_where_the_bundle_has_no_languages() -> None:
    found = models("de-en", "deu-fra", "other", many=MANY)
    assert legs(found, "de", "en") == [("de-en", None, None)]
    assert legs(found, "de", "fr") == [("deu-fra", None, None)]
    assert Model("fr-de", FakeTranslator(languages=MANY)).pairs.source.find("en") == "en"


def test_the_first_model_that_has_a_pair_translates_it() -> None:
    found = models("de-en", many=MANY)
    assert legs(found, "de", "en") == [("de-en", None, None)]
    assert legs(found, "en", "de") == [("many", "eng_Latn", "deu_Latn")]
    assert legs(found, "de", "en", name="many") == [("many", "deu_Latn", "eng_Latn")]


def test_a_language_is_not_translated_to_itself() -> None:
    found = models(many=MANY)
    with pytest.raises(OptionError, match="from de to de"):
        found.route("de", "de")
    assert "de" not in found.targets_of("de")


def test_a_pivot_joins_two_models_where_none_has_the_pair() -> None:
    found = models("de-en", "en-fr", "de-fr", "fr-it", pivots=["en"])
    assert legs(found, "de", "fr") == [("de-fr", None, None)]
    with pytest.raises(OptionError, match="from de to it"):
        found.route("de", "it")
    found = models("de-en", "en-fr", pivots=["nl", "en"])
    assert legs(found, "de", "fr") == [("de-en", None, None), ("en-fr", None, None)]
    assert found.route("de", "fr").pivot == "en"
    assert found.route("de", "fr").name == "en-fr"
    assert found.pairs == {"de": ["en", "fr"], "en": ["fr"], "fr": []}


def test_without_a_pivot_models_are_not_joined() -> None:
    with pytest.raises(OptionError, match="from de to fr"):
        models("de-en", "en-fr").route("de", "fr")


def test_a_request_that_names_nothing_is_for_the_only_model() -> None:
    assert legs(models("any"), None, None) == [("any", None, None)]
    with pytest.raises(OptionError, match="several models"):
        models("one", "other").route(None, None)


@pytest.mark.parametrize(
    ("asked", "option"),
    [
        (("xx", "en", None), "source_language"),
        (("de", "xx", None), "target_language"),
        ((None, "en", None), "source_language"),
        (("de", None, None), "target_language"),
        (("de", "en", "none"), "model"),
        (("en", None, "de-en"), "source_language"),
        (("de", "de", "de-en"), "target_language"),
        (("de", "en", "any"), "source_language"),
    ],
)
def test_what_no_model_has_is_refused_by_the_option(asked: tuple[str, str, str], option: str) -> None:
    with pytest.raises(OptionError) as found:
        models("de-en", "any").route(*asked)
    assert found.value.option == option


def test_bundles_need_different_names(numbers_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / numbers_bundle.name).symlink_to(numbers_bundle)
    with pytest.raises(OptionError, match="several bundles"):
        check_places([Place(numbers_bundle), Place(tmp_path / numbers_bundle.name)])


def test_where_one_bundle_cannot_be_loaded_the_others_are_closed(numbers_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(numbers_bundle)
    made: list[Translator] = []

    def load(_: object) -> Translator:
        if made:
            raise BundleError("It is damaged", expected="a whole one", remedy="Export it again.")
        made.append(FakeTranslator())
        return made[0]

    with pytest.raises(BundleError):
        load_models([Place(numbers_bundle), Place(tmp_path / "other")], load)
    with pytest.raises(EngineClosed):
        made[0].engine.submit("a")


def is_closed(model: Model) -> bool:
    try:
        model.engine.submit("a").result(10)
    except EngineClosed:
        return True
    return False


def wait_until_closed(model: Model) -> None:
    end = time.monotonic() + 10
    while not is_closed(model):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_model_that_was_replaced_is_closed_after_its_last_user() -> None:
    old, new = Model("a", FakeTranslator()), Model("a", FakeTranslator())
    found = Models([old])
    first, second = old.use(), old.use()
    found.take([new])
    assert list(found) == [new]
    first()
    time.sleep(0.05)
    assert not is_closed(old)
    second()
    wait_until_closed(old)
    assert not is_closed(new)


def test_a_model_that_nobody_uses_is_closed_at_once_when_it_is_replaced() -> None:
    old = Model("a", FakeTranslator())
    found = Models([old])
    old.use()()
    found.take([])
    wait_until_closed(old)
    assert not found.loaded


def test_routes_are_those_of_the_models_that_are_there_now() -> None:
    found = models("de-en")
    assert found.pairs == {"de": ["en"], "en": []}
    found.take(list(models("en-fr")))
    assert found.pairs == {"en": ["fr"], "fr": []}


def test_a_model_that_was_replaced_is_no_longer_in_memory() -> None:
    service = Service(ServeOptions(quiet=True), [Model("a", FakeTranslator())])
    [old] = (weakref.ref(model) for model in service.models)
    route = service.route(None, None, None)
    service.way(route, {"beam_size": 2})
    service.metrics.page()
    del route
    service.take([Model("a", FakeTranslator())])
    end = time.monotonic() + 10
    while old() is not None:
        gc.collect()
        assert time.monotonic() < end
        time.sleep(0.01)


def test_counters_of_a_model_do_not_fall_when_it_is_loaded_again() -> None:
    found = Models([Model("a", FakeTranslator())])
    metrics = Metrics(lambda: found, Admission(ServeOptions()))

    def row_steps() -> float:
        line = next(one for one in metrics.page().decode().splitlines() if one.startswith("kvx_row_steps_total{"))
        return float(line.split()[-1])

    def translate(text: str) -> None:
        next(iter(found)).engine.submit(text).result(10)

    seen = [row_steps()]
    for _ in range(3):
        for _ in range(2):
            translate("abc")
            seen.append(row_steps())
        found.take([Model("a", FakeTranslator())])
        seen.append(row_steps())
    assert seen == sorted(seen)
    assert seen[-1] == 6 * 4
