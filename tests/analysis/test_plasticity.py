"""plasticity.py on hand-made runs of known numbers: means, bands, groups, ends of training."""

import json
import math
import re
import shutil
from itertools import product
from pathlib import Path

import conftest
import numpy as np
import pandas as pd
import plots
import pytest
import sac_simba_sparse as sac
from analysis import plasticity
from conftest import check_error, succeed
from matplotlib.image import imread

RANK = "diagnostics/critic_srank_99"
NORM = "diagnostics/critic_param_norm"
RETURN = "eval/return_mean"
MEASURED = [
    f"diagnostics/{network}_{metric}"
    for network in ("actor", "critic")
    for metric in ("srank_99", "dormant_ratio", "grad_norm", "param_norm")
]
MEASURED.append(RETURN)


def write_run(
    folder: Path, name: str, values: dict[str, list[float]], finished: bool = True, **flags
) -> Path:
    """A run's folder; each metric is measured at env steps 100, 200, ..."""
    defaults = {"exp_name": "sac_simba_sparse", "total_timesteps": 1000}
    rows = [
        (100 * (i + 1), metric, value)
        for metric, series in values.items()
        for i, value in enumerate(series)
    ]
    if finished:
        rows.append((1000, "final/return_mean", 5.0))
    return conftest.write_run(folder / name, vars(sac.Args()) | defaults | flags, rows)


@pytest.fixture
def main(main):
    return lambda *arguments: main(plasticity.__file__, *arguments)


def test_interval_of_constant_values_has_no_width():
    assert plasticity.mean_interval(np.full(8, 3.0)) == (3.0, 3.0)


def test_interval_of_a_known_sample():
    values = np.array([1.0, 4.0, 2.0, 8.0, 5.0, 7.0, 1.5, 3.0])
    drawn = np.random.default_rng(1).choice(values, (200_000, 8)).mean(1)
    assert plasticity.mean_interval(values) == pytest.approx(
        np.quantile(drawn, [0.025, 0.975]), abs=0.07
    )
    # Of the 27 equally likely means of three values, the least and the greatest have a chance of
    # 3.7 % each, and the two at each end one of 14.8 %
    values = np.array([0.0, 3.0, 9.0])
    means = sorted({sum(drawn) / 3 for drawn in product(values, repeat=3)})
    assert plasticity.mean_interval(values) == pytest.approx((means[0], means[-1]))
    assert plasticity.mean_interval(values, confidence=0.85) == pytest.approx((means[1], means[-2]))


@pytest.mark.parametrize("values", [[2.0], [2.0, math.nan, 3.0], [2.0, math.inf]])
def test_no_interval(values):
    assert np.isnan(plasticity.mean_interval(np.array(values))).all()


@pytest.mark.parametrize(
    "count,last", [(1, 1), (4, 1), (10, 1), (19, 1), (20, 2), (100, 10), (101, 10)]
)
def test_end_value_is_the_mean_of_the_last_tenth(count, last):
    assert plasticity.end_value(np.arange(count)) == np.mean(range(count - last, count))


def test_figure_4_shows_the_last_measurement_as_its_caption_says(tmp_path, main):
    write_run(tmp_path / "runs", "a", {RANK: [float(n) for n in range(40)]})
    succeed(main("--figure", "srank", "--output", "out"))
    assert pd.read_csv("out/srank_end.csv")["mean"].tolist() == [39]
    assert "last measurement" in Path("out/srank.svg").read_text()
    assert plasticity.end_value(np.arange(40), "tenth") == 37.5
    assert plasticity.end_value(np.arange(40), "last") == 39


def test_means_over_seeds(tmp_path):
    for seed, shift in ((1, 0.0), (2, 1.0), (3, 5.0)):
        write_run(
            tmp_path, f"s{seed}", {RANK: [10.0 + shift, 20.0 + shift], NORM: [7.0, 7.0]}, seed=seed
        )
    data, left_out = plasticity.load_runs(tmp_path)
    assert left_out == [] and len(data) == 12
    curves = plasticity.over_training(data)
    rank = curves[curves.metric == RANK]
    assert rank.env_step.tolist() == [100, 200] and rank["mean"].tolist() == [12, 22]
    assert (rank.seeds == 3).all()
    assert rank.low.tolist() == [10, 20] and rank.high.tolist() == [15, 25]
    norm = curves[curves.metric == NORM]
    assert (norm[["mean", "low", "high"]] == 7).all(axis=None)
    ends = plasticity.at_the_end(data).set_index("metric")
    assert ends.loc[RANK, ["mean", "low", "high", "seeds", "x"]].tolist() == [22, 20, 25, 3, 0]
    assert ends.loc[RANK, ["algorithm", "size", "sparsity"]].tolist() == [
        "SAC",
        "width x1, depth x1",
        "dense",
    ]


