"""check_gpu.py and what it is made of, as far as a CPU can show it."""

import importlib.util
import json
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import bench_loop
import bench_memory
import bench_update
import check_gpu
import devices
import pandas as pd
import pytest
import sac_simba_sparse as sac
import torch
from conftest import BENCH, CPU, Process, check_error, succeed


def test_a_dry_run_of_some_parts(main, tmp_path):
    parts = ["versions", "graph", "waits", "updates", "precision", "pixels", "profiles"]
    what = ("--cpu-dry-run", "--output", tmp_path / "out", "--parts", *parts)
    check_numbers(succeed(main(BENCH / "check_gpu.py", *what)), tmp_path / "out", parts, exact=6)


@pytest.mark.slow
def test_the_dry_run_measures_every_part(tmp_path):
    out = succeed(Process(BENCH / "check_gpu.py", "--cpu-dry-run", "--output", tmp_path).finish())
    numbers = check_numbers(out, tmp_path, check_gpu.PARTS, exact=7)
    speeds = numbers[numbers.unit == "env steps per second"].value.astype(float)
    assert len(speeds) == 2 and (speeds > 0).all()
    sides = pd.read_csv(tmp_path / "gpu_update_costs.csv").side
    assert "masked twin, compiled" in set(sides)


def check_numbers(out: str, folder: Path, parts: Iterable[str], exact: int) -> pd.DataFrame:
    """Each part measured something, nothing failed, and all that should be equal is."""
    numbers = pd.read_csv(folder / "numbers.csv")
    assert list(dict.fromkeys(numbers.part)) == list(parts)
    assert (folder / "failures.txt").read_text() == ""
    assert not numbers.what.isin(["FAILED", "left out for time"]).any()
    compared = numbers[numbers.what.str.contains("bit for bit")]
    assert len(compared) == exact and set(compared.value) == {"equal"}
    table = pd.read_csv(folder / "gpu_update_costs.csv")
    assert {"ours", "ours, no graph", "masked twin", "dense"} <= set(table.side)
    assert (table.ms > 0).all()
    assert (folder / "gpu_update_costs.png").stat().st_size > 1000
    assert out.splitlines()[-1] == f"these numbers are in {folder}"
    return numbers


def test_a_part_that_fails_stops_no_other(tmp_path, monkeypatch, capsys):
    def broken(check):
        raise RuntimeError("no kernel image")

    def whole(check):
        check.note("answer", 42)

    monkeypatch.setattr(check_gpu, "PARTS", {"broken": broken, "whole": whole})
    args = check_gpu.Args(output=str(tmp_path), cpu_dry_run=True)
    with pytest.raises(SystemExit) as end:
        check_gpu.main(args)
    assert end.value.code == 1
    assert "RuntimeError: no kernel image" in (tmp_path / "failures.txt").read_text()
    numbers = pd.read_csv(tmp_path / "numbers.csv")
    assert list(numbers.value[numbers.what == "answer"]) == ["42"]
    assert "no kernel image" in capsys.readouterr().out


@pytest.mark.parametrize("code", [1, "interrupted"])
def test_ctrl_c_in_a_part_ends_the_check(tmp_path, monkeypatch, code):
    def interrupted(check):
        sys.exit(code)

    def later(check):
        raise AssertionError

    monkeypatch.setattr(check_gpu, "PARTS", {"interrupted": interrupted, "later": later})
    with pytest.raises(SystemExit) as end:
        check_gpu.main(check_gpu.Args(output=str(tmp_path), cpu_dry_run=True))
    assert end.value.code == code


def test_no_part_begins_after_its_time(tmp_path, monkeypatch, capsys):
    begun = []
    monkeypatch.setattr(check_gpu, "PARTS", {"late": begun.append})
    check_gpu.main(check_gpu.Args(output=str(tmp_path), seconds=0, cpu_dry_run=True))
    assert begun == []
    assert "late: left out for time" in capsys.readouterr().out


