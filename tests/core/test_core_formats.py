"""What stands on disk: pure functions."""

from __future__ import annotations

import os
import stat

import pytest

from mount_helpers.namespaces import IdRange
from sdeefs.core import formats, ids


def test_overlay_xattrs_are_hidden_and_nested_ones_escaped() -> None:
    names = formats.OverlayNames(userxattr=False)
    assert names.to_shown(b"trusted.overlay.opaque") is None
    assert names.to_stored(b"trusted.overlay.opaque") == b"trusted.overlay.overlay.opaque"
    assert names.to_shown(b"trusted.overlay.overlay.opaque") == b"trusted.overlay.opaque"
    assert names.to_stored(b"user.overlay.opaque") == b"user.overlay.opaque"
    assert names.is_private(b"trusted.overlay.x")
    assert not names.is_private(b"trusted.overlay.overlay.x")


def test_a_handle_survives_encoding() -> None:
    handle = b"\1\0\0\0" + b"\5\0\0\0" + b"\7\0\0\0"
    value = formats.encode_handle(handle, b"u" * 16, upper=False)
    assert value[1] == 0xFB and value[2] == len(value) == 29
    assert formats.decode_handle(value) == (b"u" * 16, handle)
    assert formats.inode_of_handle(handle) == 5
    assert formats.index_name(value) == value.hex().encode()
    for broken in (b"", value[:10], b"\1" + value[1:], value[:2] + b"\xff" + value[3:]):
        assert formats.decode_handle(broken) is None


@pytest.mark.parametrize(
    ("value", "links"),
    [(b"U+1", 3), (b"U-1", 1), (b"L+0", 5), (b"L-5", None), (b"X+1", None), (b"U", None)],
)
def test_links(value: bytes, links: int | None) -> None:
    assert formats.parse_nlink(value, 2, 5) == links


@pytest.mark.parametrize(
    ("redirect", "valid"),
    [(b"/a/b", True), (b"a", True), (b"a/b", False), (b"/a/../b", False), (b"/", False), (b"", False)],
)  # fmt: skip
def test_redirects(redirect: bytes, valid: bool) -> None:
    assert formats.valid_redirect(redirect) is valid


def test_id_maps() -> None:
    owners = ids.Owners((IdRange(0, 1000, 1), IdRange(1, 5000, 10)), (), squash_overflow=False)
    assert owners.shown(1000, 7) == (0, 7)
    assert owners.shown(5004, 7) == (5, 7)
    assert owners.shown(3, 7) == (ids.OVERFLOW, 7)
    assert owners.stored_uid(5) == 5004
    with pytest.raises(OSError, match="no place"):
        owners.stored_uid(70_000)
    acl = ids.pack_acl([(1, 7, 0xFFFFFFFF), (2, 6, 5), (4, 5, 0xFFFFFFFF)])
    assert ids.acl_entries(owners.acl_stored(acl))[1] == (2, 6, 5004)
    assert owners.acl_shown(owners.acl_stored(acl)) == acl


def test_override_stat() -> None:
    text = ids.format_override(3, 4, stat.S_IFCHR | 0o4640, os.makedev(5, 6), stat.S_IFREG | 0o600)
    assert text == b"3:4:4640:char-5-6"
    assert ids.parse_override(text, stat.S_IFREG | 0o600) == (
        3, 4, stat.S_IFCHR | 0o4640, os.makedev(5, 6),
    )  # fmt: skip
    assert ids.parse_override(b"0:0:755", stat.S_IFDIR) == (0, 0, stat.S_IFDIR | 0o755, 0)
    assert ids.parse_override(b"nonsense", 0) is None


def test_a_default_acl_is_inherited() -> None:
    default = ids.pack_acl(
        [(1, 7, 0xFFFFFFFF), (2, 6, 9), (4, 5, 0xFFFFFFFF), (0x10, 7, 0xFFFFFFFF), (0x20, 4, 0xFFFFFFFF)]
    )  # fmt: skip
    mode, access = ids.inherited_acl(default, stat.S_IFREG | 0o660)
    assert mode == stat.S_IFREG | 0o660
    assert access is not None
    assert [e[:2] for e in ids.acl_entries(access)] == [
        (1, 6),
        (2, 6),
        (4, 5),
        (0x10, 6),
        (0x20, 0),
    ]
    plain = ids.pack_acl([(1, 7, 0xFFFFFFFF), (4, 5, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF)])
    assert ids.inherited_acl(plain, 0o666) == (0o640, None)
