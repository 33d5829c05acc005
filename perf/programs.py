"""Our own C programs, compiled at first use into a directory that every user may read."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from perf.figures import Missing

_LIBRARIES = {"bare": ["-luring", "-lpthread"]}


def compiled(source: str, place: Path, *, mpi: bool = False) -> Path:
    """The program made of `perf/SOURCE.c`. Raises Missing without a compiler."""
    compiler = "mpicc" if mpi else "cc"
    if not shutil.which(compiler):
        raise Missing(f"{compiler} isn't installed")
    target = place / (source + ("-mpi" if mpi else ""))
    if not target.exists():
        place.mkdir(parents=True, exist_ok=True)
        flags = ["-DUSE_MPI"] if mpi else []
        path = Path(__file__).with_name(f"{source}.c")
        subprocess.run(
            [
                compiler,
                "-O2",
                *flags,
                "-o",
                str(target),
                str(path),
                *_LIBRARIES.get(source, ["-lm"]),
            ],
            check=True,
            capture_output=True,
        )
    return target
