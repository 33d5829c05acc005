"""CPU-bound work inside and outside (the paper's Figs. 7 to 9): sysbench and kernels of our own."""

from __future__ import annotations

import os
import re
import subprocess
from functools import partial
from pathlib import Path

from perf.programs import compiled
from perf.runner import OPERATIONS, SECONDS, Block, Missing
from perf.sandboxes import Sandbox, sandboxes

KERNELS = ("ep", "is", "cg", "mg")


def output(sandbox: Sandbox, *words: str) -> str:
    """What a command prints inside. Raises Missing with the reason where it doesn't run."""
    try:
        done = subprocess.run(
            sandbox.command(*words),
            check=True,
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = str(error.stderr or "").strip().splitlines()
        raise Missing(f"doesn't run here: {said[-1] if said else error}") from None
    return done.stdout


def _sysbench(sandbox: Sandbox, seconds: int) -> dict[str, float]:
    figures = {}
    for threads in (1, os.cpu_count() or 1):
        words = ("sysbench", "cpu", f"--time={seconds}", f"--threads={threads}", "run")
        match = re.search(r"events per second:\s*([\d.]+)", output(sandbox, *words))
        assert match
        figures[f"sysbench cpu, {threads} thread{'s' * (threads > 1)}"] = float(match[1])
    return figures


def _kernels(sandbox: Sandbox, place: Path, repeats: int) -> dict[str, float]:
    program, parallel = compiled("kernels", place), compiled("kernels", place, mpi=True)
    cpus = str(os.cpu_count() or 1)
    figures = {}
    for kernel in KERNELS:
        figures[f"{kernel}, serial"] = float(output(sandbox, str(program), kernel, str(repeats)))
        words = ("mpirun", "--allow-run-as-root", "--oversubscribe", "-n", cpus, str(parallel))
        figures[f"{kernel}, mpirun"] = float(output(sandbox, *words, kernel, str(repeats)))
    return figures


def blocks(quick: bool, user: str | None, place: Path) -> list[Block]:
    """All blocks of the suite; programs are compiled into `place`."""
    seconds, repeats = (1, 5) if quick else (5, 30)
    cpus = os.cpu_count() or 1
    names = dict.fromkeys(
        (f"sysbench cpu, {n} thread{'s' * (n > 1)}" for n in (1, cpus)), OPERATIONS
    )
    kernels = dict.fromkeys(
        (f"{k}, {how}" for k in KERNELS for how in ("serial", "mpirun")), SECONDS
    )
    found = []
    for sandbox in sandboxes(user):
        found.append(Block(sandbox.name, names, partial(_sysbench, sandbox, seconds)))
        found.append(Block(sandbox.name, kernels, partial(_kernels, sandbox, place, repeats)))
    return found
