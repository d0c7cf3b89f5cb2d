"""CPU milliseconds of one update and of one frame of every agent, from which benchmark.sh estimates core hours.

    python sparse_zoo/analysis/bench_costs.py

On one thread: CPU time does not count what other programs take. An update is all that an agent does with one batch; a
frame is one simulator frame of training: acting, simulating and drawing, over the frames of a decision.
Each row of docs/results/costs.csv is the mean over --seconds of work. Rows of agents that were not asked for stay.
"""

import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
import pandas as pd
import torch
import tyro
from bench_update import Args as UpdateArgs
from bench_update import build
from plan import COSTS

AGENTS = (
    "sac_simba_sparse",
    "ddpg_simba_sparse",
    "drqv2_sparse",
    "stream_ac_sparse",
    "der_impala_sparse",
)
CPU = torch.device("cpu")


@dataclass
class Args:
    agents: tuple[str, ...] = AGENTS
    """which agents to measure"""
    seconds: float = 3.0
    """CPU time of each measurement (at least two calls)"""
    output: Path = COSTS
    """file of the measurements"""


def milliseconds(function: Callable[[], None], seconds: float) -> float:
    """Mean CPU time of a call, after one that is not counted."""
    function()
    start, calls = time.process_time(), 0
    while (spent := time.process_time() - start) < seconds or calls < 2:
        function()
        calls += 1
    return 1000 * spent / calls


def simba_rows(agent: str, seconds: float) -> list[dict]:
    module, short = importlib.import_module(agent), agent.split("_")[0]
    rows = []
    for width, sparsity in (
        (0.25, 0),
        (0.5, 0),
        (1, 0),
        (2, 0),
        (1, 0.9),
        (2, 0.9),
        (4, 0.8),
        (4, 0.9),
    ):
        update, _ = build(
            UpdateArgs(agent=short, width_scale=width, sparsity=sparsity, threads=1), "ours"
        )
        size = {"width_scale": width, "depth_scale": 1, "sparsity": sparsity, "batch_size": 256}
        rows.append({"what": "update", **size, "ms": milliseconds(update, seconds)})
    for task in ("humanoid-run", "dog-run", "cheetah-run", "walker-run"):
        args = module.Args(env_id=f"dm_control/{task}-v0")
        env = module.make_env(args)
        obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
        networks, norm = (
            module.Agent(args, obs_dim, action_dim, CPU),
            module.ObservationNorm(obs_dim, CPU),
        )
        obs, _ = env.reset(seed=0)

        def step(
            module=module, env=env, networks=networks, norm=norm, obs=obs, action_dim=action_dim
        ):
            norm.update(obs)
            if any(env.step(module.act(networks, norm, obs, torch.randn(action_dim)))[2:4]):
                env.reset()

        rows.append(
            {
                "what": "frame",
                "env_id": args.env_id,
                "ms": milliseconds(step, seconds) / args.action_repeat,
            }
        )
    return rows


def drqv2_rows(seconds: float) -> list[dict]:
    import bench_drqv2
    import drqv2_sparse as drq

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        replay = bench_drqv2.make_replay(folder, 32)
        for width, sparsity in ((1, 0), (4, 0), (1, 0.8), (4, 0.8)):
            size = {"width_scale": width, "sparsity": sparsity, "batch_size": 32}
            update = bench_drqv2.our_side(bench_drqv2.Args(**size), replay)
            rows.append(
                {"what": "update", **size, "depth_scale": 1, "ms": milliseconds(update, seconds)}
            )
    for task in ("quadruped-run", "hopper-hop", "cartpole-swingup"):
        args = drq.Args(env_id=f"dm_control/{task}-v0")
        env = drq.make_env(args)
        env.reset(seed=0)

        def step(env=env):
            if any(env.step(env.action_space.sample())[2:4]):
                env.reset()

        rows.append(
            {
                "what": "frame",
                "env_id": args.env_id,
                "ms": milliseconds(step, seconds) / args.action_repeat,
            }
        )
        env.close()
    return rows


