"""The page in a browser: what is typed is translated, with keys alone too, and nothing is lost when a request fails."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("playwright.sync_api")
pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from playwright.sync_api import expect, sync_playwright

from kvx import Translator
from kvx.tests.runtime.serving.page_server import DESCRIPTION, PAGE, Faults, Toy, model, served, toy_app, word_by_word
from kvx.tests.runtime.serving.serving import running as running_service
from kvx.tests.runtime.serving.serving import service

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET = ["--disable-component-update", "--disable-sync"]
LARGEST = 42_000
GERMAN = "Ein kleiner Hund läuft schnell über die grüne Wiese. Eine Katze schläft auf dem Dach und träumt."
ENGLISH = "A small dog runs quickly across the green meadow. A cat sleeps on the roof and dreams."
SCRIPT = "<img src=x onerror=alert(1)>"
TRANSLATE, ALTERNATIVES, MODELS = "/v1/translate", "/v1/alternatives", "/v1/models"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

Opened = Callable[..., "Page"]


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    """One for all tests, as another takes a second."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS + QUIET)
        context = browser.new_context(locale="en-GB", permissions=["clipboard-read", "clipboard-write"])
        context.set_default_timeout(5000)
        yield context.new_page()
        browser.close()


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


@pytest.fixture(scope="module")
def running(toy: Toy) -> Iterator[tuple[Faults, str]]:
    """The app with the page. Another one that has the same interface may stand here."""
    faults = Faults(toy_app(toy))
    with served(faults) as address:
        yield faults, address


@pytest.fixture
def faults(running: tuple[Faults, str], toy: Toy) -> Faults:
    faults, _ = running
    faults.coming, faults.key, faults.asked = {}, None, []
    toy.description, toy.held, toy.broken, toy.dress = DESCRIPTION, None, None, str
    return faults


@pytest.fixture
def opened(tab: Page, running: tuple[Faults, str], faults: Faults) -> Iterator[Opened]:
    """A function that opens the page, which must not complain and must not ask another host."""
    address = running[1]
    complaints: list[str] = []
    listeners: dict[str, Callable[[Any], None]] = {
        "console": lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None,
        "pageerror": lambda error: complaints.append(str(error)),
        "request": lambda asked: None if asked.url.startswith(address) else complaints.append(asked.url),
    }
    for name, listener in listeners.items():
        tab.on(name, listener)  # type: ignore[call-overload]

    def open_page(ready: bool = True, width: int = 1180, **media: Any) -> Page:  # noqa: ANN401
        tab.set_viewport_size({"width": width, "height": 760})
        tab.emulate_media(**({"color_scheme": "light", "reduced_motion": "no-preference"} | media))
        tab.mouse.move(0, 0)
        tab.goto(address)
        if ready:
            tab.locator(".card.ready").wait_for()
        return tab

    yield open_page
    for name, listener in listeners.items():
        tab.remove_listener(name, listener)
    assert [text for text in complaints if not text.startswith("Failed to load resource")] == []


@pytest.fixture
def page(opened: Opened) -> Page:
    return opened()


def kept(page: Page, name: str) -> None:
    if "KVX_SCREENSHOTS" in os.environ:
        page.screenshot(path=Path(os.environ["KVX_SCREENSHOTS"]) / f"{name}.png")


def write(page: Page, text: str, translation: str) -> None:
    page.locator("#source").fill(text)
    translated(page, translation)


def translated(page: Page, text: str, busy: str = "false") -> None:
    """Waits in the page until the text stands there: nothing is missed, and no time is lost between two looks."""
    page.evaluate(
        """([text, busy]) => new Promise((resolve, reject) => {
            const node = document.getElementById("translation");
            const look = () => node.textContent === text && node.ariaBusy === busy && resolve();
            new MutationObserver(look).observe(node, { attributes: true, childList: true, subtree: true });
            setTimeout(() => reject(new Error(`not ${text} but ${node.textContent}, busy: ${node.ariaBusy}`)), 5000);
            look();
        })""",
        [text, busy],
    )


