"""DrQ-v2: shifts, stacks, n-step returns, schedule, losses, whole updates, convolutions."""

import os
from types import SimpleNamespace

import der_impala_sparse as der
import drqv2_sparse as drq
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import (
    CPU,
    assert_all_equal,
    check_error,
    count_parameters,
    count_weights,
    dense_weight,
)


def frames(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 84, 84, 3), np.uint8)


def test_a_shift_is_a_crop_of_the_padded_image_and_equals_bilinear_sampling():
    film = frames(5)
    newest, oldest = np.array([4, 3, 2]), np.array([0, 3, 1])
    shift, out = np.array([[0, 8], [4, 4], [7, 1]]), np.empty((3, 84, 84, 9), np.uint8)
    drq.gather_stacks(film, newest, oldest, shift, out)
    for b, numbers in enumerate(([2, 3, 4], [3, 3, 3], [1, 1, 2])):
        image = np.concatenate([film[n] for n in numbers], -1)
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), "edge")
        y, x = shift[b]
        assert np.array_equal(out[b], padded[y : y + 84, x : x + 84])
        # As Yarats et al. do it: sampling the padded image on a grid that is moved by whole pixels
        position = (torch.arange(84) + 0.5) * 2 / 92 - 1
        grid = torch.stack(
            torch.meshgrid(position + y * 2 / 92, position + x * 2 / 92, indexing="ij")[::-1], -1
        )
        smooth = F.grid_sample(
            torch.tensor(padded).permute(2, 0, 1)[None].float(), grid[None], align_corners=False
        )
        assert (smooth[0].permute(1, 2, 0) - torch.tensor(out[b])).abs().max() < 3.3e-3 * 255


@pytest.fixture
def replay(tmp_path):
    """Episodes of 5, 2 and 6 decisions in a ring of 40 frames; first and last terminated."""
    replay = drq.FrameReplay(tmp_path / "replay.u8", 30, 10, action_dim=1, n_step=3, gamma=0.5)
    film = iter(frames(16))
    for length, terminates in ((5, True), (2, False), (6, True)):
        replay.begin(next(film))
        for step in range(length):
            number = replay.added
            replay.add(
                np.array([number]), float(number), terminates and step == length - 1, next(film)
            )
    return replay


def test_samples_are_whole_n_step_transitions_of_one_episode(replay, monkeypatch):
    monkeypatch.setattr(drq, "PAD", 0)  # no shifts; the compiled loop has its own
    batch = replay.sample(2000, CPU)
    first = batch.action[:, 0].long()
    # Frames 0-5, 6-8, 9-15: three rewards fit behind frames 0, 1, 2 and 9, 10, 11, 12 (a frame's
    # action is number + 1)
    assert set((first - 1).tolist()) == {0, 1, 2, 9, 10, 11, 12}
    counts = torch.bincount(first - 1)
    assert counts[counts > 0].min() > 2000 / 7 * 0.75
    number = first.float()
    assert torch.equal(batch.reward, number + 0.5 * (number + 1) + 0.25 * (number + 2))
    ends = (first - 1 == 2) | (first - 1 == 12)
    assert torch.equal(batch.discount, torch.where(ends, 0.0, 0.125))
    assert batch.obs.dtype == torch.uint8 and batch.obs.shape == (2000, 84, 84, 9)


def test_stacks_repeat_the_first_frame_and_never_cross_episodes(replay):
    film, batch = frames(16), replay.sample(300, CPU)
    for n, stack, later in zip((batch.action[:, 0].long() - 1).tolist(), batch.obs, batch.next_obs):
        start = 0 if n < 6 else 9
        for newest, image in ((n, stack), (n + 3, later)):
            expected = np.concatenate([film[max(newest - back, start)] for back in (2, 1, 0)], -1)
            padded = np.pad(expected, ((4, 4), (4, 4), (0, 0)), "edge")
            crops = [padded[y : y + 84, x : x + 84] for y in range(9) for x in range(9)]
            assert any(np.array_equal(image.numpy(), crop) for crop in crops)


