"""The other bench_*.py: each runs on small networks and prints what its page quotes."""

import re
import shlex

import pandas as pd
import pytest
from conftest import BENCH, ROOT, Ended, Process, check_error, succeed


def run(tool: str, *flags: str) -> Ended:
    return Process(BENCH / tool, *flags).finish()


def test_kernels():
    flags = "--shape 512 256 --batch-size 16 --repeats 1"
    out = succeed(run("bench_kernels.py", *flags.split()))
    times = dict(re.findall(r"^\| (.+?) +\| ([\d.]+) +\|$", out, re.M))
    forward = {name.partition(": ")[2] for name in times if name.startswith("forward")}
    assert forward == {"dense", "CSR matrix", "embedding_bag", "packed without blocks", "packed"}
    assert len(times) == 9 and all(0 <= float(ms) < 1000 for ms in times.values())


def test_costs_replace_those_of_the_same_agent_only(tmp_path):
    output = tmp_path / "costs.csv"
    old = pd.read_csv(ROOT / "docs" / "results" / "costs.csv")
    old.to_csv(output, index=False)
    flags = "--agents stream_ac_sparse --seconds 0.05 --output"
    succeed(run("bench_costs.py", *flags.split(), output))
    new = pd.read_csv(output)
    assert set(new.agent) == set(old.agent) and len(new) == len(old) and (new.ms > 0).all()
    same = new[new.agent != "stream_ac_sparse"].reset_index(drop=True)
    assert same.ms.tolist() == pytest.approx(
        old[old.agent != "stream_ac_sparse"].ms.tolist(), rel=1e-3
    )
    assert not new.ms[new.agent == "stream_ac_sparse"].isin(old.ms).all()


@pytest.mark.parametrize("agent", ["sac", "ddpg"])
def test_cost_of_diagnostics(agent):
    flags = f"--agent {agent} --width-scale 0.25 --sparsity 0 0.9 --turns 3"
    out = succeed(run("bench_diagnostics.py", *flags.split()))
    pattern = r"diagnose ([\d.]+) ms, update ([\d.]+) ms, .*: ([\d.]+) %"
    lines = [[float(number) for number in found] for found in re.findall(pattern, out)]
    assert len(lines) == 2
    for diagnose, update, share in lines:
        expected = 100 * diagnose / (diagnose + 10_000 // 2 * 2 * update)
        assert share == pytest.approx(expected, rel=0.1, abs=0.001) and share < 2


def test_cost_of_a_change_of_the_topology():
    flags = "--width-scale 0.125 --sparsity 0.8 --turns 3"
    out = succeed(run("bench_topology.py", *flags.split()))
    pattern = r"^(\w+) width .*: change ([\d.]+) ms, update ([\d.]+) ms, .*: ([\d.]+) %$"
    found = re.findall(pattern, out, re.M)
    assert [topology for topology, *_ in found] == ["set", "rigl", "magnitude"]
    for _, *numbers in found:
        change, update, share = map(float, numbers)
        assert share == pytest.approx(100 * change / (change + 1000 * update), rel=0.1, abs=0.01)


@pytest.mark.slow
def test_pixel_agents():
    flags = "--width-scale 0.0625 --sparsity 0.8 --turns 1 --threads 1"
    out = succeed(run("bench_der.py", *flags.split()))
    names, row = (line.split() for line in out.splitlines()[-2:])
    assert names[2:8] == ["plain", "encoder", "update", "act", "replay", "env"]
    update, act, replay, env, steps = map(float, row[4:9])
    assert steps == pytest.approx(1000 / (update + act + replay + env), rel=0.01)

    out = succeed(run("bench_drqv2.py", "--linear", "--batch-size", "8", *flags.split()))
    ours, masked = map(float, re.findall(r"([\d.]+) ms$", out, re.M))
    assert f"ratio time={ours / masked:.2f}" in out


BAD = {
    "bench_kernels.py": ["--sparsity 2.0", "--shape 0 8", "--repeats 0", "--batch-size -1"],
    "bench_costs.py": ["--seconds 0.0", "--seconds nan", "--agents nobody", "--output /dev/null/x"],
    "bench_der.py": ["--turns 0", "--width-scale 0", "--sparsity 1.0", "--threads -1"],
    "bench_diagnostics.py": ["--turns -1", "--width-scale nan", "--sparsity", "--agent der"],
    "bench_drqv2.py": [
        "--reference nowhere",
        "--reference . --linear",
        "--batch-size 0",
        "--width-scale inf",
    ],
    "bench_stream.py": ["--steps 3", "--sparse-kernel fast", "--reference nowhere"],
    "bench_update.py": ["--turns 0", "--obs-dim 0", "--turn-seconds nan", "--output ''"],
}


@pytest.mark.parametrize("tool,flags", [(tool, flags) for tool in BAD for flags in BAD[tool]])
def test_bad_input(main, tool, flags):
    ended = main(BENCH / tool, *shlex.split(flags))
    check_error(ended, flags.split()[0])
    assert ended[1] == ""
