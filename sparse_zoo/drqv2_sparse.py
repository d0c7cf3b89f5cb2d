# docs: docs/drqv2_sparse.md
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "numba==0.68.1", "scipy==1.17.1", "tyro==1.0.17", "tqdm==4.70.1",
#     "gymnasium==1.4.0", "shimmy==2.0.1", "dm-control==1.0.50", "mujoco==3.17.0", "filelock==4.2.11",
#     "matplotlib==3.11.2", "pandas==3.1.1", "imageio==2.38.1", "imageio-ffmpeg==0.8.1", "tensorboard==2.21.0",
#     "wandb==0.31.0",
# ]
# ///
"""DrQ-v2 with static sparsity: continuous control from pixels with a scaled critic.

Before training, a random set of the critic's weights is removed once; the survivors are trained as usual. DrQ-v2 is
DDPG from images: a convolutional encoder that learns from the critic alone, random shifts of the images, n-step
returns, and exploration noise that shrinks over training. Only the critic grows with --width-scale; actor and encoder
keep their size.

Papers: Network Sparsity Unlocks the Scaling Potential of Deep RL (Ma, Li et al., ICML 2025); Mastering Visual
Continuous Control: Improved Data-Augmented Reinforcement Learning (Yarats et al., 2021), arXiv:2107.09645.

Differences from the code of Yarats et al. (the paper has published none for its visual experiments):
 1. A pruned weight is not stored: values, gradients, Adam moments and the target network are vectors over the active
    weights, elementwise equal to training a masked dense network.
 2. Random shifts are whole pixels by copying; there, by bilinear sampling at whole pixels, equal within rounding.
 3. All stored transitions are equally likely; there, first an episode is drawn and then a transition in it, from what
    each of four workers has loaded.
 4. A terminated episode is not bootstrapped from; there, it is (no task of the paper terminates).
 5. The training environment is seeded anew at every reset from (seed, episode), so that a resumed run repeats the
    uninterrupted one in any environment whose seed decides all; there, one generator runs on.
 6. Evaluations draw their initial states from (seed, decision), so that they leave training untouched.
 7. The encoder's features are ordered by pixel, then channel; there, the other way round. The layers that read them
    are fully connected.
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
from functools import partial
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
from torch.nn.utils import get_total_norm
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # Experiment
    exp_name: str = "drqv2_sparse"
    """part of the run's name"""
    seed: int = 1
    """seed of networks, exploration, replay and environments (below 2^32)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto takes CUDA when there is one"""
    threads: int | None = None
    """CPU threads (default: all cores); a resumed run is bit-equal only with the same number"""
    bf16: bool = False
    """convolutions of updates in bfloat16: faster, less exact"""
    runs_dir: str = "runs"
    """folder that holds one folder per run, replay included"""
    resume: bool = True
    """go on from the run's checkpoint; --no-resume moves the old run aside and starts afresh"""
    eval_only: bool = False
    """evaluate this command's checkpoint for its --final-eval-episodes episodes and stop"""
    capture_video: bool = False
    """film the first episode of the last evaluation (or of --eval-only) as mp4"""

    # Environment
    env_id: str = "dm_control/quadruped-run-v0"
    """a dm_control/* id, or any Gymnasium MuJoCo id, with Box actions; observed through its camera"""
    camera: int | None = None
    """number of the camera (default: dm_control 2 for quadruped, else 0; Gymnasium: the task's own)"""
    action_repeat: int = 2
    """simulator frames per decision, rewards summed"""
    total_timesteps: int = 2_000_000
    """env steps of training (simulator frames, action repeat included)"""

    # Algorithm (Table 4 of the paper)
    learning_starts: int = 4_000
    """env steps of uniformly random actions before the first update"""
    decisions_per_update: int = 2
    """one gradient update every so many decisions"""
    batch_size: int = 256
    """transitions per update"""
    buffer_size: int = 1_000_000
    """largest number of frames kept for replay, in a file of about 21 kB a frame"""
    n_step: int = 3
    """rewards in a return before it bootstraps"""
    gamma: float = 0.99
    """discount"""
    tau: float = 0.01
    """target <- tau * critic + (1 - tau) * target after every update"""
    learning_rate: float = 1e-4
    """of encoder, actor and critic (Adam)"""
    feature_dim: int = 50
    """outputs of the trunks between encoder and heads"""
    std_start: float = 1.0
    """std of the exploration noise at the start"""
    std_end: float = 0.1
    """and at the end"""
    std_decay: int = 1_000_000
    """env steps from start to end (easy tasks 200,000, hard ones 4,000,000)"""
    noise_clip: float = 0.3
    """largest noise in the actor loss and in the TD target"""

    # Size and sparsity
    width_scale: float = 1.0
    """hidden units of the critic's heads: 1024 x scale"""
    depth_scale: int = 1
    """hidden layers of the critic's heads: 1 + scale"""
    sparsity: float = 0.0
    """fraction of parameters removed from the critic: trunk and both heads"""
    sparsify_encoder: bool = False
    """prune the encoder as well, at the same sparsity"""
    sparsity_distribution: Literal["erdos_renyi", "uniform"] = "erdos_renyi"
    """how a network's sparsity is spread over its layers"""
    mask_seed: int | None = None
    """seed of the random pruning (default: --seed)"""
    sparse_kernel: Literal["auto", "packed", "dense"] = "auto"
    """how sparse layers multiply (auto: packed on CPU up to density 0.25, else dense); bit-equal only with the same"""

    # Logging
    eval_interval: int = 10_000
    """env steps between evaluations, the first at step 0"""
    eval_episodes: int = 10
    """episodes of each evaluation (deterministic policy)"""
    final_eval_episodes: int = 10
    """episodes of the last evaluation and of --eval-only"""
    diagnostics_interval: int = 10_000
    """env steps between measurements of rank, dormancy and norms (0: never)"""
    track: bool = False
    """log to Weights & Biases as well (WANDB_MODE=offline needs no account)"""
    wandb_project: str = "sparse_zoo"
    """project of --track"""
    wandb_entity: str | None = None
    """team of --track"""

    # Checkpoints
    checkpoint_interval: int = 10_000
    """env steps between checkpoints, each written at the next end of an episode"""


