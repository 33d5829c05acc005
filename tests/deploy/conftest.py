"""A lab for each test."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.deploy_lab import Lab, make_lab


@pytest.fixture
def lab(alice: object) -> Iterator[Lab]:
    """Upper, state and cache of a real user, in a place that pytest doesn't shut to others."""
    place = Path(tempfile.mkdtemp(prefix="sdee-deploy-", dir="/var/tmp"))
    try:
        yield make_lab(alice.uid, place)  # type: ignore[attr-defined]
    finally:
        # Directories of mode 0 and of other owners.
        subprocess.run(["rm", "-rf", str(place)], check=True, timeout=100)
