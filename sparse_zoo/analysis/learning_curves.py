"""Evaluation returns over training, task by task, beside published curves; and the same numbers as one small file.

    python sparse_zoo/analysis/learning_curves.py --runs-dir runs --output results/learning_curves
    python sparse_zoo/analysis/learning_curves.py --runs-dir runs --earlier returns.csv.gz --output results/both

Every run of the folder is drawn as a line of its own, unfinished ones as far as they came, and beside them those of
earlier calls. The published curves (mean and one standard deviation over seeds, dense networks) are those of the
repositories of SimBa (SonyResearch/simba, Apache-2.0) and DrQ-v2 (facebookresearch/drqv2, MIT), in docs/results. Atari
games show the scores of random play and of humans (atari26_scores.csv) where they are in the picture.
"""

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pandas as pd
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

PUBLISHED = sorted(
    (Path(__file__).resolve().parents[2] / "docs" / "results").glob("published_curves_*.csv")
)
ATARI = Path(__file__).with_name("atari26_scores.csv")
ALGORITHMS = {
    "sac_simba_sparse": "SAC SimBa",
    "ddpg_simba_sparse": "DDPG SimBa",
    "drqv2_sparse": "DrQ-v2",
    "der_impala_sparse": "DER IMPALA",
}
FLAGS = [
    "exp_name",
    "env_id",
    "width_scale",
    "depth_scale",
    "sparsity",
    "actor_sparsity",
    "critic_sparsity",
    "seed",
]
COLUMNS = ["run", *FLAGS, "env_step", "metric", "value"]


@dataclass
class Args:
    runs_dir: str = "runs"
    """folder that holds one folder per run"""
    earlier: tuple[str, ...] = ()
    """returns.csv.gz files that earlier calls left, whose runs are drawn as well"""
    output: str = "results/learning_curves"
    """folder of the figure and the numbers"""


