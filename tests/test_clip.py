"""Tokenizer, files of weights, downloads of clip/ (features against OpenAI's: test_parity.py)."""
import functools
import http.server
import os
import threading
import zipfile
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import clip
from clip import tokenizer
from conftest import Planted, tiny_clip

# torch.jit is deprecated: only these tests make archives with it
pytestmark = pytest.mark.filterwarnings("ignore")
same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)  # also of dicts


# ======================================================================================== tokenizer

def test_a_row_is_start_text_end_and_zeros():
    tokens = clip.tokenize(["A  cat"], 8)
    same(tokens, torch.tensor([[49406, 320, 2368, 49407, 0, 0, 0, 0]]))
    with pytest.raises(ValueError, match="8 tokens with start and end, the context has 7"):
        clip.tokenize(["one two three four five six"], 7)


def test_the_worked_example():
    ranks, ids = tokenizer.vocabulary()
    merges = "a t, t s</w>, c a, at s</w>, c at, c ats</w>".split(", ")
    assert [ranks[tuple(pair.split())] for pair in merges] == [15, 78, 260, 520, 969, 3477]
    assert tokenizer.merge("cats") == ("cats</w>",)
    assert ids["cats</w>"] == 512 + 3477 == 3989


@pytest.mark.parametrize("text, symbols", [
    ("traffic light", "traffic</w> light</w>"),
    ("aeroplane", "aerop lane</w>"),
    ("diningtable", "din ing table</w>"),
    ("don't, 2020!", "don</w> 't</w> ,</w> 2</w> 0</w> 2</w> 0</w> !</w>"),
    ("naïve", "na Ã¯ ve</w>"),
    ("&amp;amp; <|endoftext|>", "&</w> <|endoftext|>"),
])
def test_what_texts_become(text, symbols):
    _, ids = tokenizer.vocabulary()
    assert tokenizer.encode(text) == [ids[symbol] for symbol in symbols.split()]


def test_tokens_equal_open_clips():
    open_clip = pytest.importorskip("open_clip", reason="pip install open-clip-torch to compare")
    texts = ["A photo of a cat.", "don't", "東京 2020", "x" * 60, "a\tb\n &amp;amp;", "🐱🐱 cats!!!"]
    assert torch.equal(clip.tokenize(texts), open_clip.SimpleTokenizer()(texts))


def test_the_vocabulary_is_openais():
    digest = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    assert clip.file_sha256(tokenizer.VOCABULARY) == digest


# ============================================================================================ model

def test_sizes_are_read_from_the_weights_and_heads_are_64_wide():
    model = clip.CLIP(embed_dim=16, vision_layers=2, vision_width=192, vision_patch_size=14,
                      transformer_width=128, transformer_layers=1)
    again = clip.CLIP.from_state_dict(model.state_dict())
    assert again.visual.transformer.resblocks[1].attn.heads == 3
    assert again.transformer.resblocks[0].attn.heads == 2
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(again.encode_image(x), model.encode_image(x))


@pytest.mark.parametrize("name, value, said", [
    ("ln_final.bias", None, "ln_final.bias"),
    ("visual.conv1.weight", None, "missing or wrong: 'visual.conv1.weight'"),
    ("stranger", torch.zeros(1), "stranger"),
    ("visual.proj", torch.zeros(3, 3), "visual.proj"),
    ("text_projection", torch.zeros(3), "missing or wrong"),
    ("epoch", 3, "wanted is OpenAI's ViT-B-16.pt or its state dict"),
    ("text_model.bias", torch.zeros(1), "text_model.bias"),
])
def test_missing_and_foreign_keys_are_named(tmp_path, name, value, said):
    state = tiny_clip().state_dict() | {name: value}
    path = tmp_path / "w.pt"
    torch.save({k: v for k, v in state.items() if v is not None}, path)
    with pytest.raises(ValueError, match=f"^{path}: .*{said}.*$"):
        clip.load(path)


# ============================================================================================ files

def save_legacy(value, path):
    """As torch.save did before version 1.6."""
    torch.save(value, path, _use_new_zipfile_serialization=False)


def save_archive(model, path):
    """In OpenAI's format: traced, fp16, with extra scalars."""
    for name in clip.model.EXTRA_KEYS:
        model.register_buffer(name, torch.tensor(64))
    example = torch.randn(1, 3, 64, 64), clip.tokenize(["a cat"])
    torch.jit.trace(model, example, check_trace=False).half().save(str(path))


BOTH = pytest.mark.parametrize("save", [torch.save, save_legacy])


def test_an_archive_is_read_as_torch_reads_it_without_its_code(tmp_path, monkeypatch):
    model = tiny_clip().eval()
    wanted = {k: v.half().float() for k, v in model.state_dict().items()}
    path = tmp_path / "clip.pt"
    save_archive(model, path)
    expected = torch.jit.load(path).state_dict()
    monkeypatch.setattr(torch.jit, "load", None)
    same(clip.read_file(path, "CLIP"), expected)
    loaded, digest = clip.load(path)
    assert digest == clip.file_sha256(path)
    same(loaded.state_dict(), wanted)
    assert not loaded.training and loaded.logit_scale.requires_grad


@BOTH
def test_plain_files_are_read_as_torch_reads_them(tmp_path, save):
    base = torch.arange(24.0)
    kinds = (torch.half, torch.bfloat16, torch.double, torch.long, torch.int, torch.short,
             torch.int8, torch.uint8, torch.bool)
    state = {str(kind): base.to(kind) for kind in kinds}
    state |= {"base": base, "view": base.view(4, 6)[1:3, ::2].T}
    state |= {"empty": torch.zeros(0, 3), "parameter": nn.Parameter(torch.tensor(2.0))}
    path = tmp_path / "w.pt"
    save(state, path)
    same(clip.read_file(path, "weights"), torch.load(path, weights_only=True))
    save(tiny_clip().state_dict(), path)
    same(clip.load(path)[0].state_dict(), tiny_clip().state_dict())


