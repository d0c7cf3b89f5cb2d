"""DER: C51 against published code, replay, noise, the IMPALA CNN, whole updates, lives."""

import math
from pathlib import Path

import der_impala_sparse as der
import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import CPU, DATA, assert_all_equal, count_parameters, count_weights, dense_weight


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    """Made by running Dopamine's functions: 16 transitions, n-step discount 0.99^10, 51 atoms."""
    with np.load(DATA / "c51_proj.npz") as file:
        return {name: torch.as_tensor(file[name]) for name in file}


def make_replay(
    folder: Path, capacity: int = 60, mode: str = "w+", **flags
) -> der.PrioritizedReplay:
    return der.PrioritizedReplay(folder / "replay.u8", der.Args(**flags), capacity, 20, mode)


def frames(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 84, 84), np.uint8)


# --- C51 ---


def test_projection_equals_dopamine(golden):
    support = golden["support"]
    discount = golden["cumulative_gamma"].float() * (1 - golden["terminal"])
    points = golden["reward"][:, None] + discount[:, None] * support
    projected = der.project(points, golden["next_probs"], support)
    assert torch.allclose(points, golden["target_support"], atol=1e-6)
    assert torch.allclose(projected, golden["projected"], atol=1e-6)
    assert torch.allclose(projected.double(), golden["projected_scatter_f64"], atol=1e-6)


def test_projection_by_hand():
    support, probabilities = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([[0.2, 0.3, 0.5]])
    points = torch.tensor([[-5.0, 0.25, 1.0]])
    assert der.project(points, probabilities, support)[0].tolist() == pytest.approx(
        [0.2, 0.225, 0.575]
    )


def test_cross_entropy_priorities_and_weights_equal_dopamine(golden, tmp_path):
    logits = golden["pred_logits"]
    batch = der.Batch(None, torch.zeros(16, dtype=torch.long), None, None, None, None, None)
    loss = der.cross_entropy(lambda obs, noise: logits[:, None], batch, golden["projected"], None)
    assert torch.allclose(loss, golden["ce_loss"], rtol=1e-5)

    replay = make_replay(tmp_path)
    for frame in frames(30):
        replay.begin(frame) if replay.added == 0 else replay.add(0, 0.0, False, frame)
    index = torch.arange(16)
    replay.set_priorities(index, loss)
    assert replay.priority[:16] == pytest.approx(golden["new_priority"].numpy(), rel=1e-5)
    replay.priority[:] = 0
    replay.priority[:16] = golden["sampling_probabilities"].numpy()
    sampled = replay.sample(500, CPU)
    expected = golden["is_weights"].float() / golden["is_weights"][sampled.place.unique()].max()
    assert torch.allclose(sampled.weight, expected[sampled.place], rtol=1e-5)


def test_dueling_heads_equal_dopamine(golden, monkeypatch):
    agent = der.Agent(der.Args(width_scale=0.125), 4, CPU)
    heads = {"value": golden["dueling/value"], "advantage": golden["dueling/adv"].flatten()[None]}
    for name, output in heads.items():
        monkeypatch.setattr(
            getattr(agent.network, name), "forward", lambda x, noise, output=output: output
        )
    logits = agent.network(torch.zeros(1, 84, 84, 4, dtype=torch.uint8))[0]
    assert torch.allclose(logits, golden["dueling/logits"], atol=1e-6)
    assert torch.allclose(logits.softmax(-1), golden["dueling/probs"], atol=1e-6)
    assert torch.allclose(logits.softmax(-1) @ golden["support"], golden["dueling/q"], atol=1e-5)


# --- Replay ---


@pytest.fixture
def replay(tmp_path):
    """Lives of 5 (terminal), 2 (cut off), 2 (terminal) and 6 decisions (going on), n = 3."""
    replay, film = make_replay(tmp_path, n_step=3, gamma=0.5), iter(frames(19))
    for length, terminal in ((5, True), (2, False), (2, True), (6, False)):
        replay.begin(next(film))
        for step in range(length):
            replay.add(
                replay.added - 1, float(replay.added), terminal and step == length - 1, next(film)
            )
    return replay


