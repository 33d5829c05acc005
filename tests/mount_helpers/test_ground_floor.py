"""The ground floor for real: system calls, maps, mountinfo, and probes that tell the truth."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mount_helpers import probe, syscalls
from mount_helpers.mountinfo import mount_at, parse_line, read_mounts
from mount_helpers.namespaces import IdRange, subordinate_ids, user_namespace
from mount_helpers.trials import TrialFailed, in_child, private_mounts


def test_mountinfo_unescapes() -> None:
    line = (
        b"36 35 98:0 /a\\040b /mnt\\0112 rw,noatime master:1 - fuse.sdeefs src\\134x rw,errors=c\n"
    )
    mount = parse_line(line)
    assert mount.root == b"/a b"
    assert mount.point == b"/mnt\t2"
    assert mount.source == b"src\\x"
    assert mount.fstype == "fuse.sdeefs"
    assert mount.device == (98, 0)
    assert mount.propagation == "master:1"


def test_root_is_mounted() -> None:
    assert mount_at(b"/") in read_mounts()
    assert mount_at(b"/no such place") is None


def test_errors_name_the_path() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        syscalls.umount2("/no/such/place")
    assert caught.value.filename == "/no/such/place"
    with pytest.raises(OSError) as refused:
        syscalls.openat2(
            syscalls.AT_FDCWD, "/etc/passwd", os.O_RDONLY, resolve=syscalls.RESOLVE_BENEATH
        )
    assert refused.value.errno == errno.EXDEV


def test_an_idmapped_mount_shifts_owners(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")

    def trial() -> str:
        private_mounts()
        ids = [IdRange(0, 4242, 1)]
        namespace = user_namespace(ids, ids)
        tree = syscalls.open_tree(syscalls.AT_FDCWD, str(tmp_path), syscalls.OPEN_TREE_CLONE)
        syscalls.mount_setattr(
            tree,
            b"",
            syscalls.AT_EMPTY_PATH,
            attr_set=syscalls.MOUNT_ATTR_IDMAP,
            userns_fd=namespace,
        )
        return str(os.stat("file", dir_fd=tree).st_uid)

    assert in_child(trial) == (True, "4242")


def test_a_trial_that_fails_or_hangs_says_so() -> None:
    def fails() -> str:
        raise TrialFailed("it is Tuesday")

    def hangs() -> str:
        os.read(os.pipe()[0], 1)
        return ""

    def missing() -> str:
        os.stat("/no/such")
        return ""

    assert in_child(fails) == (False, "it is Tuesday")
    assert in_child(missing) == (False, "/no/such: No such file or directory")
    works, why = in_child(hangs, seconds=0.2)
    assert not works
    assert "no answer" in why


def test_handles_name_the_same_object(tmp_path: Path) -> None:
    first = syscalls.name_to_handle_at(syscalls.AT_FDCWD, str(tmp_path))
    assert first == syscalls.name_to_handle_at(syscalls.AT_FDCWD, str(tmp_path))
    (tmp_path / "other").mkdir()
    assert first != syscalls.name_to_handle_at(syscalls.AT_FDCWD, str(tmp_path / "other"))


def test_the_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    findings = {f.name: f for f in probe.probe(tmp_path)}
    assert list(tmp_path.iterdir()) == []
    assert not [m for m in read_mounts() if bytes(tmp_path) in m.point]
    for name in ("overlay", "overlay-userxattr", "fuse", "fanotify", "idmapped-mounts"):
        assert findings[name].works, findings[name]
    assert all(f.detail for f in findings.values())


def test_the_probe_names_what_is_missing(tmp_path: Path) -> None:
    finding = probe.kernel_overlay(tmp_path / "absent")
    assert not finding.works
    assert "absent" in finding.detail


def test_subordinate_ids_of_a_user(alice: object) -> None:
    uids, gids = subordinate_ids(alice.uid)  # type: ignore[attr-defined]
    assert uids == gids == [(21010000, 65536)]
    assert subordinate_ids(4294967) == ([], [])
