"""Time of one DrQ-v2 update, ours against the code of Yarats et al. (2021), and of sampling from replay.

    git clone https://github.com/facebookresearch/drqv2
    python sparse_zoo/analysis/bench_drqv2.py --reference drqv2
    python sparse_zoo/analysis/bench_drqv2.py --reference drqv2 --bf16
    python sparse_zoo/analysis/bench_drqv2.py --linear --width-scale 4 --sparsity 0.8

Each side updates on one fixed batch, in a process of its own, in turns; theirs includes its random shifts, ours a draw
from a replay of 20,000 frames, which is also timed alone. With --linear, ours is compared with itself where every
sparse layer multiplies a dense weight by a mask: update without the encoder, on fixed features. Times are medians.

Ours asks for large memory pages, theirs does not (THP_MEM_ALLOC_ENABLE=1 before the command gives them to both).
"""

import importlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import drqv2_sparse as drq
from bench_update import mask_network

ACTION_DIM = 12  # quadruped


@dataclass
class Args:
    reference: str | None = None
    """folder with a clone of drqv2"""
    width_scale: float = 1.0
    """of the critic, ours and theirs"""
    sparsity: float = 0.0
    """of our critic; theirs is dense"""
    bf16: bool = False
    """our convolutions in bfloat16"""
    linear: bool = False
    """compare with masked dense layers, encoder left out"""
    batch_size: int = 256
    """transitions per update"""
    turns: int = 5
    """updates of each side"""
    threads: int | None = None
    """CPU threads (default: all cores)"""


def make_replay(folder: str, batch_size: int) -> drq.FrameReplay:
    """20,000 random frames in episodes of 500 decisions."""
    replay = drq.FrameReplay(Path(folder) / "replay.u8", 20_000, 0, ACTION_DIM, 3, 0.99)
    generator = np.random.default_rng(0)
    film = generator.integers(0, 256, (100, drq.SIZE, drq.SIZE, 3), np.uint8)
    for number in range(20_000):
        frame = film[number % 100]
        if number % 501 == 0:
            replay.begin(frame)
        else:
            replay.add(generator.uniform(-1, 1, ACTION_DIM), 1.0, False, frame)
    return replay


def our_side(args: Args, replay: drq.FrameReplay) -> Callable[[], None]:
    flags = drq.Args(width_scale=args.width_scale, sparsity=args.sparsity)
    agent = drq.Agent(flags, ACTION_DIM, torch.device("cpu"))
    shape = (2, args.batch_size, ACTION_DIM)

    def update() -> None:
        batch = replay.sample(args.batch_size, torch.device("cpu"))
        drq.update(
            agent, batch, *drq.clipped_noise(flags, shape, 500_000, "cpu"), flags.tau, args.bf16
        )

    return update


def linear_side(args: Args, masked: bool) -> Callable[[], None]:
    """Critic and actor on fixed features; with masks, the same layers dense, multiplied by masks of their density."""
    flags = drq.Args(width_scale=args.width_scale, sparsity=0.0 if masked else args.sparsity)
    agent = drq.Agent(flags, ACTION_DIM, torch.device("cpu"))
    if masked:
        for network in (agent.critic, agent.target_critic):
            shapes = {
                name: tuple(parameter.shape) for name, parameter in network.named_parameters()
            }
            rows = [
                {"layer": name.removesuffix(".weight"), "active": 1 - sparsity, "total": 1.0}
                for name, sparsity in drq.erdos_renyi(shapes, args.sparsity).items()
                if len(shapes[name]) > 1 and sparsity > 0
            ]
            mask_network(network, rows)
    features = torch.rand(args.batch_size, drq.Encoder.features)
    agent.encoder = lambda obs, bf16: features
    agent.encoder_optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    reward, discount = torch.rand(args.batch_size), torch.full((args.batch_size,), 0.97)
    batch = drq.Batch(None, 2 * torch.rand(args.batch_size, ACTION_DIM) - 1, reward, discount, None)

    def update() -> None:
        noises = drq.clipped_noise(flags, (2, args.batch_size, ACTION_DIM), 500_000, "cpu")
        drq.update(agent, batch, *noises, flags.tau)

    return update


