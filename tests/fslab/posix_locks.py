"""POSIX checks: locks."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

from tests.fslab.fslab_lab import child_result, in_child
from tests.fslab.posix_place import Place, check, fails


@check
def flock_excludes(p: Place) -> Iterator[None]:
    p.write("f")
    yield
    import fcntl

    one, two = p.open("f", os.O_RDWR), p.open("f", os.O_RDONLY)
    fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fails("EAGAIN", fcntl.flock, two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(one, fcntl.LOCK_SH | fcntl.LOCK_NB)
    fcntl.flock(two, fcntl.LOCK_SH | fcntl.LOCK_NB)
    fcntl.flock(two, fcntl.LOCK_UN)
    fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)


@check
def fcntl_locks_exclude_processes(p: Place) -> Iterator[None]:
    p.write("f", b"0123456789")
    yield
    import fcntl

    fd = p.open("f", os.O_RDWR)
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 0)

    def other(start: int) -> Callable[[], object]:
        def attempt() -> None:
            mine = os.open(p / "f", os.O_RDWR)
            fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, start)

        return attempt

    assert child_result(in_child(other(0))) in (errno.EAGAIN, errno.EACCES)
    assert child_result(in_child(other(5))) == 0
    fcntl.lockf(fd, fcntl.LOCK_UN, 5, 0)
    assert child_result(in_child(other(0))) == 0


@check
def lock_taken_before_copy_up_holds(p: Place) -> Iterator[None]:
    p.write("f")
    yield
    import fcntl

    reader = p.open("f", os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_EX | fcntl.LOCK_NB)
    writer = p.open("f", os.O_RDWR)
    fails("EAGAIN", fcntl.flock, writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
