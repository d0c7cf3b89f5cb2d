# docs: docs/sac_simba_sparse.md
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "numba==0.68.1", "scipy==1.17.1", "tyro==1.0.17", "tqdm==4.70.1",
#     "gymnasium==1.4.0", "shimmy==2.0.1", "dm-control==1.0.50", "mujoco==3.17.0", "filelock==4.2.11",
#     "matplotlib==3.11.2", "pandas==3.1.1", "imageio==2.38.1", "imageio-ffmpeg==0.8.1", "tensorboard==2.21.0",
#     "wandb==0.31.0",
# ]
# ///
"""Soft Actor-Critic with SimBa networks and static sparsity.

Before training, a random set of weights is removed once; the survivors are trained as usual. SAC learns a stochastic
policy and a Q-function from replayed transitions, and maximises return plus entropy, whose price (the temperature) is
learned too. Actor and critic are SimBa networks: pre-LayerNorm residual blocks with a 4x inverted bottleneck, a last
LayerNorm, and running observation statistics in front.

Papers: Network Sparsity Unlocks the Scaling Potential of Deep RL (Ma, Li et al., ICML 2025); SimBa (Lee et al., 2024),
arXiv:2410.09754; Soft Actor-Critic (Haarnoja et al., 2018), arXiv:1812.05905.

Differences from the official (JAX) code:
 1. A pruned weight is not stored: values, gradients, AdamW moments and the target network are vectors over the active
    weights, elementwise equal to training a masked dense network.
 2. Every layer keeps an exact number of weights (a random permutation); there, one Bernoulli draw a weight.
 3. Biases and LayerNorm parameters are always dense; there, very small networks lose some.
 4. --actor-sparsity and --critic-sparsity are independent; there, a dense actor makes the critic dense.
 5. The masks of actor and critic come from independent generators; there, both start from the run seed.
 6. The training environment is seeded anew at every reset from (seed, episode), so that a resumed run repeats the
    uninterrupted one in any environment; there, one generator runs on.
 7. Evaluations draw their initial states from (seed, decision), so that they leave training untouched.
"""

import copy
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
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import distributions
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
from gymnasium.wrappers.utils import RunningMeanStd
from matplotlib.figure import Figure
from scipy.stats import trim_mean
from torch.nn.utils import get_total_norm
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # Experiment
    exp_name: str = "sac_simba_sparse"
    """part of the run's name"""
    seed: int = 1
    """seed of networks, exploration, replay and environments (below 2^32)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto takes CUDA when there is one"""
    threads: int | None = None
    """CPU threads (default: all cores); a resumed run is bit-equal only with the same number"""
    runs_dir: str = "runs"
    """folder that holds one folder per run"""
    resume: bool = True
    """go on from the run's checkpoint; --no-resume moves the old run aside and starts afresh"""
    eval_only: bool = False
    """evaluate this command's checkpoint for its --final-eval-episodes episodes and stop"""
    capture_video: bool = False
    """film the first episode of the last evaluation (or of --eval-only) as mp4"""

    # Environment
    env_id: str = "dm_control/humanoid-run-v0"
    """any Gymnasium id with Box (or Dict of Box) observations and Box actions; dm_control/* through Shimmy"""
    action_repeat: int = 2
    """simulator frames per decision, rewards summed"""
    total_timesteps: int = 1_000_000
    """env steps of training (simulator frames, action repeat included)"""

    # Algorithm (Table 2 of the paper)
    learning_starts: int = 10_000
    """env steps of uniformly random actions before the first update"""
    updates_per_step: int = 2
    """gradient updates per decision (the replay ratio)"""
    batch_size: int = 256
    """transitions per update"""
    buffer_size: int = 1_000_000
    """largest number of transitions kept for replay"""
    gamma: float | None = None
    """discount (default: the TD-MPC2 heuristic from the episode length, 0.99 for 500 decisions)"""
    tau: float = 0.005
    """target <- tau * critic + (1 - tau) * target after every update"""
    learning_rate: float = 1e-4
    """of actor, critic and temperature (AdamW)"""
    weight_decay: float = 1e-2
    """decoupled, on every active weight, bias and LayerNorm parameter; none on the temperature"""
    initial_temperature: float = 1e-2
    """alpha at the start"""
    clipped_double_q: bool = False
    """train two critics and use the smaller value"""
    reset_interval: int | None = None
    """env steps between resets: fresh parameters and optimisers, replay kept (Figure 6; default: never)"""

    # Size and sparsity
    width_scale: float = 1.0
    """hidden units: actor 128 x scale, critic 512 x scale"""
    depth_scale: int = 1
    """residual blocks: actor 1 x scale, critic 2 x scale"""
    sparsity: float = 0.0
    """fraction of parameters removed from the actor and from the critic; 0 is the dense SimBa baseline"""
    actor_sparsity: float | None = None
    """of the actor alone (default: --sparsity)"""
    critic_sparsity: float | None = None
    """of the critic alone (default: --sparsity)"""
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
    final_eval_episodes: int = 100
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


