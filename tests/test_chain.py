"""The scripts as a user runs them, on drawn photos, and what they leave is read back.

First the chain itself, in processes of its own: each command but the first is the one that the
stage before has named. Then other ways through it, called in this process, which is quicker: seeds
from CLIP, the released variant, bfloat16, photos of one's own, checkpoints. Then two processes of
torchrun, and a device that does not exist (far_device.py), which finds tensors that were left
behind on the CPU.
"""
import importlib
import re
import shlex
import shutil
import sysconfig

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import stage1_cam as stage1
import stage2_weakclip as stage2
from conftest import CLASSES, ROOT, draw_dataset, read_json, script, tiny_clip
from eval import COCO_CLASSES, COCO_SLOTS, find_dataset, read_label

TINY = ["--iters", 2, "--batch-size", 2, "--crop", 64]
RESNET = ["--weights", "none", "--arch", "resnet18"]
TWO_VIEWS = ["--scales", 0.5, 1, "--no-flip"]
ONE_VIEW = ["--scales", 1, "--no-flip"]


@pytest.fixture(scope="module")
def chain(dataset, clip_file, tmp_path_factory):
    """The four commands in a row, each as the one before has named it -> the runs folder."""
    runs = tmp_path_factory.mktemp("runs")
    command = ["stage1_cam.py", "--data", dataset, "--runs", runs, "--limit", 6]
    for options in ([*RESNET, *TINY], ["--clip", clip_file, *TINY, *TWO_VIEWS],
                    [*RESNET, *TINY, "--scales", 1], []):
        command = shlex.split(script(*command, *options).partition("Next: python ")[2])
    return runs / dataset.name


def weights_of(stage):
    """The trained parts in a stage's checkpoint: {name: tensor}."""
    return torch.load(stage / "checkpoint.pt", weights_only=True)["model"]