def test_end_of_training_averages_runs_before_seeds(tmp_path):
    write_run(tmp_path, "a", {RANK: [0.0] * 18 + [4.0, 6.0]}, seed=1)
    write_run(tmp_path, "b", {RANK: [0.0] * 18 + [8.0, 2.0]}, seed=2)
    ends = plasticity.at_the_end(plasticity.load_runs(tmp_path)[0])
    assert ends[["mean", "low", "high", "seeds"]].to_numpy().tolist() == [[5, 5, 5, 2]]


def test_runs_are_grouped_by_what_changes_results(tmp_path):
    same = [
        {"seed": 1, "sparsity": 0.9},
        {
            "seed": 2,
            "sparsity": 0.9,
            "device": "cuda",
            "threads": 3,
            "runs_dir": "x",
            "checkpoint_interval": 7,
        },
        {"seed": 3, "sparsity": 0.9, "mask_seed": 3, "sparse_kernel": "dense", "track": True},
        {"seed": 4, "sparsity": 0.0, "actor_sparsity": 0.9, "critic_sparsity": 0.9},
    ]
    other = [
        {"sparsity": 0.9, "learning_rate": 1e-3},
        {"sparsity": 0.9, "mask_seed": 7},
        {"sparsity": 0.9, "width_scale": 2.0},
        {"sparsity": 0.9, "reset_interval": 500},
        {"sparsity": 0.9, "actor_sparsity": 0.0},
        {"sparsity": 0.9, "env_id": "dm_control/dog-run-v0"},
        {"sparsity": 0.9, "exp_name": "ddpg_simba_sparse", "exploration_noise": 0.1},
    ]
    for index, flags in enumerate(same + other):
        write_run(tmp_path, f"run{index}", {RANK: [1.0]}, **flags)
    data, left_out = plasticity.load_runs(tmp_path)
    assert left_out == []
    groups = {frozenset(group.run) for _, group in data.groupby(plasticity.CONFIGURATION)}
    assert groups == {frozenset(f"run{i}" for i in range(4))} | {
        frozenset([f"run{i}"]) for i in range(4, 11)
    }
    size = data.set_index("run")["size"]
    assert size["run4"] == "width x1, depth x1, learning rate 0.001, mask seed None"
    assert size["run10"] == size["run9"] == "width x1, depth x1"
    assert data.set_index("run").sparsity["run8"] == "actor sparsity 0, critic 0.9"
    ends = plasticity.at_the_end(data)
    line = ends[ends.sparsity == "actor sparsity 0, critic 0.9"].iloc[0]
    assert line.x == 0.9 and line["line"].endswith(", actor sparsity 0")


def test_one_mask_of_several_seeds_is_one_network(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path, f"run{seed}", {RANK: [1.0]}, seed=seed, sparsity=0.9, mask_seed=1)
    data, left_out = plasticity.load_runs(tmp_path)
    assert left_out == []
    assert [set(group.run) for _, group in data.groupby(plasticity.CONFIGURATION)] == [
        {"run1", "run2", "run3"}
    ]


def test_a_mask_shared_on_one_task_says_nothing_of_another(tmp_path):
    for seed in (1, 2, 3):
        other = {"env_id": "dm_control/dog-run-v0", "sparsity": 0.9, "seed": seed}
        write_run(tmp_path, f"own{seed}", {RANK: [1.0]}, mask_seed=seed, **other)
    for seed in (1, 2):
        write_run(tmp_path, f"shared{seed}", {RANK: [1.0]}, seed=seed, sparsity=0.9, mask_seed=1)
    data, _ = plasticity.load_runs(tmp_path)
    groups = {frozenset(group.run) for _, group in data.groupby(plasticity.CONFIGURATION)}
    assert groups == {frozenset(["own1", "own2", "own3"]), frozenset(["shared1", "shared2"])}


