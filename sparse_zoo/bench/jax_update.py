"""Time of the published SAC update, made again here in JAX; needs jax and optax.

    python sparse_zoo/bench/jax_update.py --width-scale 4 --sparsity 0.9

The authors' code trains dense parameters, moments and targets; Adam sees unmasked gradients, and
its updates are multiplied by the masks. One jitted function is one update: actor, temperature,
critic, target (Table 2 of the paper). The batch comes from NumPy, and after each update Python
reads 14 metrics, one by one. So it is timed `as published`, and also with `nothing read`.

bench_update.py --reference jax starts it, in a process of its own. The last line is JSON.
"""

import json
import os
import time
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Annotated

import timing
import numpy as np
from timing import runs

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # memory is measured
try:
    import jax
    import jax.numpy as jnp
    import optax
except ImportError as error:
    timing.fail(f"jax_update.py needs jax and optax ({error})")

LEARNING_RATE = 1e-4
WEIGHT_DECAY = 1e-2
GAMMA = 0.99
TAU = 0.005
START_TEMPERATURE = 0.01


@dataclass
class Args:
    width_scale: runs.Width = 1.0
    """width of both networks"""
    sparsity: runs.Sparsity = 0.9
    """sparsity of both networks, by masks"""
    obs_dim: runs.Count = 67
    """observation size (67: humanoid)"""
    action_dim: runs.Count = 21
    """action size (21: humanoid)"""
    batch_size: runs.Count = 256
    """transitions per update"""
    turns: runs.Count = 3
    """turns of each way"""
    turn_seconds: Annotated[float, "0 <= x <= 3600"] = 0.3
    """least length of a turn"""


# Networks: nested dicts of arrays


def linear(random: np.random.Generator, inputs: int, outputs: int) -> dict:
    weight = random.normal(size=(inputs, outputs), scale=inputs**-0.5)
    return {"kernel": jnp.asarray(weight, jnp.float32), "bias": jnp.zeros(outputs)}


def layer_norm(size: int) -> dict:
    return {"scale": jnp.ones(size), "shift": jnp.zeros(size)}


def simba(random, inputs: int, hidden: int, blocks: int, heads: tuple[int, ...]) -> dict:
    """Residual blocks with four times as many units inside, a last LayerNorm, linear heads."""
    return {
        "first": linear(random, inputs, hidden),
        "blocks": [
            {
                "norm": layer_norm(hidden),
                "up": linear(random, hidden, 4 * hidden),
                "down": linear(random, 4 * hidden, hidden),
            }
            for _ in range(blocks)
        ],
        "norm": layer_norm(hidden),
        "heads": [linear(random, hidden, size) for size in heads],
    }


def apply_linear(layer: dict, x):
    return x @ layer["kernel"] + layer["bias"]


def apply_norm(layer: dict, x):
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-6) * layer["scale"] + layer["shift"]


def apply_simba(network: dict, x) -> list:
    x = apply_linear(network["first"], x)
    for block in network["blocks"]:
        inside = jax.nn.relu(apply_linear(block["up"], apply_norm(block["norm"], x)))
        x = x + apply_linear(block["down"], inside)
    x = apply_norm(network["norm"], x)
    return [apply_linear(head, x) for head in network["heads"]]


def sample(actor: dict, obs, noise):
    """Actions for standard normal noise, and log pi."""
    mean, log_std = apply_simba(actor, obs)
    log_std = -10 + 6 * (1 + jnp.tanh(log_std))
    raw = mean + jnp.exp(log_std) * noise
    log_prob = -0.5 * jnp.square(noise) - log_std - 0.5 * jnp.log(2 * jnp.pi)
    log_prob = log_prob - 2 * (jnp.log(2.0) - raw - jax.nn.softplus(-2 * raw))
    return jnp.tanh(raw), log_prob.sum(-1)


def q_value(critic: dict, obs, action):
    (value,) = apply_simba(critic, jnp.concatenate([obs, action], -1))
    return value[:, 0]


# The update

ADAMW = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
TEMPERATURE_ADAMW = optax.adamw(LEARNING_RATE, weight_decay=0.0)


def step(optimizer, parameters, state, gradients, masks):
    """An optimiser's step, its updates times the masks."""
    updates, state = optimizer.update(gradients, state, parameters)
    if masks is not None:
        updates = jax.tree.map(jnp.multiply, updates, masks)
    return optax.apply_updates(parameters, updates), state


