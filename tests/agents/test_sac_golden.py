"""Three SAC updates in a row against golden numbers of the official JAX code.

5 observations, 2 actions, batches of 8.
"""

import numpy as np
import pytest
import sac_simba_sparse as sac
import torch
import torch.nn as nn
from conftest import CPU, DATA

GOLDEN = np.load(DATA / "sac_tiny.npz")


def layer_names(network: str, module_name: str) -> str:
    """The golden file's path of a module: encoder.1.up -> encoder/ResidualBlock_0/Dense_0."""
    parts = module_name.split(".")
    if network == "actor" and parts[0] in ("mean", "log_std"):
        return "predictor/Dense_" + str(["mean", "log_std"].index(parts[0]))
    if parts[0] == "heads":
        return "predictor/Dense_0"
    parts = parts[1:] if network == "actor" else parts[2:]
    if parts == ["0"]:
        return "encoder/Dense_0"
    if len(parts) == 1:
        return "encoder/LayerNorm_0"
    inner = {"norm": "LayerNorm_0", "up": "Dense_0", "down": "Dense_1"}[parts[1]]
    return f"encoder/ResidualBlock_{int(parts[0]) - 1}/{inner}"


def golden(key: str) -> torch.Tensor:
    return torch.from_numpy(np.array(GOLDEN[key]))


def install(case: str, network_name: str, network: nn.Module, kernel: str) -> None:
    """Writes the golden initial parameters into a network and prunes it with the golden masks."""
    source = "critic" if network_name == "target" else network_name
    for name, module in list(network.named_modules()):
        if not isinstance(module, (nn.Linear, nn.LayerNorm)):
            continue
        path = layer_names(source, name)
        prefix = f"{case}/init/{network_name}/{path}"
        with torch.no_grad():
            if isinstance(module, nn.LayerNorm):
                module.weight.copy_(golden(prefix + "/scale"))
                module.bias.copy_(golden(prefix + "/bias"))
                continue
            module.weight.copy_(golden(prefix + "/kernel").T)
            module.bias.copy_(golden(prefix + "/bias"))
        if case == "pert_sp80":
            mask = golden(f"{case}/mask/{source}/{path}/kernel").T.flatten()
            if not mask.all():
                active = mask.nonzero().squeeze(1)
                packed = sac.PackedProduct if kernel == "packed" else None
                network.set_submodule(name, sac.SparseLinear(module, active, packed))


def tensors(network_name: str, network: nn.Module, gradients: bool):
    """Pairs of golden path and our tensor; the dense matrix is rebuilt from the active weights."""
    source = "critic" if network_name == "target" else network_name
    for name, module in network.named_modules():
        if not isinstance(module, (nn.Linear, nn.LayerNorm, sac.SparseLinear)):
            continue
        path = layer_names(source, name)
        pick = (lambda p: p.grad) if gradients else (lambda p: p.detach())
        yield path + "/bias", pick(module.bias), None
        if isinstance(module, nn.LayerNorm):
            yield path + "/scale", pick(module.weight), None
        elif isinstance(module, nn.Linear):
            yield path + "/kernel", pick(module.weight).T, None
        else:
            yield path + "/kernel", pick(module.values), module


def expected(key: str, layer) -> torch.Tensor:
    reference = golden(key)
    return reference if layer is None else reference.T.flatten()[layer.active.long()]


def networks(agent: sac.Agent) -> list[tuple[str, nn.Module]]:
    return [("actor", agent.actor), ("critic", agent.critic), ("target", agent.target_critic)]


def check(case, step, agent):
    worst_parameter = worst_gradient = 0.0
    for name, network in networks(agent):
        for path, ours, layer in tensors(name, network, gradients=False):
            difference = (
                (ours - expected(f"{case}/step{step}/after/{name}/{path}", layer)).abs().max()
            )
            worst_parameter = max(worst_parameter, float(difference))
        if name == "target":
            continue
        for path, ours, layer in tensors(name, network, gradients=True):
            reference = expected(f"{case}/step{step}/grad/{name}/{path}", layer)
            relative = (ours - reference).abs().max() / reference.abs().max().clamp(min=1e-12)
            worst_gradient = max(worst_gradient, float(relative))
    return worst_parameter, worst_gradient


@pytest.mark.parametrize(
    "case,kernel", [("pert_dense", "auto"), ("pert_sp80", "packed"), ("pert_sp80", "dense")]
)
def test_three_updates_equal_the_official_code(case, kernel):
    args = sac.Args(width_scale=0.125, weight_decay=1e-2)
    agent = sac.Agent(args, 5, 2, CPU)
    agent.critic.encoders[0] = sac.simba(7, 32, 2)
    agent.target_critic.encoders[0] = sac.simba(7, 32, 2)
    for name, network in networks(agent):
        if name != "actor":
            network.heads[0] = sac.init_linear(32, 1)
        install(case, name, network, kernel)
    agent.target_critic.requires_grad_(False)
    with torch.no_grad():
        agent.temperature["log_alpha"].copy_(golden(f"{case}/init/temp/log_temp"))
    for part in ("actor", "critic"):
        optimizer = torch.optim.AdamW(
            getattr(agent, part).parameters(), 1e-4, weight_decay=1e-2, fused=True
        )
        setattr(agent, part + "_optimizer", optimizer)

    for step in range(3):
        raw = {
            name: golden(f"batch{step}/{name}")
            for name in ("observation", "action", "reward", "next_observation")
        }
        batch = sac.Batch(*raw.values(), golden(f"batch{step}/terminated"))
        noise, next_noise = (
            golden(f"{case}/step{step}/{name}") for name in ("eps_actor", "eps_target")
        )
        losses = sac.update(agent, batch, noise, next_noise, gamma=0.99, tau=0.005)
        info = {
            name: float(golden(f"{case}/step{step}/info/{name}"))
            for name in ("actor_loss", "critic_loss")
        }
        assert float(losses["actor_loss"]) == pytest.approx(info["actor_loss"], abs=1e-6, rel=2e-6)
        assert float(losses["critic_loss"]) == pytest.approx(
            info["critic_loss"], abs=1e-6, rel=2e-6
        )
        entropy = float(golden(f"{case}/step{step}/info/entropy"))
        assert float(losses["entropy"]) == pytest.approx(entropy, abs=2e-6)
        log_alpha = float(golden(f"{case}/step{step}/after/temp/log_temp"))
        assert agent.temperature["log_alpha"].item() == pytest.approx(log_alpha, abs=1e-6)
        parameter, gradient = check(case, step, agent)
        assert parameter < 1e-6 and gradient < 1e-4
