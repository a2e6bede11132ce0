"""VOC 2012 and COCO 2014 from nothing.

Archives are laid out like the real ones, in small, and served from this machine. COCO's masks are
held beside pycocotools.
"""
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
from torchvision.datasets import SBDataset
from torchvision.datasets.voc import DATASET_YEAR_DICT

import eval as evaluation
from conftest import draw_dataset
from eval import (CLASS_OF_COCO_ID, COCO_CLASSES, COCO_IDS, COCO_SLOTS, IGNORE, CocoImage,
                  JsonReader, coco_mask, corners, find_dataset, paint, read_image_labels,
                  read_label, read_outline, run, run_lengths, score_folder, write_label, write_text)

# pycocotools calls numpy in a way that numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


@pytest.fixture()
def call(monkeypatch, capsys):
    """Run eval.py in this process: call(options...) -> all that it printed, of many spaces one.

    A refusal must be one line with exit status 2; it stands last in what is returned.
    """
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
    """Serves `files` {name: bytes} from 127.0.0.1 and notes what was `asked` for.

    Of the names in `cut` it sends a half and hangs up.
    """

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
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def png(label):
    f = io.BytesIO()
    picture = Image.fromarray(label, mode="P")
    picture.putpalette(evaluation.colour_map().tobytes())
    picture.save(f, "PNG")
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
    """{file: when it was written, and which it is}: what a call that does nothing leaves alike."""
    files = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    return {path.relative_to(folder).as_posix(): (path.lstat().st_mtime_ns, path.lstat().st_ino)
            for path in files}


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def last_line(said):
    return said.splitlines()[-1]


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


# ================================================================================================
# VOC 2012
# ================================================================================================

TRAIN, VAL, TEST = ["2007_1", "2007_2"], ["2007_3", "2007_4"], ["2009_1"]
SBD_ONLY = ["2008_1", "2008_2", "2008_3"]
TRAINAUG = sorted(TRAIN + SBD_ONLY)
LABEL = np.zeros((20, 30), np.uint8)
LABEL[5:15, 5:15] = 12
LABEL[5:15, 15:25] = 15
LABEL[4] = IGNORE
SBD_LABEL = np.where(LABEL == IGNORE, 0, LABEL)
VOC_TAR, SBD_TAR, TEST_TAR = "VOCtrainval_11-May-2012.tar", "benchmark.tgz", "VOC2012test.tar"
INSIDE = "VOCdevkit/VOC2012"
NEEDS_SCIPY = "scipy is not installed: SBD's .mat files can neither be made nor read"


def lines_of(ids):
    return "".join(f"{i}\n" for i in ids).encode()


