"""How long a command takes, to the microsecond."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from perf.failures import reason
from perf.figures import Missing


def seconds_of(command: Sequence[str], *, timeout: float = 120, cwd: Path | str = "/") -> float:
    """Seconds from the start of a command to its end, its output thrown away.

    Raises Missing with what it said where it fails or takes longer than `timeout` seconds, and
    where it can't be started.
    """
    # Not subprocess's own timeout: that one polls, and sleeps up to 50 ms after the command's end.
    late = threading.Event()
    process: subprocess.Popen[bytes] | None = None

    def stop() -> None:
        late.set()
        if process:
            process.kill()

    watchdog = threading.Timer(timeout, stop)
    watchdog.start()
    said = os.memfd_create("stderr")
    try:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, cwd=cwd
        )
        status = process.wait()
        seconds = time.perf_counter() - start
        if late.is_set():
            raise Missing(f"doesn't run here: {command[0]} didn't end within {timeout:.0f} s")
        if status:
            why = reason(os.pread(said, 65536, 0), f"{command[0]}: exit status {status}")
            raise Missing(f"doesn't run here: {why}")
        return seconds
    except OSError as error:
        raise Missing(f"doesn't run here: {error}") from None
    finally:
        watchdog.cancel()
        watchdog.join()
        os.close(said)
