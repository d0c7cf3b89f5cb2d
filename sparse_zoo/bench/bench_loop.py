"""Env steps per second of a whole training loop of SAC or DDPG, and where each millisecond goes.

    python sparse_zoo/bench/bench_loop.py --width-scale 1 --sparsity 0.9
    python sparse_zoo/bench/bench_loop.py --device cuda --no-overlap

The agent's own `train` runs, with a stopwatch around its parts, in a folder that is deleted at the
end. It is timed from the --warm-up-th decision that learns; evaluations, diagnostics and
checkpoints come before and after. On CUDA the clock is the wall's, on a CPU the process's CPU time,
for other programs do not count in it. Parts:

    act      the normalised observation, the row to the GPU, the action; on CUDA this is where
             Python waits for the updates of the decision before
    env      the environment's step, and its reset
    learn    drawing rows and noise, and the updates; on CUDA only until they are launched
    log      what is written at the end of an episode, and the checks for values that are not finite
    rest     observation statistics, replay, the loop itself
"""

import contextlib
import io
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import timing
import devices
from timing import plots, runs

PARTS = ("act", "env", "learn", "log", "rest")


@dataclass
class Args:
    agent: Literal["sac", "ddpg"] = "sac"
    """whose loop"""
    env_id: str = "dm_control/humanoid-run-v0"
    """which task"""
    width_scale: runs.Width = 1.0
    """width of both networks"""
    sparsity: runs.Sparsity = 0.9
    """sparsity of both networks"""
    batch_size: runs.Count = 256
    """transitions per update"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the networks live"""
    threads: runs.Threads = 1
    """CPU threads"""
    matmul_precision: Literal["high", "highest"] = "high"
    """matrix products on CUDA: TF32, or float32"""
    cuda_graph: bool = True
    """on CUDA, the updates of a decision as one graph"""
    overlap: bool = True
    """update before the environment steps"""
    warm_up: Annotated[int, "10 <= x <= 10**6"] = 50
    """decisions that learn before the clock starts"""
    decisions: runs.Count = 500
    """decisions that are timed"""


class Stopwatch:
    """Adds up the seconds of each part; those of a part within a part count for the inner one."""

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.running = ["rest"]
        self.restart()

    def restart(self) -> None:
        self.spent = Counter()
        self.last = self.clock()

    def count(self) -> None:
        """Gives the time since the last count to the part that runs."""
        now = self.clock()
        self.spent[self.running[-1]] += now - self.last
        self.last = now

    def timed(self, part: str, function: Callable) -> Callable:
        """The function, its time counted as that of a part."""

        def run(*args, **named):
            self.count()
            self.running.append(part)
            try:
                return function(*args, **named)
            finally:
                self.count()
                self.running.pop()

        return run


def make_flags(module, args: Args, folder: str):
    """A run that learns after 100 decisions, and is measured and saved only at its ends."""
    repeat = module.Args.action_repeat
    decisions = 100 + args.warm_up + args.decisions
    never = 10**9
    return module.Args(
        env_id=args.env_id,
        width_scale=args.width_scale,
        sparsity=args.sparsity,
        batch_size=args.batch_size,
        device=args.device,
        threads=args.threads,
        matmul_precision=args.matmul_precision,
        cuda_graph=args.cuda_graph,
        overlap=args.overlap,
        runs_dir=folder,
        total_timesteps=decisions * repeat,
        learning_starts=100 * repeat,
        eval_interval=never,
        diagnostics_interval=never,
        checkpoint_interval=never,
        eval_episodes=1,
        final_eval_episodes=1,
    )


def measure(args: Args) -> dict[str, float]:
    """Seconds of each part over all timed decisions."""
    module = timing.import_agent(f"{args.agent}_simba_sparse")
    device = devices.choose(args.device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    watch = Stopwatch(clock)
    first = 100 + args.warm_up
    found = {}

    class TimedLearner(module.Learner):
        def __init__(self, *settings, **named):
            super().__init__(*settings, **named)
            self.update_all = watch.timed("learn", self.update_all)

        act = watch.timed("act", module.Learner.act)
        draw_updates = watch.timed("learn", module.Learner.draw_updates)

    class TimedRun(module.Run):
        log_episode = watch.timed("log", module.Run.log_episode)

        def count_decision(self) -> None:
            super().count_decision()
            if self.agent_step == first:
                devices.wait(device)
                watch.restart()
            elif self.agent_step == first + args.decisions:
                devices.wait(device)
                watch.count()
                found.update(watch.spent)

    make_plain_env = module.make_env

    def make_env(*settings):
        env = make_plain_env(*settings)
        env.step = watch.timed("env", env.step)
        env.reset = watch.timed("env", env.reset)
        return env

    check = watch.timed("log", module.stop_unless_finite)
    said = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        timing.replaced(
            module, Learner=TimedLearner, Run=TimedRun, make_env=make_env, stop_unless_finite=check
        ),
    ):
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                module.train(make_flags(module, args, folder))
        except SystemExit as end:
            print(said.getvalue().strip().splitlines()[-1], file=sys.stderr)
            raise SystemExit(end.code) from None
    return {part: found.get(part, 0.0) for part in PARTS}


def steps_per_second(args: Args, spent: dict[str, float]) -> float:
    """Env steps per second of the timed decisions."""
    module = timing.import_agent(f"{args.agent}_simba_sparse")
    return args.decisions * module.Args.action_repeat / sum(spent.values())


def main(args: Args) -> None:
    spent = measure(args)
    seconds = sum(spent.values())
    speed = steps_per_second(args, spent)
    size = f"width scale {args.width_scale:g}, sparsity {args.sparsity:g}"
    print(f"{args.agent}, {args.env_id}, {size}, {args.device}: {speed:.1f} env steps per second")
    rows = [
        [part, f"{1000 * spent[part] / args.decisions:.3f}", f"{spent[part] / seconds:.1%}"]
        for part in PARTS
    ]
    rows.append(["all", f"{1000 * seconds / args.decisions:.3f}", ""])
    print(plots.markdown_table(["part", "ms a decision", "share"], rows), end="")


if __name__ == "__main__":
    runs.start(main, Args)
