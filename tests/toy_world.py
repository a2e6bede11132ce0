"""Draws the small world in which the whole paper runs on a laptop, and trains its small CLIP.

run     python tests/toy_world.py --zero-shot  # how well it tells the classes of unseen pictures
        python tests/toy_world.py --pretrain   # train tests/toy_clip.pt anew
writes  --pretrain: tests/toy_clip.pt, runs/toy/pretrained.pt
        --zero-shot: runs/toy/clip_<digest>.pt

`tests/toy.py` draws with this file, and runs the three stages on what it has drawn. In this order:
a creature from its parts, a scene from its place, a dataset from its scenes; then the small CLIP.

The creatures have the same body in any coat. Only beak, ears, horns, tail, feet and marks tell a
class, in a colour of the class's own, and each class has a place where it is seen more often. A
classifier looks at parts and at places: the known faults of CAM. One picture in ten shows a place
and nobody.
The CLIP has CLIP's architecture and is trained by contrast on pictures and captions of such worlds,
never on a mask. Unlike OpenAI's it is small, has seen nothing but these worlds, and matched patches
with captions too (`pretrain`).
The stages know nothing of all this; they are run with options that any dataset could be run with.

All random choices of a picture are drawn from one generator, in a fixed order: who swaps two lines
that draw, even if they seem independent, draws another world (`drawing_digest` tells).
"""
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import clip
from eval import Parser, run, write_json, write_label, write_text, write_whole
from stage1_cam import Machine
from stage2_weakclip import CLIP_MEAN, CLIP_STD

WEIGHTS = Path(__file__).with_name("toy_clip.pt")
WEIGHTS_SHA256 = "338581e07b26e8911ef8755aaa4f18867b8b603f4bd56fce70b571e7ec7209a7"
SIZE = 128  # pixels, height and width of a picture
CLASSES = ("background", "bird", "cat", "cow", "dog", "horse", "pig", "rabbit", "sheep")


# ======================================================================================= the world

# Coats, of any class: a coat tells nothing.
COLOURS = {
    "grey": (130, 130, 135),
    "blue": (75, 105, 185),
    "green": (70, 130, 75),
    "brown": (150, 100, 75),
    "teal": (50, 150, 150),
    "olive": (130, 125, 60),
    "mint": (150, 205, 170),
}
# Place -> (colour of the upper part, of the lower part, who is at home there).
PLACES = {
    "in the sky": ((150, 195, 235), (190, 220, 240), "bird"),
    "in a room": ((205, 180, 140), (150, 105, 70), "cat"),
    "on grass": ((170, 205, 225), (95, 150, 60), "cow"),
    "on the beach": ((80, 150, 190), (225, 205, 155), "dog"),
    "in the desert": ((235, 200, 150), (205, 150, 90), "horse"),
    "in mud": ((140, 150, 120), (90, 70, 50), "pig"),
    "in snow": ((140, 160, 190), (170, 195, 230), "rabbit"),
    "among flowers": ((140, 190, 160), (60, 110, 65), "sheep"),
}
# Class -> colour of the parts that tell it. No coat has these, and nothing large in a place does:
# else the seeds would cover the ground, and the CRF would spread the mistake.
PARTS = {
    "bird": (120, 250, 20),
    "cat": (22, 20, 28),
    "cow": (10, 235, 250),
    "dog": (235, 25, 30),
    "horse": (250, 225, 25),
    "pig": (250, 95, 170),
    "rabbit": (180, 40, 250),
    "sheep": (248, 246, 240),
}
# Chance that a picture's first creature is the one at home there (a further one: half); else it is
# any of the eight.
HOME = 0.25


# ====================================================================================== a creature
#
# All corners are in body lengths: the middle of the body is (0, 0), the tail's root (-0.5, 0), the
# head a disc at (0.55, -0.42) that looks right; y grows downwards, as in pictures.

def ellipse(x: float, y: float, rx: float, ry: float, n: int = 20) -> np.ndarray:
    """Corner points (n, 2) of an ellipse."""
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], 1)


def stroke(points, width: float) -> np.ndarray:
    """A bent line of n points as polygon (2n, 2), thinner towards its end."""
    p = np.asarray(points, float)                                       # (n, 2)
    along = np.gradient(p, axis=0)
    side = np.stack([-along[:, 1], along[:, 0]], 1)
    side /= np.linalg.norm(along, axis=1, keepdims=True)                # unit, across the line
    side *= width / 2 * np.linspace(1, 0.6, len(p))[:, None]
    return np.concatenate([p + side, (p - side)[::-1]])


