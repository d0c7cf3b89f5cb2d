"""scaling.py on hand-made runs of known returns: statistics, gaps, families, every picture."""

import re
import shutil
from itertools import product
from pathlib import Path

import conftest
import numpy as np
import pandas as pd
import pytest
from analysis import plots, scaling
from conftest import check_error, succeed
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.image import imread

SAC, DDPG, DRQ = "sac_simba_sparse", "ddpg_simba_sparse", "drqv2_sparse"


def write_run(
    folder: Path,
    value: float,
    finished: bool = True,
    exp_name: str = SAC,
    curve: tuple = ((0, 0.0),),
    **flags,
) -> None:
    """A run whose network has 1000 width^2 depth weights; curve: of evaluations."""
    flags = {
        "env_id": "dm_control/dog-run-v0",
        "width_scale": 1.0,
        "depth_scale": 1,
        "sparsity": 0.0,
        "seed": 1,
    } | flags
    flags = {"total_timesteps": 1_000_000, "threads": 1, **flags, "exp_name": exp_name}
    total = round(1000 * flags["width_scale"] ** 2 * flags["depth_scale"])
    active = round(total * (1 - flags["sparsity"]))
    layers = {"actor": [], "critic": [{"active": active, "total": total}]}
    kind = "final" if finished else "eval"
    rows = [(step, "eval/return_mean", earlier) for step, earlier in curve]
    rows.append((1_000_000, f"{kind}/return_mean", value))
    run = folder / f"run{len(list(folder.glob('*')))}"
    conftest.write_run(run, flags, rows, layers=layers)


@pytest.fixture
def main(main):
    return lambda figure, *more: main(
        scaling.__file__, "--figure", figure, "--output", "out", *more
    )


@pytest.fixture
def draw(main, tmp_path):
    """What the program says and its table, where it draws."""

    def run(figure: str, *more: str) -> tuple[str, pd.DataFrame]:
        text = succeed(main(figure, *more))
        out = tmp_path / "out"
        table = pd.read_csv(out / f"{figure}.csv")
        assert imread(out / f"{figure}.png").std() > 0.01
        assert (out / f"{figure}.svg").stat().st_size > 1000
        assert (out / f"{figure}.md").read_text().count("\n") == 2 + len(table)
        return text, table

    return run


def test_interquartile_mean_of_all_tasks_together():
    a, b = np.array([0.0, 1.0, 2.0, 3.0]), np.array([10.0, 11.0, 12.0, 1000.0])
    assert scaling.interquartile_mean(a, b) == np.mean([2, 3, 10, 11])
    stacked = scaling.interquartile_mean(np.stack([a, a + 1]), np.stack([b, b + 1]), axis=1)
    assert stacked.tolist() == [6.5, 7.5]


def test_interval_is_resampled_within_tasks():
    """Two tasks far apart, without spread inside: every resample keeps as many of each."""
    assert scaling.bootstrap_interval([np.full(3, 1.0), np.full(5, 100.0)]) == (75.25, 75.25)
    low, high = scaling.bootstrap_interval(
        [np.array([0.0, 1.0, 2.0, 3.0]), np.array([100.0, 101.0, 102.0, 103.0])]
    )
    assert 40 < low < 51.5 < high < 62
    drawn = np.random.default_rng(1).choice([1.0, 2.0, 4.0, 8.0, 9.0], (100_000, 5))
    expected = np.quantile(scaling.interquartile_mean(drawn), [0.025, 0.975])
    assert scaling.bootstrap_interval([np.array([1.0, 2.0, 4.0, 8.0, 9.0])]) == pytest.approx(
        expected, abs=0.35
    )


def test_no_interval_for_one_seed_and_one_seed_beside_several():
    assert np.isnan(scaling.bootstrap_interval([np.array([1.0]), np.array([2.0])])).all()
    low, high = scaling.bootstrap_interval([np.array([5.0]), np.array([0.0, 10.0])])
    assert (low, high) == (pytest.approx(5 / 3), pytest.approx(25 / 3))


