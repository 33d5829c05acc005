"""The parts of the job path that need no cluster."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio

from sdee_launch import cli, protocol
from sdee_launch.config import Settings
from sdee_launch.daemon import Daemon
from sdee_launch.daemon_ops import Reply, Request
from sdee_launch.slurm import (
    broadcast,
    clients,
    conf,
    daemon_jobs,
    findings,
    health,
    hook,
    identity,
    install,
    output,
    records,
    rootless,
    submit,
    transfer,
    words,
)


def test_slurm_conf_is_read_as_slurm_reads_it() -> None:
    text = "# comment\nClusterName=x # more\nSlurmdSpoolDir=/var/spool/%n\nPROLOG=/a\nprolog=/b\n"
    parameters = conf.parse(text)
    assert parameters == {"clustername": "x", "slurmdspooldir": "/var/spool/%n", "prolog": "/b"}
    assert conf.spool_directory(parameters) == f"/var/spool/{os.uname().nodename.split('.')[0]}"
    assert conf.spool_directory({}) == "/var/spool/slurmd"


@pytest.mark.parametrize(
    ("text", "choice"),
    [("main", submit.Choice("main")), ("a.b-c@17", submit.Choice("a.b-c", 17))],
)
def test_choice(text: str, choice: submit.Choice) -> None:
    assert submit.parse_choice(text) == choice


@pytest.mark.parametrize("text", ["", "@3", "a@", "a@x", "../a", ".hidden", "a/b"])
def test_choice_refused_by_name(text: str) -> None:
    with pytest.raises(submit.SubmitError, match="--sdee="):
        submit.parse_choice(text)


def test_who_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = {"HOME": str(tmp_path)}
    monkeypatch.setattr(submit, "INSIDE", str(tmp_path / "inside"))
    (tmp_path / "inside").write_text("main\n")
    assert submit.choose("no", inside) is None
    assert submit.choose("other@2", inside) == submit.Choice("other", 2)
    assert submit.choose(None, inside) == submit.Choice("main")
    (tmp_path / "inside").unlink()
    assert submit.choose(None, {"HOME": str(tmp_path)}) is None
    (tmp_path / ".config/sdee").mkdir(parents=True)
    (tmp_path / ".config/sdee/sdee.toml").write_text('[jobs]\nenvironment = "mine"\n')
    assert submit.choose(None, {"HOME": str(tmp_path)}) == submit.Choice("mine")
    (tmp_path / ".config/sdee/sdee.toml").write_text("[jobs]\nenvironment = 3\n")
    with pytest.raises(submit.SubmitError, match=r"jobs\.environment"):
        submit.choose(None, {"HOME": str(tmp_path)})


def test_submit_prints_what_prolog_is_to_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, object]] = []

    def request(op: str, **fields: object) -> tuple[dict[str, object], list[int]]:
        asked.append({"op": op, **fields})
        return {"variables": {"ref": "main@4", "keep": "1"}, "warning": "big"}, []

    monkeypatch.setattr(protocol, "request", request)
    assert submit.main(["--sdee", "main", "--exclude", "a,b/*,", "--keep"]) == 0
    assert asked == [
        {"op": "job-submit", "environment": "main", "exclude": ["a", "b/*"], "keep": True}
    ]
    out = capsys.readouterr()
    assert out.out.splitlines() == ["SDEE_REF=main@4", "SDEE_KEEP=1"]
    assert out.err == "sdee: big\n"


@pytest.mark.parametrize(
    ("line", "script", "where"),
    [
        ("", "", ["/here/slurm-%j.out"]),
        ("-N2 --output=a/b.out -eerr", "", ["/here/a/b.out", "/here/err"]),
        ("-D /there -o %x", "#!/bin/sh\n#SBATCH -o no -e 'my err' # x\n", ["/there/%x", "/there/my err"]),
        ("", "#!/bin/sh\n\n#SBATCH --chdir=sub -o /a/%j\nls\n#SBATCH -o no\n", ["/a/%j"]),
        ("-o %j/out", "", []),
    ],
)  # fmt: skip
def test_where_output_goes(line: str, script: str, where: list[str]) -> None:
    assert output.paths(line.split(), script, {}, "/here") == where
    assert output.paths([], "#SBATCH -o a", {"SBATCH_OUTPUT": "b"}, "/") == ["/b"]


def test_submit_without_daemon_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("SDEED_SOCKET", str(tmp_path / "none"))
    assert submit.main(["--sdee", "main"]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_note_to_the_controller() -> None:
    assert hook.note("n2", "no\nspace", 0) == "sdee: n2: no space"
    assert hook.note("n2", "x" * 900, 3).endswith("x (restart 3)")
    assert len(hook.note("n2", "x" * 900, 0)) < 500


def test_prolog_of_a_plain_job_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "request", lambda *a, **k: pytest.fail("asked"))
    assert hook.prolog({"SLURM_JOB_ID": "3", "SLURM_JOB_UID": "1"}) == 0


def test_prolog_that_fails_never_drains_the_node(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its reason is where the steps look, and the controller knows."""
    told: list[tuple[int, str, str]] = []
    written: list[records.Record] = []

    def refuse(op: str, **fields: object) -> object:
        assert op == "job-prepare"
        assert fields["wanted"] == {"ref": "main@1", "keep": "1"}
        raise protocol.Refused("No space left on device")

    monkeypatch.setattr(protocol, "request", refuse)
    monkeypatch.setattr(hook, "_tell_controller", lambda *x: told.append(x))
    monkeypatch.setattr(records, "read", lambda job: None)
    monkeypatch.setattr(records, "write", written.append)
    variables = {
        "SPANK_SDEE_REF": "main@1", "SPANK_SDEE_KEEP": "1", "SLURM_JOB_ID": "7",
        "SLURM_JOB_UID": "1234", "SLURMD_NODENAME": "n2",
    }  # fmt: skip
    assert hook.prolog(variables) == 0
    assert told == [(7, "n2", "No space left on device")]
    assert [(x.job, x.failure) for x in written] == [(7, "No space left on device")]


