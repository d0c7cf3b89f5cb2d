"""plan.py: a command's run folder, the state of a run, links for the figures, estimated time."""

import sys
from pathlib import Path

import der_impala_sparse as der
import drqv2_sparse as drq
import numpy as np
import pandas as pd
import pytest
import sac_simba_sparse as sac
import stream_ac_sparse as stream
from analysis import plan
from conftest import check_error, succeed, write_run

COMMAND = "python sparse_zoo/{}.py --env-id {} --width-scale 0.5 --sparsity 0.9 --seed {}"
COMMAND += " --runs-dir {} --threads 1"


@pytest.fixture
def run_plan(main):
    return lambda commands, *arguments: main(
        plan.__file__, *arguments, stdin="".join(f"{command}\n" for command in commands)
    )


@pytest.mark.parametrize("module,env_id", [(sac, "dm_control/humanoid-run-v0"), (stream, "Ant-v4")])
def test_the_folder_is_the_one_that_the_agent_opens(tmp_path, module, env_id):
    for seed in (1, 12):
        command = COMMAND.format(module.__name__, env_id, seed, tmp_path)
        run = plan.parse_command(command)
        args = module.Args(
            env_id=env_id,
            width_scale=0.5,
            sparsity=0.9,
            seed=seed,
            runs_dir=str(tmp_path),
            threads=1,
        )
        assert run.flags == args and run.command == command and run.agent == module.__name__
        assert module.run_folder(args) == run.folder


def write_rows(run: plan.Run, *rows: tuple[int, str, float]) -> None:
    """What a run has written so far."""
    write_run(run.folder, vars(run.flags), rows)


def test_state(tmp_path):
    run = plan.parse_command(COMMAND.format("sac_simba_sparse", "x/y-v0", 3, tmp_path))
    assert plan.find_state(run) == "absent"
    write_rows(run)
    assert plan.find_state(run) == "at env step 0 of 1,000,000"
    write_rows(run, (0, "eval/return_mean", 1.0), (12_000, "losses/alpha", 0.1))
    assert plan.find_state(run) == "at env step 12,000 of 1,000,000"
    write_rows(run, *((1_000_000, f"final/return_{name}", 0.1) for name in ("mean", "std")))
    assert plan.find_state(run) == "finished"
    (run.folder / "checkpoint.tmp").touch()  # killed while it wrote the last checkpoint
    assert plan.find_state(run) == "finished"
    # The same command went on for longer
    write_rows(run, (1_000_002, "final/return_mean", 0.1))
    assert plan.find_state(run) == "longer: at env step 1,000,002 of 1,000,000"
    (run.folder / "metrics.csv").write_bytes(b"\xff\n")
    assert plan.find_state(run).startswith("damaged: metrics.csv is damaged")
    (run.folder / "args.json").unlink()  # without which no figure has the run
    assert plan.find_state(run) == "damaged: args.json: No such file or directory"


def test_finished_runs_are_linked_and_the_others_named(tmp_path, run_plan):
    commands = [
        COMMAND.format("sac_simba_sparse", "x-v0", seed, tmp_path / "runs") for seed in (1, 2, 3)
    ]
    runs = [plan.parse_command(command) for command in commands]
    links = tmp_path / "links"
    lacking = f"none of these 3 runs is finished in {tmp_path / 'runs'}"
    check_error(
        run_plan(commands, "link", "--output", links), f"error: nothing to draw: {lacking}\n"
    )
    assert not links.exists()

    write_rows(runs[0], (1_000_000, "final/return_mean", 1.5))
    write_rows(runs[1], (5, "eval/return_mean", 1.5))
    links.mkdir()
    (links / "stale").symlink_to(tmp_path)
    out = succeed(run_plan(commands, "link", "--output", links))
    assert [path.name for path in links.iterdir()] == [runs[0].folder.name]
    assert "1.5" in (links / runs[0].folder.name / "metrics.csv").read_text()
    assert out.splitlines() == [
        f"missing: {runs[1].folder} is at env step 5 of 1,000,000",
        f"missing: {runs[2].folder} is absent",
        "1 of 3 runs are finished",
    ]
    code, out, err = run_plan(commands, "unfinished")
    assert code == 0 and out.splitlines() == commands[1:]
    assert err.startswith("3 runs, 1 of them finished; the rest takes about ")
    out = succeed(run_plan(commands, "status"))
    *lines, last = out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "finished",
        "at env step 5 of 1,000,000",
        "absent",
    ]
    assert last == "1 of 3 runs are finished"


@pytest.mark.parametrize(
    "command", ["python train.py --seed 1", "python sparse_zoo/sac_simba_sparse.py --env-id x"]
)
def test_no_command_of_an_agent(run_plan, command):
    code, out, err = run_plan([command], "status")
    assert (code, out) == (
        2,
        "",
    ) and err == f"error: not the command of an agent, with --seed: {command}\n"


