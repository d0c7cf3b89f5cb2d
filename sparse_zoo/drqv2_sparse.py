# docs: docs/drqv2_sparse.md
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "numba==0.68.1", "scipy==1.17.1", "tyro==1.0.17",
#     "gymnasium==1.4.0", "shimmy==2.0.1", "dm-control==1.0.50", "mujoco==3.17.0",
#     "filelock==4.2.11", "matplotlib==3.11.2", "pandas==3.1.1", "tqdm==4.70.1",
#     "imageio==2.38.1", "imageio-ffmpeg==0.8.1", "tensorboard==2.21.0", "wandb==0.31.0",
# ]
# ///
"""DrQ-v2 with static sparsity: continuous control from pixels with a scaled critic.

Before training, a random set of the critic's weights is removed once; the survivors are trained as
usual. DrQ-v2 is DDPG from images: a convolutional encoder that learns from the critic alone, random
shifts of the images, n-step returns, and exploration noise that shrinks over training. Only the
critic grows with --width-scale; actor and encoder keep their size.

Papers: Network Sparsity Unlocks the Scaling Potential of Deep RL (Ma, Li et al., ICML 2025);
Mastering Visual Continuous Control: Improved Data-Augmented Reinforcement Learning (Yarats et al.,
2021), arXiv:2107.09645.

Differences from the code of Yarats et al., https://github.com/facebookresearch/drqv2 (for the
visual experiments of Ma, Li et al. there is no published code):
 1. A pruned weight is not stored: values, gradients, Adam moments and the target network are
    vectors over the active weights, elementwise equal to training a masked dense network.
 2. Random shifts copy whole pixels; there, bilinear sampling at whole pixels, equal within
    rounding.
 3. All stored transitions are equally likely, those of the running episode at once; there, first a
    finished episode is drawn and then a transition in it, from what each of four workers has
    loaded. Table 4's replay of 1,000,000 is the default; there, 100,000 on quadruped-run.
 4. A terminated episode is not bootstrapped from; there, it is (no task of the paper terminates).
 5. The training environment is seeded anew at every reset from (seed, episode), so that a resumed
    run repeats the uninterrupted one in any environment whose seed decides everything; there, one
    generator runs on.
 6. Evaluations draw their initial states from (seed, decision), so that they leave training
    untouched.
 7. The encoder's features are ordered by pixel, then channel; there, the other way round. The
    layers that read them are fully connected.

In this file: flags, networks, replay, losses, agent, update; then `train`, the whole of training;
then pictures from an environment and random shifts; then an appendix that this file shares with the
others: sparse layers, diagnostics, runs.
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
    exp_name: str = "drqv2_sparse"
    """part of the run's name"""
    seed: Annotated[int, "0 <= x < 2**32"] = 1
    """seed of networks, exploration, replay and environments (below 2^32)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto takes CUDA when there is one"""
    threads: Annotated[int | None, "1 <= x <= 10**4"] = None
    """CPU threads (default: all cores); a resumed run is bit-equal only with the same number"""
    matmul_precision: Literal["high", "highest"] = "high"
    """matrix products and convolutions on CUDA: high takes TF32 (10 bits of precision), highest
    float32 (23 bits)"""
    bf16: bool = False
    """convolutions of updates in bfloat16: faster, less exact"""
    runs_dir: str = "runs"
    """folder that holds one folder per run, replay included"""
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
    env_id: str = "dm_control/quadruped-run-v0"
    """a dm_control/* id, or any Gymnasium MuJoCo id, with Box actions;
    observed through its camera"""
    camera: Annotated[int | None, "0 <= x <= 10**6"] = None
    """number of the camera
    (default: dm_control 2 for quadruped, else 0; Gymnasium: the task's own)"""
    action_repeat: Annotated[int, "1 <= x <= 10**6"] = 2
    """simulator frames per decision, rewards summed"""
    total_timesteps: Annotated[int, "x >= 1"] = 2_000_000
    """env steps of training (simulator frames, action repeat included)"""
    max_episode_steps: Annotated[int | None, "x >= 1"] = None
    """env steps after which an episode is cut off (default: the environment's own limit)"""
    env_kwargs: str | None = None
    """arguments of the environment as JSON, such as '{"reset_noise_scale": 0.2}'"""

    # Algorithm (Table 4 of the paper; what it leaves open is the original's)
    learning_starts: Annotated[int, "x >= 0"] = 4_000
    """env steps of uniformly random actions before the first update"""
    decisions_per_update: Annotated[int, "x >= 1"] = 2
    """one gradient update every so many decisions"""
    batch_size: Annotated[int, "1 <= x <= 10**6"] = 256
    """transitions per update"""
    buffer_size: Annotated[int, "x > n_step"] = 1_000_000
    """largest number of frames kept for replay, in a file of about 21 kB a frame"""
    n_step: Annotated[int, "1 <= x <= 10**6"] = 3
    """rewards in a return before it bootstraps"""
    gamma: Annotated[float, "0 <= x <= 1"] = 0.99
    """discount"""
    tau: Annotated[float, "0 <= x <= 1"] = 0.01
    """target <- tau * critic + (1 - tau) * target after every update"""
    learning_rate: Annotated[float, "0 < x < inf"] = 1e-4
    """learning rate of encoder, actor and critic (Adam)"""
    feature_dim: Annotated[int, "1 <= x <= 10**6"] = 50
    """outputs of the trunks between encoder and heads"""
    std_start: Annotated[float, "0 <= x < inf"] = 1.0
    """std of the exploration noise at the start"""
    std_end: Annotated[float, "0 <= x < inf"] = 0.1
    """std of the exploration noise from env step --std-decay on"""
    std_decay: Annotated[int, "x >= 1"] = 1_000_000
    """env steps from --std-start to --std-end (Table 4: 500,000 decisions; in the original, easy
    tasks have 200,000 env steps and hard ones 4,000,000)"""
    noise_clip: Annotated[float, "0 <= x < inf"] = 0.3
    """largest noise in the actor loss and in the TD target"""

    # Size and sparsity
    width_scale: Annotated[float, "1/1024 <= x <= 1000"] = 1.0
    """hidden units of the critic's heads: 1024 x scale"""
    depth_scale: Annotated[int, "1 <= x <= 1000"] = 1
    """hidden layers of the critic's heads: 1 + scale"""
    sparsity: Annotated[float, "0 <= x < 1"] = 0.0
    """fraction of parameters removed from the critic (trunk and both heads);
    0: the dense baseline"""
    sparsify_encoder: bool = False
    """prune the encoder as well, at the same sparsity"""
    sparsity_distribution: Literal["erdos_renyi", "uniform"] = "erdos_renyi"
    """how a network's sparsity is spread over its layers"""
    mask_seed: Annotated[int | None, "0 <= x < 2**32"] = None
    """seed of the random pruning (default: --seed)"""
    sparse_kernel: Literal["auto", "packed", "dense"] = "auto"
    """how sparse layers multiply (auto: packed on CPU up to density 0.25, else dense);
    a resumed run is bit-equal only with the same kernel"""

    # Logging
    eval_interval: Annotated[int, "x >= 1"] = 10_000
    """env steps between evaluations, the first at step 0"""
    eval_episodes: Annotated[int, "1 <= x <= 10**6"] = 10
    """episodes of each evaluation (deterministic policy)"""
    final_eval_episodes: Annotated[int, "1 <= x <= 10**6"] = 10
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


