"""One cluster for all tests of jobs that need one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.conftest import User, _user
from tests.jobs.jobs_lab import SdeeCluster


@pytest.fixture(autouse=True)
def no_left_overs() -> None:
    """In place of the whole suite's: daemons come and go here, in namespaces of their own.

    What jobs leave is asked of the nodes (`SdeeCluster.wait_clean`); what the cluster leaves dies
    with its namespaces.
    """


@pytest.fixture(scope="session")
def alice() -> Iterator[User]:
    """A user of the cluster alone: what else is tested on this machine doesn't meet them."""
    yield from _user("sdee-jobs1", 2111, 21210000)


@pytest.fixture(scope="session")
def bob() -> Iterator[User]:
    """A second one."""
    yield from _user("sdee-jobs2", 2112, 21310000)


@pytest.fixture(scope="session")
def cluster(alice: User, bob: User) -> Iterator[SdeeCluster]:
    """A controller, a login node and three compute nodes."""
    for user in (alice, bob):  # numbers of jobs begin anew: nothing of an earlier run may stay
        for path in user.home.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.startswith("."):
                path.unlink()
    with SdeeCluster() as cluster:
        yield cluster
