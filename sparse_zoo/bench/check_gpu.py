"""One command for a machine with a GPU: what runs there, whether it is exact, how fast it is.

    python sparse_zoo/bench/check_gpu.py --output gpu_check
    python sparse_zoo/bench/check_gpu.py --cpu-dry-run    # every part in a tiny form, on a CPU

It is made to end within 8 minutes, needs no network, and of environments only Gymnasium's Pendulum.
Each part is caught: one that fails says so, and the next begins. After --seconds nothing begins: no
part, and no further step of the one that runs. All numbers are printed at the end, and are in the
folder of --output: numbers.csv and gpu_update_costs.csv after each part, at the end a figure and
failures.txt.

SAC and DDPG run whole. DrQ-v2 and DER need packages for their environments; of them, updates from
the same state are made twice and compared. Stream AC runs on CPUs only.
"""

import gc
import importlib.metadata
import math
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

import timing
import bench_der
import bench_drqv2
import bench_loop
import bench_update
import devices
import numpy as np
import pandas as pd
import torch
from timing import plots, runs

SIMBA = ("sac_simba_sparse", "ddpg_simba_sparse")
PIXELS = ("drqv2_sparse", "der_impala_sparse")
PACKAGES = ("torch", "numpy", "numba", "gymnasium", "tyro", "jax", "optax")


@dataclass
class Args:
    output: str = "gpu_check"
    """folder of the numbers"""
    seconds: Annotated[float, "1 <= x <= 3600"] = 360.0
    """no part, and no step of a part, begins later than this; what has begun goes on"""
    cpu_dry_run: bool = False
    """every part in a tiny form on the CPU"""
    parts: tuple[str, ...] = ()
    """names of the parts to run (default: all)"""


@dataclass
class Check:
    """What is measured where, how large it is, and what was found."""

    device: torch.device
    folder: Path
    until: float
    tiny: bool
    part: str = ""
    rows: list[dict] = field(default_factory=list)
    updates: list[dict] = field(default_factory=list)

    def time_left(self) -> float:
        return self.until - time.monotonic()

    def in_time(self, steps: Iterator | list) -> Iterator:
        """The steps of a part, as long as there is time to begin one."""
        for step in steps:
            if self.time_left() <= 0:
                self.note("left out for time", str(step), "")
                return
            yield step

    def note(self, what: str, value, unit: str = "") -> None:
        value = f"{value:.4g}" if isinstance(value, float) else value
        self.rows.append({"part": self.part, "what": what, "value": value, "unit": unit})
        print(f"{self.part}: {what}: {value} {unit}", flush=True)

    def ms(self, function: Callable) -> float:
        """Milliseconds of a call."""
        seconds, turns = (0.0, 1) if self.tiny else (0.2, 3)
        return devices.milliseconds(function, self.device, seconds, turns)

    def widths(self, *widths: float) -> tuple[float, ...]:
        return (0.125,) if self.tiny else widths

    def flags(self, module, **given):
        """Flags of an agent of SAC or DDPG, small in a dry run."""
        if self.tiny:
            given = {**given, "batch_size": 8, "width_scale": 0.125}
        return module.Args(**{"sparsity": 0.9, "sparse_kernel": "dense", **given})


# What parts and tests do


def train_briefly(module, flags, device: torch.device, decisions: int) -> dict[str, torch.Tensor]:
    """What some decisions make of an agent: parameters, moments, losses and the last action."""
    agent = devices.make_agent(module, flags, "sparse", device)
    learner = devices.make_learner(module, flags, agent, device)
    torch.manual_seed(7)
    for obs in islice(devices.observations(devices.OBS_DIM), decisions):
        action = devices.decide(learner, obs)
    losses = {f"losses.{name}": loss.cpu() for name, loss in learner.losses.items()}
    return devices.tensors(agent) | losses | {"action": torch.from_numpy(action)}


def make_decision(module, flags, device: torch.device) -> Callable[[], np.ndarray]:
    """A decision of a learner that has been warmed up: its graphs, if any, are captured."""
    agent = devices.make_agent(module, flags, "sparse", device)
    learner = devices.make_learner(module, flags, agent, device)
    obs = next(devices.observations(devices.OBS_DIM))
    for _ in range(6):
        devices.decide(learner, obs)
    return lambda: devices.decide(learner, obs)


