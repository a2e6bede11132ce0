"""Stage 1: image-level labels -> class activation maps (CAM) -> seeds.

run     python stage1_cam.py --data VOC2012                         # a classifier's CAMs
        python stage1_cam.py --data VOC2012 --method clip           # CLIP's, nothing is trained
        torchrun --nproc_per_node 2 stage1_cam.py --data VOC2012    # any of the stages, on two GPUs
reads   VOC2012/JPEGImages/<id>.jpg, VOC2012/image_labels.txt or else VOC2012/Annotations/<id>.xml
writes  runs/VOC2012/1_cam/{cams/<id>.npz, seeds/<id>.png} and, as every stage,
        runs/VOC2012/1_cam/{args.json, log.jsonl, checkpoint.pt (if trained), preview.png}
cost    not measured on all of VOC; --method clip with ViT-B/16 takes 3.6 s of one CPU core for a
        photo of 500 x 375, half of it the CRF, and 1.8 GiB

A classifier learns from nothing but "this photo shows a dog and a person". Its last layer, applied
at every place instead of to the mean over places, tells where it saw the dog: that is the CAM (Zhou
et al., CVPR 2016). Thresholded it is the seed, a label map that stage 2 turns into a mask. (Only
`--seed` is something else, the number that all chance is drawn from.) The recipe is IRN's (Ahn et
al., CVPR 2019). With --method clip no classifier is trained: CLIP, which stage 2 builds on anyway,
is asked where it sees the dog (CLIP-ES, Lin et al., CVPR 2023).

Part I goes from labels to seeds; it is this stage. Part II, the dense CRF, and part III, the engine
room (device, run folder, training loop, preview, options), serve the later stages as well, and so
does stage 2's mask writer: that a run resumes exactly, that no stale mask passes for a fresh one,
and what the lattice computes need to be written, explained and proven only once.
From `clip`, ours and not OpenAI's package, come weight files read safely and their digests; from
`eval`, our eval.py, the dataset folder, label PNGs, and files that appear whole or not at all.
# GUESS marks a choice for which no source was found.

Shapes: B images of a batch, K classes with background first, J of them (never background) present
in one photo, H W pixels, h w a network's grid, at stride 16. CAMs are stored at stride 4.
"""
# first: while all else is imported, which takes seconds, eval.py sees to Ctrl-C
from eval import (COCO_CLASSES, IGNORE, VOC_CLASSES, Dataset, Interrupted, Parser, check_inputs,
                  colour_map, find_dataset, heat, interrupt, is_out_of_memory, naming, note,
                  note_leaks, read_args, read_cams, read_label, read_log, run, write_json,
                  write_label, write_text, write_whole)

import contextlib
import datetime
import functools
import glob
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import threading
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

try:
    import fcntl  # locks on files
except ImportError:  # Windows
    fcntl = None

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # of grey levels 0..255, R G B
IMAGENET_STD = (58.395, 57.12, 57.375)
CLIP_MEAN = tuple(255 * v for v in (0.48145466, 0.4578275, 0.40821073))
CLIP_STD = tuple(255 * v for v in (0.26862954, 0.26130258, 0.27577711))
ARCHITECTURES = ("resnet18", "resnet50", "resnet101")
# Sizes at which a photo is looked at, relative to the one that `view_scale` gives it.
CAM_SCALES = (1, 0.5, 1.5, 2)
CAM_THRESHOLD = 0.15  # background's score, IRN's; a class must exceed it


# ================================================================== I. image labels -> CAM -> seeds

class Classifier(nn.Module):
    """Class scores (B, K-1) of a batch of images, and, from the same weights, the CAM: `maps`.

    Background is no class of an image and has no score here; n_classes is K - 1.
    A ResNet gives features x[u] (C,) at every place u of a grid; with w[k] (C,) for class k,

        score[k] = < w[k], mean_u x[u] > = mean_u < w[k], x[u] > = mean_u map[k, u]

    The usual classifier is the left side: mean first, then a linear layer. Both are linear, so they
    commute, and the right side is the same number: a 1x1 convolution, then the mean. Nothing more
    is needed to know how much each place speaks for a class. There is no bias: it would be evidence
    that no place has given.
    """

    def __init__(self, arch: str, weights: str, n_classes: int):
        super().__init__()
        # layer4 keeps its resolution (output stride 16, not 32): maps twice as fine
        net = resnet(arch, weights, (None, 1))
        self.pretrained = weights != "none"
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1 = net.layer1
        self.layer2 = net.layer2
        self.layer3 = net.layer3
        self.layer4 = net.layer4
        self.classifier = nn.Conv2d(net.fc.in_features, n_classes, 1, bias=False)
        if self.pretrained:
            # as in IRN: edges and textures are ImageNet's, what they add up to is learned
            for part in (self.stem, self.layer1, self.layer2):
                part.requires_grad_(False)

    def maps(self, image):
        """The CAM before any scaling: evidence for each class at each place (B, K-1, h, w).

        image (B, 3, H, W), normalised; h = H/16, w = W/16. Class k of the dataset is channel k-1.
        """
        x = conv_layout(image)
        x = self.stem(x)           # (B, 64, H/4, W/4)
        x = self.layer1(x)         # (B, C1, H/4, W/4)
        x = self.layer2(x)         # (B, C2, H/8, W/8)
        x = self.layer3(x)         # (B, C3, h, w)
        x = self.layer4(x)         # (B, C, h, w)
        return self.classifier(x)  # (B, K-1, h, w)

    def forward(self, image):
        """Class scores (B, K-1), raw: the mean of the maps over places, for training."""
        return self.maps(image).mean((2, 3))

    def train(self, mode=True):
        """The model itself, in training mode, but for ImageNet's BatchNorm statistics."""
        super().train(mode)
        if self.pretrained:
            fix_batchnorm(self)
        return self


@torch.no_grad()
def class_maps(model, image: np.ndarray, present: list[int], crop: int, machine) -> torch.Tensor:
    """CAMs of one photo (J, ceil(H/4), ceil(W/4)), float32 in [0, 1].

    image (H, W, 3) uint8; present: the J class numbers, from 1, that the image's labels name; crop:
    side of the training crop in pixels.

    Only the image's own classes get a map: the label says that the others are absent, so whatever a
    map of theirs showed could only be wrong.
    """
    H, W = image.shape[:2]
    base = view_scale(H, W, crop)
    total = 0
    # a large view shows the network details, a small one the whole object, a mirrored one the same
    # thing elsewhere on the grid: what speaks in all of them is more object than accident
    for scale in CAM_SCALES:
        size = [max(32, round(n * base * scale)) for n in (W, H)]
        view = np.asarray(Image.fromarray(image).resize(size, Image.BICUBIC))
        x = normalise(view, IMAGENET_MEAN, IMAGENET_STD)
        pair = torch.stack([x, x.flip(2)]).to(machine.device)                    # (2, 3, H', W')
        with machine.autocast():
            evidence = model.maps(pair)                                          # (2, K-1, h, w)
        # evidence against a class in one view must not cancel evidence for it in another
        evidence = evidence.relu().float()
        evidence = evidence[:1] + evidence[1:].flip(3)                           # (1, K-1, h, w)
        grid = cam_grid(H, W)
        total = total + F.interpolate(evidence, grid, mode="bilinear", align_corners=False)[0]
    cams = total[[k - 1 for k in present]]                                       # (J, H/4, W/4)
    # evidence has no unit, and more of it for one class than for another means little; divided by
    # its maximum each map says "1: here, if anywhere", and one threshold serves them all
    return cams / cams.amax((1, 2), keepdim=True).clamp(min=1e-5)


def cam_grid(H: int, W: int) -> tuple[int, int]:
    """Size at which CAMs are stored, a quarter of the photo's, as IRN's: views of all scales meet
    there, and a file is a sixteenth of what full size would be."""
    return math.ceil(H / 4), math.ceil(W / 4)


def view_scale(H: int, W: int, crop: int) -> float:
    """The factor that brings a photo of H x W pixels to a size that training has shown."""
    # GUESS the long side ends between training's mean, 0.9375 crop, and its largest, 1.25 crop: 480
    # to 640 pixels at crop 512, so that nearly all of VOC's photos stay as they are
    long_side = max(H, W)
    smallest = 0.9375 * crop / long_side
    largest = 1.25 * crop / long_side
    return min(max(1, smallest), largest)


def cam_scores(cams, size: tuple[int, int], background=CAM_THRESHOLD) -> torch.Tensor:
    """A score of every pixel for background and each CAM's class (1 + J, H, W), float32 in [0, 1].

    cams (J, h, w) in [0, 1], size (H, W) of the photo.

    Background's score is a constant, since no label ever names it: all photos have some, so there
    is no photo without it to learn the difference from. The constant is the threshold that a class
    must exceed. Raised, seeds shrink to what is surest; lowered, they spill over the rims.
    """
    cams = torch.as_tensor(cams).float()
    if len(cams):  # an image may show none of the classes
        cams = F.interpolate(cams[None], size, mode="bilinear", align_corners=False)[0]
    cams = cams.reshape(-1, *size)                                               # (J, H, W)
    constant = torch.full((1, *size), background)                                # (1, H, W)
    return torch.cat([constant, cams])


def seeds_from_cams(present, cams, size: tuple[int, int], background=CAM_THRESHOLD) -> np.ndarray:
    """The seed (H, W) uint8: at each pixel the class with the largest score, 0 for background.

    present (J,) class numbers from 1, cams (J, h, w) in [0, 1], size (H, W). Every pixel gets a
    class; 255, unsure, is for the seeds of other methods.
    """
    numbers = np.concatenate([[0], present]).astype(np.uint8)                    # (1 + J,)
    winner = cam_scores(cams, size, background).argmax(0).numpy()                # (H, W) in 0..J
    return numbers[winner]


def classifier_seed(model, image: np.ndarray, present: list[int], crop: int, machine):
    """One photo's CAMs and seed: (arrays for its .npz, label map (H, W) uint8).

    The arrays: "keys" (J,) uint8, the class numbers; "cam" (J, H/4, W/4) float16 in [0, 1].
    """
    keys = np.array(present, np.uint8)
    cams = class_maps(model, image, present, crop, machine)                      # (J, H/4, W/4)
    # rounded before the seed is taken: whoever reads the file can make the same seed from it
    cams = cams.cpu().numpy().astype(np.float16)
    return {"keys": keys, "cam": cams}, seeds_from_cams(keys, cams, image.shape[:2])


def write_seeds(make, data, ids, labels, machine, folder):
    """Write cams/<id>.npz and seeds/<id>.png for every id whose files do not exist.

    make(image, present) -> (arrays, label map), of either method; labels: {id: class numbers from
    1}. Each process of torchrun does its own share of the ids.
    """
    with tqdm(machine.share(ids), desc="CAMs", disable=not machine.main) as bar:
        for image_id in bar:
            cam_path, seed_path = seed_files(folder, [image_id])
            if is_whole(cam_path) and is_whole(seed_path):
                continue
            image = data.image(image_id)
            with photo_faults(image_id, image, "a smaller photo"):
                arrays, seed = make(image, labels[image_id])
            check_output(image_id, arrays["cam"])
            write_whole(cam_path, lambda f: np.savez_compressed(f, **arrays))
            write_label(seed_path, seed)
    machine.wait()


def seed_files(folder: Path, ids: list[str]) -> list[Path]:
    """What stage 1 writes for these ids: the CAMs and the seed of each."""
    files = []
    for image_id in ids:
        files.append(folder / "cams" / f"{image_id}.npz")
        files.append(folder / "seeds" / f"{image_id}.png")
    return files


# ------------------------------------------------------------------------------------- the backbone

def resnet(arch: str, weights: str, dilations: tuple[int | None, int | None]) -> nn.Module:
    """A torchvision ResNet whose layer3 and layer4 may keep their resolution.

    weights: "imagenet" (torchvision's, downloaded once, its hash checked), "none", or a file with a
    state dict, with or without `fc`: the layer that names ImageNet's classes is never used.
    dilations (layer3, layer4): None keeps stride 2; d sets stride 1 and dilates the 3x3
    convolutions by d. Raises ValueError where the file does not fit.

    A ResNet made for classification ends at 1/32 of the image's size, too coarse for a map. Without
    a stride the grid stays fine, but a 3x3 filter now sees half as far on the photo; dilated by 2
    (by 4 after two such layers) it has its old reach again. Stage 3 does so; stage 1 does without
    (d = 1), as IRN. By hand, since torchvision refuses dilation in ResNet-18's blocks; it would
    also leave the 3x3 that had the stride as it was, and here that one sees twice as far.
    """
    net = getattr(torchvision.models, arch)()
    if weights == "imagenet":
        weights = imagenet_file(arch)
    if weights != "none":
        state = clip.read_state_dict(weights)
        backbone = {name: value for name, value in state.items() if not name.startswith("fc.")}
        try:
            load_trained(net, backbone, may_lack=("fc.",))
        except ValueError as error:
            reason = f"not the weights of a {arch} ({error})"
            raise ValueError(f"--weights {weights}: {reason}") from None
    for layer, dilation in zip((net.layer3, net.layer4), dilations):
        if dilation is not None:
            dilate(layer, dilation)
    return net


