"""Figures 4 to 7 of the paper (section 4: plasticity), drawn from the metrics.csv of a folder of runs.

    python sparse_zoo/analysis/plasticity.py --runs-dir runs --figure srank
    python sparse_zoo/analysis/plasticity.py --runs-dir runs --figure over-training --variants 1:0 5:0 5:0.9

Runs whose flags are equal except for the seed, and flags that do not change results, are averaged. Only finished runs
are used; every other one is named, with the reason. Bands are 95 % bootstrap intervals of the mean over seeds.
Docs: docs/plasticity.md.
"""

import json
import re
import sys
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import pandas as pd
import scipy.stats
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator


@dataclass
class Args:
    figure: Literal["srank", "over-training", "reset", "param-norm", "against-sparsity"] = (
        "over-training"
    )
    """srank: Figure 4; over-training: Figure 5; reset: Figure 6; param-norm: Figure 7; against-sparsity: the critic at
    the end of training, as in the left half of Figure 4"""
    runs_dir: str = "runs"
    """folder that holds one folder per run"""
    earlier: tuple[str, ...] = ()
    """*_runs.csv.gz files that earlier calls left, whose runs are averaged as well, by the names of their networks"""
    metrics: tuple[str, ...] = ()
    """one row each, by their names in metrics.csv: diagnostics/* or eval/* (default: those of the paper's figure)"""
    variants: tuple[str, ...] = ()
    """WIDTH_SCALE:SPARSITY of what is drawn over training, sparsity that of the critic (default: everything)"""
    output: str = "results/plasticity"
    """folder of the pictures and tables"""


# Each figure's metrics, one row each, and its panels for every environment
METRICS = {
    "srank": ("diagnostics/critic_srank_99",),
    "over-training": tuple(
        f"diagnostics/{n}_{m}" for m in ("dormant_ratio", "grad_norm") for n in ("actor", "critic")
    ),
    "reset": ("eval/return_mean",),
    "param-norm": ("diagnostics/actor_param_norm", "diagnostics/critic_param_norm"),
    "against-sparsity": tuple(
        f"diagnostics/critic_{m}" for m in ("srank_99", "dormant_ratio", "grad_norm", "param_norm")
    ),
}
PANELS = {
    "srank": ("end", "training"),
    "against-sparsity": ("end",),
}  # the others: over training only
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
ALGORITHMS = {"sac_simba_sparse": "SAC", "ddpg_simba_sparse": "DDPG", "drqv2_sparse": "DrQ-v2"}
# Flags that do not change results, as in the agents
EXECUTION_FLAGS = {
    *("device", "threads", "runs_dir", "resume", "eval_only", "capture_video", "sparse_kernel"),
    *("track", "wandb_project", "wandb_entity", "checkpoint_interval"),
}
NEEDED_FLAGS = (
    "env_id",
    "exp_name",
    "seed",
    "total_timesteps",
    "width_scale",
    "depth_scale",
    "sparsity",
)
COLUMN = ["env_id", "algorithm"]  # one column of panels
CONFIGURATION = [*COLUMN, "size", "sparsity", "actor_sparsity", "critic_sparsity", "reset_interval"]
COLUMNS = [
    "env_step",
    "metric",
    "value",
    "run",
    "seed",
    "width_scale",
    *CONFIGURATION,
]  # those of *_runs.csv.gz


