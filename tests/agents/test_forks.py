"""Networks that a fork may bring: what does not fit is said at the start, in one sentence."""

import hashlib
import importlib.util
import shutil
from pathlib import Path

import der_impala_sparse as der
import drqv2_sparse as drq
import pytest
import sac_simba_sparse as sac
import stream_ac_sparse as stream
import torch
import torch.nn as nn
import tyro
from conftest import (
    CPU,
    check_error,
    load_checkpoint,
    make_agent,
    only_run,
    rewrite_checkpoint,
    succeed,
)

FLAGS = (
    "--env-id dm_control/cartpole-swingup-v0 --action-repeat 20 --total-timesteps 400"
    " --learning-starts 200 --batch-size 8 --width-scale 0.125 --eval-episodes 1"
    " --final-eval-episodes 1 --threads 1 --device cpu"
)


class PlainCritic(nn.Module):
    """Two plain layers; without `axis`, the Q-values have no axis of critics."""

    axis = True

    def __init__(self, obs_dim: int, action_dim: int, hidden: int, blocks: int, critics: int):
        super().__init__()
        body = nn.Sequential(nn.Linear(obs_dim + action_dim, hidden), nn.ReLU())
        self.encoders = nn.ModuleList([body])
        self.head = nn.Linear(hidden, 1)

    def forward(self, obs, action):
        values = self.head(self.encoders[0](torch.cat([obs, action], -1))).squeeze(-1)
        return values[None] if self.axis else values


def test_a_critic_of_two_plain_layers_trains(monkeypatch):
    monkeypatch.setattr(sac, "Critic", PlainCritic)
    agent = make_agent(sac, sparsity=0.5)
    assert [row["layer"] for row in sac.layer_table(agent.critic)] == [
        "encoders.0.0",
        "head",
        "other parameters",
    ]


def without_axis(monkeypatch):
    monkeypatch.setattr(PlainCritic, "axis", False)
    monkeypatch.setattr(sac, "Critic", PlainCritic)
    make_agent(sac)


def without_encoder(monkeypatch):
    class Critic(PlainCritic):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.layers = self.encoders
            del self.encoders

        def forward(self, obs, action):
            return self.head(self.layers[0](torch.cat([obs, action], -1))).squeeze(-1)[None]

    monkeypatch.setattr(sac, "Critic", Critic)
    make_agent(sac)


def without_relu(monkeypatch):
    real = sac.ResidualBlock.__init__

    def init(block, hidden):
        real(block, hidden)
        block.relu = nn.Tanh()

    monkeypatch.setattr(sac.ResidualBlock, "__init__", init)
    make_agent(sac)


def log_pi_of_each_dimension(monkeypatch):
    """Summed over the batch instead of the actions, of which there are three as in Hopper."""

    def sample(actor, obs, noise):
        mean, log_std = actor(obs)
        return mean, log_std.sum(0)

    monkeypatch.setattr(sac.Actor, "sample", sample)
    sac.Agent(sac.Args(width_scale=0.125), 11, 3, CPU)


def other_action_size(monkeypatch):
    real = sac.Actor
    monkeypatch.setattr(sac, "Actor", lambda obs, action, *rest: real(obs, action + 1, *rest))
    sac.Agent(sac.Args(width_scale=0.125), 5, 2, CPU)


def flat_critic_of_drqv2(monkeypatch):
    real = drq.Critic.forward
    monkeypatch.setattr(drq.Critic, "forward", lambda self, *x: real(self, *x)[0])
    drq.Agent(drq.Args(width_scale=0.0625), 2, CPU)


def smaller_encoder_of_drqv2(monkeypatch):
    real = drq.Encoder.forward
    monkeypatch.setattr(drq.Encoder, "forward", lambda self, *x: real(self, *x)[:, 1:])
    drq.Agent(drq.Args(width_scale=0.0625), 2, CPU)