def voc_archive(without_xml=()):
    """Like VOC's, with files that nobody wants and some that nobody should follow."""
    files = {f"{INSIDE}/ImageSets/Main/dog_train.txt": b"2007_1 1\n",
             f"{INSIDE}/SegmentationObject/2007_1.png": png(LABEL),
             f"{INSIDE}/JPEGImages/../../../outside.jpg": jpg(),
             f"{INSIDE}/JPEGImages/deeper/x.jpg": jpg(),
             "/tmp/JPEGImages/absolute.jpg": jpg()}
    for split, ids in (("train", TRAIN), ("val", VAL), ("trainval", TRAIN + VAL)):
        files[f"{INSIDE}/ImageSets/Segmentation/{split}.txt"] = lines_of(ids)
    objects = "".join(f"<object><name>{n}</name></object>" for n in ("person", "dog", "dog"))
    for i in TRAIN + VAL + SBD_ONLY + ["2007_9"]:
        files[f"{INSIDE}/JPEGImages/{i}.jpg"] = jpg()
        if i not in without_xml:
            xml = f"<annotation>{objects}</annotation>"
            files[f"{INSIDE}/Annotations/{i}.xml"] = xml.encode()
    for i in TRAIN + VAL:
        files[f"{INSIDE}/SegmentationClass/{i}.png"] = png(LABEL)
    link = tarfile.TarInfo(f"{INSIDE}/JPEGImages/link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return tar(files, odd=[link])


def sbd_archive(extra=()):
    """Like SBD's: lists, photos, and .mat files. One id of VOC's val stands in its train."""
    folder = "benchmark_RELEASE/dataset"
    files = {f"{folder}/train.txt": lines_of([SBD_ONLY[0], TRAIN[0], VAL[0], *extra]),
             f"{folder}/val.txt": lines_of(SBD_ONLY[1:])}
    try:
        from scipy.io import savemat
    except ImportError:
        return tar(files, "w:gz")
    truth = {"Segmentation": SBD_LABEL, "CategoriesPresent": np.array([[12], [15]], np.uint8)}
    for i in SBD_ONLY + [TRAIN[0], VAL[0]]:
        f = io.BytesIO()
        savemat(f, {"GTcls": truth})
        files[f"{folder}/cls/{i}.mat"] = f.getvalue()
        files[f"{folder}/img/{i}.jpg"] = jpg()
    return tar(files, "w:gz")


@pytest.fixture()
def voc(server, monkeypatch, tmp_path):
    """voc(archive of VOC, archive of SBD) puts both on the server -> the folder to be."""
    sizes = {"train": 2, "val": 2, "trainaug": 5, "test": 1}
    monkeypatch.setitem(evaluation.PUBLISHED, "VOC2012", sizes)

    def offer(voc_body, sbd_body):
        server.files = {VOC_TAR: voc_body, SBD_TAR: sbd_body}
        entry = {**DATASET_YEAR_DICT["2012"], "url": server.url(VOC_TAR), "md5": md5(voc_body)}
        monkeypatch.setitem(DATASET_YEAR_DICT, "2012", entry)
        monkeypatch.setattr(SBDataset, "url", server.url(SBD_TAR))
        monkeypatch.setattr(SBDataset, "md5", md5(sbd_body))
        return tmp_path / "VOC2012"
    return offer


def hide_scipy(monkeypatch):
    find = evaluation.importlib.util.find_spec

    def find_all_but_scipy(name):
        return None if name == "scipy" else find(name)
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", find_all_but_scipy)


def test_voc_from_nothing(voc, call):
    pytest.importorskip("scipy", reason=NEEDS_SCIPY)
    root = voc(voc_archive(without_xml=[SBD_ONLY[1]]), sbd_archive())
    said = call("--data", root, "--download")
    assert "trainaug: 1 ids have no Annotations/<id>.xml" in said
    assert "archives may be deleted" in said
    data = find_dataset(str(root))
    assert data.ids("train") == TRAIN and data.ids("val") == VAL
    assert data.ids("trainaug") == TRAINAUG  # without the id of val that SBD has
    assert data.image_labels(TRAINAUG) == dict.fromkeys(TRAINAUG, [12, 15])
    assert names_in(root / "SegmentationClassAug") == {f"{i}.png" for i in SBD_ONLY}
    assert np.array_equal(read_label(data.truth_path(SBD_ONLY[0])), SBD_LABEL)
    assert np.array_equal(read_label(data.truth_path(TRAIN[0])), LABEL)
    said = call("--data", root, "--check")
    assert "trainaug 5 images, 5 true masks, 2.00 classes an image" in said


def test_nothing_unwanted_is_unpacked_and_nothing_outside(voc, call, tmp_path):
    root = voc(voc_archive(), sbd_archive())
    call("--data", root, "--download")
    assert names_in(tmp_path) == {"VOC2012"}
    assert not Path("/tmp/JPEGImages/absolute.jpg").exists()
    photos = TRAIN + VAL + SBD_ONLY + ["2007_9"]
    assert names_in(root / "JPEGImages") == {f"{i}.jpg" for i in photos}  # no link, no folder
    assert names_in(root / "ImageSets") == {"Segmentation"}
    assert not (root / "SegmentationObject").exists()


def test_a_second_call_does_nothing_with_or_without_the_archives(voc, server, call):
    root = voc(voc_archive(), sbd_archive())
    call("--data", root, "--download")
    server.asked.clear()
    before = stamps(root)
    call("--data", root, "--download")
    assert stamps(root) == before
    if "SegmentationClassAug" in names_in(root):  # without scipy masks are waited for
        shutil.rmtree(root / "archives")
        call("--data", root, "--download")
        assert "archives" not in names_in(root)
    assert server.asked == []


@pytest.mark.parametrize("broken", ["checksum", "cut"])
def test_a_bad_download_is_one_line_and_what_is_whole_is_kept(
        voc, server, call, broken, monkeypatch):
    root = voc(voc_archive(), sbd_archive())
    right = SBDataset.md5
    if broken == "cut":
        server.cut = {SBD_TAR}
    else:
        monkeypatch.setattr(SBDataset, "md5", "0" * 32)
    said = call("--data", root, "--download", ok=False)
    assert "benchmark.tgz: what came has not the md5" in last_line(said)
    assert names_in(root / "archives") == {VOC_TAR}
    assert not find_dataset(str(root)).has("trainaug")

    before = stamps(root)
    server.cut = set()
    server.asked.clear()
    monkeypatch.setattr(SBDataset, "md5", right)
    call("--data", root, "--download")
    assert set(server.asked) == {SBD_TAR} and before.items() <= stamps(root).items()
    assert find_dataset(str(root)).ids("trainaug") == TRAINAUG


def test_an_address_that_is_gone_is_one_line(voc, server, call):
    root = voc(voc_archive(), sbd_archive())
    server.files = {}
    assert "404" in last_line(call("--data", root, "--download", ok=False))
    assert names_in(root / "archives") == set()


def test_a_full_disk_while_downloading(voc, call, monkeypatch):
    root = voc(voc_archive(), sbd_archive())
    with monkeypatch.context() as m:
        m.setattr(torchvision.datasets.utils, "_urlretrieve", no_space)
        line = last_line(call("--data", root, "--download", ok=False))
    assert "No space left on device" in line and VOC_TAR in line
    call("--data", root, "--download")


@pytest.mark.parametrize("ending", ["tar", "tgz", "zip"])
def test_the_bar_of_an_archive_tells_the_time_left(tmp_path, capsys, ending):
    path = tmp_path / f"photos.{ending}"
    noise = np.random.default_rng(0).bytes(200_000)
    if ending == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in "abc":
                archive.writestr(name, noise)
    else:
        with tarfile.open(path, "w:gz" if ending == "tgz" else "w") as archive:
            for name in "abc":
                member = tarfile.TarInfo(name)
                member.size = len(noise)
                archive.addfile(member, io.BytesIO(noise))
    assert [(str(p), len(f.read())) for p, f in evaluation.archive_files(path)] == [(n, len(noise)) for n in "abc"]
    last = capsys.readouterr().err.split("\r")[-1]
    assert re.search(rf"reading photos.{ending}: +(9\d|100)%.*<00:00", last), last


def test_a_full_disk_while_unpacking(voc, server, call, monkeypatch):
    root = voc(voc_archive(), sbd_archive())
    copy, written = shutil.copyfileobj, []

    def fill_up(source, target):
        written.append(target)
        if len(written) == 6:
            no_space()
        copy(source, target)
    with monkeypatch.context() as m:
        m.setattr(evaluation.shutil, "copyfileobj", fill_up)
        line = last_line(call("--data", root, "--download", ok=False))
    assert "No space left on device" in line and "goes on from here" in line
    before = stamps(root)
    assert len(before) == 6  # five whole files and the archive
    server.asked.clear()
    call("--data", root, "--download")
    assert set(server.asked) == {SBD_TAR} and before.items() <= stamps(root).items()


def test_masks_wait_for_scipy_and_nothing_else_does(voc, server, call, monkeypatch):
    pytest.importorskip("scipy", reason=NEEDS_SCIPY)
    root = voc(voc_archive(), sbd_archive())
    with monkeypatch.context() as m:
        hide_scipy(m)
        said = call("--data", root, "--download")
    assert "0 labels and 3 true masks" in said and "pip install scipy" in said
    assert "trainaug true masks 2 of 5 not needed to run" in call("--data", root, "--check")
    server.asked.clear()
    call("--data", root, "--download")
    assert len(names_in(root / "SegmentationClassAug")) == 3 and server.asked == []


def test_labels_that_only_sbd_has_are_needed(voc, call, monkeypatch):
    root = voc(voc_archive(without_xml=SBD_ONLY), sbd_archive())
    hide_scipy(monkeypatch)
    said = call("--data", root, "--download", ok=False)
    assert "3 labels and 3 true masks" in said
    assert "trainaug: 2 of 5 image labels" in last_line(said)


def test_the_test_list_comes_with_an_archive_that_was_put_there(voc, call):
    root = voc(voc_archive(), sbd_archive())
    said = call("--data", root, "--download")
    assert "asks for a login" in said and "test ids 0 of 1 not needed to run" in said
    body = tar({f"{INSIDE}/ImageSets/Segmentation/test.txt": lines_of(TEST),
                f"{INSIDE}/JPEGImages/{TEST[0]}.jpg": jpg()})
    (root / "archives" / TEST_TAR).write_bytes(body[:body.index(b"\xff\xd8") + 100])
    assert "an archive is broken" in call("--data", root, "--download", ok=False)
    (root / "archives" / TEST_TAR).write_bytes(body)
    assert "login" not in call("--data", root, "--download")
    assert find_dataset(str(root)).ids("test") == TEST


def test_counts_and_archives_that_do_not_fit_are_refused(voc, call):
    root = voc(voc_archive(), sbd_archive(extra=["2008_9"]))
    said = call("--data", root, "--download", ok=False)
    assert "trainaug comes to 6 ids and not 5" in said
    theirs = root / "archives" / SBD_TAR
    theirs.write_bytes(b"another")
    said = call("--data", root, "--download", ok=False)
    assert "archives/benchmark.tgz: its md5 is not" in last_line(said)
    assert theirs.read_bytes() == b"another"  # not ours to delete


def test_where_a_download_lands(monkeypatch, tmp_path, call):
    monkeypatch.chdir(tmp_path)
    assert evaluation.folder_to_fill("VOC2012") == Path("data/VOC2012")
    assert evaluation.folder_to_fill("big/disk/VOC2012") == Path("big/disk/VOC2012")
    (tmp_path / "VOC2012").mkdir()
    assert evaluation.folder_to_fill("VOC2012") == Path("VOC2012")
    said = call("--data", "holiday", "--download", ok=False)
    assert "only VOC2012 and COCO2014 can be downloaded" in said
    assert "only COCO2014 is prepared" in call("--data", "VOC2012", "--prepare", ok=False)
    said = call("--data", "COCO2014", "--check", ok=False)
    assert "COCO2014 by --download --prepare" in said


def test_check_names_what_differs_from_the_published_numbers(dataset, tmp_path, call):
    root = draw_dataset(tmp_path / "VOC2012")
    said = call("--data", root, "--check", ok=False)
    assert "train ids 6 of 1,464 missing" in said and "test ids 0 of 1,456" in said
    assert "classes.txt: not VOC2012's 21 names" in last_line(said)
    (root / "classes.txt").unlink()
    said = call("--data", root, "--check", ok=False)
    assert "9 counts are not VOC2012's, first train: 6 of 1,464 ids" in last_line(said)
    assert f"{SBD_TAR}: python eval.py --data" in said
    assert f"{VOC_TAR}: python eval.py --data" in said
    assert "missing" not in call("--data", dataset, "--check")  # another name: what is there


def test_the_server_archive_wants_all_of_test(tmp_path, call):
    root = draw_dataset(tmp_path / "VOC2012")
    (root / "classes.txt").unlink()
    lists = root / "ImageSets" / "Segmentation"
    shutil.copy(lists / "val.txt", lists / "test.txt")
    said = call("--data", root, "--runs", tmp_path / "runs", "--submit", ok=False)
    assert "2 ids; the server wants all 1,456 of VOC2012's test" in said


def test_archives_have_the_names_that_messages_give_them():
    names = [url.rpartition("/")[2] for url in evaluation.COCO_ARCHIVES]
    assert set(names) == set(evaluation.COCO_WANTED)
    assert DATASET_YEAR_DICT["2012"]["url"].endswith("/" + evaluation.VOC_ARCHIVE)
    assert SBDataset.url.endswith("/" + evaluation.SBD_ARCHIVE)


# ================================================================================================
# COCO 2014
# ================================================================================================

def test_categories_are_cocos():
    """The 80 ids as COCO's own list has them, written down a second time."""
    gaps = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert COCO_IDS == [i for i in range(91) if i not in gaps] and len(COCO_CLASSES) == 81
    known = {1: "person", 11: "fire hydrant", 13: "stop sign", 27: "backpack", 44: "bottle",
             62: "chair", 72: "tv", 90: "toothbrush"}
    for number, name in known.items():
        assert COCO_CLASSES[CLASS_OF_COCO_ID[number]] == name
    assert CLASS_OF_COCO_ID[0] == 0
    assert (CLASS_OF_COCO_ID[[*gaps, 91, 254, 255]] == IGNORE).all()


H, W = 40, 60
CROWD = np.zeros((H, W), np.uint8)
CROWD[3:9, 4:30] = 1
CROWD[20:30, 40:] = 1


def runs(mask):
    """(H, W) -> uncompressed run lengths, the slow way."""
    counts, value = [0], 0
    for pixel in mask.T.ravel():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


def compress(counts):
    """Run lengths -> COCO's compressed string."""
    text = ""
    for i, count in enumerate(counts):
        value, more = count - counts[i - 2] if i > 2 else count, True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + (bits | 32 if more else bits))
    return text


