"""kvx writes nothing anywhere but where it is told."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvx

HOUSE = Path(kvx.__file__).parent
OURS = ("runtime", "exporter", "models", "commands", "benchmarks")


def imports_onnxruntime(path: Path) -> bool:
    nodes = list(ast.walk(ast.parse(path.read_bytes())))
    named = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return any(name.split(".")[0] == "onnxruntime" for name in named)


@pytest.mark.parametrize("chosen", [None, "true"])
def test_a_translation_writes_nothing_opens_no_connection_and_keeps_the_users_own_setting(
    numbers_bundle: Path, tmp_path: Path, chosen: str | None
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    script = (
        "import os, sys, time; from kvx import Translator\n"
        "print(Translator.load(sys.argv[1]).translate(['twelve'])[0].text, os.environ['ORT_DISABLE_TELEMETRY'])\n"
        "time.sleep(0.5)\n"
        "names = os.listdir('/proc/self/fd') if sys.platform == 'linux' else []\n"
        "links = (os.path.join('/proc/self/fd', name) for name in names)\n"
        "print([link for link in links if os.path.lexists(link) and 'socket' in os.readlink(link)])"
    )
    unset = ("HOME", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "TMPDIR")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HOME": str(home), "TMPDIR": str(elsewhere), "PYTHONDONTWRITEBYTECODE": "1"}
    if chosen is not None:
        environment["ORT_DISABLE_TELEMETRY"] = chosen
    run = subprocess.run(
        [sys.executable, "-c", script, str(numbers_bundle.absolute())],
        capture_output=True,
        text=True,
        env=environment,
        cwd=elsewhere,
        timeout=60,
        check=False,
    )
    assert (run.stdout, run.stderr) == (f"zwölf {chosen or 1}\n[]\n", "")
    assert [*home.rglob("*"), *elsewhere.rglob("*")] == []


def test_onnx_runtime_is_imported_in_one_place() -> None:
    found = [path.relative_to(HOUSE) for name in OURS for path in (HOUSE / name).glob("**/*.py")]
    found = [path for path in found if "peer_runners" not in path.parts]  # other products run it as they do
    assert [path for path in found if imports_onnxruntime(HOUSE / path)] == [Path("runtime/backends/ort.py")]