def test_runs_left_out_are_named(tmp_path):
    """What no script can use is in test_runs.py."""
    write_run(tmp_path, "a_whole", {RANK: [1.0]})
    write_run(tmp_path, "b_again", {RANK: [9.0]}, threads=2)
    write_run(tmp_path, "c_unfinished", {RANK: [9.0, 9.0]}, finished=False, seed=2)
    twice = write_run(tmp_path, "d_twice", {RANK: [9.0]}, seed=8) / "metrics.csv"
    twice.write_text(twice.read_text() + f"100,50,100,{RANK},9.0\n")
    data, left_out = plasticity.load_runs(tmp_path)
    assert data.run.unique().tolist() == ["a_whole"] and data.value.tolist() == [1.0]
    assert sorted(left_out) == [
        "b_again: a second run of this network, task and seed",
        "c_unfinished: unfinished, at env step 200 of 1,000",
        "d_twice: metrics.csv has some measurements twice",
    ]


def test_gaps_are_named_and_not_averaged_away(tmp_path):
    write_run(tmp_path, "a", {RANK: [1.0, 2.0], NORM: [1.0, 1.0]}, seed=1)
    write_run(tmp_path, "b", {RANK: [3.0, math.nan], NORM: [3.0]}, seed=2)
    write_run(tmp_path, "c", {RANK: [5.0, 6.0]}, seed=3)
    data, _ = plasticity.load_runs(tmp_path)
    assert plasticity.find_gaps(data, (RANK, NORM)) == [
        f"b: 1 of 2 finite measurements of {RANK}",
        f"b: 1 of 2 finite measurements of {NORM}",
        f"c: 0 of 2 finite measurements of {NORM}",
    ]
    rank = plasticity.over_training(data[data.metric == RANK])
    assert rank["mean"].iloc[0] == 3 and rank.iloc[1][["mean", "low", "high"]].isna().all()
    assert plasticity.over_training(data[data.metric == NORM]).seeds.tolist() == [2, 1]


def test_only_networks_trained_with_and_without_reset_are_compared(tmp_path):
    for name, flags in {
        "dense": {},
        "dense_reset": {"reset_interval": 400},
        "sparse": {"sparsity": 0.9},
        "wide_reset": {"width_scale": 2.0, "reset_interval": 400},
    }.items():
        write_run(tmp_path, name, {RETURN: [1.0]}, **flags)
    data, left_out = plasticity.with_and_without_reset(plasticity.load_runs(tmp_path)[0])
    assert set(data.run) == {"dense", "dense_reset"}
    assert left_out == [
        "sparse: no finished run of this network with resets",
        "wide_reset: no finished run of this network without resets",
    ]


def write_study(runs_dir: Path) -> None:
    """Two widths, dense and sparse, two seeds, with and without resets; and a run of DDPG."""
    for width, sparsity, seed, reset in product((1.0, 4.0), (0.0, 0.9), (1, 2), (None, 400)):
        level = 10 * width * (1 - sparsity) + seed
        values = {metric: [level * step for step in range(1, 11)] for metric in MEASURED}
        flags = {"width_scale": width, "sparsity": sparsity, "seed": seed, "reset_interval": reset}
        write_run(runs_dir, f"w{width}_s{sparsity}_{seed}_{reset}", values, **flags)
    other = {"exp_name": "ddpg_simba_sparse", "env_id": "dm_control/dog-run-v0", "width_scale": 4.0}
    write_run(runs_dir, "ddpg", {metric: [3.0] * 10 for metric in MEASURED}, **other)
    write_run(runs_dir, "going", {RANK: [1.0]}, finished=False, seed=9)


