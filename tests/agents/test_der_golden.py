"""DER against a second implementation: whole updates in float64 numpy, the replay in lists.

Nothing of the agent's file is used to compute what is expected, and no automatic differentiation.
The gradients, from the loss backwards, for a batch of B transitions of weights w:

    L = 1/B sum_b w_b CE_b,  CE_b = -sum_i m_i log p_i(s_b, a_b),  p = softmax(logits)
    sum_i m_i = 1, so that
    dL / dlogits[b, a_b, i] = w_b / B (p_i - m_i), and 0 for the other actions
    logits = V + A - mean_a A   ->   dV = sum_a dlogits,  dA = dlogits - mean_a dlogits
    y = W x + c, W = mu + sigma * (f_out f_in^T), c = beta + tau * f_out   (f: the given noise)
        dW = dy x^T, dc = dy;  dmu = dW, dsigma = dW * (f_out f_in^T), dbeta = dc, dtau = dc * f_out
        dx = W^T dy
    convolution: y[o] = sum_cij W[o, c, i, j] x[c, . + i, . + j]: dW is the correlation of dy with
        x, dx that of dy with W turned by 180 degrees
    maximum of a window: the gradient goes to its largest entry

A pruned weight is a zero that is never changed. m is C51's projection: the target network's
probabilities, at the action that is best for the online network under the target's noise, lie at
r + discount z_j, clipped to [-10, 10], and are shared by the two atoms beside that point.
Adam: m <- 0.9 m + 0.1 g, v <- 0.999 v + 0.001 g^2,
    x <- x - lr m / (1 - 0.9^t) / (sqrt(v / (1 - 0.999^t)) + epsilon).
Priorities are sqrt(CE + 1e-10), importance weights P^-0.5 over the largest of the batch.
"""

import der_impala_sparse as der
import numpy as np
import pytest
import torch
from conftest import CPU
from numpy.lib.stride_tricks import sliding_window_view

ACTIONS, ATOMS, BATCH = 3, 51, 5
SUPPORT = np.linspace(-10, 10, ATOMS)
RATE, EPSILON = 1e-4, 1.5e-4


def windows(x, before, after, stride, fill):
    """(b, c, h, w) -> windows of 3 x 3: (b, c, h', w', 3, 3)"""
    border = ((0, 0), (0, 0), (before, after), (before, after))
    padded = np.pad(x, border, constant_values=fill)
    return sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::stride, ::stride]


