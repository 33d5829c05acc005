"""Rootless podman with `sdeefs-overlayfs` as the mount_program of its storage."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import User

PROGRAMS = [
    "sh",
    "ls",
    "cat",
    "rm",
    "mkdir",
    "touch",
    "cp",
    "mv",
    "id",
    "stat",
    "chmod",
    "chown",
    "ln",
    "grep",
    "find",
]
#: A container of a test machine: no cgroups of its own, no network of its own, modest limits.
RUN = "--network=host --cgroups=disabled --ulimit nofile=1024:1024 --ulimit nproc=1000:1000"


def root_tree(place: Path) -> None:
    """A root file system of a few programs of this machine and what they load."""
    for name in ("bin", "etc", "tmp", "proc", "sys", "dev", "usr/lib", "var"):
        (place / name).mkdir(parents=True, exist_ok=True)
    libraries = set()
    for name in PROGRAMS:
        found = shutil.which(name, path="/usr/bin:/bin")
        assert found is not None
        shutil.copy2(os.path.realpath(found), place / "bin" / name)
        told = subprocess.run(["ldd", found], capture_output=True, text=True, check=True)
        libraries |= {word for word in told.stdout.split() if word.startswith("/")}
    for library in libraries:
        target = place / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(os.path.realpath(library), target)
    (place / "etc" / "passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    (place / "etc" / "group").write_text("root:x:0:\n")


@pytest.fixture
def storage(alice: User) -> Iterator[Path]:
    """A directory of the user's with an image to import, a Containerfile and a storage.conf."""
    place = alice.home / "podman"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    root_tree(place / "tree")
    with tarfile.open(place / "base.tar", "w") as archive:
        archive.add(place / "tree", ".")
    program = Path(sys.executable).with_name("sdeefs-overlayfs")
    (place / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\nrunroot = "{place}/run"\ngraphroot = "{place}/graph"\n'
        f'[storage.options.overlay]\nmount_program = "{program}"\n'
    )
    context = place / "context"
    context.mkdir()
    (context / "hello").write_text("hello\n")
    (context / "Containerfile").write_text(
        "FROM base\n"
        "RUN echo built > /etc/built && rm /bin/find && mkdir /opt && chown 5:7 /opt\n"
        "COPY hello /opt/hello\n"
        "RUN cat /opt/hello /etc/built\n"
    )
    subprocess.run(["chown", "-R", f"{alice.uid}:{alice.gid}", str(place)], check=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def as_user(user: User, place: Path, script: str) -> str:
    """Run a shell script as a user in namespaces that end with it, without a cgroup hierarchy."""
    (place / "script").write_text(
        "set -e\n"
        f"cd {place}\n"
        f"export HOME={place} XDG_RUNTIME_DIR={place}/xdg\n"
        f"export CONTAINERS_STORAGE_CONF={place}/storage.conf\n"
        "mkdir -m 700 -p $XDG_RUNTIME_DIR\n"
        'podman() { command podman --cgroup-manager=cgroupfs "$@"; }\n' + script
    )
    enter = (
        "umount /sys/fs/cgroup/unified 2>/dev/null;"
        f" exec setpriv --reuid={user.uid} --regid={user.gid} --init-groups"
        f" env -i PATH=/usr/bin:/bin:/usr/sbin bash {place}/script"
    )
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", enter],
        capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


def test_build_run_change_commit_diff(alice: User, storage: Path) -> None:
    said = as_user(
        alice,
        storage,
        f"""
        podman import base.tar base
        podman build --isolation=chroot --network=host -t made context
        podman run {RUN} --name one made sh -c '
            cat /etc/built; echo more >> /etc/built; rm /opt/hello; touch /var/new; stat -c %u:%g /opt'
        echo == diff
        podman diff one
        echo == kept
        podman commit one kept
        podman run {RUN} --rm kept sh -c 'cat /etc/built; ls /opt; ls /var; ls /bin/find || echo no find'
        echo == mounts
        podman unshare grep -c fuse-overlayfs /proc/self/mounts || true
        podman rm -a
        podman rmi -a -f
        """,
    )
    built, _, rest = said.partition("== diff\n")
    assert "built\n5:7\n" in built
    diff, _, rest = rest.partition("== kept\n")
    assert set(diff.split("\n")) - {""} == {
        "C /etc", "C /etc/built", "C /opt", "D /opt/hello", "C /var", "A /var/new"
    }  # fmt: skip
    kept, _, rest = rest.partition("== mounts\n")
    assert kept.endswith("built\nmore\nnew\nno find\n")
    assert rest.startswith("0\n")


def test_dozens_of_lowers(tmp_path: Path) -> None:
    """Podman's images have up to that many layers; relative paths, as it gives them."""
    lowers = []
    for number in range(60):
        directory = tmp_path / "l" / f"L{number:02}"
        directory.mkdir(parents=True)
        (directory / f"of{number}").touch()
        (directory / "common").write_text(str(number))
        lowers.append(f"l/L{number:02}")
    for name in ("upper", "work", "merged"):
        (tmp_path / name).mkdir()
    program = [sys.executable, "-m", "sdeefs.overlayfs_command"]
    options = f"lowerdir={':'.join(lowers)},upperdir=upper,workdir=work,volatile"
    merged = tmp_path / "merged"
    subprocess.run([*program, "-o", options, str(merged)], cwd=tmp_path, check=True, timeout=90)
    try:
        assert len(os.listdir(merged)) == 61
        assert (merged / "common").read_text() == "0"
        (merged / "of59").unlink()
        (merged / "new").touch()
    finally:
        subprocess.run(["umount", str(merged)], check=True, timeout=30)
    assert sorted(os.listdir(tmp_path / "upper")) == ["new", "of59"]
    # Lowers alone, as podman mounts an image.
    words = [*program, "-o", f"lowerdir={':'.join(lowers)}", str(merged)]
    subprocess.run(words, cwd=tmp_path, check=True, timeout=90)
    try:
        assert (merged / "of59").exists()
        with pytest.raises(OSError, match="Read-only"):
            (merged / "x").touch()
    finally:
        subprocess.run(["umount", str(merged)], check=True, timeout=30)
