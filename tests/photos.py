"""Stage 2 on real photos, scored beside the baselines that any network must beat.

run     python tests/photos.py --data DIR --split train --out scores.json --seeds DIR
        python tests/photos.py --data DIR --split train --out scores.json --checkpoint FILE \\
            --clip FILE
        python tests/photos.py ... --seeds DIR --checkpoint FILE --clip FILE --picture FILE
reads   a dataset's folder with true masks; seeds as label PNGs, or a checkpoint of stage 2 and its
        CLIP
writes  --out: {"rows": {name: {"n", "miou", "iou": {class: percent}, "pixels"}}}; rows are added;
        pixels: counts (K, K + 1), row = true class, column = the mask's, the last "unsure"
        --picture: the photos that gain and lose most against the CRF on their seeds, a row each

Each photo passes the network once, and every way of making a mask of its probabilities is scored
from that: raw, with the CRF, with the image-label filter, with both. True masks are looked at for
the scores only.
"""
import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval import (IGNORE, Parser, confusion, find_dataset, label_path, overlay, read_label, run,
                  scores, write_json)
from stage1_cam import Machine, write_preview
from stage2_weakclip import (MASK_CRF, make_views, mask_from, mean_and_std, open_checkpoint,
                             predictor, resize)

# Of a seed's own label, where the CRF starts from seeds alone. GUESS the usual one for hard labels
CERTAINTY = 0.7
# A class is small in a photo that it covers less of, and thin where no square of this side fits.
SMALL = 0.05
THIN = 17


def seed_probabilities(seed, classes):
    """Seed (H, W) -> probabilities (K, H, W).

    0.7 for a pixel's own label; the seed's other labels share 0.3. Where the seed is unsure (255)
    its labels are equally likely. A class that the seed lacks has 0 and never wins.
    """
    present = [k for k in np.unique(seed) if k != IGNORE]
    probs = torch.zeros(classes, *seed.shape)
    for k in present:
        own = CERTAINTY if len(present) > 1 else 1.0
        other = (1 - CERTAINTY) / max(1, len(present) - 1)
        values = np.select([seed == k, seed == IGNORE], [own, 1 / len(present)], other)
        probs[int(k)] = torch.from_numpy(values)
    return probs  # (K, H, W)


def crf_on_seed(data, image_id, seed):
    """What the CRF makes of a seed (H, W) without any network: a mask (H, W)."""
    probs = seed_probabilities(seed, len(data.classes))
    return mask_from(probs, data.image(image_id), MASK_CRF["VOC2012"])[0]


def masks_of(name, probs, image, allowed):
    """{row: mask (H, W)}: what can be made of one photo's class probabilities (K, H, W)."""
    rows = ["raw", "CRF"]
    masks = raw_and_refined(probs, image, None)
    if allowed:
        rows += ["label filter", "CRF and label filter"]
        masks += raw_and_refined(probs, image, allowed)
    return {f"{name}, {row}": mask for row, mask in zip(rows, masks)}


def raw_and_refined(probs, image, allowed):
    """[mask without the CRF, mask with it], each (H, W); allowed: as `mask_from` takes it."""
    return [mask_from(probs, image, crf, allowed)[0] for crf in (None, MASK_CRF["VOC2012"])]


class Table:
    """A confusion matrix per row, and the JSON file that keeps the scores of finished rows."""

    def __init__(self, path, data, common):
        self.path, self.data, self.common, self.matrices = path, data, common, {}
        self.kept = json.loads(path.read_text()) if path.is_file() else {"rows": {}}

    def add(self, row, truth, mask):
        """Count one photo's pixels for a row."""
        K = len(self.data.classes)
        self.matrices[row] = self.matrices.get(row, 0) + confusion(truth, mask, K)

    def keep(self, n, facts):
        """Write the rows counted so far.

        miou is the mean over background and the common classes; iou has every class.
        """
        for row, matrix in self.matrices.items():
            iou = dict(zip(self.data.classes, scores(matrix)["iou"].tolist()))
            named = [iou[c] for c in (self.data.classes[0], *self.common)]
            self.kept["rows"][row] = {"n": n, "miou": float(np.mean(named)), **facts,
                                      "iou": {c: round(v, 2) for c, v in iou.items() if v == v},
                                      "pixels": matrix.tolist()}
            print(f"{row:50} {n:4} photos  mIoU {np.mean(named):5.1f}")
        write_json(self.path, self.kept)
        self.matrices = {}


