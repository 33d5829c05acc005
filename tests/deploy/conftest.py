"""A lab for each test."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import User, _user
from tests.deploy.deploy_lab import Lab, make_lab


@pytest.fixture(scope="session")
def alice() -> Iterator[User]:
    """A user of this room alone: what else is tested on this machine doesn't meet them."""
    yield from _user("sdee-deploy1", 2121, 21410000)


@pytest.fixture
def lab(alice: User) -> Iterator[Lab]:
    """Upper, state and cache of a real user, in a place that pytest doesn't shut to others."""
    place = Path(tempfile.mkdtemp(prefix="sdee-deploy-", dir="/var/tmp"))
    try:
        yield make_lab(alice.uid, place)
    finally:
        # Directories of mode 0 and of other owners.
        subprocess.run(["rm", "-rf", str(place)], check=True, timeout=100)
