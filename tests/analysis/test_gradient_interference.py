"""Cosines of gradients against one explicit gradient at a time; the tool's files and errors."""

from pathlib import Path

import conftest
import ddpg_simba_sparse as ddpg
import numpy as np
import pandas as pd
import pytest
import sac_simba_sparse as sac
import torch
import torch.nn as nn
from analysis import gradient_interference as gi
from conftest import BY_KERNEL, CPU, check_error, count_parameters, load_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

MODULES = {"sac": sac, "ddpg": ddpg}
OBS_DIM, ACTION_DIM, K, GAMMA = 3, 1, 12, 0.9  # the sizes of Pendulum-v1


def make_agent(module, **flags):
    """Two critics, away from initialisation (where every bias is 0 and both critics agree)."""
    flags = {"clipped_double_q": True, "sparse_kernel": "dense", **flags}
    agent = conftest.make_agent(module, OBS_DIM, ACTION_DIM, **flags)
    with torch.no_grad():
        for network in (agent.actor, agent.critic, agent.target_critic):
            for parameter in network.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
    return agent


def make_batch(k: int = K) -> tuple[sac.Batch, torch.Tensor, torch.Tensor]:
    """Transitions and the two noises."""
    batch, noise, next_noise = conftest.make_batch(sac, k, OBS_DIM, ACTION_DIM)
    return batch, 0.1 * noise, 0.1 * next_noise


def explicit_gradients(module, agent, batch, noise, next_noise, network: str) -> torch.Tensor:
    """(k, parameters), by a backward pass for each transition alone."""
    alpha = [agent.alpha().detach()] if module is sac else []
    parameters = list(getattr(agent, network).parameters())
    gradients = []
    for i in range(len(batch.obs)):
        one = type(batch)(*(column[i : i + 1] for column in batch))
        target = module.td_target(
            agent.actor, agent.target_critic, *alpha, one, GAMMA, next_noise[i : i + 1]
        )
        if network == "critic":
            loss = sum((q - target).square() for q in agent.critic(one.obs, one.action)).squeeze()
        elif module is sac:
            action, log_prob = agent.actor.sample(one.obs, noise[i : i + 1])
            loss = (alpha[0] * log_prob - agent.critic(one.obs, action).min(0).values).squeeze()
        else:
            loss = (
                -agent.critic(one.obs, agent.actor(one.obs, noise[i : i + 1]))
                .min(0)
                .values.squeeze()
            )
        gradient = torch.autograd.grad(loss, parameters)
        gradients.append(torch.cat([part.flatten() for part in gradient]))
    return torch.stack(gradients)


@pytest.mark.parametrize("network", ["actor", "critic"])
@pytest.mark.parametrize("sparsity", [0.0, 0.8])
@pytest.mark.parametrize("name", ["sac", "ddpg"])
def test_equals_one_explicit_gradient_at_a_time(name, sparsity, network):
    module = MODULES[name]
    agent, (batch, noise, next_noise) = make_agent(module, sparsity=sparsity), make_batch()
    single = gi.measure(module, agent, batch, noise, next_noise, GAMMA)[network]
    for part in vars(agent).values():
        if isinstance(part, nn.Module):
            part.double()
    batch, noise, next_noise = (
        type(batch)(*(column.double() for column in batch)),
        noise.double(),
        next_noise.double(),
    )
    double = gi.measure(module, agent, batch, noise, next_noise, GAMMA)[network]
    gradients = explicit_gradients(module, agent, batch, noise, next_noise, network)
    assert gradients.shape == (K, count_parameters(getattr(agent, network)))
    unit = gradients / gradients.norm(dim=1, keepdim=True)
    expected = (unit @ unit.t()).numpy()  # NaN where DDPG clips an action
    np.testing.assert_allclose(double, expected, rtol=0, atol=1e-10)
    # A small TD error is a difference of large numbers
    np.testing.assert_allclose(single, expected, rtol=0, atol=1e-4)
    # Neither all aligned nor all independent
    assert np.nanstd(expected[~np.eye(K, dtype=bool)]) > 0.1


def test_inner_products_by_hand():
    # Loss sum(w . x + b), gradient (x, 1): <(1, 2, 1), (3, -1, 1)> = 2, norms^2 6 and 11. With the
    # weight of the second input pruned: (1, 1) and (3, 1), inner product 4, norms^2 2 and 10.
    linear, x = nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    sparse = sac.SparseLinear(linear, torch.tensor([0]))
    for layer, expected in (
        (linear, [[6.0, 2.0], [2.0, 11.0]]),
        (sparse, [[2.0, 4.0], [4.0, 10.0]]),
    ):
        products = gi.gradient_products(layer, lambda layer=layer: layer(x).sum())
        assert products.tolist() == expected