@pytest.mark.parametrize(
    "algorithm,env_id,env_steps,value",
    [
        ("SAC", "dm_control/humanoid-run-v0", 1_000_000, pytest.approx(181.6, abs=1)),
        ("DDPG", "dm_control/humanoid-run-v0", 1_000_000, pytest.approx(158.1, abs=1)),
        ("DrQ-v2", "dm_control/quadruped-run-v0", 2_000_000, pytest.approx(586, abs=1)),
        ("SAC", "dm_control/humanoid-run-v0", 1234, None),
        ("DER", "ALE/Pong-v5", 100_000, None),
    ],
)
def test_published_returns(algorithm, env_id, env_steps, value):
    assert scaling.published_return(algorithm, env_id, env_steps) == value


def test_scaling_over_all_tasks(tmp_path, draw):
    runs = tmp_path / "runs"
    for env_id, base in (("a-v0", 100.0), ("b-v0", 300.0)):
        for seed in range(1, 5):
            for width, depth, sparsity, gain in (
                (1, 1, 0, seed),
                (2, 1, 0, 10 + seed),
                (4, 1, 0, -20 + seed),
                (4, 1, 0.75, 30 + seed),
                (2, 2, 0, 5),
                (2, 2, 0.5, 15),
            ):
                size = {"width_scale": width, "depth_scale": depth, "sparsity": sparsity}
                write_run(runs, base + gain, env_id=env_id, seed=seed, **size)
    out, table = draw("aggregate")
    assert "left out" not in out and "fewer seeds" not in out
    row = table[(table.width_scale == 4) & (table.sparsity == 0.75)].iloc[0]
    counts = row[["tasks", "seeds_min", "seeds_max", "weights", "active"]]
    assert counts.tolist() == [2, 4, 4, 16_000, 4_000]
    values = np.array([131, 132, 133, 134, 331, 332, 333, 334.0])
    assert row.iqm == np.mean([133, 134, 331, 332]) and row["mean"] == values.mean()
    assert row["std"] == pytest.approx(values.std(ddof=1)) and row.low < row.iqm < row.high
    assert len(table) == 6

    dense, (sparse,) = scaling.families(scaling.along(table, "width_scale"))
    assert dense.width_scale.tolist() == [1, 2, 4]
    # From the network of equal active size
    assert list(zip(sparse.width_scale, sparse.sparsity)) == [(2, 0), (4, 0.75)]
    dense, (sparse,) = scaling.families(scaling.along(table, "depth_scale"))
    assert dense.depth_scale.tolist() == [1, 2] and set(dense.width_scale) == {2}
    assert list(zip(sparse.depth_scale, sparse.sparsity)) == [(1, 0), (2, 0.5)]


def test_missing_runs_are_named_and_never_averaged_away(tmp_path, draw):
    runs = tmp_path / "runs"
    for env_id in ("a-v0", "b-v0"):
        for seed in (1, 2):
            write_run(runs, 10.0, env_id=env_id, seed=seed)
    write_run(runs, 20.0, env_id="a-v0", width_scale=2)
    write_run(runs, 20.0, env_id="b-v0", width_scale=2, finished=False)
    write_run(runs, 30.0, env_id="a-v0", width_scale=3)
    write_run(runs, 30.0, env_id="b-v0", width_scale=3)
    write_run(runs, 99.0, env_id="b-v0", width_scale=3)
    out, table = draw("aggregate")
    assert table.width_scale.tolist() == [1, 3]
    assert "left out: run5: unfinished, at env step 1,000,000" in out
    assert "left out: SAC, width 2, depth 1, sparsity 0: no finished run of b-v0" in out
    assert "fewer seeds: SAC, some task, width 3, depth 1, sparsity 0: 1 of 2 seeds" in out
    assert "left out: run8: a second run of this network, task and seed" in out
    assert table.iqm.tolist() == [10, 30] and table.seeds_max.tolist() == [2, 1]


