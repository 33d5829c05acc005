"""Two engines over identical layers play the same calls; any difference is an error.

Kernel overlayfs is the yardstick. What sdeefs does differently on purpose:
- a handle opened read-only before a copy-up may see the new data (POSIX), where overlayfs goes on
  showing the lower file, and its links when it has none; so what such handles show isn't compared;
- file capabilities that are set while written pages wait in the write-back cache are lost when
  those are written;
- chown(-1, -1) clears setuid there; FUSE's kernel side doesn't tell the server of it;
- what takes setuid or capabilities away without the kernel's telling the server who did it
  (writes through a memory map, through passthrough after a chmod) takes them always;
- without FUSE's DONT_MASK (pyfuse3) the kernel has applied the umask before a default ACL could
  replace it: played with umask 0 there;
- overlayfs can't change what has no name any more and was never copied up (EEXIST; ENOENT where its
  directory is gone, too; of a directory ENOTDIR, where sdeefs says ENOENT), nor does its mode count
  when a link to it is refused then;
- it sets no ACL on what is still in a lower whose filesystem sets none (erofs, squashfs): such
  files are copied up first there;
- with userxattr it can mark the origin of regular files alone: which names belong together is
  compared for those;
- under write-back the kernel keeps mtime when a file is truncated to the size it has, and sets it
  where fallocate changes nothing: it is set after each of both;
- link counts and sizes of directories, and times that nobody set, aren't compared: overlayfs itself
  doesn't define them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.fslab import fslab_lab as lab
from tests.fslab.oracle_player import (
    Player,
    Result,
    build_lower,
    differences,
    inodes,
    kinds,
    snapshot,
)
from tests.fslab.oracle_steps import Generator, Step

#: How often the generator is told what exists.
LOOK_EVERY = 20


class Disagreement(AssertionError):
    """The engines disagree; carries what was played."""

    def __init__(self, text: str, steps: Sequence[Step] = ()) -> None:
        tail = "\n".join(f"  {step}" for step in steps[-12:])
        super().__init__(f"{text}\nthe last steps:\n{tail}")
        self.steps = list(steps)


@dataclass
class Pair:
    """The same lowers under two engines: `ours` and `theirs`, each with its own upper."""

    ours: lab.Mounted
    theirs: lab.Mounted

    def players(self, area: str) -> tuple[Player, Player]:
        """Players of one area (a directory of the lowers)."""
        for mounted in (self.ours, self.theirs):
            mounted.alive()
        their_upper = self.theirs.layers.upper
        umask = 0 if "umask" in self.ours.engine.lacks else 0o022
        return (
            Player(f"{self.ours.point}/{area}", umask=umask),
            Player(f"{self.theirs.point}/{area}", f"{their_upper}/{area}", umask),
        )

    def snapshots(self, area: str) -> None:
        """The area's trees agree."""
        indexed = "index=on" in self.theirs.engine.options
        sdeefs = self.ours.engine.kind == "sdeefs"
        found = differences(
            snapshot(f"{self.ours.point}/{area}", inodes=sdeefs, groups=indexed),
            snapshot(f"{self.theirs.point}/{area}", groups=indexed),
        )
        if found:
            raise Disagreement(f"trees of area {area} differ:\n" + "\n".join(found))

    def close(self) -> None:
        try:
            self.ours.close()
        finally:
            self.theirs.close()


def make_lower(lower: Path, areas: int, xattrs: bool = True) -> None:
    """The same tree in each of the areas 0, 1, …"""
    first = lower / "0"
    first.mkdir(parents=True)
    first.chmod(0o777)
    build_lower(str(first), xattrs)
    for number in range(1, areas):
        lab.run("cp", "-a", first, lower / str(number))


def open_pair(
    base: Path,
    ours: lab.Engine,
    theirs: lab.Engine,
    lowers: tuple[Path, ...],
    upper_on: Path | None,
    their_upper_on: Path | None = None,
) -> Pair:
    """Mount both; uppers on the filesystem `upper_on` (base's own if None), or each on its own."""
    layers = []
    for name, place in (("ours-", upper_on), ("theirs-", their_upper_on or upper_on)):
        made = lab.Layers.make(place or base, lowers, name)
        merged = base / f"{name}merged"
        merged.mkdir(exist_ok=True)
        layers.append(replace(made, base=base, merged=merged))
    second = lab.mount(theirs, layers[1])
    try:
        return Pair(lab.mount(ours, layers[0]), second)
    except BaseException:
        second.close()
        raise


def remount(pair: Pair, swap: bool = False) -> Pair:
    """The same again; with `swap` each engine has the other's upper."""
    pair.close()
    ours, theirs = pair.ours.layers, pair.theirs.layers
    if swap:
        ours, theirs = (
            replace(ours, upper=theirs.upper, work=theirs.work),
            replace(theirs, upper=ours.upper, work=ours.work),
        )
    second = lab.mount(pair.theirs.engine, theirs)
    try:
        return Pair(lab.mount(pair.ours.engine, ours), second)
    except BaseException:
        second.close()
        raise


