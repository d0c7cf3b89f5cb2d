"""How every figure looks, and the statistics that figures and tables show.

Colours mean the same everywhere: dense networks are dark grey, and each sparsity has its own colour
of one map, from blue (little) to yellow (much). A hollow point is that of one seed.
"""

import math
from collections.abc import Callable
from functools import cache
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats
from runs import RESULTS
from matplotlib import colormaps, rcParams
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from PIL import Image

DENSE = "#404040"
NEUTRAL = "0.65"  # a line through points of several sparsities
PUBLISHED = {"color": "#2a9d8f", "ls": "", "marker": "s", "ms": 4.5}
LINE_STYLES = ["-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2))]
LINE_STYLES += [(0, (6, 1, 1, 1, 1, 1, 1, 1)), (0, (3, 1, 3, 4)), (0, (10, 3, 2, 3))]
MARKERS = "osD^vP"
DPI = 110
MOST_EXACT = 3  # seeds up to which the interval of their mean reaches from lowest to highest
rcParams["legend.frameon"] = False


# Colours and panels


def sparsity_colour(sparsity: float) -> str:
    """Dark grey for dense networks.

    Down to a density of 0.05, equal ratios of active weights are equal steps of the map; what is
    left of it is for sparser networks.
    """
    density = 1 - sparsity
    if sparsity == 0:
        return DENSE
    if density >= 0.05:
        position = 0.05 + 0.82 * math.log(density) / math.log(0.05)
    else:
        position = 1 - 0.13 * density / 0.05
    return to_hex(colormaps["plasma"](position))


def sparsity_name(sparsity: float) -> str:
    return f"sparsity {sparsity:g}" if sparsity else "dense"


def size_styles(sizes: list) -> dict:
    """Marker and shade of green of each size of network, from the first (light) to the last."""
    shades = np.linspace(0.95, 0.5, len(sizes))[::-1]
    return {
        size: {"marker": marker, "color": to_hex(colormaps["Greens"](shade))}
        for size, shade, marker in zip(sizes, shades, cycle(MARKERS))
    }


def line_styles(names: list) -> dict:
    """The line style of each of some names; says so if some have the same."""
    if len(names) > len(LINE_STYLES):
        print(f"note: {len(names)} kinds of network have {len(LINE_STYLES)} styles of line")
    return dict(zip(names, cycle(LINE_STYLES)))


def game_name(env_id: str) -> str:
    """ALE/Pong-v5 -> Pong"""
    return env_id.removeprefix("ALE/").removesuffix("-v5")


def task_name(env_id: str) -> str:
    """dm_control/walker-walk-v0 -> Walker Walk, ALE/Pong-v5 -> Pong"""
    task = game_name(env_id.removeprefix("dm_control/").removesuffix("-v0"))
    return task if task != task.lower() else task.replace("-", " ").title()


def make_grid(
    down: int, across: int, width: float = 3.3, height: float = 2.7
) -> tuple[Figure, np.ndarray]:
    """A figure and its panels (down, across)."""
    figure = Figure((max(width * across, 5.5), height * down + 0.5), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.title.set_fontsize(11)
    return figure, axes


def label_env_steps(ax: Axes) -> None:
    ax.set_xlabel("env steps")
    ax.xaxis.set_major_formatter(EngFormatter(sep=" "))


def label_weights(ax: Axes, label: str, scale: str = "log") -> None:
    """An x axis of numbers of weights."""
    ax.set_xscale(scale)
    if scale == "log":
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(label)


def mark_values(ax: Axes, values: list[float]) -> None:
    """Ticks of the x axis at just these values."""
    labels = [f"{value:g}" for value in values]
    ax.set_xticks(values, labels, rotation=45 if max(map(len, labels)) > 4 else 0)
    ax.minorticks_off()


def add_legend(figure: Figure, handles: list, title: str) -> None:
    """Below the panels; the title says what points and bars are."""
    longest = max(len(handle.get_label()) for handle in handles)
    columns = int(figure.get_figwidth() / (0.08 * longest + 0.7))  # inches of a label
    figure.legend(
        handles=handles,
        title=title if figure.get_figwidth() >= 8 else title.replace("; ", ";\n"),
        loc="outside lower center",
        ncols=max(1, columns),
        fontsize=9,
    )


def save(figure: Figure, folder: Path, name: str, dpi: int = DPI) -> None:
    """As PNG, of at most 256 colours, and as SVG."""
    figure.savefig(folder / f"{name}.svg", dpi=dpi)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=dpi)
    with Image.open(path) as image:
        image.convert("RGB").quantize(256).save(path, optimize=True)


# Points, bars, bands


def bar_lengths(middle: pd.Series, low: pd.Series, high: pd.Series) -> np.ndarray:
    """How far bars reach below and above each point (2, points)."""
    return np.array([middle - low, high - middle]).clip(0)


def draw_points(
    ax: Axes, x, points: pd.DataFrame, color: str, colours=None, ls: str = "-", **style
) -> None:
    """Points with bars, joined by a line; hollow where there is one seed.

    points: middle, low, high, seeds. color: that of the line, and of each point without `colours`.
    """
    ax.plot(x, points.middle, color=color, lw=1.4, ls=ls)
    style = {"marker": "o", "ms": 5, "lw": 0, "elinewidth": 1.2, "capsize": 2.5} | style
    colours = [color] * len(points) if colours is None else colours
    lengths = bar_lengths(points.middle, points.low, points.high)
    for place, point, colour, bars in zip(x, points.itertuples(), colours, lengths.T):
        face = "white" if point.seeds == 1 else colour
        ax.errorbar(place, point.middle, bars[:, None], color=colour, mfc=face, **style)


def move_apart(sizes: pd.Series, step: float = 1.08) -> list[float]:
    """Places on a logarithmic axis, where equal sizes (within 10 %) would cover each other.

    The first of equal ones stays, each further one is moved a step to the right.
    """
    places = []
    for number, size in enumerate(sizes):
        equal = (sizes.iloc[:number] / size).between(0.9, 1.1)
        places.append(size * step ** equal.sum())
    return places


def label_apart(ax: Axes, sizes: pd.Series, places: list[float], name: str) -> None:
    """A logarithmic x axis for move_apart: a tick where the first of equal sizes stayed."""
    label_weights(ax, f"{name} (equal ones side by side)")
    stayed = sorted({size for size, place in zip(sizes, places) if size == place})
    name_number = EngFormatter(sep="")
    ax.set_xticks(stayed, [name_number(float(f"{size:.3g}")) for size in stayed])
    ax.minorticks_off()


def draw_band(ax: Axes, x, middle, low, high, **line) -> None:
    """A curve and the band about it."""
    ax.plot(x, middle, **line)
    ax.fill_between(x, low, high, color=line["color"], alpha=0.13, lw=0)


def draw_range(ax: Axes, curves: pd.DataFrame, **line) -> None:
    """The mean of some curves (columns) and a band from the lowest to the highest."""
    lowest = curves.min(axis=1)
    draw_band(ax, curves.index, curves.mean(axis=1), lowest, curves.max(axis=1), **line)


def one_seed_handle() -> Line2D:
    return Line2D([], [], color=DENSE, ls="", marker="o", mfc="white", label="hollow: one seed")


# Seeds and intervals


def count_seeds(*counts: int) -> str:
    """one seed, 3 seeds, 1 to 4 seeds; of the seeds of some points"""
    fewest = min(counts)
    most = max(counts)
    if most == 1:
        return "one seed"
    return f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"


def describe_interval(*counts: int) -> str:
    """What the bars or bands about means over seeds are, for the legend.

    With three seeds a 95 % bootstrap interval of the mean ends at the lowest and the highest.
    """
    if max(counts) == 1:
        return "one seed, so no interval"
    if max(counts) <= MOST_EXACT:
        return f"lowest to highest of {count_seeds(*counts)}"
    interval = f"95 % bootstrap interval of {count_seeds(*counts)}"
    few = f" (up to {MOST_EXACT} seeds: lowest to highest)" if min(counts) <= MOST_EXACT else ""
    return interval + few


def interquartile_mean(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of the middle half of all values; `axis` of each task's array runs over seeds."""
    return scipy.stats.trim_mean(np.concatenate(tasks, axis), 0.25, axis)


def bootstrap_interval(
    tasks: list[np.ndarray],
    statistic: Callable = interquartile_mean,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of values per seed, resampled within each task.

    NaN if no task has two seeds, or a value is not finite. The generator starts anew at each call,
    so that along a curve the same seeds are drawn at every step.
    """
    if max(map(len, tasks)) < 2 or not np.isfinite(np.concatenate(tasks)).all():
        return np.nan, np.nan
    sizes = [len(values) for values in tasks]

    def of_sizes(*resampled: np.ndarray, axis: int = -1) -> np.ndarray:
        return statistic(*(values[..., :size] for values, size in zip(resampled, sizes)), axis=axis)

    result = scipy.stats.bootstrap(
        # A second copy of a lone value: resampling draws it always, and scipy wants two
        [np.repeat(values, 2) if len(values) == 1 else values for values in tasks],
        of_sizes,
        method="percentile",
        confidence_level=confidence,
        n_resamples=resamples,
        rng=np.random.default_rng(0),
        vectorized=True,
    )
    return tuple(result.confidence_interval)


def probability_of_improvement(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
    """How often one network is better than another, if a seed of each is drawn at random.

    Averaged over tasks; equal values count half (Agarwal et al. 2021, section 4.3).

    tasks: values of the one and of the other on the first task, then on the second, ...;
    (..., seeds) each
    """
    shares = [
        (np.sign(ours[..., :, None] - theirs[..., None, :]) / 2 + 0.5).mean((-2, -1))
        for ours, theirs in zip(tasks[::2], tasks[1::2], strict=True)
    ]
    return np.mean(shares, axis=0)


def mean_of_tasks(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean over tasks of the means over seeds; `axis` of each task's array runs over seeds."""
    return np.mean([values.mean(axis) for values in tasks], axis=0)


def mean_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the mean of values (seeds,)."""
    return bootstrap_interval([values], np.mean, confidence, resamples=10_000)


# Published numbers


@cache
def read_atari_scores() -> pd.DataFrame:
    """Scores of random and human play, by game."""
    return pd.read_csv(Path(__file__).with_name("atari26_scores.csv"), index_col="game")


@cache
def read_published() -> pd.DataFrame:
    return pd.concat(map(pd.read_csv, sorted(RESULTS.glob("published_curves_*.csv"))))


def published_curve(algorithm: str, env_id: str) -> pd.DataFrame:
    """The published curve of the dense default network: env_step, mean, std, seeds; or no row."""
    table = read_published()
    task = env_id.removeprefix("dm_control/").removesuffix("-v0").replace("-", "_")
    names = [algorithm, f"{algorithm} SimBa"]
    return table[table.algorithm.isin(names) & (table.task == task)]


# Tables


def markdown_table(header: list[str], rows: list[list]) -> str:
    """Rows of cells as a Markdown table, in columns of equal width."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in cells]
    return "".join(f"| {line} |\n" for line in lines)
