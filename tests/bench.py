"""What things cost: CPU seconds, operations and memory of every part, measured in turn with others.

run     python tests/bench.py                        # everything, on one thread: ten minutes or so
        python tests/bench.py crf step --json f.json # some parts, and the figures in a file
        python tests/bench.py --against ../before    # each part in turn with another checkout's
        python tests/bench.py labels --data VOC2012  # our CRF's labels beside pydensecrf's

Read CPU seconds: on a machine that is shared, wall time says what others did. Each contestant (this
checkout; the one of --against; pydensecrf for the CRF, where it is installed) is a process of its
own with the same measuring code; rounds go A B A B, so that all see the same machine. A figure is
the median of the rounds, with the least and the most. "of peak" is what the operations counted
would take at the speed of a large matrix product, measured in the same run, over what was taken.
Everything is measured on noise and random weights: what a part costs does not depend on what is
seen, but for the CRF, whose lattice grows with the variety of colours. Nothing is asserted.
"""
import argparse
import atexit
import contextlib
import importlib.util
import json
import os
import platform
import resource
import shutil
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
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent.parent
LOSS_CRF = ((3, 3), (80, 13, 10))
MASK_CRF = ((3, 3), (83, 5, 3))
PHOTO = (375, 500)


# ========================================================================== what is put to the test

def pydensecrf(probs, image, gaussian, bilateral):
    """Q (K, H, W) of probs (K, H, W) and image (3, H, W), by the package that the published numbers
    were made with (PyPI: pydensecrf2)."""
    import pydensecrf.densecrf as dcrf
    K, H, W = probs.shape
    crf = dcrf.DenseCRF2D(W, H, K)
    crf.setUnaryEnergy(np.ascontiguousarray(-probs.log().reshape(K, -1).numpy()))
    crf.addPairwiseGaussian(sxy=gaussian[0], compat=gaussian[1])
    rgb = np.ascontiguousarray(image.permute(1, 2, 0).numpy().astype(np.uint8))
    crf.addPairwiseBilateral(sxy=bilateral[0], srgb=bilateral[1], compat=bilateral[2], rgbim=rgb)
    return torch.from_numpy(np.array(crf.inference(10))).reshape(K, H, W)


def smooth_probabilities(K, H, W, seed):
    """Random class probabilities (K, H, W) that vary over about 60 pixels, as a network's do, with
    many near ties."""
    noise = torch.randn(1, K, H // 60 + 2, W // 60 + 2,
                        generator=torch.Generator().manual_seed(seed))
    return (3 * F.interpolate(noise, (H, W), mode="bicubic")[0]).softmax(0)


def smooth_photo(H, W, seed):
    """A photo (H, W, 3) uint8: colours that change over some 60 pixels, and a camera's noise."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 3, H // 60 + 2, W // 60 + 2, generator=g)
    colours = 128 + 60 * F.interpolate(noise, (H, W), mode="bicubic")[0]
    grain = 3 * torch.randn(3, H, W, generator=g)
    return (colours + grain).clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()


def make_dataset(n=8):
    """A folder, removed at exit, with a dataset in VOC's layout: n smooth photos, true masks that
    are blobs, and seeds that are the same."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in ("JPEGImages", "SegmentationClass", "seeds", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    for i in range(n):
        photo = Image.fromarray(smooth_photo(*PHOTO, i))
        photo.save(folder / "JPEGImages" / f"{i}.jpg", quality=95)
        label = Image.fromarray(smooth_probabilities(21, *PHOTO, i).argmax(0).byte().numpy())
        for name in ("SegmentationClass", "seeds"):
            label.save(folder / name / f"{i}.png")
    ids = "".join(f"{i}\n" for i in range(n))
    (folder / "ImageSets" / "Segmentation" / "train.txt").write_text(ids)
    names = "".join(f"c{k}\n" for k in range(1, 21))
    (folder / "classes.txt").write_text("background\n" + names)
    labels = "".join(f"{i} c1\n" for i in range(n))
    (folder / "image_labels.txt").write_text(labels)
    return folder


# ====================================================================================== stopwatches

class Watch:
    """Adds up CPU and wall seconds under names; on a GPU, waits for it at the end of each."""

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        self.seconds = {}

    @contextlib.contextmanager
    def __call__(self, name):
        """Count what runs inside under `name`."""
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before = self.seconds.get(name, (0, 0))
        self.seconds[name] = (before[0] + time.process_time() - cpu,
                              before[1] + time.perf_counter() - wall)


