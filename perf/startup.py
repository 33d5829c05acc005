"""Environments in a row, started and ended, `true` inside (the paper's Table 3)."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from perf.figures import MILLISECONDS, Missing
from perf.runner import Block
from perf.sandboxes import Sandbox
from perf.timing import seconds_of

LINE = "start, true, end"


def _each(sandbox: Sandbox, count: int) -> dict[str, float]:
    command = sandbox.command("/bin/true")
    seconds_of(command)  # what only the first one pays: images, masks, directories
    total = sum(seconds_of(command) for _ in range(count))
    return {LINE: total / count * 1000}


def _crun(count: int) -> dict[str, float]:
    """crun over the host's /, read-only, with the smallest configuration that it takes."""
    if not shutil.which("crun"):
        raise Missing("crun isn't installed")
    with tempfile.TemporaryDirectory() as place:
        names = ("pid", "mount", "ipc", "uts")
        config = {
            "ociVersion": "1.0.2",
            "process": {"cwd": "/", "args": ["/bin/true"], "user": {"uid": 0, "gid": 0}},
            "root": {"path": "root", "readonly": True},
            # Without a /dev of its own it would write into the host's.
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            ],
            "linux": {"namespaces": [{"type": name} for name in names]},
        }
        (Path(place) / "config.json").write_text(json.dumps(config))
        (Path(place) / "root").mkdir()
        script = (
            "umount /sys/fs/cgroup/unified 2>/dev/null; cd $0; mount --bind / root; i=0;"
            " while [ $i -lt $1 ]; do"
            " crun --cgroup-manager=disabled run perf$i || exit 1; i=$((i+1)); done"
        )
        private = ("unshare", "--mount", "--propagation", "private")
        seconds = seconds_of([*private, "sh", "-c", script, place, str(count)])
        return {LINE: seconds / count * 1000}


def blocks(quick: bool, found: Sequence[Sandbox]) -> list[Block]:
    """All blocks of the suite."""
    count = 5 if quick else 20
    bare, *others = found
    # Run as the user, too, as sdee is: its line is what sdee's lines are held against.
    alone = (*bare.prefix, sys.executable, "-I", "-S", "-c", "pass")
    interpreter = Sandbox("the interpreter alone", alone)
    unshare = Sandbox("unshare", ("unshare", "--fork", "--pid", "--mount-proc"))
    lines = {LINE: MILLISECONDS}
    todo = [Block(s.name, lines, partial(_each, s, count)) for s in (bare, unshare, interpreter)]
    todo.append(Block("crun", lines, partial(_crun, count)))
    todo += [Block(sandbox.name, lines, partial(_each, sandbox, count)) for sandbox in others]
    return todo
