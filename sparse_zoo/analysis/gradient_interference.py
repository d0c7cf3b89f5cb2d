"""Gradient interference: do the gradients of single transitions align or conflict? (Figure 9 of the paper)

    python sparse_zoo/analysis/gradient_interference.py runs/<a dense run> runs/<a sparse run>

For k transitions of a run's replay, C[i, j] = <g_i, g_j> / (|g_i| |g_j|), where g_i is the gradient of the loss of
transition i alone (Equation 2 of the paper; Lyle et al. 2023, arXiv:2303.01486). 1 means that i and j pull the network
the same way, -1 opposite ways, and 0 that a small step for one leaves the loss of the other alone. Draws C for actor
and critic, before and after training, and writes their summaries to a CSV file.

The text of the paper says neither which k, which loss, nor how the transitions are ordered. Here:
 1. k = 256, one training batch, drawn without replacement (a transition drawn twice would align with itself).
 2. Gradients are taken over everything that is trained: active weights, biases and LayerNorm parameters.
 3. The losses are those of training. Actor: alpha * log pi(a|s) - Q(s, a) with the entropy term for SAC, -Q(s, a) for
    DDPG, with the critic fixed. Critic: the squared TD error, summed over the critics; the target is fixed.
 4. "Before" is the run's seed built again: the same weights and masks, the same alpha. "After" is the checkpoint.
 5. Both see the same transitions, noise and observation statistics (the final ones), so that they differ in the
    networks only: actor, critic, target critic and, for SAC, alpha. Another run has another replay.
 6. Rows and columns are in order of collection, oldest first, in all panels of a run. Nothing is sorted by similarity,
    which would find blocks in any matrix.
 7. A transition without gradient (DDPG clips actions, and a clipped action has none) has no cosine: grey, left out of
    the summaries and counted there.

No gradient is ever formed: k of them would fill 112 GB at width scale 5. One backward pass over the batch gives input x
and output gradient delta of each layer for each transition (transitions do not mix: there is no batch norm). A dense
layer's gradient is the outer product of the two, so its part of <g_i, g_j> is (delta_i . delta_j) (x_i . x_j). A sparse
layer has only some entries of that product; they are computed and summed chunk by chunk.
"""

import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ddpg_simba_sparse as ddpg
import sac_simba_sparse as sac

