"""Each agent runs by itself: in an empty folder, with the packages that its own header names."""

import csv
import fnmatch
import json
import re
import shutil
import tomllib
from pathlib import Path

import imageio
import pytest
from conftest import AGENTS, ROOT, Process, call, load_checkpoint, only_run, succeed

BY_AGENT = pytest.mark.parametrize("agent", sorted(AGENTS.glob("*.py")), ids=lambda path: path.stem)
TINY = "--eval-episodes 1 --final-eval-episodes 1 --width-scale 0.125 --sparsity 0.8"
TINY += " --device cpu --threads 1"
SHORT = "--total-timesteps 1000 --learning-starts 600 --diagnostics-interval 800"
CARTPOLE = f"{SHORT} --env-id dm_control/cartpole-swingup-v0 --action-repeat 20 --batch-size 16"
DENSE = "--sparse-kernel dense"  # SAC compiles the same packed one
OWN = {
    "sac_simba_sparse": CARTPOLE,
    "sac_simba_dynamic": f"{CARTPOLE} {DENSE} --topology-interval 10",
    "ddpg_simba_sparse": f"{CARTPOLE} {DENSE}",
    "drqv2_sparse": f"{CARTPOLE} {DENSE} --action-repeat 40",  # pictures are slow
    "stream_ac_sparse": SHORT,
    # A game of Pong is some 3,000 env steps
    "der_impala_sparse": f"{DENSE} --total-timesteps 4000 --learning-starts 2400"
    " --diagnostics-interval 3600 --action-repeat 20 --batch-size 4",
}


def header(agent: Path) -> dict:
    """The PEP 723 block."""
    (block,) = re.findall(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", agent.read_text())
    return tomllib.loads("".join(line[2:] + "\n" for line in block.splitlines()))


def documented_metrics(agent: str) -> list[str]:
    """The metrics in the tables of an agent's page and of SAC's; * stands for anything."""
    names = []
    for page in (agent, "sac_simba_sparse"):
        for cell in re.findall(
            r"^\| (`[^|]+`) \|", (ROOT / "docs" / f"{page}.md").read_text(), re.M
        ):
            full, *endings = re.findall(r"`([^`]+)`", cell)
            names += [
                full,
                *(full.rsplit("_", 1)[0] + ending for ending in endings if ending.startswith("_")),
            ]
            names += [ending for ending in endings if not ending.startswith("_")]
    return [name if "/" in name else f"diagnostics/*_{name}" for name in names]


@BY_AGENT
def test_runs_alone_in_an_empty_folder(agent, tmp_path):
    shutil.copy(agent, tmp_path)
    flags = [*TINY.split(), *OWN[agent.stem].split()]
    succeed(Process(tmp_path / agent.name, *flags, folder=tmp_path).finish())
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {agent.name, "runs"}
    run_dir = only_run(tmp_path / "runs")
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    returns = [
        (int(row["env_step"]), row["metric"])
        for row in rows
        if row["metric"].endswith("/return_mean")
    ]
    total = int(re.search(r"--total-timesteps (\d+)", OWN[agent.stem])[1])
    assert returns == [(0, "eval/return_mean"), (total, "final/return_mean")]
    logged, documented = {row["metric"] for row in rows}, documented_metrics(agent.stem)
    assert {name.split("/")[0] for name in logged} == {
        "eval",
        "final",
        "episode",
        "losses",
        "time",
        "diagnostics",
    }
    assert not [
        name for name in logged if not any(fnmatch.fnmatchcase(name, known) for known in documented)
    ]
    assert json.loads((run_dir / "args.json").read_text())["args"]["sparsity"] == 0.8
    assert load_checkpoint(run_dir)["args"]["total_timesteps"] == total
    assert imageio.imread(run_dir / "learning_curve.png").std() > 1


def test_a_process_finds_no_other_file_of_ours(tmp_path):
    """Else the test above would show nothing."""
    for module in ("sac_simba_sparse", "runs", "timing"):
        program = tmp_path / "program.py"
        program.write_text(f"import {module}\n")
        code, _, error = Process(program, folder=tmp_path).finish()
        assert code == 1 and f"No module named '{module}'" in error


@BY_AGENT
def test_header_agrees_with_the_requirements(agent):
    pins = header(agent)["dependencies"]
    assert len(pins) > 5 and all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", pin) for pin in pins)
    assert set(pins) <= set((ROOT / "requirements.txt").read_text().split())


@BY_AGENT
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
def test_uv_installs_what_the_header_names(agent, tmp_path):
    assert "--sparsity" in succeed(call("uv", "run", "--script", agent, "--help", cwd=tmp_path))
