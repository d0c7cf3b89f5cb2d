# docs: docs/der_impala_sparse.md
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "numba==0.68.1", "scipy==1.17.1", "tyro==1.0.17",
#     "gymnasium==1.4.0", "ale-py==0.12.1", "opencv-python-headless==5.0.0.93",
#     "filelock==4.2.11", "matplotlib==3.11.2", "pandas==3.1.1", "tqdm==4.70.1",
#     "imageio==2.38.1", "imageio-ffmpeg==0.8.1", "tensorboard==2.21.0", "wandb==0.31.0",
# ]
# ///
"""Data-Efficient Rainbow with an IMPALA CNN and static sparsity, for Atari games.

Before training, a random set of weights is removed once; the survivors are trained as usual.
Rainbow learns the distribution of returns (C51) from n-step transitions, which it replays in
proportion to the square root of their last loss. The online network chooses the action that the
target network values (double Q), values and advantages have heads of their own (dueling), and noise
on the weights explores. "Data-Efficient" means: 100,000 decisions, an update after each, and longer
returns: 10 steps (20 in van Hasselt et al.).

Papers: Network Sparsity Unlocks the Scaling Potential of Deep RL (Ma, Li et al., ICML 2025); When
to Use Parametric Models in Reinforcement Learning? (van Hasselt et al., 2019), arXiv:1906.05243;
Rainbow (Hessel et al., 2018), arXiv:1710.02298; IMPALA (Espeholt et al., 2018), arXiv:1802.01561.

Differences from Dopamine (github.com/google/dopamine); the paper's Atari experiments build on it,
and their own code is not published. (Dopamine differs itself from Hessel et al.: the importance
exponent stays at 0.5, there it grows from 0.4 to 1; priorities are cross-entropies, there KL
divergences.)
 1. A pruned weight is not stored: values, noise scales, gradients, Adam moments and the target
    network are vectors over the active weights.
 2. The noise scale starts at 0.5 / sqrt(fan-in), as in Table 5; there, at 0.1 / sqrt(fan-in)
    (--noisy-sigma 0.1).
 3. Every layer draws noise of its own; there, the layers of one pass share a random key.
 4. Transitions near the end of a life are complete: each has its four frames and the last reward,
    and every state of the life is a starting point; there, stacks near the end are mostly black,
    one start is stored four times without the last reward, and the last start is missing.
 5. The training environment is seeded anew at every reset from (seed, game), so that a resumed run
    repeats the uninterrupted one; there, one generator runs on. Evaluations draw from
    (seed, decision), so that they leave training untouched.
 6. A decision in which a life is lost has all its frames, and in evaluations the stack runs on into
    the next life; there, the decision ends with the life, and the stack begins anew in both. A life
    lost in the idle decisions before a game is of no account; there, it starts the game anew.
 7. --target-interval counts updates (Table 5 gives no unit); there, decisions, warm-up included.
    --learning-starts counts env steps; there, complete n-step transitions are counted.
 8. A game is cut off by ALE's own limit, 108,000 env steps, which is no terminal; there, after
    100,000, and it is one.
 9. Evaluations play 10 games every 25,000 decisions, and 100 at the end; there, 100 games every
    10,000 decisions.

In this file: flags, network, replay, losses, agent, update; then `train`, the whole of training;
then a compiled loop of the replay, and an appendix that this file shares with the others: sparse
layers, diagnostics, runs.
"""

import contextlib
import shlex
import signal
import sys

if __name__ == "__main__":  # Ctrl-C and SIGTERM end with one line, also while packages load
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("interrupted"))

import ast
import copy
import hashlib
import inspect
import json
import math
import os
import platform
import random
import re
import shutil
import subprocess
import tempfile
import textwrap
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial, wraps
from importlib.metadata import distributions
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NoReturn, get_args, get_type_hints

import gymnasium as gym
import numba
import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from scipy.stats import trim_mean
from torch.func import functional_call
from torch.nn.utils import get_total_norm
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm


@dataclass
class Args:
    # A condition beside a type is checked at the start; x is the flag's value. A flag that you add
    # gives a run another folder, unless EXECUTION_FLAGS (below train) has its name.

    # Experiment
    exp_name: str = "der_impala_sparse"
    """part of the run's name"""
    seed: Annotated[int, "0 <= x < 2**32"] = 1
    """seed of networks, noise, replay and games (below 2^32)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto takes CUDA when there is one"""
    threads: Annotated[int | None, "1 <= x <= 10**4"] = None
    """CPU threads (default: all cores); a resumed run is bit-equal only with the same number"""
    matmul_precision: Literal["high", "highest"] = "high"
    """matrix products and convolutions on CUDA: high takes TF32 (10 bits of precision), highest
    float32 (23 bits)"""
    bf16: bool = False
    """convolutions in bfloat16: faster, less exact"""
    runs_dir: str = "runs"
    """folder that holds one folder per run, replay included"""
    resume: bool = True
    """go on from the run's checkpoint; --no-resume moves the old run aside and starts afresh"""
    eval_only: bool = False
    """evaluate the checkpoint of these flags for --final-eval-episodes games and stop"""
    run_dir: str | None = None
    """with --eval-only: the run in this folder, with the flags of its training"""
    init_from: str | None = None
    """folder of a run whose networks a new run starts with (the same shapes, sparsity
    and --mask-seed); optimisers and replay start afresh"""
    capture_video: bool = False
    """film the first game of the last evaluation (or of --eval-only) as mp4"""

    # Environment
    env_id: str = "ALE/Pong-v5"
    """an Atari game, ALE/*-v5"""
    action_repeat: Annotated[int, "1 <= x <= 10**6"] = 4
    """emulator frames per decision: rewards summed, pixels the maximum of the last two"""
    total_timesteps: Annotated[int, "x >= 1"] = 400_000
    """env steps of training (emulator frames, action repeat included)"""
    max_episode_steps: Annotated[int | None, "x >= 1"] = None
    """env steps after which an episode is cut off (default: the environment's own limit)"""
    env_kwargs: str | None = None
    """arguments of the environment as JSON, such as '{"difficulty": 1}'"""
    sticky_actions: Annotated[float, "0 <= x < 1"] = 0.0
    """probability that the emulator repeats the last action (0.25 in ALE's own protocol)"""
    terminal_on_life_loss: bool = True
    """in training, the loss of a life ends the returns; the game goes on"""

    # Algorithm (Table 5 of the paper; what it leaves open is Dopamine's)
    learning_starts: Annotated[int, "x >= 0"] = 6_400
    """env steps before the first update; the noisy network acts from the start"""
    updates_per_step: Annotated[int, "1 <= x <= 10**6"] = 1
    """gradient updates per decision (the replay ratio)"""
    batch_size: Annotated[int, "1 <= x <= 10**6"] = 32
    """transitions per update"""
    buffer_size: Annotated[int, "x >= 1", "x > n_step"] = 1_000_000
    """largest number of frames kept for replay, in a file of about 7 kB a frame"""
    n_step: Annotated[int, "1 <= x <= 10**6"] = 10
    """rewards in a return before it bootstraps"""
    gamma: Annotated[float, "0 <= x <= 1"] = 0.99
    """discount"""
    target_interval: Annotated[int, "x >= 1"] = 2_000
    """updates between copies of the network to the target network"""
    learning_rate: Annotated[float, "0 < x < inf"] = 1e-4
    """learning rate of Adam"""
    adam_eps: Annotated[float, "0 < x < inf"] = 1.5e-4
    """epsilon of Adam"""
    atoms: Annotated[int, "2 <= x <= 10**4"] = 51
    """points on which the distribution of returns is learned"""
    v_max: Annotated[float, "0 < x <= 1e30"] = 10.0
    """the atoms lie evenly in [-v_max, v_max]"""
    noisy_sigma: Annotated[float, "0 <= x < inf"] = 0.5
    """noise scale of the weights at the start, times 1 / sqrt(fan-in)"""
    priority_exponent: Annotated[float, "0 <= x <= 1"] = 0.5
    """a transition is replayed in proportion to its last loss to the power of this"""
    importance_exponent: Annotated[float, "0 <= x <= 1"] = 0.5
    """importance weight of a replayed transition: its probability to the power of minus this"""
    eval_epsilon: Annotated[float, "0 <= x <= 1"] = 0.001
    """probability of a random action in evaluations, which have no noise on the weights"""

    # Size and sparsity
    width_scale: Annotated[float, "1/16 <= x <= 1000"] = 1.0
    """channels of the IMPALA CNN: 16, 32, 32 x scale"""
    depth_scale: Annotated[int, "1 <= x <= 1000"] = 1
    """residual blocks in each of the CNN's three stages: 2 x scale"""
    sparsity: Annotated[float, "0 <= x < 1"] = 0.0
    """fraction of parameters removed from the network, convolutions included; 0: the dense
    baseline"""
    sparsity_distribution: Literal["erdos_renyi", "uniform"] = "erdos_renyi"
    """how the network's sparsity is spread over its layers"""
    mask_seed: Annotated[int | None, "0 <= x < 2**32"] = None
    """seed of the random pruning (default: --seed)"""
    sparse_kernel: Literal["auto", "packed", "dense"] = "auto"
    """how sparse linear layers multiply (auto: packed on CPU up to density 0.25, else dense);
    a resumed run is bit-equal only with the same kernel"""

    # Logging
    eval_interval: Annotated[int, "x >= 1"] = 100_000
    """env steps between evaluations, the first at step 0"""
    eval_episodes: Annotated[int, "1 <= x <= 10**6"] = 10
    """games of each evaluation"""
    final_eval_episodes: Annotated[int, "1 <= x <= 10**6"] = 100
    """games of the last evaluation and of --eval-only"""
    diagnostics_interval: Annotated[int, "x >= 0"] = 20_000
    """env steps between measurements of rank, dormancy and norms (0: never)"""
    track: bool = False
    """log to Weights & Biases as well (WANDB_MODE=offline needs no account)"""
    wandb_project: str = "sparse_zoo"
    """Weights & Biases project of --track"""
    wandb_entity: str | None = None
    """Weights & Biases team of --track (default: your own account)"""

    # Checkpoints
    checkpoint_interval: Annotated[int, "x >= 1"] = 20_000
    """env steps between checkpoints, each written at the next end of a game"""


SIZE = 84  # pixels of a side
STACK = 4  # frames in an observation
NOOP_MAX = 29  # decisions without action at the start of a game, in training and evaluation
BLACK = np.zeros((SIZE, SIZE, STACK), np.uint8)  # the stack before a life begins
IMAGES_AT_ONCE = 16  # that are encoded at a time on a CPU
LONGEST_GAME = 108_000  # env steps after which ALE cuts a game off


def lecun_normal(conv: nn.Conv2d) -> nn.Conv2d:
    """flax's default: variance 1 / fan-in, cut at 2 sigma, corrected for the cut; biases zero."""
    fan_in = conv.weight[0].numel()
    std = 1 / math.sqrt(fan_in) / 0.87962566103423978  # std of a normal cut at 2 sigma
    nn.init.trunc_normal_(conv.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(conv.bias)
    return conv


class ResidualBlock(nn.Module):
    """x + convolutions(x)"""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            lecun_normal(nn.Conv2d(channels, channels, 3, padding=1)),
            nn.ReLU(inplace=True),
            lecun_normal(nn.Conv2d(channels, channels, 3, padding=1)),
        )

    def forward(self, x):
        """(batch, channels, height, width) -> the same shape"""
        return x + self.layers(x)


def impala(width_scale: float, blocks: int) -> nn.Sequential:
    """The IMPALA CNN: (batch, STACK, SIZE, SIZE) -> (batch, 32 x scale, 11, 11).

    Each of three stages halves the picture: 84, 42, 21, 11 pixels.
    """
    channels = [STACK, *(round(width_scale * count) for count in (16, 32, 32))]
    modules = []
    size = SIZE
    for inputs, outputs in pairwise(channels):
        conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        nn.init.xavier_uniform_(conv.weight)
        nn.init.zeros_(conv.bias)
        border = size % 2  # with ceil_mode, the border of JAX's padding="SAME"
        pool = nn.MaxPool2d(3, 2, padding=border, ceil_mode=True)
        modules += [conv, pool, *(ResidualBlock(outputs) for _ in range(blocks))]
        size = math.ceil(size / 2)
    return nn.Sequential(*modules, nn.ReLU())


