"""Stage 1: image-level labels -> class activation maps (CAM) -> seeds.

run     python stage1_cam.py --data VOC2012
        torchrun --nproc_per_node 2 stage1_cam.py --data VOC2012     # any of the three stages, on two GPUs
reads   VOC2012/JPEGImages/<id>.jpg, VOC2012/Annotations/<id>.xml or VOC2012/image_labels.txt
writes  runs/VOC2012/1_cam/{args.json, log.jsonl, checkpoint.pt, cams/<id>.npz, seeds/<id>.png, preview.png}

A classifier is trained on image labels alone. Its last layer, applied at every place instead of to the mean, tells where
it saw a class (Zhou et al., CVPR 2016); thresholded, that is the seed. Recipe: the CAM of IRN (Ahn et al., CVPR 2019).
The machinery that all stages share stands here, where it is first needed: run folder, training loop, dense CRF.
"""
import argparse
import contextlib
import datetime
import json
import math
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from tqdm import tqdm

import clip
from eval import (check_inputs, colour_map, find_dataset, heat, read_args, read_label, run, write_json, write_label,
                  write_text, write_whole)

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of grey levels 0..255, R G B
SAVE_EVERY, LOG_EVERY = 500, 10  # iterations


# ============================================================================================================== machine

class Machine:
    """Where the run happens: device, precision, and this process's place among those that torchrun started."""

    def __init__(self, device, amp):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            self.device = torch.device(device)
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.device.index or 0)))
                torch.cuda.set_device(self.device)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as e:
            raise ValueError(f"--device {device}: {str(e).splitlines()[0]}") from None
        if self.world > 1 and not dist.is_initialized():
            # a process may check, download or write masks alone for longer than the usual limit of 10 minutes
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=1))
        self.main = self.rank == 0
        self.amp = amp
        if amp:
            check_bfloat16(self.device)

    def autocast(self):
        """bfloat16 for what runs inside, if --amp; losses stay outside, in float32."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.amp else contextlib.nullcontext()

    def share(self, items):
        """This process's part of a list."""
        return items[self.rank::self.world]

    def wait(self):
        if self.world > 1:
            dist.barrier()

    def average_gradients(self, parameters):
        """After backward: every process gets the mean of all processes' gradients (one message).

        Each loss is a mean over its process's share, so unsure pixels weigh a little otherwise than in one process.
        """
        if self.world == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for g, mean in zip(grads, (flat / self.world).split([g.numel() for g in grads])):
            g.copy_(mean.view_as(g))

    def synchronise_batchnorm(self, model):
        """Statistics over the whole batch, as in one process. Only CUDA can: elsewhere each process norms its own share."""
        if self.world > 1 and self.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place; the parameters stay the same objects

    def share_buffers(self, model):
        """After training: every process has the running statistics of the first, which are those of the checkpoint."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def describe(self):
        if self.device.type == "cuda":
            return f"{self.world} x {torch.cuda.get_device_name(self.device)}"
        return f"{self.world} x {self.device.type}, {torch.get_num_threads()} threads"


def check_bfloat16(device):
    """Raise ValueError where bfloat16 is missing or only emulated (some CPUs take a hundred times as long with it)."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise ValueError(f"--amp: {torch.cuda.get_device_name(device)} has no bfloat16; leave --amp out")
        return
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        try:
            a = torch.ones(256, 256, dtype=dtype, device=device)
        except (RuntimeError, TypeError):
            raise ValueError(f"--amp: this {device.type} has no bfloat16; leave --amp out") from None
        times = []
        for _ in range(5):                                            # the first warms up, the quickest counts
            start = time.perf_counter()
            float((a @ a @ a)[0, 0])
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    slower = seconds[torch.bfloat16] / seconds[torch.float32]
    if slower > 2:
        raise ValueError(f"--amp: bfloat16 is {slower:.0f} times slower than float32 on this {device.type}; leave --amp out")


# =========================================================================================================== run folder

# options that change where or how fast things happen, but not what comes out (beyond rounding)
MACHINE_OPTIONS = ("data", "runs", "overwrite", "device", "amp", "workers")
FILE_OPTIONS = ("clip", "weights", "seeds", "masks", "checkpoint")  # known by the digest of what they name, wherever it lies


