"""Tokenizer, archive reader and downloads of clip/ (features against OpenAI's: test_parity.py)."""
import builtins
import http.server
import os
import pickle
import random
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import clip
import stage1_cam as stage1
import torchvision
from clip import tokenizer
from clip.archive import Module, TensorUnpickler, flatten_modules
from conftest import ROOT, tiny_clip

# torch.jit is deprecated: only these tests make archives with it
pytestmark = pytest.mark.filterwarnings("ignore")


# ======================================================================================== tokenizer

def test_special_tokens_and_context():
    tokens = clip.tokenize(["a cat", "<|endoftext|> and more"], 8)
    assert tokens.dtype == torch.int64
    assert tokens[0].tolist() == [49406, 320, 2368, 49407, 0, 0, 0, 0]
    assert tokens[1, 1] == 49407  # stays one token
    long = "one two three four five six seven eight nine ten"
    with pytest.raises(ValueError, match="12 tokens"):
        clip.tokenize(long, 8)
    assert clip.tokenize(long, 8, truncate=True)[0, -1] == 49407


def test_tokens_equal_open_clips():
    open_clip = pytest.importorskip("open_clip", reason="pip install open-clip-torch to compare")
    texts = ["A photo of a cat.", "naïve café", "don't", "東京 2020", "x" * 60,
             "a\tb\n c &amp;amp; d", "🐱🐱 cats!!!", ""]
    assert torch.equal(clip.tokenize(texts), open_clip.SimpleTokenizer()(texts))


def test_the_worked_example_of_the_tokenizer():
    ranks, ids = tokenizer.vocabulary()
    parts, seen = list("cat") + ["s</w>"], []
    for pair in (("a", "t"), ("at", "s</w>"), ("c", "ats</w>")):
        parts = tokenizer.join(parts, pair)
        seen.append((" ".join(parts), ranks[pair]))
    assert seen == [("c at s</w>", 15), ("c ats</w>", 520), ("cats</w>", 3477)]
    assert tokenizer.merge("cats") == ("cats</w>",) and ids["cats</w>"] == 512 + 3477 == 3989
    assert (ranks["t", "s</w>"], ranks["c", "a"], ranks["c", "at"]) == (78, 260, 969)
    assert len(ids) == 49408 and len(tokenizer.byte_symbols()) == 256


def test_nothing_is_built_at_import_and_the_vocabulary_is_checked(tmp_path, monkeypatch):
    code = "import clip.tokenizer as t; assert t.vocabulary.cache_info().currsize == 0"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    broken = tmp_path / "vocabulary.gz"
    broken.write_bytes(b"no vocabulary")
    monkeypatch.setattr(tokenizer, "VOCABULARY", broken)
    tokenizer.vocabulary.cache_clear()
    with pytest.raises(ValueError, match="sha256"):
        clip.tokenize("cat")
    tokenizer.vocabulary.cache_clear()


# ========================================================================================== reading

class Attributes(nn.Module):
    """A module tree with what OpenAI's archives have: halves, scalars, shared storage, nesting."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.table = nn.Parameter(torch.arange(12.0).view(3, 4).half())
        self.register_buffer("input_resolution", torch.tensor(64))
        self.register_buffer("turned", torch.arange(6.0).view(2, 3).T)
        self.sizes = [1, 2, 3]

    def forward(self, x):
        return self.inner(x)


@pytest.fixture()
def archive(tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.script(Attributes()).save(str(path))
    return path


def test_torchscript_archive_is_read_without_running_it(archive, monkeypatch):
    expected = torch.jit.load(archive).state_dict()
    monkeypatch.setattr(torch.jit, "load", None)
    monkeypatch.setattr(torch, "load", None)
    state = clip.read_state_dict(archive)
    assert set(state) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0)


def test_clip_from_a_traced_archive_in_half(tmp_path):
    """An archive in OpenAI's format: traced, fp16, three extra scalars."""
    model = tiny_clip().eval()
    wanted = {k: v.half() for k, v in model.state_dict().items()}
    for name, value in (("input_resolution", 64), ("vocab_size", 49408)):
        model.register_buffer(name, torch.tensor(value))
    example = torch.randn(1, 3, 64, 64), clip.tokenize("a cat")
    traced = torch.jit.trace(model, example, check_trace=False)
    traced.half().save(str(tmp_path / "clip.pt"))
    loaded = clip.load(str(tmp_path / "clip.pt"))
    assert not loaded.training and all(p.dtype == torch.float32 for p in loaded.parameters())
    for name, value in wanted.items():
        assert torch.equal(loaded.state_dict()[name], value.float()), name