@pytest.mark.parametrize(
    "figure", ["srank", "over-training", "reset", "param-norm", "against-sparsity"]
)
def test_pictures_and_tables(figure, main, tmp_path):
    write_study(tmp_path / "runs")
    code, out, err = main("--figure", figure, "--runs-dir", "runs", "--output", "out")
    assert (code, err) == (0, "")
    assert "left out: going: unfinished, at env step 100 of 1,000\n" in out
    alone = "ddpg: no finished run of this network with resets"
    assert (alone if figure == "reset" else "_400: has resets") in out
    folder = tmp_path / "out"
    picture = imread(folder / f"{figure}.png")[..., :3]
    assert 0.5 < (picture == 1).all(-1).mean() < 0.99
    svg = (folder / f"{figure}.svg").read_text()
    assert svg.startswith("<?xml") and svg.count("<path") > 50
    assert (plots.sparsity_colour(0.9) in svg) == (figure != "against-sparsity")

    metric = plasticity.METRICS[figure][-1]
    ends = pd.read_csv(folder / f"{figure}_end.csv")
    key = ["metric", "size", "sparsity"]
    end = ends.set_index(key).loc[[(metric, "width x4, depth x1", "sparsity 0.9")]]
    assert end[["mean", "low", "high", "seeds"]].iloc[0].tolist() == pytest.approx([55, 50, 60, 2])
    table = (folder / f"{figure}_end.md").read_text().splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 2 + len(ends.drop_duplicates(plasticity.CONFIGURATION))
    assert any(
        "| width x4, depth x1, sparsity 0.9 | never | 2 | " in re.sub(" +", " ", line)
        and "55 [50, 60]" in line
        for line in table
    )
    every = pd.read_csv(folder / f"{figure}_runs.csv.gz")
    assert set(every.metric) == set(MEASURED)
    values = every.set_index(["run", "metric", "env_step"], verify_integrity=True).value
    assert values["w4.0_s0.9_2_None", RETURN, 300] == pytest.approx(3 * (10 * 4 * 0.1 + 2))
    if figure == "against-sparsity":
        assert not (folder / f"{figure}.csv").exists()
        return
    curves = pd.read_csv(folder / f"{figure}.csv")
    assert set(curves.metric) == set(plasticity.METRICS[figure])
    points = curves.set_index([*key, "env_step"])
    dense = points.loc[[(metric, "width x1, depth x1", "dense", 300)]]
    assert len(dense) == (2 if figure == "reset" else 1)
    assert dense[["mean", "low", "high", "seeds"]].iloc[0].tolist() == pytest.approx(
        [34.5, 33, 36, 2]
    )
    assert set(curves.reset_interval) == ({0, 400} if figure == "reset" else {0})


