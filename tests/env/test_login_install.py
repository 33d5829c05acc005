"""`sdee install` and `uninstall` in a tree of the test's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sdee_launch.install import LOGIN_SHELL, install_main, uninstall_main


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