def conv_layout(x: torch.Tensor) -> torch.Tensor:
    """x (B, C, H, W) in the memory layout that the convolutions behind it are quickest in.

    In bfloat16 (--amp) they work on channels-last memory, and copy what comes in another layout
    layer by layer. In float32 they gain nothing from it, and gradients behind BatchNorm would round
    2 to 4 times as much.
    """
    bf16 = torch.is_autocast_enabled(x.device.type)
    return x.contiguous(memory_format=torch.channels_last if bf16 else torch.contiguous_format)


def imagenet_file(arch: str) -> Path:
    """Where torchvision's ImageNet weights lie in torch's cache (TORCH_HOME), fetched if need be.

    The last part of their name is the beginning of their sha256; `clip.cached_file` compares it and
    says what to do without a network or with a file that was cut. Raises ValueError or OSError.
    """
    url = torchvision.models.get_model_weights(arch).IMAGENET1K_V1.url
    digest = Path(url).stem.rsplit("-", 1)[1]
    return clip.cached_file(url, digest, "--weights FILE, or none",
                            Path(torch.hub.get_dir()) / "checkpoints")


def dilate(layer, dilation):
    """Take the stride out of a ResNet's layer and dilate its 3x3 convolutions; in place."""
    for module in layer.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = (dilation, dilation)
                module.padding = (dilation, dilation)


def weights_digest(weights: str) -> str:
    """What tells one `--weights` from another: the name, or a file's sha256, wherever it lies.

    Raises ValueError where there is no such file.
    """
    if weights in ("imagenet", "none"):
        return weights
    if not Path(weights).is_file():
        raise ValueError(f"--weights {weights}: no such file")
    return clip.file_sha256(weights)


def fix_batchnorm(model):
    """Put BatchNorm in eval mode, so that its pre-trained statistics stay; call it after train().

    A batch of a few crops is a poor estimate of what a million images have measured.
    """
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            module.eval()


# ----------------------------------------------------------------------------------------- the data

class LabelledImages(torch.utils.data.Dataset):
    """Item (index, sample) -> image (3, crop, crop) float32, normalised; target (K-1,) of 0 and 1.

    The image is resized to a long side of U(0.625, 1.25) crop, mirrored with probability 0.5,
    and cut or padded to the crop. labels: {id: class numbers from 1}; index: which of the ids;
    sample: the number that `batch_plan` gave it, from which all chance is drawn.
    """

    def __init__(self, data, ids, labels, crop, seed):
        self.data = data
        self.ids = ids
        self.labels = labels
        self.crop = crop
        self.seed = seed

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, item):
        index, sample = item
        image_id = self.ids[index]
        # a stream of its own for every sample: no worker's past changes it, and it can be drawn
        # again at any time; the last number is the stage's, so that stages do not draw alike
        rng = np.random.default_rng([self.seed, sample, 1])
        image = Image.fromarray(self.data.image(image_id))
        scale = rng.uniform(0.625, 1.25) * self.crop / max(image.size)  # crop 512: U(320, 640)
        size = [max(1, round(n * scale)) for n in image.size]           # PIL: width, height
        image = image.resize(size, Image.BICUBIC)
        if rng.random() < 0.5:
            image = image.transpose(Image.FLIP_LEFT_RIGHT)
        x = normalise(np.asarray(image), IMAGENET_MEAN, IMAGENET_STD)   # (3, H, W)
        top = random_window(rng, x.shape[1], self.crop)
        left = random_window(rng, x.shape[2], self.crop)
        target = torch.zeros(len(self.data.classes) - 1)                # (K-1,)
        # a crop may have lost the labelled object; the target does not know, and the loss bears it
        target[[k - 1 for k in self.labels[image_id]]] = 1
        return crop_or_pad(x, self.crop, top, left, 0), target


def normalise(image: np.ndarray, mean, std) -> torch.Tensor:
    """(3, H, W) float32, (x - mean) / std per channel, of an image (H, W, 3) uint8.

    mean, std (3,) in grey levels 0..255.
    """
    image = np.array(image)  # a copy, since torch takes no mirrored array (negative stride)
    x = torch.from_numpy(image).permute(2, 0, 1).float()                # (3, H, W)
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def crop_or_pad(x, size: int, top: int, left: int, fill) -> torch.Tensor:
    """The window (..., size, size) of x (..., H, W) from (top, left); `fill` outside the image.

    top, left may be negative: the image then starts inside the window.
    """
    H, W = x.shape[-2:]
    window = x.new_full((*x.shape[:-2], size, size), fill)
    # what the two have in common, first in the image's coordinates, then in the window's
    first_row = max(top, 0)
    first_column = max(left, 0)
    common = x[..., first_row:max(top + size, 0), first_column:max(left + size, 0)]
    h, w = common.shape[-2:]
    row = first_row - top
    column = first_column - left
    window[..., row:row + h, column:column + w] = common
    return window


def random_window(rng, length: int, size: int) -> int:
    """Where a window of `size` starts on an axis of `length`: any place inside, all equally likely.

    Where the axis is shorter than the window, the window lies around it: the start is negative, and
    the padding falls on either side.
    """
    low = min(0, length - size)
    high = max(0, length - size)
    return int(rng.integers(low, high + 1))


# ------------------------------------------------------- training the classifier, and the preview

def make_optimizer(model, args) -> torch.optim.Optimizer:
    """SGD with weight decay 1e-4 in two groups: the new layer learns ten times as fast.

    The backbone starts from features that are good already, the classifier from nothing.
    """
    new = list(model.classifier.parameters())
    old = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith("classifier."):
            old.append(parameter)
    # IRN's momentum is 1e-4, as good as none: its code hands SGD the weight decay in momentum's
    # place. Ours is 0 with ImageNet weights. From nothing, where IRN has no recipe, it is the
    # usual 0.9.
    momentum = 0 if model.pretrained else 0.9
    groups = [{"params": old, "base_lr": args.lr}, {"params": new, "base_lr": 10 * args.lr}]
    return torch.optim.SGD(groups, lr=args.lr, momentum=momentum, weight_decay=1e-4)


def poly(iters: int, power: float = 0.9):
    """A `rate` for `fit`, polynomial decay: base_lr * (1 - step / iters) ** power.

    Nearly a straight line from base_lr down to 0; stage 3 has it too.
    """
    def rate(group, step):
        return group["base_lr"] * (1 - step / iters) ** power
    return rate


def train(model, data, ids, labels, args, machine, folder):
    """Train the classifier on the image labels, from its last checkpoint if there is one."""

    def losses(model, image, target):
        with machine.autocast():
            score = model(image)                                        # (B, K-1)
        # a photo may show several classes, so each is a question of its own, yes or no: the mean
        # over images and classes of -[y log sigmoid(s) + (1 - y) log sigmoid(-s)]
        loss = F.multilabel_soft_margin_loss(score.float(), target)
        return {"loss_multilabel": loss}

    samples = LabelledImages(data, ids, labels, args.crop, args.seed)
    optimizer = make_optimizer(model, args)
    facts = {"stage": "1_cam", "classes": list(data.classes)}
    fit(model, samples, optimizer, losses, poly(args.iters), args, machine, folder, facts)


def seeds_from_classifier(data, ids, labels, args, machine, folder) -> dict:
    """Provenance of the seeds that are written here, by a classifier that is trained for them."""
    torch.manual_seed(args.seed)  # of the new layers' first weights
    model = Classifier(args.arch, args.weights, len(data.classes) - 1).to(machine.device)
    train(model, data, ids, labels, args, machine, folder)
    model.eval()

    def make(image, present):
        return classifier_seed(model, image, present, args.crop, machine)

    write_seeds(make, data, ids, labels, machine, folder)
    # label_filter: the image's labels have said which classes may appear
    return dict(iters=args.iters, scales=list(CAM_SCALES), flip=True, crf=False, label_filter=True)


def preview(data, ids, folder):
    """Write preview.png: image | largest CAM at each place | seed | truth, eight times."""
    rows = []
    for image_id in preview_ids(ids):
        image = data.image(image_id)
        cams = read_cams(folder / "cams" / f"{image_id}.npz")["cam"]    # (J, h, w)
        evidence = image
        if len(cams):
            evidence = heat(cams.max(0), image.shape[:2])               # (H, W, 3)
        seed = read_label(folder / "seeds" / f"{image_id}.png")         # (H, W)
        rows.append([image, evidence, seed, *truth_pictures(data, image_id)])
    write_preview(folder / "preview.png", rows)


# -------------------------- Seeds from CLIP alone: --method clip (CLIP-ES, Lin et al., CVPR 2023)
# Nothing is trained. CLIP has seen which words go with which pictures; asked for a class that is
# in the photo, its own gradients tell which places spoke for it (Grad-CAM), and its own attention
# tells which places belong together (affinity). A dense CRF draws the borders, and what stays
# doubtful is left "unsure". (E1) to (E24) are findings about CLIP-ES's code, AUDIT.md part 5: where
# that code parts from its paper, ours does what the published numbers were made with. The markers
# that `grep` finds elsewhere are about WeakCLIP's code; here a number (E) is the mark.
# J is the number of classes in the photo, h x w the grid of its patches, N = h * w.

TEMPLATE = "a clean origami {}."  # the template with the sharpest response; one, no ensemble (E1)
# What else a photo may show. Without such words a photo's only class would get all of the softmax.
BACKGROUND_WORDS = (
    "ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea",
    "railway", "railroad", "keyboard", "helmet", "cloud", "house", "mountain", "ocean", "road",
    "rock", "street", "valley", "bridge", "sign")
# Synonyms: the words by which CLIP knows a class better than by the dataset's name for it. COCO's
# have oddities that went into the published numbers, "sknowboard" among them (E2).
VOC_TEXTS = {"bird": "bird avian", "chair": "chair seat", "tvmonitor": "tvmonitor screen",
             "person": "person with clothes,people,human"}
COCO_TEXTS = {
    "person": "person with clothes,people,human", "motorcycle": "motorbike",
    "airplane": "aeroplane", "bird": "bird avian", "backpack": "backpack,bag",
    "umbrella": "umbrella,parasol", "handbag": "handbag,purse", "tie": "necktie",
    "snowboard": "sknowboard", "baseball glove": "glove", "spoon": "dessertspoon",
    "chair": "chair seat", "couch": "sofa", "potted plant": "pottedplant",
    "dining table": "diningtable", "tv": "tvmonitor screen", "remote": "remote control",
    "hair drier": "hairdrier,blowdrier"}
# The affinity works inside boxes around the places above this share of a map's maximum.
BOX_THRESHOLD = {"VOC2012": 0.4, "COCO2014": 0.7}  # by dataset; VOC's for any other
CLIP_CRF = (1, 3), (67, 3, 4)  # Gaussian (sxy, weight), bilateral (sxy, srgb, weight)
CONFIDENCE = 0.95  # a pixel whose best class the CRF believes less than this is unsure
CLIP_SIDE = 1024  # GUESS the long side that CLIP sees at most: attention grows with its 4th power


def class_texts(data: Dataset) -> tuple[list[str], list[str]]:
    """(what CLIP reads for each class but background, in their order; the background words).

    VOC's and COCO's names have CLIP-ES's synonyms, other datasets those of their classes.txt. A
    background word that a class's text holds is left out: of COCO's, "keyboard" and "sign" (E2).
    """
    known = {VOC_CLASSES: VOC_TEXTS, COCO_CLASSES: COCO_TEXTS}.get(data.classes, {})
    texts = {**known, **data.texts}
    foreground = [texts.get(name, name) for name in data.classes[1:]]
    taken = {word for text in foreground for word in re.split(r"\W+", text)}
    return foreground, [word for word in BACKGROUND_WORDS if word not in taken]


def text_tokens(texts: list[str], context_length: int) -> torch.Tensor:
    """Texts, put into the template -> token ids (n, L). Raises ValueError where one is too long."""
    return clip.tokenize([TEMPLATE.format(text) for text in texts], context_length)


