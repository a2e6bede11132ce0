"""VOC 2012 and COCO 2014 from nothing: archives laid out like the real ones, served from this machine, and COCO's masks
beside pycocotools."""
import errno
import hashlib
import io
import json
import re
import shutil
import sys
import tarfile
import threading
import tracemalloc
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

import eval as evaluation
from conftest import draw_dataset
from eval import (CLASS_OF_COCO_ID, COCO_CLASSES, COCO_IDS, IGNORE, CocoImage, JsonReader, coco_mask, corners, find_dataset,
                  paint, read_coco, read_image_labels, read_label, read_outline, run, run_lengths, write_label, write_text)


@pytest.fixture()
def call(monkeypatch, capsys):
    """Run eval.py in this process: call(options...) -> all that it printed, of several spaces one; a refusal is one line
    and exit status 2."""
    def call(*options, ok=True):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, options)])
        capsys.readouterr()
        try:
            run(evaluation.main)
        except SystemExit as e:
            said = capsys.readouterr()
            line = said.err.strip().split("\r")[-1].splitlines()[-1]
            assert not ok and e.code == 2, line
            return re.sub(" +", " ", said.out) + line
        assert ok, "it should have been refused"
        return re.sub(" +", " ", capsys.readouterr().out)
    return call


class Server(ThreadingHTTPServer):
    """Serves `files` {name: bytes} from 127.0.0.1 and notes what was asked for; of `cut` names it sends only a half."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cut, self.asked = {}, set(), []

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, request, client_address):
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path[1:]
        body = self.server.files.get(name)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.server.asked.append(name)
        if body is not None:
            self.wfile.write(body[:len(body) // 2] if name in self.server.cut else body)
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture()
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def png(label):
    f = io.BytesIO()
    im = Image.fromarray(label, mode="P")
    im.putpalette(evaluation.colour_map().tobytes())
    im.save(f, "PNG")
    return f.getvalue()


def jpg(H=20, W=30):
    f = io.BytesIO()
    Image.new("RGB", (W, H), (90, 120, 60)).save(f, "JPEG")
    return f.getvalue()


def tar(files, mode="w", odd=()):
    """{path: bytes} -> an archive; `odd`: further members."""
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode=mode) as archive:
        for path, body in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
        for member in odd:
            archive.addfile(member)
    return f.getvalue()


def md5(body):
    return hashlib.md5(body).hexdigest()


def stamps(folder):
    """{file: when it was written and what it is}: equal before and after a call that does nothing."""
    return {p.relative_to(folder).as_posix(): (p.lstat().st_mtime_ns, p.lstat().st_ino)
            for p in sorted(folder.rglob("*")) if not p.is_dir()}


# ============================================================================================================== VOC 2012

TRAIN, VAL, SBD_ONLY, TEST = ["2007_1", "2007_2"], ["2007_3", "2007_4"], ["2008_1", "2008_2", "2008_3"], ["2009_1"]
TRAINAUG = sorted(TRAIN + SBD_ONLY)
LABEL = np.zeros((20, 30), np.uint8)
LABEL[5:15, 5:15], LABEL[5:15, 15:25], LABEL[4] = 12, 15, IGNORE


def voc_archive(without_xml=()):
    """Like VOCtrainval_11-May-2012.tar, with what no one wants and what no one should follow."""
    inside = "VOCdevkit/VOC2012"
    files = {f"{inside}/ImageSets/Main/dog_train.txt": b"2007_1 1\n", f"{inside}/SegmentationObject/2007_1.png": png(LABEL),
             f"{inside}/JPEGImages/../../../outside.jpg": jpg(), f"{inside}/JPEGImages/deeper/x.jpg": jpg(),
             "/tmp/JPEGImages/absolute.jpg": jpg()}
    for split, ids in (("train", TRAIN), ("val", VAL), ("trainval", TRAIN + VAL)):
        files[f"{inside}/ImageSets/Segmentation/{split}.txt"] = "".join(f"{i}\n" for i in ids).encode()
    objects = "".join(f"<object><name>{n}</name></object>" for n in ("person", "dog", "dog"))
    for i in TRAIN + VAL + SBD_ONLY + ["2007_9"]:
        files[f"{inside}/JPEGImages/{i}.jpg"] = jpg()
        if i not in without_xml:
            files[f"{inside}/Annotations/{i}.xml"] = f"<annotation>{objects}</annotation>".encode()
    for i in TRAIN + VAL:
        files[f"{inside}/SegmentationClass/{i}.png"] = png(LABEL)
    link = tarfile.TarInfo(f"{inside}/JPEGImages/link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return tar(files, odd=[link])


def sbd_archive(extra=()):
    """Like benchmark.tgz: lists, photos, and masks in .mat files. One of VOC's val stands in its train."""
    files = {"train.txt": [SBD_ONLY[0], TRAIN[0], VAL[0], *extra], "val.txt": SBD_ONLY[1:]}
    files = {f"benchmark_RELEASE/dataset/{k}": "".join(f"{i}\n" for i in v).encode() for k, v in files.items()}
    try:
        from scipy.io import savemat
    except ImportError:
        return tar(files, "w:gz")
    for i in SBD_ONLY + [TRAIN[0], VAL[0]]:
        f, truth = io.BytesIO(), np.where(LABEL == IGNORE, 0, LABEL)
        savemat(f, {"GTcls": {"Segmentation": truth, "CategoriesPresent": np.array([[12], [15]], np.uint8)}})
        files[f"benchmark_RELEASE/dataset/cls/{i}.mat"] = f.getvalue()
        files[f"benchmark_RELEASE/dataset/img/{i}.jpg"] = jpg()
    return tar(files, "w:gz")


