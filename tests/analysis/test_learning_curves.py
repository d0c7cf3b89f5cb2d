"""learning_curves.py on runs made by hand: nothing is lost, the right curve is published."""

from pathlib import Path

import conftest
import imageio
import pandas as pd
import plots
import pytest
from analysis import learning_curves
from conftest import check_error, succeed

SCRIPT = learning_curves.__file__


def write_run(runs: Path, name: str, seed: int, sparsity: float, returns: dict[int, float]) -> None:
    flags = {
        "exp_name": "sac_simba_sparse",
        "env_id": "dm_control/walker-walk-v0",
        "width_scale": 1.0,
        "depth_scale": 1,
        "sparsity": sparsity,
        "actor_sparsity": None,
        "critic_sparsity": None,
        "seed": seed,
    }
    rows = []
    for step, value in returns.items():
        rows += [(step, "eval/return_mean", value), (step, "losses/alpha", 0.1)]
    conftest.write_run(runs / name, flags, rows)


def test_every_run_is_kept_as_it_is(tmp_path, main):
    write_run(tmp_path / "runs", "a", 1, 0.0, {0: 30.5, 10_000: 1 / 3})
    write_run(tmp_path / "runs", "b", 2, 0.8, {0: 20.0})
    write_run(tmp_path / "runs", "just_begun", 3, 0.8, {})
    out = succeed(main(SCRIPT, "--runs-dir", "runs", "--output", "out"))
    assert "left out: just_begun: no returns yet" in out
    table = pd.read_csv(tmp_path / "out" / "returns.csv.gz")
    assert list(zip(table.seed, table.sparsity, table.env_step, table.value)) == [
        (1, 0.0, 0, 30.5),
        (1, 0.0, 10_000, 1 / 3),
        (2, 0.8, 0, 20.0),
    ]
    assert imageio.imread(tmp_path / "out" / "learning_curves.png").std() > 1

    write_run(tmp_path / "more", "c", 3, 0.9, {0: 25.0})
    write_run(tmp_path / "more", "a", 1, 0.0, {0: 30.5, 10_000: 1 / 3})  # is among the earlier ones
    earlier = ("--earlier", "out/returns.csv.gz")
    succeed(main(SCRIPT, "--runs-dir", "more", *earlier, "--output", "both"))
    both = pd.read_csv(tmp_path / "both" / "returns.csv.gz")
    pd.testing.assert_frame_equal(both[both.run != "c"].reset_index(drop=True), table)
    assert len(both) == 4
    new = both[both.run == "c"][["seed", "sparsity", "env_step", "value"]]
    assert new.to_numpy().tolist() == [[3, 0.9, 0, 25.0]]
    # Of a run that has other numbers there, those of the folder are drawn
    write_run(tmp_path / "again", "a", 1, 0.0, {0: 31.5, 20_000: 2.0})
    succeed(main(SCRIPT, "--runs-dir", "again", *earlier, "--output", "both"))
    both = pd.read_csv(tmp_path / "both" / "returns.csv.gz")
    assert both[both.run == "a"].value.tolist() == [31.5, 2.0]


def test_published_curve_of_a_task():
    curve = plots.published_curve("SAC", "dm_control/walker-walk-v0").set_index("env_step")
    assert curve.loc[50_000, "mean"] == pytest.approx(900.1) and curve.loc[
        50_000, "std"
    ] == pytest.approx(84.5)
    assert curve.loc[50_000, "seeds"] == 10
    assert len(plots.published_curve("DDPG", "dm_control/humanoid-run-v0")) == 21
    assert len(plots.published_curve("DDPG", "Walker2d-v5")) == 0
    pixels = plots.published_curve("DrQ-v2", "dm_control/cartpole-balance-v0").set_index("env_step")
    assert pixels.loc[60_000, "mean"] == pytest.approx(984.6)


