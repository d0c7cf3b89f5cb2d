"""benchmark.sh: every target's commands against the paper, bad input, runs that fail."""

import os
import re
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest
import sac_simba_sparse as sac
import torch
from analysis import plan
from conftest import (
    FIGURES,
    ROOT,
    Ended,
    call,
    check_error,
    count_weights,
    environment,
    succeed,
    write_run,
)


def benchmark(*arguments: str, **more: str) -> Ended:
    return call(ROOT / "benchmark.sh", *arguments, env=environment(**more), timeout=1800)


@cache
def commands(target: str, scale: str = "paper", *more: str) -> tuple[str, ...]:
    out = succeed(benchmark(target, "--scale", scale, "--runner", "dry-run", *more))
    return tuple(out.splitlines())


def values(target: str, flag: str, scale: str = "paper") -> set[str]:
    return {re.search(f"{flag} (\\S+)", line)[1] for line in commands(target, scale)}


def without_seed(lines: tuple[str, ...]) -> list[str]:
    return sorted({re.sub(r"--seed \d+ ", "", line) for line in lines})


# By hand from the paper: algorithms x tasks x networks x seeds
COUNTS = {
    "fig1": 2 * 4 * (8 + 5) * 8,  # six widths and two wide and deep networks dense, five sparse
    "fig2": 2 * 6 * (9 + 7 - 1) * 8,  # Figures 15 and 16 share width 2, depth 1
    "fig3": 2 * 4 * 2 * 10 * 8,
    "fig4": 1 * 1 * 2 * 10 * 8,
    "fig5": 2 * 2 * 3 * 8,
    "fig6": 1 * 2 * 4 * 8,
    "fig7": 1 * 1 * 3 * 8,
    "fig8": 2 * 4 * 10 * 8,
    "fig9": 2,
    "fig10": 2 * 9 * 5,
    "fig11": 1 * 3 * 5,
    "fig12": 2 * 4 * 4 * 5,
    "fig13": 2 * 3 * 5,
    "fig15": 2 * 6 * (6 + 3) * 8,
    "fig16": 2 * 6 * (4 + 3) * 8,
    "fig18": 26 * 4 * 5,
}


@pytest.mark.parametrize("target", COUNTS)
def test_counts(target):
    lines = commands(target)
    assert len(lines) == len(set(lines)) == COUNTS[target]
    assert f"{target}: {COUNTS[target]} runs\n" in listing()


@cache
def listing() -> str:
    return succeed(benchmark("list", "--scale", "paper"))


def test_shared_runs_are_made_once():
    own = {figure: set(commands(figure)) for figure in FIGURES}
    assert (
        own["fig1"] == own["fig14"]
        and own["fig12"] == own["fig17"]
        and own["fig2"] == own["fig15"] | own["fig16"]
    )
    assert own["fig4"] | own["fig5"] | own["fig7"] | own["fig8"] | own["fig9"] <= own["fig3"]
    assert own["fig11"] < own["fig10"]
    every = commands("all")
    assert len(every) == len(set(every)) and set(every) == set.union(*own.values())


def test_the_sweeps_are_the_papers():
    hard = {
        f"dm_control/{task}-v0"
        for task in [
            "dog-run",
            "dog-trot",
            "dog-walk",
            "humanoid-run",
            "humanoid-stand",
            "humanoid-walk",
        ]
    }
    assert values("fig2", "--env-id") == hard
    assert values("fig2", "--width-scale") == {"0.5", "1", "2", "3", "4", "5"}
    assert values("fig2", "--depth-scale") == {"1", "2", "3", "4"}
    assert values("fig15", "--sparsity") == {"0", "0.5556", "0.75", "0.84"}
    assert values("fig16", "--sparsity") == {"0", "0.5", "0.6667", "0.75"} and values(
        "fig16", "--width-scale"
    ) == {"2"}
    assert values("fig3", "--sparsity") == {"0"} | {f"0.{digit}" for digit in range(1, 10)}
    assert values("fig3", "--width-scale") == {"1", "5"} and values("fig3", "--seed") == set(
        "12345678"
    )
    assert values("fig12", "--env-id") == values("fig13", "--env-id") == {"Ant-v4", "Walker2d-v4"}
    assert values("fig18", "--width-scale") == {"1", "3"} and values("fig18", "--sparsity") == {
        "0",
        "0.4",
        "0.8",
    }
    assert (
        values("fig7", "--env-id") == values("fig4", "--env-id") == {"dm_control/humanoid-run-v0"}
    )


