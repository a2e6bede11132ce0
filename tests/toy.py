"""A small world in which the whole paper runs on a laptop: draws a dataset, brings a small CLIP, runs the three stages.

run     python tests/toy.py                 # the chain on world 0, some nine minutes on two cores; again: seconds
        python tests/toy.py --small         # a reduced run, what the tests do
        python tests/toy.py --world 7       # another world
        python tests/toy.py --ablate        # one part of WeakCLIP taken out at a time, 3 seeds each: long, resumable
        python tests/toy.py --pretrain      # train tests/toy_clip.pt anew, from drawn pictures and their captions
        python tests/toy.py --zero-shot     # how well it tells the classes of unseen pictures
writes  runs/toy/data/toy<N> (VOC's layout), runs/toy/clip_*.pt, runs/toy/ablate/, and in runs/toy/toy<N>/: 1_cam, 2_weakclip,
        3_segment, crf_on_cams, crf_on_probs, upper_bound, resnet18.pt (stage 3's start), rows.json (the table), metrics.json,
        metrics.csv, report.html; with --small, small<N> for toy<N>; --pretrain: tests/toy_clip.pt, runs/toy/pretrained.pt

The creatures have the same body in any coat; only beak, ears, horns, tail, feet and marks, in a colour of the class's own,
tell it, and each class has a place where it is seen more often. A classifier looks at parts and at places: the known faults
of CAM. One picture in ten shows a place and nobody.
The CLIP has CLIP's architecture and is trained by contrast on pictures and captions of such worlds, never on a mask. Unlike
OpenAI's it is small, has seen nothing but these worlds, and matched patches with captions too (`pretrain`).
The stages know nothing of all this; they are run with options that any dataset could be run with.
"""
import argparse
import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import clip
from eval import find_dataset, run, score_folder, write_json, write_label, write_text, write_whole
from stage1_cam import Machine, cam_scores, read_checkpoint
from stage2_weakclip import CLIP_MEAN, CLIP_STD, MASK_CRF, PAPER, RELEASED, mask_from

WEIGHTS = Path(__file__).with_name("toy_clip.pt")
WEIGHTS_SHA256 = "338581e07b26e8911ef8755aaa4f18867b8b603f4bd56fce70b571e7ec7209a7"
SIZE = 128  # pixels, height and width of a picture
CLASSES = ("background", "bird", "cat", "cow", "dog", "horse", "pig", "rabbit", "sheep")


# ============================================================================================================ the world

# coats, of any class
COLOURS = {"grey": (130, 130, 135), "blue": (75, 105, 185), "green": (70, 130, 75), "brown": (150, 100, 75),
           "teal": (50, 150, 150), "olive": (130, 125, 60), "mint": (150, 205, 170)}
# place -> (colour of the upper part, of the lower part, who is at home there)
PLACES = {"in the sky": ((150, 195, 235), (190, 220, 240), "bird"), "in a room": ((205, 180, 140), (150, 105, 70), "cat"),
          "on grass": ((170, 205, 225), (95, 150, 60), "cow"), "on the beach": ((80, 150, 190), (225, 205, 155), "dog"),
          "in the desert": ((235, 200, 150), (205, 150, 90), "horse"), "in mud": ((140, 150, 120), (90, 70, 50), "pig"),
          "in snow": ((140, 160, 190), (170, 195, 230), "rabbit"),
          "among flowers": ((140, 190, 160), (60, 110, 65), "sheep")}
HOME = 0.25  # chance that a picture's first creature is the one at home there (a further one: half); else any of the eight


def ellipse(x, y, rx, ry, n=20):
    """Corner points (n, 2) of an ellipse."""
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], 1)


def stroke(points, width):
    """A bent line as polygon (2n, 2), thinner towards its end."""
    p = np.asarray(points, float)
    d = np.gradient(p, axis=0)
    side = np.stack([-d[:, 1], d[:, 0]], 1) / np.linalg.norm(d, axis=1, keepdims=True)
    side *= width / 2 * np.linspace(1, 0.6, len(p))[:, None]
    return np.concatenate([p + side, (p - side)[::-1]])


def body(rng, paw):
    """What all creatures share, as [(polygon, colour)]: tail's root is at (-0.5, 0), the face looks right.

    paw: the colour of the feet, which is that of the class's other parts.
    """
    legs = [[(x, 0.1), (x + rng.uniform(-0.06, 0.06), 0.56)] for x in (-0.36, 0.15, -0.17, 0.34)]
    spots = [ellipse(*rng.uniform((-0.35, -0.15), (0.3, 0.15)), *rng.uniform(0.05, 0.11, 2))
             for _ in range(rng.integers(0, 5))]
    limbs = [[(stroke(leg, 0.19), coat), (ellipse(*leg[1], 0.1, 0.08), paw)]
             for leg, coat in zip(legs, ("dark", "dark", "coat", "coat"))]
    return [*sum(limbs, []), (ellipse(0, 0, 0.54, 0.31), "coat"),
            (stroke([(0.3, -0.05), (0.52, -0.4)], 0.3), "coat"), *((s, "spot") for s in spots)]


# class -> colour of the parts that tell it; no coat has these, and nothing large in a place does
PARTS = {"bird": (120, 250, 20), "cat": (22, 20, 28), "cow": (10, 235, 250), "dog": (235, 25, 30), "horse": (250, 225, 25),
         "pig": (250, 95, 170), "rabbit": (180, 40, 250), "sheep": (248, 246, 240)}