class Numpy:
    """The network and its gradients. weights: name -> array; masks: name -> array of 0 and 1."""

    def __init__(self, network: der.Network):
        self.weights, self.masks = {}, {}
        for name, parameter in network.named_parameters():
            owner, _, kind = name.rpartition(".")
            layer = network.get_submodule(owner)
            pruned = layer.mean if kind == "sigma" and hasattr(layer.mean, "active") else layer
            if kind in ("values", "sigma") and hasattr(pruned, "active"):
                places = pruned.active.numpy()
                mask, value = np.zeros(np.prod(pruned.shape)), np.zeros(np.prod(pruned.shape))
                mask[places], value[places] = 1, parameter.detach().numpy()
                value, mask = value.reshape(pruned.shape), mask.reshape(pruned.shape)
            else:
                value = parameter.detach().numpy().astype(float)
                mask = np.ones_like(value)
            name = name.replace("values", "weight")
            self.weights[name], self.masks[name] = value, mask

    def conv(self, x, name):
        weight = self.weights[f"{name}.weight"]
        seen = windows(x, 1, 1, 1, 0)
        y = np.einsum("bchwij,ocij->bohw", seen, weight, optimize=True)
        y += self.weights[f"{name}.bias"][:, None, None]

        def back(dy):
            self.put(f"{name}.weight", np.einsum("bohw,bchwij->ocij", dy, seen, optimize=True))
            self.put(f"{name}.bias", dy.sum((0, 2, 3)))
            turned = weight[:, :, ::-1, ::-1]
            return np.einsum("bohwij,ocij->bchw", windows(dy, 1, 1, 1, 0), turned, optimize=True)

        return y, back

    def pool(self, x):
        size = x.shape[2]
        before = size % 2  # JAX's "same": 84 and 42 have a border behind only, 21 on both sides
        seen = windows(x, before, 1, 2, -np.inf)
        flat = seen.reshape(*seen.shape[:4], 9)
        best = flat.argmax(-1)

        def back(dy):
            dx = np.zeros((*x.shape[:2], size + before + 1, size + before + 1))
            b, c, h, w = np.indices(best.shape)
            np.add.at(dx, (b, c, 2 * h + best // 3, 2 * w + best % 3), dy)
            return dx[:, :, before : before + size, before : before + size]

        return flat.max(-1), back

    def noisy(self, x, name, noise):
        f_in, f_out = noise
        outer = np.outer(f_out, f_in)
        mean = self.weights[f"{name}.mean.weight"]
        weight = mean + self.weights[f"{name}.sigma"] * outer
        bias = self.weights[f"{name}.mean.bias"] + self.weights[f"{name}.bias_sigma"] * f_out

        def back(dy):
            d_weight, d_bias = dy.T @ x, dy.sum(0)
            self.put(f"{name}.mean.weight", d_weight)
            self.put(f"{name}.sigma", d_weight * outer)
            self.put(f"{name}.mean.bias", d_bias)
            self.put(f"{name}.bias_sigma", d_bias * f_out)
            return dy @ weight

        return x @ weight.T + bias, back

    def put(self, name, gradient):
        self.gradients[name] = gradient * self.masks[name]

    def forward(self, obs, noise):
        """(batch, 84, 84, 4) -> log-probabilities (batch, actions, atoms), and the way back"""
        self.gradients, steps = {}, []

        def do(result):
            y, back = result
            steps.append(back)
            return y

        def relu(x):
            return np.maximum(x, 0), lambda dy: dy * (x > 0)

        x = obs.transpose(0, 3, 1, 2) / 255
        for stage in (0, 4, 8):  # a convolution, pooling, two blocks; at the end a ReLU
            x = do(self.pool(do(self.conv(x, f"encoder.{stage}"))))
            for block in (stage + 2, stage + 3):
                y, first = relu(x)
                y, second = self.conv(y, f"encoder.{block}.layers.1")
                y, third = relu(y)
                y, fourth = self.conv(y, f"encoder.{block}.layers.3")
                x = x + y

                def around(dy, chain=(fourth, third, second, first)):
                    dx = dy
                    for back in chain:
                        dx = back(dx)
                    return dy + dx

                steps.append(around)
        x = do(relu(x))
        shape = x.shape
        x = x.transpose(0, 2, 3, 1).reshape(len(x), -1)
        hidden, back_hidden = self.noisy(x, "hidden", noise[0])
        x, back_relu = relu(hidden)
        value, back_value = self.noisy(x, "value", noise[1])
        advantage, back_advantage = self.noisy(x, "advantage", noise[2])
        advantage = advantage.reshape(len(x), ACTIONS, ATOMS)
        logits = value[:, None] + advantage - advantage.mean(1, keepdims=True)
        logits -= logits.max(-1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))

        def back(d_logits):
            d_advantage = d_logits - d_logits.mean(1, keepdims=True)
            dx = back_value(d_logits.sum(1)) + back_advantage(d_advantage.reshape(len(x), -1))
            dx = back_hidden(back_relu(dx))
            dx = dx.reshape(shape[0], shape[2], shape[3], shape[1]).transpose(0, 3, 1, 2)
            for step in reversed(steps):
                dx = step(dx)

        return log_p, back


def project(probabilities, rewards, discounts):
    result = np.zeros((len(rewards), ATOMS))
    for row, (reward, discount) in enumerate(zip(rewards, discounts)):
        for p, z in zip(probabilities[row], SUPPORT):
            place = (min(max(reward + discount * z, -10), 10) + 10) / 0.4
            low = min(int(place), ATOMS - 2)
            result[row, low] += p * (low + 1 - place)
            result[row, low + 1] += p * (place - low)
    return result


@pytest.mark.parametrize("flags", [{}, {"sparsity": 0.6, "sparse_kernel": "packed"}])
def test_three_updates_equal_float64_numpy(flags, tmp_path):
    torch.manual_seed(1)
    args = der.Args(width_scale=0.0625, n_step=3, **flags)
    agent = der.Agent(args, ACTIONS, CPU)
    with torch.no_grad():  # far from the start, and two different networks
        for network in (agent.network, agent.target_network):
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    ours, target = Numpy(agent.network), Numpy(agent.target_network)
    first = {name: weight.copy() for name, weight in ours.weights.items()}
    if flags:
        assert all(0 < ours.masks[f"{name}.mean.weight"].mean() < 1 for name in ("hidden", "value"))

    generator = np.random.default_rng(0)
    replay = der.PrioritizedReplay(tmp_path / "replay.u8", args, 60, 0)
    replay.begin(generator.integers(0, 256, (84, 84), np.uint8))
    for number in range(30):
        frame = generator.integers(0, 256, (84, 84), np.uint8)
        replay.add(int(generator.integers(ACTIONS)), float(generator.normal()), number == 29, frame)
    priority = np.ones(30)
    moments = {name: (np.zeros_like(w), np.zeros_like(w)) for name, w in first.items()}
    chosen_apart = clipped = 0
    for t in (1, 2, 3):
        batch = replay.sample(BATCH, CPU, torch.Generator().manual_seed(t))
        batch = batch._replace(reward=3 * batch.reward)  # some points beyond the support
        noise = agent.network.draw_noise(torch.Generator().manual_seed(10 + t))
        next_noise = agent.network.draw_noise(torch.Generator().manual_seed(20 + t))
        logged, each = der.update(agent, batch, noise, next_noise)
        replay.set_priorities(batch.place, each)

        obs, next_obs = batch.obs.numpy().astype(float), batch.next_obs.numpy().astype(float)
        noise, next_noise = (
            [tuple(part.double().numpy() for part in layer) for layer in draw]
            for draw in (noise, next_noise)
        )
        index, action = batch.place.numpy(), batch.action.numpy()
        reward, discount = batch.reward.double().numpy(), batch.discount.double().numpy()
        q = np.exp(ours.forward(next_obs, next_noise)[0]) @ SUPPORT
        next_p = np.exp(target.forward(next_obs, next_noise)[0])
        best = q.argmax(1)
        assert (np.sort(q)[:, -1] - np.sort(q)[:, -2]).min() > 1e-4  # not a matter of rounding
        chosen_apart += (best != (next_p @ SUPPORT).argmax(1)).sum()
        rows = np.arange(BATCH)
        m = project(next_p[rows, best], reward, discount)
        clipped += (abs(reward) + discount * 10 > 10).sum()
        log_p, back = ours.forward(obs, noise)
        ce = -(m * log_p[rows, action]).sum(1)
        weight = (priority[index] / priority.sum()) ** -0.5
        weight /= weight.max()
        assert batch.weight.numpy() == pytest.approx(weight, rel=1e-6)
        assert each.numpy() == pytest.approx(ce, rel=1e-5)
        assert logged["loss"].item() == pytest.approx((weight * ce).mean(), rel=1e-5)
        assert logged["td_target"].item() == pytest.approx((m @ SUPPORT).mean(), rel=1e-4)

        d_logits = np.zeros_like(log_p)
        d_logits[rows, action] = weight[:, None] / BATCH * (np.exp(log_p[rows, action]) - m)
        back(d_logits)
        assert ours.gradients.keys() == first.keys()
        for name, gradient in ours.gradients.items():
            mean, square = moments[name]
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient**2 - square)
            scale = np.sqrt(square / (1 - 0.999**t)) + EPSILON
            ours.weights[name] -= RATE * mean / (1 - 0.9**t) / scale
        for place, loss in zip(index, ce):
            priority[place] = np.sqrt(loss + 1e-10)
        assert replay.priority[:30] == pytest.approx(priority, rel=1e-5)

    assert chosen_apart >= 3 and clipped >= 3
    result = Numpy(agent.network)
    for name, weight in ours.weights.items():
        moved = np.abs(weight - first[name]).max()
        assert moved > 1e-5, name
        assert np.abs(weight - result.weights[name]).max() < 0.005 * moved + 3e-8, name
        assert np.array_equal(result.masks[name], ours.masks[name])
    unmoved = Numpy(agent.target_network).weights
    assert all(np.array_equal(unmoved[name], weight) for name, weight in target.weights.items())


