"""`sdee run` and `sdee shell`: a command in the instance of an environment, as if it ran right here.

A fresh interpreter runs this for each `sdee run`, so the way to the daemon's answer imports only what
is built in (see protocol.py): no argparse, no configuration unless there is one, not even `os`. What
comes after the answer (member.py) is imported while the daemon is at work.
"""

import posix
import sys
import time

from sdee_launch import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing and collections.abc cost more than all the rest
    from collections.abc import Callable, Sequence
    from typing import TypedDict

    class Options(TypedDict):
        """What stands before the command."""

        env: str
        engine: str
        binds: list[str]
        rootless: bool
        command: list[str]


#: Seconds in which a session must have found or made its instance, whatever ends meanwhile.
PATIENCE = 60.0
#: Seconds that a daemon which is just restarting is waited for.
RESTART = 5.0


class NotEntered(Exception):
    """Why the environment can't be entered, in one line."""


class Usage(Exception):
    """A wrong argument, in one line."""


class Help(Exception):
    """--help stands among the options."""


class Target:
    """A live instance to join. Owns its descriptors."""

    def __init__(self, environment: str, fds: dict[str, int], join: dict[str, object]) -> None:
        self.environment = environment
        self.fds = fds
        self.join = join

    def close(self) -> None:
        """Close what is left of the descriptors."""
        for fd in self.fds.values():
            posix.close(fd)
        self.fds = {}


def parse(arguments: "Sequence[str]") -> "Options":
    """The options of run and shell, up to the command. Raises Usage, Help."""
    found: Options = {
        "env": "", "engine": "", "binds": [], "rootless": False, "command": [],
    }  # fmt: skip
    rest = list(arguments)
    while rest:
        word = rest[0]
        if word == "--":
            rest.pop(0)
            break
        if not word.startswith("-") or word == "-":
            break
        rest.pop(0)
        if word in ("--help", "-h"):
            raise Help
        name, equals, value = word.partition("=")
        if name == "--rootless" and not equals:
            found["rootless"] = True
            continue
        if name not in ("--env", "-e", "--engine", "--bind"):
            raise Usage(f"unknown option {word}")
        if not equals:
            if not rest:
                raise Usage(f"{name} wants a value")
            value = rest.pop(0)
        if name in ("--env", "-e"):
            found["env"] = value
        elif name == "--engine":
            if value not in ("auto", "kernel", "fuse"):
                raise Usage(f"--engine {value}: one of auto, kernel, fuse")
            found["engine"] = value
        else:
            found["binds"].append(value)
    found["command"] = rest
    return found


def main(arguments: "Sequence[str]") -> int:
    """`sdee run …`, `sdee shell …`; the exit status."""
    protocol.take_early()
    word, *rest = arguments
    try:
        options = parse(rest)
        command = options["command"]
        if word == "run" and not command:
            raise Usage("which command?  sdee run [--env NAME] [--] COMMAND…")
        if word == "shell":
            if command:
                raise Usage("sdee shell takes no command; sdee run does")
            command = [_shell()]
        return run(
            command, options["env"], options["engine"], options["binds"],
            rootless=options["rootless"],
        )  # fmt: skip
    except Help:
        from sdee_launch.cli import main as all_of_it

        return all_of_it(arguments)
    except Usage as error:
        print(f"sdee {word}: {error}", file=sys.stderr)
        return 2
    except NotEntered as error:
        print(f"sdee: {error}", file=sys.stderr)
        return 1


def _shell() -> str:
    """The user's shell, unless that is the way into environments."""
    import os

    shell = os.environ.get("SHELL", "")
    if not shell:
        import pwd

        try:
            shell = pwd.getpwuid(os.getuid()).pw_shell
        except KeyError:
            pass
    if os.path.basename(shell) in ("", "sdee-login", "nologin", "false"):
        return "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"
    return shell