@pytest.fixture()
def voc(server, monkeypatch, tmp_path):
    """-> a function that puts VOC's and SBD's archives on the server; the folder to be is tmp_path/VOC2012."""
    from torchvision.datasets import SBDataset
    from torchvision.datasets.voc import DATASET_YEAR_DICT
    monkeypatch.setitem(evaluation.PUBLISHED, "VOC2012", {"train": 2, "val": 2, "trainaug": 5, "test": 1})

    def offer(voc_body, sbd_body):
        server.files = {"VOCtrainval_11-May-2012.tar": voc_body, "benchmark.tgz": sbd_body}
        entry = {**DATASET_YEAR_DICT["2012"], "url": server.url("VOCtrainval_11-May-2012.tar"), "md5": md5(voc_body)}
        monkeypatch.setitem(DATASET_YEAR_DICT, "2012", entry)
        monkeypatch.setattr(SBDataset, "url", server.url("benchmark.tgz"))
        monkeypatch.setattr(SBDataset, "md5", md5(sbd_body))
        return tmp_path / "VOC2012"
    return offer


def without_scipy(monkeypatch):
    find = evaluation.importlib.util.find_spec
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: None if name == "scipy" else find(name))


def test_voc_from_nothing(voc, server, call, tmp_path):
    pytest.importorskip("scipy", reason="scipy is not installed: SBD's .mat files cannot be made nor read")
    root = voc(voc_archive(without_xml=[SBD_ONLY[1]]), sbd_archive())
    said = call("--data", root, "--download")
    assert "trainaug: 1 ids have no Annotations/<id>.xml" in said and "archives may be deleted" in said
    data = find_dataset(str(root))
    assert (data.ids("train"), data.ids("val"), data.ids("trainaug")) == (TRAIN, VAL, TRAINAUG)
    assert set(map(tuple, data.image_labels(TRAINAUG).values())) == {(12, 15)}
    assert {p.name for p in (root / "SegmentationClassAug").iterdir()} == {f"{i}.png" for i in SBD_ONLY}
    assert np.array_equal(read_label(data.truth_path(SBD_ONLY[0])), np.where(LABEL == IGNORE, 0, LABEL))
    assert (read_label(data.truth_path(TRAIN[0])) == LABEL).all()
    assert "trainaug 5 images, 5 true masks, 2.00 classes an image" in call("--data", root, "--check")

    # nothing but the wanted, nothing outside, no link followed
    assert {p.name for p in tmp_path.iterdir()} == {"VOC2012"}
    assert not any(p.is_symlink() or p.name == "x.jpg" for p in root.rglob("*"))
    folders = {"Annotations", "ImageSets", "JPEGImages", "SegmentationClass", "SegmentationClassAug", "archives"}
    assert {p.name for p in root.iterdir()} == folders and not (root / "ImageSets" / "Main").exists()
    assert not Path("/tmp/JPEGImages/absolute.jpg").exists()

    before, asked = stamps(root), len(server.asked)
    call("--data", root, "--download")
    shutil.rmtree(root / "archives")
    call("--data", root, "--download")
    after = stamps(root)
    assert {k: v for k, v in before.items() if not k.startswith("archives/")} == after and len(server.asked) == asked


