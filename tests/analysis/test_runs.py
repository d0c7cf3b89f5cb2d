"""runs.py: what is finished, one line for what is damaged, flags as the agents have them."""

import gzip
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import runs
import ddpg_simba_sparse as ddpg
import der_impala_sparse as der
import drqv2_sparse as drq
import pytest
import sac_simba_sparse as sac
from conftest import call, check_error, contents, succeed

SCRIPT = Path(runs.__file__)
HEADER = "env_step,agent_step,update_step,metric,value\n"
FINISHED = HEADER + "0,0,0,eval/return_mean,1.5\n1000,500,9,final/return_mean,2.5\n"


def write_run(folder: Path, metrics: str | None = FINISHED, args: str | None = None, **flags):
    folder.mkdir(parents=True)
    own = vars(sac.Args()) | {"env_id": "dm_control/dog-run-v0", "total_timesteps": 1000} | flags
    text = json.dumps({"args": own}) if args is None else args
    (folder / "args.json").write_text(text, errors="surrogateescape")
    if metrics is not None:
        (folder / "metrics.csv").write_text(metrics)
    return folder


DAMAGED = {
    "no args.json": ({"args": ""}, "args.json: No such file or directory"),
    "cut off": ({"args": '{"args": '}, "args.json is damaged (JSONDecodeError)"),
    "a list": ({"args": "[]"}, "args.json is damaged (TypeError)"),
    "no flags": ({"args": "{}"}, "args.json is damaged (KeyError)"),
    "null": ({"args": '{"args": null}'}, "args.json is damaged (TypeError)"),
    "null flags": (
        {"seed": None, "sparsity": None},
        "args.json: seed, sparsity missing or unusable",
    ),
    "words for numbers": (
        {"actor_sparsity": "much"},
        "args.json: actor_sparsity missing or unusable",
    ),
    "no metrics.csv": ({"metrics": None}, "metrics.csv: No such file or directory"),
    "empty": ({"metrics": ""}, "metrics.csv is damaged or empty (EmptyDataError)"),
    "other columns": ({"metrics": "a,b\n1,2\n"}, "metrics.csv is damaged or empty (ValueError)"),
    "no number": (
        {"metrics": f"{HEADER}0,0,0,eval/return_mean,high\n"},
        "metrics.csv is damaged or empty (ValueError)",
    ),
    "nested": ({"args": "[" * 100_000}, "args.json is damaged (RecursionError)"),
    "not UTF-8": ({"args": "\udcff"}, "args.json is damaged (UnicodeDecodeError)"),
    "true": ({"seed": True}, "args.json: seed missing or unusable"),
    "NaN": ({"width_scale": math.nan}, "args.json: width_scale missing or unusable"),
    "a line break in a name": ({"exp_name": "a\nb"}, "args.json: exp_name missing or unusable"),
    "twice": (
        {"metrics": FINISHED + FINISHED.splitlines()[-1] + "\n"},
        "metrics.csv has some measurements twice",
    ),
    "too large": ({"seed": 10**400}, "args.json: seed missing or unusable"),
    "a list for a name": ({"env_id": ["a"]}, "args.json: env_id missing or unusable"),
    "a return that is not finite": (
        {"metrics": FINISHED.replace("2.5", "nan")},
        "its final return is not finite",
    ),
    "cut off inside the last number": (
        {"metrics": FINISHED[:-2]},
        "unfinished, at env step 0 of 1,000",
    ),
    "half a line": (
        {"metrics": f"{HEADER}0,0\n"},
        "metrics.csv is damaged or empty (ValueError)",
    ),
    "env step of 10^30": (
        {"metrics": FINISHED.replace("1000", "1e30")},
        "metrics.csv is damaged or empty (ValueError)",
    ),
    "zeros": ({"metrics": "\0" * 99}, "metrics.csv is damaged or empty (EmptyDataError)"),
    "no rows": ({"metrics": HEADER}, "unfinished, at env step 0 of 1,000"),
    "unfinished": (
        {"metrics": f"{HEADER}500,0,0,eval/return_mean,1.5\n60"},
        "unfinished, at env step 500 of 1,000",
    ),
    "too few flags": (
        {"args": '{"args": {"seed": 7}}'},
        "args.json: depth_scale, env_id, exp_name, sparsity, total_timesteps, width_scale"
        " missing or unusable",
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


def test_a_link_to_a_run_that_was_deleted_is_named(tmp_path):
    (tmp_path / "gone").symlink_to(tmp_path / "deleted")
    found, (line,) = runs.load_runs(tmp_path)
    assert found == [] and line.startswith("gone: ")


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
            flags = vars(module.Args(checkpoint_interval=interval, seed=interval))
            flags["total_timesteps"] = 1000
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


def test_line_ends_of_windows(tmp_path):
    write_run(tmp_path / "a", FINISHED.replace("\n", "\r\n"))
    (run,), _ = runs.load_runs(tmp_path)
    assert run.state == "finished" and run.final_return == 2.5


@pytest.mark.parametrize(
    "tool", ["scaling", "plasticity", "streaming", "atari_scores", "topologies"]
)
def test_all_scripts_say_the_same(tmp_path, tool):
    for name, (how, _) in DAMAGED.items():
        write_run(tmp_path / "runs" / name, **how)
    ended = call(sys.executable, SCRIPT.with_name(f"{tool}.py"), cwd=tmp_path)
    check_error(ended)
    assert "left out: a list: args.json is damaged (TypeError)" in ended[1]
    assert "left out: run.old1: moved aside by --no-resume" in ended[1]


RETURNS = ["run", "env_step", "metric", "value"]
FLAGS = {
    "scaling": ["--figure all", "--output ''", "--runs-dir ''", "--earlier {table}", "--nope"],
    "plasticity": ["--variants 1", "--metrics nothing", "--earlier {folder}", "--earlier {cut}"],
    "learning_curves": ["--earlier {table}", "--earlier {binary}", "--earlier nowhere"],
    "streaming": ["--bin 0", "--bin 1e3", "--bin ''", f"--bin {10**30}", "--figures", "--bin nan"],
    "atari_scores": ["--samples 0", f"--samples {10**30}", "--baseline-width nan"],
    "simplicity_bias": [
        "--width-scale 0",
        "--threads -1",
        "--reach nan",
        "--grid 1",
        "--sparsities 0 1",
        "--sparsities",
        f"--depth-scale {10**30}",
    ],
    "gradient_interference": ["", "{folder}", "{table} --samples 1", "{folder} --seed -1"],
    "tables": ["--table 6", "--table 2"],
    "plan": ["status", "draw"],
    "runs": ["nowhere", "''", "a b"],
}


@pytest.mark.parametrize("tool,flags", [(tool, flags) for tool in FLAGS for flags in FLAGS[tool]])
def test_bad_flags_and_files_are_one_line(main, tmp_path, tool, flags):
    (tmp_path / "folder").mkdir()
    (tmp_path / "table").write_text(",".join(RETURNS) + "\na,1,eval/return_mean,high\n")
    (tmp_path / "binary").write_bytes(b"\x1f\x8b\xff\n")
    (tmp_path / "cut").write_bytes(gzip.compress(b"run,value\n" * 99)[:-9])
    write_run(tmp_path / "runs" / "a")
    before = contents(tmp_path)
    words = shlex.split(flags.format(**{name: name for name in before if "/" not in name}))
    check_error(main(SCRIPT.with_name(f"{tool}.py"), *words))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["nope", "--help", "--tau nan", "--eval-interval 0", "--seed 2"])
def test_flags_of_commands_that_no_run_can_have(main, text):
    command = f"python sparse_zoo/sac_simba_sparse.py --seed 1 {text}\n"
    check_error(main(SCRIPT.with_name("plan.py"), "status", stdin=2 * command))


@pytest.fixture
def full(tmp_path):
    """A folder on a disk of its own that is full."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root, to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_earlier_results(main, tmp_path, full):
    write_run(tmp_path / "runs" / "a")
    out = full / "out"
    out.mkdir()
    (out / "returns.csv.gz").write_text("earlier")
    before = contents(full)
    tool = SCRIPT.with_name("learning_curves.py")
    check_error(main(tool, "--output", out), "No space left")
    assert contents(full) == before


def listen_to_ctrl_c() -> None:
    """What a shell starts in the background ignores it, and so do all processes from there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("early", [True, False])
def test_an_interruption_is_one_line(tmp_path, early, stop):
    """While packages load, and later, when it waits for commands."""
    command = [sys.executable, str(SCRIPT.with_name("plan.py")), "status"]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, preexec_fn=listen_to_ctrl_c, **pipes)
    asleep = 0
    while "pandas" not in Path(f"/proc/{process.pid}/maps").read_text() or (
        not early and asleep < 20
    ):
        assert process.poll() is None
        time.sleep(0.05)
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        asleep = asleep + 1 if state == "S" else 0
    process.send_signal(stop)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.startswith("interrupted; ") and err.count("\n") == 1