def test_epilog_waits_for_no_daemon_where_nothing_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {7: records.Record(7, 1000, "main@1", failure="no sdeed on the node")}
    monkeypatch.setenv("SDEED_SOCKET", str(tmp_path / "none"))
    monkeypatch.setattr(records, "read", known.get)
    monkeypatch.setattr(records, "forget", known.pop)
    started = time.monotonic()
    assert hook.epilog({"SLURM_JOB_ID": "7"}) == 0
    assert time.monotonic() - started < hook.PATIENCE / 2
    assert not known


def test_prolog_s_last_resort_is_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a Python that works, the shell alone sees to it that no task runs outside."""
    monkeypatch.setattr(records, "DIRECTORY", tmp_path / "jobs")
    prolog, epilog, _ = install.write_hooks(tmp_path / "hooks", python="/bin/false")
    variables = {
        "PATH": "/usr/bin:/bin", "SPANK_SDEE_REF": "a@1", "SLURM_JOB_ID": "12",
        "SLURM_JOB_UID": "77", "SLURMD_NODENAME": "n1",
    }  # fmt: skip
    for hook_ in (prolog, epilog):
        subprocess.run([hook_], check=True, timeout=20, env=variables)
    record = records.read(12, tmp_path / "jobs")
    assert record is not None
    assert (record.uid, record.failure) == (77, "the Prolog of SDEE could not run")


def test_health_names_the_first_thing_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SDEED_SOCKET", str(tmp_path / "none"))
    monkeypatch.setenv("SDEE_CONFIG", str(tmp_path / "sdee.toml"))
    monkeypatch.setattr(hook, "PATIENCE", 0.0)
    monkeypatch.setattr(health, "JOBS", str(tmp_path / "jobs"))
    (tmp_path / "sdee.toml").write_text(f"[deploy]\ncache = '{tmp_path}/cache/deep'\n")
    assert str(tmp_path / "none") in health.problem()
    monkeypatch.setattr(protocol, "request", lambda *a, **k: ({"version": "1"}, []))
    assert health.problem() == ""
    assert cli.main(["health"]) == 0
    (tmp_path / "cache").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path / "cache"]
    subprocess.run(mount, check=True, timeout=60)
    try:
        assert health.problem() == f"{tmp_path}/cache/deep: the disk is full"
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "cache"], check=True, timeout=60)
        assert "read-only" in health.problem()
    finally:
        subprocess.run(["umount", tmp_path / "cache"], check=True, timeout=60)
    (tmp_path / "sdee.toml").write_text("[nonsense]\n")
    assert "nonsense" in health.problem()
    assert cli.main(["health"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said == ["sdee health: well", f"sdee health: {health.problem()}"]


NODE = "NodeName=n1 Arch=x86_64 State={} ThreadsPerCore=1 MCS_label=N/A Reason={} Comment=[a@b]"


@pytest.mark.parametrize(
    ("state", "reason", "ill", "told"),
    [
        ("IDLE", "", True, "State=DRAIN Reason=sdee health: no sdeed"),
        ("IDLE", "", False, ""),
        ("IDLE+DRAIN", "a disk [root@2026-11-29T11:00:00]", True, ""),
        ("IDLE+DRAIN", "a disk [root@2026-11-29T11:00:00]", False, ""),
        ("DOWN*", "Not responding [slurm@2026-11-29T11:00:00]", True, ""),
        ("MIXED+DRAIN", "sdee health: no [x] [root@2026-11-29T11:00:00]", False, "State=UNDRAIN"),
        ("MIXED", "sdee health: no [x] [root@2026-11-29T11:00:00]", False, ""),
    ],
)
def test_health_drains_and_undoes_only_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, reason: str, ill: bool, told: str
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f"#!/bin/sh\n[ $1 = update ] || exec echo '{NODE.format(state, reason)}'\n"
        f'shift; echo "$*" >> {tmp_path}/told\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    done = health.drain("n1", "no\nsdeed") if ill else health.use_again("n1")
    assert bool(done) == bool(told or ill)
    written = (tmp_path / "told").read_text() if told else ""
    assert written == (told and f"NodeName=n1 {told}\n")
    assert (tmp_path / "told").exists() == bool(told)
    if not ill or told:
        return
    scontrol.write_text("#!/bin/sh\necho slurm_load_node error: no controller >&2; exit 1\n")
    with pytest.raises(health.SlurmProblem, match="no controller"):
        health.drain("n1", "no sdeed")


def test_health_check_s_last_resort_is_the_shell(tmp_path: Path) -> None:
    """Without a Python that works the node is drained all the same, once."""
    python, scontrol = tmp_path / "python", tmp_path / "scontrol"
    scontrol.write_text(
        f"#!/bin/sh\n[ $1 = update ] || exec echo NodeName=n1 State=$(cat {tmp_path}/state) x=y\n"
        f'echo IDLE+DRAIN > {tmp_path}/state; for x; do echo "$x"; done >> {tmp_path}/told\n'
    )
    (tmp_path / "state").write_text("IDLE\n")
    install.write_hooks(tmp_path / "hooks", python=str(python))
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURMD_NODENAME": "n1"}

    def check(text: str) -> tuple[int, str]:
        for path, content in ((scontrol, scontrol.read_text()), (python, f"#!/bin/sh\n{text}\n")):
            path.write_text(content)
            path.chmod(0o755)
        done = subprocess.run(
            [tmp_path / "hooks" / health.SCRIPT], timeout=20, env=variables, text=True,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        return done.returncode, done.stdout

    assert check("echo a warning >&2; echo sdee health: well") == (
        0, "a warning\nsdee health: well\n",
    )  # fmt: skip
    assert check("echo sdee health: no sdeed; exit 1") == (1, "sdee health: no sdeed\n")
    assert not (tmp_path / "told").exists()
    why = "sdee health: it can't run: ModuleNotFoundError: No module named 'sdee_launch'"
    for _ in range(2):
        broken = f'echo Traceback >&2; echo "{why.partition("run: ")[2]}" >&2; exit 1'
        assert check(broken) == (1, f"{why}\n")
    told = (tmp_path / "told").read_text().splitlines()
    assert told == ["update", "NodeName=n1", "State=DRAIN", f"Reason={why}"]


def test_prolog_drains_only_where_a_health_check_undoes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drained: list[tuple[str, str]] = []
    monkeypatch.setattr(health, "drain", lambda *words: drained.append(words) or "n1 drains")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    site = tmp_path / "checks"
    site.write_text(f"#!/bin/sh\n# not {health.SCRIPT}\n")
    text = f"HealthCheckProgram={tmp_path}/x/{health.SCRIPT}\n"
    for content, drains in (
        ("", False),
        (text, False),
        (text + "HealthCheckInterval=0\n", False),
        (text + "HealthCheckInterval=60\n", True),
        (f"HealthCheckProgram={site}\nHealthCheckInterval=60\n", False),
    ):
        (tmp_path / "slurm.conf").write_text(content)
        assert health.drain_at_once("n1", "why") == ("n1 drains" if drains else "")
        assert drained == ([("n1", "why")] if drains else [])
        drained.clear()
    site.write_text(f"#!/bin/sh\n/usr/lib/sdee/{health.SCRIPT}\n")
    assert health.drain_at_once("n1", "why")


def test_a_slow_snapshot_or_deployment_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: dict[str, float] = {}
    monkeypatch.setattr(submit, "SILENCE", 0.01)

    def request(op: str, **fields: object) -> tuple[dict[str, object], list[int]]:
        waited[op] = protocol.REPLY_TIMEOUT
        time.sleep(0.05)
        return {"variables": {}}, []

    monkeypatch.setattr(protocol, "request", request)
    for op, ask in (
        ("job-submit", lambda: submit.main(["--sdee", "main"])),
        ("job-prepare", lambda: hook.request("job-prepare")),
    ):
        monkeypatch.setattr(protocol, "REPLY_TIMEOUT", 120.0)
        ask()
        assert waited[op] > daemon_jobs.PREPARE_SECONDS
    assert capsys.readouterr().err.count("what is new in main is being packed") == 1


def test_what_is_ready_after_its_epilog_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm kills a Prolog that takes longer than PrologEpilogTimeout, and then calls Epilog."""
    known: dict[int, records.Record] = {}
    ended: list[int] = []

    async def prepare(daemon: object, request: Request, job: int) -> Reply:
        await trio.sleep(0.02)
        known[job] = records.Record(job, 1000, "main@1")
        return Reply({})

    async def end(daemon: object, record: records.Record) -> None:
        ended.append(record.job)
        del known[record.job]

    monkeypatch.setattr(daemon_jobs, "_prepare", prepare)
    monkeypatch.setattr(daemon_jobs, "_end", end)
    monkeypatch.setattr(records, "read", known.get)
    daemon = cast(Daemon, None)
    asked = Request("", {"job": 7, "uid": 1000}, 0, 0, 1, ())

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(refused)
            await trio.sleep(0.01)
            await daemon_jobs.job_end(daemon, asked)
            assert not ended
            nursery.start_soon(daemon_jobs.job_prepare, daemon, asked)  # the job's second run

    async def refused() -> None:
        with pytest.raises(protocol.Refused, match="ended meanwhile"):
            await daemon_jobs.job_prepare(daemon, asked)

    trio.run(both)
    assert ended == [7]
    assert list(known) == [7]