def test_sizes_of_other_models_load():
    """ViT-B/32 and ViT-L/14 differ from ViT-B/16 in sizes only (here: shrunk by 32)."""
    for patch, resolution, width, layers in ((32, 224, 64, 12), (14, 224, 128, 24)):
        model = clip.CLIP(
            embed_dim=16, image_resolution=resolution, vision_layers=layers, vision_width=width,
            vision_patch_size=patch, transformer_width=64, transformer_layers=2, vocab_size=100)
        again = clip.CLIP.from_state_dict(model.state_dict())
        x = torch.randn(1, 3, resolution, resolution)
        torch.testing.assert_close(again.encode_image(x), model.encode_image(x))


def test_missing_and_foreign_keys_are_named():
    state = tiny_clip().state_dict()
    with pytest.raises(ValueError, match="ln_final.bias"):
        clip.CLIP.from_state_dict({k: v for k, v in state.items() if k != "ln_final.bias"})
    with pytest.raises(ValueError, match="stranger"):
        clip.CLIP.from_state_dict({**state, "stranger": torch.zeros(1)})
    with pytest.raises(ValueError, match="visual"):
        clip.CLIP.from_state_dict({"fc.weight": torch.zeros(1)})


def rewrite(source, target, change, compression=zipfile.ZIP_STORED):
    """Copy an archive record by record; change(name, bytes) -> bytes or None to leave it out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return target


MARK = Path(tempfile.gettempdir()) / "weakclip-should-not-exist"


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def hostile_pickles():
    yield "os.system", pickle.dumps(Evil(os.system, f"touch {MARK}"))
    yield "eval", pickle.dumps(Evil(builtins.eval, "1 + 1"))
    yield "getattr", pickle.dumps(Evil(getattr, "x", "upper"))
    yield "torch.load", pickle.dumps(Evil(torch.load, "x"))
    yield "no module", pickle.dumps({"a": 1})
    yield "not a pickle", b"\x80\x02garbage"
    yield "empty", b""
    yield "deep", b"\x80\x02" + b"(" * 100_000 + b"."


@pytest.mark.parametrize("data", [pytest.param(d, id=what) for what, d in hostile_pickles()])
def test_hostile_archives_are_refused(archive, tmp_path, data):
    def change(name, old):
        return data if name.endswith("/data.pkl") else old

    bad = rewrite(archive, tmp_path / "bad.pt", change)
    with pytest.raises(ValueError, match="not a readable TorchScript archive"):
        clip.read_state_dict(bad)
    assert not MARK.exists()


def test_short_storages_compressed_records_and_cut_files_are_refused(archive, tmp_path):
    cases = [
        rewrite(archive, tmp_path / "a.pt", lambda n, d: d[:-1] if "/data/" in n else d),
        rewrite(archive, tmp_path / "b.pt", lambda n, d: None if "/data/" in n else d),
        rewrite(archive, tmp_path / "c.pt", lambda n, d: d, zipfile.ZIP_DEFLATED),
        rewrite(archive, tmp_path / "d.pt", lambda n, d: None if n.endswith("data.pkl") else d),
        rewrite(archive, tmp_path / "e.pt", lambda n, d: b"big" if n.endswith("byteorder") else d),
    ]
    cut = tmp_path / "f.pt"
    cut.write_bytes(archive.read_bytes()[:700])
    for path in (*cases, cut):
        with pytest.raises(ValueError):
            clip.read_state_dict(path)


@pytest.mark.parametrize("size, stride, offset", [
    ((10 ** 9,), (0,), 0), ((4, 4), (4, 1), 1), ((2,), (-1,), 3), ((2, 2), (1,), 0),
    ((True,), (1,), 0),
    ((1,) * 9, (1,) * 9, 0), ([4], [1], 0), ((2 ** 60,), (1,), 0), ((0, 2 ** 60), (1, 1), 0)])
def test_tensor_layouts_stay_inside_the_storage(size, stride, offset):
    with pytest.raises(pickle.UnpicklingError):
        TensorUnpickler(None, 0).rebuild_tensor(torch.arange(16.0), offset, size, stride)


def test_a_module_that_holds_itself_is_refused():
    m = Module()
    m.attributes = {"me": m}
    with pytest.raises(pickle.UnpicklingError, match="twice"):
        flatten_modules(m)


def test_plain_state_dict_files(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"a": torch.ones(2)}, path)
    assert torch.equal(clip.read_state_dict(path)["a"], torch.ones(2))
    torch.save({"a": Evil(print, "x")}, path)
    with pytest.raises(ValueError, match="not a file of weights"):
        clip.read_state_dict(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="state dict"):
        clip.read_state_dict(path)
    with pytest.raises(ValueError, match="no such file"):
        clip.read_state_dict(tmp_path / "none.pt")


# ======================================================================== damaged and hostile files

def small_clip():
    """The smallest CLIP there is: what is tried hundreds of times is read in a few milliseconds."""
    torch.manual_seed(0)
    return clip.CLIP(embed_dim=8, image_resolution=32, vision_layers=1, vision_width=64,
                     context_length=8, vocab_size=50, transformer_width=64, transformer_layers=1)


def training_state():
    """What the stages save: weights, optimizer, plain facts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    facts = {"stage": "1_cam", "classes": ["background", "cat"], "crop": 64, "big": 1 << 70}
    return {"step": 4, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "facts": facts}


