"""Runs the three stages on a small drawn world, as a user would on VOC, and tells what each gives.

run     python tests/toy.py                # the chain on world 0; again: seconds
        python tests/toy.py --world 7      # another world
        python tests/toy.py --true-masks   # and stages 2 and 3 taught by true masks: their ceilings
        python tests/toy.py --ablate       # one part of WeakCLIP taken out at a time, 3 seeds each
        python tests/toy.py --picture      # after a run: tests/chain.png, the picture in the README
        python tests/toy.py --small        # a reduced run, what the tests do
writes  runs/toy/data/toy<N> (VOC's layout), runs/toy/clip_*.pt, runs/toy/ablate/, and in
        runs/toy/toy<N>/: 1_cam, 2_weakclip, 3_segment, crf_on_cams, resnet18.pt (stage 3's start),
        table.txt, metrics.json and report.html; with --true-masks runs/toy/no_crf, true and
        true_no_crf too; with --small, small<N> for toy<N>
cost    two quiet cores of an Intel Xeon with bfloat16: the chain 4 minutes, --true-masks 3.5 more,
        with --float32 the chain 8; --ablate 38, beside what others did on the machine

What is drawn, and the small CLIP that comes with it, is in `tests/toy_world.py`. Runs go on where
they stopped, and a finished stage does nothing; to start afresh, remove runs/toy.
"""
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

# The file beside this one comes first: it puts the stages on Python's path.
from toy_world import ROOT, SIZE, draw_world, small_clip
from eval import (Parser, colour_map, find_dataset, light, read_label, run, score_folder,
                  write_label, write_text, write_whole)
from stage1_cam import cam_scores, dense_crf
from stage2_weakclip import MASK_CRF, PAPER, RELEASED

# Options of the stages' command lines, found on worlds 0 to 2 (tests/RESULTS.md).
SCRATCH = ["--arch", "resnet18", "--weights", "none"]
FULL = {
    "name": "toy",
    "train": 240,
    "val": 80,
    "stage 1": "--crop 160 --iters 200 --batch-size 8 --lr 0.01".split(),
    "stage 2": "--crop 128 --iters 300 --batch-size 8 --lr 1e-3".split(),
    "stage 3": "--crop 128 --iters 300 --batch-size 8 --lr 0.00125 --scales 1 1.5".split(),
    "ablation": "--crop 128 --iters 120 --batch-size 8 --lr 1e-3 --limit 100".split(),
}
SMALL = {
    "name": "small",
    "train": 12,
    "val": 4,
    "stage 1": "--crop 96 --iters 6 --batch-size 4 --lr 0.01".split(),
    "stage 2": "--crop 128 --iters 4 --batch-size 4 --lr 1e-3".split(),
    "stage 3": "--crop 96 --iters 4 --batch-size 4 --lr 0.00125 --scales 1".split(),
    "ablation": "--crop 128 --iters 5 --batch-size 4 --lr 1e-3 --limit 10".split(),
}
VIEWS = ["--scales", "1", "2.33", "--no-flip"]  # 2.33: nine windows that overlap by a third
# A guess at what the steps of the chain take on two free cores with bfloat16, and those that
# --true-masks adds. Where they take longer, `Clock` says so as it goes.
SECONDS = (72, 11, 75, 62)
SECONDS_MORE = (35, 65, 60)


# ============================================================================== running the stages

def machine_options(device, float32):
    """The stages' options for the device, and --amp, which halves the time where bfloat16 is."""
    return ["--device", device] + ([] if float32 else ["--amp"])


def stage(script, *options, log=None):
    """Run a stage as a user would; ValueError where it fails.

    Its bars and faults are shown, or with `log` go into that file, and it has one thread then.
    """
    command = [sys.executable, script, *map(str, options)]
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(log, "ab") as f:
            code = subprocess.run(command, cwd=ROOT, env=env, stdout=f, stderr=f).returncode
    else:
        print("$ python", " ".join(command[1:]).replace(f"{ROOT}/", ""), flush=True)
        # Its standard output names the next command, which the toy runs itself.
        code = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode
    if code:
        where = f"see {log}" if log else "its message stands above"
        raise ValueError(f"{script} ended with status {code}; {where}")