@torch.no_grad()
def encode_texts(model: clip.CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """Token ids (n, L) -> text features (n, D) of unit length.

    CLIP-ES's code normalises them three times over, which is once but for rounding (E1).
    """
    return F.normalize(model.encode_text(tokens), dim=1)


def clip_input(image: np.ndarray) -> torch.Tensor:
    """Photo (H, W, 3) uint8 -> (1, 3, 16h, 16w) float32, normalised for CLIP.

    Not padded, not cropped: both sides are stretched to the next multiple of 16 (E3).
    """
    shrink = min(1, CLIP_SIDE / max(image.shape[:2]))
    size = [16 * math.ceil(round(side * shrink, 6) / 16) for side in image.shape[1::-1]]
    resized = Image.fromarray(image).resize(size, Image.BICUBIC)
    return normalise(np.asarray(resized), CLIP_MEAN, CLIP_STD)[None]


def half_positions(visual: nn.Module, h: int, w: int) -> torch.Tensor:
    """CLIP's positional table for an h x w grid, (1 + N, C), rounded to float16 (E4)."""
    table = clip.resize_positions(visual.positional_embedding.detach(), h, w)
    return table.half().float()


def open_block(block: nn.Module, x: torch.Tensor, a: torch.Tensor):
    """One transformer block with its attention in sight: (tokens after it, attention).

    x: the tokens before it (B, L, C), which go past the attention; a = block.ln_1(x) is what the
    attention reads. The attention is the mean over the heads, (B, L, L), rows sum to one.
    """
    q, k, v = block.attn.split(a)  # each (B, heads, L, C / heads)
    attention = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3)  # (B, heads, L, L)
    x = x + block.attn.out_proj((attention @ v).transpose(1, 2).flatten(2))
    return x + block.mlp(block.ln_2(x)), attention.mean(1)


@torch.no_grad()
def patch_tokens(visual: nn.Module, image: torch.Tensor, positions: torch.Tensor):
    """(tokens that enter the last block (1, 1 + N, C), the attention of each block before it).

    The attentions: a list of (1, 1 + N, 1 + N). No gradient is kept: Grad-CAM asks for none below
    the last block. CLIP-ES's code runs the last block twice for a sequence of 77 tokens,
    the length of a text; here it is nothing special (E18).
    """
    x, attentions = visual.embed(image, positions), []
    for block in visual.transformer.resblocks[:-1]:
        x, attention = open_block(block, x, block.ln_1(x))
        attentions.append(attention.float())
    return x.float(), attentions


def min_max(maps: torch.Tensor) -> torch.Tensor:
    """Maps (J, h, w) -> each stretched from 0 to just under 1: x - min, over 1e-7 + its maximum."""
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (1e-7 + maps.amax((1, 2), keepdim=True))


def grad_cam(visual: nn.Module, x: torch.Tensor, texts: torch.Tensor, J: int, scale) -> dict:
    """Which patches raise the probability of each class: Grad-CAM at ln_1 of the last block.

        cam_k = ReLU(sum_c w_kc A_c),   w_kc = mean over patches of  d p_k / d A_c
    Returns a dict: "probs" (J + words,), "weights" w (J, C), "raw" (J, N), the sum before ReLU,
    and "attention" (1, 1 + N, 1 + N) of the last block.
    x (1, 1 + N, C): the tokens that enter the block; texts (J + words, D): features of the photo's
    J classes, then of the background words; scale: CLIP's exp(logit_scale).

    A (N, C) are ln_1's outputs, p = softmax(scale * cosine(image, texts)). The image's feature is
    the mean of its PATCHES: the class token is left out, as in CLIP-ES's code (E5). What is
    differentiated is the probability, not the cosine: a place that speaks for a background word as
    well does not raise p_k (E6). The gradient reaches A through the attention alone, since the
    residual sum goes past ln_1.
    """
    block = visual.transformer.resblocks[-1]
    a = block.ln_1(x).detach().requires_grad_()
    with torch.enable_grad():
        x, attention = open_block(block, x, a)
        feature = visual.ln_post(x)[:, 1:].mean(1) @ visual.proj  # (1, D)
        probs = (scale * F.normalize(feature, dim=1) @ texts.T).softmax(1)[0]  # (J + words,)
        # one forward pass serves all classes, each has a backward pass of its own
        gradients = [torch.autograd.grad(p, a, retain_graph=True)[0] for p in probs[:J]]
    weights = torch.cat(gradients)[:, 1:].mean(1)  # (J, C)
    raw = weights @ a.detach()[0, 1:].T  # (J, N)
    return {"probs": probs.detach(), "weights": weights, "raw": raw,
            "attention": attention.detach()}


def balance(A: torch.Tensor, rounds: int = 3) -> torch.Tensor:
    """Attention (N, N) -> nearly doubly stochastic: columns, then rows, are divided by their sums.

    Sinkhorn's iteration: a patch that all others look at no longer outweighs them (E9).
    """
    for _ in range(rounds):
        A = A / A.sum(0, keepdim=True)
        A = A / A.sum(1, keepdim=True)
    return A


def affinity(attentions: list[torch.Tensor], last: int = 8) -> torch.Tensor:
    """How much each patch belongs to each other one, (N, N): from the last 8 blocks' attention.

    The class token's row and column are cut off, without making rows sum to one again (E8). After
    balancing, "i looks at j" and "j looks at i" are averaged; squaring lets friends of friends
    count: one step of a random walk more.
    """
    A = balance(torch.cat(attentions[-last:])[:, 1:, 1:].mean(0))
    A = (A + A.T) / 2
    return A @ A


def box_mask(cam: torch.Tensor, threshold: float) -> torch.Tensor:
    """Where the affinity may take a class's evidence from: (h, w) bool, a union of boxes.

    A box surrounds each 8-connected region above `threshold` times the maximum; both sides are
    first cut to whole numbers from 0 to 255, then compared with > (E10). cam (h, w) in [0, 1]. A
    region with a hole has one box, that of its rim; CLIP-ES's code gives the hole a box too, inside
    that one (E12).
    """
    levels = (cam.cpu() * 255).byte()  # the maximum is 254: min_max ends just under 1 (E7)
    above = levels > int(threshold * int(levels.max()))
    # Each cell above starts with a number of its own; taking the largest one next to it, again
    # and again, gives all cells of a region the same.
    number = torch.arange(1.0, 1 + cam.numel()).view_as(levels) * above
    while True:
        spread = F.max_pool2d(number[None], 3, stride=1, padding=1)[0] * above
        if torch.equal(spread, number):
            break
        number = spread
    mask = torch.zeros_like(above)
    for n in number[above].unique():
        rows, columns = torch.nonzero(number == n, as_tuple=True)
        # A box never holds the grid's last row and column, so that a region that touches them
        # loses a part, and one that lies in them alone is lost (E11).
        bottom = min(int(rows.max()) + 1, cam.shape[0] - 1)
        right = min(int(columns.max()) + 1, cam.shape[1] - 1)
        mask[int(rows.min()):bottom, int(columns.min()):right] = True
    return mask.to(cam.device)