def init_linear(in_features: int, out_features: int, he_normal: bool = False) -> nn.Linear:
    """Orthogonal weights, or He's normal cut at 2 sigma, its variance corrected for the cut (JAX's he_normal)."""
    layer = nn.Linear(in_features, out_features)
    nn.init.zeros_(layer.bias)
    if he_normal:
        std = math.sqrt(2 / in_features) / 0.87962566103423978
        for rows in layer.weight.detach().split(
            math.ceil(2**22 / in_features)
        ):  # it needs three times their memory
            nn.init.trunc_normal_(rows, std=std, a=-2 * std, b=2 * std)
    else:
        nn.init.orthogonal_(layer.weight)
    return layer


class ResidualBlock(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden, eps=1e-6)
        self.up = init_linear(hidden, 4 * hidden, he_normal=True)
        self.relu = nn.ReLU()
        self.down = init_linear(4 * hidden, hidden, he_normal=True)

    def forward(self, x):
        return x + self.down(self.relu(self.up(self.norm(x))))


def simba(in_features: int, hidden: int, blocks: int) -> nn.Sequential:
    """The SimBa encoder: (batch, in_features) -> (batch, hidden)."""
    residual = (ResidualBlock(hidden) for _ in range(blocks))
    return nn.Sequential(
        init_linear(in_features, hidden), *residual, nn.LayerNorm(hidden, eps=1e-6)
    )


class Actor(nn.Module):
    """Tanh-Gaussian policy."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int, blocks: int):
        super().__init__()
        self.encoder = simba(obs_dim, hidden, blocks)
        self.mean = init_linear(hidden, action_dim)
        self.log_std = init_linear(hidden, action_dim)

    def forward(self, obs):
        """obs (batch, obs_dim) -> mean and log std before tanh, (batch, action_dim); log std within [-10, 2]."""
        features = self.encoder(obs)
        return self.mean(features), -10 + 6 * (1 + torch.tanh(self.log_std(features)))

    def sample(self, obs, noise):
        """Action (batch, action_dim) for standard normal noise of that shape, and its log-probability (batch,)."""
        mean, log_std = self(obs)
        raw = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - 2 * (math.log(2) - raw - F.softplus(-2 * raw))  # log(1 - tanh(raw)^2)
        return torch.tanh(raw), log_prob.sum(-1)


class Critic(nn.Module):
    """One Q-function, or two with --clipped-double-q."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int, blocks: int, count: int):
        super().__init__()
        self.encoders = nn.ModuleList(
            simba(obs_dim + action_dim, hidden, blocks) for _ in range(count)
        )
        self.heads = nn.ModuleList(init_linear(hidden, 1) for _ in range(count))

    def forward(self, obs, action):
        """(batch, obs_dim), (batch, action_dim) -> Q-values (count, batch)"""
        x = torch.cat([obs, action], -1)
        return torch.stack(
            [head(encoder(x)).squeeze(-1) for encoder, head in zip(self.encoders, self.heads)]
        )


