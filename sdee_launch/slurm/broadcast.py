"""The transport `sbcast`: generations reach nodes that share no filesystem with the login node.

A Prolog asks by the job's AdminComment, which only operators can write: `sdee-wants:IDENTITY@N`.
The daemon on the node where the job was submitted has promised that generation; it looks for such
jobs, packs one file of what their nodes lack, and has Slurm's sbcast carry it into each node's
inbox, as the user. The Prologs wait for it: Slurm accepts a broadcast while they run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sdee_launch.accounts import Account
from sdee_launch.deploy import api
from sdee_launch.deploy.errors import DeployProblem
from sdee_launch.site import as_user
from sdee_launch.slurm import hook

INBOX = "/var/lib/sdee/inbox"
#: Seconds that a node waits for its bundle.
PATIENCE = 900.0
#: Seconds between its looks whether the job still is.
LOOK = 3.0
_WANTS = re.compile(r"AdminComment=sdee-wants(-all)?:([0-9a-f]{16})@([1-9][0-9]{0,17})(?=\s|$)")


@dataclass(frozen=True, slots=True)
class Wish:
    """A job that waits for a generation; `everything`: what was sent was not enough for a node.

    A job that is requeued wishes again: `restarts` tells the wishes apart.
    """

    job: int
    uid: int
    identity: str
    generation: int
    everything: bool
    nodes: str
    restarts: int = 0


def note(identity: str, generation: int, everything: bool = False) -> str:
    """The comment by which a node asks."""
    return f"sdee-wants{'-all' if everything else ''}:{identity}@{generation}"


def parse_job(text: str) -> Wish | None:
    """From a line of `scontrol show job -o`; None for a job that waits for nothing."""
    wants = _WANTS.search(text)
    job = re.search(r"JobId=(\d+)", text)
    user = re.search(r"UserId=[^\s(]*\((\d+)\)", text)
    nodes = re.search(r"\sNodeList=(\S+)", text)
    again = re.search(r"\sRestarts=(\d+)", text)
    if not (wants and job and user and nodes) or "JobState=RUNNING" not in text:
        return None
    return Wish(
        int(job[1]), int(user[1]), wants[2], int(wants[3]), wants[1] is not None, nodes[1],
        int(again[1]) if again else 0,
    )  # fmt: skip


def wishes() -> list[Wish]:
    """All jobs that wait now. Raises OSError, SubprocessError."""
    done = subprocess.run(
        ["scontrol", "show", "job", "-o"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return [wish for line in done.stdout.splitlines() if (wish := parse_job(line)) is not None]


def ask(job: int, identity: str, generation: int, everything: bool) -> None:
    """From a node: have the bundle sent. Raises DeployProblem."""
    done = subprocess.run(
        ["scontrol", "update", f"JobId={job}", f"AdminComment={note(identity, generation, everything)}"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode:
        raise DeployProblem(
            f"the controller can't be told what the job wants: {done.stderr.strip()}"
        )


def give_up(wish: Wish, reason: str) -> None:
    """From the login node: the job's nodes needn't wait, the job fails. Raises OSError."""
    text = hook.note(os.uname().nodename, reason, wish.restarts)
    subprocess.run(
        ["scontrol", "update", f"JobId={wish.job}", f"AdminComment={text}"],
        timeout=120, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def _marker(everything: bool) -> str:
    return "all" if everything else "new"


def open_inbox(account: Account, job: int) -> None:
    """On every node, whether or not it lacks something: a broadcast goes to all. Raises OSError."""
    os.makedirs(INBOX, mode=0o711, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(f"{INBOX}/{job}", 0o700)
        os.chown(f"{INBOX}/{job}", account.uid, account.gid)


def receive(
    account: Account, job: int, identity: str, generation: int, everything: bool
) -> tuple[str, int]:
    """Wait for the bundle and unpack it: (source directory, bytes). Raises DeployProblem."""
    place = f"{INBOX}/{job}"
    ask(job, identity, generation, everything)
    name = _marker(everything)
    started = looked = time.monotonic()
    while not os.path.exists(f"{place}/{name}.done"):
        now = time.monotonic()
        if now - started > PATIENCE:
            raise DeployProblem("the login node did not send the environment (is its sdeed alive?)")
        if now - looked > LOOK:
            looked = now
            _still_wanted(job)
        time.sleep(0.05)
    size = os.path.getsize(f"{place}/{name}")
    api.unpack_bundle(account, f"{place}/{name}", f"{place}/{name}.source")
    return f"{place}/{name}.source", size


def _still_wanted(job: int) -> None:
    """Nobody sends to a job that was cancelled, or that fails since another node failed."""
    done = subprocess.run(
        ["scontrol", "show", "job", "-o", str(job)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode:
        return
    failed = re.search(r"AdminComment=sdee: (.*?)(?: \w+=|$)", done.stdout)
    if failed:
        raise DeployProblem(f"elsewhere it failed: {failed[1].strip()}")
    if "JobState=RUNNING" not in done.stdout and "CONFIGURING" not in done.stdout:
        raise DeployProblem("the job has ended")


def empty(job: int) -> None:
    """The bundles that a node has unpacked; the place stays, another node may ask for more."""
    with contextlib.suppress(FileNotFoundError):
        for entry in os.listdir(f"{INBOX}/{job}"):
            path = f"{INBOX}/{job}/{entry}"
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)


def clear(job: int) -> None:
    """At the job's end."""
    shutil.rmtree(f"{INBOX}/{job}", ignore_errors=True)


