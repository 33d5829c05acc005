"""The other engine: the kernel's overlayfs with the same layers and options.

Whether it can serve is tried for real, on upper's own filesystem; what it has no word for (id maps,
secrets, the prefix form of whiteouts) is left to sdeefs.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from mount_helpers import syscalls
from mount_helpers.mountinfo import Mount, mount_at
from sdeefs import privileges
from sdeefs.options import Options
from sdeefs.refusals import OUR_TYPE, Refused, absolute, is_ours, text, unused

#: Settings that only change how sdeefs works, not what merged shows.
_MEANS_NOTHING = {"lower_timeout", "upper_timeout", "max_directories", "override_stat"}

_SPELT = {
    "uid_upper": "uidmap",
    "uid_lower": "uidmap",
    "gid_upper": "gidmap",
    "gid_lower": "gidmap",
}


def why_not(options: Options) -> str | None:
    """Why kernel overlayfs can't serve this, or None: a trial mount settles it."""
    from mount_helpers.probe import kernel_overlay

    unknown = sorted({_SPELT.get(n, n) for n in set(options.only_sdeefs) - _MEANS_NOTHING})
    if unknown:
        return f"it has no option {', '.join(unknown)}"
    if options.upper is None or options.read_only:
        return None
    finding = kernel_overlay(
        Path(os.fsdecode(os.path.dirname(os.path.realpath(options.upper)))),
        userxattr=_userxattr(options),
    )
    return None if finding.works else finding.detail


def _userxattr(options: Options) -> bool:
    return not privileges.on_host() if options.userxattr is None else options.userxattr


def mount(options: Options, merged: bytes) -> None:
    """Mount overlayfs at merged. Raises OSError with the kernel's reason, or Refused."""
    with unused(options):
        fs = syscalls.fsopen("overlay")
        try:
            syscalls.fsconfig_string(fs, "source", options.source)
            _layers(fs, options)
            if options.upper is not None and options.work is not None:
                for name, path in (("upperdir", options.upper), ("workdir", options.work)):
                    # overlayfs takes its escapes back here, but not in `lowerdir+`.
                    escaped = os.path.realpath(path).replace(b"\\", b"\\\\")
                    syscalls.fsconfig_string(fs, name, escaped)
            if _userxattr(options):
                syscalls.fsconfig_flag(fs, "userxattr")
            for word in _words(options):
                name, separator, value = word.partition("=")
                if separator:
                    syscalls.fsconfig_string(fs, name, value)
                else:
                    syscalls.fsconfig_flag(fs, name)
            read_only = options.read_only or options.upper is None
            if read_only:
                syscalls.fsconfig_flag(fs, "ro")
            syscalls.fsconfig_create(fs)
            attributes = options.attributes | (syscalls.MOUNT_ATTR_RDONLY if read_only else 0)
            mount_fd = syscalls.fsmount(fs, attributes)
        finally:
            os.close(fs)
        try:
            syscalls.attach(mount_fd, merged)
        finally:
            os.close(mount_fd)


def _layers(fs: int, options: Options) -> None:
    paths = [os.path.realpath(p) for p in options.lowers]
    try:
        for path in paths:
            syscalls.fsconfig_string(fs, "lowerdir+", path)  # Linux >= 6.8
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        escaped = [p.replace(b"\\", b"\\\\").replace(b":", b"\\:") for p in paths]
        syscalls.fsconfig_string(fs, "lowerdir", b":".join(escaped))


def _words(options: Options) -> list[str]:
    """Our defaults where nothing was said, then what was said."""
    given = {w.partition("=")[0] for w in options.kernel_words}
    words = []
    if not _userxattr(options) and options.upper is not None and not options.read_only:
        words = [w for w in ("redirect_dir=on", "index=on") if w.partition("=")[0] not in given]
    spelt = {"1": "on", "0": "off", "yes": "on", "no": "off"}
    for word in options.kernel_words:
        name, separator, value = word.partition("=")
        if name in ("index", "xino", "redirect_dir") or separator:
            word = f"{name}={spelt.get(value, value) or 'on'}"
        if name == "volatile" and value in ("off", "0", "no"):
            continue
        words.append("volatile" if name == "volatile" else word)
    return words


def remount(options: Options, merged: bytes) -> None:
    """`mount -o remount,ro` and back, of either engine. Raises Refused or OSError."""
    point = absolute(merged)
    mount = mount_at(point)
    if mount is None:
        raise Refused(f"{text(point)}: nothing is mounted there to remount")
    if not is_ours(mount):
        raise Refused(f"{text(point)}: a {mount.fstype} mount, not one of sdeefs")
    if mount.fstype == OUR_TYPE and not options.read_only and _writes_nothing(mount):
        raise Refused(
            f"{text(point)}: was mounted read-only, and its server can't write (unmount it, then"
            " mount it with upper and without ro)"
        )
    flags = syscalls.MS_REMOUNT
    for bit, flag in (
        (syscalls.MOUNT_ATTR_NOSUID, syscalls.MS_NOSUID),
        (syscalls.MOUNT_ATTR_NODEV, syscalls.MS_NODEV),
        (syscalls.MOUNT_ATTR_NOEXEC, syscalls.MS_NOEXEC),
        (syscalls.MOUNT_ATTR_NOATIME, syscalls.MS_NOATIME),
        (syscalls.MOUNT_ATTR_NODIRATIME, syscalls.MS_NODIRATIME),
        (syscalls.MOUNT_ATTR_NOSYMFOLLOW, syscalls.MS_NOSYMFOLLOW),
    ):
        if options.attributes & bit:
            flags |= flag
    if options.read_only:
        flags |= syscalls.MS_RDONLY
    syscalls.mount(None, point, None, flags, None)


def _writes_nothing(mount: Mount) -> bool:
    """Whether a mount's server has no workdir, as its record says, and so only reads."""
    from sdeefs.control import records

    return any(r.get("minor") == mount.device[1] and r.get("work") is None for r in records())