def body(rng, paw) -> list:
    """What all creatures share, as [(polygon, colour)]: legs, feet, trunk, neck and spots.

    paw: the colour of the feet, which is that of the class's other parts.
    """
    legs = [[(x, 0.1), (x + rng.uniform(-0.06, 0.06), 0.56)] for x in (-0.36, 0.15, -0.17, 0.34)]
    spots = []
    for _ in range(rng.integers(0, 5)):
        place = rng.uniform((-0.35, -0.15), (0.3, 0.15))
        spots.append(ellipse(*place, *rng.uniform(0.05, 0.11, 2)))
    limbs = []
    for leg, coat in zip(legs, ("dark", "dark", "coat", "coat")):       # two lie in the shadow
        limbs.append((stroke(leg, 0.19), coat))
        limbs.append((ellipse(*leg[1], 0.1, 0.08), paw))
    trunk = (ellipse(0, 0, 0.54, 0.31), "coat")
    neck = (stroke([(0.3, -0.05), (0.52, -0.4)], 0.3), "coat")
    return [*limbs, trunk, neck, *((spot, "spot") for spot in spots)]


# What tells a class, a function each: its colour and four small random numbers in, two lists of
# (polygon, colour) out, behind the body and in front of it all. Every class has parts that stick
# out, which a CAM finds, and marks on its flank: without them most of a body is missed, and the
# CRF, which decides a coat as a whole, takes the rest of it away.

def bird(colour, jitter, rng):
    """Behind: tail feathers; in front: beak, wing."""
    upper, lower = (-1.0, -0.4 + jitter[0]), (-1.0, 0.2 + jitter[1])
    feathers = [(-0.42, -0.1), upper, (-0.9, 0.0), lower, (-0.42, 0.12)]
    beak = [(0.68, -0.62), (1.2, -0.36 + jitter[2]), (0.68, -0.24)]
    wing = [(0.26, -0.16), (-0.04, 0.18), (-0.46, 0.1 + jitter[3]), (-0.24, -0.2)]
    return [(feathers, colour)], [(beak, colour), (wing, colour)]


def cat(colour, jitter, rng):
    """Behind: raised tail, pointed ears; in front: whiskers, stripes."""
    tail = stroke([(-0.48, 0), (-0.68, -0.12), (-0.72, -0.35), (-0.64 + jitter[0], -0.6)], 0.2)
    ear = [(0.34, -0.55), (0.3 + jitter[1], -1.0), (0.58, -0.68)]
    other_ear = [(0.56, -0.68), (0.82 + jitter[2], -1.0), (0.8, -0.5)]
    whiskers = [stroke([(0.62, -0.3), (0.9, -0.34 + d)], 0.05) for d in (-0.06, 0.06, 0.18)]
    stripes = [stroke([(x, -0.29), (x + jitter[3], 0.14)], 0.14) for x in (-0.36, -0.12, 0.12)]
    behind = [(part, colour) for part in (tail, ear, other_ear)]
    return behind, [(part, colour) for part in whiskers + stripes]


def cow(colour, jitter, rng):
    """Behind: horns, udder; in front: muzzle with nostril, patches."""
    horn = stroke([(0.4, -0.6), (0.25, -0.8), (0.3 + jitter[0], -1.02)], 0.16)
    other_horn = stroke([(0.68, -0.6), (0.85, -0.8), (0.8 + jitter[1], -1.02)], 0.16)
    udder = ellipse(-0.15, 0.3, 0.2, 0.14)
    muzzle = (ellipse(0.72, -0.3, 0.2, 0.15), colour)
    nostril = (ellipse(0.78, -0.32, 0.04, 0.04), (20, 60, 90))
    patch = (ellipse(-0.3, -0.08 + jitter[2], 0.15, 0.12), colour)
    other_patch = (ellipse(0.08, 0.03 + jitter[3], 0.15, 0.11), colour)
    behind = [(part, colour) for part in (horn, other_horn, udder)]
    return behind, [muzzle, nostril, patch, other_patch]


def dog(colour, jitter, rng):
    """Behind: tail; in front: hanging ear, tongue, nose, saddle."""
    tail = stroke([(-0.48, -0.05), (-0.7, -0.25), (-0.85 + jitter[0], -0.3)], 0.16)
    ear = (ellipse(0.38, -0.36, 0.12, 0.3 + jitter[1]), colour)
    tongue = (ellipse(0.82, -0.15, 0.09, 0.18 + jitter[2]), colour)
    nose = (ellipse(0.8, -0.42, 0.09, 0.08), (90, 40, 40))
    saddle = [(-0.38, -0.21), (0.0, -0.3), (0.06, -0.04 + jitter[3]), (-0.12, 0.1), (-0.34, 0.02)]
    return [(tail, colour)], [ear, tongue, nose, (saddle, colour)]