def test_runs_of_earlier_calls(main, tmp_path):
    """Half of the runs from the table of an earlier call: the same as all from their folders."""
    write_study(tmp_path / "runs")
    succeed(main("--output", "whole"))
    everything = pd.read_csv(tmp_path / "whole" / "over-training_runs.csv.gz")
    names = everything.run.unique()
    first = everything[everything.run.isin(names[: len(names) // 2 + 1])]
    first.to_csv(tmp_path / "first.csv.gz", index=False)
    for name in names[: len(names) // 2]:  # one run is in both
        shutil.rmtree(tmp_path / "runs" / name)
    twice = ("--earlier", "first.csv.gz", "first.csv.gz")
    assert f"{len(names)} runs" in succeed(main(*twice, "--output", "parts"))
    for table in ("over-training.csv", "over-training_end.csv"):
        whole, parts = (pd.read_csv(tmp_path / folder / table) for folder in ("whole", "parts"))
        key = [column for column in whole if column not in ("mean", "low", "high")]
        assert len(key) < len(whole.columns)
        pd.testing.assert_frame_equal(
            whole.sort_values(key, ignore_index=True), parts.sort_values(key, ignore_index=True)
        )
    for bad in ("nowhere.csv.gz", "whole/over-training_end.csv"):
        check_error(main("--earlier", bad), bad)


def test_chosen_metrics_and_variants(main, tmp_path):
    write_study(tmp_path / "runs")
    flags = ("--metrics", "diagnostics/actor_srank_99", RETURN, "--variants", "1:0", "4:0.9")
    succeed(main("--figure", "over-training", *flags))
    curves = pd.read_csv(tmp_path / "results" / "plasticity" / "over-training.csv")
    assert set(curves.metric) == {"diagnostics/actor_srank_99", RETURN}
    assert set(zip(curves["size"], curves.sparsity)) == {
        ("width x1, depth x1", "dense"),
        ("width x4, depth x1", "sparsity 0.9"),
    }


def test_a_variant_without_a_run_is_named_and_the_others_drawn(main, tmp_path):
    write_study(tmp_path / "runs")
    out = succeed(main("--output", "out", "--variants", "1:0", "5:0.9"))
    assert "not drawn: --variants 5:0.9: no finished run" in out
    assert (tmp_path / "out" / "over-training.png").exists()


@pytest.mark.parametrize("variant,columns", [("1:0", 1), ("4:0", 2)])
def test_tasks_without_a_chosen_network_are_not_drawn(variant, columns, main, tmp_path):
    write_study(tmp_path / "runs")
    succeed(main("--output", "out", "--variants", variant))
    assert len(pd.read_csv(tmp_path / "out" / "over-training.csv").algorithm.unique()) == columns
    assert imread(tmp_path / "out" / "over-training.png").shape[1] == pytest.approx(
        plots.DPI * max(4.2 * columns, 6), abs=1
    )


def test_legend_says_how_many_seeds():
    said = [plots.count_seeds(*counts) for counts in ((1, 1), (3, 3), (1, 4), (2, 3))]
    assert said == ["one seed", "3 seeds", "1 to 4 seeds", "2 to 3 seeds"]
    assert plots.describe_interval(2, 3) == "lowest to highest of 2 to 3 seeds"
    assert plots.describe_interval(8, 8) == "95 % bootstrap interval of 8 seeds"
    assert plots.describe_interval(1, 1) == "one seed, so no interval"


@pytest.mark.parametrize(
    "flags,words",
    [
        ("--runs-dir nowhere", "finished runs nowhere --runs-dir"),
        ("--metrics losses/critic_loss", f"losses/critic_loss {RANK}"),
        ("--variants 4", "--variants 4 WIDTH_SCALE:SPARSITY"),
        ("--variants 3:0.5", "--variants no finished run 1:0 4:0.9"),
        ("--output runs/going/args.json", "--output runs/going/args.json"),
    ],
)
def test_bad_input_is_named(flags, words, main, tmp_path):
    write_study(tmp_path / "runs")
    check_error(main(*flags.split()), *words.split())


def test_nothing_to_draw(main, tmp_path):
    write_run(tmp_path / "runs", "going", {RANK: [1.0]}, finished=False)
    ended = main()
    assert "left out: going: unfinished" in ended[1]
    check_error(ended, "error: no finished runs in runs")
    write_run(tmp_path / "runs", "whole", {RANK: [1.0]})
    check_error(main("--figure", "reset"), "with and without --reset-interval")
    for index in range(11):
        write_run(tmp_path / "many", f"{index}", {RANK: [1.0]}, sparsity=index / 20)
    check_error(main("--figure", "srank", "--runs-dir", "many"), "11 networks", "--variants")


def test_a_flag_that_an_older_version_did_not_have(tmp_path):
    """None is what it had: the runs are one network of two seeds."""
    write_run(tmp_path, "new", {RANK: [1.0]}, seed=1)
    write_run(tmp_path, "old", {RANK: [3.0]}, seed=2)
    path = tmp_path / "old" / "args.json"
    record = json.loads(path.read_text())
    assert record["args"].pop("max_episode_steps") is None
    path.write_text(json.dumps(record))
    data, _ = plasticity.load_runs(tmp_path)
    ends = plasticity.at_the_end(data)
    assert ends[["size", "mean", "seeds"]].to_numpy().tolist() == [["width x1, depth x1", 2.0, 2]]


def test_runs_of_several_lengths_are_not_averaged(main, tmp_path):
    write_run(tmp_path / "long", "a", {RANK: [1.0] * 10}, seed=1, total_timesteps=1000)
    flags = ("--figure", "srank", "--output", "out")
    succeed(main("--runs-dir", "long", *flags))
    write_run(tmp_path / "short", "b", {RANK: [1.0] * 5}, seed=2, total_timesteps=500)
    ended = main("--runs-dir", "short", "--earlier", "out/srank_runs.csv.gz", *flags)
    check_error(ended, "500 and 1,000 env steps", "keep such apart")
