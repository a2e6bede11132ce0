"""What the stages are given and how they are judged: the dataset folder, label PNGs, scores.

run     python eval.py --data VOC2012                       # everything found in runs/VOC2012
        python eval.py --data VOC2012 --masks DIR --split val   # any folder of label PNGs
        python eval.py --data VOC2012 --check               # is the dataset complete and sound?
        python eval.py --data VOC2012 --download            # VOC 2012 and SBD's list, from nothing
        python eval.py --data COCO2014 --prepare            # COCO 2014, from its own files
reads   VOC2012/SegmentationClass/<id>.png (true masks)
        runs/VOC2012/{1_cam/seeds,**/masks/<split>}/<id>.png
writes  runs/VOC2012/{metrics.json, report.html}

In this order: the dataset folder and what is read from it, the record of a run, how VOC 2012 and
COCO 2014 come into the folder, scores, the report page, the command line. Whoever looks for the
mIoU reads `confusion` and `scores` alone. Every stage imports the first two parts, so that photos,
lists and labels are read, and refused, in one way everywhere; stage 2 draws by `overlay` too. What
cannot be meant is refused in one line that names the file and the mend; nothing is guessed or
repaired. No neural network stands here, and torch is imported for --download alone. Numbers in
brackets, such as (32), are rows of AUDIT.md.
"""
import argparse
import base64
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

# "Unsure". In true masks (VOC's border around objects) it is not scored; in a predicted mask it is
# a miss; in seeds it is skipped by the seeding and the score loss, not by the boundary loss.
IGNORE = 255
VOC_CLASSES = tuple("""
    background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse
    motorbike person pottedplant sheep sofa train tvmonitor""".split())
# COCO numbers its categories 1 to 90 and leaves ten of the numbers unused. The released code has
# an output for each of the 91 slots; our COCO has the 81 names that occur, without gaps (32).
COCO_SLOTS = tuple(re.split(r",\s+", """
    background, person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, street sign, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow,
    elephant, bear, zebra, giraffe, hat, backpack, umbrella, shoe, eye glasses, handbag, tie,
    suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove,
    skateboard, surfboard, tennis racket, bottle, plate, wine glass, cup, fork, knife, spoon, bowl,
    banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch,
    potted plant, bed, mirror, dining table, window, desk, toilet, door, tv, laptop, mouse, remote,
    keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, blender, book, clock, vase,
    scissors, teddy bear, hair drier, toothbrush""".strip()))
COCO_UNUSED = "street sign, hat, shoe, eye glasses, plate, mirror, window, desk, door, blender"
# AUDIT.md: (32d).
COCO_CLASSES = tuple(name for name in COCO_SLOTS if name not in COCO_UNUSED.split(", "))


# =========================================================================== the dataset folder
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

PHOTO_ENDINGS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")


@dataclass
class Dataset:
    """A folder in VOC's layout: photos, lists of ids, image-level labels, perhaps true masks.

    classes: names, background first. A class number is a place in this tuple, everywhere: in
    classes.txt (line 1 is number 0), in label PNGs, in CAM files and in a network's outputs.
    texts: class name -> words for it that stage 1's CLIP reads, where classes.txt gives some.
    """
    root: Path
    name: str
    classes: tuple
    texts: dict

    def list_path(self, split):
        """Where the list `split` is, or would be. Raises ValueError for what is no name."""
        # The name becomes a folder of masks as well; a path would lead out of its place.
        if not is_name(split):
            raise ValueError(f"{split!r}: the bare name of a list in {self.root}/ImageSets/"
                             "Segmentation is expected")
        return self.root / f"ImageSets/Segmentation/{split}.txt"

    def has(self, split):
        """True if there is such a list."""
        return self.list_path(split).is_file()

    def splits(self):
        """The names of all lists."""
        folder = self.root / "ImageSets/Segmentation"
        return sorted(path.stem for path in folder.glob("*.txt") if is_name(path.stem))

    def training_split(self):
        """trainaug where that list exists, else train."""
        return "trainaug" if self.has("trainaug") else "train"

    def ids(self, split, limit=None):
        """Image ids of a list, in its order, the first `limit` of them. Raises ValueError."""
        if not self.has(split):
            raise ValueError(f"{self.list_path(split)}: no such list; make it, one id a line")
        return read_list(self.list_path(split))[:limit]

    def image_path(self, image_id):
        """The photo of an id; ValueError where there is none, or more than one."""
        path = find_file(self.root / "JPEGImages", image_id, PHOTO_ENDINGS)
        if not path.is_file():
            raise ValueError(f"{path}: no such image (nor .jpeg, .png); add it")
        return path

    def image(self, image_id):
        """The photo of an id, (H, W, 3) uint8 RGB."""
        return read_image(self.image_path(image_id))

    def truth_path(self, image_id):
        """The true mask of an image, or None; SegmentationClassAug where VOC's own is missing.

        AUDIT.md: (90).
        """
        for folder in ("SegmentationClass", "SegmentationClassAug"):
            path = find_file(self.root / folder, image_id)
            if path.is_file():
                return path
        return None

    def known_labels(self, ids):
        """{id: sorted class numbers from 1} for those of `ids` that have image-level labels.

        They come from image_labels.txt or else from Annotations/*.xml, never from masks: those
        would tell more than image-level labels do. Raises ValueError for a name that is no class.
        """
        path = self.root / "image_labels.txt"
        if path.is_file():
            names = read_image_labels(path)
        else:
            files = {i: self.root / f"Annotations/{i}.xml" for i in ids}
            names = {i: annotated_objects(file) for i, file in files.items() if file.is_file()}
        labels = {}
        for image_id in ids:
            if image_id in names:
                # A photo with nothing in it may say so: background is no label, and adds none.
                found = {name for name in names[image_id] if undecorated(name) != "background"}
                strangers = found.difference(self.classes)
                if strangers:
                    raise ValueError(f"{path if path.is_file() else files[image_id]}: {image_id}: "
                                     f"{min(strangers)!r} is none of {', '.join(self.classes[1:])}")
                # Names, not numbers, stand in labels: a name cannot be off by one.
                labels[image_id] = sorted(map(self.classes.index, found))
        return labels

    def image_labels(self, ids):
        """{id: sorted class numbers from 1} of all ids; ValueError where one has no labels.

        AUDIT.md: (91).
        """
        labels = self.known_labels(ids)
        missing = [image_id for image_id in ids if image_id not in labels]
        if missing:
            raise ValueError(f"{self.root}/image_labels.txt: {len(missing)} ids have no line; add "
                             f"`{missing[0]} name, name` and so on, or Annotations/<id>.xml")
        return labels

    def digests(self, *splits, **texts):
        """{name: sha256} of lists, classes and further texts: they tell datasets apart."""
        for split in splits:
            texts[split] = "\n".join(self.ids(split))
        texts["classes"] = "\n".join(self.classes)
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def dataset_name(name):
    """Last part of `--data`: names the run's folder and picks COCO's recipe.

    A link keeps its own name, so a folder of any name can be given COCO's recipe.
    """
    return Path(os.path.abspath(name)).name


