"""What one mount is made of and how it behaves: decided once, before the core opens its layers."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from mount_helpers.namespaces import IdRange

#: Ranges of ids: `inside` as merged shows them, `outside` as the layer has them. Spelt as by
#: fuse-overlayfs: `uidmap=INSIDE:OUTSIDE:COUNT[:INSIDE:OUTSIDE:COUNT…]`.
IdMap = tuple[IdRange, ...]


class RedirectDir(enum.Enum):
    """overlayfs's `redirect_dir=`."""

    ON = "on"
    FOLLOW = "follow"
    NOFOLLOW = "nofollow"
    OFF = "off"


class WhiteoutForm(enum.Enum):
    """How deletions are written: AUTO tries the forms in this order and keeps the first that works."""

    AUTO = "auto"
    CHARDEV = "chardev"  # character device 0/0
    XATTR = "xattr"  # zero-size file with overlay.whiteout, its directory opaque=x
    PREFIX = "prefix"  # `.wh.NAME`; read only where this form is chosen, or by `read_prefixes`


@dataclass(frozen=True)
class Settings:
    """One mount. Paths are opened once, before mounting; `/proc/self/fd/N` is allowed.

    upper None: lowers alone, read-only. Ids: `*_upper` maps what is stored in upper, `*_lower` what
    the lowers have; empty maps are the identity.
    """

    lowers: tuple[bytes, ...]
    upper: bytes | None = None
    work: bytes | None = None
    read_only: bool = False
    userxattr: bool = False  # user.overlay. in place of trusted.overlay.
    volatile: bool = False  # no fsync reaches upper
    redirect_dir: RedirectDir = RedirectDir.ON
    index: bool = True  # hard links of lower stay together after copy-up
    xino: bool = True  # inode numbers of several filesystems are made unique
    whiteouts: WhiteoutForm = WhiteoutForm.AUTO
    read_prefixes: bool = False  # `.wh.NAME` is a deletion, whichever form is written
    noxattr: bool = False  # behave as if upper had no xattrs
    uid_upper: IdMap = ()
    gid_upper: IdMap = ()
    uid_lower: IdMap = ()
    gid_lower: IdMap = ()
    # ids of lower that this user namespace has no name for (65534) are shown as root's: rootless
    squash_overflow: bool = False
    # so many of the topmost lowers are stored as upper is, by the same user: the maps of lower and
    # the secrets rule are not for them
    unmapped_lowers: int = 0
    # ownership and special modes in `user.containers.override_stat` where chown fails (None: as needed)
    override_stat: bool | None = None
    # None: no secrets rule. Else the ids (uid, then gids) as lower stores them, that may read.
    secrets: tuple[int, ...] | None = None
    lower_timeout: float = 1.0  # seconds that what comes from lower is believed, without a watch
    upper_timeout: float = 86400.0  # seconds for what only we change
    max_directories: int = 1024  # directory descriptors kept open (LRU)
    extra: dict[str, str] = field(default_factory=dict)  # options that only other rooms read
