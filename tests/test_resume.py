"""Kill -9 at random moments and the same command again equal the uninterrupted run; what a finished run answers."""

import contextlib
import csv
import gc
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio
import numpy as np
import pytest
import torch
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FOLDER = Path(__file__).parents[1] / "sparse_zoo"
SAC = FOLDER / "sac_simba_sparse.py"
TINY = "--width-scale 0.125 --sparsity 0.8 --threads 1 --device cpu"
REPLAY = "--batch-size 32 --updates-per-step 1"
CASES = {
    "cartpole": "--env-id dm_control/cartpole-swingup-v0 --action-repeat 8 --total-timesteps 6000"
    " --learning-starts 1000 --eval-interval 1000 --checkpoint-interval 1000 --diagnostics-interval 2000",
    # Episodes that terminate, a replay buffer that wraps, and resets before, between and after the kills
    "hopper": "--env-id Hopper-v5 --action-repeat 1 --total-timesteps 1200 --learning-starts 200 --eval-interval 200"
    " --checkpoint-interval 200 --diagnostics-interval 400 --buffer-size 500 --reset-interval 300",
    "drqv2": "--env-id dm_control/cartpole-balance-v0 --action-repeat 40 --total-timesteps 6000 --learning-starts 1000"
    " --eval-interval 1000 --checkpoint-interval 1000 --diagnostics-interval 2000 --buffer-size 100 --batch-size 4",
    # A game ends after some 3,000 env steps
    "der": "--env-id ALE/Pong-v5 --action-repeat 32 --total-timesteps 19200 --learning-starts 1600 --eval-interval 3200"
    " --checkpoint-interval 2400 --diagnostics-interval 1600 --buffer-size 150 --batch-size 4 --target-interval 50",
    "stream": "--env-id Hopper-v5 --total-timesteps 6000 --learning-starts 300 --eval-interval 1000"
    " --checkpoint-interval 1000 --diagnostics-interval 2000",
}
CASES["ddpg"] = CASES["hopper"]
AGENTS = {  # the others: SAC
    "ddpg": FOLDER / "ddpg_simba_sparse.py",
    "drqv2": FOLDER / "drqv2_sparse.py",
    "der": FOLDER / "der_impala_sparse.py",
    "stream": FOLDER / "stream_ac_sparse.py",
}
CHECKPOINTS = 6  # about, in each case
ENVIRONMENT = {**os.environ, "MUJOCO_GL": "disabled", "WANDB_MODE": "offline"}


def flags(case: str, runs: Path, *more: str) -> list[str]:
    evaluation = "--eval-episodes 1 --final-eval-episodes 2"
    replay = "" if case in ("drqv2", "der", "stream") else REPLAY
    return [*f"{TINY} {replay} {CASES[case]} {evaluation}".split(), "--runs-dir", str(runs), *more]


def start(arguments: list[str], agent: Path = SAC, **environment: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    environment = {
        **ENVIRONMENT,
        **({"MUJOCO_GL": "egl"} if agent == AGENTS["drqv2"] else {}),
        **environment,
    }
    return subprocess.Popen([sys.executable, str(agent), *arguments], env=environment, **pipes)


def finish(arguments: list[str], agent: Path = SAC, **environment: str) -> str:
    process = start(arguments, agent, **environment)
    output, _ = process.communicate()
    assert process.returncode == 0
    return output


@pytest.fixture
def main(monkeypatch, capsys):
    """Runs the agent's command line in this process, which saves its start: exit code, stdout, stderr."""
    monkeypatch.setenv("MUJOCO_GL", "disabled")

    def run(arguments: list[str]) -> tuple[int | None, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SAC), *arguments])
        handler, threads, code = signal.getsignal(signal.SIGINT), torch.get_num_threads(), 0
        try:
            runpy.run_path(str(SAC), run_name="__main__")
        except SystemExit as end:
            code = end.code
        finally:
            signal.signal(signal.SIGINT, handler)
            torch.set_num_threads(threads)
            for lock in [item for item in gc.get_objects() if type(item) is FileLock]:
                lock.release(force=True)  # as the end of a process does
        return code, *capsys.readouterr()

    return run


def only_run(runs: Path) -> Path:
    (run_dir,) = runs.iterdir()
    return run_dir


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def metric_rows(run_dir: Path) -> list[list[str]]:
    with open(run_dir / "metrics.csv", newline="") as file:
        return [row for row in csv.reader(file) if not row[3].startswith("time/")]


