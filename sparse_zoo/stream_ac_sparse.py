# docs: docs/stream_ac_sparse.md
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "numba==0.68.1", "scipy==1.17.1", "tyro==1.0.17", "tqdm==4.70.1",
#     "gymnasium==1.4.0", "shimmy==2.0.1", "dm-control==1.0.50", "mujoco==3.17.0", "filelock==4.2.11",
#     "matplotlib==3.11.2", "pandas==3.1.1", "imageio==2.38.1", "imageio-ffmpeg==0.8.1", "tensorboard==2.21.0",
#     "wandb==0.31.0",
# ]
# ///
"""Stream AC(lambda), a streaming actor-critic, with static sparsity.

Before training, a random set of weights is removed once; the survivors are trained as usual. Every transition is used
once, as it comes, and forgotten: there is no replay, no batch and no target network. Eligibility traces carry credit
back in time, and ObGD bounds each step so that it cannot overshoot.

Papers: Network Sparsity Unlocks the Scaling Potential of Deep RL (Ma, Li et al., ICML 2025); Streaming Deep
Reinforcement Learning Finally Works (Elsayed, Vasan and Mahmood, 2024), arXiv:2410.14606.

Differences from the code of Elsayed et al. (the paper has published none for its streaming experiments):
 1. A pruned weight is not stored: values, gradients and traces are vectors over the active weights, and the norm that
    bounds the step is theirs.
 2. Forward and backward pass are compiled loops over one sample, without autograd; the backward pass decays the traces
    and adds to them in one go. --sparse-kernel dense does the same in plain PyTorch.
 3. The policy is run once a step: acting and learning share its forward pass, between which no weight changes.
 4. Actions are drawn from numpy's generator, not torch's, so no run repeats one of theirs number by number.
 5. The training environment is seeded anew at every reset from (seed, episode), so that a resumed run repeats the
    uninterrupted one in any environment; there, one generator runs on.
 6. The deterministic policy is evaluated now and then, in an environment of its own; there, only the returns of
    training are looked at (here: episode/return).
"""

