"""Time and memory of one full update, ours against a masked dense twin in plain PyTorch.

    python sparse_zoo/bench/bench_update.py --width-scale 4 --sparsity 0.9
    python sparse_zoo/bench/bench_update.py --table --output results/update_costs
    python sparse_zoo/bench/bench_update.py --width-scale 4 --sparsity 0.9 --profile

An update is all that the agent does with one batch: actor, temperature, critic and target network.
The twin has the same networks with nn.Linear layers whose weight is multiplied by a 0/1 mask of the
same density in every forward pass (at sparsity 0: plain nn.Linear), the same optimiser and the same
update. Each side is a process of its own, so that its peak memory can be read; they take turns, so
that both see the same machine. Times are medians over the turns.

GFLOP are those of matrix products over active weights: per transition and weight, 2 for a product
and 2 more for each of its two gradients. The actor's weights take part in two products and in the
gradients of one, 8 in all; the critic's in three products (the actor's loss, the target, the
critic's loss), the gradients of one and the gradient of inputs of another, 12 in all. SAC makes one
update an env step (two a decision, which lasts two env steps).
"""

import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from multiprocessing.connection import Connection
from typing import Annotated, Literal

import timing
import pandas as pd
import torch
from timing import plots, runs
from matplotlib.figure import Figure


@dataclass
class Args:
    agent: Literal["sac", "ddpg"] = "sac"
    """which agent's update"""
    width_scale: runs.Width = 4.0
    """width of both networks"""
    sparsity: runs.Sparsity = 0.9
    """sparsity of both networks"""
    obs_dim: runs.Count = 67
    """observation size (67: humanoid)"""
    action_dim: runs.Count = 21
    """action size (21: humanoid)"""
    batch_size: runs.Count = 256
    """transitions per update"""
    turns: runs.Count = 7
    """turns of each side, each of at least --turn-seconds"""
    turn_seconds: Annotated[float, "0 <= x <= 3600"] = 1.5
    """least length of a turn"""
    threads: runs.Threads = None
    """CPU threads of the side whose turn it is (default: all cores)"""
    table: bool = False
    """width scales 1, 2, 4, 5 by sparsities 0, 0.8, 0.9, 0.95, as a Markdown table"""
    output: str | None = None
    """with --table: folder for the same as update_costs.csv and as a figure"""
    profile: bool = False
    """where the CPU time of our update goes, on one thread: kernel by kernel, and the rest"""


def make_batch(module, obs_dim: int, action_dim: int, batch_size: int):
    """A random batch, which nothing terminates."""
    obs, next_obs = torch.randn(2, batch_size, obs_dim)
    action = 2 * torch.rand(batch_size, action_dim) - 1
    reward = torch.rand(batch_size)
    return module.Batch(obs, action, reward, next_obs, torch.zeros(batch_size))


def make_update(module, agent, obs_dim: int, action_dim: int, batch_size: int) -> Callable:
    """A function that does one update on a fixed batch, with fresh noise."""
    batch = make_batch(module, obs_dim, action_dim, batch_size)

    def update() -> None:
        noise, next_noise = torch.randn(2, batch_size, action_dim)
        module.update(agent, batch, noise, next_noise, 0.99, 0.005)

    return update


def build(args: Args, side: str) -> tuple[Callable, dict[str, int]]:
    """A function that does one update of one side; and its weights by network."""
    module = timing.import_agent(f"{args.agent}_simba_sparse")
    timing.set_threads(module, args.threads)
    sparsity = args.sparsity if side == "ours" else 0.0
    flags = module.Args(width_scale=args.width_scale, sparsity=sparsity)
    agent = module.Agent(flags, args.obs_dim, args.action_dim, timing.CPU)
    if side == "twin" and args.sparsity > 0:
        for network in (agent.actor, agent.critic, agent.target_critic):
            timing.mask_network(module, network, args.sparsity)
    update = make_update(module, agent, args.obs_dim, args.action_dim, args.batch_size)
    weights = {
        name: sum(parameter.numel() for parameter in getattr(agent, name).parameters())
        for name in ("actor", "critic")
    }
    return update, weights


