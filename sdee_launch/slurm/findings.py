"""What `sdee doctor` says of this node's Slurm; nothing where there is none."""

from __future__ import annotations

import glob
import os
import subprocess
from pathlib import Path

from mount_helpers.probe import Finding
from sdee_launch.slurm import conf, health, identity, install

#: One of these is on every machine of a cluster.
_PROGRAMS = ("slurmd", "sbatch")
#: Seconds in which munged answers.
_PATIENCE = 10
_MEND = "root: sdee install --slurm (without it: sdee srun, sdee sbatch)"


def findings() -> list[Finding]:
    """The configuration, our plugin and hooks in it, and munge."""
    place = conf.directory()
    if place is None and not any(map(conf.which, _PROGRAMS)):
        return []
    file = (place or Path("/etc/slurm")) / "slurm.conf"
    try:
        text = conf.text_of(file)
    except OSError as error:
        return [
            Finding(
                "slurm", False, f"read {file}", str(error.strerror),
                "root: the cluster's slurm.conf belongs there, readable by all (or SLURM_CONF names it)",
            )
        ]  # fmt: skip
    parameters = conf.parse(text)
    found = [
        Finding("slurm", True, f"read {file}", f"cluster {parameters.get('clustername', '?')}"),
        _plugin(Path(parameters.get("plugstackconfig", file.parent / "plugstack.conf"))),
        _hooks(file, text, parameters),
        _health(file, parameters),
    ]
    if parameters.get("authtype", "auth/munge").lower() == "auth/munge":
        found.append(_munge())
    return found


def _plugstack(path: Path, depth: int = 8) -> list[list[str]]:
    """The lines in words, those of included files too. Raises OSError for the first file."""
    found = []
    for line in path.read_text(errors="replace").splitlines():
        words = line.split("#", 1)[0].split()
        if len(words) == 2 and words[0].lower() == "include" and depth:
            for name in sorted(glob.glob(str(path.parent / words[1]))):
                try:
                    found += _plugstack(Path(name), depth - 1)
                except OSError:
                    continue  # as Slurm does
        elif words:
            found.append(words)
    return found


def _plugin(path: Path) -> Finding:
    """Whether plugstack has our plugin, as the installation writes it."""
    tried = f"{install.PLUGIN} in {path}"

    def no(why: str, mend: str = _MEND) -> Finding:
        return Finding("slurm-plugin", False, tried, why, mend)

    try:
        lines = _plugstack(path)
    except OSError as error:
        return no(str(error.strerror))
    ours = [x for x in lines if len(x) > 1 and os.path.basename(x[1]) == install.PLUGIN]
    if not ours:
        return no("no line names it")
    kind, plugin = ours[0][:2]
    # A bare name is looked for in Slurm's own directory of plugins.
    if os.path.isabs(plugin) and not os.access(plugin, os.R_OK):
        return no(f"{plugin} can't be read")
    if kind.lower() != "required":
        return no(
            f"{kind}: a task would run outside of its environment where the plugin fails",
            f"root: write `required` in {path}",
        )
    return Finding("slurm-plugin", True, tried, f"required {plugin}")


def _hooks(file: Path, text: str, parameters: dict[str, str]) -> Finding:
    """Whether slurm.conf has the flags, and calls our Prolog and Epilog, itself or by the site's."""
    tried = f"PrologFlags, Prolog and Epilog in {file}"
    library = Path(identity.LIBRARY)
    seen = dict(parameters)
    for name in ("prolog", "epilog"):
        ours = str(library / f"sdee-{name}")
        try:
            called = any(_calls(value, ours) for value in conf.values(text, name))
        except PermissionError as error:
            why = f"{error.filename} can't be read by you"
            return Finding("slurm-hooks", False, tried, why, "root: sdee doctor")
        if called:
            seen[name] = ours
            if not os.access(ours, os.X_OK):
                why = f"{ours} isn't there: nodes drain" if name == "prolog" else f"no {ours}"
                return Finding("slurm-hooks", False, tried, why, _MEND)
    lacks = install.lacking(seen, library)
    if not lacks:
        return Finding("slurm-hooks", True, tried, "the flags are set, the hooks are called")
    mend = f"{_MEND}, then scontrol reconfigure"
    return Finding("slurm-hooks", False, tried, f"it lacks {'; '.join(lacks)}", mend)


def _calls(value: str, ours: str) -> bool:
    """Whether a Prolog= or Epilog= of slurm.conf (a pattern, too) leads to our script.

    Raises PermissionError.
    """
    for path in value.split(","):
        for name in glob.glob(path.strip()) or [path.strip()]:
            if name == ours:
                return True
            try:
                if conf.mentions(name, ours):
                    return True
            except PermissionError:
                raise
            except OSError:
                continue
    return False


def _health(file: Path, parameters: dict[str, str]) -> Finding:
    """Whether nodes are drained on which no environment can start."""
    tried = f"HealthCheckProgram and HealthCheckInterval in {file}"
    program = health.program(parameters)
    lines = ", ".join(health.slurm_conf_lines(Path(identity.LIBRARY)))
    if not program:
        return Finding(
            "slurm-health", False, tried,
            "nothing is run: a node without sdeed fails one job after the other",
            f"root: {lines}, then scontrol reconfigure",
        )  # fmt: skip
    if health.is_ours(program):
        return Finding("slurm-health", True, tried, f"{program}: nodes without sdeed are drained")
    # What runs other checks has ways of its own to name them.
    return Finding(
        "slurm-health", True, tried, f"{program}; `sdee health` should be one of its checks"
    )


def _munge() -> Finding:
    """Whether munged makes a credential for us."""
    tried, mend = "munge --no-input", "root: start munged with the cluster's key"
    try:
        done = subprocess.run(
            ["munge", "--no-input"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=_PATIENCE, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return Finding("munge", False, tried, "no program munge", f"{mend} (apt install munge)")
    except subprocess.TimeoutExpired:
        return Finding("munge", False, tried, f"no answer within {_PATIENCE} s", mend)
    except OSError as error:
        return Finding("munge", False, tried, str(error.strerror), mend)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return Finding("munge", False, tried, said[-1], mend)
    return Finding("munge", True, tried, "munged answers")
