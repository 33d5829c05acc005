"""What the daemon has done for jobs, in a root process of its own beside the user's keeper.

Files of the user are touched with the user's rights (site.as_user), generations are brought and
unpacked by sdee_launch.deploy.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess

from sdee_launch import config, environments
from sdee_launch.accounts import Account, account_of
from sdee_launch.deploy.errors import DeployProblem
from sdee_launch.deploy.exclude import change
from sdee_launch.environments import EnvironmentProblem
from sdee_launch.protocol import Refused
from sdee_launch.site import as_user
from sdee_launch.slurm import broadcast, records, reports, transfer

#: A job's own layers are in directories below it, one per job.
JOBS = "/var/lib/sdee/jobs"


def _account(uid: int) -> tuple[Account, config.Settings]:
    account = account_of(uid)
    try:
        with as_user(account):
            return account, config.load(home=account.home)
    except config.ConfigError as error:
        raise Refused(str(error)) from None


def submit(
    uid: int,
    environment: str,
    generation: int,
    exclude: list[str],
    transport: str,
    outputs: list[str],
) -> dict[str, object]:
    """Publish the present state of an environment (or name a generation that is published).

    `outputs`: files that Slurm is to write outside of the environment.
    """
    account, settings = _account(uid)
    try:
        done = transfer.publish(account, settings, environment, generation, exclude, transport)
    except (EnvironmentProblem, transfer.TransferError) as error:
        raise Refused(str(error)) from None
    with as_user(account):
        lost = [path for path in outputs if not _can_be_written(path)]
    warnings = [str(done["warning"])] if done["warning"] else []
    if lost:
        warnings.append(
            f"Slurm writes output outside of the environment, where {' and '.join(lost)} can't be"
            " made: the job will fail without a word; use --output=FILE in your home"
        )
    return {**done, "warning": "\n".join(warnings)}


def exclude(uid: int, environment: str, add: list[str], remove: list[str]) -> list[str]:
    """From inside: change what of an environment stays behind; all of its own patterns."""
    account, settings = _account(uid)
    try:
        with (
            as_user(account),
            environments.open_store(account, settings) as store,
            store.open(environment) as opened,
        ):
            return change(opened, add, remove)
    except (EnvironmentProblem, DeployProblem) as error:
        raise Refused(str(error)) from None
    except OSError as error:
        raise Refused(f"{environment}: {error.strerror or error}") from None


def _can_be_written(path: str) -> bool:
    """By the effective user, who may have to make it."""
    there = path if os.path.lexists(path) else os.path.dirname(path)
    return os.access(there, os.W_OK, effective_ids=True)


def prepare(uid: int, job: int, variables: dict[str, str]) -> dict[str, object]:
    """Bring the job's generation to this node; the layers and the binds of its instance."""
    account, settings = _account(uid)
    place = f"{JOBS}/{job}"
    try:
        binds = transfer.parse(variables).binds
        tree, count = transfer.fetch(account, settings, job, variables)
    except transfer.TransferError as error:
        raise Refused(str(error)) from None
    try:
        os.makedirs(JOBS, mode=0o711, exist_ok=True)
        _remove(place)
        os.mkdir(place, 0o700)
        os.chown(place, account.uid, account.gid)
    except OSError as error:
        raise Refused(f"{place}: {error.strerror}") from None
    options = {"lowers": [tree], "place": place}
    return {"place": place, "bytes": count, "binds": binds, "options": options}


def send(uid: int, state: str, wish: list[object]) -> int:
    """From a login node: what a job's nodes lack of a generation, by sbcast."""
    account, _ = _account(uid)
    try:
        return broadcast.send(account, state, broadcast.Wish(*wish))  # type: ignore[arg-type]
    except (DeployProblem, subprocess.SubprocessError) as error:
        raise Refused(str(error)) from None


def report(uid: int, job: int) -> None:
    """Tell the user's home what the job got on this node."""
    record = records.read(job)
    if record is None:
        return
    account = account_of(uid)
    with as_user(account):
        os.umask(0o077)
        reports.write(account.home, record)


def save(job: int) -> dict[str, object]:
    """Publish what a job has, generation and own upper together, as a new generation."""
    record = records.read(job)
    if record is None or not record.place:
        raise Refused(f"job {job} has no layers on this node", "missing")
    account, settings = _account(record.uid)
    try:
        return transfer.save(account, settings, record)
    except (EnvironmentProblem, transfer.TransferError) as error:
        raise Refused(str(error)) from None


def clear(uid: int, job: int) -> None:
    """Remove a job's own layers, and let its generation go. Twice is harmless."""
    _remove(f"{JOBS}/{job}")
    account, settings = _account(uid)
    try:
        transfer.release(account, settings, job)
    except transfer.TransferError as error:
        raise Refused(str(error)) from None


def _remove(place: str) -> None:
    if os.path.lexists(place):
        shutil.rmtree(place)


def clear_others(known: list[int]) -> None:
    """Of all jobs but these remove layers and marks in the cache: what a crash has left."""
    keep = {str(job) for job in known}
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(JOBS):
            if name not in keep:
                shutil.rmtree(f"{JOBS}/{name}", ignore_errors=True)
    try:
        transfer.release_others(config.site_settings(), known)
    except (config.ConfigError, transfer.TransferError) as error:
        raise Refused(str(error)) from None


def caches() -> list[dict[str, object]]:
    """The generations that this node keeps, by user."""
    try:
        return transfer.caches(config.site_settings())
    except config.ConfigError as error:
        raise Refused(str(error)) from None