def serve(connection: Connection, args: Args, side: str) -> None:
    """The process of one side: does the number of updates it is sent, answers with ms per update.

    After the number 0 it answers with its peak memory in MiB and its weights.
    """
    update, weights = build(args, side)
    timing.measure(update, repeats=2)
    timing.answer(connection, update)
    unit = 1024 if sys.platform != "darwin" else 1024**2
    connection.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, weights))


def gflop(args: Args, weights: dict[str, int]) -> float:
    """10^9 floating-point operations of an update's matrix products, from its active weights."""
    return args.batch_size * (8 * weights["actor"] + 12 * weights["critic"]) / 1e9


def compare(args: Args) -> dict[str, float]:
    """ms per update and peak MiB of both sides, their ratios, our active weights and GFLOP."""
    sides = {side: timing.start_process(serve, args, side) for side in ("twin", "ours")}
    for connection in sides.values():
        timing.receive(connection)
    milliseconds = {side: [] for side in sides}
    counts = dict.fromkeys(sides, 1)
    for turn in range(args.turns + 1):
        for side, connection in sides.items():
            connection.send(counts[side])
            taken = timing.receive(connection)
            if turn == 0:  # only sets how many updates fill a turn
                counts[side] = max(1, round(1000 * args.turn_seconds / taken))
            else:
                milliseconds[side].append(taken)
    result = {}
    for side, connection in sides.items():
        connection.send(0)
        result[f"{side}_ms"] = statistics.median(milliseconds[side])
        # Ours comes last: its weights count
        result[f"{side}_mib"], weights = timing.receive(connection)
    ratios = timing.compare_turns(milliseconds["ours"], milliseconds["twin"])
    result |= {"time": ratios["ratio"], "time_low": ratios["low"], "time_high": ratios["high"]}
    result["memory"] = result["ours_mib"] / result["twin_mib"]
    result["active_weights"] = sum(weights.values())
    result["gflop"] = gflop(args, weights)
    return result


def draw(table: pd.DataFrame) -> Figure:
    """Time, peak memory and arithmetic of an update against width, dashed for the masked twin."""
    figure, axes = plots.make_grid(1, 3, 4, 3.1)
    panels = {
        "ms": "ms per update",
        "mib": "peak memory, MiB",
        "gflop": "GFLOP per update (active weights)",
    }
    for ax, (column, title) in zip(axes[0], panels.items()):
        for sparsity, rows in table.groupby("sparsity"):
            style = {"color": plots.sparsity_colour(sparsity), "ms": 4}
            name = plots.sparsity_name(sparsity)
            ours = rows["gflop" if column == "gflop" else f"ours_{column}"]
            ax.plot(rows.width_scale, ours, marker="o", label=name, **style)
            if column != "gflop" and sparsity == table.sparsity.max():
                twin = rows[f"twin_{column}"]
                ax.plot(rows.width_scale, twin, "s--", label=f"{name}, by masks", **style)
        scale = "linear" if column == "mib" else "log"
        ax.set(xscale="log", yscale=scale, xlabel="width scale", title=title)
        plots.mark_values(ax, sorted(table.width_scale.unique()))
    axes[0, 0].legend(fontsize=8)
    axes[0, 1].set_ylim(bottom=0)
    return figure


