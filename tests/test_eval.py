"""Scores, where they come from, the report page, and what ends a script early."""
import base64
import errno
import io
import os
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import draw_dataset, read_json
from eval import (IGNORE, TOLERATED, colour_map, compare_classes, confusion, find_dataset,
                  read_label, run, score_folder, scores, write_json, write_label, write_text,
                  write_whole)

ODD_CLASS = 'traffic <light> & "co"'


@pytest.fixture()
def drawn(tmp_path):
    """A drawn dataset that a test may break."""
    return draw_dataset(tmp_path / "drawn")


# ======================================================================================= scores

@pytest.mark.parametrize("last, matrix, iou", [
    (1, [[94, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0]], [100 * 94 / 97, 100 * 3 / 6, np.nan]),
    (IGNORE, [[94, 2, 0, 0], [1, 2, 0, 1], [0, 0, 0, 0]], [100 * 94 / 97, 100 * 2 / 6, np.nan])])
def test_the_matrix_of_the_cat_by_hand(last, matrix, iou):
    """The table in eval.py (89), then with one cat unsure, which is a miss; there is no dog."""
    truth = np.repeat(np.array([0, 1, IGNORE], np.uint8), (96, 4, 7))
    found = np.repeat(np.array([0, 1, 0, 1, last, 0], np.uint8), (94, 2, 1, 2, 1, 7))
    counts = confusion(truth, found, 3)
    assert counts.tolist() == matrix and counts.base is None  # no view: that would keep 256 rows
    told = scores(counts)
    np.testing.assert_allclose(told["iou"], iou)
    assert np.isclose(told["miou"], np.mean(iou[:2]))
    assert told["pixel_accuracy"] == 94 + matrix[1][1]


def test_one_matrix_for_the_dataset_and_not_the_mean_of_photos(drawn, tmp_path):
    """10 cat pixels of one photo are found, 90 of another are not: 10 percent, and not 50."""
    data = find_dataset(drawn)
    write_text(drawn / "image_labels.txt", "val_0 cat\nval_1 cat\n")
    for name, pixels, found in (("val_0", 10, 1), ("val_1", 90, 0)):
        label = np.zeros(data.image(name).shape[:2], np.uint8)
        label.flat[:pixels] = 1
        write_label(data.truth_path(name), label)
        write_label(tmp_path / "found" / f"{name}.png", found * label)
    row = score_folder(data, tmp_path / "found", "val")
    assert row["iou"]["cat"] == 10 and row["iou"]["dog"] is None


def test_a_row_says_of_how_many_and_by_which_truth(drawn, call):
    """VOC's own masks come first, and the coarser ones where those lack (90)."""
    data = find_dataset(drawn)
    write_text(drawn / "SegmentationClassAug" / "val_0.png", "a coarser mask, which is not read")
    data.truth_path("val_1").rename(drawn / "SegmentationClassAug" / "val_1.png")
    row = score_folder(data, drawn / "seeds", "val")
    assert row["n"] == 2 and row["truth"] == "SegmentationClass+SegmentationClassAug"
    said = call("eval.py", "--data", drawn, "--masks", drawn / "SegmentationClass")
    assert "1 of    2  100.0  100.0%  truth SegmentationClass\n" in said and '"dog": 100.0' in said
    line = call("eval.py", "--data", drawn, "--masks", drawn / "nowhere", ok=False)
    assert "nowhere: no PNG of val" in line


# ======================================================================== photos and label PNGs

def test_a_label_comes_back_as_it_was_written_in_vocs_colours(tmp_path):
    """An indexed PNG, as VOC's server wants it (92, 95)."""
    label = np.arange(256, dtype=np.uint8).reshape(8, 32)
    write_label(tmp_path / "a" / "x.png", label)
    assert np.array_equal(read_label(tmp_path / "a" / "x.png"), label)
    assert os.listdir(tmp_path / "a") == ["x.png"]
    with Image.open(tmp_path / "a" / "x.png") as stored:
        assert stored.mode == "P" and stored.getpalette() == colour_map().ravel().tolist()
    for k, colour in ((1, [128, 0, 0]), (5, [128, 0, 128]), (20, [0, 64, 128])):
        assert colour_map()[k].tolist() == colour


