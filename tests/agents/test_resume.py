"""Kill -9 at random moments and the same command again equal the uninterrupted run.

And what a finished run answers.
"""

import contextlib
import math
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import imageio
import numpy as np
import pytest
import torch
from conftest import (
    AGENTS,
    Process,
    check_error,
    contents,
    load_checkpoint,
    metric_values,
    only_run,
    read_metrics,
    succeed,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

FILES = {
    "cartpole": "sac_simba_sparse",
    "hopper": "sac_simba_sparse",
    "rigl": "sac_simba_dynamic",
    "ddpg": "ddpg_simba_sparse",
    "drqv2": "drqv2_sparse",
    "der": "der_impala_sparse",
    "stream": "stream_ac_sparse",
}
TINY = "--width-scale 0.125 --sparsity 0.8 --threads 1 --device cpu"
TINY += " --eval-episodes 1 --final-eval-episodes 2"
REPLAY = "--batch-size 32 --updates-per-step 1"
# Episodes that terminate, a replay that wraps, and resets before, between and after the kills
HOPPER = f"{REPLAY} --env-id Hopper-v5 --action-repeat 1 --total-timesteps 600"
HOPPER += " --learning-starts 100 --eval-interval 100 --checkpoint-interval 100"
HOPPER += " --diagnostics-interval 200 --buffer-size 250 --reset-interval 150"
CASES = {
    "cartpole": f"{REPLAY} --env-id dm_control/cartpole-swingup-v0 --action-repeat 20"
    " --total-timesteps 6000 --learning-starts 1000 --eval-interval 1000"
    " --checkpoint-interval 1000 --diagnostics-interval 2000",
    "hopper": HOPPER,
    "rigl": f"{HOPPER} --topology rigl --topology-interval 20",
    "ddpg": HOPPER,
    "drqv2": "--env-id dm_control/cartpole-balance-v0 --action-repeat 50 --total-timesteps 3000"
    " --learning-starts 500 --eval-interval 500 --checkpoint-interval 500"
    " --diagnostics-interval 1000 --buffer-size 40 --batch-size 2 --max-episode-steps 500",
    "der": "--env-id ALE/Pong-v5 --action-repeat 40 --total-timesteps 9600 --learning-starts 800"
    " --eval-interval 1600 --checkpoint-interval 1200 --diagnostics-interval 1600"
    " --buffer-size 60 --batch-size 2 --target-interval 25 --max-episode-steps 1600",
    "stream": "--env-id Hopper-v5 --total-timesteps 6000 --learning-starts 300"
    " --eval-interval 1000 --checkpoint-interval 1000 --diagnostics-interval 2000",
}
CHECKPOINTS = 6  # about, in each case


def by_case(*names: str, slow: str = "") -> pytest.MarkDecorator:
    """A test of these cases, and with `-m slow` of those: the files share most of the code."""
    params = [*names, *(pytest.param(name, marks=pytest.mark.slow) for name in slow.split())]
    return pytest.mark.parametrize("reference", params, indirect=True)


def agent_of(case: str) -> Path:
    return AGENTS / f"{FILES[case]}.py"


def command(case: str, runs: Path, *more: str) -> list:
    return [agent_of(case), *f"{TINY} {CASES[case]}".split(), "--runs-dir", runs, *more]


def start(case: str, runs: Path, *more: str, **environment: str) -> Process:
    environment = {"MUJOCO_GL": "egl" if case == "drqv2" else "disabled"} | environment
    return Process(*command(case, runs, *more), **environment)


def finish(case: str, runs: Path, *more: str, **environment: str) -> str:
    return succeed(start(case, runs, *more, **environment).finish())


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
    state = leaves(load_checkpoint(run_dir))
    del state["/args/runs_dir"]
    del state["/counters/3"], state["/counters/4"]  # of metrics.csv, in which speeds vary
    return state


@pytest.fixture(scope="module")
def reference(request, tmp_path_factory) -> tuple[str, Path, float]:
    """An uninterrupted run: its case, its folder of runs, and the seconds between checkpoints."""
    runs = tmp_path_factory.mktemp(request.param)
    began = time.monotonic()
    finish(request.param, runs)
    return request.param, runs, (time.monotonic() - began) / CHECKPOINTS


cartpole = by_case("cartpole")


def stamps(runs: Path) -> set[int]:
    with contextlib.suppress(FileNotFoundError):  # between the two renames of a checkpoint
        return {path.stat().st_mtime_ns for path in runs.glob("*/checkpoint.pt")}
    return set()


def kill_past_a_checkpoint(case: str, runs: Path, delay: float) -> None:
    """Kills a run some time after its first new checkpoint, at its second one at the latest."""
    old, new, moment = stamps(runs), set(), math.inf
    process = start(case, runs)
    while len(new) < 2 and time.monotonic() < moment:
        assert process.running(), "the run ended before it could be killed"
        new |= stamps(runs) - old
        if new:
            moment = min(moment, time.monotonic() + delay)
        time.sleep(0.002)
    process.kill()


@by_case("cartpole", "hopper", "rigl", "drqv2", "der", "stream", slow="ddpg")
def test_killed_and_resumed_equals_uninterrupted(reference, tmp_path):
    case, reference_runs, seconds = reference
    delays = [random.SystemRandom().uniform(0, seconds) for _ in range(2)]
    print(f"{case}: killed {delays[0]:.3f} s and {delays[1]:.3f} s after a checkpoint")
    for delay in delays:
        kill_past_a_checkpoint(case, tmp_path, delay)
    resumed, expected = only_run(tmp_path), only_run(reference_runs)
    # The kill that chance is too unlikely to find: between the two renames of a checkpoint,
    # while the next is torn
    if (resumed / "checkpoint.pt").exists():  # else chance has found that kill
        (resumed / "checkpoint.pt").replace(resumed / "checkpoint.previous.pt")
    (resumed / "checkpoint.tmp").write_bytes(b"torn")
    output = finish(case, tmp_path)

    interval = int(re.search(r"--checkpoint-interval (\d+)", CASES[case])[1])
    assert int(re.search(r"going on from env step (\d+)", output)[1]) >= 2 * interval
    rows = read_metrics(expected)
    assert len(rows) > 80
    assert len(metric_values(rows, "eval/return_mean")) == CHECKPOINTS + 1
    assert read_metrics(resumed) == rows

    tensorboard = EventAccumulator(str(resumed), size_guidance={"scalars": 0}).Reload()
    losses = {"stream": "losses/absolute_td_error", "der": "losses/loss"}
    for name in ("episode/return", "eval/return_mean", losses.get(case, "losses/critic_loss")):
        points = [
            (event.step, pytest.approx(event.value, rel=1e-6))
            for event in tensorboard.Scalars(name)
        ]
        logged = [row for row in rows if row["metric"] == name]
        assert [(int(row["env_step"]), float(row["value"])) for row in logged] == points

    (table,) = tensorboard.Tensors("flags/text_summary")[-1].tensor_proto.string_val
    assert b"| width_scale | `0.125` |" in table
    metadata = tensorboard.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    hparams = HParamsPluginData.FromString(metadata).session_start_info.hparams
    assert hparams["sparsity"].number_value == 0.8

    ours, theirs = load(resumed), load(expected)
    assert ours.keys() == theirs.keys()
    if case == "der":  # all games are cut off by their time limit, which is no terminal
        assert not theirs["/replay/columns/2"].any()
    common = "actor critic generators"
    off_policy = f"{common} actor_optimizer critic_optimizer target_critic replay"
    parts = {
        "stream": f"{common} recent norm",
        "drqv2": f"{off_policy} encoder encoder_optimizer",
        "der": "network target_network optimizer replay generators",
        "ddpg": f"{off_policy} norm",
    }.get(case, f"{off_policy} norm temperature temperature_optimizer")
    assert set(parts.split()) <= {name.split("/")[1] for name in ours}
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name
        else:
            assert ours[name] == value, name


def fill(disk: Path, process: Process) -> None:
    """Fills a disk until the process ends."""
    with open(disk / "fill", "ab", buffering=0) as file:
        while process.running():
            with contextlib.suppress(OSError):
                file.write(bytes(4096))


@by_case("cartpole", "der", slow="ddpg drqv2 stream")
def test_a_full_disk_and_then_room(reference, tmp_path):
    case, reference_runs, _ = reference
    if subprocess.run(f"mount -t tmpfs -o size=300m tmpfs {tmp_path}", shell=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        process = start(case, tmp_path)
        while not stamps(tmp_path):
            assert process.running()
            time.sleep(0.01)
        fill(tmp_path, process)
        code, _, err = process.finish()
        (tmp_path / "fill").unlink()
        assert code == 2 and "Traceback" not in err, err
        (line,) = (line for line in err.splitlines() if "error: " in line)
        assert "No space left on device" in line
        finish(case, tmp_path)
        assert read_metrics(only_run(tmp_path)) == read_metrics(only_run(reference_runs))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


MOMENTS = ["first second", "any", "writing", "last evaluation"]


def kill_at(moment: str, case: str, runs: Path, seconds: float) -> bool:
    """Kills a run at such a moment; False if it has ended before."""
    total = re.search(r"--total-timesteps (\d+)", CASES[case])[1]
    last_eval = f"\n{total},".encode()
    process = start(case, runs)
    delay = {"first second": 1, "any": 3 * seconds, "writing": 0, "last evaluation": 0.2}[moment]
    delay *= random.SystemRandom().uniform(0, 1)
    while process.running():
        reached = True
        if moment == "writing":
            reached = any(runs.glob("*/checkpoint.tmp"))
        elif moment == "last evaluation":
            reached = any(last_eval in path.read_bytes() for path in runs.glob("*/metrics.csv"))
        if reached:
            time.sleep(delay)
            if process.running():
                process.kill()
                return True
        time.sleep(0.0005)
    succeed(process.finish())
    return False


@pytest.mark.slow
@by_case("cartpole", "ddpg", "drqv2", "der", "stream")
def test_twenty_kills(reference, tmp_path):
    """At each kind of moment; every run that is finished in between equals the reference."""
    case, reference_runs, seconds = reference
    expected = read_metrics(only_run(reference_runs))
    kills = dict.fromkeys(MOMENTS, 0)
    finished = 0
    runs = tmp_path / "0"
    while sum(kills.values()) < 20:
        moment = min(kills, key=kills.get)
        if kill_at(moment, case, runs, seconds):
            kills[moment] += 1
            continue
        assert read_metrics(only_run(runs)) == expected
        finished += 1
        runs = tmp_path / str(finished)
    finish(case, runs)
    assert read_metrics(only_run(runs)) == expected
    print(f"{case}: {kills}, {finished + 1} runs equal")


@by_case("hopper")
def test_reset_leaves_the_trained_agent_at_the_end(reference):
    _, runs, _ = reference
    state = load_checkpoint(only_run(runs))
    step, updates = state["counters"][0], state["counters"][1]
    # Resets at 150, 300 and 450 of 600 steps: the optimiser counts the updates since the last
    assert step == 600 and updates == 500
    assert state["critic_optimizer"]["state"][0]["step"] == 150


@cartpole
def test_finished_run_is_not_run_again(reference, main):
    case, runs, _ = reference
    before = contents(runs)
    out = succeed(main(*command(case, runs)))
    assert "finished" in out and str(only_run(runs)) in out
    assert contents(runs) == before


@pytest.fixture
def copy(reference, tmp_path) -> tuple[str, Path]:
    """The case and a copy of the uninterrupted run that may be changed."""
    case, runs, _ = reference
    shutil.copytree(runs, tmp_path / "copy")
    return case, tmp_path / "copy"


@cartpole
def test_finished_run_is_not_run_again_after_its_checkpoints_were_deleted(copy, main):
    case, runs = copy
    for path in runs.glob("*/checkpoint*"):
        path.unlink()
    before = contents(runs)
    out = succeed(main(*command(case, runs)))
    assert "finished" in out and str(only_run(runs)) in out
    check_error(main(*command(case, runs, "--eval-only")), "nothing to evaluate", "deleted")
    longer = main(*command(case, runs, "--total-timesteps", "7000"))
    check_error(longer, "finished at env step 6000", "no checkpoint", "--no-resume")
    assert contents(runs) == before


@by_case("cartpole", "stream", slow="ddpg")
def test_kill_in_the_last_evaluation_costs_no_training(reference, copy, main):
    case, runs = copy
    run_dir = only_run(runs)
    # What such a kill leaves
    (run_dir / "checkpoint.previous.pt").replace(run_dir / "checkpoint.pt")
    out = succeed(main(*command(case, runs)))
    assert f"going on from env step {load(run_dir)['/args/total_timesteps']}\n" in out
    assert read_metrics(run_dir) == read_metrics(only_run(reference[1]))


@cartpole
def test_no_resume_moves_the_old_run_aside_and_repeats_it(copy, main):
    case, runs = copy
    run_dir, before = only_run(runs), contents(only_run(runs))
    out = succeed(main(*command(case, runs, "--no-resume")))
    (old,) = (path for path in runs.iterdir() if path != run_dir)
    assert str(old) in out
    assert contents(old) == before
    assert read_metrics(run_dir) == read_metrics(old)


@cartpole
def test_eval_only_repeats_the_final_evaluation_and_changes_no_file(reference, main):
    case, runs, _ = reference
    before = contents(runs)
    out = succeed(main(*command(case, runs, "--eval-only")))
    assert contents(runs) == before
    rows = read_metrics(only_run(runs))
    for name in ("mean", "std", "iqm"):
        (final,) = metric_values(rows, f"final/return_{name}")
        printed = float(re.search(rf"{name}\W+(-?[\d.]+)", out)[1])
        assert printed == pytest.approx(final, abs=0.051)
    assert metric_values(rows, "final/return_mean")[0] > 0
    assert out.endswith("(2 episodes)\n")


@cartpole
def test_eval_only_films_one_episode(copy):
    case, runs = copy
    before = contents(runs)
    finish(case, runs, "--eval-only", "--capture-video", MUJOCO_GL="egl")
    after = contents(runs)
    (video,) = (name for name in after.keys() - before.keys() if after[name])  # and its folder
    assert video.endswith(".mp4") and before.items() <= after.items()
    frames = imageio.mimread(runs / video, memtest=False)
    assert len(frames) == 50
    assert np.abs(frames[0].astype(int) - frames[-1]).max() > 50


def test_second_process_on_a_run_may_evaluate_but_not_train(main, tmp_path):
    more = ("--total-timesteps", "600000")
    first = start("cartpole", tmp_path, *more)
    try:
        for file in ("args.json", "checkpoint.pt"):
            while not list(tmp_path.glob(f"*/{file}")):
                assert first.running()
                time.sleep(0.01)
            if file == "args.json":
                refused = main(*command("cartpole", tmp_path, *more))
        out = succeed(main(*command("cartpole", tmp_path, *more, "--eval-only")))
        assert first.running()
    finally:
        first.kill()
    check_error(refused, "process", "is working in", str(only_run(tmp_path)))
    assert "return_mean" in out


def test_track_offline(tmp_path):
    short = ("--total-timesteps", "200", "--learning-starts", "100", "--track", "--capture-video")
    finish("hopper", tmp_path, *short, WANDB_MODE="offline", MUJOCO_GL="egl")
    (record,) = only_run(tmp_path).rglob("*.wandb")
    logged = record.read_bytes()
    names = {row["metric"] for row in read_metrics(only_run(tmp_path))}
    assert {"eval/return_mean", "final/return_mean", "losses/critic_loss"} <= names
    assert all(name.encode() in logged for name in names)
    assert b"videos/final.mp4" in logged and b"sac_simba_sparse.py" in logged
    (film,) = only_run(tmp_path).glob("wandb/offline-run-*/files/videos/final.mp4")
    assert film.stat().st_size > 1000
