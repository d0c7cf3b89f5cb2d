"""Evaluation returns over training, task by task, beside published curves; and the same numbers as one small file.

    python sparse_zoo/analysis/learning_curves.py --runs-dir runs --output results/learning_curves

Every run of the folder is drawn as a line of its own, unfinished ones as far as they came. The published curves (mean
and one standard deviation over 10 seeds, dense networks) are those of the SimBa repository (SonyResearch/simba,
Apache-2.0): docs/results/published_curves_dmc.csv.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure

PUBLISHED = Path(__file__).resolve().parents[2] / "docs" / "results" / "published_curves_dmc.csv"
ALGORITHMS = {"sac_simba_sparse": "SAC SimBa", "ddpg_simba_sparse": "DDPG SimBa"}
FLAGS = ["exp_name", "env_id", "width_scale", "depth_scale", "sparsity", "actor_sparsity", "critic_sparsity", "seed"]


@dataclass
class Args:
    runs_dir: str = "runs"
    """folder that holds one folder per run"""
    output: str = "results/learning_curves"
    """folder of the figure and the numbers"""


def load(runs_dir: Path) -> pd.DataFrame:
    """One row per return: the flags that name a run, env_step, metric (eval/, final/ or episode/), value."""
    tables = []
    for path in sorted(runs_dir.glob("*/args.json")):
        flags = json.loads(path.read_text())["args"]
        metrics = pd.read_csv(path.parent / "metrics.csv", usecols=["env_step", "metric", "value"])
        metrics = metrics[metrics.metric.str.contains("/return")]
        tables.append(metrics.assign(**{name: flags.get(name) for name in FLAGS})[[*FLAGS, *metrics]])
    if not tables:
        print(f"error: no run in {runs_dir}", file=sys.stderr)
        sys.exit(2)
    return pd.concat(tables, ignore_index=True)


def published(exp_name: str, env_id: str) -> pd.DataFrame:
    """The published curve of a task: env_step, mean, std; empty if there is none."""
    curves = pd.read_csv(PUBLISHED)
    task = env_id.removeprefix("dm_control/").removesuffix("-v0").replace("-", "_")
    return curves[(curves.algorithm == ALGORITHMS.get(exp_name)) & (curves.task == task)]


def draw(returns: pd.DataFrame) -> Figure:
    """One panel per algorithm and task."""
    panels = returns.groupby(["exp_name", "env_id"])
    colours = {sparsity: f"C{index}" for index, sparsity in enumerate(np.sort(returns.sparsity.unique()))}
    axes = (figure := Figure((4.2 * len(panels), 3.6), layout="constrained")).subplots(1, len(panels), squeeze=False)[0]
    for ax, ((exp_name, env_id), panel) in zip(axes, panels):
        reference = published(exp_name, env_id)
        reference = reference[reference.env_step <= panel.env_step.max()]
        if len(reference):
            how = {"color": "0.4", "fmt": "s", "ms": 4, "capsize": 3, "label": "published, dense (mean, std)"}
            ax.errorbar(reference.env_step, reference["mean"], reference["std"], **how)
        evaluations = panel[panel.metric == "eval/return_mean"]
        for (sparsity, seed), run in evaluations.groupby(["sparsity", "seed"]):
            name = f"sparsity {sparsity:g}" if sparsity else "dense"
            ax.plot(run.env_step, run.value, color=colours[sparsity], marker="o", ms=3, label=f"{name}, seed {seed}")
        ax.set(title=f"{ALGORITHMS.get(exp_name, exp_name)}, {env_id}", xlabel="env steps", ylabel="evaluation return")
        ax.title.set_fontsize(9)
        ax.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    args = tyro.cli(Args)
    returns = load(Path(args.runs_dir))
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    returns.to_csv(output / "returns.csv.gz", index=False, compression={"method": "gzip", "mtime": 0})
    for kind in ("png", "svg"):
        draw(returns).savefig(output / f"learning_curves.{kind}", dpi=150)
    last = returns[returns.metric.isin(["eval/return_mean", "final/return_mean"])].groupby(FLAGS, dropna=False).tail(1)
    print(last[["exp_name", "env_id", "sparsity", "seed", "env_step", "metric", "value"]].to_string(index=False))
    print(f"figure and returns are in {output}")
