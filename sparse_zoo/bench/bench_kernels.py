"""CPU milliseconds of the products of one packed layer, beside the ways that PyTorch has for them.

    python sparse_zoo/analysis/bench_kernels.py --shape 8192 2048 --sparsity 0.9

One thread, so that CPU time is what a core really did and other programs on the machine do not count.
"""

import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numba
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sac_simba_sparse as sac


@dataclass
class Args:
    shape: tuple[int, int] = (8192, 2048)
    """rows (outputs) and columns (inputs) of the layer"""
    sparsity: float = 0.9
    """fraction of weights removed"""
    batch_size: int = 256
    """inputs"""
    repeats: int = 7
    """each product is timed this often, in turns; the least counts"""


if __name__ == "__main__":
    args = tyro.cli(Args)
    if not 0 <= args.sparsity < 1:
        print(f"error: --sparsity {args.sparsity}: must be at least 0 and below 1", file=sys.stderr)
        sys.exit(2)
    numba.set_num_threads(1)
    torch.set_num_threads(1)
    out_features, in_features = args.shape
    torch.manual_seed(0)
    dense = nn.Linear(in_features, out_features)
    count = round((1 - args.sparsity) * dense.weight.numel())
    active = torch.randperm(dense.weight.numel())[:count].sort().values
    x_t, grad_t = (
        torch.randn(in_features, args.batch_size),
        torch.randn(out_features, args.batch_size),
    )

    blocked = sac.SparseLinear(dense, active, "packed")
    sac.BLOCK = in_features + out_features  # one block: rows in order, as in a CSR matrix
    plain = sac.SparseLinear(dense, active, "packed")
    warnings.filterwarnings("ignore", message="Sparse")  # CSR support is in beta state
    csr = torch.sparse_csr_tensor(plain.pointers, plain.col, plain.values.detach(), args.shape)

    def forward(layer):
        y_t = torch.zeros(out_features, args.batch_size)
        return sac.call_numba(sac.packed_product, layer.pointers, layer.col, layer.values, x_t, y_t)

    def gradient(layer):
        return sac.call_numba(
            sac.packed_gradient, layer.pointers, layer.col, grad_t, x_t, torch.empty(count)
        )

    def embedding_bag():
        how = {
            "per_sample_weights": plain.values.detach(),
            "mode": "sum",
            "include_last_offset": True,
        }
        return F.embedding_bag(plain.col, x_t, plain.pointers, **how)

    products = {
        "forward": {
            "dense": lambda: dense.weight.detach() @ x_t,
            "CSR matrix": lambda: csr @ x_t,
            "embedding_bag": embedding_bag,
            "packed without blocks": lambda: forward(plain),
            "packed": lambda: forward(blocked),
        },
        "gradient of values": {
            "dense": lambda: grad_t @ x_t.t(),
            "sampled_addmm": lambda: torch.sparse.sampled_addmm(
                csr, grad_t, x_t.t(), beta=0.0
            ).values(),
            "packed without blocks": lambda: gradient(plain),
            "packed": lambda: gradient(blocked),
        },
    }
    print(
        f"| product, {out_features} x {in_features}, sparsity {args.sparsity:g} | CPU ms |\n|---|---|"
    )
    for product, ways in products.items():
        least = dict.fromkeys(ways, float("inf"))
        for repeat in range(args.repeats + 1):
            for name, way in ways.items():
                start = time.process_time()
                way()
                if repeat:  # the first one compiles
                    least[name] = min(least[name], 1000 * (time.process_time() - start))
        for name, milliseconds in least.items():
            print(f"| {product}: {name} | {milliseconds:.1f} |")
