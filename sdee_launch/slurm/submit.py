"""The plugin's helper on the submit side: which environment does this job get?

`python -I -m sdee_launch.slurm.submit [--sdee NAME[@GENERATION]] [--exclude PATTERNS] [--keep]`
prints NAME=VALUE lines, which the plugin hands to Prolog as SPANK_NAME; nothing if the job gets
no environment, `step` if there is no job to submit (`srun --jobid` goes into one that runs). What is
printed to stderr is the user's reason why the job isn't submitted.

It imports little: an srun of a user without an environment must not feel it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sdee_launch import protocol
from sdee_launch.protocol import INSIDE

#: Of the submitter's variables, what a job takes: for one job on another engine, or by another way.
CHOSEN = ("engine", "transport")
#: A snapshot of a large upper takes its time.
REPLY_SECONDS = 3600.0
#: After so many seconds of it the user is told what is waited for.
SILENCE = 3.0


@dataclass(frozen=True, slots=True)
class Choice:
    """An environment by name, and by generation unless it is the present state."""

    environment: str
    generation: int | None = None


class SubmitError(Exception):
    """Why the job can't be submitted."""


def parse_choice(text: str) -> Choice:
    """NAME or NAME@GENERATION. Raises SubmitError."""
    name, at, number = text.partition("@")
    if not name or "/" in name or name.startswith("."):
        raise SubmitError(f"--sdee={text}: no environment can have this name")
    if not at:
        return Choice(name)
    if not number.isdigit():
        raise SubmitError(f"--sdee={text}: after @ comes the number of a generation")
    return Choice(name, int(number))


def default_environment(home: str) -> str:
    """The user's `[jobs] environment` in ~/.config/sdee/sdee.toml, or empty. Raises SubmitError."""
    path = os.path.join(home, ".config/sdee/sdee.toml")
    try:
        with open(path, "rb") as file:
            text = file.read()
    except OSError:
        return ""
    if b"jobs" not in text:
        return ""
    import tomllib

    try:
        jobs = tomllib.loads(text.decode()).get("jobs", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SubmitError(f"{path}: {error}") from None
    name = jobs.get("environment", "") if isinstance(jobs, dict) else ""
    if not isinstance(name, str):
        raise SubmitError(f"{path}: jobs.environment is no name")
    return name


def environment_inside() -> str:
    """The name of the environment that this runs in; empty on the host."""
    try:
        with open(INSIDE, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""


def choose(option: str | None, variables: dict[str, str]) -> Choice | None:
    """The option, else the environment that we run in, else the user's default."""
    if option == "no":
        return None
    if option:
        return parse_choice(option)
    inside = environment_inside()
    if inside:
        return parse_choice(inside)
    name = default_environment(variables.get("HOME", "/"))
    return parse_choice(name) if name and name != "no" else None


def joins_a_job(line: Sequence[str], program: str) -> bool:
    """Whether a command line of srun names a job to run in. Raises OSError."""
    if not any(word.startswith("--jobi") for word in line):
        return False
    from sdee_launch.slurm import words

    options, _ = words.split(line[1:], words.options_of(program))
    return any(word.startswith("--jobi") for word in options)


def _caller() -> tuple[list[str], str]:
    """The command line and the program of the Slurm command that runs this. Raises OSError."""
    caller = f"/proc/{os.getppid()}"
    with open(f"{caller}/cmdline", "rb") as file:
        line = [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]
    return line, os.readlink(f"{caller}/exe")


def _caller_joins_a_job() -> bool:
    """As joins_a_job, for the srun that runs this."""
    try:
        return joins_a_job(*_caller())
    except OSError:
        return False


def _outputs() -> list[str]:
    """Where the sbatch that runs this has its job's output; empty for other commands."""
    try:
        line, program = _caller()
        if os.path.basename(program) != "sbatch":
            return []
        from sdee_launch.slurm import output

        return output.of_command(line, program, os.environ, os.getcwd())
    except OSError:  # sbatch will say so
        return []


@contextlib.contextmanager
def _told_if_slow(environment: str) -> Iterator[None]:
    def tell(_signal: int, _frame: object) -> None:
        print(f"sdee: what is new in {environment} is being packed", file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGALRM, tell)
    signal.setitimer(signal.ITIMER_REAL, SILENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    option: str | None = None
    exclude: list[str] = []
    keep = False
    while words:
        word = words.pop(0)
        if word == "--keep":
            keep = True
        elif word == "--sdee":
            option = words.pop(0)
        elif word == "--exclude":
            exclude = [x for x in words.pop(0).split(",") if x]
    try:
        choice = choose(option, dict(os.environ))
        if choice is None:
            return 0
        if _caller_joins_a_job():
            print("step")
            return 0
        fields: dict[str, object] = {"environment": choice.environment, "exclude": exclude}
        if choice.generation is not None:
            fields["generation"] = choice.generation
        if keep:
            fields["keep"] = True
        for name in CHOSEN:
            value = os.environ.get(f"SDEE_JOB_{name.upper()}")
            if value:
                fields[name] = value
        outputs = _outputs()
        if outputs:
            fields["outputs"] = outputs
        protocol.REPLY_TIMEOUT = REPLY_SECONDS
        with _told_if_slow(choice.environment):
            reply, _ = protocol.request("job-submit", **fields)  # type: ignore[arg-type]
    except (SubmitError, protocol.Refused, protocol.Unavailable) as error:
        print(f"sdee: {error}", file=sys.stderr)
        return 1
    for warning in str(reply.get("warning", "")).splitlines():
        print(f"sdee: {warning}", file=sys.stderr)
    variables = reply["variables"]
    assert isinstance(variables, dict)
    for name, value in variables.items():
        print(f"SDEE_{name.upper()}={value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