def test_a_job_that_can_t_be_cleared_is_over_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as where the site's cache_limit is no size."""
    forgotten: list[int] = []

    async def refuse(*_: object) -> None:
        raise protocol.Refused("'lots' is no size")

    nobody = SimpleNamespace(of=lambda uid: [])
    daemon = cast(Daemon, SimpleNamespace(registry=nobody, call=refuse))
    monkeypatch.setattr(daemon_jobs, "ERRORS", [])
    monkeypatch.setattr(records, "forget", forgotten.append)
    trio.run(daemon_jobs._end, daemon, records.Record(7, 1000, "main@1", place="/none"))
    assert forgotten == [7]
    assert "'lots' is no size" in str(daemon_jobs.ERRORS[0]["reason"])


def test_records(tmp_path: Path) -> None:
    place = tmp_path / "jobs"
    assert records.read(5, place) is None
    assert list(records.every(place)) == []
    good = records.Record(5, 1000, "main@3", init=42, started=7, variables={"ref": "main@3"})
    bad = records.Record(6, 1000, "main@3", failure="no\n\nspace")
    records.write(good, place)
    records.write(bad, place)
    assert (place / "5").read_text().splitlines()[0] == "ready"
    assert (place / "6").read_text().splitlines()[0] == "failed no space"
    assert list(records.every(place)) == [good, bad]
    records.forget(5, place)
    records.forget(5, place)
    assert records.read(5, place) is None


