"""What changes or copies the content of an environment: reset, snapshot, rollback, export, import, rm.

An upper holds ids that only its owner's user namespace has names for. So each of these runs in a
child that is root of one (`rootless.in_user_namespace`), and there by descriptors, or below a root
of its own: what the upper holds can't lead it astray.
"""

from __future__ import annotations

import os
import secrets
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from typing import IO

from mount_helpers import syscalls
from sdee_launch.accounts import IdMaps, my_account
from sdee_launch.environments import (
    Environment,
    EnvironmentProblem,
    EnvironmentSettings,
    Store,
    begin_settings,
    check_name,
    lock,
)
from sdee_launch.rootless import in_user_namespace

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_COMPRESSORS = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}


def _as_root_of_it(work: Callable[[], dict[str, object] | None]) -> dict[str, object]:
    """Run `work` with the owner's ids. Raises EnvironmentProblem."""

    def inside(maps: IdMaps) -> dict[str, object]:
        return work() or {}

    answer = in_user_namespace(my_account(), inside, None)
    if "error" in answer:
        raise EnvironmentProblem(str(answer["error"]))
    return answer


def _tool(words: Sequence[str], directory: int, **more: object) -> None:
    """Run a program in an open directory. Raises OSError with what it said."""
    done = subprocess.run(
        list(words),
        stdin=more.get("stdin", subprocess.DEVNULL),  # type: ignore[call-overload]
        stdout=more.get("stdout", subprocess.DEVNULL),
        stderr=subprocess.PIPE,
        cwd=f"/proc/self/fd/{directory}",
        pass_fds=[directory],
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise OSError(f"{words[0]}: {said[-1] if said else f'exit {done.returncode}'}")


def _remove_tree(directory: int, name: str) -> None:
    _tool(["rm", "-rf", "--", f"./{name}"], directory)


def _work_directories(environment: Environment) -> list[str]:
    """Work directories may hold what only makes sense beside the upper that they were used with."""
    return [
        name for name in os.listdir(environment.fd) if name == "work" or name.startswith("work.")
    ]


def _fresh_work(environment: Environment) -> None:
    for name in _work_directories(environment):
        _remove_tree(environment.fd, name)
    os.mkdir("work", 0o700, dir_fd=environment.fd)


def split_path(path: str) -> list[str]:
    """The components of an absolute path inside. Raises EnvironmentProblem."""
    parts = [p for p in path.split("/") if p not in ("", ".")]
    if not path.startswith("/") or ".." in parts or not parts:
        raise EnvironmentProblem(f"{path}: an absolute path inside is expected, without ..")
    return parts


def reset(store: Store, environment: Environment, paths: Sequence[str] = ()) -> list[str]:
    """Forget all changes, or those of `paths`; gives the paths that had any.

    Raises EnvironmentProblem, OSError.
    """
    wanted = {path: split_path(path) for path in paths}

    def work() -> dict[str, object]:
        if not wanted:
            gone = f".gone-{secrets.token_hex(8)}"
            os.mkdir(gone, 0o755, dir_fd=environment.fd)
            os.chmod(gone, 0o755, dir_fd=environment.fd)
            syscalls.renameat2(
                environment.fd, gone, environment.fd, "upper", syscalls.RENAME_EXCHANGE
            )
            _remove_tree(environment.fd, gone)
            _fresh_work(environment)
            return {"reset": ["/"]}
        done = []
        for path, parts in wanted.items():
            if _forget(environment, parts):
                done.append(path)
        return {"reset": done}

    with lock(store, environment):
        answer = _as_root_of_it(work)
    found = answer.get("reset")
    return [str(p) for p in found] if isinstance(found, list) else []


def _forget(environment: Environment, parts: Sequence[str]) -> bool:
    """Remove what upper has of one path; whether it had anything."""
    fd = environment.directory("upper")
    try:
        for name in parts[:-1]:
            try:
                below = os.open(name, _DIRECTORY, dir_fd=fd)
            except OSError:
                return False
            os.close(fd)
            fd = below
        try:
            os.stat(parts[-1], dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        _remove_tree(fd, parts[-1])
        return True
    finally:
        os.close(fd)


def snapshot(environment: Environment, name: str | None = None) -> str:
    """Keep a copy of upper; gives its name. Raises EnvironmentProblem, OSError."""
    name = check_name(name or time.strftime("%Y%m%d-%H%M%S"), "a snapshot")

    def work() -> None:
        top = environment.directory("snapshots", create=0o700)
        new = f".new-{secrets.token_hex(8)}"
        try:
            if name in os.listdir(top):
                raise OSError(f"there is a snapshot {name} already")
            _copy_to(environment.fd, "upper", top, new)
            os.rename(new, name, src_dir_fd=top, dst_dir_fd=top)
        except BaseException:
            _remove_tree(top, new)
            raise
        finally:
            os.close(top)

    _as_root_of_it(work)
    return name


def _copy_to(source: int, source_name: str, target: int, target_name: str) -> None:
    done = subprocess.run(
        [
            "cp", "-a", "--reflink=auto", "--", f"/proc/self/fd/{source}/{source_name}",
            f"/proc/self/fd/{target}/{target_name}",
        ],
        capture_output=True, pass_fds=[source, target], check=False, stdin=subprocess.DEVNULL,
        env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise OSError(f"cp: {said[-1] if said else done.returncode}")


def snapshots(environment: Environment) -> list[str]:
    """The names of the snapshots, sorted."""
    try:
        top = environment.directory("snapshots")
    except OSError:
        return []
    try:
        return sorted(name for name in os.listdir(top) if not name.startswith("."))
    finally:
        os.close(top)


def rollback(store: Store, environment: Environment, name: str | None = None) -> str:
    """Make upper what it was at a snapshot (default: the last). Raises EnvironmentProblem."""
    known = snapshots(environment)
    if not known:
        raise EnvironmentProblem(f"{environment.name} has no snapshots")
    if name is None:
        name = max(known, key=lambda n: _changed(environment, n))
    if name not in known:
        raise EnvironmentProblem(f"{environment.name} has no snapshot {name}")
    chosen = name

    def work() -> None:
        top = environment.directory("snapshots")
        new = f".new-{secrets.token_hex(8)}"
        try:
            _copy_to(top, chosen, environment.fd, new)
            syscalls.renameat2(
                environment.fd, new, environment.fd, "upper", syscalls.RENAME_EXCHANGE
            )
            _fresh_work(environment)
        finally:
            _remove_tree(environment.fd, new)
            os.close(top)

    with lock(store, environment):
        _as_root_of_it(work)
    return chosen


def _changed(environment: Environment, name: str) -> float:
    return os.stat(f"snapshots/{name}", dir_fd=environment.fd, follow_symlinks=False).st_ctime


def drop_snapshot(environment: Environment, name: str) -> None:
    """Remove a snapshot. Raises EnvironmentProblem."""
    if name not in snapshots(environment):
        raise EnvironmentProblem(f"{environment.name} has no snapshot {name}")

    def work() -> None:
        top = environment.directory("snapshots")
        try:
            _remove_tree(top, name)
        finally:
            os.close(top)

    _as_root_of_it(work)


def remove(store: Store, environment: Environment) -> None:
    """Remove an environment that isn't alive. Raises EnvironmentProblem, OSError."""
    gone = f".gone-{secrets.token_hex(8)}"
    with lock(store, environment):
        os.rename(environment.name, gone, src_dir_fd=store.fd, dst_dir_fd=store.fd)
    # Without the lock: NFS keeps what is open by another name, and its directory isn't empty then.
    _as_root_of_it(lambda: _remove_tree(store.fd, gone))


def _compressor(path: str) -> list[str]:
    suffix = os.path.splitext(path)[1]
    return ["-I", _COMPRESSORS[suffix]] if suffix in _COMPRESSORS else []


def export(environment: Environment, path: str) -> None:
    """Write upper into a tar archive (- for standard output), compressed by its suffix.

    Raises EnvironmentProblem, OSError.
    """
    out = sys.stdout.fileno() if path == "-" else os.open(
        path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
    )  # fmt: skip

    def work() -> None:
        upper = environment.directory("upper")
        _tool(
            [
                "tar", "--create", "--format=posix", "--numeric-owner", "--sparse", "--xattrs",
                "--xattrs-include=user.*", "--xattrs-include=security.capability",
                *_compressor(path), "--file=-", ".",
            ],
            upper,
            stdout=out,
        )  # fmt: skip

    try:
        _as_root_of_it(work)
    finally:
        if path != "-":
            os.close(out)


def import_(store: Store, name: str, path: str) -> None:
    """Make an environment of what `export` wrote, whole or not at all.

    Raises EnvironmentProblem, OSError.
    """
    check_name(name)
    if name in store.names():
        raise EnvironmentProblem(f"there is an environment {name} already")
    source = sys.stdin.fileno() if path == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with store.new_directory() as (new, fd):
        os.mkdir("upper", 0o755, dir_fd=fd)
        for other in ("work", "private", "snapshots"):
            os.mkdir(other, 0o700, dir_fd=fd)
        begin_settings(fd, EnvironmentSettings())
        try:
            _as_root_of_it(lambda: _unpack(source, path, fd))
            store.put(new, name)
        except FileExistsError:
            raise EnvironmentProblem(f"there is an environment {name} already") from None
        except BaseException:
            _as_root_of_it(lambda: _remove_tree(fd, "upper"))
            raise
        finally:
            if path != "-":
                os.close(source)


def _unpack(source: int, path: str, fd: int) -> None:
    """In the child: read the archive with `upper` as the root of this process."""
    words = _compressor(path)
    stream: IO[bytes] = os.fdopen(os.dup(source), "rb")
    if words:
        program = subprocess.Popen([words[1], "-dc"], stdin=stream, stdout=subprocess.PIPE)
        assert program.stdout is not None
        stream = program.stdout
    upper = os.open("upper", _DIRECTORY, dir_fd=fd)
    os.chdir(upper)
    os.chroot(".")
    os.close(upper)
    os.umask(0)
    try:
        with tarfile.open(fileobj=stream, mode="r|", errorlevel=2) as archive:
            later: list[tarfile.TarInfo] = []
            for member in archive:
                _unpack_one(archive, member)
                if member.isdir():
                    later.append(member)
            for member in reversed(later):
                os.utime(_plain(member.name), (member.mtime, member.mtime))
    except tarfile.TarError as error:
        raise OSError(f"{path}: no archive of an environment: {error}") from None


def _plain(name: str) -> str:
    """A path below the new root: neither absolute nor with .. after this."""
    parts = [p for p in name.split("/") if p not in ("", ".")]
    if ".." in parts:
        raise OSError(f"{name}: leads out of the environment")
    return "./" + "/".join(parts)


def _unpack_one(archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    path = _plain(member.name)
    mode = stat.S_IMODE(member.mode)
    parent = os.path.dirname(path)
    if os.path.realpath(parent) != os.path.normpath(os.path.join("/", parent)):
        raise OSError(f"{member.name}: through a link")
    if member.isdir():
        os.makedirs(path, exist_ok=True)
    elif member.issym():
        os.symlink(member.linkname, path)
        os.chown(path, member.uid, member.gid, follow_symlinks=False)
        return
    elif member.islnk():
        os.link(_plain(member.linkname), path, follow_symlinks=False)
        return
    elif member.ischr():
        if (member.devmajor, member.devminor) != (0, 0):
            raise OSError(f"{member.name}: a device")
        os.mknod(path, stat.S_IFCHR | mode, os.makedev(0, 0))
    elif member.isfifo():
        os.mkfifo(path, mode)
    elif member.isreg():
        source = archive.extractfile(member)
        assert source is not None
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            while data := source.read(1 << 20):
                # Holes stay holes.
                if data.count(0) == len(data):
                    file.seek(len(data), os.SEEK_CUR)
                else:
                    file.write(data)
            file.truncate()
    else:
        raise OSError(f"{member.name}: of a kind that no upper has")
    os.chown(path, member.uid, member.gid)
    os.chmod(path, mode)
    for key, value in member.pax_headers.items():
        name = key.removeprefix("SCHILY.xattr.")
        if name != key and (name.startswith("user.") or name == "security.capability"):
            os.setxattr(path, name, value.encode("utf-8", "surrogateescape"))
    os.utime(path, (member.mtime, member.mtime))


def size_of(environment: Environment) -> tuple[int, int]:
    """(objects, bytes on disk) of upper."""

    def work() -> dict[str, object]:
        objects = used = 0
        for _, directories, files, fd in os.fwalk("upper", dir_fd=environment.fd):
            for name in (*directories, *files):
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                objects += 1
                used += status.st_blocks * 512
        return {"objects": objects, "bytes": used}

    answer = _as_root_of_it(work)
    return int(str(answer["objects"])), int(str(answer["bytes"]))


def differences(environment: Environment, as_json: bool) -> str:
    """What upper changes of the host, one line for each object (or a JSON list)."""

    def work() -> dict[str, object]:
        import json

        from sdeefs.diff import differences as compare
        from sdeefs.diff_command import line

        top = environment.directory("upper")
        try:
            found = list(compare(f"/proc/self/fd/{top}".encode(), [b"/"], owners=False))
        finally:
            os.close(top)
        if as_json:
            text = json.dumps([d.as_json() for d in found])
        else:
            text = "".join(line(d).decode("utf-8", "surrogateescape") + "\n" for d in found)
        return {"text": text}

    return str(_as_root_of_it(work)["text"])
