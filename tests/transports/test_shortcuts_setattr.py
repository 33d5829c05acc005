"""SETATTR with every set of changes at once: the shortcuts make all of them, or leave all to Python.

The kernel asks for several at once on behalf of nfsd, and, where it doesn't offer HANDLE_KILLPRIV_V2,
for a chown of a setuid file, which takes the bit away.
"""

from __future__ import annotations

import os
from itertools import combinations

import pytest

from sdeefs.transports import shortcuts, wire
from tests.transports.test_shortcuts import Player, sides

if (_reason := shortcuts.why_not(object())) != "another core":  # type: ignore[arg-type]
    pytest.skip(f"shortcuts: {_reason}", allow_module_level=True)

CHANGES = (
    wire.FATTR_MODE, wire.FATTR_UID, wire.FATTR_GID, wire.FATTR_SIZE, wire.FATTR_ATIME,
    wire.FATTR_MTIME, wire.FATTR_ATIME_NOW, wire.FATTR_MTIME_NOW, wire.FATTR_KILL_SUIDGID,
)  # fmt: skip


@pytest.mark.parametrize("how", [0, wire.FATTR_FH], ids=["by name", "open"])
def test_several_changes_at_once(how: int) -> None:
    with sides("plain") as (python, c):
        player = Player(python, c)
        player.play("create", 0, "made")
        node, handle = player.nodes[-1], player.handles[-1]
        for number in range(len(CHANGES) + 1):
            for changes in combinations(CHANGES, number):
                for side in (python, c):
                    file = side.base / "upper" / "made"
                    os.chown(file, 9, 9)
                    file.chmod(0o4711)
                    os.truncate(file, 20)
                    os.utime(file, (77, 77))
                player.setattr(
                    node,
                    sum(changes) | how,
                    fh=handle,
                    size=5,
                    mtime=1234,
                    mode=0o640,
                    uid=3,
                    gid=4,
                )
                assert python.tree()["made"] == c.tree()["made"], changes
