"""The bundles that tests share. `make bundles` runs this file alone, to keep them for a Python without torch."""

from __future__ import annotations

import pytest

from kvx.runtime.bundle.folder import Bundle

OF_NUMBERS = ("numbers", "shortlist", "attention", "loop", "coded")
OF_TINY = ("attended", "attended_standard", "tiny", "standard")


@pytest.mark.parametrize("name", [*OF_TINY, *OF_NUMBERS, "seed"])
def test_a_shared_bundle_is_as_its_manifest_says(name: str, request: pytest.FixtureRequest) -> None:
    opened = Bundle.open(request.getfixturevalue(f"{name}_bundle"))
    opened.check_hashes()