class ObservationNorm:
    """Running mean and variance of the observations seen in training, applied without clipping, as in SimBa."""

    def __init__(self, obs_dim: int, device: torch.device):
        self.statistics, self.device = RunningMeanStd(shape=(obs_dim,)), device

    def update(self, obs: np.ndarray) -> None:
        """Takes one observation (obs_dim,) into the statistics."""
        self.statistics.update(obs[None])

    def __call__(self, obs: torch.Tensor) -> torch.Tensor:
        """Raw observations (batch, obs_dim) -> normalised ones on the agent's device."""
        mean, std = self.statistics.mean, np.sqrt(self.statistics.var + 1e-8)
        mean, std = (
            torch.as_tensor(value, dtype=torch.float32, device=self.device) for value in (mean, std)
        )
        return (obs.to(self.device) - mean) / std

    def state_dict(self) -> dict:
        return {
            name: torch.as_tensor(value, dtype=torch.float64)
            for name, value in vars(self.statistics).items()
        }

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self.statistics, name, value.numpy())


class Batch(NamedTuple):
    """Transitions, float32, batch first; terminated is 1 where the episode ended by itself, not by its time limit."""

    obs: torch.Tensor
    action: torch.Tensor
    reward: torch.Tensor
    next_obs: torch.Tensor
    terminated: torch.Tensor


class ReplayBuffer:
    """A ring of raw transitions on the CPU, sampled uniformly with replacement."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int):
        self.capacity, self.added = capacity, 0
        shapes = ((obs_dim,), (action_dim,), (), (obs_dim,), ())
        self.columns = [torch.empty(capacity, *shape) for shape in shapes]

    def add(self, *transition) -> None:
        for column, value in zip(self.columns, transition):
            column[self.added % self.capacity] = torch.as_tensor(value)
        self.added += 1

    def sample(
        self, batch_size: int, norm: ObservationNorm, generator: torch.Generator | None = None
    ) -> Batch:
        """A batch on the device of `norm`, old observations normalised by the newest statistics."""
        index = torch.randint(min(self.added, self.capacity), (batch_size,), generator=generator)
        batch = Batch(*(column[index].to(norm.device) for column in self.columns))
        return batch._replace(obs=norm(batch.obs), next_obs=norm(batch.next_obs))

    def state_dict(self) -> dict:
        filled = [
            column[: self.added].clone() for column in self.columns
        ]  # of a view, all its memory would be saved
        return {"added": self.added, "columns": filled}

    def load_state_dict(self, state: dict) -> None:
        self.added = state["added"]
        for column, saved in zip(self.columns, state["columns"]):
            column[: len(saved)] = saved


def actor_loss(actor, critic, alpha, obs, noise):
    """mean(alpha * log pi(a|s) - Q(s, a)) for actions sampled with `noise`, and the entropy mean(-log pi(a|s))."""
    action, log_prob = actor.sample(obs, noise)
    return (alpha * log_prob - critic(obs, action).amin(0)).mean(), -log_prob.detach().mean()


@torch.no_grad()
def td_target(actor, target_critic, alpha, batch, gamma, noise):
    """r + gamma * (1 - terminated) * (Q_target(s', a') - alpha * log pi(a'|s')), (batch,)"""
    action, log_prob = actor.sample(batch.next_obs, noise)
    value = target_critic(batch.next_obs, action).amin(0) - alpha * log_prob
    return batch.reward + gamma * (1 - batch.terminated) * value


def critic_loss(critic, batch, target):
    """Mean squared TD error, summed over the critics."""
    return (critic(batch.obs, batch.action) - target).square().mean(1).sum()


class Agent:
    """Networks drawn from torch's generator and pruned with masks from --mask-seed, and their optimisers."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        hidden, blocks, critics = (
            round(128 * args.width_scale),
            args.depth_scale,
            1 + args.clipped_double_q,
        )
        self.actor = Actor(obs_dim, action_dim, hidden, blocks)
        self.critic = Critic(obs_dim, action_dim, 4 * hidden, 2 * blocks, critics)
        self.layers = {}
        mask_seed = args.seed if args.mask_seed is None else args.mask_seed
        own = {"actor": args.actor_sparsity, "critic": args.critic_sparsity}
        for index, (name, own_sparsity) in enumerate(own.items()):
            sparsity = args.sparsity if own_sparsity is None else own_sparsity
            how = (
                args.sparsity_distribution,
                derive_seed(mask_seed, index),
                args.sparse_kernel,
                device,
            )
            self.layers[name] = sparsify(getattr(self, name), sparsity, *how)
        # The memo lets the target critic share the critic's index buffers: the pattern is stored once.
        self.target_critic = copy.deepcopy(
            self.critic, {id(buffer): buffer for buffer in self.critic.buffers()}
        )
        self.target_critic.requires_grad_(False)
        self.temperature = nn.ParameterDict(
            {"log_alpha": torch.tensor(math.log(args.initial_temperature))}
        ).to(device)
        adamw = partial(torch.optim.AdamW, lr=args.learning_rate, fused=True)
        self.actor_optimizer = adamw(self.actor.parameters(), weight_decay=args.weight_decay)
        self.critic_optimizer = adamw(self.critic.parameters(), weight_decay=args.weight_decay)
        self.temperature_optimizer = adamw(self.temperature.parameters(), weight_decay=0.0)

    def alpha(self) -> torch.Tensor:
        return self.temperature["log_alpha"].exp()


