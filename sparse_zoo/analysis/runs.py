"""Folders of runs: their flags, their metrics, which are finished. All scripts read runs with it.

    python sparse_zoo/analysis/runs.py runs

prints a line for each run: task, agent, width, sparsity, seed, env steps, last return, state.
"""

import ast
import gzip
import importlib
import io
import json
import math
import os
import re
import signal
import sys
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NoReturn, get_type_hints

# Ctrl-C and SIGTERM end with one line, also while packages load: so this file is imported first
OWN = Path(sys.argv[0]).resolve().parent.name in ("analysis", "bench")
if OWN and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    interrupted = "interrupted; the same command starts again"
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(interrupted))

import pandas as pd
import tyro

AGENTS = Path(__file__).resolve().parents[1]
RESULTS = AGENTS.parent / "docs" / "results"
COSTS = RESULTS / "costs.csv"
sys.path.insert(0, str(AGENTS))  # for import_agent, in the scripts of bench/ too

ALGORITHMS = {
    "sac_simba_sparse": "SAC",
    "sac_simba_dynamic": "SAC with changing topology",
    "ddpg_simba_sparse": "DDPG",
    "drqv2_sparse": "DrQ-v2",
    "stream_ac_sparse": "Stream AC",
    "der_impala_sparse": "DER",
}
FINAL = "final/return_mean"
MEASURING = ["eval_interval", "eval_episodes", "diagnostics_interval"]  # change no training
NOT_RUNS = {"logs", "slurm"}  # folders that benchmark.sh makes beside the runs
UNREADABLE = (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError, zlib.error)
GZIP = {"method": "gzip", "mtime": 0}  # without the time: the same runs give the same file
NUMBER = (int, float)
KINDS = {
    "exp_name": str,
    "env_id": str,
    "seed": int,
    "width_scale": NUMBER,
    "depth_scale": NUMBER,
    "init": str,
    "sparsity": NUMBER,
    "total_timesteps": int,
    "actor_sparsity": NUMBER,
    "critic_sparsity": NUMBER,
    "reset_interval": int,
    "learning_starts": int,
    "action_repeat": int,
    "batch_size": int,
    "updates_per_step": int,
}
ALWAYS = ("env_id", "exp_name", "seed", "width_scale", "sparsity")

# Rules of flags that several scripts have: see check_flags
Count = Annotated[int, "1 <= x <= 10**6"]
Threads = Annotated[int | None, "1 <= x <= 1024"]
Width = Annotated[float, "1/128 <= x <= 1000"]
Sparsity = Annotated[float, "0 <= x < 1"]
Widths = Annotated[tuple[float, ...], "1/128 <= x <= 1000"]
Sparsities = Annotated[tuple[float, ...], "0 <= x < 1"]


class UnusableError(Exception):
    """Why a run cannot be used, in a few words."""


def fail(message: str, code: int = 2) -> NoReturn:
    """Ends the program with one line for a person (exit code 3: a value is not finite)."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


def start(main: Callable, kind: type) -> None:
    """Runs main with the flags of a script; whatever ends it is one line."""
    with suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of folders can be any bytes
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # what is missing or not finite is in the results
    try:
        args = parse_flags(kind)
        check_flags(args)
        main(args)
        sys.stdout.flush()
    except OSError as error:
        sys.stdout = None  # or Python tries again to write what it could not
        fail(f"{error}; mend that, then give the same command again")
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        fail(f"{type(error).__name__}: {error} (python -X dev {sys.argv[0]} ... shows where)")


def parse_flags(kind: type, args: list[str] | None = None):
    """The flags of a command line; what tyro cannot read is one line."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(kind, args=args)
    except SystemExit as end:
        if not end.code:  # --help
            raise
    lines = (line.strip("│ ") for line in said.getvalue().splitlines()[1:])  # in a box
    text = takewhile(lambda line: line[:1] not in "─╰", lines)
    fail(f"{' '.join(text)}; --help lists the flags")


