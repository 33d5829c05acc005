"""Whether a mount's commonest requests are answered in C (`_shortcuts`), and what that has to know.

The extension is optional: without it, and for all but the plain cases, the handlers of `requests`
answer. Remote layers get no shortcuts, since those keep the interpreter's lock during a system call.
"""

from __future__ import annotations

import os
from typing import Any

from mount_helpers import fanotify
from mount_helpers.mountinfo import is_remote, read_mounts
from sdeefs.core.api import Later, Operations
from sdeefs.core.filesystem import Filesystem
from sdeefs.core.ids import Owners
from sdeefs.core.settings import WhiteoutForm
from sdeefs.transports.requests import Deferred, Features
from sdeefs.transports.wire import Opcode

#: The methods of `Shortcuts`, by what they answer.
SHORTCUTS = {
    Opcode.LOOKUP: "lookup",
    Opcode.FORGET: "forget",
    Opcode.BATCH_FORGET: "batch_forget",
    Opcode.GETATTR: "getattr",
    Opcode.SETATTR: "setattr",
    Opcode.SYMLINK: "symlink",
    Opcode.MKNOD: "mknod",
    Opcode.MKDIR: "mkdir",
    Opcode.UNLINK: "unlink",
    Opcode.RMDIR: "rmdir",
    Opcode.RENAME: "rename",
    Opcode.RENAME2: "rename2",
    Opcode.LINK: "link",
    Opcode.OPEN: "open",
    Opcode.CREATE: "create",
    Opcode.READ: "read",
    Opcode.RELEASE: "release",
    Opcode.COPY_FILE_RANGE: "copy_file_range",
    Opcode.COPY_FILE_RANGE_64: "copy_file_range_64",
    Opcode.READDIR: "readdir",
    Opcode.READDIRPLUS: "readdirplus",
    Opcode.SETXATTR: "setxattr",
    Opcode.GETXATTR: "getxattr",
    Opcode.LISTXATTR: "listxattr",
}
_FSID_SHIFT = 56


def missing() -> str | None:
    """None: the extension is there. Else the reason."""
    try:
        from sdeefs.transports import _shortcuts  # noqa: F401
    except ImportError:
        return "the C extension isn't built (needs gcc and python3-dev at installation)"
    return None


def why_not(operations: Operations) -> str | None:
    """None: shortcuts can serve this mount. Else the reason."""
    reason = missing()
    if reason is not None:
        return reason
    if type(operations) is not Filesystem:
        return "another core"
    upper = operations.upper
    if operations.prefixes:
        return "whiteouts of the `.wh.` form are looked for"
    if operations.override:
        return "ownership is kept in xattrs"
    if operations.settings.noxattr or (upper is not None and not upper.xattrs):
        return "upper has no xattrs"
    devices = {layer.dev for layer in operations.layers.values()}
    for mount in read_mounts():
        if is_remote(mount.fstype) and os.makedev(*mount.device) in devices:
            return f"a layer is on {mount.fstype}"
    return None


def shorten(
    operations: Operations,
    handlers: list[Any],
    backing_ids: object,
    features: Features,
    device: int = -1,
) -> list[Any]:
    """The table of handlers with the shortcuts in it, where they can serve.

    `device`: the connection's descriptor, to give the kernel small files' data through.
    """
    if why_not(operations) is not None:
        return handlers
    from sdeefs.transports._shortcuts import Shortcuts

    assert isinstance(operations, Filesystem)

    def read_later(handle: int, offset: int, size: int) -> Deferred:
        return Deferred(Later(lambda: operations.read(handle, offset, size)), bytes)

    upper, settings = operations.upper, operations.settings
    layers = []
    for number in range(max(operations.layers) + 1):
        layer = operations.layers.get(number)
        layers.append(
            (None, -1, 0) if layer is None else (layer, layer.fd, layer.fsid << _FSID_SHIFT)
        )
    links_whiteouts = upper is not None and upper.whiteouts is WhiteoutForm.CHARDEV
    shortcuts = Shortcuts(
        filesystem=operations,
        handlers=handlers,
        backing_ids=backing_ids,
        open_base=features.open_base,
        layers=layers,
        upper_owners=_maps(operations.upper_owners),
        lower_owners=_maps(operations.lower_owners),
        unmapped=operations.unmapped,
        secrets=settings.secrets,
        upper_timeout=operations.upper_timeout,
        writable=operations.writable,
        index_on=operations.index_on,
        writeback=operations.writeback,
        passthrough=operations.passthrough,
        setxattr_ext=features.setxattr_ext,
        volatile=settings.volatile,
        work_fd=upper.work if upper is not None and links_whiteouts else -1,
        own_prefix=operations.names.prefix,
        max_directories=settings.max_directories,
        watched_events=fanotify.WATCHED,
        read_later=read_later,
        device=device,
    )
    table = list(handlers)
    for opcode, name in SHORTCUTS.items():
        table[opcode] = getattr(shortcuts, name)
    return table


def _maps(owners: Owners) -> tuple[object, object, bool]:
    return (
        tuple((r.inside, r.outside, r.count) for r in owners.uids),
        tuple((r.inside, r.outside, r.count) for r in owners.gids),
        owners.squash,
    )
