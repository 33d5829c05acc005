"""Environments in a row, started and ended, `true` inside (the paper's Table 3)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from perf.runner import MILLISECONDS, Block, Missing
from perf.sandboxes import Sandbox, sandboxes, seconds_of

LINE = "start, true, end"


def _each(sandbox: Sandbox, count: int) -> dict[str, float]:
    command = sandbox.command("/bin/true")
    try:
        seconds_of(command)  # what only the first one pays: images, masks, directories
        total = sum(seconds_of(command) for _ in range(count))
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = (error.stderr or b"").decode("utf-8", "replace").strip().splitlines()
        raise Missing(f"doesn't run here: {said[-1] if said else error}") from None
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
            "umount /sys/fs/cgroup/unified 2>/dev/null; cd $0; mount --bind / root; i=0; while [ $i -lt $1 ]; do"
            " crun --cgroup-manager=disabled run perf$i || exit 1; i=$((i+1)); done"
        )
        words = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            script,
            place,
            str(count),
        ]
        try:
            return {LINE: seconds_of(words) / count * 1000}
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            said = (error.stderr or b"").decode("utf-8", "replace").strip().splitlines()
            raise Missing(f"doesn't run here: {said[-1] if said else error}") from None


def blocks(quick: bool, user: str | None) -> list[Block]:
    """All blocks of the suite; `user` is who runs sdee where perf runs as root."""
    count = 10 if quick else 100
    lines = {LINE: MILLISECONDS}
    interpreter = Sandbox("the interpreter alone", (sys.executable, "-I", "-S", "-c", "pass"))
    unshare = Sandbox("unshare", ("unshare", "--fork", "--pid", "--mount-proc"))
    bare, *others = sandboxes(user)
    found = [Block(s.name, lines, partial(_each, s, count)) for s in (bare, unshare)]
    found.append(Block(interpreter.name, lines, partial(_each, interpreter, count)))
    found.append(Block("crun", lines, partial(_crun, count)))
    for sandbox in others:
        slow = sandbox.name in ("podman", "docker")
        found.append(
            Block(sandbox.name, lines, partial(_each, sandbox, min(count, 10) if slow else count))
        )
    return found
