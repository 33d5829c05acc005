"""Environments: listed, changed, kept, exported, made again, removed."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdee_launch.environments import EnvironmentProblem, check_name
from tests.conftest import User
from tests.env.instance_lab import Lab, laboratory


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("a/b", "'/' can't be in it"),
        ("x\n", r"'\n' can't be in it"),
        ("", "it is empty"),
        ("a" * 65, "it has 65 characters"),
        (".new", "it begins with '.'"),
    ],
)
def test_a_name_that_is_none(name: str, wrong: str) -> None:
    with pytest.raises(EnvironmentProblem) as raised:
        check_name(name, "a snapshot")
    said = str(raised.value)
    assert f"is no name of a snapshot: {wrong}; allowed are letters, digits" in said


@pytest.fixture(scope="module", params=("site-kernel", "rootless-fuse"))
def lab(request: pytest.FixtureRequest, alice: User) -> Iterator[Lab]:
    with laboratory(request.param, alice) as made:
        yield made


@pytest.fixture
def env(lab: Lab) -> Iterator[str]:
    yield "store"
    for name in ("store", "other", "third"):
        if (lab.store() / name).exists():
            lab.remove(name)


def _ok(lab: Lab, *words: str, **more: object) -> str:
    done = lab.sdee("env", *words, **more)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def test_made_on_first_use_and_listed(lab: Lab, env: str) -> None:
    lab.say("true", env=env)
    assert stat.S_IMODE((lab.store() / env).stat().st_mode) == 0o700
    listed = json.loads(_ok(lab, "list", "--json"))
    mine = next(x for x in listed if x["name"] == env)
    assert mine["alive"] is False and mine["path"] == str(lab.store() / env)
    with lab.member(env):
        listed = json.loads(_ok(lab, "list", "--json"))
        assert next(x for x in listed if x["name"] == env)["alive"] is True
    _ok(lab, "create", "other")
    assert lab.sdee("env", "create", "other").returncode == 1
    assert "other" in _ok(lab, "list")


def test_info_and_diff(lab: Lab, env: str) -> None:
    lab.say("echo x > /etc/new-one; rm /etc/issue.net; mkdir /opt/d; head -c 100000 /dev/urandom > /opt/d/f", env=env)  # fmt: skip
    found = json.loads(_ok(lab, "info", "--env", env, "--json"))
    assert found["objects"] >= 4 and found["bytes"] >= 100000
    assert "name:" in _ok(lab, "info", "--env", env)
    lines = _ok(lab, "diff", "--env", env).splitlines()
    assert "A etc/new-one" in lines and "D etc/issue.net" in lines and "A opt/d/" in lines
    done = lab.sdee("env", "info", "--env", "no-such")
    assert done.returncode == 1 and "no environment no-such" in done.stderr


def test_from_inside_it_is_refused(lab: Lab, env: str) -> None:
    done = lab.run(*lab.words("env", "list"), env=env)
    assert done.returncode == 1 and "from outside" in done.stderr and "root" not in done.stderr


def _exclude_inside(lab: Lab, *words: str) -> subprocess.CompletedProcess[str]:
    # The variable names the tests' socket as it is outside.
    return lab.run("env", "-u", "SDEED_SOCKET", *lab.words("deploy", "exclude", *words))


def test_what_stays_behind_is_changed_from_inside(alice: User) -> None:
    with laboratory("site-kernel", alice) as made:
        assert made.daemon is not None
        made.daemon.stop()
        made.daemon.environ["SDEED_SOCKET"] = made.daemon.socket  # so that it is shown inside
        made.daemon.start()
        done = _exclude_inside(made, "--add", "big/*", "--add", "core")
        assert (done.returncode, done.stdout, done.stderr) == (0, "big/*\ncore\n", "")
        assert _exclude_inside(made, "--remove", "big/*").stdout == "core\n"
        assert "isn't excluded" in _exclude_inside(made, "--remove", "big/*").stderr
        assert "no environment other" in _exclude_inside(made, "--env", "other").stderr
        outside = made.sdee("deploy", "exclude", "--env", "lab", "--json").stdout
        assert json.loads(outside)["own"] == ["core"]
        done = made.run(*made.words("deploy", "plan"))
        assert done.returncode == 1 and "leave this one first" in done.stderr


def test_without_a_daemon_what_stays_behind_is_changed_outside(alice: User) -> None:
    with laboratory("rootless-fuse", alice) as made:
        done = _exclude_inside(made, "--add", "core")
        assert done.returncode == 1 and "sdee deploy exclude --env lab" in done.stderr, done.stderr


def test_reset(lab: Lab, env: str) -> None:
    lab.say("echo x > /etc/one; echo y > /etc/two; rm /etc/issue.net; chown 33 /etc/two; mkdir -m 0 /opt/closed; touch /opt/closed/x", env=env)  # fmt: skip
    _ok(lab, "reset", "--env", env, "/etc/one", "/etc/issue.net")
    assert lab.say("ls /etc/one 2>&1 | grep -c such; cat /etc/two; ls /etc/issue.net", env=env).split("\n") == ["1", "y", "/etc/issue.net"]  # fmt: skip
    done = lab.sdee("env", "reset", "--env", env, "/etc/never-changed")
    assert done.returncode == 0 and "not changed" in done.stderr
    for wrong in ("etc/one", "/etc/../x", "/"):
        assert lab.sdee("env", "reset", "--env", env, wrong).returncode == 1
    _ok(lab, "reset", "--env", env)
    assert _ok(lab, "diff", "--env", env) == ""
    assert lab.say("ls /etc/two 2>&1 | grep -c such", env=env) == "1"


def test_reset_follows_no_link(lab: Lab, env: str) -> None:
    outside = lab.user.home / "outside"
    outside.mkdir()
    os.chown(outside, lab.user.uid, lab.user.gid)
    (outside / "file").write_text("keep")
    try:
        place = "/usr/share/doc/adduser"
        lab.say(f"rm -rf {place}; ln -s {outside} {place}", env=env)
        _ok(lab, "reset", "--env", env, f"{place}/file")
        assert (outside / "file").read_text() == "keep"
    finally:
        (outside / "file").unlink()
        outside.rmdir()


def test_changes_wait_for_the_instance_to_end(lab: Lab, env: str) -> None:
    with lab.member(env):
        for words in (("reset",), ("rollback",), ("rm", env), ("rename", env, "other")):
            named = words if words[0] in ("rm", "rename") else (*words, "--env", env)
            if words[0] == "rollback":
                _ok(lab, "snapshot", "--env", env, "first")
            done = lab.sdee("env", *named)
            assert done.returncode == 1 and f"sdee kill {env}" in done.stderr, done.stderr
    assert lab.say("echo fine", env=env) == "fine"


def test_snapshot_and_rollback(lab: Lab, env: str) -> None:
    lab.say("echo one > /etc/state; rm /etc/issue.net; chown 33:44 /etc/state; mkdir -m 700 /opt/d; chown 5 /opt/d", env=env)  # fmt: skip
    assert _ok(lab, "snapshot", "--env", env, "first") == "first\n"
    lab.say("echo two > /etc/state; touch /etc/issue.net /etc/more", env=env)
    assert _ok(lab, "snapshot", "--env", env, "second") == "second\n"
    assert json.loads(_ok(lab, "info", "--env", env, "--json"))["snapshots"] == ["first", "second"]
    look = "cat /etc/state; stat -c %u:%g /etc/state; ls -d /etc/more /etc/issue.net 2>/dev/null; stat -c %u:%a /opt/d"
    assert _ok(lab, "rollback", "--env", env, "first") == "first\n"
    assert lab.say(look, env=env).split("\n") == ["one", "33:44", "5:700"]
    assert _ok(lab, "rollback", "--env", env, "second") == "second\n"
    assert lab.say(look, env=env).split("\n")[0] == "two"
    assert lab.sdee("env", "snapshot", "--env", env, "first").returncode == 1
    assert "'a/b' is no name of a snapshot" in lab.sdee("env", "snapshot", "-e", env, "a/b").stderr
    _ok(lab, "snapshot", "--env", env, "--drop", "first")
    assert lab.sdee("env", "rollback", "--env", env, "first").returncode == 1


def test_export_and_import(lab: Lab, env: str, tmp_path: Path) -> None:
    lab.say(
        "echo x > /etc/one; ln /etc/one /etc/same; ln -s one /etc/link; rm /etc/issue.net; chown 33:44 /etc/one;"
        " rm -r /usr/share/doc/adduser; mkdir /usr/share/doc/adduser; mkfifo /opt/fifo; chmod 4711 /etc/same;"
        " setfattr -n user.colour -v 'r\\303\\244d' /etc/one; truncate -s 10M /opt/sparse; cp /bin/true /opt/t; setcap cap_net_raw+ep /opt/t",
        env=env,
    )
    tmp_path.chmod(0o755)
    for part in tmp_path.parents:
        if part.stat().st_uid == 0 and part != Path("/"):
            part.chmod(part.stat().st_mode | 0o055)
    os.chown(tmp_path, lab.user.uid, lab.user.gid)
    look = (
        "cat /etc/one; stat -c '%h %u:%g %a' /etc/same; readlink /etc/link; ls /etc/issue.net 2>&1 | grep -c such;"
        " ls -A /usr/share/doc/adduser | wc -l; stat -c %F /opt/fifo; getfattr --only-values -n user.colour /etc/one;"
        " stat -c '%s %b' /opt/sparse | cut -d' ' -f1; getcap /opt/t"
    )
    expected = lab.say(look, env=env)
    for suffix in ("tar", "tar.zst", "tar.gz"):
        file = tmp_path / f"export.{suffix}"
        _ok(lab, "export", "--env", env, str(file))
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        before = time.time()
        _ok(lab, "import", "--env", "other", str(file))
        info = json.loads(_ok(lab, "info", "--env", "other", "--json"))
        assert before - 1 < info["created"] < time.time() + 1
        assert lab.say(look, env="other") == expected
        assert lab.sdee("env", "import", "--env", "other", str(file)).returncode == 1
        lab.remove("other")
    assert (lab.store() / "other").exists() is False


def _archive(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, 0o644
    return info


def test_hostile_archives(lab: Lab, env: str) -> None:
    target = lab.user.home / "victim"
    target.mkdir()
    os.chown(target, lab.user.uid, lab.user.gid)
    device = _member("./disk", tarfile.BLKTYPE)
    device.devmajor, device.devminor = 8, 0
    foreign = _member("./f")
    foreign.pax_headers = {"SCHILY.xattr.trusted.overlay.opaque": "y"}
    try:
        for data in (
            _archive((_member("../../../escaped"), b"x")),
            _archive((_member("./l", tarfile.SYMTYPE, str(target)), b""), (_member("./l/x"), b"x")),
            _archive((_member("./h", tarfile.LNKTYPE, "../../../../settings"), b"")),
            _archive((device, b"")),
            b"no archive at all" * 100,
        ):
            file = lab.user.home / "hostile.tar"
            file.write_bytes(data)
            file.chmod(0o644)
            done = lab.sdee("env", "import", "--env", "third", str(file))
            assert done.returncode == 1, done
            assert not (lab.store() / "third").exists()
            file.unlink()
        assert list(target.iterdir()) == []
        assert [x for x in os.listdir(lab.store()) if x.startswith(".")] == []
    finally:
        target.rmdir()


def test_rename_and_remove(lab: Lab, env: str) -> None:
    lab.say("echo x > /etc/one; chown 33 /etc/one; mkdir -m 700 /opt/d; chown 5 /opt/d", env=env)
    _ok(lab, "rename", env, "other")
    assert lab.say("cat /etc/one", env="other") == "x"
    _ok(lab, "create", "third")
    assert lab.sdee("env", "rename", "other", "third").returncode == 1
    assert lab.sdee("env", "rename", "other", "../third").returncode == 1
    _ok(lab, "rm", "other", "third")
    assert not (lab.store() / "other").exists() and not (lab.store() / "third").exists()
    assert [x for x in os.listdir(lab.store()) if x.startswith(".")] == []


def test_settings_of_one_environment(lab: Lab, env: str) -> None:
    _ok(lab, "create", "other", "--bind", "/usr/share:/opt/shared:ro")
    assert "doc" in lab.say("ls /opt/shared", env="other").split()
    assert lab.sdee("env", "create", "third", "--bind", "nonsense").returncode == 1
    assert not (lab.store() / "third").exists()


def test_a_store_that_cannot_be(lab: Lab) -> None:
    more = {**lab.environ(), "HOME": "/nonexistent"}
    done = lab.sdee("env", "list", env=more)
    assert done.returncode == 0  # the account's home counts, not the variable