def fail(message: str) -> NoReturn:
    """Ends the program with one line for a person and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_run(folder: Path) -> tuple[dict, pd.DataFrame]:
    """The flags of a finished run that change results, and its diagnostics and evaluations: env_step, metric, value.

    Sparsities become those of actor and critic, and reset_interval 0 if there is none. Raises ValueError with the
    reason if the run cannot be used.
    """
    if re.search(r"\.old\d+$", folder.name):
        raise ValueError("moved aside by --no-resume")
    try:
        flags = json.loads((folder / "args.json").read_text())["args"]
        columns = ["env_step", "metric", "value"]
        metrics = pd.read_csv(folder / "metrics.csv", usecols=columns, dtype={"value": float})
    except OSError as error:
        raise ValueError(f"{Path(error.filename).name}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"args.json or metrics.csv is damaged or empty ({type(error).__name__})"
        ) from None
    if missing := [name for name in NEEDED_FLAGS if name not in flags]:
        raise ValueError(f"args.json has no {', '.join(missing)}")
    kind = metrics.metric.astype(str).str.split("/").str[0]
    if not (kind == "final").any():
        reached = metrics.env_step.max() if len(metrics) else 0
        raise ValueError(f"unfinished, at env step {reached:,.0f} of {flags['total_timesteps']:,}")
    metrics = metrics[kind.isin(["diagnostics", "eval"])]
    if metrics.duplicated(["env_step", "metric"]).any():
        raise ValueError("metrics.csv has some measurements twice")
    flags = {name: value for name, value in flags.items() if name not in EXECUTION_FLAGS}
    sparsity = flags.pop("sparsity")
    for name in ("actor_sparsity", "critic_sparsity"):
        flags[name] = float(sparsity if flags.get(name) is None else flags[name])
    flags["reset_interval"] = flags.get("reset_interval") or 0
    if flags.get("mask_seed") == flags["seed"]:  # what None means
        flags["mask_seed"] = None
    return flags, metrics


def describe(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds algorithm, size and sparsity in words to runs (one row of flags each), sorted by size and sparsity.

    Runs of one column of panels with equal words and reset interval have equal flags: size names, besides width and
    depth, every flag that differs within the column.
    """
    order = [
        "width_scale",
        "depth_scale",
        "critic_sparsity",
        "actor_sparsity",
        "reset_interval",
        "env_id",
        "exp_name",
    ]
    runs = runs.sort_values([*order, "seed"])
    runs["algorithm"] = [ALGORITHMS.get(name, name) for name in runs.exp_name]
    runs["size"] = [
        f"width x{run.width_scale:g}, depth x{run.depth_scale}" for run in runs.itertuples()
    ]
    others = [name for name in runs if name not in {*order, "seed", "algorithm", "size"}]
    for _, column in runs.groupby(["env_id", "exp_name"]):
        for name in others:
            if len({str(value) for value in column[name]}) > 1:
                runs.loc[column.index, "size"] += [
                    f", {name.replace('_', ' ')} {value}" for value in column[name]
                ]
    runs["sparsity"] = [
        in_words(run.actor_sparsity, run.critic_sparsity) for run in runs.itertuples()
    ]
    return runs


def in_words(actor_sparsity: float, critic_sparsity: float) -> str:
    if actor_sparsity != critic_sparsity:
        return f"actor sparsity {actor_sparsity:g}, critic {critic_sparsity:g}"
    return f"sparsity {critic_sparsity:g}" if critic_sparsity else "dense"


def load_runs(
    runs_dir: str | Path, earlier: tuple[str, ...] = ()
) -> tuple[pd.DataFrame, list[str]]:
    """Every measurement of every finished run, and one line for each folder that is left out.

    Columns: run, seed, width_scale, those of CONFIGURATION, env_step, metric, value. Those of the tables `earlier`
    stand behind those of the folder.
    """
    rows, measurements, left_out = {}, {}, []
    for folder in sorted(path for path in Path(runs_dir).glob("[!.]*") if path.is_dir()):
        try:
            rows[folder.name], measurements[folder.name] = read_run(folder)
        except ValueError as reason:
            left_out.append(f"{folder.name}: {reason}")
    parts = []
    if rows:
        runs = describe(pd.DataFrame(list(rows.values()), index=list(rows), dtype=object))
        runs = runs[["seed", "width_scale", *CONFIGURATION]]
        parts = [measurements[name].assign(run=name, **flags) for name, flags in runs.iterrows()]
    for path in earlier:
        try:
            table = pd.read_csv(path)[COLUMNS]
        except (OSError, ValueError, KeyError) as error:
            fail(f"--earlier {path}: {error}")
        known = {name for part in parts for name in part.run.unique()}
        parts.append(table[~table.run.isin(known)])  # a run may be in the folder as well
    if not parts:
        return pd.DataFrame(), left_out
    data = pd.concat(parts, ignore_index=True)
    if earlier:
        data = data.sort_values(
            ["width_scale", "critic_sparsity", "actor_sparsity", "reset_interval"], kind="stable"
        )
    runs = data.drop_duplicates("run")
    twice = runs.run[runs.duplicated([*CONFIGURATION, "seed"])]
    left_out += [f"{name}: a second run of the same flags and seed" for name in twice]
    return data[~data.run.isin(twice)].reset_index(drop=True), left_out


