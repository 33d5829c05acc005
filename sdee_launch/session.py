"""`sdee run` and `sdee shell`: a command in the instance of an environment, as if it ran right here.

This process joins the user and mount namespace, forks the command into the PID namespace, and stays
outside of that: it passes on signals, stops when the command stops, and ends as it ended. Terminal,
session, process group, cgroup and limits are those of the caller.

A fresh interpreter runs this for each `sdee run`, so it imports only builtin modules and what
joining needs: no argparse, no signal (which brings enum), no configuration unless there is one.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]
import os
import stat
import sys
import time

from sdee_launch import membership, protocol

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing and collections.abc cost more than all the rest
    from collections.abc import Callable, Sequence
    from typing import NoReturn, TypedDict

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
_SI_KERNEL = 0x80
_FD_NAMES = ("user", "mnt", "pid")


class NotEntered(Exception):
    """Why the environment can't be entered, in one line."""


class Usage(Exception):
    """A wrong argument, in one line."""


class Target:
    """A live instance to join. Owns its descriptors."""

    def __init__(self, environment: str, fds: dict[str, int], join: dict[str, object]) -> None:
        self.environment = environment
        self.fds = fds
        self.join = join

    def close(self) -> None:
        """Close what is left of the descriptors."""
        for fd in self.fds.values():
            os.close(fd)
        self.fds = {}


def parse(arguments: Sequence[str]) -> Options:
    """The options of run and shell, up to the command. Raises Usage."""
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


def main(arguments: Sequence[str]) -> int:
    """`sdee run …`, `sdee shell …`; the exit status."""
    word, *rest = arguments
    if "-h" in rest[:1] or "--help" in rest[:1]:
        from sdee_launch.cli import main as all_of_it

        return all_of_it(arguments)
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
    except Usage as error:
        print(f"sdee {word}: {error}", file=sys.stderr)
        return 2
    except NotEntered as error:
        print(f"sdee: {error}", file=sys.stderr)
        return 1


def _shell() -> str:
    """The user's shell, unless that is the way into environments."""
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
    command: Sequence[str],
    environment: str = "",
    engine: str = "",
    binds: Sequence[str] = (),
    *,
    argv0: str | None = None,
    rootless: bool = False,
    before: Callable[[Target], None] | None = None,
) -> int:
    """Run a command in an environment's instance and give its exit status (128+n for signals).

    `before` is called on the host, with the instance found. Raises NotEntered.
    """
    inside = _inside()
    environment, engine, more = _defaults(environment, engine)
    if inside is not None:
        if inside != environment and environment != "default":
            raise NotEntered(f"this is the inside of {inside}: leave it to enter {environment}")
        _become(command, argv0, dict(os.environ))
    target = find(environment, engine, [*more, *binds], rootless)
    if before is not None:
        before(target)
    return _in_instance(target, command, argv0)


def _inside() -> str | None:
    """The environment that this process is in."""
    try:
        with open("/run/sdee/inside", encoding="ascii") as file:
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
    environment = environment or os.environ.get("SDEE_ENV", "")
    home = os.environ.get("HOME", "")
    site_file = os.environ.get("SDEE_CONFIG", "/etc/sdee/sdee.toml")
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


def find(environment: str, engine: str, binds: Sequence[str], rootless: bool = False) -> Target:
    """The live instance of an environment, made if there is none; we are a member of it.

    Raises NotEntered.
    """
    deadline = time.monotonic() + PATIENCE
    socket = os.environ.get("SDEED_SOCKET") or protocol.SOCKET_PATH
    if os.environ.get("SDEE_MODE") == "rootless":
        rootless = True
    why = ""
    while not rootless:
        try:
            return _from_daemon(environment, engine, binds)
        except membership.Ended:
            reason = f"the instance of {environment} ended again and again"
        except protocol.Refused as error:
            if error.kind == "rootless":
                why = f"{error}; without the daemon: "
                break
            if error.kind != "gone":
                raise NotEntered(str(error)) from None
            reason = str(error)
        except protocol.Unavailable as error:
            if not os.path.exists(socket):
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


def _from_daemon(environment: str, engine: str, binds: Sequence[str]) -> Target:
    reply, fds = protocol.request(
        "join", meanwhile=_prepare, env=environment, engine=engine, binds=list(binds)
    )
    names = reply.get("fds")
    if not isinstance(names, list) or len(names) != len(fds):
        for fd in fds:
            os.close(fd)
        raise NotEntered("sdeed's answer isn't understood: versions of sdee and sdeed differ")
    target = Target(environment, dict(zip(map(str, names), fds, strict=True)), reply)
    if "member" not in target.fds:
        target.close()
        raise membership.Ended
    return target


def _prepare() -> None:
    """What joining needs, imported while the daemon is at work."""
    from sdee_launch import join  # noqa: F401