def test_install_writes_and_takes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conf, "DIRECTORIES", ("/etc/slurm",))
    etc = tmp_path / "etc/slurm"
    etc.mkdir(parents=True)
    (etc / "slurm.conf").write_text("ClusterName=x\n")
    (etc / "plugstack.conf").write_text("include /etc/slurm/plugstack.conf.d/*.conf")
    before = {path: path.read_text() for path in etc.iterdir()}
    first = install.install(tmp_path)
    assert any("spank_sdee.so" in line for line in first)
    after = {path: path.read_text() for path in etc.iterdir()}
    assert "required /usr/lib/sdee/spank_sdee.so" in after[etc / "plugstack.conf"]
    assert "PrologFlags=Alloc,Contain,DeferBatch\n" in after[etc / "slurm.conf"]
    install.install(tmp_path)
    assert after == {path: path.read_text() for path in etc.iterdir()}
    assert any(f"HealthCheckProgram={identity.LIBRARY}/sdee-health" in line for line in first)
    library = tmp_path / identity.LIBRARY.lstrip("/")
    plain = subprocess.run([library / "sdee-prolog"], check=False, timeout=20, env={})
    assert plain.returncode == 0
    install.uninstall(tmp_path)
    now = {path: path.read_text().rstrip("\n") for path in etc.iterdir()}
    assert now == {path: text.rstrip("\n") for path, text in before.items()}
    assert list(library.iterdir()) == []
    assert install.uninstall(tmp_path) == []


