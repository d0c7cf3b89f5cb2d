"""Agents on another device: every tensor is where it belongs, and the numbers are the CPU's."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import AGENTS, Process, call, load_checkpoint, only_run, read_metrics, succeed
from torch.utils._pytree import tree_flatten

HERE = Path(__file__).parent
COMMON = "--threads 1 --sparsity 0.8 --eval-episodes 1 --final-eval-episodes 1"
PENDULUM = "--env-id Pendulum-v1 --total-timesteps 820 --learning-starts 780 --batch-size 8"
PENDULUM += " --width-scale 0.125 --updates-per-step 1 --eval-interval 820"
PENDULUM += " --diagnostics-interval 400 --checkpoint-interval 800"
CASES = {  # each has one checkpoint on the way, with updates before and after
    "sac_simba_sparse": f"{PENDULUM} --clipped-double-q --reset-interval 790",
    "sac_simba_dynamic": f"{PENDULUM} --topology-interval 8",
    "ddpg_simba_sparse": PENDULUM,
    "drqv2_sparse": "--env-id dm_control/cartpole-balance-v0 --action-repeat 50"
    " --total-timesteps 1300 --learning-starts 800 --batch-size 2 --width-scale 0.0625"
    " --eval-interval 1300 --diagnostics-interval 1300 --checkpoint-interval 1000",
    "der_impala_sparse": "--env-id ALE/Pong-v5 --action-repeat 32 --total-timesteps 1920"
    " --learning-starts 1120 --batch-size 2 --width-scale 0.125 --target-interval 5"
    " --eval-interval 1920 --diagnostics-interval 1920 --checkpoint-interval 1200"
    " --max-episode-steps 1280",
}


@pytest.mark.parametrize(
    "agent",
    # DDPG's learner is SAC's
    [pytest.param(name, marks=pytest.mark.slow) if "ddpg" in name else name for name in CASES],
)
def test_a_run_on_a_device_equals_that_on_the_cpu(agent, tmp_path):
    """Training, evaluation, diagnostics, checkpoints, and going on from one, bit for bit."""
    file = AGENTS / f"{agent}.py"
    flags = f"{COMMON} {CASES[agent]}".split()
    out = succeed(Process(HERE / "simulated_device.py", file, tmp_path, *flags).finish())
    assert "new run" in out and "going on from env step" in out
    metrics, checkpoints = [], []
    for device in ("cpu", "sim"):
        run_dir = only_run(tmp_path / device)
        checkpoint = load_checkpoint(run_dir)
        assert checkpoint.pop("args")["device"] == device
        # Without the length and the digest of metrics.csv, which holds times
        checkpoint["counters"] = checkpoint["counters"][:3]
        checkpoints.append(tree_flatten(checkpoint))
        metrics.append(read_metrics(run_dir))
    assert metrics[0] == metrics[1]
    (expected, structure), (ours, same_structure) = checkpoints
    assert structure == same_structure
    for a, b in zip(expected, ours):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_the_simulated_device_notices_what_cuda_would():
    program = """
import torch
import simulated_device

MISTAKES = [
    lambda x: x + torch.ones(3),
    lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    lambda x: torch.nn.functional.linear(x, torch.ones(2, 3)),
    lambda x: torch.ones(3)[x.long()],
    lambda x: x.numpy(),
]
with simulated_device.SimDevice():
    x = torch.ones(3).to("sim")
    assert (x + torch.tensor(1.0)).device == x[torch.tensor([0, 2])].device == x.device
    assert x.cpu().numpy().sum() == 3
    for mistake in MISTAKES:
        try:
            mistake(x)
        except (RuntimeError, TypeError):
            continue
        raise AssertionError(f"mistake {MISTAKES.index(mistake)} went through")
"""
    succeed(call(sys.executable, "-c", program, cwd=HERE))


def test_a_decision_sends_one_row_and_reads_one_action():
    """With two updates in it; a second row where the updates come after the step."""
    program = f"""
import sys

sys.path.insert(0, {str(AGENTS)!r})
import ddpg_simba_sparse
import numpy as np
import sac_simba_sparse
import torch
import simulated_device

def transition():
    return np.ones(3), np.ones(2), 1.0, np.ones(3), False

def check(module, overlap):
    args = module.Args(width_scale=0.125, sparsity=0.5, batch_size=8)
    device = torch.device("sim")
    parts = module.Agent(args, 3, 2, device)
    norm = module.ObservationNorm(3, device)
    replay = module.ReplayBuffer(100, 3, 2, device)
    learner = module.Learner(parts, norm, replay, args, 0.9, 1.0, device)
    for decision in range(3):
        simulated_device.copies.clear()
        norm.update(np.ones(3))
        if replay.added:
            learner.act(np.ones(3), then_learn=overlap)
        replay.add(*transition())
        if not overlap:
            learner.learn()
    rows = 1 if overlap else 2
    expected = {{"to the device": rows, "to the CPU": 1}}
    assert simulated_device.copies == expected, (module, overlap)

with simulated_device.SimDevice():
    for module in (sac_simba_sparse, ddpg_simba_sparse):
        for overlap in (True, False):
            check(module, overlap)
"""
    succeed(call(sys.executable, "-c", program, cwd=HERE))
