"""Bad input: exit code 2, one line that names what was wrong, and nothing created or lost."""

import gc
import hashlib
import importlib
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, Optional, get_args, get_type_hints

import numpy as np
import pytest
import sac_simba_sparse as sac
import torch
import tyro
from conftest import (
    AGENTS,
    Process,
    call,
    check_error,
    contents,
    load_checkpoint,
    only_run,
    read_metrics,
    rewrite_checkpoint,
    succeed,
    write_metrics,
)

SAC = AGENTS / "sac_simba_sparse.py"
STREAM = AGENTS / "stream_ac_sparse.py"
DER = AGENTS / "der_impala_sparse.py"
DDPG = AGENTS / "ddpg_simba_sparse.py"
FLAGS = (
    "--env-id dm_control/cartpole-swingup-v0 --width-scale 0.125 --sparsity 0.8 --device cpu"
    " --threads 1 --action-repeat 20 --total-timesteps 400 --learning-starts 200 --batch-size 8"
    " --eval-episodes 1 --final-eval-episodes 1"
)
TINY = FLAGS.split()


@pytest.fixture
def main(main):
    return lambda *arguments, agent=SAC: main(agent, *arguments)


@pytest.mark.parametrize(
    "agent,flag,value,rule",
    [
        ("sac_simba", "sparsity", 1.0, "0 <= sparsity < 1"),
        ("sac_simba", "sparsity", -0.1, "0 <= sparsity < 1"),
        ("sac_simba", "seed", 2**32, "0 <= seed < 2**32"),
        ("sac_simba", "width_scale", 0.001, "1/128 <= width_scale <= 1000"),
        ("sac_simba", "reset_interval", 0, "reset_interval >= 1"),
        ("sac_simba", "initial_temperature", 0.0, "0 < initial_temperature < inf"),
        ("sac_simba", "gamma", 2.0, "0 <= gamma <= 1"),
        ("ddpg_simba", "critic_sparsity", 1.0, "0 <= critic_sparsity < 1"),
        ("sac_simba", "buffer_size", 10**13, "buffer_size <= 10**12"),
        ("sac_simba", "threads", 10**13, "1 <= threads <= 10**4"),
        ("ddpg_simba", "updates_per_step", 0, "1 <= updates_per_step <= 10**6"),
        ("stream_ac", "trace_lambda", 2.0, "0 <= trace_lambda <= 1"),
        ("stream_ac", "actor_kappa", 0.0, "0 < actor_kappa < inf"),
        ("der_impala", "width_scale", 0.01, "1/16 <= width_scale <= 1000"),
        ("der_impala", "atoms", 1, "2 <= atoms <= 10**4"),
        ("der_impala", "sticky_actions", 1.0, "0 <= sticky_actions < 1"),
        ("der_impala", "buffer_size", 10, "buffer_size > n_step"),
        ("drqv2", "width_scale", 0.0, "1/1024 <= width_scale <= 1000"),
        ("drqv2", "buffer_size", 3, "buffer_size > n_step"),
        ("drqv2", "std_decay", 0, "std_decay >= 1"),
    ],
)
def test_a_rule_is_said_with_the_flag(agent, flag, value, rule, capsys):
    module = importlib.import_module(f"{agent}_sparse")
    with pytest.raises(SystemExit, match="2"):
        module.check_flags(module.Args(**{flag: value}))
    name = flag.replace("_", "-")
    assert capsys.readouterr().err == f"error: --{name} {value} is not allowed: {rule}\n"


@pytest.mark.parametrize(
    "flag,value,allowed",
    [
        ("width_scale", None, "float"),
        ("width_scale", "big", "float"),
        ("gamma", "0.9", "float or NoneType"),
        ("seed", 1.0, "int"),
        ("resume", 2, "bool"),
        ("env_id", 3, "str"),
        ("sparsity_distribution", "even", "erdos_renyi or uniform"),
    ],
)
def test_a_value_of_another_type(flag, value, allowed, capsys):
    """As from Python, or from an args.json that was edited."""
    with pytest.raises(SystemExit, match="2"):
        sac.check_flags(sac.Args(**{flag: value}))
    line = f"--{flag.replace('_', '-')} {value!r} is not allowed: it must be {allowed}\n"
    assert capsys.readouterr().err == f"error: {line}"


