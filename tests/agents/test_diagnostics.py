"""Rank, dormancy and norms against numbers worked out by hand; measuring changes nothing."""

import copy
from functools import partial

import conftest
import ddpg_simba_sparse as ddpg
import der_impala_sparse as der
import drqv2_sparse as drq
import pytest
import sac_simba_sparse as sac
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import BY_KERNEL, CPU

make_agent = partial(conftest.make_agent, sac)
make_batch = partial(conftest.make_batch, sac, 32)


def with_spectrum(singular: list[float], rows: int, columns: int) -> torch.Tensor:
    """A random matrix (rows, columns) with these singular values."""
    torch.manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, len(singular), dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, len(singular), dtype=torch.float64))[0]
    return (left * torch.tensor(singular, dtype=torch.float64)) @ right.T


@pytest.mark.parametrize("columns", [5, 40, 300])  # up to more units than samples
def test_stable_rank_of_a_known_spectrum(columns):
    # Shares of the sum 97, 2.5, 0.3, 0.15, 0.05 %: two hold 99 %, one holds 90 %, three hold 99.6
    # %. Divided by sqrt(100): 9.7, 0.25, 0.03, 0.015, 0.005: four above 0.01, two above 0.1, all
    # above 0.001.
    features = with_spectrum([97, 2.5, 0.3, 0.15, 0.05], 100, columns)
    assert sac.stable_rank(features) == (2, 4)
    assert sac.stable_rank(features, mass=0.9, threshold=0.1) == (1, 2)
    assert sac.stable_rank(features, mass=0.996, threshold=0.001) == (3, 5)


def test_stable_rank_at_its_ends():
    # Of 200 equal singular values, 198 hold exactly 99 %: one to either side by rounding.
    rank, above = sac.stable_rank(with_spectrum([3.0] * 200, 256, 200))
    assert rank in (198, 199) and above == 200
    assert sac.stable_rank(torch.ones(64, 1) @ torch.randn(1, 16)) == (1, 1)
    # The scale moves the second form only: 1e-4 of the spectrum above leaves 0.00097 as its
    # largest.
    assert sac.stable_rank(1e-4 * with_spectrum([97, 2.5, 0.3, 0.15, 0.05], 100, 40)) == (2, 0)


def test_dormant_ratio_by_hand():
    # Mean |output| of the four units: 10.1, 5, 0.3, 0.6 with mean 4: 2.525, 1.25, 0.075 and 0.15 of
    # it.
    first = torch.tensor([[10.0, 5.0, 0.3, 0.7], [-10.2, -5.0, 0.3, -0.5]])
    assert sac.dormant_ratio([first]) == 25.0
    assert sac.dormant_ratio([first], tau=0.2) == 50.0
    assert sac.dormant_ratio([first], tau=0.05) == 0.0
    # A second layer of two units, one of them silent: units are pooled, 2 of 6.
    second = torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    assert sac.dormant_ratio([first, second]) == pytest.approx(100 * 2 / 6)
    assert sac.dormant_ratio([torch.zeros(2, 3)]) == 100.0


@pytest.fixture
def small_encoder() -> nn.Sequential:
    """ReLU units x, -x - 100 and 0.01 y of inputs (x, y); then their sum and 10 times the first."""
    encoder = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        encoder[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.01]]))
        encoder[0].bias.copy_(torch.tensor([0.0, -100.0, 0.0]))
        encoder[2].weight.copy_(torch.tensor([[1.0, 1.0, 1.0], [10.0, 0.0, 0.0]]))
        encoder[2].bias.zero_()
    return encoder