def equal(a, b):
    """True for the same nested value with the same numbers, bit for bit."""
    if type(a) is not type(b):
        return isinstance(a, dict) and isinstance(b, dict) and equal(dict(a), dict(b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return a == b


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("make", [small_clip, training_state])
def test_what_torch_saves_is_read(tmp_path, make, legacy):
    value = make() if make is training_state else make().state_dict()
    torch.save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    assert equal(clip.read_tensors(tmp_path / "x.pt"), value)
    assert equal(clip.read_foreign(tmp_path / "x.pt"), value)
    torch.save(value, tmp_path / "x.pt", pickle_protocol=4)
    assert equal(clip.read_tensors(tmp_path / "x.pt"), value)


def test_every_dtype_parameters_and_views_are_read(tmp_path):
    base = torch.arange(24.0)
    dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16,
              torch.int8, torch.uint8, torch.bool)
    value = {str(dtype): base.to(dtype) for dtype in dtypes}
    value |= {"view": base.view(4, 6)[1:3, ::2].T, "tied": base, "empty": torch.zeros(0, 3),
              "scalar": torch.tensor(2.0), "size": base.shape,
              "parameter": nn.Parameter(base.clone())}
    torch.save(value, tmp_path / "x.pt")
    read = clip.read_tensors(tmp_path / "x.pt")
    assert all(torch.equal(read[k], v) for k, v in value.items() if isinstance(v, torch.Tensor))
    assert read["size"] == (24,) and read["view"].stride() == value["view"].stride()


def test_a_file_that_python_2_wrote_is_read(tmp_path):
    """Old .pth files: byte strings, and OrderedDict([[name, tensor], ...]) in one call."""
    path = tmp_path / "x.pth"
    torch.save({"a": torch.arange(3.0)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    new = b"}q\x00X\x01\x00\x00\x00aq\x01"
    start = data.index(new)
    end = data.index(b"s.", start)
    # a list of one pair, made by a mark and two appends: ([["a", tensor]],)
    old = b"ccollections\nOrderedDict\n(]]U\x01aa" + data[start + len(new):end] + b"aatR"
    path.write_bytes(data[:start] + old + data[end + 1:])
    assert equal(clip.read_tensors(path), {"a": torch.arange(3.0)})
    assert equal(torch.load(path, weights_only=True), clip.read_tensors(path))


@pytest.mark.parametrize("make", [small_clip, training_state])
def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path, make):
    """300 bits anywhere in the file: refused in one line that names it, or the same numbers."""
    value = make() if make is training_state else make().state_dict()
    path, rng, refused = tmp_path / "x.pt", random.Random(0), 0
    torch.save(value, path)
    sound = path.read_bytes()
    for _ in range(300):
        data = bytearray(sound)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            assert equal(clip.read_tensors(path), value)
        except ValueError as e:
            refused += 1
            assert str(e).startswith(f"{path}: ") and "\n" not in str(e)
    assert refused > 150


def test_a_flipped_bit_says_what_to_do(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(1000)}, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="x.pt: not a readable .*CRC.*; copy or fetch it again"):
        clip.read_state_dict(path)


OTHER_FILES = {
    "empty": b"",
    "a web page": b"  \n<!DOCTYPE html><html>quota exceeded</html>",
    "a web page ": b"\xef\xbb\xbf<HTML>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a gzip archive": b"\x1f\x8b\x08\0",
    "a tar archive": b"a" * 257 + b"ustar\0",
    "a safetensors file": struct.pack("<Q", 60) + b'{"a":{"dtype":"F32"',
    "a JSON text": b'{"message": "Not Found"}',
    "a picture": b"\x89PNG\r\n\x1a\n",
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_other_files_are_called_what_they_are(tmp_path, kind):
    path = tmp_path / "w.pt"
    path.write_bytes(OTHER_FILES[kind])
    for read in (clip.read_state_dict, clip.read_tensors, clip.read_foreign, clip.load):
        with pytest.raises(ValueError) as e:
            read(path)
        assert str(e.value).startswith(f"{path}: {kind.strip()}, not a ") and "; " in str(e.value)
        assert "weights_only" not in str(e.value) and "\n" not in str(e.value)


def test_other_zips_and_cut_files_are_refused(tmp_path):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("a.npy", b"x")
    with pytest.raises(ValueError, match="a zip, but not of torch.save"):
        clip.read_state_dict(path)
    for legacy in (False, True):
        torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=not legacy)
        sound = path.read_bytes()
        for size in (1, 4, 30, 100, 1000, len(sound) - 1):
            path.write_bytes(sound[:size])
            with pytest.raises(ValueError, match="w.pt: not a readable file of weights"):
                clip.read_state_dict(path)


def test_weights_are_found_in_a_training_checkpoint(tmp_path):
    """Under state_dict or model, with DataParallel's prefix, beside objects that are not built."""
    path, state = tmp_path / "w.pt", {"a": torch.ones(2), "b": torch.zeros(1)}
    prefixed = {f"module.{k}": v for k, v in state.items()}
    for saved in (prefixed, {"state_dict": prefixed}, {"model_state_dict": state},
                  {"model": state, "epoch": 3, "args": Path("x")}):
        torch.save(saved, path)
        assert equal(clip.read_state_dict(path), state)
    for saved in ({}, {"a": 1}, {"state_dict": {}}, {3: torch.ones(1)}, "x"):
        torch.save(saved, path)
        with pytest.raises(ValueError, match="w.pt: not a file of weights: holds no state dict"):
            clip.read_state_dict(path)
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match="object of torch.nn.modules.linear.Linear; save its"):
        clip.read_state_dict(path)


