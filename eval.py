"""What the stages are given and how they are judged: the dataset folder, label PNGs, scores.

run     python eval.py --data VOC2012                       # everything found in runs/VOC2012
        python eval.py --data VOC2012 --masks DIR --split val   # any folder of label PNGs
        python eval.py --data VOC2012 --check               # is the dataset complete and sound?
        python eval.py --data VOC2012 --download            # VOC 2012 and SBD's list, from nothing
        python eval.py --data COCO2014 --download --prepare # COCO 2014, from nothing
        python eval.py --data VOC2012 --submit              # archive for the VOC evaluation server
reads   VOC2012/SegmentationClass/<id>.png (true masks)
        runs/VOC2012/**/{seeds,masks/<split>}/<id>.png
writes  runs/VOC2012/{metrics.json, metrics.csv, report.html}

In this order: I the dataset folder and its label PNGs, II how VOC 2012 and COCO 2014 come into
it, III scores, IV the report page, V the command line. Who looks for the mIoU reads III alone.
Every stage imports part I, so that photos, lists, labels and the stages' own files are read and
refused in one way everywhere, and two ways to draw from part IV, `heat` and `overlay`. No neural
network stands here, and no torch is needed but for --download. Numbers in
brackets, such as (32), are findings in AUDIT.md's ledger.
"""
import os
import signal
import sys

COMMANDS = ("eval.py", "stage1_cam.py", "stage2_weakclip.py", "stage3_segment.py")


def end_at_once(number, frame):
    """The signals' handler until `run` takes over: one line and the exit status that shells give.

    What follows here, and torch in the stages, takes seconds to import, and Python would end that
    with a page of traceback.
    """
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


if os.path.basename(sys.argv[0]) in COMMANDS:  # not in programs that only import this file
    signal.signal(signal.SIGINT, end_at_once)
    signal.signal(signal.SIGTERM, end_at_once)

import argparse
import base64
import contextlib
import csv
import errno
import hashlib
import importlib.util
import io
import json
import re
import shutil
import tarfile
import textwrap
import unicodedata
import warnings
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from html import escape
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

# "Unsure" in our masks, the void border around objects in VOC's: neither trained on nor scored.
IGNORE = 255
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor")
# COCO numbers its categories 1 to 90 and leaves ten of the numbers unused. The released code has
# an output for each of the 91 slots; our COCO has the 81 names that occur, numbered on (32).
COCO_SLOTS = (
    "background", "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck",
    "boat", "traffic light", "fire hydrant", "street sign", "stop sign", "parking meter", "bench",
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "hat",
    "backpack", "umbrella", "shoe", "eye glasses", "handbag", "tie", "suitcase", "frisbee", "skis",
    "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard",
    "surfboard", "tennis racket", "bottle", "plate", "wine glass", "cup", "fork", "knife", "spoon",
    "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza",
    "donut", "cake", "chair", "couch", "potted plant", "bed", "mirror", "dining table", "window",
    "desk", "toilet", "door", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "blender", "book", "clock", "vase",
    "scissors", "teddy bear", "hair drier", "toothbrush")
COCO_UNUSED = ("street sign", "hat", "shoe", "eye glasses", "plate", "mirror", "window", "desk",
               "door", "blender")
COCO_CLASSES = tuple(name for name in COCO_SLOTS if name not in COCO_UNUSED)


# ================================================================================================
# I  The dataset folder and its label PNGs
# ================================================================================================

# Any dataset becomes VOC's layout:
#
#     JPEGImages/<id>.jpg                    photos
#     ImageSets/Segmentation/<list>.txt      which ids are for training, which for judging
#     image_labels.txt, Annotations/<id>.xml what is in a photo, not where: all that stages learn
#     SegmentationClass/<id>.png             where it is: the true masks, to judge by and no more
#     classes.txt                            what the numbers mean
#
# An image is known by its id alone, the stem of its photo's name; its labels, seeds and masks are
# found by that id in other folders. A class is known by its number, and everything depends on
# both being read alike by every stage: hence one reader for each kind of file, here.

@dataclass(frozen=True)
class Dataset:
    """A folder in VOC's layout: photos, lists of ids, image-level labels, perhaps true masks.

    classes: names, background first. A class number is a place in this tuple, everywhere: in
    classes.txt (line 1 is number 0), in label PNGs, in CAM files and in a network's outputs.
    texts: class name -> what CLIP reads for it in stage 1, for names that classes.txt has one for.
    """
    root: Path
    name: str
    classes: tuple
    texts: dict = field(default_factory=dict)

    def lists(self) -> list[Path]:
        """The files of all lists."""
        files = (self.root / "ImageSets" / "Segmentation").glob("*")
        return sorted(p for p in files if p.suffix.lower() == ".txt" and not is_litter(p.name))

    def list_path(self, split: str) -> Path:
        """Where the list `split` is, or would be; train_aug.txt and the like serve as trainaug."""
        path = self.root / "ImageSets" / "Segmentation" / f"{split}.txt"
        if path.is_file():
            return path
        alike = [p for p in self.lists() if plain_name(p.stem) == plain_name(split)]
        if len(alike) > 1:
            raise ValueError(f"{alike[0]}: {alike[1].name} is beside it, and either may be meant "
                             f"by {split}; rename one {path.name}")
        if not alike:
            return path
        note(f"{alike[0]}: is used as the list {split}")
        return alike[0]

    def has(self, split: str) -> bool:
        """True if there is such a list."""
        return self.list_path(split).is_file()

    def training_split(self) -> str:
        """trainaug where that list exists, else train."""
        return "trainaug" if self.has("trainaug") else "train"

    def ids(self, split: str, limit: int | None = None) -> list[str]:
        """Image ids of a list, in its order, the first `limit` of them.

        Raises ValueError for a missing list, and as `read_list` does.
        """
        path = self.list_path(split)
        if not path.is_file():
            known = ", ".join(p.stem for p in self.lists())
            raise ValueError(f"{path}: no such list (there is {known or 'none'}); make it, one "
                             "image id a line, or name another one")
        return read_list(path)[:limit]

    def image_path(self, image_id: str) -> Path:
        """The photo of an id; ValueError where there is none, or more than one."""
        folder = self.root / "JPEGImages"
        path = find_file(folder, image_id, PHOTO_ENDINGS)
        if path is None:
            other = find_file(folder, image_id, OTHER_ENDINGS)
            there = f"; there is {other.name}: save it as JPEG or PNG" if other else ""
            raise ValueError(f"{folder}/{image_id}.jpg: no such image (nor .jpeg, .png){there}")
        return path

    def image(self, image_id: str) -> np.ndarray:
        """The photo of an id, (H, W, 3) uint8 RGB."""
        return read_image(self.image_path(image_id))

    def truth_path(self, image_id: str) -> Path | None:
        """The true mask of an image, or None.

        SBD's coarser masks (SegmentationClassAug) serve where VOC's are missing.
        """
        for folder in TRUTH_FOLDERS:
            path = find_file(self.root / folder, image_id, (".png",))
            if path:
                return path
        return None

    def known_labels(self, ids: list[str]) -> dict[str, list[int]]:
        """{id: sorted class numbers from 1} for those of `ids` that have image-level labels.

        They come from image_labels.txt or else from Annotations/*.xml, never from masks: those
        would tell more than image-level labels do. Raises ValueError for a name that is no class.
        """
        path = self.root / "image_labels.txt"
        if path.is_file():
            lines = label_lines(path)
        else:
            xml = {i: find_file(self.root / "Annotations", i, (".xml",)) for i in ids}
            lines = {i: [(str(xml[i]), annotated_objects(xml[i]))] for i in ids if xml[i]}
        # Names, not numbers, stand in labels: a name cannot be off by one.
        number = {name: k for k, name in enumerate(self.classes)}
        labels = {}
        for image_id in ids:
            if image_id in lines:
                found = set()
                for source, names in lines[image_id]:
                    found.update(number[name] for name in class_names(names, number, source))
                labels[image_id] = sorted(found)
        return labels

    def image_labels(self, ids: list[str]) -> dict[str, list[int]]:
        """{id: sorted class numbers from 1} of all ids; ValueError where one has no labels."""
        labels = self.known_labels(ids)
        missing = [image_id for image_id in ids if image_id not in labels]
        if missing:
            path, first = self.root / "image_labels.txt", missing[0]
            source = path if path.is_file() else self.root / "Annotations" / f"{first}.xml"
            pickled = sorted(self.root.glob("*.npy"))
            raise ValueError(pickle_refusal(self.root, pickled[0]) if pickled else
                             f"{source}: no image-level labels for {first}; "
                             f"a line `{first} name, name` in {path} is expected")
        return labels

    def digests(self, *splits: str, **more: str) -> dict[str, str]:
        """{name: sha256} of the lists `splits`, of the classes and of further texts.

        They tell one dataset from another when a run is resumed.
        """
        parts = dict(more)
        for split in splits:
            if self.has(split):
                parts[split] = "\n".join(self.ids(split))
        parts["classes"] = "\n".join(self.classes)
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in parts.items()}


def dataset_name(name: str | Path) -> str:
    """Last part of `--data`: names the run's folder and picks COCO's recipe.

    A link keeps its own name, so a folder of any name can be given COCO's recipe.
    """
    return Path(os.path.abspath(name)).name


def dataset_places(name: str | Path) -> list[Path]:
    """Where a dataset may be: the folder itself, or a name below data/ or data/VOCdevkit/."""
    return [Path(name), Path("data") / name, Path("data") / "VOCdevkit" / name]


def find_dataset(name: str | Path) -> Dataset:
    """`--data`: a folder, or a name looked up as ./NAME, ./data/NAME and ./data/VOCdevkit/NAME.

    Raises ValueError where there is none, and for a classes.txt that is no list of names.
    """
    places = dataset_places(name)
    roots = [place for place in places if (place / "JPEGImages").is_dir()]
    if not roots:
        raise ValueError(f"--data {name}: no folder with JPEGImages/ at "
                         f"{', '.join(map(str, places))}; eval.py brings VOC2012 by --download, "
                         "COCO2014 by --download --prepare (README, Data)")
    root, name = roots[0], dataset_name(roots[0])
    path = root / "classes.txt"
    if path.is_file():
        return Dataset(root, name, *read_classes(path))
    # Without names, number 1 is VOC's aeroplane, whatever another dataset means by it.
    if "coco" in name.lower():
        raise ValueError(f"{path}: no such file, and VOC's names are not COCO's; "
                         f"python eval.py --data {root} --prepare writes it for COCO 2014")
    if not name.lower().startswith("voc"):
        note(f"{path}: no such file, so the classes are VOC's 21")
    return Dataset(root, name, VOC_CLASSES)


def for_each(function, items: list, text: str) -> list:
    """[function(item) for item in items], in threads, under a progress bar called `text`.

    Threads serve because decoding an image frees Python's lock.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(function, items)  # in the order of items, whichever ends first
        few = len(items) < 50                # a bar that is gone at once only flickers
        return list(tqdm(results, total=len(items), desc=text, leave=False, disable=few))


# ------------------------------------------------------------------------------- names of files

# The same folder is written by cameras, by Windows, macOS and Linux, by shell scripts and by
# spreadsheets, and each has its own habits: .JPG for .jpg, e + accent for é, files of its own.
# What is clear in spite of that is read, and said once by `note`; what could mean two things is
# refused.

PHOTO_ENDINGS = (".jpg", ".jpeg", ".png")
OTHER_ENDINGS = (".bmp", ".gif", ".heic", ".tif", ".tiff", ".webp")
TRUTH_FOLDERS = ("SegmentationClass", "SegmentationClassAug")
# A file system's names have up to 255 bytes; `write_whole` adds an ending and a process number.
ID_BYTES = 230


def is_litter(name: str) -> bool:
    """True for the files that systems leave in folders: ._x.jpg, .DS_Store, Thumbs.db."""
    return name.startswith("._") or name.lower() in (".ds_store", "thumbs.db", "desktop.ini")


def plain_name(name: str) -> str:
    """A list's name without what spellings differ in: train_aug, Train-Aug -> trainaug."""
    return re.sub("[-_ ]", "", name).lower()


def find_file(folder: Path, image_id: str, endings: tuple[str, ...]) -> Path | None:
    """The file of an id in a folder, or None; ValueError where two files could be meant.

    endings: in lower case, upper case is found too. A letter with an accent is one character on
    most systems and two (letter, accent) in names that macOS wrote; both are looked up.
    """
    found = []
    for stem in dict.fromkeys((image_id, unicodedata.normalize("NFD", image_id))):
        for ending in (*endings, *map(str.upper, endings)):
            path = folder / (stem + ending)
            # Where the file system ignores case, x.jpg and x.JPG are one file.
            if path.is_file() and not any(path.samefile(other) for other in found):
                found.append(path)
    if len(found) > 1:
        raise ValueError(f"{found[0]}: {found[1].name} is beside it, and either may be meant; "
                         "remove one")
    return found[0] if found else None


def label_path(folder: Path, image_id: str) -> Path:
    """The label PNG of an id in a folder, or where it would be."""
    return find_file(folder, image_id, (".png",)) or folder / f"{image_id}.png"


def photo_files(folder: Path) -> dict[str, Path]:
    """{id: path} of all photos in a folder, sorted. Raises ValueError for an odd or double id.

    Photos of other formats (HEIC, WebP) are left out, and `note` says so.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no folder; the one that holds the photos is expected")
    photos = {}
    names = [path.name for path in sorted(folder.iterdir()) if not is_litter(path.name)]
    others = [name for name in names if name.lower().endswith(OTHER_ENDINGS)]
    if others:
        note(f"{folder}: {len(others)} photos are left out, first {others[0]}: save them as JPEG "
             "or PNG")
    for path in map(folder.joinpath, names):
        if path.suffix.lower() in PHOTO_ENDINGS:
            image_id = unicodedata.normalize("NFC", path.stem)
            fault = id_fault(image_id, spaces=True)
            if fault or image_id in photos:
                raise ValueError(f"{str(path)!r}: {fault or 'another photo has this name'}; "
                                 "rename it")
            photos[image_id] = path
    return photos


def id_fault(image_id: str, spaces: bool = False) -> str:
    """What keeps a text from being an image id, "" if nothing does; spaces: they are allowed."""
    # An id becomes the name of many files, so it must not lead out of their folder.
    if "/" in image_id or "\\" in image_id or image_id in ("", ".", ".."):
        return "a path is no id"
    if not spaces and len(image_id.split()) != 1:
        return "white space"
    if has_control_characters(image_id):
        return "control characters"
    if len(image_id.encode()) > ID_BYTES:
        return f"longer than {ID_BYTES} bytes"
    return ""


def has_control_characters(text: str) -> bool:
    """True for line feeds, tabs, escape sequences and the like: nobody sees them in a name."""
    return any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


# --------------------------------------------------------------------- lists, labels and classes

TEXT_BYTES = 2 ** 26  # COCO's image_labels.txt has 4 million; what has more is no list
LINE_LENGTH = 4000
XML_BYTES = 2 ** 22   # VOC's annotations have up to some 20,000


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Text file -> [(line number, line)] without empty lines and space at the ends, composed.

    UTF-8 with or without a byte order mark; lines end as on Windows, Unix or an old Macintosh.
    """
    if path.stat().st_size > TEXT_BYTES:
        raise ValueError(f"{path}: more than {TEXT_BYTES >> 20} MiB, so no text of this project")
    content = path.read_bytes()
    if b"\0" in content:  # every second byte of English text is, in UTF-16
        raise ValueError(f"{path}: UTF-16, or no text at all; save it as UTF-8")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as e:
        number = content[:e.start].count(b"\n") + 1
        raise ValueError(f"{path}: line {number} is not UTF-8; save the file as UTF-8") from None
    lines = re.split(r"\r\n|\r|\n", unicodedata.normalize("NFC", text))
    lines = [line.strip().lstrip("\ufeff").strip() for line in lines]
    longest = max(lines, key=len)
    if len(longest) > LINE_LENGTH:
        raise ValueError(f"{path}: line {lines.index(longest) + 1} has {len(longest)} characters; "
                         f"at most {LINE_LENGTH} are expected")
    return [(number, line) for number, line in enumerate(lines, start=1) if line]


