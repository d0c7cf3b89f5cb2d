"""Gradient interference: do the gradients of single transitions align or conflict? (Figure 9)

    python sparse_zoo/analysis/gradient_interference.py runs/<a dense run> runs/<a sparse run>

For k transitions of a run's replay, C[i, j] = <g_i, g_j> / (|g_i| |g_j|), where g_i is the gradient
of the loss of transition i alone (Equation 2 of the paper; Lyle et al. 2023, arXiv:2303.01486).
1 means that i and j pull the network the same way, -1 opposite ways, and 0 that a small step for
one leaves the loss of the other alone. Draws C for actor and critic, before and after training, and
writes their summaries to a CSV file.

The text of the paper says neither which k, which loss, nor how the transitions are ordered. Here:
 1. k = 256, one training batch, drawn without replacement (a transition drawn twice would align
    with itself).
 2. Gradients are taken over everything that is trained: active weights, biases and LayerNorm
    parameters (--places active); and at all places of the weight matrices, pruned ones too, as the
    official code does for SAC's actor (--places all). Of a dense network the two are the same.
 3. The losses are those of training. Actor: alpha * log pi(a|s) - Q(s, a) with the entropy term for
    SAC, -Q(s, a) for DDPG, with the critic fixed. Critic: the squared TD error, summed over the
    critics; the target is fixed.
 4. "Before" is the run's seed built again: the same weights and masks, the same alpha. "After" is
    the checkpoint.
 5. Both see the same transitions, noise and observation statistics (the final ones), so that they
    differ in the networks only: actor, critic, target critic and, for SAC, alpha. Another run has
    another replay.
 6. Rows and columns are in order of collection, oldest first, in all panels of a run. Nothing is
    sorted by similarity, which would find blocks in any matrix.
 7. A transition without gradient (DDPG clips actions, and a clipped action has none) has no cosine:
    grey, left out of the summaries and counted there.

No gradient is ever formed: k of them would fill 112 GB at width scale 5. One backward pass over the
batch gives input x and output gradient delta of each layer for each transition (transitions do not
mix: there is no batch norm). A dense layer's gradient is the outer product of the two, so its part
of <g_i, g_j> is (delta_i . delta_j) (x_i . x_j). A sparse layer has only some entries of that
product; they are computed and summed chunk by chunk.
"""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import runs
import matplotlib as mpl
import numpy as np
import pandas as pd
import plots
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from runs import algorithm_name, fail, import_agent, network_sparsities
from matplotlib.figure import Figure

