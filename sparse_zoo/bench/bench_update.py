"""Time and memory of one full update, ours against a masked dense twin in plain PyTorch.

    python sparse_zoo/bench/bench_update.py --width-scale 4 --sparsity 0.9
    python sparse_zoo/bench/bench_update.py --table --output results/update_costs
    python sparse_zoo/bench/bench_update.py --width-scale 4 --sparsity 0.9 --profile
    python sparse_zoo/bench/bench_update.py --width-scale 1 --sparsity 0.9 --against my_fork.py
    python sparse_zoo/bench/bench_update.py --width-scale 1 --sparsity 0.9 --launches
    python sparse_zoo/bench/bench_update.py --width-scale 4 --device cuda --reference jax
    python sparse_zoo/bench/bench_update.py --table --device cuda --output results/gpu

An update is all that the agent does with one batch: actor, temperature, critic and target network.
The twin has the same networks with nn.Linear layers whose weight is multiplied by a 0/1 mask of the
same density in every forward pass (at sparsity 0: plain nn.Linear), the same optimiser and the same
update. Each side is a process of its own, so that its peak memory can be read; they take turns, so
that both see the same machine. Times are medians over the turns. With --against, the other side is
not the twin but plain dense networks, or another version of the agent's file, sparse like ours.

GFLOP are those of matrix products over active weights: per transition and weight, 2 for a product
and 2 more for each of its two gradients. The actor's weights take part in two products and in the
gradients of one, 8 in all; the critic's in three products (the actor's loss, the target, the
critic's loss), the gradients of one and the gradient of inputs of another, 12 in all. SAC makes one
update an env step (two a decision, which lasts two env steps).

On CUDA (--device cuda) all sides do the same work, all that a decision learns: they draw rows and
noise, send one row to the GPU, take batches from a replay there, and update twice. Their networks
are sparse (ours), dense times masks, or dense. `compiled` is torch.compile of the three loss
functions. Ours is one CUDA graph; `ours, no graph` is not. JAX (--reference jax) is the published
update, made again in jax_update.py. Sides are measured one after the other, by wall clock; ms are
those of one update, bytes those of a decision's two. Peak memory is PyTorch's, with a replay of
2,000 transitions. At the end a second table: launches are what Python asks of the GPU in a
decision, kernels what runs there, both by torch.profiler, after which nothing is timed any more.
"""

import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Literal

import timing
import devices
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
    launches: bool = False
    """instead of times: what an update would launch on a GPU without a graph, counted on the CPU"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where to measure"""
    matmul_precision: Literal["high", "highest"] = "high"
    """matrix products on CUDA: TF32, or float32"""
    against: str = "twin"
    """on a CPU, the other side: twin (masks), dense (no mask), or the file of another version"""
    reference: Literal["jax"] | None = None
    """also the published update, made again in JAX (needs jax and optax)"""


WIDTHS = (1.0, 2.0, 4.0, 5.0)  # of a table
GPU_SPARSITIES = (0.0, 0.9, 0.95)
NETWORKS = {"sparse": "ours", "masked": "masked dense twin", "dense": "dense"}
SIDES = {  # of a GPU: which network, run how
    "ours": ("sparse", "graph"),
    "ours, no graph": ("sparse", "eager"),
    "masked twin": ("masked", "eager"),
    "masked twin, compiled": ("masked", "compiled"),
    "dense": ("dense", "eager"),
    "dense, compiled": ("dense", "compiled"),
}
JAX_SIDES = {"JAX, as published": "as published", "JAX, nothing read": "nothing read"}
GPU_COLUMNS = {
    "ms": "{:.3f}",
    "copied_bytes": "{:.0f}",
    "peak_mib": "{:.0f}",
}


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