def class_aware_affinity(A: torch.Tensor, cams: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """CAMs (J, h, w) spread along the affinity A (N, N), from inside their boxes: (J, h, w).

    masks (J, h, w) bool. A patch outside the boxes gives nothing, but may receive (E13). That
    makes the affinity class-aware: likeness in general, evidence of this class alone.
    """
    sources = (cams * masks).flatten(1)  # (J, N), columns of A outside are multiplied by 0
    return (sources @ A.T).view_as(cams)


@torch.no_grad()
def clip_cams(model: clip.CLIP, texts: torch.Tensor, image: np.ndarray, J: int, threshold: float,
              machine) -> dict[str, torch.Tensor]:
    """One photo's CAMs by CLIP, before and after the affinity.

    texts (J + background words, D), the photo's J classes first; image (H, W, 3) uint8. Returns
    {"probs" (J,), "before" (J, h, w), "boxes" (J, h, w) bool, "after" (J, h, w)}: the classes'
    probabilities, and at stride 16 maps in [0, 1) and where the affinity took its evidence from.
    With --amp all blocks but the last are in bfloat16; gradient and affinity stay in float32.
    """
    x = clip_input(image).to(machine.device)
    h, w = x.shape[2] // 16, x.shape[3] // 16
    if J == 0:
        none = torch.zeros(0, h, w)
        return {"probs": torch.zeros(0), "before": none, "boxes": none.bool(), "after": none}
    visual = model.visual
    with machine.autocast():
        tokens, attentions = patch_tokens(visual, x, half_positions(visual, h, w))
    found = grad_cam(visual, tokens, texts, J, model.logit_scale.exp())
    before = min_max(min_max(found["raw"].relu().view(J, h, w)))  # twice, as in CLIP-ES's code (E7)
    boxes = torch.stack([box_mask(cam, threshold) for cam in before])
    A = affinity([*attentions, found["attention"]])
    after = min_max(class_aware_affinity(A, before, boxes))
    return {"probs": found["probs"][:J], "before": before, "boxes": boxes, "after": after}


def clip_scores(cams: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """CAMs (J, h, w) in [0, 1] -> (1 + J, H, W) float16: [1 - the largest ; cams] at `size` (H, W).

    Not stretched again after the resize, so a map may peak at 0.96 (E14). float16 is how CLIP-ES's
    code stores its CAMs, and it reckons on in it (E15).
    """
    cams = F.interpolate(cams[None], size, mode="bilinear", align_corners=False)[0].half()
    return torch.cat([1 - cams.amax(0, keepdim=True), cams])


def wrapped_colours(image: np.ndarray) -> torch.Tensor:
    """Photo (H, W, 3) uint8 RGB -> what CLIP-ES's CRF compares, (3, H, W) uint8.

    Blue, green, red minus ImageNet's mean, as a byte: what is darker than the mean wraps round to
    the bright end. So black (152, 140, 134) and white (150, 138, 132) look alike, and greys of 103
    and 104 are 255 apart in blue. A slip, but the published numbers contain it (E16).
    """
    x = torch.from_numpy(image[:, :, ::-1].copy()).permute(2, 0, 1).float()
    x = x - x.new_tensor((104.008, 116.669, 122.675))[:, None, None]
    return (x.trunc() % 256).byte()


def log_scores(scores: torch.Tensor) -> torch.Tensor:
    """log of scores (float16), floored at 1e-5 and itself rounded to float16 (E15)."""
    return scores.clamp(1e-5, 1).log()


def crf_of_scores(scores: torch.Tensor, image: np.ndarray) -> torch.Tensor:
    """Scores (1 + J, H, W) float16 and the photo (H, W, 3) -> the CRF's Q (1 + J, H, W) float32."""
    probs = log_scores(scores).float().exp()  # dense_crf takes their logarithm again
    colours = wrapped_colours(image).to(scores.device)
    return dense_crf(probs[None], colours[None], *CLIP_CRF)[0]


def confident_labels(Q: torch.Tensor, present) -> np.ndarray:
    """Q (1 + J, H, W) -> label map (H, W) uint8: the likeliest class, 255 below CONFIDENCE.

    present: the J class numbers from 1 (E17).
    """
    best, index = Q.max(0)
    label = np.concatenate([[0], present]).astype(np.uint8)[index.cpu().numpy()]
    label[(best < CONFIDENCE).cpu().numpy()] = IGNORE
    return label


def encode_classes(model: clip.CLIP, data: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Text features of all classes but background (K - 1, D), and of the background words."""
    foreground, background = class_texts(data)
    tokens = text_tokens(foreground + background, model.context_length)
    features = encode_texts(model, tokens.to(model.text_projection.device))
    return features[:len(foreground)], features[len(foreground):]


def clip_seed(model, texts, image: np.ndarray, present: list[int], threshold: float, machine):
    """One photo, all steps: (arrays for its .npz, label map (H, W) uint8 with 255 where unsure).

    texts: of `encode_classes`; present: the photo's class numbers from 1. The arrays are the
    classifier's "keys" (J,) and "cam" (J, H/4, W/4) float16, and with them what explains the seed:
    "probs" (J,), and at stride 16 "before" (J, h, w) float16 and "boxes" (J, h, w) bool.
    """
    H, W = image.shape[:2]
    foreground, background = texts
    numbers = torch.tensor(present, dtype=torch.int64, device=background.device)
    here = torch.cat([foreground[numbers - 1], background])  # (J + words, D), the photo's first
    found = clip_cams(model, here, image, len(present), threshold, machine)
    label = np.zeros((H, W), np.uint8)
    if present:  # a photo of nothing that has a name is all background (E21)
        Q = crf_of_scores(clip_scores(found["after"], (H, W)), image)  # (1 + J, H, W)
        label = confident_labels(Q, present)
    cams = F.interpolate(found["after"][:, None], cam_grid(H, W), mode="bilinear")
    cams = cams[:, 0]  # (J, H/4, W/4)
    arrays = {"cam": cams.half(), "before": found["before"].half(), "boxes": found["boxes"],
              "probs": found["probs"]}
    arrays = {name: tensor.cpu().numpy() for name, tensor in arrays.items()}
    return {"keys": np.array(present, np.uint8), **arrays}, label


def seeds_from_clip(model: clip.CLIP, data, ids, labels, machine, folder) -> dict:
    """Provenance of the seeds that are written here, by CLIP."""
    model = model.to(machine.device).requires_grad_(False)
    texts = encode_classes(model, data)
    threshold = BOX_THRESHOLD.get(data.name, BOX_THRESHOLD["VOC2012"])

    def make(image, present):
        return clip_seed(model, texts, image, present, threshold, machine)

    write_seeds(make, data, ids, labels, machine, folder)
    if machine.main:
        write_clip_log(data, ids, folder)
    # label_filter: the image's labels have said which classes may appear
    return dict(iters=0, scales=[1], flip=False, crf=True, label_filter=True)


def write_clip_log(data, ids, folder):
    """Write log.jsonl: a line a photo, with its classes' probabilities and its unsure part.

    From the files, at the end: so it is whole however often the run was cut off.
    """
    lines = []
    for step, image_id in enumerate(tqdm(ids, "log")):
        cams = read_cams(folder / "cams" / f"{image_id}.npz")
        names = [data.classes[k] for k in cams["keys"]]
        probs = [round(float(p), 6) for p in cams["probs"]]
        unsure = (read_label(folder / "seeds" / f"{image_id}.png") == IGNORE).mean()
        line = {"step": step, "id": image_id, "probs": dict(zip(names, probs)),
                "unsure": round(float(unsure), 4)}
        lines.append(json.dumps(line) + "\n")
    write_text(folder / "log.jsonl", "".join(lines))


# ================================================================== II. the dense CRF of all stages
# Fully connected CRF, mean-field inference (Kraehenbuehl and Koltun, NeurIPS 2011): every pixel
# listens to all (and, in code but not in the paper, to itself), the more the closer the two are in
# position and colour. Mean field: the others' labels are not known, so their present probabilities
# stand for them; all pixels are updated at once, and that ten times over. The sum over all pairs is
# a Gaussian filter, done on a permutohedral lattice (Adams, Baek and Davis, Eurographics 2010). The
# published WeakCLIP numbers were made with that lattice, so its approximation is part of the
# method: the exact filter (`exact=True`) gives other labels on 0.5 to 14 % of the pixels.
#
# The lattice by example, in one dimension (d = 1). Its vertices are the whole numbers, one unit is
# sqrt(3) / 2 standard deviations. Point a lies at 0.25 and has the value 8, b at 1.5 and has 4.
#
#                     vertex 0    vertex 1      vertex 2
#     splat  a        3/4 * 8     1/4 * 8                    a is a quarter of the way to vertex 1,
#            b                    1/2 * 4       1/2 * 4      so 1 has a quarter of it, 0 the rest
#                     = 6         = 4           = 2
#     blur   axis 0   6 + 4/2     4 + (6+2)/2   2 + 4/2      half of both neighbours is added; the
#                     = 8         = 8           = 4          vertices -1 and 3 are absent, for no
#            axis 1   8 + 8/2     8 + (8+4)/2   4 + 8/2      point touches them, and count as 0
#                     = 12        = 14          = 8
#     slice  a        2/3 * (3/4 * 12 + 1/4 * 14) = 8.33     the same weights as in splat, and a
#            b        2/3 * (1/2 * 14 + 1/2 * 8) = 7.33      constant, 1 / (1 + 2^-d)
#
# Where both points have the value 1 comes 1.30 and 1.31. So the means around a and b are 6.40 and
# 5.59; the exact filter has 6.57 and 5.43. (`test_the_worked_example` has these numbers.) The
# constant would give a lone point on a vertex its own value back, were no vertex absent; here it
# gets 5/6 of it. In the CRF constants cancel, since every kernel is divided by its sums of ones.
#
# In d dimensions (2 for position, 5 with colour) features lie in the plane sum(x) = 0 of d + 1
# coordinates. Vertices are its integer points whose coordinates all leave the same remainder when
# divided by d + 1. They cut the plane into equal simplices (segments, triangles, tetrahedra, ...)
# with d + 1 corners, one of each remainder; a cube would have 2^d, so 32 where a simplex has 6. For
# d = 2 a triangle is
#
#     [0, 0, 0]  --axis 2-->  [1, 1, -2]  --axis 1-->  [2, -1, -1]  --axis 0-->  [0, 0, 0]
#
# and each step along an axis adds 1 to every coordinate and takes d + 1 from its own. The d + 1
# axes lie in the plane like the spokes of a wheel, so blurs of one width along all of them are
# together round. For d = 1 vertex v is [v, -v], and both axes run along one line: two blurs.

class Lattice:
    """Gaussian filter exp(-|f - f'|^2 / 2) over P points with d features: splat, blur, slice.

    A call with values (B, P, K) returns them filtered, (B, P, K).
    features (B, P, d) float32: each of the B images has a lattice of its own, all are filtered in
    one go. Each of the three steps is a sparse matrix, see `weighted_sums`. On a GPU the host waits
    twice, for the span of the features and for the number M of vertices, and never in a call.
    Raises ValueError where the features span more lattice cells than 63 bits can number.
    """

    def __init__(self, features):
        B, P, d = features.shape
        self.shape = B, P
        origin, turn, weights = simplex(features.permute(2, 0, 1).reshape(d, B * P))
        corners, places, total = number_corners(origin, turn, B)  # (d+1, BP)

        # Equal numbers are one vertex. Corners in different rows never are (their remainders
        # differ), so each row is sorted by itself, which takes half as long as all in one.
        # Row k holds each point's corner whose coordinates leave remainder k, see `simplex`.
        sorted_rows = [row.sort(stable=True) for row in corners]
        numbers = torch.cat([row.values for row in sorted_rows])  # ((d+1)BP,) rising
        point = torch.stack([row.indices for row in sorted_rows])  # (d+1, BP) whose corner it is
        is_first = torch.ones_like(numbers, dtype=torch.bool)
        is_first[1:] = numbers[1:] != numbers[:-1]
        first = is_first.nonzero()[:, 0]  # (M,) where a vertex starts
        vertex = is_first.cumsum(0, dtype=torch.int32).sub_(1).view(d + 1, B * P)  # in that order

        # Splat: a vertex sums the points of all corners with its number. Row M has none: it stays
        # 0, and stands for every vertex that is absent.
        self.splat_index = point.flatten().int()
        self.splat_start = F.pad(first, (0, 1), value=len(numbers)).int()  # (M+1,)
        self.splat_weights = weights.gather(1, point).flatten()
        # Blur: a vertex and its two neighbours along each axis.
        self.blur_index = neighbours(numbers[first], places, total).flatten(1)  # (d+1, 3(M+1))
        self.blur_start = 3 * torch.arange(len(first) + 1, dtype=torch.int32, device=vertex.device)
        self.blur_weights = weights.new_tensor([1, 0.5, 0.5]).repeat(len(first) + 1)
        # Slice: a point sums its corners. From sorted order back to the points' own.
        self.slice_index = torch.empty_like(vertex).scatter_(1, point, vertex).t().contiguous()
        self.slice_start = torch.arange(0, len(numbers), d + 1, dtype=torch.int32,
                                        device=vertex.device)
        self.slice_weights = (weights / (1 + 2.0 ** -d)).t().contiguous()  # (BP, d+1)

    def __call__(self, values):
        """values (B, P, K), filtered: (B, P, K)."""
        vertices = self.splat(values.flatten(0, 1))  # (M+1, K)
        vertices = self.blur(vertices)
        return self.slice(vertices).unflatten(0, self.shape)

    def splat(self, values):
        """Points (BP, K) -> vertices (M+1, K)."""
        return weighted_sums(values, self.splat_index, self.splat_start, self.splat_weights)

    def blur(self, x):
        """Vertices (M+1, K) -> vertices (M+1, K), along one axis after another."""
        # Memory for a tensor of over 32 MB comes from the system, page by page, each time anew.
        # That can double the time at 81 labels, so only as many go at once as stay below.
        parts = []
        for part in x.split(max(1, 2 ** 23 // len(x)), 1):
            part = part.contiguous()
            for index in self.blur_index:
                part = weighted_sums(part, index, self.blur_start, self.blur_weights)
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def slice(self, x, rows=...):
        """Vertices (M+1, K) -> the points `rows`, (R, K); all without `rows`."""
        index, weights = self.slice_index[rows], self.slice_weights[rows]  # (R, d+1)
        start = self.slice_start[:len(index)]
        return weighted_sums(x, index.flatten(), start, weights.flatten())

    def divide_by_degrees(self, weight):
        """Itself, from now on weight * D^-1/2 k D^-1/2: k the filter as built, D its row sums.

        A pixel among many alike has a large row sum, its degree: left as it is, a sky would shout
        down a wire before it. Half is divided out where a pixel speaks and half where it listens,
        so that i moves j as much as j moves i (in the lattice nearly so); k / D has not that.
        """
        ones = self.slice_weights.new_ones(*self.shape, 1)
        norm = (self(ones) + 1e-20).rsqrt().flatten()  # (BP,)
        self.splat_weights *= norm.index_select(0, self.splat_index)
        self.slice_weights *= weight * norm[:, None]
        return self


def weighted_sums(x, index, start, weights):
    """A sparse matrix times x (N, K): row i is the sum of weights * x[index] from entry start[i] up
    to entry start[i + 1]. Returns (len(start), K).

    An embedding bag is torch's one operation that fetches rows, weighs and adds them without
    writing the products down.
    """
    return F.embedding_bag(index, x, start, mode="sum", per_sample_weights=weights)


def onto_plane(features):
    """Features (d, P) as points of the plane sum(x) = 0 in d + 1 dimensions: (d+1, P).

    Feature i goes along (1, ..., 1, -i, 0, ..., 0) with i ones, over its length sqrt(i (i + 1)):
    these directions lie in the plane at right angles, so distances stay. They are scaled so that
    splat, blur and slice together have standard deviation 1: in each direction the blurs have the
    variance (d + 1)^2 / 2, splat and slice (d + 1)^2 / 12 each, on average.
    """
    d, P = features.shape
    x = features.new_empty(d + 1, P)
    tail = features.new_zeros(P)  # what later features have put on every earlier coordinate
    for i in range(d, 0, -1):
        f = features[i - 1] * (math.sqrt(2 / 3) * (d + 1) / math.sqrt(i * (i + 1)))
        x[i] = tail - i * f
        tail = tail + f
    x[0] = tail
    return x


def simplex(features):
    """The simplex around each of P points: where its corner 0 is, how to walk on, and the weights.

    Returns origin (d, P) float32, corner 0 divided by d + 1; turn (d+1, P) int64; weights (d+1, P)
    of the corners, which sum to 1. features (d, P) float32.
    Corner 0 has coordinates that are multiples of d + 1. The other corners come by a walk: a step
    along an axis adds 1 to every coordinate and takes d + 1 from that axis's, so that the sum stays
    0; turn says when each axis is stepped along. After k steps all coordinates have remainder k.
    In the example vertex v is [v, -v]: a has corner 0 at [0, 0] and comes to [1, -1] along axis 1,
    b has it at [2, -2] and comes to [1, -1] along axis 0.
    Order and rounding follow pydensecrf, so that the same vertices come out.
    """
    d = len(features)
    x = onto_plane(features)  # (d+1, P)
    # The nearest multiples of d + 1. Axes ranked by what remains, the largest first; the sum may
    # be off by s times d + 1. If s > 0, the s last in rank are lowered by one; if s < 0, the -s
    # first are raised. Adding s to every rank makes exactly those leave 0..d.
    origin = (x / (d + 1)).round_()
    rest = x - origin * (d + 1)
    rank = origin.sum(0).to(torch.int8).repeat(d + 1, 1)
    for (rest_i, rank_i), (rest_j, rank_j) in itertools.combinations(list(zip(rest, rank)), 2):
        smaller = rest_i < rest_j
        rank_i += smaller
        rank_j += ~smaller
    wrap = (rank < 0).to(torch.int8) - (rank > d).to(torch.int8)
    origin += wrap
    turn = d - (rank + wrap * (d + 1)).long()
    # Barycentric weights: how much more remains on an axis than on the one stepped along before.
    # Mixed with them the corners give the point. None is negative, because what remains rises along
    # the walk and spans at most 1: that is why the walk goes by rank, else one would be.
    rest = (x - origin * (d + 1)) / (d + 1)
    rest = torch.empty_like(rest).scatter_(0, turn, rest)  # in the order of the walk, rising
    weights = rest.clone()
    weights[1:] -= rest[:-1]
    weights[0] += 1 - rest[d]
    return origin[:d], turn, weights


def number_corners(origin, turn, B):
    """One whole number for each corner, equal where two corners are the same vertex.

    Returns numbers (d+1, BP), the places (d+1,) by which a step along an axis changes them, and how
    many numbers there are per remainder. A number's digits are remainder, image and the first d
    coordinates // (d + 1). A step raises the first and lowers one other: none along the last axis,
    whose digit is implied.
    origin, turn: of `simplex`. Raises ValueError where 63 bits do not suffice.
    """
    d, BP = origin.shape
    low, high = torch.stack([origin.amin(1), origin.amax(1)]).tolist()
    low = [int(v) - 2 for v in low]  # two below: a corner may be one lower, its neighbour two
    spans = [int(h) + 2 - v for h, v in zip(high, low)]
    total = B * math.prod(spans)
    if total * (d + 1) >= 2 ** 63:
        raise ValueError(f"dense CRF: features span {spans} lattice cells; "
                         "larger bandwidths (sxy, srgb) are needed")
    dtype = torch.int32 if total * (d + 1) < 2 ** 31 else torch.int64  # int32 sorts twice as fast
    places = [math.prod(spans[i + 1:]) for i in range(d)] + [0]
    number = torch.arange(B, dtype=dtype, device=origin.device) * math.prod(spans)
    number = number.repeat_interleave(BP // B)  # (BP,) of corner 0
    for axis in range(d):
        number += (origin[axis].to(dtype) - low[axis]) * places[axis]
    places = torch.tensor(places, dtype=dtype, device=origin.device)
    gain = total - places  # (d+1,) of a step along each axis: remainder + 1, its own digit - 1
    # What each step of the walk adds, in order. The last would lead back to corner 0.
    steps = number.new_empty(d + 1, BP).scatter_(0, turn, gain[:, None].expand(-1, BP))
    return torch.cat([number[None], steps[:d]]).cumsum_(0), places, total


def neighbours(vertices, places, total):
    """What the blur adds up along each axis (d+1, M+1, 3) int32: a vertex and the two beside it.

    M stands for a neighbour that is absent, and row M is (M, M, M).
    vertices (M,), sorted; places, total: of `number_corners`.
    """
    M, d = len(vertices), len(places) - 1
    # A step raises the remainder; from d it wraps to 0, which raises the digit of every coordinate.
    up = torch.where(vertices < d * total, total, sum(places) - d * total) + vertices
    wanted = up - places[:, None]  # (d+1, M)
    plus = torch.searchsorted(vertices, wanted, out_int32=True).clamp_(max=M - 1)
    plus = torch.where(vertices[plus] == wanted, plus, M)
    itself = torch.arange(M + 1, dtype=torch.int32, device=plus.device)
    index = plus.new_full((d + 1, M + 1, 3), M)
    index[:, :, 0] = itself
    index[:, :M, 1] = plus
    # If u is ahead of v, v is behind u. (What lands in row M has none ahead, and is overwritten.)
    index[:, :, 2].scatter_(1, plus.long(), itself[:M].expand(d + 1, -1))
    index[:, M] = M
    return index


class ExactFilter:
    """The same filter over all pairs of points: slow, the truth that the lattice approximates.

    A call with values (B, P, K) returns them filtered. features as for `Lattice`.
    """

    def __init__(self, features):
        self.features = features
        self.shape = features.shape[:2]
        self.before = self.after = 1

    def __call__(self, values):
        blocks = [torch.exp(-0.5 * torch.cdist(f, self.features).square()) @ (self.before * values)
                  for f in self.features.split(1024, 1)]
        return self.after * torch.cat(blocks, 1)  # (B, P, K)

    def splat(self, values):
        """values (BP, K) as they are: there are no vertices."""
        return values

    def blur(self, values):
        """values (BP, K) filtered: all is done here."""
        return self(values.unflatten(0, self.shape)).flatten(0, 1)

    def slice(self, values, rows):
        """The points `rows` of values (BP, K)."""
        return values[rows]

    def divide_by_degrees(self, weight):
        """As `Lattice.divide_by_degrees`."""
        norm = (self(self.features.new_ones(*self.shape, 1)) + 1e-20).rsqrt()  # (B, P, 1)
        self.before, self.after = norm, weight * norm
        return self


def pixel_positions(B, H, W, device):
    """x and y of every pixel, (B, HW, 2) float32."""
    y, x = torch.meshgrid(torch.arange(H, device=device), torch.arange(W, device=device),
                          indexing="ij")
    return torch.stack([x, y], 2).flatten(0, 1).float().expand(B, -1, -1)


@functools.lru_cache(maxsize=2)
def position_filter(make, B, H, W, sxy, weight, device):
    """The kernel of positions alone: it serves all photos of a size, and two sizes are kept."""
    return make(pixel_positions(B, H, W, device) / sxy).divide_by_degrees(weight)


def softmax_rows(x, out):
    """softmax of every row of x into `out`; x is used up."""
    if x.shape[1] >= 16:
        torch.softmax(x, 1, out=out)
        return
    # torch works on vectors of 16 numbers; on shorter rows it takes six times as long as this.
    x -= x.amax(1, keepdim=True)
    x.exp_()
    torch.div(x, x.sum(1, keepdim=True), out=out)


@torch.no_grad()
def dense_crf(probs, image, gaussian=(3, 3), bilateral=(80, 13, 10), iterations=10, exact=False):
    """Refine class probabilities by the colours of the image; returns Q (B, K, H, W) float32.

        Q0 = softmax(-U),  Q <- softmax(-U + sum_m w_m D_m^-1/2 k_m D_m^-1/2 Q)
        U = -log probs,    D = row sums of k
    probs (B, K, H, W) positive, need not sum to one over K; image (B, 3, H, W) RGB 0..255;
    gaussian (sxy, weight) of the kernel of positions, bilateral (sxy, srgb, weight) of that of
    positions and colours, sxy in pixels, srgb in grey levels; the names are pydensecrf's (both are
    Gaussians), the defaults those of stage 2's loss.
    Potts model: similar pixels raise each other's score of the class that they are of, different
    classes do not interact. Raises ValueError where bandwidths are too fine, and MemoryError.
    """
    B, K, H, W = probs.shape
    make = ExactFilter if exact else Lattice
    what = f"a dense CRF of {B}x{H}x{W} pixels and {K} labels"
    # Bytes a pixel: about 600 for the two lattices while they are made; a label has four numbers of
    # 4 bytes, in log_p, Q and both blurred, and a little more.
    with memory_for(what, B * H * W * (600 + 18 * K)):
        position = pixel_positions(B, H, W, probs.device) / bilateral[0]
        colour = image.flatten(2).transpose(1, 2).float() / bilateral[1]  # (B, HW, 3)
        kernels = [position_filter(make, B, H, W, *gaussian, probs.device),
                   make(torch.cat([position, colour], 2)).divide_by_degrees(bilateral[2])]
        log_p = probs.float().log().permute(0, 2, 3, 1).reshape(-1, K).contiguous()  # (BHW, K)
        Q = torch.empty_like(log_p)
        softmax_rows(log_p.clone(), Q)
        # Pixels go through the last steps in blocks that stay in a processor's cache.
        size = max(1, 2 ** (18 if probs.device.type == "cpu" else 26) // K)
        blocks = [slice(i, i + size) for i in range(0, len(Q), size)]
        for _ in range(iterations):
            blurred = [k.blur(k.splat(Q)) for k in kernels]
            for rows in blocks:
                score = kernels[0].slice(blurred[0], rows)
                score += kernels[1].slice(blurred[1], rows)
                score += log_p[rows]
                softmax_rows(score, Q[rows])
    return Q.unflatten(0, (B, H * W)).transpose(1, 2).unflatten(2, (H, W))


class WantOfMemory(MemoryError):
    """Its text says what needs how much; torch's own errors only name the tensor that failed."""


@contextlib.contextmanager
def memory_for(what, size):
    """Inside, running out of memory raises WantOfMemory: `what` needs about `size` bytes."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise WantOfMemory(f"{what} needs about {size / 2 ** 30:.1f} GiB") from None


# ======================================= III. engine room of all stages, to skip at a first reading
# From here on nothing is about segmentation: where a run happens, how it is known again, how it
# goes on after it was cut off, how it is looked at, what can be asked of it. At the end: `main`.

# --------------------------------------------------------------------------- one device, or several

class Machine:
    """Where the run happens: device, precision, and this process's place among torchrun's.

    rank of world processes, all of which run the same script; main: the one (rank 0) that writes
    what there is one of. Without torchrun there is one process, and all that is between processes
    does nothing. Raises ValueError for a device, or bfloat16, that is not there.
    """

    def __init__(self, device: str, amp: bool):
        self.rank = int(os.environ.get("RANK", 0))  # set by torchrun
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = open_device(device)
        if self.world > 1 and not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            # a process may check or download alone for longer than the usual 10 minutes
            dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
        self.main = self.rank == 0
        self.amp = amp
        if amp:
            check_bfloat16(self.device)

    def autocast(self):
        """A context: bfloat16 for what runs inside, if --amp; losses stay outside, in float32."""
        if self.amp:
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def share(self, items: list) -> list:
        """This process's part of a list; the parts of all processes make up the list."""
        return items[self.rank::self.world]

    def wait(self):
        """Go on when every process has come here."""
        if self.world > 1:
            dist.barrier()

    def average_gradients(self, parameters):
        """After backward: every process gets the mean of all processes' gradients.

        All go in one message, since many small ones cost more. Every process then takes the same
        step, so that parameters stay equal without being sent. Each loss is a mean over its
        process's share, so unsure pixels weigh a little otherwise than in one process.
        """
        if self.world == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)  # the sum
        means = (flat / self.world).split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means):
            gradient.copy_(mean.view_as(gradient))

    def synchronise_batchnorm(self, model):
        """BatchNorm's statistics over the whole batch, as in one process; in place.

        Only CUDA can: elsewhere each process norms its own share.
        """
        if self.world > 1 and self.device.type == "cuda":
            # the parameters stay the same objects, so the optimizer still holds them
            nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def share_buffers(self, model):
        """After training: every process gets the running statistics of the first.

        Those are the checkpoint's, so that masks do not depend on which process writes them.
        """
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def describe(self) -> str:
        """The machine in words, for args.json."""
        if self.device.type == "cuda":
            return f"{self.world} x {torch.cuda.get_device_name(self.device)}"
        return f"{self.world} x {self.device.type}, {torch.get_num_threads()} threads"


def open_device(name: str) -> torch.device:
    """The device of that name, tried out; "auto" is the best there is.

    Under torchrun each process takes the GPU of its own number. Raises ValueError where the device
    is unknown or absent.
    """
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            number = int(os.environ.get("LOCAL_RANK", device.index or 0))
            device = torch.device("cuda", number)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # a device can be named without being there
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def check_bfloat16(device: torch.device):
    """Raise ValueError where bfloat16 is missing, or emulated and so slower than float32.

    GPUs tell what they can. CPUs do not, and some take a hundred times as long: so it is tried.
    """
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 0):
            name = torch.cuda.get_device_name(device)
            raise ValueError(f"--amp: {name} has no bfloat16; leave --amp out")
        return
    try:
        slower = matmul_seconds(torch.bfloat16, device) / matmul_seconds(torch.float32, device)
    except (RuntimeError, TypeError):
        raise ValueError(f"--amp: this {device.type} has no bfloat16; leave --amp out") from None
    if slower > 2:
        raise ValueError(f"--amp: bfloat16 is {slower:.0f} times slower than float32 on this "
                         f"{device.type}; leave --amp out")


