"""`sdee install --slurm`: build the plugin, and tell Slurm of plugin, Prolog and Epilog."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

from sdee_launch.slurm import conf, health, identity, records

PLUGIN = "spank_sdee.so"
#: What slurm.conf must say. DeferBatch: a batch job starts when all its nodes are ready.
FLAGS = ("Alloc", "Contain", "DeferBatch")
#: Parameters that name programs of ours.
_RUN = ("prolog", "epilog", "healthcheckprogram")
_BEGIN, _END = "# sdee: begin", "# sdee: end"


class InstallError(OSError):
    """Why the Slurm part can't be installed, and what to do."""


def _compile(source: str, target: Path, options: list[str]) -> None:
    text = resources.files("sdee_launch.slurm").joinpath(source).read_bytes()
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        done = subprocess.run(
            ["gcc", "-O2", "-Wall", *options, "-x", "c", "-", "-o", str(temporary)],
            input=text, capture_output=True, timeout=120, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise InstallError("no gcc on this machine: install gcc and libslurm-dev") from None
    if done.returncode:
        message = done.stderr.decode(errors="replace")
        if "slurm/spank.h" in message:
            raise InstallError("no slurm/spank.h: install libslurm-dev (or slurm-devel)")
        raise InstallError(f"{source} does not compile:\n{message}")
    temporary.chmod(0o755)
    os.replace(temporary, target)


def build(directory: Path) -> list[Path]:
    """Compile plugin and client program into `directory`; plugins are for one Slurm release."""
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    plugin, client = directory / PLUGIN, directory / identity.CLIENT
    _compile("spank_sdee.c", plugin, ["-shared", "-fPIC"])
    _compile("slurm_client.c", client, [])
    return [plugin, client]


_PROLOG = """\
#!/bin/sh
# Prolog of SDEE. A job without an environment costs this one shell.
[ -n "$SPANK_SDEE_REF" ] || exit 0
{python} -I -m sdee_launch.slurm.hook prolog && exit 0
# A failing Prolog would drain the node: the job fails in its place, by what its steps find here.
mkdir -p {jobs}
cat > {jobs}/"$SLURM_JOB_ID" <<END
failed the Prolog of SDEE could not run
{{"job": $SLURM_JOB_ID, "uid": $SLURM_JOB_UID, "reference": "", "node": "$SLURMD_NODENAME",
 "failure": "the Prolog of SDEE could not run"}}
END
exit 0
"""
_EPILOG = """\
#!/bin/sh
# Epilog of SDEE: harmless if it is run twice, or for a job without an environment.
[ -e {jobs}/"$SLURM_JOB_ID" ] || exit 0
{python} -I -m sdee_launch.slurm.hook epilog
exit 0
"""
_HEALTH = """\
#!/bin/sh
# HealthCheckProgram of SDEE: drains this node while no environment can start on it.
said=$({python} -I -m sdee_launch health --drain 2>&1)
status=$?
case $said in *"{mark}"*) echo "$said"; exit $status ;; esac
# What can't run doesn't drain: this does.
PATH=${{PATH:-/usr/bin:/bin}}:{path}
node=${{SLURMD_NODENAME:-$(uname -n | cut -d. -f1)}}
why="{mark}it can't run: $(printf '%s' "$said" | tail -n 1 | cut -c 1-200)"
echo "$why"
case $(scontrol show node -o "$node") in *State=*DRAIN* | *State=*DOWN*) ;;
*) scontrol update NodeName="$node" State=DRAIN Reason="$why" ;;
esac
exit 1
"""

_SCRIPTS = {"sdee-prolog": _PROLOG, "sdee-epilog": _EPILOG, health.SCRIPT: _HEALTH}


def write_hooks(directory: Path, python: str = sys.executable) -> list[Path]:
    """The scripts that slurmd calls."""
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    written = []
    words = {
        "python": python, "jobs": records.DIRECTORY, "mark": health.MARK, "path": conf.MORE_PATH,
    }  # fmt: skip
    for name, text in _SCRIPTS.items():
        path = directory / name
        path.write_text(text.format(**words))
        path.chmod(0o755)
        written.append(path)
    return written


def plugstack_line(directory: Path, python: str = sys.executable) -> str:
    """`required`: with `optional`, a task would run outside when the plugin fails."""
    return f"required {directory / PLUGIN} python={python}"


def slurm_conf_lines(directory: Path) -> list[str]:
    """What slurm.conf needs on every machine."""
    return [
        f"PrologFlags={','.join(FLAGS)}",
        f"Prolog={directory / 'sdee-prolog'}",
        f"Epilog={directory / 'sdee-epilog'}",
    ]


def with_block(text: str, lines: list[str]) -> str:
    """`text` with our block of lines as its last, and no other block of ours."""
    bare = re.sub(rf"{_BEGIN}\n.*?{_END}\n?", "", text, flags=re.DOTALL)
    if not lines:
        return bare
    if bare and not bare.endswith("\n"):
        bare += "\n"
    return bare + "\n".join([_BEGIN, *lines, _END]) + "\n"


def install(root: Path = Path("/"), write: bool = True, python: str = sys.executable) -> list[str]:
    """Do it, or (`write` false) say what would be to do; returns what to print. Idempotent.

    Raises InstallError.
    """
    library = Path(identity.LIBRARY)
    conf_directory = root / (conf.directory() or Path("/etc/slurm")).relative_to("/")
    plugstack, slurm_conf = conf_directory / "plugstack.conf", conf_directory / "slurm.conf"
    stack, lines = plugstack_line(library, python), slurm_conf_lines(library)
    if not write:
        return [
            f"{library}: build {PLUGIN}, {identity.CLIENT}, {', '.join(_SCRIPTS)}",
            f"{plugstack}:", f"    {stack}",
            f"{slurm_conf} (the same on all machines):", *(f"    {line}" for line in lines),
        ]  # fmt: skip
    below = root / library.relative_to("/")
    said = [f"built {path}" for path in build(below)]
    said += [f"wrote {path}" for path in write_hooks(below, python)]
    conf_directory.mkdir(parents=True, exist_ok=True)
    if _put_block(plugstack, [stack]):
        said.append(f"{plugstack}: {stack}")
    there = slurm_conf.exists()
    taken = _taken(slurm_conf, root) if there else {}
    if there and not taken:
        if _put_block(slurm_conf, lines):
            said += [f"{slurm_conf}: {line}" for line in lines]
    elif there:
        said += [f"{slurm_conf} is left alone", *(f"    {x}" for x in beside(taken, library))]
    else:
        said += [f"there is no {slurm_conf}; it needs:", *(f"    {x}" for x in lines)]
    if not (there and health.is_ours(health.program(conf.parse(conf.text_of(slurm_conf, root))))):
        said.append("lest a node without sdeed fails one job after the other, slurm.conf may say:")
        said += [f"    {x}" for x in health.slurm_conf_lines(library)]
    said.append("then, on the controller: scontrol reconfigure")
    return said


def _put_block(path: Path, lines: list[str]) -> bool:
    """Whether the file had to be changed."""
    old = path.read_text() if path.exists() else ""
    new = with_block(old, lines)
    if new != old:
        path.write_text(new)
    return new != old


def _taken(path: Path, root: Path) -> dict[str, str]:
    """Parameters of ours that slurm.conf, or what it includes, sets outside our block."""
    found = conf.parse(with_block(conf.text_of(path, root), []))
    return {name: found[name] for name in ("prolog", "epilog", "prologflags") if name in found}


def beside(taken: dict[str, str], library: Path) -> list[str]:
    """What the administrator has to do where the site has hooks of its own, which stay."""
    return lacking(taken, library) or ["it has all that it needs"]


def lacking(taken: dict[str, str], library: Path) -> list[str]:
    """What slurm.conf with these parameters has to say beside, or its hooks have to do."""
    has = [flag for flag in re.split(r"[,\s]+", taken.get("prologflags", "")) if flag]
    known = [flag.lower() for flag in has]
    lacks = [flag for flag in FLAGS if flag.lower() not in known]
    said = [f"PrologFlags={','.join([*has, *lacks])}"] if lacks else []
    for name in ("Prolog", "Epilog"):
        ours = str(library / f"sdee-{name.lower()}")
        own = taken.get(name.lower(), "")
        if not own:
            said.append(f"{name}={ours}")
        elif own != ours:
            said.append(f"{name}={own} stays; add this line to it: [ ! -x {ours} ] || {ours}")
    return said


def uninstall(root: Path = Path("/")) -> list[str]:
    """Take all of it away; returns what to print. Idempotent."""
    said = []
    conf_directory = root / (conf.directory() or Path("/etc/slurm")).relative_to("/")
    slurm_conf = conf_directory / "slurm.conf"
    for path in (conf_directory / "plugstack.conf", slurm_conf):
        if path.exists() and _put_block(path, []):
            said.append(f"{path}: our lines removed")
    if slurm_conf.exists():
        found = conf.parse(conf.text_of(slurm_conf, root))
        left = [v for name, v in found.items() if name in _RUN and identity.LIBRARY in v]
        if left:
            said.append(f"{slurm_conf} names {' and '.join(left)}: take that out, or nodes drain")
    for name in (PLUGIN, identity.CLIENT, *_SCRIPTS):
        path = root / identity.LIBRARY.lstrip("/") / name
        if path.exists():
            path.unlink()
            said.append(f"removed {path}")
    return said
