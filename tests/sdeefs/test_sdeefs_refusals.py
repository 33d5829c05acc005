"""Mounts that are refused: one line each, naming the thing, before anything is made."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from mount_helpers import syscalls
from mount_helpers.mountinfo import parse_line
from mount_helpers.trials import in_child, private_mounts
from sdeefs.options import Options, UsageError
from sdeefs.refusals import (
    Refused,
    check_layers,
    check_merged,
    default_work,
    kernel_user,
    layer_option,
    lock_layers,
    lower_options,
    with_work,
)


@pytest.fixture
def layers(tmp_path: Path) -> Options:
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    place = os.fsencode(tmp_path)
    return Options((place + b"/lower",), place + b"/upper", place + b"/work")


def refusal(options: Options) -> str:
    with pytest.raises((Refused, UsageError)) as caught:
        check_layers(options)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_good_layers_pass(layers: Options) -> None:
    check_layers(layers)
    check_layers(Options(layers.lowers))


def test_missing_or_no_directories(layers: Options, tmp_path: Path) -> None:
    absent = os.fsencode(tmp_path / "absent")
    (tmp_path / "file").touch()
    file = os.fsencode(tmp_path / "file")
    for bad in (absent, file):
        assert os.fsdecode(bad) in refusal(Options((bad,), layers.upper, layers.work))
        assert os.fsdecode(bad) in refusal(Options(layers.lowers, bad, layers.work))
        assert os.fsdecode(bad) in refusal(Options(layers.lowers, layers.upper, bad))
    assert "lowerdir" in refusal(Options())


def test_unreadable_layers(layers: Options, tmp_path: Path) -> None:
    (tmp_path / "lower").chmod(0)

    def trial() -> str:
        os.chmod(tmp_path, 0o755)
        os.setgid(65534)
        os.setuid(65534)
        return refusal(Options(layers.lowers))

    for parent in tmp_path.parents:
        if parent.name.startswith("pytest"):
            parent.chmod(0o755)
    works, line = in_child(trial)
    assert works, line
    assert "not readable" in line


def test_overlapping_layers(layers: Options, tmp_path: Path) -> None:
    inner = tmp_path / "lower" / "inner"
    inner.mkdir()
    below = os.fsencode(inner)
    lower = layers.lowers[0]
    assert "overlap" in refusal(Options((below, lower), layers.upper, layers.work))
    assert "same directory" in refusal(Options((lower, lower), layers.upper, layers.work))
    assert "same directory" in refusal(Options((lower,), lower, layers.work))
    in_upper = tmp_path / "upper" / "inner"
    in_upper.mkdir()
    assert "overlap" in refusal(Options((os.fsencode(in_upper),), layers.upper, layers.work))
    assert "lies in upper" in refusal(Options((lower,), layers.upper, os.fsencode(in_upper)))
    assert "upper itself" in refusal(Options((lower,), layers.upper, layers.upper))
    # An upper inside its lower is how changes to / are kept in a home below it.
    work = tmp_path / "lower" / "work"
    work.mkdir()
    check_layers(Options((lower,), below, os.fsencode(work)))


def test_workdir_on_another_filesystem(layers: Options, tmp_path: Path) -> None:
    def trial() -> str:
        private_mounts()
        syscalls.mount("none", str(tmp_path / "work"), "tmpfs")
        return refusal(layers)

    works, line = in_child(trial)
    assert works, line
    assert "another filesystem" in line
    assert str(tmp_path / "upper.work") in line


def test_the_default_workdir_is_made_beside_upper(layers: Options, tmp_path: Path) -> None:
    made = with_work(Options(layers.lowers, layers.upper))
    assert made.work == default_work(layers.upper or b"") == os.fsencode(tmp_path / "upper.work")
    assert (tmp_path / "upper.work").is_dir()
    (tmp_path / "link").symlink_to("upper")
    again = with_work(Options(layers.lowers, os.fsencode(tmp_path / "link")))
    assert again.work == made.work


def test_an_upper_belongs_to_one_mount(layers: Options) -> None:
    held = lock_layers(layers)
    assert len(held) == 2
    with pytest.raises(Refused, match="in use"):
        lock_layers(layers, patience=0.1)
    for fd in held:
        os.close(fd)
    for fd in lock_layers(layers):
        os.close(fd)


def test_a_server_that_is_ending_is_waited_for(layers: Options) -> None:
    ready, told = os.pipe()
    pid = os.fork()
    if not pid:
        fd = os.open(layers.upper or b"", os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.write(told, b"x")
        os.close(told)
        import time

        time.sleep(0.5)
        os._exit(0)
    try:
        assert os.read(ready, 1) == b"x"
        held = lock_layers(layers, patience=30)
        for fd in held:
            os.close(fd)
    finally:
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(told)


def test_an_upper_of_kernel_overlayfs_is_refused(layers: Options, tmp_path: Path) -> None:
    def trial() -> str:
        private_mounts()
        merged = tmp_path / "merged"
        merged.mkdir()
        lower, upper, work = tmp_path / "lower", tmp_path / "upper", tmp_path / "work"
        syscalls.mount(
            "overlay", str(merged), "overlay", 0,
            f"lowerdir={lower},upperdir={upper},workdir={work}",
        )  # fmt: skip
        found = kernel_user(layers.upper or b"")
        assert found is not None and found.point == os.fsencode(merged)
        with pytest.raises(Refused) as caught:
            lock_layers(layers)
        return str(caught.value)

    works, line = in_child(trial)
    assert works, line
    assert "kernel overlayfs" in line and "merged" in line


def test_escaped_super_options() -> None:
    line = (
        rb"1 2 0:3 / /m rw - overlay sdeefs rw,lowerdir=/a\134:b:/c,upperdir=/u\134\054x,index=off"
    )
    mount = parse_line(line)
    assert layer_option(mount, "upperdir") == "/u,x"
    assert lower_options(mount) == ["/a:b", "/c"]
    assert layer_option(mount, "workdir") is None
    line = rb"1 2 0:3 / /m rw - overlay sdeefs rw,lowerdir+=/a:\134b,lowerdir+=/c,upperdir=/u\054x"
    mount = parse_line(line)
    assert layer_option(mount, "upperdir") == "/u,x"
    assert lower_options(mount) == ["/a:\\b", "/c"]


def test_mount_points(tmp_path: Path) -> None:
    assert check_merged(os.fsencode(tmp_path)) == os.fsencode(tmp_path)
    (tmp_path / "file").touch()
    for name, words in (("absent", "create it"), ("file", "not a directory")):
        with pytest.raises(Refused, match=words):
            check_merged(os.fsencode(tmp_path / name))
