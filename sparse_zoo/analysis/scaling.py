"""Returns against the size and sparsity of networks: Figures 1, 2, 3, 8, 10, 14, 15 and 16 of the paper.

    python sparse_zoo/analysis/scaling.py --runs-dir results/cpu/fig2/runs --figure aggregate
    python sparse_zoo/analysis/scaling.py --runs-dir results/cpu/fig8/runs --figure gain
    python sparse_zoo/analysis/scaling.py --runs-dir runs --earlier others/runs.csv --figure sparsity

A run's return is that of its trained policy over the last evaluation (final/return_mean). Points are interquartile
means over seeds (and tasks) with their 95 % bootstrap interval, resampled within tasks; in Figures 15 and 16 mean and
standard deviation over seeds, as their captions say. Unfinished runs are named and left out, and so is a point of
Figures 2 and 8 that lacks a whole task. The CSV and Markdown tables have all of these numbers.
Docs: docs/benchmark.md.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import pandas as pd
import scipy.stats
import tyro
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, NullFormatter

PUBLISHED = sorted(
    (Path(__file__).resolve().parents[2] / "docs" / "results").glob("published_curves_*.csv")
)
ALGORITHMS = {"sac_simba_sparse": "SAC", "ddpg_simba_sparse": "DDPG", "drqv2_sparse": "DrQ-v2"}
POINT = [
    "algorithm",
    "env_id",
    "width_scale",
    "depth_scale",
    "sparsity",
]  # runs that differ in their seed only
COLUMNS = [
    "env_id",
    "width_scale",
    "depth_scale",
    "sparsity",
    "seed",
    "run",
    "algorithm",
    "weights",
    "active",
]
COLUMNS += ["env_steps", "return"]  # those of runs.csv
NETWORK = ["algorithm", "width_scale", "depth_scale", "sparsity"]
# Flags in which the runs of one algorithm in one figure may differ
FREE = {
    *POINT,
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
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
)  # that colour-blind readers tell apart
DENSE, SPARSE, *_ = COLOURS


@dataclass
class Args:
    figure: Literal[
        "size", "size-linear", "aggregate", "sparsity", "width", "depth", "gain", "bars"
    ] = "aggregate"
    """size: Figure 1; size-linear: Figure 14; aggregate: Figure 2; sparsity: Figure 3; width: Figure 15; depth: Figure
    16; gain: Figure 8; bars: Figure 10"""
    runs_dir: str = "runs"
    """folder that holds one folder per run"""
    earlier: tuple[str, ...] = ()
    """runs.csv files that earlier calls left, whose runs are counted as well"""
    scores: Path | None = None
    """scores.csv of simplicity_bias.py, drawn beside the gains"""
    output: str = "results/scaling"
    """folder of the picture and the tables"""


def fail(message: str) -> NoReturn:
    """Ends the program with one line for a person and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def load(runs_dir: Path, earlier: tuple[str, ...] = ()) -> tuple[pd.DataFrame, list[str]]:
    """A row for each finished run: run, seed, POINT, weights, active, env_steps, return; and a line for each other.

    Those of the tables `earlier` stand behind those of the folder. Ends the program if runs differ in flags that make
    averages and comparisons meaningless; of earlier runs only the number of env steps is known.
    """
    rows, left_out, settings = [], [], {}
    for folder in sorted(path for path in runs_dir.glob("[!.]*") if path.is_dir()):
        if re.search(r"\.old\d+$", folder.name):
            left_out.append(f"{folder.name}: moved aside by --no-resume")
            continue
        try:
            record = json.loads((folder / "args.json").read_text())
            flags, networks = record["args"], record["layers"].values()
            metrics = pd.read_csv(folder / "metrics.csv", usecols=["env_step", "metric", "value"])
        except (OSError, ValueError, KeyError) as error:
            left_out.append(
                f"{folder.name}: no readable args.json and metrics.csv ({type(error).__name__})"
            )
            continue
        final = metrics[metrics.metric == "final/return_mean"]
        if final.empty:
            left_out.append(
                f"{folder.name}: unfinished, at env step {metrics.env_step.max() if len(metrics) else 0:,}"
            )
            continue
        for name in flags.keys() - FREE:
            settings.setdefault((flags["exp_name"], name), set()).add(flags[name])
        layers = [layer for network in networks for layer in network]
        row = {
            name: flags[name]
            for name in ("env_id", "width_scale", "depth_scale", "sparsity", "seed")
        }
        row |= {
            "run": folder.name,
            "algorithm": ALGORITHMS.get(flags["exp_name"], flags["exp_name"]),
        }
        row |= {
            "weights": sum(layer["total"] for layer in layers),
            "active": sum(layer["active"] for layer in layers),
        }
        rows.append(
            row | {"env_steps": flags["total_timesteps"], "return": float(final.value.iloc[-1])}
        )
    for (agent, name), found in sorted(settings.items()):
        if len(found) > 1:
            flag = f"--{name.replace('_', '-')} {' and '.join(sorted(map(str, found)))}"
            fail(f"{runs_dir} mixes runs of {agent} with {flag}; keep such runs apart")
    try:
        rows += [row for path in earlier for row in pd.read_csv(path)[COLUMNS].to_dict("records")]
    except (OSError, ValueError, KeyError) as error:
        fail(f"--earlier {' '.join(earlier)}: {error}")
    if not rows:
        return pd.DataFrame(), left_out
    runs = pd.DataFrame(rows, columns=COLUMNS).drop_duplicates(
        "run"
    )  # a run may be among the earlier ones as well
    for algorithm, lengths in runs.groupby("algorithm").env_steps.unique().items():
        if len(lengths) > 1:
            fail(
                f"{algorithm} has runs of {' and '.join(f'{n:,}' for n in sorted(lengths))} env steps; keep such apart"
            )
    order = runs.algorithm.map(
        {name: index for index, name in enumerate(ALGORITHMS.values())}
    ).fillna(9)
    runs = (
        runs.assign(order=order)
        .sort_values(["order", *POINT[1:], "seed"], ignore_index=True)
        .drop(columns="order")
    )
    twice = runs.duplicated([*POINT, "seed"])
    left_out += [f"{name}: a second run of this network, task and seed" for name in runs.run[twice]]
    return runs[~twice].reset_index(drop=True), left_out


