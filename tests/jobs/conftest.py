"""One cluster for all tests of jobs that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import User
from tests.jobs.jobs_lab import SdeeCluster


@pytest.fixture(autouse=True)
def no_left_overs() -> None:
    """In place of the whole suite's: daemons come and go here, in namespaces of their own.

    What jobs leave is asked of the nodes (`SdeeCluster.wait_clean`); what the cluster leaves dies
    with its namespaces.
    """


@pytest.fixture(scope="session")
def cluster(alice: User, bob: User) -> Iterator[SdeeCluster]:
    """A controller, a login node and three compute nodes."""
    with SdeeCluster() as cluster:
        yield cluster