# Frames 0-5, 6-8, 9-11, 12-18; the reward after frame k is k + 1. What can be sampled: return,
# discount, bootstrap
EXPECTED = {
    **{
        0: (1 + 2 / 2 + 3 / 4, 1 / 8, 3),
        1: (2 + 3 / 2 + 4 / 4, 1 / 8, 4),
        2: (3 + 4 / 2 + 5 / 4, 0, None),
    },
    **{3: (4 + 5 / 2, 0, None), 4: (5, 0, None), 9: (10 + 11 / 2, 0, None), 10: (11, 0, None)},
    **{k: (k + 1 + (k + 2) / 2 + (k + 3) / 4, 1 / 8, k + 3) for k in (12, 13, 14, 15)},
}


def test_n_step_returns_end_with_the_life(replay):
    batch, film = replay.sample(3000, CPU), frames(19)
    assert set(batch.place.tolist()) == set(EXPECTED)
    counts = torch.bincount(batch.place)[list(EXPECTED)]
    assert (counts - 3000 / len(EXPECTED)).abs().max() < 5 * math.sqrt(3000 / len(EXPECTED))
    start = [0] * 6 + [6] * 3 + [9] * 3 + [12] * 7
    for row in range(60):
        k = int(batch.place[row])
        reward, discount, bootstrap = EXPECTED[k]
        assert batch.action[row] == k and batch.weight[row] == 1
        assert (batch.reward[row].item(), batch.discount[row].item()) == pytest.approx(
            (reward, discount)
        )
        for newest, stack in ((k, batch.obs[row]), (bootstrap, batch.next_obs[row])):
            for place in range(4 if newest is not None else 0):
                number = newest - 3 + place
                shown = film[number] if number >= start[k] else np.zeros((84, 84), np.uint8)
                assert np.array_equal(stack[..., place], shown)


def test_sampling_follows_priorities_and_weights_undo_it(replay):
    loss = torch.full((3,), 1e-12)
    loss[1] = 16.0
    replay.set_priorities(torch.tensor([0, 1, 2]), loss)
    assert replay.largest_priority == pytest.approx(4.0)
    batch = replay.sample(20_000, CPU)
    share = torch.bincount(batch.place, minlength=19) / 20_000
    total = 4 + 8 * 1.0 + 2 * math.sqrt(1e-12 + 1e-10)
    assert share[1].item() == pytest.approx(4 / total, abs=0.02)
    assert share[12].item() == pytest.approx(1 / total, abs=0.02)
    weight = {int(index): float(value) for index, value in zip(batch.place, batch.weight)}
    assert weight[1] / weight[12] == pytest.approx(0.5)
    replay.add(0, 0.0, False, frames(1)[0])
    assert replay.priority[16] == pytest.approx(4.0)  # a new one: the largest so far


def test_a_full_ring_forgets_the_oldest(tmp_path):
    replay = make_replay(tmp_path, capacity=30, n_step=2)
    film = frames(7)
    replay.begin(film[0])
    for number in range(1, 100):
        replay.add(number - 1, 0.0, False, film[number % 7])
    batch = replay.sample(2000, CPU)
    assert set(batch.action.tolist()) == set(range(70, 98))
    assert np.array_equal(batch.obs[0, ..., 3], film[int(batch.action[0]) % 7])
    assert np.array_equal(batch.next_obs[0, ..., 3], film[(int(batch.action[0]) + 2) % 7])


def test_a_replay_too_small_for_a_return_has_nothing_to_sample(tmp_path):
    replay, frame = make_replay(tmp_path, capacity=5, n_step=10), frames(1)[0]
    replay.begin(frame)
    for _ in range(40):
        replay.add(0, 0.0, False, frame)
    assert not replay.ready()
    replay.add(0, 0.0, True, frame)
    assert set(np.flatnonzero(replay.priority)) == {(40 - k) % 25 for k in range(4)}


def test_replay_comes_back_from_its_state(replay, tmp_path):
    replay.set_priorities(torch.tensor([1, 4]), torch.tensor([2.0, 3.0]))
    other = make_replay(tmp_path, mode="r+", n_step=3, gamma=0.5)
    other.load_state_dict(replay.state_dict())
    assert np.array_equal(other.priority, replay.priority)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    ours, theirs = replay.sample(64, CPU, generators[0]), other.sample(64, CPU, generators[1])
    assert_all_equal(ours, theirs)


# --- Networks ---


