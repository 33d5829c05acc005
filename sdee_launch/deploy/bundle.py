"""One regular file of all that a node needs for a generation: what Slurm's sbcast can carry.

A plain tar (packages are compressed already) of the generation's manifest and packages; unpacked,
it is a directory that `cache.ensure` takes as its source.
"""

from __future__ import annotations

import os
import re
import tarfile
from typing import IO

from sdee_launch.deploy.errors import Damaged, DeployProblem
from sdee_launch.deploy.generations import State

_NAME = re.compile(r"[1-9][0-9]{0,17}\.(manifest|pack)")


def write(state: State, number: int, have: int, file: IO[bytes]) -> int:
    """Write what a node that has generation `have` (0: none) lacks; returns the bytes.

    Packages after `have` are enough for it, as those that it has are in its tree already.
    """
    about = state.about(number)
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as tar:
        tar.add(state.file(number, "manifest"), f"{number}.manifest")
        for package in about.packages:
            if package > have:
                tar.add(state.file(package, "pack"), f"{package}.pack")
    return file.tell()


def read(file: IO[bytes], directory: str) -> None:
    """Unpack a bundle into an empty directory. Raises Damaged, OSError.

    Run as the user: what is made belongs to them, whatever the archive says.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with tarfile.open(fileobj=file, mode="r|", bufsize=1 << 20) as tar:
            for info in tar:
                if not info.isreg() or not _NAME.fullmatch(info.name):
                    raise Damaged(f"a bundle has what no bundle has: {info.name[:80]!r}")
                content = tar.extractfile(info)
                assert content is not None
                out = os.open(
                    info.name,
                    os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                    0o600,
                    dir_fd=fd,
                )
                with os.fdopen(out, "wb") as target:
                    while data := content.read(1 << 20):
                        target.write(data)
    except tarfile.TarError as error:
        raise Damaged(f"a bundle can't be read ({error})") from None
    except FileExistsError as error:
        raise DeployProblem(f"{error.filename} is there twice") from None
    finally:
        os.close(fd)
