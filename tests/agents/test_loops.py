"""Whole runs of the agents with a replay equal the same written out from the files' parts.

Evaluations and diagnostics are left out here, so they change nothing either. Stream AC's loop is in
test_stream.py.
"""

import math

import ddpg_simba_sparse as ddpg
import der_impala_sparse as der
import drqv2_sparse as drq
import numpy as np
import pytest
import sac_simba_sparse as sac
import torch
from conftest import (
    CPU,
    assert_all_equal,
    metric_values,
    only_run,
    read_metrics,
    succeed,
)

TINY = "--threads 1 --device cpu --sparsity 0.5 --eval-episodes 1 --final-eval-episodes 1"


pytestmark = pytest.mark.usefixtures("corridor")


@pytest.fixture
def run(train):
    """Trains: flags, checkpoint and rows of metrics.csv.

    Torch's generator is left as it is at the start of the run.
    """

    def run(agent, arguments: str):
        ended, checkpoint, rows = train(agent, arguments)
        succeed(ended)
        args = agent.Args(**checkpoint["args"])
        torch.manual_seed(args.seed)
        return args, checkpoint, rows

    return run


def assert_equal(saved: dict, expected: dict) -> None:
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(saved[name]), torch.as_tensor(value)), name


@pytest.mark.parametrize(
    ("order", "intervals"),
    [
        ("--overlap", ""),
        ("--overlap", "--eval-interval 7 --diagnostics-interval 3"),
        ("--no-overlap", "--eval-interval 7 --diagnostics-interval 3"),
    ],
)
@pytest.mark.parametrize("agent", [sac, ddpg], ids=["sac", "ddpg"])
def test_simba_agents(agent, order, intervals, run):
    flags = "--env-id Corridor-v0 --action-repeat 1 --total-timesteps 24 --learning-starts 9"
    flags += " --updates-per-step 2 --batch-size 4 --width-scale 0.0625 --reset-interval 6"
    flags += " --gamma 0.9 --buffer-size 10"
    args, saved, metrics = run(agent, f"{TINY} {flags} {order} {intervals}")
    lengths = [5, 3, 5, 3, 5]  # and three steps of a sixth episode, which terminates with the last
    decisions_with_updates = 24 - 9 if args.overlap else 24 - 9 + 1
    assert saved["counters"][:3] == (24, 2 * decisions_with_updates, 6)
    assert metric_values(metrics, "episode/length") == [*lengths, 3]
    scale = args.exploration_noise if agent is ddpg else 1.0

    parts = agent.Agent(args, 2, 1, CPU)
    norm = agent.ObservationNorm(2, CPU)
    replay = agent.ReplayBuffer(10, 2, 1, CPU)
    env = agent.make_env(args)

    def learn():
        for _ in range(2):
            batch = replay.sample(4, norm)
            agent.update(parts, batch, *(scale * torch.randn(2, 4, 1)), 0.9, args.tau)

    t = 0
    returns = []
    for episode, length in enumerate([*lengths, 3]):
        obs, _ = env.reset(seed=agent.derive_seed(args.seed, agent.TRAIN, episode))
        returns.append(0.0)
        for step in range(1, length + 1):
            if t in (12, 18):  # neither in the warm-up nor at the end
                parts = agent.Agent(args, 2, 1, CPU)
            norm.update(obs)
            if t < 9:
                action = 2 * torch.rand(1).numpy() - 1
            else:
                action = agent.act(parts, norm, obs, scale * torch.randn(1))
                if args.overlap:
                    learn()
            next_obs, reward, terminated, _, _ = env.step(action)
            assert terminated == (episode % 2 == 1 and step == 3)
            # Not where the limit cuts an episode off
            replay.add(obs, action, reward, next_obs, float(terminated))
            returns[-1] += reward
            obs = next_obs
            t += 1
            if t >= 9 and not args.overlap:
                learn()
    assert metric_values(metrics, "episode/return") == returns
    assert_equal(saved["norm"], norm.state_dict())
    assert_all_equal(saved["replay"]["columns"], replay.state_dict()["columns"])
    for name in ("actor", "critic", "target_critic"):
        assert_equal(saved[name], getattr(parts, name).state_dict())


@pytest.mark.parametrize("intervals", ["", "--eval-interval 7 --diagnostics-interval 3"])
def test_drqv2(intervals, run, tmp_path):
    flags = "--env-id Corridor-v0 --action-repeat 1 --total-timesteps 24 --learning-starts 9"
    flags += " --n-step 2 --batch-size 2 --width-scale 0.0625 --std-decay 20"
    args, saved, metrics = run(drq, f"{TINY} {flags} {intervals}")
    lengths = [5, 3, 5, 3, 5, 3]
    # After every second decision, once a decision was the actor's
    updates = [t for t in range(10, 25) if t % 2 == 0]
    assert saved["counters"][:3] == (24, len(updates), 6)
    assert metric_values(metrics, "episode/length") == lengths

    parts, env, t = drq.Agent(args, 1, CPU), drq.make_env(args), 0
    replay = drq.FrameReplay(tmp_path / "replay.u8", 48, 0, 1, 2, args.gamma)
    for episode, length in enumerate(lengths):
        frame, _ = env.reset(seed=drq.derive_seed(args.seed, drq.TRAIN, episode))
        stack = np.tile(frame, 3)
        replay.begin(frame)
        for _ in range(length):
            std = 1 - 0.9 * min(t / 20, 1)
            action = (
                2 * torch.rand(1).numpy() - 1
                if t < 9
                else drq.act(parts, stack, std * torch.randn(1))
            )
            frame, reward, terminated, _, _ = env.step(action)
            # An episode that the limit cuts off is not terminated
            replay.add(action, reward, float(terminated), frame)
            stack, t = np.concatenate([stack[..., 3:], frame], -1), t + 1
            if t in updates:
                batch = replay.sample(2, CPU)
                noise = (drq.exploration_std(args, t - 1) * torch.randn(2, 2, 1)).clamp(-0.3, 0.3)
                drq.update(parts, batch, *noise, args.tau)
    # Frames, and the last that two steps of its episode follow
    assert saved["replay"]["counters"] == (30, 27)
    assert_all_equal(saved["replay"]["columns"], replay.state_dict()["columns"])
    for name in ("encoder", "actor", "critic", "target_critic"):
        assert_equal(saved[name], getattr(parts, name).state_dict())


