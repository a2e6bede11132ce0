"""Folders, files and options as people have them: each is read as it is meant, or refused.

A refusal is one line that names the file and the mend, with exit status 2, before anything is
written. `CASES` is the table of what is right; what does not fit a table stands behind it.
"""
import argparse
import importlib
import os
import pwd
import shutil
import sys
import urllib.error
import zlib
from operator import attrgetter, methodcaller
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from conftest import CLASSES, Planted, read_json, script
from eval import Parser, find_dataset, read_label, run, start_run, write_label, write_text

CHECK = "eval.py --data {0} --check"
SCORE = "eval.py --data {0} --masks {0}/seeds"
OURS = " --data {0} --runs {0}/runs --device cpu --iters 1 --batch-size 2 --crop 64"
CLIP = "stage1_cam.py --method clip --clip {0}/w.pth" + OURS
CLIP1 = "stage1_cam.py --method clip --clip {1}" + OURS
STAGE1 = "stage1_cam.py --weights none --arch resnet18" + OURS
STAGE2 = "stage2_weakclip.py --clip {1} --seeds {0}/seeds" + OURS
STAGE3 = "stage3_segment.py --weights none --arch resnet18 --masks {0}/seeds" + OURS

LISTS, LABELS = "ImageSets/Segmentation/", "image_labels.txt"
PHOTO, MASK, SEED = "JPEGImages/train_0.jpg", "SegmentationClass/train_0.png", "seeds/train_0.png"
IDS = [f"train_{i}" for i in range(6)]
PASSED = "train          6 images (published: none known), 6 true masks"
PAGE = "<!DOCTYPE html>"
TURN = Image.Exif()
TURN[0x0112] = 6


# ======================================================= how a folder differs from a sound one

def same(thing):
    """No change, of a folder or a picture."""
    return thing