def stem_of(word: str) -> str:
    """Name of a photo or mask -> its id: /JPEGImages/x.jpg -> x; what has no such ending stays."""
    file = re.fullmatch(r"(?:.*[/\\])?([^/\\]+)\.(?:jpe?g|png)", word, re.IGNORECASE)
    return file[1] if file else word


def read_list(path: Path) -> list[str]:
    """A list of images -> ids, in its order.

    One id a line; or a photo's name or path, alone or with its mask's behind it (DeepLab's pair
    lists); or VOC's lists of one class, an id and 1, 0 or -1. Raises ValueError for an odd id,
    one that stands twice, and an empty list.
    """
    lines = []
    for number, line in read_lines(path):
        words = re.findall(r"[^\s,;]+", line) or [line]
        if is_litter(re.split(r"[/\\]", words[0])[-1]):
            note(f"{path}: files that a system left are left out, first {words[0][:80]!r}")
        else:
            lines.append((number, words, line))
    marks = {words[1] for _, words, _ in lines if len(words) == 2}
    of_one_class = "-1" in marks and marks <= {"1", "0", "-1"}
    if of_one_class:
        # 0 is VOC's "difficult": the class is there, and a detector is not scored on it.
        note(f"{path}: a list of one class; ids marked 1 or 0 (difficult) are read, -1 are not")
        lines = [(number, words[:1], line) for number, words, line in lines if words[-1] != "-1"]
    first_at, other = {}, None
    for number, words, line in lines:
        stems = {stem_of(word) for word in words}
        image_id = stems.pop()
        fault = "more than one name" if stems else id_fault(image_id)
        if fault:
            raise ValueError(f"{path}: line {number}: {line[:80]!r} is no image id ({fault}); "
                             "one id a line is expected, no white space, no path")
        if image_id in first_at:
            # An epoch would show it twice, and a mean over the list count it twice.
            raise ValueError(f"{path}: {image_id} stands twice, in lines {first_at[image_id]} "
                             f"and {number}; remove one")
        first_at[image_id] = number
        if image_id not in (line, other) and not of_one_class:
            other = other or f"{path}: file names are read as ids: {line[:80]!r} is {image_id}"
    if other:
        note(other)
    if not first_at:
        raise ValueError(f"{path}: the list is empty")
    return list(first_at)


def read_image_labels(path: Path) -> dict[str, list[str]]:
    """image_labels.txt -> {id: names}, as they stand there."""
    lines = label_lines(path)
    return {i: [name for _, names in lines[i] for name in names] for i in lines}


def label_lines(path: Path) -> dict[str, list[tuple[str, list[str]]]]:
    """image_labels.txt -> {id: [(place, names)], a pair for every line of that id}.

    `<id> name, name`; between the names a semicolon, tab or bar serves as well, and after the id
    any of them or a colon. No space: COCO's names have spaces ("traffic light").
    """
    lines, repeated = {}, []
    for number, line in read_lines(path):
        word, names = re.fullmatch(r"([^\s,;:|]*)[\s,;:|]*(.*)", line).groups()
        if stem_of(word) in lines:
            repeated.append(stem_of(word))
        # An id without names is a photo without any of the classes, which COCO has.
        found = [name.strip() for name in re.split(r"[,;|\t]", names) if name.strip()]
        lines.setdefault(stem_of(word), []).append((f"{path}: line {number}", found))
    if repeated:
        note(f"{path}: {len(set(repeated))} ids stand in several lines, first {repeated[0]}; "
             "they have the names of all of them")
    return lines


def class_names(names: list[str], known, place: str) -> list[str]:
    """Names as they stand in a line of labels -> class names. Raises ValueError at a stranger."""
    found = []
    for name in names:
        # Background (number 0) is in nearly every photo and so is nobody's label.
        foreground = [k for k in known if known[k] > 0]
        bare = name.strip(" \"'[]")  # as a spreadsheet or Python prints it
        if name in foreground:
            found.append(name)
        elif bare in foreground:
            found.append(bare)
        elif bare.split() and all(word in foreground for word in bare.split()):
            note(f"{place.partition(': line')[0]}: names are parted by spaces")
            found += bare.split()
        elif re.fullmatch(r"[-+.\d\s]+", bare):
            raise ValueError(f"{place}: {name[:80]!r}; class names are expected, for numbers do "
                             "not tell whether they count the background")
        else:
            raise ValueError(f"{place}: class {name[:80]!r}; known are {', '.join(foreground)}: "
                             "correct it, or add it to classes.txt")
    return found


def pickle_refusal(root: Path, pickled: Path) -> str:
    """What is said of labels in a pickle (cls_labels.npy of other codes): reading one runs it."""
    code = [f"import eval, numpy; names = eval.find_dataset({str(root)!r}).classes[1:]",
            f"rows = numpy.load({str(pickled)!r}, allow_pickle=True).item().items()",
            f"eval.write_text({str(root / 'image_labels.txt')!r}, chr(10).join("
            "f\"{i} {', '.join(n for n, y in zip(names, row) if y)}\" for i, row in rows))"]
    return (f"{pickled}: labels in a pickle, which can run anything when it is read; if you trust "
            f"it, three lines of Python convert it: {'; '.join(code)}")


def annotated_objects(path: Path) -> list[str]:
    """Names of all objects in a VOC annotation, an object's name as often as it stands there.

    Difficult objects count too: detectors are not scored on them, but they are in the photo.
    Parts of an object (head, hand) have names as well; they stand one level deeper.
    """
    if path.stat().st_size > XML_BYTES:
        raise ValueError(f"{path}: more than {XML_BYTES >> 20} MiB, so no annotation of a photo")
    content = path.read_bytes()
    # A document type may define entities that unfold to gigabytes. VOC's files have none.
    if b"<!" in content.replace(b"\0", b"").replace(b"<!--", b"").replace(b"<![CDATA[", b""):
        raise ValueError(f"{path}: has a document type (<!DOCTYPE ...>); remove it")
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as e:
        raise ValueError(f"{path}: not a readable annotation (line {e.position[0]}); "
                         "save it anew, as XML in UTF-8") from None
    except (ValueError, LookupError):  # names an encoding that Python's parser does not have
        declared = re.search(rb"encoding\s*=\s*[\"']([\w.-]+)", content)
        encoding = declared[1].decode() if declared else "this"
        raise ValueError(f"{path}: {encoding} is no encoding that can be read; "
                         "save it as UTF-8, and say so in its first line") from None
    names = [(found.findtext("name") or "").strip() for found in root.findall("object")]
    if root.tag != "annotation" or "" in names:
        raise ValueError(f"{path}: <annotation> with an <object> that has a <name>, for each "
                         "object, is expected")
    return [unicodedata.normalize("NFC", name) for name in names]


