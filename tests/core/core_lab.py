"""A core without a mount: layers in a directory, and requests by path, Laters finished at once."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdeefs.core.api import Attributes, Caller, Entry, Later, SetAttributes
from sdeefs.core.filesystem import Filesystem
from sdeefs.core.settings import Settings

ROOT = Caller(0, 0, 1)
USER = Caller(1234, 1235, 1)


def finish(answer: Any) -> Any:
    """The answer of a request, also of one that takes long."""
    while isinstance(answer, Later):
        answer = answer.finish()
    return answer


class Core:
    """Layers below `base` (lower, lower2, …; upper; work) and a Filesystem over them."""

    def __init__(self, base: Path, lowers: int = 1) -> None:
        self.base = base
        self.lowers = [base / (f"lower{n}" if n else "lower") for n in range(lowers)]
        self.lower = self.lowers[0]
        self.upper, self.work = base / "upper", base / "work"
        for path in [*self.lowers, self.upper, self.work]:
            path.mkdir()
        self.settings = Settings(
            lowers=tuple(os.fsencode(path) for path in self.lowers),
            upper=os.fsencode(self.upper),
            work=os.fsencode(self.work),
        )
        self.opened: Filesystem | None = None

    def open(self, **changes: Any) -> Filesystem:
        """Open (again)."""
        self.close()
        self.settings = replace(self.settings, **changes)
        self.opened = Filesystem(self.settings)
        return self.opened

    @property
    def fs(self) -> Filesystem:
        return self.opened if self.opened is not None else self.open()

    def close(self) -> None:
        """Close if it is open."""
        if self.opened is not None:
            self.opened.close()
            self.opened = None

    # requests by path

    def split(self, path: str) -> tuple[int, bytes]:
        """(node of the directory, name)."""
        parts = [os.fsencode(p) for p in path.split("/") if p]
        node = 1
        for part in parts[:-1]:
            node = self.entry_of(node, part).node
        return node, parts[-1]

    def entry_of(self, parent: int, name: bytes) -> Entry:
        entry = self.fs.lookup(parent, name, ROOT)
        if entry.attributes is None:
            raise FileNotFoundError(os.fsdecode(name))
        return entry

    def node(self, path: str) -> int:
        """The node of a path."""
        return 1 if path in ("", "/") else self.entry_of(*self.split(path)).node

    def stat(self, path: str) -> Attributes:
        """lstat."""
        return self.fs.getattr(self.node(path))[0]

    def exists(self, path: str) -> bool:
        try:
            self.node(path)
        except FileNotFoundError:
            return False
        return True

    def list(self, path: str = "") -> list[str]:
        """The names of a directory, sorted; d_ino is checked against st_ino."""
        node = self.node(path)
        entries = list(self.fs.readdir(node, 0))
        assert [e.name for e in entries[:2]] == [b".", b".."]
        for entry in entries[2:]:
            found = self.fs.lookup(node, entry.name, ROOT)
            assert found.attributes is not None and found.attributes.ino == entry.ino, entry
        return sorted(os.fsdecode(e.name) for e in entries[2:])

    def read(self, path: str) -> bytes:
        """A file's whole content."""
        opened = finish(self.fs.open(self.node(path), os.O_RDONLY, ROOT))
        try:
            return self.fs.read(opened.handle, 0, 1 << 24)
        finally:
            self.fs.release(opened.handle)

    def write(self, path: str, data: bytes, flags: int = os.O_TRUNC, caller: Caller = ROOT) -> None:
        """Open for writing (made if there is none) and write from the start."""
        parent, name = self.split(path)
        entry = self.fs.lookup(parent, name, caller)
        if entry.node:
            opened = finish(self.fs.open(entry.node, os.O_WRONLY | flags, caller))
        else:
            _, opened = finish(self.fs.create(parent, name, 0o644, os.O_WRONLY, 0o022, caller))
        try:
            assert self.fs.write(opened.handle, 0, data, False) == len(data)
        finally:
            self.fs.release(opened.handle)

    def mkdir(self, path: str, mode: int = 0o755, caller: Caller = ROOT) -> Entry:
        parent, name = self.split(path)
        entry = finish(self.fs.mkdir(parent, name, mode, 0o022, caller))
        assert isinstance(entry, Entry)
        return entry

    def change(self, path: str, **fields: Any) -> Attributes:
        """SETATTR."""
        answer = finish(self.fs.setattr(self.node(path), SetAttributes(**fields), 0, ROOT))
        attributes = answer[0]
        assert isinstance(attributes, Attributes)
        return attributes

    def unlink(self, path: str) -> None:
        finish(self.fs.unlink(*self.split(path), ROOT))

    def rmdir(self, path: str) -> None:
        finish(self.fs.rmdir(*self.split(path), ROOT))

    def rename(self, old: str, new: str, flags: int = 0) -> None:
        finish(self.fs.rename(*self.split(old), *self.split(new), flags, ROOT))

    def link(self, old: str, new: str) -> Entry:
        entry = finish(self.fs.link(self.node(old), *self.split(new), ROOT))
        assert isinstance(entry, Entry)
        return entry
