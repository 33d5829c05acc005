"""The commands of `sdee`, each from the module that knows it; only the one that is asked for runs."""

from __future__ import annotations

import importlib
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from typing import Any

#: Words that a module adds to the parser itself, by add_parser(subparsers).
_MODULES = {
    "env": "sdee_launch.env_command",
    "ps": "sdee_launch.live",
    "kill": "sdee_launch.live",
    "status": "sdee_launch.live",
    "doctor": "sdee_launch.doctor",
    "deploy": "sdee_launch.deploy.command",
    "cache": "sdee_launch.deploy.command",
    "job": "sdee_launch.slurm.command",
    "jobs": "sdee_launch.slurm.command",
    "node": "sdee_launch.slurm.command",
    "health": "sdee_launch.slurm.health",
    "srun": "sdee_launch.slurm.command",
    "sbatch": "sdee_launch.slurm.command",
    "salloc": "sdee_launch.slurm.command",
}
#: Words whose arguments a function takes as they are.
_FUNCTIONS = {
    "install": "sdee_launch.install:install_main",
    "uninstall": "sdee_launch.install:uninstall_main",
    "daemon": "sdee_launch.daemon:main",
}
_HELP = """\
usage: sdee COMMAND …

Environments: root of one's own over the host's /.

  shell  [--env NAME] [--engine auto|kernel|fuse] [--bind SRC[:DST][:ro]] [--rootless]
  run    (the same) [--] COMMAND…
                     a shell, or a command, in an environment; it is made on first use
  env    list | create | info | diff | reset | snapshot | rollback | export | import | rename | rm
  ps, kill, status   what is alive on this node
  doctor             what this node can do, and what is in the way
  deploy, cache      the way of an environment to other nodes
  jobs, job, srun, sbatch, salloc
                     jobs in environments
  daemon, install, uninstall, node, health
                     for administrators

sdee COMMAND --help tells more."""

_SESSION_HELP = {
    "run": """\
usage: sdee run [-h] [--env NAME] [--engine auto|kernel|fuse] [--bind SRC[:DST][:ro]]
                [--rootless] [--] COMMAND [ARGUMENT ...]

Run a command in an environment, as if it ran right here: its terminal, working directory, signals
and exit status are those of the command. The environment is made on first use.
""",
    "shell": """\
usage: sdee shell [-h] [--env NAME] [--engine auto|kernel|fuse] [--bind SRC[:DST][:ro]]
                  [--rootless]

Your shell in an environment, with this terminal and working directory. The environment is made on
first use; it ends with its last session, and what was changed in it is kept.
""",
}
_SESSION_OPTIONS = """\
options:
  -h, --help            show this help message and exit
  --env, -e NAME        which environment (default: $SDEE_ENV, then the settings, then `default`)
  --engine auto|kernel|fuse
                        the kernel's overlayfs, or sdeefs (default: auto, what works here)
  --bind SRC[:DST][:ro] show SRC of the host as DST inside (default: SRC), ro: read-only; may be
                        given several times
  --rootless            without the daemon, as SDEE_MODE=rootless does
"""
_SESSION_END = {
    "run": """\
exit status: that of COMMAND, 128+n after signal n, 126 or 127 where it can't be run or found; 1 where
the environment can't be entered, 2 wrong usage.

examples:
  sdee run make -j8
  sdee run --env old --bind /data:/mnt:ro -- ./a.out --env x
""",
    "shell": """\
exit status: that of the shell; 1 where the environment can't be entered, 2 wrong usage.

examples:
  sdee shell
  sdee shell --env old --bind /data:/mnt:ro
""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """All commands but the quick way to run and shell; the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_HELP)
        return 0 if words else 2
    word = words[0]
    if word in _SESSION_HELP:
        # What these two do is session.py's; here is but their help.
        print(_SESSION_HELP[word], _SESSION_OPTIONS, _SESSION_END[word], sep="\n", end="")
        return 0
    if word in _FUNCTIONS:
        module, _, name = _FUNCTIONS[word].partition(":")
        function: Callable[[list[str]], int] = getattr(importlib.import_module(module), name)
        return function(words[1:])
    module_name = _MODULES.get(word)
    if module_name is None:
        print(f"sdee: {word} is no command; sdee --help lists them", file=sys.stderr)
        return 2
    import argparse

    parser = argparse.ArgumentParser(prog="sdee")
    subparsers = parser.add_subparsers(required=True)
    importlib.import_module(module_name).add_parser(subparsers)
    return _perform(parser.parse_args(words), word)


def _perform(options: argparse.Namespace, word: str) -> int:
    from sdee_launch.config import ConfigError
    from sdee_launch.environments import EnvironmentProblem
    from sdee_launch.plan import PlanProblem
    from sdee_launch.protocol import Refused
    from sdee_launch.session import NotEntered

    function: Any = getattr(options, "run", None) or options.function
    try:
        return int(function(options) or 0)
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        return 130
    except (ConfigError, EnvironmentProblem, PlanProblem, Refused, NotEntered) as error:
        print(f"sdee {word}: {error}", file=sys.stderr)
    except OSError as error:
        name = f"{error.filename!s}: " if error.filename else ""
        print(f"sdee {word}: {name}{error.strerror or error}", file=sys.stderr)
    return 1
