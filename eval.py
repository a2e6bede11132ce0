"""What the stages are given and how they are judged: the dataset folder, label PNGs, scores.

run     python eval.py --data VOC2012                       # everything found in runs/VOC2012
        python eval.py --data VOC2012 --masks DIR --split val   # any folder of label PNGs
        python eval.py --data VOC2012 --check               # is the dataset complete and sound?
        python eval.py --data VOC2012 --submit              # archive for the VOC evaluation server
reads   VOC2012/SegmentationClass/<id>.png (true masks), runs/VOC2012/**/{seeds,masks/<split>}/<id>.png
writes  runs/VOC2012/{metrics.json, metrics.csv, report.html}

Every stage imports this file: it holds no network and needs no torch.
"""
import argparse
import base64
import csv
import hashlib
import io
import json
import os
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from pathlib import Path
from threading import Lock

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

IGNORE = 255  # "unsure" in our masks, the void border in VOC's: neither trained on nor scored
VOC_CLASSES = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
               "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
# COCO's category ids 0..90 as the released code has them. Ten were never used; our COCO has the 81 others, numbered on (32).
COCO_SLOTS = (
    "background", "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "street sign", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "hat", "backpack", "umbrella", "shoe", "eye glasses", "handbag", "tie", "suitcase",
    "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "plate", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "mirror",
    "dining table", "window", "desk", "toilet", "door", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave",
    "oven", "toaster", "sink", "refrigerator", "blender", "book", "clock", "vase", "scissors", "teddy bear", "hair drier",
    "toothbrush")
COCO_CLASSES = tuple(n for n in COCO_SLOTS if n not in (
    "street sign", "hat", "shoe", "eye glasses", "plate", "mirror", "window", "desk", "door", "blender"))


# =============================================================================================== errors, whole files

