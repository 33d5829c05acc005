"""CPU-bound work inside and outside (the paper's Figs. 7 to 9): sysbench and kernels of our own."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import partial

from perf.figures import OPERATIONS, SECONDS, Missing
from perf.places import Place
from perf.programs import compiled
from perf.runner import Block
from perf.sandboxes import Sandbox
from perf.sessions import Sessions

#: Starts of sysbench in a slice, of which the best counts, as in the drivers of our own.
PARTS = 3
KERNELS = ("ep", "is", "cg", "mg")


def _sysbench_line(threads: int) -> str:
    return f"sysbench cpu, {threads} thread{'s' * (threads > 1)}"


def _sysbench(sessions: Sessions, sandbox: Sandbox, threads: int, events: int) -> dict[str, float]:
    # Alone it stays on one CPU, the last: interrupts prefer the first.
    pin = ("taskset", "--cpu-list", str(max(os.sched_getaffinity(0)))) if threads == 1 else ()
    words = ("sysbench", "cpu", "--time=0", f"--events={events * threads}", f"--threads={threads}")
    rates = []
    for _ in range(PARTS):
        said = sessions.ask(sandbox, *pin, *words, "run")
        match = re.search(r"events per second:\s*([\d.]+)", said)
        if not match:
            raise Missing("doesn't run here: sysbench tells no events per second")
        rates.append(float(match[1]))
    return {_sysbench_line(threads): max(rates)}


def _serial(
    sessions: Sessions, sandbox: Sandbox, place: Place, kernel: str, repeats: int
) -> dict[str, float]:
    program = compiled("kernels", place.programs)
    said = sessions.ask(sandbox, str(program), kernel, str(repeats))
    return {f"{kernel}, serial": float(said)}


def _parallel(sessions: Sessions, sandbox: Sandbox, place: Place, repeats: int) -> dict[str, float]:
    """All kernels in one start of mpirun, which takes longer than they do."""
    program = compiled("kernels", place.programs, mpi=True)
    words = ("mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(os.cpu_count() or 1))
    said = sessions.ask(sandbox, *words, str(program), *KERNELS, str(repeats)).split()
    return {f"{k}, mpirun": float(text) for k, text in zip(KERNELS, said, strict=True)}


def blocks(quick: bool, found: Sequence[Sandbox], place: Place, sessions: Sessions) -> list[Block]:
    """All blocks of the suite; the programs are compiled into `place`."""
    events, repeats = (25, 12) if quick else (100, 24)
    todo = []
    for threads in dict.fromkeys((1, os.cpu_count() or 1)):
        lines = {_sysbench_line(threads): OPERATIONS}
        for sandbox in found:
            run = partial(_sysbench, sessions, sandbox, threads, events)
            todo.append(Block(sandbox.name, lines, run))
    for kernel in KERNELS:
        for sandbox in found:
            run = partial(_serial, sessions, sandbox, place, kernel, repeats)
            todo.append(Block(sandbox.name, {f"{kernel}, serial": SECONDS}, run))
    lines = {f"{kernel}, mpirun": SECONDS for kernel in KERNELS}
    for sandbox in found:
        run = partial(_parallel, sessions, sandbox, place, repeats)
        todo.append(Block(sandbox.name, lines, run))
    return todo