SIZE = 84  # pixels of a side
STACK = 3  # frames in an observation
PAD = 4  # largest random shift, in pixels


def orthogonal(layer: nn.Module, gain: float = 1.0) -> nn.Module:
    """Orthogonal weights, biases zero."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Encoder(nn.Module):
    """Four convolutions, for images of SIZE x SIZE."""

    out_features = 32 * 35 * 35  # 84 -> 41 -> 39 -> 37 -> 35 pixels of a side

    def __init__(self):
        super().__init__()
        gain = nn.init.calculate_gain("relu")
        layers = []
        for channels, stride in ((3 * STACK, 2), (32, 1), (32, 1), (32, 1)):
            conv = nn.Conv2d(channels, 32, kernel_size=3, stride=stride)
            layers += [orthogonal(conv, gain), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)

    def forward(self, obs: torch.Tensor, bf16: bool = False) -> torch.Tensor:
        """Stacks of uint8 (batch, SIZE, SIZE, 3 STACK) -> (batch, out_features), float32"""
        at_once = 32 if obs.device.type == "cpu" else len(obs)  # activations fit a CPU's cache
        features = []
        for part in obs.split(at_once):
            # Permuted views: in memory, channels are last before, between and after the layers
            images = part.permute(0, 3, 1, 2).float().div_(255).sub_(0.5)  # (part, 9, 84, 84)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
                maps = self.layers(images)  # (part, 32, 35, 35)
            features.append(maps.permute(0, 2, 3, 1).float().flatten(1))
        return torch.cat(features)


def trunk(feature_dim: int) -> nn.Sequential:
    """Stands between encoder and head: (batch, Encoder.out_features) -> (batch, feature_dim)"""
    linear = orthogonal(nn.Linear(Encoder.out_features, feature_dim))
    return nn.Sequential(linear, nn.LayerNorm(feature_dim), nn.Tanh())


def mlp(inputs: int, hidden: int, layers: int) -> nn.Sequential:
    """ReLU layers: (batch, inputs) -> (batch, hidden)"""
    modules = []
    for layer in range(layers):
        linear = nn.Linear(hidden if layer else inputs, hidden)
        modules += [orthogonal(linear), nn.ReLU()]
    return nn.Sequential(*modules)


class Actor(nn.Module):
    """Mean of the policy; its std is scheduled."""

    def __init__(self, action_dim: int, feature_dim: int):
        super().__init__()
        self.trunk = trunk(feature_dim)
        self.body = mlp(feature_dim, hidden=1024, layers=2)
        self.head = orthogonal(nn.Linear(1024, action_dim))

    def forward(self, features, noise=0.0):
        """(batch, Encoder.out_features), noise (batch, action_dim) -> actions in (-1, 1)"""
        mean = torch.tanh(self.head(self.body(self.trunk(features))))  # (batch, action_dim)
        action = mean + noise
        inside = action.clamp(-1 + 1e-6, 1 - 1e-6)
        # Straight-through: the values of `inside` with the gradient of `action`
        return inside.detach() + (action - action.detach())


class Critic(nn.Module):
    """Two Q-functions on one trunk."""

    def __init__(self, action_dim: int, feature_dim: int, hidden: int, layers: int):
        super().__init__()
        inputs = feature_dim + action_dim
        self.trunk = trunk(feature_dim)
        self.bodies = nn.ModuleList(mlp(inputs, hidden, layers) for _ in range(2))
        self.heads = nn.ModuleList(orthogonal(nn.Linear(hidden, 1)) for _ in range(2))

    def forward(self, features, action):
        """(batch, Encoder.out_features), (batch, action_dim) -> Q-values (2, batch)"""
        x = torch.cat([self.trunk(features), action], -1)
        values = [head(body(x)) for body, head in zip(self.bodies, self.heads)]
        return torch.stack(values).squeeze(-1)


class Batch(NamedTuple):
    """n-step transitions, batch first; observations are shifted stacks of frames, uint8."""

    obs: torch.Tensor  # (batch, SIZE, SIZE, 3 STACK)
    action: torch.Tensor
    reward: torch.Tensor  # the discounted sum of n rewards
    discount: torch.Tensor  # of the value of next_obs: gamma^n, or 0 where the episode terminated
    next_obs: torch.Tensor


class FrameReplay:
    """A ring of single frames in a file, and what happened at each; stacked when sampled.

    Frame number k (0, 1, ... over the whole run) is followed by action[k], reward[k],
    terminated[k] and frame k + 1, if it is not the last of its episode; start[k] is the first frame
    of its episode. The last `capacity` frames are sampled. The ring holds `slack` more: a killed
    run goes back to a checkpoint and must find the frames that were in use then.
    """

    def __init__(
        self,
        path: Path,
        capacity: int,
        slack: int,
        action_dim: int,
        n_step: int,
        gamma: float,
        mode: str = "w+",
    ):
        size = capacity + slack
        self.path = path
        self.capacity = capacity
        self.n_step = n_step
        self.gamma = gamma
        self.added = 0
        self.newest_ready = -1  # the newest frame that n_step steps of its episode follow
        self.frames = open_frames(path, (size, SIZE, SIZE, 3), mode)
        self.action = np.zeros((size, action_dim), np.float32)
        self.reward = np.zeros(size, np.float32)
        self.terminated = np.zeros(size, np.float32)
        self.start = np.zeros(size, np.int64)
        # What a checkpoint holds
        self.columns = [self.action, self.reward, self.terminated, self.start]

    def begin(self, frame: np.ndarray) -> None:
        """The first frame of an episode."""
        self.append(frame, start=self.added)

    def add(self, action: np.ndarray, reward: float, terminated: bool, frame: np.ndarray) -> None:
        """What was done at the last frame, and what came of it."""
        last = (self.added - 1) % len(self.frames)
        self.action[last] = action
        self.reward[last] = reward
        self.terminated[last] = terminated
        start = self.start[last]
        if self.added - start >= self.n_step:
            self.newest_ready = self.added - self.n_step
        self.append(frame, start)

    def append(self, frame: np.ndarray, start: int) -> None:
        place = self.added % len(self.frames)
        self.frames[place] = frame
        self.start[place] = start
        self.added += 1

    def oldest(self) -> int:
        """The first frame that may be sampled."""
        return max(0, self.added - self.capacity)

    def ready(self) -> bool:
        """Whether there is a transition to sample; episodes shorter than n_step have none."""
        return self.newest_ready >= self.oldest()

    def sample(
        self, batch_size: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Batch:
        """Uniform over the frames that n_step steps of their episode follow; only if ready()."""
        ring = len(self.frames)
        end = self.added - self.n_step
        index = np.zeros(0, np.int64)
        while len(index) < batch_size:
            draw = torch.randint(self.oldest(), end, (batch_size,), generator=generator).numpy()
            same_episode = self.start[draw % ring] == self.start[(draw + self.n_step) % ring]
            index = np.append(index, draw[same_episode])[:batch_size]

        steps = (index[:, None] + np.arange(self.n_step)) % ring  # (batch, n_step)
        powers = np.float32(self.gamma) ** np.arange(self.n_step, dtype=np.float32)
        not_terminated = 1 - self.terminated[steps[:, -1]]

        shift = torch.randint(2 * PAD + 1, (2, batch_size, 2), generator=generator).numpy()
        shape = (2, batch_size, SIZE, SIZE, 3 * STACK)
        stacks = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        start = self.start[index % ring]
        gather_stacks(self.frames, index, start, shift[0], stacks[0].numpy())
        gather_stacks(self.frames, index + self.n_step, start, shift[1], stacks[1].numpy())

        columns = Batch(
            obs=stacks[0],
            action=self.action[index % ring],
            reward=self.reward[steps] @ powers,
            discount=self.gamma**self.n_step * not_terminated,
            next_obs=stacks[1],
        )
        return Batch(*(to_device(column, device) for column in columns))

    def state_dict(self) -> dict:
        """Everything except the frames: they stay in their file, which is written to the disk."""
        self.frames.base.flush()
        saved = [torch.from_numpy(column[: self.added].copy()) for column in self.columns]
        return {"counters": (self.added, self.newest_ready), "columns": saved}

    def load_state_dict(self, state: dict) -> None:
        self.added, self.newest_ready = state["counters"]
        for column, saved in zip(self.columns, state["columns"]):
            column[: len(saved)] = saved.numpy()


def actor_loss(actor, critic, features, noise):
    """-mean(min Q(s, pi(s) + noise)); noise (batch, action_dim) is clipped already."""
    action = actor(features, noise)  # (batch, action_dim)
    value = critic(features, action).amin(0)  # (2, batch) -> (batch,)
    return -value.mean()


@torch.no_grad()
def td_target(actor, target_critic, batch, next_features, noise):
    """R_n + gamma^n min Q_target(s_n, pi(s_n) + noise), (batch,)"""
    action = actor(next_features, noise)  # (batch, action_dim)
    value = target_critic(next_features, action).amin(0)  # (2, batch) -> (batch,)
    return batch.reward + batch.discount * value


def critic_loss(critic, features, action, target):
    """Mean squared TD error, summed over the critics."""
    error = critic(features, action) - target  # (2, batch)
    return error.square().mean(1).sum()


def exploration_std(args: Args, env_step: int) -> float:
    """The schedule: linear from std_start to std_end over std_decay env steps."""
    return float(np.interp(env_step / args.std_decay, (0, 1), (args.std_start, args.std_end)))


def clipped_noise(
    args: Args, shape: tuple, env_step: int, device, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Gaussian noise with the scheduled std, clipped to --noise-clip."""
    noise = exploration_std(args, env_step) * torch.randn(shape, generator=generator)
    return to_device(noise.clamp(-args.noise_clip, args.noise_clip), device)