def attention_operations(q, k, v, *args, out_shape=None, **kwargs):
    """Operations of one attention: q times k, and the weights times v. Shapes (B, h, L, d)."""
    B, h, L, d = q
    return 2 * B * h * L * k[2] * (d + v[3])


def attention_backward_operations(grad, q, k, v, *args, out_shape=None, **kwargs):
    """Of its gradient: five products where forward has two (the weights are computed again)."""
    return attention_operations(q, k, v) * 5 // 2


def count_operations(once, watch):
    """Multiplications and additions of once(watch) in matrix products and convolutions.

    torch's counter leaves out the attention of CPUs, so that is added here.
    """
    aten = torch.ops.aten
    ours = {aten._scaled_dot_product_flash_attention_for_cpu: attention_operations,
            aten._scaled_dot_product_flash_attention_for_cpu_backward:
                attention_backward_operations}
    with FlopCounterMode(display=False, custom_mapping=ours) as counter:
        once(watch)
    return counter.get_total_flops()


# ======================================================================================== the parts
# Each makes what it needs and returns once(watch), which does the work a single time. `code` has
# the modules of the checkout that is measured.

def import_code(folder):
    """Modules of a checkout: clip, evaluation, stage1, stage2."""
    sys.path.insert(0, str(folder))
    names = {"clip": "clip", "evaluation": "eval", "stage1": "stage1_cam",
             "stage2": "stage2_weakclip"}
    return SimpleNamespace(**{k: importlib.import_module(v) for k, v in names.items()})


def matrix(code, case, args):
    """A product of two 2,048 x 2,048 matrices."""
    dtype = torch.bfloat16 if case["bf16"] else torch.float32
    a = torch.randn(2048, 2048, dtype=dtype, device=args.device)

    def once(watch):
        with watch("total"):
            a @ a
    return once


def make_network(code, args, training):
    """WeakCLIP with ViT-B/16 and random weights."""
    torch.manual_seed(0)
    tokens = code.stage2.name_tokens(code.evaluation.VOC_CLASSES, 77)
    model = code.stage2.WeakCLIP(code.clip.CLIP(), tokens, crop=args.crop)
    return model.to(args.device).train(training)


def step(code, case, args):
    """A training step of stage 2: data, forward, losses and their CRF, backward, optimizer."""
    machine = code.stage1.Machine(args.device, case["bf16"])
    model = make_network(code, args, training=True)
    optimizer = code.stage2.make_optimizer(model, 1e-4)
    mean_std = code.stage2.mean_and_std(model.switches)
    folder = make_dataset()
    data = code.evaluation.find_dataset(str(folder))
    samples = code.stage2.SeededImages(data, data.ids("train"), folder / "seeds", args.crop, 0,
                                       model.switches)
    crf = code.stage2.dense_crf

    def once(watch):
        def timed_crf(*a, **k):
            with watch("CRF, a part of losses"):
                return crf(*a, **k)
        code.stage2.dense_crf = timed_crf
        with watch("total"):
            with watch("data"):
                batch = [samples[i % 8, i] for i in range(args.batch_size)]
                x, seeds = (torch.stack(part).to(machine.device) for part in zip(*batch))
            with watch("forward"), machine.autocast():
                logits, score = model(x)
            with watch("losses"):
                terms = code.stage2.weakclip_losses(logits, score, x, seeds, model.switches,
                                                    *mean_std)
                loss = sum(terms.values())
            with watch("backward"):
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            with watch("optimizer"):
                optimizer.step()
    return once


def look(code, case, args, scales, flip):
    """predict(photo) of a network with random weights, and stage 2's way to set it up."""
    machine = code.stage1.Machine(args.device, case["bf16"])
    options = SimpleNamespace(scales=scales, no_flip=not flip)
    model = make_network(code, args, training=False)
    return code.stage2.predictor(model, options, args.crop, machine)


def inference(code, case, args):
    """Class probabilities of a photo in one view of 512 x 683: two windows."""
    predict, photo = look(code, case, args, [1], False), smooth_photo(*PHOTO, 0)

    def once(watch):
        with watch("total"):
            predict(photo)
    return once


def mask(code, case, args):
    """A pseudo mask as the recipe makes it: six scales, mirrored too, then the CRF."""
    scales = [0.5, 0.75, 1, 1.25, 1.5, 1.75]
    predict, photo = look(code, case, args, scales, True), smooth_photo(*PHOTO, 0)
    # Random weights would leave one class, and the CRF nothing to do.
    probs = smooth_probabilities(21, *PHOTO, 0).to(args.device)

    def once(watch):
        with watch("total"):
            with watch("network"):
                predict(photo)
            with watch("CRF"):
                code.stage2.mask_from(probs, photo, MASK_CRF)
    return once