def find_dataset(name):
    """`--data`, a folder or a name -> Dataset.

    Raises ValueError where there is none, and for a classes.txt that is no list of names.
    """
    places = [Path(place, name) for place in ("", "data", "data/VOCdevkit")]
    found = [place for place in places if (place / "JPEGImages").is_dir()]
    if not found:
        raise ValueError(f"--data {name}: no folder with JPEGImages/ here, in data/ or in "
                         "data/VOCdevkit/; eval.py --data VOC2012 --download brings VOC")
    root = found[0]
    name = dataset_name(root)
    path = root / "classes.txt"
    if path.is_file():
        return Dataset(root, name, *read_classes(path))
    # Without names, number 1 would be VOC's aeroplane, whatever another dataset means by it.
    if not name.lower().startswith("voc"):
        raise ValueError(f"{path}: no such file, and only a folder VOC... does without; write it, "
                         "a name a line, background first")
    return Dataset(root, name, VOC_CLASSES, {})


def for_each(function, items, text):
    """[function(item) for item in items], in threads; from 1 s on with a progress bar, `text`.

    Threads serve because decoding an image frees Python's lock.
    """
    return thread_map(function, items, max_workers=os.cpu_count(), desc=text, leave=False,
                      delay=1)  # results in the order of items, whichever ends first


# ------------------------------------------------------------------------ names, lists, labels

def is_name(text):
    """True for what can name files: no folder, no hidden file, no white space, not long."""
    return text.isprintable() and not re.search(r"[/\\ ]|^\.|^$|.{201}", text)


def find_file(folder, image_id, endings=(".png", ".PNG")):
    """The file of an id in a folder, or, with the first of the endings, where it would be.

    Without `endings` that of a label PNG. Raises ValueError where two files could be meant.
    """
    paths = [folder / (image_id + ending) for ending in endings]
    found = [path for path in paths if path.is_file()]
    # Where the file system ignores case, x.jpg and x.JPG are one file.
    if len(found) > 1 and not found[0].samefile(found[1]):
        raise ValueError(f"{found[0]}: {found[1].name} is beside it; remove one")
    return found[0] if found else paths[0]


