"""What the diagnostics cost: time of one `diagnose` against the updates between two of them.

    python sparse_zoo/bench/bench_diagnostics.py --width-scale 1 4 --sparsity 0 0.9

Both take turns in one process, on one thread and one batch (humanoid: 67 observations, 21 actions).
Times are medians over the turns of CPU time, which other programs on the machine disturb little.
The share is that of diagnose in diagnose + updates; acting, simulation and evaluation only make it
smaller.
"""

import time
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal

import timing
import torch
from timing import runs
from bench_update import make_batch
from devices import ACTION_DIM, OBS_DIM


@dataclass
class Args:
    agent: Literal["sac", "ddpg"] = "sac"
    """whose diagnose and update"""
    width_scale: runs.Widths = (1.0, 4.0)
    """widths of both networks"""
    sparsity: runs.Sparsities = (0.0, 0.9)
    """sparsities of both networks"""
    turns: runs.Count = 5
    """turns of each, after one that is not counted"""


def main(args: Args) -> None:
    module = timing.import_agent(f"{args.agent}_simba_sparse")
    timing.set_threads(module, 1)
    size = module.Args.batch_size
    for width_scale, sparsity in product(args.width_scale, args.sparsity):
        flags = module.Args(width_scale=width_scale, sparsity=sparsity)
        agent = module.Agent(flags, OBS_DIM, ACTION_DIM, timing.CPU)
        batch = make_batch(module, OBS_DIM, ACTION_DIM, size)
        inputs = (agent, batch, *torch.randn(2, size, ACTION_DIM), 0.99)
        calls = {
            "diagnose": partial(module.diagnose, *inputs),
            "update": partial(module.update, *inputs, 0.005),
        }
        ms = timing.medians(timing.take_turns(calls, args.turns, time.process_time))
        updates = flags.diagnostics_interval // flags.action_repeat * flags.updates_per_step
        share = ms["diagnose"] / (ms["diagnose"] + updates * ms["update"])
        print(
            f"{args.agent} width scale {width_scale:g}, sparsity {sparsity:g}: "
            f"diagnose {ms['diagnose']:.1f} ms, update {ms['update']:.1f} ms, "
            f"share of training time at the default interval: {100 * share:.3f} %",
            flush=True,
        )


if __name__ == "__main__":
    runs.start(main, Args)
