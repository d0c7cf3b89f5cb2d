# docs: docs/sac_simba_dynamic.md
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "numba==0.68.1", "scipy==1.17.1", "tyro==1.0.17",
#     "gymnasium==1.4.0", "shimmy==2.0.1", "dm-control==1.0.50", "mujoco==3.17.0",
#     "filelock==4.2.11", "matplotlib==3.11.2", "pandas==3.1.1", "tqdm==4.70.1",
#     "imageio==2.38.1", "imageio-ffmpeg==0.8.1", "tensorboard==2.21.0", "wandb==0.31.0",
# ]
# ///
"""Soft Actor-Critic with SimBa networks and a sparsity whose topology changes in training.

The topology is which weights of a layer exist. --topology static: a random set, chosen once, before
training, as in sac_simba_sparse.py, bit for bit. set and rigl: every --topology-interval updates,
the smallest weights of each layer are dropped and as many places grow, at random (SET) or where the
gradient is largest (RigL). magnitude: networks begin dense, and the smallest weights are removed
little by little, until --sparsity is reached. Only the weights that exist are stored, at any time.

SAC learns a stochastic policy and a Q-function from replayed transitions. It maximises return plus
entropy, and learns the weight of the entropy (the temperature) too. Actor and critic are SimBa
networks: pre-LayerNorm residual blocks with a 4x inverted bottleneck, a last LayerNorm, and running
observation statistics in front.

Papers: Network Sparsity Unlocks the Scaling Potential of Deep RL (Ma, Li et al., ICML 2025); SimBa
(Lee et al., 2024), arXiv:2410.09754; Soft Actor-Critic (Haarnoja et al., 2018), arXiv:1812.05905;
SET (Mocanu et al., 2018), arXiv:1707.04780; RigL (Evci et al., 2020), arXiv:1911.11134; gradual
magnitude pruning (Zhu and Gupta, 2017), arXiv:1710.01878; all three with SAC: The State of Sparse
Training in Deep RL (Graesser et al., 2022), arXiv:2206.10369.

Differences from the official (JAX) code, https://github.com/lilucse/SparseNetwork4DRL:
 1. A pruned weight is not stored: values, gradients, AdamW moments and the target network are
    vectors over the active weights, elementwise equal to training a masked dense network.
 2. Every layer keeps an exact number of weights (a random permutation); there, one Bernoulli draw
    a weight.
 3. Biases and LayerNorm parameters are always dense; there, very small networks lose some.
 4. --actor-sparsity and --critic-sparsity are independent; there, a dense actor makes the critic
    dense.
 5. The masks of actor and critic come from independent generators; there, both start from the run
    seed.
 6. The training environment is seeded anew at every reset from (seed, episode), so that a resumed
    run repeats the uninterrupted one in any environment whose seed decides everything; there, one
    generator runs on.
 7. Evaluations draw their initial states from (seed, decision), so that they leave training
    untouched.
 8. A decision updates first and steps the environment then, so that a GPU learns while the
    environment steps: a transition is learned from one decision later. --no-overlap updates after
    the step, as there.
Differences from the code of RigL and of its RL experiments (google-research/rigl):
 9. A place that was dropped cannot grow in the same change; there, it can, and keeps its value.
 10. A change comes after an update, on its batch; in their SAC, before the last parts of one
    (temperature and target); in RigL's own optimiser, in place of one.
 11. The initial weights are those of the dense layers; their SAC draws them for as many inputs as
    are left.
 12. The first change comes after one interval, and the schedule counts all of training; in their
    SAC, the first update makes a change, and the schedule counts updates.
Differences from the papers of SET and of gradual magnitude pruning:
 13. SET is that of RigL's code: the smallest weights are dropped, fewer and fewer, until
    --topology-end; there, a constant fraction of the positive and of the negative weights, after
    each epoch.
 14. A weight that magnitude pruning has removed is gone; there, it is masked, keeps its value and
    can come back.

In this file: flags, networks, replay, losses, agent, topology, update, learner; then `train`, the
whole of training; then where the topology is kept; then an appendix shared with the other files:
sparse layers, diagnostics, runs.
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
from pathlib import Path
from types import SimpleNamespace
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
from gymnasium.wrappers.utils import RunningMeanStd
from matplotlib.figure import Figure
from scipy.stats import trim_mean
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
    exp_name: str = "sac_simba_dynamic"
    """part of the run's name"""
    seed: Annotated[int, "0 <= x < 2**32"] = 1
    """seed of networks, exploration, replay and environments (below 2^32)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto takes CUDA when there is one"""
    threads: Annotated[int | None, "1 <= x <= 10**4"] = None
    """CPU threads (default: all cores); a resumed run is bit-equal only with the same number"""
    matmul_precision: Literal["high", "highest"] = "high"
    """matrix products on CUDA: high takes TF32 (10 bits of precision), highest float32 (23 bits)"""
    cuda_graph: bool = True
    """on CUDA, run all updates of a decision as one CUDA graph"""
    runs_dir: str = "runs"
    """folder that holds one folder per run"""
    resume: bool = True
    """go on from the run's checkpoint; --no-resume moves the old run aside and starts afresh"""
    eval_only: bool = False
    """evaluate the checkpoint of these flags for --final-eval-episodes episodes and stop"""
    run_dir: str | None = None
    """with --eval-only: the run in this folder, with the flags of its training"""
    init_from: str | None = None
    """folder of a run whose networks a new run starts with (the same shapes, sparsity
    and --mask-seed); optimisers and replay start afresh"""
    capture_video: bool = False
    """film the first episode of the last evaluation (or of --eval-only) as mp4"""

    # Environment
    env_id: str = "dm_control/humanoid-run-v0"
    """any Gymnasium id with Box (or Dict of Box) observations and Box actions;
    dm_control/* through Shimmy"""
    action_repeat: Annotated[int, "1 <= x <= 10**6"] = 2
    """simulator frames per decision, rewards summed"""
    total_timesteps: Annotated[int, "x >= 1"] = 1_000_000
    """env steps of training (simulator frames, action repeat included)"""
    max_episode_steps: Annotated[int | None, "x >= 1"] = None
    """env steps after which an episode is cut off (default: the environment's own limit)"""
    env_kwargs: str | None = None
    """arguments of the environment as JSON, such as '{"reset_noise_scale": 0.2}'"""

    # Algorithm (Table 2 of the paper)
    learning_starts: Annotated[int, "x >= 0"] = 10_000
    """env steps of uniformly random actions before the first update"""
    updates_per_step: Annotated[int, "1 <= x <= 10**6"] = 2
    """gradient updates per decision (the replay ratio)"""
    overlap: bool = True
    """update before the environment steps, so that a GPU learns while it does; the newest
    transition is then learned from one decision later (--no-overlap: update after the step)"""
    batch_size: Annotated[int, "1 <= x <= 10**6"] = 256
    """transitions per update"""
    buffer_size: Annotated[int, "x >= 1"] = 1_000_000
    """largest number of transitions kept for replay"""
    gamma: Annotated[float | None, "0 <= x <= 1"] = None
    """discount (default: TD-MPC2's heuristic from the episode length, 0.99 for 500 decisions)"""
    tau: Annotated[float, "0 <= x <= 1"] = 0.005
    """target <- tau * critic + (1 - tau) * target after every update"""
    learning_rate: Annotated[float, "0 < x < inf"] = 1e-4
    """learning rate of actor, critic and temperature (AdamW)"""
    weight_decay: Annotated[float, "0 <= x < inf"] = 1e-2
    """decoupled weight decay of every active weight, bias and LayerNorm parameter;
    the temperature has none"""
    initial_temperature: Annotated[float, "0 < x < inf"] = 1e-2
    """temperature alpha at the start"""
    clipped_double_q: bool = False
    """train two critics and use the smaller value"""
    reset_interval: Annotated[int | None, "x >= 1"] = None
    """env steps between resets: fresh parameters and optimisers, replay kept
    (Figure 6; default: never)"""

    # Size and sparsity
    width_scale: Annotated[float, "1/128 <= x <= 1000"] = 1.0
    """hidden units: actor 128 x scale, critic 512 x scale"""
    depth_scale: Annotated[int, "1 <= x <= 1000"] = 1
    """residual blocks: actor 1 x scale, critic 2 x scale"""
    sparsity: Annotated[float, "0 <= x < 1"] = 0.0
    """fraction of parameters removed from the actor and from the critic; 0: the dense baseline"""
    actor_sparsity: Annotated[float | None, "0 <= x < 1"] = None
    """sparsity of the actor alone (default: --sparsity)"""
    critic_sparsity: Annotated[float | None, "0 <= x < 1"] = None
    """sparsity of the critic alone (default: --sparsity)"""
    sparsity_distribution: Literal["erdos_renyi", "uniform"] = "erdos_renyi"
    """how a network's sparsity is spread over its layers"""
    mask_seed: Annotated[int | None, "0 <= x < 2**32"] = None
    """seed of the random pruning (default: --seed)"""
    sparse_kernel: Literal["auto", "packed", "dense"] = "auto"
    """how sparse layers multiply (auto: packed on CPU up to density 0.25, else dense);
    a resumed run is bit-equal only with the same kernel"""

    # Topology (defaults of SAC in Graesser et al. 2022; the end is RigL's)
    topology: Literal["static", "set", "rigl", "magnitude"] = "rigl"
    """how the active weights change in training"""
    topology_interval: Annotated[int, "x >= 1"] = 1000
    """updates between changes of the topology (at most one change a decision)"""
    drop_fraction: Annotated[float, "0 <= x <= 1"] = 0.5
    """set, rigl: fraction of a layer's weights that a change drops; falls along a cosine to zero"""
    topology_end: Annotated[float, "0 < x <= 1"] = 0.75
    """set, rigl: fraction of training after which the topology stays"""
    grow_init: Literal["zero", "normal"] = "zero"
    """set, rigl: value of a weight that grows (normal: with He's standard deviation)"""
    prune_start: Annotated[float, "0 <= x <= 1"] = 0.2
    """magnitude: fraction of training at which pruning starts"""
    prune_end: Annotated[float, "prune_start < x <= 1"] = 0.8
    """magnitude: fraction of training at which --sparsity is reached"""

    # Logging
    eval_interval: Annotated[int, "x >= 1"] = 10_000
    """env steps between evaluations, the first at step 0"""
    eval_episodes: Annotated[int, "1 <= x <= 10**6"] = 10
    """episodes of each evaluation (deterministic policy)"""
    final_eval_episodes: Annotated[int, "1 <= x <= 10**6"] = 100
    """episodes of the last evaluation and of --eval-only"""
    diagnostics_interval: Annotated[int, "x >= 0"] = 10_000
    """env steps between measurements of rank, dormancy and norms (0: never)"""
    track: bool = False
    """log to Weights & Biases as well (WANDB_MODE=offline needs no account)"""
    wandb_project: str = "sparse_zoo"
    """Weights & Biases project of --track"""
    wandb_entity: str | None = None
    """Weights & Biases team of --track (default: your own account)"""

    # Checkpoints
    checkpoint_interval: Annotated[int, "x >= 1"] = 10_000
    """env steps between checkpoints, each written at the next end of an episode"""


