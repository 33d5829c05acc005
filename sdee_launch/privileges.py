"""What a member of an instance may do: capabilities, the seccomp filter, no_new_privs.

`Guard` is decided once (from the settings) and travels as plain data to everybody who joins:
`as_json` of it is all that a session needs, so that joining compiles nothing. Joining a user
namespace gives its owner every capability in it again, so each join applies the guard anew
(join.py); it is a guard rail and no boundary.
"""

from __future__ import annotations

import errno
import functools
import os
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass

#: By number, as in <linux/capability.h>.
CAPABILITIES = (
    "chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid",
    "setpcap", "linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw",
    "ipc_lock", "ipc_owner", "sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct",
    "sys_admin", "sys_boot", "sys_nice", "sys_resource", "sys_time", "sys_tty_config", "mknod",
    "lease", "audit_write", "audit_control", "setfcap", "mac_override", "mac_admin", "syslog",
    "wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf", "checkpoint_restore",
)  # fmt: skip
#: What root of an environment has by default: what package tools and daemons need of it.
DEFAULT = (
    "chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid",
    "setpcap", "net_bind_service", "net_raw", "ipc_lock", "ipc_owner", "sys_chroot", "sys_ptrace",
    "sys_nice", "mknod", "lease", "audit_write", "setfcap",
)  # fmt: skip
#: Never given, whatever the settings say.
ALWAYS_DROPPED = frozenset(
    {
        "sys_admin", "sys_boot", "sys_module", "sys_rawio", "sys_time", "sys_pacct",
        "sys_tty_config", "sys_resource", "mac_override", "mac_admin", "syslog", "audit_control",
        "audit_read", "wake_alarm", "block_suspend", "perfmon", "bpf", "checkpoint_restore",
        "net_admin", "linux_immutable",
    }
)  # fmt: skip

#: Refused with EPERM: (x86_64, i386, aarch64); None where there is no such call.
_REFUSED: dict[str, tuple[int | None, int | None, int | None]] = {
    "kexec_load": (246, 283, 104),
    "kexec_file_load": (320, None, 294),
    "create_module": (174, 127, None),
    "init_module": (175, 128, 105),
    "finit_module": (313, 350, 273),
    "delete_module": (176, 129, 106),
    "bpf": (321, 357, 280),
    "add_key": (248, 286, 217),
    "request_key": (249, 287, 218),
    "keyctl": (250, 288, 219),
    "open_by_handle_at": (304, 342, 265),
    "userfaultfd": (323, 374, 282),
    "lookup_dcookie": (212, 253, 18),
    "swapon": (167, 87, 224),
    "swapoff": (168, 115, 225),
    "reboot": (169, 88, 142),
    "settimeofday": (164, 79, 170),
    "stime": (None, 25, None),
    "clock_settime": (227, 264, 112),
    "clock_settime64": (None, 404, None),
    "acct": (163, 51, 89),
    "quotactl": (179, 131, 60),
    "quotactl_fd": (443, 443, 443),
    "iopl": (172, 110, None),
    "ioperm": (173, 101, None),
    "uselib": (134, 86, None),
    "nfsservctl": (180, 169, 42),
    "vhangup": (153, 111, 58),
}
_IOCTL = (16, 54, 29)
#: ioctls that put words into a terminal's mouth: TIOCSTI, TIOCLINUX.
_REFUSED_IOCTLS = (0x5412, 0x541C)
_AUDIT_ARCH = {"x86_64": 0xC000003E, "i386": 0x40000003, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000

# <linux/bpf_common.h>, <linux/seccomp.h>
_LD_W_ABS, _JEQ_K, _JGE_K, _RET_K = 0x20, 0x15, 0x35, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NR, _ARCH, _ARGUMENT_1 = 0, 4, 24


@dataclass(frozen=True)
class Guard:
    """`capabilities`: a bit for each one kept. `seccomp`: the filter, an array of sock_filter."""

    capabilities: int
    seccomp: bytes
    no_new_privs: bool = False

    def as_json(self) -> dict[str, object]:
        """As it travels in the answer to a join."""
        return {
            "capabilities": f"{self.capabilities:x}",
            "seccomp": self.seccomp.hex(),
            "no_new_privs": self.no_new_privs,
        }


def capability_mask(names: Iterable[str]) -> int:
    """The bits of these capabilities, without those that are never given. Raises ValueError."""
    mask = 0
    for name in names:
        plain = name.lower().removeprefix("cap_")
        if plain not in CAPABILITIES:
            raise ValueError(f"{name} is no capability")
        if plain not in ALWAYS_DROPPED:
            mask |= 1 << CAPABILITIES.index(plain)
    return mask


def _instruction(code: int, k: int, true: int = 0, false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, true, false, k)


def _section(column: int, allowed: Collection[str]) -> list[bytes]:
    """The part of the filter for one architecture; it always returns."""
    numbers = sorted(
        {row[column] for name, row in _REFUSED.items() if name not in allowed} - {None}  # type: ignore[type-var]
    )
    refuse = _instruction(_RET_K, _ERRNO | errno.EPERM)
    part = [_instruction(_LD_W_ABS, _NR)]
    if column == 0:
        # x32 calls have numbers of their own: no program needs them.
        part += [
            _instruction(_JGE_K, _X32_BIT, 0, 1),
            _instruction(_RET_K, _ERRNO | errno.ENOSYS),
        ]
    for number in numbers:
        assert number is not None
        part += [_instruction(_JEQ_K, number, 0, 1), refuse]
    part += [
        _instruction(_JEQ_K, _IOCTL[column], 1, 0),
        _instruction(_RET_K, _ALLOW),
        # The kernel looks at the lower 32 bits of the request, so do we (little-endian).
        _instruction(_LD_W_ABS, _ARGUMENT_1),
    ]
    for request in _REFUSED_IOCTLS:
        part += [_instruction(_JEQ_K, request, 0, 1), refuse]
    part.append(_instruction(_RET_K, _ALLOW))
    return part


def seccomp_filter(machine: str | None = None, allowed: Collection[str] = ()) -> bytes:
    """The filter as the kernel takes it: an array of struct sock_filter; b"" for other machines.

    `allowed`: calls that the site takes off the list.
    """
    name = machine or os.uname().machine
    columns = {"x86_64": {"x86_64": 0, "i386": 1}, "aarch64": {"aarch64": 2}}.get(name)
    if columns is None:
        return b""
    program = [_instruction(_LD_W_ABS, _ARCH)]
    for architecture, column in columns.items():
        part = _section(column, allowed)
        # Jumps reach 255 instructions; a section is shorter.
        assert len(part) <= 255
        program.append(_instruction(_JEQ_K, _AUDIT_ARCH[architecture], 0, len(part)))
        program += part
    program.append(_instruction(_RET_K, _ERRNO | errno.ENOSYS))
    return b"".join(program)


def make_guard(
    capabilities: Iterable[str] = DEFAULT,
    allowed_calls: Collection[str] = (),
    no_new_privs: bool = False,
) -> Guard:
    """The guard for these settings. Raises ValueError for names that don't exist."""
    for name in allowed_calls:
        if name not in _REFUSED:
            raise ValueError(f"{name} is no call that is refused")
    return _guard(tuple(capabilities), tuple(allowed_calls), no_new_privs)


@functools.lru_cache(maxsize=16)
def _guard(capabilities: tuple[str, ...], allowed: tuple[str, ...], no_new_privs: bool) -> Guard:
    return Guard(capability_mask(capabilities), seccomp_filter(allowed=allowed), no_new_privs)
