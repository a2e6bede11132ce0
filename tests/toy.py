"""Runs the three stages on a small drawn world, as a user would on VOC, and tells what each gives.

run     python tests/toy.py                # the chain on world 0; again: seconds
        python tests/toy.py --small        # a reduced run, what the tests do
        python tests/toy.py --method clip  # after a run: its rows with seeds from CLIP
        python tests/toy.py --world 7      # another world
        python tests/toy.py --ablate       # one part of WeakCLIP taken out at a time, 3 seeds each
        python tests/toy.py --picture      # after a run: tests/chain.png, the picture in the README
writes  runs/toy/data/toy<N> (VOC's layout), runs/toy/clip_*.pt, runs/toy/ablate/, and in
        runs/toy/toy<N>/: 1_cam, 2_weakclip, 3_segment, crf_on_cams, crf_on_probs, upper_bound,
        from_clip (the stages once more, on seeds from CLIP), resnet18.pt (stage 3's start),
        rows.json (the table), metrics.json, metrics.csv and report.html; with --small, small<N>
        for toy<N>

What is drawn, and the small CLIP that comes with it, is in `tests/toy_world.py`. Runs go on where
they stopped: what is there is not made again.
"""
import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

# The file beside this one comes first: it puts the stages on Python's path.
from toy_world import ROOT, SIZE, WEIGHTS_SHA256, draw_world, has_bfloat16, small_clip
from eval import Parser, find_dataset, heat, colour_map, read_label, run, score_folder
from eval import write_json, write_label, write_text, write_whole
from stage1_cam import Machine, cam_scores, read_checkpoint
from stage2_weakclip import MASK_CRF, PAPER, RELEASED, mask_from

# Options of the stages' command lines. Those of the full chain were found on worlds 0 to 2. The
# ablations have fewer images and iterations than the chain, and smaller batches, to be quick.
SCRATCH = ["--arch", "resnet18", "--weights", "none"]
FULL = {
    "name": "toy",
    "train": 600,
    "val": 150,
    "stage 1": "--crop 160 --iters 420 --batch-size 8 --lr 0.02".split(),
    "stage 2": "--crop 128 --iters 300 --batch-size 16 --lr 1e-3".split(),
    "stage 3": "--crop 128 --iters 350 --batch-size 8 --lr 0.00125 --scales 1 1.5".split(),
    "ablation": "--crop 128 --iters 150 --batch-size 8 --lr 1e-3 --limit 200".split(),
}
SMALL = {
    "name": "small",
    "train": 120,
    "val": 40,
    "stage 1": "--crop 160 --iters 200 --batch-size 8 --lr 0.02".split(),
    "stage 2": "--crop 128 --iters 150 --batch-size 8 --lr 1e-3".split(),
    "stage 3": "--crop 96 --iters 40 --batch-size 4 --lr 0.00125 --scales 1".split(),
    "ablation": "--crop 128 --iters 5 --batch-size 4 --lr 1e-3 --limit 10".split(),
}
VIEWS = ["--scales", "1", "2.33", "--no-flip"]  # 2.33: nine windows that overlap by a third


# ============================================================================== running the stages

def machine_options(device: str) -> list[str]:
    """The stages' options for the device; --amp where they take it, which can halve the time."""
    amp = ["--amp"] if has_bfloat16(device) else []
    return ["--device", device, *amp]


def stage(script, *options, log=None, threads=None):
    """Run a stage as a user would, here or, with `log`, into a file; ValueError where it fails."""
    command = [sys.executable, script, *map(str, options)]
    env = dict(os.environ)
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    if not log:
        print("\n$ python", *command[1:], flush=True)
        code = subprocess.run(command, cwd=ROOT, env=env).returncode
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as f:
            code = subprocess.run(command, cwd=ROOT, env=env, stdout=f, stderr=f).returncode
    if code:
        where = f"see {log}" if log else "its message stands above"
        raise ValueError(f"{script} ended with status {code}; {where}")


