"""bench_update.py: it measures, and its count of arithmetic is that of PyTorch's own counter."""

import re
import sys

import bench_update
import pandas as pd
import pytest
from conftest import AGENTS, ROOT, call, check_error, succeed
from torch.utils.flop_counter import FlopCounterMode


def test_one_row():
    flags = "--width-scale 0.25 --sparsity 0.9 --turns 1 --turn-seconds 0.01 --threads 1"
    out = succeed(call(sys.executable, bench_update.__file__, *flags.split()))
    ratio = dict(re.findall(r"(\w+)=(\S+)", out.splitlines()[-1]))
    sides = re.findall(r"^(?:masked dense twin|ours) +([\d.]+) ms per update +(\d+) MiB", out, re.M)
    (twin_ms, twin_mib), (ours_ms, ours_mib) = [map(float, side) for side in sides]
    assert float(ratio["time"]) == pytest.approx(ours_ms / twin_ms, rel=0.05)  # rounded
    assert float(ratio["memory"]) == pytest.approx(ours_mib / twin_mib, rel=0.02)
    assert min(twin_ms, ours_ms) > 0.1 and min(twin_mib, ours_mib) > 100


def test_another_version_on_the_other_side(tmp_path):
    """The same file with networks of twice the width, and with packed weights like ours."""
    text = (AGENTS / "sac_simba_sparse.py").read_text()
    version = tmp_path / "wide.py"
    version.write_text(
        text.replace("round(128 * args.width_scale)", "round(256 * args.width_scale)")
    )
    args = bench_update.Args(width_scale=0.125, sparsity=0.9, threads=1, against=str(version))
    weights = [sum(bench_update.build(args, side)[1].values()) for side in ("twin", "ours")]
    wide = bench_update.Args(width_scale=0.25, sparsity=0.9, threads=1)
    assert weights[0] == sum(bench_update.build(wide, "ours")[1].values()) > 2 * weights[1]
    dense = bench_update.Args(width_scale=0.125, sparsity=0.9, threads=1, against="dense")
    assert sum(bench_update.build(dense, "twin")[1].values()) > 8 * weights[1]


@pytest.mark.parametrize(
    "flags", ["nowhere.py", "pyproject.toml", "dense --table", "dense --launches"]
)
def test_bad_against(main, flags):
    check_error(main(bench_update.__file__, "--against", *flags.split()), "--against")


@pytest.mark.parametrize("flags", ["--table", "--profile", "--launches"])
def test_a_reference_is_never_left_out_in_silence(main, flags):
    flags = f"--reference jax {flags} --device cpu"
    check_error(main(bench_update.__file__, *flags.split()), "--reference jax: one row")


def test_a_dense_side_has_no_sparsity():
    size = {"width_scale": 0.125, "sparsity": 0.9, "device": "cpu"}
    args = bench_update.Args(**size, turns=1, turn_seconds=0.0)
    rows = bench_update.measure_sides(args, ("ours", "dense"))
    assert {row["side"]: row["sparsity"] for row in rows} == {"ours": 0.9, "dense": 0.0}


def test_a_file_that_is_no_agent(capsys):
    args = bench_update.Args(against=bench_update.__file__, threads=1)
    with pytest.raises(SystemExit):
        bench_update.build(args, "twin")
    assert capsys.readouterr().err.endswith("bench_update.py: this is no agent's file\n")


@pytest.mark.parametrize("agent", ["sac", "ddpg"])
def test_arithmetic_of_a_dense_update(agent):
    args = bench_update.Args(agent=agent, width_scale=1.0, sparsity=0.0, threads=1)
    update, weights = bench_update.build(args, "ours")
    with FlopCounterMode(display=False) as counter:
        update()
    assert bench_update.gflop(args, weights) == pytest.approx(
        counter.get_total_flops() / 1e9, rel=0.02
    )


def test_figure():
    row = {"twin_ms": 90.0, "ours_ms": 40.0, "twin_mib": 700.0, "ours_mib": 600.0, "gflop": 3.0}
    table = pd.DataFrame(
        {"width_scale": width, "sparsity": s, **row} for width in (1.0, 2.0) for s in (0.0, 0.9)
    )
    axes = bench_update.draw(table).axes
    assert [len(ax.lines) for ax in axes] == [3, 3, 2]
    assert list(axes[0].lines[-1].get_ydata()) == [90.0, 90.0]


def test_the_table_of_readme_is_that_of_the_numbers(capsys):
    """After a new measurement: copy what `bench_update.py --table` prints last."""
    bench_update.print_against_dense(
        pd.read_csv(ROOT / "docs" / "results" / "update_costs" / "update_costs.csv")
    )
    assert capsys.readouterr().out in (ROOT / "README.md").read_text()


def test_against_dense_by_hand(capsys):
    table = pd.DataFrame(
        {
            "width_scale": [1.0, 1.0],
            "sparsity": [0.0, 0.9],
            "active_weights": [4_000_000, 400_000],
            "ours_ms": [80.0, 20.0],
            "ours_mib": [600.0, 300.0],
            "time": [1.0, 0.2],
            "memory": [1.0, 0.4],
        }
    )
    bench_update.print_against_dense(table)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| 1 | 0 | 4 M | 80 |  |  | 600 |  |  |",
        "| 1 | 0.9 | 0.4 M | 20 | 0.25 | 0.20 | 300 | 0.50 | 0.40 |",
    ]