def read_lines(path):
    """Text in UTF-8, with or without a byte order mark -> [(line number, line)], none empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; save it as UTF-8") from None
    lines = enumerate(map(str.strip, text.splitlines()), start=1)
    return [(number, line) for number, line in lines if line]


def read_list(path):
    """A list of images -> ids, in its order.

    One id a line, or a photo's path first in the line, as in the pairs of other repositories.
    Raises ValueError for an odd id, one that stands twice, and an empty list.
    """
    ids = {}
    for number, line in read_lines(path):
        # Of a photo's path its name without the ending is left.
        image_id = re.sub(r"(?i)^(?:\S*[/\\])?([^\s/\\]+)\.(?:jpe?g|png)(?:\s.*)?$", r"\1", line)
        # Twice in a list, an epoch would show it twice, and a mean would count it twice.
        if not is_name(image_id) or image_id in ids:
            fault = "stands twice" if image_id in ids else "is no image id (white space, a folder?)"
            raise ValueError(f"{path}: line {number}: {line[:80]!r} {fault}; one id a line, once")
        ids[image_id] = number
    if not ids:
        raise ValueError(f"{path}: the list is empty")
    return list(ids)


def read_image_labels(path):
    """image_labels.txt, lines `<id> name, name` -> {id: names}; an id alone has none.

    Raises ValueError for what is no id: nothing would find its labels, and nothing be compared.
    """
    labels = {}
    for number, line in read_lines(path):
        image_id = line.split()[0]
        if not is_name(image_id) or image_id.lower().endswith((*PHOTO_ENDINGS, ",", ";", ":")):
            raise ValueError(f"{path}: line {number}: {image_id!r} is no id; wanted: id name, name")
        names = map(str.strip, line[len(image_id):].split(","))
        labels.setdefault(image_id, []).extend(filter(None, names))  # an empty one is no name
    return labels


def annotated_objects(path):
    """Names of all objects in a VOC annotation; difficult ones count, they are in the photo.

    Parts of an object (head, hand) have names as well; they stand one level deeper.
    """
    try:
        objects = ElementTree.parse(path).findall("object")
    except (ElementTree.ParseError, LookupError, ValueError):
        raise ValueError(f"{path}: not readable; save it as XML in UTF-8") from None
    return [found.findtext("name", "").strip() for found in objects]


# A thing that people know is no background, even where a dataset calls that by a name of its own.
NO_BACKGROUND = {"ignore", "void", *VOC_CLASSES[1:], *COCO_SLOTS[1:]}


def undecorated(name):
    """A class's name as plain as it can be: `_background_`, which is labelme's, is background."""
    return name.strip("_ ").lower()


def read_classes(path):
    """classes.txt -> class names, and the texts of those that have one: `name: synonym, synonym`.

    The first line is number 0, the background. The file's order is all that ties a number in a
    label PNG to a name. A line too many before the others (labelme writes `__ignore__` there) puts
    every name off by one, and nothing but a look at the masks would show it. Raises ValueError,
    naming the line.
    """
    names, texts = [], {}
    for number, line in read_lines(path):
        name, _, text = map(str.strip, line.partition(":"))
        fault = ""
        # In the first line a thing is out of place, in all others the background is.
        misplaced = {"background"} if names else NO_BACKGROUND
        if undecorated(name) in misplaced:
            fault = "stands where background is expected: in the first line, and there alone"
        elif name.lower() in map(str.lower, names):
            fault = "stands twice; different class names are expected"
        elif not re.fullmatch(r"[^\W\d][^,;|#]*|\d+[^\W\d_][^,;|#]*", name):
            fault = "is no name; one a line is expected, without number, comma or semicolon"
        # What stands behind a name is words, which stage 1 puts into a sentence for CLIP; CVAT's
        # `cat:128,0,0::` has a colour there.
        elif not re.fullmatch(r"(?:[^\W\d_][^:#,()\[\]{}]*(?:,\s*|$))*" if names else "", text):
            fault = f"has {text[:40]!r} behind it; synonyms, as words, may stand behind a class"
        if fault:
            raise ValueError(f"{path}: line {number}: {name[:80]!r} {fault}")
        names.append(name)
        if text:
            texts[name] = text
    if not 2 <= len(names) <= IGNORE:
        raise ValueError(f"{path}: {len(names)} names; 2 to {IGNORE} are expected, one a line")
    if undecorated(names[0]) != "background":
        note(f"{path}: line 1: {names[0]!r} is the background, number 0")
    return ("background", *names[1:]), texts


# -------------------------------------------------------------------------- photos, label PNGs

def decode(path, formats):
    """A picture as displayed: turned as its EXIF says. Raises ValueError for no such picture.

    Cameras store a photo as the sensor saw it, with a note how to turn it. The turn is applied
    here, so that a mask fits what people see. A file's first bytes say what it is, not its name.
    """
    content = path.read_bytes()
    try:
        picture = Image.open(io.BytesIO(content), formats=formats)
        ImageOps.exif_transpose(picture, in_place=True)
        picture.load()
    except Exception:  # a damaged file makes decoders raise nearly anything
        raise ValueError(f"{path}: not a readable {' or '.join(formats)} file (cut off, damaged, "
                         "of another kind, or over 178 million pixels); save it anew") from None
    return picture


def read_image(path):
    """Photo -> (H, W, 3) uint8 RGB as displayed. Raises ValueError for a broken or 16-bit grey one.

    AUDIT.md: (103), (E22).
    """
    picture = decode(path, ("JPEG", "PNG"))
    if picture.mode[0] in "IF":
        raise ValueError(f"{path}: more than 8 bits a value; save it with 8")
    return np.array(picture.convert("RGB"))


@cache
def colour_map():
    """VOC's palette, (256, 3) uint8: the colour of every class number.

    The bits of a number, three at a time from the lowest up, fill red, green and blue from the
    top bit down. So 5 (bottle), 101 in binary, has bit 0 in red and bit 2 in blue: (128, 0, 128).
    Near numbers get far colours, and nobody has to keep a table.
    """
    number = np.arange(256, dtype=np.uint8)[:, None]                     # (256, 1)
    # From the lowest bit up; a ninth, 0, makes them three times three.
    bits = np.unpackbits(number, axis=1, count=9, bitorder="little")     # (256, 9)
    return np.packbits(bits.reshape(256, 3, 3), axis=1)[:, 0]            # (256, 3)


def read_label(path, classes=256, size=None):
    """Label PNG -> (H, W) uint8 of class numbers, 255 = unsure.

    classes: numbers from `classes` to 254 are refused; size: (H, W) that is expected. An indexed
    PNG's numbers are read, at any bit depth, and grey ones of 8 bits. Raises ValueError.
    """
    picture = decode(path, ("PNG",))
    # Byte 24 of a PNG is its bit depth; Pillow spreads grey values of fewer bits over 0..255.
    if picture.mode != "P" and (picture.mode != "L" or path.read_bytes()[24] != 8):
        raise ValueError(f"{path}: mode {picture.mode}; a label PNG is indexed (P), or grey (L) "
                         "with 8 bits, and holds class numbers")
    label = np.array(picture)
    used = np.unique(label)
    # A number that no class has is never "close enough": it shows that the mask was made for
    # another list of classes, and then its other numbers are wrong as well.
    unknown = used[(used >= classes) & (used != IGNORE)]
    if unknown.size:
        raise ValueError(f"{path}: class number {unknown.max()}, the dataset has "
                         f"0..{classes - 1} and {IGNORE}")
    # A picture of VOC's colours that was reduced to a palette has them in any order, and its
    # numbers are places in that. Colours other than VOC's say nothing.
    palette = picture.getpalette() or []                                      # grey has none
    if len(palette) // 3 > used.max():
        colours = np.array(palette, np.uint8).reshape(-1, 3)[used]            # (n, 3)
        same = (colours[:, None] == colour_map()).all(2)                      # (n, 256)
        meant = same.argmax(1)                                                # (n,) VOC's numbers
        if same.any(1).all() and (meant != used).any():
            raise ValueError(f"{path}: VOC's colours in another order, whose numbers are no "
                             "classes; save class numbers")
    if size not in (None, label.shape):
        raise ValueError(f"{path}: {label.shape[1]}x{label.shape[0]} pixels, its image has "
                         f"{size[1]}x{size[0]} as displayed (after an EXIF turn); cut them alike")
    return label


def write_label(path, label):
    """(H, W) class numbers -> palette PNG in VOC's colours.

    AUDIT.md: (92), (95).
    """
    # Indexed, not grey: the file holds the same numbers, and people see classes as colours.
    picture = Image.fromarray(np.uint8(label), mode="P")
    picture.putpalette(colour_map().tobytes())
    write_whole(path, lambda f: picture.save(f, "PNG"))


def files_digest(paths):
    """sha256 over photos or label PNGs: tells whether they are still those of before."""
    found = for_each(lambda path: hashlib.sha256(path.read_bytes()).digest(), paths, "digests")
    return hashlib.sha256(b"".join(found)).hexdigest()


# ---------------------------------------------------------------- checks before the work starts

# The share of true masks that may hold a class which the image-level labels lack. The two were
# made by different people, who may differ on a photo in a thousand; a wrong numbering shows in
# nearly every one.
TOLERATED = 0.01


def check_inputs(data, ids, label_folder=None, image_labels=None, tolerated=TOLERATED):
    """Decode every photo and its label PNG, and compare its classes; returns how many PNGs.

    label_folder: of seeds or masks, one for each id. image_labels: {id: class numbers}, of all
    or some ids; with them alone, the true masks are compared where there are any. tolerated:
    share of label PNGs that may hold a class which their image does not have. Raises ValueError.

    Stages call this before they build a network: a broken file would else be met at a random
    iteration, hours into a run, and a wrong class number never.
    """
    if label_folder is not None:
        pngs = {image_id: find_file(label_folder, image_id) for image_id in ids}
        missing = [path for path in pngs.values() if not path.is_file()]
        if missing:
            raise ValueError(f"{missing[0]} and {len(missing) - 1} more are missing; run the stage "
                             "before on the same list")
    else:
        pngs = {i: data.truth_path(i) for i in ids if image_labels is not None}

    # A mask of another size cannot be laid over its photo, and resizing it in silence would hide
    # that one of the two was cropped or turned.
    def check(image_id):
        size = data.image(image_id).shape[:2]
        path = pngs.get(image_id)
        return path and set(np.unique(read_label(path, len(data.classes), size)))
    checked = zip(ids, for_each(check, ids, "checking inputs"))
    held = {pngs[image_id]: numbers for image_id, numbers in checked if numbers}
    compare_classes(data, held, image_labels or {}, tolerated)
    return len(held)


def compare_classes(data, held, image_labels, tolerated):
    """The numbers in label PNGs against image-level labels. Raises ValueError where they differ.

    held: {path of a PNG: set of the numbers in it}; image_labels: {id: class numbers}. A number
    in a PNG is trusted by all that comes after, and another tool's numbering looks like ours: that
    the classes are those of the photo is all that can tell. A PNG may lack a class (seeds do, and
    true masks lack some of the objects that VOC calls difficult); it may not have one that the
    photo does not.
    """
    # Where labels are unknown, the photo may show any class.
    every = range(1, len(data.classes))
    shown = {path: image_labels.get(path.stem, every) for path in held}
    # One mask of 0 and 255 is nothing odd, VOC has some; a whole folder of them is.
    expected = [path for path in held if shown[path]]
    if len(expected) > 1 and set().union(*held.values()) <= {0, IGNORE}:
        raise ValueError(f"{expected[0].parent}: {len(held)} label PNGs and no class in any; "
                         f"{IGNORE} is unsure here, an object's pixels hold its class number")
    extra = {path: numbers.difference(shown[path], {0, IGNORE}) for path, numbers in held.items()}
    wrong = [path for path in held if extra[path]]
    if not wrong:
        return
    first = wrong[0]
    number = min(extra[first])
    names = [data.classes[k] for k in shown[first]]
    told = (f"{first}: number {number} is {data.classes[number]}, and the labels of the image say "
            f"{', '.join(names) or 'no class'}; so in {len(wrong)} of {len(held)}")
    if len(wrong) > tolerated * len(held):
        raise ValueError(f"{told}; number them as in classes.txt, or mend that or the labels")
    note(told)


def note_leaks(data, split):
    """Say how many images of the lists that scores are made on stand in the training list too."""
    for judged in filter(data.has, ("val", "test")):
        leaked = sorted(set(data.ids(judged)).intersection(data.ids(split)))
        if leaked:
            note(f"{data.root}: {len(leaked)} ids of {judged}.txt stand in {split}.txt too, "
                 f"first {leaked[0]}; scores on {judged} will be too good")


def note_unteachable(data, labels, classifier=True):
    """Say what image-level labels {id: class numbers} cannot teach, to a classifier or to CLIP.

    A class that no photo shows is never learned. A classifier learns from the difference between
    photos with a class and photos without. Where there are none without it, or two classes always
    come together, it has nothing to tell them by, and its CAMs are where anything is.
    """
    shown = {}
    for k, name in enumerate(data.classes[1:], start=1):
        photos = frozenset(image_id for image_id, numbers in labels.items() if k in numbers)
        shown.setdefault(photos, []).append(name)
    for photos, names in shown.items():
        if not photos or classifier and (len(names) > 1 or len(photos) == len(labels)):
            note(f"{data.root}: {', '.join(names)}: in the same {len(photos)} of {len(labels)} "
                 "training photos, so a classifier has nothing to tell it from; add photos with "
                 "and without it (for --method clip with it is enough)")


# ============================================ files that appear whole, the record of a run, errors
# How a run is known again. A stage's folder belongs to one run, and its args.json says which:
# every option, and the digests of what went in (lists, classes, labels, weights, seeds or masks).
# It is written before anything else. Whoever opens the folder again must bring the same, or is
# refused: so all that lies there was made by one recipe from one input, in however many sittings,
# and "it exists" can be taken for "it is done". When a stage makes masks it adds how
# ("provenance"), which stands beside every score; last of all comes "finished": true.

# options that change where or how fast things happen, but not what comes out (beyond rounding)
MACHINE_OPTIONS = ("data", "runs", "overwrite", "device", "amp", "workers", "deterministic")
# options that name a file or folder: known by the digest of what it holds, wherever it lies
FILE_OPTIONS = ("clip", "weights", "seeds", "masks", "checkpoint", "images")


def write_whole(path, write):
    """Call write(file) on a file beside `path`, then rename it: `path` exists whole or not at all.

    Raises OSError that names `path`; what was there before is unharmed.
    """
    part = path.with_name(f".{path.name}.part")  # the dot keeps `*.png` from finding it
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())  # a rename may reach the disk before what it renames
        part.replace(path)        # atomic on one file system
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({error.strerror or error})") from None


def write_text(path, text):
    """A text file in UTF-8, whole or not at all."""
    write_whole(path, lambda f: f.write(text.encode("utf-8")))


def write_json(path, value):
    """A JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")  # str: of paths


