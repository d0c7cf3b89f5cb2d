"""What the diagnostics cost: time of one `diagnose` against the updates between two of them.

    python sparse_zoo/analysis/bench_diagnostics.py --width-scale 1 4 --sparsity 0 0.9

Both take turns in one process, on one thread and one batch (humanoid: 67 observations, 21 actions). Times are medians
over the turns of CPU time, which other programs on the machine disturb little. The share is that of diagnose in
diagnose + updates; acting, simulation and evaluation only make it smaller.
"""

import importlib
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@dataclass
class Args:
    agent: Literal["sac", "ddpg"] = "sac"
    """whose diagnose and update"""
    width_scale: tuple[float, ...] = (1.0, 4.0)
    """widths of both networks"""
    sparsity: tuple[float, ...] = (0.0, 0.9)
    """sparsities of both networks"""
    turns: int = 5
    """turns of each, after one that is not counted"""


if __name__ == "__main__":
    args = tyro.cli(Args)
    module = importlib.import_module(f"{args.agent}_simba_sparse")
    module.numba.set_num_threads(1)
    torch.set_num_threads(1)  # after numba, whose start sets the number for both
    size, obs_dim, action_dim = module.Args.batch_size, 67, 21
    for width_scale, sparsity in (
        (width, sparsity) for width in args.width_scale for sparsity in args.sparsity
    ):
        flags = module.Args(width_scale=width_scale, sparsity=sparsity)
        agent = module.Agent(flags, obs_dim, action_dim, torch.device("cpu"))
        obs, next_obs = torch.randn(2, size, obs_dim)
        action = 2 * torch.rand(size, action_dim) - 1
        inputs = (agent, module.Batch(obs, action, torch.rand(size), next_obs, torch.zeros(size)))
        inputs += (*torch.randn(2, size, action_dim), 0.99)
        calls = {
            "diagnose": lambda i=inputs: module.diagnose(*i),
            "update": lambda i=inputs: module.update(*i, 0.005),
        }
        seconds = {name: [] for name in calls}
        for name, call in [*calls.items()] * (args.turns + 1):
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
        diagnose, update = (1000 * statistics.median(times[1:]) for times in seconds.values())
        updates = flags.diagnostics_interval // flags.action_repeat * flags.updates_per_step
        share = 100 * diagnose / (diagnose + updates * update)
        print(
            f"{args.agent} width scale {width_scale:g}, sparsity {sparsity:g}: diagnose {diagnose:.1f} ms, ",
            end="",
        )
        print(
            f"update {update:.1f} ms, share of training time at the default interval: {share:.3f} %",
            flush=True,
        )
