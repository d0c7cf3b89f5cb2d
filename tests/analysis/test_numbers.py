"""Numbers of the tools by hand: bins, means and intervals, seeds, axes, noise."""

import conftest
import numpy as np
import pandas as pd
import pytest
import sac_simba_sparse as sac
import torch
from analysis import gradient_interference as gi
from analysis import plasticity, plots, scaling, streaming
from test_gradient_interference import ACTION_DIM, MODULES, write_run
from torch.utils._pytree import tree_leaves

NETWORK = {"env_id": "Ant-v4", "width_scale": 1.0, "init": "lecun", "sparsity": 0.0, "seed": 1}


def make_episodes(returns: dict[int, float], **flags) -> pd.DataFrame:
    """Episodes that end at some of 1,000 env steps."""
    rows = {"env_step": list(returns), "return": list(returns.values())}
    return pd.DataFrame(rows).assign(total_timesteps=1000, **NETWORK | flags)


def test_a_bin_ends_at_its_name_and_holds_its_end():
    episodes = make_episodes({1: 1.0, 499: 2.0, 500: 3.0, 501: 10.0, 1000: 20.0})
    bins = streaming.average_bins(episodes, 500)
    assert list(zip(bins.env_step, bins["return"])) == [(500, 2.0), (1000, 15.0)]


def test_final_returns_are_of_the_last_tenth():
    episodes = make_episodes({700: 1.0, 801: 2.0, 900: 4.0, 901: 8.0, 1000: 16.0})
    assert streaming.final_returns(episodes)["return"].tolist() == [12.0]


def test_students_interval_of_the_mean():
    # Of 11, 17, 20: mean 16, deviation sqrt(21), standard error sqrt(7), quantile 4.302653
    values = [11.0, 17.0, 20.0]
    seeds = [make_episodes({950: value}, seed=seed) for seed, value in enumerate(values)]
    (row,) = streaming.summarise(streaming.final_returns(pd.concat(seeds))).itertuples()
    assert (row.seeds, row.mean, row.values) == (3, 16, "11 17 20")
    half = 4.302653 * 7**0.5
    assert (row.low, row.high) == pytest.approx((16 - half, 16 + half), rel=1e-6)


def test_bands_and_dots_of_streaming_figures():
    """Figure 12: means of seeds at the place of their width; Figure 17: lowest to highest."""
    runs = []
    for width, values in ((1.0, (1.0, 3.0, 8.0)), (4.0, (10.0, 20.0, 60.0))):
        for seed, value in enumerate(values):
            runs.append(make_episodes({950: value}, seed=seed, width_scale=width))
    other = make_episodes({950: 99.0}, init="sparse_init", width_scale=4.0)
    episodes = pd.concat([*runs, other])
    (ax,) = streaming.figure_12(streaming.final_returns(episodes)).axes
    assert ax.lines[0].get_xydata().tolist() == [[1.0, 4.0], [4.0, 30.0]]
    first, _ = streaming.figure_17(streaming.average_bins(episodes, 500)).axes
    assert first.lines[0].get_ydata().tolist() == [4.0]
    assert sorted(set(first.collections[0].get_paths()[0].vertices[:, 1])) == [1.0, 8.0]

    # SparseInit is in Figure 13 only, which has its width
    bins = streaming.average_bins(episodes, 500)
    assert [len(ax.collections) for ax in streaming.figure_17(bins).axes] == [1, 1]
    (ax,) = streaming.figure_13(bins).axes
    assert "512 hidden units" in ax.get_title() and len(ax.lines) >= 2


def test_the_x_axis_is_the_sparsity_of_the_metrics_own_network(tmp_path):
    flags = {"env_id": "a-v0", "actor_sparsity": 0.2, "critic_sparsity": 0.7}
    flags["total_timesteps"] = 1000
    metrics = ("diagnostics/actor_grad_norm", "diagnostics/critic_grad_norm", "eval/return_mean")
    rows = [(100, name, 1.0) for name in metrics] + [(1000, "final/return_mean", 1.0)]
    conftest.write_run(tmp_path / "a", vars(sac.Args()) | flags, rows)
    ends = plasticity.at_the_end(plasticity.load_runs(tmp_path)[0]).set_index("metric")
    assert [ends.x[name] for name in metrics] == [0.2, 0.7, 0.7]
    lines = [ends.line[name].partition("depth x1, ")[2] for name in metrics]
    assert lines == ["critic sparsity 0.7", "actor sparsity 0.2", "actor sparsity 0.2"]