def read_record(folder):
    """args.json, the record that a stage keeps of its run; {} where there is none."""
    path = folder / "args.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError):
        raise ValueError(f"{path}: not readable; remove {folder}, or give --overwrite") from None


def update_record(folder, **entries):
    """Put entries into args.json, over those of the same name."""
    write_json(folder / "args.json", {**read_record(folder), **entries})


def check_outside(folder, args):
    """Raise ValueError where an option names something in `folder`, where old files are removed."""
    for name in FILE_OPTIONS:
        value = getattr(args, name, None)
        if value and Path(value).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--{name} {value}: lies in {folder}, which is written; copy it")


def start_run(folder, args, data, lists, digests, device, mask_options=()):
    """Make or reopen a stage's folder; raise ValueError rather than mix two runs in one.

    lists: {split: ids} whose photos are looked at; digests: {what else went in: its sha256};
    device: in words, for the record. mask_options: names of options that change how masks are
    written from a finished model, but not the model. A list that was not there before is no other
    run.
    """
    check_outside(folder, args)
    for split, ids in lists.items():
        digests[f"photos of {split}"] = files_digest([data.image_path(i) for i in ids])
    if args.overwrite and folder.exists():
        shutil.rmtree(folder)
    before = read_record(folder)
    begun = any(any(folder.glob(p)) for p in ("checkpoint.pt", "cams/*", "seeds/*", "masks/*/*"))
    if not begun:  # also what a run has left that came to nothing
        commit = subprocess.getoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD")
        versions = {p: importlib.metadata.version(p) for p in ("torch", "torchvision", "numpy")}
        write_json(folder / "args.json", {
            "options": vars(args), "digests": digests, "device": device, "versions": versions,
            "commit": commit if len(commit) == 40 else None, "finished": False})
        return
    free = {*MACHINE_OPTIONS, *FILE_OPTIONS, *mask_options} - digests.keys()
    known = before.get("digests", {})
    then = {**digests, **before.get("options", {}), **known}
    # Digests come first, so that they are named first, and again last, over the options of the same
    # name: the digest of a file counts.
    for name, value in {**digests, **vars(args), **digests}.items():
        if name not in free and then.get(name) != value:
            raise ValueError(f"{folder} was made with {name} = {str(then.get(name))[:40]}, not "
                             f"{str(value)[:40]}; --overwrite starts afresh")
    if digests.keys() - known.keys():
        update_record(folder, digests={**known, **digests})


