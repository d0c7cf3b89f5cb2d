# docs: docs/sac_simba_sparse.md
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "numpy==2.4.6",
#     "numba==0.68.1",
#     "gymnasium==1.4.0",
#     "shimmy==2.0.1",
#     "dm-control==1.0.50",
#     "mujoco==3.17.0",
#     "scipy==1.17.1",
#     "tyro==1.0.17",
#     "tqdm==4.70.1",
#     "filelock==3.20.0",
#     "matplotlib==3.11.2",
#     "imageio==2.38.1",
#     "imageio-ffmpeg==0.8.1",
#     "tensorboard==2.21.0",
#     "wandb==0.31.0",
# ]
# ///
"""Soft Actor-Critic with SimBa networks and static sparsity.

Before training, a random set of weights is removed once; the survivors are trained as usual. SAC learns a
stochastic policy and one Q-function from replayed transitions and maximises return plus entropy, whose price
(the temperature) is learned as well. Actor and critic are SimBa networks: pre-LayerNorm residual blocks with
a 4x inverted bottleneck, a last LayerNorm, and running observation statistics in front.

Papers: Network Sparsity Unlocks the Scaling Potential of Deep RL (Ma, Li et al., ICML 2025);
SimBa (Lee et al., 2024), arXiv:2410.09754; Soft Actor-Critic (Haarnoja et al., 2018), arXiv:1812.05905.

Differences from the official (JAX) code:
 1. A pruned weight is not stored. Values, gradients, AdamW moments and target network are vectors over the
    active weights, elementwise equal to training a masked dense network.
 2. Every layer keeps an exact number of weights (a random permutation); there, one Bernoulli draw a weight.
 3. Biases and LayerNorm parameters are always dense; there, Erdos-Renyi prunes them in very small networks.
 4. --actor-sparsity and --critic-sparsity are independent; there, a dense actor makes the critic dense.
 5. Actor and critic masks come from independent generators; there, both start from the run seed.
 6. The training environment is seeded anew at every reset from (seed, episode number), so that a resumed run
    repeats the uninterrupted one in any environment; there, one generator runs on.
 7. The replay buffer is no larger than the run needs.
"""

import copy
import csv
import hashlib
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import gymnasium as gym
import numba
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from scipy.stats import trim_mean
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # Experiment
    exp_name: str = "sac_simba_sparse"
    """first part of the run's name after the environment"""
    seed: int = 1
    """seed of networks, exploration, replay and environments"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto takes CUDA when there is one"""
    threads: int | None = None
    """CPU threads (default: all cores); a resumed run is bit-equal only with the same number"""
    runs_dir: str = "runs"
    """folder that holds one folder per run"""
    resume: bool = True
    """go on from the run's checkpoint; --no-resume moves the old run aside and starts afresh"""
    eval_only: bool = False
    """load this command's checkpoint, evaluate --final-eval-episodes episodes and stop"""
    capture_video: bool = False
    """write an mp4 of the first episode of the last evaluation (or of --eval-only)"""

    # Environment
    env_id: str = "dm_control/humanoid-run-v0"
    """any Gymnasium id with Box (or Dict of Box) observations and Box actions; dm_control/* through Shimmy"""
    action_repeat: int = 2
    """simulator frames per decision, rewards summed"""
    total_timesteps: int = 1_000_000
    """env steps of training (simulator frames, action repeat included)"""

    # Algorithm (Table 2 of the paper)
    learning_starts: int = 10_000
    """env steps of uniformly random actions before the first update"""
    updates_per_step: int = 2
    """gradient updates per decision (the replay ratio)"""
    batch_size: int = 256
    """transitions per update"""
    buffer_size: int = 1_000_000
    """largest number of transitions kept for replay"""
    gamma: float | None = None
    """discount; default: the TD-MPC2 heuristic from the episode length, 0.99 for 500 decisions"""
    tau: float = 0.005
    """target network: target <- tau * critic + (1 - tau) * target"""
    learning_rate: float = 1e-4
    """of actor, critic and temperature (AdamW)"""
    weight_decay: float = 1e-2
    """decoupled, on every active weight, bias and LayerNorm parameter; none on the temperature"""
    initial_temperature: float = 1e-2
    """alpha at the start"""
    clipped_double_q: bool = False
    """train two critics and use the smaller value"""
    reset_interval: int | None = None
    """env steps between resets: fresh parameters and optimisers, replay kept (Figure 6); default: never"""

    # Size and sparsity
    width_scale: float = 1.0
    """hidden units: actor 128 x scale, critic 512 x scale"""
    depth_scale: int = 1
    """residual blocks: actor 1 x scale, critic 2 x scale"""
    sparsity: float = 0.0
    """fraction of parameters removed from the actor and from the critic; 0 is the dense SimBa baseline"""
    actor_sparsity: float | None = None
    """of the actor alone (default: --sparsity)"""
    critic_sparsity: float | None = None
    """of the critic alone (default: --sparsity)"""
    sparsity_distribution: Literal["erdos_renyi", "uniform"] = "erdos_renyi"
    """how the network's sparsity is spread over its layers"""
    mask_seed: int | None = None
    """seed of the random pruning (default: --seed)"""
    sparse_kernel: Literal["auto", "packed", "dense"] = "auto"
    """how sparse layers multiply; auto: packed on CPU up to density 0.25, else dense"""

    # Logging
    eval_interval: int = 10_000
    """env steps between evaluations (the first at step 0)"""
    eval_episodes: int = 10
    """episodes of each evaluation, deterministic policy"""
    final_eval_episodes: int = 100
    """episodes of the last evaluation and of --eval-only"""
    diagnostics_interval: int = 10_000
    """env steps between measurements of rank, dormancy and norms; 0: never"""
    track: bool = False
    """log to Weights & Biases as well (WANDB_MODE=offline needs no account)"""
    wandb_project: str = "sparse_zoo"
    """project of --track"""
    wandb_entity: str | None = None
    """team of --track"""

    # Checkpoints
    checkpoint_interval: int = 10_000
    """env steps between checkpoints, each written at the next end of an episode"""