import hashlib
import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
import time
import warnings
from collections import deque
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from itertools import pairwise
from pathlib import Path
from typing import Literal, NoReturn

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
    exp_name: str = "stream_ac_sparse"
    """part of the run's name"""
    seed: int = 1
    """seed of networks, exploration and environments (below 2^32)"""
    device: Literal["auto", "cpu"] = "auto"
    """one sample at a time is work for a CPU: auto is cpu"""
    threads: int = 1
    """CPU threads of PyTorch, which serves diagnostics (and all with --sparse-kernel dense); the stream runs on one"""
    runs_dir: str = "runs"
    """folder that holds one folder per run"""
    resume: bool = True
    """go on from the run's checkpoint; --no-resume moves the old run aside and starts afresh"""
    eval_only: bool = False
    """evaluate this command's checkpoint for its --final-eval-episodes episodes and stop"""
    capture_video: bool = False
    """film the first episode of the last evaluation (or of --eval-only) as mp4"""

    # Environment
    env_id: str = "Walker2d-v4"
    """any Gymnasium id with Box (or Dict of Box) observations and Box actions; dm_control/* through Shimmy"""
    total_timesteps: int = 2_000_000
    """env steps of training"""

    # Algorithm (appendix C.2 of the paper: the values of Elsayed et al.)
    learning_starts: int = 0
    """env steps of uniformly random actions before the first update"""
    gamma: float = 0.99
    """discount"""
    trace_lambda: float = 0.8
    """the eligibility traces decay by gamma * trace_lambda a step"""
    learning_rate: float = 1.0
    """the largest step of ObGD"""
    actor_kappa: float = 3.0
    """how far ObGD bounds the actor's steps: the larger, the smaller they are"""
    critic_kappa: float = 2.0
    """the same of the critic"""
    entropy_coefficient: float = 0.01
    """weight of the entropy bonus, whose sign is that of the TD error"""
    init: Literal["sparse_init", "lecun"] = "sparse_init"
    """initial weights: uniform in +-1/sqrt(fan_in); SparseInit sets 90 percent of each row to zero and trains them"""
    bootstrap_on_truncation: bool = False
    """value what follows a time limit; the original treats it as the end of the task"""

    # Size and sparsity
    width_scale: float = 1.0
    """hidden units of actor and critic: 128 x scale"""
    depth_scale: int = 1
    """hidden layers of actor and critic: 1 + scale"""
    sparsity: float = 0.0
    """fraction of parameters removed from the actor and from the critic"""
    actor_sparsity: float | None = None
    """of the actor alone (default: --sparsity)"""
    critic_sparsity: float | None = None
    """of the critic alone (default: --sparsity)"""
    sparsity_distribution: Literal["erdos_renyi", "uniform"] = "erdos_renyi"
    """how a network's sparsity is spread over its layers"""
    mask_seed: int | None = None
    """seed of the random pruning (default: --seed)"""
    sparse_kernel: Literal["auto", "packed", "dense"] = "auto"
    """auto, packed: compiled loops over active weights; dense: PyTorch with autograd, slower, for new networks"""

    # Logging
    eval_interval: int = 100_000
    """env steps between evaluations, the first at step 0"""
    eval_episodes: int = 10
    """episodes of each evaluation (deterministic policy)"""
    final_eval_episodes: int = 100
    """episodes of the last evaluation and of --eval-only"""
    diagnostics_interval: int = 100_000
    """env steps between measurements of rank, dormancy and norms (0: never)"""
    track: bool = False
    """log to Weights & Biases as well (WANDB_MODE=offline needs no account)"""
    wandb_project: str = "sparse_zoo"
    """project of --track"""
    wandb_entity: str | None = None
    """team of --track"""

    # Checkpoints
    checkpoint_interval: int = 100_000
    """env steps between checkpoints, each written at the next end of an episode"""


def sparse_init(weight: torch.Tensor, sparsity: float = 0.9) -> None:
    """Zeroes ceil(sparsity * fan_in) random entries of each row of (out, in); Elsayed et al. 2024, Algorithm 1."""
    zeros = math.ceil(sparsity * weight.shape[1])
    weight.scatter_(1, torch.rand_like(weight).argsort(1)[:, :zeros], 0.0)