def init_linear(in_features: int, out_features: int, he_normal: bool = False) -> nn.Linear:
    """Orthogonal weights, or JAX's he_normal: cut at 2 sigma, variance corrected for the cut."""
    layer = nn.Linear(in_features, out_features)
    nn.init.zeros_(layer.bias)
    if he_normal:
        std = math.sqrt(2 / in_features) / 0.87962566103423978  # std of a normal cut at 2 sigma
        rows_at_once = math.ceil(2**22 / in_features)  # trunc_normal_ needs three times the memory
        for rows in layer.weight.detach().split(rows_at_once):
            nn.init.trunc_normal_(rows, std=std, a=-2 * std, b=2 * std)
    else:
        nn.init.orthogonal_(layer.weight)
    return layer


class ResidualBlock(nn.Module):
    """x + MLP(LayerNorm(x)), with four times as many units inside."""

    def __init__(self, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden, eps=1e-6)  # flax's epsilon
        self.up = init_linear(hidden, 4 * hidden, he_normal=True)
        self.relu = nn.ReLU()
        self.down = init_linear(4 * hidden, hidden, he_normal=True)

    def forward(self, x):
        """(batch, hidden) -> (batch, hidden)"""
        return x + self.down(self.relu(self.up(self.norm(x))))


def simba(in_features: int, hidden: int, blocks: int) -> nn.Sequential:
    """The SimBa encoder: (batch, in_features) -> (batch, hidden)."""
    return nn.Sequential(
        init_linear(in_features, hidden),
        *(ResidualBlock(hidden) for _ in range(blocks)),
        nn.LayerNorm(hidden, eps=1e-6),
    )


class Actor(nn.Module):
    """Tanh-Gaussian policy."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int, blocks: int):
        super().__init__()
        self.encoder = simba(obs_dim, hidden, blocks)
        self.mean = init_linear(hidden, action_dim)
        self.log_std = init_linear(hidden, action_dim)

    def forward(self, obs):
        """obs (batch, obs_dim) -> mean and log std before tanh, (batch, action_dim) each."""
        features = self.encoder(obs)  # (batch, hidden)
        squashed = torch.tanh(self.log_std(features))
        return self.mean(features), -10 + 6 * (1 + squashed)  # log std within [-10, 2]

    def sample(self, obs, noise):
        """Actions (batch, action_dim) for standard normal noise of that shape; log pi (batch,)."""
        mean, log_std = self(obs)
        raw = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        # tanh squeezes the density: minus log(1 - tanh(raw)^2), in a form that does not overflow
        log_prob = log_prob - 2 * (math.log(2) - raw - F.softplus(-2 * raw))
        return torch.tanh(raw), log_prob.sum(-1)


class Critic(nn.Module):
    """One Q-function, or two with --clipped-double-q."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int, blocks: int, critics: int):
        super().__init__()
        inputs = obs_dim + action_dim
        self.encoders = nn.ModuleList(simba(inputs, hidden, blocks) for _ in range(critics))
        self.heads = nn.ModuleList(init_linear(hidden, 1) for _ in range(critics))

    def forward(self, obs, action):
        """(batch, obs_dim), (batch, action_dim) -> Q-values (critics, batch)"""
        x = torch.cat([obs, action], -1)
        values = [head(encoder(x)) for encoder, head in zip(self.encoders, self.heads)]
        return torch.stack(values).squeeze(-1)