def test_a_killed_run_finds_the_replay_of_its_checkpoint(tmp_path):
    def fill(replay, start, stop):
        for number in range(start, stop):
            if number % 7 == 0:
                replay.begin(np.full((84, 84, 3), number, np.uint8))
            else:
                replay.add(
                    np.array([number]), number, False, np.full((84, 84, 3), number, np.uint8)
                )

    def make(mode="w+"):
        return drq.FrameReplay(tmp_path / "replay.u8", 20, 12, 1, n_step=3, gamma=0.5, mode=mode)

    replay = make()
    fill(replay, 0, 49)  # the ring of 32 has wrapped
    state = replay.state_dict()
    expected = replay.sample(500, CPU, torch.Generator().manual_seed(1))
    fill(replay, 49, 60)  # after the checkpoint, then killed
    resumed = make("r+")
    resumed.load_state_dict(state)
    assert_all_equal(resumed.sample(500, CPU, torch.Generator().manual_seed(1)), expected)
    # Only the last 20 frames are sampled: from number 29 on, whose stack begins with 28, the first
    # of its episode
    assert expected.obs.min() == 28 and expected.next_obs.max() == 48


def test_the_ring_has_room_for_two_checkpoints_of_either_agent(tmp_path):
    """A killed run goes back by two checkpoints, each up to an episode late.

    A decision brings two frames at most.
    """
    env = SimpleNamespace(
        action_space=SimpleNamespace(shape=(1,)), spec=SimpleNamespace(max_episode_steps=10)
    )
    flags = {"action_repeat": 2, "buffer_size": 50, "checkpoint_interval": 20}
    args = drq.Args(**flags, total_timesteps=1000)
    replay = drq.open_replay(args, env, tmp_path / "drqv2.u8", resumed=False)
    assert (replay.capacity, len(replay.frames)) == (50, 50 + 2 * 2 * (20 + 10) / 2)
    # A short run needs no more than two frames for each of its 40 decisions
    args = drq.Args(**flags, total_timesteps=80)
    replay = drq.open_replay(args, env, tmp_path / "drqv2.u8", resumed=False)
    assert len(replay.frames) == 80
    # DER: a game of 108,000 env steps at most, with a frame more for each of its lives
    flags = {"action_repeat": 1000, "buffer_size": 50, "checkpoint_interval": 20_000}
    args = der.Args(**flags, total_timesteps=10**6)
    replay = der.open_replay(args, tmp_path / "der.u8", resumed=False)
    assert (replay.capacity, len(replay.frames)) == (50, 50 + 2 * (20 + 2 * 108))


