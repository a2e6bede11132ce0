"""A run that was cut off goes on and ends in the same bits; what is not the same run is refused.

Promises 6 to 9: killed anywhere, the same command ends as if nothing had happened; another option,
list, label, seed or weight is refused by name; nothing that is not finite is saved, and no mask is
made of it; masks that are not current are gone before the record changes.

run     python -m pytest tests/test_resume.py
        WEAKCLIP_KILLS=30 python -m pytest tests/test_resume.py -k killed    # the long form
"""
import importlib
import io
import os
import random
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
import torchvision

import eval as evaluation
import stage1_cam
import stage2_weakclip
from conftest import Planted, draw_dataset, read_json, tiny_clip
from eval import read_label, run, write_label, write_text

STAGES = {"1_cam": "stage1_cam", "2_weakclip": "stage2_weakclip", "3_segment": "stage3_segment"}
KILLS = int(os.environ.get("WEAKCLIP_KILLS", 2))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A forked process lacks its parent's threads, and would wait for them for ever."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(one_thread, tmp_path_factory):
    """A drawn dataset, a tiny CLIP in a file, and a runs folder that one whole chain has filled."""
    folder = tmp_path_factory.mktemp("resume")
    draw_dataset(folder / "drawn", train=5, val=2)
    torch.save(tiny_clip().state_dict(), folder / "tiny.pt")
    for stage in STAGES:
        assert in_child(stage, folder, "whole") == 0
    return folder


def command(stage, folder, runs, *options):
    """The command line of a stage: seven iterations, a checkpoint after every second one."""
    words = ["--data", folder / "drawn", "--runs", folder / runs, "--iters", 7, "--batch-size", 2,
             "--crop", 64, "--device", "cpu"]
    if stage == "2_weakclip":
        words += ["--clip", folder / "tiny.pt", "--seeds", folder / "drawn" / "seeds"]
    else:
        words += ["--weights", "none", "--arch", "resnet18"]
    if stage == "3_segment":
        words += ["--masks", folder / "drawn" / "seeds", "--split", "train"]
    if stage != "1_cam":
        words += ["--scales", 1, "--no-flip"]
    return [STAGES[stage], *map(str, [*words, *options])]


def in_child(stage, folder, runs, *options, kill_after=None):
    """Run a stage in a process of its own, and kill it after so many seconds; its exit status.

    The process is forked, so that torch need not be imported anew.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            call_stage(stage, command(stage, folder, runs, *options))
            status = 0
        except SystemExit as error:
            status = error.code
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def call_stage(stage, words):
    """main() of a stage in this process, with checkpoints and lines of the log often enough."""
    stage1_cam.SAVE_EVERY, stage1_cam.LOG_EVERY = 2, 1
    sys.argv = words
    evaluation.note.cache_clear()
    run(importlib.import_module(STAGES[stage]).main)


def refused(stage, folder, runs, *options, capsys):
    """The one line that a stage ends with, exit status 2."""
    capsys.readouterr()
    before = sys.argv
    with pytest.raises(SystemExit) as ended:
        call_stage(stage, command(stage, folder, runs, *options))
    sys.argv = before
    assert ended.value.code == 2
    return capsys.readouterr().err.strip().split("\r")[-1].splitlines()[-1]


def same_folders(one, other):
    """All that two runs have left is equal: files by their bytes, checkpoints by their numbers."""
    names = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file())
    for name in names:
        if name.suffix == ".pt":
            a, b = (torch.load(folder / name, weights_only=True) for folder in (one, other))
            assert a["step"] == b["step"] and a["facts"] == b["facts"]
            same_tensors(a["model"], b["model"])
            for k, moments in a["optimizer"]["state"].items():
                same_tensors(moments, b["optimizer"]["state"][k])
        elif name.suffix == ".npz":
            same_tensors(dict(np.load(one / name)), dict(np.load(other / name)))
        elif name.name != "args.json":
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def same_tensors(a, b):
    """Two dicts of tensors, or of arrays, are equal."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(torch.as_tensor(a[name]), torch.as_tensor(b[name])), name


