"""Stage 3: an ordinary segmentation network, trained on the pseudo masks as on true ones.

run     python stage3_segment.py --data VOC2012
reads   VOC2012/JPEGImages/<id>.jpg
        runs/VOC2012/2_weakclip/masks/<split>/<id>.png (or --masks DIR)
writes  runs/VOC2012/3_segment/{args.json, log.jsonl, checkpoint.pt}
        runs/VOC2012/3_segment/masks/<split>/<id>.png

Stage 2 masks photos whose labels it was given. The network here needs nothing but a photo, so it
can be scored on val and test; its mIoU there says what the masks were worth. DeepLabV2 (Chen et
al., TPAMI 2018) on a torchvision ResNet; the released code has DeepLabV1 on ResNet-38d instead.

What a training run needs comes from stage1_cam.py, the writing of masks with its CRF from
stage2_weakclip.py: that a run resumes exactly, and that no stale mask passes for a fresh one, is
written once. What is left for this file is what makes stage 3 different: its network, its data, its
loop and its recipe.

Shapes stand at the ends of lines: B images of a batch, K classes with background first, C channels,
H W pixels, h w of a resized photo; quotients are rounded up.
"""
import functools
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from eval import (IGNORE, MAIN, check_classes, check_inputs, dataset_name, files_digest, find_file,
                  is_finished, note, read_label, run, start_run, update_record)
from stage1_cam import (IMAGENET_COLOURS, Machine, batches, common_options, conv_layout,
                        crop_or_pad, load_trained, log, next_command, normalise, open_run, poly,
                        random_window, read_checkpoint, resize, resnet, resume, save, sgd,
                        weights_digest)
from stage2_weakclip import (MASK_OPTIONS, make_views, mask_crf, mask_options, mask_photos,
                             mean_cross_entropy, plan_masks, resize_image, write_masks)

# Of the CRF at test: (Gaussian sxy, weight), (bilateral sxy, srgb, weight), as released; on VOC
# stage 2's masks have others.
# AUDIT.md: (72).
SEGMENT_CRF = {"VOC2012": ((1, 3), (112, 2, 3)),
               "COCO2014": ((1, 3), (67, 3, 4))}


# ======================================================================================== model

class DeepLab(nn.Module):
    """ResNet at output stride 8 and DeepLabV2's head: photo (B, 3, H, W) -> (B, K, H/8, W/8).

    arch: "resnet18", "resnet50" or "resnet101"; weights: as `--weights`; n_classes: K.

    A classifier's ResNet ends at stride 32, where a person 60 pixels wide has two cells. Here
    layer3 and layer4 keep stride 8, which gives that person eight, and their filters are dilated by
    2 and 4 to see as far as before (stage 1, `resnet`). The head looks at every place in four
    reaches at once: a 3x3 filter with dilation d reads cells up to d away,

        d = 6, 12, 18, 24   ->   13, 25, 37, 49 cells, which are 104, 200, 296, 392 pixels wide

    and the four answers are added: what is near tells the part (a leg), what is far tells whose it
    is (a horse's or a chair's).
    AUDIT.md: (83), (101).
    """

    def __init__(self, arch, weights, n_classes):
        super().__init__()
        self.backbone, channels = resnet(arch, weights, layer3=2, layer4=4)
        self.classifier = nn.ModuleList()
        for d in (6, 12, 18, 24):
            conv = nn.Conv2d(channels, n_classes, 3, padding=d, dilation=d)
            nn.init.normal_(conv.weight, std=0.01)  # as DeepLab's own head starts
            nn.init.zeros_(conv.bias)
            self.classifier.append(conv)

    def forward(self, image):
        """Logits (B, K, H/8, W/8) of normalised images (B, 3, H, W)."""
        x = self.backbone(conv_layout(image))  # (B, C, H/8, W/8)
        return sum(conv(x) for conv in self.classifier)  # (B, K, H/8, W/8)


# ========================================================================================= data

