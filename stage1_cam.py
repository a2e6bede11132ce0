"""Stage 1: image-level labels -> class activation maps (CAM) -> seeds.

run     python stage1_cam.py --data VOC2012                         # a classifier's CAMs
        python stage1_cam.py --data VOC2012 --method clip           # CLIP's, nothing is trained
        torchrun --nproc_per_node 2 stage1_cam.py --data VOC2012    # any of the stages, on two GPUs
reads   VOC2012/JPEGImages/<id>.jpg, VOC2012/image_labels.txt or else VOC2012/Annotations/<id>.xml
writes  runs/VOC2012/1_cam/{cams/<id>.npz, seeds/<id>.png, args.json} and, where a classifier is
        trained, log.jsonl and checkpoint.pt beside them
cost    not measured on all of VOC; --method clip with ViT-B/16 takes 3.6 s of one CPU core for a
        photo of 500 x 375, half of it the CRF, and 1.8 GiB

A classifier is trained on nothing but sentences such as "this photo shows a dog and a person". Its
last layer, applied at every place of the photo instead of to the mean over all places, tells where
it saw the dog. That is the class activation map, CAM (Zhou et al., CVPR 2016). A threshold turns it
into a seed: a label map, coarse and partly wrong, from which stage 2 makes a mask. (Only the option
`--seed` is something else, the number that all chance is drawn from.) The recipe is IRN's (Ahn et
al., CVPR 2019). With --method clip no classifier is trained. CLIP, on which stage 2 builds anyway,
is asked where it sees the dog (CLIP-ES, Lin et al., CVPR 2023).

Sections I and II are these two methods, and they are this stage. Section III, the dense CRF, has
its first user in section II; stage 2 needs it in a loss and for its masks, stage 3 for its masks.
Then comes what every training run needs, whatever it trains, and at the end the command line.
From `clip`, ours and not OpenAI's package, come CLIP and the reading of weight files; from `eval`,
our eval.py, come the dataset folder, label PNGs and the record of a run.
Lines marked # GUESS are choices for which no source was found; (47) and the like are rows of
AUDIT.md, (E1) to (E24) those of its part 5.

Shapes: B images of a batch, K classes with background first, J of them (never background) present
in one photo, H W pixels, h w a coarser grid: a network's at stride 16, or the CAMs' at stride 4;
C channels, L tokens, D numbers of a CLIP feature, "words" the number of background words.
"""
import contextlib
import datetime
import functools
import io
import itertools
import json
import math
import os
import re
import shlex
import sys
from dataclasses import dataclass
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
from eval import (IGNORE, MAIN, Parser, check_inputs, find_dataset, is_finished, note, note_leaks,
                  note_unteachable, run, start_run, update_record, write_label, write_whole)

# Means and standard deviations of R G B in the photos that a network was trained on, in grey levels
# 0..255. CLIP's are 255 times the numbers of its code, 0.48145466, ... and 0.26862954, ...
IMAGENET_COLOURS = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
CLIP_COLOURS = (122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305)
# Sizes at which a photo is looked at, relative to the one that `class_maps` brings it to.
CAM_SCALES = (1, 0.5, 1.5, 2)
CAM_THRESHOLD = 0.15  # background's score, IRN's; a class must exceed it


# ================================================================== I. image labels -> CAM -> seeds

class Classifier(nn.Module):
    """Class scores (B, K-1) of a batch of images, and, from the same weights, the CAM: `maps`.

    Background is no class of an image and has no score here; n_classes is K - 1.
    A ResNet gives features x[u] (C,) at every place u of a grid; with w[k] (C,) for class k,

        score[k] = < w[k], mean_u x[u] > = mean_u < w[k], x[u] > = mean_u map[k, u]

    The usual classifier is the left side: first the mean over places, then a linear layer. Both are
    linear, so their order can be changed, and the right side is the same number. With two places,
    x = (2, 0) and (0, 4), and w = (1, 3): the mean feature is (1, 2) and the score 1 + 6 = 7; the
    map is 2 at the first place and 12 at the second, whose mean is 7. So 12/14 of what spoke for
    the class was seen at the second place, and no further training is needed to know that.
    There is no bias: it would raise a score without being anywhere in the photo.
    AUDIT.md: (47), (48).
    """

    def __init__(self, arch, weights, n_classes):
        super().__init__()
        # layer4 keeps its resolution (output stride 16, not 32), so the maps are twice as fine
        self.backbone, channels = resnet(arch, weights, layer4=1)
        self.classifier = nn.Conv2d(channels, n_classes, 1, bias=False)
        self.pretrained = weights != "none"
        if self.pretrained:
            # As in IRN everything up to layer2 stays as ImageNet left it: edges and textures are
            # the same here, and only what they add up to must be learned.
            self.backbone[:6].requires_grad_(False)

    def maps(self, image):
        """The CAM before any scaling: evidence for each class at each place, (B, K-1, h, w).

        image (B, 3, H, W), normalised; h = H/16, w = W/16, rounded up. Class k of the dataset is
        channel k-1.
        """
        x = self.backbone(conv_layout(image))  # (B, C, h, w)
        return self.classifier(x)              # (B, K-1, h, w), a linear layer at every place

    def forward(self, image):
        """Class scores (B, K-1), raw: the mean of the maps over places, for training."""
        return self.maps(image).mean((2, 3))


@torch.no_grad()
def class_maps(model, image, present, crop, machine):
    """CAMs of one photo (J, ceil(H/4), ceil(W/4)), float32 in [0, 1].

    image (H, W, 3) uint8; present: the J class numbers, from 1, that the image's labels name; crop:
    side of the training crop in pixels.

    Only the image's own classes get a map. The label says that the others are absent, so whatever
    their maps showed would be wrong.
    AUDIT.md: (53).
    """
    H, W = image.shape[:2]
    # At scale 1 a photo has a size that training has shown; the other scales, IRN's, go beyond.
    # GUESS the long side ends between training's mean, 0.9375 crop, and its largest, 1.25 crop: 480
    # to 640 pixels at crop 512, so that nearly all of VOC's photos (500 pixels) stay as they are.
    long_side = min(max(H, W, 0.9375 * crop), 1.25 * crop)
    factor = long_side / max(H, W)
    total = 0
    # A large view shows the network details, a small one the whole object, a mirrored one the same
    # thing elsewhere on its grid. What is seen in all of them is less likely to be an accident.
    for scale in CAM_SCALES:
        x = scaled(image, scale * factor, 32)                                 # (3, H', W')
        pair = torch.stack([x, x.flip(2)]).to(machine.device)                 # (2, 3, H', W')
        with machine.autocast:
            # What speaks against a class in one view must not cancel what speaks for it in another:
            # negative evidence is cut off first, then the views are added.
            plain, mirrored = model.maps(pair).relu().float()                 # each (K-1, h, w)
        evidence = plain + mirrored.flip(2)                                   # (K-1, h, w)
        total += resize(evidence[None], cam_grid(H, W))[0]                    # (K-1, H/4, W/4)
    cams = total[[k - 1 for k in present]]                                    # (J, H/4, W/4)
    # Evidence has no unit, and a map that reaches 30 is not surer than one that reaches 10. After
    # division by its maximum each map says "1: here, if anywhere", so one threshold serves them
    # all. A map without any evidence stays 0 and is not divided by 0.
    return cams / cams.amax((1, 2), keepdim=True).clamp(min=1e-5)


def resize(x, size, align_corners=False):
    """x (B, C, H, W) at another size (h, w), bilinear; x itself where it has that size."""
    if x.shape[2:] == size:
        return x  # torch would compute a copy, and its gradient
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def cam_grid(H, W):
    """Size at which CAMs are stored, a quarter of the photo's, as IRN's.

    Views of all scales meet there, and a file is a sixteenth of what the full size would need.
    """
    return math.ceil(H / 4), math.ceil(W / 4)


def cam_scores(cams, size):
    """A score of every pixel for background and each CAM's class (1 + J, H, W), float32 in [0, 1].

    cams (J, h, w) in [0, 1], a tensor on the CPU; size (H, W) of the photo. J may be 0.

    Background's score is the same everywhere. It cannot be learned: no label ever names background,
    and since all photos have some, there is none without it to compare with. So the constant is a
    threshold that a class must exceed. If it is raised, seeds shrink to the places that are surest;
    if it is lowered, they spill over the objects' rims.
    AUDIT.md: (54).
    """
    cams = resize(cams.float()[:, None], size)[:, 0]                          # (J, H, W)
    return torch.cat([torch.full((1, *size), CAM_THRESHOLD), cams])           # (1 + J, H, W)