@pytest.mark.parametrize("broken", ["checksum", "cut"])
def test_a_bad_download_is_one_line_and_what_is_whole_is_kept(voc, server, call, broken, monkeypatch):
    root = voc(voc_archive(), sbd_archive())
    good = torchvision.datasets.SBDataset.md5
    if broken == "cut":
        server.cut = {"benchmark.tgz"}
    else:
        monkeypatch.setattr(torchvision.datasets.SBDataset, "md5", "0" * 32)
    said = call("--data", root, "--download", ok=False)
    assert "benchmark.tgz: what came has not the md5" in said.splitlines()[-1]
    assert [p.name for p in (root / "archives").iterdir()] == ["VOCtrainval_11-May-2012.tar"]
    assert not (root / "ImageSets" / "Segmentation" / "trainaug.txt").exists()

    before = stamps(root)
    server.cut, server.asked = set(), []
    monkeypatch.setattr(torchvision.datasets.SBDataset, "md5", good)
    call("--data", root, "--download")
    assert set(server.asked) == {"benchmark.tgz"} and before.items() <= stamps(root).items()
    assert find_dataset(str(root)).ids("trainaug") == TRAINAUG


def test_a_server_that_is_not_there_is_one_line(voc, server, call):
    root = voc(voc_archive(), sbd_archive())
    server.files = {}
    assert "404" in call("--data", root, "--download", ok=False).splitlines()[-1]
    assert list((root / "archives").iterdir()) == []


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_while_downloading(voc, call, monkeypatch):
    root = voc(voc_archive(), sbd_archive())
    with monkeypatch.context() as m:
        m.setattr(torchvision.datasets.utils, "_urlretrieve", no_space)
        line = call("--data", root, "--download", ok=False).splitlines()[-1]
    assert "No space left on device" in line and "VOCtrainval_11-May-2012.tar" in line
    call("--data", root, "--download")


def test_a_full_disk_while_unpacking(voc, server, call, monkeypatch):
    root, copy, written = voc(voc_archive(), sbd_archive()), shutil.copyfileobj, []

    def fills_up(source, target):
        written.append(target)
        copy(source, target) if len(written) < 6 else no_space()
    with monkeypatch.context() as m:
        m.setattr(evaluation.shutil, "copyfileobj", fills_up)
        line = call("--data", root, "--download", ok=False).splitlines()[-1]
    assert "No space left on device" in line and "goes on from here" in line
    before = stamps(root)
    assert len(before) == 6 and not any(name.endswith(".part") for name in before)  # five files and the archive
    server.asked.clear()
    call("--data", root, "--download")
    assert set(server.asked) == {"benchmark.tgz"} and before.items() <= stamps(root).items()


def test_masks_wait_for_scipy_and_nothing_else_does(voc, server, call, monkeypatch):
    pytest.importorskip("scipy", reason="scipy is not installed: SBD's .mat files cannot be made nor read")
    root = voc(voc_archive(), sbd_archive())
    with monkeypatch.context() as m:
        without_scipy(m)
        said = call("--data", root, "--download")
    assert "0 labels and 3 true masks" in said and "pip install scipy" in said
    assert "trainaug true masks 2 of 5 not needed to run" in call("--data", root, "--check")
    server.asked.clear()
    call("--data", root, "--download")
    assert len(list((root / "SegmentationClassAug").iterdir())) == 3 and server.asked == []


def test_labels_that_only_sbd_has_are_needed(voc, call, monkeypatch):
    root = voc(voc_archive(without_xml=SBD_ONLY), sbd_archive())
    without_scipy(monkeypatch)
    said = call("--data", root, "--download", ok=False)
    assert "3 labels and 3 true masks" in said and "trainaug: 2 of 5 image labels" in said.splitlines()[-1]