def fail(message: str) -> NoReturn:
    """Ends the program with one line for a person and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def load(runs_dir: Path, earlier: tuple[str, ...] = ()) -> pd.DataFrame:
    """One row per return: run, the flags that name its network, env_step, metric (eval/, final/, episode/), value."""
    try:
        tables = [pd.read_csv(path)[COLUMNS] for path in earlier]
    except (OSError, ValueError, KeyError) as error:
        fail(f"--earlier {' '.join(earlier)}: {error}")
    for path in sorted(runs_dir.glob("*/args.json")):
        run = path.parent
        if re.search(r"\.old\d+$", run.name):
            continue  # moved aside by --no-resume
        try:
            flags = json.loads(path.read_text())["args"]
            metrics = pd.read_csv(run / "metrics.csv", usecols=["env_step", "metric", "value"])
        except (OSError, ValueError, KeyError):
            print(f"left out: {run.name} has no readable args.json and metrics.csv yet")
            continue
        metrics = metrics[metrics.metric.astype(str).str.contains("/return")]
        if metrics.empty:
            print(f"left out: {run.name} has no returns yet")
            continue
        tables.append(
            metrics.assign(run=run.name, **{name: flags.get(name) for name in FLAGS})[COLUMNS]
        )
    if not tables:
        fail(f"no run in {runs_dir}")
    return pd.concat(tables).drop_duplicates(
        ignore_index=True
    )  # a run may be among the earlier ones as well


def published(exp_name: str, env_id: str) -> pd.DataFrame:
    """The published curve of a task: env_step, mean, std; empty if there is none."""
    curves = pd.concat([pd.read_csv(path) for path in PUBLISHED])
    task = env_id.removeprefix("dm_control/").removesuffix("-v0").replace("-", "_")
    return curves[(curves.algorithm == ALGORITHMS.get(exp_name)) & (curves.task == task)]


def atari_scores(env_id: str) -> dict[str, float]:
    """Scores of random and human play, {} for what is not one of the 26 games of Atari-100k."""
    scores = pd.read_csv(ATARI, index_col="game")
    game = env_id.removeprefix("ALE/").removesuffix("-v5")
    return scores.loc[game].to_dict() if game in scores.index else {}


def network_names(panel: pd.DataFrame) -> pd.Series:
    """What a legend calls the network of each row: its sparsity, and those flags in which the networks differ."""
    names = panel.sparsity.map(lambda sparsity: f"sparsity {sparsity:g}" if sparsity else "dense")
    for flag in ("width_scale", "depth_scale", "actor_sparsity", "critic_sparsity"):
        values = panel[flag].astype(float)
        if values.nunique(dropna=False) > 1:
            given = values.map(lambda value, flag=flag: f", {flag.replace('_', ' ')} {value:g}")
            names += given.where(values.notna(), "")
    return names


def draw(returns: pd.DataFrame) -> Figure:
    """One panel per algorithm and task; the seeds of a network share a colour."""
    names = pd.concat(
        [network_names(panel) for _, panel in returns.groupby(["exp_name", "env_id"])]
    )
    returns = returns.assign(network=names).sort_values(["width_scale", "sparsity"], kind="stable")
    panels = returns.groupby(["exp_name", "env_id"])
    colours = {network: f"C{index % 10}" for index, network in enumerate(returns.network.unique())}
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure((4.2 * columns, 4.4 * rows), layout="constrained")
    axes = iter(figure.subplots(rows, columns, squeeze=False).flat)
    for ((exp_name, env_id), panel), ax in zip(panels, axes):
        reference = published(exp_name, env_id)
        reference = reference[reference.env_step <= panel.env_step.max()]
        if len(reference):
            how = {
                "color": "0.4",
                "fmt": "s",
                "ms": 4,
                "capsize": 3,
                "label": "published, dense, width 1 (mean, std)",
            }
            ax.errorbar(reference.env_step, reference["mean"], reference["std"], **how)
        evaluations = panel[panel.metric == "eval/return_mean"]
        for network, runs in evaluations.groupby("network", sort=False):
            count, seeds = runs.run.nunique(), runs.seed.nunique()
            what = (
                f"seed {runs.seed.iloc[0]}"
                if count == 1
                else f"{count} {'seeds' if count == seeds else 'runs'}"
            )
            label = f"{network}, {what}"
            for _, run in runs.groupby(["seed", "run"]):
                ax.plot(
                    run.env_step, run.value, color=colours[network], marker="o", ms=3, label=label
                )
                label = None
        low, high = evaluations.value.agg(["min", "max"])
        for play, score in atari_scores(env_id).items():
            if play == "random" or low <= score <= high:
                ax.axhline(
                    score, color="0.4", ls=":" if play == "random" else "--", label=f"{play} play"
                )
        ax.set(
            title=f"{ALGORITHMS.get(exp_name, exp_name)}, {env_id}",
            xlabel="env steps",
            ylabel="evaluation return",
        )
        ax.title.set_fontsize(9)
        ax.xaxis.set_major_formatter(EngFormatter(sep=" "))
        ax.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    for ax in axes:  # those that are left
        ax.axis("off")
    return figure


if __name__ == "__main__":
    args = tyro.cli(Args)
    returns = load(Path(args.runs_dir), args.earlier)
    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write to {output} ({error.strerror}); choose another folder with --output")
    returns.to_csv(
        output / "returns.csv.gz", index=False, compression={"method": "gzip", "mtime": 0}
    )
    for kind in ("png", "svg"):
        draw(returns).savefig(output / f"learning_curves.{kind}", dpi=150)
    last = (
        returns[returns.metric.isin(["eval/return_mean", "final/return_mean"])]
        .groupby("run")
        .tail(1)
    )
    print(
        last[["exp_name", "env_id", "sparsity", "seed", "env_step", "metric", "value"]].to_string(
            index=False
        )
    )
    print(f"figure and returns are in {output}")