def interquartile_mean(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of the middle half of all values, whose axis `axis` runs over seeds, one array a task."""
    return scipy.stats.trim_mean(np.concatenate(tasks, axis), 0.25, axis)


def stratified_interval(
    tasks: list[np.ndarray], statistic: Callable = interquartile_mean
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a statistic of values per seed, resampled within each task.

    NaN if no task has two seeds.
    """
    if max(map(len, tasks)) < 2:
        return np.nan, np.nan
    # A second copy of a lone value: resampling draws it always, and scipy wants two
    how = {
        "method": "percentile",
        "n_resamples": 2000,
        "rng": np.random.default_rng(0),
        "vectorized": True,
    }
    sizes = [len(values) for values in tasks]

    def of_sizes(*resampled: np.ndarray, axis: int = -1) -> np.ndarray:
        return statistic(*(values[..., :size] for values, size in zip(resampled, sizes)), axis=axis)

    tasks = [np.repeat(values, 2) if len(values) == 1 else values for values in tasks]
    return tuple(scipy.stats.bootstrap(tasks, of_sizes, **how).confidence_interval)


def summarise(runs: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """A row for each combination of keys: weights, active, iqm, low, high, mean, std, tasks, fewest and most seeds."""
    rows = []
    for key, group in runs.groupby(keys, sort=False):
        tasks = [task["return"].to_numpy() for _, task in group.groupby("env_id")]
        values, seeds = np.concatenate(tasks), [len(task) for task in tasks]
        row = dict(zip(keys, key)) | {
            "weights": group.weights.mean(),
            "active": group.active.mean(),
        }
        row["iqm"], (row["low"], row["high"]) = (
            interquartile_mean(values),
            stratified_interval(tasks),
        )
        row["mean"], row["std"] = values.mean(), values.std(ddof=1) if len(values) > 1 else np.nan
        rows.append(row | {"tasks": len(tasks), "seeds_min": min(seeds), "seeds_max": max(seeds)})
    return pd.DataFrame(rows)


def without_gaps(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The runs of networks that were run on all tasks of their algorithm, and a line for each other network."""
    keep, left_out = [], []
    for algorithm, group in runs.groupby("algorithm", sort=False):
        tasks = set(group.env_id)
        for (_, width, depth, sparsity), network in group.groupby(NETWORK, sort=False):
            if lacking := sorted(tasks - set(network.env_id)):
                name = f"{algorithm}, width {width:g}, depth {depth:g}, sparsity {sparsity:g}"
                left_out.append(f"{name}: no finished run of {' '.join(lacking)}")
            else:
                keep.append(network)
    return (pd.concat(keep) if keep else runs.iloc[:0]), left_out


def find_uneven(points: pd.DataFrame) -> list[str]:
    """A line for each point with fewer seeds than others."""
    most = points.seeds_max.max()
    lines = []
    for row in points[points.seeds_min < most].itertuples():
        where = row.env_id if hasattr(row, "env_id") else "some task"
        name = f"{row.algorithm}, {where}, width {row.width_scale:g}, depth {row.depth_scale:g}"
        lines.append(f"{name}, sparsity {row.sparsity:g}: {row.seeds_min} of {most} seeds")
    return lines


def families(points: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Dense networks, and the sparse ones with the dense one in front that has as many active weights."""
    dense, sparse = points[points.sparsity == 0], points[points.sparsity > 0]
    if len(dense) and len(sparse):
        ratio = dense.active / sparse.active.median()
        anchor = dense[(ratio > 0.9) & (ratio < 1.1)]
        sparse = pd.concat([anchor.iloc[:1], sparse])
    return dense, sparse


def draw_line(ax: Axes, x, points: pd.DataFrame, spread: str = "interval", **style) -> None:
    """Interquartile means with intervals, or means with standard deviations."""
    middle = points["mean"] if spread == "std" else points.iqm
    low, high = (
        (points["std"], points["std"])
        if spread == "std"
        else (middle - points.low, points.high - middle)
    )
    error = np.array([low, high], float).clip(0)
    ax.errorbar(x, middle, error, capsize=2.5, elinewidth=1, **style)


STYLES = {
    "dense": {"color": DENSE, "ls": "--", "marker": "o", "ms": 5, "lw": 1.6},
    "sparse": {"color": SPARSE, "ls": "-", "marker": "*", "ms": 9, "lw": 1.6},
    "published": {"color": "0.2", "ls": "", "marker": "s", "ms": 5, "mfc": "white"},
}


def published(algorithm: str, env_id: str, env_steps: int) -> float | None:
    """The published mean return of the default dense network after as many env steps, if there is one."""
    table = pd.concat(map(pd.read_csv, PUBLISHED))
    task = env_id.removeprefix("dm_control/").removesuffix("-v0").replace("-", "_")
    rows = table[table.algorithm.isin([algorithm, f"{algorithm} SimBa"]) & (table.task == task)]
    rows = rows[rows.env_step == env_steps]
    return float(rows["mean"].iloc[0]) if len(rows) else None


def mark_published(ax: Axes, runs: pd.DataFrame, x: float) -> bool:
    first = runs.iloc[0]
    value = published(first.algorithm, first.env_id, first.env_steps)
    if value is not None:
        ax.plot(x, value, **STYLES["published"])
    return value is not None


def task_name(env_id: str) -> str:
    return env_id.removeprefix("dm_control/").removesuffix("-v0").replace("-", " ").title()


def make_grid(
    down: int, across: int, width: float = 3.3, height: float = 2.7
) -> tuple[Figure, np.ndarray]:
    figure = Figure((max(width * across, 5.5), height * down + 0.5), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def add_legend(figure: Figure, handles: list, what: str, points: pd.DataFrame) -> None:
    """Below the panels; its title says what points and bars are, and of how many seeds."""
    wide = figure.get_figwidth() >= 8
    title = f"{what},{' ' if wide else chr(10)}{seeds(points)}"
    how = {"loc": "outside lower center", "ncols": len(handles) if wide else 1, "frameon": False}
    figure.legend(handles=handles, title=title, **how)


def make_handles(*names: str) -> list[Line2D]:
    labels = {
        "dense": "dense",
        "sparse": "sparse, as many active weights as the dense network it starts from",
    }
    labels["published"] = "published, dense (mean)"
    return [Line2D([], [], **STYLES[name], label=labels[name]) for name in names]


def seeds(points: pd.DataFrame) -> str:
    low, high = points.seeds_min.min(), points.seeds_max.max()
    return (
        f"{low} to {high} seeds"
        if low < high
        else "1 seed, so no interval"
        if high == 1
        else f"{high} seeds"
    )


INTERVAL = "interquartile mean, 95 % stratified bootstrap interval"


def draw_size(runs: pd.DataFrame, points: pd.DataFrame, scale: str) -> Figure:
    """Figures 1 and 14: a row for each algorithm, a column for each task, against the number of weights."""
    algorithms, tasks = points.algorithm.unique(), points.env_id.unique()
    figure, axes = make_grid(len(algorithms), len(tasks))
    marked = False
    for (row, algorithm), (column, env_id) in product(enumerate(algorithms), enumerate(tasks)):
        ax = axes[row, column]
        panel = points[(points.algorithm == algorithm) & (points.env_id == env_id)].sort_values(
            "weights"
        )
        for name, line in zip(("dense", "sparse"), families(panel)):
            draw_line(ax, line.weights, line, **STYLES[name])
        default = panel[(panel.width_scale == 1) & (panel.depth_scale == 1)]
        if len(default):
            own = runs[(runs.algorithm == algorithm) & (runs.env_id == env_id)]
            marked |= mark_published(ax, own, default.weights.iloc[0])
        ax.set_xscale(scale)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_title(f"{task_name(env_id)}, {algorithm}", fontsize=11)
        if column == 0:
            ax.set_ylabel("return")
        if row == len(algorithms) - 1:
            ax.set_xlabel("weights, pruned ones included")
    add_legend(figure, make_handles("dense", "sparse", *["published"] * marked), INTERVAL, points)
    return figure


def along(points: pd.DataFrame, axis: str) -> pd.DataFrame:
    """The networks that differ along one axis: widths at the least depth, or depths at the width that has several.

    None of them where no width has several depths.
    """
    if axis == "width_scale":
        line = points[points.depth_scale == points.depth_scale.min()]
    else:
        depths = points.groupby("width_scale").depth_scale.nunique()
        line = points[(points.width_scale == depths.idxmax()) & (depths.max() > 1)]
    return line.sort_values(axis)


def draw_scaling(ax: Axes, points: pd.DataFrame, axis: str, spread: str) -> None:
    """Dense and sparse networks against width or depth, the sparsity written beside the sparse ones."""
    line = along(points, axis)
    if line.empty:
        ax.text(0.5, 0.5, "no finished runs of several depths", ha="center", transform=ax.transAxes)
        return
    for name, family in zip(("dense", "sparse"), families(line)):
        draw_line(ax, family[axis], family, spread, **STYLES[name])
    for row in line[line.sparsity > 0].itertuples():
        top = row.mean + row.std if spread == "std" else row.high
        top = top if np.isfinite(top) else row.iqm
        text = {
            "xytext": (0, 4),
            "textcoords": "offset points",
            "fontsize": 7,
            "color": SPARSE,
            "ha": "center",
        }
        ax.annotate(f"S={row.sparsity:.2g}", (getattr(row, axis), top), **text)
    values = sorted(line[axis].unique())
    labels = [f"{value:g}" for value in values]
    ax.set_xticks(values, labels, rotation=45 if max(map(len, labels)) > 4 else 0)
    ax.margins(y=0.15)


def draw_aggregate(points: pd.DataFrame) -> Figure:
    """Figure 2: a row for each algorithm, width at the left, depth at the right, all tasks together."""
    algorithms = points.algorithm.unique()
    figure, axes = make_grid(len(algorithms), 2, width=4)
    for (row, algorithm), (column, axis) in product(
        enumerate(algorithms), enumerate(("width_scale", "depth_scale"))
    ):
        panel = points[points.algorithm == algorithm]
        draw_scaling(axes[row, column], panel, axis, "interval")
        at = [f", width scale {width:g}" for width in along(panel, axis).width_scale.unique()]
        axes[row, column].set_xlabel(
            f"{axis.replace('_', ' ')}{''.join(at) if axis == 'depth_scale' else ''}"
        )
        axes[row, column].set_title(f"{algorithm}, {axis.split('_')[0]} scaling", fontsize=11)
        axes[row, 0].set_ylabel("return")
    low, high = int(points.tasks.min()), int(points.tasks.max())
    tasks = f"{low} to {high} tasks" if low < high else f"{high} task{'s' * (high > 1)}"
    add_legend(figure, make_handles("dense", "sparse"), f"{INTERVAL}, {tasks}", points)
    return figure


def draw_tasks(runs: pd.DataFrame, points: pd.DataFrame, axis: str) -> Figure:
    """Figures 15 and 16: a panel for each algorithm and task, three in a row."""
    panels = [
        (algorithm, env_id)
        for algorithm in points.algorithm.unique()
        for env_id in points.env_id.unique()
    ]
    across = min(3, points.env_id.nunique())
    figure, axes = make_grid(-(-len(panels) // across), across)
    marked = False
    for ax, (algorithm, env_id) in zip(axes.flat, panels):
        panel = points[(points.algorithm == algorithm) & (points.env_id == env_id)]
        if len(panel):
            draw_scaling(ax, panel, axis, "std")
            default = panel[(panel.width_scale == 1) & (panel.sparsity == 0)]
            if axis == "width_scale" and len(default):
                own = runs[(runs.algorithm == algorithm) & (runs.env_id == env_id)]
                marked |= mark_published(ax, own, 1)
        ax.set(
            title=f"{task_name(env_id)}, {algorithm}",
            xlabel=axis.replace("_", " "),
            ylabel="return",
        )
        ax.title.set_fontsize(11)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    add_legend(
        figure,
        make_handles("dense", "sparse", *["published"] * marked),
        "mean, standard deviation",
        points,
    )
    return figure


def draw_sparsity(points: pd.DataFrame) -> Figure:
    """Figure 3: a row for each algorithm, a column for each task, a line for each size of network."""
    algorithms, tasks = points.algorithm.unique(), points.env_id.unique()
    sizes = list(points.groupby(["width_scale", "depth_scale"]))
    if len(sizes) > len(COLOURS):
        fail(
            f"{len(sizes)} sizes of network are more than the {len(COLOURS)} colours; keep some of them apart"
        )
    figure, axes = make_grid(len(algorithms), len(tasks))
    for (row, algorithm), (column, env_id) in product(enumerate(algorithms), enumerate(tasks)):
        ax = axes[row, column]
        for (_, networks), colour in zip(sizes, COLOURS):
            line = networks[(networks.algorithm == algorithm) & (networks.env_id == env_id)]
            draw_line(ax, line.sparsity, line, color=colour, marker="o", ms=4, lw=1.6)
        ax.set_title(f"{task_name(env_id)}, {algorithm}", fontsize=11)
        ax.set_xlim(-0.04, 1)
        if column == 0:
            ax.set_ylabel("return")
        if row == len(algorithms) - 1:
            ax.set_xlabel("sparsity (0: dense)")
    handles = []
    for ((width, depth), networks), colour in zip(sizes, COLOURS):
        deep = f", depth scale {depth:g}" if points.depth_scale.nunique() > 1 else ""
        weights = EngFormatter(places=1, sep="")(networks.weights.mean())
        label = f"width scale {width:g}{deep} ({weights} weights)"
        handles.append(Line2D([], [], color=colour, marker="o", ms=4, label=label))
    add_legend(figure, handles, INTERVAL, points)
    return figure


def gains(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Mean gain over the dense network in percent of its return, averaged over algorithms and tasks, per sparsity.

    With its 95 % bootstrap interval, seeds resampled within each of them. A scenario whose dense network has no
    positive mean return is left out, and named.
    """
    sizes = runs[["algorithm", "width_scale", "depth_scale"]].drop_duplicates()
    if sizes.algorithm.duplicated().any():
        there = ", ".join(
            f"{width:g} x {depth:g}" for _, width, depth in sizes.itertuples(index=False)
        )
        fail(
            f"a gain is that of one size of network, and there are several (width x depth scales: {there})"
        )
    dense = dict(list(runs[runs.sparsity == 0].groupby(["algorithm", "env_id"])))
    left_out, rows = [], []
    for algorithm, env_id in sorted(set(zip(runs.algorithm, runs.env_id))):
        if (algorithm, env_id) not in dense:
            left_out.append(f"{algorithm}, {env_id}: no finished run of the dense network")
        elif dense[algorithm, env_id]["return"].mean() <= 0:
            left_out.append(
                f"{algorithm}, {env_id}: the dense network's mean return is not positive"
            )
            del dense[algorithm, env_id]

    def mean_gain(*values: np.ndarray, axis: int = -1) -> np.ndarray:
        means = [part.mean(axis) for part in values]
        return np.mean([100 * (s / d - 1) for s, d in zip(means[::2], means[1::2])], 0)

    for sparsity, group in runs[runs.sparsity > 0].groupby("sparsity"):
        scenarios = {
            key: part for key, part in group.groupby(["algorithm", "env_id"]) if key in dense
        }
        if lacking := sorted(dense.keys() - scenarios.keys()):
            names = "; ".join(f"{algorithm}, {env_id}" for algorithm, env_id in lacking)
            left_out.append(f"sparsity {sparsity:g}: no finished run of {names}")
            continue
        values = [
            part["return"].to_numpy()
            for key, own in scenarios.items()
            for part in (own, dense[key])
        ]
        if values:
            count = {"seeds_min": min(map(len, values)), "seeds_max": max(map(len, values))}
            low, high = stratified_interval(values, mean_gain)
            row = {
                "sparsity": sparsity,
                "gain": float(mean_gain(*values)),
                "low": low,
                "high": high,
            }
            rows.append(row | {"scenarios": len(scenarios)} | count)
    return pd.DataFrame(rows), left_out


def draw_gain(table: pd.DataFrame, scores: pd.DataFrame | None) -> Figure:
    """Figure 8: simplicity bias score at the left, gain over the dense network at the right."""
    figure, axes = make_grid(1, 2 if scores is not None else 1, width=4, height=3)
    if scores is not None:
        simba = (
            scores[scores.network == "SimBa"].groupby("sparsity").score.agg(["mean", "sem", "size"])
        )
        axes[0, 0].errorbar(
            simba.index, simba["mean"], simba["sem"], color=DENSE, marker="o", ms=4, capsize=2.5
        )
        count = simba["size"].max()
        axes[0, 0].set(xlabel="sparsity", ylabel="simplicity bias score")
        axes[0, 0].set_title(
            f"at the start, {count} initialisations\n(mean, standard error)", fontsize=10
        )
    ax = axes[0, -1]
    error = np.array([table.gain - table.low, table.high - table.gain]).clip(0)
    ax.bar(
        table.sparsity,
        table.gain,
        0.06,
        color=SPARSE,
        yerr=error,
        capsize=2.5,
        error_kw={"elinewidth": 1},
    )
    ax.axhline(0, color="0.3", lw=0.8)
    ax.set(xlabel="sparsity", ylabel="gain over the dense network (%)", xlim=(0, 1))
    over = f"mean over {table.scenarios.max()} pairs of task and algorithm"
    ax.set_title(f"{over}\n({seeds(table)}; 95 % bootstrap interval)", fontsize=10)
    return figure


def draw_bars(runs: pd.DataFrame, points: pd.DataFrame) -> Figure:
    """Figure 10: a panel for each task, groups of bars by width, a bar for each sparsity, a dot for each seed."""
    if len(kinds := points[["algorithm", "depth_scale"]].drop_duplicates()) > 1:
        fail(
            f"bars are for one algorithm and depth, and there are {len(kinds)} of them; keep such runs apart"
        )
    tasks, widths, sparsities = (
        sorted(points[name].unique()) for name in ("env_id", "width_scale", "sparsity")
    )
    figure, axes = make_grid(1, len(tasks), width=4, height=3)
    room, marked = 0.8 / len(sparsities), False
    colours = dict(zip(sparsities, colormaps["viridis"](np.linspace(0.1, 0.85, len(sparsities)))))
    for ax, env_id in zip(axes.flat, tasks):
        panel = points[points.env_id == env_id]
        for index, sparsity in enumerate(sparsities):
            bars = panel[panel.sparsity == sparsity]
            x = (
                np.array([widths.index(width) for width in bars.width_scale])
                + (index + 0.5) * room
                - 0.4
            )
            error = np.array([bars.iqm - bars.low, bars.high - bars.iqm]).clip(0)
            how = {"color": colours[sparsity], "error_kw": {"elinewidth": 1}, "capsize": 2.5}
            ax.bar(x, bars.iqm, 0.9 * room, yerr=error, **how)
            for place, width in zip(x, bars.width_scale):
                own = runs[
                    (runs.env_id == env_id)
                    & (runs.sparsity == sparsity)
                    & (runs.width_scale == width)
                ]
                ax.plot(np.full(len(own), place), own["return"], ".", color="k", ms=3.5, alpha=0.6)
        if widths[0] == 1 and sparsities[0] == 0:  # the published network is the first bar
            marked |= mark_published(ax, runs[runs.env_id == env_id], -0.4 + 0.5 * room)
        ax.set_xticks(range(len(widths)), [f"{width:g}" for width in widths])
        ax.set(title=task_name(env_id), xlabel="width scale of the critic", ylabel="return")
    names = [f"sparsity {sparsity:g}" if sparsity else "dense" for sparsity in sparsities]
    handles = [
        Patch(color=colours[sparsity], label=name) for sparsity, name in zip(sparsities, names)
    ]
    add_legend(
        figure,
        handles + make_handles(*["published"] * marked),
        f"{INTERVAL}, a dot for each run",
        points,
    )
    return figure


if __name__ == "__main__":
    args = tyro.cli(Args)
    runs, left_out = load(Path(args.runs_dir), args.earlier)
    if not runs.empty and args.figure == "aggregate":
        runs, gaps = without_gaps(runs)
        left_out += gaps
    table = pd.DataFrame()
    if not runs.empty and args.figure == "gain":
        table, gaps = gains(runs)
        left_out += gaps
    elif not runs.empty:
        table = summarise(runs, NETWORK if args.figure == "aggregate" else POINT)
    for line in left_out:
        print(f"left out: {line}")
    if table.empty:
        fail(
            f"nothing to draw from the runs in {args.runs_dir}; choose a folder of finished runs with --runs-dir"
        )
    for line in find_uneven(table) if args.figure != "gain" else ():
        print(f"fewer seeds: {line}")
    try:
        scores = pd.read_csv(args.scores) if args.scores else None
    except (OSError, ValueError) as error:
        fail(f"--scores {args.scores}: {error}")
    try:
        (folder := Path(args.output)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write to {folder} ({error.strerror}); choose another folder with --output")
    match args.figure:
        case "size" | "size-linear":
            picture = draw_size(runs, table, "log" if args.figure == "size" else "linear")
        case "aggregate":
            picture = draw_aggregate(table)
        case "sparsity":
            picture = draw_sparsity(table)
        case "width" | "depth":
            picture = draw_tasks(runs, table, f"{args.figure}_scale")
        case "gain":
            picture = draw_gain(table, scores)
        case "bars":
            picture = draw_bars(runs, table)
    for suffix in ("png", "svg"):
        picture.savefig(folder / f"{args.figure}.{suffix}", dpi=150)
    runs.to_csv(folder / "runs.csv", index=False)
    table.to_csv(folder / f"{args.figure}.csv", index=False)
    text = table.map(lambda value: f"{value:.4g}" if isinstance(value, float) else value)
    lines = [list(table), ["---"] * len(table.columns), *text.to_numpy().tolist()]
    markdown = "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
    (folder / f"{args.figure}.md").write_text(markdown)
    print(f"{len(runs)} runs: {args.figure}.png, .svg, .csv and .md and runs.csv are in {folder}")
