"""`sdee install` and `uninstall` in a tree of the test's own."""

from __future__ import annotations

import configparser
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from sdee_launch import protocol
from sdee_launch.install import LOGIN_SHELL, UNITS, install_main, uninstall_main
from tests.env.daemon_lab import wait_for


def _tree(root: Path) -> dict[str, str]:
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(root))] = os.readlink(path)
        elif path.is_file():
            found[str(path.relative_to(root))] = path.read_text()
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/shells").write_text("/bin/sh\n/bin/bash")
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/root:/bin/bash\n")
    return tmp_path


def test_twice_is_once_and_back_is_as_before(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--root", str(root), "--force-command", "User *,!root"]
    before = _tree(root)
    assert install_main(arguments) == 0
    said = capsys.readouterr().out
    for path in ("etc/systemd/system/sdeed.service", "etc/shells", "etc/sdee/sdee.toml"):
        assert f"/{path}" in said
    once = _tree(root)
    assert LOGIN_SHELL in once["etc/shells"].splitlines()
    assert "ForceCommand /usr/local/bin/sdee-login" in once["etc/ssh/sshd_config.d/50-sdee.conf"]
    assert "usr/local/bin/sdeefs-overlayfs" in once  # docs/sdeefs.md, for podman's storage.conf
    assert "ExecStart=/usr/local/bin/sdeed" in once["etc/systemd/system/sdeed.service"]
    assert once["etc/modprobe.d/sdee.conf"] == "options fuse enable_uring=1\n"
    assert install_main(arguments) == 0
    assert "in place already" in capsys.readouterr().out
    assert _tree(root) == once
    assert uninstall_main(["--root", str(root)]) == 0
    assert "took /usr/local/bin/sdee-login out of /etc/shells" in capsys.readouterr().out
    after = _tree(root)
    assert after.pop("etc/shells").split() == before.pop("etc/shells").split()
    assert after == before
    assert uninstall_main(["--root", str(root)]) == 0


def test_a_tree_that_is_not_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert install_main(["--root", str(root / "no")]) == 1
    assert "no: no such directory" in capsys.readouterr().err
    assert not (root / "no").exists()


def test_what_the_administrator_changed_stays(root: Path) -> None:
    assert install_main(["--root", str(root)]) == 0
    config = root / "etc/sdee/sdee.toml"
    config.write_text(config.read_text() + "# ours\n")
    assert install_main(["--root", str(root)]) == 0
    assert uninstall_main(["--root", str(root)]) == 0
    assert config.read_text().endswith("# ours\n")


def test_the_shell_of_an_account_is_not_taken_away(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install_main(["--root", str(root)]) == 0
    (root / "etc/passwd").write_text(f"ann:x:1:1::/home/ann:{LOGIN_SHELL}\n")
    assert uninstall_main(["--root", str(root)]) == 1
    assert "ann" in capsys.readouterr().err
    assert uninstall_main(["--root", str(root), "--force"]) == 0


def test_a_program_of_somebody_else_is_not_replaced(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = root / "usr/local/bin/sdee"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("#!/bin/sh\n")
    assert install_main(["--root", str(root)]) == 1
    assert "not ours" in capsys.readouterr().err
    assert theirs.read_text() == "#!/bin/sh\n"


def _unit(root: Path, name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[method-assign,assignment] - systemd minds the case
    parser.read_string((root / UNITS / name).read_text())
    return parser


def test_the_units_name_what_is_there(root: Path) -> None:
    """Each path in them is in the tree, or made at run time where client and daemon expect it."""
    assert install_main(["--root", str(root)]) == 0
    service, listener = _unit(root, "sdeed.service"), _unit(root, "sdeed.socket")
    assert listener["Socket"]["ListenStream"] == protocol.SOCKET_PATH
    assert f"/run/{service['Service']['RuntimeDirectory']}" == os.path.dirname(protocol.SOCKET_PATH)
    assert service["Unit"]["Requires"] == "sdeed.socket"
    paths = [
        word.removeprefix("file://")
        for unit in (service, listener)
        for section in unit.values()
        for value in section.values()
        for word in value.split()
        if word.startswith(("/", "file:///"))
    ]
    assert "/usr/local/bin/sdeed" in paths and len(paths) == 3, paths
    for path in paths:
        if path == protocol.SOCKET_PATH:
            continue
        found = root / path.lstrip("/")
        # A program is a link to the installation, which is outside of the tree.
        assert os.access(os.readlink(found), os.X_OK) if found.is_symlink() else found.exists()


def _live_units(root: Path, to: Path) -> list[str]:
    """Copies of the units that start the program which the tree's link leads to."""
    to.mkdir()
    for name in ("sdeed.service", "sdeed.socket"):
        link = "/usr/local/bin/sdeed"
        text = (root / UNITS / name).read_text()
        (to / name).write_text(text.replace(link, os.readlink(root / link.lstrip("/"))))
    return [str(to / "sdeed.service"), str(to / "sdeed.socket")]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is missing")
def test_systemd_understands_the_units(root: Path, tmp_path: Path) -> None:
    assert install_main(["--root", str(root)]) == 0
    units = _live_units(root, tmp_path / "units")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(
    not shutil.which("systemd-socket-activate"), reason="systemd-socket-activate is missing"
)
def test_what_the_unit_starts(root: Path, tmp_path: Path) -> None:
    """Started by the first connection, with the words of the unit; it says when it is ready."""
    assert install_main(["--root", str(root)]) == 0
    units = _live_units(root, tmp_path / "units")
    words = _unit(root, "sdeed.service")["Service"]["ExecStart"].split()
    words[0] = os.readlink(root / words[0].lstrip("/"))
    assert words[0] in Path(units[0]).read_text()
    path = str(tmp_path / "activated.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        process = subprocess.Popen(
            ["systemd-socket-activate", "--listen", path, "--setenv", f"NOTIFY_SOCKET={tmp_path}/notify",
             *words, "--state", str(tmp_path / "state")],
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
        )  # fmt: skip
        try:
            wait_for(lambda: os.path.exists(path), "systemd-socket-activate listens")
            assert protocol.request("status", path=path)[0]["pid"] == process.pid
            assert manager.recv(100) == b"READY=1"
        finally:
            process.terminate()
            assert process.wait(60) == 0
        assert manager.recv(100) == b"STOPPING=1"
