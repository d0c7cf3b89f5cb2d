"""Returns against size and sparsity: Figures 1, 2, 3, 8, 10, 14, 15 and 16 of the paper; and one
of wider networks with equal numbers of active weights (--figure active).

    python sparse_zoo/analysis/scaling.py --runs-dir results/cpu/fig2/runs --figure aggregate
    python sparse_zoo/analysis/scaling.py --runs-dir results/cpu/fig8/runs --figure gain
    python sparse_zoo/analysis/scaling.py --earlier others/runs.csv --figure sparsity

A run's return is that of its trained policy over the last evaluation (final/return_mean). Points
are what the figure's caption says: the mean over seeds in Figures 10, 15 and 16, in the last two
with the standard deviation. Where it says nothing they are interquartile means over seeds; Figure 2
is the mean over tasks and seeds. Bars are 95 % bootstrap intervals, resampled within tasks.
--statistic chooses another.
Unfinished runs are named and left out, and so is a point of Figures 2 and 8 that lacks a whole
task. The CSV and Markdown tables have all of these numbers. Docs: docs/benchmark.md.
"""

from dataclasses import dataclass
from itertools import product
from typing import Literal

import runs
import numpy as np
import pandas as pd
import plots
from runs import fail
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter
from plots import bootstrap_interval, interquartile_mean, mean_of_tasks

SCENARIO = ["algorithm", "env_id"]
SIZE = ["width_scale", "depth_scale"]
NETWORK = ["algorithm", *SIZE, "sparsity"]
POINT = [*SCENARIO, *SIZE, "sparsity"]  # runs that differ in their seed only
COLUMNS = [  # those of runs.csv
    "env_id",
    *SIZE,
    "sparsity",
    "seed",
    "run",
    "algorithm",
    "weights",
    "active",
    "env_steps",
    "return",
]
WITH_AREA = [*COLUMNS, "area"]
EXACT = (*SIZE, "sparsity", "seed", "weights", "active", "env_steps", "return", "area")
MOST_SIZES = 6  # that can be told apart in one panel
MEASURES = {"return": "return", "area under the curve": "area"}  # of --figure active: columns
# What the captions of Figures 10, 15 and 16 say. Those of the others name no statistic. Figure 2 is
# the mean, so that each task counts: the interquartile mean over all tasks and seeds would be that
# of the tasks with middle returns, and leave out the hardest, Humanoid Run.
STATISTICS = {"bars": "mean", "width": "std", "depth": "std", "aggregate": "mean"}


@dataclass
class Args:
    figure: Literal[
        "size", "size-linear", "aggregate", "sparsity", "width", "depth", "gain", "bars", "active"
    ] = "aggregate"
    """size: Figure 1; size-linear: Figure 14; aggregate: Figure 2; sparsity: Figure 3; width:
    Figure 15; depth: Figure 16; gain: Figure 8; bars: Figure 10; active: returns and areas under
    the learning curve against active and against all weights"""
    runs_dir: str = "runs"
    """folder that holds one folder per run"""
    earlier: tuple[str, ...] = ()
    """runs.csv files that earlier calls left, whose runs are counted as well"""
    scores: str | None = None
    """scores.csv of simplicity_bias.py, drawn beside the gains"""
    statistic: Literal["iqm", "mean", "std"] | None = None
    """what points and bars are: interquartile mean and its interval, mean and its interval, or mean
    and standard deviation (default: mean for Figure 2 and where the caption says so, else iqm;
    gains are means always)"""
    output: str = "results/scaling"
    """folder of the picture and the tables"""