def horse(colour, jitter, rng):
    """Behind: tail; in front: mane, line on the back, girth, long face."""
    tail = stroke([(-0.48, -0.1), (-0.66, 0.0), (-0.7, 0.2), (-0.66 + jitter[0], 0.42)], 0.24)
    mane = [(0.45, -0.75), (0.3, -0.8), (0.3, -0.65), (0.14, -0.66),
            (0.18, -0.48), (0.02, -0.44), (0.1, -0.28), (0.45, -0.3)]
    back = stroke([(-0.5, -0.1), (-0.2, -0.25), (0.1, -0.28 + jitter[2])], 0.14)
    girth = stroke([(-0.16, -0.28), (-0.1 + jitter[3], 0.0), (-0.12, 0.28)], 0.2)
    face = stroke([(0.55, -0.45), (0.98, -0.2 + jitter[1])], 0.28)
    return [(tail, colour)], [(mane, colour), (back, colour), (girth, colour), (face, "coat")]


def pig(colour, jitter, rng):
    """Behind: curly tail, small ears; in front: belly, snout with two nostrils."""
    t = np.linspace(0, 3 * np.pi, 14)
    tail = stroke(np.stack([-0.52 - 0.025 * t, -0.06 - 0.12 * np.sin(t)], 1), 0.12)
    ear = [(0.36, -0.58), (0.26 + jitter[0], -0.84), (0.56, -0.66)]
    other_ear = [(0.58, -0.66), (0.86 + jitter[1], -0.84), (0.78, -0.56)]
    belly = (ellipse(-0.1 + jitter[2], 0.22, 0.27, 0.11), colour)
    snout = (ellipse(0.74, -0.36, 0.17, 0.19), colour)
    nostrils = [(ellipse(x, -0.36, 0.04, 0.07), (110, 30, 60)) for x in (0.69, 0.8)]
    behind = [(part, colour) for part in (tail, ear, other_ear)]
    return behind, [belly, snout, *nostrils]


def rabbit(colour, jitter, rng):
    """Behind: long ears, round tail; in front: nose, haunch, shoulder."""
    ears = []
    for k in (0, 1):
        line = [(0.45 + 0.2 * k, -0.55), (0.4 + 0.25 * k, -0.95), (0.3 + 0.4 * k + jitter[k], -1.2)]
        ears += [(stroke(line, 0.28), "coat"), (stroke(line, 0.2), colour)]
    tail = (ellipse(-0.58, -0.05, 0.18, 0.18), colour)
    nose = (ellipse(0.78, -0.38, 0.08, 0.07), colour)
    haunch = (ellipse(-0.3 + jitter[3], 0.08, 0.16, 0.17), colour)
    shoulder = (ellipse(0.14 + jitter[2], 0.02, 0.13, 0.14), colour)
    return [*ears, tail], [nose, haunch, shoulder]


def sheep(colour, jitter, rng):
    """In front: wool on head, back and flank."""
    head = [(0.36, -0.6), (0.5, -0.7), (0.66, -0.66), (0.34, -0.42)]
    wool = [ellipse(x, y, 0.13, 0.13, 10) for x, y in head]
    for x in (-0.42, -0.24, -0.06, 0.12):
        wool.append(ellipse(x, rng.uniform(-0.33, -0.26), 0.13, 0.13, 10))
    flank = [(-0.5, 0.0), (-0.26, 0.1), (-0.02, 0.12), (0.2, 0.04)]
    wool += [ellipse(x, y + jitter[0], 0.12, 0.11, 10) for x, y in flank]
    return [], [(curl, colour) for curl in wool]


DRAWN = {f.__name__: f for f in (bird, cat, cow, dog, horse, pig, rabbit, sheep)}


def parts(name: str, colour, rng) -> tuple[list, list]:
    """What tells a class, in its colour: [(polygon, colour)] behind the body, and in front."""
    return DRAWN[name](colour, rng.uniform(-0.05, 0.05, 4), rng)


def vary(colour, by: int, rng) -> tuple:
    """A colour whose red, green and blue are each changed by up to `by`."""
    return tuple(int(c) for c in np.clip(np.array(colour) + rng.integers(-by, by + 1, 3), 0, 255))


def shade(coat, factor: float) -> tuple:
    """A coat's colour, darker or lighter."""
    return tuple(int(c) for c in np.clip(np.array(coat) * factor, 0, 255))


