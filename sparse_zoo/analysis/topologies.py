"""Static sparsity beside topologies that change, and beside dense networks of as many weights.

    ./benchmark.sh extra-dynamic --scale cpu
    python sparse_zoo/analysis/topologies.py --runs-dir runs --output results/topologies

Reads finished runs of sac_simba_sparse.py and sac_simba_dynamic.py; every other one is named, with
the reason. The size of a network is its number of active weights at the end of training. The cost
of a run is the arithmetic of its matrix products over active weights: 8 operations a transition for
each weight of the actor and 12 for each of the critic (as in bench/bench_update.py), with the mean
number of weights over the updates (magnitude pruning begins dense). Not in it: changes of the
topology (bench/bench_topology.py), acting and simulation. Seeds are averaged; bars are
plots.mean_interval's, from the lowest to the highest of up to three seeds.
"""

import math
from dataclasses import dataclass

import runs
import numpy as np
import pandas as pd
import plots
from runs import fail
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

AGENTS = ("sac_simba_sparse", "sac_simba_dynamic")
# In the order of tables and legends
COLOURS = {
    "dense": plots.DENSE,
    "static": "#1f77b4",
    "set": "#2ca02c",
    "rigl": "#d62728",
    "magnitude": "#9467bd",
}
NAMES = {"set": "SET", "rigl": "RigL", "magnitude": "magnitude pruning"}
NETWORK = ["env_id", "width_scale", "depth_scale", "sparsity", "topology"]
MEASURED = ["return", "active_weights", "tflop", "steps_per_second", "ever_active", "first_overlap"]
SCHEDULE = ("topology_interval", "prune_start", "prune_end")  # of magnitude pruning
COLUMNS = ["run", *NETWORK, "seed", "env_steps", *MEASURED]
# Flags that may differ between runs of one figure; what is drawn has names of its own
FREE = [*NETWORK, "actor_sparsity", "critic_sparsity", *runs.MEASURING]


@dataclass
class Args:
    runs_dir: str = "runs"
    """folder that holds one folder per run"""
    earlier: tuple[str, ...] = ()
    """topologies_runs.csv files that earlier calls left, whose runs are drawn as well"""
    output: str = "results/topologies"
    """folder of the figure and the numbers"""


def name_topology(flags: dict) -> str:
    """dense, static, set, rigl or magnitude."""
    if max(runs.network_sparsities(flags)) == 0:
        return "dense"
    return flags.get("topology", "static")


def measurement(run: runs.Run, metric: str) -> np.ndarray:
    """The values of a metric in their order; none for runs that do not log it."""
    return run.metrics.value[run.metrics.metric == metric].to_numpy()


def mean_share(flags: dict) -> float:
    """What magnitude pruning has yet to remove, of all that it will, averaged over the updates.

    1 before it begins, 0 after its end. As sac_simba_dynamic.count_changes; resets are not in it.
    """
    decisions = math.ceil(flags["total_timesteps"] / flags["action_repeat"])
    first = max(math.ceil(flags["learning_starts"] / flags["action_repeat"]), 1)
    per_decision, interval = flags["updates_per_step"], flags["topology_interval"]
    decision = np.arange(first, decisions)
    updates = (decision - first + 1) * per_decision
    done = (decision + 1) / decisions - flags["prune_start"]
    left = (1 - np.clip(done / (flags["prune_end"] - flags["prune_start"]), 0, 1)) ** 3
    after = np.where(updates % interval < per_decision, left, 1.0)  # 1: nothing changes here
    share = np.minimum.accumulate(np.concatenate([[1.0], after]))[:-1]  # changes follow updates
    return float(share.mean()) if len(share) else 1.0


def count_active(run: runs.Run) -> tuple[int, dict[str, float]]:
    """All active weights at the end of training, and the mean over the updates by network."""
    _, active = run.count_weights()  # raises UnusableError without layer tables
    if not {"actor", "critic"} <= run.layers.keys():
        raise runs.UnusableError("args.json has no layer tables of actor and critic")
    share = 0.0
    if name_topology(run.flags) == "magnitude":
        if not all(runs.fits(run.flags.get(name), runs.NUMBER) for name in SCHEDULE):
            raise runs.UnusableError(f"args.json: {' or '.join(SCHEDULE)} missing or unusable")
        share = mean_share(run.flags)
    mean = {}
    for network, rows in run.layers.items():
        at_the_end, dense = (sum(row[name] for row in rows) for name in ("active", "total"))
        mean[network] = at_the_end + share * (dense - at_the_end)
    return active, mean


def describe(run: runs.Run) -> dict:
    """COLUMNS of a run."""
    flags = run.flags
    actor, critic = runs.network_sparsities(flags)
    if actor != critic:
        raise runs.UnusableError(f"actor sparsity {actor:g} is not that of the critic, {critic:g}")
    active, mean = count_active(run)
    decisions = max(0, flags["total_timesteps"] - flags["learning_starts"]) / flags["action_repeat"]
    operations = 8 * mean["actor"] + 12 * mean["critic"]
    operations *= flags["batch_size"] * decisions * flags["updates_per_step"]
    speeds = measurement(run, "time/env_steps_per_second")
    last = {
        name: measurement(run, f"diagnostics/critic_{name}")[-1:]
        for name in ("ever_active", "first_overlap")
    }
    return {
        "run": run.name,
        **{name: flags[name] for name in ("env_id", "width_scale", "depth_scale", "seed")},
        "sparsity": critic,
        "topology": name_topology(flags),
        "env_steps": flags["total_timesteps"],
        "return": run.final_return,
        "active_weights": active,
        "tflop": operations / 1e12,
        "steps_per_second": np.median(speeds) if len(speeds) else np.nan,
        **{name: value[0] if len(value) else np.nan for name, value in last.items()},
    }