def _in_instance(target: Target, command: Sequence[str], argv0: str | None) -> int:
    """Enter, fork the command, stay with it."""
    from sdee_launch import join

    try:
        cwd: str | None = os.getcwd()
    except OSError:
        cwd = None
    more = target.join.get("namespaces")
    names = [*_FD_NAMES, *(n for n in (more if isinstance(more, list) else ()) if n in target.fds)]
    try:
        join.enter([(n, target.fds[n]) for n in names], target.fds.get("root"))
    except OSError as error:
        raise NotEntered(f"the instance of {target.environment}: {error.strerror}") from None
    foreground = _foreground()
    alive, held = os.pipe2(os.O_CLOEXEC)
    everything = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, everything)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        pid = os.fork()
    except OSError as error:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise NotEntered(
            f"the instance of {target.environment} was ended just now: {error.strerror}"
        ) from None
    if not pid:
        _child(target, join, command, argv0, cwd, before, alive, held)
    for name in [n for n in target.fds if n != "member"]:
        os.close(target.fds.pop(name))
    os.close(alive)
    return _stay(pid, everything, foreground)


def _child(
    target: Target,
    join: object,
    command: Sequence[str],
    argv0: str | None,
    cwd: str | None,
    mask: set[int],
    alive: int,
    held: int,
) -> NoReturn:
    """In the forked process: become the command."""
    status = 126
    try:
        from sdee_launch import join as joining

        os.close(held)
        joining.die_with_parent(signal.SIGKILL)
        _die_if_alone(alive)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # the interpreter ignores them
            signal.signal(number, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        variables = dict(os.environ)
        variables["SDEE_ENVIRONMENT"] = target.environment
        given = target.join.get("environment")
        for name, value in (given if isinstance(given, dict) else {}).items():
            variables.setdefault(str(name), str(value))
        _go(cwd, variables)
        _close_directories()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        joining.apply_guard(
            int(str(target.join.get("capabilities", "0")), 16),
            bytes.fromhex(str(target.join.get("seccomp", ""))),
            bool(target.join.get("no_new_privs")),
        )
        _become(command, argv0, variables)
    except NotEntered as error:
        print(f"sdee: {error}", file=sys.stderr, flush=True)
        status = 127 if error.__context__.__class__ is FileNotFoundError else 126
    except OSError as error:
        print(f"sdee: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def _die_if_alone(alive: int) -> None:
    """Had the parent died before it was asked about, its end of the pipe would be closed."""
    os.set_blocking(alive, False)
    try:
        if os.read(alive, 1) == b"":
            os._exit(1)
    except BlockingIOError:
        pass


def _go(cwd: str | None, variables: dict[str, str]) -> None:
    """To the working directory of the caller, or home, or /."""
    home = variables.get("HOME") or "/"
    for place in (cwd, home, "/"):
        if place is None:
            continue
        try:
            os.chdir(place)
        except OSError:
            continue
        if place != cwd:
            print(
                f"sdee: {cwd or 'the working directory'} isn't in the environment; this is {place}",
                file=sys.stderr,
                flush=True,
            )
            variables["PWD"] = place
        return


def _close_directories() -> None:
    """A directory of the host that was left open would be a way out of the instance."""
    for entry in os.listdir("/proc/self/fd"):
        fd = int(entry)
        try:
            if stat.S_ISDIR(os.fstat(fd).st_mode) and os.get_inheritable(fd):
                os.close(fd)
        except OSError:
            continue


def _become(command: Sequence[str], argv0: str | None, variables: dict[str, str]) -> NoReturn:
    """exec(2). Raises NotEntered with the shell's words for why not."""
    if sys.stdout is not None:  # None: it was closed
        sys.stdout.flush()
    path = command[0]
    words = [argv0 or path, *command[1:]]
    try:
        if "/" in path:
            os.execve(path, words, variables)
        os.execvpe(path, words, variables)
    except OSError as error:
        raise NotEntered(f"{path}: {error.strerror}") from error


def _foreground() -> int | None:
    """The terminal's descriptor, if we are its foreground process group."""
    for fd in (0, 2, 1):
        try:
            if os.tcgetpgrp(fd) == os.getpgrp():
                return fd
        except OSError:
            continue
    return None


def _stay(pid: int, everything: set[int], terminal: int | None) -> int:
    """Wait for the command: pass on what others send us, stop and go on with it."""

    def take_terminal() -> None:
        # A shell inside can't name our group when it gives the terminal back.
        if terminal is not None:
            try:
                os.tcsetpgrp(terminal, os.getpgrp())
            except OSError:
                pass

    while True:
        info = signal.sigwaitinfo(everything)
        number = info.si_signo
        if number == signal.SIGCHLD:
            while True:
                try:
                    done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
                except ChildProcessError:
                    return 1
                if not done:
                    break
                if os.WIFSTOPPED(status):
                    take_terminal()
                    os.kill(os.getpid(), signal.SIGSTOP)
                    _continue(pid)
                    continue
                take_terminal()
                if os.WIFSIGNALED(status):
                    return 128 + os.WTERMSIG(status)
                return os.WEXITSTATUS(status)
        elif number == signal.SIGCONT:
            _continue(pid)
        elif info.si_code != _SI_KERNEL or number == signal.SIGHUP:
            # What the terminal sends, the command has got itself; but for its hang-up, of which
            # only the session's leader hears, and that is us after a login.
            try:
                os.kill(pid, number)
            except OSError:
                pass


def _continue(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGCONT)
    except OSError:
        pass