def test_returns_and_areas_against_active_weights(tmp_path, main, draw):
    """Two families of equal active weights: behind the dense networks of width 1 and of 2."""
    runs = tmp_path / "runs"
    networks = ((1, 0), (2, 0), (4, 0), (2, 0.75), (4, 0.9375), (4, 0.75))
    for seed in (1, 2):
        for number, (width, sparsity) in enumerate(networks):
            value = 100.0 * number + 10 * seed
            curve = ((0, 0.0), (500_000, 40.0), (1_000_000, 60.0))
            write_run(runs, value, seed=seed, width_scale=width, sparsity=sparsity, curve=curve)
    out, table = draw("active")
    assert "left out" not in out
    returns, areas = (table[table.measure == name] for name in scaling.MEASURES)
    in_order = sorted(range(6), key=lambda number: networks[number])
    assert returns["mean"].tolist() == [100.0 * number + 15 for number in in_order]
    # From 0 to 40 over one half of training, from 40 to 60 over the other
    assert areas["mean"].tolist() == [35.0] * 6

    dense, lines = scaling.families(returns)
    assert dense.width_scale.tolist() == [1, 2, 4]
    found = [list(zip(line.width_scale, line.sparsity)) for line in lines]
    assert found == [[(1, 0), (2, 0.75), (4, 0.9375)], [(2, 0), (4, 0.75)]]
    dense, lines = scaling.families(returns[returns.width_scale != 2])
    assert [line.width_scale.tolist() for line in lines] == [[1, 4], [4]]  # the last without dense

    text, again = draw("active", "--runs-dir", "none", "--earlier", "out/runs.csv")
    assert "left out" not in text and again.equals(table)
    succeed(main("sparsity", "--runs-dir", "none", "--earlier", "out/runs.csv"))
    check_error(main("active", "--runs-dir", "none", "--earlier", "out/runs.csv"), "area")

    write_run(runs, 1.0, seed=3, curve=curve)
    out, _ = draw("active")
    uneven = [line for line in out.splitlines() if line.startswith("fewer seeds")]
    assert len(uneven) == 5 and uneven[0].endswith("width 2, depth 1, sparsity 0: 2 of 3 seeds")


def test_a_run_without_learning_curve_has_no_area(tmp_path, main):
    write_run(tmp_path / "runs", 1.0)
    ended = main("active")
    assert "left out: run0: fewer than two evaluations" in ended[1]
    check_error(ended, "nothing to draw")


def test_equal_sizes_are_moved_apart():
    sizes = pd.Series([100.0, 1000.0, 105.0, 98.0])
    assert plots.move_apart(sizes, 2) == [100, 1000, 210, 392]


def test_only_sizes_that_stayed_have_a_tick():
    sizes = pd.Series([276_845.0, 27_533.0, 273_588.0])
    ax = Figure().subplots()
    plots.label_apart(ax, sizes, plots.move_apart(sizes), "weights")
    assert ax.get_xticks().tolist() == [27_533, 276_845]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["27.5k", "277k"]


@pytest.mark.parametrize("figure", ["aggregate", "depth"])
def test_widths_alone_are_no_line_of_depths(tmp_path, figure, draw):
    for width in (0.5, 1, 2):
        write_run(tmp_path / "runs", 1.0, width_scale=width)
    _, table = draw(figure)
    assert scaling.along(table, "depth_scale").empty
    assert len(scaling.along(table, "width_scale")) == 3
    assert "no finished runs of several depths" in (tmp_path / "out" / f"{figure}.svg").read_text()


@pytest.mark.parametrize("figure", ["size", "size-linear", "sparsity", "width", "depth"])
def test_pictures_of_single_tasks(tmp_path, figure, draw):
    for exp_name in (SAC, DDPG):
        for seed in (1, 2, 3):
            for width, depth, sparsity in (
                (1, 1, 0),
                (2, 1, 0),
                (2, 2, 0),
                (2, 2, 0.5),
                (4, 1, 0.75),
            ):
                size = {"width_scale": width, "depth_scale": depth, "sparsity": sparsity}
                write_run(
                    tmp_path / "runs", 100.0 * width + seed, exp_name=exp_name, seed=seed, **size
                )
    out, table = draw(figure)
    assert "left out" not in out
    assert len(table) == 10 and table.algorithm.tolist() == ["SAC"] * 5 + ["DDPG"] * 5
    assert table[table.width_scale == 4]["mean"].tolist() == [402, 402]
    assert table[table.width_scale == 4]["std"].tolist() == [1, 1]
    assert len(pd.read_csv(tmp_path / "out" / "runs.csv")) == 30