def der_without_atoms(monkeypatch):
    real = der.Network.forward
    monkeypatch.setattr(der.Network, "forward", lambda self, *x: real(self, *x).sum(-1))
    der.Agent(der.Args(width_scale=0.0625), 3, CPU)


def stream_with_another_output(monkeypatch):
    real = stream.MLP.forward
    monkeypatch.setattr(stream.MLP, "forward", lambda self, x: real(self, x)[..., :1])
    stream.Agent(stream.Args(width_scale=0.125), 5, 2)


@pytest.mark.parametrize(
    "fork,words",
    [
        (without_axis, r"critic must return a tensor of shape \(critics, batch\).* \(\d+,\)"),
        (log_pi_of_each_dimension, r"log pi must return a tensor of shape \(batch\)"),
        (without_encoder, "diagnostics measure Critic.encoders.0.*there is no such part"),
        (without_relu, "diagnostics measure Actor.encoder.*lacks one of these layers"),
        (other_action_size, r"actor: mean must return a tensor of shape \(batch, action_dim\)"),
        (flat_critic_of_drqv2, r"critic must return a tensor of shape \(critics, batch\)"),
        (smaller_encoder_of_drqv2, r"encoder must return a tensor of shape \(batch, features\)"),
        (der_without_atoms, r"network must return a tensor of shape \(batch, actions, atoms\)"),
        (stream_with_another_output, r"actor.mlp must return a tensor of shape \(batch, outputs\)"),
    ],
)
def test_another_shape_is_refused_in_one_sentence(fork, words, monkeypatch):
    with pytest.raises(ValueError, match=words) as error:
        fork(monkeypatch)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "old,new,words",
    [
        ("nn.LayerNorm(hidden", "nn.RMSNorm(hidden", "actor does not fit another --exp-name"),
        ("torch.optim.AdamW", "torch.optim.SGD", "actor_optimizer of another kind --exp-name"),
    ],
)
def test_a_run_of_another_network_or_optimizer_is_left_as_it_is(main, tmp_path, old, new, words):
    """A file that was changed, over a run of the same flags: one line that names the part."""
    source = (tmp_path / "my_sac.py").resolve()
    text = Path(sac.__file__).read_text()
    source.write_text(text)
    succeed(main(source, *FLAGS.split()))
    run_dir = only_run(tmp_path / "runs")
    checkpoint = run_dir / "checkpoint.pt"
    rewrite_checkpoint(run_dir, finished=False)
    before = checkpoint.read_bytes()
    source.write_text(text.replace(old, new))
    check_error(main(source, *FLAGS.split()), *words.split())
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize(
    "rule",
    [
        lambda shape, density, generator: torch.rand(shape) < density,
        lambda shape, density, generator: torch.rand(shape).flatten() < density,
        lambda shape, density, generator: (torch.rand(shape) < density).long().flatten(),
        lambda *_: torch.arange(0),
        lambda *_: torch.tensor([3, 1]),
        lambda *_: torch.tensor([1, 1]),
        lambda *_: torch.tensor([-1, 1]),
        lambda *_: torch.tensor([1, 10**6]),
    ],
    ids=["mask", "flat_mask", "numbers", "none", "descending", "twice", "negative", "beyond"],
)
def test_a_rule_must_return_places(rule):
    network = nn.Sequential(nn.Linear(20, 30), nn.ReLU())
    with pytest.raises(sac.NetworkError, match=r"must return the places.* for 0 it returned"):
        sac.sparsify(network, 0.5, "uniform", 1, "auto", CPU, rule=rule, packed=sac.PackedProduct)


def test_another_version_of_the_file_is_noted(main, tmp_path):
    source = tmp_path / "my_sac.py"
    text = Path(sac.__file__).read_text()
    source.write_text(text)
    succeed(main(source, *FLAGS.split(), "--checkpoint-interval", "20"))
    out = succeed(main(source, *FLAGS.split()))
    assert "finished" in out and "note" not in out
    source.write_text(text.replace("nn.ReLU()", "nn.LeakyReLU()"))
    assert "made by another version of this file" in succeed(main(source, *FLAGS.split()))


