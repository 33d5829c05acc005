"""The day of two users on a node again, over sdeefs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import User
from tests.env.daemon_lab import wait_for
from tests.env.login_lab import Node, login_node, terminal, the_scenario
from tests.env.x11_lab import x11_is_forwarded


@pytest.fixture(scope="module")
def node(alice: User, bob: User) -> Iterator[Node]:
    with login_node("fuse", alice, bob) as made:
        yield made


def test_the_scenario_on_sdeefs(node: Node, alice: User, bob: User, tmp_path: Path) -> None:
    the_scenario(node, alice, bob, tmp_path, "fuseish")
    assert node.say(alice, "stat -f -c %T /").startswith("fuse")


def test_x11_on_sdeefs(node: Node, alice: User) -> None:
    x11_is_forwarded(node, alice)


def test_a_server_killed(node: Node, alice: User) -> None:
    """An instance whose filesystem's server died ends, whole, and the next login works."""
    with terminal(node.sshd.command(alice, "-tt")) as screen:
        screen.expect("# ")
        screen.type("sleep 4000\n")
        wait_for(lambda: "sleep 4000" in str(node.daemon.instances()), "it runs")
        for pid in node.servers(alice):
            os.kill(pid, 9)
        screen.wait()
    wait_for(lambda: node.daemon.instances() == [], "the daemon knows")
    assert node.say(alice, "id -u") == "0"
    wait_for(lambda: node.servers(alice) == [], "no server stays")