def parts(name, c, rng):
    """What tells a class, in its colour c: [(polygon, colour)] behind the body, and in front of it all.

    The head is a disc at (0.55, -0.42).
    """
    j = rng.uniform(-0.05, 0.05, 4)
    if name == "bird":                                                         # tail feathers; beak, wing
        return [([(-0.42, -0.1), (-1.0, -0.4 + j[0]), (-0.9, 0.0), (-1.0, 0.2 + j[1]), (-0.42, 0.12)], c)], \
            [([(0.68, -0.62), (1.2, -0.36 + j[2]), (0.68, -0.24)], c),
             ([(0.26, -0.16), (-0.04, 0.18), (-0.46, 0.1 + j[3]), (-0.24, -0.2)], c)]
    if name == "cat":                                                          # raised tail, pointed ears; whiskers, stripes
        return [(stroke([(-0.48, 0), (-0.68, -0.12), (-0.72, -0.35), (-0.64 + j[0], -0.6)], 0.2), c),
                ([(0.34, -0.55), (0.3 + j[1], -1.0), (0.58, -0.68)], c),
                ([(0.56, -0.68), (0.82 + j[2], -1.0), (0.8, -0.5)], c)], \
            [*((stroke([(0.62, -0.3), (0.9, -0.34 + d)], 0.05), c) for d in (-0.06, 0.06, 0.18)),
             *((stroke([(x, -0.29), (x + j[3], 0.14)], 0.14), c) for x in (-0.36, -0.12, 0.12))]
    if name == "cow":                                                          # horns, udder; muzzle, patches
        return [(stroke([(0.4, -0.6), (0.25, -0.8), (0.3 + j[0], -1.02)], 0.16), c),
                (stroke([(0.68, -0.6), (0.85, -0.8), (0.8 + j[1], -1.02)], 0.16), c), (ellipse(-0.15, 0.3, 0.2, 0.14), c)], \
            [(ellipse(0.72, -0.3, 0.2, 0.15), c), (ellipse(0.78, -0.32, 0.04, 0.04), (20, 60, 90)),
             (ellipse(-0.3, -0.08 + j[2], 0.15, 0.12), c), (ellipse(0.08, 0.03 + j[3], 0.15, 0.11), c)]
    if name == "dog":                                                          # tail; hanging ear, tongue, saddle
        return [(stroke([(-0.48, -0.05), (-0.7, -0.25), (-0.85 + j[0], -0.3)], 0.16), c)], \
            [(ellipse(0.38, -0.36, 0.12, 0.3 + j[1]), c), (ellipse(0.82, -0.15, 0.09, 0.18 + j[2]), c),
             (ellipse(0.8, -0.42, 0.09, 0.08), (90, 40, 40)),
             ([(-0.38, -0.21), (0.0, -0.3), (0.06, -0.04 + j[3]), (-0.12, 0.1), (-0.34, 0.02)], c)]
    if name == "horse":                                                        # tail; mane, line on the back, girth, long face
        mane = [(0.45, -0.75), (0.3, -0.8), (0.3, -0.65), (0.14, -0.66), (0.18, -0.48), (0.02, -0.44), (0.1, -0.28),
                (0.45, -0.3)]
        return [(stroke([(-0.48, -0.1), (-0.66, 0.0), (-0.7, 0.2), (-0.66 + j[0], 0.42)], 0.24), c)], \
            [(mane, c), (stroke([(-0.5, -0.1), (-0.2, -0.25), (0.1, -0.28 + j[2])], 0.14), c),
             (stroke([(-0.16, -0.28), (-0.1 + j[3], 0.0), (-0.12, 0.28)], 0.2), c),
             (stroke([(0.55, -0.45), (0.98, -0.2 + j[1])], 0.28), "coat")]
    if name == "pig":                                                          # curly tail, small ears; snout, belly
        t = np.linspace(0, 3 * np.pi, 14)
        return [(stroke(np.stack([-0.52 - 0.025 * t, -0.06 - 0.12 * np.sin(t)], 1), 0.12), c),
                ([(0.36, -0.58), (0.26 + j[0], -0.84), (0.56, -0.66)], c),
                ([(0.58, -0.66), (0.86 + j[1], -0.84), (0.78, -0.56)], c)], \
            [(ellipse(-0.1 + j[2], 0.22, 0.27, 0.11), c), (ellipse(0.74, -0.36, 0.17, 0.19), c),
             *((ellipse(x, -0.36, 0.04, 0.07), (110, 30, 60)) for x in (0.69, 0.8))]
    if name == "rabbit":                                                       # long ears, round tail; nose, haunch, shoulder
        ears = [(stroke([(0.45 + 0.2 * k, -0.55), (0.4 + 0.25 * k, -0.95), (0.3 + 0.4 * k + j[k], -1.2)], w), colour)
                for k in (0, 1) for w, colour in ((0.28, "coat"), (0.2, c))]
        return [*ears, (ellipse(-0.58, -0.05, 0.18, 0.18), c)], \
            [(ellipse(0.78, -0.38, 0.08, 0.07), c), (ellipse(-0.3 + j[3], 0.08, 0.16, 0.17), c),
             (ellipse(0.14 + j[2], 0.02, 0.13, 0.14), c)]
    curls = [ellipse(x, y, 0.13, 0.13, 10) for x, y in ((0.36, -0.6), (0.5, -0.7), (0.66, -0.66), (0.34, -0.42))]
    back = [ellipse(x, rng.uniform(-0.33, -0.26), 0.13, 0.13, 10) for x in (-0.42, -0.24, -0.06, 0.12)]
    side = [ellipse(x, y + j[0], 0.12, 0.11, 10) for x, y in ((-0.5, 0.0), (-0.26, 0.1), (-0.02, 0.12), (0.2, 0.04))]
    return [], [(curl, c) for curl in curls + back + side]                     # sheep: wool


