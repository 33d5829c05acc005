"""One task of a rootless job: `… rootless_task NAME IDENTITY NUMBER STATE [BIND…] -- COMMAND…`

The first task of a job on a node unpacks the generation and makes an environment of it, private to
the job; all tasks run in one instance of it; the last one removes it. A cache stays, for the next
job. What the job's steps write outside of shared filesystems is gone when no step is left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from sdee_launch import config, environments
from sdee_launch.accounts import Account, my_account
from sdee_launch.deploy import api
from sdee_launch.deploy.errors import DeployProblem
from sdee_launch.deploy.inside import run_inside
from sdee_launch.environments import EnvironmentProblem, EnvironmentSettings
from sdee_launch.plan import PlanProblem, parse_bind
from sdee_launch.slurm.rootless import VARIABLE
from sdee_launch.workload import workload

#: Where a node keeps what is ours; {uid} is the user's.
BASE = "/var/tmp/sdee-{uid}"


def _base(account: Account) -> str:
    """The user's directory for this node (/var/tmp may be one for all). Raises DeployProblem if it
    is another's."""
    path = BASE.format(uid=account.uid)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    status = os.lstat(path)
    if status.st_uid != account.uid or status.st_mode & 0o170077 != 0o040000:
        raise DeployProblem(f"{path} is not yours alone; have it removed")
    own = f"{path}/{os.uname().nodename}"
    with contextlib.suppress(FileExistsError):
        os.mkdir(own, 0o700)
    return own


@contextlib.contextmanager
def _member(path: str) -> Iterator[int]:
    """Hold a shared lock on `path`, which the last member removes."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH)
        try:
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                break
        except FileNotFoundError:
            pass
        os.close(fd)
    try:
        yield fd
    finally:
        os.close(fd)


def _prepare(account: Account, base: str, place: str, job: str, named: Sequence[str]) -> None:
    """The job's environment below `place`, by the first task. Raises DeployProblem, OSError."""
    name, identity, number, state, *binds = named
    with open(f"{place}.making", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(f"{place}/ready"):
            return
        _check(binds)
        _remove(account, place)
        tree = api.ensure(account, f"{base}/cache", state, identity, int(number), f"job-{job}").tree
        os.mkdir(place, 0o700)
        settings = replace(config.Settings(), store=f"{place}/store")
        with environments.open_store(account, settings) as store:
            store.create(name, EnvironmentSettings(binds=tuple(binds)))
        upper = f"{place}/store/{name}/upper"
        run_inside(account, lambda: _copy(tree, upper))
        with open(f"{place}/sdee.toml", "w") as file:
            file.write(f'[environments]\nstore = "{place}/store"\n')
        with open(f"{place}/ready", "w"):
            pass


def _check(binds: Sequence[str]) -> None:
    """Without its binds no instance is made; here that is told before anything is brought."""
    for text in binds:
        source = parse_bind(text).source
        try:
            os.stat(source)
        except OSError as error:
            raise DeployProblem(f"bind of {os.fsdecode(source)}: {error.strerror}") from None


def _copy(tree: str, upper: str) -> None:
    done = subprocess.run(
        ["cp", "-a", "--reflink=auto", f"{tree}/.", upper], capture_output=True, text=True
    )
    if done.returncode:
        raise DeployProblem(done.stderr.strip().splitlines()[-1])


def _remove(account: Account, place: str) -> None:
    if os.path.lexists(place):
        run_inside(account, lambda: shutil.rmtree(place))


def _run(place: str, named: Sequence[str], command: Sequence[str]) -> int:
    """The command in the instance; its exit status."""
    manager = workload()
    binds: list[str] = []
    for bind in manager.binds() if manager is not None else ():
        binds += ["--bind", f"{bind.source}:{bind.target}" + (":ro" if bind.readonly else "")]
    line = [
        sys.executable, "-I", "-m", "sdee_launch", "run", "--rootless", "--env", named[0], *binds,
        "--", *command,
    ]  # fmt: skip
    variables = {**os.environ, "SDEE_CONFIG": f"{place}/sdee.toml", VARIABLE: shlex.join(named)}
    # Slurm signals every process of a step, the command as well: we only have to outlive it.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)
    status = subprocess.Popen(line, env=variables).wait()
    return status if status >= 0 else 128 - status


def main(arguments: Sequence[str]) -> int:
    """Entry point; the exit status."""
    at = arguments.index("--", 4) if "--" in arguments[4:] else 0
    named, command = list(arguments[:at]), list(arguments[at + 1 :])
    if not named or not command:
        print(__doc__.splitlines()[0], file=sys.stderr)
        return 2
    account = my_account()
    job = os.environ.get("SLURM_JOB_ID", "0")
    try:
        base = _base(account)
        place = f"{base}/job-{job}"
        with _member(f"{place}.lock") as member:
            try:
                _prepare(account, base, place, job, named)
                return _run(place, named, command)
            finally:
                _leave(account, base, place, job, member)
    except (DeployProblem, EnvironmentProblem, PlanProblem, OSError) as error:
        print(f"sdee: {os.uname().nodename}: {error}", file=sys.stderr)
        return 1


def _leave(account: Account, base: str, place: str, job: str, member: int) -> None:
    """The last one removes what the job had."""
    try:
        fcntl.flock(member, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    _remove(account, place)
    api.release(account, f"{base}/cache", f"job-{job}")
    for name in (f"{place}.making", f"{place}.lock"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