OBJECTS = [  # (photo, category, segmentation) in the order of the file, which is not the photos'
    (0, 18, [[5, 5, 30.5, 6.2, 28.1, 30.7, 4.4, 25]]),
    (1, 1, [[10, 10, 50, 10, 50, 30, 10, 30]]),
    (0, 1, [[20, 10, 55, 12, 50, 38, 22, 35]]),                    # overlaps the first
    (2, 90, [[1, 1, 12, 2, 8, 14],
             [30.2, 20, 45, 22.9, 41, 35.5, 29, 33]]),             # two parts
    (1, 13, [[30, 20, 30.2, 20, 30.2, 20.2, 30, 20.2]]),           # less than a pixel
    (2, 44, [[50, 30, 51.4, 30, 51.4, 31.6, 50, 31.6]]),           # a few pixels
    (3, 1, {"size": [H, W], "counts": runs(CROWD)}),               # a crowd that comes first
    (3, 62, [[2, 2, 20, 2, 20, 20, 2, 20]]),
    (4, 1, {"size": [H, W], "counts": compress(runs(CROWD))}),     # the other form
    (5, 72, [[-8, -3, 70, 10, 30, 55]]),                           # over the rim
    (1, 90, [[40, 5, 52.5, 5, 52.5, 14.2, 40, 14.2]]),
    (0, 72, [[10, 30, 40, 10, 40, 30, 10, 10]])]                   # crosses itself
