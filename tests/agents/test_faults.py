"""What goes wrong in environments, files and disks: one line, the right exit code, nothing lost."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import der_impala_sparse as der
import gymnasium as gym
import imageio
import numpy as np
import pytest
import sac_simba_sparse as sac
import torch
from conftest import (
    AGENTS,
    CPU,
    Ended,
    Process,
    check_error,
    metric_values,
    only_run,
    read_metrics,
    succeed,
)

WEIRD = '''
import os
import gymnasium as gym
import numpy as np
import torch


class Weird(gym.Env):
    """Twenty steps; FAULT happens once, with the 30th step of the process."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(np.array([0.1, -3.0]), np.array([0.7, 0.3]), dtype=np.float64)
    steps = 0

    def __init__(self):
        self.fault = os.environ.get("FAULT", "")
        if self.fault == "exits at once":
            raise SystemExit

    def observe(self):
        return self.np_random.normal(size=3)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        assert seed is None or seed < 2**31
        self.left = 20
        return self.observe() if self.fault == "old reset" else (self.observe(), {})

    def step(self, action):
        assert self.action_space.contains(action), action
        self.left -= 1
        self.steps += 1
        obs, reward, over = self.observe(), -float(np.square(action).sum()), self.left == 0
        if self.fault == "four values":
            return obs, reward, over, {}
        if self.steps == 30:
            if self.fault == "raises":
                raise RuntimeError("the robot fell\\nand cannot get up")
            if self.fault == "exits":
                raise SystemExit
            obs[1] = {"nan": np.nan, "inf": np.inf, "huge": 1e39}.get(self.fault, obs[1])
            obs = obs[:2] if self.fault == "shape" else obs
            rewards = {"nan reward": np.nan, "inf reward": -np.inf, "two rewards": np.zeros(2)}
            rewards |= {"huge reward": 1e39, "endless reward": 10**400}
            reward = rewards.get(self.fault, reward)
            tensor = torch.ones(3, requires_grad=True)
            reward = tensor if self.fault == "tensor reward" else reward
            obs = tensor if self.fault == "tensor" else obs
            obs = obs.astype(np.longdouble) if self.fault == "long" else obs
            over = None if self.fault == "no flag" else over
        return obs, reward, False, over, None if self.fault == "no info" else {}


class Integers(Weird):
    action_space = gym.spaces.Box(0, 10, (2,), np.int64)


class Locked(Weird):
    action_space = gym.spaces.Box(np.array([-1, 0.5]), np.array([1, 0.5]), dtype=np.float64)


class Bytes(Weird):
    observation_space = gym.spaces.Box(0, 255, (3,), np.uint8)

    def observe(self):
        return self.np_random.integers(0, 256, 3) + 0.5 * (self.steps == 30)


class NoActions(Weird):
    action_space = gym.spaces.Box(-1, 1, (0,), np.float64)


class NoObservations(Weird):
    observation_space = gym.spaces.Box(-1, 1, (0,), np.float64)


class NoParts(Weird):
    observation_space = gym.spaces.Dict({})


class NoActionSpace(Weird):
    action_space = property(lambda self: self.nothing)


class NoObservationSpace(Weird):
    observation_space = property(lambda self: self.nothing)


