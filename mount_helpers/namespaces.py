"""User namespaces and their id maps."""

from __future__ import annotations

import os
import pwd
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from mount_helpers import syscalls


@dataclass(frozen=True, slots=True)
class IdRange:
    """`count` ids: `inside` is the first within the namespace, `outside` the first beyond it."""

    inside: int
    outside: int
    count: int


def write_id_maps(pid: int, uid_map: Sequence[IdRange], gid_map: Sequence[IdRange]) -> None:
    """Write the maps of the user namespace of `pid`, as one that may (CAP_SETUID in the parent's).

    Raises OSError, EPERM for ranges that the writer may not give.
    """
    for name, ranges in (("uid_map", uid_map), ("gid_map", gid_map)):
        text = "".join(f"{r.inside} {r.outside} {r.count}\n" for r in ranges)
        fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def user_namespace(uid_map: Sequence[IdRange], gid_map: Sequence[IdRange]) -> int:
    """A descriptor of a new user namespace with these maps, that no process is in.

    For idmapped mounts. Raises OSError.
    """
    ready, told = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        try:
            os.close(ready)
            syscalls.unshare(syscalls.CLONE_NEWUSER)
            os.write(told, b"0 ")
            signal.pause()
        except OSError as error:
            os.write(told, f"{error.errno} ".encode())
        finally:
            os._exit(0)
    try:
        os.close(told)
        number = int(os.read(ready, 16) or b"5")
        if number:
            raise OSError(number, f"a user namespace can't be made: {os.strerror(number)}")
        write_id_maps(pid, uid_map, gid_map)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _ranges(path: str, names: set[str]) -> list[tuple[int, int]]:
    found = []
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                parts = line.strip().split(":")
                if len(parts) == 3 and parts[0] in names:
                    try:
                        found.append((int(parts[1]), int(parts[2])))
                    except ValueError:
                        continue
    except FileNotFoundError:
        pass
    return found


def subordinate_ids(uid: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The (first, count) ranges of subordinate uids and gids of a user, as subuid(5) has them."""
    names = {str(uid)}
    try:
        names.add(pwd.getpwuid(uid).pw_name)
    except KeyError:
        pass
    return _ranges("/etc/subuid", names), _ranges("/etc/subgid", names)