class Rows:
    """A table kept in a JSON file; what is there is not made again.

    The file holds {"made": from what, "machine": the stages' options, "rows": {name: score}}. A
    table that was made from something else is refused (ValueError), so that the rows of one table
    can be compared.
    """

    def __init__(self, path: Path, made: dict, device: str):
        self.path = path
        self.lock = Lock()  # two runs at once may add rows
        if path.is_file():
            self.kept = json.loads(path.read_text())
            self.refuse_another(made, device)
        else:
            self.kept = {"made": made, "machine": machine_options(device), "rows": {}}
            write_json(path, self.kept)
        self.machine = self.kept["machine"]
        self.rows = self.kept["rows"]

    def refuse_another(self, made, device):
        """ValueError if the file's table was made from something else, or on another device."""
        if self.kept.get("made") != made:
            raise ValueError(f"{self.path} was made with other settings or in another world; "
                             f"remove {self.path.parent}")
        before = self.kept["machine"][1]
        if before != device:
            raise ValueError(f"{self.path} was made with --device {before}: give it, "
                             f"or remove {self.path.parent}")

    def missing(self, *names) -> bool:
        """True if one of these rows is not there."""
        return any(name not in self.rows for name in names)

    def add(self, name, data, folder, split, limit=None):
        """Score the label PNGs in `folder` and keep the row; ValueError where one is missing."""
        row = score_folder(find_dataset(data), folder, split, limit)
        if not row or row["n"] < row["of"]:
            raise ValueError(f"{folder}: label PNGs are missing; "
                             f"remove {self.path.parent} and start afresh")
        kept = ("split", "n", "of", "truth", "miou", "pixel_accuracy")
        with self.lock:
            self.rows[name] = {key: row[key] for key in kept}
            write_json(self.path, self.kept)


def prepare(runs: Path, world: int, settings: dict) -> tuple[Path, Path, dict]:
    """The world's folder and the small CLIP's file, made if absent, and what tables depend on.

    The last is {"chain": facts, "ablation": facts}: a table made from other facts is refused.
    """
    data = runs / "data" / f"{settings['name']}{world}"
    weights = small_clip(runs)
    facts = {"world": draw_world(data, world, settings["train"], settings["val"])}
    facts |= {"clip": WEIGHTS_SHA256, "start": SCRATCH, "views": VIEWS}
    used = {"chain": ("stage 1", "stage 2", "stage 3"), "ablation": ("stage 1", "ablation")}
    made = {}
    for table, keys in used.items():
        made[table] = {**facts, **{key: settings[key] for key in keys}}
    return data, weights, made


# ======================================================================================= the chain

def chain(runs: Path, world: int, settings: dict, device="cpu", method="classifier") -> dict:
    """Stages 1, 2 and 3 and the upper bound, scored as they go; returns {row's name: score}.

    method: "clip" for the rows of seeds from CLIP as well, beside the classifier's.
    """
    start = time.time()
    data, weights, made = prepare(runs, world, settings)
    rows = Rows(runs / data.name / "rows.json", made["chain"], device)
    make_seeds(data, runs, settings, rows)
    make_masks(data, runs, weights, settings, rows)
    train_networks(data, runs, settings, rows)
    if method == "clip":
        chain_from_clip(data, runs, weights, settings, rows)
    stage("eval.py", "--data", data, "--runs", runs)
    print(f"\n{data.name}: this run took {time.time() - start:.0f} s; "
          f"{' '.join(rows.machine)}, {os.cpu_count()} cores\n")
    print_table(rows.rows)
    print(f"\npictures and curves: {runs / data.name / 'report.html'}")
    return rows.rows


def make_seeds(data, runs, settings, rows):
    """Stage 1: CAMs and seeds; and, as a baseline, the CRF on its CAMs without any stage 2."""
    out = runs / data.name
    if rows.missing("1 seeds", "1 CRF on CAMs"):
        options = ["--data", data, "--runs", runs, *rows.machine, *SCRATCH, *settings["stage 1"]]
        stage("stage1_cam.py", *options)
        rows.add("1 seeds", data, out / "1_cam/seeds", "train")
        crf_alone(find_dataset(data), out / "1_cam/cams", out / "crf_on_cams/masks/train")
        rows.add("1 CRF on CAMs", data, out / "crf_on_cams/masks/train", "train")


def make_masks(data, runs, weights, settings, rows):
    """Stage 2, trained once; its masks written with ever more of what is done at test time.

    Each further set only rewrites the masks: one scale; two; with the CRF; with the label filter.
    """
    out = runs / data.name
    masks = out / "2_weakclip/masks"
    options = ["--data", data, "--runs", runs, *rows.machine, "--clip", weights]
    options += settings["stage 2"]
    if rows.missing("2 masks raw"):
        stage("stage2_weakclip.py", *options, "--scales", 1, "--no-flip", "--no-crf")
        rows.add("2 masks raw", data, masks / "train", "train")
    if rows.missing("2 masks + multi-scale", "2 masks + CRF"):
        # The probabilities are kept, so that the CRF's row needs no second pass of the network.
        stage("stage2_weakclip.py", *options, *VIEWS, "--no-crf", "--save-probs")
        rows.add("2 masks + multi-scale", data, masks / "train", "train")
        crf_alone(find_dataset(data), out / "2_weakclip/probs/train", out / "crf_on_probs")
        rows.add("2 masks + CRF", data, out / "crf_on_probs", "train")
    if rows.missing("2 masks + label filter", "2 masks + CRF, val"):
        stage("stage2_weakclip.py", *options, *VIEWS, "--label-filter")
        rows.add("2 masks + label filter", data, masks / "train", "train")
        rows.add("2 masks + CRF, val", data, masks / "val", "val")      # filtered is train only


