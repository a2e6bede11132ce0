"""Stage 3: an ordinary segmentation network, trained on the pseudo masks as on true ones.

run     python stage3_segment.py --data VOC2012
reads   VOC2012/JPEGImages/<id>.jpg
        runs/VOC2012/2_weakclip/masks/<split>/<id>.png (or --masks DIR)
writes  runs/VOC2012/3_segment/{args.json, log.jsonl, checkpoint.pt, preview.png}
        runs/VOC2012/3_segment/masks/<split>/<id>.png

Stage 2 masks photos whose labels it was given. The network here needs nothing but a photo, so it
can be scored on val and test; its mIoU there says what the masks were worth. DeepLabV2 (Chen et
al., TPAMI 2018) on a torchvision ResNet; the released code has DeepLabV1 on ResNet-38d instead.

The training loop and the run folder come from stage1_cam.py, the writing of masks with its CRF from
stage2_weakclip.py: all stages share them, because exact resume must be written only once. What is
left for this file is what makes stage 3 different: its network, its data and its recipe.

Shapes stand at the ends of lines: B images of a batch, K classes with background first, C channels,
H W pixels, h w of a resized photo.
"""
# first: while all else is imported, which takes seconds, eval.py sees to Ctrl-C
from eval import (IGNORE, check_inputs, dataset_name, folder_digest, label_path, read_args,
                  read_label, run)

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from stage1_cam import (IMAGENET_MEAN, IMAGENET_STD, Machine, backbone_options, check_unchanged,
                        common_options, conv_layout, crop_or_pad, fit, fix_batchnorm,
                        load_checkpoint, mark_finished, next_command, normalise, note_if_blank,
                        open_run, poly, preview_ids, random_window, read_checkpoint, resnet,
                        start_run, truth_pictures, unchanged, weights_digest, work_on,
                        write_preview)
from stage2_weakclip import (MASK_OPTIONS, make_views, mask_crf, mask_provenance, mask_options,
                             mask_photos, masks_are_current, mean_cross_entropy, open_masks, resize,
                             resize_image, write_all_masks)

# Of the CRF at test: (Gaussian sxy, weight), (bilateral sxy, srgb, weight), as released; stage 2's
# masks have other constants.
SEGMENT_CRF = {"VOC2012": ((1, 3), (112, 2, 3)), "COCO2014": ((1, 3), (67, 3, 4))}


# ======================================================================================== model

class DeepLab(nn.Module):
    """ResNet at output stride 8 and DeepLabV2's head: photo (B, 3, H, W) -> (B, K, H/8, W/8).

    arch: "resnet18", "resnet50" or "resnet101"; weights: as `--weights`; n_classes: K.
    """

    def __init__(self, arch: str, weights: str, n_classes: int):
        super().__init__()
        # A classifier's ResNet ends at stride 32. Its layer3 and layer4 keep stride 8 here and
        # are dilated instead, by 2 and 4: see `resnet`.
        net = resnet(arch, weights, (2, 4))
        self.pretrained = weights != "none"
        self.backbone = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool,
                                      net.layer1, net.layer2, net.layer3, net.layer4)
        # Four reaches over the same features, from 13 to 49 cells wide: an object is judged by its
        # surroundings, near and far.
        self.classifier = nn.ModuleList()
        for d in (6, 12, 18, 24):
            conv = nn.Conv2d(net.fc.in_features, n_classes, 3, padding=d, dilation=d)
            self.classifier.append(conv)
        for conv in self.classifier:
            nn.init.normal_(conv.weight, std=0.01)  # as DeepLab's own head starts
            nn.init.zeros_(conv.bias)

    def train(self, mode=True):
        """As in torch, but ImageNet's BatchNorm statistics stay.

        A batch of 16 crops would estimate them less well than 1.3 million photos did.
        """
        super().train(mode)
        if self.pretrained:
            fix_batchnorm(self)
        return self

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, K, H/8, W/8) of normalised images (B, 3, H, W)."""
        x = self.backbone(conv_layout(image))  # (B, C, H/8, W/8)
        return sum(conv(x) for conv in self.classifier)  # (B, K, H/8, W/8)


def make_optimizer(model: DeepLab, lr: float) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, weight decay 5e-4; the new layers learn ten times as fast."""
    # The backbone comes from ImageNet and needs a nudge; the head starts from noise.
    groups = [
        {"params": list(model.backbone.parameters()), "base_lr": lr},
        {"params": list(model.classifier.parameters()), "base_lr": 10 * lr}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=5e-4)


# ========================================================================================= data

