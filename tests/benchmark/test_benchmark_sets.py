"""benchmark.sh: exactly these tasks, games, sizes, sparsities and intervals in each figure."""

import csv
import re

import pytest
from analysis import plan
from conftest import ANALYSIS, call, succeed
from test_benchmark import commands, weights

HARD = {"dog-run", "dog-trot", "dog-walk", "humanoid-run", "humanoid-stand", "humanoid-walk"}
FOUR = {"humanoid-run", "dog-run", "humanoid-walk", "dog-trot"}
TWO = {"humanoid-run", "dog-run"}
FULL = {"0", *(f"0.{digit}" for digit in range(1, 10))}
BOTH = {"sac_simba_sparse", "ddpg_simba_sparse"}
SAC = {"sac_simba_sparse"}
WIDE = {("0.5", "1"), ("1", "1"), ("2", "1"), ("3", "1"), ("4", "1"), ("5", "1")}
# Of each figure: agents, tasks, (width, depth), sparsities
SETS = {
    "fig1": (BOTH, FOUR, WIDE | {("4", "2"), ("5", "2")}, "0 0.5556 0.75 0.84 0.875 0.92"),
    "fig2": (BOTH, HARD, WIDE | {("2", "2"), ("2", "3"), ("2", "4")}, None),
    "fig3": (BOTH, FOUR, {("1", "1"), ("5", "1")}, FULL),
    "fig4": (SAC, {"humanoid-run"}, {("1", "1"), ("5", "1")}, FULL),
    "fig6": (SAC, TWO, {("5", "1")}, "0 0.9"),
    "fig8": (BOTH, FOUR, {("5", "1")}, FULL),
    "fig9": (SAC, {"humanoid-run"}, {("5", "1")}, "0 0.9"),
    "fig10": ({"drqv2_sparse"}, {"quadruped-run", "hopper-hop"}, {"1", "2", "4"}, "0 0.4 0.8"),
    "fig11": ({"drqv2_sparse"}, {"quadruped-run"}, {"4"}, "0 0.4 0.8"),
    "fig12": ({"stream_ac_sparse"}, {"Ant-v4", "Walker2d-v4"}, set("1248"), "0 0.4 0.8 0.9"),
    "fig13": ({"stream_ac_sparse"}, {"Ant-v4", "Walker2d-v4"}, {"1"}, "0 0.9"),
    "fig15": (BOTH, HARD, WIDE, "0 0.5556 0.75 0.84"),
    "fig16": (BOTH, HARD, {("2", "1"), ("2", "2"), ("2", "3"), ("2", "4")}, "0 0.5 0.6667 0.75"),
    "fig18": ({"der_impala_sparse"}, None, {"1", "3"}, "0 0.4 0.8"),
}


def found(target: str, pattern: str, scale: str = "paper") -> set:
    return {match for line in commands(target, scale) for match in re.findall(pattern, line)}


@pytest.mark.parametrize("target", SETS)
def test_agents_tasks_sizes_and_sparsities(target):
    agents, tasks, sizes, sparsities = SETS[target]
    assert found(target, r"sparse_zoo/(\w+)\.py") == agents
    if tasks:
        prefix = "(?:dm_control/)?"
        assert found(target, rf"--env-id {prefix}(\S+?)(?:-v0)? ") == tasks
    size = r"--width-scale (\S+)"
    if isinstance(next(iter(sizes)), tuple):
        size += r" --depth-scale (\S+)"
    assert found(target, size) == sizes
    if sparsities:
        sparsities = sparsities if isinstance(sparsities, set) else set(sparsities.split())
        assert found(target, r"--sparsity (\S+)") == sparsities


def test_games_are_the_26_of_atari_100k():
    with open(ANALYSIS / "atari26_scores.csv") as file:
        games = {row["game"] for row in csv.DictReader(file)}
    assert len(games) == 26 and found("fig18", r"--env-id ALE/(\w+)-v5 ") == games
    assert found("fig18", r"--env-id ALE/(\w+)-v5 ", "cpu") == {"Boxing", "Pong"}


def test_large_dense_networks_are_reset_every_200000_env_steps():
    for scale, interval in (("paper", "200000"), ("cpu", "20000"), ("smoke", "500")):
        lines = commands("fig6", scale)
        reset = [line for line in lines if "--reset-interval" in line]
        assert 2 * len(reset) == len(lines)
        assert found("fig6", r"--reset-interval (\d+)", scale) == {interval}


