"""`sdee install` and `sdee uninstall`: set a node up for plain logins, and take that back.

What is to be done is planned first, as data: files with their content, lines in files of others,
links, commands. Doing it twice changes nothing the second time, and each step says what it did.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.resources
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("sdee", "sdeed", "sdee-login", "sdeefs", "sdeefs-overlayfs", "mount.fuse.sdeefs")
LINKS = "usr/local/bin"
UNITS = "etc/systemd/system"
SHELLS = "etc/shells"
CONFIGURATION = "etc/sdee/sdee.toml"
MODULE_OPTION = "etc/modprobe.d/sdee.conf"
SSHD = "etc/ssh/sshd_config.d/50-sdee.conf"
LOGIN_SHELL = f"/{LINKS}/sdee-login"


@dataclass(frozen=True)
class File:
    """A file of ours: written if it differs, removed by uninstall. `keep`: an existing one stays."""

    path: str
    content: str
    mode: int = 0o644
    keep: bool = False


@dataclass(frozen=True)
class Line:
    """A line in a file that isn't ours."""

    path: str
    line: str


@dataclass(frozen=True)
class Link:
    """A symbolic link to a program of this installation."""

    path: str
    target: str


@dataclass(frozen=True)
class Command:
    """Run on the live system only."""

    words: tuple[str, ...]


Step = File | Line | Link | Command


def plan(program_directory: str, match: str | None = None, systemd: bool = True) -> list[Step]:
    """The steps, in order. `match`: what sshd's Match line names, for ForceCommand; None: no sshd."""
    steps: list[Step] = [
        Link(f"{LINKS}/{name}", os.path.join(program_directory, name)) for name in PROGRAMS
    ]
    # mount(8) looks for helpers in /sbin only.
    steps.append(
        Link("sbin/mount.fuse.sdeefs", os.path.join(program_directory, "mount.fuse.sdeefs"))
    )
    steps += [
        File(CONFIGURATION, _data("sdee.toml"), keep=True),
        File(MODULE_OPTION, "options fuse enable_uring=1\n"),
        Line(SHELLS, LOGIN_SHELL),
    ]
    if systemd:
        steps += [
            File(f"{UNITS}/sdeed.service", _data("sdeed.service").replace("@BIN@", f"/{LINKS}")),
            File(f"{UNITS}/sdeed.socket", _data("sdeed.socket")),
        ]
    if match is not None:
        steps.append(
            File(
                SSHD,
                "# Logins of these users go into their environments (sdee install).\n"
                f"Match {match}\n    ForceCommand {LOGIN_SHELL}\n",
            )
        )
    return steps


def after_install() -> list[Command]:
    """What the live system is told, under systemd."""
    return [
        Command(("systemctl", "daemon-reload")),
        Command(("systemctl", "enable", "--now", "sdeed.socket", "sdeed.service")),
    ]


def _data(name: str) -> str:
    return (importlib.resources.files("sdee_launch") / name).read_text(encoding="utf-8")


def apply(step: Step, root: Path) -> str | None:
    """Do one step below `root`: what was done, None if it is so already. Raises OSError."""
    if isinstance(step, Command):
        subprocess.run(step.words, check=True, timeout=120)
        return f"ran {' '.join(step.words)}"
    path = root / step.path
    shown = f"/{step.path}"
    if isinstance(step, File):
        if path.exists() and (step.keep or path.read_text(encoding="utf-8") == step.content):
            return None
        _write(path, step.content, step.mode)
        return f"wrote {shown}"
    if isinstance(step, Line):
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if step.line in text.splitlines():
            return None
        if text and not text.endswith("\n"):
            text += "\n"
        _write(path, text + step.line + "\n", _mode(path))
        return f"added {step.line} to {shown}"
    if os.path.realpath(path) == os.path.realpath(step.target):
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_symlink():
        raise OSError(f"{shown} is there and not ours: remove it, then run this again")
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    path.symlink_to(step.target)
    return f"linked {shown} to {step.target}"


def undo(step: Step, root: Path) -> str | None:
    """Take one step back: what was done, None if nothing was there. Raises OSError."""
    if isinstance(step, Command):
        return None
    path = root / step.path
    shown = f"/{step.path}"
    if isinstance(step, Line):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if step.line not in lines:
            return None
        rest = "".join(f"{line}\n" for line in lines if line != step.line)
        _write(path, rest, _mode(path))
        return f"took {step.line} out of {shown}"
    if isinstance(step, Link) and not (path.is_symlink() and os.readlink(path) == step.target):
        return None
    if isinstance(step, File):
        if not path.exists():
            return None
        if step.keep and path.read_text(encoding="utf-8") != step.content:
            return f"kept {shown}: it was changed"
    path.unlink()
    if isinstance(step, File):
        with contextlib.suppress(OSError):  # files of others may be in it
            if path.parent.name == "sdee":
                path.parent.rmdir()
    return f"removed {shown}"


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777 if path.exists() else 0o644