class Agent:
    """Encoder, actor, critic and target critic, with their optimisers.

    The networks are drawn from torch's generator and pruned with masks from --mask-seed.
    """

    def __init__(self, args: Args, action_dim: int, device: torch.device):
        hidden = round(1024 * args.width_scale)
        layers = 1 + args.depth_scale
        self.encoder = Encoder()
        self.actor = Actor(action_dim, args.feature_dim)
        self.critic = Critic(action_dim, args.feature_dim, hidden, layers)

        # Prune each network once; the actor stays dense
        mask_seed = args.seed if args.mask_seed is None else args.mask_seed
        prune = partial(
            sparsify,
            distribution=args.sparsity_distribution,
            kernel=args.sparse_kernel,
            device=device,
            packed=PackedProduct,  # multiplies with active weights alone, on a CPU
            keeper=DenseCopy,  # keeps a dense weight between optimiser steps
            convolution=SparseConv2d,
        )
        encoder_sparsity = args.sparsity if args.sparsify_encoder else 0.0
        prune(self.encoder, encoder_sparsity, mask_seed=derive_seed(mask_seed, 0))
        prune(self.actor, 0.0, mask_seed=derive_seed(mask_seed, 1))
        prune(self.critic, args.sparsity, mask_seed=derive_seed(mask_seed, 2))
        self.encoder.to(memory_format=torch.channels_last)

        # Check what losses and diagnostics rely on: a changed network fails here, in one sentence
        batch = action_dim + 2  # unlike all other sizes
        obs = torch.zeros(batch, SIZE, SIZE, 3 * STACK, dtype=torch.uint8, device=device)
        with torch.no_grad():
            features = self.encoder(obs)
            check_shape("encoder", features, batch=batch, features=Encoder.out_features)
            action = self.actor(features)
            check_shape("actor", action, batch=batch, action_dim=action_dim)
            check_shape("critic", self.critic(features, action), critics=2, batch=batch)
            actor_inputs = self.actor.trunk(features)
            critic_inputs = torch.cat([self.critic.trunk(features), action], -1)
        check_encoder(self.actor, "body", actor_inputs)
        check_encoder(self.critic, "bodies.0", critic_inputs)

        # deepcopy's second argument lets the target critic share the critic's index buffers
        shared = {id(buffer): buffer for buffer in self.critic.buffers()}
        self.target_critic = copy.deepcopy(self.critic, shared)
        self.target_critic.requires_grad_(False)

        adam = partial(torch.optim.Adam, lr=args.learning_rate, fused=True)
        self.encoder_optimizer = adam(self.encoder.parameters())
        self.actor_optimizer = adam(self.actor.parameters())
        self.critic_optimizer = adam(self.critic.parameters())


