"""How the daemon's loop talks: frames over trio's sockets, systemd's sockets and its notifications."""

from __future__ import annotations

import contextlib
import os
import socket

import trio

from sdee_launch import protocol


async def send(
    sock: trio.socket.SocketType, message: dict[str, object], fds: list[int], limit: int
) -> None:
    """One frame with descriptors. Raises ValueError if it is longer than `limit`, OSError."""
    data = protocol.frame(message, limit)
    sent = await sock.sendmsg([data], protocol.pack_descriptors(fds))
    while sent < len(data):
        sent += await sock.send(data[sent : sent + (1 << 20)])


async def receive(
    sock: trio.socket.SocketType, most_fds: int, limit: int
) -> tuple[dict[str, object], list[int]]:
    """One frame with at most so many descriptors. Raises ValueError, OSError, EOFError."""
    space = socket.CMSG_SPACE(most_fds * 4) if most_fds else 0
    head, ancillary, _, _ = await sock.recvmsg(4, space, socket.MSG_CMSG_CLOEXEC)
    fds = protocol.unpack_descriptors(ancillary)
    try:
        while len(head) < 4:
            more = await sock.recv(4 - len(head)) if head else b""
            if not more:
                raise EOFError("closed")
            head += more
        length = int.from_bytes(head, "big")
        if length > limit:
            raise ValueError(f"{length} bytes; {limit} is the most")
        data = bytearray()
        while len(data) < length:
            more = await sock.recv(min(length - len(data), 1 << 20))
            if not more:
                raise EOFError("closed")
            data += more
        return protocol.decode(bytes(data)), fds
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def notify(text: str) -> None:
    """sd_notify(3), without systemd's library."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        contextlib.suppress(OSError),
    ):
        sock.sendto(text.encode(), address)


def listening_socket(path: str) -> socket.socket:
    """The socket that systemd opened for us, or a new one at `path`. Raises OSError."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS") == "1":
        for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
            os.environ.pop(name, None)
        os.set_inheritable(3, False)
        return socket.socket(fileno=3)
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # A client that finds the old socket is refused, one that finds the new one is heard: the
        # new one is in place with one rename.
        new = f"{path}.{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        sock.bind(new)
        os.chmod(new, 0o666)
        sock.listen(512)
        os.rename(new, path)
    except BaseException:
        sock.close()
        raise
    return sock
