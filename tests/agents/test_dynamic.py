"""A topology that changes: each rule by hand and against dense NumPy, exact counts and resume."""

import dataclasses
import json
import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import sac_simba_dynamic as dynamic
import sac_simba_sparse as sac
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import (
    BY_KERNEL,
    CPU,
    check_error,
    dense_weight,
    load_checkpoint,
    make_agent,
    make_batch,
    metric_values,
    only_run,
    read_metrics,
    rewrite_checkpoint,
    succeed,
)
from torch.utils._pytree import tree_leaves

BY_TOPOLOGY = pytest.mark.parametrize("topology", ["set", "rigl", "magnitude"])
GAMMA = 0.99
tiny_agent = partial(make_agent, dynamic)


def make_args(**flags) -> dynamic.Args:
    return dynamic.Args(width_scale=0.125, **flags)


def change(agent, args, progress: float = 0.3, seed: int = 5, batch_seed: int = 0) -> bool:
    batch, noise, next_noise = make_batch(dynamic, seed=batch_seed)
    return dynamic.change_topology(agent, args, progress, seed, batch, noise, next_noise, GAMMA)


def learn(agent, batch_seed: int = 0) -> None:
    dynamic.update(agent, *make_batch(dynamic, seed=batch_seed), GAMMA, 0.005)


# Rules, by hand

VALUES = torch.tensor([0.5, -0.1, 3.0, 0.2, -2.0])
INACTIVE = torch.tensor([1, 4, 6, 8])
GRADIENT = torch.tensor([9.0, 0.3, 9.0, 9.0, -0.7, 9.0, 0.1, 9.0, -0.2, 9.0])