class MLP(nn.Module):
    """Linear layers with LayerNorm (no parameters) and leaky ReLU, then linear heads side by side."""

    def __init__(self, inputs: int, hidden: int, layers: int, heads: list[int], init: str):
        super().__init__()
        sizes = [inputs] + [hidden] * layers
        self.encoder = nn.Sequential()
        for fan_in, fan_out in pairwise(sizes):
            block = (
                nn.Linear(fan_in, fan_out),
                nn.LayerNorm(fan_out, elementwise_affine=False),
                nn.LeakyReLU(),
            )
            self.encoder.extend(block)
        self.heads = nn.ModuleList(nn.Linear(hidden, outputs) for outputs in heads)
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            nn.init.uniform_(
                linear.weight, -1 / math.sqrt(linear.in_features), 1 / math.sqrt(linear.in_features)
            )
            nn.init.zeros_(linear.bias)
            if init == "sparse_init":
                sparse_init(linear.weight.data)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., sum of heads)"""
        features = self.encoder(state)
        return torch.cat([head(features) for head in self.heads], -1)


class Statistics:
    """Mean and unbiased variance of a stream of arrays (Welford 1962)."""

    def __init__(self, shape: tuple[int, ...] = ()):
        self.count, self.mean, self.squares = 0, np.zeros(shape), np.zeros(shape)

    def update(self, x) -> None:
        self.count += 1
        difference = x - self.mean
        self.mean = self.mean + difference / self.count
        self.squares = self.squares + difference * (x - self.mean)

    def std(self):
        """With epsilon; 1 before the second sample."""
        return np.sqrt((self.squares / (self.count - 1) if self.count > 1 else 1.0) + 1e-8)


class Normalizer:
    """What the agent sees: normalised observations with the time in the episode, and scaled rewards."""

    def __init__(self, obs_dim: int, gamma: float, episode_limit: float):
        self.obs, self.reward, self.reward_trace = Statistics((obs_dim,)), Statistics(), 0.0
        self.gamma, self.episode_limit = gamma, episode_limit

    def state(self, obs: np.ndarray, length: int, update: bool = True) -> np.ndarray:
        """Observation after `length` steps of an episode -> network input (obs_dim + 1,), float32.

        The last entry grows from -0.5 to nearly 0.5; it starts to move with the second step, as in the original.
        """
        if update:
            self.obs.update(obs)
        state = np.empty(len(obs) + 1, np.float32)
        state[:-1] = (obs - self.obs.mean) / self.obs.std()
        state[-1] = max(length - 1, 0) / self.episode_limit - 0.5
        return state

    def scale(self, reward: float, done: bool) -> float:
        """The reward over the std of the discounted sum of rewards, which starts anew with an episode's last reward."""
        self.reward_trace = float(self.reward_trace * self.gamma * (1 - done) + reward)
        self.reward.update(self.reward_trace)
        return float(reward / self.reward.std())

    def state_dict(self) -> dict:
        parts = (self.obs, self.reward)
        statistics = [
            {key: torch.as_tensor(value) for key, value in vars(part).items()} for part in parts
        ]
        return {"statistics": statistics, "reward_trace": self.reward_trace}

    def load_state_dict(self, state: dict) -> None:
        self.reward_trace = state["reward_trace"]
        for part, tensors in zip((self.obs, self.reward), state["statistics"]):
            vars(part).update({key: tensor.numpy()[()] for key, tensor in tensors.items()})


@numba.njit(cache=True)
def policy_gradient(output, action, direction, entropy_coefficient):
    """Gradient of -log pi(a|s) - entropy_coefficient * direction * entropy with respect to the actor's output.

    The output (2 * action_dim,) is the mean and, before softplus, the std of a Gaussian; direction is the sign of the
    TD error.
    """
    mean, raw = output[: len(action)], output[len(action) :]
    std = np.log1p(np.exp(-np.abs(raw))) + np.maximum(raw, 0)
    error = action - mean
    grad_std = (1 - (error / std) ** 2 - entropy_coefficient * direction) / std
    return np.concatenate((-error / std**2, grad_std / (1 + np.exp(-raw)))).astype(np.float32)


