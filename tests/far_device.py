"""A device that does not exist: its tensors compute on the CPU, and refuse to meet CPU tensors.

run     python tests/far_device.py "stage1_cam.py --data VOC2012 --device far" "eval.py --data ..."

Runs scripts of the project as they are, one after the other, on torch's Python backend for private
devices. A tensor that says it lies on "far" is a wrapper around a CPU tensor. Every operation of
torch passes through `compute`, which unwraps, computes and wraps; and which raises where a far
tensor and a CPU tensor come together, as a GPU would. So a forgotten `.to(device)` is found without
a GPU. As on a GPU, a CPU tensor without dimensions may join in, and copies may cross.
"""
import runpy
import shlex
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ROOT = Path(__file__).resolve().parents[1]
NAME = "far"
# Operations that may cross from one device to the other.
CROSSING = ("aten._to_copy", "aten.copy_", "aten._copy_from", "aten.set_")
# Indices may lie on the CPU where a GPU's tensor is indexed.
INDEXING = ("aten.index.", "aten.index_put_.")
seen = {"operations": 0}


class Far(torch.Tensor):
    """A tensor that lies on the far device; `inner` is the CPU tensor that it wraps."""

    @staticmethod
    def __new__(cls, inner):
        """The wrapper: size, strides and type are the inner tensor's, the device is not."""
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=f"{NAME}:0", requires_grad=inner.requires_grad)

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):
        """The numbers, as of any device's tensor; torch refuses it to subclasses."""
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class Everywhere(TorchDispatchMode):
    """Lets `compute` see operations without tensors too, such as torch.zeros(device="far")."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def compute(operation, args, kwargs):
    """What an operation gives, on the device where it belongs. Raises where devices are mixed."""
    values = tree_flatten((args, kwargs))[0]
    far = [value for value in values if isinstance(value, Far)]
    target = kwargs.get("device")
    goes_far = target is not None and torch.device(target).type == NAME
    if not far and not goes_far:
        return operation(*args, **kwargs)
    seen["operations"] += 1
    name = str(operation)
    near = [value for value in values
            if isinstance(value, torch.Tensor) and not isinstance(value, Far) and value.dim() > 0
            and not (name.startswith(INDEXING) and value.dtype == torch.int64)]
    if far and near and not name.startswith(CROSSING):
        raise RuntimeError(f"{name}: tensors on {NAME} and on cpu, {[n.shape for n in near]}")
    inner_args, inner_kwargs = tree_map(unwrap, (args, kwargs))
    if target is not None:
        inner_kwargs["device"] = torch.device("cpu")
    inner_kwargs.pop("pin_memory", None)
    result = operation(*inner_args, **inner_kwargs)
    if target is not None and not goes_far:
        # A copy that stays a copy: on one device torch would hand back the tensor itself.
        return tree_map(copy, result)
    if name.startswith("aten.copy_") and not isinstance(args[0], Far):
        return args[0]
    return rewrap(result, {id(value.inner): value for value in far})


def unwrap(value):
    """The inner tensor of a far one; all else as it is."""
    return value.inner if isinstance(value, Far) else value


def copy(value):
    """A tensor on the CPU with memory of its own; all else as it is."""
    return unwrap(value).clone() if isinstance(value, torch.Tensor) else value


def rewrap(result, known):
    """Results as far tensors; what was changed in place stays the object that it was.

    known: {id of an inner tensor: the far tensor around it}, of the operation's arguments.
    """
    def wrap(value):
        if isinstance(value, torch.Tensor):
            return known[id(value)] if id(value) in known else Far(value)
        return value
    return tree_map(wrap, result)


def by_hand(name):
    """`compute` for one operation, as torch wants to be given it.

    Some of torch's C++ asks the device past every Python mode: for example where a list indexes a
    tensor, and the list is copied to the tensor's device first.
    """
    base, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, base), overload or "default")

    def kernel(*args, **kwargs):
        return compute(operation, args, kwargs)
    return kernel


def main():
    """Run the scripts, each with the options that follow its name."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME)
    torch.get_device_module(NAME).get_amp_supported_dtype = [torch.bfloat16].copy
    aten = torch.library.Library("aten", "IMPL")
    for name in ("empty_strided", "empty.memory_format", "copy_", "_copy_from"):
        aten.impl(name, by_hand(name), "PrivateUse1")
    save = torch.save

    def save_numbers(value, *rest):
        """torch pickles a real device's tensor as its numbers; a wrapper it would as an object."""
        save(tree_map(copy, value), *rest)
    torch.save = save_numbers
    sys.path.insert(0, str(ROOT))
    for command in sys.argv[1:]:
        sys.argv = shlex.split(command)
        seen["operations"] = 0
        with Everywhere():
            runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
        print(f"{seen['operations']} operations on {NAME}: {command}")


if __name__ == "__main__":
    main()