def check_flags(args) -> None:
    """Ends the program if a flag breaks the rule that stands beside it in Args, or is empty.

    The rule of a flag of several values is that of each, and at least one is needed.
    """
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        flag = f"--{name.replace('_', '-')}"
        rules = [rule for rule in getattr(hint, "__metadata__", ()) if isinstance(rule, str)]
        values = value if isinstance(value, tuple) else (value,)
        if "" in values or (rules and not values):
            fail(f"{flag}: its value is empty")
        for x in values:
            for rule in rules if x is not None else ():
                if not eval(rule, {"x": x, "inf": math.inf}):
                    needed = re.sub(r"\bx\b", name, rule)
                    fail(f"{flag} {x} is not allowed: {needed}")


def make_folder(path: str | Path) -> Path:
    """The folder of --output; ends the program if it cannot be made."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write to {folder} ({error.strerror}); choose another folder with --output")
    return folder


@contextmanager
def new_files(path: str | Path) -> Iterator[Path]:
    """A new folder; at the end its files replace those of --output, or after a failure none."""
    folder = make_folder(path)
    with TemporaryDirectory(dir=folder, prefix=".new") as temporary:
        yield Path(temporary)
        for file in sorted(Path(temporary).iterdir()):
            os.replace(file, folder / file.name)


def read_table(
    path: str | Path, columns: list[str], flag: str, finite: tuple[str, ...] = ()
) -> pd.DataFrame:
    """Columns of a table that an earlier call left; ends the program if it cannot be used."""
    opened = gzip.open if str(path).endswith(".gz") else open
    try:
        with opened(Path(path).expanduser(), "rb") as file:
            data = file.read()
        if data and not data.endswith(b"\n"):
            raise ValueError("its last line is cut off")
        table = pd.read_csv(io.BytesIO(data), dtype={"run": str})[columns]
        for name in {"value", *finite} & set(columns):
            numbers = table[name].astype(float)
            if name in finite and not numbers.abs().lt(2**63).all():
                raise ValueError(f"column {name} has values that are not finite numbers")
    except UNREADABLE as error:
        fail(f"{flag} {path}: {error or type(error).__name__}; give a file of an earlier call")
    return table.drop_duplicates()


# Agents


def import_agent(name: str):
    """The module of an agent."""
    return importlib.import_module(name)


def set_threads(module, threads: int | None) -> None:
    """CPU threads of an agent's kernels and of PyTorch (None: all cores)."""
    threads = threads or module.torch.get_num_threads()
    module.numba.set_num_threads(min(threads, module.numba.config.NUMBA_NUM_THREADS))
    module.torch.set_num_threads(threads)  # after numba, whose start sets the number for both