@pytest.mark.parametrize(
    "tool,flags",
    [
        ("check_gpu.py", "--parts nothing"),
        ("check_gpu.py", "--seconds 0"),
        ("bench_loop.py", "--decisions 0"),
        ("bench_loop.py", "--env-id Nowhere-v0"),
        ("bench_update.py", "--reference jax --agent ddpg"),
    ],
)
def test_bad_input(main, tool, flags):
    check_error(main(BENCH / tool, *flags.split()), flags.split()[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
@pytest.mark.parametrize("tool", ["check_gpu.py", "bench_update.py", "bench_loop.py"])
def test_without_cuda(main, tool):
    flags = [] if tool == "check_gpu.py" else ["--device", "cuda"]
    check_error(main(BENCH / tool, *flags), "there is no CUDA here")


def test_operations_that_start_work():
    """A view starts none; a copy within a device is no copy between devices."""
    x = torch.ones(4, 4)
    counted = devices.count(lambda: x.t().t().view(-1).add(1).copy_(torch.empty(16)))
    assert dict(counted.operations) == {"add": 1, "copy_": 1}
    assert counted.launches == 2 and counted.copies == 0
    counted = devices.count(lambda: torch.empty(16, device="meta").copy_(x.view(-1)))
    assert (counted.copies, counted.copied_bytes) == (1, 64)


def test_the_figure_has_a_line_for_each_side_and_sparsity():
    cases = [(s, side) for s in bench_update.GPU_SPARSITIES for side in bench_update.sides_of(s)]
    table = pd.DataFrame(
        {"width_scale": width, "sparsity": s, "side": side, "ms": 1 + s, "peak_mib": width}
        for width in (1.0, 4.0)
        for s, side in cases
    )
    axes = bench_update.draw_gpu(table).axes
    assert [len(ax.lines) for ax in axes] == [len(cases), len(cases)] == [8, 8]
    assert list(axes[0].lines[-1].get_ydata()) == [1.95, 1.95]
    assert list(axes[1].lines[0].get_ydata()) == [1.0, 4.0]
    without_memory = bench_update.draw_gpu(table.assign(peak_mib=float("nan"))).axes
    assert [len(ax.lines) for ax in without_memory] == [8, 0]


def test_every_side_has_a_line_of_its_own():
    sides = [*bench_update.SIDES, *bench_update.JAX_SIDES]
    columns = {"width_scale": 1.0, "sparsity": 0.9, "ms": 1.0, "peak_mib": 1.0}
    lines = bench_update.draw_gpu(pd.DataFrame({"side": sides}).assign(**columns)).axes[0].lines
    assert len({str(line._dash_pattern) for line in lines}) == len(sides) == 8


def test_launches_of_an_update():
    args = bench_update.Args(width_scale=0.125, sparsity=0.9, batch_size=8, threads=1)
    counts = bench_update.count_launches(args)
    assert counts["dense"] < counts["ours"] < counts["masked dense twin"] < 300


def test_waits_are_found_where_they_are(monkeypatch):
    """PyTorch's warnings of them, and no others."""
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waiting():
        assert modes == ["warn"]
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    (place,) = devices.find_waits(waiting)
    assert re.fullmatch(r"test_check_gpu\.py:\d+", place)
    assert modes == ["warn", "default"]


def test_a_profile_without_a_gpu_has_no_kernels():
    found = devices.profile_gpu(lambda: torch.ones(3) + 1, CPU)
    assert found == {"launches": 0, "kernels": 0, "gpu_ms": 0}


def test_what_differs_is_found():
    x = {"a": torch.tensor([0.0, float("nan")]), "b": torch.ones(2)}
    assert devices.differing(x, {name: value.clone() for name, value in x.items()}) == []
    assert devices.differing(x, {**x, "a": torch.tensor([-0.0, float("nan")])}) == ["a"]
    assert devices.differing(x, {"a": x["a"], "c": x["b"]}) == ["b", "c"]
    assert check_gpu.parts_that_differ({"n": [1, x["b"]]}, {"n": [1, x["b"] + 1e-7]}) == ["n"]
    assert check_gpu.parts_that_differ({"n": [1, x["b"]]}, {"n": [1, x["b"].clone()]}) == []


def test_the_stopwatch_gives_time_to_the_inner_part():
    moments = iter([0, 1, 3, 6, 10, 15])
    watch = bench_loop.Stopwatch(moments.__next__)
    inner = watch.timed("learn", lambda: None)
    outer = watch.timed("act", inner)
    outer()
    watch.count()
    assert watch.spent == {"rest": 1 + 5, "act": 2 + 4, "learn": 3}


def test_a_loop_is_timed_from_the_first_decision_to_the_last(monkeypatch):
    """By a clock that goes on by one at each look: every part is looked at."""
    seconds = iter(range(10**9))
    monkeypatch.setattr(bench_loop.time, "process_time", seconds.__next__)
    size = {"env_id": "Pendulum-v1", "width_scale": 0.125, "batch_size": 4}
    args = bench_loop.Args(warm_up=10, decisions=120, **size)
    spent = bench_loop.measure(args)
    # Two looks for act, and in it two for drawing and for updating
    assert spent["learn"] == 2 * args.decisions
    assert spent["act"] == 3 * args.decisions
    assert spent["env"] == args.decisions + 1  # an episode ends in between
    assert spent["log"] == 2


@pytest.mark.skipif(not importlib.util.find_spec("jax"), reason="there is no JAX here")
def test_the_update_in_jax_is_ours():
    """Losses and all parameters after an update, from the same networks."""
    import jax.numpy as jnp
    import jax_update

    flags = sac.Args(width_scale=0.125, sparsity=0.0, batch_size=8)
    agent = devices.make_agent(sac, flags, "dense", CPU)
    learner = devices.make_learner(sac, flags, agent, CPU)
    batch = learner.replay.sample(8, learner.norm)
    noises = torch.randn(2, 8, devices.ACTION_DIM)

    def linear(layer):
        return {"kernel": jnp.asarray(layer.weight.detach().numpy().T), "bias": array(layer.bias)}

    def array(x):
        return jnp.asarray(x.detach().numpy().copy())

    def norm(layer):
        return {"scale": array(layer.weight), "shift": array(layer.bias)}

    def simba(encoder, heads):
        first, *blocks, last = encoder
        parts = [{"norm": norm(b.norm), "up": linear(b.up), "down": linear(b.down)} for b in blocks]
        heads = [linear(head) for head in heads]
        return {"first": linear(first), "blocks": parts, "norm": norm(last), "heads": heads}

    def theirs():
        actor = simba(agent.actor.encoder, [agent.actor.mean, agent.actor.log_std])
        critic = simba(agent.critic.encoders[0], agent.critic.heads)
        return jax_update.make_agent(actor, critic)

    arrays = {name: array(column) for name, column in batch._asdict().items()}
    masks = {"actor": None, "critic": None}
    new, metrics = jax_update.learn(theirs(), masks, arrays, *map(array, noises))
    losses = sac.update(agent, batch, *noises, jax_update.GAMMA, jax_update.TAU)
    assert len(metrics) == 14
    for name in ("actor_loss", "critic_loss", "td_target", "entropy"):
        assert float(metrics[name]) == pytest.approx(float(losses[name]), rel=1e-4)
    expected = theirs()
    for network in ("actor", "critic"):
        leaves = [jax_update.jax.tree.leaves(side[network]) for side in (new, expected)]
        for ours, other in zip(*leaves):
            assert float(jnp.abs(ours - other).max()) < 2e-5


def test_numbers_of_jax_are_read(monkeypatch):
    said = {"as published": 2.0, "nothing read": 1.0, "peak_mib": 100.0, "device": "gpu"}

    class Done:
        returncode = 0
        stdout = f"2.0 ms per update\n{json.dumps(said)}\n"
        stderr = ""

    monkeypatch.setattr(bench_update.subprocess, "run", lambda *command, **how: Done)
    rows = bench_update.measure_jax(bench_update.Args(width_scale=1.0))
    assert [(row["side"], row["ms"]) for row in rows] == [
        ("JAX, as published", 2.0),
        ("JAX, nothing read", 1.0),
    ]
    monkeypatch.setattr(Done, "returncode", 2)
    monkeypatch.setattr(Done, "stderr", "error: jax_update.py needs jax and optax\n")
    with pytest.raises(RuntimeError, match="needs jax and optax"):
        bench_update.measure_jax(bench_update.Args())


def test_computed_memory_is_that_of_the_tensors():
    """All but what passes: of an agent with the dense kernel, and its replay."""
    flags = bench_memory.Args(transitions=50)
    found = bench_memory.count_bytes(flags, 0.125, 0.9)
    args = sac.Args(width_scale=0.125, sparsity=0.9, batch_size=8, sparse_kernel="dense")
    agent = devices.make_agent(sac, args, "sparse", CPU)
    learner = devices.make_learner(sac, args, agent, CPU, transitions=50)
    learner.learn()
    parameters = [*agent.actor.parameters(), *agent.critic.parameters()]
    trained = [*parameters, *(p.grad for p in parameters), *agent.target_critic.parameters()]
    for optimizer in (agent.actor_optimizer, agent.critic_optimizer):
        states = optimizer.state.values()
        trained += [x for state in states for x in state.values() if x.dim()]
    layers = [layer for part in (agent.actor, agent.critic) for layer in part.modules()]
    sparse = [layer for layer in layers if isinstance(layer, sac.SparseLinear)]
    assert found["trained"] == count_bytes(trained)
    assert found["dense weights"] == count_bytes(layer.kept.memory for layer in sparse)
    places = [places for layer in sparse for places in (layer.active, layer.index)]
    assert found["places"] == count_bytes(places)
    assert found["replay"] == count_bytes([learner.replay.table])


def count_bytes(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