@pytest.mark.parametrize(
    "width, parameters", [(1, 97_744), (2, 389_024), (3, 873_840), (4, 1_552_192)]
)
def test_impala_parameters_and_shapes(width, parameters):
    encoder = der.impala(width, 2)
    assert count_parameters(encoder) == parameters
    sizes = []
    for module in encoder:
        if isinstance(module, nn.MaxPool2d):
            module.register_forward_hook(lambda _, __, y: sizes.append(tuple(y.shape[1:])))
    assert encoder(torch.rand(1, 4, 84, 84)).shape == (1, 32 * width, 11, 11)
    assert sizes == [(16 * width, 42, 42), (32 * width, 21, 21), (32 * width, 11, 11)]


@pytest.mark.parametrize("size, before, after", [(84, 0, 1), (42, 0, 1), (21, 1, 1)])
def test_max_pooling_has_the_borders_of_jax(size, before, after):
    x = torch.randn(1, 2, size, size)
    padded = F.pad(x, (before, after, before, after), value=-math.inf)
    pools = [module for module in der.impala(1, 2) if isinstance(module, nn.MaxPool2d)]
    pool = pools[{84: 0, 42: 1, 21: 2}[size]]
    assert torch.equal(pool(x), F.max_pool2d(padded, 3, 2))


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_noise_has_the_variance_of_its_scales(sparsity):
    network = nn.Module()
    network.layer = layer = der.NoisyLinear(64, 32)
    if sparsity:
        der.sparsify(network, sparsity, "uniform", 0, "packed", CPU, packed=der.PackedProduct)
    layer.create_noise_scales(0.5)
    count = 64 * 32 if not sparsity else round(64 * 32 * (1 - sparsity))
    assert layer.sigma.numel() == count and layer.bias_sigma.numel() == 32
    assert layer.sigma.unique().tolist() == layer.bias_sigma.unique().tolist() == [0.5 / 8]
    x, f = torch.randn(1, 64), lambda n: (z := torch.randn(n)).sign() * z.abs().sqrt()
    with torch.no_grad():
        outputs = torch.cat([layer(x, (f(64), f(32))) for _ in range(20_000)])
        mean = layer(x)[0]
    # The noise of output i is eps_i (sum_j sigma eps_j x_j + sigma), and E eps^2 = E |z| = sqrt(2 /
    # pi)
    mask = dense_weight(layer.mean, torch.ones(count)) if sparsity else torch.ones(32, 64)
    moment = math.sqrt(2 / math.pi)
    variance = (0.5 / 8) ** 2 * moment * (moment * (mask * x.square()).sum(1) + 1)
    assert torch.allclose(
        outputs.mean(0), mean, atol=5 * float(variance.max().sqrt()) / math.sqrt(20_000)
    )
    assert torch.allclose(outputs.var(0), variance, rtol=0.1)


def test_draw_noise_is_factorised_noise_of_every_layer():
    agent = der.Agent(der.Args(width_scale=0.125), 6, CPU)
    noise = agent.network.draw_noise()
    sizes = [(11 * 11 * 4, 512), (512, 51), (512, 6 * 51)]
    assert [tuple(part.numel() for part in layer) for layer in noise] == sizes
    values = torch.cat([part for layer in noise for part in layer])
    normal = values.sign() * values.square()
    assert abs(float(normal.mean())) < 0.1 and float(normal.std()) == pytest.approx(1, abs=0.06)


