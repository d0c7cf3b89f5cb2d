"""DrQ-v2: stacks in evaluation, units of env steps, all shifts, cameras; DER's evaluations."""

import os
import sys
from pathlib import Path

import der_impala_sparse as der
import drqv2_sparse as drq
import gymnasium as gym
import imageio
import numpy as np
import pytest
import torch
from conftest import CPU, call, check_error, metric_values, only_run, read_metrics, succeed


@pytest.mark.usefixtures("corridor")
def test_an_evaluated_policy_sees_the_last_three_frames(monkeypatch):
    env = drq.make_env(drq.Args(env_id="Corridor-v0", action_repeat=1))
    seen = []

    def act(agent, stack):
        seen.append((env.unwrapped.steps, stack.copy(), env.unwrapped.picture))
        return np.zeros(1, np.float32)

    monkeypatch.setattr(drq, "act", act)
    drq.evaluate(None, env, 2, (7, 1))
    shown = []
    for step, stack, picture in seen:
        shown = [picture] * 3 if step == 0 else [*shown[1:], picture]
        assert np.array_equal(stack, np.concatenate(shown, -1))
    assert [step for step, *_ in seen] == [0, 1, 2, 3, 4, 0, 1, 2]


@pytest.mark.usefixtures("corridor")
def test_a_film_has_an_end(monkeypatch, tmp_path):
    env = drq.make_env(drq.Args(env_id="Corridor-v0", action_repeat=1))
    monkeypatch.setattr(drq, "act", lambda agent, stack: np.zeros(1, np.float32))
    monkeypatch.setattr(drq, "LONGEST_FILM", 3)
    drq.evaluate(None, env, 1, (7, 1), tmp_path / "film.mp4")
    assert len(imageio.mimread(tmp_path / "film.mp4")) == 3


ENDLESS = """
import gymnasium as gym
import numpy as np


class Endless(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, render_mode, width, height):
        self.render_mode = render_mode

    def reset(self, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, False, False, {}

    def render(self):
        return np.zeros((84, 84, 3), np.uint8)


gym.register("Endless-v0", Endless)
"""


