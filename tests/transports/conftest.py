"""Fixtures of the transports' tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The directory that the mirror shows."""
    path = tmp_path / "source"
    path.mkdir()
    (path / "file").write_bytes(b"content of the file\n")
    (path / "directory").mkdir()
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where it is mounted."""
    path = tmp_path / "root"
    path.mkdir()
    return path
