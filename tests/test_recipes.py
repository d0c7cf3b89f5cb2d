"""What docs/recipes.md shows, run as it stands there, with flags that make it short."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import ddpg_simba_sparse as ddpg
import der_impala_sparse as der
import drqv2_sparse as drq
import imageio
import numpy as np
import pytest
import sac_simba_dynamic as dynamic
import sac_simba_sparse as sac
import stream_ac_sparse as stream
import torch
from conftest import (
    AGENTS,
    ROOT,
    Process,
    check_error,
    contents,
    count_weights,
    load_checkpoint,
    metric_values,
    only_run,
    read_metrics,
    succeed,
)

SAC = AGENTS / "sac_simba_sparse.py"
PAGE = (ROOT / "docs" / "recipes.md").read_text()
SHORT = (
    "--width-scale 0.125 --device cpu --threads 1 --learning-starts 200 --batch-size 8"
    " --updates-per-step 1 --eval-episodes 1 --eval-interval 500"
)
CARTPOLE = (
    f"{SHORT} --env-id dm_control/cartpole-swingup-v0 --sparsity 0.8 --action-repeat 20"
    " --final-eval-episodes 2"
)


def blocks(section: str, language: str) -> list[str]:
    """The code of a recipe."""
    (text,) = re.findall(rf"^## {section}.*?\n(.+?)(?=^## |\Z)", PAGE, re.M | re.S)
    return re.findall(rf"```{language}\n(.+?)```", text, re.S)


def commands(section: str, run: Path | str = "") -> list[tuple[Path, list[str]]]:
    """The programs of a recipe, and their flags."""
    lines = "".join(blocks(section, "bash")).replace("$RUN", str(run)).splitlines()
    words = [shlex.split(line) for line in lines if line.startswith("python ")]
    return [(ROOT / script, flags) for _, script, *flags in words]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of 1000 env steps."""
    folder = tmp_path_factory.mktemp("trained")
    flags = f"{CARTPOLE} --total-timesteps 1000".split()
    succeed(Process(SAC, *flags, folder=folder, MUJOCO_GL="disabled").finish())
    return only_run(folder / "runs")


def roll_out(module, policy, env, run_dir: Path) -> list[float]:
    """Returns of the episodes of the last evaluation."""
    checkpoint = load_checkpoint(run_dir)
    key = (checkpoint["args"]["seed"], module.FINAL, checkpoint["counters"][0])
    returns = []
    for episode in range(checkpoint["args"]["final_eval_episodes"]):
        obs, _ = env.reset(seed=module.derive_seed(*key, episode))
        returns.append(0.0)
        over = False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(policy(obs))
            returns[-1] += reward
            over = terminated or truncated
    return returns


@pytest.mark.parametrize(
    "module,flags",
    [
        (sac, "--batch-size 4"),
        (dynamic, "--batch-size 4 --topology-interval 5"),
        (ddpg, "--batch-size 4"),
        (stream, ""),
        (drq, "--batch-size 2"),
        (der, "--env-id ALE/Pong-v5 --action-repeat 40 --eval-epsilon 0 --batch-size 2"),
    ],
)
@pytest.mark.usefixtures("corridor")
def test_the_policy_of_each_agent_acts_as_in_its_last_evaluation(train, tmp_path, module, flags):
    flags = f"--env-id Corridor-v0 --total-timesteps 100 --learning-starts 40 {flags}"
    flags += " --threads 1 --device auto --sparsity 0.5 --width-scale 0.125"
    flags += " --eval-episodes 1 --final-eval-episodes 2"
    _, _, rows = train(module, flags)
    run_dir = only_run(tmp_path / "runs")
    policy, env = module.load_policy(run_dir)
    env.reset()  # every second episode of Corridor is shorter, and there was an evaluation before
    returns = roll_out(module, policy, env, run_dir)
    assert metric_values(rows, "final/return_mean") == [np.mean(returns)]


def test_load_a_trained_policy_in_python(trained, tmp_path):
    """From another folder."""
    (code,) = blocks("Load a trained policy", "python")
    code = code.replace("$RUN", str(trained)).replace('"sparse_zoo"', repr(str(AGENTS)))
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(policy(obs))"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and re.fullmatch(r"\[-?[\d.e-]+\]\n", done.stdout), done.stderr