def masked_image(data, masks, crop, image_id, rng):
    """One sample: image (3, crop, crop) float32 normalised, mask (crop, crop) int64.

    data: the dataset folder; masks: folder of label PNGs; rng: of this sample alone, see `Samples`.
    AUDIT.md: (84).
    """
    image = data.image(image_id)  # (H, W, 3)
    H, W = image.shape[:2]
    path = find_file(masks, image_id)
    mask = read_label(path, len(data.classes), (H, W))  # (H, W)
    # Objects are shown half to one and a half times as large as in the photo. The released code
    # jitters colours as well; ours leaves them.
    scale = rng.uniform(0.5, 1.5)
    h = max(1, round(H * scale))
    w = max(1, round(W * scale))
    image = resize_image(image, (h, w))  # (h, w, 3)
    x = normalise(image, IMAGENET_COLOURS)  # (3, h, w)
    # Class numbers cannot be mixed, so the mask takes the nearest pixel. Pillow wants (w, h).
    mask = Image.fromarray(mask).resize((w, h), Image.NEAREST)
    y = torch.from_numpy(np.array(mask)).long()  # (h, w)
    if rng.random() < 0.5:
        x = x.flip(2)
        y = y.flip(1)
    # GUESS padding falls on any side, where an image is smaller than the crop
    corner = random_window(rng, (h, w), crop)
    x = crop_or_pad(x, crop, 0, *corner)  # (3, crop, crop)
    y = crop_or_pad(y, crop, IGNORE, *corner)  # (crop, crop)
    return x, y


# ===================================================================================== training
# The masks are taken for the truth, and nobody knows where they are wrong. What is wrong in one
# photo and not in the next is hard to learn: no feature of the photo tells of it, so the network
# falls back on what most masks have in common. What is wrong alike in all photos (bicycles filled
# in, legs cut off) it learns, and its score on true masks shows that.

def train(model, data, ids, args, machine, folder):
    """Train on the masks, from the folder's last checkpoint if there is one.

        L    = mean over labelled pixels of  - log softmax(logits)[mask]
        rate = base_lr (1 - step / iters)^0.9

    It is stage 1's loop with another loss, and all layers learn. The masks' unsure pixels (255) and
    the padding teach nothing; all others count alike, right or wrong. With 21 classes chance is
    log 21 = 3.0; at 0.1 the right class has a probability of 0.9 in the (geometric) mean.
    With --accumulate, or in several processes, L is the mean of the parts' means.
    AUDIT.md: (86), (87).
    """
    make = functools.partial(masked_image, data, args.masks, args.crop)
    # Momentum 0.9 adds up the last ten gradients or so: what they agree on grows, what they differ
    # in cancels. The head starts from noise and learns ten times as fast as the backbone (85).
    optimizer = sgd(model, args.lr, momentum=0.9, weight_decay=5e-4)
    # arch: --images builds the network from the checkpoint alone.
    facts = {"stage": "3_segment", "classes": list(data.classes), "arch": args.arch}
    start = resume(folder, model, optimizer, facts)
    # Batches are numbered, and sample s is a function of (seed, s): that is why a run that was cut
    # off, and begins here at iteration `start`, sees what it would have seen (stage 1, `Samples`).
    bar = batches(ids, make, args, start, machine)
    for step, parts in bar:
        poly(optimizer, step, args.iters)
        optimizer.zero_grad()
        total = 0
        # Each crop of 448 pixels takes some 1.4 GiB with ResNet-101 (tests/RESULTS.md): 16 of them
        # do not fit into every card, and --accumulate shows them in parts.
        for image, mask in parts:
            with machine.autocast:
                logits = model(image)  # (B, K, H/8, W/8)
            # GUESS the loss is taken at the mask's size: the logits are upsampled, and not the
            # mask reduced, which would lose what is thinner than 8 pixels
            logits = resize(logits.float(), mask.shape[1:])  # (B, K, H, W)
            # Divided here, so that the sum over the parts is the mean over the batch; `backward`
            # adds each part's gradients to those of the parts before it.
            loss = mean_cross_entropy(logits, mask) / args.accumulate
            loss.backward()
            total += loss.detach()
        machine.average_gradients(model)
        optimizer.step()
        log(folder, bar, step, optimizer, {"loss_cross_entropy": total})
        save(folder, model, optimizer, step + 1, args.iters, facts)
    machine.share_buffers(model)


# ==================================================================================== inference

