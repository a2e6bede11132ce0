"""What things cost in CPU seconds: this checkout and another one in turn, A B A B.

run     python tests/bench.py                               # this checkout alone
        python tests/bench.py crf step --against ../before  # two parts, beside another checkout
        python tests/bench.py crf --against pydensecrf      # beside the published numbers' CRF
prints  a row a case: the median of this checkout, of the other, and their ratio

On a machine that is shared, wall time says what others did, and so does a single figure: the same
work was seen to take a third more CPU seconds beside another program. Therefore CPU seconds are
read, on one thread, in one process that has imported both checkouts, and they go by turns. Photos
are smooth noise and weights are random: what a part costs does not depend on what is seen, but for
the CRF, whose lattice grows with the variety of colours. Nothing is asserted.

The other checkout may be commit 8197e13, the last before the sources were written anew: where its
names differ there is a line that says so.
"""
import argparse
import functools
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).resolve().parents[1]
PYDENSECRF = "pydensecrf"
MASK_CRF = (3, 3), (83, 5, 3)
LOSS_CRF = (3, 3), (80, 13, 10)
PHOTO = 375, 500


# ==================================================================================== what is drawn

def smooth(channels, H, W, seed):
    """Noise (channels, H, W) that varies over some 60 pixels, as what a network says of a photo."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, channels, H // 60 + 2, W // 60 + 2, generator=generator)
    return F.interpolate(noise, (H, W), mode="bicubic")[0]


def draw(H, W, K, seed):
    """A photo (H, W, 3) uint8 with a camera's grain, and class probabilities (K, H, W) of it."""
    grain = torch.randn(3, H, W, generator=torch.Generator().manual_seed(seed))
    photo = (128 + 60 * smooth(3, H, W, seed) + 3 * grain).clamp(0, 255).byte()
    return photo.permute(1, 2, 0).contiguous().numpy(), (3 * smooth(K, H, W, seed)).softmax(0)


def draw_folder(folder, n=100):
    """A dataset in VOC's layout: eight different photos of 375 x 500, again and again."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    drawn = [draw(*PHOTO, 21, seed) for seed in range(8)]
    lines = []
    for i in range(n):
        photo, probs = drawn[i % 8]
        label = probs.argmax(0).byte().numpy()
        Image.fromarray(photo).save(folder / "JPEGImages" / f"{i}.jpg", quality=95)
        Image.fromarray(label).save(folder / "SegmentationClass" / f"{i}.png")
        shown = ", ".join(f"c{k}" for k in np.unique(label) if k > 0)
        lines.append(f"{i} {shown}\n")
    names = ["background", *(f"c{k}" for k in range(1, 21))]
    (folder / "classes.txt").write_text("\n".join(names))
    (folder / "image_labels.txt").write_text("".join(lines))
    ids = "\n".join(map(str, range(n)))
    (folder / "ImageSets" / "Segmentation" / "train.txt").write_text(ids)
    return folder


# ======================================================================================== the cases
# Each makes what it needs and returns a function that does the work once. `code` has the modules of
# the checkout that is measured, `code.old` says whether it is commit 8197e13.

MODULES = ("clip", "eval", "stage1_cam", "stage2_weakclip", "stage3_segment")


def import_code(folder, data):
    """A checkout's modules by their names, beside those of another; data: the drawn folder."""
    for name in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    modules = {name: importlib.import_module(name) for name in MODULES}
    sys.path.remove(str(folder))
    old = hasattr(modules["stage2_weakclip"], "SeededImages")
    return SimpleNamespace(**modules, old=old, folder=Path(folder), data=data)


def crf(code, K, B=1, size=PHOTO, constants=MASK_CRF):
    """The dense CRF of B photos with K labels."""
    photos, probs = zip(*(draw(*size, K, seed) for seed in range(B)))
    if code is None:
        return functools.partial(published_crf, probs[0], photos[0], *constants)
    image = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2).float()
    return functools.partial(code.stage1_cam.dense_crf, torch.stack(probs), image, *constants)


def published_crf(probs, photo, gaussian, bilateral):
    """Q (K, H, W) by the package that published numbers were made with (PyPI: pydensecrf2)."""
    densecrf = importlib.import_module("pydensecrf.densecrf")
    K, H, W = probs.shape
    solver = densecrf.DenseCRF2D(W, H, K)
    solver.setUnaryEnergy(-probs.log().reshape(K, -1).numpy())
    solver.addPairwiseGaussian(sxy=gaussian[0], compat=gaussian[1])
    sxy, srgb, weight = bilateral
    solver.addPairwiseBilateral(sxy=sxy, srgb=srgb, rgbim=photo, compat=weight)
    return np.array(solver.inference(10)).reshape(K, H, W)


def network(code):
    """WeakCLIP around ViT-B/16, with random weights."""
    torch.manual_seed(0)
    tokens = code.stage2_weakclip.name_tokens(code.eval.VOC_CLASSES, 77)
    return code.stage2_weakclip.WeakCLIP(code.clip.CLIP(), tokens)


