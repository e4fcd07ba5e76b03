"""`kvx shortlist`, by a bundle that has tokenizers and a manifest and nothing to translate with."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvx.runtime.bundle.framing import Framing, SpecialIds
from kvx.runtime.bundle.manifest import FileEntry, Manifest
from kvx.runtime.shortlist.candidates import Shortlist, Vocabulary
from kvx.runtime.text.tokenizers.sentencepiece import SentencePiece
from kvx.tests.commands.running import Outcome
from kvx.tests.commands.running import invoke as kvx

CHECKPOINT = Path(__file__).resolve().parents[2] / "artifacts" / "numbers-checkpoint"
SOURCES = ["seven", "seven hundred", "one hundred", "twelve", "twelve hundred", "seven thousand"]
TARGETS = ["sieben", "siebenhundert", "einhundert", "zwölf", "zwölfhundert", "siebentausend"]
TABLE = ["sieben ▁seven 0.75", "hundert ▁hundred 0.5", "und ▁seven 0.25"]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name in ("source.model", "target.model"):
        (folder / name).write_bytes((CHECKPOINT / name).read_bytes())
    (folder / "encoder.onnx").write_bytes(b"")
    sizes = dict.fromkeys(("d_model", "encoder_layers", "decoder_layers"), 1)
    sizes |= {f"{side}_{size}": 1 for side in ("encoder", "decoder") for size in ("heads", "head_width", "d_ff")}
    special = SpecialIds(pad=0, bos=2, eos=3)
    Manifest(
        created="2025-01-01T00:00:00+00:00",
        kvx_version="0",
        model={
            **sizes,
            "source_vocab_size": len(SentencePiece(folder / "source.model")),
            "target_vocab_size": len(SentencePiece(folder / "target.model")),
            "source_positions": 64,
            "target_positions": 64,
        },
        precision="fp32",
        lowering="ort",
        opset=24,
        max_new_tokens=32,
        framing=Framing.plain(special, special),
        files={path.name: FileEntry.of(path) for path in folder.iterdir()},
        parity=None,
    ).write(folder)
    return folder


@pytest.fixture
def train(bundle: Path, tmp_path: Path) -> list[str]:
    """A command that works."""
    (tmp_path / "source").write_text("".join(f"{line}\n" for line in SOURCES))
    (tmp_path / "target").write_text("".join(f"{line}\n" for line in TARGETS))
    files = ("--source", tmp_path / "source", "--target", tmp_path / "target", "-o", tmp_path / "list.npz")
    return ["shortlist", "train", "--bundle", str(bundle), *map(str, files)]


@pytest.fixture
def import_(bundle: Path, tmp_path: Path) -> list[str]:
    """A command that works."""
    (tmp_path / "table").write_text("".join(f"{line}\n" for line in TABLE))
    files = (tmp_path / "table", "-o", tmp_path / "list.npz")
    return ["shortlist", "import", "--bundle", str(bundle), *map(str, files)]


def invoke(arguments: list[str], *more: str | Path) -> Outcome:
    """A command that prints nothing on stdout."""
    found = kvx(*arguments, *more)
    assert found.out == ""
    return found


def refused(result: Outcome, output: Path, *mentions: str) -> None:
    """Exit code 2, one sentence of our own, and no file."""
    assert result.code == 2
    [line] = result.err.splitlines()
    assert line.startswith("kvx: error: ")
    assert ". Expected " in line
    for mention in mentions:
        assert mention in line
    assert not output.exists()


def read(path: Path, bundle: Path) -> Shortlist:
    manifest = Manifest.read(bundle)
    source, target = Vocabulary.of(manifest, "source"), Vocabulary.of(manifest, "target")
    return Shortlist.read(path, source_vocab=source, target_vocab=target)


def candidates(path: Path, bundle: Path, text: str) -> set[str]:
    source, target = SentencePiece(bundle / "source.model"), SentencePiece(bundle / "target.model")
    return set(target.pieces(read(path, bundle).candidates(source.encode(text)).tolist()))


def test_training_writes_a_shortlist_for_the_bundle_and_says_what_it_is(
    train: list[str], bundle: Path, tmp_path: Path
) -> None:
    found = invoke(train, "--per-source", "3", "--frequent", "1")
    assert found.code == 0
    assert re.fullmatch(
        r"kvx: \S+list\.npz, [1-9]\d* KiB: 5 of 64 source pieces, [\d.]+ targets each, 1 frequent ones; "
        r"\d+ candidates a sentence, which hold [\d.]+% of this text's target tokens\n",
        found.err,
    )
    assert "sieben" in candidates(tmp_path / "list.npz", bundle, "seven")
    assert "sieben" not in candidates(tmp_path / "list.npz", bundle, "twelve")


def test_training_loads_no_torch_and_no_onnxruntime(train: list[str], tmp_path: Path) -> None:
    script = (
        "import sys; from kvx.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "finally: print([name for name in ('torch', 'onnx', 'onnxruntime') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *train], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"
    assert (tmp_path / "list.npz").exists()


@pytest.mark.parametrize("number", [1, 2])
def test_sizes_reach_the_shortlist(train: list[str], bundle: Path, tmp_path: Path, number: int) -> None:
    assert invoke(train, "--per-source", str(number), "--frequent", str(number)).code == 0
    found = read(tmp_path / "list.npz", bundle)
    assert (max(found.targets_per_source), len(found.frequent)) == (number, number)


def test_more_iterations_are_surer(train: list[str], bundle: Path, tmp_path: Path) -> None:
    lists = []
    for iterations in ("1", "300"):
        assert invoke(train, "--iterations", iterations).code == 0
        lists.append(read(tmp_path / "list.npz", bundle))
    assert len(lists[1].targets) < len(lists[0].targets)


@pytest.mark.parametrize(
    ("options", "mention"),
    [
        (["--per-source", "0"], "--per-source is 0"),
        (["--frequent", "-1"], "--frequent is -1"),
        (["--iterations", "0"], "--iterations is 0"),
        (["--bundle", "nowhere"], "nowhere"),
        (["--source", "nowhere"], "nowhere"),
        (["--target", "."], "cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_training_that_cannot_work_is_refused(
    train: list[str], tmp_path: Path, options: list[str], mention: str
) -> None:
    refused(invoke(train, *options), tmp_path / "list.npz", mention)


@pytest.mark.parametrize(
    ("source", "target", "mentions"),
    [
        (b"one\ntwo\n", b"eins\n", ["2 sources and 1 targets"]),
        (b"", b"eins\n", ["0 sources and 1 targets"]),
        (b"", b"", ["no word in the sources and targets"]),
        (b"\n \n", b"eins\nzwei\n", ["no word in the sources"]),
        (b"one\n\xff\n", b"eins\nzwei\n", ["Line 2", "UTF-8"]),
    ],
)
def test_text_that_cannot_be_learnt_from_is_refused(
    train: list[str], tmp_path: Path, source: bytes, target: bytes, mentions: list[str]
) -> None:
    (tmp_path / "source").write_bytes(source)
    (tmp_path / "target").write_bytes(target)
    refused(invoke(train), tmp_path / "list.npz", *mentions)


def test_a_folder_that_is_not_there_is_told(train: list[str], tmp_path: Path) -> None:
    output = tmp_path / "nowhere" / "list.npz"
    refused(invoke(train, "-o", output), output, "cannot be written")


def test_an_altered_tokenizer_is_refused(train: list[str], bundle: Path, tmp_path: Path) -> None:
    content = bytearray((bundle / "target.model").read_bytes())
    content[-1] ^= 1
    (bundle / "target.model").write_bytes(content)
    refused(invoke(train), tmp_path / "list.npz", "target.model", "sha256")


def test_importing_writes_a_shortlist_for_the_bundle_and_says_what_it_is(
    import_: list[str], bundle: Path, tmp_path: Path
) -> None:
    found = invoke(import_, "--per-source", "1", "--frequent", "1")
    assert found.code == 0
    assert re.fullmatch(
        r"kvx: \S+list\.npz, [1-9]\d* KiB: 2 of 64 source pieces, 1\.0 targets each, 1 frequent ones\n", found.err
    )
    assert candidates(tmp_path / "list.npz", bundle, "hundred") == {"</s>", "hundert", "sieben"}


def test_entries_with_unknown_pieces_are_told(import_: list[str], tmp_path: Path) -> None:
    (tmp_path / "table").write_text("\n".join([*TABLE, "Haus house 0.5"]))
    found = invoke(import_)
    assert found.code == 0
    unknown, summary = found.err.splitlines()
    assert unknown == "kvx: 1 of 4 entries have pieces that the tokenizers do not know (the first on line 4)"
    assert "2 of 64 source pieces" in summary


@pytest.mark.parametrize(
    ("content", "mentions"),
    [
        ("", ["0 of 0 entries"]),
        ("sieben ▁seven 0.5\nund ▁seven\n", ["Line 2", "target source probability"]),
        ("Haus house 0.5\n", ["Line 1", "1 of 1 entries"]),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(
    import_: list[str], tmp_path: Path, content: str, mentions: list[str]
) -> None:
    (tmp_path / "table").write_text(content)
    refused(invoke(import_), tmp_path / "list.npz", *mentions)


@pytest.mark.parametrize(
    ("options", "mention"),
    [
        (["--per-source", "0"], "--per-source is 0"),
        (["--frequent", "0"], "--frequent is 0"),
        (["--bundle", "no"], "no holds no manifest.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_importing_that_cannot_work_is_refused(
    import_: list[str], tmp_path: Path, options: list[str], mention: str
) -> None:
    refused(invoke(import_, *options), tmp_path / "list.npz", mention)


def test_a_missing_table_is_refused(import_: list[str], tmp_path: Path) -> None:
    (tmp_path / "table").unlink()
    refused(invoke(import_), tmp_path / "list.npz", "table cannot be read")


class TestTranslating:
    """With the list that was learnt from SOURCES, by a bundle that translates."""

    @pytest.fixture
    def listed(self, shortlist_bundle: Path, tmp_path: Path) -> Path:
        for name, lines in (("source", SOURCES), ("target", TARGETS)):
            (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        files = ("--source", tmp_path / "source", "--target", tmp_path / "target", "-o", tmp_path / "list.npz")
        invoke(["shortlist", "train", "--bundle", str(shortlist_bundle)], *files)
        return tmp_path / "list.npz"

    @staticmethod
    def translate(*arguments: str | Path) -> Outcome:
        return kvx("translate", "--device", "cpu", *arguments)

    @pytest.mark.parametrize("more", [[], ["--samples", "1", "--top-k", "1"], ["--workers", "2", "--rows", "2"]])
    def test_translate_says_how_many_candidates_there_were(
        self, shortlist_bundle: Path, listed: Path, more: list[str]
    ) -> None:
        found = self.translate(
            "--model", shortlist_bundle, "--shortlist", listed, "--stats", *more, "twelve", "nine", "seven hundred"
        )
        assert (found.code, found.out) == (0, "zwölf\nneun\nsiebenhundert\n")
        assert re.search(r", \d+ candidates a step, 1 sentences that the shortlist does not know\n$", found.err)

    def test_without_a_list_no_candidates_are_spoken_of(self, shortlist_bundle: Path) -> None:
        found = self.translate("--model", shortlist_bundle, "--stats", "twelve")
        assert (found.code, found.out) == (0, "zwölf\n")
        assert "candidates" not in found.err

    def test_evaluate_takes_one(self, shortlist_bundle: Path, listed: Path) -> None:
        files = ("--source", listed.parent / "source", "--reference", listed.parent / "target")
        line: list[str | Path] = ["evaluate", shortlist_bundle, *files, "--shortlist", listed]
        found = kvx(*line)
        assert found.code == 0
        assert "| onnx" in found.out

    def test_evaluate_refuses_backends_that_have_no_such_steps(self, shortlist_bundle: Path, listed: Path) -> None:
        files = ("--source", listed.parent / "source", "--reference", listed.parent / "target")
        line = ["evaluate", str(shortlist_bundle), "--backend", "onnx,torch"]
        refused(
            invoke(line, *files, "--shortlist", listed),
            listed.parent / "nothing",
            "--shortlist is given with the backends onnx,torch",
        )

    def test_a_bundle_without_the_graph_is_refused(self, numbers_bundle: Path, listed: Path) -> None:
        refused(
            self.translate("--model", numbers_bundle, "--shortlist", listed, "one"),
            listed.parent / "nothing",
            "--shortlist does not work with the onnx backend of this bundle",
            "exported with a shortlist",
        )

    def test_no_file_is_refused(self, shortlist_bundle: Path, tmp_path: Path) -> None:
        found = self.translate("--model", shortlist_bundle, "--shortlist", tmp_path / "none.npz", "one")
        refused(found, tmp_path / "nothing", "none.npz")

    def test_export_refuses_it_without_onnx(self, tmp_path: Path) -> None:
        line = ["export", str(CHECKPOINT / "model.pt"), "-o", str(tmp_path / "new"), "--format", "torchscript"]
        refused(
            invoke(line, "--with-shortlist"),
            tmp_path / "new",
            "--with-shortlist does not go together with --format torchscript",
        )