def stop(message):
    """The user's mistakes end here: one line on stderr, exit status 2."""
    print(" ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def run(main):
    """Run a script's main(); bad input and the file system's refusals (ValueError, OSError) become one line."""
    try:
        main()
    except (ValueError, OSError) as e:
        stop(e)
    except KeyboardInterrupt:
        stop("interrupted; the same command goes on from here")


def write_whole(path, write):
    """Call write(file) on a file beside `path`, then rename it: `path` exists whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            write(f)
        os.replace(part, path)  # atomic on one file system
    finally:
        part.unlink(missing_ok=True)


def write_text(path, text):
    """A text file in UTF-8, whole or not at all."""
    write_whole(path, lambda f: f.write(text.encode("utf-8")))


def write_json(path, value):
    """A JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


# ================================================================================================ images and label PNGs

def colour_map():
    """VOC's palette (256, 3) uint8: the bits of a class number, three at a time, fill R, G and B from the top bit down."""
    c, palette = np.arange(256), np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= (((c >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def read_image(path):
    """Photo -> (H, W, 3) uint8 RGB as displayed (EXIF orientation applied). Raises ValueError where it is broken."""
    try:
        with Image.open(path) as im:
            return np.array(ImageOps.exif_transpose(im).convert("RGB"))
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise ValueError(f"{path}: not a readable image ({e})") from None


def read_label(path, classes=256, size=None):
    """Label PNG -> (H, W) uint8 of class numbers, 255 = unsure.

    classes: numbers from `classes` to 254 are refused; size: (H, W) that is expected. Raises ValueError.
    """
    try:
        with Image.open(path) as im:
            mode, label = im.mode, np.array(im)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as e:
        raise ValueError(f"{path}: not a readable label PNG ({e})") from None
    if mode not in ("P", "L"):
        raise ValueError(f"{path}: mode {mode}; a label PNG is indexed (P) or grey (L) and holds class numbers, not colours")
    bad = label[(label >= classes) & (label != IGNORE)]
    if bad.size:
        raise ValueError(f"{path}: class number {bad.max()}, the dataset has 0..{classes - 1} and {IGNORE}")
    if size is not None and label.shape != tuple(size):
        raise ValueError(f"{path}: {label.shape[1]}x{label.shape[0]} pixels, its image has {size[1]}x{size[0]}")
    return label


def write_label(path, label):
    """(H, W) class numbers -> palette PNG in VOC's colours."""
    im = Image.fromarray(np.asarray(label, np.uint8), mode="P")
    im.putpalette(colour_map().tobytes())
    write_whole(path, lambda f: im.save(f, "PNG"))


# ============================================================================================================== dataset

@dataclass(frozen=True)
class Dataset:
    """A folder in VOC's layout."""
    root: Path
    name: str
    classes: tuple  # background first

    def list_path(self, split):
        """Where the list `split` is, or would be."""
        return self.root / "ImageSets" / "Segmentation" / f"{split}.txt"

    def has(self, split):
        """True if there is such a list."""
        return self.list_path(split).is_file()

    def training_split(self):
        """trainaug where that list exists, else train."""
        return "trainaug" if self.has("trainaug") else "train"

    def ids(self, split, limit=None):
        """Image ids of a list, in its order. Raises ValueError for a missing list, an odd id or one that stands twice."""
        path = self.list_path(split)
        if not path.is_file():
            known = sorted(p.stem for p in path.parent.glob("*.txt"))
            raise ValueError(f"{path}: no such list (there is {', '.join(known) or 'none'}); one image id a line is expected")
        ids, seen = path.read_text().splitlines(), set()
        ids = [i.strip() for i in ids if i.strip()]
        for i in ids:
            if i.split() != [i] or "/" in i or "\\" in i or i in (".", ".."):
                raise ValueError(f"{path}: {i!r} is no image id; one id a line, no white space, no path")
            if i in seen:
                raise ValueError(f"{path}: {i} stands twice")
            seen.add(i)
        if not ids:
            raise ValueError(f"{path}: the list is empty")
        return ids[:limit]

    def image_path(self, i):
        """The photo of an id; ValueError where there is none."""
        for ending in (".jpg", ".jpeg", ".png"):
            path = self.root / "JPEGImages" / (i + ending)
            if path.is_file():
                return path
        raise ValueError(f"{self.root}/JPEGImages/{i}.jpg: no such image (nor .jpeg, .png)")

    def image(self, i):
        """(H, W, 3) uint8."""
        return read_image(self.image_path(i))

    def truth_path(self, i):
        """True mask of an image, or None. SBD's coarser masks (SegmentationClassAug) serve where VOC's are missing."""
        for folder in ("SegmentationClass", "SegmentationClassAug"):
            path = self.root / folder / f"{i}.png"
            if path.is_file():
                return path
        return None

    def image_labels(self, ids):
        """{id: sorted class numbers from 1} from image_labels.txt or Annotations/*.xml, never from masks."""
        number = {name: k for k, name in enumerate(self.classes)}
        path = self.root / "image_labels.txt"
        if path.is_file():
            lines = (line.partition(" ") for line in path.read_text().splitlines() if line.strip())
            names = {i: [n.strip() for n in rest.split(",") if n.strip()] for i, _, rest in lines}
            source = {i: path for i in ids}
        else:
            source = {i: self.root / "Annotations" / f"{i}.xml" for i in ids}
            names = {i: annotated_objects(p) for i, p in source.items() if p.is_file()}
        labels = {}
        for i in ids:
            if i not in names:
                raise ValueError(f"{source[i]}: no image-level labels for {i}; a line `{i} name, name` in {path} is expected")
            for n in names[i]:
                if number.get(n, 0) == 0:
                    raise ValueError(f"{source[i]}: {i} has class {n!r}; known are {', '.join(self.classes[1:])}")
            labels[i] = sorted({number[n] for n in names[i]})
        return labels

    def digests(self, *splits, **texts):
        """sha256 of the lists, the classes and `texts`: what tells one dataset from another when a run is resumed."""
        parts = texts | {split: "\n".join(self.ids(split)) for split in splits if self.has(split)}
        parts["classes"] = "\n".join(self.classes)
        return {k: hashlib.sha256(v.encode()).hexdigest() for k, v in parts.items()}


def annotated_objects(path):
    """Names of every object in a VOC annotation, difficult ones too."""
    try:
        return [o.findtext("name", "").strip() for o in ElementTree.parse(path).getroot().iter("object")]
    except ElementTree.ParseError as e:
        raise ValueError(f"{path}: not a readable annotation ({e})") from None


def dataset_name(name):
    """Last part of `--data`: names the run's folder and picks COCO's recipe. A link keeps its own name."""
    return Path(os.path.abspath(name)).name


def find_dataset(name):
    """`--data`: a folder, or a name looked up as ./NAME, ./data/NAME and ./data/VOCdevkit/NAME."""
    places = [Path(name), Path("data") / name, Path("data") / "VOCdevkit" / name]
    root = next((p for p in places if (p / "JPEGImages").is_dir()), None)
    if root is None:
        raise ValueError(f"--data {name}: no folder with JPEGImages/ at {', '.join(map(str, places))}; "
                         "VOC 2012's has one, see README, Data")
    classes, path = VOC_CLASSES, root / "classes.txt"
    if path.is_file():
        classes = tuple(n.strip() for n in path.read_text().splitlines() if n.strip())
        if len(classes) < 2 or len(set(classes)) < len(classes) or len(classes) > IGNORE:
            raise ValueError(f"{path}: 2 to {IGNORE} different class names are expected, background first")
    return Dataset(root, dataset_name(root), classes)


def for_each(function, items, text):
    """function(item) for all items, in threads (decoding images frees Python's lock), with a bar; results in order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(tqdm(pool.map(function, items), total=len(items), desc=text, leave=False, disable=len(items) < 50))


def check_inputs(data, ids, labels=None):
    """Decode every image, and its label PNG in folder `labels` if given, before hours of work start. Raises ValueError."""
    paths = {i: data.image_path(i) for i in ids}
    if labels is not None:
        missing = [i for i in ids if not (labels / f"{i}.png").is_file()]
        if missing:
            raise ValueError(f"{labels}: {len(missing)} of {len(ids)} label PNGs missing, first {missing[0]}.png; "
                             "run the stage before on the same list, or name another folder")

    def check(i):
        size = read_image(paths[i]).shape[:2]
        if labels is not None:
            read_label(labels / f"{i}.png", len(data.classes), size)
    for_each(check, ids, "checking inputs")


def folder_digest(folder, ids):
    """sha256 of the label PNGs of `ids`: tells whether a stage's input is still the one that it was trained on."""
    digests = for_each(lambda i: hashlib.sha256((folder / f"{i}.png").read_bytes()).hexdigest(), ids, "digests")
    return hashlib.sha256("".join(digests).encode()).hexdigest()


# =============================================================================================================== scores

def confusion(truth, prediction, K):
    """Pixel counts (K, K + 1): row = true class, column = predicted class; the last column counts "unsure" (255).

    truth, prediction (H, W) uint8. Pixels whose truth is 255 are not scored.
    """
    scored = truth != IGNORE
    column = np.minimum(prediction[scored].astype(np.int64), K)
    return np.bincount(truth[scored].astype(np.int64) * (K + 1) + column, minlength=K * (K + 1)).reshape(K, K + 1)


def scores(matrix):
    """Confusion matrix of a whole dataset (K, K + 1) -> percentages.

    Per class, over truth-or-predicted pixels: iou + false_positives + false_negatives = 100; NaN where there are none.
    An "unsure" pixel is a miss for its class. miou: mean over the classes that occur, from one dataset-wide matrix.
    """
    hit, true, predicted = np.diag(matrix), matrix.sum(1), matrix[:, :-1].sum(0)
    union = true + predicted - hit
    with np.errstate(invalid="ignore"):
        per_class = {"iou": 100 * hit / union, "false_positives": 100 * (predicted - hit) / union,
                     "false_negatives": 100 * (true - hit) / union}
        accuracy = 100 * hit.sum() / matrix.sum() if matrix.sum() else np.nan
    miou = np.nanmean(per_class["iou"]) if union.any() else np.nan
    return {"miou": float(miou), "pixel_accuracy": float(accuracy), **per_class}


def score_folder(data, folder, split, limit=None):
    """Score the label PNGs in `folder` on the ids of `split` that have both a mask and a truth.

    Returns {"split", "n", "of", "truth", and what `scores` gives}, or None where there is nothing to score.
    """
    K, ids = len(data.classes), data.ids(split, limit)
    both = [i for i in ids if (folder / f"{i}.png").is_file() and data.truth_path(i)]
    if not both:
        return None

    matrix, lock = np.zeros((K, K + 1), np.int64), Lock()

    def one(i):
        truth = read_label(data.truth_path(i), K)
        counts = confusion(truth, read_label(folder / f"{i}.png", K, truth.shape), K)
        with lock:  # summed at once: COCO's 80,000 matrices would be 4 GB
            np.add(matrix, counts, out=matrix)
    for_each(one, both, f"scoring {folder}")
    truths = sorted({data.truth_path(i).parent.name for i in both})
    return {"split": split, "n": len(both), "of": len(ids), "truth": "+".join(truths), **scores(matrix)}


# of a row; None where the masks' maker did not say
PROVENANCE = ("scales", "flip", "crf", "label_filter", "iters", "upper_bound")


def read_args(folder):
    """args.json of a stage's folder, {} where there is none."""
    path = folder / "args.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def went_in(said):
    """Paths of the seeds or masks that a stage learned from, by its args.json."""
    return [v for k, v in said.get("options", {}).items() if k in ("seeds", "masks") and v]


def score_runs(data, folder):
    """Rows for everything the stages left in runs/<dataset>, and for any other <name>/masks/<split>/ below it."""
    rows, others = [], {p.parent.relative_to(folder).as_posix() for p in folder.rglob("masks")} - STAGES.keys()
    for stage in (*STAGES, *sorted(others)):
        said = read_args(folder / stage)
        training = said.get("options", {}).get("split")
        found = [(training, folder / stage / "seeds")] if stage == "1_cam" else \
            [(p.name, p) for p in sorted((folder / stage / "masks").glob("*"))]
        if training == "trainaug" and data.has("train"):  # papers report train's 1,464, which trainaug contains
            found += [("train", p) for split, p in found if split == training]
        for split, masks in found:
            if split is None or not masks.is_dir() or not data.has(split):
                continue
            row = score_folder(data, masks, split, said.get("options", {}).get("limit"))
            if row:
                facts = {k: said.get("provenance", {}).get(k) for k in PROVENANCE}
                facts["label_filter"] = bool(facts["label_filter"]) and masks.name in (training, "seeds")  # never on val
                paths = went_in(said)
                paths += [q for p in paths for q in went_in(read_args(Path(p).parent.parent))]  # of the stage that made them
                facts["upper_bound"] = any("SegmentationClass" in p for p in paths)  # true masks
                rows.append({"stage": stage, **row, **facts})
    return rows


def how(r):
    """Where the numbers of a row come from, in words."""
    said = [f"{r['iters']} iterations" if r["iters"] else "", f"scales {r['scales']}" if r["scales"] else "",
            "flip" if r["flip"] else "", "CRF" if r["crf"] else "no CRF" if r["crf"] is False else "",
            "image-label filter" if r["label_filter"] else "",
            "trained on true masks: an upper bound" if r["upper_bound"] else "", f"truth {r['truth']}"]
    return ", ".join(s for s in said if s)


def print_rows(rows):
    """The table, a line a row: no number without where it comes from."""
    wide = max([12, *(len(r["stage"]) for r in rows)])
    print(f"{'stage':{wide}} {'split':9} {'images':>12} {'mIoU':>6} {'pixels':>7}  how")
    for r in rows:
        print(f"{r['stage']:{wide}} {r['split']:9} {r['n']:5} of {r['of']:4} {r['miou']:6.1f} {r['pixel_accuracy']:6.1f}%  "
              + how(r))


def write_metrics(data, folder, rows):
    """metrics.json (rows with provenance) and metrics.csv (a line per row and class)."""
    table = io.StringIO()
    out = csv.writer(table)
    out.writerow(["stage", "split", "class", "iou", "false_positives", "false_negatives"])
    plain = []
    for r in rows:
        columns = {k: r[k] for k in ("iou", "false_positives", "false_negatives")}
        for name, *values in zip(data.classes, *columns.values()):
            out.writerow([r["stage"], r["split"], name, *("" if np.isnan(v) else f"{v:.2f}" for v in values)])
        named = {k: {n: None if np.isnan(x) else round(float(x), 3) for n, x in zip(data.classes, v)}
                 for k, v in columns.items()}
        plain.append({**r, **named})
    write_json(folder / "metrics.json", {"rows": plain})
    write_text(folder / "metrics.csv", table.getvalue())


# =============================================================================================================== report

STAGES = {  # stage: what happens in it, what it hands on, in which folder
    "1_cam": ("A classifier learns from class names alone; where it looks is the CAM.", "seeds", "seeds"),
    "2_weakclip": ("Small parts around the frozen CLIP learn from photos and seeds.", "masks", "masks"),
    "3_segment": ("An ordinary network learns from photos and masks.", "prediction", "masks")}
WRONG = {"right": (150, 150, 150), "false positive or other class": (214, 47, 58), "missed or unsure": (43, 111, 214),
         "not scored": (225, 225, 225)}
BARS = ((217, 115, 26), (63, 127, 214), (27, 154, 170), (154, 98, 214), (214, 69, 80), (47, 158, 91))
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1e24; --soft: #5c6470; --line: #d9dde3; --panel: #eff2f5;
  --blue: #3f7fd6 }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181d; --ink: #e6e9ee; --soft: #9ba4b0; --line: #343a44; --panel: #21262e } }
* { box-sizing: border-box } figure { margin: 0 } img, svg { display: block; width: 100% }
img { border: 1px solid var(--line) }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1, h3 { margin: 1rem 0 .3rem } h2 { margin: 2.5rem 0 .5rem } p { margin: .3rem 0 }
nav a { color: var(--blue); display: inline-block; margin-right: 1rem }
small, figcaption, .key { color: var(--soft); font-size: .8rem } .scroll, pre { overflow-x: auto; font-size: .9rem }
.flow { display: flex; gap: 1.6rem; list-style: none; padding: 0 } .flow li { flex: 1; position: relative }
.flow .stage { flex: 1.3; padding: .6rem .8rem; background: var(--panel); border-radius: .5rem }
.flow li + li::before { content: "\\2192"; position: absolute; left: -1.6rem; top: 2rem; width: 1.6rem; text-align: center }
.pictures { display: grid; grid-template-columns: repeat(var(--n), minmax(0, 1fr)); gap: .4rem; margin-bottom: 1rem }
table { border-collapse: collapse } th, td { padding: .3rem 1rem 0 0; text-align: left; white-space: nowrap }
.n { text-align: right } .how { white-space: normal; border-bottom: 1px solid var(--line) }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .5rem 0 } .chip { display: inline-block; width: .8rem;
  height: .8rem; margin-right: .4rem; border: 1px solid var(--line) }
.bars { columns: 16rem; column-gap: 2.5rem } .bars > div { break-inside: avoid; padding-bottom: .6rem }
.bar { display: grid; grid-template-columns: 1fr 2.2rem; align-items: center; line-height: 1.3 }
.bar span { background: var(--panel) } .bar i { display: block; height: .6rem }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: .5rem 1.5rem }
svg { fill: var(--soft); font-size: 11px } path { stroke: var(--line) } polygon { fill: var(--blue) }
polyline { fill: none; stroke: var(--blue); stroke-width: 1.5 }
@media (max-width: 48rem) { .flow { flex-direction: column } .flow li:not(.stage) { width: 60%; margin: 0 auto }
  .flow li + li::before { content: "\\2193"; left: 0; top: -1.6rem; width: 100% }
  .pictures { grid-template-columns: repeat(min(var(--n), 3), minmax(0, 1fr)) } }
"""


def heat(cam, size):
    """CAM (h, w) in [0, 1] -> (H, W, 3) uint8 picture, blue over green to red."""
    cam = np.asarray(Image.fromarray(np.asarray(cam, np.float32)).resize(size[::-1], Image.BILINEAR))
    ramp = np.stack([np.clip(1.5 - np.abs(4 * cam - c), 0, 1) for c in (3, 2, 1)], 2)
    return (255 * ramp).astype(np.uint8)


def where_wrong(truth, label):
    """True and predicted classes (H, W) -> place in WRONG (H, W)."""
    return np.select([truth == IGNORE, label == truth, (label == 0) | (label == IGNORE)], [3, 0, 2], 1)


def pictures(data, folder, split, i):
    """{caption: picture}: an image, what every stage made of it, the truth, where the last stage is wrong; if it is there.

    A picture is (H, W, 3) uint8, or the pair of (H, W) numbers and their palette (n, 3).
    """
    image, last = data.image(i), None
    shown, K, size = {"image": image}, len(data.classes), image.shape[:2]
    cam = folder / "1_cam" / "cams" / f"{i}.npz"
    if cam.is_file():
        with np.load(cam) as f:
            if len(f["keys"]):
                shown[f"CAM of {data.classes[f['keys'][0]]}"] = image // 2 + heat(f["cam"][0], size) // 2
    for stage, (_, name, masks) in STAGES.items():
        path = folder / stage / masks / ("" if masks == "seeds" else split) / f"{i}.png"
        if path.is_file():
            last, label = name, read_label(path, K, size)
            shown[name] = label, colour_map()
    if data.truth_path(i):
        truth = read_label(data.truth_path(i), K, size)
        shown["truth"] = truth, colour_map()
        if last:
            shown[f"{last}: where wrong"] = where_wrong(truth, label), np.array(list(WRONG.values()), np.uint8)
    return shown


def inline(picture, alt):
    """<img> that holds its picture, made small: a photo as JPEG, class numbers as PNG."""
    photo, f = not isinstance(picture, tuple), io.BytesIO()
    im = Image.fromarray(picture if photo else picture[1][picture[0]])
    im.thumbnail((256, 256), Image.BICUBIC if photo else Image.NEAREST)
    im.save(f, "JPEG" if photo else "PNG", quality=85)
    source = f"data:image/{'jpeg' if photo else 'png'};base64,{base64.b64encode(f.getvalue()).decode()}"
    return f'<img alt="{escape(alt)}" src="{source}">'


def chip(name, colour):
    """A coloured square and a name -> HTML."""
    return f'<span><i class="chip" style="background: rgb{tuple(map(int, colour))}"></i>{escape(name)}</span>'


def key(colours):
    """Legend: {name: (R, G, B)} -> HTML."""
    return f'<div class="key">{"".join(chip(*c) for c in colours.items())}</div>'


def gallery(data, folder, splits, n):
    """n images of every list, spread over it, with all that became of them -> HTML, {caption: (first <img> of it, id)}."""
    html, first, seen = "", {}, set()
    for split in splits:
        ids = [i for i in data.ids(split) if (folder / "1_cam" / "seeds" / f"{i}.png").is_file()
               or any((folder / s / "masks" / split / f"{i}.png").is_file() for s in STAGES)]
        html += f"<h3>{escape(split)}</h3>" if ids else ""
        for i in dict.fromkeys(ids[k * len(ids) // n] for k in range(n) if ids):
            row = pictures(data, folder, split, i)
            images = {c: inline(p, f"{c}, {i}") for c, p in row.items()}
            first = {**{c: (im, i) for c, im in images.items()}, **first}
            seen.update(k for p in row.values() if isinstance(p, tuple) and len(p[1]) == 256 for k in np.unique(p[0]))
            figures = "".join(f"<figure>{im}<figcaption>{escape(c)}</figcaption></figure>" for c, im in images.items())
            html += f'<small>{escape(i)}</small><div class="pictures" style="--n: {len(row)}">{figures}</div>'
    names = {**dict(enumerate(data.classes)), IGNORE: "unsure, or not scored"}
    html += key({names[k]: colour_map()[k] for k in sorted(seen)})
    return html + (f"<small>where wrong:</small>{key(WRONG)}" if any("where wrong" in c for c in first) else ""), first


def flow(stages, first):
    """The stages as boxes, and between them what one hands to the next, with a picture of it."""
    def handed(name, files):
        image, i = first.get(name, ("", None))
        other = ", another photo" if image and i != first["image"][1] else ""  # stage 3 predicts no training images
        return f"<li>{image}<b>{name}</b><br><small>{files}{other}</small></li>"
    html = handed("image", "JPEGImages, class names")
    for s, said in stages.items():
        text, name, masks = STAGES[s]
        iters = said.get("provenance", {}).get("iters")
        html += f'<li class="stage"><b>{s}</b><p>{text}</p><small>{f"{iters:,} iterations" if iters else ""}</small></li>'
        html += handed(name, f"{s}/{masks}")
    return f'<ol class="flow">{html}</ol>'


def table(rows):
    """What print_rows prints, as HTML."""
    html = '<tr><th>stage<th>split<th class="n">images<th class="n">mIoU<th class="n">pixels'
    for r in rows:
        numbers = f"{r['n']} of {r['of']}", f"{r['miou']:.1f}", f"{r['pixel_accuracy']:.1f}%"
        html += f"<tr><td>{r['stage']}<td>{escape(r['split'])}" + "".join(f'<td class="n">{v}' for v in numbers)
        html += f'<tr><td class="how" colspan="5"><small>{escape(how(r))}</small>'
    return f'<div class="scroll"><table>{html}</table></div>'


def bars(classes, rows):
    """A block for every class that occurs, in it a bar of its IoU for every row of the table."""
    colours = [BARS[k % len(BARS)] for k in range(len(rows))]
    html = key({f"{r['stage']} {r['split']}": c for r, c in zip(rows, colours)}) + '<div class="bars">'
    for name, colour, iou in zip(classes, colour_map(), np.array([r["iou"] for r in rows]).T):
        lines = "".join(f'<div class="bar"><span><i style="width: {np.nan_to_num(v):.1f}%; background: rgb{c}"></i></span>'
                        f'<small class="n">{"-" if np.isnan(v) else f"{v:.1f}"}</small></div>' for v, c in zip(iou, colours))
        html += "" if np.isnan(iou).all() else f"<div>{chip(name, colour)}{lines}</div>"
    return f"<p>IoU in percent, a bar for each row of the scores, in their order; - where there is none.</p>{html}</div>"


def curve(name, log):
    """A loss, (n, 2) of step and value -> SVG: the mean of up to 150 stretches as a line, their range as a band."""
    (start, low), (end, high) = log.min(0), log.max(0)

    def points(steps, values):
        x, y = 60 + 252 * (steps - start) / ((end - start) or 1), 116 - 106 * (values - low) / ((high - low) or 1)
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
    x, y, under, over = np.array([(*s.mean(0), s[:, 1].min(), s[:, 1].max())
                                  for s in np.array_split(log, min(len(log), 150))]).T
    grid = "".join(f'<path d="M60 {y}h252"/><text x="54" y="{y + 4}" text-anchor="end">{v:.3g}</text>'
                   for y, v in ((10, high), (63, (low + high) / 2), (116, low)))
    return (f'<figure><b>{escape(name)}</b> <small>last {log[-1, 1]:.4g}</small><svg viewBox="0 0 320 136">{grid}'
            f'<text x="60" y="132">{start:.0f}</text><text x="312" y="132" text-anchor="end">iteration {end:.0f}</text>'
            f'<polygon points="{points(np.r_[x, x[::-1]], np.r_[under, over[::-1]])}" opacity=".3"/>'
            f'<polyline points="{points(x, y)}"/></svg></figure>')


def curves(path):
    """log.jsonl -> a curve for every loss by its name; a line that was cut off is left out."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.is_file() else []
    values = {}
    for name, step, v in ((n, line["step"], v) for line in lines for n, v in line.items() if n.startswith("loss")):
        values.setdefault(name, []).append((step, v))
    if len(values) == 2:
        values.pop("loss", None)  # the sum of one
    return "".join(curve(name, np.array(v)) for name, v in values.items())


def write_report(data, folder, rows, n=6):
    """report.html: stages, scores, n pictures a list, classes, losses and options, on one page that needs no network."""
    stages = {s: said for s in STAGES if (said := read_args(folder / s))}
    if not stages:
        return
    splits = [said["options"]["split"] for said in stages.values()]
    splits += [p.name for s in stages for p in sorted((folder / s / "masks").glob("*"))]
    shown, first = gallery(data, folder, [s for s in dict.fromkeys(splits) if data.has(s)], n)
    losses = {s: curves(folder / s / "log.jsonl") for s in stages}
    title, sections = escape(f"WeakCLIP on {data.name}"), {
        "Stages": flow(stages, first), "Scores": table(rows) if rows else "", "Pictures": shown,
        "Classes": bars(data.classes, rows) if rows else "",
        "Losses": "".join(f'<h3>{s}</h3><div class="curves">{c}</div>' for s, c in losses.items() if c),
        "Options": "".join(f"<details><summary>{s}</summary><pre>{escape(json.dumps(said, indent=1))}</pre></details>"
                           for s, said in stages.items())}
    links = "".join(f'<a href="#{name}">{name}</a>' for name, body in sections.items() if body)
    body = "".join(f'<section id="{name}"><h2>{name}</h2>{body}</section>' for name, body in sections.items() if body)
    write_text(folder / "report.html", f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1><nav>{links}</nav>{body}</body></html>
""")


# ========================================================================================================= command line

def check_dataset(data):
    """Everything about the dataset that can be known before a run, list by list. Raises ValueError at the first fault."""
    print(f"{data.root}: {len(data.classes)} classes with background")
    for path in sorted(data.list_path("").parent.glob("*.txt")):
        ids = data.ids(path.stem)
        check_inputs(data, ids)
        truths = [(i, data.truth_path(i)) for i in ids if data.truth_path(i)]
        for_each(lambda t: read_label(t[1], len(data.classes), data.image(t[0]).shape[:2]), truths, "true masks")
        line = f"{path.stem:9} {len(ids):6} images, {len(truths)} true masks"
        if path.stem.startswith("train"):
            labels = data.image_labels(ids)
            line += f", {np.mean([len(v) for v in labels.values()]):.2f} classes an image"
        print(line)


def submit(data, folder):
    """Stage 3's test masks -> the archive that the VOC server takes (indexed PNGs under comp6's path)."""
    masks, ids = folder / "3_segment" / "masks" / "test", data.ids("test")
    check_inputs(data, ids, masks)

    def pack(f):
        with tarfile.open(fileobj=f, mode="w:gz") as tar:
            for i in ids:
                tar.add(masks / f"{i}.png", f"results/VOC2012/Segmentation/comp6_test_cls/{i}.png")
    write_whole(folder / "submission.tar.gz", pack)
    print(f"{folder / 'submission.tar.gz'}: {len(ids)} masks")


def parse_args(argv=None):
    """The options; see --help."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", required=True, metavar="NAME|DIR", help="dataset folder in VOC's layout (README, Data)")
    p.add_argument("--runs", type=Path, default=Path("runs"), help="where the stages write [%(default)s]")
    p.add_argument("--masks", type=Path, help="score this folder of label PNGs instead of runs/<dataset>")
    p.add_argument("--split", help="list to score --masks on [val]")
    p.add_argument("--check", action="store_true", help="check the dataset and stop")
    p.add_argument("--submit", action="store_true", help="pack stage 3's masks of test for the VOC server and stop")
    return p.parse_args(argv)


def main():
    args = parse_args()
    data = find_dataset(args.data)
    folder = args.runs / data.name
    if args.check:
        return check_dataset(data)
    if args.submit:
        return submit(data, folder)
    if args.masks:
        split = args.split or "val"
        row = score_folder(data, args.masks, split)
        if row is None:
            raise ValueError(f"{args.masks}: no PNG of {data.list_path(split)} that also has a true mask")
        print_rows([{"stage": args.masks.name, **row, **dict.fromkeys(PROVENANCE)}])
        for name, v in zip(data.classes, row["iou"]):
            print("" if np.isnan(v) else f"  {name:14} {v:5.1f}\n", end="")
        return
    rows = score_runs(data, folder)
    write_report(data, folder, rows)  # first: its pictures need no truth
    if not rows:
        raise ValueError(f"{folder}: no masks with a truth to score; python stage1_cam.py --data {args.data} makes seeds, "
                         f"{data.root}/SegmentationClass holds true masks")
    print_rows(rows)
    write_metrics(data, folder, rows)
    print(f"written: {folder / 'metrics.json'}, {folder / 'metrics.csv'}, {folder / 'report.html'}")


if __name__ == "__main__":
    run(main)