def masks_in(folder):
    """The label PNGs below a folder, each by its path from there."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


def agreement(one, other):
    """The share of pixels that have the same label in the masks of two folders."""
    names = masks_in(one)
    assert names == masks_in(other)
    return np.mean([np.mean(read_label(one / name) == read_label(other / name)) for name in names])


# ========================================================================== what the chain leaves

def test_the_next_command_has_the_list_and_clip_of_this_one(monkeypatch):
    monkeypatch.setattr("sys.argv", ["code/stage1_cam.py"])
    given = ["--data", "my birds", "--method", "clip", "--clip", "f.pt", "--split", "val"]
    said = stage1.next_command("x.py", stage1.parse_args(given), "split", "limit", "clip")
    assert said == "python code/x.py --data 'my birds' --runs runs --split val --clip f.pt"


def test_files_are_those_of_the_design(chain, dataset):
    """Palette PNGs of class numbers in the photo's size (92), and CAMs at stride 4."""
    data = find_dataset(dataset)
    lists = {"1_cam/seeds": "train", "2_weakclip/masks/train": "train",
             "2_weakclip/masks/val": "val", "3_segment/masks/val": "val"}
    assert masks_in(chain) == [f"{folder}/{image_id}.png" for folder, split in lists.items()
                               for image_id in data.ids(split)]
    for path in chain.rglob("*.png"):
        assert Image.open(path).getpalette()[3:6] == [128, 0, 0]
        read_label(path, len(CLASSES), data.image(path.stem).shape[:2])
    for image_id, present in data.image_labels(data.ids("train")).items():
        found = np.load(chain / "1_cam" / "cams" / f"{image_id}.npz")
        H, W = data.image(image_id).shape[:2]
        keys, cam = found["keys"], found["cam"]
        assert keys.dtype == np.uint8 and keys.tolist() == present
        assert cam.dtype == np.float16 and cam.shape == (len(present), -(-H // 4), -(-W // 4))
        assert 0 <= cam.min() and cam.max() <= 1


def test_records_and_logs_say_what_happened(chain):
    """All options, the device, what went in; every loss under its name; no frozen CLIP."""
    losses = {"1_cam": ["loss_multilabel"], "3_segment": ["loss_cross_entropy"],
              "2_weakclip": ["loss_seeding", "loss_boundary", "loss_score"]}
    for stage, names in losses.items():
        record = read_json(chain / stage / "args.json")
        assert record["options"]["iters"] == 2 and record["device"].startswith("1 x cpu")
        assert record["finished"] is True and {"train", "classes"} <= set(record["digests"])
        line, = (chain / stage / "log.jsonl").read_text().splitlines()  # of the first iteration
        assert re.findall(r'"(\w+)":', line) == ["step", "lr", "loss", *names]
    frozen = [name for name in weights_of(chain / "2_weakclip") if name.startswith("clip.")]
    assert not frozen


def test_metrics_carry_their_provenance(chain):
    """A row for all that the stages left, percent from 0 to 100, and the report beside them."""
    rows = read_json(chain / "metrics.json")["rows"]
    told = ["stage", "split", "n", "of", "scales", "flip", "crf", "label_filter"]
    assert [[row[name] for name in told] for row in rows] == [
        ["1_cam", "train", 6, 6, [1, 0.5, 1.5, 2], True, False, True],
        ["2_weakclip", "train", 6, 6, [0.5, 1], False, True, False],
        ["2_weakclip", "val", 2, 2, [0.5, 1], False, True, False],
        ["3_segment", "val", 2, 2, [1], True, True, False]]
    for row in rows:
        assert row["truth"] == "SegmentationClass" and row["iters"] == 2
        assert list(row["iou"]) == list(CLASSES)
        assert 0 <= row["miou"] <= 100 and 0 <= row["pixel_accuracy"] <= 100
    assert "<h1>WeakCLIP on drawn</h1>" in (chain / "report.html").read_text()


# ===================================================================================== other ways

@pytest.mark.parametrize("name", ["eval", "stage1_cam", "stage2_weakclip", "stage3_segment"])
def test_help_explains_every_option(name, capsys):
    """--help is a page and no error; an untrained CLIP is named in it."""
    with pytest.raises(SystemExit, match="^0$"):
        importlib.import_module(name).parse_args(["--help"])
    page = capsys.readouterr().out
    for option in re.split(r"\n  (?=--)", page)[1:]:
        assert re.search(r"\s{2,}\w", option), option  # what it does
    assert ("--clip CLIP" in page) == (name in ("stage1_cam", "stage2_weakclip"))


def test_parts_and_workers_change_nothing(call, dataset, tmp_path):
    """--accumulate 2 has the batch's gradient where the loss is a mean over photos, as stage 1's is
    with fixed BatchNorm (97); --workers 2 gives the same bits."""
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet.pt")
    given = ["--data", dataset, *RESNET, *TINY, "--limit", 3,
             "--weights", tmp_path / "resnet.pt", "--lr", 1e-3]
    trained = []
    for option, number in (("--workers", 0), ("--workers", 2), ("--accumulate", 2)):
        runs = tmp_path / f"{option}{number}"
        call("stage1_cam.py", *given, option, number, "--runs", runs)
        trained.append(weights_of(runs / "drawn" / "1_cam"))
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=0)
    torch.testing.assert_close(trained[2], trained[0], rtol=1e-4, atol=1e-6)


def test_photos_of_ones_own(call, clip_file, tmp_path):
    """No true masks and no val; seeds from CLIP, the released variant in bfloat16. Then masks of
    other photos from both networks, for which the dataset is not needed."""
    birds = draw_dataset(tmp_path / "data" / "birds")
    shutil.rmtree(birds / "SegmentationClass")
    (birds / "ImageSets" / "Segmentation" / "val.txt").unlink()
    common = ["--data", birds, "--runs", tmp_path, "--limit", 3]
    weakclip = ["stage2_weakclip.py", *common, "--clip", clip_file, "--amp", *ONE_VIEW]
    segment = ["stage3_segment.py", *common, *ONE_VIEW]
    assert "6 images" in call("eval.py", *common[:2], "--check")
    call("stage1_cam.py", *common, "--method", "clip", "--clip", clip_file)
    call(*weakclip, "--variant", "released", *TINY)
    call(*segment, *RESNET, *TINY)
    assert "nothing to score" in call("eval.py", *common[:4])
    runs = tmp_path / "birds"
    assert (runs / "report.html").is_file() and read_json(runs / "metrics.json") == {"rows": []}
    for place in ("1_cam/seeds", "2_weakclip/masks/train", "3_segment/masks/train"):
        assert masks_in(runs / place) == ["train_0.png", "train_1.png", "train_2.png"]
    assert any(name.startswith("clip.") for name in weights_of(runs / "2_weakclip"))

    photos = birds.rename(tmp_path / "elsewhere") / "JPEGImages"
    for command, stage in ((weakclip, "2_weakclip"), (segment, "3_segment")):
        call(*command, "--images", photos)
        out = runs / stage / "images" / "JPEGImages"
        assert len(masks_in(out)) == 8
        assert max(Image.open(out / "val_1.jpg").size) == 800  # the mask laid over its photo


# ==================================================================================== checkpoints

def test_a_checkpoint_of_ours_makes_the_same_masks(chain, call, dataset, clip_file, tmp_path):
    """Elsewhere, without training, as it was trained (66)."""
    call("stage2_weakclip.py", "--data", dataset, "--runs", tmp_path, "--clip", clip_file,
         *TWO_VIEWS, "--checkpoint", chain / "2_weakclip" / "checkpoint.pt")
    made = tmp_path / "drawn" / "2_weakclip" / "masks"
    assert agreement(made, chain / "2_weakclip" / "masks") == 1


def released(classes):
    """A made-up checkpoint as the released code writes it, with its names (65)."""
    torch.manual_seed(0)
    network = tiny_clip()
    tokens = stage2.name_tokens(classes, len(network.positional_embedding))
    state = stage2.WeakCLIP(network, tokens, stage2.RELEASED, crop=64).state_dict()
    del state["clip.logit_scale"]
    golden = torch.load(ROOT / "tests" / "golden" / "weakclip.pt", weights_only=True)["state_dict"]
    theirs = {stage2.our_name(name): name for name in golden}
    state = {theirs[name]: value for name, value in state.items()}
    return {"meta": {"iter": 8000, "config": torch.nn.Identity()}, "state_dict": state}


def test_a_released_checkpoint_makes_masks(call, dataset, tmp_path):
    """It brings its own CLIP and its iterations; what does not fit is named (66)."""
    saved = released(CLASSES)
    given = ["stage2_weakclip.py", "--data", dataset, "--runs", tmp_path, *ONE_VIEW, "--no-crf",
             "--checkpoint", tmp_path / "released.pth"]
    torch.save(saved, tmp_path / "released.pth")
    call(*given)
    record = read_json(tmp_path / "drawn" / "2_weakclip" / "args.json")
    assert record["provenance"]["iters"] == 8000 and len(masks_in(tmp_path)) == 8
    saved["state_dict"]["neck.extra"] = saved["state_dict"].pop("gamma")
    torch.save(saved, tmp_path / "released.pth")
    assert "neck.extra" in call(*given, "--overwrite", ok=False)


def test_cocos_slots_become_classes(tmp_path):
    """A released COCO checkpoint has 91 outputs, of which 80 and background are classes (32b)."""
    torch.save(released(COCO_SLOTS), tmp_path / "coco.pth")
    args = stage2.parse_args(["--data", "x"])
    model, names = stage2.open_checkpoint(tmp_path / "coco.pth", args)
    assert names == COCO_CLASSES and [COCO_SLOTS[k] for k in model.outputs] == list(names)
    with pytest.raises(ValueError, match="91 classes, the dataset 4"):
        stage2.open_checkpoint(tmp_path / "coco.pth", args, CLASSES)


# ===================================================================== two processes, a far device

def test_two_processes(chain, call, dataset, clip_file, tmp_path):
    """torchrun's two make the masks of one, but for what dropout and batch statistics change; and
    one process goes on where they have stopped."""
    stage = ["stage2_weakclip.py", "--data", dataset, "--runs", tmp_path, "--clip", clip_file,
             "--seeds", chain / "1_cam" / "seeds", *TINY, *TWO_VIEWS]
    torchrun = sysconfig.get_path("scripts") + "/torchrun"
    assert script(torchrun, "--standalone", "--nproc_per_node", 2, *stage).count("Next: ") == 1
    folder, alone = tmp_path / "drawn" / "2_weakclip", chain / "2_weakclip" / "masks"
    path = folder / "checkpoint.pt"
    assert read_json(folder / "args.json")["device"].startswith("2 x cpu")
    assert agreement(folder / "masks", alone) > 0.9
    # As if both had been killed after the first iteration.
    torch.save({**torch.load(path, weights_only=True), "step": 1}, path)
    shutil.rmtree(folder / "masks")
    call(*stage)
    assert torch.load(path, weights_only=True)["step"] == 2
    assert agreement(folder / "masks", alone) > 0.9


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no Python backend for private devices (2.9 or newer has)")
def test_all_stages_on_a_device_that_is_not_the_cpu(call, dataset, clip_file, tmp_path):
    """No operation mixes devices, and what comes out is what the CPU gives: weights but for
    rounding, masks nearly everywhere."""
    (tmp_path / "mixing.py").write_text(
        "import pytest, torch\nwith pytest.raises(RuntimeError, match='on far and on cpu'):\n"
        "    torch.ones(3, device='far') + torch.ones(3)\n")
    common = ["--data", dataset, "--limit", 3, "--device"]
    weakclip = ["stage2_weakclip.py", "--clip", clip_file, *TINY, *ONE_VIEW]
    commands = [("chain", ["stage1_cam.py", *RESNET, *TINY]), ("chain", weakclip),
                ("chain", ["stage3_segment.py", *RESNET, *TINY, *ONE_VIEW]),
                ("clip", ["stage1_cam.py", "--method", "clip", "--clip", clip_file]),
                ("released", [*weakclip, "--variant", "released", "--no-crf", "--seeds",
                              dataset / "seeds"])]
    lines = [tmp_path / "mixing.py"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the far device's; sums of more threads round otherwise
    for runs, command in commands:
        call(*command, *common, "cpu", "--runs", tmp_path / "cpu" / runs)
        command = [*command, *common, "far", "--runs", tmp_path / "far" / runs]
        lines.append(shlex.join(map(str, command)))
    torch.set_num_threads(threads)
    said = script("tests/far_device.py", *lines, env={"OMP_NUM_THREADS": "1"})
    counts = re.findall(r"(\d+) operations on far: stage", said)
    assert len(counts) == len(commands) and min(map(int, counts)) > 500
    for path in (tmp_path / "cpu").rglob("checkpoint.pt"):
        stage = path.parent.relative_to(tmp_path / "cpu")
        torch.testing.assert_close(weights_of(tmp_path / "far" / stage), weights_of(path.parent),
                                   rtol=1e-3, atol=1e-4)
    assert agreement(tmp_path / "far", tmp_path / "cpu") > 0.99
