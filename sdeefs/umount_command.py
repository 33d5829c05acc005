"""`sdeefs umount`: take a mount away, and wait until its server has ended and upper is free."""

from __future__ import annotations

import argparse
import errno
import os
import select
import shutil
import signal
import subprocess
from typing import Any

from mount_helpers.mountinfo import Mount, mount_at, read_mounts
from mount_helpers.syscalls import MNT_DETACH, MNT_FORCE, UMOUNT_NOFOLLOW, umount2
from sdeefs.refusals import OUR_TYPE, Refused, absolute, is_ours, text

OK, FAILURE = 0, 1


def fusermount(point: bytes, *, lazy: bool) -> None:
    """Unmount as a user without privileges may. Raises Refused."""
    program = shutil.which("fusermount3")
    if program is None:
        raise Refused(f"{text(point)}: not permitted, and fusermount3 isn't installed (fuse3)")
    done = subprocess.run(
        [program, "-u", *(["-z"] if lazy else []), "--", point],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().removeprefix("fusermount3: ")
        raise Refused(f"{text(point)}: {said or 'fusermount3 failed'}")


def run(arguments: argparse.Namespace) -> int:
    """The command; every MERGED is tried, the first failure is the exit status."""
    import sys

    status = OK
    for merged in arguments.merged:
        try:
            unmount(os.fsencode(merged), lazy=arguments.lazy, force=arguments.force)
        except (Refused, OSError) as error:
            from sdeefs.background import complaint

            print(f"sdeefs umount: {complaint(error)[1]}", file=sys.stderr)
            status = FAILURE
    return status


def unmount(merged: bytes, *, lazy: bool = False, force: bool = False, wait: float = 10) -> None:
    """Unmount one. Raises Refused or OSError."""
    point = absolute(merged)
    mount = mount_at(point)
    if mount is None and os.path.islink(point):
        point = os.path.realpath(point)
        mount = mount_at(point)
    if mount is None and force and _end_elsewhere(point):
        return
    if mount is None:
        raise Refused(f"{text(point)}: nothing is mounted there")
    if not is_ours(mount):
        raise Refused(
            f"{text(point)}: a {mount.fstype} mount, not one of sdeefs (umount takes it away)"
        )
    server = _server(mount)
    if force and mount.fstype == OUR_TYPE:
        _abort(mount, point)
        lazy = True
    try:
        umount2(point, UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise Refused(
                f"{text(point)}: in use by some process (--lazy unmounts anyway)"
            ) from None
        if error.errno != errno.EPERM:
            raise
        fusermount(point, lazy=lazy)
    if server is not None and force:
        _end(server)
    elif server is not None:
        _wait(server, 0 if lazy else wait, point, mount.device[1])


def _server(mount: Mount) -> int | None:
    """A pidfd of the server of a mount, found by its record."""
    from sdeefs.control import records

    if mount.fstype != OUR_TYPE:
        return None
    for record in records():
        if record.get("minor") == mount.device[1]:
            found = _pidfd(record)
            if found is not None:
                return found
    return None


def _pidfd(record: dict[str, Any]) -> int | None:
    try:
        pid = int(record["pid"])
        fd = os.pidfd_open(pid)
    except (OSError, KeyError, ValueError):
        return None
    # A stale record may name a process that is somebody else's by now.
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if b"sdeefs" in file.read():
                return fd
    except OSError:
        pass
    os.close(fd)
    return None


def _abort(mount: Mount, point: bytes) -> None:
    from mount_helpers.fuse import abort_connection

    try:
        abort_connection(mount.device[1])
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES, errno.ENOENT):
            raise
        try:
            umount2(point, MNT_FORCE | UMOUNT_NOFOLLOW)
        except OSError:
            pass  # not permitted either: the lazy unmount that follows says so


def _end(server: int) -> None:
    """A server whose connection was aborted ends by itself, or else by force."""
    try:
        if not select.select([server], [], [], 3)[0]:
            signal.pidfd_send_signal(server, signal.SIGKILL)
            select.select([server], [], [], 10)
    except ProcessLookupError:
        pass
    finally:
        os.close(server)


def _end_elsewhere(point: bytes) -> bool:
    """End servers whose mount is gone from here but lives on in other mount namespaces."""
    from mount_helpers.fuse import abort_connection
    from sdeefs.control import records

    found = False
    for record in records():
        server = _pidfd(record) if record.get("merged") == os.fsdecode(point) else None
        if server is None:
            continue
        found = True
        try:
            abort_connection(int(record["minor"]))
        except OSError:
            pass  # not permitted: the end of its server does the same
        _end(server)
    return found


def _wait(server: int, seconds: float, point: bytes, minor: int) -> None:
    """Until the server has ended. One that keeps a moved or copied mount alive is left to it."""
    import sys

    copies = [text(m.point) for m in read_mounts() if m.device[1] == minor and m.fstype == OUR_TYPE]
    if copies:
        print(
            f"sdeefs umount: {text(point)}: its server still runs, for {', '.join(copies)}",
            file=sys.stderr,
        )
        os.close(server)
        return
    try:
        ready = select.select([server], [], [], seconds)[0] if seconds else [server]
        if not ready and mount_at(point) is None:
            print(
                f"sdeefs umount: {text(point)}: its server still runs: another mount namespace"
                " has a copy of the mount (--force ends it there too)",
                file=sys.stderr,
            )
    finally:
        os.close(server)