TRIANGLE = [[5, 5, 30, 5, 20, 30]]


def instances(split, objects, photos):
    """A file like instances_train2014.json; the last two photos have no objects."""
    images, annotations = [], []
    for n in range(photos):
        images.append({"license": 5, "file_name": f"COCO_{split}2014_{n:012d}.jpg", "height": H,
                       "width": W, "id": 100 + n, "flickr_url": 'http://"quoted", {odd}'})
    for number, (n, category, segmentation) in enumerate(objects):
        annotations.append({"segmentation": segmentation, "area": 7.5,
                            "iscrowd": int(isinstance(segmentation, dict)), "image_id": 100 + n,
                            "category_id": category, "bbox": [1.5, 2, 3, 4], "id": number})
    categories = [{"supercategory": "x", "id": i, "name": COCO_SLOTS[i]} for i in COCO_IDS[1:]]
    value = {"info": {"year": 2014, "nested": [1, {"a": []}]}, "images": images,
             "licenses": [{"id": 1}], "annotations": annotations, "categories": categories}
    return json.dumps(value).encode()


TRAIN_JSON, VAL_JSON = (f"annotations/instances_{split}2014.json" for split in ("train", "val"))
COCO_FILES = {TRAIN_JSON: instances("train", OBJECTS, 8),
              VAL_JSON: instances("val", [(0, 3, TRIANGLE)], 3)}
