"""A small filesystem mounted through each transport: everything a program may ask of it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.transports.server_lab import DEADLINE, Server, is_mounted, mirror, wait_for

#: (transport, options): every data path of each.
WAYS = [
    ("device", {}),
    ("device", {"passthrough": False}),
    ("device", {"passthrough": False, "writeback": False, "timeout": 1.0}),
    ("ring", {}),
    ("ring", {"passthrough": False}),
    ("pyfuse3", {}),
    ("pyfuse3", {"writeback": False, "timeout": 1.0}),
]


def ids(way: tuple[str, dict[str, object]]) -> str:
    return "-".join(
        [way[0], *(key if value is not False else f"no-{key}" for key, value in way[1].items())]
    )


@pytest.fixture(params=WAYS, ids=ids)
def server(request: pytest.FixtureRequest, source: Path, root: Path) -> Iterator[Server]:
    transport, options = request.param
    with mirror(source, root, transport, **options) as running:
        yield running


def test_names_and_files(server: Server, source: Path, root: Path) -> None:
    assert sorted(os.listdir(root)) == ["directory", "file"]
    assert (root / "file").read_bytes() == b"content of the file\n"
    (root / "new").write_bytes(b"x" * 300_000)
    assert (source / "new").read_bytes() == b"x" * 300_000
    os.rename(root / "new", root / "directory" / "moved")
    assert not (root / "new").exists()
    os.link(root / "directory" / "moved", root / "linked")
    assert os.stat(root / "linked").st_nlink == 2
    os.unlink(root / "directory" / "moved")
    os.symlink("some where/else", root / "link")
    assert os.readlink(root / "link") == "some where/else"
    os.mkdir(root / "made", 0o750)
    assert stat.S_IMODE(os.stat(source / "made").st_mode) == 0o750
    with pytest.raises(OSError) as caught:
        os.rmdir(root)
    assert caught.value.errno in (errno.EBUSY, errno.ENOTEMPTY)
    os.rmdir(root / "made")
    os.mkfifo(root / "fifo")
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    assert os.stat(root / "null").st_rdev == os.makedev(1, 3)
    with open(root / "null", "wb") as file:
        file.write(b"away")


def test_attributes(server: Server, source: Path, root: Path) -> None:
    path = root / "file"
    os.chmod(path, 0o4711)
    os.chown(path, 1234, 2345)
    os.utime(path, ns=(1_000_000_001, 2_000_000_002))
    for seen in (os.stat(path), os.stat(source / "file")):
        assert stat.S_IMODE(seen.st_mode) & 0o777 == 0o711
        assert (seen.st_uid, seen.st_gid) == (1234, 2345)
        assert (seen.st_atime_ns, seen.st_mtime_ns) == (1_000_000_001, 2_000_000_002)
    before = time.time_ns() - 2_000_000_000
    os.utime(path)
    assert os.stat(path).st_mtime_ns >= before
    os.truncate(path, 7)
    assert path.read_bytes() == b"content"
    assert os.stat(path).st_ino == os.stat(source / "file").st_ino
    assert os.stat(path).st_dev == os.stat(root).st_dev
    assert os.statvfs(root).f_blocks == os.statvfs(source).f_blocks


def test_extended_attributes(server: Server, source: Path, root: Path) -> None:
    path = root / "file"
    os.setxattr(path, "user.a", b"one")
    os.setxattr(path, "user.b", b"")
    os.setxattr(path, "trusted.c", b"x" * 1000)
    assert os.getxattr(path, "user.a") == b"one"
    assert os.getxattr(path, "trusted.c") == b"x" * 1000
    assert {"user.a", "user.b", "trusted.c"} <= set(os.listxattr(path))
    os.removexattr(path, "user.a")
    with pytest.raises(OSError) as caught:
        os.getxattr(path, "user.a")
    assert caught.value.errno == errno.ENODATA
    assert "user.a" not in os.listxattr(source / "file")


def test_reading_and_writing(server: Server, source: Path, root: Path) -> None:
    path = root / "data"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
    try:
        blocks = os.urandom(1 << 20)
        assert os.pwrite(fd, blocks, 5000) == len(blocks)
        assert os.pread(fd, len(blocks), 5000) == blocks
        assert os.pread(fd, 5000, 0) == bytes(5000)
        os.fsync(fd)
        os.fdatasync(fd)
        os.ftruncate(fd, 6000)
        assert os.fstat(fd).st_size == 6000
    finally:
        os.close(fd)
    assert (source / "data").read_bytes() == bytes(5000) + blocks[:1000]
    with open(path, "ab") as file:
        file.write(b"appended")
    assert path.read_bytes()[-8:] == b"appended"
    assert os.stat(path).st_size == 6008
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    os.close(fd)
    assert os.stat(source / "data").st_size == 0


def test_mapped_files(server: Server, source: Path, root: Path) -> None:
    """In a child, since a fault holds the GIL here; what one map writes another reads."""
    script = (
        "import mmap, os, sys\n"
        "path = sys.argv[1]\n"
        "fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)\n"
        "os.ftruncate(fd, 100000)\n"
        "shared = mmap.mmap(fd, 100000)\n"
        "shared[50000:50004] = b'here'\n"
        "assert os.pread(fd, 4, 50000) == b'here'\n"
        "os.pwrite(fd, b'there', 60000)\n"
        "assert shared[60000:60005] == b'there'\n"
        "private = mmap.mmap(fd, 100000, mmap.MAP_PRIVATE)\n"
        "private[0:4] = b'mine'\n"
        "assert shared[0:4] == bytes(4)\n"
        "shared.flush(); shared.close(); private.close(); os.close(fd)\n"
    )
    path = root / "mapped"
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], timeout=DEADLINE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    content = (source / "mapped").read_bytes()
    assert content[50000:50004] == b"here" and content[60000:60005] == b"there"


def test_big_directory(server: Server, source: Path, root: Path) -> None:
    names = {f"entry-{i:04}" + "x" * (i % 200) for i in range(1500)}
    for name in names:
        (source / "directory" / name).touch()
    assert set(os.listdir(root / "directory")) == names
    with os.scandir(root / "directory") as entries:
        for entry in entries:
            assert entry.is_file(follow_symlinks=False)
            if entry.name.startswith("entry-00"):
                assert entry.inode() == entry.stat().st_ino


def test_rename_flags(server: Server, source: Path, root: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    a, b = bytes(root / "file"), bytes(root / "directory")
    assert libc.renameat2(-100, a, -100, b, 1) == -1
    assert ctypes.get_errno() == errno.EEXIST
    assert libc.renameat2(-100, a, -100, b, 2) == 0
    assert (root / "directory").is_file() and (root / "file").is_dir()


def test_faults_of_the_core_reach_the_caller(server: Server, root: Path) -> None:
    for name in ("crash", "odd-errno"):
        with pytest.raises(OSError) as caught:
            os.stat(root / name)
        assert caught.value.errno == errno.EIO
    assert (root / "file").exists()
    # The server has written a line about the first; that is what this test is about.
    server.stop()
    word, _ = server.line()
    assert word == "end" and server.process.wait(DEADLINE) == 0
    assert "a fault of the core" in server.errors()


def test_setuid_goes_when_another_user_writes(server: Server, root: Path) -> None:
    path = root / "suid"
    path.write_bytes(b"program")
    os.chmod(path, 0o6777)
    # By the working directory: other users can't walk to it.
    done = subprocess.run(
        ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "sh", "-c",
         "echo another >> ./suid"],
        cwd=root, timeout=DEADLINE, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o777


def test_lookups_are_given_back(server: Server, source: Path, root: Path) -> None:
    """Every count that the kernel got it returns: else the core would hold nodes for ever."""
    for i in range(300):
        (source / "directory" / str(i)).touch()
    for _ in range(2):
        for name in os.listdir(root / "directory"):
            os.stat(root / "directory" / name)
    assert server.ask("nodes")[0] > 300
    for i in range(300):
        os.unlink(root / "directory" / str(i))
    wait_for(lambda: server.ask("nodes")[0] < 20, "the kernel to forget")
    assert server.ask("nodes")[1] == 0


@pytest.mark.parametrize("transport", ["device", "ring", "pyfuse3"])
def test_what_was_cached_is_forgotten_when_told(transport: str, source: Path, root: Path) -> None:
    with mirror(source, root, transport, timeout=3600.0) as server:
        path = root / "file"
        assert not (root / "later").exists()
        assert os.stat(path).st_size == 20
        (source / "later").touch()
        os.truncate(source / "file", 3)
        assert not (root / "later").exists()
        assert os.stat(path).st_size == 20
        # Of what the kernel doesn't know nothing comes, not even a line in the log.
        server.ask("invalidate_entry", 1, "never seen")
        server.ask("invalidate_entry", 12345, "never seen")
        server.ask("invalidate_inode", 12345)
        server.ask("invalidate_entry", 1, "later")
        wait_for((root / "later").exists, "the name to be seen")
        server.ask("invalidate_entry", 1, "file")
        node = 2 if os.stat(path).st_size == 3 else None
        for number in range(2, 10) if node is None else [node]:
            server.ask("invalidate_inode", number)
        wait_for(lambda: os.stat(path).st_size == 3, "the size to be seen")
        wait_for(lambda: path.read_bytes() == b"con", "the content to be seen")


@pytest.mark.parametrize("transport", ["device", "ring"])
def test_what_only_the_device_has(transport: str, source: Path, root: Path) -> None:
    with mirror(source, root, transport) as server:
        assert server.data_path == "passthrough"
        fd = os.open(root / "sparse", os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(fd, 1 << 20)
        os.pwrite(fd, b"data", 1 << 19)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 1 << 19
        assert os.lseek(fd, 1 << 19, os.SEEK_HOLE) < 1 << 20
        os.posix_fallocate(fd, 0, 2 << 20)
        assert os.stat(source / "sparse").st_blocks * 512 >= 2 << 20
        os.pwrite(fd, b"to be copied", 0)
        target = os.open(root / "copy", os.O_RDWR | os.O_CREAT, 0o600)
        assert os.copy_file_range(fd, target, 12, 0, 5) == 12
        assert os.pread(target, 100, 5) == b"to be copied"
        assert any("copy_file_range" in call for call in server.ask("calls"))
        os.close(fd)
        os.close(target)
        fd = os.open(root / "directory", os.O_TMPFILE | os.O_RDWR, 0o600)
        os.write(fd, b"nameless")
        assert os.pread(fd, 8, 0) == b"nameless"
        os.close(fd)
        out = subprocess.run(
            ["stat", "-c", "%W", root / "file"], capture_output=True, timeout=DEADLINE
        )
        assert out.stdout.strip() == b"1000000000"


def test_passthrough_needs_no_server(source: Path, root: Path) -> None:
    with mirror(source, root, "device") as server:
        path = root / "file"
        fds = [os.open(path, os.O_RDWR), os.open(path, os.O_RDONLY)]
        os.pwrite(fds[0], b"CONTENT", 0)
        assert os.pread(fds[1], 7, 0) == b"CONTENT"
        assert (source / "file").read_bytes()[:7] == b"CONTENT"
        os.close(fds[0])
        assert os.pread(fds[1], 7, 0) == b"CONTENT"
        os.close(fds[1])
        counters = server.counters()
        assert "read" not in counters and "write" not in counters
        assert counters["open"] == 2
        assert "flush" not in counters


def test_a_layer_that_is_stacked_too_deep_is_served_by_requests(
    source: Path, root: Path, tmp_path: Path
) -> None:
    for name in ("upper", "work", "stacked"):
        (tmp_path / name).mkdir()
    stacked = tmp_path / "stacked"
    subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o",
         f"lowerdir={source},upperdir={tmp_path}/upper,workdir={tmp_path}/work", str(stacked)],
        check=True, timeout=DEADLINE,
    )  # fmt: skip
    try:
        with mirror(stacked, root, "device") as server:
            fds = [os.open(root / "file", os.O_RDWR) for _ in range(2)]
            os.pwrite(fds[0], b"CONTENT", 0)
            assert os.pread(fds[1], 7, 0) == b"CONTENT"
            for fd in fds:
                os.close(fd)
            assert server.counters()["read"] > 0
            assert (source / "file").read_bytes()[:7] == b"content"
            assert (stacked / "file").read_bytes()[:7] == b"CONTENT"
    finally:
        subprocess.run(["umount", "-i", "-l", str(stacked)], check=True, timeout=DEADLINE)


def test_direct_handles(source: Path, root: Path) -> None:
    with mirror(source, root, "device", passthrough=False, writeback=False, io="direct") as server:
        fd = os.open(root / "file", os.O_RDWR)
        assert os.pread(fd, 7, 0) == b"content"
        with open(source / "file", "r+b") as file:
            file.write(b"CHANGED")
        assert os.pread(fd, 7, 0) == b"CHANGED"
        with mmap.mmap(fd, 0) as view:  # Linux >= 6.6: DIRECT_IO_ALLOW_MMAP
            view.close()
        os.close(fd)
        assert server.counters()["read"] >= 2


@pytest.mark.parametrize("asks", [False, True])
def test_flush(asks: bool, source: Path, root: Path) -> None:
    with mirror(source, root, "device", passthrough=False, flush=asks) as server:
        for _ in range(5):
            (root / "file").read_bytes()
        flushes = server.counters().get("flush", 0)
        assert flushes >= 5 if asks else flushes <= 1


@pytest.mark.parametrize("transport", ["device", "ring", "pyfuse3"])
def test_what_takes_long_stops_nobody(
    transport: str, source: Path, root: Path, tmp_path: Path
) -> None:
    """Two changes of mode wait at a gate; others are answered meanwhile, on each CPU."""
    gate = tmp_path / "gate"
    with mirror(source, root, transport, gate=str(gate)) as server:
        slow = [subprocess.Popen(["chmod", "0707", root / name]) for name in ("file", "directory")]
        wait_for(lambda: len(server.ask("calls")) >= 2, "the slow requests to have arrived")
        for cpu in sorted(os.sched_getaffinity(0)):
            done = subprocess.run(
                ["taskset", "-c", str(cpu), "stat", root, root / "file"],
                capture_output=True, timeout=DEADLINE,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        assert all(process.poll() is None for process in slow)
        gate.touch()
        for process in slow:
            assert process.wait(DEADLINE) == 0
        assert stat.S_IMODE(os.stat(source / "file").st_mode) == 0o707


@pytest.mark.parametrize("transport", ["device", "ring"])
def test_a_killed_caller_of_a_waiting_request(
    transport: str, source: Path, root: Path, tmp_path: Path
) -> None:
    """Its request is dropped before a worker takes it; one that a worker has goes on to its end."""
    gate = tmp_path / "gate"
    with mirror(source, root, transport, gate=str(gate), workers=1) as server:
        first = subprocess.Popen(["chmod", "0707", root / "file"])
        wait_for(lambda: len(server.ask("calls")) == 1, "the first request")
        second = subprocess.Popen(["chmod", "0707", root / "directory"])
        wait_for(lambda: server.ask("queued") == 1, "the second request")
        second.send_signal(signal.SIGKILL)
        assert second.wait(DEADLINE) == -signal.SIGKILL
        gate.touch()
        assert first.wait(DEADLINE) == 0
        # Were it still waiting it would be done before this.
        third = subprocess.Popen(["chmod", "0707", root / "file"])
        assert third.wait(DEADLINE) == 0
        assert stat.S_IMODE(os.stat(source / "directory").st_mode) != 0o707


@pytest.mark.parametrize("transport", ["device", "ring", "pyfuse3"])
@pytest.mark.parametrize("callers", [1, 2, 5, 16])
def test_many_callers(transport: str, callers: int, source: Path, root: Path) -> None:
    with mirror(source, root, transport, timeout=0.1) as server:
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                own = root / f"own-{number}"
                own.mkdir()
                for i in range(12):
                    path = own / str(i)
                    path.write_bytes(str(i).encode() * 1000)
                    assert path.read_bytes() == str(i).encode() * 1000
                    os.rename(path, own / "renamed")
                    assert os.stat(own / "renamed").st_size == 1000 * len(str(i))
                    assert "renamed" in os.listdir(own)
                    os.unlink(own / "renamed")
                own.rmdir()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
        assert not failures, failures
        assert server.counters()["mkdir"] == callers
        assert sorted(os.listdir(source)) == ["directory", "file"]


LOAD = (
    "import os, sys\n"
    "root = sys.argv[1]\n"
    "device = os.stat(root).st_dev\n"
    "print('begun', flush=True)\n"
    "try:\n"
    "    while os.stat(root).st_dev == device:\n"
    "        for name in os.listdir(root):\n"
    "            os.stat(os.path.join(root, name))\n"
    "        path = os.path.join(root, f'load-{os.getpid()}')\n"
    "        with open(path, 'wb') as file:\n"
    "            file.write(b'x' * 10000)\n"
    "        os.unlink(path)\n"
    "except OSError:\n"
    "    pass\n"
    "sys.exit(3)\n"
)


def load(root: Path, count: int) -> list[subprocess.Popen[str]]:
    """Processes that work on the mount until it is gone."""
    processes = [
        subprocess.Popen([sys.executable, "-c", LOAD, str(root)], stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
    return processes


def gone(processes: list[subprocess.Popen[str]]) -> None:
    """Each ended by an error of the mount, none hangs."""
    try:
        for process in processes:
            assert process.wait(DEADLINE) == 3
    finally:
        for process in processes:
            process.kill()
            assert process.stdout is not None
            process.stdout.close()


@pytest.mark.parametrize("transport", ["device", "ring", "pyfuse3"])
def test_sigkill_of_the_server(transport: str, source: Path, root: Path) -> None:
    """Callers get an error at once, and the mount can be taken away."""
    with mirror(source, root, transport) as server:
        callers = load(root, 3)
        wait_for(lambda: server.counters().get("getattr", 0) > 20, "some load")
        server.process.kill()
        assert server.process.wait(DEADLINE) == -signal.SIGKILL
        gone(callers)
        with pytest.raises(OSError) as caught:
            os.stat(root)
        assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
        assert is_mounted(root)


@pytest.mark.parametrize("transport", ["device", "ring", "pyfuse3"])
def test_stop_under_load(transport: str, source: Path, root: Path) -> None:
    """`stop()` gives the connection up by itself, though the mount is still there."""
    with mirror(source, root, transport) as server:
        callers = load(root, 3)
        wait_for(lambda: server.counters().get("getattr", 0) > 20, "some load")
        assert server.ask("connected") is True
        server.stop()
        server.ended()
        gone(callers)
        assert is_mounted(root)


@pytest.mark.parametrize("transport", ["device", "ring", "pyfuse3"])
def test_stop_when_idle(transport: str, source: Path, root: Path) -> None:
    with mirror(source, root, transport) as server:
        server.stop()
        server.ended()
        assert is_mounted(root)


@pytest.mark.parametrize("transport", ["device", "ring", "pyfuse3"])
def test_lazy_unmount_under_load(transport: str, source: Path, root: Path) -> None:
    """Who has a file open goes on; with the last of them the server ends."""
    with mirror(source, root, transport) as server:
        callers = load(root, 2)
        fd = os.open(root / "file", os.O_RDONLY)
        subprocess.run(["umount", "-i", "-l", str(root)], check=True, timeout=DEADLINE)
        assert not is_mounted(root)
        gone(callers)
        assert os.pread(fd, 7, 0) == b"content"
        assert server.process.poll() is None
        os.close(fd)
        server.ends()


@pytest.mark.parametrize("transport", ["device", "ring", "pyfuse3"])
def test_nothing_is_burnt_when_idle(transport: str, source: Path, root: Path) -> None:
    with mirror(source, root, transport) as server:
        os.stat(root)

        def ticks() -> int:
            words = Path(f"/proc/{server.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
            return int(words[11]) + int(words[12])

        before = ticks()
        time.sleep(1.5)  # what is measured is a span of time
        assert ticks() - before <= 2


@pytest.fixture
def homely(alice: object) -> Iterator[tuple[Path, Path]]:
    """A source and a root that are a user's, where that user may walk."""
    place = Path(tempfile.mkdtemp(dir=alice.home))  # type: ignore[attr-defined]
    try:
        for path in (place, place / "source", place / "root"):
            path.mkdir(exist_ok=True)
            os.chown(path, alice.uid, alice.gid)  # type: ignore[attr-defined]
        yield place / "source", place / "root"
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize("transport", ["device", "ring", "pyfuse3"])
def test_without_privileges_by_fusermount(
    transport: str, alice: object, homely: tuple[Path, Path]
) -> None:
    """fusermount3 mounts for a user, and hands the device over."""
    uid, gid = alice.uid, alice.gid  # type: ignore[attr-defined]
    source, root = homely
    command = ("setpriv", "--reuid", str(uid), "--regid", str(gid), "--clear-groups", "--")
    with mirror(source, root, transport, command=command, fusermount=True) as server:
        assert server.data_path == "writeback"
        done = subprocess.run(
            [*command, "sh", "-c", f"echo text > {root}/made && cat {root}/made"],
            capture_output=True, text=True, timeout=DEADLINE,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, "text\n"), done.stderr
        assert os.stat(source / "made").st_uid == uid


@pytest.mark.parametrize("transport", ["device", "ring", "pyfuse3"])
def test_in_a_user_namespace(transport: str, alice: object, homely: tuple[Path, Path]) -> None:
    """Root of a user namespace mounts by itself, without passthrough."""
    uid, gid = alice.uid, alice.gid  # type: ignore[attr-defined]
    source, root = homely
    user = ("setpriv", "--reuid", str(uid), "--regid", str(gid), "--clear-groups", "--")
    with mirror(source, root, transport, command=(*user, "unshare", "-Urm")) as server:
        assert server.data_path == "writeback"
        enter = [
            *user,
            "nsenter",
            "-t",
            str(server.process.pid),
            "-U",
            "-m",
            "--preserve-credentials",
        ]
        done = subprocess.run(
            [*enter, "sh", "-c",
             f"echo text > {root}/made && cat {root}/made && mkdir {root}/d && ls {root}"
             f" && umount {root}"],
            capture_output=True, text=True, timeout=DEADLINE,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, "text\nd\nmade\n"), done.stderr
        server.ends()
        assert os.stat(source / "made").st_uid == uid
