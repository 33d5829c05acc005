"""Extended attributes and ACLs of merged: overlayfs's own hidden, nested ones escaped, ids mapped."""

from __future__ import annotations

import errno
import os
import stat

from sdeefs.core import credentials
from sdeefs.core.api import Caller
from sdeefs.core.handles import Handles
from sdeefs.core.ids import ACL_ACCESS, ACL_DEFAULT, ACL_NAMES, OVERRIDE_STAT, Owners
from sdeefs.core.nodes import ACL_DEFAULT as HAS_DEFAULT_ACL
from sdeefs.core.nodes import ACL_KNOWN, UPPER, Directory, Node

_TRUSTED = b"trusted."
CAPABILITY = b"security.capability"


class Xattrs(Handles):
    """The room of extended attributes."""

    def _owners_of(self, node: Node) -> Owners:
        return self.owners_of(node.layer)

    def _stored_name(self, name: bytes) -> bytes:
        if self.override and name == OVERRIDE_STAT:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return self.names.to_stored(name)

    def _getxattr(self, node: Node, name: bytes) -> bytes:
        if self.override and name == OVERRIDE_STAT:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        path, follow = self._xattr_place(node)
        if name not in ACL_NAMES:
            return os.getxattr(path, self.names.to_stored(name), follow_symlinks=follow)
        try:
            value = os.getxattr(path, name, follow_symlinks=follow)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # the kernel would fail every permission check
                raise OSError(errno.ENODATA, os.strerror(errno.ENODATA)) from error
            raise
        return self._owners_of(node).acl_shown(value)

    def _listxattr(self, node: Node, caller: Caller) -> list[bytes]:
        path, follow = self._xattr_place(node)
        try:
            present = os.listxattr(path, follow_symlinks=follow)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return []
            raise
        shown = []
        for word in present:
            name = self.names.to_shown(os.fsencode(word))
            if name is None or (self.override and name == OVERRIDE_STAT):
                continue
            if name.startswith(_TRUSTED) and caller.uid != 0:
                continue
            shown.append(name)
        return shown

    def _setxattr(self, node: Node, name: bytes, value: bytes, flags: int, kill_sgid: bool) -> None:
        stored = self._stored_name(name)
        self._writable()
        self._copy_up(node)
        credentials.settle()
        if name in ACL_NAMES:
            value = self.upper_owners.acl_stored(value)
        path, follow = self._xattr_place(node)
        os.setxattr(path, stored, value, flags, follow_symlinks=follow)
        if kill_sgid and name == ACL_ACCESS:  # the kernel says it of default ACLs, too
            st = self._stat(node)
            if st.st_mode & stat.S_ISGID:
                self._chmod(node, st.st_mode & ~stat.S_ISGID, -1)
        self._after_change(node, name)

    def _removexattr(self, node: Node, name: bytes) -> None:
        stored = self._stored_name(name)
        self._writable()
        if node.layer != UPPER:
            self._getxattr(node, name)  # nothing is copied up for what isn't there
        self._copy_up(node)
        credentials.settle()
        path, follow = self._xattr_place(node)
        os.removexattr(path, stored, follow_symlinks=follow)
        self._after_change(node, name)

    @staticmethod
    def _after_change(node: Node, name: bytes) -> None:
        if name == ACL_DEFAULT and isinstance(node, Directory):
            node.flags &= ~(ACL_KNOWN | HAS_DEFAULT_ACL)