def samples(code):
    """What makes the training samples of the three stages: functions of a sample's number."""
    data, seeds = code.eval.find_dataset(str(code.data)), code.data / "SegmentationClass"
    ids, switches = data.ids("train"), code.stage2_weakclip.Switches()
    labels = data.image_labels(ids)
    if code.old:
        sets = [code.stage1_cam.LabelledImages(data, ids, labels, 512, 0),
                code.stage2_weakclip.SeededImages(data, ids, seeds, 512, 0, switches),
                code.stage3_segment.MaskedImages(data, ids, seeds, 448, 0)]
        return [lambda i, images=images: images[i, i] for images in sets]
    makes = [functools.partial(code.stage1_cam.labelled_image, data, labels, 512),
             functools.partial(code.stage2_weakclip.seeded_image, data, seeds, 512, switches),
             functools.partial(code.stage3_segment.masked_image, data, seeds, 448)]
    return [lambda i, make=make: make(ids[i], np.random.default_rng([0, i])) for make in makes]


def loader(code):
    """Eight samples of each stage."""
    made = samples(code)
    return lambda: [make(i) for make in made for i in range(8)]


def step(code, bf16):
    """A training step of stage 2, two crops of 512: forward, losses, backward, optimizer."""
    model = network(code).train()
    switches = [model.switches]
    if code.old:
        switches += code.stage2_weakclip.mean_and_std(model.switches)
    optimizer = code.stage2_weakclip.make_optimizer(model, 1e-4)
    image, seeds = map(torch.stack, zip(*map(samples(code)[1], range(2))))

    def once():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits, score = model(image)
        losses = code.stage2_weakclip.weakclip_losses(logits, score, image, seeds, *switches)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return once


def masks(code):
    """A pseudo mask of one photo: two scales, mirrored too, then the CRF."""
    args = SimpleNamespace(scales=[0.5, 1], flip=True, no_flip=False)  # no_flip: the old name
    machine = code.stage1_cam.Machine("cpu", False)
    crop = [512] if code.old else []  # the new network knows its crop
    predict = code.stage2_weakclip.predictor(network(code), args, *crop, machine)
    # What is drawn goes to the CRF: random weights would leave it one class, and nothing to decide.
    photo, probs = draw(*PHOTO, 21, 0)

    def once():
        predict(photo)
        code.stage2_weakclip.mask_from(probs, photo, MASK_CRF, None)
    return once


def evaluation(code):
    """eval.py on a hundred masks, as a user runs it."""
    command = [sys.executable, code.folder / "eval.py", "--data", code.data, "--split", "train",
               "--masks", code.data / "SegmentationClass"]
    return functools.partial(subprocess.run, command, check=True, capture_output=True)


# part -> its cases: what is shown, the function, its options, how many rounds
CASES = {
    "crf": [*((f"dense CRF, 375 x 500, {K} labels", crf, {"K": K}, 9) for K in (4, 21, 81)),
            ("CRF of the loss, 16 of 64 x 64, 21 labels", crf,
             {"K": 21, "B": 16, "size": (64, 64), "constants": LOSS_CRF}, 25)],
    "step": [("training step, float32", step, {"bf16": False}, 5),
             ("training step, bfloat16", step, {"bf16": True}, 5)],
    "masks": [("pseudo mask, 4 views and CRF", masks, {}, 3)],
    "eval": [("eval.py, 100 photos", evaluation, {}, 9)],
    "loader": [("loader, 8 samples of each stage", loader, {}, 9)]}


def cpu_seconds():
    """Of this process and of those that it has waited for."""
    return time.process_time() + sum(os.times()[2:4])


def compete(function, options, rounds, contestants):
    """Median seconds of each contestant in a case, who go by turns."""
    works = [function(code, **options) for code in contestants]
    seconds = [[] for _ in works]
    for _ in range(rounds + 1):
        for work, own in zip(works, seconds):
            start = cpu_seconds()
            work()
            own.append(cpu_seconds() - start)
    # The first round costs more: memory is asked for, kernels are chosen.
    return [statistics.median(own[1:]) for own in seconds]


# ==================================================================================== command line

def parse_args(argv=None):
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(CASES)} [all]")
    parser.add_argument("--against", metavar="DIR", help="another checkout, or pydensecrf (crf)")
    args = parser.parse_args(argv)
    args.parts = args.parts or list(CASES)
    if not set(args.parts) <= set(CASES) or args.against == PYDENSECRF and args.parts != ["crf"]:
        parser.error(f"parts are {', '.join(CASES)}; pydensecrf has crf alone")
    return args


def main():
    """Measure, and print the table as it grows."""
    args = parse_args()
    torch.set_num_threads(1)
    print("| CPU seconds, one thread | this | other | this / other |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as data:
        data = draw_folder(Path(data))
        contestants = [import_code(HERE, data)]
        if args.against:
            is_code = args.against != PYDENSECRF
            contestants.append(import_code(args.against, data) if is_code else None)
        for name, *case in (case for part in args.parts for case in CASES[part]):
            if None in contestants and "B" in case[1]:
                continue  # pydensecrf takes one photo at a time
            this, *other = compete(*case, contestants)
            cells = [f"{other[0]:.3g}", f"{this / other[0]:.2f}"] if other else ["", ""]
            print(f"| {name} | {this:.3g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