def test_probability_of_improvement_counts_pairs():
    # 3 beats 1 and 2; 2 beats 1 and ties with 2: 3.5 of 4. The second task: 1 of 2
    tasks = [np.array(values) for values in ([3.0, 2.0], [1.0, 2.0], [5.0], [4.0, 6.0])]
    assert plots.probability_of_improvement(*tasks[:2]) == 0.875
    assert plots.probability_of_improvement(*tasks) == pytest.approx((0.875 + 0.5) / 2)
    # With a first axis of resamples, as the bootstrap has it
    stacked = [np.stack([values, values[::-1]]) for values in tasks]
    assert plots.probability_of_improvement(*stacked).tolist() == [0.6875, 0.6875]
    assert plots.mean_of_tasks(*tasks) == pytest.approx((2.5 + 1.5 + 5 + 5) / 4)


def make_final(task: str, width: float, sparsity: float, returns: dict) -> pd.DataFrame:
    """Final returns of one network, by seed."""
    rows = {"seed": list(returns), "return": list(returns.values())}
    names = {"env_id": task, "width_scale": width, "init": "lecun", "sparsity": sparsity}
    return pd.DataFrame(rows).assign(**names)


def test_networks_are_compared_with_dense_ones_of_their_width_and_with_narrower_ones():
    networks = [
        make_final("Ant-v4", 1.0, 0.0, {1: 100.0, 2: 300.0, 3: 200.0}),
        make_final("Ant-v4", 4.0, 0.0, {1: 10.0, 2: 20.0, 3: 250.0}),
        make_final("Ant-v4", 4.0, 0.9, {2: 220.0, 3: 240.0, 4: 500.0}),
        make_final("Walker2d-v4", 1.0, 0.0, {1: 10.0, 2: 30.0}),
        make_final("Walker2d-v4", 4.0, 0.0, {1: 40.0}),
        make_final("Walker2d-v4", 4.0, 0.9, {1: 60.0, 2: 80.0}),
    ]
    found = streaming.compare(pd.concat(networks))
    names = zip(found.env_id, found.width_scale, found.sparsity, found.against)
    assert list(names) == [
        ("Ant-v4", 4, 0, "width scale 1"),
        ("Walker2d-v4", 4, 0, "width scale 1"),
        ("all tasks", 4, 0, "width scale 1"),
        ("Ant-v4", 4, 0.9, "dense"),
        ("Walker2d-v4", 4, 0.9, "dense"),
        ("all tasks", 4, 0.9, "dense"),
    ]
    ant, walker, both = found[found.against == "dense"].to_dict("records")
    assert (ant["runs"], ant["runs_against"], ant["pairs"]) == (3, 3, 2)
    assert ant["iqm"] == pytest.approx(960 / 3) and ant["iqm_against"] == pytest.approx(280 / 3)
    # All pairs are better but two: 220 and 240 against 250
    assert ant["probability"] == pytest.approx(7 / 9)
    # Seeds 2 and 3: 220 - 20 and 240 - 250
    assert [ant[name] for name in ("difference", "difference_low", "difference_high")] == [
        pytest.approx(95),
        -10,
        200,
    ]
    assert (
        walker["pairs"] == 1 and walker["difference"] == 20 and np.isnan(walker["difference_low"])
    )
    # Scores: divided by the dense means at width 1, 200 and 20
    assert both["difference"] == pytest.approx((95 / 200 + 20 / 20) / 2)
    assert both["probability"] == pytest.approx((7 / 9 + 1) / 2)
    scores = [1.1, 1.2, 2.5, 3.0, 4.0]  # the middle three of five
    assert both["iqm"] == pytest.approx(sum(scores[1:4]) / 3)
    table = streaming.comparisons_table(found.assign(returns_of="last tenth"))
    assert (
        "| last tenth | Ant-v4      | 4           | sparsity 0.9 | dense         | 3 and 3 | 320 ["
        in table
    )


def test_comparisons_without_what_they_need():
    ant = make_final("Ant-v4", 1.0, 0.0, {1: 1.0})
    assert streaming.compare(ant).empty
    # No seed in common; a dense mean below zero, so no scores
    networks = [
        ant,
        make_final("Ant-v4", 1.0, 0.9, {2: 3.0}),
        make_final("Walker2d-v4", 1.0, 0.0, {1: -1.0}),
        make_final("Walker2d-v4", 1.0, 0.9, {1: 2.0}),
    ]
    found = streaming.compare(pd.concat(networks))
    assert found.env_id.tolist() == ["Ant-v4", "Walker2d-v4"]
    assert found.pairs.tolist() == [0, 1]
    assert np.isnan(found.difference[0]) and found.difference[1] == 3
    row = streaming.comparisons_table(found.assign(returns_of="last tenth")).splitlines()[2]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[6:11] == ["1 and 1", "3", "1", "1.00", ""]


