"""Archives of tensors, read without running anything that they hold.

A file that torch writes is a pickle and, beside it, raw numbers ("storages"). Three layouts are
read here:

    zip          torch.save since 2020: <name>/data.pkl, and a record <name>/data/<key> per storage
    TorchScript  the same zip with compiled code beside it; OpenAI's CLIP files are such archives
    legacy       torch.save before that: five pickles, then all storages one after another

A pickle is a program for a small stack machine, and Python's own machine lets it call whatever can
be imported: a stranger's file could do anything. `TensorUnpickler` is a machine that knows the
instructions tensors need and cannot import or call. It believes no number of the file either:
nothing is allocated beyond what the file holds. A record of a zip carries a checksum (CRC-32) that
is tested as it is read, so a flipped bit does not pass.
"""
import io
import math
import os
import pickletools
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch

DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

# Bounds far above any real file (CLIP ViT-L/14: 30,000 steps, 8 deep, 4 dimensions), and low enough
# that a hostile one ends within seconds and some hundred megabytes.
MAX_PICKLE = 16 << 20     # bytes
MAX_STEPS = 500_000       # instructions of the pickle, and values in what it builds
MAX_DEPTH = 32            # dicts in dicts, which also ends a list that holds itself
MAX_DIMENSIONS = 8
MAX_READ = 4 << 20        # bytes asked of the file at once

FETCH_AGAIN = "copy or fetch it again"


# ---------------------------------------------------------------------------------- what a file is

# (offset, first bytes in small letters, what that is, what to do): what people and their tools put
# where weights should be
OTHER_FILES = (
    (8, b'{"', "a safetensors file", "write torch.save(safetensors.torch.load_file(OLD), NEW)"),
    (0, b"<", "a web page", "the download was refused or asked something; fetch the file itself"),
    (0, b"version https://git-lfs", "a Git LFS pointer", "`git lfs pull` fetches what is meant"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it"),
    (0, b"bzh", "a bzip2 archive", "unpack it"),
    (0, b"\xfd7zxz", "an xz archive", "unpack it"),
    (0, b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (0, b"rar!", "a rar archive", "unpack it"),
    (257, b"ustar", "a tar archive", "unpack it"),
    (0, b"\x89hdf", "an HDF5 file", "convert it with torch.save"),
    (0, b"{", "a JSON text", "the download was refused; fetch the file itself"),
    (0, b"\x89png", "a picture", "name the right file"),
    (0, b"\xff\xd8\xff", "a picture", "name the right file"),
)
ZIP = b"PK\x03\x04"


def other_file(head: bytes) -> tuple[str, str] | None:
    """(what it is, what to do) of a file that is none of torch's; None where it may be one.

    head: its first bytes, at least 300 where it has them.
    """
    head = head.removeprefix(b"\xef\xbb\xbf").lower()
    for offset, magic, kind, mend in OTHER_FILES:
        text = head.lstrip() if magic == b"<" else head  # web pages may begin with white space
        if text[offset:offset + len(magic)] == magic:
            return kind, mend
    return None


def shorten(text: str, length: int = 160) -> str:
    """One printable line of at most `length` characters; names in a file may hold anything."""
    line = " ".join(text[:10 * length].split())
    return "".join(c if c.isprintable() else "?" for c in line)[:length]


# --------------------------------------------------------------------------------- a stack machine

class Symbol:
    """A name in a pickle, "module.name". It is compared with names that we know, never imported."""

    def __init__(self, module, name):
        self.module = module
        self.name = name

    def __str__(self):
        return shorten(f"{self.module}.{self.name}")


class Module:
    """A module of a TorchScript archive: its attributes, without behaviour."""

    def __init__(self):
        self.attributes = {}


class Inert:
    """Stands for an object of an unknown class. What the pickle does with it does nothing."""

    def __init__(self, symbol):
        self.symbol = symbol


# instructions whose argument is the value that they push
PUSH = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
        "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINSTRING", "SHORT_BINSTRING"}
# what values may be made of; everything else that lies on the stack is the machine's own
PLAIN = (type(None), bool, int, float, str, bytes, torch.Tensor)
# the functions whose calls are understood; TorchScript writes a typed list as build_intlist([1, 2])
REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2")  # the first is that of torch before 0.4
CALLS = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.jit._pickle", "build_intlist"),
    ("torch.jit._pickle", "build_doublelist"),
    ("torch.jit._pickle", "build_boollist"),
    ("torch.jit._pickle", "build_tensorlist"),
}


