"""What is hidden from whom, and the layer that hides it: first as data, then on disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from pathlib import Path

import pytest

from sdee_launch import mask_scan, mask_watch, masks, stand_ins
from sdee_launch.mask_scan import Hidden, hidden_from, scan
from tests.env.daemon_lab import wait_for


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    """A small host."""
    root = tmp_path / "lower"
    for name, mode in (
        ("etc", 0o755), ("etc/ssh", 0o755), ("etc/private", 0o700), ("etc/adm", 0o750),
        ("home", 0o755), ("home/alice", 0o755), ("tmp", 0o1777), ("x-only", 0o711),
    ):  # fmt: skip
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name).chmod(mode)
    for name, mode, text in (
        ("etc/passwd", 0o644, "root:x:0:0::/root:/bin/sh\nann:x:1:1::/:/bin/sh\n"),
        ("etc/shadow", 0o640, "root:$6$secret:1::::::\n"),
        ("etc/ssh/key", 0o600, "secret"),
        ("etc/ssh/key.pub", 0o644, "public"),
        ("etc/empty", 0o600, ""),
        ("etc/private/inner", 0o644, "secret"),
        ("etc/adm/open", 0o644, "for adm"),
        ("etc/adm/closed", 0o600, "secret"),
        ("etc/not-the-group", 0o604, "for all but the group"),
        ("home/alice/mine", 0o600, "secret"),
        ("tmp/any", 0o600, "secret"),
        ("x-only/known", 0o644, "secret"),
    ):
        (root / name).write_text(text)
        (root / name).chmod(mode)
    (root / "etc/link").symlink_to("ssh/key")
    os.chown(root / "etc/adm", 0, 4)
    os.chown(root / "etc/not-the-group", 0, 50)
    return root


def _paths(items: list[Hidden]) -> set[str]:
    return {os.fsdecode(item.path) for item in items}


def test_an_ordinary_user_is_denied_what_the_host_denies(lower: Path) -> None:
    found = list(scan(bytes(lower)))
    assert _paths(hidden_from(found, 1000, frozenset({1000}))) == {
        "etc/shadow", "etc/ssh/key", "etc/empty", "etc/private", "etc/adm", "home/alice", "tmp",
        "x-only",
    }  # fmt: skip


def test_groups_count_as_on_the_host(lower: Path) -> None:
    found = list(scan(bytes(lower)))
    hidden = _paths(hidden_from(found, 1000, frozenset({1000, 4, 50})))
    assert "etc/adm" not in hidden
    assert "etc/adm/closed" in hidden
    assert "etc/adm/open" not in hidden
    assert "etc/not-the-group" in hidden


def test_mounts_that_are_bound_are_not_walked(lower: Path) -> None:
    found = list(scan(bytes(lower), frozenset({bytes(lower / "etc")})))
    assert not any(item.path.startswith(b"etc") for item in found)


def test_a_directory_with_too_much_is_hidden_whole(
    lower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask_scan, "MOST_IN_ONE", 3)
    (lower / "many").mkdir()
    for number in range(5):
        (lower / "many" / str(number)).touch(0o600)
    found = list(scan(bytes(lower)))
    assert [x.path for x in found if x.path.startswith(b"many")] == [b"many"]
    assert "many" in _paths(hidden_from(found, 1000, frozenset()))


def test_a_path_too_long_to_walk_is_hidden(lower: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_scan, "LONGEST_PATH", 10)
    deep = lower / "etc/abcdefgh"
    deep.mkdir()
    (deep / "secret").touch(0o600)
    hidden = _paths(hidden_from(list(scan(bytes(lower))), 1000, frozenset()))
    assert "etc/abcdefgh" in hidden


def test_lines_of_a_scan_survive_the_way(lower: Path) -> None:
    strange = Hidden(b"etc/\xff\n\"'\\", 0o100600, 1, 2, 3, False)
    for item in [*scan(bytes(lower)), strange]:
        assert mask_scan.from_line(mask_scan.to_line(item)) == item
    for line in ("", "[]", "{}", '["a",1,2]', "whole"):
        with pytest.raises(ValueError):
            mask_scan.from_line(line)


def test_the_plan_for_the_kernel(lower: Path) -> None:
    hidden = hidden_from(scan(bytes(lower)), 1000, frozenset({1000}))
    nodes = masks.plan(hidden, masks.KERNEL, root=str(lower))
    assert nodes[b"etc/ssh/key"].mode == stat.S_IFREG
    assert nodes[b"etc/ssh/key"].uid == masks.SECRET_ID
    assert nodes[b"etc/private"].opaque
    assert nodes[b"etc/empty"].uid == 0 and nodes[b"etc/empty"].mode & 0o777 == 0o600
    assert nodes[b"etc/shadow"].content == b"root:*:1:0:99999:7:::\nann:*:1:0:99999:7:::\n"
    assert nodes[b"tmp"].opaque and nodes[b"tmp"].mode & 0o7777 == 0o1777
    assert not nodes[b"etc"].opaque and b"etc/ssh/key.pub" not in nodes
    assert list(nodes) == sorted(nodes)
    assert masks.digest(nodes, masks.KERNEL) != masks.digest(nodes, masks.FUSE)


def test_the_plan_for_sdeefs_holds_only_stand_ins(lower: Path) -> None:
    hidden = hidden_from(scan(bytes(lower)), 1000, frozenset({1000}))
    nodes = masks.plan(hidden, masks.FUSE, root=str(lower))
    assert set(nodes) == {b"etc", b"etc/shadow", b"etc/empty"}
    assert nodes[b"etc/shadow"].mode & 0o444 == 0o444


def test_stand_ins_have_the_names_and_no_hash() -> None:
    passwd = b"root:x:0:0::/root:/bin/sh\n+nis::::::\n\nbroken\nann:x:1:1::/:/bin/sh"
    assert stand_ins.shadow(passwd).splitlines() == [
        b"root:*:1:0:99999:7:::", b"ann:*:1:0:99999:7:::",
    ]  # fmt: skip
    assert stand_ins.gshadow(b"a:x:1:u,v\nb:x:2:\n") == b"a:*::u,v\nb:*::\n"
    assert stand_ins.is_blank(b"var/log/apt/term.log")
    assert not stand_ins.is_blank(b"etc/munge/munge.key")


def test_trees_are_whole_named_by_content_and_pruned(tmp_path: Path) -> None:
    store = masks.Masks(str(tmp_path / "masks"))
    try:
        assert not store.complete
        with pytest.raises(RuntimeError):
            store.tree(1000, [1000], masks.KERNEL)
        with pytest.raises(ValueError, match="whole"):
            store.accept(mask_scan.to_line(Hidden(b"x", 0o100600, 0, 0, 1, False)) + "\n", 0.0)
        items = [
            Hidden(b"etc/none-such", 0o100600, 0, 0, 1, False),
            Hidden(b"etc/group-only", 0o100640, 0, 4, 1, False),
        ]
        store.accept("".join(mask_scan.to_line(x) + "\n" for x in items) + "whole\n", 0.0)
        first = store.tree(1000, [1000], masks.KERNEL)
        assert store.tree(1001, [1001], masks.KERNEL) == first
        second = store.tree(1000, [4], masks.KERNEL)
        assert second != first
        status = os.stat(f"{first}/etc/none-such")
        assert (status.st_uid, status.st_mode & 0o777, status.st_size) == (masks.SECRET_ID, 0, 0)
        assert os.path.exists(f"{first}/etc/group-only")
        assert not os.path.exists(f"{second}/etc/group-only")
        assert os.stat(store.directory).st_mode & 0o777 == 0o700
        store.accept(mask_scan.to_line(items[0]) + "\nwhole\n", 1.0)
        for _ in range(2):
            store.release(first)
        store.prune([])
        assert not os.path.exists(first)
        assert os.path.exists(second)  # still pinned
        assert store.known_tree(1000, [4], masks.KERNEL) is None  # of the scan before
        store.release(second)
        store.prune([])
        third = store.tree(1000, [4], masks.KERNEL)
        assert third not in (first, second)
        store.prune([third])
        assert os.listdir(f"{store.directory}/trees") == [os.path.basename(third)]
        again = masks.Masks(store.directory)
        assert not again.load(60)  # of another time
        assert not again.complete
    finally:
        store.close()


def test_some_paths_are_looked_at_again(lower: Path) -> None:
    """As a whole scan would find it, whatever happened there."""
    where = bytes(lower)

    def check(*changed: str) -> None:
        nonlocal known
        now = mask_scan.again(known, [os.fsencode(x) for x in changed], (), where)
        assert now == sorted(scan(where, homes=()))
        known = now

    known = sorted(scan(where, homes=()))
    (lower / "etc/new").write_text("x")
    (lower / "etc/new").chmod(0o600)
    (lower / "etc/plain").write_text("x")
    check("etc/new", "etc/plain", "etc/none")
    (lower / "etc/new").chmod(0o644)
    tree = lower / "etc/tree/deep"
    tree.mkdir(parents=True)
    (tree / "key").touch(0o600)
    check("etc/new", "etc/tree")
    (lower / "etc/tree").chmod(0o700)
    check("etc/tree")
    (tree / "other").touch(0o600)
    check("etc/tree/deep/other")
    (lower / "etc/tree").chmod(0o755)
    check("etc/tree")
    shutil.rmtree(lower / "etc/tree")
    check("etc/tree/deep/key", "etc/tree")


def test_directories_of_secrets_are_watched(lower: Path) -> None:
    def changed() -> set[bytes] | None:
        return watch.changed()

    def is_changed(path: bytes) -> None:
        wait_for(lambda: path in (changed() or ()), os.fsdecode(path), 10)

    (lower / "opt/program").mkdir(parents=True)
    (lower / "opt/others").mkdir()
    os.chown(lower / "opt/others", 1000, 1000)
    with contextlib.closing(mask_watch.Watch(bytes(lower))) as watch:
        watch.cover([b"opt/program/key", b"opt/others/key", b"none/such"])
        assert changed() == set()
        (lower / "etc/new").touch()
        is_changed(b"etc/new")
        (lower / "etc/new").write_text("data is nothing new")
        (lower / "opt/others/key").touch()
        assert changed() == set()
        (lower / "etc/new").chmod(0o600)
        is_changed(b"etc/new")
        (lower / "opt/program/key").touch()
        is_changed(b"opt/program/key")
        (lower / "etc/directory/below").mkdir(parents=True)
        is_changed(b"etc/directory")
        watch.mark_below(b"etc/directory")
        (lower / "etc/directory/below/key").touch()
        is_changed(b"etc/directory/below/key")
        for number in range(mask_watch.MOST_NAMES + 1):
            (lower / f"etc/{number}").touch()
        assert changed() is None
        assert changed() == set()


def test_a_tree_in_use_only_grows(tmp_path: Path) -> None:
    def accept(*found: Hidden) -> None:
        store.accept("".join(mask_scan.to_line(x) + "\n" for x in found) + "whole\n", 0.0)

    store = masks.Masks(str(tmp_path / "masks"))
    try:
        with pytest.raises(RuntimeError):
            store.extend("none", 1000, [1000])
        key = Hidden(b"etc/none-such", 0o100600, 0, 0, 1, False)
        accept(key)
        tree = store.tree(1000, [1000], masks.KERNEL)
        assert store.in_force(tree)
        assert not store.extend(tree, 1000, [1000])  # it is as the scan has it
        more = (
            Hidden(b"etc/other", 0o100600, 0, 0, 1, False),
            Hidden(b"opt/closed", 0o040700, 0, 0, 1, False),
            Hidden(b"etc/none-such/below", 0o100600, 0, 0, 1, False),  # a directory by now
        )
        accept(*more)
        assert not store.in_force(tree)
        assert store.extend(tree, 1000, [1000])
        assert not store.extend(tree, 1000, [1000])
        assert os.stat(f"{tree}/etc/other").st_uid == masks.SECRET_ID
        assert os.getxattr(f"{tree}/opt/closed", "user.overlay.opaque") == b"y"
        assert os.path.isfile(f"{tree}/etc/none-such")
        assert sorted(os.listdir(store.directory)) == ["scan", "trees"]
        accept(key)
        assert store.tree(1000, [1000], masks.KERNEL) != tree  # it hides more than its name says
        accept(Hidden(b"etc", 0o040700, 0, 0, 1, False))
        assert store.extend(tree, 1000, [1000])
        assert os.getxattr(f"{tree}/etc", "user.overlay.opaque") == b"y"
        assert not store.extend(tree, 1000, [1000])
    finally:
        store.close()


def test_the_scan_of_this_machine_finds_its_secrets() -> None:
    found = list(scan(foreign_mounts=mask_scan.foreign_mounts()))
    hidden = _paths(hidden_from(found, 54321, frozenset({54321})))
    assert {"etc/shadow", "root", "tmp"} <= hidden
    assert not any(path.startswith(("proc/", "sys/", "dev/", "usr/bin/")) for path in hidden)