@cache
def read_agents() -> dict[str, frozenset[str]]:
    """Of each agent, the flags that do not change results, read off its source."""
    agents = {}
    for path in sorted(AGENTS.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXECUTION_FLAGS":
                agents[path.stem] = frozenset(ast.literal_eval(node.value))
    return agents


def execution_flags(agent: str) -> frozenset[str]:
    """Flags that do not change results (of an unknown agent those that all agents share)."""
    agents = read_agents()
    return agents.get(agent) or frozenset.intersection(*agents.values())


def algorithm_name(agent: str) -> str:
    return ALGORITHMS.get(agent, agent)


def network_sparsities(flags: dict) -> tuple[float, float]:
    """Sparsity of the actor and of the critic."""
    own = [flags.get(name) for name in ("actor_sparsity", "critic_sparsity")]
    actor, critic = (flags["sparsity"] if value is None else value for value in own)
    return float(actor), float(critic)


# Runs


@dataclass
class Run:
    folder: Path
    flags: dict
    """all flags, by their names in Args"""
    layers: dict
    """layer tables of the networks"""
    metrics: pd.DataFrame
    """env_step, metric, value"""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def algorithm(self) -> str:
        return algorithm_name(self.flags["exp_name"])

    @property
    def state(self) -> str:
        return describe_state(self.metrics, self.flags.get("total_timesteps"))

    @property
    def final_return(self) -> float:
        """Mean return of the trained policy over the last evaluation."""
        return float(self.metrics.value[self.metrics.metric == FINAL].iloc[-1])

    def settings(self) -> dict:
        """The flags that change results."""
        execution = execution_flags(self.flags["exp_name"])
        return {name: value for name, value in self.flags.items() if name not in execution}

    def count_weights(self) -> tuple[int, int]:
        """Weights before pruning, and active ones, of all networks."""
        try:
            rows = [row for network in self.layers.values() for row in network]
            total, active = (sum(row[name] for row in rows) for name in ("total", "active"))
        except (AttributeError, KeyError, TypeError):
            total = active = None
        if not (fits(total, NUMBER) and fits(active, NUMBER)):
            raise UnusableError("args.json has no layer tables")
        return total, active


def read_metrics(folder: Path) -> pd.DataFrame:
    """env_step, metric and value of a run's metrics.csv, without a last line that is cut off."""
    kinds = {"env_step": float, "metric": str, "value": float}
    try:
        data = (folder / "metrics.csv").read_bytes()
        whole = io.BytesIO(data[: data.rfind(b"\n") + 1])
        metrics = pd.read_csv(whole, usecols=list(kinds), dtype=kinds)
        if not metrics.env_step.between(0, 2**53).all() or metrics.metric.isna().any():
            raise ValueError
        if metrics.duplicated(["env_step", "metric"]).any():
            raise UnusableError("metrics.csv has some measurements twice")
        return metrics.astype({"env_step": int})[list(kinds)]
    except OSError as error:
        raise UnusableError(f"metrics.csv: {error.strerror}") from None
    except ValueError as error:
        raise UnusableError(f"metrics.csv is damaged or empty ({type(error).__name__})") from None


def fits(value, kind: type | tuple) -> bool:
    """Whether a value of args.json is of a kind: numbers of 64 bits, text that can be printed."""
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    return value.isprintable() if isinstance(value, str) else -(2**63) <= value < 2**63


def describe_state(metrics: pd.DataFrame, total: int | None) -> str:
    """finished, or how far a run is. Finished is a run that has a final return at its length."""
    ends = metrics.env_step[metrics.metric == FINAL]
    if len(ends) and (total is None or ends.max() >= total):
        return "finished"
    reached = metrics.env_step.max() if len(metrics) else 0
    return f"at env step {reached:,}" + (f" of {total:,}" if total else "")


def load_run(folder: Path, needed: tuple[str, ...] = ()) -> Run:
    """A run, finished or not. Raises UnusableError if a file or one of the needed flags is bad."""
    if re.search(r"\.old\d+$", folder.name):
        raise UnusableError("moved aside by --no-resume")
    try:
        record = json.loads((folder / "args.json").read_text())
        flags = dict(record["args"])
    except OSError as error:
        raise UnusableError(f"args.json: {error.strerror}") from None
    except UNREADABLE as error:
        raise UnusableError(f"args.json is damaged ({type(error).__name__})") from None
    bad = []
    for name in {*ALWAYS, *needed} | (KINDS.keys() & flags.keys()):
        optional = name not in ALWAYS and name not in needed
        if not fits(flags.get(name), KINDS[name]) and not (optional and flags[name] is None):
            bad.append(name)
    if bad:
        raise UnusableError(f"args.json: {', '.join(sorted(bad))} missing or unusable")
    return Run(folder, flags, record.get("layers"), read_metrics(folder))


def load_runs(
    runs_dir: str | Path,
    exp_name: str | None = None,
    needed: tuple[str, ...] = ("total_timesteps", "depth_scale"),
    unfinished: bool = False,
) -> tuple[list[Run], list[str]]:
    """The finished runs of a folder (of one agent, if named), and a line for each other run.

    With `unfinished`, those that are not finished too.
    """
    runs = []
    left_out = []
    for folder in sorted(Path(runs_dir).expanduser().glob("[!.]*")):
        if not (folder.is_dir() or folder.is_symlink()) or folder.name in NOT_RUNS:
            continue
        try:
            run = load_run(folder, needed)
            if exp_name and run.flags["exp_name"] != exp_name:
                raise UnusableError(f"a run of {run.flags['exp_name']}")
            if not unfinished and run.state != "finished":
                raise UnusableError(f"unfinished, {run.state}")
            if not unfinished and not math.isfinite(run.final_return):
                raise UnusableError("its final return is not finite")
            runs.append(run)
        except UnusableError as reason:
            left_out.append(f"{folder.name}: {reason}")
    return runs, left_out


def drop_twice(table: pd.DataFrame, keys: list[str]) -> tuple[pd.DataFrame, list[str]]:
    """The rows of the first run of each combination of keys, and a line for each other run."""
    first = table.drop_duplicates("run")
    twice = first.run[first.duplicated([*keys, "seed"])]
    lines = [f"{name}: a second run of this network, task and seed" for name in twice]
    return table[~table.run.isin(twice)].reset_index(drop=True), lines


def merge(tables: list[pd.DataFrame], keys: list[str]) -> pd.DataFrame:
    """The tables one behind the other; a run, by keys, has the rows of the first table with it."""
    parts = [table.assign(part=part) for part, table in enumerate(tables) if len(table)]
    if not parts:
        return tables[0]
    table = pd.concat(parts, ignore_index=True)
    first = table.groupby(keys, dropna=False).part.transform("min")
    return table[table.part == first].drop(columns="part").reset_index(drop=True)


def fail_if_lengths_differ(env_steps: pd.Series, kinds: pd.Series) -> None:
    """Ends the program if runs of one kind have several lengths."""
    for kind, lengths in env_steps.groupby(kinds).unique().items():
        if len(lengths) > 1:
            steps = " and ".join(f"{int(length):,}" for length in sorted(lengths))
            fail(f"{kind} has runs of {steps} env steps; keep such apart")


def fail_if_mixed(runs: list[Run], free: list[str], across_agents: bool = False) -> None:
    """Ends the program if runs of one agent differ in flags that change results and are not free.

    A flag that a run does not have, since an older version made it, is None. Seeds are always free.
    With across_agents: also if runs of several agents differ in a flag that all of these have.
    """
    free = {*free, "seed", "mask_seed"}
    agents = defaultdict(list)
    for run in runs:
        agents[run.flags["exp_name"]].append(run)
    names = {agent: set().union(*(run.settings() for run in own)) for agent, own in agents.items()}
    if across_agents and len(agents) > 1:
        together = " and ".join(sorted(agents))
        names[together] = set.intersection(*names.values()) - {"exp_name"}
        agents[together] = runs
    for agent, own in sorted(agents.items()):
        for name in sorted(names[agent] - free):
            values = []  # 1 and 1.0 are one
            for run in own:
                if run.flags.get(name) not in values:
                    values.append(run.flags.get(name))
            if len(values) > 1:
                folder = runs[0].folder.parent
                flag = f"--{name.replace('_', '-')} {' and '.join(sorted(map(str, values)))}"
                fail(f"{folder} mixes runs of {agent} with {flag}; keep such runs apart")


def print_left_out(lines: list[str]) -> None:
    for line in lines:
        print(f"left out: {line}")


# Index


def describe_run(run: Run) -> dict:
    """What the index says of a run."""
    returns = run.metrics[run.metrics.metric.isin(["eval/return_mean", FINAL])].value
    actor, critic = network_sparsities(run.flags)
    return {
        "task": run.flags["env_id"],
        "agent": run.flags["exp_name"],
        "width": f"{run.flags['width_scale']:g}",
        "sparsity": f"{actor:g}" if actor == critic else f"{actor:g}/{critic:g}",
        "seed": run.flags["seed"],
        "env steps": f"{run.metrics.env_step.max():,}" if len(run.metrics) else 0,
        "last return": f"{returns.iloc[-1]:.1f}" if len(returns) else "none",
        "state": run.state,
    }


@dataclass
class Args:
    runs_dir: tyro.conf.Positional[str] = "runs"
    """folder that holds one folder per run"""


def main(args: Args) -> None:
    """A line for each run of a folder."""
    runs, left_out = load_runs(args.runs_dir, needed=(), unfinished=True)
    if not runs and not left_out:
        fail(f"no runs in {args.runs_dir}")
    if runs:
        print(pd.DataFrame([describe_run(run) for run in runs]).to_string(index=False))
    print_left_out(left_out)


if __name__ == "__main__":
    start(main, Args)
