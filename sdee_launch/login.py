"""`sdee-login`: the way from a login into the user's environment.

It is a login shell (chsh, LDAP's loginShell) for sshd, login(1) and su, and sshd's ForceCommand.
Whoever starts it wants one of three things, told apart by `wanted`: a shell to type in, a command
(`ssh host cmd`, scp, rsync), or an sftp server. It runs in the environment just as it would have run
on the host, and this process stays to pass on terminal, signals and exit status.

If the environment can't be entered, the user is told why, and gets what the site configured: a plain
shell of the host (`on_failure = "shell"`), or nothing (`"deny"`). Where plain shells are allowed,
`ssh host @host [CMD]` asks for one, to mend an environment that doesn't start any more.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

#: Where the sftp servers of the distributions are; inside, the first that is there is run.
SFTP_SERVERS = (
    "/usr/lib/openssh/sftp-server",
    "/usr/libexec/openssh/sftp-server",
    "/usr/lib/ssh/sftp-server",
    "/usr/libexec/sftp-server",
    "/usr/lib/misc/sftp-server",
)
HOST = "@host"
DENIED = 254


class Wanted(NamedTuple):
    """What the login is for. `command` None: an interactive login shell."""

    command: str | None
    on_host: bool = False


def wanted(arguments: Sequence[str], environ: Mapping[str, str]) -> Wanted:
    """Read the arguments of a login shell, and what sshd's ForceCommand tells beside.

    Raises ValueError for arguments that no login program gives.
    """
    rest = list(arguments)
    while rest and rest[0] in ("-l", "-i", "--login", "-", "-il", "-li"):
        rest.pop(0)
    command: str | None = None
    if rest and rest[0] in ("-c", "-lc"):
        if len(rest) < 2:
            raise ValueError("-c wants a command")
        command = rest[1]
    elif rest:
        raise ValueError(f"{rest[0]}: unknown; a login shell takes -c COMMAND or nothing")
    if command is None or _is_this_program(command):
        # By ForceCommand: what the client asked for stands here, if it asked for anything.
        command = environ.get("SSH_ORIGINAL_COMMAND")
    if command is not None and (command == HOST or command.startswith(HOST + " ")):
        return Wanted(command[len(HOST) + 1 :].strip() or None, on_host=True)
    if command is not None and command.split(" ", 1)[0] == "internal-sftp":
        command = sftp_command(command.partition(" ")[2])
    return Wanted(command)


def _is_this_program(command: str) -> bool:
    words = command.split()
    return len(words) == 1 and os.path.basename(words[0]) == "sdee-login"


def sftp_command(options: str) -> str:
    """sshd's own sftp server serves the host; this one runs inside. A command for sh."""
    tests = "; ".join(f"[ -x {path} ] && exec {path} {options}" for path in SFTP_SERVERS)
    return f"{tests}; echo 'sdee: there is no sftp-server in this environment' >&2; exit 127"


def shell_of(passwd_shell: str, site_shell: str) -> str:
    """The shell that runs inside: the account's, unless that is this program."""
    name = os.path.basename(passwd_shell)
    if passwd_shell and name not in ("sdee-login", "nologin", "false"):
        return passwd_shell
    return site_shell


def command_line(shell: str, want: Wanted) -> tuple[list[str], str]:
    """The arguments and the name (argv[0]) that the shell is started with."""
    if want.command is None:
        return [shell], "-" + os.path.basename(shell)
    return [shell, "-c", want.command], os.path.basename(shell)


def path_of_root(path: str) -> str:
    """PATH with the directories in which root's programs are: inside, the user is root."""
    places = [place for place in path.split(":") if place]
    missing = [p for p in ("/usr/local/sbin", "/usr/sbin", "/sbin") if p not in places]
    return ":".join([*missing, *(places or ["/usr/local/bin", "/usr/bin", "/bin"])])


def _host_shell(shell: str, want: Wanted) -> int:
    """Become the plain shell on the host."""
    if not os.access(shell, os.X_OK):
        shell = "/bin/sh"
    arguments, name = command_line(shell, want)
    os.environ["SHELL"] = shell
    os.execv(shell, [name, *arguments[1:]])


def _inside_already() -> bool:
    """Whether this is the inside of an instance: `su - USER` in it is just a shell."""
    from sdee_launch.protocol import INSIDE

    return bool(os.environ.get("SDEE_ENVIRONMENT")) or os.path.exists(INSIDE)


def main() -> int:
    """`sdee-login`."""
    try:
        want = wanted(sys.argv[1:], os.environ)
    except ValueError as error:
        print(f"sdee-login: {error}", file=sys.stderr)
        return 2
    import pwd

    try:
        account_shell = pwd.getpwuid(os.getuid()).pw_shell
    except KeyError:
        account_shell = ""
    from sdee_launch import login_session

    site = login_session.settings()
    shell = shell_of(account_shell, site.shell)
    if os.getuid() == 0 or _inside_already():
        return _host_shell(shell, want)
    if want.on_host:
        if site.on_failure != "shell":
            print("sdee: this site gives no plain shells on the host", file=sys.stderr)
            return DENIED
        return _host_shell(shell, want)
    arguments, name = command_line(shell, want)
    os.environ["SHELL"] = shell
    os.environ["PATH"] = path_of_root(os.environ.get("PATH", ""))
    try:
        return login_session.run(site, arguments, name)
    except login_session.NotEntered as error:
        print(f"sdee: your environment can't be entered: {error}", file=sys.stderr)
    if site.on_failure != "shell":
        print("sdee: this site gives no other login; ask its administrator", file=sys.stderr)
        return DENIED
    print(f"sdee: this is the plain host {os.uname().nodename}", file=sys.stderr)
    return _host_shell(shell, want)


if __name__ == "__main__":
    sys.exit(main())