SIZE, STACK, PAD = 84, 3, 4  # pixels of a side, frames in an observation, largest random shift


def orthogonal(layer: nn.Module, gain: float = 1.0) -> nn.Module:
    """Orthogonal weights, biases zero."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Encoder(nn.Module):
    """Four convolutions, for images of SIZE x SIZE."""

    features = 32 * 35 * 35

    def __init__(self):
        super().__init__()
        gain = nn.init.calculate_gain("relu")
        convolutions = [
            orthogonal(nn.Conv2d(fan_in, 32, 3, stride), gain)
            for fan_in, stride in ((3 * STACK, 2), (32, 1), (32, 1), (32, 1))
        ]
        self.layers = nn.Sequential(
            *(module for conv in convolutions for module in (conv, nn.ReLU(inplace=True)))
        )

    def forward(self, obs: torch.Tensor, bf16: bool = False) -> torch.Tensor:
        """Stacks of uint8 (batch, SIZE, SIZE, 3 STACK) -> (batch, features), float32

        On a CPU 32 images at a time, whose activations stay in its cache. Features lie as in memory: channels last.
        """
        features = []
        for part in obs.split(32 if obs.device.type == "cpu" else len(obs)):
            images = (
                part.permute(0, 3, 1, 2).float().div_(255).sub_(0.5)
            )  # channels stay last in memory
            with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
                features.append(self.layers(images).permute(0, 2, 3, 1).float().flatten(1))
        return torch.cat(features)


def mlp(inputs: int, hidden: int, layers: int) -> nn.Sequential:
    """ReLU layers: (batch, inputs) -> (batch, hidden)"""
    sizes = [inputs] + [hidden] * layers
    linears = (orthogonal(nn.Linear(m, n)) for m, n in pairwise(sizes))
    return nn.Sequential(*(module for linear in linears for module in (linear, nn.ReLU())))


def trunk(feature_dim: int) -> nn.Sequential:
    """What stands between the encoder and a head: (batch, Encoder.features) -> (batch, feature_dim)"""
    return nn.Sequential(
        orthogonal(nn.Linear(Encoder.features, feature_dim)), nn.LayerNorm(feature_dim), nn.Tanh()
    )


class Actor(nn.Module):
    """Mean of the policy; its std is scheduled."""

    def __init__(self, action_dim: int, feature_dim: int):
        super().__init__()
        self.trunk, self.body = trunk(feature_dim), mlp(feature_dim, 1024, 2)
        self.head = orthogonal(nn.Linear(1024, action_dim))

    def forward(self, features, noise=0.0):
        """features (batch, Encoder.features), noise (batch, action_dim) -> actions within (-1, 1).

        The sum of mean and noise is cut off just inside -1 and 1; the gradient passes as if it were not.
        """
        action = torch.tanh(self.head(self.body(self.trunk(features)))) + noise
        return action.clamp(-1 + 1e-6, 1 - 1e-6).detach() + (action - action.detach())


class Critic(nn.Module):
    """Two Q-functions on one trunk."""

    def __init__(self, action_dim: int, feature_dim: int, hidden: int, layers: int):
        super().__init__()
        self.trunk = trunk(feature_dim)
        self.bodies = nn.ModuleList(mlp(feature_dim + action_dim, hidden, layers) for _ in range(2))
        self.heads = nn.ModuleList(orthogonal(nn.Linear(hidden, 1)) for _ in range(2))

    def forward(self, features, action):
        """(batch, Encoder.features), (batch, action_dim) -> Q-values (2, batch)"""
        x = torch.cat([self.trunk(features), action], -1)
        return torch.stack(
            [head(body(x)).squeeze(-1) for body, head in zip(self.bodies, self.heads)]
        )


class Batch(NamedTuple):
    """n-step transitions, batch first; observations are stacks (batch, SIZE, SIZE, 3 STACK), uint8, shifted."""

    obs: torch.Tensor
    action: torch.Tensor
    reward: torch.Tensor  # the discounted sum of n rewards
    discount: torch.Tensor  # of the value of next_obs: gamma^n, or 0 where the episode terminated
    next_obs: torch.Tensor


@numba.njit(parallel=True, cache=True)
def gather_stacks(frames, newest, oldest, shift, out):
    """out[b] = the STACK frames up to number newest[b], none before oldest[b], moved by shift[b] - PAD pixels.

    frames (ring, SIZE, SIZE, 3), shift (batch, 2) in 0..2 PAD, out (batch, SIZE, SIZE, 3 STACK). What a shift brings in
    repeats the border: a crop of the image padded by PAD.
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