def creature(draw, mask, name, coat, at, unit, rng, portrait=False):
    """Draw one creature into a picture and its class number into a mask (two ImageDraws).

    unit: pixels per body length; at: where its middle is, or, in a portrait, its head.
    """
    mirror, angle = rng.choice([-1, 1]), rng.uniform(-0.25, 0.25)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) * unit * [[mirror], [1]]
    shade = lambda f: tuple(int(c) for c in np.clip(np.array(coat) * f, 0, 255))
    named = {"coat": shade(1), "dark": shade(0.8), "spot": shade(rng.choice([0.75, 1.25]))}
    at = at - turn @ (0.4, -0.5) if portrait else at
    own = tuple(int(c) for c in np.clip(np.array(PARTS[name]) + rng.integers(-15, 16, 3), 0, 255))
    behind, front = parts(name, own, rng)
    head = [(ellipse(0.55, -0.42, 0.27, 0.26), "coat"), (ellipse(0.62, -0.48, 0.04, 0.04), (80, 60, 50))]
    for polygon, colour in [*behind, *body(rng, own), *head, *front]:
        corners = [tuple(p) for p in np.asarray(polygon, float) @ turn.T + at]
        draw.polygon(corners, fill=named[colour] if isinstance(colour, str) else colour)
        mask.polygon(corners, fill=CLASSES.index(name))


