"""The dense weight that a sparse layer keeps is that of its values, whatever has changed them."""

import copy

import ddpg_simba_sparse as ddpg
import drqv2_sparse as drq
import pytest
import sac_simba_sparse as sac
import torch
import torch.nn as nn
from conftest import make_agent

PLACES = torch.tensor([0, 3, 7, 8, 13, 19])


def linear() -> sac.SparseLinear:
    """5 x 4, with a kept weight that has been used once."""
    layer = sac.SparseLinear(nn.Linear(4, 5), PLACES)
    layer.kept = sac.DenseCopy()
    layer(torch.ones(1, 4))
    return layer


def convolution() -> drq.SparseConv2d:
    """3 x 2 x 2 x 2, with a kept weight that has been used once."""
    layer = drq.SparseConv2d(nn.Conv2d(2, 3, kernel_size=2), PLACES)
    layer.kept = drq.DenseCopy()
    layer(torch.ones(1, 2, 5, 5))
    return layer


def expected_weight(layer: nn.Module) -> torch.Tensor:
    weight = torch.zeros(layer.shape, dtype=layer.values.dtype)
    with torch.no_grad():
        weight.view(-1)[layer.active.long()] = layer.values
    return weight


def step(optimizer: torch.optim.Optimizer, layer: nn.Module) -> None:
    layer.values.grad = torch.ones_like(layer.values)
    optimizer.step()


@torch.no_grad()
def add_one(layer: nn.Module) -> None:
    layer.values.add_(1)


def average(layer: nn.Module) -> None:
    other = [torch.ones_like(parameter) for parameter in layer.parameters()]
    with torch.no_grad():
        torch._foreach_lerp_(list(layer.parameters()), other, 0.5)


CHANGES = {
    "fused AdamW": lambda layer: step(torch.optim.AdamW(layer.parameters(), fused=True), layer),
    "AdamW": lambda layer: step(torch.optim.AdamW(layer.parameters(), foreach=True), layer),
    "SGD": lambda layer: step(torch.optim.SGD(layer.parameters(), lr=1.0), layer),
    "in place": add_one,
    "average": average,
    "checkpoint": lambda layer: layer.load_state_dict(
        {**layer.state_dict(), "values": torch.arange(6.0)}
    ),
    "another parameter": lambda layer: setattr(layer, "values", nn.Parameter(torch.arange(6.0))),
    "float64": lambda layer: layer.double(),
}


@pytest.mark.parametrize("make", [linear, convolution])
@pytest.mark.parametrize("change", CHANGES)
def test_it_follows_every_change(make, change):
    layer = make()
    before = expected_weight(layer)
    module = sac if make is linear else drq
    assert torch.equal(module.dense_weight(layer), before)
    CHANGES[change](layer)
    after = expected_weight(layer)
    assert after.dtype != before.dtype or not torch.equal(after, before)
    assert torch.equal(module.dense_weight(layer), after)
    with torch.no_grad():
        assert torch.equal(module.dense_weight(layer), after)


@pytest.mark.parametrize("make", [linear, convolution])
def test_a_copy_of_a_layer_has_a_weight_of_its_own(make):
    layer = make()
    module = sac if make is linear else drq
    other = copy.deepcopy(layer)
    add_one(other)
    assert torch.equal(module.dense_weight(other), expected_weight(other))
    assert torch.equal(module.dense_weight(layer), expected_weight(layer))


@pytest.mark.parametrize("make", [linear, convolution])
def test_its_gradient_is_that_of_the_places(make):
    layer = make()
    module = sac if make is linear else drq
    factor = torch.arange(float(torch.Size(layer.shape).numel())).view(layer.shape)
    (module.dense_weight(layer) * factor).sum().backward()
    assert layer.values.grad.tolist() == PLACES.tolist()


def test_a_use_between_a_forward_and_its_backward_is_an_error_not_a_wrong_gradient():
    layer = linear()
    x = torch.ones(2, 4, requires_grad=True)
    output = layer(x)
    add_one(layer)
    layer(x)
    with pytest.raises(RuntimeError, match="modified inplace"):
        output.sum().backward()


@pytest.mark.parametrize("module", [sac, ddpg], ids=["sac", "ddpg"])
def test_training_with_it_equals_training_without(module):
    """Five updates with a measurement and an action between them, and a new agent after three."""
    ends = []
    for keep in (True, False):
        agent = make_agent(module, sparsity=0.5, sparse_kernel="dense")
        torch.manual_seed(0)
        for update in range(5):
            if update == 3:
                agent = make_agent(module, sparsity=0.5, sparse_kernel="dense", seed=2)
            for network in (agent.actor, agent.critic, agent.target_critic):
                for layer in network.modules():
                    if isinstance(layer, module.SparseLinear) and not keep:
                        layer.kept = None
            batch = module.Batch(
                obs=torch.randn(8, 5),
                action=torch.rand(8, 2),
                reward=torch.randn(8),
                next_obs=torch.randn(8, 5),
                terminated=torch.zeros(8),
            )
            noises = torch.randn(2, 8, 2)
            module.diagnose(agent, batch, *noises, 0.9)
            module.update(agent, batch, *noises, 0.9, tau=0.1)
            module.choose_action(agent, batch.obs, None)
        networks = (agent.actor, agent.critic, agent.target_critic)
        ends.append([parameter for part in networks for parameter in part.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*ends))


def test_a_target_network_keeps_none():
    agent = make_agent(sac, sparsity=0.5, sparse_kernel="dense")
    obs = torch.zeros(3, 5)
    agent.critic(obs, torch.zeros(3, 2))
    with torch.no_grad():
        agent.target_critic(obs, torch.zeros(3, 2))
    kept = [layer.kept for layer in agent.critic.modules() if isinstance(layer, sac.SparseLinear)]
    target = [
        layer.kept for layer in agent.target_critic.modules() if isinstance(layer, sac.SparseLinear)
    ]
    assert kept and all(copy.memory is not None for copy in kept)
    assert all(copy.memory is None for copy in target)
