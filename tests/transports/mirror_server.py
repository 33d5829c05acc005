"""A server process for the tests: python mirror_server.py SOURCE MERGED TRANSPORT OPTIONS-JSON.

Prints "live" when it has mounted and negotiated, then obeys lines of standard input (JSON lists: a
method's name and its arguments) and answers each with a line of JSON; at the end its counters.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

from sdeefs.core.api import Io
from sdeefs.transports.choose import make
from sdeefs.transports.mount_device import FuseMount, mount_at, mount_by_fusermount
from sdeefs.transports.transport import TransportOptions
from tests.transports.mirror_lab import Mirror


def main() -> None:
    source, merged, transport = sys.argv[1:4]
    options = json.loads(sys.argv[4])
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    os.umask(0)
    mirror = Mirror(
        source, options.pop("timeout", 0.0), Io(options.pop("io")) if "io" in options else None
    )
    mirror.gate = options.pop("gate", "")
    if options.pop("fusermount", False):
        device = mount_by_fusermount(os.fsencode(merged), FuseMount(allow_other=False))
    else:
        device = mount_at(os.fsencode(merged), FuseMount(source="mirror"))
    server = make(transport, mirror, device, TransportOptions(**options))
    server.negotiate()
    print(json.dumps(["live", server.name, server.data_path]), flush=True)

    def storm() -> None:
        """Invalidations without end, of what is in use."""
        while True:
            for name in os.listdir(source):
                server.invalidate_entry(1, os.fsencode(name))
            for node in list(mirror.nodes):
                server.invalidate_inode(node)
            time.sleep(0.0005)

    def obey() -> None:
        for line in sys.stdin:
            word, *arguments = json.loads(line)
            if word == "stop":
                server.stop()
                continue  # the next line is that of the end
            answer: object
            if word == "counters":
                answer = server.counters()
            elif word == "calls":
                answer = [repr(call) for call in mirror.calls]
            elif word == "queued":
                answer = len(server._workers._jobs)
            elif word == "nodes":
                answer = [len(mirror.nodes), len(mirror.handles)]
            elif word == "storm":
                threading.Thread(target=storm, daemon=True).start()
                answer = None
            elif word == "invalidate_inode":
                answer = server.invalidate_inode(*arguments)
            elif word == "invalidate_entry":
                answer = server.invalidate_entry(arguments[0], os.fsencode(arguments[1]))
            else:
                answer = getattr(server, word)(*arguments)
            print(json.dumps(answer), flush=True)

    threading.Thread(target=obey, daemon=True).start()
    server.run()
    print(json.dumps(["end", server.counters()]), flush=True)
    os._exit(0)  # the thread on standard input never ends


if __name__ == "__main__":
    main()