for split, n in (("train", 8), ("val", 3)):
    for k in range(n):
        COCO_FILES[f"{split}2014/COCO_{split}2014_{k:012d}.jpg"] = jpg(H, W)
COCO_TRAIN = [f"COCO_train2014_{k:012d}" for k in range(6)]
COCO_VAL = ["COCO_val2014_000000000000"]


@pytest.fixture()
def coco(tmp_path, monkeypatch):
    """COCO's own files in small -> their folder."""
    monkeypatch.setitem(evaluation.PUBLISHED, "COCO2014", {"train": 6, "val": 1})
    for name, body in COCO_FILES.items():
        path = tmp_path / "COCO2014" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    return tmp_path / "COCO2014"


def test_coco_is_prepared_once(coco, call):
    call("--data", coco, "--prepare")
    data = find_dataset(str(coco))
    assert data.classes == COCO_CLASSES
    assert data.ids("train") == COCO_TRAIN and data.ids("val") == COCO_VAL
    labels = read_image_labels(coco / "image_labels.txt")
    assert labels.keys() == {*COCO_TRAIN, *COCO_VAL}
    assert labels[COCO_TRAIN[0]] == ["person", "dog", "tv"]
    assert labels[COCO_TRAIN[4]] == ["person"]                   # a crowd alone
    third = COCO_TRAIN[2]
    assert data.image_labels([third]) == {third: [40, 80]}       # bottle 44, toothbrush 90
    assert len(names_in(coco / "SegmentationClass")) == 7
    assert "train 6 images, 6 true masks" in call("--data", coco, "--check")
    before = stamps(coco)
    assert "prepared" in call("--data", coco, "--prepare")
    assert stamps(coco) == before


