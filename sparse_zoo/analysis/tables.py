"""Tables 1 to 5 of the paper, from the code and the live environments, beside the paper's values.

    ./benchmark.sh table2
    ./benchmark.sh all --scale paper --runner dry-run >commands
    python sparse_zoo/analysis/tables.py --table 2 <commands

Our values are read off environments, Args, networks, optimisers and, for the target entropy, an
update; the sets of widths and depths in Tables 2 and 3 are those of the commands on standard input.
Rows that differ are marked. Docs: docs/benchmark.md.
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import runs
import pandas as pd
import plots
import torch
from runs import fail, import_agent

CPU = torch.device("cpu")
PAPER = Path(__file__).with_name("paper_tables.csv")
TASKS = "dog-run", "dog-trot", "dog-walk", "humanoid-run", "humanoid-stand", "humanoid-walk"


@dataclass
class Args:
    table: Literal[1, 2, 3, 4, 5] = 1
    """1: tasks; 2: SAC; 3: DDPG; 4: DrQ-v2; 5: DER"""
    output: str = "results/tables"
    """folder of table.md"""


Rows = list[tuple[str, str, str]]  # what, ours, the paper's


def compare(table: int, ours: dict[str, object]) -> Rows:
    """A row for each of the paper's values, in its order; floats as short as they can be."""
    rows = []
    papers = pd.read_csv(PAPER, dtype={"value": str})
    for row in papers[papers.table == table].itertuples():
        value = ours.get(row.name, "missing")
        text = f"{value:g}" if isinstance(value, float) else str(value)
        rows.append((row.name, text, row.value))
    return rows


def tasks() -> Rows:
    """Table 1, from the environments."""
    sac = import_agent("sac_simba_sparse")
    ours = {}
    for task in TASKS:
        env = sac.make_env(sac.Args(env_id=f"dm_control/{task}-v0"))
        name = task.replace("-", " ").title()
        ours[f"{name}, observation dim"] = env.observation_space.shape[0]
        ours[f"{name}, action dim"] = env.action_space.shape[0]
    return compare(1, ours)


def sweep(module, commands: str, flag: str) -> list:
    """The values of a flag in the commands of an agent."""
    own = [line for line in commands.splitlines() if f"/{module.__name__}.py" in line]
    if not own:
        fail(
            f"no command of {module.__name__}.py on standard input; "
            "pipe ./benchmark.sh all --scale paper --runner dry-run into this"
        )
    pattern = f"--{flag.replace('_', '-')} (\\S+)"
    return sorted({float(match) for line in own for match in re.findall(pattern, line)})


def sizes(module, commands: str) -> dict[str, str]:
    """Blocks and hidden units of the networks that the commands train, built on no device."""
    found = {}
    for width in sweep(module, commands, "width_scale"):
        for name, encoder in meta_encoders(module, width_scale=width).items():
            found.setdefault(f"{name} hidden dim", []).append(str(encoder[0].out_features))
    for depth in sweep(module, commands, "depth_scale"):
        for name, encoder in meta_encoders(module, depth_scale=int(depth)).items():
            blocks = sum(isinstance(part, module.ResidualBlock) for part in encoder)
            found.setdefault(f"{name} num blocks", []).append(str(blocks))
    return {name: ", ".join(values) for name, values in found.items()}


def meta_encoders(module, **flags) -> dict:
    """Encoders of actor and critic, without memory for their weights."""
    with torch.device("meta"):
        return encoders(module.Agent(module.Args(**flags), 67, 21, torch.device("meta")))


def encoders(agent) -> dict:
    return {"Actor": agent.actor.encoder, "Critic": agent.critic.encoders[0]}


def simba(name: str, commands: str) -> Rows:
    """Tables 2 and 3."""
    module = import_agent(name)
    args = module.Args(width_scale=0.125)
    agent = module.Agent(args, 3, 2, CPU)
    optimizer = type(agent.critic_optimizer).__name__
    settings = agent.critic_optimizer.param_groups[0]
    kinds = {type(part).__name__ for encoder in encoders(agent).values() for part in encoder}
    simba_block = kinds == {"Linear", "ResidualBlock", "LayerNorm"}
    block = "SimBa" if simba_block else " + ".join(sorted(kinds))
    env = module.make_env(args)
    gamma = module.default_gamma(env, args.action_repeat) if args.gamma is None else args.gamma
    ours = {
        **sizes(module, commands),
        "Critic block type": block,
        "Actor block type": block,
        "Critic learning rate": settings["lr"],
        "Actor learning rate": agent.actor_optimizer.param_groups[0]["lr"],
        "Target critic momentum (tau)": args.tau,
        "Batch size": args.batch_size,
        "Optimizer": optimizer,
        "Optimizer momentum": ", ".join(f"{beta:g}" for beta in settings["betas"]),
        "Weight decay": settings["weight_decay"],
        "Discount": f"heuristic ({gamma:g})" if args.gamma is None else gamma,
        "Replay ratio": args.updates_per_step,
        "Clipped Double Q": args.clipped_double_q,
    }
    if name == "ddpg_simba_sparse":
        ours["Exploration noise"] = f"N(0, {args.exploration_noise:g}^2)"
        return compare(3, ours)
    ours["Initial temperature"] = float(agent.alpha().detach())
    ours["Temperature learning rate"] = agent.temperature_optimizer.param_groups[0]["lr"]
    ours["Target entropy"] = target_entropy(module, agent, action_dim=2)
    return compare(2, ours)