# Flags that say where and how a run is executed, not what it computes: all others are in the run's hash.
EXECUTION_FLAGS = {
    *("device", "threads", "runs_dir", "resume", "eval_only", "capture_video", "sparse_kernel"),
    *("track", "wandb_project", "wandb_entity", "checkpoint_interval"),
}


# === SPARSE LAYERS (identical in every file) ===
def erdos_renyi(shapes: dict[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
    """Sparsity of each layer under the Erdos-Renyi rule: density proportional to sum(shape) / prod(shape).

    The budget counts all parameters. Parameters with one dimension (biases, norms) and layers whose density
    would pass 1 are dense, and the others pay for them. Works for linear (out, in) and convolution
    (out, in, k_h, k_w) weights. Raises ValueError if the dense parameters alone exceed the budget.
    Source: Mocanu et al. 2018, Evci et al. 2020 (arXiv:1911.11134); section 2.2 of the paper.
    """
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    budget = (1 - sparsity) * sum(size.values())
    dense = {name for name, shape in shapes.items() if len(shape) == 1}
    while len(dense) < len(shapes):
        rest = [name for name in shapes if name not in dense]
        epsilon = (budget - sum(size[name] for name in dense)) / sum(sum(shapes[name]) for name in rest)
        if epsilon <= 0:
            raise ValueError(f"sparsity {sparsity} is out of reach: biases and norms alone hold more weights")
        density = {name: epsilon * sum(shapes[name]) / size[name] for name in rest}
        overfull = {name for name in rest if density[name] > 1}
        if not overfull:
            return {name: 0.0 if name in dense else 1 - density[name] for name in shapes}
        dense |= overfull
    return dict.fromkeys(shapes, 0.0)


def uniform(shapes: dict[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
    """The same sparsity in every weight matrix; parameters with one dimension stay dense."""
    return {name: 0.0 if len(shape) == 1 else sparsity for name, shape in shapes.items()}


@numba.njit(parallel=True, fastmath=True, cache=True)
def packed_weight_gradient(row_ptr, col, grad_t, x_t, out):
    """out[k] = <grad_t[row of k], x_t[col[k]]> for every active weight k, two at a time."""
    for row in numba.prange(len(row_ptr) - 1):
        grad, last = grad_t[row], row_ptr[row + 1] - 1
        for k in range(row_ptr[row], last + 1, 2):
            x0, x1 = x_t[col[k]], x_t[col[min(k + 1, last)]]
            dot0, dot1 = np.float32(0), np.float32(0)
            for b in range(len(grad)):
                dot0 += grad[b] * x0[b]
                dot1 += grad[b] * x1[b]
            out[k] = dot0
            out[min(k + 1, last)] = dot1


@numba.njit(parallel=True, cache=True)
def gather(values, index, out):
    """out[k] = values[index[k]]"""
    for k in numba.prange(len(index)):
        out[k] = values[index[k]]


def call_numba(kernel, *tensors: torch.Tensor) -> torch.Tensor:
    """Calls a numba kernel on the memory of CPU tensors; returns the last one, which it fills."""
    kernel(*(tensor.detach().numpy() for tensor in tensors))
    return tensors[-1]


class PackedLinear(torch.autograd.Function):
    """y = x W^T + b for a W of which only the active entries exist, in time proportional to their number.

    With x^T of shape (in, batch), row r of W x^T is a weighted sum of rows of x^T: the operation that
    embedding_bag implements. The gradient of x is the same sum over the transposed pattern.
    """

    @staticmethod
    def forward(ctx, x, values, bias, layer):
        x_t = x.t().contiguous()
        y_t = F.embedding_bag(
            layer.col, x_t, layer.row_ptr, mode="sum", per_sample_weights=values, include_last_offset=True
        )
        y_t += bias[:, None]
        ctx.save_for_backward(x_t, values)
        ctx.layer = layer
        return y_t.t()  # a view: relu and the next packed layer go on in this layout without a copy

    @staticmethod
    def backward(ctx, grad):
        (x_t, values), layer, grad_t = ctx.saved_tensors, ctx.layer, grad.t().contiguous()
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            by_column = call_numba(gather, values, layer.by_column, torch.empty_like(values))
            grad_x = F.embedding_bag(
                layer.row, grad_t, layer.col_ptr, mode="sum", per_sample_weights=by_column, include_last_offset=True
            ).t()
        if ctx.needs_input_grad[1]:
            grad_values = torch.empty_like(values)
            call_numba(packed_weight_gradient, layer.row_ptr, layer.col, grad_t, x_t, grad_values)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_t.sum(1)
        return grad_x, grad_values, grad_bias, None


class SparseLinear(nn.Module):
    """A linear layer that stores its active weights only: `values` (nnz,), dense `bias` (out,).

    `active` (nnz,) holds their places row by row, row * in_features + column, so that the dense matrix is
    `zeros(out * in)` with `values` written at `active`.
    """

    def __init__(self, linear: nn.Linear, active: torch.Tensor, kernel: str):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.kernel = kernel
        self.values = nn.Parameter(linear.weight.detach().flatten()[active])
        self.bias = linear.bias
        self.register_buffer("active", active.int())
        if kernel == "packed":
            row, col = active // self.in_features, active % self.in_features
            by_column = torch.argsort(col, stable=True)
            for name, index in (
                ("col", col),
                ("row_ptr", self.pointers(row, self.out_features)),
                ("row", row[by_column]),
                ("col_ptr", self.pointers(col, self.in_features)),
                ("by_column", by_column),
            ):
                self.register_buffer(name, index.int(), persistent=False)
        else:
            self.register_buffer("index", active, persistent=False)

    @staticmethod
    def pointers(group: torch.Tensor, groups: int) -> torch.Tensor:
        """Where each group starts in a list sorted by group, and where the last one ends: (groups + 1,)."""
        return torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(group, minlength=groups).cumsum(0)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, in) -> (batch, out)"""
        if self.kernel == "packed":
            return PackedLinear.apply(x, self.values, self.bias, self)
        weight = self.values.new_zeros(self.out_features * self.in_features)
        weight = weight.index_copy(0, self.index, self.values).view(self.out_features, self.in_features)
        return F.linear(x, weight, self.bias)


def sparsify(
    network: nn.Module, sparsity: float, distribution: str, mask_seed: int, kernel: str, device: torch.device
) -> list[dict]:
    """Prunes a network once, at random: every nn.Linear that loses weights becomes a SparseLinear.

    The surviving weights keep their initial values (no rescaling). `kernel` is auto, packed or dense.
    Returns the layer table, one row a layer: name, shape, density, active, total.
    Raises ValueError if the sparsity cannot be reached. Source: section 2.2 of the paper.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    layer_sparsity = {"erdos_renyi": erdos_renyi, "uniform": uniform}[distribution](shapes, sparsity)
    generator = torch.Generator().manual_seed(mask_seed)
    table = []
    for name, linear in list(network.named_modules()):
        if not isinstance(linear, nn.Linear):
            continue
        total = linear.weight.numel()
        count = max(1, round((1 - layer_sparsity[name + ".weight"]) * total))
        table.append({"layer": name, "shape": list(linear.weight.shape), "active": count, "total": total})
        if count == total:
            continue
        active = torch.randperm(total, generator=generator)[:count].sort().values
        layer_kernel = kernel
        if kernel == "auto":
            layer_kernel = "packed" if device.type == "cpu" and count <= 0.25 * total else "dense"
        network.set_submodule(name, SparseLinear(linear, active, layer_kernel))
    linear_weights = sum(row["total"] for row in table)
    other = sum(math.prod(shape) for shape in shapes.values()) - linear_weights
    table.append({"layer": "biases and norms", "shape": [other], "active": other, "total": other})
    network.to(device)
    return table


# === END SPARSE LAYERS ===


# === DIAGNOSTICS (identical in every file) ===
def layer_outputs(encoder: nn.Module, *inputs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Runs an encoder; returns its features (batch, hidden) and the output of each of its linear layers."""
    outputs, handles = {}, []
    for name, module in encoder.named_modules():
        if isinstance(module, (nn.Linear, SparseLinear)):
            handles.append(module.register_forward_hook(lambda _, __, y, name=name: outputs.update({name: y})))
    with torch.no_grad():
        features = encoder(*inputs)
    for handle in handles:
        handle.remove()
    return features, outputs


def stable_rank(features: torch.Tensor, mass: float = 0.99, threshold: float = 0.01) -> tuple[int, int]:
    """Two effective ranks of features (batch, hidden).

    First: how many leading singular values hold `mass` of their sum (Kumar et al. 2021; official code).
    Second: how many singular values of features / sqrt(batch) exceed `threshold` (section 4.1 of the paper,
    which gives no threshold; this one and the scaling are those of Lyle et al. 2022, arXiv:2204.09560).
    """
    singular = torch.linalg.svdvals(features.float())
    cumulative = singular.cumsum(0) / singular.sum()
    return int((cumulative < mass).sum()) + 1, int((singular / math.sqrt(len(features)) > threshold).sum())


def dormant_ratio(outputs: list[torch.Tensor], tau: float = 0.1) -> float:
    """Percentage of units, over all layers (batch, units), whose mean |output| is at most tau of the layer's.

    Equation 1 of the paper; Sokar et al. 2023, arXiv:2302.12902.
    """
    scores = [y.abs().mean(0) for y in outputs]
    dormant = sum(int((score / (score.mean() + 1e-9) <= tau).sum()) for score in scores)
    return 100 * dormant / sum(len(score) for score in scores)


def l2_norm(tensors) -> float:
    """L2 norm over all entries of some tensors."""
    return math.sqrt(sum(float(tensor.detach().double().square().sum()) for tensor in tensors))


def diagnose(encoder: nn.Module, inputs: torch.Tensor, parameters: list, gradients: list) -> dict[str, float]:
    """The plasticity measurements of section 4 for one network, on one batch of inputs to its encoder."""
    features, outputs = layer_outputs(encoder, inputs)
    hidden = [F.relu(y) for name, y in outputs.items() if name.endswith("up")]
    rank_99, rank_threshold = stable_rank(features)
    return {
        "srank_99": rank_99,
        "srank_threshold": rank_threshold,
        "dormant_ratio": dormant_ratio(list(outputs.values())),
        "dormant_ratio_relu": dormant_ratio(hidden),
        "active_units": sum(float((h > 0).float().mean(0).sum()) for h in hidden) / sum(h.shape[1] for h in hidden),
        "grad_norm": l2_norm(gradients),
        "param_norm": l2_norm(parameters),
        "feature_norm": float(features.norm(dim=1).mean()),
    }


# === END DIAGNOSTICS ===


# === RUNS (identical in every file) ===
def fail(message: str) -> NoReturn:
    """Ends the program with one line for a person and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def run_directory(args: "Args") -> Path:
    """runs/<env>__<exp_name>__<hash>__s<seed>; the hash covers the flags that change results."""
    flags = {name: value for name, value in asdict(args).items() if name not in EXECUTION_FLAGS}
    digest = hashlib.sha256(json.dumps(flags, sort_keys=True).encode()).hexdigest()[:8]
    return Path(args.runs_dir) / f"{args.env_id.replace('/', '-')}__{args.exp_name}__{digest}__s{args.seed}"


def open_run(args: "Args") -> tuple[Path, dict | None]:
    """Creates or finds the run of these flags, locks it, and returns its folder and checkpoint (or None).

    Exits with code 2 if the folder cannot be written, another process works in it, or the checkpoint is
    damaged or of other flags. The lock lasts as long as the process.
    """
    run_dir = run_directory(args)
    if args.eval_only and not run_dir.exists():
        fail(f"there is no run of these flags to evaluate: {run_dir} does not exist")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        open_run.lock = FileLock(run_dir / ".lock")
        open_run.lock.acquire(timeout=0)
        if not args.resume and not args.eval_only and (run_dir / "args.json").exists():
            old = next(path for n in range(1, 10**6) if not (path := Path(f"{run_dir}.old{n}")).exists())
            old.mkdir()
            for path in run_dir.iterdir():
                if path.name != ".lock":
                    path.rename(old / path.name)
            print(f"the previous run of these flags is now in {old}")
    except Timeout:
        fail(f"another process is working on this run ({run_dir}); stop it, or change --seed or --exp-name")
    except OSError as error:
        fail(f"cannot write to {run_dir} ({error.strerror}); choose another folder with --runs-dir")
    path = run_dir / "checkpoint.pt"
    if not path.exists():  # killed between the two renames of save_checkpoint
        path = run_dir / "checkpoint.previous.pt"
    if not path.exists():
        if args.eval_only:
            fail(f"there is no checkpoint yet in {run_dir}; train first with the same command")
        return run_dir, None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        fail(
            f"{path} is damaged ({type(error).__name__}) and was left as it is; move it away to go on from "
            "checkpoint.previous.pt, or start afresh with --no-resume"
        )
    for name, value in asdict(args).items():
        if name not in EXECUTION_FLAGS and checkpoint["args"].get(name) != value:
            flag = "--" + name.replace("_", "-")
            fail(f"{path} was made with {flag} {checkpoint['args'].get(name)}, not {value}; nothing was changed")
    return run_dir, checkpoint


def write_atomically(path: Path, write) -> None:
    """Calls write(file) on a temporary file, syncs it to disk, then renames it to `path`."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(run_dir: Path, args: "Args", state: dict) -> None:
    """Writes checkpoint.pt so that a kill at any moment leaves a whole one; the last one is kept beside it."""
    state = {**state, "args": asdict(args), "generators": generator_states()}
    path = run_dir / "checkpoint.pt"
    new = run_dir / "checkpoint.new.pt"
    write_atomically(new, lambda file: torch.save(state, file))
    if path.exists():
        os.replace(path, run_dir / "checkpoint.previous.pt")
    os.replace(new, path)


def generator_states() -> dict:
    """The state of every global random generator, in types that torch.load reads with weights_only."""
    kind, keys, *position = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *position],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_generators(states: dict) -> None:
    kind, keys, *position = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *position))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


def write_args(run_dir: Path, args: "Args", layers: dict[str, list[dict]]) -> None:
    """args.json: flags, versions, git revision and layer tables of a run."""
    packages = ("torch", "numpy", "numba", "gymnasium", "shimmy", "dm-control", "mujoco")
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        revision = None
    record = {
        "args": asdict(args),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "git_revision": revision,
        "layers": layers,
    }
    write_atomically(run_dir / "args.json", lambda file: file.write(json.dumps(record, indent=1).encode()))


def print_layers(layers: dict[str, list[dict]]) -> None:
    """The layer table of each network: shape, density, active / total weights."""
    for network, rows in layers.items():
        active, total = sum(row["active"] for row in rows), sum(row["total"] for row in rows)
        print(f"{network:<26}{'shape':>14}{'density':>9}{'active':>13} /{'total':>12}")
        for row in rows:
            shape = " x ".join(str(size) for size in row["shape"])
            density = row["active"] / row["total"]
            print(f"  {row['layer']:<24}{shape:>14}{density:>9.4f}{row['active']:>13,} /{row['total']:>12,}")
        print(f"  {'all':<24}{'':>14}{active / total:>9.4f}{active:>13,} /{total:>12,}")


class Metrics:
    """Writes metrics to metrics.csv (one row each, flushed), TensorBoard and, with --track, W&B."""

    def __init__(self, run_dir: Path, args: "Args", resume_at: int, env_step: int):
        self.file = open(run_dir / "metrics.csv", "a+", newline="")
        self.file.truncate(resume_at)  # rows after the checkpoint will be written again
        self.rows = csv.writer(self.file)
        if resume_at == 0:
            self.rows.writerow(["env_step", "agent_step", "update_step", "metric", "value"])
        self.tensorboard = SummaryWriter(run_dir, purge_step=env_step if resume_at else None)
        self.wandb = None
        if args.track:
            import wandb

            entity, name = args.wandb_entity, run_dir.name
            self.wandb = wandb.init(
                project=args.wandb_project, entity=entity, id=name, config=asdict(args), dir=run_dir, resume="allow"
            )

    def log(self, env_step: int, agent_step: int, update_step: int, values: dict[str, float]) -> None:
        for metric, value in values.items():
            self.rows.writerow([env_step, agent_step, update_step, metric, repr(float(value))])
            self.tensorboard.add_scalar(metric, float(value), env_step)
        self.file.flush()
        if self.wandb:
            self.wandb.log({**values, "env_step": env_step})

    def position(self) -> int:
        """Bytes of metrics.csv so far, safely on disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self.file.close()
        self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def draw_learning_curve(run_dir: Path, title: str) -> None:
    """learning_curve.png from metrics.csv: return of training episodes and of evaluations (mean, std)."""
    import matplotlib.figure

    points: dict[str, list] = {}
    with open(run_dir / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            points.setdefault(row["metric"], []).append((int(row["env_step"]), float(row["value"])))
    axes = (figure := matplotlib.figure.Figure((6, 4), layout="constrained")).subplots()
    if "episode/return" in points:
        axes.plot(*zip(*points["episode/return"]), color="0.75", lw=0.8, label="training episodes")
    if "eval/return_mean" in points:
        steps, mean = (np.array(column) for column in zip(*points["eval/return_mean"]))
        std = np.array([value for _, value in points["eval/return_std"]])
        axes.plot(steps, mean, marker="o", ms=3, label="evaluation, mean and std over episodes")
        axes.fill_between(steps, mean - std, mean + std, alpha=0.2)
    axes.set(xlabel="env steps", ylabel="return", title=title)
    axes.legend(frameon=False)
    figure.savefig(run_dir / "learning_curve.png", dpi=150)


# === END RUNS ===


class ActionRepeat(gym.Wrapper):
    """Repeats each action, sums the rewards and stops at the end of the episode."""

    def __init__(self, env: gym.Env, repeat: int):
        super().__init__(env)
        self.repeat = repeat

    def step(self, action):
        total = 0.0
        for _ in range(self.repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


def make_env(env_id: str, action_repeat: int, render_mode: str | None = None) -> tuple[gym.Env, int | None]:
    """One environment with flat observations and actions in [-1, 1], and its episode length in decisions."""
    if env_id.startswith("dm_control/"):
        import shimmy

        gym.register_envs(shimmy)
    try:
        env = gym.make(env_id, render_mode=render_mode, disable_env_checker=True)
    except gym.error.Error as error:
        fail(f"--env-id {env_id}: {error}")
    if not isinstance(env.action_space, gym.spaces.Box) or not np.isfinite(env.action_space.low).all():
        fail(f"--env-id {env_id} has actions {env.action_space}; this agent needs bounded Box actions")
    boxes = getattr(env.observation_space, "spaces", {"": env.observation_space}).values()
    if not all(isinstance(space, gym.spaces.Box) for space in boxes):
        fail(f"--env-id {env_id} has observations {env.observation_space}; this agent needs Box or Dict of Box")
    length = env.spec.max_episode_steps or (1000 if env_id.startswith("dm_control/") else None)
    env = gym.wrappers.RescaleAction(gym.wrappers.FlattenObservation(env), np.float32(-1), np.float32(1))
    return ActionRepeat(env, action_repeat), length and math.ceil(length / action_repeat)


def env_seed(*key: int) -> int:
    """An independent environment seed for each key."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def heuristic_gamma(length: int | None) -> float:
    """TD-MPC2: (length / 5 - 1) / (length / 5) for episodes of `length` decisions, within [0.95, 0.995]."""
    return 0.995 if length is None else min(max((length / 5 - 1) / (length / 5), 0.95), 0.995)


class ObservationNorm(nn.Module):
    """Running mean and variance of all observations seen in training (SimBa; float64, no clipping)."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim, dtype=torch.float64))
        self.register_buffer("var", torch.ones(obs_dim, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))

    def update(self, obs: torch.Tensor) -> None:
        """Takes one observation (obs_dim,) into the statistics."""
        delta, new_count = obs - self.mean, self.count + 1
        self.mean += delta / new_count
        self.var.copy_((self.var * self.count + delta.square() * self.count / new_count) / new_count)
        self.count.copy_(new_count)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return (obs - self.mean.float()) / (self.var + 1e-8).sqrt().float()


def orthogonal_linear(in_features: int, out_features: int) -> nn.Linear:
    linear = nn.Linear(in_features, out_features)
    nn.init.orthogonal_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def he_linear(in_features: int, out_features: int) -> nn.Linear:
    """He initialisation from a normal cut at 2 sigma, its variance corrected for the cut (JAX's he_normal)."""
    linear = nn.Linear(in_features, out_features)
    std = math.sqrt(2 / in_features) / 0.87962566103423978
    nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(linear.bias)
    return linear


class ResidualBlock(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden, eps=1e-6)
        self.up = he_linear(hidden, 4 * hidden)
        self.down = he_linear(4 * hidden, hidden)

    def forward(self, x):
        return x + self.down(F.relu(self.up(self.norm(x))))


class SimBa(nn.Sequential):
    """Linear -> residual blocks -> LayerNorm: (batch, in_features) -> (batch, hidden)."""

    def __init__(self, in_features: int, hidden: int, blocks: int):
        residual = [ResidualBlock(hidden) for _ in range(blocks)]
        super().__init__(orthogonal_linear(in_features, hidden), *residual, nn.LayerNorm(hidden, eps=1e-6))


class Actor(nn.Module):
    """Tanh-Gaussian policy."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int, blocks: int):
        super().__init__()
        self.encoder = SimBa(obs_dim, hidden, blocks)
        self.mean = orthogonal_linear(hidden, action_dim)
        self.log_std = orthogonal_linear(hidden, action_dim)

    def forward(self, obs):
        """obs (batch, obs_dim) -> mean and log std (batch, action_dim) before tanh; log std in [-10, 2]."""
        features = self.encoder(obs)
        return self.mean(features), -10 + 6 * (1 + torch.tanh(self.log_std(features)))

    def sample(self, obs, noise):
        """Action (batch, action_dim) for standard normal `noise` of that shape, and its log-probability (batch,)."""
        mean, log_std = self(obs)
        raw = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - 2 * (math.log(2) - raw - F.softplus(-2 * raw))
        return torch.tanh(raw), log_prob.sum(-1)


class Critic(nn.Module):
    """One Q-function, or two with --clipped-double-q."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int, blocks: int, count: int):
        super().__init__()
        self.encoders = nn.ModuleList(SimBa(obs_dim + action_dim, hidden, blocks) for _ in range(count))
        self.heads = nn.ModuleList(orthogonal_linear(hidden, 1) for _ in range(count))

    def forward(self, obs, action):
        """(batch, obs_dim), (batch, action_dim) -> Q-values (count, batch)"""
        x = torch.cat([obs, action], -1)
        return torch.stack([head(encoder(x)).squeeze(-1) for encoder, head in zip(self.encoders, self.heads)])


class Temperature(nn.Module):
    """alpha = exp(log_alpha), learned."""

    def __init__(self, initial: float):
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor(math.log(initial)))

    def forward(self):
        return self.log_alpha.exp()


class Batch(NamedTuple):
    """Transitions, all float32 with the batch first; terminated is 1 where the episode ended by itself."""

    obs: torch.Tensor
    action: torch.Tensor
    reward: torch.Tensor
    next_obs: torch.Tensor
    terminated: torch.Tensor


class ReplayBuffer:
    """A ring of raw transitions on the CPU, sampled uniformly with replacement."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int):
        shapes = ((obs_dim,), (action_dim,), (), (obs_dim,), ())
        self.data = Batch(*(torch.empty(capacity, *shape) for shape in shapes))
        self.capacity, self.added = capacity, 0

    def add(self, *transition) -> None:
        for column, value in zip(self.data, transition):
            column[self.added % self.capacity] = torch.as_tensor(value)
        self.added += 1

    def sample(self, batch_size: int, norm: ObservationNorm, generator: torch.Generator | None = None) -> Batch:
        """A batch on the device of `norm`, its observations normalised by today's statistics."""
        index = torch.randint(min(self.added, self.capacity), (batch_size,), generator=generator)
        batch = Batch(*(column[index].to(norm.mean.device) for column in self.data))
        return batch._replace(obs=norm(batch.obs), next_obs=norm(batch.next_obs))

    def state_dict(self) -> dict:
        return {"added": self.added, "data": [column[: self.added].clone() for column in self.data]}

    def load_state_dict(self, state: dict) -> None:
        self.added = state["added"]
        for column, saved in zip(self.data, state["data"]):
            column[: len(saved)] = saved


def actor_loss(actor, critic, alpha, obs, noise):
    """mean(alpha * log pi(a|s) - Q(s, a)) for a sampled with `noise`, and the entropy mean(-log pi)."""
    action, log_prob = actor.sample(obs, noise)
    return (alpha * log_prob - critic(obs, action).amin(0)).mean(), -log_prob.detach().mean()


def td_target(actor, target_critic, alpha, batch, gamma, noise):
    """r + gamma * (1 - terminated) * (Q_target(s', a') - alpha * log pi(a'|s')), (batch,)"""
    with torch.no_grad():
        action, log_prob = actor.sample(batch.next_obs, noise)
        value = target_critic(batch.next_obs, action).amin(0) - alpha * log_prob
        return batch.reward + gamma * (1 - batch.terminated) * value


def critic_loss(critic, batch, target):
    """Mean squared TD error, summed over the critics."""
    return (critic(batch.obs, batch.action) - target).square().mean(1).sum()


@dataclass
class Agent:
    actor: Actor
    critic: Critic
    target_critic: Critic
    temperature: Temperature
    actor_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer
    temperature_optimizer: torch.optim.Optimizer
    layers: dict[str, list[dict]]


def make_agent(args: Args, obs_dim: int, action_dim: int, device: torch.device) -> Agent:
    """Draws fresh networks from torch's generator and prunes them with masks from --mask-seed."""
    hidden, blocks = round(128 * args.width_scale), args.depth_scale
    actor = Actor(obs_dim, action_dim, hidden, blocks)
    critic = Critic(obs_dim, action_dim, 4 * hidden, 2 * blocks, 2 if args.clipped_double_q else 1)
    mask_seed = args.seed if args.mask_seed is None else args.mask_seed
    layers = {}
    for index, (name, network, sparsity) in enumerate(
        (("actor", actor, args.actor_sparsity), ("critic", critic, args.critic_sparsity))
    ):
        sparsity = args.sparsity if sparsity is None else sparsity
        how = (args.sparsity_distribution, env_seed(mask_seed, index), args.sparse_kernel, device)
        layers[name] = sparsify(network, sparsity, *how)
    # The target critic shares the critic's pattern: its buffers are the same tensors.
    target_critic = copy.deepcopy(critic, {id(buffer): buffer for buffer in critic.buffers()})
    target_critic.requires_grad_(False)
    temperature = Temperature(args.initial_temperature).to(device)

    def adamw(parameters, weight_decay):
        return torch.optim.AdamW(parameters, args.learning_rate, weight_decay=weight_decay, fused=True)

    return Agent(
        actor,
        critic,
        target_critic,
        temperature,
        actor_optimizer=adamw(actor.parameters(), args.weight_decay),
        critic_optimizer=adamw(critic.parameters(), args.weight_decay),
        temperature_optimizer=adamw(temperature.parameters(), 0.0),
        layers=layers,
    )


def stateful(agent: Agent, norm: ObservationNorm, replay: ReplayBuffer) -> dict:
    """Everything that a checkpoint stores by its state_dict."""
    parts = {name: part for name, part in vars(agent).items() if hasattr(part, "state_dict")}
    return {**parts, "norm": norm, "replay": replay}


def update(agent: Agent, batch: Batch, noise, next_noise, gamma: float, tau: float) -> dict[str, torch.Tensor]:
    """One gradient update of everything on a normalised batch; noise (batch, action_dim) is standard normal."""
    # Actor, against the critic of the last update, whose weights need no gradient here
    agent.critic.requires_grad_(False)
    loss_actor, entropy = actor_loss(agent.actor, agent.critic, agent.temperature().detach(), batch.obs, noise)
    agent.actor_optimizer.zero_grad()
    loss_actor.backward()
    agent.actor_optimizer.step()
    agent.critic.requires_grad_(True)

    # Temperature, towards an entropy of -|A|/2
    loss_alpha = agent.temperature() * (entropy + 0.5 * noise.shape[-1])
    agent.temperature_optimizer.zero_grad()
    loss_alpha.backward()
    agent.temperature_optimizer.step()

    # Critic, with the new actor and the new temperature
    alpha = agent.temperature().detach()
    target = td_target(agent.actor, agent.target_critic, alpha, batch, gamma, next_noise)
    loss_critic = critic_loss(agent.critic, batch, target)
    agent.critic_optimizer.zero_grad()
    loss_critic.backward()
    agent.critic_optimizer.step()

    with torch.no_grad():
        for slow, fast in zip(agent.target_critic.parameters(), agent.critic.parameters()):
            slow.lerp_(fast, tau)
    return {
        "losses/actor_loss": loss_actor.detach(),
        "losses/critic_loss": loss_critic.detach(),
        "losses/td_target": target.mean(),
        "losses/alpha": alpha,
        "losses/entropy": entropy,
    }


def diagnostics(agent: Agent, batch: Batch, noise, next_noise, gamma: float) -> dict[str, float]:
    """Plasticity measurements of actor and critic on a normalised batch."""
    alpha = agent.temperature().detach()
    target = td_target(agent.actor, agent.target_critic, alpha, batch, gamma, next_noise)
    losses = {
        "actor": actor_loss(agent.actor, agent.critic, alpha, batch.obs, noise)[0],
        "critic": critic_loss(agent.critic, batch, target),
    }
    encoders = {"actor": agent.actor.encoder, "critic": agent.critic.encoders[0]}
    inputs = {"actor": batch.obs, "critic": torch.cat([batch.obs, batch.action], -1)}
    measured = {}
    for name, network in (("actor", agent.actor), ("critic", agent.critic)):
        parameters = list(network.parameters())
        gradients = torch.autograd.grad(losses[name], parameters)
        for metric, value in diagnose(encoders[name], inputs[name], parameters, gradients).items():
            measured[f"diagnostics/{name}_{metric}"] = value
    return measured


def act(agent: Agent, norm: ObservationNorm, obs: np.ndarray, noise: torch.Tensor | None) -> np.ndarray:
    """The action (action_dim,) for one raw observation: sampled with `noise`, or the policy's mode if None."""
    device = norm.mean.device
    with torch.no_grad():
        obs = norm(torch.as_tensor(obs, dtype=torch.float32, device=device))[None]
        if noise is None:
            return torch.tanh(agent.actor(obs)[0])[0].cpu().numpy()
        return agent.actor.sample(obs, noise[None].to(device))[0][0].cpu().numpy()


def evaluate(agent: Agent, norm: ObservationNorm, env: gym.Env, episodes: int, seed_key: tuple, video=None):
    """Returns of some episodes of the deterministic policy, (episodes,); the first is filmed if `video` is set."""
    returns = np.zeros(episodes)
    frames = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=env_seed(*seed_key, episode))
        done = False
        while not done:
            if video and episode == 0:
                frames.append(env.render())
            obs, reward, terminated, truncated, _ = env.step(act(agent, norm, obs, None))
            returns[episode] += reward
            done = terminated or truncated
    if video:
        import imageio

        video.parent.mkdir(exist_ok=True)
        imageio.mimwrite(video, frames, fps=30, macro_block_size=None)
    return returns


def summary(returns: np.ndarray) -> dict[str, float]:
    """Mean, std and interquartile mean of episode returns."""
    return {"mean": returns.mean(), "std": returns.std(), "iqm": trim_mean(returns, 0.25)}


def check_args(args: Args) -> torch.device:
    """Ends the program if a flag makes no sense; returns the device."""
    for name in ("sparsity", "actor_sparsity", "critic_sparsity"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < 1:
            fail(f"--{name.replace('_', '-')} {value}: must be at least 0 and below 1")
    if not args.width_scale * 128 >= 1:
        fail(f"--width-scale {args.width_scale}: must be at least 1/128, one hidden unit in the actor")
    minimum = {"depth_scale": 1, "action_repeat": 1, "total_timesteps": args.action_repeat, "batch_size": 1}
    minimum |= {"updates_per_step": 1, "buffer_size": 1, "eval_episodes": 1, "final_eval_episodes": 1}
    minimum |= {"eval_interval": 1, "checkpoint_interval": 1, "diagnostics_interval": 0, "learning_starts": 0}
    for name, least in minimum.items():
        if getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: this machine or this build of PyTorch has no CUDA; use --device cpu")
    if args.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(args.device)


if __name__ == "__main__":
    args = tyro.cli(Args)
    device = check_args(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    if args.capture_video and sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    env, length = make_env(args.env_id, args.action_repeat)
    eval_env, _ = make_env(args.env_id, args.action_repeat, "rgb_array" if args.capture_video else None)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    gamma = heuristic_gamma(length) if args.gamma is None else args.gamma
    run_dir, checkpoint = open_run(args)
    if checkpoint and checkpoint["finished"] and not args.eval_only:
        print(f"this run is finished; its results are in {run_dir} (--no-resume runs it again)")
        sys.exit(0)

    torch.manual_seed(args.seed)
    try:
        agent = make_agent(args, obs_dim, action_dim, device)
    except ValueError as error:
        fail(str(error))
    norm = ObservationNorm(obs_dim).to(device)
    total_steps, learning_starts, eval_steps, diagnostics_steps, checkpoint_steps, reset_steps = (
        math.ceil((env_steps or 0) / args.action_repeat)  # from env steps to decisions
        for env_steps in (
            *(args.total_timesteps, args.learning_starts, args.eval_interval, args.diagnostics_interval),
            *(args.checkpoint_interval, args.reset_interval),
        )
    )
    replay = ReplayBuffer(min(args.buffer_size, total_steps), obs_dim, action_dim)
    agent_step = update_step = episode = metrics_bytes = 0
    if checkpoint:
        for name, part in stateful(agent, norm, replay).items():
            part.load_state_dict(checkpoint[name])
        restore_generators(checkpoint["generators"])
        agent_step, update_step, episode, metrics_bytes = checkpoint["counters"]
    if args.eval_only:
        video = run_dir / "videos" / "eval_only.mp4" if args.capture_video else None
        returns = evaluate(agent, norm, eval_env, args.final_eval_episodes, (args.seed, 2, agent_step), video)
        print("  ".join(f"{name} {value:.1f}" for name, value in summary(returns).items()), f"at {agent_step=}")
        sys.exit(0)

    print_layers(agent.layers)
    print(f"{run_dir}" + (f": going on from env step {agent_step * args.action_repeat}" if checkpoint else ""))
    write_args(run_dir, args, agent.layers)
    metrics = Metrics(run_dir, args, metrics_bytes, agent_step * args.action_repeat)
    bar = tqdm(total=args.total_timesteps, initial=agent_step * args.action_repeat, unit=" env steps")
    bar.mininterval = 0.5 if sys.stderr.isatty() else 30
    losses, saved_step, episode_over, started, started_at = {}, agent_step, True, time.time(), agent_step

    def log(values: dict) -> None:
        metrics.log(agent_step * args.action_repeat, agent_step, update_step, values)

    def log_evaluation(prefix: str, episodes: int, seed_key: int, video: Path | None = None) -> None:
        returns = evaluate(agent, norm, eval_env, episodes, (args.seed, seed_key, agent_step), video)
        log({f"{prefix}/return_{name}": value for name, value in summary(returns).items()})
        bar.set_postfix_str(f"{prefix} return {returns.mean():.0f}")

    def save(finished: bool) -> None:
        counters = (agent_step, update_step, episode, metrics.position())
        parts = {name: part.state_dict() for name, part in stateful(agent, norm, replay).items()}
        save_checkpoint(run_dir, args, {**parts, "counters": counters, "finished": finished})

    if agent_step == 0:
        log_evaluation("eval", args.eval_episodes, 1)
    while agent_step < total_steps:
        if episode_over:
            if agent_step - saved_step >= checkpoint_steps:
                save(finished=False)
                saved_step = agent_step
            obs, _ = env.reset(seed=env_seed(args.seed, 0, episode))
            episode += 1
            episode_start, episode_return = agent_step, 0.0

        # ACT
        norm.update(torch.as_tensor(obs, dtype=torch.float32, device=device))
        if agent_step < learning_starts:
            action = (2 * torch.rand(action_dim) - 1).numpy()
        else:
            action = act(agent, norm, obs, torch.randn(action_dim))
        next_obs, reward, terminated, truncated, _ = env.step(action)
        replay.add(obs, action, reward, next_obs, terminated)
        obs, episode_return, episode_over = next_obs, episode_return + reward, terminated or truncated
        agent_step += 1

        # LEARN
        if agent_step >= learning_starts:
            for _ in range(args.updates_per_step):
                batch = replay.sample(args.batch_size, norm)
                noise, next_noise = torch.randn(2, args.batch_size, action_dim).to(device)
                losses = update(agent, batch, noise, next_noise, gamma, args.tau)
                update_step += 1
            if not all(torch.isfinite(loss) for loss in losses.values()):
                print(f"error: the loss is not finite at {agent_step=}; the last checkpoint is kept", file=sys.stderr)
                sys.exit(3)
            if reset_steps and agent_step % reset_steps == 0:
                agent = make_agent(args, obs_dim, action_dim, device)

        # MEASURE
        if agent_step % eval_steps == 0:
            log_evaluation("eval", args.eval_episodes, 1)
        if update_step and diagnostics_steps and agent_step % diagnostics_steps == 0:
            generator = torch.Generator().manual_seed(env_seed(args.seed, 3, agent_step))
            batch = replay.sample(args.batch_size, norm, generator)
            noise, next_noise = torch.randn(2, args.batch_size, action_dim, generator=generator).to(device)
            log(diagnostics(agent, batch, noise, next_noise, gamma))
        bar.update(args.action_repeat)
        if episode_over:
            speed = (agent_step - started_at) * args.action_repeat / (time.time() - started)
            log({"episode/return": episode_return, "episode/length": agent_step - episode_start})
            log({name: float(loss) for name, loss in losses.items()} | {"time/env_steps_per_second": speed})
            draw_learning_curve(run_dir, args.env_id)

    video = run_dir / "videos" / "final.mp4" if args.capture_video else None
    log_evaluation("final", args.final_eval_episodes, 2, video)
    save(finished=True)
    draw_learning_curve(run_dir, args.env_id)
    metrics.close()
    bar.close()
    print(f"finished; checkpoint, metrics.csv and learning_curve.png are in {run_dir}")