def test_runs_of_earlier_calls(tmp_path, main, draw):
    """Half of the runs from the table of an earlier call: the same as all from their folders."""
    runs, first = tmp_path / "runs", tmp_path / "first.csv"
    for seed in (1, 2, 3):
        for sparsity in (0, 0.5):
            write_run(runs, 100 + 7.3 * seed**2 + 50 * sparsity, seed=seed, sparsity=sparsity)
            write_run(runs, 200 + 7.3 * seed**2, seed=seed, sparsity=sparsity, exp_name=DDPG)
    _, whole = draw("sparsity")
    pd.read_csv(tmp_path / "out" / "runs.csv").head(5).to_csv(first, index=False)
    for name in pd.read_csv(first).run.head(4):  # the fifth is in both
        shutil.rmtree(runs / name)
    out, table = draw("sparsity", "--earlier", first)
    assert "12 runs" in out and "left out" not in out
    pd.testing.assert_frame_equal(table, whole)

    # Folders whose names are numbers: still the same run
    for number, folder in enumerate(sorted(runs.iterdir())):
        folder.rename(runs / str(number))
    draw("sparsity")
    shutil.copy(tmp_path / "out" / "runs.csv", tmp_path / "numbers.csv")
    out, _ = draw("sparsity", "--earlier", tmp_path / "numbers.csv")
    assert "8 runs" in out and "left out" not in out

    pd.read_csv(first).assign(env_steps=50_000).to_csv(first, index=False)
    check_error(main("sparsity", "--earlier", first), "50,000 and 1,000,000 env steps")
    for bad in ("nowhere.csv", "out/sparsity.csv"):
        check_error(main("sparsity", "--earlier", bad), bad)


def test_gain(tmp_path, main, draw):
    runs = tmp_path / "runs"
    for exp_name, factor in ((SAC, 1.0), (DDPG, 2.0)):
        for seed, spread in ((1, -1), (2, 1)):
            write_run(runs, 100 * factor + spread, exp_name=exp_name, seed=seed)
            write_run(runs, 120 * factor + spread, exp_name=exp_name, seed=seed, sparsity=0.5)
            write_run(
                runs, 130 * factor + 20 * (factor - 1), exp_name=exp_name, seed=seed, sparsity=0.9
            )
    write_run(runs, 500.0, sparsity=0.7)  # of one algorithm only
    write_run(runs, -5.0, env_id="bad-v0")
    write_run(runs, 5.0, env_id="bad-v0", sparsity=0.5)
    scores = tmp_path / "scores.csv"
    rows = [
        ("MLP", 1, 0.0, 5.0),
        ("SimBa", 1, 0.0, 6.0),
        ("SimBa", 2, 0.0, 6.2),
        ("SimBa", 1, 0.9, 6.5),
        ("SimBa", 2, 0.9, 6.6),
    ]
    columns = ["network", "seed", "sparsity", "score"]
    bias = pd.DataFrame(rows, columns=columns).assign(share_score=lambda t: 0.7 * t.score)
    bias.to_csv(scores, index=False)
    out, table = draw("gain", "--scores", scores)
    assert table.sparsity.tolist() == [0.5, 0.9] and table.scenarios.tolist() == [2, 2]
    assert table.gain.tolist() == pytest.approx([20, 35])
    assert (table.low < table.gain).all() and (table.gain < table.high).all()
    assert "left out: sparsity 0.7: no finished run of DDPG, dm_control/dog-run-v0" in out
    assert "left out: SAC, bad-v0: the dense network's mean return is not positive" in out
    write_run(runs, 90.0, width_scale=5)
    check_error(main("gain"), "one size of network", "1 x 1, 5 x 1")