def use(rule, count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    dropped, grown = rule(VALUES, INACTIVE, count, GRADIENT, generator)
    return sorted(dropped.tolist()), sorted(grown.tolist())


def test_rigl_drops_the_smallest_and_grows_the_largest_gradients():
    assert use(dynamic.rigl_rule, 1) == ([1], [4])
    assert use(dynamic.rigl_rule, 2) == ([1, 3], [1, 4])
    assert use(dynamic.rigl_rule, 3) == ([0, 1, 3], [1, 4, 8])
    assert use(dynamic.rigl_rule, 0) == ([], [])


def test_set_grows_at_random():
    drawn = [use(dynamic.set_rule, 2, seed) for seed in range(300)]
    assert all(dropped == [1, 3] for dropped, _ in drawn)
    pairs = [tuple(grown) for _, grown in drawn]
    assert set(pairs) == {(1, 4), (1, 6), (1, 8), (4, 6), (4, 8), (6, 8)}
    assert all(20 < pairs.count(pair) < 90 for pair in set(pairs))
    assert use(dynamic.set_rule, 2, 7) == use(dynamic.set_rule, 2, 7)


def test_magnitude_drops_the_smallest_and_grows_nothing():
    assert use(dynamic.magnitude_rule, 3) == ([0, 1, 3], [])


def test_rigl_picks_exactly_the_largest_gradients():
    generator = torch.Generator().manual_seed(1)
    for count in (1, 10, 500):
        values = torch.randn(600, generator=generator)
        gradient = torch.randn(5000, generator=generator)
        inactive = torch.randperm(5000, generator=generator)[:4400].sort().values
        dropped, grown = dynamic.rigl_rule(values, inactive, count, gradient, None)
        order = np.argsort(-np.abs(gradient.numpy()[inactive.numpy()]))
        assert sorted(grown.tolist()) == sorted(inactive.numpy()[order[:count]].tolist())
        assert sorted(dropped.tolist()) == sorted(np.argsort(np.abs(values.numpy()))[:count])


# Schedules, by hand


@pytest.mark.parametrize(
    "progress,dropped",
    # alpha 0.4: of 100 weights 40 at the start, 20 in the middle, 40/2 * (1 + sqrt(1/2)) = 34.1
    # at a quarter of the way, 0 at the end and after it
    [(0.0, 40), (0.2, 34), (0.4, 20), (0.8, 0), (0.9, 0)],
)
def test_the_drop_fraction_falls_along_a_cosine(progress, dropped):
    for topology in ("set", "rigl"):
        args = make_args(topology=topology, drop_fraction=0.4, topology_end=0.8)
        assert dynamic.count_changes(args, progress, 100, 100, 1000) == dropped
        # No more than can grow
        assert dynamic.count_changes(args, progress, 100, 100, 110) == min(dropped, 10)


@pytest.mark.parametrize(
    "progress,active",
    # Of 1000 weights 200 stay. A quarter of the way leaves (3/4)^3 = 27/64 of the other 800
    [(0.0, 1000), (0.2, 1000), (0.35, 537.5), (0.5, 300), (0.8, 200), (1.0, 200)],
)
def test_magnitude_pruning_follows_the_cubic_schedule(progress, active):
    args = make_args(topology="magnitude", prune_start=0.2, prune_end=0.8)
    dropped = dynamic.count_changes(args, progress, 1000, 200, 1000)
    assert 1000 - dropped == pytest.approx(active, abs=0.5)
    assert dynamic.count_changes(args, progress, 200, 200, 1000) == 0


# A change against a dense implementation in NumPy


class DenseLayer:
    """A layer as dense arrays (out * in,): mask, weight, moments, the target's weight."""

    def __init__(self, agent, name: str):
        layer, *copies = agent.topology.layers[name]
        optimizer = agent.topology.optimizers[name.partition(".")[0]]
        state = optimizer.state[layer.values]
        vectors = [layer.values, state["exp_avg"], state["exp_avg_sq"]]
        vectors += [each.values for each in copies]
        arrays = [dense_weight(layer, vector.detach()).numpy().ravel() for vector in vectors]
        self.arrays = [array.copy() for array in arrays]
        self.mask = np.zeros(math.prod(layer.shape), bool)
        self.mask[layer.active.numpy()] = True

    def change(self, count: int, grow_score: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The places of the smallest weights, and the inactive ones of the highest score."""
        inactive = np.flatnonzero(~self.mask)
        active = np.flatnonzero(self.mask)
        dropped = active[np.argsort(np.abs(self.arrays[0][active]), kind="stable")[:count]]
        if grow_score is None:
            return dropped, inactive[:0]
        return dropped, inactive[np.argsort(-grow_score[inactive], kind="stable")[:count]]


def dense_gradient(agent, name: str) -> np.ndarray:
    """The gradient of a layer's dense weight for the losses on the batch, by plain autograd."""
    batch, noise, next_noise = make_batch(dynamic)
    layer = agent.topology.layers[name][0]
    weight = dense_weight(layer).requires_grad_(True)

    def forward(x):
        return F.linear(x, weight, layer.bias)

    layer.forward = forward
    alpha = agent.alpha().detach()
    if name.startswith("actor"):
        loss, _ = dynamic.actor_loss(agent.actor, agent.critic, alpha, batch.obs, noise)
    else:
        networks = (agent.actor, agent.target_critic)
        target = dynamic.td_target(*networks, alpha, batch, GAMMA, next_noise)
        loss = dynamic.critic_loss(agent.critic, batch, target)
    (gradient,) = torch.autograd.grad(loss, weight)
    del layer.forward
    return gradient.numpy().ravel()


@BY_KERNEL
@BY_TOPOLOGY
def test_twenty_changes_equal_a_dense_implementation(topology, kernel):
    args = make_args(topology=topology, sparsity=0.8, sparse_kernel=kernel)
    agent = tiny_agent(topology=topology, sparsity=0.8, sparse_kernel=kernel)
    names = list(agent.topology.layers)
    assert len(names) == 9
    first = {name: agent.topology.active_mask(name).numpy() for name in names}
    ever = {name: mask.copy() for name, mask in first.items()}
    changed = dict.fromkeys(["actor", "critic"], 0)
    for step in range(20):
        learn(agent, step)
        progress = 0.04 * (step + 1)
        before = {name: DenseLayer(agent, name) for name in names}
        expected = {}
        scores = {name: np.abs(dense_gradient(agent, name)) for name in names}
        generator = torch.Generator().manual_seed(step)
        for name in names:
            layer = agent.topology.layers[name][0]
            final, total = agent.topology.final_counts[name], math.prod(layer.shape)
            count = dynamic.count_changes(args, progress, len(layer.active), final, total)
            if topology == "set":  # a score that is highest at the places drawn first
                inactive = np.flatnonzero(~before[name].mask)
                drawn = inactive[torch.randperm(len(inactive), generator=generator).numpy()]
                scores[name] = np.zeros(total)
                scores[name][drawn] = np.arange(len(drawn), 0, -1)
            score = None if topology == "magnitude" else scores[name]
            expected[name] = before[name].change(count, score)
            changed[name.partition(".")[0]] += count
        change(agent, args, progress, seed=step)
        for name in names:
            old, new, (dropped, grown) = before[name], DenseLayer(agent, name), expected[name]
            weight, score = np.abs(old.arrays[0]), scores[name]
            # Of equal weights, such as zeros that have had no gradient, any may be dropped
            assert np.array_equal(np.sort(weight[old.mask & ~new.mask]), np.sort(weight[dropped]))
            ours = np.sort(score[new.mask & ~old.mask])
            assert len(ours) == len(grown) and new.mask.sum() == len(
                agent.topology.layers[name][0].active
            )
            tolerance = 1e-5 * score.max() if topology == "rigl" else 0  # of another order of sums
            assert np.allclose(ours, np.sort(score[grown]), rtol=0, atol=tolerance)
            for array, moved in zip(old.arrays, new.arrays, strict=True):
                assert np.array_equal(moved, np.where(old.mask & new.mask, array, 0))
            ever[name] |= new.mask
    assert sum(changed.values()) > 1000
    measured = agent.topology.measure()
    for network in ("actor", "critic"):
        own = [name for name in names if name.startswith(network)]
        now = [agent.topology.active_mask(name).numpy() for name in own]
        both = [mask & first[name] for mask, name in zip(now, own)]

        def count(masks):
            return sum(int(mask.sum()) for mask in masks)

        total = sum(len(mask) for mask in now)
        assert measured[f"{network}_active_weights"] == count(now)
        assert measured[f"{network}_weights_dropped"] == changed[network]
        assert measured[f"{network}_ever_active"] == count(ever[name] for name in own) / total
        assert measured[f"{network}_first_overlap"] == count(both) / count(first[n] for n in own)
        assert measured[f"{network}_first_overlap"] < 0.9


@BY_KERNEL
@BY_TOPOLOGY
def test_after_a_change_layers_multiply_with_their_new_places(topology, kernel):
    args = make_args(topology=topology, sparsity=0.8, sparse_kernel=kernel)
    agent = tiny_agent(topology=topology, sparsity=0.8, sparse_kernel=kernel)
    learn(agent)
    change(agent, args)
    for name, layers in agent.topology.layers.items():
        for layer in layers:
            x = torch.randn(7, layer.shape[1], requires_grad=True)
            weight = dense_weight(layer).requires_grad_(True)
            y, expected = layer(x), F.linear(x, weight, layer.bias)
            assert torch.allclose(y, expected, atol=1e-5), name
            given = torch.randn_like(y)
            ours = torch.autograd.grad(y, x, given, retain_graph=True)[0]
            assert torch.allclose(ours, torch.autograd.grad(expected, x, given)[0], atol=1e-5)
            # Sorted by block of columns, then by row
            row, column = layer.active // layer.shape[1], layer.active % layer.shape[1]
            block = column // dynamic.BLOCK
            assert ((block * layer.shape[0] + row).diff() >= 0).all()
    learn(agent)
    assert all(part.isfinite().all() for part in agent.critic.parameters())


@pytest.mark.parametrize("topology", ["set", "rigl"])
@BY_KERNEL
def test_shapes_and_memory_stay(topology, kernel):
    """So that what was recorded with their addresses, such as a CUDA graph, stays valid."""
    agent = tiny_agent(topology=topology, sparsity=0.8, sparse_kernel=kernel)
    learn(agent)

    def addresses() -> list[tuple]:
        tensors = tree_leaves([optimizer.state for optimizer in agent.topology.optimizers.values()])
        tensors = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
        for network in (agent.actor, agent.critic, agent.target_critic):
            tensors += [*network.parameters(), *network.buffers()]
        return [(tensor.data_ptr(), tensor.shape) for tensor in tensors]

    before, values = addresses(), agent.critic.encoders[0][1].up.active.clone()
    change(agent, make_args(topology=topology, sparsity=0.8, sparse_kernel=kernel))
    assert addresses() == before
    assert not torch.equal(values, agent.critic.encoders[0][1].up.active)
    for layer, twin in zip(agent.critic.modules(), agent.target_critic.modules()):
        if isinstance(layer, dynamic.SparseLinear):
            assert twin.active is layer.active
            parts = ("index",) if kernel == "dense" else ("product",)
            assert all(getattr(twin, part) is getattr(layer, part) for part in parts)


def test_grown_weights_can_start_at_random():
    args = dynamic.Args(topology="set", grow_init="normal")
    agent = tiny_agent(topology="set", sparsity=0.8, width_scale=1.0)
    learn(agent)
    before = {name: agent.topology.active_mask(name) for name in agent.topology.layers}
    change(agent, args, progress=0.0)
    name = "critic.encoders.0.1.up"
    layer, twin = agent.topology.layers[name]
    grown = ~before[name][layer.active.long()]
    values = layer.values.detach()[grown]
    assert len(values) == int(0.5 * len(layer.active))
    assert float(values.std()) == pytest.approx(math.sqrt(2 / layer.shape[1]), rel=0.01)
    assert torch.equal(twin.values[grown], values)


def test_magnitude_begins_dense_and_ends_at_the_counts_of_static():
    static = sac.layer_table(make_agent(sac, sparsity=0.9).critic)
    agent = tiny_agent(topology="magnitude", sparsity=0.9)
    args = make_args(topology="magnitude", sparsity=0.9)
    table = dynamic.layer_table(agent.critic)
    assert all(row["active"] == row["total"] for row in table)
    learn(agent)
    assert not change(agent, args, progress=0.2) and not change(agent, args, progress=0.5)
    half = [len(layers[0].active) for layers in agent.topology.layers.values()]
    assert change(agent, args, progress=0.81) and not change(agent, args, progress=0.9)
    assert dynamic.layer_table(agent.critic) == static
    ends = [len(layers[0].active) for layers in agent.topology.layers.values()]
    assert all(end < now for end, now in zip(ends, half))
    learn(agent)


def test_a_network_that_stays_dense_has_no_topology():
    for flags in ({}, {"critic_sparsity": 0.5}, {"actor_sparsity": 0.5}):
        agent = tiny_agent(topology="rigl", **flags)
        learn(agent)
        assert not change(agent, make_args(topology="rigl", **flags))
        learn(agent)
        measured = agent.topology.measure()
        assert len(measured) == 4 * len(flags)
        assert all(measured[name] > 0 for name in measured if "dropped" in name)


# Runs

SHORT = {
    "env_id": "Pendulum-v1",
    "max_episode_steps": 20,
    "action_repeat": 1,
    "total_timesteps": 240,
    "learning_starts": 40,
    "batch_size": 8,
    "updates_per_step": 1,
    "width_scale": 0.125,
    "sparsity": 0.8,
    "threads": 1,
    "device": "cpu",
    "eval_episodes": 1,
    "eval_interval": 80,
    "final_eval_episodes": 2,
    "diagnostics_interval": 60,
    "checkpoint_interval": 30,
}
CHANGING = SHORT | {"topology_interval": 7}


def without_names(run_dir) -> dict:
    """A checkpoint without what says where and by which file it was made."""
    state = load_checkpoint(run_dir)
    del state["args"], state["file"]
    return state | {"counters": state["counters"][:3]}


def assert_equal(ours, theirs) -> None:
    ours, theirs = tree_leaves(ours), tree_leaves(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    ("kernel", "overlap"),
    [("auto", True), ("auto", False), pytest.param("dense", True, marks=pytest.mark.slow)],
)
def test_static_is_sac_simba_sparse_bit_for_bit(tmp_path, kernel, overlap):
    flags = SHORT | {"sparse_kernel": kernel, "overlap": overlap, "reset_interval": 100}
    sac.train(sac.Args(**flags, runs_dir=str(tmp_path / "sparse")))
    args = {**flags, "topology": "static", "topology_interval": 7}
    dynamic.train(dynamic.Args(**args, runs_dir=str(tmp_path / "dynamic")))
    ours, theirs = only_run(tmp_path / "dynamic"), only_run(tmp_path / "sparse")
    rows = read_metrics(ours)
    assert rows == read_metrics(theirs) and len(rows) > 100
    state = without_names(ours)
    assert state.pop("topology") == {}
    assert_equal(state, without_names(theirs))


def test_magnitude_is_dense_until_pruning_starts(tmp_path):
    dense = SHORT | {"sparsity": 0.0, "diagnostics_interval": 0}
    sac.train(sac.Args(**dense, runs_dir=str(tmp_path / "dense")))
    flags = CHANGING | {"topology": "magnitude", "prune_start": 0.5, "prune_end": 0.9}
    flags["diagnostics_interval"] = 0
    dynamic.train(dynamic.Args(**flags, runs_dir=str(tmp_path / "magnitude")))
    rows = [read_metrics(only_run(tmp_path / name)) for name in ("dense", "magnitude")]
    before = [[row for row in part if int(row["env_step"]) <= 120] for part in rows]
    assert len(before[0]) > 30
    for a, b in zip(*before, strict=True):
        assert a["metric"] == b["metric"]
        assert float(a["value"]) == pytest.approx(float(b["value"]), rel=1e-5, abs=1e-6)


def shrinking_rule(values, inactive, count: int, gradient, generator):
    """That of a fork: drops one weight, and grows none."""
    return torch.arange(1), inactive[:0]


def sizes_at_captures(monkeypatch, runs_dir: str, **flags) -> list[list[int]]:
    """Of a run that captures graphs when one on a GPU would: the sizes of layers at each capture.

    Instead of a graph it calls the function. At its end, layers must have the sizes of the last.
    """
    captured = []
    topologies = []

    class Graphed(dynamic.GraphedFunction):
        def __init__(self, function, device, enabled):
            super().__init__(function, device, enabled)
            self.enabled = True
            topologies.append(function.args[0].topology)
            self.replay = self.call_on_a_stream_of_its_own

        def call_on_a_stream_of_its_own(self):
            self.outputs = self.function()
            return self.outputs

        def capture(self) -> None:
            self.graph = self
            if self.function.func is dynamic.update_all:
                captured.append(topologies[-1].sizes())

    monkeypatch.setattr(dynamic, "GraphedFunction", Graphed)
    dynamic.train(dynamic.Args(**CHANGING, **flags, runs_dir=runs_dir))
    assert topologies[-1].sizes() == captured[-1]
    return captured


def test_graphs_are_captured_anew_where_layers_change_their_size(tmp_path, monkeypatch):
    """Their vectors then lie elsewhere in memory; after other changes, one capture is enough."""
    captures = partial(sizes_at_captures, monkeypatch)
    assert len(captures(str(tmp_path / "set"), topology="set")) == 1
    magnitude = {"topology": "magnitude", "prune_start": 0.5, "prune_end": 0.7}
    pruned = captures(str(tmp_path / "magnitude"), **magnitude)
    monkeypatch.setitem(dynamic.RULES, "set", shrinking_rule)
    shrunk = captures(str(tmp_path / "shrinking"), topology="set")
    for sizes in (pruned, shrunk):
        assert len(sizes) > 5
        assert all(new != old for old, new in pairwise(sizes))


class Stop(Exception):
    """In place of a kill."""


@BY_TOPOLOGY
def test_resume_between_changes_is_exact(tmp_path, topology, monkeypatch, capsys):
    flags = CHANGING | {"topology": topology, "reset_interval": 130}
    whole = dynamic.Args(**flags, runs_dir=str(tmp_path / "whole"))
    dynamic.train(whole)
    parts = dataclasses.replace(whole, runs_dir=str(tmp_path / "parts"))
    save = dynamic.Run.save
    for number in (2, 1, 2):
        left = [number]

        def save_and_stop(run, *what, left=left, **how):
            save(run, *what, **how)
            left[0] -= 1
            if not left[0]:
                raise Stop

        monkeypatch.setattr(dynamic.Run, "save", save_and_stop)
        with pytest.raises(Stop):
            dynamic.train(parts)
        for lock in list(tmp_path.glob("parts/*/.lock")):
            lock.unlink()
    monkeypatch.setattr(dynamic.Run, "save", save)
    dynamic.train(parts)
    assert "going on from env step" in capsys.readouterr().out
    ours, theirs = only_run(tmp_path / "parts"), only_run(tmp_path / "whole")
    rows = read_metrics(theirs)
    assert read_metrics(ours) == rows
    assert_equal(without_names(ours), without_names(theirs))
    dropped = metric_values(rows, "diagnostics/critic_weights_dropped")
    assert len(dropped) == 4 and dropped[-1] > 0


def test_after_pruning_the_layer_table_is_printed_anew(tmp_path, capsys):
    flags = CHANGING | {"topology": "magnitude", "runs_dir": str(tmp_path)}
    dynamic.train(dynamic.Args(**flags))
    before, after = capsys.readouterr().out.split("pruning ended at env step ")
    run_dir = only_run(tmp_path)
    layers = json.loads((run_dir / "args.json").read_text())["layers"]
    for network, rows in layers.items():
        active = sum(row["active"] for row in rows)
        total = sum(row["total"] for row in rows)
        assert active < 0.25 * total
        assert f"{total:,} {total:,}" in before and f"{active:,} {total:,}" in after, network
    (metric,) = metric_values(read_metrics(run_dir)[-20:], "diagnostics/critic_active_weights")[-1:]
    sparse = [row["active"] for row in layers["critic"] if row["kernel"] not in ("torch", "")]
    assert metric == sum(sparse)
    policy, env = dynamic.load_policy(run_dir)
    assert policy(env.reset(seed=0)[0]).shape == (1,)


def test_a_run_whose_pruning_has_not_ended_says_so(tmp_path, capsys):
    flags = SHORT | {"topology": "magnitude", "topology_interval": 1000}
    dynamic.train(dynamic.Args(**flags, runs_dir=str(tmp_path)))
    assert "warning: pruning has not ended" in capsys.readouterr().out
    layers = json.loads((only_run(tmp_path) / "args.json").read_text())["layers"]
    assert all(row["active"] == row["total"] for rows in layers.values() for row in rows)


def command(flags: dict) -> list[str]:
    return [
        word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)
    ]


def test_a_run_can_start_from_networks_whose_topology_has_changed(main, tmp_path):
    program = dynamic.__file__
    flags = CHANGING | {"topology": "rigl", "runs_dir": "first"}
    succeed(main(program, *command(flags)))
    first = only_run(tmp_path / "first")
    more = flags | {"runs_dir": "second", "init_from": first, "learning_starts": 999}
    succeed(main(program, *command(more)))
    ours, theirs = load_checkpoint(only_run(tmp_path / "second")), load_checkpoint(first)
    assert_equal(ours["critic"], theirs["critic"])
    assert_equal(ours["topology"], theirs["topology"])
    for other in ({"mask_seed": 9}, {"topology": "magnitude"}, {"topology": "static"}):
        check_error(main(program, *command(more | other)), "--init-from", "first mask")


def test_another_first_mask_is_refused(main, tmp_path):
    flags = CHANGING | {"topology": "set"}
    succeed(main(dynamic.__file__, *command(flags)))
    run_dir = only_run(tmp_path / "runs")
    topology = load_checkpoint(run_dir)["topology"]
    name = "critic.encoders.0.1.up"
    topology["first"][name][:9] ^= 255
    rewrite_checkpoint(run_dir, finished=False, topology=topology)
    check_error(main(dynamic.__file__, *command(flags)), "topology", "first mask")


def test_networks_that_are_pruned_further_than_asked_for_are_refused():
    """With magnitude pruning every first mask is that of all places, so it says nothing."""
    flags = {"topology": "magnitude", "sparsity_distribution": "uniform"}
    pruned = tiny_agent(**flags, sparsity=0.9)
    assert change(pruned, make_args(**flags, sparsity=0.9), progress=0.9)
    saved = pruned.topology.state_dict()
    tiny_agent(**flags, sparsity=0.9).topology.load_state_dict(saved)
    with pytest.raises(dynamic.NetworkError, match="fewer weights left than --sparsity leaves"):
        tiny_agent(**flags, sparsity=0.8).topology.load_state_dict(saved)


def test_when_a_run_changes_its_topology(tmp_path, monkeypatch):
    """After the update behind each interval; on its batch and noise, seeded by its number."""
    last = []
    seen = []
    update = dynamic.update

    def note_update(agent, batch, *rest):
        last[:] = [batch, *rest]
        return update(agent, batch, *rest)

    def note_change(agent, args, progress, seed, batch, noise, *rest):
        assert torch.equal(batch.obs, last[0].obs) and torch.equal(noise, last[1])
        seen.append((progress, seed))

    monkeypatch.setattr(dynamic, "update", note_update)
    monkeypatch.setattr(dynamic, "change_topology", note_change)
    flags = SHORT | {"topology": "set", "diagnostics_interval": 0, "runs_dir": str(tmp_path)}
    flags |= {"action_repeat": 2, "updates_per_step": 3, "topology_interval": 7}
    dynamic.train(dynamic.Args(**flags | {"total_timesteps": 120}))
    expected = []
    for decision in range(21, 61):  # the first 20 are the warm-up
        updates = 3 * (decision - 20)
        if updates // 7 > (updates - 3) // 7:
            seed = dynamic.derive_seed(1, dynamic.TOPOLOGY, updates)
            expected.append((decision / 60, seed))
    assert seen == expected


def test_flags_of_the_schedule_are_checked(main):
    program = dynamic.__file__
    check_error(main(program, "--prune-start", "0.9"), "--prune-end 0.8", "prune_start <")
    check_error(main(program, "--topology-end", "0"), "--topology-end 0")


def test_the_target_is_no_layer_of_its_own():
    """It has the same places, and its values are the online ones where weights grow."""
    agent = tiny_agent(topology="rigl", sparsity=0.5, clipped_double_q=True)
    assert all(
        len(layers) == 1 + name.startswith("critic")
        for name, layers in agent.topology.layers.items()
    )
    with torch.no_grad():
        for part in agent.target_critic.parameters():
            part += 1
    learn(agent)
    before = {name: agent.topology.active_mask(name) for name in agent.topology.layers}
    change(agent, make_args(topology="rigl", sparsity=0.5, clipped_double_q=True))
    for name, layers in agent.topology.layers.items():
        grown = ~before[name][layers[0].active.long()]
        assert grown.any()
        for layer in layers:
            assert not layer.values[grown].any() and layer.values[~grown].all()
    assert isinstance(agent.topology, nn.Module) and not list(agent.topology.parameters())
    assert agent.topology.layers["critic.encoders.1.1.up"][0].active.device == CPU
