"""Environments on disk: named directories of a user's, mode 0700, reached by descriptors.

    STORE/NAME/upper       what the user changed: the upper of /, and below it of /usr, /var …
    STORE/NAME/work*       work directories of overlayfs, one for each lower
    STORE/NAME/private/    what is shown as /root and, beside the user's own home, as /home
    STORE/NAME/snapshots/  copies of upper, by name
    STORE/NAME/settings    JSON
    STORE/NAME/lock        flock(2): held by the init of the live instance
    STORE/NAME/instance    JSON: the live instance, if it was made without a daemon

Everything here acts with the rights of the effective user, who is the owner: in the daemon's
processes, too. A name is one component, and no link is followed below the store.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from mount_helpers import syscalls
from sdee_launch.accounts import Account
from sdee_launch.config import Settings
from sdee_launch.plan import Plan, Private

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_FILE = 1 << 20


#: To who is inside of one.
FROM_OUTSIDE = "this looks at environments from outside: leave this one first (ssh HOST @host is a plain login)"


class EnvironmentProblem(Exception):
    """What can't be done with an environment, and why, in one line."""


class NoSuchEnvironment(EnvironmentProblem):
    """There is none of this name."""


class Denied(EnvironmentProblem):
    """These rights don't reach it. Those of its owner may, where not even root is let in."""


class Busy(EnvironmentProblem):
    """It is alive, or something is being done with it."""


@dataclass(frozen=True)
class EnvironmentSettings:
    """What its owner chose for one environment."""

    engine: str = "auto"
    volatile: bool | None = None
    binds: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    created: float = 0.0
    format: int = FORMAT


