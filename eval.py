"""What the stages are given and how they are judged: the dataset folder, label PNGs, scores.

run     python eval.py --data VOC2012                       # everything found in runs/VOC2012
        python eval.py --data VOC2012 --masks DIR --split val   # any folder of label PNGs
        python eval.py --data VOC2012 --check               # is the dataset complete and sound?
        python eval.py --data VOC2012 --submit              # archive for the VOC evaluation server
reads   VOC2012/SegmentationClass/<id>.png (true masks), runs/VOC2012/*/{seeds,masks/<split>}/<id>.png
writes  runs/VOC2012/{metrics.json, metrics.csv}

Every stage imports this file: it holds no network and needs no torch.
"""
import argparse
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
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

IGNORE = 255  # "unsure" in our masks, the void border in VOC's: neither trained on nor scored
VOC_CLASSES = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
               "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")


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
    write_whole(path, lambda f: f.write(text.encode("utf-8")))


def write_json(path, value):
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
        return self.root / "ImageSets" / "Segmentation" / f"{split}.txt"

    def has(self, split):
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

    def digests(self, *splits):
        """sha256 of the lists and of the classes: what tells one dataset from another when a run is resumed."""
        parts = {split: "\n".join(self.ids(split)) for split in splits if self.has(split)}
        parts["classes"] = "\n".join(self.classes)
        return {k: hashlib.sha256(v.encode()).hexdigest() for k, v in parts.items()}


def annotated_objects(path):
    """Names of every object in a VOC annotation, difficult ones too."""
    try:
        return [o.findtext("name", "").strip() for o in ElementTree.parse(path).getroot().iter("object")]
    except ElementTree.ParseError as e:
        raise ValueError(f"{path}: not a readable annotation ({e})") from None


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
    return Dataset(root, root.resolve().name, classes)


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
    An "unsure" pixel is a miss for its class. miou: mean over the classes that occur (METHOD: one dataset-wide matrix).
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

    def one(i):
        truth = read_label(data.truth_path(i), K)
        return confusion(truth, read_label(folder / f"{i}.png", K, truth.shape), K)
    matrix = sum(for_each(one, both, f"scoring {folder}"))
    truths = sorted({data.truth_path(i).parent.name for i in both})
    return {"split": split, "n": len(both), "of": len(ids), "truth": "+".join(truths), **scores(matrix)}


PROVENANCE = ("scales", "flip", "crf", "label_filter", "iters")  # of a row; None where the masks' maker did not say


def read_args(folder):
    """args.json of a stage's folder, {} where there is none."""
    path = folder / "args.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def score_runs(data, folder):
    """Rows for everything the stages left in runs/<dataset>."""
    rows = []
    for stage in ("1_cam", "2_weakclip", "3_segment"):
        said = read_args(folder / stage)
        training = said.get("options", {}).get("split")
        found = [(training, folder / stage / "seeds")] if stage == "1_cam" else \
            [(p.name, p) for p in sorted((folder / stage / "masks").glob("*"))]
        for split, masks in found:
            if split is None or not masks.is_dir() or not data.has(split):
                continue
            row = score_folder(data, masks, split, said["options"].get("limit"))
            if row:
                facts = {k: said.get("provenance", {}).get(k) for k in PROVENANCE}
                facts["label_filter"] = bool(facts["label_filter"]) and split == training  # never on val or test
                rows.append({"stage": stage, **row, **facts})
    return rows


def print_rows(rows):
    """The table, a line a row: no number without where it comes from."""
    print(f"{'stage':12} {'split':9} {'images':>12} {'mIoU':>6} {'pixels':>7}  how")
    for r in rows:
        how = [f"{r['iters']} iterations" if r["iters"] else "", f"scales {r['scales']}" if r["scales"] else "",
               "flip" if r["flip"] else "", "CRF" if r["crf"] else "no CRF" if r["crf"] is False else "",
               "image-label filter" if r["label_filter"] else "", f"truth {r['truth']}"]
        print(f"{r['stage']:12} {r['split']:9} {r['n']:5} of {r['of']:4} {r['miou']:6.1f} {r['pixel_accuracy']:6.1f}%  "
              + ", ".join(h for h in how if h))


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
    if not rows:
        raise ValueError(f"{folder}: no masks with a truth to score; run stage1_cam.py --data {args.data} first")
    print_rows(rows)
    write_metrics(data, folder, rows)
    print(f"written: {folder / 'metrics.json'}, {folder / 'metrics.csv'}")


if __name__ == "__main__":
    run(main)
