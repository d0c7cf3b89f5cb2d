"""Figures 12, 13 and 17 of the paper from runs of stream_ac_sparse.py; and the same numbers as files.

    python sparse_zoo/analysis/streaming.py --runs-dir runs --output results/streaming

Returns are those of training episodes, as in Elsayed et al. (2024). A curve is the mean over the episodes that end in
a stretch of --bin env steps; a run's final return is the mean over the episodes of its last tenth. Runs that are not
finished are named and left out. Seeds are averaged; bands reach from the lowest to the highest seed. The table gives
Student's 95 % interval of the mean over seeds, which is wide for few seeds, as it should be.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import pandas as pd
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from scipy import stats

KEYS = ["env_id", "width_scale", "init", "sparsity"]
# Flags that may differ between the runs of one figure; others must not
FREE = {
    *KEYS,
    "seed",
    "mask_seed",
    "device",
    "threads",
    "runs_dir",
    "resume",
    "eval_only",
    "capture_video",
}
FREE |= {"sparse_kernel", "track", "wandb_project", "wandb_entity", "checkpoint_interval"}
FREE |= {"eval_interval", "eval_episodes", "final_eval_episodes", "diagnostics_interval"}
# Okabe and Ito's colours, which colour-blind readers tell apart
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#999933"]


@dataclass
class Args:
    runs_dir: str = "runs"
    """folder that holds one folder per run"""
    output: str = "results/streaming"
    """folder of the figures and the numbers"""
    figures: tuple[Literal[12, 13, 17], ...] = (12, 13, 17)
    """which to draw; those that need SparseInit runs (13) or runs without it (12, 17) are left out without them"""
    bin: int = 20_000
    """env steps averaged into one point of a curve"""


def fail(message: str) -> NoReturn:
    """Ends the program with one line for a person and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def load(runs_dir: Path) -> pd.DataFrame:
    """One row per training episode of every finished run: KEYS, seed, total_timesteps, env_step, return, length."""
    tables, settings = {}, {}
    for path in sorted(runs_dir.glob("*/args.json")):
        try:
            flags = json.loads(path.read_text())["args"]
        except (OSError, ValueError, KeyError) as error:
            print(
                f"left out: {path.parent.name} has no readable args.json ({type(error).__name__})"
            )
            continue
        if re.search(r"\.old\d+$", path.parent.name):
            print(f"left out: {path.parent.name} was moved aside by --no-resume")
            continue
        if flags["exp_name"] != "stream_ac_sparse":
            print(f"left out: {path.parent.name} is a run of {flags['exp_name']}")
            continue
        try:
            metrics = pd.read_csv(
                path.parent / "metrics.csv", usecols=["env_step", "metric", "value"]
            )
        except (OSError, ValueError):
            metrics = pd.DataFrame(columns=["env_step", "metric", "value"])
        if not (metrics.metric == "final/return_mean").any():
            reached = metrics.env_step.max() if len(metrics) else 0
            print(
                f"left out: {path.parent.name} is at env step {reached} of {flags['total_timesteps']}"
            )
            continue
        key = tuple(flags[name] for name in [*KEYS, "seed"])
        if key in tables:
            print(f"left out: {path.parent.name} is a second run of this network, task and seed")
            continue
        for name in flags.keys() - FREE:
            settings.setdefault(name, set()).add(flags[name])
        episodes = metrics[metrics.metric.isin(["episode/return", "episode/length"])]
        episodes = episodes.pivot(index="env_step", columns="metric", values="value").reset_index()
        episodes = episodes.rename(columns={"episode/return": "return", "episode/length": "length"})
        names = [*KEYS, "seed", "total_timesteps"]
        columns = [*names, "env_step", "return", "length"]
        tables[key] = episodes.assign(**{name: flags[name] for name in names}).reindex(
            columns=columns
        )
    if not sum(map(len, tables.values())):
        fail(f"no finished run of stream_ac_sparse with an episode that ended, in {runs_dir}")
    mixed = {name: sorted(map(str, values)) for name, values in settings.items() if len(values) > 1}
    if mixed:
        fail(f"the runs in {runs_dir} differ in {mixed}; keep such runs apart")
    return pd.concat(tables.values(), ignore_index=True)