def label_map(scores, present, least):
    """A label map (H, W) uint8: at each pixel the class with the largest score, 0 for background.

    scores (1 + J, H, W) of background and the J classes `present`, numbers from 1. A pixel whose
    largest score is below `least` is 255, unsure.
    """
    best, index = scores.cpu().max(0)                                         # (H, W), in 0..J
    labels = torch.tensor([0, *present])[index]
    return labels.where(best >= least, IGNORE).byte().numpy()


def write_seeds(make, data, labels, machine, folder):
    """Write cams/<id>.npz and seeds/<id>.png for every id that has no seed yet.

    make(image, present) -> (arrays, label map), of either method; labels: {id: class numbers from
    1}, which the .npz has as "keys" (J,) uint8, one for each CAM. Each process of torchrun does its
    own share of the ids. A file appears whole or not at all, the seed as the second of the two. So
    a photo with a seed is done, and a run that was cut off goes on with the next.
    """
    share = machine.share(list(labels.items()))
    for image_id, present in tqdm(share, desc="CAMs", disable=not MAIN):
        seed_path = folder / f"seeds/{image_id}.png"
        if seed_path.is_file():
            continue
        arrays, seed = make(data.image(image_id), present)
        check_output(image_id, arrays["cam"])
        arrays["keys"] = np.uint8(present)
        cam_path = folder / f"cams/{image_id}.npz"
        write_whole(cam_path, lambda file: np.savez_compressed(file, **arrays))
        write_label(seed_path, seed)
    machine.wait()


# ------------------------------------------------------------------------------------- the backbone

def resnet(arch, weights, **dilations):
    """A torchvision ResNet up to layer4, an nn.Sequential, and how many channels come out of it.

    weights: "imagenet" (torchvision's, downloaded once, its hash checked), "none", or the path of a
    file with a state dict. dilations: layer4=d takes the stride of 2 out of that layer and dilates
    its 3x3 convolutions by d. Raises ValueError for a file that does not fit.

    A ResNet made for classification ends at 1/32 of the image's size, too coarse for a map. Without
    a stride the grid stays fine, but then a 3x3 filter sees half as far on the photo. Dilated by 2
    (by 4 after two such layers) it has its old reach again:

        behind a stride of 2   . x . x . x .   what a filter's three cells read of the finer grid
        stride 1               . . x x x . .   half the reach
        stride 1, d = 2        . x . x . x .   the old reach, and twice as many outputs

    Stage 3 does so; stage 1 does without (d = 1), as IRN. It is done by hand, since torchvision
    refuses dilation in ResNet-18's blocks. It would also leave the 3x3 that had the stride
    undilated; here that one sees twice as far.

    The BatchNorm of weights that are given is in eval mode, so that its statistics stay: a batch of
    16 crops is a poor estimate of what 1.3 million images have measured. A network that starts from
    nothing has none yet, and BatchNorm learns them with the rest. Networks are made in training
    mode, so no loop calls train(), which would undo this.
    """
    net = getattr(torchvision.models, arch)()
    if weights == "imagenet":
        # The first of torchvision's two sets, as in IRN, in torch's own cache (TORCH_HOME). A name
        # such as resnet50-0676ba61.pth ends in 8 digits, with which the file's sha256 begins.
        url = torchvision.models.get_model_weights(arch).IMAGENET1K_V1.url
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        weights = clip.fetch(url, url[-12:-4], cache, "--weights FILE, or none")
    if weights != "none":
        try:
            # fc names ImageNet's classes and is never used: the file's is ignored, or absent.
            load_trained(net, clip.read_file(weights, "file of weights"), ("fc.",))
        except ValueError as error:
            raise ValueError(f"--weights {weights}: no {arch}'s ({error})") from None
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    for name, dilation in dilations.items():
        for module in net.get_submodule(name).modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
                if module.kernel_size == (3, 3):
                    module.dilation = module.padding = (dilation, dilation)
    # conv1, bn1, relu, maxpool, and layer1 to layer4; the mean over places and the linear layer are
    # left out. After maxpool and after layer1 the grid is H/4 x W/4, after layer2 H/8 x W/8.
    return nn.Sequential(*list(net.children())[:-2]), net.fc.in_features


def conv_layout(x):
    """x (B, C, H, W) in the memory layout that the convolutions behind it are quickest in.

    In bfloat16 (--amp) they work on channels-last memory, and copy what comes in another layout
    layer by layer. In float32 channels-last is no faster, and gradients had rounding errors 2 to 4
    times as large.
    """
    bf16 = torch.is_autocast_enabled(x.device.type)
    return x.contiguous(memory_format=torch.channels_last if bf16 else torch.contiguous_format)


def weights_digest(arch, weights):
    """What tells one `--weights` from another: the name, or a file's sha256, wherever it lies.

    Raises ValueError for a file, or a download, that does not fit: before any work is begun.
    """
    resnet(arch, weights)
    return weights if weights in ("imagenet", "none") else clip.file_sha256(weights)


# ---------------------------------------------------------------------------- the classifier's data

def labelled_image(data, labels, crop, image_id, rng):
    """One sample: image (3, crop, crop) float32, normalised; target (K-1,) of 0 and 1.

    The image is resized to a long side of U(0.625, 1.25) crop (at crop 512: 320 to 640 pixels),
    mirrored with probability 0.5, and cut or padded to the crop. labels: {id: class numbers from
    1}; rng: numpy's generator, of this sample alone (see `Samples`).
    AUDIT.md: (52).
    """
    image = data.image(image_id)
    factor = rng.uniform(0.625, 1.25) * crop / max(image.shape[:2])
    x = scaled(image, factor, 1)                                        # (3, H, W)
    if rng.random() < 0.5:
        x = x.flip(2)                                                   # mirrored
    corner = random_window(rng, x.shape[1:], crop)
    # A crop may have lost a labelled object. The target does not know that, so now and then the
    # loss asks for what is not to be seen. Padding is 0, the mean colour, which says nothing.
    target = torch.zeros(len(data.classes))                             # (K,)
    target[labels[image_id]] = 1
    return crop_or_pad(x, crop, 0, *corner), target[1:]


def scaled(image, factor, least):
    """Photo (H, W, 3) uint8 -> (3, H', W') float32, normalised, at `factor` times its size.

    Both sides have `least` pixels at least. Bicubic, as in IRN.
    """
    image = Image.fromarray(image)
    size = [max(least, round(side * factor)) for side in image.size]    # Pillow: width, height
    return normalise(image.resize(size, Image.BICUBIC), IMAGENET_COLOURS)


def normalise(image, colours):
    """(3, H, W) float32, (x - mean) / std per channel, of a photo (H, W, 3) uint8, array or PIL's.

    colours: mean and std (3,) in grey levels. The values then lie around 0 with a spread of about
    1, as in the training of whatever network they are meant for.
    """
    # np.array copies: torch takes neither PIL's images nor mirrored arrays (negative strides).
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()      # (3, H, W)
    return torchvision.transforms.functional.normalize(x, *colours, inplace=True)


def crop_or_pad(x, size, fill, top=0, left=0):
    """The window (..., size, size) of x (..., H, W) from (top, left); `fill` outside the image.

    top, left may be negative: the image then starts inside the window. The window and the image
    must overlap.
    AUDIT.md: (77).
    """
    H, W = x.shape[-2:]
    # What F.pad adds on the left and right, above and below. A negative number takes away: a window
    # from column 3 has left = 3, so -3 are added and the first three columns are gone.
    return F.pad(x, (-left, left + size - W, -top, top + size - H), value=fill)


def random_window(rng, sides, size):
    """Corner (top, left) of a window of `size` in an image with `sides` (H, W), any equally likely.

    Where a side is shorter than the window, the window lies around it: the start is negative, and
    the padding falls on either side. A side of 5 and a window of 3 give 0, 1 or 2; a side of 3 and
    a window of 5 give -2, -1 or 0.
    """
    corner = []
    for side in sides:
        spare = side - size
        start = rng.integers(min(0, spare), max(0, spare) + 1)
        corner.append(int(start))
    return corner


# ------------------------------------------------------------------------ the classifier's training
# A photo may show several classes, so each class is a question of its own, answered yes or no.
# With y the target, 0 or 1, and s the raw score, the loss is the mean over images and classes of
#
#     - y log sigmoid(s) - (1 - y) log sigmoid(-s)
#
# At s = 0, before anything is learned, it is log 2 = 0.69. If photos show 1.5 of 20 classes in the
# mean, a network that gives every class the probability 0.075, whatever the photo, reaches 0.27.
# Knowing which classes are frequent gains a little more; what is well below needs the photo.