def layer_tables(agent: sac.Agent) -> list[dict]:
    return sac.layer_table(agent.actor) + sac.layer_table(agent.critic)


def weights(width: float, depth: int) -> int:
    with torch.device("meta"):
        agent = sac.Agent(
            sac.Args(width_scale=width, depth_scale=depth), 67, 21, torch.device("meta")
        )
    return count_weights(layer_tables(agent))[0]


def test_sparse_networks_have_as_many_active_weights_as_the_dense_one_of_width_2():
    anchor, found = weights(2, 1), set()
    for line in commands("fig1") + commands("fig2"):
        width, depth, sparsity = re.search(
            r"--width-scale (\S+) --depth-scale (\S+) --sparsity (\S+)", line
        ).groups()
        if float(sparsity):
            found.add((float(width), int(depth), float(sparsity)))
    assert len(found) == 3 + 3 + 2
    for width, depth, sparsity in found:
        assert weights(width, depth) * (1 - sparsity) == pytest.approx(anchor, rel=0.01)


@pytest.mark.parametrize("scale", ["paper", "cpu", "smoke"])
def test_every_command_is_one_that_its_agent_takes(scale):
    lines = without_seed(commands("all", scale))
    runs = [
        plan.parse_command(line.replace(" --runs-dir", " --seed 1 --runs-dir")) for line in lines
    ]
    for run in runs:
        sys.modules[run.agent].check_flags(run.flags)
        assert run.flags.runs_dir == f"runs/{scale}" and run.flags.threads >= 1
    assert len({run.folder for run in runs}) == len(runs) > 50  # no two commands share a folder
    assert len({run.agent for run in runs}) == 5


@pytest.mark.parametrize("scale", ["cpu", "smoke"])
def test_small_networks_can_be_as_sparse(scale):
    sizes = {
        re.search(r"(--width-scale .*?--sparsity \S+)", line)[1] for line in commands("fig2", scale)
    }
    sizes |= {
        re.search(r"(--width-scale .*?--sparsity \S+)", line)[1] for line in commands("fig3", scale)
    }
    for size in sizes:
        _, width, _, depth, _, sparsity = size.split()
        args = sac.Args(width_scale=float(width), depth_scale=int(depth), sparsity=float(sparsity))
        agent = sac.Agent(args, 17, 6, torch.device("cpu"))
        total, active = count_weights(layer_tables(agent))
        assert active / total == pytest.approx(1 - float(sparsity), abs=0.01)


def test_flags_of_the_command_line():
    lines = commands("fig9", "smoke", "--seeds", "3", "--jobs", "1")
    # Figure 9 shows one run each
    assert len(lines) == 2 and all("--seed 1 " in line for line in lines)
    assert len(commands("fig7", "smoke", "--seeds", "3")) == 9
    where = {"RUNS": "/tmp/there", "THREADS": "7"}
    out = succeed(benchmark("fig9", "--runner", "dry-run", FLAGS="--device cuda", **where))
    end = "--runs-dir /tmp/there --threads 7 --device cuda"
    assert all(line.endswith(end) for line in out.splitlines())
    # A stream knows no CUDA
    out = succeed(benchmark("fig13", "--runner", "dry-run", FLAGS="--device  cuda --track"))
    assert out.count("\n") == 18 and all(line.endswith("--track") for line in out.splitlines())
    assert "cuda" not in out


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["fig19"], "no target 'fig19' list"),
        (["fig"], "no target 'fig'"),
        (["plot"], "no target ''"),
        (["fig1", "--scale", "large"], "--scale large paper, cpu or smoke"),
        (["fig1", "--runner", "ssh"], "--runner ssh local, slurm or dry-run"),
        (["fig1", "--jobs", "0"], "--jobs 0 above 0"),
        (["fig1", "--jobs", "two"], "--jobs two above 0"),
        (["fig1", "--seeds", "-1"], "--seeds -1 above 0"),
        (["fig1", "--seeds"], "--seeds"),
        (["fig1", "--dry-run"], "--dry-run"),
        (["fig1", "--gpus", "1"], "--gpus unknown"),
        (["fig1", "fig2"], "fig1 fig2 one target"),
        (["plot", "list"], "no target 'list' plot"),
        (["plot", "fig13", "--runner", "dry-run"], "--runner"),
        (["list", "--jobs", "2"], "--jobs"),
        (["table1", "--runner", "dry-run"], "--runner dry-run table"),
        (["fig1", "--seeds", "9" * 20], "--seeds 99999999999999999999 at most"),
        (["fig1", "--seeds="], "--seeds"),
        (["fig1", "--jobs", "nan"], "--jobs nan"),
    ],
)
def test_nonsense(arguments, words):
    ended = benchmark(*arguments, RUNS="/nonexistent/runs", RESULTS="/nonexistent/results")
    assert ended[1] == ""
    check_error(ended, *words.split())