class NoisyLinear(nn.Module):
    """A linear layer with factorised Gaussian noise on its weights.

    `mean` is an ordinary layer, which `sparsify` may prune. After that, create_noise_scales gives a
    noise scale to each of its active weights and to each bias: a pruned weight has neither.
    Fortunato et al. 2018, arXiv:1706.10295.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        # PyTorch's default: weights and biases uniform in +-1 / sqrt(in_features), as in the paper
        self.mean = nn.Linear(in_features, out_features)

    def create_noise_scales(self, sigma: float) -> None:
        """Called once, after pruning."""
        self.weight_name = "values" if isinstance(self.mean, SparseLinear) else "weight"
        weight = getattr(self.mean, self.weight_name)
        scale = sigma / math.sqrt(self.in_features)
        self.sigma = nn.Parameter(torch.full_like(weight, scale))
        self.bias_sigma = nn.Parameter(torch.full_like(self.mean.bias, scale))

    def forward(self, x, noise: tuple[torch.Tensor, torch.Tensor] | None = None):
        """(batch, in) -> (batch, out), with noise (in,) and (out,), or by the means alone."""
        if noise is None:
            return self.mean(x)
        noise_in, noise_out = noise
        noise_weight = torch.outer(noise_out, noise_in)  # (out, in)
        if self.weight_name == "values":
            noise_weight = noise_weight.flatten()[self.mean.active]  # (nnz,)
        weight = getattr(self.mean, self.weight_name) + self.sigma * noise_weight
        bias = self.mean.bias + self.bias_sigma * noise_out
        return functional_call(self.mean, {self.weight_name: weight, "bias": bias}, (x,))


class Network(nn.Module):
    """Distributional Q-function: IMPALA CNN, 512 hidden units, heads for value and advantages."""

    def __init__(self, args: Args, actions: int):
        super().__init__()
        self.atoms = args.atoms
        self.bf16 = args.bf16
        self.encoder = impala(args.width_scale, 2 * args.depth_scale)
        self.hidden = NoisyLinear(11 * 11 * round(32 * args.width_scale), 512)
        self.value = NoisyLinear(512, args.atoms)
        self.advantage = NoisyLinear(512, actions * args.atoms)

    def noisy_layers(self) -> list[NoisyLinear]:
        return [self.hidden, self.value, self.advantage]

    def draw_noise(self, generator: torch.Generator | None = None) -> list[tuple]:
        """Noise of one pass: (in,) and (out,) for each noisy layer.

        sign(x) sqrt(|x|) of standard normal x.
        """
        sizes = []
        for layer in self.noisy_layers():
            sizes += [layer.in_features, layer.out_features]
        normal = torch.randn(sum(sizes), generator=generator)
        normal = to_device(normal, self.hidden.sigma.device)
        noise = (normal.sign() * normal.abs().sqrt()).split(sizes)
        return list(zip(noise[::2], noise[1::2]))

    @property
    def body(self) -> nn.Sequential:
        """What diagnostics measure: features -> hidden units (batch, 512), without noise."""
        return nn.Sequential(self.hidden, nn.ReLU())

    def encode(self, obs):
        """Stacks of uint8 (batch, SIZE, SIZE, STACK) -> features (batch, 11 x 11 x 32 x scale).

        On a CPU IMAGES_AT_ONCE at a time, so that their activations stay in its cache.
        """
        features = []
        for part in obs.split(IMAGES_AT_ONCE if obs.device.type == "cpu" else len(obs)):
            images = part.permute(0, 3, 1, 2).float().div_(255)  # (part, STACK, SIZE, SIZE)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
                encoded = self.encoder(images)  # (part, channels, 11, 11)
            # Flattened in the order of memory, channels last: nothing is moved
            features.append(encoded.permute(0, 2, 3, 1).float().flatten(1))
        return torch.cat(features)

    def forward(self, obs, noise=None):
        """Stacks of uint8 (batch, SIZE, SIZE, STACK) -> logits of returns (batch, actions, atoms)

        noise: what draw_noise returned; without, the means of the weights act alone
        """
        noise_hidden, noise_value, noise_advantage = noise or (None, None, None)
        x = F.relu(self.hidden(self.encode(obs), noise_hidden))  # (batch, 512)
        value = self.value(x, noise_value)[:, None]  # (batch, 1, atoms)
        advantage = self.advantage(x, noise_advantage)
        advantage = advantage.unflatten(1, (-1, self.atoms))  # (batch, actions, atoms)
        return value + advantage - advantage.mean(1, keepdim=True)


class Batch(NamedTuple):
    """n-step transitions, batch first; observations are stacks (batch, SIZE, SIZE, STACK)."""

    obs: torch.Tensor
    action: torch.Tensor
    reward: torch.Tensor  # the discounted sum of n rewards, or of those up to the terminal
    discount: torch.Tensor  # of the value of next_obs: gamma^n, or 0 after a terminal
    next_obs: torch.Tensor
    weight: torch.Tensor  # of the loss: importance sampling, the largest is 1
    place: torch.Tensor  # in the replay; stays on the CPU


class PrioritizedReplay:
    """Single frames in a file, sampled in proportion to priorities, stacked when sampled.

    Frame number k (0, 1, ... over the whole run) is followed by action[k], reward[k], terminal[k]
    and frame k + 1, if it is not the last of its life; start[k] is the first frame of its life. A
    frame gets a priority, and is sampled, as soon as n_step steps of its life follow it, or a
    terminal. Stacks never reach over the start of a life.

    The last `capacity` frames are sampled. The ring holds `slack` more: a killed run goes back to a
    checkpoint and must find the frames that were in use then. Priorities: Schaul et al. 2016,
    arXiv:1511.05952, proportional.
    """

    def __init__(self, path: Path, args: Args, capacity: int, slack: int, mode: str = "w+"):
        """mode: w+ for a new run, r+ for one that goes on from a checkpoint"""
        self.path = path
        self.capacity = capacity
        self.n_step = args.n_step
        self.gamma = args.gamma
        self.priority_exponent = args.priority_exponent
        self.importance_exponent = args.importance_exponent
        self.added = 0
        self.largest_priority = 1.0  # so far
        ring = capacity + slack
        self.frames = open_frames(path, (ring, SIZE, SIZE), mode)
        self.action = np.zeros(ring, np.int64)
        self.reward = np.zeros(ring, np.float32)
        self.terminal = np.zeros(ring, np.float32)
        self.start = np.zeros(ring, np.int64)
        self.priority = np.zeros(ring)
        # What a checkpoint holds
        self.columns = [self.action, self.reward, self.terminal, self.start, self.priority]

    def begin(self, frame: np.ndarray) -> None:
        """The first frame of a life."""
        self.append(frame, start=self.added)

    def add(self, action: int, reward: float, terminal: bool, frame: np.ndarray) -> None:
        """What was done at the last frame, and what came of it."""
        last = (self.added - 1) % len(self.frames)
        self.action[last] = action
        self.reward[last] = reward
        self.terminal[last] = terminal
        self.append(frame, self.start[last])

        # What can be sampled from now on: the frame n steps back; at a terminal, all since then
        newest = self.added - 1
        first = max(self.start[last], newest - self.n_step, newest - self.capacity + 1)
        end = newest if terminal else newest - self.n_step + 1
        self.priority[np.arange(first, end) % len(self.frames)] = self.largest_priority

    def append(self, frame: np.ndarray, start: int) -> None:
        """Appends a frame; the one `capacity` frames back is sampled no more."""
        new = self.added % len(self.frames)
        self.frames[new] = frame
        self.start[new] = start
        self.terminal[new] = 0
        self.priority[(self.added - self.capacity) % len(self.frames)] = 0
        self.added += 1

    def ready(self) -> bool:
        """Whether there is a transition to sample."""
        return bool(self.priority.any())

    def sample(
        self, batch_size: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Batch:
        """In proportion to the priorities, with replacement; only when it is ready()."""
        ring = len(self.frames)
        cumulative = self.priority[: self.added].cumsum()
        points = torch.rand(batch_size, generator=generator, dtype=torch.float64).numpy()
        place = np.searchsorted(cumulative, points * cumulative[-1], side="right")  # (batch,)

        # The number of the newest frame in each place: in a ring of 5 after 12 frames (0 to 11),
        # place 1 holds frame 11, and place 2 frame 7
        number = place + (self.added - 1 - place) // ring * ring
        steps = (number[:, None] + np.arange(self.n_step)) % ring  # (batch, n)

        # 1 as long as the life goes on: after each step, and before it
        after = np.cumprod(1 - self.terminal[steps], axis=1)  # (batch, n)
        before = np.insert(after[:, :-1], 0, 1, axis=1)  # (batch, n)
        factor = np.float32(self.gamma) ** np.arange(self.n_step, dtype=np.float32)  # (n,)
        reward = (factor * before * self.reward[steps]).sum(1)  # (batch,)
        discount = self.gamma**self.n_step * after[:, -1]  # (batch,)

        start = self.start[place]
        shape = (2, batch_size, SIZE, SIZE, STACK)
        stacks = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        # Where the life has ended before, the next stack shows something else: its discount is 0
        next_number = np.minimum(number + self.n_step, self.added - 1)
        gather_stacks(self.frames, number, start, stacks[0].numpy())
        gather_stacks(self.frames, next_number, start, stacks[1].numpy())

        # Importance weights; the sum of all priorities cancels against the largest weight
        weight = self.priority[place] ** -self.importance_exponent  # (batch,)
        weight = (weight / weight.max()).astype(np.float32)
        columns = {
            "obs": stacks[0],
            "action": self.action[place],
            "reward": reward,
            "discount": discount,
            "next_obs": stacks[1],
            "weight": weight,
        }
        sent = {name: to_device(column, device) for name, column in columns.items()}
        return Batch(**sent, place=torch.from_numpy(place))

    def set_priorities(self, place: torch.Tensor, loss: torch.Tensor) -> None:
        """Priorities (loss + 1e-10)^priority_exponent of a sampled batch; 1e-10 is Dopamine's."""
        priorities = (loss.double().numpy() + 1e-10) ** self.priority_exponent
        self.priority[place.numpy()] = priorities
        self.largest_priority = max(self.largest_priority, priorities.max())

    def state_dict(self) -> dict:
        """Everything except the frames: they stay in their file, which is written to the disk."""
        self.frames.base.flush()
        saved = [torch.from_numpy(column[: self.added].copy()) for column in self.columns]
        return {"counters": (self.added, float(self.largest_priority)), "columns": saved}

    def load_state_dict(self, state: dict) -> None:
        self.added, self.largest_priority = state["counters"]
        for column, saved in zip(self.columns, state["columns"]):
            column[: len(saved)] = saved.numpy()


def open_replay(args: Args, path: Path, resumed: bool) -> PrioritizedReplay:
    """The replay of a new run, or of one that goes on from a checkpoint."""
    decisions = math.ceil(args.total_timesteps / args.action_repeat)
    frames = 2 * decisions  # at most: a life of T decisions has T + 1 frames
    capacity = min(args.buffer_size, frames)
    # A killed run goes back by two checkpoints at most (the newest one may be damaged), each late
    # by a game at most; one more longest game each for the first frames of lives
    slack = 2 * (args.checkpoint_interval + 2 * LONGEST_GAME) // args.action_repeat
    slack = min(slack, frames - capacity)
    replay = PrioritizedReplay(path, args, capacity, slack, "r+" if resumed else "w+")
    size = replay.frames.nbytes / 1e9
    print(f"replay: {size:.1f} GB in {path}, deleted at the end of training")
    return replay


def project(points, probabilities, support):
    """C51's projection of probabilities (batch, atoms) at points (batch, atoms) to the support.

    Each point's share goes to its two neighbours in proportion to nearness; points outside count
    as the ends. support (atoms,) is evenly spaced. Bellemare et al. 2017, arXiv:1707.06887.
    """
    points = points.clamp(support[0], support[-1])
    spacing = support[1] - support[0]
    distance = (points[:, None, :] - support[:, None]).abs() / spacing  # (batch, support, points)
    share = (1 - distance).clamp(min=0)  # of a point that an atom gets
    return (share * probabilities[:, None, :]).sum(-1)  # (batch, support)


@torch.no_grad()
def target_distribution(network, target_network, batch, support, noise):
    """Projects R_n + gamma^n Z_target(s_n, argmax_a E Z(s_n, a)): (batch, atoms)"""
    value = network(batch.next_obs, noise).softmax(-1) @ support  # (batch, actions)
    action = value.argmax(1)  # (batch,)
    probabilities = target_network(batch.next_obs, noise).softmax(-1)  # (batch, actions, atoms)
    row = torch.arange(len(action), device=action.device)
    probabilities = probabilities[row, action]  # (batch, atoms)
    points = batch.reward[:, None] + batch.discount[:, None] * support  # (batch, atoms)
    return project(points, probabilities, support)


def cross_entropy(network, batch, target, noise):
    """-sum_i target_i log p_i(s, a) of each transition, (batch,)"""
    logits = network(batch.obs, noise)  # (batch, actions, atoms)
    row = torch.arange(len(target), device=target.device)
    logits = logits[row, batch.action]  # (batch, atoms)
    return -(target * logits.log_softmax(-1)).sum(-1)


class Agent:
    """A network, its target network and Adam.

    The network is drawn from torch's generator and pruned with a mask from --mask-seed.
    """

    def __init__(self, args: Args, actions: int, device: torch.device):
        self.network = Network(args, actions)

        # Prune once; noise scales are for the weights that are left
        mask_seed = args.seed if args.mask_seed is None else args.mask_seed
        sparsify(
            self.network,
            args.sparsity,
            distribution=args.sparsity_distribution,
            mask_seed=derive_seed(mask_seed, 0),
            kernel=args.sparse_kernel,
            device=device,
            packed=PackedProduct,  # multiplies with active weights alone, on a CPU
            keeper=DenseCopy,  # keeps a dense weight between optimiser steps
            convolution=SparseConv2d,
        )
        # Before noise scales are added, which would count as other parameters
        self.layers = layer_table(self.network)
        for layer in self.network.noisy_layers():
            layer.create_noise_scales(args.noisy_sigma)
        self.network.encoder.to(memory_format=torch.channels_last)  # as stacks lie in memory

        # Check what losses and diagnostics rely on: a changed network fails here, in one sentence
        batch = actions + 1  # unlike all other sizes
        obs = torch.zeros(batch, SIZE, SIZE, STACK, dtype=torch.uint8, device=device)
        noise = self.network.draw_noise(torch.Generator())  # the global one is left as it is
        inputs = self.network.hidden.in_features
        with torch.no_grad():
            features = self.network.encode(obs)
            check_shape("network.encode", features, batch=batch, features=inputs)
            logits = self.network(obs, noise)
        check_shape("network", logits, batch=batch, actions=actions, atoms=args.atoms)
        check_encoder(self.network, "body", features)

        # deepcopy's second argument lets the target network share the index buffers
        shared = {id(buffer): buffer for buffer in self.network.buffers()}
        self.target_network = copy.deepcopy(self.network, shared)
        self.target_network.requires_grad_(False)

        parameters = self.network.parameters()
        adam = torch.optim.Adam
        self.optimizer = adam(parameters, args.learning_rate, eps=args.adam_eps, fused=True)
        self.support = torch.linspace(-args.v_max, args.v_max, args.atoms, device=device)


