"""Who owns an environment, and which ids an instance has for them."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass

from mount_helpers.namespaces import IdRange, subordinate_ids

IdMaps = tuple[tuple[IdRange, ...], tuple[IdRange, ...]]


@dataclass(frozen=True)
class Account:
    """An account, as the name service has it; `groups` are all its groups."""

    name: str
    uid: int
    gid: int
    home: str
    shell: str
    groups: tuple[int, ...] = ()


def account_of(uid: int) -> Account:
    """Look an account up. Raises KeyError if there is none."""
    record = pwd.getpwuid(uid)
    groups = os.getgrouplist(record.pw_name, record.pw_gid)
    return Account(
        record.pw_name, uid, record.pw_gid, record.pw_dir, record.pw_shell, tuple(groups)
    )


def my_account() -> Account:
    """The caller's own; one without a name in the name service is called by its number."""
    uid = os.getuid()
    try:
        account = account_of(uid)
    except KeyError:
        home = os.environ.get("HOME", "/")
        account = Account(str(uid), uid, os.getgid(), home, "/bin/sh", tuple(os.getgroups()))
    return account


def _map(own: int, subordinate: list[tuple[int, int]]) -> tuple[IdRange, ...]:
    ranges = [IdRange(0, own, 1)]
    inside = 1
    for first, count in subordinate:
        if count > 0:
            ranges.append(IdRange(inside, first, count))
            inside += count
    return tuple(ranges)


def id_maps(account: Account) -> IdMaps:
    """uid and gid map of an instance: 0 is the user, 1 and up the subordinate ids.

    Without subordinate ids the maps have one id.
    """
    uids, gids = subordinate_ids(account.uid)
    if not uids or not gids:
        return (IdRange(0, account.uid, 1),), (IdRange(0, account.gid, 1),)
    return _map(account.uid, uids), _map(account.gid, gids)