def crf(code, case, args):
    """The dense CRF by itself, on smooth probabilities and photos."""
    B, K, (H, W) = case["batch"], case["labels"], case["size"]
    probs = torch.stack([smooth_probabilities(K, H, W, i) for i in range(B)])
    photos = np.stack([smooth_photo(H, W, i) for i in range(B)])
    image = torch.from_numpy(photos).permute(0, 3, 1, 2).float()
    settings = LOSS_CRF if (H, W) == (64, 64) else MASK_CRF
    if case["contestant"] == "pydensecrf":
        def solve():
            for p, x in zip(probs, image):
                pydensecrf(p, x, *settings)
    else:
        probs, image = probs.to(args.device), image.to(args.device)

        def solve():
            code.stage1.dense_crf(probs, image, *settings)

    def once(watch):
        with watch("total"):
            solve()
    return once


def evaluation(code, case, args):
    """eval.py's reading and counting of 8 masks."""
    folder = make_dataset()

    def once(watch):
        with watch("total"):
            for i in range(8):
                truth = code.evaluation.read_label(folder / "SegmentationClass" / f"{i}.png", 21)
                made = code.evaluation.read_label(folder / "seeds" / f"{i}.png", 21)
                code.evaluation.confusion(truth, made, 21)
    return once


def loader(code, case, args):
    """Stage 2's reading and augmentation of 8 photos."""
    folder = make_dataset()
    data = code.evaluation.find_dataset(str(folder))
    switches = code.stage2.Switches()
    samples = code.stage2.SeededImages(data, data.ids("train"), folder / "seeds", args.crop, 0,
                                       switches)

    def once(watch):
        with watch("total"):
            for i in range(8):
                samples[i, i]
    return once


# part -> its cases: what is shown, how many rounds, and what the part's function is told. A first
# pass, in which operations are counted, is not timed. A whole mask is long and has none (not warm):
# its operations are counted in its only round, which takes a percent of it.
PARTS = {
    "step": [dict(name=f"training step, {p}", rounds=3, bf16=p == "bf16")
             for p in ("fp32", "bf16")],
    "inference": [dict(name=f"inference, 512 x 683, {p}", rounds=3, bf16=p == "bf16")
                  for p in ("fp32", "bf16")],
    "mask": [dict(name=f"pseudo mask, 12 views and CRF, {p}", rounds=1, bf16=p == "bf16",
                  warm=False) for p in ("fp32", "bf16")],
    "crf": [dict(name=f"CRF 375 x 500, {K} labels", rounds=3, batch=1, labels=K, size=PHOTO)
            for K in (4, 21, 81)] +
           [dict(name=f"CRF of the loss, batch {B}", rounds=15, batch=B, labels=21, size=(64, 64))
            for B in (1, 16)],
    "eval": [dict(name="eval, image", rounds=9, images=8)],
    "loader": [dict(name="loader, image", rounds=5, images=8)],
}
FUNCTIONS = {"matrix": matrix, "step": step, "inference": inference, "mask": mask, "crf": crf,
             "eval": evaluation, "loader": loader}


# ============================================================================== contestants in turn

def serve(case, args):
    """A contestant's process: make ready, then answer a line on stdin with a round's seconds."""
    torch.set_num_threads(args.threads)
    once = FUNCTIONS[case["part"]](import_code(args.code), case, args)
    operations = None
    if case.get("warm", True):
        # The CRF's sums are no matrix products: nothing is counted there.
        operations = count_operations(once, Watch(args.device))
    print("ready", flush=True)
    for _ in sys.stdin:
        watch = Watch(args.device)
        if case.get("warm", True):
            once(watch)
        else:
            operations = count_operations(once, watch)
        unit = 1 if sys.platform == "darwin" else 1024
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        if watch.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        answer = {"seconds": watch.seconds, "memory": memory, "operations": operations}
        print(json.dumps(answer), flush=True)