sac = import_agent("sac_simba_sparse")
ddpg = import_agent("ddpg_simba_sparse")
CPU = torch.device("cpu")
COLOURS = 127  # odd, so that a cosine of zero has the middle one
CHUNK = 2**13  # active weights at a time: k * CHUNK floats, 8 MB for 256 transitions


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders of SAC or DDPG, one row of the figure each"""
    samples: Annotated[int, "2 <= x <= 10**5"] = 256
    """transitions k"""
    places: tuple[Literal["active", "all"], ...] = ("active", "all")
    """whose gradients count: of active weights, or of pruned ones too; a block of rows each"""
    seed: Annotated[int, "0 <= x < 2**32"] = 0
    """of the choice of transitions and of the noise on their actions"""
    output: str = "results/gradient_interference"
    """folder for gradient_interference.csv, .png and .svg"""
    threads: runs.Threads = None
    """CPU threads (default: all cores)"""


def record_layers(
    network: nn.Module, compute_loss: Callable
) -> list[tuple[nn.Module, torch.Tensor, torch.Tensor]]:
    """Each layer with parameters, its input x (k, in) and the loss's gradient delta at its output.

    delta: (k, out)
    """
    calls = []

    def record(module, inputs, output):
        calls.append((module, inputs[0].detach(), output))

    layers = [part for part in network.modules() if list(part.parameters(recurse=False))]
    handles = [layer.register_forward_hook(record) for layer in layers]
    loss = compute_loss()
    for handle in handles:
        handle.remove()
    deltas = torch.autograd.grad(loss, [output for _, _, output in calls])
    return [(layer, x, delta) for (layer, x, _), delta in zip(calls, deltas)]


def sparse_products(
    layer: nn.Module, x: torch.Tensor, delta: torch.Tensor, chunk: int
) -> torch.Tensor:
    """The inner products (k, k) of the gradients of a sparse layer.

    They are delta[i, row] * x[i, col] over the active weights (row, col).
    """
    x_t, delta_t = x.t().contiguous(), delta.t().contiguous()
    products = x.new_zeros(len(x), len(x), dtype=torch.float64)
    for active in layer.active.split(chunk):
        gradient_t = delta_t[active // layer.shape[1]] * x_t[active % layer.shape[1]]  # (chunk, k)
        products += gradient_t.t() @ gradient_t
    return products


def gradient_products(
    network: nn.Module, compute_loss: Callable, chunk: int = CHUNK, places: str = "active"
) -> torch.Tensor:
    """The inner products <g_i, g_j> (k, k) of k transitions' gradients over all of a network.

    places: of sparse layers, "active" weights, or "all" places of the matrix they stand for.
    `compute_loss` takes the batch through the network once and returns the mean of the k losses, or
    any multiple.
    """
    total = torch.zeros((), dtype=torch.float64)
    for layer, x, delta in record_layers(network, compute_loss):
        of_biases = delta @ delta.t()
        sparse = isinstance(layer, (sac.SparseLinear, ddpg.SparseLinear))
        if isinstance(layer, nn.Linear) or (sparse and places == "all"):
            of_weights = of_biases * (x @ x.t())
        elif isinstance(layer, nn.LayerNorm):
            gradient = delta * F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
            of_weights = gradient @ gradient.t()
        elif sparse:
            of_weights = sparse_products(layer, x, delta, chunk)
        else:
            raise TypeError(f"no rule for the gradients of {type(layer).__name__}")
        total = total + of_biases + of_weights
    return total


def cosines(products: torch.Tensor) -> np.ndarray:
    """Inner products (k, k) -> cosines; NaN in rows and columns of zero gradients."""
    norm = products.diagonal().sqrt()
    return (products / norm / norm[:, None]).numpy()


def measure(
    module, agent, batch, noise, next_noise, gamma: float, places: str = "active"
) -> dict[str, np.ndarray]:
    """The cosine matrices (k, k) of the actor and critic of `module` on a normalised batch."""
    alpha = [agent.alpha().detach()] if module is sac else []
    target = module.td_target(agent.actor, agent.target_critic, *alpha, batch, gamma, next_noise)

    def actor_loss():
        loss = module.actor_loss(agent.actor, agent.critic, *alpha, batch.obs, noise)
        return loss[0] if module is sac else loss  # SAC returns its entropy too

    def critic_loss():
        return module.critic_loss(agent.critic, batch, target)

    losses = {"actor": actor_loss, "critic": critic_loss}
    return {
        name: cosines(gradient_products(getattr(agent, name), loss, places=places))
        for name, loss in losses.items()
    }


def summarize(matrix: np.ndarray) -> dict[str, float]:
    """Mean |cosine| and share of negative cosines off the diagonal.

    And how many transitions have no gradient.
    """
    pairs = matrix[~np.eye(len(matrix), dtype=bool)]
    pairs = pairs[~np.isnan(pairs)]
    return {
        "mean_abs": np.abs(pairs).mean() if len(pairs) else np.nan,
        "negative": (pairs < 0).mean() if len(pairs) else np.nan,
        "no_gradient": int(np.isnan(matrix.diagonal()).sum()),
    }


def read_run(run_dir: Path, samples: int) -> tuple:
    """The folder of a run, its agent's module, its flags and its checkpoint.

    Ends the program if it cannot serve.
    """
    path = run_dir / "checkpoint.pt"
    if not path.exists():
        fail(f"no checkpoint.pt in {run_dir}; give the folder of a run")
    try:
        checkpoint = torch.load(path, map_location=CPU, weights_only=True, mmap=True)
    except Exception as error:
        fail(f"{path} is damaged ({type(error).__name__})")
    parts = {"args", "actor", "critic", "replay", "norm"}
    if not isinstance(checkpoint, dict) or not parts <= checkpoint.keys():
        fail(f"{path} is not of sac_simba_sparse.py or ddpg_simba_sparse.py")
    if "topology" in checkpoint:
        fail(f"{path} is of sac_simba_dynamic.py; give a run whose masks do not change")
    if not checkpoint["finished"]:
        fail(f"{path} was written before the end of training; run the run's command again")
    module = sac if "temperature" in checkpoint else ddpg
    try:
        args = replace(module.Args(**checkpoint["args"]), device="cpu", sparse_kernel="dense")
    except TypeError as error:
        fail(f"{path} is of another version of {module.__name__}.py ({error})")
    if args.init_from:
        fail(f"{path} is of a run with --init-from, whose first networks are not known here")
    filled = len(checkpoint["replay"]["columns"][0])
    if samples > filled:
        fail(f"--samples {samples}: {run_dir} has {filled} transitions in its replay")
    return run_dir, module, args, checkpoint


def draw_batch(module, checkpoint: dict, samples: int, generator: torch.Generator):
    """Some transitions of a run's replay, oldest first, with its observation statistics."""
    replay = checkpoint["replay"]
    filled = len(replay["columns"][0])
    age = torch.randperm(filled, generator=generator)[:samples].sort().values
    # A full ring's oldest transition is the one to be overwritten next
    index = (replay["added"] + age) % filled
    batch = module.Batch(*(column[index] for column in replay["columns"]))
    norm = module.ObservationNorm(batch.obs.shape[1], CPU)
    norm.load_state_dict(checkpoint["norm"])
    return batch._replace(obs=norm(batch.obs), next_obs=norm(batch.next_obs))