def update(
    agent: Agent, batch: Batch, noise, next_noise, gamma: float, tau: float
) -> dict[str, torch.Tensor]:
    """One gradient update of everything on a normalised batch; noise (batch, action_dim) is standard normal."""
    # Actor, against the critic of the last update, whose weights need no gradient here
    agent.critic.requires_grad_(False)
    loss_actor, entropy = actor_loss(
        agent.actor, agent.critic, agent.alpha().detach(), batch.obs, noise
    )
    agent.actor_optimizer.zero_grad()
    loss_actor.backward()
    agent.actor_optimizer.step()
    agent.critic.requires_grad_(True)

    # Temperature, towards an entropy of -|A|/2
    loss_temperature = agent.alpha() * (entropy + 0.5 * noise.shape[1])
    agent.temperature_optimizer.zero_grad()
    loss_temperature.backward()
    agent.temperature_optimizer.step()

    # Critic, with the new actor and the new temperature
    alpha = agent.alpha().detach()
    target = td_target(agent.actor, agent.target_critic, alpha, batch, gamma, next_noise)
    loss_critic = critic_loss(agent.critic, batch, target)
    agent.critic_optimizer.zero_grad()
    loss_critic.backward()
    agent.critic_optimizer.step()

    with torch.no_grad():
        for slow, fast in zip(agent.target_critic.parameters(), agent.critic.parameters()):
            slow.lerp_(fast, tau)
    losses = {
        "actor_loss": loss_actor.detach(),
        "critic_loss": loss_critic.detach(),
        "td_target": target.mean(),
    }
    return losses | {"alpha": alpha, "entropy": entropy}


@torch.no_grad()
def act(
    agent: Agent, norm: ObservationNorm, obs: np.ndarray, noise: torch.Tensor | None = None
) -> np.ndarray:
    """The action (action_dim,) for a raw observation: sampled with `noise`, or the policy's mode without."""
    obs = norm(torch.as_tensor(obs, dtype=torch.float32)[None])
    action = (
        torch.tanh(agent.actor(obs)[0])
        if noise is None
        else agent.actor.sample(obs, noise.to(obs.device))[0]
    )
    return action[0].cpu().numpy()