def test_bars(tmp_path, main, draw):
    for env_id in ("dm_control/quadruped-run-v0", "dm_control/hopper-hop-v0"):
        for width, sparsity in ((1, 0), (4, 0), (4, 0.8)):
            for seed in (1, 2):
                size = {"env_id": env_id, "width_scale": width, "sparsity": sparsity, "seed": seed}
                write_run(tmp_path / "runs", 100.0 * width + seed, exp_name=DRQ, **size)
    _, table = draw("bars")
    assert len(table) == 6 and set(table.algorithm) == {"DrQ-v2"}
    assert table[table.width_scale == 4].iqm.tolist() == [401.5] * 4
    picture = tmp_path / "out" / "bars.svg"
    assert "mean; lowest to highest of 2 seeds" in picture.read_text()  # by its caption
    assert "interquartile" not in picture.read_text()
    assert main("bars", "--statistic", "iqm")[0] == 0
    assert "interquartile mean" in picture.read_text()
    write_run(tmp_path / "runs", 100.0)
    what = "bars are for one algorithm and depth, and there are 2 of them; keep such runs apart"
    check_error(main("bars"), f"error: {what}\n")


def test_a_line_for_each_size(tmp_path, main, draw):
    for width, depth in ((1, 1), (1, 2), (2, 1), (3, 1), (4, 1), (5, 1)):
        write_run(tmp_path / "runs", 100.0, width_scale=width, depth_scale=depth)
    draw("sparsity")
    text = (tmp_path / "out" / "sparsity.svg").read_text()
    assert "width scale 1, depth scale 2 (2.0k weights)" in text
    assert "width scale 5, depth scale 1" in text
    write_run(tmp_path / "runs", 100.0, width_scale=6)
    check_error(main("sparsity"), "error: 7 sizes of network")


def test_errors(tmp_path, main):
    check_error(main("size"), "error: nothing to draw")
    write_run(tmp_path / "runs", 1.0)
    write_run(tmp_path / "runs", 1.0, sparsity=0.5)
    check_error(main("gain", "--scores", "none.csv"), "--scores", "none.csv")


def test_runs_that_cannot_be_compared(tmp_path, main):
    write_run(tmp_path / "runs", 1.0, threads=1)
    write_run(tmp_path / "runs", 1.0, threads=2, seed=2)
    write_run(tmp_path / "runs", 1.0, exp_name=DDPG, total_timesteps=5)
    succeed(main("size"))
    # The same network, by other flags
    write_run(tmp_path / "runs", 1.0, sparsity=0.9, seed=4)
    both = {"actor_sparsity": 0.9, "critic_sparsity": 0.9}
    write_run(tmp_path / "runs", 1.0, sparsity=0.9, seed=5, **both)
    assert "left out" not in succeed(main("size"))
    write_run(tmp_path / "runs", 1.0, seed=3, total_timesteps=5)
    mixed = (
        "mixes runs of sac_simba_sparse with --total-timesteps 1000000 and 5; keep such runs apart"
    )
    check_error(main("size"), mixed)