def test_flags_that_a_fork_adds():
    @dataclass
    class Fork(sac.Args):
        schedule: Literal["linear", "cosine"] | None = "cosine"
        clip: Optional[float] = 1  # noqa: UP045
        sizes: tuple[int, ...] | None = None

    sac.check_flags(Fork())
    sac.check_flags(Fork(schedule=None, clip=None, learning_rate=np.float64(1e-3)))
    for wrong in ({"sizes": (3, 4)}, {"sizes": Path("x")}, {"schedule": "step"}, {"clip": "much"}):
        with pytest.raises(SystemExit, match="2"):
            sac.check_flags(Fork(**wrong))


@pytest.mark.parametrize("agent", sorted(AGENTS.glob("*.py")), ids=lambda path: path.stem)
def test_every_number_has_a_rule(agent, capsys):
    """Nothing below zero, infinite or not a number is allowed anywhere."""
    module = importlib.import_module(agent.stem)
    module.check_flags(module.Args())
    refused = {int: [-1], float: [-1.0, math.inf, math.nan]}
    tried = 0
    for name, kind in get_type_hints(module.Args).items():
        for value in refused.get((get_args(kind) or (kind,))[0], []):
            with pytest.raises(SystemExit, match="2"):
                module.check_flags(module.Args(**{name: value}))
            check_error((2, *capsys.readouterr()), f"{value} is not allowed: ", name)
            tried += 1
    assert tried > 30


CARTPOLE = "--env-id CartPole-v1"
UNTRAINED = ("--eval-only", "nothing to evaluate train")
NO_FOLDER = ("--runs-dir file", "file --runs-dir")
BAD_FLAGS = {
    SAC: [
        ("--initial-temperature 0", "--initial-temperature 0.0"),
        ("--env-id Nope-v0", "--env-id Nope-v0"),
        ("--env-id dm_control/nope-v0", "--env-id dm_control/nope-v0"),
        ("--env-id nope:Nope-v0", "--env-id nope:Nope-v0"),
        ("--env-id a:b:c", "--env-id a:b:c"),
        # MUJOCO_GL=disabled
        ("--capture-video", "--env-id dm_control/cartpole-swingup-v0 MUJOCO_GL=disabled"),
        (CARTPOLE, f"{CARTPOLE} Discrete(2) Box"),
        NO_FOLDER,
        ("--runs-dir file/below", "file/below --runs-dir"),
        (
            "--width-scale 0.01 --sparsity 0.99 --sparsity-distribution erdos_renyi",
            "sparsity 0.99 out of reach",
        ),
        UNTRAINED,
        (f"--eval-only --runs-dir . --exp-name {'x' * 300}", "cannot use too long --runs-dir"),
    ],
    STREAM: [
        ("--exp-name a/b", "--exp-name a/b /"),
        (CARTPOLE, f"{CARTPOLE} Discrete(2) Box"),
        ("--env-id Nope-v0", "--env-id Nope-v0"),
        NO_FOLDER,
        ("--width-scale 0.0625 --init lecun --sparsity 0.99", "sparsity 0.99 out of reach"),
        UNTRAINED,
    ],
    DER: [
        ("--env-id Hopper-v5", "--env-id Hopper-v5 Atari ALE/Pong-v5"),
        ("--env-id ALE/Nope-v5", "--env-id ALE/Nope-v5"),
        ("--env-id ALE/Backgammon-v5", "--env-id ALE/Backgammon-v5 NOOP"),
        ('--env-kwargs {"difficult":1}', "'difficult' --env-kwargs"),
        ('--env-kwargs {"mode":99}', "Invalid --env-kwargs"),
        ('--env-kwargs {"continuous":true}', "Discrete actions Box"),
        NO_FOLDER,
        ("--width-scale 0.0625 --sparsity 0.9999", "sparsity 0.9999 out of reach"),
        UNTRAINED,
    ],
    DDPG: [(CARTPOLE, f"{CARTPOLE} Discrete(2) Box"), UNTRAINED],
    AGENTS / "drqv2_sparse.py": [
        (CARTPOLE, f"{CARTPOLE} width"),
        ("--env-id Reacher-v5 --camera 0", "--env-id Reacher-v5 camera 0 has 0 cameras"),
        ("--env-id nope:Nope-v0", "--env-id nope:Nope-v0"),
        ("--env-id Hopper-v5", "--env-id Hopper-v5 pictures MUJOCO_GL=disabled libegl1"),
        ('--env-id Walker2d-v5 --env-kwargs {"noise":1}', "Walker2d-v5: 'noise' --env-kwargs"),
    ],
}
USUAL = {  # flags that the bad ones stand behind
    SAC: FLAGS,
    STREAM: "--env-id Hopper-v5",
    DER: "--width-scale 0.125 --threads 1",
}


