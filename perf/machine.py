"""The machine and the versions of everything measured: the header of each report."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path


def version_of(*command: str, naming: str = "") -> str:
    """The first line with `naming` that a command prints; "missing" where it isn't installed."""
    if not shutil.which(command[0]):
        return "missing"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"doesn't tell ({error})"
    lines = (done.stdout + done.stderr).strip().splitlines()
    return next((line for line in lines if naming in line), "unknown")


def cpu_model() -> str:
    """The processor's name as /proc/cpuinfo has it."""
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return match[1] if match else platform.machine()


def second_fuse_overlayfs() -> str:
    """Where cargo puts it, or where FUSE_OVERLAYFS_2 says that it is."""
    return os.environ.get("FUSE_OVERLAYFS_2", str(Path.home() / ".cargo/bin/fuse-overlayfs"))


def facts() -> dict[str, str]:
    """Name -> value, in the order of a report's header."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "machine": f"{os.cpu_count()} CPUs, {cpu_model()}, {memory:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{sys.version.split()[0]} ({sys.executable})",
        "fio": version_of("fio", "--version"),
        "bubblewrap": version_of("bwrap", "--version"),
        "podman": version_of("podman", "--version"),
        "crun": version_of("crun", "--version"),
        "docker": version_of("docker", "--version"),
        "fuse-overlayfs 1.10": version_of("/usr/bin/fuse-overlayfs", "--version"),
        "fuse-overlayfs 2.0": version_of(second_fuse_overlayfs(), "--version"),
        "sysbench": version_of("sysbench", "--version"),
        "mpirun": version_of("mpirun", "--version"),
        "unionfs-fuse": version_of("unionfs", "--version", naming="unionfs"),
    }