# ======================================================================================= the same

@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_moments(stage, world):
    """Killed and begun again until it ends, a run is the run that was never killed."""
    start = time.time()
    assert in_child(stage, world, "timed") == 0
    length = time.time() - start
    shutil.rmtree(world / "timed")
    chance = random.Random(KILLS)
    killed = 0
    while killed < KILLS:
        runs = f"killed{killed}"
        status = in_child(stage, world, runs, kill_after=chance.uniform(0, length))
        killed += 1
        assert status in (0, -signal.SIGKILL)
        assert in_child(stage, world, runs) == 0
        folders = [world / name / "drawn" / stage for name in (runs, "whole")]
        same_folders(*folders)
        assert not list(folders[0].rglob("*.part"))
        shutil.rmtree(world / runs)


@pytest.mark.parametrize("stage", STAGES)
def test_three_and_three_are_six(stage, world, monkeypatch):
    """Stopped right after its checkpoint of iteration 2, 4 or 6, a run ends in the same bits."""
    module = importlib.import_module(STAGES[stage])
    save = stage1_cam.save

    def save_and_stop(folder, model, optimizer, step, *args):
        save(folder, model, optimizer, step, *args)
        path = folder / "checkpoint.pt"
        if path.is_file() and torch.load(path, weights_only=True)["step"] == step:
            raise KeyboardInterrupt
    monkeypatch.setattr(module, "save", save_and_stop)
    statuses = [in_child(stage, world, "cut") for _ in range(4)]
    assert statuses == [130, 130, 130, 130]  # after iterations 2, 4, 6 and 7
    monkeypatch.undo()
    assert in_child(stage, world, "cut") == 0
    same_folders(world / "cut" / "drawn" / stage, world / "whole" / "drawn" / stage)
    shutil.rmtree(world / "cut")


def test_a_finished_stage_does_nothing(world, capsys):
    """The same command once more says so and touches no file; a mask that is gone is made again."""
    for stage in STAGES:
        folder = world / "whole" / "drawn" / stage
        before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
        call_stage(stage, command(stage, world, "whole"))
        assert "finished" in capsys.readouterr().out
        assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    mask = world / "whole" / "drawn" / "2_weakclip" / "masks" / "val" / "val_1.png"
    content = mask.read_bytes()
    mask.unlink()
    call_stage("2_weakclip", command("2_weakclip", world, "whole"))
    assert mask.read_bytes() == content


# ==================================================================================== not the same

@pytest.fixture()
def copy(world, tmp_path):
    """A copy of the world that a test may change; the dataset's folder keeps its name."""
    return shutil.copytree(world, tmp_path / "copy", symlinks=True)


CHANGES = {
    "option": (["--lr", "0.5"], None, "lr"),
    "seed": (["--seed", "1"], None, "seed"),
    "accumulate": (["--accumulate", "2"], None, "accumulate"),
    "list": ([], "train_list", "train"),
    "photo": ([], "photo", "photos of val"),
    "classes": ([], "classes", "classes"),
    "seeds": ([], "seeds", "seeds"),
    "clip": ([], "clip", "clip"),
    "switch": (["--set", "prompts=false"], None, "set")}


def change(what, folder):
    """Change one thing that a run of stage 2 was made of."""
    drawn = folder / "drawn"
    if what == "train_list":
        write_text(drawn / "ImageSets/Segmentation/train.txt", "train_1\ntrain_0\n")
    if what == "photo":
        shutil.copy(drawn / "JPEGImages/val_0.jpg", drawn / "JPEGImages/val_1.jpg")
    if what == "classes":
        for name in ("classes.txt", "image_labels.txt"):
            write_text(drawn / name, (drawn / name).read_text().replace("dog", "hound"))
    if what == "seeds":
        label = read_label(drawn / "seeds/train_0.png")
        label[-1] = 255
        write_label(drawn / "seeds/train_0.png", label)
    if what == "clip":
        state = torch.load(folder / "tiny.pt", weights_only=True)
        state["visual.proj"] += 1
        torch.save(state, folder / "tiny.pt")


