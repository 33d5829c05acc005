"""The file systems under comparison, each mounted over the same lower with a fresh upper."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mount_helpers.mountinfo import mount_at
from perf.runner import Missing


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


_OPTIONS = "lowerdir={lower},upperdir={upper},workdir={work}"


def _sdeefs(name: str, transport: str, *options: str) -> Contender:
    words = ["sdeefs", "mount", "{upper}", "{lower}", "{merged}", "--workdir", "{work}"]
    words += ["--transport", transport]
    if options:
        words += ["-o", ",".join(options)]
    return Contender(name, tuple(words))


def _cargo() -> str:
    return os.environ.get("FUSE_OVERLAYFS_2", str(Path.home() / ".cargo/bin/fuse-overlayfs"))


def contenders() -> list[Contender]:
    """All of them, the plain filesystem first."""
    return [
        Contender("plain", ()),
        Contender("overlayfs", ("mount", "-t", "overlay", "overlay", "-o", _OPTIONS, "{merged}")),
        _sdeefs("sdeefs ring", "ring"),
        _sdeefs("sdeefs ring write-back", "ring", "passthrough=off"),
        _sdeefs("sdeefs device", "device"),
        _sdeefs("sdeefs device write-back", "device", "passthrough=off"),
        _sdeefs("sdeefs pyfuse3", "pyfuse3"),
        Contender(
            "fuse-overlayfs 1.10", ("/usr/bin/fuse-overlayfs", "-o", _OPTIONS, "{merged}"), "1.10"
        ),
        Contender("fuse-overlayfs 2.0", (_cargo(), "-o", _OPTIONS, "{merged}"), "2.0"),
        Contender(
            "fuse-overlayfs 2.0 write-back",
            (_cargo(), "-o", _OPTIONS + ",writeback=1,passthrough=0", "{merged}"),
            "2.0",
        ),
        Contender(
            "unionfs-fuse",
            ("unionfs", "-o", "cow,allow_other", "{upper}=RW:{lower}=RO", "{merged}"),
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


def _unmount(merged: Path) -> None:
    for attempt in range(100):
        if mount_at(os.fsencode(merged)) is None:
            return
        words = ["umount", str(merged)] if attempt < 99 else ["umount", "-l", str(merged)]
        subprocess.run(words, capture_output=True, check=False, timeout=60)
        time.sleep(0.01 if attempt < 20 else 0.1)


@contextmanager
def mounted(contender: Contender, lower: Path, scratch: Path) -> Iterator[Layers]:
    """The contender over `lower` with an empty upper in `scratch`; for the plain one a copy.

    Raises Missing, or subprocess.CalledProcessError where the mount fails.
    """
    check(contender)
    place = scratch / "layers"
    shutil.rmtree(place, ignore_errors=True)
    layers = Layers(lower, place / "upper", place / "work", place / "merged")
    place.mkdir()
    if not contender.command:
        subprocess.run(["cp", "-a", str(lower), str(layers.merged)], check=True)
        yield layers
        shutil.rmtree(place, ignore_errors=True)
        return
    for directory in (layers.upper, layers.work, layers.merged):
        directory.mkdir()
    subprocess.run(_filled(contender.command, layers), check=True, capture_output=True, timeout=60)
    try:
        yield layers
    finally:
        _unmount(layers.merged)
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def remounted(contender: Contender, layers: Layers) -> Iterator[None]:
    """The same layers mounted anew, so that nothing of merged is cached."""
    if contender.command:
        _unmount(layers.merged)
        subprocess.run(
            _filled(contender.command, layers), check=True, capture_output=True, timeout=60
        )
    yield


def _filled(command: Sequence[str], layers: Layers) -> list[str]:
    words = {name: str(getattr(layers, name)) for name in ("lower", "upper", "work", "merged")}
    return [word.format(**words) for word in command]
