"""Trees to measure on, made once per scratch directory."""

from __future__ import annotations

import os
import random
import subprocess
import zipfile
from pathlib import Path

#: Seconds since 1970.
_LONG_AGO = 1_750_000_000
#: A package for pip.
WHEEL = "perf_tree-1-py3-none-any.whl"


def _made(path: Path) -> bool:
    return (path.parent / f"{path.name}.made").exists()


def _done(path: Path) -> None:
    (path.parent / f"{path.name}.made").touch()


def tree(path: Path, files: int, seed: int = 1) -> Path:
    """A source-like tree: `files` small files (about 2 kB each), 25 in a directory, 3 deep."""
    if _made(path):
        return path
    generator = random.Random(seed)
    text = bytes(generator.choices(b"abcdefghij klmnop\n", k=16384))
    for number in range(files):
        directory = path / f"d{number // 2500}" / f"d{number // 250 % 10}" / f"d{number // 25 % 10}"
        if number % 25 == 0:
            directory.mkdir(parents=True, exist_ok=True)
        start = generator.randrange(8192)
        (directory / f"file{number}.txt").write_bytes(text[start : start + 1 + start // 2])
    _done(path)
    return path


def archive(path: Path, source: Path) -> Path:
    """A tar of `source`."""
    if not _made(path):
        subprocess.run(["tar", "-C", str(source), "-cf", str(path), "."], check=True)
        _done(path)
    return path


def repository(path: Path, source: Path) -> Path:
    """A git repository whose work tree is a copy of `source`, last changed long before its index.

    (git reads all files again that changed in the index's own second: gitformat-index(5), racy-git.)
    """
    if _made(path):
        return path
    subprocess.run(["cp", "-a", str(source), str(path)], check=True)
    for file in path.rglob("*"):
        os.utime(file, (_LONG_AGO, _LONG_AGO))
    git = ["git", "-C", str(path), "-c", "user.name=perf", "-c", "user.email=perf@localhost"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    _done(path)
    return path


def data_file(path: Path, size: int) -> Path:
    """A file of `size` bytes that doesn't compress."""
    if not _made(path):
        with path.open("wb") as file:
            generator = random.Random(2)
            for _ in range(size >> 20):
                file.write(generator.randbytes(1 << 20))
        _done(path)
    return path


def flat(path: Path, files: int) -> Path:
    """One directory with `files` files of 2 kB, file0 and so on."""
    if not _made(path):
        path.mkdir()
        for number in range(files):
            (path / f"file{number}").write_bytes(b"x" * 2048)
        _done(path)
    return path


def modules(path: Path, count: int) -> Path:
    """`path`/import.py, a program that imports so many modules beside it."""
    place = path / "modules"
    if not _made(place):
        place.mkdir()
        for number in range(count):
            (place / f"m{number}.py").write_text(f"value = {number}\n")
        names = "\n".join(f"import m{n}" for n in range(count))
        (path / "import.py").write_text(
            "import sys\nsys.dont_write_bytecode = True\n"
            f"sys.path.insert(0, __file__.rpartition('/')[0] + '/modules')\n{names}\n"
        )
        _done(place)
    return path / "import.py"


def wheel(directory: Path, count: int) -> Path:
    """A package of so many modules of about 1 kB, 25 in a directory, as pip installs it."""
    path, about = directory / WHEEL, "perf_tree-1.dist-info"
    if not _made(path):
        files = {
            f"perf_tree/p{n // 25}/m{n}.py": "".join(f"v{i} = {i}\n" for i in range(n % 200))
            for n in range(count)
        }
        files[f"{about}/METADATA"] = "Metadata-Version: 2.1\nName: perf-tree\nVersion: 1\n"
        files[f"{about}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        files[f"{about}/RECORD"] = "".join(f"{name},,\n" for name in (*files, f"{about}/RECORD"))
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        _done(path)
    return path
