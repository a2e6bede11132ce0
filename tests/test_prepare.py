"""VOC 2012 and COCO 2014 from nothing: small archives as the real ones are laid out.

VOC's are served from this machine. COCO's masks are made by pycocotools, and boxes with whole
corners say what they must be.
"""
import hashlib
import io
import json
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import SBDataset
from torchvision.datasets.voc import DATASET_YEAR_DICT

import eval as evaluation
from eval import COCO_CLASSES, COCO_SLOTS, find_dataset, read_label, write_label, write_text

# ===================================================================================== VOC 2012

TRAIN, VAL, MORE = ["2007_1", "2007_2"], ["2007_3", "2007_4"], ["2008_1", "2008_2", "2008_3"]
SBD = {"train": [MORE[0], TRAIN[0], VAL[0]], "val": MORE[1:]}  # its train has an id of VOC's val


class Handler(BaseHTTPRequestHandler):
    """Gives what the server's `files` {path: bytes} has, and notes in `asked` what was wanted."""

    def do_GET(self):
        self.server.asked.append(self.path)
        body = self.server.files.get(self.path)
        self.send_response(200 if body else 404)
        self.end_headers()
        self.wfile.write(body or b"")


@pytest.fixture()
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.asked = {}, []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def packed(path, name, mode):
    """Bytes of an archive of a file or folder, which has this name in it."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode=mode) as tar:
        tar.add(path, name)
    return archive.getvalue()


@pytest.fixture()
def voc(server, tmp_path, monkeypatch):
    """VOC's and SBD's archives are on the server, and we are where data/ will be."""
    root, sbd = tmp_path / "VOCdevkit" / "VOC2012", tmp_path / "benchmark_RELEASE"
    (root / "JPEGImages").mkdir(parents=True)
    for i in TRAIN + VAL + MORE:
        Image.new("RGB", (30, 20)).save(root / "JPEGImages" / f"{i}.jpg")
        write_text(root / "Annotations" / f"{i}.xml", "<a><object><name>dog</name></object></a>")
    for i in TRAIN + VAL:
        write_label(root / "SegmentationClass" / f"{i}.png", np.full((20, 30), 12))
    for split, ids in (("train", TRAIN), ("val", VAL)):
        write_text(root / f"ImageSets/Segmentation/{split}.txt", "\n".join(ids))
        write_text(sbd / f"dataset/{split}.txt", "\n".join(SBD[split]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "VOC_MASKS", 4)
    monkeypatch.setitem(evaluation.PUBLISHED, "VOC2012", {"train": 2, "val": 2, "trainaug": 5})
    bodies = packed(root.parent, "VOCdevkit", "w"), packed(sbd, sbd.name, "w:gz")
    server.files = dict(zip(("/voc.tar", "/sbd.tgz"), bodies))
    urls = [f"http://127.0.0.1:{server.server_port}{path}" for path in server.files]
    digests = [hashlib.md5(body).hexdigest() for body in bodies]
    entry = {**DATASET_YEAR_DICT["2012"], "url": urls[0], "md5": digests[0]}
    monkeypatch.setitem(DATASET_YEAR_DICT, "2012", entry)
    monkeypatch.setattr(SBDataset, "url", urls[1])
    monkeypatch.setattr(SBDataset, "md5", digests[1])


DOWNLOAD = ("eval.py", "--data", "VOC2012", "--download")


def test_voc_comes_once_and_trainaug_without_val(voc, server, call):
    """The list has SBD's ids and VOC's train, and none of VOC's val (27, 94)."""
    assert "trainaug       5 images (published: 5), 2 true masks" in call(*DOWNLOAD)
    data = find_dataset("VOC2012")
    assert data.ids("trainaug") == sorted(TRAIN + MORE) and data.ids("val") == VAL
    assert data.image_labels(MORE[:1]) == {MORE[0]: [12]}
    server.asked.clear()
    call(*DOWNLOAD)
    assert server.asked == []


def test_a_download_that_fails_is_one_line_and_begins_again(voc, server, call):
    whole = dict(server.files)
    server.files["/voc.tar"] = b"cut"
    assert "the same command begins again" in call(*DOWNLOAD, ok=False)
    server.files = {"/voc.tar": whole["/voc.tar"]}
    assert "404" in call(*DOWNLOAD, ok=False)
    server.files = whole
    call(*DOWNLOAD)


def test_a_list_of_sbd_that_is_not_sbds_is_refused(voc, call, monkeypatch):
    monkeypatch.setattr(SBDataset, "md5", "0" * 32)
    assert "begins again" in call(*DOWNLOAD, ok=False)
    assert not find_dataset("VOC2012").has("trainaug")


def test_a_trainaug_of_another_length_is_refused(voc, call, monkeypatch):
    monkeypatch.setitem(evaluation.PUBLISHED, "VOC2012", {"trainaug": 6})
    assert "trainaug comes to 5 ids, not as published" in call(*DOWNLOAD, ok=False)
    assert not find_dataset("VOC2012").has("trainaug")