class TensorUnpickler:
    """Runs pickles that build tensors, dicts, lists, tuples, strings and numbers, and no others.

    storage(persistent id) -> the 1-d tensor that a pickle refers to; it sees to it that the file
    holds so much.
    elements: how many numbers all tensors of a value may have together. A pickle of a few bytes can
    name one storage a million times, which costs nothing here, but everything as soon as somebody
    copies each.
    modules: a TorchScript archive's classes become `Module`. tolerant: unknown objects become
    `Inert`.
    Raises UnpicklingError, or nearly anything where the pickle is broken.
    """

    def __init__(self, storage, elements, modules=False, tolerant=False):
        self.storage = storage
        self.elements = elements
        self.modules = modules
        self.tolerant = tolerant
        self.steps = 0

    def load(self, stream):
        """The value that the next pickle in `stream` builds.

        Worked example: the dict {"a": 1} is PROTO, EMPTY_DICT, BINUNICODE "a", BININT1 1, SETITEM,
        STOP. The stack goes [], [{}], [{}, "a"], [{}, "a", 1], [{"a": 1}], and its one value is
        what comes back.
        """
        self.stack = []
        self.outer = []  # the stacks below the open marks: what fills a list lies above a mark
        self.memo = {}   # number -> value that is needed again; Python's array believes any number
        for opcode, argument, _ in pickletools.genops(stream):
            self.count_step()
            if opcode.name in PUSH:
                self.stack.append(argument)
            else:
                self.execute(opcode.name, argument)
        value = self.stack.pop()
        self.check(value)
        return value

    def count_step(self):
        """Count an instruction or a value, and refuse where there are too many."""
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise UnpicklingError(f"more than {MAX_STEPS:,} values or instructions")

    def since_mark(self):
        """What was pushed since the last mark; the mark and all above it are gone."""
        items = self.stack
        self.stack = self.outer.pop()
        return items

    def execute(self, name, argument):
        """One instruction that makes a value of those on the stack, or keeps or fetches one."""
        stack = self.stack
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                self.outer.append(stack)
                self.stack = []
            case "TUPLE":
                items = self.since_mark()
                self.stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case _:
                self.build(name, argument)

    def build(self, name, argument):
        """One instruction that fills a container, or one where Python's machine would call."""
        stack = self.stack
        match name:
            # With a mark below: [list, mark, a, b] APPENDS -> [[..., a, b]], and so for dicts.
            case "APPEND":
                item = stack.pop()
                self.extend([item])
            case "APPENDS":
                self.extend(self.since_mark())
            case "SETITEM":
                value = stack.pop()
                key = stack.pop()
                self.set_items(stack[-1], [key, value])
            case "SETITEMS":
                items = self.since_mark()
                self.set_items(self.stack[-1], items)
            # Where Python imports a function and calls it, here a name is compared with CALLS.
            case "GLOBAL":
                stack.append(self.look_up(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                word = stack.pop()
                stack.append(self.look_up(stack.pop(), word))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(self.call(stack.pop(), arguments))
            case "BUILD":
                state = stack.pop()
                self.set_state(stack[-1], state)
            # A storage lies outside of the pickle and is referred to by a "persistent id".
            case "BINPERSID":
                stack.append(self.storage(stack.pop()))
            case _:
                raise UnpicklingError(f"refused: instruction {name}")

    def extend(self, items):
        """Append to the list on top of the stack."""
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is not Inert:
            raise UnpicklingError("appends to what is no list")

    def set_items(self, target, items):
        """Fill a dict from [key, value, key, value, ...].

        Only strings and small integers are keys: a tuple's hash may take for ever (tuples in
        tuples), and long integers can be chosen so that all of them collide.
        """
        if type(target) is Inert:
            return
        if type(target) is not dict:
            raise UnpicklingError("sets an item of what is no dict")
        for key, value in zip(items[::2], items[1::2]):
            if type(key) is str or (type(key) is int and abs(key) < 2 ** 31):
                target[key] = value
            elif not self.tolerant:
                raise UnpicklingError("a key that is neither a string nor a small integer")

    def look_up(self, module, name):
        """A storage's class -> its dtype; any other name, where we know it -> a Symbol."""
        if type(module) is not str or type(name) is not str:
            raise UnpicklingError("a name that is no string")
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        symbol = Symbol(module, name)
        is_module = self.modules and f"{module}.".startswith("__torch__.")
        if (module, name) not in CALLS and not is_module and not self.tolerant:
            raise UnpicklingError(f"refused: {symbol}")
        return symbol

    def call(self, function, arguments):
        """What the few functions that we know would return. None of Python's is called."""
        if type(function) is Inert:
            return function
        if type(function) is not Symbol or type(arguments) is not tuple:
            raise UnpicklingError("calls what is no function")
        if function.module == "torch._utils" and function.name in REBUILD:
            return self.rebuild_tensor(*arguments)
        if function.module == "collections" and function.name == "OrderedDict":
            return self.ordered_dict(*arguments)
        if (function.module, function.name) in CALLS:
            return arguments[0]  # a parameter is its tensor, a size a tuple, a typed list a list
        if self.modules:
            return Module()
        return Inert(function)

    def ordered_dict(self, pairs=()):
        """A dict. Python 3 writes OrderedDict() and then its items, Python 2 OrderedDict(pairs)."""
        out = {}
        for pair in pairs:
            self.count_step()
            if type(pair) is not list or len(pair) != 2:
                raise UnpicklingError("a pair that is none")
            self.set_items(out, pair)
        return out

    def set_state(self, target, state):
        """Give a module its attributes. A state dict's own state (versions) is not needed."""
        if type(target) is Module and type(state) is dict:
            target.attributes = state
        elif type(target) not in (dict, Inert):
            raise UnpicklingError("sets the state of what has none")

    def rebuild_tensor(self, storage, offset, size, stride, grad=False, hooks=None, metadata=None):
        """A view into a storage. Sizes and strides are checked: it lies inside and is no larger."""
        if not isinstance(storage, torch.Tensor) or metadata:
            raise UnpicklingError("a tensor of an unknown kind")
        if type(size) is not tuple or type(stride) is not tuple:
            raise UnpicklingError("a tensor without sizes")
        if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
            raise UnpicklingError(f"a tensor with {len(size)} sizes and {len(stride)} strides")
        for number in (offset, *size, *stride):
            if type(number) is not int or not 0 <= number < 2 ** 48:
                raise UnpicklingError("a tensor whose layout is not made of whole numbers in range")
        # A stride of 0 repeats a number without holding it: the end alone does not bound a size.
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride))
        if count > len(storage) or (count and last >= len(storage)):
            raise UnpicklingError(f"a tensor of size {size} reaches beyond its storage")
        return storage.as_strided(size, stride, offset)

    def check(self, value, depth=0):
        """Refuse what is nested too deep or too large when written out, and what is no value."""
        self.count_step()
        if depth > MAX_DEPTH:
            raise UnpicklingError(f"nested more than {MAX_DEPTH} deep")
        if type(value) is dict:
            inside = value.values()
        elif type(value) is list or type(value) is tuple:
            inside = value
        elif type(value) is Module:
            inside = value.attributes.values()
        elif type(value) in PLAIN or self.tolerant:
            inside = ()
        else:
            raise UnpicklingError(f"holds {shorten(str(value))} as a value")
        if isinstance(value, torch.Tensor):
            self.elements -= value.numel()
            if self.elements < 0:
                raise UnpicklingError("its tensors are together larger than the file")
        for item in inside:
            self.check(item, depth + 1)