def test_the_whole_replay_equals_lists(tmp_path):
    """2,400 frames through a ring of 300: lives that end or are cut off, priorities that change."""
    capacity, slack, n, gamma = 240, 60, 4, 0.9
    ring = capacity + slack
    exponents = {"priority_exponent": 0.7, "importance_exponent": 0.4}
    args = der.Args(n_step=n, gamma=gamma, **exponents)
    replay = der.PrioritizedReplay(tmp_path / "replay.u8", args, capacity, slack)
    generator = np.random.default_rng(0)
    lives = []  # each: number of its first frame, steps (action, reward) so far, whether it ended
    priority = {}  # of the frames that can be sampled, by number
    largest = 1.0
    sampled = ends = young = 0
    total = 0  # frames

    def picture(number: int) -> np.ndarray:
        frame = np.full((84, 84), number % 256, np.uint8)
        frame[0] = number // 256
        return frame

    def stack(number: int, start: int) -> np.ndarray:
        black = np.zeros((84, 84), np.uint8)
        shown = [picture(k) if k >= start else black for k in range(number - 3, number + 1)]
        return np.stack(shown, -1)

    def refresh() -> None:
        """What can be sampled: n steps behind it, or the end of its life; not too old."""
        for number in [k for k in priority if k < total - capacity]:
            del priority[number]
        start, steps, ended = lives[-1]
        for k in range(max(start, total - capacity), start + len(steps)):
            if ended or k + n <= start + len(steps):
                priority.setdefault(k, largest)

    while total < 2400:
        lives.append([total, [], False])
        replay.begin(picture(total))
        total += 1
        refresh()
        length = int(generator.choice([1, 2, 3, 4, 5, 12, 40, 300]))
        ending = generator.random() < 0.6
        for step in range(length):
            action, reward = int(generator.integers(18)), float(generator.normal())
            over = ending and step == length - 1
            replay.add(action, reward, over, picture(total))
            total += 1
            lives[-1][1].append((action, np.float32(reward)))
            lives[-1][2] = over
            refresh()
            assert replay.ready() == bool(priority)
            if total % 29 or not priority:
                continue
            expected = np.zeros(ring)
            for k, value in priority.items():
                expected[k % ring] = value
            assert replay.priority == pytest.approx(expected, rel=1e-9)

            # Draws: the place where the sum of the priorities, in the order of the ring, passes u
            batch = replay.sample(8, CPU, torch.Generator().manual_seed(total))
            points = torch.rand(8, generator=torch.Generator().manual_seed(total), dtype=float)
            passed = expected.cumsum() > (points * expected.sum()).numpy()[:, None]
            places = [int(row.argmax()) for row in passed]
            assert batch.place.tolist() == places
            weights = np.array([expected[place] ** -0.4 for place in places])
            assert batch.weight.numpy() == pytest.approx(weights / weights.max(), rel=1e-6)
            number_at = {k % ring: k for k in priority}
            for row, place in enumerate(places):
                k = number_at[place]
                start, steps, ended = next(life for life in reversed(lives) if life[0] <= k)
                rest = steps[k - start :][:n]
                assert batch.action[row] == rest[0][0]
                value = sum(gamma**i * r for i, (_, r) in enumerate(rest))
                assert batch.reward[row].item() == pytest.approx(value, abs=1e-5)
                assert np.array_equal(batch.obs[row], stack(k, start))
                if ended and k + n >= start + len(steps):
                    assert batch.discount[row] == 0
                    ends += 1
                else:
                    assert batch.discount[row].item() == pytest.approx(gamma**n)
                    assert np.array_equal(batch.next_obs[row], stack(k + n, start))
                young += k < start + 3
            sampled += 8
            losses = torch.from_numpy(generator.exponential(2, 8))
            replay.set_priorities(batch.place, losses)
            for place, loss in zip(places, losses.tolist()):
                priority[number_at[place]] = (loss + 1e-10) ** 0.7
            largest = max(largest, *((loss + 1e-10) ** 0.7 for loss in losses.tolist()))
            assert replay.largest_priority == pytest.approx(largest)
    assert sampled > 500 and ends > 20 and young > 8 and total >= 8 * ring


def test_a_draw_on_a_boundary_takes_what_lies_behind_it(tmp_path, monkeypatch):
    """So that a frame of priority 0 is never drawn, not even by a draw of exactly 0."""
    replay = der.PrioritizedReplay(tmp_path / "replay.u8", der.Args(n_step=1), 10, 0)
    replay.begin(np.zeros((84, 84), np.uint8))
    for _ in range(4):
        replay.add(0, 0.0, False, np.zeros((84, 84), np.uint8))
    replay.priority[:5] = [0, 1, 0, 1, 0]
    points = torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *size, **how: points)
    assert replay.sample(4, CPU).place.tolist() == [1, 1, 3, 3]
