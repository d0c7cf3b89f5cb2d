"""Env steps per second of Stream AC(lambda), ours against the code of Elsayed et al. (2024).

    git clone https://github.com/mohmdelsayed/streaming-drl
    python sparse_zoo/bench/bench_stream.py --reference streaming-drl --width-scale 8 --sparsity 0.9
    python sparse_zoo/bench/bench_stream.py --reference streaming-drl --table

Both sides act, step the environment and learn, in one process, on one thread, in turns, each with
its own wrappers; theirs is dense at the same width. The figures are env steps per second of CPU
time, medians over the turns. Without --reference ours runs alone, followed by where its time goes.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from types import ModuleType
from typing import Annotated, Literal

import timing
import gymnasium as gym
import numpy as np
import torch
from timing import runs

ours = timing.import_agent("stream_ac_sparse")
PARTS = ("act", "environment", "normalise", "learn")


@dataclass
class Args:
    reference: str | None = None
    """folder with a clone of streaming-drl"""
    env_id: str = "Walker2d-v4"
    """which task"""
    width_scale: runs.Width = 1.0
    """hidden units of both sides: 128 x scale"""
    sparsity: runs.Sparsity = 0.0
    """of ours"""
    sparse_kernel: Literal["auto", "packed", "dense"] = "auto"
    """of ours"""
    turns: runs.Count = 7
    """turns of each side"""
    steps: Annotated[int, "4 <= x <= 10**7"] = 1000
    """env steps in a turn of ours; theirs takes a quarter of it"""
    table: bool = False
    """width scales 1, 4 and 8 by sparsities 0 and 0.9, as a Markdown table"""


def stream_ours(args: Args, spent: Counter) -> Iterator[None]:
    """Trains our agent; one env step each time it is asked.

    Adds the CPU seconds of each of PARTS to `spent`.
    """
    size = {"width_scale": args.width_scale, "sparsity": args.sparsity}
    flags = ours.Args(env_id=args.env_id, sparse_kernel=args.sparse_kernel, init="lecun", **size)
    env = ours.make_env(flags)
    obs_dim = env.observation_space.shape[0]
    action_dim = env.action_space.shape[0]
    agent = ours.Agent(flags, obs_dim, action_dim)
    norm = ours.Normalizer(obs_dim, flags.gamma, ours.episode_limit(env))
    done = True
    episode = 0
    while True:
        if done:
            obs, _ = env.reset(seed=episode)
            state = norm.state(obs, 0)
            length = 0
            episode += 1
        moments = [time.process_time()]
        action, output = ours.act(agent, state, np.random.standard_normal(action_dim))
        moments.append(time.process_time())
        obs, reward, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
        length += 1
        moments.append(time.process_time())
        next_state = norm.state(obs, length)
        reward = norm.scale(reward, done)
        transition = ours.Transition(state, action, reward, next_state, terminal=done)
        moments.append(time.process_time())
        ours.update(agent, transition, output, done, flags)
        moments.append(time.process_time())
        for name, seconds in zip(PARTS, np.diff(moments)):
            spent[name] += seconds
        state = next_state
        yield


def stream_theirs(args: Args, theirs: ModuleType) -> Iterator[None]:
    """Trains their agent in their wrappers, as their main function does."""
    env = gym.wrappers.FlattenObservation(gym.make(args.env_id))
    env = gym.wrappers.ClipAction(gym.wrappers.RecordEpisodeStatistics(env))
    env = theirs.NormalizeObservation(theirs.ScaleReward(env, gamma=0.99))
    env = theirs.AddTimeInfo(env)
    obs_dim = env.observation_space.shape[0]
    agent = theirs.StreamAC(obs_dim, env.action_space.shape[0], round(128 * args.width_scale))
    done = True
    while True:
        if done:
            state, _ = env.reset()
        action = agent.sample_action(state)
        next_state, reward, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
        agent.update_params(state, action, reward, next_state, done, 0.01)
        state = next_state
        yield


def compare(args: Args, theirs: ModuleType | None) -> dict[str, float]:
    """Medians over the turns: speeds, their ratio, and our microseconds a step part by part."""
    spent = Counter()
    streams = {"ours": stream_ours(args, spent)}
    steps = {"ours": args.steps}
    if theirs:
        streams["theirs"] = stream_theirs(args, theirs)
        steps["theirs"] = args.steps // 4
    for stream in streams.values():
        timing.measure(stream.__next__, repeats=100)  # compiles
    spent.clear()
    speeds = {side: [] for side in streams}
    for _ in range(args.turns):
        for side, stream in streams.items():
            milliseconds = timing.measure(stream.__next__, time.process_time, steps[side])
            speeds[side].append(1000 / milliseconds)
    result = timing.medians(speeds)
    if theirs:
        result |= timing.compare_turns(speeds["ours"], speeds["theirs"])
    for part in PARTS:
        result[part] = 1e6 * spent[part] / (args.turns * args.steps)
    return result


def print_table(args: Args, theirs: ModuleType | None) -> None:
    """Measures widths by sparsities; prints a row of a Markdown table for each."""
    names = ("hidden", "sparsity", "theirs, steps/s", "ours, steps/s", "ratio")
    timing.print_header(*names, *PARTS)
    for width_scale, sparsity in product((1.0, 4.0, 8.0), (0.0, 0.9)):
        size = {"width_scale": width_scale, "sparsity": sparsity}
        found = {"theirs": np.nan, "ratio": np.nan} | compare(replace(args, **size), theirs)
        timing.print_cells(
            f"{round(128 * width_scale)}",
            f"{sparsity:g}",
            f"{found['theirs']:.0f}",
            f"{found['ours']:.0f}",
            f"{found['ratio']:.1f}",
            *(f"{found[part]:.0f}" for part in PARTS),
        )


def print_row(args: Args, theirs: ModuleType | None) -> None:
    """Measures one width and sparsity."""
    found = compare(args, theirs)
    print("ours, microseconds: " + ", ".join(f"{part} {found[part]:.0f}" for part in PARTS))
    print(f"ours    {found['ours']:6.0f} env steps per second")
    if theirs:
        print(f"theirs  {found['theirs']:6.0f} env steps per second, dense")
        print(f"ratios of single turns: {found['low']:.1f} to {found['high']:.1f}")
        print(f"ratio speed={found['ratio']:.2f}")


def main(args: Args) -> None:
    torch.set_num_threads(1)
    theirs = None
    if args.reference:
        theirs = timing.import_reference(args.reference, "stream_ac_continuous", "streaming-drl")
    (print_table if args.table else print_row)(args, theirs)


if __name__ == "__main__":
    runs.start(main, Args)
