"""Running a session in a process of its own: the caller returns once the mount is usable.

Everything that goes wrong before that reaches the caller's terminal and exit status; nothing of
the server stays on the caller's descriptors afterwards.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import sys
import traceback

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sdeefs.options import Options

OK, FAILURE, USAGE = 0, 1, 2


def complaint(error: BaseException) -> tuple[int, str]:
    """The exit status and the one line of an error before the mount was usable."""
    from sdeefs.options import UsageError
    from sdeefs.refusals import Refused

    if isinstance(error, UsageError):
        return USAGE, str(error)
    if isinstance(error, Refused):
        return FAILURE, str(error)
    if isinstance(error, OSError):
        if error.errno == errno.EMFILE:
            limit = os.sysconf("SC_OPEN_MAX")
            return FAILURE, f"open files: the limit of {limit} is reached: raise it (ulimit -n)"
        name = error.filename
        where = f"{os.fsdecode(name)}: " if isinstance(name, (str, bytes)) else ""
        return FAILURE, f"{where}{error.strerror or error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    return FAILURE, f"internal error: {error!r}"


def foreground(options: Options, merged: bytes, level: str, log_file: str | None) -> int:
    """Serve in this process until the mount is gone."""
    from sdeefs import log
    from sdeefs.session import Session

    log.start(level, log_file)
    session = Session(options, merged)
    try:
        session.open()
        os.chdir("/")
        return session.run()
    finally:
        session.close()


class Background:
    """A server to be, forked early: it imports what it needs while its maker still checks.

    Use `serve` once, or `discard`, which does nothing after that.
    """

    def __init__(self) -> None:
        asked, self._ask = os.pipe2(os.O_CLOEXEC)
        self._told, told = os.pipe2(os.O_CLOEXEC)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # None: it was closed
                stream.flush()
        self._pid = os.fork()
        if self._pid == 0:
            status = FAILURE
            try:
                os.close(self._ask)
                os.close(self._told)
                status = _child(asked, told)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        self._waits = True
        os.close(asked)
        os.close(told)

    def serve(self, options: Options, merged: bytes, level: str, log_file: str | None) -> int:
        """Let it serve; its pid once the mount is usable.

        Raises Refused (or UsageError) with its complaint.
        """
        from sdeefs.options import UsageError
        from sdeefs.refusals import Refused

        self._waits = False
        answer = b""
        try:
            with open(self._ask, "wb") as pipe:
                pipe.write(pickle.dumps((options, merged, level, log_file)))
            while part := os.read(self._told, 1 << 16):
                answer += part
                if answer.endswith(b"\n"):
                    break
        except BrokenPipeError:
            pass  # it has ended
        except BaseException:
            os.kill(self._pid, signal.SIGTERM)
            raise
        finally:
            os.close(self._told)
        if answer == b"live\n":
            return self._pid
        _, status = os.waitpid(self._pid, 0)
        try:
            kind, message = json.loads(answer)
        except ValueError:
            how = f"by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "without a word"
            raise Refused(f"the server ended {how} before the mount was usable") from None
        raise UsageError(message) if kind == USAGE else Refused(message)

    def discard(self) -> None:
        """It isn't needed."""
        if not self._waits:
            return
        self._waits = False
        os.close(self._ask)
        os.close(self._told)
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


def _leave_terminal() -> None:
    """Be nothing that the terminal's keys and its end are about.

    The session stays the caller's. Linux groups processes by session for scheduling (sched(7),
    autogroup), and a caller that is in one group with the server isn't sent to another CPU each time
    it is answered.
    """
    os.setpgid(0, 0)
    for number in (signal.SIGTTIN, signal.SIGTTOU, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)


def _child(asked: int, tell: int) -> int:
    _leave_terminal()
    from sdeefs.preload import preload

    preload(with_trio=False)  # it waits until requests are served
    from sdeefs import log
    from sdeefs.options import UsageError
    from sdeefs.refusals import Refused
    from sdeefs.session import Session

    with open(asked, "rb") as pipe:
        words = pipe.read()
    if not words:
        return OK  # there was something to complain of
    options, merged, level, log_file = pickle.loads(words)
    log.start(level, log_file)
    session = Session(options, merged)
    try:
        try:
            session.open()
        except BaseException as error:
            if not isinstance(error, (UsageError, Refused, OSError)):
                traceback.print_exc()
            os.write(tell, json.dumps(complaint(error)).encode() + b"\n")
            return FAILURE
        own_log = log_file
        if own_log is None and session.control is not None:
            own_log = str(session.control.directory / f"{session.control.identity}.log")
        detach(own_log, level)
        os.write(tell, b"live\n")
        os.close(tell)
        status = session.run()
    finally:
        session.close()
    if own_log is not None and own_log != log_file:
        _remove_if_empty(own_log)
    return status


def detach(log_file: str | None, level: str) -> None:
    """Leave the caller's directory and terminal."""
    from sdeefs import log

    os.chdir("/")
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    log.start(level, log_file)


def _remove_if_empty(path: str) -> None:
    try:
        if os.stat(path).st_size == 0:
            os.unlink(path)
    except OSError:
        pass