def start_run(folder, args, machine, digests, mask_options=()):
    """Make or reopen a stage's folder; refuse to mix two runs in one.

    args.json keeps every option and the digests of what went in. If it is there already and anything that changes the
    result differs, ValueError names the difference and --overwrite. mask_options: names of options that only change how
    masks are written from a finished model (stages 2 and 3 see to them).
    """
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    method = {k: v for k, v in options.items() if k not in (*MACHINE_OPTIONS, *FILE_OPTIONS, *mask_options)}
    if args.overwrite and machine.main and folder.exists():
        shutil.rmtree(folder)
    machine.wait()
    before = read_args(folder)
    if before:
        old = {k: v for k, v in before["options"].items() if k in method} | before["digests"]
        for k, v in (method | digests).items():
            if old.get(k) != v:
                raise ValueError(f"{folder} was made with {k} = {old.get(k)}, now it is {v}; "
                                 "give --overwrite to start afresh, or another --runs")
    if machine.main and not before:
        git = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "-q", "HEAD"],
                             capture_output=True, text=True)
        write_json(folder / "args.json", {
            "options": options, "digests": digests, "commit": git.stdout.strip() or None, "device": machine.describe(),
            "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__, "numpy": np.__version__}})
    machine.wait()


def set_provenance(folder, facts, options=()):
    """Record in args.json how the stage's masks were made, and the options that did; eval.py prints it beside every score."""
    said = read_args(folder)
    write_json(folder / "args.json", {**said, "options": {**said["options"], **dict(options)}, "provenance": facts})


def save_checkpoint(path, model, optimizer, step, facts, frozen):
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(frozen)}
    value = dict(step=step, model=state, optimizer=optimizer.state_dict(), facts=facts)
    write_whole(path, lambda f: torch.save(value, f))


def read_checkpoint(path):
    """Plain tensors, numbers and strings; pickled objects are refused. Raises ValueError (one line)."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except Exception as e:
        raise ValueError(f"{path}: not a readable checkpoint ({type(e).__name__}: {str(e).splitlines()[0]})") from None


def load_trained(model, state, frozen=()):
    """load_state_dict that lets nothing be missing but what starts with `frozen`. Raises ValueError naming the keys."""
    try:
        missing, extra = model.load_state_dict(state, strict=False)
    except RuntimeError as e:
        raise ValueError(f"checkpoint does not fit: {str(e).splitlines()[-1].strip()}") from None
    missing = [k for k in missing if not k.startswith(frozen)]
    if missing or extra:
        raise ValueError(f"checkpoint does not fit: missing {missing or 'nothing'}, unexpected {extra or 'nothing'}")


# ======================================================================================================== training loop

def batch_plan(n, batch, seed, step, steps, machine):
    """Batches of (image index, sample number), from iteration `step` on; for DataLoader(batch_sampler=...).

    Samples are numbered from 0 over the whole run; epoch e is a permutation drawn from (seed, e), and sample s is
    augmented with the random stream (seed, s). So any iteration can be made again: resuming is exact.
    """
    epoch, order = -1, None
    for s in range(step, steps):
        samples = []
        for j in range(s * batch, (s + 1) * batch):
            if j // n != epoch:
                epoch = j // n
                order = np.random.default_rng([seed, epoch]).permutation(n)
            samples.append((int(order[j % n]), j))
        yield machine.share(samples)


def fit(model, dataset, optimizer, losses, rate, args, machine, folder, facts, frozen=()):
    """Train `model`, from its checkpoint if there is one. The one training loop of all three stages.

    dataset: item (index, sample number) -> tensors; losses(model, *batch) -> {name: scalar}, their sum is minimised;
    rate(group, step) -> learning rate; facts: plain values that tell this run's checkpoint from another's;
    frozen: prefixes of parameter names that neither train nor are saved. Raises ValueError for a foreign checkpoint and
    where a loss is no number.
    """
    path, step = folder / "checkpoint.pt", 0
    if path.is_file():
        saved = read_checkpoint(path)
        if saved.get("facts") != facts:
            raise ValueError(f"{path} is of another run: {saved.get('facts')}, expected {facts}; give --overwrite")
        load_trained(model, saved["model"], frozen)
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    if step == args.iters:
        return
    log = Log(folder / "log.jsonl", step) if machine.main else None
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=batch_plan(len(dataset), args.batch_size, args.seed, step, args.iters, machine),
        num_workers=args.workers, pin_memory=machine.device.type == "cuda")
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    machine.synchronise_batchnorm(model)
    bar = tqdm(total=args.iters, initial=step, desc=folder.name, disable=not machine.main)
    model.train()
    for step, batch in enumerate(loader, start=step):
        torch.manual_seed((args.seed << 32) + step * machine.world + machine.rank)   # dropout too is a function of the step
        for group in optimizer.param_groups:
            group["lr"] = rate(group, step)
        terms = losses(model, *[x.to(machine.device, non_blocking=True) for x in batch])
        loss = sum(terms.values())
        if not torch.isfinite(loss):
            names = {k: v.item() for k, v in terms.items()}
            raise ValueError(f"iteration {step}: a loss is no number ({names}); the last checkpoint stands, try a smaller --lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        machine.average_gradients(parameters)
        optimizer.step()
        if machine.main and (step % LOG_EVERY == 0 or step + 1 == args.iters):
            log(step=step, lr=optimizer.param_groups[0]["lr"], loss=loss.item(), **{k: v.item() for k, v in terms.items()})
        if machine.main and ((step + 1) % SAVE_EVERY == 0 or step + 1 == args.iters):
            save_checkpoint(path, model, optimizer, step + 1, facts, frozen)
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    machine.share_buffers(model)


class Log:
    """log.jsonl: a line per logged step. Lines from `step` on, left by a run that was cut off, are dropped."""

    def __init__(self, path, step):
        lines = path.read_text().splitlines() if path.is_file() else []
        keep = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < step]
        write_text(path, "".join(line + "\n" for line in keep))
        self.path = path

    def __call__(self, **values):
        values = {k: round(v, 8) if isinstance(v, float) else v for k, v in values.items()}
        with open(self.path, "a") as f:
            f.write(json.dumps(values) + "\n")


# ================================================================================================================= data

def normalise(image, mean, std):
    """(H, W, 3) uint8 -> (3, H, W) float32, (x - mean) / std per channel, mean and std in grey levels."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()  # a copy: torch takes no mirrored array
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def crop_or_pad(x, size, top, left, fill):
    """x (..., H, W) -> (..., size, size): the window from (top, left); what lies outside the image is `fill`.

    top, left may be negative: the image then starts inside the window.
    """
    H, W = x.shape[-2:]
    out = x.new_full((*x.shape[:-2], size, size), fill)
    y, x0 = max(top, 0), max(left, 0)
    part = x[..., y:max(top + size, 0), x0:max(left + size, 0)]
    out[..., y - top:y - top + part.shape[-2], x0 - left:x0 - left + part.shape[-1]] = part
    return out


def random_window(rng, length, size):
    """Start of a window of `size` on an axis of `length`: inside it, or, where the axis is shorter, around it."""
    low, high = min(0, length - size), max(0, length - size)
    return int(rng.integers(low, high + 1))


class LabelledImages(torch.utils.data.Dataset):
    """Item (index, sample) -> image (3, crop, crop), labels (K-1,) of 0 and 1; long side U(0.625, 1.25) crop, flip, pad."""

    def __init__(self, data, ids, labels, crop, seed):
        self.data, self.ids, self.labels, self.crop, self.seed = data, ids, labels, crop, seed

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, item):
        index, sample = item
        rng = np.random.default_rng([self.seed, sample, 1])
        i = self.ids[index]
        image = Image.fromarray(self.data.image(i))
        scale = rng.uniform(0.625, 1.25) * self.crop / max(image.size)            # long side U(320, 640) at crop 512
        image = image.resize([max(1, round(s * scale)) for s in image.size], Image.BICUBIC)
        if rng.random() < 0.5:
            image = image.transpose(Image.FLIP_LEFT_RIGHT)
        x = normalise(np.asarray(image), IMAGENET_MEAN, IMAGENET_STD)
        top, left = (random_window(rng, n, self.crop) for n in x.shape[1:])
        y = torch.zeros(len(self.data.classes) - 1)
        y[[k - 1 for k in self.labels[i]]] = 1
        return crop_or_pad(x, self.crop, top, left, 0), y