def leaves(node, path: str = "") -> dict:
    """A checkpoint without its nesting: path -> tensor or plain value."""
    if not isinstance(node, (dict, list, tuple)):
        return {path: node}
    children = node.items() if isinstance(node, dict) else enumerate(node)
    return {
        name: leaf
        for key, child in children
        for name, leaf in leaves(child, f"{path}/{key}").items()
    }


def load(run_dir: Path) -> dict:
    state = leaves(torch.load(run_dir / "checkpoint.pt", weights_only=True))
    del (
        state["/args/runs_dir"],
        state["/counters/3"],
    )  # the length of metrics.csv, in which speeds vary
    return state


@pytest.fixture(scope="module")
def reference(request, tmp_path_factory) -> tuple[str, Path, float]:
    """An uninterrupted run: its case, its folder of runs, and the seconds between two checkpoints."""
    runs = tmp_path_factory.mktemp(request.param)
    began = time.monotonic()
    finish(flags(request.param, runs), AGENTS.get(request.param, SAC))
    return request.param, runs, (time.monotonic() - began) / CHECKPOINTS


cartpole = pytest.mark.parametrize("reference", ["cartpole"], indirect=True)


def stamps(runs: Path) -> set[int]:
    with contextlib.suppress(FileNotFoundError):  # between the two renames of a checkpoint
        return {path.stat().st_mtime_ns for path in runs.glob("*/checkpoint.pt")}
    return set()


def kill_past_a_checkpoint(arguments: list[str], agent: Path, runs: Path, delay: float) -> None:
    """Kills the run `delay` seconds after its first new checkpoint, and at its second one at the latest."""
    old, new, moment = stamps(runs), set(), math.inf
    process = start(arguments, agent)
    while len(new) < 2 and time.monotonic() < moment:
        assert process.poll() is None, "the run ended before it could be killed"
        new |= stamps(runs) - old
        if new:
            moment = min(moment, time.monotonic() + delay)
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("reference", CASES, indirect=True)
def test_killed_and_resumed_equals_uninterrupted(reference, tmp_path):
    case, reference_runs, seconds = reference
    arguments, agent = flags(case, tmp_path), AGENTS.get(case, SAC)
    delays = [random.SystemRandom().uniform(0, seconds) for _ in range(2)]
    print(f"{case}: killed {delays[0]:.3f} s and {delays[1]:.3f} s after a checkpoint")
    for delay in delays:
        kill_past_a_checkpoint(arguments, agent, tmp_path, delay)
    resumed, expected = only_run(tmp_path), only_run(reference_runs)
    # The kill that chance is too unlikely to find: between the two renames of a checkpoint, while the next is torn
    (resumed / "checkpoint.pt").replace(resumed / "checkpoint.previous.pt")
    (resumed / "checkpoint.tmp").write_bytes(b"torn")
    output = finish(arguments, agent)

    interval = int(re.search(r"--checkpoint-interval (\d+)", CASES[case])[1])
    assert int(re.search(r"going on from env step (\d+)", output)[1]) >= 2 * interval
    rows = metric_rows(expected)
    assert len(rows) > 80 and sum(row[3] == "eval/return_mean" for row in rows) == CHECKPOINTS + 1
    assert metric_rows(resumed) == rows
    tensorboard = EventAccumulator(str(resumed), size_guidance={"scalars": 0}).Reload()
    loss = {"stream": "losses/absolute_td_error", "der": "losses/loss"}.get(
        case, "losses/critic_loss"
    )
    for name in ("episode/return", "eval/return_mean", loss):
        points = [
            (event.step, pytest.approx(event.value, rel=1e-6))
            for event in tensorboard.Scalars(name)
        ]
        assert [(int(row[0]), float(row[4])) for row in rows if row[3] == name] == points
    ours, theirs = load(resumed), load(expected)
    assert ours.keys() == theirs.keys()
    sac = {
        "actor",
        "critic",
        "generators",
        "actor_optimizer",
        "critic_optimizer",
        "target_critic",
        "replay",
    }
    parts = {
        "stream": {"actor", "critic", "generators", "recent", "norm"},
        "drqv2": sac | {"encoder", "encoder_optimizer"},
        "der": {"network", "target_network", "optimizer", "replay", "generators"},
        "ddpg": sac | {"norm"},
    }.get(case, sac | {"norm", "temperature", "temperature_optimizer"})
    assert parts <= {name.split("/")[1] for name in ours}
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name
        else:
            assert ours[name] == value, name