@pytest.mark.parametrize(
    "environment,words",
    [
        ({"FLAGS": "--eval-interval 0"}, "--eval-interval 0"),
        ({"FLAGS": "; touch {}/p"}, "; touch"),
        ({"FLAGS": "--env-id \x01"}, "FLAGS"),
        ({"FLAGS": "--seed=5"}, "--seed FLAGS"),
        ({"FLAGS": "--tau 0.01 --exp-name v2"}, "--exp-name FLAGS RUNS"),
        ({"FLAGS": "--exp_name=v2"}, "--exp-name FLAGS RUNS"),
        ({"RUNS": "a b"}, "RUNS spaces"),
        ({"RUNS": "a\nb"}, "RUNS spaces"),
        ({"RUNS": os.fsdecode(b"/x/\xff")}, "RUNS UTF-8"),
        ({"RUNS": "/dev/null"}, "/dev/null RUNS"),
        ({"RESULTS": "/dev/null/x"}, "/dev/null/x RESULTS"),
        ({"THREADS": "0"}, "THREADS 0"),
        ({"THREADS": "1;touch {}/p"}, "THREADS"),
        ({"MAX_ARRAY": "-1"}, "MAX_ARRAY -1"),
        ({"ONLY": "("}, "ONLY='(' regular"),
        ({"ONLY": "--width-scale 77 "}, "ONLY matches no run fig7"),
    ],
)
def test_nonsense_in_the_environment(tmp_path, environment, words):
    where = {"RUNS": str(tmp_path / "runs"), "RESULTS": str(tmp_path / "results")}
    environment = {name: value.format(tmp_path) for name, value in environment.items()}
    ended = benchmark("fig7", "--scale", "smoke", "--seeds", "2", **where | environment)
    assert ended[1] == ""
    check_error(ended, *words.split())
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("action", ["status", "plot"])
def test_a_seed_among_the_flags_is_refused_by_every_action(tmp_path, action):
    """With a target of one seed too, where no two runs would be the same."""
    where = {"RUNS": str(tmp_path / "runs"), "RESULTS": str(tmp_path / "results")}
    ended = benchmark(action, "fig9", "--scale", "smoke", FLAGS="--seed 3", **where)
    check_error(ended, "FLAGS", "--seed")


@pytest.mark.parametrize("arguments", [(), ("--help",), ("fig13", "--help"), ("plot", "-h")])
def test_help(arguments):
    code, out, err = benchmark(*arguments)
    assert (code, err) == (0, "") and out.startswith("usage: ")


def test_only_some_runs():
    only = "--width-scale 0.625 .*--sparsity 0.9 .*--seed [12] "
    every = commands("fig3", "smoke", "--seeds", "3")
    chosen = succeed(benchmark("--scale=smoke", "fig3", "--seeds=3", "--runner=dry-run", ONLY=only))
    assert chosen.splitlines() == [line for line in every if re.search(only, line)]
    assert chosen.count("\n") == 4
    counts = succeed(benchmark("list", "--scale", "smoke", ONLY=only))
    assert "fig7: 1 runs\n" in counts and "fig10: 0 runs\n" in counts


ODD = "/x/r'$(touch${IFS}PLACE/p)`touch${IFS}PLACE/p`;*\"\\%j🙂"


