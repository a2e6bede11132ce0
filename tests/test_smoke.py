"""The scripts run as a user runs them, on a drawn dataset, and their files are read back. Bad input ends in one line."""
import importlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import eval as evaluation
import stage1_cam as stage1
import stage2_weakclip as stage2
import stage3_segment as stage3
from conftest import CLASSES, ROOT, draw_dataset, read_json, script, tiny_clip
from eval import find_dataset, read_label, write_label

SMALL = {"stage1_cam.py": ["--weights", "none", "--arch", "resnet18", "--iters", 4, "--batch-size", 2, "--crop", 64],
         "stage2_weakclip.py": ["--iters", 4, "--batch-size", 2, "--crop", 64, "--scales", 0.5, 1],
         "stage3_segment.py": ["--weights", "none", "--arch", "resnet18", "--iters", 4, "--batch-size", 2, "--crop", 64, "--scales", 1],
         "eval.py": []}


@pytest.fixture(scope="module")
def chain(dataset, clip_file, tmp_path_factory):
    """The four commands, one after the other -> (runs folder of the dataset, options of each script)."""
    runs = tmp_path_factory.mktemp("runs")
    options = {name: ["--data", dataset, "--runs", runs, *small] for name, small in SMALL.items()}
    options["stage2_weakclip.py"] += ["--clip", clip_file]
    for name, given in options.items():
        script(name, *given)
    return runs / dataset.name, options


