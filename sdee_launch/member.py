"""The second half of a session: the way into an instance, and the command there.

This process joins the user and mount namespace, forks the command into the PID namespace, and stays
outside of that: it passes on signals, stops when the command stops, and ends as it ended. Terminal,
session, process group, cgroup and limits are those of the caller.

On the path of `sdee run`, so it imports what protocol.py says: `posix` in place of `os`, `_signal` in
place of `signal`, which brings enum.
"""

import _signal as signal  # type: ignore[import-not-found]
import posix
import sys
from _stat import S_ISDIR

from sdee_launch import join, protocol
from sdee_launch.session import NotEntered, Target

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing and collections.abc cost more than all the rest
    from collections.abc import Sequence
    from typing import NoReturn

_SI_KERNEL = 0x80
_FD_NAMES = ("user", "mnt", "pid")
#: Where there is no PATH, as os.defpath.
_DEFAULT_PATH = "/bin:/usr/bin"


def run(target: Target, command: "Sequence[str]", argv0: str | None) -> int:
    """Enter, fork the command, stay with it; its exit status. Raises NotEntered."""
    try:
        cwd: str | None = posix.getcwd()
    except OSError:
        cwd = None
    more = target.join.get("namespaces")
    names = [*_FD_NAMES, *(n for n in (more if isinstance(more, list) else ()) if n in target.fds)]
    try:
        join.enter([(n, target.fds[n]) for n in names], target.fds.get("root"))
    except OSError as error:
        raise NotEntered(f"the instance of {target.environment}: {error.strerror}") from None
    foreground = _foreground()
    alive, held = posix.pipe2(posix.O_CLOEXEC)
    everything = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, everything)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        pid = posix.fork()
    except OSError as error:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        raise NotEntered(
            f"the instance of {target.environment} was ended just now: {error.strerror}"
        ) from None
    if not pid:
        _child(target, command, argv0, cwd, before, alive, held)
    for name in [n for n in target.fds if n != "member"]:
        posix.close(target.fds.pop(name))
    posix.close(alive)
    return _stay(pid, everything, foreground)


def _child(
    target: Target,
    command: "Sequence[str]",
    argv0: str | None,
    cwd: str | None,
    mask: set[int],
    alive: int,
    held: int,
) -> "NoReturn":
    """In the forked process: become the command."""
    status = 126
    try:
        posix.close(held)
        join.die_with_parent(signal.SIGKILL)
        _die_if_alone(alive)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # the interpreter ignores them
            signal.signal(number, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        variables = protocol.variables()
        variables["SDEE_ENVIRONMENT"] = target.environment
        given = target.join.get("environment")
        for name, value in (given if isinstance(given, dict) else {}).items():
            variables.setdefault(str(name), str(value))
        _go(cwd, variables)
        _close_directories()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        join.apply_guard(
            int(str(target.join.get("capabilities", "0")), 16),
            bytes.fromhex(str(target.join.get("seccomp", ""))),
            bool(target.join.get("no_new_privs")),
        )
        become(command, argv0, variables)
    except NotEntered as error:
        print(f"sdee: {error}", file=sys.stderr, flush=True)
        status = 127 if error.__context__.__class__ is FileNotFoundError else 126
    except OSError as error:
        print(f"sdee: {error}", file=sys.stderr, flush=True)
    finally:
        posix._exit(status)


def _die_if_alone(alive: int) -> None:
    """Had the parent died before it was asked about, its end of the pipe would be closed."""
    posix.set_blocking(alive, False)
    try:
        if posix.read(alive, 1) == b"":
            posix._exit(1)
    except BlockingIOError:
        pass


def _go(cwd: str | None, variables: dict[str, str]) -> None:
    """To the working directory of the caller, or home, or /."""
    home = variables.get("HOME") or "/"
    for place in (cwd, home, "/"):
        if place is None:
            continue
        try:
            posix.chdir(place)
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
    for entry in posix.listdir("/proc/self/fd"):
        fd = int(entry)
        try:
            if S_ISDIR(posix.fstat(fd).st_mode) and posix.get_inheritable(fd):
                posix.close(fd)
        except OSError:
            continue


def become(command: "Sequence[str]", argv0: str | None, variables: dict[str, str]) -> "NoReturn":
    """exec(2). Raises NotEntered with the shell's words for why not."""
    if sys.stdout is not None:  # None: it was closed
        sys.stdout.flush()
    path = command[0]
    words = [argv0 or path, *command[1:]]
    try:
        if "/" in path:
            posix.execve(path, words, variables)
        _search(path, words, variables)
    except OSError as error:
        raise NotEntered(f"{path}: {error.strerror}") from error


def _search(name: str, words: list[str], variables: dict[str, str]) -> "NoReturn":
    """As os.execvpe, which imports `warnings` first: a millisecond. Raises OSError."""
    missing: OSError | None = None
    unusable: OSError | None = None
    for place in variables.get("PATH", _DEFAULT_PATH).split(":"):
        try:
            posix.execve(f"{place}/{name}" if place else name, words, variables)
        except (FileNotFoundError, NotADirectoryError) as error:
            missing = error
        except OSError as error:
            unusable = unusable or error
    raise unusable or missing or FileNotFoundError


def _foreground() -> int | None:
    """The terminal's descriptor, if we are its foreground process group."""
    for fd in (0, 2, 1):
        try:
            if posix.tcgetpgrp(fd) == posix.getpgrp():
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
                posix.tcsetpgrp(terminal, posix.getpgrp())
            except OSError:
                pass

    while True:
        info = signal.sigwaitinfo(everything)
        number = info.si_signo
        if number == signal.SIGCHLD:
            while True:
                try:
                    done, status = posix.waitpid(pid, posix.WNOHANG | posix.WUNTRACED)
                except ChildProcessError:
                    return 1
                if not done:
                    break
                if posix.WIFSTOPPED(status):
                    take_terminal()
                    posix.kill(posix.getpid(), signal.SIGSTOP)
                    _continue(pid)
                    continue
                take_terminal()
                if posix.WIFSIGNALED(status):
                    return 128 + posix.WTERMSIG(status)
                return posix.WEXITSTATUS(status)
        elif number == signal.SIGCONT:
            _continue(pid)
        elif info.si_code != _SI_KERNEL or number == signal.SIGHUP:
            # What the terminal sends, the command has got itself; but for its hang-up, of which
            # only the session's leader hears, and that is us after a login.
            try:
                posix.kill(pid, number)
            except OSError:
                pass


def _continue(pid: int) -> None:
    try:
        posix.kill(pid, signal.SIGCONT)
    except OSError:
        pass