def test_an_environment_of_your_own_whose_episodes_do_not_end(tmp_path, monkeypatch, capsys):
    """The replay's file has room for episodes of 1000 env steps, or of --max-episode-steps."""
    (tmp_path / "endless.py").write_text(ENDLESS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def play(**flags) -> bool:
        env = drq.make_env(drq.Args(env_id="endless:Endless-v0", action_repeat=101, **flags))
        env.reset()
        return [env.step(np.zeros(1))[3] for _ in range(10)][-1]

    assert play(max_episode_steps=1001)
    with pytest.raises(SystemExit, match="2"):
        play()
    check_error((2, *capsys.readouterr()), "lasted 1,000 steps", "--max-episode-steps")


@pytest.mark.usefixtures("corridor")
def test_returns_of_more_steps_than_every_episode(main):
    flags = "--env-id Corridor-v0 --action-repeat 1 --total-timesteps 900 --learning-starts 9"
    flags += " --n-step 6 --width-scale 0.0625 --feature-dim 4 --eval-episodes 1 --threads 1"
    ended = main(drq.__file__, *flags.split(), "--device", "cpu")
    assert ended[0] == 2 and "--n-step 6 is longer than each of 100 episodes" in ended[2]


@pytest.mark.usefixtures("corridor")
def test_noise_and_warm_up_count_env_steps_and_not_decisions(main, tmp_path):
    """Two env steps a decision: 5 at random, then noise of std 1 - 0.9 t / 40 at env step t."""
    flags = "--env-id Corridor-v0 --action-repeat 2 --total-timesteps 32 --learning-starts 9"
    flags += " --std-decay 40 --noise-clip 9 --n-step 1 --batch-size 2 --width-scale 0.0625"
    flags += " --feature-dim 4 --decisions-per-update 1 --eval-episodes 2 --final-eval-episodes 2"
    flags += (
        " --threads 1 --device cpu --runs-dir runs --diagnostics-interval 32 --eval-interval 32"
    )
    code, _, err = main(drq.__file__, *flags.split())
    assert code == 0, err
    run_dir = only_run(tmp_path / "runs")
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    args = drq.Args(**saved["args"])
    torch.manual_seed(args.seed)
    agent, env = drq.Agent(args, 1, CPU), drq.make_env(args)
    replay = drq.FrameReplay(tmp_path / "replay.u8", 48, 0, 1, 1, args.gamma)
    episode, over = -1, True
    for decision in range(16):
        if over:
            episode += 1
            frame, _ = env.reset(seed=drq.derive_seed(args.seed, drq.TRAIN, episode))
            replay.begin(frame)
            stack = np.tile(frame, 3)
        std = 1 - 0.9 * min(2 * decision / 40, 1)
        if decision < 5:
            action = 2 * torch.rand(1).numpy() - 1
        else:
            action = drq.act(agent, stack, std * torch.randn(1))
        frame, reward, terminated, truncated, _ = env.step(action)
        replay.add(action, reward, terminated, frame)
        stack = np.concatenate([stack[..., 3:], frame], -1)
        over = terminated or truncated
        if decision >= 5:
            batch = replay.sample(2, CPU)
            drq.update(agent, batch, *(std * torch.randn(2, 2, 1)), args.tau)
    assert saved["counters"][:2] == (16, 11)
    for ours, expected in zip(saved["replay"]["columns"], replay.state_dict()["columns"]):
        assert torch.equal(ours, expected)
    for name, value in agent.critic.state_dict().items():
        assert torch.equal(saved["critic"][name], value)

    # The last diagnostics and the last two evaluations follow from the checkpoint alone
    rows = read_metrics(run_dir)
    generator = torch.Generator().manual_seed(drq.derive_seed(args.seed, drq.DIAGNOSE, 16))
    batch = replay.sample(2, CPU, generator)
    noises = std * torch.randn(2, 2, 1, generator=generator)  # of the last decision
    expected = drq.diagnose(agent, batch, *noises)
    for name in ("actor_grad_norm", "critic_grad_norm", "critic_feature_norm"):
        assert metric_values(rows, f"diagnostics/{name}") == [pytest.approx(expected[name])]
    for kind, purpose in (("eval", drq.EVAL), ("final", drq.FINAL)):
        result = drq.evaluate(agent, drq.make_env(args), 2, (args.seed, purpose, 16))
        assert metric_values(rows, f"{kind}/return_mean")[-1] == result["return_mean"]


def test_every_shift_is_as_likely_and_next_obs_has_its_own(tmp_path):
    """Each pixel holds its place, so that the middle of a picture tells how far it was moved."""
    replay = drq.FrameReplay(tmp_path / "replay.u8", 10, 0, 1, n_step=1, gamma=0.9)
    place = np.indices((84, 84)).astype(np.uint8)
    frame = np.stack([*place, place[0]], -1)
    replay.begin(frame)
    replay.add(np.zeros(1), 0.0, False, frame)
    torch.manual_seed(0)
    moved = []
    for _ in range(5):
        batch = replay.sample(500, CPU)
        moved.append([obs[:, 42, 42, 6:8].int() - 42 for obs in (batch.obs, batch.next_obs)])
    for side in (0, 1):
        shifts = torch.cat([pair[side] for pair in moved])
        assert shifts.min() == -4 and shifts.max() == 4
        counts = torch.bincount((shifts[:, 0] + 4) * 9 + shifts[:, 1] + 4, minlength=81)
        assert len(counts) == 81 and counts.min() > 8 and counts.max() < 60  # 31 each
    same = torch.cat([(now == later).all(1) for now, later in moved]).float().mean()
    assert same < 0.03  # 1 / 81


CAMERAS = """
import drqv2_sparse as drq
import numpy as np

env = drq.open_camera_env(drq.Args(env_id="dm_control/quadruped-walk-v0"))
env.reset(seed=1)
physics = env.unwrapped._env.physics
pictures = [physics.render(84, 84, camera_id=camera) for camera in (0, 2)]
assert np.array_equal(env.render(), pictures[1])
assert np.abs(pictures[0].astype(int) - pictures[1]).max() > 50
"""


def test_quadrupeds_are_seen_through_camera_2():
    """In a process of its own: here dm_control may have been loaded without a renderer."""
    folder = str(Path(drq.__file__).parent)
    env = os.environ | {"PYTHONPATH": folder, "MUJOCO_GL": "egl"}
    succeed(call(sys.executable, "-c", CAMERAS, env=env))


class Keys(gym.Env):
    """A game of eight decisions that remembers what was pressed and the seeds of its resets."""

    observation_space = gym.spaces.Box(0, 255, (84, 84), np.uint8)
    action_space = gym.spaces.Discrete(6)

    def __init__(self):
        self.pressed, self.seeds = [], []

    def reset(self, seed=None, options=None):
        self.seeds.append(seed)
        self.pressed.append([])
        return np.full((84, 84), 10, np.uint8), {}

    def step(self, action):
        self.pressed[-1].append(action)
        count = len(self.pressed[-1])
        frame = np.full((84, 84), 10 + count, np.uint8)
        return frame, float(action), False, count == 8, {}


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
def test_random_actions_of_evaluations_are_drawn_from_each_games_seed(epsilon, monkeypatch):
    env = Keys()
    stacks = []
    monkeypatch.setattr(der, "act", lambda agent, stack: stacks.append(stack.copy()) or 5)
    state = torch.get_rng_state()
    result = der.evaluate(der.Args(eval_epsilon=epsilon), None, env, 4, (7, 1, 30))
    assert env.seeds == [der.derive_seed(7, 1, 30, game) for game in range(4)]
    returns, greedy = [], 0
    for seed, pressed in zip(env.seeds, env.pressed):
        generator = np.random.default_rng(seed)
        expected = []
        for count in range(8):
            random = generator.random() < epsilon
            expected.append(int(generator.integers(6)) if random else 5)
            if not random:  # the last four frames, black before the game
                numbers = [10 + k if k >= 0 else 0 for k in range(count - 3, count + 1)]
                assert stacks[greedy][0, 0].tolist() == numbers
                greedy += 1
        assert pressed == expected
        returns.append(sum(expected))
    assert len(stacks) == greedy and result["return_mean"] == np.mean(returns)
    assert torch.equal(torch.get_rng_state(), state)
