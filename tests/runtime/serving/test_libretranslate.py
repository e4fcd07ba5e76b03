"""LibreTranslate's interface: what its clients send is understood, and what they expect is answered."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import threading
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest

pytest.importorskip("kvx.tests.runtime.serving.serving")  # which skips where the extra serve is missing

from kvx.runtime.serving.keys import Key, Keys, hashed
from kvx.testing import FakeTranslator
from kvx.tests.runtime.serving.serving import FORM, JSON, Client, Json, Reply, running, service

GERMAN = "Ein Hund schläft auf dem Dach des Hauses."
ENGLISH = "A dog sleeps on the roof of the house."
DE_EN = {"source": "de", "target": "en"}
MULTIPART = "multipart/form-data; boundary=B"
LONG = "Hüte und Äpfel.\n" * 100 + "🙂" * 6000  # 12 bytes of a query each
CODES = ["de", "en", "fr", "zh-Hans", "zh-Hant", "pt", "he"]


@pytest.fixture(scope="module")
def de_en() -> FakeTranslator:
    """What translates German, and is asked for the same beside the service."""
    return FakeTranslator({"Hund": "dog", "böse": "<script>alert(1)</script>"})


@pytest.fixture(scope="module")
def client(de_en: FakeTranslator) -> Iterator[Client]:
    translators = {
        "de-en": de_en,
        "en-de": FakeTranslator(),
        "en-he": FakeTranslator(),
        "many": FakeTranslator(languages=["fr", "zh_Hans", "zh_Hant", "pt_BR"]),
    }
    with running(service(translators, texts=50, beams=8)) as address:
        yield Client(address)


@pytest.fixture(scope="module")
def locked() -> Iterator[Client]:
    """A server with keys."""
    keys = Keys({hashed("hers"): Key(name="alice", characters=10, texts=2), hashed("his"): Key(name="bob")})
    with running(service({"de-en": FakeTranslator()}, keys)) as address:
        yield Client(address)


def translated(reply: Reply) -> Any:  # noqa: ANN401  # a text or a list
    """The translation of an answer that has nothing else."""
    assert (reply.status, reply.kind) == (200, JSON), reply.body
    assert reply.json.keys() == {"translatedText"}
    return reply.json["translatedText"]


def refused(reply: Reply, status: int = 400) -> str:
    """What an error says."""
    assert (reply.status, reply.kind) == (status, JSON), reply.body
    assert reply.json.keys() == {"error"}
    said: str = reply.json["error"]
    return said


TEXTS = [
    "Hund",
    " \n",
    "🙂",
    "  Ein Hund. Er schläft!\n\n\n\t- Zwei Katzen\n***\n",
    "Hund\r\nHund\r\n",
    "böse & böse",
    "Ohne Punkt am Ende\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_translated_as_the_library_does(client: Client, de_en: FakeTranslator, text: str) -> None:
    expected = de_en.translate_text(text)
    assert translated(client.post("/translate", {"q": text, **DE_EN})) == expected
    assert translated(client.post("/translate", {"q": text, "format": "text", **DE_EN})) == expected
    assert translated(client.post_form("/translate", q=text, **DE_EN)) == expected
    assert translated(client.send("POST", f"/translate?{urlencode({'q': text, **DE_EN})}")) == expected
    assert translated(multipart(client, [("q", text), *DE_EN.items()])) == expected


def test_a_list_is_answered_by_a_list_of_equal_length(client: Client, de_en: FakeTranslator) -> None:
    assert translated(client.post("/translate", {"q": ["Hund"], **DE_EN})) == ["dog"]
    assert translated(client.post("/translate", {"q": [""], **DE_EN})) == [""]
    texts = [*TEXTS, "", *TEXTS]
    expected = [*map(de_en.translate_text, texts)]
    assert translated(client.post("/translate", {"q": texts, **DE_EN})) == expected
    assert translated(client.post_form("/translate", q=texts, **DE_EN)) == expected
    assert translated(client.send("POST", f"/translate?{urlencode({'q': texts, **DE_EN}, doseq=True)}")) == expected
    assert translated(multipart(client, [*(("q", text) for text in texts), *DE_EN.items()])) == expected


def multipart(
    client: Client, fields: list[tuple[str, str]], rest: bytes = b"--B--\r\n", kind: str = MULTIPART
) -> Reply:
    parts = (f'--B\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields)
    return client.send("POST", "/translate", "".join(parts).encode() + rest, content_type=kind)


@pytest.mark.parametrize(
    "page",
    [
        "<p title='Hund'>Hund <b>Hund</b> &amp; <code>Hund</code></p>\n",
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "<p>böse</p>",
        "<img alt='böse' src=x>",
        "<script>Hund</script>\n\n",
    ],
)
def test_html_is_translated_as_the_library_does(client: Client, de_en: FakeTranslator, page: str) -> None:
    found = translated(client.post("/translate", {"q": page, "format": "html", **DE_EN}))
    assert found == de_en.translate_text(page, html=True)
    assert found.count("<script") == page.count("<script")


def test_a_form_may_hold_bytes_of_utf_8(client: Client) -> None:
    """As `curl -d 'q=Hüte'` sends them."""
    body = "q=Hüte 🙂&source=de&target=en".encode()
    assert translated(client.send("POST", "/translate", body, content_type=FORM)) == "HÜTE 🙂"


def test_fields_come_from_the_query_and_the_form_together(client: Client) -> None:
    path = f"/translate?{urlencode(DE_EN)}"
    assert translated(client.send("POST", path, b"q=Hund", content_type=FORM)) == "dog"
    assert translated(client.send("POST", f"{path}&q=Katze", b"q=Hund", content_type=FORM)) == "dog"


def test_a_query_string_of_70_kb_is_read(client: Client) -> None:
    query = urlencode({"q": LONG, **DE_EN}, quote_via=quote)
    assert len(query) > 70_000
    assert translated(client.send("POST", f"/translate?{query}")) == LONG.upper()


@pytest.mark.parametrize(("source", "target"), [("DE", "EN"), ("de-DE", "en_US"), ("deu", "eng"), ("De", "eN")])
def test_codes_have_no_case_and_other_spellings(client: Client, source: str, target: str) -> None:
    assert translated(client.post("/translate", {"q": "Hund", "source": source, "target": target})) == "dog"


@pytest.mark.parametrize(
    ("code", "own"), [("zh", "zh_Hans"), ("zt", "zh_Hant"), ("pb", "pt_BR"), ("zh-TW", "zh_Hant"), ("pt-BR", "pt_BR")]
)
def test_other_names_of_languages_are_known(client: Client, code: str, own: str) -> None:
    found = translated(client.post("/translate", {"q": "a", "source": "fr", "target": code}))
    assert found == f">>{own}<< A"
    assert translated(client.post("/translate", {"q": "a", "source": code, "target": "fr"})) == ">>fr<< A"


def test_alternatives_are_the_next_best(client: Client, de_en: FakeTranslator) -> None:
    best, *others = de_en.translate_one("Hund", beam_size=4, n_best=4).hypotheses
    for count in 3, "3":
        reply = client.post("/translate", {"q": "Hund", "alternatives": count, **DE_EN})
        assert reply.json == {"translatedText": best.text, "alternatives": [one.text for one in others]}
    assert client.post_form("/translate", q="Hund", alternatives=3, **DE_EN).json == reply.json
    found = client.post("/translate", {"q": ["Hund", "", "Hund"], "alternatives": 3, **DE_EN}).json
    mine = [one.text for one in others]
    assert found == {"translatedText": ["dog", "", "dog"], "alternatives": [mine, ["", "", ""], mine]}
    found = client.post("/translate", {"q": "Hund.\n\nHund", "alternatives": 2, **DE_EN}).json
    assert all(one.count("\n\n") == 1 for one in found["alternatives"])


@pytest.mark.parametrize("count", [0, None, "", "0"])
def test_no_alternatives_are_given_where_none_are_asked_for(client: Client, count: object) -> None:
    assert translated(client.post("/translate", {"q": "Hund", "alternatives": count, **DE_EN})) == "dog"


@pytest.mark.parametrize("count", ["abc", -1, "-1", 1.5, True, [1, 2], {"a": 1}, 8, 10**30, " " * 12 + "9"])
def test_alternatives_are_a_number(client: Client, count: object) -> None:
    said = refused(client.post("/translate", {"q": "Hund", "alternatives": count, **DE_EN}))
    assert "'alternatives' parameter" in said


def test_the_language_is_found_out(client: Client) -> None:
    reply = client.post("/translate", {"q": GERMAN, "source": "auto", "target": "en"})
    assert reply.json["translatedText"] == GERMAN.upper()
    detected = reply.json["detectedLanguage"]
    assert detected["language"] == "de"
    assert 90 < detected["confidence"] <= 100
    assert client.post("/translate", {"q": GERMAN, "source": "AUTO", "target": "EN"}).json == reply.json


def test_each_text_of_a_list_has_its_own_language(client: Client) -> None:
    texts = [GERMAN, ENGLISH, "", "🙂", GERMAN]
    found = client.post("/translate", {"q": texts, "source": "auto", "target": "en"}).json
    assert found["translatedText"] == [GERMAN.upper(), ENGLISH, "", "🙂", GERMAN.upper()]
    languages = [one["language"] for one in found["detectedLanguage"]]
    assert (languages[0], languages[1], languages[4], len(languages)) == ("de", "en", "de", 5)


def test_a_text_in_the_target_language_stays(client: Client) -> None:
    for form in "text", "html":
        asked = {"q": f"{ENGLISH}\n\n", "source": "auto", "target": "en", "format": form}
        assert client.post("/translate", asked).json["translatedText"] == f"{ENGLISH}\n\n"


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({}, "Invalid request: missing q parameter"),
        ({"q": ""}, "Invalid request: missing q parameter"),
        ({"q": []}, "Invalid request: missing q parameter"),
        ({"q": None}, "Invalid request: missing q parameter"),
        ({"q": "a", "source": None}, "Invalid request: missing source parameter"),
        ({"q": "a", "source": ""}, "Invalid request: missing source parameter"),
        ({"q": "a", "target": None}, "Invalid request: missing target parameter"),
        ({"q": "a", "source": "xx"}, "xx is not supported"),
        ({"q": "a", "target": "xx"}, "xx is not supported"),
        ({"q": "a", "target": "auto"}, "auto is not supported"),
        ({"q": "a", "target": "fr"}, "French (fr) is not available as a target language from German (de)"),
        ({"q": "a", "target": "de"}, "German (de) is not available as a target language from German (de)"),
        ({"q": "a", "format": "xml"}, "xml format is not supported"),
        ({"q": 1}, "Invalid request: q is neither a text nor a list of texts"),
        ({"q": ["a", 1]}, "Invalid request: q is neither a text nor a list of texts"),
        ({"q": {"a": "b"}}, "Invalid request: q is neither a text nor a list of texts"),
        ({"q": "a", "source": 1}, "Invalid request: source is not a text"),
        ({"q": "a", "format": 1}, "Invalid request: format is not a text"),
    ],
)
def test_an_error_is_said_as_clients_know_it(client: Client, form: Json, said: str) -> None:
    assert refused(client.post("/translate", {**DE_EN, **form})) == said


def test_what_is_too_large_names_the_limit(client: Client) -> None:
    assert "exceeds text limit (50000)" in refused(client.post("/translate", {"q": "a" * 50_001, **DE_EN}))
    assert "exceeds text limit (50)" in refused(client.post("/translate", {"q": ["a"] * 51, **DE_EN}))
    assert "exceeds text limit (50000)" in refused(client.post("/detect", {"q": "a" * 50_001}))
    assert "1,048,576 bytes" in refused(client.post("/translate", {"q": "a" * 2**20, **DE_EN}), 413)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"q"',
        b"[" * 100_000,
        b'{"q": ' + b"[" * 100_000,
        b'{"q": "\xff"}',
        b'{"q": "\\ud800", "source": "de", "target": "en"}',
    ],
    ids=lambda body: body[:20].decode("latin-1"),
)
def test_what_is_no_json_is_refused(client: Client, body: bytes) -> None:
    for path in "/translate", "/detect":
        assert refused(client.send("POST", path, body, content_type=JSON)).startswith("Invalid JSON format")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"q=%ff&source=de&target=en", FORM),
        (b"q=\xff&source=de&target=en", FORM),
        (b"q=a&source=de&target=en", "text/plain"),
        (b'{"q": "a", "source": "de", "target": "en"}', ""),
        (b"not a form", MULTIPART),
        (b"--B\r\n\r\n", MULTIPART),
        (b"--B--\r\n", "multipart/form-data"),
        (b'--B\r\nContent-Disposition: form-data; name="q"; filename="f"\r\n\r\na\r\n--B--\r\n', MULTIPART),
    ],
)
def test_what_is_no_form_is_refused(client: Client, body: bytes, kind: str) -> None:
    assert refused(client.send("POST", "/translate", body, **({"content_type": kind} if kind else {})))


def test_languages_are_detected(client: Client) -> None:
    for reply in (
        client.post("/detect", {"q": GERMAN}),
        client.post_form("/detect", q=GERMAN),
        client.send("POST", f"/detect?{urlencode({'q': GERMAN})}"),
        client.post("/detect", {"q": ["Ein", GERMAN]}),
    ):
        assert (reply.status, reply.kind) == (200, JSON)
        assert reply.json[0]["language"] == "de"
        assert 90 < reply.json[0]["confidence"] <= 100
    found = client.post("/detect", {"q": "hallo"}).json
    assert [one["confidence"] for one in found] == sorted((one["confidence"] for one in found), reverse=True)
    assert {one["language"] for one in found} <= set(CODES)
    assert refused(client.post("/detect", {})) == "Invalid request: missing q parameter"


@pytest.mark.parametrize("body", [b"", b"api_key=a"])
def test_languages_are_listed_with_their_targets(client: Client, body: bytes) -> None:
    reply = client.get("/languages", body, content_type=FORM)
    assert (reply.status, reply.kind) == (200, JSON)
    found = {one["code"]: one for one in reply.json}
    assert set(found) == set(CODES)
    assert found["de"] == {"code": "de", "name": "German", "targets": ["en"]}
    assert sorted(found["en"]["targets"]) == ["de", "he"]
    assert found["he"] == {"code": "he", "name": "Hebrew", "targets": []}
    assert found["zh-Hans"]["name"] == "Chinese (Simplified)"


def test_settings_are_told(client: Client, locked: Client) -> None:
    found = client.get("/frontend/settings").json
    assert found == {
        "charLimit": 50_000,
        "frontendTimeout": 500,
        "apiKeys": False,
        "keyRequired": False,
        "suggestions": False,
        "filesTranslation": False,
        "supportedFilesFormat": [],
        "language": {
            "source": {"code": "auto", "name": "Auto Detect"},
            "target": {"code": "en", "name": "English"},
        },
    }
    assert locked.get("/frontend/settings").json == found | {"apiKeys": True, "keyRequired": True}


def test_features_that_are_off_are_refused(client: Client) -> None:
    for path in "/suggest", "/translate_file":
        assert refused(client.post(path, {"q": "a", "s": "b", **DE_EN}), 403)
        assert refused(client.send("POST", path, b"x" * 1000, content_type=MULTIPART), 403)


def test_a_service_is_healthy(client: Client) -> None:
    for body in b"", b"{}":
        reply = client.get("/health", body)
        assert (reply.status, reply.json) == (200, {"status": "ok"})


def test_texts_are_posted(client: Client) -> None:
    for path in "/translate", "/detect", "/suggest":
        reply = client.get(f"{path}?{urlencode({'q': 'a', **DE_EN})}")
        assert (reply.status, reply.headers["allow"]) == (405, "POST")
        assert reply.json["error"]


@pytest.mark.parametrize("name", ["api_key", "apiKey"])
def test_a_key_comes_in_the_body_form_or_query(locked: Client, name: str) -> None:
    asked: Json = {"q": "a", **DE_EN}
    assert "API key" in refused(locked.post("/translate", asked))
    assert "API key" in refused(locked.post("/translate", {**asked, name: ""}))
    assert "API key" in refused(locked.post("/translate", {**asked, name: None}))
    assert refused(locked.post("/translate", {**asked, name: "wrong"}), 403) == "Invalid API key"
    assert "api" in refused(locked.post("/translate", {**asked, name: 1}))
    keyed = {**asked, name: "hers"}
    assert translated(locked.post("/translate", keyed)) == "A"
    assert translated(locked.post_form("/translate", **keyed)) == "A"
    assert translated(locked.send("POST", f"/translate?{urlencode(keyed)}")) == "A"
    assert locked.post("/detect", {"q": "a", name: "his"}).status == 200
    assert refused(locked.post("/detect", {"q": "a"}))


def test_a_key_has_limits_of_its_own(locked: Client) -> None:
    asked: Json = {"api_key": "hers", **DE_EN}
    assert "exceeds text limit (10)" in refused(locked.post("/translate", {"q": "a" * 11, **asked}))
    assert "exceeds text limit (2)" in refused(locked.post("/translate", {"q": ["a"] * 3, **asked}))


def test_too_many_requests_are_told_when_to_come_back() -> None:
    slow = FakeTranslator(step_seconds=0.01)
    with running(service({"de-en": slow}, client_requests=1, patience=0.05, timeout=20.0)) as address:
        first = threading.Thread(target=Client(address).post, args=("/translate", {"q": "x" * 100, **DE_EN}))
        first.start()
        while slow.engine.busy_with.rows == 0:
            time.sleep(0.005)
        reply = Client(address).post("/translate", {"q": "x", **DE_EN})
        assert refused(reply, 429).startswith("Slowdown:")
        assert int(reply.headers["retry-after"]) >= 1
        first.join()


def test_half_a_translation_is_none() -> None:
    with running(service({"de-en": FakeTranslator(step_seconds=0.01)}, timeout=0.1)) as address:
        assert refused(Client(address).post("/translate", {"q": "x" * 1000, **DE_EN}), 504)


def test_models_that_are_not_there_yet_are_waited_for() -> None:
    with running(service({})) as address:
        client = Client(address)
        for reply in client.post("/translate", {"q": "a", **DE_EN}), client.get("/languages"):
            assert refused(reply, 503)
            assert "retry-after" in reply.headers
        assert client.get("/health").status == 200


def test_libretranslatepy(client: Client, locked: Client) -> None:
    library = pytest.importorskip("libretranslatepy")
    api = library.LibreTranslateAPI(client.address)
    assert api.translate("Hund\n\nHüte", "de", "en") == "dog\n\nHÜTE"
    assert api.detect(GERMAN)[0]["language"] == "de"
    assert {one["code"] for one in api.languages()} == set(CODES)
    with pytest.raises(urllib.error.HTTPError):
        api.translate("Hund", "de", "xx")
    assert library.LibreTranslateAPI(locked.address, "hers").translate("a", "de", "en") == "A"
    with pytest.raises(urllib.error.HTTPError):
        library.LibreTranslateAPI(locked.address, "wrong").translate("a", "de", "en")


def test_libretranslate_aio(client: Client, locked: Client) -> None:
    library = pytest.importorskip("libretranslate_aio")

    async def ask() -> None:
        async with library.AsyncLibreTranslate(client.address) as api:
            assert (await api.translate("Hund", "de", "en")).translated_text == "dog"
            found = await api.translate(["Hund", "Hüte", GERMAN], "auto", "en", alternatives=2)
            assert found.translated_text[2] == GERMAN.upper()
            assert [len(each) for each in found.alternatives] == [2, 2, 2]
            assert found.detected_language[2].language == "de"
            page = await api.translate("<p>böse</p>", "de", "en", format="html")
            assert page.translated_text == "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>"
            assert (await api.detect(GERMAN))[0].language == "de"
            assert [one.targets for one in await api.languages() if one.code == "de"] == [["en"]]
            assert (await api.frontend_settings()).char_limit == 50_000
            assert await api.health()
            for refusal in api.suggest("a", "b", "de", "en"), api.translate("a", "de", "xx"):
                with pytest.raises(library.LibreTranslateError) as error:
                    await refusal
                assert error.value.status_code in (400, 403)
        async with library.AsyncLibreTranslate(locked.address, api_key="wrong") as api:
            with pytest.raises(library.LibreTranslateError, match="Invalid API key"):
                await api.translate("a", "de", "en")

    asyncio.run(ask())


def test_deep_translator(client: Client, locked: Client) -> None:
    library = pytest.importorskip("deep_translator")
    exceptions = pytest.importorskip("deep_translator.exceptions")

    def translator(address: str, key: str = "any") -> Any:  # noqa: ANN401
        return library.LibreTranslator(source="de", target="en", api_key=key, custom_url=f"{address}/")

    assert translator(client.address).translate("Hund") == "dog"
    assert translator(client.address).translate_batch(["Hund", "Hüte"]) == ["dog", "HÜTE"]
    assert translator(client.address).translate(LONG) == LONG.upper()
    assert translator(locked.address, "hers").translate("a") == "A"
    with pytest.raises(exceptions.AuthorizationException):
        translator(locked.address, "wrong").translate("a")
    with pytest.raises(exceptions.ServerException):
        translator(locked.address, "hers").translate("a" * 11)


@pytest.fixture(scope="module")
def of_npm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the client of npm."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("there is no node or no npm")
    folder = tmp_path_factory.mktemp("npm")
    flags = ["--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder)]
    try:
        command = [npm, "install", *flags, "libretranslate@1.0.1"]
        done = subprocess.run(command, check=False, capture_output=True, timeout=30)
    except subprocess.TimeoutExpired:
        pytest.skip("npm gave nothing in time")
    if done.returncode != 0:
        pytest.skip("npm could not install the client")
    return folder


def test_the_client_of_npm(client: Client, locked: Client, of_npm: Path) -> None:
    script = """
        const { translate } = require("libretranslate");
        const asked = JSON.parse(process.argv[1]);
        Promise.all(asked.map((one) => translate(one).catch((error) => `${error}`)))
            .then((found) => console.log(JSON.stringify(found)));
    """
    asked: list[Json] = [
        {"query": "Hund", **DE_EN, "apiurl": client.address},
        {"query": "<p>böse</p>", **DE_EN, "format": "html", "apiurl": client.address},
        {"query": GERMAN, "target": "en", "apiurl": client.address},
        {"query": "Hund", "source": "de", "target": "xx", "apiurl": client.address},
        {"query": "a", **DE_EN, "apiurl": locked.address, "apiKey": "hers"},
    ]
    command = ["node", "-e", script, json.dumps(asked)]
    done = subprocess.run(command, cwd=of_npm, capture_output=True, check=True, timeout=30)
    *found, unknown, keyed = json.loads(done.stdout)
    assert found == ["dog", "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>", GERMAN.upper()]
    assert "not found" in unknown
    assert keyed == "A"


def test_weblate(client: Client) -> None:
    """As it machine-translates: JSON, lists of 20 texts, the key empty where none was set."""
    headers = {"accept": "application/json; charset=utf-8", "user_agent": "Weblate"}
    languages = client.send("GET", "/languages", b"", **headers).json
    assert {"de", "en"} <= {one["code"] for one in languages}
    texts = [f"Hund {number}\n" for number in range(20)]
    reply = client.post("/translate", {"api_key": "", "q": texts, **DE_EN}, **headers)
    assert reply.json["translatedText"] == [text.upper() for text in texts]


def test_mastodon(client: Client) -> None:
    """As it translates a post: JSON, a list of HTML, the source or auto, and null where there is no key."""
    languages = client.get("/languages").json
    assert {one["code"]: one["targets"] for one in languages}["de"] == ["en"]
    page = "<p>Hund <br />Hund &amp;</p>"
    body = {"q": [page, "böse", ""], "source": "de", "target": "en", "format": "html", "api_key": None}
    found = client.post("/translate", body).json
    assert found["translatedText"] == ["<p>dog <br />HUND &amp;</p>", "&lt;script&gt;alert(1)&lt;/script&gt;", ""]
    found = client.post("/translate", {**body, "q": [f"<p>{GERMAN}</p>", ENGLISH], "source": "auto"}).json
    assert found["translatedText"] == [f"<p>{GERMAN.upper()}</p>", ENGLISH]
    assert [one["language"] for one in found["detectedLanguage"]] == ["de", "en"]


def test_discourse(client: Client) -> None:
    """As it translates a post: the language is asked for first, both as forms, in HTML, with iw for Hebrew."""
    detected = client.post_form("/detect", q=ENGLISH)
    assert (detected.status, detected.json[0]["language"]) == (200, "en")
    found = client.post_form("/translate", q=f"<p>{ENGLISH}</p>", source="en", target="iw", format="html")
    assert translated(found) == f"<p>{ENGLISH.upper()}</p>"
    supported = client.get("/languages").json
    assert all({"code", "name"} <= one.keys() for one in supported)


@pytest.mark.parametrize("charset", ["utf-7", "punycode", "no-such-codec"])
def test_a_client_does_not_choose_how_its_parts_are_decoded(client: Client, charset: str) -> None:
    fields = [("q", "+2AA-"), ("source", "de"), ("target", "en")]
    reply = multipart(client, fields, kind=f"{MULTIPART}; charset={charset}")
    assert (reply.status, reply.json["translatedText"].lower()) == (200, "+2aa-")