def read_classes(path: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """classes.txt -> class names, and the texts of those that have one: `name: synonym, synonym`.

    The first line is number 0, the background. The file's order is all that ties a number in a
    label PNG to a name. A line too many before the others (labelme writes `__ignore__` there) puts
    every name off by one, and nothing but a look at the masks would show it. Raises ValueError,
    naming the line.
    """
    lines, texts = [], {}
    for number, line in without_numbers(path, read_lines(path)):
        name, _, text = (part.strip() for part in line.partition(":"))
        lines.append((number, name))
        if text:
            texts[name] = text
    bare_names = [name.strip("_ ").lower() for _, name in lines]
    # The background may have a name of the dataset's own; a thing that people know is none.
    things = {*VOC_CLASSES[1:], *COCO_SLOTS[1:]}
    if "background" not in bare_names and lines and lines[0][1] not in things:
        note(f"{path}: line {lines[0][0]}: {lines[0][1]!r} is the background, number 0")
        bare_names[0] = "background"
    first_at = {}
    for (number, name), bare in zip(lines, bare_names):
        fault = ""
        if bare in ("ignore", "void", "unsure"):
            fault = f"is no class, its pixels are {IGNORE} in label PNGs; remove the line"
        elif (bare == "background") != (not first_at):
            fault = "stands where background is expected: in the first line, and there alone"
        elif name.lower() in first_at:
            fault = (f"stands in line {first_at[name.lower()]} already; different class names "
                     "are expected")
        elif not name or has_control_characters(name) or re.search("[,;|]", name):
            fault = "is no name; one a line is expected, without commas, semicolons and bars"
        if fault:
            raise ValueError(f"{path}: line {number}: {name[:80]!r} {fault}")
        first_at[name.lower()] = number
    if not 2 <= len(lines) <= IGNORE:
        raise ValueError(f"{path}: {len(lines)} names; 2 to {IGNORE} different class names are "
                         "expected, one a line, background first")
    names = [name for _, name in lines]
    if names[0].strip("_ ").lower() == "background":
        names[0] = "background"
    return tuple(names), texts


def without_numbers(path: Path, lines: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Lines `0 background`, `1: cat` or `background 0`, `cat,1` -> the names alone.

    Only if every line has a number and they are what its place says; others may be names.
    """
    for pattern in (r"(?P<number>\d{1,9})[\s,;:.)=]+(?P<name>.+)",
                    r"(?P<name>.+?)[\s,;:=]+(?P<number>\d{1,9})"):
        found = [re.fullmatch(pattern, line) for _, line in lines]
        if not found or not all(found):
            continue
        for place, ((number, line), match) in enumerate(zip(lines, found)):
            if int(match["number"]) != place:
                raise ValueError(f"{path}: line {number}: {line[:80]!r} would be number {place} "
                                 "in label PNGs; a line for each number is expected, from 0, "
                                 "the background, on")
        note(f"{path}: the numbers before or behind the names are left out")
        return [(number, match["name"]) for (number, _), match in zip(lines, found)]
    return lines


# ------------------------------------------------------------------------------- pictures

# What a file's first bytes say it is; its name is not asked.
KINDS = {
    b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF8": "GIF", b"BM": "BMP",
    b"II*\0": "TIFF", b"MM\0*": "TIFF", b"RIFF": "WebP", b"8BPS": "Photoshop",
    b"%!PS": "PostScript", b"%PDF": "PDF", b"\x93NUMPY": "NumPy array", b"PK\x03\x04": "ZIP",
    b"version https://git-lfs": "Git LFS pointer (git lfs pull fetches the file)",
    b"<": "text, perhaps a web page"}
FILE_BYTES = 2 ** 28  # no photo below has more, but for one that is no photo
PIXELS = 2 ** 26      # 8192 x 8192; with copies, a larger one would take a gigabyte to decode
# EXIF's tag Orientation: how a photo must be turned to stand upright; 1 is upright.
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}
# Pillow's own limits and remarks speak of its functions; ours below name the file and the way out.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module="PIL")


def file_kind(content: bytes) -> str:
    """"JPEG", "PNG", ... by the first bytes of a file."""
    if content[4:8] == b"ftyp":
        return "HEIC, AVIF or film"
    kinds = [kind for start, kind in KINDS.items() if content.startswith(start)]
    return kinds[0] if kinds else "of no known kind" if content else "empty"


def decode(path: Path, formats: tuple[str, ...], what: str, use):
    """use(Pillow's image, the file's bytes) of a file that is one of `formats`.

    Raises ValueError (`path` is no readable `what`) where it is another format, damaged or huge.
    """
    if path.stat().st_size > FILE_BYTES:
        raise ValueError(f"{path}: not a readable {what}: over {FILE_BYTES >> 20} MiB")
    content = path.read_bytes()
    kind = file_kind(content)
    if kind not in formats:
        why = ", which changes class numbers" if (kind, what) == ("JPEG", "label PNG") else ""
        raise ValueError(f"{path}: not a readable {what}: the file is {kind}{why}; "
                         f"save it as {' or '.join(formats)}")
    width = height = 0
    try:
        # Only these decoders: Pillow's others are many, and some start programs (PostScript).
        with Image.open(io.BytesIO(content), formats=formats) as picture:
            width, height = picture.size
            if width * height <= PIXELS:
                return use(picture, content)
    except MemoryError:
        raise
    except Exception:  # a damaged file makes decoders raise nearly anything else
        raise ValueError(f"{path}: not a readable {what}: a {kind} that is cut off or damaged; "
                         "copy it anew") from None
    raise ValueError(f"{path}: not a readable {what}: {width}x{height} pixels; make it smaller, "
                     f"to {PIXELS >> 20} million pixels at most")


def exif_turn(picture: Image.Image) -> int | None:
    """Pillow's number of the turn that a photo's EXIF asks for, None if none."""
    try:
        return TURNS.get(picture.getexif().get(0x0112))
    except Exception:  # odd EXIF: programs show such photos as they are stored
        return None


class Photo(NamedTuple):
    """A photo as it was read: rgb (H, W, 3) uint8, and what was done to make it that."""
    rgb: np.ndarray
    turned: bool       # by its EXIF
    many_bits: bool    # more than 8 bits a value
    transparent: bool


def read_photo(path: Path) -> Photo:
    """Photo -> RGB as displayed, 8 bits a value. Raises ValueError for a broken file.

    Cameras store a photo as the sensor saw it, with a note (EXIF) how to turn it. The turn is
    applied here, so that a mask fits what people see. What is transparent is laid on white.
    """
    def convert(picture, content):
        picture.load()
        turn = exif_turn(picture)
        if turn is not None:
            picture = picture.transpose(turn)
        many_bits = file_kind(content) == "PNG" and content[24] == 16  # bits a value, in its header
        transparent = picture.has_transparency_data
        if many_bits and picture.mode.startswith("I"):
            return Photo(grey_from_16_bits(np.asarray(picture)), turn is not None, True, False)
        if transparent:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        return Photo(np.array(picture.convert("RGB")), turn is not None, many_bits, transparent)
    photo = decode(path, ("JPEG", "PNG"), "image", convert)
    # Pillow takes the upper 8 of 16 bits. Of colours from a camera of 12 bits these are 0 to 15.
    if photo.many_bits and 0 < photo.rgb.max() < 64:
        raise ValueError(f"{path}: 16 bits a value, and the brightest is below a quarter of "
                         "them; save it with 8 bits a value")
    return photo


def grey_from_16_bits(values: np.ndarray) -> np.ndarray:
    """(H, W) of up to 16 bits -> (H, W, 3) uint8, by value: the upper 8 of the bits in use.

    Cameras and microscopes store 10, 12 or 14 bits in 16. Which, the brightest pixel tells; a
    division by 256 whatever it is would make 12 bits black.
    """
    bits = max(8, int(values.max()).bit_length())
    bits += bits % 2
    return np.repeat((values >> (bits - 8)).astype(np.uint8)[..., None], 3, axis=2)


def read_image(path: Path) -> np.ndarray:
    """Photo -> (H, W, 3) uint8 RGB as displayed; see read_photo."""
    return read_photo(path).rgb


# ------------------------------------------------------------------------------------ label PNGs

def colour_map() -> np.ndarray:
    """VOC's palette, (256, 3) uint8: the colour of every class number.

    The bits of a number, three at a time from the lowest up, fill red, green and blue from the
    top bit down. So 5 (bottle), 101 in binary, has bit 0 in red and bit 2 in blue: (128, 0, 128).
    Near numbers get far colours, and nobody has to keep a table.
    """
    number = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            is_set = (number >> (3 * bit + channel)) & 1
            palette[:, channel] |= (is_set << (7 - bit)).astype(np.uint8)
    return palette


NUMBER_OF_COLOUR = {tuple(colour): number for number, colour in enumerate(colour_map().tolist())}


def read_label(path: Path, classes: int = 256, size: tuple | None = None) -> np.ndarray:
    """Label PNG -> (H, W) uint8 of class numbers, 255 = unsure.

    classes: numbers from `classes` to 254 are refused; size: (H, W) that is expected. An indexed
    PNG's numbers are read, at any bit depth; grey ones likewise. Raises ValueError.
    """
    def convert(picture, content):
        label, depth = np.array(picture), content[24]
        if picture.mode == "L" and depth < 8:
            # Pillow spreads grey values of 2 or 4 bits over 0..255; the class number is as stored.
            label //= 255 // (2 ** depth - 1)
        return picture.mode, label, picture.getpalette()
    mode, label, palette = decode(path, ("PNG",), "label PNG", convert)
    if mode not in ("P", "L"):
        raise ValueError(f"{path}: mode {mode}; a label PNG is indexed (P) or grey (L) with up to "
                         "8 bits and holds class numbers, not colours")
    used = np.flatnonzero(np.bincount(label.ravel(), minlength=256))
    # A number that no class has is never "close enough": it shows that the mask was made for
    # another list of classes, and then its other numbers are wrong as well.
    unknown = used[(used >= classes) & (used != IGNORE)]
    if unknown.size:
        raise ValueError(f"{path}: class number {unknown.max()}, the dataset has "
                         f"0..{classes - 1} and {IGNORE}")
    check_palette(path, used, palette)
    if size is not None and label.shape != tuple(size):
        turned = ("; has the photo an EXIF turn? a mask must fit the photo as displayed"
                  if label.shape[::-1] == tuple(size) else "")
        raise ValueError(f"{path}: {label.shape[1]}x{label.shape[0]} pixels, "
                         f"its image has {size[1]}x{size[0]}{turned}")
    return label


def check_palette(path: Path, used: np.ndarray, palette: list[int] | None):
    """ValueError where an indexed PNG's colours are VOC's, but not those of its numbers.

    That is what comes out when a picture of VOC's colours is reduced to a palette: the palette
    has the colours in any order, and the numbers are places in it. Other colours say nothing.
    """
    colours = {k: tuple(palette[3 * k:3 * k + 3]) for k in used.tolist()} if palette else {}
    numbers = {k: NUMBER_OF_COLOUR.get(colour) for k, colour in colours.items()}
    if None not in numbers.values():
        for k, number in numbers.items():
            if number != k:
                raise ValueError(f"{path}: pixels of number {k} have VOC's colour of {number}: a "
                                 "palette of the file's own, whose numbers are no classes; save "
                                 "class numbers, in VOC's palette or grey")


def write_label(path: Path, label: np.ndarray):
    """(H, W) class numbers -> palette PNG in VOC's colours."""
    # Indexed, not grey: the file holds the same numbers, and people see classes as colours.
    picture = Image.fromarray(np.asarray(label, np.uint8), mode="P")
    picture.putpalette(colour_map().tobytes())
    write_whole(path, lambda f: picture.save(f, "PNG"))


def folder_digest(folder: Path, ids: list[str]) -> str:
    """sha256 over the label PNGs of `ids`.

    Tells whether a stage's input is still the one that it was trained on.
    """
    # A digest of digests in the list's order: equal only if every file is, and files of other
    # images in the folder do not disturb.
    def digest(image_id):
        return hashlib.sha256(label_path(folder, image_id).read_bytes()).hexdigest()
    digests = for_each(digest, ids, "digests")
    return hashlib.sha256("".join(digests).encode()).hexdigest()


# ------------------------------------------------------------------- checks before the work starts

# The share of true masks that may hold a class which the image-level labels lack. The two were
# made by different people, who may differ on a photo in a thousand; a wrong numbering shows in
# nearly every one.
TOLERATED = 0.01


def check_inputs(data: Dataset, ids: list[str], label_folder: Path | None = None,
                 image_labels: dict | None = None, tolerated: float = 0.0):
    """Decode every photo and its label PNG, and compare its classes. Raises ValueError.

    label_folder: of seeds or masks, one for each id. image_labels: {id: class numbers}, of all
    or some ids; with them alone, the true masks are compared where there are any. tolerated:
    share of label PNGs that may hold a class which their image does not have.

    Stages call this before they build a network: a broken file would else be met at a random
    iteration, hours into a run, and a wrong class number never.
    """
    # What is quick to know comes first: that every file is there is known before one is decoded.
    photos = {image_id: data.image_path(image_id) for image_id in ids}
    labels = labels_to_check(data, ids, label_folder, image_labels)
    if label_folder is None or label_folder.name in TRUTH_FOLDERS:
        tolerated = TOLERATED

    # A mask of another size cannot be laid over its photo, and resizing it in silence would hide
    # that one of the two was cropped or turned.
    def check(image_id):
        photo = read_photo(photos[image_id])
        numbers, fault = None, None
        if labels.get(image_id):
            try:
                label = read_label(labels[image_id], len(data.classes), photo.rgb.shape[:2])
                numbers = set(np.unique(label).tolist())
            except ValueError as e:
                fault = e
        return photo._replace(rgb=None), numbers, fault
    checked = for_each(check, ids, "checking inputs")
    # Said before a refusal: that photos were turned may explain a mask of another size.
    note_conversions([photo for photo, _, _ in checked], data.root / "JPEGImages")
    held = {}
    for image_id, (_, numbers, fault) in zip(ids, checked):
        if fault:
            raise fault
        if numbers is not None:
            held[labels[image_id]] = image_id, numbers
    compare_classes(data, held, image_labels or {}, tolerated)


def labels_to_check(data: Dataset, ids: list[str], label_folder: Path | None,
                    image_labels: dict | None) -> dict[str, Path | None]:
    """{id: label PNG} for check_inputs: of a folder, which must have all, or the true masks."""
    if label_folder is None:
        if image_labels is None:
            return {}
        return {image_id: data.truth_path(image_id) for image_id in ids}
    labels = {image_id: label_path(label_folder, image_id) for image_id in ids}
    missing = [image_id for image_id in ids if not labels[image_id].is_file()]
    if missing:
        raise ValueError(f"{label_folder}: {len(missing)} of {len(ids)} label PNGs missing, "
                         f"first {missing[0]}.png; run the stage before on the same list, "
                         "or name another folder")
    return labels


def note_conversions(photos: list[Photo], folder: Path):
    """Say how many photos are not read as they are stored."""
    turned = sum(photo.turned for photo in photos)
    many_bits = sum(photo.many_bits for photo in photos)
    transparent = sum(photo.transparent for photo in photos)
    if turned:
        note(f"{folder}: {turned} of {len(photos)} photos have an EXIF turn, which is applied: "
             "masks must fit them as displayed, not as stored")
    if many_bits:
        note(f"{folder}: {many_bits} of {len(photos)} photos have 16 bits a value, read as 8")
    if transparent:
        note(f"{folder}: {transparent} of {len(photos)} photos are transparent, and laid on white")


def compare_classes(data: Dataset, held: dict, image_labels: dict, tolerated: float):
    """The numbers in label PNGs against image-level labels. Raises ValueError where they differ.

    held: {path: (id, set of the numbers in it)}. A number in a PNG is trusted by all that comes
    after, and another tool's numbering looks like ours: that the classes are those of the photo
    is all that can tell. A PNG may lack a class (seeds do, and true masks lack some of the
    objects that VOC calls difficult); it may not have one that the photo does not.
    """
    objects = {path: numbers - {0, IGNORE} for path, (_, numbers) in held.items()}
    # Whose photo shows a class, or has no labels at all ([0] stands for "not told").
    expected = [image_id for image_id, _ in held.values() if image_labels.get(image_id, [0])]
    # One mask of 0 and 255 is nothing odd, VOC has some; a whole folder of them is.
    if len(expected) > 1 and not any(objects.values()):
        raise ValueError(f"{next(iter(held)).parent}: {len(held)} label PNGs and no class in any; "
                         f"{IGNORE} is unsure here, an object's pixels hold its class number, "
                         "from 1 on")
    wrong = {path: sorted(objects[path] - set(image_labels[image_id]))
             for path, (image_id, _) in held.items()
             if image_id in image_labels and not objects[path] <= set(image_labels[image_id])}
    if not wrong:
        return
    path, numbers = next(iter(wrong.items()))
    names = [data.classes[k] for k in image_labels[held[path][0]]]
    told = (f"{path}: number {numbers[0]} is {data.classes[numbers[0]]}, and the labels of the "
            f"image say {', '.join(names) or 'no class'}; {len(wrong)} of {len(held)} label PNGs "
            "disagree like this")
    if len(wrong) <= tolerated * len(held):
        note(told)
        return
    without = "" if (data.root / "classes.txt").is_file() else " (absent: VOC's 21)"
    raise ValueError(f"{told}; number them as in classes.txt{without}, or mend that or the labels")


def note_leaks(data: Dataset, split: str):
    """Say how many images of the lists that scores are made on stand in the training list too."""
    training = set(data.ids(split))
    for judged in ("val", "test"):
        if judged != split and data.has(judged):
            leaked = [image_id for image_id in data.ids(judged) if image_id in training]
            if leaked:
                note(f"{data.list_path(split)}: {len(leaked)} ids of {data.list_path(judged).name} "
                     f"stand in {split} too, first {leaked[0]}; scores on {judged} will be too "
                     "good")


# -------------------------------------------------------------------- what the stages leave behind

def read_args(folder: Path) -> dict:
    """args.json, the record that a stage keeps of its run; {} where there is none.

    Raises ValueError for a file that is no such record any more.
    """
    path = folder / "args.json"
    if not path.is_file():
        return {}
    record = parse_json(path.read_bytes(), f"{path}: no record of a run (damaged)")
    for part, types in RECORD_TYPES.items():
        facts = record.get(part, {})
        for name, kind in types.items():
            value = facts.get(name) if isinstance(facts, dict) else facts
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{path}: no record of a run (its {part} are damaged: {name}); "
                                 "remove it, or the stage's folder")
    return record


def parse_json(content: bytes, fault: str) -> dict:
    """JSON text -> dict; ValueError(fault) where it is none."""
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):  # a number of a million digits, a million brackets
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{fault}; remove it")
    return value


def read_log(path: Path) -> list[dict]:
    """log.jsonl -> its lines, {"step": n, "lr": ..., name of a loss: value}; [] without a file.

    Raises ValueError, naming the line, where one is no such record.
    """
    if not path.is_file():
        return []
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        # A run that was cut off while it wrote may have left half a line at the end.
        if text.endswith(b"}"):
            fault = f"{path}: line {number} is no record of an iteration (damaged)"
            line = parse_json(text, fault)
            losses = [line[name] for name in line if name.startswith("loss")]
            for value in (line.get("step"), *losses):
                if not isinstance(value, (int, float)) or not abs(value) < 1e300:
                    raise ValueError(f"{fault}; remove it")
            lines.append(line)
    return lines


CAM_BYTES = 2 ** 28


def read_cams(path: Path) -> dict[str, np.ndarray]:
    """cams/<id>.npz -> {"keys": (J,) class numbers from 1, "cam": (J, h, w) in [0, 1], ...}.

    Raises ValueError for a damaged file. NumPy would believe what a file says of its sizes, and
    ask for the memory; here an array must be as large as its bytes.
    """
    arrays, content = {}, path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > CAM_BYTES:
                raise ValueError("too large")
            for name in archive.namelist():
                # Reading an entry whole also compares it with its checksum.
                arrays[name.removesuffix(".npy")] = array_from_npy(archive.read(name))
        keys, cam = arrays["keys"], arrays["cam"]
        if (keys.ndim, keys.dtype, cam.ndim, cam.dtype) != (1, np.uint8, 3, np.float16):
            raise ValueError("no CAMs")
        if any(len(array) != len(keys) for array in arrays.values()):
            raise ValueError("not one of each for every class")
    except Exception:  # zip, zlib and NumPy's reader raise many kinds
        raise ValueError(f"{path}: not a readable file of CAMs (damaged); remove it, and stage 1 "
                         "makes it again") from None
    return arrays


def array_from_npy(content: bytes) -> np.ndarray:
    """Bytes of an .npy file -> array. Raises ValueError and what NumPy's reader raises."""
    f = io.BytesIO(content)
    np.lib.format.read_magic(f)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
    values = np.frombuffer(content, dtype, offset=f.tell())
    return values.reshape(shape, order="F" if fortran else "C")


# ----------------------------------------------------------------- files that appear whole, errors

def write_whole(path: Path, write):
    """Call write(file) on a file beside `path`, then rename it: `path` exists whole or not at all.

    A run that is cut off thus leaves no half file behind, and "the file exists" can be taken for
    "this piece of work is done" when the same command goes on. Raises OSError that names `path`.
    """
    path = Path(path)
    # The process's number is in the name, so two processes that write one file do not mix, and
    # the dot keeps `*.png` from finding it.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as f:
                write(f)
                # A rename may reach the disk before what it renames: a power cut would then leave
                # a whole name on an empty file.
                f.flush()
                os.fsync(f.fileno())
            os.replace(part, path)  # atomic on one file system
        finally:
            part.unlink(missing_ok=True)
    flush_folder(path.parent)


@contextlib.contextmanager
def naming(path: Path):
    """A context in which an OSError says that `path` could not be written, and what to look at."""
    try:
        yield
    except OSError as error:
        fault = f"cannot be written ({error.strerror or error})"
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            fault += "; is the disk full? What was there before is unharmed"
        raise OSError(f"{path}: {fault}") from None