def test_evaluate_and_film_a_run_by_its_folder(trained, tmp_path):
    before = contents(trained)
    ((script, flags),) = commands("Evaluate and film", trained)
    out = succeed(Process(script, *flags, folder=tmp_path, MUJOCO_GL="egl").finish())
    (final,) = metric_values(read_metrics(trained), "final/return_mean")
    assert f"return_mean {final:.1f}" in out
    film = trained / "videos" / "eval_50.mp4"
    assert len(imageio.mimread(film, memtest=False)) == 50
    film.unlink()
    film.parent.rmdir()
    assert contents(trained) == before and contents(tmp_path) == {}


def test_flags_that_lead_to_no_run_name_the_nearest_one(trained, main):
    flags = [*CARTPOLE.split(), "--runs-dir", trained.parent, "--eval-only"]
    where = ("nothing to evaluate", f"{trained} has ", f"--run-dir {trained}")
    check_error(main(SAC, *flags, "--sparsity", "0.5"), *where, "--sparsity 0.8 (not 0.5);")
    by_folder = ["--eval-only", "--run-dir", trained]
    check_error(main(SAC, *by_folder, "--tau", "0.1"), "--tau 0.005, not 0.1")
    check_error(main(SAC, *by_folder, "--sparsity", "0"), "--sparsity 0.8, not 0.0")  # the default
    check_error(main(SAC, "--run-dir", trained), "--run-dir goes with --eval-only")
    check_error(main(SAC, "--eval-only", "--run-dir", "nowhere"), "--run-dir nowhere", "args.json")


def test_evaluate_with_as_many_episodes_as_are_given(trained, monkeypatch):
    """The default, too."""
    words = f"--eval-only --run-dir {trained} --final-eval-episodes".split()
    for number in (20, 3):
        monkeypatch.setattr(sys, "argv", ["agent.py", *words, str(number)])
        args = sac.parse_flags(sac.Args)
        sac.take_flags(args)
        assert (args.final_eval_episodes, args.sparsity) == (number, 0.8)


def test_train_a_finished_run_for_longer(trained, main, tmp_path):
    longer = f"{CARTPOLE} --reset-interval 500"
    for runs, totals in (("in_two", ("1000", "2000")), ("in_one", ("2000",))):
        for total in totals:
            flags = f"{longer} --total-timesteps {total} --runs-dir {runs}"
            out = succeed(main(SAC, *flags.split()))
    two, one = only_run(tmp_path / "in_two"), only_run(tmp_path / "in_one")
    assert two.name == one.name and read_metrics(two) == read_metrics(one)
    assert torch.equal(
        load_checkpoint(two)["critic"]["encoders.0.1.up.values"],
        load_checkpoint(one)["critic"]["encoders.0.1.up.values"],
    )
    kept = (two / "metrics_1000.csv").read_text()
    assert "1000,50,40,final/return_mean," in kept
    assert "note" not in out
    shorter = main(SAC, *f"{longer} --runs-dir in_two --total-timesteps 1000".split())
    check_error(shorter, "2000 env steps already", "--total-timesteps 1000")
    # Within an episode, of 1000 env steps
    inside = f"{longer} --runs-dir in_one --total-timesteps"
    succeed(main(SAC, *inside.split(), "2200"))
    assert "note: at env step 2200" in succeed(main(SAC, *inside.split(), "2400"))
    (one / "checkpoint.previous.pt").replace(one / "checkpoint.pt")  # killed in the last evaluation
    assert "note: at env step 2400" in succeed(main(SAC, *inside.split(), "2600"))


@pytest.mark.parametrize("section", ["Plot several seeds", "Compare runs"])
def test_scripts(section, main, tmp_path):
    if section == "Compare runs":
        succeed(main(SAC, *f"{CARTPOLE} --total-timesteps 400".split()))
    for script, flags in commands(section):
        more = f"{CARTPOLE} --total-timesteps 400".split() if script == SAC else []
        seed = flags[-2:] if script == SAC else []
        out = succeed(main(script, *flags, *more, *seed))
    if section == "Compare runs":
        assert "cartpole-swingup" in out and "finished" in out
    else:
        assert (tmp_path / "results" / "curves" / "learning_curves.png").stat().st_size > 10_000
        assert len(list((tmp_path / "runs").iterdir())) == 2