class FrameReplay:
    """A ring of single frames in a file, stacked when sampled, never across episodes; and what happened at each.

    Frame number k (0, 1, ... over the whole run) is followed by action[k], reward[k], terminated[k] and frame k + 1, if
    it is not the last of its episode; start[k] is the first frame of its episode. The last `capacity` frames are
    sampled. The ring holds `slack` more, so that what a checkpoint counts on is not overwritten before the next ones
    are written: a killed run finds its replay as it was.
    """

    def __init__(
        self,
        path: Path,
        capacity: int,
        slack: int,
        action_dim: int,
        n_step: int,
        gamma: float,
        mode="w+",
    ):
        self.capacity, self.n_step, self.gamma, self.added = capacity, n_step, gamma, 0
        self.newest = -1  # the last frame with n_step steps of its episode behind it
        size = capacity + slack
        self.path, shape, needed = path, (size, SIZE, SIZE, 3), size * SIZE * SIZE * 3
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
        self.action = np.zeros((size, action_dim), np.float32)
        self.reward, self.terminated = np.zeros(size, np.float32), np.zeros(size, np.float32)
        self.start = np.full(size, -1)

    def begin(self, frame: np.ndarray) -> None:
        """The first frame of an episode."""
        self.frames[self.added % len(self.frames)] = frame
        self.start[self.added % len(self.frames)] = self.added
        self.added += 1

    def add(self, action: np.ndarray, reward: float, terminated: bool, frame: np.ndarray) -> None:
        """What was done at the last frame, and what came of it."""
        last, new = (self.added - 1) % len(self.frames), self.added % len(self.frames)
        self.action[last], self.reward[last], self.terminated[last] = action, reward, terminated
        self.frames[new], self.start[new] = frame, self.start[last]
        if self.added - self.start[new] >= self.n_step:
            self.newest = self.added - self.n_step
        self.added += 1

    def ready(self) -> bool:
        """Whether there is a transition to sample; episodes shorter than n_step have none."""
        return self.newest >= max(0, self.added - self.capacity)

    def sample(
        self, batch_size: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Batch:
        """Uniform over the frames with n_step steps of their episode behind them; call it when ready()."""
        ring, low = len(self.frames), max(0, self.added - self.capacity)
        index = np.zeros(0, np.int64)
        while len(index) < batch_size:
            draw = torch.randint(
                low, self.added - self.n_step, (batch_size,), generator=generator
            ).numpy()
            draw = draw[self.start[draw % ring] == self.start[(draw + self.n_step) % ring]]
            index = np.append(index, draw)[:batch_size]
        steps = (index[:, None] + np.arange(self.n_step)) % ring
        reward = self.reward[steps] @ np.float32(self.gamma) ** np.arange(
            self.n_step, dtype=np.float32
        )
        discount = self.gamma**self.n_step * (1 - self.terminated[steps[:, -1]])
        shifts = torch.randint(2 * PAD + 1, (2, batch_size, 2), generator=generator).numpy()
        stacks = np.empty((2, batch_size, SIZE, SIZE, 3 * STACK), np.uint8)
        for newest, shift, stack in zip((index, index + self.n_step), shifts, stacks):
            gather_stacks(self.frames, newest, self.start[index % ring], shift, stack)
        columns = (stacks[0], self.action[index % ring], reward, discount, stacks[1])
        return Batch(*(torch.from_numpy(column).to(device) for column in columns))

    def state_dict(self) -> dict:
        """All but the frames, which are brought to the disk where they are."""
        self.frames.base.flush()
        columns = (self.action, self.reward, self.terminated, self.start)
        saved = [torch.from_numpy(column[: self.added].copy()) for column in columns]
        return {"counters": (self.added, self.newest), "columns": saved}

    def load_state_dict(self, state: dict) -> None:
        self.added, self.newest = state["counters"]
        for column, saved in zip(
            (self.action, self.reward, self.terminated, self.start), state["columns"]
        ):
            column[: len(saved)] = saved.numpy()


def actor_loss(actor, critic, features, noise):
    """-mean(min Q(s, pi(s) + noise)); noise (batch, action_dim) is clipped already."""
    return -critic(features, actor(features, noise)).amin(0).mean()


@torch.no_grad()
def td_target(actor, target_critic, batch, next_features, noise):
    """R_n + gamma^n min Q_target(s_n, pi(s_n) + noise), (batch,)"""
    return batch.reward + batch.discount * target_critic(
        next_features, actor(next_features, noise)
    ).amin(0)


def critic_loss(critic, features, action, target):
    """Mean squared TD error, summed over the critics."""
    return (critic(features, action) - target).square().mean(1).sum()


def exploration_std(args: Args, env_step: int) -> float:
    """The schedule: linear from std_start to std_end over std_decay env steps."""
    return float(np.interp(env_step / args.std_decay, (0, 1), (args.std_start, args.std_end)))


def clipped_noise(
    args: Args, shape: tuple, env_step: int, device, generator: torch.Generator | None = None
):
    """Gaussian noise with the scheduled std, clipped to --noise-clip."""
    noise = exploration_std(args, env_step) * torch.randn(shape, generator=generator)
    return noise.clamp(-args.noise_clip, args.noise_clip).to(device)


class Agent:
    """Networks drawn from torch's generator, the critic pruned with a mask from --mask-seed, and their optimisers."""

    def __init__(self, args: Args, action_dim: int, device: torch.device):
        self.encoder, self.actor = Encoder(), Actor(action_dim, args.feature_dim)
        self.critic = Critic(
            action_dim, args.feature_dim, round(1024 * args.width_scale), 1 + args.depth_scale
        )
        self.layers = {}
        mask_seed = args.seed if args.mask_seed is None else args.mask_seed
        sparsities = {
            "encoder": args.sparsity * args.sparsify_encoder,
            "actor": 0.0,
            "critic": args.sparsity,
        }
        for index, (name, sparsity) in enumerate(sparsities.items()):
            how = (
                args.sparsity_distribution,
                derive_seed(mask_seed, index),
                args.sparse_kernel,
                device,
            )
            self.layers[name] = sparsify(getattr(self, name), sparsity, *how)
        self.encoder.to(memory_format=torch.channels_last)
        # The memo lets the target critic share the critic's index buffers: the pattern is stored once.
        self.target_critic = copy.deepcopy(
            self.critic, {id(buffer): buffer for buffer in self.critic.buffers()}
        )
        self.target_critic.requires_grad_(False)
        adam = partial(torch.optim.Adam, lr=args.learning_rate, fused=True)
        self.encoder_optimizer = adam(self.encoder.parameters())
        self.actor_optimizer = adam(self.actor.parameters())
        self.critic_optimizer = adam(self.critic.parameters())


def update(
    agent: Agent, batch: Batch, noise, next_noise, tau: float, bf16: bool = False
) -> dict[str, torch.Tensor]:
    """One gradient update of everything; noise (batch, action_dim) has the scheduled std and is clipped."""
    # Critic and encoder
    features = agent.encoder(batch.obs, bf16)
    with torch.no_grad():
        next_features = agent.encoder(batch.next_obs, bf16)
    target = td_target(agent.actor, agent.target_critic, batch, next_features, next_noise)
    loss_critic = critic_loss(agent.critic, features, batch.action, target)
    agent.encoder_optimizer.zero_grad()
    agent.critic_optimizer.zero_grad()
    loss_critic.backward()
    agent.critic_optimizer.step()
    agent.encoder_optimizer.step()

    # Actor, on the features from before the encoder's step and with the new critic, whose weights need no gradient here
    agent.critic.requires_grad_(False)
    loss_actor = actor_loss(agent.actor, agent.critic, features.detach(), noise)
    agent.actor_optimizer.zero_grad()
    loss_actor.backward()
    agent.actor_optimizer.step()
    agent.critic.requires_grad_(True)

    with torch.no_grad():
        for slow, fast in zip(agent.target_critic.parameters(), agent.critic.parameters()):
            slow.lerp_(fast, tau)
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
    """The action (action_dim,) for a stack of frames (SIZE, SIZE, 3 STACK), with `noise` (action_dim,) or without."""
    device = next(agent.actor.parameters()).device
    features = agent.encoder(torch.from_numpy(stack)[None].to(device))
    return agent.actor(features, 0.0 if noise is None else noise.to(device))[0].cpu().numpy()


def evaluate(
    agent, env: gym.Env, episodes: int, seed_key: tuple, video: Path | None = None
) -> dict[str, float]:
    """Mean, std and interquartile mean of the deterministic policy's returns; films the first episode on request."""
    returns, frames = np.zeros(episodes), []
    for episode in range(episodes):
        frame, _ = env.reset(seed=derive_seed(*seed_key, episode))
        stack, done = np.tile(frame, STACK), False
        while not done:
            if video and episode == 0:
                frames.append(frame)
            frame, reward, terminated, truncated, _ = env.step(act(agent, stack))
            stack = push(stack, frame)
            returns[episode] += reward
            done = terminated or truncated
    if video:
        import imageio

        video.parent.mkdir(exist_ok=True)
        imageio.mimwrite(video, frames, fps=30, macro_block_size=None)  # decisions, not real time
    return {
        "return_mean": returns.mean(),
        "return_std": returns.std(),
        "return_iqm": trim_mean(returns, 0.25),
    }


def diagnose(agent: Agent, batch: Batch, noise, next_noise) -> dict[str, float]:
    """Plasticity measurements of the heads of actor and critic, gradients and norms of all their weights."""
    with torch.no_grad():
        features, next_features = agent.encoder(batch.obs), agent.encoder(batch.next_obs)
    target = td_target(agent.actor, agent.target_critic, batch, next_features, next_noise)
    loss_actor = actor_loss(agent.actor, agent.critic, features, noise)
    loss_critic = critic_loss(agent.critic, features, batch.action, target)
    with torch.no_grad():
        inputs = {"actor": agent.actor.trunk(features)}
        inputs["critic"] = torch.cat([agent.critic.trunk(features), batch.action], -1)
    measured = {}
    bodies = {
        "actor": (loss_actor, agent.actor.body),
        "critic": (loss_critic, agent.critic.bodies[0]),
    }
    for name, (loss, body) in bodies.items():
        parameters = list(getattr(agent, name).parameters())
        plasticity = measure_plasticity(
            body, inputs[name], parameters, torch.autograd.grad(loss, parameters)
        )
        measured |= {f"{name}_{metric}": value for metric, value in plasticity.items()}
    return measured


def train(args: Args) -> None:
    check_flags(args)
    device = torch.device(
        args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    )
    threads = args.threads or torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    torch.set_num_threads(threads)  # after numba, whose start sets the number for both
    warnings.filterwarnings(
        "ignore", category=UserWarning, module="gymnasium"
    )  # of the precision of Box bounds
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault(
        "THP_MEM_ALLOC_ENABLE", "1"
    )  # large pages for tensors: fewer page faults on Linux
    signal.signal(
        signal.SIGINT, lambda *_: sys.exit("interrupted; --resume goes on from the last checkpoint")
    )

    env, eval_env = make_env(args), make_env(args)
    (action_dim,) = env.action_space.shape
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    try:
        agent = Agent(args, action_dim, device)
    except ValueError as error:
        fail(str(error))
    run_dir, checkpoint = open_run(args)
    if checkpoint and checkpoint["finished"] and not args.eval_only:
        (run_dir / "replay.u8").unlink(missing_ok=True)  # left by a kill after the last checkpoint
        print(f"this run is finished: its results are in {run_dir} (--no-resume runs it again)")
        sys.exit(0)
    parts_to_save = {name: part for name, part in vars(agent).items() if name != "layers"}
    agent_step = update_step = episode = csv_bytes = 0
    if not args.eval_only:
        total_steps = math.ceil(args.total_timesteps / args.action_repeat)
        capacity = min(
            args.buffer_size, 2 * total_steps
        )  # frames; an episode of T decisions has T + 1
        between = args.checkpoint_interval + (
            env.spec.max_episode_steps or 1000
        )  # env steps between checkpoints
        slack = min(2 * total_steps - capacity, math.ceil(4 * between / args.action_repeat))
        mode = "r+" if checkpoint else "w+"
        replay = FrameReplay(
            run_dir / "replay.u8", capacity, slack, action_dim, args.n_step, args.gamma, mode
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
            agent, eval_env, args.final_eval_episodes, (args.seed, FINAL, agent_step), video
        )
        print("  ".join(f"{name} {value:.1f}" for name, value in result.items()))
        eval_env.close()
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
    trained = [p for part in (agent.encoder, agent.actor, agent.critic) for p in part.parameters()]
    saved_step, episode_over = agent_step, True

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
        log(evaluate(agent, eval_env, args.eval_episodes, (args.seed, EVAL, 0)), "eval")
    while agent_step < total_steps:
        if episode_over:
            if (agent_step - saved_step) * args.action_repeat >= args.checkpoint_interval:
                save(finished=False)
                saved_step = agent_step
            frame, _ = env.reset(seed=derive_seed(args.seed, TRAIN, episode))
            stack = np.tile(frame, STACK)
            replay.begin(frame)
            episode, episode_start, episode_return = episode + 1, agent_step, 0.0
            losses, started = {}, time.time()

        # Act
        env_step = agent_step * args.action_repeat
        if env_step < args.learning_starts:
            action = (2 * torch.rand(action_dim) - 1).numpy()
        else:
            action = act(agent, stack, exploration_std(args, env_step) * torch.randn(action_dim))
        frame, reward, terminated, truncated, _ = env.step(action)
        replay.add(action, reward, terminated, frame)
        stack, episode_over = push(stack, frame), terminated or truncated
        episode_return += reward
        agent_step += 1

        # Learn
        if (
            env_step >= args.learning_starts
            and agent_step % args.decisions_per_update == 0
            and replay.ready()
        ):
            batch = replay.sample(args.batch_size, device)
            noise, next_noise = clipped_noise(
                args, (2, args.batch_size, action_dim), env_step, device
            )
            losses = update(agent, batch, noise, next_noise, args.tau, args.bf16)
            update_step += 1
            if not torch.stack([*losses.values(), get_total_norm(trained)]).isfinite().all():
                print(
                    f"error: a value is not finite at {agent_step=}; the last checkpoint is kept",
                    file=sys.stderr,
                )
                sys.exit(3)

        # Measure
        if due(args.eval_interval):
            result = evaluate(agent, eval_env, args.eval_episodes, (args.seed, EVAL, agent_step))
            log(result, "eval")
            draw_learning_curve(run_dir, args.env_id)
            bar.set_postfix_str(f"return {result['return_mean']:.0f}")
        if due(args.diagnostics_interval) and replay.ready():
            generator = torch.Generator().manual_seed(derive_seed(args.seed, DIAGNOSE, agent_step))
            batch = replay.sample(args.batch_size, device, generator)
            noises = clipped_noise(
                args, (2, args.batch_size, action_dim), env_step, device, generator
            )
            log(diagnose(agent, batch, *noises), "diagnostics")

        bar.update(args.action_repeat)
        if episode_over:
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
        agent, eval_env, args.final_eval_episodes, (args.seed, FINAL, agent_step), video
    )
    log(result, "final")
    save(finished=True)
    env.close()
    eval_env.close()
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
    counts = "depth_scale action_repeat total_timesteps decisions_per_update batch_size buffer_size n_step feature_dim"
    counts += (
        " std_decay threads eval_interval eval_episodes final_eval_episodes checkpoint_interval"
    )
    rules = [
        ("at least 0 and below 1", lambda x: 0 <= x < 1, "sparsity"),
        ("between 0 and 1", lambda x: 0 <= x <= 1, "gamma tau"),
        ("above 0 and finite", lambda x: 0 < x < math.inf, "learning_rate"),
        ("at least 0 and finite", lambda x: 0 <= x < math.inf, "std_start std_end noise_clip"),
        (
            "at least 1/1024 (one hidden unit) and finite",
            lambda x: 1 / 1024 <= x < math.inf,
            "width_scale",
        ),
        ("at least 1", lambda x: x >= 1, counts),
        ("above --n-step", lambda x: x > args.n_step, "buffer_size"),
        ("at least 0", lambda x: x >= 0, "learning_starts diagnostics_interval camera"),
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


def make_env(args: Args) -> gym.Env:
    """An environment with actions in [-1, 1] that repeats each action and shows (84, 84, 3) uint8 frames."""
    camera = args.camera if args.camera is not None else 2 if "quadruped" in args.env_id else 0
    size = {"width": SIZE, "height": SIZE}
    try:
        if args.env_id.startswith("dm_control/"):
            import shimmy  # looks for the renderer

            gym.register_envs(shimmy)
            size = {"render_kwargs": {**size, "camera_id": camera}}
        elif args.camera is not None:
            size["camera_id"] = camera
        env = gym.make(args.env_id, render_mode="rgb_array", disable_env_checker=True, **size)
        if "camera_id" in size and camera >= (cameras := env.unwrapped.model.ncam):
            raise ValueError(f"the model has {cameras} cameras")
        env.reset(seed=0)
        frame = env.render()
    except (gym.error.Error, ModuleNotFoundError, ValueError) as error:
        fail(f"--env-id {args.env_id}, camera {camera}: {error}")
    except TypeError:
        fail(
            f"--env-id {args.env_id}: takes no width and height of pictures; dm_control/* and MuJoCo tasks do"
        )
    except Exception as error:
        how = f"MUJOCO_GL={os.environ['MUJOCO_GL']} needs a renderer: egl (Debian: apt install libegl1 libgl1-mesa-dri)"
        fail(
            f"--env-id {args.env_id}: no pictures ({type(error).__name__}: {error}). {how} or osmesa (libosmesa6)"
        )
    space = env.action_space
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or not space.is_bounded():
        fail(
            f"--env-id {args.env_id} has actions {space}; this agent needs a bounded Box of one dimension"
        )
    if frame is None or frame.shape != (SIZE, SIZE, 3):
        fail(
            f"--env-id {args.env_id}: renders {np.shape(frame)}; this agent needs ({SIZE}, {SIZE}, 3)"
        )
    env = gym.wrappers.RepeatAction(gym.wrappers.RescaleAction(env, -1.0, 1.0), args.action_repeat)
    return gym.wrappers.AddRenderObservation(env, render_only=True)


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