def test_install_leaves_a_site_s_own_prolog_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conf, "DIRECTORIES", ("/etc/slurm",))
    etc = tmp_path / "etc/slurm"
    etc.mkdir(parents=True)
    text = "ClusterName=x\nInclude /etc/slurm/more.conf # site\ninclude lost.conf\n"
    (etc / "slurm.conf").write_text(text)
    (etc / "more.conf").write_text("Prolog=/site/prolog\nPrologFlags=X11,contain\n")
    said = "\n".join(install.install(tmp_path))
    ours = f"{identity.LIBRARY}/sdee-prolog"
    assert f"Prolog=/site/prolog stays; add this line to it: [ ! -x {ours} ] || {ours}" in said
    assert "PrologFlags=X11,contain,Alloc,DeferBatch" in said
    assert f"Epilog={identity.LIBRARY}/sdee-epilog" in said
    assert (etc / "slurm.conf").read_text() == text
    health_ = f"HealthCheckProgram={identity.LIBRARY}/sdee-health\nHealthCheckInterval=60\n"
    (etc / "more.conf").write_text(f"Prolog={ours}\nEpilog=/site/epilog\n{health_}")
    assert not any("HealthCheck" in line for line in install.install(tmp_path))
    assert any(
        f"names {ours} and {identity.LIBRARY}/sdee-health: take" in x
        for x in install.uninstall(tmp_path)
    )


def test_doctor_says_nothing_of_slurm_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.setattr(conf, "DIRECTORIES", ())
    monkeypatch.setattr(findings, "_PROGRAMS", ("no-slurmd",))
    assert findings.findings() == []
    monkeypatch.setattr(findings, "_PROGRAMS", ("no-slurmd", "sh"))
    (only,) = findings.findings()
    assert (only.name, only.works) == ("slurm", False) and "slurm.conf" in only.mend