def sgd(model, lr, momentum, weight_decay):
    """SGD in two groups: the new layer learns ten times as fast. Stage 3 has it too.

    The backbone starts from features that are good already, and large steps would spoil them; the
    classifier starts from noise. A fixed layer gets no gradient, and SGD passes over it. Each group
    keeps its rate at the start as "base_lr", from which `poly` reckons that of every iteration.
    AUDIT.md: (51).
    """
    groups = [{"params": model.backbone.parameters(), "base_lr": lr},
              {"params": model.classifier.parameters(), "base_lr": 10 * lr}]
    return torch.optim.SGD(groups, momentum=momentum, weight_decay=weight_decay)


def poly(optimizer, step, iters):
    """Set an iteration's learning rates, polynomial decay: base_lr * (1 - step / iters) ** 0.9.

    Nearly a straight line from base_lr down to 0: 0.77 of it after a quarter of the iterations,
    0.54 after half of them, 0.13 after nine tenths. Stage 3 has it too.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * (1 - step / iters) ** 0.9


def train(model, data, labels, args, machine, folder):
    """Train the classifier on {id: class numbers from 1}, from its last checkpoint if there is one.

    In this order: batch, rate; for each part of the batch forward, loss, backward; then step, log,
    save. The loops of stages 2 and 3 are the same, with other losses; stage 2's network has
    dropout, which is drawn anew each iteration. In several processes the log has the losses of the
    first one's share.
    AUDIT.md: (49).
    """
    make = functools.partial(labelled_image, data, labels, args.crop)
    # IRN's momentum is 1e-4, as good as none: its code hands SGD the weight decay in momentum's
    # place. Ours is 0 with ImageNet weights. From nothing, where IRN has no recipe, it is the
    # usual 0.9.
    momentum = 0 if model.pretrained else 0.9
    optimizer = sgd(model, args.lr, momentum, weight_decay=1e-4)
    # What a checkpoint must say of itself before this run goes on from it.
    facts = {"stage": "1_cam", "classes": list(data.classes)}
    start = resume(folder, model, optimizer, facts)
    bar = batches(list(labels), make, args, start, machine)
    for step, parts in bar:
        poly(optimizer, step, args.iters)
        optimizer.zero_grad()
        total = 0
        # With --accumulate the batch comes in parts, so that the activations of one part only are
        # in memory. `backward` adds each part's gradients to those of the parts before it.
        for image, target in parts:
            with machine.autocast:
                score = model(image)                                    # (B, K-1)
            # The loss is reckoned in float32, also where the network was in bfloat16 (2 digits). It
            # is divided here, so that the parts' sum is the mean over the batch.
            loss = F.multilabel_soft_margin_loss(score.float(), target) / args.accumulate
            loss.backward()
            total += loss.detach()
        machine.average_gradients(model)
        optimizer.step()
        # A line of the log every 10 iterations, the checkpoint every 500 and after the last.
        log(folder, bar, step, optimizer, {"loss_multilabel": total})
        save(folder, model, optimizer, step + 1, args.iters, facts)
    machine.share_buffers(model)


def seeds_from_classifier(data, labels, args, machine, folder):
    """Train a classifier and write its seeds. Returns their provenance, which every score carries.

    That is: how long it was trained, the scales and mirrored views that its maps were summed over,
    that no CRF came after, and that the image's labels said which classes may appear.
    """
    torch.manual_seed(args.seed)  # of the new layers' first weights
    model = machine.place(Classifier(args.arch, args.weights, len(data.classes) - 1))
    train(model, data, labels, args, machine, folder)
    model.eval()

    def make(image, present):
        # Rounded before the seed is taken, so that whoever reads the file can make the same of it.
        cams = class_maps(model, image, present, args.crop, machine).half().cpu()
        scores = cam_scores(cams, image.shape[:2])                            # (1 + J, H, W)
        # Every pixel gets a class. 255, unsure, is for the seeds of other methods.
        return {"cam": cams}, label_map(scores, present, least=0)

    write_seeds(make, data, labels, machine, folder)
    return dict(iters=args.iters, scales=CAM_SCALES, flip=True, crf=False, label_filter=True)


# ======================== II. seeds from CLIP alone: --method clip (CLIP-ES, Lin et al., CVPR 2023)
# Nothing is trained. CLIP has seen which words go with which pictures. Asked for a class that is in
# the photo, its own gradients tell which places spoke for it (Grad-CAM), and its own attention
# tells which places belong together (affinity). A dense CRF draws the borders, and what stays
# doubtful is left "unsure":
#
#     photo, its classes -> grad_cam -> box_mask, affinity -> crf_of_scores -> label_map
#                           where a      spread to what       along the       255 where no class
#                           class is     belongs to it        colours         is sure
#
# (E1) to (E24) are findings about CLIP-ES's code, AUDIT.md part 5. Where that code parts from its
# paper, ours does what the published numbers were made with. Of stage 2's marks, # PAPER and
# # RELEASED, none is used here: (E) numbers cite CLIP-ES, # GUESS marks what is our own choice.
# J is the number of classes in the photo, h x w the grid of its patches, N = h * w.

TEMPLATE = "a clean origami {}."  # the template with the sharpest response; one, no ensemble (E1)
# What else a photo may show. Without such words a photo's only class would get all of the softmax,
# whatever the photo looks like, and its probability would have no gradient.
BACKGROUND_WORDS = """ground land grass tree building wall sky lake water river sea railway railroad
    keyboard helmet cloud house mountain ocean road rock street valley bridge sign""".split()
# Synonyms: the words by which CLIP knows a class better than by the dataset's name for it. They are
# VOC's and COCO's, and serve other datasets that have such a class. COCO's have oddities that went
# into the published numbers, "sknowboard" among them (E2).
SYNONYMS = dict(re.findall(r"(\w[\w ]*): ([^;]+)", """
    person: person with clothes,people,human; bird: bird avian; chair: chair seat;
    tvmonitor: tvmonitor screen; tv: tvmonitor screen; motorcycle: motorbike; airplane: aeroplane;
    backpack: backpack,bag; umbrella: umbrella,parasol; handbag: handbag,purse; tie: necktie;
    snowboard: sknowboard; baseball glove: glove; spoon: dessertspoon; couch: sofa;
    remote: remote control; potted plant: pottedplant; dining table: diningtable;
    hair drier: hairdrier,blowdrier"""))
# The affinity works inside boxes around the places above this share of a map's maximum.
BOX_THRESHOLD = {"VOC2012": 0.4, "COCO2014": 0.7}  # by dataset; VOC's for any other
CLIP_CRF = (1, 3), (67, 3, 4)  # Gaussian (sxy, weight), bilateral (sxy, srgb, weight)
CONFIDENCE = 0.95  # a pixel whose best class the CRF believes less than this is unsure (E17)
CLIP_SIDE = 1024  # GUESS the long side that CLIP sees at most: attention grows with its 4th power


def class_texts(data):
    """(what CLIP reads for each class but background, in their order; the background words).

    A name has the synonyms that its classes.txt gives, else CLIP-ES's. A name without any is read
    as its words: "ground_track_field" as "ground track field".

    A background word that a class's name or text holds is left out, since it would take from that
    class what is its own. Of COCO's, these are "keyboard" and "sign" (E2). Words are compared in
    lower case, and a plural is its singular: "Ground-Track", "groundTrack" and "GROUND" leave out
    "ground", "trees" leaves out "tree", "skies" leaves out "sky".
    """
    spaced = {name: re.sub("_|(?<=[a-z])(?=[A-Z])", " ", name) for name in data.classes}
    texts = spaced | SYNONYMS | data.texts
    foreground = [texts[name] for name in data.classes[1:]]
    names = " ".join([*spaced.values(), *foreground]).lower()
    used = set(re.findall(r"[^\W\d_]+", names))
    background = []
    for word in BACKGROUND_WORDS:
        forms = word, word + "s", word + "es", word[:-1] + "ies"
        if used.isdisjoint(forms):
            background.append(word)
    return foreground, background


def clip_input(image):
    """Photo (H, W, 3) uint8 -> (1, 3, 16h, 16w) float32, normalised for CLIP.

    Not padded, not cropped: a long side over CLIP_SIDE is reduced to it, then both sides are
    stretched to the next multiple of 16 (E3). A photo of 375 x 500 pixels becomes 384 x 512, a grid
    of 24 x 32 patches.
    """
    image = Image.fromarray(image)
    shrink = min(1, CLIP_SIDE / max(image.size))
    size = [16 * math.ceil(round(side * shrink, 6) / 16) for side in image.size]
    return normalise(image.resize(size, Image.BICUBIC), CLIP_COLOURS)[None]


def open_block(block, x, a):
    """One transformer block with its attention in sight: (tokens after it, attention).

        attention = softmax(q k' / sqrt(C / heads)),   x + attention v,   then x + MLP(x)

    x: the tokens before it (B, L, C), which go past the attention; a = block.ln_1(x) is what the
    attention reads. The attention is the mean over the heads, (B, L, L), rows sum to one: row i
    says how much token i takes from each token. CLIP's own block computes the same without ever
    having this matrix in memory as a whole.
    """
    q, k, v = block.attn.split(a)                                         # (B, heads, L, C / heads)
    fit = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])                   # (B, heads, L, L)
    attention = fit.softmax(3)                                            # rows sum to one
    seen = (attention @ v).transpose(1, 2).flatten(2)                     # (B, L, C)
    x = x + block.attn.out_proj(seen)
    x = x + block.mlp(block.ln_2(x))                                      # (B, L, C)
    return x, attention.mean(1)


def patch_tokens(visual, image, positions):
    """(tokens that enter the last block (1, 1 + N, C), the attention of each block before it).

    The attentions: a list of (1, 1 + N, 1 + N). CLIP-ES's code runs the last block twice for a
    sequence of 77 tokens, the length of a text, which a photo of 76 patches has too; ours makes no
    such exception (E18).
    """
    x, attentions = visual.embed(image, positions), []
    for block in visual.transformer.resblocks[:-1]:
        x, attention = open_block(block, x, block.ln_1(x))
        attentions.append(attention.float())
    return x.float(), attentions


def min_max(maps):
    """Maps (J, h, w), each stretched: (x - min x) / (1e-7 + max(x - min x)), 0 to at most 1."""
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (1e-7 + maps.amax((1, 2), keepdim=True))


def grad_cam(visual, x, texts, J, scale):
    """Which patches raise the probability of each class: Grad-CAM at ln_1 of the last block.

        cam_k = ReLU(sum_c w_kc a_c),   w_kc = mean over patches of  d p_k / d a_c

    Returns p (J + words,), w (J, C), the sum before ReLU (J, N), and the last block's attention
    (1, 1 + N, 1 + N).
    x (1, 1 + N, C): the tokens that enter the block; texts (J + words, D): features of the photo's
    J classes, then of the background words; scale: CLIP's exp(logit_scale).

    a (N, C) are ln_1's outputs. If channel c rises by a little e at all patches, p_k rises by
    N w_kc e; so a patch at which channels with large w_kc are large is one that speaks for k.
    p = softmax(scale * cosine(image, texts)). The image's feature is the mean of its PATCHES: the
    class token is left out, as in CLIP-ES's code (E5). What is differentiated is the probability,
    not the cosine: a place that speaks for a background word as well does not raise p_k (E6). The
    gradient reaches a through the attention alone, since the residual sum goes past ln_1.
    """
    block = visual.transformer.resblocks[-1]
    # No weight of CLIP's asks for a gradient (`seeds_from_clip`), so torch records from here on.
    a = block.ln_1(x).detach().requires_grad_()                              # (1, 1 + N, C)
    x, attention = open_block(block, x, a)
    feature = visual.ln_post(x)[:, 1:].mean(1) @ visual.proj                 # (1, D)
    probs = (scale * F.normalize(feature, dim=1) @ texts.T).softmax(1)[0]    # (J + words,)
    # one forward pass serves all classes, each has a backward pass of its own
    gradients = [torch.autograd.grad(p, a, retain_graph=True)[0] for p in probs[:J]]
    weights = torch.cat(gradients)[:, 1:].mean(1)                            # (J, C)
    raw = weights @ a.detach()[0, 1:].T                                      # (J, N)
    return probs.detach(), weights, raw, attention.detach()


def balance(A, rounds=3):
    """Attention (N, N) -> nearly doubly stochastic: columns, then rows, are divided by their sums.

    Sinkhorn's iteration: a patch that all others look at no longer outweighs them (E9). Where both
    of two patches give .9 to the first and .1 to the second, the first round already leaves .5.
    """
    for _ in range(rounds):
        A = A / A.sum(0)
        A = A / A.sum(1, keepdim=True)
    return A


def affinity(attentions, last=8):
    """How much each patch belongs to each other one, (N, N): from the last 8 blocks' attention.

    The class token's row and column are cut off, without making rows sum to one again (E8). After
    balancing, "i looks at j" and "j looks at i" are averaged. The square sums over all patches in
    between, sum_m A_im A_mj, so that i also belongs to what its like belong to.
    """
    A = torch.cat(attentions[-last:])[:, 1:, 1:].mean(0)                     # (N, N)
    A = balance(A)
    A = (A + A.T) / 2
    return A @ A


def box_mask(cam, threshold):
    """Where the affinity may take a class's evidence from: (h, w) bool, a union of boxes.

    A box surrounds each 8-connected region above `threshold` times the maximum; both sides are
    first cut to whole numbers from 0 to 255, then compared with > (E10). cam (h, w) in [0, 1].

        above   . # . . .       numbers   .  6  .  .  .      boxes   # # . . .
                # . . . .   ->            6  .  .  .  .  ->          # # . . .
                . . . # .                 .  .  .  14 .              . . . # .
                . . . . .                 .  .  .  .  .              . . . . .

    A region with a hole has one box, that of its rim; CLIP-ES's code gives the hole a box too,
    inside that one (E12).
    """
    levels = (cam.cpu() * 255).byte()  # the maximum is 254: twice min_max ends just under 1 (E7)
    above = levels > int(threshold * int(levels.max()))
    # Each cell above starts with a number of its own. Every cell takes the largest one next to it,
    # again and again, until nothing changes: then all cells of a region have the same.
    number = torch.arange(1.0, 1 + cam.numel()).view_as(levels) * above
    before = torch.zeros_like(number)
    while not torch.equal(number, before):
        before = number
        number = F.max_pool2d(number[None], 3, stride=1, padding=1)[0] * above
    mask = torch.zeros_like(above)
    for n in number[above].unique():
        rows, columns = torch.nonzero(number == n, as_tuple=True)
        height = slice(rows.min(), rows.max() + 1)
        width = slice(columns.min(), columns.max() + 1)
        mask[height, width] = True
    # No box holds the grid's last row and column, a slip of CLIP-ES's code. A region that touches
    # them loses a part, and one that lies in them alone is lost (E11).
    mask[-1] = mask[:, -1] = False
    return mask.to(cam.device)


def class_aware_affinity(A, cams, masks):
    """CAMs (J, h, w) spread along the affinity A (N, N), from inside their boxes: (J, h, w).

    masks (J, h, w) bool. A patch outside the boxes gives nothing, but may receive (E13). That
    makes the affinity class-aware: likeness in general, evidence of this class alone.
    """
    sources = (cams * masks).flatten(1)      # (J, N), columns of A outside are multiplied by 0
    return (sources @ A.T).view_as(cams)     # patch i gets sum_j A_ij source_j


def clip_scores(cams, size):
    """CAMs (J, h, w) in [0, 1] -> (1 + J, H, W) float16: [1 - the largest ; cams] at `size` (H, W).

    Not stretched again after the resize, so a map may peak at 0.96 (E14). float16 is how CLIP-ES's
    code stores its CAMs, and it reckons on in it (E15).
    """
    cams = resize(cams[None], size)[0].half()
    return torch.cat([1 - cams.amax(0, keepdim=True), cams])


def wrapped_colours(image):
    """Photo (H, W, 3) uint8 RGB -> what CLIP-ES's CRF compares, (3, H, W) uint8.

    Blue, green and red less (104.008, 116.669, 122.675), another mean of ImageNet than the one in
    IMAGENET_COLOURS. The difference is kept as a byte, so what is darker wraps round to the bright
    end: black (152, 140, 134) and white (150, 138, 132) look alike, and greys of 103 and 104 are
    255 apart in blue. A slip, but the published numbers contain it (E16).
    """
    x = torch.from_numpy(image).flip(2) - torch.tensor([104.008, 116.669, 122.675])
    return x.long().byte().permute(2, 0, 1)  # cut to whole numbers, of which a byte is kept


def crf_of_scores(scores, image):
    """Scores (1 + J, H, W) float16, photo (H, W, 3) -> the CRF's probabilities Q (1 + J, H, W)."""
    # As CLIP-ES's code has it: floored at 1e-5, and the logarithm is rounded to float16 (E15).
    # dense_crf takes the logarithm again.
    probs = scores.clamp(1e-5, 1).log().float().exp()
    return dense_crf(probs[None], wrapped_colours(image)[None], *CLIP_CRF)[0]


def clip_seed(model, texts, image, present, threshold, machine):
    """One photo, all steps: (arrays for its .npz, label map (H, W) uint8 with 255 where unsure).

    texts: features (K - 1, D) of all classes but background, and (words, D) of the background
    words; present: the photo's J class numbers from 1 (E20); threshold: of `box_mask`. The arrays
    are the classifier's "cam" (J, H/4, W/4) float16, and at stride 16 what explains it: "before"
    (J, h, w) float16, the maps without affinity, and "boxes" (J, h, w) bool, where it took its
    evidence from.

    With --amp all blocks but the last are in bfloat16; gradient and affinity stay in float32 (E19).
    """
    size, J = image.shape[:2], len(present)
    if J == 0:  # a photo of nothing that has a name is all background (E21)
        return {"cam": torch.zeros(0, *cam_grid(*size)).half()}, np.zeros(size, np.uint8)
    foreground, background = texts
    here = torch.cat([foreground[[k - 1 for k in present]], background])     # (J + words, D)
    x = clip_input(image).to(machine.device)                                 # (1, 3, 16h, 16w)
    h = x.shape[2] // 16
    w = x.shape[3] // 16
    positions = clip.resize_positions(model.visual.positional_embedding, h, w)  # (1 + N, C)
    with machine.autocast:
        # CLIP-ES's code rounds the positions to float16, even where all else is float32 (E4).
        tokens, attentions = patch_tokens(model.visual, x, positions.half().float())
    *_, raw, attention = grad_cam(model.visual, tokens, here, J, model.logit_scale.exp())
    before = min_max(min_max(raw.relu().view(J, h, w)))                      # twice (E7)
    boxes = torch.stack([box_mask(cam, threshold) for cam in before])
    A = affinity([*attentions, attention])                                   # (N, N)
    after = min_max(class_aware_affinity(A, before, boxes))                  # (J, h, w)
    scores = clip_scores(after, size)                                        # (1 + J, H, W)
    Q = crf_of_scores(scores, image)                                         # (1 + J, H, W)
    stored = resize(after[None], cam_grid(*size))[0]                         # (J, H/4, W/4)
    arrays = {"cam": stored.half().cpu(),
              "before": before.half().cpu(),
              "boxes": boxes.cpu()}
    return arrays, label_map(Q, present, CONFIDENCE)


def seeds_from_clip(model, data, labels, machine, folder):
    """Write the seeds that CLIP gives. Returns their provenance, as `seeds_from_classifier`.

    Raises ValueError where a class's text has more tokens than CLIP reads, 77.
    """
    model = model.to(machine.device).requires_grad_(False)
    foreground, background = class_texts(data)
    sentences = [TEMPLATE.format(text) for text in foreground + background]
    tokens = clip.tokenize(sentences, len(model.positional_embedding)).to(machine.device)
    # CLIP-ES's code normalises them three times over, which is once but for rounding (E1).
    features = F.normalize(model.encode_text(tokens), dim=1)                 # (K - 1 + words, D)
    texts = features.tensor_split([len(foreground)])
    threshold = BOX_THRESHOLD.get(data.name, BOX_THRESHOLD["VOC2012"])
    make = functools.partial(clip_seed, model, texts, threshold=threshold, machine=machine)
    write_seeds(make, data, labels, machine, folder)
    return dict(iters=0, scales=[1], flip=False, crf=True, label_filter=True)


# ================================================================= III. the dense CRF of all stages
# Fully connected CRF, mean-field inference (Kraehenbuehl and Koltun, NeurIPS 2011): every pixel
# listens to all (and, in code but not in the paper, to itself), the more the closer the two are in
# position and colour. Mean field: the others' labels are not known, so their present probabilities
# stand for them; all pixels are updated at once, and that ten times over. The sum over all pairs is
# a Gaussian filter, done on a permutohedral lattice (Adams, Baek and Davis, Eurographics 2010). The
# published WeakCLIP numbers were made with that lattice, so its approximation is part of the
# method: the exact sum over all pairs gives other labels on 0.5 to 3.6 % of the pixels.
#
# The lattice by example, in one dimension. Its vertices are the whole numbers; one unit is
# sqrt(3) / 2 standard deviations of the Gaussian that is wanted. Point a lies at 0.25 and has the
# value 8, b at 1.5 and has 4. d dimensions have d + 1 axes to blur along; for d = 1 both lie along
# this one line, so it is blurred twice.
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
# 5.59; the exact filter has 6.57 and 5.43. (tests/test_crf.py has these numbers.) The
# constant would give a lone point on vertex 0 its own value back, were no vertex absent. But it
# touches 0 and, with weight 0, 1; vertex -1 is absent. Two blurs leave 1 + 1/4 of it at vertex 0,
# and it gets 2/3 of that, 5/6. In the CRF constants cancel: every kernel is divided by its sums of
# ones.
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

    Values (BP, K), BP = B * P, are filtered by slice(blur(splat(values))), (BP, K).
    features (B, d, ...) float32, the P points in one or more dimensions: each of the B images has a
    lattice of its own, all are filtered in one go. Each of the three steps is a sparse matrix, see
    `weighted_sums`. On a GPU the host waits twice, for the span of the features and for the number
    M of vertices, and never in one of the steps. Raises ValueError where the features span more
    lattice cells than 63 bits can number.
    AUDIT.md: (70), (99).
    """

    def __init__(self, features):
        B, d = features.shape[:2]
        origin, turn, weights = simplex(features.transpose(0, 1).flatten(1))
        corners, gains = number_corners(origin, turn, B)               # (d+1, BP), (d+1,)

        # Equal numbers are one vertex. Corners in different rows never are (their remainders
        # differ), so each row is sorted by itself, two to five times as fast as corners.sort(1).
        # Row k holds each point's corner whose coordinates leave remainder k, see `simplex`.
        numbers, point = zip(*[row.sort(stable=True) for row in corners])
        point = torch.stack(point)                                     # (d+1, BP) whose corner
        vertices, vertex, counts = torch.unique_consecutive(
            torch.cat(numbers), return_inverse=True, return_counts=True)
        vertex = vertex.int().view_as(point)                           # (d+1, BP) in 0..M-1

        # Splat: a vertex sums the points of all corners with its number. Row M has none: it stays
        # 0, and stands for every vertex that is absent.
        self.splat_index = point.flatten().int()
        self.splat_start = F.pad(counts.cumsum(0), (1, 0)).int()       # (M+1,)
        self.splat_weights = weights.gather(1, point).flatten()
        # Blur: a vertex and its two neighbours along each axis.
        self.blur_index = neighbours(vertices, gains)                  # (d+1, M+1, 3)
        self.blur_weights = weights.new_tensor([1, 0.5, 0.5]).repeat(len(counts) + 1, 1)
        # Slice: a point sums its corners. From sorted order back to the points' own.
        self.slice_index = torch.empty_like(vertex).scatter_(1, point, vertex).t().contiguous()
        self.slice_weights = (weights / (1 + 2.0 ** -d)).t().contiguous()  # (BP, d+1)

    def splat(self, values):
        """Points (BP, K) -> vertices (M+1, K)."""
        return weighted_sums(values, self.splat_index, self.splat_weights, self.splat_start)

    def blur(self, x):
        """Vertices (M+1, K) -> vertices (M+1, K), along one axis after another."""
        # Memory for a tensor of over 32 MB comes from the system, page by page, each time anew. At
        # 81 labels that takes a quarter of the time, so only as many go at once as stay below.
        parts = []
        for part in x.split(max(1, 8_000_000 // len(x)), 1):
            part = part.contiguous()
            for index in self.blur_index:
                part = weighted_sums(part, index, self.blur_weights)
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def slice(self, x, rows=...):
        """Vertices (M+1, K) -> the points `rows`, (R, K); all without `rows`."""
        return weighted_sums(x, self.slice_index[rows], self.slice_weights[rows])

    def divide_by_degrees(self, weight):
        """Itself, from now on weight * D^-1/2 k D^-1/2: k the filter as built, D its row sums.

        A pixel among many alike has a large row sum, its degree. Left as it is, the million pairs
        of a sky would outweigh a wire before it. Half is divided out where a pixel speaks and half
        where it listens, so that i moves j as much as j moves i (in the lattice nearly so); k / D
        would not.
        """
        ones = torch.ones_like(self.slice_weights[:, :1])
        degrees = self.slice(self.blur(self.splat(ones)))              # (BP, 1)
        norm = (degrees + 1e-20).rsqrt()
        self.splat_weights *= norm[:, 0].index_select(0, self.splat_index)
        self.slice_weights *= weight * norm
        return self


def weighted_sums(x, index, weights, start=None):
    """A sparse matrix times x (., K): each of the R rows that come back is a sum of rows of x.

    index, weights (R, n): row i is sum_j weights[i, j] * x[index[i, j]]. Where some rows have more
    entries than others both are flat, and row i sums those from start[i] up to start[i + 1].
    The splat of the example: x = (8, 4), index = (a, b, a, b), start = (0, 1, 2) for the vertices
    0, 2, 1 and weights = (3/4, 1/2, 1/4, 1/2) give (6, 2, 4).
    An embedding bag is torch's one operation that fetches rows, weighs and adds them without
    writing the products down.
    """
    return F.embedding_bag(index, x, start, mode="sum", per_sample_weights=weights)


def onto_plane(features):
    """Features (d, P) as points of the plane sum(x) = 0 in d + 1 dimensions: (d+1, P).

    Feature i goes along (1, ..., 1, -i, 0, ..., 0) with i ones, over its length sqrt(i (i + 1)):
    these directions lie in the plane at right angles, so distances stay. They are scaled so that
    splat, blur and slice together have standard deviation 1: in each direction the blurs have the
    variance (d + 1)^2 / 2, splat and slice (d + 1)^2 / 12 each, on average; that is 2/3 (d + 1)^2.
    """
    d, P = features.shape
    x = features.new_zeros(d + 1, P)
    for i in range(d, 0, -1):
        f = features[i - 1] * (math.sqrt(2 / 3) * (d + 1) / math.sqrt(i * (i + 1)))
        x[:i] += f
        x[i] -= i * f
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
    x = onto_plane(features)                                           # (d+1, P)
    # The nearest multiples of d + 1. Axes ranked by what remains, the largest first; the sum may
    # be off by s times d + 1. If s > 0, the s last in rank are lowered by one; if s < 0, the -s
    # first are raised. Adding s to every rank makes exactly those leave 0..d.
    origin = (x / (d + 1)).round_()
    rest = x - origin * (d + 1)
    rank = origin.sum(0).char().repeat(d + 1, 1)
    for i, j in itertools.combinations(range(d + 1), 2):
        smaller = rest[i] < rest[j]
        rank[i] += smaller
        rank[j] += ~smaller
    wrap = (rank - rank.clamp(0, d)).sign()
    origin -= wrap
    turn = d - (rank - wrap * (d + 1)).long()
    # Barycentric weights: how much more remains on an axis than on the one stepped along before
    # (for corner 0: than on the last, a round of 1 earlier). Mixed with them the corners give the
    # point. None is negative, because what remains rises along the walk and spans at most 1: that
    # is why the walk goes by rank, else one would be. In the example a has x = [1/4, -1/4]; half of
    # it, in the order of the walk, is -1/8, 1/8, and the weights are -1/8 - (1/8 - 1), 1/8 + 1/8.
    rest = (x - origin * (d + 1)) / (d + 1)
    rest = torch.empty_like(rest).scatter_(0, turn, rest)              # in the order of the walk
    weights = rest.diff(dim=0, prepend=rest[d:] - 1)
    return origin[:d], turn, weights


def number_corners(origin, turn, B):
    """One whole number for each corner, equal where two corners are the same vertex.

    Returns numbers (d+1, BP) and gains (d+1,), what a step along each axis adds to a number. Its
    digits are remainder, image and the first d coordinates // (d + 1). A step raises the first and
    lowers one other: none along the last axis, whose digit is implied. In the example the digit of
    the coordinate runs over 5 values from -2, so a's corner [0, 0] is 2 and b's [2, -2] is 3. A
    step along axis 0 adds 5 - 1, one along axis 1 adds 5: both come to 7, the number of [1, -1].
    origin, turn: of `simplex`. Raises ValueError where 63 bits do not suffice.
    """
    d, BP = origin.shape
    low = origin.amin(1) - 2           # two below: a corner may be one lower, its neighbour two
    spans = (origin.amax(1) + 2 - low).long().tolist()
    total = B * math.prod(spans)       # how many numbers a remainder has
    largest = total * (d + 2)          # above any number and what one more step adds
    if not 0 < largest < 2 ** 63:
        raise ValueError(f"dense CRF: {spans} cells; larger bandwidths (sxy, srgb) are needed")
    dtype = torch.int32 if largest < 2 ** 31 else torch.int64  # int32 sorts twice as fast
    gains = [total - math.prod(spans[i + 1:]) for i in range(d)] + [total]
    gains = torch.tensor(gains, dtype=dtype, device=origin.device)     # (d+1,)
    number = gains.new_tensor(range(B)).repeat_interleave(BP // B)
    for digit, span in zip(origin - low[:, None], spans):
        number = number * span + digit.to(dtype)                       # (BP,) of corner 0
    # What each step of the walk adds, in order. The last would lead back to corner 0.
    steps = torch.empty_like(turn, dtype=dtype)
    steps.scatter_(0, turn, gains[:, None].expand(-1, BP))             # (d+1, BP) by turn
    return torch.cat([number[None], steps[:d]]).cumsum_(0), gains


def neighbours(vertices, gains):
    """What the blur adds up along each axis (d+1, M+1, 3) int32: a vertex and the two beside it.

    M stands for a neighbour that is absent, and row M is (M, M, M).
    vertices (M,), sorted; gains: of `number_corners`. In the example these are 2, 3 and 7, the
    vertices 0, 2 and 1, and 4 and 5. A step along axis 0 goes from 3 to 7, one along axis 1 from 7
    to 12, less the 9 of both axes: to 3.
    """
    M = len(vertices)
    # A step along every axis leads back to the start. So numbers wrap around at the sum of all
    # gains, which no vertex's own number reaches: its digits keep off the ends of their spans.
    wanted = (vertices + gains[:, None]) % gains.sum()                 # (d+1, M)
    ahead = torch.searchsorted(vertices, wanted).clamp_(max=M - 1)
    ahead = torch.where(vertices.take(ahead) == wanted, ahead, M)
    ahead = F.pad(ahead, (0, 1), value=M)                              # (d+1, M+1)
    itself = torch.arange(M + 1, dtype=torch.int32, device=ahead.device).expand_as(ahead)
    # If u is ahead of v, v is behind u. What lands in column M has none ahead, and is overwritten.
    behind = torch.full_like(itself, M).scatter_(1, ahead, itself)
    behind[:, M] = M
    return torch.stack([itself, ahead.int(), behind], 2)


def pixel_positions(B, H, W, device):
    """x and y of every pixel, (B, 2, H, W) float32."""
    yx = torch.from_numpy(np.indices((H, W), np.float32))
    return yx.flip(0).to(device).expand(B, -1, -1, -1)


@functools.lru_cache(maxsize=2)
def position_filter(B, H, W, sxy, weight, device):
    """The kernel of positions alone: it serves all photos of a size, and two sizes are kept."""
    return Lattice(pixel_positions(B, H, W, device) / sxy).divide_by_degrees(weight)


def softmax_rows(x, out=None):
    """softmax of every row of x, written into `out` if given, and returned; x is used up."""
    if x.shape[1] >= 16:
        return torch.softmax(x, 1, out=out)
    # torch works on vectors of 16 numbers; on shorter rows it takes six times as long as this.
    x.sub_(x.amax(1, keepdim=True)).exp_()
    return torch.div(x, x.sum(1, keepdim=True), out=out)


@torch.no_grad()
def dense_crf(probs, image, gaussian, bilateral):
    """Refine class probabilities by the colours of the image; returns Q (B, K, H, W) float32.

        Q0 = softmax(-U),  Q <- softmax(-U + sum_m w_m D_m^-1/2 k_m D_m^-1/2 Q)
        U = -log probs,    k_m and w_m the two kernels and their weights,    D_m = row sums of k_m

    probs (B, K, H, W) positive, need not sum to one over K; image (B, 3, H, W) of 0..255, on any
    device; gaussian (sxy, weight) of the kernel of positions, bilateral (sxy, srgb, weight) of that
    of positions and colours, sxy in pixels, srgb in grey levels; the names are pydensecrf's (both
    are Gaussians).
    Potts model: similar pixels raise each other's score of the class that they are of, different
    classes do not interact. Raises ValueError where bandwidths are too fine.
    Memory: some 600 bytes a pixel for the two lattices while they are made, and 18 for each label.
    AUDIT.md: (69).
    """
    B, K, H, W = probs.shape
    position = pixel_positions(B, H, W, probs.device) / bilateral[0]   # (B, 2, H, W)
    colour = image.to(position) / bilateral[1]                         # (B, 3, H, W)
    kernels = [position_filter(B, H, W, *gaussian, probs.device),
               Lattice(torch.cat([position, colour], 1)).divide_by_degrees(bilateral[2])]
    log_p = probs.float().log().permute(0, 2, 3, 1).reshape(-1, K).contiguous()  # (BHW, K)
    Q = softmax_rows(log_p.clone())                                    # (BHW, K)
    # Pixels go through the last steps in blocks that stay in a processor's cache.
    size = 2 ** (18 if probs.device.type == "cpu" else 26) // K
    for _ in range(10):
        blurred = [kernel.blur(kernel.splat(Q)) for kernel in kernels]
        for start in range(0, len(Q), size):
            rows = slice(start, start + size)
            by_place = kernels[0].slice(blurred[0], rows)              # (size, K)
            by_colour = kernels[1].slice(blurred[1], rows)
            softmax_rows(by_place.add_(by_colour).add_(log_p[rows]), Q[rows])
    return Q.view(B, H, W, K).permute(0, 3, 1, 2)


# ============================================== what a training run needs, to skip at first reading
# From here on nothing is about the method. Why a resumed run is exact, bit for bit (same device,
# --amp, number of processes and of threads; on a GPU with --deterministic): an iteration depends on
# four things, and none of them is how long this process has been running.
#   1. parameters, running statistics and optimizer, as the iteration before left them: in the
#      checkpoint; those of a frozen CLIP are in its file, whose digest args.json holds;
#   2. which images are in its batch, and how they are augmented: `Samples` are numbered through
#      the whole run, and what becomes of sample s is a function of (seed, s);
#   3. the network's own chance, dropout: drawn from (seed, iteration, process);
#   4. the learning rate: a function of the iteration.
# One random stream through the whole training would do as well if its state were saved, but every
# worker that loads images has one too, each in another place. Functions have no state: there is
# nothing to save and nothing to forget, and any one sample can be made again to be looked at.
# The log comes before the checkpoint, which notes how long the log was: what a run that was cut off
# has written behind that is dropped, and comes again.

SAVE_EVERY = 500  # iterations; what a cut costs at most
LOG_EVERY = 10    # iterations; a GPU is waited for where a loss is looked at


class Machine:
    """Where the run happens: device, precision, and this process's place among torchrun's.

    rank of world processes, all of which run the same script; where rank is 0, `MAIN` is true.
    Without torchrun there is one process, and all that is between processes does nothing. Raises
    ValueError for a device that is not there.
    """

    def __init__(self, device, amp):
        self.rank = int(os.environ.get("RANK", 0))  # set by torchrun
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        if not 0 <= self.rank < self.world:
            raise ValueError("RANK, WORLD_SIZE: start with torchrun, or unset these variables")
        if device == "auto":
            device = "mps" if torch.backends.mps.is_available() else "cpu"
            if torch.cuda.is_available():
                device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # each process has its own GPU
        try:
            # A device can be named without being there, and "cuda" without a number.
            self.device = torch.zeros(1, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
        # In words, for args.json.
        self.description = f"{self.world} x {self.device}, {torch.get_num_threads()} threads"
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            torch.cuda.set_device(self.device)
        # A context: bfloat16 for what runs inside, if --amp; losses stay outside, in float32.
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=amp)
        if self.world > 1:
            # One process may check or download alone for longer than the usual 10 minutes.
            dist.init_process_group("nccl" if self.cuda else "gloo",
                                    timeout=datetime.timedelta(days=1))

    def share(self, items):
        """This process's part of a list; the parts of all processes make up the list."""
        return items[self.rank::self.world]

    def wait(self):
        """Go on when every process has come here."""
        if self.world > 1:
            dist.barrier()

    def place(self, model):
        """The model on the device. On GPUs BatchNorm then sees the images of all processes;
        elsewhere torch cannot, and each process norms its own share."""
        if self.world > 1 and self.cuda:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model.to(self.device)

    def average_gradients(self, model):
        """After backward: every process gets the mean of all processes' gradients.

        All then take the same step, so that parameters stay equal without being sent. Each loss is
        a mean over its process's share. Where that is a mean over sure pixels only, the mean of the
        processes' means is not quite the mean over the whole batch.
        """
        if self.world > 1:
            for p in model.parameters():
                if p.grad is not None:
                    dist.all_reduce(p.grad)  # the sum
                    p.grad /= self.world

    def share_buffers(self, model):
        """After training: every process gets the running statistics that the checkpoint holds."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


@dataclass
class Samples:
    """Sample s of a run, s = 0, 1, 2, ...: the tensors that make(image id, rng) gives.

    Samples are numbered through the whole run. The first n, the number of images, are epoch 0, the
    next n are epoch 1. Epoch e has the order that is drawn from (seed, e), so every image comes
    once an epoch. All chance of sample s comes from rng, a random stream of its own that is drawn
    from (seed, s). So it is the same in any process that loads images, whatever was loaded before,
    and a resumed run makes it again.
    """

    ids: list
    make: object
    seed: int

    def __getitem__(self, sample):
        """The tensors of one sample."""
        epoch, place = divmod(sample, len(self.ids))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.ids))
        return self.make(self.ids[order[place]], np.random.default_rng([self.seed, sample]))


def batches(ids, make, args, start, machine):
    """A progress bar over (iteration, the parts of its batch), from iteration `start` on.

    make(image id, rng) -> the tensors of one sample. With 16 images a batch, iteration 2 has the
    samples 32 to 47. Of two processes one loads the even ones and the other the odd ones. A batch
    may lie across two epochs.

    A part is a list of tensors on the device, and a batch has as many as --accumulate says: with 2
    the samples 32 to 39 and 40 to 47. Each loss becomes the mean of the parts' losses, so gradients
    are the whole batch's where a loss is a mean over photos, or over all of their pixels. They are
    not where it is a mean over the pixels that are not unsure (stage 2's score loss, stage 3's),
    nor where BatchNorm trains, which norms each part by the part's own statistics.
    AUDIT.md: (96), (97).
    """
    samples = range(start * args.batch_size, args.iters * args.batch_size)
    loader = torch.utils.data.DataLoader(
        Samples(ids, make, args.seed), args.batch_size // machine.world // args.accumulate,
        sampler=machine.share(samples), num_workers=args.workers,
        pin_memory=machine.cuda)  # page-locked, so copies overlap with computing
    parts = ([tensor.to(machine.device, non_blocking=True) for tensor in part] for part in loader)
    # zip takes from one iterator, n times over: so it comes in groups of n.
    grouped = zip(*[parts] * args.accumulate)
    return tqdm(enumerate(grouped, start), "training", args.iters, initial=start,
                disable=not MAIN)


def log(folder, bar, step, optimizer, terms):
    """Every LOG_EVERY iterations add a line to log.jsonl: the first group's rate, all losses.

    Raises ValueError where a loss is infinite or no number.
    AUDIT.md: (98).
    """
    if not MAIN or step % LOG_EVERY:
        return
    losses = {name: term.item() for name, term in terms.items()}
    total = sum(losses.values())
    if not math.isfinite(total):
        raise ValueError(f"iteration {step}: {losses}; --overwrite with a smaller --lr")
    bar.set_postfix(loss=f"{total:.3f}")
    line = {"step": step, "lr": optimizer.param_groups[0]["lr"], "loss": total, **losses}
    with open(folder / "log.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")


def save(folder, model, optimizer, step, iters, facts, frozen=()):
    """Every SAVE_EVERY iterations, and after the last of `iters`, write checkpoint.pt.

    It holds all that iteration `step` and those after it depend on. frozen: prefixes of names that
    are left out; facts: what tells this run from another. The loss can be sound and the step after
    it not (a gradient overflows, a variance is zero), and a NaN never leaves the weights again:
    then ValueError, and nothing is written.
    """
    if not MAIN or (step % SAVE_EVERY and step < iters):
        return
    weights = {name: value for name, value in model.state_dict().items()
               if not name.startswith(frozen)}
    for tensors in (weights, *optimizer.state.values()):  # a parameter's moments are a dict too
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError(f"iteration {step - 1}: weights are infinite or no number; lower --lr")
    saved = {"step": step, "model": weights, "optimizer": optimizer.state_dict(), "facts": facts,
             "log_bytes": (folder / "log.jsonl").stat().st_size}
    archive = io.BytesIO()  # first to memory: torch's writer has no words for a disk that is full
    torch.save(saved, archive)
    write_whole(folder / "checkpoint.pt", lambda file: file.write(archive.getbuffer()))


def read_checkpoint(path, stage):
    """What `save` wrote in a stage, "2_weakclip" say. Raises ValueError for any other file."""
    # torch's reader raises many kinds of errors, with advice that is of no use here.
    with contextlib.suppress(Exception):
        saved = torch.load(path, map_location="cpu", weights_only=True)  # builds plain values only
        if saved["facts"]["stage"] == stage:
            return saved
    raise ValueError(f"{path}: no readable checkpoint; train first, or name one of {stage}; a "
                     "damaged one: delete it")


def load_trained(model, state, frozen=()):
    """Load a state dict, but for names that begin with one of the prefixes `frozen`: these stay.

    Raises ValueError naming what is missing, unexpected or of another shape: a network that is half
    loaded works, and is wrong.
    """
    own = {name: value for name, value in model.state_dict().items() if name.startswith(frozen)}
    try:
        model.load_state_dict({**state, **own})
    except (RuntimeError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None


def resume(folder, model, optimizer, facts, frozen=()):
    """Bring model and optimizer to the last checkpoint; returns how many iterations are done.

    0 without a checkpoint. Raises ValueError for one of another run. Every process of torchrun
    cuts the log, and all do so before any adds to it: no iteration ends before all are in it.
    """
    path, saved = folder / "checkpoint.pt", {"step": 0, "log_bytes": 0}
    if path.is_file():
        saved = read_checkpoint(path, facts["stage"])
        if saved["facts"] != facts:
            raise ValueError(f"{path}: of other classes, another network or CLIP; --overwrite")
        load_trained(model, saved["model"], frozen)
        optimizer.load_state_dict(saved["optimizer"])
    with open(folder / "log.jsonl", "a") as f:
        f.truncate(min(saved["log_bytes"], f.tell()))
    return saved["step"]


def check_output(image_id, values):
    """Raise ValueError where what a network says of a photo, a tensor, is infinite or no number.

    Sound weights can overflow on the way through it; argmax would make a mask of that all the same.
    """
    if not values.isfinite().all():
        raise ValueError(f"{image_id}: the network's answer is no number; try without --amp, or "
                         "train with a smaller --lr")


# ===================================================================================== command line

def number(smallest):
    """A type for argparse: numbers from `smallest` on, neither infinite nor NaN.

    They are of the kind that `smallest` is of, int or float.
    """
    kind = type(smallest)

    def parse(text):
        if not smallest <= kind(text) < 2 ** 31:
            raise ValueError
        return kind(text)
    parse.__name__ = f"{kind.__name__} from {smallest} on"  # argparse's message has it
    return parse


def common_options(docstring, iters, lr, batch_size, crop, arch=None):
    """The parser with the options that all stages have; a stage's docstring begins its --help.

    iters, lr, batch_size, crop: defaults. A text instead of a number is what --help shows for a
    default that depends on the data or on other options: it is None here, and filled in later.
    arch: the default of stages 1 and 3, whose networks are ResNets; None for none of their options.
    """
    parser = Parser(description=docstring.splitlines()[0])
    parser.add_argument("--data", required=True, help="a dataset's name or folder (README, Data)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="gets what is made [runs]")
    parser.add_argument("--overwrite", action="store_true", help="start afresh")
    parser.add_argument("--split", help="training list, by name [trainaug if there is one]")
    # These change results, but for the last; their defaults are the recipe.
    for name, smallest, default, text in (
            ("--iters", 1, iters, "optimizer steps; the rate falls to its end over them"),
            ("--batch-size", 1, batch_size, "images a step, on all devices together"),
            ("--accumulate", 1, 1, "show a batch in N parts, with the memory of one"),
            ("--crop", 64, crop, "side of the training crop in pixels, a multiple of 32"),
            ("--lr", 1e-12, lr, "base learning rate"),
            ("--seed", 0, 0, "of first weights, order, augmentation and dropout"),
            ("--limit", 1, "all", "use the first N images of every list, for a quick try"),
            ("--workers", 0, "0 on a CPU, else up to 8", "processes that load images")):
        parser.add_argument(name, type=number(smallest),
                            default=None if isinstance(default, str) else default,
                            help=f"{text} [{default}]")
    # These three change speed, but results no more than by rounding.
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or mps [the best]")
    parser.add_argument("--amp", action="store_true", help="bfloat16: less memory, coarser")
    parser.add_argument("--deterministic", action="store_true", help="equal bits on a GPU too")
    if arch:
        parser.add_argument("--arch", choices=("resnet18", "resnet50", "resnet101"), default=arch,
                            help="the backbone [%(default)s]")
        parser.add_argument("--weights", default="imagenet",
                            help="imagenet (downloaded), none, or a ResNet's file [%(default)s]")
    return parser


def open_run(args, machine):
    """The dataset, which every stage starts with; options that were left open are filled in."""
    data = find_dataset(args.data)
    args.split = args.split or data.training_split()
    note(f"{data.root}: the training list is {args.split}, {len(data.ids(args.split))} images")
    note_leaks(data, args.split)
    if getattr(args, "label_filter", False):  # recorded as the digest of the labels it filters by
        labels = data.image_labels(data.ids(args.split, args.limit))
        args.label_filter = data.digests(labels=json.dumps(labels))["labels"]
    if args.crop % 32:  # the coarsest stride of any network here
        raise ValueError(f"--crop {args.crop}: a multiple of 32 is expected")
    if args.deterministic:
        # read by cuBLAS when it is first used: work space of its own for each stream
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if args.batch_size % (machine.world * args.accumulate):
        raise ValueError(f"--batch-size {args.batch_size}: no multiple of processes x --accumulate")
    if args.workers is None:
        args.workers = 0 if machine.device.type == "cpu" else min(8, os.cpu_count())
    return data


def next_command(script, args, *names):
    """The next stage's command: where things are, and the options `names`, as they are here."""
    words = ["python", Path(sys.argv[0]).with_name(script)]
    for name in ("data", "runs", *names):
        value = getattr(args, name)
        if value:
            words += [f"--{name}", value]
    return shlex.join(map(str, words))