def target_entropy(module, agent, action_dim: int) -> str:
    """In actions, read off one update.

    The temperature's gradient is alpha * (entropy - target entropy).
    """
    alpha = float(agent.alpha().detach())
    obs = torch.randn(4, 3)
    batch = module.Batch(obs, torch.rand(4, action_dim), torch.rand(4), obs, torch.zeros(4))
    entropy = module.update(agent, batch, *torch.randn(2, 4, action_dim), 0.99, 0.005)["entropy"]
    ratio = float(entropy - agent.temperature["log_alpha"].grad / alpha) / action_dim
    sign = "-" if ratio < 0 else ""
    return f"{sign}dim(A)/{1 / abs(ratio):.3g}"


def drqv2() -> Rows:
    """Table 4."""
    drq = import_agent("drqv2_sparse")
    args = drq.Args()
    agent = drq.Agent(args, 12, CPU)
    with torch.no_grad():
        image = torch.zeros(1, drq.SIZE, drq.SIZE, 3 * drq.STACK, dtype=torch.uint8)
        representation = agent.encoder.layers(image.permute(0, 3, 1, 2).float()).shape[1:]
        assert agent.encoder(image).shape[1] == representation.numel()
    layers = drq.layer_table(agent.critic)
    hidden = max(row["shape"][0] for row in layers if len(row["shape"]) == 2)
    schedule = (args.std_start, args.std_end, args.std_decay // args.action_repeat)
    ours = {
        "Replay buffer capacity": args.buffer_size,
        "Action repeat": args.action_repeat,
        "Seed frames": args.learning_starts,
        "Exploration steps": args.learning_starts // args.action_repeat,
        "n-step returns": args.n_step,
        "Mini-batch size": args.batch_size,
        "Discount": args.gamma,
        "Optimizer": type(agent.critic_optimizer).__name__,
        "Learning rate": agent.critic_optimizer.param_groups[0]["lr"],
        "Critic Q-function soft-update rate": args.tau,
        "Features dim.": args.feature_dim,
        "Repr. dim.": " x ".join(map(str, representation)),
        "Hidden dim.": hidden,
        "Exploration stddev. clip": args.noise_clip,
        "Exploration stddev. schedule": "linear({:g}, {:g}, {})".format(*schedule),
    }
    return compare(4, ours)


def der() -> Rows:
    """Table 5; rewards are clipped in the training loop, their bounds are read off the source."""
    module = import_agent("der_impala_sparse")
    args = module.Args()
    env = module.make_env(args)
    agent = module.Agent(args, int(env.action_space.n), CPU)
    settings = agent.optimizer.param_groups[0]
    frame, _ = env.reset(seed=0)
    kinds = {type(part).__name__ for part in agent.network.encoder}
    impala = kinds == {"Conv2d", "MaxPool2d", "ResidualBlock", "ReLU"}
    noisy = any(noise.any() for pair in agent.network.draw_noise() for noise in pair)
    logits = agent.network(torch.zeros(1, *frame.shape, module.STACK, dtype=torch.uint8))
    bounds = re.search(r"np\.clip\(reward, (\S+), (\S+)\)", Path(module.__file__).read_text())
    ours = {
        "Gray-scaling": frame.ndim == 2,
        "Observation down-sampling": "x".join(map(str, frame.shape[:2])),
        "Frames stacked": module.STACK,
        "Action repetitions": args.action_repeat,
        "Reward clipping": f"[{bounds[1]}, {bounds[2]}]" if bounds else "not found",
        "Terminal on loss of life": args.terminal_on_life_loss,
        "Update": "Distributional Q" if logits.shape[-1] == args.atoms else "Q",
        "Dueling": {"advantage", "value"} <= dict(agent.network.named_children()).keys(),
        "Support of Q-distribution": len(agent.support),
        "Discount factor": args.gamma,
        "Minibatch size": args.batch_size,
        "Optimizer": type(agent.optimizer).__name__,
        "Optimizer: learning rate": settings["lr"],
        "Optimizer: epsilon": settings["eps"],
        "Exploration": "Noisy nets" if noisy else "none",
        "Noisy nets parameter": args.noisy_sigma,
        "Training steps": f"{args.total_timesteps / args.action_repeat / 1000:g}K",
        "Evaluation trajectories": args.final_eval_episodes,
        "Min replay size for sampling": args.learning_starts // args.action_repeat,
        "Updates per step": args.updates_per_step,
        "Multi-step return length": args.n_step,
        "CNN network": "IMPALA CNN" if impala else " + ".join(sorted(kinds)),
        "Target network update period": args.target_interval,
    }
    return compare(5, ours)


def to_markdown(rows: Rows) -> str:
    """The rows, those that differ marked."""
    marked = []
    for what, ours, papers in rows:
        same = ours == papers or ours.startswith(f"{papers} (")
        marked.append([what, ours, papers, "" if same else "differs"])
    return plots.markdown_table(["", "here", "the paper", ""], marked)


def main(args: Args) -> None:
    os.environ.setdefault("MUJOCO_GL", "disabled")
    torch.manual_seed(0)
    # Read for every table, or who writes them dies of a broken pipe
    commands = "" if sys.stdin.isatty() else sys.stdin.read()
    match args.table:
        case 1:
            rows = tasks()
        case 2:
            rows = simba("sac_simba_sparse", commands)
        case 3:
            rows = simba("ddpg_simba_sparse", commands)
        case 4:
            rows = drqv2()
        case 5:
            rows = der()
    text = to_markdown(rows)
    with runs.new_files(args.output) as folder:
        (folder / "table.md").write_text(text)
    print(f"Table {args.table}\n\n{text}")


if __name__ == "__main__":
    runs.start(main, Args)
