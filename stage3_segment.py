"""Stage 3: an ordinary segmentation network, trained on the pseudo masks as if they were ground truth.

run     python stage3_segment.py --data VOC2012
reads   VOC2012/JPEGImages/<id>.jpg, runs/VOC2012/2_weakclip/masks/<split>/<id>.png (or --masks DIR)
writes  runs/VOC2012/3_segment/{args.json, log.jsonl, checkpoint.pt, masks/<split>/<id>.png, preview.png}

Stage 2 has seen its training images' labels; this network needs nothing but the photo, so it is what val and test judge.
DeepLabV2 (Chen et al., TPAMI 2018) on a torchvision ResNet; the released code has DeepLabV1 on ResNet-38d instead.
"""
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from eval import IGNORE, check_inputs, dataset_name, folder_digest, read_label, run
from stage1_cam import (IMAGENET_MEAN, IMAGENET_STD, Machine, backbone_options, common_options, crop_or_pad, fit,
                        fix_batchnorm, load_trained, normalise, open_run, poly, preview_ids, random_window, read_checkpoint,
                        resnet, start_run, truth_pictures, weights_digest, write_preview)
from stage2_weakclip import (MASK_OPTIONS, make_views, mask_crf, mask_options, mask_photos, masks_are_current,
                             mean_cross_entropy, resize, resize_image, write_all_masks)

# (Gaussian sxy, weight), (bilateral sxy, srgb, weight) at test
SEGMENT_CRF = {"VOC2012": ((1, 3), (112, 2, 3)), "COCO2014": ((1, 3), (67, 3, 4))}


# ================================================================================================================ model

class DeepLab(nn.Module):
    """ResNet at output stride 8 and DeepLabV2's head: four 3x3 convolutions, dilated by 6, 12, 18 and 24, summed."""

    def __init__(self, arch, weights, classes):
        super().__init__()
        net = resnet(arch, weights, (2, 4))
        self.pretrained = weights != "none"
        self.backbone = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2, net.layer3, net.layer4)
        self.classifier = nn.ModuleList(
            nn.Conv2d(net.fc.in_features, classes, 3, padding=d, dilation=d) for d in (6, 12, 18, 24))
        for conv in self.classifier:
            nn.init.normal_(conv.weight, std=0.01)  # GUESS DeepLab's own start
            nn.init.zeros_(conv.bias)

    def train(self, mode=True):
        super().train(mode)
        if self.pretrained:
            fix_batchnorm(self)
        return self

    def forward(self, image):
        """(B, 3, H, W) -> logits (B, K, H/8, W/8)."""
        x = self.backbone(image)
        return sum(conv(x) for conv in self.classifier)


def make_optimizer(model, lr):
    """SGD with momentum 0.9, weight decay 5e-4; the new layers learn ten times as fast."""
    groups = [{"params": list(model.backbone.parameters()), "base_lr": lr},
              {"params": list(model.classifier.parameters()), "base_lr": 10 * lr}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=5e-4)


# ================================================================================================================= data

class MaskedImages(torch.utils.data.Dataset):
    """Item (index, sample) -> image (3, crop, crop) normalised, mask (crop, crop) int64: scale U(0.5, 1.5), flip, crop."""

    def __init__(self, data, ids, masks, crop, seed):
        self.data, self.ids, self.masks, self.crop, self.seed = data, ids, masks, crop, seed

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, item):
        index, sample = item
        rng = np.random.default_rng([self.seed, sample, 3])
        i, crop = self.ids[index], self.crop
        image = self.data.image(i)
        mask = read_label(self.masks / f"{i}.png", len(self.data.classes), image.shape[:2])
        scale = rng.uniform(0.5, 1.5)
        size = tuple(max(1, round(n * scale)) for n in mask.shape)
        image, mask = resize_image(image, size), np.array(Image.fromarray(mask).resize(size[::-1], Image.NEAREST))
        if rng.random() < 0.5:
            image, mask = image[:, ::-1], mask[:, ::-1]
        top, left = (random_window(rng, n, crop) for n in size)  # GUESS padding falls on any side
        x = normalise(image, IMAGENET_MEAN, IMAGENET_STD)
        y = torch.from_numpy(mask.astype(np.int64))
        return crop_or_pad(x, crop, top, left, 0), crop_or_pad(y, crop, top, left, IGNORE)


# ============================================================================================================ inference