class Contestant:
    """A process that measures one case with the code of one folder."""

    def __init__(self, name, folder, case, args):
        self.name, self.case = name, case
        self.rounds, self.memory = [], 0
        told = json.dumps({**case, "contestant": name})
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", told, "--code", str(folder), "--threads",
             str(args.threads), "--device", args.device, "--batch-size", str(args.batch_size),
             "--crop", str(args.crop)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(args.threads)})
        self.read()  # "ready"

    def read(self):
        """The next line; ValueError where the process has ended."""
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"{self.case['name']}, {self.name}: the measuring process ended with "
                             f"status {self.process.wait()}; what it said is above")
        return line

    def go(self):
        """One round."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = json.loads(self.read())
        self.operations = answer["operations"]
        self.rounds.append(answer["seconds"])
        self.memory = max(self.memory, answer["memory"])

    def result(self):
        """Everything measured, as plain values: seconds as [median, least, most]."""
        images, phases = self.case.get("images", 1), {}
        for phase in self.rounds[0]:
            for place, clock in enumerate(("cpu", "wall")):
                values = [r[phase][place] / images for r in self.rounds]
                found = [statistics.median(values), min(values), max(values)]
                phases.setdefault(phase, {})[clock] = found
        return {"case": self.case["name"], "contestant": self.name, "rounds": len(self.rounds),
                "images": images, "phases": phases, "operations": self.operations,
                "memory": self.memory}


def compete(case, args):
    """Results of all contestants in a case, measured in turn."""
    folders = {"this": HERE}
    if args.against and case["part"] != "matrix":
        folders["against"] = args.against
    if case["part"] == "crf" and importlib.util.find_spec("pydensecrf"):
        folders["pydensecrf"] = HERE
    contestants = []
    try:
        for name, folder in folders.items():
            contestants.append(Contestant(name, folder, case, args))
        for _ in range(case["rounds"]):
            for contestant in contestants:
                contestant.go()
        return [c.result() for c in contestants]
    finally:
        for contestant in contestants:
            contestant.process.stdin.close()
            contestant.process.wait()


# =========================================================================================== tables

HEADINGS = ("what", "who", "CPU s (least to most)", "wall s", "CPU, of this one's", "GFLOP",
            "of peak", "peak memory, GiB")


def digits(seconds):
    """Three digits that count."""
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}"


def rows_of(result, first, peak, clock):
    """Table rows of a result: the total, then its phases. first: this checkout's result; peak:
    operations a second of the clock "cpu" or "wall"."""
    for phase, seconds in sorted(result["phases"].items(), key=lambda item: item[0] != "total"):
        median, least, most = seconds["cpu"]
        total = phase == "total"
        spread = f" ({digits(least)} to {digits(most)})" if result["rounds"] > 1 else ""
        ratio = "" if result is first else f"{median / first['phases'][phase]['cpu'][0]:.2f}"
        operations = result["operations"] if total else None
        share = operations / peak / seconds[clock][0] if operations else None
        name = result["case"] if total else f"&nbsp; {phase}"
        if result["images"] > 1:
            name += f" ({1 / median:.0f} a CPU second)"
        yield [name, result["contestant"],
               digits(median) + spread, digits(seconds["wall"][0]), ratio,
               f"{operations / 1e9:.0f}" if operations else "",
               f"{100 * share:.0f} %" if share else "",
               f"{result['memory'] / 2 ** 30:.2f}" if total else ""]


def table(rows):
    """Print rows as markdown."""
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def has_bfloat16(args):
    """Whether --amp is accepted on the device."""
    try:
        import_code(HERE).stage1.Machine(args.device, True)
    except ValueError:
        return False
    return True


def describe():
    """Machine and versions, one line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":")[1] for line in info.read_text().splitlines()
                 if line.startswith("model name")]
        cpu = names[0].strip() if names else cpu
    load = os.getloadavg()[0]
    return (f"{cpu}, {os.cpu_count()} cores, load {load:.1f} at the start; Python "
            f"{platform.python_version()}, torch {torch.__version__}")


def measure(args):
    """All parts asked for; prints the table as it grows and writes --json."""
    precisions = [False, True] if has_bfloat16(args) else [False]
    machine = describe()
    print(f"\n{machine}; {args.threads} threads, {args.device}\n")
    table([HEADINGS, ["---"] * len(HEADINGS)])
    # The seconds of all threads together, but for a GPU, whose seconds are not the process's.
    clock = "cpu" if args.device == "cpu" else "wall"
    results, peaks = [], {}
    for bf16 in precisions:
        name = f"matrix product, {'bf16' if bf16 else 'fp32'}"
        case = dict(part="matrix", name=name, rounds=7, bf16=bf16)
        result, = compete(case, args)
        # The quickest: a peak is what the machine can do when nobody disturbs it.
        peaks[bf16] = result["operations"] / result["phases"]["total"][clock][1]
        results.append(result)
        table(rows_of(result, result, peaks[bf16], clock))
    for part in args.parts:
        for case in PARTS[part]:
            bf16 = case.get("bf16", False)
            if bf16 not in precisions:
                continue
            found = compete({**case, "part": part}, args)
            results += found
            for result in found:
                table(rows_of(result, found[0], peaks[bf16], clock))
    if args.json:
        facts = {"machine": machine, "threads": args.threads, "device": args.device,
                 "clock of peaks": clock,
                 "peaks": {"bf16" if k else "fp32": v for k, v in peaks.items()},
                 "results": results}
        args.json.write_text(json.dumps(facts, indent=1))