class Clock:
    """Says before each step which one it is, and about how long all that is left will take.

    seconds: what each step should take. Where the steps that are done took longer than
    that, what is left is taken to be as slow.
    """

    def __init__(self, seconds):
        self.seconds = seconds
        self.done = 0
        self.start = time.time()

    def step(self, what):
        """To be called when the step begins."""
        expected = sum(self.seconds[:self.done])
        pace = max(1, (time.time() - self.start) / expected) if expected else 1
        left = round(pace * sum(self.seconds[self.done:]))
        self.done += 1
        print(f"\nstep {self.done} of {len(self.seconds)}, about {left // 60} min {left % 60} s "
              f"left in all: {what}", flush=True)


def prepare(runs, world, settings):
    """The world as a dataset and the small CLIP's file; made if absent."""
    folder = runs / "data" / f"{settings['name']}{world}"
    draw_world(folder, world, settings["train"], settings["val"])
    return find_dataset(folder), small_clip(runs)


# ======================================================================================= the chain

# Row of the table: (its label PNGs below --runs, the list, what 800 photos of VOC 2012 have there).
ROWS = {
    "seeds (stage 1), train": ("{}/1_cam/seeds", "train", "48.5"),
    "the CRF on the CAMs, no stage 2, train": ("{}/crf_on_cams", "train", "51.9"),
    "masks (stage 2), train": ("{}/2_weakclip/masks/train", "train", "59.3"),
    "stage 3 taught by the masks, val": ("{}/3_segment/masks/val", "val", ""),
}
# Rows that --true-masks adds.
CEILINGS = {
    "masks without their CRF, train": ("no_crf/{}/2_weakclip/masks/train", "train", "53.4"),
    "the same, stage 2 taught by true masks": ("true/{}/2_weakclip/masks/train", "train", ""),
    "stage 3 taught by true masks, val": ("true/{}/3_segment/masks/val", "val", ""),
}
WHY = """
The CRF does most here because the drawing's colours end where its things end; the network adds -1
to 6 points. Taught by true masks, without its CRF, it comes in these minutes to 63 to 66
(--true-masks), not far beyond what the CRF makes of the CAMs.
On 800 photos colours end anywhere and the CLIP-like encoder knows more: there the network goes 7
points beyond the CRF.
"""


def chain(runs, world, settings, machine, true_masks=False):
    """The three stages and the CRF on the CAMs, then the table; returns {its row: mIoU}."""
    clock = Clock(SECONDS + SECONDS_MORE if true_masks else SECONDS)
    data, weights = prepare(runs, world, settings)
    out = runs / data.name
    common = ["--data", data.root, *machine]
    masks = [*common, "--clip", weights, *settings["stage 2"], *VIEWS, "--label-filter"]
    network = [*common, "--arch", "resnet18", "--weights", out / "resnet18.pt"]
    network += settings["stage 3"]

    clock.step("stage 1, a classifier, its CAMs, and seeds cut from them")
    stage("stage1_cam.py", *common, "--runs", runs, *SCRATCH, *settings["stage 1"])
    clock.step("a baseline, the CRF on these CAMs")
    crf_on_cams(data, out / "1_cam/cams", out / "crf_on_cams")
    clock.step("stage 2, WeakCLIP learns from the seeds, and its masks")
    stage("stage2_weakclip.py", *masks, "--runs", runs)
    clock.step("stage 3, an ordinary network learns from the masks")
    as_resnet(out / "1_cam/checkpoint.pt", out / "resnet18.pt")
    stage("stage3_segment.py", *network, "--runs", runs)
    if true_masks:
        ceilings(data, runs, masks, network, clock)

    stage("eval.py", "--data", data.root, "--runs", runs)
    rows = {}
    for name, (folder, split, _) in (ROWS | CEILINGS if true_masks else ROWS).items():
        rows[name] = score_folder(data, runs / folder.format(data.name), split)["miou"]
    text = table(rows, data.name)
    write_text(out / "table.txt", text)
    spent = f"{time.time() - clock.start:.0f} s, {sum(os.times()[:4]):.0f} of processor time"
    print(f"\n{spent}; {' '.join(common[2:])}, {os.cpu_count()} cores\n\n{text}")
    print(f"pictures and curves: {out / 'report.html'}")
    return rows


