"""A real X server without a screen, and what `ssh -X` and `ssh -Y` to it are like inside."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import User
from tests.env.login_lab import SECONDS, Node

#: No other X server has a screen of this size: who sees it has reached ours.
SIZE = "641x479"


@contextlib.contextmanager
def x_server() -> Iterator[dict[str, str]]:
    """Xvfb, with a cookie that its clients must know; the variables of such a client."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="sdee-x-") as name:
        authority = Path(name, "authority")
        cookie = secrets.token_hex(16)
        environ = {**os.environ, "XAUTHORITY": str(authority)}

        def allow(display: str) -> None:
            subprocess.run(
                ["xauth", "-q", "add", display, "MIT-MAGIC-COOKIE-1", cookie],
                env=environ, check=True, timeout=SECONDS, capture_output=True,
            )  # fmt: skip

        authority.touch(0o600)
        allow(":0")  # the server takes the cookie, whatever display it is for
        read, write = os.pipe()
        log = open(Path(name, "log"), "wb")  # noqa: SIM115 - the process's
        server = subprocess.Popen(
            ["Xvfb", "-displayfd", str(write), "-screen", "0", f"{SIZE}x24", "-nolisten", "tcp",
             "-auth", str(authority)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(write,), cwd="/",
        )  # fmt: skip
        log.close()
        os.close(write)
        try:
            with open(read, encoding="ascii") as told:
                number = told.readline().strip()  # when it listens
            assert number, Path(name, "log").read_text()
            display = f":{number}"
            allow(display)
            yield {**environ, "DISPLAY": display}
        finally:
            server.terminate()
            server.wait(SECONDS)


def x11_is_forwarded(node: Node, user: User) -> None:
    """Programs inside reach the X server of the client, with the cookie that sshd left at home.

    `-X` asks the server for a cookie that can do little, `-Y` passes on the client's own.
    """
    script = (
        "echo $DISPLAY; xdpyinfo; XAUTHORITY=/dev/null xdpyinfo > /dev/null 2>&1 || echo refused"
    )
    with x_server() as environ:
        for way in ("-X", "-Y"):
            done = subprocess.run(
                node.sshd.command(user, way, script), env=environ, stdin=subprocess.DEVNULL,
                capture_output=True, text=True, timeout=SECONDS, check=False,
            )  # fmt: skip
            lines = done.stdout.split("\n")
            assert lines[0].startswith("localhost:"), (way, done)
            assert f"dimensions:    {SIZE} pixels" in done.stdout, (way, done)
            assert "refused" in lines, (way, done)