class Plain(nn.Module):
    """The network with dense weights and masks, written without the agent's modules."""

    def __init__(self, network: der.Network):
        super().__init__()
        self.weights, self.masks = nn.ParameterDict(), {}
        for name, layer in network.named_modules():
            key = name.replace(".", "_")
            if isinstance(layer, der.SparseLinear | der.SparseConv2d):
                self.put(key + "_w", layer.values, layer)
            elif isinstance(layer, nn.Linear | nn.Conv2d):
                self.put(key + "_w", layer.weight)
            elif isinstance(layer, der.NoisyLinear):
                pruned = isinstance(layer.mean, der.SparseLinear)
                self.put(key + "_s", layer.sigma, layer.mean if pruned else None)
                self.put(key + "_bs", layer.bias_sigma)
                continue
            else:
                continue
            self.put(key + "_b", layer.bias)

    def put(self, key: str, values: torch.Tensor, sparse: nn.Module | None = None) -> None:
        values, mask = values.detach().clone().contiguous(), torch.ones_like(values)
        if sparse is not None:
            values, mask = dense_weight(sparse, values), dense_weight(sparse, mask)
        self.weights[key], self.masks[key] = nn.Parameter(values), mask.detach()

    def get(self, key: str) -> torch.Tensor:
        return self.weights[key] * self.masks[key]

    def conv(self, x, key: str):
        return F.conv2d(x, self.get(key + "_w"), self.get(key + "_b"), padding=1)

    def noisy(self, x, key: str, noise):
        eps_in, eps_out = noise
        weight = self.get(f"{key}_mean_w") + self.get(f"{key}_s") * eps_out[:, None] * eps_in
        return x @ weight.T + self.get(f"{key}_mean_b") + self.get(f"{key}_bs") * eps_out

    def forward(self, obs, noise):
        x = obs.permute(0, 3, 1, 2).float() / 255
        for stage, border in ((0, (0, 1, 0, 1)), (4, (0, 1, 0, 1)), (8, (1, 1, 1, 1))):
            x = F.max_pool2d(F.pad(self.conv(x, f"encoder_{stage}"), border, value=-math.inf), 3, 2)
            for block in (stage + 2, stage + 3):
                h = self.conv(F.relu(x), f"encoder_{block}_layers_1")
                x = x + self.conv(F.relu(h), f"encoder_{block}_layers_3")
        x = F.relu(x).permute(0, 2, 3, 1).flatten(1)
        x = F.relu(self.noisy(x, "hidden", noise[0]))
        value, advantage = self.noisy(x, "value", noise[1]), self.noisy(x, "advantage", noise[2])
        advantage = advantage.view(len(obs), -1, 51)
        return value[:, None] + advantage - advantage.mean(1, keepdim=True)


@pytest.mark.parametrize(
    "flags", [{}, {"sparsity": 0.8}, {"sparsity": 0.8, "sparse_kernel": "dense"}]
)
def test_an_update_equals_plain_pytorch_with_masks(flags):
    agent = der.Agent(der.Args(width_scale=0.25, **flags), 3, CPU)
    with torch.no_grad():  # two different networks
        for parameter in agent.target_network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    plain, plain_target = Plain(agent.network), Plain(agent.target_network)
    adam, support = (
        torch.optim.Adam(plain.parameters(), lr=1e-4, eps=1.5e-4),
        torch.linspace(-10, 10, 51),
    )
    for _ in range(2):
        obs, next_obs = torch.randint(0, 256, (2, 10, 84, 84, 4), dtype=torch.uint8)
        rest = (torch.randint(3, (10,)), torch.randn(10), 0.9 * (torch.arange(10) % 3 > 0))
        batch = der.Batch(obs, *rest, next_obs, torch.rand(10), None)
        noise, next_noise = agent.network.draw_noise(), agent.network.draw_noise()
        losses, each = der.update(agent, batch, noise, next_noise)

        with torch.no_grad():
            best = (plain(next_obs, next_noise).softmax(-1) * support).sum(-1).argmax(1)
            next_probabilities = plain_target(next_obs, next_noise).softmax(-1)
            target = torch.zeros(10, 51)
            for row in range(10):
                for atom in range(51):  # C51's loop: between the neighbours below and above
                    point = batch.reward[row] + batch.discount[row] * support[atom]
                    place = float((point.clamp(-10, 10) + 10) / 0.4)
                    low, share = min(int(place), 49), next_probabilities[row, best[row], atom]
                    target[row, low] += share * (low + 1 - place)
                    target[row, low + 1] += share * (place - low)
        logits = plain(obs, noise)[torch.arange(10), batch.action]
        theirs = -(target * logits.log_softmax(-1)).sum(1)
        adam.zero_grad()
        (batch.weight * theirs).mean().backward()
        adam.step()
        assert torch.allclose(each, theirs, rtol=1e-4)
        assert losses["td_target"].item() == pytest.approx(
            (target @ support).mean().item(), abs=1e-4
        )
    expected = Plain(agent.network)
    for name, weight in plain.weights.items():
        difference = ((weight - expected.weights[name]) * plain.masks[name]).abs()
        assert difference.max() <= 2e-5 and (difference > 2e-6).float().mean() < 0.02, name