def update(
    agent: Agent, batch: Batch, noise, next_noise
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One gradient update of the network, with two draws of noise.

    Returns what is logged, and the loss of each transition (batch,).
    """
    # The online network chooses the next action under the noise of the target network
    target = target_distribution(
        agent.network, agent.target_network, batch, agent.support, next_noise
    )
    transition_loss = cross_entropy(agent.network, batch, target, noise)  # (batch,)
    loss = (batch.weight * transition_loss).mean()
    agent.optimizer.zero_grad()
    loss.backward()
    agent.optimizer.step()
    td_target = (target @ agent.support).mean()
    return {"loss": loss.detach(), "td_target": td_target}, transition_loss.detach()


def push(stack: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """The stack without its oldest frame, and with a new one."""
    return np.concatenate([stack[..., 1:], frame[..., None]], -1)


@torch.no_grad()
def act(agent: Agent, stack: np.ndarray, noise=None) -> int:
    """The action of the highest expected return for a stack of frames (SIZE, SIZE, STACK)."""
    obs = torch.from_numpy(stack)[None].to(agent.support.device)
    logits = agent.network(obs, noise)  # (1, actions, atoms)
    return int((logits.softmax(-1) @ agent.support).argmax())


def evaluate(
    args: Args,
    agent: Agent,
    env: gym.Env,
    games: int,
    seed_key: tuple,
    video: Path | None = None,
) -> dict[str, float]:
    """Scores of whole games without noise, mean, std and interquartile mean.

    seed_key: what the games' seeds are derived from
    video: where to put a film of the first game, one frame a decision
    """
    returns = np.zeros(games)
    frames = []
    for game in range(games):
        seed = derive_seed(*seed_key, game)
        generator = np.random.default_rng(seed)
        frame, _ = env.reset(seed=seed)
        stack = push(BLACK, frame)
        done = False
        while not done:
            if video and game == 0 and len(frames) < LONGEST_FILM:
                frames.append(env.render())
            if generator.random() < args.eval_epsilon:
                action = int(generator.integers(env.action_space.n))
            else:
                action = act(agent, stack)
            frame, reward, terminated, truncated, _ = env.step(action)
            stack = push(stack, frame)
            returns[game] += reward
            done = terminated or truncated
    if video:
        write_video(video, frames, fps=60 / args.action_repeat)
    return summary(returns)


def diagnose(agent: Agent, batch: Batch, noise, next_noise) -> dict[str, float]:
    """Plasticity measurements on a batch (section 4 of the paper).

    Ranks and units of the hidden layer after the CNN; gradients and norms of all weights.
    """
    target = target_distribution(
        agent.network, agent.target_network, batch, agent.support, next_noise
    )
    loss = (batch.weight * cross_entropy(agent.network, batch, target, noise)).mean()
    parameters = list(agent.network.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        features = agent.network.encode(batch.obs)
    plasticity = measure_plasticity(agent.network.body, features, parameters, gradients)
    return {f"critic_{metric}": value for metric, value in plasticity.items()}


class NoopStart(gym.Wrapper):
    """A game begins with 0 to NOOP_MAX decisions of doing nothing, drawn from its seed."""

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        frame, info = self.env.reset(seed=seed, options=options)
        for _ in range(self.unwrapped.np_random.integers(NOOP_MAX + 1)):
            frame, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                frame, info = self.env.reset()
        return frame, info


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """A game with gray frames (SIZE, SIZE) of uint8 and repeated actions.

    It begins with idle decisions. Counts scores (raw rewards) and decisions of whole games.
    """
    if not args.env_id.startswith("ALE/"):
        fail(f"--env-id {args.env_id}: this agent plays Atari games, such as ALE/Pong-v5")
    try:
        import ale_py

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        gym.register_envs(ale_py)
        env = gym.make(
            args.env_id,
            render_mode=render_mode,
            max_episode_steps=args.max_episode_steps,
            disable_env_checker=True,
            frameskip=1,  # AtariPreprocessing repeats the actions
            repeat_action_probability=args.sticky_actions,
            **read_env_kwargs(args),
        )
        repeat = args.action_repeat
        env = gym.wrappers.AtariPreprocessing(env, noop_max=0, frame_skip=repeat, screen_size=SIZE)
        # Idle decisions come before the gate counts; AtariPreprocessing's own are single frames
        env = Gate(NoopStart(env), args, frames_per_step=repeat, longest=LONGEST_GAME // repeat)
    except (gym.error.Error, ModuleNotFoundError, ValueError) as error:
        fail(f"--env-id {args.env_id}: {error}")
    except SystemExit as end:
        fail_where_it_ended(args, "", end)
    except Exception as error:
        fail_in_environment(args, "", error)
    if not isinstance(env.action_space, gym.spaces.Discrete):
        fail(f"--env-id {args.env_id}: this agent needs Discrete actions, not {env.action_space}")
    if env.unwrapped.get_action_meanings()[0] != "NOOP":
        fail(f"--env-id {args.env_id}: has no NOOP action to begin its games with")
    return gym.wrappers.RecordEpisodeStatistics(env)


def load_policy(run_dir: str | Path, render_mode: str | None = None) -> tuple[Callable, gym.Env]:
    """The policy of a trained run without noise, obs -> action, and its environment."""
    run = open_run(run_dir, render_mode)
    env = make_env(run.args, render_mode)
    env = gym.wrappers.FrameStackObservation(env, STACK, padding_type="zero")
    agent = Agent(run.args, int(env.action_space.n), torch.device("cpu"))
    run.load({"network": agent.network})

    def policy(frames: np.ndarray) -> int:
        """frames (STACK, SIZE, SIZE), the newest last"""
        return act(agent, np.stack(frames, -1))

    return policy, env


def train(args: Args) -> None:
    """A whole run: trains, evaluates, measures and saves, or goes on where it was stopped."""
    # Large memory pages: fewer page faults on Linux; read by PyTorch with its first tensor
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    set_up_process(args)  # checks the flags, seeds all generators
    device = choose_device(args)
    env = make_env(args)
    eval_env = make_env(args, "rgb_array" if args.capture_video else None)
    total_steps = math.ceil(args.total_timesteps / args.action_repeat)  # in decisions

    try:
        agent = Agent(args, int(env.action_space.n), device)
    except NetworkError as error:
        fail(str(error))
    run = Run(args, args.action_repeat)

    def evaluation(games: int, purpose: int, video: Path | None = None) -> dict[str, float]:
        eval_env.set_wrapper_attr("env_step", run.env_step)  # for error messages
        seed_key = (args.seed, purpose, run.agent_step)
        return evaluate(args, agent, eval_env, games, seed_key, video)

    parts = {  # what a checkpoint holds, in this order, and the replay
        "network": agent.network,
        "target_network": agent.target_network,
        "optimizer": agent.optimizer,
    }
    if args.eval_only:
        run.restore(parts)
        run.print_result(evaluation(args.final_eval_episodes, FINAL, run.video()))
        return

    replay = open_replay(args, run.folder / "replay.u8", resumed=run.checkpoint is not None)
    parts["replay"] = replay
    run.restore(parts)
    run.begin({"network": agent.layers})
    env.set_wrapper_attr("env_step", run.env_step)  # for error messages
    losses = {}
    game_over = life_over = True
    if run.agent_step == 0:
        run.log("eval", evaluation(args.eval_episodes, EVAL))

    while run.agent_step < total_steps:
        if game_over:
            if run.checkpoint_due():
                run.save(parts)
            frame, info = env.reset(seed=derive_seed(args.seed, TRAIN, run.episode))
            run.episode += 1
            lives = info["lives"]
        if life_over:
            replay.begin(frame)
            stack = push(BLACK, frame)

        # Act: noise on the weights explores
        action = act(agent, stack, agent.network.draw_noise())
        frame, reward, terminated, truncated, info = env.step(action)
        life_lost = info["lives"] < lives
        lives = info["lives"]
        terminal = terminated or (args.terminal_on_life_loss and life_lost)
        replay.add(action, np.clip(reward, -1, 1), terminal, frame)
        stack = push(stack, frame)
        game_over = terminated or truncated
        life_over = terminal or game_over
        run.count_decision()

        # Learn
        if run.env_step >= args.learning_starts and replay.ready():
            for _ in range(args.updates_per_step):
                batch = replay.sample(args.batch_size, device)
                noise = agent.network.draw_noise()
                next_noise = agent.network.draw_noise()
                losses, transition_loss = update(agent, batch, noise, next_noise)
                run.update_step += 1
                transition_loss = transition_loss.cpu()  # all of an update that Python waits for
                stop_unless_finite(run.agent_step, transition_loss)  # before the replay sees it
                replay.set_priorities(batch.place, transition_loss)
                if run.update_step % args.target_interval == 0:
                    agent.target_network.load_state_dict(agent.network.state_dict())

        # Measure
        if game_over or run.due(args.eval_interval) or run.due(args.diagnostics_interval):
            stop_unless_finite(run.agent_step, get_total_norm(agent.network.parameters()))
        if run.due(args.eval_interval):
            run.log_evaluation(evaluation(args.eval_episodes, EVAL))
        if run.due(args.diagnostics_interval) and replay.ready():
            # A generator of its own: measuring leaves training untouched
            seed = derive_seed(args.seed, DIAGNOSE, run.agent_step)
            generator = torch.Generator().manual_seed(seed)
            batch = replay.sample(args.batch_size, device, generator)
            noise = agent.network.draw_noise(generator)
            next_noise = agent.network.draw_noise(generator)
            run.log("diagnostics", diagnose(agent, batch, noise, next_noise))

        if game_over:
            run.log_episode(info["episode"], losses)
            if run.env_step >= args.learning_starts and not replay.ready():
                fail(f"--n-step {args.n_step} is longer than every game: nothing is learned")

    run.save(parts)  # a kill in the last evaluation costs no training
    run.finish(parts, evaluation(args.final_eval_episodes, FINAL, run.video()))
    replay.path.unlink()


# Flags that change results by rounding at most: a run may go on with others.
# All other flags are in the name of the run's folder, as a hash; --checkpoint-interval too, for the
# size of the replay's file depends on it.
EXECUTION_FLAGS = {
    "device",
    "threads",
    "matmul_precision",
    "runs_dir",
    "resume",
    "eval_only",
    "run_dir",
    "capture_video",
    "sparse_kernel",
    "track",
    "wandb_project",
    "wandb_entity",
}

# The replay's file depends on --total-timesteps, and is deleted at the end: more is another run.
LONGER_GOES_ON = False


# A compiled loop of the replay
@numba.njit(parallel=True)
def gather_stacks(frames, newest, oldest, out):
    """out[b] = the STACK frames up to number newest[b], black before oldest[b].

    frames (ring, SIZE, SIZE), out (batch, SIZE, SIZE, STACK)
    """
    for b in numba.prange(len(out)):
        for s in range(STACK):
            number = newest[b] - STACK + 1 + s
            black = number < oldest[b]
            frame = frames[number % len(frames)]
            for y in range(SIZE):
                for x in range(SIZE):
                    out[b, y, x, s] = 0 if black else frame[y, x]


# Appendix: the same in every file that has it


# === ENVIRONMENT GATE (identical in every file that has it) ===
GYMNASIUM = (
    "in Gymnasium 1.x, reset returns (observation, info) "
    "and step (observation, reward, terminated, truncated, info)"
)


def read_env_kwargs(args) -> dict:
    """The arguments of --env-kwargs."""
    try:
        kwargs = json.loads(args.env_kwargs or "{}")
    except ValueError:
        kwargs = None
    if not isinstance(kwargs, dict):
        fail(f"--env-kwargs {args.env_kwargs} is no JSON of the form " + '{"name": value}')
    return kwargs


def fail_in_environment(args, where: str, error: Exception) -> NoReturn:
    """One line for an error in code from elsewhere; its traceback goes to a file."""
    folder = run_folder(args)
    try:
        if args.eval_only or not (folder.is_dir() and os.access(folder, os.W_OK)):
            folder = Path(tempfile.mkdtemp())  # of its own: /tmp's may be another user's
        path = folder / "traceback.txt"
        lines = "".join(traceback.format_exception(error))
        path.write_text(lines, encoding="utf-8", errors="backslashreplace")
    except OSError as full:
        path = f"no file: {full.strerror}"

    reason = " ".join(str(error).split()) or "no message"
    hint = ""
    if where and "to unpack" in reason:
        hint = f"; {GYMNASIUM}"
    elif "GL" in reason:
        renderers = "egl or osmesa" if sys.platform == "linux" else "glfw"
        hint = f"; MUJOCO_GL={os.environ.get('MUJOCO_GL')}: start Python anew, with {renderers}"
    elif args.env_kwargs and not where:
        hint = f"; --env-kwargs {args.env_kwargs}"
    name = type(error).__name__
    fail(f"--env-id {args.env_id}: {where}{name}: {reason}{hint} (traceback in {path})")


def fail_where_it_ended(args, where: str, end: SystemExit) -> NoReturn:
    """One line for code from elsewhere that ends the program as if all were well."""
    if end.code:  # Ctrl-C and fail() too end here
        raise end
    fail(f"--env-id {args.env_id}: {where}it ended the program")


class Gate(gym.Wrapper):
    """Stands around an environment from elsewhere: nothing wrong gets past it.

    What goes in: actions inside the box, in its dtype. What comes out: observations of the declared
    shape and type, and rewards, all of them finite as float32, as Gymnasium 1.x has them. Anything
    else ends the program with one line: exit code 3 if a value is not finite, else 2.
    """

    LARGEST = np.float64(np.finfo(np.float32).max)  # what replay and networks can hold
    LONGEST = 100_000  # steps of an episode; without a limit an evaluation might never end

    def __init__(self, env: gym.Env, args, frames_per_step: int = 1, longest: int | None = None):
        super().__init__(env)
        self.args = args
        self.frames_per_step = frames_per_step
        self.env_step = 0  # of the whole run; train() sets it
        self.episode_steps = 0
        self.longest = max(longest or self.LONGEST, args.max_episode_steps or 0)
        self.bounds = env.action_space if isinstance(env.action_space, gym.spaces.Box) else None
        space = env.observation_space
        self.declared = space.spaces if isinstance(space, gym.spaces.Dict) else {None: space}

    def reset(self, seed: int | None = None, options: dict | None = None):
        if seed is not None:
            seed %= 2**31  # some environments take no more
        obs, info = self.call(self.env.reset, 2, seed=seed, options=options)
        self.check_obs(obs)
        self.episode_steps = 0
        return obs, self.check_info(info)

    def render(self):
        return self.guard(self.env.render)

    def step(self, action):
        if self.bounds is not None:
            low = self.bounds.low
            high = self.bounds.high
            action = np.minimum(np.maximum(np.asarray(action, low.dtype), low), high)
            # A byte of 0 is a value that is not finite: four times as fast as .all()
            if 0 in np.isfinite(action).tobytes():
                fail(
                    f"the action is not finite at env step {self.env_step}: learning has diverged, "
                    "or observations or actions are too large; the last checkpoint is kept",
                    exit_code=3,
                )
        self.env_step += self.frames_per_step
        obs, reward, terminated, truncated, info = self.call(self.env.step, 5, action)
        self.check_obs(obs)
        try:
            reward = float(reward.item() if isinstance(reward, np.ndarray) else reward)
        except Exception:  # of numbers, arrays and tensors
            self.refuse(f"a reward that is not one number: {reward!r}")
        if not abs(reward) <= self.LARGEST:
            self.refuse(f"the reward {reward}", exit_code=3)
        for flag in (terminated, truncated):
            if not isinstance(flag, bool) and not isinstance(flag, np.bool_):
                self.refuse(f"{flag!r} where terminated or truncated must be True or False")
        self.episode_steps += 1
        if self.episode_steps > self.longest and not (terminated or truncated):
            fail(
                f"--env-id {self.args.env_id}: an episode has lasted {self.longest:,} steps; "
                "--max-episode-steps cuts it off"
            )
        return obs, reward, bool(terminated), bool(truncated), self.check_info(info)

    def guard(self, method: Callable, *values, **named):
        """What a method of the environment returns."""
        where = f"{method.__name__} at env step {self.env_step}: "
        try:
            return method(*values, **named)
        except SystemExit as end:
            fail_where_it_ended(self.args, where, end)
        except Exception as error:
            fail_in_environment(self.args, where, error)

    def call(self, method: Callable, count: int, *values, **named) -> tuple:
        """What a method of the environment returns: a tuple of `count` values."""
        result = self.guard(method, *values, **named)
        if not isinstance(result, tuple) or len(result) != count:
            many = f"{len(result)} values" if isinstance(result, tuple) else type(result).__name__
            self.refuse(f"{many} from {method.__name__}; {GYMNASIUM}")
        return result

    def check_obs(self, obs) -> None:
        parts = obs if isinstance(obs, dict) else {None: obs}
        if parts.keys() != self.declared.keys():
            self.refuse(f"observations {list(parts)}, declared are {list(self.declared)}")
        for name, part in parts.items():
            shape = self.declared[name].shape
            try:
                part = np.asarray(part)
            except Exception:  # of arrays, and of tensors
                self.refuse("an observation that is no array")
            number = part.dtype.kind in "biuf" and part.dtype.itemsize <= 8
            if part.shape != shape or not number:
                self.refuse(
                    f"an observation of shape {part.shape} and type {part.dtype}, "
                    f"declared is shape {shape}"
                )
            dtype = self.declared[name].dtype
            largest = 65504.0 if dtype == np.float16 else self.LARGEST
            if part.dtype.kind == "f" and 0 in (np.abs(part) <= largest).tobytes():
                held_as = "float16" if dtype == np.float16 else "float32"
                self.refuse(f"an observation that is not finite as {held_as}", exit_code=3)
            if part.dtype != dtype and dtype.kind in "iu":
                with np.errstate(invalid="ignore"):
                    changed = part.astype(dtype) != part
                if changed.any():
                    self.refuse(f"an observation that does not fit its declared type, {dtype}")

    def check_info(self, info) -> dict:
        """The info without "episode", where RecordEpisodeStatistics will write."""
        if not isinstance(info, dict):
            self.refuse(f"{type(info).__name__} as info, which must be a dict")
        if "episode" in info:  # the environment's own, or the same dict as at the last end
            info = {name: value for name, value in info.items() if name != "episode"}
        return info

    def refuse(self, what: str, exit_code: int = 2) -> NoReturn:
        fail(
            f"--env-id {self.args.env_id} returned {what} (env step {self.env_step}); "
            "what was saved before is kept",
            exit_code,
        )


# === END ENVIRONMENT GATE ===


# === SPARSE LAYERS (identical in every file that has it) ===
class NetworkError(ValueError):
    """A network, a sparsity or a rule that does not fit; the message is one sentence."""


def erdos_renyi(shapes: dict[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
    """Sparsity of each layer by the Erdos-Renyi rule: density ~ sum(shape) / prod(shape).

    Shapes are (out, in) or (out, in, k_h, k_w). The budget counts all parameters; what each would
    lose is rounded down, as in the official code. Biases and norms (one dimension) stay dense, and
    so do layers whose density would pass 1; the other layers lose that much more.
    Mocanu et al. 2018; Evci et al. 2020, arXiv:1911.11134; section 2.2 of the paper.
    Raises NetworkError if the dense parameters alone exceed the budget.
    """
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    budget = sum(count - math.floor(sparsity * count) for count in size.values())
    dense = {name for name, shape in shapes.items() if len(shape) == 1}
    while len(dense) < len(shapes):
        rest = [name for name in shapes if name not in dense]
        free = budget - sum(size[name] for name in dense)
        epsilon = free / sum(sum(shapes[name]) for name in rest)
        if epsilon <= 0:
            raise NetworkError(
                f"sparsity {sparsity} is out of reach: biases and norms alone hold more parameters"
            )
        density = {name: epsilon * sum(shapes[name]) / size[name] for name in rest}
        overfull = {name for name in rest if density[name] > 1}
        if not overfull:
            return {name: 0.0 if name in dense else 1 - density[name] for name in shapes}
        dense |= overfull
    return dict.fromkeys(shapes, 0.0)


def uniform(shapes: dict[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
    """The same sparsity in every weight matrix; biases and norms stay dense."""
    return {name: 0.0 if len(shape) == 1 else sparsity for name, shape in shapes.items()}


def random_places(
    shape: tuple[int, ...], density: float, generator: torch.Generator
) -> torch.Tensor:
    """Places in the flattened weight that stay active: an exact number, at random, ascending."""
    total = math.prod(shape)
    count = max(1, round(density * total))
    permutation = torch.randperm(total, generator=generator, dtype=torch.int32)  # half of int64
    return permutation[:count].long().sort().values


def check_places(name: str, places: torch.Tensor, total: int) -> None:
    """Raises NetworkError if a rule returned anything but active places."""
    if places.dtype != torch.int64 or places.ndim != 1:
        found = f"{places.dtype} of shape {tuple(places.shape)}"
    elif len(places) == 0 or places[0] < 0 or places[-1] >= total or (places.diff() <= 0).any():
        found = "none, or some that are not ascending, not distinct or out of range"
    else:
        return
    raise NetworkError(
        f"a sparsity rule must return the places in the flattened weight that stay active, "
        f"int64 of one dimension, ascending, from 0 to {total - 1}; for {name} it returned {found}"
    )


# The active weights of a layer are sorted by block of 128 columns, then by row: while a compiled
# loop works on a block, its 128 inputs stay in the cache. Group g = block * rows + row holds the
# weights pointers[g] <= k < pointers[g + 1]. In a layer of 2 rows and 256 columns, groups 0 and 1
# are columns 0 to 127 of both rows, groups 2 and 3 are columns 128 to 255.
BLOCK = 128

PACKED_DENSITY = 0.25  # up to which packed products are faster than dense ones, on a CPU


def sort_into_blocks(
    row: torch.Tensor, col: torch.Tensor, shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The order that sorts entries (row, col) of a matrix into blocks; pointers to the groups."""
    rows, columns = shape
    group = col // BLOCK * rows + row
    groups = math.ceil(columns / BLOCK) * rows
    sizes = torch.bincount(group, minlength=groups)
    pointers = F.pad(sizes.cumsum(0), (1, 0))
    return torch.argsort(group, stable=True), pointers


class SparseLinear(nn.Module):
    """A linear layer that stores its active weights only: `values` (nnz,), and `bias` (out,).

    `active` (nnz,) lists their places row * in_features + column, in the order of
    sort_into_blocks: the dense matrix is zeros(out * in) with `values` written at `active`.
    `packed` is the class that multiplies without the dense matrix, or None.
    """

    kept = None  # a DenseCopy, if `sparsify` gives it one; else the dense matrix is built each time

    def __init__(self, linear: nn.Linear, active: torch.Tensor, packed: type | None = None):
        super().__init__()
        self.shape = tuple(linear.weight.shape)
        row = active // self.shape[1]
        col = active % self.shape[1]
        order, _ = sort_into_blocks(row, col, self.shape)
        active = active[order]
        self.values = nn.Parameter(linear.weight.detach().flatten()[active])
        self.bias = linear.bias
        self.register_buffer("active", active.int())  # saved, in half the memory of int64
        if packed:
            self.kernel = "packed"
            self.product = packed(row[order], col[order], self.shape)
        else:
            self.kernel = "dense"
            self.register_buffer("index", active, persistent=False)  # the int64 that torch needs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, in) -> (batch, out)"""
        if self.kernel == "packed":
            return self.product(x, self.values, self.bias)
        return F.linear(x, dense_weight(self), self.bias)

    def _load_from_state_dict(self, state: dict, prefix: str, *rest) -> None:
        check_mask(self, state[prefix + "active"])
        super()._load_from_state_dict(state, prefix, *rest)


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """The values of a sparse layer in their places among zeros, in the dense weight's shape."""
    if layer.kept and layer.kept.worth_keeping(layer.values):
        return layer.kept(layer)
    zeros = layer.values.new_zeros(math.prod(layer.shape))
    return zeros.index_copy_(0, layer.index, layer.values).view(layer.shape)


def check_mask(layer: nn.Module, saved: torch.Tensor) -> None:
    """Raises NetworkError if a checkpoint was made with another mask."""
    if not torch.equal(saved.cpu(), layer.active.cpu()):
        raise NetworkError(
            "the saved mask is not the one drawn here: another --mask-seed (default: --seed), or "
            "another version of PyTorch or of this file?"
        )


def check_convolution(name: str, layer: nn.Conv2d, convolution: type | None) -> None:
    """Raises NetworkError, in one sentence, if a convolution cannot be made sparse."""
    if convolution is None:
        raise NetworkError(
            f"{name}: this file has no sparse convolutions; copy SparseConv2d from "
            "drqv2_sparse.py and give it to sparsify as convolution="
        )
    if layer.padding_mode != "zeros":
        raise NetworkError(f"{name}: a sparse convolution can only be padded with zeros")


def sparsify(
    network: nn.Module,
    sparsity: float,
    distribution: str,
    mask_seed: int,
    kernel: str,
    device: torch.device,
    rule: Callable = random_places,
    packed: type | None = None,
    convolution: type | None = None,
    keeper: type | None = None,
) -> None:
    """Prunes a network once, before training, and moves it to its device.

    Each layer that loses weights is replaced by one that stores the survivors only, with their
    initial values (no rescaling).

    distribution: erdos_renyi or uniform, how the sparsity is spread over the layers
    kernel: packed, dense, or auto: packed on a CPU up to PACKED_DENSITY
    rule(shape, density, generator): which places of a pruned weight stay active
    packed, convolution, keeper: the classes of packed products, sparse convolutions and kept
        dense weights that this file has

    Raises NetworkError if the sparsity is out of reach, or if a rule returns no places.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    spread = {"erdos_renyi": erdos_renyi, "uniform": uniform}[distribution]
    layer_sparsity = spread(shapes, sparsity)
    generator = torch.Generator().manual_seed(mask_seed)
    prunable = (nn.Linear, nn.Conv2d)  # a class derived from them multiplies in its own way
    names = [name for name, layer in network.named_modules() if type(layer) in prunable]
    for name in names:
        layer = network.get_submodule(name)  # one at a time, so that dense weights are freed early
        total = layer.weight.numel()
        density = 1 - layer_sparsity[name + ".weight"]
        if round(density * total) == total:
            continue  # dense
        if total >= 2**31:
            raise NetworkError(f"{name} has {total:,} weights; a sparse layer has at most 2^31 - 1")
        active = rule(tuple(layer.weight.shape), density, generator)
        check_places(name, active, total)
        if isinstance(layer, nn.Conv2d):
            check_convolution(name, layer, convolution)
            sparse = convolution(layer, active)
        else:
            cheaper = device.type == "cpu" and len(active) <= PACKED_DENSITY * total
            wanted = kernel == "packed" or (kernel == "auto" and cheaper)
            possible = layer.bias is not None
            sparse = SparseLinear(layer, active, packed if wanted and possible else None)
        if keeper:
            sparse.kept = keeper()
        network.set_submodule(name, sparse)
    network.to(device)


def layer_table(network: nn.Module) -> list[dict]:
    """What a finished network stores: a row for each layer, and one for its other parameters."""
    table = []
    for name, layer in network.named_modules():
        if hasattr(layer, "active"):
            active = layer.values.numel()
            shape = layer.shape
            kernel = layer.kernel
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            active = layer.weight.numel()
            shape = layer.weight.shape
            kernel = "torch"
        else:
            continue
        row = {"layer": name, "shape": list(shape), "active": active, "total": math.prod(shape)}
        table.append({**row, "kernel": kernel})
    stored = sum(parameter.numel() for parameter in network.parameters())
    other = stored - sum(row["active"] for row in table)
    row = {"layer": "other parameters", "shape": [other], "active": other, "total": other}
    return [*table, {**row, "kernel": ""}]


# === END SPARSE LAYERS ===


# === KEPT DENSE WEIGHTS (identical in every file that has it) ===
class DenseCopy:
    """The dense weight of a sparse layer, written anew only after its values have changed.

    PyTorch counts the changes of a tensor (its version). Steps of fused optimisers escape it:
    count_step counts them. So does what a CUDA graph changes: GraphedFunction raises `generation`.
    A change through .data escapes all of these.

    What lies between the values stays zero. In memory, the weights of a convolution have the input
    channels last, as its images do.
    """

    generation = 0  # raised where every copy must be written anew

    def __init__(self):
        self.memory = None
        self.version = None

    def __deepcopy__(self, memo: dict) -> "DenseCopy":
        return DenseCopy()  # of another layer, whose values go their own way

    def worth_keeping(self, values: torch.Tensor) -> bool:
        """Whether to keep a dense weight of these values.

        Not of a target network, which needs no gradient: a copy would only take memory. Nor of
        values that are no parameter, such as those of a noisy layer.
        """
        used = torch.is_grad_enabled() or self.memory is not None
        return used and isinstance(values, nn.Parameter)

    def __call__(self, layer: nn.Module) -> torch.Tensor:
        values = layer.values
        kind = (values.dtype, values.device)
        if self.memory is None or (self.memory.dtype, self.memory.device) != kind:
            self.memory = values.new_zeros(math.prod(layer.shape))
            self.index = channels_last(layer.index, layer.shape)
        version = (id(values), kind, values._version, DenseCopy.generation)
        if self.version != version:
            with torch.no_grad():
                self.memory.index_copy_(0, self.index, values)
            self.version = version
        return KeptWeight.apply(values, self.memory, self.index, layer.shape)


def channels_last(index: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Places in a flattened weight (out, in, k_h, k_w) -> the same in (out, k_h, k_w, in)."""
    if len(shape) == 2:
        return index
    _, channels, *kernel = shape
    size = math.prod(kernel)
    row = index // (channels * size)
    channel = index // size % channels
    return (row * size + index % size) * channels + channel


def count_step(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    """Counts an optimiser's step as a change, since fused ones leave versions as they are."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(group["params"])


register_optimizer_step_post_hook(count_step)


class KeptWeight(torch.autograd.Function):
    """A kept dense weight as a function of the values."""

    @staticmethod
    def forward(ctx, values, memory, index, shape):
        ctx.save_for_backward(index)
        rows, channels, *kernel = shape
        return memory.view(rows, *kernel, channels).movedim(-1, 1)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return grad.movedim(1, -1).flatten().index_select(0, index), None, None, None


# === END KEPT DENSE WEIGHTS ===


# === PACKED KERNELS (identical in every file that has it) ===
# What the compiler may change, by the names of LLVM: the order of sums, a product and a sum in one
# instruction, the sign of zero. It may not assume that nothing is infinite or NaN, as with
# fastmath=True. The loops take four weights at a time, so that y[sample] is read and written a
# quarter as often.
REORDER = {"reassoc", "contract", "nsz"}


@numba.njit(parallel=True, fastmath=REORDER)
def packed_product(pointers, col, order, values, bias, x_t, y_t):
    """y_t[row] = bias[row] + the sum of values[k] * x_t[col[k]] over the active weights k of row.

    With order: values[order[k]]. Without bias: the sum.
    """
    rows = len(y_t)
    for block in range((len(pointers) - 1) // rows):
        for row in numba.prange(rows):
            y = y_t[row]
            if block == 0:
                y[:] = 0 if bias is None else bias[row]
            k = pointers[block * rows + row]
            end = pointers[block * rows + row + 1]
            while k + 4 <= end:
                w0 = values[k if order is None else order[k]]
                w1 = values[k + 1 if order is None else order[k + 1]]
                w2 = values[k + 2 if order is None else order[k + 2]]
                w3 = values[k + 3 if order is None else order[k + 3]]
                x0 = x_t[col[k]]
                x1 = x_t[col[k + 1]]
                x2 = x_t[col[k + 2]]
                x3 = x_t[col[k + 3]]
                for sample in range(len(y)):
                    y[sample] += (
                        w0 * x0[sample] + w1 * x1[sample] + w2 * x2[sample] + w3 * x3[sample]
                    )
                k += 4
            while k < end:
                w = values[k if order is None else order[k]]
                x = x_t[col[k]]
                for sample in range(len(y)):
                    y[sample] += w * x[sample]
                k += 1


@numba.njit(parallel=True, fastmath=REORDER)
def packed_gradient(pointers, col, grad_t, x_t, grad_values, grad_bias):
    """grad_values[k] = <grad_t[row of k], x_t[col[k]]>; grad_bias[row] = the sum of grad_t[row]."""
    rows = len(grad_t)
    for block in range((len(pointers) - 1) // rows):
        for row in numba.prange(rows):
            grad = grad_t[row]
            if block == 0:
                grad_bias[row] = grad.sum()
            k = pointers[block * rows + row]
            end = pointers[block * rows + row + 1]
            while k + 4 <= end:
                x0 = x_t[col[k]]
                x1 = x_t[col[k + 1]]
                x2 = x_t[col[k + 2]]
                x3 = x_t[col[k + 3]]
                dot0 = dot1 = dot2 = dot3 = np.float32(0)
                for sample in range(len(grad)):
                    dot0 += grad[sample] * x0[sample]
                    dot1 += grad[sample] * x1[sample]
                    dot2 += grad[sample] * x2[sample]
                    dot3 += grad[sample] * x3[sample]
                grad_values[k] = dot0
                grad_values[k + 1] = dot1
                grad_values[k + 2] = dot2
                grad_values[k + 3] = dot3
                k += 4
            while k < end:
                x = x_t[col[k]]
                dot = np.float32(0)
                for sample in range(len(grad)):
                    dot += grad[sample] * x[sample]
                grad_values[k] = dot
                k += 1


class PackedLinear(torch.autograd.Function):
    """y = x W^T + b in time proportional to the number of active weights of W.

    Works on x^T (in, batch), of which one contiguous row is read for each active weight. The
    results are transposed views, so that a ReLU and a packed layer that follow go on in this
    layout without a copy.
    """

    @staticmethod
    def forward(ctx, x, values, bias, places):
        x_t = x.t().contiguous()  # (in, batch)
        y = x.new_empty_strided((len(x), len(bias)), (1, len(x)))  # y^T is contiguous
        packed_product(
            places.pointers,
            places.col,
            None,
            values.detach().numpy(),
            bias.detach().numpy(),
            x_t.numpy(),
            y.t().numpy(),
        )
        ctx.save_for_backward(x_t, values)
        ctx.places = places
        return y

    @staticmethod
    def backward(ctx, grad):
        x_t, values = ctx.saved_tensors
        places = ctx.places
        grad_t = grad.t().contiguous()  # (out, batch)
        grad_x_t = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x_t = torch.empty_like(x_t)
            packed_product(
                places.pointers_t,
                places.row,
                places.by_column,
                values.detach().numpy(),
                None,
                grad_t.numpy(),
                grad_x_t.numpy(),
            )
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_values = torch.empty_like(values)
            grad_bias = grad_t.new_empty(len(grad_t))
            packed_gradient(
                places.pointers,
                places.col,
                grad_t.numpy(),
                x_t.numpy(),
                grad_values.numpy(),
                grad_bias.numpy(),
            )
        return None if grad_x_t is None else grad_x_t.t(), grad_values, grad_bias, None


class PackedProduct:
    """Where the active weights of a layer are, by row and by column, and the product with them.

    int32 arrays of NumPy, which copies of a network share: they never change.
    """

    def __init__(self, row: torch.Tensor, col: torch.Tensor, shape: tuple[int, int]):
        _, pointers = sort_into_blocks(row, col, shape)
        by_column, pointers_t = sort_into_blocks(col, row, shape[::-1])  # the same for W^T
        self.pointers = pointers.int().numpy()
        self.col = col.int().numpy()
        self.pointers_t = pointers_t.int().numpy()
        self.row = row[by_column].int().numpy()
        self.by_column = by_column.int().numpy()

    def __deepcopy__(self, memo: dict) -> "PackedProduct":
        return self

    def __call__(self, x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """(batch, in) -> (batch, out)"""
        return PackedLinear.apply(x, values, bias, self)


# === END PACKED KERNELS ===


# === SPARSE CONVOLUTIONS (identical in every file that has it) ===
class SparseConv2d(nn.Module):
    """A convolution that stores its active weights only, and multiplies with a dense one.

    `active` (nnz,) lists their places in the flattened weight (out, in, k_h, k_w).
    """

    kernel = "dense"
    kept = None  # a DenseCopy, if `sparsify` gives it one; else the dense weight is built each time

    def __init__(self, conv: nn.Conv2d, active: torch.Tensor):
        super().__init__()
        self.shape = tuple(conv.weight.shape)
        self.how = (conv.stride, conv.padding, conv.dilation, conv.groups)
        self.values = nn.Parameter(conv.weight.detach().flatten()[active])
        self.bias = conv.bias
        self.register_buffer("active", active.int())  # saved, in half the memory of:
        self.register_buffer("index", active, persistent=False)  # the int64 that torch needs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, in, height, width) -> (batch, out, height, width)"""
        return F.conv2d(x, dense_weight(self), self.bias, *self.how)

    def _load_from_state_dict(self, state: dict, prefix: str, *rest) -> None:
        check_mask(self, state[prefix + "active"])
        super()._load_from_state_dict(state, prefix, *rest)


# === END SPARSE CONVOLUTIONS ===


# === DEVICE (identical in every file that has it) ===
def choose_device(args) -> torch.device:
    """The device of --device; sets the number of CPU threads of PyTorch and numba."""
    cuda = torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        fail("--device cuda: there is no CUDA here; use --device cpu")
    device = torch.device(args.device.replace("auto", "cuda" if cuda else "cpu"))
    if args.sparse_kernel == "packed" and device.type == "cuda":
        fail("--sparse-kernel packed: runs on the CPU only; add --device cpu")
    threads = args.threads or torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    torch.set_num_threads(threads)  # after numba, whose start sets the number for both
    if device.type == "cuda":
        torch.set_float32_matmul_precision(args.matmul_precision)
        torch.backends.cudnn.allow_tf32 = args.matmul_precision == "high"  # of convolutions
    return device


# === END DEVICE ===


# === DIAGNOSTICS (identical in every file that has it) ===
def run_and_record(encoder: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, list, list]:
    """The features of an encoder (batch, hidden); the outputs of its linear and ReLU layers."""
    linear = nn.Linear | SparseLinear
    relu = nn.ReLU | nn.LeakyReLU
    linear_outputs = []
    relu_outputs = []

    def record(layer, inputs, output) -> None:
        outputs = relu_outputs if isinstance(layer, relu) else linear_outputs
        outputs.append(output)

    recorded = [layer for layer in encoder.modules() if isinstance(layer, linear | relu)]
    handles = [layer.register_forward_hook(record) for layer in recorded]
    with torch.no_grad():
        features = encoder(inputs)
    for handle in handles:
        handle.remove()
    return features, linear_outputs, relu_outputs


def check_shape(what: str, output: torch.Tensor, **expected: int) -> None:
    """Raises NetworkError, in one sentence, if a network's output has not the shape of a contract.

    check_shape("critic(obs, action)", q, critics=1, batch=3)
    """
    shape = tuple(getattr(output, "shape", [type(output).__name__]))
    needed = tuple(expected.values())
    if shape != needed:
        names = ", ".join(expected)
        raise NetworkError(
            f"{what} must return a tensor of shape ({names}); "
            f"for a test batch it returned {shape} instead of {needed}"
        )


def check_encoder(network: nn.Module, part: str, inputs: torch.Tensor) -> None:
    """Raises NetworkError, in one sentence, if diagnostics cannot measure a part of a network."""
    needs = (
        f"diagnostics measure {type(network).__name__}.{part}: a module with nn.Linear and "
        "nn.ReLU (or nn.LeakyReLU) layers that returns (batch, features)"
    )
    try:
        encoder = network.get_submodule(part)
    except AttributeError:
        raise NetworkError(f"{needs}; there is no such part") from None
    features, linear_outputs, relu_outputs = run_and_record(encoder, inputs)
    if not linear_outputs or not relu_outputs:
        raise NetworkError(f"{needs}; it lacks one of these layers")
    if features.ndim != 2 or len(features) != len(inputs):
        raise NetworkError(f"{needs}; it returned {tuple(features.shape)}")


def stable_rank(
    features: torch.Tensor, mass: float = 0.99, threshold: float = 0.01
) -> tuple[int, int]:
    """Two effective ranks of features (batch, hidden).

    First: how many leading singular values hold `mass` of their sum (Kumar et al. 2021; the
    official code). Second: how many singular values of features / sqrt(batch) exceed `threshold`
    (section 4.1, which gives no threshold; this one and the scaling are those of Lyle et al. 2022,
    arXiv:2204.09560).
    """
    singular = torch.linalg.svdvals(features.float())
    cumulative = singular.cumsum(0) / singular.sum()
    rank_by_mass = int((cumulative < mass).sum()) + 1
    rank_by_threshold = int((singular / math.sqrt(len(features)) > threshold).sum())
    return rank_by_mass, rank_by_threshold


def dormant_ratio(outputs: list[torch.Tensor], tau: float = 0.1) -> float:
    """Percentage of units whose mean |output| is at most tau times that of their layer.

    outputs: one tensor (batch, units) for each layer.
    Equation 1 of the paper; Sokar et al. 2023, arXiv:2302.12902.
    """
    scores = [output.abs().mean(0) for output in outputs]  # (units,) each
    dormant = sum(int((score / (score.mean() + 1e-9) <= tau).sum()) for score in scores)
    return 100 * dormant / sum(len(score) for score in scores)


def measure_plasticity(
    encoder: nn.Module,
    inputs: torch.Tensor,
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor] | tuple[torch.Tensor, ...],
) -> dict[str, float]:
    """The measurements of section 4 for one network, on a batch of inputs to its encoder."""
    features, linear_outputs, relu_outputs = run_and_record(encoder, inputs)
    rank_99, rank_threshold = stable_rank(features)
    active_units = torch.cat([(output > 0).float().mean(0) for output in relu_outputs])
    return {
        "srank_99": rank_99,
        "srank_threshold": rank_threshold,
        "dormant_ratio": dormant_ratio(linear_outputs),
        "dormant_ratio_relu": dormant_ratio(relu_outputs),
        "active_units": float(active_units.mean()),
        "grad_norm": float(get_total_norm(gradients)),
        "param_norm": float(get_total_norm(parameters)),
        "feature_norm": float(features.norm(dim=1).mean()),
    }


# === END DIAGNOSTICS ===


# === FRAME FILE (identical in every file that has it) ===
def open_frames(path: Path, frames_shape: tuple[int, ...], mode: str) -> np.ndarray:
    """Frames of uint8 that live in a file; `frames.base.flush()` brings them to the disk.

    mode: w+ for a new file, r+ for the one of a resumed run.
    Ends the program if the disk is too full, or if the file is not as large as it was.
    """
    needed = math.prod(frames_shape)  # bytes
    if mode == "r+":
        if not path.exists() or path.stat().st_size != needed:
            fail(f"{path} is not as the checkpoint left it; bring it back, or use --no-resume")
    else:
        try:
            with open(path, "wb") as file:  # in full, so that no other program can take the room
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, needed)
                elif needed > shutil.disk_usage(path.parent).free:
                    raise OSError(0, "the disk is too full")
                else:  # macOS, Windows
                    for start in range(0, needed, 2**24):
                        file.write(bytes(min(2**24, needed - start)))
        except OSError as error:
            path.unlink(missing_ok=True)
            free = shutil.disk_usage(path.parent).free
            leave_no_folder(path.parent)
            fail(
                f"{path} needs {needed / 1e9:.3g} GB, free are {free / 1e9:.3g} GB "
                f"({error.strerror}); lower --buffer-size or --checkpoint-interval"
            )
    return np.asarray(np.memmap(path, np.uint8, "r+", shape=frames_shape))


