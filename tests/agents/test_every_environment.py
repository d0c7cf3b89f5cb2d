"""Every environment of docs/environments.md, for a few hundred env steps, in a process of its own.

`python -m pytest -m slow -s tests/agents/test_every_environment.py | grep '^|'` prints the table
of docs/environments.md.
"""

import json
import math

import gymnasium as gym
import pytest
import shimmy
from conftest import AGENTS, Process, metric_values, only_run, read_metrics, succeed

COMMON = "--threads 1 --device cpu --sparsity 0.5 --eval-episodes 1"
COMMON += " --final-eval-episodes 1 --eval-interval 100000"
SMALL_BATCH = "--batch-size 8 --max-episode-steps 100"
HOW = {
    "sac_simba_sparse": f"--total-timesteps 400 --learning-starts 200 --diagnostics-interval 400"
    f" --width-scale 0.125 {SMALL_BATCH}",
    "stream_ac_sparse": "--total-timesteps 400 --diagnostics-interval 400 --max-episode-steps 100",
    "drqv2_sparse": f"--total-timesteps 400 --learning-starts 200 --diagnostics-interval 400"
    f" --width-scale 0.0625 --buffer-size 500 {SMALL_BATCH}",
    "der_impala_sparse": "--total-timesteps 1200 --learning-starts 800 --diagnostics-interval 1200"
    " --width-scale 0.25 --buffer-size 500 --batch-size 4 --max-episode-steps 600",
}

gym.register_envs(shimmy)
# What else Shimmy registers is not the suite: locomotion, manipulation. And lqr has no bounds on
# its actions: dm_control says 1e10, and the physics breaks down
SUITE = sorted(
    name
    for name, spec in gym.registry.items()
    if "dm_control_suite_env" in str(spec.entry_point) and "/lqr-" not in name
)
MUJOCO = [
    f"{name}-v5"
    for name in [
        "Ant",
        "HalfCheetah",
        "Hopper",
        "Humanoid",
        "HumanoidStandup",
        "InvertedDoublePendulum",
        "InvertedPendulum",
        "Pusher",
        "Reacher",
        "Swimmer",
        "Walker2d",
    ]
]
STREAMING = [
    "Ant-v4",
    "HalfCheetah-v4",
    "Hopper-v4",
    "Humanoid-v4",
    "Walker2d-v4",
    "dm_control/cartpole-swingup-v0",
]
PIXELS = [
    "dm_control/quadruped-run-v0",
    "dm_control/hopper-hop-v0",
    "dm_control/cartpole-swingup-v0",
    "HalfCheetah-v5",
]
GAMES = """Alien Amidar Assault Asterix BankHeist BattleZone Boxing Breakout ChopperCommand
    CrazyClimber DemonAttack Freeway Frostbite Gopher Hero Jamesbond Kangaroo Krull KungFuMaster
    MsPacman Pong PrivateEye Qbert RoadRunner Seaquest UpNDown""".split()  # noqa: SIM905
ALL = [
    *(("sac_simba_sparse", env_id) for env_id in MUJOCO + SUITE),
    *(("stream_ac_sparse", env_id) for env_id in STREAMING),
    *(("drqv2_sparse", env_id) for env_id in PIXELS),
    *(("der_impala_sparse", f"ALE/{game}-v5") for game in GAMES),
]


def test_the_lists_are_whole():
    assert len(GAMES) == len(set(GAMES)) == 26
    assert len(SUITE) == 49 and "dm_control/humanoid-run-v0" in SUITE
    assert all(env_id in gym.registry for env_id in MUJOCO)


@pytest.mark.slow
@pytest.mark.parametrize("agent,env_id", ALL)
def test_trains(agent, env_id, tmp_path):
    flags = f"--env-id {env_id} {COMMON} {HOW[agent]}".split()
    draws = agent == "drqv2_sparse" or env_id == "dm_control/quadruped-escape-v0"  # its ground
    how = {"MUJOCO_GL": "egl" if draws else "disabled"}
    succeed(Process(AGENTS / f"{agent}.py", *flags, folder=tmp_path, **how).finish())
    run_dir = only_run(tmp_path / "runs")
    rows = read_metrics(run_dir)
    (result,) = metric_values(rows, "final/return_mean")
    lengths = metric_values(rows, "episode/length")
    assert lengths and all(math.isfinite(float(row["value"])) for row in rows)
    total = json.loads((run_dir / "args.json").read_text())["args"]["total_timesteps"]
    assert int(rows[-1]["env_step"]) == total and int(rows[-1]["update_step"]) >= 50
    print(f"\n| `{env_id}` | `{agent}` | {total} | {rows[-1]['update_step']} | {result:.1f} |")
