"""What the scripts of this folder share to measure SAC and DDPG on a CPU or a GPU.

Agents with sparse, masked or dense networks; learners with random transitions; launches, copies,
waits, time and memory of what they do.
"""

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from unittest.mock import patch

import timing
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OBS_DIM = 67  # humanoid
ACTION_DIM = 21
MIB = 2**20


def choose(name: str) -> torch.device:
    """The device of --device; ends the program if it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        timing.fail("--device cuda: there is no CUDA here; use --device cpu")
    return torch.device(name)


def wait(device: torch.device) -> None:
    """Until all that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


# Agents and learners


def make_agent(module, flags, network: str, device: torch.device, sizes=(OBS_DIM, ACTION_DIM)):
    """An agent whose networks are sparse, masked (dense weights times masks) or dense."""
    torch.manual_seed(flags.seed)
    if network == "sparse":
        return module.Agent(flags, *sizes, device)
    agent = module.Agent(replace(flags, sparsity=0.0), *sizes, device)
    if network == "masked" and flags.sparsity > 0:
        for part in (agent.actor, agent.critic, agent.target_critic):
            timing.mask_network(module, part, flags.sparsity)
            part.to(device)
    return agent


def make_learner(
    module, flags, agent, device: torch.device, sizes=(OBS_DIM, ACTION_DIM), transitions: int = 2000
):
    """A learner of an agent, whose replay is full of random transitions."""
    obs_dim, action_dim = sizes
    random = torch.Generator().manual_seed(0)
    norm = module.ObservationNorm(obs_dim, device)
    for obs in torch.randn(10, obs_dim, generator=random).numpy():
        norm.update(obs)
    replay = module.ReplayBuffer(transitions, obs_dim, action_dim, device)
    obs, next_obs = torch.randn(2, transitions, obs_dim, generator=random)
    action = torch.randn(transitions, action_dim, generator=random).tanh()
    reward = torch.rand(transitions, generator=random)
    columns = [obs, action, reward, next_obs, torch.zeros(transitions)]
    replay.load_state_dict({"added": transitions, "columns": columns})
    noise_std = getattr(flags, "exploration_noise", 1.0)
    return module.Learner(agent, norm, replay, flags, 0.99, noise_std, device)


def decide(learner, obs: np.ndarray) -> np.ndarray:
    """All of a decision but the environment's step: acts, learns, and stores a transition."""
    learner.norm.update(obs)
    action = learner.act(obs, then_learn=True)
    learner.replay.add(obs, action, 0.1, obs, False)
    return action


def observations(obs_dim: int) -> Iterator[np.ndarray]:
    """The same random observations at every call."""
    random = np.random.default_rng(0)
    while True:
        yield random.normal(size=obs_dim)


def tensors(agent) -> dict[str, torch.Tensor]:
    """All that training changes in an agent: parameters and moments, by name."""
    found = {}
    for name, part in vars(agent).items():
        if isinstance(part, torch.nn.Module):
            named = part.state_dict()
        elif isinstance(part, torch.optim.Optimizer):
            states = part.state_dict()["state"]
            named = {f"{key}.{kind}": x for key in states for kind, x in states[key].items()}
        else:
            continue
        found |= {f"{name}.{key}": x.detach().cpu() for key, x in named.items()}
    return found