def test_measurements_of_a_small_encoder_by_hand(small_encoder):
    # Inputs (3, 100) and (-1, 100). Before the ReLU the units are 3, -103, 1 and -1, -99, 1: mean
    # |.| 2, 101, 1 of mean 34.67, so that the first and the third count as dormant (0.058, 0.029)
    # and the dead one does not. After it: 3, 0, 1 and 0, 0, 1: means 1.5, 0, 1 of mean 0.833, so
    # that only the dead one is dormant. Last layer: (4, 30) and (1, 0), means 2.5 and 15 of mean
    # 8.75: none dormant; 2 of 5 before, 1 of 3 after. Positive after the ReLU: 1/2, 0 and 1 of the
    # samples, 0.5 on average.
    # Feature norm: (sqrt(4^2 + 30^2) + 1) / 2 = (30.2655 + 1) / 2.
    # Singular values: squares sum to 16 + 900 + 1 = 917, determinant 30: 30.2660 and 0.9912; both
    # are needed for 99 % of their sum, and both exceed 0.01 sqrt(2).
    inputs = torch.tensor([[3.0, 100.0], [-1.0, 100.0]])
    parameters = [torch.tensor([3.0, 0.0]), torch.tensor(4.0)]
    gradients = [torch.tensor([5.0, 12.0]), torch.tensor(0.0)]
    measured = sac.measure_plasticity(small_encoder, inputs, parameters, gradients)
    assert measured == pytest.approx(
        {
            "srank_99": 2,
            "srank_threshold": 2,
            "dormant_ratio": 40.0,
            "dormant_ratio_relu": 100 / 3,
            "active_units": 0.5,
            "grad_norm": 13.0,
            "param_norm": 5.0,
            "feature_norm": 15.63275,
        },
        rel=1e-5,
    )


def test_measuring_leaves_no_hooks_and_no_gradients(small_encoder):
    inputs = torch.randn(4, 2)
    sac.measure_plasticity(small_encoder, inputs, list(small_encoder.parameters()), [torch.ones(3)])
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in small_encoder.modules()
    )
    assert all(
        parameter.grad is None and parameter.requires_grad
        for parameter in small_encoder.parameters()
    )
    small_encoder(inputs).sum().backward()
    before = [parameter.grad.clone() for parameter in small_encoder.parameters()]
    sac.measure_plasticity(small_encoder, inputs, list(small_encoder.parameters()), [torch.ones(3)])
    assert all(
        torch.equal(a, parameter.grad) for a, parameter in zip(before, small_encoder.parameters())
    )


@BY_KERNEL
def test_the_layers_measured_are_those_of_the_paper(kernel):
    # The input layer and both layers of each block before the residual sum, heads left out; one
    # ReLU a block.
    agent = make_agent(sparsity=0.8, sparse_kernel=kernel)
    encoder, inputs = agent.critic.encoders[0], torch.randn(32, 7)
    features, linear, relu = sac.run_and_record(encoder, inputs)
    assert [y.shape[1] for y in linear] == [64, 256, 64, 256, 64] and [
        y.shape[1] for y in relu
    ] == [256, 256]
    block = encoder[1]
    assert torch.equal(linear[1], block.up(block.norm(linear[0])))
    assert torch.equal(relu[0], linear[1].relu())
    assert torch.equal(linear[2], block.down(relu[0]))
    assert torch.equal(features, encoder(inputs)) and not features.requires_grad