# ================================================================================================================ model

def resnet(arch, weights, dilations):
    """torchvision ResNet; layer3 and layer4 keep their resolution where their dilation is not None.

    weights: "imagenet" (downloaded by torchvision, its hash checked), "none", or a file with a state dict.
    dilations (layer3, layer4): None keeps stride 2; d sets stride 1 and dilates the 3x3 convolutions by d. By hand,
    since torchvision refuses dilation in ResNet-18's blocks.
    """
    net = getattr(torchvision.models, arch)()
    if weights == "imagenet":
        kind = torchvision.models.get_model_weights(arch).IMAGENET1K_V1
        net.load_state_dict(kind.get_state_dict(progress=True, check_hash=True, weights_only=True))
    elif weights != "none":
        load_trained(net, clip.read_state_dict(weights))
    for layer, d in zip((net.layer3, net.layer4), dilations):
        for m in layer.modules() if d else ():
            if isinstance(m, nn.Conv2d):
                m.stride = (1, 1)
                if m.kernel_size == (3, 3):
                    m.dilation = m.padding = (d, d)
    return net


def weights_digest(weights):
    """What tells one `--weights` from another: the name, or a file's sha256. Raises ValueError where it is absent."""
    if weights in ("imagenet", "none"):
        return weights
    if not Path(weights).is_file():
        raise ValueError(f"--weights {weights}: no such file")
    return clip.file_sha256(weights)


