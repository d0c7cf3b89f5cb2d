"""Human-normalised Atari scores of der_impala_sparse.py, and Figure 18 of the paper.

    python sparse_zoo/analysis/atari_scores.py --runs-dir runs --output results/atari

A run's score is its final evaluation, normalised to 0 for random and 1 for human play
(atari26_scores.csv). Aggregates over games (mean, median, interquartile mean, optimality gap)
follow Agarwal et al. 2021, arXiv:2108.13264: the median is that of the games' means, the
interquartile mean is over all runs, the optimality gap is the mean shortfall from 1. Intervals are
95 % percentiles of a bootstrap that draws seeds anew within each game; one seed a game gives none.

Figure 18: a bar is 100 (normalised score / that of the baseline - 1), over the absolute value where
that is negative: scores count from random play, so that negative ones, as in Pong, make sense.
Games without a run are named, and the number of games stands beside every aggregate.
"""

from collections.abc import Callable
from dataclasses import dataclass

import runs
import numpy as np
import pandas as pd
import plots
from runs import fail
from matplotlib.figure import Figure

VARIANT = ["width_scale", "depth_scale", "sparsity"]
# Flags that may differ between the runs of one comparison, beside those that change no result
FREE = [*VARIANT, "env_id", *runs.MEASURING]


@dataclass
class Args:
    runs_dir: str = "runs"
    """folder that holds one folder per run"""
    output: str = "results/atari"
    """folder of the figure and the numbers"""
    baseline_width: runs.Width = 1.0
    """width scale of the dense runs that others are compared with"""
    samples: runs.Count = 2000
    """bootstrap samples"""


def load(runs_dir: str) -> pd.DataFrame:
    """One row per finished run: VARIANT, game, seed, score. Ends if runs cannot be compared."""
    found, left_out = runs.load_runs(runs_dir, "der_impala_sparse")
    columns = [*VARIANT, "game", "seed", "score", "run"]
    rows = []
    for run in found:
        game = plots.game_name(run.flags["env_id"])
        size = [run.flags[name] for name in VARIANT]
        rows.append([*size, game, run.flags["seed"], run.final_return, run.name])
    scores, twice = runs.drop_twice(pd.DataFrame(rows, columns=columns), columns[:4])
    runs.print_left_out(left_out + twice)
    if scores.empty:
        fail(f"no finished run of der_impala_sparse in {runs_dir}")
    runs.fail_if_mixed(found, FREE)
    return scores.drop(columns="run")


def normalise(scores: pd.DataFrame) -> pd.DataFrame:
    """The runs with `normalised`: 0 for random play, 1 for human play.

    Games beyond the 26 are named and left out.
    """
    reference = plots.read_atari_scores()
    known = scores.game.isin(reference.index)
    for game in sorted(scores.game[~known].unique()):
        print(f"left out: {game} is not among the 26 games of Atari-100k")
    scores = scores[known]
    random, human = (scores.game.map(reference[name]) for name in ("random", "human"))
    return scores.assign(normalised=(scores.score - random) / (human - random))


def of_games(statistic: Callable) -> Callable:
    """A statistic of the games' means."""

    def aggregate(*games: np.ndarray, axis: int = -1) -> np.ndarray:
        return statistic([game.mean(axis) for game in games], 0)

    return aggregate


