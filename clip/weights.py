"""CLIP's weights: download, digest, and safe reading.

OpenAI ships its models as TorchScript archives: a zip of `<name>/data.pkl` (a pickle of the module tree), raw storages
`<name>/data/<key>`, and compiled code. torch.jit.load would run that code. We only want the numbers, so `read_archive`
walks the pickle with an unpickler that can build tensors and plain containers, and nothing else.
"""
import hashlib
import io
import math
import os
import pickle
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm

from .model import CLIP

URL = "https://openaipublic.azureedge.net/clip/models/{digest}/{file}"
MODELS = {  # name -> sha256 of OpenAI's archive (also the path element of its URL)
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
}


# ---------------------------------------------------------------------------------------------- download and digest

def file_sha256(path):
    """sha256 of a file, as a hexadecimal string."""
    sha = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def cached_file(url, digest, folder="~/.cache/clip"):
    """Path of the file behind `url`, downloaded once into `folder`, with a progress bar.

    The bytes land beside their place and are renamed only when their sha256 is right: a broken download is never used.
    Raises ValueError where the digest differs, OSError (one line) where the network fails.
    """
    folder = Path(folder).expanduser()
    path = folder / url.rsplit("/", 1)[1]
    if path.is_file():
        if file_sha256(path) != digest:
            raise ValueError(f"{path}: sha256 is not {digest[:12]}...; delete the file, it is fetched anew")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=30) as source, open(part, "wb") as out:
            size = int(source.headers.get("Content-Length", 0)) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := source.read(1 << 20):
                    out.write(block)
                    bar.update(len(block))
        if file_sha256(part) != digest:
            raise ValueError(f"{url}: what came has another sha256 than {digest[:12]}...; try again")
        os.replace(part, path)
    except urllib.error.URLError as e:
        raise OSError(f"cannot download {url} ({e.reason}); fetch it elsewhere and put it at {path}") from None
    finally:
        part.unlink(missing_ok=True)
    return path


# ------------------------------------------------------------------------------------------ reading without executing

DTYPES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
          "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
          "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
          "BoolStorage": torch.bool}


class Module:
    """Stands for any class of the archive (`__torch__.*`): holds its attributes, has no behaviour."""

    def __setstate__(self, state):
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("a module's state is not a dict")
        self.attributes = state


class Inert:
    """Stands for an object of any class we do not know: takes whatever the pickle hands it, keeps and does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def ignore(self, *args, **kwargs):
        pass

    __init__ = __setstate__ = __setitem__ = append = extend = add = ignore


class PlainDict(dict):
    """An OrderedDict of the archive; state dicts carry an attribute (`_metadata`) that we do not need."""

    def __setstate__(self, state):
        pass


def plain_list(*args):
    """TorchScript's typed lists, `torch.jit._pickle.build_intlist([..])`."""
    return list(args[0])


