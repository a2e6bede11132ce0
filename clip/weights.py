"""CLIP's weights: where they come from, how a stranger's file is read, the model they make.

A file that torch.save writes is a pickle and, beside it, raw numbers ("storages"). A pickle is a
program for a small stack machine, and Python's machine imports and calls what it names: a
stranger's file could do anything. `Reader` is that machine with four names to call; every other
name is a class that does nothing. torch.load reads three layouts with it:

    zip          torch.save since 2020: <root>/data.pkl, and a record <root>/data/<key> per storage
    TorchScript  the same with compiled code beside it, which is not looked at; OpenAI's CLIP files
    legacy       torch.save before that: five pickles, then all storages one after another
"""
import hashlib
import io
import pickle
import zipfile
from pathlib import Path

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
    place = Path(folder, Path(url).name)
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
    """(CLIP in float32 on the CPU; what tells it from another: its file's sha256, or the seed).

    name: "ViT-B/16", OpenAI's, which is downloaded once, or a file, OpenAI's archive or a state
    dict. "random" is an untrained CLIP, drawn from the seed: for tests and timings, it knows
    nothing. Raises ValueError naming a file that is not there, is no CLIP, or one of other patches.
    """
    if name == "random":
        torch.manual_seed(seed)
        return CLIP(), f"random, seed {seed}"
    path = Path(name)
    if name == NAME:
        path = fetch(URL, DIGEST, "~/.cache/clip", "--clip FILE")
    if not path.is_file():
        raise ValueError(f"--clip {name}: neither a file nor {NAME}")
    model = CLIP.from_state_dict(read_file(path, "CLIP"), path)
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


# (module, name) of what torch.save writes for tensors and dicts of them. Storages have names too,
# torch.HalfStorage say; torch.load asks for none of these, it takes them for dtypes.
KNOWN = {("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor"),
         ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")}


class Reader(pickle.Unpickler):
    """Python's machine for pickles, where only the names in KNOWN mean what they say."""

    def find_class(self, module, name):
        """The one way by which a pickle gets at anything outside of it."""
        if (module, name) in KNOWN:
            return super().find_class(module, name)
        return type(name, (Inert,), {})


class Pickle:
    """What torch.load uses of the module `pickle`, with `Reader` in the place of its machine."""

    Unpickler = Reader

    @staticmethod
    def load(file, **options):
        """The value of one pickle."""
        return Reader(file, **options).load()


def flatten(module, prefix=""):
    """Tree of a TorchScript archive's modules, which come out inert, but hold their tensors ->
    {"visual.conv1.weight": tensor}."""
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
        # A zip with a record constants.pkl is TorchScript's. torch.load would hand it on to
        # torch.jit.load, which may run its code; renamed, it is a zip like any other.
        content = Path(path).read_bytes().replace(b"constants.pkl", b"constants.not")
        # torch does not look at a zip's checksums, and would take a changed number as it is.
        if content[:2] == b"PK":
            archive = zipfile.ZipFile(io.BytesIO(content))
            if archive.testzip():
                raise ValueError("it is damaged")
        value = torch.load(io.BytesIO(content), map_location="cpu", pickle_module=Pickle,
                           weights_only=False)
        return flatten(value) if isinstance(value, Inert) else value
    except Exception as e:  # a broken file can raise nearly anything
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise ValueError(f"{path}: not a readable {what} ({reason})") from None