@pytest.mark.parametrize("name", CHANGES)
def test_another_run_is_refused_by_name(name, copy, capsys):
    """What differs is named, nothing is touched, and --overwrite starts afresh."""
    options, changed, said = CHANGES[name]
    change(changed, copy)
    stage = copy / "whole" / "drawn" / "2_weakclip"
    before = (stage / "checkpoint.pt").read_bytes()
    line = refused("2_weakclip", copy, "whole", *options, capsys=capsys)
    assert f" {said} = " in line and "--overwrite" in line
    assert (stage / "checkpoint.pt").read_bytes() == before


def test_labels_and_weights_too(copy, capsys):
    """Stage 1 knows its image labels and its weights again."""
    labels = copy / "drawn" / "image_labels.txt"
    text = labels.read_text()
    write_text(labels, text.replace("train_0 cat, dog", "train_0 cat, dog, traffic light"))
    assert " labels = " in refused("1_cam", copy, "whole", capsys=capsys)
    write_text(labels, text)
    torch.save(torchvision.models.resnet18().state_dict(), copy / "w.pth")
    line = refused("1_cam", copy, "whole", "--weights", copy / "w.pth", capsys=capsys)
    assert " weights = none" in line or " lr = " in line


def test_overwrite_starts_afresh(copy):
    """With --overwrite another option is another run; nothing of the old one is left."""
    call_stage("1_cam", command("1_cam", copy, "whole", "--lr", "0.02", "--overwrite"))
    folder = copy / "whole" / "drawn" / "1_cam"
    assert read_json(folder / "args.json")["options"]["lr"] == 0.02
    assert (folder / "log.jsonl").read_text().count("\n") == 7


def test_a_run_that_came_to_nothing_binds_nobody(world, tmp_path, monkeypatch, capsys):
    """After want of memory in the first iteration, a smaller batch simply starts."""
    def no_memory(*args):
        raise RuntimeError("out of memory: tried to allocate 9 GiB")
    monkeypatch.setattr(stage1_cam.Classifier, "forward", no_memory)
    runs = tmp_path / "r"
    line = refused("1_cam", world, runs, "--batch-size", 4, capsys=capsys)
    assert "out of memory" in line and "--batch-size" in line
    monkeypatch.undo()
    call_stage("1_cam", command("1_cam", world, runs))
    assert read_json(runs / "drawn" / "1_cam" / "args.json")["options"]["batch_size"] == 2


def test_other_mask_options_rewrite_the_masks_alone(copy, monkeypatch):
    """The checkpoint stays; old masks are gone before the record names the new options."""
    folder = copy / "whole" / "drawn" / "2_weakclip"
    checkpoint = (folder / "checkpoint.pt").read_bytes()
    update = evaluation.update_record

    def cut_off(*args, **entries):
        assert not list(folder.glob("masks/*/*"))
        raise KeyboardInterrupt
    monkeypatch.setattr(stage2_weakclip, "update_record", cut_off)
    words = command("2_weakclip", copy, "whole", "--no-crf", "--label-filter")
    with pytest.raises(SystemExit):
        call_stage("2_weakclip", words)
    monkeypatch.setattr(stage2_weakclip, "update_record", update)
    made, mask_from = [], stage2_weakclip.mask_from
    monkeypatch.setattr(stage2_weakclip, "mask_from", lambda *x: made.append(x[3]) or mask_from(*x))
    call_stage("2_weakclip", words)
    assert [allowed is None for allowed in made] == 5 * [False] + 2 * [True]  # val has no filter
    record = read_json(folder / "args.json")
    assert record["provenance"]["crf"] is False and record["finished"] is True
    assert (folder / "checkpoint.pt").read_bytes() == checkpoint
    masks = {path: path.stat().st_mtime_ns for path in folder.glob("masks/*/*.png")}
    assert len(masks) == 7
    labels = copy / "drawn" / "image_labels.txt"
    write_text(labels, labels.read_text().replace("train_0 ", "train_0 traffic light, "))
    call_stage("2_weakclip", words)  # the filter's labels are others, so its masks are made anew
    assert all(path.stat().st_mtime_ns > before for path, before in masks.items())


