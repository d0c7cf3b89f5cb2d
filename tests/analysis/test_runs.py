"""runs.py: what is finished, one line for what is damaged, flags as the agents have them."""

import json
import sys
from pathlib import Path

import ddpg_simba_sparse as ddpg
import der_impala_sparse as der
import drqv2_sparse as drq
import pytest
import runs
import sac_simba_sparse as sac
from conftest import call, check_error, succeed

SCRIPT = Path(runs.__file__)
HEADER = "env_step,agent_step,update_step,metric,value\n"
FINISHED = HEADER + "0,0,0,eval/return_mean,1.5\n1000,500,9,final/return_mean,2.5\n"


def write_run(folder: Path, metrics: str | None = FINISHED, args: str | None = None, **flags):
    folder.mkdir(parents=True)
    own = vars(sac.Args()) | {"env_id": "dm_control/dog-run-v0", "total_timesteps": 1000} | flags
    (folder / "args.json").write_text(json.dumps({"args": own}) if args is None else args)
    if metrics is not None:
        (folder / "metrics.csv").write_text(metrics)
    return folder


DAMAGED = {
    "no args.json": ({"args": ""}, "args.json: No such file or directory"),
    "cut off": ({"args": '{"args": '}, "args.json is damaged (JSONDecodeError)"),
    "a list": ({"args": "[]"}, "args.json is damaged (TypeError)"),
    "no flags": ({"args": "{}"}, "args.json is damaged (KeyError)"),
    "null": ({"args": '{"args": null}'}, "args.json is damaged (TypeError)"),
    "null flags": ({"seed": None, "sparsity": None}, "args.json has no seed, sparsity"),
    "words for numbers": ({"actor_sparsity": "much"}, "args.json has no actor_sparsity"),
    "no metrics.csv": ({"metrics": None}, "metrics.csv: No such file or directory"),
    "empty": ({"metrics": ""}, "metrics.csv is damaged or empty (EmptyDataError)"),
    "other columns": ({"metrics": "a,b\n1,2\n"}, "metrics.csv is damaged or empty (ValueError)"),
    "no number": (
        {"metrics": f"{HEADER}0,0,0,eval/return_mean,high\n"},
        "metrics.csv is damaged or empty (ValueError)",
    ),
    "no rows": ({"metrics": HEADER}, "unfinished, at env step 0 of 1,000"),
    "unfinished": (
        {"metrics": f"{HEADER}500,0,0,eval/return_mean,1.5\n60"},
        "unfinished, at env step 500 of 1,000",
    ),
    "too few flags": (
        {"args": '{"args": {"seed": 7}}'},
        "args.json has no depth_scale, env_id, exp_name, sparsity, total_timesteps, width_scale",
    ),
    "run.old1": ({}, "moved aside by --no-resume"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_wrong_with_a_run_is_one_line(tmp_path, name):
    how, reason = DAMAGED[name]
    folder = write_run(tmp_path / name, **how)
    if name == "no args.json":
        (folder / "args.json").unlink()
    write_run(tmp_path / "whole")
    found, left_out = runs.load_runs(tmp_path)
    assert [run.name for run in found] == ["whole"] and left_out == [f"{name}: {reason}"]


def test_finished_is_a_run_with_a_final_return(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "checkpoint.tmp").touch()  # left by a run that was ended while it wrote the last one
    (run,), _ = runs.load_runs(tmp_path)
    assert run.state == "finished" and run.final_return == 2.5
    assert run.metrics.env_step.tolist() == [0, 1000]
    write_run(tmp_path / "logs")  # of benchmark.sh
    assert len(runs.load_runs(tmp_path)[0]) == 1


def test_flags_that_change_results_are_the_agents(tmp_path):
    """checkpoint_interval changes what DrQ-v2 and DER compute, and nothing of SAC."""
    for module in (sac, ddpg, drq, der):
        assert runs.execution_flags(module.__name__) == module.EXECUTION_FLAGS
    assert runs.execution_flags("my_fork") <= sac.EXECUTION_FLAGS & der.EXECUTION_FLAGS
    for name, module in (("sac", sac), ("drq", drq)):
        for interval in (100, 200):
            flags = vars(module.Args()) | {"checkpoint_interval": interval, "seed": interval}
            write_run(tmp_path / name / str(interval), **flags)
    runs.fail_if_mixed(runs.load_runs(tmp_path / "sac")[0], [])
    with pytest.raises(SystemExit) as end:
        runs.fail_if_mixed(runs.load_runs(tmp_path / "drq")[0], [])
    assert end.value.code == 2


def test_index(tmp_path):
    write_run(tmp_path / "a", width_scale=0.5, critic_sparsity=0.9)
    write_run(tmp_path / "b", f"{HEADER}400,0,0,eval/return_mean,7.0\n", seed=2)
    write_run(tmp_path / "c", args="[]")
    out = succeed(call(sys.executable, SCRIPT, tmp_path))
    _, first, second, damaged = (" ".join(line.split()) for line in out.splitlines())
    agent = "dm_control/dog-run-v0 sac_simba_sparse"
    assert first == f"{agent} 0.5 0/0.9 1 1,000 2.5 finished"
    assert second == f"{agent} 1 0 2 400 7.0 at env step 400 of 1,000"
    assert damaged == "left out: c: args.json is damaged (TypeError)"
    check_error(call(sys.executable, SCRIPT, "nowhere"), "error: no runs in nowhere\n")


@pytest.mark.parametrize("tool", ["scaling", "plasticity", "streaming", "atari_scores"])
def test_all_scripts_say_the_same(tmp_path, tool):
    for name, (how, _) in DAMAGED.items():
        write_run(tmp_path / "runs" / name, **how)
    ended = call(sys.executable, SCRIPT.with_name(f"{tool}.py"), cwd=tmp_path)
    check_error(ended)
    assert "left out: a list: args.json is damaged (TypeError)" in ended[1]
    assert "left out: run.old1: moved aside by --no-resume" in ended[1]