@pytest.mark.parametrize("agent", ["drqv2", "der"])
@pytest.mark.parametrize("harm", ["lost", "short"])
def test_a_checkpoint_whose_frames_are_lost_is_an_error(tmp_path, capsys, agent, harm):
    """Instead of going on from black pictures."""
    path = tmp_path / "replay.u8"

    def make(mode="w+"):
        if agent == "der":
            return der.PrioritizedReplay(path, der.Args(), 20, 12, mode)
        return drq.FrameReplay(path, 20, 12, 1, 3, 0.99, mode)

    make()
    size = path.stat().st_size
    make("r+")
    if harm == "lost":
        path.unlink()
    else:
        os.truncate(path, size - 1)
    before = {file: file.stat().st_size for file in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        make("r+")
    check_error((stopped.value.code, *capsys.readouterr()), str(path))
    assert {file: file.stat().st_size for file in tmp_path.iterdir()} == before


def test_there_is_nothing_to_sample_before_a_whole_transition(tmp_path):
    replay = drq.FrameReplay(tmp_path / "replay.u8", 6, 4, action_dim=1, n_step=3, gamma=0.5)
    ready = []
    for length in (2, 4, 2, 2):
        replay.begin(np.zeros((84, 84, 3), np.uint8))
        for _ in range(length):
            replay.add(np.zeros(1), 0.0, False, np.zeros((84, 84, 3), np.uint8))
            ready.append(replay.ready())
    # Frames 3 and 4 are followed by three steps; the last six frames hold 4 until frame 10 has come
    assert ready == [False, False, False, False, True, True, True, False, False, False]
    restored = drq.FrameReplay(
        tmp_path / "replay.u8", 6, 4, action_dim=1, n_step=3, gamma=0.5, mode="r+"
    )
    restored.load_state_dict(replay.state_dict())
    assert (restored.added, restored.newest_ready) == (14, 4)


def test_the_frame_file_where_there_is_no_posix_fallocate(tmp_path, monkeypatch):
    """As on macOS: it has its full size on the disk at once."""
    monkeypatch.delattr(os, "posix_fallocate")
    path = tmp_path / "replay.u8"
    size = 2**24 + 5
    frames = drq.open_frames(path, (size,), "w+")
    assert not frames.any() and frames.shape == (size,)
    assert path.stat().st_size == size and path.stat().st_blocks * 512 >= size


@pytest.mark.parametrize("has_fallocate", [True, False])
def test_a_disk_that_is_too_small_is_an_error(tmp_path, capsys, monkeypatch, has_fallocate):
    if not has_fallocate:
        monkeypatch.delattr(os, "posix_fallocate")
    with pytest.raises(SystemExit) as stopped:
        drq.FrameReplay(tmp_path / "replay.u8", 10**12, 0, 1, 3, 0.99)
    check_error((stopped.value.code, *capsys.readouterr()), "GB", "--buffer-size")
    assert not tmp_path.exists()  # no folder is left of a run that could not begin


def test_the_schedule_is_linear_in_env_steps():
    args = drq.Args(std_start=1.0, std_end=0.1, std_decay=1_000_000)
    steps = (0, 250_000, 500_000, 1_000_000, 2_000_000)
    assert [drq.exploration_std(args, step) for step in steps] == pytest.approx(
        [1.0, 0.775, 0.55, 0.1, 0.1]
    )
    noise = drq.clipped_noise(args, (1000, 2), 500_000, CPU)
    assert noise.abs().max() == pytest.approx(0.3) and 0.2 < noise.std() < 0.3
    late = drq.clipped_noise(args, (10_000, 1), 2_000_000, CPU)
    assert late.std() == pytest.approx(0.1, rel=0.03)


def test_losses_by_hand():
    q = torch.tensor([[1.0, 4.0], [3.0, 2.0]])  # two critics, two transitions
    critic = lambda features, action: q + features[:, 0] + action[:, 0]  # noqa: E731
    actor = lambda features, noise: features + noise  # noqa: E731
    features, noise = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5], [-0.5]])
    # min Q = 1 + 1 + 1.5 and 2 + 2 + 1.5
    assert drq.actor_loss(actor, critic, features, noise).item() == -(3.5 + 5.5) / 2
    batch = drq.Batch(None, None, torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0]), None)
    assert drq.td_target(actor, critic, batch, features, noise).tolist() == [1 + 0.5 * 3.5, 2.0]
    # Q with action 0: [2, 6] and [4, 4]; targets 1 and 5: squares 1, 1 and 9, 1
    action, target = torch.zeros(2, 1), torch.tensor([1.0, 5.0])
    assert drq.critic_loss(critic, features, action, target).item() == 1 + 5


def test_the_gradient_passes_where_an_action_is_cut_off():
    actor = drq.Actor(2, 50)
    features, noise = (
        torch.randn(4, drq.Encoder.out_features),
        torch.tensor([[3.0, 0.0]]).expand(4, 2),
    )
    action = actor(features, noise)
    assert (action[:, 0] == 1 - 1e-6).all() and action[:, 1].abs().max() < 1
    (with_cut,) = torch.autograd.grad(action[:, 0].sum(), actor.head.bias, retain_graph=True)
    mean = actor(features)
    assert torch.allclose(with_cut[0], (1 - mean[:, 0] ** 2).sum()) and with_cut[1] == 0


