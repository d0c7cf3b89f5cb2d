"""Stream AC against numbers worked out by hand, in numpy and in masked float64 with autograd."""

import copy
import io
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import stream_ac_sparse as stream
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import Corridor, check_returns, count_weights, dense_weight, metric_values, succeed

OBS_DIM, ACTION_DIM = 5, 2
KERNELS = pytest.mark.parametrize("kernel", ["auto", "dense"])
SINGLE = 3e-7  # a few roundings of float32
METRICS = ("episode/length", "episode/return", "losses/absolute_td_error")
METRICS += ("losses/actor_step_size", "losses/critic_step_size")


def make_agent(obs_dim=OBS_DIM, action_dim=ACTION_DIM, **flags) -> tuple[stream.Agent, stream.Args]:
    args = stream.Args(**{"width_scale": 0.125, "init": "lecun", **flags})
    torch.manual_seed(args.seed)
    return stream.Agent(args, obs_dim, action_dim), args


def make_transition(generator: np.random.Generator, terminal: bool = False) -> stream.Transition:
    state, next_state = generator.standard_normal((2, OBS_DIM + 1), np.float32)
    action = generator.standard_normal(ACTION_DIM, np.float32)
    reward = 2 * generator.standard_normal()
    return stream.Transition(state, action, reward, next_state, terminal)


def learn(agent, transition, args, done=False):
    """An update, after the actor has been run on the state as in acting."""
    output = agent.actor(transition.state)
    return stream.update(agent, transition, output, done, args)


def linears(network: stream.StreamingNetwork) -> list[nn.Module]:
    return [
        module
        for module in network.mlp.modules()
        if isinstance(module, nn.Linear | stream.SparseLinear)
    ]


def weights_of(layer: nn.Module) -> nn.Parameter:
    return layer.weight if isinstance(layer, nn.Linear) else layer.values


def flat(agent: stream.Agent) -> list[np.ndarray]:
    """A copy of all weights and traces."""
    return [
        array.copy()
        for network in (agent.actor, agent.critic)
        for array in (network.weights, network.traces)
    ]


def same(first, second) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def run(train):
    return partial(train, stream)


# What the agent sees


def test_statistics_are_mean_and_unbiased_variance_of_all_samples():
    samples = np.random.default_rng(0).normal([0.0, 1e6, -3.0], [1.0, 1.0, 1e-3], (50, 3))
    statistics = stream.Statistics((3,))
    statistics.update(samples[0])
    assert np.array_equal(statistics.mean, samples[0])
    assert np.broadcast_to(statistics.std(), 3) == pytest.approx([math.sqrt(1 + 1e-8)] * 3)
    for count in range(2, 51):
        statistics.update(samples[count - 1])
        assert statistics.mean == pytest.approx(samples[:count].mean(0), rel=1e-12)
        assert statistics.std() ** 2 == pytest.approx(
            samples[:count].var(0, ddof=1) + 1e-8, rel=1e-8
        )


def test_state_by_hand():
    norm = stream.Normalizer(2, 0.99, 100)
    reset, first = norm.state(np.array([3.0, -1.0]), 0), norm.state(np.array([5.0, -1.0]), 1)
    assert reset.dtype == np.float32 and reset.tolist() == [0, 0, -0.5]
    # Means 4 and -1, variances 2 and 0
    assert first == pytest.approx([1 / math.sqrt(2), 0, -0.5], rel=SINGLE)
    # 3, 5, 4: mean 4. -1, -1, 2: mean 0, variance (1 + 1 + 4) / 2
    assert norm.state(np.array([4.0, 2.0]), 2) == pytest.approx(
        [0, 2 / math.sqrt(3), -0.49], rel=SINGLE
    )
    for _ in range(2):
        seen = norm.state(np.array([6.0, 3.0]), 100, update=False)
        assert seen == pytest.approx([2, math.sqrt(3), 0.49], rel=SINGLE)
    assert norm.obs.count == 3 and norm.reward.count == 0
    assert stream.Normalizer(2, 0.99, math.inf).state(np.zeros(2), 50)[-1] == -0.5


