"""From an upper to a node's cache: everything arrives, only what changed travels."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdee_launch.deploy import api, apply, cache, ended, package
from sdee_launch.deploy.errors import DeployProblem
from sdee_launch.deploy.generations import State
from tests.deploy.deploy_lab import Lab, contents, fill


def test_everything_arrives_as_it_was(lab: Lab) -> None:
    lab.inside(lambda: fill(lab.upper))
    done = lab.ensure(lab.submit())
    assert lab.tree(done.tree) == lab.tree()
    status = os.stat(f"{done.tree}/etc/holes")
    assert status.st_blocks * 512 < 1 << 20
    assert lab.inside(lambda: cache._verify(os.path.dirname(done.tree), True)) == []


@pytest.mark.parametrize("keep", [0, 3])
def test_a_manifest_that_is_too_large_to_hold_is_read_again(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    monkeypatch.setattr(apply, "KEEP", keep)
    lab.inside(lambda: fill(lab.upper))
    assert lab.tree(lab.ensure(lab.submit()).tree) == lab.tree()

    def change() -> None:
        os.chmod(f"{lab.upper}/etc/hosts", 0o600)
        os.rename(f"{lab.upper}/etc/link", f"{lab.upper}/etc/moved")
        with open(f"{lab.upper}/etc/new", "w") as file:
            file.write("new")

    lab.inside(change)
    done = lab.ensure(lab.submit())
    assert (done.base, done.extracted) == (1, 1)
    assert lab.tree(done.tree) == lab.tree()


def test_an_unchanged_upper_is_the_same_generation_and_no_bytes(lab: Lab) -> None:
    lab.inside(lambda: fill(lab.upper))
    first, second = lab.submit(), lab.submit()
    assert second.reused
    assert second.generation == first.generation
    lab.ensure(first)
    again = lab.ensure(second, "job-2")
    assert (again.bytes_read, again.extracted) == (0, 0)


def test_one_changed_file_ships_one_file(lab: Lab) -> None:
    def many() -> None:
        for number in range(300):
            with open(f"{lab.upper}/f{number}", "wb") as file:
                file.write(os.urandom(2000))

    lab.inside(many)
    lab.ensure(lab.submit())

    def change() -> None:
        with open(f"{lab.upper}/f7", "wb") as file:
            file.write(b"new")

    lab.inside(change)
    second = lab.submit()
    assert second.generation.new_files == 1
    done = lab.ensure(second)
    assert (done.extracted, done.linked) == (1, 299)
    package = os.path.getsize(f"{lab.state}/2.pack") + os.path.getsize(f"{lab.state}/2.manifest")
    assert done.bytes_read == package
    assert lab.tree(done.tree) == lab.tree()


def test_metadata_alone_ships_nothing(lab: Lab) -> None:
    lab.inside(lambda: fill(lab.upper))
    lab.ensure(lab.submit())
    lab.inside(lambda: os.chmod(f"{lab.upper}/etc/hosts", 0o600))
    second = lab.submit()
    assert second.generation.new_files == 0
    done = lab.ensure(second)
    assert done.extracted == 0
    assert lab.tree(done.tree) == lab.tree()


def test_a_change_that_keeps_size_and_time_is_found_at_the_source(lab: Lab) -> None:
    def write(text: str) -> None:
        with open(f"{lab.upper}/file", "w") as file:
            file.write(text)
        os.utime(f"{lab.upper}/file", ns=(5, 5))

    lab.inside(lambda: write("one"))
    lab.ensure(lab.submit())
    lab.inside(lambda: write("two"))
    assert lab.submit().generation.new_files == 1


def test_the_job_sees_what_was_submitted(lab: Lab) -> None:
    lab.inside(lambda: fill(lab.upper))
    before = lab.tree()
    submitted = lab.submit()
    lab.inside(lambda: os.unlink(f"{lab.upper}/etc/hosts"))
    assert lab.tree(lab.ensure(submitted).tree) == before


def test_excluded_things_stay_behind(lab: Lab) -> None:
    def caches() -> None:
        for name in ("tmp", "var/cache/apt", "home/x", "keep"):
            os.makedirs(f"{lab.upper}/{name}")
            with open(f"{lab.upper}/{name}/file.o", "w") as file:
                file.write("x" * 1000)

    lab.inside(caches)
    plan = api.plan(lab.account, lab.upper, lab.state, ["home/*"])
    assert (plan.excluded, plan.new_files, plan.new_bytes) == (3, 1, 1000)
    assert plan.excluded_bytes >= 2000
    assert list(contents(lab.tree(lab.ensure(lab.submit("home/*")).tree))) == ["keep/file.o"]


def test_the_biggest_directories_of_a_package_are_named(lab: Lab) -> None:
    def write() -> None:
        for path, size in (("opt/large/a", 5000), ("opt/large/b", 5000), ("etc/small", 10)):
            os.makedirs(os.path.dirname(f"{lab.upper}/{path}"), exist_ok=True)
            with open(f"{lab.upper}/{path}", "wb") as file:
                file.write(b"x" * size)

    lab.inside(write)
    lab.submit()
    found = api.biggest(lab.account, lab.state, 1)
    assert found == (("opt/large", 10000), ("etc", 10))


def test_hundreds_of_levels(lab: Lab) -> None:
    def deep() -> None:
        fd = os.open(lab.upper, os.O_RDONLY)
        for _ in range(300):
            os.mkdir("d" * 50, dir_fd=fd)
            fd = os.open("d" * 50, os.O_RDONLY, dir_fd=fd)
        os.close(os.open("leaf", os.O_WRONLY | os.O_CREAT, dir_fd=fd))

    lab.inside(deep)
    submitted = lab.submit()
    assert submitted.generation.entries == 302
    lab.ensure(submitted)
    assert cache.verify(lab.account, lab.cache, submitted.identity, 1, True) == []


def test_a_broken_cache_is_replaced(lab: Lab) -> None:
    lab.inside(lambda: fill(lab.upper))
    first = lab.ensure(lab.submit())

    def spoil() -> None:
        with open(f"{first.tree}/../manifest", "r+b") as file:
            file.truncate(20)

    lab.inside(spoil)
    lab.inside(lambda: os.chmod(f"{lab.upper}/etc/hosts", 0o600))
    assert lab.tree(lab.ensure(lab.submit()).tree) == lab.tree()


def test_a_cached_tree_that_lacks_a_file_is_made_anew(lab: Lab) -> None:
    lab.inside(lambda: fill(lab.upper))
    submitted = lab.submit()
    tree = lab.ensure(submitted).tree
    lab.inside(lambda: os.unlink(f"{tree}/etc/holes"))
    with pytest.raises(DeployProblem, match="damaged and in use"):
        lab.ensure(submitted, "job-2")
    api.release(lab.account, lab.cache, "job-1")
    assert lab.tree(lab.ensure(submitted, "job-2").tree) == lab.tree()


def test_a_base_that_is_gone_is_not_needed(lab: Lab) -> None:
    lab.inside(lambda: fill(lab.upper))
    tree = lab.ensure(lab.submit()).tree
    lab.inside(lambda: shutil.rmtree(tree))
    lab.inside(lambda: os.chmod(f"{lab.upper}/etc/hosts", 0o600))
    assert lab.tree(lab.ensure(lab.submit()).tree) == lab.tree()


def test_what_a_power_cut_left_isn_t_trusted(lab: Lab) -> None:
    lab.inside(lambda: fill(lab.upper))
    submitted = lab.submit()

    def half() -> None:
        tree = f"{lab.cache}/{lab.account.uid}/{submitted.identity}/.1/tree"
        os.makedirs(f"{tree}/etc/deep")
        was = os.stat(f"{lab.upper}/etc/holes")
        with open(f"{tree}/etc/holes", "wb") as file:
            file.truncate(was.st_size)  # size and time are there, the content isn't
        os.chmod(f"{tree}/etc/holes", stat.S_IMODE(was.st_mode))
        os.utime(f"{tree}/etc/holes", ns=(was.st_mtime_ns, was.st_mtime_ns))

    cache.user_directory(lab.account, lab.cache)
    lab.inside(half)
    assert lab.tree(lab.ensure(submitted).tree) == lab.tree()


def test_a_file_that_never_holds_still_doesn_t_stop_the_rest(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.inside(lambda: fill(lab.upper))
    small = package.Packer._small

    def written_to(self: package.Packer, path: bytes, fd: int, size: int) -> str:
        with open(f"{lab.upper}/etc/hosts", "a") as file:
            file.write("another line\n")
        return small(self, path, fd, size)

    monkeypatch.setattr(package.Packer, "_small", written_to)
    submitted = lab.submit()
    assert submitted.generation.moving == 1
    monkeypatch.undo()
    tree = lab.tree(lab.ensure(submitted).tree)
    assert set(tree) == set(lab.tree())
    assert cache.verify(lab.account, lab.cache, submitted.identity, 1, True) == []
    later = lab.submit()
    assert later.generation.new_files == 1
    assert lab.tree(lab.ensure(later).tree) == lab.tree()


def test_writes_within_one_tick_of_the_clock_are_seen(lab: Lab) -> None:
    for number in range(10):

        def write(number: int = number) -> None:
            with open(f"{lab.upper}/file", "w") as file:
                file.write(str(number))

        lab.inside(write)
        submitted = lab.submit()
        assert submitted.generation.number == number + 1
    assert lab.tree(lab.ensure(submitted).tree) == lab.tree()


def test_a_new_change_time_alone_is_no_new_generation(lab: Lab) -> None:
    lab.inside(lambda: fill(lab.upper))
    first = lab.submit()
    path = f"{lab.upper}/etc/hosts"
    lab.inside(lambda: os.chmod(path, stat.S_IMODE(os.stat(path).st_mode)))
    time.sleep(0.1)  # until the change time is past
    assert lab.submit().reused

    def change_times() -> list[list[int]]:
        with State(lab.state) as state:
            known = {e.path: e.ctime_ns for e in state.read(first.generation.number)}
        return [[known[b"etc/hosts"], os.stat(path).st_ctime_ns]]

    ((known, real),) = lab.inside(change_times)
    assert known == real


def test_a_generation_larger_than_the_cache_may_be_is_refused(lab: Lab) -> None:
    lab.inside(lambda: fill(lab.upper))
    made = lab.submit()
    with pytest.raises(DeployProblem, match="cache_limit"):
        api.ensure(lab.account, lab.cache, lab.state, made.identity, 1, "job-1", limit=1 << 20)
    assert cache.listing(lab.account, lab.cache) == []


def test_a_cache_of_thousands_of_levels_can_be_listed_and_pruned(lab: Lab) -> None:
    lab.inside(lambda: fill(lab.upper))
    tree = lab.ensure(lab.submit()).tree

    def deep() -> None:
        fd = os.open(tree, os.O_RDONLY)
        for _ in range(3000):
            os.mkdir("d", dir_fd=fd)
            below = os.open("d", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below

    lab.inside(deep)
    api.release(lab.account, lab.cache, "job-1")
    (one,) = cache.listing(lab.account, lab.cache)
    assert one["files"] > 5
    assert len(cache.prune(lab.account, lab.cache, 0)) == 1
    assert cache.listing(lab.account, lab.cache) == []


def test_verify_names_what_is_wrong(lab: Lab) -> None:
    lab.inside(lambda: fill(lab.upper))
    submitted = lab.submit()
    tree = lab.ensure(submitted).tree

    def spoil() -> None:
        times = os.stat(f"{tree}/etc/deep/tool")
        with open(f"{tree}/etc/deep/tool", "r+b") as file:
            file.write(b"?")
        os.utime(f"{tree}/etc/deep/tool", ns=(times.st_atime_ns, times.st_mtime_ns))
        os.chmod(f"{tree}/etc/deep/tool", 0o4755)

    lab.inside(spoil)
    assert cache.verify(lab.account, lab.cache, submitted.identity, 1, False) == []
    wrong = cache.verify(lab.account, lab.cache, submitted.identity, 1, True)
    assert wrong == ["etc/alias", "etc/deep/tool"]
    cache.remove(lab.account, lab.cache, submitted.identity, 1)
    assert lab.tree(lab.ensure(submitted).tree) == lab.tree()


def _crash(monkeypatch: pytest.MonkeyPatch, boot: str) -> None:
    """From now on the node has been started anew."""
    monkeypatch.setattr(cache, "_boot", lambda: boot)


def test_after_a_crash_only_what_is_on_the_disk_counts(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.inside(lambda: fill(lab.upper))
    submitted = lab.submit()
    tree = lab.ensure(submitted).tree
    lab.inside(lambda: os.truncate(f"{tree}/etc/deep/tool", 0))  # behind the sample's back
    monkeypatch.setattr(cache, "SAMPLE", 1)
    assert lab.ensure(submitted, "job-2").extracted == 0
    _crash(monkeypatch, "second")
    made = lab.ensure(submitted, "job-3")  # job-1 and job-2 are gone with the boot
    assert made.extracted > 0
    assert lab.tree(made.tree) == lab.tree()
    api.release(lab.account, lab.cache, "job-3")  # it is written out
    _crash(monkeypatch, "third")
    assert lab.ensure(submitted, "job-4").bytes_read == 0


def test_a_generation_that_a_crash_may_have_harmed_is_no_base(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.inside(lambda: fill(lab.upper))
    lab.ensure(lab.submit())
    lab.inside(lambda: os.chmod(f"{lab.upper}/etc/hosts", 0o600))
    _crash(monkeypatch, "second")
    made = lab.ensure(lab.submit())
    assert (made.base, made.linked) == (0, 0)
    assert lab.tree(made.tree) == lab.tree()


def test_marks_of_an_earlier_boot_keep_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.inside(lambda: fill(lab.upper))
    submitted = lab.submit()
    tree = lab.ensure(submitted).tree
    assert cache.prune(lab.account, lab.cache, 0) == []
    mark = f"{os.path.dirname(tree)}/users/job-1"
    lab.inside(lambda: os.truncate(mark, 0))
    assert cache.users(lab.account, lab.cache) == ["job-1"]
    lab.inside(lambda: os.utime(mark, (1, 1)))
    assert cache.users(lab.account, lab.cache) == []
    lab.ensure(submitted)
    _crash(monkeypatch, "second")
    assert cache.users(lab.account, lab.cache) == []
    assert len(cache.prune(lab.account, lab.cache, 0)) == 1
    assert cache.listing(lab.account, lab.cache) == []


@pytest.mark.parametrize(
    ("answer", "left"),
    [("echo 12; echo 77", ["job-12", "perf"]), ("true", ["perf"]), ("exit 1", None)],
)
def test_jobs_that_slurm_doesn_t_know_keep_nothing(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str, left: list[str] | None
) -> None:
    lab.inside(lambda: fill(lab.upper))
    submitted = lab.submit()
    keys = ["job-11", "job-12", "perf"]
    for key in keys:
        lab.ensure(submitted, key)
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\n{answer}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    ended.release_ended(lab.account, lab.cache)
    assert cache.users(lab.account, lab.cache) == (left or keys)


def test_prune_keeps_what_is_used(lab: Lab) -> None:
    made = []
    for number in range(4):

        def write(number: int = number) -> None:
            with open(f"{lab.upper}/big{number}", "wb") as file:
                file.write(os.urandom(1 << 20))

        lab.inside(write)
        made.append(lab.submit())
        lab.ensure(made[-1], f"job-{number}")
    for key in ("job-0", "job-2", "job-2"):
        api.release(lab.account, lab.cache, key)
    removed = cache.prune(lab.account, lab.cache, 0)
    assert [one["generation"] for one in removed] == [1, 3]
    left = cache.listing(lab.account, lab.cache)
    assert [one["generation"] for one in left] == [2, 4]
    assert cache.prune(lab.account, lab.cache, 1 << 40) == []


def test_a_node_without_a_cache_needs_a_bounded_number_of_packages(lab: Lab) -> None:
    for number in range(40):

        def write(number: int = number) -> None:
            with open(f"{lab.upper}/f{number}", "w") as file:
                file.write(str(number))

        lab.inside(write)
        submitted = lab.submit()
    assert len(submitted.generation.packages) <= 25
    assert lab.tree(lab.ensure(submitted).tree) == lab.tree()


def test_sbcast_s_bundle_is_a_source(lab: Lab) -> None:
    lab.inside(lambda: fill(lab.upper))
    submitted = lab.submit()
    path, source = str(lab.place / "state/bundle"), str(lab.place / "state/source")
    size = api.write_bundle(lab.account, lab.state, 1, 0, path)
    assert size == os.path.getsize(path)
    api.unpack_bundle(lab.account, path, source)
    done = api.ensure(lab.account, lab.cache, source, submitted.identity, 1, "job-1")
    assert lab.tree(done.tree) == lab.tree()


def test_what_a_job_wrote_becomes_a_generation(lab: Lab) -> None:
    lab.inside(lambda: fill(lab.upper))
    first = lab.submit()
    tree = lab.ensure(first).tree
    own = f"{lab.cache}/{lab.account.uid}/own"

    def job() -> None:
        os.makedirs(f"{own}/etc")
        os.mknod(f"{own}/etc/hosts", stat.S_IFCHR, 0)
        os.mkdir(f"{own}/etc/deep")
        os.setxattr(f"{own}/etc/deep", "user.overlay.opaque", b"y")
        with open(f"{own}/etc/deep/result", "w") as file:
            file.write("42")

    lab.inside(job)
    before = lab.tree(tree)
    saved = api.save(lab.account, [tree], own, lab.state)
    assert saved.generation.number == 2
    assert saved.generation.new_files == 1
    found = lab.tree(lab.ensure(saved).tree)
    assert found["etc/hosts"][0] == stat.S_IFCHR
    assert "etc/deep/tool" not in found
    assert {"etc/deep/result", "etc/link", "etc/alias"} <= set(found)
    assert lab.tree(tree) == before


def test_killed_at_any_point_the_next_run_completes(lab: Lab) -> None:
    def many() -> None:
        fill(lab.upper)
        for number in range(400):
            with open(f"{lab.upper}/f{number}", "wb") as file:
                file.write(os.urandom(3000))

    lab.inside(many)
    submitted = lab.submit()
    for attempt in range(12):
        pid = os.fork()
        if not pid:
            try:
                lab.ensure(submitted)
            finally:
                os._exit(0)
        time.sleep(0.01 * attempt)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        # Whole, or not there at all.
        for one in cache.listing(lab.account, lab.cache):
            tree = str(one["path"]) + "/tree"
            assert lab.tree(tree) == lab.tree()
    assert lab.tree(lab.ensure(submitted).tree) == lab.tree()


def test_a_snapshot_killed_at_any_point_leaves_no_half_generation(lab: Lab) -> None:
    lab.inside(lambda: fill(lab.upper))
    for attempt in range(8):
        pid = os.fork()
        if not pid:
            try:
                lab.submit()
            finally:
                os._exit(0)
        time.sleep(0.01 * attempt)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert lab.tree(lab.ensure(lab.submit()).tree) == lab.tree()


def test_a_full_disk_is_told_and_nothing_is_half(lab: Lab) -> None:
    import subprocess

    os.mkdir(lab.cache)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,mode=711", "tmpfs", lab.cache], check=True
    )
    try:

        def big() -> None:
            with open(f"{lab.upper}/big", "wb") as file:
                file.write(os.urandom(4 << 20))

        lab.inside(big)
        submitted = lab.submit()
        with pytest.raises(DeployProblem, match=f"{lab.cache}.*No space left"):
            lab.ensure(submitted)
        assert cache.listing(lab.account, lab.cache) == []
        # Nor does the try that failed keep the next, smaller one out.
        lab.inside(lambda: os.truncate(f"{lab.upper}/big", 600 << 10))
        lab.ensure(lab.submit())
        api.release(lab.account, lab.cache, "job-1")

        # And what nobody uses makes room.
        def other() -> None:
            os.unlink(f"{lab.upper}/big")
            with open(f"{lab.upper}/other", "wb") as file:
                file.write(os.urandom(700 << 10))

        lab.inside(other)
        lab.ensure(lab.submit())
        (kept,) = cache.listing(lab.account, lab.cache)
        assert kept["generation"] == 3
    finally:
        subprocess.run(["umount", "-l", lab.cache], check=True)


def test_a_full_spool_is_named(lab: Lab) -> None:
    import subprocess

    owner = f"uid={lab.account.uid},gid={lab.account.gid}"
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size=1m,mode=700,{owner}", "tmpfs", lab.state], check=True
    )
    try:

        def big() -> None:
            with open(f"{lab.upper}/big", "wb") as file:
                file.write(os.urandom(4 << 20))

        lab.inside(big)
        with pytest.raises(DeployProblem, match=f"{lab.state}: No space left"):
            lab.submit()
        lab.inside(lambda: os.truncate(f"{lab.upper}/big", 100 << 10))
        assert lab.submit().generation.number == 1
    finally:
        subprocess.run(["umount", "-l", lab.state], check=True)


def test_a_generation_in_use_makes_no_room(lab: Lab) -> None:
    lab.inside(lambda: fill(lab.upper))
    made = lab.submit()
    lab.ensure(made, "job-1")
    place = f"{lab.cache}/{lab.account.uid}/{made.identity}"
    lab.inside(lambda: cache._make_room(place, 2))
    assert [one["generation"] for one in cache.listing(lab.account, lab.cache)] == [1]
    api.release(lab.account, lab.cache, "job-1")
    lab.inside(lambda: cache._make_room(place, 2))
    assert cache.listing(lab.account, lab.cache) == []


NAMES = st.sampled_from(["a", "b", "c/d", "c/e", "c/f/g"])
STEP = st.tuples(st.sampled_from(["write", "remove", "mode", "link"]), NAMES, NAMES)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.lists(STEP, max_size=6), min_size=1, max_size=4))
def test_any_history_arrives(lab: Lab, history: list[list[tuple[str, str, str]]]) -> None:
    def play(steps: list[tuple[str, str, str]], salt: int) -> None:
        for number, (what, name, other) in enumerate(steps):
            path, second = f"{lab.upper}/{name}", f"{lab.upper}/{other}"
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.makedirs(os.path.dirname(second), exist_ok=True)
            try:
                if what == "write":
                    with open(path, "w") as file:
                        file.write(f"{name} {number} {salt}")
                elif what == "remove":
                    os.unlink(path)
                elif what == "mode":
                    os.chmod(path, 0o600 + number)
                else:
                    os.link(path, second)
            except (FileNotFoundError, FileExistsError):
                pass

    for salt, steps in enumerate(history):
        lab.inside(lambda steps=steps, salt=salt: play(steps, salt))
        submitted = lab.submit()
        assert lab.tree(lab.ensure(submitted).tree) == lab.tree()


def test_old_generations_go_with_their_packages(lab: Lab) -> None:
    for number in range(12):

        def write(number: int = number) -> None:
            with open(f"{lab.upper}/same", "w") as file:
                file.write(str(number))

        lab.inside(write)
        lab.submit()

    def numbers() -> list[int]:
        with State(lab.state) as state:
            return state.numbers()

    assert lab.inside(numbers) == list(range(5, 13))
    packs = sorted(n for n in os.listdir(lab.state) if n.endswith(".pack"))
    assert packs == sorted(f"{n}.pack" for n in range(5, 13))