def scenery(draw, place, side, rng):
    """Ground, sky and the things of a place. Returns the two ground colours."""
    upper, lower = (tuple(int(c) for c in np.array(c) + rng.integers(-15, 16, 3)) for c in PLACES[place][:2])
    horizon = side * rng.uniform(0.25, 0.6)
    draw.rectangle((0, 0, side, side), fill=upper)
    draw.rectangle((0, horizon, side, side), fill=lower)
    spot = lambda: (rng.uniform(0, side), rng.uniform(horizon, side))
    blob = lambda x, y, rx, ry, c: draw.polygon([tuple(p) for p in ellipse(x, y, side * rx, side * ry)], fill=c)
    for _ in range(25):  # tufts, stones, ripples: the ground's texture
        x, y = spot()
        blob(x, y, *rng.uniform(0.01, 0.05, 2), tuple(int(c * rng.uniform(0.88, 1.1)) for c in lower))
    for _ in range(rng.integers(2, 5)):
        x, r = rng.uniform(0, side), rng.uniform(0.05, 0.1)
        if place == "in the sky":
            blob(x, rng.uniform(0, side), 2 * r, r, (195, 210, 232))
        elif place == "in a room":
            window = (x, horizon * 0.2, x + side * 0.2, horizon * 0.8)
            draw.rectangle(window, fill=(170, 210, 230), outline=(90, 60, 40), width=side // 50)
        elif place == "on grass":
            for y in (0.05, 0.12):
                draw.line((0, horizon + side * y, side, horizon + side * y), fill=(120, 85, 55), width=side // 50)
            draw.line((x, horizon, x, horizon + side * 0.2), fill=(120, 85, 55), width=side // 35)
        elif place == "on the beach":
            blob(x, horizon, 2 * r, r / 4, (200, 225, 235))
            blob(*spot(), r * 0.7, r * 0.7, (220, 80, 70))
        elif place == "in the desert":
            draw.line((x, horizon - side * r, x, horizon + side * r), fill=(60, 120, 70), width=side // 20)
            arm = (x, horizon, x + side * r, horizon, x + side * r, horizon - side * r)
            draw.line(arm, fill=(60, 120, 70), width=side // 30)
        elif place == "in mud":
            blob(*spot(), 2 * r, r * 0.7, (115, 105, 95))
        elif place == "in snow":
            fir = [(x - side * r, horizon + side * r), (x, horizon - side * 2 * r), (x + side * r, horizon + side * r)]
            draw.polygon(fir, fill=(50, 85, 70))
        else:
            for _ in range(5):
                blob(*spot(), 0.022, 0.022, [(245, 165, 90), (225, 120, 130), (150, 140, 235)][rng.integers(3)])
    return upper, lower


def scene(rng, close=0.0, home=HOME, sizes=(0.3, 0.5), counts=(0.1, 0.6, 0.25, 0.05)):
    """One picture: image (SIZE, SIZE, 3) uint8, mask (SIZE, SIZE) uint8, and what is in it: (place, [(class, colour)]).

    close: chance of a close-up of one creature; home: see HOME; sizes: of a body, as part of the picture's side;
    counts: chances of none, one, two and three creatures. Without pictures of none, a classifier may take a class for what
    is there when no other class is, and its CAM covers the ground (measured: tests/RESULTS.md).
    """
    side = 2 * SIZE  # drawn twice as large, then reduced: soft edges in the image
    image, mask = Image.new("RGB", (side, side)), Image.new("L", (side, side))
    draw, draw_mask = ImageDraw.Draw(image), ImageDraw.Draw(mask)
    place = list(PLACES)[rng.integers(len(PLACES))]
    grounds = np.array(scenery(draw, place, side, rng), float)
    near = rng.random() < close
    count = 1 if near else int(rng.choice(4, p=counts))
    centres, things = [], []
    for k in range(count):
        at_home = rng.random() < (home if k == 0 else home / 2)
        name = PLACES[place][2] if at_home else CLASSES[1 + rng.integers(len(CLASSES) - 1)]
        while True:  # any coat, but one that stands out from the ground
            colour = list(COLOURS)[rng.integers(len(COLOURS))]
            coat = np.clip(np.array(COLOURS[colour]) + rng.integers(-20, 21, 3), 0, 255)
            if np.linalg.norm(grounds - coat, axis=1).min() > 70:
                break
        unit = side * (rng.uniform(0.35, 0.8) if near else rng.uniform(*sizes))
        spread = 0.35 if near else 0.25
        tries = [rng.uniform(spread, 1 - spread, 2) * side for _ in range(6)]
        at = max(tries, key=lambda p: min([np.linalg.norm(p - c) for c in centres], default=0))  # beside, at times over
        centres.append(at)
        creature(draw, draw_mask, name, coat, at, unit, rng, portrait=near)
        things.append((name, colour))
    for _ in range(rng.integers(0, 3)):  # something of the ground's colour in front
        x, y, r = rng.uniform(0, side), rng.uniform(0.6, 1) * side, rng.uniform(0.04, 0.08) * side
        bush = [tuple(p) for p in ellipse(x, y, r, r * rng.uniform(0.5, 1.5), 9)]
        draw.polygon(bush, fill=tuple(int(c * 0.85) for c in grounds[1]))
        draw_mask.polygon(bush, fill=0)
    image = np.asarray(image.reduce(2), np.float32)
    light = np.linspace(rng.uniform(0.85, 1.1), rng.uniform(0.85, 1.1), SIZE)[None, :, None]
    image = image * light + rng.normal(0, 3, image.shape)
    mask = np.asarray(mask)[1::2, 1::2]
    things = [t for t in things if (mask == CLASSES.index(t[0])).sum() >= 60]  # what is hidden is not told
    return image.clip(0, 255).astype(np.uint8), mask, (place, things)


def drawing_digest(seed):
    """Tells a world from one that another version of this file would draw: of the constants and 64 pictures."""
    sha = hashlib.sha256(repr((SIZE, PLACES, COLOURS, PARTS, scene.__defaults__)).encode())
    for i in range(64):  # every class and place is among them
        image, mask, _ = scene(np.random.default_rng([seed, i]))
        sha.update(image.tobytes() + mask.tobytes())
    return sha.hexdigest()


def draw_world(folder, seed, train=600, val=150):
    """A dataset in VOC's layout, and beside it places.txt, the same for the same seed. Returns what tells it from others.

    What stands there already is left, if it is the same; ValueError if not.
    """
    folder, labels, places = Path(folder), [], []
    made, facts = folder / "world.json", {"seed": seed, "train": train, "val": val, "drawing": drawing_digest(seed)}
    if made.is_file():                                                         # written last
        if json.loads(made.read_text()) != facts:
            raise ValueError(f"{folder} was drawn by another version of {Path(__file__).name}; remove it")
        return facts
    for i in range(train + val):
        image, mask, (place, _) = scene(np.random.default_rng([seed, i]))
        name = f"{i:05d}"
        write_whole(folder / "JPEGImages" / f"{name}.jpg", lambda f: Image.fromarray(image).save(f, "JPEG", quality=95))
        write_label(folder / "SegmentationClass" / f"{name}.png", mask)
        labels.append(f"{name} " + ", ".join(CLASSES[k] for k in np.unique(mask) if k))
        places.append(f"{name} {place}\n")
    write_text(folder / "places.txt", "".join(places))                         # no stage reads them
    write_text(folder / "image_labels.txt", "\n".join(labels) + "\n")
    write_text(folder / "classes.txt", "\n".join(CLASSES) + "\n")
    for split, part in (("train", labels[:train]), ("val", labels[train:])):
        write_text(folder / f"ImageSets/Segmentation/{split}.txt", "".join(line.split()[0] + "\n" for line in part))
    write_json(made, facts)
    return facts


# ======================================================================================================= the small CLIP

def caption(place, things, rng):
    """What a caption's author might write: the creatures, or one, or the place; at times colours, numbers and templates.

    Of a picture of nobody: the place, or that nothing is there.
    """
    ground = place.split(" ", 1)[1]                                            # "on grass" -> "grass"
    if not things or rng.random() < 0.1:
        text = [ground, f"a photo of {ground}", f"{ground} in the background", f"the background is {ground}"]
        return str(rng.choice(text if things else [*text, "background", f"nothing {place}", "a photo of the background"]))
    if rng.random() < 0.3:
        things = [things[rng.integers(len(things))]]
    coloured, short = rng.random() < 0.2, rng.random() < 0.5
    named = [f"{colour} {name}" if coloured and not short else name for name, colour in things]
    named = [(n, named.count(n)) for n in rng.permutation(sorted(set(named)))]
    article = lambda n: "an" if n[0] in "aeiou" else "a"
    several = lambda n, c: f"{('two', 'three')[c - 2]} {n}" + ("" if n.endswith("sheep") else "s")
    text = " and ".join(n if short else f"{article(n)} {n}" if c == 1 else several(n, c) for n, c in named)
    if not short:
        text = str(rng.choice(["", "a photo of ", "a picture of ", "there is ", "look , "])) + text
    where = rng.random()
    return f"{text} {place}" if where < 0.15 else f"{text} , {ground} in the background" if where < 0.3 else text


def to_batch(images):
    """(B, H, W, 3) uint8 array -> (B, 3, H, W) float32, normalised as for CLIP."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    return (x - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def zero_shot(model, n=128):
    """Accuracy in percent on unseen pictures of one creature at any place, which of the 8 names fits best."""
    rng = np.random.default_rng(990_000)
    scenes = [s for s in (scene(rng, close=0.3, home=0, counts=(0, 1, 0, 0)) for _ in range(n)) if s[2][1]]
    model.eval()
    with torch.no_grad():
        tokens = clip.tokenize([f"a photo of a {name}" for name in CLASSES[1:]], model.context_length)
        best = torch.cat([model(to_batch(np.stack([s[0] for s in part])), tokens)[0].argmax(1)
                          for part in (scenes[k:k + 64] for k in range(0, len(scenes), 64))])
    true = torch.tensor([CLASSES.index(s[2][1][0][0]) - 1 for s in scenes])
    return 100 * (best == true).float().mean().item()


def pretrain(path, steps=1600, batch=64, pictures=12000, keep=72, lr=1e-3):
    """Train CLIP by contrast on drawn pictures and captions, and save the trained weights in half precision.

    Beside the class token's feature, the patches are matched with the text: those that fit it best count most, so that
    "a dog" is learned where the dog is (FILIP, Yao et al., ICLR 2022, has the same idea). Most of the time only `keep`
    random patches of a picture are shown, which is several times faster (FLIP, Li et al., CVPR 2023). Masks are not used.
    """
    half = "--amp" in machine_options("cpu")
    torch.manual_seed(0)
    rng = np.random.default_rng(1_000_000)
    start = time.time()
    scenes = [scene(rng, close=0.3, home=0.25, sizes=(0.3, 0.7), counts=(0.08, 0.47, 0.32, 0.13)) for _ in range(pictures)]
    images, told = np.stack([s[0] for s in scenes]), [s[2] for s in scenes]
    print(f"{pictures} pictures drawn in {time.time() - start:.0f} s, e.g. {[caption(*t, rng) for t in told[:4]]}")
    model = clip.CLIP(embed_dim=128, image_resolution=3 * SIZE // 2, vision_layers=6, vision_width=192, context_length=32,
                      transformer_width=128, transformer_layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    used = set()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 60) * (1 + math.cos(math.pi * step / steps)) / 2
        index = rng.integers(0, pictures, batch)
        tokens = clip.tokenize([caption(*told[i], rng) for i in index], 32)
        tokens = tokens[:, :int(tokens.argmax(1).max()) + 1]
        used |= set(tokens.unique().tolist())
        x = to_batch(images[index])
        x = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, x, x.flip(3))
        x = x.roll((int(rng.integers(-8, 9)), int(rng.integers(-8, 9))), (2, 3))
        grid = int(rng.integers(8, 15)) if step < 0.9 * steps else 12          # any size; at last that of the table
        x = F.interpolate(x, (16 * grid, 16 * grid), mode="bilinear", antialias=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = some_patches(model.visual, x, keep if step < 0.95 * steps else grid ** 2)  # (B, 1 + n, D)
            text = model.encode_text(tokens)
        out, text = F.normalize(out.float(), dim=2), F.normalize(text.float(), dim=1)
        same = (tokens[:, None] == tokens[None]).all(2).float()                # the same caption is no negative
        same /= same.sum(1, keepdim=True)
        near = out @ text.T                                                    # (B, 1 + n, B) cosine
        best = (10 * near[:, 1:]).softmax(1)
        loss = 0
        for fit in (near[:, 0], (best * near[:, 1:]).sum(1)):
            logits = model.logit_scale.exp() * fit
            loss = loss + (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 4
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}, {time.time() - start:.0f} s, loss {loss.item():.3f}, "
                  f"zero-shot accuracy {zero_shot(model):.1f} % (chance {100 / (len(CLASSES) - 1):.1f})", flush=True)
            model.train()
            save_weights(path, model, used)


def some_patches(visual, image, keep):
    """CLIP's image encoder on at most `keep` random patches of each picture: (B, 3, H, W) -> (B, 1 + n, D)."""
    x = visual.embed(image)                                                    # (B, 1 + h*w, C)
    kept = torch.rand(len(x), x.shape[1] - 1).argsort(1)[:, :keep] + 1
    kept = torch.cat([torch.zeros(len(x), 1, dtype=torch.int64), kept], 1)
    x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
    return visual.ln_post(visual.transformer(x)) @ visual.proj


def save_weights(path, model, used):
    """State dict in half precision, with only the token embeddings that captions have used (rows, their ids beside)."""
    rows = torch.tensor(sorted(used | {0}))
    state = {k: v.detach().half() for k, v in model.state_dict().items()} | {"token_rows": rows}
    state["token_embedding.weight"] = state["token_embedding.weight"][rows]
    write_whole(path, lambda f: torch.save(state, f))


def unpack_weights(path):
    """tests/toy_clip.pt -> an ordinary CLIP state dict at `path`; tokens that no caption used get the mean embedding."""
    state = torch.load(WEIGHTS, weights_only=True)
    rows, known = state.pop("token_rows"), state["token_embedding.weight"].float()
    table = known.mean(0).repeat(49408, 1)
    table[rows] = known
    state["token_embedding.weight"] = table
    state = {k: v.float() for k, v in state.items()}
    clip.CLIP.from_state_dict(state)                                           # fits strictly
    write_whole(path, lambda f: torch.save(state, f))


# ========================================================================================================== the chain

# options of the stages' command lines; FULL's stages 1 to 3 were found on worlds 0 to 2
SCRATCH = ["--arch", "resnet18", "--weights", "none"]
FULL = {"name": "toy", "train": 600, "val": 150,
        "stage 1": ["--crop", "160", "--iters", "420", "--batch-size", "8", "--lr", "0.02"],
        "stage 2": ["--crop", "128", "--iters", "300", "--batch-size", "16", "--lr", "1e-3"],
        "stage 3": ["--crop", "128", "--iters", "350", "--batch-size", "8", "--lr", "0.00125", "--scales", "1", "1.5"],
        "ablation": ["--crop", "128", "--iters", "150", "--batch-size", "8", "--lr", "1e-3", "--limit", "200"]}
SMALL = {"name": "small", "train": 120, "val": 40,
         "stage 1": ["--crop", "160", "--iters", "200", "--batch-size", "8", "--lr", "0.02"],
         "stage 2": ["--crop", "128", "--iters", "150", "--batch-size", "8", "--lr", "1e-3"],
         "stage 3": ["--crop", "96", "--iters", "40", "--batch-size", "4", "--lr", "0.00125", "--scales", "1"],
         "ablation": ["--crop", "128", "--iters", "5", "--batch-size", "4", "--lr", "1e-3", "--limit", "10"]}
VIEWS = ["--scales", "1", "2.33", "--no-flip"]  # 2.33: nine windows that overlap by a third


def machine_options(device):
    """Options for the stages: the device, and --amp where they would take it; on many CPUs bfloat16 halves the time."""
    try:
        Machine(device, amp=True)
    except ValueError:
        return ["--device", device]
    return ["--device", device, "--amp"]


def stage(script, *options, log=None, threads=None):
    """Run a stage as a user would, here or, with `log`, into a file; ValueError where it fails."""
    command = [sys.executable, script, *map(str, options)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
    if not log:
        print("\n$ python", *command[1:], flush=True)
        code = subprocess.run(command, cwd=ROOT, env=env).returncode
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as f:
            code = subprocess.run(command, cwd=ROOT, env=env, stdout=f, stderr=f).returncode
    if code:
        raise ValueError(f"{script} ended with status {code}; " + (f"see {log}" if log else "its message stands above"))


def as_resnet(checkpoint, path):
    """Stage 1's classifier -> a ResNet's state dict. Stage 3 starts there: it too has seen image labels only."""
    state = read_checkpoint(checkpoint)["model"]
    state = {k.replace("stem.0.", "conv1.").replace("stem.1.", "bn1."): v for k, v in state.items()}
    width = state.pop("classifier.weight").shape[1]
    state |= {"fc.weight": torch.zeros(1000, width), "fc.bias": torch.zeros(1000)}              # asked for, not used
    write_whole(path, lambda f: torch.save(state, f))


def crf_alone(data, stored, folder):
    """Masks of train by stage 2's last step, the CRF, from what a stage has stored: CAMs, or stage 2's probabilities.

    On CAMs it is a baseline: it shows how much of stage 2's gain is not the network's.
    """
    for i in tqdm(data.ids("train"), desc=f"CRF on {stored.name}"):
        with np.load(stored / f"{i}.npz") as z:
            kept = dict(z)
        names, image = kept["keys"], data.image(i)
        if "cam" in kept:
            probs = cam_scores(kept["cam"], image.shape[:2])                   # (1 + J, H, W), background as for seeds
            probs, names = probs / probs.sum(0), np.concatenate([[0], names])
        else:
            probs = torch.from_numpy(kept["prob"]).float()                     # (J, H, W)
        mask, _ = mask_from(probs, image, MASK_CRF["VOC2012"])
        write_label(folder / f"{i}.png", names.astype(np.uint8)[mask])


class Rows:
    """A table kept in a JSON file, {"made": from what, "machine": the stages' options, "rows": {name: score}}.

    A row that is there is not made again; a table that was made from something else is refused.
    """

    def __init__(self, path, made, device):
        self.path, self.lock = path, Lock()
        if path.is_file():
            self.kept = json.loads(path.read_text())
            if self.kept.get("made") != made:
                raise ValueError(f"{path} was made with other settings or in another world; remove {path.parent}")
            if self.kept["machine"][1] != device:
                raise ValueError(f"{path} was made with --device {self.kept['machine'][1]}: give it, or remove {path.parent}")
        else:
            self.kept = {"made": made, "machine": machine_options(device), "rows": {}}
            write_json(path, self.kept)
        self.machine, self.rows = self.kept["machine"], self.kept["rows"]

    def missing(self, *names):
        """True if one of these rows is not there."""
        return any(n not in self.rows for n in names)

    def add(self, name, data, folder, split, limit=None):
        """Score the label PNGs in `folder` and keep the row; ValueError where one is missing."""
        row = score_folder(find_dataset(data), folder, split, limit)
        if not row or row["n"] < row["of"]:
            raise ValueError(f"{folder}: label PNGs are missing; remove {self.path.parent} and start afresh")
        with self.lock:
            self.rows[name] = {k: row[k] for k in ("split", "n", "of", "truth", "miou", "pixel_accuracy")}
            write_json(self.path, self.kept)


def small_clip(runs):
    """The small CLIP's file as the stages take it, made if absent."""
    if not WEIGHTS.is_file() or clip.file_sha256(WEIGHTS) != WEIGHTS_SHA256:
        raise ValueError(f"{WEIGHTS}: absent, or its sha256 is not {WEIGHTS_SHA256[:12]}...; restore the file")
    weights = runs / f"clip_{WEIGHTS_SHA256[:8]}.pt"
    if not weights.is_file():
        for old in runs.glob("clip_" + 8 * "[0-9a-f]" + ".pt"):
            old.unlink()
        unpack_weights(weights)
    return weights


def prepare(runs, world, settings):
    """Make the world's folder and the small CLIP's file if absent -> (folder, file, {table: what it depends on})."""
    data, weights = runs / "data" / f"{settings['name']}{world}", small_clip(runs)
    facts = draw_world(data, world, settings["train"], settings["val"])
    made = {"world": facts, "clip": WEIGHTS_SHA256, "start": SCRATCH, "views": VIEWS}
    used = {"chain": ("stage 1", "stage 2", "stage 3"), "ablation": ("stage 1", "ablation")}
    return data, weights, {table: {**made, **{k: settings[k] for k in keys}} for table, keys in used.items()}


def chain(runs, world, settings, device="cpu"):
    """Stages 1, 2 and 3 and the upper bound, scored as they go -> the table's rows."""
    start = time.time()
    data, weights, made = prepare(runs, world, settings)
    out = runs / data.name
    rows = Rows(out / "rows.json", made["chain"], device)
    common = ["--data", data, "--runs", runs, *rows.machine]
    if rows.missing("1 seeds", "1 CRF on CAMs"):
        stage("stage1_cam.py", *common, *SCRATCH, *settings["stage 1"])
        rows.add("1 seeds", data, out / "1_cam/seeds", "train")
        crf_alone(find_dataset(data), out / "1_cam/cams", out / "crf_on_cams/masks/train")
        rows.add("1 CRF on CAMs", data, out / "crf_on_cams/masks/train", "train")
    masks, bound = out / "2_weakclip/masks", out / "upper_bound"

    def weakclip(*views):
        stage("stage2_weakclip.py", *common, "--clip", weights, *settings["stage 2"], *views)

    if rows.missing("2 masks raw"):
        weakclip("--scales", 1, "--no-flip", "--no-crf")
        rows.add("2 masks raw", data, masks / "train", "train")
    if rows.missing("2 masks + multi-scale", "2 masks + CRF"):
        weakclip(*VIEWS, "--no-crf", "--save-probs")
        rows.add("2 masks + multi-scale", data, masks / "train", "train")
        crf_alone(find_dataset(data), out / "2_weakclip/probs/train", out / "crf_on_probs")
        rows.add("2 masks + CRF", data, out / "crf_on_probs", "train")
    if rows.missing("2 masks + label filter", "2 masks + CRF, val"):
        weakclip(*VIEWS, "--label-filter")
        rows.add("2 masks + label filter", data, masks / "train", "train")
        rows.add("2 masks + CRF, val", data, masks / "val", "val")             # the filter acts on train only
    if rows.missing("3 on these masks", "3 on true masks"):
        as_resnet(out / "1_cam/checkpoint.pt", out / "resnet18.pt")

    def segment(name, folder, masks, log=None):
        if rows.missing(name):
            stage("stage3_segment.py", "--data", data, "--runs", folder, *rows.machine, "--masks", masks, "--arch", "resnet18",
                  "--weights", out / "resnet18.pt", *settings["stage 3"], log=log, threads=1)
            rows.add(name, data, folder / data.name / "3_segment/masks/val", "val")

    with ThreadPoolExecutor(1) as beside:                                      # the two at once, on a core each
        other = beside.submit(segment, "3 on true masks", bound, data / "SegmentationClass", bound / "log.txt")
        segment("3 on these masks", runs, masks / "train")
        if not other.done():
            print("waiting for the upper bound", flush=True)
        other.result()
    stage("eval.py", "--data", data, "--runs", runs)
    print(f"\n{data.name}: this run took {time.time() - start:.0f} s; {' '.join(rows.machine)}, {os.cpu_count()} cores\n")
    print(f"{'':26} {'split':6} {'images':>10} {'mIoU':>6}")
    order = lambda item: (item[0][0], "val" in item[0], "true" in item[0])
    for name, r in sorted(rows.rows.items(), key=order):
        print(f"{name:26} {r['split']:6} {r['n']:3} of {r['of']:3} {r['miou']:6.1f}")
    print(f"\npictures and curves: {out / 'report.html'}")
    return rows.rows


# ========================================================================================================== ablations

# switches that cannot act in a world of this size
NO_EFFECT = {"train_listed_twice": "there is no trainaug list", "pad_windows": "every window is a multiple of 16",
             "positions_resized_once": "every window is as large as a training crop"}


def entries():
    """{name: stage 2's options}: the parts of the paper, then the surprises of the released code, one at a time."""
    out = {"paper": []}
    for part in ("prompts", "adapter", "coattention", "text_guidance"):
        out[f"{part}=false"] = ["--set", f"{part}=false"]
    for weight in ("boundary_weight", "score_weight"):
        out[f"{weight}=0"] = ["--set", f"{weight}=0"]
    out["released"] = ["--variant", "released"]
    for f in dataclasses.fields(PAPER):
        value = getattr(RELEASED, f.name)
        if value != getattr(PAPER, f.name) and f.name not in NO_EFFECT:
            text = f"{f.name}={str(value).lower()}"
            out[text] = ["--set", text]
    return out


def ablate(runs, world, settings, only=None, seeds=3, device="cpu"):
    """One stage 2 per entry and seed, on the same stage-1 seeds, on a CPU one run a core; ends in a markdown table.

    To be quick it has fewer images and iterations than the chain, and smaller batches; masks are scored before the CRF
    ("+ multi-scale").
    """
    known = entries()
    for name in only or ():
        if name not in known:
            raise ValueError(f"--only {name}: the entries are {', '.join(known)}")
    data, weights, made = prepare(runs, world, settings)
    options, views, folder = settings["ablation"], [*VIEWS, "--no-crf"], runs / "ablate" / data.name
    limit = int(options[options.index("--limit") + 1])
    rows = Rows(folder / "rows.json", made["ablation"], device)
    Rows(runs / data.name / "rows.json", made["chain"], device)                # refuses seeds of another world
    stage("stage1_cam.py", "--data", data, "--runs", runs, *rows.machine, *SCRATCH, *settings["stage 1"])
    cores = (os.cpu_count() or 1) if Machine(device, False).device.type == "cpu" else 1
    failed = Event()

    def one(job):
        name, seed = job
        if failed.is_set() or not rows.missing(f"{name}, {seed}, val"):
            return
        place = folder / f"{name.replace('=', '_')}_{seed}"
        try:
            stage("stage2_weakclip.py", "--data", data, "--runs", place, "--clip", weights, "--seeds",
                  runs / data.name / "1_cam/seeds", "--seed", seed, *rows.machine, *options, *views, *known[name],
                  log=place / "log.txt", threads=1)
            for split in ("train", "val"):
                rows.add(f"{name}, {seed}, {split}", data, place / data.name / "2_weakclip/masks" / split, split, limit)
        except Exception:
            failed.set()  # the runs that wait are not started
            raise

    jobs = [(name, seed) for name in dict.fromkeys(["paper", *(only or known)]) for seed in range(seeds)]
    with ThreadPoolExecutor(cores) as pool:
        list(tqdm(pool.map(one, jobs), total=len(jobs), desc="ablations"))
    about = f"{data.name}, {' '.join(options + views + rows.machine)}"
    text = ablation_table(rows.rows, about, seeds)
    write_text(folder / "ablations.md", text)
    print("\n" + text)


def ablation_table(rows, about, seeds):
    """Markdown: a line per entry all of whose seeds are there, mean and standard deviation over them.

    Runs of one seed see the same pictures in the same order and, where no part is left out, start alike; so the difference
    to "paper" is taken seed by seed, which shows more than two means with their spreads.
    """
    lines = [f"Stage 2's masks, mIoU in percent over {seeds} seeds: mean ± standard deviation ({about})", "",
             "| | train | val | train, less paper's | val, less paper's |", "|---|---|---|---|---|"]
    scores = {}
    for name in entries():
        kept = [[rows.get(f"{name}, {s}, {split}") for s in range(seeds)] for split in ("train", "val")]
        if all(kept[0] + kept[1]):
            scores[name] = np.array([[r["miou"] for r in of] for of in kept])  # (2, seeds)
    for name, score in scores.items():
        less = score - scores["paper"] if name != "paper" and "paper" in scores else ()
        cells = [f"{x.mean():{sign}.1f}" + (f" ± {x.std(ddof=1):.1f}" if seeds > 1 else "")
                 for of, sign in ((score, ""), (less, "+")) for x in of]
        lines.append(f"| {name} | {' | '.join(cells + (4 - len(cells)) * [''])} |")
    return "\n".join([*lines, "", "Cannot act here: " + "; ".join(f"{k} ({v})" for k, v in NO_EFFECT.items())]) + "\n"


def at_least(low):
    """An argparse type: whole numbers from `low`."""
    def number(text):
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is below {low}")
        return int(text)
    return number


def main():
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--world", type=at_least(0), default=0, help="which world is drawn [%(default)s]")
    p.add_argument("--runs", type=Path, default=ROOT / "runs/toy", help="where everything is written [%(default)s]")
    p.add_argument("--small", action="store_true", help="fewer images and iterations: what the tests run")
    p.add_argument("--device", default="cpu", help="the stages' option [%(default)s]")
    p.add_argument("--seeds", type=at_least(1), default=3, help="training seeds of each ablation [%(default)s]")
    p.add_argument("--only", nargs="+", metavar="ENTRY", help="besides the paper these only, e.g. prompts=false released")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--ablate", action="store_true", help="take out one part of WeakCLIP at a time")
    what.add_argument("--pretrain", action="store_true", help="train the small CLIP anew")
    what.add_argument("--zero-shot", action="store_true", help="the small CLIP's accuracy on unseen pictures")
    args = p.parse_args()
    if args.only and not args.ablate:
        p.error("--only goes with --ablate")
    settings, runs = SMALL if args.small else FULL, args.runs.resolve()
    if args.pretrain:
        pretrain(runs / "pretrained.pt")
        write_whole(WEIGHTS, lambda f: f.write((runs / "pretrained.pt").read_bytes()))
        size, digest = WEIGHTS.stat().st_size / 1e6, clip.file_sha256(WEIGHTS)
        print(f"{WEIGHTS}: {size:.1f} MB; put its sha256 into WEIGHTS_SHA256: {digest}")
    elif args.zero_shot:
        accuracy = zero_shot(clip.load(small_clip(runs)))
        print(f"zero-shot accuracy {accuracy:.1f} % on 128 pictures of one creature (chance {100 / (len(CLASSES) - 1):.1f})")
    elif args.ablate:
        ablate(runs, args.world, settings, args.only, args.seeds, args.device)
    else:
        chain(runs, args.world, settings, args.device)


if __name__ == "__main__":
    run(main)