def curves(episodes: pd.DataFrame, size: int) -> pd.DataFrame:
    """Mean return per bin, named after its end, one row per KEYS, bin and seed."""
    steps = np.ceil(episodes.env_step / size).astype(int) * size
    return (
        episodes.assign(env_step=steps)
        .groupby([*KEYS, "seed", "env_step"])["return"]
        .mean()
        .reset_index()
    )


def final_returns(episodes: pd.DataFrame) -> pd.DataFrame:
    """Mean return over the episodes of the last tenth of each run, one row per KEYS and seed."""
    last = episodes[episodes.env_step > 0.9 * episodes.total_timesteps]
    return last.groupby([*KEYS, "seed"])["return"].mean().reset_index()


def name_missing(episodes: pd.DataFrame, final: pd.DataFrame) -> list[str]:
    """One line for each run without a final return."""
    runs = episodes[[*KEYS, "seed"]].drop_duplicates().merge(final, how="left", on=[*KEYS, "seed"])
    return [
        f"no final return: {run.env_id}, width scale {run.width_scale:g}, {name(run.init, run.sparsity)}, "
        f"seed {run.seed}: no episode ended in its last tenth"
        for run in runs[runs["return"].isna()].itertuples()
    ]


def table(final: pd.DataFrame) -> pd.DataFrame:
    """Seeds, mean, and the ends of Student's 95 % interval (empty for one seed), one row per KEYS."""
    rows = []
    for key, group in final.groupby(KEYS):
        values = group["return"].to_numpy()
        low = high = np.nan
        if len(values) > 1:
            low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
        rows.append(
            [
                *key,
                len(values),
                values.mean(),
                low,
                high,
                " ".join(f"{value:.0f}" for value in values),
            ]
        )
    return pd.DataFrame(rows, columns=[*KEYS, "seeds", "mean", "low", "high", "values"])


def name(init: str, sparsity: float) -> str:
    parts = ["SparseInit"] if init == "sparse_init" else []
    parts += [f"sparsity {sparsity:g}"] if sparsity else []
    return " + ".join(parts) or "dense"


def draw_curves(ax: Axes, data: pd.DataFrame, colours: dict[str, str]) -> None:
    """Mean over seeds, and a band from the lowest to the highest, for each variant of one task and width."""
    if data.empty:
        ax.text(0.5, 0.5, "no finished run", ha="center", transform=ax.transAxes)
        return
    for (init, sparsity), variant in data.groupby(["init", "sparsity"]):
        seeds = variant.pivot(index="env_step", columns="seed", values="return")
        label = f"{name(init, sparsity)} ({seeds.shape[1]} seed{'s' * (seeds.shape[1] > 1)})"
        colour = colours[name(init, sparsity)]
        ax.plot(seeds.index, seeds.mean(axis=1), color=colour, lw=1.3, label=label)
        ax.fill_between(
            seeds.index, seeds.min(axis=1), seeds.max(axis=1), color=colour, alpha=0.15, lw=0
        )
    ax.set(xlabel="env steps", ylabel="training return")
    ax.xaxis.set_major_formatter(EngFormatter(sep=" "))
    ax.legend(frameon=False, fontsize=7)


def figure_17(data: pd.DataFrame, colours: dict[str, str]) -> Figure:
    """Learning curves: a row for each task, a column for each width, static sparsity only."""
    data = data[data.init == "lecun"]
    tasks, widths = sorted(data.env_id.unique()), sorted(data.width_scale.unique())
    axes = (figure := Figure((4 * len(widths), 3.2 * len(tasks)), layout="constrained")).subplots(
        len(tasks), len(widths), squeeze=False, sharey="row"
    )
    for row, task in zip(axes, tasks):
        for ax, width in zip(row, widths):
            draw_curves(ax, data[(data.env_id == task) & (data.width_scale == width)], colours)
            ax.set_title(f"{task}, {round(128 * width)} hidden units", fontsize=9)
    return figure


