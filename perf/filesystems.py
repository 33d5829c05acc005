"""The file systems under comparison, each mounted over the same lower with a fresh upper."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mount_helpers.mountinfo import mount_at
from perf import machine
from perf.failures import failure
from perf.figures import Missing
from perf.places import written_back
from perf.sandboxes import installed

#: Seconds that a mount rests before it is measured: servers go on starting after mount returns.
SETTLE = 0.5


_numbers = itertools.count()


@dataclass(frozen=True)
class Layers:
    """The directories of one mount."""

    lower: Path
    upper: Path
    work: Path
    merged: Path


@dataclass(frozen=True)
class Contender:
    """One file system: `command` mounts it, with {lower} {upper} {work} {merged} filled in.

    An empty command is the plain directory: a copy of lower on the scratch's own filesystem.
    """

    name: str
    command: tuple[str, ...]
    needs: str = ""
    extra: bool = False  #: a variant that a quick run leaves out

    @property
    def served(self) -> bool:
        """Whether a process serves it."""
        return bool(self.command) and self.command[0] != "mount"


_OPTIONS = "lowerdir={lower},upperdir={upper},workdir={work}"


def _sdeefs(name: str, transport: str, *options: str, extra: bool = False) -> Contender:
    words = [installed("sdeefs"), "mount", "{upper}", "{lower}", "{merged}", "--workdir", "{work}"]
    words += ["--transport", transport]
    if options:
        words += ["-o", ",".join(options)]
    return Contender(name, tuple(words), extra=extra)


def contenders() -> list[Contender]:
    """All of them, the plain filesystem first."""
    return [
        Contender("plain", ()),
        Contender("overlayfs", ("mount", "-t", "overlay", "overlay", "-o", _OPTIONS, "{merged}")),
        _sdeefs("sdeefs ring", "ring"),
        _sdeefs("sdeefs ring write-back", "ring", "passthrough=off", extra=True),
        _sdeefs("sdeefs device", "device"),
        _sdeefs("sdeefs device write-back", "device", "passthrough=off", extra=True),
        _sdeefs("sdeefs pyfuse3", "pyfuse3", extra=True),
        Contender(
            "fuse-overlayfs 1.10", ("/usr/bin/fuse-overlayfs", "-o", _OPTIONS, "{merged}"), "1.10"
        ),
        Contender(
            "fuse-overlayfs 2.0",
            (machine.second_fuse_overlayfs(), "-o", _OPTIONS, "{merged}"),
            "2.0",
        ),
        Contender(
            "fuse-overlayfs 2.0 write-back",
            (
                machine.second_fuse_overlayfs(),
                "-o",
                _OPTIONS + ",writeback=1,passthrough=0",
                "{merged}",
            ),
            "2.0",
            extra=True,
        ),
        Contender(
            "unionfs-fuse",
            ("unionfs", "-o", "cow,allow_other", "{upper}=RW:{lower}=RO", "{merged}"),
            extra=True,
        ),
    ]


def check(contender: Contender) -> None:
    """Raise `Missing` with the name of what isn't there."""
    if contender.command and not shutil.which(contender.command[0]):
        raise Missing(f"{contender.command[0]} isn't installed")
    if contender.needs:
        done = subprocess.run(
            [contender.command[0], "--version"], capture_output=True, text=True, check=False
        )
        if contender.needs not in done.stdout + done.stderr:
            raise Missing(f"{contender.command[0]} isn't version {contender.needs}")


def unmount(merged: Path) -> None:
    """Unmount it, lazily where it stays busy for ten seconds."""
    for attempt in range(100):
        if mount_at(os.fsencode(merged)) is None:
            return
        words = ["umount", str(merged)] if attempt < 99 else ["umount", "-l", str(merged)]
        subprocess.run(words, capture_output=True, check=False, timeout=60)
        time.sleep(0.01 if attempt < 20 else 0.1)


def _mount(contender: Contender, layers: Layers) -> None:
    """Mount it and let it settle. Raises Missing with what it said where it fails."""
    written_back(layers.upper)
    command = _filled(contender.command, layers)
    try:
        # Not piped: a server keeps its output open for as long as it lives.
        with tempfile.TemporaryFile() as said:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, timeout=60, check=False
            )
            said.seek(0)
            if done.returncode:
                raise subprocess.CalledProcessError(done.returncode, command, stderr=said.read())
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise failure(error) from None
    time.sleep(SETTLE)


@contextmanager
def mounted(
    contender: Contender, lower: Path, scratch: Path, name: str = "layers"
) -> Iterator[Layers]:
    """The contender over `lower` with an empty upper in `scratch`; for the plain one a copy.

    Raises Missing where it isn't there or the mount fails.
    """
    check(contender)
    # Never the same name twice: see spread().
    place = scratch / f"{name}{next(_numbers)}"
    layers = Layers(lower, place / "upper", place / "work", place / "merged")
    place.mkdir()
    try:
        if contender.command:
            for directory in (layers.upper, layers.work, layers.merged):
                directory.mkdir()
            _mount(contender, layers)
        else:
            subprocess.run(["cp", "-a", str(lower), str(layers.merged)], check=True)
            written_back(place)
        yield layers
    finally:
        unmount(layers.merged)
        shutil.rmtree(place, ignore_errors=True)


def remount(contender: Contender, layers: Layers) -> None:
    """Mount the same layers anew, so that nothing of merged is cached."""
    if contender.command:
        unmount(layers.merged)
        _mount(contender, layers)


def _filled(command: Sequence[str], layers: Layers) -> list[str]:
    words = {name: str(getattr(layers, name)) for name in ("lower", "upper", "work", "merged")}
    return [word.format(**words) for word in command]
