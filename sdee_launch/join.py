"""Entering an instance: its namespaces, then less privilege than they give.

Joining a user namespace gives its owner every capability in it, so `apply_guard` takes them again:
seccomp first (it needs CAP_SYS_ADMIN, or no_new_privs), then the bounding set, then the rest.

On the path of `sdee run`, so it imports what protocol.py says, and `_ctypes`, for setns(2) before
Python 3.12 and prctl(2): `ctypes` on top of it would take a millisecond more.
"""

import _ctypes
import errno
import posix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x00020000, 0x10000000, 0x20000000
KINDS = {
    "user": CLONE_NEWUSER, "mnt": CLONE_NEWNS, "pid": CLONE_NEWPID, "uts": 0x04000000,
    "ipc": 0x08000000,
}  # fmt: skip
_PR_SET_PDEATHSIG, _PR_CAPBSET_READ, _PR_CAPBSET_DROP = 1, 23, 24
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _PR_SET_NO_NEW_PRIVS = 22, 2, 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_CAPABILITY_VERSION_3 = 0x20080522


class _Int(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "i"


class _Long(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "L"


class _Char(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "c"


class _Call(_ctypes.CFuncPtr):
    """A function of the C library, by its address."""

    _flags_ = 1 | 8  # FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO
    _restype_ = _Int


_library = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]


def _function(name: str, *arguments: "type[_ctypes._SimpleCData[int]]") -> _Call:
    call = _Call(_ctypes.dlsym(_library, name))
    call.argtypes = arguments
    return call


_prctl = _function("prctl", _Int, _Long, _Long, _Long, _Long)
_setns = _function("setns", _Int, _Int)
_capset = _function("capset", _Long, _Long)


def _buffer(data: bytes) -> "_ctypes.Array[_Char]":
    """Bytes that have an address for as long as this is kept."""
    return (_Char * len(data)).from_buffer_copy(data)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = _ctypes.get_errno()
        raise OSError(number, f"{what}: {posix.strerror(number)}")
    return result


def prctl(option: int, *words: int) -> int:
    """prctl(2). Raises OSError."""
    return _checked(int(_prctl(option, *(words + (0, 0, 0, 0))[:4])), "prctl")


def setns(fd: int, kind: int) -> None:
    """setns(2). Raises OSError."""
    _checked(int(_setns(fd, kind)), "setns")


def enter(namespaces: "Sequence[tuple[str, int]]", root: int | None) -> None:
    """Join these namespaces (name, descriptor), user first; children will be in the PID namespace.

    Raises OSError.
    """
    for name, fd in namespaces:
        setns(fd, KINDS[name])
    if root is not None:
        # setns(2) into a mount namespace goes to its root; this is for one that was pivoted since.
        posix.fchdir(root)
        posix.chroot(".")
    # The caller's ids are 0 inside, but a group that it took by newgrp(1) has no name there.
    if posix.getresgid() != (0, 0, 0):
        posix.setresgid(0, 0, 0)
    if posix.getresuid() != (0, 0, 0):
        posix.setresuid(0, 0, 0)


def apply_guard(capabilities: int, seccomp: bytes, no_new_privs: bool) -> None:
    """Give up what the guard doesn't keep, for good. Raises OSError."""
    if no_new_privs:
        prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if seccomp:
        program = _buffer(seccomp)
        # struct sock_fprog: unsigned short, padding, pointer
        word = (len(seccomp) // 8).to_bytes(8, "little")
        fprog = _buffer(word + _ctypes.addressof(program).to_bytes(8, "little"))
        prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _ctypes.addressof(fprog))
    for number in range(64):
        if capabilities >> number & 1:
            continue
        try:
            prctl(_PR_CAPBSET_DROP, number)
        except OSError as error:
            if error.errno == errno.EINVAL:  # past the last one
                break
            if prctl(_PR_CAPBSET_READ, number):  # without CAP_SETPCAP: nothing was to be dropped
                raise
    try:
        prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    except OSError:
        pass  # Linux < 4.3 has none
    low, high = capabilities & 0xFFFFFFFF, capabilities >> 32
    words = (low, low, 0, high, high, 0)  # effective, permitted, inheritable; twice
    data = _buffer(b"".join([w.to_bytes(4, "little") for w in words]))
    head = _buffer(_CAPABILITY_VERSION_3.to_bytes(4, "little") + bytes(4))
    _checked(int(_capset(_ctypes.addressof(head), _ctypes.addressof(data))), "capset")


def die_with_parent(number: int) -> None:
    """Have this process signalled when the one that forked it dies."""
    prctl(_PR_SET_PDEATHSIG, number)
