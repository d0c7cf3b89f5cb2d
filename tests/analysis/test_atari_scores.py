"""atari_scores.py on runs made by hand: aggregates by formula, nothing missing is averaged away."""

from pathlib import Path

import conftest
import imageio
import numpy as np
import pandas as pd
import pytest
from analysis import atari_scores
from conftest import check_error, succeed
from plots import bootstrap_interval, read_atari_scores


def write_run(
    runs: Path, game: str, width: float, sparsity: float, seed: int, score: float | None, **flags
) -> None:
    flags = {
        "exp_name": "der_impala_sparse",
        "env_id": f"ALE/{game}-v5",
        "depth_scale": 1,
        "n_step": 10,
        "width_scale": width,
        "sparsity": sparsity,
        "seed": seed,
        "total_timesteps": 400_000,
        **flags,
    }
    rows = [(400, "eval/return_mean", -1.0)]
    if score is not None:
        rows.append((400_000, "final/return_mean", score))
    conftest.write_run(runs / f"{game}-{width}-{sparsity}-{seed}", flags, rows)


@pytest.fixture
def run(main):
    where = ("--runs-dir", "runs", "--output", "out", "--samples", "50")
    return lambda *flags: main(atari_scores.__file__, *where, *flags)


def test_scores_improvements_and_what_is_missing(tmp_path, run):
    runs = tmp_path / "runs"
    # Pong: random -20.7, human 14.6; Breakout: 1.7 and 30.5
    write_run(runs, "Pong", 1.0, 0.0, 1, -20.7 + 0.1 * 35.3)
    write_run(runs, "Pong", 3.0, 0.8, 1, -20.7 + 0.3 * 35.3)
    write_run(runs, "Breakout", 1.0, 0.0, 1, 1.7 - 0.2 * 28.8)
    write_run(runs, "Breakout", 3.0, 0.8, 1, 1.7 + 0.2 * 28.8)
    write_run(runs, "Freeway", 3.0, 0.8, 1, 29.6)  # no baseline
    write_run(runs, "Alien", 1.0, 0.0, 2, None)  # unfinished
    write_run(runs, "Tetris", 1.0, 0.0, 1, 5.0)  # not one of the 26
    out = succeed(run())
    for words in (
        "Alien-1.0-0.0-2: unfinished, at env step 400 of 400,000",
        "left out: Tetris",
        "baseline run: Freeway",
    ):
        assert words in out
    (sparse,) = (
        line for line in out.splitlines() if line.startswith("width 3 sparsity 0.8: 3 of 26")
    )
    assert "Alien" in sparse and "Zaxxon" not in sparse and "Pong" not in sparse
    percent = pd.read_csv(tmp_path / "out" / "improvements.csv").set_index("game")[
        "width 3 sparsity 0.8"
    ]
    assert percent["Pong"] == pytest.approx(200) and percent["Breakout"] == pytest.approx(200)
    assert np.isnan(percent["Freeway"])
    table = pd.read_csv(tmp_path / "out" / "aggregates.csv").set_index("sparsity")
    assert table.loc[0.8, "games"] == table.loc[0.8, "runs"] == 3 and table.loc[
        0.8, "mean"
    ] == pytest.approx(0.5)
    assert table.loc[0.8, "median"] == pytest.approx(0.3) and np.isnan(table.loc[0.8, "mean_low"])
    assert imageio.imread(tmp_path / "out" / "figure_18.png").std() > 1
    assert (tmp_path / "out" / "figure_18.svg").stat().st_size > 1000


def test_aggregates_by_formula():
    games = [np.array([0.0, 2.0]), np.array([0.5, 0.7]), np.array([-0.1, 0.3])]
    found = {name: function(*games) for name, function in atari_scores.AGGREGATES.items()}
    assert found["mean"] == pytest.approx((1 + 0.6 + 0.1) / 3)
    assert found["median"] == pytest.approx(0.6)
    # Six runs, sorted -0.1 0 0.3 0.5 0.7 2: one is cut off on each side
    assert found["iqm"] == pytest.approx((0 + 0.3 + 0.5 + 0.7) / 4)
    assert found["optimality_gap"] == pytest.approx(((1 - 0.5) + (1 - 0.6) + (1 - 0.1)) / 3)


@pytest.mark.parametrize("function", atari_scores.AGGREGATES.values())
def test_bootstrap_draws_seeds_within_each_game(function):
    # No spread within a game, much between games: a stratified interval has no width
    low, high = bootstrap_interval([np.full(5, 0.1), np.full(5, 0.9)], function, resamples=100)
    assert low == pytest.approx(high)


def test_bootstrap_of_one_game():
    # The interval of the mean is about 1.96 standard errors on each side
    scores = np.random.default_rng(1).normal(0.5, 0.1, 400)
    low, high = bootstrap_interval([scores], atari_scores.AGGREGATES["mean"])
    error = scores.std() / 20
    assert low == pytest.approx(scores.mean() - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(scores.mean() + 1.96 * error, abs=0.25 * error)


@pytest.mark.parametrize(
    "runs,words",
    [
        ([], "no finished run"),
        ([("Pong", 3.0, 0.0, 1, 1.0)], "no dense run of width 1"),
        (
            [("Pong", 1.0, 0.0, 1, 1.0), ("Pong", 1.0, 0.8, 1, 1.0, {"n_step": 3})],
            "mixes --n-step 10 3",
        ),
        ([("Tetris", 1.0, 0.0, 1, 1.0)], "26 games"),
    ],
)
def test_runs_that_cannot_be_compared(tmp_path, run, runs, words):
    for *made, flags in ((*made, {}) if len(made) == 5 else made for made in runs):
        write_run(tmp_path / "runs", *made, **flags)
    check_error(run(), *words.split())
    assert not (tmp_path / "out").exists()


def test_the_reference_scores_are_those_of_the_26_games():
    scores = read_atari_scores()
    assert len(scores) == 26 and scores.index.is_unique and (scores.human > scores.random).all()
    assert scores.loc["Pong"].tolist() == [-20.7, 14.6]


def test_runs_that_cannot_be_used_are_named(tmp_path, run):
    write_run(tmp_path / "runs", "Pong", 1, 0, 1, 5.0)
    # The same network, game and seed
    write_run(tmp_path / "more", "Pong", 1, 0, 1, 7.0, eval_interval=7)
    (tmp_path / "more" / "Pong-1-0-1").rename(tmp_path / "runs" / "z")
    out = succeed(run())
    assert "left out: z: a second run of this network, task and seed" in out
    assert pd.read_csv(tmp_path / "out" / "scores.csv").score.tolist() == [5.0]
    for flags in (("--samples", "0"), ("--output", "/proc/x")):
        check_error(run(*flags))


def test_seeds_that_differ_are_said(tmp_path, run):
    for seed in (1, 2):
        write_run(tmp_path / "runs", "Pong", 1.0, 0.0, seed, -10.0 - seed)
    write_run(tmp_path / "runs", "Pong", 3.0, 0.8, 1, -5.0)
    assert "width 3 sparsity 0.8: 1 seeds a game, others have 2" in succeed(run())
    picture = (tmp_path / "out" / "figure_18.svg").read_text()
    assert "width 3 sparsity 0.8 (one seed)" in picture and "baseline: 2 seeds" in picture
