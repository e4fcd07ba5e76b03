"""`kvx` itself: usage, exit codes, and what becomes of errors."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import typer

import kvx
from kvx.cli import app
from kvx.runtime.bundle.folder import Bundle
from kvx.runtime.options import OPTIONS
from kvx.tests.commands.running import (
    PATIENCE,
    SCRIPT,
    Outcome,
    Run,
    invoke,
    invoke_as_it_is,
    refused,
    refused_usage,
)


def test_version(run: Run) -> None:
    assert run("--version") == Outcome(0, f"kvx {kvx.__version__}\n", "")


@pytest.mark.skipif(not SCRIPT.exists(), reason="kvx is not installed as a command here")
def test_the_command_is_the_module(run: Run) -> None:
    assert run("--version", command=[str(SCRIPT)]) == run("--version")


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_names_every_command(run: Run, option: str) -> None:
    found = run(option)
    assert found.code == 0
    for command in ("export", "verify", "inspect", "translate"):
        assert f"\n  {command} " in found.out


def test_no_arguments_show_the_help_and_are_no_success(run: Run) -> None:
    found = run()
    assert found.code == 2
    assert "Usage: kvx" in found.out + found.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nope"],
        ["nope"],
        ["translate", "--nope"],
        ["translate", "--rows", "x"],
        ["translate", "--backend", "tpu", "one"],
        ["translate", "--on-long", "skip", "one"],
        ["export"],
        ["export", "model.pt", "--format", "exe"],
        ["inspect"],
        ["verify", "bundle"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_parsed_is_a_usage_error(arguments: list[str]) -> None:
    refused_usage(invoke(*arguments))


class TestErrors:
    """By `kvx inspect`, which is the quickest to fail."""

    @pytest.fixture
    def broken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(folder: Path) -> NoReturn:
            raise ZeroDivisionError(f"{folder} is no number")

        monkeypatch.setattr(Bundle, "open", fail)

    @pytest.mark.usefixtures("broken")
    def test_a_crash_says_that_it_is_a_bug_in_which_version_and_how_to_get_the_traceback(self) -> None:
        found = invoke("inspect", "seven")
        assert (found.code, found.out) == (70, "")
        assert found.err == (
            "kvx: internal error: ZeroDivisionError: seven is no number. "
            f"This is a bug in kvx {kvx.__version__}. Please report it with what kvx --debug or KVX_DEBUG=1 prints.\n"
        )

    @pytest.mark.usefixtures("broken")
    @pytest.mark.parametrize("by_option", [True, False])
    def test_debugging_shows_where_a_crash_came_from(self, monkeypatch: pytest.MonkeyPatch, by_option: bool) -> None:
        monkeypatch.setenv("KVX_DEBUG", "0" if by_option else "1")
        found = invoke_as_it_is(*(["--debug"] if by_option else []), "inspect", "seven")
        assert (found.code, found.out) == (70, "")
        assert found.err.startswith("Traceback (most recent call last):\n")
        assert "in fail\n" in found.err
        assert f"This is a bug in kvx {kvx.__version__}. Please report it with the traceback." in found.err

    @pytest.mark.parametrize("by_option", [True, False])
    def test_debugging_shows_where_an_error_of_the_user_was_found(
        self, monkeypatch: pytest.MonkeyPatch, by_option: bool
    ) -> None:
        if not by_option:
            monkeypatch.setenv("KVX_DEBUG", "1")
        found = invoke_as_it_is(*(["--debug"] if by_option else []), "inspect", "nowhere")
        assert (found.code, found.out) == (2, "")
        assert found.err.startswith("Traceback (most recent call last):\n")
        assert "kvx.BundleError: nowhere" in found.err
        assert re.search(r"^kvx: error: .*nowhere", found.err, re.MULTILINE)

    @pytest.mark.parametrize("value", ["", "0", "false"])
    def test_no_traceback_is_shown_where_none_is_asked_for(self, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
        monkeypatch.setenv("KVX_DEBUG", value)
        refused(invoke("inspect", "nowhere"), "nowhere")

    @pytest.mark.parametrize(
        ("error", "remedy"),
        [
            (OSError(errno.ENOSPC, "No space left on device", "out"), "Free space on the disk."),
            (OSError(errno.EMFILE, "Too many open files"), "Raise the limit of open files"),
            (OSError(errno.EACCES, "Permission denied", "x"), "Check permissions."),
            (OSError("libfoo.so.1: cannot open shared object file: No such file"), "Install what is missing."),
            (ImportError("libbar.so: cannot open shared object file"), "Install what is missing."),
        ],
    )
    def test_an_error_of_the_system_says_what_to_do_about_its_kind(
        self, monkeypatch: pytest.MonkeyPatch, error: Exception, remedy: str
    ) -> None:
        def fail(folder: Path) -> NoReturn:
            raise error

        monkeypatch.setattr(Bundle, "open", fail)
        monkeypatch.setattr("kvx.cli.drop_output", lambda: None)  # the standard output of a test is no file
        refused(invoke("inspect", "bundle"), remedy)

    def test_a_failed_proof_is_another_exit_code(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def differ(_: Path) -> NoReturn:
            raise kvx.ParityError("It differs", expected="none of that", remedy="Report it.")

        monkeypatch.setattr(Bundle, "open", differ)
        assert invoke("inspect", "bundle") == Outcome(
            1, "", "kvx: error: It differs. Expected none of that. Report it.\n"
        )

    @pytest.mark.parametrize(
        ("raised", "code", "says"),
        [
            (MemoryError("Unable to allocate 3.00 GiB"), 2, "kvx: error: There is not enough memory (Unable"),
            (RuntimeError("can't start new thread"), 2, "kvx: error: A thread cannot be started"),
            (ImportError("initialization failed"), 130, ""),
        ],
        ids=["memory", "threads", "Ctrl-C"],
    )
    def test_what_is_no_fault_of_kvx_is_not_told_as_one(
        self, monkeypatch: pytest.MonkeyPatch, raised: Exception, code: int, says: str
    ) -> None:
        def fail(_: Path) -> NoReturn:
            raise raised from (KeyboardInterrupt() if code == 130 else None)

        monkeypatch.setattr(Bundle, "open", fail)
        found = invoke("inspect", "bundle")
        assert (found.code, found.out) == (code, "")
        assert found.err.startswith(says)
        assert bool(found.err) == bool(says)

    def test_an_option_is_named_as_the_command_that_ran_spells_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(_: Path) -> NoReturn:
            raise kvx.OptionError("`bundle`, `output`", expected="`cache_bytes`", remedy="Leave out `max_new_tokens`.")

        monkeypatch.setattr(Bundle, "open", refuse)
        refused(invoke("inspect", "x"), "`bundle`, `output`. Expected `cache_bytes`. Leave out `max_new_tokens`.")
        refused(invoke("translate", "--model", "x"), "--output. Expected --cache-mb. Leave out --max-new-tokens.")
        found = invoke("shortlist", "train", *("--bundle", "x", "--source", "x", "--target", "x", "-o", "x"))
        refused(found, "--bundle, --output. Expected `cache_bytes`")


def test_every_option_of_a_translation_is_one_of_the_command() -> None:
    taken = {parameter.name for parameter in typer.main.get_command(app).commands["translate"].params}  # type: ignore[attr-defined]
    assert {name for name, option in OPTIONS.items() if not option.hidden} <= taken
    assert {name for name, option in OPTIONS.items() if option.hidden} & taken == set()


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["translate", "--help"]], ids=" ".join)
def test_what_needs_no_model_loads_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys; from kvx.cli import main\ntry: main(sys.argv[1:])\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    loaded = done.stderr.split()
    assert "kvx.commands.translate" in loaded
    for name in ("onnxruntime", "sentencepiece", "torch", "onnx", "sacrebleu", "rich", "kvx.models"):
        assert name not in loaded
