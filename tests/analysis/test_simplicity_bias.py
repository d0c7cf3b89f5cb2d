"""The simplicity bias score on functions whose spectrum is known, and its order of networks."""

import math

import imageio
import pandas as pd
import pytest
import torch
from analysis import simplicity_bias as bias
from conftest import check_error, succeed

N = 40
ROW, COLUMN = torch.meshgrid(
    torch.arange(N, dtype=torch.float64), torch.arange(N, dtype=torch.float64), indexing="ij"
)


def wave(row_cycles: int, column_cycles: int) -> torch.Tensor:
    return torch.cos(2 * math.pi * (row_cycles * ROW + column_cycles * COLUMN) / N)


@pytest.mark.parametrize("cycles", [(1, 0), (0, 4), (3, 4), (-6, 8), (20, 0)])
def test_a_plane_wave_has_its_own_frequency(cycles):
    # 3 and 4 cycles in 40 steps: 5 / 40 cycles per step.
    assert bias.complexity(wave(*cycles)[:, :, None]).item() == pytest.approx(
        math.hypot(*cycles) / N, rel=1e-9
    )


def test_waves_are_weighted_by_amplitude_and_constants_do_not_count():
    # 3 of frequency 5 / 40, 1 of 10 / 40: (3 * 5 + 1 * 10) / 4 / 40 = 6.25 / 40.
    function = 3 * wave(3, 4) + wave(6, 8) + 1000
    both = torch.stack([function, -0.01 * function], 2)
    assert bias.complexity(both).tolist() == pytest.approx([6.25 / N, 6.25 / N], rel=1e-9)


def test_white_noise_has_the_mean_frequency_of_the_grid():
    frequency = torch.fft.fftfreq(N, dtype=torch.float64)
    mean = torch.hypot(frequency[:, None], frequency[None, :]).mean().item()
    assert mean == pytest.approx(0.383, abs=0.002)  # of a square of side 1 about its centre
    assert bias.complexity(torch.randn(N, N, 20)).mean().item() == pytest.approx(mean, rel=0.01)


def test_score_of_a_linear_encoder_is_that_of_its_plane():
    # Heads behind x -> x are planes a x + b y of random direction: the score lies between those of
    # x and of noise.
    axis = torch.linspace(-1, 1, N)
    plane = 1 / bias.complexity(axis[:, None].expand(N, N)[:, :, None].contiguous()).item()
    assert bias.score(torch.nn.Identity(), 2, 2, 8, N, 1.0) == pytest.approx(plane, rel=0.01)


def test_simba_is_simpler_than_an_mlp_and_sparse_simba_than_dense():
    # [-16, 16]^2 with 64 units is to first order [-100, 100]^2 with 2,560: the first layer's
    # variance is |x|^2 / width.
    mlp, dense, sparse = [], [], []
    for seed in range(6):
        torch.manual_seed(seed)
        args = bias.Args(width_scale=0.125)
        mlp.append(bias.score(bias.plain_mlp(88, 64), 88, 64, 32, 60, 16.0))
        for sparsity, scores in ((0.0, dense), (0.6, sparse)):
            encoder, hidden = bias.simba_encoder(args, sparsity, seed)
            scores.append(bias.score(encoder, 88, hidden, 32, 60, 16.0))
    mlp, dense, sparse = (torch.tensor(scores) for scores in (mlp, dense, sparse))
    for simple, simpler in ((mlp, dense), (dense, sparse)):
        error = math.hypot(simple.std() / 6**0.5, simpler.std() / 6**0.5)
        assert simpler.mean() - simple.mean() > 2 * error


def test_command_line_draws_and_writes(tmp_path, main):
    flags = "--width-scale 0.0625 --grid 20 --inits 2 --heads 4 --sparsities 0 0.5"
    flags += " --threads 1 --output out"
    succeed(main(bias.__file__, *flags.split()))
    table = pd.read_csv(tmp_path / "out" / "scores.csv")
    assert list(zip(table.network, table.sparsity, table.seed)) == [
        ("MLP", 0.0, 0),
        ("MLP", 0.0, 1),
        ("SimBa", 0.0, 0),
        ("SimBa", 0.0, 1),
        ("SimBa", 0.5, 0),
        ("SimBa", 0.5, 1),
    ]
    assert table.score.between(2, 12).all() and table.score.nunique() == 6
    assert (table.share_score / table.score).to_numpy() == pytest.approx(math.hypot(0.5, 0.5))
    assert imageio.imread(tmp_path / "out" / "simplicity_bias.png").std() > 1
    bad = main(bias.__file__, *flags.split(), "--inits", "0")
    check_error(bad, "error: --inits 0 is not allowed: 1 <= inits <= 10**6\n")
    check_error(main(bias.__file__, *flags.split(), "--reach", "1e300"), "--reach 1e+300")
    bad = main(bias.__file__, *flags.split(), "--reach", "1e38", "--output", "none")
    check_error(bad, "error: a score is not finite", code=3)
    assert not list((tmp_path / "none").iterdir())


@pytest.mark.parametrize("grid", [2, 3, 40, 41])
def test_largest_frequency_of_a_grid(grid):
    frequency = torch.fft.fftfreq(grid, dtype=torch.float64)
    largest = torch.hypot(frequency[:, None], frequency[None, :]).max().item()
    assert bias.largest_frequency(grid) == pytest.approx(largest, rel=1e-12)