@pytest.mark.parametrize("name,std", [("sac", 1.0), ("ddpg", 0.3)])
def test_the_noise_of_gradient_interference_is_that_of_training(name, std, monkeypatch, tmp_path):
    module = MODULES[name]
    flags = {} if name == "sac" else {"exploration_noise": 0.3}
    write_run(tmp_path / "a", module, **flags)
    seen = []
    measure = gi.measure

    def note(*arguments):
        seen.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(gi, "measure", note)
    run = gi.read_run(tmp_path / "a", 40)
    networks = ["actor", "critic", "target_critic"] + ["temperature"] * (module is sac)
    saved = {name: run[3][name] for name in networks}
    for value in tree_leaves(saved):
        if value.is_floating_point():
            value += 0.1  # other numbers than those that the seed builds
    gi.measure_run(*run, 40, seed=0)
    noises = np.concatenate([seen[0][3], seen[0][4]])
    assert noises.shape == (80, ACTION_DIM) and noises.std() == pytest.approx(std, rel=0.2)
    assert not np.array_equal(seen[0][3], seen[0][4])
    # Both stages have the same batch and noise, and two agents
    assert all(a is b for a, b in zip(seen[0][2:5], seen[1][2:5]))
    # The discount of TD-MPC2's heuristic, and all networks of the checkpoint
    assert seen[0][5] == seen[1][5] == 0.95
    for name, state in saved.items():
        restored = getattr(seen[1][1], name).state_dict()
        assert all(torch.equal(restored[key], value) for key, value in state.items()), name


def test_an_interquartile_mean_leaves_out_a_quarter_at_either_end():
    # Of 1, 4, 9 ... 144 the middle six are 16, 25, 36, 49, 64, 81
    squares = np.arange(1.0, 13.0) ** 2
    assert plots.interquartile_mean(squares[:5], squares[5:]) == pytest.approx(271 / 6)


def test_bootstrap_intervals_hold_95_percent():
    values = np.arange(50.0)
    half = 1.96 * values.std() / 50**0.5
    for interval in (
        plots.bootstrap_interval([values], plots.mean_of_tasks),
        plots.mean_interval(values),
    ):
        assert interval == pytest.approx((24.5 - half, 24.5 + half), abs=0.08 * half)


def test_a_network_with_fewer_seeds_on_one_task_is_named():
    rows = []
    for sparsity, tasks in ((0.0, "aaabbb"), (0.9, "aaab")):
        for seed, task in enumerate(tasks):
            size = {"width_scale": 1, "depth_scale": 1, "weights": 10, "active": 10}
            run = {"algorithm": "SAC", "env_id": task, "sparsity": sparsity, "seed": seed}
            rows.append(run | size | {"return": float(seed)})
    points = scaling.summarise(pd.DataFrame(rows), scaling.NETWORK)
    assert points.seeds_min.tolist() == [3, 1] and points.seeds_max.tolist() == [3, 3]
    line = "SAC, some task, width 1, depth 1, sparsity 0.9: 1 of 3 seeds"
    assert scaling.find_uneven(points) == [line]


def test_transitions_are_drawn_at_random_and_stand_oldest_first():
    # A full ring of 40, in which 50 were added: the oldest one has place 10
    columns = [torch.zeros(40, 3), torch.zeros(40, 1), torch.arange(40.0), torch.zeros(40, 3)]
    replay = {"added": 50, "columns": [*columns, torch.zeros(40)]}
    checkpoint = {"replay": replay, "norm": sac.ObservationNorm(3, conftest.CPU).state_dict()}
    drawn = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        batch = gi.draw_batch(sac, checkpoint, 12, generator)
        age = (batch.reward - 10) % 40
        assert (age.diff() > 0).all()
        drawn += age.tolist()
    counts = np.bincount(drawn, minlength=40)
    assert counts.min() >= 3 and counts.max() <= 24  # 12 each


def test_no_difference_over_all_tasks_where_one_has_no_seed_in_common():
    dense = [make_final("a", 1, 0, {1: 1, 2: 1}), make_final("b", 1, 0, {1: 1, 2: 1})]
    sparse = [make_final("a", 1, 0.5, {3: 5, 4: 5}), make_final("b", 1, 0.5, {1: 2, 2: 2})]
    table = streaming.compare(pd.concat([*dense, *sparse])).set_index("env_id")
    assert table.loc["b", "difference"] == 1
    assert np.isnan(table.loc["all tasks", "difference"])
    assert table.loc["all tasks", "probability"] == 1
    assert table.pairs.to_dict() == {"a": 0, "b": 2, "all tasks": 2}


def test_each_sparsity_has_its_own_colour():
    shown = (0, 0.1, 0.5, 0.8, 0.9, 0.95, 0.96, 0.975, 0.9844, 0.99, 0.999)
    assert len({plots.sparsity_colour(sparsity) for sparsity in shown}) == len(shown)


def test_more_kinds_of_network_than_styles_of_line(capsys):
    assert len(set(map(str, plots.line_styles(range(10)).values()))) == 10
    assert not capsys.readouterr().out
    assert len(plots.line_styles(range(11))) == 11
    assert capsys.readouterr().out == "note: 11 kinds of network have 10 styles of line\n"
