"""The house rules: packages, import arrows, the public face, the wheel."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import types
import typing
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import kvx
from kvx.runtime import errors

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {"tests", "scripts", "docs", "benchmarks", "artifacts", "build", "dist"}
FOLDERS = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in OUTSIDE and path.name[0] != "."]
SOURCES = sorted(
    path.relative_to(ROOT) for paths in (ROOT.glob("*.py"), *(path.rglob("*.py") for path in FOLDERS)) for path in paths
)
IMPORT_SECONDS = 0.5


def python(script: str, *arguments: str | Path) -> str:
    """What a fresh interpreter prints."""
    line = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=True, timeout=60).stdout


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever it stands; `from a import b` counts as a.b and as a."""
    package = ["kvx", *path.parent.parts]
    for node in ast.walk(ast.parse((ROOT / path).read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def module_name(path: Path) -> str:
    return ".".join(["kvx", *path.with_suffix("").parts])


def in_package(*parts: str) -> list[Path]:
    found = [path for path in SOURCES if path.parts[: len(parts)] == parts]
    assert found
    return found


def test_the_packages_are_the_folders_that_are_packages() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    found = [".".join(["kvx", *path.parent.parts]) for path in SOURCES if path.name == "__init__.py"]
    assert sorted(listed) == sorted(found)


def extras() -> dict[str, list[str]]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        found: dict[str, list[str]] = tomllib.load(file)["project"]["optional-dependencies"]
    return found


def required(extra: str) -> set[str]:
    """The packages that an extra brings, also those of the extras of kvx that it names, on every platform."""
    found = set[str]()
    for line in extras()[extra]:
        name = re.split(r"[^\w.\[\],-]", line)[0]
        inner = re.fullmatch(r"kvx\[([\w,]+)\]", name)
        found |= set().union(*map(required, inner[1].split(","))) if inner else {name}
    return found


def test_the_user_chooses_onnx_runtime_by_an_extra() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        base = tomllib.load(file)["project"]["dependencies"]
    assert [line for line in base if line.startswith("onnxruntime")] == []
    assert required("cpu") == {"onnxruntime"}
    for extra in set(extras()) - {"cpu", "gpu", "cuda", "dev"}:
        assert not {name for name in required(extra) if name.startswith("onnxruntime")}


@pytest.mark.parametrize(
    ("system", "machine", "package"),
    [
        ("linux", "x86_64", "onnxruntime-gpu"),
        ("win32", "AMD64", "onnxruntime-gpu"),
        ("linux", "aarch64", "onnxruntime"),
        ("darwin", "arm64", "onnxruntime"),
        ("darwin", "x86_64", "onnxruntime"),
    ],
)
def test_the_gpu_extra_installs_one_onnx_runtime_on_every_platform(system: str, machine: str, package: str) -> None:
    platform = {"sys_platform": system, "platform_machine": machine}
    requirements = [Requirement(line) for line in extras()["gpu"]]
    chosen = [one.name for one in requirements if one.marker is None or one.marker.evaluate(platform)]
    assert chosen == [package]


def test_cuda_and_dev_bring_the_onnx_runtime_for_gpus() -> None:
    assert required("gpu") < required("cuda")
    assert required("gpu") < required("dev")
    assert {"nvidia-cublas", "nvidia-cudnn-cu13"} <= required("cuda")


def test_every_module_lies_in_a_package() -> None:
    folders = {path.parent for path in SOURCES}
    assert {folder for folder in folders if not (ROOT / folder / "__init__.py").is_file()} == set()


def test_importing_kvx_loads_nothing_heavy() -> None:
    loaded = set(python("import kvx, sys; print(*sys.modules)").split())
    assert "kvx.runtime.translator" in loaded
    heavy = {"onnxruntime", "sentencepiece", "tokenizers", "torch", "onnx", "typer", "ray", "pyarrow", "pandas"}
    assert loaded.isdisjoint(heavy | {"kvx.models", "kvx.exporter", "kvx.runtime.scale"})


@pytest.mark.parametrize("module", ["kvx.runtime.scale", "kvx.cli"])
def test_packages_of_the_extras_for_files_are_loaded_only_where_they_are_used(module: str) -> None:
    loaded = set(python(f"import {module}, sys; print(*sys.modules)").split())
    assert "kvx.runtime.scale.batches" in loaded
    for name in ("pyarrow", "pandas", "ray", "onnxruntime", "torch"):
        assert name not in loaded


def test_importing_kvx_is_quick() -> None:
    script = "import time; start = time.process_time(); import kvx; print(time.process_time() - start)"
    assert min(float(python(script)) for _ in range(3)) < IMPORT_SECONDS


def test_translating_leaves_torch_alone(numbers_bundle: Path) -> None:
    script = (
        "import sys; from kvx import Translator\n"
        "print(Translator.load(sys.argv[1]).translate(['twelve'], scores=True)[0].text)\n"
        "print(*sys.modules)"
    )
    text, modules = python(script, numbers_bundle).splitlines()
    assert text == "zwölf"
    assert "onnxruntime" in modules.split()
    for name in ("torch", "onnx", "typer", "kvx.models", "kvx.exporter"):
        assert name not in modules.split()


@pytest.mark.parametrize("path", in_package("runtime"), ids=str)
def test_the_runtime_knows_neither_torch_nor_what_lies_above_it(path: Path) -> None:
    above = {"kvx.models", "kvx.exporter", "kvx.commands", "kvx.cli", "onnx", "typer"}
    if path != Path("runtime/backends/torchscript.py"):
        above.add("torch")
    assert [name for name in imports(path) if inside(name, *above)] == []


# A room may import itself and the rooms before it; those in one line do not know each other.
RUNTIME_ROOMS = (
    ("errors", "arrays", "system"),
    ("rules", "kernels"),
    ("bundle",),
    ("text",),
    ("decoding",),
    ("shortlist",),
    ("backends",),
    ("options",),
    ("translation",),
    ("engine",),
    ("translator", "cluster"),
    ("measuring", "scale", "serving"),
)
EXPORTER_ROOMS = (
    ("progress",),
    ("lowerings",),
    ("precision",),
    ("writing",),
    ("proof",),
    ("options",),
    ("graphs", "folder", "reading"),
    ("export",),
)
MODELS_ROOMS = (("config",), ("layers",), ("operators",), ("blocks",), ("transformer",), ("importers", "eager"))
HOUSE = {"runtime": RUNTIME_ROOMS, "exporter": EXPORTER_ROOMS, "models": MODELS_ROOMS}
LAID = [(package, room) for package, rooms in HOUSE.items() for line in rooms for room in line]


def room_of(path: Path) -> str:
    return path.parts[1].removesuffix(".py")


def rooms_before(package: str, room: str) -> set[str]:
    """The rooms that this one may import."""
    rooms = HOUSE[package]
    line = next(number for number, names in enumerate(rooms) if room in names)
    return {room, *(name for names in rooms[:line] for name in names)}


@pytest.mark.parametrize("package", HOUSE)
def test_a_package_holds_its_rooms_and_nothing_else(package: str) -> None:
    found = {room_of(path) for path in in_package(package)} - {"__init__"}
    assert found == {room for line in HOUSE[package] for room in line}


@pytest.mark.parametrize(("package", "room"), LAID)
def test_a_room_knows_only_the_rooms_before_it(package: str, room: str) -> None:
    paths = [path for path in in_package(package) if room_of(path) == room]
    allowed = [f"kvx.{package}.{name}" for name in rooms_before(package, room)]
    known = {name for path in paths for name in imports(path) if name.startswith(f"kvx.{package}.")}
    assert sorted(name for name in known if not inside(name, *allowed)) == []


def test_no_two_modules_import_each_other() -> None:
    arrows = {module_name(path): set(imports(path)) for path in SOURCES if path.name != "__init__.py"}
    mutual = {(one, other) for one in arrows for other in arrows if other in arrows[one] and one in arrows[other]}
    assert mutual == set()


@pytest.mark.parametrize("path", in_package("runtime", "decoding"), ids=str)
def test_decoding_knows_no_thread_and_no_file(path: Path) -> None:
    outside = ("threading", "queue", "asyncio", "concurrent", "pathlib", "io", "os", "json")
    assert [name for name in imports(path) if inside(name, *outside)] == []


@pytest.mark.parametrize("path", in_package("models"), ids=str)
def test_models_know_only_the_contract_of_the_runtime(path: Path) -> None:
    contract = ("arrays", "errors", "rules", "bundle", "decoding.backend", "decoding.cache")
    allowed = ("kvx.models", *(f"kvx.runtime.{name}" for name in contract))
    assert [name for name in imports(path) if inside(name, "kvx") and not inside(name, *allowed)] == []


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_nothing_but_the_command_knows_the_command_line(path: Path) -> None:
    if path not in (Path("cli.py"), Path("__main__.py")) and path.parts[0] != "commands":
        assert [name for name in imports(path) if inside(name, "kvx.cli", "kvx.commands", "typer", "rich")] == []


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_modules_are_imported_by_the_packages_name(path: Path) -> None:
    bare = ("runtime", "models", "exporter", "commands", "cli", "tests", "scripts")
    assert [name for name in imports(path) if inside(name, *bare)] == []


def test_the_public_face_is_explicit_and_complete() -> None:
    [assigned] = [
        node.value
        for node in ast.parse((ROOT / "__init__.py").read_bytes()).body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
    ]
    public = {
        name
        for name, value in vars(kvx).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert ast.literal_eval(assigned) == kvx.__all__
    assert len(kvx.__all__) == len(set(kvx.__all__))
    assert set(kvx.__all__) == public | {"__version__"}
    assert all(hasattr(kvx, name) for name in kvx.__all__)


def named_classes(hint: object) -> Iterator[type]:
    """The classes of kvx in an annotation."""
    if isinstance(hint, type) and not typing.get_args(hint) and hint.__module__.split(".")[0] == "kvx":
        yield hint
    for part in typing.get_args(hint):
        yield from named_classes(part)


def public_hints(owner: type) -> Iterator[object]:
    """The annotations of what a class shows: its methods, properties and fields."""
    for name, member in inspect.getmembers(owner):
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(function) and owner not in SEARCHES:
            yield from typing.get_type_hints(function).values()
    if dataclasses.is_dataclass(owner):
        namespace = vars(sys.modules[OWN_MODULES[owner]])
        yield from (eval(str(field.type), namespace) for field in dataclasses.fields(owner))


SEARCHES = {kvx.BeamSearch, kvx.Greedy, kvx.Sampling}  # people make them; what they do with rows is the decoder's
OWN_MODULES = {
    value: name
    for name, module in list(sys.modules.items())
    if name.startswith("kvx.runtime")
    for value in vars(module).values()
    if isinstance(value, type) and value.__module__ == "kvx" and f"class {value.__name__}" in inspect.getsource(module)
}


@pytest.mark.parametrize("name", [name for name in kvx.__all__ if isinstance(getattr(kvx, name), type)])
def test_what_public_signatures_name_is_public_too(name: str) -> None:
    shown = {each for hint in public_hints(getattr(kvx, name)) for each in named_classes(hint)}
    assert {each.__name__ for each in shown} <= set(kvx.__all__)
    assert {each.__module__ for each in shown} <= {"kvx"}


def test_public_classes_say_that_they_are_kvx() -> None:
    classes = [getattr(kvx, name) for name in kvx.__all__ if isinstance(getattr(kvx, name), type)]
    assert {one.__module__ for one in classes} == {"kvx"}
    assert all(getattr(kvx, one.__name__) is one for one in classes)


def test_a_translator_shows_nothing_but_what_people_call() -> None:
    shown = {name for name in dir(kvx.Translator) if not name.startswith("_")}
    several = {"alternatives", "rank", "score", "translate", "translate_iter"}
    assert shown == {"engine", "load", "manifest", "options", "stream", "translate_one", "translate_text", *several}
    shown = {name for name in dir(kvx.Engine) if not name.startswith("_")}
    assert shown == {
        "busy_with",
        "close",
        "fits",
        "load",
        "manifest",
        "stats",
        "stream",
        "submit",
        "translate",
        "waiting",
        "warm",
    }


def test_every_error_is_exported() -> None:
    kinds = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    found = {name: value for name, value in kinds.items() if issubclass(value, Exception)}
    assert found
    for name, error in found.items():
        assert issubclass(error, kvx.KvxError)
        assert getattr(kvx, name) is error
        assert name in kvx.__all__


def listed_files() -> list[Path]:
    """What is tracked, or would be if it were added."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no git checkout")
    line = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_folder_of_this_machine() -> None:
    root = ROOT.parent if ROOT.parent.parent != ROOT.parent else ROOT
    pattern = re.compile(rb"(?<![\w.~-])" + re.escape(os.fsencode(root)) + rb"/")
    naming = [path.relative_to(ROOT) for path in listed_files() if pattern.search(path.read_bytes())]
    assert naming == []


def test_the_way_of_a_sentence_leads_past_functions_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    stations = re.findall(r"^\d+\. \[`([\w.]+)`\]\(([\w/]+\.py)\)", text, re.MULTILINE)
    assert 15 <= len(stations) <= 25
    for name, file in stations:
        station: object = importlib.import_module(module_name(Path(file)))
        for part in name.split("."):
            station = getattr(station, part)
        assert callable(station)


@pytest.fixture(scope="module", params=["a compiler", "no compiler"])
def wheel(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The wheel, built from a copy so that nothing is left in the repository or taken from an earlier build: where
    there is a compiler, and where that is hidden.
    """
    hidden = request.param == "no compiler"
    if not hidden and shutil.which("cc") is None:
        pytest.skip("no C compiler is installed")
    folder = tmp_path_factory.mktemp("wheel-without" if hidden else "wheel")
    environment = os.environ | ({"CC": "no-such-compiler"} if hidden else {})
    for path in listed_files():
        copy = folder / "source" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    line = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run(
        [*line, "-w", folder, folder / "source"], capture_output=True, text=True, check=False, env=environment
    )
    assert built.returncode == 0, built.stderr[-1000:]
    [found] = folder.glob("*.whl")
    return found


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    package = {name for name in names if not name.parts[0].endswith(".dist-info")}
    libraries = {name for name in package if name.suffix in (".so", ".pyd")}
    assert [name.name.partition(".")[0] for name in libraries] == ([] if "without" in str(wheel) else ["operators"])
    page = [path.relative_to(ROOT) for path in (ROOT / "runtime" / "serving" / "page").iterdir()]
    assert package - libraries == {Path("kvx") / path for path in [*SOURCES, Path("py.typed"), *page]}
    [metadata] = [name for name in names if name.name == "METADATA"]
    content = zipfile.ZipFile(wheel).read(str(metadata)).decode()
    assert f"\nVersion: {kvx.__version__}\n" in content
    needed = [
        Requirement(line.removeprefix("Requires-Dist: ")) for line in content.splitlines() if "Requires-Dist" in line
    ]
    assert {one.name for one in needed if one.marker is None} == {"numpy", "sentencepiece", "typer", "rich"}
    assert set(re.findall(r"(?m)^Provides-Extra: (.+)$", content)) == set(extras())


def has_own(bundle: Path) -> bool:
    """Whether the bundle has graphs with kvx's own operators."""
    return (bundle / "decoder_kernels.onnx").exists()


def test_the_wheel_runs_in_a_clean_environment(wheel: Path, numbers_bundle: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    [site] = (tmp_path / "venv").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # runs no .pth file there
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}

    def run(*arguments: str | Path) -> str:
        line = [tmp_path / "venv" / "bin" / "python", *arguments]
        done = subprocess.run(
            line, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr[-500:]
        return done.stdout

    assert Path(run("-c", "import kvx; print(kvx.__file__)").strip()) == site / "kvx" / "__init__.py"
    assert run("-m", "kvx", "--version") == f"kvx {kvx.__version__}\n"
    translate = ("-m", "kvx", "translate", "--model", numbers_bundle, "--device", "cpu")
    assert run(*translate, "twelve") == "zwölf\n"
    used = (
        "not used here: kvx has been installed without them"
        if "without" in str(wheel)
        else "used on the CPU here, with"
    )
    assert used in run("-m", "kvx", "inspect", numbers_bundle) or not has_own(numbers_bundle)
    assert run(*translate, "--backend", "torch", "twelve") == "zwölf\n"  # models and exporter are in it too