# ------------------------------------------------------------------------------- the three layouts

class SmallReads(io.FileIO):
    """A file that hands out a few megabytes at a time.

    zipfile reads a zip's directory at once and makes an object of each entry, which takes twenty
    times the space: only a directory beyond measure is refused here.
    """

    def read(self, size=-1):
        """As FileIO.read. Raises UnpicklingError for too much."""
        if size > MAX_READ:
            raise UnpicklingError("the zip's directory is too large")
        return super().read(size)


def parse_storage_id(pid, length):
    """(key, dtype, count) of a storage, from ("storage", dtype, key, device, count, ...)."""
    if type(pid) is not tuple or len(pid) != length or pid[0] != "storage":
        raise UnpicklingError("refers to something else than a storage")
    _, dtype, key, _, count = pid[:5]
    if pid[5:] not in ((), (None,)):
        raise UnpicklingError("a storage that is a part of another")
    if not isinstance(dtype, torch.dtype) or type(key) is not str:
        raise UnpicklingError("a storage without dtype or key")
    if type(count) is not int or count < 0:
        raise UnpicklingError("a storage without size")
    return key, dtype, count


def fill(memory, source):
    """Read a file into a buffer, in pieces. Raises UnpicklingError where it ends too early."""
    memory = memoryview(memory)
    done = 0
    while done < len(memory):
        count = source.readinto(memory[done:done + MAX_READ])
        if not count:
            raise UnpicklingError("the file ends in the middle of its numbers")
        done += count