def test_the_folder_of_runs_may_be_at_home(tmp_path, monkeypatch):
    write_run(tmp_path / "mine" / "a")
    monkeypatch.setenv("HOME", str(tmp_path))
    found, left_out = runs.load_runs("~/mine")
    assert [run.name for run in found] == ["a"] and left_out == []


def test_standard_output_that_cannot_be_written(tmp_path):
    write_run(tmp_path / "a")
    with open("/dev/full", "w") as nowhere:
        pipes = {"stdout": nowhere, "stderr": subprocess.PIPE, "text": True}
        done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], **pipes)
    check_error((done.returncode, "", done.stderr), "No space left")


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz"])
def test_a_table_of_an_earlier_call_that_is_cut_off_within_a_number(tmp_path, capsys, name):
    opened = gzip.open if name.endswith("gz") else open
    path = tmp_path / name
    with opened(path, "wb") as file:
        file.write(b"run,value\na,263.6\n")
    assert runs.read_table(path, ["run", "value"], "--earlier").value.item() == 263.6
    with opened(path, "wb") as file:
        file.write(b"run,value\na,2")
    with pytest.raises(SystemExit, match="2"):
        runs.read_table(path, ["run", "value"], "--earlier")
    check_error((2, *capsys.readouterr()), "--earlier", name, "cut off")