def test_names_are_names_and_not_commands(tmp_path):
    """A folder's name that a shell would run goes through the plan, a job script and a run."""
    odd = str(tmp_path) + ODD.replace("PLACE", str(tmp_path))
    where = {"RUNS": odd, "RESULTS": str(tmp_path / "results"), "LC_ALL": "C", "THREADS": "1"}
    (tmp_path / "sbatch").write_text("""#!/bin/sh
echo "$SBATCH_OUTPUT"
sed -i 's/eval/eval echo/' "$1" && SLURM_ARRAY_TASK_ID=1 bash "$1"
""")
    (tmp_path / "python").write_text(f"""#!/bin/sh
case $1 in sparse_zoo/analysis/* | -c) exec {sys.executable} "$@" ;; esac
printf '%s\\n' "$@" && exit 2
""")
    for name in ("sbatch", "python"):
        (tmp_path / name).chmod(0o755)
    where |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python"}
    arguments = ("fig13", "--scale", "smoke", "--runner")
    lines = succeed(benchmark(*arguments, "dry-run", **where)).splitlines()
    assert {plan.parse_command(line).flags.runs_dir for line in lines} == {odd}
    sent = succeed(benchmark(*arguments, "slurm", **where, ONLY="sparse_init", MAX_ARRAY="1"))
    output, command = sent.splitlines()[:2]
    assert output.startswith(odd.replace("%", "%%")) and output.endswith(".%a.log")
    assert f"--runs-dir {odd} " in command
    code, _, err = benchmark(*arguments, "local", **where, ONLY="sparse_init")
    assert code == 1 and f"{odd}/logs/" in err, err
    (log,) = Path(odd, "logs").glob("*.log")
    assert f"\n--runs-dir\n{odd}\n" in log.read_text()
    assert not (tmp_path / "p").exists() and not list(ROOT.glob("p"))


