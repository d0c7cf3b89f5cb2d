"""Figures 4 to 7 of the paper (section 4: plasticity), drawn from the metrics of a folder of runs.

    python sparse_zoo/analysis/plasticity.py --figure srank
    python sparse_zoo/analysis/plasticity.py --figure over-training --variants 1:0 5:0 5:0.9

Runs whose flags are equal except for the seed, and flags that do not change results, are averaged.
Only finished runs are used; every other one is named, with the reason. Bands are 95 % bootstrap
intervals of the mean over seeds. Docs: docs/plasticity.md.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import runs
import numpy as np
import pandas as pd
import plots
from runs import fail
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator
from plots import mean_interval

# Each figure's metrics, one row each, and its panels for every environment
METRICS = {
    "srank": ("diagnostics/critic_srank_99",),
    "over-training": (
        "diagnostics/actor_dormant_ratio",
        "diagnostics/critic_dormant_ratio",
        "diagnostics/actor_grad_norm",
        "diagnostics/critic_grad_norm",
    ),
    "reset": ("eval/return_mean",),
    "param-norm": ("diagnostics/actor_param_norm", "diagnostics/critic_param_norm"),
    "against-sparsity": (
        "diagnostics/critic_srank_99",
        "diagnostics/critic_dormant_ratio",
        "diagnostics/critic_grad_norm",
        "diagnostics/critic_param_norm",
    ),
}
PANELS = {"srank": ("end", "training"), "against-sparsity": ("end",)}  # the others: over training
LABELS = {
    "srank_99": "stable rank",
    "srank_threshold": "stable rank (threshold)",
    "dormant_ratio": "dormant units (%)",
    "dormant_ratio_relu": "dormant ReLUs (%)",
    "active_units": "active units (fraction)",
    "grad_norm": "gradient norm (L2)",
    "param_norm": "parameter norm (L2)",
    "feature_norm": "feature norm (L2)",
    "return_mean": "evaluation return",
}
COLUMN = ["env_id", "algorithm"]  # one column of panels
CONFIGURATION = [*COLUMN, "size", "sparsity", "actor_sparsity", "critic_sparsity", "reset_interval"]
# Of *_runs.csv.gz
COLUMNS = ["env_step", "metric", "value", "run", "seed", "width_scale", *CONFIGURATION]
EXACT = ("env_step", "seed", "width_scale", *CONFIGURATION[-3:])
ORDER = ["width_scale", "depth_scale", "critic_sparsity", "actor_sparsity", "reset_interval"]
MOST_NETWORKS = 10  # that can be told apart in one figure


@dataclass
class Args:
    figure: Literal["srank", "over-training", "reset", "param-norm", "against-sparsity"] = (
        "over-training"
    )
    """srank: Figure 4; over-training: Figure 5; reset: Figure 6; param-norm: Figure 7;
    against-sparsity: the critic at the end of training, as in the left half of Figure 4"""
    runs_dir: str = "runs"
    """folder that holds one folder per run"""
    earlier: tuple[str, ...] = ()
    """*_runs.csv.gz files that earlier calls left, whose runs are averaged as well, by the names of
    their networks"""
    metrics: tuple[str, ...] = ()
    """one row each, by their names in metrics.csv: diagnostics/* or eval/* (default: those of the
    paper's figure)"""
    variants: tuple[str, ...] = ()
    """WIDTH_SCALE:SPARSITY of what is drawn over training, sparsity that of the critic (default:
    everything)"""
    end: Literal["last", "tenth"] | None = None
    """of each run, what stands for the end of training: its last measurement, or the mean of its
    last tenth (default: last in Figure 4, as its caption says, else tenth)"""
    output: str = "results/plasticity"
    """folder of the pictures and tables"""


# From runs to tables


def measurements(run: runs.Run) -> pd.DataFrame:
    """The diagnostics and evaluations of a run: env_step, metric, value."""
    kind = run.metrics.metric.str.split("/").str[0]
    return run.metrics[kind.isin(["diagnostics", "eval"])]


def settings(run: runs.Run) -> dict:
    """The flags of a run that change results.

    Sparsities become those of actor and critic, and reset_interval 0 if there is none.
    """
    flags = run.settings()
    del flags["sparsity"]
    flags["actor_sparsity"], flags["critic_sparsity"] = runs.network_sparsities(run.flags)
    flags["reset_interval"] = flags.get("reset_interval") or 0
    return flags | {"algorithm": run.algorithm}


def describe(table: pd.DataFrame) -> pd.DataFrame:
    """Adds size and sparsity in words to runs (a row of flags each), sorted by size and sparsity.

    Runs of one column of panels with equal words and reset interval have equal flags: size names,
    besides width and depth, every flag that differs within the column.
    """
    if "mask_seed" in table:  # None means that of the seed, unless runs of other seeds share it
        keys = ["env_id", "exp_name", "mask_seed"]
        others = table[table.mask_seed != table.seed]
        shared = set(others[keys].itertuples(index=False, name=None))
        seeds = [
            None if run.mask_seed == run.seed and key not in shared else run.mask_seed
            for run, key in zip(table.itertuples(), table[keys].itertuples(index=False, name=None))
        ]
        table["mask_seed"] = pd.Series(seeds, table.index, dtype=object)
    table = table.where(table.notna(), None)  # a flag that an older version did not have yet
    names = [*ORDER, "env_id", "exp_name", "seed"]
    others = [name for name in table if name not in {*names, "algorithm"}]
    table = table.sort_values(names)
    table["size"] = [
        f"width x{run.width_scale:g}, depth x{run.depth_scale}" for run in table.itertuples()
    ]
    for _, column in table.groupby(["env_id", "exp_name"]):
        for name in others:
            if len({str(value) for value in column[name]}) > 1:
                words = [f", {name.replace('_', ' ')} {value}" for value in column[name]]
                table.loc[column.index, "size"] += words
    table["sparsity"] = [
        name_sparsities(run.actor_sparsity, run.critic_sparsity) for run in table.itertuples()
    ]
    return table


def name_sparsities(actor: float, critic: float) -> str:
    if actor == critic:
        return plots.sparsity_name(critic)
    return f"actor sparsity {actor:g}, critic {critic:g}"


def load_runs(
    runs_dir: str | Path, earlier: tuple[str, ...] = ()
) -> tuple[pd.DataFrame, list[str]]:
    """COLUMNS of every measurement of every finished run, and a line for each other folder.

    Those of the tables `earlier` stand behind those of the folder.
    """
    found, left_out = runs.load_runs(runs_dir)
    flags = {}
    values = {}
    for run in found:
        values[run.name] = measurements(run)
        flags[run.name] = settings(run)
    parts = [runs.read_table(path, COLUMNS, "--earlier", EXACT) for path in earlier]
    if flags:
        table = describe(pd.DataFrame(list(flags.values()), index=list(flags), dtype=object))
        table = table[["seed", "width_scale", *CONFIGURATION]]
        own = [values[name].assign(run=name, **row) for name, row in table.iterrows()]
        parts = [pd.concat(own), *parts]
    if not parts:
        return pd.DataFrame(columns=COLUMNS), left_out
    data = runs.merge(parts, ["run"])
    ends = data.groupby([*CONFIGURATION, "run"], sort=False).env_step.max().reset_index()
    names = ends.algorithm + " on " + ends.env_id + ", " + ends["size"] + ", " + ends.sparsity
    runs.fail_if_lengths_differ(ends.env_step, names)
    if earlier:
        data = data.sort_values([name for name in ORDER if name in data], kind="stable")
    data, twice = runs.drop_twice(data, CONFIGURATION)
    return data, left_out + twice


def find_gaps(data: pd.DataFrame, metrics: tuple[str, ...]) -> list[str]:
    """A line for each run that lacks measurements that others of its configuration have."""
    lines = []
    for metric, (_, group) in product(metrics, data.groupby(CONFIGURATION, sort=False)):
        own = group[group.metric == metric]
        finite = own[np.isfinite(own.value)].groupby("run").size()
        steps = own.env_step.nunique()
        for run in group.run.unique():
            count = finite.get(run, 0)
            if count < max(steps, 1):
                lines.append(f"{run}: {count} of {steps} finite measurements of {metric}")
    return lines


def end_value(values: np.ndarray, end: str = "tenth") -> float:
    """A run's last measurement, or the mean of its last tenth (rounded down, at least one)."""
    count = len(values) // 10 if end == "tenth" else 1
    return float(np.mean(values[-max(1, count) :]))


def summarise(data: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Mean, low, high and seeds of value, for each combination of keys, in their first order."""
    rows = []
    for key, values in data.groupby(keys, sort=False)["value"]:
        values = values.to_numpy(float)
        rows.append((*key, values.mean(), *mean_interval(values), len(values)))
    return pd.DataFrame(rows, columns=[*keys, "mean", "low", "high", "seeds"])


def over_training(data: pd.DataFrame) -> pd.DataFrame:
    """A row for each configuration, metric and env_step: mean, low, high, seeds."""
    return summarise(data, [*CONFIGURATION, "metric", "env_step"])


def at_the_end(data: pd.DataFrame, end: str = "tenth") -> pd.DataFrame:
    """A row for each configuration and metric, of the end values of its runs: as over_training.

    x is the sparsity of the network that the metric belongs to (the critic's for returns), and line
    what else tells configurations apart: size, and the other network's sparsity where it differs.
    """
    keys = [*CONFIGURATION, "metric"]
    series = data.sort_values("env_step", kind="stable").groupby([*keys, "run"], sort=False)
    ends = series["value"].agg(lambda values: end_value(values.to_numpy(), end)).reset_index()
    ends = summarise(data[keys].drop_duplicates().merge(ends), keys)
    of_actor = ends.metric.str.contains("/actor_")
    ends["x"] = ends.critic_sparsity.where(~of_actor, ends.actor_sparsity).astype(float)
    other = ends.actor_sparsity.where(~of_actor, ends.critic_sparsity)
    names = np.where(of_actor, "critic", "actor")
    ends["line"] = [
        size if x == sparsity else f"{size}, {name} sparsity {sparsity:g}"
        for size, x, sparsity, name in zip(ends["size"], ends.x, other, names)
    ]
    return ends


def with_and_without_reset(data: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The runs of networks that were trained both ways, and one line for each other run."""
    network = [name for name in CONFIGURATION if name != "reset_interval"]
    intervals = data.groupby(network)["reset_interval"]
    both = (intervals.transform("min") == 0) & (intervals.transform("max") > 0)
    lines = []
    for row in data[~both].drop_duplicates("run").itertuples():
        how = "without" if row.reset_interval else "with"
        lines.append(f"{row.run}: no finished run of this network {how} resets")
    return data[both], lines


def select_variants(data: pd.DataFrame, variants: tuple[str, ...]) -> pd.DataFrame:
    """The runs of the given WIDTH_SCALE:SPARSITY pairs; names a pair without a run.

    Ends the program if one is malformed or none has a run.
    """
    chosen = pd.Series(not variants, index=data.index)
    for variant in variants:
        try:
            width_scale, sparsity = map(float, variant.split(":"))
        except ValueError:
            fail(f"--variants {variant}: must be WIDTH_SCALE:SPARSITY, such as 4:0.9")
        matches = (data.width_scale == width_scale) & (data.critic_sparsity == sparsity)
        if not matches.any():
            print(f"not drawn: --variants {variant}: no finished run")
        chosen |= matches
    if not chosen.any():
        pairs = data[["width_scale", "critic_sparsity"]].drop_duplicates().to_numpy()
        there = " ".join(f"{width:g}:{sparsity:g}" for width, sparsity in pairs)
        fail(f"--variants: no finished run; there are {there}")
    return data[chosen]


# Figures


def name_axis(metric: str) -> str:
    """diagnostics/critic_grad_norm -> critic: gradient norm (L2)"""
    name = metric.split("/")[1]
    network, _, rest = name.partition("_")
    if network in ("actor", "critic"):
        return f"{network}\n{LABELS.get(rest, rest)}"
    return LABELS.get(name, name)


def name_kind(curves: pd.DataFrame) -> pd.Series:
    """What tells networks of one critic sparsity apart: a line style each."""
    resets = curves.reset_interval.map(lambda n: f", reset every {n:,} env steps" if n else "")
    actors = curves.actor_sparsity.map(lambda sparsity: f", actor sparsity {sparsity:g}")
    differs = curves.actor_sparsity != curves.critic_sparsity
    return curves["size"] + actors.where(differs, "") + resets


def draw_curves(ax: Axes, curves: pd.DataFrame, styles: dict) -> None:
    """Means over training with their intervals; the colour is the critic's sparsity."""
    for (sparsity, kind), curve in curves.groupby(["critic_sparsity", "kind"], sort=False):
        style = {"color": plots.sparsity_colour(sparsity), "ls": styles[kind], "lw": 1.4}
        plots.draw_band(ax, curve.env_step, curve["mean"], curve.low, curve.high, **style)
        interval = curve.reset_interval.iloc[0]
        for step in range(interval, curve.env_step.max(), interval) if interval else ():
            ax.axvline(step, color="0.85", lw=0.8, zorder=0)
    plots.label_env_steps(ax)


def draw_against_sparsity(ax: Axes, ends: pd.DataFrame, styles: dict) -> None:
    """Ends of training with their intervals against sparsity, one line for each size of network."""
    for name, line in ends.assign(middle=ends["mean"]).groupby("line", sort=False):
        plots.draw_points(ax, line.x, line, **styles[name], ms=4)
    ax.set_xlim(-0.05, 1.0)
    ax.set_xlabel("sparsity (fraction removed)")


def make_legend(curves: pd.DataFrame, ends: pd.DataFrame, kinds: dict, sizes: dict) -> list[Line2D]:
    """What stands for each size at the end of training, and for each network over training."""
    handles = []
    for name, rows in ends.groupby("line", sort=False):
        label = f"{name} ({plots.count_seeds(*rows.seeds)})"
        handles.append(Line2D([], [], **sizes[name], ms=4, lw=1.2, label=label))
    for (sparsity, kind), rows in curves.groupby(["critic_sparsity", "kind"], sort=False):
        label = f"{plots.sparsity_name(sparsity)}, {kind} ({plots.count_seeds(*rows.seeds)})"
        style = {"color": plots.sparsity_colour(sparsity), "ls": kinds[kind], "lw": 1.6}
        handles.append(Line2D([], [], **style, label=label))
    if (ends.seeds == 1).any():
        handles.append(plots.one_seed_handle())
    if curves.reset_interval.any():
        handles.append(Line2D([], [], color="0.85", lw=0.8, label="a reset"))
    return handles


def scale_axis(ax: Axes, metric: str) -> None:
    """Gradient norms on a logarithmic axis; dormant units from zero on."""
    if metric.endswith("grad_norm"):
        ax.set_yscale("log")
        ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
    if "dormant" in metric:
        top = max(1.0, ax.get_ylim()[1])
        ax.set_ylim(-0.04 * top, top)  # a line at zero can be seen


def draw(
    curves: pd.DataFrame,
    ends: pd.DataFrame,
    metrics: tuple[str, ...],
    panels: tuple[str, ...],
    end: str,
) -> Figure:
    """One row for each metric and panel ("end", "training"), one column for each COLUMN.

    Two panels of one environment stand side by side, as in the paper.
    """
    curves = curves.assign(kind=name_kind(curves))
    tables = {"end": ends, "training": curves}
    kinds = plots.line_styles(curves.kind.unique())
    sizes = plots.size_styles(ends["line"].unique())
    rows = list(product(metrics, panels))
    shown = tables[panels[0]]  # not the tasks that --variants leaves empty
    columns = sorted(set(shown[COLUMN].itertuples(index=False, name=None)))
    abreast = len(rows) == 2 and len(columns) == 1
    shape = (1, 2) if abreast else (len(rows), len(columns))
    figure, axes = plots.make_grid(*shape, max(4.2, 6 / shape[1]), 2.4)
    axes = axes.T if abreast else axes
    for ax, ((metric, panel), (env_id, algorithm)) in zip(axes.flat, product(rows, columns)):
        table = tables[panel]
        own = (table.env_id == env_id) & (table.algorithm == algorithm)
        own &= table.metric == metric
        if panel == "end":
            draw_against_sparsity(ax, table[own], sizes)
        else:
            draw_curves(ax, table[own], kinds)
        scale_axis(ax, metric)
        if abreast or ax in axes[0]:
            ax.set_title(f"{plots.task_name(env_id)}, {algorithm}")
        if ax in axes[:, 0]:
            name = "mean of the last 10 %" if end == "tenth" else "last measurement"
            what = f"\n({name})" if panel == "end" else ""
            ax.set_ylabel(name_axis(metric) + what)
        if ax not in axes[-1] and len(panels) == 1 and not abreast:
            ax.set_xlabel("")
    ends = ends if "end" in panels else ends.iloc[:0]
    legend = make_legend(curves, ends, kinds, sizes)
    figure.set_figheight(figure.get_figheight() + 0.2 * len(legend))
    interval = plots.describe_interval(*curves.seeds, *ends.seeds)
    plots.add_legend(figure, legend, f"mean over seeds; {interval}")
    return figure


def to_markdown(ends: pd.DataFrame, metrics: tuple[str, ...]) -> str:
    """A line for each configuration and a column for each metric: mean [low, high] over seeds."""
    lines = []
    for key, rows in ends.groupby(CONFIGURATION, sort=False):
        row = dict(zip(CONFIGURATION, key))
        cells = dict.fromkeys(metrics, "missing")
        for end in rows.itertuples():
            interval = f" [{end.low:.4g}, {end.high:.4g}]" if end.seeds > 1 else ""
            cells[end.metric] = f"{end.mean:.4g}{interval}"
        network = f"{row['size']}, {row['sparsity']}"
        reset = f"every {row['reset_interval']:,}" if row["reset_interval"] else "never"
        seeds = " / ".join(map(str, rows.seeds.unique()))
        lines.append([row["env_id"], row["algorithm"], network, reset, seeds, *cells.values()])
    header = ["environment", "algorithm", "network", "reset", "seeds", *metrics]
    return plots.markdown_table(header, lines)


def choose_runs(args: Args) -> pd.DataFrame:
    """The measurements of --figure; names the runs that are left out, ends without any."""
    data, left_out = load_runs(args.runs_dir, args.earlier)
    needed = "finished runs"
    if args.figure == "reset":
        needed += " with and without --reset-interval"
        data, alone = with_and_without_reset(data)
        left_out += alone
    else:
        resets = data[data.reset_interval > 0].run.unique()
        left_out += [f"{run}: has resets (see --figure reset)" for run in resets]
        data = data[data.reset_interval == 0]
    runs.print_left_out(left_out)
    if data.empty:
        fail(f"no {needed} in {args.runs_dir}; choose a folder of runs with --runs-dir")
    return data


def main(args: Args) -> None:
    metrics = args.metrics or METRICS[args.figure]
    panels = PANELS.get(args.figure, ("training",))
    everything = choose_runs(args)
    there = sorted(set(everything.metric))
    for metric in metrics:
        if metric not in there:
            fail(f"--metrics {metric}: in no finished run; there are {', '.join(there)}")
    for line in find_gaps(everything, metrics):
        print(f"missing: {line}")
    data = everything[everything.metric.isin(metrics)]
    chosen = select_variants(data, args.variants) if "training" in panels else data.iloc[:0]
    count = len(chosen[["size", "sparsity"]].drop_duplicates())
    if count > MOST_NETWORKS:
        fail(
            f"{count} networks are more than {MOST_NETWORKS}, which can be told apart; "
            "choose some with --variants WIDTH_SCALE:SPARSITY ..."
        )
    curves = over_training(chosen)
    end = args.end or ("last" if args.figure == "srank" else "tenth")
    ends = at_the_end(data, end)
    picture = draw(curves, ends, metrics, panels, end)
    curves = curves.sort_values(COLUMN, kind="stable")
    ends = ends.sort_values(COLUMN, kind="stable")
    with runs.new_files(args.output) as folder:
        plots.save(picture, folder, args.figure)
        if "training" in panels:
            curves.to_csv(folder / f"{args.figure}.csv", index=False)
        ends.to_csv(folder / f"{args.figure}_end.csv", index=False)
        path = folder / f"{args.figure}_runs.csv.gz"
        everything.to_csv(path, index=False, compression=runs.GZIP)
        (folder / f"{args.figure}_end.md").write_text(to_markdown(ends, metrics))
    print(f"{data.run.nunique()} runs: pictures and tables are {Path(args.output, args.figure)}*")


if __name__ == "__main__":
    runs.start(main, Args)