class Half(Weird):
    """Of float16, which holds less than the float32 of its observations."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float16)

    def observe(self):
        return np.float32(self.np_random.normal(size=3) + 1e5 * (self.steps == 30))


class Wide(Weird):
    """The range of actions is beyond the largest number."""

    action_space = gym.spaces.Box(-1.7e308, 1.7e308, (2,), np.float64)

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step(action / 1e308)


class SameInfo(Weird):
    info = {"episode": "mine"}

    def reset(self, **how):
        return super().reset(**how)[0], self.info

    def step(self, action):
        return *super().step(action)[:4], self.info


class Drawn(Weird):
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        if self.fault == "broken pencil" and self.steps > 10:
            raise RuntimeError("the pencil broke")
        return None if self.fault == "no picture" else np.zeros((9, 9, 3), np.uint8)


for kind in list(globals().values()):
    if isinstance(kind, type) and issubclass(kind, Weird):
        gym.register(f"{kind.__name__}-v0", entry_point=kind)
'''
FLAGS = (
    "--threads 1 --width-scale 0.0625 --total-timesteps 80 --learning-starts 50 --eval-episodes 1"
    " --final-eval-episodes 1 --checkpoint-interval 20 --env-id weird:Weird-v0"
)
AGENT_FLAGS = {
    "sac_simba_sparse": f"{FLAGS} --batch-size 8 --action-repeat 1 --device cpu",
    "ddpg_simba_sparse": f"{FLAGS} --batch-size 8 --action-repeat 1 --device cpu",
    "stream_ac_sparse": f"{FLAGS} --init lecun --diagnostics-interval 0",
}


@pytest.fixture
def run(tmp_path, main, monkeypatch):
    """Runs an agent in this environment, found from the working directory."""
    (tmp_path / "weird.py").write_text(WEIRD)

    def run(agent: str, *flags: str, fault: str = "") -> Ended:
        """Exit code, stdout and the errors on stderr, without the progress bar."""
        monkeypatch.setenv("FAULT", fault)
        sys.modules.pop("weird", None)
        code, out, err = main(AGENTS / f"{agent}.py", *AGENT_FLAGS[agent].split(), *flags)
        lines = [line for line in err.splitlines(True) if line.startswith("error")]
        return code, out, "".join(lines)

    return run


FAULTS = {
    "nan": (3, "observation not finite (env step 30)"),
    "inf": (3, "observation not finite (env step 30)"),
    "huge": (3, "observation not finite as float32 (env step 30)"),
    "nan reward": (3, "the reward nan (env step 30)"),
    "inf reward": (3, "the reward -inf (env step 30)"),
    "huge reward": (3, "the reward 1e+39 (env step 30)"),
    "endless reward": (2, "a reward that is not one number (env step 30)"),
    "two rewards": (2, "a reward that is not one number (env step 30)"),
    "tensor reward": (2, "a reward that is not one number (env step 30)"),
    "tensor": (2, "an observation that is no array (env step 30)"),
    "long": (2, "type float128 declared shape (3,) (env step 30)"),
    "shape": (2, "shape (2,) declared shape (3,) (env step 30)"),
    "no flag": (2, "None terminated truncated True or False"),
    "raises": (2, "step at env step 30: RuntimeError: the robot fell traceback.txt"),
    "exits": (2, "step at env step 30: it ended the program"),
    "exits at once": (2, "Weird-v0: it ended the program"),
    "four values": (2, "4 values from step; Gymnasium 1.x"),
    "old reset": (2, "ndarray from reset; Gymnasium 1.x"),
    "no info": (2, "NoneType as info dict (env step 1)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_environments_from_elsewhere(run, tmp_path, fault):
    exit_code, words = FAULTS[fault]
    check_error(run("sac_simba_sparse", fault=fault), *words.split(), code=exit_code)
    if fault == "raises":
        assert "RuntimeError" in next(tmp_path.glob("runs/*/traceback.txt")).read_text()


@pytest.mark.parametrize("agent", AGENT_FLAGS)
def test_a_value_that_is_not_finite_ruins_no_run(run, tmp_path, agent):
    """The last checkpoint is a good one: a healthy restart equals a run without the fault."""
    check_error(run(agent, fault="nan"), "env step 30", code=3)
    succeed(run(agent))
    succeed(run(agent, "--runs-dir", "whole"))
    rows = read_metrics(only_run(tmp_path / "runs"))
    assert rows == read_metrics(only_run(tmp_path / "whole"))


def test_integer_actions_are_refused(run):
    ended = run("sac_simba_sparse", "--env-id", "weird:Integers-v0")
    check_error(ended, "int64", "real numbers")


def test_actions_that_cannot_be_chosen_are_refused(run):
    check_error(run("sac_simba_sparse", "--env-id", "weird:Locked-v0"), "each low below high")


def test_observations_that_change_with_their_declared_type_are_refused(run):
    ended = run("sac_simba_sparse", "--env-id", "weird:Bytes-v0")
    check_error(ended, "does not fit its declared type, uint8 (env step 30)")


def test_observations_that_overflow_their_declared_type_are_refused(run):
    ended = run("sac_simba_sparse", "--env-id", "weird:Half-v0")
    check_error(ended, "not finite as float16 (env step 30)", code=3)


@pytest.mark.parametrize("agent", ["sac_simba_sparse", "stream_ac_sparse"])
@pytest.mark.parametrize(
    "kind,words",
    [
        ("NoActions", "a bounded Box of one dimension, of real numbers (at least one)"),
        ("NoObservations", "has observations Box no numbers"),
        ("NoParts", "has observations Dict() no numbers"),
        ("NoActionSpace", "AttributeError traceback.txt"),
        ("NoObservationSpace", "AttributeError traceback.txt"),
    ],
)
def test_spaces_of_nothing_are_refused(run, agent, kind, words):
    check_error(run(agent, "--env-id", f"weird:{kind}-v0"), *words.split())


def test_random_actions_too_large_to_learn_from(run):
    ended = run("stream_ac_sparse", "--env-id", "weird:Wide-v0")
    check_error(ended, "not finite", "last checkpoint is kept", code=3)


def test_an_info_that_is_always_the_same_and_has_an_episode(run, tmp_path):
    succeed(run("sac_simba_sparse", "--env-id", "weird:SameInfo-v0"))
    rows = read_metrics(only_run(tmp_path / "runs"))
    assert metric_values(rows, "episode/length") == [20] * 4


def test_what_cannot_be_filmed_fails_before_training_or_costs_none(run, tmp_path):
    film = ("--env-id", "weird:Drawn-v0", "--capture-video")
    check_error(run("sac_simba_sparse", *film, fault="no picture"), "--capture-video", "picture")
    assert not (tmp_path / "runs").exists()
    ended = run("sac_simba_sparse", *film, fault="broken pencil")
    check_error(ended, "render at env step", "the pencil broke")
    assert "going on from env step 80" in succeed(run("sac_simba_sparse", *film[:2]))


def test_max_episode_steps(run, tmp_path):
    succeed(run("sac_simba_sparse", "--max-episode-steps", "7"))
    rows = read_metrics(only_run(tmp_path / "runs"))
    assert set(metric_values(rows, "episode/length")) == {7}


def test_an_episode_without_end(monkeypatch, capsys):
    monkeypatch.setattr(sac.Gate, "LONGEST", 50)
    env = sac.make_env(sac.Args(env_id="dm_control/lqr-lqr_2_1-v0"))
    env.reset(seed=1)
    with pytest.raises(SystemExit, match="2"):
        for _ in range(30):  # decisions of 2 steps
            env.step(np.zeros(1))
    check_error((2, *capsys.readouterr()), "lasted 50 steps", "--max-episode-steps")


def test_an_environment_says_itself_how_long_its_episodes_can_be():
    pendulum = "gymnasium.envs.classic_control:PendulumEnv"
    gym.register("tests/Long-v0", pendulum, max_episode_steps=150_000)
    for env_id, longest in (("tests/Long-v0", 150_000), ("Pendulum-v1", 100_000)):
        env = sac.make_env(sac.Args(env_id=env_id))
        assert env.get_wrapper_attr("longest") == longest
    env = der.make_env(der.Args(env_id="ALE/Pong-v5", action_repeat=1))
    assert env.get_wrapper_attr("longest") == 108_000  # ALE's


@pytest.mark.parametrize(
    "error,reason",
    [
        (MemoryError(), "MemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "DefaultCPUAllocator"),
        (torch.OutOfMemoryError("CUDA out of memory.\nOf the allocated memory"), "CUDA"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"), "CUDA error"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_..._DEVICE_ALLOCATION_FAILED"), "cuDNN error"),
    ],
)
def test_memory_that_runs_out(error, reason, capsys):
    def train(args):
        raise error

    with pytest.raises(SystemExit, match="2"):
        sac.one_line_errors(train)(None)
    check_error((2, *capsys.readouterr()), f"out of memory ({reason}", "lower --width-scale")


def test_memory_that_runs_out_is_no_fault_of_the_checkpoint():
    def load_state_dict(state):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    run = SimpleNamespace(checkpoint={"actor": {}}, folder="runs/x")
    with pytest.raises(torch.OutOfMemoryError):
        sac.Run.load(run, {"actor": SimpleNamespace(load_state_dict=load_state_dict)})


def test_memory_that_runs_out_is_no_fault_of_the_networks_to_start_from(monkeypatch):
    def read_checkpoint(path):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(sac, "read_checkpoint", read_checkpoint)
    run = SimpleNamespace(args=sac.Args(init_from="runs/x"), folder="runs/y")
    with pytest.raises(torch.OutOfMemoryError):
        sac.Run.start_from_networks(run, {})


def test_other_errors_about_memory_keep_their_traceback():
    def train(args):
        torch.zeros(1).expand(2).add_(1)

    with pytest.raises(RuntimeError, match="single memory location"):
        sac.one_line_errors(train)(None)
    assert not sac.is_out_of_memory(RuntimeError("assert failed at CUDACachingAllocator.cpp:1"))


def test_ctrl_c_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    write = sac.DigestedFile.write
    for writes in range(12):
        left = iter(range(writes))

        def interrupted(file, data, left=left):
            if next(left, None) is None:
                sys.exit(1)
            return write(file, data)

        monkeypatch.setattr(sac.DigestedFile, "write", interrupted)
        with pytest.raises(SystemExit, match="1"):
            sac.one_line_errors(lambda args: sac.save_checkpoint(tmp_path, args, {}))(sac.Args())
        assert list(tmp_path.iterdir()) == []


def damage(metrics: Path, checkpoint: Path, how: str) -> None:
    if how == "crlf":
        metrics.write_bytes(metrics.read_bytes().replace(b"\n", b"\r\n"))
    elif how == "rows twice":
        first, *rows = metrics.read_bytes().splitlines(keepends=True)
        metrics.write_bytes(first + b"".join(row + row for row in rows))
    elif how == "gone":
        metrics.unlink()
    else:
        data = bytearray(checkpoint.read_bytes())
        data[len(data) // 3] ^= 1
        checkpoint.write_bytes(data)


@pytest.mark.parametrize(
    "how,words",
    [
        ("crlf", "metrics.csv not what was written before the checkpoint --no-resume"),
        ("rows twice", "metrics.csv not what was written before the checkpoint --no-resume"),
        ("gone", "metrics.csv not what was written before the checkpoint --no-resume"),
        ("a bit", "checkpoint.pt checksum is wrong"),
    ],
)
def test_files_that_changed(run, tmp_path, how, words):
    check_error(run("sac_simba_sparse", fault="raises"))  # leaves an unfinished run
    run_dir = only_run(tmp_path / "runs")
    damage(run_dir / "metrics.csv", run_dir / "checkpoint.pt", how)
    before = {path.name: path.read_bytes() for path in run_dir.glob("[!.]*")}
    check_error(run("sac_simba_sparse"), *words.split())
    assert {path.name: path.read_bytes() for path in run_dir.glob("[!.]*")} == before


def load_as(name: str, path: Path):
    """An agent's file as a module of some name, and one update of it with packed layers."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    agent = module.Agent(
        module.Args(width_scale=0.0625, sparsity=0.5, sparse_kernel="packed"), 3, 2, CPU
    )
    obs = torch.zeros(4, 3)
    batch = module.Batch(obs, torch.zeros(4, 2), torch.zeros(4), obs, torch.zeros(4))
    module.update(agent, batch, *torch.zeros(2, 4, 2), 0.99, 0.005)
    del sys.modules[name]