def test_a_package_that_does_not_work(run_plan, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)  # upon which its import fails
    monkeypatch.delitem(sys.modules, "ddpg_simba_sparse", raising=False)
    ended = run_plan([COMMAND.format("ddpg_simba_sparse", "x-v0", 1, "runs")], "status")
    assert ended[1] == ""
    check_error(
        ended, "error: ddpg_simba_sparse cannot be imported (import of numba", "requirements"
    )


def test_core_hours():
    """Costs that follow the law: 10 + 150 width^2 dense, 10 + 400 active packed, 2 ms a frame."""
    rows = [
        ("update", 1, 0, 160),
        ("update", 2, 0, 610),
        ("update", 1, 0.9, 50),
        ("update", 2, 0.9, 170),
    ]
    costs = pd.DataFrame(rows, columns=["what", "width_scale", "sparsity", "ms"])
    costs = costs.assign(agent="sac_simba_sparse", depth_scale=1, batch_size=256)
    frame = {"agent": "sac_simba_sparse", "what": "frame", "env_id": "a", "ms": 2.0}
    costs = pd.concat(
        [costs, pd.DataFrame([frame, {**frame, "env_id": "b", "ms": 4.0}])], ignore_index=True
    )

    def hours(**flags) -> float:
        flags = {"env_id": "a", "total_timesteps": 110_000, "final_eval_episodes": 50, **flags}
        return plan.core_hours(plan.Run("", "sac_simba_sparse", sac.Args(**flags), Path()), costs)

    frames = 110_000 + 1000 * (50 + 12 * 10)  # 10,000 env steps are without updates
    for flags, updates, update_ms, frame_ms in (
        ({}, 100_000, 160, 2),
        ({"env_id": "b"}, 100_000, 160, 4),
        ({"env_id": "c"}, 100_000, 160, 3),
        ({"width_scale": 5, "sparsity": 0.9}, 100_000, 10 + 1000, 2),
        ({"width_scale": 5, "sparsity": 0.5}, 100_000, 10 + 150 * 25, 2),
        ({"depth_scale": 2, "batch_size": 128}, 100_000, 155, 2),
        ({"updates_per_step": 1, "action_repeat": 1}, 100_000, 160, 2),
        ({"learning_starts": 60_000}, 50_000, 160, 2),
        ({"critic_sparsity": 0.9}, 100_000, 0.033 * 160 + 0.967 * 50, 2),
        ({"sparsity": 0.9, "critic_sparsity": 0.0}, 100_000, 0.033 * 50 + 0.967 * 160, 2),
    ):
        expected = (updates * update_ms + frames * frame_ms) / 3.6e6
        assert hours(**flags) == pytest.approx(expected), flags
    assert np.isnan(plan.core_hours(plan.Run("", "new_agent", sac.Args(), Path()), costs))

    # DrQ-v2 learns after every second decision; a game of Atari has 6,000 frames
    law = {"width_scale": 1, "depth_scale": 1, "sparsity": 0, "batch_size": 32, "what": "update"}
    for agent, flags, updates, episode in (
        (drq, {"action_repeat": 2, "decisions_per_update": 2}, 10_000 / 2 / 2, 1000),
        (der, {"action_repeat": 4}, 10_000 / 4, 6000),
    ):
        name = agent.__name__
        costs = pd.DataFrame([{**law, "agent": name, "ms": 100}, {**frame, "agent": name}])
        flags |= {"env_id": "a", "total_timesteps": 12_000, "learning_starts": 2000}
        flags |= {"batch_size": 32, "eval_interval": 12_000, "eval_episodes": 1}
        run = plan.Run("", name, agent.Args(**flags, final_eval_episodes=3), Path())
        expected = (updates * 100 + (12_000 + 5 * episode) * 2) / 3.6e6
        assert plan.core_hours(run, costs) == pytest.approx(expected)


def test_a_changing_topology_costs_what_a_static_one_costs():
    costs = pd.read_csv(plan.COSTS)
    same = [
        plan.core_hours(plan.Run("", agent, sac.Args(), Path()), costs)
        for agent in ("sac_simba_sparse", "sac_simba_dynamic")
    ]
    assert same[0] == same[1]


def test_the_law_fits_what_was_measured():
    costs = pd.read_csv(plan.COSTS)
    assert costs.agent.nunique() == 5
    for agent, rows in costs[costs.what == "update"].groupby("agent"):
        law = plan.fit_updates(agent, rows)
        for row in rows.itertuples():
            predicted = law @ plan.multiplied(agent, row.width_scale, row.depth_scale, row.sparsity)
            assert predicted == pytest.approx(row.ms, rel=0.15), (agent, row)
