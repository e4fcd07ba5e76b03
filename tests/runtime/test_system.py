"""What the machine is found to offer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvx.runtime.system import available_threads, bytes_saturate, cpu_model


@pytest.fixture(autouse=True)
def on_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


def cpuinfo(folder: Path, flags: str) -> Path:
    path = folder / "cpuinfo"
    path.write_text(f"processor\t: 0\nflags\t\t: fpu {flags} avx2\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    return path


@pytest.mark.parametrize("flag", ["avx512_vnni", "avx_vnni", "amx_int8"])
def test_wide_products_do_not_saturate(tmp_path: Path, flag: str) -> None:
    assert not bytes_saturate(cpuinfo(tmp_path, flag))


def test_without_wide_products_bytes_saturate(tmp_path: Path) -> None:
    assert bytes_saturate(cpuinfo(tmp_path, "avx512f avx512bw"))


@pytest.mark.parametrize("content", [None, "", "model name : nothing\n"])
def test_where_nothing_tells_bytes_are_taken_to_saturate(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "cpuinfo"
    if content is not None:
        path.write_text(content)
    assert bytes_saturate(path)


def test_other_processors_have_no_such_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not bytes_saturate(cpuinfo(tmp_path, ""))


def test_there_is_a_thread() -> None:
    assert available_threads() >= 1


def test_the_cpus_name_is_the_systems(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel\t\t: 85\nmodel name\t: Fast (R) 9000 \nstepping\t: 1\n", encoding="utf-8")
    assert cpu_model(path) == "Fast (R) 9000"
    assert cpu_model(tmp_path / "none")


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "20000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_container_bounds_the_threads(
    tmp_path: Path, files: dict[str, str], threads: int | None
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert available_threads(tmp_path) == (threads or len(os.sched_getaffinity(0)))
