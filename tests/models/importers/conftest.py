"""Tests that write many graphs."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _quick_exports(operators_listed_once: None) -> None:
    """In this folder."""
