"""The machine and the versions of everything measured: the header of each report."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path


def version_of(*command: str) -> str:
    """The first line that a command prints about its version; "missing" where it isn't there."""
    if not shutil.which(command[0]):
        return "missing"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"doesn't tell ({error})"
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[0] if lines else "unknown"


def cpu_model() -> str:
    """The processor's name as /proc/cpuinfo has it."""
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return match[1] if match else platform.machine()


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
        "unionfs-fuse": version_of("unionfs", "--version"),
    }