def parse_args(argv=None):
    """The options of stage 1.

    AUDIT.md: (50).
    """
    parser = common_options(__doc__, "5 epochs", "0.1; from nothing 0.01", 16, 512, "resnet50")
    parser.add_argument("--method", choices=("classifier", "clip"), default="classifier",
                        help="train one, or ask CLIP and train nothing [%(default)s]")
    parser.add_argument("--clip", default="ViT-B/16",
                        help="with --method clip: OpenAI's (downloaded) or a file [%(default)s]")
    return parser.parse_args(argv)


def main():
    """Labels in, seeds out: check, train or ask CLIP, write, and say what comes next."""
    args = parse_args()
    machine = Machine(args.device, args.amp)
    data = open_run(args, machine)
    ids = data.ids(args.split, args.limit)
    labels = data.image_labels(ids)  # {id: class numbers from 1}
    if MAIN:
        check_inputs(data, ids, image_labels=labels)
    folder = args.runs / data.name / "1_cam"
    digests = data.digests(args.split, labels=json.dumps(labels))
    note_unteachable(data, labels, args.method == "classifier")
    if args.method == "clip":
        model, digests["clip"] = clip.load(args.clip, args.seed)
        digests["texts"] = json.dumps(class_texts(data))
    else:
        digests["weights"] = weights_digest(args.arch, args.weights)
        args.lr = args.lr or (0.01 if args.weights == "none" else 0.1)
        args.iters = args.iters or 5 * max(1, len(ids) // args.batch_size)  # 5 epochs
    if MAIN:
        start_run(folder, args, data, {args.split: ids}, digests, machine.description)
    machine.wait()
    if is_finished(folder, [folder / f"seeds/{i}.png" for i in ids]):
        return
    if args.method == "clip":
        facts = seeds_from_clip(model, data, labels, machine, folder)
    else:
        facts = seeds_from_classifier(data, labels, args, machine, folder)
    if MAIN:
        update_record(folder, provenance=facts, finished=True)
        command = next_command("stage2_weakclip.py", args, "split", "limit", "clip")
        print(f"{folder}: {len(ids)} seeds. Next: {command}")


if __name__ == "__main__":
    run(main)
