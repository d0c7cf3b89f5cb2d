"""Time of one decision of der_impala_sparse.py and of its parts, beside PyTorch's convolutions.

    python sparse_zoo/bench/bench_der.py
    python sparse_zoo/bench/bench_der.py --bf16
    THP_MEM_ALLOC_ENABLE=1 python sparse_zoo/bench/bench_der.py    # large pages for PyTorch as well

For each width and sparsity, in turns: `plain` is the dense encoder in PyTorch's default layout, the
whole batch at once, with two passes without gradient and one with, in a process of its own with
PyTorch's defaults; `encoder` is the same with our layout, parts and pages; `update` is a whole
update (encoder, noisy layers, loss, Adam); `act` chooses one action; `replay` adds a frame, draws a
batch and changes its priorities, in a replay of 100,000 frames; `env` is one decision of Pong.
Times are medians in ms. GFLOP/s are those of `encoder`; a product of two matrices of 2048 x 2048,
the first line, shows what PyTorch reaches here.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path

import timing
import numpy as np
import torch
from timing import runs
from torch.utils.flop_counter import FlopCounterMode

der = timing.import_agent("der_impala_sparse")
ACTIONS = 6  # of Pong
REPEATS = {"plain": 1, "encoder": 1, "update": 1, "act": 20, "replay": 20, "env": 20}


@dataclass
class Args:
    width_scale: runs.Widths = (1.0, 3.0)
    """widths to measure"""
    sparsity: runs.Sparsities = (0.0, 0.4, 0.8)
    """sparsities to measure"""
    bf16: bool = False
    """our convolutions in bfloat16"""
    turns: runs.Count = 5
    """times of each part"""
    threads: runs.Threads = None
    """CPU threads (default: all cores)"""


def make_replay(folder: str, capacity: int = 100_000) -> der.PrioritizedReplay:
    """Frames in episodes of 500 decisions."""
    replay = der.PrioritizedReplay(Path(folder) / "replay.u8", der.Args(), capacity, 1000)
    choose_action = partial(np.random.default_rng(0).integers, ACTIONS)
    timing.fill_replay(replay, capacity, (der.SIZE, der.SIZE), choose_action)
    return replay


def passes(encode: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Two passes without gradient, one with."""

    def run() -> None:
        with torch.no_grad():
            encode()
            encode()
        encode().sum().backward()

    return run


def serve_plain(connection: Connection, threads: int) -> None:
    """A process that runs the encoder as PyTorch comes, once for each width that it is sent."""
    torch.set_num_threads(threads)
    images = torch.rand(der.Args.batch_size, der.STACK, der.SIZE, der.SIZE)
    make_encoder = cache(der.impala)
    while width := connection.recv():
        encoder = make_encoder(width, 2)
        passes(partial(encoder, images))()
        connection.send("done")


def parts(
    flags: der.Args, replay: der.PrioritizedReplay, env, plain: Connection
) -> dict[str, Callable]:
    """The parts of a decision, by their names in REPEATS."""
    agent = der.Agent(flags, ACTIONS, timing.CPU)
    batch = replay.sample(flags.batch_size, timing.CPU)
    stack = batch.obs[0].numpy()
    last = replay.frames[(replay.added - 1) % len(replay.frames)].copy()

    def run_plain() -> None:
        plain.send(flags.width_scale)
        timing.receive(plain)

    def update() -> None:
        der.update(agent, batch, agent.network.draw_noise(), agent.network.draw_noise())

    def use_replay() -> None:
        replay.add(0, 0.0, False, last)
        drawn = replay.sample(flags.batch_size, timing.CPU)
        replay.set_priorities(drawn.place, torch.ones(flags.batch_size))

    return {
        "plain": run_plain,
        "encoder": passes(lambda: agent.network.encode(batch.obs)),
        "update": update,
        "act": lambda: der.act(agent, stack, agent.network.draw_noise()),
        "replay": use_replay,
        "env": timing.stepper(env, env.action_space.sample),
    }


def print_row(functions: dict[str, Callable], flags: der.Args, turns: int) -> None:
    """Measures the parts of a decision and prints their times."""
    with FlopCounterMode(display=False) as counter:
        functions["encoder"]()
    ms = timing.medians(timing.take_turns(functions, turns, repeats=REPEATS))
    around = ms["replay"] + ms["env"]
    decision = ms["update"] + ms["act"] + around
    times = "".join(f"{ms[name]:9.2f}" for name in REPEATS)
    print(
        f"{flags.width_scale:5g}{flags.sparsity:10g}{times}{1000 / decision:9.2f}"
        f"{ms['encoder'] / ms['plain']:15.3f}{around / decision:12.1%}"
        f"{counter.get_total_flops() / ms['encoder'] / 1e6:9.0f}",
        flush=True,
    )


def main(args: Args) -> None:
    threads = args.threads or torch.get_num_threads()
    plain = timing.start_process(serve_plain, threads)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the agent does
    timing.set_threads(der, threads)
    env = der.make_env(der.Args())
    matrix = torch.rand(2048, 2048)
    times = timing.take_turns({"product": lambda: matrix @ matrix}, args.turns)
    print(f"matrix product: {2 * 2048**3 / timing.medians(times)['product'] / 1e6:.0f} GFLOP/s")
    with tempfile.TemporaryDirectory() as folder:
        replay = make_replay(folder)
        names = "".join(f"{name:>9}" for name in REPEATS)
        print(f"width  sparsity{names}  steps/s  encoder/plain  replay+env  GFLOP/s")
        for width, sparsity in product(args.width_scale, args.sparsity):
            flags = der.Args(width_scale=width, sparsity=sparsity, bf16=args.bf16)
            print_row(parts(flags, replay, env, plain), flags, args.turns)


if __name__ == "__main__":
    runs.start(main, Args)