def update(
    agent: Agent, batch: Batch, noise, next_noise, tau: float, bf16: bool = False
) -> dict[str, torch.Tensor]:
    """One gradient update of everything.

    noise, next_noise (batch, action_dim): with the scheduled std, and clipped.
    """
    # Critic and encoder
    features = agent.encoder(batch.obs, bf16)  # (batch, Encoder.out_features)
    with torch.no_grad():
        next_features = agent.encoder(batch.next_obs, bf16)
    target = td_target(agent.actor, agent.target_critic, batch, next_features, next_noise)
    loss_critic = critic_loss(agent.critic, features, batch.action, target)
    agent.encoder_optimizer.zero_grad()
    agent.critic_optimizer.zero_grad()
    loss_critic.backward()
    agent.critic_optimizer.step()
    agent.encoder_optimizer.step()

    # Actor, on the features from before the encoder's step, against the new critic, whose weights
    # need no gradient here
    agent.critic.requires_grad_(False)
    loss_actor = actor_loss(agent.actor, agent.critic, features.detach(), noise)
    agent.actor_optimizer.zero_grad()
    loss_actor.backward()
    agent.actor_optimizer.step()
    agent.critic.requires_grad_(True)

    # Target critic, slowly behind the critic
    with torch.no_grad():
        slow = list(agent.target_critic.parameters())
        fast = list(agent.critic.parameters())
        torch._foreach_lerp_(slow, fast, tau)

    return {
        "actor_loss": loss_actor.detach(),
        "critic_loss": loss_critic.detach(),
        "td_target": target.mean(),
    }


