"""What a kill must not lose, what a run restores, and what its last measurements follow from."""

import contextlib
import os
import random
from pathlib import Path
from types import SimpleNamespace

import ddpg_simba_sparse as ddpg
import drqv2_sparse as drq
import gymnasium as gym
import numpy as np
import pytest
import sac_simba_sparse as sac
import stream_ac_sparse as stream
import torch
from conftest import CPU, metric_values, only_run, read_metrics

TINY = "--threads 1 --device cpu --width-scale 0.0625 --eval-episodes 1 --final-eval-episodes 1"
TINY += " --env-id Pendulum-v1 --action-repeat 2 --batch-size 4 --runs-dir runs"
SHORT = f"{TINY} --total-timesteps 59 --learning-starts 39 --eval-interval 60"
SHORT += " --diagnostics-interval 60 --checkpoint-interval 20"


@pytest.mark.parametrize("agent", [sac, ddpg], ids=["sac", "ddpg"])
def test_the_last_measurements_follow_from_the_checkpoint(agent, main, tmp_path, monkeypatch):
    """Seeds of diagnostics and evaluations, and the noise of the diagnostics.

    And metrics.csv is on the disk before each checkpoint, which counts on it.
    """
    synced = []
    fsync = os.fsync

    def note(number):
        synced.append(Path(os.path.realpath(f"/proc/self/fd/{number}")).name)
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", note)
        code, _, err = main(agent.__file__, *SHORT.split())
    assert code == 0, err
    assert synced and synced == ["metrics.csv", "checkpoint.tmp"] * (len(synced) // 2)
    run_dir = only_run(tmp_path / "runs")
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    # Two env steps a decision, rounded up: 30 decisions, two updates after each from the 20th on
    assert saved["counters"][:2] == (30, 20)
    args = agent.Args(**saved["args"])
    parts, norm = agent.Agent(args, 3, 1, CPU), agent.ObservationNorm(3, CPU)
    replay = agent.ReplayBuffer(30, 3, 1, CPU)
    for name in ("actor", "critic", "target_critic", *["temperature"] * (agent is sac)):
        getattr(parts, name).load_state_dict(saved[name])
    norm.load_state_dict(saved["norm"])
    replay.load_state_dict(saved["replay"])

    rows = read_metrics(run_dir)
    generator = torch.Generator().manual_seed(agent.derive_seed(args.seed, agent.DIAGNOSE, 30))
    batch = replay.sample(4, norm, generator)
    scale = 1.0 if agent is sac else 0.1
    noises = scale * torch.randn(2, 4, 1, generator=generator)
    gamma = agent.default_gamma(agent.make_env(args), 2)
    expected = agent.diagnose(parts, batch, *noises, gamma)
    logged = {name: metric_values(rows, f"diagnostics/{name}")[-1] for name in expected}
    assert logged == pytest.approx(expected, rel=1e-5)
    env = agent.make_env(args)
    for kind, purpose in (("eval", agent.EVAL), ("final", agent.FINAL)):
        result = agent.evaluate(parts, norm, env, 1, (args.seed, purpose, 30))
        assert metric_values(rows, f"{kind}/return_mean")[-1] == result["return_mean"]


class Seeds(gym.Wrapper):
    """Remembers the seeds of resets."""

    def __init__(self, env):
        super().__init__(env)
        self.seeds = []

    def reset(self, **how):
        self.seeds.append(how["seed"])
        return super().reset(**how)


@pytest.mark.parametrize("agent", [sac, ddpg, drq], ids=["sac", "ddpg", "drqv2"])
@pytest.mark.usefixtures("corridor")
def test_each_episode_of_an_evaluation_has_a_seed_of_its_own(agent):
    args = agent.Args(env_id="Corridor-v0", action_repeat=1, width_scale=0.0625)
    env = Seeds(agent.make_env(args))
    if agent is drq:
        agent.evaluate(agent.Agent(args, 1, CPU), env, 3, (7, 1, 9))
    else:
        norm = agent.ObservationNorm(2, CPU)
        agent.evaluate(agent.Agent(args, 2, 1, CPU), norm, env, 3, (7, 1, 9))
    assert env.seeds == [agent.derive_seed(7, 1, 9, episode) for episode in range(3)]
    assert len(set(env.seeds)) == 3


def test_no_resume_that_is_interrupted_loses_nothing(main, tmp_path, monkeypatch):
    """Stopped when two files have been moved, and the same command without --no-resume again."""
    code, _, err = main(sac.__file__, *SHORT.split())
    assert code == 0, err
    run_dir = only_run(tmp_path / "runs")
    # As a kill in the last evaluation leaves it: not finished
    (run_dir / "checkpoint.previous.pt").replace(run_dir / "checkpoint.pt")
    text = (run_dir / "metrics.csv").read_text()
    kept = [line for line in text.splitlines(True) if ",final/" not in line]
    # A mark, because a run that begins anew writes the same
    written = "".join(kept).replace("actor_srank_99", "actor_srank_98").encode()
    (run_dir / "metrics.csv").write_bytes(written)
    rename = Path.rename
    moved = []

    def interrupted(self, target):
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(self)
        return rename(self, target)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Path, "rename", interrupted)
        main(sac.__file__, *SHORT.split(), "--no-resume")
    assert moved
    main(sac.__file__, *SHORT.split())
    found = [path.read_bytes() for path in (tmp_path / "runs").rglob("metrics.csv")]
    assert any(text.startswith(written) for text in found)


