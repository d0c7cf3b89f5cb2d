"""What the agent sees of real dm-control and Gymnasium environments."""

import os
import sys

import drqv2_sparse as drq
import gymnasium as gym
import numpy as np
import pytest
import sac_simba_sparse as sac
from conftest import AGENTS, CPU, check_error, check_returns

CARTPOLE, WALKER, HUMANOID = (
    f"dm_control/{name}-v0" for name in ("cartpole-swingup", "walker-walk", "humanoid-run")
)


def make_env(env_id: str, action_repeat: int = 2) -> gym.Env:
    return sac.make_env(sac.Args(env_id=env_id, action_repeat=action_repeat))


def play(
    env: gym.Env, key: tuple[int, ...], limit: int = 10_000
) -> tuple[np.ndarray, np.ndarray, bool, bool]:
    """Observations, rewards, terminated and truncated of an episode that follows from the key."""
    actions = np.random.default_rng(key)
    observations = [env.reset(seed=sac.derive_seed(*key))[0]]
    rewards = []
    terminated = truncated = False
    while not (terminated or truncated or len(rewards) == limit):
        action = actions.uniform(-1, 1, env.action_space.shape)
        obs, reward, terminated, truncated, _ = env.step(action)
        observations.append(obs)
        rewards.append(reward)
    return np.array(observations), np.array(rewards), terminated, truncated


class Countdown(gym.Env):
    """Gives the rewards 1, 10, 100, ... and ends, one way or the other, with the fifth."""

    observation_space = gym.spaces.Box(0, 10, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, terminates: bool):
        self.terminates, self.steps = terminates, 0

    def step(self, action):
        self.steps += 1
        over = self.steps == 5
        obs = np.array([self.steps], np.float32)
        ends = (over and self.terminates, over and not self.terminates)
        return obs, 10.0 ** (self.steps - 1), *ends, {}


@pytest.mark.parametrize("terminates", [True, False])
def test_action_repeat_sums_rewards_and_stops_at_the_end(terminates):
    inner = Countdown(terminates)
    # The one in make_env: our counting of env steps relies on this
    env = gym.wrappers.RepeatAction(inner, 2)
    steps = [env.step(np.zeros(1))[:4] for _ in range(3)]
    assert [(float(obs[0]), *rest) for obs, *rest in steps] == [
        (2.0, 11.0, False, False),
        (4.0, 1100.0, False, False),
        (5.0, 10000.0, terminates, not terminates),
    ]
    assert inner.steps == 5


def test_action_repeat_equals_two_single_steps():
    twice, single = make_env(CARTPOLE, 2), make_env(CARTPOLE, 1)
    twice.reset(seed=5), single.reset(seed=5)
    rewards = []
    for action in np.random.default_rng(0).uniform(-1, 1, (100, 1)):
        obs, reward, *_ = twice.step(action)
        first, second = single.step(action), single.step(action)
        assert np.array_equal(obs, second[0]) and reward == first[1] + second[1]
        rewards.append(reward)
    assert np.ptp(rewards) > 1e-3


@pytest.mark.parametrize("action_repeat,decisions", [(1, 1000), (2, 500), (4, 250)])
def test_dm_control_episodes_are_truncated_not_terminated(action_repeat, decisions):
    observations, rewards, terminated, truncated = play(make_env(CARTPOLE, action_repeat), (1,))
    assert (len(rewards), terminated, truncated) == (decisions, False, True)
    assert (
        observations.shape == (decisions + 1, 5)
        and rewards.min() >= 0
        and rewards.max() <= action_repeat
    )


def test_a_fallen_hopper_is_terminated_not_truncated():
    _, rewards, terminated, truncated = play(make_env("Hopper-v5"), (1,))
    assert (terminated, truncated) == (True, False) and len(rewards) < 100


def test_gymnasium_time_limit_is_truncation():
    _, rewards, terminated, truncated = play(make_env("HalfCheetah-v5"), (1,))
    assert (len(rewards), terminated, truncated) == (500, False, True)


def test_humanoid_is_flattened_in_the_order_of_sorted_keys():
    env = make_env(HUMANOID)
    assert env.observation_space.shape == (67,) and env.action_space.shape == (21,)
    obs, _ = env.reset(seed=1)
    parts = env.unwrapped._env.task.get_observation(env.unwrapped._env.physics)
    assert sorted(parts) != list(parts)  # so that the order of the task itself would not do
    expected = np.concatenate([np.ravel(parts[name]) for name in sorted(parts)])
    assert obs.shape == (67,) and np.array_equal(obs, expected)