def predictor(model, args, machine):
    """predict(photo (H, W, 3) uint8) -> class probabilities (K, H, W), over all views.

    Softmax of the mean logits over scales and mirror images, as the released code has it here;
    stage 2 takes the mean of probabilities.
    AUDIT.md: (88).
    """
    model.to(machine.device).eval()

    @torch.no_grad()
    def predict(image):
        total = 0
        size = image.shape[:2]
        short, long = sorted(size)  # so that scale 1 is the photo's own size
        views = list(make_views(image, args, IMAGENET_COLOURS, short, long))
        for x, mirrored in views:
            with machine.autocast:
                logits = model(x.to(machine.device))  # (1, K, h/8, w/8)
            # All views come to the photo's size; only there can they be added pixel on pixel.
            logits = resize(logits.float(), size)  # (1, K, H, W)
            if mirrored:
                logits = logits.flip(3)
            total += logits
        mean = total / len(views)
        return mean.softmax(1)[0]  # (K, H, W)
    return predict


# ================================================================================= command line

def parse_args(argv=None):
    """The command line's options; argv None for the real one."""
    # The released recipe (DeepLabV1's) where it fits: crop, scales, SGD and its rate for 16 images.
    # GUESS half of the released iterations
    parser = common_options(__doc__, 20_000, 5e-3, 16, 448, "resnet101")
    parser.add_argument("--masks", type=Path, help="label PNGs to learn from [stage 2's]; true "
                                                   "masks give an upper bound")
    parser.add_argument("--predict", help="LIST,LIST whose masks are written [val, if there]")
    mask_options(parser, [0.5, 0.75, 1.0, 1.25, 1.5], "the photo's own size")
    return parser.parse_args(argv)


def main():
    """Train, predict; continue where an earlier run of the command stopped."""
    args = parse_args()
    machine = Machine(args.device, args.amp)
    folder = args.runs / dataset_name(args.data) / "3_segment"
    crf = mask_crf(args, SEGMENT_CRF)
    if args.images:  # needs the run's checkpoint, but no dataset
        saved = read_checkpoint(folder / "checkpoint.pt", "3_segment")
        facts = saved["facts"]
        classes = facts["classes"]
        model = DeepLab(facts["arch"], "none", len(classes))
        load_trained(model, saved["model"])
        predict = predictor(model, args, machine)
        return mask_photos(predict, args, folder, machine, crf, classes)

    data = open_run(args, machine)
    if args.masks is None:
        args.masks = folder.parent / f"2_weakclip/masks/{args.split}"
    elif "SegmentationClass" in args.masks.name:
        note(f"--masks {args.masks}: true masks; this run is an upper bound")
    ids = data.ids(args.split, args.limit)
    predicted = args.predict
    if not predicted:
        predicted = "val" if data.has("val") else args.split
    lists = {}
    for split in predicted.split(","):
        lists[split] = data.ids(split, args.limit)
    if MAIN:
        # Masks of our own stages lie in <stage>/masks/<split>, and the stage's args.json says which
        # classes they number. No file says it of other masks: numbered otherwise, most of them have
        # a class that the photo's labels lack.
        ours = check_classes(data, args.masks.parent.parent)
        labels = {} if ours else data.known_labels(ids)
        check_inputs(data, ids, args.masks, labels, tolerated=0.5)
        # Photos that are only predicted need no mask.
        check_inputs(data, sorted(set().union(*lists.values()).difference(ids)))
        digests = data.digests(args.split)
        learned = [find_file(args.masks, i) for i in ids]
        digests["masks"] = files_digest(learned)
        digests["weights"] = weights_digest(args.arch, args.weights)
        # What --predict names may change between runs: the model does not depend on it.
        looked_at = {**lists, args.split: ids}
        start_run(folder, args, data, looked_at, digests, machine.description,
                  (*MASK_OPTIONS, "predict"))
    masks = plan_masks(data, lists, folder, args, machine)
    if is_finished(folder, masks):
        return
    torch.manual_seed(args.seed)  # of the new layers' first weights
    model = DeepLab(args.arch, args.weights, len(data.classes))
    model = machine.place(model)
    train(model, data, ids, args, machine, folder)
    predict = predictor(model, args, machine)
    write_masks(predict, masks, machine, crf)
    if MAIN:
        update_record(folder, options=vars(args), finished=True)
        print(f"{folder}: masks of {', '.join(lists)}. Next: {next_command('eval.py', args)}")


if __name__ == "__main__":
    run(main)