@BY_KERNEL
def test_neither_chunk_nor_kernel_changes_the_result(kernel):
    agent, (batch, *_) = make_agent(sac, sparsity=0.8, sparse_kernel=kernel), make_batch()
    reference = make_agent(sac, sparsity=0.8)
    loss = {
        network: lambda n=network: n(batch.obs, batch.action).sum()
        for network in (agent.critic, reference.critic)
    }
    expected = gi.cosines(gi.gradient_products(reference.critic, loss[reference.critic]))
    for chunk in (1, 100, 10**6):
        matrix = gi.cosines(gi.gradient_products(agent.critic, loss[agent.critic], chunk))
        assert np.abs(matrix - expected).max() < 1e-6


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_memory_does_not_grow_as_transitions_times_parameters(sparsity):
    # Critic of width scale 0.5: 256 hidden, 1024 in the bottleneck, weights 1024 x 256; 64
    # transitions.
    flags = {"width_scale": 0.5, "clipped_double_q": False, "sparsity": sparsity}
    agent, (batch, *_) = make_agent(sac, **flags), make_batch(64)
    active = count_parameters(agent.critic)
    assert 64 * active > 50 * 1024 * 256 * (1 - sparsity)
    with LargestTensor() as largest:
        gi.gradient_products(
            agent.critic, lambda: agent.critic(batch.obs, batch.action).sum(), chunk=1000
        )
    assert largest.numel <= 1024 * 256


def test_clipped_actions_have_no_gradient_and_are_left_out():
    agent, (batch, noise, next_noise) = make_agent(ddpg), make_batch()
    noise[:5] = 10.0  # DDPG adds it and clips the sum to 1
    matrix = gi.measure(ddpg, agent, batch, noise, next_noise, GAMMA)["actor"]
    assert (
        np.isnan(matrix[:5]).all()
        and np.isnan(matrix[:, :5]).all()
        and not np.isnan(matrix[5:, 5:]).any()
    )
    kept, summary = gi.summarize(matrix[5:, 5:]), gi.summarize(matrix)
    assert summary == kept | {"no_gradient": 5}


def test_summary_by_hand():
    # Off the diagonal: 0.5, -0.2 and 0 twice each; the last transition has no gradient.
    nan = float("nan")
    matrix = np.array([[1, 0.5, -0.2, nan], [0.5, 1, 0, nan], [-0.2, 0, 1, nan], [nan] * 4])
    summary = gi.summarize(matrix)
    assert summary == pytest.approx({"mean_abs": 0.7 / 3, "negative": 1 / 3, "no_gradient": 1})
    assert np.isnan(gi.summarize(np.full((2, 2), nan))["mean_abs"])


# Command line


def write_run(run_dir: Path, module, seed: int = 3, trained: bool = False, **flags) -> None:
    """The checkpoint of a run on Pendulum-v1 with a full ring of 40 transitions."""
    flags = {"env_id": "Pendulum-v1", "width_scale": 0.125, "sparsity": 0.8, "seed": seed, **flags}
    args = module.Args(**flags)
    torch.manual_seed(seed)
    agent = module.Agent(args, OBS_DIM, ACTION_DIM, CPU)
    if trained:
        for parameter in [*agent.actor.parameters(), *agent.critic.parameters()]:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    norm, replay = (
        module.ObservationNorm(OBS_DIM, CPU),
        module.ReplayBuffer(40, OBS_DIM, ACTION_DIM, CPU),
    )
    for _ in range(55):
        obs, next_obs = np.random.default_rng(replay.added).normal(size=(2, OBS_DIM))
        norm.update(obs)
        replay.add(obs, torch.rand(ACTION_DIM), float(obs[0]), next_obs, 0.0)
    parts = {name: part for name, part in vars(agent).items() if name != "layers"} | {
        "norm": norm,
        "replay": replay,
    }
    state = {name: part.state_dict() for name, part in parts.items()}
    run_dir.mkdir(parents=True)
    module.save_checkpoint(
        run_dir, args, {**state, "counters": (1000, 990, 5, 0), "finished": True}
    )


@pytest.fixture
def run(main):
    return lambda *arguments: main(gi.__file__, "--threads", "1", *arguments)