def to_device(array, device: torch.device) -> torch.Tensor:
    """A NumPy array or tensor of the CPU on the device; a GPU copies it while Python goes on."""
    tensor = torch.as_tensor(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # a copy, unless it is pinned
    return tensor.to(device, non_blocking=True)


# === END FRAME FILE ===


# === COMPILED LOOPS (identical in every file that has it) ===
def keep_compiled(loop) -> None:
    """Keeps a compiled loop on the disk (NUMBA_CACHE_DIR, or __pycache__), if it can be written.

    What is damaged there, or was compiled under another module's name, is compiled again.
    """
    try:
        loop.enable_caching()
    except RuntimeError:  # no folder that can be written
        return
    load = loop._cache.load_overload
    save = loop._cache.save_overload

    def load_or_forget(*key):
        try:
            return load(*key)
        except Exception:
            with contextlib.suppress(OSError):
                loop._cache.flush()
            return None

    def save_if_possible(*compiled):
        with contextlib.suppress(OSError):  # such as a full disk, where a run may have another one
            save(*compiled)

    loop._cache.load_overload = load_or_forget
    loop._cache.save_overload = save_if_possible


# === END COMPILED LOOPS ===


# === RUNS (identical in every file that has it) ===
# What a seed derived from (--seed, purpose, ...) is for
TRAIN, EVAL, FINAL, DIAGNOSE = range(4)

# What ends a run with one line. Slurm sends SIGTERM when it takes a node back or time is up
STOPPING = (signal.SIGINT, signal.SIGTERM)

# Of this file as it was loaded, which tells one version of an agent from another
FILE_DIGEST = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

LOCKS = []  # train() releases them at its end: a traceback that is kept would keep them locked


def derive_seed(*key: int) -> int:
    """A seed below 2^32 for a key. Keys that differ in zeros at their end give the same seed."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def fail(message: str, exit_code: int = 2) -> NoReturn:
    """Ends the program with one line for a person.

    Exit code 2: something is wrong with flags, environment, files, disk or memory. 3: a value is
    infinite or not a number.
    """
    message = " ".join(message.splitlines())  # arrays and spaces have several
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, beside the bar
    if __name__ == "__main__":
        sys.unraisablehook = lambda _: None  # half-made objects may complain as they are freed
    sys.exit(exit_code)


def is_out_of_memory(error: Exception) -> bool:
    """Python's errors, PyTorch's, and those of CUDA's libraries, such as ..._ALLOC_FAILED."""
    words = "out of memory|allocate memory|bad_alloc|alloc(ation)?_failed"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error), re.IGNORECASE))


