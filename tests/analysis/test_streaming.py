"""streaming.py on hand-made runs: its figures, exact numbers, what is missing is named."""

from pathlib import Path

import conftest
import pandas as pd
import pytest
from analysis import streaming
from conftest import check_error, succeed
from matplotlib.figure import Figure
from matplotlib.image import imread


def write_run(folder: Path, returns: dict[int, float], finished: bool = True, **flags) -> None:
    """A run of 1,000 env steps whose episodes end at some of them."""
    flags = {
        "env_id": "Ant-v4",
        "width_scale": 1.0,
        "init": "lecun",
        "sparsity": 0.0,
        "seed": 1,
        **flags,
    }
    name = flags.pop("name", f"run{len(list(folder.glob('*')))}")
    flags |= {"exp_name": "stream_ac_sparse", "total_timesteps": 1000}
    rows = []
    for step, value in returns.items():
        rows += [(step, "episode/return", value), (step, "episode/length", 10)]
    if finished:
        rows.append((1000, "final/return_mean", 0.0))
    conftest.write_run(folder / name, flags, rows)


@pytest.fixture
def main(main):
    return lambda *flags: main(streaming.__file__, "--output", "out", "--bin", "500", *flags)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def test_figures_and_numbers(tmp_path, main, out):
    for seed, last in ((1, 10.0), (2, 20.0)):
        write_run(
            tmp_path / "runs",
            {400: 1.0, 950: last, 990: last + 2},
            seed=seed,
            sparsity=0.84,
            width_scale=0.25,
        )
        write_run(tmp_path / "runs", {400: 1.0, 950: 5.0}, seed=seed)
        write_run(tmp_path / "runs", {400: 1.0, 950: 7.0}, seed=seed, init="sparse_init")
    write_run(tmp_path / "runs", {400: 1.0}, seed=3)
    write_run(tmp_path / "runs", {400: 1.0}, seed=4, finished=False)
    text = succeed(main("--figures", "13"))
    assert [path.name for path in out.glob("*.png")] == ["figure_13.png"]
    assert "left out: run7: unfinished, at env step 400 of 1,000" in text
    lost = (
        "no final return: Ant-v4, width scale 1, dense, seed 3: no episode ended in its last tenth"
    )
    assert lost in text
    table = pd.read_csv(out / "final_returns.csv").set_index(["width_scale", "init", "sparsity"])
    assert table.loc[(0.25, "lecun", 0.84), ["mean", "seeds"]].tolist() == [16, 2]
    assert table.loc[(1.0, "sparse_init", 0.0), "mean"] == 7
    last, whole = pd.read_csv(out / "comparisons.csv").to_dict("records")
    assert (last["returns_of"], last["init"], last["difference"]) == (
        "last tenth",
        "sparse_init",
        2,
    )
    # The means of the two points of a curve: 1 and 7 against 1 and 5. Seed 3 has one point, 1
    assert (whole["returns_of"], whole["difference"]) == ("all of training", 1)
    assert (whole["iqm"], whole["runs_against"]) == (4, 3)
    assert (out / "comparisons.md").read_text() in text

    succeed(main())
    assert len(list(out.glob("*.png"))) == len(list(out.glob("*.svg"))) == 3
    assert all(imread(path).std() > 0.01 for path in out.glob("*.png"))


def test_no_runs(main):
    check_error(main(), "error: no finished run")


def test_runs_that_cannot_be_averaged(tmp_path, main, out):
    write_run(tmp_path / "runs", {950: 5.0})
    # Moved aside: does not count
    write_run(tmp_path / "runs", {950: 50.0}, name="run0.old1", trace_lambda=0.5)
    succeed(main("--figures", "12"))
    assert pd.read_csv(out / "final_returns.csv")["mean"].tolist() == [5]
    write_run(tmp_path / "runs", {950: 5.0}, seed=3, gamma=0.9)
    write_run(tmp_path / "runs", {950: 5.0}, seed=4, gamma=0.99)
    check_error(main("--figures", "12"), "--gamma 0.9 and 0.99")


def test_a_flag_that_an_older_version_did_not_have(tmp_path, main):
    write_run(tmp_path / "runs", {950: 5.0}, gamma=1)
    write_run(tmp_path / "runs", {950: 5.0}, seed=2, gamma=1.0, overlap=True)
    check_error(main("--figures", "12"), "mixes", "--overlap None and True")