def run(
    command: "Sequence[str]",
    environment: str = "",
    engine: str = "",
    binds: "Sequence[str]" = (),
    *,
    argv0: str | None = None,
    rootless: bool = False,
    before: "Callable[[Target], None] | None" = None,
) -> int:
    """Run a command in an environment's instance and give its exit status (128+n for signals).

    `before` is called on the host, with the instance found. Raises NotEntered.
    """
    inside = _inside()
    environment, engine, more = _defaults(environment, engine)
    if inside is not None:
        if inside != environment and environment != "default":
            raise NotEntered(f"this is the inside of {inside}: leave it to enter {environment}")
        from sdee_launch import member

        member.become(command, argv0, protocol.variables())
    target = find(environment, engine, [*more, *binds], rootless)
    if before is not None:
        before(target)
    from sdee_launch import member

    return member.run(target, command, argv0)


def _inside() -> str | None:
    """The environment that this process is in."""
    try:
        with open(protocol.INSIDE, encoding="ascii") as file:
            return file.read().strip()
    except (OSError, ValueError):
        return None


def _has_settings(path: str) -> bool:
    """Whether a file of settings says anything: what is all comments costs no parser."""
    try:
        with open(path, "rb") as file:
            return any(line.strip()[:1] not in (b"", b"#") for line in file)
    except OSError:
        return False


def _defaults(environment: str, engine: str) -> tuple[str, str, list[str]]:
    """What the arguments leave open: from the variables, then the settings."""
    environment = environment or protocol.variable("SDEE_ENV")
    home = protocol.variable("HOME")
    site_file = protocol.variable("SDEE_CONFIG") or "/etc/sdee/sdee.toml"
    binds: list[str] = []
    user_file = home + "/.config/sdee/sdee.toml"
    if _has_settings(user_file) or (not environment and _has_settings(site_file)):
        from sdee_launch import config

        try:
            settings = config.load(home or None)
            site = config.site_settings()
        except config.ConfigError as error:
            raise NotEntered(str(error)) from None
        environment = environment or settings.environment
        if not engine and settings.engine != site.engine:
            engine = settings.engine
        binds = [b for b in settings.binds if b not in site.binds]
    return environment or "default", engine or "auto", binds


def find(environment: str, engine: str, binds: "Sequence[str]", rootless: bool = False) -> Target:
    """The live instance of an environment, made if there is none; we are a member of it.

    Raises NotEntered.
    """
    deadline = time.monotonic() + PATIENCE
    if protocol.variable("SDEE_MODE") == "rootless":
        rootless = True
    why = ""
    while not rootless:
        try:
            return _from_daemon(environment, engine, binds)
        except _Ended:
            reason = f"the instance of {environment} ended again and again"
        except protocol.Refused as error:
            if error.kind == "rootless":
                why = f"{error}; without the daemon: "
                break
            if error.kind != "gone":
                raise NotEntered(str(error)) from None
            reason = str(error)
        except protocol.Unavailable as error:
            if not _exists(protocol.variable("SDEED_SOCKET") or protocol.SOCKET_PATH):
                break
            reason = str(error)
            deadline = min(deadline, time.monotonic() + RESTART)
        if time.monotonic() > deadline:
            raise NotEntered(reason)
        time.sleep(0.01)
    from sdee_launch import rootless as without_daemon

    try:
        return without_daemon.find(environment, engine, binds)
    except NotEntered as error:
        raise NotEntered(f"{why}{error}") from None


class _Ended(Exception):
    """The instance ended meanwhile: make a new one."""


def _exists(path: str) -> bool:
    try:
        posix.stat(path)
    except (OSError, ValueError):
        return False
    return True


def _from_daemon(environment: str, engine: str, binds: "Sequence[str]") -> Target:
    reply, fds = protocol.request(
        "join", meanwhile=_prepare, env=environment, engine=engine, binds=list(binds)
    )
    names = reply.get("fds")
    if not isinstance(names, list) or len(names) != len(fds):
        for fd in fds:
            posix.close(fd)
        raise NotEntered("sdeed's answer isn't understood: versions of sdee and sdeed differ")
    target = Target(environment, dict(zip(map(str, names), fds, strict=True)), reply)
    if "member" not in target.fds:
        target.close()
        raise _Ended
    return target


def _prepare() -> None:
    """What comes next, imported while the daemon is at work."""
    import _json  # noqa: F401 - for the answer

    from sdee_launch import member  # noqa: F401