@pytest.mark.parametrize(
    "flags", [{}, {"sparsity": 0.8}, {"sparsity": 0.8, "clipped_double_q": True}]
)
def test_diagnose_changes_nothing(flags):
    agent, (batch, noise, next_noise) = make_agent(**flags), make_batch()
    sac.update(agent, batch, noise, next_noise, 0.99, 0.005)
    networks = (agent.actor, agent.critic, agent.target_critic, agent.temperature)
    parameters = [parameter for network in networks for parameter in network.parameters()]
    old = [
        (p.detach().clone(), None if p.grad is None else p.grad.clone(), p.requires_grad)
        for p in parameters
    ]
    moments = copy.deepcopy(agent.critic_optimizer.state_dict())
    state = torch.get_rng_state()
    first = sac.diagnose(agent, batch, noise, next_noise, 0.99)
    assert first == sac.diagnose(agent, batch, noise, next_noise, 0.99)
    assert torch.equal(torch.get_rng_state(), state)
    for parameter, (value, gradient, requires_grad) in zip(parameters, old):
        assert torch.equal(parameter, value) and parameter.requires_grad == requires_grad
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    for index, values in agent.critic_optimizer.state_dict()["state"].items():
        assert all(torch.equal(values[name], moments["state"][index][name]) for name in values)
    for network in networks:
        assert not any(module._forward_hooks for module in network.modules())
    names = ("srank_99", "srank_threshold", "dormant_ratio", "dormant_ratio_relu", "active_units")
    names = (*names, "grad_norm", "param_norm", "feature_norm")
    assert list(first) == [f"{network}_{name}" for network in ("actor", "critic") for name in names]


@BY_KERNEL
def test_norms_over_active_weights_equal_those_of_the_masked_dense_network(kernel):
    agent, (batch, noise, next_noise) = make_agent(sparsity=0.8, sparse_kernel=kernel), make_batch()
    dense, masked, masks = make_agent(), copy.deepcopy(agent), {}
    for network_name in ("actor", "critic", "target_critic"):
        network = getattr(masked, network_name)
        for name, layer in list(network.named_modules()):
            if not isinstance(layer, sac.SparseLinear):
                continue
            linear = copy.deepcopy(
                getattr(dense, network_name.removeprefix("target_")).get_submodule(name)
            )
            with torch.no_grad():
                linear.weight.zero_().view(-1)[layer.active.long()] = layer.values
                linear.bias.copy_(layer.bias)
            network.set_submodule(name, linear)
            masks[linear.weight] = linear.weight != 0
    assert len(masks) == 3 + 5 + 5  # the three heads are overfull

    measured = sac.diagnose(agent, batch, noise, next_noise, 0.99)
    alpha = masked.alpha().detach()
    target = sac.td_target(masked.actor, masked.target_critic, alpha, batch, 0.99, next_noise)
    losses = {
        "actor": sac.actor_loss(masked.actor, masked.critic, alpha, batch.obs, noise)[0],
        "critic": sac.critic_loss(masked.critic, batch, target),
    }
    for name, loss in losses.items():
        parameters = list(getattr(masked, name).parameters())
        gradients = torch.autograd.grad(loss, parameters)
        dense_norm = sum(g.square().sum() for g in gradients).sqrt()
        gradients = [g * masks.get(p, 1) for p, g in zip(parameters, gradients)]
        grad_norm = sum(g.square().sum() for g in gradients).sqrt()
        assert measured[f"{name}_grad_norm"] == pytest.approx(float(grad_norm), rel=1e-5)
        # Pruned weights had gradients too
        assert measured[f"{name}_grad_norm"] < 0.95 * float(dense_norm)
        param_norm = sum(p.detach().square().sum() for p in parameters).sqrt()
        assert measured[f"{name}_param_norm"] == pytest.approx(float(param_norm), rel=1e-6)
    features = masked.critic.encoders[0](torch.cat([batch.obs, batch.action], -1))
    assert measured["critic_feature_norm"] == pytest.approx(
        float(features.detach().norm(dim=1).mean()), rel=1e-5
    )


def norm_of_gradients(loss: torch.Tensor, network: nn.Module) -> float:
    gradients = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
    return float(sum(gradient.square().sum() for gradient in gradients).sqrt())


def mean_norm(features: torch.Tensor) -> float:
    return float(features.detach().square().sum(1).sqrt().mean())