def test_the_test_list_comes_with_an_archive_that_was_put_there(voc, call):
    root = voc(voc_archive(), sbd_archive())
    said = call("--data", root, "--download")
    assert "asks for a login" in said and "test ids 0 of 1 not needed to run" in said
    inside = "VOCdevkit/VOC2012"
    body = tar({f"{inside}/ImageSets/Segmentation/test.txt": b"2009_1\n", f"{inside}/JPEGImages/2009_1.jpg": jpg()})
    (root / "archives" / "VOC2012test.tar").write_bytes(body[:body.index(b"\xff\xd8") + 100])
    assert "an archive is broken" in call("--data", root, "--download", ok=False)
    (root / "archives" / "VOC2012test.tar").write_bytes(body)
    assert "login" not in call("--data", root, "--download")
    assert find_dataset(str(root)).ids("test") == TEST


def test_counts_and_archives_that_do_not_fit_are_refused(voc, call):
    root = voc(voc_archive(), sbd_archive(extra=["2008_9"]))
    assert "trainaug comes to 6 ids and not 5" in call("--data", root, "--download", ok=False)
    (root / "archives" / "benchmark.tgz").write_bytes(b"another")
    line = call("--data", root, "--download", ok=False).splitlines()[-1]
    assert "archives/benchmark.tgz: its md5 is not" in line and (root / "archives" / "benchmark.tgz").read_bytes() == b"another"


def test_where_a_download_lands(monkeypatch, tmp_path, call):
    monkeypatch.chdir(tmp_path)
    assert evaluation.folder_to_fill("VOC2012") == Path("data/VOC2012")
    assert evaluation.folder_to_fill("big/disk/VOC2012") == Path("big/disk/VOC2012")
    (tmp_path / "VOC2012").mkdir()
    assert evaluation.folder_to_fill("VOC2012") == Path("VOC2012")
    assert "only VOC2012 and COCO2014 can be downloaded" in call("--data", "holiday", "--download", ok=False)
    assert "only COCO2014 is prepared" in call("--data", "VOC2012", "--prepare", ok=False)
    assert "COCO2014 by --download --prepare" in call("--data", "COCO2014", "--check", ok=False)


def test_check_names_what_differs_from_the_published_numbers(dataset, tmp_path, call):
    draw_dataset(tmp_path / "VOC2012")
    said = call("--data", tmp_path / "VOC2012", "--check", ok=False)
    assert "train ids 6 of 1,464 missing" in said and "test ids" in said
    assert "classes.txt: not VOC2012's 21 names" in said
    (tmp_path / "VOC2012" / "classes.txt").unlink()
    said = call("--data", tmp_path / "VOC2012", "--check", ok=False)
    assert "9 counts are not VOC2012's, first train: 6 of 1,464 ids" in said.splitlines()[-1]
    assert "benchmark.tgz: python eval.py --data" in said and "VOCtrainval_11-May-2012.tar: python" in said
    assert "missing" not in call("--data", dataset, "--check")  # another name says what it found


def test_the_server_archive_wants_all_of_test(tmp_path, call):
    root = draw_dataset(tmp_path / "VOC2012")
    (root / "classes.txt").unlink()
    lists = root / "ImageSets" / "Segmentation"
    shutil.copy(lists / "val.txt", lists / "test.txt")
    said = call("--data", root, "--runs", tmp_path / "runs", "--submit", ok=False)
    assert "2 ids; the server wants all 1,456 of VOC2012's test" in said


# ============================================================================================================= COCO 2014

def test_categories_are_cocos():
    """The 80 ids as COCO's own list has them, written down a second time."""
    gaps = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert COCO_IDS == [i for i in range(91) if i not in gaps] and len(COCO_CLASSES) == 81
    known = {1: "person", 11: "fire hydrant", 13: "stop sign", 27: "backpack", 44: "bottle", 62: "chair", 72: "tv", 90: "toothbrush"}
    assert all(COCO_CLASSES[CLASS_OF_COCO_ID[i]] == name for i, name in known.items())
    assert all(CLASS_OF_COCO_ID[i] == IGNORE for i in gaps | {91, 254, 255}) and CLASS_OF_COCO_ID[0] == 0