def word(page: Page, text: str) -> Locator:
    return page.locator("#translation .word").get_by_text(text, exact=True).first


def marked(page: Page) -> list[str]:
    return page.locator("#mirror mark").all_text_contents()


def focused(page: Page) -> str:
    script = "({id, textContent}) => id || textContent.trim()"
    return str(page.evaluate(f"({script})(document.activeElement)"))


def overflow(page: Page) -> int:
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def test_the_files_are_small_and_have_nothing_inline() -> None:
    files = {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir() if path.suffix != ".py"}
    assert sum(len(text.encode()) for text in files.values()) <= LARGEST
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", files["index.html"])
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", files["page.js"])
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import", "".join(files.values()))


def test_typing_streams_a_translation(page: Page, toy: Toy, faults: Faults) -> None:
    toy.held = 2
    page.locator("#source").press_sequentially("Ein kleiner Hund schläft.", delay=5)
    translated(page, "A small", busy="true")
    toy.held = None
    translated(page, "A small dog sleeps.")
    assert [body["texts"] for body in faults.bodies(TRANSLATE)] == [["Ein kleiner Hund schläft."]]
    assert faults.bodies(TRANSLATE)[0]["source_language"] == "auto"
    expect(page.locator("#count")).to_have_text("25 / 2,000")
    expect(page.locator("#source-language option:checked")).to_have_text("German (detected)")
    expect(page.locator("#facts")).to_have_text("Model de-en · int8 · proven to be within 1.2 × 10⁻⁶ of PyTorch")


def test_what_is_typed_meanwhile_ends_the_request_before(page: Page, toy: Toy) -> None:
    toy.held = 3
    page.locator("#source").fill(GERMAN)
    translated(page, "A small dog", busy="true")
    write(page, "Eine Katze.", "A cat.")
    toy.held = None
    page.wait_for_timeout(200)
    expect(page.locator("#translation")).to_have_text("A cat.")


def test_alternatives_by_click(page: Page, faults: Faults) -> None:
    write(page, GERMAN, ENGLISH)
    word(page, "dog").click()
    items = page.get_by_role("menuitem")
    expect(items).to_have_count(3)
    expect(items.first).to_be_focused()
    kept(page, "menu")
    items.nth(1).click()
    changed = "A small hound runs swiftly over the green meadow. A cat sleeps on the roof and dreams."
    expect(page.locator("#translation")).to_have_text(changed)
    expect(word(page, "hound")).to_be_focused()
    expect(page.locator("#menu")).to_be_hidden()
    [asked] = faults.bodies(ALTERNATIVES)
    assert asked["text"] == "Ein kleiner Hund läuft schnell über die grüne Wiese."
    assert asked | {"prefix": "A small ", "model": "de-en", "source_language": "de", "target_language": "en"} == asked


def test_a_click_elsewhere_closes_the_menu(page: Page) -> None:
    write(page, GERMAN, ENGLISH)
    word(page, "meadow").click()
    expect(page.get_by_role("menuitem")).to_have_count(4)
    page.locator("h1").click()
    expect(page.locator("#menu")).to_be_hidden()


def test_everything_is_reached_with_keys(page: Page) -> None:
    page.keyboard.press("Tab")
    assert focused(page) == "source-language"
    page.locator("#source").focus()
    page.keyboard.type("Ein Hund schläft.")
    translated(page, "A dog sleeps.")
    page.locator("#source-language").focus()
    order = [focused(page)]
    for _ in range(7):
        page.keyboard.press("Tab")
        order.append(focused(page))
    places = ["source-language", "swap", "target-language", "source", "clear", "A", "copy", "API documentation"]
    assert order == places


