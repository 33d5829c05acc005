"""Shells alive in sandboxes, that run one command after the other.

Slices of a few milliseconds, one contender right after the other, are what makes small differences
visible on a machine whose speed changes from second to second; nobody could start a sandbox for each.
"""

from __future__ import annotations

import os
import re
import select
import shlex
import subprocess
import time
from collections.abc import Sequence

from perf.failures import reason
from perf.figures import Missing
from perf.sandboxes import Sandbox

_LOOP = 'while IFS= read -r line; do eval "$line" </dev/null; echo "=done $?"; done'
_DONE = re.compile(rb"=done (\d+)\n\Z")


class Session:
    """One shell in one sandbox; starts at once. Raises Missing where the sandbox isn't installed."""

    def __init__(self, sandbox: Sandbox) -> None:
        command = sandbox.command("/bin/sh", "-c", _LOOP)
        self._errors = os.memfd_create("stderr")
        self._process = subprocess.Popen(
            command,
            bufsize=0,
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )

    def _said(self, since: int) -> bytes:
        return os.pread(self._errors, 65536, since)

    def ask(self, words: Sequence[str], timeout: float) -> str:
        """What a command prints inside. Raises Missing with the reason where it doesn't run."""
        assert self._process.stdin and self._process.stdout
        since = os.fstat(self._errors).st_size
        try:
            self._process.stdin.write(shlex.join(words).encode() + b"\n")
        except BrokenPipeError:
            raise Missing(f"doesn't run here: {reason(self._said(0), 'it ended')}") from None
        deadline = time.monotonic() + timeout
        answer = b""
        while not (done := _DONE.search(answer)):
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                raise Missing(f"doesn't run here: {words[0]} didn't end within {timeout:.0f} s")
            part = os.read(self._process.stdout.fileno(), 65536)
            if not part:
                raise Missing(f"doesn't run here: {reason(self._said(0), 'it ended')}")
            answer += part
        if done[1] != b"0":
            raise Missing(
                f"doesn't run here: {reason(self._said(since), f'exit status {done[1].decode()}')}"
            )
        return answer[: done.start()].decode("utf-8", "replace")

    def close(self) -> None:
        """End the shell, and the sandbox with it."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        os.close(self._errors)


class Sessions:
    """A session for each sandbox that was asked something; a context manager that ends them all.

    What doesn't start isn't tried again.
    """

    def __init__(self) -> None:
        self._live: dict[str, Session] = {}
        self._failed: dict[str, str] = {}

    def ask(self, sandbox: Sandbox, *words: str, timeout: float = 120) -> str:
        """What a command prints inside. Raises Missing with the reason where it doesn't run."""
        if sandbox.name in self._failed:
            raise Missing(self._failed[sandbox.name])
        session = self._live.get(sandbox.name)
        if session is None:
            try:
                session = Session(sandbox)
                self._live[sandbox.name] = session
                session.ask(["true"], timeout)
            except Missing as error:
                self._failed[sandbox.name] = str(error)
                raise
        return session.ask(words, timeout)

    def __enter__(self) -> Sessions:
        return self

    def __exit__(self, *_: object) -> None:
        for session in self._live.values():
            session.close()