def test_networks_of_two_widths_are_two_lines():
    rows = [(0.5, 0.0, 1), (0.5, 0.8, 1), (1.0, 0.8, 1), (1.0, 0.8, 2)]
    columns = {
        "depth_scale": 1,
        "actor_sparsity": None,
        "critic_sparsity": None,
        "metric": "eval/return_mean",
    }
    columns |= {"exp_name": "sac_simba_sparse", "env_id": "dm_control/walker-walk-v0"}
    table = pd.DataFrame(rows, columns=["width_scale", "sparsity", "seed"]).assign(**columns)
    table["run"] = [f"w{run.width_scale}__s{run.seed}" for run in table.itertuples()]
    table.loc[0, "run"] = "dense"
    table = pd.concat([table.assign(env_step=step, value=step / 100) for step in (0, 10_000)])
    axes = learning_curves.draw(table).axes[0]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2]
    assert len(lines) == 5  # one for each run and the mean of two
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 3
    assert [text.get_text() for text in axes.get_legend().get_texts()][:3] == [
        "dense, width scale 0.5, one seed (1)",
        "sparsity 0.8, width scale 0.5, one seed (1)",
        "sparsity 0.8, width scale 1, 2 seeds",
    ]


def test_runs_that_differ_in_other_flags_are_two_lines(tmp_path):
    """Such as --reset-interval; and what --no-resume has moved aside is not drawn."""
    for name, value in (("a", 10.0), ("b", 20.0), ("b.old1", 30.0)):
        write_run(tmp_path, name, 1, 0.0, {0: value, 10_000: 2 * value})
    write_run(tmp_path, "starting", 2, 0.0, {})
    (tmp_path / "starting" / "metrics.csv").write_text("")
    axes = learning_curves.draw(learning_curves.load(tmp_path)).axes[0]
    lines = [list(line.get_ydata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert lines == [[10, 20], [20, 40]]
    assert axes.get_legend().get_texts()[0].get_text() == "dense, 2 runs"


def test_seeds_whose_other_flags_differ_have_no_mean(tmp_path):
    """The hash of the flags is in the names of the runs."""
    for seed, digest in ((1, "aa"), (2, "bb")):
        curve = {0: 10.0 * seed, 10_000: 20.0 * seed}
        write_run(tmp_path, f"cheetah__{digest}__seed{seed}", seed, 0.0, curve)
    axes = learning_curves.draw(learning_curves.load(tmp_path)).axes[0]
    assert axes.get_legend().get_texts()[0].get_text() == "dense, 2 runs"


def test_scores_of_atari_games():
    assert learning_curves.atari_scores("ALE/Pong-v5") == {"random": -20.7, "human": 14.6}
    assert learning_curves.atari_scores("ALE/Tetris-v5") == {}


def test_no_runs(tmp_path, main):
    assert main(SCRIPT) == (2, "", "error: no run in runs\n")
    check_error(main(SCRIPT, "--earlier", "no.gz"), "--earlier no.gz: [Errno 2] No such file")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    check_error(main(SCRIPT, "--earlier", "other.csv"), "--earlier other.csv:")


def test_sparsities_of_actor_and_critic():
    """Given by flags of their own, or by both."""
    columns = {
        "exp_name": "sac_simba_sparse",
        "env_id": "dm_control/walker-walk-v0",
        "width_scale": 1.0,
        "depth_scale": 1,
        "seed": 1,
        "metric": "eval/return_mean",
    }
    runs = {"both": (0.8, None, None), "each": (0.0, 0.8, 0.8), "critic": (0.0, None, 0.8)}
    rows = [
        [name, *sparsities, step, float(step)]
        for name, sparsities in runs.items()
        for step in (0, 10)
    ]
    names = ["run", "sparsity", "actor_sparsity", "critic_sparsity", "env_step", "value"]
    axes = learning_curves.draw(pd.DataFrame(rows, columns=names).assign(**columns)).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()][:2] == [
        "sparsity 0.8, 2 runs",
        "sparsity 0.8, actor sparsity 0, one seed (1)",
    ]