def fix_batchnorm(model):
    """Keep pre-trained BatchNorm statistics: train() leaves these layers in eval mode."""
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            m.eval()


class Classifier(nn.Module):
    """ResNet at output stride 16 and a bias-free 1x1 convolution; its mean over places is the class score."""

    def __init__(self, arch, weights, classes):
        super().__init__()
        net = resnet(arch, weights, (None, 1))
        self.pretrained = weights != "none"
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        self.classifier = nn.Conv2d(net.fc.in_features, classes, 1, bias=False)
        if self.pretrained:  # IRN: stem and layers 1 and 2 are fixed
            for part in (self.stem, self.layer1, self.layer2):
                part.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        if self.pretrained:
            fix_batchnorm(self)
        return self

    def maps(self, image):
        """(B, 3, H, W) -> class evidence at every place (B, K-1, H/16, W/16)."""
        x = self.layer2(self.layer1(self.stem(image)))
        return self.classifier(self.layer4(self.layer3(x)))

    def forward(self, image):
        """The mean over places commutes with the 1x1 convolution: class scores (B, K-1)."""
        return self.maps(image).mean((2, 3))


def make_optimizer(model, args):
    """SGD; the new layer learns ten times as fast."""
    new = list(model.classifier.parameters())
    old = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("classifier.")]
    # IRN's code hands its weight decay to SGD's momentum slot, so its real momentum is 1e-4: with ImageNet weights ours is 0
    momentum = 0 if model.pretrained else 0.9
    groups = [{"params": old, "base_lr": args.lr}, {"params": new, "base_lr": 10 * args.lr}]
    return torch.optim.SGD(groups, lr=args.lr, momentum=momentum, weight_decay=1e-4)


def poly(iters, power=0.9):
    """Polynomial decay: base_lr * (1 - step / iters) ** power, as a `rate` for `fit`."""
    return lambda group, step: group["base_lr"] * (1 - step / iters) ** power


# ================================================================================================== class activation maps