def crf_on_cams(data, cams, folder):
    """Masks of train by stage 2's last step, the CRF, straight from stage 1's CAMs.

    No network and no CLIP between: how much of stage 2's gain is not the network's. Like the seeds
    it is told the image's classes.
    """
    for image_id in tqdm(data.ids("train"), desc="CRF"):
        source, path = cams / f"{image_id}.npz", folder / f"{image_id}.png"
        if path.is_file() and path.stat().st_mtime > source.stat().st_mtime:
            continue
        arrays, image = dict(np.load(source)), data.image(image_id)
        scores = cam_scores(torch.from_numpy(arrays["cam"]), image.shape[:2])
        probs = (scores / scores.sum(0)).clamp(min=1e-5)                # background as for seeds
        rgb = torch.from_numpy(image).permute(2, 0, 1)                  # (3, H, W)
        winner = dense_crf(probs[None], rgb[None], *MASK_CRF["VOC2012"])[0].argmax(0)
        classes = np.concatenate([[0], arrays["keys"]]).astype(np.uint8)
        write_label(path, classes[winner.numpy()])


def as_resnet(checkpoint, path):
    """Write stage 1's classifier as a ResNet's state dict at `path`, for stage 3 to start there.

    It too has seen image labels only. Without a start stage 3 collapses, and nothing is downloaded.
    """
    parts = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    state = {}
    for name, value in torch.load(checkpoint, weights_only=True)["model"].items():
        if name.startswith("backbone."):                                # not the classifier itself
            _, number, rest = name.split(".", 2)
            state[f"{parts[int(number)]}.{rest}"] = value
    write_whole(path, lambda f: torch.save(state, f))


def ceilings(data, runs, masks, network, clock):
    """Stage 2's masks without the CRF; then stages 2 and 3 taught by true masks.

    masks, network: the options of stages 2 and 3 in the chain.
    """
    truth = data.root / "SegmentationClass"
    trained = runs / data.name / "2_weakclip/checkpoint.pt"
    clock.step("stage 2's masks without their CRF")
    stage("stage2_weakclip.py", *masks, "--no-crf", "--runs", runs / "no_crf",
          "--checkpoint", trained)
    clock.step("stage 2 taught by true masks, no CRF: what this network can do in these minutes")
    stage("stage2_weakclip.py", *masks, "--no-crf", "--runs", runs / "true", "--seeds", truth)
    clock.step("stage 3 taught by true masks")
    stage("stage3_segment.py", *network, "--runs", runs / "true", "--masks", truth)


def table(rows, name):
    """A line per row: mIoU in percent here, and on 800 photos; and why they differ."""
    lines = [f"{'mIoU in percent':42} {name:>8} {'800 photos':>12}"]
    for row, miou in rows.items():
        photos = (ROWS | CEILINGS)[row][2]
        lines.append(f"{row:42} {miou:8.1f} {photos:>12}".rstrip())
    return "\n".join(lines) + "\n" + WHY


# ===================================================================================== the picture

