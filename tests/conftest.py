"""What the tests share: a small drawn dataset, a tiny CLIP, and two ways to run a script."""
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import clip
from eval import note, run, write_label, write_text

CLASSES = ("background", "cat", "dog", "traffic light")
COLOURS = {1: (210, 60, 40), 2: (50, 90, 210), 3: (240, 210, 60)}


def draw_scene(rng, H, W, classes):
    """One plain shape a class, on noise -> photo (H, W, 3) uint8, true mask (H, W) uint8."""
    image = Image.fromarray(rng.integers(90, 130, (H, W, 3), dtype=np.uint8))
    mask = Image.new("L", (W, H))
    for n, k in enumerate(classes):
        r = min(H, W) // 3
        x = int(W * (n + 0.5) / len(classes))
        y = int(rng.integers(r, H - r))
        box = (x - r + 4, y - r + 2, x + r - 4, y + r - 2)
        shape = "rectangle" if k == 2 else "ellipse"
        getattr(ImageDraw.Draw(image), shape)(box, fill=COLOURS[k])
        getattr(ImageDraw.Draw(mask), shape)(box, fill=k)
    return np.array(image), np.array(mask)


def draw_dataset(folder, train=6, val=2, seed=0):
    """A dataset in VOC's layout, with true masks, and `folder`/seeds: masks with an unsure rim."""
    rng, lines = np.random.default_rng(seed), []
    (folder / "JPEGImages").mkdir(parents=True, exist_ok=True)
    for split, n in (("train", train), ("val", val)):
        ids = [f"{split}_{i}" for i in range(n)]
        for i, name in enumerate(ids):
            classes = [1 + i % 3] if i % 2 else [1 + i % 3, 1 + (i + 1) % 3]
            H, W = int(rng.integers(60, 90)), int(rng.integers(90, 120))
            image, mask = draw_scene(rng, H, W, classes)
            Image.fromarray(image).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
            write_label(folder / "SegmentationClass" / f"{name}.png", mask)
            mask[:3] = 255
            write_label(folder / "seeds" / f"{name}.png", mask)
            lines.append(f"{name} " + ", ".join(CLASSES[k] for k in sorted(set(classes))))
        write_text(folder / f"ImageSets/Segmentation/{split}.txt", "\n".join(ids) + "\n")
    write_text(folder / "image_labels.txt", "\n".join(lines) + "\n")
    write_text(folder / "classes.txt", "\n".join(CLASSES) + "\n")
    return folder


def tiny_clip():
    """A CLIP of three narrow blocks with random weights, the same each time."""
    torch.manual_seed(0)
    return clip.CLIP(embed_dim=64, image_resolution=64, vision_layers=3, vision_width=64,
                     transformer_width=64, transformer_layers=1)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return draw_dataset(tmp_path_factory.mktemp("data") / "drawn")


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "tiny.pt"
    torch.save(tiny_clip().state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def nothing_noted_yet():
    """`note` says a text once in a process; each test is to hear it."""
    note.cache_clear()


class Planted:
    """Pickles to a call, which an ordinary reader of pickles makes."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def last_line(said):
    """The last line of what was said, without the progress bars before it."""
    return said.strip().split("\r")[-1].splitlines()[-1]


def script(name, *options, ok=True, env=None):
    """Run a script of the project -> what it printed; of a refused run its line (status 2)."""
    done = subprocess.run([sys.executable, ROOT / name, *map(str, options)], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, **(env or {})})
    assert done.returncode == (0 if ok else 2), done.stderr
    return done.stdout if ok else last_line(done.stderr)


@pytest.fixture()
def call(monkeypatch, capsys):
    """Run a script's main() in this process: call(name, options...) -> as `script`, but sooner."""
    def call(name, *options, ok=True):
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        capsys.readouterr()
        try:
            run(importlib.import_module(name.removesuffix(".py")).main)
        except SystemExit as end:
            said = last_line(capsys.readouterr().err)
            assert not ok and end.code == 2, said
            return said
        assert ok, "it should have been refused"
        return capsys.readouterr().out
    return call


def read_json(path):
    """The value in a JSON file."""
    return json.loads(Path(path).read_text())