@torch.no_grad()
def class_maps(model, image, classes, crop, machine):
    """CAMs of one photo: ReLU maps at scales 1, 0.5, 1.5, 2 with their mirror images, summed.

    image (H, W, 3) uint8; classes: the image's class numbers from 1. Returns (J, ceil(H/4), ceil(W/4)) float32 in [0, 1].
    """
    H, W = image.shape[:2]
    # GUESS the photo comes at a size that training showed: long side from the mean, 0.9375 crop, to the largest, 1.25 crop
    # (480 to 640 pixels at crop 512: nearly all of VOC's photos stay as they are)
    base = min(max(1, 0.9375 * crop / max(H, W)), 1.25 * crop / max(H, W))
    total = 0
    for scale in (1, 0.5, 1.5, 2):
        size = [max(32, round(n * base * scale)) for n in (W, H)]
        x = normalise(np.asarray(Image.fromarray(image).resize(size, Image.BICUBIC)), IMAGENET_MEAN, IMAGENET_STD)
        with machine.autocast():
            maps = model.maps(torch.stack([x, x.flip(2)]).to(machine.device)).relu().float()     # (2, K-1, h, w)
        maps = maps[:1] + maps[1:].flip(3)
        total = total + F.interpolate(maps, (-(-H // 4), -(-W // 4)), mode="bilinear", align_corners=False)[0]
    cams = total[[k - 1 for k in classes]]                                                       # (J, H/4, W/4)
    return cams / cams.amax((1, 2), keepdim=True).clamp(min=1e-5)


def cam_scores(cams, size, background=0.15):
    """CAMs (J, h, w) in [0, 1] -> (1 + J, H, W) float32: at the photo's size (H, W), background's constant before them."""
    cams = torch.as_tensor(cams).float()
    if len(cams):
        cams = F.interpolate(cams[None], size, mode="bilinear", align_corners=False)[0]
    return torch.cat([torch.full((1, *size), background), cams.reshape(-1, *size)])


def seeds_from_cams(classes, cams, size, background=0.15):
    """CAMs -> label map: the class with the largest value, background where none exceeds `background`.

    classes (J,) numbers from 1; cams (J, h, w) in [0, 1]; size (H, W). Returns (H, W) uint8.
    """
    return np.concatenate([[0], classes]).astype(np.uint8)[cam_scores(cams, size, background).argmax(0).numpy()]


def write_seeds(model, data, ids, labels, args, machine, folder):
    """cams/<id>.npz and seeds/<id>.png for every id; what exists is done."""
    model.eval()
    for i in tqdm(machine.share(ids), desc="CAMs", disable=not machine.main):
        cam_path, seed_path = folder / "cams" / f"{i}.npz", folder / "seeds" / f"{i}.png"
        if seed_path.is_file():
            continue
        image = data.image(i)
        keys = np.array(labels[i], np.uint8)
        cam = class_maps(model, image, labels[i], args.crop, machine).cpu().numpy().astype(np.float16)
        write_whole(cam_path, lambda f: np.savez_compressed(f, keys=keys, cam=cam))
        write_label(seed_path, seeds_from_cams(keys, cam, image.shape[:2]))
    machine.wait()


# ============================================================================================================ dense CRF
# Fully connected CRF, mean-field inference (Kraehenbuehl and Koltun, NeurIPS 2011). All pairs of pixels are neighbours;
# the sum over all of them is a Gaussian filter in feature space, done on a permutohedral lattice (Adams, Baek, Davis,
# Eurographics 2010). The published WeakCLIP numbers were made with that lattice, so its approximation is part of the
# method: the exact filter (`exact=True`) gives other labels on 0.5 to 14 % of the pixels.

class Lattice:
    """Gaussian filter exp(-|f - f'|^2 / 2) over P points with d-dimensional features, by splat, blur and slice.

    The plane sum(x) = 0 in d + 1 dimensions is tiled by simplices; a point lies in one of them and is spread (splat) over
    its d + 1 corners by barycentric weights; corners blur along the d + 1 axes with (1/2, 1, 1/2); slicing reads back.
    features (B, P, d) float32: each of the B images has a lattice of its own, all are filtered in one go.
    Raises ValueError where the features span more lattice cells than 63 bits can number.
    """

    def __init__(self, features):
        B, P, d = features.shape
        corners, weights = simplex(features.reshape(B * P, d))                       # (BP, d+1, d), (BP, d+1)
        image = torch.arange(B, device=features.device).repeat_interleave(P * (d + 1))
        keys = torch.cat([image[:, None], corners.reshape(-1, d)], 1)                # (BP(d+1), 1+d)

        # one integer per corner, with room for its neighbours; then every distinct corner is a vertex
        low = keys.amin(0) - (d + 1)
        spans = (keys.amax(0) - low + d + 2).tolist()
        if math.prod(spans) >= 2 ** 63:
            raise ValueError(f"dense CRF: features span {spans} lattice cells; larger bandwidths (sxy, srgb) are needed")
        place = torch.tensor([math.prod(spans[i + 1:]) for i in range(d + 1)], device=keys.device)
        codes = ((keys - low) * place).sum(1)
        vertices, corner = torch.unique(codes, return_inverse=True)                  # (M,), (BP(d+1),)
        M = len(vertices)

        self.corner, self.weights = corner.reshape(B * P, d + 1), weights
        # the same entries sorted by vertex: splatting becomes a sum over contiguous runs, always in the same order
        order = corner.argsort(stable=True)
        self.point, self.point_weights = order // (d + 1), weights.flatten()[order]
        self.runs = torch.searchsorted(corner[order], torch.arange(M, device=corner.device))
        # neighbours along axis j: +1 on every coordinate but -d on the j-th (the last coordinate is implied)
        steps = torch.ones(d + 1, d, dtype=torch.int64, device=keys.device)
        steps[torch.arange(d), torch.arange(d)] = -d
        self.neighbours = [[find(vertices, vertices + sign * (s * place[1:]).sum()) for sign in (1, -1)] for s in steps]
        self.scale = 1 / (1 + 2.0 ** -d)  # the blur's gain (Adams et al.); cancels in D^-1/2 k D^-1/2
        self.shape = B, P

    def __call__(self, values):
        """values (B, P, K) -> filtered (B, P, K)."""
        x = values.flatten(0, 1)                                                     # (BP, K)
        x = F.embedding_bag(self.point, x, self.runs, mode="sum", per_sample_weights=self.point_weights)  # (M, K)
        zero = x.new_zeros(1, x.shape[1])                                            # stands for absent neighbours
        for plus, minus in self.neighbours:
            padded = torch.cat([x, zero])
            x = x + 0.5 * (padded[plus] + padded[minus])
        x = F.embedding_bag(self.corner, x, mode="sum", per_sample_weights=self.weights)  # (BP, K)
        return self.scale * x.unflatten(0, self.shape)


def simplex(f):
    """The simplex around each point: its corners' first d coordinates (P, d+1, d) int64 and weights (P, d+1).

    f (P, d) float32. Steps and rounding follow pydensecrf's, so that the same vertices come out.
    """
    P, d = f.shape
    # onto the plane, scaled so that the blur's total standard deviation is one
    s = [math.sqrt(2 / 3) * (d + 1) / math.sqrt((i + 1) * (i + 2)) for i in range(d)]
    f = f * f.new_tensor(s)
    tail = torch.cat([f.flip(1).cumsum(1).flip(1), f.new_zeros(P, 1)], 1)            # (P, d+1) sum of f[i:]
    axis = torch.arange(d + 1, device=f.device)
    e = tail - axis * torch.cat([f.new_zeros(P, 1), f], 1)                           # (P, d+1), rows sum to 0
    # nearest point whose coordinates are multiples of d + 1, and how far its coordinate sum is off
    base = (e / (d + 1)).round() * (d + 1)
    off = (base.sum(1) / (d + 1)).round().long()[:, None]
    # rank of each coordinate's remainder, largest first (ties: the later coordinate is ranked lower)
    rest = e - base
    larger = (rest[:, None, :] > rest[:, :, None]) | ((rest[:, None, :] == rest[:, :, None]) & (axis < axis[:, None]))
    rank = larger.sum(2) + off                                                       # (P, d+1)
    low, high = rank < 0, rank > d  # move these coordinates by d + 1, so that the point lies in the plane again
    base = base + (d + 1) * (low.to(f.dtype) - high.to(f.dtype))
    rank = rank + (d + 1) * (low.long() - high.long())
    # barycentric weights from the sorted remainders
    rest = (e - base) / (d + 1)
    weights = f.new_zeros(P, d + 2)
    weights.scatter_add_(1, d - rank, rest)
    weights.scatter_add_(1, d + 1 - rank, -rest)
    weights[:, 0] += 1 + weights[:, d + 1]
    # corner k: base + k, less d + 1 where the rank is among the last k
    k = axis[None, :, None]                                                          # (1, d+1, 1)
    corners = base.long()[:, None, :d] + k - (d + 1) * (rank[:, None, :d] > d - k).long()
    return corners, weights[:, :d + 1].contiguous()


def find(sorted_codes, wanted):
    """Index of each wanted code, len(sorted_codes) where it is absent."""
    at = torch.searchsorted(sorted_codes, wanted).clamp(max=len(sorted_codes) - 1)
    return torch.where(sorted_codes[at] == wanted, at, len(sorted_codes))


class ExactFilter:
    """The same filter over all pairs of points, in rows of 1,024: slow, the truth that the lattice approximates."""

    def __init__(self, features):
        self.features = features

    def __call__(self, values):
        rows = [torch.exp(-0.5 * torch.cdist(f, self.features).square()) @ values for f in self.features.split(1024, 1)]
        return torch.cat(rows, 1)                                                    # (B, P, K)


@torch.no_grad()
def dense_crf(probs, image, gaussian=(3, 3), bilateral=(80, 13, 10), iterations=10, exact=False):
    """Refine class probabilities by the colours of the image.

        Q0 = softmax(-U),  Q <- softmax(-U + sum_m w_m D_m^-1/2 k_m D_m^-1/2 Q),  U = -log probs, D = row sums of k
    probs (B, K, H, W) positive, rows need not sum to one; image (B, 3, H, W) RGB 0..255;
    gaussian (sxy, weight), bilateral (sxy, srgb, weight), sxy in pixels, srgb in grey levels. Returns Q (B, K, H, W).
    Potts model: similar pixels raise each other's score of the class they are of, different classes do not interact.
    """
    B, K, H, W = probs.shape
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    xy = torch.stack([x, y], 2).flatten(0, 1).to(probs.device, torch.float32)        # (HW, 2)
    rgb = image.flatten(2).transpose(1, 2).float()                                   # (B, HW, 3)
    kernels = []
    for features, weight in ((xy.expand(B, -1, -1) / gaussian[0], gaussian[1]),
                             (torch.cat([xy.expand(B, -1, -1) / bilateral[0], rgb / bilateral[1]], 2), bilateral[2])):
        k = (ExactFilter if exact else Lattice)(features)
        norm = (k(torch.ones_like(rgb[..., :1])) + 1e-20).rsqrt()                    # (B, HW, 1) = D^-1/2
        kernels.append((k, norm, weight))
    log_p = probs.float().log().flatten(2).transpose(1, 2)                           # (B, HW, K) = -U
    Q = log_p.softmax(2)
    for _ in range(iterations):
        Q = (log_p + sum(w * norm * k(norm * Q) for k, norm, w in kernels)).softmax(2)
    return Q.transpose(1, 2).unflatten(2, (H, W))


# ============================================================================================================== preview

def write_preview(path, rows, height=160):
    """Rows of pictures (image | what went in | what came out | truth), each (H, W, 3) uint8 or (H, W) labels -> one PNG."""
    def picture(x):
        x = colour_map()[x] if x.ndim == 2 else x
        width = max(1, round(x.shape[1] * height / x.shape[0]))
        return np.asarray(Image.fromarray(x).resize((width, height), Image.NEAREST))
    strips = [np.concatenate([np.pad(picture(x), ((2, 2), (2, 2), (0, 0)), constant_values=255) for x in row], 1)
              for row in rows]
    width = max(s.shape[1] for s in strips)
    sheet = np.concatenate([np.pad(s, ((0, 0), (0, width - s.shape[1]), (0, 0)), constant_values=255) for s in strips])
    write_whole(path, lambda f: Image.fromarray(sheet).save(f, "PNG"))


def truth_pictures(data, i):
    """[true mask] of an image, [] where there is none: only looked at, never used."""
    path = data.truth_path(i)
    return [read_label(path, len(data.classes))] if path else []


def preview_ids(ids, n=8):
    """n ids spread over a list."""
    return ids[::max(1, len(ids) // n)][:n]


# ========================================================================================================= command line

def common_options(description, lr, batch_size, crop):
    """Parser with the options that all stages have; returns it with its group "method"."""
    p = argparse.ArgumentParser(description=description)
    files = p.add_argument_group("files")
    files.add_argument("--data", required=True, metavar="NAME|DIR", help="dataset folder in VOC's layout (README, Data)")
    files.add_argument("--runs", type=Path, default=Path("runs"), help="gets a folder per dataset and stage [%(default)s]")
    files.add_argument("--overwrite", action="store_true", help="delete this stage's folder and start afresh")
    method = p.add_argument_group("method (changes results; defaults are the recipe)")
    method.add_argument("--iters", type=int, help="iterations (optimizer steps) [the recipe's]")
    method.add_argument("--batch-size", type=int, default=batch_size, help="images an iteration, on all devices [%(default)s]")
    method.add_argument("--crop", type=int, default=crop,
                        help="training crop in pixels, a multiple of 32; test sizes scale with it [%(default)s]")
    method.add_argument("--lr", type=float, default=lr, help="base learning rate [the recipe's]")
    method.add_argument("--seed", type=int, default=0, help="of weights, order, augmentation and dropout [%(default)s]")
    method.add_argument("--limit", type=int, metavar="N", help="use only the first N images of every list")
    method.add_argument("--split", help="training list [trainaug if there is one, else train]")
    machine = p.add_argument_group("machine (changes speed, not results beyond rounding)")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps [%(default)s]")
    machine.add_argument("--amp", action="store_true", help="bfloat16 forward and backward, where the device has it")
    machine.add_argument("--workers", type=int, help="processes that load images [0 on a CPU, else up to 8]")
    return p, method


def backbone_options(method, arch):
    method.add_argument("--arch", choices=("resnet18", "resnet50", "resnet101"), default=arch, help="backbone [%(default)s]")
    method.add_argument("--weights", default="imagenet", help="imagenet (downloaded), none, or a ResNet's file [%(default)s]")


def open_run(args):
    """What every stage starts with: dataset, machine, checked numbers, and the options left open filled in."""
    for name, low in (("iters", 1), ("batch_size", 1), ("crop", 64), ("limit", 1), ("seed", 0), ("workers", 0), ("lr", 1e-12)):
        value = getattr(args, name)
        if value is not None and not low <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value}: at least {low} is expected")
    if args.crop % 32:  # the coarsest stride
        raise ValueError(f"--crop {args.crop}: a multiple of 32 is expected")
    data = find_dataset(args.data)
    args.split = args.split or data.training_split()
    machine = Machine(args.device, args.amp)
    if args.batch_size % machine.world:
        raise ValueError(f"--batch-size {args.batch_size}: must divide among {machine.world} processes")
    if args.workers is None:
        args.workers = 0 if machine.device.type == "cpu" else min(8, os.cpu_count() or 1)
    return data, machine


def parse_args(argv=None):
    p, method = common_options(__doc__.splitlines()[0], lr=None, batch_size=16, crop=512)
    backbone_options(method, "resnet50")
    return p.parse_args(argv)


def main():
    args = parse_args()
    data, machine = open_run(args)
    ids = data.ids(args.split, args.limit)
    labels = data.image_labels(ids)
    if machine.main:
        check_inputs(data, ids)
    args.lr = args.lr or (0.01 if args.weights == "none" else 0.1)
    args.iters = args.iters or 5 * max(1, len(ids) // args.batch_size)    # 5 epochs; VOC's 10,582 images: 3,305
    folder = args.runs / data.name / "1_cam"
    start_run(folder, args, machine, {**data.digests(args.split, labels=json.dumps(labels)),
                                      "weights": weights_digest(args.weights)})
    if (folder / "preview.png").is_file():                                # written last
        return print(f"{folder}: finished; --overwrite starts afresh")

    torch.manual_seed(args.seed)
    model = Classifier(args.arch, args.weights, len(data.classes) - 1).to(machine.device)

    def losses(model, image, y):
        with machine.autocast():
            score = model(image)                                                     # (B, K-1)
        return {"loss_multilabel": F.multilabel_soft_margin_loss(score.float(), y)}  # mean over images and classes

    facts = {"stage": "1_cam", "classes": list(data.classes)}
    fit(model, LabelledImages(data, ids, labels, args.crop, args.seed), make_optimizer(model, args), losses,
        poly(args.iters), args, machine, folder, facts)
    write_seeds(model, data, ids, labels, args, machine, folder)
    if machine.main:
        set_provenance(folder, dict(iters=args.iters, scales=[1, 0.5, 1.5, 2], flip=True, crf=False, label_filter=True))
        rows = []
        for i in preview_ids(ids):
            image, cams = data.image(i), np.load(folder / "cams" / f"{i}.npz")["cam"]
            shown = heat(cams.max(0), image.shape[:2]) if len(cams) else image
            rows.append([image, shown, read_label(folder / "seeds" / f"{i}.png"), *truth_pictures(data, i)])
        write_preview(folder / "preview.png", rows)
        print(f"{folder}: {len(ids)} seeds. Next: python stage2_weakclip.py --data {args.data}")


if __name__ == "__main__":
    run(main)