def test_photos_are_not_copied_and_the_folder_may_be_moved(coco, call, tmp_path):
    call("--data", coco, "--prepare")
    links = list((coco / "JPEGImages").iterdir())
    assert len(links) == 7 and all(path.is_symlink() for path in links)
    coco.rename(tmp_path / "elsewhere")
    assert find_dataset(str(tmp_path / "elsewhere")).image(COCO_VAL[0]).shape == (H, W, 3)


def test_photos_may_lie_on_a_disk_that_is_read_only(coco, call, tmp_path):
    (tmp_path / "disk").mkdir()
    for folder in ("annotations", "train2014", "val2014"):
        (coco / folder).rename(tmp_path / "disk" / folder)
        (coco / folder).symlink_to(tmp_path / "disk" / folder)
    before = stamps(tmp_path / "disk")
    call("--data", coco, "--prepare")
    assert find_dataset(str(coco)).image(COCO_VAL[0]).shape == (H, W, 3)
    assert stamps(tmp_path / "disk") == before


def test_preparing_goes_on_where_it_was_cut_off(coco, call, monkeypatch):
    write, made = evaluation.write_label, []

    def fill_up(path, label):
        made.append(path)
        if len(made) > 3:
            no_space()
        write(path, label)
    with monkeypatch.context() as m:
        m.setattr(evaluation, "write_label", fill_up)
        assert "No space left" in call("--data", coco, "--prepare", ok=False)
    assert not (coco / "ImageSets").exists()  # nothing that looks finished
    before = stamps(coco)
    assert len(names_in(coco / "SegmentationClass")) == 3
    call("--data", coco, "--prepare")
    assert before.items() <= stamps(coco).items()
    assert len(names_in(coco / "SegmentationClass")) == 7


def pycoco():
    return pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed: there is "
                               "nothing to compare COCO's masks with")


def pixels_of(tool, segmentation, H, W):
    """An object's pixels (H, W) as pycocotools has them (COCO.annToMask)."""
    if isinstance(segmentation, list):
        return tool.decode(tool.merge(tool.frPyObjects(segmentation, H, W))) > 0
    if isinstance(segmentation["counts"], list):
        return tool.decode(tool.frPyObjects(segmentation, H, W)) > 0
    return tool.decode(segmentation) > 0


def test_masks_are_pycocotools(coco, call):
    tool = pycoco()
    call("--data", coco, "--prepare")
    for n, image_id in enumerate(COCO_TRAIN):
        expected = np.zeros((H, W), np.uint8)
        for photo, category, segmentation in OBJECTS:
            if photo == n:
                free = expected == 0  # the first one wins
                place = pixels_of(tool, segmentation, H, W)
                expected[place & free] = CLASS_OF_COCO_ID[category]
        mask = read_label(coco / "SegmentationClass" / f"{image_id}.png")
        assert np.array_equal(mask, expected), n


def polygons(rng, n):
    """n polygons (k, 2) with the (H, W) of their photo."""
    for k in range(n):
        H, W = map(int, rng.integers(1, 100, 2))
        many, size = int(rng.integers(3, 15)), np.array([W, H])
        fifths = rng.integers(-20, 5 * max(H, W) + 20, (many, 2)) / 5
        yield H, W, [
            rng.uniform(0, 1, (many, 2)) * size,                              # within
            rng.uniform(-0.3, 1.3, (many, 2)) * size,                         # over the rim
            rng.integers(-2, max(H, W) + 2, (many, 2)).astype(float),         # whole pixels
            fifths + rng.choice([0, 0.1, -0.1, 0.05]),                        # where it rounds
            rng.uniform(0, 1, 2) * size + rng.normal(0, 0.5, (many, 2)),      # tiny
            np.round(rng.uniform(0, 1, (8 * many, 2)) * size, 2)][k % 6]      # many corners