class ObservationNorm:
    """Running mean and variance of the observations of training, as in SimBa; no clipping."""

    def __init__(self, obs_dim: int, device: torch.device):
        self.statistics = RunningMeanStd(shape=(obs_dim,))
        self.device = device

    def update(self, obs: np.ndarray) -> None:
        """Takes one observation (obs_dim,) into the statistics."""
        self.statistics.update(obs[None])

    def mean_and_std(self) -> torch.Tensor:
        """What is subtracted from observations, and what they are divided by: (2, obs_dim)"""
        std = np.sqrt(self.statistics.var + 1e-8)
        return torch.as_tensor(np.stack([self.statistics.mean, std]), dtype=torch.float32)

    def __call__(self, obs: torch.Tensor) -> torch.Tensor:
        """Raw observations (batch, obs_dim) -> normalised ones on the agent's device."""
        mean, std = self.mean_and_std().to(obs.device)
        return ((obs - mean) / std).to(self.device)

    def state_dict(self) -> dict:
        statistics = vars(self.statistics)  # mean, var, count
        return {
            name: torch.as_tensor(value, dtype=torch.float64) for name, value in statistics.items()
        }

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            if value.shape != np.shape(getattr(self.statistics, name)):
                raise ValueError(f"{name} has the shape {tuple(value.shape)}")
            setattr(self.statistics, name, value.numpy())


class Batch(NamedTuple):
    """Transitions, float32, batch first."""

    obs: torch.Tensor
    action: torch.Tensor
    reward: torch.Tensor
    next_obs: torch.Tensor
    terminated: torch.Tensor  # 1 where the episode ended by itself, not by its time limit