CROWD = np.zeros((40, 60), np.uint8)
CROWD[3:9, 4:30], CROWD[20:30, 40:] = 1, 1


def runs(mask):
    """(H, W) -> uncompressed run lengths, the slow way."""
    counts, value = [0], 0
    for pixel in mask.T.ravel():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def compress(counts):
    """Run lengths -> COCO's compressed string."""
    text = ""
    for i, c in enumerate(counts):
        value, more = c - counts[i - 2] if i > 2 else c, True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + (bits | 32 if more else bits))
    return text


PLACES = [  # photo, category, segmentation: in the order of the file, which is not the photos' order
    (0, 18, [[5, 5, 30.5, 6.2, 28.1, 30.7, 4.4, 25]]), (1, 1, [[10, 10, 50, 10, 50, 30, 10, 30]]),
    (0, 1, [[20, 10, 55, 12, 50, 38, 22, 35]]),                                            # overlaps the first
    (2, 90, [[1, 1, 12, 2, 8, 14], [30.2, 20, 45, 22.9, 41, 35.5, 29, 33]]),               # two parts
    (1, 13, [[30, 20, 30.2, 20, 30.2, 20.2, 30, 20.2]]), (2, 44, [[50, 30, 51.4, 30, 51.4, 31.6, 50, 31.6]]),  # tiny
    (3, 1, runs(CROWD)), (3, 62, [[2, 2, 20, 2, 20, 20, 2, 20]]),                           # crowd first, and it wins
    (4, 1, {"size": [40, 60], "counts": compress(runs(CROWD)["counts"])}),                  # the other form
    (5, 72, [[-8, -3, 70, 10, 30, 55]]), (1, 90, [[40, 5, 52.5, 5, 52.5, 14.2, 40, 14.2]]),  # over the rim
    (0, 72, [[10, 30, 40, 10, 40, 30, 10, 10]])]                                            # crosses itself


def instances(split, places, photos, H=40, W=60):
    """A file like instances_train2014.json; the last two photos have no objects."""
    images = [{"license": 5, "file_name": f"COCO_{split}2014_{n:012d}.jpg", "height": H, "width": W, "id": 100 + n,
               "flickr_url": 'http://"quoted", {odd}'} for n in range(photos)]
    annotations = [{"segmentation": s, "area": 7.5, "iscrowd": int(isinstance(s, dict)), "image_id": 100 + n, "category_id": c,
                    "bbox": [1.5, 2, 3, 4], "id": k} for k, (n, c, s) in enumerate(places)]
    categories = [{"supercategory": "x", "id": i, "name": evaluation.COCO_SLOTS[i]} for i in COCO_IDS[1:]]
    return json.dumps({"info": {"year": 2014, "nested": [1, {"a": []}]}, "images": images, "licenses": [{"id": 1}],
                       "annotations": annotations, "categories": categories})


COCO_FILES = {"annotations/instances_train2014.json": instances("train", PLACES, 8).encode(),
              "annotations/instances_val2014.json": instances("val", [(0, 3, [[5, 5, 30, 5, 20, 30]])], 3).encode(),
              **{f"train2014/COCO_train2014_{n:012d}.jpg": jpg(40, 60) for n in range(8)},
              **{f"val2014/COCO_val2014_{n:012d}.jpg": jpg(40, 60) for n in range(3)}}


@pytest.fixture()
def coco(tmp_path, monkeypatch):
    """COCO's own files in small -> their folder."""
    monkeypatch.setitem(evaluation.PUBLISHED, "COCO2014", {"train": 6, "val": 1})
    for name, body in COCO_FILES.items():
        path = tmp_path / "COCO2014" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    return tmp_path / "COCO2014"


def ids_of(split, n):
    return [f"COCO_{split}2014_{i:012d}" for i in range(n)]