@pytest.mark.parametrize("reference", ["hopper"], indirect=True)
def test_reset_leaves_the_trained_agent_at_the_end(reference):
    _, runs, _ = reference
    state = torch.load(only_run(runs) / "checkpoint.pt", weights_only=True)
    step, updates = state["counters"][0], state["counters"][1]
    # Resets at 300, 600 and 900 of 1,200 steps: the optimiser has counted the updates since the last one.
    assert step == 1200 and updates == 1001
    assert state["critic_optimizer"]["state"][0]["step"] == 300


@cartpole
def test_finished_run_is_not_run_again(reference, main):
    case, runs, _ = reference
    before = contents(runs)
    code, out, _ = main(flags(case, runs))
    assert code == 0 and "finished" in out and str(only_run(runs)) in out
    assert contents(runs) == before


@cartpole
def test_finished_run_is_not_run_again_after_its_checkpoints_were_deleted(
    reference, main, tmp_path
):
    case, runs, _ = reference
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("*/checkpoint*"):
        path.unlink()
    before = contents(tmp_path)
    code, out, _ = main(flags(case, tmp_path))
    assert code == 0 and "finished" in out and str(only_run(tmp_path)) in out
    code, _, err = main(flags(case, tmp_path, "--eval-only"))
    assert code == 2 and "nothing to evaluate" in err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("reference", ["cartpole", "ddpg", "stream"], indirect=True)
def test_kill_in_the_last_evaluation_costs_no_training(reference, tmp_path):
    case, runs, _ = reference
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    run_dir = only_run(tmp_path)
    (run_dir / "checkpoint.previous.pt").replace(
        run_dir / "checkpoint.pt"
    )  # what such a kill leaves
    output = finish(flags(case, tmp_path), AGENTS.get(case, SAC))
    assert f"going on from env step {load(run_dir)['/args/total_timesteps']}\n" in output
    assert metric_rows(run_dir) == metric_rows(only_run(runs))


@cartpole
def test_no_resume_moves_the_old_run_aside_and_repeats_it(reference, main, tmp_path):
    case, runs, _ = reference
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    run_dir, before = only_run(tmp_path), contents(only_run(tmp_path))
    code, out, _ = main(flags(case, tmp_path, "--no-resume"))
    (old,) = (path for path in tmp_path.iterdir() if path != run_dir)
    assert code == 0 and str(old) in out
    assert contents(old) | {".lock": b""} == before
    assert metric_rows(run_dir) == metric_rows(old)


@cartpole
def test_eval_only_repeats_the_final_evaluation_and_changes_no_file(reference, main):
    case, runs, _ = reference
    before = contents(runs)
    code, out, _ = main(flags(case, runs, "--eval-only"))
    assert code == 0
    assert contents(runs) == before
    final = {
        row[3]: float(row[4]) for row in metric_rows(only_run(runs)) if row[3].startswith("final/")
    }
    for name in ("mean", "std", "iqm"):
        printed = float(re.search(rf"{name}\W+(-?[\d.]+)", out)[1])
        assert printed == pytest.approx(final[f"final/return_{name}"], abs=0.051)
    assert final["final/return_mean"] > 0


@cartpole
def test_eval_only_films_one_episode(reference, tmp_path):
    case, runs, _ = reference
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path)
    finish(flags(case, tmp_path, "--eval-only", "--capture-video"), MUJOCO_GL="egl")
    after = contents(tmp_path)
    (video,) = after.keys() - before.keys()
    assert video.endswith(".mp4") and before.items() <= after.items()
    frames = imageio.mimread(tmp_path / video, memtest=False)
    assert len(frames) == 125
    assert np.abs(frames[0].astype(int) - frames[-1]).max() > 50


def test_second_process_on_a_run_may_evaluate_but_not_train(main, tmp_path):
    arguments = flags("cartpole", tmp_path)
    first = start(arguments)
    try:
        while not list(tmp_path.glob("*/args.json")):
            assert first.poll() is None
            time.sleep(0.01)
        code, _, err = main(arguments)
        while not list(tmp_path.glob("*/checkpoint.pt")):
            assert first.poll() is None
            time.sleep(0.01)
        evaluated, out, _ = main([*arguments, "--eval-only"])
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: another process")
    assert str(only_run(tmp_path)) in err
    assert evaluated == 0 and "return_mean" in out


def test_track_offline(tmp_path):
    finish(
        flags("hopper", tmp_path, "--total-timesteps", "200", "--learning-starts", "100", "--track")
    )
    (record,) = only_run(tmp_path).rglob("*.wandb")
    logged, rows = record.read_bytes(), metric_rows(only_run(tmp_path))
    names = {row[3] for row in rows[1:]}
    assert {"eval/return_mean", "final/return_mean", "losses/critic_loss"} <= names
    assert all(name.encode() in logged for name in names)
