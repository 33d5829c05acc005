"""The seccomp filter, run in a small machine of classic BPF: what each call of each ABI gets."""

from __future__ import annotations

import errno
import struct

import pytest

from sdee_launch import privileges

X86_64, I386, AARCH64, ARM = 0xC000003E, 0x40000003, 0xC00000B7, 0x40000028
ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS


def _run(program: bytes, arch: int, number: int, *arguments: int) -> int:
    """What the filter answers."""
    words = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack(
        "=iIQ6Q", number if number < 1 << 31 else number - (1 << 32), arch, 0, *words
    )
    code = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    accumulator = at = 0
    while True:
        operation, true, false, k = code[at]
        at += 1
        if operation == 0x20:
            accumulator = struct.unpack_from("=I", data, k)[0]
        elif operation == 0x15:
            at += true if accumulator == k else false
        elif operation == 0x35:
            at += true if accumulator >= k else false
        elif operation == 0x06:
            return int(k)
        else:
            raise AssertionError(f"{operation:#x}")


@pytest.mark.parametrize(
    ("machine", "arch", "column"),
    [("x86_64", X86_64, 0), ("x86_64", I386, 1), ("aarch64", AARCH64, 2)],
)
def test_each_call_of_the_list(machine: str, arch: int, column: int) -> None:
    program = privileges.seccomp_filter(machine)
    refused = {row[column] for row in privileges._REFUSED.values()}
    for number in range(600):
        if number == privileges._IOCTL[column]:
            continue
        expected = EPERM if number in refused else ALLOW
        assert _run(program, arch, number) == expected, number


@pytest.mark.parametrize(
    ("machine", "arch", "ioctl"),
    [("x86_64", X86_64, 16), ("x86_64", I386, 54), ("aarch64", AARCH64, 29)],
)
def test_ioctls_by_their_lower_half(machine: str, arch: int, ioctl: int) -> None:
    program = privileges.seccomp_filter(machine)
    assert _run(program, arch, ioctl, 0, 0x5413) == ALLOW
    for request in (0x5412, 0x541C, 0x5412 | 7 << 32):
        assert _run(program, arch, ioctl, 0, request) == EPERM


def test_other_abis() -> None:
    program = privileges.seccomp_filter("x86_64")
    assert _run(program, X86_64, 0x40000000) == ENOSYS  # x32
    assert _run(program, X86_64, 0xFFFFFFFF) == ENOSYS
    assert _run(program, ARM, 1) == ENOSYS
    assert _run(privileges.seccomp_filter("aarch64"), ARM, 1) == ENOSYS
    assert privileges.seccomp_filter("riscv64") == b""


def test_calls_taken_off_the_list() -> None:
    program = privileges.seccomp_filter("x86_64", allowed=("keyctl",))
    assert _run(program, X86_64, 250) == ALLOW
    assert _run(program, X86_64, 248) == EPERM
    with pytest.raises(ValueError, match="no call that is refused"):
        privileges.make_guard(allowed_calls=("read",))


def test_the_guard_as_it_travels() -> None:
    guard = privileges.make_guard(("chown", "sys_admin"), no_new_privs=True)
    assert guard.as_json() == {
        "capabilities": "1",
        "seccomp": guard.seccomp.hex(),
        "no_new_privs": True,
    }