class ReplayBuffer:
    """A ring of raw transitions on the device, sampled uniformly with replacement.

    The newest transition stays on the CPU until it is written: together with all else that a
    decision sends to the device, or at the latest when the next one or a sample needs it.
    """

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.capacity = capacity
        self.device = device
        self.sizes = [obs_dim, action_dim, 1, obs_dim, 1]
        self.table = torch.empty(capacity, sum(self.sizes), device=device)
        self.newest = torch.zeros(1, sum(self.sizes))
        self.newest_waits = False  # whether `newest` is not yet in `table`
        self.added = 0

    def add(self, obs, action, reward, next_obs, terminated) -> None:
        """Takes one transition, over the oldest one when the ring is full."""
        self.write_newest()
        transition = (obs, action, reward, next_obs, terminated)
        for column, value in zip(self.newest[0].split(self.sizes), transition):
            column[:] = torch.as_tensor(value)
        self.added += 1
        self.newest_waits = True

    def filled(self) -> int:
        return min(self.added, self.capacity)

    def hand_over(self) -> tuple[torch.Tensor, int]:
        """The newest transition and the row it belongs in; the caller writes it there."""
        self.newest_waits = False
        return self.newest, (self.added - 1) % self.capacity

    def write_newest(self) -> None:
        if self.newest_waits:
            newest, place = self.hand_over()
            self.table[place].copy_(newest[0])

    def write(self, transition: torch.Tensor, place: torch.Tensor) -> None:
        """A transition (1, numbers) into the row `place` (1,), both on the device."""
        self.table.index_copy_(0, place.long(), transition)

    def batch(self, index: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> Batch:
        """The transitions in the rows `index`, old observations with the newest statistics."""
        rows = self.table.index_select(0, index)
        obs, action, reward, next_obs, terminated = rows.split(self.sizes, dim=1)
        return Batch(
            obs=(obs - mean) / std,
            action=action,
            reward=reward[:, 0],
            next_obs=(next_obs - mean) / std,
            terminated=terminated[:, 0],
        )

    def sample(
        self,
        batch_size: int,
        norm: ObservationNorm,
        generator: torch.Generator | None = None,
    ) -> Batch:
        """A batch on the device."""
        self.write_newest()
        index = torch.randint(self.filled(), (batch_size,), generator=generator)
        return self.batch(index.to(self.device), *norm.mean_and_std().to(self.device))

    def state_dict(self) -> dict:
        self.write_newest()
        # Copies: of a view, all of its memory would be saved
        columns = self.table[: self.added].split(self.sizes, dim=1)
        saved = Batch(*(column.to("cpu", copy=True) for column in columns))
        saved = saved._replace(reward=saved.reward[:, 0], terminated=saved.terminated[:, 0])
        return {"added": self.added, "columns": list(saved)}

    def load_state_dict(self, state: dict) -> None:
        self.added = state["added"]
        filled = self.table[: self.filled()].split(self.sizes, dim=1)
        for column, saved in zip(filled, state["columns"]):
            column[:] = saved.view(len(saved), -1)
        # The next decision sends the newest transition, whether it has been written or not
        self.newest[:] = self.table[(self.added - 1) % self.capacity]


def actor_loss(actor, critic, alpha, obs, noise):
    """mean(alpha * log pi(a|s) - Q(s, a)), and the entropy mean(-log pi(a|s)).

    The actions a come from noise (batch, action_dim), standard normal.
    """
    action, log_prob = actor.sample(obs, noise)  # (batch, action_dim), (batch,)
    value = critic(obs, action).amin(0)  # (critics, batch) -> (batch,)
    loss = (alpha * log_prob - value).mean()
    return loss, -log_prob.detach().mean()


@torch.no_grad()
def td_target(actor, target_critic, alpha, batch, gamma, noise):
    """r + gamma * (1 - terminated) * (Q_target(s', a') - alpha * log pi(a'|s')), (batch,)"""
    action, log_prob = actor.sample(batch.next_obs, noise)
    value = target_critic(batch.next_obs, action).amin(0)  # (critics, batch) -> (batch,)
    value = value - alpha * log_prob
    return batch.reward + gamma * (1 - batch.terminated) * value


def critic_loss(critic, batch, target):
    """Mean squared TD error, summed over the critics."""
    error = critic(batch.obs, batch.action) - target  # (critics, batch)
    return error.square().mean(1).sum()


class Agent:
    """Actor, critic, target critic and temperature, with their optimisers.

    The networks are drawn from torch's generator and pruned with masks from --mask-seed.
    """

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        hidden = round(128 * args.width_scale)
        blocks = args.depth_scale
        critics = 2 if args.clipped_double_q else 1
        self.actor = Actor(obs_dim, action_dim, hidden, blocks)
        self.critic = Critic(obs_dim, action_dim, 4 * hidden, 2 * blocks, critics)

        # Prune each network once
        actor_sparsity = args.sparsity if args.actor_sparsity is None else args.actor_sparsity
        critic_sparsity = args.sparsity if args.critic_sparsity is None else args.critic_sparsity
        mask_seed = args.seed if args.mask_seed is None else args.mask_seed
        final_counts = []  # of the active weights of each sparse layer

        def choose_places(shape, density, generator) -> torch.Tensor:
            """The rule of sparsify: at random; every place for magnitude, which begins dense."""
            places = random_places(shape, density, generator)
            final_counts.append(len(places))
            return torch.arange(math.prod(shape)) if args.topology == "magnitude" else places

        prune = partial(
            sparsify,
            rule=choose_places,
            distribution=args.sparsity_distribution,
            kernel=args.sparse_kernel,
            device=device,
            packed=PackedProduct,  # multiplies with active weights alone, on a CPU
            keeper=DenseCopy,  # keeps a dense weight between optimiser steps
        )
        prune(self.actor, actor_sparsity, mask_seed=derive_seed(mask_seed, 0))
        prune(self.critic, critic_sparsity, mask_seed=derive_seed(mask_seed, 1))

        # Check what losses and diagnostics rely on: a changed network fails here, in one sentence
        batch = obs_dim + action_dim + 1  # unlike all other sizes
        obs = torch.zeros(batch, obs_dim, device=device)
        action = torch.zeros(batch, action_dim, device=device)
        with torch.no_grad():
            mean, log_std = self.actor(obs)
            check_shape("actor: mean", mean, batch=batch, action_dim=action_dim)
            check_shape("actor: log std", log_std, batch=batch, action_dim=action_dim)
            sampled, log_prob = self.actor.sample(obs, noise=action)
            check_shape("actor.sample: action", sampled, batch=batch, action_dim=action_dim)
            check_shape("actor.sample: log pi", log_prob, batch=batch)
            value = self.critic(obs, action)
            check_shape("critic", value, critics=critics, batch=batch)
        check_encoder(self.actor, "encoder", obs)
        check_encoder(self.critic, "encoders.0", torch.cat([obs, action], -1))

        # deepcopy's second argument lets the target critic share the critic's index buffers
        shared = {id(buffer): buffer for buffer in self.critic.buffers()}
        self.target_critic = copy.deepcopy(self.critic, shared)
        self.target_critic.requires_grad_(False)

        log_alpha = torch.tensor(math.log(args.initial_temperature))
        self.temperature = nn.ParameterDict({"log_alpha": log_alpha}).to(device)

        adamw = partial(torch.optim.AdamW, lr=args.learning_rate, fused=True)
        decay = args.weight_decay
        self.actor_optimizer = adamw(self.actor.parameters(), weight_decay=decay)
        self.critic_optimizer = adamw(self.critic.parameters(), weight_decay=decay)
        self.temperature_optimizer = adamw(self.temperature.parameters(), weight_decay=0.0)
        self.topology = Topology(args, self, final_counts)

    def alpha(self) -> torch.Tensor:
        return self.temperature["log_alpha"].exp()


# A rule of the topology says which weights of a layer are dropped, and which places grow.
# values (weights,): of the active weights; inactive (places,): the places that could grow;
# count: how many are to change; gradient (out * in,): of the dense weight, only for NEEDS_GRADIENT.
# It returns the dropped weights, as indices into values, and the places that grow.


def set_rule(values, inactive, count: int, gradient, generator: torch.Generator):
    """SET: the smallest weights give way to places drawn at random."""
    dropped = values.abs().topk(count, largest=False).indices
    drawn = torch.randperm(len(inactive), generator=generator)[:count]
    return dropped, inactive[drawn.to(inactive.device)]


def rigl_rule(values, inactive, count: int, gradient, generator: torch.Generator):
    """RigL: the smallest weights give way to the places with the largest gradients."""
    dropped = values.abs().topk(count, largest=False).indices
    largest = gradient[inactive].abs().topk(count).indices
    return dropped, inactive[largest]


def magnitude_rule(values, inactive, count: int, gradient, generator: torch.Generator):
    """Gradual magnitude pruning: the smallest weights go, and nothing grows."""
    return values.abs().topk(count, largest=False).indices, inactive[:0]


RULES = {"set": set_rule, "rigl": rigl_rule, "magnitude": magnitude_rule}
NEEDS_GRADIENT = {"rigl"}
TOPOLOGY = 4  # what a derived seed is for, beside those of the appendix


def count_changes(args: Args, progress: float, active: int, final: int, total: int) -> int:
    """How many weights of a layer a change of the topology drops.

    progress: the fraction of training that is done
    active, final, total: the layer's weights that exist now, at the end of pruning, and if dense

    set, rigl: drop_fraction / 2 * (1 + cos(pi * progress / topology_end)) of them, rounded down
    (Evci et al. 2020), and at most as many as can grow. magnitude: as many as there are above
    final + (1 - (progress - start) / (end - start))^3 * (total - final) (Zhu and Gupta 2017).
    """
    if args.topology == "magnitude":
        done = (progress - args.prune_start) / (args.prune_end - args.prune_start)
        left = (1 - min(max(done, 0.0), 1.0)) ** 3
        return max(0, active - final - round(left * (total - final)))
    if progress > args.topology_end:
        return 0
    fraction = args.drop_fraction / 2 * (1 + math.cos(math.pi * progress / args.topology_end))
    return min(int(fraction * active), total - active)


def layer_gradients(layers: list[nn.Module], loss: Callable[[], torch.Tensor]) -> dict:
    """For each layer its inputs, and the gradients of a loss for its outputs; (batch, units) each.

    The gradient of its dense weight is a product of the two.
    """
    if not layers:
        return {}
    seen = []
    handles = [layer.register_forward_hook(lambda *what: seen.append(what)) for layer in layers]
    value = loss()
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(value, [output for _, _, output in seen])
    return {
        layer: (inputs[0].detach(), gradient)
        for (layer, inputs, _), gradient in zip(seen, gradients)
    }


def change_topology(
    agent: Agent, args: Args, progress: float, seed: int, batch: Batch, noise, next_noise, gamma
) -> bool:
    """Changes the topology of every sparse layer by the rule of --topology.

    progress: the fraction of training that is done; seed: of what is drawn at random; the others:
    those of an update. True if pruning has just ended.
    """
    topology = agent.topology
    counts = {}
    for name, (layer, *_) in topology.layers.items():
        sizes = (len(layer.active), topology.final_counts[name], math.prod(layer.shape))
        counts[name] = count_changes(args, progress, *sizes)
    if not any(counts.values()):
        return False

    recorded = {}
    if args.topology in NEEDS_GRADIENT:
        alpha = agent.alpha().detach()
        target = td_target(agent.actor, agent.target_critic, alpha, batch, gamma, next_noise)
        losses = {
            "actor": lambda: actor_loss(agent.actor, agent.critic, alpha, batch.obs, noise)[0],
            "critic": lambda: critic_loss(agent.critic, batch, target),
        }
        for network, loss in losses.items():
            recorded |= layer_gradients(topology.layers_of(network), loss)

    generator = torch.Generator().manual_seed(seed)
    for name, count in counts.items():
        layer = topology.layers[name][0]
        gradient = None
        if layer in recorded:  # a dense gradient exists for one layer at a time
            inputs, output_gradient = recorded.pop(layer)
            gradient = (output_gradient.t() @ inputs).flatten()
        active = topology.active_mask(name)
        inactive = (~active).nonzero().squeeze(1)
        values = layer.values.detach()
        dropped, grown = RULES[args.topology](values, inactive, count, gradient, generator)
        twice = len(dropped.unique()) < len(dropped) or len(grown.unique()) < len(grown)
        if twice or active[grown].any():
            fail(
                f"--topology {args.topology}: its rule must return distinct weights to drop, "
                f"and distinct inactive places to grow; for {name} it did not"
            )
        initial = values.new_zeros(len(grown))
        if args.grow_init == "normal":
            noise_of_grown = torch.randn(len(grown), generator=generator).to(values.device)
            initial = math.sqrt(2 / layer.shape[1]) * noise_of_grown
        topology.move(name, dropped, grown, initial)
    return args.topology == "magnitude" and topology.finished()


def update(
    agent: Agent, batch: Batch, noise, next_noise, gamma: float, tau: float
) -> dict[str, torch.Tensor]:
    """One gradient update of everything; noise (batch, action_dim) is standard normal."""
    # Actor, against the critic of the last update, whose weights need no gradient here
    agent.critic.requires_grad_(False)
    alpha = agent.alpha().detach()
    loss_actor, entropy = actor_loss(agent.actor, agent.critic, alpha, batch.obs, noise)
    agent.actor_optimizer.zero_grad()
    loss_actor.backward()
    agent.actor_optimizer.step()
    agent.critic.requires_grad_(True)

    # Temperature, towards an entropy of -|A|/2
    target_entropy = -0.5 * noise.shape[1]
    loss_temperature = agent.alpha() * (entropy - target_entropy)
    agent.temperature_optimizer.zero_grad()
    loss_temperature.backward()
    agent.temperature_optimizer.step()

    # Critic, with the new actor and the new temperature, as in the official code
    alpha = agent.alpha().detach()
    target = td_target(agent.actor, agent.target_critic, alpha, batch, gamma, next_noise)
    loss_critic = critic_loss(agent.critic, batch, target)
    agent.critic_optimizer.zero_grad()
    loss_critic.backward()
    agent.critic_optimizer.step()

    # Target critic, slowly behind the critic
    with torch.no_grad():
        slow = list(agent.target_critic.parameters())
        fast = list(agent.critic.parameters())
        torch._foreach_lerp_(slow, fast, tau)

    return {
        "actor_loss": loss_actor.detach(),
        "critic_loss": loss_critic.detach(),
        "td_target": target.mean(),
        "alpha": alpha,
        "entropy": entropy,
    }


@torch.no_grad()
def choose_action(agent: Agent, obs: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """Actions (batch, action_dim) for normalised obs: sampled with noise, or the policy's mode."""
    if noise is None:
        mean, _ = agent.actor(obs)
        return torch.tanh(mean)
    action, _ = agent.actor.sample(obs, noise)
    return action


def act(agent: Agent, norm: ObservationNorm, obs: np.ndarray, noise=None) -> np.ndarray:
    """Action (action_dim,) for a raw observation: sampled with `noise`, or the policy's mode."""
    obs = norm(torch.as_tensor(obs, dtype=torch.float32)[None])  # (1, obs_dim)
    noise = None if noise is None else noise.to(obs.device)
    return choose_action(agent, obs, noise)[0].cpu().numpy()


def update_all(
    agent: Agent, replay: ReplayBuffer, sent: SimpleNamespace, gamma: float, tau: float
) -> dict[str, torch.Tensor]:
    """All updates of a decision, from what was sent to the device; the losses of the last one."""
    replay.write(sent.transition, sent.place)
    mean, std = sent.mean_and_std
    for index, (noise, next_noise) in zip(sent.index, sent.update_noises):
        batch = replay.batch(index, mean, std)
        losses = update(agent, batch, noise, next_noise, gamma, tau)
    return losses


class Learner:
    """Acts and learns in training: a decision sends one row to the device, and reads one action.

    The row holds the observation and its noise, and all that the updates of this decision need: the
    newest transition, its place in replay, statistics, the replay indices of each batch, and noise.
    With --overlap the updates are started as soon as the action is read, and on a GPU they run
    while the environment steps.

    `row.host` is filled on the CPU, and `row.sent` is what the device sees after `row.send()`; on a
    CPU they share memory. All that is random is drawn on the CPU: the same numbers on every
    device.
    """

    def __init__(
        self,
        agent: Agent,
        norm: ObservationNorm,
        replay: ReplayBuffer,
        args: Args,
        gamma: float,
        noise_std: float,
        device: torch.device,
    ):
        self.norm = norm
        self.replay = replay
        self.noise_std = noise_std
        obs_dim, action_dim, *_ = replay.sizes
        self.row = DeviceRow(
            device,
            mean_and_std=(2, obs_dim),
            obs=(1, obs_dim),
            action_noise=(1, action_dim),
            transition=(1, sum(replay.sizes)),
            update_noises=(args.updates_per_step, 2, args.batch_size, action_dim),
            place=(1,),
            index=(args.updates_per_step, args.batch_size),
            integers=["place", "index"],
        )
        set_capturable(agent, device)

        sent = self.row.sent
        choose = partial(choose_action, agent, sent.obs, sent.action_noise)
        updates = partial(update_all, agent, replay, sent, gamma, args.tau)
        self.choose = GraphedFunction(choose, device, args.cuda_graph)
        self.update_all = GraphedFunction(updates, device, args.cuda_graph)
        self.losses = {}

    def act(self, obs: np.ndarray, then_learn: bool) -> np.ndarray:
        """Action (action_dim,) for a raw observation; a GPU may still be updating afterwards."""
        host = self.row.host
        mean, std = self.norm.mean_and_std()
        host.obs[0] = (torch.as_tensor(obs, dtype=torch.float32) - mean) / std
        host.action_noise[0] = self.noise_std * torch.randn(host.action_noise.shape[1])
        if then_learn:
            self.draw_updates()
        self.row.send()
        action = self.choose()[0].cpu().numpy()
        if then_learn:
            self.losses = self.update_all()
        return action

    def learn(self) -> None:
        self.draw_updates()
        self.row.send()
        self.losses = self.update_all()

    def draw_updates(self) -> None:
        """Fills in what updates need: statistics, the newest transition, replay indices, noise."""
        host = self.row.host
        host.mean_and_std[:] = self.norm.mean_and_std()
        host.transition[:], host.place[0] = self.replay.hand_over()
        for index, noises in zip(host.index, host.update_noises):
            index[:] = torch.randint(self.replay.filled(), index.shape)
            noises[:] = self.noise_std * torch.randn(noises.shape)


def last_batch(learner: Learner) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """The batch of a decision's last update, and its two noises: still where they were sent."""
    sent = learner.row.sent
    return learner.replay.batch(sent.index[-1], *sent.mean_and_std), *sent.update_noises[-1]


def evaluate(
    agent: Agent,
    norm: ObservationNorm,
    env: gym.Env,
    episodes: int,
    seed_key: tuple,
    video: Path | None = None,
) -> dict[str, float]:
    """Returns of the deterministic policy, mean, std and interquartile mean.

    seed_key: what the episodes' seeds are derived from
    video: where to put a film of the first episode, one frame a decision
    """
    returns = np.zeros(episodes)
    frames = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=derive_seed(*seed_key, episode))
        done = False
        while not done:
            if video and episode == 0 and len(frames) < LONGEST_FILM:
                frames.append(env.render())
            obs, reward, terminated, truncated, _ = env.step(act(agent, norm, obs))
            returns[episode] += reward
            done = terminated or truncated
    if video:
        write_video(video, frames)
    return summary(returns)


def diagnose(agent: Agent, batch: Batch, noise, next_noise, gamma: float) -> dict[str, float]:
    """Plasticity measurements of actor and critic on a batch (section 4 of the paper)."""
    alpha = agent.alpha().detach()
    target = td_target(agent.actor, agent.target_critic, alpha, batch, gamma, next_noise)
    loss_actor, _ = actor_loss(agent.actor, agent.critic, alpha, batch.obs, noise)
    loss_critic = critic_loss(agent.critic, batch, target)
    obs_action = torch.cat([batch.obs, batch.action], -1)
    measured = {}
    for name, loss, encoder, inputs in (
        ("actor", loss_actor, agent.actor.encoder, batch.obs),
        ("critic", loss_critic, agent.critic.encoders[0], obs_action),
    ):
        parameters = list(getattr(agent, name).parameters())
        gradients = torch.autograd.grad(loss, parameters)
        plasticity = measure_plasticity(encoder, inputs, parameters, gradients)
        measured |= {f"{name}_{metric}": value for metric, value in plasticity.items()}
    return measured | agent.topology.measure()


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """Flat observations, actions in [-1, 1], each repeated; counts returns and lengths."""
    env = open_env(args, render_mode)
    env = gym.wrappers.RescaleAction(env, -1.0, 1.0)
    env = gym.wrappers.RepeatAction(env, args.action_repeat)  # rewards summed
    return gym.wrappers.RecordEpisodeStatistics(env)


def default_gamma(env: gym.Env, action_repeat: int) -> float:
    """TD-MPC2's heuristic: (T/5 - 1) / (T/5) within [0.95, 0.995] for T decisions an episode."""
    gamma = 1 - 5 * action_repeat / episode_limit(env)
    return min(max(gamma, 0.95), 0.995)


def load_policy(run_dir: str | Path, render_mode: str | None = None) -> tuple[Callable, gym.Env]:
    """The policy of a trained run without noise, obs -> action, and its environment."""
    run = open_run(run_dir, render_mode)
    env = make_env(run.args, render_mode)
    (obs_dim,) = env.observation_space.shape
    (action_dim,) = env.action_space.shape
    device = torch.device("cpu")
    agent = Agent(run.args, obs_dim, action_dim, device)
    norm = ObservationNorm(obs_dim, device)
    run.load({"topology": agent.topology, "actor": agent.actor, "norm": norm})
    return partial(act, agent, norm), env


def train(args: Args) -> None:
    """A whole run: trains, evaluates, measures and saves, or goes on where it was stopped."""
    set_up_process(args)  # checks the flags, seeds all generators
    device = choose_device(args)
    env = make_env(args)
    eval_env = make_env(args, "rgb_array" if args.capture_video else None)
    (obs_dim,) = env.observation_space.shape
    (action_dim,) = env.action_space.shape
    gamma = default_gamma(env, args.action_repeat) if args.gamma is None else args.gamma
    total_steps = math.ceil(args.total_timesteps / args.action_repeat)  # in decisions
    # In decisions; one at least, so that replay holds a transition before the first update
    learning_starts = max(math.ceil(args.learning_starts / args.action_repeat), 1)

    try:
        agent = Agent(args, obs_dim, action_dim, device)
    except NetworkError as error:
        fail(str(error))
    norm = ObservationNorm(obs_dim, device)
    capacity = min(args.buffer_size, total_steps)
    replay = ReplayBuffer(capacity, obs_dim, action_dim, device)
    run = Run(args, args.action_repeat)

    def parts() -> dict:
        """What a checkpoint holds, in this order; a reset replaces the agent."""
        return {
            "topology": agent.topology,
            "actor": agent.actor,
            "critic": agent.critic,
            "target_critic": agent.target_critic,
            "temperature": agent.temperature,
            "actor_optimizer": agent.actor_optimizer,
            "critic_optimizer": agent.critic_optimizer,
            "temperature_optimizer": agent.temperature_optimizer,
            "norm": norm,
            "replay": replay,
        }

    def evaluation(episodes: int, purpose: int, video: Path | None = None) -> dict[str, float]:
        eval_env.set_wrapper_attr("env_step", run.env_step)  # for error messages
        seed_key = (args.seed, purpose, run.agent_step)
        return evaluate(agent, norm, eval_env, episodes, seed_key, video)

    run.restore(parts())
    if args.eval_only:
        run.print_result(evaluation(args.final_eval_episodes, FINAL, run.video()))
        return

    def layer_tables() -> dict[str, list[dict]]:
        return {"actor": layer_table(agent.actor), "critic": layer_table(agent.critic)}

    run.begin(layer_tables())
    env.set_wrapper_attr("env_step", run.env_step)  # for error messages
    learner = Learner(agent, norm, replay, args, gamma, noise_std=1.0, device=device)
    episode_over = True
    if run.agent_step == 0:
        run.log("eval", evaluation(args.eval_episodes, EVAL))

    while run.agent_step < total_steps:
        if episode_over:
            if run.checkpoint_due():
                run.save(parts())
            obs, _ = env.reset(seed=derive_seed(args.seed, TRAIN, run.episode))
            run.episode += 1

        # Reset; at the top of the loop, so that the end of training keeps the trained agent
        if run.due(args.reset_interval) and run.agent_step >= learning_starts:
            agent = Agent(args, obs_dim, action_dim, device)
            learner = Learner(agent, norm, replay, args, gamma, noise_std=1.0, device=device)

        # Act: at random at first, then by the policy
        norm.update(obs)
        if run.agent_step < learning_starts:
            action = (2 * torch.rand(action_dim) - 1).numpy()
        else:
            action = learner.act(obs, then_learn=args.overlap)
            if args.overlap:
                run.update_step += args.updates_per_step
        next_obs, reward, terminated, truncated, info = env.step(action)
        replay.add(obs, action, reward, next_obs, terminated)  # a time limit is no termination
        obs = next_obs
        episode_over = terminated or truncated
        run.count_decision()

        # Learn, if not begun before the step
        if not args.overlap and run.agent_step >= learning_starts:
            learner.learn()
            run.update_step += args.updates_per_step

        # Change the topology, after every --topology-interval updates, on the batch of the last one
        due = run.update_step % args.topology_interval < args.updates_per_step
        if args.topology != "static" and due and learner.losses:  # none yet in the warm-up
            progress = run.agent_step / total_steps
            seed = derive_seed(args.seed, TOPOLOGY, run.update_step)
            sizes = agent.topology.sizes()
            if change_topology(agent, args, progress, seed, *last_batch(learner), gamma):
                print(f"pruning ended at env step {run.env_step}")
                for network, rows in layer_tables().items():
                    print_layer_table(network, rows)
                write_args(run.folder, args, layer_tables())
            if agent.topology.sizes() != sizes:  # vectors are elsewhere in memory: capture anew
                learner.choose.graph = None
                learner.update_all.graph = None

        # Measure
        if episode_over or run.due(args.eval_interval) or run.due(args.diagnostics_interval):
            weights = [*agent.actor.parameters(), *agent.critic.parameters()]
            stop_unless_finite(run.agent_step, *learner.losses.values(), get_total_norm(weights))
        if run.due(args.eval_interval):
            run.log_evaluation(evaluation(args.eval_episodes, EVAL))
        if run.due(args.diagnostics_interval):
            # A generator of its own: measuring leaves training untouched
            seed = derive_seed(args.seed, DIAGNOSE, run.agent_step)
            generator = torch.Generator().manual_seed(seed)
            batch = replay.sample(args.batch_size, norm, generator)
            noises = torch.randn(2, args.batch_size, action_dim, generator=generator).to(device)
            run.log("diagnostics", diagnose(agent, batch, *noises, gamma))

        if episode_over:
            run.log_episode(info["episode"], learner.losses)

    if args.topology == "magnitude":
        write_args(run.folder, args, layer_tables())  # as they are after the last reset, too
        if not agent.topology.finished():
            print("warning: pruning has not ended; lower --topology-interval, or reset earlier")
    run.save(parts())  # a kill in the last evaluation costs no training
    run.finish(parts(), evaluation(args.final_eval_episodes, FINAL, run.video()))


# Flags that change results by rounding at most: a run may go on with others.
# All other flags are in the name of the run's folder, as a hash.
EXECUTION_FLAGS = {
    "device",
    "threads",
    "matmul_precision",
    "cuda_graph",
    "runs_dir",
    "resume",
    "eval_only",
    "run_dir",
    "capture_video",
    "sparse_kernel",
    "track",
    "wandb_project",
    "wandb_entity",
    "checkpoint_interval",
}

# The changes of the topology depend on --total-timesteps: more is another run.
LONGER_GOES_ON = False


# Where the topology is kept: the places of every sparse layer, and what moves with them


class Topology(nn.Module):
    """The sparse layers of actor and critic: which places are active, and which have ever been.

    A part of the checkpoint that comes before the networks, since it gives their layers the places
    of the saved values. A module, so that --init-from takes it as well. Static: empty.
    """

    def __init__(self, args: Args, agent: Agent, final_counts: list[int]):
        super().__init__()
        self.static = args.topology == "static"
        self.auto = args.sparse_kernel == "auto"
        self.layers = {}  # name -> the layer, and its copy in the target critic
        for name in ("actor", "critic"):
            for path, layer in getattr(agent, name).named_modules():
                if isinstance(layer, SparseLinear):
                    copies = [agent.target_critic.get_submodule(path)] if name == "critic" else []
                    self.layers[f"{name}.{path}"] = [layer, *copies]
        self.final_counts = dict(zip(self.layers, final_counts))
        self.optimizers = {"actor": agent.actor_optimizer, "critic": agent.critic_optimizer}
        self.dropped = {"actor": 0, "critic": 0}
        # One bit a place
        self.first = {} if self.static else {name: self.active_bits(name) for name in self.layers}
        self.ever = {name: bits.copy() for name, bits in self.first.items()}

    def layers_of(self, network: str) -> list[nn.Module]:
        """The sparse layers of actor or critic."""
        return [layers[0] for name, layers in self.layers.items() if name.startswith(network)]

    def sizes(self) -> list[int]:
        """How many weights each sparse layer has."""
        return [len(layers[0].active) for layers in self.layers.values()]

    def active_mask(self, name: str) -> torch.Tensor:
        """Whether each place of a layer's flattened weight is active (out * in,)."""
        layer = self.layers[name][0]
        mask = torch.zeros(math.prod(layer.shape), dtype=torch.bool, device=layer.active.device)
        mask[layer.active.long()] = True
        return mask

    def active_bits(self, name: str) -> np.ndarray:
        """active_mask, eight places a byte."""
        return np.packbits(self.active_mask(name).cpu().numpy())

    @torch.no_grad()
    def set_places(self, name: str, places: torch.Tensor) -> None:
        """Gives a layer other places, in the order of sort_into_blocks; values are not moved."""
        layers = self.layers[name]
        layer = layers[0]
        overwrite(layer.active, places.int())  # which the target's copy shares, as well as index

        # As in sparsify: packed on a CPU as soon as few places are active
        few = len(places) <= PACKED_DENSITY * math.prod(layer.shape)
        cheaper = places.device.type == "cpu" and few
        possible = layer.bias is not None
        if layer.kernel == "dense" and self.auto and cheaper and possible:
            for each in layers:
                del each.index
                each.kernel = "packed"
                each.kept = None
        if layer.kernel == "dense":
            overwrite(layer.index, places)
            for each in layers:
                if each.kept and each.kept.memory is not None:
                    each.kept.memory.zero_()
                    each.kept.version = None  # the values are written anew, where they are now
            return
        row = places // layer.shape[1]
        col = places % layer.shape[1]
        product = PackedProduct(row, col, layer.shape)
        for each in layers:
            each.product = product

    @torch.no_grad()
    def move(self, name: str, dropped: torch.Tensor, grown: torch.Tensor, values) -> None:
        """Drops weights of a layer (indices into its values), and grows places with some values.

        Values, both moments of AdamW and the target's values move together. What grows has zero
        moments, and in the target the same value.
        """
        layers = self.layers[name]
        layer = layers[0]
        network = name.partition(".")[0]
        kept = torch.ones(len(layer.active), dtype=torch.bool, device=layer.active.device)
        kept[dropped] = False
        places = torch.cat([layer.active[kept].long(), grown])
        order, _ = sort_into_blocks(places // layer.shape[1], places % layer.shape[1], layer.shape)

        def reorder(vector: torch.Tensor, new: torch.Tensor) -> None:
            overwrite(vector, torch.cat([vector[kept], new])[order])

        moments = self.optimizers[network].state[layer.values]  # empty before the first update
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in moments:
                reorder(moments[moment], torch.zeros_like(values))
        for each in layers:
            each.values.grad = None
            reorder(each.values, values)
        self.set_places(name, places[order])
        self.dropped[network] += len(dropped)
        self.ever[name] |= self.active_bits(name)

    def finished(self) -> bool:
        """Whether every layer has as many weights as at the end of pruning."""
        return all(
            len(self.layers[name][0].active) == count for name, count in self.final_counts.items()
        )

    def measure(self) -> dict[str, float]:
        """Metrics of actor and critic, over their sparse layers. Static: none."""
        measured = {}
        if self.static:
            return measured
        for network in ("actor", "critic"):
            names = [name for name in self.layers if name.startswith(network)]
            counts = dict.fromkeys(["active", "total", "ever", "first", "overlap"], 0)
            for name in names:
                now = self.active_bits(name)
                counts["active"] += len(self.layers[name][0].active)
                counts["total"] += math.prod(self.layers[name][0].shape)
                counts["ever"] += int(np.bitwise_count(self.ever[name]).sum())
                counts["first"] += int(np.bitwise_count(self.first[name]).sum())
                counts["overlap"] += int(np.bitwise_count(self.first[name] & now).sum())
            if names:
                measured |= {
                    f"{network}_active_weights": counts["active"],
                    f"{network}_weights_dropped": self.dropped[network],
                    f"{network}_ever_active": counts["ever"] / counts["total"],
                    f"{network}_first_overlap": counts["overlap"] / counts["first"],
                }
        return measured

    def state_dict(self) -> dict:
        if self.static:
            return {}
        return {
            "active": {name: layers[0].active for name, layers in self.layers.items()},
            "first": {name: torch.from_numpy(bits) for name, bits in self.first.items()},
            "ever": {name: torch.from_numpy(bits) for name, bits in self.ever.items()},
            "dropped": dict(self.dropped),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Raises NetworkError if the masks cannot be those of a run with these flags."""
        for name, bits in state.get("first", {}).items():
            if not np.array_equal(bits.numpy(), self.first.get(name)):
                raise NetworkError(
                    "the saved first mask is not the one drawn here: another --topology or "
                    "--mask-seed (default: --seed), or another version of PyTorch or of this file?"
                )
        for name, active in state.get("active", {}).items():
            if len(active) < self.final_counts[name]:
                raise NetworkError(f"{name} has fewer weights left than --sparsity leaves here")
            layers = self.layers[name]
            for layer in layers:
                overwrite(layer.values, layer.values.new_zeros(len(active)))
            self.set_places(name, active.long().to(layers[0].active.device))
            self.ever[name] = state["ever"][name].numpy().copy()
        self.dropped |= state.get("dropped", {})


def overwrite(tensor: torch.Tensor, new: torch.Tensor) -> None:
    """Gives a tensor other contents, of another length too; in its own memory where that fits."""
    if tensor.shape == new.shape:
        tensor.copy_(new)
    else:
        tensor.data = new


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


# === ENVIRONMENT (identical in every file that has it) ===
def open_env(args, render_mode: str | None = None) -> gym.Env:
    """The environment of --env-id behind a Gate: flat observations, a bounded Box of actions."""
    # MuJoCo looks for a renderer as soon as it is loaded, and only films need one
    renderer = "egl" if sys.platform == "linux" else "glfw"
    os.environ.setdefault("MUJOCO_GL", renderer if args.capture_video else "disabled")
    sys.path.append(os.getcwd())  # for an environment of your own, --env-id module:MyEnv-v0
    filming = {"render_mode": render_mode} if render_mode else {}
    where = ""
    try:
        if args.env_id.startswith("dm_control/"):
            import shimmy

            gym.register_envs(shimmy)
        env = gym.make(
            args.env_id,
            max_episode_steps=args.max_episode_steps,
            disable_env_checker=True,
            **read_env_kwargs(args),
            **filming,
        )
        if filming:  # what cannot be filmed fails now, not after training
            where = "to film it: "
            env.reset(seed=0)
            frame = env.render()
        space = env.observation_space
        check_action_space(args, env.action_space)
    except (gym.error.Error, ModuleNotFoundError) as error:
        fail(f"--env-id {args.env_id}: {error}")
    except SystemExit as end:
        fail_where_it_ended(args, where, end)
    except Exception as error:
        fail_in_environment(args, where, error)
    if filming and not (isinstance(frame, np.ndarray) and frame.ndim == 3):
        fail(f"--capture-video: --env-id {args.env_id} renders no picture (height, width, 3)")
    parts = space.values() if isinstance(space, gym.spaces.Dict) else [space]
    for part in parts:
        if not isinstance(part, gym.spaces.Box):
            fail(
                f"--env-id {args.env_id} has observations {part}; "
                "this agent needs Box or a Dict of Box"
            )
    if not sum(math.prod(part.shape) for part in parts):
        fail(f"--env-id {args.env_id} has observations {space}, of no numbers at all")
    longest = max(Gate.LONGEST, env.spec.max_episode_steps or 0)
    return gym.wrappers.FlattenObservation(Gate(env, args, longest=longest))


def episode_limit(env: gym.Env) -> float:
    """Env steps until an episode is cut off; infinity where there is no limit."""
    limit = env.spec.max_episode_steps or math.inf
    # Tasks of dm_control but lqr end by themselves, which Gymnasium does not know
    ends_itself = env.spec.id.startswith("dm_control/") and "/lqr-" not in env.spec.id
    return min(limit, 1000) if ends_itself else limit


# === END ENVIRONMENT ===


# === CONTINUOUS ACTIONS (identical in every file that has it) ===
def check_action_space(args, space: gym.Space) -> None:
    """Ends the program unless actions are a bounded vector of real numbers."""
    vector = isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and space.is_bounded()
    real = vector and np.issubdtype(space.dtype, np.floating)
    if not real or not space.shape[0] or (space.low >= space.high).any():
        fail(
            f"--env-id {args.env_id} has actions {space}; "
            "this agent needs a bounded Box of one dimension, of real numbers (at least one), "
            "each low below high"
        )


# === END CONTINUOUS ACTIONS ===


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


# === DEVICE PROGRAM (identical in every file that has it) ===
class DeviceRow:
    """Tensors that go to the device in one copy: fill those of `host`, send(), use those of `sent`.

    DeviceRow(device, obs=(1, 17), index=(2, 256), integers=["index"]): float32, or int32 where
    named. A GPU copies the row from pinned memory while Python goes on. On a CPU, host and sent are
    the same memory.
    """

    def __init__(self, device: torch.device, integers: list[str], **shapes: tuple[int, ...]):
        sizes = [math.prod(shape) for shape in shapes.values()]
        on_cuda = device.type == "cuda"
        self.host_row = torch.zeros(sum(sizes), pin_memory=on_cuda)
        self.sent_row = self.host_row.to(device)
        self.left = torch.cuda.Event() if on_cuda else None

        def parts(row: torch.Tensor) -> SimpleNamespace:
            named = dict(zip(shapes, row.split(sizes)))
            named |= {name: named[name].view(torch.int32) for name in integers}
            return SimpleNamespace(**{name: named[name].view(shapes[name]) for name in shapes})

        self.host_parts = parts(self.host_row)
        self.sent = parts(self.sent_row)

    @property
    def host(self) -> SimpleNamespace:
        """What to fill; waits until what was sent before has left."""
        if self.left:
            self.left.synchronize()
        return self.host_parts

    def send(self) -> None:
        if self.sent_row is not self.host_row:
            self.sent_row.copy_(self.host_row, non_blocking=True)
        if self.left:
            self.left.record()


def set_capturable(agent, device: torch.device) -> None:
    """Keeps the optimisers' step counts on a GPU, where a CUDA graph needs them.

    Call it after loading: a checkpoint brings back the setting of the device it was made on.
    """
    for part in vars(agent).values():
        if isinstance(part, torch.optim.Optimizer):
            for group in part.param_groups:
                group["capturable"] = device.type == "cuda"


class GraphedFunction:
    """Calls a function; on CUDA, from the fourth call on, as one CUDA graph.

    A graph repeats the kernels of the call that was captured, on the same memory: the function
    must read and write tensors that stay where they are. Nothing in it may wait for the GPU.
    """

    WARM_UP = 3  # calls as usual, since what is made once (moments, handles) must be there before

    def __init__(self, function: Callable, device: torch.device, enabled: bool):
        self.function = function
        self.enabled = enabled and device.type == "cuda"
        self.calls = 0
        self.graph = None
        # One stream for the first calls and the capture, so that both use the same workspaces of
        # cuBLAS. No other graph may use it: newer PyTorch frees them with the graph of their stream
        self.stream = torch.cuda.Stream() if self.enabled else None

    def __call__(self):
        if not self.enabled:
            return self.function()
        self.calls += 1
        if self.calls <= self.WARM_UP:
            return self.call_on_a_stream_of_its_own()
        if self.graph is None:
            self.capture()
        self.graph.replay()
        DenseCopy.generation += 1  # of what a replay has changed, PyTorch's versions say nothing
        return self.outputs

    def call_on_a_stream_of_its_own(self):
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self.function()
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def capture(self) -> None:
        """Records the function's kernels; computes nothing."""
        DenseCopy.generation += 1  # the graph writes the dense weights that it reads
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.outputs = self.function()
        except RuntimeError as error:
            torch.cuda.set_stream(torch.cuda.default_stream())  # which the capture did not
            cause = error.__context__ or error  # after a failure the end of the capture fails too
            if not isinstance(cause, RuntimeError) or isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            reason = str(cause).partition("\n")[0]
            fail(f"the CUDA graph cannot be captured ({reason}); --no-cuda-graph does without")


# === END DEVICE PROGRAM ===


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
