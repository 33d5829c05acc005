"""Mounts for the tests: layers on any filesystem, merged by sdeefs (each transport and data path)
or by kernel overlayfs, and everything taken away again, whatever state it is in."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from mount_helpers.mountinfo import mount_at, read_mounts

#: How long any wait for a condition may take: the machine may be busy with other work.
DEADLINE = 60.0

#: Users of the tests that need no account: (uid, gid, supplementary groups).
ROOT = (0, 0, (0,))
ALICE = (60001, 60001, (60001,))
BOB = (60002, 60002, (60002, 60003))

#: Lines that a healthy server may write.
EXPECTED_LOG = re.compile(r"^\s*$")


@dataclass(frozen=True)
class Engine:
    """One way to serve merged."""

    name: str
    kind: str  # "plain" (a directory, no union), "kernel" or "sdeefs"
    options: tuple[str, ...] = ()
    lacks: frozenset[str] = frozenset()  # what its protocol has no word for

    def with_options(self, *options: str) -> Engine:
        """The same with more mount options."""
        return replace(
            self, name="-".join([self.name, *options]), options=(*self.options, *options)
        )


_PYFUSE3_LACKS = frozenset({"tmpfile", "fallocate", "seek", "umask", "birth"})

PLAIN = Engine("ext4", "plain")
KERNEL = Engine("overlay", "kernel", ("redirect_dir=on", "index=on", "xino=on"))
RING = Engine("ring", "sdeefs", ("transport=ring",))
PASSTHROUGH = Engine("passthrough", "sdeefs", ("transport=device", "passthrough=on"))
WRITEBACK = Engine(
    "writeback", "sdeefs", ("transport=device", "passthrough=off", "writeback=on"),
    frozenset({"seek"}),  # the kernel doesn't write back before it asks for holes
)  # fmt: skip
DEVICE_PLAIN = Engine(
    "plain", "sdeefs", ("transport=device", "passthrough=off", "writeback=off", "shortcuts=off")
)  # fmt: skip
PYFUSE3 = Engine("pyfuse3", "sdeefs", ("transport=pyfuse3",), _PYFUSE3_LACKS)
SDEEFS = (RING, PASSTHROUGH, WRITEBACK, DEVICE_PLAIN, PYFUSE3)
#: SDEE_FSLAB_ENGINES=ring,overlay limits a run by hand to these.
CHOSEN = os.environ.get("SDEE_FSLAB_ENGINES")


def chosen(*engines: Engine) -> list[Engine]:
    """The engines of this run."""
    if not CHOSEN:
        return list(engines)
    return [engine for engine in engines if engine.name in CHOSEN.split(",")]


def wait_for(
    condition: Callable[[], bool], what: str, alive: Callable[[], None] | None = None
) -> None:
    """Wait until it holds; `alive` raises when there is nothing more to wait for."""
    deadline = time.monotonic() + DEADLINE
    pause = 0.002
    while not condition():
        if alive is not None:
            alive()
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {DEADLINE:.0f} s for: {what}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)


def run(*command: str | bytes | Path, timeout: float = 120, **kwargs: object) -> str:
    """Run a command that must succeed; its output."""
    done = subprocess.run(command, timeout=timeout, check=False, capture_output=True, **kwargs)  # type: ignore[call-overload]
    if done.returncode:
        raise AssertionError(
            f"{command}: exit {done.returncode}\n{done.stdout.decode()}{done.stderr.decode()}"
        )
    return str(done.stdout.decode(errors="surrogateescape"))


def detach(point: Path) -> None:
    """Take away what is mounted there, lazily, without touching it."""
    for _ in range(4):
        if mount_at(os.fsencode(point)) is None:
            return
        subprocess.run(
            ["umount", "-i", "-l", str(point)], timeout=60, check=False, capture_output=True
        )


@dataclass
class Layers:
    """The directories of one union."""

    base: Path
    upper: Path | None
    lowers: tuple[Path, ...]
    work: Path | None
    merged: Path

    @classmethod
    def make(cls, base: Path, lowers: tuple[Path, ...] | None = None, name: str = "") -> Layers:
        """Make upper, work and merged below base (and a lower, unless there are)."""
        base.mkdir(parents=True, exist_ok=True)
        if lowers is None:
            lowers = (base / "lower",)
            lowers[0].mkdir(exist_ok=True)
        made = cls(
            base, base / f"{name}upper", lowers, base / f"{name}work", base / f"{name}merged"
        )
        for path in (made.upper, made.work, made.merged):
            assert path is not None
            path.mkdir(exist_ok=True)
        return made


@dataclass
class Mounted:
    """A live merged mount. `close()` unmounts it and checks that the server ended well."""

    engine: Engine
    layers: Layers
    server: subprocess.Popen[bytes] | None = None
    log: Path | None = None
    closed: bool = False
    expected_log: re.Pattern[str] = field(default=EXPECTED_LOG)

    @property
    def point(self) -> Path:
        return self.layers.merged

    def alive(self) -> None:
        """Raise when the server has ended."""
        if self.server is not None and self.server.poll() is not None:
            text = self.log.read_text(errors="replace") if self.log else ""
            raise AssertionError(f"the server ended with {self.server.returncode}: {text}")

    def kill(self) -> None:
        """SIGKILL the server and take the dead mount away."""
        assert self.server is not None
        self.server.kill()
        self.server.wait(timeout=DEADLINE)
        self.closed = True
        detach(self.point)

    def close(self) -> None:
        """Unmount. Raises AssertionError when the server complained or ended badly."""
        if self.closed or self.engine.kind == "plain":
            return
        self.closed = True
        unmounted = self._unmount()
        problem = ""
        if self.server is not None:
            status = self._end(unmounted)
            if status:
                problem = f"server ended with {status}"
        if not unmounted:
            problem = f"umount failed (busy or hung); {problem}"
            detach(self.point)
        lines = self.log_lines()
        if problem or lines:
            raise AssertionError("\n".join([f"{self.engine.name}: {problem}", *lines]))

    def _end(self, unmounted: bool) -> int:
        """The exit status of the server. A copy of the mount in a mount namespace that somebody
        else made keeps it alive; then it is asked to end."""
        assert self.server is not None
        try:
            return self.server.wait(timeout=15 if unmounted else 1)
        except subprocess.TimeoutExpired:
            self.server.terminate()
        try:
            return self.server.wait(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            self.server.kill()
            self.server.wait(timeout=DEADLINE)
            return -99

    def _unmount(self) -> bool:
        deadline = time.monotonic() + DEADLINE
        while True:
            try:
                done = subprocess.run(
                    ["umount", "-i", str(self.point)],
                    timeout=DEADLINE, check=False, capture_output=True,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return False
            if done.returncode == 0 or mount_at(os.fsencode(self.point)) is None:
                return True
            if b"busy" not in done.stderr or time.monotonic() > deadline:
                return False
            time.sleep(0.05)

    def log_lines(self) -> list[str]:
        """What the server wrote and should not have."""
        if self.log is None or not self.log.exists():
            return []
        text = self.log.read_text(errors="replace")
        return [line for line in text.splitlines() if not self.expected_log.match(line)]


def mount(
    engine: Engine, layers: Layers, *more: str, log: re.Pattern[str] | None = None
) -> Mounted:
    """Mount; returns when merged is usable. Raises AssertionError with the reason if it isn't."""
    if engine.kind == "plain":
        return Mounted(engine, replace(layers, merged=layers.base / "plain"))
    options = [f"lowerdir={':'.join(map(str, layers.lowers))}"]
    if layers.upper is not None:
        options += [f"upperdir={layers.upper}", f"workdir={layers.work}"]
    options += [*engine.options, *more]
    if engine.kind == "kernel":
        _mount_overlay(",".join(options), layers.merged)
        return Mounted(engine, layers)
    log_path = layers.base / f"{layers.merged.name}.log"
    with log_path.open("wb") as output:
        server = subprocess.Popen(
            server_command(layers, options),
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    mounted = Mounted(engine, layers, server, log_path, expected_log=log or EXPECTED_LOG)
    point = os.fsencode(layers.merged)
    try:
        wait_for(lambda: mount_at(point) is not None, f"mount on {layers.merged}", mounted.alive)
        # The first request is answered only by a server that has started to serve.
        os.stat(layers.merged)
    except BaseException:
        server.kill()
        server.wait(timeout=DEADLINE)
        detach(layers.merged)
        raise
    return mounted


def _mount_overlay(options: str, merged: Path) -> None:
    """Kernel overlayfs. A copy of an earlier mount may live for a moment in a mount namespace that
    somebody just made; then upper is still busy."""
    deadline = time.monotonic() + DEADLINE
    while True:
        done = subprocess.run(
            ["mount", "-i", "-t", "overlay", "overlay", "-o", options, str(merged)],
            timeout=DEADLINE, check=False, capture_output=True,
        )  # fmt: skip
        if not done.returncode:
            return
        busy = b"busy" in done.stderr or b"already mounted" in done.stderr
        if not busy or time.monotonic() > deadline:
            raise AssertionError(f"mount -o {options}: {done.stderr.decode()}")
        time.sleep(0.05)


def server_command(layers: Layers, options: list[str]) -> list[str]:
    """The command line that serves these layers in the foreground."""
    words = [sys.executable, "-m", "sdeefs", "mount", "--foreground"]
    return [*words, "-o", ",".join(options), str(layers.merged)]


@contextlib.contextmanager
def mounted(
    engine: Engine, layers: Layers, *more: str, log: re.Pattern[str] | None = None
) -> Iterator[Mounted]:
    """`mount`, and `close` at the end."""
    live = mount(engine, layers, *more, log=log)
    try:
        yield live
    except BaseException:
        with contextlib.suppress(AssertionError):
            live.close()
        raise
    live.close()


# -- filesystems for layers ---------------------------------------------------------------------

_MAKERS = {
    "ext4": (["mkfs.ext4", "-q", "-E", "lazy_itable_init=1,nodiscard"], "300M", []),
    "xfs": (["mkfs.xfs", "-q", "-K", "-m", "reflink=1"], "320M", []),
    "btrfs": (["mkfs.btrfs", "-q", "-K"], "300M", []),
}


@contextlib.contextmanager
def filesystem(kind: str, directory: Path, size: str | None = None) -> Iterator[Path]:
    """A fresh filesystem mounted below directory: tmpfs, ramfs (no xattrs), ext4, xfs, btrfs,
    restricted (no xattrs, device nodes or rename flags)."""
    if kind == "restricted":
        with restricted_filesystem(directory) as point:
            yield point
        return
    point = directory / f"{kind}-fs"
    point.mkdir(parents=True, exist_ok=True)
    if kind in ("tmpfs", "ramfs"):
        options = ["-o", f"size={size or '1g'},mode=755"] if kind == "tmpfs" else ["-o", "mode=755"]
        run("mount", "-t", kind, *options, kind, point)
    else:
        maker, default_size, options = _MAKERS[kind]
        image = directory / f"{kind}.img"
        run("truncate", "-s", size or default_size, image)
        run(*maker, image)
        run("mount", "-o", ",".join(["loop", *options]), image, point)
    try:
        yield point
    finally:
        unmount_filesystem(point)
        with contextlib.suppress(FileNotFoundError):
            (directory / f"{kind}.img").unlink()


@contextlib.contextmanager
def restricted_filesystem(directory: Path) -> Iterator[Path]:
    """A filesystem without xattrs, device nodes and rename flags: restricted_fs.py."""
    source, point = directory / "restricted-source", directory / "restricted-fs"
    source.mkdir()
    point.mkdir()
    program = Path(__file__).with_name("restricted_fs.py")
    server = subprocess.Popen([sys.executable, str(program), str(source), str(point)])
    try:
        wait_for(
            lambda: mount_at(os.fsencode(point)) is not None or server.poll() is not None,
            "the restricted filesystem",
        )
        yield point
    finally:
        unmount_filesystem(point)
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(timeout=DEADLINE)


def unmount_filesystem(point: Path) -> None:
    """Unmount a filesystem of layers; lazily when something still holds it."""
    done = subprocess.run(
        ["umount", "-i", str(point)], timeout=60, check=False, capture_output=True
    )
    if done.returncode:
        detach(point)


@contextlib.contextmanager
def image_of(kind: str, tree: Path, directory: Path) -> Iterator[Path]:
    """A tree as a read-only squashfs or erofs image, mounted."""
    image, point = directory / f"{tree.name}.{kind}", directory / f"{tree.name}-{kind}"
    point.mkdir()
    if kind == "squashfs":
        run("mksquashfs", tree, image, "-quiet", "-no-progress", "-comp", "gzip", "-xattrs")
    else:
        run("mkfs.erofs", "--quiet", image, tree)
    run("mount", "-o", "loop,ro", "-t", kind, image, point)
    try:
        yield point
    finally:
        unmount_filesystem(point)
        image.unlink()


# -- acting as somebody else --------------------------------------------------------------------


@contextlib.contextmanager
def acting_as(who: tuple[int, int, tuple[int, ...]], umask: int | None = None) -> Iterator[None]:
    """Make the calls of the block as this user, without its privileges (effective ids)."""
    uid, gid, groups = who
    old_groups, old_umask = os.getgroups(), None
    try:
        if uid or gid:
            os.setgroups(groups)
            os.setegid(gid)
            os.seteuid(uid)
        if umask is not None:
            old_umask = os.umask(umask)
        yield
    finally:
        if old_umask is not None:
            os.umask(old_umask)
        if uid or gid:
            os.seteuid(0)
            os.setegid(0)
            os.setgroups(old_groups)


def in_child(function: Callable[[], object], who: tuple[int, int, tuple[int, ...]] = ROOT) -> int:
    """Run a function in a forked process, as this user in all its ids. Returns the process's pid;
    it exits with 0, or with the errno of the OSError that the function raised."""
    pid = os.fork()
    if pid:
        return pid
    status = 255
    try:
        uid, gid, groups = who
        if uid or gid:
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        function()
        status = 0
    except OSError as error:
        status = error.errno or 254
    finally:
        os._exit(status)


def child_result(pid: int) -> int:
    """Wait for a child of `in_child`; 0 or the errno. Kills it at the deadline."""
    deadline = time.monotonic() + DEADLINE
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError("a child of the test hangs")
        time.sleep(0.002)


def error_of(function: Callable[..., object], *arguments: object, **keywords: object) -> str:
    """The name of the errno that a call fails with, or "ok"."""
    try:
        result = function(*arguments, **keywords)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return "EOPNOTSUPP"
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    if isinstance(result, int) and not isinstance(result, bool) and result > 2:
        with contextlib.suppress(OSError):  # a descriptor of os.open
            if function is os.open:
                os.close(result)
    return "ok"


@contextlib.contextmanager
def workspace(name: str, parent: Path = Path("/var/tmp")) -> Iterator[Path]:
    """A directory that every user may search, removed at the end with what is mounted below."""
    directory = Path(tempfile.mkdtemp(prefix=f"sdee-fslab-{name}-", dir=parent))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        remove_tree(directory)


def remove_tree(path: Path) -> None:
    """rm -rf, when nothing is mounted below."""
    prefix = os.fsencode(path) + b"/"
    for mount_ in reversed(read_mounts()):
        if mount_.point.startswith(prefix):
            detach(Path(os.fsdecode(mount_.point)))
    shutil.rmtree(path, ignore_errors=True)
