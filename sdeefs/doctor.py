"""`sdeefs doctor`: what was tried on this machine, what works, and the mend for what doesn't."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mount_helpers.probe import Finding, probe
from sdeefs.refusals import Refused

OK, FAILURE = 0, 1


def engines(findings: list[Finding]) -> dict[str, bool]:
    """Which engines can serve here, for the caller as it is and without privileges."""
    works = {f.name: f.works for f in findings}
    return {
        "kernel": works.get("overlay", False) or works.get("overlay-userxattr", False),
        "fuse": works.get("fuse", False),
    }


def servers() -> list[Finding]:
    """Which transport `auto` takes, and whether the shortcuts in C are there."""
    from sdeefs.transports import ring, shortcuts

    rings, missing = ring.why_not(), shortcuts.missing()
    return [
        Finding(
            "transport-ring",
            rings is None,
            "a ring, its extension and the kernel's switch",
            "auto takes it" if rings is None else f"{rings}; auto takes the device",
        ),
        Finding(
            "shortcuts",
            missing is None,
            "import the extension",
            "the commonest requests are answered in C" if missing is None else missing,
        ),
    ]


def run(arguments: argparse.Namespace) -> int:
    """The command: status 0 where at least one engine works."""
    upper = None if arguments.upper is None else Path(arguments.upper)
    if upper is not None and not upper.is_dir():
        raise Refused(f"{upper}: not a directory")
    findings = [*probe(upper), *servers()]
    works = engines(findings)
    if arguments.json:
        print(json.dumps({"engines": works, "findings": [f.as_json() for f in findings]}, indent=1))
    else:
        for finding in findings:
            print(f"{'yes' if finding.works else 'no ':3}  {finding.name}: {finding.tried}")
            print(f"       {finding.detail}")
            if finding.mend:
                print(f"       mend: {finding.mend}")
        names = [name for name, here in works.items() if here]
        print(f"engines that work here: {', '.join(names) or 'none'}")
    return OK if any(works.values()) else FAILURE