def import_file(path: str):
    """The module of an agent's file that is somewhere else."""
    spec = importlib.util.spec_from_file_location("other_version", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    if not hasattr(module, "Agent"):
        timing.fail(f"--against {path}: this is no agent's file")
    return module


def build(args: Args, side: str) -> tuple[Callable, dict[str, int]]:
    """A function that does one update of one side; and its weights by network."""
    other = "ours" if side == "ours" else args.against
    if other in ("ours", "twin", "dense"):
        module = timing.import_agent(f"{args.agent}_simba_sparse")
    else:
        module = import_file(other)
    timing.set_threads(module, args.threads)
    sparsity = 0.0 if other in ("twin", "dense") else args.sparsity
    flags = module.Args(width_scale=args.width_scale, sparsity=sparsity)
    agent = module.Agent(flags, args.obs_dim, args.action_dim, timing.CPU)
    if other == "twin" and args.sparsity > 0:
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
    for width_scale, sparsity in product(WIDTHS, (0.0, 0.8, 0.9, 0.95)):
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
    table = pd.DataFrame(results)
    print("\nThe table of README:\n")
    print_against_dense(table)
    return table


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
    other = {"twin": "masked dense twin", "dense": "dense"}.get(args.against, "other version")
    for side, name in (("twin", other), ("ours", "ours")):
        milliseconds = f"{name:<18}{found[side + '_ms']:9.1f} ms per update"
        print(f"{milliseconds}{found[side + '_mib']:9.0f} MiB at the peak")
    print(f"ratios of single turns: {found['time_low']:.3f} to {found['time_high']:.3f}")
    print(f"ratio time={found['time']:.3f} memory={found['memory']:.2f}")


def count_launches(args: Args) -> dict[str, int]:
    """What one update launches, for each kind of network, if all products are dense."""
    module = timing.import_agent(f"{args.agent}_simba_sparse")
    timing.set_threads(module, args.threads)
    sizes = (args.obs_dim, args.action_dim)
    flags = module.Args(width_scale=args.width_scale, sparsity=args.sparsity, sparse_kernel="dense")
    counts = {}
    for network, name in NETWORKS.items():
        agent = devices.make_agent(module, flags, network, timing.CPU, sizes)
        update = make_update(module, agent, *sizes, args.batch_size)
        update()  # makes moments and kept weights
        drawing = 1  # of noise, which is none of the update's
        counts[name] = devices.count(update).launches - drawing
    return counts


def print_launches(args: Args) -> None:
    counts = count_launches(args)
    print(plots.markdown_table(["network", "launches of one update"], list(counts.items())), end="")


# On a GPU


def gpu_flags(module, args: Args):
    """Of the agent whose updates are measured."""
    return module.Args(
        width_scale=args.width_scale,
        sparsity=args.sparsity,
        batch_size=args.batch_size,
        sparse_kernel="dense",  # the only one of a GPU
    )


def measure_sides(
    args: Args, sides: tuple[str, ...] = tuple(SIDES), backend: str = "inductor"
) -> Iterator[dict]:
    """A row for each side, of one width and sparsity; agents are built once for each network."""
    module = timing.import_agent(f"{args.agent}_simba_sparse")
    device = devices.choose(args.device)
    torch.set_float32_matmul_precision(args.matmul_precision)
    flags = gpu_flags(module, args)
    for network in NETWORKS:
        modes = {side: mode for side, (kind, mode) in SIDES.items() if kind == network}
        modes = {side: mode for side, mode in modes.items() if side in sides}
        if not modes:
            continue
        memory = devices.Memory(device)
        memory.start()
        agent = devices.make_agent(module, flags, network, device, (args.obs_dim, args.action_dim))
        for side, mode in modes.items():
            memory.peak()  # what building needed does not count
            found = measure_side(args, module, flags, agent, mode, backend)
            sparsity = 0.0 if network == "dense" else args.sparsity
            size = {"width_scale": args.width_scale, "sparsity": sparsity, "side": side}
            yield {**size, **found, "peak_mib": memory.peak()}
        del agent


def measure_side(args: Args, module, flags, agent, mode: str, backend: str) -> dict[str, float]:
    """Time and copies of what a decision learns."""
    device = devices.choose(args.device)
    flags = replace(flags, cuda_graph=mode == "graph")
    sizes = (args.obs_dim, args.action_dim)
    learner = devices.make_learner(module, flags, agent, device, sizes)
    compiling = mode == "compiled"
    with devices.compiled_losses(module, backend) if compiling else nullcontext():
        ms = devices.milliseconds(learner.learn, device, args.turn_seconds, args.turns)
        found = {"ms": ms / flags.updates_per_step}
        if not compiling:  # which PyTorch's counter would change
            found["copied_bytes"] = devices.count(learner.learn).copied_bytes
    return found


def profile_sides(args: Args) -> Iterator[dict]:
    """Launches, kernels and their ms in a decision of each side that is not compiled."""
    module = timing.import_agent(f"{args.agent}_simba_sparse")
    device = devices.choose(args.device)
    torch.set_float32_matmul_precision(args.matmul_precision)
    flags = gpu_flags(module, args)
    sizes = (args.obs_dim, args.action_dim)
    for side, (network, mode) in SIDES.items():
        if mode == "compiled":
            continue
        agent = devices.make_agent(module, flags, network, device, sizes)
        own = replace(flags, cuda_graph=mode == "graph")
        learner = devices.make_learner(module, own, agent, device, sizes)
        for _ in range(5):  # the fourth captures the graph
            learner.learn()
        yield {"side": side, **devices.profile_gpu(learner.learn, device)}


def measure_jax(args: Args, timeout: float | None = None) -> list[dict]:
    """Two rows of the published update, from a process of its own; RuntimeError if it fails."""
    names = ("width_scale", "sparsity", "obs_dim", "action_dim", "batch_size", "turn_seconds")
    flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    program = Path(__file__).with_name("jax_update.py")
    on_cpu = args.device == "cpu"
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if on_cpu else {})
    done = subprocess.run(
        [sys.executable, program, *flags],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(said[-1].removeprefix("error: "))
    found = json.loads(done.stdout.splitlines()[-1])
    if not on_cpu and "cpu" in found["device"].lower():
        raise RuntimeError("JAX is installed here without CUDA")
    size = {"width_scale": args.width_scale, "sparsity": args.sparsity}
    return [
        {**size, "side": side, "ms": found[how], "peak_mib": found["peak_mib"]}
        for side, how in JAX_SIDES.items()
    ]


def sides_of(sparsity: float) -> tuple[str, ...]:
    """What a table measures there: a masked network costs the same at every sparsity."""
    if sparsity == 0:
        return ("ours", "dense", "dense, compiled")
    if sparsity == min(GPU_SPARSITIES[1:]):
        return ("ours", "ours, no graph", "masked twin", "masked twin, compiled")
    return ("ours",)


def gpu_rows(args: Args) -> Iterator[dict]:
    """Rows of one width and sparsity, or with --table of all."""
    sizes = product(WIDTHS, GPU_SPARSITIES) if args.table else [(args.width_scale, args.sparsity)]
    for width_scale, sparsity in sizes:
        one = replace(args, width_scale=width_scale, sparsity=sparsity)
        yield from measure_sides(one, sides_of(sparsity) if args.table else tuple(SIDES))
        if args.reference and (not args.table or len(sides_of(sparsity)) > 1):
            try:
                yield from measure_jax(one)
            except RuntimeError as error:
                timing.fail(f"--reference jax: {error}")


def print_gpu_row(row: dict) -> None:
    size = [f"{row['width_scale']:g}", f"{row['sparsity']:g}", row["side"]]
    missing = float("nan")
    numbers = [text.format(row.get(name, missing)) for name, text in GPU_COLUMNS.items()]
    timing.print_cells(*size, *numbers)


def print_gpu_table(args: Args) -> pd.DataFrame:
    """Measures on the GPU; prints a row of a Markdown table for each side."""
    device = devices.choose(args.device)
    print(f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}")
    timing.print_header("width scale", "sparsity", "side", *GPU_COLUMNS)
    rows = []
    for row in gpu_rows(args):
        print_gpu_row(row)
        rows.append(row)
    return pd.DataFrame(rows)


def print_profiles(args: Args) -> None:
    """Of a decision; the last thing to do, since nothing should be timed after it."""
    print(f"\nA decision at width scale {args.width_scale:g}, sparsity {args.sparsity:g}:\n")
    timing.print_header("side", "launches", "kernels", "ms of kernels")
    for row in profile_sides(args):
        cells = (f"{row['launches']}", f"{row['kernels']}", f"{row['gpu_ms']:.3f}")
        timing.print_cells(row["side"], *cells)


def draw_gpu(table: pd.DataFrame) -> Figure:
    """Time and peak memory of an update against width: a line for each side and sparsity."""
    figure, axes = plots.make_grid(1, 2, 4.6, 3.6)
    sides = list(dict.fromkeys(table.side))
    styles = plots.line_styles(sides)
    panels = {"ms": "ms per update", "peak_mib": "peak memory, MiB"}
    for ax, (column, title) in zip(axes[0], panels.items()):
        ax.set(xscale="log", xlabel="width scale", title=title)
        if table[column].isna().all():  # memory, in a dry run on a CPU
            continue
        for (side, sparsity), rows in table.groupby(["side", "sparsity"], sort=False):
            published = side in JAX_SIDES
            colour = plots.PUBLISHED["color"] if published else plots.sparsity_colour(sparsity)
            style = {"color": colour, "ls": styles[side], "ms": 4}
            is_dense = SIDES.get(side, ("",))[0] == "dense"
            label = side if is_dense else f"{side}, {plots.sparsity_name(sparsity)}"
            ax.plot(rows.width_scale, rows[column], marker="o", label=label, **style)
        ax.set_yscale("log")
        plots.mark_values(ax, sorted(table.width_scale.unique()))
    handles, _ = axes[0, 0].get_legend_handles_labels()
    plots.add_legend(figure, handles, "")
    return figure


def print_jax(args: Args) -> None:
    try:
        for row in measure_jax(args):
            print(f"{row['side']:<18}{row['ms']:9.1f} ms per update")
    except RuntimeError as error:
        timing.fail(f"--reference jax: {error}")


def write_table(args: Args, measure: Callable, draw_it: Callable, name: str) -> None:
    """Measures; with --output, writes the table and its figure."""
    if args.output:
        runs.make_folder(args.output)  # known to be there before all is measured
    table = measure(args)
    if args.output:
        with runs.new_files(args.output) as folder:
            table.to_csv(folder / f"{name}.csv", index=False, float_format="%.5g")
            plots.save(draw_it(table), folder, name)
        print(f"{name}.csv, .png and .svg are in {args.output}")


def main(args: Args) -> None:
    if args.reference and args.agent != "sac":
        timing.fail(f"--reference {args.reference}: SAC's update only; give --agent sac")
    on_cpu = args.device != "cuda"
    if args.reference and (args.profile or args.launches or (args.table and on_cpu)):
        timing.fail(
            f"--reference {args.reference}: one row, or a table of a GPU; "
            "leave out --profile, --launches and (on a CPU) --table"
        )
    file = Path(args.against)
    if args.against not in ("twin", "dense") and not (file.is_file() and file.suffix == ".py"):
        timing.fail(f"--against {file}: neither twin nor dense, and no Python file")
    no_row = args.table or args.profile or args.launches or args.device == "cuda"
    if args.against != "twin" and no_row:
        timing.fail(
            f"--against {args.against}: one row on a CPU; "
            "leave out --table, --profile, --launches and --device"
        )
    devices.choose(args.device)
    if args.profile:
        profile(args)
    elif args.launches:
        print_launches(args)
    elif args.device == "cuda":
        write_table(args, print_gpu_table, draw_gpu, "gpu_update_costs")
        print_profiles(args)
    elif args.table:
        write_table(args, print_table, draw, "update_costs")
    else:
        print_row(args)
        if args.reference:
            print_jax(args)


if __name__ == "__main__":
    runs.start(main, Args)
