"""Every flag of every agent with values that nobody means: one line or a run, no traceback."""

import dataclasses
import importlib
import signal
import traceback

import pytest
from conftest import AGENTS

BASE = {
    "width-scale": "0.0625",
    "total-timesteps": "100",
    "eval-episodes": "1",
    "final-eval-episodes": "1",
    "threads": "1",
    "max-episode-steps": "40",
}
MORE = {
    "sac_simba_sparse": {"env-id": "Pendulum-v1", "batch-size": "8", "learning-starts": "60"},
    "sac_simba_dynamic": {
        "env-id": "Pendulum-v1",
        "batch-size": "8",
        "learning-starts": "60",
        "sparsity": "0.5",
        "topology-interval": "5",
    },
    "ddpg_simba_sparse": {"env-id": "Pendulum-v1", "batch-size": "8", "learning-starts": "60"},
    "stream_ac_sparse": {"env-id": "Pendulum-v1", "learning-starts": "60"},
    "drqv2_sparse": {
        "env-id": "dm_control/cartpole-balance-v0",
        "batch-size": "2",
        "learning-starts": "60",
    },
    "der_impala_sparse": {"batch-size": "2", "learning-starts": "60"},
}
VALUES = ["nan", "inf", "-1", "0", "1" + "0" * 30, "", "yes", "0.5"]


class StillRunning(BaseException):
    """Nothing was wrong for some seconds."""


def stop(*_):
    raise StillRunning


@pytest.mark.slow
@pytest.mark.parametrize("agent", MORE)
def test_a_line_or_a_run(agent, main, monkeypatch, tmp_path):
    module = importlib.import_module(agent)
    monkeypatch.setenv("WANDB_MODE", "offline")
    ends = {}
    for field in dataclasses.fields(module.Args):
        flag = field.name.replace("_", "-")
        for number, value in enumerate(VALUES):
            flags = BASE | MORE[agent] | {"runs-dir": f"{flag}-{number}", flag: value}
            words = [word for pair in flags.items() for word in (f"--{pair[0]}", pair[1])]
            signal.signal(signal.SIGALRM, stop)
            signal.alarm(20)
            try:
                code, _, err = main(AGENTS / f"{agent}.py", *words)
                lines = [line for line in err.splitlines() if "error: " in line]
                by_tyro = "For full helptext" in err  # a value of the wrong type
                good = code in (0, 2, 3) and len(lines) == (code != 0 and not by_tyro)
                ends[flag, value] = "good" if good else f"exit code {code}: {err}"
            except StillRunning:
                ends[flag, value] = "good"
            except BaseException:
                ends[flag, value] = traceback.format_exc()
            finally:
                signal.alarm(0)
    assert len(ends) > 250
    bad = {key: end for key, end in ends.items() if end != "good"}
    assert not bad, "\n\n".join(f"{flag} {value!r}: {end}" for (flag, value), end in bad.items())