def test_every_polygon_is_pycocotools_to_the_pixel():
    tool = pycoco()
    for H, W, polygon in polygons(np.random.default_rng(0), 3000):
        label = np.zeros((H, W), np.uint8)
        paint(label, [polygon], 1)
        expected = pixels_of(tool, [polygon.ravel().tolist()], H, W)
        assert np.array_equal(label > 0, expected), (H, W, polygon.tolist())


def test_parts_of_one_or_two_corners_hold_nothing_as_with_pycocotools():
    tool, rng = pycoco(), np.random.default_rng(0)
    for k in range(200):
        scrap = rng.uniform(-3, 43, 2 + 2 * (k % 2)).tolist()
        label = np.zeros((H, W), np.uint8)
        paint(label, read_outline([*TRIANGLE, scrap]), 1)
        assert np.array_equal(label > 0, pixels_of(tool, [*TRIANGLE, scrap], H, W)), scrap
        label[:] = 0
        paint(label, read_outline([scrap, []]), 1)
        assert not label.any(), scrap


def test_run_lengths_are_pycocotools():
    tool, rng = pycoco(), np.random.default_rng(0)
    for _ in range(300):
        blocks = rng.integers(0, 2, rng.integers(1, 9, 2))
        mask = np.kron(blocks, np.ones(rng.integers(1, 9, 2))).astype(np.uint8)
        text = tool.encode(np.asfortranarray(mask))["counts"].decode()
        assert run_lengths(text) == runs(mask) and compress(runs(mask)) == text
        label = np.zeros(mask.shape, np.uint8)
        paint(label, read_outline({"size": mask.shape, "counts": text}), 7)
        assert np.array_equal(label, 7 * mask)


def test_the_first_object_wins_and_one_smaller_than_a_pixel_leaves_none():
    box = [corners([2, 2, 8, 2, 8, 7, 2, 7])]
    photo = [corners([0, 0, 10, 0, 10, 10, 0, 10])]
    speck = [corners([4.3, 4.3, 4.4, 4.3, 4.4, 4.4])]
    label = coco_mask(CocoImage("x", 10, 10, [(90, speck), (1, box), (18, photo)]))
    assert (label[2:7, 2:8] == 1).all() and (label == 1).sum() == 30
    assert (label == 17).sum() == 70  # category 18 is dog, which is class 17


class Drip:
    """A file that gives n characters at a time, whatever is asked for."""

    def __init__(self, text, n):
        self.text, self.n = text, n

    def read(self, _):
        piece, self.text = self.text[:self.n], self.text[self.n:]
        return piece


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_json_is_read_alike_wherever_it_is_cut(indent, ascii_only):
    listed = [1, 23, -4.5e3, "x\\\"]}", {"b": [[], {}, None, True]}, "\u00e9\u4e2d"]
    value = {"a": listed, "info": {"c": [1]}, "e": [], "n": 12345}
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    for n in range(1, len(text) + 1):
        assert list(JsonReader(Drip(text, n)).items()) == [("a", item) for item in listed]
    for broken in (text[:-1], text[:40], "", "[1]", '{"a": [1 2]}', '{"a" 1}'):
        with pytest.raises(ValueError, match="JSON"):
            list(JsonReader(Drip(broken, 7)).items())


def test_a_long_file_is_never_in_memory(tmp_path):
    path = tmp_path / "long.json"
    captions = ", ".join(f'"{k:01000d}"' for k in range(12_000))
    write_text(path, '{"captions": [' + captions + "]}")
    tracemalloc.start()
    with open(path, encoding="utf-8") as f:
        n = sum(1 for _ in JsonReader(f).items())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 12_000 and peak < path.stat().st_size / 2


@pytest.mark.parametrize("old, new, said", [
    ('"person"', '"human"', "its 80 categories are not COCO's 80"),
    ('"image_id": 100', '"image_id": 7', "photo 7, which is not listed"),
    ('"category_id": 3', '"category_id": 12', "category 12, which is none"),
    ('"image_id"', '"image"', "KeyError('image_id')"),
    ('"categories"', '"categories', "not a whole JSON file"),
    (json.dumps(TRIANGLE), "[[5, 5, 30]]", "3 numbers"),
    (json.dumps(TRIANGLE), '{"size": [40, 60], "counts": [5, 5]}', "run lengths of"),
    (json.dumps(TRIANGLE), '{"size": [60, 40], "counts": [2400]}', "run lengths of")])