def test_draws_and_tabulates_runs(run, tmp_path):
    write_run(tmp_path / "a", sac)
    write_run(tmp_path / "b", ddpg, trained=True, actor_sparsity=0.0)
    torch.manual_seed(99)  # nothing may depend on the generators' state
    flags = ("--samples", 20, "--output", "drawn", "--places", "active")
    code, out, err = run("a", "b", *flags)
    assert (code, err) == (0, "")
    table = pd.read_csv("drawn/gradient_interference.csv")
    assert table["run"].tolist() == ["a"] * 4 + ["b"] * 4
    assert table["network"].tolist() == ["actor", "actor", "critic", "critic"] * 2
    assert table["env_step"].tolist() == [0, 2000] * 4
    # The untrained checkpoint of run a is the network that its seed builds again: nothing changes
    # from before to after.
    for network, rows in table[table["run"] == "a"].groupby("network"):
        assert rows["mean_abs"].nunique() == rows["negative"].nunique() == 1, network
    for network, rows in table[table["run"] == "b"].groupby("network"):
        assert rows["mean_abs"].nunique() == 2, network
    for suffix in ("png", "svg"):
        size = Path(f"drawn/gradient_interference.{suffix}").stat().st_size
        assert 10_000 < size < 2_000_000
    assert "SAC, Pendulum-v1, width scale 0.125, sparsity 0.8, seed 3" in out
    assert "sparsity 0 (actor), 0.8 (critic)" in out


def test_takes_distinct_transitions_oldest_first(monkeypatch, tmp_path):
    # 55 transitions went through a ring of 40: all that are left are numbers 15 to 54, and their
    # rewards tell them.
    write_run(tmp_path / "a", ddpg)
    seen = []
    found = {"actor": np.eye(40), "critic": np.eye(40)}
    monkeypatch.setattr(gi, "measure", lambda module, agent, batch, *_: seen.append(batch) or found)
    gi.measure_run(*gi.read_run(tmp_path / "a", 40), 40, seed=0)
    expected = [
        np.float32(np.random.default_rng(n).normal(size=(2, OBS_DIM))[0, 0]) for n in range(15, 55)
    ]
    assert len(seen) == 2 and seen[0] is seen[1]
    assert seen[0].reward.tolist() == pytest.approx(expected)
    obs = seen[0].obs  # normalised
    assert obs.mean().abs() < 0.5 and obs.std() == pytest.approx(1, abs=0.2)


def test_bad_input_ends_with_one_line_and_code_2(run, tmp_path):
    for name, change in {
        "good": lambda checkpoint: None,
        "masks": lambda checkpoint: checkpoint["args"].update(seed=4),
        "foreign": lambda checkpoint: checkpoint.pop("critic"),
        "version": lambda checkpoint: checkpoint["args"].update(old_flag=1),
        "midway": lambda checkpoint: checkpoint.update(finished=False),
        "dynamic": lambda checkpoint: checkpoint.update(topology={}),
        "donated": lambda checkpoint: checkpoint["args"].update(init_from="a"),
    }.items():
        write_run(tmp_path / name, sac)
        checkpoint = load_checkpoint(tmp_path / name)
        change(checkpoint)
        torch.save(checkpoint, tmp_path / name / "checkpoint.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "checkpoint.pt").write_bytes(b"no checkpoint")

    for arguments, words in (
        (["midway"], "midway/checkpoint.pt was written before the end of training"),
        (["empty"], "no checkpoint.pt in empty"),
        (["absent"], "no checkpoint.pt in absent"),
        (["damaged"], "damaged/checkpoint.pt is damaged"),
        (["foreign"], "foreign/checkpoint.pt is not of sac_simba_sparse.py"),
        (["dynamic"], "dynamic/checkpoint.pt is of sac_simba_dynamic.py; give a run whose masks"),
        (["donated"], "donated/checkpoint.pt is of a run with --init-from"),
        (
            ["version"],
            "version/checkpoint.pt is of another version of sac_simba_sparse.py old_flag",
        ),
        (["masks", "--samples", 20], "masks: the saved mask is not the one drawn here"),
        (["good", "--samples", 41], "--samples 41 good has 40 transitions"),
        (["good", "--samples", 1], "--samples 1 is not allowed"),
        (
            ["good", "--samples", 20, "--output", "good/checkpoint.pt"],
            "cannot write to good/checkpoint.pt --output",
        ),
        ([], "at least one run folder"),
    ):
        check_error(run(*arguments), *words.split())
    assert not list((tmp_path / "results").rglob("*.*"))