class MaskedImages(torch.utils.data.Dataset):
    """Item (index, sample number) -> image (3, crop, crop) float32, mask (crop, crop) int64.

    data: the dataset folder; ids: images to learn from; masks: folder of their label PNGs.
    """

    def __init__(self, data, ids: list[str], masks: Path, crop: int, seed: int):
        self.data = data
        self.ids = ids
        self.masks = masks
        self.crop = crop
        self.seed = seed

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, item):
        index, sample = item
        # All that is random about a sample is a function of its number, so that a resumed run
        # draws the same; the 3 makes it another stream than those of stages 1 and 2.
        rng = np.random.default_rng([self.seed, sample, 3])
        image_id, crop = self.ids[index], self.crop
        image = self.data.image(image_id)  # (H, W, 3)
        path = label_path(self.masks, image_id)
        mask = read_label(path, len(self.data.classes), image.shape[:2])  # (H, W)

        # Objects are shown half to one and a half times as large as in the photo. The released
        # code jitters colours as well; ours leaves them.
        scale = rng.uniform(0.5, 1.5)
        size = tuple(max(1, round(side * scale)) for side in mask.shape)  # (h, w)
        image = resize_image(image, size)  # (h, w, 3)
        # Class numbers cannot be mixed, so the mask takes the nearest pixel. Pillow wants (w, h).
        mask = np.array(Image.fromarray(mask).resize(size[::-1], Image.NEAREST))  # (h, w)
        if rng.random() < 0.5:
            image = image[:, ::-1]
            mask = mask[:, ::-1]
        # GUESS padding falls on any side, where an image is smaller than the crop
        top = random_window(rng, size[0], crop)
        left = random_window(rng, size[1], crop)
        x = normalise(image, IMAGENET_MEAN, IMAGENET_STD)  # (3, h, w)
        y = torch.from_numpy(mask.astype(np.int64))  # (h, w)
        return crop_or_pad(x, crop, top, left, 0), crop_or_pad(y, crop, top, left, IGNORE)


# ===================================================================================== training

def train(model: DeepLab, data, ids: list[str], args, machine: Machine, folder: Path):
    """Train on the masks, from the folder's last checkpoint if there is one.

    The loop is stage 1's `fit`; here are its loss and its recipe.
    """
    def losses(model, image, mask):
        with machine.autocast():
            logits = model(image)  # (B, K, H/8, W/8)
        # GUESS the loss is taken at the mask's size: the logits are upsampled, and not the mask
        # reduced, which would lose what is thinner than 8 pixels
        logits = resize(logits.float(), mask.shape[1:])  # (B, K, H, W)
        return {"loss_cross_entropy": mean_cross_entropy(logits, mask)}

    # arch: --images builds the network from the checkpoint alone.
    facts = {"stage": "3_segment", "classes": list(data.classes), "arch": args.arch}
    samples = MaskedImages(data, ids, args.masks, args.crop, args.seed)
    fit(model, samples, make_optimizer(model, args.lr), losses, poly(args.iters), args, machine,
        folder, facts)


# ==================================================================================== inference

def predictor(model: DeepLab, args, machine: Machine):
    """predict(photo (H, W, 3) uint8) -> class probabilities (K, H, W), over all views.

    Softmax of the mean logits over scales and mirror images, as the released code has it here;
    stage 2 takes the mean of probabilities.
    """
    model.to(machine.device).eval()
    mean_std = (IMAGENET_MEAN, IMAGENET_STD)

    @torch.no_grad()
    def predict(image):
        # All views come to the photo's size first; only there can they be added pixel on pixel.
        total, count = 0, 0
        for x, mirrored in make_views(image, args.scales, not args.no_flip, mean_std):
            with machine.autocast():
                logits = model(x.to(machine.device))  # (1, K, h/8, w/8)
            logits = resize(logits.float(), image.shape[:2])  # (1, K, H, W)
            if mirrored:
                logits = logits.flip(3)
            total = total + logits
            count += 1
        return (total / count).softmax(1)[0]  # (K, H, W)
    return predict


# ================================================================================= command line

def parse_args(argv=None):
    """The command line's options; argv None for the real one."""
    description = __doc__.splitlines()[0]
    # The released recipe (DeepLabV1's) where it fits: crop, scales, SGD and its rate for 16 images.
    # GUESS half of the released iterations
    parser, method = common_options(description, iters=20_000, lr=5e-3, batch_size=16, crop=448)
    backbone_options(method, "resnet101")
    method.add_argument(
        "--masks", type=Path, metavar="DIR",
        help="folder of label PNGs <id>.png to learn from; true masks give an upper bound "
             "[stage 2's]")
    method.add_argument(
        "--predict", metavar="LIST,LIST",
        help="lists whose masks are written; a finished run predicts further ones without "
             "training again [val if there is one, else the training list]")
    mask_options(parser, [0.5, 0.75, 1.0, 1.25, 1.5], "the photo's own size")
    return parser.parse_args(argv)


