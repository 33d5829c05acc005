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


#: Ids from here on belong to people, and below to the system.
FIRST_USER = 1000
_NOBODY = 65534
_LAST = 4_000_000_000 - 1


def lower_maps(maps: IdMaps) -> IdMaps:
    """The maps of an idmapped lower: as lower has ids, as the kernel sees them.

    What is the system's belongs to the instance's system ids. What belongs to other people stays
    theirs, so that the capabilities of env-root reach nothing of it, ever.
    """
    uids, gids = maps
    return _lower_map(uids), _lower_map(gids)


def _lower_map(ranges: tuple[IdRange, ...]) -> tuple[IdRange, ...]:
    if len(ranges) < 2:
        return ranges
    own = ranges[0].outside
    kept: list[IdRange] = []
    for r in ranges:
        end = r.inside + r.count
        pieces = {(0, FIRST_USER), (_NOBODY, _NOBODY + 1)}
        if own >= FIRST_USER:
            pieces.add((own, own + 1))
        for first, last in sorted(pieces):
            start, stop = max(first, r.inside), min(last, end)
            if start < stop:
                kept.append(IdRange(start, r.outside + start - r.inside, stop - start))
    taken = sorted(
        [(r.inside, r.count) for r in kept if r.inside >= FIRST_USER]
        + [(r.outside, r.count) for r in ranges]
        + [(_NOBODY, 1)]
    )
    place = FIRST_USER
    for first, count in taken:
        if first > place:
            kept.append(IdRange(place, place, first - place))
        place = max(place, first + count)
    if place < _LAST:
        kept.append(IdRange(place, place, _LAST - place))
    return tuple(kept)
