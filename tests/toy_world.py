"""Draws the small world in which the whole paper runs on a laptop, and unpacks its small CLIP.

`tests/toy.py` draws with this file, and runs the three stages on what it has drawn. In this order:
a creature from its parts, a scene from its place, a dataset from its scenes; then the small CLIP.

The creatures have the same body in any coat. Only beak, ears, horns, tail, feet and marks tell a
class, in a colour of the class's own, and each class has a place where it is seen more often. A
classifier looks at parts and at places: the known faults of CAM. One picture in ten shows a place
and nobody.
The stages know nothing of all this; they are run with options that any dataset could be run with.

All random choices of a picture are drawn from one generator, in a fixed order: who swaps two lines
that draw, even if they seem independent, draws another world (`drawing_digest` tells).
"""
import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import clip
from eval import write_json, write_label, write_text, write_whole

WEIGHTS = Path(__file__).with_name("toy_clip.pt")
WEIGHTS_SHA256 = "338581e07b26e8911ef8755aaa4f18867b8b603f4bd56fce70b571e7ec7209a7"
SIZE = 128  # pixels, height and width of a picture
CLASSES = ("background", "bird", "cat", "cow", "dog", "horse", "pig", "rabbit", "sheep")


# ======================================================================================= the world

# Coats, of any class: a coat tells nothing. Grey, blue, green, brown, teal, olive, mint.
COATS = (
    (130, 130, 135),
    (75, 105, 185),
    (70, 130, 75),
    (150, 100, 75),
    (50, 150, 150),
    (130, 125, 60),
    (150, 205, 170),
)
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
# Chances of none, one, two and three creatures. Without pictures of none, a classifier may take a
# class for what is there when no other class is, and its CAM covers the ground.
COUNTS = (0.1, 0.6, 0.25, 0.05)
BODIES = (0.3, 0.5)  # smallest and largest body length, as part of the picture's side


# ====================================================================================== a creature
#
# All corners are in body lengths: the middle of the body is (0, 0), the tail's root (-0.5, 0), the
# head a disc at (0.55, -0.42) that looks right; y grows downwards, as in pictures.

def ellipse(x, y, rx, ry, n=20):
    """Corner points (n, 2) of an ellipse."""
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], 1)


def stroke(points, width):
    """A bent line of n points as polygon (2n, 2), thinner towards its end."""
    p = np.asarray(points, float)                                       # (n, 2)
    along = np.gradient(p, axis=0)
    side = np.stack([-along[:, 1], along[:, 0]], 1)
    side /= np.linalg.norm(along, axis=1, keepdims=True)                # unit, across the line
    side *= width / 2 * np.linspace(1, 0.6, len(p))[:, None]
    return np.concatenate([p + side, (p - side)[::-1]])


def body(rng, paw):
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


def parts(name, colour, rng):
    """What tells a class, in its colour: [(polygon, colour)] behind the body, and in front."""
    return DRAWN[name](colour, rng.uniform(-0.05, 0.05, 4), rng)


def vary(colour, by, rng):
    """A colour whose red, green and blue are each changed by up to `by`."""
    return tuple(int(c) for c in np.clip(np.array(colour) + rng.integers(-by, by + 1, 3), 0, 255))


def shade(coat, factor):
    """A coat's colour, darker or lighter."""
    return tuple(int(c) for c in np.clip(np.array(coat) * factor, 0, 255))


def creature(draw, mask, name, coat, at, unit, rng):
    """Draw one creature into a picture and its class number into a mask (two ImageDraws).

    unit: pixels per body length; at: where its middle is.
    """
    mirror = rng.choice([-1, 1])
    angle = rng.uniform(-0.25, 0.25)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    turn = rotation * unit * [[mirror], [1]]                            # body lengths -> pixels
    spot = shade(coat, rng.choice([0.75, 1.25]))
    named = {"coat": shade(coat, 1), "dark": shade(coat, 0.8), "spot": spot}
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

    def spot(self):
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


THING = (cloud, window, fence, wave_and_ball, cactus, puddle, fir, five_flowers)
THINGS = dict(zip(PLACES, THING))


def scenery(draw, place, side, rng):
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


def choose_coat(grounds, rng):
    """The colour of any coat that stands out from the ground's colours (2, 3)."""
    while True:
        coat = vary(COATS[rng.integers(len(COATS))], 20, rng)
        if np.linalg.norm(grounds - coat, axis=1).min() > 70:
            return coat


def choose_centre(centres, side, rng):
    """Of six random points the one farthest from the creatures that are there.

    So most stand beside each other, and some before another.
    """
    tries = [rng.uniform(0.25, 0.75, 2) * side for _ in range(6)]
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


def photograph(image, rng):
    """The drawing at half its size, in uneven light and with noise: (SIZE, SIZE, 3) uint8."""
    image = np.asarray(image.reduce(2), np.float32)
    light = np.linspace(rng.uniform(0.85, 1.1), rng.uniform(0.85, 1.1), SIZE)[None, :, None]
    image = image * light + rng.normal(0, 3, image.shape)
    return image.clip(0, 255).astype(np.uint8)