def test_alternatives_with_keys_alone(page: Page) -> None:
    write(page, GERMAN, ENGLISH)
    page.locator("#source").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert focused(page) == "A"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert focused(page) == "dog"
    assert marked(page) == ["Hund"]
    page.keyboard.press("Enter")
    expect(page.get_by_role("menuitem").first).to_be_focused()
    page.keyboard.press("Escape")
    expect(word(page, "dog")).to_be_focused()
    page.keyboard.press("End")
    assert focused(page) == "dreams"
    page.keyboard.press("Home")
    assert focused(page) == "A"
    page.keyboard.press("ArrowDown")
    below, above = (word.bounding_box() for word in (page.locator(":focus"), word(page, "A")))
    assert below is not None
    assert above is not None
    assert below["y"] > above["y"]
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press(" ")
    expect(page.get_by_role("menuitem").first).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(word(page, "puppy")).to_be_focused()
    page.keyboard.press("Tab")
    assert focused(page) == "copy"


def test_hover_shows_what_is_attended_to(page: Page, faults: Faults) -> None:
    write(page, GERMAN, ENGLISH)
    assert faults.bodies(TRANSLATE)[0]["align"] is True
    word(page, "meadow").hover()
    assert marked(page) == ["Wiese"]
    mirror, box = (page.locator(name).bounding_box() for name in ("#mirror", "#source"))
    assert mirror == box
    page.locator("#source").press("End")
    page.keyboard.type(" ")
    assert marked(page) == []


def test_pieces_of_other_tokenizers(page: Page, toy: Toy) -> None:
    looks: dict[str, Callable[[str], str]] = {
        "Hund": lambda piece: piece.replace("▁", "Ġ"),
        "Katze": lambda piece: f"{piece.lstrip('▁')}</w>",
        "Dach": lambda piece: f"{piece.lstrip('▁')}@@",
        "": lambda piece: f"{piece}~",
    }
    for source, toy.dress in looks.items():
        write(page, f"Der {source}.", f"The {word_by_word(source)}.")
        page.locator("#translation .word").last.hover()
        assert marked(page) == [source] * (source != "")


def test_no_attention_is_asked_of_a_model_without(page: Page, faults: Faults) -> None:
    page.locator("#source-language").select_option("en")
    write(page, "dog", "dog")
    [asked] = faults.bodies(TRANSLATE)
    assert "align" not in asked
    assert (asked["model"], asked["source_language"], asked["target_language"]) == ("en-de", "en", "de")
    word(page, "dog").hover()
    assert marked(page) == []
    expect(page.locator("#facts")).to_have_text("Model en-de · int8 · not proven")


def test_swapping_takes_the_translation_as_the_text(page: Page) -> None:
    write(page, "Ein Hund.", "A dog.")
    page.locator("#swap").click()
    expect(page.locator("#source")).to_have_value("A dog.")
    assert [page.locator(f"#{side}-language").input_value() for side in ("source", "target")] == ["en", "de"]


def test_a_busy_server_is_asked_again(page: Page, faults: Faults) -> None:
    faults.fail(TRANSLATE, 503, "Too many texts are waiting.", Retry_After="0.2")
    write(page, "Ein Hund.", "A dog.")
    assert len(faults.bodies(TRANSLATE)) == 2
    expect(page.locator("#status")).to_have_text("")


def test_a_server_that_stays_busy_is_said_and_the_text_kept(page: Page, faults: Faults) -> None:
    faults.fail(TRANSLATE, 429, "Too many texts are waiting.", times=2, Retry_After="0.1")
    page.locator("#source").fill("Ein Hund.")
    expect(page.locator("#status")).to_have_text("Too many texts are waiting.")
    expect(page.locator("#source")).to_have_value("Ein Hund.")
    page.locator("#again").click()
    translated(page, "A dog.")
    expect(page.locator("#status")).to_have_text("")


def test_a_problem_is_shown_and_the_text_kept(page: Page, faults: Faults) -> None:
    write(page, "Ein Hund.", "A dog.")
    faults.fail(TRANSLATE, 400, f"The text is refused. {SCRIPT}")
    page.locator("#source").fill("Eine Katze.")
    expect(page.locator("#status")).to_have_text(f"The text is refused. {SCRIPT}")
    expect(page.locator("#source")).to_have_value("Eine Katze.")
    expect(page.locator("#translation")).to_have_text("A dog.")
    expect(page.locator("#translation")).to_have_class(re.compile("old"))
    kept(page, "problem")
    faults.fail(ALTERNATIVES, 400, "This model gives no alternatives.")
    word(page, "dog").click()
    expect(page.locator("#menu")).to_have_text("This model gives no alternatives.")


