"""What a person sees and types on a terminal."""

from __future__ import annotations

import os
import select
import time


class Screen:
    """The master side `fd` of a terminal, and what was `seen` on it."""

    fd: int
    seen: str
    patience: float  # seconds that a text may take to appear

    def type(self, text: str) -> None:
        """Keys."""
        os.write(self.fd, text.encode())

    def expect(self, text: str, seconds: float | None = None) -> str:
        """Wait until this is on the screen; gives what was there up to it, and forgets it."""
        deadline = time.monotonic() + (self.patience if seconds is None else seconds)
        while text not in self.seen:
            left = deadline - time.monotonic()
            assert left > 0, f"no {text!r} in {self.seen!r}"
            if select.select([self.fd], [], [], left)[0]:
                try:
                    more = os.read(self.fd, 65536)
                except OSError:
                    more = b""
                assert more, f"ended without {text!r}: {self.seen!r}"
                self.seen += more.decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before
