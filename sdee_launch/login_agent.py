"""ssh's agent, brought into an instance: its socket lies in the host's /tmp, which isn't inside.

A helper enters the instance's user and mount namespaces, binds a socket under the same name there,
and hands it out; a relay on the host passes each connection on to the real agent. So SSH_AUTH_SOCK
stays as it is, and no descriptor of the host's directories gets inside. The relay ends with the
login that started it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import stat

from mount_helpers import syscalls as sc

#: Connections at the same time; more wait in the socket's queue.
MOST_CONNECTIONS = 64


def relay(path: str, user: int, mount: int) -> int | None:
    """Start a relay for the agent at `path` into the instance of these two namespaces.

    Gives the relay's pid, a child of the caller that dies with it; None if there is no agent, or
    its path is already to be seen inside. Descriptors stay the caller's.
    """
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return None
    except OSError:
        return None
    listener = _listen_inside(path, user, mount)
    if listener is None:
        return None
    parent = os.getpid()
    pid = os.fork()
    if pid:
        listener.close()
        return pid
    try:
        sc.prctl(sc.PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == parent:
            os.setsid()
            _let_go_of_terminal()
            _serve(listener, path)
    finally:
        os._exit(0)


def _let_go_of_terminal() -> None:
    """Whoever waits for the end of the login's output must not wait for the relay."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)


def _listen_inside(path: str, user: int, mount: int) -> socket.socket | None:
    ours, its = socket.socketpair()
    pid = os.fork()
    if not pid:
        try:
            ours.close()
            sc.setns(user, sc.CLONE_NEWUSER)
            sc.setns(mount, sc.CLONE_NEWNS)
            directory = os.path.dirname(path)
            if not os.path.exists(path):
                os.umask(0o077)
                os.makedirs(directory, mode=0o700, exist_ok=True)
                listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                listener.bind(path)
                listener.listen(16)
                socket.send_fds(its, [b"x"], [listener.fileno()])
        except OSError:
            pass
        finally:
            os._exit(0)
    its.close()
    with ours:
        try:
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        except OSError:
            fds = []
    os.waitpid(pid, 0)
    return socket.socket(fileno=fds[0]) if fds else None


def _serve(listener: socket.socket, path: str) -> None:
    """Pass on what comes, both ways, until killed."""
    peers: dict[socket.socket, socket.socket] = {}

    def drop(sock: socket.socket) -> None:
        other = peers.pop(sock)
        del peers[other]
        sock.close()
        other.close()

    while True:
        room = [listener] if len(peers) < 2 * MOST_CONNECTIONS else []
        ready, _, _ = select.select([*room, *peers], [], [])
        for sock in ready:
            if sock is listener:
                client, _ = listener.accept()
                agent = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    agent.connect(path)
                except OSError:
                    client.close()
                    agent.close()
                    continue
                peers[client], peers[agent] = agent, client
                continue
            if sock not in peers:
                continue
            try:
                data = sock.recv(65536)
                if data:
                    peers[sock].sendall(data)
                    continue
            except OSError:
                pass
            with contextlib.suppress(OSError, KeyError):
                drop(sock)