def profile(args: Args) -> None:
    """Prints the CPU ms of our update that go to each kernel, by layer size; and the rest."""
    module = timing.import_agent(f"{args.agent}_simba_sparse")
    update, _ = build(replace(args, threads=1), "ours")
    spent = Counter()
    calls = Counter()

    def timed(kernel: Callable, pointers, col, *arrays) -> None:
        start = time.process_time()
        kernel(pointers, col, *arrays)
        key = f"{kernel.__name__}, {len(col):,} weights"
        spent[key] += 1000 * (time.process_time() - start) / args.turns
        calls[key] += 1

    update()
    for kernel in (module.packed_product, module.packed_gradient):
        setattr(module, kernel.__name__, partial(timed, kernel))
    total = timing.measure(update, time.process_time, args.turns)
    spent["everything else"] = total - sum(spent.values())
    calls["everything else"] = args.turns
    rows = [
        [key, calls[key] // args.turns, f"{ms:.1f}", f"{100 * ms / total:.0f} %"]
        for key, ms in spent.most_common()
    ]
    rows.append(["all", "", f"{total:.1f}", "100 %"])
    print(plots.markdown_table(["kernel", "calls", "CPU ms per update", "share"], rows), end="")


def print_table(args: Args) -> pd.DataFrame:
    """Measures widths by sparsities; prints a row of a Markdown table for each."""
    names = ("twin ms", "ours ms", "time ratio", "twin MiB", "ours MiB", "memory ratio")
    timing.print_header("width scale", "sparsity", *names)
    results = []
    for width_scale, sparsity in product((1.0, 2.0, 4.0, 5.0), (0.0, 0.8, 0.9, 0.95)):
        size = {"width_scale": width_scale, "sparsity": sparsity}
        found = compare(replace(args, **size))
        results.append(size | found)
        timing.print_cells(
            f"{width_scale:g}",
            f"{sparsity:g}",
            f"{found['twin_ms']:.1f}",
            f"{found['ours_ms']:.1f}",
            f"{found['time']:.3f}",
            f"{found['twin_mib']:.0f}",
            f"{found['ours_mib']:.0f}",
            f"{found['memory']:.2f}",
        )
    return pd.DataFrame(results)


def print_against_dense(table: pd.DataFrame) -> None:
    """The table of README: our updates against our dense ones and against the masked twin's."""
    names = ("width scale", "sparsity", "active weights", "ms")
    timing.print_header(*names, "of dense", "of masked", "MiB", "of dense", "of masked")
    short = table[(table.width_scale != 2) & (table.sparsity != 0.95)]
    for width_scale, rows in short.groupby("width_scale"):
        (dense,) = rows[rows.sparsity == 0].itertuples()
        for row in rows.itertuples():
            time = memory = twin_time = twin_memory = ""
            if row.sparsity > 0:
                time = f"{row.ours_ms / dense.ours_ms:.2f}"
                memory = f"{row.ours_mib / dense.ours_mib:.2f}"
                twin_time = f"{row.time:.2f}"
                twin_memory = f"{row.memory:.2f}"
            timing.print_cells(
                f"{width_scale:g}",
                f"{row.sparsity:g}",
                f"{row.active_weights / 1e6:.3g} M",
                f"{row.ours_ms:.0f}",
                time,
                twin_time,
                f"{row.ours_mib:.0f}",
                memory,
                twin_memory,
            )


def print_row(args: Args) -> None:
    """Measures one width and sparsity."""
    found = compare(args)
    for side, name in (("twin", "masked dense twin"), ("ours", "ours")):
        milliseconds = f"{name:<18}{found[side + '_ms']:9.1f} ms per update"
        print(f"{milliseconds}{found[side + '_mib']:9.0f} MiB at the peak")
    print(f"ratios of single turns: {found['time_low']:.3f} to {found['time_high']:.3f}")
    print(f"ratio time={found['time']:.3f} memory={found['memory']:.2f}")


def main(args: Args) -> None:
    if args.profile:
        profile(args)
    elif not args.table:
        print_row(args)
    else:
        if args.output:
            runs.make_folder(args.output)  # known to be there before all is measured
        table = print_table(args)
        print("\nThe table of README:\n")
        print_against_dense(table)
        if args.output:
            with runs.new_files(args.output) as folder:
                table.to_csv(folder / "update_costs.csv", index=False, float_format="%.5g")
                plots.save(draw(table), folder, "update_costs")
            print(f"update_costs.csv, .png and .svg are in {args.output}")


if __name__ == "__main__":
    runs.start(main, Args)
