"""The other bench_*.py: each runs on small networks and prints what its page quotes.

bench_stream.py needs a clone of the original code.
"""

import re
from subprocess import CompletedProcess

import pandas as pd
import pytest
from conftest import BENCH, ROOT, Process, check_error


def run(tool: str, *flags: str) -> CompletedProcess:
    return Process(BENCH / tool, *flags).finish()


def test_kernels():
    done = run("bench_kernels.py", "--shape", "512", "256", "--batch-size", "16", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    times = dict(re.findall(r"^\| (.+?) +\| ([\d.]+) +\|$", done.stdout, re.M))
    forward = {name.partition(": ")[2] for name in times if name.startswith("forward")}
    assert forward == {"dense", "CSR matrix", "embedding_bag", "packed without blocks", "packed"}
    assert len(times) == 9 and all(0 <= float(ms) < 1000 for ms in times.values())


def test_costs_replace_those_of_the_same_agent_only(tmp_path):
    output = tmp_path / "costs.csv"
    old = pd.read_csv(ROOT / "docs" / "results" / "costs.csv")
    old.to_csv(output, index=False)
    flags = "--agents stream_ac_sparse --seconds 0.05 --output"
    done = run("bench_costs.py", *flags.split(), str(output))
    assert done.returncode == 0, done.stderr
    new = pd.read_csv(output)
    assert set(new.agent) == set(old.agent) and len(new) == len(old) and (new.ms > 0).all()
    same = new[new.agent != "stream_ac_sparse"].reset_index(drop=True)
    assert same.ms.tolist() == pytest.approx(
        old[old.agent != "stream_ac_sparse"].ms.tolist(), rel=1e-3
    )
    assert not new.ms[new.agent == "stream_ac_sparse"].isin(old.ms).all()


@pytest.mark.slow
def test_pixel_agents():
    flags = "--width-scale 0.0625 --sparsity 0.8 --turns 1 --threads 1"
    done = run("bench_der.py", *flags.split())
    assert done.returncode == 0, done.stderr
    names, row = (line.split() for line in done.stdout.splitlines()[-2:])
    assert names[2:8] == ["plain", "encoder", "update", "act", "replay", "env"]
    update, act, replay, env, steps = map(float, row[4:9])
    assert steps == pytest.approx(1000 / (update + act + replay + env), rel=0.01)

    done = run("bench_drqv2.py", "--linear", "--batch-size", "8", *flags.split())
    assert done.returncode == 0, done.stderr
    ours, masked = map(float, re.findall(r"([\d.]+) ms$", done.stdout, re.M))
    assert f"ratio time={ours / masked:.2f}" in done.stdout


@pytest.mark.parametrize(
    "tool,flags",
    [
        ("bench_kernels.py", "--sparsity 2.0"),
        ("bench_costs.py", "--seconds 0.0"),
        ("bench_costs.py", "--agents nobody"),
        ("bench_drqv2.py", "--reference nowhere"),
    ],
)
def test_bad_input(tool, flags):
    done = run(tool, *flags.split())
    check_error(done.returncode, done.stderr)
    assert done.stderr.startswith(f"error: {flags}: ")