def flush_folder(folder: Path):
    """Let a rename in `folder` reach the disk, where the system can open a folder for that."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(number)
    except OSError:  # some network file systems
        pass
    finally:
        os.close(number)


def write_text(path: Path, text: str):
    """A text file in UTF-8, whole or not at all."""
    write_whole(path, lambda f: f.write(text.encode("utf-8")))


def write_json(path: Path, value):
    """A JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


@lru_cache(maxsize=None)  # a text is said once, however often a file is read
def note(text: str):
    """Say on stderr what is read otherwise than it stands, from one of torchrun's processes."""
    if os.environ.get("RANK", "0") == "0":
        print(" ".join(text.split()), file=sys.stderr)


def stop(message, status: int = 2):
    """What ends a command: one line on stderr, and the exit status, 2 for the user's mistakes."""
    print(" ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(status)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or SIGTERM, which a scheduler sends before it kills; `signal` is its number.

    goes_on: how the work can be taken up again, for the line that the user is told; who catches a
    signal that says no more than "interrupted" and knows it, raises one that does.
    """

    def __init__(self, number: int, goes_on: str = ""):
        super().__init__(f"interrupted; {goes_on}" if goes_on else "interrupted")
        self.signal = number
        self.says_more = bool(goes_on)


def interrupt(number, frame):
    """The signals' handler while a command runs."""
    raise Interrupted(number)


class Parser(argparse.ArgumentParser):
    """argparse's parser, but a wrong option is one line, as every other mistake is."""

    def error(self, message):
        """Called with what is wrong with the command line; raises it as ValueError."""
        raise ValueError(f"{message}; --help explains the options")


def run(main):
    """Run a script's main(); what ends it early becomes one line and an exit status.

    2: bad input (ValueError, OSError), or what `fault_of` knows; 130: Ctrl-C; 143: SIGTERM, both as
    shells count. Functions raise and never exit, so that tests and other scripts can catch what
    they say. Whatever else is raised is a mistake of ours, and keeps its traceback.
    """
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, interrupt)
    try:
        main()
    except Interrupted as error:
        stop(error, 128 + error.signal)
    except Exception as error:
        fault = fault_of(error)
        if fault is None:
            raise
        stop(fault)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fault_of(error: Exception) -> str | None:
    """What the user is told of an error; None if it is none of the user's."""
    text = str(error)
    # A process that loads images sends its error as a page of text whose end is the error itself.
    sent = re.match(r"Caught (\w+) in DataLoader worker process", text)
    if sent:
        text = text.split(f"\n{sent[1]}: ")[-1]
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return ("a process that loads images was killed, most likely for want of memory; give "
                "fewer --workers, or --workers 0, which needs none")
    if is_out_of_memory(error):
        return f"out of memory: {text.splitlines()[0] if text else 'no more to be had'}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return text if isinstance(error, (ValueError, OSError)) else None


def is_out_of_memory(error: BaseException) -> bool:
    """True for a want of memory: Python's, or torch's, which has many names for it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    names = ("out of memory", "not enough memory", "allocate memory", "bad_alloc")
    return isinstance(error, RuntimeError) and any(name in str(error) for name in names)


# ================================================================================================
# II  VOC 2012 and COCO 2014 from nothing
# ================================================================================================

# Both are brought into the layout of part I, each in its own way:
#
#     VOC2012    --download   VOC's archive has all but the list trainaug, which papers train on:
#                             trainaug = (SBD train + SBD val + VOC train) - VOC val. SBD is a
#                             later annotation of VOC's own photos, so it adds ids and masks, but
#                             neither photos nor image-level labels: those are in VOC's XML.
#     COCO2014   --download   photos, and a JSON file a split
#                --prepare    lists, image-level labels and masks out of the JSON files
#
# Archives are kept in <dataset>/archives until somebody deletes them. What is there is never
# written again, so both commands go on where they were cut off and do nothing where all is there.

# Lengths of the lists as papers report them; COCO's count the photos that have objects.
PUBLISHED = {"VOC2012": {"train": 1_464, "val": 1_449, "trainaug": 10_582, "test": 1_456},
             "COCO2014": {"train": 82_081, "val": 40_137}}
PUBLISHED_CLASSES = {"VOC2012": VOC_CLASSES, "COCO2014": COCO_CLASSES}
VOC_ARCHIVE = "VOCtrainval_11-May-2012.tar"
VOC_WANTED = ("Annotations/*.xml", "ImageSets/Segmentation/*.txt", "JPEGImages/*.jpg",
              "SegmentationClass/*.png")
SBD_ARCHIVE = "benchmark.tgz"
SBD_FOLDER = PurePosixPath("benchmark_RELEASE/dataset")
# VOC keeps the photos of its test list behind a login, which no command can pass.
TEST_ARCHIVE = "VOC2012test.tar"
TEST_ADDRESS = f"http://host.robots.ox.ac.uk:8080/eval/downloads/{TEST_ARCHIVE}"
# COCO's site gives no checksums; these are what several projects noted for the same archives.
COCO_ARCHIVES = {
    "http://images.cocodataset.org/annotations/annotations_trainval2014.zip":
        "0a379cfc70b0e71301e0f377548639bd",
    "http://images.cocodataset.org/zips/train2014.zip": "0da8c0bd3d6becc4dcb32757491aca88",
    "http://images.cocodataset.org/zips/val2014.zip": "a3d79f5ed8d289b7a7554ce06a5782b3"}
# What of an archive is used, and how many files that are.
COCO_WANTED = {"annotations_trainval2014.zip": ("annotations/instances_*2014.json", 2),
               "train2014.zip": ("train2014/*.jpg", 82_783),
               "val2014.zip": ("val2014/*.jpg", 40_504)}
# COCO's own number for each of our 81 classes: 0, 1, ... 11, 13, ... 90.
COCO_IDS = [COCO_SLOTS.index(name) for name in COCO_CLASSES]
# And back, (256,). A number that COCO never used is no class: it becomes "unsure", which counts
# as a miss where a mask is scored.
CLASS_OF_COCO_ID = np.full(256, IGNORE, np.uint8)
CLASS_OF_COCO_ID[COCO_IDS] = np.arange(len(COCO_IDS))


# ------------------------------------------------------------- what is there, and what is missing

class Count(NamedTuple):
    """How much of one kind of file there is for a list, beside what is published."""
    split: str
    what: str      # ids, photos, image labels or true masks
    found: int
    expected: int
    source: str    # the archive that has them
    needed: bool   # False for what none of the four commands reads


def published_counts(data: Dataset) -> list[Count]:
    """A Count for every list of the published dataset and for its photos, labels and masks."""
    counts = []
    for split, expected in PUBLISHED[data.name].items():
        for what, found in count_list(data, split).items():
            source = archive_with(data.name, split, what)
            needed = split != "test" and (split, what) != ("trainaug", "true masks")
            counts.append(Count(split, what, found, expected, source, needed))
    return counts


def count_list(data: Dataset, split: str) -> dict[str, int]:
    """{"ids": n, "photos": n, "image labels": n, "true masks": n} of a list.

    Of a list that is not there no more than {"ids": 0} can be said. Labels and masks of test are
    not public.
    """
    if not data.has(split):
        return {"ids": 0}
    ids = data.ids(split)
    counts = {"ids": len(ids), "photos": count_files(data.root / "JPEGImages", ids)}
    if split != "test":
        counts["image labels"] = len(ids) - len(without_labels(data, ids))
        counts["true masks"] = count_files(data.root / "SegmentationClass", ids)
    if split == "trainaug":  # SBD's masks serve where VOC has none; train and val want VOC's own
        counts["true masks"] = sum(data.truth_path(i) is not None for i in ids)
    return counts


def count_files(folder: Path, ids: list[str]) -> int:
    """How many of `ids` have a file in `folder`."""
    # One look at a folder is far quicker than asking for each of 82,081 files.
    stems = {path.stem for path in folder.iterdir()} if folder.is_dir() else set()
    return len(stems.intersection(ids))


def without_labels(data: Dataset, ids: list[str]) -> list[str]:
    """Those of `ids` that have no image-level labels."""
    path = data.root / "image_labels.txt"
    if path.is_file():
        labelled = set(read_image_labels(path))
    else:
        labelled = {xml.stem for xml in (data.root / "Annotations").glob("*.xml")}
    return [image_id for image_id in ids if image_id not in labelled]


def archive_with(name: str, split: str, what: str) -> str:
    """Name of the archive that a kind of file comes from."""
    if name == "COCO2014":
        return f"{split}2014.zip" if what == "photos" else "annotations_trainval2014.zip"
    if split == "test":
        return TEST_ARCHIVE
    return SBD_ARCHIVE if split == "trainaug" and what in ("ids", "true masks") else VOC_ARCHIVE


def check_published(data: Dataset):
    """Print every count beside the published one, and what brings the rest.

    Raises ValueError where something that the four commands need is not as published.
    """
    counts = published_counts(data)
    # Every count is printed, the right ones too: who compares with a paper wants to see them.
    for c in counts:
        lack = "  missing" if c.needed else "  not needed to run"
        remark = "" if c.found == c.expected else lack
        print(f"{c.split:9} {c.what:12} {c.found:7,} of {c.expected:7,}{remark}")
    missing = [c for c in counts if c.found != c.expected]
    # An archive is named once, however many counts wait for it.
    for source in dict.fromkeys(c.source for c in missing):
        print(f"{source}: {how_to_get(data, source)}")
    if data.classes != PUBLISHED_CLASSES[data.name]:
        raise ValueError(f"{data.root}/classes.txt: not {data.name}'s "
                         f"{len(PUBLISHED_CLASSES[data.name])} names in their order; "
                         f"delete it, and --prepare writes COCO's (VOC needs none)")
    needed = [c for c in missing if c.needed]
    if needed:
        first = needed[0]
        raise ValueError(f"{data.root}: {len(needed)} counts are not {data.name}'s, first "
                         f"{first.split}: {first.found:,} of {first.expected:,} {first.what}; "
                         "lists that are there are kept as they are: delete one to have it anew")


def how_to_get(data: Dataset, source: str) -> str:
    """What to do to have what comes from an archive."""
    command = f"python eval.py --data {data.root} --download"
    if source == TEST_ARCHIVE:
        return (f"{TEST_ADDRESS} asks for a login; put the archive into {data.root / 'archives'}, "
                f"then {command}; only --submit wants it")
    if source == SBD_ARCHIVE:
        return f"{command}; its masks, which are only scored, want scipy (pip install scipy)"
    return f"{command} --prepare" if data.name == "COCO2014" else command


# ----------------------------------------------------------------------------------- the archives

def folder_to_fill(name: str) -> Path:
    """The folder of `--data` if there is one; else data/NAME for a bare name, DIR for a path."""
    there = [place for place in dataset_places(name) if place.is_dir()]
    if there:
        return there[0]
    return Path(name) if "/" in name else Path("data") / name


def download(name: str):
    """Bring what is missing of VOC2012 or COCO2014, whichever the folder is called.

    Raises ValueError for another name, a download that fails, a full disk, and where the counts
    are not the published ones in the end.
    """
    # The name is all that tells which dataset is meant; stages choose their recipe by it too.
    root, known = folder_to_fill(name), dataset_name(name)
    if known not in PUBLISHED:
        raise ValueError(f"--data {name}: only {' and '.join(PUBLISHED)} can be downloaded")
    data = Dataset(root, known, PUBLISHED_CLASSES[known], texts={})
    bring = download_voc if known == "VOC2012" else download_coco
    try:
        bring(data)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as e:
        raise ValueError(f"{root / 'archives'}: an archive is broken ({e}); delete it and run the "
                         "same command again") from None
    if known == "VOC2012":
        check_published(data)
    else:
        print(f"{root}: COCO's own files are there; --prepare makes the dataset of them")
    if (root / "archives").is_dir():
        print(f"{root / 'archives'} may be deleted")


def fetch(url: str, md5: str, folder: Path) -> Path:
    """The archive of `url` in `folder`, downloaded unless it is there already.

    Raises ValueError for a download that fails or is cut off and for another md5. Half an archive
    never has the archive's name, so that the same command begins with it again.
    """
    # Here and not above: torchvision brings torch, and who only scores shall not wait for it.
    from torchvision.datasets.utils import check_integrity, download_url
    path = folder / url.rpartition("/")[2]
    # An archive may have been put here by hand, from another machine. A wrong one is not deleted:
    # it is not ours.
    if path.is_file():
        if not check_integrity(path, md5):
            raise ValueError(f"{path}: its md5 is not {md5}, so it is cut off or another file; "
                             "delete it and run the same command again")
        return path
    part = folder / f"{path.name}.part"
    try:
        download_url(url, folder, part.name, md5)
        os.replace(part, path)
    except RuntimeError:
        raise ValueError(f"{url}: what came has not the md5 {md5}: it was cut off or has changed; "
                         "the same command begins with it again") from None
    except (OSError, HTTPException) as e:
        raise ValueError(f"{url} to {path}: {e}; the same command begins with it again, archives "
                         "that are whole are kept") from None
    finally:
        part.unlink(missing_ok=True)
    return path


def archive_files(path: Path):
    """Yields (path inside, open file) for every regular file of a .zip, .tar or .tgz, under a bar.

    Links and devices are left out: nothing in an archive may point out of it.
    """
    # How many files are to come a .tar does not say, so the bar tells the time left by bytes.
    bar = tqdm(total=path.stat().st_size, desc=f"reading {path.name}", unit="B", unit_scale=True)
    with open(path, "rb") as f, bar:
        members = zip_files(f) if path.suffix == ".zip" else tar_files(f)
        for member in members:
            yield member
            bar.update(f.tell() - bar.n)


def zip_files(f):
    """`archive_files` of an open .zip."""
    with zipfile.ZipFile(f) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                yield PurePosixPath(member.filename), archive.open(member)


def tar_files(f):
    """`archive_files` of an open .tar, compressed or not."""
    with tarfile.open(fileobj=f) as archive:
        for member in archive:
            if member.isfile():
                yield PurePosixPath(member.name), archive.extractfile(member)


def unpack(path: Path, prefix: str, wanted: tuple[str, ...], root: Path):
    """Write the files of an archive that match `wanted` below `prefix` into `root`.

    wanted: patterns of one folder each, as "JPEGImages/*.jpg". Files that are there are kept.
    """
    # A path in an archive may hold "..", so none is followed: a file is taken only where its
    # folder is, letter by letter, a wanted one, and lands in our folder under its last name.
    patterns = {PurePosixPath(prefix, pattern).parent: PurePosixPath(pattern)
                for pattern in wanted}
    for inside, source in archive_files(path):
        pattern = patterns.get(inside.parent)
        if pattern is None or not inside.match(pattern.name):
            continue
        target = root / pattern.parent / inside.name
        try:
            if not target.exists():
                write_whole(target, lambda f: shutil.copyfileobj(source, f))
        except OSError as e:
            raise ValueError(f"{target}: {e}; the same command goes on from here") from None


def download_voc(data: Dataset):
    """VOC 2012's train, val and trainaug, and test where its archive was put beside the others.

    Raises ValueError where trainaug does not come to 10,582 ids.
    """
    from torchvision.datasets import SBDataset
    from torchvision.datasets.voc import DATASET_YEAR_DICT
    voc, archives = DATASET_YEAR_DICT["2012"], data.root / "archives"
    test = archives / TEST_ARCHIVE
    # Files decide, not archives: with all of them in place nothing is asked of any server.
    lacking = {c.source for c in published_counts(data) if c.found != c.expected}
    if VOC_ARCHIVE in lacking:
        unpack(fetch(voc["url"], voc["md5"], archives), "VOCdevkit/VOC2012", VOC_WANTED, data.root)
    if TEST_ARCHIVE in lacking and test.is_file():
        unpack(test, "VOCdevkit/VOC2012", VOC_WANTED, data.root)
    if not data.has("trainaug"):
        write_trainaug(data, fetch(SBDataset.url, SBDataset.md5, archives))

    # VOC's archive has an annotation for each of its photos, so all of trainaug is expected to
    # have its labels from there. An id without is not dropped: SBD says what is in it.
    ids = data.ids("trainaug")
    unlabelled = without_labels(data, ids)
    unmasked = [i for i in ids if data.truth_path(i) is None]
    if unlabelled:
        print(f"trainaug: {len(unlabelled):,} ids have no Annotations/<id>.xml; SBD knows their "
              "classes")
    if not unlabelled and not unmasked:
        return
    if importlib.util.find_spec("scipy") is None:
        print(f"trainaug: {len(unlabelled):,} labels and {len(unmasked):,} true masks stand in "
              "SBD's .mat files, which scipy reads: pip install scipy, and the same command again")
        return
    archive = fetch(SBDataset.url, SBDataset.md5, archives)
    convert_sbd(data, archive, set(unlabelled), set(unmasked))


def write_trainaug(data: Dataset, archive: Path):
    """Make the list trainaug, sorted. Raises ValueError where it has not 10,582 ids.

    SBD was split without regard to VOC's lists, so its train holds photos of VOC's val: they are
    taken out, or a network would be scored on what it has learned from.
    """
    sbd = set()
    for inside, source in archive_files(archive):
        if inside in (SBD_FOLDER / "train.txt", SBD_FOLDER / "val.txt"):
            sbd.update(source.read().decode().split())
    trainaug = (sbd | set(data.ids("train"))) - set(data.ids("val"))
    expected = PUBLISHED["VOC2012"]["trainaug"]
    if len(trainaug) != expected:
        raise ValueError(f"{archive}: with train and val of {data.root} trainaug comes to "
                         f"{len(trainaug):,} ids and not {expected:,}")
    write_text(data.list_path("trainaug"), "\n".join(sorted(trainaug)) + "\n")


def convert_sbd(data: Dataset, archive: Path, unlabelled: set[str], unmasked: set[str]):
    """SBD's .mat files -> Annotations/<id>.xml of `unlabelled`, SegmentationClassAug of `unmasked`.

    Labels are the list of classes that the file has beside its mask. SBD draws no void border, so
    its masks hold no 255.
    """
    # scipy reads MATLAB's files; nothing else here needs it, so nobody has to install it to train.
    from scipy.io import loadmat
    for inside, source in archive_files(archive):
        image_id = inside.stem
        if inside.parent != SBD_FOLDER / "cls" or image_id not in unlabelled | unmasked:
            continue
        truth = loadmat(io.BytesIO(source.read()))["GTcls"][0, 0]
        if image_id in unmasked:
            folder = data.root / "SegmentationClassAug"
            write_label(folder / f"{image_id}.png", truth["Segmentation"])
        if image_id in unlabelled:
            names = [data.classes[k] for k in truth["CategoriesPresent"].ravel()]
            objects = "".join(f"<object><name>{name}</name></object>" for name in names)
            write_text(data.root / "Annotations" / f"{image_id}.xml",
                       f"<annotation><source>SBD</source>{objects}</annotation>\n")


def download_coco(data: Dataset):
    """COCO 2014's photos and JSON files, as its archives have them."""
    for url, md5 in COCO_ARCHIVES.items():
        wanted, expected = COCO_WANTED[url.rpartition("/")[2]]
        # A count is enough: files appear whole, so as many as there should be are all of them.
        if len(list(data.root.glob(wanted))) != expected:
            unpack(fetch(url, md5, data.root / "archives"), "", (wanted,), data.root)