def write(name, content):
    """A change: a file that holds this text, or these bytes."""
    def change(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return change


def listed(content):
    """A change: of the training list."""
    return write(LISTS + "train.txt", content)


def named(*lines):
    """A change: of the classes' names."""
    return write("classes.txt", "\n".join(lines))


def labelled(*lines):
    """A change: of the image-level labels."""
    return write(LABELS, "\n".join(lines))


def annotated(text, encoding="utf-8"):
    """A change: labels come from XML, whose train_0 holds this text."""
    def change(folder):
        (folder / LABELS).unlink()
        for i in IDS:
            write(f"Annotations/{i}.xml", "<annotation/>")(folder)
        write("Annotations/train_0.xml", text.encode(encoding))(folder)
    return change


def edit(name, old, new):
    """A change: `new` stands for `old` in a text file."""
    def change(folder):
        write_text(folder / name, (folder / name).read_text().replace(old, new))
    return change


def move(old, new):
    """A change: a file has another name."""
    def change(folder):
        (folder / old).rename(folder / new)
    return change


def endings(ending, *where):
    """A change: all files of some folders end so."""
    def change(folder):
        for path in [path for name in where for path in (folder / name).iterdir()]:
            path.rename(path.with_suffix(ending))
    return change


def numbered(numbers, where="SegmentationClass"):
    """A change: in all label PNGs of a folder, class k becomes numbers[k]."""
    def change(folder):
        for path in (folder / where).iterdir():
            label = read_label(path)
            write_label(path, np.where(label < 255, np.take(numbers, label % 4), 255))
    return change


def drawn(name, draw, **options):
    """A change: draw(picture) is saved in a picture's place."""
    def change(folder):
        with Image.open(folder / name) as picture:
            picture.load()
        draw(picture).save(folder / name, **options)
    return change


def convert(mode):
    """What draws a picture in another mode."""
    return methodcaller("convert", mode)


small = methodcaller("crop", (0, 0, 9, 7))  # a corner of a picture


def deep(picture):
    """A picture of 16 bits a value."""
    return Image.fromarray(np.zeros((9, 9), np.uint16))


def grey(picture):
    """An indexed picture's numbers, as grey values."""
    return Image.fromarray(np.array(picture))


def numbered_by_others(folder):
    """A change: other numbers, by a program whose args.json says nothing of classes."""
    write("../args.json", '{"lr": 0.1}')(folder)
    numbered([0, 2, 3, 1], "seeds")(folder)


def grey_of_2_bits(folder):
    """A change: a grey mask of 2 bits. Pillow writes none, so an indexed one says it is grey."""
    drawn(MASK, same, bits=2)(folder)
    content = bytearray((folder / MASK).read_bytes())
    content[25] = 0  # in the header: the kind of colour
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (folder / MASK).write_bytes(content)


def called_voc(folder):
    """A change: without classes.txt, but with VOC's name, so the classes are VOC's 21."""
    (folder / "classes.txt").unlink()
    (folder / "VOC").symlink_to(folder)


def resnet(folder):
    """A change: w.pth holds a ResNet-18 without its last layer, as feature extractors do."""
    state = torchvision.models.resnet18().state_dict()
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    torch.save(state, folder / "w.pth")


def hugging_face(folder):
    """A change: w.pth has names as in HuggingFace's files."""
    names = ("text_model.embeddings.token_embedding.weight", "vision_model.x", "logit_scale")
    torch.save(dict.fromkeys(names, torch.zeros(1)), folder / "w.pth")


# ================================================================================ what is read

ids, classes, texts = methodcaller("ids", "train"), attrgetter("classes"), attrgetter("texts")


def labels(data):
    return data.image_labels(["train_0"])["train_0"]


NO, SAID, READ = "refused", "said", "read"
OBJECTS = ("<annotation><object><name>dog</name><difficult>1</difficult><part><name>head</name>"
           "</part></object><object><name>cat</name></object></annotation>")
PAIRS = "\n".join(f"/JPEGImages/{i}.jpg /SegmentationClass/{i}.png" for i in IDS)
TWINS = labelled(*(f"{i} cat, dog, traffic light" for i in IDS[:5]), "train_5 traffic light")

CASES = [  # (name, how the folder differs, the command or what reads it, what is right)
    # lists
    ("split elsewhere", same, SCORE + " --split ../Main/x", NO, "'../Main/x': the bare name of a"),
    ("split below", same, STAGE1 + " --split a/b", NO, "'a/b': the bare name of a list in"),
    ("predicted path", same, STAGE3 + " --predict val,../val", NO, "'../val': the bare name of"),
    ("no such list", same, STAGE1 + " --split test", NO, "test.txt: no such list; make it, one"),
    ("no dataset", same, "eval.py --check --data {0}/x", NO, "/x: no folder with JPEGImages/"),
    ("list", same, ids, READ, IDS),
    ("marked list", listed("\ufeff" + "\r\n".join(IDS)), ids, READ, IDS),
    ("photos' names", listed("\n".join(f"{i}.JPG" for i in IDS)), ids, READ, IDS),
    ("pairs", listed(PAIRS), ids, READ, IDS),
    ("pairs of Windows", listed(PAIRS.replace("/", "\\")), ids, READ, IDS),
    ("twice", listed("a\nb\n\na.jpg\n"), CHECK, NO, "train.txt: line 4: 'a.jpg' stands twice"),
    ("list of a class", listed("a  1\nb -1\n"), CHECK, NO, "train.txt: line 1: 'a  1' is no image"),
    ("folder in a list", listed("a\n../b\n"), CHECK, NO, "train.txt: line 2: '../b' is no image"),
    ("bell", listed("a\x07\n"), CHECK, NO, "train.txt: line 1: 'a\\x07' is no image id"),
    ("long id", listed("x" * 240), CHECK, NO, "train.txt: line 1: 'xxx"),
    ("empty list", listed(" \n"), CHECK, NO, "train.txt: the list is empty"),
    ("UTF-16", listed("a\n".encode("utf-16")), CHECK, NO, "train.txt: not UTF-8; save it as"),
    ("hidden list", write(LISTS + "._train.txt", b"\0\5"), CHECK, SAID, PASSED),
    ("no lists", move(LISTS, "ImageSets/Main"), CHECK, NO, "train.txt: no such list; make it, one"),
    ("browser's copy", write(LISTS + "train (1).txt", "x"), CHECK, SAID, PASSED),
    ("judged on itself", same, STAGE3 + " --split val", SAID, "2 ids of val.txt stand in val.txt"),
    ("leak", write(LISTS + "trainaug.txt", "train_0\nval_1\nval_0\n"), CHECK, SAID,
     "2 ids of val.txt stand in trainaug.txt too, first val_0"),
    # classes.txt
    ("marked", write("classes.txt", "\ufeff_background_\r\n\r\ncat"), classes, READ, CLASSES[:2]),
    ("synonyms", named("background", "cat: tom cat, kit"), texts, READ, {"cat": "tom cat, kit"}),
    ("background second", named("cat", "background"), STAGE1, NO, "line 1: 'cat' stands where"),
    ("line too many", named("__ignore__", "_background_"), SCORE, NO, "line 1: '__ignore__'"),
    ("two backgrounds", named("background", "Background"), CHECK, NO, "line 2: 'Background'"),
    ("words for none", named("background: snow", "cat"), CHECK, NO, "has 'snow' behind it; syn"),
    ("CVAT's", named("background", "cat:128,0,0::"), CLIP, NO, "line 2: 'cat' has '128,0,0::'"),
    ("numbers before", named("0 background", "1 cat"), CHECK, NO, "classes.txt: line 1: '0 back"),
    ("class twice", named("background", "cat", "Cat"), CHECK, NO, "line 3: 'Cat' stands twice"),
    ("all in a line", named("background, cat, dog"), CHECK, NO, "classes.txt: line 1: 'background"),
    ("one class", named("background"), CHECK, NO, "classes.txt: 1 names; 2 to 255 are expected"),
    ("no classes", move("classes.txt", "names.txt"), CHECK, NO, "classes.txt: no such file, and"),
    ("VOC's", called_voc, CHECK + " --data {0}/VOC", NO, "'traffic light' is none of aeroplane"),
    # image-level labels (91)
    ("marked labels", labelled("\ufefftrain_0\tdog,cat,\r"), labels, READ, [1, 2]),
    ("labels in lines", labelled("train_0 dog", "", "train_0 cat"), labels, READ, [1, 2]),
    ("id alone", labelled("train_0"), labels, READ, []),
    ("nothing in it", labelled("train_0 Background"), labels, READ, []),
    ("annotations", annotated(OBJECTS), labels, READ, [1, 2]),
    ("labels of files", labelled("train_0.jpg cat"), STAGE2, NO, "line 1: 'train_0.jpg' is no id"),
    ("table", labelled("train_0 cat", "train_1, dog"), CHECK, NO, "line 2: 'train_1,' is no id"),
    ("stranger", labelled("train_0 cow"), STAGE1, NO, "train_0: 'cow' is none of cat, dog"),
    ("strange object", annotated(OBJECTS.replace("cat", "cow")), CHECK, NO, "train_0.xml: "),
    ("no label", labelled("train_1 cat"), STAGE1, NO, "image_labels.txt: 5 ids have no line; add"),
    ("half an XML", annotated(OBJECTS[:80]), CHECK, NO, "train_0.xml: not readable; save it as"),
    ("ANSI", annotated('<?xml version="1.0" encoding="ANSI"?><a/>'), CHECK, NO, "train_0.xml: not"),
    ("GBK", annotated('<?xml version="1.0" encoding="GBK"?><a/>'), CHECK, NO, "train_0.xml: not"),
    ("none for CLIP", named(*CLASSES, "cow"), CLIP1, SAID, "cow: in the same 0 of 6 "),
    ("class nowhere", named(*CLASSES, "cow"), CHECK, SAID, "cow: in the same 0 of 6 "),
    ("twins", TWINS, CHECK, SAID, "cat, dog: in the same 5 of 6 training photos"),
    ("class everywhere", TWINS, STAGE1, SAID, "traffic light: in the same 6 of 6 training photos, "
     "so a classifier has nothing to tell it from"),
    # photos
    ("masks too", endings(".PNG", "JPEGImages", "SegmentationClass"), CHECK, SAID, PASSED),
    ("printer's photo", drawn(PHOTO, convert("CMYK")), CHECK, SAID, PASSED),
    ("two views in one", drawn(PHOTO, same, format="MPO", save_all=True,
                               append_images=[Image.new("RGB", (9, 9))]), CHECK, SAID, PASSED),
    ("two of an id", write("JPEGImages/train_0.png", b"x"), CHECK, NO, "train_0.png is beside it"),
    ("no photo", move(PHOTO, "JPEGImages/train_0.webp"), CHECK, NO, "train_0.jpg: no such image"),
    ("cut photo", lambda folder: os.truncate(folder / PHOTO, 900), STAGE1, NO, "train_0.jpg: not"),
    ("no picture", write(PHOTO, PAGE), CHECK, NO, "train_0.jpg: not a readable JPEG or PNG file"),
    ("GIF", drawn(PHOTO, same, format="GIF"), CHECK, NO, "train_0.jpg: not a readable JPEG or"),
    ("16 bits", drawn(PHOTO, deep, format="PNG"), CHECK, NO, "train_0.jpg: more than 8 bits"),
    ("turned", drawn(PHOTO, same, exif=TURN), CHECK, NO, "as displayed (after an EXIF turn); cut"),
    # label PNGs: class numbers (92), and not COCO's own, which go up to 90 (32)
    ("indexed, 2 bits", drawn(MASK, same, bits=2), CHECK, SAID, PASSED),
    ("grey of 8 bits", drawn(MASK, grey), CHECK, SAID, PASSED),
    ("grey of 2 bits", grey_of_2_bits, CHECK, NO, "train_0.png: mode L; a label PNG is indexed"),
    ("grey of 16 bits", drawn(MASK, deep), CHECK, NO, "train_0.png: mode I;16; a label PNG is"),
    ("colours", drawn(MASK, convert("RGB")), CHECK, NO, "train_0.png: mode RGB; a label PNG is"),
    ("JPEG mask", drawn(MASK, grey, format="JPEG"), CHECK, NO, "train_0.png: not a readable PNG"),
    ("other palette", drawn(MASK, methodcaller("remap_palette", [1, 2, 0])), CHECK, NO,
     "train_0.png: VOC's colours in another order, whose numbers are no classes"),
    ("other size", drawn(MASK, small), CHECK, NO, "SegmentationClass/train_0.png: 9x7 pixels, its"),
    ("other true size", drawn("SegmentationClass/val_0.png", small), SCORE, NO,
     "SegmentationClass/val_0.png: 9x7 pixels, its image has"),
    ("no such class", numbered([0, 1, 2, 90]), CHECK, NO, "class number 90, the dataset has 0..3"),
    ("0 and 255", numbered([0] + 3 * [255]), CHECK, NO, "no class in any; 255 is unsure here"),
    ("0 and 255 found", numbered([0] + 3 * [255], "seeds"), SCORE, NO, "no class in any, but 255"),
    ("one of 0 and 255", drawn(MASK, methodcaller("point", [0] + 255 * [255])), CHECK, SAID,
     PASSED),
    ("other numbers", numbered([0, 2, 3, 1]), CHECK, NO, "in classes.txt, or mend that or the"),
    ("one other number", edit(LABELS, "train_1 dog", "train_1 cat"), CHECK, NO, "number 2 is dog"),
    ("other seeds", numbered([0, 2, 3, 1], "seeds"), STAGE2, NO, "the labels of the image say cat"),
    ("other masks", numbered_by_others, STAGE3, NO, "the labels of the image say cat"),
    ("label more", edit(LABELS, "train_1 dog", "train_1 cat, dog"), CHECK, SAID, PASSED),
    ("missing seed", move(SEED, "x"), STAGE2, NO, "seeds/train_0.png and 0 more are missing; run"),
    # weights
    ("page", write("w.pth", PAGE), STAGE1 + " --weights {0}/w.pth", NO, "w.pth: not a readable"),
    ("other net", resnet, STAGE1 + " --weights {0}/w.pth --arch resnet50", NO, "w.pth: "),
    ("without fc", resnet, STAGE1 + " --weights {0}/w.pth", SAID, "Next: "),
    ("HuggingFace's CLIP", hugging_face, CLIP, NO, "wanted is OpenAI's ViT-B-16.pt or its"),
    ("no CLIP", same, CLIP, NO, "w.pth: neither a file nor ViT-B/16"),
    # options
    ("no --data", same, "eval.py --check", NO, "required: --data; --help explains the options"),
    ("unknown option", same, CHECK + " --chek", NO, "unrecognized arguments: --chek"),
    ("unknown switch", same, STAGE2 + " --set x=1", NO, "--set"),
    ("runs a file", same, STAGE1 + " --runs {0}/classes.txt", NO, "classes.txt/drawn/1_cam"),
    ("unknown device", same, STAGE1 + " --device tpu9", NO, "--device tpu9"),
]


@pytest.fixture()
def folder(dataset, tmp_path):
    """A copy of the drawn dataset that a test may break."""
    return shutil.copytree(dataset, tmp_path / "drawn")


@pytest.fixture()
def said(folder, clip_file, capsys, monkeypatch):
    """said(command) -> (exit status, stderr's lines, all on stdout).

    Without progress bars, and without the line that names the training list before the work.
    """
    def said(command):
        name, *options = command.format(folder, clip_file).split()
        monkeypatch.setattr(sys, "argv", [name, *options])
        status = 0
        try:
            run(importlib.import_module(name.removesuffix(".py")).main)
        except SystemExit as end:
            status = end.code
        told = capsys.readouterr()
        lines = told.err.replace("\r", "\n").splitlines()
        lines = [line for line in lines if line.strip() and "%|" not in line]
        return status, [line for line in lines if "the training list is" not in line], told.out
    return said


def refused(said, command, right):
    """The command ends with status 2 and says one line, in which `right` stands."""
    status, lines, _ = said(command)
    assert status == 2 and len(lines) == 1 and right in lines[0], lines


@pytest.mark.parametrize("change, command, outcome, right",
                         [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_inputs(folder, said, change, command, outcome, right):
    change(folder)
    if outcome == READ:
        assert command(find_dataset(folder)) == right
    elif outcome == NO:
        refused(said, command, right)
        assert not (folder / "runs").exists()
    else:
        status, lines, out = said(command)
        assert status == 0 and right in "\n".join([out, *lines])


@pytest.mark.parametrize("name", ["stage1_cam", "stage2_weakclip", "stage3_segment"])
def test_what_is_no_number_is_one_line(name, monkeypatch, capsys):
    """Of every option that takes a number, found in the script's parser."""
    parse_args, found = importlib.import_module(name).parse_args, []

    def keep(parser, argv):
        found.extend(parser._actions)
        raise KeyError
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(Parser, "parse_args", keep)
        parse_args([])
    options = [action.option_strings[0] for action in found
               if action.type not in (None, str, Path)]
    assert {"--iters", "--batch-size", "--lr", "--limit", "--crop", "--workers"} <= set(options)
    for option in options:
        for text in ("nan", "inf", "-1", "many", *["0"][option in ("--seed", "--workers"):]):
            with pytest.raises(SystemExit) as end:
                run(lambda: parse_args(["--data", "x", option, text]))
            line = capsys.readouterr().err
            assert end.value.code == 2 and option in line and len(line.splitlines()) == 1


# ============================================================================ pickles, --images

def test_no_pickle_is_opened(folder, said):
    """Not of labels (the released code's form), weights, a checkpoint, nor of CAMs."""
    planted = Planted(open, str(folder / "opened"), "w")
    np.save(folder / "cls_labels.npy", planted, allow_pickle=True)
    torch.save({"a": planted}, folder / "w.pth")
    for command in (STAGE1 + " --weights {0}/w.pth", CLIP, STAGE2 + " --checkpoint {0}/w.pth"):
        refused(said, command, "w.pth")
    run_folder = folder / "runs" / "drawn"
    for command, stage in ((STAGE2, "2_weakclip"), (STAGE3, "3_segment")):
        write_text(run_folder / stage / "args.json", "{}")
        shutil.copy(folder / "w.pth", run_folder / stage / "checkpoint.pt")
        refused(said, command + " --images {0}/JPEGImages", "checkpoint.pt")
    shutil.copytree(folder / "seeds", run_folder / "1_cam" / "seeds")
    (run_folder / "1_cam" / "cams").mkdir()
    np.savez(run_folder / "1_cam" / "cams" / "train_0.npz", keys=np.array([planted]))
    assert "train_0.npz" in said("eval.py --data {0} --runs {0}/runs")[1][-1]
    move(LABELS, "x")(folder)
    refused(said, CHECK, "6 ids have no line")
    assert not (folder / "opened").exists()


def test_masks_of_a_list_without_labels_are_looked_at(folder, said):
    lines = (folder / LABELS).read_text().splitlines()
    labelled(*[line for line in lines if line.startswith("train")])(folder)
    drawn("SegmentationClass/val_0.png", small)(folder)
    refused(said, CHECK, "val_0.png: 9x7")


def test_a_folder_of_photos(folder, said):
    """It has photos, one of a name; and there is a run to take the network from."""
    for command in (STAGE2, STAGE3):
        refused(said, command + " --images {0}/JPEGImages", "readable checkpoint; train first, or")
    assert said(STAGE3 + " --no-flip --no-crf")[0] == 0
    (folder / "none").mkdir()
    shutil.copytree(folder / "JPEGImages", folder / "two")
    shutil.copy(folder / PHOTO, folder / "two" / "train_0.png")
    for name in ("nowhere", "none", "two"):
        refused(said, STAGE3 + f" --images {{0}}/{name}", name)


# ================================================================================ surroundings

@pytest.mark.parametrize("options, cached, right", [
    (" --method clip", "clip/ViT-B-16.pt", "--clip FILE"),
    (" --weights imagenet", "torch/hub/checkpoints/resnet18-f37072fd.pth", "--weights FILE")])
def test_no_home_no_network_a_cut_download(folder, said, monkeypatch, options, cached, right):
    def no_network(*_, **__):
        raise urllib.error.URLError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}["nobody"])
    for name in ("HOME", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    refused(said, STAGE1 + options, right)
    monkeypatch.setenv("HOME", str(folder))
    refused(said, STAGE1 + options, right)
    write(".cache/" + cached, "cut")(folder)
    refused(said, STAGE1 + options, cached)
    assert not (folder / "runs").exists()


def test_a_console_that_lacks_a_letter(folder):
    for name in ("classes.txt", LABELS):
        edit(name, "cat", "Kätzchen")(folder)
    options = ("--data", folder, "--masks", folder / "seeds")
    assert '"K?tzchen": ' in script("eval.py", *options, env={"PYTHONIOENCODING": "ascii"})


def test_a_process_that_is_none_of_so_many(said, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    refused(said, STAGE1, "RANK, WORLD_SIZE: start with torchrun")


def test_a_run_is_recorded_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    start_run(tmp_path, argparse.Namespace(overwrite=False, lr=0.1), None, {}, {}, "cpu")
    record = read_json(tmp_path / "args.json")
    assert record["options"]["lr"] == 0.1 and "torch" in record["versions"]


@pytest.mark.parametrize("text", ["{", "3", "\0"])
def test_a_damaged_record_is_named(folder, said, text):
    write_text(folder / "runs" / "drawn" / "1_cam" / "args.json", text)
    refused(said, "eval.py --data {0} --runs {0}/runs", "1_cam/args.json: not readable; remove")