def evaluate(
    agent, norm, env: gym.Env, episodes: int, seed_key: tuple, video: Path | None = None
) -> dict[str, float]:
    """Mean, std and interquartile mean of the deterministic policy's returns; films the first episode on request."""
    returns, frames = np.zeros(episodes), []
    for episode in range(episodes):
        obs, _ = env.reset(seed=derive_seed(*seed_key, episode))
        done = False
        while not done:
            if video and episode == 0:
                frames.append(env.render())
            obs, reward, terminated, truncated, _ = env.step(act(agent, norm, obs))
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


def diagnose(agent: Agent, batch: Batch, noise, next_noise, gamma: float) -> dict[str, float]:
    """Plasticity measurements of actor and critic on a normalised batch."""
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
        plasticity = measure_plasticity(
            encoder, inputs, parameters, torch.autograd.grad(loss, parameters)
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
    os.environ["MUJOCO_GL"] = (
        os.environ.get("MUJOCO_GL", "egl") if args.capture_video else "disabled"
    )
    signal.signal(
        signal.SIGINT, lambda *_: sys.exit("interrupted; --resume goes on from the last checkpoint")
    )

    env, eval_env = make_env(args), make_env(args, "rgb_array" if args.capture_video else None)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    gamma = default_gamma(env, args.action_repeat) if args.gamma is None else args.gamma
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    try:
        agent = Agent(args, obs_dim, action_dim, device)
    except ValueError as error:
        fail(str(error))
    run_dir, checkpoint = open_run(args)
    if checkpoint and checkpoint["finished"] and not args.eval_only:
        print(f"this run is finished: its results are in {run_dir} (--no-resume runs it again)")
        sys.exit(0)
    norm = ObservationNorm(obs_dim, device)
    total_steps = math.ceil(args.total_timesteps / args.action_repeat)
    learning_starts = math.ceil(args.learning_starts / args.action_repeat)
    replay = ReplayBuffer(min(args.buffer_size, total_steps), obs_dim, action_dim)
    agent_step = update_step = episode = csv_bytes = 0

    def parts_to_save() -> dict:
        """Everything with a state_dict, by name; the current agent's, which a reset replaces."""
        return {name: part for name, part in vars(agent).items() if name != "layers"} | {
            "norm": norm,
            "replay": replay,
        }

    if checkpoint:
        try:
            for name, part in parts_to_save().items():
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
    print(
        f"{run_dir}: "
        + (f"going on from env step {agent_step * args.action_repeat}" if checkpoint else "new run")
    )
    metrics = Metrics(run_dir, args, csv_bytes, agent_step * args.action_repeat)
    bar = tqdm(
        total=args.total_timesteps, initial=agent_step * args.action_repeat, unit=" env steps"
    )
    bar.mininterval = 0.5 if sys.stderr.isatty() else 30
    saved_step, losses, episode_over = agent_step, {}, True

    def log(values: dict, prefix: str) -> None:
        values = {f"{prefix}/{name}": value for name, value in values.items()}
        metrics.log(agent_step * args.action_repeat, agent_step, update_step, values)

    def due(interval: int | None) -> bool:
        """Whether a multiple of some env steps has just been reached."""
        return bool(interval) and agent_step * args.action_repeat % interval < args.action_repeat

    def save(finished: bool) -> None:
        state = {name: part.state_dict() for name, part in parts_to_save().items()}
        counters = (agent_step, update_step, episode, metrics.sync())
        save_checkpoint(run_dir, args, {**state, "counters": counters, "finished": finished})

    if agent_step == 0:
        log(evaluate(agent, norm, eval_env, args.eval_episodes, (args.seed, EVAL, 0)), "eval")
    while agent_step < total_steps:
        if episode_over:
            if (agent_step - saved_step) * args.action_repeat >= args.checkpoint_interval:
                save(finished=False)
                saved_step = agent_step
            obs, _ = env.reset(seed=derive_seed(args.seed, TRAIN, episode))
            episode, episode_start, episode_return = episode + 1, agent_step, 0.0
            started = time.time()

        # Act
        norm.update(obs)
        if agent_step < learning_starts:
            action = (2 * torch.rand(action_dim) - 1).numpy()
        else:
            action = act(agent, norm, obs, torch.randn(action_dim))
        next_obs, reward, terminated, truncated, _ = env.step(action)
        replay.add(obs, action, reward, next_obs, terminated)
        obs, episode_over = next_obs, terminated or truncated
        episode_return += reward
        agent_step += 1

        # Learn
        if agent_step >= learning_starts:
            for _ in range(args.updates_per_step):
                batch = replay.sample(args.batch_size, norm)
                noise, next_noise = torch.randn(2, args.batch_size, action_dim).to(device)
                losses = update(agent, batch, noise, next_noise, gamma, args.tau)
                update_step += 1
            weights = get_total_norm(
                p for part in (agent.actor, agent.critic) for p in part.parameters()
            )
            if not torch.stack([*losses.values(), weights]).isfinite().all():
                print(
                    f"error: a value is not finite at {agent_step=}; the last checkpoint is kept",
                    file=sys.stderr,
                )
                sys.exit(3)

        # Measure
        if due(args.eval_interval):
            result = evaluate(
                agent, norm, eval_env, args.eval_episodes, (args.seed, EVAL, agent_step)
            )
            log(result, "eval")
            draw_learning_curve(run_dir, args.env_id)
            bar.set_postfix_str(f"return {result['return_mean']:.0f}")
        if due(args.diagnostics_interval):
            generator = torch.Generator().manual_seed(derive_seed(args.seed, DIAGNOSE, agent_step))
            batch = replay.sample(args.batch_size, norm, generator)
            noise, next_noise = torch.randn(2, args.batch_size, action_dim, generator=generator).to(
                device
            )
            log(diagnose(agent, batch, noise, next_noise, gamma), "diagnostics")

        # Reset, after the measurements; at the very end it would throw the trained agent away
        if due(args.reset_interval) and learning_starts <= agent_step < total_steps:
            agent = Agent(args, obs_dim, action_dim, device)

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
    counts = "depth_scale action_repeat total_timesteps updates_per_step batch_size buffer_size reset_interval threads"
    counts += " eval_interval eval_episodes final_eval_episodes checkpoint_interval"
    rules = [
        ("at least 0 and below 1", lambda x: 0 <= x < 1, "sparsity actor_sparsity critic_sparsity"),
        ("between 0 and 1", lambda x: 0 <= x <= 1, "gamma tau"),
        ("above 0 and finite", lambda x: 0 < x < math.inf, "learning_rate initial_temperature"),
        ("at least 0 and finite", lambda x: 0 <= x < math.inf, "weight_decay"),
        (
            "at least 1/128 (one hidden unit in the actor) and finite",
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
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: there is no CUDA here; use --device cpu")
    if args.sparse_kernel == "packed" and args.device != "cpu" and torch.cuda.is_available():
        fail("--sparse-kernel packed: runs on the CPU only; add --device cpu")


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """An environment with flat observations and actions in [-1, 1] that repeats each action."""
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
    env = gym.wrappers.RescaleAction(gym.wrappers.FlattenObservation(env), -1.0, 1.0)
    return gym.wrappers.RepeatAction(env, args.action_repeat)


def default_gamma(env: gym.Env, action_repeat: int) -> float:
    """TD-MPC2's heuristic: (T/5 - 1) / (T/5) within [0.95, 0.995] for episodes of T decisions."""
    frames = env.spec.max_episode_steps or (
        1000 if env.spec.id.startswith("dm_control/") else math.inf
    )
    return min(max(1 - 5 * action_repeat / frames, 0.95), 0.995)


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