def check_classes(data, folder):
    """True where args.json says that a stage numbered the dataset's classes, else False.

    Raises ValueError for other classes: a number would mean another thing, and its score would look
    right.
    """
    classes = read_record(folder).get("digests", {}).get("classes")
    if classes not in (None, data.digests()["classes"]):
        raise ValueError(f"{folder}: made with other classes; start that stage afresh")
    return classes is not None


def is_finished(folder, files):
    """True, and said, if the stage's last act has been done here and all `files` are there."""
    finished = read_record(folder)["finished"] and all(path.is_file() for path in files)
    if finished:
        print(f"{folder}: finished; --overwrite starts afresh")
    return finished


# True in the process that says and writes what there is one of: torchrun's first, or the only one.
MAIN = os.environ.get("RANK", "0") == "0"


@cache  # a text is said once, however often a file is read
def note(text):
    """Say on stderr what a user should know, from one of torchrun's processes."""
    if MAIN:
        print(text, file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """argparse's parser, but a wrong option is one line, as every other mistake is."""

    def error(self, message):
        """Called with what is wrong with the command line; raises it as ValueError."""
        raise ValueError(f"{message}; --help explains the options")


def run(main):
    """Run a script's main(); what ends it early becomes one line and exit status 2, 130 for Ctrl-C.

    Functions raise and never exit, so that tests and other scripts can catch what they say. What
    is neither ValueError, OSError nor want of memory is a mistake of ours: it keeps its traceback.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="replace")  # a console may lack a letter of a class's name
    status = 2
    try:
        return main()
    except KeyboardInterrupt:
        text, status = "interrupted; the same command, without --overwrite, goes on", 130
    except (ValueError, OSError) as error:
        text = str(error)
    except (MemoryError, RuntimeError) as error:
        # Python's own says nothing, NumPy's and torch's say how much they wanted.
        if not re.search(r"^$|out of memory|allocate|bad_alloc|worker \(pid", str(error)):
            raise
        text = (f"out of memory ({str(error)[:80]!r}): give a smaller --batch-size, --crop or "
                "--scales, a larger --accumulate, fewer --workers, or smaller photos")
    # A process that loads images sends its error as a page of text, whose end is the error.
    print(text.splitlines()[-1], file=sys.stderr)
    raise SystemExit(status)


# ========================================================== VOC 2012 and COCO 2014 from nothing
#     VOC2012    --download   VOC's archive has all but the list trainaug, which papers train on:
#                             trainaug = (SBD train + SBD val + VOC train) - VOC val. SBD is a
#                             later annotation of VOC's own photos, so it adds ids and masks, but
#                             neither photos nor image-level labels: those are in VOC's XML.
#     COCO2014   --prepare    annotations_trainval2014.zip, train2014.zip and val2014.zip, unpacked
#                             into one folder COCO2014: lists, labels and masks out of the JSON
#
# VOC comes into ./data, which may be a link to another disk. What is there is not fetched again.

# Lengths of the lists as papers report them; COCO's count the photos that have objects.
PUBLISHED = {"VOC2012": {"train": 1_464, "val": 1_449, "trainaug": 10_582},
             "COCO2014": {"train": 82_081, "val": 40_137}}
VOC_MASKS = 2_913  # in VOC's archive


def download(name):
    """Bring VOC 2012 into ./data, and make the list trainaug. Raises ValueError.

    SBD was split without regard to VOC's lists, so its train holds photos of VOC's val: they are
    taken out, or a network would be scored on what it has learned from.
    AUDIT.md: (94).
    """
    # Here and not above: torchvision brings torch, and who only scores shall not wait for it.
    from torchvision.datasets import SBDataset, VOCSegmentation, utils
    if name != "VOC2012":
        raise ValueError(f"--data {name}: --download brings VOC2012 alone (COCO: --prepare)")
    root = Path("data/VOCdevkit/VOC2012")
    try:
        # Masks lie behind the photos in the archive: where all are there, all has been unpacked.
        tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
        if len(list(root.glob("SegmentationClass/*.png"))) < VOC_MASKS:
            VOCSegmentation("data", download=True)
        data = find_dataset(root)
        if not data.has("trainaug"):
            utils.download_and_extract_archive(SBDataset.url, "data", md5=SBDataset.md5)
            ids = set(data.ids("train"))
            for split in ("train", "val"):
                ids.update(read_list(Path(f"data/benchmark_RELEASE/dataset/{split}.txt")))
            ids.difference_update(data.ids("val"))
            if len(ids) != PUBLISHED["VOC2012"]["trainaug"]:
                raise ValueError(f"trainaug comes to {len(ids)} ids, not as published")
            write_text(data.list_path("trainaug"), "\n".join(sorted(ids)) + "\n")
    except (RuntimeError, OSError, ValueError, tarfile.TarError) as error:
        raise ValueError(f"{name}: {error}; the same command begins again") from None
    check_dataset(data)


def prepare(name):
    """COCO 2014's own files -> VOC's layout. Raises ValueError, OSError for a missing file."""
    root = Path(name)
    if dataset_name(root) != "COCO2014":
        raise ValueError(f"--data {name}: a folder COCO2014 is expected (annotations/, train2014/)")
    try:
        from pycocotools.coco import COCO
    except ImportError:
        raise ValueError("--prepare wants pycocotools: pip install pycocotools") from None
    lines = {}
    for split in PUBLISHED["COCO2014"]:
        coco = COCO(root / f"annotations/instances_{split}2014.json")
        names = {category["id"]: category["name"] for category in coco.dataset["categories"]}
        # Other categories would give every mask wrong classes, and nobody would see it.
        if names != {COCO_SLOTS.index(name): name for name in COCO_CLASSES[1:]}:
            raise ValueError(f"{root}/annotations: its {len(names)} categories are not COCO's 80")
        # Photos without objects are left out, as papers do: they have no label to learn from.
        lines[split] = [prepare_photo(root, f"{split}2014", coco, number)
                        for number in tqdm(sorted(coco.imgToAnns), split)]
    write_text(root / "classes.txt", "\n".join(COCO_CLASSES) + "\n")
    write_text(root / "image_labels.txt", "".join(lines["train"] + lines["val"]))
    # The lists come last: where they are, a stage takes the dataset for finished.
    for split, text in lines.items():
        ids = [line.split()[0] for line in text]
        write_text(root / f"ImageSets/Segmentation/{split}.txt", "\n".join(ids) + "\n")


def prepare_photo(root, folder, coco, number):
    """Link to a photo of train2014 or val2014, and its true mask -> its line of image_labels.txt.

    coco: pycocotools' reader. Where objects overlap, the first of the file wins, as in the
    released conversion; crowds are places of their class like any other.
    AUDIT.md: (93).
    """
    image, objects = coco.imgs[number], coco.imgToAnns[number]
    photo = root / "JPEGImages" / Path(image["file_name"]).name  # of a path only its end
    photo.parent.mkdir(exist_ok=True)
    if not photo.is_symlink():  # a relative one, so that the dataset may be moved
        photo.symlink_to(Path("..", folder, photo.name))
    mask = root / f"SegmentationClass/{photo.stem}.png"
    if not mask.is_file():
        label = np.zeros((image["height"], image["width"]), np.uint8)
        for found in reversed(objects):  # the first is painted last
            name = COCO_SLOTS[found["category_id"]]
            label[coco.annToMask(found) > 0] = COCO_CLASSES.index(name)
        write_label(mask, label)
    slots = sorted({found["category_id"] for found in objects})
    return f"{photo.stem} {', '.join(COCO_SLOTS[slot] for slot in slots)}\n"


# ======================================================================================= scores
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
#     true cat                 1      3       0            IoU = 3/6 = 50 percent
#
# and background has 94/97 = 96.9 percent, so the mIoU is 73.5. Had the missed cat pixel been called
# unsure, nothing would change for the cat: an unsure answer is a miss.
#
# Background counts as a class, and it is the easiest one: on VOC, a network that says nothing but
# "background" still has an IoU of over 70 percent there, and a mIoU of 3.5.

def confusion(truth, prediction, K):
    """Pixel counts (K, K + 1): row = true class, column = predicted class, the last "unsure".

    truth, prediction (H, W) uint8, below K or 255. Pixels whose truth is 255 are not scored.
    AUDIT.md: (89).
    """
    # "Unsure" (255) gets a column of its own. Were such pixels left out instead, a mask could
    # gain by answering only where it is certain; so an unsure pixel is a miss for its class.
    column = np.minimum(prediction, K)                                   # (H, W)
    # Each pair (row, column) is one number, and one count over all pixels is the whole matrix. It
    # has a row for every byte; those of the classes are kept, and row 255 is not.
    pair = truth.astype(np.int64) * (K + 1) + column                     # (H, W)
    counts = np.bincount(pair.ravel(), minlength=256 * (K + 1))
    # Copied, since a view would keep all 256 rows in memory, for every photo of the list.
    return counts.reshape(256, K + 1)[:K].copy()


def scores(matrix):
    """Confusion matrix of a whole dataset (K, K + 1) -> percentages.

    iou: (K,) per class, NaN for a class in neither truth nor prediction; miou: mean of those that
    are not NaN, background's among them; pixel_accuracy: hits among all scored pixels.
    """
    # The matrix has K + 1 columns, its diagonal K entries: "unsure" is right for no class.
    hit = np.diag(matrix)                                                # (K,)
    # All pixels that are this class in the truth, whatever was answered, and all that were answered
    # with it; what is both would else be counted twice.
    union = matrix.sum(1) + matrix[:, :-1].sum(0) - hit                  # (K,)
    with np.errstate(invalid="ignore"):  # 0 / 0 of a class that does not occur is NaN, as said
        iou = 100 * hit / union
    # Pixel accuracy is dominated by background and large things; the mean over classes is not.
    accuracy = 100 * hit.sum() / max(1, matrix.sum())
    miou = np.nanmean(iou) if union.any() else 0
    return {"miou": miou, "pixel_accuracy": accuracy, "iou": iou}


def score_folder(data, folder, split, limit=None):
    """Score the label PNGs in `folder` on the ids of `split` that have both a mask and a truth.

    Returns {"stage", "split", "n", "of", "truth", what `scores` gives, "iou" by name, and the
    names in PROVENANCE, which a folder cannot tell: None}, or None where nothing can be scored.
    n of `of`: a good score on few images must be seen to be one. Raises ValueError.
    """
    # Images without a mask are left out and not held against the folder: a stage may be half
    # done, and "n of N" says so.
    K, ids = len(data.classes), data.ids(split, limit)
    both = [i for i in ids if find_file(folder, i).is_file() and data.truth_path(i)]
    if not both:
        return None

    def count(image_id):
        # Both are held against the photo, so that the one that does not fit is the one named.
        size = data.image(image_id).shape[:2]
        truth = read_label(data.truth_path(image_id), K, size)
        return confusion(truth, read_label(find_file(folder, image_id), K, size), K)
    # One matrix for the whole dataset, as VOC and the papers have it: pixels are counted over all
    # images first and divided once. A mean of per-image IoUs would be another number, in which a
    # class of ten pixels in one photo weighs as much as the same class filling another.
    counts = for_each(count, both, f"scoring {folder}")                  # of (K, K + 1) each
    matrix = sum(counts)
    held = {data.truth_path(i): set(np.flatnonzero(m.any(1))) for i, m in zip(both, counts)}
    compare_classes(data, held, data.known_labels(both), TOLERATED)
    if len(both) > 1 and matrix[:, K].any() and not matrix[:, 1:K].any():
        raise ValueError(f"{folder}: masks with no class in any, but {IGNORE}, which is unsure; "
                         "an object's pixels hold its class number, from 1 on")
    found = scores(matrix)
    found["iou"] = {name: None if np.isnan(value) else round(float(value), 3)
                    for name, value in zip(data.classes, found["iou"])}  # JSON has no NaN
    return {"stage": folder.name, "split": split, "n": len(both), "of": len(ids),
            "truth": "+".join(sorted({path.parent.name for path in held})),
            **found, **dict.fromkeys(PROVENANCE)}


# ------------------------------------------------------------ provenance: how a mask came to be
# 77.2 says little until one knows of what: training images or val, one scale or six, before or
# after the CRF, with or without the image-level labels as a filter. The record of a stage says
# it, and every row of the table carries it. A folder that another program filled has no record:
# its row says no more than what was counted.

PROVENANCE = ("scales", "flip", "crf", "label_filter", "iters", "learned_from")


def score_runs(data, folder):
    """Rows for all that the stages left in runs/<dataset>, and any <name>/masks/<split>/ there.

    A row is what `score_folder` gives, with what the stage's record tells of it. Any method's
    masks, put beside ours, are scored by the same lines of code, which makes comparisons fair.
    """
    rows = []
    for masks in [folder / "1_cam/seeds", *sorted(folder.glob("**/masks/[!.]*"))]:
        stage = masks.parent if masks.name == "seeds" else masks.parent.parent
        check_classes(data, stage)
        record = read_record(stage)
        options = record.get("options", {})
        training = options.get("split")
        splits = [training if masks.name == "seeds" else masks.name]
        if splits == [training] == ["trainaug"]:
            # Papers report VOC's own 1,464 training images, which are among trainaug's 10,582.
            splits.append("train")
        for split in splits:
            known = split in data.splits()  # others are left out
            row = score_folder(data, masks, split, options.get("limit")) if known else None
            if row:
                row["stage"] = stage.relative_to(folder).as_posix()
                row.update(record.get("provenance", {}))
                # Image-level labels are given for training images alone: val is never filtered.
                row["label_filter"] = bool(row["label_filter"]) and splits[0] == training
                # With --checkpoint nothing was learned here. SegmentationClass means true masks.
                learned = options.get("masks", options.get("seeds"))
                row["learned_from"] = options.get("checkpoint") or learned
                rows.append(row)
    return rows


def describe_provenance(row):
    """Where the numbers of a row come from, in words."""
    facts = {name: row[name] for name in (*PROVENANCE, "truth") if row[name]}
    return ", ".join(name if value is True else f"{name} {value}" for name, value in facts.items())


def print_rows(rows):
    """The table, a line a row: no number without where it comes from."""
    print(f"{'stage':14} {'split':9} {'images':>12} {'mIoU':>6} {'pixels':>7}  how")
    for row in rows:
        print(f"{row['stage']:14} {row['split']:9} {row['n']:5} of {row['of']:4} "
              f"{row['miou']:6.1f} {row['pixel_accuracy']:6.1f}%  {describe_provenance(row)}")


# ============================================================================== the report page
# One file that needs no network: pictures and style stand in it. Whatever comes from outside
# (class names, ids, options) goes through `escape`, since a class may well be called "<light>".

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>WeakCLIP on {title}</title><style>
body {{ font: 1rem/1.5 sans-serif; color-scheme: light dark }} img, svg {{ width: 100% }}
figure {{ display: inline-block; margin: .2rem; width: 11rem; vertical-align: top }}
table {{ display: block; overflow-x: auto }} svg {{ height: 4rem; overflow: visible }}
polyline {{ fill: none; stroke: #3f7fd6; vector-effect: non-scaling-stroke }}
td {{ padding-right: 1rem }}</style></head><body><h1>WeakCLIP on {title}</h1>{body}</body></html>
"""


def overlay(photo, label, classes, side=800):
    """The photo with its mask laid over it, and the classes' names on it; (h, w, 3) uint8.

    photo (H, W, 3) uint8, label (H, W) class numbers; the longer side gets `side` pixels. Under a
    colour the photo is grey: red under blue would be violet, another class's colour.
    """
    grey = photo.mean(2, keepdims=True)                                  # (H, W, 1)
    mixed = np.where(label[..., None] > 0, grey / 2 + colour_map()[label] / 2, photo)
    sheet = ImageOps.contain(Image.fromarray(np.uint8(mixed)), (side, side))
    for k in np.setdiff1d(label, (0, IGNORE)):  # the classes in it
        row, column = np.argwhere(label == k).mean(0) * sheet.width / label.shape[1]
        ImageDraw.Draw(sheet).text((column, row), classes[k], (255, 255, 255), anchor="mm",
                                   stroke_width=2, stroke_fill=(0, 0, 0), font_size=side / 25)
    return np.asarray(sheet)


def light(photo, cam):
    """The photo (H, W, 3) uint8, bright where its map (h, w) in [0, 1] is high, dark elsewhere."""
    level = Image.fromarray(np.uint8(255 * cam)).resize(photo.shape[1::-1])
    return np.uint8(photo * (0.2 + 0.8 / 255 * np.expand_dims(level, 2)))


def pictures(data, folder, split, image_id):
    """HTML of a photo, what every stage made of it, and the truth: a figure for each.

    In the order of the chain, so that a row reads as the method works; what is not there is left
    out. For seeds from CLIP the steps are kept beside the CAM and shown too.
    """
    photo = data.image(image_id)                                         # (H, W, 3)
    found = figure("image", photo)
    path = folder / f"1_cam/cams/{image_id}.npz"
    try:
        cams = dict(np.load(path)) if path.is_file() else {}
    except Exception as error:  # zip, zlib and NumPy's reader raise many kinds
        raise ValueError(f"{path}: {error}; remove it and its seed, and run stage 1") from None
    for key, caption in {"before": "what spoke for", "boxes": "boxes of", "cam": "CAM of"}.items():
        if key in cams and len(cams[key]):
            name = data.classes[cams["keys"][0]]
            found += figure(f"{caption} {name}", light(photo, cams[key][0]))
    labels = {"seeds": folder / f"1_cam/seeds/{image_id}.png",
              "masks": folder / f"2_weakclip/masks/{split}/{image_id}.png",
              "prediction": folder / f"3_segment/masks/{split}/{image_id}.png",
              "truth": data.truth_path(image_id)}
    for name, path in labels.items():
        if path and path.is_file():
            label = read_label(path, len(data.classes), photo.shape[:2])
            found += figure(name, overlay(photo, label, data.classes, 256))
    return found


def figure(caption, picture):
    """A picture (H, W, 3) uint8 and what stands under it -> HTML that holds both."""
    coded = io.BytesIO()
    ImageOps.contain(Image.fromarray(picture), (256, 256)).save(coded, "JPEG", quality=85)
    text = base64.b64encode(coded.getvalue()).decode()
    return (f'<figure><img alt="{escape(caption)}" src="data:image/jpeg;base64,{text}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>")


def curves(path):
    """log.jsonl -> a curve for every loss by its name, from its largest to its smallest value."""
    lines = path.read_text().splitlines() if path.is_file() else []
    log = [json.loads(line) for line in lines if line.endswith("}")]
    found = ""
    for name in sorted({name for line in log for name in line if name.startswith("loss_")}):
        y = [line[name] for line in log]
        # In SVG y grows downwards. The browser stretches the box of all points to the figure.
        points = " ".join(f"{i},{-value:.6g}" for i, value in enumerate(y))
        box = f"0 {-max(y)} {len(y)} {max(y) - min(y) or 1}"  # left, top, width, height
        found += (f'<figure><svg viewBox="{box}" preserveAspectRatio="none">'
                  f'<polyline points="{points}"/></svg>'
                  f"<figcaption>{escape(name)}: {y[0]:.3g} to {y[-1]:.3g}</figcaption></figure>")
    return found


def write_report(data, folder, rows):
    """report.html: scores, six photos of each list in a row of pictures, losses and options."""
    head = ["", "images", "mIoU", "pixels", *map(escape, data.classes), "how"]
    body = f"<h2>Scores, in percent</h2><table><tr><th>{'<th>'.join(head)}"
    for row in rows:
        iou = ["-" if value is None else f"{value:.1f}" for value in row["iou"].values()]
        cells = [f"{row['stage']} {row['split']}", f"{row['n']} of {row['of']}",
                 f"{row['miou']:.1f}", f"{row['pixel_accuracy']:.1f}", *iou,
                 describe_provenance(row)]
        body += f"<tr><td>{'<td>'.join(map(escape, cells))}"
    body += "</table><h2>Pictures</h2>"
    for split in data.splits():
        places = [folder / "1_cam/seeds", *folder.glob(f"*/masks/{split}")]
        ids = [i for i in data.ids(split) if any(find_file(p, i).is_file() for p in places)]
        for image_id in ids[::max(1, len(ids) // 6)][:6]:
            body += f"<h3>{escape(split)}: {escape(image_id)}</h3>"
            body += pictures(data, folder, split, image_id)
    for stage in ("1_cam", "2_weakclip", "3_segment"):
        record = escape(json.dumps(read_record(folder / stage), indent=1))
        body += f"<h2>{stage}</h2>{curves(folder / stage / 'log.jsonl')}<pre>{record}</pre>"
    write_text(folder / "report.html", PAGE.format(title=escape(data.name), body=body))


# ================================================================================= command line

def check_dataset(data):
    """Print what is in a dataset, list by list. Raises ValueError at the first fault."""
    training = data.training_split()
    # Only training images need labels: val is what the method has never been told about.
    labels = data.image_labels(data.ids(training))
    print(f"{data.root}: {len(data.classes)} classes, {len(labels)} training photos")
    for split in data.splits():
        ids = data.ids(split)
        with_truth = check_inputs(data, ids, image_labels=data.known_labels(ids))
        expected = PUBLISHED.get(data.name, {}).get(split, "none known")
        print(f"{split:9} {len(ids):6} images (published: {expected}), {with_truth} true masks")
    note_unteachable(data, labels)
    note_leaks(data, training)


def parse_args(argv=None):
    """The options; see --help."""
    p = Parser(description=__doc__.splitlines()[0])
    p.add_argument("--data", required=True, help="dataset folder in VOC's layout (README, Data)")
    p.add_argument("--runs", type=Path, default=Path("runs"), help="where stages write [runs]")
    p.add_argument("--masks", type=Path, help="score this folder of label PNGs alone")
    p.add_argument("--split", default="val", help="list to score --masks on [val]")
    p.add_argument("--check", action="store_true", help="look at every file of the dataset")
    p.add_argument("--download", action="store_true", help="bring VOC2012 into ./data")
    p.add_argument("--prepare", action="store_true", help="COCO 2014's files to VOC's layout")
    return p.parse_args(argv)


def main():
    """What the options ask for; without any, everything in runs/<dataset> is scored and shown."""
    args = parse_args()
    if args.download:
        return download(args.data)
    if args.prepare:
        return prepare(args.data)
    data = find_dataset(args.data)
    if args.check:
        return check_dataset(data)
    if args.masks:
        row = score_folder(data, args.masks, args.split)
        if row is None:
            raise ValueError(f"{args.masks}: no PNG of {args.split} that also has a true mask")
        print_rows([row])
        print(json.dumps(row["iou"], indent=1, ensure_ascii=False))
        return
    folder = args.runs / data.name
    if not folder.is_dir():
        raise ValueError(f"{folder}: nothing there; stage1_cam.py makes the first seeds")
    rows = score_runs(data, folder)
    print_rows(rows)
    if not rows:
        print(f"nothing to score: no masks yet, or no true ones of their images in {data.root}")
    write_json(folder / "metrics.json", {"rows": rows})
    write_report(data, folder, rows)
    print(f"written: {folder / 'metrics.json'}, {folder / 'report.html'}")


if __name__ == "__main__":
    run(main)
