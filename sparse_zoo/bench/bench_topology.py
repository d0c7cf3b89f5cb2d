"""What a change of the topology costs: time of one change against one update.

    python sparse_zoo/bench/bench_topology.py --width-scale 1 4 --sparsity 0.9

Both take turns in one process, on one thread and one batch (humanoid: 67 observations, 21 actions).
Times are medians over the turns of CPU time, which other programs on the machine disturb little.
SET and RigL make their first change, which is the largest. Gradual magnitude pruning goes from a
dense network to --sparsity, one change a turn (and one before, not counted), so that updates become
cheaper in between. The share is that of changes in all of training at the default
--topology-interval, if all were as large.
"""

import time
from dataclasses import dataclass
from itertools import count, product
from typing import Literal

import timing
import torch
from timing import runs
from bench_update import make_batch
from devices import ACTION_DIM, OBS_DIM


@dataclass
class Args:
    width_scale: runs.Widths = (1.0, 4.0)
    """widths of both networks"""
    sparsity: runs.Sparsities = (0.9,)
    """sparsities of both networks"""
    topology: tuple[Literal["set", "rigl", "magnitude"], ...] = ("set", "rigl", "magnitude")
    """the rules to measure"""
    turns: runs.Count = 5
    """turns of each, after one that is not counted"""


def main(args: Args) -> None:
    module = timing.import_agent("sac_simba_dynamic")
    timing.set_threads(module, 1)
    size = module.Args.batch_size
    for width, sparsity, topology in product(args.width_scale, args.sparsity, args.topology):
        flags = module.Args(width_scale=width, sparsity=sparsity, topology=topology)
        agent = module.Agent(flags, OBS_DIM, ACTION_DIM, timing.CPU)
        batch = make_batch(module, OBS_DIM, ACTION_DIM, size)
        inputs = (batch, *torch.randn(2, size, ACTION_DIM), 0.99)
        number = count(1)

        def change(flags=flags, agent=agent, inputs=inputs, number=number) -> None:
            turn = next(number)
            done = turn / (args.turns + 1)
            progress = flags.prune_start + done * (flags.prune_end - flags.prune_start)
            progress = progress if flags.topology == "magnitude" else 0.0
            module.change_topology(agent, flags, progress, turn, *inputs)

        def update(agent=agent, inputs=inputs) -> None:
            module.update(agent, *inputs, 0.005)

        calls = {"update": update, "change": change}
        times = timing.take_turns(calls, args.turns, time.process_time)
        ratio = timing.compare_turns(times["change"], times["update"])
        ms = timing.medians(times)
        share = ms["change"] / (ms["change"] + flags.topology_interval * ms["update"])
        print(
            f"{topology} width scale {width:g}, sparsity {sparsity:g}: "
            f"change {ms['change']:.1f} ms, update {ms['update']:.1f} ms, "
            f"a change costs {ratio['ratio']:.1f} updates "
            f"({ratio['low']:.1f} to {ratio['high']:.1f}), "
            f"share of training time at the default interval: {100 * share:.2f} %",
            flush=True,
        )


if __name__ == "__main__":
    runs.start(main, Args)