class StreamingNetwork:
    """An MLP with its eligibility traces and its optimiser, ObGD; one sample at a time.

    Weights and traces are two flat vectors. The parameters of `mlp` are views of the first, and their .grad views of
    the second: a trace is a gradient that is not cleared but decayed, and autograd adds to it as the loops do.
    """

    def __init__(self, mlp: MLP, kappa: float, args: Args):
        self.mlp, self.kappa, self.learning_rate = mlp, kappa, args.learning_rate
        self.decay, self.compiled = (
            np.float32(args.gamma * args.trace_lambda),
            args.sparse_kernel != "dense",
        )
        parameters = list(mlp.parameters())
        weights = nn.utils.parameters_to_vector(parameters).detach()
        nn.utils.vector_to_parameters(weights, parameters)
        traces = torch.zeros_like(weights)
        for parameter, trace in zip(
            parameters, traces.split([parameter.numel() for parameter in parameters])
        ):
            parameter.grad = trace.view_as(parameter)
        self.weights, self.traces = weights.numpy(), traces.numpy()
        self.hidden = tuple(
            self.view(module)
            for module in mlp.encoder
            if isinstance(module, nn.Linear | SparseLinear)
        )
        self.heads = tuple(self.view(head) for head in mlp.heads)

    @staticmethod
    def view(layer: "nn.Linear | SparseLinear") -> tuple[np.ndarray, ...]:
        """The layer's arrays for the compiled loops."""
        if isinstance(layer, SparseLinear):
            weight, (rows, columns) = layer.values, layer.shape
            row, col = layer.index // columns, layer.index % columns
            _, pointers = sort_into_blocks(row, col, layer.shape)
        else:
            weight, (rows, columns) = layer.weight, layer.weight.shape
            pointers, col = torch.arange(rows + 1) * columns, torch.empty(0)
        arrays = (weight.data.flatten(), weight.grad.flatten(), layer.bias.data, layer.bias.grad)
        pattern = (
            pointers.to(torch.uint32),
            col.to(torch.uint32),
        )  # unsigned: no check for indices below zero
        memory = (np.zeros(columns, np.float32), np.zeros(1, np.float32))
        return (*(array.numpy() for array in arrays + pattern), *memory)

    def __call__(self, state: np.ndarray) -> np.ndarray:
        """(inputs,) -> (outputs,); the next step differentiates the last call."""
        if self.compiled:
            return forward(self.hidden, self.heads, state)
        self.output = self.mlp(torch.from_numpy(state))
        return self.output.detach().numpy()

    def step(self, grad: np.ndarray, delta: float, done: bool) -> float:
        """One step for a loss with gradient `grad` (outputs,) and a TD error; returns the step size."""
        if self.compiled:
            backward(self.hidden, self.heads, grad, self.decay)
        else:
            self.traces *= self.decay
            self.output.backward(torch.from_numpy(grad))
        alpha = bounded_step(self.weights, self.traces, delta, self.learning_rate, self.kappa)
        if done:
            self.traces[:] = 0
        return alpha


class Agent:
    """Networks drawn from torch's generator and pruned with masks from --mask-seed."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        hidden, layers = round(128 * args.width_scale), 1 + args.depth_scale
        device = torch.device("cpu" if args.device == "auto" else args.device)
        mask_seed = args.seed if args.mask_seed is None else args.mask_seed
        networks = {
            "actor": ([action_dim, action_dim], args.actor_sparsity, args.actor_kappa),
            "critic": ([1], args.critic_sparsity, args.critic_kappa),
        }
        self.layers = {}
        for index, (name, (heads, own_sparsity, kappa)) in enumerate(networks.items()):
            mlp = MLP(obs_dim + 1, hidden, layers, heads, args.init)  # one input more: the time
            sparsity = args.sparsity if own_sparsity is None else own_sparsity
            how = (args.sparsity_distribution, derive_seed(mask_seed, index), "dense", device)
            self.layers[name] = sparsify(mlp, sparsity, *how)
            setattr(self, name, StreamingNetwork(mlp, kappa, args))


def update(
    agent: Agent,
    state,
    output,
    action,
    reward: float,
    next_state,
    cut: bool,
    done: bool,
    args: Args,
):
    """Learns from one transition; `cut` where nothing follows to bootstrap from, `done` where the episode ends.

    The actor must have been run on `state` last. Returns the TD error and both step sizes.
    """
    next_value = float(agent.critic(next_state)[0])
    delta = reward + args.gamma * (1 - cut) * next_value - float(agent.critic(state)[0])
    actor_grad = policy_gradient(output, action, np.sign(delta), args.entropy_coefficient)
    actor_step = agent.actor.step(actor_grad, delta, done)
    critic_step = agent.critic.step(
        np.array([-1], np.float32), delta, done
    )  # the gradient of -V(s)
    return delta, actor_step, critic_step


def act(
    agent: Agent, state: np.ndarray, noise: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """The action mean + std * noise (action_dim,), and the actor's output that `update` needs."""
    output = agent.actor(state)
    mean, raw = np.split(output, 2)
    return mean + np.float32(noise) * np.logaddexp(0, raw), output


def episode_limit(env: gym.Env) -> float:
    """Env steps until an episode is cut off; infinity where there is no limit."""
    return env.spec.max_episode_steps or (
        1000 if env.spec.id.startswith("dm_control/") else math.inf
    )


