"""CPU milliseconds of the products of one packed layer, beside the ways that PyTorch has for them.

    python sparse_zoo/bench/bench_kernels.py --shape 8192 2048 --sparsity 0.9

One thread, so that CPU time is what a core really did and other programs on the machine do not
count.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import timing
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from timing import plots, runs

sac = timing.import_agent("sac_simba_sparse")


@dataclass
class Args:
    shape: Annotated[tuple[int, int], "1 <= x <= 10**6"] = (8192, 2048)
    """rows (outputs) and columns (inputs) of the layer"""
    sparsity: runs.Sparsity = 0.9
    """fraction of weights removed"""
    batch_size: runs.Count = 256
    """inputs"""
    repeats: runs.Count = 7
    """each product is timed this often, in turns; the least counts"""


def products(args: Args) -> dict[str, Callable]:
    """Each way of each product, by its name."""
    out_features, in_features = args.shape
    torch.manual_seed(0)
    dense = nn.Linear(in_features, out_features)
    count = round((1 - args.sparsity) * dense.weight.numel())
    active = torch.randperm(dense.weight.numel())[:count].sort().values
    x_t = torch.randn(in_features, args.batch_size)
    grad_t = torch.randn(out_features, args.batch_size)

    blocked = sac.SparseLinear(dense, active, sac.PackedProduct)
    sac.BLOCK = in_features + out_features  # one block: rows in order, as in a CSR matrix
    plain = sac.SparseLinear(dense, active, sac.PackedProduct)
    values = plain.values.detach()
    pointers = torch.from_numpy(plain.product.pointers)
    columns = torch.from_numpy(plain.product.col)
    csr = torch.sparse_csr_tensor(pointers, columns, values, args.shape)

    def forward(layer):
        y_t = np.empty((out_features, args.batch_size), np.float32)
        places = (layer.product.pointers, layer.product.col)
        sac.packed_product(*places, None, values.numpy(), None, x_t.numpy(), y_t)
        return y_t

    def gradient(layer):
        grad_values = np.empty(count, np.float32)
        grad_bias = np.empty(out_features, np.float32)
        places = (layer.product.pointers, layer.product.col)
        sac.packed_gradient(*places, grad_t.numpy(), x_t.numpy(), grad_values, grad_bias)
        return grad_values

    def embedding_bag():
        return F.embedding_bag(
            columns,
            x_t,
            pointers,
            per_sample_weights=values,
            mode="sum",
            include_last_offset=True,
        )

    def sampled_addmm():
        return torch.sparse.sampled_addmm(csr, grad_t, x_t.t(), beta=0.0).values()

    return {
        "forward: dense": lambda: dense.weight.detach() @ x_t,
        "forward: CSR matrix": lambda: csr @ x_t,
        "forward: embedding_bag": embedding_bag,
        "forward: packed without blocks": lambda: forward(plain),
        "forward: packed": lambda: forward(blocked),
        "gradient of values: dense": lambda: grad_t @ x_t.t(),
        "gradient of values: sampled_addmm": sampled_addmm,
        "gradient of values: packed without blocks": lambda: gradient(plain),
        "gradient of values: packed": lambda: gradient(blocked),
    }


def main(args: Args) -> None:
    timing.set_threads(sac, 1)
    times = timing.take_turns(products(args), args.repeats, time.process_time)
    rows = [[name, f"{min(values):.1f}"] for name, values in times.items()]
    title = f"product, {args.shape[0]} x {args.shape[1]}, sparsity {args.sparsity:g}"
    print(plots.markdown_table([title, "CPU ms"], rows), end="")


if __name__ == "__main__":
    runs.start(main, Args)