@pytest.mark.parametrize(
    "env_id,bound", [("Humanoid-v5", 0.4), ("InvertedPendulum-v5", 3.0), (WALKER, 1.0)]
)
def test_actions_are_rescaled_to_one(env_id, bound):
    env = make_env(env_id)
    space = env.action_space
    assert (space.low == -1).all() and (space.high == 1).all()
    assert np.allclose(env.unwrapped.action_space.high, bound)
    assert np.allclose(env.unwrapped.action_space.low, -bound)
    seen = []
    inner = env.unwrapped.step
    env.unwrapped.step = lambda action: seen.append(np.array(action)) or inner(action)
    for fraction in (-1.0, 0.5, 1.0):
        env.reset(seed=1)
        seen.clear()
        env.step(np.full(space.shape, fraction, np.float32))
        assert seen[0] == pytest.approx(np.full(space.shape, fraction * bound), rel=1e-6)


@pytest.mark.parametrize("env_id", [CARTPOLE, WALKER, "Hopper-v5"])
def test_an_episode_follows_from_its_seed_alone(env_id):
    env = make_env(env_id)
    episodes = [play(env, (1, 0, episode), 150) for episode in range(3)]
    fresh = make_env(env_id)
    third_first = play(fresh, (1, 0, 2), 150)
    for first, again in ((episodes[2], third_first), (episodes[0], play(env, (1, 0, 0), 150))):
        for ours, expected in zip(again[:2], first[:2], strict=True):
            assert np.array_equal(ours, expected)
        assert again[2:] == first[2:]
    assert not np.array_equal(episodes[0][0][0], episodes[1][0][0])


def test_derived_seeds_differ_between_keys():
    keys = [(seed, use, n) for seed in range(5) for use in range(4) for n in range(50)]
    seeds = {sac.derive_seed(*key) for key in keys}
    assert len(seeds) == len(keys) == 1000 and min(seeds) >= 0 and max(seeds) < 2**32
    assert sac.derive_seed(1, 0, 7) == int(np.random.SeedSequence((1, 0, 7)).generate_state(1)[0])


def test_evaluation_is_repeatable_and_reports_its_returns():
    agent = sac.Agent(sac.Args(width_scale=0.0625), 11, 3, CPU)
    norm, env = sac.ObservationNorm(11, CPU), make_env("Hopper-v5")
    returns = []
    for episode in range(4):
        obs, _ = env.reset(seed=sac.derive_seed(7, 1, episode))
        total, over = 0.0, False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(sac.act(agent, norm, obs))
            total, over = total + reward, terminated or truncated
        returns.append(total)
    before = norm.statistics.count
    result = sac.evaluate(agent, norm, make_env("Hopper-v5"), 4, (7, 1))
    assert norm.statistics.count == before
    check_returns(result, returns)


@pytest.mark.parametrize(
    "package,flags,install",
    [
        ("pygame", "--env-id Pendulum-v1 --capture-video", "gymnasium[classic_control]"),
        ("Box2D", "--env-id BipedalWalker-v3", "gymnasium[box2d]"),
        ("Box2D", "--env-id LunarLanderContinuous-v3", "gymnasium[box2d]"),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_install_line(
    package, flags, install, main, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    ended = main(AGENTS / "sac_simba_sparse.py", *flags.split())
    check_error(ended, package, f'pip install "{install}"')


@pytest.mark.parametrize(("system", "renderer"), [("linux", "egl"), ("darwin", "glfw")])
def test_the_renderer_is_one_that_the_system_has(monkeypatch, corridor, system, renderer):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setitem(os.environ, "MUJOCO_GL", "")  # is put back at the end
    for filming, expected in ((True, renderer), (False, "disabled")):
        del os.environ["MUJOCO_GL"]
        sac.open_env(sac.Args(env_id="Pendulum-v1", capture_video=filming))
        assert os.environ["MUJOCO_GL"] == expected
    del os.environ["MUJOCO_GL"]
    drq.open_camera_env(drq.Args(env_id="Corridor-v0"))
    assert os.environ["MUJOCO_GL"] == renderer