def evaluate(
    agent, norm, env: gym.Env, episodes: int, seed_key: tuple, video: Path | None = None
) -> dict[str, float]:
    """Mean, std and interquartile mean of the deterministic policy's returns; films the first episode on request."""
    returns, frames = np.zeros(episodes), []
    for episode in range(episodes):
        obs, _ = env.reset(seed=derive_seed(*seed_key, episode))
        length, done = 0, False
        while not done:
            if video and episode == 0:
                frames.append(env.render())
            action, _ = act(agent, norm.state(obs, length, update=False))
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[episode] += reward
            length, done = length + 1, terminated or truncated
    if video:
        import imageio

        video.parent.mkdir(exist_ok=True)
        imageio.mimwrite(video, frames, fps=30, macro_block_size=None)
    return {
        "return_mean": returns.mean(),
        "return_std": returns.std(),
        "return_iqm": trim_mean(returns, 0.25),
    }


class Recent:
    """The last transitions (state, action, reward, next_state, cut), for diagnostics alone."""

    def __init__(self, size: int = 256):
        self.transitions = deque(maxlen=size)

    def columns(self) -> list[torch.Tensor]:
        """One tensor (transitions, ...) for each part."""
        return [
            torch.as_tensor(np.array(column), dtype=torch.float32)
            for column in zip(*self.transitions)
        ]

    def state_dict(self) -> dict:
        return {"columns": self.columns()}

    def load_state_dict(self, state: dict) -> None:
        self.transitions.extend(zip(*(column.numpy() for column in state["columns"])))


def diagnose(agent: Agent, recent: Recent, args: Args) -> dict[str, float]:
    """Plasticity measurements of actor and critic on the last transitions.

    The gradient is that of a step without traces: the mean of delta times the gradient of each transition's loss.
    """
    state, action, reward, next_state, cut = recent.columns()
    with torch.no_grad():
        value, next_value = agent.critic.mlp(state)[:, 0], agent.critic.mlp(next_state)[:, 0]
        delta = reward + args.gamma * (1 - cut) * next_value - value
        outputs = agent.actor.mlp(state)
    samples = zip(outputs.numpy(), action.numpy(), delta.sign().numpy())
    actor_grad = torch.tensor(
        np.array([policy_gradient(*sample, args.entropy_coefficient) for sample in samples])
    )
    measured = {}
    for name, grad in (("actor", actor_grad), ("critic", -torch.ones(len(state), 1))):
        mlp = getattr(agent, name).mlp
        parameters = list(mlp.parameters())
        gradients = torch.autograd.grad(mlp(state), parameters, delta[:, None] * grad / len(state))
        plasticity = measure_plasticity(mlp.encoder, state, parameters, gradients)
        measured |= {f"{name}_{metric}": value for metric, value in plasticity.items()}
    return measured


