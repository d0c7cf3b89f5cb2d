"""What several test files need: paths, programs and what they leave, agents, hand-made runs."""

import csv
import gc
import hashlib
import io
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import gymnasium as gym
import numba
import numpy as np
import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
AGENTS = ROOT / "sparse_zoo"
ANALYSIS = AGENTS / "analysis"
BENCH = AGENTS / "bench"
DATA = ROOT / "tests" / "data"
CPU = torch.device("cpu")
FIGURES = [f"fig{number}" for number in range(1, 19)]  # of the paper, as targets of benchmark.sh
Ended = tuple[int, str, str]  # exit code, stdout and stderr of a program


@pytest.fixture(autouse=True)
def renderer():
    """Agents choose MuJoCo's renderer for their process, which here goes on with the next test."""
    before = os.environ.get("MUJOCO_GL")
    yield
    os.environ.pop("MUJOCO_GL", None)
    if before is not None:
        os.environ["MUJOCO_GL"] = before


# Programs


@pytest.fixture
def main(monkeypatch, capsys, tmp_path):
    """Runs a program in this process, in an empty folder: exit code, stdout and stderr.

    A process of its own would need seconds to load its packages.
    """
    monkeypatch.setenv("MUJOCO_GL", "disabled")
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(program: Path | str, *arguments, stdin: str = "") -> Ended:
        monkeypatch.setattr(sys, "argv", [str(program), *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            runpy.run_path(str(program), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        finally:  # what the end of a process does
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for lock in [item for item in gc.get_objects() if type(item) is FileLock]:
                lock.release(force=True)
        return code, *capsys.readouterr()

    return run


# Processes are forked from one that has loaded the large packages, which takes most of the time
# of a short run. Not dm_control: it chooses its renderer when it is loaded.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    [
        "gymnasium.wrappers",
        "imageio",
        "matplotlib.backends.backend_agg",
        "numba",
        "pandas",
        "pytest",
        "scipy.stats",
        "torch._dynamo",  # which the first optimiser would load
        "torch.utils.tensorboard",
        "tyro",
    ]
)


def become(program: Path, arguments: list[str], environment: dict, folder: Path, output: Path):
    """In a new process: what `python PROGRAM ARGUMENTS` does in a folder."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_CREAT | os.O_WRONLY), number)
    sys.argv = [str(program), *arguments]
    installed = (Path(sys.prefix), Path(sys.base_prefix))  # no folders of this project, or of tests
    kept = [path for path in sys.path if any(map(Path(path).is_relative_to, installed))]
    sys.path = [str(program.parent), *kept]
    runpy.run_path(str(program), run_name="__main__")


class Process:
    """A program in a process of its own."""

    def __init__(self, program: Path, *arguments, folder: Path | None = None, **environment):
        self.output = tempfile.TemporaryDirectory()
        what = (program, [*map(str, arguments)], os.environ | environment)
        where = (folder or Path.cwd(), Path(self.output.name))
        self.process = FORK.Process(target=become, args=what + where)
        self.process.start()

    def running(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL

    def finish(self) -> Ended:
        self.process.join()
        texts = [Path(self.output.name, name).read_text() for name in ("stdout", "stderr")]
        return self.process.exitcode, *texts


def call(*command, **how) -> Ended:
    """What a command did, in a process that is not forked from ours."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **how)
    return done.returncode, done.stdout, done.stderr


def environment(**more: str) -> dict[str, str]:
    """That of benchmark.sh, whose own variables are not inherited."""
    own = ("RUNS", "RESULTS", "THREADS", "FLAGS", "ONLY", "MAX_ARRAY", "SBATCH_OPTIONS")
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    return {**inherited, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **more}


def succeed(ended: Ended) -> str:
    """What a program said that ended well."""
    code, out, error = ended
    assert code == 0, error
    return out


def check_error(ended: Ended, *words: str, code: int = 2) -> None:
    """Bad input ends a program with exit code 2 and one line that names what was wrong."""
    exit_code, _, error = ended
    assert exit_code == code, error
    assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1, error
    assert all(word in error for word in words), error


# Run folders


def only_run(runs: Path) -> Path:
    (run_dir,) = runs.iterdir()
    return run_dir


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder; not the lock, and who holds it."""
    paths = (path for path in folder.rglob("*") if path.name not in (".lock", ".owner"))
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in paths
    }


def rewrite_checkpoint(run_dir: Path, **changes) -> None:
    """Changes entries of a checkpoint, which keeps its digest behind it."""
    file = io.BytesIO()
    torch.save(load_checkpoint(run_dir) | changes, file)
    digest = hashlib.sha256(file.getvalue()).digest()
    (run_dir / "checkpoint.pt").write_bytes(file.getvalue() + digest)


def read_metrics(run_dir: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, but for those of wall-clock time."""
    with open(run_dir / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if not row["metric"].startswith("time/")]


def load_checkpoint(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def metric_values(rows: list[dict[str, str]], metric: str) -> list[float]:
    return [float(row["value"]) for row in rows if row["metric"] == metric]


def write_metrics(folder: Path, *rows: tuple[int, str, float]) -> Path:
    """metrics.csv of rows (env_step, metric, value), and its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{step},{step // 2},{step},{metric},{value!r}\n" for step, metric, value in rows]
    header = "env_step,agent_step,update_step,metric,value\n"
    (folder / "metrics.csv").write_text(header + "".join(lines))
    return folder


def write_run(folder: Path, flags: dict, rows: list[tuple[int, str, float]], **record) -> Path:
    """What the tools read of a run."""
    write_metrics(folder, *rows)
    (folder / "args.json").write_text(json.dumps({"args": flags, **record}))
    return folder


# Agents


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks lose more by waiting for a second thread than they gain."""
    torch.set_num_threads(1)
    numba.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def count_parameters(*networks) -> int:
    return sum(part.numel() for network in networks for part in network.parameters())


def count_weights(rows: list[dict]) -> tuple[int, int]:
    """All weights in the rows of a layer table, and the active ones, as Run.count_weights."""
    return sum(row["total"] for row in rows), sum(row["active"] for row in rows)


BY_KERNEL = pytest.mark.parametrize("kernel", ["packed", "dense"])


def make_agent(module, obs_dim: int = 5, action_dim: int = 2, **flags):
    """A small agent with a replay of vectors."""
    args = module.Args(**{"width_scale": 0.125, **flags})
    torch.manual_seed(args.seed)
    return module.Agent(args, obs_dim, action_dim, CPU)


def make_batch(module, size: int = 16, obs_dim: int = 5, action_dim: int = 2, seed: int = 0):
    """A batch, every fourth transition terminated, and the two noises of an update."""
    generator = torch.Generator().manual_seed(seed)
    widths = (obs_dim, action_dim, obs_dim, action_dim, action_dim)
    obs, action, next_obs, noise, next_noise = (
        torch.randn(size, width, generator=generator) for width in widths
    )
    reward = torch.randn(size, generator=generator)
    terminated = (torch.arange(size) % 4 == 0).float()
    return module.Batch(obs, action.tanh(), reward, next_obs, terminated), noise, next_noise


def check_optimizer(optimizer, network, weight_decay: float = 1e-2) -> None:
    """AdamW as in the papers, over all of a network."""
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    expected = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay}
    assert {name: group[name] for name in expected} == expected
    assert [*map(id, group["params"])] == [*map(id, network.parameters())]


def assert_all_equal(ours, expected) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


def check_returns(result: dict[str, float], returns: list[float]) -> None:
    """An evaluation of four episodes."""
    middle = sorted(returns)[1:3]
    assert result["return_mean"] == pytest.approx(np.mean(returns), rel=1e-12)
    assert result["return_std"] == pytest.approx(np.std(returns), rel=1e-9)
    assert result["return_iqm"] == pytest.approx(np.mean(middle), rel=1e-12)
    assert np.ptp(returns) > 0


@pytest.fixture
def train(main, tmp_path):
    """Trains from the command line: how it ended, checkpoint and rows of metrics.csv."""

    def run(agent, arguments: str) -> tuple[Ended, dict, list[dict[str, str]]]:
        ended = main(agent.__file__, *arguments.split(), "--runs-dir", "runs")
        run_dir = only_run(tmp_path / "runs")
        return ended, load_checkpoint(run_dir), read_metrics(run_dir)

    return run


def dense_weight(layer, values: torch.Tensor | None = None) -> torch.Tensor:
    """The matrix (or kernel) that a sparse layer stands for, with some other values on request."""
    values = layer.values.detach() if values is None else values
    flat = torch.zeros(int(np.prod(layer.shape)), dtype=values.dtype)
    flat[layer.active.long()] = values
    return flat.view(layer.shape)


class Corridor(gym.Env):
    """Every second episode terminates with its third step, the others are cut off at the fifth."""

    observation_space = gym.spaces.Box(-9, 9, (2,))
    action_space = gym.spaces.Box(-0.5, 0.25, (1,))

    def __init__(self, render_mode=None, width=84, height=84):
        self.render_mode = render_mode
        self.episode = -1

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        self.steps = 0
        return self.observe(), {}

    def observe(self) -> np.ndarray:
        self.picture = self.np_random.integers(0, 256, (84, 84, 3), np.uint8)
        return np.array([self.steps, self.np_random.normal()], np.float32)

    def render(self):
        return self.picture

    def step(self, action):
        assert -0.5 <= action[0] <= 0.25
        self.steps += 1
        over = self.episode % 2 == 1 and self.steps == 3
        return self.observe(), self.steps + float(action[0]), over, False, {}


@pytest.fixture
def corridor():
    gym.register("Corridor-v0", Corridor, max_episode_steps=5)
    yield
    del gym.registry["Corridor-v0"]
