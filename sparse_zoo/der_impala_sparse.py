# docs: docs/der_impala_sparse.md
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "numba==0.68.1", "scipy==1.17.1", "tyro==1.0.17", "tqdm==4.70.1",
#     "gymnasium==1.4.0", "ale-py==0.12.1", "opencv-python-headless==5.0.0.93", "filelock==4.2.11",
#     "matplotlib==3.11.2", "pandas==3.1.1", "imageio==2.38.1", "imageio-ffmpeg==0.8.1", "tensorboard==2.21.0",
#     "wandb==0.31.0",
# ]
# ///
"""Data-Efficient Rainbow with an IMPALA CNN and static sparsity, for Atari games after 100,000 decisions.

Before training, a random set of weights is removed once; the survivors are trained as usual. Rainbow learns the
distribution of returns (C51) from n-step transitions, which it replays in proportion to their last loss; the online
network chooses the action that the target network values (double Q), values and advantages have heads of their own
(dueling), and noise on the weights explores. "Data-Efficient" means: an update every decision, and 10-step returns.

Papers: Network Sparsity Unlocks the Scaling Potential of Deep RL (Ma, Li et al., ICML 2025); When to Use Parametric
Models in Reinforcement Learning? (van Hasselt et al., 2019), arXiv:1906.05243; Rainbow (Hessel et al., 2018),
arXiv:1710.02298; IMPALA (Espeholt et al., 2018), arXiv:1802.01561.

Differences from Dopamine (the paper has published no code for its Atari experiments, which build on Dopamine):
 1. A pruned weight is not stored: values, noise scales, gradients, Adam moments and the target network are vectors over
    the active weights.
 2. Initial noise scale 0.5 / sqrt(fan-in), as in Table 5; there, 0.1 / sqrt(fan-in) (--noisy-sigma 0.1).
 3. Every layer draws noise of its own; there, the layers of one pass share a random key.
 4. Transitions near the end of a life are complete: each return holds the last reward, and every state of the life is
    a starting point; there, some returns near terminals are wrong and the last ones missing.
 5. The training environment is seeded anew at every reset from (seed, game), so that a resumed run repeats the
    uninterrupted one; there, one generator runs on. Evaluations draw from (seed, decision).
 6. A decision in which a life is lost has its four frames all the same, and in evaluations the stack runs on into the
    next life; there, it is cut short, and the stack begins anew there too. Games begin with 1 to 30 idle frames; there,
    with 0 to 29.
 7. --target-interval counts updates, as in Table 5; there, decisions, from the first random one on.
"""

import copy
import hashlib
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # Experiment
    exp_name: str = "der_impala_sparse"
    """part of the run's name"""
    seed: int = 1
    """seed of networks, noise, replay and games (below 2^32)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto takes CUDA when there is one"""
    threads: int | None = None
    """CPU threads (default: all cores); a resumed run is bit-equal only with the same number"""
    bf16: bool = False
    """convolutions in bfloat16: faster, less exact"""
    runs_dir: str = "runs"
    """folder that holds one folder per run, replay included"""
    resume: bool = True
    """go on from the run's checkpoint; --no-resume moves the old run aside and starts afresh"""
    eval_only: bool = False
    """evaluate this command's checkpoint for its --final-eval-episodes games and stop"""
    capture_video: bool = False
    """film the first game of the last evaluation (or of --eval-only) as mp4"""

    # Environment
    env_id: str = "ALE/Pong-v5"
    """an Atari game, ALE/*-v5"""
    action_repeat: int = 4
    """emulator frames per decision: rewards summed, pixels the maximum of the last two"""
    total_timesteps: int = 400_000
    """env steps of training (emulator frames, action repeat included)"""
    sticky_actions: float = 0.0
    """probability that the emulator repeats the last action (0.25 in ALE's own protocol)"""
    terminal_on_life_loss: bool = True
    """in training, the loss of a life ends the returns; the game goes on"""

    # Algorithm (Table 5 of the paper)
    learning_starts: int = 6_400
    """env steps before the first update; the noisy network acts from the start"""
    updates_per_step: int = 1
    """gradient updates per decision"""
    batch_size: int = 32
    """transitions per update"""
    buffer_size: int = 1_000_000
    """largest number of frames kept for replay, in a file of about 7 kB a frame"""
    n_step: int = 10
    """rewards in a return before it bootstraps"""
    gamma: float = 0.99
    """discount"""
    target_interval: int = 2_000
    """updates between copies of the network to the target network"""
    learning_rate: float = 1e-4
    """of Adam"""
    adam_eps: float = 1.5e-4
    """epsilon of Adam"""
    atoms: int = 51
    """points of the distribution of returns"""
    v_max: float = 10.0
    """they lie evenly in [-v_max, v_max]"""
    noisy_sigma: float = 0.5
    """initial noise scale, times 1 / sqrt(fan-in)"""
    priority_exponent: float = 0.5
    """a transition is replayed in proportion to its last loss to this power"""
    importance_exponent: float = 0.5
    """its loss counts in proportion to its probability to minus this power"""
    eval_epsilon: float = 0.001
    """probability of a random action in evaluations, which have no noise on the weights"""

    # Size and sparsity
    width_scale: float = 1.0
    """channels of the IMPALA CNN: 16, 32, 32 x scale"""
    depth_scale: int = 1
    """residual blocks in each of its three stages: 2 x scale"""
    sparsity: float = 0.0
    """fraction of parameters removed from the network, convolutions included"""
    sparsity_distribution: Literal["erdos_renyi", "uniform"] = "erdos_renyi"
    """how a network's sparsity is spread over its layers"""
    mask_seed: int | None = None
    """seed of the random pruning (default: --seed)"""
    sparse_kernel: Literal["auto", "packed", "dense"] = "auto"
    """how sparse layers multiply (auto: packed on CPU up to density 0.25, else dense); bit-equal only with the same"""

    # Logging
    eval_interval: int = 100_000
    """env steps between evaluations, the first at step 0"""
    eval_episodes: int = 10
    """games of each evaluation"""
    final_eval_episodes: int = 100
    """games of the last evaluation and of --eval-only"""
    diagnostics_interval: int = 20_000
    """env steps between measurements of rank, dormancy and norms (0: never)"""
    track: bool = False
    """log to Weights & Biases as well (WANDB_MODE=offline needs no account)"""
    wandb_project: str = "sparse_zoo"
    """project of --track"""
    wandb_entity: str | None = None
    """team of --track"""

    # Checkpoints
    checkpoint_interval: int = 20_000
    """env steps between checkpoints, each written at the next end of a game"""


SIZE, STACK = 84, 4  # pixels of a side, frames in an observation


PART = 16  # images encoded at a time