def train(args: Args) -> None:
    check_flags(args)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings(
        "ignore", module="gymnasium"
    )  # of the precision of Box bounds, and of v4 tasks' age
    os.environ["MUJOCO_GL"] = (
        os.environ.get("MUJOCO_GL", "egl") if args.capture_video else "disabled"
    )
    signal.signal(
        signal.SIGINT, lambda *_: sys.exit("interrupted; --resume goes on from the last checkpoint")
    )

    env, eval_env = make_env(args), make_env(args, "rgb_array" if args.capture_video else None)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    bounds = env.unwrapped.action_space
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    try:
        agent = Agent(args, obs_dim, action_dim)
    except ValueError as error:
        fail(str(error))
    run_dir, checkpoint = open_run(args)
    if checkpoint and checkpoint["finished"] and not args.eval_only:
        print(f"this run is finished: its results are in {run_dir} (--no-resume runs it again)")
        sys.exit(0)
    norm, recent = Normalizer(obs_dim, args.gamma, episode_limit(env)), Recent()
    parts_to_save = {
        "actor": agent.actor.mlp,
        "critic": agent.critic.mlp,
        "norm": norm,
        "recent": recent,
    }
    agent_step = update_step = episode = csv_bytes = 0

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
            agent, norm, eval_env, args.final_eval_episodes, (args.seed, FINAL, agent_step), video
        )
        print("  ".join(f"{name} {value:.1f}" for name, value in result.items()))
        sys.exit(0)

    describe_run(run_dir, args, agent.layers)
    print(f"{run_dir}: " + (f"going on from env step {agent_step}" if checkpoint else "new run"))
    metrics = Metrics(run_dir, args, csv_bytes, agent_step)
    bar = tqdm(total=args.total_timesteps, initial=agent_step, unit=" env steps")
    bar.mininterval = 0.5 if sys.stderr.isatty() else 30
    saved_step, episode_over = agent_step, True

    def log(values: dict, prefix: str) -> None:
        values = {f"{prefix}/{name}": value for name, value in values.items()}
        metrics.log(agent_step, agent_step, update_step, values)

    def due(interval: int) -> bool:
        """Whether a multiple of some env steps has just been reached."""
        return interval > 0 and agent_step % interval == 0

    def stop_unless_finite(value: float) -> None:
        if not math.isfinite(value):
            print(
                f"error: a value is not finite at {agent_step=}; the last checkpoint is kept",
                file=sys.stderr,
            )
            sys.exit(3)

    def save(finished: bool) -> None:
        stop_unless_finite(agent.actor.weights.sum() + agent.critic.weights.sum())
        state = {name: part.state_dict() for name, part in parts_to_save.items()}
        counters = (agent_step, update_step, episode, metrics.sync())
        save_checkpoint(run_dir, args, {**state, "counters": counters, "finished": finished})

    if agent_step == 0:
        log(evaluate(agent, norm, eval_env, args.eval_episodes, (args.seed, EVAL, 0)), "eval")
    while agent_step < args.total_timesteps:
        if episode_over:
            if agent_step - saved_step >= args.checkpoint_interval:
                save(finished=False)  # the traces are zero now
                saved_step = agent_step
            obs, _ = env.reset(seed=derive_seed(args.seed, TRAIN, episode))
            state = norm.state(obs, 0)
            episode, length, episode_return = episode + 1, 0, 0.0
            first_update, absolute_delta, started = update_step, 0.0, time.time()

        # Act
        if agent_step < args.learning_starts:
            action = np.random.uniform(bounds.low, bounds.high)
        else:
            action, output = act(agent, state, np.random.standard_normal(action_dim))
            stop_unless_finite(output.sum())
        obs, reward, terminated, truncated, _ = env.step(action)
        agent_step, length, episode_return = agent_step + 1, length + 1, episode_return + reward
        episode_over = terminated or truncated
        next_state, reward = norm.state(obs, length), norm.scale(reward, episode_over)
        cut = terminated or (truncated and not args.bootstrap_on_truncation)
        recent.transitions.append((state, action, reward, next_state, cut))

        # Learn
        if agent_step > args.learning_starts:
            delta, *step_sizes = update(
                agent, state, output, action, reward, next_state, cut, episode_over, args
            )
            update_step, absolute_delta = update_step + 1, absolute_delta + abs(delta)
            stop_unless_finite(delta)
        state = next_state

        # Measure
        if due(args.eval_interval):
            result = evaluate(
                agent, norm, eval_env, args.eval_episodes, (args.seed, EVAL, agent_step)
            )
            log(result, "eval")
            draw_learning_curve(run_dir, args.env_id)
            bar.set_postfix_str(f"return {result['return_mean']:.0f}")
        if due(args.diagnostics_interval):
            stop_unless_finite(agent.actor.weights.sum() + agent.critic.weights.sum())
            log(diagnose(agent, recent, args), "diagnostics")

        bar.update()
        if episode_over:
            log({"return": episode_return, "length": length}, "episode")
            if update_step > first_update:
                sizes = dict(zip(("actor_step_size", "critic_step_size"), step_sizes))
                log(
                    {"absolute_td_error": absolute_delta / (update_step - first_update), **sizes},
                    "losses",
                )
            log({"env_steps_per_second": length / (time.time() - started)}, "time")

    save(finished=False)  # a kill in the last evaluation costs no training
    video = run_dir / "videos" / "final.mp4" if args.capture_video else None
    result = evaluate(
        agent, norm, eval_env, args.final_eval_episodes, (args.seed, FINAL, agent_step), video
    )
    log(result, "final")
    save(finished=True)
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
    "checkpoint_interval",
}