def read_record(archive, name):
    """Bytes of a record. torch stores pickles and numbers uncompressed; a zip bomb does not."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError(f"compressed record {name}")
    return archive.read(name)


class TensorUnpickler(pickle.Unpickler):
    """Knows tensors, modules without behaviour, dicts and lists. Every other global is refused by name."""

    def __init__(self, archive, root):
        super().__init__(io.BytesIO(read_record(archive, f"{root}/data.pkl")))
        self.archive, self.root, self.storages = archive, root, {}

    def find_class(self, module, name):
        if module == "__torch__" or module.startswith("__torch__."):
            return Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return PlainDict
        if module == "torch.jit._pickle" and name in ("build_intlist", "build_doublelist", "build_boollist",
                                                      "build_tensorlist"):
            return plain_list
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise pickle.UnpicklingError(f"refused: {module}.{name}")

    def persistent_load(self, pid):
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"refused: persistent id {pid!r}")
        if key not in self.storages:
            data = bytearray(read_record(self.archive, f"{self.root}/data/{key}"))
            if len(data) != count * dtype.itemsize:
                raise pickle.UnpicklingError(f"storage {key} has {len(data)} bytes, not {count} x {dtype.itemsize}")
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key]

    def rebuild_tensor(self, storage, offset, size, stride, *_):
        """A view into a storage; sizes and strides are checked, so no pickle can ask for more than the file holds."""
        numbers = [offset, *size, *stride]
        if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
            raise pickle.UnpicklingError(f"bad tensor layout: {offset}, {size}, {stride}")
        last = offset + sum((n - 1) * s for n, s in zip(size, stride))
        if math.prod(size) > len(storage) or (math.prod(size) and last >= len(storage)):
            raise pickle.UnpicklingError(f"tensor of size {size} reaches beyond its storage")
        return storage.as_strided(size, stride, offset)


class TolerantUnpickler(TensorUnpickler):
    """The same for checkpoints with objects in them: what it does not know becomes Inert instead of an error."""

    def find_class(self, module, name):
        try:
            return super().find_class(module, name)
        except pickle.UnpicklingError:
            return Inert


def flatten_modules(module, prefix="", seen=None):
    """Module tree -> {dotted name: tensor}. A module met twice (a loop, or a blow-up) is refused."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        raise pickle.UnpicklingError(f"module {prefix!r} stands twice in the tree")
    seen.add(id(module))
    out = {}
    for name, value in getattr(module, "attributes", {}).items():
        if isinstance(value, torch.Tensor):
            out[f"{prefix}{name}"] = value
        elif isinstance(value, Module):
            out |= flatten_modules(value, f"{prefix}{name}.", seen)
    return out


def is_torchscript(archive):
    return any(n.endswith("/constants.pkl") for n in archive.namelist())


def unpickle(path, unpickler, what):
    """The one pickle of a torch zip archive, read with `unpickler`. Raises ValueError (one line) where it is refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")]
            if len(names) != 1:
                raise pickle.UnpicklingError("no data.pkl")
            root = names[0].split("/")[0]
            order = f"{root}/byteorder"
            if order in archive.namelist() and read_record(archive, order) != b"little":
                raise pickle.UnpicklingError("big-endian")
            return unpickler(archive, root).load()
    except OSError:
        raise
    except Exception as e:  # a hostile pickle can raise nearly anything
        raise ValueError(f"{path}: not a readable {what} ({type(e).__name__}: {e})") from None


def read_archive(path):
    """TorchScript archive -> {name: tensor}, without running any of its code.

    Raises ValueError (one line) for a file that is broken or asks for anything but tensors, dicts and lists.
    """
    module = unpickle(path, TensorUnpickler, "TorchScript archive")
    try:
        if not isinstance(module, Module):
            raise pickle.UnpicklingError("holds no module")
        return flatten_modules(module)
    except (pickle.UnpicklingError, RecursionError) as e:
        raise ValueError(f"{path}: not a readable TorchScript archive ({type(e).__name__}: {e})") from None


def read_foreign(path):
    """Training checkpoint of other code (a torch.save of nested dicts) -> its dicts, lists, numbers, strings and tensors.

    Objects of any other class, such as a config or the versions of long-gone packages, come out as inert placeholders:
    nothing of the file is run. Raises ValueError (one line) for a broken file.
    """
    return unpickle(path, TolerantUnpickler, "checkpoint")


def read_state_dict(path):
    """State dict in a TorchScript archive or in a file of torch.save({name: tensor}).

    Raises ValueError (one line) where the file is neither; pickled objects are never built.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if is_torchscript(archive):
                return read_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise ValueError(f"{path}: not a file of weights ({type(e).__name__}: {str(e).splitlines()[0]})") from None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path}: holds no state dict (a dict of tensors was expected)")
    return state


def locate(name):
    """Model name or path -> path of its weights, downloaded and digest-checked where it is a name."""
    if name in MODELS:
        file = name.replace("/", "-") + ".pt"
        return cached_file(URL.format(digest=MODELS[name], file=file), MODELS[name])
    if Path(name).is_file():
        return Path(name)
    raise ValueError(f"--clip {name}: neither a file nor one of {', '.join(MODELS)}")


def load(name):
    """`name` ("ViT-B/16", "ViT-B/32", "ViT-L/14", or a path) -> CLIP in float32 on the CPU, in eval mode."""
    return CLIP.from_state_dict(read_state_dict(locate(name)))