def their_side(args: Args) -> Callable[[], None]:
    sys.path.insert(0, args.reference)
    for name in ("hydra", "omegaconf"):  # which their update does not use
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["omegaconf"].__dict__.setdefault("OmegaConf", None)
    theirs = importlib.import_module("drqv2")
    sizes = {"feature_dim": 50, "hidden_dim": round(1024 * args.width_scale)}
    schedule = {
        "stddev_schedule": "linear(1.0,0.1,500000)",
        "stddev_clip": 0.3,
        "num_expl_steps": 2000,
    }
    rest = {
        "device": "cpu",
        "lr": 1e-4,
        "critic_target_tau": 0.01,
        "update_every_steps": 2,
        "use_tb": False,
    }
    agent = theirs.DrQV2Agent((9, drq.SIZE, drq.SIZE), (ACTION_DIM,), **sizes, **schedule, **rest)
    obs, next_obs = np.random.default_rng(0).integers(
        0, 256, (2, args.batch_size, 9, drq.SIZE, drq.SIZE), np.uint8
    )
    action = (
        np.random.default_rng(1).uniform(-1, 1, (args.batch_size, ACTION_DIM)).astype(np.float32)
    )
    reward, discount = (
        np.ones((args.batch_size, 1), np.float32),
        np.full((args.batch_size, 1), 0.97, np.float32),
    )
    return lambda: agent.update(iter([(obs, action, reward, discount, next_obs)]), 2)


def serve(connection: Connection, args: Args, side: str) -> None:
    """A process for one side, as its users would start it: times one update for each message."""
    threads = args.threads or torch.get_num_threads()
    drq.numba.set_num_threads(threads)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        if side == "theirs":
            function = their_side(args)
        elif args.linear:
            function = linear_side(args, masked=side == "masked dense")
        else:
            replay = make_replay(folder, args.batch_size)
            sample = partial(replay.sample, args.batch_size, torch.device("cpu"))
            function = sample if side == "our sampling" else our_side(args, replay)
        function()
        connection.send("ready")
        while connection.recv():
            start = time.perf_counter()
            function()
            connection.send(1000 * (time.perf_counter() - start))


if __name__ == "__main__":
    args = tyro.cli(Args)
    other = "masked dense" if args.linear else "theirs" if args.reference else None
    if args.reference and not (Path(args.reference) / "drqv2.py").exists():
        print(f"error: --reference {args.reference}: no clone of drqv2", file=sys.stderr)
        sys.exit(2)
    times, sides, pages = {}, {}, os.environ.get("THP_MEM_ALLOC_ENABLE", "0")
    for side in filter(None, ("ours", None if args.linear else "our sampling", other)):
        os.environ["THP_MEM_ALLOC_ENABLE"] = (
            pages if side == "theirs" else "1"
        )  # as drqv2_sparse.py sets it
        sides[side], connection = multiprocessing.Pipe()
        multiprocessing.get_context("spawn").Process(
            target=serve, args=(connection, args, side), daemon=True
        ).start()
        connection.close()
        try:
            sides[side].recv()
        except EOFError:
            sys.exit(1)  # the process has said why
        times[side] = []
    for _ in range(args.turns):
        for side, connection in sides.items():
            connection.send("update")
            times[side].append(connection.recv())
    for side, values in times.items():
        print(f"{side:<14}{statistics.median(values):9.1f} ms")
    if other:
        ratios = [ours / theirs for ours, theirs in zip(times["ours"], times[other])]
        print(f"ratios of single turns: {min(ratios):.3f} to {max(ratios):.3f}")
        print(f"ratio time={statistics.median(ratios):.3f}")