def test_coco_is_prepared_once(coco, call, tmp_path):
    call("--data", coco, "--prepare")
    data = find_dataset(str(coco))
    assert data.classes == COCO_CLASSES and (data.ids("train"), data.ids("val")) == (ids_of("train", 6), ids_of("val", 1))
    labels = read_image_labels(coco / "image_labels.txt")
    assert labels[ids_of("train", 1)[0]] == ["person", "dog", "tv"] and labels[ids_of("train", 5)[4]] == ["person"]
    assert data.image_labels(ids_of("train", 3)[2:]) == {ids_of("train", 3)[2]: [40, 80]}  # bottle, toothbrush
    assert len(labels) == 7 and len(list((coco / "SegmentationClass").iterdir())) == 7
    assert "train 6 images, 6 true masks" in call("--data", coco, "--check")

    links = list((coco / "JPEGImages").iterdir())  # photos are not copied, and the folder may be moved
    assert len(links) == 7 and all(p.is_symlink() for p in links)
    before = stamps(coco)
    assert "prepared" in call("--data", coco, "--prepare")
    assert stamps(coco) == before
    coco.rename(tmp_path / "elsewhere")
    assert find_dataset(str(tmp_path / "elsewhere")).image(ids_of("train", 1)[0]).shape == (40, 60, 3)


def test_preparing_goes_on_where_it_was_cut_off(coco, call, monkeypatch):
    write, made = evaluation.write_label, []

    def cut(path, label):
        made.append(path)
        write(path, label) if len(made) <= 3 else no_space()
    with monkeypatch.context() as m:
        m.setattr(evaluation, "write_label", cut)
        assert "No space left" in call("--data", coco, "--prepare", ok=False)
    assert not (coco / "ImageSets").exists()  # nothing that looks finished
    before = {k: v for k, v in stamps(coco).items() if "SegmentationClass" in k}
    call("--data", coco, "--prepare")
    assert before and before.items() <= stamps(coco).items() and len(find_dataset(str(coco)).ids("train")) == 6


def test_photos_may_lie_on_a_disk_that_is_read_only(coco, call, tmp_path):
    for folder in ("annotations", "train2014", "val2014"):
        (tmp_path / "disk").mkdir(exist_ok=True)
        (coco / folder).rename(tmp_path / "disk" / folder)
        (coco / folder).symlink_to(tmp_path / "disk" / folder)
    before = stamps(tmp_path / "disk")
    call("--data", coco, "--prepare")
    assert find_dataset(str(coco)).image(ids_of("val", 1)[0]).shape == (40, 60, 3) and stamps(tmp_path / "disk") == before


def pycoco():
    return pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed: nothing to compare masks with")


def theirs(tool, segmentation, H, W):
    """An object's pixels (H, W) as pycocotools has them (COCO.annToMask)."""
    if isinstance(segmentation, list):
        rle = tool.merge(tool.frPyObjects(segmentation, H, W))
    elif isinstance(segmentation["counts"], list):
        rle = tool.frPyObjects(segmentation, H, W)
    else:
        rle = segmentation
    return tool.decode(rle) > 0


def test_masks_are_pycocotools(coco, call):
    tool = pycoco()
    call("--data", coco, "--prepare")
    for n, image_id in enumerate(ids_of("train", 6)):
        expected = np.zeros((40, 60), np.uint8)
        for _, category, segmentation in [p for p in PLACES if p[0] == n]:
            expected[theirs(tool, segmentation, 40, 60) & (expected == 0)] = CLASS_OF_COCO_ID[category]
        assert np.array_equal(read_label(coco / "SegmentationClass" / f"{image_id}.png"), expected), n


def polygons(rng, n):
    """Polygons of every kind: within and over the rim, on whole and on fifths of pixels, smaller than one, many corners."""
    for k in range(n):
        H, W = map(int, rng.integers(1, 100, 2))
        count, size = int(rng.integers(3, 15)), np.array([W, H])
        yield H, W, [rng.uniform(0, 1, (count, 2)) * size, rng.uniform(-0.3, 1.3, (count, 2)) * size,
                     rng.integers(-2, max(H, W) + 2, (count, 2)).astype(float),
                     rng.uniform(0, 1, 2) * size + rng.normal(0, 0.5, (count, 2)),
                     rng.integers(-20, 5 * max(H, W) + 20, (count, 2)) / 5 + rng.choice([0, 0.1, -0.1, 0.05]),
                     np.round(rng.uniform(0, 1, (8 * count, 2)) * size, 2)][k % 6]


