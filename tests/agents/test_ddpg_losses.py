"""DDPG's policy, losses and updates against numbers worked out by hand and in plain float64."""

import math
from functools import partial

import conftest
import ddpg_simba_sparse as ddpg
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import CPU, check_optimizer, count_parameters, dense_weight

OBS_DIM, ACTION_DIM, BATCH = 5, 2, 16


make_agent = partial(conftest.make_agent, ddpg)


def make_batch(seed: int) -> tuple[ddpg.Batch, torch.Tensor, torch.Tensor]:
    """A batch, and the two noises of an update, large enough that clipping takes part."""
    batch, noise, next_noise = conftest.make_batch(ddpg, seed=seed)
    return batch, 0.5 * noise, 0.5 * next_noise


# Policy


def test_policy_adds_its_noise_after_tanh_and_clips_the_sum():
    # tanh(0.5) = 0.4621172: + 0.25 = 0.7121172; + 0.75 passes 1; - 1.75 passes -1.
    actor = ddpg.Actor(3, 1, 8, 1)
    nn.init.zeros_(actor.head.weight)
    nn.init.constant_(actor.head.bias, 0.5)
    action = actor(torch.randn(4, 3), torch.tensor([[0.0], [0.25], [0.75], [-1.75]]))
    assert action[:, 0].tolist() == pytest.approx([0.4621172, 0.7121172, 1.0, -1.0], abs=1e-6)
    assert actor(torch.randn(1, 3)).item() == pytest.approx(0.4621172, abs=1e-6)


def test_no_gradient_where_the_noise_pushes_an_action_out_of_range():
    # d/d bias of tanh(b) + noise is 1 - tanh(0.5)^2 = 0.7864477 inside (-1, 1) and 0 outside.
    for noise, gradient in ((0.25, 0.7864477), (0.75, 0.0), (-1.75, 0.0)):
        actor = ddpg.Actor(3, 1, 8, 1)
        nn.init.zeros_(actor.head.weight)
        nn.init.constant_(actor.head.bias, 0.5)
        actor(torch.randn(1, 3), torch.tensor([[noise]])).sum().backward()
        assert actor.head.bias.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_acting_is_the_policy_with_or_without_noise():
    agent, norm = make_agent(), ddpg.ObservationNorm(OBS_DIM, CPU)
    norm.update(np.full(OBS_DIM, 2.0))
    obs, noise = np.arange(5.0), torch.tensor([0.1, -2.5])
    mode = torch.tanh(agent.actor.head(agent.actor.encoder(norm(torch.arange(5.0)[None]))))[
        0
    ].detach()
    assert ddpg.act(agent, norm, obs) == pytest.approx(mode.tolist(), abs=1e-6)
    noisy = ddpg.act(agent, norm, obs, noise)
    assert noisy == pytest.approx([min(float(mode[0]) + 0.1, 1.0), -1.0], abs=1e-6)
    assert noisy.shape == (ACTION_DIM,)


# Losses


def policy_stub(obs, noise):
    """Takes the observation as the action, so that a test sees what reaches the critic."""
    return obs + noise


def one_critic(obs, action):
    return 10 * action.T


def test_actor_loss_by_hand():
    # Q = 10 a for actions 1 + 0.5 and 3 - 1: -(15 + 20) / 2. A second critic 12 + a is smaller at
    # the first action (13.5) and at the second (14): -(13.5 + 14) / 2.
    obs, noise = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.5], [-1.0]])
    assert ddpg.actor_loss(policy_stub, one_critic, obs, noise).item() == -17.5
    two_critics = lambda _, a: torch.cat([10 * a.T, 12 + a.T])  # noqa: E731
    assert ddpg.actor_loss(policy_stub, two_critics, obs, noise).item() == -13.75


def test_td_target_by_hand():
    # Actions 0.5 and 2: Q = 5 and 20; 1 + 0.9 * 5 = 5.5; the terminated second keeps its reward 1;
    # the third, cut off by a time limit and so stored with terminated = 0, bootstraps like the
    # first.
    next_obs, noise = torch.tensor([[0.0], [1.0], [0.0]]), torch.tensor([[0.5], [1.0], [0.5]])
    batch = ddpg.Batch(None, None, torch.ones(3), next_obs, torch.tensor([0.0, 1.0, 0.0]))
    target = ddpg.td_target(policy_stub, one_critic, batch, 0.9, noise)
    assert target.tolist() == pytest.approx([5.5, 1.0, 5.5])
    # A second critic at -1 is smaller everywhere: 1 - 0.9.
    target = ddpg.td_target(
        policy_stub, lambda _, a: torch.cat([10 * a.T, 0 * a.T - 1]), batch, 0.9, noise
    )
    assert target.tolist() == pytest.approx([0.1, 1.0, 0.1])


def test_td_target_carries_no_gradient():
    agent, (batch, _, next_noise) = make_agent(), make_batch(0)
    target = ddpg.td_target(agent.actor, agent.critic, batch, 0.99, next_noise)
    assert target.shape == (BATCH,) and not target.requires_grad


# Whole updates, against float64 on dense matrices with masks