def test_rewards_are_scaled_by_the_std_of_their_trace():
    norm = stream.Normalizer(2, 0.5, 100)
    rewards, dones = [1.0, 2.0, -1.0, 3.0, 0.5], [False, False, True, False, False]
    # 1; 2 + 1 / 2; the terminal step starts anew with its own reward; 3 - 1 / 2; 0.5 + 2.5 / 2
    traces = [1.0, 2.5, -1.0, 2.5, 1.75]
    for count, (reward, done) in enumerate(zip(rewards, dones), 1):
        variance = np.var(traces[:count], ddof=1) if count > 1 else 1.0
        assert norm.scale(reward, done) == pytest.approx(
            reward / math.sqrt(variance + 1e-8), rel=1e-12
        )
    assert norm.obs.count == 0


@pytest.mark.parametrize("kind", [float, np.float32])  # of the environment's rewards
@pytest.mark.parametrize("steps", [0, 1, 20])
def test_saved_normalizer_goes_on_bit_by_bit(steps, kind):
    generator = np.random.default_rng(steps)

    def see(norm, obs, length):
        return norm.state(obs, length), norm.scale(kind(obs.sum()), length % 4 == 3)

    norm, loaded = (stream.Normalizer(3, 0.99, 10) for _ in range(2))
    for length, obs in enumerate(generator.standard_normal((steps, 3))):
        see(norm, obs, length)
    saved, file = norm.state_dict(), io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    later = generator.standard_normal((20, 3))
    expected = [see(norm, obs, length) for length, obs in enumerate(later)]
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for length, obs in enumerate(later):
        state, reward = see(loaded, obs, length)
        assert np.array_equal(state, expected[length][0]) and reward == expected[length][1]
    again = stream.Normalizer(3, 0.99, 10)
    again.load_state_dict(saved)  # which what came after has left alone
    assert np.array_equal(see(again, later[0], 0)[0], expected[0][0])


def test_environments():
    env = stream.make_env(stream.Args(env_id="Ant-v4"))
    assert env.observation_space.shape == (27,) and stream.episode_limit(env) == 1000
    agent, _ = make_agent(27, 8)
    actor, critic = (
        [(layer.in_features, layer.out_features) for layer in linears(network)]
        for network in (agent.actor, agent.critic)
    )
    assert actor == [(28, 16), (16, 16), (16, 8), (16, 8)]
    assert critic == [(28, 16), (16, 16), (16, 1)]


@pytest.mark.parametrize(
    "env_id,width", [("Walker2d-v4", 17), ("dm_control/cartpole-swingup-v0", 5)]
)
def test_actions_are_clipped_to_their_bounds(env_id, width):
    env = stream.make_env(stream.Args(env_id=env_id))
    results = {}
    for action in (5.0, 1.0, 0.5):
        obs, _ = env.reset(seed=3)
        assert obs.shape == (width,)
        obs, reward, *_ = env.step(np.full(env.action_space.shape, action, np.float32))
        results[action] = [*obs, reward]
    assert np.ptp(results[1.0]) > 0 and results[5.0] == results[1.0] != results[0.5]


def test_dm_control_episodes_last_as_long_as_the_time_feature_says():
    env = stream.make_env(stream.Args(env_id="dm_control/cartpole-swingup-v0"))
    env.reset(seed=1)
    length, over = 0, False
    while not over:
        _, _, terminated, over, _ = env.step(np.zeros(1, np.float32))
        length += 1
        assert not terminated
    assert length == stream.episode_limit(env) == 1000
    endless = SimpleNamespace(spec=SimpleNamespace(max_episode_steps=None, id="Endless-v0"))
    assert stream.episode_limit(endless) == math.inf


