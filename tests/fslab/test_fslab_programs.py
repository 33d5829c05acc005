"""Real programs in merged, each with the result checked against the same on ext4 (or, where the
program changes the system it runs in, against the same in kernel overlayfs over the same root)."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fslab import fslab_lab as lab

ENGINES = lab.chosen(lab.RING, lab.WRITEBACK)
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/nonexistent",
    "LC_ALL": "C.UTF-8", "GIT_CONFIG_NOSYSTEM": "1", "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b",
    "GIT_AUTHOR_DATE": "1700000000 +0000", "GIT_COMMITTER_DATE": "1700000000 +0000",
    "DEBIAN_FRONTEND": "noninteractive", "SOURCE_DATE_EPOCH": "1700000000",
}  # fmt: skip


def shell(directory: Path, script: str) -> str:
    """Run a script there; it must succeed. Its output."""
    return lab.run(
        "/bin/sh", "-euc", script, cwd=directory, env=ENVIRONMENT, stdin=subprocess.DEVNULL
    )  # fmt: skip


def tree(
    root: Path, but: Callable[[str], bool] = lambda path: False
) -> dict[str, tuple[object, ...]]:
    """path -> type and mode, size, content's hash or target of everything below root."""
    import hashlib

    found: dict[str, tuple[object, ...]] = {}
    for directory, directories, files in os.walk(root):
        for name in (*directories, *files):
            full = os.path.join(directory, name)
            path = os.path.relpath(full, root)
            if but(path):
                continue
            seen = os.lstat(full)
            row: list[object] = [oct(seen.st_mode), seen.st_uid, seen.st_gid]
            if stat.S_ISREG(seen.st_mode):
                row += [seen.st_size, hashlib.sha1(Path(full).read_bytes()).hexdigest()]
            elif stat.S_ISLNK(seen.st_mode):
                row.append(os.readlink(full))
            found[path] = tuple(row)
    return found


# -- programs in a directory ----------------------------------------------------------------------


def prepare(lower: Path) -> None:
    """A repository, C sources, and a tree of many files: each script has a directory of its own."""
    for name in SCRIPTS:
        (lower / name).mkdir(parents=True)
    source = lower / "make"
    for number in range(PARTS):
        (source / f"part{number}.c").write_text(
            f'#include <stdio.h>\nint part{number}(int x) {{ printf("%d\\n", x); '
            f"return x * {number}; }}\n"
        )
    names = " ".join(f"part{n}.o" for n in range(PARTS))
    (source / "main.c").write_text(
        "".join(f"int part{n}(int);\n" for n in range(PARTS))
        + "int main(void) { return 0 "
        + "".join(f"+ part{n}({n})" for n in range(3))
        + "; }\n"
    )
    (source / "Makefile").write_text(
        f"program: main.o {names}\n\tcc -o $@ $^\n%.o: %.c\n\tcc -O0 -c $< -o $@\n"
        "clean:\n\trm -f *.o program\n"
    )
    shell(
        lower / "git",
        """
        git init -q -b main repository; cd repository
        for round in 1 2 3 4 5 6; do
            mkdir -p dir$round
            for file in 1 2 3 4 5 6 7 8 9 10 11 12; do
                echo "round $round file $file" > dir$round/file$file
                echo "round $round" >> shared$file
            done
            git add .; git commit -q -m "commit $round"
        done
        """,
    )
    many = lower / "tar/many"
    for directory in range(40):
        (many / f"d{directory:03}").mkdir(parents=True)
        for number in range(50):
            (many / f"d{directory:03}/f{number}").write_text(
                f"{directory} {number}\n" * (number % 5)
            )


#: Sources that are compiled four times over.
PARTS = 16