class _Directory:
    """An open directory, `fd`, and where it was found. A context manager that closes it."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the descriptor back."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Environment(_Directory):
    """An open environment."""

    def __init__(self, name: str, fd: int, path: str, settings: EnvironmentSettings) -> None:
        super().__init__(path, fd)
        self.name = name
        self.settings = settings

    def directory(self, *names: str | bytes, create: int | None = None) -> int:
        """A descriptor of a directory below, no link followed; the caller's. Raises OSError.

        `create`: the mode with which missing ones are made.
        """
        fd = os.dup(self.fd)
        try:
            for name in names:
                try:
                    below = os.open(name, _DIRECTORY, dir_fd=fd)
                except FileNotFoundError:
                    if create is None:
                        raise
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, create, dir_fd=fd)
                    below = os.open(name, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
        except BaseException:
            os.close(fd)
            raise
        return fd

    def open_private(self, plan: Plan) -> dict[str, int]:
        """The private directories that a plan shows, by name; the caller's. Raises OSError."""
        found: dict[str, int] = {}
        for step in plan.steps:
            if isinstance(step, Private):
                top = self.directory("private", create=0o700)
                try:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(step.name, step.mode, dir_fd=top)
                    found[step.name] = os.open(step.name, _DIRECTORY, dir_fd=top)
                finally:
                    os.close(top)
        return found

    def read_record(self) -> dict[str, object] | None:
        """What is written of the live instance; it may be of one that is gone."""
        value = _read_json(self.fd, "instance")
        return value if isinstance(value, dict) else None

    def write_record(self, record: Mapping[str, object]) -> None:
        """Write what others need to join the instance. Raises OSError."""
        _write(self.fd, "instance", json.dumps(record).encode())

    def remove_record(self) -> None:
        """The instance is gone."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink("instance", dir_fd=self.fd)


class Store(_Directory):
    """The directory of a user's environments."""

    def names(self) -> list[str]:
        """The names of the environments, sorted."""
        found = []
        for name in os.listdir(self.fd):
            if valid_name(name):
                with contextlib.suppress(OSError):
                    mode = os.stat(f"{name}/upper", dir_fd=self.fd, follow_symlinks=False).st_mode
                    if stat.S_ISDIR(mode):
                        found.append(name)
        return sorted(found)

    def open(self, name: str, create: bool = False) -> Environment:
        """Open an environment; with `create` it is made if there is none, race-free.

        Raises NoSuchEnvironment, EnvironmentProblem, OSError.
        """
        check_name(name)
        while True:
            try:
                fd = os.open(name, _DIRECTORY, dir_fd=self.fd)
            except FileNotFoundError:
                if not create:
                    raise NoSuchEnvironment(
                        f"there is no environment {name} in {self.path}"
                    ) from None
                self.create(name, exist_ok=True)
                continue
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise EnvironmentProblem(f"{self.path}/{name} is no directory") from None
                raise
            try:
                return Environment(name, fd, f"{self.path}/{name}", self._settings(fd, name))
            except BaseException:
                os.close(fd)
                raise

    def _settings(self, fd: int, name: str) -> EnvironmentSettings:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid():
            raise EnvironmentProblem(f"{self.path}/{name} belongs to uid {status.st_uid}")
        if stat.S_IMODE(status.st_mode) != 0o700:
            os.fchmod(fd, 0o700)
        return _settings_from(_read_json(fd, "settings"), f"{self.path}/{name}/settings")

    def create(
        self, name: str, settings: EnvironmentSettings | None = None, exist_ok: bool = False
    ) -> None:
        """Make an empty environment, whole or not at all. Raises EnvironmentProblem, OSError."""
        check_name(name)
        with self.new_directory() as (temporary, fd):
            for directory, mode in (
                ("upper", 0o755), ("work", 0o700), ("private", 0o700), ("snapshots", 0o700),
                ("private/root", 0o700), ("private/home", 0o755),
            ):  # fmt: skip
                os.mkdir(directory, mode, dir_fd=fd)
                os.chmod(directory, mode, dir_fd=fd)  # whatever the umask is
            begin_settings(fd, settings or EnvironmentSettings())
            try:
                self.put(temporary, name)
            except FileExistsError:
                if not exist_ok:
                    raise EnvironmentProblem(f"there is an environment {name} already") from None

    @contextlib.contextmanager
    def new_directory(self) -> Iterator[tuple[str, int]]:
        """(name, descriptor) of a new directory in the store; removed, unless it was moved away."""
        name = f".new-{secrets.token_hex(8)}"
        os.mkdir(name, 0o700, dir_fd=self.fd)
        os.chmod(name, 0o700, dir_fd=self.fd)
        fd = os.open(name, _DIRECTORY, dir_fd=self.fd)
        try:
            yield name, fd
        finally:
            os.close(fd)
            _remove_small(self.fd, name)

    def put(self, temporary: str, name: str) -> None:
        """Give a new directory its name. Raises FileExistsError, OSError."""
        _rename_new(self.fd, temporary, name)

    def rename(self, old: str, new: str) -> None:
        """Rename an environment that isn't alive. Raises EnvironmentProblem, OSError."""
        check_name(new)
        with self.open(old) as environment, lock(self, environment):
            try:
                _rename_new(self.fd, old, new)
            except FileExistsError:
                raise EnvironmentProblem(f"there is an environment {new} already") from None

    def current(self, environment: Environment) -> bool:
        """Whether the open environment still has its name."""
        try:
            now = os.stat(environment.name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        own = os.fstat(environment.fd)
        return (now.st_dev, now.st_ino) == (own.st_dev, own.st_ino)


def valid_name(name: object) -> bool:
    """Whether this may be the name of an environment."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def name_problem(name: object, what: str = "an environment") -> str:
    """One line: what is wrong with a name that isn't valid, and which names are."""
    text = str(name)
    foreign = re.search(r"[^A-Za-z0-9._+-]", text)
    if not text:
        wrong = "it is empty"
    elif foreign is not None:
        wrong = f"{foreign[0]!r} can't be in it"
    elif len(text) > 64:
        wrong = f"it has {len(text)} characters"
    else:
        wrong = f"it begins with {text[0]!r}"
    return (
        f"{text[:80]!r} is no name of {what}: {wrong}; allowed are letters, digits and ._+- (at "
        "most 64, the first a letter or digit)"
    )


def check_name(name: object, what: str = "an environment") -> str:
    """The name, if it may be one. Raises EnvironmentProblem."""
    if not isinstance(name, str) or not valid_name(name):
        raise EnvironmentProblem(name_problem(name, what))
    return name


def store_path(account: Account, settings: Settings) -> str:
    """Where this user's environments are."""
    return settings.store.format(home=account.home.rstrip("/"), user=account.name, uid=account.uid)


def open_store(account: Account, settings: Settings) -> Store:
    """Open the store, made if there is none. Raises EnvironmentProblem, OSError."""
    path = store_path(account, settings)
    if not os.path.isabs(path):
        raise EnvironmentProblem(f"the store of environments {path!r} is no absolute path")
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        problem = Denied if isinstance(error, PermissionError) else EnvironmentProblem
        raise problem(
            f"{path}: {error.strerror}; environments are kept there ([environments] store in "
            "/etc/sdee/sdee.toml)"
        ) from None
    return Store(path, fd)


def try_lock(environment: Environment) -> int | None:
    """The lock, held as long as the descriptor and its copies are open; None if another has it.

    Raises OSError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open("lock", flags, 0o600, dir_fd=environment.fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd


def busy(name: str) -> Busy:
    """The error for an environment that can't be changed now."""
    return Busy(f"{name} is alive or being changed; end it first (sdee kill {name})")


@contextlib.contextmanager
def lock(store: Store, environment: Environment, seconds: float = 5.0) -> Iterator[None]:
    """Keep instances and other changes away. Raises Busy, NoSuchEnvironment."""
    deadline = time.monotonic() + seconds
    while True:
        fd = try_lock(environment)
        if fd is not None:
            break
        if time.monotonic() > deadline:
            raise busy(environment.name)
        time.sleep(0.02)
    try:
        if not store.current(environment):
            raise NoSuchEnvironment(f"{environment.name} was removed meanwhile")
        yield
    finally:
        os.close(fd)


def _settings_from(value: object, path: str) -> EnvironmentSettings:
    """Settings as they were written; the file is the user's, so trust nothing in it."""
    if not isinstance(value, dict):
        return EnvironmentSettings()
    made = EnvironmentSettings()
    if value.get("format", FORMAT) != FORMAT:
        raise EnvironmentProblem(f"{path}: of format {value.get('format')}, a newer SDEE made it")
    if value.get("engine") in ("auto", "kernel", "fuse"):
        made = replace(made, engine=value["engine"])
    if isinstance(value.get("volatile"), bool):
        made = replace(made, volatile=value["volatile"])
    for key in ("binds", "exclude"):
        words = value.get(key)
        if isinstance(words, list) and all(isinstance(w, str) for w in words):
            made = replace(made, **{key: tuple(words)})  # type: ignore[arg-type]
    if isinstance(value.get("created"), int | float):
        made = replace(made, created=float(value["created"]))
    return made


def begin_settings(fd: int, settings: EnvironmentSettings) -> None:
    """The settings of an environment that is being made, from now on. Raises OSError."""
    settings = replace(settings, created=time.time())
    _write(fd, "settings", json.dumps(asdict(settings)).encode())


def write_settings(environment: Environment, settings: EnvironmentSettings) -> None:
    """Keep new settings. Raises OSError."""
    _write(environment.fd, "settings", json.dumps(asdict(settings)).encode())
    environment.settings = settings


def _read_json(dirfd: int, name: str) -> object:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=dirfd)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        return json.loads(os.read(fd, _MAX_FILE))
    except (OSError, ValueError, RecursionError):
        return None
    finally:
        os.close(fd)


