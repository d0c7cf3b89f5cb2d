"""Figures 12, 13 and 17 of the paper from runs of stream_ac_sparse.py; and their numbers as files.

    python sparse_zoo/analysis/streaming.py --runs-dir runs --output results/streaming

Returns are those of training episodes, as in Elsayed et al. (2024). A curve is the mean over the
episodes that end in a stretch of --bin env steps; a run's final return is the mean over the
episodes of its last tenth. Runs that are not finished are named and left out. Seeds are averaged;
bands reach from the lowest to the highest seed. The table gives Student's 95 % interval of the mean
over seeds, which is wide for few seeds, as it should be.

comparisons.md and .csv compare each network with the dense one of its width, and with itself at the
smallest width: by final returns, and by the means of whole curves, which tell how fast it learned.
Intervals there are 95 % bootstrap intervals, seeds resampled within each task. Over all tasks the
returns are scores: multiples of the mean return of the dense network of the smallest width.
"""

from dataclasses import dataclass
from itertools import product
from typing import Annotated, Literal

import runs
import numpy as np
import pandas as pd
import plots
from runs import fail
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats

KEYS = ["env_id", "width_scale", "init", "sparsity"]
RUN = [*KEYS, "seed"]
COLUMNS = [*RUN, "total_timesteps", "env_step", "return", "length"]
# Flags that may differ between the runs of one figure, beside those that change no result
FREE = [*KEYS, *runs.MEASURING, "final_eval_episodes", "actor_sparsity", "critic_sparsity"]
INITS = {"lecun": "-", "sparse_init": "--"}
ALL = "all tasks"
LAST, WHOLE = "last tenth", "all of training"
COMPARED = [*KEYS, "against", "runs", "runs_against", "pairs"]
COMPARED += ["iqm", "iqm_low", "iqm_high", "iqm_against", "iqm_against_low", "iqm_against_high"]
COMPARED += ["probability", "probability_low", "probability_high"]
COMPARED += ["difference", "difference_low", "difference_high"]


@dataclass
class Args:
    runs_dir: str = "runs"
    """folder that holds one folder per run"""
    earlier: tuple[str, ...] = ()
    """returns.csv.gz files that earlier calls left, whose runs are drawn as well"""
    output: str = "results/streaming"
    """folder of the figures and the numbers"""
    figures: Annotated[tuple[Literal[12, 13, 17], ...], "x > 0"] = (12, 13, 17)
    """which to draw; those that need SparseInit runs (13) or runs without it (12, 17) are left out
    without them"""
    bin: Annotated[int, "1 <= x <= 10**9"] = 20_000
    """env steps averaged into one point of a curve"""


def load(runs_dir: str, earlier: tuple[str, ...] = ()) -> pd.DataFrame:
    """COLUMNS of every training episode of every finished run and of the tables `earlier`."""
    found, left_out = runs.load_runs(runs_dir, "stream_ac_sparse", ("total_timesteps", "init"))
    tables = [pd.DataFrame(columns=[*COLUMNS, "run"])]
    for run in found:
        episodes = run.metrics[run.metrics.metric.isin(["episode/return", "episode/length"])]
        if episodes.empty:
            left_out.append(f"{run.name}: no episode has ended")
            continue
        actor, critic = runs.network_sparsities(run.flags)
        if actor != critic:
            left_out.append(
                f"{run.name}: sparsity of the actor {actor:g}, of the critic {critic:g}"
            )
            continue
        episodes = episodes.pivot_table(index="env_step", columns="metric", values="value")
        episodes = episodes.rename(columns=lambda name: name.removeprefix("episode/"))
        flags = {name: run.flags[name] for name in [*RUN, "total_timesteps"]}
        flags["sparsity"] = critic
        tables.append(episodes.reset_index().assign(run=run.name, **flags))
    own, twice = runs.drop_twice(pd.concat(tables), KEYS)
    runs.print_left_out(left_out + twice)
    finite = tuple(name for name in COLUMNS if name not in ("env_id", "init"))
    tables = [runs.read_table(path, COLUMNS, "--earlier", finite) for path in earlier]
    episodes = runs.merge([own[COLUMNS], *tables], RUN)
    if episodes.empty:
        fail(f"no finished run of stream_ac_sparse with an episode that ended, in {runs_dir}")
    runs.fail_if_mixed(found, FREE)
    runs.fail_if_lengths_differ(episodes.total_timesteps, episodes.env_id)
    return episodes.infer_objects()