# Initial weights


def check_uniform(weights: np.ndarray, fan_in: int) -> None:
    """Of all that is uniform in +-1/sqrt(fan_in), one sample in a million fails here."""
    bound = 1 / math.sqrt(fan_in)
    assert np.abs(weights).max() <= bound
    assert scipy.stats.kstest(weights, "uniform", (-bound, 2 * bound)).pvalue > 1e-6


@pytest.mark.parametrize("init", ["sparse_init", "lecun"])
def test_initial_weights(init):
    agent, _ = make_agent(27, 8, width_scale=1.5, init=init)
    for network in (agent.actor, agent.critic):
        assert [layer.in_features for layer in linears(network)][:3] == [28, 192, 192]
        for layer in linears(network):
            weight, zeros = layer.weight.detach().numpy(), {28: 26, 192: 173}[layer.in_features]
            assert not layer.bias.any()
            assert ((weight == 0).sum(1) == (zeros if init == "sparse_init" else 0)).all()
            if weight.size > 1000:
                check_uniform(weight[weight != 0], layer.in_features)
            if init == "sparse_init":
                places = [tuple(row.nonzero()[0]) for row in weight]
                # 28 inputs: two of them survive, which gives 378 patterns; 192: 19, which never
                # repeat.
                assert len(set(places)) > (100 if layer.in_features == 28 else len(places) - 1)
        used = (linears(network)[1].weight != 0).float().mean(0)
        assert used.min() > 0 and (used.max() < 0.3 if init == "sparse_init" else used.min() == 1)


@pytest.mark.parametrize(
    "fan_in,survivors", [(1, 0), (9, 0), (10, 1), (11, 1), (20, 2), (128, 12), (1280, 128)]
)
def test_sparse_init_keeps_a_tenth_rounded_down(fan_in, survivors):
    weight = torch.ones(50, fan_in)
    stream.sparse_init(weight)
    assert ((weight != 0).sum(1) == survivors).all() and ((weight == 0) | (weight == 1)).all()
    if survivors > 0:
        assert len({tuple(row.tolist()) for row in weight}) > 5


@pytest.mark.parametrize("init", ["sparse_init", "lecun"])
def test_survivors_of_pruning_keep_their_initial_values(init):
    dense, _ = make_agent(27, 8, width_scale=0.5, init=init)
    flags = {"sparsity": 0.8, "sparsity_distribution": "uniform"}
    sparse, _ = make_agent(27, 8, width_scale=0.5, init=init, **flags)
    other, _ = make_agent(27, 8, width_scale=0.5, init=init, **flags, mask_seed=7)
    for name in ("actor", "critic"):
        networks = [linears(getattr(agent, name)) for agent in (dense, sparse, other)]
        for full, pruned, elsewhere in zip(*networks, strict=True):
            for layer in (pruned, elsewhere):
                assert isinstance(layer, stream.SparseLinear)
                assert len(layer.values) == round(0.2 * full.weight.numel())
                assert torch.equal(layer.values, full.weight.flatten()[layer.active.long()])
            assert set(pruned.active.tolist()) != set(elsewhere.active.tolist())
    assert not np.array_equal(linears(sparse.actor)[1].active, linears(sparse.critic)[1].active)


@pytest.mark.parametrize("name", ["actor", "critic"])
def test_each_network_may_have_a_sparsity_of_its_own(name):
    agent, _ = make_agent(27, 8, width_scale=0.5, sparsity=0.5, **{f"{name}_sparsity": 0.9})
    for network in ("actor", "critic"):
        total, active = count_weights(getattr(agent, network).layer_table())
        assert active / total == pytest.approx(0.1 if network == name else 0.5, abs=1e-3)
        assert getattr(agent, network).weights.size == active


# Policy