def test_a_stream_that_breaks_is_said(page: Page, toy: Toy, faults: Faults) -> None:
    toy.broken = {"type": "about:blank", "title": "Failed", "status": 500, "detail": "The model failed."}
    page.locator("#source").fill("Ein Hund.")
    expect(page.locator("#status")).to_have_text("The model failed.")
    toy.broken = {}
    page.locator("#again").click()
    expect(page.locator("#status")).to_contain_text("ended before")
    expect(page.locator("#source")).to_have_value("Ein Hund.")


def test_a_text_that_is_too_long_is_not_sent(page: Page, faults: Faults) -> None:
    page.locator("#source").fill("x" * 2001)
    expect(page.locator("#status")).to_have_text("The text is 1 character too long. The limit is 2,000.")
    assert faults.bodies(TRANSLATE) == []


def test_a_server_that_cannot_be_reached(page: Page) -> None:
    page.context.set_offline(True)
    page.locator("#source").fill("Ein Hund.")
    expect(page.locator("#status")).to_contain_text("cannot be reached")
    page.context.set_offline(False)
    page.locator("#again").click()
    translated(page, "A dog.")


def test_markup_is_text(page: Page) -> None:
    write(page, f"Ein Hund {SCRIPT}", f"A dog {SCRIPT}")
    word(page, "dog").click()
    expect(page.get_by_role("menuitem").first).to_be_visible()
    word(page, "onerror=alert(1").hover()
    assert page.locator("main img").count() == 0
    assert page.locator("#mirror").inner_text().strip("\u200b") == f"Ein Hund {SCRIPT}"


def test_a_key_is_asked_for_and_kept_in_the_tab(opened: Opened, faults: Faults) -> None:
    faults.key = "secret"
    page = opened(ready=False)
    expect(page.locator("#key")).to_be_focused()
    kept(page, "key")
    for key in ("wrong", "secret"):
        page.locator("#key").fill(key)
        page.keyboard.press("Enter")
    expect(page.locator("#key-form")).to_be_hidden()
    write(page, "Ein Hund.", "A dog.")
    page.reload()
    write(page, "Ein Hund.", "A dog.")
    assert page.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]
    page.evaluate("sessionStorage.clear()")


def test_models_without_languages_are_chosen_by_name(opened: Opened, toy: Toy, faults: Faults) -> None:
    nameless = [model(name, [], [], attention=False) for name in ("numbers", "letters")]
    toy.description = DESCRIPTION | {"models": nameless, "detection": False}
    page = opened(ready=False)
    page.locator("#model").select_option("letters")
    write(page, "Ein Hund.", "A dog.")
    [asked] = faults.bodies(TRANSLATE)
    assert asked["model"] == "letters"
    assert not {"source_language", "target_language"} & set(asked)
    expect(page.locator("#source-language")).to_be_hidden()
    word(page, "dog").click()
    expect(page.get_by_role("menuitem").first).to_be_visible()


def test_one_of_several_models_for_a_pair_is_chosen(opened: Opened, toy: Toy, faults: Faults) -> None:
    another = DESCRIPTION["models"][0] | {"name": "de-en-large", "precision": "float32"}
    toy.description = DESCRIPTION | {"models": [*DESCRIPTION["models"], another]}
    page = opened()
    expect(page.locator("#model")).to_be_hidden()
    page.locator("#source-language").select_option("de")
    page.locator("#model").select_option("de-en-large")
    write(page, "Ein Hund.", "A dog.")
    assert faults.bodies(TRANSLATE)[-1]["model"] == "de-en-large"
    expect(page.locator("#facts")).to_contain_text("de-en-large · float32")
    kept(page, "models")