def save(folder: Path, mark: int) -> None:
    sac.save_checkpoint(folder, sac.Args(), {"mark": mark})


def marks(folder: Path) -> dict[str, int]:
    paths = folder.glob("checkpoint*.pt")
    return {path.name: torch.load(path, weights_only=True)["mark"] for path in paths}


def test_a_checkpoint_is_on_the_disk_before_it_replaces_another(tmp_path, monkeypatch):
    """Stopped between any two steps, the newest whole checkpoint is the one before or the new."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert marks(tmp_path) == {"checkpoint.pt": 2, "checkpoint.previous.pt": 1}
    steps = []
    replace, fsync = os.replace, os.fsync

    def note_fsync(number):
        steps.append(
            ("fsync", os.fstat(number).st_size, os.path.realpath(f"/proc/self/fd/{number}"))
        )
        fsync(number)

    def note_replace(source, target):
        steps.append(("replace", Path(source).stat().st_size, str(source)))
        newest = marks(tmp_path)
        assert newest.get("checkpoint.pt", newest["checkpoint.previous.pt"]) == 2
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    save(tmp_path, 3)
    assert marks(tmp_path) == {"checkpoint.pt": 3, "checkpoint.previous.pt": 2}
    kinds = [kind for kind, *_ in steps]
    assert kinds == ["fsync", "replace", "replace"]
    _, size, path = steps[0]
    assert steps[-1] == ("replace", size, path)  # all of it was written before


def draws() -> list[float]:
    return [random.random(), float(np.random.random()), float(torch.rand(1))]


@pytest.mark.parametrize("agent", [sac, stream], ids=["sac", "stream"])
def test_all_three_generators_go_on_where_the_checkpoint_was_written(agent, tmp_path):
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    np.random.standard_normal()  # leaves a second normal in numpy's state
    agent.save_checkpoint(tmp_path, agent.Args(), {})
    normal, expected = np.random.standard_normal(), draws()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(6)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    agent.restore_generators(checkpoint["generators"])
    assert np.random.standard_normal() == normal and draws() == expected


def test_a_unit_at_the_threshold_is_dormant():
    # Means 0 and 2 of a mean of 1: only <= counts a unit of ratio 0 at tau = 0
    assert sac.dormant_ratio([torch.tensor([[0.0, 2.0], [0.0, -2.0]])], tau=0.0) == 50.0
    # Means 1 and 3 of a mean of 2, and 2 + 1e-9 is 2 in float32: a ratio of exactly 0.5
    assert sac.dormant_ratio([torch.tensor([[1.0, 3.0]])], tau=0.5) == 50.0
    assert sac.dormant_ratio([torch.tensor([[1.0, 3.0]])], tau=0.499) == 0.0


def test_speed_counts_env_steps_and_not_decisions():
    logged = {}
    run = SimpleNamespace(action_repeat=4, log=logged.__setitem__)
    sac.Run.log_episode(run, {"r": 3.0, "l": 5, "t": 2.0}, {"alpha": 0.1})
    assert logged == {
        "episode": {"return": 3.0, "length": 5},
        "losses": {"alpha": 0.1},
        "time": {"env_steps_per_second": 10.0},  # 5 decisions of 4 env steps in 2 seconds
    }
