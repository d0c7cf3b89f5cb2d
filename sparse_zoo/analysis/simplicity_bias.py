"""Simplicity bias score against sparsity (Figure 8 of the paper), at initialisation.

    python sparse_zoo/analysis/simplicity_bias.py --width-scale 5 --grid 100 --inits 3

The score of a network family is the mean over random initialisations of 1 / complexity, and the
complexity of a function is the mean frequency of its Fourier transform, weighted by amplitude (Lee
et al. 2024, arXiv:2410.09754, after Teney et al. 2024). The paper gives no more; chosen here:
 - The network is the SimBa critic on humanoid (67 observations, 21 actions). Two of its 88 inputs
   run over a regular grid on [-100, 100]^2, the others are zero; observation statistics are those
   at the start, mean 0 and variance 1.
 - Frequencies are Euclidean, in cycles per grid step (at most 1/2 along an axis); the constant
   component is left out. share_score is the score of frequencies divided by the grid's largest
   (0.7071 cycles a step on an even grid), as public code of this measure has them. The score of a
   function with jumps grows with the logarithm of the grid's size, so that scores can be compared
   on one grid only; 300 x 300 gives the differences of the paper's Figure 8.
 - Every initialisation of the encoder is followed by --heads random heads (unit vectors, as
   orthogonal initialisation gives), whose scores are averaged: they cost nothing and take most of
   the noise away.
 - Plain MLP, for comparison: two hidden layers of 512 units, ReLU, orthogonal weights of gain
   sqrt(2), no biases.
"""

import time
from dataclasses import dataclass
from typing import Annotated, Literal

import runs
import numpy as np
import pandas as pd
import plots
import torch
import torch.nn as nn
from matplotlib.figure import Figure
from scaling import draw_scores

sac = runs.import_agent("sac_simba_sparse")
OBSERVATIONS = 67  # humanoid
ACTIONS = 21
INPUTS = OBSERVATIONS + ACTIONS


@dataclass
class Args:
    width_scale: runs.Width = 5.0
    """critic 512 x scale wide (5: the paper's large network)"""
    depth_scale: Annotated[int, "1 <= x <= 100"] = 1
    """critic of 2 x scale residual blocks"""
    sparsities: runs.Sparsities = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)
    """sparsities of the critic"""
    sparsity_distribution: Literal["erdos_renyi", "uniform"] = "erdos_renyi"
    """how sparsity is spread over the layers"""
    inits: runs.Count = 10
    """random initialisations (and masks) per sparsity, seeds 0, 1, ..."""
    heads: runs.Count = 32
    """random heads per initialisation"""
    grid: Annotated[int, "2 <= x <= 5000"] = 300
    """points along each of the two inputs"""
    reach: Annotated[float, "1e-30 < x < 3e38"] = 100.0
    """the grid covers [-reach, reach]^2"""
    threads: runs.Threads = None
    """CPU threads (default: all cores)"""
    output: str = "results/simplicity_bias"
    """folder of the figure and the numbers"""


def complexity(outputs: torch.Tensor) -> torch.Tensor:
    """Mean frequency weighted by amplitude, in cycles per grid step.

    outputs: values of functions on a grid (n, n, functions)
    """
    frequency = torch.fft.fftfreq(len(outputs), dtype=torch.float64)
    radius = torch.hypot(frequency[:, None], frequency[None, :])[:, :, None]
    amplitude = torch.fft.fft2(outputs.double(), dim=(0, 1)).abs()
    amplitude[0, 0] = 0
    return (amplitude * radius).sum((0, 1)) / amplitude.sum((0, 1))


def largest_frequency(grid: int) -> float:
    """Of a grid of grid x grid points, in cycles per grid step: that of its corner."""
    return grid // 2 / grid * 2**0.5


@torch.no_grad()
def score(
    encoder: nn.Module, inputs: int, hidden: int, heads: int, grid: int, reach: float
) -> float:
    """Mean of 1 / complexity over random heads behind one encoder.

    encoder: (points, inputs) -> (points, hidden)
    """
    axis = torch.linspace(-reach, reach, grid)
    points = torch.zeros(grid * grid, inputs)
    points[:, :2] = torch.cartesian_prod(axis, axis)
    head = nn.functional.normalize(torch.randn(hidden, heads), dim=0)
    outputs = torch.cat([encoder(part) @ head for part in points.split(1024)])
    return float((1 / complexity(outputs.view(grid, grid, heads))).mean())


def plain_mlp(inputs: int, hidden: int = 512) -> nn.Module:
    """The encoder of a plain MLP critic."""
    layers = nn.Linear(inputs, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain=2**0.5)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU())


def simba_encoder(args: Args, sparsity: float, seed: int) -> tuple[nn.Module, int]:
    """The critic's encoder, pruned as in training, and its width."""
    hidden = 4 * round(128 * args.width_scale)
    critic = sac.Critic(OBSERVATIONS, ACTIONS, hidden, 2 * args.depth_scale, critics=1)
    sac.sparsify(
        critic,
        sparsity,
        distribution=args.sparsity_distribution,
        mask_seed=seed,
        kernel="auto",
        device=torch.device("cpu"),
        packed=sac.PackedProduct,
    )
    return critic.encoders[0], hidden


def measure(args: Args) -> pd.DataFrame:
    """One row per network and initialisation: network, sparsity, seed, score, share_score."""
    largest = largest_frequency(args.grid)
    rows = []
    for network, sparsity in [("MLP", 0.0), *(("SimBa", sparsity) for sparsity in args.sparsities)]:
        began = time.time()
        values = []
        for seed in range(args.inits):
            torch.manual_seed(seed)
            if network == "MLP":
                encoder, hidden = plain_mlp(INPUTS), 512
            else:
                encoder, hidden = simba_encoder(args, sparsity, seed)
            values.append(score(encoder, INPUTS, hidden, args.heads, args.grid, args.reach))
            row = {"network": network, "sparsity": sparsity, "seed": seed, "score": values[-1]}
            rows.append(row | {"share_score": largest * values[-1]})
        scores = pd.Series(values)
        shares = largest * scores
        text = f"{scores.mean():.2f} +- {scores.sem():.2f}"
        text += f", as a share of the largest frequency {shares.mean():.2f} +- {shares.sem():.2f}"
        print(f"{network} {sparsity:.2f}: {text} ({time.time() - began:.0f} s)", flush=True)
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, args: Args) -> Figure:
    """Score against sparsity, with the plain MLP as a line."""
    figure, axes = plots.make_grid(1, 1, 6, 3.5)
    draw_scores(axes[0, 0], table)
    where = f"{args.grid} x {args.grid} points on [-{args.reach:g}, {args.reach:g}]$^2$"
    axes[0, 0].set_title(f"width scale {args.width_scale:g}, {where}", fontsize=10)
    return figure


def main(args: Args) -> None:
    runs.set_threads(sac, args.threads)
    with runs.new_files(args.output) as output:
        table = measure(args)
        if not np.isfinite(table.score).all():
            runs.fail("a score is not finite; choose a smaller --reach or other networks", 3)
        table.to_csv(output / "scores.csv", index=False)
        plots.save(draw(table, args), output, "simplicity_bias")
    print(f"figure and scores are in {args.output}")


if __name__ == "__main__":
    runs.start(main, Args)