@pytest.mark.parametrize(
    "agent,flags,words",
    [(agent, *case) for agent, cases in BAD_FLAGS.items() for case in cases],
)
def test_bad_flag(main, tmp_path, agent, flags, words):
    (tmp_path / "file").write_text("not a folder")
    before = contents(tmp_path)
    flags = f"{USUAL.get(agent, '--threads 1')} {flags}"
    check_error(main(*flags.split(), agent=agent), *words.split())
    assert contents(tmp_path) == before


def test_tracking_without_a_key(tmp_path):
    """Through the real package, which finds no key in an empty home."""
    flags = (
        "--env-id InvertedPendulum-v5 --total-timesteps 50 --eval-episodes 1 --track --threads 1"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "MUJOCO_GL": "disabled"}
    how = {"cwd": tmp_path, "env": env, "stdin": subprocess.DEVNULL}
    code, _, err = call(sys.executable, STREAM, *flags.split(), **how)
    assert code == 2 and "Traceback" not in err, err
    assert "error: --track: No API key" in err and not list(tmp_path.rglob("checkpoint*"))


@pytest.mark.parametrize(
    "agent,flags,words",
    [
        (SAC, "--no-such-flag 3", "--no-such-flag"),
        (STREAM, "--device cuda", "--device auto cpu"),
    ],
)
def test_flags_that_the_parser_refuses(main, tmp_path, agent, flags, words):
    code, _, err = main(*flags.split(), agent=agent)
    assert code == 2 and "Traceback" not in err
    assert all(word in err for word in words.split()), err
    assert contents(tmp_path) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_where_there_is_none(main, tmp_path):
    check_error(main("--device", "cuda"), "--device", "cuda", "cpu")
    assert contents(tmp_path) == {}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    for seed in (1, 2):
        flags = (*TINY, "--seed", seed)
        succeed(Process(SAC, *flags, folder=folder, MUJOCO_GL="disabled").finish())
    return folder / "runs"


@pytest.fixture
def runs(trained, main) -> list[Path]:
    """The folders of finished runs, seeds 1 and 2."""
    shutil.copytree(trained, "runs")
    return [next(Path("runs").glob(f"*__seed{seed}")) for seed in (1, 2)]


def test_bad_flag_keeps_the_run_that_no_resume_would_move(main, runs, tmp_path):
    before = contents(tmp_path)
    check_error(main(*TINY, "--no-resume", "--sparsity", "1.0"), "--sparsity 1.0")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("mode", ["--resume", "--eval-only"])
def test_truncated_checkpoint_stays(main, runs, tmp_path, mode):
    path = runs[0] / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    before = contents(tmp_path)
    check_error(main(*TINY, mode), str(path), "checksum", "finished")
    assert contents(tmp_path) == before


def test_what_is_left_is_not_said_to_be_deleted(main, runs, tmp_path):
    """A damaged checkpoint that has none before it, and one that only cannot be read."""
    rewrite_checkpoint(runs[0], finished=False)
    metrics = runs[0] / "metrics.csv"
    metrics.write_text(re.sub(".*,final/.*\n", "", metrics.read_text()))
    path = runs[0] / "checkpoint.pt"
    damaged = path.read_bytes()[:-1000]
    path.write_bytes(damaged)
    check_error(main(*TINY), str(path), "checksum", "delete it to go on from the one before")
    path.unlink()
    previous = runs[0] / "checkpoint.previous.pt"
    previous.write_bytes(damaged)
    before = contents(tmp_path)
    check_error(main(*TINY), str(previous), "checksum", "--no-resume", "keeps these files")
    assert contents(tmp_path) == before
    path.mkdir()
    _, _, error = ended = main(*TINY)
    check_error(ended, "Is a directory", str(path), "the same command goes on")
    assert "delete" not in error