def play_both(players: tuple[Player, Player], steps: Iterator[Step]) -> list[Step]:
    """Play until the steps end; raises Disagreement at the first difference."""
    ours, theirs = players
    played: list[Step] = []
    unequal: set[object] = set()  # handles of what could be changed on one side alone
    try:
        for step in steps:
            played.append(step)
            handle = step.arguments[0] if step.arguments else None
            if step.call in ("open", "tmpfile"):
                unequal.discard(handle)
            stale = theirs.stale(step)
            if stale and step.call == "copy_range":
                continue  # the two files would differ from here on
            expected = theirs.play(step)
            got = ours.play(step)
            nameless = expected in (("EEXIST",), ("ENOENT",), ("ENOTDIR",))
            if nameless and step.call in ("fchmod", "fchown", "futime"):
                unequal.add(handle)
                continue
            if (
                step.call == "link_handle"
                and handle in unequal
                and "ok" not in (got[0], expected[0])
            ):
                continue
            if got != expected and not stale and not intended(step, got, expected):
                raise Disagreement(f"{step}\n  ours:   {got}\n  theirs: {expected}", played)
    finally:
        ours.close()
        theirs.close()
    return played


def intended(step: Step, ours: Result, theirs: Result) -> bool:
    """Whether a difference is one of those that may be."""
    # Of a lower filesystem that knows no ACLs overlayfs says so, even where there is none to remove.
    none = ours in (("ENODATA",), ("ok", None))
    if step.call != "removexattr":
        return False
    # Opened for writing, a hard link that was copied up by another name is linked into upper there,
    # and its directory with it; of a directory in upper an ACL may be removed that isn't there.
    default = step.arguments[-1] == "system.posix_acl_default"
    return none and (theirs == ("ENOTSUP",) or (default and theirs == ("ok", None)))


def generated(
    generator: Generator, look: Callable[[], dict[str, int]], count: int
) -> Iterator[Step]:
    """`count` steps; the generator sees the tree every LOOK_EVERY steps."""
    for number in range(count):
        if number % LOOK_EVERY == 0:
            generator.know(look())
        yield generator.step()


@dataclass
class Run:
    """One configuration played through: areas × steps, a remount in the middle, uppers swapped."""

    ours: lab.Engine
    theirs: lab.Engine
    seed: int
    areas: int
    steps: int
    swap: bool = True
    lacks: frozenset[str] = frozenset()
    played: dict[str, list[Step]] = field(default_factory=dict)

    def play(
        self, base: Path, lowers: tuple[Path, ...], upper_on: Path | None,
        their_upper_on: Path | None = None,
    ) -> int:  # fmt: skip
        """Play it all; the number of steps. Raises Disagreement."""
        pair = open_pair(base, self.ours, self.theirs, lowers, upper_on, their_upper_on)
        total = 0
        try:
            for half in range(2):
                for area in map(str, range(self.areas)):
                    total += self._area(pair, area, half)
                before = self._inodes(pair)
                pair = remount(pair)
                self._compare(pair, f"remounted after part {half}")
                if self._inodes(pair) != before:
                    raise Disagreement(f"{self.name('*')}: a remount changed inode numbers")
            if self.swap:
                pair = remount(pair, swap=True)
                self._compare(pair, "with uppers swapped")
                for area in map(str, range(self.areas)):
                    total += self._area(pair, area, 2)
        except BaseException:
            for mounted in (pair.ours, pair.theirs):
                try:
                    mounted.close()
                except AssertionError as error:
                    print(error)  # beside the first failure, for its report
            raise
        pair.close()
        return total

    def _inodes(self, pair: Pair) -> dict[str, int]:
        return inodes(str(pair.ours.point)) if self.ours.kind == "sdeefs" else {}

    def _compare(self, pair: Pair, when: str) -> None:
        for area in map(str, range(self.areas)):
            try:
                pair.snapshots(area)
            except Disagreement as error:
                raise Disagreement(
                    f"{self.name(area)}, {when}: {error}", self.played.get(area, [])
                ) from error

    def _area(self, pair: Pair, area: str, part: int) -> int:
        seed = self.seed * 1_000_003 + int(area) * 10 + part
        generator = Generator(seed, self.ours.lacks | self.lacks)
        count = self.steps if part < 2 else self.steps // 4
        steps = generated(generator, lambda: kinds(f"{pair.theirs.point}/{area}"), count)
        try:
            played = play_both(pair.players(area), steps)
        except Disagreement as error:
            steps_so_far = [*self.played.get(area, []), *error.steps]
            raise Disagreement(f"{self.name(area)} part {part}: {error}", steps_so_far) from error
        # Handles don't live on from part to part.
        self.played.setdefault(area, []).extend([*played, Step("root", "close_all", ())])
        try:
            pair.snapshots(area)
        except Disagreement as error:
            raise Disagreement(
                f"{self.name(area)} part {part}: {error}", self.played[area]
            ) from error
        return len(played)

    def name(self, area: str) -> str:
        return f"{self.ours.name} against {self.theirs.name}, seed {self.seed}, area {area}"


def shrink(steps: list[Step], fails: Callable[[list[Step]], bool], rounds: int = 200) -> list[Step]:
    """Fewer steps that still fail, by leaving out halves, quarters, … and single ones."""
    size = max(1, len(steps) // 2)
    while rounds:
        position, removed = 0, False
        while position < len(steps) and rounds:
            candidate = steps[:position] + steps[position + size :]
            rounds -= 1
            if candidate and fails(candidate):
                steps, removed = candidate, True
            else:
                position += size
        if size == 1 and not removed:
            break
        size = max(1, size // 2)
    return steps