def one_line_errors(function: Callable) -> Callable:
    """Decorates a function so that a full disk or memory ends the program with one line.

    For a caller in Python, a run that is finished already returns and does not exit. The numbers of
    threads, and what signals do, are as they were.
    """

    @wraps(function)
    def guarded(args):
        handlers = {number: signal.getsignal(number) for number in STOPPING}
        on_thread_error = threading.excepthook
        numba_threads = numba.get_num_threads()
        torch_threads = torch.get_num_threads()
        try:
            return function(args)
        except SystemExit as end:
            if end.code:
                raise
        except (OSError, MemoryError, RuntimeError) as error:
            # torch.save hides the disk's error, and Ctrl-C, behind its own
            hidden = error.__context__
            if isinstance(hidden, SystemExit):
                raise hidden from None
            if isinstance(error, OSError) or isinstance(hidden, OSError):
                cause = error if isinstance(error, OSError) else hidden
                where = f" ({cause.filename})" if cause.filename else ""
                fail(
                    f"{cause.strerror or cause}{where}; what was saved before is kept, "
                    "and the same command goes on from there"
                )
            if is_out_of_memory(error):
                reason = str(error).partition("\n")[0] or type(error).__name__
                fail(
                    f"out of memory ({reason}); lower --width-scale, --batch-size or --buffer-size"
                )
            raise
        finally:
            while LOCKS:
                LOCKS.pop().release()
            if __name__ != "__main__":
                numba.set_num_threads(numba_threads)
                torch.set_num_threads(torch_threads)
                threading.excepthook = on_thread_error
                if threading.current_thread() is threading.main_thread():
                    for number, handler in handlers.items():
                        signal.signal(number, handler or signal.SIG_DFL)

    return guarded