def matmul_seconds(dtype, device) -> float:
    """Seconds that two products of 256 x 256 matrices take; of five tries the quickest."""
    a = torch.ones(256, 256, dtype=dtype, device=device)
    times = []
    for _ in range(5):  # the first warms up
        start = time.perf_counter()
        float((a @ a @ a)[0, 0])  # reading a value waits for the device
        times.append(time.perf_counter() - start)
    return min(times)


# ------------------------------------------------------------------------------ the folder of a run
# How provenance is kept. A stage's folder belongs to one run, and args.json says which: every
# option, and the digests of what went in (lists, classes, labels, weights, seeds or masks). Whoever
# opens the folder again must bring the same, or is refused: so all that lies in it was made by one
# recipe from one input, in however many sittings. When a stage has made its seeds or masks, it adds
# how ("provenance"), which eval.py prints beside every score. Last of all comes "finished": true.

# options that change where or how fast things happen, but not what comes out (beyond rounding)
MACHINE_OPTIONS = ("data", "runs", "overwrite", "device", "amp", "workers", "deterministic")
# options that name a file or folder: known by the digest of what it holds, wherever it lies
FILE_OPTIONS = ("clip", "weights", "seeds", "masks", "checkpoint")


@contextlib.contextmanager
def work_on(folder: Path, args, machine):
    """A context in which a stage's folder is this command's alone.

    Two commands in one folder would each write half of its files. What killed runs have left lying
    is cleared away first: whoever holds the folder knows that nobody is at work on it any more.
    Raises ValueError that says who holds it; an interrupted command says how it goes on.
    """
    if folder.is_symlink():  # by its other name somebody else could be at work in it
        raise ValueError(f"{folder}: a link; let it be a folder, or give another --runs, which "
                         "may be a link")
    lock = take_lock(folder) if machine.main else None
    try:
        if machine.main:
            clear_leftovers(folder)
        machine.wait()
        yield
    except Interrupted as error:
        if not error.says_more:
            error = Interrupted(error.signal, f"{the_same_command(args)} goes on")
        raise error from None
    finally:
        if lock is not None:
            lock_path(folder).unlink(missing_ok=True)  # while it is held: nobody else's is meant
            lock.close()


def the_same_command(args) -> str:
    """In words, the command that goes on where this one stops: --overwrite would start afresh."""
    return "the same command" + (" without --overwrite" if args.overwrite else "")


