"""All POSIX checks: each room registers its own in CHECKS."""

from __future__ import annotations

from tests.fslab import (
    posix_acls,
    posix_attributes,
    posix_directories,
    posix_links,
    posix_locks,
    posix_maps,
    posix_names,
    posix_open,
    posix_permissions,
    posix_rename,
    posix_rest,
    posix_space,
    posix_special,
    posix_xattrs,
)
from tests.fslab.posix_place import CHECKS, Place

__all__ = ["CHECKS", "ROOMS", "Place"]

ROOMS = (
    posix_open,
    posix_names,
    posix_directories,
    posix_links,
    posix_rename,
    posix_attributes,
    posix_permissions,
    posix_acls,
    posix_xattrs,
    posix_space,
    posix_maps,
    posix_locks,
    posix_special,
    posix_rest,
)