class ZipArchive:
    """The records of a zip that torch wrote: one pickle, and storages, each read once."""

    def __init__(self, f):
        size = os.fstat(f.fileno()).st_size
        self.zip = zipfile.ZipFile(f)
        stored = [i for i in self.zip.infolist() if i.compress_type == zipfile.ZIP_STORED]
        # records may lie on top of each other, or claim any size: in sum they can be no larger than
        # the file
        if sum(i.file_size for i in stored) > size:
            raise UnpicklingError("its records are together larger than the file")
        self.names = set(self.zip.namelist())
        pickles = [n for n in self.names if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UnpicklingError("a zip, but not of torch.save: no data.pkl")
        self.root = pickles[0].split("/")[0]
        self.storages = {}
        if self.has("byteorder") and self.read("byteorder", 16) != b"little":
            raise UnpicklingError("big-endian numbers")

    def has(self, name):
        """True where there is such a record."""
        return f"{self.root}/{name}" in self.names

    def is_torchscript(self):
        """True where compiled code may lie beside the pickle."""
        return self.has("constants.pkl")

    def find(self, name):
        """The zip's entry of a record. torch stores them as they are; a zip bomb does not."""
        if not self.has(name):
            raise UnpicklingError(f"record {shorten(name)} is missing")
        info = self.zip.getinfo(f"{self.root}/{name}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise UnpicklingError(f"compressed record {shorten(name)}")
        return info

    def read(self, name, limit):
        """Bytes of a small record."""
        info = self.find(name)
        if info.file_size > limit:
            raise UnpicklingError(f"record {name} is larger than {limit:,} bytes")
        data = bytearray(info.file_size)
        with self.zip.open(info) as source:
            fill(data, source)
        return bytes(data)

    def pickle(self):
        """The pickle of the saved value, as a file in memory."""
        return io.BytesIO(self.read("data.pkl", MAX_PICKLE))

    def storage(self, pid):
        """The 1-d tensor of a storage; zipfile compares its checksum when the last byte is read."""
        key, dtype, count = parse_storage_id(pid, 5)
        if key not in self.storages:
            info = self.find(f"data/{key}")
            size = count * dtype.itemsize
            if info.file_size != size:
                raise UnpicklingError(f"storage {shorten(key)} has not {size} bytes")
            tensor = torch.empty(count, dtype=dtype)
            with self.zip.open(info) as source:
                fill(tensor.view(torch.uint8).numpy(), source)
            self.storages[key] = tensor
        if self.storages[key].dtype != dtype or len(self.storages[key]) != count:
            raise UnpicklingError(f"storage {shorten(key)} is used as two kinds of numbers")
        return self.storages[key]


class LegacyFile:
    """A file of torch.save's first format. It has no checksums: a flipped bit goes unnoticed."""

    MAGIC = 0x1950A86A20F9469CFC6C  # the value of its first pickle
    FIRST_BYTES = b"\x80\x02\x8a\x0a" + MAGIC.to_bytes(10, "little")

    def __init__(self, f):
        self.file = f
        self.left = os.fstat(f.fileno()).st_size
        self.storages = {}

    def storage(self, pid):
        """The 1-d tensor of a storage. Its numbers come last in the file: `read_storages`."""
        key, dtype, count = parse_storage_id(pid, 6)
        if key not in self.storages:
            self.left -= count * dtype.itemsize
            if self.left < 0:
                raise UnpicklingError("its storages are together larger than the file")
            self.storages[key] = torch.empty(count, dtype=dtype)
        if self.storages[key].dtype != dtype or len(self.storages[key]) != count:
            raise UnpicklingError(f"storage {shorten(key)} is used as two kinds of numbers")
        return self.storages[key]

    def read(self, machine):
        """The saved value: the fourth of five pickles (format, version, system, value, keys)."""
        self.file.seek(0)
        start = bytearray(min(self.left, MAX_PICKLE))
        fill(start, self.file)
        stream = io.BytesIO(start)
        machine.load(stream)
        machine.load(stream)
        system = machine.load(stream)
        if type(system) is not dict or system.get("little_endian") is not True:
            raise UnpicklingError("big-endian numbers")
        value = machine.load(stream)
        keys = machine.load(stream)
        self.file.seek(stream.tell())
        self.read_storages(keys)
        return value

    def read_storages(self, keys):
        """Fill the storages, each of which stands behind its length."""
        if type(keys) is not list or sorted(self.storages) != sorted(keys):
            raise UnpicklingError("its list of storages is wrong")
        for key in keys:
            tensor = self.storages[key]
            if int.from_bytes(self.file.read(8), "little") != len(tensor):
                raise UnpicklingError(f"storage {shorten(key)} has another length than it should")
            fill(tensor.view(torch.uint8).numpy(), self.file)


# -------------------------------------------------------------------------------------- the way in

def read_value(path, what, mend, modules=False, tolerant=False):
    """The value in a file of torch's, whatever its layout.

    what, mend: what the file should be and what to do where it is not, for the ValueError.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    with SmallReads(path) as f:
        head = f.read(512)
        if not head:
            raise ValueError(f"{path}: empty, not a {what}; {mend}")
        other = other_file(head)
        if other:
            raise ValueError(f"{path}: {other[0]}, not a {what}; {other[1]}")
        elements = os.fstat(f.fileno()).st_size
        try:
            if head.startswith(ZIP):
                archive = ZipArchive(f)
                if modules and archive.is_torchscript():
                    what = "TorchScript archive"
                    machine = TensorUnpickler(archive.storage, elements, modules=True)
                    return flatten_modules(machine.load(archive.pickle()))
                machine = TensorUnpickler(archive.storage, elements, tolerant=tolerant)
                return machine.load(archive.pickle())
            if head.startswith(LegacyFile.FIRST_BYTES):
                legacy = LegacyFile(f)
                return legacy.read(TensorUnpickler(legacy.storage, elements, tolerant=tolerant))
            raise UnpicklingError("no file of torch.save")
        except Exception as e:  # a hostile or broken file can raise nearly anything
            reason = str(e) if isinstance(e, UnpicklingError) else f"{type(e).__name__}: {e}"
            raise ValueError(f"{path}: not a readable {what} ({shorten(reason)}); {mend}") from None


def flatten_modules(module, prefix="", seen=None):
    """Module tree -> {dotted name: tensor}. A module met twice (a loop, a blow-up) is refused."""
    if not isinstance(module, Module):
        raise UnpicklingError("holds no module")
    seen = set() if seen is None else seen
    if id(module) in seen:
        raise UnpicklingError(f"module {shorten(prefix)} stands twice in the tree")
    seen.add(id(module))
    out = {}
    for name, value in module.attributes.items():
        if isinstance(value, torch.Tensor):
            out[f"{prefix}{name}"] = value
        elif isinstance(value, Module):
            out |= flatten_modules(value, f"{prefix}{name}.", seen)
    return out


def read_tensors(path: str | Path, what: str = "file of tensors", mend: str = FETCH_AGAIN):
    """Value that torch.save wrote: nested dicts, lists and tuples of tensors, numbers, strings,
    bytes, True and None.

    what, mend: what the file should be and what to do where it is not, for the message.
    Raises ValueError (one line) for a file that is broken or holds anything else.
    """
    return read_value(path, what, mend)


def read_foreign(path: str | Path):
    """Training checkpoint of other code -> its dicts, lists, tuples, numbers, strings and tensors.

    Objects of any other class, such as a config or the versions of long-gone packages, come out as
    `Inert`: nothing of the file is run. Raises ValueError (one line) for a broken file.
    """
    return read_value(path, "checkpoint", FETCH_AGAIN, tolerant=True)


# a training script's checkpoint keeps the weights under one of these names
WRAPPERS = ("state_dict", "model", "model_state_dict")


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of a TorchScript archive, of a torch.save of weights, or of a training
    checkpoint with weights.

    Names lose the prefix `module.` that DataParallel gives them. Raises ValueError (one line) for
    any other file.
    """
    state = read_value(path, "file of weights", FETCH_AGAIN, modules=True, tolerant=True)
    for name in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(name), (dict, Inert)):
            state = state[name]
    if isinstance(state, Inert):
        raise ValueError(f"{path}: not a file of weights, but an object of {state.symbol}; "
                         "save its state_dict() where its code is at hand")
    if not is_state_dict(state):
        raise ValueError(f"{path}: not a file of weights: "
                         "holds no state dict (a dict of tensors was expected)")
    prefix = "module."
    if all(k.startswith(prefix) for k in state):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def is_state_dict(value) -> bool:
    """True for a dict of tensors by name, with at least one."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())
