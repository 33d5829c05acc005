"""One regular file of all that a node needs for a generation: what Slurm's sbcast can carry.

A plain tar (packages are compressed already) of the generation's manifest and packages; unpacked,
it is a directory that `cache.ensure` takes as its source.
"""

from __future__ import annotations

import os
import re
import shutil
from typing import IO

from sdee_launch.deploy import archive
from sdee_launch.deploy.errors import Damaged, DeployProblem
from sdee_launch.deploy.generations import State

#: So much is copied at once.
BLOCK = 1 << 20
_NAME = re.compile(rb"[1-9][0-9]{0,17}\.(manifest|pack)")


def write(state: State, number: int, have: int, file: IO[bytes]) -> int:
    """Write what a node that has generation `have` (0: none) lacks; returns the bytes.

    Packages after `have` are enough for it, as those that it has are in its tree already.
    """
    about = state.about(number)
    names = [(number, "manifest"), *((one, "pack") for one in about.packages if one > have)]
    for one, what in names:
        with open(state.file(one, what), "rb") as source:
            size = os.fstat(source.fileno()).st_size
            file.write(archive.header(b"%d.%b" % (one, what.encode()), size))
            shutil.copyfileobj(source, file, BLOCK)
            file.write(archive.padding(size))
    file.write(archive.end())
    return file.tell()


def read(file: IO[bytes], directory: str) -> None:
    """Unpack a bundle into an empty directory. Raises Damaged, OSError.

    Run as the user: what is made belongs to them, whatever the archive says.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        reader = archive.Reader(file, "a bundle")
        for member in reader:
            if not _NAME.fullmatch(member.path):
                raise Damaged(f"a bundle has what no bundle has: {member.path[:80]!r}")
            out = os.open(
                member.path,
                os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                0o600,
                dir_fd=fd,
            )
            with os.fdopen(out, "wb") as target:
                while data := reader.take(BLOCK):
                    target.write(data)
    except FileExistsError as error:
        raise DeployProblem(f"{os.fsdecode(error.filename)} is there twice") from None
    finally:
        os.close(fd)