def stream_rows(seconds: float) -> list[dict]:
    import bench_stream

    rows, frames = [], {}
    for task in ("Walker2d-v4", "Ant-v4"):
        for width, sparsity in ((1, 0), (2, 0), (8, 0), (1, 0.9), (8, 0.9)):
            spent: dict[str, float] = {}
            size = {"width_scale": width, "sparsity": sparsity}
            stream = bench_stream.stream_ours(bench_stream.Args(env_id=task, **size), spent)
            next(stream)
            spent.clear()
            start, steps = time.process_time(), 0
            while time.process_time() - start < seconds:
                next(stream)
                steps += 1
            learn = 1000 * spent["learn"] / steps
            rows.append(
                {
                    "what": "update",
                    "env_id": task,
                    **size,
                    "depth_scale": 1,
                    "batch_size": 1,
                    "ms": learn,
                }
            )
            frames.setdefault(task, []).append(
                1000 * (sum(spent.values()) - spent["learn"]) / steps
            )
    return rows + [
        {"what": "frame", "env_id": task, "ms": np.mean(values)} for task, values in frames.items()
    ]


def der_rows(seconds: float) -> list[dict]:
    import der_impala_sparse as der

    rows, batch_size = [], 32
    for width, sparsity in ((1, 0), (2, 0), (3, 0), (3, 0.8)):
        args = der.Args(width_scale=width, sparsity=sparsity)
        agent = der.Agent(args, 6, CPU)
        obs, next_obs = torch.randint(
            0, 256, (2, batch_size, der.SIZE, der.SIZE, der.STACK), dtype=torch.uint8
        )
        ones = torch.ones(batch_size)
        batch = der.Batch(
            obs, torch.zeros(batch_size, dtype=torch.int64), ones, ones, next_obs, ones, None
        )

        def update(agent=agent, batch=batch):
            der.update(agent, batch, agent.network.draw_noise(), agent.network.draw_noise())

        size = {
            "width_scale": width,
            "depth_scale": 1,
            "sparsity": sparsity,
            "batch_size": batch_size,
        }
        rows.append({"what": "update", **size, "ms": milliseconds(update, seconds)})
    args = der.Args()
    env, agent = der.make_env(args), der.Agent(args, 6, CPU)
    stack = np.zeros((der.SIZE, der.SIZE, der.STACK), np.uint8)
    env.reset(seed=0)

    def step():
        if any(env.step(der.act(agent, stack, agent.network.draw_noise()))[2:4]):
            env.reset()

    return [
        *rows,
        {
            "what": "frame",
            "env_id": args.env_id,
            "ms": milliseconds(step, seconds) / args.action_repeat,
        },
    ]


if __name__ == "__main__":
    args = tyro.cli(Args)
    for agent in args.agents:
        if agent not in AGENTS:
            print(f"error: --agents {agent}: must be of {' '.join(AGENTS)}", file=sys.stderr)
            sys.exit(2)
    if args.seconds <= 0:
        print(f"error: --seconds {args.seconds}: must be above 0", file=sys.stderr)
        sys.exit(2)
    numba.set_num_threads(1)
    torch.set_num_threads(1)  # after numba, whose start sets the number for both
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault(
        "THP_MEM_ALLOC_ENABLE", "1"
    )  # as drqv2_sparse.py and der_impala_sparse.py do
    for agent in args.agents:
        others = {
            "drqv2_sparse": drqv2_rows,
            "stream_ac_sparse": stream_rows,
            "der_impala_sparse": der_rows,
        }
        measure = others.get(agent)
        rows = measure(args.seconds) if measure else simba_rows(agent, args.seconds)
        table = pd.DataFrame(rows).assign(agent=agent)
        columns = [
            "agent",
            "what",
            "env_id",
            "width_scale",
            "depth_scale",
            "sparsity",
            "batch_size",
            "ms",
        ]
        table = table.reindex(columns=columns)
        if args.output.exists():
            old = pd.read_csv(args.output)
            table = (
                pd.concat([old[old.agent != agent], table]) if (old.agent != agent).any() else table
            )
        table.to_csv(args.output, index=False, float_format="%.4g")
        print(table[table.agent == agent].to_string(index=False))