def one_update(module, flags, device: torch.device) -> dict[str, torch.Tensor]:
    """Losses and gradients of one update."""
    flags = replace(flags, updates_per_step=1, cuda_graph=False)
    agent = devices.make_agent(module, flags, "sparse", device)
    learner = devices.make_learner(module, flags, agent, device)
    torch.manual_seed(7)
    learner.learn()
    found = {f"losses.{name}": loss.cpu() for name, loss in learner.losses.items()}
    for network in ("actor", "critic"):
        for name, parameter in getattr(agent, network).named_parameters():
            found[f"{network}.{name}"] = parameter.grad.cpu()
    return found


def errors_of(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative error of each tensor."""
    return {name: devices.relative_error(ours[name], theirs[name]) for name in theirs}


def pixel_updates(name: str, device: torch.device, tiny: bool) -> dict[str, torch.Tensor]:
    """Parameters and moments of DrQ-v2 or DER after three updates, the same at each call."""
    torch.manual_seed(0)
    size = {"width_scale": 0.0625 if tiny else 1.0, "sparsity": 0.8, "sparse_kernel": "dense"}
    batch_size = 2 if tiny else 32
    with tempfile.TemporaryDirectory() as folder:
        if name == "drqv2_sparse":
            drq = bench_drqv2.drq
            flags = drq.Args(sparsify_encoder=True, **size)
            agent = drq.Agent(flags, bench_drqv2.ACTION_DIM, device)
            replay = bench_drqv2.make_replay(folder, 300)
            shape = (2, batch_size, bench_drqv2.ACTION_DIM)
            for _ in range(3):
                batch = replay.sample(batch_size, device)
                drq.update(agent, batch, *drq.clipped_noise(flags, shape, 0, device), flags.tau)
        else:
            der = bench_der.der
            agent = der.Agent(der.Args(**size), bench_der.ACTIONS, device)
            replay = bench_der.make_replay(folder, 300)
            for _ in range(3):
                batch = replay.sample(batch_size, device)
                noises = (agent.network.draw_noise(), agent.network.draw_noise())
                _, losses = der.update(agent, batch, *noises)
                replay.set_priorities(batch.place, losses.cpu())
    return devices.tensors(agent)


class Process:
    """A run of an agent in a process of its own."""

    def __init__(self, agent: str, runs_dir: Path, flags: list[str]):
        self.runs_dir = runs_dir
        runs_dir.mkdir(exist_ok=True)
        self.said = runs_dir / "said.txt"
        command = [sys.executable, runs.AGENTS / f"{agent}.py", *flags, "--runs-dir", runs_dir]
        with open(self.said, "w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def checkpoint(self) -> Path | None:
        return next(self.runs_dir.glob("*/checkpoint.pt"), None)

    def kill_after_a_checkpoint(self, seconds: float) -> None:
        """Waits at most some seconds for it."""
        end = time.monotonic() + seconds
        while self.checkpoint() is None:
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise RuntimeError(f"no checkpoint to be killed after: {self.last_line()}")
            time.sleep(0.01)
        self.process.kill()
        if self.process.wait() == 0:
            raise RuntimeError("the run ended before it could be killed")

    def finish(self, seconds: float) -> None:
        """Waits at most some seconds for the end."""
        try:
            code = self.process.wait(seconds)
        finally:
            self.process.kill()
        if code:
            raise RuntimeError(f"exit code {code}: {self.last_line()}")

    def last_line(self) -> str:
        return (self.said.read_text().strip().splitlines() or ["it said nothing"])[-1]

    def results(self) -> tuple[dict, list[str]]:
        """The last checkpoint, without what holds times, and metrics.csv without time/*."""
        state = torch.load(self.checkpoint(), weights_only=True, map_location="cpu")
        del state["args"], state["file"]
        state["counters"] = state["counters"][:3]  # the others are of metrics.csv
        lines = (self.checkpoint().parent / "metrics.csv").read_text().splitlines()
        return state, [line for line in lines if ",time/" not in line]


def parts_that_differ(ours: dict, theirs: dict) -> list[str]:
    """Names of the parts of two checkpoints that are not equal bit for bit."""
    found = []
    for name in sorted(ours.keys() | theirs.keys()):
        pair = [torch.utils._pytree.tree_leaves(state.get(name)) for state in (ours, theirs)]
        equal = len(pair[0]) == len(pair[1]) and all(map(same_leaf, *pair))
        found += [] if equal else [name]
    return found


def same_leaf(x, y) -> bool:
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return devices.same(x, y)
    return x == y


def killed_and_whole(agent: str, folder: Path, flags: list[str], seconds: float) -> list[str]:
    """What differs between a run that was killed and went on and one that was not."""
    whole = Process(agent, folder / f"{agent}_whole", flags)
    try:
        killed = Process(agent, folder / f"{agent}_killed", flags)
        killed.kill_after_a_checkpoint(seconds)
        killed = Process(agent, folder / f"{agent}_killed", flags)
        killed.finish(seconds)
        whole.finish(seconds)
    finally:
        whole.process.kill()
    if "going on" not in killed.said.read_text():
        raise RuntimeError("the killed run did not go on from its checkpoint")
    (state, metrics), (expected, expected_metrics) = killed.results(), whole.results()
    differing = parts_that_differ(state, expected)
    return differing + (["metrics.csv"] if metrics != expected_metrics else [])


# Parts


def versions(check: Check) -> None:
    """What is installed, and what the card can do at most."""
    check.note("Python", sys.version.split()[0])
    for name in PACKAGES:
        try:
            check.note(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            check.note(name, "not installed")
    if not check.tiny:
        properties = torch.cuda.get_device_properties(check.device)
        check.note("card", properties.name)
        check.note("memory", properties.total_memory / 2**30, "GiB")
        check.note("CUDA", str(torch.version.cuda))
    size = 2**10 if check.tiny else 2**28
    source = torch.ones(size, device=check.device)
    target = torch.empty_like(source)
    ms = check.ms(partial(target.copy_, source))
    check.note("copy, read and written", 2 * 4 * size / ms / 1e9, "TB/s")
    del source, target  # 2 GiB
    rows, inner, columns = (8, 16, 32) if check.tiny else (256, 2048, 8192)
    for dtype, precision in (
        (torch.float32, "highest"),
        (torch.float32, "high"),
        (torch.bfloat16, "high"),
    ):
        torch.set_float32_matmul_precision(precision)
        a = torch.ones(rows, inner, device=check.device, dtype=dtype)
        b = torch.ones(inner, columns, device=check.device, dtype=dtype)
        ms = check.ms(partial(torch.matmul, a, b))
        speed = 2 * rows * inner * columns / ms / 1e9
        kind = str(dtype).removeprefix("torch.")
        check.note(f"product {rows} x {inner} x {columns}, {kind}, {precision}", speed, "TFLOP/s")


def graph(check: Check) -> None:
    """Whether a CUDA graph computes what the same calls compute one by one."""
    for name, width in check.in_time([(name, w) for name in SIMBA for w in check.widths(0.25, 1)]):
        module = timing.import_agent(name)
        flags = check.flags(module, width_scale=width)
        found = [
            train_briefly(
                module, replace(flags, cuda_graph=on), check.device, 8 if check.tiny else 15
            )
            for on in (True, False, False)
        ]
        for what, ours in (("graph and eager", found[0]), ("eager twice", found[2])):
            differing = devices.differing(ours, found[1])
            told = f"{len(differing)} of {len(found[1])} tensors differ" if differing else "equal"
            check.note(f"{name}, width {width:g}: {what}, bit for bit", told)


def waits(check: Check) -> None:
    """Where Python waits for the GPU in a decision; what a decision copies."""
    for name in check.in_time(SIMBA):
        module = timing.import_agent(name)
        (width,) = check.widths(1.0)
        decision = make_decision(module, check.flags(module, width_scale=width), check.device)
        counted = devices.count(decision)
        check.note(f"{name}: copies between devices", counted.copies)
        check.note(f"{name}: bytes copied", counted.copied_bytes)
        if not check.tiny:
            places = devices.find_waits(decision)
            check.note(f"{name}: waits of a decision", f"{len(places)}: {', '.join(places)}")
        check.note(f"{name}: a decision without environment", check.ms(decision), "ms")
        del decision  # its graphs end before others begin


RESUMED = (
    "--env-id Pendulum-v1 --total-timesteps 2000 --learning-starts 300 --batch-size 64"
    " --width-scale 0.5 --sparsity 0.8 --eval-interval 1000 --eval-episodes 1"
    " --final-eval-episodes 1 --diagnostics-interval 250 --checkpoint-interval 400 --threads 2"
)
RESUMED_TINY = (
    "--env-id Pendulum-v1 --total-timesteps 600 --learning-starts 380 --batch-size 4"
    " --width-scale 0.0625 --sparsity 0.8 --eval-interval 600 --eval-episodes 1"
    " --final-eval-episodes 1 --diagnostics-interval 400 --checkpoint-interval 400 --threads 1"
)


def resume(check: Check) -> None:
    """Whether a run that was killed ends as one that was not, on Pendulum."""
    for name in check.in_time(SIMBA[:1] if check.tiny else SIMBA):
        flags = (RESUMED_TINY if check.tiny else RESUMED).split()
        flags += ["--device", check.device.type]
        with tempfile.TemporaryDirectory() as folder:
            patience = 900 if check.tiny else 50  # a CPU may be busy with other things
            differing = killed_and_whole(name, Path(folder), flags, patience)
        told = f"differ: {', '.join(differing)}" if differing else "equal"
        check.note(f"{name}: killed and whole, bit for bit", told)


def update_args(check: Check, width: float, sparsity: float) -> bench_update.Args:
    """Short turns: one GPU, nothing else on it."""
    short = {"turns": 1, "turn_seconds": 0.0, "batch_size": 8}
    short = short if check.tiny else {"turns": 3, "turn_seconds": 0.2}
    args = bench_update.Args(width_scale=width, sparsity=sparsity, device=check.device.type)
    return replace(args, **short)


def note_update(check: Check, row: dict) -> None:
    check.updates.append(row)
    size = f"width {row['width_scale']:g}, sparsity {row['sparsity']:g}, {row['side']}"
    units = {"ms": "ms an update", "peak_mib": "MiB at the peak"}
    for name, unit in units.items():
        if not math.isnan(row[name]):  # a CPU's memory is not known
            check.note(size, float(row[name]), unit)


def updates(check: Check) -> None:
    """Time and memory of updates: ours, masked, dense; not compiled, which takes long."""
    sizes = [
        (width, sparsity)
        for width in check.widths(1.0, 4.0, 5.0)
        for sparsity in bench_update.GPU_SPARSITIES
    ]
    for width, sparsity in check.in_time(sizes):
        sides = [side for side in bench_update.sides_of(sparsity) if "compiled" not in side]
        for row in bench_update.measure_sides(update_args(check, width, sparsity), tuple(sides)):
            note_update(check, row)


def jax(check: Check) -> None:
    """The published update, made again in JAX."""
    try:
        importlib.metadata.version("jax"), importlib.metadata.version("optax")
    except importlib.metadata.PackageNotFoundError as missing:
        check.note("not measured", f"{missing.name} is not installed")
        return
    sizes = [(width, s) for s in (0.9, 0.0) for width in check.widths(1.0, 4.0, 5.0)]
    for width, sparsity in check.in_time(sizes[:1] if check.tiny else sizes):
        try:
            rows = bench_update.measure_jax(update_args(check, width, sparsity), timeout=60)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            reason = " ".join(str(error).split())
            check.note(f"width {width:g}, sparsity {sparsity:g}: not measured", reason)
            continue
        for row in rows:
            note_update(check, row)


def loop(check: Check) -> None:
    """Env steps per second of whole training loops on Pendulum, and where their time goes."""
    cases = {
        "sac": bench_loop.Args(agent="sac"),
        "sac, no overlap": bench_loop.Args(agent="sac", overlap=False),
        "sac, no graph": bench_loop.Args(agent="sac", cuda_graph=False),
        "ddpg": bench_loop.Args(agent="ddpg"),
        "sac, width 4": bench_loop.Args(agent="sac", width_scale=4.0),
    }
    size = {"env_id": "Pendulum-v1", "device": check.device.type, "threads": 4}
    if check.tiny:
        size |= {"width_scale": 0.125, "batch_size": 8, "warm_up": 10, "decisions": 10}
        size |= {"threads": 1}
        cases = {name: cases[name] for name in ("sac", "ddpg")}
    for name in check.in_time(cases):
        args = replace(cases[name], **size)
        spent = bench_loop.measure(args)
        check.note(name, bench_loop.steps_per_second(args, spent), "env steps per second")
        for part, seconds in spent.items():
            check.note(f"{name}: {part}", 1000 * seconds / args.decisions, "ms a decision")


def precision(check: Check) -> None:
    """How far losses and gradients of one update are from those of the CPU."""
    for name in check.in_time(SIMBA):
        module = timing.import_agent(name)
        (width,) = check.widths(1.0)
        flags = check.flags(module, width_scale=width)
        torch.set_float32_matmul_precision("highest")
        expected = one_update(module, flags, timing.CPU)
        for level in ("highest", "high"):
            torch.set_float32_matmul_precision(level)
            errors = errors_of(one_update(module, flags, check.device), expected)
            worst = max(errors, key=errors.get)
            check.note(f"{name}, {level}: largest relative error ({worst})", errors[worst])


def pixels(check: Check) -> None:
    """Whether the same three updates of DrQ-v2 and DER give the same numbers twice."""
    for name in check.in_time(PIXELS):
        first, second = (pixel_updates(name, check.device, check.tiny) for _ in range(2))
        differing = devices.differing(first, second)
        told = f"{len(differing)} of {len(first)} tensors differ" if differing else "equal"
        check.note(f"{name}: the same updates twice, bit for bit", told)
        if differing:
            worst = max(errors_of(first, second).values())
            check.note(f"{name}: largest relative difference", worst)


def compiled(check: Check) -> None:
    """Time of updates whose losses went through torch.compile, the slowest part to set up."""
    backend = "aot_eager" if check.tiny else "inductor"
    sides = [(side, 0.9) for side in bench_update.SIDES if "compiled" in side]
    cases = [(width, *case) for width in check.widths(4.0, 5.0, 1.0) for case in sides]
    for width, side, sparsity in check.in_time(cases[:1] if check.tiny else cases):
        args = update_args(check, width, sparsity)
        for row in bench_update.measure_sides(args, (side,), backend):
            note_update(check, row)


def profiles(check: Check) -> None:
    """Launches and kernels of a decision. The last part: nothing is timed after a profile."""
    (width,) = check.widths(1.0)
    for row in bench_update.profile_sides(update_args(check, width, 0.9)):
        side = row.pop("side")
        for what, number in row.items():
            check.note(f"{side}: {what} of a decision", float(number))


PARTS = {
    part.__name__: part
    for part in (
        versions,
        graph,
        waits,
        resume,
        updates,
        jax,
        loop,
        precision,
        pixels,
        compiled,
        profiles,
    )
}


def write(check: Check) -> None:
    """What is known so far, into the folder."""
    with runs.new_files(check.folder) as folder:
        pd.DataFrame(check.rows).to_csv(folder / "numbers.csv", index=False)
        if check.updates:
            table = pd.DataFrame(check.updates)
            table.to_csv(folder / "gpu_update_costs.csv", index=False, float_format="%.5g")


def draw(check: Check) -> None:
    """The figure of the updates."""
    if check.updates:
        with runs.new_files(check.folder) as folder:
            figure = bench_update.draw_gpu(pd.DataFrame(check.updates))
            plots.save(figure, folder, "gpu_update_costs")


def main(args: Args) -> None:
    unknown = set(args.parts) - PARTS.keys()
    if unknown:
        timing.fail(f"--parts {' '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    device = devices.choose("cpu" if args.cpu_dry_run else "cuda")
    if args.cpu_dry_run:
        torch.set_num_threads(1)
    until = time.monotonic() + args.seconds
    check = Check(device, runs.make_folder(args.output), until, args.cpu_dry_run)
    failures = []
    for name, part in PARTS.items():
        if args.parts and name not in args.parts:
            continue
        check.part = name
        if check.time_left() <= 0:
            check.note("left out for time", "")
            continue
        start = time.monotonic()
        torch.set_float32_matmul_precision("high")  # as agents do, whatever parts before have set
        try:
            part(check)
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and error.code not in (2, 3):  # Ctrl-C
                raise
            failures.append(f"{name}: {''.join(traceback.format_exception(error))}")
            check.note("FAILED", " ".join(f"{type(error).__name__}: {error}".split()))
            if device.type == "cuda":  # a capture that fails leaves its own stream behind
                torch.cuda.set_stream(torch.cuda.default_stream())
                check.note("memory in later parts", "not reliable after an error: run them again")
        gc.collect()  # an error held agent and graph, and left them in a circle
        check.note("took", time.monotonic() - start, "s")
        write(check)
    try:
        draw(check)
    except (Exception, SystemExit) as error:
        failures.append(f"figure: {''.join(traceback.format_exception(error))}")
    (check.folder / "failures.txt").write_text("\n".join(failures))
    print()
    print(pd.DataFrame(check.rows).to_string(index=False, header=False))
    print(f"these numbers are in {check.folder}")
    if failures:
        timing.fail(f"{len(failures)} parts failed: see failures.txt there", code=1)


if __name__ == "__main__":
    runs.start(main, Args)