def _write(dirfd: int, name: str, data: bytes) -> None:
    new = f".{name}-{secrets.token_hex(6)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(new, flags, 0o600, dir_fd=dirfd)
    try:
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
        os.rename(new, name, src_dir_fd=dirfd, dst_dir_fd=dirfd)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new, dir_fd=dirfd)
        raise


def _rename_new(dirfd: int, old: str, new: str) -> None:
    """rename(2) that replaces nothing."""
    try:
        syscalls.renameat2(dirfd, old, dirfd, new, syscalls.RENAME_NOREPLACE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # NFS has no RENAME_NOREPLACE; a directory with something in it isn't replaced either way.
        try:
            os.rename(old, new, src_dir_fd=dirfd, dst_dir_fd=dirfd)
        except OSError as failed:
            if failed.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new) from None
            raise


def _remove_small(dirfd: int, name: str) -> None:
    """Remove a directory of ours that holds plain files and directories, if it is there."""
    try:
        fd = os.open(name, _DIRECTORY, dir_fd=dirfd)
    except OSError:
        return
    try:
        for entry in os.listdir(fd):
            try:
                os.unlink(entry, dir_fd=fd)
            except OSError:
                _remove_small(fd, entry)
        with contextlib.suppress(OSError):
            os.rmdir(name, dir_fd=dirfd)
    finally:
        os.close(fd)
