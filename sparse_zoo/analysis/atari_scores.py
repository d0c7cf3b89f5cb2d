"""Human-normalised Atari scores of der_impala_sparse.py, and Figure 18 of the paper; and the same numbers as files.

    python sparse_zoo/analysis/atari_scores.py --runs-dir runs --output results/atari

A run's score is its final evaluation, normalised to 0 for random and 1 for human play (atari26_scores.csv). Aggregates
over games (mean, median, interquartile mean, optimality gap) follow Agarwal et al. 2021, arXiv:2108.13264: the median
is that of the games' means, the interquartile mean is over all runs, the optimality gap is the mean shortfall from 1.
Intervals are 95 % percentiles of a bootstrap that draws seeds anew within each game; one seed a game gives none.

Figure 18: a bar is 100 (normalised score / that of the baseline - 1), over the absolute value where that is negative:
scores count from random play, so that negative ones, as in Pong, make sense. Games without a run are named, and the
number of games stands beside every aggregate.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure
from scipy.stats import trim_mean

REFERENCE = Path(__file__).with_name("atari26_scores.csv")
VARIANT = ["width_scale", "depth_scale", "sparsity"]
# Flags that may differ between the runs of one comparison; others must not
FREE = {
    *VARIANT,
    "env_id",
    "seed",
    "mask_seed",
    "device",
    "threads",
    "runs_dir",
    "resume",
    "eval_only",
}
FREE |= {
    "capture_video",
    "sparse_kernel",
    "track",
    "wandb_project",
    "wandb_entity",
    "checkpoint_interval",
}
FREE |= {"eval_interval", "eval_episodes", "diagnostics_interval"}


@dataclass
class Args:
    runs_dir: str = "runs"
    """folder that holds one folder per run"""
    output: str = "results/atari"
    """folder of the figure and the numbers"""
    baseline_width: float = 1.0
    """width scale of the dense runs that others are compared with"""
    samples: int = 2000
    """bootstrap samples"""


def fail(message: str) -> NoReturn:
    """Ends the program with one line for a person and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def load(runs_dir: Path) -> pd.DataFrame:
    """One row per finished run: VARIANT, game, seed, score. Names the unfinished; ends if runs cannot be compared."""
    rows, settings = {}, {}
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
        if flags["exp_name"] != "der_impala_sparse":
            print(f"left out: {path.parent.name} is a run of {flags['exp_name']}")
            continue
        try:
            metrics = pd.read_csv(
                path.parent / "metrics.csv", usecols=["env_step", "metric", "value"]
            )
        except (OSError, ValueError):
            metrics = pd.DataFrame(columns=["env_step", "metric", "value"])
        final = metrics[metrics.metric == "final/return_mean"].value
        if final.empty:
            reached = metrics.env_step.max() if len(metrics) else 0
            print(
                f"left out: {path.parent.name} is at env step {reached} of {flags['total_timesteps']}"
            )
            continue
        game = flags["env_id"].removeprefix("ALE/").removesuffix("-v5")
        key = (*(flags[name] for name in VARIANT), game, flags["seed"])
        if key in rows:
            print(f"left out: {path.parent.name} is a second run of this network, game and seed")
            continue
        rows[key] = final.iloc[-1]
        for name in flags.keys() - FREE:
            settings.setdefault(name, set()).add(flags[name])
    if not rows:
        fail(f"no finished run of der_impala_sparse in {runs_dir}")
    mixed = {name: sorted(map(str, values)) for name, values in settings.items() if len(values) > 1}
    if mixed:
        fail(f"the runs in {runs_dir} differ in {mixed}; keep such runs apart")
    return pd.DataFrame(
        [[*key, score] for key, score in rows.items()], columns=[*VARIANT, "game", "seed", "score"]
    )


