"""The name of a run's folder."""

import re

import pytest
import sac_simba_sparse as sac


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
    assert digest() == digest(width_scale=1)  # as Python writes what a command line reads as 1.0
    assert len({digest(), digest(gamma=0.9), digest(critic_sparsity=0.5), digest(tau=0.1)}) == 4
    assert digest() == "6777d6e3", "another name: runs made before this change are not found"