def score_seeds(data, ids, folder, table):
    """Rows of the seeds, and of the CRF on the seeds: the baseline without any network."""
    for image_id in tqdm(ids, desc="seeds"):
        seed = read_label(label_path(folder, image_id), len(data.classes))
        truth = read_label(data.truth_path(image_id))
        table.add("seeds", truth, seed)
        table.add("CRF on the seeds", truth, crf_on_seed(data, image_id, seed))
    table.keep(len(ids), {})


def open_network(data, args, checkpoint):
    """A checkpoint's model, machine and iterations; predict: image -> probabilities (K, H, W)."""
    machine = Machine(args.device, args.amp)
    model, crop, iters, outputs = open_checkpoint(checkpoint, args, machine, data.classes)
    predict = predictor(model, args, crop, machine, outputs)
    return SimpleNamespace(model=model, machine=machine, iters=iters, predict=predict)


def score_checkpoint(data, ids, filtered, args, table):
    """Rows of one checkpoint's masks."""
    network = open_network(data, args, args.checkpoint)
    labels = data.image_labels(ids) if filtered else {}
    name = f"{args.name} {args.split}, {network.iters} iterations, "
    name += f"scales {' '.join(map(str, args.scales))}"
    name += "" if args.no_flip else " and mirrors"
    for image_id in tqdm(ids, desc=name):
        image, truth = data.image(image_id), read_label(data.truth_path(image_id))
        with torch.no_grad():
            probs = network.predict(image)
        allowed = [0, *labels[image_id]] if filtered else None
        for row, mask in masks_of(name, probs, image, allowed).items():
            table.add(row, truth, mask)
    facts = {"iters": network.iters, "scales": args.scales, "flip": not args.no_flip}
    table.keep(len(ids), facts)


def photo_score(truth, mask, K):
    """Mean IoU of one photo over the classes in its truth."""
    matrix = confusion(truth, mask, K)
    return np.mean(scores(matrix)["iou"][matrix.sum(1) > 0])


def compare_photos(data, ids, args):
    """Print what the masks of each photo gain over the CRF on its seeds, and where.

    Masks have the CRF and are filtered by the image's labels. Draws the twenty extremes to
    --picture.
    """
    network = open_network(data, args, args.checkpoint)
    labels = data.image_labels(ids)
    K = len(data.classes)
    gains, counts = [], defaultdict(lambda: np.zeros(3))
    for image_id in tqdm(ids, desc="gains"):
        image, truth = data.image(image_id), read_label(data.truth_path(image_id))
        seed = read_label(label_path(args.seeds, image_id), K)
        raw, refined = filtered_masks(network, image, labels[image_id])
        masks = {"seeds": seed, "CRF on the seeds": crf_on_seed(data, image_id, seed),
                 "label filter": raw, "CRF and label filter": refined}
        gain = photo_score(truth, refined, K) - photo_score(truth, masks["CRF on the seeds"], K)
        gains.append((gain, image_id))
        count_parts(counts, truth, masks, labels[image_id])
    gains.sort(reverse=True)
    values = [gain for gain, _ in gains]
    print(f"{np.mean(np.greater(values, 0)):.0%} of {len(values)} photos gain, median "
          f"{np.median(values):+.1f}, quarters {np.percentile(values, 25):+.1f} and "
          f"{np.percentile(values, 75):+.1f}")
    for (k, part, row), (n, hits, pixels) in sorted(counts.items()):
        print(f"{data.classes[k]:12} {part:28} {row:22} {int(n):4} photos "
              f"{100 * hits / max(1, pixels):5.1f}")
    for gain, image_id in gains[:10] + gains[-10:]:
        print(f"{image_id} {gain:+6.1f} {', '.join(data.classes[k] for k in labels[image_id])}")
    draw_photos(data, [image_id for _, image_id in gains[:10] + gains[-10:]], labels, network, args)


def draw_photos(data, ids, labels, network, args, side=200):
    """Write --picture, a row for each photo: seed, CRF on it, score map, raw mask, CRF, truth.

    With --earlier, that checkpoint's score map and raw mask stand before the others.
    """
    earlier = open_network(data, args, args.earlier) if args.earlier else None
    rows = []
    for image_id in ids:
        image, truth = data.image(image_id), read_label(data.truth_path(image_id))
        seed = read_label(label_path(args.seeds, image_id), len(data.classes))
        masks = [0 * truth, seed, crf_on_seed(data, image_id, seed)]
        named = labels[image_id]
        if earlier:
            masks += [score_mask(earlier, image, named), filtered_masks(earlier, image, named)[0]]
        masks += [score_mask(network, image, named), *filtered_masks(network, image, named), truth]
        rows.append([overlay(image, mask, data.classes, side) for mask in masks])
    write_preview(args.picture, rows, side)


