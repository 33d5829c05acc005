"""Mount by hand: python -m sdeefs.transports.try_mount UPPER LOWER MERGED [WORK]. Temporary."""

from __future__ import annotations

import logging
import os
import sys

from sdeefs.core.filesystem import Filesystem
from sdeefs.core.settings import Settings
from sdeefs.transports.device import DeviceTransport
from sdeefs.transports.mount_device import FuseMount, mount_at

logging.basicConfig(level=logging.INFO)
upper, lower, merged = (os.fsencode(word) for word in sys.argv[1:4])
work = os.fsencode(sys.argv[4]) if len(sys.argv) > 4 else upper + b".work"
os.makedirs(work, exist_ok=True)
os.umask(0)
core = Filesystem.open(Settings(lowers=tuple(lower.split(b":")), upper=upper, work=work))
transport = DeviceTransport(core, mount_at(merged, FuseMount()))
transport.negotiate()
print("live;", transport.data_path, flush=True)
transport.run()
print(transport.counters())
core.close()