def picture(runs, world, settings, path):
    """Draw photo, CAM, seeds, masks, prediction and truth of some training pictures into a PNG.

    They are the first that show two classes or more, not the best. All is read from a finished run
    but stage 3's prediction: it labels val only, and so is asked for these photos.
    """
    data, _ = prepare(runs, world, settings)
    out = runs / data.name
    labels = data.image_labels(data.ids("train"))
    ids = [image_id for image_id in labels if len(labels[image_id]) > 1][:4]
    photos = out / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    for image_id in ids:
        shutil.copy(data.image_path(image_id), photos)
    scales = settings["stage 3"][settings["stage 3"].index("--scales"):]
    stage("stage3_segment.py", "--data", data.root, "--runs", runs, "--images", photos, *scales)

    titles = ["photo", "CAM", "seeds", "pseudo mask", "prediction", "truth"]
    step, head = SIZE + 4, 16  # pixels from one tile to the next, and for the titles
    sheet = Image.new("RGB", (len(titles) * step, head + len(ids) * step), "white")
    for column, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((column * step + 2, 2), title, fill="black")
    for row, image_id in enumerate(ids):
        for column, pixels in enumerate(what_stages_made(data, out, image_id)):
            sheet.paste(Image.fromarray(pixels), (column * step, head + row * step))
    small = sheet.quantize(128)  # a palette: a quarter of the size
    write_whole(path, lambda f: small.save(f, "PNG", optimize=True))
    print(f"{path}: {path.stat().st_size / 1000:.0f} KB")


def what_stages_made(data, out, image_id):
    """The pictures of a row, (H, W, 3) uint8 each, in the order of the chain; truth is last."""
    image = data.image(image_id)
    cam = np.load(out / f"1_cam/cams/{image_id}.npz")["cam"].max(0)     # (h, w) of the best class
    folders = [out / "1_cam/seeds", out / "2_weakclip/masks/train", out / "3_segment/images/photos"]
    paths = [folder / f"{image_id}.png" for folder in folders]
    labels = [read_label(p) for p in [*paths, data.truth_path(image_id)]]
    return [image, light(image, cam), *(colour_map()[label] for label in labels)]


# ======================================================================================= ablations

# Switches that cannot act in a world of this size.
NO_EFFECT = {
    "train_listed_twice": "there is no trainaug list",
    "pad_windows": "every window is a multiple of 16",
    "positions_resized_once": "every window is as large as a training crop",
}


def entries():
    """{name: stage 2's options}: the parts of the paper, then the released code's surprises."""
    parts = ["prompts", "adapter", "coattention", "text_guidance"]
    settings = [f"{part}=false" for part in parts] + ["boundary_weight=0", "score_weight=0"]
    for field in dataclasses.fields(PAPER):
        value = getattr(RELEASED, field.name)
        if value != getattr(PAPER, field.name) and field.name not in NO_EFFECT:
            settings.append(f"{field.name}={str(value).lower()}")
    out = {"paper": [], "released": ["--variant", "released"]}
    return out | {setting: ["--set", setting] for setting in settings}


def ablate(runs, world, settings, machine, only=None, seeds=3):
    """One stage 2 per entry and seed, on the same stage-1 seeds; ends in a markdown table.

    One run a core. Masks are scored before the CRF, which would cover differences. only:
    names of entries to run besides "paper"; ValueError where one is unknown.
    """
    known = entries()
    for name in only or []:
        if name not in known:
            raise ValueError(f"--only {name}: the entries are {', '.join(known)}")
    data, weights = prepare(runs, world, settings)
    common = ["--data", data.root, *machine]
    stage("stage1_cam.py", *common, "--runs", runs, *SCRATCH, *settings["stage 1"])
    folder = runs / "ablate" / data.name
    given = [*settings["ablation"], *VIEWS, "--no-crf"]
    limit = int(given[given.index("--limit") + 1])
    sources = ["--clip", weights, "--seeds", runs / data.name / "1_cam/seeds"]
    found = {}  # {(entry, seed): [train, val]}

    def train(job):
        name, seed = job
        place = folder / f"{name.replace('=', '_')}_{seed}"
        stage("stage2_weakclip.py", *common, "--runs", place, *sources, *given,
              "--seed", seed, *known[name], log=place / "log.txt")
        masks = place / data.name / "2_weakclip/masks"
        found[job] = [score_folder(data, masks / split, split, limit)["miou"]
                      for split in ("train", "val")]

    names = dict.fromkeys(["paper", *(only or known)])                  # each once, in this order
    jobs = [(name, seed) for name in names for seed in range(seeds)]
    run_beside(train, jobs, os.cpu_count() if "cpu" in machine else 1)
    scores = {name: np.array([found[name, seed] for seed in range(seeds)]) for name in names}
    text = ablation_table(scores, f"{data.name}, {' '.join(given)}")
    write_text(folder / "ablations.md", text)
    print("\n" + text)


