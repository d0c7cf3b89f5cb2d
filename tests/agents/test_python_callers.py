"""train() called from Python: in a loop, from a thread, with values of NumPy, after a failure."""

import signal
from concurrent.futures import ThreadPoolExecutor

import gymnasium as gym
import numpy as np
import pytest
import sac_simba_sparse as sac
import torch
from conftest import only_run

FLAGS = {
    "env_id": "Pendulum-v1",
    "action_repeat": 1,
    "max_episode_steps": 20,
    "width_scale": 0.0625,
    "threads": 1,
    "total_timesteps": 60,
    "learning_starts": 50,
    "batch_size": 4,
    "eval_interval": 60,
    "eval_episodes": 1,
    "final_eval_episodes": 1,
    "diagnostics_interval": 0,
}


class Broken(gym.Env):
    """Its reward is not a number while it is broken."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))
    broken = True

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), np.nan if self.broken else 0.0, False, False, {}


gym.register("tests/Broken-v0", Broken)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_values_of_numpy(tmp_path):
    """Checkpoints are read without code, so they must hold none of NumPy's classes."""
    values = {"sparsity": np.float64(0.5), "seed": np.int64(3), "clipped_double_q": np.bool_(True)}
    values["learning_starts"] = np.int64(0)  # the first update is after the first decision
    sac.train(sac.Args(**FLAGS | values, exp_name=np.str_("named")))
    folder = only_run(tmp_path / "runs")
    flags = FLAGS | {"sparsity": 0.5, "seed": 3, "clipped_double_q": True, "learning_starts": 0}
    plain = sac.Args(**flags, exp_name="named")
    assert sac.run_folder(plain).name == folder.name
    policy, env = sac.load_policy(folder)
    assert env.action_space.contains(policy(env.reset(seed=1)[0]))


def test_a_loop_goes_on_behind_a_finished_run(tmp_path, capsys):
    sac.train(sac.Args(**FLAGS, seed=1))
    assert "evaluate it:   python" in (out := capsys.readouterr().out)
    assert "sac_simba_sparse.py --eval-only --run-dir runs/" in out
    for seed in (1, 2):
        sac.train(sac.Args(**FLAGS, seed=seed))
    assert capsys.readouterr().out.count("this run is finished") == 1
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_from_a_thread(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(sac.train, sac.Args(**FLAGS)).result()
    assert "final/return_mean" in (only_run(tmp_path / "runs") / "metrics.csv").read_text()


def test_a_caller_gets_back_what_was_his():
    def mine(*_):
        """What signals do."""

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, mine) for number in numbers]
    torch.set_num_threads(2)
    try:
        sac.train(sac.Args(**FLAGS))
        assert all(signal.getsignal(number) is mine for number in numbers)
        assert torch.get_num_threads() == 2
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def test_a_run_that_failed_can_go_on_in_the_same_process(tmp_path, monkeypatch):
    """Even while its traceback, and with it all that it had open, is kept."""
    args = sac.Args(**FLAGS | {"env_id": "tests/Broken-v0"})
    with pytest.raises(SystemExit, match="3") as kept:
        sac.train(args)
    monkeypatch.setattr(Broken, "broken", False)
    sac.train(args)
    assert "final/return_mean" in (only_run(tmp_path / "runs") / "metrics.csv").read_text()
    assert kept.value.code == 3


def test_threads_are_those_that_are_asked_for():
    before = torch.get_num_threads()
    sac.choose_device(sac.Args(threads=before + 1, device="cpu"))
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)
