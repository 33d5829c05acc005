"""With whose ids a thread creates files: the caller's, with the server's capabilities kept.

As overlayfs does, so that a new object belongs to its owner from its first instant (also for quotas
and NFS). The fs ids are a thread's own; a change costs three system calls, and a thread that
serves one user changes once. CAP_SYS_RESOURCE is forgone: quotas and reserved blocks count.
"""

from __future__ import annotations

import ctypes
import os
import threading

CAP_CHOWN = 0
CAP_DAC_READ_SEARCH = 2
CAP_SETGID = 6
CAP_SETUID = 7
CAP_SYS_ADMIN = 21
CAP_SYS_RESOURCE = 24

_VERSION_3 = 0x20080522
_libc = ctypes.PyDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Sets(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("e0", "p0", "i0", "e1", "p1", "i1")]


class _Thread(threading.local):
    uid = -1
    gid = -1
    ready = False
    powers = 0


_thread = _Thread()
#: Another number once a thread is another than it was; who remembers what a thread is compares it.
generation = 0


def _capabilities() -> _Sets:
    sets = _Sets()
    _libc.capget(ctypes.byref(_Header(_VERSION_3, 0)), ctypes.byref(sets))
    return sets


def permitted() -> int:
    """The capabilities that this thread may use, as a bit mask."""
    sets = _capabilities()
    return int(sets.p0) | int(sets.p1) << 32


def has(capability: int) -> bool:
    """Whether this thread may use a capability (in its own user namespace)."""
    return bool(permitted() >> capability & 1)


def _raise_all() -> None:
    """Every permitted capability but CAP_SYS_RESOURCE becomes effective."""
    sets = _capabilities()
    sets.e0 = sets.p0 & ~(1 << CAP_SYS_RESOURCE)
    sets.e1 = sets.p1
    _libc.capset(ctypes.byref(_Header(_VERSION_3, 0)), ctypes.byref(sets))


def _changed() -> None:
    # Of two threads here at once one count may be lost: each sees another number than it had before.
    global generation
    generation += 1


def settle() -> None:
    """Bring the calling thread into the state in which it may write to upper."""
    if not _thread.ready:
        _prepare()


def _prepare() -> None:
    powers = permitted()
    _thread.powers = powers
    if powers:
        _raise_all()
    _thread.uid, _thread.gid = os.geteuid(), os.getegid()
    _thread.ready = True


def become(uid: int, gid: int) -> bool:
    """Create what follows as these ids; False where this thread may not."""
    t = _thread
    if t.uid == uid and t.gid == gid:
        return True
    if not t.ready:
        _prepare()
        if t.uid == uid and t.gid == gid:
            return True
    if not (t.powers >> CAP_SETUID & 1 and t.powers >> CAP_SETGID & 1):
        return False
    _changed()
    _libc.setfsgid(ctypes.c_uint32(gid))
    _libc.setfsuid(ctypes.c_uint32(uid))
    # The calls report nothing: ask what came of them.
    t.gid = _libc.setfsgid(ctypes.c_uint32(0xFFFFFFFF)) & 0xFFFFFFFF
    t.uid = _libc.setfsuid(ctypes.c_uint32(0xFFFFFFFF)) & 0xFFFFFFFF
    _raise_all()
    return t.uid == uid and t.gid == gid


def restore() -> None:
    """Give the calling thread its own ids and capabilities back."""
    t = _thread
    if not t.ready:
        return
    _changed()
    if t.powers:
        _libc.setfsgid(ctypes.c_uint32(os.getegid()))
        _libc.setfsuid(ctypes.c_uint32(os.geteuid()))
        sets = _capabilities()
        sets.e0, sets.e1 = sets.p0, sets.p1
        _libc.capset(ctypes.byref(_Header(_VERSION_3, 0)), ctypes.byref(sets))
    t.uid = t.gid = -1
    t.ready = False