def predictor(model, args, machine):
    """photo (H, W, 3) uint8 -> class probabilities (K, H, W): softmax of the mean logits over scales and mirror images."""
    model.to(machine.device).eval()

    @torch.no_grad()
    def predict(image):
        total = 0
        for x, mirrored in make_views(image, args.scales, not args.no_flip, (IMAGENET_MEAN, IMAGENET_STD)):
            with machine.autocast():
                logits = model(x.to(machine.device))
            logits = resize(logits.float(), image.shape[:2])
            total = total + (logits.flip(3) if mirrored else logits)
        return (total / (len(args.scales) * (1 if args.no_flip else 2))).softmax(1)[0]
    return predict


# ========================================================================================================= command line

def parse_args(argv=None):
    p, method = common_options(__doc__.splitlines()[0], lr=None, batch_size=16, crop=448)
    backbone_options(method, "resnet101")
    method.add_argument("--masks", type=Path, metavar="DIR", help="label PNGs [stage 2's]; true masks give an upper bound")
    p.add_argument("--predict", default="val", metavar="LIST,LIST", help="lists to predict [%(default)s]")
    mask_options(p, [0.5, 0.75, 1.0, 1.25, 1.5])
    return p.parse_args(argv)


def label_photos(args):
    """`--images`: needs the run's checkpoint, but no dataset."""
    machine, folder = Machine(args.device, args.amp), args.runs / dataset_name(args.data) / "3_segment"
    path = folder / "checkpoint.pt"
    saved = read_checkpoint(path)
    if saved["facts"].get("stage") != "3_segment":
        raise ValueError(f"{path}: not a checkpoint of stage 3")
    model = DeepLab(saved["facts"]["arch"], "none", len(saved["facts"]["classes"]))
    load_trained(model, saved["model"])
    mask_photos(predictor(model, args, machine), args, saved["step"], path, folder, machine, mask_crf(args, SEGMENT_CRF))


def train(model, data, ids, args, machine, folder):
    """Train on the masks, from the last checkpoint if there is one."""
    def losses(model, image, mask):
        with machine.autocast():
            logits = model(image)
        # GUESS the loss is taken at the mask's size: the logits are upsampled, not the mask reduced
        return {"loss_cross_entropy": mean_cross_entropy(resize(logits.float(), mask.shape[1:]), mask)}

    facts = {"stage": "3_segment", "classes": list(data.classes), "arch": args.arch}
    fit(model, MaskedImages(data, ids, args.masks, args.crop, args.seed), make_optimizer(model, args.lr), losses,
        poly(args.iters), args, machine, folder, facts)


def preview(data, ids, split, folder):
    """image | prediction | truth, of some predicted images."""
    write_preview(folder / "preview.png", [
        [data.image(i), read_label(folder / "masks" / split / f"{i}.png"), *truth_pictures(data, i)] for i in preview_ids(ids)])


def main():
    args = parse_args()
    if args.images:
        return label_photos(args)
    data, machine = open_run(args)
    args.lr = args.lr or 5e-3
    args.iters = args.iters or 20_000
    args.masks = args.masks or args.runs / data.name / "2_weakclip" / "masks" / args.split
    folder, ids, splits = args.runs / data.name / "3_segment", data.ids(args.split, args.limit), args.predict.split(",")
    predicted = {split: data.ids(split, args.limit) for split in splits}
    if args.masks.name.startswith("SegmentationClass") and machine.main:
        print(f"--masks {args.masks}: true masks; this run is an upper bound, not weakly supervised")
    if machine.main:
        check_inputs(data, ids, args.masks)
        check_inputs(data, sorted(set().union(*predicted.values()) - set(ids)))

    # which lists are predicted changes nothing in the model: a finished run predicts further ones
    came_from = {"masks": folder_digest(args.masks, ids), "weights": weights_digest(args.weights)}
    start_run(folder, args, machine, {**data.digests(args.split), **came_from}, (*MASK_OPTIONS, "predict"))
    written = all((folder / "masks" / s / f"{i}.png").is_file() for s, of in predicted.items() for i in of)
    if masks_are_current(folder, args, args.iters, machine) and written:
        return print(f"{folder}: finished; --overwrite starts afresh")
    torch.manual_seed(args.seed)
    model = DeepLab(args.arch, args.weights, len(data.classes)).to(machine.device)
    train(model, data, ids, args, machine, folder)
    write_all_masks(predictor(model, args, machine), data, splits, folder, args, machine, mask_crf(args, SEGMENT_CRF))
    if machine.main:
        preview(data, predicted[splits[0]], splits[0], folder)
        print(f"{folder}: masks of {', '.join(splits)}. Next: python eval.py --data {args.data}")


if __name__ == "__main__":
    run(main)