def test_scales_shorten_what_they_say():
    for target, words in {
        "fig3": "--total-timesteps 100000 --batch-size 128 --learning-starts 5000"
        " --eval-interval 5000 --eval-episodes 5 --final-eval-episodes 20"
        " --diagnostics-interval 2000",
        "fig10": "--total-timesteps 100000 --batch-size 32 --std-decay 50000 --buffer-size 50000"
        " --eval-episodes 3",
        "fig12": "--total-timesteps 500000 --final-eval-episodes 20",
        "fig18": "--total-timesteps 40000 --eval-interval 20000 --eval-episodes 3"
        " --final-eval-episodes 10",
    }.items():
        assert all(f" {words} --seed" in line for line in commands(target, "cpu"))
        assert not found(target, r"(--total-timesteps|--batch-size|--buffer-size)")  # at paper
    assert found("fig3", r"--width-scale (\S+)", "cpu") == {"0.125", "0.625"}
    assert found("fig3", r"--env-id (\S+)", "cpu") == {
        "dm_control/cheetah-run-v0",
        "dm_control/walker-run-v0",
    }
    for scale in ("cpu", "paper"):
        seeds = {"cpu": "123", "paper": "12345678"}[scale]
        assert found("fig7", r"--seed (\d+)", scale) == set(seeds)
        assert found("fig13", r"--seed (\d+)", scale) == set(seeds[:5])


# Beside the paper: runs at scale paper, (width, sparsity) pairs, what else differs
EXTRAS = {
    "extra-equal": (2 * 2 * 4 * 8, "1:0 2:0 5:0.96 5:0.84", ""),
    "extra-uniform": (2 * 4 * 8, "5:0.5 5:0.9", "--sparsity-distribution uniform"),
    "extra-actor-critic": (2 * 4 * 8, "5:0 5:0.9", "--actor-sparsity 0.9|--critic-sparsity 0.9"),
    "extra-dense-active": (
        2 * 6 * 8,
        "5:0.5 5:0.8 5:0.9 3.531:0 2.234:0 1.578:0",
        "",
    ),
    "extra-sparse-init": (2 * 8 * 5, "1:0 1:0.9 4:0 4:0.9", "--init lecun|--init sparse_init"),
    "extra-replay": (6 * 5, "1:0 4:0 4:0.8", "--buffer-size 100000"),
    "extra-dynamic": (
        2 * 2 * 5 * 8,
        "1:0.9 5:0.9 0.3125:0 1.578:0",
        "--topology set|--topology rigl|--topology magnitude",
    ),
    "extra-constant-active": (
        2 * 8 * 8,
        "0.5:0 1:0 2:0 1:0.75 2:0.9375 4:0.9844 2:0.75 4:0.9375",
        "",
    ),
}


@pytest.mark.parametrize("target", EXTRAS)
def test_what_is_run_beside_the_paper(target):
    count, networks, others = EXTRAS[target]
    lines = commands(target)
    assert len(set(lines)) == len(lines) == count
    pairs = {re.search(r"--width-scale (\S+).*? --sparsity (\S+)", line).groups() for line in lines}
    assert pairs == {tuple(network.split(":")) for network in networks.split()}
    for flag in filter(None, others.split("|")):
        having = [line for line in lines if f"{flag} " in line]
        assert 0 < len(having) < count


@pytest.mark.parametrize("scale", ["cpu", "smoke"])
def test_runs_of_several_targets_have_one_length(scale):
    """The length is not in the name of a run's folder."""
    targets = ["fig1", "fig2", "fig3", *(target for target in EXTRAS if "stream" not in target)]
    lines = {
        re.sub(r"--seed \d+", "--seed 1", line)
        for target in targets
        for line in commands(target, scale)
    }
    runs = [plan.parse_command(line) for line in lines]
    assert len({run.folder for run in runs}) == len(lines) > 20


def test_extra_runs_are_no_part_of_all():
    every = set(commands("all"))
    for target in EXTRAS:
        assert not set(commands(target)) <= every
    small = [line for line in commands("extra-replay", "smoke") if "--buffer-size 50" in line]
    assert small and all(
        line.index("--buffer-size 100 ") < line.index("--buffer-size 50 ") for line in small
    )


def test_pairs_have_as_many_active_weights():
    anchors = {width: weights(width, 1) for width in (0.5, 1, 2, 4, 5, 3.531, 2.234, 1.578, 0.3125)}
    assert anchors[0.3125] == pytest.approx(0.1 * anchors[1], rel=0.015)
    for dense, *wider in ((0.5, 1, 2, 4), (1, 2, 4)):
        for width in wider:
            active = (dense / width) ** 2 * anchors[width]
            assert 0.94 * anchors[dense] < active < anchors[dense]
    for width, sparsity in ((1, 0.96), (2, 0.84), (3.531, 0.5), (2.234, 0.8), (1.578, 0.9)):
        assert anchors[width] == pytest.approx((1 - sparsity) * anchors[5], rel=0.015)


def test_a_run_alone_has_all_cores():
    cores = int(succeed(call("env", "-u", "OMP_NUM_THREADS", "-u", "OMP_THREAD_LIMIT", "nproc")))
    for jobs, threads in ((1, cores), (cores, 1), (1000, 1)):
        lines = commands("fig9", "smoke", "--jobs", str(jobs))
        assert all(line.endswith(f" --threads {threads}") for line in lines)