def test_a_path_out_of_an_archive_is_not_followed(voc, server, call, tmp_path, monkeypatch):
    server.files["/voc.tar"] = packed(__file__, "../outside.jpg", "w")
    monkeypatch.setitem(DATASET_YEAR_DICT["2012"], "md5", None)
    assert "outside.jpg" in call(*DOWNLOAD, ok=False)
    assert not (tmp_path / "outside.jpg").exists()


# ==================================================================================== COCO 2014

H, W = 40, 60
CATEGORIES = [{"id": COCO_SLOTS.index(name), "name": name} for name in COCO_CLASSES[1:]]


def box(category, photo, left, top, right, bottom):
    """An object whose polygon is a box with whole corners."""
    corners = [left, top, right, top, right, bottom, left, bottom]
    return {"category_id": category, "image_id": photo, "segmentation": [corners], "iscrowd": 0}


# The columns 10 to 19, as run lengths: so many pixels outside, inside, outside, column by column.
CROWD = {"category_id": 1, "image_id": 102, "iscrowd": 1,
         "segmentation": {"size": [H, W], "counts": [10 * H, 10 * H, 40 * H]}}
OBJECTS = {"train": [box(18, 101, 5, 5, 30, 25), box(90, 102, 0, 0, 15, 10), CROWD,
                     box(1, 101, 20, 10, 50, 38)], "val": [box(62, 100, 2, 2, 20, 20)]}


@pytest.fixture()
def coco(tmp_path, monkeypatch):
    """COCO's own files in small -> their folder. Photo 0 of train has no objects."""
    root = tmp_path / "COCO2014"
    monkeypatch.setitem(evaluation.PUBLISHED, "COCO2014", {"train": 2, "val": 1})
    for split, n in (("train", 3), ("val", 1)):
        images = [{"id": 100 + k, "height": H, "width": W,
                   "file_name": f"../{split}2014/{split}_{k}.jpg"} for k in range(n)]
        objects = [{**found, "id": k} for k, found in enumerate(OBJECTS[split])]
        content = {"images": images, "annotations": objects, "categories": CATEGORIES}
        write_text(root / "annotations" / f"instances_{split}2014.json", json.dumps(content))
        (root / f"{split}2014").mkdir()
        for image in images:
            Image.new("RGB", (W, H)).save(root / f"{split}2014" / image["file_name"])
    return root


def test_numbers_are_cocos_own_without_the_gaps():
    """Written down a second time (32)."""
    for number, k, name in ((1, 1, "person"), (44, 40, "bottle"), (90, 80, "toothbrush")):
        assert COCO_SLOTS[number] == COCO_CLASSES[k] == name


def test_coco_becomes_vocs_layout(coco, call, tmp_path):
    """The first of two objects wins, and a crowd is a place of its class (93)."""
    pytest.importorskip("pycocotools.coco", reason="wants pycocotools: pip install pycocotools")
    call("eval.py", "--data", coco, "--prepare")
    said = call("eval.py", "--data", coco, "--check")
    assert "train          2 images (published: 2), 2 true masks" in said
    coco.rename(tmp_path / "moved")  # photos are links, within the folder
    data = find_dataset(tmp_path / "moved")
    assert data.classes == COCO_CLASSES and data.image_path("val_0").is_symlink()
    assert data.ids("train") == ["train_1", "train_2"]
    assert data.image_labels(["train_1", "train_2"]) == {"train_1": [1, 17], "train_2": [1, 80]}
    expected = np.zeros((2, H, W))
    expected[0, 10:38, 20:50] = 1
    expected[0, 5:25, 5:30] = 17
    expected[1, :, 10:20] = 1
    expected[1, :10, :15] = 80
    found = [read_label(data.truth_path(image_id)) for image_id in data.ids("train")]
    assert np.array_equal(found, expected)


def test_what_is_not_coco_is_refused(coco, call):
    pytest.importorskip("pycocotools.coco", reason="wants pycocotools: pip install pycocotools")
    path = coco / "annotations" / "instances_val2014.json"
    write_text(path, path.read_text().replace('"person"', '"human"'))
    line = call("eval.py", "--data", coco, "--prepare", ok=False)
    assert "its 80 categories are not COCO's 80" in line and not (coco / "ImageSets").exists()


def test_without_pycocotools_and_for_other_data_it_is_one_line(coco, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    line = call("eval.py", "--data", coco, "--prepare", ok=False)
    assert line == "--prepare wants pycocotools: pip install pycocotools"
    for option, right in (("--prepare", "a folder COCO2014 is expected"),
                          ("--download", "brings VOC2012 alone")):
        assert right in call("eval.py", "--data", "holiday", option, ok=False)
