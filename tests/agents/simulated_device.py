"""A device without hardware, "sim", that computes what the CPU would.

Its tensors cannot mix with those of the CPU. Runs an agent's file on the CPU (FOLDER/cpu) and on
this device (FOLDER/sim; interrupted once, then it goes on):

    python tests/agents/simulated_device.py sparse_zoo/sac_simba_sparse.py FOLDER FLAGS...

It shows that a program puts every tensor where it belongs, as it must with CUDA; it shows nothing
about CUDA's kernels.
"""

import dataclasses
import gc
import runpy
import sys
from collections import Counter
from pathlib import Path

import torch
import tyro
from filelock import FileLock
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
MOVES = {aten.copy_.default, aten._to_copy.default}
copies = Counter()  # tensors that went "to the device" and "to the CPU", numbers included
# Their indices may be the CPU's
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Backend(backend_registration._DummyBackendModule):
    # torch.autocast asks for it even where it is switched off
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend("sim", backend_module=Backend())
# Else Module.to leaves the old memory in place
torch.__future__.set_swap_module_params_on_conversion(True)


class SimTensor(torch.Tensor):
    """A tensor of the device; its numbers are in `memory`, a tensor of the CPU."""

    @staticmethod
    def __new__(cls, memory: torch.Tensor, requires_grad: bool = False):
        layout = {
            "strides": memory.stride(),
            "storage_offset": memory.storage_offset(),
            "dtype": memory.dtype,
        }
        place = {"device": "sim:0", "requires_grad": requires_grad}
        tensor = torch.Tensor._make_wrapper_subclass(cls, memory.shape, **layout, **place)
        tensor.memory = memory
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return call(operation, args, kwargs or {})


class SimDevice(TorchDispatchMode):
    """Lets operations create tensors on the device, or move them there."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return call(operation, args, kwargs or {})


def call(operation, args: tuple, kwargs: dict):
    """Does an operation in the memory of its tensors; RuntimeError if they lie on two devices."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = {id(tensor.memory): tensor for tensor in tensors if isinstance(tensor, SimTensor)}
    strangers = [tensor for tensor in tensors if not isinstance(tensor, SimTensor)]
    if torch.Tag.pointwise in operation.tags:  # a number of the CPU may take part
        strangers = [tensor for tensor in strangers if tensor.dim() > 0]
    first_is_ours = bool(args) and isinstance(args[0], SimTensor)
    if (
        ours
        and strangers
        and operation not in MOVES
        and not (operation in INDEXING and first_is_ours)
    ):
        raise RuntimeError(f"{operation} with tensors on sim and on the CPU")

    on_sim = first_is_ours if operation is aten.copy_.default else bool(ours)
    if kwargs.get("device") is not None:
        on_sim = torch.device(kwargs["device"]).type == "sim"
        kwargs = {**kwargs, "device": torch.device("cpu")}

    count_copy(operation, args, on_sim)

    def unwrap(leaf):
        return leaf.memory if isinstance(leaf, SimTensor) else leaf

    def wrap(leaf):
        if not isinstance(leaf, torch.Tensor) or not on_sim:
            return leaf
        return ours[id(leaf)] if id(leaf) in ours else SimTensor(leaf)

    return tree_map(wrap, operation(*tree_map(unwrap, args), **tree_map(unwrap, kwargs)))


def count_copy(operation, args: tuple, to_sim: bool) -> None:
    if operation is aten._local_scalar_dense.default and isinstance(args[0], SimTensor):
        copies["to the CPU"] += 1
    if operation in MOVES:
        source = args[1] if operation is aten.copy_.default else args[0]
        if isinstance(source, SimTensor) != to_sim:
            copies["to the device" if to_sim else "to the CPU"] += 1


def run(file: str, flags: list[str], device: str, stop_at_checkpoint: int | None = None) -> None:
    """Runs an agent's file; stops it, on request, before its n-th checkpoint is written."""
    parse, save, saved = tyro.cli, torch.save, 0

    def save_on_cpu(state, path):
        nonlocal saved
        saved += 1
        if saved == stop_at_checkpoint:
            sys.exit()
        save(
            tree_map(
                lambda leaf: leaf.memory.clone() if isinstance(leaf, SimTensor) else leaf, state
            ),
            path,
        )

    def cli(flags, args):
        parsed = parse(flags, args=args)
        flags.__annotations__["device"] = str  # "sim" is none of its words
        return dataclasses.replace(parsed, device=device)

    tyro.cli = cli
    torch.save, sys.argv = save_on_cpu, [file, *flags]
    try:
        runpy.run_path(file, run_name="__main__")
    except SystemExit as stop:
        if stop.code or stop_at_checkpoint is None:
            raise
    finally:
        tyro.cli, torch.save = parse, save
        for lock in [item for item in gc.get_objects() if type(item) is FileLock]:
            lock.release(force=True)


if __name__ == "__main__":
    _, file, folder, *flags = sys.argv
    # As `python FILE` does; numba's cache may import the file
    sys.path[0] = str(Path(file).resolve().parent)
    run(file, [*flags, "--sparse-kernel", "dense", "--runs-dir", f"{folder}/cpu"], "cpu")
    with SimDevice():
        for stop_at_checkpoint in (2, None):
            run(file, [*flags, "--runs-dir", f"{folder}/sim"], "sim", stop_at_checkpoint)