def push(stack: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """The stack without its oldest frame, and with a new one."""
    return np.concatenate([stack[..., 3:], frame], -1)


@torch.no_grad()
def act(agent: Agent, stack: np.ndarray, noise: torch.Tensor | None = None) -> np.ndarray:
    """Action (action_dim,) for a stack (SIZE, SIZE, 3 STACK): with `noise`, or the mean."""
    device = next(agent.actor.parameters()).device
    obs = torch.from_numpy(stack)[None].to(device)  # (1, SIZE, SIZE, 3 STACK)
    noise = 0.0 if noise is None else noise.to(device)
    return agent.actor(agent.encoder(obs), noise)[0].cpu().numpy()


def evaluate(
    agent: Agent, env: gym.Env, episodes: int, seed_key: tuple, video: Path | None = None
) -> dict[str, float]:
    """Returns of the deterministic policy, mean, std and interquartile mean.

    seed_key: what the episodes' seeds are derived from
    video: where to put a film of the first episode, one frame a decision
    """
    returns = np.zeros(episodes)
    film = []
    for episode in range(episodes):
        frame, _ = env.reset(seed=derive_seed(*seed_key, episode))
        stack = np.tile(frame, STACK)
        done = False
        while not done:
            if video and episode == 0 and len(film) < LONGEST_FILM:
                film.append(frame)
            frame, reward, terminated, truncated, _ = env.step(act(agent, stack))
            stack = push(stack, frame)
            returns[episode] += reward
            done = terminated or truncated
    if video:
        write_video(video, film)
    return summary(returns)


def diagnose(agent: Agent, batch: Batch, noise, next_noise) -> dict[str, float]:
    """Plasticity measurements on a batch (section 4 of the paper).

    Of the hidden layers after the trunks, the critic's in its first Q-function; gradients and
    parameter norms of the whole actor and critic.
    """
    with torch.no_grad():
        features = agent.encoder(batch.obs)
        next_features = agent.encoder(batch.next_obs)
        actor_inputs = agent.actor.trunk(features)  # (batch, feature_dim)
        critic_inputs = torch.cat([agent.critic.trunk(features), batch.action], -1)
    target = td_target(agent.actor, agent.target_critic, batch, next_features, next_noise)
    loss_actor = actor_loss(agent.actor, agent.critic, features, noise)
    loss_critic = critic_loss(agent.critic, features, batch.action, target)
    measured = {}
    for name, loss, body, inputs in (
        ("actor", loss_actor, agent.actor.body, actor_inputs),
        ("critic", loss_critic, agent.critic.bodies[0], critic_inputs),
    ):
        parameters = list(getattr(agent, name).parameters())
        gradients = torch.autograd.grad(loss, parameters)
        plasticity = measure_plasticity(body, inputs, parameters, gradients)
        measured |= {f"{name}_{metric}": value for metric, value in plasticity.items()}
    return measured


def make_env(args: Args) -> gym.Env:
    """Frames (84, 84, 3) uint8, actions in [-1, 1], each repeated; counts returns and lengths."""
    env = open_camera_env(args)
    env = gym.wrappers.RescaleAction(env, -1.0, 1.0)
    env = gym.wrappers.RepeatAction(env, args.action_repeat)  # rewards summed
    env = gym.wrappers.AddRenderObservation(env, render_only=True)
    return gym.wrappers.RecordEpisodeStatistics(env)


def open_replay(args: Args, env: gym.Env, path: Path, resumed: bool) -> FrameReplay:
    """The replay of a new run, or of one that goes on from a checkpoint."""
    (action_dim,) = env.action_space.shape
    decisions = math.ceil(args.total_timesteps / args.action_repeat)
    frames = 2 * decisions  # at most: an episode of T decisions has T + 1 frames
    capacity = min(args.buffer_size, frames)
    # A killed run goes back by two checkpoints at most (the newest one may be damaged)
    lost_decisions = 2 * (args.checkpoint_interval + longest_episode(env)) / args.action_repeat
    slack = min(frames - capacity, math.ceil(2 * lost_decisions))
    mode = "r+" if resumed else "w+"
    replay = FrameReplay(path, capacity, slack, action_dim, args.n_step, args.gamma, mode)
    size = replay.frames.nbytes / 1e9
    print(f"replay: {size:.1f} GB in {path}, deleted at the end of training")
    return replay


def load_policy(run_dir: str | Path) -> tuple[Callable, gym.Env]:
    """The policy of a trained run without noise, obs -> action, and its environment."""
    run = open_run(run_dir)
    env = gym.wrappers.FrameStackObservation(make_env(run.args), STACK)
    (action_dim,) = env.action_space.shape
    agent = Agent(run.args, action_dim, torch.device("cpu"))
    run.load({"encoder": agent.encoder, "actor": agent.actor})

    def policy(frames: np.ndarray) -> np.ndarray:
        """frames (STACK, SIZE, SIZE, 3), the newest last"""
        return act(agent, np.concatenate(frames, -1))

    return policy, env


def train(args: Args) -> None:
    """A whole run: trains, evaluates, measures and saves, or goes on where it was stopped."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: fewer page faults on Linux
    set_up_process(args)  # checks the flags, seeds all generators
    device = choose_device(args)
    env = make_env(args)
    eval_env = make_env(args)
    (action_dim,) = env.action_space.shape
    noise_shape = (2, args.batch_size, action_dim)  # of an update: for s and for s_n
    total_steps = math.ceil(args.total_timesteps / args.action_repeat)  # in decisions

    try:
        agent = Agent(args, action_dim, device)
    except NetworkError as error:
        fail(str(error))
    run = Run(args, args.action_repeat)
    trained = [*agent.encoder.parameters(), *agent.actor.parameters(), *agent.critic.parameters()]

    # What a checkpoint holds, in this order; the replay is added below
    parts = {
        "encoder": agent.encoder,
        "actor": agent.actor,
        "critic": agent.critic,
        "target_critic": agent.target_critic,
        "encoder_optimizer": agent.encoder_optimizer,
        "actor_optimizer": agent.actor_optimizer,
        "critic_optimizer": agent.critic_optimizer,
    }

    def evaluation(episodes: int, purpose: int, video: Path | None = None) -> dict[str, float]:
        eval_env.set_wrapper_attr("env_step", run.env_step)  # for error messages
        seed_key = (args.seed, purpose, run.agent_step)
        return evaluate(agent, eval_env, episodes, seed_key, video)

    if args.eval_only:
        run.restore(parts)
        run.print_result(evaluation(args.final_eval_episodes, FINAL, run.video()))
        return

    resumed = run.checkpoint is not None
    replay = open_replay(args, env, run.folder / "replay.u8", resumed)
    parts["replay"] = replay
    run.restore(parts)
    layers = {name: layer_table(parts[name]) for name in ("encoder", "actor", "critic")}
    run.begin(layers)
    env.set_wrapper_attr("env_step", run.env_step)  # for error messages
    episode_over = True
    if run.agent_step == 0:
        run.log("eval", evaluation(args.eval_episodes, EVAL))

    while run.agent_step < total_steps:
        if episode_over:
            if run.checkpoint_due():
                run.save(parts)
            frame, _ = env.reset(seed=derive_seed(args.seed, TRAIN, run.episode))
            run.episode += 1
            replay.begin(frame)
            stack = np.tile(frame, STACK)
            losses = {}

        # Act: at random at first, then by the policy and noise
        env_step = run.env_step  # before this decision; all noise below depends on it
        learning = env_step >= args.learning_starts
        if learning:
            std = exploration_std(args, env_step)
            action = act(agent, stack, std * torch.randn(action_dim))
        else:
            action = (2 * torch.rand(action_dim) - 1).numpy()
        frame, reward, terminated, truncated, info = env.step(action)
        replay.add(action, reward, terminated, frame)  # a time limit is no termination
        stack = push(stack, frame)
        episode_over = terminated or truncated
        run.count_decision()

        # Learn
        if learning and run.agent_step % args.decisions_per_update == 0 and replay.ready():
            batch = replay.sample(args.batch_size, device)
            noise, next_noise = clipped_noise(args, noise_shape, env_step, device)
            losses = update(agent, batch, noise, next_noise, args.tau, args.bf16)
            run.update_step += 1

        # Measure
        if episode_over or run.due(args.eval_interval) or run.due(args.diagnostics_interval):
            stop_unless_finite(run.agent_step, *losses.values(), get_total_norm(trained))
        if run.due(args.eval_interval):
            run.log_evaluation(evaluation(args.eval_episodes, EVAL))
        if run.due(args.diagnostics_interval) and replay.ready():
            # A generator of its own: measuring leaves training untouched
            seed = derive_seed(args.seed, DIAGNOSE, run.agent_step)
            generator = torch.Generator().manual_seed(seed)
            batch = replay.sample(args.batch_size, device, generator)
            noises = clipped_noise(args, noise_shape, env_step, device, generator)
            run.log("diagnostics", diagnose(agent, batch, *noises))

        if episode_over:
            run.log_episode(info["episode"], losses)
            if learning and run.episode >= 100 and not replay.ready():
                fail(f"--n-step {args.n_step} is longer than each of {run.episode} episodes")

    run.save(parts)  # a kill in the last evaluation costs no training
    run.finish(parts, evaluation(args.final_eval_episodes, FINAL, run.video()))
    replay.path.unlink()


# Flags that change results by rounding at most: a run may go on with others.
# All other flags are in the name of the run's folder, as a hash;
# --checkpoint-interval is one of them, because the size of replay.u8 depends on it.
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


def open_camera_env(args: Args) -> gym.Env:
    """An environment of --env-id with frames (84, 84, 3) and a bounded Box of actions."""
    os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")
    sys.path.append(os.getcwd())  # for an environment of your own, --env-id module:MyEnv-v0
    camera = args.camera
    picture = {"width": SIZE, "height": SIZE}
    named = f"--env-id {args.env_id}"
    try:
        if args.env_id.startswith("dm_control/"):
            import shimmy  # looks for the renderer

            gym.register_envs(shimmy)
            if camera is None:
                camera = 2 if "quadruped" in args.env_id else 0
            picture = {"render_kwargs": {**picture, "camera_id": camera}}
        elif camera is not None:
            picture["camera_id"] = camera
        if camera is not None:
            named += f", camera {camera}"
        env = gym.make(
            args.env_id,
            render_mode="rgb_array",
            max_episode_steps=args.max_episode_steps,
            disable_env_checker=True,
            **read_env_kwargs(args),
            **picture,
        )
        if "camera_id" in picture:
            cameras = env.unwrapped.model.ncam
            if camera >= cameras:
                raise ValueError(f"the model has {cameras} cameras")
        env.reset(seed=0)
        frame = env.render()
        check_action_space(args, env.action_space)
    except (gym.error.Error, ModuleNotFoundError, ValueError) as error:
        fail(f"{named}: {error}")
    except TypeError as error:
        hint = ""
        if "argument 'width'" in str(error) or "argument 'height'" in str(error):
            hint = "; this agent needs width and height, as dm_control/* and MuJoCo's tasks take"
        elif args.env_kwargs:
            hint = f"; --env-kwargs {args.env_kwargs}"
        fail(f"{named}: {error}{hint}")
    except SystemExit as end:
        fail_where_it_ended(args, "", end)
    except Exception as error:
        fail(
            f"{named}: no pictures ({type(error).__name__}: {error}). If the renderer is "
            f"missing (here MUJOCO_GL={os.environ['MUJOCO_GL']}), on Debian: "
            "apt install libegl1 libgl1-mesa-dri for egl, libosmesa6 for osmesa"
        )
    if np.shape(frame) != (SIZE, SIZE, 3):
        fail(
            f"--env-id {args.env_id}: renders {np.shape(frame)}; "
            f"this agent needs ({SIZE}, {SIZE}, 3)"
        )
    return Gate(env, args, longest=longest_episode(env))


def longest_episode(env: gym.Env) -> int:
    """Env steps after which an episode is cut off; longer ones would not fit the replay's file."""
    return env.spec.max_episode_steps or 1000  # dm_control cuts its episodes off itself


@numba.njit(parallel=True)
def gather_stacks(frames, newest, oldest, shift, out):
    """out[b] = the STACK frames up to number newest[b], moved by shift[b] - PAD pixels.

    No frame before oldest[b] is used: that one is repeated. What a shift brings in repeats the
    border, as a crop of the image padded by PAD would.

    frames (ring, SIZE, SIZE, 3), shift (batch, 2) in 0..2 PAD, out (batch, SIZE, SIZE, 3 STACK)
    """
    for b in numba.prange(len(out)):
        for s in range(STACK):
            frame = frames[max(newest[b] - STACK + 1 + s, oldest[b]) % len(frames)]
            for y in range(SIZE):
                row = frame[min(max(y + shift[b, 0] - PAD, 0), SIZE - 1)]
                for x in range(SIZE):
                    pixel = row[min(max(x + shift[b, 1] - PAD, 0), SIZE - 1)]
                    for c in range(3):
                        out[b, y, x, 3 * s + c] = pixel[c]


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