def optimality_gap(*games: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean([1 - np.minimum(game, 1).mean(axis) for game in games], 0)


AGGREGATES = {  # of the normalised scores (seeds,) of each game
    "mean": of_games(np.mean),
    "median": of_games(np.median),
    "iqm": plots.interquartile_mean,
    "optimality_gap": optimality_gap,
}


def summarise(scores: pd.DataFrame, samples: int) -> pd.DataFrame:
    """A row per VARIANT: games, runs, aggregates and the ends of their intervals.

    Names missing games.
    """
    rows = []
    every = plots.read_atari_scores().index
    most = max(len(group) / group.game.nunique() for _, group in scores.groupby(VARIANT))
    for key, group in scores.groupby(VARIANT):
        games = [game.to_numpy() for _, game in group.groupby("game").normalised]
        counts = group.groupby("game").size().to_dict()
        missing = sorted(set(every) - set(group.game))
        name = variant_name(*key)
        if len(group) / len(games) < most:
            print(f"{name}: {len(group) / len(games):g} seeds a game, others have {most:g}")
        if missing:
            print(f"{name}: {len(games)} of {len(every)} games; missing: {', '.join(missing)}")
        if len(set(counts.values())) > 1:
            print(f"{name}: seeds per game differ: {counts}")
        row = dict(zip(VARIANT, key))
        row |= {"games": len(games), "runs": len(group), "missing": " ".join(missing)}
        for aggregate, function in AGGREGATES.items():
            row[aggregate] = function(*games)
            ends = plots.bootstrap_interval(games, function, resamples=samples)
            row[f"{aggregate}_low"], row[f"{aggregate}_high"] = ends
        rows.append(row)
    return pd.DataFrame(rows)


def improvements(scores: pd.DataFrame, baseline: tuple) -> pd.DataFrame:
    """Percentage over the dense baseline: a row per game, a column per other variant.

    Empty where one lacks.
    """
    means = scores.groupby(["game", *VARIANT]).normalised.mean().unstack(VARIANT)
    if baseline not in means:
        fail(f"no dense run of width {baseline[0]:g} to compare with (--baseline-width)")
    base = means[baseline]
    for why, where in (
        ("for lack of a baseline run", base.isna()),
        ("for the baseline scores exactly as random play", base == 0),
    ):
        if where.any():
            print(f"not drawn, {why}: {', '.join(sorted(base.index[where]))}")
    base = base.where(base != 0)
    others = means.drop(columns=[baseline])
    return 100 * others.sub(base, axis=0).div(base.abs(), axis=0)


def variant_name(width: float, depth: int, sparsity: float) -> str:
    depth_text = f" depth {depth}" if depth != 1 else ""
    return f"width {width:g}{depth_text} {plots.sparsity_name(sparsity)}"


def figure_18(percent: pd.DataFrame, scores: pd.DataFrame, baseline: tuple) -> Figure:
    """Bars of improvement, a group for each game; linear between -100 and 100 %, then logarithmic.

    Widths have hatches of their own. The legend has the number of seeds in the scores.
    """
    seeds = scores.groupby([*VARIANT, "game"]).size()
    figure, axes = plots.make_grid(1, 1, max(5, 0.55 * len(percent) + 2), 3.3)
    ax = axes[0, 0]
    width = 0.8 / len(percent.columns)
    sizes = list(dict.fromkeys(column[:2] for column in percent))
    for index, column in enumerate(percent):
        places = np.arange(len(percent)) + (index - (len(percent.columns) - 1) / 2) * width
        hatch = ["", "//", "xx", ".."][sizes.index(column[:2]) % 4]
        style = {"color": plots.sparsity_colour(column[2]), "hatch": hatch, "edgecolor": "white"}
        label = f"{variant_name(*column)} ({plots.count_seeds(*seeds[column])})"
        ax.bar(places, percent[column], width, label=label, **style)
    ax.axhline(0, color="0.3", lw=0.8)
    ax.set_yscale("symlog", linthresh=100, subs=[2, 5])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.set_xticks(np.arange(len(percent)), percent.index, rotation=60, ha="right", fontsize=8)
    ax.set_ylabel("gain over the dense baseline, %\n(logarithmic beyond 100)")
    ax.legend(
        title=f"baseline: {plots.count_seeds(*seeds[baseline])}", fontsize=8, title_fontsize=8
    )
    return figure


def main(args: Args) -> None:
    scores = normalise(load(args.runs_dir))
    if scores.empty:
        fail("no run of one of the 26 games of Atari-100k")
    summary = summarise(scores, args.samples)
    baseline = (args.baseline_width, 1, 0.0)  # VARIANT
    percent = improvements(scores, baseline)
    named = percent.set_axis([variant_name(*column) for column in percent], axis=1)
    files = "scores.csv, aggregates.csv and improvements.csv"
    with runs.new_files(args.output) as output:
        scores.to_csv(output / "scores.csv", index=False, float_format="%.4f")
        summary.to_csv(output / "aggregates.csv", index=False, float_format="%.4f")
        named.to_csv(output / "improvements.csv", float_format="%.2f")
        if percent.notna().to_numpy().any():
            plots.save(figure_18(percent, scores, baseline), output, "figure_18")
            files += ", figure_18"
    print(summary.drop(columns="missing").to_string(index=False, float_format="{:.3f}".format))
    print(f"{files} are in {args.output}")


if __name__ == "__main__":
    runs.start(main, Args)