def crf_alone(data, stored: Path, folder: Path):
    """Masks of train by stage 2's last step, the CRF, from what a stage has stored.

    That is CAMs or stage 2's probabilities. On CAMs it is a baseline: it shows how much of stage
    2's gain is not the network's.
    """
    for image_id in tqdm(data.ids("train"), desc=f"CRF on {stored.name}"):
        with np.load(stored / f"{image_id}.npz") as arrays:
            kept = dict(arrays)
        classes, image = kept["keys"], data.image(image_id)
        if "cam" in kept:
            scores = cam_scores(kept["cam"], image.shape[:2])           # (1 + J, H, W)
            probs = scores / scores.sum(0)                              # background as for seeds
            classes = np.concatenate([[0], classes])
        else:
            probs = torch.from_numpy(kept["prob"]).float()              # (J, H, W)
        mask, _ = mask_from(probs, image, MASK_CRF["VOC2012"])
        write_label(folder / f"{image_id}.png", classes.astype(np.uint8)[mask])


def train_networks(data, runs, settings, rows):
    """Stage 3 on the masks, and on true masks: its upper bound. The two at once, on a core each."""
    out = runs / data.name
    bound = out / "upper_bound"
    if rows.missing("3 on these masks", "3 on true masks"):
        as_resnet(out / "1_cam/checkpoint.pt", out / "resnet18.pt")

    def segment(name, folder, masks, log=None):
        if rows.missing(name):
            options = ["--data", data, "--runs", folder, *rows.machine, "--masks", masks]
            start = ["--arch", "resnet18", "--weights", out / "resnet18.pt"]
            stage("stage3_segment.py", *options, *start, *settings["stage 3"], log=log, threads=1)
            rows.add(name, data, folder / data.name / "3_segment/masks/val", "val")

    with ThreadPoolExecutor(1) as beside:
        truth, log = data / "SegmentationClass", bound / "log.txt"
        other = beside.submit(segment, "3 on true masks", bound, truth, log)
        segment("3 on these masks", runs, out / "2_weakclip/masks/train")
        if not other.done():
            print("waiting for the upper bound", flush=True)
        other.result()


def chain_from_clip(data, runs, weights, settings, rows):
    """The three stages on seeds that the small CLIP gives without training.

    Stage 3 starts where the chain's other stage 3 does, from the classifier of stage 1, so that
    the two rows differ by their masks alone.
    """
    out = runs / data.name
    runs = out / "from_clip"
    masks = runs / data.name / "2_weakclip/masks"
    common = ["--data", data, "--runs", runs, *rows.machine]
    if rows.missing("1 seeds from CLIP"):
        stage("stage1_cam.py", *common, "--method", "clip", "--clip", weights)
        rows.add("1 seeds from CLIP", data, runs / data.name / "1_cam/seeds", "train")
    if rows.missing("2 masks from CLIP's seeds"):
        stage("stage2_weakclip.py", *common, "--clip", weights, *settings["stage 2"], *VIEWS,
              "--label-filter")
        rows.add("2 masks from CLIP's seeds", data, masks / "train", "train")
    if rows.missing("3 from CLIP's seeds"):
        start = ["--arch", "resnet18", "--weights", out / "resnet18.pt"]
        stage("stage3_segment.py", *common, *start, *settings["stage 3"])
        rows.add("3 from CLIP's seeds", data, runs / data.name / "3_segment/masks/val", "val")


def as_resnet(checkpoint: Path, path: Path):
    """Write stage 1's classifier as a ResNet's state dict at `path`, for stage 3 to start there.

    It too has seen image labels only. Without a start stage 3 collapses, and nothing is downloaded.
    """
    state = {}
    for name, value in read_checkpoint(checkpoint)["model"].items():
        name = name.replace("stem.0.", "conv1.").replace("stem.1.", "bn1.")
        state[name] = value
    width = state.pop("classifier.weight").shape[1]
    state["fc.weight"] = torch.zeros(1000, width)                       # asked for, not used
    state["fc.bias"] = torch.zeros(1000)
    write_whole(path, lambda f: torch.save(state, f))


