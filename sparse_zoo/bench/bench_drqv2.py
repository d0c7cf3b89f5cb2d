"""Time of one DrQ-v2 update, ours against the code of Yarats et al. (2021), and of sampling.

    git clone https://github.com/facebookresearch/drqv2
    python sparse_zoo/bench/bench_drqv2.py --reference drqv2
    python sparse_zoo/bench/bench_drqv2.py --reference drqv2 --bf16
    python sparse_zoo/bench/bench_drqv2.py --linear --width-scale 4 --sparsity 0.8

Each side updates on one fixed batch, in a process of its own, in turns; theirs includes its random
shifts, ours a draw from a replay of 20,000 frames, which is also timed alone. With --linear, ours
is compared with itself where every sparse layer multiplies a dense weight by a mask: update without
the encoder, on fixed features. Times are medians.

Ours asks for large memory pages, theirs does not (THP_MEM_ALLOC_ENABLE=1 before the command gives
them to both).
"""

import os
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import timing
import numpy as np
import torch
from timing import runs

drq = timing.import_agent("drqv2_sparse")
ACTION_DIM = 12  # quadruped


@dataclass
class Args:
    reference: str | None = None
    """folder with a clone of drqv2"""
    width_scale: runs.Width = 1.0
    """of the critic, ours and theirs"""
    sparsity: runs.Sparsity = 0.0
    """of our critic; theirs is dense"""
    bf16: bool = False
    """our convolutions in bfloat16"""
    linear: bool = False
    """compare with masked dense layers, encoder left out"""
    batch_size: runs.Count = 256
    """transitions per update"""
    turns: runs.Count = 5
    """updates of each side"""
    threads: runs.Threads = None
    """CPU threads (default: all cores)"""


def make_replay(folder: str, frames: int = 20_000) -> drq.FrameReplay:
    """Random frames in episodes of 500 decisions."""
    replay = drq.FrameReplay(Path(folder) / "replay.u8", frames, 0, ACTION_DIM, 3, 0.99)
    choose_action = partial(np.random.default_rng(0).uniform, -1, 1, ACTION_DIM)
    timing.fill_replay(replay, frames, (drq.SIZE, drq.SIZE, 3), choose_action)
    return replay


def our_side(args: Args, replay: drq.FrameReplay) -> Callable[[], None]:
    flags = drq.Args(width_scale=args.width_scale, sparsity=args.sparsity)
    agent = drq.Agent(flags, ACTION_DIM, timing.CPU)
    shape = (2, args.batch_size, ACTION_DIM)

    def update() -> None:
        batch = replay.sample(args.batch_size, timing.CPU)
        noises = drq.clipped_noise(flags, shape, 500_000, timing.CPU)
        drq.update(agent, batch, *noises, flags.tau, args.bf16)

    return update


def linear_side(args: Args, masked: bool) -> Callable[[], None]:
    """Critic and actor on fixed features; with masks, the same layers dense times masks."""
    flags = drq.Args(width_scale=args.width_scale, sparsity=0.0 if masked else args.sparsity)
    agent = drq.Agent(flags, ACTION_DIM, timing.CPU)
    if masked:
        for network in (agent.critic, agent.target_critic):
            timing.mask_network(drq, network, args.sparsity)
    features = torch.rand(args.batch_size, drq.Encoder.out_features)
    agent.encoder = lambda obs, bf16: features
    agent.encoder_optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    shape = (args.batch_size, ACTION_DIM)
    reward = torch.rand(args.batch_size)
    discount = torch.full((args.batch_size,), 0.97)
    batch = drq.Batch(None, 2 * torch.rand(shape) - 1, reward, discount, None)

    def update() -> None:
        noises = drq.clipped_noise(flags, (2, *shape), 500_000, timing.CPU)
        drq.update(agent, batch, *noises, flags.tau)

    return update


def their_side(args: Args) -> Callable[[], None]:
    for name in ("hydra", "omegaconf"):  # which their update does not use
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["omegaconf"].__dict__.setdefault("OmegaConf", None)
    theirs = timing.import_reference(args.reference, "drqv2", "drqv2")
    agent = theirs.DrQV2Agent(
        (9, drq.SIZE, drq.SIZE),
        (ACTION_DIM,),
        device="cpu",
        lr=1e-4,
        feature_dim=50,
        hidden_dim=round(1024 * args.width_scale),
        critic_target_tau=0.01,
        num_expl_steps=2000,
        update_every_steps=2,
        stddev_schedule="linear(1.0,0.1,500000)",
        stddev_clip=0.3,
        use_tb=False,
    )
    size = (args.batch_size, 9, drq.SIZE, drq.SIZE)
    obs, next_obs = np.random.default_rng(0).integers(0, 256, (2, *size), np.uint8)
    action = np.random.default_rng(1).uniform(-1, 1, (args.batch_size, ACTION_DIM))
    reward = np.ones((args.batch_size, 1), np.float32)
    discount = np.full((args.batch_size, 1), 0.97, np.float32)
    batch = (obs, action.astype(np.float32), reward, discount, next_obs)
    return lambda: agent.update(iter([batch]), 2)


def serve(connection: Connection, args: Args, side: str) -> None:
    """A process for one side, as its users would start it: times one update for each message."""
    timing.set_threads(drq, args.threads)
    with tempfile.TemporaryDirectory() as folder:
        if side == "theirs":
            function = their_side(args)
        elif args.linear:
            function = linear_side(args, masked=side == "masked dense")
        else:
            replay = make_replay(folder)
            sample = partial(replay.sample, args.batch_size, timing.CPU)
            function = sample if side == "our sampling" else our_side(args, replay)
        function()
        timing.answer(connection, function)


def start(args: Args, side: str) -> Connection:
    """The process of one side, when it is ready."""
    connection = timing.start_process(serve, args, side)
    timing.receive(connection)
    return connection


def main(args: Args) -> None:
    if args.reference and args.linear:
        timing.fail("--reference: the original has no sparse layers to compare; leave out --linear")
    if args.reference and not (Path(args.reference) / "drqv2.py").exists():
        timing.fail(f"--reference {args.reference}: no clone of drqv2")
    names = ["ours", "masked dense"] if args.linear else ["ours", "our sampling"]
    if args.reference and not args.linear:
        names.append("theirs")
    pages = os.environ.get("THP_MEM_ALLOC_ENABLE", "0")
    sides = {}
    for name in names:
        # Ours as drqv2_sparse.py sets it
        os.environ["THP_MEM_ALLOC_ENABLE"] = pages if name == "theirs" else "1"
        sides[name] = start(args, name)
    times = {name: [] for name in sides}
    for _ in range(args.turns):
        for name, connection in sides.items():
            connection.send(1)
            times[name].append(timing.receive(connection))
    for connection in sides.values():
        connection.send(0)  # ends its process
    for name, median in timing.medians(times).items():
        print(f"{name:<14}{median:9.1f} ms")
    if names[-1] != "our sampling":
        found = timing.compare_turns(times["ours"], times[names[-1]])
        print(f"ratios of single turns: {found['low']:.3f} to {found['high']:.3f}")
        print(f"ratio time={found['ratio']:.3f}")


if __name__ == "__main__":
    runs.start(main, Args)
