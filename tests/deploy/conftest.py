"""A lab for each test."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.deploy_lab import Lab, make_lab


@pytest.fixture
def lab(alice: object, tmp_path: Path) -> Iterator[Lab]:
    """Upper, state and cache of a real user."""
    made = make_lab(alice.uid, tmp_path)  # type: ignore[attr-defined]
    yield made
    # Directories of mode 0 and of other owners: pytest's own removal is for plainer trees.
    subprocess.run(["rm", "-rf", str(tmp_path)], check=True)