def lock_path(folder: Path) -> Path:
    """The lock of a folder lies beside it: --overwrite puts another folder in its place."""
    return folder.with_name(f".{folder.name}.lock")


def take_lock(folder: Path):
    """The open file that is the lock: the system lets go of it when its process ends, however.

    None where the system has no such locks. Raises ValueError that says who has it.
    """
    if fcntl is None:
        return None
    path = lock_path(folder)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with naming(path):
            lock = open(path, "a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "it does not say which"
            raise ValueError(f"{folder}: another command is at work there ({holder}); let it end, "
                             "or give another --runs") from None
        except OSError:  # a file system without locks
            lock.close()
            return None
        # whoever had it may have removed the file between our opening and our locking it
        if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            break
        lock.close()
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    with naming(path):
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()} since {now}")
        lock.flush()
    # Processes that load images outlive a killed one by seconds; they shall not hold the lock.
    os.register_at_fork(after_in_child=lock.close)
    return lock


def check_unchanged(path: Path, before: str, now: str):
    """Raise ValueError where a file or folder has got another digest while it was read.

    Another command then writes there. What was read would be neither the old nor the new, and the
    record would name one of them.
    """
    if now != before:
        raise ValueError(f"{path}: has changed while this command read it; let the command that "
                         "writes there end, then start this one again, with --overwrite where it "
                         "has trained on that")


@contextlib.contextmanager
def unchanged(path: Path):
    """A context in which a file is read; gives its sha256, ValueError if another one ends it."""
    digest = clip.file_sha256(path)
    yield digest
    check_unchanged(path, digest, clip.file_sha256(path))


def clear_leftovers(folder: Path):
    """Remove what killed runs have left: half-written files, folders set aside to be deleted.

    But for those of images/, where --images has a folder and a lock for every folder of photos.
    """
    for path in folder.rglob(".*.part"):
        if "images" not in path.relative_to(folder).parts:
            path.unlink()
    name = glob.escape(folder.name)  # a folder of photos may be called [1]
    for path in [*folder.parent.glob(f".{name}.*.old"), *folder.glob(".*.old")]:
        shutil.rmtree(path)


def delete_folder(folder: Path):
    """Delete a folder, which is gone at one stroke: cut off, no half of it passes for a whole."""
    if folder.exists():
        aside = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        folder.rename(aside)
        shutil.rmtree(aside)


def start_run(folder: Path, args, machine, digests: dict[str, str], mask_options=()):
    """Make or reopen a stage's folder; raise ValueError rather than mix two runs in one.

    digests: {what went in: its sha256}. mask_options: names of options that only change how masks
    are written from a finished model; stages 2 and 3 see to them. With --overwrite what is there is
    deleted first. So is, without it, a folder that holds no checkpoint, seed or mask: a run has
    left it that came to nothing.
    """
    options = {}
    for name, value in vars(args).items():
        options[name] = str(value) if isinstance(value, Path) else value
    refuse_own_input(folder, args)
    if machine.main and (args.overwrite or not holds_results(folder)):
        delete_folder(folder)
    machine.wait()
    before = read_args(folder)
    if before or has_begun(folder):
        refuse_another_run(folder, before, options, digests, mask_options)
    elif machine.main:
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__,
                    "numpy": np.__version__}
        write_json(folder / "args.json", {
            "options": options, "digests": digests, "commit": commit(),
            "device": machine.describe(), "versions": versions, "finished": False})
    machine.wait()


def holds_results(folder: Path) -> bool:
    """True if the folder has anything that took work: a checkpoint, a seed, a mask."""
    for path in folder.rglob("*"):
        if path.suffix in (".pt", ".png", ".npz"):
            return True
    return False


def has_begun(folder: Path) -> bool:
    """True if a run of this stage has left anything whose making its args.json should tell.

    Masks of one's own photos, in images/, have an args.json of their own.
    """
    names = ("checkpoint.pt", "cams", "seeds", "masks", "probs")
    return any((folder / name).exists() for name in names)


def refuse_own_input(folder: Path, args):
    """Raise ValueError where an input lies in the folder that is written, which may be deleted."""
    for name in (*FILE_OPTIONS, "images"):
        value = getattr(args, name, None)
        if not value or not Path(value).exists():  # or it is the name of a model
            continue
        if Path(value).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--{name} {value}: lies in {folder}, which this command writes; "
                             "copy it elsewhere, or give another --runs")


def refuse_another_run(folder, before, options, digests, mask_options):
    """Raise ValueError that names the first option or digest that differs from args.json's."""
    for part in ("options", "digests"):
        if not isinstance(before.get(part), dict):
            raise ValueError(f"{folder / 'args.json'}: missing, or no record of a run, so nobody "
                             "knows how what lies there was made; give --overwrite to start "
                             "afresh, or another --runs")
    free = (*MACHINE_OPTIONS, *FILE_OPTIONS, *mask_options)
    now = {name: value for name, value in options.items() if name not in free}
    now.update(digests)
    then = {name: value for name, value in before["options"].items() if name not in free}
    then.update(before["digests"])
    then.setdefault("accumulate", 1)  # a run that was made before there was this option
    for name, value in now.items():
        old = then.get(name)
        if old != value:
            mend = "repeat the command with the options it had"
            if name in digests:  # of a file or folder: long numbers, whose beginnings tell enough
                old, value = str(old)[:16], str(value)[:16]
                mend = "what it is made of has changed"
            raise ValueError(f"{folder} was made with {name} = {old}, now it is {value}: {mend}; "
                             "or give --overwrite to start afresh, or another --runs")


def commit() -> str | None:
    """The commit of this code, None where it lies outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "-q", "HEAD"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return answer.stdout.strip() or None


def set_provenance(folder: Path, facts: dict, options=()):
    """Record in args.json how the stage's masks were made, and the options that did.

    facts: what eval.py prints beside every score; options: pairs or a dict, put over the old ones.
    """
    record = read_args(folder)
    record["options"].update(options)
    record["provenance"] = facts
    write_json(folder / "args.json", record)


def is_finished(folder: Path, outputs: list[Path] = ()) -> bool:
    """True if the stage's last act has been done in this folder, and all `outputs` are there.

    The last act is "finished": true in args.json. Nothing else says so: a picture or a mask may be
    there from a run that was cut off. Older runs lack the word and are taken up again, which is
    cheap: what exists is done. And what was lost since, or emptied, is made again.
    """
    return read_args(folder).get("finished") is True and all(map(is_whole, outputs))


# the last bytes of a PNG, its end mark; the first of the last 22 of an npz, which is a zip archive
ENDS = {".png": (8, b"IEND\xaeB`\x82"), ".npz": (22, b"PK\x05\x06")}


def is_whole(path: Path) -> bool:
    """True if a label PNG or an npz of ours is there and has its end: it is not empty, not cut.

    So quick that a finished stage can look at all of its files, which reading them would not be.
    """
    length, mark = ENDS[path.suffix]
    try:
        with open(path, "rb") as f:
            f.seek(-length, os.SEEK_END)
            return f.read(len(mark)) == mark
    except OSError:  # missing, or shorter than that
        return False


def mark_finished(folder: Path):
    """Say so in args.json: the stage's very last act, when all else lies on the disk."""
    write_json(folder / "args.json", {**read_args(folder), "finished": True})


def mark_unfinished(folder: Path):
    """Take it back, before anything of a finished folder is rewritten or removed."""
    record = read_args(folder)
    if record:
        write_json(folder / "args.json", {**record, "finished": False})


# -------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(path, model, optimizer, step, facts, frozen):
    """Write all that iteration `step` and those after it depend on, but for the frozen weights.

    frozen: prefixes of names that are left out; facts: what tells this run from another. Raises
    ValueError, and writes nothing, where a number of it is infinite or none.
    """
    weights = model.state_dict()
    state = {name: weights[name] for name in weights if not name.startswith(frozen)}
    value = dict(step=step, model=state, optimizer=optimizer.state_dict(), facts=facts)
    check_finite(value, step)
    # first to memory: torch's writer of archives has no words for a disk that is full
    archive = io.BytesIO()
    torch.save(value, archive)
    write_whole(path, lambda f: f.write(archive.getbuffer()))


def check_finite(value: dict, step: int):
    """Raise ValueError if weights, buffers or the optimizer's state hold a NaN or an infinity.

    The loss can be sound and the step after it not: a gradient overflows, a variance is zero. A NaN
    never leaves the weights again, so a checkpoint that had one would be worth nothing.
    """
    bad = not_finite(all_tensors(value))
    if bad:
        raise NotFinite(f"iteration {step - 1}: {first_names(bad)} became infinite or no number; "
                        "nothing was saved since")


def all_tensors(value: dict) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, weights and the optimizer's, by names for messages."""
    tensors = dict(value["model"])
    for number, moments in value["optimizer"]["state"].items():
        for name, moment in moments.items():
            tensors[f"optimizer's {name} of parameter {number}"] = moment
    return tensors


def not_finite(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity."""
    names = [name for name in tensors if tensors[name].is_floating_point()]
    if not names:
        return []
    device = tensors[names[0]].device  # Adam counts its steps on the CPU
    sound = torch.stack([tensors[name].isfinite().all().to(device) for name in names])
    if sound.all():  # one answer for all of them, so a GPU is waited for once
        return []
    return [name for name, fine in zip(names, sound.tolist()) if not fine]


# What to do with a checkpoint that is none.
DAMAGED = "if a run left it so, delete it: that run then starts afresh"
# Of what kind the parts of a checkpoint are, and the facts in it.
PARTS = {"step": int, "model": dict, "optimizer": dict, "facts": dict}
FACTS = {"stage": str, "classes": list, "arch": str, "clip": str, "crop": int, "switches": dict}
# The facts that each stage builds its network from.
NEEDED = {"1_cam": ("classes",), "2_weakclip": ("classes", "clip", "crop", "switches"),
          "3_segment": ("classes", "arch")}
# Of a longer run, or a wider table of positions, no file has to be believed.
MOST_ITERATIONS = 10 ** 9
LARGEST_CROP = 8192


def read_checkpoint(path: Path) -> dict:
    """What `save_checkpoint` wrote, checked before anyone uses it, in form and numbers.

    "step": iterations done, from 1; "model": {name: tensor}; "optimizer": {"state": {number of
    a parameter: {name: tensor}}, ...}; "facts": what its stage needs, of the right kinds. All
    tensors are float32, and finite, or int64. What depends on the network is for `resume` and
    `load_checkpoint` to compare.
    Pickled objects are refused, never built. Raises ValueError (one line) for any other file.
    """
    saved = clip.read_tensors(path, "checkpoint", DAMAGED)
    fault = form_fault(saved) or number_fault(saved)
    if fault:
        raise ValueError(f"{path}: not a readable checkpoint ({fault}); {DAMAGED}")
    return saved


def form_fault(saved) -> str | None:
    """What is wrong with the form of a checkpoint's content, None if nothing is."""
    if not isinstance(saved, dict):
        return "it holds no dict"
    for name, kind in PARTS.items():
        if not isinstance(saved.get(name), kind) or saved[name] is True:
            return f"its {name} is missing or no {kind.__name__}"
    if not 1 <= saved["step"] <= MOST_ITERATIONS:
        return "its step is no number of iterations"
    if not clip.is_state_dict(saved["model"]):
        return "its model is no dict of tensors"
    state = saved["optimizer"].get("state")
    if not isinstance(state, dict):
        return "its optimizer has no state"
    for number, moments in state.items():
        if not isinstance(number, int) or not clip.is_state_dict(moments):
            return "its optimizer's state is no dict of tensors for each parameter"
    return facts_fault(saved["facts"])


def facts_fault(facts: dict) -> str | None:
    """What is wrong with the facts of a checkpoint, None if nothing is."""
    for name in NEEDED.get(str(facts.get("stage")), ()):
        if name not in facts:
            return f"its facts lack {name}"
    for name, value in facts.items():
        if not isinstance(value, FACTS.get(name, object)):
            return f"its facts' {name} is no {FACTS[name].__name__}"
    if set(map(type, facts.get("classes", ["background"]))) != {str}:
        return "its facts' classes are no names"
    if not set(map(type, facts.get("switches", {}).values())) <= {bool, float}:
        return "its facts' switches are no switches"
    if facts.get("arch", ARCHITECTURES[0]) not in ARCHITECTURES:
        return "its facts' arch is none of " + ", ".join(ARCHITECTURES)
    crop = facts.get("crop", 64)
    if not 64 <= crop <= LARGEST_CROP or crop % 32:
        return f"its facts' crop is no multiple of 32 from 64 to {LARGEST_CROP}"
    return None


def number_fault(saved: dict) -> str | None:
    """What is wrong with the tensors of a checkpoint, None if nothing is."""
    tensors = all_tensors(saved)
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.int64):
            return f"{first_names([name])} is {tensor.dtype}"
    bad = not_finite(tensors)
    return f"{first_names(bad)} infinite or no number" if bad else None