def waiting() -> list[int]:
    """Jobs that a place is kept for on this node."""
    try:
        return sorted(int(name) for name in os.listdir(INBOX) if name.isdigit())
    except FileNotFoundError:
        return []


def _nodes(text: str) -> list[str]:
    done = subprocess.run(
        ["scontrol", "show", "hostnames", text],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout.split()


def send(account: Account, state: str, wish: Wish) -> int:
    """From the login node: send what the job's nodes lack; returns the bytes. Raises DeployProblem.

    What was sent to a node before is not sent again; should the node have lost it, it asks for all.
    """
    nodes = _nodes(wish.nodes)
    book = f"{state}/sent.json"
    with as_user(account):
        sent = _read(book)
        have = 0 if wish.everything else min(sent.get(node, 0) for node in nodes)
        have = min(have, wish.generation)
    bundle = f"{state}/bundle-{wish.job}"
    name = _marker(wish.everything)
    try:
        size = api.write_bundle(account, state, wish.generation, have, bundle)
        _sbcast(account, wish.job, bundle, f"{INBOX}/{wish.job}/{name}")
        with as_user(account), open(bundle, "w") as file:
            file.write("done\n")
        _sbcast(account, wish.job, bundle, f"{INBOX}/{wish.job}/{name}.done")
        with as_user(account):
            sent = {**_read(book), **dict.fromkeys(nodes, wish.generation)}
            with open(f"{book}.new", "w", encoding="utf-8") as file:
                json.dump(sent, file)
            os.replace(f"{book}.new", book)
        return size
    finally:
        with contextlib.suppress(OSError), as_user(account):
            os.unlink(bundle)


def _read(book: str) -> dict[str, int]:
    try:
        with open(book, encoding="utf-8") as file:
            found = json.load(file)
        return {str(node): int(number) for node, number in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _sbcast(account: Account, job: int, source: str, target: str) -> None:
    command: Sequence[str] = ["sbcast", "--force", f"--jobid={job}", source, target]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=3600, check=False,
        stdin=subprocess.DEVNULL, user=account.uid, group=account.gid,
        extra_groups=account.groups, cwd="/", env={"PATH": os.defpath, "HOME": account.home},
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.strip().removeprefix("sbcast: error: ") or f"exit {done.returncode}"
        # What slurmd had no number for, such as a full disk: the reason is in its log alone.
        more = " (that node's slurmd.log says why)" if "Unspecified" in said else ""
        raise DeployProblem(f"sbcast: {said}{more}")