def test_what_sparsity_prunes():
    agent = der.Agent(der.Args(sparsity=0.8), 6, CPU)
    rows = agent.layers
    # Each mean weight and bias of a noisy layer has one noise scale, which the table leaves out
    noisy = 0
    for layer in agent.network.noisy_layers():
        assert layer.sigma.numel() == getattr(layer.mean, layer.weight_name).numel()
        assert layer.bias_sigma.numel() == layer.mean.bias.numel()
        noisy += layer.sigma.numel() + layer.bias_sigma.numel()
    total, active = count_weights(rows)
    assert total == 97_744 + (3872 + 1) * 512 + (512 + 1) * 51 + (512 + 1) * 6 * 51
    # Rounded down for each parameter
    assert active == pytest.approx(0.2 * total, abs=len(rows) + 20)
    assert count_parameters(agent.network) == active + noisy
    shapes = {name: tuple(p.shape) for name, p in der.Network(der.Args(), 6).named_parameters()}
    density = {name: 1 - sparsity for name, sparsity in der.erdos_renyi(shapes, 0.8).items()}
    convolution, linear = density["encoder.10.layers.1.weight"], density["hidden.mean.weight"]
    ratio = ((32 + 32 + 3 + 3) / (32 * 32 * 3 * 3)) / ((3872 + 512) / (3872 * 512))
    assert convolution / linear == pytest.approx(ratio)


def test_bf16_encodes_nearly_the_same():
    network = der.Network(der.Args(width_scale=0.5), 4)
    obs = torch.randint(0, 256, (20, 84, 84, 4), dtype=torch.uint8)
    exact = network.encode(obs)
    network.bf16 = True
    fast = network.encode(obs)
    assert exact.shape == (20, 11 * 11 * 16) and fast.dtype == torch.float32
    assert 0 < (exact - fast).abs().max() < 0.05 * exact.abs().max()


# --- Games ---


def test_environment():
    env = der.make_env(der.Args(env_id="ALE/Breakout-v5"))
    frame, info = env.reset(seed=3)
    assert frame.shape == (84, 84) and frame.dtype == np.uint8 and info["lives"] == 5
    before = info["episode_frame_number"]
    *_, info = env.step(0)
    assert info["episode_frame_number"] - before == 4
    emulator = env.unwrapped.spec.kwargs
    assert emulator["frameskip"] == 1 and emulator["repeat_action_probability"] == 0.0
    assert emulator["max_num_frames_per_episode"] == 108_000


def test_a_game_goes_on_after_the_loss_of_a_life():
    env = der.make_env(der.Args(env_id="ALE/Breakout-v5"))
    _, info = env.reset(seed=0)
    lost, terminated = [], False
    while not terminated:
        lives = info["lives"]
        _, _, terminated, truncated, info = env.step(1)  # fire, and never move
        assert not truncated
        lost += [terminated] * (info["lives"] < lives)
    assert lost == [False] * 4 + [True]


class Clock(gym.Env):
    """Counts the decisions of a game, which ends with the tenth if it is a short one."""

    observation_space = gym.spaces.Box(0, 99, ())
    action_space = gym.spaces.Discrete(2)

    def __init__(self, short: bool):
        self.short = short

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.float32(0), {"steps": 0}

    def step(self, action):
        assert action == 0
        self.steps += 1
        over = self.short and self.steps == 10
        return np.float32(self.steps), 1.0, over, False, {"steps": self.steps}


def test_games_begin_with_0_to_29_idle_decisions():
    env = gym.wrappers.RecordEpisodeStatistics(der.NoopStart(Clock(short=False)))
    idle = []
    for seed in range(600):
        frame, info = env.reset(seed=seed)
        idle.append(int(frame))
        assert info["steps"] == frame
    counts = np.bincount(idle, minlength=30)
    assert len(counts) == 30 and counts.min() >= 5 and counts.max() <= 40  # 20 of each
    assert [int(env.reset(seed=seed)[0]) for seed in range(5)] == idle[:5]
    env.step(0)
    assert env.episode_lengths == 1 and env.episode_returns == 1  # idle decisions do not count


def test_a_game_that_ends_while_idle_begins_anew():
    env = der.NoopStart(Clock(short=True))
    long = der.NoopStart(Clock(short=False))
    for seed in range(100):
        idle, _ = long.reset(seed=seed)
        frame, info = env.reset(seed=seed)
        assert frame == info["steps"] == idle % 10


def test_idle_decisions_have_all_their_frames():
    env = der.make_env(der.Args(env_id="ALE/Breakout-v5"))
    frames = [env.reset(seed=seed)[1]["episode_frame_number"] for seed in (0, 2)]
    assert all(count % 4 == 0 for count in frames)
    assert 30 < max(frames) <= 4 * 29 and len(set(frames)) == 2
    assert env.get_wrapper_attr("env_step") == 0  # which errors name: of the run
    env.step(0)
    assert env.get_wrapper_attr("env_step") == 4