# ------------------------------------------------------------------------ COCO 2014's JSON, read

class CocoImage(NamedTuple):
    """A photo of COCO and what is in it."""
    image_id: str
    height: int
    width: int
    objects: list  # (category id, outline) in the file's order; outlines are of `read_outline`


class RunLengths(NamedTuple):
    """Pixels as run lengths down the columns: so many outside, so many inside, and so on."""
    size: tuple         # (H, W)
    counts: np.ndarray  # (n,) int64


class JsonReader:
    """A JSON file, read from front to back with no more than a piece of it in memory.

    COCO's annotations are hundreds of megabytes of text, and the lists and numbers that Python
    makes of them take several times that. (COCO's own tools do so, and must be compiled.)
    """

    def __init__(self, file):
        self.file = file
        self.text = ""  # the piece
        self.at = 0     # how far it has been read
        self.space = re.compile(r"\s*")
        self.decoder = json.JSONDecoder()

    def more(self):
        """Drop what has been read and add to the rest. Raises ValueError at the file's end."""
        # An item that goes on behind the piece is begun anew with a longer one. Doubling what
        # is left keeps that rare for an item of any length.
        added = self.file.read(max(1 << 20, len(self.text) - self.at))
        if not added:
            raise ValueError("not a whole JSON file; delete it, and --download brings it again")
        self.text = self.text[self.at:] + added
        self.at = 0

    def next(self) -> str:
        """The character that comes next, white space aside."""
        while True:
            self.at = self.space.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            self.more()

    def skip(self, character: str):
        """Step over `character`. Raises ValueError where another one comes next."""
        if self.next() != character:
            raise ValueError(f"no JSON: {character} is expected before "
                             f"{self.text[self.at:self.at + 40]!r}")
        self.at += 1

    def value(self):
        """The value that comes next."""
        self.next()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError:
                end = len(self.text)  # it goes on behind the piece
            # What comes behind must be there too: of the number -4.5 the piece may end in -4.
            if self.text[end:end + 1] in tuple(",:]} \t\r\n"):
                self.at = end
                return value
            self.more()

    def items(self):
        """Yields (key, item) for every item of every list in the object that the file holds."""
        self.skip("{")
        while self.next() != "}":
            key = self.value()
            self.skip(":")
            if self.next() == "[":
                self.skip("[")
                while self.next() != "]":
                    yield key, self.value()
                    if self.next() != "]":
                        self.skip(",")
                self.skip("]")
            else:
                self.value()
            if self.next() != "}":
                self.skip(",")


def read_coco(path: Path) -> list[CocoImage]:
    """instances_*.json -> the photos that have objects, in the order of their ids.

    Raises ValueError where the categories are not COCO's 80, and for entries that do not fit.
    """
    # Annotations come in no order of photos, and photos may come after them: so all is gathered by
    # number first and put together at the end.
    images, objects, names = {}, {}, {}
    try:
        # The bar goes by what has been read, since how many entries come nobody knows.
        size, text = path.stat().st_size, f"reading {path.name}"
        with open(path, encoding="utf-8") as f, tqdm.wrapattr(f, "read", size, desc=text) as file:
            for key, item in JsonReader(file).items():
                if key == "images":
                    stem = PurePosixPath(item["file_name"]).stem
                    images[item["id"]] = stem, item["height"], item["width"]
                elif key == "annotations":
                    found = item["category_id"], read_outline(item["segmentation"])
                    objects.setdefault(item["image_id"], []).append(found)
                elif key == "categories":
                    names[item["id"]] = item["name"]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; --download brings it") from None
    except (KeyError, TypeError) as e:
        raise ValueError(f"{path}: an entry of {key} is not COCO's ({e!r})") from None
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    # Other categories would give every mask wrong classes, and nobody would see it.
    if names != {number: COCO_SLOTS[number] for number in COCO_IDS[1:]}:
        raise ValueError(f"{path}: its {len(names)} categories are not COCO's 80")
    check_references(path, objects, images)
    # Photos without objects are left out, as papers do: they have no label to learn from.
    found = [CocoImage(*images[number], objects[number]) for number in objects]
    return sorted(found, key=lambda image: image.image_id)


def check_references(path: Path, objects: dict, images: dict):
    """Raise ValueError where an object is of a photo or of a category that the file has not."""
    for number, found in objects.items():
        if number not in images:
            raise ValueError(f"{path}: objects of photo {number}, which is not listed")
        for category, _ in found:
            if category not in COCO_IDS[1:]:
                raise ValueError(f"{path}: photo {number} has an object of category {category}, "
                                 "which is none of COCO's 80")


def read_outline(segmentation):
    """An object's place as the JSON has it -> RunLengths, or polygons: a list of (n, 2), x y.

    A polygon with half a corner is a ValueError.
    """
    # Arrays, because nearly all of the file is these numbers: an array holds one in 8 bytes,
    # Python's lists in 32.
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        if isinstance(counts, str):
            counts = run_lengths(counts)
        return RunLengths(tuple(segmentation["size"]), np.array(counts, np.int64))
    return [corners(numbers) for numbers in segmentation]


def corners(numbers: list[float]) -> np.ndarray:
    """x, y, x, y, ... of a polygon -> (n, 2) float64. Raises ValueError for half a corner.

    One or two corners are taken as well: they hold no pixel.
    """
    if len(numbers) % 2:
        raise ValueError(f"a polygon of {len(numbers)} numbers; x and y of every corner are "
                         "expected")
    return np.array(numbers, np.float64).reshape(-1, 2)


def run_lengths(text: str) -> list[int]:
    """COCO's compressed run lengths -> the numbers.

    A character holds six bits, counted from "0": five of a number, the lowest first, and one that
    says whether the number goes on. The fifth bit of its last character is its sign. From the
    fourth number on, what stands there is the difference to the number two before.
    """
    counts, number, shift = [], 0, 0
    for character in text:
        bits = ord(character) - ord("0")
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # it goes on
            continue
        if bits & 16:  # two's complement: the highest bit counts negative
            number -= 1 << shift
        counts.append(number + counts[-2] if len(counts) > 2 else number)
        number, shift = 0, 0
    return counts


# ------------------------------------------------------------------------- from outlines to masks

# Which pixels are a polygon's is settled by COCO's own tool (rleFrPoly in its maskApi.c), and
# masks are compared pixel by pixel, so its geometry is followed to the last rounding: the outline
# is drawn on a grid five times as fine; where it crosses the middle of a column of pixels, what
# lies below changes from outside to inside or back.