def load(
    runs_dir: str, earlier: tuple[str, ...] = (), columns: list[str] = COLUMNS
) -> tuple[pd.DataFrame, list[str]]:
    """Some columns of each finished run, COLUMNS or WITH_AREA, and a line for each other.

    Those of the tables `earlier` stand behind those of the folder. Ends the program if runs differ
    in flags that make averages and comparisons meaningless; of earlier runs only the number of env
    steps is known.
    """
    found, left_out = runs.load_runs(runs_dir)
    runs.fail_if_mixed(found, [*POINT, "actor_sparsity", "critic_sparsity"])
    rows = []
    for run in found:
        actor, critic = runs.network_sparsities(run.flags)
        row = {name: run.flags[name] for name in ("env_id", *SIZE, "seed")}
        row |= {"run": run.name, "algorithm": run.algorithm, "sparsity": critic}
        row |= {"env_steps": run.flags["total_timesteps"], "return": run.final_return}
        try:
            if actor != critic:
                raise runs.UnusableError(
                    f"sparsity of the actor {actor:g}, of the critic {critic:g}"
                )
            row["weights"], row["active"] = run.count_weights()
            if "area" in columns:
                row["area"] = find_area(run)
            rows.append(row)
        except runs.UnusableError as reason:
            left_out.append(f"{run.name}: {reason}")
    for path in earlier:
        table = runs.read_table(path, columns, "--earlier", EXACT)
        rows += table.to_dict("records")
    if not rows:
        return pd.DataFrame(columns=columns), left_out
    # A run may be among the earlier ones as well
    table = pd.DataFrame(rows, columns=columns).drop_duplicates("run")
    runs.fail_if_lengths_differ(table.env_steps, table.algorithm)
    table, twice = runs.drop_twice(in_order(table), POINT)
    return table, left_out + twice


def find_area(run: runs.Run) -> float:
    """Area under the curve of evaluation returns, divided by its length: their mean over time."""
    curve = run.metrics[run.metrics.metric == "eval/return_mean"].sort_values("env_step")
    if len(curve) < 2:
        raise runs.UnusableError("fewer than two evaluations")
    return float(np.trapezoid(curve.value, curve.env_step) / np.ptp(curve.env_step))


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Sorted by algorithm (as in ALGORITHMS), task, size, sparsity and seed."""
    order = pd.Categorical(table.algorithm, list(runs.ALGORITHMS.values()))
    table = table.assign(order=order)
    table = table.sort_values(["order", *POINT[1:], "seed"], ignore_index=True)
    return table.drop(columns="order")


def summarise(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """A row for each combination of keys.

    Its columns: weights, active, iqm, low, high, mean and the ends of its interval, std, tasks,
    fewest and most seeds.
    """
    rows = []
    for key, group in table.groupby(keys, sort=False):
        tasks = [task["return"].to_numpy() for _, task in group.groupby("env_id")]
        low, high = bootstrap_interval(tasks)
        mean_low, mean_high = bootstrap_interval(tasks, mean_of_tasks)
        row = {
            "weights": group.weights.mean(),
            "active": group.active.mean(),
            "iqm": interquartile_mean(*tasks),
            "low": low,
            "high": high,
            "mean": mean_of_tasks(*tasks),
            "mean_low": mean_low,
            "mean_high": mean_high,
            "std": group["return"].std(),
            "tasks": len(tasks),
            "seeds_min": min(map(len, tasks)),
            "seeds_max": max(map(len, tasks)),
        }
        rows.append(dict(zip(keys, key)) | row)
    return pd.DataFrame(rows)


def without_gaps(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The runs of networks run on all tasks of their algorithm, and a line for each other one."""
    keep = [table.iloc[:0]]
    left_out = []
    tasks = table.groupby("algorithm").env_id.agg(set)
    for (algorithm, width, depth, sparsity), network in table.groupby(NETWORK, sort=False):
        lacking = sorted(tasks[algorithm] - set(network.env_id))
        if lacking:
            name = f"{algorithm}, width {width:g}, depth {depth:g}, sparsity {sparsity:g}"
            left_out.append(f"{name}: no finished run of {' '.join(lacking)}")
        else:
            keep.append(network)
    return pd.concat(keep), left_out


def find_uneven(points: pd.DataFrame) -> list[str]:
    """A line for each point with fewer seeds than others."""
    most = points.seeds_max.max()
    lines = []
    for row in points[points.seeds_min < most].itertuples():
        where = getattr(row, "env_id", "some task")
        name = f"{row.algorithm}, {where}, width {row.width_scale:g}, depth {row.depth_scale:g}"
        lines.append(f"{name}, sparsity {row.sparsity:g}: {row.seeds_min} of {most} seeds")
    return list(dict.fromkeys(lines))  # a point with two measures is named once