def test_start_from_the_networks_of_another_run(trained, main, tmp_path):
    ((script, flags),) = commands("Start from the networks", trained)
    more = f"{CARTPOLE} --env-id {flags[1]} --total-timesteps 200 --learning-starts 1000".split()
    succeed(main(script, *flags, *more))
    ours, theirs = (load_checkpoint(path) for path in (only_run(tmp_path / "runs"), trained))
    for network in ("actor", "critic", "target_critic", "temperature"):
        for name, value in theirs[network].items():
            assert torch.equal(ours[network][name], value), name
    assert ours["norm"]["count"] == theirs["norm"]["count"] + 10
    assert ours["replay"]["added"] == 10 and ours["critic_optimizer"]["state"] == {}
    for wrong, word in (
        ("--sparsity 0.5", "sparsity and masks must be"),
        ("--width-scale 0.25", "sizes, sparsity and masks"),
        ("--seed 2", "another --mask-seed"),
        ("--init-from nowhere", "No such file"),
    ):
        ended = main(script, *flags, *more, *wrong.split())
        check_error(ended, "--init-from", word)
        assert len(ended[2]) < 600
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "checkpoint.pt").write_bytes(bytes(99))
    _, _, line = main(script, *flags, *more, "--init-from", "damaged")
    assert line.endswith("damaged/checkpoint.pt does not fit (ValueError: its checksum is wrong)\n")
    only_run(tmp_path / "runs")  # no folder of a run that could not begin
    # A run that was killed between the two renames of a checkpoint
    checkpoint = tmp_path / "damaged" / "checkpoint.pt"
    checkpoint.unlink()
    shutil.copy(trained / "checkpoint.pt", checkpoint.with_name("checkpoint.previous.pt"))
    succeed(main(script, *flags, *more, "--init-from", "damaged"))


def test_the_scale_of_rewards_is_not_that_of_another_run(main, tmp_path):
    flags = "--env-id InvertedPendulum-v5 --total-timesteps 300 --learning-starts 100 --threads 1"
    flags += " --eval-episodes 1 --final-eval-episodes 1 --width-scale 0.125 --runs-dir"
    succeed(main(stream.__file__, *flags.split(), "first"))
    donor = only_run(tmp_path / "first")
    succeed(main(stream.__file__, *flags.split(), "second", "--init-from", donor))
    (obs, rewards), (donor_obs, donor_rewards) = (
        load_checkpoint(run)["norm"]["statistics"] for run in (only_run(tmp_path / "second"), donor)
    )
    assert obs["count"] > donor_obs["count"] + 300
    assert rewards["count"] == donor_rewards["count"] == 300


def test_a_run_of_another_agent(trained, main, tmp_path):
    """Both flags name the agent, and neither leaves a folder."""
    ddpg_file = AGENTS / "ddpg_simba_sparse.py"
    other = ("another agent, sac_simba_sparse", "--initial-temperature")
    check_error(main(ddpg_file, "--eval-only", "--run-dir", trained), "--run-dir", *other)
    flags = [*CARTPOLE.split(), "--init-from", trained, "--total-timesteps", "200"]
    check_error(main(ddpg_file, *flags), "--init-from", *other)
    assert list((tmp_path / "runs").iterdir()) == []
    # Every flag of a static agent is one of the dynamic agent
    ended = main(AGENTS / "sac_simba_dynamic.py", *flags, "--init-from", trained)
    check_error(ended, "--init-from", "it has no 'topology'", "the agent that of sac_simba_sparse")
    ended = main(AGENTS / "sac_simba_dynamic.py", "--eval-only", "--run-dir", trained)
    check_error(ended, "it has no 'topology'", "it is of sac_simba_sparse")
    assert list((tmp_path / "runs").iterdir()) == []
    # DER, as DrQ-v2, makes the replay's file before it reads the checkpoint
    flags = "--env-id ALE/Pong-v5 --width-scale 0.125 --threads 1 --total-timesteps 2000"
    ended = main(AGENTS / "der_impala_sparse.py", *flags.split(), "--init-from", trained)
    check_error(ended, "--init-from", "another agent, sac_simba_sparse")
    assert list((tmp_path / "runs").iterdir()) == []


