"""Option strings: overlayfs's names and escapes, mount(8)'s words, and errors with a name in them."""

from __future__ import annotations

import pytest

from mount_helpers import syscalls
from mount_helpers.namespaces import IdRange
from sdeefs.core.settings import RedirectDir, WhiteoutForm
from sdeefs.options import UsageError, parse, split, split_lowers


def test_overlayfs_options() -> None:
    options = parse(["lowerdir=/a:/b,upperdir=/u,workdir=/w", "index=off,xino=auto,volatile"])
    settings = options.settings(userxattr=False)
    assert settings.lowers == (b"/a", b"/b")
    assert (settings.upper, settings.work) == (b"/u", b"/w")
    assert (settings.index, settings.xino, settings.volatile) == (False, True, True)
    assert not settings.userxattr
    assert parse(["userxattr"]).settings(userxattr=False).userxattr
    assert parse(["lowerdir=/a,redirect_dir=follow"]).fields["redirect_dir"] is RedirectDir.FOLLOW


def test_lowers_alone_are_read_only() -> None:
    assert parse(["lowerdir=/a"]).settings(userxattr=False).read_only
    with pytest.raises(UsageError, match="workdir"):
        parse(["lowerdir=/a,workdir=/w"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"/a\:b:/c", (b"/a:b", b"/c")),
        (r"/a\\:/c", (b"/a\\", b"/c")),
        ("/ä", ("/ä".encode(),)),
        ("/a b", (b"/a b",)),
    ],
)
def test_colons_of_lowers(text: str, expected: tuple[bytes, ...]) -> None:
    assert split_lowers(text) == expected


def test_commas_of_values() -> None:
    assert split(r"lowerdir=/a\,b,ro") == ["lowerdir=/a,b", "ro"]
    assert parse([r"lowerdir=/a\,b\:c,ro"]).lowers == (b"/a,b:c",)
    assert parse([r"lowerdir=/l,upperdir=/u:1,workdir=/w\,2"]).upper == b"/u:1"


@pytest.mark.parametrize("text", ["/a::/data", "", ":/a", "/a:"])
def test_lowers_that_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="lowerdir"):
        parse([f"lowerdir={text}"])


def test_what_mount_and_fstab_add() -> None:
    options = parse(
        [
            "rw,suid,dev,exec,auto,nouser,async,defaults,_netdev,nofail,x-systemd.automount,"
            "default_permissions,allow_other,noatime,lowerdir=/a"
        ]
    )
    assert options.allow_other is True
    assert options.attributes == syscalls.MOUNT_ATTR_NOATIME
    options = parse(["nosuid,nodev,noexec,suid,ro"])
    assert options.attributes == syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC
    assert options.read_only
    assert not parse(["ro", "rw"]).read_only


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(UsageError, match="'lowedir'"):
        parse(["lowedir=/a"])
    assert parse(["lowedir=/a,ro"], sloppy=True).read_only


@pytest.mark.parametrize(
    "text",
    [
        "metacopy=on", "nfs_export=on", "verity=require", "index=maybe", "redirect_dir=yes",
        "xino=2", "upperdir=", "upperdir", "ro=1", "whiteouts=none", "lower_timeout=-1",
        "lower_timeout=soon", "threads=0", "transport=smoke", "secrets=root",
        "uidmap=0:1", "uidmap=0:0:0", "uidmap=a:b:c", "uidmap=0:0:10:5:100:10", "gidmap=0:-1:1",
        "uidmap=0:4294967290:100", "uidmap=0:4294967295:1", "secrets=-5", "secrets=4294967295",
        "metacopy", "uuid", "redirect_dir", "whiteouts", "passthrough=maybe", "override_stat=x",
    ],
)  # fmt: skip
def test_values_that_are_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match=text.partition("=")[0]) as caught:
        parse([text])
    assert "None" not in str(caught.value)


def test_id_maps_of_both_layers_and_of_one() -> None:
    both = parse(["uidmap=0:1000:1:1:100000:65536,gidmap=0:7:1"]).fields
    assert both["uid_upper"] == both["uid_lower"]
    assert both["uid_upper"] == (IdRange(0, 1000, 1), IdRange(1, 100000, 65536))
    assert both["gid_lower"] == (IdRange(0, 7, 1),)
    one = parse(["lower_uidmap=0:1:2"]).fields
    assert one == {"uid_lower": (IdRange(0, 1, 2),)}


def test_our_own_options() -> None:
    options = parse(
        [
            "passthrough=off,writeback=on,watch=auto,whiteouts=xattr,noxattr,secrets=1000:10:20,"
            "timeout=3,upper_timeout=5,squash_overflow,override_stat=auto,transport=device"
        ]
    )
    assert (options.passthrough, options.writeback, options.watch) == (False, True, None)
    assert options.transport == "device"
    fields = options.fields
    assert fields["whiteouts"] is WhiteoutForm.XATTR
    assert fields["secrets"] == (1000, 10, 20)
    assert (fields["lower_timeout"], fields["upper_timeout"]) == (3, 5)
    assert fields["noxattr"] and fields["squash_overflow"] and fields["override_stat"] is None


def test_what_fuse_overlayfs_takes() -> None:
    text = "lowerdir=/a,upperdir=/u,workdir=/w,context=x,threaded=0,static_nlink,fsync=0,noxattrs=1"
    options = parse([text], drop_in=True)
    assert options.fields == {"volatile": True, "noxattr": True}
    with pytest.raises(UsageError, match="threaded"):
        parse([text])
    with pytest.raises(UsageError, match="nonsense"):
        parse(["nonsense"], drop_in=True)
