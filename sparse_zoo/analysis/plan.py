"""What becomes of a list of agents' commands, one a line on standard input.

    ./benchmark.sh fig3 --runner dry-run | python sparse_zoo/analysis/plan.py status
    ./benchmark.sh fig3 --runner dry-run | python sparse_zoo/analysis/plan.py link --output links

status: one line for each run. unfinished: the commands that are still to be run, their number and
core hours on standard error. link: a folder with a link to each finished run, for the scripts that
draw; every other run is named.

The estimate takes milliseconds of CPU time from docs/results/costs.csv, measured on one core by
bench/bench_costs.py: an update's grow with the weights that are multiplied (fitted to the rows of
each agent), a frame's depend on the task. Finished runs count nothing, unfinished ones in full.
"""

import shlex
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import runs
import numpy as np
import pandas as pd
import tyro
from runs import COSTS, fail

EPISODE_FRAMES = {"der_impala_sparse": 6000}  # a rough figure for an Atari game; the others: 1000
# Least sparsity at which layers are packed (the others: 0.75); DER's convolutions never are
LEAST_PACKED = {"stream_ac_sparse": 1e-9, "der_impala_sparse": 1}
# The actor's share of the weights where it can be pruned too (SAC, DDPG: on humanoid, width 1)
ACTOR_SHARE = {"sac_simba_sparse": 0.033, "ddpg_simba_sparse": 0.033, "stream_ac_sparse": 0.5}
# Agents whose updates cost those of another one (magnitude pruning, which begins dense: more)
COSTS_OF = {"sac_simba_dynamic": "sac_simba_sparse"}


@dataclass
class Args:
    action: tyro.conf.Positional[Literal["status", "unfinished", "link"]]
    """what to do with the commands"""
    output: str = "results/runs"
    """folder of the links; links that are already there are removed"""


class Run(NamedTuple):
    command: str
    agent: str
    flags: object
    """the agent's Args"""
    folder: Path


@cache
def parse_flags(agent: str, flags: tuple[str, ...]):
    """An agent's Args for some flags, checked by its rules."""
    module = runs.import_agent(agent)
    try:
        args = runs.parse_flags(module.Args, list(flags))
    except SystemExit as end:
        if end.code:
            raise
        fail("a command with --help is no run; take it out of FLAGS")
    module.check_flags(args)
    return args


def parse_command(command: str) -> Run:
    """The run of `python sparse_zoo/AGENT.py --flags`."""
    agent = ""
    try:
        words = shlex.split(command)
        script = [word.endswith(".py") for word in words].index(True)
        agent = Path(words[script]).stem
        flags = []
        for word in words[script + 1 :]:  # --flag=value is two words
            flags += word.split("=", 1) if word.startswith("--") else [word]
        place = len(flags) - 1 - flags[::-1].index("--seed")  # the last one counts
        others = (*flags[:place], *flags[place + 2 :])  # seeds share what is slow
        args = replace(parse_flags(agent, others), seed=int(flags[place + 1]))
    except (ImportError, IndexError, ValueError) as error:
        if isinstance(error, ImportError) and error.name != agent:
            fail(f"{agent} cannot be imported ({error}); install requirements.txt")
        fail(f"not the command of an agent, with --seed: {command}")
    return Run(command, agent, args, runs.import_agent(agent).run_folder(args))


def find_state(run: Run) -> str:
    """finished, absent, damaged, longer than the command asks for, or how far a run is."""
    if not (run.folder / "metrics.csv").exists():
        return "absent"
    total = run.flags.total_timesteps
    try:
        metrics = runs.load_run(run.folder).metrics
        if metrics.env_step.max() - total >= getattr(run.flags, "action_repeat", 1):
            return f"longer: at env step {metrics.env_step.max():,} of {total:,}"
        return runs.describe_state(metrics, total)
    except runs.UnusableError as reason:
        return f"damaged: {reason}"


def multiplied(
    agent: str, width: float, depth: float, sparsity: float
) -> tuple[float, float, float]:
    """What the milliseconds of an update are linear in: 1, weights in dense and in packed products.

    In multiples of the weights of the default network, those that grow with width and depth.
    """
    size = width**2 * depth
    if sparsity >= LEAST_PACKED.get(agent, 0.75):
        return 1.0, 0.0, size * (1 - sparsity)
    return 1.0, size, 0.0


