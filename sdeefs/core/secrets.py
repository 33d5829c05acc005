"""The secrets rule: what its user couldn't read in lower, a server with more rights doesn't show.

A directory of lower that the given ids can't read and search shows as an empty one; a file can be
replaced or removed, but its data is never read: copied up, it comes without data and with a mark.
"""

from __future__ import annotations

import os
import stat

from sdeefs.core.formats import xattr_path
from sdeefs.core.ids import ACL_ACCESS, acl_entries
from sdeefs.core.nodes import UPPER, Node
from sdeefs.core.union import Union

_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20


class Secrets(Union):
    """The room of what must not be seen."""

    def _hides(self, layer: int) -> bool:
        """Whether the rule is there, and is for this layer."""
        return self.secrets is not None and layer > self.unmapped

    def _is_secret(self, st: os.stat_result, fd: int, name: bytes) -> bool:
        """Whether an object of lower may not be read by the ids of the `secrets` setting."""
        assert self.secrets is not None
        mode = st.st_mode
        kind = stat.S_IFMT(mode)
        if kind == stat.S_IFDIR:
            need = 5
        elif kind == stat.S_IFREG:
            need = 4
        else:
            return False
        uid, gids = self.secrets
        entries = self._acl(fd, name)
        if entries:
            return not _acl_allows(entries, st, uid, gids, need)
        if st.st_uid == uid:
            bits = mode >> 6
        elif st.st_gid in gids:
            bits = mode >> 3
        else:
            bits = mode
        return bits & need != need

    def _review(self, node: Node) -> None:
        """See whether a file of lower is a secret now: its mode may have changed since look-up."""
        if node.layer == UPPER or node.kind != stat.S_IFREG or not self._hides(node.layer):
            return
        fd, name = self._place(node)
        if not name:  # its name is gone: what was found when it had one stays
            return
        secret = self._is_secret(self._stat(node), fd, name)
        if secret or node.extra is not None:
            node.more().secret = secret

    @staticmethod
    def _acl(fd: int, name: bytes) -> list[tuple[int, int, int]]:
        try:
            value = os.getxattr(xattr_path(fd, name), ACL_ACCESS, follow_symlinks=False)
        except OSError:
            return []
        return acl_entries(value)


def _acl_allows(
    entries: list[tuple[int, int, int]],
    st: os.stat_result,
    uid: int,
    gids: frozenset[int],
    need: int,
) -> bool:
    """posix_acl_permission() for the given ids."""
    mask = next((perm for tag, perm, _ in entries if tag == _MASK), 7)
    by_tag = {tag: perm for tag, perm, _ in entries if tag in (_USER_OBJ, _OTHER)}
    if st.st_uid == uid:
        return by_tag.get(_USER_OBJ, 0) & need == need
    for tag, perm, ident in entries:
        if tag == _USER and ident == uid:
            return perm & mask & need == need
    member = False
    for tag, perm, ident in entries:
        if (tag == _GROUP_OBJ and st.st_gid in gids) or (tag == _GROUP and ident in gids):
            member = True
            if perm & mask & need == need:
                return True
    return not member and by_tag.get(_OTHER, 0) & need == need
