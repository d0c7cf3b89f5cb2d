"""What becomes of a list of agents' commands, one a line on standard input: how long they take, which are finished.

    ./benchmark.sh fig3 --runner dry-run | python sparse_zoo/analysis/plan.py status
    ./benchmark.sh fig3 --runner dry-run | python sparse_zoo/analysis/plan.py link --output results/cpu/fig3/runs

status: one line for each run. unfinished: the commands that are still to be run, their number and core hours on
standard error. link: a folder with a link to each finished run, for the scripts that draw; every other run is named.

The estimate takes milliseconds of CPU time from docs/results/costs.csv, measured on one core by bench_costs.py: an
update's grow with the weights that are multiplied (fitted to the rows of each agent), a frame's depend on the task.
Finished runs count nothing, unfinished ones in full.
"""

import importlib
import json
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import numpy as np
import pandas as pd
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
COSTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "costs.csv"
EPISODE_FRAMES = {"der_impala_sparse": 6000}  # a rough figure for an Atari game; the others: 1000


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


def fail(message: str) -> NoReturn:
    """Ends the program with one line for a person and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


@cache
def parse_flags(agent: str, flags: str):
    """The agent's module and its Args for some flags."""
    module = importlib.import_module(agent)
    return module, tyro.cli(module.Args, args=shlex.split(flags))


def parse_command(command: str) -> Run:
    """The run of `python sparse_zoo/AGENT.py --flags`. Its folder is named as the agents name it."""
    script, _, flags = command.partition(".py ")
    agent = script.rpartition("/")[2]
    before, _, after = flags.partition("--seed ")  # seeds share what is slow
    seed, _, after = after.partition(" ")
    try:
        module, args = parse_flags(agent, before + after)
        args = replace(args, seed=int(seed))
    except (ImportError, ValueError) as error:
        if isinstance(error, ImportError) and error.name != agent:
            fail(f"{agent} cannot be imported ({error}); install requirements.txt")
        fail(f"not the command of an agent, with --seed: {command}")
    flags = {
        name: value for name, value in asdict(args).items() if name not in module.EXECUTION_FLAGS
    }
    digest = sha256(json.dumps({**flags, "seed": None}, sort_keys=True).encode()).hexdigest()[:8]
    env = args.env_id.replace("/", "-").replace(":", "-")
    folder = f"{env}__{args.exp_name}__{digest}__s{args.seed}"
    return Run(command, agent, args, Path(args.runs_dir) / folder)


def state(run: Run) -> str:
    """finished, absent, or how far it is."""
    try:
        metrics = (run.folder / "metrics.csv").read_text(errors="replace")
    except OSError:
        return "absent"
    interrupted = (run.folder / "checkpoint.tmp").exists()  # while the last checkpoint was written
    if ",final/return_mean," in metrics and not interrupted:
        return "finished"
    reached = metrics.rstrip().rpartition("\n")[2].partition(",")[0]
    return (
        f"at env step {int(reached):,} of {run.flags.total_timesteps:,}"
        if reached.isdigit()
        else "just started"
    )


def multiplied(
    agent: str, width: float, depth: float, sparsity: float
) -> tuple[float, float, float]:
    """What the milliseconds of an update are linear in: 1, weights in dense and weights in packed products.

    In multiples of the weights of the default network, those that grow with width and depth.
    """
    size = width**2 * depth
    least = {"stream_ac_sparse": 1e-9, "der_impala_sparse": 1}.get(
        agent, 0.75
    )  # DER's convolutions are never packed
    packed = sparsity >= least
    return 1.0, 0.0 if packed else size, size * (1 - sparsity) if packed else 0.0


def fit_updates(agent: str, rows: pd.DataFrame) -> np.ndarray:
    """Milliseconds for each part of `multiplied`, from measured updates.

    Weighted by 1 / ms, so that the fit is as good in proportion for small networks as for large ones.
    """
    design = np.array(
        [
            multiplied(agent, row.width_scale, row.depth_scale, row.sparsity)
            for row in rows.itertuples()
        ]
    )
    return np.linalg.lstsq(design / rows.ms.to_numpy()[:, None], np.ones(len(rows)), rcond=None)[0]


def core_hours(run: Run, costs: pd.DataFrame) -> float:
    """Estimate for a whole run; NaN if its agent was never measured."""
    flags = run.flags
    rows, repeat = costs[costs.agent == run.agent], getattr(flags, "action_repeat", 1)
    updates, frames = rows[rows.what == "update"], rows[rows.what == "frame"]
    if updates.empty or frames.empty:
        return np.nan
    law = fit_updates(run.agent, updates)
    update_ms = law @ multiplied(run.agent, flags.width_scale, flags.depth_scale, flags.sparsity)
    batch = getattr(flags, "batch_size", 1) / updates.batch_size.iloc[0]
    decisions = max(0, flags.total_timesteps - flags.learning_starts) / repeat
    each = getattr(flags, "updates_per_step", 1) / getattr(flags, "decisions_per_update", 1)
    task = frames[frames.env_id == flags.env_id]
    frame_ms = (task if len(task) else frames).ms.mean()
    episodes = (
        flags.final_eval_episodes
        + (1 + flags.total_timesteps // flags.eval_interval) * flags.eval_episodes
    )
    frames = flags.total_timesteps + episodes * EPISODE_FRAMES.get(run.agent, 1000)
    milliseconds = decisions * each * batch * update_ms + frames * frame_ms
    return milliseconds / 3.6e6


def describe(count: int, todo: list[Run]) -> str:
    """How many of some runs are still to be run, and how long that takes."""
    costs = pd.read_csv(COSTS)
    hours = np.array([core_hours(run, costs) for run in todo])
    text = f"{count} runs, {count - len(todo)} of them finished; the rest takes about {np.nansum(hours):,.1f} core hours"
    if unknown := int(np.isnan(hours).sum()):
        text += f", without {unknown} runs of agents whose time was not measured"
    return text


def link(runs: list[Run], states: list[str], output: Path) -> None:
    """Links to the finished runs in an otherwise empty folder; names the others."""
    if "finished" not in states:
        fail(
            f"nothing to draw: none of these {len(runs)} runs is finished in {runs[0].folder.parent}"
        )
    output.mkdir(parents=True, exist_ok=True)
    for old in output.iterdir():
        if old.is_symlink():
            old.unlink()
    for run, how in zip(runs, states):
        if how == "finished":
            (output / run.folder.name).symlink_to(run.folder.resolve())
        else:
            print(f"missing: {run.folder} is {how}")


if __name__ == "__main__":
    args = tyro.cli(Args)
    runs = [parse_command(line) for line in sys.stdin.read().splitlines()]
    if not runs:
        fail("no commands on standard input")
    states = [state(run) for run in runs]
    if args.action == "unfinished":
        todo = [run for run, how in zip(runs, states) if how != "finished"]
        print(describe(len(runs), todo), file=sys.stderr)
        for run in todo:
            print(run.command)
    else:
        if args.action == "link":
            link(runs, states, Path(args.output))
        else:
            for run, how in zip(runs, states):
                print(f"{how}: {run.folder}")
        print(f"{states.count('finished')} of {len(runs)} runs are finished")