def test_every_polygon_is_pycocotools_to_the_pixel():
    tool = pycoco()
    for H, W, polygon in polygons(np.random.default_rng(0), 3000):
        label = np.zeros((H, W), np.uint8)
        paint(label, [polygon], 1)
        assert np.array_equal(label > 0, theirs(tool, [polygon.ravel().tolist()], H, W)), (H, W, polygon.tolist())


def test_run_lengths_are_pycocotools():
    tool, rng = pycoco(), np.random.default_rng(0)
    for _ in range(300):
        mask = np.kron(rng.integers(0, 2, rng.integers(1, 9, 2)), np.ones(rng.integers(1, 9, 2))).astype(np.uint8)
        text = tool.encode(np.asfortranarray(mask))["counts"].decode()
        assert run_lengths(text) == runs(mask)["counts"] and compress(runs(mask)["counts"]) == text
        label = np.zeros(mask.shape, np.uint8)
        paint(label, read_outline({"size": mask.shape, "counts": text}), 7)
        assert np.array_equal(label, 7 * mask)


def test_an_object_smaller_than_a_pixel_leaves_none_and_the_first_wins():
    box = [corners([2, 2, 8, 2, 8, 7, 2, 7])]
    label = coco_mask(CocoImage("x", 10, 10, [(1, box), (18, [corners([0, 0, 10, 0, 10, 10, 0, 10])]),
                                              (3, [corners([4.3, 4.3, 4.4, 4.3, 4.4, 4.4])])]))
    assert (label[2:7, 2:8] == 1).all() and (label == 1).sum() == 30 and (label == 17).sum() == 70  # 18 is dog, our 17


class Drip:
    """A file that gives a few characters at a time, whatever was asked for."""

    def __init__(self, text, n):
        self.text, self.n = text, n

    def read(self, _):
        piece, self.text = self.text[:self.n], self.text[self.n:]
        return piece


def test_json_is_read_alike_wherever_it_is_cut():
    value = {"a": [1, 23, -4.5e3, "x\\\"]}", {"b": [[], {}, None, True]}, "\u00e9\u4e2d"], "info": {"c": [1]}, "e": [], "n": 12345}
    items = [("a", item) for item in value["a"]]
    for indent in (None, 1):
        for ascii_only in (True, False):
            text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
            for n in range(1, len(text) + 1):
                assert list(JsonReader(Drip(text, n)).items()) == items
    for broken in (text[:-1], text[:40], "", "[1]", '{"a": [1 2]}', '{"a" 1}'):
        with pytest.raises(ValueError, match="JSON"):
            list(JsonReader(Drip(broken, 7)).items())


def test_a_long_file_is_never_in_memory(tmp_path):
    path = tmp_path / "long.json"
    write_text(path, '{"captions": [' + ", ".join(f'"{k:01000d}"' for k in range(12_000)) + "]}")
    tracemalloc.start()
    with open(path, encoding="utf-8") as f:
        n = sum(1 for _ in JsonReader(f).items())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 12_000 and peak < path.stat().st_size / 2


def test_bad_annotations_are_one_line(coco, call):
    path, good = coco / "annotations" / "instances_val2014.json", COCO_FILES["annotations/instances_val2014.json"].decode()
    for old, new, said in (
            ('"person"', '"human"', "its 80 categories are not COCO's 80"), ('"image_id": 100', '"image_id": 7', "photo 7, which"),
            ('"category_id": 3', '"category_id": 12', "category 12, which is none"), ('"image_id"', '"image"', "KeyError('image_id')"),
            ("[[5, 5, 30, 5, 20, 30]]", "[[5, 5, 30]]", "3 numbers"), ('"categories"', '"categories', "not a whole JSON"),
            ("[[5, 5, 30, 5, 20, 30]]", '{"size": [40, 60], "counts": [5, 5]}', "run lengths of"),
            ("[[5, 5, 30, 5, 20, 30]]", '{"size": [60, 40], "counts": [2400]}', "run lengths of")):
        assert old in good
        write_text(path, good.replace(old, new))
        assert said in call("--data", coco, "--prepare", ok=False).splitlines()[-1], said
    path.unlink()
    assert "instances_val2014.json: no such file; --download" in call("--data", coco, "--prepare", ok=False)
    next((coco / "train2014").iterdir()).unlink()
    assert "of 6 photos missing" in call("--data", coco, "--prepare", ok=False) or len(read_coco(coco / "annotations" / "instances_train2014.json")) == 6