def learn(agent: dict, masks: dict, batch: dict, noise, next_noise) -> tuple[dict, dict]:
    """One update of everything; the new agent, and 14 metrics."""
    alpha = jnp.exp(agent["log_alpha"])

    def actor_loss(actor):
        action, log_prob = sample(actor, batch["obs"], noise)
        value = q_value(agent["critic"], batch["obs"], action)
        loss = (alpha * log_prob - value).mean()
        return loss, (-log_prob.mean(), jnp.abs(action).mean())

    gradient = jax.value_and_grad(actor_loss, has_aux=True)
    (loss_actor, (entropy, action_size)), actor_gradient = gradient(agent["actor"])
    actor, actor_state = step(
        ADAMW, agent["actor"], agent["actor_state"], actor_gradient, masks["actor"]
    )

    def temperature_loss(log_alpha):
        return jnp.exp(log_alpha) * (entropy + 0.5 * noise.shape[1])

    loss_alpha, alpha_gradient = jax.value_and_grad(temperature_loss)(agent["log_alpha"])
    log_alpha, alpha_state = step(
        TEMPERATURE_ADAMW, agent["log_alpha"], agent["alpha_state"], alpha_gradient, None
    )

    next_action, log_prob = sample(actor, batch["next_obs"], next_noise)
    value = q_value(agent["target"], batch["next_obs"], next_action)
    value = value - jnp.exp(log_alpha) * log_prob
    target = batch["reward"] + GAMMA * (1 - batch["terminated"]) * value

    def critic_loss(critic):
        predicted = q_value(critic, batch["obs"], batch["action"])
        return jnp.square(predicted - target).mean(), predicted.mean()

    gradient = jax.value_and_grad(critic_loss, has_aux=True)
    (loss_critic, predicted), critic_gradient = gradient(agent["critic"])
    critic, critic_state = step(
        ADAMW, agent["critic"], agent["critic_state"], critic_gradient, masks["critic"]
    )
    slow = jax.tree.map(lambda fast, old: TAU * fast + (1 - TAU) * old, critic, agent["target"])

    metrics = {
        "actor_loss": loss_actor,
        "entropy": entropy,
        "action_size": action_size,
        "actor_norm": optax.global_norm(actor),
        "actor_gradient_norm": optax.global_norm(actor_gradient),
        "alpha": alpha,
        "alpha_loss": loss_alpha,
        "alpha_gradient": jnp.abs(alpha_gradient),
        "critic_loss": loss_critic,
        "predicted": predicted,
        "td_target": target.mean(),
        "reward": batch["reward"].mean(),
        "critic_norm": optax.global_norm(critic),
        "critic_gradient_norm": optax.global_norm(critic_gradient),
    }
    agent = {
        "actor": actor,
        "critic": critic,
        "target": slow,
        "log_alpha": log_alpha,
        "actor_state": actor_state,
        "critic_state": critic_state,
        "alpha_state": alpha_state,
    }
    return agent, metrics


@jax.jit
def update(key, agent: dict, masks: dict, batch: dict):
    """As `learn`, with noise from JAX's generator."""
    key, now, after = jax.random.split(key, 3)
    noise = jax.random.normal(now, batch["action"].shape)
    next_noise = jax.random.normal(after, batch["action"].shape)
    agent, metrics = learn(agent, masks, batch, noise, next_noise)
    return key, agent, metrics


def make_masks(random: np.random.Generator, network: dict, sparsity: float):
    """0 or 1 for each weight, of every matrix; None without sparsity."""
    if not sparsity:
        return None

    def mask(part):
        kept = random.random(part.shape) >= sparsity if part.ndim > 1 else np.ones(part.shape)
        return jnp.asarray(kept, jnp.float32)

    return jax.tree.map(mask, network)


def make_agent(actor: dict, critic: dict) -> dict:
    log_alpha = jnp.log(jnp.float32(START_TEMPERATURE))
    return {
        "actor": actor,
        "critic": critic,
        "target": critic,
        "log_alpha": log_alpha,
        "actor_state": ADAMW.init(actor),
        "critic_state": ADAMW.init(critic),
        "alpha_state": TEMPERATURE_ADAMW.init(log_alpha),
    }


class Training:
    """An agent that learns from one batch of NumPy arrays."""

    def __init__(self, args: Args):
        random = np.random.default_rng(0)
        hidden = round(128 * args.width_scale)
        inputs = args.obs_dim + args.action_dim
        actor = simba(random, args.obs_dim, hidden, 1, (args.action_dim, args.action_dim))
        critic = simba(random, inputs, 4 * hidden, 2, (1,))
        self.masks = {
            "actor": make_masks(random, actor, args.sparsity),
            "critic": make_masks(random, critic, args.sparsity),
        }
        if args.sparsity:
            actor = jax.tree.map(jnp.multiply, actor, self.masks["actor"])
            critic = jax.tree.map(jnp.multiply, critic, self.masks["critic"])
        self.agent = make_agent(actor, critic)
        self.key = jax.random.PRNGKey(0)
        sizes = {"obs": args.obs_dim, "action": args.action_dim, "next_obs": args.obs_dim}
        rows = args.batch_size
        self.batch = {name: random.normal(size=(rows, size)) for name, size in sizes.items()}
        self.batch |= {"reward": random.random(rows), "terminated": np.zeros(rows)}
        self.batch = {name: array.astype(np.float32) for name, array in self.batch.items()}

    def learn(self, read: bool) -> None:
        batch = {name: jnp.asarray(array) for name, array in self.batch.items()}
        self.key, self.agent, metrics = update(self.key, self.agent, self.masks, batch)
        if read:
            self.metrics = {name: float(value) for name, value in metrics.items()}

    def run(self, read: bool, updates: int) -> float:
        """ms per update."""
        start = time.perf_counter()
        for _ in range(updates):
            self.learn(read)
        jax.block_until_ready(self.agent)
        return 1000 * (time.perf_counter() - start) / updates


def main(args: Args) -> None:
    training = Training(args)
    result = {"device": str(jax.devices()[0]), "jax": jax.__version__}
    for name, read in (("as published", True), ("nothing read", False)):
        run = partial(training.run, read)
        run(2)  # compiles
        updates = max(1, round(1000 * args.turn_seconds / run(2)))
        result[name] = median(run(updates) for _ in range(args.turns))
        print(f"{name:<14}{result[name]:9.3f} ms per update on {result['device']}")
    statistics = jax.devices()[0].memory_stats() or {}  # a CPU has none
    result["peak_mib"] = statistics.get("peak_bytes_in_use", float("nan")) / 2**20
    print(json.dumps(result))


if __name__ == "__main__":
    runs.start(main, Args)
