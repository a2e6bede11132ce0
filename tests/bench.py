"""Measurements behind tests/RESULTS.md; prints markdown tables.

run     python tests/bench.py crf --data VOC2012      # our dense CRF, pydensecrf's and the exact filter, on 20 photos
        python tests/bench.py step                    # stage 2 at full size: seconds and memory of a training step
"""
import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import clip
import stage2_weakclip as stage2
from eval import VOC_CLASSES, find_dataset, run
from stage1_cam import Machine, dense_crf

SETTINGS = {"VOC masks": stage2.MASK_CRF["VOC2012"], "COCO masks": stage2.MASK_CRF["COCO2014"], "loss": ((3, 3), (80, 13, 10))}


def pydensecrf(probs, image, gaussian, bilateral):
    """The package that the published numbers were made with (PyPI: pydensecrf2), on probs (K, H, W), image (3, H, W) -> Q."""
    import pydensecrf.densecrf as dcrf
    K, H, W = probs.shape
    crf = dcrf.DenseCRF2D(W, H, K)
    crf.setUnaryEnergy(np.ascontiguousarray(-probs.log().reshape(K, -1).numpy()))
    crf.addPairwiseGaussian(sxy=gaussian[0], compat=gaussian[1])
    rgb = np.ascontiguousarray(image.permute(1, 2, 0).numpy().astype(np.uint8))
    crf.addPairwiseBilateral(sxy=bilateral[0], srgb=bilateral[1], compat=bilateral[2], rgbim=rgb)
    return torch.from_numpy(np.array(crf.inference(10))).reshape(K, H, W)


def smooth_probabilities(K, H, W, seed):
    """Random class probabilities (K, H, W) that vary over about 60 pixels, as a network's do, with many near ties."""
    noise = torch.randn(1, K, H // 60 + 2, W // 60 + 2, generator=torch.Generator().manual_seed(seed))
    return (3 * F.interpolate(noise, (H, W), mode="bicubic")[0]).softmax(0)


def compare(a, b):
    """Equal labels in percent, mean and largest |difference| of Q, seconds."""
    return 100 * (a.argmax(0) == b.argmax(0)).double().mean().item(), (a - b).abs().mean().item(), (a - b).abs().max().item()


def timed(function, *args, **kwargs):
    start = time.perf_counter()
    return function(*args, **kwargs), time.perf_counter() - start


def bench_crf(args):
    """On full photos ours against pydensecrf; on photos of an eighth of the side also the exact filter, which is slow."""
    data = find_dataset(args.data)
    ids = data.ids(args.split)
    photos = [torch.from_numpy(data.image(i)).permute(2, 0, 1) for i in ids[::max(1, len(ids) // args.n)][:args.n]]
    print(f"\n{len(photos)} photos of {args.split}, {torch.get_num_threads()} threads\n")
    print("| setting | labels | size | equal labels, % (least) | mean \\|dQ\\| | max \\|dQ\\| | s ours | s pydensecrf "
          "| exact: % equal to ours | exact: % equal to pydensecrf |\n" + "|---" * 10 + "|")
    for name, (gaussian, bilateral) in SETTINGS.items():
        for K in (4, 21):
            for size in ("full", "an eighth"):
                rows = []
                for n, image in enumerate(photos):
                    if size == "an eighth":
                        image = F.avg_pool2d(image[None].float(), 8)[0].round()
                    probs = smooth_probabilities(K, *image.shape[1:], seed=n)
                    ours, seconds = timed(dense_crf, probs[None], image[None], gaussian, bilateral)
                    theirs, their_seconds = timed(pydensecrf, probs, image, gaussian, bilateral)
                    exact = dense_crf(probs[None], image[None], gaussian, bilateral, exact=True)[0] if size == "an eighth" else None
                    rows.append([*compare(ours[0], theirs), seconds, their_seconds,
                                 *(compare(exact, q)[0] if exact is not None else np.nan for q in (ours[0], theirs))])
                r = np.array(rows)
                far = ("-", "-") if size == "full" else (f"{r[:, 5].mean():.1f}", f"{r[:, 6].mean():.1f}")
                print(f"| {name} | {K} | {size} | {r[:, 0].mean():.3f} ({r[:, 0].min():.3f}) | {r[:, 1].mean():.1e} "
                      f"| {r[:, 2].max():.1e} | {r[:, 3].mean():.2f} | {r[:, 4].mean():.2f} | {far[0]} | {far[1]} |", flush=True)


def bench_step(args):
    """ViT-B/16 and everything around it, on noise: what a step costs does not depend on what is seen."""
    machine = Machine(args.device, args.amp)
    torch.manual_seed(0)
    model = clip.CLIP()
    model = stage2.WeakCLIP(model, stage2.name_tokens(VOC_CLASSES, 77), crop=args.crop).to(machine.device).train()
    optimizer = stage2.make_optimizer(model, 1e-4)
    x = torch.randn(args.batch_size, 3, args.crop, args.crop, device=machine.device)
    seeds = torch.randint(0, 21, (args.batch_size, args.crop, args.crop), device=machine.device)
    mean_std = stage2.mean_and_std(model.switches)

    def step():
        with machine.autocast():
            logits, score = model(x)
        loss = sum(stage2.weakclip_losses(logits, score, x, seeds, model.switches, *mean_std).values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()
    step()                                                                           # warm up
    seconds = sorted(timed(step)[1] for _ in range(args.n))
    if machine.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2 ** 30
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)
    print(f"\n| device | batch | crop | precision | s per step, median of {args.n} | peak memory, GiB |\n" + "|---" * 6 + "|")
    print(f"| {machine.describe()} | {args.batch_size} | {args.crop} | {'bfloat16' if args.amp else 'float32'} | "
          f"{seconds[args.n // 2]:.2f} | {memory:.1f} |")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("what", choices=("crf", "step"))
    p.add_argument("--data", metavar="NAME|DIR", help="crf: dataset with photos")
    p.add_argument("--split", default="train", help="crf: list [%(default)s]")
    p.add_argument("--n", type=int, help="photos, or steps timed [20, 5]")
    p.add_argument("--batch-size", type=int, default=2, help="step: images a step [%(default)s]")
    p.add_argument("--crop", type=int, default=512, help="step: pixels [%(default)s]")
    p.add_argument("--device", default="auto", help="step [%(default)s]")
    p.add_argument("--amp", action="store_true", help="step: bfloat16")
    args = p.parse_args(argv)
    args.n = args.n or {"crf": 20, "step": 5}[args.what]
    return args


def main():
    args = parse_args()
    {"crf": bench_crf, "step": bench_step}[args.what](args)


if __name__ == "__main__":
    run(main)
