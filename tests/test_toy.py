"""The small world: what it draws, the CLIP that ships with it, and a reduced run of the whole chain."""
import dataclasses
import hashlib
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import stage1_cam as stage1
import stage2_weakclip as stage2
import stage3_segment as stage3
import toy
import toy_world
from conftest import ROOT, read_json
from eval import find_dataset, read_label


def digests(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_a_world_is_a_function_of_its_seed(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        toy_world.draw_world(tmp_path / name, seed, train=4, val=2)
    a, b, c = (digests(tmp_path / n) for n in "abc")
    assert a == b and a.keys() == c.keys()
    assert all(a[k] != c[k] for k in a if k.parts[0] == "JPEGImages")


def test_a_world_is_a_dataset_with_exact_masks(tmp_path):
    toy_world.draw_world(tmp_path / "w", 0, train=30, val=10)
    data = find_dataset(tmp_path / "w")
    train, val = data.ids("train"), data.ids("val")
    assert (len(train), len(val)) == (30, 10) and not set(train) & set(val)
    seen, several = set(), 0
    for i, labels in data.image_labels(train + val).items():
        mask = read_label(data.truth_path(i), len(data.classes), data.image(i).shape[:2])
        assert sorted(set(np.unique(mask)) - {0}) == labels  # image-level labels say what the mask shows
        assert mask.shape == (128, 128) and (mask == 0).any()
        seen, several = seen | set(labels), several + (len(labels) > 1)
    assert len(data.classes) == 9 and len(seen) == 8 and several >= 5


def test_places_go_with_classes_but_do_not_tell_them():
    """Context co-occurs: at home a class is the commonest, and still not alone."""
    rng, counts = np.random.default_rng(1), np.zeros((8, 8))
    for _ in range(800):
        _, _, (place, things) = toy_world.scene(rng)
        for name, _ in things:
            counts[list(toy_world.PLACES).index(place), toy_world.CLASSES.index(name) - 1] += 1
    home = [toy_world.CLASSES.index(toy_world.PLACES[p][2]) - 1 for p in toy_world.PLACES]
    share = counts[range(8), home] / counts.sum(1)
    assert (counts.argmax(1) == home).all() and share.max() < 0.75 and (counts > 0).all()


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    toy_world.unpack_weights(path)
    return clip.load(path)


def test_the_shipped_clip_knows_the_classes(small_clip):
    assert toy_world.WEIGHTS.stat().st_size <= 8e6
    assert small_clip.visual.conv1.kernel_size == (16, 16)
    assert toy_world.zero_shot(small_clip, 64) > 85  # chance 12.5


def test_every_word_of_a_caption_was_trained(small_clip):
    rng = np.random.default_rng(2)
    captions = [toy_world.caption(*toy_world.scene(rng)[2], rng) for _ in range(60)]
    assert len(set(captions)) > 30 and any(" and " in c for c in captions) and any("background" in c for c in captions)
    rows = set(torch.load(toy_world.WEIGHTS, weights_only=True)["token_rows"].tolist())
    assert set(clip.tokenize([*captions, *toy_world.CLASSES]).unique().tolist()) <= rows


def test_a_damaged_clip_is_refused(tmp_path, monkeypatch):
    (tmp_path / "toy_clip.pt").write_bytes(toy_world.WEIGHTS.read_bytes()[:-1])
    monkeypatch.setattr(toy_world, "WEIGHTS", tmp_path / "toy_clip.pt")
    with pytest.raises(ValueError, match="sha256"):
        toy.prepare(tmp_path, 0, toy.SMALL)


def test_ablations_name_every_switch_of_the_released_code():
    for name, options in toy.entries().items():
        stage2.choose_switches("paper", [o for o in options if "=" in o])  # every field and value exists
    released = {f.name for f in dataclasses.fields(stage2.RELEASED) if getattr(stage2.RELEASED, f.name) != getattr(toy.PAPER, f.name)}
    named = {n.split("=")[0] for n in toy.entries()}
    parts = {"prompts", "adapter", "coattention", "text_guidance", "boundary_weight", "score_weight"}
    assert released | parts == (named | toy.NO_EFFECT.keys()) - {"paper", "released"} and not named & toy.NO_EFFECT.keys()


def test_ablation_table():
    rows = {f"{n}, {s}, {split}": {"miou": v + s} for n, v in (("paper", 40), ("prompts=false", 30)) for s in (0, 2)
            for split in ("train", "val")}
    rows = {k.replace(", 2,", ", 1,"): v for k, v in rows.items()}
    table = toy.ablation_table(rows, "toy0", 2).splitlines()
    assert table[4:6] == ["| paper | 41.0 ± 1.4 | 41.0 ± 1.4 |  |  |",
                          "| prompts=false | 31.0 ± 1.4 | 31.0 ± 1.4 | -10.0 ± 0.0 | -10.0 ± 0.0 |"]  # seed by seed
    del rows["paper, 0, train"]  # an interrupted run: what is not complete is not told
    table = toy.ablation_table(rows, "toy0", 2)
    assert "| paper |" not in table and "| prompts=false | 31.0 ± 1.4 | 31.0 ± 1.4 |  |  |" in table
    assert "| prompts=false | 30.0 | 30.0 |" in toy.ablation_table(rows, "toy0", 1)


def test_a_world_or_table_of_another_version_is_refused(tmp_path, monkeypatch):
    toy_world.draw_world(tmp_path / "w", 0, train=4, val=2)
    toy_world.draw_world(tmp_path / "w", 0, train=4, val=2)
    table = toy.Rows(tmp_path / "rows.json", {"lr": 1}, "cpu")
    table.add("a", tmp_path / "w", tmp_path / "w/SegmentationClass", "val")
    assert toy.Rows(tmp_path / "rows.json", {"lr": 1}, "cpu").rows["a"]["miou"] == 100
    with pytest.raises(ValueError, match="other settings"):
        toy.Rows(tmp_path / "rows.json", {"lr": 2}, "cpu")
    with pytest.raises(ValueError, match="--device cpu"):
        toy.Rows(tmp_path / "rows.json", {"lr": 1}, "cuda")
    (tmp_path / "w/SegmentationClass/00004.png").unlink()
    with pytest.raises(ValueError, match="missing"):
        table.add("b", tmp_path / "w", tmp_path / "w/SegmentationClass", "val")
    monkeypatch.setattr(toy_world.scene, "__defaults__", (*toy_world.scene.__defaults__[:-1], (0, 0.7, 0.25, 0.05)))  # other counts
    with pytest.raises(ValueError, match="another version"):
        toy_world.draw_world(tmp_path / "w", 0, train=4, val=2)


@pytest.mark.parametrize("name", toy_world.CLASSES[1:])
def test_every_class_tells_a_world_from_another(name, monkeypatch):
    drawn, parts = toy_world.drawing_digest(0), toy_world.parts
    monkeypatch.setattr(toy_world, "parts", lambda n, c, rng: ([], []) if n == name else parts(n, c, rng))
    assert toy_world.drawing_digest(0) != drawn


def test_a_failed_ablation_stops_the_others(tmp_path, monkeypatch):
    started = []

    def stage(script, *options, log=None, threads=None):
        if log:
            started.append(log)
            raise ValueError("stage 2 failed")
    monkeypatch.setattr(toy, "stage", stage)
    with pytest.raises(ValueError, match="stage 2 failed"):
        toy.ablate(tmp_path, 0, {**toy.SMALL, "train": 4, "val": 2})
    assert len(started) <= toy.os.cpu_count()


def test_exercises_start_from_the_settings_of_the_chain():
    command = " ".join((ROOT / "tests/EXERCISES.md").read_text().replace("\\\n", " ").split())
    assert " ".join([*toy.FULL["stage 2"], *toy.VIEWS]) in command


def test_the_chain_from_clip_is_three_stages_in_a_folder_of_their_own(tmp_path, monkeypatch):
    """What the reduced run leaves out, for its time: the commands, as the stages read them."""
    ran, scored = [], []
    monkeypatch.setattr(toy, "stage", lambda script, *options: ran.append((script, list(map(str, options)))))
    rows = SimpleNamespace(machine=["--device", "cpu"], missing=lambda name: True, add=lambda *given: scored.append(given))
    data, own = tmp_path / "data" / "toy0", tmp_path / "toy0" / "from_clip"
    toy.chain_from_clip(data, tmp_path, tmp_path / "clip.pt", toy.SMALL, rows)
    read = {"stage1_cam.py": stage1.parse_args, "stage2_weakclip.py": stage2.parse_args, "stage3_segment.py": stage3.parse_args}
    assert [script for script, _ in ran] == list(read)
    args = [read[script](options) for script, options in ran]
    assert {a.runs for a in args} == {own} and args[0].method == "clip" and args[0].clip == args[1].clip
    assert args[1].label_filter and args[2].weights == str(tmp_path / "toy0" / "resnet18.pt")
    folders = [own / "toy0" / folder for folder in ("1_cam/seeds", "2_weakclip/masks/train", "3_segment/masks/val")]
    assert [(given[2], given[3]) for given in scored] == list(zip(folders, ("train", "train", "val")))


def test_the_stages_do_not_know_the_toy():
    for name in ("eval.py", "stage1_cam.py", "stage2_weakclip.py", "stage3_segment.py"):
        assert "toy" not in (ROOT / name).read_text().lower()


def test_the_chain_in_a_reduced_world(tmp_path, monkeypatch):
    """Masks beat seeds; a second run makes nothing again; an ablation runs and leaves its table."""
    rows = toy.chain(tmp_path, 0, toy.SMALL)
    assert rows["1 seeds"]["miou"] < rows["2 masks + CRF"]["miou"]
    assert rows["1 seeds"]["n"] == rows["1 CRF on CAMs"]["n"] == 120
    assert rows["1 seeds"]["miou"] < rows["2 masks + label filter"]["miou"]
    assert {r["split"] for n, r in rows.items() if n.startswith("3 ")} == {"val"}
    stages = {r["stage"] for r in read_json(tmp_path / "small0/metrics.json")["rows"]}
    assert stages == {"1_cam", "2_weakclip", "3_segment", "crf_on_cams", "upper_bound/small0/3_segment"}
    assert (tmp_path / "small0/report.html").is_file()

    before, start = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")}, time.time()
    assert toy.chain(tmp_path, 0, toy.SMALL) == rows and time.time() - start < 30
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")} == before

    toy.ablate(tmp_path, 0, toy.SMALL, ["paper", "prompts=false"], 1)
    table = (tmp_path / "ablate/small0/ablations.md").read_text()
    assert "| paper |" in table and "| prompts=false |" in table

    toy.picture(tmp_path, 0, toy.SMALL, tmp_path / "chain.png")
    with Image.open(tmp_path / "chain.png") as drawn:
        assert drawn.size == (6 * 132, 16 + 4 * 132)


def test_the_picture_of_the_readme_is_small():
    assert "tests/chain.png" in (ROOT / "README.md").read_text()
    assert (ROOT / "tests/chain.png").stat().st_size <= 200_000
