"""Initial weights and mask seeds of DDPG, DrQ-v2, Stream AC and DER; the TD target that is logged.

SAC's are in test_sac_losses.py and test_sparse_layers.py.
"""

import math

import conftest
import ddpg_simba_sparse as ddpg
import der_impala_sparse as der
import drqv2_sparse as drq
import pytest
import sac_simba_sparse as sac
import stream_ac_sparse as stream
import torch
import torch.nn as nn
from conftest import CPU


def scaled_gram(weight: torch.Tensor) -> torch.Tensor:
    """Inner products of the rows of a weight, or of its columns if they are fewer."""
    matrix = weight.detach().double().flatten(1)
    matrix = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    return matrix @ matrix.T


def check_orthogonal(layer: nn.Module, gain: float) -> None:
    gram = scaled_gram(layer.weight)
    assert torch.allclose(gram, gain**2 * torch.eye(len(gram), dtype=gram.dtype), atol=1e-5)
    assert not layer.bias.any()


def test_ddpg_is_orthogonal_but_for_the_residual_layers():
    agent = conftest.make_agent(ddpg, obs_dim=67, action_dim=21, width_scale=0.5)
    for name, layer in (*agent.actor.named_modules(), *agent.critic.named_modules()):
        if isinstance(layer, nn.Linear) and name.endswith((".up", ".down")):
            expected = math.sqrt(2 / layer.in_features)
            assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=0.03)
        elif isinstance(layer, nn.Linear):
            check_orthogonal(layer, gain=1)


def test_drqv2_is_orthogonal_and_its_convolutions_have_the_gain_of_relu():
    agent = drq.Agent(drq.Args(width_scale=0.0625, feature_dim=8), 2, CPU)
    for network in (agent.encoder, agent.actor, agent.critic):
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                check_orthogonal(layer, gain=math.sqrt(2))
            elif isinstance(layer, nn.Linear):
                check_orthogonal(layer, gain=1)


def test_der_is_xavier_at_the_start_of_a_stage_and_lecun_in_residual_blocks():
    encoder = der.impala(2, 2)
    inside = [conv for block in encoder for conv in block.modules() if block is not conv]
    for conv in [part for part in encoder.modules() if isinstance(part, nn.Conv2d)]:
        fan_in = 9 * conv.in_channels
        if any(conv is part for part in inside):
            # A normal cut at 2 sigma has 0.8796 of its std
            std = 1 / math.sqrt(fan_in)
            largest = 2 * std / 0.8796
        else:
            largest = math.sqrt(6 / (fan_in + 9 * conv.out_channels))
            std = largest / math.sqrt(3)  # uniform
        assert float(conv.weight.detach().std()) == pytest.approx(std, rel=0.05)
        assert 0.97 * largest < float(conv.weight.detach().abs().max()) <= 1.0001 * largest
        assert not conv.bias.any()


NETWORKS = {
    sac: (2, lambda args: sac.Agent(args, 3, 1, CPU)),
    ddpg: (2, lambda args: ddpg.Agent(args, 3, 1, CPU)),
    drq: (3, lambda args: drq.Agent(args, 1, CPU)),
    stream: (2, lambda args: stream.Agent(args, 3, 1)),
    der: (1, lambda args: der.Agent(args, 2, CPU)),
}


@pytest.mark.parametrize("agent", NETWORKS, ids=lambda agent: agent.__name__)
def test_each_network_has_a_mask_of_its_own_from_the_mask_seed(agent, monkeypatch):
    count, make = NETWORKS[agent]
    seeds = []
    real = agent.sparsify

    def spy(*networks, mask_seed, **how):
        seeds.append(mask_seed)
        real(*networks, mask_seed=mask_seed, **how)

    monkeypatch.setattr(agent, "sparsify", spy)
    make(agent.Args(width_scale=0.125, seed=5))
    make(agent.Args(width_scale=0.125, seed=6, mask_seed=9))
    assert seeds == [agent.derive_seed(seed, part) for seed in (5, 9) for part in range(count)]
    assert len(set(seeds)) == 2 * count


@pytest.mark.parametrize("agent", [sac, ddpg], ids=["sac", "ddpg"])
def test_the_td_target_that_is_logged_is_its_mean(agent):
    batch, noise, next_noise = conftest.make_batch(agent)
    parts = conftest.make_agent(agent)
    losses = agent.update(parts, batch, noise, next_noise, 0.9, tau=0.0)
    # With the new actor and temperature; the target critic has not moved
    alpha = [parts.alpha().detach()] if agent is sac else []
    target = agent.td_target(parts.actor, parts.target_critic, *alpha, batch, 0.9, next_noise)
    assert target.std() > 0.1
    assert losses["td_target"].item() == pytest.approx(float(target.mean()), rel=1e-5)


def test_the_td_target_of_pixel_agents_is_its_mean():
    agent = drq.Agent(drq.Args(width_scale=0.0625, feature_dim=8), 1, CPU)
    obs, next_obs = torch.randint(0, 256, (2, 4, 84, 84, 9), dtype=torch.uint8)
    batch = drq.Batch(obs, torch.rand(4, 1), 5 * torch.rand(4), torch.full((4,), 0.9), next_obs)
    noise, next_noise = 0.1 * torch.randn(2, 4, 1)
    with torch.no_grad():
        features = agent.encoder(next_obs)
    target = drq.td_target(agent.actor, agent.target_critic, batch, features, next_noise)
    losses = drq.update(agent, batch, noise, next_noise, 0.01)
    assert losses["td_target"].item() == pytest.approx(float(target.mean()), rel=1e-5)

    agent = der.Agent(der.Args(width_scale=0.0625), 3, CPU)
    obs, next_obs = torch.randint(0, 256, (2, 4, 84, 84, 4), dtype=torch.uint8)
    rest = (torch.tensor([0, 1, 2, 0]), 5 * torch.rand(4), torch.full((4,), 0.9))
    batch = der.Batch(obs, *rest, next_obs, torch.ones(4), None)
    noise, next_noise = agent.network.draw_noise(), agent.network.draw_noise()
    target = der.target_distribution(
        agent.network, agent.target_network, batch, agent.support, next_noise
    )
    losses, _ = der.update(agent, batch, noise, next_noise)
    expected = float((target @ torch.linspace(-10, 10, 51)).mean())
    assert losses["td_target"].item() == pytest.approx(expected, rel=1e-5)
