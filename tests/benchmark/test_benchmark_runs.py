"""benchmark.sh with real runs (slow): an interrupted sweep goes on; smoke reaches the end."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest
from conftest import FIGURES, ROOT, environment
from matplotlib.image import imread

# Three runs of Stream AC that take some ten seconds each and have several checkpoints
SWEEP, FLAGS = "fig13", "--total-timesteps 30000 --eval-interval 10000 --checkpoint-interval 1000"


def places(folder: Path) -> dict[str, str]:
    return {"RUNS": str(folder / "runs"), "RESULTS": str(folder / "results")}


def start(folder: Path, *arguments: str, **more: str) -> subprocess.Popen:
    command = [str(ROOT / "benchmark.sh"), *arguments]
    pipes = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "start_new_session": True,
    }
    return subprocess.Popen(command, env=environment(**places(folder), **more), **pipes)


def type_in(keyboard: int, terminal: int, folder: Path, line: str, **more: str) -> subprocess.Popen:
    """An interactive shell in a terminal of its own, in which somebody types a line."""

    def own():
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY)

    where = {
        "stdin": terminal,
        "stdout": terminal,
        "stderr": terminal,
        "env": environment(**places(folder), **more),
    }
    shell = subprocess.Popen(["bash", "--norc", "-i"], preexec_fn=own, **where)
    os.write(keyboard, f"{line}\n".encode())
    return shell


def results(folder: Path) -> dict[str, list[str]]:
    """The metrics of each run, those of wall-clock time aside."""
    return {
        path.parent.name: [line for line in path.read_text().splitlines() if ",time/" not in line]
        for path in (folder / "runs").glob("*/metrics.csv")
    }


def wait_for_checkpoint(folder: Path, count: int) -> None:
    """Waits until some unfinished runs have a checkpoint."""
    deadline = time.time() + 300
    while time.time() < deadline:
        found = {path.parent for path in (folder / "runs").glob("*/checkpoint.pt")}
        if sum(",final/" not in (run / "metrics.csv").read_text() for run in found) >= count:
            return
        time.sleep(0.2)
    raise TimeoutError


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ctrl-c", "kill"])
def test_an_interrupted_local_sweep_goes_on(tmp_path, how):
    whole = start(tmp_path / "whole", SWEEP, "--scale", "smoke", "--jobs", "2", FLAGS=FLAGS)
    out, _ = whole.communicate(timeout=600)
    assert whole.returncode == 0, out

    if how == "ctrl-c":
        keyboard, terminal = os.openpty()
        line = f"{ROOT}/benchmark.sh {SWEEP} --scale smoke --jobs 2; exit $?"
        cut = type_in(keyboard, terminal, tmp_path / "cut", line, FLAGS=FLAGS)
        wait_for_checkpoint(tmp_path / "cut", 2)
        os.write(keyboard, b"\x03")
        cut.wait(timeout=60)
        out = os.read(keyboard, 2**16).decode()
    else:
        cut = start(tmp_path / "cut", SWEEP, "--scale", "smoke", "--jobs", "2", FLAGS=FLAGS)
        wait_for_checkpoint(tmp_path / "cut", 2)
        os.kill(cut.pid, signal.SIGTERM)  # of the script alone; it ends its runs
        out, _ = cut.communicate(timeout=60)
    assert cut.returncode == 1 and "interrupted; the same command goes on" in out, out
    assert "Traceback" not in out and "failed" not in out
    before = results(tmp_path / "cut")
    assert not any(",final/" in line for lines in before.values() for line in lines)

    again = start(tmp_path / "cut", SWEEP, "--scale", "smoke", "--jobs", "2", FLAGS=FLAGS)
    out, _ = again.communicate(timeout=600)
    assert again.returncode == 0 and "3 of 3 runs are finished" in out, out
    logs = "".join(path.read_text() for path in (tmp_path / "cut" / "runs" / "logs").glob("*.log"))
    assert len(re.findall("going on from env step [1-9]", logs)) == 2
    assert results(tmp_path / "cut") == results(tmp_path / "whole")

    third = start(tmp_path / "cut", SWEEP, "--scale", "smoke", FLAGS=FLAGS)
    out, _ = third.communicate(timeout=600)
    assert (
        third.returncode == 0 and "3 runs, 3 of them finished" in out and "\nfinished:" not in out
    )


@pytest.mark.slow
def test_smoke_runs_every_target_in_half_an_hour(tmp_path):
    began = time.time()
    done = start(tmp_path, "all", "--scale", "smoke", "--jobs", "2", THREADS="1")
    out, _ = done.communicate(timeout=3600)
    minutes = (time.time() - began) / 60
    assert done.returncode == 0, out
    for figure in FIGURES:
        folder = tmp_path / "results" / figure
        pictures = list(folder.glob("*.png"))
        assert pictures and all(imread(picture).std() > 0.01 for picture in pictures), figure
        assert list(folder.glob("*.svg")) and list(folder.glob("*.csv*")), figure
    for number in range(1, 6):
        table = (tmp_path / "results" / f"table{number}" / "table.md").read_text()
        assert table.count("\n") > 10 and ("differs" in table) == (number < 3), number
    assert not re.search("^(missing|left out|fewer seeds): ", out, re.M)
    assert minutes < 30


PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch")
CONFIG = """
ClusterName=test
SlurmctldHost={host}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
ReturnToService=2
MpiDefault=none
NodeName={host} CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=short Nodes=ALL Default=NO MaxTime=60 State=UP
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A real Slurm of one machine with two cores; its daemons are ended by their process ids."""
    if os.geteuid() or not all(map(shutil.which, PROGRAMS)):
        pytest.skip("needs root and Debian's slurm-wlm and munge")
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "slurm.conf").write_text(CONFIG.format(host=os.uname().nodename, folder=folder))
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "seed", "log")]
    subprocess.run(["mungekey", "--create", f"--keyfile={folder}/munge.key"], check=True)
    try:
        subprocess.run(["munged", "--force", f"--socket={folder}/munge.socket", *files], check=True)
        subprocess.run(["slurmctld"], check=True, cwd=folder)
        subprocess.run(["slurmd"], check=True, cwd=folder)
        yield
    finally:
        for name in ("slurmd", "slurmctld", "munge"):
            if (file := folder / f"{name}.pid").exists():
                os.kill(int(file.read_text()), signal.SIGTERM)


def ask_slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_slurm_requeues_and_the_results_are_the_local_ones(tmp_path, slurm):
    local = start(tmp_path / "local", SWEEP, "--scale", "smoke", "--jobs", "2", FLAGS=FLAGS)
    out, _ = local.communicate(timeout=600)
    assert local.returncode == 0, out

    where = {"SBATCH_PARTITION": "short", "SBATCH_OPTIONS": "--time=30", "FLAGS": FLAGS}
    sent = start(tmp_path / "far", SWEEP, "--scale", "smoke", "--runner", "slurm", **where)
    out, _ = sent.communicate(timeout=300)
    assert sent.returncode == 0, out
    job = re.search(r"Submitted batch job (\d+)", out)[1]
    assert (
        "3 runs, 0 of them finished" in out and f"./benchmark.sh plot {SWEEP} --scale smoke" in out
    )

    wait_for_checkpoint(tmp_path / "far", 1)
    ask_slurm("scontrol", "requeue", f"{job}_1")
    deadline = time.time() + 900  # Slurm holds a requeued job back for two minutes
    while ask_slurm("squeue", "--noheader", "--jobs", job) and time.time() < deadline:
        time.sleep(2)
    logs = {
        path.name[-5]: path.read_text()
        for path in (tmp_path / "far" / "runs" / "slurm").glob("*.log")
    }
    assert sorted(logs) == ["1", "2", "3"]
    assert (
        re.search("going on from env step [1-9]", logs["1"])
        and "going on" not in logs["2"] + logs["3"]
    )
    assert results(tmp_path / "far") == results(tmp_path / "local")

    drawn = start(tmp_path / "far", "plot", SWEEP, "--scale", "smoke", FLAGS=FLAGS)
    out, _ = drawn.communicate(timeout=300)
    assert drawn.returncode == 0 and "3 of 3 runs are finished" in out, out