# ========================================================================= labels beside pydensecrf

def compare(a, b):
    """Equal labels in percent, mean and largest |difference| of two Q (K, H, W)."""
    same = 100 * (a.argmax(0) == b.argmax(0)).double().mean().item()
    return same, (a - b).abs().mean().item(), (a - b).abs().max().item()


def compare_photos(photos, K, settings, exact):
    """A row (n, 5) per photo: `compare` with pydensecrf, then the exact filter's share of labels
    equal to ours and to pydensecrf's (nan unless exact)."""
    dense_crf = import_code(HERE).stage1.dense_crf
    rows = []
    for n, image in enumerate(photos):
        probs = smooth_probabilities(K, *image.shape[1:], seed=n)
        ours = dense_crf(probs[None], image[None], *settings)[0]
        theirs = pydensecrf(probs, image, *settings)
        shares = [np.nan, np.nan]
        if exact:
            truth = dense_crf(probs[None], image[None], *settings, exact=True)[0]
            shares = [compare(truth, q)[0] for q in (ours, theirs)]
        rows.append([*compare(ours, theirs), *shares])
    return np.array(rows)


def labels(args):
    """On full photos ours against pydensecrf; on photos of an eighth of the side also the exact
    filter, which is slow."""
    code = import_code(HERE)
    data = code.evaluation.find_dataset(args.data)
    ids = data.ids(args.split)
    ids = ids[::max(1, len(ids) // args.n)][:args.n]
    full = [torch.from_numpy(data.image(i)).permute(2, 0, 1) for i in ids]
    small = [F.avg_pool2d(image[None].float(), 8)[0].round() for image in full]
    print(f"\n{len(ids)} photos of {args.split}\n")
    table([["setting", "labels", "size", "equal labels, % (least)", "mean \\|dQ\\|",
            "max \\|dQ\\|", "exact: % equal to ours", "exact: % equal to pydensecrf"],
           ["---"] * 8])
    settings = {"VOC masks": code.stage2.MASK_CRF["VOC2012"],
                "COCO masks": code.stage2.MASK_CRF["COCO2014"], "loss": LOSS_CRF}
    for name, setting in settings.items():
        for K in (4, 21):
            for size, photos in (("full", full), ("an eighth", small)):
                r = compare_photos(photos, K, setting, size != "full")
                shares = [f"{v:.1f}" if np.isfinite(v) else "-" for v in r[:, 3:].mean(0)]
                table([[name, str(K), size, f"{r[:, 0].mean():.3f} ({r[:, 0].min():.3f})",
                        f"{r[:, 1].mean():.1e}", f"{r[:, 2].max():.1e}", *shares]])


# ===================================================================================== command line

def parse_args(argv=None):
    """Options; the ones that start with --serve are for this file's own processes."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("parts", nargs="*", metavar="part",
                   help=f"{', '.join(PARTS)} [all of them], or labels alone")
    p.add_argument("--against", type=Path, metavar="DIR", help="another checkout, measured in turn")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    p.add_argument("--threads", type=int, default=1, help="of torch [%(default)s]")
    p.add_argument("--device", default="cpu", help="cpu or cuda [%(default)s]")
    p.add_argument("--batch-size", type=int, default=2, help="step: images [%(default)s]")
    p.add_argument("--crop", type=int, default=512, help="pixels [%(default)s]")
    p.add_argument("--data", metavar="NAME|DIR", help="labels: dataset with photos")
    p.add_argument("--split", default="train", help="labels: list [%(default)s]")
    p.add_argument("--n", type=int, default=20, help="labels: photos [%(default)s]")
    p.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    p.add_argument("--code", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    unknown = set(args.parts) - {*PARTS, "labels"}
    if unknown or ("labels" in args.parts and (len(args.parts) > 1 or not args.data)):
        p.error(f"parts are {', '.join(PARTS)}, or labels alone with --data")
    if args.against and not (args.against / "stage2_weakclip.py").is_file():
        p.error(f"--against {args.against}: no stage2_weakclip.py there")
    args.parts = args.parts or list(PARTS)
    return args


def main():
    """Serve, compare labels, or measure."""
    args = parse_args()
    if args.serve:
        serve(args.serve, args)
    elif args.parts == ["labels"]:
        labels(args)
    else:
        measure(args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"bench.py: {e}")
