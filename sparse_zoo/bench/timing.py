"""What the scripts of this folder share: clocks, turns, processes, and the masked dense twin."""

import contextlib
import importlib
import multiprocessing
import signal
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "analysis"))
import runs  # noqa: F401
import numpy as np
import plots  # noqa: F401  for the scripts of this folder, which cannot find it before
import torch
import torch.nn as nn
import torch.nn.functional as F
from runs import COSTS, fail, import_agent, set_threads  # noqa: F401

CPU = torch.device("cpu")


def import_reference(folder: str, module: str, name: str):
    """A module of a clone of other people's code; ends the program if it is not there."""
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        fail(f"--reference {folder}: no clone of {name} ({error})")


@contextlib.contextmanager
def replaced(owner, **attributes):
    """Other attributes of a module or class, for as long as the context lasts."""
    before = {name: getattr(owner, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def measure(function: Callable, clock: Callable = time.perf_counter, repeats: int = 1) -> float:
    """Milliseconds of a call, the mean over some repeats."""
    start = clock()
    for _ in range(repeats):
        function()
    return 1000 * (clock() - start) / repeats


def take_turns(
    functions: dict[str, Callable],
    turns: int,
    clock: Callable = time.perf_counter,
    repeats: dict[str, int] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of each function in each turn, after a turn that is not counted."""
    repeats = repeats or {}
    times = {name: [] for name in functions}
    for _ in range(turns + 1):
        for name, function in functions.items():
            times[name].append(measure(function, clock, repeats.get(name, 1)))
    return {name: values[1:] for name, values in times.items()}


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def compare_turns(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Ratio of ours to theirs: its median over the turns, the lowest and the highest."""
    ratios = [own / other for own, other in zip(ours, theirs)]
    return {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def start_process(serve: Callable, *args) -> Connection:
    """Starts serve(connection, *args) in a process of its own; the other end of its connection."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process alone
    context.Process(target=serve_or_say, args=(serve, theirs, *args), daemon=True).start()
    signal.signal(signal.SIGINT, handler)
    theirs.close()
    return ours


def serve_or_say(serve: Callable, connection: Connection, *args) -> None:
    """In the process: what ends it early is sent as well."""
    try:
        serve(connection, *args)
    except (Exception, SystemExit) as error:
        connection.send(error)


def receive(connection: Connection):
    """What a process sends; if an error ended it, this program ends by the same."""
    try:
        answer = connection.recv()
    except EOFError:
        fail("a process of this benchmark was ended; was there too little memory?")
    if isinstance(answer, BaseException):
        raise answer
    return answer


def stepper(env, choose_action: Callable) -> Callable[[], None]:
    """A function that makes one step of an environment."""
    env.reset(seed=0)

    def step() -> None:
        *_, terminated, truncated, _ = env.step(choose_action())
        if terminated or truncated:
            env.reset()

    return step


def fill_replay(replay, frames: int, shape: tuple[int, ...], choose_action: Callable) -> None:
    """Random frames in episodes of 500 decisions."""
    film = np.random.default_rng(0).integers(0, 256, (100, *shape), np.uint8)
    for number in range(frames):
        frame = film[number % len(film)]
        if number % 501 == 0:
            replay.begin(frame)
        else:
            replay.add(choose_action(), 1.0, False, frame)


def print_cells(*cells: str) -> None:
    """A row of a Markdown table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def print_header(*names: str) -> None:
    print_cells(*names)
    print("|---" * len(names) + "|")


def answer(connection: Connection, function: Callable) -> None:
    """Sends milliseconds of a call, the mean over the number of calls asked for; 0 ends it."""
    connection.send("ready")
    while count := connection.recv():
        connection.send(measure(function, repeats=count))


# The usual way to train a sparse network, which ours is compared with


class MaskedLinear(nn.Module):
    """A dense weight times a mask."""

    def __init__(self, linear: nn.Linear, density: float):
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        mask = torch.zeros(linear.weight.numel())
        mask[torch.randperm(mask.numel())[: round(density * mask.numel())]] = 1.0
        self.register_buffer("mask", mask.view_as(linear.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


def mask_network(module, network: nn.Module, sparsity: float) -> None:
    """Replaces the layers that an agent's module would prune by masked ones of equal density."""
    shapes = {name: tuple(part.shape) for name, part in network.named_parameters()}
    for name, layer_sparsity in module.erdos_renyi(shapes, sparsity).items():
        if len(shapes[name]) > 1 and layer_sparsity > 0:
            layer = name.removesuffix(".weight")
            masked = MaskedLinear(network.get_submodule(layer), 1 - layer_sparsity)
            network.set_submodule(layer, masked)
