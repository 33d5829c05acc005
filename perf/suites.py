"""The suites, in the order in which they run and stand on the page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    """One suite. `base` is the contender whose time the others' are multiples of.

    `quick`, `full`: how many rounds. `about`: what the page says on top of its table.
    """

    name: str
    title: str
    base: str
    quick: int
    full: int
    about: str


_SLICES = (
    "Every round takes one short slice of each line from one contender right after the other, in an"
    " order shuffled anew, in environments that stay alive. A slice is cut into parts, of which the"
    " best counts: others only ever slow it. The column “bare metal, again” is bare"
    " metal a second time: a difference as small as its own from 1 says nothing. The drivers are"
    " our own, so the counts mean nothing beside those of other programs."
)
_ALL = (
    Suite(
        "overall",
        "Overall (Tables 1 and 2)",
        "bare metal",
        6,
        60,
        f"{_SLICES} `perf/unixlike.c` measures what UnixBench's lines measure; each copy is pinned"
        " to a CPU, file copies go to the filesystem of the environment. podman runs rootless, over"
        " an overlay of a small root with the host's /usr.",
    ),
    Suite(
        "cpu",
        "CPU-bound work (Figs. 7 to 9)",
        "bare metal",
        6,
        30,
        f"{_SLICES} sysbench computes primes; `perf/kernels.c` has kernels of the kind of the NAS"
        " Parallel Benchmarks, with one thread pinned to a CPU, or under `mpirun` on all cores.",
    ),
    Suite(
        "fs",
        "File systems: fio and metadata (Fig. 10)",
        "overlayfs",
        1,
        5,
        "Every contender is mounted over the same lower with an empty upper, in directories that"
        " ext4 puts elsewhere on the disk each time (`chattr +T`: it searches long where much was"
        " just removed), everything is written back, and it rests for half a second before what is"
        " cold is measured. “existing file”: copied up before; “lower's"
        " file”: still in lower. Calls are given as the mean over all calls, and as the median"
        " call. The server's CPU time is its own utime and stime, of all of its threads, for each"
        " request: GETATTR alone (statx with AT_STATX_FORCE_SYNC), and for each file created and"
        " closed (CREATE, with the LOOKUP before and the FLUSH and RELEASE after it). “floor,"
        " computed” is no file system: on the lines of trees it is the plain one's time plus, for"
        " each request of sdeefs that somebody waits for, the way to the barest server in C and back"
        " (`perf/bare.c`, over rings, from memory), all measured in the same round; no FUSE server"
        " that is sent these requests can be faster.",
    ),
    Suite(
        "startup",
        "Start-up (Table 3)",
        "unshare",
        6,
        12,
        "Milliseconds for an environment that starts, runs `true` and ends, mean over some in a row.",
    ),
    Suite(
        "deploy",
        "Deployment (Fig. 11)",
        "cp -a",
        2,
        5,
        "An upper packed and a node's cache brought up to it, beside copies of the whole tree.",
    ),
)
SUITES = {suite.name: suite for suite in _ALL}
