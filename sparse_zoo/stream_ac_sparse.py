# docs: docs/stream_ac_sparse.md
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "numba==0.68.1", "scipy==1.17.1", "tyro==1.0.17",
#     "gymnasium==1.4.0", "shimmy==2.0.1", "dm-control==1.0.50", "mujoco==3.17.0",
#     "filelock==4.2.11", "matplotlib==3.11.2", "pandas==3.1.1", "tqdm==4.70.1",
#     "imageio==2.38.1", "imageio-ffmpeg==0.8.1", "tensorboard==2.21.0", "wandb==0.31.0",
# ]
# ///
"""Stream AC(lambda), a streaming actor-critic, with static sparsity.

Before training, a random set of weights is removed once; the survivors are trained as usual. Each
transition is used once, as it comes, and forgotten: there is no replay, no batch and no target
network. Eligibility traces carry credit back in time, and ObGD bounds each step so that it cannot
overshoot.

Papers: Network Sparsity Unlocks the Scaling Potential of Deep RL (Ma, Li et al., ICML 2025);
Streaming Deep Reinforcement Learning Finally Works (Elsayed, Vasan and Mahmood, 2024),
arXiv:2410.14606. Their code, here called the original: github.com/mohmdelsayed/streaming-drl. The
first paper has published no code for its streaming experiments.

Differences from the original:
 1. A pruned weight is not stored: values, gradients and traces are vectors over the active
    weights, and the norm that bounds the step is theirs.
 2. Forward and backward pass are compiled loops over one sample, without autograd; the backward
    pass decays the traces and adds the gradient to them in one go. --sparse-kernel dense does the
    same in plain PyTorch.
 3. The policy is run once a step: acting and learning share its forward pass, because no weight
    changes between them.
 4. Actions are drawn from numpy's generator, there from torch's: no run repeats one of theirs
    number by number.
 5. The training environment is seeded anew at every reset from (seed, episode), so that a resumed
    run repeats the uninterrupted one in any environment whose seed decides everything; there, one
    generator runs on.
 6. The deterministic policy is evaluated now and then, in an environment of its own; there, only
    the returns of training are looked at (here: episode/return).

In this file: flags, networks, normaliser, gradient and optimiser, agent, update; then `train`, the
whole of training; then the compiled loops; then an appendix that this file shares with the others:
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
from collections import deque
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
from torch.nn.utils import get_total_norm, parameters_to_vector, vector_to_parameters
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm


@dataclass
class Args:
    # A condition beside a type is checked at the start; x is the flag's value. A flag that you add
    # gives a run another folder, unless EXECUTION_FLAGS (below train) has its name.

    # Experiment
    exp_name: str = "stream_ac_sparse"
    """part of the run's name"""
    seed: Annotated[int, "0 <= x < 2**32"] = 1
    """seed of networks, exploration and environments (below 2^32)"""
    device: Literal["auto", "cpu"] = "auto"
    """where the networks live: always the CPU, which is faster for one sample at a time"""
    threads: Annotated[int, "1 <= x <= 10**4"] = 1
    """CPU threads of PyTorch, used by diagnostics and by --sparse-kernel dense;
    the compiled loops always run on one"""
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
    and --mask-seed); all but the statistics of observations starts afresh"""
    capture_video: bool = False
    """film the first episode of the last evaluation (or of --eval-only) as mp4"""

    # Environment
    env_id: str = "Walker2d-v4"
    """any Gymnasium id with Box (or Dict of Box) observations and Box actions;
    dm_control/* through Shimmy"""
    total_timesteps: Annotated[int, "x >= 1"] = 2_000_000
    """env steps of training"""
    max_episode_steps: Annotated[int | None, "x >= 1"] = None
    """env steps after which an episode is cut off (default: the environment's own limit)"""
    env_kwargs: str | None = None
    """arguments of the environment as JSON, such as '{"reset_noise_scale": 0.2}'"""

    # Algorithm (appendix C.2 of the paper: the values of the original)
    learning_starts: Annotated[int, "x >= 0"] = 0
    """env steps of uniformly random actions before the first update"""
    gamma: Annotated[float, "0 <= x <= 1"] = 0.99
    """discount"""
    trace_lambda: Annotated[float, "0 <= x <= 1"] = 0.8
    """the eligibility traces decay by gamma * trace_lambda a step"""
    learning_rate: Annotated[float, "0 < x < inf"] = 1.0
    """the largest step size of ObGD"""
    actor_kappa: Annotated[float, "0 < x < inf"] = 3.0
    """how tightly ObGD bounds the actor's steps: the larger, the smaller the steps"""
    critic_kappa: Annotated[float, "0 < x < inf"] = 2.0
    """how tightly ObGD bounds the critic's steps: the larger, the smaller the steps"""
    entropy_coefficient: Annotated[float, "0 <= x < inf"] = 0.01
    """weight of the entropy bonus, whose sign is that of the TD error"""
    init: Literal["sparse_init", "lecun"] = "sparse_init"
    """initial weights: lecun is uniform in +-1/sqrt(fan_in);
    sparse_init then sets 90 percent of each row to zero, and trains them like the rest"""
    bootstrap_on_truncation: bool = False
    """value what follows a time limit; the original treats it as the end of the task"""

    # Size and sparsity
    width_scale: Annotated[float, "1/128 <= x <= 1000"] = 1.0
    """hidden units of actor and critic: 128 x scale"""
    depth_scale: Annotated[int, "1 <= x <= 1000"] = 1
    """hidden layers of actor and critic: 1 + scale"""
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
    """how the networks are run (auto and packed: compiled loops over active weights;
    dense: PyTorch with autograd, slower, for new networks);
    a resumed run is bit-equal only with the same kernel"""

    # Logging
    eval_interval: Annotated[int, "x >= 1"] = 100_000
    """env steps between evaluations, the first at step 0"""
    eval_episodes: Annotated[int, "1 <= x <= 10**6"] = 10
    """episodes of each evaluation (deterministic policy)"""
    final_eval_episodes: Annotated[int, "1 <= x <= 10**6"] = 100
    """episodes of the last evaluation and of --eval-only"""
    diagnostics_interval: Annotated[int, "x >= 0"] = 100_000
    """env steps between measurements of rank, dormancy and norms (0: never)"""
    track: bool = False
    """log to Weights & Biases as well (WANDB_MODE=offline needs no account)"""
    wandb_project: str = "sparse_zoo"
    """Weights & Biases project of --track"""
    wandb_entity: str | None = None
    """Weights & Biases team of --track (default: your own account)"""

    # Checkpoints
    checkpoint_interval: Annotated[int, "x >= 1"] = 100_000
    """env steps between checkpoints, each written at the next end of an episode"""


def sparse_init(weight: torch.Tensor, sparsity: float = 0.9) -> None:
    """Zeroes ceil(sparsity * in) random entries of each row of a weight (out, in).

    Elsayed et al. 2024, Algorithm 1.
    """
    zeros = math.ceil(sparsity * weight.shape[1])
    places = torch.rand_like(weight).argsort(1)[:, :zeros]
    weight.scatter_(1, places, 0.0)


class MLP(nn.Module):
    """Linear layers, each with LayerNorm (no parameters) and leaky ReLU; then linear heads.

    The compiled loops know this network and no other: a new one needs --sparse-kernel dense.
    """

    def __init__(self, inputs: int, hidden: int, layers: int, heads: list[int], init: str):
        super().__init__()
        self.encoder = nn.Sequential()
        for fan_in, fan_out in pairwise([inputs] + [hidden] * layers):
            self.encoder.append(nn.Linear(fan_in, fan_out))
            self.encoder.append(nn.LayerNorm(fan_out, elementwise_affine=False))
            self.encoder.append(nn.LeakyReLU())
        self.heads = nn.ModuleList(nn.Linear(hidden, outputs) for outputs in heads)
        for linear in self.modules():
            if not isinstance(linear, nn.Linear):
                continue
            bound = 1 / math.sqrt(linear.in_features)
            nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.zeros_(linear.bias)
            if init == "sparse_init":
                sparse_init(linear.weight.data)

    def forward(self, state):
        """(..., inputs) -> (..., sum of heads)"""
        features = self.encoder(state)  # (..., hidden)
        return torch.cat([head(features) for head in self.heads], -1)


class Statistics:
    """Mean and unbiased variance of a stream of arrays (Welford 1962)."""

    def __init__(self, shape: tuple[int, ...] = ()):
        self.count = 0
        self.mean = np.zeros(shape)
        self.squares = np.zeros(shape)  # sum of squared differences from the mean

    def update(self, x) -> None:
        self.count += 1
        difference = x - self.mean
        self.mean = self.mean + difference / self.count
        self.squares = self.squares + difference * (x - self.mean)

    def std(self):
        """With epsilon; 1 before the second sample."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 1.0
        return np.sqrt(variance + 1e-8)


class Normalizer:
    """What the agent sees: normalised observations, the time in the episode, scaled rewards."""

    def __init__(self, obs_dim: int, gamma: float, episode_limit: float):
        self.obs = Statistics((obs_dim,))
        self.reward = Statistics()
        self.reward_trace = 0.0
        self.gamma = gamma
        self.episode_limit = episode_limit

    def state(self, obs: np.ndarray, length: int, update: bool = True) -> np.ndarray:
        """Network input (obs_dim + 1,) float32 for an observation after `length` steps.

        The last entry is the time: it grows from -0.5 to nearly 0.5 over an episode, and starts to
        move with the second step, as in the original.
        """
        if update:
            self.obs.update(obs)
        state = np.empty(len(obs) + 1, np.float32)
        state[:-1] = (obs - self.obs.mean) / self.obs.std()
        state[-1] = max(length - 1, 0) / self.episode_limit - 0.5
        return state

    def scale(self, reward: float, done: bool) -> float:
        """The reward over the std of the discounted sum of rewards.

        As in the original, the sum starts anew with an episode's last reward, not after it.
        """
        self.reward_trace = float(self.reward_trace * self.gamma * (1 - done) + reward)
        self.reward.update(self.reward_trace)
        return float(reward / self.reward.std())

    def state_dict(self) -> dict:
        statistics = [
            {name: torch.as_tensor(value) for name, value in vars(part).items()}
            for part in (self.obs, self.reward)
        ]
        return {"statistics": statistics, "reward_trace": self.reward_trace}

    def load_state_dict(self, state: dict) -> None:
        self.reward_trace = state["reward_trace"]
        for part, saved in zip((self.obs, self.reward), state["statistics"]):
            for name, value in saved.items():
                if value.shape != np.shape(getattr(part, name)):
                    raise ValueError(f"{name} has the shape {tuple(value.shape)}")
                setattr(part, name, value.numpy()[()])  # [()]: a number stays a number


class Transition(NamedTuple):
    """One step, as the agent sees it."""

    state: np.ndarray  # (obs_dim + 1,) float32
    action: np.ndarray  # (action_dim,), before it is clipped
    reward: float  # scaled
    next_state: np.ndarray
    terminal: bool  # no bootstrap from next_state: the task has ended, or (by default) its time


# LLVM's fast-math flags that change rounding alone: sums may be vectorised, NaN and infinity stay
REORDER = {"reassoc", "contract", "nsz"}


@numba.njit
def policy_gradient(output, action, direction, entropy_coefficient):
    """Gradient of -log pi(a|s) - entropy_coefficient * direction * entropy, (2 * action_dim,)

    It is taken with respect to the actor's output: the mean of a Gaussian and, before softplus,
    its std. The direction is the sign of the TD error.
    """
    mean = output[: len(action)]
    raw = output[len(action) :]
    std = np.log1p(np.exp(-np.abs(raw))) + np.maximum(raw, 0)  # softplus that does not overflow
    error = action - mean
    grad_mean = -error / std**2
    grad_std = (1 - (error / std) ** 2 - entropy_coefficient * direction) / std
    grad_raw = grad_std / (1 + np.exp(-raw))  # the slope of softplus is a sigmoid
    return np.concatenate((grad_mean, grad_raw)).astype(np.float32)


@numba.njit(fastmath=REORDER)
def bounded_step(weights, traces, delta, learning_rate, kappa):
    """ObGD (Elsayed et al., Algorithm 3): weights <- weights - step_size * delta * traces.

    Returns the step size.
    """
    norm = np.float32(0)
    for k in range(len(traces)):
        norm += abs(traces[k])
    bound = learning_rate * kappa * max(1.0, abs(delta)) * norm
    step_size = learning_rate / max(1.0, bound)
    step = np.float32(step_size * delta)
    for k in range(len(weights)):
        weights[k] -= step * traces[k]
    return step_size


class StreamingNetwork:
    """An MLP with its eligibility traces and its optimiser, ObGD; one sample at a time.

    Weights and traces are two flat vectors. The parameters of `mlp` are views of the first, and
    their .grad views of the second: a trace is a gradient that is decayed instead of cleared, and
    autograd adds to it as the compiled loops do.
    """

    def __init__(self, mlp: MLP, kappa: float, args: Args):
        self.mlp = mlp
        self.kappa = kappa
        self.learning_rate = args.learning_rate
        self.decay = np.float32(args.gamma * args.trace_lambda)
        parameters = list(mlp.parameters())
        weights = parameters_to_vector(parameters).detach()
        vector_to_parameters(weights, parameters)  # makes them views of the vector
        traces = torch.zeros_like(weights)
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, trace in zip(parameters, traces.split(sizes)):
            parameter.grad = trace.view_as(parameter)
        self.weights = weights.numpy()
        self.traces = traces.numpy()
        self.loops = None if args.sparse_kernel == "dense" else loop_arrays(mlp)

    def __call__(self, state: np.ndarray) -> np.ndarray:
        """(inputs,) -> (outputs,); the next step differentiates the last call."""
        if self.loops:
            return forward(*self.loops, state)
        self.output = self.mlp(torch.from_numpy(state))
        return self.output.detach().numpy()

    def step(self, grad: np.ndarray, delta: float, done: bool) -> float:
        """One step for a loss with gradient `grad` (outputs,) and a TD error; the step size."""
        if self.loops:
            backward(*self.loops, grad, self.decay)
        else:
            self.traces *= self.decay
            self.output.backward(torch.from_numpy(grad))
        step_size = bounded_step(self.weights, self.traces, delta, self.learning_rate, self.kappa)
        if done:
            self.traces[:] = 0
        return step_size

    def layer_table(self) -> list[dict]:
        """What the network stores, layer by layer, and how it is run."""
        rows = layer_table(self.mlp)
        for row in rows[:-1]:  # the last is of biases and norms
            row["kernel"] = "compiled" if self.loops else row["kernel"]
        return rows


class Agent:
    """Actor and critic, drawn from torch's generator and pruned with masks from --mask-seed."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        inputs = obs_dim + 1  # the time in the episode
        hidden = round(128 * args.width_scale)
        layers = 1 + args.depth_scale
        if args.init == "sparse_init" and hidden < 10:
            raise NetworkError(
                f"--init sparse_init sets all weights behind {hidden} hidden units to zero, and "
                "such a network cannot learn; use --init lecun, or at least 10 hidden units"
            )
        actor = MLP(inputs, hidden, layers, [action_dim, action_dim], args.init)
        critic = MLP(inputs, hidden, layers, [1], args.init)

        # Prune each network once
        actor_sparsity = args.sparsity if args.actor_sparsity is None else args.actor_sparsity
        critic_sparsity = args.sparsity if args.critic_sparsity is None else args.critic_sparsity
        mask_seed = args.seed if args.mask_seed is None else args.mask_seed
        prune = partial(
            sparsify,
            distribution=args.sparsity_distribution,
            kernel=args.sparse_kernel,
            device=torch.device(args.device.replace("auto", "cpu")),
        )
        prune(actor, actor_sparsity, mask_seed=derive_seed(mask_seed, 0))
        prune(critic, critic_sparsity, mask_seed=derive_seed(mask_seed, 1))
        self.actor = StreamingNetwork(actor, args.actor_kappa, args)
        self.critic = StreamingNetwork(critic, args.critic_kappa, args)

        # Check what update and diagnostics rely on: a changed network fails here, in one sentence
        states = torch.linspace(-1, 1, 3 * inputs).view(3, inputs)
        for name, outputs in (("actor", 2 * action_dim), ("critic", 1)):
            network = getattr(self, name)
            check_shape(f"{name}.mlp", network.mlp(states), batch=3, outputs=outputs)
            check_shape(f"{name}.mlp", network.mlp(states[0]), outputs=outputs)
            check_encoder(network.mlp, "encoder", states)
            check_loops(name, network, states[0])


def td_error(transition: Transition, value, next_value, gamma: float):
    """delta = r + gamma * (1 - terminal) * V(s') - V(s)"""
    return transition.reward + gamma * (1 - transition.terminal) * next_value - value


def update(
    agent: Agent, transition: Transition, output: np.ndarray, done: bool, args: Args
) -> tuple[float, float, float]:
    """Learns from one transition; `done` where an episode ends, `output` of the actor.

    The actor must have been run on the transition's state last. Returns the TD error and the step
    sizes of actor and critic.
    """
    next_value = float(agent.critic(transition.next_state)[0])
    # The critic runs on the state last, because its step differentiates the last call
    value = float(agent.critic(transition.state)[0])
    delta = td_error(transition, value, next_value, args.gamma)

    actor_grad = policy_gradient(
        output, transition.action, np.sign(delta), args.entropy_coefficient
    )
    critic_grad = np.array([-1], np.float32)  # of the loss -V(s)
    actor_step = agent.actor.step(actor_grad, delta, done)
    critic_step = agent.critic.step(critic_grad, delta, done)
    return delta, actor_step, critic_step


def act(
    agent: Agent, state: np.ndarray, noise: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """The action mean + std * noise (action_dim,), and the actor's output that `update` needs."""
    output = agent.actor(state)  # (2 * action_dim,)
    half = len(output) // 2
    std = np.logaddexp(0, output[half:])  # softplus
    return output[:half] + np.float32(noise) * std, output


def evaluate(
    agent: Agent,
    norm: Normalizer,
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
        length = 0
        done = False
        while not done:
            if video and episode == 0 and len(frames) < LONGEST_FILM:
                frames.append(env.render())
            action, _ = act(agent, norm.state(obs, length, update=False))
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[episode] += reward
            length += 1
            done = terminated or truncated
    if video:
        write_video(video, frames)
    return summary(returns)


class Recent:
    """The last transitions, for diagnostics alone."""

    def __init__(self, size: int = 256):
        self.transitions = deque(maxlen=size)

    def columns(self) -> list[torch.Tensor]:
        """One tensor (transitions, ...) for each part of a transition."""
        columns = zip(*self.transitions)
        return [torch.as_tensor(np.array(column), dtype=torch.float32) for column in columns]

    def state_dict(self) -> dict:
        return {"columns": self.columns()}

    def load_state_dict(self, state: dict) -> None:
        self.transitions.extend(zip(*(column.numpy() for column in state["columns"])))


def diagnose(agent: Agent, recent: Recent, args: Args) -> dict[str, float]:
    """Plasticity measurements of actor and critic on the last transitions.

    The gradient is that of a step without traces: the mean of delta times the gradient of each
    transition's loss.
    """
    columns = Transition(*recent.columns())  # (transitions, ...) each
    state = columns.state
    with torch.no_grad():
        value = agent.critic.mlp(state)[:, 0]  # (transitions,)
        next_value = agent.critic.mlp(columns.next_state)[:, 0]
        delta = td_error(columns, value, next_value, args.gamma)
        outputs = agent.actor.mlp(state)  # (transitions, 2 * action_dim)
    samples = zip(outputs.numpy(), columns.action.numpy(), delta.sign().numpy())
    actor_grad = [policy_gradient(*sample, args.entropy_coefficient) for sample in samples]
    measured = {}
    for name, output_grad in (
        ("actor", torch.tensor(np.array(actor_grad))),
        ("critic", -torch.ones(len(state), 1)),
    ):
        mlp = getattr(agent, name).mlp
        parameters = list(mlp.parameters())
        mean_grad = delta[:, None] * output_grad / len(state)  # (transitions, outputs)
        gradients = torch.autograd.grad(mlp(state), parameters, mean_grad)
        plasticity = measure_plasticity(mlp.encoder, state, parameters, gradients)
        measured |= {f"{name}_{metric}": value for metric, value in plasticity.items()}
    return measured


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """Flat observations, actions clipped to their bounds; counts returns and lengths."""
    env = open_env(args, render_mode)  # its Gate (appendix) clips actions
    return gym.wrappers.RecordEpisodeStatistics(env)


def check_numbers(agent_step: int, *numbers: float) -> None:
    """stop_unless_finite for plain numbers: making tensors of them would slow the stream down."""
    if not all(map(math.isfinite, numbers)):
        stop_unless_finite(agent_step, torch.tensor(math.nan))


def load_policy(run_dir: str | Path, render_mode: str | None = None) -> tuple[Callable, gym.Env]:
    """The policy of a trained run without noise, obs -> action, and its environment."""
    run = open_run(run_dir, render_mode)
    env = make_env(run.args, render_mode)
    (obs_dim,) = env.observation_space.shape
    (action_dim,) = env.action_space.shape
    agent = Agent(run.args, obs_dim, action_dim)
    norm = Normalizer(obs_dim, run.args.gamma, episode_limit(env))
    run.load({"actor": agent.actor.mlp, "norm": norm})

    def policy(obs: np.ndarray) -> np.ndarray:
        state = norm.state(obs, env.episode_lengths, update=False)
        return act(agent, state)[0]

    return policy, env


def train(args: Args) -> None:
    """A whole run: trains, evaluates, measures and saves, or goes on where it was stopped."""
    set_up_process(args)  # checks the flags, seeds all generators
    torch.set_num_threads(args.threads)
    env = make_env(args)
    eval_env = make_env(args, "rgb_array" if args.capture_video else None)
    (obs_dim,) = env.observation_space.shape
    (action_dim,) = env.action_space.shape

    try:
        agent = Agent(args, obs_dim, action_dim)
    except NetworkError as error:
        fail(str(error))
    norm = Normalizer(obs_dim, args.gamma, episode_limit(env))
    recent = Recent()
    run = Run(args)

    # What a checkpoint holds, in this order; no traces, which are zero between two episodes
    parts = {
        "actor": agent.actor.mlp,
        "critic": agent.critic.mlp,
        "norm": norm,
        "recent": recent,
    }

    def evaluation(episodes: int, purpose: int, video: Path | None = None) -> dict[str, float]:
        eval_env.set_wrapper_attr("env_step", run.env_step)  # for error messages
        seed_key = (args.seed, purpose, run.agent_step)
        return evaluate(agent, norm, eval_env, episodes, seed_key, video)

    def check_weights() -> None:
        check_numbers(run.agent_step, agent.actor.weights.sum(), agent.critic.weights.sum())

    run.restore(parts)
    if args.init_from and run.agent_step == 0:  # that run's rewards may have another scale
        norm.reward, norm.reward_trace = Statistics(), 0.0
    if args.eval_only:
        run.print_result(evaluation(args.final_eval_episodes, FINAL, run.video()))
        return

    run.begin({"actor": agent.actor.layer_table(), "critic": agent.critic.layer_table()})
    env.set_wrapper_attr("env_step", run.env_step)  # for error messages
    episode_over = True
    if run.agent_step == 0:
        run.log("eval", evaluation(args.eval_episodes, EVAL))

    while run.agent_step < args.total_timesteps:
        if episode_over:
            if run.checkpoint_due():
                check_weights()
                run.save(parts)
            obs, _ = env.reset(seed=derive_seed(args.seed, TRAIN, run.episode))
            state = norm.state(obs, 0)
            run.episode += 1
            length = 0
            absolute_errors = 0.0
            first_update = run.update_step

        # Act: at random at first, then by the policy
        learning = run.agent_step >= args.learning_starts
        if learning:
            action, output = act(agent, state, np.random.standard_normal(action_dim))
            check_numbers(run.agent_step, output.sum())
        else:
            part = np.random.random(action_dim)  # of the way from low to high
            action = (1 - part) * env.action_space.low + part * env.action_space.high
        obs, reward, terminated, truncated, info = env.step(action)
        length += 1
        episode_over = terminated or truncated
        next_state = norm.state(obs, length)
        reward = norm.scale(reward, episode_over)
        terminal = terminated or (truncated and not args.bootstrap_on_truncation)
        transition = Transition(state, action, reward, next_state, terminal)
        recent.transitions.append(transition)
        state = next_state
        run.count_decision()

        # Learn, where the policy has acted
        if learning:
            delta, actor_step, critic_step = update(agent, transition, output, episode_over, args)
            check_numbers(run.agent_step, delta)
            absolute_errors += abs(delta)
            run.update_step += 1

        # Measure
        if run.due(args.eval_interval):
            run.log_evaluation(evaluation(args.eval_episodes, EVAL))
        if run.due(args.diagnostics_interval):
            check_weights()
            run.log("diagnostics", diagnose(agent, recent, args))

        if episode_over:
            losses = {}
            updates = run.update_step - first_update
            if updates > 0:
                losses = {
                    "absolute_td_error": absolute_errors / updates,
                    "actor_step_size": actor_step,
                    "critic_step_size": critic_step,
                }
            run.log_episode(info["episode"], losses)

    check_weights()
    run.save(parts)  # a kill in the last evaluation costs no training
    run.finish(parts, evaluation(args.final_eval_episodes, FINAL, run.video()))


# Flags that change results by rounding at most: a run may go on with others.
# All other flags are in the name of the run's folder, as a hash.
EXECUTION_FLAGS = {
    "device",
    "threads",
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

# Nothing here depends on --total-timesteps: a run that is asked for more goes on.
LONGER_GOES_ON = True


# Compiled loops: forward and backward pass of an MLP for one sample
#
# A linear layer is a plain tuple of numpy arrays here (a NamedTuple would be compiled anew in every
# run):
#   weight, weight_trace   (active weights,), views of the network's flat vectors
#   bias, bias_trace       (out,), likewise
#   pointers               (groups + 1,): group g of row g % out holds the weights
#                          pointers[g] <= k < pointers[g + 1]; blocks of 128 columns if the layer is
#                          sparse, whole rows if it is dense
#   col                    (active weights,), or empty if the layer is dense
#   last_x                 (in,), the input of the last forward pass
#   inverse_std            (1,), 1 / std in the LayerNorm behind, of the last forward pass


def loop_arrays(mlp: MLP) -> tuple[tuple, tuple]:
    """The hidden layers and the heads of an MLP, as the loops see them."""
    linear = nn.Linear | SparseLinear
    hidden = tuple(layer_arrays(layer) for layer in mlp.encoder if isinstance(layer, linear))
    return hidden, tuple(layer_arrays(head) for head in mlp.heads)


def layer_arrays(layer: nn.Module) -> tuple[np.ndarray, ...]:
    """A linear layer, dense or sparse, as the loops see it."""
    if isinstance(layer, SparseLinear):
        weight = layer.values
        rows, columns = layer.shape
        col = layer.index % columns
        _, pointers = sort_into_blocks(layer.index // columns, col, layer.shape)
    else:
        weight = layer.weight
        rows, columns = weight.shape
        col = torch.empty(0)
        pointers = torch.arange(rows + 1) * columns
    arrays = [
        weight.data.flatten(),
        weight.grad.flatten(),
        layer.bias.data,
        layer.bias.grad,
        pointers.to(torch.uint32),  # unsigned: numba then leaves out what an index below 0 needs
        col.to(torch.uint32),
        torch.zeros(columns),
        torch.zeros(1),
    ]
    return tuple(array.numpy() for array in arrays)


def check_loops(name: str, network: StreamingNetwork, state: torch.Tensor) -> None:
    """Raises NetworkError, in one sentence, if the loops do not compute what the MLP does.

    Compares the gradient of the outputs' sum. The traces are zero before and after.
    """
    if not network.loops:
        return
    parameters = list(network.mlp.parameters())
    output = network.mlp(state).sum()
    gradients = torch.autograd.grad(output, parameters, materialize_grads=True)
    expected = parameters_to_vector(gradients).numpy()
    looped = network(state.numpy())
    backward(*network.loops, np.ones_like(looped), network.decay)
    if not np.allclose(network.traces, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max()):
        raise NetworkError(
            f"the compiled loops do not compute what {name}.mlp does; "
            "change them too, or use --sparse-kernel dense"
        )
    network.traces[:] = 0


@numba.njit(fastmath=REORDER)
def linear(layer, x):
    """y = W x + b for one sample, (in,) -> (out,); remembers x."""
    weight, _, bias, _, pointers, col, last_x, _ = layer
    last_x[:] = x
    y = bias.copy()
    for group in range(len(pointers) - 1):
        start = pointers[group]
        end = pointers[group + 1]
        dot = np.float32(0)
        if len(col) > 0:
            for k in range(start, end):
                dot += weight[k] * x[col[k]]
        else:
            for k in range(start, end):
                dot += weight[k] * x[k - start]
        y[group % len(y)] += dot
    return y


@numba.njit(fastmath=REORDER)
def linear_backward(layer, grad, decay):
    """traces <- decay * traces + gradient, for grad (out,) of y; returns W^T grad, (in,)."""
    weight, weight_trace, bias, bias_trace, pointers, col, x, _ = layer
    grad_x = np.zeros_like(x)
    for row in range(len(bias)):
        bias_trace[row] = decay * bias_trace[row] + grad[row]
    for group in range(len(pointers) - 1):
        start = pointers[group]
        end = pointers[group + 1]
        g = grad[group % len(bias)]
        if len(col) > 0:
            for k in range(start, end):
                weight_trace[k] = decay * weight_trace[k] + g * x[col[k]]
                grad_x[col[k]] += g * weight[k]
        else:
            for k in range(start, end):
                weight_trace[k] = decay * weight_trace[k] + g * x[k - start]
                grad_x[k - start] += g * weight[k]
    return grad_x


@numba.njit(fastmath=REORDER)
def forward(hidden, heads, state):
    """The heads' outputs for one state, one behind the other; every layer remembers its input."""
    x = state
    for layer in hidden:
        y = linear(layer, x)
        _, _, _, _, _, _, _, inverse_std = layer
        y -= y.mean()
        inverse_std[0] = 1 / np.sqrt((y * y).mean() + 1e-5)  # PyTorch's epsilon
        y *= inverse_std[0]
        x = np.where(y > 0, y, np.float32(0.01) * y)  # leaky ReLU
    output = np.empty(0, np.float32)
    for head in heads:
        output = np.append(output, linear(head, x))
    return output


@numba.njit(fastmath=REORDER)
def backward(hidden, heads, grad_output, decay):
    """traces <- decay * traces + the gradient of <grad_output, output> of the last forward pass"""
    _, _, _, _, _, _, x, _ = heads[0]  # the features that the heads were given
    grad = np.zeros_like(x)
    first = 0
    for head in heads:
        _, _, bias, _, _, _, _, _ = head
        outputs = len(bias)
        grad += linear_backward(head, grad_output[first : first + outputs], decay)
        first += outputs
    for i in range(len(hidden) - 1, -1, -1):
        _, _, _, _, _, _, last_x, inverse_std = hidden[i]
        slope = np.where(x > 0, np.float32(1), np.float32(0.01))  # of the leaky ReLU
        normed = x / slope
        grad *= slope

        # Through the LayerNorm: no change of the mean, and none along the normalised values
        along = (grad * normed).mean()
        grad = inverse_std[0] * (grad - grad.mean() - normed * along)

        x = last_x
        grad = linear_backward(hidden[i], grad, decay)


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
