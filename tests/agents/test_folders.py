"""The name of a run's folder, and older runs that get theirs."""

import re
from pathlib import Path

import pytest
import sac_simba_sparse as sac
from conftest import ROOT, write_run


@pytest.mark.parametrize(
    "flags,name",
    [
        ({}, "dm_control-humanoid-run-v0__sac_simba_sparse__w1__s0__########__seed1"),
        (
            {"env_id": "mine:My-v0", "width_scale": 0.25, "depth_scale": 2, "sparsity": 1 - 4 / 9},
            "mine-My-v0__sac_simba_sparse__w0.25__d2__s0.555555555556__########__seed1",
        ),
        (
            {"env_id": "A-v0", "exp_name": "b", "sparsity": 0.95, "seed": 12},
            "A-v0__b__w1__s0.95__########__seed12",
        ),
    ],
)
def test_a_person_can_tell_runs_apart_by_name(flags, name):
    folder = sac.run_folder(sac.Args(runs_dir="here", **flags))
    assert re.sub("__[0-9a-f]{8}__", "__########__", str(folder)) == f"here/{name}"


def test_the_hash_is_the_identity():
    def digest(**flags):
        return sac.run_folder(sac.Args(**flags)).name.split("__")[-2]

    assert digest() == digest(seed=7) == digest(threads=3) == digest(gamma=None)
    assert len({digest(), digest(gamma=0.9), digest(critic_sparsity=0.5), digest(tau=0.1)}) == 4


def test_older_runs_get_their_new_name(tmp_path, monkeypatch):
    """By the lines of docs/runs.md."""
    monkeypatch.chdir(tmp_path)
    flags = {**vars(sac.Args(seed=3)), "runs_dir": "elsewhere"}
    del flags["max_episode_steps"]  # newer than the run
    write_run(Path("runs/old__s3"), flags, [])
    write_run(Path("runs/other__s3"), flags | {"exp_name": "other"}, [])
    (lines,) = re.findall(r"```python\n(.+?)```", (ROOT / "docs" / "runs.md").read_text(), re.S)
    exec(lines, {})
    assert {path.name for path in Path("runs").iterdir()} == {
        sac.run_folder(sac.Args(seed=3)).name,
        "other__s3",
    }