def creature(draw, mask, name, coat, at, unit, rng, portrait=False):
    """Draw one creature into a picture and its class number into a mask (two ImageDraws).

    unit: pixels per body length; at: where its middle is, or, in a portrait, its head.
    """
    mirror = rng.choice([-1, 1])
    angle = rng.uniform(-0.25, 0.25)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    turn = rotation * unit * [[mirror], [1]]                            # body lengths -> pixels
    spot = shade(coat, rng.choice([0.75, 1.25]))
    named = {"coat": shade(coat, 1), "dark": shade(coat, 0.8), "spot": spot}
    if portrait:
        at = at - turn @ (0.4, -0.5)
    own = vary(PARTS[name], 15, rng)
    behind, front = parts(name, own, rng)
    head = [(ellipse(0.55, -0.42, 0.27, 0.26), "coat")]
    eye = [(ellipse(0.62, -0.48, 0.04, 0.04), (80, 60, 50))]
    for polygon, colour in [*behind, *body(rng, own), *head, *eye, *front]:
        corners = [tuple(p) for p in np.asarray(polygon, float) @ turn.T + at]
        draw.polygon(corners, fill=named[colour] if isinstance(colour, str) else colour)
        mask.polygon(corners, fill=CLASSES.index(name))


# ========================================================================================= a scene

class Ground:
    """A place to draw on: an ImageDraw, its side and its horizon in pixels, and the generator."""

    def __init__(self, draw, side, horizon, rng):
        self.draw = draw
        self.side = side
        self.horizon = horizon
        self.rng = rng

    def spot(self) -> tuple:
        """A random point below the horizon."""
        return self.rng.uniform(0, self.side), self.rng.uniform(self.horizon, self.side)

    def blob(self, x, y, rx, ry, colour):
        """An ellipse at (x, y) in pixels; its radii are parts of the picture's side."""
        corners = ellipse(x, y, self.side * rx, self.side * ry)
        self.draw.polygon([tuple(p) for p in corners], fill=colour)


# One thing of a place, a function each; x in pixels, r a size as part of the picture's side.

def cloud(ground, x, r):
    """In the sky."""
    ground.blob(x, ground.rng.uniform(0, ground.side), 2 * r, r, (195, 210, 232))