def fit_updates(agent: str, rows: pd.DataFrame) -> np.ndarray:
    """Milliseconds for each part of `multiplied`, from measured updates.

    Weighted by 1 / ms, so that the fit is as good in proportion for small networks as for large.
    """
    sizes = rows[["width_scale", "depth_scale", "sparsity"]].to_numpy()
    design = np.array([multiplied(agent, *size) for size in sizes])
    return np.linalg.lstsq(design / rows.ms.to_numpy()[:, None], np.ones(len(rows)), rcond=None)[0]


def core_hours(run: Run, costs: pd.DataFrame) -> float:
    """Estimate for a whole run; NaN if its agent was never measured."""
    flags = run.flags
    rows = costs[costs.agent == COSTS_OF.get(run.agent, run.agent)]
    updates = rows[rows.what == "update"]
    frames = rows[rows.what == "frame"]
    if updates.empty or frames.empty:
        return np.nan
    law = fit_updates(run.agent, updates)
    actor, critic = (
        law @ multiplied(run.agent, flags.width_scale, flags.depth_scale, sparsity)
        for sparsity in runs.network_sparsities(vars(flags))
    )
    share = ACTOR_SHARE.get(COSTS_OF.get(run.agent, run.agent), 0.0)
    update_ms = share * actor + (1 - share) * critic
    update_ms *= getattr(flags, "batch_size", 1) / updates.batch_size.iloc[0]
    decisions = max(0, flags.total_timesteps - flags.learning_starts)
    decisions /= getattr(flags, "action_repeat", 1)
    per_decision = getattr(flags, "updates_per_step", 1)
    per_decision /= getattr(flags, "decisions_per_update", 1)
    task = frames[frames.env_id == flags.env_id]
    frame_ms = (task if len(task) else frames).ms.mean()
    evaluations = 1 + flags.total_timesteps // flags.eval_interval
    episodes = flags.final_eval_episodes + evaluations * flags.eval_episodes
    total_frames = flags.total_timesteps + episodes * EPISODE_FRAMES.get(run.agent, 1000)
    return (decisions * per_decision * update_ms + total_frames * frame_ms) / 3.6e6


def describe(count: int, todo: list[Run]) -> str:
    """How many of some runs are still to be run, and how long that takes."""
    costs = pd.read_csv(COSTS)
    hours = np.array([core_hours(run, costs) for run in todo])
    text = f"{count} runs, {count - len(todo)} of them finished; "
    text += f"the rest takes about {np.nansum(hours):,.1f} core hours"
    unknown = np.isnan(hours).sum()
    if unknown:
        text += f", without {unknown} runs of agents whose time was not measured"
    return text


def link(planned: list[Run], states: list[str], output: str) -> None:
    """Links to the finished runs in an otherwise empty folder; names the others."""
    if "finished" not in states:
        where = planned[0].folder.parent
        fail(f"nothing to draw: none of these {len(planned)} runs is finished in {where}")
    output = runs.make_folder(output)
    for old in output.iterdir():
        if old.is_symlink():
            old.unlink()
    for run, state in zip(planned, states):
        if state == "finished":
            (output / run.folder.name).symlink_to(run.folder.resolve())
        else:
            print(f"missing: {run.folder} is {state}")


def main(args: Args) -> None:
    planned = [parse_command(line) for line in sys.stdin.read().splitlines()]
    if not planned:
        fail("no commands on standard input; pipe ./benchmark.sh TARGET --runner dry-run into this")
    if len({run.folder for run in planned}) < len(planned):
        fail("several commands have the same run folder; take --seed and the like out of FLAGS")
    states = [find_state(run) for run in planned]
    if args.action == "unfinished":
        todo = [run for run, state in zip(planned, states) if state != "finished"]
        print(describe(len(planned), todo), file=sys.stderr)
        for run in todo:
            print(run.command)
        return
    if args.action == "link":
        link(planned, states, args.output)
    else:
        for run, state in zip(planned, states):
            print(f"{state}: {run.folder}")
    print(f"{states.count('finished')} of {len(planned)} runs are finished")


if __name__ == "__main__":
    runs.start(main, Args)