def find_gaps(data: pd.DataFrame, metrics: tuple[str, ...]) -> list[str]:
    """One line for each run that lacks measurements of a metric that others of its configuration have."""
    lines = []
    for metric, (_, runs) in product(metrics, data.groupby(CONFIGURATION, sort=False)):
        finite = (
            runs[runs.metric == metric]
            .groupby("run")["value"]
            .agg(lambda values: np.isfinite(values).sum())
        )
        steps = runs.env_step[runs.metric == metric].nunique()
        for run in runs.run.unique():
            if (count := finite.get(run, 0)) < max(steps, 1):
                lines.append(f"{run}: {count} of {steps} finite measurements of {metric}")
    return lines


def bootstrap_interval(
    values: np.ndarray, confidence: float = 0.95, resamples: int = 10_000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of values (seeds,); NaN for fewer than two or not finite ones.

    The generator starts anew at each call, so that along a curve the same seeds are drawn at every step.
    """
    if len(values) < 2 or not np.isfinite(values).all():
        return np.nan, np.nan
    how = {"method": "percentile", "confidence_level": confidence, "n_resamples": resamples}
    return tuple(
        scipy.stats.bootstrap(
            (values,), np.mean, rng=np.random.default_rng(0), **how
        ).confidence_interval
    )


def end_value(values: np.ndarray) -> float:
    """Mean of the last tenth of a run's measurements (rounded down, at least one)."""
    return float(np.mean(values[-max(1, len(values) // 10) :]))


def summarise(data: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Mean, interval (low, high) and number of seeds of value, for each combination of keys, in their first order."""
    rows = []
    for key, values in data.groupby(keys, sort=False)["value"]:
        values = values.to_numpy(float)
        rows.append((*key, values.mean(), *bootstrap_interval(values), len(values)))
    return pd.DataFrame(rows, columns=[*keys, "mean", "low", "high", "seeds"])


def over_training(data: pd.DataFrame) -> pd.DataFrame:
    """A row for each configuration, metric and env_step: mean, low, high, seeds."""
    return summarise(data, [*CONFIGURATION, "metric", "env_step"])


def at_the_end(data: pd.DataFrame) -> pd.DataFrame:
    """A row for each configuration and metric, of the end values of its runs: mean, low, high, seeds.

    x is the sparsity of the network that the metric belongs to (the critic's for returns), and line what else tells
    configurations apart: their size, and the other network's sparsity where it differs.
    """
    runs = data.sort_values("env_step", kind="stable").groupby(
        [*CONFIGURATION, "metric", "run"], sort=False
    )["value"]
    ends = runs.agg(lambda values: end_value(values.to_numpy())).reset_index()
    order = data[[*CONFIGURATION, "metric"]].drop_duplicates()
    ends = summarise(order.merge(ends), [*CONFIGURATION, "metric"])
    ends["x"], ends["line"] = ends.critic_sparsity.astype(float), ends["size"]
    for row in ends.itertuples():
        own, other = ("actor", "critic") if "/actor_" in row.metric else ("critic", "actor")
        if row.actor_sparsity != row.critic_sparsity:
            ends.loc[row.Index, "x"] = getattr(row, f"{own}_sparsity")
            ends.loc[row.Index, "line"] += (
                f", {other} sparsity {getattr(row, f'{other}_sparsity'):g}"
            )
    return ends


def with_and_without_reset(data: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The runs of networks that were trained both ways, and one line for each run that is left out."""
    networks = data.groupby([name for name in CONFIGURATION if name != "reset_interval"])[
        "reset_interval"
    ]
    both = (networks.transform("min") == 0) & (networks.transform("max") > 0)
    rest = data[~both].drop_duplicates("run")
    other = rest.reset_interval.map(lambda interval: "without" if interval else "with")
    return data[both], [
        f"{run}: no finished run of this network {word} resets"
        for run, word in zip(rest.run, other)
    ]


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
        there = data[["width_scale", "critic_sparsity"]].drop_duplicates().itertuples(index=False)
        fail(f"--variants: no finished run; there are {' '.join(f'{w:g}:{s:g}' for w, s in there)}")
    return data[chosen]


def name_axis(metric: str) -> str:
    """diagnostics/critic_grad_norm -> critic: gradient norm (L2)"""
    name = metric.split("/")[1]
    network, _, rest = name.partition("_")
    return (
        f"{network}\n{LABELS.get(rest, rest)}"
        if network in ("actor", "critic")
        else LABELS.get(name, name)
    )


def count_seeds(seeds: pd.Series) -> str:
    low, high = seeds.min(), seeds.max()
    if high == 1:
        return "1 seed: no band"
    if low == high:
        return f"{high} seeds"
    return f"{low} to {high} seeds" + (", no band where 1" if low == 1 else "")


def draw_curves(ax, curves: pd.DataFrame, colours: dict) -> None:
    """Means over training with their intervals: a colour for each network, dashed with resets, which are marked."""
    for (size, sparsity, reset), curve in curves.groupby(
        ["size", "sparsity", "reset_interval"], sort=False
    ):
        colour = colours[size, sparsity]
        ax.plot(curve.env_step, curve["mean"], color=colour, ls="--" if reset else "-", lw=1.5)
        ax.fill_between(curve.env_step, curve.low, curve.high, color=colour, alpha=0.2, lw=0)
        for step in range(reset, curve.env_step.max(), reset) if reset else ():
            ax.axvline(step, color="0.8", lw=0.8, zorder=0)
    ax.xaxis.set_major_formatter(EngFormatter(sep=" "))


def draw_against_sparsity(ax, ends: pd.DataFrame, styles: dict) -> None:
    """Ends of training with their intervals against sparsity, one line for each size of network."""
    for size, line in ends.groupby("line", sort=False):
        error = line[["low", "high"]].sub(line["mean"], axis=0).abs().to_numpy().T
        ax.errorbar(
            line.x.astype(float), line["mean"], error, ms=4, lw=1.2, capsize=2, **styles[size]
        )
    ax.set_xlim(-0.05, 1.0)


def make_legend(
    curves: pd.DataFrame, ends: pd.DataFrame, colours: dict, styles: dict
) -> list[Line2D]:
    """What stands for each size of network at the end of training, and for each configuration over training."""
    handles = []
    for size, rows in ends.groupby("line", sort=False):
        handles.append(
            Line2D(
                [], [], ms=4, lw=1.2, **styles[size], label=f"{size} ({count_seeds(rows.seeds)})"
            )
        )
    for (size, sparsity, reset), rows in curves.groupby(
        ["size", "sparsity", "reset_interval"], sort=False
    ):
        label = f"{size}, {sparsity}" + (f", reset every {reset:,} env steps" if reset else "")
        style = {"color": colours[size, sparsity], "ls": "--" if reset else "-"}
        handles.append(Line2D([], [], **style, label=f"{label} ({count_seeds(rows.seeds)})"))
    if curves.reset_interval.any():
        handles.append(Line2D([], [], color="0.8", lw=0.8, label="a reset"))
    return handles


def draw(
    curves: pd.DataFrame, ends: pd.DataFrame, metrics: tuple[str, ...], panels: tuple[str, ...]
) -> Figure:
    """One row for each metric and panel ("end", "training"), one column for each environment and algorithm.

    Two panels of one environment stand side by side, as in the paper.
    """
    networks = curves[["size", "sparsity"]].drop_duplicates().itertuples(index=False, name=None)
    colours = {network: colormaps["tab10"](index) for index, network in enumerate(networks)}
    greys = zip(cycle("osD^v"), cycle(("0", "0.5", "0.75")))
    styles = {
        line: {"marker": marker, "color": grey}
        for line, (marker, grey) in zip(ends["line"].unique(), greys)
    }
    handles = make_legend(curves, ends if "end" in panels else ends.iloc[:0], colours, styles)
    rows = list(product(metrics, panels))
    shown = ends if "end" in panels else curves  # not the tasks that --variants leaves empty
    columns = sorted(set(shown[COLUMN].itertuples(index=False, name=None)))
    abreast = (len(rows), len(columns)) == (2, 1)
    down, across = (1, 2) if abreast else (len(rows), len(columns))
    figure = Figure(
        (max(4.2 * across, 6), 2.4 * down + 0.8 + 0.2 * len(handles)), layout="constrained"
    )
    axes = figure.subplots(down, across, squeeze=False)
    axes = axes.T if abreast else axes
    for (row, (metric, panel)), (column, (env_id, algorithm)) in product(
        enumerate(rows), enumerate(columns)
    ):
        ax, table = axes[row, column], ends if panel == "end" else curves
        table = table[
            (table.metric == metric) & (table.env_id == env_id) & (table.algorithm == algorithm)
        ]
        if panel == "end":
            draw_against_sparsity(ax, table, styles)
        else:
            draw_curves(ax, table, colours)
        if metric.endswith("grad_norm"):
            ax.set_yscale("log")
            ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter("{x:g}")
        if "dormant" in metric:
            top = max(1.0, ax.get_ylim()[1])
            ax.set_ylim(-0.04 * top, top)  # a line at zero can be seen
        if row == 0 or abreast:
            ax.set_title(f"{env_id.removeprefix('dm_control/')}, {algorithm}", fontsize=11)
        if column == 0:
            ax.set_ylabel(
                name_axis(metric) + ("\n(mean of the last 10 %)" if panel == "end" else "")
            )
        if row == len(rows) - 1 or len(panels) > 1 or abreast:
            ax.set_xlabel("sparsity (fraction removed)" if panel == "end" else "env steps")
        ax.spines[["top", "right"]].set_visible(False)
    title = "mean over seeds, with its 95 % bootstrap interval"
    figure.legend(
        handles=handles, loc="outside lower center", frameon=False, fontsize=9, title=title
    )
    return figure


def to_markdown(ends: pd.DataFrame, metrics: tuple[str, ...]) -> str:
    """A line for each configuration and a column for each metric: mean [low, high] over seeds."""
    lines = [" | ".join(["| environment | algorithm | network | reset | seeds", *metrics]) + " |"]
    lines += ["|---" * (5 + len(metrics)) + "|"]
    for key, rows in ends.groupby(CONFIGURATION, sort=False):
        row = dict(zip(CONFIGURATION, key))
        cells = {
            r.metric: f"{r.mean:.4g}" + (f" [{r.low:.4g}, {r.high:.4g}]" if r.seeds > 1 else "")
            for r in rows.itertuples()
        }
        reset = f"every {row['reset_interval']:,}" if row["reset_interval"] else "never"
        seeds = " / ".join(map(str, rows.seeds.unique()))
        line = [row["env_id"], row["algorithm"], f"{row['size']}, {row['sparsity']}", reset, seeds]
        lines.append(
            "| " + " | ".join([*line, *(cells.get(metric, "missing") for metric in metrics)]) + " |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    args = tyro.cli(Args)
    metrics, panels = args.metrics or METRICS[args.figure], PANELS.get(args.figure, ("training",))
    data, left_out = load_runs(args.runs_dir, args.earlier)
    if not data.empty and args.figure == "reset":
        data, alone = with_and_without_reset(data)
        left_out += alone
    elif not data.empty:
        resets = data[data.reset_interval > 0].run.unique()
        left_out += [f"{run}: has resets (see --figure reset)" for run in resets]
        data = data[data.reset_interval == 0]
    for line in left_out:
        print(f"left out: {line}")
    if data.empty:
        needed = (
            "finished runs with and without --reset-interval"
            if args.figure == "reset"
            else "finished runs"
        )
        fail(f"no {needed} in {args.runs_dir}; choose a folder of runs with --runs-dir")
    for metric in metrics:
        if metric not in set(data.metric):
            fail(
                f"--metrics {metric}: in no finished run; there are {', '.join(sorted(set(data.metric)))}"
            )
    for line in find_gaps(data, metrics):
        print(f"missing: {line}")
    everything, data = data, data[data.metric.isin(metrics)]
    chosen = select_variants(data, args.variants) if "training" in panels else data.iloc[:0]
    if (count := len(chosen[["size", "sparsity"]].drop_duplicates())) > 10:
        fail(
            f"{count} networks are more than 10 colours; choose some with --variants WIDTH_SCALE:SPARSITY ..."
        )
    curves, ends, folder = over_training(chosen), at_the_end(data), Path(args.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write to {folder} ({error.strerror}); choose another folder with --output")
    picture = draw(curves, ends, metrics, panels)
    for suffix in ("png", "svg"):
        picture.savefig(folder / f"{args.figure}.{suffix}", dpi=150)
    curves, ends = (table.sort_values(COLUMN, kind="stable") for table in (curves, ends))
    if "training" in panels:
        curves.to_csv(folder / f"{args.figure}.csv", index=False)
    ends.to_csv(folder / f"{args.figure}_end.csv", index=False)
    gzip = {
        "method": "gzip",
        "mtime": 0,
    }  # without the time, so that the same runs give the same file
    everything.to_csv(folder / f"{args.figure}_runs.csv.gz", index=False, compression=gzip)
    (folder / f"{args.figure}_end.md").write_text(to_markdown(ends, metrics))
    print(f"{data.run.nunique()} runs: pictures and tables are {folder / args.figure}*")
