"""Evaluation returns over training, task by task, beside published curves, and as one small file.

    python sparse_zoo/analysis/learning_curves.py --runs-dir runs
    python sparse_zoo/analysis/learning_curves.py --earlier returns.csv.gz --output results/both

Every run of the folder is drawn as a thin line, unfinished ones as far as they came, and beside
them those of earlier calls. The thick line of several seeds is their mean, the band reaches from
the lowest to the highest. The published curves (mean and one standard deviation over seeds, dense
networks) are those of the repositories of SimBa (SonyResearch/simba, Apache-2.0) and DrQ-v2
(facebookresearch/drqv2, MIT), in docs/results. Atari games show the scores of random play and of
humans (atari26_scores.csv) where they are in the picture.
"""

import math
from dataclasses import dataclass

import runs
import pandas as pd
import plots
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FLAGS = [
    "exp_name",
    "env_id",
    "width_scale",
    "depth_scale",
    "sparsity",
    "actor_sparsity",
    "critic_sparsity",
    "seed",
]
COLUMNS = ["run", *FLAGS, "env_step", "metric", "value"]


@dataclass
class Args:
    runs_dir: str = "runs"
    """folder that holds one folder per run"""
    earlier: tuple[str, ...] = ()
    """returns.csv.gz files that earlier calls left, whose runs are drawn as well"""
    output: str = "results/learning_curves"
    """folder of the figure and the numbers"""


def load(runs_dir: str, earlier: tuple[str, ...] = ()) -> pd.DataFrame:
    """A row for each return: run, FLAGS, env_step, metric (eval/, final/, episode/), value."""
    finite = ("width_scale", "sparsity", "seed", "env_step")
    earlier_tables = [runs.read_table(path, COLUMNS, "--earlier", finite) for path in earlier]
    tables = []
    found, left_out = runs.load_runs(runs_dir, needed=(), unfinished=True)
    for run in found:
        returns = run.metrics[run.metrics.metric.str.contains("/return")]
        if returns.empty:
            left_out.append(f"{run.name}: no returns yet")
        else:
            flags = {name: run.flags.get(name) for name in FLAGS}
            tables.append(returns.assign(run=run.name, **flags)[COLUMNS])
    runs.print_left_out(left_out)
    if not tables + earlier_tables:
        runs.fail(f"no run in {runs_dir}")
    return runs.merge(tables + earlier_tables, ["run"])


def atari_scores(env_id: str) -> dict[str, float]:
    """Scores of random and human play, {} for what is not one of the 26 games of Atari-100k."""
    scores = plots.read_atari_scores()
    game = plots.game_name(env_id)
    return scores.loc[game].to_dict() if game in scores.index else {}


def name_sizes(panel: pd.DataFrame) -> pd.Series:
    """What tells networks of one critic sparsity apart, of each row.

    That is width and depth, if the networks of a panel differ in it, and another sparsity of the
    actor.
    """
    names = pd.Series("", index=panel.index)
    for flag in ("width_scale", "depth_scale"):
        values = panel[flag].astype(float)
        if values.nunique(dropna=False) > 1:
            given = values.map(lambda value, flag=flag: f", {flag.replace('_', ' ')} {value:g}")
            names += given.where(values.notna(), "")
    actors = panel.actor_sparsity.map(", actor sparsity {:g}".format)
    return names + actors.where(panel.actor_sparsity != panel.sparsity, "")


def draw_network(ax: Axes, network: pd.DataFrame, label: str, style: dict) -> None:
    """The runs of one network; their mean and band if they differ in their seeds only."""
    curves = network.pivot(index="env_step", columns="run", values="value")
    count = curves.shape[1]
    flags = network.run.str.replace(r"__s(eed)?\d+$", "", regex=True)  # their hash is in the name
    if count == 1:
        label += f", one seed ({network.seed.iloc[0]})"
        style |= {"marker": "o", "mfc": "white", "ms": 3.5}
    elif count > network.seed.nunique() or flags.nunique() > 1:
        label += f", {count} runs"
    else:
        label += f", {count} seeds"
        plots.draw_range(ax, curves.dropna(), **style, lw=2)
        style |= {"lw": 0.7, "alpha": 0.6}
    for run in curves:
        curve = curves[run].dropna()
        ax.plot(curve.index, curve, **style)
    ax.plot([], [], **style | {"alpha": 1, "lw": 1.8}, label=label)


def draw_panel(ax: Axes, panel: pd.DataFrame) -> None:
    """The published curve and our runs of one algorithm and task."""
    algorithm = runs.algorithm_name(panel.exp_name.iloc[0])
    env_id = panel.env_id.iloc[0]
    published = plots.published_curve(algorithm, env_id)
    published = published[published.env_step <= panel.env_step.max()]
    if len(published):
        label = "published, dense, width 1 (mean, standard deviation)"
        values = (published.env_step, published["mean"], published["std"])
        ax.errorbar(*values, **plots.PUBLISHED, capsize=3, label=label)
    panel = panel[panel.metric == "eval/return_mean"]
    sizes = plots.line_styles(panel["size"].unique())
    for (sparsity, size), network in panel.groupby(["sparsity", "size"], sort=False):
        style = {"color": plots.sparsity_colour(sparsity), "ls": sizes[size]}
        draw_network(ax, network, plots.sparsity_name(sparsity) + size, style)
    for play, score in atari_scores(env_id).items():
        if play == "random" or panel.value.min() <= score <= panel.value.max():
            ax.axhline(
                score, color="0.4", ls=":" if play == "random" else "--", label=f"{play} play"
            )
    ax.set(title=f"{algorithm}, {plots.task_name(env_id)}", ylabel="evaluation return")
    plots.label_env_steps(ax)
    several = panel.seed.nunique() > 1
    ax.legend(
        title="several seeds: mean (thick), lowest to highest" if several else "",
        title_fontsize=8,
        fontsize=8,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
    )


def draw(returns: pd.DataFrame) -> Figure:
    """One panel per algorithm and task."""
    actor, critic = (
        returns[name].astype(float).fillna(returns.sparsity)
        for name in ("actor_sparsity", "critic_sparsity")
    )
    returns = returns.assign(sparsity=critic, actor_sparsity=actor)
    panels = returns.sort_values(["width_scale", "sparsity"], kind="stable")
    panels = [panel for _, panel in panels.groupby(["exp_name", "env_id"])]
    columns = min(3, len(panels))
    figure, axes = plots.make_grid(math.ceil(len(panels) / columns), columns, 4.2, 4.4)
    for ax, panel in zip(axes.flat, panels):
        draw_panel(ax, panel.assign(size=name_sizes(panel)))
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    return figure


def main(args: Args) -> None:
    returns = load(args.runs_dir, args.earlier)
    with runs.new_files(args.output) as output:
        returns.to_csv(output / "returns.csv.gz", index=False, compression=runs.GZIP)
        plots.save(draw(returns), output, "learning_curves")
    last = returns[returns.metric.isin(["eval/return_mean", runs.FINAL])].groupby("run").tail(1)
    shown = ["exp_name", "env_id", "sparsity", "seed", "env_step", "metric", "value"]
    print(last[shown].to_string(index=False))
    print(f"figure and returns are in {args.output}")


if __name__ == "__main__":
    runs.start(main, Args)