def test_doctor_says_what_slurm_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, site, munge = tmp_path / "lib", tmp_path / "prolog.d/site", tmp_path / "bin/munge"
    slurm_conf, plugstack = tmp_path / "slurm.conf", tmp_path / "more.d/one.conf"
    for path in (library / "x", site, munge, plugstack):
        path.parent.mkdir()
    monkeypatch.setenv("SLURM_CONF", str(slurm_conf))
    monkeypatch.setenv("PATH", f"{munge.parent}:/usr/bin:/bin")
    monkeypatch.setattr(identity, "LIBRARY", str(library))

    def found() -> dict[str, tuple[bool, str]]:
        return {f.name: (f.works, f.detail) for f in findings.findings()}

    slurm_conf.write_text("ClusterName=x\nPrologFlags=x11\n")
    munge.write_text("#!/bin/sh\necho 'munge: Error: no munged' >&2; exit 6\n")
    munge.chmod(0o755)
    said = found()
    assert said["slurm"] == (True, "cluster x")
    assert said["slurm-plugin"] == (False, "No such file or directory")
    assert not said["slurm-hooks"][0] and "x11,Alloc,Contain,DeferBatch" in said["slurm-hooks"][1]
    assert said["munge"] == (False, "munge: Error: no munged")

    (tmp_path / "plugstack.conf").write_text("include more.d/*.conf\n")
    line = install.plugstack_line(library)
    plugstack.write_text(f"# {line}\n")
    assert found()["slurm-plugin"] == (False, "no line names it")
    plugstack.write_text(f"{line}\n")
    assert "can't be read" in found()["slurm-plugin"][1]
    (library / install.PLUGIN).touch()
    assert found()["slurm-plugin"] == (True, f"required {library / install.PLUGIN}")
    plugstack.write_text(line.replace("required", "optional"))
    assert not found()["slurm-plugin"][0]

    slurm_conf.write_text("ClusterName=x\n" + "\n".join(install.slurm_conf_lines(library)))
    assert "nodes drain" in found()["slurm-hooks"][1]
    install.write_hooks(library)
    assert found()["slurm-hooks"][0]
    # A site's own Prolog that calls ours, among others.
    text = slurm_conf.read_text().replace(
        f"Prolog={library}/sdee-prolog", f"Prolog={site.parent}/*"
    )
    slurm_conf.write_text(f"{text}\nProlog=/site/other\nAuthType=auth/slurm\n")
    said = found()
    assert "/site/other stays; add this line" in said["slurm-hooks"][1] and "munge" not in said
    site.write_text(f"#!/bin/sh\n[ ! -x {library}/sdee-prolog ] || {library}/sdee-prolog\n")
    assert found()["slurm-hooks"][0]

    assert not found()["slurm-health"][0]
    program = f"{library}/sdee-health"
    slurm_conf.write_text(f"HealthCheckProgram={program}\nHealthCheckInterval=60\n")
    assert found()["slurm-health"] == (True, f"{program}: nodes without sdeed are drained")
    slurm_conf.write_text("HealthCheckProgram=/usr/sbin/nhc\nHealthCheckInterval=60\n")
    assert "`sdee health`" in found()["slurm-health"][1]


def test_client_program_runs_the_real_command_as_the_user(tmp_path: Path) -> None:
    """uid 0 of a user namespace is mapped back in a nested one."""
    real = tmp_path / "real"
    real.mkdir()
    (real / "squeue").write_text('#!/bin/sh\necho "$(id -u) $(id -g) $*"\n')
    (real / "squeue").chmod(0o755)
    source = Path(identity.__file__).with_name("slurm_client.c")
    program = tmp_path / "squeue"
    subprocess.run(["gcc", f'-DREAL="{real}"', "-o", program, source], check=True, timeout=60)
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:3]:
        if parent != Path("/tmp"):
            parent.chmod(0o755)
    enter = ["setpriv", "--reuid=4321", "--regid=4322", "--clear-groups"]
    for line in (
        [*enter, "unshare", "--user", "--map-root-user", program, "-u", "me"],
        [*enter, program, "-u", "me"],
    ):
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
        assert (done.stdout, done.stderr) == ("4321 4322 -u me\n", "")


def test_environment_of_sdee_srun() -> None:
    assert clients.take_environment(["--env", "a", "-n3", "x"]) == ("a", ["-n3", "x"])
    assert clients.take_environment(["--env=a", "x"]) == ("a", ["x"])
    assert clients.take_environment(["-n3", "x", "--env=b"]) == ("", ["-n3", "x", "--env=b"])
    with pytest.raises(ValueError, match="--env"):
        clients.take_environment(["--env"])


def test_what_came_through_the_users_hands_is_checked() -> None:
    good = {"ref": "a@3", "identity": "0" * 16, "source": "/x", "transport": "shared"}
    assert transfer.parse(good).variables() == good
    for change in (
        {"ref": "../a@3"},
        {"ref": "a@x"},
        {"ref": "a"},
        {"source": "x"},
        {"transport": "smoke"},
    ):
        with pytest.raises(transfer.TransferError):
            transfer.parse({**good, **change})


