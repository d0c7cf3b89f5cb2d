"""Which weights survive, and that training only them equals training a masked dense network."""

import copy
import json
import math
from functools import partial

import numba
import pytest
import sac_simba_sparse as sac
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import BY_KERNEL, CPU, DATA, count_parameters, count_weights, dense_weight, make_agent

OFFICIAL = json.loads((DATA / "er_sparsity_default.json").read_text())
KERNELS = ("packed", "dense")


@pytest.fixture
def all_threads(one_thread):
    """The kernels share their work out among threads."""
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    torch.set_num_threads(numba.config.NUMBA_NUM_THREADS)


# Actor hidden 16, critic hidden 64, for 5 observations and 2 actions
tiny_agent = partial(make_agent, sac)


def sparse_layers(network: nn.Module) -> dict[str, sac.SparseLinear]:
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, sac.SparseLinear)
    }


def sparse_linear(linear: nn.Linear, mask: torch.Tensor, kernel: str) -> sac.SparseLinear:
    active = mask.flatten().nonzero().squeeze(1)
    return sac.SparseLinear(linear, active, sac.PackedProduct if kernel == "packed" else None)


def assert_close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the largest entry: a float32 sum is only as exact as its largest terms."""
    assert ours.shape == reference.shape
    assert float((ours.double() - reference).abs().max()) <= tolerance * float(
        reference.abs().max().clamp(min=1)
    )


# Sparsity of each layer


@pytest.mark.parametrize("sparsity", ["0.5", "0.8", "0.9", "0.95"])
@pytest.mark.parametrize("network", ["sac/actor", "sac/critic", "ddpg/actor", "ddpg/critic"])
def test_erdos_renyi_equals_the_official_code(network, sparsity):
    official = OFFICIAL[network + "/default_x1"]
    expected = official["by_sparsity"][sparsity]
    shapes = {name: tuple(shape) for name, shape in official["shapes"].items()}
    ours = sac.erdos_renyi(shapes, float(sparsity))
    assert ours == pytest.approx(expected["sparsity"], abs=1e-6)
    active = sum((1 - ours[name]) * math.prod(shapes[name]) for name in shapes)
    assert active == pytest.approx(expected["expected_active_total"], abs=1e-6)


def test_erdos_renyi_by_hand():
    # 24 + 16 + 4 = 44 parameters, half of them stay: 22, of which the bias takes 4 and the matrices
    # 18. Sums of dimensions 10 + 10, so eps = 18 / 20 = 0.9; densities 0.9 * 10 / 24 = 0.375 and
    # 0.9 * 10 / 16 = 0.5625.
    sparsity = sac.erdos_renyi({"a": (4, 6), "b": (2, 8), "bias": (4,)}, 0.5)
    assert sparsity == pytest.approx({"a": 0.625, "b": 0.4375, "bias": 0.0})


def test_erdos_renyi_of_a_convolution_counts_the_kernel_sides():
    # 8 * 4 * 3 * 3 = 288 and 200 parameters lose floor(259.2) and 180: 49 stay. Sums of dimensions
    # 8 + 4 + 3 + 3 = 18 and 30, so eps = 49 / 48 and densities eps * 18 / 288 = 0.0638021 and eps *
    # 30 / 200 = 0.153125.
    sparsity = sac.erdos_renyi({"conv": (8, 4, 3, 3), "linear": (10, 20)}, 0.9)
    assert sparsity == pytest.approx({"conv": 1 - 0.06380208333, "linear": 1 - 0.153125})


def test_overfull_layers_become_dense_and_the_others_pay():
    # Budget 26 of 104: eps = 26 / 24 would give the small matrix density 1.083. Dense, it leaves 22
    # weights for the other: density 22 / 100.
    assert sac.erdos_renyi({"a": (2, 2), "b": (10, 10)}, 0.75) == pytest.approx(
        {"a": 0.0, "b": 0.78}
    )


def test_overfull_layers_can_follow_from_others():
    # 24, 100 and 1600 keep 3 + 10 + 160 = 173 at 0.9: eps = 173 / 111 = 1.56, density 1.56 * 11 /
    # 24 = 0.71 for a. At 0.85 they keep 4 + 15 + 240 = 259: eps 2.33 makes a overfull (1.07); then
    # eps = 235 / 100 = 2.35 for b and c.
    shapes = {"a": (3, 8), "b": (10, 10), "c": (40, 40)}
    assert sac.erdos_renyi(shapes, 0.9)["a"] == pytest.approx(1 - 173 / 111 * 11 / 24)
    assert sac.erdos_renyi(shapes, 0.85) == pytest.approx(
        {"a": 0.0, "b": 1 - 0.47, "c": 1 - 0.1175}
    )


def test_sparsity_out_of_reach():
    # 20 parameters: at 0.5 the bias alone spends the 10 that stay; at 0.4 two weights of ten are
    # left.
    shapes = {"weight": (2, 5), "bias": (10,)}
    assert sac.erdos_renyi(shapes, 0.4) == pytest.approx({"weight": 0.8, "bias": 0.0})
    with pytest.raises(ValueError, match="out of reach"):
        sac.erdos_renyi(shapes, 0.5)
    with pytest.raises(ValueError, match="out of reach"):
        tiny_agent(sparsity=0.99)


def test_sparsity_zero_is_dense_and_uniform_is_uniform():
    shapes = {"a": (4, 6), "b": (2, 8), "bias": (4,)}
    assert sac.erdos_renyi(shapes, 0.0) == {"a": 0.0, "b": 0.0, "bias": 0.0}
    assert sac.uniform(shapes, 0.7) == {"a": 0.7, "b": 0.7, "bias": 0.0}


# Masks


@pytest.mark.parametrize("distribution", ["erdos_renyi", "uniform"])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
def test_every_layer_keeps_an_exact_number_of_weights(distribution, sparsity):
    dense = sac.Critic(20, 4, 64, 2, 1)
    shapes = {name: tuple(parameter.shape) for name, parameter in dense.named_parameters()}
    request = getattr(sac, distribution)(shapes, sparsity)
    pruned = copy.deepcopy(dense)
    sac.sparsify(pruned, sparsity, distribution, 3, "auto", CPU, packed=sac.PackedProduct)
    table = sac.layer_table(pruned)
    weights, others = table[:-1], table[-1]

    names = [row["layer"] + ".weight" for row in weights]
    assert names == [name for name, shape in shapes.items() if len(shape) == 2]
    layers = sparse_layers(pruned)
    for name, row in zip(names, weights):
        assert tuple(row["shape"]) == shapes[name] and row["total"] == math.prod(shapes[name])
        # Rounded to the nearest, neither up nor down
        assert abs(row["active"] - (1 - request[name]) * row["total"]) <= 0.5 + 1e-6
        module = pruned.get_submodule(row["layer"])
        if row["active"] == row["total"]:
            assert type(module) is nn.Linear
            continue
        active = layers[row["layer"]].active
        assert len(module.values) == len(active) == row["active"]
        assert len(active.unique()) == len(active)
        assert active.min() >= 0 and active.max() < row["total"]
    biases = sum(math.prod(shape) for shape in shapes.values() if len(shape) == 1)
    assert others["active"] == others["total"] == biases
    total, active = count_weights(table)
    assert total == count_parameters(dense) and active == count_parameters(pruned)
    if distribution == "erdos_renyi":
        roundings = len(shapes) + len(weights) / 2  # as below
        assert abs(active - (1 - sparsity) * total) <= roundings


def test_a_layer_keeps_at_least_one_weight():
    network = nn.Sequential(nn.Linear(3, 2))
    sac.sparsify(network, 0.95, "uniform", 1, "packed", CPU, packed=sac.PackedProduct)
    assert sac.layer_table(network)[0]["active"] == 1 and network[0].values.shape == (1,)


def test_the_mask_depends_on_its_seed_alone_and_survivors_keep_their_values():
    def pruned(init_seed, mask_seed):
        torch.manual_seed(init_seed)
        dense = sac.Actor(10, 3, 32, 1)
        network = copy.deepcopy(dense)
        state = torch.get_rng_state()
        sac.sparsify(network, 0.8, "erdos_renyi", mask_seed, "auto", CPU, packed=sac.PackedProduct)
        assert torch.equal(torch.get_rng_state(), state)
        for name, layer in sparse_layers(network).items():
            before = dense.get_submodule(name)
            assert torch.equal(layer.values, before.weight.flatten()[layer.active.long()])
            assert torch.equal(layer.bias, before.bias)
        return {name: layer.active for name, layer in sparse_layers(network).items()}

    first, other_init, other_mask = pruned(1, 7), pruned(2, 7), pruned(1, 8)
    # The two heads are overfull
    assert list(first) == ["encoder.0", "encoder.1.up", "encoder.1.down"]
    for name in first:
        assert torch.equal(first[name], other_init[name])
        assert len(first[name]) == len(other_mask[name]) and set(first[name].tolist()) != set(
            other_mask[name].tolist()
        )


def test_masks_of_actor_and_critic_are_independent(monkeypatch):
    seeds = []
    real = sac.sparsify

    def spy(*networks, mask_seed, **how):
        seeds.append(mask_seed)
        real(*networks, mask_seed=mask_seed, **how)

    monkeypatch.setattr(sac, "sparsify", spy)
    flags = {"seed": 1, "sparsity": 0.5}
    for changed in ({}, {"mask_seed": 1}, {"seed": 2, "mask_seed": 1}, {"mask_seed": 2}):
        tiny_agent(**flags | changed)
    default, same, other_run, other_mask = (tuple(seeds[i : i + 2]) for i in range(0, 8, 2))
    assert default == same == other_run and default[0] != default[1]
    assert not set(default) & set(other_mask)


def test_the_critic_sparsity_does_not_move_the_actors_mask():
    first = sparse_layers(tiny_agent(sparsity=0.5).actor)
    second = sparse_layers(tiny_agent(sparsity=0.5, critic_sparsity=0.8).actor)
    assert len(first) > 0 and all(
        torch.equal(first[name].active, second[name].active) for name in first
    )


@pytest.mark.parametrize(
    "flags,actor,critic",
    [
        ({"sparsity": 0.5}, 0.5, 0.5),
        ({"sparsity": 0.5, "actor_sparsity": 0.0}, 0.0, 0.5),
        ({"sparsity": 0.5, "critic_sparsity": 0.0}, 0.5, 0.0),
        ({"critic_sparsity": 0.8}, 0.0, 0.8),
        ({"sparsity": 0.5, "actor_sparsity": 0.6, "critic_sparsity": 0.9}, 0.6, 0.9),
    ],
)
def test_sparsity_of_one_network_overrides_that_of_both(flags, actor, critic):
    agent = tiny_agent(**flags)
    for name, sparsity in (("actor", actor), ("critic", critic)):
        rows = sac.layer_table(getattr(agent, name))
        total, active = count_weights(rows)
        # Each parameter tensor rounds what it loses, by less than one; and each layer its count, by
        # at most a half.
        tensors = len(list(getattr(agent, name).parameters()))
        assert abs(active - (1 - sparsity) * total) <= tensors + len(rows) / 2
        assert bool(sparse_layers(getattr(agent, name))) == (sparsity > 0)


def test_layer_table_of_humanoid():
    torch.manual_seed(1)
    agent = sac.Agent(sac.Args(sparsity=0.9), 67, 21, CPU)
    tables = [sac.layer_table(agent.actor), sac.layer_table(agent.critic)]
    assert [count_weights(rows)[0] for rows in tables] == [146_346, 4_248_577]  # 4.4 M
    for name in ("actor", "critic"):
        official = OFFICIAL[f"sac/{name}/default_x1"]["by_sparsity"]["0.9"]
        rows = sac.layer_table(getattr(agent, name))
        _, active = count_weights(rows)
        assert active == pytest.approx(official["expected_active_total"], abs=len(rows) / 2)
        expected = sorted(
            (1 - sparsity) * math.prod(OFFICIAL[f"sac/{name}/default_x1"]["shapes"][path])
            for path, sparsity in official["sparsity"].items()
            if path.endswith("kernel")
        )
        assert sorted(row["active"] for row in rows[:-1]) == pytest.approx(expected, rel=2e-3)
    stored = count_parameters(agent.actor, agent.critic)
    assert stored == sum(count_weights(rows)[1] for rows in tables)


def test_humanoid_at_width_4_has_70_million_parameters_and_7_million_active():
    with torch.device("meta"):  # shapes without memory
        networks = sac.Actor(67, 21, 512, 1), sac.Critic(67, 21, 2048, 2, 1)
    totals, active = [], []
    for network in networks:
        shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
        sparsity = sac.erdos_renyi(shapes, 0.9)
        totals.append(sum(map(math.prod, shapes.values())))
        active.append(
            sum((1 - sparsity[name]) * math.prod(shape) for name, shape in shapes.items())
        )
    # 67*512+512 + (2*512 + 2*512*2048 + 2048+512) + 2*512 + 2*(512*21+21)
    # 88*2048+2048 + 2 * (2*2048 + 2*2048*8192 + 8192+2048) + 2*2048 + 2048+1
    assert totals == [2_158_122, 67_325_953]
    # a tenth, but for what the parameter tensors lose by rounding (fewer than one each)
    assert active == pytest.approx([215_822, 6_732_602])
    assert sparsity["encoders.0.0.weight"] == 0.0  # the critic's first layer is dense at this width


# A layer against a masked dense one

# Widths around 128 and 256, because the packed kernel works on blocks of columns.
SHAPES = [
    (16, 24, 0.2),
    (21, 128, 0.1),
    (30, 129, 0.1),
    (300, 70, 0.05),
    (64, 1000, 0.02),
    (1, 257, 0.3),
    (40, 12, 0.6),
]


def random_mask(out_features: int, in_features: int, density: float) -> torch.Tensor:
    mask = torch.rand(out_features, in_features) < density
    if out_features > 1:
        mask[3], mask[4], mask[5] = False, False, False
        mask[4, 7] = True
        mask[5, [0, 2, 8]] = True
        mask[:, 5] = False
        assert mask.any(1).sum() < out_features  # a row without any
    return mask


def layer_and_dense(mask: torch.Tensor, kernel: str):
    """A sparse layer, and the float64 weight and bias of the masked dense layer it stands for."""
    linear = nn.Linear(*reversed(mask.shape))
    weight = (linear.weight.detach().double() * mask).requires_grad_()
    bias = linear.bias.detach().double().requires_grad_()
    return sparse_linear(linear, mask, kernel), weight, bias


def compare(mask: torch.Tensor, kernel: str, x: torch.Tensor, grad: torch.Tensor) -> None:
    layer, weight, bias = layer_and_dense(mask, kernel)
    x64 = x.double().requires_grad_()
    reference = F.linear(x64, weight, bias)
    reference.backward(grad.double())
    leaf = torch.empty_strided(x.shape, x.stride()).copy_(x).requires_grad_()
    assert torch.equal(dense_weight(layer, torch.ones(len(layer.active))) > 0, mask)
    y = layer(leaf)
    y.backward(grad)
    assert_close(y.detach(), reference.detach())
    assert_close(leaf.grad, x64.grad)
    assert_close(layer.values.grad, weight.grad.flatten()[layer.active.long()])
    assert_close(layer.bias.grad, bias.grad)


@BY_KERNEL
@pytest.mark.parametrize("batch", [1, 2, 256])
@pytest.mark.parametrize("out_features,in_features,density", SHAPES)
def test_layer_equals_a_masked_dense_layer(
    out_features, in_features, density, batch, kernel, all_threads
):
    torch.manual_seed(out_features + batch)
    mask = random_mask(out_features, in_features, density)
    compare(mask, kernel, torch.randn(batch, in_features), torch.randn(batch, out_features))


@BY_KERNEL
def test_layer_takes_any_memory_layout(kernel, all_threads):
    mask = random_mask(16, 24, 0.3)
    transposed = torch.randn(24, 9).t(), torch.randn(16, 9).t()
    strided = torch.randn(9, 48)[:, ::2], torch.randn(9, 48)[:, ::3]
    expanded = torch.randn(1, 24).expand(9, 24), torch.ones(()).expand(9, 16)
    for x, grad in (transposed, strided, (torch.randn(9, 24), expanded[1])):
        assert not (x.is_contiguous() and grad.is_contiguous())
        compare(mask, kernel, x, grad)
    layer, weight, bias = layer_and_dense(mask, kernel)
    assert_close(layer(expanded[0]).detach(), F.linear(expanded[0].double(), weight, bias).detach())


@BY_KERNEL
def test_layer_computes_only_the_gradients_asked_for(kernel):
    layer, weight, bias = layer_and_dense(random_mask(16, 24, 0.3), kernel)
    layer.requires_grad_(False)
    x = torch.randn(5, 24, requires_grad=True)
    layer(x).sum().backward()
    assert layer.values.grad is None and layer.bias.grad is None
    assert_close(x.grad, weight.detach().sum(0).expand(5, 24))
    assert_close(layer(x.detach()), F.linear(x.detach().double(), weight, bias).detach())


def test_auto_takes_packed_up_to_a_quarter_on_cpu():
    def chosen(sparsity, kernel="auto"):
        network = nn.Sequential(nn.Linear(10, 40))
        sac.sparsify(network, sparsity, "uniform", 1, kernel, CPU, packed=sac.PackedProduct)
        return network[0].kernel

    assert [chosen(0.74), chosen(0.75), chosen(0.95)] == ["dense", "packed", "packed"]
    assert chosen(0.5, "packed") == "packed" and chosen(0.95, "dense") == "dense"


# Training


class MaskedLinear(nn.Module):
    """W_eff = M * W of the paper: the dense layer that a sparse one must be equal to."""

    def __init__(self, linear: nn.Linear, mask: torch.Tensor):
        super().__init__()
        self.weight, self.bias, self.mask = linear.weight, linear.bias, mask

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


def test_twenty_adamw_steps_equal_masked_dense_training():
    dense = nn.Sequential(sac.simba(12, 32, 2), sac.init_linear(32, 3))
    networks = {kernel: copy.deepcopy(dense) for kernel in KERNELS} | {
        "masked": copy.deepcopy(dense)
    }
    for kernel in KERNELS:
        how = (0.85, "erdos_renyi", 5, kernel, CPU)
        sac.sparsify(networks[kernel], *how, packed=sac.PackedProduct)
    masks = {}
    for name, layer in sparse_layers(networks["packed"]).items():
        masks[name] = dense_weight(layer, torch.ones(len(layer.active)))
    assert len(masks) == 5  # the input layer and two in each block; the head is overfull
    for name, mask in masks.items():
        networks["masked"].set_submodule(
            name, MaskedLinear(networks["masked"].get_submodule(name), mask)
        )

    # The weight decay of 0.5 shrinks weights by 1 % in 20 steps: a wrong one would show a thousand
    # times over.
    optimizers = {
        n: torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.5)
        for n, net in networks.items()
    }
    start = copy.deepcopy(networks["packed"])
    for _ in range(20):
        x, target = torch.randn(64, 12), torch.randn(64, 3)
        for name, network in networks.items():
            optimizers[name].zero_grad()
            F.mse_loss(network(x), target).backward()
            optimizers[name].step()

    # A step moves a weight by about the learning rate, so that a relative rounding error of 1e-6 in
    # its gradient gives 1e-9 a step, and more only where the gradient happens to be near zero.
    # Measured: packed 6e-8 to 1.2e-7 after the twenty steps (seeds 0 to 2), which is one or two
    # float32 roundings of a weight; dense kernel 0.
    furthest = 0.0
    for name, parameter in networks["packed"].named_parameters():
        where, leaf = name.rpartition(".")[::2]
        reference = networks["masked"].get_submodule(where)
        for kernel in KERNELS:
            layer = networks[kernel].get_submodule(where)
            ours, expected = (
                getattr(layer, leaf),
                getattr(reference, "weight" if leaf == "values" else leaf),
            )
            if leaf == "values":
                expected = expected.flatten()[layer.active.long()]
            assert float((ours - expected).detach().abs().max()) < 1e-6, (kernel, name)
        furthest = max(
            furthest, float((parameter - start.get_parameter(name)).detach().abs().max())
        )
    assert furthest > 1e-2


def test_sparsity_zero_is_the_plain_dense_network():
    agent = tiny_agent()
    torch.manual_seed(1)
    plain = {"actor": sac.Actor(5, 2, 16, 1), "critic": sac.Critic(5, 2, 64, 2, 1)}
    for name, network in plain.items():
        ours = getattr(agent, name)
        assert not sparse_layers(ours)
        assert all(
            type(module) in (nn.Linear, nn.LayerNorm)
            for module in ours.modules()
            if hasattr(module, "bias")
        )
        assert list(ours.state_dict()) == list(network.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), network.parameters()))
        total, active = count_weights(sac.layer_table(getattr(agent, name)))
        assert active == total == count_parameters(network)


# Memory and files


@BY_KERNEL
def test_the_target_critic_shares_the_pattern_and_not_the_values(kernel):
    agent = tiny_agent(sparsity=0.8, sparse_kernel=kernel)
    layers, targets = sparse_layers(agent.critic), sparse_layers(agent.target_critic)
    index = "product" if kernel == "packed" else "index"  # next to `active`
    assert len(layers) == len(targets) > 0
    for ours, target in zip(layers.values(), targets.values()):
        assert ours.active is target.active
        assert getattr(ours, index) is getattr(target, index)
    for ours, target in zip(agent.critic.parameters(), agent.target_critic.parameters()):
        assert torch.equal(ours, target) and ours.data_ptr() != target.data_ptr()
        assert ours.requires_grad and not target.requires_grad


@BY_KERNEL
def test_state_dict_rebuilds_the_pruned_matrix(kernel):
    mask = random_mask(16, 24, 0.3)
    linear = nn.Linear(24, 16)
    layer = sparse_linear(copy.deepcopy(linear), mask, kernel)
    state = layer.state_dict()
    assert set(state) == {"values", "bias", "active"}
    assert len(state["values"]) == len(state["active"]) == int(mask.sum())
    weight = torch.zeros(16 * 24)
    weight[state["active"].long()] = state["values"]
    assert torch.equal(weight.view(16, 24), linear.weight * mask)
    assert torch.equal(state["bias"], linear.bias)

    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(4, 24)).sum().backward()
    optimizer.step()
    moments = optimizer.state[layer.values]
    assert moments["exp_avg"].shape == moments["exp_avg_sq"].shape == (int(mask.sum()),)


@BY_KERNEL
def test_weights_of_another_mask_are_refused_and_of_another_kernel_accepted(kernel):
    saved = tiny_agent(sparsity=0.8, sparse_kernel="packed").critic.state_dict()
    same = tiny_agent(sparsity=0.8, sparse_kernel=kernel).critic
    for parameter in same.parameters():
        parameter.data.zero_()
    same.load_state_dict(saved)
    assert all(torch.equal(parameter, saved[name]) for name, parameter in same.named_parameters())
    with pytest.raises(ValueError, match="mask"):
        tiny_agent(sparsity=0.8, sparse_kernel=kernel, mask_seed=2).critic.load_state_dict(saved)