def test_masks_of_other_classes_are_neither_learned_from_nor_scored(copy, capsys, call):
    """They are ours, and so not compared with image labels; their stage's record says it."""
    classes = copy / "drawn" / "classes.txt"
    names = classes.read_text().split("\n")
    write_text(classes, "\n".join([names[0], names[2], names[1], *names[3:]]))
    for stage, option, place in (("2_weakclip", "--seeds", "1_cam/seeds"),
                                 ("3_segment", "--masks", "2_weakclip/masks/train")):
        source = copy / "whole/drawn" / place
        line = refused(stage, copy, "again", option, source, capsys=capsys)
        assert f"{place.partition('/')[0]}: made with other classes" in line
    line = call("eval.py", "--data", copy / "drawn", "--runs", copy / "whole", ok=False)
    assert "1_cam: made with other classes" in line


def test_stage_3_predicts_further_lists(copy, capsys):
    """Another list to predict is no other run, and what is there stays; its photos count then."""
    folder = copy / "whole" / "drawn" / "3_segment"
    before = (folder / "masks" / "val" / "val_0.png").stat().st_mtime_ns
    write_text(copy / "drawn/ImageSets/Segmentation/more.txt", "val_1\ntrain_0\n")
    call_stage("3_segment", command("3_segment", copy, "whole", "--predict", "val,more"))
    assert len(list(folder.glob("masks/more/*.png"))) == 2
    assert (folder / "masks" / "val" / "val_0.png").stat().st_mtime_ns == before
    change("photo", copy)
    for name in ("val", "more"):
        line = refused("3_segment", copy, "whole", "--predict", name, capsys=capsys)
        assert f"photos of {name} = " in line


# ====================================================================================== not finite