def restore_networks(module, agent, checkpoint: dict, run_dir: Path) -> None:
    """Gives an agent the networks of a checkpoint."""
    names = ["actor", "critic", "target_critic"] + (["temperature"] if module is sac else [])
    try:
        for name in names:
            getattr(agent, name).load_state_dict(checkpoint[name])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        fail(f"{run_dir}: {str(error).splitlines()[0]}")
    for name in names:
        if not all(part.isfinite().all() for part in getattr(agent, name).parameters()):
            fail(f"{run_dir}: the checkpoint's {name} has weights that are not finite", 3)


def measure_run(
    run_dir: Path, module, args, checkpoint: dict, samples: int, seed: int, places: str = "active"
) -> tuple[str, dict[tuple[str, str], np.ndarray], list[dict]]:
    """The title of a run, its matrices by network and stage, and their summaries."""
    env = module.make_env(args)
    obs_dim = env.observation_space.shape[0]
    action_dim = env.action_space.shape[0]
    gamma = module.default_gamma(env, args.action_repeat) if args.gamma is None else args.gamma
    generator = torch.Generator().manual_seed(seed)
    batch = draw_batch(module, checkpoint, samples, generator)
    noise_std = 1.0 if module is sac else args.exploration_noise
    noise, next_noise = noise_std * torch.randn(2, samples, action_dim, generator=generator)

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    agent = module.Agent(args, obs_dim, action_dim, CPU)
    before = measure(module, agent, batch, noise, next_noise, gamma, places)
    restore_networks(module, agent, checkpoint, run_dir)
    after = measure(module, agent, batch, noise, next_noise, gamma, places)

    actor, critic = network_sparsities(vars(args))
    facts = {
        "run": run_dir.resolve().name,
        "agent": algorithm_name(module.__name__),
        "env_id": args.env_id,
        "width_scale": args.width_scale,
        "actor_sparsity": actor,
        "critic_sparsity": critic,
        "seed": args.seed,
        "samples": samples,
        "places": places,
    }
    shown = f"{actor:g}" if actor == critic else f"{actor:g} (actor), {critic:g} (critic)"
    title = (
        f"{facts['agent']}, {args.env_id}, width scale {args.width_scale:g}, "
        f"sparsity {shown}, seed {args.seed}; gradients at {places} places"
    )
    env_step = checkpoint["counters"][0] * args.action_repeat
    stages = {"before training": (before, 0), f"after {env_step:,} env steps": (after, env_step)}
    matrices = {}
    rows = []
    for name in ("actor", "critic"):
        for stage, (measured, step) in stages.items():
            matrices[name, stage] = measured[name]
            rows.append(facts | {"network": name, "env_step": step} | summarize(measured[name]))
    return title, matrices, rows


def draw(results: list[tuple[str, dict]]) -> Figure:
    """One row of matrices per run and --places: actor before and after, critic before and after.

    Blue: aligned; red: conflicting. As many colours as a PNG of 256 can hold beside the text.
    """
    colours = mpl.colormaps["RdBu"].resampled(COLOURS).with_extremes(bad="0.75")
    figure = Figure((12, 3.6 * len(results)), layout="constrained")
    rows = np.atleast_1d(figure.subfigures(len(results), 1))
    for row, (title, matrices) in zip(rows, results):
        row.suptitle(title)
        panels = row.subplots(1, len(matrices))
        for ax, ((network, stage), matrix) in zip(panels, matrices.items()):
            image = ax.imshow(matrix, cmap=colours, vmin=-1, vmax=1, interpolation="none")
            mean = summarize(matrix)["mean_abs"]
            ax.set_title(f"{network} {stage}\nmean |cos| {mean:.3f}", fontsize=10)
            ax.set(xticks=[], yticks=[], xlabel="transition, oldest first")
        panels[0].set_ylabel("transition, oldest at the top")
        bar = row.colorbar(image, ax=panels, shrink=0.85, ticks=[-1, -0.5, 0, 0.5, 1])
        bar.set_label("cosine of two gradients\n(red: they conflict, blue: they align)")
    return figure


def main(args: Args) -> None:
    if not args.runs:
        fail("name at least one run folder")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    os.environ.setdefault("MUJOCO_GL", "disabled")
    loaded = [read_run(run_dir, args.samples) for run_dir in args.runs]
    measured = []
    for places in args.places:
        measured += [measure_run(*run, args.samples, args.seed, places) for run in loaded]
    table = pd.DataFrame([row for *_, rows in measured for row in rows])
    figure = draw([(title, matrices) for title, matrices, _ in measured])
    with runs.new_files(args.output) as output:
        table.to_csv(output / "gradient_interference.csv", index=False)
        plots.save(figure, output, "gradient_interference", dpi=150)  # a pixel a transition
    for title, _, rows in measured:
        print(title)
        for row in rows:
            print(
                f"  {row['network']:<7} env step {row['env_step']:>9,}  "
                f"mean |cos| {row['mean_abs']:.3f}  negative {row['negative']:5.1%}  "
                f"no gradient {row['no_gradient']}"
            )
    print(f"figure and table are in {args.output}")


if __name__ == "__main__":
    runs.start(main, Args)