def average_bins(episodes: pd.DataFrame, size: int) -> pd.DataFrame:
    """Mean return per bin, named after its end, one row per KEYS, seed and bin."""
    steps = np.ceil(episodes.env_step / size).astype(int) * size
    bins = episodes.assign(env_step=steps).groupby([*RUN, "env_step"])
    return bins["return"].mean().reset_index()


def final_returns(episodes: pd.DataFrame) -> pd.DataFrame:
    """Mean return over the episodes of the last tenth of each run, one row per KEYS and seed."""
    last = episodes[episodes.env_step > 0.9 * episodes.total_timesteps]
    return last.groupby(RUN)["return"].mean().reset_index()


def mean_returns(bins: pd.DataFrame) -> pd.DataFrame:
    """Mean over the points of each run's curve, one row per KEYS and seed."""
    return bins.groupby(RUN)["return"].mean().reset_index()


def name_missing(episodes: pd.DataFrame, final: pd.DataFrame) -> list[str]:
    """One line for each run without a final return."""
    every = episodes[RUN].drop_duplicates().merge(final, how="left", on=RUN)
    return [
        f"no final return: {run.env_id}, width scale {run.width_scale:g}, "
        f"{name_network(run.init, run.sparsity)}, seed {run.seed}: "
        "no episode ended in its last tenth"
        for run in every[every["return"].isna()].itertuples()
    ]


def summarise(final: pd.DataFrame) -> pd.DataFrame:
    """Seeds, mean, and the ends of Student's 95 % interval (empty for one seed), by KEYS."""
    rows = []
    for key, group in final.groupby(KEYS):
        values = group["return"]
        mean = values.mean()
        low = high = mean
        if values.sem() != 0:  # also where it is NaN
            low, high = stats.t.interval(0.95, len(values) - 1, mean, values.sem())
        text = " ".join(f"{value:.0f}" for value in values)
        rows.append([*key, len(values), mean, low, high, text])
    return pd.DataFrame(rows, columns=[*KEYS, "seeds", "mean", "low", "high", "values"])


def name_network(init: str, sparsity: float) -> str:
    parts = ["SparseInit"] if init == "sparse_init" else []
    parts += [plots.sparsity_name(sparsity)] if sparsity else []
    return " + ".join(parts) or "dense"


def add_scores(final: pd.DataFrame) -> pd.DataFrame:
    """Adds `score`: the return as a multiple of the dense network's mean at the smallest width.

    NaN on tasks where there is no such network, or its mean is not above zero.
    """
    smallest = select(final, final.width_scale.min(), "lecun", 0)
    mean = smallest.groupby("env_id")["return"].mean()
    return final.assign(score=final["return"] / final.env_id.map(mean[mean > 0]))


def select(final: pd.DataFrame, width: float, init: str, sparsity: float) -> pd.DataFrame:
    """The rows of one network, on all tasks."""
    same = (final.width_scale == width) & (final.init == init) & (final.sparsity == sparsity)
    return final[same]


def compare(final: pd.DataFrame) -> pd.DataFrame:
    """COMPARED: each network against the dense one of its width, and its own smallest width.

    A row for each task that both have been run on; and one for all tasks, in scores.
    """
    final = add_scores(final)
    smallest = final.width_scale.min()
    rows = []
    for (width, init, sparsity), network in final.groupby(KEYS[1:]):
        others = {}
        if name_network(init, sparsity) != "dense":
            others["dense"] = select(final, width, "lecun", 0)
        if width > smallest:
            others[f"width scale {smallest:g}"] = select(final, smallest, init, sparsity)
        for against, other in others.items():
            tasks = sorted(set(network.env_id) & set(other.env_id))
            found = {task: compare_pair(network, other, [task], "return") for task in tasks}
            every = len(tasks) == final.env_id.nunique() > 1
            if every and network.score.notna().all() and other.score.notna().all():
                found[ALL] = compare_pair(network, other, tasks, "score")
            rows += [[task, width, init, sparsity, against, *row] for task, row in found.items()]
    return pd.DataFrame(rows, columns=COMPARED)