CPU = torch.device("cpu")
CHUNK = 2**13  # active weights at a time: k * CHUNK floats, 8 MB for 256 transitions


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders of SAC or DDPG, one row of the figure each"""
    samples: int = 256
    """transitions k"""
    seed: int = 0
    """of the choice of transitions and of the noise on their actions"""
    output: Path = Path("results/gradient_interference")
    """folder for gradient_interference.csv, .png and .svg"""
    threads: int | None = None
    """CPU threads (default: all cores)"""


def record_layers(
    network: nn.Module, compute_loss: Callable
) -> list[tuple[nn.Module, torch.Tensor, torch.Tensor]]:
    """Each layer with parameters, its input x (k, in) and the gradient delta (k, out) of the loss at its output."""
    calls, handles = [], []
    for module in network.modules():
        if list(module.parameters(recurse=False)):
            handles.append(
                module.register_forward_hook(
                    lambda module, x, y: calls.append((module, x[0].detach(), y))
                )
            )
    loss = compute_loss()
    for handle in handles:
        handle.remove()
    deltas = torch.autograd.grad(loss, [y for _, _, y in calls])
    return [(module, x, delta) for (module, x, _), delta in zip(calls, deltas)]


def sparse_products(
    layer: nn.Module, x: torch.Tensor, delta: torch.Tensor, chunk: int
) -> torch.Tensor:
    """The inner products (k, k) of the gradients delta[i, row] * x[i, col] over the active weights (row, col)."""
    x_t, delta_t = x.t().contiguous(), delta.t().contiguous()
    products = x.new_zeros(len(x), len(x), dtype=torch.float64)
    for active in layer.active.split(chunk):
        gradient_t = delta_t[active // layer.shape[1]] * x_t[active % layer.shape[1]]  # (chunk, k)
        products += gradient_t.t() @ gradient_t
    return products


def gradient_products(
    network: nn.Module, compute_loss: Callable, chunk: int = CHUNK
) -> torch.Tensor:
    """The inner products <g_i, g_j> (k, k) of the k transitions' gradients over all parameters of a network.

    `compute_loss` takes the batch through the network once and returns the mean of the k losses, or any multiple.
    """
    total = torch.zeros((), dtype=torch.float64)
    for layer, x, delta in record_layers(network, compute_loss):
        of_biases = delta @ delta.t()
        if isinstance(layer, nn.Linear):
            of_weights = of_biases * (x @ x.t())
        elif isinstance(layer, nn.LayerNorm):
            gradient = delta * F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
            of_weights = gradient @ gradient.t()
        elif isinstance(layer, (sac.SparseLinear, ddpg.SparseLinear)):
            of_weights = sparse_products(layer, x, delta, chunk)
        else:
            raise TypeError(f"no rule for the gradients of {type(layer).__name__}")
        total = total + of_biases + of_weights
    return total


def cosines(products: torch.Tensor) -> np.ndarray:
    """Inner products (k, k) -> cosines; NaN in rows and columns of zero gradients."""
    norm = products.diagonal().sqrt()
    return (products / norm / norm[:, None]).numpy()


def measure(module, agent, batch, noise, next_noise, gamma: float) -> dict[str, np.ndarray]:
    """The cosine matrices (k, k) of actor and critic on a normalised batch, for an agent of `module`."""
    alpha = [agent.alpha().detach()] if module is sac else []
    target = module.td_target(agent.actor, agent.target_critic, *alpha, batch, gamma, next_noise)

    def actor_loss():
        loss = module.actor_loss(agent.actor, agent.critic, *alpha, batch.obs, noise)
        return loss[0] if module is sac else loss  # SAC returns its entropy too

    def critic_loss():
        return module.critic_loss(agent.critic, batch, target)

    losses = {"actor": actor_loss, "critic": critic_loss}
    return {
        name: cosines(gradient_products(getattr(agent, name), loss))
        for name, loss in losses.items()
    }


def summarize(matrix: np.ndarray) -> dict[str, float]:
    """Mean |cosine| and share of negative cosines off the diagonal, and how many transitions have no gradient."""
    pairs = matrix[~np.eye(len(matrix), dtype=bool)]
    pairs = pairs[~np.isnan(pairs)]
    mean_abs, negative = (
        (np.abs(pairs).mean(), (pairs < 0).mean()) if len(pairs) else (np.nan, np.nan)
    )
    return {
        "mean_abs": mean_abs,
        "negative": negative,
        "no_gradient": int(np.isnan(matrix.diagonal()).sum()),
    }


def read_run(run_dir: Path, samples: int) -> tuple:
    """The folder of a run, its agent's module, its flags and its checkpoint; ends the program if it cannot serve."""
    path = run_dir / "checkpoint.pt"
    if not path.exists():
        sac.fail(f"no checkpoint.pt in {run_dir}; give the folder of a run")
    try:
        checkpoint = torch.load(path, map_location=CPU, weights_only=True, mmap=True)
    except Exception as error:
        sac.fail(f"{path} is damaged ({type(error).__name__})")
    if (
        not isinstance(checkpoint, dict)
        or not {"args", "actor", "critic", "replay", "norm"} <= checkpoint.keys()
    ):
        sac.fail(f"{path} is not of sac_simba_sparse.py or ddpg_simba_sparse.py")
    if not checkpoint["finished"]:
        sac.fail(f"{path} was written before the end of training; run the run's command again")
    module = sac if "temperature" in checkpoint else ddpg
    try:
        args = replace(module.Args(**checkpoint["args"]), device="cpu", sparse_kernel="dense")
    except TypeError as error:
        sac.fail(f"{path} is of another version of {module.__name__}.py ({error})")
    if samples > (filled := len(checkpoint["replay"]["columns"][0])):
        sac.fail(f"--samples {samples}: {run_dir} has {filled} transitions in its replay")
    return run_dir, module, args, checkpoint