def stop_unless_finite(agent_step: int, *values: torch.Tensor) -> None:
    """Ends the program with exit code 3 if a value is infinite or not a number."""
    if not all(value.isfinite().all() for value in values):
        fail(f"a value is not finite at {agent_step=}; the last checkpoint is kept", exit_code=3)


def parse_flags(flags: type):
    """The flags of the command line. --help prints them in the groups that they have in the file.

    Yes or no is --resume or --no-resume; --resume=True and --resume true are understood too. The
    names of the flags that were given are in .given of the result.
    """
    with contextlib.suppress(AttributeError):  # for a terminal that lacks a letter
        sys.stdout.reconfigure(errors="backslashreplace")
    words = sys.argv[1:]
    if {"-h", "--help"} & {*words}:
        try:
            print(describe_flags(flags), flush=True)
        except BrokenPipeError:  # --help | head
            os._exit(0)
        sys.exit(0)
    switches = {name for name, hint in get_type_hints(flags).items() if hint is bool}
    plain, given = [], set()
    while words:
        flag, equals, value = words.pop(0).partition("=")
        name = flag[2:].replace("-", "_")
        given.add(name.removeprefix("no_"))
        if name in switches:
            if not equals and words and words[0].lower() in ("true", "false"):
                equals, value = "=", words.pop(0)
            if equals and value.lower() not in ("true", "false"):
                fail(f"{flag} {value}: must be {flag} or --no-{flag[2:]}")
            plain.append(f"--no-{flag[2:]}" if value.lower() == "false" else flag)
        else:
            plain.append(f"{flag}{equals}{value}")
    args = tyro.cli(flags, args=plain)
    args.given = given
    return args


def describe_flags(flags: type) -> str:
    """What --help prints, from this file: docstring, and groups, types and texts of the flags."""
    width = min(shutil.get_terminal_size().columns, 100)
    wrap = partial(textwrap.wrap, width=width, break_on_hyphens=False)
    code = Path(__file__).read_text()
    summary = ast.get_docstring(ast.parse(code)).split("\n\n")[0]
    page = code.partition("\n")[0].removeprefix("# docs: ")
    usage = f"usage: python {sys.argv[0]} [--FLAG VALUE] ..."
    lines = [usage, "", *wrap(summary), f"Its page: {page}"]

    def shown(kind) -> str:  # a type, or a word of a Literal
        if kind is str:
            return "TEXT"
        return kind.__name__.upper() if isinstance(kind, type) else str(kind)

    # In the class: a comment right above a flag begins a group; its docstring is its help
    types = flag_types(flags)
    class_code = inspect.getsource(flags)
    statements = ast.parse(class_code).body[0].body
    for statement, below in zip(statements, [*statements[1:], None]):
        if not isinstance(statement, ast.AnnAssign):
            continue
        name = statement.target.id
        flag = f"--{name.replace('_', '-')}"
        default = getattr(flags, name, None)
        above = class_code.splitlines()[statement.lineno - 2].strip()
        if above.startswith("# "):
            lines += ["", above[2:]]
        if types[name] == (bool,):
            lines.append(f"  {flag}, --no-{flag[2:]}")
            default = "yes" if default else "no"
        else:
            kinds = [kind for kind in types[name] if kind is not type(None)]
            lines.append(f"  {flag} {'|'.join(map(shown, kinds))}")
        text = ""
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            text = " ".join(str(below.value.value).split())
        if default is not None:  # else the text says what happens
            text = f"{text} (default: {default})".strip()
        indent = " " * 8
        lines += wrap(text, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)


def check_flags(args) -> None:
    """Ends the program if a flag is not of its type, or breaks the rule beside it in Args.

    Values of NumPy become Python's.
    """
    types = flag_types(type(args))
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, np.generic):  # which a checkpoint could not be read with
            value = value.item()
            setattr(args, name, value)
        if value is not None and not isinstance(value, bool | int | float | str):
            fail(f"{flag} {value!r} is not allowed: a flag is a number, a text, or yes or no")
        classes = [kind for kind in types[name] if isinstance(kind, type)]
        classes += [int] if float in classes else []  # 1 for 1.0
        if value not in types[name] and not isinstance(value, tuple(classes)):
            allowed = " or ".join(str(getattr(kind, "__name__", kind)) for kind in types[name])
            fail(f"{flag} {value!r} is not allowed: it must be {allowed}")
        if isinstance(value, str) and not (value and value.isprintable()):
            fail(f"{flag} {value!r} is not allowed: it must be text that can be printed")
        for rule in getattr(hint, "__metadata__", ()):
            if value is not None and not eval(rule, {**vars(args), "x": value, "inf": math.inf}):
                needed = re.sub(r"\bx\b", name, rule)
                fail(f"{flag} {value} is not allowed: {needed}")
        if type(value) is int and value > 10**12:
            fail(f"{flag} {value} is not allowed: {name} <= 10**12")
    if args.init_from:
        args.init_from = os.path.normpath(args.init_from)  # runs/x/ is runs/x
    if "/" in args.exp_name:
        fail(f"--exp-name {args.exp_name}: is part of a folder's name and cannot contain /")


