"""The drawn world, the CLIP that ships with it, and a reduced run of the whole chain."""
import hashlib

import numpy as np

import toy
import toy_world
from eval import find_dataset, read_label


def test_a_world_is_a_function_of_its_seed(tmp_path):
    """The same seed draws the same bytes, another one other photos; masks are exact."""
    digests = {}
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        toy_world.draw_world(tmp_path / name, seed, train=4, val=2)
        files = [path for path in sorted((tmp_path / name).rglob("*")) if path.is_file()]
        digests[name] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    assert digests["a"] == digests["b"] != digests["c"]
    data = find_dataset(tmp_path / "a")
    for image_id, labels in data.image_labels(data.ids("train")).items():
        mask = read_label(data.truth_path(image_id), len(data.classes))
        assert sorted(set(np.unique(mask)) - {0}) == labels


def test_the_clip_that_ships_is_whole_and_small(tmp_path):
    """Its file is the one that the digest names."""
    weights = toy_world.small_clip(tmp_path)
    assert weights.is_file() and toy_world.WEIGHTS.stat().st_size <= 8e6


def test_every_entry_of_the_ablation_is_a_switch():
    """Each can be given to stage 2 as it stands."""
    from stage2_weakclip import choose_switches
    for name, options in toy.entries().items():
        variant = "released" if name == "released" else "paper"
        choose_switches(variant, options[1:] if options[:1] == ["--set"] else [])


def test_a_reduced_chain(tmp_path, capsys):
    """All steps run, a row comes out of each, and the last line is the report's path."""
    rows = toy.chain(tmp_path, 0, toy.SMALL, ["--device", "cpu"])
    assert list(rows) == list(toy.ROWS) and all(0 < miou < 100 for miou in rows.values())
    said = capsys.readouterr().out.strip().splitlines()
    assert said[-1].endswith("report.html") and sum("left in all" in line for line in said) == 4