def trace(polygon: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Column u and row v (n,) int64 of every point of the outline on the fine grid, in a row."""
    start = (5 * polygon + 0.5).astype(np.int64)                      # (k, 2), toward zero as in C
    end = np.roll(start, -1, axis=0)                                  # the last edge closes it
    steep = np.abs(end - start) @ np.array([1, -1]) < 0               # (k,) more rows than columns
    # An edge is walked a step at a time along its longer axis, which is column 0 from here on.
    start = np.where(steep[:, None], start[:, ::-1], start)
    end = np.where(steep[:, None], end[:, ::-1], end)
    steps = np.abs(end - start)[:, 0]
    # Rounding always starts from the same end, so that two objects that share an edge, one walked
    # up and one down, leave neither gap nor overlap.
    backward = (start[:, 0] > end[:, 0])[:, None]
    low, high = np.where(backward, end, start), np.where(backward, start, end)
    slope = (high - low)[:, 1] / np.maximum(steps, 1)

    # All edges at once: every point knows its edge and how many steps into it it is.
    edge = np.repeat(np.arange(len(steps)), steps + 1)                # (n,) the edge of each point
    first = np.cumsum(steps + 1) - (steps + 1)
    step = np.arange(len(edge)) - first[edge]
    step = np.where(backward[edge, 0], steps[edge] - step, step)
    along = low[edge, 0] + step
    across = (low[edge, 1] + slope[edge] * step + 0.5).astype(np.int64)
    return np.where(steep[edge], across, along), np.where(steep[edge], along, across)


def fill(polygon: np.ndarray, H: int, W: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """Rows and columns around a polygon in an image of (H, W), and which pixels there are its own.

    Those are (h, w) bool; h or w is 0 for a polygon that holds the middle of no pixel.
    """
    u, v = trace(polygon)
    # The middle of column x lies between the fine columns 5x + 2 and 5x + 3.
    column, row = np.minimum(u[:-1], u[1:]), np.minimum(v[:-1], v[1:])
    crosses = (u[:-1] != u[1:]) & (column % 5 == 2) & (column >= 0) & (column < 5 * W)
    if not crosses.any():
        return (slice(0), slice(0)), np.zeros((0, 0), bool)
    # A crossing counts from the first pixel whose middle lies below it.
    x, y = column[crosses] // 5, np.clip((row[crosses] + 2) // 5, 0, H)
    left, top = x.min(), y.min()
    w, h = x.max() - left + 1, y.max() - top
    # Down a column, a pixel is inside after an odd number of crossings: one sum counts them all.
    crossings = np.bincount((x - left) * (h + 1) + y - top, minlength=w * (h + 1))
    crossings = crossings.reshape(w, h + 1)[:, :h]                    # (w, h), down each column
    inside = (crossings.cumsum(1) & 1).astype(bool)
    return (slice(top, top + h), slice(left, left + w)), inside.T


def paint(label: np.ndarray, outline, k: int):
    """Write class number k into label (H, W) where an object is. RunLengths must fit the photo."""
    H, W = label.shape
    if isinstance(outline, RunLengths):
        if outline.size != (H, W) or outline.counts.min() < 0 or outline.counts.sum() != H * W:
            raise ValueError(f"run lengths of {outline.size} and {outline.counts.sum()} pixels")
        # Every second run is inside; COCO goes down the columns, as MATLAB and Fortran do.
        inside = np.repeat(np.arange(len(outline.counts)) % 2 == 1, outline.counts)
        label[inside.reshape(W, H).T] = k
        return
    # Several parts are one object that something in front cuts in pieces: all get its class.
    for polygon in outline:
        around, inside = fill(polygon, H, W)
        label[around][inside] = k


def coco_mask(image: CocoImage) -> np.ndarray:
    """(H, W) uint8 of class numbers: where objects overlap, the first of the file wins.

    A crowd (run lengths of many objects in one) is a place of its class like any other, as COCO's
    tool paints it.
    """
    label = np.zeros((image.height, image.width), np.uint8)
    for category, outline in reversed(image.objects):  # so that the first is painted last
        paint(label, outline, CLASS_OF_COCO_ID[category])
    return label


def prepare(name: str):
    """COCO 2014's own files -> the layout of part I. Does nothing where all of it is there.

    Raises ValueError for another name, where photos lack and where the counts are not COCO's.
    """
    root = folder_to_fill(name)
    data = Dataset(root, dataset_name(name), COCO_CLASSES, texts={})
    if data.name != "COCO2014":
        raise ValueError(f"--data {name}: only COCO2014 is prepared; VOC2012 wants --download")
    missing = [c for c in published_counts(data) if c.found != c.expected]
    if missing or not (root / "classes.txt").is_file():
        # Both splits even if one is complete: image_labels.txt is one file for both.
        lines = {split: prepare_split(root, f"{split}2014") for split in PUBLISHED[data.name]}
        write_text(root / "classes.txt", "\n".join(COCO_CLASSES) + "\n")
        write_text(root / "image_labels.txt", "".join(lines["train"] + lines["val"]))
        # The lists come last: where they are, a stage takes the dataset for finished.
        for split, of_split in lines.items():
            ids = [line.split()[0] for line in of_split]
            write_text(data.list_path(split), "\n".join(ids) + "\n")
    check_published(data)
    print(f"{root}: prepared")


def prepare_split(root: Path, folder: str) -> list[str]:
    """Links to photos and true masks of train2014 or val2014 -> its lines of image_labels.txt."""
    images = read_coco(root / "annotations" / f"instances_{folder}.json")
    link_photos(root, folder, images)
    write_coco_masks(root, images)
    lines = []
    for image in images:
        # Crowds too: what is in the photo is said, not how many.
        categories = sorted({category for category, _ in image.objects})
        names = ", ".join(COCO_SLOTS[number] for number in categories)
        lines.append(f"{image.image_id} {names}\n")
    return lines


def link_photos(root: Path, folder: str, images: list[CocoImage]):
    """JPEGImages/<id>.jpg as links to <folder>/<id>.jpg. Raises ValueError where photos lack.

    Links, because copies would be another 19 GB, and names alone would make every reader of a
    dataset know COCO's folders. They are symbolic and relative: photos may be on another disk or
    read-only (then <folder> itself is a link), and the dataset may be moved.
    """
    # Before the masks: minutes of painting shall not end in the news that photos are missing.
    there = {path.name for path in (root / folder).glob("*.jpg")}
    missing = [image.image_id for image in images if f"{image.image_id}.jpg" not in there]
    if missing:
        raise ValueError(f"{root / folder}: {len(missing):,} of {len(images):,} photos missing, "
                         f"first {missing[0]}.jpg; --download brings them ({folder}.zip)")
    (root / "JPEGImages").mkdir(exist_ok=True)
    linked = {path.name for path in (root / "JPEGImages").iterdir()}
    for image in images:
        photo = f"{image.image_id}.jpg"
        if photo not in linked:
            (root / "JPEGImages" / photo).symlink_to(Path("..", folder, photo))


def write_coco_masks(root: Path, images: list[CocoImage]):
    """SegmentationClass/<id>.png of all images, those left out that are there."""
    def write(image):
        path = root / "SegmentationClass" / f"{image.image_id}.png"
        if not path.is_file():
            try:
                write_label(path, coco_mask(image))
            except ValueError as e:
                raise ValueError(f"{path}: cannot be made: {e}") from None
    for_each(write, images, "masks")


def convert_coco_ids(folder: Path):
    """Label PNGs of COCO's category ids 0..90 -> <folder>_81/, the same with our class numbers.

    Stages read class numbers alone (--seeds, --masks): the two agree up to 11 and then differ by
    one and more, which no reader can see in a mask.
    """
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise ValueError(f"{folder}: no label PNGs")
    target = folder.with_name(f"{folder.name}_81")
    for_each(lambda path: write_label(target / path.name, read_coco_ids(path)), paths, "converting")
    print(f"{target}: {len(paths)} label PNGs with class numbers 0..80")


def read_coco_ids(path: Path, size: tuple | None = None) -> np.ndarray:
    """Label PNG of COCO's category ids 0..90 -> (H, W) uint8 of class numbers 0..80, 255 unsure."""
    return CLASS_OF_COCO_ID[read_label(path, len(COCO_SLOTS), size)]


# ================================================================================================
# III  Scores
# ================================================================================================

# The measure of the field is the mean intersection over union, mIoU. For one class k, take the
# pixels that are k in the truth and those that are k in the prediction:
#
#     IoU_k = |both| / |either|,    mIoU = mean of IoU_k over the classes, background among them
#
# All of it can be read off one table, the confusion matrix M, whose entry M[t, p] counts the
# pixels of true class t that were predicted as p. With 3 cat pixels found, 1 cat pixel missed and
# 2 background pixels called cat:
#
#                      background   cat   unsure
#     true background         94      2       0       cat: both = 3, either = 3 + 1 + 2 = 6,
#     true cat                 1      3       0            IoU = 50 percent
#
# Background counts as a class, and it is the easiest one: on VOC, a network that says nothing but
# "background" still has an IoU of over 70 percent there, and a mIoU of 3.5.

def confusion(truth: np.ndarray, prediction: np.ndarray, K: int) -> np.ndarray:
    """Pixel counts (K, K + 1): row = true class, column = predicted class, the last "unsure".

    truth, prediction (H, W) uint8. Pixels whose truth is 255 are not scored.
    """
    scored = truth != IGNORE                                             # (H, W) bool
    # "Unsure" (255) gets a column of its own. Were such pixels left out instead, a mask could
    # gain by answering only where it is certain; so an unsure pixel is a miss for its class.
    row = truth[scored].astype(np.int64)                                 # (n,)
    column = np.minimum(prediction[scored].astype(np.int64), K)          # (n,)
    # Each pair (row, column) is one number, and one count over all pixels is the whole matrix.
    counts = np.bincount(row * (K + 1) + column, minlength=K * (K + 1))
    return counts.reshape(K, K + 1)


def scores(matrix: np.ndarray) -> dict:
    """Confusion matrix of a whole dataset (K, K + 1) -> percentages.

    iou, false_positives, false_negatives: (K,) per class, over the pixels that are this class in
    the truth or in the prediction, so the three add to 100; NaN for a class without such pixels.
    miou: mean of iou over the classes that occur. pixel_accuracy: hits among all scored pixels.
    """
    # The matrix has K + 1 columns, its diagonal K entries: "unsure" is right for no class.
    hit = np.diag(matrix)                                                # (K,)
    true = matrix.sum(1)                                                 # (K,)
    predicted = matrix[:, :-1].sum(0)                                    # (K,) without "unsure"
    union = true + predicted - hit
    with np.errstate(invalid="ignore"):  # 0 / 0 of a class that does not occur is NaN, as said
        per_class = {"iou": 100 * hit / union,
                     "false_positives": 100 * (predicted - hit) / union,
                     "false_negatives": 100 * (true - hit) / union}
    # Pixel accuracy is dominated by background and large things; the mean over classes is not.
    accuracy = 100 * hit.sum() / matrix.sum() if matrix.any() else np.nan
    miou = np.nanmean(per_class["iou"]) if union.any() else np.nan
    return {"miou": float(miou), "pixel_accuracy": float(accuracy), **per_class}


def score_folder(data: Dataset, folder: Path, split: str, limit: int | None = None,
                 coco_ids: bool = False) -> dict | None:
    """Score the label PNGs in `folder` on the ids of `split` that have both a mask and a truth.

    coco_ids: the PNGs hold COCO's category ids and not class numbers.
    Returns {"split", "n", "of", "truth", and what `scores` gives}, or None where there is nothing
    to score. n of `of`: a good score on few images must be seen to be one.
    """
    # Images without a mask are left out and not held against the folder: a stage may be half
    # done, and "n of N" says so.
    K, ids = len(data.classes), data.ids(split, limit)
    both = [i for i in ids if label_path(folder, i).is_file() and data.truth_path(i)]
    if not both:
        return None

    image_labels = data.known_labels(both)
    # One matrix for the whole dataset, as VOC and the papers have it: pixels are counted over all
    # images first and divided once. A mean of per-image IoUs would be another number, in which a
    # class of ten pixels in one photo weighs as much as the same class filling another.
    matrix, lock = np.zeros((K, K + 1), np.int64), Lock()

    def count(image_id):
        truth = read_label(data.truth_path(image_id), K)
        path = label_path(folder, image_id)
        prediction = (read_coco_ids(path, truth.shape) if coco_ids else
                      read_label(path, K, truth.shape))
        counts = confusion(truth, prediction, K)
        with lock:  # summed at once: COCO's 80,000 matrices would be 4 GB
            np.add(matrix, counts, out=matrix)
        return data.truth_path(image_id), (image_id, set(np.flatnonzero(counts.any(1)).tolist()))
    held = dict(for_each(count, both, f"scoring {folder}"))
    compare_classes(data, held, image_labels, TOLERATED)
    if len(both) > 1 and matrix[:, K].any() and not matrix[:, 1:K].any():
        raise ValueError(f"{folder}: {len(both)} masks and no class in any, but {IGNORE}, which is "
                         "unsure; an object's pixels hold its class number, from 1 on")
    truths = sorted({path.parent.name for path in held})
    return {"split": split, "n": len(both), "of": len(ids), "truth": "+".join(truths),
            **scores(matrix)}


# ------------------------------------------------------------- provenance: how a mask came to be

# 77.2 says little until one knows of what: training images or val, one scale or six, before or
# after the CRF, with or without the image-level labels as a filter. So each stage keeps a record,
# args.json, in its folder, with two entries that are used here:
#
#     "options"      what the command line was: the list, the limit, the folders learned from
#     "provenance"   how the masks were made; written before the first mask, so none is without
#
# and every row of the table carries what the record says. A folder that another program filled
# has no record: its row says no more than what was counted.

# What a score must say beside its number; None where the masks' maker did not record it.
PROVENANCE = ("scales", "flip", "crf", "label_filter", "iters", "upper_bound")
# Stage: what happens in it, what it hands on, in which folder.
STAGES = {
    "1_cam": ("A classifier learns from class names alone; where it looks is the CAM.",
              "seeds", "seeds"),
    "2_weakclip": ("Small parts around the frozen CLIP learn from photos and seeds.",
                   "masks", "masks"),
    "3_segment": ("An ordinary network learns from photos and masks.", "prediction", "masks")}
# What happens in stage 1 with --method clip.
ASKS_CLIP = "CLIP is asked for a photo's classes; where its answer came from is the CAM."


# What a record may say, as far as it is read here, and the types it may have.
RECORD_TYPES = {
    "options": {"split": str, "limit": int, "seeds": str, "masks": str},
    "provenance": {"iters": int, "scales": list, "flip": bool, "crf": bool, "label_filter": bool}}


def learned_from(record: dict) -> list[str]:
    """Folders of the seeds or masks that a stage was trained on, by its record."""
    options = record.get("options", {})
    return [options[name] for name in ("seeds", "masks") if options.get(name)]


def is_upper_bound(record: dict) -> bool:
    """True if true masks were trained on, here or in the stage before.

    Masks lie two folders below their stage (2_weakclip/masks/train), and there is its args.json:
    so the way back from stage 3 to what stage 2 learned from is found without any register.
    """
    folders = learned_from(record)
    for folder in list(folders):
        folders += learned_from(read_args(Path(folder).parent.parent))
    return any("SegmentationClass" in folder for folder in folders)


def provenance(record: dict, masks: Path) -> dict:
    """{name: value} for the names in PROVENANCE: what a score of the folder `masks` must say."""
    facts = {name: record.get("provenance", {}).get(name) for name in PROVENANCE}
    # Image-level labels are given for training images alone, so val's masks are never filtered.
    of_training_images = masks.name in (record.get("options", {}).get("split"), "seeds")
    facts["label_filter"] = bool(facts["label_filter"]) and of_training_images
    facts["upper_bound"] = is_upper_bound(record)
    return facts


def label_folders(data: Dataset, folder: Path, record: dict) -> list[tuple[str, Path]]:
    """(list, folder of its label PNGs) for all that one stage has written."""
    training = record.get("options", {}).get("split")
    if folder.name == "1_cam":
        found = [(training, folder / "seeds")]
    else:
        found = [(masks.name, masks) for masks in sorted((folder / "masks").glob("*"))]
    if training == "trainaug" and data.has("train"):
        # Papers report VOC's own 1,464 training images, which are among trainaug's 10,582.
        found += [("train", masks) for split, masks in found if split == training]
    # Masks of a list that the dataset does not have are of another dataset, or of photos alone.
    return [(split, masks) for split, masks in found
            if split is not None and masks.is_dir() and data.has(split)]


def score_runs(data: Dataset, folder: Path) -> list[dict]:
    """Rows for all that the stages left in runs/<dataset>, and any <name>/masks/<split>/ there.

    A row is what `score_folder` gives, with "stage" and what `provenance` gives.
    """
    # Any method's masks can be put beside ours (runs/VOC2012/other/masks/val/) and are scored
    # by the same lines of code, which makes the comparison fair.
    others = {p.parent.relative_to(folder).as_posix() for p in folder.rglob("masks")}
    rows = []
    for stage in (*STAGES, *sorted(others - STAGES.keys())):
        record = read_args(folder / stage)
        limit = record.get("options", {}).get("limit")
        for split, masks in label_folders(data, folder / stage, record):
            row = score_folder(data, masks, split, limit)
            if row:
                rows.append({"stage": stage, **row, **provenance(record, masks)})
    return rows


def describe_provenance(row: dict) -> str:
    """Where the numbers of a row come from, in words."""
    crf = {True: "CRF", False: "no CRF", None: ""}[row["crf"]]
    facts = [
        f"{row['iters']} iterations" if row["iters"] else "",
        f"scales {row['scales']}" if row["scales"] else "",
        "flip" if row["flip"] else "",
        crf,
        "image-label filter" if row["label_filter"] else "",
        "trained on true masks: an upper bound" if row["upper_bound"] else "",
        f"truth {row['truth']}"]
    return ", ".join(fact for fact in facts if fact)


def print_rows(rows: list[dict]):
    """The table, a line a row: no number without where it comes from."""
    wide = max([12, *(len(row["stage"]) for row in rows)])
    print(f"{'stage':{wide}} {'split':9} {'images':>12} {'mIoU':>6} {'pixels':>7}  how")
    for row in rows:
        print(f"{row['stage']:{wide}} {row['split']:9} {row['n']:5} of {row['of']:4} "
              f"{row['miou']:6.1f} {row['pixel_accuracy']:6.1f}%  {describe_provenance(row)}")


def print_classes(classes: tuple[str, ...], iou: np.ndarray):
    """A line for every class that occurs, with its IoU in percent."""
    for name, value in zip(classes, iou):
        if not np.isnan(value):
            print(f"  {name:14} {value:5.1f}")


def write_metrics(data: Dataset, folder: Path, rows: list[dict]):
    """metrics.json (rows with provenance) and metrics.csv (a line per row and class)."""
    # Two formats: JSON for programs, with every fact; CSV for a spreadsheet, a number a cell.
    measures = ("iou", "false_positives", "false_negatives")
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["stage", "split", "class", *measures])
    named_rows = []
    for row in rows:
        for name, *values in zip(data.classes, *(row[measure] for measure in measures)):
            cells = ["" if np.isnan(value) else f"{value:.2f}" for value in values]
            table.writerow([row["stage"], row["split"], name, *cells])
        named = {measure: by_class(data.classes, row[measure]) for measure in measures}
        named_rows.append({**row, **named})
    write_json(folder / "metrics.json", {"rows": named_rows})
    write_text(folder / "metrics.csv", text.getvalue())


