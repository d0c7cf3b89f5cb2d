"""Time and memory of one full update, ours against a masked dense twin in plain PyTorch.

    python sparse_zoo/analysis/bench_update.py --width-scale 4 --sparsity 0.9
    python sparse_zoo/analysis/bench_update.py --table --output results/update_costs
    python sparse_zoo/analysis/bench_update.py --width-scale 4 --sparsity 0.9 --profile

An update is all that the agent does with one batch: actor, temperature, critic and target network. The twin has the
same networks with nn.Linear layers whose weight is multiplied by a 0/1 mask of the same density in every forward pass
(at sparsity 0: plain nn.Linear), the same optimiser and the same update. Each side is a process of its own, so that
its peak memory can be read; they take turns, so that both see the same machine. Times are medians over the turns.

GFLOP are those of matrix products over active weights: per transition and weight, 2 for a product and 2 more for each
of its two gradients. The actor's weights take part in two products and in the gradients of one, 8 in all; the critic's
in three products (the actor's loss, the target, the critic's loss), the gradients of one and the gradient of inputs of
another, 12 in all. SAC makes one update an env step (two a decision, which lasts two env steps).
"""

import importlib
import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

MODULES = {"sac": "sac_simba_sparse", "ddpg": "ddpg_simba_sparse"}


@dataclass
class Args:
    agent: Literal["sac", "ddpg"] = "sac"
    """which agent's update"""
    width_scale: float = 4.0
    """width of both networks"""
    sparsity: float = 0.9
    """sparsity of both networks"""
    obs_dim: int = 67
    """observation size (67: humanoid)"""
    action_dim: int = 21
    """action size (21: humanoid)"""
    batch_size: int = 256
    """transitions per update"""
    turns: int = 7
    """turns of each side, each of at least --turn-seconds"""
    turn_seconds: float = 1.5
    """least length of a turn"""
    threads: int | None = None
    """CPU threads of the side whose turn it is (default: all cores)"""
    table: bool = False
    """width scales 1, 2, 4, 5 by sparsities 0, 0.8, 0.9, 0.95, as a Markdown table"""
    output: str | None = None
    """with --table: folder for the same as update_costs.csv and as a figure"""
    profile: bool = False
    """where the CPU time of our update goes, on one thread: kernel by kernel, and the rest"""


class MaskedLinear(nn.Module):
    """The usual way to train a sparse layer: a dense weight times a mask."""

    def __init__(self, linear: nn.Linear, density: float):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        mask = torch.zeros(linear.weight.numel())
        mask[torch.randperm(mask.numel())[: round(density * mask.numel())]] = 1.0
        self.register_buffer("mask", mask.view_as(linear.weight))

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


def mask_network(network: nn.Module, layers: list[dict]) -> None:
    for row in layers:
        if row["active"] < row["total"]:
            linear = network.get_submodule(row["layer"])
            network.set_submodule(row["layer"], MaskedLinear(linear, row["active"] / row["total"]))


def build(args: Args, side: str):
    """A function that does one update of one side, on a fixed batch and fresh noise; and its weights by network."""
    module = importlib.import_module(MODULES[args.agent])
    threads = args.threads or torch.get_num_threads()
    module.numba.set_num_threads(threads)
    torch.set_num_threads(threads)
    flags = module.Args(
        width_scale=args.width_scale, sparsity=args.sparsity if side == "ours" else 0.0
    )
    agent = module.Agent(flags, args.obs_dim, args.action_dim, torch.device("cpu"))
    if side == "twin" and args.sparsity > 0:
        for name in ("actor", "critic", "target_critic"):
            network = getattr(agent, name)
            shapes = {
                path: tuple(parameter.shape) for path, parameter in network.named_parameters()
            }
            sparsity = module.erdos_renyi(shapes, args.sparsity)
            rows = [
                {
                    "layer": path.removesuffix(".weight"),
                    "active": (1 - sparsity[path]) * parameter.numel(),
                }
                | {"total": parameter.numel()}
                for path, parameter in network.named_parameters()
                if parameter.dim() > 1
            ]
            mask_network(network, rows)
    size = (args.batch_size, args.obs_dim)
    obs, next_obs = torch.randn(2, *size)
    action = 2 * torch.rand(args.batch_size, args.action_dim) - 1
    batch = module.Batch(
        obs, action, torch.rand(args.batch_size), next_obs, torch.zeros(args.batch_size)
    )

    def update() -> None:
        noise, next_noise = torch.randn(2, args.batch_size, args.action_dim)
        module.update(agent, batch, noise, next_noise, 0.99, 0.005)

    weights = {
        name: sum(row["active"] for row in agent.layers[name]) for name in ("actor", "critic")
    }
    return update, weights


