"""Full disks, read-only uppers, vanishing lowers: an errno for the caller, and nothing half-done."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fslab import fslab_lab as lab
from tests.fslab.oracle import Run, make_lower
from tests.fslab.oracle_player import differences, snapshot

ENGINES = lab.chosen(lab.RING, lab.PASSTHROUGH, lab.WRITEBACK, lab.DEVICE_PLAIN, lab.PYFUSE3)
ANY_LOG = re.compile(r".*")


def each_engine(*engines: lab.Engine) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("engine", engines or ENGINES, ids=lambda engine: engine.name)


def layers_on(fs: Path, base: Path) -> lab.Layers:
    """Upper and work on a filesystem of their own, lower and merged in base."""
    made = lab.Layers.make(base)
    upper, work = fs / "upper", fs / "work"
    upper.mkdir()
    work.mkdir()
    return lab.Layers(base, upper, made.lowers, work, made.merged)


@each_engine()
def test_full_disk(engine: lab.Engine) -> None:
    with lab.workspace("full") as base, lab.filesystem("tmpfs", base, "4m") as fs:
        layers = layers_on(fs, base)
        lower = layers.lowers[0]
        (lower / "big").write_bytes(os.urandom(6 << 20))
        (lower / "small").write_bytes(b"small")
        (lower / "d").mkdir()
        for number in range(5):
            (lower / f"d/f{number}").write_bytes(b"x" * 1000)
        before = snapshot(str(lower))
        with lab.mounted(engine, layers, log=ANY_LOG):
            merged = layers.merged
            for call in (
                lambda: os.open(merged / "big", os.O_WRONLY),
                lambda: os.chmod(merged / "big", 0o600),
                lambda: os.truncate(merged / "big", 5 << 20),
                lambda: os.rename(merged / "big", merged / "bigger"),
                lambda: os.link(merged / "big", merged / "second"),
            ):
                assert lab.error_of(call) == "ENOSPC"
            assert not differences(snapshot(str(merged)), before)
            # What needs no data still works, and so does a small copy-up.
            fd = os.open(merged / "big", os.O_WRONLY | os.O_TRUNC)
            os.close(fd)
            (merged / "small").write_bytes(b"changed")
            # Fill it with a new file: the error reaches the writer at the latest at fsync.
            fd = os.open(merged / "filler", os.O_CREAT | os.O_WRONLY)
            errors = set()
            try:
                for _ in range(200):
                    os.write(fd, b"z" * 65536)
                os.fsync(fd)
            except OSError as error:
                errors.add(error.errno)
            finally:
                try:
                    os.close(fd)
                except OSError as error:
                    errors.add(error.errno)
            assert errors == {28}
            os.unlink(merged / "filler")
            (merged / "small").write_bytes(b"again")
            assert (merged / "small").read_bytes() == b"again"
            assert (merged / "big").stat().st_size == 0
        assert not [p for p in fs.glob("work/work/*") if p.name != "incompat"]
        with lab.mounted(engine, layers):
            assert (layers.merged / "small").read_bytes() == b"again"
            assert sorted(os.listdir(layers.merged)) == ["big", "d", "small"]


@each_engine(*lab.chosen(lab.RING, lab.PYFUSE3))
def test_no_inodes_left(engine: lab.Engine) -> None:
    with lab.workspace("inodes") as base:
        fs = base / "fs"
        fs.mkdir()
        lab.run("mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=40,mode=755", "tmpfs", fs)
        try:
            layers = layers_on(fs, base)
            for number in range(60):
                (layers.lowers[0] / f"f{number}").write_text(str(number))
            with lab.mounted(engine, layers, log=ANY_LOG):
                failed = 0
                for number in range(60):
                    try:
                        (layers.merged / f"f{number}").write_text(f"new {number}")
                    except OSError as error:
                        assert error.errno == 28
                        failed += 1
                assert failed
                for number in range(60):
                    text = (layers.merged / f"f{number}").read_text()
                    assert text in (str(number), f"new {number}")
                assert len(os.listdir(layers.merged)) == 60
        finally:
            lab.unmount_filesystem(fs)


def remount(fs: Path, option: str) -> bool:
    """False while a file is still open for writing."""
    command = ["mount", "-i", "-o", f"remount,{option}", str(fs)]
    return subprocess.run(command, check=False, capture_output=True, timeout=60).returncode == 0


@each_engine(*lab.chosen(lab.RING, lab.PASSTHROUGH))
def test_upper_turns_read_only(engine: lab.Engine) -> None:
    with lab.workspace("ro") as base, lab.filesystem("tmpfs", base) as fs:
        layers = layers_on(fs, base)
        (layers.lowers[0] / "f").write_text("lower")
        with lab.mounted(engine, layers, log=ANY_LOG) as mounted:
            merged = layers.merged
            (merged / "mine").write_text("mine")
            # as when the filesystem has had errors
            lab.wait_for(lambda: remount(fs, "ro"), "remount,ro", mounted.alive)
            for call in (
                lambda: os.open(merged / "f", os.O_WRONLY),
                lambda: os.open(merged / "new", os.O_CREAT | os.O_WRONLY),
                lambda: os.mkdir(merged / "new"),
                lambda: os.unlink(merged / "mine"),
                lambda: os.chmod(merged / "mine", 0o600),
            ):
                assert lab.error_of(call) == "EROFS"
            assert (merged / "f").read_text() == "lower"
            assert (merged / "mine").read_text() == "mine"
            assert remount(fs, "rw")
            (merged / "f").write_text("changed")
            assert (merged / "f").read_text() == "changed"


@each_engine(*lab.chosen(lab.RING, lab.PASSTHROUGH, lab.PYFUSE3))
def test_lower_vanishes(engine: lab.Engine) -> None:
    with lab.workspace("vanish") as base:
        layers = lab.Layers.make(base)
        lower, merged = layers.lowers[0], layers.merged
        (lower / "d/e").mkdir(parents=True)
        for number in range(20):
            (lower / f"d/e/f{number}").write_text(f"content {number}")
        with lab.mounted(engine, layers, log=ANY_LOG) as mounted:
            (merged / "d/e/mine").write_text("mine")
            with open(merged / "d/e/f1") as held:
                assert sorted(os.listdir(merged / "d/e"))[0] == "f0"
                shutil.rmtree(lower / "d")
                assert held.read() == "content 1"
            lab.wait_for(
                lambda: os.listdir(merged / "d/e") == ["mine"], "lower's files go", mounted.alive
            )
            assert (merged / "d/e/mine").read_text() == "mine"
            for call in (
                lambda: os.stat(merged / "d/e/f2"),
                lambda: os.open(merged / "d/e/f3", os.O_WRONLY),
                lambda: os.rename(merged / "d/e/f4", merged / "d/e/g"),
            ):
                lab.wait_for(
                    lambda call=call: lab.error_of(call) == "ENOENT", "gone", mounted.alive
                )
            (merged / "d/e/f5").write_text("new")
            shutil.rmtree(merged / "d")
            assert os.listdir(merged) == []


def fill(path: Path, count: int) -> set[int | None]:
    """Write 64 KiB so often, then fsync and close; the errnos on the way."""
    errors = set()
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        for _ in range(count):
            os.write(fd, b"q" * 65536)
        os.fsync(fd)
    except OSError as error:
        errors.add(error.errno)
    finally:
        try:
            os.close(fd)
        except OSError as error:
            errors.add(error.errno)
    return errors


@each_engine(*lab.chosen(lab.RING, lab.WRITEBACK))
def test_quota(engine: lab.Engine) -> None:
    """EDQUOT reaches the caller: of a copy-up, and of writing."""
    with lab.workspace("quota") as base, lab.filesystem("btrfs", base) as fs:
        lab.run("btrfs", "quota", "enable", fs)
        lab.run("btrfs", "subvolume", "create", fs / "limited")
        lab.run("btrfs", "qgroup", "limit", "3M", fs / "limited")
        layers = layers_on(fs / "limited", base)
        (layers.lowers[0] / "big").write_bytes(os.urandom(6 << 20))
        with lab.mounted(engine, layers, log=ANY_LOG):
            assert lab.error_of(os.chmod, layers.merged / "big", 0o600) == "EDQUOT"
            assert (layers.merged / "big").stat().st_mode & 0o777 == 0o644
            assert fill(layers.merged / "new", 100) == {122}


@each_engine(*lab.chosen(lab.RING, lab.DEVICE_PLAIN))
@pytest.mark.parametrize("kind", ["ramfs", "restricted"])
def test_upper_without_xattrs(engine: lab.Engine, kind: str) -> None:
    """An upper without xattrs, and one without device nodes and rename flags too, as NFS or Lustre
    may be. Deletions are `.wh.` files there."""
    with lab.workspace("without") as base, lab.filesystem(kind, base) as fs:
        make_lower(base / "lower", 2, xattrs=False)
        without = ("redirect_dir=off", "index=off")
        run = Run(
            engine.with_options("whiteouts=prefix", *without),
            replace(lab.KERNEL, options=("redirect_dir=nofollow", "index=off", "xino=on")),
            seed=77, areas=2, steps=150, swap=False, lacks=frozenset({"xattr", "fallocate", "devices", "exchange"}),
        )  # fmt: skip
        run.play(base, (base / "lower",), fs, base)


def test_the_log_says_why(tmp_path: Path) -> None:
    """What can't be mounted says so in one line."""
    done = subprocess.run(
        lab.server_command(
            lab.Layers(tmp_path, None, (), None, tmp_path), [f"lowerdir={tmp_path}/missing"]
        ),
        check=False, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode
    lines = done.stderr.decode().strip().splitlines()
    assert len(lines) == 1
    assert "missing" in lines[0]