SCRIPTS = {
    "git": """
        git clone -q repository clone; cd clone
        git checkout -q -b work; echo change > shared1; rm shared2; git mv shared3 moved3
        git add -A; git commit -q -m work; git gc -q --aggressive --prune=now; git fsck --strict
        git stash list; git status --porcelain; git log --format=%H%s; git checkout -q main
        cd ../repository; git gc -q; git fsck --strict; git checkout -q HEAD~3; git status --porcelain
        git checkout -q main; git ls-files -s
        """,
    "make": """
        make -s -j4; ./program > out || echo "exit $?"; make -s clean; make -s -j3
        touch part7.c; make -s; ls *.o | wc -l; cat out; rm out program *.o
        """,
    "sqlite": """
        sqlite3 base.db "pragma journal_mode=wal; create table t(a integer primary key, b text);"
        i=0; while [ $i -lt 15 ]; do
            echo "begin; insert into t(b) values ('row $i'), (hex(zeroblob(2000))); commit;"
            i=$((i+1)); done | sqlite3 base.db
        sqlite3 -cmd ".timeout 20000" base.db "insert into t(b) values ('left');" &
        sqlite3 -cmd ".timeout 20000" base.db "insert into t(b) values ('right');"; wait
        sqlite3 -cmd ".timeout 20000" base.db "pragma wal_checkpoint(truncate); pragma integrity_check;
            select count(*), sum(length(b)) from t; vacuum; pragma integrity_check;"
        sqlite3 -cmd ".timeout 20000" base.db "select group_concat(b) from (select b from t where b > 'a' order by b)"
        rm -f base.db*
        """,
    "tar": """
        tar cf many.tar --sort=name many; tar tf many.tar | wc -l
        mkdir out; tar xf many.tar -C out; diff -r many out/many; rm -r out many.tar
        rm -r many/d00*; cp -a many/d010 copy; rm -r many; ls
        """,
}


@dataclass
class Done:
    """What the scripts work on, and what each makes of it on ext4."""

    base: Path
    lower: Path
    plain: dict[str, tuple[str, dict[str, tuple[object, ...]]]]

    def on_ext4(self, name: str) -> tuple[str, dict[str, tuple[object, ...]]]:
        """The script's output and the tree it leaves there."""
        if name not in self.plain:
            place = self.base / f"plain-{name}"
            shutil.copytree(self.lower / name, place, symlinks=True)
            self.plain[name] = shell(place, SCRIPTS[name]), tree(place, unlike)
        return self.plain[name]


@pytest.fixture(scope="module")
def done() -> Iterator[Done]:
    with lab.workspace("programs") as base:
        prepare(base / "lower")
        yield Done(base, base / "lower", {})


@pytest.fixture(scope="module", params=ENGINES, ids=lambda engine: engine.name)
def placed(request: pytest.FixtureRequest, done: Done) -> Iterator[lab.Mounted]:
    layers = lab.Layers.make(done.base, (done.lower,), f"{request.param.name}-")
    with lab.mounted(request.param, layers) as mounted:
        yield mounted