def lecun_normal(conv: nn.Conv2d) -> nn.Conv2d:
    """Normal weights of variance 1 / fan-in, cut at 2 sigma, the variance corrected for the cut; biases zero (flax)."""
    std = 1 / math.sqrt(conv.weight[0].numel()) / 0.87962566103423978
    nn.init.trunc_normal_(conv.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(conv.bias)
    return conv


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        first, second = (
            lecun_normal(nn.Conv2d(channels, channels, 3, padding=1)) for _ in range(2)
        )
        self.layers = nn.Sequential(nn.ReLU(), first, nn.ReLU(inplace=True), second)

    def forward(self, x):
        return x + self.layers(x)


def impala(width_scale: float, blocks: int) -> nn.Sequential:
    """The IMPALA CNN: (batch, STACK, SIZE, SIZE) -> (batch, 32 x scale, 11, 11); each stage halves the picture."""
    channels = [STACK, *(round(width_scale * count) for count in (16, 32, 32))]
    modules, size = [], SIZE
    for fan_in, fan_out in pairwise(channels):
        conv = nn.Conv2d(fan_in, fan_out, 3, padding=1)
        nn.init.xavier_uniform_(conv.weight)
        nn.init.zeros_(conv.bias)
        pool = nn.MaxPool2d(
            3, 2, padding=size % 2, ceil_mode=True
        )  # the border of JAX's padding="SAME"
        modules += [conv, pool, *(ResidualBlock(fan_out) for _ in range(blocks))]
        size = math.ceil(size / 2)
    return nn.Sequential(*modules, nn.ReLU())


class NoisyLinear(nn.Module):
    """A linear layer with factorised Gaussian noise on its weights (Fortunato et al. 2018, arXiv:1706.10295).

    `mean` is an ordinary layer, which `sparsify` may prune. After that, add_noise gives each of its active weights, and
    each bias, a noise scale: mean and scale of a pruned weight are both gone.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.mean = nn.Linear(
            in_features, out_features
        )  # weights and biases uniform in +-1/sqrt(in_features)

    def add_noise(self, sigma: float) -> None:
        self.weight_name = "values" if isinstance(self.mean, SparseLinear) else "weight"
        weight = getattr(self.mean, self.weight_name)
        self.out_features, self.in_features = getattr(self.mean, "shape", weight.shape)
        scale = sigma / math.sqrt(self.in_features)
        self.sigma = nn.Parameter(torch.full_like(weight, scale))
        self.bias_sigma = nn.Parameter(torch.full_like(self.mean.bias, scale))

    def forward(self, x, noise: tuple[torch.Tensor, torch.Tensor] | None = None):
        """(batch, in) -> (batch, out), with noise (in,), (out,) or, without, by the means alone."""
        if noise is None:
            return self.mean(x)
        noise_in, noise_out = noise
        noise_weight = torch.outer(noise_out, noise_in)
        if self.weight_name == "values":
            noise_weight = noise_weight.flatten()[self.mean.active]
        weight = getattr(self.mean, self.weight_name) + self.sigma * noise_weight
        bias = self.mean.bias + self.bias_sigma * noise_out
        return functional_call(self.mean, {self.weight_name: weight, "bias": bias}, (x,))


class Network(nn.Module):
    """Distributional Q-function: IMPALA CNN, 512 hidden units, heads for value and advantages."""

    def __init__(self, args: Args, actions: int):
        super().__init__()
        self.atoms, self.bf16 = args.atoms, args.bf16
        self.encoder = impala(args.width_scale, 2 * args.depth_scale)
        self.hidden = NoisyLinear(11 * 11 * round(32 * args.width_scale), 512)
        self.value = NoisyLinear(512, args.atoms)
        self.advantage = NoisyLinear(512, actions * args.atoms)

    def noisy_layers(self) -> list[NoisyLinear]:
        return [self.hidden, self.value, self.advantage]

    def draw_noise(
        self, generator: torch.Generator | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Noise of one pass for each noisy layer, sign(x) sqrt(|x|) of standard normals: (in,), (out,)."""
        sizes = [
            size
            for layer in self.noisy_layers()
            for size in (layer.in_features, layer.out_features)
        ]
        normal = torch.randn(sum(sizes), generator=generator).to(self.hidden.sigma.device)
        parts = (normal.sign() * normal.abs().sqrt()).split(sizes)
        return list(zip(parts[::2], parts[1::2]))

    def encode(self, obs):
        """Stacks of uint8 (batch, SIZE, SIZE, STACK) -> features (batch, 11 x 11 x 32 x scale), float32

        On a CPU PART images at a time, whose activations stay in its cache. Features lie as in memory: channels last.
        """
        features = []
        for part in obs.split(PART if obs.device.type == "cpu" else len(obs)):
            images = part.permute(0, 3, 1, 2).float().div_(255)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
                features.append(self.encoder(images).permute(0, 2, 3, 1).float().flatten(1))
        return torch.cat(features)

    def forward(self, obs, noise=None):
        """Stacks of uint8 (batch, SIZE, SIZE, STACK) -> logits of returns (batch, actions, atoms)"""
        noise_hidden, noise_value, noise_advantage = noise or (None, None, None)
        x = F.relu(self.hidden(self.encode(obs), noise_hidden))
        value = self.value(x, noise_value)[:, None]
        advantage = self.advantage(x, noise_advantage).unflatten(1, (-1, self.atoms))
        return value + advantage - advantage.mean(1, keepdim=True)


class Batch(NamedTuple):
    """n-step transitions, batch first; observations are stacks (batch, SIZE, SIZE, STACK), uint8."""

    obs: torch.Tensor
    action: torch.Tensor
    reward: torch.Tensor  # the discounted sum of n rewards, or of those up to the terminal
    discount: torch.Tensor  # of the value of next_obs: gamma^n, or 0 after a terminal
    next_obs: torch.Tensor
    weight: torch.Tensor  # of the loss: importance sampling, the largest is 1
    index: torch.Tensor  # where they lie in the replay


@numba.njit(parallel=True, cache=True)
def gather_stacks(frames, newest, oldest, out):
    """out[b] = the STACK frames up to number newest[b], black before oldest[b]; out (batch, SIZE, SIZE, STACK)."""
    black = np.zeros_like(frames[0])
    for b in numba.prange(len(out)):
        for s in range(STACK):
            number = newest[b] - STACK + 1 + s
            out[b, :, :, s] = frames[number % len(frames)] if number >= oldest[b] else black


class PrioritizedReplay:
    """A ring of single frames in a file, stacked when sampled, never across lives, in proportion to priorities.

    Frame number k (0, 1, ... over the whole run) is followed by action[k], reward[k], terminal[k] and frame k + 1, if
    it is not the last of its life; start[k] is the first frame of its life. A frame gets a priority, and is sampled,
    as soon as n_step steps of its life lie behind it, or a terminal. The last `capacity` frames are sampled. The ring
    holds `slack` more, so that what a checkpoint counts on is not overwritten before the next ones are written: a
    killed run finds its replay as it was. Priorities: Schaul et al. 2016, arXiv:1511.05952, proportional.
    """

    def __init__(self, path: Path, args: Args, capacity: int, slack: int, mode: str = "w+"):
        self.capacity, self.n_step, self.gamma, self.added, self.largest = (
            capacity,
            args.n_step,
            args.gamma,
            0,
            1.0,
        )
        self.priority_exponent, self.importance_exponent = (
            args.priority_exponent,
            args.importance_exponent,
        )
        size = capacity + slack
        self.path, shape, needed = path, (size, SIZE, SIZE), size * SIZE * SIZE
        if mode == "r+" and (not path.exists() or path.stat().st_size != needed):
            fail(
                f"{path} is not as the checkpoint left it; bring it back, or start with --no-resume"
            )
        free = shutil.disk_usage(path.parent).free / 1e9
        if mode == "w+" and free < needed / 1e9:
            fail(
                f"{path} needs {needed / 1e9:.1f} of {free:.1f} GB free; lower --buffer-size or --checkpoint-interval"
            )
        self.frames = np.asarray(np.memmap(path, np.uint8, mode, shape=shape))
        self.action, self.start = np.zeros(size, np.int64), np.full(size, -1)
        self.reward, self.terminal = np.zeros(size, np.float32), np.zeros(size, np.float32)
        self.priority = np.zeros(size)

    def begin(self, frame: np.ndarray) -> None:
        """The first frame of a life."""
        self._append(frame, start=self.added)

    def add(self, action: int, reward: float, terminal: bool, frame: np.ndarray) -> None:
        """What was done at the last frame, and what came of it."""
        last = (self.added - 1) % len(self.frames)
        self.action[last], self.reward[last], self.terminal[last] = action, reward, terminal
        self._append(frame, self.start[last])
        newest = self.added - 1
        first = max(self.start[last], newest - self.n_step, newest - self.capacity + 1)
        whole = np.arange(
            first, newest if terminal else newest - self.n_step + 1
        )  # the new starting points
        self.priority[whole % len(self.frames)] = self.largest

    def _append(self, frame: np.ndarray, start: int) -> None:
        new = self.added % len(self.frames)
        self.frames[new], self.start[new], self.terminal[new] = frame, start, 0
        self.priority[(self.added - self.capacity) % len(self.frames)] = 0
        self.added += 1

    def ready(self) -> bool:
        """Whether there is a transition to sample."""
        return bool(self.priority.any())

    def sample(
        self, batch_size: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Batch:
        """In proportion to the priorities, with replacement; call it when ready()."""
        ring = len(self.frames)
        cumulative = self.priority[: self.added].cumsum()
        points = (
            torch.rand(batch_size, generator=generator, dtype=torch.float64).numpy()
            * cumulative[-1]
        )
        index = np.searchsorted(cumulative, points, side="right")
        number = index + (self.added - 1 - index) // ring * ring
        steps = (number[:, None] + np.arange(self.n_step)) % ring
        going_on = np.cumprod(
            1 - self.terminal[steps], axis=1
        )  # (batch, n): no terminal up to and including this step
        factor = np.float32(self.gamma) ** np.arange(self.n_step, dtype=np.float32)
        factor = factor * np.concatenate(
            [np.ones((batch_size, 1), np.float32), going_on[:, :-1]], axis=1
        )
        reward, discount = (
            (factor * self.reward[steps]).sum(1),
            self.gamma**self.n_step * going_on[:, -1],
        )
        stacks = np.empty((2, batch_size, SIZE, SIZE, STACK), np.uint8)
        gather_stacks(self.frames, number, self.start[index], stacks[0])
        gather_stacks(
            self.frames,
            np.minimum(number + self.n_step, self.added - 1),
            self.start[index],
            stacks[1],
        )
        weight = self.priority[index] ** -self.importance_exponent
        weight = (weight / weight.max()).astype(np.float32)
        columns = (stacks[0], self.action[index], reward, discount, stacks[1], weight, index)
        return Batch(*(torch.from_numpy(column).to(device) for column in columns))

    def set_priorities(self, index: torch.Tensor, loss: torch.Tensor) -> None:
        """Priorities (loss + 1e-10)^priority_exponent of a sampled batch."""
        priorities = (loss.double().cpu().numpy() + 1e-10) ** self.priority_exponent
        self.priority[index.cpu().numpy()] = priorities
        self.largest = max(self.largest, priorities.max())

    def state_dict(self) -> dict:
        """All but the frames, which are brought to the disk where they are."""
        self.frames.base.flush()
        columns = (self.action, self.reward, self.terminal, self.start, self.priority)
        saved = [torch.from_numpy(column[: self.added].copy()) for column in columns]
        return {"counters": (self.added, float(self.largest)), "columns": saved}

    def load_state_dict(self, state: dict) -> None:
        self.added, self.largest = state["counters"]
        columns = (self.action, self.reward, self.terminal, self.start, self.priority)
        for column, saved in zip(columns, state["columns"]):
            column[: len(saved)] = saved.numpy()


def project(points, probabilities, support):
    """Moves probabilities (batch, atoms) at points (batch, atoms) to the support (atoms,): C51's projection.

    Each point's share goes to its two neighbours in proportion to nearness; points outside count as the ends.
    Bellemare et al. 2017, arXiv:1707.06887.
    """
    points = points.clamp(support[0], support[-1])
    distance = (points[:, None, :] - support[:, None]).abs() / (support[1] - support[0])
    return ((1 - distance).clamp(min=0) * probabilities[:, None, :]).sum(-1)


@torch.no_grad()
def target_distribution(network, target_network, batch, support, noise):
    """The distribution of R_n + gamma^n Z_target(s_n, argmax_a E Z(s_n, a)) on the support, (batch, atoms)"""
    action = (network(batch.next_obs, noise).softmax(-1) @ support).argmax(1)
    probabilities = target_network(batch.next_obs, noise).softmax(-1)[
        torch.arange(len(action)), action
    ]
    return project(
        batch.reward[:, None] + batch.discount[:, None] * support, probabilities, support
    )


def cross_entropy(network, batch, target, noise):
    """-sum_i target_i log p_i(s, a) of each transition, (batch,)"""
    logits = network(batch.obs, noise)[torch.arange(len(target)), batch.action]
    return -(target * logits.log_softmax(-1)).sum(-1)


class Agent:
    """A network drawn from torch's generator and pruned with a mask from --mask-seed, its target, and Adam."""

    def __init__(self, args: Args, actions: int, device: torch.device):
        self.network = Network(args, actions)
        mask_seed = derive_seed(args.seed if args.mask_seed is None else args.mask_seed, 0)
        how = (args.sparsity_distribution, mask_seed, args.sparse_kernel, device)
        self.layers = {"network": sparsify(self.network, args.sparsity, *how)}
        for layer in self.network.noisy_layers():
            layer.add_noise(args.noisy_sigma)
        self.network.encoder.to(memory_format=torch.channels_last)
        # The memo lets the target network share the index buffers: the pattern is stored once.
        self.target_network = copy.deepcopy(
            self.network, {id(buffer): buffer for buffer in self.network.buffers()}
        )
        self.target_network.requires_grad_(False)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), args.learning_rate, eps=args.adam_eps, fused=True
        )
        self.support = torch.linspace(-args.v_max, args.v_max, args.atoms, device=device)


