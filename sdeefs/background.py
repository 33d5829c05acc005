"""Running a session in a process of its own: the caller returns once the mount is usable.

Everything that goes wrong before that reaches the caller's terminal and exit status; nothing of
the server stays on the caller's descriptors afterwards.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback

from sdeefs import log
from sdeefs.options import Options, UsageError
from sdeefs.refusals import Refused

OK, FAILURE, USAGE = 0, 1, 2


def complaint(error: BaseException) -> tuple[int, str]:
    """The exit status and the one line of an error before the mount was usable."""
    if isinstance(error, UsageError):
        return USAGE, str(error)
    if isinstance(error, Refused):
        return FAILURE, str(error)
    if isinstance(error, OSError):
        name = error.filename
        where = f"{os.fsdecode(name)}: " if isinstance(name, (str, bytes)) else ""
        return FAILURE, f"{where}{error.strerror or error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    return FAILURE, f"internal error: {error!r}"


def foreground(options: Options, merged: bytes, level: str, log_file: str | None) -> int:
    """Serve in this process until the mount is gone."""
    from sdeefs.session import Session

    log.start(level, log_file)
    session = Session(options, merged)
    try:
        session.open()
        os.chdir("/")
        return session.run()
    finally:
        session.close()


def background(options: Options, merged: bytes, level: str, log_file: str | None) -> int:
    """Serve in a child that lives on; returns its pid once the mount is usable.

    Raises Refused (or UsageError) with the child's complaint.
    """
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = FAILURE
        try:
            os.close(ours)
            status = _child(options, merged, level, log_file, theirs)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(theirs)
    try:
        answer = b""
        while part := os.read(ours, 1 << 16):
            answer += part
            if answer.endswith(b"\n"):
                break
    except BaseException:
        os.kill(pid, signal.SIGTERM)
        raise
    finally:
        os.close(ours)
    if answer == b"live\n":
        return pid
    _, status = os.waitpid(pid, 0)
    try:
        kind, message = json.loads(answer)
    except ValueError:
        how = f"by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "without a word"
        raise Refused(f"the server ended {how} before the mount was usable") from None
    raise UsageError(message) if kind == USAGE else Refused(message)


def _child(options: Options, merged: bytes, level: str, log_file: str | None, tell: int) -> int:
    from sdeefs.session import Session

    os.setsid()
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