def by_class(classes: tuple[str, ...], values: np.ndarray) -> dict:
    """{class name: value, None for NaN}: JSON has no NaN."""
    return {name: None if np.isnan(value) else round(float(value), 3)
            for name, value in zip(classes, values)}


def submit(data: Dataset, folder: Path):
    """Stage 3's test masks -> the archive that the VOC server takes.

    Indexed PNGs under the path of its competition 6: segmentation, trained on any data.
    """
    masks, ids = folder / "3_segment" / "masks" / "test", data.ids("test")
    expected = PUBLISHED.get(data.name, {}).get("test", len(ids))
    if len(ids) != expected:
        raise ValueError(f"{data.list_path('test')}: {len(ids):,} ids; the server wants all "
                         f"{expected:,} of {data.name}'s test")
    check_inputs(data, ids, masks)

    # The server wants every image of the list, and says so only after the upload; check_inputs
    # has said it already.
    def pack(f):
        with tarfile.open(fileobj=f, mode="w:gz") as tar:
            for image_id in ids:
                inside = f"results/VOC2012/Segmentation/comp6_test_cls/{image_id}.png"
                tar.add(masks / f"{image_id}.png", inside)
    write_whole(folder / "submission.tar.gz", pack)
    print(f"{folder / 'submission.tar.gz'}: {len(ids)} masks")


# ================================================================================================
# IV  The report page
# ================================================================================================

# The page is put together from strings, a function for each piece of HTML, and a piece that has
# nothing to show is "". Whatever comes from outside (class names, ids, options) goes through
# `escape`, since a class may well be called "<light>".

# What a pixel of the last picture of a row can be, and in which colour it is shown.
WRONG = {"right": (150, 150, 150), "false positive or other class": (214, 47, 58),
         "missed or unsure": (43, 111, 214), "not scored": (225, 225, 225)}
BARS = ((217, 115, 26), (63, 127, 214), (27, 154, 170), (154, 98, 214), (214, 69, 80),
        (47, 158, 91))
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1e24; --soft: #5c6470; --line: #d9dde3;
  --panel: #eff2f5; --blue: #3f7fd6 }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181d; --ink: #e6e9ee; --soft: #9ba4b0; --line: #343a44; --panel: #21262e } }
* { box-sizing: border-box }
figure { margin: 0 }
img, svg { display: block; width: 100% }
img { border: 1px solid var(--line) }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1, h3 { margin: 1rem 0 .3rem }
h2 { margin: 2.5rem 0 .5rem }
p { margin: .3rem 0 }
nav a { color: var(--blue); display: inline-block; margin-right: 1rem }
small, figcaption, .key { color: var(--soft); font-size: .8rem }
.scroll, pre { overflow-x: auto; font-size: .9rem }
.flow { display: flex; gap: 1.6rem; list-style: none; padding: 0 }
.flow li { flex: 1; position: relative }
.flow .stage { flex: 1.3; padding: .6rem .8rem; background: var(--panel); border-radius: .5rem }
.flow li + li::before { content: "\\2192"; position: absolute; left: -1.6rem; top: 2rem;
  width: 1.6rem; text-align: center }
.pictures { display: grid; grid-template-columns: repeat(var(--n), minmax(0, 1fr)); gap: .4rem }
table { border-collapse: collapse }
th, td { padding: .3rem 1rem 0 0; text-align: left; white-space: nowrap }
.n { text-align: right }
.how { white-space: normal; border-bottom: 1px solid var(--line) }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .4rem 0 1.2rem }
.chip { display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem;
  border: 1px solid var(--line) }
.bars { columns: 16rem; column-gap: 2.5rem }
.bars > div { break-inside: avoid; padding-bottom: .6rem }
.bar { display: grid; grid-template-columns: 1fr 2.2rem; align-items: center; line-height: 1.3 }
.bar span { background: var(--panel) }
.bar i { display: block; height: .6rem }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr));
  gap: .5rem 1.5rem }
svg { fill: var(--soft); font-size: 11px }
path { stroke: var(--line) }
polygon { fill: var(--blue) }
polyline { fill: none; stroke: var(--blue); stroke-width: 1.5 }
@media (max-width: 48rem) {
  .flow { flex-direction: column }
  .flow li:not(.stage) { width: 60%; margin: 0 auto }
  .flow li + li::before { content: "\\2193"; left: 0; top: -1.6rem; width: 100% }
  .pictures { grid-template-columns: repeat(min(var(--n), 3), minmax(0, 1fr)) }
  th, td { padding-right: .4rem; font-size: .8rem } td:first-child { white-space: normal } }
"""
# The page is one file that needs no network: pictures and style stand in it.
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1><nav>{links}</nav>{sections}</body></html>
"""
CLIP_STORY = ("No classifier was trained: CLIP itself was asked. Its gradient shows which patches "
              "spoke for a class; around the strongest of them lie boxes; from inside the boxes, "
              "and only from there, the evidence spreads along CLIP's own attention to whatever "
              "belongs together; and a CRF draws the border, leaving what stays doubtful unsure.")
CURVE = """<figure><b>{name}</b> <small>last {last:.4g}</small><svg viewBox="0 0 320 136">{grid}
<text x="60" y="132">{start:.0f}</text>
<text x="312" y="132" text-anchor="end">iteration {end:.0f}</text>
<polygon points="{band}" opacity=".3"/><polyline points="{line}"/></svg></figure>
"""


def heat(cam: np.ndarray, size: tuple) -> np.ndarray:
    """CAM (h, w) in [0, 1] -> (H, W, 3) uint8 picture, blue over green to red; size: (H, W)."""
    cam = Image.fromarray(np.asarray(cam, np.float32)).resize(size[::-1], Image.BILINEAR)
    # Red, green and blue are tents over 0..1 that peak at 3/4, 2/4 and 1/4.
    ramp = [np.clip(1.5 - np.abs(4 * np.asarray(cam) - peak), 0, 1) for peak in (3, 2, 1)]
    return (255 * np.stack(ramp, 2)).astype(np.uint8)


def where_wrong(truth: np.ndarray, label: np.ndarray) -> np.ndarray:
    """True and predicted classes, both (H, W) -> place in WRONG, (H, W)."""
    conditions = [truth == IGNORE, label == truth, (label == 0) | (label == IGNORE)]
    return np.select(conditions, [3, 0, 2], default=1)


def label_file(folder: Path, stage: str, split: str, image_id: str) -> Path:
    """Where a stage writes the label PNG of an image."""
    masks = STAGES[stage][2]
    place = folder / stage / masks if masks == "seeds" else folder / stage / masks / split
    return label_path(place, image_id)


def cam_picture(data: Dataset, folder: Path, image_id: str, image: np.ndarray) -> dict:
    """{caption: (H, W, 3) uint8}: the CAM of an image's first class over the photo, if kept."""
    path = folder / "1_cam" / "cams" / f"{image_id}.npz"
    if not path.is_file():
        return {}
    cams = read_cams(path)
    keys = cams["keys"]
    if len(keys) == 0:
        return {}
    if keys[0] >= len(data.classes):
        raise ValueError(f"{path}: class number {keys[0]}, the dataset has 0 to "
                         f"{len(data.classes) - 1}")
    shown = image // 2 + heat(cams["cam"][0], image.shape[:2]) // 2
    return {f"CAM of {data.classes[keys[0]]}": shown}


def pictures(data: Dataset, folder: Path, split: str, image_id: str) -> dict:
    """{caption: picture} of a photo, what every stage made of it, the truth, where it is wrong.

    What does not exist is left out. A picture is (H, W, 3) uint8, or a LabelMap, or a pair: numbers
    (H, W) and the palette (n, 3) that colours them.
    """
    image = data.image(image_id)                                         # (H, W, 3)
    # In the order of the chain, so that a row reads from left to right as the method works.
    K, size = len(data.classes), image.shape[:2]
    shown = {"image": image, **cam_picture(data, folder, image_id, image)}
    last, label = None, None
    for stage, (_, name, _) in STAGES.items():
        path = label_file(folder, stage, split, image_id)
        if path.is_file():
            last, label = name, read_label(path, K, size)
            shown[name] = LabelMap(image, label)
    if data.truth_path(image_id):
        truth = read_label(data.truth_path(image_id), K, size)
        shown["truth"] = LabelMap(image, truth)
        if last:
            palette = np.array(list(WRONG.values()), np.uint8)
            shown[f"{last}: where wrong"] = where_wrong(truth, label), palette
    return shown


class LabelMap(NamedTuple):
    """A photo (H, W, 3) uint8 and the class numbers (H, W) of its pixels, to be shown together."""
    photo: np.ndarray
    label: np.ndarray


def overlay(photo: np.ndarray, label: np.ndarray, classes, side: int) -> np.ndarray:
    """The photo with its mask laid over it, rimmed in white, and the classes' names on it.

    photo (H, W, 3) uint8, label (H, W) class numbers. Returns (h, w, 3) uint8 whose longer side has
    `side` pixels. Background stays photo; unsure pixels are paled. A mask alone, in VOC's colours
    on black, hides its dark classes (sheep, bottle, cow) and shows nothing of what they should be.
    """
    scale = side / max(label.shape)
    width, height = [max(1, round(n * scale)) for n in label.shape[::-1]]
    photo = np.asarray(Image.fromarray(photo).resize((width, height), Image.BICUBIC))
    label = np.asarray(Image.fromarray(label).resize((width, height), Image.NEAREST))
    # Under a colour the photo is grey: red under blue would be violet, another class's colour.
    grey = photo.mean(2, keepdims=True)                                  # (h, w, 1)
    laid = label[:, :, None] > 0                                         # (h, w, 1)
    mixed = np.where(laid, grey / 2 + colour_map()[label] / 2, photo)    # (h, w, 3)
    # A pixel is on the rim if the one to the right or the one below is of another class.
    rim = np.zeros(label.shape, bool)
    rim[:, :-1] |= label[:, :-1] != label[:, 1:]
    rim[:-1] |= label[:-1] != label[1:]
    mixed[rim] = 255
    sheet = Image.fromarray(mixed.astype(np.uint8))
    boxes = []
    for k in np.unique(label[(label > 0) & (label != IGNORE)]):
        write_name(sheet, classes[k], colour_map()[k], np.argwhere(label == k), boxes)
    return np.asarray(sheet)


