"""CPU milliseconds of an update and of a frame of every agent, from which hours are estimated.

    python sparse_zoo/bench/bench_costs.py

On one thread: CPU time does not count what other programs take. An update is all that an agent does
with one batch; a frame is one simulator frame of training: acting, simulating and drawing, over the
frames of a decision (of DrQ-v2 with random actions). Each row of docs/results/costs.csv is the mean
over --seconds of work. Rows of agents that were not asked for stay. benchmark.sh estimates core
hours from it.
"""

import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import timing
import bench_der
import bench_drqv2
import bench_stream
import numpy as np
import pandas as pd
import torch
from timing import runs
from bench_update import make_update

TASKS = {
    "simba": ("humanoid-run", "dog-run", "cheetah-run", "walker-run"),
    "drqv2": ("quadruped-run", "hopper-hop", "cartpole-swingup"),
    "stream": ("Walker2d-v4", "Ant-v4"),
}
SIMBA_SIZES = [(0.25, 0), (0.5, 0), (1, 0), (2, 0), (1, 0.9), (2, 0.9), (4, 0.8), (4, 0.9)]
COLUMNS = ["agent", "what", "env_id", "width_scale", "depth_scale", "sparsity", "batch_size", "ms"]


def milliseconds(function: Callable[[], None], seconds: float) -> float:
    """Mean CPU time of a call, after one that is not counted."""
    function()
    start = time.process_time()
    calls = 0
    spent = 0.0
    while spent < seconds or calls < 2:
        function()
        calls += 1
        spent = time.process_time() - start
    return 1000 * spent / calls


def update_row(width_scale: float, sparsity: float, batch_size: int, ms: float) -> dict:
    size = {"width_scale": width_scale, "depth_scale": 1, "sparsity": sparsity}
    return {"what": "update", **size, "batch_size": batch_size, "ms": ms}


def frame_row(args, env, choose_action: Callable, seconds: float) -> dict:
    """The cost of a simulator frame of training."""
    ms = milliseconds(timing.stepper(env, choose_action), seconds) / args.action_repeat
    return {"what": "frame", "env_id": args.env_id, "ms": ms}


def simba_rows(module, seconds: float) -> Iterator[dict]:
    for width, sparsity in SIMBA_SIZES:
        agent = module.Agent(module.Args(width_scale=width, sparsity=sparsity), 67, 21, timing.CPU)
        update = make_update(module, agent, 67, 21, 256)
        yield update_row(width, sparsity, 256, milliseconds(update, seconds))
    for task in TASKS["simba"]:
        args = module.Args(env_id=f"dm_control/{task}-v0")
        env = module.make_env(args)
        obs, _ = env.reset(seed=0)
        action_dim = env.action_space.shape[0]
        agent = module.Agent(args, len(obs), action_dim, timing.CPU)
        norm = module.ObservationNorm(len(obs), timing.CPU)

        def choose(agent=agent, norm=norm, obs=obs, action_dim=action_dim):
            norm.update(obs)
            return module.act(agent, norm, obs, torch.randn(action_dim))

        yield frame_row(args, env, choose, seconds)


def drqv2_rows(drq, seconds: float) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as folder:
        replay = bench_drqv2.make_replay(folder)
        for width, sparsity in ((1, 0), (4, 0), (1, 0.8), (4, 0.8)):
            flags = bench_drqv2.Args(width_scale=width, sparsity=sparsity, batch_size=32)
            update = bench_drqv2.our_side(flags, replay)
            yield update_row(width, sparsity, 32, milliseconds(update, seconds))
    for task in TASKS["drqv2"]:
        args = drq.Args(env_id=f"dm_control/{task}-v0")
        env = drq.make_env(args)
        yield frame_row(args, env, env.action_space.sample, seconds)
        env.close()


def stream_rows(_, seconds: float) -> Iterator[dict]:
    for task in TASKS["stream"]:
        frames = []
        for width, sparsity in ((1, 0), (2, 0), (8, 0), (1, 0.9), (8, 0.9)):
            flags = bench_stream.Args(env_id=task, width_scale=width, sparsity=sparsity)
            spent = Counter()
            stream = bench_stream.stream_ours(flags, spent)
            next(stream)
            spent.clear()
            start = time.process_time()
            steps = 0
            while time.process_time() - start < seconds:
                next(stream)
                steps += 1
            learn = 1000 * spent["learn"] / steps
            yield update_row(width, sparsity, 1, learn) | {"env_id": task}
            frames.append(1000 * sum(spent.values()) / steps - learn)
        yield {"what": "frame", "env_id": task, "ms": np.mean(frames)}


def der_rows(der, seconds: float) -> Iterator[dict]:
    args = der.Args()
    env = der.make_env(args)
    with tempfile.TemporaryDirectory() as folder:
        replay = bench_der.make_replay(folder, 2000)
        for width, sparsity in ((1, 0), (2, 0), (3, 0), (3, 0.8)):
            flags = der.Args(width_scale=width, sparsity=sparsity)
            update = bench_der.parts(flags, replay, env, None)["update"]
            yield update_row(width, sparsity, args.batch_size, milliseconds(update, seconds))
        yield frame_row(args, env, bench_der.parts(args, replay, env, None)["act"], seconds)


AGENTS = {
    "sac_simba_sparse": simba_rows,
    "ddpg_simba_sparse": simba_rows,
    "drqv2_sparse": drqv2_rows,
    "stream_ac_sparse": stream_rows,
    "der_impala_sparse": der_rows,
}


@dataclass
class Args:
    agents: Annotated[tuple[str, ...], f"x in {tuple(AGENTS)}"] = tuple(AGENTS)
    """which agents to measure"""
    seconds: Annotated[float, "0 < x <= 3600"] = 3.0
    """CPU time of each measurement (at least two calls)"""
    output: str = str(timing.COSTS)
    """file of the measurements"""


def main(args: Args) -> None:
    output = Path(args.output).expanduser()
    runs.make_folder(output.parent)
    known = pd.DataFrame(columns=COLUMNS)
    if output.exists():
        known = runs.read_table(output, COLUMNS, "--output")
    os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the agents of pixels do
    for agent in args.agents:
        module = timing.import_agent(agent)
        timing.set_threads(module, 1)
        rows = list(AGENTS[agent](module, args.seconds))
        table = pd.DataFrame(rows).assign(agent=agent).reindex(columns=COLUMNS)
        print(table.to_string(index=False))
        others = known[known.agent != agent]
        known = pd.concat([others, table]) if len(others) else table
        with runs.new_files(output.parent) as folder:
            known.to_csv(folder / output.name, index=False, float_format="%.4g")


if __name__ == "__main__":
    runs.start(main, Args)