def flag_types(flags: type) -> dict[str, tuple]:
    """The types that each flag can have, or its values if it takes one of some words."""

    def spread(hint) -> tuple:  # of a union its types, of a Literal its words
        return sum(map(spread, get_args(hint)), ()) or (hint,)

    return {name: spread(hint) for name, hint in get_type_hints(flags).items()}


def interrupt(*_) -> NoReturn:
    """What Ctrl-C and SIGTERM do."""
    tqdm.write("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
    sys.exit(1)


def ignore_disk_errors(failure) -> None:
    """Silences a full disk in TensorBoard's thread, which tells the main thread as well."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def set_up_process(args) -> None:
    """Checks the flags; seeds the global generators; makes Ctrl-C and SIGTERM end with one line."""
    check_flags(args)
    if args.run_dir:
        take_flags(args)
    threading.excepthook = ignore_disk_errors
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    warnings.filterwarnings("ignore", module="gymnasium")  # precision of Box bounds, age of tasks
    if threading.current_thread() is threading.main_thread():
        for number in STOPPING:
            signal.signal(number, interrupt)


def run_folder(args) -> Path:
    """runs/<env>__<exp_name>__w<width>[__d<depth>]__s<sparsity>__<hash>__seed<seed>.

    The hash covers the flags that change results, but for the seed and flags that are None: so a
    new flag that is None by default does not rename older runs.
    """
    if args.run_dir:
        return Path(os.path.expanduser(args.run_dir))
    flags = {name: value for name, value in result_flags(args).items() if value is not None}
    del flags["seed"]
    digest = hashlib.sha256(json.dumps(flags, sort_keys=True).encode())
    parts = [
        args.env_id.replace("/", "-").replace(":", "-"),
        args.exp_name,
        f"w{args.width_scale:.12g}",
        f"s{args.sparsity:.12g}",
        digest.hexdigest()[:8],
        f"seed{args.seed}",
    ]
    if args.depth_scale != 1:
        parts.insert(3, f"d{args.depth_scale}")
    return Path(os.path.expanduser(args.runs_dir)) / "__".join(parts)


def result_flags(args) -> dict:
    """The flags that tell runs apart."""
    others = EXECUTION_FLAGS | ({"total_timesteps"} if LONGER_GOES_ON else set())
    types = flag_types(type(args))
    return {
        name: float(value) if type(value) is int and float in types[name] else value
        for name, value in asdict(args).items()
        if name not in others
    }


def take_flags(args) -> None:
    """With --run-dir: the flags that change results become those of its run.

    --final-eval-episodes stays where it was given. Ends the program if another was given that the
    run does not have.
    """
    if not args.eval_only:
        fail("--run-dir goes with --eval-only; to train, a run finds its folder by its flags")
    path = Path(os.path.expanduser(args.run_dir)) / "args.json"
    try:
        made_with = dict(json.loads(path.read_text())["args"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"--run-dir {args.run_dir}: cannot read {path} ({type(error).__name__})")
    if reason := other_agent(args, made_with):
        fail(f"--run-dir {args.run_dir}: {reason}")
    given = getattr(args, "given", ())  # a caller in Python gives what is not the default
    for name in made_with.keys() & ({"total_timesteps"} | result_flags(args).keys()):
        value = getattr(args, name)
        if name not in given and value == getattr(type(args), name):
            setattr(args, name, made_with[name])
        elif value != made_with[name] and name != "final_eval_episodes":
            flag = f"--{name.replace('_', '-')}"
            fail(f"--run-dir {args.run_dir}: made with {flag} {made_with[name]}, not {value}")
    check_flags(args)


def other_agent(args, made_with: dict) -> str:
    """A line if the flags of a run are those of another agent, else nothing."""
    theirs = made_with.keys() - asdict(args)
    ours = asdict(args).keys() - made_with
    if not theirs or not ours:  # another version of this agent has more flags, or fewer
        return ""
    flag = f"--{min(theirs).replace('_', '-')}"
    return f"this run is of another agent, {made_with.get('exp_name')}, which has {flag}"


def describe_nearest(args) -> str:
    """The run in --runs-dir that differs least from these flags, and in which of them."""
    found = []
    for path in sorted(Path(os.path.expanduser(args.runs_dir)).glob("*/args.json")):
        try:
            made_with = json.loads(path.read_text())["args"]
            same_agent = made_with["exp_name"] == args.exp_name
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if same_agent and (path.parent / "checkpoint.pt").exists():
            differing = [
                f"--{name.replace('_', '-')} {made_with.get(name)} (not {value})"
                for name, value in result_flags(args).items()
                if made_with.get(name) != value
            ]
            found.append((len(differing), path.parent, differing))
    if not found:
        return "train first, same flags"
    _, folder, differing = min(found)
    return f"{folder} has {', '.join(differing)}; --run-dir {folder} evaluates it"


def open_run(run_dir: str | Path, render_mode: str | None = None) -> "Run":
    """A trained run, to be read in Python."""
    filming = render_mode is not None
    args = Args(run_dir=str(run_dir), eval_only=True, capture_video=filming, device="cpu")
    take_flags(args)
    return Run(args, getattr(args, "action_repeat", 1))


class Run:
    """One run: its folder, its counters, and all that is written there.

    agent_step counts decisions, update_step gradient updates, episode the training episodes that
    have begun, env_step simulator frames (decisions times the action repeat).
    """

    def __init__(self, args, action_repeat: int = 1):
        """Finds or creates the run of these flags. Ends the program if it is finished already."""
        self.args = args
        self.action_repeat = action_repeat
        self.folder = run_folder(args)
        self.agent_step = 0
        self.update_step = 0
        self.episode = 0
        self.csv_bytes = 0  # length of metrics.csv at the checkpoint
        self.csv_digest = hashlib.sha256()  # of all that was written there
        self.checkpoint = self.open_folder()
        if self.checkpoint and self.checkpoint["finished"] and not args.eval_only:
            made_with = self.checkpoint.get("args", vars(args))
            if made_with["total_timesteps"] < args.total_timesteps:
                self.go_back_before_the_end()
                return
            if not (self.folder / "args.json").exists():
                fail(f"{self.folder} is finished but has no args.json; bring it back")
            for leftover in self.folder.glob("replay.*"):  # by a kill after the last checkpoint
                leftover.unlink()
            print(
                f"this run is finished: its results are in {self.folder} "
                "(--no-resume runs it again; a changed file needs another --exp-name)"
            )
            sys.exit(0)

    def go_back_before_the_end(self) -> None:
        """Makes a finished run one that can go on: as it was before its last evaluation.

        The results of this evaluation are kept, in a copy of metrics.csv.
        """
        path = self.folder / "checkpoint.previous.pt"
        end = self.checkpoint["counters"][0]
        try:
            self.checkpoint = read_checkpoint(path)
            if self.checkpoint["counters"][0] != end:
                raise ValueError("it is older")
        except Exception as error:
            reason = in_short(error)
            fail(f"cannot go on from before the last evaluation of {self.folder} ({reason})")
        copy = self.folder / f"metrics_{end * self.action_repeat}.csv"
        shutil.copy(self.folder / "metrics.csv", copy)
        os.replace(path, self.folder / "checkpoint.pt")

    @property
    def env_step(self) -> int:
        return self.agent_step * self.action_repeat

    def open_folder(self) -> dict | None:
        """Locks the run's folder, and returns its checkpoint, or None where there is none.

        With --eval-only it is only read. A run with final returns is finished even if its
        checkpoints were deleted. Ends the program if the folder cannot be used, if another process
        works in it, or if the checkpoint is damaged or of other flags.
        """
        args = self.args
        if not args.eval_only:
            self.take_lock()
            if not args.resume:
                self.move_aside()
        try:
            path = newest_checkpoint(self.folder)
        except OSError as error:
            fail(f"cannot use {self.folder} ({error.strerror}); change --runs-dir or --exp-name")
        metrics = self.folder / "metrics.csv"
        written = metrics.read_bytes() if metrics.exists() else b""
        finished = re.findall(rb"^(\d+),.*,final/return_mean,", written, re.M)  # at which env step
        if not path.exists():
            if args.eval_only:
                deleted = "it was deleted; --no-resume trains the run again"
                hint = deleted if finished else describe_nearest(args)
                fail(f"nothing to evaluate: no checkpoint in {self.folder}; {hint}")
            if finished and int(finished[-1]) < args.total_timesteps:
                fail(
                    f"{self.folder} is finished at env step {int(finished[-1])} and has no "
                    "checkpoint to go on from; --no-resume runs it again"
                )
            return {"finished": True} if finished else None
        try:
            checkpoint = read_checkpoint(path)
            made_with = checkpoint["args"]
        except Exception as error:
            if isinstance(error, OSError) or is_out_of_memory(error):  # the file may be whole
                raise
            reason = f"cannot read {path} ({in_short(error)})"
            if finished and args.eval_only:
                fail(f"{reason}; the run is finished, but this copy of its networks is damaged")
            if finished:
                fail(f"{reason}; the run is finished, and its results are in {metrics}")
            previous = self.folder / "checkpoint.previous.pt"
            if path == previous or not previous.exists():
                fail(f"{reason}; --no-resume starts anew, and keeps these files")
            fail(f"{reason}; if it is damaged, delete it to go on from the one before")
        reached = checkpoint["counters"][0]
        if (reached - 1) * self.action_repeat >= args.total_timesteps:
            fail(
                f"{self.folder} has {reached * self.action_repeat} env steps already, "
                f"more than --total-timesteps {args.total_timesteps}"
            )
        for name, value in result_flags(args).items():
            if made_with.get(name) != value and not args.run_dir:
                flag = name.replace("_", "-")
                made = made_with.get(name)
                fail(f"{path} was made with --{flag} {made}, not {value}; move it away")
        if checkpoint.get("file") != FILE_DIGEST:
            print(
                f"note: {path} was made by another version of this file; "
                "a changed algorithm needs another --exp-name"
            )
        return checkpoint

    def take_lock(self) -> None:
        """Creates the folder and locks it until training ends."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / ".lock"
            owner = self.folder / ".owner"
            lock = FileLock(path)
            lock.acquire(timeout=0)
            LOCKS.append(lock)
            owner.write_text(f"process {os.getpid()} on {platform.node()}")
        except Timeout:
            by = owner.read_text(errors="replace") if owner.exists() else "another process"
            fail(
                f"{by} is working in {self.folder}; wait for it, or change --seed or --exp-name "
                f"(if it does not run any more: delete {path})"
            )
        except OSError as error:
            fail(f"cannot use {self.folder} ({error.strerror}); change --runs-dir or --exp-name")

    def move_aside(self) -> None:
        """Moves everything in the folder to <folder>.old1, .old2, ..., the first that is free."""
        files = sorted(self.folder.glob("[!.]*"), reverse=True)
        if not files:
            return
        number = 1
        while (old := Path(f"{self.folder}.old{number}")).exists():
            number += 1
        old.mkdir()
        for path in files:  # checkpoint.pt is moved after metrics.csv, which it counts on
            path.rename(old / path.name)
        print(f"the previous run of these flags is now in {old}")

    def restore(self, parts: dict) -> None:
        """Gives the parts, the counters and the generators what the checkpoint holds, if any."""
        if self.checkpoint is None:
            if self.args.init_from:
                self.start_from_networks(parts)
            return
        self.load(parts)
        restore_generators(self.checkpoint["generators"])
        counters = self.checkpoint["counters"]
        self.agent_step, self.update_step, self.episode, self.csv_bytes, digest = counters
        path = self.folder / "metrics.csv"
        written = path.read_bytes()[: self.csv_bytes] if path.exists() else b""
        self.csv_digest.update(written)
        if self.csv_digest.hexdigest() != digest and not self.args.eval_only:
            fail(
                f"{path} is not what was written before the checkpoint; "
                "bring it back, or start with --no-resume"
            )
        shorter = self.checkpoint["args"]["total_timesteps"]
        goes_on = shorter <= self.env_step < self.args.total_timesteps and not self.args.eval_only
        now = f"\n{self.env_step},{self.agent_step},{self.update_step}"
        if goes_on and f"{now},episode/length,".encode() not in written:
            print(
                f"note: at env step {self.env_step} the shorter run stopped within an episode. A "
                "new one begins there, so results are not those of a run that was longer from the "
                "start"
            )

    def load(self, parts: dict) -> None:
        """Gives the parts what the checkpoint holds of them."""
        for name, part in parts.items():
            try:
                saved = self.checkpoint.pop(name)  # not kept, so that its memory is freed
                if isinstance(part, torch.optim.Optimizer):  # PyTorch itself takes any other kind
                    own = part.state_dict()["param_groups"][0].keys()
                    if own != saved["param_groups"][0].keys():
                        raise ValueError("it is of another kind of optimizer")
                part.load_state_dict(saved)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                fail(
                    f"{self.folder}: {name} in the checkpoint does not fit ({in_short(error)}); "
                    f"it is of {self.args.exp_name}, and a changed file needs another --exp-name"
                )

    def start_from_networks(self, parts: dict) -> None:
        """Gives the networks, and the statistics of observations, what --init-from has learned."""
        path = Path(os.path.expanduser(self.args.init_from)) / "checkpoint.pt"
        learned = None
        try:
            learned = read_checkpoint(newest_checkpoint(path.parent))
            reason = other_agent(self.args, learned["args"])
            for name, part in parts.items():
                if not reason and (isinstance(part, nn.Module) or name == "norm"):
                    part.load_state_dict(learned[name])
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = f"{path} does not fit ({in_short(error)})"
            if learned:
                reason += "; environment, sizes, sparsity and masks must be those of that run, "
                reason += f"and the agent that of {learned['args'].get('exp_name')}"
        if reason:
            leave_no_folder(self.folder)
            fail(f"--init-from {self.args.init_from}: {reason}")

    def begin(self, layers: dict[str, list[dict]]) -> None:
        """Prints the layer tables, writes args.json, and opens metrics.csv and the progress bar."""
        for network, rows in layers.items():
            print_layer_table(network, rows)
        write_args(self.folder, self.args, layers)
        resumed = self.checkpoint is not None
        start = f"going on from env step {self.env_step}" if resumed else "new run"
        print(f"{self.folder}: {start}")

        self.csv = open(self.folder / "metrics.csv", "ab", buffering=0)  # noqa: SIM115
        self.csv.truncate(self.csv_bytes)  # what came after the checkpoint will be written again
        if not resumed:
            self.write_rows("env_step,agent_step,update_step,metric,value\n")
        # TensorBoard forgets what was logged after the checkpoint
        first_step = self.env_step + 1 if resumed else 0
        self.tensorboard = SummaryWriter(self.folder, purge_step=first_step)
        write_flags(self.tensorboard, self.args)
        self.wandb = start_wandb(self.folder, self.args, resumed) if self.args.track else None
        self.saved_step = self.env_step
        total = self.args.total_timesteps
        self.bar = tqdm(total=total, initial=self.env_step, unit=" env steps")
        self.bar.mininterval = 0.5 if sys.stderr.isatty() else 30

    def due(self, interval: int | None) -> bool:
        """Whether a multiple of some env steps has just been reached (0, None: never)."""
        return bool(interval) and self.env_step % interval < self.action_repeat

    def count_decision(self) -> None:
        self.agent_step += 1
        self.bar.update(self.action_repeat)

    def log(self, prefix: str, values: dict[str, torch.Tensor | float]) -> None:
        """Writes values as metrics <prefix>/<name>: one row each in metrics.csv, and elsewhere."""
        named = {f"{prefix}/{name}": float(value) for name, value in values.items()}
        steps = f"{self.env_step},{self.agent_step},{self.update_step}"
        self.write_rows("".join(f"{steps},{name},{value!r}\n" for name, value in named.items()))
        for name, value in named.items():
            self.tensorboard.add_scalar(name, value, self.env_step)
        if self.wandb:
            self.wandb.log({**named, "env_step": self.env_step})

    def write_rows(self, rows: str) -> None:
        """Appends to metrics.csv at once."""
        left = rows.encode()
        self.csv_digest.update(left)
        while left:
            left = left[self.csv.write(left) :]

    def log_evaluation(self, result: dict[str, float]) -> None:
        self.log("eval", result)
        draw_learning_curve(self.folder, self.args.env_id)
        self.bar.set_postfix_str(f"return {result['return_mean']:.0f}")

    def log_episode(self, episode: dict, losses: dict[str, torch.Tensor | float]) -> None:
        """Of a finished episode: what RecordEpisodeStatistics says, and the last losses."""
        self.log("episode", {"return": episode["r"], "length": episode["l"]})
        self.log("losses", losses)
        frames = episode["l"] * self.action_repeat
        self.log("time", {"env_steps_per_second": frames / max(episode["t"], 1e-6)})

    def checkpoint_due(self) -> bool:
        return self.env_step - self.saved_step >= self.args.checkpoint_interval

    def save(self, parts: dict, finished: bool = False) -> None:
        """Writes the state of the parts, by name, the counters and the generators."""
        state = {name: part.state_dict() for name, part in parts.items()}
        for name, part in state.items():
            if not is_finite(part):
                where = f"agent_step={self.agent_step}"
                fail(f"{name} is not finite at {where}; the last checkpoint is kept", 3)
        self.tensorboard.flush()
        os.fsync(self.csv.fileno())  # on the disk before the checkpoint that holds its length
        csv = (os.fstat(self.csv.fileno()).st_size, self.csv_digest.hexdigest())
        counters = (self.agent_step, self.update_step, self.episode, *csv)
        state = {**state, "counters": counters, "finished": finished, "file": FILE_DIGEST}
        save_checkpoint(self.folder, self.args, state)
        self.saved_step = self.env_step

    def video(self) -> Path | None:
        """Where --capture-video puts the film of the last evaluation, or of --eval-only."""
        if not self.args.capture_video:
            return None
        name = f"eval_{self.agent_step}" if self.args.eval_only else "final"
        return self.folder / "videos" / f"{name}.mp4"

    def print_result(self, result: dict[str, float]) -> None:
        values = "  ".join(f"{name} {value:.1f}" for name, value in result.items())
        print(f"{values}  ({self.args.final_eval_episodes} episodes)")

    def finish(self, parts: dict, result: dict[str, float]) -> None:
        """Logs the last evaluation, saves the finished run and says where its results are."""
        self.log("final", result)
        draw_learning_curve(self.folder, self.args.env_id)
        if self.wandb:
            for film in self.folder.glob("videos/final.mp4"):
                self.wandb.save(film, base_path=self.folder, policy="now")
            self.wandb.finish()
        self.save(parts, finished=True)  # when all else is there
        self.csv.close()
        self.tensorboard.close()
        self.bar.close()
        if self.update_step == 0:
            print("note: nothing was learned: training ended before the first update")
        episodes = self.args.final_eval_episodes
        program = sys.argv[0] if __name__ == "__main__" else __file__
        texts = (program, str(self.folder), self.args.runs_dir)
        program, folder, runs_dir = map(shlex.quote, texts)
        print(
            f"return {result['return_mean']:.1f}, the mean of {episodes} episodes; "
            f"checkpoint, metrics.csv and learning_curve.png are in {self.folder}\n"
            f"look at it:    {self.folder / 'learning_curve.png'}\n"
            f"compare runs:  tensorboard --logdir {runs_dir}\n"
            f"evaluate it:   python {program} --eval-only --run-dir {folder}\n"
            "and more:      docs/recipes.md (a film, the policy in Python, longer training)"
        )


def in_short(error: Exception) -> str:
    """Type and message of an error, on one line of readable length."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 200)}"


def is_finite(state) -> bool:
    """Whether all numbers in nested dicts and lists of tensors are finite."""
    if isinstance(state, torch.Tensor):
        return not state.is_floating_point() or bool(state.isfinite().all())
    if isinstance(state, dict):
        return all(map(is_finite, state.values()))
    if isinstance(state, list | tuple):
        return all(map(is_finite, state))
    return not isinstance(state, float) or math.isfinite(state)


class DigestedFile:
    """A file that is written once, and the SHA-256 of what was written."""

    def __init__(self, file):
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, data) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(folder: Path, args, state: dict) -> None:
    """Writes checkpoint.pt so that a kill leaves a whole one, and keeps the one before it.

    Its last 32 bytes are the SHA-256 of the others, which are a file of torch.save. Every random
    number is drawn on the CPU, so there are three generators.
    """
    kind, keys, *position = np.random.get_state()
    generators = {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *position],
        "torch": torch.get_rng_state(),
    }
    path = folder / "checkpoint.pt"
    temporary = folder / "checkpoint.tmp"
    try:
        with open(temporary, "wb") as file:
            digested = DigestedFile(file)
            torch.save({**state, "args": asdict(args), "generators": generators}, digested)
            file.write(digested.sha256.digest())
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk needs the room
        raise
    if path.exists():
        os.replace(path, folder / "checkpoint.previous.pt")
    os.replace(temporary, path)


def newest_checkpoint(folder: Path) -> Path:
    """checkpoint.pt, or the one before it after a kill between the renames of save_checkpoint."""
    path = folder / "checkpoint.pt"
    previous = folder / "checkpoint.previous.pt"
    return previous if previous.exists() and not path.exists() else path


def read_checkpoint(path: Path) -> dict:
    """What save_checkpoint wrote; raises ValueError if a byte of it has changed."""
    with open(path, "rb") as file:
        left = max(0, os.fstat(file.fileno()).st_size - 32)
        sha256 = hashlib.sha256()
        while left > 0:
            data = file.read(min(left, 2**20))
            sha256.update(data)
            left -= len(data)
        if file.read() != sha256.digest():
            raise ValueError("its checksum is wrong")
        file.seek(0)  # of the same file, though a run may have written a newer one
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    missing = {"args", "generators", "counters", "finished"} - checkpoint.keys()
    if missing or len(checkpoint["counters"]) != 5:
        raise ValueError("it is of another version of this file")
    return checkpoint


def restore_generators(generators: dict) -> None:
    """Sets every global random generator to the state saved by save_checkpoint."""
    random.setstate(generators["python"])
    np.random.set_state(tuple(generators["numpy"]))
    torch.set_rng_state(generators["torch"])


def leave_no_folder(folder: Path) -> None:
    """Removes the folder of a run that cannot begin, unless it has begun before."""
    for name in (".lock", ".owner", "replay.u8"):
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def print_layer_table(network: str, rows: list[dict]) -> None:
    """Shape, active and total weights, kernel and density of each layer, and of the network."""
    table = pd.DataFrame(rows).set_index("layer")
    table.loc["all"] = {**table[["active", "total"]].sum(), "shape": "", "kernel": ""}
    table["density"] = table.active / table.total
    print(network)
    counts = dict.fromkeys(["active", "total"], "{:,}".format)
    print(table.to_string(index_names=False, float_format="%.4f", formatters=counts))


def write_args(folder: Path, args, layers: dict[str, list[dict]]) -> None:
    """args.json: flags, versions of packages, git revision (None without git), layer tables."""
    here = Path(__file__).resolve().parent
    git = subprocess.run(
        "git describe --always --dirty", shell=True, cwd=here, capture_output=True, text=True
    )
    record = {
        "args": asdict(args),
        "python": platform.python_version(),
        "packages": {str(package.name): package.version for package in distributions()},
        "git_revision": git.stdout.strip() or None,
        "layers": layers,
    }
    temporary = folder / "args.tmp"
    temporary.write_text(json.dumps(record, indent=1))
    os.replace(temporary, folder / "args.json")


def write_flags(tensorboard: SummaryWriter, args) -> None:
    """The flags in TensorBoard: a table under TEXT, and columns under HPARAMS to filter runs by."""
    flags = asdict(args)
    rows = "".join(f"| {name} | `{value}` |\n" for name, value in flags.items())
    tensorboard.add_text("flags", f"| flag | value |\n|---|---|\n{rows}")
    metrics = dict.fromkeys(["final/return_mean", "eval/return_mean"])
    experiment, start, _ = hparams(flags, metrics)
    for part in (experiment, start):  # in this run's own file; add_hparams would open another run
        tensorboard.file_writer.add_summary(part)


def start_wandb(folder: Path, args, resume: bool):
    """The Weights & Biases run of --track; its id is the folder's name."""
    import wandb

    try:
        tracked = wandb.init(
            project=args.wandb_project,
            entity=args.wandb_entity,
            id=folder.name,
            dir=folder,
            config=asdict(args),
            resume="allow" if resume else None,
            reinit="finish_previous",  # one that ended early in this process
        )
    except (wandb.Error, ValueError) as error:
        fail(f"--track: {textwrap.shorten(str(error), 200)}")
    tracked.define_metric("*", step_metric="env_step")
    tracked.log_code(str(Path(__file__).parent), include_fn=lambda path: path == __file__)
    return tracked


def draw_learning_curve(folder: Path, title: str) -> None:
    """learning_curve.png from metrics.csv: returns of training episodes and of evaluations."""
    table = pd.read_csv(folder / "metrics.csv")
    metrics = table.pivot(index="env_step", columns="metric", values="value")
    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    if "episode/return" in metrics:
        episodes = metrics["episode/return"].dropna()
        axes.plot(episodes, color="0.75", lw=0.8, label="training episodes")
    mean = metrics["eval/return_mean"].dropna()
    std = metrics["eval/return_std"].dropna()
    axes.plot(mean, marker="o", ms=3, label="evaluation (mean, std over episodes)")
    axes.fill_between(mean.index, mean - std, mean + std, alpha=0.2)
    axes.set(xlabel="env steps", ylabel="return", title=title)
    axes.legend(frameon=False)
    figure.savefig(folder / "learning_curve.png", dpi=150)


LONGEST_FILM = 5000  # frames, which are kept in memory


def write_video(path: Path, frames: list[np.ndarray], fps: float = 30) -> None:
    """An mp4 of frames (height, width, 3) uint8, one a decision.

    A film that cannot be written costs a warning and no result.
    """
    try:
        import imageio

        height, width, _ = frames[0].shape
        for frame in frames:
            if frame.shape != frames[0].shape or frame.dtype != np.uint8:
                raise ValueError("frames must be of one size, and of type uint8")
        even = ((0, height % 2), (0, width % 2), (0, 0))  # most players need even sides
        path.parent.mkdir(exist_ok=True)
        with imageio.get_writer(path, fps=fps, macro_block_size=None) as film:
            for frame in frames:
                film.append_data(np.pad(frame, even))
    except Exception as error:
        tqdm.write(f"warning: no film in {path}: {in_short(error)}", file=sys.stderr)


def summary(returns: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation and interquartile mean of the returns of some episodes."""
    return {
        "return_mean": returns.mean(),
        "return_std": returns.std(),
        "return_iqm": trim_mean(returns, 0.25),
    }


train = one_line_errors(train)  # for a caller in Python as well
for loop in list(globals().values()):  # here, where all compiled loops have been defined
    if hasattr(loop, "enable_caching"):
        keep_compiled(loop)


# === END RUNS ===


if __name__ == "__main__":
    train(parse_flags(Args))
