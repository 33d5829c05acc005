"""`sdee doctor`: what this node can do in both modes, what is in the way, and the mend."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mount_helpers.probe import Finding, probe
from sdee_launch import config, environments, protocol
from sdee_launch.accounts import id_maps, my_account
from sdee_launch.slurm import findings as slurm

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Add `doctor`."""
    doctor = subparsers.add_parser("doctor", help="what this node can do, and what is in the way")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=run)


def _daemon() -> Finding:
    path = os.environ.get("SDEED_SOCKET") or protocol.SOCKET_PATH
    tried = f"ask sdeed on {path}"
    try:
        reply, _ = protocol.request("status")
    except protocol.Unavailable as error:
        return Finding(
            "daemon", False, tried, str(error),
            "root: sdee install, or sdee daemon; without it, rootless mode",
        )  # fmt: skip
    except protocol.Refused as error:
        return Finding("daemon", False, tried, str(error))
    return Finding("daemon", True, tried, f"version {reply.get('version')}")


def _scheduling() -> list[Finding]:
    """Whether callers of an environment of sdeefs stay on their CPU (docs/performance.md)."""
    switch = Path("/proc/sys/kernel/sched_autogroup_enabled")
    try:
        grouped = switch.read_text().strip() != "0"
    except OSError:
        return []  # a kernel without
    if not grouped:
        return [Finding("scheduling", True, f"read {switch}", "callers of sdeefs keep their CPU")]
    return [
        Finding(
            "scheduling", False, f"read {switch}",
            "sessions are scheduling groups: sdeefs's answers send callers to another CPU",
            "root: sysctl kernel.sched_autogroup_enabled=0 (it is nothing to the kernel engine)",
        )
    ]  # fmt: skip


def _settings() -> tuple[Finding, config.Settings]:
    tried = f"read {config.SITE_FILE} and ~/{config.USER_FILE}"
    try:
        return Finding("settings", True, tried, "understood"), config.load()
    except config.ConfigError as error:
        return Finding("settings", False, tried, str(error), "correct the file"), config.Settings()


def modes(findings: list[Finding]) -> dict[str, list[str]]:
    """The engines that can serve in each mode."""
    works = {f.name: f.works for f in findings}
    site = []
    if works.get("daemon") and works.get("settings"):
        # What only root can try, the daemon tries at the first instance.
        site = ["kernel", "fuse"] if works.get("fuse") else ["kernel"]
    rootless = []
    if works.get("user-namespaces") and works.get("settings") and works.get("fuse-rootless"):
        rootless.append("fuse")
    return {"site": site, "rootless": rootless}


def run(options: argparse.Namespace) -> int:
    """Print the findings; 0 where at least one mode works."""
    settled, settings = _settings()
    findings = [settled, _daemon()]
    account = my_account()
    place: Path | None = None
    if account.uid != 0:
        path = environments.store_path(account, settings)
        try:
            environments.open_store(account, settings).close()
            findings.append(Finding("store", True, f"open {path}", "environments are kept there"))
            place = Path(path)
        except environments.EnvironmentProblem as error:
            findings.append(Finding("store", False, f"open {path}", str(error)))
        count = sum(r.count for r in id_maps(account)[0])
        detail = f"{count}" if count > 1 else "root is the only one: chown to another fails"
        findings.append(
            Finding("ids", count > 1, "ids of an instance", detail, "see subordinate-ids")
        )
    findings += [*probe(place), *_scheduling()]
    findings += slurm.findings()
    can = modes(findings)
    if options.json:
        print(json.dumps({"modes": can, "findings": [f.as_json() for f in findings]}))
    else:
        for finding in findings:
            print(f"{'yes' if finding.works else 'no ':3}  {finding.name}: {finding.tried}")
            print(f"       {finding.detail}")
            if finding.mend and not finding.works:
                print(f"       mend: {finding.mend}")
        for mode, engines in can.items():
            print(f"{mode} mode: {', '.join(engines) or 'not here'}")
    return 0 if any(can.values()) else 1
