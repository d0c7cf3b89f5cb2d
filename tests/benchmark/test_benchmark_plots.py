"""benchmark.sh: which script draws each figure, with which flags. Nothing is drawn."""

from pathlib import Path

import pytest
from test_benchmark import benchmark

# In place of python: writes down what it is given, and reads a list of commands to its end
NOTE = """#!/usr/bin/env bash
echo "$*" >>"$NOTES"
case $1 in *plan.py | *tables.py) cat >/dev/null ;; esac
"""

SCORED = "--sparsities 0 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9 --threads 3"
VARIANTS = "--variants 1:0 5:0 5:0.9"
PLASTICITY = "--metrics eval/return_mean diagnostics/critic_dormant_ratio"
# Of each target: script and flags; FROM stands for the folders of runs and of results
PAPER = {
    "fig1": ["scaling --figure size FROM"],
    "fig2": ["scaling --figure aggregate FROM"],
    "fig3": ["scaling --figure sparsity FROM"],
    "fig4": [f"plasticity --figure srank FROM {VARIANTS}"],
    "fig5": [f"plasticity --figure over-training FROM {VARIANTS}"],
    "fig6": ["plasticity --figure reset FROM"],
    "fig7": [f"plasticity --figure param-norm FROM {VARIANTS}"],
    "fig8": [
        f"simplicity_bias --width-scale 5 --grid 300 --inits 10 {SCORED} --output OUT/scores_paper",
        "scaling --figure gain FROM --scores OUT/scores_paper/scores.csv",
    ],
    "fig9": ["gradient_interference OUT/runs/* --samples 256 --output OUT"],
    "fig10": ["scaling --figure bars FROM"],
    "fig11": ["plasticity FROM --metrics eval/return_mean diagnostics/critic_active_units"],
    "fig12": ["streaming --figures 12 FROM --bin 20000"],
    "fig13": ["streaming --figures 13 FROM --bin 20000"],
    "fig14": ["scaling --figure size-linear FROM"],
    "fig15": ["scaling --figure width FROM"],
    "fig16": ["scaling --figure depth FROM"],
    "fig17": ["streaming --figures 17 FROM --bin 20000"],
    "fig18": ["atari_scores FROM"],
    **{f"table{number}": [f"tables --table {number} --output OUT"] for number in range(1, 6)},
}
EXTRA = {
    "extra-equal": [
        f"plasticity --figure {figure} FROM --variants 1:0 2:0 5:0.96 5:0.84"
        for figure in ("over-training", "param-norm")
    ],
    "extra-uniform": [f"plasticity FROM {PLASTICITY}"],
    "extra-sparse-init": ["streaming FROM --bin 20000"],
    "extra-dynamic": ["topologies FROM"],
    "extra-constant-active": [
        "scaling --figure active FROM",
        "plasticity --figure against-sparsity FROM",
    ],
}


def drawn(folder: Path, target: str, scale: str) -> dict[str, list[str]]:
    """What `plot` calls for each target."""
    python, notes = folder / "python", folder / "notes"
    python.write_text(NOTE)
    python.chmod(0o755)
    benchmark(
        *("plot", target, "--scale", scale, "--seeds", "1"),
        PYTHON=str(python),
        NOTES=str(notes),
        RUNS=str(folder / "runs"),
        RESULTS=str(folder / "results"),
        THREADS="3",
    )
    calls = {}
    for line in notes.read_text().splitlines():
        if line.startswith("-c ") or "plan.py" in line:
            continue
        name = line.split(f"{folder}/results/")[1].split("/")[0].split()[0]
        out = f"{folder}/results/{name}"
        line = line.replace(f"--runs-dir {out}/runs --output {out}", "FROM").replace(out, "OUT")
        script, _, flags = line.removeprefix("sparse_zoo/analysis/").partition(".py ")
        calls.setdefault(name, []).append(f"{script} {flags}")
    return calls


def test_every_figure_and_table_of_the_paper(tmp_path):
    assert drawn(tmp_path, "all", "paper") == PAPER


@pytest.mark.parametrize("target", EXTRA)
def test_what_is_drawn_beside_the_paper(target, tmp_path):
    assert drawn(tmp_path, target, "paper") == {target: EXTRA[target]}


def test_small_scales_draw_their_own_widths(tmp_path):
    variants = "--variants 0.125:0 0.625:0 0.625:0.9"
    call = f"plasticity --figure srank FROM {variants}"
    assert drawn(tmp_path, "fig4", "cpu") == {"fig4": [call]}
    network = "--width-scale 0.5 --reach 31.6 --grid 300 --inits 5"
    bias = f"{network} {SCORED} --output OUT/scores_cpu"
    assert drawn(tmp_path, "fig8", "cpu")["fig8"][0] == f"simplicity_bias {bias}"
