"""Every option of an export is described once, beside its field."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from kvx import OptionError
from kvx.exporter.options import ExportOptions
from kvx.exporter.proof.limits import ParityOptions
from kvx.runtime.bundle.precision import CODED_CACHE, PRECISIONS
from kvx.runtime.rules import described

FLAGS = {
    "output": ("-o", "--output"),
    "format": ("--format",),
    "default_source_language": ("--default-from",),
    "default_target_language": ("--default-to",),
    "attention": ("--with-attention",),
    "shortlist": ("--with-shortlist",),
    "verify": ("--verify/--no-verify",),
    "force": ("--force",),
}
HIDDEN = {"loop", "steps", "seed"}


@pytest.mark.parametrize("owner", [ExportOptions, ParityOptions])
def test_every_field_is_described(owner: type) -> None:
    fields = {field.name for field in dataclasses.fields(owner)} - {"parity"}
    assert described(owner).keys() == fields
    for option in described(owner).values():
        assert option.help[0].isupper()
        assert option.help.endswith(".")


def test_no_option_of_an_export_is_also_one_of_its_proof() -> None:
    assert described(ExportOptions).keys().isdisjoint(described(ParityOptions))


def test_the_command_line_spells_them_as_ever() -> None:
    options = described(ExportOptions) | described(ParityOptions)
    assert {name: option.flags for name, option in options.items() if option.flags} == FLAGS
    assert {name for name, option in options.items() if option.hidden} == HIDDEN


def test_the_defaults_of_the_lowering_are_those_of_the_precisions() -> None:
    assert described(ExportOptions)["lowering"].unset == "ort; cuda with fp16 and bf16"
    for name, arithmetic in PRECISIONS.items():
        assert ExportOptions(checkpoint=Path("x"), precision=name).operators == arithmetic.lowerings[0]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"lowering": "standard"}, "does not go together with `precision` fp32 and `lowering` standard"),
        ({"precision": "fp16"}, "does not go together with `precision` fp16 and `lowering` cuda"),
        ({"precision": "fp16", "lowering": "ort"}, "does not go together with `precision` fp16 and `lowering` ort"),
        ({"format": "torchscript"}, "has no effect with `format` torchscript"),
        ({"cache_precision": "int4"}, "`cache_precision` is"),
    ],
)
def test_a_cache_in_8_bits_where_nothing_has_it_is_refused(options: dict[str, str], why: str) -> None:
    with pytest.raises(OptionError, match=why):
        ExportOptions(checkpoint=Path("x"), **{"cache_precision": "int8", **options})  # type: ignore[arg-type]


def test_its_limits_are_the_wider_ones_of_cache_and_precision() -> None:
    parity = ParityOptions()
    assert parity.limits("fp32", coded_cache=True) == CODED_CACHE
    assert parity.limits("int8", coded_cache=True) == PRECISIONS["int8"].limits
    assert ParityOptions(tolerance=0.01).limits("fp32", coded_cache=True).tolerance == 0.01


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_a_checkpoint_that_is_a_link_is_named_for_the_links_folder(tmp_path: Path, linked: str) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "model.pt").touch()
    if linked == "file":
        (tmp_path / "captions").mkdir()
        (tmp_path / "captions" / "model.pt").symlink_to(tmp_path / "blobs" / "model.pt")
    else:
        (tmp_path / "captions").symlink_to("blobs")
    for path in ("captions/model.pt", "blobs/../captions/./model.pt"):
        assert ExportOptions(checkpoint=tmp_path / path).folder == Path("artifacts") / "captions"


@pytest.mark.parametrize(
    ("name", "value"),
    [("heads", 0), ("heads", True), ("max_new_tokens", 2.5), ("verify", 1), ("output", 3), ("format", "ts")],
)
def test_a_value_that_cannot_be_is_refused_by_the_name_of_its_option(name: str, value: object) -> None:
    with pytest.raises(OptionError) as caught:
        ExportOptions(checkpoint=Path("x"), **{name: value})  # type: ignore[arg-type]
    assert caught.value.option == name
    assert f"`{name}` is {value!r}" in caught.value.got