def test_a_row_of_metrics_is_written_whole():
    """Where the system takes a part of it at a time."""
    run = sac.Run.__new__(sac.Run)
    written = bytearray()
    run.csv = SimpleNamespace(write=lambda data: written.extend(data[:3]) or len(data[:3]))
    run.csv_digest = hashlib.sha256()
    run.write_rows("2,1,0,episode/return,7.5\n")
    assert written == b"2,1,0,episode/return,7.5\n"
    assert run.csv_digest.digest() == hashlib.sha256(written).digest()


def test_an_error_of_several_lines_is_one(capsys):
    with pytest.raises(SystemExit, match="2"):
        sac.fail("observations [[1 2]\n [3 4]]")
    assert capsys.readouterr().err == "error: observations [[1 2]  [3 4]]\n"


def test_a_film_without_its_package_costs_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imageio", None)
    sac.write_video(tmp_path / "film.mp4", [np.zeros((9, 9, 3), np.uint8)])
    assert capsys.readouterr().err.startswith("warning: no film in ")


def test_a_run_is_finished_only_when_all_else_is_there(main, tmp_path, monkeypatch):
    """With evaluations further apart than the run is long, the picture comes at the very end."""
    real = os.replace

    def stop_at_the_last_checkpoint(old, new):
        real(old, new)
        finished = (
            Path(new).name == "checkpoint.pt" and load_checkpoint(Path(new).parent)["finished"]
        )
        assert not finished or (Path(new).parent / "learning_curve.png").exists()

    monkeypatch.setattr(os, "replace", stop_at_the_last_checkpoint)
    succeed(main(*TINY, "--eval-interval", "1000"))
    assert load_checkpoint(only_run(tmp_path / "runs"))["finished"]


DIVERGING = f"{FLAGS} --updates-per-step 1 --learning-rate 1e30"
LAST_UPDATE = (
    "--width-scale 0.0625 --threads 1 --learning-rate 1e300 --learning-starts 640"
    " --total-timesteps 640 --action-repeat 32 --batch-size 4 --n-step 1"
    " --eval-episodes 1 --final-eval-episodes 1"
)


@pytest.mark.parametrize(
    "agent,flags,what",
    [
        (SAC, DIVERGING, "the action is not finite at env step 220: learning has diverged, or"),
        (DDPG, DIVERGING, "the action is not finite at env step 220: learning has diverged, or"),
        (DER, LAST_UPDATE, "network is not finite at agent_step=20"),
    ],
)
def test_weights_that_diverge_stop_the_run_and_are_not_saved(main, tmp_path, agent, flags, what):
    """SAC and DDPG notice it when they act next, or when something is logged or saved."""
    code, _, err = main(*flags.split(), agent=agent)
    assert code == 3 and f"error: {what}" in err and "the last checkpoint is kept" in err
    assert not list(tmp_path.rglob("checkpoint*"))


def test_no_resume_that_is_interrupted_loses_nothing(main, runs, monkeypatch):
    """Whichever file it stops at, the same command then starts nothing anew over what is left."""
    with open(runs[0] / "metrics.csv", "a") as file:
        file.write("400,20,0,not/deterministic,1.0\n")  # which no other run writes
    before = contents(runs[0])
    for n in range(len(list(runs[0].glob("[!.]*")))):
        moved, rename = [], Path.rename

        def stop(path, target, n=n, moved=moved, rename=rename):
            if len(moved) == n:
                raise KeyboardInterrupt
            moved.append(rename(path, target))

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", stop)
            with pytest.raises(KeyboardInterrupt):
                main(*TINY, "--no-resume")
        gc.collect()
        code, _, err = main(*TINY)
        assert code == 0 or (code == 2 and "--no-resume" in err), err
        for path in moved:
            path.rename(runs[0] / path.name)
        assert {name: runs[0].joinpath(name).read_bytes() for name in before} == before