def count_parts(counts, truth, masks, labels):
    """Add one photo to counts[class, part, row] = (photos, hits, pixels), for each of its classes.

    Parts: IoU where the class covers less than SMALL of the photo, IoU where it covers more;
    recall of what is thin in the truth, and of the rest; precision of what is thin in the mask.
    """
    for k in labels:
        true = truth == k
        small = true.mean() < SMALL
        thin = true & ~opened(true)
        for row, mask in masks.items():
            named = (mask == k) & (truth != IGNORE)
            iou = (1, (true & named).sum(), (true | named).sum())
            counts[k, f"IoU, {'under' if small else 'over'} {SMALL:.0%} of the photo", row] += iou
            counts[k, "recall, thin parts", row] += (1, (thin & named).sum(), thin.sum())
            counts[k, "recall, the rest", row] += (1, (true & ~thin & named).sum(),
                                                   (true & ~thin).sum())
            fine = named & ~opened(named)
            counts[k, "precision, thin parts", row] += (1, (fine & true).sum(), fine.sum())


def opened(region):
    """Morphological opening: the pixels of a region (H, W) that a square of THIN lies over."""
    x = torch.from_numpy(region).float()[None, None]  # (1, 1, H, W)
    for sign in (-1, 1):  # erosion is a dilation of what is outside
        x = sign * torch.nn.functional.max_pool2d(sign * x, THIN, 1, THIN // 2)
    return x[0, 0].numpy() > 0


def filtered_masks(network, image, labels):
    """A network's masks (H, W) of one photo, raw and with the CRF, of the image's labels alone."""
    with torch.no_grad():
        probs = network.predict(image)
    return raw_and_refined(probs, image, [0, *labels])


def score_mask(network, image, labels):
    """(H, W): the allowed class that the score map of the whole photo, at scale 1, likes best."""
    (x, _), = make_views(image, [1.0], False, mean_and_std(network.model.switches))
    machine = network.machine
    with torch.no_grad(), machine.autocast():
        score = network.model(x.to(machine.device))[1].float()  # (1, K, h, w) cosines
    allowed = np.asarray([0, *labels], np.uint8)
    best = resize(score[:, torch.from_numpy(allowed).long()], image.shape[:2])[0].argmax(0)
    return allowed[best.cpu().numpy()]


def parse_args():
    """The command line."""
    p = Parser(description=__doc__.splitlines()[0])
    p.add_argument("--data", required=True, help="dataset folder in VOC's layout, with true masks")
    p.add_argument("--split", required=True, help="list of photos to score")
    p.add_argument("--limit", type=int, help="only the first photos of the list")
    p.add_argument("--every", type=int, default=1,
                   help="only every n-th photo of the list [%(default)s]")
    p.add_argument("--out", type=Path, required=True, help="JSON file that keeps the rows")
    p.add_argument("--common", nargs="+", default=["cat", "cow", "dog", "horse", "person", "sheep"],
                   help="classes that the mean is over, besides background [%(default)s]")
    p.add_argument("--seeds", type=Path,
                   help="folder of label PNGs: score them, and the CRF on them")
    p.add_argument("--checkpoint", type=Path, help="checkpoint of stage 2: score its masks")
    p.add_argument("--earlier", type=Path,
                   help="for --picture: an earlier checkpoint of the same run, drawn beside")
    p.add_argument("--clip", help="the CLIP that the checkpoint was trained with")
    p.add_argument("--picture", type=Path, help="PNG of the twenty photos that changed most")
    p.add_argument("--name", default="masks", help="first words of the rows' names [%(default)s]")
    p.add_argument("--scales", type=float, nargs="+", default=[1.0],
                   help="test scales [%(default)s]")
    p.add_argument("--no-flip", action="store_true", help="leave out the mirror images")
    p.add_argument("--filter", action="store_true",
                   help="also with the image-label filter: training photos only")
    p.add_argument("--device", default="auto", help="as in the stages [%(default)s]")
    p.add_argument("--amp", action="store_true", help="bfloat16")
    p.set_defaults(seed=0, set=[])
    return p.parse_args()


def main():
    """Score seeds, or a checkpoint's masks."""
    args = parse_args()
    data = find_dataset(args.data)
    ids = data.ids(args.split, args.limit)[::args.every]
    table = Table(args.out, data, args.common)
    if args.picture:
        return compare_photos(data, ids, args)
    if args.seeds:
        score_seeds(data, ids, args.seeds, table)
    if args.checkpoint:
        score_checkpoint(data, ids, args.filter, args, table)


if __name__ == "__main__":
    run(main)
