"""Running a trial in a child of its own, so that nothing it mounts or changes can stay."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable

from mount_helpers import syscalls


class TrialFailed(Exception):
    """What was tried and why it failed, in one line."""


def private_mounts() -> None:
    """Leave the mount namespace of the parent: what is mounted from here on ends with the child."""
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)


def own_user_namespace() -> None:
    """Become root of a user namespace with one id, as any user may, with private mounts."""
    uid, gid = os.geteuid(), os.getegid()
    syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {uid} 1"),
        ("gid_map", f"0 {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)


def _leave_streams() -> None:
    """A trial that outlives us must not keep a pipe of our caller's open."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)


def _reap(pid: int) -> None:
    """Wait for a child that has answered or was killed.

    One that waits for a filesystem whose server has stopped can't even be killed: it is left alone.
    """
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return
        time.sleep(0.001)


def in_child(trial: Callable[[], str], seconds: float = 10) -> tuple[bool, str]:
    """Run `trial` in a child. Returns (worked, what it returned or why it failed)."""
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        try:
            os.close(ours)
            _leave_streams()
            try:
                answer = "1" + trial()
            except TrialFailed as error:
                answer = f"0{error}"
            except OSError as error:
                where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
                answer = f"0{where}{error.strerror or error}"
            os.write(theirs, answer.encode("utf-8", "replace")[:4000])
        finally:
            os._exit(0)
    os.close(theirs)
    deadline = time.monotonic() + seconds
    text = b""
    try:
        while True:
            ready = select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0]
            if not ready:
                os.kill(pid, signal.SIGKILL)
                return False, f"no answer within {seconds:g} s"
            part = os.read(ours, 4096)
            if not part:
                break
            text += part
    finally:
        os.close(ours)
        _reap(pid)
    if not text:
        return False, "the trial ended without a word"
    return text[:1] == b"1", text[1:].decode("utf-8", "replace")
