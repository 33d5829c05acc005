"""What the site (/etc/sdee/sdee.toml) and its users (~/.config/sdee/sdee.toml) want of SDEE.

`SCHEMA` names every section and key with the type of its value; a wrong one is refused by name.
Users may set what `USER_KEYS` lists, and only where the site's `[users] may` has it.
"""

from __future__ import annotations

import functools
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from sdee_launch import privileges

SITE_FILE = "/etc/sdee/sdee.toml"
USER_FILE = ".config/sdee/sdee.toml"
ENGINES = ("auto", "kernel", "fuse")
NAMESPACES = ("uts", "ipc")

#: Filesystems that other machines serve, or that many nodes share: bound as they are.
SHARED_TYPES = (
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "beegfs_nodev", "ceph", "cifs", "smb3", "afs",
    "9p", "glusterfs", "fuse.glusterfs", "fuse.sshfs", "fuse.ceph", "fuse.ceph-fuse", "pvfs2",
    "orangefs", "panfs", "wekafs", "vastnfs", "daos", "fuse.dfuse", "fuse.juicefs", "ocfs2", "gfs2",
    "cvmfs2", "fuse.cvmfs2", "autofs", "virtiofs", "unifyfs", "fuse.unifyfs",
)  # fmt: skip
#: Filesystems that hold parts of the system: overlaid.
SYSTEM_TYPES = (
    "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "reiserfs", "bcachefs",
    "squashfs", "erofs", "overlay",
)  # fmt: skip
#: Bound if they are there: sockets and files of the host's services that programs inside talk to.
HOST_PATHS = (
    "/run/systemd/resolve", "/run/resolvconf", "/run/NetworkManager/resolv.conf", "/run/nscd",
    "/run/munge", "/run/nvidia-persistenced", "/run/nvidia-fabricmanager", "/var/lib/sss/pipes",
    "/var/lib/sss/mc",
)  # fmt: skip
#: What is mounted here or below is no part of the system, and not there.
NOT_THERE = (
    "/boot", "/efi", "/mnt", "/media", "/snap", "/var/tmp", "/var/lib/docker",
    "/var/lib/containerd", "/var/lib/containers", "/var/lib/kubelet", "/var/lib/machines",
    "/var/lib/sdee", "/var/snap",
)  # fmt: skip
#: Covered inside.
MASKED = (
    "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/proc/latency_stats",
    "/sys/firmware",
)  # fmt: skip


class ConfigError(Exception):
    """A wrong file, section, key or value: one line that names it."""


class Unreadable(ConfigError):
    """These rights don't reach a file of settings."""


@dataclass(frozen=True)
class Settings:
    """What instances and environments of this site are made of, decided once."""

    engine: str = "auto"
    environment: str = "default"  # the one that is meant where none is named
    store: str = "{home}/.local/share/sdee/environments"  # {home}, {user}, {uid}
    volatile: bool = False  # upper isn't synced: faster, and lost with the node
    shared: tuple[str, ...] = ()
    shared_types: tuple[str, ...] = SHARED_TYPES
    system_types: tuple[str, ...] = SYSTEM_TYPES
    not_there: tuple[str, ...] = NOT_THERE
    homes: tuple[str, ...] = ("/home",)  # directories of homes: others' are hidden
    host_paths: tuple[str, ...] = HOST_PATHS
    masked: tuple[str, ...] = MASKED
    tmp_size: str = "50%"
    namespaces: tuple[str, ...] = ()  # more of them that are private: uts, ipc
    binds: tuple[str, ...] = ()  # as --bind has them
    capabilities: tuple[str, ...] = privileges.DEFAULT
    allowed_calls: tuple[str, ...] = ()  # taken off the list of refused ones
    no_new_privs: bool = False
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of other rooms

    def guard(self) -> privileges.Guard:
        """What members of instances may do."""
        return privileges.make_guard(self.capabilities, self.allowed_calls, self.no_new_privs)

    def section(self, name: str) -> Mapping[str, Any]:
        """The values of a section that another room reads; empty if there is none."""
        return self.sections.get(name, {})