def test_the_chain_leaves_the_files_of_the_design(chain, dataset):
    folder, _ = chain
    data = find_dataset(str(dataset))
    train, val = data.ids("train"), data.ids("val")
    assert sorted(p.name for p in folder.iterdir()) >= ["1_cam", "2_weakclip", "3_segment", "metrics.csv", "metrics.json"]
    files = lambda path: sorted(p.name for p in (folder / path).iterdir())
    common = ["args.json", "checkpoint.pt", "log.jsonl", "preview.png"]
    assert files("1_cam") == sorted([*common, "cams", "seeds"])
    assert files("2_weakclip") == files("3_segment") == sorted([*common, "masks"])
    assert files("2_weakclip/masks") == ["train", "val"] and files("3_segment/masks") == ["val"]
    masks = {"1_cam/seeds": train, "2_weakclip/masks/train": train, "2_weakclip/masks/val": val, "3_segment/masks/val": val}
    for path, ids in masks.items():
        assert files(path) == sorted(f"{i}.png" for i in ids)
        for i in ids:
            with Image.open(folder / path / f"{i}.png") as im:
                assert im.mode == "P" and im.getpalette()[3:6] == [128, 0, 0]
            read_label(folder / path / f"{i}.png", 4, data.image(i).shape[:2])
    for i, labels in data.image_labels(train).items():
        with np.load(folder / "1_cam" / "cams" / f"{i}.npz") as z:
            H, W = data.image(i).shape[:2]
            assert z["keys"].dtype == np.uint8 and z["keys"].tolist() == labels
            assert z["cam"].dtype == np.float16 and z["cam"].shape == (len(labels), -(-H // 4), -(-W // 4))
            assert 0 <= z["cam"].min() and z["cam"].max() <= 1


def test_args_and_logs_say_what_happened(chain):
    folder, _ = chain
    losses = {"1_cam": ["loss_multilabel"], "2_weakclip": ["loss_seeding", "loss_boundary", "loss_score"],
              "3_segment": ["loss_cross_entropy"]}
    for stage, names in losses.items():
        said = read_json(folder / stage / "args.json")
        assert said["options"]["iters"] == 4 and said["options"]["seed"] == 0 and said["versions"]["torch"] == torch.__version__
        assert {"train", "classes"} <= said["digests"].keys() and said["device"] and said["provenance"]["iters"] == 4
        lines = [json.loads(line) for line in (folder / stage / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 3]
        for line in lines:
            assert list(line) == ["step", "lr", "loss", *names]
            assert line["loss"] == pytest.approx(sum(line[n] for n in names), abs=1e-5)
        with Image.open(folder / stage / "preview.png") as im:
            assert im.mode == "RGB" and im.width > 300 and im.height > 300
    assert len(read_json(folder / "2_weakclip" / "args.json")["digests"]["clip"]) == 64


def test_checkpoints_hold_the_trained_parts_only(chain):
    saved = stage1.read_checkpoint(chain[0] / "2_weakclip" / "checkpoint.pt")
    assert saved["step"] == 4 and not any(k.startswith("clip.") for k in saved["model"])
    assert {k.split(".")[0] for k in saved["model"]} == {"adapter", "contexts", "coattention", "gamma", "beta", "decoder"}


def test_metrics_carry_their_provenance(chain):
    rows = read_json(chain[0] / "metrics.json")["rows"]
    assert [(r["stage"], r["split"], r["n"], r["of"]) for r in rows] == [
        ("1_cam", "train", 6, 6), ("2_weakclip", "train", 6, 6), ("2_weakclip", "val", 2, 2), ("3_segment", "val", 2, 2)]
    for r in rows:
        assert {"truth", "scales", "flip", "crf", "label_filter", "iters", "miou", "pixel_accuracy", "iou"} <= r.keys()
        assert list(r["iou"]) == list(CLASSES) and 0 <= r["miou"] <= 100 and r["truth"] == "SegmentationClass" and r["iters"] == 4
    assert rows[0]["label_filter"] and not rows[0]["crf"] and rows[1]["crf"] and rows[1]["scales"] == [0.5, 1]


def test_a_finished_stage_says_so_and_another_option_is_refused(chain, call):
    folder, options = chain
    for name in SMALL:
        if name == "eval.py":
            continue
        stage = {"1": "1_cam", "2": "2_weakclip", "3": "3_segment"}[name[5]]
        before = {p: p.stat().st_mtime_ns for p in (folder / stage).rglob("*")}
        assert "finished" in call(name, *options[name])
        said = call(name, *options[name], "--iters", 5, ok=False)
        assert "iters = 4, now it is 5" in said and "--overwrite" in said
        assert before == {p: p.stat().st_mtime_ns for p in (folder / stage).rglob("*")}


def test_a_run_of_before_accumulate_goes_on_as_one_without(chain, call, tmp_path):
    folder, options = copy_runs(chain, tmp_path)
    record = read_json(folder / "3_segment" / "args.json")
    assert record["options"].pop("accumulate") == 1
    evaluation.write_json(folder / "3_segment" / "args.json", record)
    assert "finished" in call("stage3_segment.py", *options["stage3_segment.py"])
    said = call("stage3_segment.py", *options["stage3_segment.py"], "--accumulate", 2, ok=False)
    assert "accumulate = 1, now it is 2" in said


def copy_runs(chain, tmp_path):
    """(folder, options) of a copy of the chain's runs, to be changed."""
    folder, options = chain
    shutil.copytree(folder, tmp_path / "runs" / folder.name)
    options = {n: [tmp_path / "runs" if o == folder.parent else o for o in given] for n, given in options.items()}
    return tmp_path / "runs" / folder.name, options


def test_masks_are_rewritten_when_only_mask_options_change(chain, call, tmp_path):
    folder, options = copy_runs(chain, tmp_path)
    out, given = folder / "2_weakclip", options["stage2_weakclip.py"]
    checkpoint = (out / "checkpoint.pt").read_bytes()
    call("stage2_weakclip.py", *given, "--no-crf", "--no-flip", "--label-filter", "--save-probs")
    options_now = read_json(out / "args.json")["options"]
    assert options_now["no_crf"] and options_now["no_flip"] and options_now["iters"] == 4
    assert (out / "checkpoint.pt").read_bytes() == checkpoint
    data = find_dataset(options["eval.py"][1])
    for i, labels in data.image_labels(data.ids("train")).items():
        mask = read_label(out / "masks" / "train" / f"{i}.png")
        assert set(np.unique(mask)) <= {0, *labels}
        with np.load(out / "probs" / "train" / f"{i}.npz") as z:
            assert z["prob"].dtype == np.float16 and z["prob"].shape[1:] == mask.shape
            won = z["keys"][z["prob"].argmax(0)]
            assert (won == mask).mean() > 0.99  # but for ties in float16
    call("eval.py", *options["eval.py"])
    rows = {(r["stage"], r["split"]): r for r in read_json(folder / "metrics.json")["rows"]}
    assert rows["2_weakclip", "train"]["label_filter"] and not rows["2_weakclip", "train"]["crf"]
    assert not rows["2_weakclip", "val"]["label_filter"] and (out / "preview.png").is_file()


def test_an_interrupted_run_goes_on(chain, call, tmp_path):
    folder, options = copy_runs(chain, tmp_path)
    masks = folder / "2_weakclip" / "masks" / "train"
    lost = masks / "train_3.png"
    before = lost.read_bytes()
    lost.unlink()
    stage1.mark_unfinished(folder / "2_weakclip")
    kept = {p: p.stat().st_mtime_ns for p in masks.iterdir()}
    call("stage2_weakclip.py", *options["stage2_weakclip.py"])
    assert lost.read_bytes() == before and kept.items() <= {p: p.stat().st_mtime_ns for p in masks.iterdir()}.items()


def test_a_finished_run_that_lost_a_mask_makes_it_again(chain, call, tmp_path):
    folder, options = copy_runs(chain, tmp_path)
    lost = folder / "2_weakclip" / "masks" / "val" / "val_1.png"
    before = lost.read_bytes()
    lost.unlink()
    assert "masks of train, val" in call("stage2_weakclip.py", *options["stage2_weakclip.py"]) and lost.read_bytes() == before
    assert "finished" in call("stage2_weakclip.py", *options["stage2_weakclip.py"])


def test_weights_are_known_by_what_they_hold(call, dataset, tmp_path):
    """A ResNet's file may lie elsewhere when a run goes on, but it must be the same."""
    net = torchvision.models.resnet18()
    first, moved = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save(net.state_dict(), first)
    options = ["--data", dataset, "--runs", tmp_path / "runs", *SMALL["stage1_cam.py"]]
    options[options.index("--weights") + 1] = first
    call("stage1_cam.py", *options)
    first.rename(moved)
    options[options.index(first)] = moved
    assert "finished" in call("stage1_cam.py", *options)
    torch.save({**net.state_dict(), "fc.bias": torch.ones(1000)}, moved)
    assert "weights" in call("stage1_cam.py", *options, ok=False)


def test_a_stage_names_the_next_command_and_it_works(call, dataset, clip_file, tmp_path):
    """Options go along where the next stage must know them."""
    options = ["--data", dataset, "--runs", tmp_path, "--limit", 2]
    said = call("stage1_cam.py", *options, "--method", "clip", "--clip", clip_file)
    name, *words = shlex.split(said.split("Next: python ")[1])
    assert name == "stage2_weakclip.py" and words == [*map(str, options), "--clip", str(clip_file)]
    said = call(name, *words, *SMALL[name])
    assert shlex.split(said.split("Next: python ")[1]) == ["stage3_segment.py", *map(str, options)]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("given", [[], ["--dataa", "x"], ["--data", "x", "--seed", "one"], ["--data"]])
def test_a_wrong_option_is_one_line(name, given, capsys):
    """An error like every other, not the page of usage that argparse prints."""
    with pytest.raises(ValueError, match="--help explains"):
        importlib.import_module(name.removesuffix(".py")).parse_args(given)
    assert capsys.readouterr() == ("", "")


def test_finished_is_what_args_json_says(call, dataset, tmp_path):
    """No picture or mask says so; an args.json of before there was the word is taken up again, and nothing is made twice."""
    options = ["--data", dataset, "--runs", tmp_path, *SMALL["stage1_cam.py"]]
    folder = tmp_path / dataset.name / "1_cam"
    assert not stage1.is_finished(folder)
    stage1.mark_unfinished(folder)
    assert not folder.exists()                                                        # nothing there to take back
    assert "Next:" in call("stage1_cam.py", *options) and stage1.is_finished(folder)
    args = read_json(folder / "args.json")
    (folder / "preview.png").unlink()
    assert "finished" in call("stage1_cam.py", *options) and not (folder / "preview.png").exists()
    made = {p: p.stat().st_mtime_ns for p in [*folder.glob("*/*"), folder / "checkpoint.pt"]}
    evaluation.write_json(folder / "args.json", {k: v for k, v in args.items() if k != "finished"})
    assert not stage1.is_finished(folder) and "Next:" in call("stage1_cam.py", *options) and stage1.is_finished(folder)
    assert (folder / "preview.png").is_file() and made == {p: p.stat().st_mtime_ns for p in made}
    stage1.mark_unfinished(folder)
    assert not stage1.is_finished(folder) and read_json(folder / "args.json") == {**args, "finished": False}
    stage1.mark_finished(folder)
    assert read_json(folder / "args.json") == args


def test_overwrite_starts_afresh(chain, call, tmp_path):
    folder, options = copy_runs(chain, tmp_path)
    call("stage3_segment.py", *options["stage3_segment.py"], "--iters", 2, "--overwrite")
    assert stage1.read_checkpoint(folder / "3_segment" / "checkpoint.pt")["step"] == 2


def test_a_finished_run_predicts_further_lists(chain, call, tmp_path):
    folder, options = copy_runs(chain, tmp_path)
    given, out = options["stage3_segment.py"], folder / "3_segment" / "masks"
    before = {p: p.stat().st_mtime_ns for p in (out / "val").iterdir()}
    call("stage3_segment.py", *given, "--predict", "val,train")
    assert len(list((out / "train").iterdir())) == 6 and before == {p: p.stat().st_mtime_ns for p in (out / "val").iterdir()}
    assert "finished" in call("stage3_segment.py", *given, "--predict", "val,train")


def test_a_link_to_a_dataset_keeps_its_own_name(dataset, tmp_path):
    (tmp_path / "COCO2014").symlink_to(dataset)
    assert find_dataset(str(tmp_path / "COCO2014")).name == evaluation.dataset_name(tmp_path / "COCO2014") == "COCO2014"


def test_true_masks_are_an_upper_bound_and_say_so(chain, call, dataset, tmp_path):
    given = ["--data", dataset, "--runs", tmp_path, *SMALL["stage3_segment.py"]]
    assert "upper bound" in call("stage3_segment.py", *given, "--masks", dataset / "SegmentationClass")
    assert "trained on true masks: an upper bound" in call("eval.py", "--data", dataset, "--runs", tmp_path)


def test_masks_learned_from_true_masks_are_an_upper_bound_too(chain, call, dataset, tmp_path):
    folder, _ = copy_runs(chain, tmp_path)
    for stage, option, path in (("2_weakclip", "seeds", dataset / "SegmentationClass"),
                                ("3_segment", "masks", folder / "2_weakclip/masks/train")):
        said = read_json(folder / stage / "args.json")
        evaluation.write_json(folder / stage / "args.json", {**said, "options": {**said["options"], option: str(path)}})
    shutil.copytree(dataset / "SegmentationClass", folder / "other/masks/val")
    rows = evaluation.score_runs(evaluation.find_dataset(dataset), folder)
    assert {r["stage"]: r["upper_bound"] for r in rows} == {"1_cam": False, "2_weakclip": True, "3_segment": True, "other": False}


def test_a_folder_of_photos_needs_no_dataset(chain, call, tmp_path):
    folder, options = copy_runs(chain, tmp_path)
    photos = tmp_path / "holiday"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("beach.jpg", (50, 71)), ("snow.png", (90, 40))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(photos / name)
    for name, stage in (("stage2_weakclip.py", "2_weakclip"), ("stage3_segment.py", "3_segment")):
        given = ["--runs", folder.parent, "--data", folder.name, "--images", photos, "--scales", 1]
        given += ["--clip", options[name][-1]] if stage == "2_weakclip" else []
        out = folder / stage / "images" / "holiday"
        assert "2 masks" in call(name, *given)
        assert read_label(out / "beach.png", 4).shape == (50, 71) and read_label(out / "snow.png", 4).shape == (90, 40)
        with Image.open(out / "beach.jpg") as picture:  # to be looked at: the mask over its photo
            assert max(picture.size) == 800
        time = (out / "snow.png").stat().st_mtime_ns
        call(name, *given)
        assert (out / "snow.png").stat().st_mtime_ns == time  # what exists is done
        call(name, *given, "--no-crf")
        assert (out / "snow.png").stat().st_mtime_ns != time  # unless it was made otherwise
        other = tmp_path / stage / "holiday"
        shutil.copytree(photos, other)
        Image.new("RGB", (33, 44)).save(other / "snow.png")  # another folder of this name: nothing of the first is kept
        call(name, *given[:5], other, *given[6:])
        assert read_label(out / "snow.png").shape == (44, 33)
        assert "holiday" in call(name, *given[:5], tmp_path / "nowhere" / "holiday", *given[6:], ok=False)
        assert "the one that holds the photos" in call(name, *given[:5], photos / "snow.png", *given[6:], ok=False)
        assert "checkpoint" in call(name, "--runs", tmp_path / "nothing", *given[2:], ok=False)


def test_checkpoint_makes_masks_without_training(chain, call, tmp_path):
    folder, options = chain
    given = [*options["stage2_weakclip.py"], "--runs", tmp_path, "--checkpoint", folder / "2_weakclip" / "checkpoint.pt"]
    call("stage2_weakclip.py", *given)
    for split in ("train", "val"):
        for path in (folder / "2_weakclip" / "masks" / split).iterdir():
            assert path.read_bytes() == (tmp_path / folder.name / "2_weakclip" / "masks" / split / path.name).read_bytes()
    said = call("stage2_weakclip.py", *given, "--set", "prompts=false", ok=False)  # it cannot change what was trained
    assert "--set prompts=false" in said and "trained otherwise" in said


class Strange:
    """Stands in a checkpoint's `meta` for the config object of a package that is not here."""
    hurt = False

    def __setstate__(self, state):
        Strange.hurt = True


def test_a_released_checkpoint_makes_masks(dataset, call, tmp_path):
    torch.manual_seed(0)
    clip_model = tiny_clip()
    model = stage2.WeakCLIP(clip_model, stage2.name_tokens(CLASSES, clip_model.context_length), stage2.RELEASED, crop=64)
    state = {stage2.released_name(k): v for k, v in model.state_dict().items() if k != "clip.logit_scale"}
    meta = {"iter": 8000, "config": Strange(), "time": np.float64(3), "env": {Path("a"): Strange}, "seed": None}
    torch.save({"meta": meta, "state_dict": state, "optimizer": {"state": {}}}, tmp_path / "released.pth")
    given = ["--data", dataset, "--runs", tmp_path, "--checkpoint", tmp_path / "released.pth", "--scales", 1, "--no-crf"]
    call("stage2_weakclip.py", *given)
    assert not Strange.hurt and len(list((tmp_path / dataset.name / "2_weakclip" / "masks" / "train").iterdir())) == 6
    assert read_json(tmp_path / dataset.name / "2_weakclip" / "args.json")["provenance"]["iters"] == 8000

    data, machine = find_dataset(str(dataset)), stage1.Machine("cpu", False)
    args = stage2.parse_args(["--data", "x", "--scales", "1"])
    image = data.image("train_0")
    ours = stage2.predictor(model, args, 64, machine)(image)
    loaded, crop, *_ = stage2.open_checkpoint(tmp_path / "released.pth", args, machine, CLASSES)
    assert crop == 64 and torch.equal(stage2.predictor(loaded, args, crop, machine)(image), ours)

    state["neck.extra.weight"] = state.pop("neck.lateral_convs.0.conv.bias")
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "odd.pth")
    said = call("stage2_weakclip.py", *given[:-4], tmp_path / "odd.pth", ok=False)
    assert "neck.extra.weight" in said and "decoder.lateral.0.bias" in said
    del state["contexts"], state["decode_head.conv_seg.weight"]
    torch.save({"state_dict": state}, tmp_path / "odd.pth")
    assert "decode_head.conv_seg.weight" in call("stage2_weakclip.py", *given[:-4], tmp_path / "odd.pth", ok=False)


def test_coco_slots_become_contiguous_classes(tmp_path):
    clip_model = tiny_clip()
    assert len(evaluation.COCO_SLOTS) == 91 and len(evaluation.COCO_CLASSES) == 81
    tokens = stage2.name_tokens(evaluation.COCO_SLOTS, clip_model.context_length)
    model = stage2.WeakCLIP(clip_model, tokens, stage2.RELEASED, crop=64)
    assert tokens.shape == (91, 5)  # every name fits the released code's five tokens
    state = {stage2.released_name(k): v for k, v in model.state_dict().items() if k != "clip.logit_scale"}
    torch.save({"state_dict": state}, tmp_path / "coco.pth")
    args, machine = stage2.parse_args(["--data", "x", "--scales", "1", "--no-flip"]), stage1.Machine("cpu", False)
    for classes in (None, evaluation.COCO_CLASSES):
        loaded, crop, _, outputs = stage2.open_checkpoint(tmp_path / "coco.pth", args, machine, classes)
        image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        probs = stage2.predictor(loaded, args, crop, machine, outputs)(image)
        slots = stage2.predictor(loaded, args, crop, machine)(image)
        assert probs.shape[0] == 81 and slots.shape[0] == 91
        assert torch.equal(probs[80], slots[90]) and torch.equal(probs[12], slots[13])  # toothbrush; stop sign
    with pytest.raises(ValueError, match="91 classes, the dataset 4"):
        stage2.open_checkpoint(tmp_path / "coco.pth", args, machine, CLASSES)


def test_two_processes(dataset, clip_file, tmp_path):
    """torchrun: one run folder, every mask once, and both processes end with the same weights (rank 0 saves)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port), ROOT / "stage2_weakclip.py",
               "--data", dataset, "--runs", tmp_path, "--seeds", dataset / "seeds", "--clip", clip_file,
               *SMALL["stage2_weakclip.py"]]
    r = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert r.returncode == 0, r.stderr
    folder = tmp_path / dataset.name / "2_weakclip"
    assert len(list((folder / "masks" / "train").iterdir())) == 6 and read_json(folder / "args.json")["device"].startswith("2 x")
    assert len((folder / "log.jsonl").read_text().splitlines()) == 2 and stage1.read_checkpoint(folder / "checkpoint.pt")["step"] == 4


# ============================================================================================================= bad input

def spoil_image(folder):
    path = folder / "JPEGImages" / "train_2.jpg"
    path.write_bytes(path.read_bytes()[:-400])


def spoil_labels(folder):
    (folder / "image_labels.txt").write_text((folder / "image_labels.txt").read_text().replace("cat", "unicorn", 1))


FAULTS = {  # what is spoiled -> what the one line must say
    "missing image": (lambda f: (f / "JPEGImages" / "train_1.jpg").unlink(), "train_1.jpg: no such image"),
    "truncated JPEG": (spoil_image, "train_2.jpg: not a readable image"),
    "missing list": (lambda f: (f / "ImageSets" / "Segmentation" / "train.txt").unlink(), "train.txt: no such list (there is val)"),
    "an id twice": (lambda f: (f / "ImageSets" / "Segmentation" / "train.txt").write_text("train_0\ntrain_0\n"), "train_0 stands twice"),
    "no labels": (lambda f: (f / "image_labels.txt").unlink(), "no image-level labels for train_0"),
    "unknown class": (spoil_labels, "'unicorn'; known are cat, dog, traffic light"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_dataset_ends_before_any_work(fault, call, tmp_path):
    folder = draw_dataset(tmp_path / "bad")
    spoil, said = FAULTS[fault]
    spoil(folder)
    assert said in call("stage1_cam.py", "--data", folder, "--runs", tmp_path / "runs", *SMALL["stage1_cam.py"], ok=False)
    assert not (tmp_path / "runs").exists()


SEED_FAULTS = {
    "missing": (lambda p: p.unlink(), "1 of 6 label PNGs missing, first train_4.png"),
    "size": (lambda p: write_label(p, np.zeros((5, 7), np.uint8)), "7x5 pixels, its image has"),
    "mode": (lambda p: Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save(p), "mode RGB"),
    "class number": (lambda p: write_label(p, np.full((5, 7), 9, np.uint8)), "class number 9, the dataset has 0..3 and 255"),
    "no PNG": (lambda p: p.write_bytes(b"x"), "not a readable label PNG"),
}


@pytest.mark.parametrize("fault", SEED_FAULTS)
def test_bad_seeds_end_before_any_work(fault, call, clip_file, tmp_path):
    folder = draw_dataset(tmp_path / "bad")
    spoil, said = SEED_FAULTS[fault]
    spoil(folder / "seeds" / "train_4.png")
    for name, option in (("stage2_weakclip.py", "--seeds"), ("stage3_segment.py", "--masks")):
        extra = ["--clip", clip_file] if name.startswith("stage2") else []
        line = call(name, "--data", folder, "--runs", tmp_path / "runs", option, folder / "seeds", *SMALL[name], *extra, ok=False)
        assert said in line and "train_4.png" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name, options, said", [
    ("stage1_cam.py", ["--data", "nowhere"], "no folder with JPEGImages/"),
    ("stage1_cam.py", ["--crop", "100"], "--crop 100: a multiple of 32"),
    ("stage1_cam.py", ["--iters", "0"], "--iters 0: at least 1"),
    ("stage1_cam.py", ["--lr", "0"], "--lr 0.0"), ("stage3_segment.py", ["--lr", "nan"], "--lr nan"),
    ("stage2_weakclip.py", ["--batch-size", "0"], "--batch-size 0: at least 1"),
    ("stage2_weakclip.py", ["--accumulate", "0"], "--accumulate 0: at least 1"),
    ("stage3_segment.py", ["--accumulate", "3"], "--batch-size 2: must divide among 1 processes and --accumulate 3 parts in each"),
    ("stage2_weakclip.py", ["--clip", "ViT-L/14"], "made for patch 16"),
    ("stage1_cam.py", ["--device", "abacus"], "--device abacus"),
    ("stage1_cam.py", ["--weights", "no/such.pt"], "no/such.pt: no such file"),
    ("stage2_weakclip.py", ["--set", "colour=red"], "the fields are freeze_clip"),
    ("stage2_weakclip.py", ["--clip", "ViT-X"], "neither a file nor one of ViT-B/16"),
    ("stage2_weakclip.py", ["--checkpoint", "no/such.pt"], "no/such.pt"),
    ("stage2_weakclip.py", ["--scales", "0"], "argument --scales: 0 is not above 0"),
    ("stage3_segment.py", ["--predict", "test"], "test.txt: no such list"),
])
def test_bad_options_are_one_line(name, options, said, call, dataset, clip_file, tmp_path):
    given = ["--data", dataset, "--runs", tmp_path / "runs", *SMALL[name]]
    given += {"1": [], "2": ["--seeds", dataset / "seeds", "--clip", clip_file], "3": ["--masks", dataset / "seeds"]}[name[5]]
    assert said in call(name, *given, *options, ok=False)


def test_a_foreign_checkpoint_is_refused(chain, call, dataset, tmp_path):
    folder, options = copy_runs(chain, tmp_path)
    shutil.copy(folder / "3_segment" / "checkpoint.pt", folder / "2_weakclip" / "checkpoint.pt")
    stage1.mark_unfinished(folder / "2_weakclip")
    assert "is of another run" in call("stage2_weakclip.py", *options["stage2_weakclip.py"], ok=False)
    said = call("stage2_weakclip.py", *options["stage2_weakclip.py"], "--runs", tmp_path / "b", "--checkpoint",
                folder / "3_segment" / "checkpoint.pt", ok=False)
    assert "neither a checkpoint of stage 2 nor a released one" in said
    said = call("stage2_weakclip.py", *options["stage2_weakclip.py"], "--variant", "released", ok=False)
    assert "variant = paper, now it is released" in said
    (dataset_b := tmp_path / "b").mkdir(exist_ok=True)
    shutil.copytree(dataset, dataset_b / dataset.name)
    (dataset_b / dataset.name / "ImageSets" / "Segmentation" / "train.txt").write_text("train_0\ntrain_1\n")
    given = [dataset_b / dataset.name if o == dataset else o for o in options["stage2_weakclip.py"]]
    assert "was made with train = " in call("stage2_weakclip.py", *given, ok=False)
    torch.save({"a": tiny_clip()}, tmp_path / "pickled.pt")  # an object, not tensors: never built
    said = call("stage2_weakclip.py", *options["stage2_weakclip.py"], "--runs", tmp_path / "c", "--checkpoint",
                tmp_path / "pickled.pt", ok=False)
    assert "pickled.pt: not a readable checkpoint" in said


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc, where not even the superuser may write")
def test_a_read_only_output_folder(call, dataset):
    assert "/proc/runs" in call("stage1_cam.py", "--data", dataset, "--runs", "/proc/runs", *SMALL["stage1_cam.py"], ok=False)


def test_an_output_path_that_is_a_file(call, dataset, tmp_path):
    (tmp_path / "runs").write_text("")
    assert "runs" in call("stage1_cam.py", "--data", dataset, "--runs", tmp_path / "runs", *SMALL["stage1_cam.py"], ok=False)


# ================================================================================================================ README

def readme_commands():
    """Every `python ...` and `torchrun ...` line in README's code blocks."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.S)
    return [line.split("#")[0].strip() for b in blocks for line in b.splitlines() if line.startswith(("python ", "torchrun "))]


@pytest.mark.parametrize("command", readme_commands() if (ROOT / "README.md").exists() else [])
def test_readme_commands_parse(command):
    words = shlex.split(command)
    names = [w for w in words if w.endswith(".py")]
    if not names:
        assert words[:3] == ["python", "-m", "pytest"] or words[:3] == ["python", "-m", "venv"]
        return
    assert (ROOT / names[0]).is_file()
    modules = {"eval.py": evaluation, "stage1_cam.py": stage1, "stage2_weakclip.py": stage2, "stage3_segment.py": stage3}
    if names[0] in modules:
        modules[names[0]].parse_args(words[words.index(names[0]) + 1:])
