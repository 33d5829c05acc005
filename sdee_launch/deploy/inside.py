"""Work on a user's layers with no more rights than the user has.

A child becomes the user, enters a user namespace with the user's map and is root there: ids
outside the user's range, devices other than whiteouts and foreign xattrs are impossible for it.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from typing import Any

from mount_helpers import syscalls
from mount_helpers.namespaces import write_id_maps
from sdee_launch.accounts import Account, id_maps
from sdee_launch.deploy.errors import Damaged, DeployProblem


def run_inside(account: Account, work: Callable[[], Any]) -> Any:
    """What `work()` returns in the child, as JSON brings it. Raises DeployProblem, Damaged.

    The caller is root or the user, with one thread.
    """
    answer, answered = os.pipe2(os.O_CLOEXEC)
    ready, told = os.pipe2(os.O_CLOEXEC)
    waiting, go = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        for fd in (answer, ready, go):
            os.close(fd)
        _child(account, work, answered, told, waiting, parent)
    for fd in (answered, told, waiting):
        os.close(fd)
    data = b""
    try:
        if os.read(ready, 1):
            try:
                _write_maps(account, pid)
                os.write(go, b"x")
            except OSError as error:
                raise DeployProblem(
                    f"{account.name}'s ids can't be mapped: {error.strerror}"
                ) from None
            finally:
                os.close(go)
                go = -1
        while part := os.read(answer, 1 << 16):
            data += part
    finally:
        for fd in (answer, ready, go):
            if fd >= 0:
                os.close(fd)
        if not data:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        os.waitpid(pid, 0)
    try:
        record = json.loads(data)
    except ValueError:
        raise DeployProblem("the work on the layers was killed; try again") from None
    if "error" in record:
        raise (Damaged if record["damaged"] else DeployProblem)(record["error"])
    return record["result"]


def _child(
    account: Account, work: Callable[[], Any], answered: int, told: int, waiting: int, parent: int
) -> None:
    try:
        record: dict[str, object]
        try:
            if os.getuid() == 0 and account.uid != 0:
                os.seteuid(0)
                os.setgroups(account.groups)
                os.setresgid(account.gid, account.gid, account.gid)
                os.setresuid(account.uid, account.uid, account.uid)
            syscalls.unshare(syscalls.CLONE_NEWUSER)
            # The maps are written by the parent, through files in /proc that must be the user's.
            syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)
            os.write(told, b"x")
            if not os.read(waiting, 1):
                os._exit(1)
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            # A change of ids takes it away: only now. Whoever asked may be gone already.
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            os.umask(0)
            _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            # What the parent had is looked through at no collection here.
            gc.freeze()
            record = {"result": work()}
        except DeployProblem as error:
            record = {"error": str(error), "damaged": isinstance(error, Damaged)}
        except OSError as error:
            where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
            record = {"error": f"{where}{error.strerror or error}", "damaged": False}
        except Exception as error:  # no traceback reaches a user
            record = {"error": f"internal error: {error!r}", "damaged": False}
        with os.fdopen(answered, "wb", closefd=False) as file:
            file.write(json.dumps(record).encode())
    finally:
        os._exit(0)


def _write_maps(account: Account, pid: int) -> None:
    uid_map, gid_map = id_maps(account)
    if os.getuid() == 0:
        euid = os.geteuid()
        os.seteuid(0)
        try:
            write_id_maps(pid, uid_map, gid_map)
        finally:
            os.seteuid(euid)
        return
    if len(uid_map) == 1 and uid_map[0].count == 1:
        with open(f"/proc/{pid}/setgroups", "w") as file:
            file.write("deny")
        write_id_maps(pid, uid_map, gid_map)
        return
    for program, ranges in (("newuidmap", uid_map), ("newgidmap", gid_map)):
        if not shutil.which(program):
            raise DeployProblem(f"{program} is missing; apt install uidmap")
        words = [str(n) for r in ranges for n in (r.inside, r.outside, r.count)]
        done = subprocess.run([program, str(pid), *words], capture_output=True, text=True)
        if done.returncode:
            raise DeployProblem(f"{program}: {done.stderr.strip()}")
