"""The daemon that sdee's lines need, for the time of a run."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perf.figures import Missing
from perf.sandboxes import installed

SITE_SOCKET = Path("/run/sdee/sdeed.sock")


def answers(path: Path) -> bool:
    """Whether a daemon listens there; one that was killed leaves its socket behind."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as end:
        try:
            end.connect(str(path))
        except OSError:
            return False
    return True


@contextmanager
def daemon(user: str | None) -> Iterator[Path | None]:
    """The socket of the site's sdeed, or of one of our own where root measures; None where users do.

    Raises Missing where it doesn't start.
    """
    if os.getuid() or user is None:
        yield None
        return
    if answers(SITE_SOCKET):
        yield SITE_SOCKET
        return
    place = Path(tempfile.mkdtemp(prefix="sdee-perf-", dir="/run"))
    place.chmod(0o755)
    path = place / "sdeed.sock"
    words = [installed("sdeed"), "--socket", str(path), "--state", str(place / "state")]
    try:
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            try:
                deadline = time.monotonic() + 60
                while not path.exists():
                    if process.poll() is not None or time.monotonic() > deadline:
                        log.seek(0)
                        raise Missing(f"sdeed doesn't start: {log.read().decode()[-500:]}")
                    time.sleep(0.02)
                yield path
            finally:
                process.terminate()
                process.wait(timeout=60)
    finally:
        shutil.rmtree(place, ignore_errors=True)
