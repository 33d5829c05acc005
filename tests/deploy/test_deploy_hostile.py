"""Packages, manifests and spools that mean harm are refused and harm nothing."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from sdee_launch.deploy import api, cache, entries
from sdee_launch.deploy.entries import Entry
from sdee_launch.deploy.errors import DeployProblem
from tests.deploy.deploy_lab import Lab, fill

IDENTITY = "0123456789abcdef"


def _forge(lab: Lab, wanted: list[Entry], files: dict[str, bytes] | None = None) -> None:
    """A generation 1 in the state directory that no snapshot would make."""

    def work() -> None:
        with open(f"{lab.state}/1.manifest", "wb") as file, entries.Writer(file) as writer:
            for entry in wanted:
                writer.add(entry)
        with open(f"{lab.state}/1.pack", "wb") as file:
            stream = zstandard.ZstdCompressor().stream_writer(file, closefd=False)
            with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar:
                for name, data in {**(files or {}), ".sdee/sums": b""}.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
            stream.close()

    lab.inside(work)


def _refused(lab: Lab, match: str) -> None:
    with pytest.raises(DeployProblem, match=match):
        api.ensure(lab.account, lab.cache, lab.state, IDENTITY, 1, "job-1")
    assert cache.listing(lab.account, lab.cache) == []


ROOT = Entry(b"", "d", 0o755, 0, 0, 1)


@pytest.mark.parametrize(
    "path", [b"../out", b"/etc/out", b"a/../../out", b"a//b", b".", b"a\0b", b"n" * 300]
)
def test_paths_that_escape(lab: Lab, path: bytes) -> None:
    _forge(lab, [ROOT, Entry(path, "d", 0o755, 0, 0, 1)])
    _refused(lab, "no upper can have")
    assert not os.path.exists(lab.place / "out")


def test_a_link_in_the_way_isn_t_followed(lab: Lab) -> None:
    target = lab.place / "upper"
    wanted = [
        ROOT,
        Entry(b"a", "l", 0o777, 0, 0, 1, target=os.fsencode(target)),
        Entry(b"a/evil", "p", 0o644, 0, 0, 1),
    ]
    _forge(lab, wanted)
    _refused(lab, "a: (Not a directory|Too many levels)")
    assert not (target / "evil").exists()


def test_ids_outside_the_user_s_range(lab: Lab) -> None:
    _forge(lab, [ROOT, Entry(b"a", "d", 0o755, 4_000_000, 0, 1)])
    _refused(lab, "outside the user's subordinate ids")


def test_a_device_is_a_whiteout_or_nothing(lab: Lab) -> None:
    _forge(lab, [ROOT, Entry(b"disk", "c", 0o666, 0, 0, 1)])
    api.ensure(lab.account, lab.cache, lab.state, IDENTITY, 1, "job-1")
    found = lab.tree(f"{lab.cache}/{lab.account.uid}/{IDENTITY}/1/tree")
    assert found["disk"][-1] == 0
    _forge(lab, [ROOT, Entry(b"disk", "b", 0o666, 0, 0, 1)])
    with pytest.raises(DeployProblem, match="no upper can have"):
        api.ensure(lab.account, lab.cache, lab.state, "f" * 16, 1, "job-1")


@pytest.mark.parametrize("name", [b"trusted.overlay.opaque", b"security.selinux"])
def test_foreign_xattrs(lab: Lab, name: bytes) -> None:
    _forge(lab, [ROOT, Entry(b"a", "d", 0o755, 0, 0, 1, xattrs=((name, b"y"),))])
    _refused(lab, "no upper can have")


def test_content_that_isn_t_what_the_manifest_says(lab: Lab) -> None:
    file = Entry(b"file", "f", 0o644, 0, 0, 1, size=4, generation=1, digest="0" * 64)
    _forge(lab, [ROOT, file], {"file": b"evil"})
    _refused(lab, "lacks file, or it is not what it was")


def test_a_file_that_is_longer_than_it_says(lab: Lab) -> None:
    file = Entry(b"file", "f", 0o644, 0, 0, 1, size=4, generation=1, digest="0" * 64)
    _forge(lab, [ROOT, file], {"file": b"x" * (8 << 20)})
    _refused(lab, "lacks file")


def test_members_that_are_no_files(lab: Lab) -> None:
    file = Entry(b"file", "f", 0o644, 0, 0, 1, size=4, generation=1, digest="0" * 64)
    _forge(lab, [ROOT, file])

    def link() -> None:
        with open(f"{lab.state}/1.pack", "wb") as out:
            stream = zstandard.ZstdCompressor().stream_writer(out, closefd=False)
            with tarfile.open(fileobj=stream, mode="w|") as tar:
                info = tarfile.TarInfo("file")
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/shadow"
                tar.addfile(info)
            stream.close()

    lab.inside(link)
    _refused(lab, "something else than a file")


@pytest.mark.parametrize("what", ["manifest", "pack"])
@pytest.mark.parametrize("harm", ["cut", "flip", "empty"])
def test_damage_on_the_way(lab: Lab, what: str, harm: str) -> None:
    lab.inside(lambda: fill(lab.upper))
    submitted = lab.submit()
    path = f"{lab.state}/1.{what}"
    good = Path(path).read_bytes()
    bad = {
        "cut": good[: len(good) // 2],
        "flip": good[:60] + bytes([good[60] ^ 0xFF]) + good[61:],
        "empty": b"",
    }[harm]
    with open(path, "r+b") as file:
        file.truncate(0)
        file.write(bad)
    with pytest.raises(DeployProblem):
        lab.ensure(submitted)
    assert cache.listing(lab.account, lab.cache) == []
    with open(path, "r+b") as file:
        file.truncate(0)
        file.write(good)
    assert lab.tree(lab.ensure(submitted).tree) == lab.tree()


@pytest.mark.parametrize(
    ("name", "kind", "match"),
    [
        ("../1.pack", tarfile.REGTYPE, "what no bundle has"),
        ("passwd", tarfile.REGTYPE, "what no bundle has"),
        ("2.pack", tarfile.SYMTYPE, "something else than a file"),
        ("1.manifest", tarfile.REGTYPE, "there twice"),
        ("", tarfile.REGTYPE, "cut off"),
    ],
)
def test_a_bundle_that_means_harm(lab: Lab, name: str, kind: bytes, match: str) -> None:
    path = str(lab.place / "state/bundle")

    def forge() -> None:
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for one, what in (("1.manifest", tarfile.REGTYPE), (name, kind)):
                info = tarfile.TarInfo(one)
                info.type, info.linkname = what, "/etc/shadow"
                if one:
                    tar.addfile(info)
        if not name:
            os.truncate(path, 700)

    lab.inside(forge)
    with pytest.raises(DeployProblem, match=match):
        api.unpack_bundle(lab.account, path, str(lab.place / "state/source"))
    assert not (lab.place / "state/1.pack").exists()


@pytest.mark.parametrize("kind", ["link", "pipe", "others", "directory"])
def test_a_spool_s_file_must_be_the_user_s_own(lab: Lab, kind: str) -> None:
    lab.inside(lambda: fill(lab.upper))
    submitted = lab.submit()
    path = f"{lab.state}/1.pack"

    def replace() -> None:
        os.rename(path, path + ".away")
        if kind == "link":
            os.symlink(path + ".away", path)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "directory":
            os.mkdir(path)
        else:
            os.rename(path + ".away", path)
            os.chown(path, 55, 55)

    lab.inside(replace)
    with pytest.raises(DeployProblem, match=r"1\.pack"):
        lab.ensure(submitted)


def test_a_manifest_that_grows_without_end_is_no_manifest(lab: Lab) -> None:
    def bomb() -> None:
        with open(f"{lab.state}/1.manifest", "wb") as file:
            stream = zstandard.ZstdCompressor().stream_writer(file, closefd=False)
            stream.write(b"sdee-manifest\t1\n")
            for _ in range(64):
                stream.write(b"\0" * (1 << 20))
            stream.close()

    lab.inside(bomb)
    _refused(lab, "line without end")


def test_names_of_generations_are_checked(lab: Lab) -> None:
    calls: list[Callable[[], object]] = [
        lambda: api.ensure(lab.account, lab.cache, lab.state, "../../../../x", 1, "k"),
        lambda: api.ensure(lab.account, lab.cache, lab.state, IDENTITY, 0, "k"),
        lambda: api.ensure(lab.account, lab.cache, lab.state, IDENTITY, 1, "../k"),
        lambda: api.release(lab.account, lab.cache, "a/b"),
    ]
    for call in calls:
        with pytest.raises(DeployProblem):
            call()


def test_a_cache_directory_of_somebody_else_is_refused(lab: Lab) -> None:
    os.mkdir(lab.cache, 0o711)
    os.mkdir(f"{lab.cache}/{lab.account.uid}")
    lab.inside(lambda: fill(lab.upper))
    with pytest.raises(DeployProblem, match="remove it"):
        lab.ensure(lab.submit())


def test_nobody_else_has_a_say_in_a_spool(lab: Lab) -> None:
    upper = lab.upper
    state = f"{lab.place}/home/spool/main"
    os.mkdir(f"{lab.place}/home")
    os.chown(f"{lab.place}/home", lab.account.uid, lab.account.gid)
    api.submit(lab.account, upper, state)
    for path in (state, os.path.dirname(state)):
        assert os.stat(path).st_mode & 0o777 == 0o700
    os.mkdir(f"{state}.other", 0o777)
    os.chmod(f"{state}.other", 0o777)
    with pytest.raises(DeployProblem, match="isn't yours"):
        api.submit(lab.account, upper, f"{state}.other")
    assert os.listdir(f"{state}.other") == []


def test_whoever_unpacks_is_not_root(lab: Lab) -> None:
    host = lab.inside(lambda: [os.stat("/etc/passwd").st_uid, os.access("/etc/shadow", os.R_OK)])
    assert host == [65534, False]
    assert stat.S_ISREG(os.stat("/etc/shadow").st_mode)