def test_a_photo_is_turned_as_it_is_displayed(drawn, tmp_path):
    """So CAMs and the CRF see one picture (E22), and its masks are turned (103)."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter, clockwise
    picture = Image.fromarray(np.uint8([[1, 2, 3], [4, 5, 6]]))
    picture.save(drawn / "JPEGImages" / "val_0.jpg", format="PNG", exif=exif)
    data = find_dataset(drawn)
    assert data.image("val_0")[:, :, 0].tolist() == [[4, 1], [5, 2], [6, 3]]
    for folder in (drawn / "SegmentationClass", tmp_path):
        write_label(folder / "val_0.png", np.zeros((3, 2)))
    assert score_folder(data, tmp_path, "val")["n"] == 1


def test_one_true_mask_in_a_thousand_may_differ_from_the_labels(dataset, capsys):
    """People made both, and differ here and there; another numbering differs everywhere."""
    held = {dataset / f"{k}.png": {0, 1} for k in range(999)} | {dataset / "odd.png": {0, 3}}
    given = find_dataset(dataset), held, {path.stem: [1] for path in held}
    compare_classes(*given, TOLERATED)
    assert "odd.png: number 3 is traffic light" in capsys.readouterr().err
    with pytest.raises(ValueError, match="odd.png: number 3 is traffic light"):
        compare_classes(*given, 0)


# ===================================================================== provenance and the report

def leave_runs(data, runs):
    """What finished stages leave behind: their masks are the truth, moved; seeds were true."""
    folder, split = runs / data.name, data.training_split()
    learned = {"1_cam": {"limit": 5}, "2_weakclip": {"seeds": data.root / "SegmentationClass"},
               "3_segment": {"masks": folder / "2_weakclip/masks" / split, "checkpoint": "x.pt"}}
    for stage, source in learned.items():
        provenance = {"iters": 400, "scales": [0.5], "label_filter": stage == "2_weakclip"}
        write_json(folder / stage / "args.json", {
            "options": {"split": split, **source}, "provenance": provenance, "device": "<cpu>"})
        line = f'{{"step": 0, "loss_of_{stage}": 0.5}}\n'
        write_text(folder / stage / "log.jsonl", 9 * line + line[:20])  # cut while it was written
    places = {"1_cam/seeds": split, f"2_weakclip/masks/{split}": split,
              "2_weakclip/masks/val": "val", "3_segment/masks/val": "val", "other/masks/val": "val"}
    for moved, (place, ids) in enumerate(places.items()):
        for i in data.ids(ids):
            label = np.roll(read_label(data.truth_path(i)), 3 * moved, 1)
            write_label(folder / place / f"{i}.png", label)
    (folder / "1_cam" / "cams").mkdir()
    np.savez(folder / "1_cam" / "cams" / "train_0.npz", keys=np.uint8([3, 1]),
             **dict.fromkeys(("before", "boxes", "cam"), np.zeros((2, 15, 20), np.float16)))
    return folder


@pytest.fixture()
def finished(drawn):
    """A drawn dataset with an odd class -> it, and the folder of its finished runs."""
    for name in ("classes.txt", "image_labels.txt"):
        write_text(drawn / name, (drawn / name).read_text().replace("traffic light", ODD_CLASS))
    lists = drawn / "ImageSets" / "Segmentation"
    (lists / "train.txt").rename(lists / "trainaug.txt")
    write_text(lists / "train.txt", "train_0\ntrain_1\n")
    folder = leave_runs(find_dataset(drawn), drawn.parent / "runs")
    (folder / "other" / "masks" / "val" / "val_1.png").unlink()
    for stray in (".DS_Store", "Thumbs.db", "elsewhere/a.png", "val copy/val_0.png"):
        write_text(folder / "other" / "masks" / stray, "no mask")
    write_text(folder / "2_weakclip" / "masks" / "val" / ".DS_Store", "no mask")
    return drawn, folder


def test_every_row_says_where_it_comes_from(finished, call):
    """Also: stage 1 had a limit, train is among trainaug, val is never filtered by labels, and
    that true masks were learned from is seen."""
    root, folder = finished
    said = call("eval.py", "--data", root, "--runs", folder.parent).splitlines()[1:]
    rows = read_json(folder / "metrics.json")["rows"]
    facts = ("stage", "split", "n", "of", "label_filter", "learned_from")
    truth = f"{root}/SegmentationClass"
    assert [tuple(row[name] for name in facts) for row in rows] == [
        ("1_cam", "trainaug", 5, 5, False, None),
        ("1_cam", "train", 2, 2, False, None),
        ("2_weakclip", "trainaug", 6, 6, True, truth),
        ("2_weakclip", "train", 2, 2, True, truth),
        ("2_weakclip", "val", 2, 2, False, truth),
        ("3_segment", "val", 2, 2, False, "x.pt"),
        ("other", "val", 1, 2, False, None)]
    assert rows[0]["miou"] == 100 and set(rows[0]["iou"]) == {"background", "cat", "dog", ODD_CLASS}
    for line, row in zip(said, rows):
        assert {*facts, "scales", "flip", "crf", "truth", "iters", "iou"} <= set(row)
        assert f"{row['miou']:.1f}" in line and (row["learned_from"] or "truth ") in line


class Page(HTMLParser):
    """A well-formed page: its text, its pictures, and what stands under figures."""

    def __init__(self, path):
        super().__init__()
        self.open, self.text, self.pictures, self.captions = [], "", [], []
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.pictures.append(dict(attributes))
        elif tag not in ("meta", "tr", "td", "th"):  # rows and cells may stay open
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text
        if self.open[-1:] == ["figcaption"]:
            self.captions.append(text)


def test_the_report_is_one_whole_page(finished, call):
    """In a row, the chain in its order, with the steps of seeds from CLIP; losses at the end."""
    root, folder = finished
    call("eval.py", "--data", root, "--runs", folder.parent)
    page, source = Page(folder / "report.html"), (folder / "report.html").read_text()
    for outside in ("http:", "https:", "url(", "@import", "<script", "<link", ODD_CLASS, "<cpu>"):
        assert outside not in source
    assert ODD_CLASS in page.text and "<cpu>" in page.text and "1 of 2" in page.text
    for attributes in page.pictures:
        kind, _, coded = attributes["src"].partition(",")
        with Image.open(io.BytesIO(base64.b64decode(coded, validate=True))) as picture:
            picture.load()
            assert kind == "data:image/jpeg;base64" and attributes["alt"]
    steps = [f"{step} {ODD_CLASS}" for step in ("what spoke for", "boxes of", "CAM of")]
    chain = ["image", *steps, "seeds", "masks", "truth", "image"]
    assert ",".join(chain) in ",".join(page.captions)
    losses = [f"loss_of_{stage}: 0.5 to 0.5" for stage in ("1_cam", "2_weakclip", "3_segment")]
    assert page.captions[-4:] == ["truth", *losses]


def test_without_truth_there_is_a_report_and_without_runs_a_line(drawn, tmp_path, call):
    folder = leave_runs(find_dataset(drawn), tmp_path / "runs")
    (drawn / "SegmentationClass").rename(tmp_path / "elsewhere")
    said = call("eval.py", "--data", drawn, "--runs", tmp_path / "runs")
    assert "nothing to score" in said and read_json(folder / "metrics.json") == {"rows": []}
    assert Page(folder / "report.html").captions.count("prediction") == 2
    line = call("eval.py", "--data", drawn, "--runs", tmp_path / "nowhere", ok=False)
    assert line.endswith("nowhere/drawn: nothing there; stage1_cam.py makes the first seeds")


# ================================================================ whole files, and the one line

@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_a_file_that_is_not_written_to_its_end_is_the_former(tmp_path, error):
    """Killed half way, or on a full disk; the latter is said of the file."""
    path = tmp_path / "x.png"
    write_text(path, "old")

    def end(file):
        file.write(b"ne")
        raise error
    with pytest.raises(type(error)) as raised:
        write_whole(path, end)
    assert path.read_text() == "old" and len(list(tmp_path.glob("*.png"))) == 1
    if isinstance(error, OSError):
        assert f"{path}: cannot be written (No space left)" in str(raised.value)


def raise_first(errors):
    """What should make a batch of samples, and ends by the first of them."""
    raise errors[0]


def end_by(error, workers=0):
    """Run a main() that ends with an error, of its own or of a process that loads images."""
    loader = torch.utils.data.DataLoader([error], num_workers=workers, collate_fn=raise_first)
    run(lambda: next(iter(loader)))


@pytest.mark.parametrize("error, workers, status, said", [
    (ValueError("x.png: broken; mend it"), 0, 2, "x.png: broken; mend it"),
    (ValueError("x.png: broken; mend it"), 1, 2, "x.png: broken; mend it"),
    (OSError(errno.ENOENT, "No such file", "x"), 0, 2, "No such file: 'x'"),
    (MemoryError(), 0, 2, "a smaller --batch-size"),
    (MemoryError("Unable to allocate 8 EiB for an array"), 0, 2, "a smaller --batch-size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), 0, 2, "--batch-size"),
    (RuntimeError("CUDA out of memory. Tried\nto"), 0, 2, "a smaller --batch-size"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: 9"), 0, 2, "fewer --workers"),
    (KeyboardInterrupt(), 0, 130, "goes on")])
def test_what_ends_a_script_is_one_line(capsys, error, workers, status, said):
    with pytest.raises(SystemExit) as end:
        end_by(error, workers)
    line = capsys.readouterr().err
    assert end.value.code == status and said in line and len(line.splitlines()) == 1


@pytest.mark.parametrize("error, workers", [
    (KeyError("x"), 0), (RuntimeError("sizes differ"), 0), (RuntimeError("sizes differ"), 1),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), 0)])
def test_a_mistake_of_ours_keeps_its_traceback(error, workers):
    with pytest.raises(type(error), match=str(error)):
        end_by(error, workers)