def check_flags(args: Args) -> None:
    """Ends the program if a flag makes no sense."""
    counts = "depth_scale total_timesteps threads eval_interval eval_episodes final_eval_episodes checkpoint_interval"
    rules = [
        ("at least 0 and below 1", lambda x: 0 <= x < 1, "sparsity actor_sparsity critic_sparsity"),
        ("between 0 and 1", lambda x: 0 <= x <= 1, "gamma trace_lambda"),
        (
            "above 0 and finite",
            lambda x: 0 < x < math.inf,
            "learning_rate actor_kappa critic_kappa",
        ),
        ("at least 0 and finite", lambda x: 0 <= x < math.inf, "entropy_coefficient"),
        (
            "at least 1/128 (one hidden unit) and finite",
            lambda x: 1 / 128 <= x < math.inf,
            "width_scale",
        ),
        ("at least 1", lambda x: x >= 1, counts),
        ("at least 0", lambda x: x >= 0, "learning_starts diagnostics_interval"),
        ("at least 0 and below 2^32", lambda x: 0 <= x < 2**32, "seed mask_seed"),
    ]
    for rule, holds, names in rules:
        for name in names.split():
            if (value := getattr(args, name)) is not None and not holds(value):
                fail(f"--{name.replace('_', '-')} {value}: must be {rule}")
    if "/" in args.exp_name:
        fail(f"--exp-name {args.exp_name}: is part of a folder's name and cannot contain /")


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """An environment with flat observations that clips actions to their bounds."""
    try:
        if args.env_id.startswith("dm_control/"):
            import shimmy

            gym.register_envs(shimmy)
        env = gym.make(args.env_id, render_mode=render_mode, disable_env_checker=True)
        if render_mode:  # what cannot be filmed fails now, not after training
            env.reset(seed=0)
            env.render()
    except (gym.error.Error, ImportError, RuntimeError, ValueError, AttributeError) as error:
        filming = (
            " (--capture-video needs a renderer: MUJOCO_GL=egl or osmesa)"
            if args.capture_video
            else ""
        )
        fail(f"--env-id {args.env_id}: {error}{filming}")
    action_space, space = env.action_space, env.observation_space
    if (
        not isinstance(action_space, gym.spaces.Box)
        or len(action_space.shape) != 1
        or not action_space.is_bounded()
    ):
        fail(
            f"--env-id {args.env_id} has actions {action_space}; this agent needs a bounded Box of one dimension"
        )
    for part in space.values() if isinstance(space, gym.spaces.Dict) else [space]:
        if not isinstance(part, gym.spaces.Box):
            fail(
                f"--env-id {args.env_id} has observations {part}; this agent needs Box or a Dict of Box"
            )
    return gym.wrappers.ClipAction(gym.wrappers.FlattenObservation(env))