def move(network: nn.Module) -> None:
    """A target network that differs from the trained one."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def test_what_ddpg_measures():
    agent = conftest.make_agent(ddpg)
    move(agent.target_critic)
    batch, noise, next_noise = conftest.make_batch(ddpg)
    measured = ddpg.diagnose(agent, batch, noise, next_noise, 0.9)
    next_value = agent.target_critic(batch.next_obs, agent.actor(batch.next_obs, next_noise))[0]
    target = (batch.reward + 0.9 * (1 - batch.terminated) * next_value).detach()
    losses = {
        "actor": -agent.critic(batch.obs, agent.actor(batch.obs, noise)).mean(),
        "critic": (agent.critic(batch.obs, batch.action)[0] - target).square().mean(),
    }
    features = {
        "actor": agent.actor.encoder(batch.obs),
        "critic": agent.critic.encoders[0](torch.cat([batch.obs, batch.action], -1)),
    }
    for name, loss in losses.items():
        expected = norm_of_gradients(loss, getattr(agent, name))
        assert measured[f"{name}_grad_norm"] == pytest.approx(expected, rel=1e-4)
        assert measured[f"{name}_feature_norm"] == pytest.approx(mean_norm(features[name]))


def test_what_drqv2_measures():
    """The hidden layers behind the trunks, the critic's in its first Q-function."""
    agent = drq.Agent(drq.Args(width_scale=0.0625, feature_dim=8), 1, CPU)
    move(agent.target_critic)
    obs, next_obs = torch.randint(0, 256, (2, 4, 84, 84, 9), dtype=torch.uint8)
    batch = drq.Batch(obs, torch.rand(4, 1), torch.rand(4), torch.full((4,), 0.9), next_obs)
    noise, next_noise = 0.1 * torch.randn(2, 4, 1)
    measured = drq.diagnose(agent, batch, noise, next_noise)
    with torch.no_grad():
        here, later = agent.encoder(obs), agent.encoder(next_obs)
        value = agent.target_critic(later, agent.actor(later, next_noise)).amin(0)
        target = batch.reward + 0.9 * value
    errors = agent.critic(here, batch.action) - target
    losses = {
        "actor": -agent.critic(here, agent.actor(here, noise)).amin(0).mean(),
        "critic": errors[0].square().mean() + errors[1].square().mean(),
    }
    critic_inputs = torch.cat([agent.critic.trunk(here), batch.action], -1)
    features = {
        "actor": agent.actor.body(agent.actor.trunk(here)),
        "critic": agent.critic.bodies[0](critic_inputs),
    }
    for name, loss in losses.items():
        expected = norm_of_gradients(loss, getattr(agent, name))
        assert measured[f"{name}_grad_norm"] == pytest.approx(expected, rel=1e-3)
        assert measured[f"{name}_feature_norm"] == pytest.approx(mean_norm(features[name]))


def test_what_der_measures():
    """The hidden layer without noise; the gradient of the weighted loss with noise."""
    agent = der.Agent(der.Args(width_scale=0.0625), 3, CPU)
    move(agent.target_network)
    obs, next_obs = torch.randint(0, 256, (2, 4, 84, 84, 4), dtype=torch.uint8)
    action, weight = torch.tensor([0, 1, 2, 0]), torch.tensor([1.0, 0.1, 0.5, 0.2])
    rest = (action, torch.randn(4), torch.full((4,), 0.9))
    batch = der.Batch(obs, *rest, next_obs, weight, None)
    noise, next_noise = agent.network.draw_noise(), agent.network.draw_noise()
    measured = der.diagnose(agent, batch, noise, next_noise)
    target = der.target_distribution(
        agent.network, agent.target_network, batch, agent.support, next_noise
    )
    logits = agent.network(obs, noise)[torch.arange(4), action]
    loss = (-weight * (target * logits.log_softmax(-1)).sum(-1)).mean()
    expected = norm_of_gradients(loss, agent.network)
    assert measured["critic_grad_norm"] == pytest.approx(expected, rel=1e-3)
    hidden = F.relu(agent.network.hidden(agent.network.encode(obs)))
    assert measured["critic_feature_norm"] == pytest.approx(mean_norm(hidden))
