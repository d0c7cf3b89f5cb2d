"""Six updates in a row against golden numbers of the original code.

4 inputs, 8 hidden units, 2 actions.
"""

import numpy as np
import pytest
import stream_ac_sparse as stream
import torch
import torch.nn as nn
from conftest import DATA

GOLDEN = np.load(DATA / "stream_tiny.npz")
NAMES = {
    "actor": ("fc_layer", "hidden_layer", "linear_mu", "linear_std"),
    "critic": ("fc_layer", "hidden_layer", "linear_layer"),
}
GRADIENTS = 4e-6  # float32, through two LayerNorms


def make_agent(kernel: str) -> tuple[stream.Agent, stream.Args]:
    flags = {
        name: float(GOLDEN[name])
        for name in ("gamma", "lr", "kappa_policy", "kappa_value", "entropy_coeff")
    }
    # The weights are replaced by those of the original
    args = stream.Args(sparse_kernel=kernel, width_scale=8 / 128, init="lecun")
    assert list(flags.values()) == [
        *(
            args.gamma,
            args.learning_rate,
            args.actor_kappa,
            args.critic_kappa,
            args.entropy_coefficient,
        )
    ]
    assert args.trace_lambda == GOLDEN["lamda"]
    return stream.Agent(args, 3, 2), args  # the fourth input is the time


def parameters(agent: stream.Agent, network: str):
    """The golden file's names of a network's parameters, and ours."""
    mlp = getattr(agent, network).mlp
    linears = [module for module in mlp.modules() if isinstance(module, nn.Linear)]
    for layer, linear in zip(NAMES[network], linears, strict=True):
        yield f"{layer}.weight", linear.weight
        yield f"{layer}.bias", linear.bias


def check(actual, key: str, tolerance: float = 1e-6) -> None:
    """Within some tolerance, times the largest number where that is above 1."""
    expected = GOLDEN[key]
    assert np.shape(actual) == expected.shape, key
    assert np.abs(np.asarray(actual) - expected).max() <= tolerance * max(
        1, np.abs(expected).max()
    ), key


@pytest.mark.parametrize("kernel", ["auto", "dense"])
def test_six_updates_equal_the_original_code(kernel):
    agent, args = make_agent(kernel)
    probe, _ = make_agent(kernel)
    for network in NAMES:
        for name, parameter in parameters(agent, network):
            parameter.data.copy_(torch.from_numpy(GOLDEN[f"{network}/init/{name}"]))

    def traces_before_the_reset(clear: bool) -> None:
        """Lets the probe learn from the agent's state, without an episode's end."""
        for network in NAMES:
            ours, theirs = getattr(agent, network), getattr(probe, network)
            theirs.weights[:], theirs.traces[:] = ours.weights, 0 if clear else ours.traces
        output = probe.actor(transition.state)
        stream.update(probe, transition, output, False, args)

    for t in range(6):
        state, action, next_state = (GOLDEN[name][t] for name in ("s", "a", "s_prime"))
        done = bool(GOLDEN["done"][t])
        transition = stream.Transition(
            state, action, float(GOLDEN["r"][t]), next_state, terminal=done
        )
        for kind in ("grad", "trace"):
            traces_before_the_reset(clear=kind == "grad")
            for network in NAMES:
                for name, parameter in parameters(probe, network):
                    check(parameter.grad, f"t{t}/{network}/{kind}/{name}", GRADIENTS)
        for network in NAMES:
            check(np.abs(getattr(probe, network).traces).sum(), f"t{t}/{network}/z_sum")

        mean, output = stream.act(agent, state)
        check(mean, f"t{t}/mu")
        check(stream.act(agent, state, np.ones(2))[0] - mean, f"t{t}/std")
        check(agent.critic(state), f"t{t}/v_s")
        check(agent.critic(next_state), f"t{t}/v_sprime")
        delta, *steps = stream.update(agent, transition, output, done, args)
        for network, step in zip(NAMES, steps, strict=True):
            check(delta, f"t{t}/{network}/delta")
            assert step == pytest.approx(float(GOLDEN[f"t{t}/{network}/step_size"]), rel=1e-6)
            for name, parameter in parameters(agent, network):
                check(parameter.detach(), f"t{t}/{network}/weight/{name}")
                check(parameter.grad, f"t{t}/{network}/trace_after/{name}", GRADIENTS)
    assert GOLDEN["done"].tolist() == [False, False, True, False, False, False]
