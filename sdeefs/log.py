"""The server's log: a file that SIGHUP opens anew, or standard error in the foreground.

By default it says something only when something is wrong.
"""

from __future__ import annotations

import logging
import logging.handlers

LEVELS = ("debug", "info", "warning", "error")
_FORMAT = "%(asctime)s sdeefs[%(process)d] %(levelname)s %(message)s"


def start(level: str, file: str | None) -> None:
    """Log from `level` on into `file`, made with its first line; None is standard error."""
    handler: logging.Handler
    if file is None:
        handler = logging.StreamHandler()
    else:
        handler = logging.handlers.WatchedFileHandler(file, delay=True, errors="backslashreplace")
    handler.setFormatter(logging.Formatter(_FORMAT))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.raiseExceptions = False  # a full disk under the log must not end a mount
    logging.captureWarnings(True)


def reopen() -> None:
    """After SIGHUP: close the file; the next line opens (or makes) it by its name again."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.acquire()
            try:
                if handler.stream is not None:
                    handler.stream.close()
                    handler.stream = None
            finally:
                handler.release()
    logging.getLogger("sdeefs").info("the log was opened anew")
