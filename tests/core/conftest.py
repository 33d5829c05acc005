"""The core over layers on tmpfs and on the machine's own file system."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdeefs.core import credentials
from tests.core.core_lab import Core

PLACES = {"tmpfs": "/dev/shm", "disk": "/var/tmp"}


@pytest.fixture(autouse=True)
def own_ids() -> Iterator[None]:
    """The core changes the umask of the process and the fs ids of its threads."""
    umask = os.umask(0o022)
    os.umask(umask)
    yield
    credentials.restore()
    os.umask(umask)


def _core(place: str, lowers: int) -> Iterator[Core]:
    base = Path(tempfile.mkdtemp(prefix="sdee-core-", dir=PLACES[place]))
    base.chmod(0o755)
    core = Core(base, lowers)
    try:
        yield core
    finally:
        core.close()
        credentials.restore()
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(params=sorted(PLACES))
def core(request: pytest.FixtureRequest) -> Iterator[Core]:
    """One lower."""
    yield from _core(request.param, 1)


@pytest.fixture
def disk() -> Iterator[Core]:
    """One lower, on the machine's own file system."""
    yield from _core("disk", 1)


@pytest.fixture(params=sorted(PLACES))
def three(request: pytest.FixtureRequest) -> Iterator[Core]:
    """Three lowers."""
    yield from _core(request.param, 3)