def test_slurm_gets_the_runs_that_are_not_finished(tmp_path):
    """A stand-in for sbatch echoes each task's commands; the real one: test_benchmark_runs.py."""
    where = {"RUNS": str(tmp_path / "runs"), "RESULTS": str(tmp_path / "results"), "MAX_ARRAY": "4"}
    (tmp_path / "sbatch").write_text("""#!/bin/sh
grep '^#SBATCH' "$1"
for SLURM_ARRAY_TASK_ID in 1 2 3 4; do
  echo "task $SLURM_ARRAY_TASK_ID"
  export SLURM_ARRAY_TASK_ID
  sed 's/eval/eval echo/' "$1" | bash
done
""")
    (tmp_path / "sbatch").chmod(0o755)
    where["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    arguments = ("fig7", "--scale", "smoke", "--seeds", "3")
    dry_run = benchmark(*arguments, "--runner", "dry-run", THREADS="1", **where)
    every = succeed(dry_run).splitlines()
    first = plan.parse_command(every[0])
    write_run(first.folder, vars(first.flags), [(1000, "final/return_mean", 1.0)])
    code, out, err = benchmark(*arguments, "--runner", "slurm", "--jobs", "3", **where)
    assert code == 0 and err.startswith("9 runs, 1 of them finished; "), err
    assert "--array=1-4%3 --cpus-per-task=1" in out
    tasks = re.split(r"^task \d\n", out.partition("\nwhen it has ended")[0], flags=re.M)[1:]
    dealt = [task.splitlines() for task in tasks]
    assert dealt == [every[number::4] for number in (1, 2, 3, 4)]

    # A task whose list is gone has failed, and says so
    (commands,) = (tmp_path / "runs" / "slurm").glob("*.txt")
    commands.unlink()
    code, _, err = call("bash", commands.with_suffix(""), env=environment(SLURM_ARRAY_TASK_ID="1"))
    assert code == 2 and commands.name in err, err


def test_a_script_that_slurm_has_copied_elsewhere(tmp_path):
    script = shutil.copy(ROOT / "benchmark.sh", tmp_path / "slurm_script")
    check_error(call("bash", script, "list"), "sbatch --wrap")
    assert not (tmp_path / "runs").exists()


def test_status_has_a_line_for_each_run(tmp_path):
    where = {"RUNS": str(tmp_path / "runs"), "THREADS": "1"}
    flags = ("fig13", "--scale", "smoke")
    *commands, last = succeed(benchmark(*flags, "--runner", "dry-run", **where)).splitlines()
    run = plan.parse_command(last)
    write_run(run.folder, vars(run.flags), [(2000, "final/return_mean", 1.0)])
    states = succeed(benchmark("status", *flags, **where)).splitlines()
    folders = [plan.parse_command(command).folder for command in commands]
    assert states == [
        *(f"absent: {folder}" for folder in folders),
        f"finished: {run.folder}",
        "1 of 3 runs are finished",
    ]


def test_python_without_the_packages():
    ended = benchmark("fig9", PYTHON="/nonexistent/python")
    check_error(ended, "activate", "the virtual environment")


def test_failed_runs_are_named_with_their_logs(tmp_path):
    where = {"RUNS": str(tmp_path / "runs"), "RESULTS": str(tmp_path / "results")}
    flags = ("--scale", "smoke", "--jobs", "2")
    code, out, err = benchmark("fig9", *flags, FLAGS="--env-id nowhere-v0", **where)
    assert code == 1 and "these runs are not finished" in err and "nothing to draw" in err
    logs = set(re.findall(r"^(\S+\.log): ", err, flags=re.M))
    assert logs == set(re.findall(r"exit code 2, see (\S+\.log): ", out)) and len(logs) == 2
    assert all("nowhere" in Path(log).read_text() for log in logs)


def test_runs_whose_process_was_killed_are_named(tmp_path):
    """A SIGKILL (as for want of memory) of what starts a run: xargs starts no more of them."""
    (tmp_path / "python").write_text(f"""#!/bin/sh
case $1 in sparse_zoo/analysis/* | -c) exec {sys.executable} "$@" ;; esac
kill -9 $PPID
""")
    (tmp_path / "python").chmod(0o755)
    where = {"RUNS": str(tmp_path / "runs"), "RESULTS": str(tmp_path / "results")}
    where |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python"}
    code, _, err = benchmark("fig13", "--scale", "smoke", "--jobs", "1", **where)
    assert code == 1 and "these runs are not finished" in err, err
    assert len(re.findall(r"^\S+\.log: ", err, flags=re.M)) == 1
    assert len(re.findall("^not started: ", err, flags=re.M)) == 2


@pytest.mark.slow
def test_runs_that_fail_behind_their_results(tmp_path):
    """As when the disk has no room for the last checkpoint."""
    (tmp_path / "python").write_text(f"""#!/bin/sh
case $1 in sparse_zoo/analysis/* | -c) exec {sys.executable} "$@" ;; esac
{sys.executable} "$@" && exit 2
""")
    (tmp_path / "python").chmod(0o755)
    where = {"RUNS": str(tmp_path / "runs"), "RESULTS": str(tmp_path / "results")}
    where |= {"PYTHON": str(tmp_path / "python"), "ONLY": "sparse_init"}
    short = "--total-timesteps 300 --eval-episodes 1 --final-eval-episodes 1 --max-episode-steps 20"
    code, out, err = benchmark("fig13", "--scale", "smoke", **where, FLAGS=short)
    assert code == 1 and "all runs have their results, but some ended with an error" in err, err
    assert "failed with exit code 2, see " in out


def test_help_says_what_scales_and_runners_mean():
    out = succeed(benchmark("--help"))
    assert succeed(benchmark()) == succeed(benchmark("all", "-h")) == out
    for word in ("cpu", "paper", "smoke", "local", "slurm", "dry-run", "--seeds N", "core hours"):
        assert word in out
    assert f"fig3: {len(commands('fig3', 'cpu'))} runs" in out
    assert f"fig3: {len(commands('fig3', 'paper'))} runs" in out
    assert f"all: {len(commands('all', 'smoke'))} runs" in out


@pytest.mark.parametrize(
    "target", [*FIGURES, "extra-equal", "extra-uniform", "extra-actor-critic", "extra-replay"]
)
def test_help_of_a_target(target):
    usage, last = succeed(benchmark(target, "--help", "--scale", "cpu")).split("\n\n" + target)
    what, runs = last.removeprefix(": ").rstrip().rsplit("; ", 1)
    assert len(what) > 10 and usage.startswith("usage: ")
    assert runs == f"{len(commands(target, 'cpu'))} runs at --scale cpu"


def test_help_of_a_table_and_of_no_target():
    assert "\n\ntable2: " in succeed(benchmark("table2", "--help"))
    assert succeed(benchmark("fig99", "--help")) == succeed(benchmark("--help"))


def test_a_value_behind_an_equals_sign():
    assert succeed(benchmark("fig13", "--scale=smoke", "--runner=dry-run", "--seeds=2")) == succeed(
        benchmark("fig13", "--scale", "smoke", "--runner", "dry-run", "--seeds", "2")
    )


def test_it_is_written_for_the_bash_of_macos():
    """Version 3.2: no words of bash 4, no bare parenthesis behind =~, no empty regular expression.

    An empty one matches nothing on BSD systems.
    """
    text = (ROOT / "benchmark.sh").read_text()
    newer = r"mapfile|readarray|coproc|wait -n|(declare|local) -[An]|&>>|\|&|\$\{\w+(,,|\^\^|@)"
    assert not re.search(newer, text)
    assert not re.search(r"=~ [^$\s]*\(", text)
    assert "only=${ONLY:-.}" in text and 'only=""' not in text
