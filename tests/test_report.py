"""report.html: what stands in it for full and for half-finished runs, and what a browser makes of it."""
import base64
import io
import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
from conftest import CLASSES, draw_dataset, read_json, script
from eval import (IGNORE, describe_provenance, find_dataset, read_label, where_wrong, write_json,
                  write_label, write_report, write_text, write_whole)

LOSSES = {"1_cam": ["loss_multilabel"], "2_weakclip": ["loss_seeding", "loss_boundary", "loss_score"],
          "3_segment": ["loss_cross_entropy"]}
ODD_CLASS = 'traffic <light> & "co"'
VOID = {"meta", "img", "br"}
OPTIONAL_END = {"tr", "td", "th"}  # HTML lets these be closed by what follows


def fake_runs(data, runs):
    """What the three stages leave behind for a drawn dataset, without training: labels are the truth moved to the right."""
    folder, rng = runs / data.name, np.random.default_rng(0)
    for stage, losses in LOSSES.items():
        write_json(folder / stage / "args.json", {
            "options": {"split": "train", "limit": None, "lr": 0.1}, "commit": "0123abc", "device": "cpu <test>",
            "provenance": {"iters": 4000, "scales": [1.0], "flip": True, "crf": stage != "1_cam", "label_filter": False}})
        log = [{"step": s, "lr": 0.1, "loss": 3.0, **{n: float(5 / (1 + s) + rng.random()) for n in losses}}
               for s in range(0, 4000, 10)]
        write_text(folder / stage / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log) + '{"step": 40')  # cut off
    outputs = [("train", folder / "1_cam" / "seeds"), ("train", folder / "2_weakclip" / "masks" / "train"),
               ("val", folder / "2_weakclip" / "masks" / "val"), ("val", folder / "3_segment" / "masks" / "val")]
    for moved, (split, masks) in zip((15, 10, 7, 3), outputs):
        for i in data.ids(split):
            write_label(masks / f"{i}.png", np.roll(read_label(data.truth_path(i)), moved, 1))
    for i in data.ids("train"):
        classes = np.unique(read_label(data.truth_path(i)))[1:]
        cam = rng.random((len(classes), 15, 20)).astype(np.float16)
        write_whole(folder / "1_cam" / "cams" / f"{i}.npz", lambda f: np.savez_compressed(f, keys=classes, cam=cam))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A drawn dataset and its finished runs -> (dataset, runs/<dataset>); eval.py has written the report."""
    tmp = tmp_path_factory.mktemp("report")
    root = draw_dataset(tmp / "drawn", train=8, val=3)
    write_text(root / "classes.txt", f"background\ncat\ndog\n{ODD_CLASS}\n")
    labels = (root / "image_labels.txt").read_text()
    write_text(root / "image_labels.txt", labels.replace(CLASSES[3], ODD_CLASS))
    data = find_dataset(root)
    folder = fake_runs(data, tmp / "runs")
    assert "report.html" in script("eval.py", "--data", root, "--runs", tmp / "runs")
    return data, folder


class Page(HTMLParser):
    """Well-formed, and then: its tags with their attributes, and its text."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID | OPTIONAL_END and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += "" if self.open[-1:] == ["style"] else text

    def all(self, tag):
        return [a for t, a in self.tags if t == tag]


# =============================================================================================================== content

def test_every_stage_row_class_and_loss_is_on_the_page(runs):
    data, folder = runs
    page, rows = Page(folder / "report.html"), read_json(folder / "metrics.json")["rows"]
    assert len(rows) == 4
    for r in rows:
        line = f"{r['stage']}{r['split']}{r['n']} of {r['of']}{r['miou']:.1f}{r['pixel_accuracy']:.1f}%"
        assert line + describe_provenance(r) in page.text and "4000 iterations" in describe_provenance(r)
        assert all(f"{v:.1f}" in page.text for v in r["iou"].values() if v is not None)
    for name in (*sum(LOSSES.values(), []), *data.classes, *LOSSES, "cpu <test>", "CAM of cat", "iteration 3990"):
        assert name in page.text, name
    assert len(page.all("polyline")) == 6  # the five losses, and the sum where there is more than one
    assert page.text.count("prediction: where wrong") == 3 and page.text.count("masks: where wrong") == 6


def test_a_picture_of_another_photo_says_so(runs):
    """Stage 3 predicts val: its picture in the figure of the stages is not of the photo that the figure begins with."""
    text = Page(runs[1] / "report.html").text
    assert text.count("another photo") == 1 and "3_segment/masks, another photo" in text


