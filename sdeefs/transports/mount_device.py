"""Mounting: an open /dev/fuse and a mount that asks it, attached nowhere yet.

With privileges in the mount namespace (root, or root of a user namespace) the mount is detached:
the session attaches it where it wants, or hands its descriptor to whoever shall. Without,
fusermount3 mounts at a path and hands us the device.
"""

from __future__ import annotations

import array
import errno
import os
import shutil
import socket
import stat
import subprocess
from dataclasses import dataclass

from mount_helpers import syscalls


@dataclass(frozen=True)
class FuseMount:
    """What mount(8) would be told. `attributes` are MOUNT_ATTR_* (nosuid, nodev, noatime, …)."""

    source: str = "sdeefs"
    subtype: str = "sdeefs"  # /proc/mounts shows the type fuse.SUBTYPE
    allow_other: bool = True
    default_permissions: bool = True
    read_only: bool = False
    attributes: int = 0


_FLAGS_OF_ATTRIBUTES = (
    (syscalls.MOUNT_ATTR_RDONLY, syscalls.MS_RDONLY, "ro"),
    (syscalls.MOUNT_ATTR_NOSUID, syscalls.MS_NOSUID, "nosuid"),
    (syscalls.MOUNT_ATTR_NODEV, syscalls.MS_NODEV, "nodev"),
    (syscalls.MOUNT_ATTR_NOEXEC, syscalls.MS_NOEXEC, "noexec"),
    (syscalls.MOUNT_ATTR_NODIRATIME, syscalls.MS_NODIRATIME, "nodiratime"),
)


def open_device() -> int:
    """A fresh descriptor of /dev/fuse; one line that names the mend where there is none."""
    try:
        return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        mend = {
            errno.ENOENT: "load the module: modprobe fuse",
            errno.ENODEV: "load the module: modprobe fuse",
            errno.ENXIO: "load the module: modprobe fuse",
            errno.EACCES: "it should have mode 666",
            errno.EPERM: "the cgroup or the container denies the device",
        }.get(error.errno or 0)
        text = os.strerror(error.errno or errno.EIO) + (f" ({mend})" if mend else "")
        raise OSError(error.errno, text, "/dev/fuse") from None


def mount_detached(what: FuseMount) -> tuple[int, int]:
    """(descriptor of the device, descriptor of a detached mount). The caller owns both."""
    device = open_device()
    try:
        fs = syscalls.fsopen("fuse")
        try:
            syscalls.fsconfig_string(fs, "source", what.source)
            syscalls.fsconfig_string(fs, "subtype", what.subtype)
            # As a string: fsconfig's FSCONFIG_SET_FD is understood only by newer kernels.
            syscalls.fsconfig_string(fs, "fd", str(device))
            syscalls.fsconfig_string(fs, "rootmode", f"{stat.S_IFDIR:o}")
            syscalls.fsconfig_string(fs, "user_id", str(os.getuid()))
            syscalls.fsconfig_string(fs, "group_id", str(os.getgid()))
            for wanted, key in (
                (what.default_permissions, "default_permissions"),
                (what.allow_other, "allow_other"),
                (what.read_only, "ro"),
            ):
                if wanted:
                    syscalls.fsconfig_flag(fs, key)
            syscalls.fsconfig_create(fs)
            return device, syscalls.fsmount(fs, what.attributes)
        finally:
            os.close(fs)
    except BaseException:
        os.close(device)
        raise


def mount_at(point: bytes, what: FuseMount) -> int:
    """Mount at a path, with the old mount(2) where the kernel has no fsopen; returns the device."""
    try:
        device, mount_fd = mount_detached(what)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        return _mount_old(point, what)
    try:
        syscalls.attach(mount_fd, point)
    except BaseException:
        os.close(device)
        raise
    finally:
        os.close(mount_fd)
    return device


def _mount_old(point: bytes, what: FuseMount) -> int:
    device = open_device()
    data = f"fd={device},rootmode={stat.S_IFDIR:o},user_id={os.getuid()},group_id={os.getgid()}"
    if what.default_permissions:
        data += ",default_permissions"
    if what.allow_other:
        data += ",allow_other"
    flags = syscalls.MS_RDONLY if what.read_only else 0
    for attribute, flag, _ in _FLAGS_OF_ATTRIBUTES:
        if what.attributes & attribute:
            flags |= flag
    kind = what.attributes & syscalls.MOUNT_ATTR__ATIME
    if kind == syscalls.MOUNT_ATTR_NOATIME:
        flags |= syscalls.MS_NOATIME
    elif kind == syscalls.MOUNT_ATTR_STRICTATIME:
        flags |= syscalls.MS_STRICTATIME
    try:
        syscalls.mount(what.source, point, f"fuse.{what.subtype}", flags, data)
    except BaseException:
        os.close(device)
        raise
    return device


def mount_by_fusermount(point: bytes, what: FuseMount) -> int:
    """Mount at a path as a user without privileges: fusermount3 (setuid root) hands us the device."""
    program = shutil.which("fusermount3")
    if program is None:
        raise OSError(errno.ENOENT, "not found (install the package fuse3)", "fusermount3")
    words = [f"fsname={_escape(what.source)}", f"subtype={_escape(what.subtype)}"]
    if what.default_permissions:
        words.append("default_permissions")
    if what.allow_other:
        words.append("allow_other")
    if what.read_only:
        words.append("ro")
    words += [name for attribute, _, name in _FLAGS_OF_ATTRIBUTES if what.attributes & attribute]
    if what.attributes & syscalls.MOUNT_ATTR__ATIME == syscalls.MOUNT_ATTR_NOATIME:
        words.append("noatime")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        done = subprocess.run(
            [program, "-o", ",".join(words), "--", point],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno()), "LC_ALL": "C"},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
        )
        if done.returncode != 0:
            text = done.stderr.decode("utf-8", "replace").strip().removeprefix("fusermount3: ")
            raise OSError(errno.EPERM, f"fusermount3: {text or 'failed'}", os.fsdecode(point))
        theirs.close()
        descriptors = array.array("i")
        _, messages, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(descriptors.itemsize))
    for level, kind_of, data in messages:
        if level == socket.SOL_SOCKET and kind_of == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: descriptors.itemsize])
            os.set_inheritable(descriptors[0], False)
            return descriptors[0]
    raise OSError(errno.EPROTO, "fusermount3 handed no device over", os.fsdecode(point))


def _escape(word: str) -> str:
    """A comma would begin another option."""
    return word.replace("\\", "\\\\").replace(",", "\\,")
