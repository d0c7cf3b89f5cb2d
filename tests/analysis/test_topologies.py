"""topologies.py on hand-made runs: sizes, costs and returns by hand; what is missing is named."""

import json
from pathlib import Path

import conftest
import pandas as pd
import pytest
from analysis import topologies
from conftest import check_error, succeed
from matplotlib.image import imread

FLAGS = {
    "env_id": "dm_control/walker-walk-v0",
    "depth_scale": 1,
    "width_scale": 0.5,
    "sparsity": 0.9,
    "total_timesteps": 1000,
    "learning_starts": 200,
    "action_repeat": 2,
    "updates_per_step": 2,
    "batch_size": 10,
    "seed": 1,
}


def write_run(folder: Path, value: float, active: list | None = None, finished=True, **flags):
    """A run of 100 active actor weights and 1,000 of the critic; active: of sparse critic layers,
    as they were logged."""
    agent = "sac_simba_dynamic" if "topology" in flags else "sac_simba_sparse"
    schedule = {"topology_interval": 400, "prune_start": 0.2, "prune_end": 0.8}
    flags = FLAGS | {"exp_name": agent} | (schedule if "topology" in flags else {}) | flags
    rows = [(1000, "time/env_steps_per_second", 40.0)]
    for number, count in enumerate(active or []):
        rows.append((100 * number, "diagnostics/critic_active_weights", count))
        rows.append((100 * number, "diagnostics/critic_ever_active", 0.25 * number))
        rows.append((100 * number, "diagnostics/critic_first_overlap", 0.5))
    rows += [(1000, "final/return_mean", value)] if finished else []
    layers = {
        "actor": [{"layer": "a", "active": 100, "total": 100}],
        "critic": [{"layer": "c", "active": 1000, "total": 9000}],
    }
    name = f"run{len(list(folder.glob('*')))}"
    return conftest.write_run(folder / name, flags, rows, layers=layers)


@pytest.fixture
def main(main):
    return lambda *flags: main(topologies.__file__, "--output", "out", *flags)


def test_figure_and_numbers(tmp_path, main):
    runs = tmp_path / "runs"
    for seed, value in ((1, 10.0), (2, 20.0), (3, 60.0)):
        write_run(runs, value, seed=seed)
        write_run(runs, value + 5, [900, 900], seed=seed, topology="rigl")
    write_run(runs, 7.0, topology="magnitude")  # without diagnostics
    write_run(runs, 8.0, sparsity=0.0, width_scale=0.2)
    write_run(runs, 9.0, [900], topology="static", width_scale=0.25)
    write_run(runs, 9.0, [900], topology="set", finished=False)
    text = succeed(main())
    assert "left out: run9: unfinished" in text
    table = pd.read_csv(tmp_path / "out" / "topologies.csv").set_index(["topology", "width_scale"])
    assert len(table) == 5
    static = table.loc["static", 0.5]
    assert static["return"] == 30 and (static.low, static.high, static.seeds) == (10, 60, 3)
    assert static.active_weights == 1100 and static.steps_per_second == 40
    # 800 env steps are 400 decisions and 800 updates of 10 transitions
    assert static.tflop == pytest.approx(8000 * (8 * 100 + 12 * 1000) / 1e12)
    assert table.loc["rigl", 0.5].tflop == static.tflop
    assert table.loc["rigl", 0.5].ever_active == 0.25
    # Dense for the first 400 updates; then, after 0.6 of training, (1 / 3)^3 is left to be pruned
    pruned = table.loc["magnitude", 0.5]
    mean = 1000 + 8000 * (1 + 1 / 27) / 2
    assert pruned.tflop == pytest.approx(8000 * (8 * 100 + 12 * mean) / 1e12)
    assert pruned.active_weights == 1100 and table.loc["dense", 0.2]["return"] == 8
    assert "| RigL " in text and "35 [15, 65]" in text and "| 15 25 65 " in text
    picture = imread(tmp_path / "out" / "topologies.png")
    assert picture.std() > 0.01

    # A run that is among the earlier ones as well counts once
    both = succeed(main("--earlier", "out/topologies_runs.csv"))
    assert "35 [15, 65]" in both and "second run" not in both
    again = succeed(main("--runs-dir", "none", "--earlier", "out/topologies_runs.csv"))
    assert "35 [15, 65]" in again
    assert len(pd.read_csv(tmp_path / "out" / "topologies.csv")) == 5


def test_runs_that_cannot_be_used(tmp_path, main):
    check_error(main(), "no finished run of sac_simba_sparse")
    runs = tmp_path / "runs"
    write_run(runs, 10.0)
    other = write_run(runs, 10.0, exp_name="ddpg_simba_sparse", seed=2)
    bare = write_run(runs, 10.0, seed=3)
    uneven = write_run(runs, 10.0, seed=6, actor_sparsity=0.0)
    small = write_run(runs, 10.0, seed=7, batch_size=None)
    record = json.loads((bare / "args.json").read_text())
    (bare / "args.json").write_text(json.dumps({"args": record["args"]}))
    timeless = write_run(runs, 10.0, seed=8, topology="magnitude", prune_end=None)
    text = succeed(main())
    needed = "topology_interval or prune_start or prune_end missing or unusable"
    assert f"left out: {timeless.name}: args.json: {needed}" in text
    assert f"left out: {other.name}: a run of ddpg_simba_sparse" in text
    assert f"left out: {bare.name}: args.json has no layer tables" in text
    assert f"left out: {uneven.name}: actor sparsity 0 is not that of the critic, 0.9" in text
    assert f"left out: {small.name}: args.json: batch_size missing or unusable" in text
    write_run(runs, 10.0, seed=4, gamma=0.9)
    write_run(runs, 10.0, seed=5, gamma=0.8)
    check_error(main(), "--gamma 0.8 and 0.9")


def test_static_and_dynamic_runs_must_learn_alike(tmp_path, main):
    write_run(tmp_path / "runs", 1.0, learning_rate=1e-4)
    write_run(tmp_path / "runs", 1.0, [900], topology="set", learning_rate=1e-3)
    both = "sac_simba_dynamic and sac_simba_sparse with --learning-rate 0.0001 and 0.001"
    check_error(main(), both)
