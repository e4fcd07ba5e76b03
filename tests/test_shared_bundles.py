"""The bundles that tests share. `make bundles` runs this file alone, to keep them for a Python without torch."""

from __future__ import annotations

import pytest

from kvx.runtime.bundle.folder import Bundle

TINY = pytest.mark.xdist_group("tiny")  # their checkpoint is made once
SHARED = ["numbers", "shortlist", "attention", "loop", "seed", pytest.param("tiny", marks=TINY)]


@pytest.mark.parametrize("name", [*SHARED, pytest.param("standard", marks=TINY)])
def test_a_shared_bundle_is_as_its_manifest_says(name: str, request: pytest.FixtureRequest) -> None:
    opened = Bundle.open(request.getfixturevalue(f"{name}_bundle"))
    opened.check_hashes()