def loss_of_policy(
    output: torch.Tensor, action: torch.Tensor, direction, entropy_coefficient=0.01
) -> torch.Tensor:
    mean, raw = output.chunk(2, -1)
    policy = torch.distributions.Normal(mean, F.softplus(raw, threshold=1e9))
    return -policy.log_prob(action).sum(
        -1
    ) - entropy_coefficient * direction * policy.entropy().sum(-1)


@pytest.mark.parametrize("direction", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("entropy_coefficient", [0.01, 0.5])
def test_policy_gradient_is_that_of_autograd(direction, entropy_coefficient):
    generator = np.random.default_rng(1)
    for _ in range(20):
        output = generator.normal(0, 2, 6).astype(np.float32)
        action = generator.normal(0, 2, 3).astype(np.float32)
        expected = torch.tensor(output, dtype=torch.float64, requires_grad=True)
        loss_of_policy(
            expected, torch.tensor(action).double(), direction, entropy_coefficient
        ).backward()
        gradient = stream.policy_gradient(output, action, direction, entropy_coefficient)
        assert gradient.dtype == np.float32
        assert gradient == pytest.approx(expected.grad.numpy(), rel=3e-5, abs=1e-5)


@pytest.mark.parametrize("raw", [-20.0, 20.0])
@pytest.mark.parametrize("error", [0.0, 0.5, 1.0])
def test_policy_gradient_of_an_extreme_std(raw, error):
    """At an error of 0, 0.5 or 1 std, and, finite at least, at an error of 1."""
    std = math.log1p(math.exp(raw))
    output = np.array([0.0, raw], np.float32)
    action = np.array([error * std], np.float32)
    expected = torch.tensor(output, dtype=torch.float64, requires_grad=True)
    loss_of_policy(expected, torch.tensor(action).double(), 1.0).backward()
    gradient = stream.policy_gradient(output, action, 1.0, 0.01)
    assert gradient == pytest.approx(expected.grad.numpy(), rel=3e-5, abs=1e-7)
    assert np.isfinite(stream.policy_gradient(output, np.ones(1, np.float32), 1.0, 0.01)).all()


@KERNELS
def test_acting_adds_noise_times_softplus(kernel):
    agent, _ = make_agent(sparse_kernel=kernel)
    state = np.linspace(-1, 1, OBS_DIM + 1, dtype=np.float32)
    expected = agent.actor.mlp(torch.from_numpy(state)).detach().numpy()
    mean, output = stream.act(agent, state)
    assert output == pytest.approx(expected, abs=1e-6) and np.array_equal(mean, output[:2])
    noise = np.array([0.5, -2.0])
    noisy, _ = stream.act(agent, state, noise)
    assert noisy == pytest.approx(output[:2] + noise * np.log(1 + np.exp(output[2:])), abs=1e-6)
    assert noisy.dtype == np.float32 and noisy.shape == (ACTION_DIM,)


# Learning


class Reference:
    """A network as dense float64 matrices with masks, its traces, and ObGD with autograd."""

    def __init__(self, network: stream.StreamingNetwork, kappa: float, args: stream.Args):
        self.kappa = kappa
        self.decay = args.gamma * args.trace_lambda
        self.learning_rate = args.learning_rate
        self.hidden = 1 + args.depth_scale
        self.parameters, self.masks = [], []
        for layer in linears(network):
            weight, bias = self.dense(layer, weights_of(layer), layer.bias)
            mask, _ = self.dense(layer, torch.ones_like(weights_of(layer)), layer.bias)
            self.parameters += [weight.requires_grad_(), bias.requires_grad_()]
            self.masks += [mask, torch.ones_like(bias)]
        self.traces = [torch.zeros_like(parameter) for parameter in self.parameters]

    @staticmethod
    def dense(layer, values: torch.Tensor, bias: torch.Tensor) -> list[torch.Tensor]:
        """Float64 copies of a matrix, with zeros where a weight is pruned, and of a vector."""
        matrix = values.detach()
        if isinstance(layer, stream.SparseLinear):
            matrix = dense_weight(layer, matrix)
        return [matrix.double().clone(), bias.detach().double().clone()]

    def __call__(self, state: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(state).double()
        layers = list(zip(self.parameters[::2], self.parameters[1::2]))
        for weight, bias in layers[: self.hidden]:
            y = weight @ x + bias
            y = (y - y.mean()) / (y.var(correction=0) + 1e-5).sqrt()
            x = torch.where(y > 0, y, 0.01 * y)
        return torch.cat([weight @ x + bias for weight, bias in layers[self.hidden :]])

    def step(self, loss: torch.Tensor, delta: float, done: bool) -> float:
        gradients = torch.autograd.grad(loss, self.parameters)
        self.traces = [
            self.decay * e + g * mask for e, g, mask in zip(self.traces, gradients, self.masks)
        ]
        bound = (
            max(abs(delta), 1.0)
            * sum(float(e.abs().sum()) for e in self.traces)
            * self.learning_rate
            * self.kappa
        )
        alpha = self.learning_rate / bound if bound > 1 else self.learning_rate
        for parameter, trace in zip(self.parameters, self.traces):
            parameter.data -= alpha * delta * trace
        if done:
            self.traces = [torch.zeros_like(trace) for trace in self.traces]
        return alpha

    def differences(self, network: stream.StreamingNetwork) -> tuple[float, float]:
        """The largest of the weights, and of the traces over their largest."""
        weights, traces = [], []
        for layer in linears(network):
            values = weights_of(layer)
            weights += self.dense(layer, values, layer.bias)
            traces += self.dense(layer, values.grad, layer.bias.grad)
        largest = max(float(trace.abs().max()) for trace in self.traces) or 1.0
        return (
            largest_difference(weights, self.parameters),
            largest_difference(traces, self.traces) / largest,
        )


def largest_difference(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((a - b.detach()).abs().max()) for a, b in zip(ours, expected, strict=True))


CASES = {
    "dense": {},
    "sparse_init": {"init": "sparse_init", "width_scale": 0.5},
    "half": {
        "sparsity": 0.5,
        "width_scale": 0.5,
        "learning_rate": 0.5,
        "actor_kappa": 1.5,
        "critic_kappa": 4.0,
    },
    # 320 hidden units: three blocks of columns in each hidden layer
    "wide": {"sparsity": 0.5, "width_scale": 2.5, "gamma": 0.9, "trace_lambda": 0.95},
    "wide and dense": {"width_scale": 2.5},
    "deep": {
        "sparsity": 0.9,
        "width_scale": 2.5,
        "depth_scale": 2,
        "sparsity_distribution": "uniform",
    },
}


@pytest.mark.parametrize("case", CASES)
@KERNELS
def test_updates_equal_masked_dense_autograd(case, kernel):
    agent, args = make_agent(sparse_kernel=kernel, **CASES[case])
    sparse = [
        isinstance(layer, stream.SparseLinear)
        for layer in linears(agent.actor) + linears(agent.critic)
    ]
    assert any(sparse) == (args.sparsity > 0) and all(sparse) == (
        args.sparsity_distribution == "uniform"
    )
    actor, critic = (
        Reference(agent.actor, args.actor_kappa, args),
        Reference(agent.critic, args.critic_kappa, args),
    )
    generator = np.random.default_rng(0)
    deltas = []
    for t in range(20):
        done = t in (7, 12)
        transition = make_transition(generator, terminal=t == 7)
        state, action, reward, next_state, terminal = transition
        value = critic(state)
        output = actor(state)
        delta = reward + args.gamma * (0 if terminal else critic(next_state).item()) - value.item()
        loss = loss_of_policy(
            output, torch.from_numpy(action).double(), np.sign(delta), args.entropy_coefficient
        )
        expected = [actor.step(loss, delta, done), critic.step(-value.sum(), delta, done)]
        our_delta, *steps = learn(agent, transition, args, done)
        assert our_delta == pytest.approx(delta, abs=2e-6)
        assert steps == pytest.approx(expected, rel=2e-5)
        deltas.append(abs(delta))
        for reference, network in ((actor, agent.actor), (critic, agent.critic)):
            weights, traces = reference.differences(network)
            assert weights < 2e-6 and traces < 2e-5
            assert network.traces.any() != done
    assert min(deltas) < 1 < max(deltas)
    assert min(np.ptp(network.weights) for network in (agent.actor, agent.critic)) > 0.1


@pytest.mark.parametrize(
    "traces,delta,learning_rate,alpha",
    [
        ([0.1, -0.2], 0.5, 1.0, 1.0),  # bound 2 * 1 * 0.3 = 0.6
        ([0.01, -0.02], -3.0, 1.0, 1.0),  # 2 * 3 * 0.03 = 0.18
        ([1.0, -2.0], 0.5, 1.0, 1 / 6),  # 2 * 1 * 3
        ([1.0, -2.0], -4.0, 1.0, 1 / 24),  # 2 * 4 * 3
        # A smaller learning rate changes nothing where the bound holds,
        ([1.0, -2.0], 0.5, 0.5, 1 / 6),
        ([0.1, -0.2], 0.5, 0.25, 0.25),  # and is the step where it does not
        ([0.0, 0.0], 0.5, 1.0, 1.0),
    ],
)
def test_bounded_step_by_hand(traces, delta, learning_rate, alpha):
    weights, traces = np.array([1.0, 2.0], np.float32), np.array(traces, np.float32)
    expected = [1 - alpha * delta * float(traces[0]), 2 - alpha * delta * float(traces[1])]
    before = traces.copy()
    assert stream.bounded_step(weights, traces, delta, learning_rate, 2.0) == pytest.approx(
        alpha, rel=SINGLE
    )
    assert weights == pytest.approx(expected, rel=SINGLE) and np.array_equal(traces, before)


@KERNELS
def test_values_of_a_chain(kernel):
    # Three states in a row, reward 1 with the last step: values gamma^2, gamma and 1.
    agent, args = make_agent(2, 1, sparse_kernel=kernel, gamma=0.5, sparsity=0.5, width_scale=0.25)
    states = np.eye(3, dtype=np.float32)
    before = [float(agent.critic(state)[0]) for state in states]
    for _ in range(400):
        for index, state in enumerate(states):
            end = index == 2
            next_state = states[(index + 1) % 3]
            action = np.zeros(1, np.float32)
            learn(agent, stream.Transition(state, action, float(end), next_state, end), args, end)
    values = [float(agent.critic(state)[0]) for state in states]
    assert values == pytest.approx([0.25, 0.5, 1.0], abs=0.03)
    assert max(abs(value - target) for value, target in zip(before, (0.25, 0.5, 1.0))) > 0.2


# Measurements


@KERNELS
@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_diagnostics_measure_the_recent_transitions_and_change_nothing(kernel, sparsity):
    agent, args = make_agent(sparse_kernel=kernel, sparsity=sparsity)
    generator = np.random.default_rng(2)
    recent = stream.Recent(30)
    for t in range(40):
        transition = make_transition(generator, terminal=t % 3 == 0)
        learn(agent, transition, args, done=transition.terminal)
        recent.transitions.append(transition)
    learn(agent, transition._replace(terminal=False), args)
    before = flat(agent)
    measured = stream.diagnose(agent, recent, args)
    assert same(before, flat(agent)) and all(traces.any() for traces in before)
    state, action, reward, next_state, terminal = recent.columns()
    assert len(state) == 30 and terminal.sum() == 10  # of 40, the first 10 are forgotten
    metrics = "srank_99 srank_threshold dormant_ratio dormant_ratio_relu active_units"
    metrics += " grad_norm param_norm feature_norm"
    assert measured.keys() == {
        f"{name}_{metric}" for name in ("actor", "critic") for metric in metrics.split()
    }

    critic, actor = agent.critic.mlp, agent.actor.mlp
    value = critic(state)[:, 0]
    delta = (reward + 0.99 * (1 - terminal) * critic(next_state)[:, 0] - value).detach()
    policy_loss = loss_of_policy(actor(state), action, delta.sign())
    for name, mlp, loss in (("actor", actor, policy_loss), ("critic", critic, -value)):
        gradients = torch.autograd.grad((delta * loss).mean(), list(mlp.parameters()))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        assert measured[f"{name}_grad_norm"] == pytest.approx(norm, rel=1e-4)
        norm = np.linalg.norm(getattr(agent, name).weights)
        assert measured[f"{name}_param_norm"] == pytest.approx(norm, rel=1e-5)


def test_recent_transitions_survive_a_checkpoint():
    assert stream.Recent().transitions.maxlen == 256  # a batch of the other agents
    generator, recent, loaded = np.random.default_rng(2), stream.Recent(4), stream.Recent(4)
    loaded.load_state_dict(recent.state_dict())
    assert len(loaded.transitions) == 0
    for t in range(6):
        recent.transitions.append(make_transition(generator, terminal=t == 5))
    loaded.load_state_dict(recent.state_dict())
    for part in (recent, loaded):
        part.transitions.append(make_transition(np.random.default_rng(3)))
    columns = recent.columns()
    assert [len(column) for column in columns] == [4] * 5 and columns[4].tolist() == [0, 0, 1, 0]
    assert same(columns, loaded.columns())


def test_evaluation_is_repeatable_and_leaves_the_agent_alone():
    agent, args = make_agent(11, 3)
    norm, generator = stream.Normalizer(11, 0.99, 1000), np.random.default_rng(0)
    for length in range(30):
        state = norm.state(generator.normal(0, 0.3, 11), length)
        norm.scale(1.0, False)
    action = np.zeros(3, np.float32)
    learn(agent, stream.Transition(state, action, 1.0, state, terminal=False), args)

    env, returns, lengths = stream.make_env(stream.Args(env_id="Hopper-v5")), [], []
    for episode in range(4):
        obs, _ = env.reset(seed=stream.derive_seed(7, 1, episode))
        total, length, over = 0.0, 0, False
        while not over:
            time = max(length - 1, 0) / 1000 - 0.5
            state = np.append((obs - norm.obs.mean) / norm.obs.std(), time).astype(np.float32)
            obs, reward, terminated, truncated, _ = env.step(agent.actor(state)[:3])
            total, length, over = total + reward, length + 1, terminated or truncated
        returns.append(total)
        lengths.append(length)
    before = flat(agent), copy.deepcopy(norm.state_dict())
    for _ in range(2):
        result = stream.evaluate(
            agent, norm, stream.make_env(stream.Args(env_id="Hopper-v5")), 4, (7, 1)
        )
        check_returns(result, returns)
    assert min(lengths) > 2
    assert same(before[0], flat(agent)) and agent.actor.traces.any()
    after = norm.state_dict()
    assert after["reward_trace"] == before[1]["reward_trace"]
    for ours, theirs in zip(after["statistics"], before[1]["statistics"]):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# Whole runs


@KERNELS
@pytest.mark.parametrize(
    "flags", ["", "--bootstrap-on-truncation --learning-starts 7 --sparsity 0.5 --gamma 0.9"]
)
def test_a_run_learns_once_from_every_transition(kernel, flags, run, corridor):
    common = "--env-id Corridor-v0 --total-timesteps 17 --threads 1 --width-scale 0.125"
    common += " --init lecun --eval-interval 6 --eval-episodes 2 --final-eval-episodes 1"
    common += f" --diagnostics-interval 9 --sparse-kernel {kernel} {flags}"
    ended, checkpoint, rows = run(common)
    succeed(ended)
    bootstrap, random_steps = bool(flags), 7 if flags else 0
    lengths = [5, 3, 5, 3]  # and one step of a fifth episode
    logged = {name: metric_values(rows, name) for name in METRICS}
    assert logged["episode/length"] == lengths
    assert checkpoint["counters"][:3] == (17, 17 - random_steps, 5)

    # The same from the file's parts, draw by draw
    saved = stream.Transition(*(column.numpy() for column in checkpoint["recent"]["columns"]))
    args = stream.Args(**checkpoint["args"])
    torch.manual_seed(args.seed)
    agent = stream.Agent(args, 2, 1)
    norm = stream.Normalizer(2, args.gamma, 5)
    env = Corridor()
    np.random.seed(args.seed)
    t = 0
    for episode, steps in enumerate([*lengths, 1]):
        obs, _ = env.reset(seed=stream.derive_seed(1, 0, episode) % 2**31)
        state = norm.state(obs, 0)
        episode_return = 0.0
        deltas = []
        for length in range(1, steps + 1):
            if t < random_steps:
                part = np.random.random(1)
                action = -0.5 * (1 - part) + 0.25 * part
            else:
                action, output = stream.act(agent, state, np.random.standard_normal(1))
            obs, reward, terminated, _, _ = env.step(np.float32(action).clip(-0.5, 0.25))
            done = terminated or length == 5
            episode_return += reward
            transition = stream.Transition(
                state=state,
                action=action,
                reward=norm.scale(reward, done),
                next_state=norm.state(obs, length),
                terminal=terminated or (done and not bootstrap),
            )
            for column, part in zip(saved, transition, strict=True):
                assert np.array_equal(column[t], np.float32(part))
            if t >= random_steps:
                delta, *step_sizes = stream.update(agent, transition, output, done, args)
                deltas.append(abs(delta))
            state = transition.next_state
            t += 1
        if done:
            assert logged["episode/return"][episode] == episode_return
        if done and deltas:
            mean = logged["losses/absolute_td_error"].pop(0)
            sizes = [logged[f"losses/{name}_step_size"].pop(0) for name in ("actor", "critic")]
            assert sizes == step_sizes and sizes[0] != sizes[1]
            assert mean == pytest.approx(np.mean(deltas))
    assert t == len(saved.state) == 17 and (saved.terminal.sum() == 2) == bootstrap
    for name in ("actor", "critic"):
        for key, value in getattr(agent, name).mlp.state_dict().items():
            assert torch.equal(value, checkpoint[name][key]), key
    assert checkpoint["norm"]["statistics"][0]["count"] == 17 + 5  # resets too


@pytest.mark.usefixtures("corridor")
def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(run):
    flags = "--env-id Corridor-v0 --total-timesteps 17 --threads 1 --width-scale 0.125"
    flags += " --checkpoint-interval 5 --learning-starts 7"
    flags += " --learning-rate 1e30 --actor-kappa 1e-30 --critic-kappa 1e-30"
    (code, _, error), checkpoint, _ = run(f"{flags} --eval-episodes 1")
    assert code == 3 and "not finite at agent_step=" in error
    assert checkpoint["counters"][0] == 5
    assert all(
        torch.isfinite(value).all()
        for name in ("actor", "critic")
        for value in checkpoint[name].values()
    )


def test_balances_a_pole_after_5000_steps(run):
    flags = "--env-id InvertedPendulum-v5 --sparsity 0.5 --total-timesteps 5000 --threads 1"
    *_, rows = run(f"{flags} --eval-episodes 5 --final-eval-episodes 3")
    # Of 1,000; seeds 1 to 3: 25 and 1,000
    (before,) = metric_values(rows, "eval/return_mean")
    (after,) = metric_values(rows, "final/return_mean")
    assert before < 100 and after > 900