def load_trained(model, state: dict, may_lack=()):
    """load_state_dict that lets nothing be missing but what starts with a prefix in `may_lack`.

    Raises ValueError naming the keys: a network that is half loaded works, and is wrong.
    """
    own = model.state_dict()
    for name in own.keys() & state.keys():
        if own[name].is_floating_point() != state[name].is_floating_point():
            raise ValueError(f"does not fit: {name} is {state[name].dtype}")
    try:
        missing, extra = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # a shape
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"does not fit: {reason}") from None
    missing = [name for name in missing if not name.startswith(may_lack)]
    if missing or extra:
        raise ValueError(f"does not fit: missing {first_names(missing)}, "
                         f"unexpected {first_names(extra)}")


def load_checkpoint(path: Path, saved: dict, model, may_lack=()):
    """`load_trained` of what `read_checkpoint` has read from `path`, which its errors name."""
    try:
        load_trained(model, saved["model"], may_lack)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {DAMAGED}") from None


def first_names(names: list[str], n: int = 3) -> str:
    """The first n of a list of names, as a message can bear them, and how many more there are."""
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return f"{[name[:80] for name in names[:n]]}{more}" if names else "nothing"


def resume(path, model, optimizer, iters, facts, frozen) -> int:
    """How many of `iters` iterations are done: model and optimizer are as they were after them.

    0 where there is no checkpoint. Raises ValueError for one of another run.
    """
    if not path.is_file():
        return 0
    saved = read_checkpoint(path)
    for name in {**facts, **saved["facts"]}:
        if saved["facts"].get(name) != facts.get(name):
            raise ValueError(f"{path} is of another run, with another {str(name)[:40]!r}; give "
                             "--overwrite to start afresh, or another --runs")
    load_checkpoint(path, saved, model, frozen)
    state = saved["optimizer"]["state"]
    fault = moments_fault(state, moment_shapes(optimizer))
    if saved["step"] > iters:
        fault = f"it has had {saved['step']} iterations of {iters}"
    if fault:
        raise ValueError(f"{path}: not this run's checkpoint ({fault}); {DAMAGED}")
    # The groups, with rates and weight decay, are the command's: args.json has seen to it that
    # it is the same. Of the file nothing is believed that is known without it.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return saved["step"]


def moment_shapes(optimizer) -> list[dict]:
    """Of each parameter, what the optimizer keeps once it has moved it: {name: shape}."""
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            shapes = {}
            if "betas" in group:  # Adam: a count, the mean gradient, the mean of its square
                shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            elif group["momentum"]:
                shapes = {"momentum_buffer": parameter.shape}
            found.append(shapes)
    return found


def moments_fault(state: dict, expected: list[dict]) -> str | None:
    """What does not fit of {number of a parameter: {name: tensor}}; None if all does.

    expected: `moment_shapes`. A parameter that no loss depends on, as with some switches of
    stage 2, has had no gradient and has no state.
    """
    if any(expected) and not state:
        return "the optimizer's state is missing"
    for number, moments in state.items():
        shapes = {name: moment.shape for name, moment in moments.items()}
        if number not in range(len(expected)) or shapes != expected[number]:
            return f"the optimizer's state of parameter {number} does not fit"
    return None


# -------------------------------------------------------------------------------- the training loop
# Why a resumed run is exact, bit for bit (same device, --amp, number of processes and of threads;
# on a GPU with --deterministic). An iteration depends on four things, and none of them is how long
# this process has been running:
#   1. parameters, running statistics and optimizer after the one before: in the checkpoint; frozen
#      weights come from their file, whose digest args.json holds;
#   2. which images are in its batch, and how they are augmented: `batch_plan` numbers the samples
#      of the whole run, and what becomes of sample s is a function of (seed, s);
#   3. the network's own chance, dropout: seeded anew in every iteration by (seed, iteration);
#   4. the learning rate: a function of the iteration.
# One random stream through the whole training would do as well if its state were saved, but every
# worker that loads images has one too, each in another place. Functions have no state: there is
# nothing to save and nothing to forget, and any one sample can be made again to be looked at.
#
# The order within an iteration: seed, rate, batch, forward, loss and backward (of one part of the
# batch after the other, with --accumulate), average, step, check, log, save. The check comes once
# in LOG_EVERY iterations, since a GPU has to be waited for, and always before a save: a NaN that
# has reached the weights never leaves them, so none is ever saved, and the last checkpoint is
# sound. The log comes before the checkpoint: a cut between the two leaves lines too many, which
# are dropped and come again, and never a line too few.

SAVE_EVERY = 500  # iterations; what a cut costs at most
LOG_EVERY = 10    # iterations


def batch_plan(n: int, batch: int, seed: int, step: int, steps: int, machine):
    """Yield this process's share of every batch, from iteration `step` up to `steps`.

    A batch is a list of (image index, sample number), for DataLoader(batch_sampler=...). Samples
    are numbered from 0 through the whole run: `batch` of them to an iteration, and n, the number of
    images, to an epoch. Epoch e has the order that is drawn from (seed, e); so every image comes
    once an epoch, and a batch may lie across two.
    """
    epoch = None
    for iteration in range(step, steps):
        items = []
        for sample in range(iteration * batch, (iteration + 1) * batch):
            if sample // n != epoch:
                epoch = sample // n
                order = np.random.default_rng([seed, epoch]).permutation(n)
            items.append((int(order[sample % n]), sample))
        yield machine.share(items)


def load_batches(dataset, args, step, machine):
    """The batches from iteration `step` on, as tensors on the CPU; loaded ahead by --workers."""
    plan = batch_plan(len(dataset), args.batch_size, args.seed, step, args.iters, machine)
    pinned = machine.device.type == "cuda"  # page-locked, so that a copy overlaps with computing
    return torch.utils.data.DataLoader(dataset, batch_sampler=plan, num_workers=args.workers,
                                       pin_memory=pinned, worker_init_fn=ignore_interrupt)


def ignore_interrupt(worker: int):
    """Ctrl-C reaches the processes that load images too; when to end is for the first to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def fit(model, dataset, optimizer, losses, rate, args, machine, folder, facts, frozen=()):
    """Train `model`, from its checkpoint if there is one: the training loop of all stages.

    dataset: item (index, sample number) -> tensors; losses(model, *batch) -> {name: scalar}, whose
    sum is minimised; rate(group, step) -> learning rate; facts: what tells this run's checkpoint
    from another's; frozen: prefixes of names that neither train nor are saved. Raises ValueError.
    """
    path = folder / "checkpoint.pt"
    done = resume(path, model, optimizer, args.iters, facts, frozen)
    if done == args.iters:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    machine.synchronise_batchnorm(model)
    log = Log(folder / "log.jsonl", done) if machine.main else None
    model.train()
    bar = tqdm(total=args.iters, initial=done, desc=folder.name, disable=not machine.main)
    with bar, training_faults(args, path), Postponed(machine) as signals:
        recent = []  # losses that nobody has looked at
        for step, batch in enumerate(load_batches(dataset, args, done, machine), start=done):
            torch.manual_seed((args.seed << 32) + step * machine.world + machine.rank)  # dropout
            for group in optimizer.param_groups:
                group["lr"] = rate(group, step)
            batch = [tensor.to(machine.device, non_blocking=True) for tensor in batch]
            optimizer.zero_grad(set_to_none=True)
            terms = add_gradients(model, batch, losses, args.accumulate)
            loss = sum(terms.values())
            machine.average_gradients(parameters)
            optimizer.step()
            recent.append((step, loss, terms))
            last = step + 1 == args.iters
            received = signals.received  # asked once: what comes later waits for the next iteration
            save = last or received or (step + 1) % SAVE_EVERY == 0
            if save or step % LOG_EVERY == 0:
                check_losses(recent)
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update(len(recent))
                recent.clear()
            if machine.main and (last or step % LOG_EVERY == 0):
                log(step, optimizer.param_groups[0]["lr"], loss, terms)
            if machine.main and save:
                save_checkpoint(path, model, optimizer, step + 1, facts, frozen)
            if received:
                raise Interrupted(received)
    machine.share_buffers(model)


def add_gradients(model, batch: list[torch.Tensor], losses, parts: int) -> dict[str, torch.Tensor]:
    """{name: loss} of a batch, without gradient; their sum's is added to the parameters' `grad`.

    parts: in how many equal parts (micro-batches, --accumulate) the batch is shown, one after the
    other; the activations of only one are in memory at a time.

    Each loss becomes the mean of the parts' losses. So gradients are the whole batch's, but for
    rounding, where a loss is a mean over photos, or over all of their pixels. They are not where it
    is a mean over the pixels that are not unsure (stage 2's score loss, stage 3's): those of a part
    with few of them weigh more, as between the processes of torchrun. Nor where BatchNorm trains:
    it norms each part by the part's own statistics, and its running ones move once a part. And
    every part draws a dropout of its own.
    """
    terms = {}
    for part in zip(*[tensor.chunk(parts) for tensor in batch]):
        found = losses(model, *part)
        (sum(found.values()) / parts).backward()
        for name, term in found.items():
            terms[name] = terms.get(name, 0) + term.detach() / parts
    return terms


@contextlib.contextmanager
def photo_faults(image_id: str, image: np.ndarray, mend: str):
    """A context of work on one photo (H, W, 3): a want of memory is said with photo and mend."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        H, W = image.shape[:2]
        wanted = f" ({error})" if isinstance(error, WantOfMemory) else ""
        raise ValueError(f"{image_id}: out of memory for a photo of {W}x{H} pixels{wanted}; what "
                         f"helps: {mend}, or more memory") from None


def check_output(image_id: str, values):
    """Raise ValueError where what a network says of a photo, any tensor, is infinite or no number.

    Sound weights can overflow on the way through it; argmax would make a mask of that all the same.
    """
    if not torch.as_tensor(values).isfinite().all():
        raise ValueError(f"{image_id}: the network's answer is infinite or no number; train anew "
                         "with a smaller --lr, with --overwrite, or leave --amp out")


class NotFinite(ValueError):
    """Training has made an infinity or a NaN; the text names the iteration."""


def check_losses(recent: list):
    """Raise NotFinite that names the first iteration whose loss is infinite or no number.

    recent: (iteration, loss, {name: term}) of each. They stay on the device till now: to look at a
    loss is to wait for it, and a GPU that is waited for in every iteration idles in between.
    """
    sound = torch.stack([loss for _, loss, _ in recent]).isfinite().tolist()
    for (step, _, terms), fine in zip(recent, sound):
        if not fine:
            values = {name: term.item() for name, term in terms.items()}
            raise NotFinite(f"iteration {step}: a loss is no number ({values})")


