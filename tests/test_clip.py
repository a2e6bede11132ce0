"""Tokenizer, archive reader and downloads of clip/ (features against OpenAI's: test_parity.py)."""
import builtins
import http.server
import os
import pickle
import random
import socket
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
from clip import tokenizer
from clip.archive import Module, TensorUnpickler, flatten_modules
from conftest import ROOT, tiny_clip

# torch.jit is deprecated: only these tests make archives with it
pytestmark = pytest.mark.filterwarnings("ignore")


# ========================================================================================== tokenizer

def test_special_tokens_and_context():
    tokens = clip.tokenize(["a cat", "<|endoftext|> and more"], 8)
    assert tokens.dtype == torch.int64 and tokens[0].tolist() == [49406, 320, 2368, 49407, 0, 0, 0, 0]
    assert tokens[1, 1] == 49407  # stays one token
    with pytest.raises(ValueError, match="12 tokens"):
        clip.tokenize("one two three four five six seven eight nine ten", 8)
    assert clip.tokenize("one two three four five six seven eight nine ten", 8, truncate=True)[0, -1] == 49407


def test_tokens_equal_open_clips():
    open_clip = pytest.importorskip("open_clip", reason="pip install open-clip-torch to compare tokenizers")
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


# ============================================================================================ reading

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


@pytest.mark.parametrize("what, data", list(hostile_pickles()), ids=lambda x: x if isinstance(x, str) else "")
def test_hostile_archives_are_refused(archive, tmp_path, what, data):
    def change(name, old):
        return data if name.endswith("/data.pkl") else old

    bad = rewrite(archive, tmp_path / "bad.pt", change)
    with pytest.raises(ValueError, match="not a readable TorchScript archive"):
        clip.read_state_dict(bad)
    assert not MARK.exists()


def test_short_storages_compressed_records_and_cut_files_are_refused(archive, tmp_path):
    cases = [rewrite(archive, tmp_path / "a.pt", lambda n, d: d[:-1] if "/data/" in n else d),
             rewrite(archive, tmp_path / "b.pt", lambda n, d: None if "/data/" in n else d),
             rewrite(archive, tmp_path / "c.pt", lambda n, d: d, zipfile.ZIP_DEFLATED),
             rewrite(archive, tmp_path / "d.pt", lambda n, d: None if n.endswith("data.pkl") else d),
             rewrite(archive, tmp_path / "e.pt", lambda n, d: b"big" if n.endswith("byteorder") else d)]
    cut = tmp_path / "f.pt"
    cut.write_bytes(archive.read_bytes()[:700])
    for path in (*cases, cut):
        with pytest.raises(ValueError):
            clip.read_state_dict(path)


@pytest.mark.parametrize("size, stride, offset", [
    ((10 ** 9,), (0,), 0), ((4, 4), (4, 1), 1), ((2,), (-1,), 3), ((2, 2), (1,), 0), ((True,), (1,), 0),
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


# =========================================================================================== download

def test_download_once_with_digest(tmp_path):
    source = tmp_path / "there" / "weights.pt"
    source.parent.mkdir()
    source.write_bytes(b"x" * 3_000_000)
    digest, here = clip.file_sha256(source), tmp_path / "cache"
    path = clip.cached_file(source.as_uri(), digest, here)
    assert path.read_bytes() == source.read_bytes()
    source.unlink()
    assert clip.cached_file(source.as_uri(), digest, here) == path  # no second download
    path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="delete the file"):
        clip.cached_file(source.as_uri(), digest, here)


def test_wrong_digest_and_no_network_leave_nothing_behind(tmp_path):
    source = tmp_path / "weights.pt"
    source.write_bytes(b"other")
    with pytest.raises(ValueError, match="another sha256"):
        clip.cached_file(source.as_uri(), "0" * 64, tmp_path / "cache")
    with pytest.raises(OSError, match="cannot download"):
        clip.cached_file((tmp_path / "none.pt").as_uri(), "0" * 64, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="ViT-B/16"):
        clip.load("ViT-Z/99")