def test_a_loss_that_is_no_number_stops_the_run(world, tmp_path, monkeypatch, capsys):
    """It is said with the iteration, and the checkpoint before it stays."""
    losses = stage2_weakclip.weakclip_losses
    calls = []

    def broken(*args):
        calls.append(1)
        terms = losses(*args)
        factor = float("nan") if len(calls) == 5 else 1
        return {name: term * factor for name, term in terms.items()}
    monkeypatch.setattr(stage2_weakclip, "weakclip_losses", broken)
    line = refused("2_weakclip", world, tmp_path / "r", capsys=capsys)
    assert "iteration 4" in line and "--lr" in line
    folder = tmp_path / "r" / "drawn" / "2_weakclip"
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 4
    monkeypatch.undo()
    call_stage("2_weakclip", command("2_weakclip", world, tmp_path / "r"))
    same_folders(folder, world / "whole" / "drawn" / "2_weakclip")


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    """Weights and the optimizer's moments are looked at before each checkpoint."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    write_text(tmp_path / "log.jsonl", "")
    stage1_cam.save(tmp_path, model, optimizer, 1, 1, facts={})
    optimizer.state[model.weight]["exp_avg"][0, 0] = float("inf")
    with pytest.raises(ValueError, match="infinite or no number"):
        stage1_cam.save(tmp_path, model, optimizer, 2, 2, facts={})
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 1


@pytest.mark.parametrize("stage", ["2_weakclip", "3_segment"])
def test_no_mask_is_made_of_what_is_no_number(stage, copy, capsys):
    """A checkpoint that is sound in form, and whose network overflows, gives no masks."""
    folder = copy / "whole" / "drawn" / stage
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    name = next(name for name in reversed(saved["model"]) if name.endswith(".bias"))
    saved["model"][name][:] = float("nan")
    torch.save(saved, folder / "checkpoint.pt")
    assert "no number" in refused(stage, copy, "whole", "--no-crf", capsys=capsys)
    assert not list(folder.glob("masks/*/*.png"))


# ====================================================================== checkpoints that are none

def planted(good):
    """A checkpoint of this form with a planted call."""
    f = io.BytesIO()
    torch.save({**good, "facts": Planted(os.mkdir, "planted")}, f)
    return f.getvalue()


BROKEN = {
    "empty": lambda content, good: b"",
    "cut": lambda content, good: content[:len(content) // 2],
    "text": lambda content, good: b"<html>not found</html>",
    "planted": lambda content, good: planted(good)}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("stage", STAGES)
def test_a_broken_checkpoint_is_one_line(kind, stage, copy, capsys, monkeypatch):
    """It is named, with the way out; nothing in it is run, and nothing is deleted."""
    monkeypatch.chdir(copy)
    path = copy / "whole" / "drawn" / stage / "checkpoint.pt"
    content = BROKEN[kind](path.read_bytes(), torch.load(path, weights_only=True))
    path.write_bytes(content)
    for made in [*path.parent.glob("masks/*/*"), *path.parent.glob("seeds/*")]:
        made.unlink()
    line = refused(stage, copy, "whole", capsys=capsys)
    assert "checkpoint.pt" in line and ("delete it" in line or "--overwrite" in line)
    assert path.read_bytes() == content and not (copy / "planted").exists()


def test_a_checkpoint_of_another_stage_is_refused(copy, capsys):
    """Stage 3's in stage 2's place, one of other classes: found before anything is made of it."""
    ours = copy / "whole" / "drawn" / "2_weakclip"
    shutil.rmtree(ours / "masks")
    saved = torch.load(ours / "checkpoint.pt", weights_only=True)
    torch.save({**saved, "facts": {**saved["facts"], "classes": []}}, ours / "checkpoint.pt")
    assert "of other classes" in refused("2_weakclip", copy, "whole", capsys=capsys)
    shutil.copy(copy / "whole" / "drawn" / "3_segment" / "checkpoint.pt", ours / "checkpoint.pt")
    assert "checkpoint.pt" in refused("2_weakclip", copy, "whole", capsys=capsys)
    line = refused("2_weakclip", copy, "whole", "--images", copy / "drawn", capsys=capsys)
    assert "checkpoint.pt" in line


# ============================================================================== photos of one's own

def test_images_are_made_anew_each_time(copy, tmp_path):
    """A photo that was replaced, another folder of the same name: never an old mask."""
    photos = tmp_path / "holiday"
    other = tmp_path / "other" / "holiday"
    for folder, source in ((photos, "val_0"), (other, "val_1")):
        folder.mkdir(parents=True)
        shutil.copy(copy / f"drawn/JPEGImages/{source}.jpg", folder / "a.jpg")
    out = copy / "whole/drawn/3_segment/images/holiday"
    sizes = []
    for folder in (photos, other):
        call_stage("3_segment", command("3_segment", copy, "whole", "--images", folder))
        sizes.append(read_label(out / "a.png").shape)
    assert sizes[0] != sizes[1] and (out / "a.jpg").is_file()
    (other / "a.jpg").rename(other / "b.jpg")
    call_stage("3_segment", command("3_segment", copy, "whole", "--images", other))
    assert sorted(p.name for p in out.iterdir()) == ["b.jpg", "b.png"]


def test_what_is_read_is_not_deleted(copy, capsys):
    """A checkpoint or photos inside the folder that is written are refused, not overwritten."""
    folder = copy / "whole" / "drawn" / "2_weakclip"
    line = refused("2_weakclip", copy, "whole", "--checkpoint", folder / "checkpoint.pt",
                   "--overwrite", capsys=capsys)
    assert "--checkpoint" in line and (folder / "checkpoint.pt").is_file()
    photos = shutil.copytree(copy / "drawn" / "JPEGImages", folder / "images" / "val")
    line = refused("2_weakclip", copy, "whole", "--images", photos, capsys=capsys)
    assert f"--images {photos}: lies in" in line and list(photos.glob("*.jpg"))