def test_sparsity_of_actor_and_critic(tmp_path, main, out):
    both = {"actor_sparsity": 0.9, "critic_sparsity": 0.9}
    write_run(tmp_path / "runs", {950: 5.0}, **both)
    write_run(tmp_path / "runs", {950: 5.0}, seed=2, sparsity=0.9)
    write_run(tmp_path / "runs", {950: 5.0}, seed=3, actor_sparsity=0.9, name="half")
    text = succeed(main("--figures", "12"))
    assert "left out: half: sparsity of the actor 0.9, of the critic 0" in text
    (row,) = pd.read_csv(out / "final_returns.csv").to_dict("records")
    assert (row["sparsity"], row["seeds"]) == (0.9, 2)
    # Equal seeds have an interval, of no width
    assert (row["low"], row["mean"], row["high"]) == (5, 5, 5)


def test_a_curve_is_the_mean_of_all_seeds_or_of_none(tmp_path):
    ax = Figure().subplots()
    first = {"init": "lecun", "sparsity": 0.0, "seed": 1}
    data = [(200, 2.0), (400, 4.0), (600, 6.0)]
    rows = [first | {"env_step": step, "return": value} for step, value in data]
    second = {"init": "lecun", "sparsity": 0.0, "seed": 2}
    rows += [second | {"env_step": step, "return": 10.0} for step in (200, 600, 800)]
    streaming.draw_curves(ax, pd.DataFrame(rows))
    (line,) = ax.lines
    assert line.get_xydata().tolist() == [[200, 6], [400, 7], [600, 8]]


def test_of_a_run_that_is_also_an_earlier_one_the_folders_episodes_count(tmp_path, main, out):
    write_run(tmp_path / "runs", {200: 1.0, 950: 2.0})
    succeed(main())
    first = pd.read_csv(out / "returns.csv.gz")
    (tmp_path / "runs").rename(tmp_path / "other")
    write_run(tmp_path / "runs", {300: 7.0, 950: 9.0})
    succeed(main("--earlier", "out/returns.csv.gz"))
    both = pd.read_csv(out / "returns.csv.gz")
    assert list(both.env_step) == [300, 950] and list(both["return"]) == [7, 9]
    # Another seed that is longer cannot be averaged with it
    first.assign(seed=2, total_timesteps=2000).to_csv(tmp_path / "longer.csv.gz", index=False)
    check_error(main("--earlier", "longer.csv.gz"), "Ant-v4", "runs of 1,000 and 2,000 env steps")


def test_runs_that_cannot_be_used_are_named(tmp_path, main, out):
    write_run(tmp_path / "runs", {950: 5.0}, name="a")
    # The same network, task and seed
    write_run(tmp_path / "runs", {950: 9.0}, name="b", eval_interval=7)
    write_run(tmp_path / "runs", {}, name="c", seed=2)  # no episode has ended
    text = succeed(main())
    assert "left out: b: a second run of this network, task and seed" in text
    assert "left out: c: no episode has ended" in text
    assert "not drawn: figure 13, for lack of a finished run with --init sparse_init" in text
    assert pd.read_csv(out / "final_returns.csv")["values"].tolist() == [5]
    assert main("--figures", "13")[0] == 2


def test_no_episode_in_the_last_tenth_and_runs_of_other_names(tmp_path, main, out):
    write_run(tmp_path / "runs", {400: 5.0}, name="a")
    write_run(tmp_path / "runs", {400: 5.0}, name="b")
    fork = tmp_path / "runs" / "b" / "args.json"
    fork.write_text(fork.read_text().replace("stream_ac_sparse", "my_stream"))
    text = succeed(main("--figures", "12", "17"))
    assert "left out: b: a run of my_stream" in text
    assert "not drawn: figure 12, for lack of a final return with --init lecun" in text
    assert [path.name for path in out.glob("*.png")] == ["figure_17.png"]


@pytest.mark.parametrize(
    "flags,words", [(("--bin", "0"), "--bin 0"), (("--output", "/proc/x"), "/proc/x --output")]
)
def test_bad_input(tmp_path, main, flags, words):
    write_run(tmp_path / "runs", {950: 5.0})
    check_error(main(*flags), *words.split())