def label_photos(args):
    """`--images`: needs the run's checkpoint, but no dataset."""
    machine = Machine(args.device, args.amp)
    folder = args.runs / dataset_name(args.data) / "3_segment"
    path = folder / "checkpoint.pt"
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint; "
                         f"python stage3_segment.py --data {args.data} trains one")
    with unchanged(path) as digest:
        saved = read_checkpoint(path)
    facts = saved["facts"]
    if facts.get("stage") != "3_segment":
        raise ValueError(f"{path}: not a checkpoint of stage 3; name another --runs")
    model = DeepLab(facts["arch"], "none", len(facts["classes"]))
    load_checkpoint(path, saved, model)
    predict = predictor(model, args, machine)
    mask_photos(predict, args, saved["step"], digest, folder, machine, mask_crf(args, SEGMENT_CRF),
                facts["classes"])


def preview(data, split: str, ids: list[str], folder: Path):
    """Write preview.png: photo | prediction | true mask, of some predicted images."""
    rows = []
    for image_id in preview_ids(ids):
        mask = read_label(folder / "masks" / split / f"{image_id}.png")
        rows.append([data.image(image_id), mask, *truth_pictures(data, image_id)])
    write_preview(folder / "preview.png", rows)
    note_if_blank(folder, [row[1] for row in rows])


def prepare(args):
    """Check all input, fill in args.masks -> (data, machine, ids, lists).

    ids: images to learn from; lists: {split: ids} of the masks to be made. Raises ValueError.
    """
    data, machine = open_run(args)
    if args.masks is None:
        args.masks = args.runs / data.name / "2_weakclip" / "masks" / args.split
    if args.predict is None:
        args.predict = "val" if data.has("val") else args.split
    ids = data.ids(args.split, args.limit)
    lists = {split: data.ids(split, args.limit) for split in args.predict.split(",")}
    if machine.main:
        if args.masks.name.startswith("SegmentationClass"):
            print(f"--masks {args.masks}: true masks; "
                  "this run is an upper bound, not weakly supervised")
        # Masks of our own stages lie in <stage>/masks/<split>, beside the stage's args.json. Others
        # may number the classes otherwise: then most have a class that the photo's labels lack.
        stage_folder = args.masks.parent.parent
        labels = {} if read_args(stage_folder) else data.known_labels(ids)
        check_inputs(data, ids, args.masks, labels, tolerated=0.5)
        # Photos that are only predicted need no mask.
        predicted = set().union(*lists.values())
        check_inputs(data, sorted(predicted - set(ids)))
    return data, machine, ids, lists


def main():
    """Train, predict, show some; continue where an earlier run of the command stopped."""
    args = parse_args()
    if args.images:
        return label_photos(args)
    data, machine, ids, lists = prepare(args)
    folder = args.runs / data.name / "3_segment"
    inputs = {"masks": folder_digest(args.masks, ids), "weights": weights_digest(args.weights)}
    wanted = mask_provenance(args, args.iters)
    with work_on(folder, args, machine):
        # Which lists are predicted changes nothing in the model: a finished run predicts others.
        start_run(folder, args, machine, {**data.digests(args.split), **inputs},
                  (*MASK_OPTIONS, "predict"))
        if masks_are_current(folder, wanted, lists):
            print(f"{folder}: finished; --overwrite starts afresh")
            return
        # What exists is done: where only masks are missing, `train` returns at once, and masks of
        # lists that are there already stay.
        open_masks(folder, wanted, args, machine)
        torch.manual_seed(args.seed)
        model = DeepLab(args.arch, args.weights, len(data.classes)).to(machine.device)
        train(model, data, ids, args, machine, folder)
        check_unchanged(args.masks, inputs["masks"], folder_digest(args.masks, ids))
        predict = predictor(model, args, machine)
        write_all_masks(predict, data, lists, folder, args, machine, mask_crf(args, SEGMENT_CRF))
        if machine.main:
            split, predicted = next(iter(lists.items()))
            preview(data, split, predicted, folder)
            mark_finished(folder)
            next_one = next_command("eval.py", data, args, "runs")
            print(f"{folder}: masks of {', '.join(lists)}. Next: {next_one}")


if __name__ == "__main__":
    run(main)
