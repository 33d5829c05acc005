"""Joining an instance whose init is on its way out, or isn't ours."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from mount_helpers import syscalls
from sdee_launch import membership
from tests.conftest import User
from tests.env.daemon_lab import as_user, wait_for


def _has_no_memory(pid: int) -> bool:
    return "\nVmSize:" not in Path(f"/proc/{pid}/status").read_text()


def _join_while_it_ends() -> str:
    """An init of our own that can't end: one in its PID namespace is dead, and nobody reaps it."""
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)  # as a login has it, whose ids nobody just changed
    ready, told = os.pipe()
    syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWPID)
    init = os.fork()
    if not init:
        os.dup2(membership.make(), membership.FD)
        os.write(told, b"x")
        signal.pause()
    inside = os.fork()
    if not inside:
        signal.pause()
    os.read(ready, 1)
    try:
        os.close(membership.hold(init))
        os.kill(init, signal.SIGKILL)
        wait_for(lambda: _has_no_memory(init), "init has given up its memory")
        state = Path(f"/proc/{init}/stat").read_text().rsplit(")", 1)[1].split()[0]
        assert state not in "ZX", state
        try:
            os.close(membership.hold(init))
        except membership.Ended:
            return "ended"
        return "held"
    finally:
        os.kill(inside, signal.SIGKILL)
        os.waitpid(inside, 0)
        os.kill(init, signal.SIGKILL)
        os.waitpid(init, 0)


def test_an_init_that_is_just_ending(alice: User) -> None:
    """Its memory goes first, and with that all that /proc has of it becomes root's."""
    assert as_user(alice.uid, alice.gid, _join_while_it_ends) == "'ended'"


def test_an_init_of_another_account(alice: User) -> None:
    init = os.fork()
    if not init:
        os.dup2(membership.make(), membership.FD)
        signal.pause()
    try:
        said = as_user(alice.uid, alice.gid, lambda: membership.hold(init))
        assert said.startswith("PermissionError: ")
    finally:
        os.kill(init, signal.SIGKILL)
        os.waitpid(init, 0)
