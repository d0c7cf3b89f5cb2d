"""Docs do not drift from the code: flags exist, links lead somewhere, "Fork it" applies."""

import ast
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from analysis import learning_curves, plasticity, scaling, streaming, topologies
from conftest import (
    AGENTS,
    ROOT,
    call,
    load_checkpoint,
    metric_values,
    only_run,
    read_metrics,
    succeed,
)

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BY_NAME = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
# --help to pytest-xdist, TensorBoard, Slurm, W&B, uv, pip
OTHER_PROGRAMS = {
    "--yes",
    "--help",
    "--scale",
    "--runner",
    "--jobs",
    "--seeds",
    "--requeue",
    "--dist",
    "--logdir",
    "--array",
    "--cpus-per-task",
    "--dry-run",
    "--find-links",
    "--index-url",
}


def flags_of(script: Path) -> set[str]:
    """The flags of a script, from the fields of its Args."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            names = {field.target.id.replace("_", "-") for field in fields}
            switches = {
                field.target.id.replace("_", "-")
                for field in fields
                if ast.unparse(field.annotation) == "bool"
            }
            return (
                {f"--{name}" for name in names} | {f"--no-{name}" for name in switches} | {"--help"}
            )
    return set()


FLAGS = {
    str(script.relative_to(ROOT)): flags_of(script)
    for script in (ROOT / "sparse_zoo").rglob("*.py")
}


def anchors(page: Path) -> set[str]:
    """What can stand behind # in a link to a page, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@BY_NAME
def test_flags_exist(page):
    text = page.read_text()
    known = set.union(OTHER_PROGRAMS, *FLAGS.values())
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text)) <= known
    for script, rest in re.findall(r"python (sparse_zoo/\S+\.py)([^\n]*)", text):
        assert script in FLAGS, f"{script} does not exist"
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", rest.split(" #")[0]))
        assert used <= FLAGS[script], f"{script} does not know {used - FLAGS[script]}"


@BY_NAME
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def fork_patch(file: str) -> str:
    """The patch of "Fork it" that changes a file."""
    text = (ROOT / "docs" / "fork_it.md").read_text()
    (patch,) = re.findall(rf"```diff\n(--- a/{file}\n.+?)```", text, re.S)
    return patch


def test_the_topology_rule_of_fork_it_applies_and_runs(tmp_path, main):
    patch = fork_patch("my_dynamic.py")
    added = [line for line in patch.splitlines() if line.startswith("+") and line.strip("+")]
    assert len(added) <= 10
    copy = tmp_path / "my_dynamic.py"
    copy.write_text((AGENTS / "sac_simba_dynamic.py").read_text())
    succeed(call("git", "apply", "-", cwd=tmp_path, input=patch))
    flags = "--env-id Pendulum-v1 --action-repeat 1 --total-timesteps 120 --max-episode-steps 20"
    flags += " --learning-starts 40 --eval-episodes 1 --final-eval-episodes 1 --width-scale 0.125"
    flags += " --batch-size 8 --threads 1 --device cpu --sparsity 0.8 --topology random"
    flags += " --topology-interval 10 --diagnostics-interval 40 --sparse-kernel dense"
    succeed(main(copy, *flags.split()))
    rows = read_metrics(only_run(tmp_path / "runs"))
    counts = metric_values(rows, "diagnostics/critic_active_weights")
    dropped = metric_values(rows, "diagnostics/critic_weights_dropped")
    assert len(set(counts)) == 1 and dropped == sorted(dropped) and dropped[-1] > counts[0] / 2
    # A rule that does not do what it must
    copy.write_text(copy.read_text().replace(", inactive[drawn.to", ", 0 * inactive[drawn.to"))
    code, _, error = main(copy, *flags.split(), "--exp-name", "wrong")
    assert code == 2 and "error: --topology random: its rule must return distinct" in error


def test_the_patch_of_fork_it_applies_and_runs(tmp_path, main):
    patch = fork_patch("my_sac.py")
    copy = tmp_path / "my_sac.py"
    copy.write_text((AGENTS / "sac_simba_sparse.py").read_text())
    succeed(call("git", "apply", "-", cwd=tmp_path, input=patch))
    flags = "--env-id dm_control/cartpole-swingup-v0 --action-repeat 20 --total-timesteps 200"
    flags += " --learning-starts 100 --eval-episodes 1 --final-eval-episodes 1 --width-scale 0.25"
    flags += " --batch-size 8 --threads 1 --device cpu --sparsity 0.5 --sparse-kernel dense"
    succeed(main(copy, *flags.split()))
    run_dir = only_run(tmp_path / "runs")
    layers = json.loads((run_dir / "args.json").read_text())["layers"]["critic"]
    checkpoint = load_checkpoint(run_dir)
    pruned = [row for row in layers if row["active"] < row["total"]]
    assert len(pruned) == 4  # of two residual blocks
    for row in pruned:
        active = checkpoint["critic"][row["layer"] + ".active"].long()
        assert row["active"] == len(active) == row["total"] / 2
        assert (torch.bincount(active // 4, minlength=row["total"] // 4) == 2).all()


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


def test_the_first_command_of_readme_keeps_its_promise():
    """Of the ten published seeds the lowest is a tenth above what README promises."""
    readme = (ROOT / "README.md").read_text()
    page = (ROOT / "docs" / "results" / "first_command.md").read_text()
    (first,) = re.findall(r"&& \.venv/bin/python (sparse_zoo/.+)", readme)
    assert first in page
    (promise,) = re.findall(r"more than (\d+) of 1,000", readme)
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    assert [int(seed) for seed, *_ in rows] == list(range(1, 11))
    assert min(float(value) for _, value, _ in rows) >= 1.1 * int(promise)


RAW = ("returns*.csv.gz", "runs.csv", "runs.csv.gz", "*_runs.csv", "*_runs.csv.gz")


@pytest.mark.parametrize("name", RAW)
def test_published_runs_can_be_given_to_the_script_of_their_figure_again(name):
    """--earlier takes tables with these columns."""
    found = sorted((ROOT / "docs" / "results").glob(f"*/{name}"))
    assert found
    for path in found:
        if path.name.startswith("returns"):
            script = streaming if path.parent.name.startswith("streaming") else learning_curves
        elif path.name.endswith(".gz"):
            script = plasticity
        else:
            script = scaling if path.name == "runs.csv" else topologies
        assert set(script.COLUMNS) <= set(pd.read_csv(path, nrows=1)), path