def save_as_archive(value, path):
    """A zip that torch takes for a TorchScript archive."""
    torch.save(value, path)
    with zipfile.ZipFile(path, "a") as z:
        z.writestr("w/constants.pkl", b"")


@pytest.mark.parametrize("save", [torch.save, save_legacy, save_as_archive])
def test_a_planted_call_is_not_made(tmp_path, save):
    path = tmp_path / "w.pt"
    ran = tmp_path / "ran"
    save({"a": torch.ones(2), "b": Planted(os.mkdir, str(ran))}, path)
    with pytest.raises(ValueError, match=f"^{path}: "):
        clip.load(path)
    assert not ran.exists()
    if save is not save_as_archive:
        torch.load(path, weights_only=False)
        assert ran.exists()  # it was a live one


class ConfigDict(dict):
    """As mmcv's."""


@BOTH
def test_foreign_objects_are_inert_and_tensors_come_out_right(tmp_path, save):
    config = ConfigDict(lr=1)
    config.name = "x"
    meta = [config, deque("ab"), {3}, Path("x"), np.float64(0.5), np.arange(3)]
    path = tmp_path / "w.pt"
    save({"meta": meta, "state_dict": {"w": torch.arange(4)}}, path)
    read = clip.read_file(path, "checkpoint")
    same(read["state_dict"]["w"], torch.arange(4))
    assert all(isinstance(value, clip.weights.Inert) for value in read["meta"])


def refused(path):
    """Reading is refused in one line."""
    with pytest.raises(ValueError, match=f"^{path}: not a readable CLIP .*[)]$"):
        clip.read_file(path, "CLIP")


@BOTH
def test_cut_files_and_tensors_beyond_their_storage_are_refused(tmp_path, save):
    path = tmp_path / "w.pt"
    save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-200])
    refused(path)
    for size in (4, 2 ** 40, 2 ** 62, -1):
        layout = torch.ones(3).storage(), 0, (size,), (1,), False, {}
        save({"a": Planted(torch._utils._rebuild_tensor_v2, *layout)}, path)
        refused(path)


@pytest.mark.parametrize("content", [
    b"", b"\x80", b"PK\x03\x04", b"x" * 500, b"<html><body>no</body></html>", b"a: 1\nb: 2\n",
    b"\x80\x02}q\x00.", bytes(range(256)), b"\x80\x02" + b"(" * 9999, b"\x80\x02cos\nsystem\n.",
])
def test_what_is_no_file_of_torchs_is_refused(tmp_path, content):
    (tmp_path / "w.pt").write_bytes(content)
    refused(tmp_path / "w.pt")


def test_other_zips_folders_and_absent_files_are_refused(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.ones(3))
    for name in ("w.npz", "", "none.pt"):
        refused(tmp_path / name)


# ======================================================================================== downloads

DIGEST = "9a129038"  # of the seven bytes below


@pytest.fixture()
def url(tmp_path):
    """Of a file on a server in this process."""
    (tmp_path / "w.pt").write_bytes(b"weights")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/w.pt"
        server.shutdown()


def test_a_file_is_fetched_once_and_compared_at_each_use(tmp_path, url):
    folder = tmp_path / "a" / "b"
    path = clip.fetch(url, DIGEST, folder, "--clip FILE")
    assert path.read_bytes() == b"weights"
    (tmp_path / "w.pt").unlink()
    assert clip.fetch(url, clip.file_sha256(path), folder, "--clip FILE") == path
    path.write_bytes(b"weig")
    with pytest.raises(ValueError, match=f"^{path}: cut or changed, .*; delete the file, it is"):
        clip.fetch(url, DIGEST, folder, "--clip FILE")


@pytest.mark.parametrize("name, digest, folder, reason", [
    ("w.pt", "00000000", "there", "invalid hash value"),
    ("none.pt", DIGEST, "there", "404"),
    ("w.pt", DIGEST, "file/there", "Not a directory"),
    ("w.pt", DIGEST, "~/there", "home"),
])
def test_a_failed_download_is_one_line(tmp_path, url, monkeypatch, name, digest, folder, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # no such user, as in a container
    Path("file").touch()
    url = url.replace("w.pt", name)
    said = f"^cannot fetch {url} to {folder}/{name} [(].*{reason}.*[)]; .* give --clip FILE$"
    with pytest.raises(ValueError, match=said):
        clip.fetch(url, digest, folder, "--clip FILE")
    assert not list(tmp_path.glob("there/*"))


def test_names_of_models_and_files(monkeypatch):
    digest = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
    assert (clip.weights.NAME, clip.weights.DIGEST) == ("ViT-B/16", digest)
    asked = []
    monkeypatch.setattr(clip.weights, "fetch", lambda *given: asked.append(given) or Path(__file__))
    with pytest.raises(ValueError, match="not a readable CLIP"):
        clip.load("ViT-B/16")
    url = f"https://openaipublic.azureedge.net/clip/models/{digest}/ViT-B-16.pt"
    assert asked == [(url, digest, "~/.cache/clip", "--clip FILE")]
    with pytest.raises(ValueError, match="ViT-L/14: neither a file nor ViT-B/16"):
        clip.load("ViT-L/14")