def figure_13(data: pd.DataFrame, colours: dict[str, str]) -> Figure:
    """Static sparsity, SparseInit and both, at the smallest width for which SparseInit was run."""
    data = data[data.width_scale == data[data.init == "sparse_init"].width_scale.min()]
    tasks = sorted(data.env_id.unique())
    axes = (figure := Figure((4.4 * len(tasks), 3.4), layout="constrained")).subplots(
        1, len(tasks), squeeze=False
    )[0]
    for ax, task in zip(axes, tasks):
        draw_curves(ax, data[data.env_id == task], colours)
        ax.set_title(f"{task}, {round(128 * data.width_scale.iloc[0])} hidden units", fontsize=9)
    return figure


def figure_12(final: pd.DataFrame, colours: dict[str, str]) -> Figure:
    """Final return against width, a line for each sparsity, a dot for each seed."""
    final = final[final.init == "lecun"]
    tasks = sorted(final.env_id.unique())
    axes = (figure := Figure((4 * len(tasks), 3.4), layout="constrained")).subplots(
        1, len(tasks), squeeze=False
    )[0]
    for ax, task in zip(axes, tasks):
        for sparsity, variant in final[final.env_id == task].groupby("sparsity"):
            colour, mean = (
                colours[name("lecun", sparsity)],
                variant.groupby("width_scale")["return"].mean(),
            )
            ax.plot(
                mean.index,
                mean,
                color=colour,
                marker="_",
                ms=12,
                lw=1.2,
                label=name("lecun", sparsity),
            )
            ax.plot(variant.width_scale, variant["return"], ".", color=colour, ms=5)
        ax.set_xscale("log", base=2)
        ax.set_xticks(
            sorted(final.width_scale.unique()),
            [f"{width:g}" for width in sorted(final.width_scale.unique())],
        )
        ax.set(title=task, xlabel="width scale", ylabel="training return, last tenth")
        ax.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.bin < 1:
        fail(f"--bin {args.bin}: must be at least 1")
    episodes = load(Path(args.runs_dir))
    data, final = curves(episodes, args.bin), final_returns(episodes)
    for line in name_missing(episodes, final):
        print(line)
    variants = episodes[["init", "sparsity"]].drop_duplicates().sort_values(["init", "sparsity"])
    colours = {
        name(*variant): COLOURS[index % len(COLOURS)]
        for index, variant in enumerate(variants.to_numpy())
    }
    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write to {output} ({error.strerror}); choose another folder with --output")
    compact = episodes.drop(columns="total_timesteps").assign(
        **{"return": episodes["return"].round(2)}
    )
    compact.astype({"length": int}).to_csv(
        output / "returns.csv.gz", index=False, compression={"method": "gzip", "mtime": 0}
    )
    figures = {}
    for number in args.figures:
        init = "sparse_init" if number == 13 else "lecun"
        if not ((final if number == 12 else episodes).init == init).any():
            what = "final return" if number == 12 else "finished run"
            print(f"not drawn: figure {number}, for lack of a {what} with --init {init}")
        elif number == 12:
            figures["figure_12"] = figure_12(final, colours)
        else:
            figures[f"figure_{number}"] = (figure_13 if number == 13 else figure_17)(data, colours)
    for file, figure in figures.items():
        for kind in ("png", "svg"):
            figure.savefig(output / f"{file}.{kind}", dpi=150)
    summary = table(final)
    summary.to_csv(output / "final_returns.csv", index=False, float_format="%.5g")
    print(summary.to_string(index=False, float_format="{:.4g}".format))
    print(f"{', '.join([*figures, 'final_returns.csv'])} and returns.csv.gz are in {output}")
    if not figures:
        sys.exit(2)