class Plain(nn.Module):
    """The networks of Yarats et al. with masked dense weights, written without the agent."""

    def __init__(self, agent: drq.Agent):
        super().__init__()
        self.weights = nn.ParameterDict()
        self.masks = {}
        for network in ("encoder", "actor", "critic", "target_critic"):
            module = getattr(agent, network)
            for name, layer in module.named_modules():
                key = f"{network}.{name}".replace(".", "_")
                if isinstance(layer, drq.SparseLinear | drq.SparseConv2d):
                    weight = dense_weight(layer)
                    mask = dense_weight(layer, torch.ones(len(layer.active)))
                elif hasattr(layer, "weight"):
                    weight, mask = layer.weight.detach().clone(), torch.ones_like(layer.weight)
                else:
                    continue
                self.weights[key + "_w"], self.masks[key + "_w"] = (
                    nn.Parameter(weight.contiguous()),
                    mask,
                )
                self.weights[key + "_b"] = nn.Parameter(layer.bias.detach().clone())

    def get(self, key: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weights[key + "_w"] * self.masks[key + "_w"], self.weights[key + "_b"]

    def encode(self, obs):
        x = obs.permute(0, 3, 1, 2).float() / 255 - 0.5
        for index, stride in ((0, 2), (2, 1), (4, 1), (6, 1)):
            x = F.relu(F.conv2d(x, *self.get(f"encoder_layers_{index}"), stride=stride))
        return x.permute(0, 2, 3, 1).flatten(1)

    def trunk(self, network, x):
        weight, bias = self.get(f"{network}_trunk_1")
        return torch.tanh(
            F.layer_norm(F.linear(x, *self.get(f"{network}_trunk_0")), (50,), weight, bias)
        )

    def act(self, features, noise):
        x = self.trunk("actor", features)
        for index in (0, 2):
            x = F.relu(F.linear(x, *self.get(f"actor_body_{index}")))
        action = torch.tanh(F.linear(x, *self.get("actor_head"))) + noise
        return action - action.detach() + action.detach().clamp(-1 + 1e-6, 1 - 1e-6)

    def value(self, network, features, action):
        h, values = torch.cat([self.trunk(network, features), action], 1), []
        for critic in (0, 1):
            x = h
            for index in (0, 2):
                x = F.relu(F.linear(x, *self.get(f"{network}_bodies_{critic}_{index}")))
            values.append(F.linear(x, *self.get(f"{network}_heads_{critic}"))[:, 0])
        return values

    def group(self, network):
        return {name: weight for name, weight in self.weights.items() if name.startswith(network)}


@pytest.mark.parametrize(
    "flags",
    [{}, {"sparsity": 0.8, "sparse_kernel": "packed"}, {"sparsity": 0.5, "sparsify_encoder": True}],
)
def test_an_update_equals_plain_pytorch_with_masks(flags):
    args = drq.Args(width_scale=0.0625, **flags)
    agent = drq.Agent(args, 2, CPU)
    plain = Plain(agent)
    adam = {
        n: torch.optim.Adam(plain.group(n).values(), lr=1e-4)
        for n in ("encoder", "actor", "critic")
    }
    for _ in range(2):
        obs, next_obs = torch.randint(0, 256, (2, 4, 84, 84, 9), dtype=torch.uint8)
        batch = drq.Batch(
            obs,
            2 * torch.rand(4, 2) - 1,
            torch.rand(4),
            torch.tensor([0.9, 0.9, 0.0, 0.9]),
            next_obs,
        )
        noise, next_noise = (0.5 * torch.randn(2, 4, 2)).clamp(-0.3, 0.3)
        losses = drq.update(agent, batch, noise, next_noise, 0.01)

        features = plain.encode(obs)
        with torch.no_grad():
            next_features = plain.encode(next_obs)
            next_values = plain.value(
                "target_critic", next_features, plain.act(next_features, next_noise)
            )
            target = batch.reward + batch.discount * torch.minimum(*next_values)
        loss = sum(
            F.mse_loss(value, target) for value in plain.value("critic", features, batch.action)
        )
        plain.zero_grad()
        loss.backward()
        adam["critic"].step()
        adam["encoder"].step()
        detached = features.detach()
        actor_loss = -torch.minimum(
            *plain.value("critic", detached, plain.act(detached, noise))
        ).mean()
        adam["actor"].zero_grad()
        actor_loss.backward()
        adam["actor"].step()
        with torch.no_grad():
            for name, weight in plain.group("critic").items():
                plain.weights["target_" + name].lerp_(weight, 0.01)

        assert losses["critic_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        assert losses["actor_loss"].item() == pytest.approx(actor_loss.item(), rel=1e-4, abs=1e-6)
    expected = Plain(agent)
    for name, weight in plain.weights.items():
        mask = plain.masks.get(name, torch.ones_like(weight))
        # Adam turns the rounding error of a gradient near zero into a step of 1e-4: a few weights
        # may differ by that
        difference = ((weight - expected.weights[name]) * mask).abs()
        assert difference.max() <= 4.1e-4 and (difference > 2e-6).float().mean() < 0.02, name


def test_sparse_convolution_equals_a_masked_one():
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    active = torch.randperm(conv.weight.numel())[:50].sort().values
    sparse = drq.SparseConv2d(conv, active)
    mask = torch.zeros(conv.weight.numel())
    mask[active] = 1
    x = torch.randn(2, 3, 9, 9)
    expected = F.conv2d(x, conv.weight * mask.view_as(conv.weight), conv.bias, 2, 1)
    assert torch.allclose(sparse(x), expected, atol=1e-6)
    probe = torch.randn_like(expected)
    (theirs,) = torch.autograd.grad((expected * probe).sum(), conv.weight)
    (ours,) = torch.autograd.grad((sparse(x) * probe).sum(), sparse.values)
    assert torch.allclose(ours, theirs.flatten()[active], atol=1e-5)
    other = drq.SparseConv2d(conv, torch.arange(50))
    with pytest.raises(ValueError, match="mask"):
        other.load_state_dict(sparse.state_dict())


def test_what_sparsity_prunes():
    agent = drq.Agent(drq.Args(sparsity=0.8, width_scale=0.25), 2, CPU)
    active = {}
    total = {}
    for name in ("encoder", "actor", "critic"):
        total[name], active[name] = count_weights(drq.layer_table(getattr(agent, name)))
    assert total["encoder"] == active["encoder"] == 30_368
    assert (
        total["actor"]
        == active["actor"]
        == 39200 * 50 + 50 + 100 + 51 * 1024 + 1025 * 1024 + 1025 * 2
    )
    assert active["critic"] == pytest.approx(0.2 * total["critic"], abs=20)
    assert active["critic"] == count_parameters(agent.critic)
    both = drq.Agent(drq.Args(sparsity=0.8, sparsify_encoder=True, width_scale=0.25), 2, CPU)
    _, listed = count_weights(drq.layer_table(both.encoder))
    assert listed == count_parameters(both.encoder) == pytest.approx(0.2 * 30_368, abs=10)


def test_bf16_encodes_nearly_the_same():
    encoder, obs = drq.Encoder(), torch.randint(0, 256, (70, 84, 84, 9), dtype=torch.uint8)
    exact, fast = encoder(obs), encoder(obs, bf16=True)
    assert exact.shape == (70, 39200) and fast.dtype == torch.float32
    assert 0 < (exact - fast).abs().max() < 0.05 * exact.abs().max()
    assert torch.allclose(exact[64:], encoder(obs[64:]), atol=1e-6)