@pytest.mark.parametrize(
    "flags",
    ["--no-terminal-on-life-loss", "--eval-interval 640 --diagnostics-interval 320"],
    ids=["games", "lives"],
)
def test_der(flags, run, tmp_path):
    flags += " --env-id ALE/Asterix-v5 --action-repeat 16 --total-timesteps 1440"
    flags += " --learning-starts 640 --n-step 3 --batch-size 2 --width-scale 0.0625"
    flags += " --updates-per-step 2 --target-interval 30"
    args, saved, metrics = run(der, f"{TINY} {flags}")
    assert saved["counters"][:2] == (90, 2 * (90 - 40 + 1))

    env = der.make_env(args)
    parts = der.Agent(args, int(env.action_space.n), CPU)
    replay = der.PrioritizedReplay(tmp_path / "replay.u8", args, 180, 0)
    t = updates = games = 0
    lengths, deaths, rewards, black = [], [], [], np.zeros((84, 84, 4), np.uint8)
    returns = []
    measured = []
    while t < 90:
        frame, info = env.reset(seed=der.derive_seed(args.seed, der.TRAIN, games))
        games, over, lives, stack, start = games + 1, False, info["lives"], black, t
        replay.begin(frame)
        while not over and t < 90:
            stack = np.concatenate([stack[..., 1:], frame[..., None]], -1)
            action = der.act(parts, stack, parts.network.draw_noise())
            frame, reward, over, truncated, info = env.step(action)
            assert not truncated
            rewards.append(reward)
            lost = info["lives"] < lives and args.terminal_on_life_loss
            death, lives, t = over or lost, info["lives"], t + 1
            replay.add(action, np.sign(reward) * min(abs(reward), 1), float(death), frame)
            if death:
                deaths.append(t)
            for _ in range(2 if t >= 40 else 0):
                batch = replay.sample(2, CPU)
                _, losses = der.update(
                    parts, batch, parts.network.draw_noise(), parts.network.draw_noise()
                )
                replay.set_priorities(batch.place, losses)
                updates += 1
                if updates % 30 == 0:
                    parts.target_network.load_state_dict(parts.network.state_dict())
            if t % 20 == 0 and replay.ready():
                seed = der.derive_seed(args.seed, der.DIAGNOSE, t)
                generator = torch.Generator().manual_seed(seed)
                batch = replay.sample(2, CPU, generator)
                noises = [parts.network.draw_noise(generator) for _ in range(2)]
                measured.append(der.diagnose(parts, batch, *noises)["critic_grad_norm"])
            if death and not over:
                stack = black
                replay.begin(frame)
        if over:
            lengths.append(t - start)
            returns.append(sum(rewards[start:t]))
    # All of it has happened
    assert len(lengths) >= 1 and max(rewards) > 1
    assert args.terminal_on_life_loss == (len(deaths) > len(lengths))
    assert (
        saved["counters"][1:3] == (updates, games)
        and metric_values(metrics, "episode/length") == lengths
    )
    assert metric_values(metrics, "episode/return") == returns  # not of clipped rewards
    if args.diagnostics_interval == 320:
        assert len(measured) > 2
        assert metric_values(metrics, "diagnostics/critic_grad_norm") == pytest.approx(measured)
    assert saved["replay"]["counters"] == replay.state_dict()["counters"]
    assert_all_equal(saved["replay"]["columns"], replay.state_dict()["columns"])
    for name in ("network", "target_network"):
        assert_equal(saved[name], getattr(parts, name).state_dict())


NAN = torch.tensor([1.0, math.nan])
BROKEN = {"fine": torch.ones(()), "broken": NAN[1]}


@pytest.mark.parametrize(
    ("agent", "returned", "env_id"),
    [
        (sac, BROKEN, "Corridor-v0"),
        (ddpg, BROKEN, "Corridor-v0"),
        (drq, BROKEN, "Corridor-v0"),
        (der, ({}, NAN), "ALE/Asterix-v5"),
    ],
    ids=["sac", "ddpg", "drqv2", "der"],
)
def test_a_loss_that_is_not_finite_ends_the_run(
    agent, returned, env_id, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(agent, "update", lambda *_: returned)
    flags = {"env_id": env_id, "action_repeat": 1, "max_episode_steps": 30, "threads": 1}
    flags |= {"total_timesteps": 64, "learning_starts": 9, "batch_size": 2, "width_scale": 0.0625}
    flags |= {"eval_episodes": 1, "final_eval_episodes": 1, "runs_dir": str(tmp_path)}
    with pytest.raises(SystemExit, match="3"):
        agent.train(agent.Args(**flags))
    assert "error: a value is not finite at agent_step=" in capsys.readouterr().err
    rows = read_metrics(only_run(tmp_path))
    assert rows and all(math.isfinite(float(row["value"])) for row in rows)