def run_beside(function, jobs, workers):
    """Call function(job) for every job, `workers` at a time; no job starts after a failure."""
    pool = ThreadPoolExecutor(workers)
    try:
        list(tqdm(pool.map(function, jobs), total=len(jobs), desc="ablations"))
    finally:
        pool.shutdown(cancel_futures=True)


def mean_and_deviation(values, sign=""):
    """(seeds,) -> "56.1 ± 1.8"; without a deviation where there is one seed; sign "+" shows it."""
    text = f"{values.mean():{sign}.1f}"
    if len(values) > 1:
        text += f" ± {values.std(ddof=1):.1f}"
    return text


def ablation_table(scores, about):
    """Markdown: a line per entry, mean and deviation over its seeds.

    scores: {entry: (seeds, 2) mIoU on train and val}.
    Runs of one seed see the same pictures in the same order and, where no part is left out, start
    alike; so the difference to "paper" is taken seed by seed, which shows more than two means with
    their spreads.
    """
    lines = [
        f"Stage 2's masks before the CRF, mIoU in percent over {len(scores['paper'])} seeds: "
        f"mean ± standard deviation ({about})",
        "",
        "| | train | val | train, less paper's | val, less paper's |",
        "|---|---|---|---|---|",
    ]
    for name, score in scores.items():
        cells = [mean_and_deviation(of_split) for of_split in score.T]
        if name == "paper":
            cells += ["", ""]
        else:
            less = score - scores["paper"]
            cells += [mean_and_deviation(of_split, "+") for of_split in less.T]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    reasons = "; ".join(f"{name} ({why})" for name, why in NO_EFFECT.items())
    return "\n".join([*lines, "", f"Cannot act here: {reasons}"]) + "\n"


# ==================================================================================== command line

def parse_args(argv=None):
    """The options of the command line."""
    p = Parser(description=__doc__.splitlines()[0])
    p.add_argument("--world", type=int, default=0, metavar="N",
                   help="which world is drawn [%(default)s]")
    p.add_argument("--runs", type=Path, default=ROOT / "runs/toy",
                   help="where everything is written [%(default)s]")
    p.add_argument("--small", action="store_true", help="a smaller world: what the tests run")
    p.add_argument("--true-masks", action="store_true",
                   help="the chain, and what stages 2 and 3 give when true masks teach them")
    p.add_argument("--device", default="cpu", help="the stages' option [%(default)s]")
    p.add_argument("--float32", action="store_true",
                   help="for processors that lack bfloat16 (AVX512-BF16, AMX): more time")
    p.add_argument("--seeds", type=int, default=3,
                   help="training seeds of each ablation [%(default)s]")
    p.add_argument("--only", nargs="+", metavar="ENTRY",
                   help="with --ablate: besides the paper these only, e.g. prompts=false released")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--ablate", action="store_true",
                      help="take out one part of WeakCLIP at a time")
    what.add_argument("--picture", action="store_true",
                      help="after a run: draw the README's picture, tests/chain.png, from it")
    args = p.parse_args(argv)
    if args.only and not args.ablate:
        p.error("--only goes with --ablate")
    return args


def main():
    """The command line."""
    args = parse_args()
    settings = SMALL if args.small else FULL
    runs, machine = args.runs.resolve(), machine_options(args.device, args.float32)
    if args.picture:
        picture(runs, args.world, settings, Path(__file__).with_name("chain.png"))
    elif args.ablate:
        ablate(runs, args.world, settings, machine, args.only, args.seeds)
    else:
        chain(runs, args.world, settings, machine, args.true_masks)


if __name__ == "__main__":
    run(main)