def test_train_from_python(tmp_path):
    (code,) = blocks("Train from Python", "python")
    code = code.replace('"sparse_zoo"', repr(str(AGENTS))).replace("1000", "20")
    short = "total_timesteps=40, eval_episodes=1, final_eval_episodes=1"
    assert "total_timesteps=2000" in code
    code = code.replace("total_timesteps=2000", short)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("evaluate it:") == 2 == len(list((tmp_path / "runs").iterdir()))


def test_an_environment_of_your_own(main, tmp_path, monkeypatch):
    (code,) = blocks("An environment of your own", "python")
    (tmp_path / "my_envs.py").write_text(code)
    monkeypatch.setattr(sys, "path", [*sys.path])
    ((script, flags),) = commands("An environment of your own")
    more = f"{SHORT} --total-timesteps 200 --learning-starts 1000 --final-eval-episodes 1".split()
    succeed(main(script, *flags, *more, "--action-repeat", "1"))
    run_dir = only_run(tmp_path / "runs")
    assert metric_values(read_metrics(run_dir), "episode/length") == [50] * 4
    policy, env = sac.load_policy(run_dir)
    assert env.unwrapped.start == 2 and abs(policy(env.reset(seed=0)[0])) <= 1
    for wrong in ("{", "[1]", "3"):
        check_error(main(script, *flags, "--env-kwargs", wrong), "--env-kwargs", wrong, "JSON")
    unknown = main(script, *flags, "--env-kwargs", '{"begin": 2}')
    check_error(unknown, "my_envs:Point-v0", "begin", "--env-kwargs")


@pytest.mark.slow
@pytest.mark.parametrize("block", [0, 1])
def test_sweeps(block, tmp_path):
    """In a real shell, with the agent as it is called there; a Slurm task is a script too."""
    flags = f"{CARTPOLE} --total-timesteps 200"
    code = blocks("A sweep", "bash")[block].replace("python ", f"{sys.executable} {ROOT}/")
    code = code.replace("simba_sparse.py", f"simba_sparse.py {flags}")
    for task in ("1", "2") if block else ("",):
        environment = {"SLURM_ARRAY_TASK_ID": task, "MUJOCO_GL": "disabled"}
        subprocess.run(["bash", "-ec", code], cwd=tmp_path, env=environment, check=True)
    names = sorted(path.name.split("__")[-1] for path in (tmp_path / "runs").iterdir())
    assert names == ["seed1", "seed2"]


def test_a_resumed_offline_run_is_one_to_weights_and_biases(tmp_path):
    """What `wandb sync` would send, which is all that can be had without a network."""
    ((script, flags),) = commands("Weights & Biases")
    for total in ("200", "400"):
        more = f"{CARTPOLE} --total-timesteps {total} --learning-starts 1000".split()
        how = {"WANDB_MODE": "offline", "MUJOCO_GL": "egl", "WANDB_DATA_DIR": str(tmp_path)}
        succeed(Process(script, *flags, *more, folder=tmp_path, **how).finish())
    run_dir = only_run(tmp_path / "runs")
    parts = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert [part.name for part in parts] == [f"run-{run_dir.name}.wandb"] * 2
    for part in parts:
        recorded = part.read_bytes()
        assert b"final/return_mean" in recorded and b"videos/final.mp4" in recorded
        (film,) = part.parent.glob("files/videos/final.mp4")
        assert len(imageio.mimread(film, memtest=False)) == 50
    copies = [path.read_bytes() for path in tmp_path.rglob("artifacts/staging/*")]
    assert copies and set(copies) == {script.read_bytes()}
    wandb = [sys.executable, "-m", "wandb", "sync", "--dry-run"]
    done = subprocess.run(wandb, cwd=run_dir, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert "Would sync 2 run(s)" in said and said.count(run_dir.name + ".wandb") == 2


def test_read_a_checkpoint_without_this_code(trained):
    (code,) = blocks("Read a checkpoint", "python")
    names = {}
    exec(code.replace("$RUN", str(trained)), names)
    layers = json.loads((trained / "args.json").read_text())["layers"]["actor"]
    sparse = [row for row in layers if row["layer"] in names["weights"]]
    assert len(sparse) == 3
    nonzero = sum(int(weight.count_nonzero()) for weight in names["weights"].values())
    assert nonzero == count_weights(sparse)[1]