def compare_pair(
    network: pd.DataFrame, other: pd.DataFrame, tasks: list[str], value: str
) -> list[float]:
    """What follows `against` in COMPARED: of a column of two networks, on some tasks."""
    ours = [network[value][network.env_id == task].to_numpy() for task in tasks]
    theirs = [other[value][other.env_id == task].to_numpy() for task in tasks]
    both = [values for pair in zip(ours, theirs) for values in pair]
    pairs = network[network.env_id.isin(tasks)].merge(other, on=["env_id", "seed"])
    pairs["difference"] = pairs[f"{value}_x"] - pairs[f"{value}_y"]
    differences = [of_task.to_numpy() for _, of_task in pairs.groupby("env_id").difference]
    if len(differences) < len(tasks):  # a task without a seed in common
        differences = []
    row = [sum(map(len, ours)), sum(map(len, theirs)), len(pairs)]
    for values, statistic in (
        (ours, plots.interquartile_mean),
        (theirs, plots.interquartile_mean),
        (both, plots.probability_of_improvement),
        (differences, plots.mean_of_tasks),
    ):
        if values:
            row += [float(statistic(*values)), *plots.bootstrap_interval(values, statistic)]
        else:
            row += [np.nan, np.nan, np.nan]
    return row


def comparisons_table(comparisons: pd.DataFrame) -> str:
    """The comparisons as a Markdown table."""
    header = ["returns of", "task", "width scale", "network", "against"]
    header += ["runs", "IQM", "IQM of the other"]
    header += ["probability of improvement", "mean difference of the same seeds"]
    rows = []
    for row in comparisons.to_dict("records"):
        exact = "z.2f" if row["env_id"] == ALL else "z.0f"
        cells = [row["returns_of"], row["env_id"], f"{row['width_scale']:g}"]
        cells += [name_network(row["init"], row["sparsity"]), row["against"]]
        cells += [f"{row['runs']} and {row['runs_against']}"]
        for name in ("iqm", "iqm_against", "probability", "difference"):
            form = "z.2f" if name == "probability" else exact
            ends = [row[name + end] for end in ("", "_low", "_high")]
            middle, low, high = (format(end, form) for end in ends)
            interval = "" if np.isnan(ends[1]) else f" [{low}, {high}]"
            cells.append("" if np.isnan(ends[0]) else middle + interval)
        rows.append(cells)
    return plots.markdown_table(header, rows)


def line_style(init: str, sparsity: float) -> dict:
    return {"color": plots.sparsity_colour(sparsity), "ls": INITS.get(init, ":"), "lw": 1.3}


def draw_curves(ax: Axes, data: pd.DataFrame) -> None:
    """Mean over seeds and a band from lowest to highest, for each network of one task and width."""
    for (init, sparsity), network in data.groupby(["init", "sparsity"]):
        curves = network.pivot(index="env_step", columns="seed", values="return")
        # Of all seeds alike, also where one has ended no episode
        curves = curves.interpolate("index", limit_area="inside").dropna()
        plots.draw_range(ax, curves, **line_style(init, sparsity))
    ax.set_ylabel("training return")
    plots.label_env_steps(ax)
    if data.empty:
        ax.text(0.5, 0.5, "no finished run", ha="center", transform=ax.transAxes)