def table_order(item):
    """Sorting key of a row (name, score): by stage, train before val, the upper bound last."""
    name = item[0]
    return name[0], "val" in name, "true" in name


def print_table(rows: dict):
    """A line per row: name, list, how many of how many images, mIoU in percent."""
    print(f"{'':26} {'split':6} {'images':>10} {'mIoU':>6}")
    for name, row in sorted(rows.items(), key=table_order):
        print(f"{name:26} {row['split']:6} {row['n']:3} of {row['of']:3} {row['miou']:6.1f}")


# ===================================================================================== the picture

def picture(runs: Path, world: int, settings: dict, path: Path):
    """Draw photo, CAM, seeds, masks, prediction and truth of some training pictures into a PNG.

    They are the first that show two classes or more, not the best. All is read from a finished run
    but stage 3's prediction: it labels val only, and so is asked for these photos.
    """
    data = find_dataset(runs / "data" / f"{settings['name']}{world}")
    out = runs / data.name
    labels = data.image_labels(data.ids("train"))
    ids = [image_id for image_id in labels if len(labels[image_id]) > 1][:4]
    photos = out / "photos"
    for image_id in ids:
        photos.mkdir(exist_ok=True)
        shutil.copy(data.root / "JPEGImages" / f"{image_id}.jpg", photos)
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


def what_stages_made(data, out: Path, image_id: str) -> list[np.ndarray]:
    """The pictures of a row, (H, W, 3) uint8 each, in the order of the chain; truth is last."""
    image = data.image(image_id)
    with np.load(out / "1_cam/cams" / f"{image_id}.npz") as arrays:
        cam = arrays["cam"].max(0)                                      # (h, w) of the best class
    folders = [out / "1_cam/seeds", out / "2_weakclip/masks/train", out / "3_segment/images/photos"]
    paths = [folder / f"{image_id}.png" for folder in folders]
    labels = [read_label(p) for p in [*paths, data.truth_path(image_id)]]
    return [image, heat(cam, image.shape[:2]), *(colour_map()[label] for label in labels)]


# ======================================================================================= ablations

# Switches that cannot act in a world of this size.
NO_EFFECT = {
    "train_listed_twice": "there is no trainaug list",
    "pad_windows": "every window is a multiple of 16",
    "positions_resized_once": "every window is as large as a training crop",
}


def entries() -> dict[str, list[str]]:
    """{name: stage 2's options}: the parts of the paper, then the released code's surprises."""
    out = {"paper": []}
    for part in ("prompts", "adapter", "coattention", "text_guidance"):
        out[f"{part}=false"] = ["--set", f"{part}=false"]
    for weight in ("boundary_weight", "score_weight"):
        out[f"{weight}=0"] = ["--set", f"{weight}=0"]
    out["released"] = ["--variant", "released"]
    for field in dataclasses.fields(PAPER):
        value = getattr(RELEASED, field.name)
        if value != getattr(PAPER, field.name) and field.name not in NO_EFFECT:
            text = f"{field.name}={str(value).lower()}"
            out[text] = ["--set", text]
    return out


def ablate(runs: Path, world: int, settings: dict, only=None, seeds: int = 3, device: str = "cpu"):
    """One stage 2 per entry and seed, on the same stage-1 seeds; ends in a markdown table.

    On a CPU one run a core. Masks are scored before the CRF ("+ multi-scale"), which would cover
    differences. only: names of entries to run besides "paper"; ValueError where one is unknown.
    """
    known = entries()
    for name in only or []:
        if name not in known:
            raise ValueError(f"--only {name}: the entries are {', '.join(known)}")
    data, weights, made = prepare(runs, world, settings)
    folder = runs / "ablate" / data.name
    rows = Rows(folder / "rows.json", made["ablation"], device)
    Rows(runs / data.name / "rows.json", made["chain"], device)  # refuses seeds of another world
    common = ["--data", data, "--runs", runs, *rows.machine]
    stage("stage1_cam.py", *common, *SCRATCH, *settings["stage 1"])
    options = [*settings["ablation"], *VIEWS, "--no-crf", *rows.machine]
    given = ["--clip", weights, "--seeds", runs / data.name / "1_cam/seeds", *options]
    limit = int(options[options.index("--limit") + 1])

    def train(name, seed):
        place = folder / f"{name.replace('=', '_')}_{seed}"
        choice = ["--seed", seed, *known[name]]
        stage("stage2_weakclip.py", "--data", data, "--runs", place, *given, *choice,
              log=place / "log.txt", threads=1)
        for split in ("train", "val"):
            masks = place / data.name / "2_weakclip/masks" / split
            rows.add(f"{name}, {seed}, {split}", data, masks, split, limit)

    names = dict.fromkeys(["paper", *(only or known)])                  # each once, in this order
    jobs = [(name, seed) for name in names for seed in range(seeds)]
    jobs = [job for job in jobs if rows.missing(f"{job[0]}, {job[1]}, val")]
    on_cpu = Machine(device, False).device.type == "cpu"
    run_beside(train, jobs, os.cpu_count() if on_cpu else 1)
    text = ablation_table(rows.rows, f"{data.name}, {' '.join(options)}", seeds)
    write_text(folder / "ablations.md", text)
    print("\n" + text)


