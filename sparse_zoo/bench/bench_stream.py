"""Env steps per second of Stream AC(lambda), ours against the code of Elsayed et al. (2024).

    git clone https://github.com/mohmdelsayed/streaming-drl
    python sparse_zoo/analysis/bench_stream.py --reference streaming-drl --width-scale 8 --sparsity 0.9
    python sparse_zoo/analysis/bench_stream.py --reference streaming-drl --table

Both sides act, step the environment and learn, in one process, on one thread, in turns, each with its own wrappers;
theirs is dense at the same width. The figures are env steps per second of CPU time, medians over the turns. Without
--reference ours runs alone, followed by where its time goes.
"""

import importlib
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import stream_ac_sparse as ours


@dataclass
class Args:
    reference: str | None = None
    """folder with a clone of streaming-drl"""
    env_id: str = "Walker2d-v4"
    """which task"""
    width_scale: float = 1.0
    """hidden units of both sides: 128 x scale"""
    sparsity: float = 0.0
    """of ours"""
    sparse_kernel: str = "auto"
    """of ours: auto, packed or dense"""
    turns: int = 7
    """turns of each side"""
    steps: int = 1000
    """env steps in a turn of ours; theirs takes a quarter of it"""
    table: bool = False
    """width scales 1, 4 and 8 by sparsities 0 and 0.9, as a Markdown table"""


def stream_ours(args: Args, spent: dict[str, float]) -> Iterator[None]:
    """Trains our agent; one env step each time it is asked. Adds the CPU seconds of each part to `spent`."""
    size = {"width_scale": args.width_scale, "sparsity": args.sparsity}
    flags = ours.Args(env_id=args.env_id, sparse_kernel=args.sparse_kernel, init="lecun", **size)
    env = ours.make_env(flags)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    agent = ours.Agent(flags, obs_dim, action_dim)
    norm, done, episode = ours.Normalizer(obs_dim, flags.gamma, ours.episode_limit(env)), True, 0
    while True:
        if done:
            obs, _ = env.reset(seed=episode)
            state, length, episode = norm.state(obs, 0), 0, episode + 1
        moments = [time.process_time()]
        action, output = ours.act(agent, state, np.random.standard_normal(action_dim))
        moments.append(time.process_time())
        obs, reward, terminated, truncated, _ = env.step(action)
        done, length = terminated or truncated, length + 1
        moments.append(time.process_time())
        next_state, reward = norm.state(obs, length), norm.scale(reward, done)
        moments.append(time.process_time())
        ours.update(agent, state, output, action, reward, next_state, done, done, flags)
        moments.append(time.process_time())
        for name, start, end in zip(
            ("act", "environment", "normalise", "learn"), moments, moments[1:]
        ):
            spent[name] = spent.get(name, 0.0) + end - start
        state = next_state
        yield


def stream_theirs(args: Args, theirs: ModuleType) -> Iterator[None]:
    """Trains their agent in their wrappers, as their main function does."""
    env = gym.wrappers.RecordEpisodeStatistics(
        gym.wrappers.FlattenObservation(gym.make(args.env_id))
    )
    env = theirs.ScaleReward(gym.wrappers.ClipAction(env), gamma=0.99)
    env = theirs.AddTimeInfo(theirs.NormalizeObservation(env))
    sizes = (
        env.observation_space.shape[0],
        env.action_space.shape[0],
        round(128 * args.width_scale),
    )
    agent, done = theirs.StreamAC(*sizes), True
    while True:
        if done:
            state, _ = env.reset()
        action = agent.sample_action(state)
        next_state, reward, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
        agent.update_params(state, action, reward, next_state, done, 0.01)
        state = next_state
        yield


def speed(stream: Iterator[None], steps: int) -> float:
    """Env steps per second of CPU time."""
    start = time.process_time()
    for _ in range(steps):
        next(stream)
    return steps / (time.process_time() - start)


def compare(args: Args, theirs: ModuleType | None) -> dict[str, float]:
    """Medians over the turns: speeds, their ratio, and our microseconds a step part by part."""
    spent: dict[str, float] = {}
    streams = {"ours": stream_ours(args, spent)} | (
        {"theirs": stream_theirs(args, theirs)} if theirs else {}
    )
    steps = {"ours": args.steps, "theirs": args.steps // 4}
    speeds = {side: [] for side in streams}
    for stream in streams.values():
        speed(stream, 100)  # compiles
    spent.clear()
    for _ in range(args.turns):
        for side, stream in streams.items():
            speeds[side].append(speed(stream, steps[side]))
    result = {side: statistics.median(values) for side, values in speeds.items()}
    if theirs:
        ratios = [a / b for a, b in zip(speeds["ours"], speeds["theirs"])]
        result |= {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return result | {
        part: 1e6 * seconds / (args.turns * args.steps) for part, seconds in spent.items()
    }


if __name__ == "__main__":
    args = tyro.cli(Args)
    warnings.filterwarnings("ignore", module="gymnasium")
    torch.set_num_threads(1)
    theirs = None
    if args.reference:
        sys.path.insert(0, args.reference)
        try:
            theirs = importlib.import_module("stream_ac_continuous")
        except ImportError as error:
            print(
                f"error: --reference {args.reference}: no clone of streaming-drl ({error})",
                file=sys.stderr,
            )
            sys.exit(2)
    cases = (
        [(w, s) for w in (1.0, 4.0, 8.0) for s in (0.0, 0.9)]
        if args.table
        else [(args.width_scale, args.sparsity)]
    )
    if args.table:
        print(
            "| hidden | sparsity | theirs, steps/s | ours, steps/s | ratio | act | environment | normalise | learn |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
    for width_scale, sparsity in cases:
        r = compare(replace(args, width_scale=width_scale, sparsity=sparsity), theirs)
        parts = [r[part] for part in ("act", "environment", "normalise", "learn")]
        if args.table:
            speeds = (
                f"{r.get('theirs', np.nan):.0f} | {r['ours']:.0f} | {r.get('ratio', np.nan):.1f}"
            )
            times = " | ".join(f"{part:.0f}" for part in parts)
            print(f"| {round(128 * width_scale)} | {sparsity:g} | {speeds} | {times} |", flush=True)
        else:
            print(
                "ours, microseconds: act {:.0f}, environment {:.0f}, normalise {:.0f}, learn {:.0f}".format(
                    *parts
                )
            )
            print(f"ours    {r['ours']:6.0f} env steps per second")
            if theirs:
                print(f"theirs  {r['theirs']:6.0f} env steps per second, dense")
                print(f"ratios of single turns: {r['low']:.1f} to {r['high']:.1f}")
                print(f"ratio speed={r['ratio']:.2f}")