class Reference:
    """A network as dense float64 matrices: parameters, masks and AdamW moments, all by name."""

    def __init__(self, network: nn.Module):
        self.parameters, self.masks = {}, {}
        for name, module in network.named_modules():
            if isinstance(module, ddpg.SparseLinear):
                mask = dense_weight(module, torch.ones(len(module.active)))
                self.masks[f"{name}.weight"] = mask.double()
                self.parameters[f"{name}.weight"] = dense_weight(module).double()
                self.parameters[f"{name}.bias"] = module.bias.detach().double()
            elif isinstance(module, nn.Linear | nn.LayerNorm):
                for kind, parameter in module.named_parameters():
                    self.parameters[f"{name}.{kind}"] = parameter.detach().double()
        for name, value in self.parameters.items():
            self.parameters[name] = value.clone().requires_grad_()
        self.first = dict.fromkeys(self.parameters, 0.0)
        self.second = dict.fromkeys(self.parameters, 0.0)
        self.steps = 0

    def linear(self, name: str, x):
        return x @ self.parameters[f"{name}.weight"].T + self.parameters[f"{name}.bias"]

    def norm(self, name: str, x):
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return scaled * self.parameters[f"{name}.weight"] + self.parameters[f"{name}.bias"]

    def encode(self, name: str, x, blocks: int):
        x = self.linear(f"{name}.0", x)
        for block in range(1, blocks + 1):
            up = self.linear(f"{name}.{block}.up", self.norm(f"{name}.{block}.norm", x))
            x = x + self.linear(f"{name}.{block}.down", up.relu())
        return self.norm(f"{name}.{blocks + 1}", x)

    def descend(self, loss: torch.Tensor) -> None:
        """One AdamW step down a loss (1e-4, decay 1e-2, betas 0.9 and 0.999)."""
        gradients = torch.autograd.grad(loss, list(self.parameters.values()))
        self.steps += 1
        for (name, value), gradient in zip(list(self.parameters.items()), gradients):
            gradient = gradient * self.masks.get(name, 1.0)
            self.first[name] = 0.9 * self.first[name] + 0.1 * gradient
            self.second[name] = 0.999 * self.second[name] + 0.001 * gradient**2
            first = self.first[name] / (1 - 0.9**self.steps)
            second = self.second[name] / (1 - 0.999**self.steps)
            step = first / (second.sqrt() + 1e-8)
            self.parameters[name] = (
                (1 - 1e-4 * 1e-2) * value.detach() - 1e-4 * step
            ).requires_grad_()


@pytest.mark.parametrize("sparsity,kernel", [(0.0, "auto"), (0.8, "packed"), (0.8, "dense")])
def test_three_updates_equal_masked_dense_ddpg(sparsity, kernel):
    # In float64: where a gradient is all but zero, Adam makes a step of its rounding error.
    agent = make_agent(sparsity=sparsity, sparse_kernel=kernel)
    for network in (agent.actor, agent.critic, agent.target_critic):
        network.double()
    actor, critic, target_critic = (
        Reference(agent.actor),
        Reference(agent.critic),
        Reference(agent.target_critic),
    )

    def policy(obs, noise):
        return (actor.linear("head", actor.encode("encoder", obs, 1)).tanh() + noise).clamp(-1, 1)

    def q(network, obs, action):
        return network.linear(
            "heads.0", network.encode("encoders.0", torch.cat([obs, action], 1), 2)
        )[:, 0]

    for index in range(3):
        batch, *noises = make_batch(index)
        batch, (noise, next_noise) = (
            ddpg.Batch(*(column.double() for column in batch)),
            (x.double() for x in noises),
        )
        losses = ddpg.update(agent, batch, noise, next_noise, 0.9, 0.25)
        loss_actor = -q(critic, batch.obs, policy(batch.obs, noise)).mean()
        actor.descend(loss_actor)
        value = q(target_critic, batch.next_obs, policy(batch.next_obs, next_noise)).detach()
        target = batch.reward + 0.9 * (1 - batch.terminated) * value
        loss_critic = (q(critic, batch.obs, batch.action) - target).square().mean()
        critic.descend(loss_critic)
        for name, fast in critic.parameters.items():
            target_critic.parameters[name] = 0.75 * target_critic.parameters[name] + 0.25 * fast

        ours = [losses[name].item() for name in ("actor_loss", "critic_loss", "td_target")]
        expected = [loss_actor.item(), loss_critic.item(), target.mean().item()]
        assert ours == pytest.approx(expected, rel=0, abs=1e-10)
    for expected, network in (
        (actor, agent.actor),
        (critic, agent.critic),
        (target_critic, agent.target_critic),
    ):
        ours = Reference(network).parameters
        assert ours.keys() == expected.parameters.keys()
        for name, value in ours.items():
            assert float((value - expected.parameters[name]).detach().abs().max()) < 1e-10, name


def test_target_has_no_optimiser_and_there_is_no_target_actor():
    parts = {name for name in vars(make_agent()) if name != "layers"}
    assert parts == {"actor", "critic", "target_critic", "actor_optimizer", "critic_optimizer"}


def test_optimisers_are_the_papers():
    agent = make_agent()
    check_optimizer(agent.actor_optimizer, agent.actor)
    check_optimizer(agent.critic_optimizer, agent.critic)


def test_parameters_on_humanoid():
    # Actor, hidden 128: 67*128+128, then 2*128 + 128*512+512 + 512*128+128, 2*128, and 128*21+21.
    with torch.device("meta"):
        actor, critic = ddpg.Actor(67, 21, 128, 1), ddpg.Critic(67, 21, 512, 2, 1)
    counts = [count_parameters(actor), count_parameters(critic)]
    assert counts == [143_637, 4_248_577]


def test_diagnostics_gradients_are_those_of_an_update():
    agent, (batch, noise, next_noise) = make_agent(sparsity=0.8), make_batch(0)
    measured = ddpg.diagnose(agent, batch, noise, next_noise, 0.99)
    loss = ddpg.actor_loss(agent.actor, agent.critic, batch.obs, noise)
    gradients = torch.autograd.grad(loss, list(agent.actor.parameters()))
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    assert measured["actor_grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert measured["critic_grad_norm"] > 0 and len(measured) == 16