def _write(path: Path, content: str, mode: int) -> None:
    """Replace a file whole, with one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.sdee-new")
    new.write_text(content, encoding="utf-8")
    new.chmod(mode)
    new.rename(path)


def _users_of_the_shell(root: Path) -> list[str]:
    try:
        lines = (root / "etc/passwd").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [x.split(":")[0] for x in lines if x.split(":")[-1].endswith("/sdee-login")]


def _slurm(root: Path, what: str) -> list[str]:
    from sdee_launch.slurm import install as slurm

    try:
        return slurm.install(root) if what == "install" else slurm.uninstall(root)
    except slurm.InstallError as error:
        raise OSError(str(error)) from None


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"sdee {name}", description="Set a node up, or back: see the README."
    )
    parser.add_argument("--root", default="/", help="the tree to change (%(default)s)")
    parser.add_argument("--slurm", action="store_true", help="the Slurm plugin and hooks as well")
    parser.add_argument(
        "--force-command",
        metavar="MATCH",
        help="send logins by sshd's ForceCommand, whatever the login shell; MATCH is what sshd's "
        "Match says, as 'Group users' or 'User *,!root'",
    )
    if name == "uninstall":
        parser.add_argument("--force", action="store_true", help="even if accounts use the shell")
    return parser


def install_main(arguments: list[str]) -> int:
    """`sdee install`."""
    options = _parser("install").parse_args(arguments)
    root = Path(options.root)
    if not root.is_dir():
        print(f"sdee install: --root {root}: no such directory (create it first)", file=sys.stderr)
        return 1
    live = root.resolve() == Path("/")
    if live and os.geteuid() != 0:
        print("sdee install: must be run by root", file=sys.stderr)
        return 1
    with_systemd = not live or os.path.isdir("/run/systemd/system")
    directory = os.path.dirname(os.path.abspath(sys.executable))
    steps = plan(directory, options.force_command, with_systemd)
    if live and with_systemd:
        steps += after_install()
    changed = 0
    try:
        for step in steps:
            said = apply(step, root)
            if said is not None:
                changed += 1
                print(said)
        if options.slurm:
            for said in _slurm(root, "install"):
                print(said)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"sdee install: {error}", file=sys.stderr)
        return 1
    if not changed:
        print("everything was in place already")
    if live and not with_systemd:
        print(f"no systemd here: have /{LINKS}/sdeed started at boot, as /{LINKS}/sdeed &")
    print(f"a user whose login shell is {LOGIN_SHELL} (chsh -s) logs in to an environment")
    if options.force_command and live:
        print("sshd must read its configuration again (systemctl reload ssh)")
    return 0


def uninstall_main(arguments: list[str]) -> int:
    """`sdee uninstall`: environments stay, as they are the users'."""
    options = _parser("uninstall").parse_args(arguments)
    root = Path(options.root)
    live = root.resolve() == Path("/")
    if live and os.geteuid() != 0:
        print("sdee uninstall: must be run by root", file=sys.stderr)
        return 1
    users = _users_of_the_shell(root)
    if users and not options.force:
        print(
            f"sdee uninstall: sdee-login is the login shell of {', '.join(users)}: give them "
            "another (chsh), or say --force",
            file=sys.stderr,
        )
        return 1
    directory = os.path.dirname(os.path.abspath(sys.executable))
    try:
        if live and os.path.isdir("/run/systemd/system") and shutil.which("systemctl"):
            subprocess.run(
                ["systemctl", "disable", "--now", "sdeed.socket", "sdeed.service"],
                check=False,
                timeout=120,
            )
        if options.slurm:
            for said in _slurm(root, "uninstall"):
                print(said)
        for step in reversed(plan(directory, match=options.force_command or "User nobody")):
            gone = undo(step, root)
            if gone is not None:
                print(gone)
        if live and os.path.isdir("/run/systemd/system"):
            subprocess.run(["systemctl", "daemon-reload"], check=False, timeout=120)
    except OSError as error:
        print(f"sdee uninstall: {error}", file=sys.stderr)
        return 1
    print("environments are the users' and stay where they are")
    return 0