#: TOML section -> key -> the field of `Settings`.
_OURS: dict[str, dict[str, str]] = {
    "environments": {
        "engine": "engine",
        "default": "environment",
        "store": "store",
        "volatile": "volatile",
    },
    "instance": {
        name: name
        for name in (
            "shared",
            "shared_types",
            "system_types",
            "not_there",
            "homes",
            "host_paths",
            "masked",
            "tmp_size",
            "namespaces",
            "binds",
        )
    },
    "privileges": {
        "capabilities": "capabilities",
        "allowed_calls": "allowed_calls",
        "no_new_privs": "no_new_privs",
    },
}
#: Sections that other rooms read, with the type of each value.
_OTHERS: dict[str, dict[str, type]] = {
    "users": {"may": list},
    "login": {"on_failure": str, "shell": str, "environment": str, "engine": str},
    "daemon": {
        "requests": int, "instances": int, "connections": int, "mask_seconds": int,
    },
    "masks": {"blank": list, "public": list},
    "deploy": {
        "exclude": list, "warn_size": str, "transport": str, "spool": str, "cache": str,
        "cache_limit": str, "checksum": bool, "level": int,
    },
    "jobs": {"environment": str, "engine": str, "keep": bool, "exclude": list},
}  # fmt: skip
#: What users may set, as SECTION.KEY; the site's `[users] may` makes it less.
USER_KEYS = (
    "environments.engine", "environments.default", "environments.volatile", "instance.binds",
    "instance.tmp_size", "login.environment", "login.engine", "jobs.environment", "jobs.engine",
    "jobs.keep", "jobs.exclude", "deploy.exclude", "deploy.checksum",
)  # fmt: skip
_TYPES = {f.name: f.type for f in fields(Settings)}


def _typed(path: str, key: str, wanted: str | type, value: object) -> object:
    """The value as the field has it. Raises ConfigError."""
    name = wanted if isinstance(wanted, str) else wanted.__name__
    if name.startswith("tuple") or name == "list":
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise ConfigError(f"{path}: {key} is no list of strings")
        return tuple(value)
    right = {"str": str, "bool": bool, "int": int}[name]
    if type(value) is not right:
        raise ConfigError(f"{path}: {key} is no {name}")
    return value


def parse_size(text: str) -> int:
    """Bytes of `500M`, `20G`, `1.5T` or a plain number. Raises ValueError."""
    units = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    plain = text.strip().upper().removesuffix("B").removesuffix("I")
    factor = units.get(plain[-1:], 1)
    try:
        size = int(float(plain.rstrip("KMGT")) * factor)
    except (ValueError, OverflowError):
        size = -1
    if size < 0:
        raise ValueError(f"{text[:80]!r} is no size; 500M or 20G is one")
    return size


def _check(path: str, settings: Settings) -> Settings:
    if settings.engine not in ENGINES:
        raise ConfigError(f"{path}: environments.engine: one of {', '.join(ENGINES)}")
    for name in settings.namespaces:
        if name not in NAMESPACES:
            raise ConfigError(f"{path}: instance.namespaces: {name}: one of {NAMESPACES}")
    for key in ("cache_limit", "warn_size"):
        text = settings.section("deploy").get(key)
        try:
            if text:  # empty: as if it weren't there
                parse_size(text)
        except ValueError as error:
            raise ConfigError(f"{path}: deploy.{key}: {error}") from None
    try:
        settings.guard()
        settings.store.format(home="", user="", uid="")
    except (ValueError, KeyError, IndexError) as error:
        raise ConfigError(f"{path}: {error}") from None
    return settings


def apply(
    settings: Settings, text: str, path: str, allowed: tuple[str, ...] | None = None
) -> Settings:
    """Put the content of a file on top of `settings`. Raises ConfigError.

    `allowed`: the only keys (SECTION.KEY) that may stand in it.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
    changes: dict[str, Any] = {}
    sections = {name: dict(values) for name, values in settings.sections.items()}
    for section, values in data.items():
        if section not in _OURS and section not in _OTHERS:
            raise ConfigError(f"{path}: [{section}] is no section")
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {section} is a section, not a value")
        for key, value in values.items():
            name = f"{section}.{key}"
            target = _OURS.get(section, {}).get(key)
            other = _OTHERS.get(section, {}).get(key)
            if target is None and other is None:
                raise ConfigError(f"{path}: {name} is no setting")
            if allowed is not None and name not in allowed:
                raise ConfigError(f"{path}: {name} is not for users to set")
            if target is not None:
                changes[target] = _typed(path, name, str(_TYPES[target]), value)
            elif other is not None:
                sections.setdefault(section, {})[key] = _typed(path, name, other, value)
    return _check(path, replace(settings, sections=sections, **changes))


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8") from None
    except PermissionError as error:
        raise Unreadable(f"{path}: {error.strerror}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def site_settings(path: str | None = None) -> Settings:
    """The site's settings. Raises ConfigError."""
    path = path or os.environ.get("SDEE_CONFIG") or SITE_FILE
    text = _read(path)
    return Settings() if text is None else _site_settings(text, path)


@functools.lru_cache(maxsize=4)
def _site_settings(text: str, path: str) -> Settings:
    """Parsed once for each text: a process that makes instances reads the file for each."""
    return apply(Settings(), text, path)


def load(home: str | None = None, path: str | None = None) -> Settings:
    """The site's settings with the user's on top. Raises ConfigError."""
    settings = site_settings(path)
    home = home or os.environ.get("HOME")
    if not home:
        return settings
    file = os.path.join(home, USER_FILE)
    text = _read(file)
    if text is None:
        return settings
    may = settings.section("users").get("may")
    allowed = tuple(k for k in USER_KEYS if may is None or k in may)
    return apply(settings, text, file, allowed)