def test_a_file_that_changes_while_it_trains(tmp_path):
    """The checkpoint names the code that was loaded; a file that is gone stops no run."""
    source = tmp_path / "my_sac.py"
    shutil.copy(sac.__file__, source)
    spec = importlib.util.spec_from_file_location("my_sac", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    source.unlink()
    args = tyro.cli(module.Args, args=[*FLAGS.split(), "--runs-dir", str(tmp_path / "runs")])
    module.train(args)
    digest = hashlib.sha256(Path(sac.__file__).read_bytes()).hexdigest()
    assert load_checkpoint(only_run(tmp_path / "runs"))["file"] == digest


def test_a_layer_too_large_for_its_places():
    network = nn.Sequential(nn.Linear(2**16, 2**15, device="meta"))
    with pytest.raises(sac.NetworkError, match=r"0 has 2,147,483,648 weights; .* 2\^31 - 1"):
        sac.sparsify(network, 0.9, "uniform", 1, "auto", CPU)


def test_a_layer_without_bias_is_not_packed():
    network = nn.Sequential(nn.Linear(20, 30, bias=False))
    sac.sparsify(network, 0.9, "uniform", 1, "packed", CPU, packed=sac.PackedProduct)
    assert network[0].kernel == "dense" and network(torch.ones(2, 20)).shape == (2, 30)


def test_a_sparse_convolution_is_the_one_that_it_replaces():
    """Stride, padding, dilation and groups; pruned places count as zero."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding="valid", dilation=2, groups=2)
    network = nn.Sequential(conv)
    drq.sparsify(network, 0.5, "uniform", 1, "auto", CPU, convolution=drq.SparseConv2d)
    sparse, images = network[0], torch.randn(3, 4, 11, 11)
    assert isinstance(sparse, drq.SparseConv2d)
    kept = torch.zeros(conv.weight.numel(), dtype=torch.bool).index_fill(0, sparse.index, True)
    with torch.no_grad():
        conv.weight *= kept.view_as(conv.weight)
    torch.testing.assert_close(network(images), conv(images))


@pytest.mark.parametrize(
    "agent,mode,words",
    [
        (sac, "zeros", "0.0: this file has no sparse convolutions; copy SparseConv2d from drqv2"),
        (drq, "circular", "0.0: a sparse convolution can only be padded with zeros"),
    ],
    ids=["another_file", "padding"],
)
def test_a_convolution_that_cannot_be_sparse_is_refused(agent, mode, words):
    network = nn.Sequential(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode)))
    convolution = getattr(agent, "SparseConv2d", None)
    agent.sparsify(network, 0.0, "uniform", 1, "auto", CPU, convolution=convolution)  # stays dense
    with pytest.raises(agent.NetworkError, match=words):
        agent.sparsify(network, 0.5, "uniform", 1, "auto", CPU, convolution=convolution)


def test_a_class_derived_from_a_layer_stays_dense():
    """It multiplies in its own way, which a sparse layer would not."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    network = nn.Sequential(Doubled(20, 30), nn.ReLU(), nn.Linear(30, 4))
    attention = nn.MultiheadAttention(8, 2)  # has such a class inside
    sac.sparsify(network, 0.5, "uniform", 1, "auto", CPU, packed=sac.PackedProduct)
    sac.sparsify(attention, 0.5, "uniform", 1, "auto", CPU, packed=sac.PackedProduct)
    assert type(network[0]) is Doubled and type(network[2]) is sac.SparseLinear
    x = torch.ones(3, 8)
    assert attention(x, x, x)[0].shape == (3, 8)
    dense, sparse, _ = sac.layer_table(network)
    assert (dense["active"], sparse["active"]) == (600, 60)