def test_a_package_without_metadata_is_no_obstacle(main, tmp_path, monkeypatch):
    """An interrupted pip leaves such folders."""
    (tmp_path / "site" / "foo-1.0.dist-info").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "site")
    succeed(main(*TINY))


def test_evaluations_come_with_the_first_decision_at_or_after_a_multiple(main):
    flags = "--action-repeat 30 --total-timesteps 400 --learning-starts 1000 --eval-interval 100"
    succeed(main(*TINY, *flags.split()))
    rows = [
        row for row in read_metrics(only_run(Path("runs"))) if row["metric"] == "eval/return_mean"
    ]
    assert [int(row["env_step"]) for row in rows] == [0, 120, 210, 300, 420]


def test_a_finished_run_without_its_flags(main, tmp_path):
    """No script can use it, so the agent does not say that all is well."""
    agent = tyro.cli(sac.Args, args=[*TINY, "--runs-dir", str(tmp_path)])
    folder = write_metrics(sac.run_folder(agent), (400, "final/return_mean", 1.0))
    check_error(main(*TINY, "--runs-dir", tmp_path), "is finished but has no args.json")
    (folder / "metrics.csv").unlink()
    succeed(main(*TINY, "--runs-dir", tmp_path))
    (folder / "args.json").unlink()
    check_error(main(*TINY, "--runs-dir", tmp_path), "is finished but has no args.json")


def test_metrics_lost_since_the_checkpoint(main, runs, tmp_path):
    """Instead of a file padded with zero bytes."""
    metrics = runs[0] / "metrics.csv"
    rewrite_checkpoint(runs[0], finished=False)
    metrics.write_bytes(metrics.read_bytes()[:-1])
    before = contents(tmp_path)
    check_error(main(*TINY), str(metrics), "--no-resume")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("mode", ["--resume", "--eval-only"])
@pytest.mark.parametrize(
    "changes,words",
    [
        ({"counters": (1, 2, 3)}, "another version of this file"),
        ({"norm": {"mean": torch.zeros(7)}}, "norm in the checkpoint does not fit shape (7,)"),
    ],
)
def test_checkpoint_of_another_form_stays(main, runs, tmp_path, mode, changes, words):
    rewrite_checkpoint(runs[0], **{"finished": False, **changes})
    before = contents(tmp_path)
    check_error(main(*TINY, mode), *words.split())
    assert contents(tmp_path) == before


@pytest.mark.parametrize("mode", ["--resume", "--eval-only"])
def test_checkpoint_of_other_flags_stays(main, runs, tmp_path, mode):
    path = runs[0] / "checkpoint.pt"
    shutil.copy(runs[1] / "checkpoint.pt", path)
    before = contents(tmp_path)
    check_error(main(*TINY, mode), str(path), "--seed", "2", "not", "1")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "renderer,flags,words",
    [
        ("disabled", "--env-id dm_control/nope-v0", "--env-id dm_control/nope-v0"),
        # Environments that may print warnings
        ("disabled", "--env-id dm_control/cartpole-swingup-v0 --eval-only", "nothing to evaluate"),
        ("disabled", "--env-id Hopper-v5 --eval-only", "nothing to evaluate"),
        ("disabled", "--capture-video", "--env-id dm_control/humanoid-run-v0 MUJOCO_GL=disabled"),
        ("disabled", "--env-id Hopper-v5 --capture-video", "--env-id Hopper-v5 MUJOCO_GL=disabled"),
        ("none", "--env-id dm_control/humanoid-run-v0", "--env-id MUJOCO_GL=none"),
        ("none", "--env-id Hopper-v5", "--env-id MUJOCO_GL=none"),
    ],
)
def test_real_command_line(tmp_path, renderer, flags, words):
    """The user's renderer stands: one that does not exist is named."""
    ended = Process(SAC, *flags.split(), folder=tmp_path, MUJOCO_GL=renderer).finish()
    check_error(ended, *words.split())
    assert ended[1] == "" and contents(tmp_path) == {}