def normalise(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with `normalised`: 0 for random play, 1 for human play; games beyond the 26 are named and left out."""
    reference = pd.read_csv(REFERENCE).set_index("game")
    known = runs.game.isin(reference.index)
    for game in sorted(runs.game[~known].unique()):
        print(f"left out: {game} is not among the 26 games of Atari-100k")
    runs = runs[known]
    random, human = (runs.game.map(reference[name]) for name in ("random", "human"))
    return runs.assign(normalised=(runs.score - random) / (human - random))


def aggregates(games: list[np.ndarray]) -> dict[str, float]:
    """Of the normalised scores (seeds,) of each game."""
    scores, means = np.concatenate(games), np.array([game.mean() for game in games])
    gaps = [1 - np.minimum(game, 1).mean() for game in games]
    return {
        "mean": means.mean(),
        "median": float(np.median(means)),
        "iqm": trim_mean(scores, 0.25),
        "optimality_gap": float(np.mean(gaps)),
    }


def bootstrap(games: list[np.ndarray], samples: int) -> dict[str, tuple[float, float]]:
    """Ends of the 95 % intervals of the aggregates: seeds are drawn anew within each game. NaN for one seed a game."""
    if all(len(game) == 1 for game in games):
        return dict.fromkeys(aggregates(games), (np.nan, np.nan))
    generator = np.random.default_rng(0)
    draws = [
        aggregates([generator.choice(game, len(game)) for game in games]) for _ in range(samples)
    ]
    return {
        name: tuple(np.percentile([draw[name] for draw in draws], [2.5, 97.5])) for name in draws[0]
    }


def table(runs: pd.DataFrame, samples: int) -> pd.DataFrame:
    """One row per VARIANT: games, runs, and each aggregate with the ends of its interval. Names missing games."""
    rows, every = [], pd.read_csv(REFERENCE).game
    for key, group in runs.groupby(VARIANT):
        games = [game.to_numpy() for _, game in group.groupby("game").normalised]
        missing = sorted(set(every) - set(group.game))
        if missing:
            print(
                f"{variant_name(*key)}: {len(games)} of {len(every)} games; missing: {', '.join(missing)}"
            )
        if len({len(game) for game in games}) > 1:
            print(
                f"{variant_name(*key)}: seeds per game differ: {group.groupby('game').size().to_dict()}"
            )
        row = dict(zip(VARIANT, key)) | {
            "games": len(games),
            "runs": len(group),
            "missing": " ".join(missing),
        }
        intervals = bootstrap(games, samples)
        for name, value in aggregates(games).items():
            row |= {
                name: value,
                f"{name}_low": intervals[name][0],
                f"{name}_high": intervals[name][1],
            }
        rows.append(row)
    return pd.DataFrame(rows)


def improvements(runs: pd.DataFrame, baseline_width: float) -> pd.DataFrame:
    """Percentage over the dense baseline, one row per game and one column per other variant (empty where one lacks)."""
    means = runs.groupby(["game", *VARIANT]).normalised.mean().unstack(VARIANT)
    baseline = (baseline_width, 1, 0.0)
    if baseline not in means:
        fail(f"no dense run of width {baseline_width:g} to compare with (--baseline-width)")
    others = means.drop(columns=[baseline])
    lost = sorted(means.index[means[baseline].isna()])
    if lost:
        print(f"not drawn, for lack of a baseline run: {', '.join(lost)}")
    at_random = sorted(means.index[means[baseline] == 0])
    if at_random:
        print(f"not drawn, for the baseline scores exactly as random play: {', '.join(at_random)}")
    base = means[baseline].where(means[baseline] != 0)
    return 100 * others.sub(base, axis=0).div(base.abs(), axis=0)


def variant_name(width: float, depth: int, sparsity: float) -> str:
    depth_text = f" depth {depth}" if depth != 1 else ""
    return f"width {width:g}{depth_text} " + (f"sparsity {sparsity:g}" if sparsity else "dense")


def figure_18(percent: pd.DataFrame) -> Figure:
    """Bars of improvement, a group for each game; linear between -100 and 100 %, logarithmic beyond."""
    axes = (
        figure := Figure((max(5, 0.55 * len(percent) + 2), 3.8), layout="constrained")
    ).subplots()
    width = 0.8 / len(percent.columns)
    for index, column in enumerate(percent):
        places = np.arange(len(percent)) + (index - (len(percent.columns) - 1) / 2) * width
        axes.bar(places, percent[column], width, label=variant_name(*column))
    axes.axhline(0, color="0.3", lw=0.8)
    axes.set_yscale("symlog", linthresh=100)
    low, high = axes.get_ylim()
    ticks = [0, 50, *(digit * 10**power for power in range(2, 8) for digit in (1, 2, 5))]
    ticks = [tick for tick in sorted({*ticks, *(-tick for tick in ticks)}) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xticks(np.arange(len(percent)), percent.index, rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("gain over the dense baseline, %")
    axes.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.samples < 1:
        fail(f"--samples {args.samples}: must be at least 1")
    runs = normalise(load(Path(args.runs_dir)))
    if runs.empty:
        fail("no run of one of the 26 games of Atari-100k")
    summary, percent = table(runs, args.samples), improvements(runs, args.baseline_width)
    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write to {output} ({error.strerror}); choose another folder with --output")
    runs.to_csv(output / "scores.csv", index=False, float_format="%.4f")
    summary.to_csv(output / "aggregates.csv", index=False, float_format="%.4f")
    named = percent.set_axis([variant_name(*column) for column in percent], axis=1)
    named.to_csv(output / "improvements.csv", float_format="%.2f")
    print(
        summary.drop(columns="missing").to_string(
            index=False, float_format=lambda value: f"{value:.3f}"
        )
    )
    files = "scores.csv, aggregates.csv and improvements.csv"
    if len(percent.columns) and percent.notna().to_numpy().any():
        for kind in ("png", "svg"):
            figure_18(percent).savefig(output / f"figure_18.{kind}", dpi=150)
        files += ", figure_18"
    print(f"{files} are in {output}")
