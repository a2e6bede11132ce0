"""CLIP's weights: where they come from, how a stranger's file is read, the model they make.

A file that torch.save writes is a pickle and, beside it, raw numbers ("storages"). A pickle is a
program for a small stack machine, and Python's machine imports and calls what it names: a
stranger's file could do anything. `Reader` is that machine with four names to call; names of
storages mean dtypes, and every other name a class that does nothing. Three layouts are read:

    zip          torch.save since 2020: <root>/data.pkl, and a record <root>/data/<key> per storage
    TorchScript  the same with compiled code beside it, which is not looked at; OpenAI's CLIP files
    legacy       torch.save before that: five pickles, then all storages one after another
"""
import hashlib
import io
import pickle
import zipfile
from collections import OrderedDict
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from .model import CLIP

# The one of OpenAI's that stages take by name. Its archive's sha256 is a part of its URL.
# AUDIT.md: (42).
NAME = "ViT-B/16"
DIGEST = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
URL = f"https://openaipublic.azureedge.net/clip/models/{DIGEST}/ViT-B-16.pt"


def file_sha256(path):
    """sha256 of a file, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def fetch(url, digest, folder, instead):
    """Path of the file behind `url`, downloaded once into `folder`, with a progress bar.

    digest: sha256 in hexadecimal, or its beginning. It is compared at every call, not after the
    download alone: a file that was cut or changed since is named, not used.
    folder: may begin with ~. instead: the option that does without, for the message.
    Raises ValueError (one line) where the network, the disk or the digest is at fault.
    """
    place = Path(folder, url.rsplit("/", 1)[1])
    try:
        path = place.expanduser()
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digest)
        found = file_sha256(path)
    except Exception as e:  # network, disk, digest, no home: each has exceptions of its own
        raise ValueError(f"cannot fetch {url} to {place} ({e}); "
                         f"fetch it elsewhere and give {instead}") from None
    if not found.startswith(digest):
        raise ValueError(f"{path}: cut or changed, its sha256 is not {digest[:12]}...; "
                         "delete the file, it is fetched anew")
    return path


def load(name, seed=0):
    """(CLIP in float32 on the CPU, in eval mode; what tells it from another: its file's sha256).

    name: "ViT-B/16", OpenAI's, which is downloaded once, or a file, OpenAI's archive or a state
    dict. "random" is an untrained CLIP, drawn from the seed: for tests and timings, it knows
    nothing. Raises ValueError naming a file that is not there, is no CLIP, or one of other patches.
    """
    if name == "random":
        torch.manual_seed(seed)
        return CLIP(), f"random, seed {seed}"
    path = fetch(URL, DIGEST, "~/.cache/clip", "--clip FILE") if name == NAME else Path(name)
    if not path.is_file():
        raise ValueError(f"--clip {name}: neither a file nor {NAME}")
    state = read_file(path, "CLIP")
    try:
        model = CLIP.from_state_dict(state)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    if model.visual.conv1.kernel_size != (16, 16):  # the pyramid adapter is made for these
        raise ValueError(f"{path}: patches of 16 x 16 pixels are expected, as of {NAME}")
    return model, file_sha256(path)


# --------------------------------------------------------------------------- strangers' files

class Inert:
    """Stands for an object of any class that is not known. What a pickle does with it does nothing,
    except that its state (attributes by name) is kept."""

    state = {}

    def ignore(self, *args, **kwargs):
        """Take anything, do nothing."""

    __init__ = __setitem__ = append = extend = add = ignore

    def __setstate__(self, state):
        self.state = state


def rebuild_tensor(storage, offset, size, stride, *rest):
    """A view into a storage. torch refuses one that reaches beyond it."""
    return torch.empty(0, dtype=storage.dtype).set_(storage, offset, size, stride)


def rebuild_parameter(tensor, *rest):
    """The tensor of an nn.Parameter."""
    return tensor


KNOWN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
}
# A storage's class says what its numbers are: torch.HalfStorage -> torch.float16
for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool"):
    KNOWN["torch", f"{kind}Storage"] = getattr(torch, f"{kind}Tensor").dtype


class Reader(pickle.Unpickler):
    """Python's machine for pickles, where a name means what KNOWN says, or else an inert class."""

    def find_class(self, module, name):
        """The one way by which a pickle gets at anything outside of it."""
        return KNOWN.get((module, name)) or type(name, (Inert,), {})


# What torch.load uses of the module `pickle`
PICKLE = SimpleNamespace(__name__="pickle", Unpickler=Reader,
                         load=lambda f, **options: Reader(f, **options).load())


def read_zip(path):
    """Value of a zip that torch wrote; of a TorchScript archive its state dict.

    torch.load is not asked: it hands an archive to torch.jit.load, which may run its code.
    """
    with zipfile.ZipFile(path) as records:
        root = records.namelist()[0].split("/")[0]

        @cache  # one storage, however many tensors are views of it
        def storage(pid):
            _, dtype, key, _, _ = pid  # "storage", torch.float16, "0", "cpu", its length
            data = np.frombuffer(bytearray(records.read(f"{root}/data/{key}")), np.uint8)
            return torch.from_numpy(data).view(dtype)

        reader = Reader(io.BytesIO(records.read(f"{root}/data.pkl")))
        reader.persistent_load = storage
        value = reader.load()
        return flatten(value) if f"{root}/constants.pkl" in records.namelist() else value


def flatten(module, prefix=""):
    """Tree of a TorchScript archive's modules -> {"visual.conv1.weight": tensor}."""
    state = {}
    for name, value in module.state.items():
        if isinstance(value, Inert):
            state |= flatten(value, f"{prefix}{name}.")
        elif torch.is_tensor(value):
            state[prefix + name] = value
    return state


def read_file(path, what):
    """Dicts, lists, numbers, strings and tensors (CPU) of a file that somebody's torch wrote.

    Objects of other classes, such as a config, come out as `Inert`: nothing of the file is run.
    what: what the file should be, for the message. Raises ValueError (one line) for any other file.
    AUDIT.md: (43).
    """
    try:
        with open(path, "rb") as f:
            start = f.read(2)
        if start == b"PK":
            return read_zip(path)
        if start[:1] == b"\x80":  # the first instruction of a pickle
            return torch.load(path, map_location="cpu", pickle_module=PICKLE, weights_only=False)
        raise ValueError("torch.save did not write it")
    except Exception as e:  # a broken file can raise nearly anything
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise ValueError(f"{path}: not a readable {what} ({reason})") from None