def test_page_is_one_file(runs):
    page = Page(runs[1] / "report.html")
    html = (runs[1] / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\(|<script|<link", html)
    assert ODD_CLASS not in html and escape(ODD_CLASS) in html
    images = page.all("img")
    assert len(images) == 6 * 6 + 3 * 5 + 4  # all that became of six and three photos; the figure of the stages has four
    for a in images:
        kind, coded = re.fullmatch(r"data:image/(jpeg|png);base64,(.+)", a["src"]).groups()
        with Image.open(io.BytesIO(base64.b64decode(coded, validate=True))) as im:
            im.load()
            assert im.format.lower() == kind and max(im.size) <= 256 and a["alt"]
    for polyline in page.all("polyline"):
        points = np.array([p.split(",") for p in polyline["points"].split()], float)
        assert len(points) == 150 and (points >= 0).all() and (points <= (320, 136)).all()
    assert {a["href"][1:] for a in page.all("a")} == {a["id"] for a in page.all("section")}


def test_where_wrong():
    truth = np.array([[0, 1, 0, 1, 1, 0, IGNORE, 1]], np.uint8)
    label = np.array([[0, 1, 2, 2, 0, IGNORE, 1, IGNORE]], np.uint8)
    assert where_wrong(truth, label).tolist() == [[0, 0, 1, 1, 2, 2, 3, 2]]  # right, right, wrong, wrong, missed, ...


def drawn_boxes(monkeypatch, *given):
    """`overlay` of these -> the picture, and where it has written names."""
    seen = []
    write_name = evaluation.write_name

    def watched(*given):
        write_name(*given)
        boxes = given[-1]
        seen.append(boxes[-1])
    monkeypatch.setattr(evaluation, "write_name", watched)
    return evaluation.overlay(*given), seen


@pytest.mark.parametrize("height, width", [(300, 400), (400, 300)])
def test_names_on_a_picture_are_whole_and_apart(monkeypatch, height, width):
    names = ("background", "great spotted woodpecker with a red nape", "cow", "Kettwigerstrassenbahnhaltestelle",
             "sheep of the neighbour's small flock")
    label = np.zeros((height, width), np.uint8)
    for k in range(1, 5):
        label[80 + 20 * k:120 + 20 * k, 70 * k - 60:70 * k + 5] = k
    photo = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    picture, boxes = drawn_boxes(monkeypatch, photo, label, names, 800)
    assert max(picture.shape) == 800 and len(boxes) == 4
    for n, (left, top, right, bottom) in enumerate(boxes):
        assert 0 <= left < right <= picture.shape[1] and 0 <= top < bottom <= picture.shape[0]
        for a, b, c, d in boxes[:n]:
            assert c <= left or right <= a or d <= top or bottom <= b


def test_a_mask_has_its_class_colour_whatever_the_photo(monkeypatch):
    """So that the legend beside the row can be found in it; background stays photo."""
    photo = np.zeros((40, 40, 3), np.uint8)
    photo[:] = 20, 200, 180
    label = np.zeros((40, 40), np.uint8)
    label[20:] = 17
    picture, _ = drawn_boxes(monkeypatch, photo, label, [" "] * 17 + ["."], 40)
    hue, grey = np.array(evaluation.colour_map()[17], float), photo[0, 0].mean()
    assert (np.abs(picture[25, 2] - (grey + hue) / 2) <= 1).all() and (picture[5, 5] == photo[0, 0]).all()


def test_what_is_absent_is_left_out(runs, tmp_path):
    data, finished = runs
    root, folder = shutil.copytree(data.root, tmp_path / "drawn"), shutil.copytree(finished, tmp_path / "runs" / "drawn")
    (folder / "report.html").unlink()
    shutil.rmtree(folder / "3_segment")
    shutil.rmtree(folder / "1_cam" / "cams")
    (folder / "2_weakclip" / "log.jsonl").unlink()
    (root / "SegmentationClass" / "val_0.png").unlink()
    script("eval.py", "--data", root, "--runs", tmp_path / "runs")
    text = Page(folder / "report.html").text
    assert "3_segment" not in text and "CAM of" not in text and "loss_seeding" not in text and "loss_multilabel" in text
    assert text.count("masks: where wrong") == 6 + 2

    shutil.rmtree(root / "SegmentationClass")  # no truth at all: no score, but pictures and losses
    line = script("eval.py", "--data", root, "--runs", tmp_path / "runs", ok=False)
    text = Page(folder / "report.html").text
    assert "truth" in line and "where wrong" not in text and "mIoU" not in text and "loss_multilabel" in text

    write_report(data, tmp_path / "none", [])
    assert not (tmp_path / "none").exists()


# =============================================================================================================== browser

@pytest.mark.parametrize("width", [360, 1280])
def test_chromium_opens_it(runs, tmp_path, width):
    """Nothing is wider than the page, every picture is drawn, and the screenshot is not of a few colours."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on this machine")
    report = (runs[1] / "report.html").read_text()  # in a frame, because Chromium's window is never narrower than 500
    write_text(tmp_path / "frame.html", f"""<!DOCTYPE html><body style="margin: 0">
        <iframe srcdoc="{escape(report)}" style="width: {width}px; height: 900px; border: 0"></iframe><script>
        onload = () => {{ const page = frames[0].document; document.body.dataset.seen = [frames[0].innerWidth,
            page.documentElement.scrollWidth, [...page.images].filter(i => i.naturalWidth).length] }}</script></body>""")

    def chromium(option):
        r = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,900",
                            f"--user-data-dir={tmp_path / 'profile'}", option, (tmp_path / "frame.html").as_uri()],
                           capture_output=True, text=True, timeout=120)
        assert r.returncode == 0, r.stderr
        return r.stdout
    frame, page, images = map(int, re.search(r'data-seen="(\d+),(\d+),(\d+)"', chromium("--dump-dom")).groups())
    assert page <= frame == width and images == report.count("<img ")
    chromium(f"--screenshot={tmp_path / 'shot.png'}")
    with Image.open(tmp_path / "shot.png") as im:
        assert len(im.convert("RGB").crop((0, 0, width, 900)).getcolors(1 << 21)) > 50
