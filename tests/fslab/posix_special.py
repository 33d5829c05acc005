"""POSIX checks: special files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from tests.fslab.fslab_lab import ALICE, acting_as
from tests.fslab.posix_place import Place, check, fails


@check
def special_files(p: Place) -> Iterator[None]:
    os.mknod(p / "lc", stat.S_IFCHR | 0o644, os.makedev(1, 5))
    os.mkfifo(p / "lp", 0o600)
    yield
    os.mknod(p / "c", stat.S_IFCHR | 0o600, os.makedev(10, 300))
    os.mknod(p / "b", stat.S_IFBLK | 0o660, os.makedev(7, 3))
    os.mknod(p / "s", stat.S_IFSOCK | 0o666)
    os.mknod(p / "r", stat.S_IFREG | 0o604)
    os.mkfifo(p / "p", 0o622)
    assert p.stat("c").st_rdev == os.makedev(10, 300)
    assert stat.S_ISBLK(p.stat("b").st_mode)
    assert p.stat("b").st_rdev == os.makedev(7, 3)
    assert stat.S_ISSOCK(p.stat("s").st_mode)
    assert stat.S_ISREG(p.stat("r").st_mode)
    assert stat.S_ISFIFO(p.stat("p").st_mode)
    os.chmod(p / "lc", 0o600)
    assert p.stat("lc").st_rdev == os.makedev(1, 5)
    os.chown(p / "lp", 4, 4)
    assert stat.S_ISFIFO(p.stat("lp").st_mode)


@check
def device_nodes_work(p: Place) -> Iterator[None]:
    os.mknod(p / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(p / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    yield
    if os.statvfs(p.root).f_flag & os.ST_NODEV:
        return
    with open(p / "zero", "rb", 0) as file:
        assert file.read(4) == b"\0\0\0\0"
    fd = p.open("null", os.O_WRONLY)
    assert os.write(fd, b"gone") == 4


@check
def device_nodes_need_privilege(p: Place) -> Iterator[None]:
    p.mkdir("d", 0o777)
    yield
    with acting_as(ALICE):
        fails("EPERM", os.mknod, p / "d/c", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        os.mknod(p / "d/s", stat.S_IFSOCK | 0o600)
    assert p.ls("d") == ["s"]


@check
def fifo_carries_data(p: Place) -> Iterator[None]:
    os.mkfifo(p / "p")
    yield
    reader = p.open("p", os.O_RDONLY | os.O_NONBLOCK)
    writer = p.open("p", os.O_WRONLY | os.O_NONBLOCK)
    os.write(writer, b"through")
    assert os.read(reader, 20) == b"through"
    other = os.stat(p / "p")
    assert stat.S_ISFIFO(other.st_mode)


@check
def unix_socket(p: Place) -> Iterator[None]:
    yield
    import socket

    old = os.getcwd()
    os.chdir(p.root)
    try:
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            server.bind("sock")
            server.listen()
            client.connect("sock")
            peer, _ = server.accept()
            client.sendall(b"hi")
            assert peer.recv(10) == b"hi"
            peer.close()
        with socket.socket(socket.AF_UNIX) as client:
            fails("ECONNREFUSED", client.connect, "sock")
    finally:
        os.chdir(old)
    os.unlink(p / "sock")


@check
def open_of_unconnected_special_files(p: Place) -> Iterator[None]:
    os.mknod(p / "s", stat.S_IFSOCK | 0o666)
    yield
    fails("ENXIO", os.open, p / "s", os.O_RDONLY)
    os.mkfifo(p / "p")
    fails("ENXIO", os.open, p / "p", os.O_WRONLY | os.O_NONBLOCK)