def test_compiled_code_of_another_name_or_damaged_is_compiled_again(tmp_path, one_thread):
    path = Path(shutil.copy(sac.__file__, tmp_path))
    load_as("first", path)
    load_as("second", path)
    index = sorted((tmp_path / "__pycache__").glob("*.nbi"))
    assert len(index) == 2
    for file in index:
        file.write_bytes(b"")
    load_as("third", path)
    assert all(file.stat().st_size > 0 for file in index)


def test_compiled_code_that_finds_no_room_is_not_kept(tmp_path, one_thread):
    path = Path(shutil.copy(sac.__file__, tmp_path))
    cache = tmp_path / "__pycache__"
    cache.mkdir()
    if subprocess.run(f"mount -t tmpfs -o size=8k tmpfs {cache}", shell=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        load_as("full", path)
        assert sum(file.stat().st_size for file in cache.iterdir()) <= 8192
    finally:
        subprocess.run(["umount", cache], check=True)


def test_a_folder_and_a_home_that_cannot_be_written(tmp_path):
    if subprocess.run(f"mount -t tmpfs tmpfs {tmp_path}", shell=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        agent = Path(shutil.copy(sac.__file__, tmp_path))
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        ended = Process(agent, "--help", folder=tmp_path, HOME=str(tmp_path)).finish()
        assert "--sparsity" in succeed(ended) and not ended[2]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_checkpoint_that_cannot_be_created_says_why(tmp_path):
    """The disk has room, but not for one more file."""
    if subprocess.run(f"mount -t tmpfs -o nr_inodes=1 tmpfs {tmp_path}", shell=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        with pytest.raises(OSError, match="No space left"):
            sac.save_checkpoint(tmp_path, sac.Args(), {})
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_film_of_odd_sides_and_those_that_cannot_be_written(tmp_path, capsys):
    frames = [np.full((101, 103, 3), shade, np.uint8) for shade in (0, 90, 180)]
    sac.write_video(tmp_path / "films" / "a.mp4", frames)
    assert imageio.mimread(tmp_path / "films" / "a.mp4")[0].shape == (102, 104, 3)
    (tmp_path / "file").touch()
    sac.write_video(tmp_path / "file" / "a.mp4", frames)
    sac.write_video(tmp_path / "other" / "a.mp4", [frames[0], frames[1][:50]])
    sac.write_video(tmp_path / "other" / "a.mp4", [frame / 255 for frame in frames])
    assert not (tmp_path / "other").exists()
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 3
    assert all(line.startswith("warning: no film in") for line in warnings)
    assert all("of one size, and of type uint8" in line for line in warnings[1:])


def test_who_holds_a_run_is_said(run, tmp_path):
    check_error(run("sac_simba_sparse", fault="raises"))
    run_dir = only_run(tmp_path / "runs")
    with sac.FileLock(run_dir / ".lock"):
        check_error(run("sac_simba_sparse"), "process", " on ", "delete")
    (run_dir / ".owner").write_bytes(b"process 7 on \xff")  # of another machine's alphabet
    with sac.FileLock(run_dir / ".lock"):
        check_error(run("sac_simba_sparse"), "process 7 on", "delete")


def test_a_name_that_is_too_long(run):
    ended = run("sac_simba_sparse", "--exp-name", "x" * 300)
    check_error(ended, "too long", "--exp-name")


def test_a_run_without_an_update_says_so(run):
    words = "nothing was learned: training ended before the first update"
    assert words in succeed(run("sac_simba_sparse", "--learning-starts", "80"))
    assert words not in succeed(run("sac_simba_sparse"))


def test_what_nothing_is_left_of_cannot_learn(run):
    """SparseInit zeroes ceil(0.9 * 8) = 8 of the 8 weights behind 8 units."""
    check_error(run("stream_ac_sparse", "--init", "sparse_init"), "8 hidden units", "lecun")
    ten_units = ("--width-scale", "0.078125")
    succeed(run("stream_ac_sparse", "--init", "sparse_init", *ten_units))


def test_a_runs_folder_at_home(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    succeed(run("sac_simba_sparse", "--runs-dir", "~/x"))
    assert only_run(tmp_path / "home" / "x").is_dir() and not (tmp_path / "~").exists()


NO_FLOCK = """
import errno, fcntl

def flock(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")

fcntl.flock = flock
"""


@pytest.mark.parametrize(
    "moment, stop, flock",
    [
        ("imports", signal.SIGINT, True),
        ("imports", signal.SIGTERM, True),
        ("training", signal.SIGINT, True),
        ("training", signal.SIGTERM, True),
        ("training", signal.SIGTERM, False),
    ],
)
def test_an_interruption(tmp_path, moment, stop, flock):
    """Ctrl-C, and what Slurm sends: one line; another node can go on, without flock as well."""
    (tmp_path / "weird.py").write_text(WEIRD)
    (tmp_path / "sitecustomize.py").write_text("" if flock else NO_FLOCK)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    flags = [*AGENT_FLAGS["sac_simba_sparse"].split(), "--total-timesteps", "100000"]
    command = [sys.executable, AGENTS / "sac_simba_sparse.py", *flags]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text() or (
        moment == "training" and not list(tmp_path.glob("runs/*/checkpoint.pt"))
    ):
        assert process.poll() is None
        time.sleep(0.01)
    lock = "" if moment == "imports" else only_run(tmp_path / "runs") / ".lock"
    assert flock or lock.read_text(), "without flock, what is in the file is the lock"
    process.send_signal(stop)
    _, err = process.communicate()
    assert process.returncode == 1 and "Traceback" not in err, err
    assert any(line.startswith("interrupted") for line in re.split(r"[\n\r]", err)), err
    assert flock or not lock.exists()
