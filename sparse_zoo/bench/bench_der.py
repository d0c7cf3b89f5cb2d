"""Time of one decision of der_impala_sparse.py and of its parts, beside the bare convolutions as PyTorch comes.

    python sparse_zoo/analysis/bench_der.py
    python sparse_zoo/analysis/bench_der.py --bf16
    THP_MEM_ALLOC_ENABLE=1 python sparse_zoo/analysis/bench_der.py    # large memory pages for plain PyTorch as well

For each width and sparsity, in turns: `plain` is the dense encoder in PyTorch's default layout, the whole batch at
once, with two passes without gradient and one with, in a process of its own with PyTorch's defaults; `encoder` is the
same with our layout, parts and pages; `update` is a whole update (encoder, noisy layers, loss, Adam); `act` chooses one
action; `replay` adds a frame, draws a batch and changes its priorities, in a replay of 100,000 frames; `env` is one
decision of Pong. Times are medians in ms. GFLOP/s are those of `encoder`; a product of two matrices of 2048 x 2048, the
first line, shows what PyTorch reaches here.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from sys import path

import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

path.insert(0, str(Path(__file__).resolve().parents[1]))
import der_impala_sparse as der

CPU, ACTIONS = torch.device("cpu"), 6  # of Pong


@dataclass
class Args:
    width_scale: tuple[float, ...] = (1.0, 3.0)
    """widths to measure"""
    sparsity: tuple[float, ...] = (0.0, 0.4, 0.8)
    """sparsities to measure"""
    bf16: bool = False
    """our convolutions in bfloat16"""
    turns: int = 5
    """times of each part"""
    threads: int | None = None
    """CPU threads (default: all cores)"""


def make_replay(folder: str) -> der.PrioritizedReplay:
    """100,000 frames in episodes of 500 decisions."""
    replay = der.PrioritizedReplay(Path(folder) / "replay.u8", der.Args(), 100_000, 1000)
    generator = np.random.default_rng(0)
    film = generator.integers(0, 256, (100, der.SIZE, der.SIZE), np.uint8)
    for number in range(100_000):
        if number % 501 == 0:
            replay.begin(film[number % 100])
        else:
            replay.add(number % ACTIONS, 0.0, number % 501 == 500, film[number % 100])
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
    images, encoders = torch.rand(der.Args.batch_size, der.STACK, der.SIZE, der.SIZE), {}
    while width := connection.recv():
        if width not in encoders:
            encoders[width] = der.impala(width, 2)
        passes(lambda: encoders[width](images))()
        connection.send("done")


def parts(
    args: Args, width: float, sparsity: float, replay: der.PrioritizedReplay, env, plain: Connection
) -> dict[str, Callable]:
    flags = der.Args(width_scale=width, sparsity=sparsity, bf16=args.bf16)
    agent = der.Agent(flags, ACTIONS, CPU)
    batch = replay.sample(flags.batch_size, CPU)
    stack = batch.obs[0].numpy()
    last = replay.frames[(replay.added - 1) % len(replay.frames)].copy()

    def update() -> None:
        der.update(agent, batch, agent.network.draw_noise(), agent.network.draw_noise())

    def use_replay() -> None:
        replay.add(0, 0.0, False, last)
        drawn = replay.sample(flags.batch_size, CPU)
        replay.set_priorities(drawn.index, torch.ones(flags.batch_size))

    def step() -> None:
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()

    return {
        "plain": lambda: (plain.send(width), plain.recv()),
        "encoder": passes(lambda: agent.network.encode(batch.obs)),
        "update": update,
        "act": lambda: der.act(agent, stack, agent.network.draw_noise()),
        "replay": use_replay,
        "env": step,
    }


def measure(functions: dict[str, Callable], turns: int) -> dict[str, float]:
    """Median ms of each; short ones are repeated in each turn."""
    times = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, function in functions.items():
            repeats = 1 if name in ("plain", "encoder", "update") else 20
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            if turn:  # the first is for warming up
                times[name].append(1000 * (time.perf_counter() - start) / repeats)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    args = tyro.cli(Args)
    threads = args.threads or torch.get_num_threads()
    plain, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(
        target=serve_plain, args=(theirs, threads), daemon=True
    ).start()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the agent does
    der.numba.set_num_threads(threads)
    torch.set_num_threads(threads)
    env = der.make_env(der.Args())
    env.reset(seed=0)
    names = ["plain", "encoder", "update", "act", "replay", "env"]
    matrix = torch.rand(2048, 2048)
    print(
        f"matrix product: {2 * 2048**3 / measure({'': lambda: matrix @ matrix}, args.turns)[''] / 1e6:.0f} GFLOP/s"
    )
    with tempfile.TemporaryDirectory() as folder:
        replay = make_replay(folder)
        print(
            "width  sparsity"
            + "".join(f"{name:>9}" for name in names)
            + "  steps/s  encoder/plain  replay+env  GFLOP/s"
        )
        for width in args.width_scale:
            for sparsity in args.sparsity:
                functions = parts(args, width, sparsity, replay, env, plain)
                with FlopCounterMode(display=False) as counter:
                    functions["encoder"]()
                ms = measure(functions, args.turns)
                decision = ms["update"] + ms["act"] + ms["replay"] + ms["env"]
                print(
                    f"{width:5g}{sparsity:10g}" + "".join(f"{ms[name]:9.2f}" for name in names),
                    end="",
                )
                share = (ms["replay"] + ms["env"]) / decision
                print(
                    f"{1000 / decision:9.2f}{ms['encoder'] / ms['plain']:15.3f}{share:12.1%}",
                    end="",
                )
                print(f"{counter.get_total_flops() / ms['encoder'] / 1e6:9.0f}", flush=True)
