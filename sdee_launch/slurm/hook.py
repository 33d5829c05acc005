"""Prolog and Epilog: `python -I -m sdee_launch.slurm.hook prolog|epilog`, as root, by slurmd.

A Prolog that fails would drain the node and hold the job. So it never does: what went wrong is
written where the job's steps find it, and told to the controller, so that no node of the job starts
it. (A node without a daemon is drained, but only where health.py will use it again.)
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping

from sdee_launch import protocol
from sdee_launch.slurm import records

#: A daemon that is restarting is waited for this long.
PATIENCE = 6.0
#: A large generation over a slow network is waited for; Slurm says when a Prolog takes too long.
REPLY_SECONDS = 3600.0


def request(
    op: str, patience: float = PATIENCE, seconds: float = REPLY_SECONDS, **fields: object
) -> dict[str, object]:
    """The daemon's answer. Raises Unavailable, Refused."""
    protocol.REPLY_TIMEOUT = seconds
    deadline = time.monotonic() + patience
    while True:
        try:
            return protocol.request(op, **fields)[0]  # type: ignore[arg-type]
        except protocol.Unavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _restarts(job: int) -> int:
    """How often the job was requeued."""
    shown = subprocess.run(
        ["scontrol", "show", "job", "-o", str(job)],
        capture_output=True, text=True, timeout=60, check=False,
    ).stdout  # fmt: skip
    for word in shown.split():
        if word.startswith("Restarts="):
            return int(word[9:])
    return 0


def note(node: str, reason: str, restarts: int) -> str:
    """The text in the job's AdminComment; the plugin knows it by its first word.

    A job that was requeued still has the note of its last run: the count tells them apart.
    """
    again = f" (restart {restarts})" if restarts else ""
    return f"sdee: {node}: {' '.join(reason.split())[:400]}{again}"


def _tell_controller(job: int, node: str, reason: str) -> None:
    try:
        text = note(node, reason, _restarts(job))
        subprocess.run(
            ["scontrol", "update", f"JobId={job}", f"AdminComment={text}"],
            timeout=60, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        print(f"sdee: the controller was not told: {error}", file=sys.stderr)


def _drain(node: str, reason: str) -> None:
    """The next jobs needn't fail, too: where the site has health checks, one will undo this."""
    from sdee_launch.slurm import health

    try:
        said = health.drain_at_once(node, reason)
    except health.SlurmProblem as error:
        said = str(error)
    if said:
        print(f"sdee: {said}", file=sys.stderr)


def prolog(environment: Mapping[str, str]) -> int:
    """Have the job's instance made on this node."""
    reference = environment.get("SPANK_SDEE_REF")
    if not reference:
        return 0
    job, uid = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_JOB_UID"])
    node = environment.get("SLURMD_NODENAME") or os.uname().nodename
    wanted = {
        name[len("SPANK_SDEE_") :].lower(): value
        for name, value in environment.items()
        if name.startswith("SPANK_SDEE_")
    }
    absent = False
    try:
        request("job-prepare", job=job, uid=uid, node=node, wanted=wanted)
        return 0
    except protocol.Refused as error:
        reason = str(error)
    except protocol.Unavailable as error:
        reason, absent = f"no sdeed on the node: {error}", True
    if records.read(job) is None:
        records.write(records.Record(job, uid, reference, failure=reason))
    print(f"sdee: job {job}: {reason}", file=sys.stderr)
    if absent:
        _drain(node, reason)
    _tell_controller(job, node, reason)
    return 0


def epilog(environment: Mapping[str, str]) -> int:
    """Have it ended. Twice, and without a Prolog, is harmless."""
    job = int(environment["SLURM_JOB_ID"])
    record = records.read(job)
    if record is None:
        return 0
    nothing = bool(record.failure) and not record.place
    try:
        # Where nothing was made, the node isn't held up for a daemon that isn't there.
        request("job-end", 0.0 if nothing else PATIENCE, job=job)
    except (protocol.Refused, protocol.Unavailable) as error:
        if nothing:
            records.forget(job)
        # What is left is removed at sdeed's next start; a node must not be lost for it.
        print(f"sdee: job {job}: {error}", file=sys.stderr)
    return 0


def main() -> int:
    """Entry point."""
    os.environ.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    return {"prolog": prolog, "epilog": epilog}[sys.argv[1]](os.environ)


if __name__ == "__main__":
    sys.exit(main())