def test_unknown_objects_are_refused_or_inert(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": Evil(os.system, f"touch {MARK}"), "step": 3}, path)
    with pytest.raises(ValueError, match="not a readable checkpoint .refused: .*system.; delete"):
        clip.read_tensors(path, "checkpoint", "delete it")
    read = clip.read_foreign(path)
    assert read["step"] == 3 and type(read["a"]).__name__ == "Inert" and not MARK.exists()


def torch_zip(path, data, records=()):
    """A zip as torch.save writes it, around a pickle of our own."""
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("x/data.pkl", data)
        for name, content in records:
            z.writestr(f"x/data/{name}", content)


def words(*parts):
    """Pickle instructions from bytes and, for strings, the instruction that pushes them."""
    return b"".join(p if isinstance(p, bytes) else b"X" + struct.pack("<I", len(p)) + p.encode()
                    for p in parts)


def persistent(count, legacy=False):
    """A storage of `count` floats, `count` as a long integer."""
    number = b"\x8a\x08" + struct.pack("<q", count)
    return words(b"(", "storage", b"ctorch\nFloatStorage\n", "0", "cpu", number,
                 b"N" * legacy, b"tQ")


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n("
LAUGHS = b")q\x00" + b"h\x00h\x00\x86q\x00" * 60  # ((...), (...)), each twice the one inside
COLLIDING = b"".join(b"\x8a\x0c" + (i * (2 ** 61 - 1)).to_bytes(12, "little") + b"N"
                     for i in range(1, 30_000))
ONE = persistent(262_144)  # a megabyte
WHOLE = b"K\x00J\x00\x00\x04\x00\x85K\x01\x85\x89NtR"  # offset 0, size (262144,), stride (1,)
SEVENTY = b"(" + b"K\x01" * 70 + b"t"
INT_LIST = b"ctorch.jit._pickle\nbuild_intlist\n"


def hostile_files(folder):
    """Files of at most a few megabytes that ask for gigabytes, or for ever."""
    pickles = {
        "memo index": b"}r\xff\xff\xff\x7f.",
        "memo index fetched": b"}j\xff\xff\xff\x7f.",
        "deep lists": b"]" * 200_000 + b"a" * 199_999 + b".",
        "list in itself": b"]q\x00h\x00a.",
        "a million laughs": LAUGHS + b".",
        "laughs as a key": b"}" + LAUGHS + b"Ns.",
        "laughs as a storage": LAUGHS + b"Q.",
        "laughs as a name": b"c" + b"a" * 1_000_000 + b"\nb\n.",
        "colliding keys": b"}(" + COLLIDING + b"u.",
        "dicts": b"]" + b"(" + b"}" * 3_000_000 + b"e.",
        "marks": b"(" * 3_000_000 + b".",
        "claimed string": b"X\xff\xff\xff\xffabc.",
        "claimed long string": b"\x8d" + b"\xff" * 7 + b"\x00abc.",
        "claimed integer": b"\x8b\xff\xff\xff\x7fabc.",
        "endless digits": b"L" + b"9" * 1_000_000 + b"L\n.",
        "claimed storage": persistent(2 ** 60) + b".",
        "negative storage": persistent(-1) + b".",
        "one list, typed again": b"](" + b"K\x01" * 50_000 + b"eq\x00" + INT_LIST + b"q\x01("
                                 + b"h\x01h\x00\x85R" * 50_000 + b"t.",
        "one storage, again": b"](" + ONE + b"q\x00" + b"h\x00" * 50_000 + b"e.",
        "one tensor, again": b"](" + TENSOR + ONE + WHOLE + b"q\x00" + b"h\x00" * 50_000 + b"e.",
        "seventy dimensions": TENSOR + ONE + b"K\x00" + SEVENTY + SEVENTY + b"\x89NtR.",
        "stretched tensor": TENSOR + ONE + b"K\x00J\x00\x00\x00\x40\x85K\x00\x85\x89NtR.",
    }
    for name, data in pickles.items():
        torch_zip(folder / name, b"\x80\x02" + data, [("0", bytes(1 << 20))] if ONE in data else ())
    torch_zip(folder / "directory", b"\x80\x02}.", [(f"{i:050}", b"") for i in range(60_000)])
    torch.save({"a": torch.ones(1)}, folder / "legacy", _use_new_zipfile_serialization=False)
    sound = (folder / "legacy").read_bytes()
    at = sound.index(b"cpuq\x06K\x01") + 5
    huge = b"\x8a\x06" + b"\xff" * 5 + b"\x00"
    (folder / "legacy").write_bytes(sound[:at] + huge + sound[at + 2:])
    overlapping_records(folder / "records")
    wide = small_clip().state_dict() | {"visual.conv1.weight": torch.zeros(64_000, 1, 1, 16)}
    torch.save(wide, folder / "wide")


def overlapping_records(path, count=3000):
    """A zip whose directory names one megabyte `count` times; its pickle asks for all of them."""
    floats, size = b"ctorch\nFloatStorage\n", b"J\x00\x00\x04\x00"
    storages = [words(b"(", "storage", floats, str(i), "cpu", size, b"tQ") for i in range(count)]
    pickled = b"\x80\x02](" + b"".join(storages) + b"e."
    torch_zip(path, pickled, [("0", bytes(1 << 20))])
    data = path.read_bytes()
    with zipfile.ZipFile(path) as z:
        info, start = z.getinfo("x/data/0"), z.start_dir
    end = data.index(b"PK\x05\x06")
    entry = data[data.index(b"PK\x01\x02", data.index(b"PK\x01\x02", start) + 4):end]
    directory = data[start:end]
    for i in range(1, count):
        name = f"x/data/{i}".encode()
        directory += entry[:28] + struct.pack("<H", len(name)) + entry[30:46] + name
    numbers = (0, 0, count + 1, count + 1, len(directory), start, 0)
    last = b"PK\x05\x06" + struct.pack("<HHHHIIH", *numbers)
    path.write_bytes(data[:start] + directory + last)
    assert info.file_size == 1 << 20


BOUNDED = """
import resource, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import clip
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (1 << 30), held + (1 << 30)))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for path in sorted(Path(sys.argv[2]).iterdir()):
    for read in (clip.read_tensors, clip.read_foreign, clip.read_state_dict, clip.load):
        start, before = time.process_time(), peak()
        try:
            read(path)
            said = "read"
        except ValueError as e:
            said = str(e)
            assert said.startswith(f"{path}: ") and len(said.splitlines()) == 1, said
        seconds = round(time.process_time() - start, 2)
        print(path.name, read.__name__, seconds, peak() - before, said, sep="|")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_hostile_files_take_neither_memory_nor_time(tmp_path):
    """Each is refused (or read as the little that it is) within 5 s and 400 MB more than before."""
    folder = tmp_path / "files"
    folder.mkdir()
    hostile_files(folder)
    (tmp_path / "read.py").write_text(BOUNDED)
    command = [sys.executable, tmp_path / "read.py", ROOT, folder]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    r = subprocess.run(command, capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stderr[-2000:]
    rows = [line.split("|", 4) for line in r.stdout.splitlines()]
    assert len(rows) == 4 * len(list(folder.iterdir()))
    assert not [row for row in rows if float(row[2]) > 5 or int(row[3]) > 400]
    # a place in the memo costs nothing here, and "wide" is sound until its sizes are compared
    loaded = {row[0] for row in rows if row[1] in ("read_tensors", "load") and row[4] == "read"}
    assert loaded == {"memo index", "wide"} and "MemoryError" not in r.stdout
    assert ["wide"] == [row[0] for row in rows if "do not fit" in row[4]]


# ========================================================================================= download

def test_download_once_with_digest(tmp_path):
    source = tmp_path / "there" / "weights.pt"
    source.parent.mkdir()
    source.write_bytes(b"x" * 3_000_000)
    digest, here = clip.file_sha256(source), tmp_path / "cache"
    path = clip.cached_file(source.as_uri(), digest, "--clip FILE", here)
    assert path.read_bytes() == source.read_bytes()
    source.unlink()
    assert clip.cached_file(source.as_uri(), digest, "--clip FILE", here) == path  # no second download
    path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="delete the file"):
        clip.cached_file(source.as_uri(), digest, "--clip FILE", here)


def test_wrong_digest_and_no_network_leave_nothing_behind(tmp_path):
    source = tmp_path / "weights.pt"
    source.write_bytes(b"other")
    with pytest.raises(ValueError, match="another sha256"):
        clip.cached_file(source.as_uri(), "0" * 64, "--clip FILE", tmp_path / "cache")
    with pytest.raises(OSError, match="cannot download"):
        clip.cached_file((tmp_path / "none.pt").as_uri(), "0" * 64, "--clip FILE", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_leftovers_of_killed_downloads_are_removed(tmp_path):
    source, here = tmp_path / "weights.pt", tmp_path / "cache"
    source.write_bytes(b"x" * 10)
    here.mkdir()
    old, new, other = (here / n for n in ("weights.pt.1.part", "weights.pt.2.part", "b.pt.1.part"))
    for part in (old, new, other):
        part.write_bytes(b"half")
    for part in (old, other):
        os.utime(part, (time.time() - 7200,) * 2)
    clip.cached_file(source.as_uri(), clip.file_sha256(source)[:8], "--clip FILE", here)
    assert {p.name for p in here.iterdir()} == {"weights.pt", new.name, other.name}


class CutShort(http.server.BaseHTTPRequestHandler):
    """Promises a hundred bytes, sends ten and hangs up."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"x" * 10)

    def log_message(self, *args):
        pass


def test_a_connection_that_breaks_or_is_refused_is_one_line(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), CutShort) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/w.pt"
        with pytest.raises((ValueError, OSError), match="w.pt"):
            clip.cached_file(url, "0" * 64, "--clip FILE", tmp_path)
        server.shutdown()
    with pytest.raises(OSError, match=f"cannot download {url} .*; fetch it elsewhere and put it"):
        clip.cached_file(url, "0" * 64, "--clip FILE", tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="ViT-B/16"):
        clip.load("ViT-Z/99")


# ======================================================================== weights of stages 1 and 3

def resnet_file(path, change):
    state = torchvision.models.resnet18().state_dict()
    torch.save(change(state), path)
    return state


def without_fc(state):
    return {k: v for k, v in state.items() if not k.startswith("fc.")}


@pytest.mark.parametrize("change", [
    without_fc,
    lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
    lambda state: {"model": state},
    lambda state: {**state, "fc.weight": torch.zeros(5, 512), "fc.bias": torch.zeros(5)},
])
def test_resnet_weights_as_people_have_them(tmp_path, change):
    state = resnet_file(tmp_path / "w.pth", change)
    net = stage1.resnet("resnet18", str(tmp_path / "w.pth"), (None, 1))
    assert equal(without_fc(net.state_dict()), without_fc(state))


def test_weights_of_another_architecture_are_named(tmp_path):
    resnet_file(tmp_path / "w.pth", without_fc)
    for arch in ("resnet34", "resnet50"):
        with pytest.raises(ValueError, match=f"w.pth: not the weights of a {arch} ") as e:
            stage1.resnet(arch, str(tmp_path / "w.pth"), (None, 1))
        assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_imagenet_weights_come_from_torchs_cache_and_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    place = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    place.parent.mkdir()
    place.write_bytes(b"cut")
    with pytest.raises(ValueError, match="resnet18-f37072fd.pth: cut or changed, .* delete the"):
        stage1.resnet("resnet18", "imagenet", (None, 1))
    resnet_file(place, lambda state: state)
    monkeypatch.setattr(clip.weights, "file_sha256", lambda path: "f37072fd" + "0" * 56)
    assert stage1.imagenet_file("resnet18") == place
    stage1.resnet("resnet18", "imagenet", (None, 1))


def test_a_damaged_checkpoint_says_how_to_go_on(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for content in (b"", b"PK\x03\x04", b"x" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="checkpoint.pt: .*afresh$"):
            stage1.read_checkpoint(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match="it holds no dict.; if a run left it so, delete it"):
        stage1.read_checkpoint(path)
