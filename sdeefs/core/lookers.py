"""Which processes want the attributes of what they list.

A page of READDIRPLUS spares a look-up for each entry, but costs one, and an inode in the kernel, for
each: thrown away on those who want names alone (find, shells, completion). So the first directory
that a process lists comes without attributes; once it looks up a file of it, it gets those of files
with all further ones, and the same for directories. Linux decides by directory (fuse_advise_use_readdirplus()),
which for the first page of each is always yes.
"""

from __future__ import annotations

import stat

#: Processes and kinds that are remembered. Two that meet in one place only cost each other time.
_PLACES = 512


def _key(pid: int, kind: int) -> int:
    return pid << 1 | (kind == stat.S_IFDIR)


class Lookers:
    """What is known of the processes that list directories. The core's lock is held by who calls."""

    def __init__(self) -> None:
        self.table = [0] * _PLACES

    def wants(self, pid: int, kind: int) -> bool:
        """Whether a process looks up what it lists, of this kind (S_IFMT bits)."""
        key = _key(pid, kind)
        return self.table[key % _PLACES] == key

    def note(self, pid: int, kind: int) -> None:
        """It looked up a name of this kind that it had been told without attributes."""
        key = _key(pid, kind)
        self.table[key % _PLACES] = key