@contextlib.contextmanager
def training_faults(args, path: Path):
    """A context of training: what can go wrong in it is said with the way out.

    path: of the checkpoint, which is sound if it is there: nothing else is ever saved.
    """
    try:
        yield
    except (ValueError, RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ValueError(f"out of memory with --batch-size {args.batch_size} --crop "
                             f"{args.crop} --accumulate {args.accumulate}: make the last "
                             "larger, or one of the others smaller; memory grows with the photos "
                             "shown at once and with the crop's square") from None
        if not isinstance(error, NotFinite):
            raise
        kept = ", and deletes the last checkpoint" if path.is_file() else ""
        raise ValueError(f"{error}; try a smaller --lr, with --overwrite, which starts "
                         f"afresh{kept}") from None
    except (ConnectionError, FileNotFoundError, EOFError) as error:
        if getattr(error, "filename", None):
            raise
        # a tensor was being sent by a process that is no more; else torch would say it like this
        raise RuntimeError("DataLoader worker was killed") from None
    except KeyboardInterrupt as error:
        if not isinstance(error, Interrupted):
            raise
        saved = read_checkpoint(path)["step"] if path.is_file() else 0
        if not error.says_more:
            again = the_same_command(args)
            error = Interrupted(error.signal, f"{again} goes on from iteration {saved}")
        raise error from None


class Postponed:
    """A context in which a first Ctrl-C or SIGTERM waits for the end of the iteration.

    So an interrupted run loses nothing. In several processes signals do not come in the same
    iteration, and who stops alone leaves the others waiting: there they act at once, as ever.
    """

    def __init__(self, machine):
        self.received = 0  # the signal's number
        self.active = machine.world == 1 and threading.current_thread() is threading.main_thread()

    def __enter__(self):
        self.before = {}
        if self.active:
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is interrupt:  # a command; not where others call `fit`
                    self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        """The signals' handler."""
        if self.received:
            raise Interrupted(number)
        self.received = number

    def __exit__(self, kind, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.received and kind is None:  # after the last iteration
            raise Interrupted(self.received)


class Log:
    """log.jsonl: a line per logged iteration, with every loss under its name.

    step: the first iteration to come. Lines from there on were left by a run that was cut off after
    its checkpoint; they are dropped, and come again.
    """

    def __init__(self, path: Path, step: int):
        kept = [line for line in read_log(path) if line["step"] < step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.path = path

    def __call__(self, step: int, lr: float, loss, terms: dict):
        """Add a line."""
        line = {"step": step, "lr": round(lr, 8), "loss": round(loss.item(), 8)}
        for name, term in terms.items():
            line[name] = round(term.item(), 8)
        with naming(self.path), open(self.path, "a") as f:
            f.write(json.dumps(line) + "\n")
            f.flush()
            os.fsync(f.fileno())  # on the disk before the checkpoint that comes after it


# -------------------------------------------------------------------------------------- the preview

def write_preview(path: Path, rows: list[list[np.ndarray]], height: int = 160):
    """Write rows of pictures (image | what went in | what came out | truth) as one PNG.

    Each picture is (H, W, 3) uint8, or a label map (H, W), drawn in its classes' colours; all are
    shown `height` pixels high.
    """
    strips = []
    for row in rows:
        strips.append(np.concatenate([thumbnail(picture, height) for picture in row], 1))
    width = max(strip.shape[1] for strip in strips)
    for n, strip in enumerate(strips):
        margin = ((0, 0), (0, width - strip.shape[1]), (0, 0))
        strips[n] = np.pad(strip, margin, constant_values=255)
    sheet = Image.fromarray(np.concatenate(strips))
    write_whole(path, lambda f: sheet.save(f, "PNG"))


def thumbnail(picture, height):
    """A picture or label map at that height, with a white rim: (height + 4, w, 3) uint8."""
    if picture.ndim == 2:
        picture = colour_map()[picture]                                 # (H, W, 3)
    H, W = picture.shape[:2]
    scale = min(height / H, 4 * height / W)  # a strip of 1 x 5000 would fill the memory else
    h = max(1, round(H * scale))
    w = max(1, round(W * scale))
    # nearest: two classes' colours must not blend into that of a third
    small = np.asarray(Image.fromarray(picture).resize((w, h), Image.NEAREST))
    return np.pad(small, ((2, 2 + height - h), (2, 2), (0, 0)), constant_values=255)


def truth_pictures(data, image_id: str) -> list[np.ndarray]:
    """[the image's true mask], [] where there is none: only looked at, never used."""
    path = data.truth_path(image_id)
    if path is None:
        return []
    return [read_label(path, len(data.classes))]


def note_if_blank(folder: Path, masks: list[np.ndarray]):
    """Say so where the masks of the preview (H, W) show nothing but background, every one."""
    if not any(np.isin(mask, (0, IGNORE), invert=True).any() for mask in masks):
        note(f"{folder}: none of the {len(masks)} masks in preview.png has a class; more --iters, "
             "another --lr or better weights to start from may help")


def preview_ids(ids: list[str], n: int = 8) -> list[str]:
    """n ids (all, if there are fewer) spread over the list."""
    return ids[::max(1, len(ids) // n)][:n]


# -------------------------------------------------------------------- the options that stages share

def load_clip(name: str, seed: int, machine) -> tuple[clip.CLIP, str]:
    """`--clip` -> (CLIP on the CPU, what tells it from another: its file's sha256).

    Raises ValueError for a model that is not there or whose patches are not 16 pixels wide.
    """
    if name == "random":
        if machine.main:
            print("--clip random: an untrained ViT-B/16, for tests and timings: it knows nothing")
        torch.manual_seed(seed)
        return clip.CLIP(), f"random, seed {seed}"
    # The first process downloads, the others wait and then find the file.
    if not machine.main:
        machine.wait()
    path = clip.locate(name)
    if machine.main:
        machine.wait()
    with unchanged(path) as digest:
        model = clip.load(path)
    patch = model.visual.conv1.kernel_size
    if patch != (16, 16):
        raise ValueError(f"--clip {name}: patch size {patch[0]}; "
                         "the pyramid adapter is made for 16")
    return model, digest


def common_options(description: str, iters, lr, batch_size, crop: int):
    """The parser with the options that all stages have, and its group "method".

    iters, lr, batch_size, crop: defaults. A text instead of a number is what --help shows for a
    default that depends on the data: it is None here, and filled in later.
    """
    shown = {"iters": iters, "lr": lr, "batch_size": batch_size}
    parser = Parser(description=description)
    file_options(parser)
    method = parser.add_argument_group("method (changes results; defaults are the recipe)")
    method.add_argument("--iters", type=int, metavar="N",
                        help="iterations (optimizer steps); the rate falls to its end over all of "
                             f"them, so a run cannot be lengthened later [{shown['iters']}]")
    method.add_argument("--batch-size", type=int, metavar="N",
                        help="images an iteration, on all devices together; fewer need less memory "
                             f"and make noisier steps [{shown['batch_size']}]")
    method.add_argument("--accumulate", type=int, default=1, metavar="N",
                        help="show a batch in N equal parts, one after the other, and step once: "
                             "nearly the memory of a batch N times smaller, somewhat slower. "
                             "BatchNorm sees a part, not the batch [%(default)s]")
    method.add_argument("--crop", type=int, default=crop, metavar="PIXELS",
                        help="side of the training crop, a multiple of 32; memory and time grow "
                             "with its square; in stages 1 and 2 test sizes scale with it "
                             "[%(default)s]")
    method.add_argument("--lr", type=float,
                        help="base learning rate; too small hardly learns, too large ends in a "
                             f"loss of NaN [{shown['lr']}]")
    method.add_argument("--seed", type=int, default=0,
                        help="random seed (not the seeds that stage 1 writes): what first weights, "
                             "order, augmentation and dropout are drawn from; another one is "
                             "another run of the same experiment [%(default)s]")
    method.add_argument("--limit", type=int, metavar="N",
                        help="use only the first N images of every list, for a quick try [all]")
    method.add_argument("--split", metavar="LIST",
                        help="training list [trainaug if there is one, else train]")
    for name, value in shown.items():
        parser.set_defaults(**{name: None if isinstance(value, str) else value})
    machine_options(parser)
    return parser, method


def next_command(script: str, data, args, *names: str) -> str:
    """The next stage's command, with those of the options `names` that the user has changed."""
    usual = {"runs": Path("runs"), "split": data.training_split(), "clip": "ViT-B/16"}
    words = ["python", script, "--data", args.data]
    for name in names:
        if getattr(args, name) not in (None, usual.get(name)):
            words += [f"--{name}", str(getattr(args, name))]
    return shlex.join(words)


def file_options(parser):
    """Add the options that say where things are."""
    files = parser.add_argument_group("files")
    files.add_argument("--data", required=True, metavar="NAME|DIR",
                       help="dataset folder in VOC's layout (README, Data)")
    files.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR",
                       help="gets a folder per dataset, with one per stage in it [%(default)s]")
    files.add_argument("--overwrite", action="store_true",
                       help="delete this stage's folder and start afresh; else the run goes on "
                            "where it stopped")


def machine_options(parser):
    """Add the options that change speed, not results."""
    machine = parser.add_argument_group("machine (changes speed, not results beyond rounding)")
    machine.add_argument("--device", default="auto",
                         help="cpu, cuda, cuda:1, mps, or auto: the best there is [%(default)s]")
    machine.add_argument("--amp", action="store_true",
                         help="forward and backward in bfloat16, where the device has it: less "
                              "memory, coarser rounding; losses stay in float32")
    machine.add_argument("--workers", type=int, metavar="N",
                         help="processes that load images, the same ones however many; each takes "
                              "a core, makes some 34 crops a second, and memory [0 on a CPU, else "
                              "8, or a core less than there are]")
    machine.add_argument("--deterministic", action="store_true",
                         help="on a GPU: only operations that add in a fixed order, so that a run "
                              "repeated on the same GPU is equal bit for bit; slower. A CPU needs "
                              "no such option")


def backbone_options(method, arch: str):
    """Add the options of stages 1 and 3, whose networks are ResNets."""
    method.add_argument("--arch", choices=ARCHITECTURES, default=arch,
                        help="the backbone; a deeper one is slower and mostly better [%(default)s]")
    method.add_argument("--weights", default="imagenet", metavar="imagenet|none|FILE",
                        help="what it starts from: ImageNet's weights (downloaded), nothing, or a "
                             "ResNet's file [%(default)s]")


# smallest value that makes sense
SMALLEST = {"iters": 1, "batch_size": 1, "accumulate": 1, "crop": 64, "limit": 1, "seed": 0,
            "workers": 0, "lr": 1e-12}
# largest; torch's seed has 64 bits, of which the iteration takes one half
LARGEST = {"iters": MOST_ITERATIONS, "crop": LARGEST_CROP, "seed": 2 ** 31 - 1}


def open_run(args):
    """What every stage starts with: dataset and machine; options left open are filled in.

    Raises ValueError for a number that makes no sense, before any work is done.
    """
    for name, smallest in SMALLEST.items():
        value = getattr(args, name)
        option = name.replace("_", "-")
        if value is not None and not smallest <= value < math.inf:  # so NaN is refused too
            raise ValueError(f"--{option} {value}: at least {smallest} is expected")
        if value is not None and value > LARGEST.get(name, math.inf):
            raise ValueError(f"--{option} {value}: at most {LARGEST[name]} is expected")
    if args.crop is not None and args.crop % 32:  # the coarsest stride of any network here
        raise ValueError(f"--crop {args.crop}: a multiple of 32 is expected")
    data = find_dataset(args.data)
    args.split = args.split or data.training_split()
    note_leaks(data, args.split)
    if args.deterministic:
        # read by cuBLAS when it is first used: work space of its own for each stream
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    machine = Machine(args.device, args.amp)
    if args.batch_size is not None and args.batch_size % (machine.world * args.accumulate):
        raise ValueError(f"--batch-size {args.batch_size}: must divide among {machine.world} "
                         f"processes and --accumulate {args.accumulate} parts in each")
    if args.workers is None:
        args.workers = 0
        if machine.device.type != "cpu":
            # 16 crops in 60 ms, what stage 2 is to take on an H100, are 267 a second: 8 times a
            # core's 34. One core is left to the process that drives the device.
            args.workers = min(8, max(1, (os.cpu_count() or 1) - 1))
    return data, machine


# ======================================================================= stage 1's own command line

# what --method clip has no use for
TRAINING_OPTIONS = ("iters", "batch_size", "crop", "lr", "arch", "weights")


def parse_args(argv=None):
    """The options of stage 1."""
    parser, method = common_options(
        __doc__.splitlines()[0], iters="5 epochs; VOC's 10,582 images: 3,305",
        lr="0.1; with --weights none 0.01", batch_size=16, crop=512)
    backbone_options(method, "resnet50")
    method.add_argument("--method", choices=("classifier", "clip"), default="classifier",
                        help="classifier: train one on image labels and take its CAMs; clip: ask "
                             "CLIP (CLIP-ES); nothing is trained, so --iters, --batch-size, "
                             "--accumulate, --crop, --lr, --arch and --weights are not read "
                             "[%(default)s]")
    method.add_argument("--clip", default="ViT-B/16", metavar="NAME|PATH|random",
                        help="with --method clip: OpenAI's (downloaded) or a file, best the one "
                             "that stage 2 gets; random: untrained, for timings [%(default)s]")
    return parser.parse_args(argv)


def main():
    """Labels in, seeds out: check, train or ask CLIP, write, and say what comes next."""
    args = parse_args()
    if args.method == "clip":
        for name in TRAINING_OPTIONS:  # not read, so they shall not tell one run from another
            setattr(args, name, None)
        args.accumulate = 1
    data, machine = open_run(args)
    ids = data.ids(args.split, args.limit)
    labels = data.image_labels(ids)  # {id: class numbers from 1}
    if machine.main:
        check_inputs(data, ids, image_labels=labels)

    folder = args.runs / data.name / "1_cam"
    digests = data.digests(args.split, labels=json.dumps(labels))
    if args.method == "clip":
        clip_model, digests["clip"] = load_clip(args.clip, args.seed, machine)
        digests["texts"] = json.dumps(class_texts(data))
    else:
        args.clip = None
        args.lr = args.lr or (0.01 if args.weights == "none" else 0.1)
        args.iters = args.iters or 5 * max(1, len(ids) // args.batch_size)  # 5 epochs
        digests["weights"] = weights_digest(args.weights)
    with work_on(folder, args, machine):
        start_run(folder, args, machine, digests)
        if is_finished(folder, seed_files(folder, ids)):
            print(f"{folder}: finished; --overwrite starts afresh")
            return
        if machine.main:
            mark_unfinished(folder)
        machine.wait()
        if args.method == "clip":
            facts = seeds_from_clip(clip_model, data, ids, labels, machine, folder)
        else:
            facts = seeds_from_classifier(data, ids, labels, args, machine, folder)
        if machine.main:
            set_provenance(folder, facts)
            preview(data, ids, folder)
            mark_finished(folder)
            next_one = next_command("stage2_weakclip.py", data, args,
                                    "runs", "split", "limit", "clip")
            print(f"{folder}: {len(ids)} seeds. Next: {next_one}")


if __name__ == "__main__":
    run(main)