def write_name(sheet: Image.Image, name: str, colour, pixels: np.ndarray, boxes: list[tuple]):
    """Draw a name, with its colour under it, on a picture; in place.

    pixels: (n, 2) (row, column) of its class, amid which it stands; boxes: (left, top, right,
    bottom) of the names that are there already; this one's is added.
    """
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(max(10, max(sheet.size) // 18))
    # A long name has lines as wide as its pixels, as a third of the picture, or as its longest
    # word, but no line is wider than the picture. A tenth is left for what the letters differ.
    per_letter = font.getlength(name) / len(name) / 0.9
    letters = max(np.ptp(pixels[:, 1]), sheet.width / 3) / per_letter
    letters = min(max(letters, *map(len, name.split())), sheet.width / per_letter)
    name = textwrap.fill(name, max(1, int(letters)))
    style = {"font": font, "anchor": "mm", "align": "center", "stroke_width": 2}
    left, top, right, bottom = draw.textbbox((0, 0), name, **style)
    # The mean of a ring lies outside it, so the name goes to the ring's pixel nearest to there.
    distance = np.square(pixels - pixels.mean(0)).sum(1)
    row, column = pixels[distance.argmin()]
    # Kept inside the picture, as far as the name is not larger than that.
    x = min(max(column, -left), max(sheet.width - right, -left))
    # The nearest row where no other name is in the way; with none, over another name.
    rows = np.arange(-top, max(sheet.height - bottom, -top) + 1)
    free = np.ones(len(rows), bool)
    for other in boxes:
        if other[0] < x + right and x + left < other[2]:
            free &= (rows + bottom <= other[1]) | (other[3] <= rows + top)
    rows = rows[free] if free.any() else rows
    y = rows[np.abs(rows - row).argmin()]
    boxes.append((x + left, y + top, x + right, y + bottom))
    draw.text((x, y), name, (255, 255, 255), stroke_fill=0, **style)
    line = x + left, y + bottom, x + right, y + bottom
    draw.line(line, tuple(map(int, colour)), max(sheet.size) // 120)


def image_tag(picture, alt: str, classes=()) -> str:
    """<img> that holds its picture, made small: a photo as JPEG, numbers as PNG."""
    if isinstance(picture, LabelMap):
        picture = overlay(*picture, classes, 256)
    if isinstance(picture, tuple):
        numbers, palette = picture
        # Between two class numbers there is no number: neither shrinking nor coding may mix them.
        small, kind, resample = Image.fromarray(palette[numbers]), "png", Image.NEAREST
    else:
        small, kind, resample = Image.fromarray(picture), "jpeg", Image.BICUBIC
    small.thumbnail((256, 256), resample)
    coded = io.BytesIO()
    small.save(coded, kind.upper(), quality=85)
    text = base64.b64encode(coded.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{text}">'


def chip(name: str, colour) -> str:
    """A coloured square and a name -> HTML."""
    rgb = tuple(map(int, colour))
    return f'<span><i class="chip" style="background: rgb{rgb}"></i>{escape(name)}</span>'


def legend(colours: dict) -> str:
    """{name: (R, G, B)} -> HTML."""
    chips = "".join(chip(name, colour) for name, colour in colours.items())
    return f'<div class="key">{chips}</div>'


def has_output(folder: Path, split: str, image_id: str) -> bool:
    """True if any stage has written a label PNG of this image."""
    return any(label_file(folder, stage, split, image_id).is_file() for stage in STAGES)


def spread(items: list, n: int) -> list:
    """Up to n items, evenly spread over the list."""
    places = {k * len(items) // n: None for k in range(n)}  # a dict: in order, each once
    return [items[place] for place in places] if items else []


class Gallery:
    """Rows of pictures, each with its classes' colours, and what other sections need of them.

    classes: the dataset's; first: {caption: (<img> of the first picture with this caption, id)}.
    """

    def __init__(self, classes: tuple[str, ...]):
        self.classes, self.html, self.first = classes, "", {}

    def add_row(self, image_id: str, row: dict):
        """What `pictures` gives for an image, as one row."""
        figures, numbers = "", set()
        for caption, picture in row.items():
            image = image_tag(picture, f"{caption}, {image_id}", self.classes)
            self.first.setdefault(caption, (image, image_id))
            figures += f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
            if isinstance(picture, LabelMap):
                numbers.update(np.unique(picture.label))
        self.html += (f"<small>{escape(image_id)}</small>"
                      f'<div class="pictures" style="--n: {len(row)}">{figures}</div>')
        # Beside the row, since a legend at the end of the page is read by nobody.
        names = {**dict(enumerate(self.classes)), IGNORE: "unsure, or not scored"}
        self.html += legend({names[k]: colour_map()[k] for k in sorted(numbers - {0})})

    def add_wrong_legend(self):
        """What the colours of "where wrong" mean, if there is such a picture."""
        if any("where wrong" in caption for caption in self.first):
            self.html += f"<small>where wrong:</small>{legend(WRONG)}"


def make_gallery(data: Dataset, folder: Path, splits: list[str], n: int) -> Gallery:
    """n images of every list, spread over it, with all that became of them."""
    gallery = Gallery(data.classes)
    for split in splits:
        ids = [i for i in data.ids(split) if has_output(folder, split, i)]
        if ids:
            gallery.html += f"<h3>{escape(split)}</h3>"
        for image_id in spread(ids, n):
            gallery.add_row(image_id, pictures(data, folder, split, image_id))
    gallery.add_wrong_legend()
    return gallery


def clip_story(data: Dataset, folder: Path, split: str) -> str:
    """How one photo's seed came from CLIP alone, step by step -> HTML; "" for other seeds.

    The photo is the list's first of which the affinity took anything.
    """
    if not data.has(split):
        return ""
    for image_id in data.ids(split):
        path = folder / "1_cam" / "cams" / f"{image_id}.npz"
        if path.is_file():
            cams = read_cams(path)
            if "boxes" not in cams:
                return ""
            if cams["boxes"].any():
                gallery = Gallery(data.classes)
                gallery.add_row(image_id, clip_steps(data, folder, image_id, cams))
                return f"<p>{CLIP_STORY}</p>{gallery.html}"
    return ""


def clip_steps(data: Dataset, folder: Path, image_id: str, cams) -> dict:
    """{caption: picture} of one photo, for the first of its classes that has a box.

    cams: arrays of stage 1, "keys" (J,), "cam" (J, H/4, W/4), and on the grid of CLIP's
    patches "before" (J, h, w) and "boxes" (J, h, w) bool.
    """
    image = data.image(image_id)                                         # (H, W, 3)
    size, k = image.shape[:2], int(cams["boxes"].any((1, 2)).argmax())
    name = data.classes[cams["keys"][k]]
    # Each patch is a square of the photo; outside the boxes it is darkened.
    boxes = Image.fromarray(cams["boxes"][k]).resize(size[::-1], Image.NEAREST)
    inside = np.where(np.asarray(boxes)[:, :, None], image, image // 5)  # (H, W, 3)
    shown = {"image": image,
             f"what spoke for {name}": image // 2 + heat(cams["before"][k], size) // 2,
             "its boxes": inside,
             "after the affinity": image // 2 + heat(cams["cam"][k], size) // 2}
    path = label_file(folder, "1_cam", "", image_id)
    if path.is_file():
        shown["seed"] = LabelMap(image, read_label(path, len(data.classes), size))
    return shown


def handed_on(first: dict, name: str, files: str) -> str:
    """A list item: what one stage hands to the next, with a picture of it."""
    image, image_id = first.get(name, ("", None))
    # Stage 3 predicts no training images, so its picture is of another photo than the others.
    other = ", another photo" if image and image_id != first["image"][1] else ""
    return f"<li>{image}<b>{name}</b><br><small>{files}{other}</small></li>"


def stage_box(stage: str, record: dict) -> str:
    """A list item: a stage, what happens in it, how long it learned."""
    iters = record.get("provenance", {}).get("iters")
    length = f"{iters:,} iterations" if iters else ""
    asks_clip = record.get("options", {}).get("method") == "clip"
    text = ASKS_CLIP if asks_clip else STAGES[stage][0]
    return (f'<li class="stage"><b>{stage}</b><p>{text}</p>'
            f"<small>{length}</small></li>")


def flow(records: dict, first: dict) -> str:
    """The stages as boxes, and between them what one hands to the next -> HTML."""
    # A stage that has not run leaves no record, so it has no box: the page shows what there is.
    items = handed_on(first, "image", "JPEGImages, class names")
    for stage, record in records.items():
        _, name, masks = STAGES[stage]
        items += stage_box(stage, record) + handed_on(first, name, f"{stage}/{masks}")
    return f'<ol class="flow">{items}</ol>'


def score_table(rows: list[dict]) -> str:
    """What print_rows prints -> HTML."""
    lines = '<tr><th>stage<th>split<th class="n">images<th class="n">mIoU<th class="n">pixels'
    for row in rows:
        lines += f"<tr><td>{escape(row['stage'])}<td>{escape(row['split'])}"
        lines += f'<td class="n">{row["n"]} of {row["of"]}'
        lines += f'<td class="n">{row["miou"]:.1f}<td class="n">{row["pixel_accuracy"]:.1f}%'
        how = escape(describe_provenance(row))
        lines += f'<tr><td class="how" colspan="5"><small>{how}</small>'
    return f'<div class="scroll"><table>{lines}</table></div>'


def bar(value: float, colour: tuple) -> str:
    """An IoU in percent (NaN: none) as a bar -> HTML."""
    number = "-" if np.isnan(value) else f"{value:.1f}"
    width = np.nan_to_num(value)
    return (f'<div class="bar"><span><i style="width: {width:.1f}%; background: rgb{colour}"></i>'
            f'</span><small class="n">{number}</small></div>')


def class_bars(classes: tuple[str, ...], rows: list[dict]) -> str:
    """A block for every class that occurs, in it a bar of its IoU for every row -> HTML."""
    colours = [BARS[k % len(BARS)] for k in range(len(rows))]
    blocks = ""
    # A class that no row has (NaN in all) gets no block; one that a row lacks gets a "-".
    for k, (name, class_colour) in enumerate(zip(classes, colour_map())):
        values = [row["iou"][k] for row in rows]
        if not np.isnan(values).all():
            bars = "".join(bar(value, colour) for value, colour in zip(values, colours))
            blocks += f"<div>{chip(name, class_colour)}{bars}</div>"
    names = [f"{row['stage']} {row['split']}" for row in rows]
    return ("<p>IoU in percent, a bar for each row of the scores, in their order; "
            f"- where there is none.</p>{legend(dict(zip(names, colours)))}"
            f'<div class="bars">{blocks}</div>')


def curve(name: str, log: np.ndarray) -> str:
    """A loss, (n, 2) of step and value -> SVG.

    The mean of up to 150 stretches is the line, their range the band: a mean alone would hide
    how far single batches lie from it.
    """
    (start, low), (end, high) = log.min(0), log.max(0)
    width, height = (end - start) or 1, (high - low) or 1  # a curve may be one point, or level

    def points(steps, values):
        """Steps and values -> "x,y x,y ..." in a frame of 252 x 106 pixels."""
        x = 60 + 252 * (steps - start) / width
        y = 116 - 106 * (values - low) / height
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))

    stretches = np.array_split(log, min(len(log), 150))
    steps, mean = np.array([stretch.mean(0) for stretch in stretches]).T
    under = np.array([stretch[:, 1].min() for stretch in stretches])
    over = np.array([stretch[:, 1].max() for stretch in stretches])
    band = points(np.r_[steps, steps[::-1]], np.r_[under, over[::-1]])
    grid = ""
    for y, value in ((10, high), (63, (low + high) / 2), (116, low)):
        grid += f'<path d="M60 {y}h252"/>'
        grid += f'<text x="54" y="{y + 4}" text-anchor="end">{value:.3g}</text>'
    return CURVE.format(name=escape(name), last=log[-1, 1], grid=grid, start=start, end=end,
                        band=band, line=points(steps, mean))


def curves(path: Path) -> str:
    """log.jsonl -> a curve for every loss by its name; "" where there is no log."""
    values = {}
    for line in read_log(path):
        for name in line:
            if name.startswith("loss"):
                values.setdefault(name, []).append((line["step"], line[name]))
    if len(values) == 2:
        values.pop("loss", None)  # "loss" is the sum, here of one
    return "".join(curve(name, np.array(log)) for name, log in values.items())


def curve_blocks(folder: Path, stages) -> str:
    """The losses of all stages that left a log -> HTML."""
    blocks = ""
    for stage in stages:
        found = curves(folder / stage / "log.jsonl")
        if found:
            blocks += f'<h3>{stage}</h3><div class="curves">{found}</div>'
    return blocks


def option_blocks(records: dict) -> str:
    """The record of every stage, folded -> HTML."""
    blocks = ""
    for stage, record in records.items():
        text = escape(json.dumps(record, indent=1))
        blocks += f"<details><summary>{stage}</summary><pre>{text}</pre></details>"
    return blocks


def shown_splits(data: Dataset, folder: Path, records: dict) -> list[str]:
    """The lists whose images have outputs: training lists first, each once."""
    splits = [record["options"]["split"] for record in records.values()]
    for stage in records:
        splits += [masks.name for masks in sorted((folder / stage / "masks").glob("*"))]
    return [split for split in dict.fromkeys(splits) if data.has(split)]


def write_report(data: Dataset, folder: Path, rows: list[dict], n: int = 6):
    """report.html: stages, scores, n pictures a list, classes, losses and options on one page."""
    found = {stage: read_args(folder / stage) for stage in STAGES}
    records = {stage: record for stage, record in found.items() if record}
    if not records:
        return
    # The gallery is made first, although it is shown third: the figure of the stages above it
    # borrows its pictures, and a picture is coded only once.
    gallery = make_gallery(data, folder, shown_splits(data, folder, records), n)
    sections = {
        "Stages": flow(records, gallery.first),
        "Scores": score_table(rows) if rows else "",
        "Seeds": clip_story(data, folder, found["1_cam"].get("options", {}).get("split", "")),
        "Pictures": gallery.html,
        "Classes": class_bars(data.classes, rows) if rows else "",
        "Losses": curve_blocks(folder, records),
        "Options": option_blocks(records)}
    links, body = "", ""
    for name, content in sections.items():
        if content:
            links += f'<a href="#{name}">{name}</a>'
            body += f'<section id="{name}"><h2>{name}</h2>{content}</section>'
    title = escape(f"WeakCLIP on {data.name}")
    page = PAGE.format(title=title, style=STYLE, links=links, sections=body)
    write_text(folder / "report.html", page)


# ================================================================================================
# V  Command line
# ================================================================================================

def check_dataset(data: Dataset):
    """Print what is in a dataset, list by list. Raises ValueError at the first fault.

    VOC2012 and COCO2014 are held against the published counts before a file is opened.
    """
    print(f"{data.root}: {len(data.classes)} classes with background")
    if data.name in PUBLISHED:
        check_published(data)
    if not data.has(data.training_split()):
        data.ids(data.training_split())  # says which lists there are
    for path in data.lists():
        split, ids = path.stem, data.ids(path.stem)
        # Only training images need labels: val is what the method has never been told about.
        training = split.startswith("train")
        image_labels = data.image_labels(ids) if training else data.known_labels(ids)
        check_inputs(data, ids, image_labels=image_labels)
        with_truth = sum(data.truth_path(image_id) is not None for image_id in ids)
        line = f"{split:9} {len(ids):6} images, {with_truth} true masks"
        if training:
            mean = np.mean([len(numbers) for numbers in image_labels.values()])
            line += f", {mean:.2f} classes an image"
        print(line)
    note_leaks(data, data.training_split())


def score_masks(data: Dataset, folder: Path, split: str, coco_ids: bool):
    """Print the scores of any folder of label PNGs. Raises ValueError where none can be scored."""
    row = score_folder(data, folder, split, coco_ids=coco_ids)
    if row is None:
        raise ValueError(f"{folder}: no PNG of {data.list_path(split)} that also has a true mask")
    print_rows([{"stage": folder.name, **row, **dict.fromkeys(PROVENANCE)}])
    print_classes(data.classes, row["iou"])


def score_all(data: Dataset, folder: Path):
    """Score, print and report all that is found in runs/<dataset>."""
    rows = score_runs(data, folder)
    write_report(data, folder, rows)  # before any refusal: its pictures need no truth
    if not rows:
        report = folder / "report.html"
        mend = f"python stage1_cam.py --data {data.root} makes seeds"
        if report.is_file():
            mend = f"{report} shows what is there"
        raise ValueError(f"{folder}: no masks with a truth to score; {mend}, "
                         f"{data.root}/SegmentationClass holds true masks")
    print_rows(rows)
    write_metrics(data, folder, rows)
    written = [str(folder / name) for name in ("metrics.json", "metrics.csv", "report.html")]
    print(f"written: {', '.join(written)}")


def parse_args(argv=None):
    """The options; see --help."""
    p = Parser(description=__doc__.splitlines()[0])
    p.add_argument("--data", required=True, metavar="NAME|DIR",
                   help="dataset folder in VOC's layout (README, Data)")
    p.add_argument("--runs", type=Path, default=Path("runs"),
                   help="where the stages write [%(default)s]")
    p.add_argument("--masks", type=Path,
                   help="score this folder of label PNGs instead of runs/<dataset>")
    p.add_argument("--split", default="val", help="list to score --masks on [%(default)s]")
    p.add_argument("--ids", type=int, choices=[91],
                   help="91: --masks holds COCO's category ids 0..90, as masks of other projects "
                        "do, and not class numbers 0..80; with --prepare, write them to DIR_81 "
                        "as class numbers")
    p.add_argument("--check", action="store_true",
                   help="look at every file of the dataset and stop; VOC2012 and COCO2014 are "
                        "also held against the published counts")
    p.add_argument("--download", action="store_true",
                   help="bring what is missing of VOC2012 or COCO2014 and stop")
    p.add_argument("--prepare", action="store_true",
                   help="bring COCO 2014's own files into VOC's layout and stop")
    p.add_argument("--submit", action="store_true",
                   help="pack stage 3's masks of test for the VOC server and stop")
    return p.parse_args(argv)


def main():
    """What the options ask for; without any, everything in runs/<dataset> is scored and shown."""
    args = parse_args()
    if args.ids and not args.masks:
        raise ValueError("--ids 91 says what numbers --masks DIR holds; name that folder")
    if args.download:
        download(args.data)
    if args.prepare and args.ids:
        convert_coco_ids(args.masks)
    elif args.prepare:
        prepare(args.data)
    if args.download or args.prepare:
        return
    data = find_dataset(args.data)
    folder = args.runs / data.name
    if args.ids and data.classes != COCO_CLASSES:
        raise ValueError(f"--ids 91: {data.root} has not COCO's 81 classes")
    if args.check:
        check_dataset(data)
    elif args.submit:
        submit(data, folder)
    elif args.masks:
        score_masks(data, args.masks, args.split, args.ids == 91)
    else:
        score_all(data, folder)


if __name__ == "__main__":
    run(main)
