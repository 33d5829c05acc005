"""What becomes secret while an instance of the kernel engine lives is hidden from it as well.

The new entries are put into the mask tree that the instance has as a lower, where overlayfs finds
them above lower's. Names that the instance has looked up before are still in the kernel's cache:
reconfiguring the overlay drops those that nothing holds open. (Overlayfs calls a change of its
layers undefined, but for safe: what a lookup finds is what there is at that time.)
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from mount_helpers import syscalls as sc
from sdee_launch import instances
from sdee_launch.instances import Record
from sdee_launch.masks import KERNEL, Masks


def hide(masks: Masks, record: Record, gids: Iterable[int]) -> bool:
    """Hide from a live instance what the last scan found secret; whether anything was new.

    Raises OSError, RuntimeError without a scan.
    """
    if record.engine != KERNEL or not masks.extend(record.mask, record.uid, gids):
        return False
    _forget_names(record)
    return True


def _forget_names(record: Record) -> None:
    pidfd = record.init.open()
    if pidfd is None:
        return
    try:
        root = os.open(f"/proc/{record.init.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if instances.exited(pidfd):  # and the number may be another's
                return
            fs = sc.fspick(root, b"", sc.FSPICK_EMPTY_PATH)
            try:
                # Without options it changes nothing; it ends with shrink_dcache_sb().
                sc.fsconfig_reconfigure(fs)
            finally:
                os.close(fs)
        finally:
            os.close(root)
    finally:
        os.close(pidfd)