def differing(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    names = ours.keys() | theirs.keys()
    both = ours.keys() & theirs.keys()
    return sorted(name for name in names if not (name in both and same(ours[name], theirs[name])))


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Bit for bit: NaN equals NaN, and 0 does not equal -0."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return x.cpu().numpy().tobytes() == y.cpu().numpy().tobytes()


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The length of the difference over the length of theirs, in float64."""
    theirs = theirs.detach().cpu().double()
    ours = ours.detach().cpu().double()
    length = float(theirs.norm())
    return float((ours - theirs).norm()) / length if length else float(ours.norm())


LOSSES = ("actor_loss", "td_target", "critic_loss")


@contextmanager
def compiled_losses(module, backend: str) -> Iterator[None]:
    """An agent's three loss functions through torch.compile; its optimisers stay as they are."""
    compile_loss = partial(torch.compile, fullgraph=True, backend=backend)
    compiled = {name: compile_loss(getattr(module, name)) for name in LOSSES}
    with timing.replaced(module, **compiled):
        try:
            yield
        finally:
            torch._dynamo.reset()


# What is measured


NO_WORK = {
    "_local_scalar_dense",
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "is_same_size",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "resize_",
}


def starts_work(operation) -> bool:
    """Whether an operation starts work on a GPU: not a view, and no memory without contents."""
    if operation.namespace == "profiler" or operation.overloadpacket.__name__ in NO_WORK:
        return False
    aliases = [returned.alias_info for returned in operation._schema.returns]
    return not any(alias is not None and not alias.is_write for alias in aliases)


class CountLaunches(TorchDispatchMode):
    """Counts the operations that would start work on a GPU, and the bytes copied between devices.

    An operation counts once, even where a GPU needs two kernels for it. A CUDA graph that is
    replayed is no operation: nothing of it is counted.
    """

    def __init__(self):
        super().__init__()
        self.operations = Counter()
        self.copies = 0
        self.copied_bytes = 0

    @property
    def launches(self) -> int:
        return self.operations.total()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if starts_work(operation):
            self.operations[operation.overloadpacket.__name__] += 1
        leaves = tree_leaves((args, result))
        devices = {leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()}
        name = operation.overloadpacket.__name__
        if name in ("_to_copy", "copy_") and len(devices) > 1:
            self.copies += 1
            self.copied_bytes += result.numel() * result.element_size()
        return result


def count(function: Callable) -> CountLaunches:
    """What a call launches and copies."""
    with CountLaunches() as counted:
        function()
    return counted


def find_waits(function: Callable) -> list[str]:
    """Where a call makes Python wait for the GPU: file and line of each of PyTorch's own warnings.

    PyTorch does not warn of a wait for an event; one that has not happened yet is found here.
    """
    synchronize = torch.cuda.Event.synchronize

    def warn_and_synchronize(event) -> None:
        if not event.query():
            warnings.warn("synchronizing CUDA operation: an event", stacklevel=2)
        synchronize(event)

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with (
            warnings.catch_warnings(record=True) as caught,
            patch.object(torch.cuda.Event, "synchronize", warn_and_synchronize),
        ):
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in caught if "synchronizing CUDA operation" in str(one.message)]
    return [f"{one.filename.rpartition('/')[2]}:{one.lineno}" for one in waits]


STARTS = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")


def profile_gpu(function: Callable, device: torch.device) -> dict[str, float]:
    """Of a call on a GPU, by torch.profiler: launches by Python, kernels, and how long they ran.

    Nothing should be timed after it in the same process: the profiler stays attached, and launches
    may take longer from then on.
    """
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    wait(device)
    with profile(activities=activities) as profiled:
        function()
        wait(device)
    on_gpu = torch.autograd.DeviceType.CUDA
    kernels = [
        event
        for event in profiled.events()
        if event.device_type == on_gpu
        and not event.is_user_annotation
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    calls = [event for event in profiled.events() if event.name.startswith(STARTS)]
    busy = sum(event.device_time for event in kernels) / 1000
    return {"launches": len(calls), "kernels": len(kernels), "gpu_ms": busy}


def milliseconds(
    function: Callable, device: torch.device, seconds: float = 0.3, turns: int = 3
) -> float:
    """Wall-clock ms of a call whose work is done, the median over some turns; after ten calls.

    Five to warm up, for a CUDA graph is captured at the fourth, and five to see how long one takes.
    """
    run_once(function, device, 5)
    taken = run_once(function, device, 5) / 5
    calls = max(1, round(1000 * seconds / max(taken, 1e-3)))
    return median(run_once(function, device, calls) / calls for _ in range(turns))


def run_once(function: Callable, device: torch.device, calls: int) -> float:
    def all_calls() -> None:
        for _ in range(calls):
            function()
        wait(device)

    wait(device)
    return timing.measure(all_calls)


@dataclass
class Memory:
    """Of the GPU: peak() is the largest number of MiB since the last call of it, or of start."""

    device: torch.device
    before: int = 0

    def start(self) -> None:
        """What is allocated now does not count."""
        gc.collect()
        if self.device.type == "cuda":
            self.without_workspaces()
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        """NaN on a CPU, where PyTorch does not know it."""
        if self.device.type != "cuda":
            return float("nan")
        torch.cuda.synchronize()
        highest = (torch.cuda.max_memory_allocated() - self.before) / MIB
        self.without_workspaces()
        torch.cuda.reset_peak_memory_stats()
        return highest

    def without_workspaces(self) -> None:
        """Frees those of cuBLAS, some for each stream: so all pay for their own. No graph lives."""
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