def measure_run(
    run_dir: Path, module, args, checkpoint: dict, samples: int, seed: int
) -> tuple[str, dict[tuple[str, str], np.ndarray], list[dict]]:
    """The title of a run, its matrices by network and stage, and their summaries."""
    env = module.make_env(args)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    gamma = module.default_gamma(env, args.action_repeat) if args.gamma is None else args.gamma

    replay, generator = checkpoint["replay"], torch.Generator().manual_seed(seed)
    filled = len(replay["columns"][0])
    age = torch.randperm(filled, generator=generator)[:samples].sort().values
    index = (
        replay["added"] + age
    ) % filled  # a full ring's oldest transition is the one to be overwritten next
    norm = module.ObservationNorm(obs_dim, CPU)
    norm.load_state_dict(checkpoint["norm"])
    batch = module.Batch(*(column[index] for column in replay["columns"]))
    batch = batch._replace(obs=norm(batch.obs), next_obs=norm(batch.next_obs))
    noise_std = 1.0 if module is sac else args.exploration_noise
    noise, next_noise = noise_std * torch.randn(2, samples, action_dim, generator=generator)

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    agent = module.Agent(args, obs_dim, action_dim, CPU)
    before = measure(module, agent, batch, noise, next_noise, gamma)
    try:
        for name in (
            "actor",
            "critic",
            "target_critic",
            *(["temperature"] if module is sac else []),
        ):
            getattr(agent, name).load_state_dict(checkpoint[name])
    except (ValueError, RuntimeError) as error:
        sac.fail(f"{run_dir}: {str(error).splitlines()[0]}")
    after = measure(module, agent, batch, noise, next_noise, gamma)

    sparsity = [
        args.sparsity if own is None else own for own in (args.actor_sparsity, args.critic_sparsity)
    ]
    env_step = checkpoint["counters"][0] * args.action_repeat
    facts = {
        "run": run_dir.resolve().name,
        "agent": "SAC" if module is sac else "DDPG",
        "env_id": args.env_id,
    }
    facts |= {
        "width_scale": args.width_scale,
        "actor_sparsity": sparsity[0],
        "critic_sparsity": sparsity[1],
    }
    facts |= {"seed": args.seed, "samples": samples}
    shown = (
        f"{sparsity[0]:g}"
        if sparsity[0] == sparsity[1]
        else "{:g} (actor), {:g} (critic)".format(*sparsity)
    )
    title = f"{facts['agent']}, {args.env_id}, width scale {args.width_scale:g}, sparsity {shown}, seed {args.seed}"
    stages = {"before training": (before, 0), f"after {env_step:,} env steps": (after, env_step)}
    matrices, rows = {}, []
    for name in ("actor", "critic"):
        for stage, (measured, step) in stages.items():
            matrices[name, stage] = measured[name]
            rows.append(facts | {"network": name, "env_step": step} | summarize(measured[name]))
    return title, matrices, rows


def draw(results: list[tuple[str, dict]], output: Path) -> None:
    """One row of matrices per run: actor before and after, critic before and after; blue aligned, red conflicting."""
    colors = mpl.colormaps["RdBu"].with_extremes(bad="0.75")
    figure = Figure((12, 3.6 * len(results)), layout="constrained")
    for subfigure, (title, matrices) in zip(
        np.atleast_1d(figure.subfigures(len(results), 1)), results
    ):
        subfigure.suptitle(title)
        panels = subfigure.subplots(1, len(matrices))
        for axes, ((network, stage), matrix) in zip(panels, matrices.items()):
            image = axes.imshow(matrix, cmap=colors, vmin=-1, vmax=1, interpolation="none")
            axes.set_title(
                f"{network} {stage}\nmean |cos| {summarize(matrix)['mean_abs']:.3f}", fontsize=10
            )
            axes.set(xticks=[], yticks=[], xlabel="transition, oldest first")
        subfigure.colorbar(
            image,
            ax=panels,
            label="cosine of two gradients",
            ticks=[-1, -0.5, 0, 0.5, 1],
            shrink=0.85,
        )
    for suffix in (".png", ".svg"):
        figure.savefig(output / f"gradient_interference{suffix}", dpi=200)


if __name__ == "__main__":
    args = tyro.cli(Args)
    if not args.runs:
        sac.fail("name at least one run folder")
    if args.samples < 2:
        sac.fail(f"--samples {args.samples}: must be at least 2")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    os.environ.setdefault("MUJOCO_GL", "disabled")
    runs = [read_run(run_dir, args.samples) for run_dir in args.runs]
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sac.fail(
            f"cannot write to {args.output} ({error.strerror}); choose another folder with --output"
        )
    measured = [measure_run(*run, args.samples, args.seed) for run in runs]
    table = pd.DataFrame([row for *_, rows in measured for row in rows])
    table.to_csv(args.output / "gradient_interference.csv", index=False)
    draw([(title, matrices) for title, matrices, _ in measured], args.output)
    for title, _, rows in measured:
        print(title)
        for row in rows:
            print(
                "  {network:<7} env step {env_step:>9,}  mean |cos| {mean_abs:.3f}".format(**row),
                end="  ",
            )
            print("negative {negative:5.1%}  no gradient {no_gradient}".format(**row))
    print(f"figure and table are in {args.output}")
