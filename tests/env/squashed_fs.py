"""A filesystem as an NFS server exports it with root_squash: the host's root is nobody there.

python squashed_fs.py SOURCE MOUNTPOINT shows SOURCE so, through FUSE, until it is unmounted. Who asks
is told by the request (the filesystem's ids of the calling process, as NFS takes them).
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pyfuse3
import trio

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))
from tests.fslab.restricted_fs import Restricted


def _squashed(name):  # type: ignore[no-untyped-def]
    operation = getattr(Restricted, name)

    async def refuse_root(self, *arguments, **keywords):  # type: ignore[no-untyped-def]
        context = keywords.get("ctx", arguments[-1] if arguments else None)
        if isinstance(context, pyfuse3.RequestContext) and context.uid == 0:
            raise pyfuse3.FUSEError(errno.EACCES)
        return await operation(self, *arguments, **keywords)

    return refuse_root


class Squashed(Restricted):
    """Everything but attributes is refused to root: SOURCE is somebody's home, of mode 0700."""

    for _name in (
        "lookup", "setattr", "readlink", "mknod", "mkdir", "symlink", "link", "unlink", "rmdir",
        "rename", "open", "create", "opendir",
    ):  # fmt: skip
        locals()[_name] = _squashed(_name)

    async def access(self, inode, mode, ctx):  # type: ignore[no-untyped-def]
        return ctx.uid != 0


def main() -> None:
    """Serve until unmounted."""
    os.umask(0)
    source, point = sys.argv[1:3]
    options = {*pyfuse3.default_options, "fsname=server:/home", "allow_other"}
    options.discard("default_permissions")
    pyfuse3.init(Squashed(source), point, options)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
