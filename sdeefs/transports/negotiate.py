"""INIT: what we take of what the kernel offers. Pure planning; the transport does the reading."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from sdeefs.transports import wire
from sdeefs.transports.transport import PASSTHROUGH, PLAIN, WRITEBACK, TransportOptions

_ALWAYS = (
    wire.ASYNC_READ
    | wire.ATOMIC_O_TRUNC
    | wire.BIG_WRITES
    | wire.AUTO_INVAL_DATA
    | wire.ASYNC_DIO
    | wire.PARALLEL_DIROPS
    | wire.NO_OPENDIR_SUPPORT
    | wire.HANDLE_KILLPRIV_V2
    | wire.SETXATTR_EXT
    | wire.HAS_EXPIRE_ONLY
    | wire.DIRECT_IO_ALLOW_MMAP
    | wire.INIT_EXT
)
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Agreement:
    """The answer to INIT, and what follows from it."""

    answer: wire.InitAnswer
    data_path: str
    over_io_uring: bool

    @property
    def flags(self) -> int:
        return self.answer.flags


def agree(
    offer: wire.InitRequest,
    options: TransportOptions,
    may_pass_through: bool,
    max_write: int,
    over_io_uring: bool = False,
    exports: bool = False,
) -> Agreement:
    """Plan the answer. `may_pass_through`: the server has the privilege to register files."""
    if offer.major != wire.MAJOR or offer.minor < wire.OLDEST_MINOR:
        raise OSError(
            errno.EPROTO,
            f"the kernel speaks FUSE {offer.major}.{offer.minor}, "
            f"needed is {wire.MAJOR}.{wire.OLDEST_MINOR} (Linux 5.4) or newer",
        )
    wanted = _ALWAYS
    if options.readdirplus:
        wanted |= wire.DO_READDIRPLUS | wire.READDIRPLUS_AUTO
    if options.cache_symlinks:
        wanted |= wire.CACHE_SYMLINKS
    if options.acl:
        wanted |= wire.POSIX_ACL | wire.DONT_MASK
    else:
        wanted |= wire.DONT_MASK  # the core applies the umask, which each request carries
    if exports:
        wanted |= wire.EXPORT_SUPPORT
    pages = min(max_write // _PAGE, 0xFFFF)
    if offer.flags & wire.MAX_PAGES:
        wanted |= wire.MAX_PAGES
    else:
        max_write = min(max_write, 32 * _PAGE)
    depth = 0
    data_path = PLAIN
    if options.passthrough and may_pass_through and offer.flags & wire.PASSTHROUGH:
        wanted |= wire.PASSTHROUGH
        depth = options.max_stack_depth
        data_path = PASSTHROUGH
    elif options.writeback and offer.flags & wire.WRITEBACK_CACHE:
        wanted |= wire.WRITEBACK_CACHE
        data_path = WRITEBACK
    ring = over_io_uring and bool(offer.flags & wire.OVER_IO_URING)
    if ring:
        wanted |= wire.OVER_IO_URING
    answer = wire.InitAnswer(
        min(offer.minor, wire.MINOR),
        offer.max_readahead,
        wanted & offer.flags,
        options.max_background,
        max_write,
        pages,
        depth,
    )
    return Agreement(answer, data_path, ring)


def may_register_backing() -> bool:
    """CAP_SYS_ADMIN in the host's user namespace, which registering a backing file takes."""
    try:
        with open("/proc/self/uid_map", encoding="ascii") as file:
            if file.read().split() != ["0", "0", "4294967295"]:
                return False
        with open("/proc/thread-self/status", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("CapEff:"):
                    return bool(int(line.split()[1], 16) >> 21 & 1)
    except OSError:
        pass
    return False