def draw_panels(data: pd.DataFrame) -> Figure:
    """Learning curves: a row for each task, a column for each width; one width in a single row."""
    tasks = sorted(data.env_id.unique())
    widths = sorted(data.width_scale.unique())
    rows = len(tasks) if len(widths) > 1 else 1
    figure, axes = plots.make_grid(rows, len(tasks) * len(widths) // rows, 4.2, 3.3)
    for ax, (task, width) in zip(axes.flat, product(tasks, widths)):
        draw_curves(ax, data[(data.env_id == task) & (data.width_scale == width)])
        ax.set_title(f"{task}, {round(128 * width)} hidden units", fontsize=9)
        if rows > 1:
            ax.sharey(axes[tasks.index(task), 0])
    handles = [
        Line2D([], [], **line_style(*network), label=name_network(*network))
        for network in data.groupby(["init", "sparsity"]).groups
    ]
    seeds = data.groupby(KEYS).seed.nunique()
    plots.add_legend(figure, handles, f"mean, lowest to highest; {plots.count_seeds(*seeds)}")
    return figure


def figure_17(data: pd.DataFrame) -> Figure:
    """Learning curves of static sparsity only."""
    return draw_panels(data[data.init == "lecun"])


def figure_13(data: pd.DataFrame) -> Figure:
    """Static sparsity, SparseInit and both, at the smallest width of SparseInit."""
    width = data[data.init == "sparse_init"].width_scale.min()
    return draw_panels(data[data.width_scale == width])


def figure_12(final: pd.DataFrame) -> Figure:
    """Final return against width, a line for each sparsity, a dash for each seed."""
    final = final[final.init == "lecun"]
    tasks = sorted(final.env_id.unique())
    sparsities = sorted(final.sparsity.unique())
    figure, axes = plots.make_grid(1, len(tasks), 4, 3.4)
    for ax, task in zip(axes[0], tasks):
        for sparsity, network in final[final.env_id == task].groupby("sparsity"):
            aside = 1.06 ** sparsities.index(sparsity)  # so that bars do not cover each other
            colour = plots.sparsity_colour(sparsity)
            points = network.groupby("width_scale")["return"].agg(
                middle="mean", low="min", high="max", seeds="size"
            )
            plots.draw_points(ax, points.index * aside, points, colour, ms=6)
            ax.plot(network.width_scale * aside, network["return"], "_", color=colour, ms=8)
        ax.set_xscale("log", base=2)
        plots.mark_values(ax, sorted(final.width_scale.unique()))
        ax.set(title=task, xlabel="width scale", ylabel="training return, last tenth")
    handles = []
    for sparsity in sparsities:
        style = {"color": plots.sparsity_colour(sparsity), "marker": "o"}
        handles.append(Line2D([], [], label=plots.sparsity_name(sparsity), **style))
    seeds = plots.count_seeds(*final.groupby(KEYS).seed.nunique())
    title = f"mean, lowest to highest, a dash for each seed; {seeds} (hollow: one)"
    plots.add_legend(figure, handles, title)
    return figure


def main(args: Args) -> None:
    episodes = load(args.runs_dir, args.earlier)
    data = average_bins(episodes, args.bin)
    final = final_returns(episodes)
    for line in name_missing(episodes, final):
        print(line)
    summary = summarise(final)
    tables = {LAST: final, WHOLE: mean_returns(data)}
    compared = [compare(table).assign(returns_of=name) for name, table in tables.items()]
    comparisons = pd.concat(compared)
    compact = episodes.assign(**{"return": episodes["return"].round(2)}).astype({"length": int})
    drawn = []
    with runs.new_files(args.output) as output:
        compact.to_csv(output / "returns.csv.gz", index=False, compression=runs.GZIP)
        summary.to_csv(output / "final_returns.csv", index=False, float_format="%.5g")
        comparisons.to_csv(output / "comparisons.csv", index=False, float_format="%.5g")
        (output / "comparisons.md").write_text(comparisons_table(comparisons))
        for number in args.figures:
            init = "sparse_init" if number == 13 else "lecun"
            table = final if number == 12 else data
            if not (table.init == init).any():
                what = "final return" if number == 12 else "finished run"
                print(f"not drawn: figure {number}, for lack of a {what} with --init {init}")
                continue
            draw = {12: figure_12, 13: figure_13, 17: figure_17}[number]
            plots.save(draw(table), output, f"figure_{number}")
            drawn.append(f"figure_{number}")
    print(summary.to_string(index=False, float_format="{:.4g}".format))
    if len(comparisons):
        print(comparisons_table(comparisons), end="")
    written = [*drawn, "final_returns.csv", "comparisons.csv", "comparisons.md"]
    print(f"{', '.join(written)} and returns.csv.gz are in {args.output}")
    if not drawn:
        fail("no figure was drawn; the lines above say what each lacks")


if __name__ == "__main__":
    runs.start(main, Args)
