"""SAC's losses, networks, observation statistics and replay against numbers worked out by hand."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import conftest
import gymnasium as gym
import numpy as np
import pytest
import sac_simba_sparse as sac
import torch
import torch.nn as nn
from conftest import CPU, assert_all_equal, check_optimizer, count_parameters

make_agent = partial(conftest.make_agent, sac)
make_batch = partial(conftest.make_batch, sac)


def fixed_policy(mean: torch.Tensor, log_std: torch.Tensor) -> sac.Actor:
    actor = sac.Actor(3, mean.shape[1], 8, 1)
    actor.forward = lambda obs: (mean, log_std)
    return actor


def policy_stub(log_prob: list[float]) -> SimpleNamespace:
    return SimpleNamespace(
        sample=lambda obs, noise: (torch.zeros(len(log_prob), 1), torch.tensor(log_prob))
    )


# Policy


def test_log_probability_by_hand():
    # First dimension: mean 0.5, std 2, noise -0.25, so the action is tanh(0) = 0 and
    # log pi = -0.25^2 / 2 - ln 2 - ln(2 pi) / 2 - ln(1 - 0) = -0.0312500 - 0.6931472 - 0.9189385 =
    # -1.6433357. Second: mean 0, std 1, noise 1, action tanh(1) = 0.7615942, 1 - 0.7615942^2 =
    # 0.4199743, so log pi = -0.5 - 0.9189385 - ln 0.4199743 = -1.4189385 + 0.8675617 = -0.5513769.
    actor = fixed_policy(torch.tensor([[0.5, 0.0]]), torch.tensor([[math.log(2), 0.0]]))
    action, log_prob = actor.sample(torch.zeros(1, 3), torch.tensor([[-0.25, 1.0]]))
    assert action[0].tolist() == pytest.approx([0.0, 0.7615942], abs=1e-7)
    assert log_prob.tolist() == pytest.approx([-1.6433357 - 0.5513769], abs=1e-6)


def test_log_probability_equals_torch_distributions():
    mean, log_std, noise = torch.randn(64, 3), 3.5 * torch.rand(64, 3) - 3, torch.randn(64, 3)
    action, log_prob = fixed_policy(mean, log_std).sample(torch.zeros(64, 3), noise)
    normal = torch.distributions.Normal(mean.double(), log_std.double().exp())
    squashed = torch.distributions.TransformedDistribution(
        normal, torch.distributions.TanhTransform(cache_size=1)
    )
    raw = mean.double() + log_std.double().exp() * noise.double()
    expected = squashed.log_prob(squashed.transforms[0](raw)).sum(-1)
    assert float((action - raw.tanh()).abs().max()) < 1e-6
    assert float((log_prob - expected).abs().max()) < 1e-5


def test_log_probability_of_a_saturated_action_is_finite():
    # ln(1 - tanh(20)^2) = 2 (ln 2 - 20 - ln(1 + e^-40)) = -38.6137056, where float32 has tanh(20) =
    # 1.
    action, log_prob = fixed_policy(torch.full((1, 1), 20.0), torch.zeros(1, 1)).sample(
        None, torch.zeros(1, 1)
    )
    assert action.item() == 1.0
    assert log_prob.item() == pytest.approx(-0.9189385 + 38.6137056, rel=1e-6)


def test_log_std_stays_within_its_range():
    actor = sac.Actor(5, 3, 16, 1)
    nn.init.zeros_(actor.log_std.weight)
    for raw, log_std in ((-50.0, -10.0), (0.0, -4.0), (50.0, 2.0)):  # -10 + 6 * (1 + tanh(raw))
        nn.init.constant_(actor.log_std.bias, raw)
        assert torch.equal(actor(torch.randn(4, 5))[1], torch.full((4, 3), log_std))


# Losses


def test_actor_loss_by_hand():
    # One critic: (0.5 * -1 - 3 + 0.5 * 3 - 5) / 2 = (-3.5 - 3.5) / 2. Entropy: -(-1 + 3) / 2.
    # Two: the smaller values are 2 and 5, (-0.5 - 2 + 1.5 - 5) / 2.
    values = torch.tensor([[3.0, 5.0], [2.0, 6.0]])
    for q, expected in ((values[:1], -3.5), (values, -3.0)):
        policy = policy_stub([-1.0, 3.0])
        loss, entropy = sac.actor_loss(policy, lambda obs, action, q=q: q, 0.5, None, None)
        assert (loss.item(), entropy.item()) == (expected, -1.0)


def test_td_target_by_hand():
    # Values 10 - 0.5 * 2 = 9, 9 and 20 + 0.5 * 2 = 21. With gamma 0.9: 1 + 8.1; the terminated
    # second transition has its reward only; 1 + 18.9. A truncated transition is stored with
    # terminated = 0 and so bootstraps like the first.
    zeros = torch.zeros(3, 1)
    batch = sac.Batch(zeros, zeros, torch.ones(3), zeros, torch.tensor([0.0, 1.0, 0.0]))
    # A second critic is smaller in the first and larger in the last: 1 + 0.9 * (4 - 1) = 3.7.
    policy = policy_stub([2.0, 2.0, -2.0])
    values = torch.tensor([[10.0, 10.0, 20.0], [4.0, 10.0, 30.0]])
    for q, expected in ((values[:1], [9.1, 1.0, 19.9]), (values, [3.7, 1.0, 19.9])):
        target = sac.td_target(policy, lambda obs, action, q=q: q, 0.5, batch, 0.9, None)
        assert target.tolist() == pytest.approx(expected)


def test_td_target_carries_no_gradient():
    agent, (batch, _, next_noise) = make_agent(), make_batch()
    target = sac.td_target(agent.actor, agent.critic, 0.1, batch, 0.99, next_noise)
    assert target.shape == (16,) and not target.requires_grad


def test_critic_loss_by_hand():
    # ((1 - 0)^2 + (4 - 2)^2) / 2 = 2.5; the second critic adds ((2 - 0)^2 + 0) / 2 = 2.
    batch, target = sac.Batch(None, None, None, None, None), torch.tensor([0.0, 2.0])
    q = torch.tensor([[1.0, 4.0], [2.0, 2.0]], requires_grad=True)
    assert sac.critic_loss(lambda obs, action: q[:1], batch, target).item() == 2.5
    loss = sac.critic_loss(lambda obs, action: q, batch, target)
    loss.backward()
    assert loss.item() == 4.5
    assert q.grad.tolist() == [[1.0, 2.0], [2.0, 0.0]]  # 2 * error / 2


# Updates


@pytest.mark.parametrize("log_std,entropy,direction", [(-2.07, -1.33, 1), (-1.77, -0.76, -1)])
def test_entropy_below_its_target_raises_alpha(log_std, entropy, direction):
    # Two actions with mean 0 and noise +-1: -log pi = 2 * (1 / 2 + log std + ln(2 pi) / 2 + ln(1 -
    # tanh(std)^2)), so 2 * (1.4189 - 2.07 - 0.0159) = -1.33 and 2 * (1.4189 - 1.77 - 0.0288) =
    # -0.76, to either side of -|A| / 2 = -1. AdamW's first step is the learning rate times the
    # gradient's sign, with no decay on log alpha.
    agent, (batch, noise, next_noise) = make_agent(), make_batch()
    for layer in (agent.actor.log_std, agent.actor.mean):
        nn.init.zeros_(layer.weight)
    nn.init.constant_(agent.actor.log_std.bias, math.atanh((log_std + 10) / 6 - 1))
    losses = sac.update(agent, batch, noise.sign(), next_noise, 0.99, 0.005)
    assert losses["entropy"].item() == pytest.approx(entropy, abs=0.01)
    log_alpha = agent.temperature["log_alpha"].item()
    assert log_alpha == pytest.approx(math.log(0.01) + direction * 1e-4, abs=1e-6)
    assert losses["alpha"].item() == pytest.approx(math.exp(log_alpha), rel=1e-6)


@pytest.mark.parametrize(
    "flags", [{}, {"sparsity": 0.8}, {"sparsity": 0.8, "clipped_double_q": True}]
)
def test_target_moves_by_tau_after_an_update(flags):
    agent, (batch, noise, next_noise) = make_agent(**flags), make_batch()
    old = [parameter.clone() for parameter in agent.target_critic.parameters()]
    sac.update(agent, batch, noise, next_noise, 0.99, tau=0.25)
    moved = 0.0
    for before, fast, slow in zip(
        old, agent.critic.parameters(), agent.target_critic.parameters(), strict=True
    ):
        assert float((slow - (0.25 * fast.detach() + 0.75 * before)).abs().max()) < 1e-7
        moved = max(moved, float((slow - before).abs().max()))
    assert moved == pytest.approx(0.25 * 1e-4, rel=0.05)  # AdamW's first step is the learning rate


def test_an_update_leaves_every_critic_weight_trainable():
    agent, (batch, noise, next_noise) = make_agent(sparsity=0.8), make_batch()
    before = copy.deepcopy([list(agent.actor.parameters()), list(agent.critic.parameters())])
    sac.update(agent, batch, noise, next_noise, 0.99, 0.005)
    for old, network in zip(before, (agent.actor, agent.critic)):
        for parameter, new in zip(old, network.parameters(), strict=True):
            assert new.requires_grad and not torch.equal(parameter, new)


def test_optimisers_are_the_papers():
    agent = make_agent()
    check_optimizer(agent.actor_optimizer, agent.actor)
    check_optimizer(agent.critic_optimizer, agent.critic)
    check_optimizer(agent.temperature_optimizer, agent.temperature, weight_decay=0.0)
    assert agent.alpha().item() == pytest.approx(1e-2)


@pytest.mark.parametrize(
    "given,longest",
    [("cartpole-swingup", 1000), ("lqr-lqr_2_1", 2000)],  # the first ends itself at 1000
)
def test_the_limit_of_an_episode_that_was_given(given, longest):
    env = sac.make_env(sac.Args(env_id=f"dm_control/{given}-v0", max_episode_steps=2000))
    assert sac.episode_limit(env) == longest


@pytest.mark.parametrize(
    "env_id,action_repeat,gamma",
    [
        ("dm_control/cartpole-swingup-v0", 2, 0.99),  # T = 500 decisions: (100 - 1) / 100
        ("dm_control/cartpole-swingup-v0", 4, 0.98),  # T = 250: 49 / 50
        ("dm_control/cartpole-swingup-v0", 1, 0.995),  # T = 1000: 199 / 200, the upper end
        ("dm_control/cartpole-swingup-v0", 20, 0.95),  # T = 50: 9 / 10 is below the lower end
        ("Hopper-v5", 2, 0.99),
        ("Hopper-v5", 5, 0.975),  # T = 200: 39 / 40
        ("Hopper-v5", 20, 0.95),
        ("sparse_zoo_tests/Endless-v0", 2, 0.995),
    ],
)
def test_discount_follows_the_episode_length(env_id, action_repeat, gamma):
    if "Endless" in env_id:
        gym.register(env_id, "gymnasium.envs.classic_control:PendulumEnv")
    env = sac.make_env(sac.Args(env_id=env_id, action_repeat=action_repeat))
    env.close()
    assert sac.default_gamma(env, action_repeat) == pytest.approx(gamma, abs=1e-12)


# Networks


def sizes(encoder: nn.Sequential) -> tuple[int, int]:
    """Hidden units and residual blocks."""
    return encoder[0].out_features, sum(isinstance(module, sac.ResidualBlock) for module in encoder)


@pytest.mark.parametrize(
    "width_scale,depth_scale,actor,critic",
    [(1.0, 1, (128, 1), (512, 2)), (0.5, 2, (64, 2), (256, 4)), (0.25, 3, (32, 3), (128, 6))],
)
def test_sizes_of_the_networks(width_scale, depth_scale, actor, critic):
    agent = make_agent(width_scale=width_scale, depth_scale=depth_scale)
    assert sizes(agent.actor.encoder) == actor
    assert [sizes(encoder) for encoder in agent.critic.encoders] == [critic]
    for block in (*agent.actor.encoder[1:-1], *agent.critic.encoders[0][1:-1]):
        assert block.up.out_features == block.down.in_features == 4 * block.up.in_features


def test_parameters_on_humanoid():
    # Actor, hidden 128: 67*128+128, then 2*128 + 128*512+512 + 512*128+128, 2*128, and twice
    # 128*21+21. Critic, hidden 512: 88*512+512, then twice 2*512 + 512*2048+2048 + 2048*512+512,
    # 2*512, and 512+1.
    with torch.device("meta"):
        networks = (
            sac.Actor(67, 21, 128, 1),
            sac.Critic(67, 21, 512, 2, 1),
            sac.Critic(67, 21, 512, 2, 2),
        )
    counts = [count_parameters(network) for network in networks]
    assert counts == [146_346, 4_248_577, 2 * 4_248_577]
    assert counts[0] + counts[1] == pytest.approx(4.39e6, rel=0.002)
    with torch.device("meta"):  # five times as wide
        large = count_parameters(sac.Actor(67, 21, 640, 1), sac.Critic(67, 21, 2560, 2, 1))
    assert large == pytest.approx(108.5e6, rel=0.001)


def test_critics_of_clipped_double_q_are_separate():
    agent, (batch, *_) = make_agent(clipped_double_q=True), make_batch()
    first, second = agent.critic(batch.obs, batch.action)
    assert (
        first.shape == second.shape == (16,) and float((first - second).detach().abs().min()) > 1e-4
    )
    x = torch.cat([batch.obs, batch.action], -1)
    assert torch.equal(first, agent.critic.heads[0](agent.critic.encoders[0](x))[:, 0])
    assert make_agent().critic(batch.obs, batch.action).shape == (1, 16)


def test_initial_biases_and_norms():
    agent, biases, norms = make_agent(clipped_double_q=True), 0, 0
    for module in (*agent.actor.modules(), *agent.critic.modules()):
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
            biases += 1
        elif isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6 and (module.weight == 1).all() and not module.bias.any()
            norms += 1
    assert (biases, norms) == (5 + 2 * 6, 2 + 2 * 3)


def test_he_normal_has_its_variance_and_its_cut():
    weight = sac.init_linear(500, 2000, he_normal=True).weight.detach()
    # The variance is that of the cut distribution: 0.5 % is several standard errors here
    std = math.sqrt(2 / 500)
    assert float(weight.std()) == pytest.approx(std, rel=5e-3)
    assert abs(float(weight.mean())) < 5e-3 * std
    # A normal cut at 2 sigma has 0.8796 of its std, so that sigma = std / 0.8796 and the largest
    # weight 2.2737 std.
    assert float(weight.abs().max()) == pytest.approx(2.2737 * std, rel=1e-3)
    assert float(weight.abs().max()) < 2.27373 * std


def test_residual_layers_are_he_normal_and_the_others_orthogonal():
    agent = make_agent(obs_dim=67, action_dim=21, width_scale=0.5)
    for name, module in (*agent.actor.named_modules(), *agent.critic.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        weight = module.weight.detach().double()
        wide = weight if len(weight) <= module.in_features else weight.T
        error = float((wide @ wide.T - torch.eye(len(wide))).abs().max())
        if name.endswith((".up", ".down")):
            assert error > 0.1 and float(weight.std()) == pytest.approx(
                math.sqrt(2 / module.in_features), rel=0.03
            )
        else:
            assert error < 1e-5, name


def test_residual_block_by_hand():
    # LayerNorm of (1, 3): mean 2, std 1, so (-1, 1). Every unit of `up` computes x_0 + 2 x_1 = 1
    # or, with the sign turned, -1, which the ReLU cuts; four of the eight units reach `down`, which
    # sums them: x + 4.
    block = sac.ResidualBlock(2)
    with torch.no_grad():
        block.up.weight.copy_(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]).repeat(4, 1))
        block.down.weight.fill_(1.0)
    assert block(torch.tensor([[1.0, 3.0]]))[0].tolist() == pytest.approx([5.0, 7.0], abs=1e-5)


def test_acting_is_the_mode_or_a_sample():
    agent, norm = make_agent(), sac.ObservationNorm(5, CPU)
    norm.update(np.full(5, 2.0))
    obs, noise = np.arange(5.0), torch.tensor([1.0, -0.5])
    mean, log_std = agent.actor(norm(torch.arange(5.0)[None]))
    assert sac.act(agent, norm, obs) == pytest.approx(mean.tanh()[0].tolist(), abs=1e-6)
    expected = (mean + log_std.exp() * noise).tanh()[0].tolist()
    assert sac.act(agent, norm, obs, noise) == pytest.approx(expected, abs=1e-6)


# Observation statistics


def test_observation_norm_equals_numpy_on_a_stream():
    stream = np.random.default_rng(0).normal([0.0, 3.0, -50.0], [1.0, 0.01, 20.0], (2000, 3))
    norm = sac.ObservationNorm(3, CPU)
    for obs in stream:
        norm.update(obs)
    # The statistics start with mean 0 and variance 1 in 1e-4 of an observation.
    n, prior = len(stream), 1e-4
    mean = stream.sum(0) / (n + prior)
    var = (((stream - mean) ** 2).sum(0) + prior * (1 + mean**2)) / (n + prior)
    assert norm.statistics.mean == pytest.approx(mean, rel=1e-11)
    assert norm.statistics.var == pytest.approx(var, rel=1e-9)
    assert mean == pytest.approx(stream.mean(0), abs=1e-5)
    assert var == pytest.approx(stream.var(0), rel=0.01)  # the narrow dimension sees the prior
    out = norm(torch.as_tensor(stream[:5], dtype=torch.float32))
    assert out.dtype == torch.float32
    # float32 places an observation of 3 to 1e-7, which is 1e-5 of the narrow dimension's std.
    assert out.numpy() == pytest.approx((stream[:5] - mean) / np.sqrt(var + 1e-8), abs=1e-4)


def test_observation_norm_adds_1e_8_to_the_variance_and_does_not_clip():
    # Ten thousand zeros leave the prior's variance 1e-4 / 1e4 = 1e-8: 1 becomes 1 / sqrt(1e-8 +
    # 1e-8) = 7071.07.
    norm = sac.ObservationNorm(1, CPU)
    for _ in range(10_000):
        norm.update(np.zeros(1))
    assert norm(torch.tensor([[1.0], [-1e3]]))[:, 0].tolist() == pytest.approx(
        [7071.0678, -7071067.8], rel=1e-6
    )


def test_observation_norm_goes_on_bit_for_bit_after_a_checkpoint(tmp_path):
    stream = np.random.default_rng(0).normal(1.0, 3.0, (300, 4))
    norm, resumed = sac.ObservationNorm(4, CPU), sac.ObservationNorm(4, CPU)
    for obs in stream[:100]:
        norm.update(obs)
    torch.save(norm.state_dict(), tmp_path / "norm.pt")
    resumed.load_state_dict(torch.load(tmp_path / "norm.pt", weights_only=True))
    for obs in stream[100:]:
        norm.update(obs)
        resumed.update(obs)
    ours, uninterrupted = resumed.state_dict(), norm.state_dict()
    assert list(ours) == list(uninterrupted)
    assert_all_equal(
        map(torch.as_tensor, ours.values()), map(torch.as_tensor, uninterrupted.values())
    )


# Replay


def transition(i: int) -> tuple:
    """A recognisable transition; every third one terminates."""
    return np.full(3, float(i)), np.full(2, i / 100), float(i), np.full(3, i + 0.5), i % 3 == 0


def fill(buffer: sac.ReplayBuffer, numbers: range) -> None:
    for i in numbers:
        buffer.add(*transition(i))


def test_replay_overwrites_the_oldest_and_keeps_transitions_whole():
    buffer, norm = sac.ReplayBuffer(4, 3, 2, CPU), sac.ObservationNorm(3, CPU)
    fill(buffer, range(3))
    assert set(buffer.sample(200, norm).reward.tolist()) == {0.0, 1.0, 2.0}
    fill(buffer, range(3, 10))
    batch = buffer.sample(400, norm)
    assert set(batch.reward.tolist()) == {6.0, 7.0, 8.0, 9.0}
    shapes = [tuple(column.shape) for column in batch]
    assert shapes == [(400, 3), (400, 2), (400,), (400, 3), (400,)]
    assert all(column.dtype == torch.float32 for column in batch)
    raw = 1 / math.sqrt(1 + 1e-8)  # statistics without an observation: mean 0, variance 1
    number = batch.reward[:, None]
    assert torch.allclose(batch.obs, number.expand(-1, 3) * raw)
    assert torch.allclose(batch.next_obs, (number.expand(-1, 3) + 0.5) * raw)
    assert torch.allclose(batch.action, number.expand(-1, 2) / 100)
    assert torch.equal(batch.terminated, (batch.reward % 3 == 0).float())
    counts = np.unique(batch.reward, return_counts=True)[1]
    assert counts.min() > 70 and counts.max() < 130  # 100 each, standard deviation 9


def test_replay_normalises_by_the_newest_statistics():
    buffer, norm = sac.ReplayBuffer(4, 3, 2, CPU), sac.ObservationNorm(3, CPU)
    buffer.add(*transition(6))
    for value in (0.0, 8.0):  # mean 4 and variance 16, the prior's 1e-4 of an observation aside
        norm.update(np.full(3, value))
    batch = buffer.sample(2, norm)
    assert batch.obs[0].tolist() == pytest.approx([0.5] * 3, abs=1e-3)  # (6 - 4) / 4
    assert batch.next_obs[0].tolist() == pytest.approx([0.625] * 3, abs=1e-3)


def test_replay_sampling_follows_its_generator():
    buffer, norm = sac.ReplayBuffer(50, 3, 2, CPU), sac.ObservationNorm(3, CPU)
    fill(buffer, range(50))
    state = torch.get_rng_state()
    draws = [
        buffer.sample(32, norm, torch.Generator().manual_seed(seed)).reward for seed in (3, 3, 4)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("added", [3, 4, 10])
def test_replay_goes_on_bit_for_bit_after_a_checkpoint(added, tmp_path):
    buffer, resumed = sac.ReplayBuffer(4, 3, 2, CPU), sac.ReplayBuffer(4, 3, 2, CPU)
    fill(buffer, range(added))
    torch.save(buffer.state_dict(), tmp_path / "replay.pt")
    fill(buffer, range(added, added + 2))
    resumed.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    fill(resumed, range(added, added + 2))
    norm = sac.ObservationNorm(3, CPU)
    ours, expected = (
        replay.sample(64, norm, torch.Generator().manual_seed(0)) for replay in (resumed, buffer)
    )
    assert_all_equal(ours, expected)
    newest = {float(i) for i in range(added + 2)[-4:]}
    assert set(ours.reward.tolist()) == newest


def test_replay_checkpoint_holds_the_filled_part_only(tmp_path):
    buffer = sac.ReplayBuffer(100_000, 3, 2, CPU)  # 4 MB
    buffer.add(*transition(1))
    torch.save(buffer.state_dict(), tmp_path / "replay.pt")
    assert (tmp_path / "replay.pt").stat().st_size < 10_000