def test_bad_annotations_are_one_line(coco, call, old, new, said):
    good = COCO_FILES[VAL_JSON].decode()
    assert old in good
    write_text(coco / VAL_JSON, good.replace(old, new))
    assert said in last_line(call("--data", coco, "--prepare", ok=False))


def test_missing_files_are_one_line(coco, call):
    (coco / VAL_JSON).unlink()
    line = last_line(call("--data", coco, "--prepare", ok=False))
    assert "instances_val2014.json: no such file; --download" in line
    (coco / "train2014" / f"{COCO_TRAIN[3]}.jpg").unlink()
    line = last_line(call("--data", coco, "--prepare", ok=False))
    assert f"1 of 6 photos missing, first {COCO_TRAIN[3]}.jpg" in line and "train2014.zip" in line


def zipped(folder):
    """The files of a folder of COCO_FILES as COCO's archive, with two that nobody wants."""
    f = io.BytesIO()
    with zipfile.ZipFile(f, "w") as archive:
        for path, body in COCO_FILES.items():
            if path.startswith(folder):
                archive.writestr(path, body)
        archive.writestr(f"{folder}/captions_train2014.json", b"{}")
        archive.writestr(f"{folder}/../../x.jpg", b"x")
    return f.getvalue()


def test_coco_is_downloaded_and_prepared_in_one_command(server, monkeypatch, tmp_path, call):
    monkeypatch.setitem(evaluation.PUBLISHED, "COCO2014", {"train": 6, "val": 1})
    annotations, train, val = evaluation.COCO_WANTED
    wanted = {name: pattern for name, (pattern, _) in evaluation.COCO_WANTED.items()}
    server.files = {annotations: zipped("annotations"), train: zipped("train2014"),
                    val: zipped("val2014")}
    sums = {server.url(name): md5(body) for name, body in server.files.items()}
    monkeypatch.setattr(evaluation, "COCO_ARCHIVES", sums)
    monkeypatch.setattr(evaluation, "COCO_WANTED", {
        annotations: (wanted[annotations], 2), train: (wanted[train], 8), val: (wanted[val], 3)})
    root = tmp_path / "COCO2014"
    given = ["--data", root, "--download", "--prepare"]
    server.cut = {val}
    assert val in last_line(call(*given, ok=False))
    server.cut = set()
    server.asked.clear()
    call(*given)
    assert set(server.asked) == {val} and names_in(tmp_path) == {"COCO2014"}
    assert names_in(root / "annotations") == {Path(TRAIN_JSON).name, Path(VAL_JSON).name}
    call("--data", root, "--check")
    before = stamps(root)
    server.asked.clear()
    call(*given)
    assert stamps(root) == before and server.asked == []


# ================================================================================================
# Masks with COCO's 91 category ids
# ================================================================================================

def test_masks_of_category_ids_are_scored_and_converted(coco, dataset, call, tmp_path):
    call("--data", coco, "--prepare")
    masks = tmp_path / "theirs"
    for image_id in COCO_TRAIN:
        truth = read_label(coco / "SegmentationClass" / f"{image_id}.png")
        write_label(masks / f"{image_id}.png", np.array(COCO_IDS)[truth])
    given = ["--data", coco, "--split", "train", "--masks"]
    assert "6 of 6 100.0 100.0%" in call(*given, masks, "--ids", 91)
    said = call(*given, masks, ok=False)  # 90 is no class number
    assert "class number 90, the dataset has 0..80" in said
    call(*given, masks, "--ids", 91, "--prepare")
    assert "6 of 6 100.0 100.0%" in call(*given, tmp_path / "theirs_81")
    said = call("--data", dataset, "--masks", masks, "--ids", 91, ok=False)
    assert "has not COCO's 81 classes" in said
    assert "name that folder" in call("--data", coco, "--ids", 91, ok=False)


def test_an_id_that_coco_never_used_is_a_miss(coco, call, tmp_path):
    call("--data", coco, "--prepare")
    write_label(tmp_path / "theirs" / f"{COCO_TRAIN[0]}.png", np.full((H, W), 12))
    row = score_folder(find_dataset(str(coco)), tmp_path / "theirs", "train", coco_ids=True)
    assert row["n"] == 1 and row["iou"][COCO_CLASSES.index("dog")] == 0
    assert row["false_negatives"][COCO_CLASSES.index("dog")] == 100