def scene(rng):
    """One picture: image (SIZE, SIZE, 3) and mask (SIZE, SIZE), uint8, and its place's name."""
    side = 2 * SIZE  # drawn twice as large, then reduced: soft edges in the image, not in the mask
    image, mask = Image.new("RGB", (side, side)), Image.new("L", (side, side))
    draw, draw_mask = ImageDraw.Draw(image), ImageDraw.Draw(mask)
    place = list(PLACES)[rng.integers(len(PLACES))]
    grounds = np.array(scenery(draw, place, side, rng), float)          # (2, 3)
    rng.random()  # not used; without it, every later choice and so every world would be another
    centres = []
    for k in range(rng.choice(4, p=COUNTS)):
        at_home = rng.random() < (HOME if k == 0 else HOME / 2)
        name = PLACES[place][2] if at_home else CLASSES[1 + rng.integers(len(CLASSES) - 1)]
        coat = choose_coat(grounds, rng)
        unit = side * rng.uniform(*BODIES)
        centres.append(choose_centre(centres, side, rng))
        creature(draw, draw_mask, name, coat, centres[-1], unit, rng)
    draw_bushes(draw, draw_mask, side, grounds[1], rng)
    image = photograph(image, rng)
    return image, np.asarray(mask)[1::2, 1::2], place


# ======================================================================================= a dataset

def drawing_digest(seed):
    """sha256 of 64 pictures, so that another version's world is noticed."""
    sha = hashlib.sha256()
    for i in range(64):  # every class and place is among them
        image, mask, _ = scene(np.random.default_rng([seed, i]))
        sha.update(image.tobytes() + mask.tobytes())
    return sha.hexdigest()


def draw_world(folder, seed, train, val):
    """Draw a dataset in VOC's layout, and places.txt beside it; the same for the same seed.

    What stands there already is left if it is the same, and ValueError if it is not.
    """
    made = folder / "world.json"                                        # written last
    facts = {"seed": seed, "train": train, "val": val, "drawing": drawing_digest(seed)}
    if made.is_file():
        if json.loads(made.read_text()) != facts:
            raise ValueError(f"{folder} was drawn by another version of {Path(__file__).name}; "
                             f"remove {folder} and what was made from it")
        return
    names, labels, places = [], [], []
    for i in range(train + val):
        image, mask, place = scene(np.random.default_rng([seed, i]))
        name = f"{i:05d}"
        path, photo = folder / "JPEGImages" / f"{name}.jpg", Image.fromarray(image)
        write_whole(path, lambda f: photo.save(f, "JPEG", quality=95))
        write_label(folder / "SegmentationClass" / f"{name}.png", mask)
        names.append(f"{name}\n")
        labels.append(f"{name} " + ", ".join(CLASSES[k] for k in np.unique(mask) if k) + "\n")
        places.append(f"{name} {place}\n")
    write_text(folder / "places.txt", "".join(places))                  # no stage reads them
    write_text(folder / "image_labels.txt", "".join(labels))
    write_text(folder / "classes.txt", "\n".join(CLASSES) + "\n")
    for split, part in (("train", names[:train]), ("val", names[train:])):
        write_text(folder / "ImageSets/Segmentation" / f"{split}.txt", "".join(part))
    write_json(made, facts)


# ================================================================================== the small CLIP
#
# It has CLIP's architecture, as ViT-B/16 half as deep and a quarter as wide, and was trained by
# contrast on 12,000 drawn pictures and captions of other seeds, never on a mask (tests/RESULTS.md).
# Unlike OpenAI's it has seen nothing but these worlds, and matched patches with captions too.

def small_clip(folder):
    """An ordinary CLIP state dict in `folder`, as the stages' `--clip` takes it; made if absent.

    tests/toy_clip.pt is smaller: half precision, and of the token embeddings only those that
    captions have used ("token_rows" says which). The other tokens get the mean embedding.
    ValueError where the file is damaged.
    """
    if not WEIGHTS.is_file() or clip.file_sha256(WEIGHTS) != WEIGHTS_SHA256:
        expected = f"its sha256 is not {WEIGHTS_SHA256[:12]}..."
        raise ValueError(f"{WEIGHTS}: absent, or {expected}; restore the file")
    path = folder / f"clip_{WEIGHTS_SHA256[:8]}.pt"
    if not path.is_file():
        state = torch.load(WEIGHTS, weights_only=True)
        rows = state.pop("token_rows")
        state = {name: value.float() for name, value in state.items()}
        known = state["token_embedding.weight"]                         # (len(rows), C)
        table = known.mean(0).repeat(49408, 1)                          # (all tokens, C)
        table[rows] = known
        state["token_embedding.weight"] = table
        write_whole(path, lambda f: torch.save(state, f))
    return path