def families(points: pd.DataFrame) -> tuple[pd.DataFrame, list[pd.DataFrame]]:
    """Dense networks; and lines of sparse ones behind the dense one of as many active weights.

    As many is within 10 %. Sparse networks without such a dense one are the last line.
    """
    dense = points[points.sparsity == 0]
    sparse = points[points.sparsity > 0]
    lines = []
    for row in range(len(dense)):
        anchor = dense.iloc[row : row + 1]
        alike = (sparse.active / anchor.active.item()).between(0.9, 1.1)
        if alike.any():
            lines.append(pd.concat([anchor, sparse[alike]]))
            sparse = sparse[~alike]
    if len(sparse):
        lines.append(sparse)
    return dense, lines


def along(points: pd.DataFrame, axis: str) -> pd.DataFrame:
    """The networks that differ along one axis.

    Widths at the least depth, or depths at the width that has several; none of them where no width
    has several depths.
    """
    if axis == "width_scale":
        line = points[points.depth_scale == points.depth_scale.min()]
    else:
        depths = points.groupby("width_scale").depth_scale.nunique()
        line = points[(points.width_scale == depths.idxmax()) & (depths.max() > 1)]
    return line.sort_values(axis)


def gains(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Mean gain over the dense network in percent of its return, for each sparsity.

    Averaged over scenarios (algorithm and task), with its 95 % bootstrap interval, seeds resampled
    within each. A scenario whose dense network has no positive mean return is named and left out.
    """
    sizes = table[["algorithm", *SIZE]].drop_duplicates()
    if sizes.algorithm.duplicated().any():
        there = ", ".join(
            f"{row.width_scale:g} x {row.depth_scale:g}" for row in sizes.itertuples()
        )
        fail(
            "a gain is that of one size of network, and there are several "
            f"(width x depth scales: {there})"
        )
    dense = dict(list(table[table.sparsity == 0].groupby(SCENARIO)["return"]))
    left_out = []
    for scenario in sorted(set(zip(table.algorithm, table.env_id))):
        name = ", ".join(scenario)
        if scenario not in dense:
            left_out.append(f"{name}: no finished run of the dense network")
        elif dense[scenario].mean() <= 0:
            left_out.append(f"{name}: the dense network's mean return is not positive")
            del dense[scenario]
    rows = []
    for sparsity, group in table[table.sparsity > 0].groupby("sparsity"):
        sparse = {key: part for key, part in group.groupby(SCENARIO)["return"] if key in dense}
        lacking = sorted(dense.keys() - sparse.keys())
        if lacking:
            names = "; ".join(", ".join(scenario) for scenario in lacking)
            left_out.append(f"sparsity {sparsity:g}: no finished run of {names}")
        elif sparse:
            pairs = [part.to_numpy() for key in sparse for part in (sparse[key], dense[key])]
            low, high = bootstrap_interval(pairs, mean_gain)
            row = {
                "sparsity": sparsity,
                "gain": float(mean_gain(*pairs)),
                "low": low,
                "high": high,
                "scenarios": len(sparse),
                "seeds_min": min(map(len, pairs)),
                "seeds_max": max(map(len, pairs)),
            }
            rows.append(row)
    return pd.DataFrame(rows), left_out


def mean_gain(*pairs: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean over scenarios of the gain in percent; pairs: sparse, dense, sparse, dense, ..."""
    means = [values.mean(axis) for values in pairs]
    return np.mean(
        [100 * (sparse / dense - 1) for sparse, dense in zip(means[::2], means[1::2])], 0
    )


# Figures

ALL_WEIGHTS = "weights, pruned ones included"
LABELS = {
    "dense": "dense",
    "sparse": "sparse, as many active weights as the dense network it starts from",
    "published": "published, dense (mean)",
}


def published_return(algorithm: str, env_id: str, env_steps: int) -> float | None:
    """The published mean return of the default dense network after as many env steps, if any."""
    curve = plots.published_curve(algorithm, env_id)
    values = curve["mean"][curve.env_step == env_steps]
    return float(values.iloc[0]) if len(values) else None


def mark_published(ax: Axes, table: pd.DataFrame, algorithm: str, env_id: str, x: float) -> bool:
    """Marks the published return after as many env steps as our runs have; False if none is."""
    env_steps = table.env_steps[table.algorithm == algorithm].iloc[0]
    value = published_return(algorithm, env_id, env_steps)
    if value is None:
        return False
    ax.plot(x, value, **plots.PUBLISHED)
    return True


def with_bars(points: pd.DataFrame, statistic: str) -> pd.DataFrame:
    """What draw_points needs, for a --statistic: middle, low, high, seeds."""
    mean = points["mean"]
    middle, low, high = {
        "iqm": (points.iqm, points.low, points.high),
        "mean": (mean, points.mean_low, points.mean_high),
        "std": (mean, mean - points["std"], mean + points["std"]),
    }[statistic]
    return points.assign(middle=middle, low=low, high=high, seeds=points.seeds_max)


def draw_families(ax: Axes, x: str, points: pd.DataFrame, statistic: str) -> None:
    """Dense and sparse networks against a column, each point in the colour of its sparsity."""
    dense, sparse = families(with_bars(points, statistic))
    for line in sparse:
        colours = line.sparsity.map(plots.sparsity_colour)
        plots.draw_points(ax, line[x], line, plots.NEUTRAL, colours, marker="*", ms=9)
    plots.draw_points(ax, dense[x], dense, plots.DENSE, ls="--")


def write_above(ax: Axes, x: str, points: pd.DataFrame, text: str, statistic: str) -> None:
    """A few letters above each point: `text`, formatted with the point's row."""
    for row in with_bars(points, statistic).itertuples():
        ax.annotate(
            text.format(row),
            (getattr(row, x), row.high if np.isfinite(row.high) else row.middle),
            xytext=(0, 4),
            textcoords="offset points",
            fontsize=7,
            color=plots.sparsity_colour(row.sparsity),
            ha="center",
            rotation=90 if x == "apart" else 0,  # neighbours are near
        )
    ax.margins(0.1, 0.45 if x == "apart" else 0.15)


def make_handles(published: bool) -> list[Line2D]:
    """The legend of draw_families."""
    sparse = {"color": plots.NEUTRAL, "marker": "*", "ms": 9, "mfc": plots.sparsity_colour(0.75)}
    styles = {
        "dense": {"color": plots.DENSE, "ls": "--", "marker": "o", "ms": 5},
        "sparse": sparse | {"mec": sparse["mfc"]},
    }
    if published:
        styles["published"] = plots.PUBLISHED
    return [Line2D([], [], **style, label=LABELS[name]) for name, style in styles.items()]


def name_statistic(statistic: str, points: pd.DataFrame) -> str:
    """What points and bars are, for the legend."""
    seeds = [*points.seeds_min, *points.seeds_max]
    if statistic == "std" and max(seeds) > 1:
        return f"mean, standard deviation; {plots.count_seeds(*seeds)}"
    name = "interquartile mean" if statistic == "iqm" else "mean"
    return f"{name}; {plots.describe_interval(*seeds)}"


def finish(figure: Figure, handles: list, points: pd.DataFrame, what: str) -> Figure:
    """Adds the legend, whose title says what points and bars are."""
    if min(points.seeds_max) == 1:
        handles = [*handles, plots.one_seed_handle()]
    plots.add_legend(figure, handles, what)
    return figure


def grid_of_scenarios(points: pd.DataFrame, most: int = 99) -> tuple[Figure, list[tuple]]:
    """A panel for each algorithm (down) and task (across, up to most): axes, names and points."""
    tasks = points.env_id.unique()
    scenarios = list(product(points.algorithm.unique(), tasks))
    across = min(most, len(tasks))
    figure, axes = plots.make_grid(-(-len(scenarios) // across), across)
    for ax in axes.flat[len(scenarios) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("return")
    panels = []
    for ax, (algorithm, env_id) in zip(axes.flat, scenarios):
        ax.set_title(f"{plots.task_name(env_id)}, {algorithm}")
        own = points[(points.algorithm == algorithm) & (points.env_id == env_id)]
        panels.append((ax, algorithm, env_id, own))
    return figure, panels


def draw_size(table: pd.DataFrame, points: pd.DataFrame, scale: str, statistic: str) -> Figure:
    """Figures 1 and 14: a row for each algorithm, a column for each task, against weights."""
    figure, panels = grid_of_scenarios(points)
    marked = False
    for ax, algorithm, env_id, panel in panels:
        draw_families(ax, "weights", panel.sort_values("weights"), statistic)
        default = panel[(panel.width_scale == 1) & (panel.depth_scale == 1)]
        if len(default):
            marked |= mark_published(ax, table, algorithm, env_id, default.weights.iloc[0])
        plots.label_weights(ax, ALL_WEIGHTS, scale)
    return finish(figure, make_handles(marked), points, name_statistic(statistic, points))


def measure_twice(table: pd.DataFrame) -> pd.DataFrame:
    """Points of the return, then of the area under the learning curve."""
    points = [
        summarise(table.assign(**{"return": table[column]}), POINT).assign(measure=name)
        for name, column in MEASURES.items()
    ]
    return pd.concat(points, ignore_index=True)


def draw_active(points: pd.DataFrame, statistic: str) -> Figure:
    """Two rows for each algorithm and task, against active weights and against all weights."""
    panels = list(points.groupby([*SCENARIO, "measure"], sort=False))
    panels.sort(key=lambda panel: panel[0][:2])
    figure, axes = plots.make_grid(len(panels), 2, width=4)
    for row, ((algorithm, env_id, measure), own) in zip(axes, panels):
        own = own.assign(apart=plots.move_apart(own.active))
        for ax, x in zip(row, ("apart", "weights")):
            draw_families(ax, x, own, statistic)
            write_above(ax, x, own, "width {0.width_scale:g}", statistic)
            ax.set_title(f"{plots.task_name(env_id)}, {algorithm}")
        plots.label_apart(row[0], own.active, own.apart, "active weights")
        plots.label_weights(row[1], ALL_WEIGHTS)
        row[0].set_ylabel(measure)
    return finish(figure, make_handles(False), points, name_statistic(statistic, points))


def draw_scaling(ax: Axes, points: pd.DataFrame, axis: str, statistic: str) -> None:
    """Dense and sparse networks against width or depth, their sparsity beside the sparse ones."""
    line = along(points, axis)
    if line.empty:
        ax.text(0.5, 0.5, "no finished runs of several depths", ha="center", transform=ax.transAxes)
        return
    draw_families(ax, axis, line, statistic)
    write_above(ax, axis, line[line.sparsity > 0], "S={0.sparsity:.2g}", statistic)
    plots.mark_values(ax, sorted(line[axis].unique()))


def draw_aggregate(points: pd.DataFrame, statistic: str) -> Figure:
    """Figure 2: a row for each algorithm, width at the left, depth at the right, all tasks."""
    algorithms = points.algorithm.unique()
    figure, axes = plots.make_grid(len(algorithms), 2, width=4)
    for row, algorithm in zip(axes, algorithms):
        panel = points[points.algorithm == algorithm]
        for ax, axis in zip(row, SIZE):
            draw_scaling(ax, panel, axis, statistic)
            ax.set_xlabel(axis.replace("_", " "))
            ax.set_title(f"{algorithm}, {axis.split('_')[0]} scaling")
        depths = along(panel, "depth_scale")
        if len(depths):
            row[1].set_xlabel(f"depth scale, width scale {depths.width_scale.iloc[0]:g}")
        row[0].set_ylabel("return")
    fewest = points.tasks.min()
    most = points.tasks.max()
    tasks = f"{most} tasks" if most > 1 else "1 task"
    if fewest < most:
        tasks = f"{fewest} to {most} tasks"
    seeds = plots.count_seeds(*points.seeds_min, *points.seeds_max)
    bars = ", 95 % stratified bootstrap interval"
    if points.seeds_max.max() == 1:
        bars = ""
    what = {
        "iqm": f"interquartile mean{bars}",
        "mean": f"mean{bars}",
        "std": "mean, standard deviation",
    }[statistic]
    what += f"; {tasks}, {seeds} each"
    return finish(figure, make_handles(False), points, what)


def draw_tasks(table: pd.DataFrame, points: pd.DataFrame, axis: str, statistic: str) -> Figure:
    """Figures 15 and 16: a panel for each algorithm and task, three in a row."""
    figure, panels = grid_of_scenarios(points, most=3)
    marked = False
    for ax, algorithm, env_id, panel in panels:
        if len(panel):
            draw_scaling(ax, panel, axis, statistic)
        default = panel[(panel.width_scale == 1) & (panel.sparsity == 0)]
        if axis == "width_scale" and len(default):
            marked |= mark_published(ax, table, algorithm, env_id, 1)
        ax.set_xlabel(axis.replace("_", " "))
    return finish(figure, make_handles(marked), points, name_statistic(statistic, points))


def draw_sparsity(points: pd.DataFrame, statistic: str) -> Figure:
    """Figure 3: a row for each algorithm, a column for each task, a line for each size."""
    sizes = dict(list(points.groupby(SIZE)))
    if len(sizes) > MOST_SIZES:
        fail(f"{len(sizes)} sizes of network are more than {MOST_SIZES}; keep some apart")
    styles = plots.size_styles(list(sizes))
    figure, panels = grid_of_scenarios(points)
    for ax, _, _, panel in panels:
        for size, line in with_bars(panel, statistic).groupby(SIZE):
            plots.draw_points(ax, line.sparsity, line, **styles[size])
        ax.set(xlim=(-0.04, 1), xlabel="sparsity (0: dense)")
    handles = []
    for (width, depth), networks in sizes.items():
        deep = f", depth scale {depth:g}" if points.depth_scale.nunique() > 1 else ""
        weights = EngFormatter(places=1, sep="")(networks.weights.mean())
        label = f"width scale {width:g}{deep} ({weights} weights)"
        handles.append(Line2D([], [], **styles[width, depth], label=label))
    return finish(figure, handles, points, name_statistic(statistic, points))


def draw_gain(points: pd.DataFrame, scores: pd.DataFrame | None) -> Figure:
    """Figure 8: simplicity bias score at the left, gain over the dense network at the right."""
    figure, axes = plots.make_grid(1, 2 if scores is not None else 1, width=4, height=3)
    if scores is not None:
        draw_scores(axes[0, 0], scores)
        axes[0, 0].set_title("at the start", fontsize=10)
    ax = axes[0, -1]
    colours = points.sparsity.map(plots.sparsity_colour)
    error = plots.bar_lengths(points.gain, points.low, points.high)
    style = {"capsize": 2.5, "error_kw": {"elinewidth": 1, "ecolor": plots.NEUTRAL}}
    ax.bar(points.sparsity, points.gain, 0.06, color=colours, yerr=error, **style)
    ax.axhline(0, color="0.3", lw=0.8)
    ax.set(xlabel="sparsity", ylabel="gain over the dense network (%)", xlim=(0, 1))
    over = f"mean over {points.scenarios.max()} pairs of task and algorithm"
    seeds = plots.count_seeds(*points.seeds_min, *points.seeds_max)
    interval = "no interval" if points.low.isna().all() else "95 % bootstrap interval"
    ax.set_title(f"{over}\n({seeds} each; bars: {interval})", fontsize=10)
    return figure


def draw_scores(ax: Axes, scores: pd.DataFrame) -> None:
    """Simplicity bias score of SimBa against sparsity, and of the plain MLP as a line."""
    simba = scores[scores.network == "SimBa"].groupby("sparsity").score
    points = simba.agg(middle="mean", error="sem", seeds="size")
    points = points.assign(low=points.middle - points.error, high=points.middle + points.error)
    colours = points.index.map(plots.sparsity_colour)
    plots.draw_points(ax, points.index, points, plots.NEUTRAL, colours)
    label = f"SimBa critic: mean, bars: standard error\nof {points.seeds.max()} initialisations"
    ax.plot([], [], color=plots.NEUTRAL, marker="o", mfc=plots.sparsity_colour(0.6), label=label)
    mlp = scores.score[scores.network == "MLP"]
    if len(mlp):
        ax.axhline(mlp.mean(), color=plots.DENSE, ls=":", label="plain MLP, dense: mean")
    ax.set(xlabel="sparsity (0: dense)", ylabel="simplicity bias score")
    if "share_score" in scores:
        ratio = (scores.share_score / scores.score).iloc[0]
        right = ax.secondary_yaxis("right", (lambda y: y * ratio, lambda y: y / ratio))
        right.set_ylabel("by shares of the largest frequency", fontsize=9)
    ax.legend(fontsize=8)


def draw_bars(table: pd.DataFrame, points: pd.DataFrame, statistic: str) -> Figure:
    """Figure 10: a panel for each task, groups of bars by width, a bar for each sparsity.

    A dot for each run.
    """
    kinds = len(points[["algorithm", "depth_scale"]].drop_duplicates())
    if kinds > 1:
        fail(
            f"bars are for one algorithm and depth, and there are {kinds} of them; "
            "keep such runs apart"
        )
    points = with_bars(points, statistic)
    tasks = sorted(points.env_id.unique())
    widths = sorted(points.width_scale.unique())
    sparsities = sorted(points.sparsity.unique())
    figure, axes = plots.make_grid(1, len(tasks), width=4, height=3)
    room = 0.8 / len(sparsities)
    returns = dict(list(table.groupby(["env_id", "width_scale", "sparsity"])["return"]))
    marked = False
    for ax, env_id in zip(axes.flat, tasks):
        bars = points[points.env_id == env_id]
        errors = plots.bar_lengths(bars.middle, bars.low, bars.high)
        for row, error in zip(bars.itertuples(), errors.T):
            x = widths.index(row.width_scale) + (sparsities.index(row.sparsity) + 0.5) * room - 0.4
            style = {"color": plots.sparsity_colour(row.sparsity), "capsize": 2.5}
            if row.seeds_max == 1:
                style |= {"fill": False, "edgecolor": style["color"], "lw": 1.5}
            ax.bar(x, row.middle, 0.9 * room, yerr=error[:, None], ecolor=plots.NEUTRAL, **style)
            dots = returns[env_id, row.width_scale, row.sparsity]
            ax.plot([x] * len(dots), dots, ".", color="k", ms=3.5, alpha=0.6)
        if widths[0] == 1 and sparsities[0] == 0:  # the published network is the first bar
            algorithm = points.algorithm.iloc[0]
            marked |= mark_published(ax, table, algorithm, env_id, -0.4 + 0.5 * room)
        ax.set_xticks(range(len(widths)), [f"{width:g}" for width in widths])
        ax.set_title(plots.task_name(env_id))
        ax.set(xlabel="width scale of the critic", ylabel="return")
    handles = [
        Patch(color=plots.sparsity_colour(sparsity), label=plots.sparsity_name(sparsity))
        for sparsity in sparsities
    ]
    if marked:
        handles.append(Line2D([], [], **plots.PUBLISHED, label=LABELS["published"]))
    what = f"{name_statistic(statistic, points)}; a dot for each run"
    return finish(figure, handles, points, what)


def draw(figure: str, table: pd.DataFrame, points: pd.DataFrame, scores, statistic: str) -> Figure:
    """The picture of --figure."""
    match figure:
        case "size" | "size-linear":
            return draw_size(table, points, "log" if figure == "size" else "linear", statistic)
        case "aggregate":
            return draw_aggregate(points, statistic)
        case "sparsity":
            return draw_sparsity(points, statistic)
        case "width" | "depth":
            return draw_tasks(table, points, f"{figure}_scale", statistic)
        case "gain":
            return draw_gain(points, scores)
        case "bars":
            return draw_bars(table, points, statistic)
        case "active":
            return draw_active(points, statistic)


def main(args: Args) -> None:
    columns = WITH_AREA if args.figure == "active" else COLUMNS
    table, left_out = load(args.runs_dir, args.earlier, columns)
    gaps = []
    if args.figure == "aggregate":
        table, gaps = without_gaps(table)
    if args.figure == "gain":
        points, gaps = gains(table)
    elif args.figure == "active":
        points = measure_twice(table)
    else:
        points = summarise(table, NETWORK if args.figure == "aggregate" else POINT)
    runs.print_left_out(left_out + gaps)
    if points.empty:
        fail(
            f"nothing to draw from the runs in {args.runs_dir}; "
            "choose a folder of finished runs with --runs-dir"
        )
    for line in find_uneven(points) if args.figure != "gain" else ():
        print(f"fewer seeds: {line}")
    scores = None
    if args.scores:
        numbers = ("sparsity", "score", "share_score")
        scores = runs.read_table(args.scores, ["network", "seed", *numbers], "--scores", numbers)
    statistic = args.statistic or STATISTICS.get(args.figure, "iqm")
    cells = points.map(lambda value: f"{value:.4g}" if isinstance(value, float) else value)
    markdown = plots.markdown_table(list(points), cells.to_numpy().tolist())
    with runs.new_files(args.output) as folder:
        plots.save(draw(args.figure, table, points, scores, statistic), folder, args.figure)
        table.to_csv(folder / "runs.csv", index=False)
        points.to_csv(folder / f"{args.figure}.csv", index=False)
        (folder / f"{args.figure}.md").write_text(markdown)
    files = f"{args.figure}.png, .svg, .csv and .md and runs.csv"
    print(f"{len(table)} runs: {files} are in {args.output}")


if __name__ == "__main__":
    runs.start(main, Args)