def window(ground, x, r):
    """In a room."""
    frame = (x, ground.horizon * 0.2, x + ground.side * 0.2, ground.horizon * 0.8)
    pane, wood = (170, 210, 230), (90, 60, 40)
    ground.draw.rectangle(frame, fill=pane, outline=wood, width=ground.side // 50)


def fence(ground, x, r):
    """On grass: two rails and a post."""
    brown, side, horizon = (120, 85, 55), ground.side, ground.horizon
    for y in (0.05, 0.12):
        rail = (0, horizon + side * y, side, horizon + side * y)
        ground.draw.line(rail, fill=brown, width=side // 50)
    ground.draw.line((x, horizon, x, horizon + side * 0.2), fill=brown, width=side // 35)


def wave_and_ball(ground, x, r):
    """On the beach."""
    ground.blob(x, ground.horizon, 2 * r, r / 4, (200, 225, 235))
    ground.blob(*ground.spot(), r * 0.7, r * 0.7, (220, 80, 70))


def cactus(ground, x, r):
    """In the desert: a trunk and an arm."""
    green, side, horizon = (60, 120, 70), ground.side, ground.horizon
    ground.draw.line((x, horizon - side * r, x, horizon + side * r), fill=green, width=side // 20)
    arm = (x, horizon, x + side * r, horizon, x + side * r, horizon - side * r)
    ground.draw.line(arm, fill=green, width=side // 30)


def puddle(ground, x, r):
    """In mud."""
    ground.blob(*ground.spot(), 2 * r, r * 0.7, (115, 105, 95))


def fir(ground, x, r):
    """In snow."""
    side, horizon = ground.side, ground.horizon
    left, right = (x - side * r, horizon + side * r), (x + side * r, horizon + side * r)
    top = (x, horizon - side * 2 * r)
    ground.draw.polygon([left, top, right], fill=(50, 85, 70))


def five_flowers(ground, x, r):
    """Among flowers."""
    for _ in range(5):
        place = ground.spot()
        colour = [(245, 165, 90), (225, 120, 130), (150, 140, 235)][ground.rng.integers(3)]
        ground.blob(*place, 0.022, 0.022, colour)


THINGS = {
    "in the sky": cloud,
    "in a room": window,
    "on grass": fence,
    "on the beach": wave_and_ball,
    "in the desert": cactus,
    "in mud": puddle,
    "in snow": fir,
    "among flowers": five_flowers,
}


def scenery(draw, place: str, side: int, rng) -> tuple:
    """Draw ground, sky and the things of a place; returns the two ground colours."""
    upper, lower = (vary(colour, 15, rng) for colour in PLACES[place][:2])
    ground = Ground(draw, side, side * rng.uniform(0.25, 0.6), rng)
    draw.rectangle((0, 0, side, side), fill=upper)
    draw.rectangle((0, ground.horizon, side, side), fill=lower)
    for _ in range(25):  # tufts, stones, ripples: a texture
        x, y = ground.spot()
        radii = rng.uniform(0.01, 0.05, 2)
        ground.blob(x, y, *radii, tuple(int(c * rng.uniform(0.88, 1.1)) for c in lower))
    for _ in range(rng.integers(2, 5)):
        x, r = rng.uniform(0, side), rng.uniform(0.05, 0.1)
        THINGS[place](ground, x, r)
    return upper, lower


def choose_coat(grounds, rng) -> tuple:
    """(name, colour) of any coat that stands out from the ground's colours (2, 3)."""
    while True:
        name = list(COLOURS)[rng.integers(len(COLOURS))]
        coat = vary(COLOURS[name], 20, rng)
        if np.linalg.norm(grounds - coat, axis=1).min() > 70:
            return name, coat


def choose_centre(centres, spread, side, rng) -> np.ndarray:
    """Of six random points the one farthest from the creatures that are there.

    So most stand beside each other, and some before another.
    """
    tries = [rng.uniform(spread, 1 - spread, 2) * side for _ in range(6)]
    distances = [min([np.linalg.norm(p - c) for c in centres], default=0) for p in tries]
    return tries[int(np.argmax(distances))]  # the first where several are equal


def draw_bushes(draw, mask, side, colour, rng):
    """Something of the ground's colour in front: what it hides of a creature is background."""
    for _ in range(rng.integers(0, 3)):
        x, y = rng.uniform(0, side), rng.uniform(0.6, 1) * side
        r = rng.uniform(0.04, 0.08) * side
        bush = [tuple(p) for p in ellipse(x, y, r, r * rng.uniform(0.5, 1.5), 9)]
        draw.polygon(bush, fill=tuple(int(c * 0.85) for c in colour))
        mask.polygon(bush, fill=0)


def photograph(image, rng) -> np.ndarray:
    """The drawing at half its size, in uneven light and with noise: (SIZE, SIZE, 3) uint8."""
    image = np.asarray(image.reduce(2), np.float32)
    light = np.linspace(rng.uniform(0.85, 1.1), rng.uniform(0.85, 1.1), SIZE)[None, :, None]
    image = image * light + rng.normal(0, 3, image.shape)
    return image.clip(0, 255).astype(np.uint8)


def scene(rng, close=0.0, home=HOME, sizes=(0.3, 0.5), counts=(0.1, 0.6, 0.25, 0.05)):
    """One picture: image (SIZE, SIZE, 3) and mask (SIZE, SIZE), uint8, and what is in it.

    The last is (place, [(class, coat's colour)]).
    close: chance of a close-up of one creature; home: see HOME; sizes: of a body, as part of the
    picture's side; counts: chances of none, one, two and three creatures. Without pictures of none,
    a classifier may take a class for what is there when no other class is, and its CAM covers the
    ground (measured: tests/RESULTS.md).
    """
    side = 2 * SIZE  # drawn twice as large, then reduced: soft edges in the image, not in the mask
    image, mask = Image.new("RGB", (side, side)), Image.new("L", (side, side))
    draw, draw_mask = ImageDraw.Draw(image), ImageDraw.Draw(mask)
    place = list(PLACES)[rng.integers(len(PLACES))]
    grounds = np.array(scenery(draw, place, side, rng), float)          # (2, 3)
    near = rng.random() < close
    count = 1 if near else int(rng.choice(4, p=counts))
    centres, things = [], []
    for k in range(count):
        at_home = rng.random() < (home if k == 0 else home / 2)
        name = PLACES[place][2] if at_home else CLASSES[1 + rng.integers(len(CLASSES) - 1)]
        colour, coat = choose_coat(grounds, rng)
        unit = side * (rng.uniform(0.35, 0.8) if near else rng.uniform(*sizes))
        centres.append(choose_centre(centres, 0.35 if near else 0.25, side, rng))
        creature(draw, draw_mask, name, coat, centres[-1], unit, rng, portrait=near)
        things.append((name, colour))
    draw_bushes(draw, draw_mask, side, grounds[1], rng)
    image = photograph(image, rng)
    mask = np.asarray(mask)[1::2, 1::2]
    # What is hidden is not told: under 60 pixels.
    told = [thing for thing in things if (mask == CLASSES.index(thing[0])).sum() >= 60]
    return image, mask, (place, told)


# ======================================================================================= a dataset

def drawing_digest(seed: int) -> str:
    """sha256 of the constants and of 64 pictures, so that another version's world is noticed."""
    constants = (SIZE, PLACES, COLOURS, PARTS, scene.__defaults__)
    sha = hashlib.sha256(repr(constants).encode())
    for i in range(64):  # every class and place is among them
        image, mask, _ = scene(np.random.default_rng([seed, i]))
        sha.update(image.tobytes() + mask.tobytes())
    return sha.hexdigest()


def draw_world(folder, seed: int, train: int = 600, val: int = 150) -> dict:
    """Draw a dataset in VOC's layout, and places.txt beside it; returns what tells it from others.

    The same for the same seed. What stands there already is left if it is the same, and ValueError
    if it is not.
    """
    folder = Path(folder)
    made = folder / "world.json"                                        # written last
    facts = {"seed": seed, "train": train, "val": val, "drawing": drawing_digest(seed)}
    if made.is_file():
        if json.loads(made.read_text()) != facts:
            this = Path(__file__).name
            raise ValueError(f"{folder} was drawn by another version of {this}; remove it")
        return facts
    names, labels, places = [], [], []
    for i in range(train + val):
        image, mask, (place, _) = scene(np.random.default_rng([seed, i]))
        name = f"{i:05d}"
        path, photo = folder / "JPEGImages" / f"{name}.jpg", Image.fromarray(image)
        write_whole(path, lambda f: photo.save(f, "JPEG", quality=95))
        write_label(folder / "SegmentationClass" / f"{name}.png", mask)
        names.append(name)
        labels.append(f"{name} " + ", ".join(CLASSES[k] for k in np.unique(mask) if k) + "\n")
        places.append(f"{name} {place}\n")
    write_text(folder / "places.txt", "".join(places))                  # no stage reads them
    write_text(folder / "image_labels.txt", "".join(labels))
    write_text(folder / "classes.txt", "\n".join(CLASSES) + "\n")
    for split, part in (("train", names[:train]), ("val", names[train:])):
        lines = "".join(f"{name}\n" for name in part)
        write_text(folder / "ImageSets/Segmentation" / f"{split}.txt", lines)
    write_json(made, facts)
    return facts


# ================================================================================== the small CLIP

def of_nobody(place: str, nothing: bool, rng) -> str:
    """A caption of the place only; nothing: nobody is there, and the caption may say so."""
    ground = place.split(" ", 1)[1]                                     # "on grass" -> "grass"
    text = [ground, f"a photo of {ground}"]
    text += [f"{ground} in the background", f"the background is {ground}"]
    if nothing:
        text += ["background", f"nothing {place}", "a photo of the background"]
    return str(rng.choice(text))


def counted(name: str, count: int) -> str:
    """("dog", 1) -> "a dog", ("blue dog", 2) -> "two blue dogs"."""
    if count == 1:
        article = "an" if name[0] in "aeiou" else "a"
        return f"{article} {name}"
    plural = "" if name.endswith("sheep") else "s"
    return f"{('two', 'three')[count - 2]} {name}{plural}"


def caption(place: str, things: list, rng) -> str:
    """What a caption's author might write: the creatures, or one of them, or the place only.

    At times with colours, numbers and templates. Of a picture of nobody: the place, or that nothing
    is there.
    """
    if not things or rng.random() < 0.1:
        return of_nobody(place, not things, rng)
    if rng.random() < 0.3:
        things = [things[rng.integers(len(things))]]
    coloured = rng.random() < 0.2
    short = rng.random() < 0.5
    named = [f"{colour} {name}" if coloured and not short else name for name, colour in things]
    order = rng.permutation(sorted(set(named)))
    text = " and ".join(n if short else counted(n, named.count(n)) for n in order)
    if not short:
        templates = ["", "a photo of ", "a picture of ", "there is ", "look , "]
        text = str(rng.choice(templates)) + text
    where = rng.random()
    if where < 0.15:
        return f"{text} {place}"
    if where < 0.3:
        ground = place.split(" ", 1)[1]
        return f"{text} , {ground} in the background"
    return text


def to_batch(images: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 array -> (B, 3, H, W) float32, normalised as for CLIP."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    return (x - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def zero_shot(model, n: int = 128) -> float:
    """Accuracy in percent on n unseen pictures of one creature: which of the 8 names fits best."""
    rng = np.random.default_rng(990_000)
    scenes = [scene(rng, close=0.3, home=0, counts=(0, 1, 0, 0)) for _ in range(n)]
    scenes = [s for s in scenes if s[2][1]]                             # not where it is hidden
    tokens = clip.tokenize([f"a photo of a {name}" for name in CLASSES[1:]], model.context_length)
    right = 0
    model.eval()
    with torch.no_grad():
        for k in range(0, len(scenes), 64):
            part = scenes[k:k + 64]
            images = to_batch(np.stack([s[0] for s in part]))
            best = model(images, tokens)[0].argmax(1)                   # (B,)
            true = torch.tensor([CLASSES.index(s[2][1][0][0]) - 1 for s in part])
            right += (best == true).sum().item()
    return 100 * right / len(scenes)


def has_bfloat16(device: str) -> bool:
    """True where the stages would take --amp."""
    try:
        Machine(device, amp=True)
    except ValueError:
        return False
    return True


def small_architecture() -> clip.CLIP:
    """The small CLIP, untrained: as OpenAI's ViT-B/16, but half as deep and a quarter as wide."""
    return clip.CLIP(
        embed_dim=128,
        image_resolution=3 * SIZE // 2,
        vision_layers=6,
        vision_width=192,
        context_length=32,
        transformer_width=128,
        transformer_layers=2,
    )


def some_patches(visual, image: torch.Tensor, keep: int | None) -> torch.Tensor:
    """CLIP's image encoder on `keep` random patches of each picture (None: on all).

    image (B, 3, H, W) -> (B, 1 + n, D)
    """
    x = visual.embed(image)                                             # (B, 1 + h*w, C)
    kept = torch.rand(len(x), x.shape[1] - 1).argsort(1)[:, :keep] + 1  # (B, n) random places
    first = torch.zeros(len(x), 1, dtype=torch.int64)                   # the class token stays
    kept = torch.cat([first, kept], 1)                                  # (B, 1 + n)
    x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))         # (B, 1 + n, C)
    return visual.ln_post(visual.transformer(x)) @ visual.proj


def contrast(out, text, tokens, scale) -> torch.Tensor:
    """CLIP's loss as a scalar, the mean of two: class tokens and patches, each against captions.

    out (B, 1 + n, D) class token and patches, text (B, D), both of unit length; tokens (B, L);
    scale: 1 / temperature.
    A picture's patches are averaged with weights that grow with how well each fits the caption, so
    "a dog" is learned where the dog is. FILIP (Yao et al., ICLR 2022) has the same idea.
    """
    # Pictures with the same caption are no negatives of each other.
    same = (tokens[:, None] == tokens[None]).all(2).float()             # (B, B)
    same /= same.sum(1, keepdim=True)
    near = out @ text.T                                                 # (B, 1 + n, B) cosine
    best = (10 * near[:, 1:]).softmax(1)                                # (B, n, B) weights
    loss = 0
    for fit in (near[:, 0], (best * near[:, 1:]).sum(1)):               # (B, B) each
        logits = scale * fit
        loss = loss + (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 4
    return loss


def training_batch(images, told, batch, size_varies, rng):
    """(B, 3, h, w) pictures, normalised, and (B, L) tokens of their captions.

    images (N, H, W, 3) uint8; told: what is in each. Pictures are mirrored, shifted by up to 8
    pixels, and resized to a grid of 8 to 14 patches, or to that of the position table.
    """
    index = rng.integers(0, len(images), batch)
    tokens = clip.tokenize([caption(*told[i], rng) for i in index], 32)
    tokens = tokens[:, :int(tokens.argmax(1).max()) + 1]                # up to the last end token
    x = to_batch(images[index])
    x = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, x, x.flip(3))
    x = x.roll((int(rng.integers(-8, 9)), int(rng.integers(-8, 9))), (2, 3))
    grid = int(rng.integers(8, 15)) if size_varies else 12
    return F.interpolate(x, (16 * grid, 16 * grid), mode="bilinear", antialias=True), tokens


def captioned_pictures(pictures, rng):
    """(N, H, W, 3) uint8 and what is in each; creatures are larger and more than in a world."""
    images, told = [], []
    for _ in range(pictures):
        counts = (0.08, 0.47, 0.32, 0.13)
        image, _, things = scene(rng, close=0.3, home=0.25, sizes=(0.3, 0.7), counts=counts)
        images.append(image)
        told.append(things)
    return np.stack(images), told


def pretrain(path, steps=1600, batch=64, pictures=12000, keep=72, lr=1e-3):
    """Train CLIP by contrast on drawn pictures and captions; the weights are saved at `path`.

    Most of the time only `keep` random patches of a picture are shown, which is several times
    faster (FLIP, Li et al., CVPR 2023). Masks are not used.
    """
    half = has_bfloat16("cpu")
    torch.manual_seed(0)
    rng = np.random.default_rng(1_000_000)
    start = time.time()
    images, told = captioned_pictures(pictures, rng)
    examples = [caption(*t, rng) for t in told[:4]]
    print(f"{pictures} pictures drawn in {time.time() - start:.0f} s, e.g. {examples}")
    model = small_architecture()
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.05)
    used = set()                                                        # ids of tokens in captions
    for step in range(steps):
        for group in optimizer.param_groups:
            cosine = (1 + math.cos(math.pi * step / steps)) / 2
            group["lr"] = lr * min(1, (step + 1) / 60) * cosine
        # The last tenth has the size of the position table, the last twentieth all patches:
        # what is trained last is what the stages will ask for.
        x, tokens = training_batch(images, told, batch, step < 0.9 * steps, rng)
        used |= set(tokens.unique().tolist())
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            shown = keep if step < 0.95 * steps else None
            out = some_patches(model.visual, x, shown)                  # (B, 1 + n, D)
            text = model.encode_text(tokens)                            # (B, D)
        out, text = F.normalize(out.float(), dim=2), F.normalize(text.float(), dim=1)
        loss = contrast(out, text, tokens, model.logit_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.logit_scale.data.clamp_(max=math.log(100))                # as CLIP's
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}, {time.time() - start:.0f} s, loss {loss.item():.3f}, "
                  f"zero-shot accuracy {zero_shot(model):.1f} %", flush=True)
            model.train()
            save_weights(path, model, used)


def save_weights(path, model, used):
    """Save in half precision, of the token embeddings only those that captions have used."""
    rows = torch.tensor(sorted(used | {0}))
    state = {name: value.detach().half() for name, value in model.state_dict().items()}
    state["token_embedding.weight"] = state["token_embedding.weight"][rows]
    state["token_rows"] = rows
    write_whole(path, lambda f: torch.save(state, f))


def unpack_weights(path):
    """tests/toy_clip.pt -> an ordinary CLIP state dict at `path`, which the stages' `--clip` takes.

    Tokens that no caption used get the mean embedding.
    """
    state = torch.load(WEIGHTS, weights_only=True)
    rows = state.pop("token_rows")
    known = state["token_embedding.weight"].float()                     # (len(rows), C)
    table = known.mean(0).repeat(49408, 1)
    table[rows] = known
    state["token_embedding.weight"] = table
    state = {name: value.float() for name, value in state.items()}
    clip.CLIP.from_state_dict(state)                                    # fits strictly, or raises
    write_whole(path, lambda f: torch.save(state, f))


def small_clip(runs: Path) -> Path:
    """The small CLIP's file as the stages take it, made if absent.

    ValueError where the shipped one is damaged.
    """
    if not WEIGHTS.is_file() or clip.file_sha256(WEIGHTS) != WEIGHTS_SHA256:
        expected = f"its sha256 is not {WEIGHTS_SHA256[:12]}..."
        raise ValueError(f"{WEIGHTS}: absent, or {expected}; restore the file")
    weights = runs / f"clip_{WEIGHTS_SHA256[:8]}.pt"
    if not weights.is_file():
        for old in runs.glob("clip_" + 8 * "[0-9a-f]" + ".pt"):
            old.unlink()
        unpack_weights(weights)
    return weights


# ================================================================================== command line

def main():
    """The command line."""
    p = Parser(description=__doc__.splitlines()[0])
    p.add_argument("--runs", type=Path, default=ROOT / "runs/toy",
                   help="where it is written [%(default)s]")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--pretrain", action="store_true", help="train the small CLIP anew")
    what.add_argument("--zero-shot", action="store_true",
                      help="the small CLIP's accuracy on unseen pictures")
    args = p.parse_args()
    runs = args.runs.resolve()
    if args.pretrain:
        pretrain(runs / "pretrained.pt")
        write_whole(WEIGHTS, lambda f: f.write((runs / "pretrained.pt").read_bytes()))
        size, digest = WEIGHTS.stat().st_size / 1e6, clip.file_sha256(WEIGHTS)
        print(f"{WEIGHTS}: {size:.1f} MB; put its sha256 into WEIGHTS_SHA256: {digest}")
    else:
        accuracy = zero_shot(clip.load(small_clip(runs)))
        chance = 100 / (len(CLASSES) - 1)
        print(f"zero-shot accuracy {accuracy:.1f} % on 128 pictures of one creature "
              f"(chance {chance:.1f})")


if __name__ == "__main__":
    run(main)