def load(runs_dir: str, earlier: tuple[str, ...] = ()) -> pd.DataFrame:
    """COLUMNS of every finished run and of the tables `earlier`."""
    needed = ("total_timesteps", "depth_scale", "learning_starts", "action_repeat")
    needed += ("batch_size", "updates_per_step")
    found, left_out = runs.load_runs(runs_dir, None, needed)
    rows = []
    used = []
    for run in found:
        try:
            if run.flags["exp_name"] not in AGENTS:
                raise runs.UnusableError(f"a run of {run.flags['exp_name']}")
            rows.append(describe(run))
            used.append(run)
        except runs.UnusableError as reason:
            left_out.append(f"{run.name}: {reason}")
    runs.fail_if_mixed(used, FREE, across_agents=True)
    tables = [runs.read_table(path, COLUMNS, "--earlier") for path in earlier]
    table = runs.merge([pd.DataFrame(rows, columns=COLUMNS), *tables], ["run"])
    if table.empty:
        runs.print_left_out(left_out)
        fail(f"no finished run of {' or '.join(AGENTS)} in {runs_dir}")
    runs.fail_if_lengths_differ(table.env_steps, table.env_id)
    table, twice = runs.drop_twice(table, NETWORK)
    runs.print_left_out(left_out + twice)
    return table


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each network: seeds, mean return with its interval, means of the rest."""
    order = table.topology.map(list(COLOURS).index)
    table = table.assign(order=order).sort_values(["env_id", "active_weights", "order"])
    rows = []
    for key, group in table.groupby(NETWORK, sort=False):
        returns = group["return"].to_numpy(float)
        low, high = plots.mean_interval(returns)
        row = dict(zip(NETWORK, key)) | {"seeds": len(group), "return": returns.mean()}
        row |= {"low": low, "high": high}
        row |= {name: group[name].mean() for name in MEASURED[1:]}
        rows.append(row | {"values": " ".join(f"{value:.0f}" for value in returns)})
    return pd.DataFrame(rows)


def draw_lines(ax: Axes, summary: pd.DataFrame, column: str) -> None:
    """A column against size, a line for each topology."""
    summary = summary.sort_values("topology", key=lambda names: names.map(list(COLOURS).index))
    summary = summary.assign(place=plots.move_apart(summary.active_weights))
    for topology, colour in COLOURS.items():
        line = summary[summary.topology == topology].sort_values("active_weights")
        points = line.assign(middle=line[column])
        if column != "return":
            points = points.assign(low=line[column], high=line[column])
        if len(line):
            plots.draw_points(ax, line.place, points, colour)
    plots.label_apart(ax, summary.active_weights, summary.place, "active weights")


def draw(summary: pd.DataFrame) -> Figure:
    """Return and cost against size, a row for each task."""
    tasks = sorted(summary.env_id.unique())
    figure, axes = plots.make_grid(len(tasks), 2, 4, 3.1)
    for (left, right), task in zip(axes, tasks):
        own = summary[summary.env_id == task]
        draw_lines(left, own, "return")
        draw_lines(right, own, "tflop")
        right.set_yscale("log")
        left.set(title=plots.task_name(task), ylabel="return")
        right.set(title="cost", ylabel="TFLOP of a run")
    handles = [
        Line2D([], [], color=colour, marker="o", ms=5, label=NAMES.get(topology, topology))
        for topology, colour in COLOURS.items()
        if topology in set(summary.topology)
    ]
    if (summary.seeds == 1).any():
        handles.append(plots.one_seed_handle())
    title = f"mean; bars: {plots.describe_interval(*summary.seeds)}"
    plots.add_legend(figure, handles, title)
    return figure


def make_table(summary: pd.DataFrame) -> str:
    """The summary as a Markdown table."""
    header = ["task", "width scale", "topology", "active weights", "return", "of each seed"]
    header += ["TFLOP", "env steps per second", "places ever active", "of the first mask"]
    rows = []
    for row in summary.to_dict("records"):
        interval = f" [{row['low']:.0f}, {row['high']:.0f}]" if row["seeds"] > 1 else ""
        shares = [row[name] for name in ("ever_active", "first_overlap")]
        rows.append(
            [
                plots.task_name(row["env_id"]),
                f"{row['width_scale']:g}",
                NAMES.get(row["topology"], row["topology"]),
                f"{row['active_weights']:,.0f}",
                f"{row['return']:.0f}{interval}",
                row["values"],
                f"{row['tflop']:.3g}",
                "" if np.isnan(row["steps_per_second"]) else f"{row['steps_per_second']:.0f}",
                *("" if np.isnan(share) else f"{100 * share:.0f} %" for share in shares),
            ]
        )
    return plots.markdown_table(header, rows)


def main(args: Args) -> None:
    table = load(args.runs_dir, args.earlier)
    summary = summarise(table)
    text = make_table(summary)
    with runs.new_files(args.output) as output:
        table.to_csv(output / "topologies_runs.csv", index=False, float_format="%.6g")
        summary.to_csv(output / "topologies.csv", index=False, float_format="%.6g")
        (output / "topologies.md").write_text(text)
        plots.save(draw(summary), output, "topologies")
    print(text, end="")
    print(f"topologies.png, .svg, .md, .csv and topologies_runs.csv are in {args.output}")


if __name__ == "__main__":
    runs.start(main, Args)