def serve(connection, args: Args, side: str) -> None:
    """The process of one side: does the number of updates it is sent and answers with seconds per update."""
    update, weights = build(args, side)
    for _ in range(2):
        update()
    connection.send(None)
    while count := connection.recv():
        start = time.perf_counter()
        for _ in range(count):
            update()
        connection.send((time.perf_counter() - start) / count)
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    connection.send(
        (kibibytes / 1024 if sys.platform != "darwin" else kibibytes / 1024**2, weights)
    )


def gflop(args: Args, weights: dict[str, int]) -> float:
    """10^9 floating-point operations of an update's matrix products, from the active weights of each network."""
    return args.batch_size * (8 * weights["actor"] + 12 * weights["critic"]) / 1e9


def compare(args: Args) -> dict[str, float]:
    """Milliseconds per update and peak MiB of both sides, the ratios ours / twin, and our active weights and GFLOP."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for side in ("twin", "ours"):
        pipes[side], child = context.Pipe()
        processes.append(context.Process(target=serve, args=(child, args, side), daemon=True))
        processes[-1].start()
        pipes[side].recv()
    seconds: dict[str, list[float]] = {"twin": [], "ours": []}
    counts = dict.fromkeys(seconds, 1)
    for turn in range(args.turns + 1):
        for side, pipe in pipes.items():
            pipe.send(counts[side])
            taken = pipe.recv()
            if turn == 0:  # only sets how many updates fill a turn
                counts[side] = max(1, round(args.turn_seconds / taken))
            else:
                seconds[side].append(taken)
    result = {}
    for side, pipe in pipes.items():
        pipe.send(0)
        result[f"{side}_ms"] = 1000 * statistics.median(seconds[side])
        result[f"{side}_mib"], weights = pipe.recv()  # ours comes last, so these are its weights
    for process in processes:
        process.join()
    ratios = [ours / twin for ours, twin in zip(seconds["ours"], seconds["twin"])]
    result["time"] = statistics.median(ratios)
    result["time_low"], result["time_high"] = min(ratios), max(ratios)
    result["memory"] = result["ours_mib"] / result["twin_mib"]
    result["active_weights"] = sum(weights.values())
    result["gflop"] = gflop(args, weights)
    return result


def draw(table: pd.DataFrame) -> Figure:
    """Time, peak memory and arithmetic of an update against width: a line for each sparsity, dashed for the twin."""
    axes = (figure := Figure((12, 3.6), layout="constrained")).subplots(1, 3)
    panels = {
        "ms": "ms per update",
        "mib": "peak memory, MiB",
        "gflop": "GFLOP per update (active weights)",
    }
    for ax, (column, title) in zip(axes, panels.items()):
        for index, (sparsity, rows) in enumerate(table.groupby("sparsity")):
            name = f"sparsity {sparsity:g}" if sparsity else "dense"
            ours = rows["gflop" if column == "gflop" else f"ours_{column}"]
            ax.plot(rows.width_scale, ours, color=f"C{index}", marker="o", ms=4, label=name)
            if column != "gflop" and sparsity == table.sparsity.max():
                label = f"sparsity {sparsity:g}, by masks"
                ax.plot(
                    rows.width_scale,
                    rows[f"twin_{column}"],
                    "s--",
                    color=f"C{index}",
                    ms=4,
                    label=label,
                )
        ax.set(
            xscale="log",
            yscale="linear" if column == "mib" else "log",
            xlabel="width scale",
            title=title,
        )
        ax.set_xticks(
            table.width_scale.unique(), [f"{width:g}" for width in table.width_scale.unique()]
        )
        ax.minorticks_off()
    axes[0].legend(frameon=False, fontsize=8)
    axes[1].set_ylim(bottom=0)
    return figure


def profile(args: Args) -> None:
    """Prints the CPU milliseconds of our update that go to each kernel, by the size of its layer, and the rest."""
    module = importlib.import_module(MODULES[args.agent])
    update, _ = build(replace(args, threads=1), "ours")
    call, spent, calls = module.call_numba, {}, {}

    def timed(kernel, *tensors):
        start = time.process_time()
        result = call(kernel, *tensors)
        weights = max(len(tensor) for tensor in tensors if tensor.dim() == 1)
        key = f"{kernel.__name__}, {weights:,} weights"
        spent[key] = spent.get(key, 0.0) + time.process_time() - start
        calls[key] = calls.get(key, 0) + 1
        return result

    update()
    module.call_numba = timed
    start = time.process_time()
    for _ in range(args.turns):
        update()
    total = time.process_time() - start
    calls["everything else"], spent["everything else"] = args.turns, total - sum(spent.values())
    print("| kernel | calls | CPU ms per update | share |\n|---|---|---|---|")
    for key in sorted(spent, key=spent.get, reverse=True):
        milliseconds = 1000 * spent[key] / args.turns
        print(
            f"| {key} | {calls[key] // args.turns} | {milliseconds:.1f} | {100 * spent[key] / total:.0f} % |"
        )
    print(f"| all | | {1000 * total / args.turns:.1f} | 100 % |")


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.profile:
        profile(args)
        sys.exit()
    if args.table:
        print(
            "| width scale | sparsity | twin ms | ours ms | time ratio | twin MiB | ours MiB | memory ratio |"
        )
        print("|---|---|---|---|---|---|---|---|")
    widths = (1.0, 2.0, 4.0, 5.0) if args.table else (args.width_scale,)
    sparsities = (0.0, 0.8, 0.9, 0.95) if args.table else (args.sparsity,)
    results = []
    for width_scale in widths:
        for sparsity in sparsities:
            r = compare(replace(args, width_scale=width_scale, sparsity=sparsity))
            results.append({"width_scale": width_scale, "sparsity": sparsity, **r})
            if args.table:
                row = f"| {width_scale:g} | {sparsity:g} | {r['twin_ms']:.1f} | {r['ours_ms']:.1f} "
                row += f"| {r['time']:.3f} | {r['twin_mib']:.0f} | {r['ours_mib']:.0f} | {r['memory']:.2f} |"
                print(row, flush=True)
            else:
                for side, name in (("twin", "masked dense twin"), ("ours", "ours")):
                    print(
                        f"{name:<18}{r[side + '_ms']:9.1f} ms per update{r[side + '_mib']:9.0f} MiB at the peak"
                    )
                print(f"ratios of single turns: {r['time_low']:.3f} to {r['time_high']:.3f}")
                print(f"ratio time={r['time']:.3f} memory={r['memory']:.2f}")
    if args.table and args.output:
        Path(args.output).mkdir(parents=True, exist_ok=True)
        table = pd.DataFrame(results)
        table.to_csv(Path(args.output) / "update_costs.csv", index=False, float_format="%.5g")
        draw(table).savefig(Path(args.output) / "update_costs.png", dpi=150)
        print(f"update_costs.csv and .png are in {args.output}")