def test_a_job_s_wish_is_read_from_scontrol() -> None:
    text = (
        "JobId=12 JobName=x UserId=al(1001) GroupId=al(1001) JobState=RUNNING Reason=Prolog "
        "AdminComment=sdee-wants:00112233445566ff@7 ReqNodeList=(null) NodeList=n[1-3] BatchHost=n1"
    )
    wish = broadcast.Wish(12, 1001, "00112233445566ff", 7, False, "n[1-3]")
    assert broadcast.parse_job(text) == wish
    assert broadcast.note(wish.identity, 7) in text
    everything = text.replace("sdee-wants:", "sdee-wants-all:")
    assert broadcast.parse_job(everything) == dataclasses.replace(wish, everything=True)
    again = text.replace("JobState", "Requeue=1 Restarts=2 JobState")
    assert broadcast.parse_job(again) == dataclasses.replace(wish, restarts=2), "another wish"
    assert broadcast.parse_job(text.replace("RUNNING", "COMPLETED")) is None
    assert broadcast.parse_job(text.replace("sdee-wants", "sdee")) is None


HELP = """
  -A, --account=name          charge job to specified account
  -K, --kill-on-bad-exit      kill the job if any task terminates with a
  -n, --ntasks=ntasks         number of tasks to run
  -N, --nodes=N               number of nodes on which to run (N = min[-max])
      --exclusive[=user]      allocate nodes in exclusive mode when
      --mpi=type              type of MPI being used
  -v, --verbose               verbose mode (multiple -v's increase verbosity)
  -W, --wait                  wait for completion of submitted job
      --wait-all-nodes=num    wait for all nodes to be allocated if set
      --wrap[=command string] wrap command string in a sh script and submit
"""


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("./a.out -n 3", 0),
        ("--wait job.sh 3", 1),
        ("--wait-all 1 job.sh", 2),
        ("-W --wrap hostname", 3),
        ("-n 6 -N3 ./a.out", 3),
        ("--nodes 3 --mpi=pmix --exclusive ./a.out --mpi x", 4),
        ("-vKn 6 ./a.out", 2),
        ("--ntask 6 hostname", 2),
        ("-n6 -- -odd", 1),
        ("-n 6", 2),
    ],
)
def test_where_the_command_begins(line: str, options: int) -> None:
    given = line.split()
    ours, command = words.split(given, words.parse_help(HELP))
    assert ours == given[:options]
    assert command == [x for x in given[options:] if x != "--"]


@pytest.mark.parametrize(
    ("line", "joins"),
    [
        ("srun --jobid=7 hostname", True),
        ("srun -n 2 --jobid 7 hostname", True),
        ("srun --jobi 7 --overlap hostname", True),
        ("srun hostname --jobid=7", False),
        ("srun -N 2 -- hostname --jobid=7", False),
        ("srun --job-name=7 hostname", False),
    ],
)
def test_an_srun_that_names_a_job_submits_none(tmp_path: Path, line: str, joins: bool) -> None:
    program = tmp_path / "srun"
    program.write_text(f"#!/bin/sh\ncat <<'E'\n{HELP}      --jobid=id  run under a job\nE\n")
    program.chmod(0o755)
    assert submit.joins_a_job(line.split(), str(program)) == joins


def test_a_rootless_batch_script_keeps_its_options() -> None:
    script = "#!/bin/bash\n# about\n#SBATCH -N3\n\n#SBATCH -o x.out\necho hi\n#SBATCH -n9\n"
    assert rootless.wrapper(script, ["python3", "a b"]).splitlines() == [
        "#!/bin/sh", "#SBATCH -N3", "#SBATCH -o x.out", "exec python3 'a b' \"$@\"",
    ]  # fmt: skip


def test_the_site_s_wishes_for_every_job_travel_with_it() -> None:
    settings = Settings(sections={"jobs": {"engine": "fuse", "keep": True}})
    assert transfer._chosen(settings) == {"engine": "fuse", "keep": "1"}
    assert transfer._chosen(Settings()) == {}
    with pytest.raises(transfer.TransferError, match=r"jobs\.engine"):
        transfer._chosen(Settings(sections={"jobs": {"engine": "steam"}}))