def test_coco_is_downloaded_and_prepared_in_one_command(server, monkeypatch, tmp_path, call):
    monkeypatch.setitem(evaluation.PUBLISHED, "COCO2014", {"train": 6, "val": 1})
    wanted, archives = {}, {}
    for name, folder, n in (("annotations_trainval2014", "annotations", 2), ("train2014", "train2014", 8), ("val2014", "val2014", 3)):
        f, files = io.BytesIO(), {k: v for k, v in COCO_FILES.items() if k.startswith(folder)}
        with zipfile.ZipFile(f, "w") as archive:
            for path, body in {**files, f"{folder}/captions_train2014.json": b"{}", f"{folder}/../../x.jpg": b"x"}.items():
                archive.writestr(path, body)
        server.files[f"{name}.zip"] = f.getvalue()
        archives[server.url(f"{name}.zip")] = md5(f.getvalue())
        pattern = "instances_*2014.json" if folder == "annotations" else "*.jpg"
        wanted[f"{name}.zip"] = f"{folder}/{pattern}", n
    monkeypatch.setattr(evaluation, "COCO_ARCHIVES", archives)
    monkeypatch.setattr(evaluation, "COCO_WANTED", wanted)
    root = tmp_path / "COCO2014"
    server.cut = {"val2014.zip"}
    assert "val2014.zip" in call("--data", root, "--download", "--prepare", ok=False)
    server.cut, server.asked = set(), []
    call("--data", root, "--download", "--prepare")
    assert set(server.asked) == {"val2014.zip"} and [p.name for p in tmp_path.iterdir()] == ["COCO2014"]
    assert not (root / "annotations" / "captions_train2014.json").exists()
    call("--data", root, "--check")
    before = stamps(root)
    server.asked.clear()
    call("--data", root, "--download", "--prepare")
    assert stamps(root) == before and server.asked == []


def test_the_real_archives_are_named_consistently():
    assert {url.rpartition("/")[2] for url in evaluation.COCO_ARCHIVES} == set(evaluation.COCO_WANTED)
    assert all(len(v) == 32 for v in evaluation.COCO_ARCHIVES.values())
    assert torchvision.datasets.voc.DATASET_YEAR_DICT["2012"]["url"].endswith("/" + evaluation.VOC_ARCHIVE)
    assert torchvision.datasets.SBDataset.url.endswith("/" + evaluation.SBD_ARCHIVE)


# ============================================================================================================== 91 slots

def test_masks_of_category_ids_are_scored_and_converted(coco, dataset, call, tmp_path):
    call("--data", coco, "--prepare")
    masks = tmp_path / "theirs"
    for i in ids_of("train", 6):
        truth = read_label(coco / "SegmentationClass" / f"{i}.png")
        write_label(masks / f"{i}.png", np.array(COCO_IDS, np.uint8)[truth])
    given = ["--data", coco, "--masks", masks, "--split", "train"]
    assert "6 of 6 100.0 100.0%" in call(*given, "--ids", 91)
    assert "class number 90, the dataset has 0..80" in call(*given, ok=False)  # not mistaken in silence
    call(*given, "--ids", 91, "--prepare")
    assert "6 of 6 100.0 100.0%" in call("--data", coco, "--masks", tmp_path / "theirs_81", "--split", "train")

    first = ids_of("train", 1)[0]
    write_label(masks / f"{first}.png", np.full((40, 60), 12, np.uint8))  # an id that COCO never used: all missed
    write_label(masks / f"{ids_of('train', 2)[1]}.png", np.full((40, 60), IGNORE, np.uint8))
    row = evaluation.score_folder(find_dataset(str(coco)), masks, "train", coco_ids=True)
    assert row["n"] == 6 and row["iou"][COCO_CLASSES.index("dog")] == 0
    assert "has not COCO's 81 classes" in call("--data", dataset, "--masks", masks, "--ids", 91, ok=False)
    assert "name that folder" in call("--data", coco, "--ids", 91, ok=False)
