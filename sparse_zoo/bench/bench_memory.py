"""Memory of a GPU that training of SAC or DDPG takes, computed from the shapes of the networks.

    python sparse_zoo/bench/bench_memory.py

Nothing is run and nothing measured. What is counted of each number that training changes: its
value, its gradient, two moments of AdamW; in the critic once more for the target. A sparse layer
keeps 12 bytes of places for each active weight (4 that are saved, 8 for PyTorch), which the target
shares, and a dense weight in actor and critic. Replay is 4 bytes for each number of a transition.
Passing are the largest dense weight twice (of the target, and a gradient) and the activations of
one update, of which only those kept for the gradients are counted.
"""

from dataclasses import dataclass
from itertools import product
from typing import Annotated, Literal

import timing
import devices
import torch
import torch.nn as nn
from timing import plots, runs

GIB = 2**30
FLOAT = 4


@dataclass
class Args:
    agent: Literal["sac", "ddpg"] = "sac"
    """whose networks"""
    width_scale: runs.Widths = (1.0, 4.0, 5.0)
    """widths of both networks"""
    sparsity: runs.Sparsities = (0.0, 0.9, 0.95)
    """sparsities of both networks"""
    transitions: runs.Count = 500_000
    """in the replay (500,000: a run of the default length)"""
    card: Annotated[float, "0 < x <= 10**4"] = 80.0
    """memory of a card in GiB, for the number of runs that fit"""
    process: Annotated[float, "0 <= x <= 100"] = 0.76
    """GiB that CUDA and its libraries take for each process (assumed 0.6, and five workspaces of
    cuBLAS, 32 MiB each on Hopper cards)"""


def networks(module, width_scale: float) -> tuple[nn.Module, nn.Module]:
    """Actor and critic without memory: shapes only."""
    hidden = round(128 * width_scale)
    sizes = (devices.OBS_DIM, devices.ACTION_DIM)
    with torch.device("meta"):
        return module.Actor(*sizes, hidden, 1), module.Critic(*sizes, 4 * hidden, 2, 1)


def network_bytes(module, network: nn.Module, sparsity: float, copies: int) -> dict[str, int]:
    """Of one network, with `copies` numbers for each parameter: 4, or 5 with a target."""
    shapes = {name: tuple(part.shape) for name, part in network.named_parameters()}
    layer_sparsity = module.erdos_renyi(shapes, sparsity)
    found = {"trained": 0, "places": 0, "dense weights": 0, "largest": 0}
    for name, part in network.named_parameters():
        active = max(1, round((1 - layer_sparsity[name]) * part.numel()))
        found["trained"] += FLOAT * copies * active
        if active < part.numel():
            found["places"] += 12 * active
            found["dense weights"] += FLOAT * part.numel()
            found["largest"] = max(found["largest"], FLOAT * part.numel())
    return found


def activation_bytes(network: nn.Module, batch_size: int) -> int:
    """Outputs of linear layers and LayerNorms, and of the ReLU behind each `up`."""
    outputs = 0
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear):
            outputs += layer.out_features * (2 if name.endswith("up") else 1)
        elif isinstance(layer, nn.LayerNorm):
            outputs += layer.normalized_shape[0]
    return FLOAT * batch_size * outputs


def count_bytes(args: Args, width_scale: float, sparsity: float) -> dict[str, int]:
    """Bytes of everything, by kind."""
    module = timing.import_agent(f"{args.agent}_simba_sparse")
    actor, critic = networks(module, width_scale)
    ours = [
        network_bytes(module, actor, sparsity, copies=4),
        network_bytes(module, critic, sparsity, copies=5),
    ]
    transition = 2 * devices.OBS_DIM + devices.ACTION_DIM + 2
    found = {kind: sum(part[kind] for part in ours) for kind in ours[0] if kind != "largest"}
    found["replay"] = FLOAT * args.transitions * transition
    largest = max(part["largest"] for part in ours)
    activations = activation_bytes(critic, module.Args.batch_size)
    found["passing"] = 2 * largest + activations + activation_bytes(actor, module.Args.batch_size)
    return found


def main(args: Args) -> None:
    rows = []
    for width_scale, sparsity in product(args.width_scale, args.sparsity):
        found = count_bytes(args, width_scale, sparsity)
        found["process"] = round(args.process * GIB)
        total = sum(found.values())
        cells = [f"{number / GIB:.2f}" for number in (*found.values(), total)]
        fit = int(args.card * GIB // total)
        rows.append([f"{width_scale:g}", f"{sparsity:g}", *cells, fit])
    header = ["width scale", "sparsity", *found, "all, GiB", f"runs in {args.card:g} GiB"]
    print(plots.markdown_table(header, rows), end="")


if __name__ == "__main__":
    runs.start(main, Args)