def test_a_translation_is_copied(page: Page) -> None:
    write(page, "Ein Hund.", "A dog.")
    page.locator("#copy").click()
    expect(page.locator("#copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "A dog."
    page.locator("#clear").click()
    expect(page.locator("#translation")).to_be_empty()
    expect(page.locator("#source")).to_be_focused()


def test_the_boxes_are_stacked_on_a_phone(opened: Opened, toy: Toy) -> None:
    long = model(
        "nllb-200-distilled-600M",
        DESCRIPTION["models"][0]["source_languages"],
        [{"code": "arb", "name": "Modern Standard Arabic"}],
        attention=True,
    )
    toy.description = DESCRIPTION | {"models": [*DESCRIPTION["models"], long, long | {"name": "m2m100"}]}
    page = opened(width=320)
    write(page, GERMAN, ENGLISH)
    kept(page, "narrow")
    assert overflow(page) <= 0
    source, translation = (page.locator(name).bounding_box() for name in ("#source", "#translation"))
    assert source is not None
    assert translation is not None
    assert translation["y"] >= source["y"] + source["height"]
    word(page, "dog").click()
    expect(page.get_by_role("menuitem")).to_have_count(3)
    assert overflow(page) <= 0
    kept(page, "narrow-menu")
    page.keyboard.press("Escape")
    write(page, "W" * 400, "W" * 400)
    page.locator("#source-language").select_option("de")
    page.locator("#target-language").select_option("arb")
    expect(page.locator("#model")).to_be_visible()
    kept(page, "narrow-models")
    assert overflow(page) <= 0
    assert (page.locator("#source-language").bounding_box() or {"x": -1})["x"] >= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_light_and_dark(opened: Opened, scheme: str) -> None:
    page = opened(color_scheme=scheme)
    kept(page, f"{scheme}-empty")
    write(page, GERMAN, ENGLISH)
    word(page, "meadow").hover()
    kept(page, scheme)
    for text, back in ((".card", ".card"), ("#count", ".card"), ("#facts", "html"), (".word:hover", ".word:hover")):
        assert contrast(page, text, back) >= 4.5
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == {
        "light": "rgb(244, 245, 247)",
        "dark": "rgb(18, 21, 26)",
    }.get(scheme)


def contrast(page: Page, text: str, back: str) -> float:
    """Of the text's colour to the other element's ground, as WCAG 2 defines it."""
    script = "([name, property]) => getComputedStyle(document.querySelector(name))[property]"
    colours = (page.evaluate(script, pair) for pair in ([text, "color"], [back, "backgroundColor"]))
    lighter, darker = sorted(map(luminance, colours), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_less_motion_is_respected(opened: Opened) -> None:
    page = opened(reduced_motion="reduce")
    script = "getComputedStyle(document.getElementById('progress'), '::before').animationName"
    assert page.evaluate(script) == "none"


@pytest.fixture(scope="module")
def address(numbers_bundle: Path) -> Iterator[str]:
    with running_service(service({"en-de": Translator.load(numbers_bundle)})) as address:
        yield address


class TestTheRealService:
    def test_a_text_is_translated_as_the_library_does(
        self, tab: Page, address: str, numbers_translator: Translator
    ) -> None:
        text = "twelve thousand\n\nnine hundred and one"
        tab.goto(address)
        write(tab, text, numbers_translator.translate_text(text))
        kept(tab, "service")

    def test_a_click_at_a_word_shows_the_alternatives_of_the_library(
        self, tab: Page, address: str, numbers_translator: Translator
    ) -> None:
        tab.goto(address)
        [translation] = numbers_translator.translate(["twelve"])
        write(tab, "twelve", translation.text)
        word(tab, translation.text).click()
        expect(tab.get_by_role("menuitem").first).to_be_visible()
        others = {one.text for one in numbers_translator.alternatives("twelve", "", 5)} - {translation.text}
        shown = {" ".join(item.split()) for item in tab.get_by_role("menuitem").all_text_contents()}
        assert shown & others

    def test_the_description_of_the_api_is_readable_and_complains_of_nothing(self, tab: Page, address: str) -> None:
        complaints: list[str] = []
        tab.on("console", lambda said: complaints.append(said.text))
        tab.goto(f"{address}/docs")
        expect(tab.locator("h1")).to_have_text("The API of this service")
        assert overflow(tab) == 0
        kept(tab, "docs")
        assert complaints == []
