"""The option string of a mount: overlayfs's names, fuse-overlayfs's, mount(8)'s, and our own.

`parse()` is pure: it opens nothing, and refuses an option that it doesn't know with its name.
`Options` is what a mount was asked to be; `Options.settings()` gives what the core reads of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from mount_helpers import syscalls
from mount_helpers.namespaces import IdRange
from sdeefs.core.settings import IdMap, RedirectDir, Settings, WhiteoutForm

#: (uid_t) -1: "leave it" to chown(2), and no id of anybody.
_NO_ID = 2**32 - 1
TRANSPORTS = ("auto", "ring", "device", "pyfuse3")


class UsageError(Exception):
    """A wrong option or argument: one line for the caller, exit status 2."""


@dataclass(frozen=True)
class Options:
    """One mount as it was asked for. None means: as it suits the caller and the machine."""

    lowers: tuple[bytes, ...] = ()
    upper: bytes | None = None
    work: bytes | None = None
    source: str = "sdeefs"
    read_only: bool = False
    attributes: int = 0  # MOUNT_ATTR_* of the mount
    allow_other: bool | None = None
    transport: str | None = None  # auto, ring, device, pyfuse3
    passthrough: bool | None = None
    writeback: bool | None = None
    shortcuts: bool | None = None
    watch: bool | None = None
    threads: int | None = None
    remount: bool = False
    userxattr: bool | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)  # of `Settings`, as given
    kernel_words: tuple[str, ...] = ()  # what kernel overlayfs would be told too
    only_sdeefs: tuple[str, ...] = ()  # what kernel overlayfs has no word for

    def settings(self, *, userxattr: bool) -> Settings:
        """What the core is opened with; `userxattr` is the answer where none was given."""
        return Settings(
            lowers=self.lowers,
            upper=self.upper,
            work=self.work,
            read_only=self.read_only or self.upper is None,
            userxattr=userxattr if self.userxattr is None else self.userxattr,
            **self.fields,
        )


def split(text: str) -> list[str]:
    r"""The options of a comma-separated string; `\,` is a comma of a value.

    Any other escape stays as it is: `lowerdir` has its own (`\:`).
    """
    words, word, escaped = [], "", False
    for letter in text:
        if escaped:
            word += letter if letter == "," else "\\" + letter
            escaped = False
        elif letter == "\\":
            escaped = True
        elif letter == ",":
            words.append(word)
            word = ""
        else:
            word += letter
    words.append(word + ("\\" if escaped else ""))
    return [w for w in words if w]


def split_lowers(text: str) -> tuple[bytes, ...]:
    r"""The directories of `lowerdir=A:B:C`, topmost first; `\:` and `\\` stand for themselves."""
    found, word, escaped = [], "", False
    for letter in text:
        if escaped or letter not in "\\:":
            word += letter
            escaped = False
        elif letter == "\\":
            escaped = True
        else:
            found.append(word)
            word = ""
    found.append(word)
    if len(found) > 1 and "" in found[1:]:
        raise UsageError("lowerdir: data-only layers (`::`) are not supported")
    if not all(found):
        raise UsageError("lowerdir: an empty path")
    return tuple(_path(w) for w in found)


def _path(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _plain_path(name: str, value: str) -> bytes:
    """upperdir and workdir: overlayfs takes the same escapes there."""
    found = split_lowers(value.replace(":", "\\:") if "\\" not in value else value)
    if len(found) != 1:
        raise UsageError(f"{name}: one directory is expected, not {value!r}")
    return found[0]


def id_map(name: str, text: str) -> IdMap:
    """`INSIDE:OUTSIDE:COUNT[:INSIDE:OUTSIDE:COUNT…]`, as fuse-overlayfs spells it."""
    wrong = f"{name}: INSIDE:OUTSIDE:COUNT is expected, not {text!r}"
    try:
        numbers = [int(n) for n in text.split(":")]
    except ValueError:
        raise UsageError(wrong) from None
    if not numbers or len(numbers) % 3 or min(numbers) < 0 or 0 in numbers[2::3]:
        raise UsageError(wrong)
    ranges = tuple(IdRange(*numbers[i : i + 3]) for i in range(0, len(numbers), 3))
    for side in ("inside", "outside"):
        ordered = sorted((getattr(r, side), r.count) for r in ranges)
        for (first, count), (second, _) in pairwise(ordered):
            if first + count > second:
                raise UsageError(f"{name}: ranges overlap in {text!r}")
        if ordered[-1][0] + ordered[-1][1] > _NO_ID:
            raise UsageError(f"{name}: ids end at 2^32 - 2, in {text!r}")
    return ranges


_Change = Callable[[Options, str, str | None], Options]
_TRUTH = {"on": True, "off": False, "1": True, "0": False, "yes": True, "no": False}


def _no_value(name: str, value: str | None) -> None:
    if value is not None:
        raise UsageError(f"{name}: takes no value (given: {value!r})")


def _value(name: str, value: str | None) -> str:
    if not value:
        raise UsageError(f"{name}: a value is missing")
    return value


def _truth(name: str, value: str | None) -> bool:
    if value is None:
        return True
    try:
        return _TRUTH[value]
    except KeyError:
        raise UsageError(f"{name}: on or off is expected, not {value!r}") from None


def _truth_or_auto(name: str, value: str | None) -> bool | None:
    """True, False, or None for auto."""
    if value is None or value in _TRUTH:
        return _truth(name, value)
    if value == "auto":
        return None
    raise UsageError(f"{name}: on, off or auto is expected, not {value!r}")


def _seconds(name: str, value: str | None) -> float:
    try:
        seconds = float(_value(name, value))
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= 1e9:
        raise UsageError(f"{name}: a number of seconds is expected, not {value!r}")
    return seconds


def _setting(options: Options, name: str, value: object, word: str | None = None) -> Options:
    """Set a field of `Settings`; `word` is the same for kernel overlayfs, None if it has none."""
    options = replace(options, fields={**options.fields, name: value})
    if word is None:
        return replace(options, only_sdeefs=(*options.only_sdeefs, name))
    return replace(options, kernel_words=(*options.kernel_words, word))


def _ignored(options: Options, name: str, value: str | None) -> Options:
    return options


def _only(*allowed: str, why: str) -> _Change:
    """An overlayfs option of which we fulfil only some values."""

    def change(options: Options, name: str, value: str | None) -> Options:
        if value not in allowed:
            given = name if value is None else f"{name}={value}"
            raise UsageError(f"{given}: {why}; give {name}={allowed[0]} or leave it out")
        return replace(options, kernel_words=(*options.kernel_words, f"{name}={value}"))

    return change


def _attribute(bits: int, clear: int = 0) -> _Change:
    def change(options: Options, name: str, value: str | None) -> Options:
        _no_value(name, value)
        return replace(options, attributes=options.attributes & ~clear | bits)

    return change


def _switch(field_name: str) -> _Change:
    """on, off, or auto."""

    def change(options: Options, name: str, value: str | None) -> Options:
        switch = _truth_or_auto(name, value)
        return replace(options, **{field_name: switch})  # type: ignore[arg-type]

    return change


def _flag(field_name: str, value_set: bool) -> _Change:
    def change(options: Options, name: str, value: str | None) -> Options:
        _no_value(name, value)
        return replace(options, **{field_name: value_set})  # type: ignore[arg-type]

    return change


def _text(field_name: str) -> _Change:
    def change(options: Options, name: str, value: str | None) -> Options:
        return replace(options, **{field_name: _value(name, value)})  # type: ignore[arg-type]

    return change


def _lowerdir(options: Options, name: str, value: str | None) -> Options:
    return replace(options, lowers=split_lowers(_value(name, value)))


def _lowerdir_plus(options: Options, name: str, value: str | None) -> Options:
    return replace(options, lowers=(*options.lowers, _path(_value(name, value))))


def _upperdir(options: Options, name: str, value: str | None) -> Options:
    return replace(options, upper=_plain_path(name, _value(name, value)))


def _workdir(options: Options, name: str, value: str | None) -> Options:
    return replace(options, work=_plain_path(name, _value(name, value)))


def _userxattr(options: Options, name: str, value: str | None) -> Options:
    return replace(options, userxattr=_truth(name, value))


def _truth_setting(setting: str, *, kernel: bool, invert: bool = False) -> _Change:
    def change(options: Options, name: str, value: str | None) -> Options:
        truth = _truth(name, value) != invert
        word = name if value is None else f"{name}={value}"
        return _setting(options, setting, truth, word if kernel else None)

    return change


def _xino(options: Options, name: str, value: str | None) -> Options:
    truth = _truth_or_auto(name, value)
    return _setting(options, "xino", truth is not False, f"xino={value or 'on'}")


def _redirect_dir(options: Options, name: str, value: str | None) -> Options:
    try:
        form = RedirectDir(_value(name, value))
    except ValueError:
        known = ", ".join(f.value for f in RedirectDir)
        raise UsageError(f"{name}: one of {known} is expected, not {value!r}") from None
    return _setting(options, "redirect_dir", form, f"{name}={value}")


def _whiteouts(options: Options, name: str, value: str | None) -> Options:
    try:
        form = WhiteoutForm(_value(name, value))
    except ValueError:
        known = ", ".join(f.value for f in WhiteoutForm)
        raise UsageError(f"{name}: one of {known} is expected, not {value!r}") from None
    return _setting(options, "whiteouts", form)


def _map(*fields: str) -> _Change:
    def change(options: Options, name: str, value: str | None) -> Options:
        ranges = id_map(name, _value(name, value))
        for one in fields:
            options = _setting(options, one, ranges)
        return options

    return change


def _timeout(*fields: str) -> _Change:
    def change(options: Options, name: str, value: str | None) -> Options:
        seconds = _seconds(name, value)
        for one in fields:
            options = _setting(options, one, seconds)
        return options

    return change


def _number(setting: str, lowest: int) -> _Change:
    def change(options: Options, name: str, value: str | None) -> Options:
        if not _value(name, value).isdecimal() or int(value or 0) < lowest:
            raise UsageError(f"{name}: a number from {lowest} is expected, not {value!r}")
        return _setting(options, setting, int(value or 0))

    return change


def _threads(options: Options, name: str, value: str | None) -> Options:
    if not _value(name, value).isdecimal() or not 1 <= int(value or 0) <= 64:
        raise UsageError(f"{name}: a number from 1 to 64 is expected, not {value!r}")
    return replace(options, threads=int(value or 0))


def _override_stat(options: Options, name: str, value: str | None) -> Options:
    return _setting(options, name, _truth_or_auto(name, value))


def _secrets(options: Options, name: str, value: str | None) -> Options:
    """`secrets=UID[:GID…]`: the ids of lower that may read what others may not."""
    try:
        ids = tuple(int(n) for n in _value(name, value).split(":"))
    except ValueError:
        ids = (-1,)
    if not all(0 <= n < _NO_ID for n in ids):
        raise UsageError(f"{name}: UID:GID:GID… is expected, not {value!r}")
    return _setting(options, name, ids)


def _extra(options: Options, name: str, value: str | None) -> Options:
    extra = {**options.fields.get("extra", {}), name: value or ""}
    return replace(options, fields={**options.fields, "extra": extra})


_ATIME = syscalls.MOUNT_ATTR__ATIME
#: What mount(8), fstab and overlayfs itself add, and what changes nothing here.
_MEANINGLESS = (
    "user_id", "group_id", "rootmode", "max_read", "blksize",
    "defaults", "async", "sync", "dirsync", "lazytime", "nolazytime", "iversion", "noiversion",
    "auto", "noauto", "_netdev", "user", "nouser", "users", "nousers", "owner", "noowner",
    "group", "nogroup", "nofail", "silent", "loud", "mand", "nomand", "acl", "noacl",
    "user_xattr", "sloppy", "nonempty", "comment",
)  # fmt: skip
_ONLY_FUSE_OVERLAYFS = (
    "threaded", "clone_fd", "noacl", "static_nlink", "xattr_permissions", "fast_ino",
    "max_write", "max_idle_threads", "debug", "context", "fscontext", "defcontext",
    "rootcontext", "max_threads", "big_writes", "auto_unmount", "cachedir", "allow_root",
)  # fmt: skip
_TABLE: dict[str, _Change] = {
    # overlayfs
    "lowerdir": _lowerdir,
    "lowerdir+": _lowerdir_plus,
    "upperdir": _upperdir,
    "workdir": _workdir,
    "userxattr": _userxattr,
    "volatile": _truth_setting("volatile", kernel=True),
    "redirect_dir": _redirect_dir,
    "index": _truth_setting("index", kernel=True),
    "xino": _xino,
    "metacopy": _only("off", why="copy-up of metadata alone is not supported"),
    "nfs_export": _only("off", why="export over NFS is not supported"),
    "verity": _only("off", why="fs-verity digests are not supported"),
    "uuid": _only("auto", "on", "off", "null", why="unknown value"),
    "default_permissions": _ignored,
    "override_creds": _ignored,
    "nooverride_creds": _ignored,
    # ids, as fuse-overlayfs spells them, and for one side alone
    "uidmap": _map("uid_upper", "uid_lower"),
    "gidmap": _map("gid_upper", "gid_lower"),
    "upper_uidmap": _map("uid_upper"),
    "upper_gidmap": _map("gid_upper"),
    "lower_uidmap": _map("uid_lower"),
    "lower_gidmap": _map("gid_lower"),
    "squash_overflow": _truth_setting("squash_overflow", kernel=False),
    "unmapped_lowers": _number("unmapped_lowers", 0),
    # ours
    "transport": _text("transport"),
    "passthrough": _switch("passthrough"),
    "writeback": _switch("writeback"),
    "shortcuts": _switch("shortcuts"),
    "watch": _switch("watch"),
    "threads": _threads,
    "whiteouts": _whiteouts,
    "read_prefixes": _truth_setting("read_prefixes", kernel=False),
    "noxattr": _truth_setting("noxattr", kernel=False),
    "override_stat": _override_stat,
    "secrets": _secrets,
    "lower_timeout": _timeout("lower_timeout"),
    "upper_timeout": _timeout("upper_timeout"),
    "timeout": _timeout("lower_timeout", "upper_timeout"),
    "max_directories": _number("max_directories", 16),
    # FUSE and mount(8)
    "allow_other": _flag("allow_other", True),
    "noallow_other": _flag("allow_other", False),
    "fsname": _text("source"),
    "subtype": _ignored,
    "ro": _flag("read_only", True),
    "rw": _flag("read_only", False),
    "remount": _flag("remount", True),
    "nosuid": _attribute(syscalls.MOUNT_ATTR_NOSUID),
    "suid": _attribute(0, syscalls.MOUNT_ATTR_NOSUID),
    "nodev": _attribute(syscalls.MOUNT_ATTR_NODEV),
    "dev": _attribute(0, syscalls.MOUNT_ATTR_NODEV),
    "noexec": _attribute(syscalls.MOUNT_ATTR_NOEXEC),
    "exec": _attribute(0, syscalls.MOUNT_ATTR_NOEXEC),
    "noatime": _attribute(syscalls.MOUNT_ATTR_NOATIME, _ATIME),
    "relatime": _attribute(0, _ATIME),
    "atime": _attribute(0, _ATIME),
    "norelatime": _attribute(0, _ATIME),
    "strictatime": _attribute(syscalls.MOUNT_ATTR_STRICTATIME, _ATIME),
    "nostrictatime": _attribute(0, _ATIME),
    "nodiratime": _attribute(syscalls.MOUNT_ATTR_NODIRATIME),
    "diratime": _attribute(0, syscalls.MOUNT_ATTR_NODIRATIME),
    "nosymfollow": _attribute(syscalls.MOUNT_ATTR_NOSYMFOLLOW),
    "symfollow": _attribute(0, syscalls.MOUNT_ATTR_NOSYMFOLLOW),
    **dict.fromkeys(_MEANINGLESS, _ignored),
}
#: What fuse-overlayfs takes and what means nothing here, or is always so.
_OF_FUSE_OVERLAYFS: dict[str, _Change] = dict.fromkeys(_ONLY_FUSE_OVERLAYFS, _ignored)


def _fsync(options: Options, name: str, value: str | None) -> Options:
    return options if _truth(name, value) else _setting(options, "volatile", True)


def parse(
    words: Iterable[str],
    base: Options | None = None,
    *,
    sloppy: bool = False,
    drop_in: bool = False,
) -> Options:
    """Read `-o` strings, the later ones winning, onto `base`.

    `drop_in` also takes what fuse-overlayfs would, and ignores what has no meaning here; `sloppy`
    (mount -s) ignores every unknown option. Raises UsageError with the option's name.
    """
    options = base or Options()
    table = _TABLE
    if drop_in:
        table = {
            **_TABLE,
            **_OF_FUSE_OVERLAYFS,
            "noxattrs": _truth_setting("noxattr", kernel=False),
            "fsync": _fsync,
            "squash_to_root": _truth_setting("squash_overflow", kernel=False),
        }
    for text in words:
        # Several lowerdir+ add up, but a later string starts anew.
        for word in split(text):
            name, separator, value = word.partition("=")
            if name.startswith(("x-", "X-", "comment")):
                continue
            if name.startswith("sdee."):
                options = _extra(options, name, value)
                continue
            change = table.get(name)
            if change is None:
                if sloppy or "sloppy" in split(text):
                    continue
                raise UsageError(f"unknown option {name!r} (in -o {text})")
            options = change(options, name, value if separator else None)
    return _checked(options)


def _checked(options: Options) -> Options:
    if options.transport is not None and options.transport not in TRANSPORTS:
        known = ", ".join(TRANSPORTS)
        raise UsageError(f"transport: one of {known} is expected, not {options.transport!r}")
    if options.upper is None and options.work is not None and options.lowers:
        raise UsageError("workdir is given without upperdir")
    return options
