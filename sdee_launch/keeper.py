"""The processes of the daemon that make instances: one for each user, with one thread and no loop.

The daemon's loop never forks and never touches what belongs to a user. Before it starts it forks a
template; the template forks a keeper for a user at the first request, and the keeper serves that
user alone, so that what hangs (an upper on a dead file server) hangs nobody else. What a keeper has
prepared for its user, such as the idmapped lower, stays open in it for the next instance.

A request is a frame of protocol.py with the descriptors that belong to it; the first is a socket for
the answer. `make` is done by the keeper itself, one after the other; `call` in a child of it. A
keeper ends when the daemon closes its socket or dies; instances live on.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from sdee_launch import protocol
from sdee_launch.init import set_title

#: Seconds that what was prepared for the next request is kept.
_WARM = 60.0
#: Seconds after an answer in which the processors are left to who got it: nothing is prepared yet.
_QUIET = 0.015
#: The most bytes of a request to a keeper or of its answer.
MAX_MESSAGE = 8 * 1024 * 1024

Answer = tuple[dict[str, object], list[int]]


def send(sock: socket.socket, message: dict[str, object], fds: list[int]) -> None:
    """Send one frame with descriptors. Raises OSError, ValueError."""
    data = protocol.frame(message, MAX_MESSAGE)
    sent = sock.sendmsg([data], protocol.pack_descriptors(fds))
    if sent < len(data):
        sock.sendall(data[sent:])


def receive(sock: socket.socket) -> tuple[dict[str, object], list[int]] | None:
    """One frame and its descriptors; None at the end of the stream. Raises OSError, ValueError."""
    head, ancillary, _, _ = sock.recvmsg(
        4, socket.CMSG_SPACE(protocol.MAX_DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC
    )
    fds = protocol.unpack_descriptors(ancillary)
    try:
        if not head:
            return None
        while len(head) < 4:
            head += sock.recv(4 - len(head)) or _ended()
        length = int.from_bytes(head, "big")
        if length > MAX_MESSAGE:
            raise ValueError(f"a message of {length} bytes")
        data = bytearray()
        while len(data) < length:
            data += sock.recv(min(length - len(data), 1 << 20)) or _ended()
        return protocol.decode(bytes(data)), fds
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _ended() -> bytes:
    raise OSError("the other side ended in the middle of a message")


def start_template() -> tuple[int, socket.socket]:
    """Fork the template; call it before there are threads. Gives its pid and the daemon's socket."""
    ours, its = socket.socketpair()
    pid = os.fork()
    if pid:
        its.close()
        return pid, ours
    try:
        ours.close()
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        _template(its)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _template(sock: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are reaped by the kernel
    set_title("sdee-keeper of all")
    _preload()
    while (got := receive(sock)) is not None:
        message, fds = got
        if not os.fork():
            sock.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            set_title(f"sdee-keeper of uid {message['uid']}")
            with socket.socket(fileno=fds[0]) as own:
                _keeper(own)
            os._exit(0)
        for fd in fds:
            os.close(fd)


def _preload() -> None:
    """Import what keepers and the servers they fork need, once for all of them.

    Nothing here depends on a user, and nothing of one ever comes to the template but the number.
    """
    importlib.import_module("sdee_launch.keeper_make")
    try:
        importlib.import_module("sdeefs.public").preload()
    except ImportError as error:
        print(f"sdeed: no engine fuse: {error}", file=sys.stderr)
    # What is here stays; a collection that looks at it would copy its pages in every fork.
    gc.collect()
    gc.freeze()


def _keeper(sock: socket.socket) -> None:
    wake, woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # the wake-up tells
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    send(sock, {"pid": os.getpid()}, [])
    settle_at: float | None = None
    cool_at: float | None = None
    while True:
        due = settle_at or cool_at
        wait = None if due is None else max(0.0, due - time.monotonic())
        # Inits of instances are children of this process: none may stay as a zombie.
        ready, _, _ = select.select([sock.fileno(), wake], [], [], wait)
        if not ready and settle_at is not None:
            _settle()
            settle_at, cool_at = None, time.monotonic() + _WARM
        elif not ready:
            _cool()
            cool_at = None
        if wake in ready:
            os.read(wake, 4096)
            _reap()
        if sock.fileno() not in ready:
            continue
        try:
            got = receive(sock)
        except ConnectionError:
            return
        if got is None:
            return
        message, fds = got
        with socket.socket(fileno=fds[0]) as answer_to:
            if message["do"] == "make":
                if settle_at is not None:
                    _settle()
                _answer(answer_to, make, message, fds[1:])
                answer_to.close()
                _release()
                settle_at = time.monotonic() + _QUIET
            elif not os.fork():
                try:
                    sock.close()
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    os.setsid()
                    _answer(answer_to, call, message, fds[1:])
                finally:
                    os._exit(0)
        for fd in fds[1:]:
            os.close(fd)


def _release() -> None:
    """After an answer: nothing of the instance stays here."""
    from sdee_launch import site

    site.release()


def _settle() -> None:
    """A while after an answer: what the next one can start from."""
    from sdee_launch import site

    try:
        site.settle()
    except (OSError, site.InstanceProblem) as error:
        print(f"sdeed: nothing is prepared: {error}", file=sys.stderr)


def _cool() -> None:
    """Nobody asked for a while: nothing of the user's stays but this process."""
    from sdee_launch import site

    site.discard_spares()


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _answer(
    answer_to: socket.socket,
    work: Callable[[dict[str, object], list[int]], Answer],
    message: dict[str, object],
    fds: list[int],
) -> None:
    """Do the work and say what came of it: what an exception says is the answer then."""
    out: list[int] = []
    try:
        reply, out = work(message, fds)
        reply = {"ok": True, **reply}
    except protocol.Refused as error:
        reply = {"ok": False, "error": str(error), "kind": error.kind}
    except OSError as error:
        name = f"{error.filename!s}: " if error.filename else ""
        text = f"{name}{error.strerror or error}"
        reply = {"ok": False, "error": text, "kind": "failed", "errno": error.errno or 0}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        reply = {"ok": False, "error": f"{type(error).__name__}: {error}", "kind": "failed"}
    try:
        send(answer_to, reply, out)
    except OSError:
        # Nobody waits any more (the daemon died or gave up): an instance that nobody knows of ends.
        pid = reply.get("init")
        if isinstance(pid, int) and pid > 1:
            os.kill(pid, signal.SIGKILL)
    finally:
        for fd in out:
            os.close(fd)


def call(message: dict[str, object], fds: list[int]) -> Answer:
    """Call `module:function`, as the daemon named it, with keyword arguments and descriptors."""
    module, _, name = str(message["target"]).partition(":")
    function = getattr(importlib.import_module(module), name)
    arguments = message.get("arguments")
    assert isinstance(arguments, dict)
    result = function(fds=fds, **arguments) if message.get("with_fds") else function(**arguments)
    if isinstance(result, tuple):
        return result
    return {"result": result}, []


def make(message: dict[str, Any], fds: list[int]) -> Answer:
    """Make an instance (keeper_make.py)."""
    from sdee_launch.keeper_make import make as make_one

    return make_one(message, fds)