def unlike(path: str) -> bool:
    """What no two runs agree on: git's index has inode numbers, its logs and packs times."""
    return "/.git/" in path and not path.endswith(("/HEAD", "/packed-refs"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_program(done: Done, placed: lab.Mounted, name: str) -> None:
    output, left = done.on_ext4(name)
    assert shell(placed.point / name, SCRIPTS[name]) == output
    assert tree(placed.point / name, unlike) == left
    placed.alive()


# -- programs that change the system ------------------------------------------------------------------

CHROOT = """
mount --make-rprivate /
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
mount -t tmpfs tmpfs "$1/run"
exec chroot "$1" /bin/sh -euc "$2"
"""

SYSTEM = """
cd /packages
dpkg -i first.deb >/dev/null
dpkg -s sdee-first | grep ^Status; /usr/bin/sdee-first; ls -l /etc/sdee-first.conf | cut -c1-10
echo "# changed" >> /etc/sdee-first.conf
dpkg -i --force-confold second.deb >/dev/null
dpkg -s sdee-first | grep -E "^(Status|Version)"; tail -1 /etc/sdee-first.conf
ls /usr/share/sdee-first | wc -l; dpkg -V sdee-first || true
dpkg -r sdee-first >/dev/null; ls -d /usr/share/sdee-first /usr/bin/sdee-first 2>&1 || true
dpkg -P sdee-first >/dev/null; ls /etc/sdee-first.conf 2>&1 || true
pip="python3 pip"
$pip install -q --no-index --break-system-packages --root-user-action=ignore ./*.whl
python3 -c 'import sdee_probe; print(sdee_probe.VALUE)'; sdee-probe
$pip uninstall -q -y --break-system-packages --root-user-action=ignore sdee_probe
python3 -c 'import sdee_probe' 2>/dev/null || echo gone
useradd -m -s /bin/sh sdee-probe-user 2>/dev/null; id -un sdee-probe-user; ls -A /home/sdee-probe-user
userdel -r sdee-probe-user 2>/dev/null; grep -c sdee-probe-user /etc/passwd || true
ldconfig; rm -rf /packages
"""


def make_packages(directory: Path) -> None:
    """Two versions of a Debian package, a Python wheel, and pip."""
    directory.mkdir()
    # Compiled: from its archive pip would be compiled anew at each start.
    (archive,) = Path("/usr/share/python-wheels").glob("pip-*.whl")
    with zipfile.ZipFile(archive) as pip:
        pip.extractall(directory, [x for x in pip.namelist() if x.startswith("pip/")])
    lab.run("python3", "-m", "compileall", "-q", directory / "pip", env=ENVIRONMENT)
    for version, files, name in ((1, 150, "first"), (2, 120, "second")):
        root = directory / f"build{version}"
        for path in ("DEBIAN", "usr/bin", "usr/share/sdee-first", "etc"):
            (root / path).mkdir(parents=True)
        (root / "DEBIAN/control").write_text(
            f"Package: sdee-first\nVersion: {version}\nArchitecture: all\nMaintainer: a <a@b>\n"
            "Description: probe\n"
        )
        (root / "DEBIAN/conffiles").write_text("/etc/sdee-first.conf\n")
        (root / "DEBIAN/postinst").write_text("#!/bin/sh\nset -e\ntouch /var/lib/sdee-first\n")
        (root / "DEBIAN/postrm").write_text("#!/bin/sh\nset -e\nrm -f /var/lib/sdee-first\n")
        (root / "usr/bin/sdee-first").write_text(f"#!/bin/sh\necho version {version}\n")
        for script in ("DEBIAN/postinst", "DEBIAN/postrm", "usr/bin/sdee-first"):
            (root / script).chmod(0o755)
        (root / "etc/sdee-first.conf").write_text(f"version={version}\n")
        for number in range(files):
            (root / f"usr/share/sdee-first/f{number}").write_text(f"{version} {number}\n")
        lab.run("dpkg-deb", "--root-owner-group", "-b", root, directory / f"{name}.deb")
        shutil.rmtree(root)
    with zipfile.ZipFile(directory / "sdee_probe-1.0-py3-none-any.whl", "w") as wheel:
        info = "sdee_probe-1.0.dist-info"
        wheel.writestr("sdee_probe/__init__.py", "VALUE = 42\ndef main():\n    print('probe')\n")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: sdee_probe\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(
            f"{info}/entry_points.txt", "[console_scripts]\nsdee-probe = sdee_probe:main\n"
        )
        wheel.writestr(
            f"{info}/RECORD",
            "".join(
                f"{name},,\n"
                for name in (
                    "sdee_probe/__init__.py", f"{info}/METADATA", f"{info}/WHEEL",
                    f"{info}/entry_points.txt", f"{info}/RECORD",
                )
            ),
        )  # fmt: skip


def change_system(engine: lab.Engine, base: Path, root: Path) -> tuple[str, list[str]]:
    """Run the script in merged over the root; its output, and the paths that upper then has."""
    layers = lab.Layers.make(base, (root,), f"{engine.name}-")
    upper = layers.upper
    assert upper is not None
    shutil.copytree(base / "packages", upper / "packages")
    with lab.mounted(engine, layers):
        output = lab.run(
            "unshare", "--mount", "--pid", "--fork", "/bin/sh", "-euc", CHROOT, "sh",
            str(layers.merged), SYSTEM, env=ENVIRONMENT, timeout=150,
        )  # fmt: skip
    paths = [
        os.path.relpath(os.path.join(directory, name), upper)
        for directory, directories, files in os.walk(upper)
        for name in (*directories, *files)
    ]
    return output, sorted(p for p in paths if "__pycache__" not in p and "/ldconfig" not in p)


@pytest.fixture(scope="module")
def over_root() -> Iterator[tuple[Path, Path, tuple[str, list[str]]]]:
    """The machine's own root, bare, as lower; and what the yardstick makes of it."""
    with lab.workspace("system", Path("/dev/shm")) as base:
        root = base / "root"
        root.mkdir()
        lab.run("mount", "--bind", "--make-private", "/", root)
        try:
            make_packages(base / "packages")
            yield base, root, change_system(lab.KERNEL, base, root)
        finally:
            lab.detach(root)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_packages_are_installed_and_removed(
    over_root: tuple[Path, Path, tuple[str, list[str]]], engine: lab.Engine
) -> None:
    base, root, (expected, expected_paths) = over_root
    output, paths = change_system(engine, base, root)
    assert output == expected
    assert "version 1" in output and "42" in output and "gone" in output
    assert paths == expected_paths