def run_beside(function, jobs: list[tuple], workers: int):
    """Call `function(*job)` for every job, `workers` at a time; no job starts after a failure."""
    failed = Event()

    def one(job):
        if failed.is_set():
            return
        try:
            function(*job)
        except Exception:
            failed.set()  # the jobs that wait are not started
            raise

    with ThreadPoolExecutor(workers or 1) as pool:
        list(tqdm(pool.map(one, jobs), total=len(jobs), desc="ablations"))


def mean_and_deviation(values: np.ndarray, sign: str = "") -> str:
    """(seeds,) -> "56.1 ± 1.8"; without a deviation where there is one seed; sign "+" shows it."""
    text = f"{values.mean():{sign}.1f}"
    if len(values) > 1:
        text += f" ± {values.std(ddof=1):.1f}"
    return text


def ablation_table(rows: dict, about: str, seeds: int) -> str:
    """Markdown: a line per entry all of whose seeds are there, mean and deviation over them.

    Runs of one seed see the same pictures in the same order and, where no part is left out, start
    alike; so the difference to "paper" is taken seed by seed, which shows more than two means with
    their spreads.
    """
    what = f"mIoU in percent over {seeds} seeds: mean ± standard deviation"
    lines = [
        f"Stage 2's masks, {what} ({about})",
        "",
        "| | train | val | train, less paper's | val, less paper's |",
        "|---|---|---|---|---|",
    ]
    scores = {}
    for name in entries():
        train = [rows.get(f"{name}, {seed}, train") for seed in range(seeds)]
        val = [rows.get(f"{name}, {seed}, val") for seed in range(seeds)]
        if all(train + val):
            miou = [row["miou"] for row in train + val]
            scores[name] = np.reshape(miou, (2, seeds))
    for name, score in scores.items():
        cells = [mean_and_deviation(of_split) for of_split in score]
        if name != "paper" and "paper" in scores:
            cells += [mean_and_deviation(of_split, "+") for of_split in score - scores["paper"]]
        else:
            cells += ["", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    reasons = "; ".join(f"{name} ({why})" for name, why in NO_EFFECT.items())
    return "\n".join([*lines, "", f"Cannot act here: {reasons}"]) + "\n"


# ==================================================================================== command line

def at_least(low: int):
    """An argparse type: whole numbers from `low`."""
    def number(text):
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is below {low}")
        return int(text)
    return number


def parse_args(argv=None):
    """The options of the command line."""
    p = Parser(description=__doc__.splitlines()[0])
    p.add_argument("--world", type=at_least(0), default=0,
                   help="which world is drawn [%(default)s]")
    p.add_argument("--runs", type=Path, default=ROOT / "runs/toy",
                   help="where everything is written [%(default)s]")
    p.add_argument("--small", action="store_true", help="a smaller world: what the tests run")
    p.add_argument("--method", choices=["classifier", "clip"], default="classifier",
                   help="clip: the chain on seeds from CLIP too [%(default)s]")
    p.add_argument("--device", default="cpu", help="the stages' option [%(default)s]")
    p.add_argument("--seeds", type=at_least(1), default=3,
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
    runs = args.runs.resolve()
    if args.picture:
        picture(runs, args.world, settings, Path(__file__).with_name("chain.png"))
    elif args.ablate:
        ablate(runs, args.world, settings, args.only, args.seeds, args.device)
    else:
        chain(runs, args.world, settings, args.device, args.method)


if __name__ == "__main__":
    run(main)
