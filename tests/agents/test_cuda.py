"""What only a GPU can show (`python -m pytest -m cuda`), and what a CPU can of the same.

The functions are those of check_gpu.py, whose dry run is a test of its own: here they meet a GPU.
"""

from dataclasses import replace
from itertools import islice

import bench_update
import check_gpu
import ddpg_simba_sparse as ddpg
import devices
import pytest
import sac_simba_sparse as sac
import torch
from conftest import CPU
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda")
BY_AGENT = pytest.mark.parametrize("agent", [sac, ddpg], ids=["sac", "ddpg"])
TOLERANCE = {"highest": 1e-4, "high": 5e-2}  # of losses and gradients, relative


def on_cuda(test):
    """Marks a test that needs a GPU."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")
    return pytest.mark.cuda(skip(test))


@pytest.fixture(autouse=True)
def precision_as_before():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def flags_of(agent, **given):
    return agent.Args(**{"sparsity": 0.9, "sparse_kernel": "dense", "width_scale": 0.25, **given})


# On a GPU


@on_cuda
@BY_AGENT
@pytest.mark.parametrize("width", [0.25, 1.0])
def test_a_graph_equals_the_same_calls_one_by_one(agent, width):
    """Bit for bit, over decisions before and after the graph is captured."""
    flags = flags_of(agent, width_scale=width)
    ours, expected = (
        check_gpu.train_briefly(agent, replace(flags, cuda_graph=graph), CUDA, 12)
        for graph in (True, False)
    )
    assert devices.differing(ours, expected) == []


@on_cuda
@BY_AGENT
@pytest.mark.parametrize("level", TOLERANCE)
def test_a_gpu_computes_what_a_cpu_does(agent, level):
    flags = flags_of(agent)
    expected = check_gpu.one_update(agent, flags, CPU)
    torch.set_float32_matmul_precision(level)
    errors = check_gpu.errors_of(check_gpu.one_update(agent, flags, CUDA), expected)
    assert max(errors.values()) < TOLERANCE[level], errors


@on_cuda
@BY_AGENT
def test_python_waits_for_the_gpu_once_a_decision(agent):
    decision = check_gpu.make_decision(agent, flags_of(agent), CUDA)
    assert len(devices.find_waits(decision)) == 1  # for the action
    assert devices.count(decision).copies == 2  # a row there, an action back


@on_cuda
def test_memory_of_a_wide_sparse_network():
    args = bench_update.Args(
        width_scale=4.0, sparsity=0.9, device="cuda", turns=1, turn_seconds=0.0
    )
    rows = bench_update.measure_sides(args, ("ours", "masked twin"))
    peak = {row["side"]: row["peak_mib"] for row in rows}
    assert peak["ours"] < 0.6 * peak["masked twin"]


@on_cuda
@BY_AGENT
def test_a_run_of_a_cpu_goes_on_on_a_gpu(agent):
    """Its optimisers, too, can then be in a graph."""
    flags = flags_of(agent)
    old = devices.make_agent(agent, flags, "sparse", CPU)
    learner = devices.make_learner(agent, flags, old, CPU)
    for obs in islice(devices.observations(devices.OBS_DIM), 3):
        devices.decide(learner, obs)
    new = devices.make_agent(agent, flags, "sparse", CUDA)
    for name, part in vars(old).items():
        getattr(new, name).load_state_dict(part.state_dict())
    assert devices.differing(devices.tensors(new), devices.tensors(old)) == []
    learner = devices.make_learner(agent, flags, new, CUDA)
    for obs in islice(devices.observations(devices.OBS_DIM), 6):
        devices.decide(learner, obs)
    assert all(loss.isfinite() for loss in learner.losses.values())


PIXELS = "--sparsity 0.8 --threads 1 --eval-episodes 1 --final-eval-episodes 1"
DRQ = f"{PIXELS} --env-id dm_control/cartpole-balance-v0 --action-repeat 50"
DRQ += " --total-timesteps 6000 --learning-starts 1000 --eval-interval 6000"
DRQ += " --checkpoint-interval 1000 --buffer-size 80 --batch-size 8"
DER = f"{PIXELS} --env-id ALE/Pong-v5 --action-repeat 40 --total-timesteps 19200"
DER += " --learning-starts 1600 --eval-interval 19200 --checkpoint-interval 2400"
DER += " --buffer-size 120 --batch-size 8 --target-interval 50"


@on_cuda
@pytest.mark.parametrize("name", check_gpu.SIMBA)
def test_killed_and_resumed_equals_whole(name, tmp_path):
    flags = [*check_gpu.RESUMED.split(), "--device", "cuda"]
    assert check_gpu.killed_and_whole(name, tmp_path, flags, 300) == []


@on_cuda
@pytest.mark.parametrize(
    "name,package,flags",
    [("drqv2_sparse", "dm_control", DRQ), ("der_impala_sparse", "ale_py", DER)],
)
def test_a_killed_pixel_run_goes_on(name, package, flags, tmp_path):
    """Exactness is not promised there: gradients of their convolutions may vary."""
    pytest.importorskip(package)
    differing = check_gpu.killed_and_whole(
        name, tmp_path, [*flags.split(), "--device", "cuda"], 600
    )
    if name == "drqv2_sparse":  # of DER, the lengths of games vary
        assert "counters" not in differing


# On a CPU


class RoundedProducts(TorchDispatchMode):
    """Matrix products of numbers with 10 bits of mantissa, as TF32 has."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket.__name__ == "mm":
            args = [to_tf32(x) for x in args]
        elif operation.overloadpacket.__name__ == "addmm":
            args = [args[0], *(to_tf32(x) for x in args[1:])]
        return operation(*args, **(kwargs or {}))


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    """To the nearest number with 10 bits of mantissa."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def test_rounding_is_that_of_tf32():
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -3.1415927])
    expected = [1.0, 1 + 2**-10, 1 + 2**-10, 1.0, -3.140625]
    assert to_tf32(x).tolist() == expected


@BY_AGENT
def test_tolerances_are_those_of_rounding(agent):
    """What TF32 changes is seen by the tolerance of float32, and allowed by its own."""
    flags = flags_of(agent, batch_size=64)
    expected = check_gpu.one_update(agent, flags, CPU)
    assert {"actor_loss", "critic_loss"} <= {name.removeprefix("losses.") for name in expected}
    with RoundedProducts():
        errors = check_gpu.errors_of(check_gpu.one_update(agent, flags, CPU), expected)
    print(f"largest relative error of TF32: {max(errors.values()):.2g}")
    assert TOLERANCE["highest"] < max(errors.values()) < TOLERANCE["high"] / 2


class RepeatedKernels:
    """A CUDA graph on a CPU: repeats what a function computes, and no Python.

    So it writes those kept weights that the captured call wrote, and PyTorch's versions, and what
    is remembered of them, stay as they were. Only the capture itself is Python.
    """

    def __init__(self, captured, agent):
        self.captured = captured
        networks = [part for part in vars(agent).values() if isinstance(part, torch.nn.Module)]
        layers = [layer for network in networks for layer in network.modules()]
        self.copies = [layer.kept for layer in layers if getattr(layer, "kept", None)]
        self.parameters = tuple(p for network in networks for p in network.parameters())
        self.replays = 0

    def replay(self) -> None:
        versions = tuple(p._version for p in self.parameters)
        remembered = [copy.version for copy in self.copies]
        for copy in self.copies:
            copy.version = None
        self.captured.outputs = self.captured.function()
        self.replays += 1
        if self.replays > 1:
            torch._C._autograd._unsafe_set_version_counter(self.parameters, versions)
            for copy, version in zip(self.copies, remembered):
                copy.version = version


def graphs_on_a_cpu(module, agents: list) -> type:
    """GraphedFunction with such graphs, of the newest of some agents."""

    class Graphed(module.GraphedFunction):
        def __init__(self, function, device, enabled):
            super().__init__(function, device, enabled)
            self.enabled = True

        def call_on_a_stream_of_its_own(self):
            return self.function()

        def capture(self) -> None:
            module.DenseCopy.generation += 1
            self.graph = RepeatedKernels(self, agents[-1])

    return Graphed


@BY_AGENT
def test_diagnostics_between_graphs_see_the_newest_weights(agent, monkeypatch):
    """Those of a run with graphs equal those of a run without."""
    flags = flags_of(agent, width_scale=0.125, batch_size=8)
    agents = []
    measured = []
    for function in (agent.GraphedFunction, graphs_on_a_cpu(agent, agents)):
        monkeypatch.setattr(agent, "GraphedFunction", function)
        agents.append(devices.make_agent(agent, flags, "sparse", CPU))
        learner = devices.make_learner(agent, flags, agents[-1], CPU)
        torch.manual_seed(3)
        found = []
        for step, obs in enumerate(islice(devices.observations(devices.OBS_DIM), 8)):
            devices.decide(learner, obs)
            generator = torch.Generator().manual_seed(step)
            batch = learner.replay.sample(8, learner.norm, generator)
            noises = torch.randn(2, 8, devices.ACTION_DIM, generator=generator)
            found.append(agent.diagnose(agents[-1], batch, *noises, 0.99))
        measured.append(found)
    assert learner.update_all.graph.replays == 5
    assert devices.differing(*map(devices.tensors, agents)) == []
    assert measured[0] == measured[1]
