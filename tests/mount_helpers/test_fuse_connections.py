"""Aborting a FUSE connection by its number, with nobody serving it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from mount_helpers import syscalls
from mount_helpers.fuse import abort_connection, waiting_requests
from mount_helpers.mountinfo import mount_at
from mount_helpers.trials import in_child, private_mounts


def unserved_mount(point: Path) -> tuple[int, int]:
    """(device, minor) of a FUSE mount that nobody serves."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    fs = syscalls.fsopen("fuse")
    for key, value in (
        ("source", "unserved"), ("fd", str(device)), ("rootmode", f"{stat.S_IFDIR:o}"),
        ("user_id", "0"), ("group_id", "0"),
    ):  # fmt: skip
        syscalls.fsconfig_string(fs, key, value)
    syscalls.fsconfig_create(fs)
    mount_fd = syscalls.fsmount(fs)
    syscalls.attach(mount_fd, str(point))
    os.close(fs)
    os.close(mount_fd)
    mount = mount_at(str(point))
    assert mount is not None
    return device, mount.device[1]


def trial(point: Path) -> str:
    private_mounts()
    device, minor = unserved_mount(point)
    assert waiting_requests(minor) == 1  # INIT
    assert abort_connection(minor)
    with pytest.raises(OSError) as caught:
        os.read(device, 1 << 20)
    assert caught.value.errno in (errno.ECONNABORTED, errno.ENODEV)
    with pytest.raises(OSError) as caught:
        os.statvfs(point)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.ECONNREFUSED)
    syscalls.umount2(str(point), syscalls.MNT_DETACH)
    os.close(device)
    assert abort_connection(minor) is False
    assert waiting_requests(minor) is None
    return "aborted"


def test_a_hanging_connection_is_aborted(tmp_path: Path) -> None:
    assert in_child(lambda: trial(tmp_path), seconds=60) == (True, "aborted")


def test_without_fusectl_mounted(tmp_path: Path) -> None:
    def hidden() -> str:
        private_mounts()
        syscalls.mount("none", "/sys/fs/fuse/connections", "tmpfs")
        return trial(tmp_path)

    assert in_child(hidden, seconds=60) == (True, "aborted")