def update(
    agent: Agent, batch: Batch, noise, next_noise
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One gradient update of the network; returns what is logged, and the loss of each transition (batch,)."""
    target = target_distribution(
        agent.network, agent.target_network, batch, agent.support, next_noise
    )
    losses = cross_entropy(agent.network, batch, target, noise)
    loss = (batch.weight * losses).mean()
    agent.optimizer.zero_grad()
    loss.backward()
    agent.optimizer.step()
    return {"loss": loss.detach(), "td_target": (target @ agent.support).mean()}, losses.detach()


def push(stack: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """The stack without its oldest frame, and with a new one."""
    return np.concatenate([stack[..., 1:], frame[..., None]], -1)


@torch.no_grad()
def act(agent: Agent, stack: np.ndarray, noise=None) -> int:
    """The action of the highest expected return for a stack of frames (SIZE, SIZE, STACK)."""
    logits = agent.network(torch.from_numpy(stack)[None].to(agent.support.device), noise)
    return int((logits.softmax(-1) @ agent.support).argmax())


def evaluate(
    args, agent, env: gym.Env, games: int, seed_key: tuple, video: Path | None = None
) -> dict[str, float]:
    """Mean, std and interquartile mean of the scores of whole games, without noise; films the first on request."""
    returns, frames = np.zeros(games), []
    for game in range(games):
        seed = derive_seed(*seed_key, game)
        generator = np.random.default_rng(seed)
        frame, _ = env.reset(seed=seed)
        stack, done = push(np.zeros((SIZE, SIZE, STACK), np.uint8), frame), False
        while not done:
            if video and game == 0:
                frames.append(env.render())
            is_random = generator.random() < args.eval_epsilon
            action = int(generator.integers(env.action_space.n)) if is_random else act(agent, stack)
            frame, reward, terminated, truncated, _ = env.step(action)
            stack = push(stack, frame)
            returns[game] += reward
            done = terminated or truncated
    if video:
        import imageio

        video.parent.mkdir(exist_ok=True)
        imageio.mimwrite(video, frames, fps=60 / args.action_repeat, macro_block_size=None)
    return {
        "return_mean": returns.mean(),
        "return_std": returns.std(),
        "return_iqm": trim_mean(returns, 0.25),
    }


def diagnose(agent: Agent, batch: Batch, noise, next_noise) -> dict[str, float]:
    """Plasticity measurements of the hidden layer behind the CNN, gradients and norms of all weights."""
    target = target_distribution(
        agent.network, agent.target_network, batch, agent.support, next_noise
    )
    loss = (batch.weight * cross_entropy(agent.network, batch, target, noise)).mean()
    parameters = list(agent.network.parameters())
    body = nn.Sequential(agent.network.hidden, nn.ReLU())
    with torch.no_grad():
        features = agent.network.encode(batch.obs)
    plasticity = measure_plasticity(
        body, features, parameters, torch.autograd.grad(loss, parameters)
    )
    return {f"critic_{metric}": value for metric, value in plasticity.items()}


def train(args: Args) -> None:
    check_flags(args)
    device = torch.device(
        args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    )
    threads = args.threads or torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    torch.set_num_threads(threads)  # after numba, whose start sets the number for both
    warnings.filterwarnings("ignore", category=UserWarning, module="gymnasium")
    os.environ.setdefault(
        "THP_MEM_ALLOC_ENABLE", "1"
    )  # large pages for tensors: fewer page faults on Linux
    signal.signal(
        signal.SIGINT, lambda *_: sys.exit("interrupted; --resume goes on from the last checkpoint")
    )

    env, eval_env = make_env(args), make_env(args, "rgb_array" if args.capture_video else None)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    try:
        agent = Agent(args, int(env.action_space.n), device)
    except ValueError as error:
        fail(str(error))
    run_dir, checkpoint = open_run(args)
    if checkpoint and checkpoint["finished"] and not args.eval_only:
        (run_dir / "replay.u8").unlink(missing_ok=True)  # left by a kill after the last checkpoint
        print(f"this run is finished: its results are in {run_dir} (--no-resume runs it again)")
        sys.exit(0)
    parts_to_save = {
        name: getattr(agent, name) for name in ("network", "target_network", "optimizer")
    }
    agent_step = update_step = episode = csv_bytes = 0
    if not args.eval_only:
        total_steps = math.ceil(args.total_timesteps / args.action_repeat)
        capacity = min(args.buffer_size, 2 * total_steps)  # frames; a life of T decisions has T + 1
        # Two checkpoints' worth, each up to the longest game (108,000 env steps) late, with room for starts of lives
        slack = min(
            2 * total_steps - capacity,
            2 * (args.checkpoint_interval + 2 * 108_000) // args.action_repeat,
        )
        replay = PrioritizedReplay(
            run_dir / "replay.u8", args, capacity, slack, "r+" if checkpoint else "w+"
        )
        parts_to_save["replay"] = replay

    if checkpoint:
        try:
            for name, part in parts_to_save.items():
                part.load_state_dict(checkpoint.pop(name))
        except ValueError as error:
            fail(f"{run_dir}: {error}")
        restore_generators(checkpoint["generators"])
        agent_step, update_step, episode, csv_bytes = checkpoint["counters"]
    if args.eval_only:
        video = run_dir / "videos" / f"eval_{agent_step}.mp4" if args.capture_video else None
        result = evaluate(
            args, agent, eval_env, args.final_eval_episodes, (args.seed, FINAL, agent_step), video
        )
        print("  ".join(f"{name} {value:.1f}" for name, value in result.items()))
        sys.exit(0)

    describe_run(run_dir, args, agent.layers)
    print(
        f"replay: up to {replay.frames.nbytes / 1e9:.1f} GB in {replay.path}, deleted at the end of training"
    )
    print(
        f"{run_dir}: "
        + (f"going on from env step {agent_step * args.action_repeat}" if checkpoint else "new run")
    )
    metrics = Metrics(run_dir, args, csv_bytes, agent_step * args.action_repeat)
    bar = tqdm(
        total=args.total_timesteps, initial=agent_step * args.action_repeat, unit=" env steps"
    )
    bar.mininterval = 0.5 if sys.stderr.isatty() else 30
    saved_step, losses, game_over = agent_step, {}, True

    def log(values: dict, prefix: str) -> None:
        values = {f"{prefix}/{name}": value for name, value in values.items()}
        metrics.log(agent_step * args.action_repeat, agent_step, update_step, values)

    def due(interval: int) -> bool:
        """Whether a multiple of some env steps has just been reached."""
        return interval > 0 and agent_step * args.action_repeat % interval < args.action_repeat

    def save(finished: bool) -> None:
        state = {name: part.state_dict() for name, part in parts_to_save.items()}
        counters = (agent_step, update_step, episode, metrics.sync())
        save_checkpoint(run_dir, args, {**state, "counters": counters, "finished": finished})

    if agent_step == 0:
        log(evaluate(args, agent, eval_env, args.eval_episodes, (args.seed, EVAL, 0)), "eval")
    while agent_step < total_steps:
        if game_over:
            if (agent_step - saved_step) * args.action_repeat >= args.checkpoint_interval:
                save(finished=False)
                saved_step = agent_step
            frame, info = env.reset(seed=derive_seed(args.seed, TRAIN, episode))
            lives, life_over = info["lives"], True
            episode, episode_start, episode_return = episode + 1, agent_step, 0.0
            started = time.time()
        if life_over:
            replay.begin(frame)
            stack = push(np.zeros((SIZE, SIZE, STACK), np.uint8), frame)

        # Act
        action = act(agent, stack, agent.network.draw_noise())
        frame, reward, terminated, truncated, info = env.step(action)
        terminal = terminated or (args.terminal_on_life_loss and info["lives"] < lives)
        replay.add(action, np.clip(reward, -1, 1), terminal, frame)
        stack, lives = push(stack, frame), info["lives"]
        game_over = terminated or truncated
        life_over = terminal and not game_over
        episode_return += reward
        agent_step += 1

        # Learn
        if agent_step * args.action_repeat >= args.learning_starts and replay.ready():
            for _ in range(args.updates_per_step):
                batch = replay.sample(args.batch_size, device)
                losses, each = update(
                    agent, batch, agent.network.draw_noise(), agent.network.draw_noise()
                )
                update_step += 1
                if not (
                    each.isfinite().all() and get_total_norm(agent.network.parameters()).isfinite()
                ):
                    print(
                        f"error: values not finite at {agent_step=}; the last checkpoint is kept",
                        file=sys.stderr,
                    )
                    sys.exit(3)
                replay.set_priorities(batch.index, each)
                if update_step % args.target_interval == 0:
                    for slow, fast in zip(
                        agent.target_network.parameters(), agent.network.parameters()
                    ):
                        slow.copy_(fast.detach())

        # Measure
        if due(args.eval_interval):
            result = evaluate(
                args, agent, eval_env, args.eval_episodes, (args.seed, EVAL, agent_step)
            )
            log(result, "eval")
            draw_learning_curve(run_dir, args.env_id)
            bar.set_postfix_str(f"return {result['return_mean']:.0f}")
        if due(args.diagnostics_interval) and replay.ready():
            generator = torch.Generator().manual_seed(derive_seed(args.seed, DIAGNOSE, agent_step))
            batch = replay.sample(args.batch_size, device, generator)
            noises = (agent.network.draw_noise(generator) for _ in range(2))
            log(diagnose(agent, batch, *noises), "diagnostics")

        bar.update(args.action_repeat)
        if game_over:
            length = agent_step - episode_start
            log({"return": episode_return, "length": length}, "episode")
            log({name: float(loss) for name, loss in losses.items()}, "losses")
            log(
                {"env_steps_per_second": length * args.action_repeat / (time.time() - started)},
                "time",
            )

    save(finished=False)  # a kill in the last evaluation costs no training
    video = run_dir / "videos" / "final.mp4" if args.capture_video else None
    result = evaluate(
        args, agent, eval_env, args.final_eval_episodes, (args.seed, FINAL, agent_step), video
    )
    log(result, "final")
    save(finished=True)
    replay.path.unlink()
    metrics.close()
    bar.close()
    draw_learning_curve(run_dir, args.env_id)
    print(
        f"return {result['return_mean']:.1f}; checkpoint, metrics.csv and learning_curve.png are in {run_dir}"
    )


# Appendix: the same in every file that has it


# Flags that change results by rounding at most: a run may go on with others. The rest are in its folder's name.
EXECUTION_FLAGS = {
    "device",
    "threads",
    "runs_dir",
    "resume",
    "eval_only",
    "capture_video",
    "sparse_kernel",
    "track",
    "wandb_project",
    "wandb_entity",
}


def check_flags(args: Args) -> None:
    """Ends the program if a flag makes no sense."""
    counts = "depth_scale action_repeat total_timesteps updates_per_step batch_size buffer_size n_step target_interval"
    counts += " threads eval_interval eval_episodes final_eval_episodes checkpoint_interval"
    rules = [
        ("at least 0 and below 1", lambda x: 0 <= x < 1, "sparsity sticky_actions"),
        (
            "between 0 and 1",
            lambda x: 0 <= x <= 1,
            "gamma priority_exponent importance_exponent eval_epsilon",
        ),
        ("above 0 and finite", lambda x: 0 < x < math.inf, "learning_rate adam_eps v_max"),
        ("at least 0 and finite", lambda x: 0 <= x < math.inf, "noisy_sigma"),
        ("at least 1/16 (one channel) and finite", lambda x: 1 / 16 <= x < math.inf, "width_scale"),
        ("at least 1", lambda x: x >= 1, counts),
        ("above --n-step", lambda x: x > args.n_step, "buffer_size"),
        ("at least 2", lambda x: x >= 2, "atoms"),
        ("at least 0", lambda x: x >= 0, "learning_starts diagnostics_interval"),
        ("at least 0 and below 2^32", lambda x: 0 <= x < 2**32, "seed mask_seed"),
    ]
    for rule, holds, names in rules:
        for name in names.split():
            if (value := getattr(args, name)) is not None and not holds(value):
                fail(f"--{name.replace('_', '-')} {value}: must be {rule}")
    if "/" in args.exp_name:
        fail(f"--exp-name {args.exp_name}: is part of a folder's name and cannot contain /")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: there is no CUDA here; use --device cpu")
    if args.sparse_kernel == "packed" and args.device != "cpu" and torch.cuda.is_available():
        fail("--sparse-kernel packed: runs on the CPU only; add --device cpu")


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """A game that repeats each action and shows gray (84, 84) uint8 frames; it starts with 1 to 30 idle frames."""
    if not args.env_id.startswith("ALE/"):
        fail(f"--env-id {args.env_id}: this agent plays Atari games, such as ALE/Pong-v5")
    import ale_py

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    gym.register_envs(ale_py)
    emulator = {
        "frameskip": 1,
        "repeat_action_probability": args.sticky_actions,
        "render_mode": render_mode,
    }
    try:
        env = gym.make(args.env_id, disable_env_checker=True, **emulator)
        return gym.wrappers.AtariPreprocessing(env, frame_skip=args.action_repeat, screen_size=SIZE)
    except (gym.error.Error, ValueError) as error:
        fail(f"--env-id {args.env_id}: {error}")


def derive_seed(*key: int) -> int:
    """A seed for each key; keys that differ only in zeros at their ends share one."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


# What a seed derived from (--seed, purpose, ...) is for
TRAIN, EVAL, FINAL, DIAGNOSE = range(4)


# === SPARSE LAYERS (identical in every file) ===
def erdos_renyi(shapes: dict[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
    """Sparsity of each layer under the Erdos-Renyi rule: density proportional to sum(shape) / prod(shape).

    Shapes are (out, in) or (out, in, k_h, k_w). The budget counts all parameters (what each would lose is rounded
    down, as in the official code); those with one dimension (biases, norms) and layers whose density would pass 1 are
    dense, and the others pay for them. Raises ValueError if the dense ones alone exceed the budget.
    Mocanu et al. 2018; Evci et al. 2020, arXiv:1911.11134; section 2.2 of the paper.
    """
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    budget = sum(count - math.floor(sparsity * count) for count in size.values())
    dense = {name for name, shape in shapes.items() if len(shape) == 1}
    while len(dense) < len(shapes):
        rest = [name for name in shapes if name not in dense]
        epsilon = (budget - sum(size[name] for name in dense)) / sum(
            sum(shapes[name]) for name in rest
        )
        if epsilon <= 0:
            raise ValueError(
                f"sparsity {sparsity} is out of reach: biases and norms alone hold more parameters"
            )
        density = {name: epsilon * sum(shapes[name]) / size[name] for name in rest}
        overfull = {name for name in rest if density[name] > 1}
        if not overfull:
            return {name: 0.0 if name in dense else 1 - density[name] for name in shapes}
        dense |= overfull
    return dict.fromkeys(shapes, 0.0)


def uniform(shapes: dict[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
    """The same sparsity in every weight matrix; parameters with one dimension stay dense."""
    return {name: 0.0 if len(shape) == 1 else sparsity for name, shape in shapes.items()}


# The active weights of a packed layer are sorted by block of 128 columns, then by row: while a block is worked on, its
# 128 rows of x^T stay in the cache. Group g = block * rows + row holds the weights pointers[g] <= k < pointers[g + 1].
BLOCK = 128


REORDER = {
    "reassoc",
    "contract",
    "nsz",
}  # sums may be vectorised; NaN and infinity still pass through


def sort_into_blocks(
    row: torch.Tensor, col: torch.Tensor, shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The order that sorts entries (row, col) of a matrix of some shape into blocks, and the pointers to its groups."""
    group = col // BLOCK * shape[0] + row
    groups = math.ceil(shape[1] / BLOCK) * shape[0]
    return torch.argsort(group, stable=True), F.pad(
        torch.bincount(group, minlength=groups).cumsum(0), (1, 0)
    )


@numba.njit(parallel=True, fastmath=REORDER, cache=True)
def packed_product(pointers, col, values, x_t, y_t):
    """y_t[row] += values[k] * x_t[col[k]] over the active weights k of each row, two at a time."""
    rows = len(y_t)
    for block in range((len(pointers) - 1) // rows):
        for row in numba.prange(rows):
            y, end = y_t[row], pointers[block * rows + row + 1]
            for k in range(pointers[block * rows + row], end, 2):
                last = min(k + 1, end - 1)
                x0, x1 = x_t[col[k]], x_t[col[last]]
                w0 = values[k]
                w1 = (
                    values[last] if last > k else np.float32(0)
                )  # the last of an odd row stands alone
                for b in range(len(y)):
                    y[b] += w0 * x0[b] + w1 * x1[b]


@numba.njit(parallel=True, fastmath=REORDER, cache=True)
def packed_gradient(pointers, col, grad_t, x_t, out):
    """out[k] = <grad_t[row of k], x_t[col[k]]> for every active weight k, two at a time."""
    rows = len(grad_t)
    for block in range((len(pointers) - 1) // rows):
        for row in numba.prange(rows):
            grad, end = grad_t[row], pointers[block * rows + row + 1]
            for k in range(pointers[block * rows + row], end, 2):
                last = min(k + 1, end - 1)
                x0, x1 = x_t[col[k]], x_t[col[last]]
                dot0, dot1 = np.float32(0), np.float32(0)
                for b in range(len(grad)):
                    dot0 += grad[b] * x0[b]
                    dot1 += grad[b] * x1[b]
                out[k] = dot0
                out[last] = dot1


def call_numba(kernel, *tensors: torch.Tensor) -> torch.Tensor:
    """Runs a numba kernel on the memory of CPU tensors; returns the last one, which it fills."""
    kernel(*(tensor.detach().numpy() for tensor in tensors))
    return tensors[-1]


class PackedLinear(torch.autograd.Function):
    """y = x W^T + b for a W of which only the active entries exist, in time proportional to their number.

    Works on x^T (in, batch), of which one contiguous row is read for each active weight. The results are transposed
    views, so that ReLU and a packed layer that follow go on in this layout without a copy.
    """

    @staticmethod
    def forward(ctx, x, values, bias, layer):
        x_t, y_t = x.t().contiguous(), bias[:, None].repeat(1, len(x))
        ctx.save_for_backward(x_t, values)
        ctx.layer = layer
        return call_numba(packed_product, layer.pointers, layer.col, values, x_t, y_t).t()

    @staticmethod
    def backward(ctx, grad):
        x_t, values = ctx.saved_tensors
        layer, grad_t = ctx.layer, grad.t().contiguous()
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            by_column, zeros = values.index_select(0, layer.by_column), torch.zeros_like(x_t)
            grad_x = call_numba(
                packed_product, layer.pointers_t, layer.row, by_column, grad_t, zeros
            ).t()
        if ctx.needs_input_grad[1]:
            empty = torch.empty_like(values)
            grad_values = call_numba(packed_gradient, layer.pointers, layer.col, grad_t, x_t, empty)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_t.sum(1)
        return grad_x, grad_values, grad_bias, None


class SparseLinear(nn.Module):
    """A linear layer that stores its active weights only: `values` (nnz,), with a dense `bias` (out,).

    `active` (nnz,) lists their places row * in_features + column, in the order of sort_into_blocks: the dense matrix
    would be zeros(out * in) with `values` written at `active`.
    """

    def __init__(self, linear: nn.Linear, active: torch.Tensor, kernel: str):
        super().__init__()
        self.shape, self.kernel = tuple(linear.weight.shape), kernel
        row, col = active // self.shape[1], active % self.shape[1]
        order, pointers = sort_into_blocks(row, col, self.shape)
        row, col, active = row[order], col[order], active[order]
        self.values = nn.Parameter(linear.weight.detach().flatten()[active])
        self.bias = linear.bias
        self.register_buffer("active", active.int())
        if kernel == "dense":
            self.register_buffer("index", active, persistent=False)
        else:
            by_column, pointers_t = sort_into_blocks(col, row, self.shape[::-1])  # the same for W^T
            index = (pointers, col, pointers_t, row[by_column], by_column)
            for name, tensor in zip(("pointers", "col", "pointers_t", "row", "by_column"), index):
                self.register_buffer(name, tensor.int(), persistent=False)

    def _load_from_state_dict(self, state: dict, prefix: str, *rest) -> None:
        if not torch.equal(state[prefix + "active"].cpu(), self.active.cpu()):
            raise ValueError(
                "the saved mask is not the one drawn here: another version of PyTorch or of this file?"
            )
        nn.Module._load_from_state_dict(self, state, prefix, *rest)

    def dense_weight(self) -> torch.Tensor:
        """The values in their places among zeros, with the shape of the dense weight."""
        return (
            self.values.new_zeros(math.prod(self.shape))
            .index_copy_(0, self.index, self.values)
            .view(self.shape)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, in) -> (batch, out)"""
        if self.kernel == "packed":
            return PackedLinear.apply(x, self.values, self.bias, self)
        return F.linear(x, self.dense_weight(), self.bias)


class SparseConv2d(nn.Module):
    """A convolution that stores its active weights only, as SparseLinear does with the dense kernel.

    `active` (nnz,) lists their places in the flattened weight (out, in, k_h, k_w).
    """

    _load_from_state_dict, dense_weight = (
        SparseLinear._load_from_state_dict,
        SparseLinear.dense_weight,
    )

    def __init__(self, conv: nn.Conv2d, active: torch.Tensor):
        super().__init__()
        self.shape, self.stride, self.padding = tuple(conv.weight.shape), conv.stride, conv.padding
        self.values = nn.Parameter(conv.weight.detach().flatten()[active])
        self.bias = conv.bias
        self.register_buffer("active", active.int())
        self.register_buffer("index", active, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, in, height, width) -> (batch, out, height, width)"""
        return F.conv2d(x, self.dense_weight(), self.bias, self.stride, self.padding)


def sparsify(
    network: nn.Module,
    sparsity: float,
    distribution: str,
    mask_seed: int,
    kernel: str,
    device: torch.device,
) -> list[dict]:
    """Prunes a network once, at random, and moves it: each linear layer and convolution that loses weights is replaced.

    The survivors keep their initial values (no rescaling). `kernel` is auto, packed or dense. Returns the layer
    table: name, shape, active and total weights of each layer. Raises ValueError if the sparsity is out of reach.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    layer_sparsity = {"erdos_renyi": erdos_renyi, "uniform": uniform}[distribution](
        shapes, sparsity
    )
    generator = torch.Generator().manual_seed(mask_seed)
    table = []
    for name in [
        name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)
    ]:
        layer = network.get_submodule(
            name
        )  # one at a time, so that dense weights are freed on the way
        total = layer.weight.numel()
        count = max(1, round((1 - layer_sparsity[name + ".weight"]) * total))
        table.append(
            {"layer": name, "shape": list(layer.weight.shape), "active": count, "total": total}
        )
        if count < total:
            permutation = torch.randperm(
                total, generator=generator, dtype=torch.int32
            )  # half the memory of int64
            active = permutation[:count].long().sort().values
            packed = device.type == "cpu" and count <= 0.25 * total
            chosen = kernel if kernel != "auto" else "packed" if packed else "dense"
            linear = isinstance(layer, nn.Linear)
            network.set_submodule(
                name, SparseLinear(layer, active, chosen) if linear else SparseConv2d(layer, active)
            )
    other = sum(math.prod(shape) for shape in shapes.values()) - sum(row["total"] for row in table)
    table.append({"layer": "biases and norms", "shape": [other], "active": other, "total": other})
    network.to(device)
    return table


# === END SPARSE LAYERS ===


# === DIAGNOSTICS (identical in every file) ===
def run_and_record(encoder: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, list, list]:
    """The features of an encoder (batch, hidden), and the outputs of its linear and of its ReLU layers."""
    linear_outputs, relu_outputs, handles = [], [], []
    for module in encoder.modules():
        for kinds, outputs in (
            ((nn.Linear, SparseLinear), linear_outputs),
            ((nn.ReLU, nn.LeakyReLU), relu_outputs),
        ):
            if isinstance(module, kinds):
                handles.append(
                    module.register_forward_hook(
                        lambda _, __, y, outputs=outputs: outputs.append(y)
                    )
                )
    with torch.no_grad():
        features = encoder(inputs)
    for handle in handles:
        handle.remove()
    return features, linear_outputs, relu_outputs


def stable_rank(
    features: torch.Tensor, mass: float = 0.99, threshold: float = 0.01
) -> tuple[int, int]:
    """Two effective ranks of features (batch, hidden).

    First: how many leading singular values hold `mass` of their sum (Kumar et al. 2021; the official code). Second:
    how many singular values of features / sqrt(batch) exceed `threshold` (section 4.1, which gives no threshold; this
    one and the scaling are those of Lyle et al. 2022, arXiv:2204.09560).
    """
    singular = torch.linalg.svdvals(features.float())
    cumulative = singular.cumsum(0) / singular.sum()
    return int((cumulative < mass).sum()) + 1, int(
        (singular / math.sqrt(len(features)) > threshold).sum()
    )


def dormant_ratio(outputs: list[torch.Tensor], tau: float = 0.1) -> float:
    """Percentage of units in some layers' outputs (batch, units) whose mean |output| is at most tau of their layer's.

    Equation 1 of the paper; Sokar et al. 2023, arXiv:2302.12902.
    """
    scores = [y.abs().mean(0) for y in outputs]
    dormant = sum(int((score / (score.mean() + 1e-9) <= tau).sum()) for score in scores)
    return 100 * dormant / sum(len(score) for score in scores)


def measure_plasticity(
    encoder: nn.Module, inputs: torch.Tensor, parameters: list, gradients: list
) -> dict[str, float]:
    """The measurements of section 4 for one network, on a batch of inputs to its encoder."""
    features, linear_outputs, relu_outputs = run_and_record(encoder, inputs)
    rank_99, rank_threshold = stable_rank(features)
    return {
        "srank_99": rank_99,
        "srank_threshold": rank_threshold,
        "dormant_ratio": dormant_ratio(linear_outputs),
        "dormant_ratio_relu": dormant_ratio(relu_outputs),
        "active_units": float(torch.cat([(y > 0).float().mean(0) for y in relu_outputs]).mean()),
        "grad_norm": float(get_total_norm(gradients)),
        "param_norm": float(get_total_norm(parameters)),
        "feature_norm": float(features.norm(dim=1).mean()),
    }


# === END DIAGNOSTICS ===


# === RUNS (identical in every file) ===
def fail(message: str) -> NoReturn:
    """Ends the program with one line for a person and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def open_run(args) -> tuple[Path, dict | None]:
    """Finds or creates the run of these flags, locks it, and returns its folder and its checkpoint (or None).

    The folder is runs/<env>__<exp_name>__<hash>__s<seed>; the hash covers the other flags that change results. With
    --eval-only it is only read. A run with final returns is finished even if its checkpoints were deleted. Exits with
    code 2 if the folder cannot be used, another process works in it, or the checkpoint is damaged or of other flags.
    """
    flags = {name: value for name, value in asdict(args).items() if name not in EXECUTION_FLAGS}
    digest = hashlib.sha256(
        json.dumps({**flags, "seed": None}, sort_keys=True).encode()
    ).hexdigest()[:8]
    env = args.env_id.replace("/", "-").replace(":", "-")
    run_dir = Path(args.runs_dir) / f"{env}__{args.exp_name}__{digest}__s{args.seed}"
    try:
        if not args.eval_only:
            run_dir.mkdir(parents=True, exist_ok=True)
            open_run.lock = FileLock(run_dir / ".lock")  # held until the process ends
            open_run.lock.acquire(timeout=0)
        if not args.resume and not args.eval_only and any(run_dir.glob("[!.]*")):
            old = next(
                path for n in range(1, 10**6) if not (path := Path(f"{run_dir}.old{n}")).exists()
            )
            old.mkdir()
            for path in sorted(
                run_dir.glob("[!.]*"), reverse=True
            ):  # checkpoints after what they count on
                path.rename(old / path.name)
            print(f"the previous run of these flags is now in {old}")
        path, metrics = run_dir / "checkpoint.pt", run_dir / "metrics.csv"
        if not path.exists():  # killed between the two renames of save_checkpoint
            path = run_dir / "checkpoint.previous.pt"
        if not path.exists():
            if args.eval_only:
                fail(
                    f"nothing to evaluate: no checkpoint in {run_dir}; train first, with the same flags"
                )
            finished = metrics.exists() and ",final/return_mean," in metrics.read_text()
            return run_dir, {"finished": True} if finished else None
    except Timeout:
        fail(
            f"another process is working in {run_dir}; wait for it, or change --seed or --exp-name"
        )
    except OSError as error:
        fail(f"cannot use {run_dir} ({error.strerror}); choose another folder with --runs-dir")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        made_with = checkpoint["args"]
    except Exception as error:
        fail(
            f"cannot read {path} ({type(error).__name__}); if it is damaged, delete it to go on from the one before"
        )
    for name, value in flags.items():
        if made_with.get(name) != value:
            fail(
                f"{path} was made with --{name.replace('_', '-')} {made_with.get(name)}, not {value}; move it away"
            )
    return run_dir, checkpoint


def save_checkpoint(run_dir: Path, args, state: dict) -> None:
    """Writes checkpoint.pt so that a kill at any moment leaves a whole one, and keeps the one before it.

    Every random number is drawn on the CPU, so there are three generators.
    """
    kind, keys, *position = np.random.get_state()
    numpy_state = [kind, keys.tolist(), *position]
    generators = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    path, temporary = run_dir / "checkpoint.pt", run_dir / "checkpoint.tmp"
    with open(temporary, "wb") as file:
        torch.save({**state, "args": asdict(args), "generators": generators}, file)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        os.replace(path, run_dir / "checkpoint.previous.pt")
    os.replace(temporary, path)


def restore_generators(generators: dict) -> None:
    """Sets every global random generator to the state saved by save_checkpoint."""
    random.setstate(generators["python"])
    np.random.set_state(tuple(generators["numpy"]))
    torch.set_rng_state(generators["torch"])


def describe_run(run_dir: Path, args, layers: dict[str, list[dict]]) -> None:
    """Prints the layer table of each network; writes args.json: flags, versions, git revision, layer tables."""
    for network, rows in layers.items():
        active, total = sum(row["active"] for row in rows), sum(row["total"] for row in rows)
        print(f"{network:<26}{'shape':>14}{'density':>9}{'active':>13} /{'total':>12}")
        for row in [*rows, {"layer": "all", "shape": [], "active": active, "total": total}]:
            shape, density = " x ".join(map(str, row["shape"])), row["active"] / row["total"]
            print(
                f"  {row['layer']:<24}{shape:>14}{density:>9.4f}{row['active']:>13,} /{row['total']:>12,}"
            )
    how = {
        "shell": True,
        "cwd": Path(__file__).resolve().parent,
        "capture_output": True,
        "text": True,
    }
    revision = (
        subprocess.run("git describe --always --dirty", **how).stdout.strip() or None
    )  # None without git
    packages = ("torch", "numpy", "numba", "gymnasium", "shimmy", "dm-control", "mujoco", "ale-py")
    installed = {
        str(package.name).lower().replace("_", "-"): package.version for package in distributions()
    }
    versions = {
        "python": platform.python_version(),
        **{name: installed.get(name) for name in packages},
    }
    record = {
        "args": asdict(args),
        "versions": versions,
        "git_revision": revision,
        "layers": layers,
    }
    (run_dir / "args.json").write_text(json.dumps(record, indent=1))


class Metrics:
    """Writes to metrics.csv (one flushed row a value), TensorBoard and, with --track, Weights & Biases."""

    def __init__(self, run_dir: Path, args, csv_bytes: int, env_step: int):
        self.file = open(run_dir / "metrics.csv", "a")  # noqa: SIM115
        if os.fstat(self.file.fileno()).st_size < csv_bytes:
            fail(
                f"{self.file.name} lacks what came before the checkpoint; bring it back, or start with --no-resume"
            )
        self.file.truncate(csv_bytes)  # what came after the checkpoint will be written again
        if csv_bytes == 0:
            self.file.write("env_step,agent_step,update_step,metric,value\n")
        self.tensorboard = SummaryWriter(run_dir, purge_step=env_step + 1 if csv_bytes else 0)
        self.wandb = None
        if args.track:
            import wandb

            where = {
                "project": args.wandb_project,
                "entity": args.wandb_entity,
                "id": run_dir.name,
                "dir": run_dir,
            }
            try:
                self.wandb = wandb.init(
                    **where, config=asdict(args), resume="allow" if csv_bytes else None
                )
            except wandb.Error as error:
                fail(f"--track: {error}")
            self.wandb.define_metric("*", step_metric="env_step")

    def log(
        self, env_step: int, agent_step: int, update_step: int, values: dict[str, float]
    ) -> None:
        for metric, value in values.items():
            self.file.write(f"{env_step},{agent_step},{update_step},{metric},{float(value)!r}\n")
            self.tensorboard.add_scalar(metric, float(value), env_step)
        self.file.flush()
        if self.wandb:
            self.wandb.log({**values, "env_step": env_step})

    def sync(self) -> int:
        """Brings everything logged so far to the disk; returns the length of metrics.csv."""
        self.tensorboard.flush()
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def close(self) -> None:
        self.file.close()
        self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def draw_learning_curve(run_dir: Path, title: str) -> None:
    """learning_curve.png from metrics.csv: returns of training episodes and of evaluations (mean and std)."""
    metrics = pd.read_csv(run_dir / "metrics.csv").pivot(
        index="env_step", columns="metric", values="value"
    )
    axes = (figure := Figure((6, 4), layout="constrained")).subplots()
    if "episode/return" in metrics:
        axes.plot(
            metrics["episode/return"].dropna(), color="0.75", lw=0.8, label="training episodes"
        )
    mean, std = (metrics[f"eval/return_{name}"].dropna() for name in ("mean", "std"))
    axes.plot(mean, marker="o", ms=3, label="evaluation (mean, std over episodes)")
    axes.fill_between(mean.index, mean - std, mean + std, alpha=0.2)
    axes.set(xlabel="env steps", ylabel="return", title=title)
    axes.legend(frameon=False)
    figure.savefig(run_dir / "learning_curve.png", dpi=150)


# === END RUNS ===


if __name__ == "__main__":
    train(tyro.cli(Args))
