"""POSIX checks: memory maps."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tests.fslab.posix_place import Place, check, fails


@check
def mmap_shared_is_written(p: Place) -> Iterator[None]:
    p.write("f", b"#" * 8192)
    yield
    import mmap

    fd = p.open("f", os.O_RDWR)
    with mmap.mmap(fd, 8192) as area:
        area[5000:5005] = b"HELLO"
        area.flush()
        assert os.pread(fd, 5, 5000) == b"HELLO"
    assert p.read("f")[5000:5005] == b"HELLO"


@check
def mmap_sees_writes(p: Place) -> Iterator[None]:
    p.write("f", b"#" * 8192)
    yield
    import mmap

    fd = p.open("f", os.O_RDWR)
    with mmap.mmap(fd, 8192, mmap.MAP_SHARED, mmap.PROT_READ) as area:
        assert area[0:1] == b"#"
        os.pwrite(fd, b"NEW", 0)
        assert area[0:3] == b"NEW"


@check
def mmap_private_is_not_written(p: Place) -> Iterator[None]:
    p.write("f", b"#" * 4096)
    yield
    import mmap

    fd = p.open("f", os.O_RDONLY)
    with mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as area:
        area[0:3] = b"abc"
        assert p.read("f")[:3] == b"###"
    fails("EACCES", mmap.mmap, fd, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE)


@check
def mmap_outlives_close_and_unlink(p: Place) -> Iterator[None]:
    p.write("f", b"#" * 4096)
    yield
    import mmap

    fd = os.open(p / "f", os.O_RDWR)
    with mmap.mmap(fd, 4096) as area:
        os.close(fd)
        os.unlink(p / "f")
        area[0:3] = b"abc"
        assert area[0:4] == b"abc#"


@check
def mmap_before_copy_up(p: Place) -> Iterator[None]:
    p.write("f", b"#" * 4096)
    yield
    import mmap

    reader = p.open("f", os.O_RDONLY)
    with mmap.mmap(reader, 4096, mmap.MAP_SHARED, mmap.PROT_READ) as area:
        assert area[0:1] == b"#"
        writer = p.open("f", os.O_RDWR)
        os.pwrite(writer, b"NEW", 0)
        assert os.pread(writer, 3, 0) == b"NEW"
        assert area[0:3] in (b"###", b"NEW")  # overlayfs: the lower file's page
    assert p.read("f")[:3] == b"NEW"


@check
def mmap_writes_through_two_handles(p: Place) -> Iterator[None]:
    p.write("f", b"#" * 4096)
    yield
    import mmap

    one, two = p.open("f", os.O_RDWR), p.open("f", os.O_RDWR)
    with mmap.mmap(one, 4096) as first, mmap.mmap(two, 4096) as second:
        first[0:3] = b"one"
        assert second[0:3] == b"one"
        second[3:6] = b"two"
        assert first[0:6] == b"onetwo"
    assert p.read("f")[:6] == b"onetwo"