@pytest.fixture(scope="module")
def skewed() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs of three networks that each return 0, 0, 0, 90, 110, and their points."""
    rows = []
    for (width, depth), value in product([(1, 1), (2, 1), (2, 2)], RETURNS):
        size = {"width_scale": width, "depth_scale": depth, "weights": 1e4, "active": 1e4}
        run = {"env_id": "dm_control/dog-run-v0", "algorithm": "SAC", "sparsity": 0.0}
        rows.append({**run, **size, "return": value, "env_steps": 7, "seed": len(rows)})
    table = pd.DataFrame(rows)
    return table, scaling.summarise(table, scaling.POINT)


RETURNS = (0.0, 0.0, 0.0, 90.0, 110.0)  # mean 40, interquartile mean 30
FIGURES = ("size", "size-linear", "aggregate", "sparsity", "width", "depth", "bars")


def bars_of(figure: Figure) -> tuple[float, float, float]:
    """The middle and both ends of the first error bar of a figure, and what the legend calls it."""
    containers = [c for ax in figure.axes for c in ax.containers]
    error = next(c for c in containers if isinstance(c, ErrorbarContainer))
    (low, high) = error.lines[2][0].get_segments()[0][:, 1]
    bar = next((c for c in containers if isinstance(c, BarContainer)), None)
    middle = bar.patches[0].get_height() if bar else error.lines[0].get_ydata()[0]
    return middle, low, high


@pytest.mark.parametrize("figure", FIGURES)
def test_points_and_bars_are_the_statistic_that_is_asked_for(skewed, figure):
    table, points = skewed
    row = points.iloc[0]
    assert (row.iqm, row["mean"]) == (30, 40)
    std = np.std(RETURNS, ddof=1)
    expected = {
        "iqm": ("interquartile mean", 30, row.low, row.high),
        "mean": ("mean", 40, row.mean_low, row.mean_high),
        "std": ("mean, standard deviation", 40, 40 - std, 40 + std),
    }
    if figure == "bars":  # of one depth
        table, points = (rows[rows.depth_scale == 1] for rows in skewed)
    for statistic, (words, *numbers) in expected.items():
        drawn = scaling.draw(figure, table, points.assign(tasks=1), None, statistic)
        assert bars_of(drawn) == pytest.approx(numbers)
        (legend,) = drawn.legends
        text = legend.get_title().get_text().replace(",\n", ", ").replace(";\n", "; ")
        assert re.match(words + r"[;,] (?!standard)", text), text


@pytest.mark.parametrize("figure", FIGURES)
def test_one_seed_has_no_interval(skewed, figure):
    table = skewed[0][skewed[0].seed == skewed[0].seed.min()]
    points = scaling.summarise(table, scaling.POINT).assign(tasks=1)
    if figure == "bars":
        table, points = (rows[rows.depth_scale == 1] for rows in (table, points))
    (legend,) = scaling.draw(figure, table, points, None, "iqm").legends
    text = legend.get_title().get_text()
    assert "one seed" in text and "bootstrap" not in text


def test_the_interval_of_the_mean(skewed):
    drawn = np.random.default_rng(1).choice(RETURNS, (100_000, 5)).mean(1)
    row = skewed[1].iloc[0]
    expected = np.quantile(drawn, [0.025, 0.975])
    assert (row.mean_low, row.mean_high) == pytest.approx(tuple(expected), abs=4)
    assert (row.mean_low, row.mean_high) != (row.low, row.high)


def test_each_task_counts_the_same(skewed):
    one_seed = skewed[0].drop_duplicates(scaling.NETWORK)
    other_task = one_seed.assign(env_id="b-v0", **{"return": 1000.0})
    points = scaling.summarise(pd.concat([skewed[0], other_task]), scaling.NETWORK)
    assert (points["mean"] == (40 + 1000) / 2).all()
    assert (points.mean_low < 520).all() and (points.mean_high > 520).all()


@pytest.mark.parametrize(
    "figure,words",
    {
        "size": "interquartile mean",
        "size-linear": "interquartile mean",
        "sparsity": "interquartile mean",
        "aggregate": "mean",
        "bars": "mean",
        "width": "mean, standard deviation",
        "depth": "mean, standard deviation",
    }.items(),
)
def test_default_statistic_of_each_figure(figure, words, tmp_path, main, monkeypatch):
    """As the captions of the paper say; an interquartile mean where they say nothing."""
    drawn = []
    monkeypatch.setattr(scaling.plots, "save", lambda figure, *_: drawn.append(figure))
    for seed in (1, 2):
        for width in (1.0, 2.0):
            write_run(tmp_path / "runs", seed * width, seed=seed, width_scale=width)
        if figure in ("depth", "aggregate"):
            write_run(tmp_path / "runs", seed * 3, seed=seed, width_scale=2.0, depth_scale=2)
    succeed(main(figure))
    (legend,) = drawn[0].legends
    text = legend.get_title().get_text().replace("\n", " ")
    assert re.match(words + r"[;,] (?!standard)", text), text


def test_sparsities_of_actor_and_critic(tmp_path, main, draw):
    flags = {"sparsity": 0.0, "critic_sparsity": 0.9}
    write_run(tmp_path / "runs", 1.0, actor_sparsity=0.9, **flags)
    write_run(tmp_path / "runs", 2.0, actor_sparsity=0.9, seed=2, **flags)
    _, table = draw("sparsity")
    assert table.sparsity.to_list() == [0.9]
    shutil.rmtree(tmp_path / "runs")
    for seed in (1, 2):
        write_run(tmp_path / "runs", 1.0, seed=seed, actor_sparsity=0.5, **flags)
    ended = main("sparsity")
    check_error(ended, "nothing to draw")
    assert ended[1].count("sparsity of the actor 0.5, of the critic 0.9") == 2