def derive_seed(*key: int) -> int:
    """A seed for each key; keys that differ only in zeros at their ends share one."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


# What a seed derived from (--seed, purpose, ...) is for
TRAIN, EVAL, FINAL = range(3)


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


# A linear layer, as the compiled loops see it, is a plain tuple of numpy arrays (a NamedTuple would be compiled anew in
# every run):
#   weight, weight_trace   (active weights,), views of the network's flat vectors
#   bias, bias_trace       (out,), likewise
#   pointers               (groups + 1,): group g of row g % out holds the weights pointers[g] <= k < pointers[g + 1],
#                          blocks of 128 columns if the layer is sparse, whole rows if it is dense
#   col                    (active weights,), or empty if the layer is dense
#   last_x, inverse_std    (in,) and (1,): input, and 1 / std in the LayerNorm behind, of the last forward pass


@numba.njit(fastmath=REORDER, cache=True)
def linear(layer, x):
    """y = W x + b for one sample, (in,) -> (out,); remembers x."""
    weight, _, bias, _, pointers, col, last_x, _ = layer
    last_x[:] = x
    y = bias.copy()
    for group in range(len(pointers) - 1):
        start, end = pointers[group], pointers[group + 1]
        dot = np.float32(0)
        if len(col) > 0:
            for k in range(start, end):
                dot += weight[k] * x[col[k]]
        else:
            for k in range(start, end):
                dot += weight[k] * x[k - start]
        y[group % len(y)] += dot
    return y


@numba.njit(fastmath=REORDER, cache=True)
def linear_backward(layer, grad, decay):
    """traces <- decay * traces + gradient, for grad (out,) with respect to y; returns W^T grad, (in,)."""
    weight, weight_trace, bias, bias_trace, pointers, col, x, _ = layer
    grad_x = np.zeros_like(x)
    for row in range(len(bias)):
        bias_trace[row] = decay * bias_trace[row] + grad[row]
    for group in range(len(pointers) - 1):
        start, end, g = pointers[group], pointers[group + 1], grad[group % len(bias)]
        if len(col) > 0:
            for k in range(start, end):
                weight_trace[k] = decay * weight_trace[k] + g * x[col[k]]
                grad_x[col[k]] += g * weight[k]
        else:
            for k in range(start, end):
                weight_trace[k] = decay * weight_trace[k] + g * x[k - start]
                grad_x[k - start] += g * weight[k]
    return grad_x


@numba.njit(fastmath=REORDER, cache=True)
def forward(hidden, heads, state):
    """The heads' outputs for one state, one behind the other; every layer remembers its input."""
    x = state
    for layer in hidden:
        y, inverse_std = linear(layer, x), layer[-1]
        y -= y.mean()
        inverse_std[0] = 1 / np.sqrt((y * y).mean() + 1e-5)
        y *= inverse_std[0]
        x = np.where(y > 0, y, np.float32(0.01) * y)
    output = np.empty(0, np.float32)
    for head in heads:
        output = np.append(output, linear(head, x))
    return output


@numba.njit(fastmath=REORDER, cache=True)
def backward(hidden, heads, grad_output, decay):
    """traces <- decay * traces + the gradient of <grad_output, output> of the last forward pass"""
    x = heads[0][-2]
    grad = np.zeros_like(x)
    first = 0
    for head in heads:
        outputs = len(head[2])
        grad += linear_backward(head, grad_output[first : first + outputs], decay)
        first += outputs
    for i in range(len(hidden) - 1, -1, -1):
        last_x, inverse_std = hidden[i][-2], hidden[i][-1]
        slope = np.where(x > 0, np.float32(1), np.float32(0.01))  # leaky ReLU
        normed = x / slope
        grad *= slope
        grad = inverse_std[0] * (grad - grad.mean() - normed * (grad * normed).mean())  # LayerNorm
        x, grad = last_x, linear_backward(hidden[i], grad, decay)


@numba.njit(fastmath=REORDER, cache=True)
def bounded_step(weights, traces, delta, learning_rate, kappa):
    """ObGD, Algorithm 3 of Elsayed et al.: weights <- weights - alpha * delta * traces; returns alpha."""
    norm = np.float32(0)
    for k in range(len(traces)):
        norm += abs(traces[k])
    alpha = learning_rate / max(1.0, learning_rate * kappa * max(1.0, abs(delta)) * norm)
    step = np.float32(alpha * delta)
    for k in range(len(weights)):
        weights[k] -= step * traces[k]
    return alpha


if __name__ == "__main__":
    train(tyro.cli(Args))
