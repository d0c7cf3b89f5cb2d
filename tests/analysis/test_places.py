"""Gradient interference at all places of the weights, pruned ones too, as the official code."""

import ddpg_simba_sparse as ddpg
import numpy as np
import pandas as pd
import pytest
import sac_simba_sparse as sac
import torch
import torch.nn as nn
from analysis import gradient_interference as gi
from conftest import dense_weight
from test_gradient_interference import (
    GAMMA,
    MODULES,
    explicit_gradients,
    make_agent,
    make_batch,
    write_run,
)


def make_dense(network: nn.Module) -> None:
    """Puts a dense layer, zero where weights are pruned, in the place of each sparse one."""
    for name, child in network.named_children():
        if isinstance(child, sac.SparseLinear | ddpg.SparseLinear):
            linear = nn.Linear(child.shape[1], child.shape[0])
            linear.weight.data = dense_weight(child)
            linear.bias.data = child.bias.data
            setattr(network, name, linear)
        else:
            make_dense(child)


@pytest.mark.parametrize("network", ["actor", "critic"])
@pytest.mark.parametrize("name", ["sac", "ddpg"])
def test_all_places_equal_explicit_gradients_of_a_dense_network_with_zeros(name, network):
    module = MODULES[name]
    agent, batches = make_agent(module, sparsity=0.8), make_batch()
    for part in vars(agent).values():
        if isinstance(part, nn.Module):
            part.double()
    batch = type(batches[0])(*(column.double() for column in batches[0]))
    noises = [noise.double() for noise in batches[1:]]
    measured = {
        places: gi.measure(module, agent, batch, *noises, GAMMA, places)[network]
        for places in ("active", "all")
    }
    before = sum(p.numel() for p in getattr(agent, network).parameters())
    for part in (agent.actor, agent.critic, agent.target_critic):
        make_dense(part)
    gradients = explicit_gradients(module, agent, batch, *noises, network)
    assert gradients.shape[1] > 3 * before
    unit = gradients / gradients.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(measured["all"], (unit @ unit.t()).numpy(), rtol=0, atol=1e-10)
    assert np.nanmax(np.abs(measured["all"] - measured["active"])) > 0.01
    dense = gi.measure(module, agent, batch, *noises, GAMMA, "active")[network]
    np.testing.assert_allclose(measured["all"], dense, rtol=0, atol=1e-12)


def test_both_forms_are_drawn_and_reported(main, tmp_path):
    torch.manual_seed(0)
    write_run(tmp_path / "run", sac, sparsity=0.8)
    code, out, err = main(gi.__file__, "run", "--threads", 1, "--samples", 8, "--output", "drawn")
    assert code == 0 and not err
    table = pd.read_csv("drawn/gradient_interference.csv")
    assert table.places.tolist() == ["active"] * 4 + ["all"] * 4
    values = table.pivot(index=["network", "env_step"], columns="places", values="mean_abs")
    assert len(values) == 4 and (values.active - values["all"]).abs().min() > 1e-3
    for places in ("active", "all"):
        assert f"sparsity 0.8, seed 3; gradients at {places} places" in out
