"""The method's constants, steps and switches: what a changed number, order or default would break.

This is the audit's guard. Numbers in brackets, such as (26a) or (E9), are rows of AUDIT.md.
"""
import ast
import colorsys
import dataclasses
import inspect
import json
import math
import re
from argparse import Namespace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import clip
import stage1_cam as stage1
import stage2_weakclip as stage2
import stage3_segment as stage3
from conftest import CLASSES, ROOT, tiny_clip
from eval import COCO_CLASSES, IGNORE, VOC_CLASSES, Dataset, write_label

CPU = stage1.Machine("cpu", amp=False)
CLIPS = stage1.CLIP_COLOURS
IMAGENETS = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def network(switches=stage2.PAPER, crop=64):
    """A small WeakCLIP, the same each time."""
    clip_model = tiny_clip()
    return stage2.WeakCLIP(clip_model, stage2.name_tokens(CLASSES, 77), switches, crop)


def photo(H, W):
    """A photo (H, W, 3) uint8 of noise."""
    return np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)


def grey_levels(x, mean_std):
    """Normalised (3, H, W) -> (H, W, 3) grey levels, rounded."""
    mean, std = (torch.tensor(v)[:, None, None] for v in mean_std)
    return (x * std + mean).permute(1, 2, 0).round().numpy()


class Dice:
    """Stands for a random generator: notes the ranges that are drawn from, and answers `share` of
    the way through them; coins (numbers from 0 to 1) are told one by one."""

    def __init__(self, share=0.5, *coins):
        self.share, self.coins, self.drawn = share, iter(coins), []

    def uniform(self, low, high):
        self.drawn.append((low, high))
        return low + self.share * (high - low)

    def integers(self, low, high):
        return int(self.uniform(low, high - 1))

    def random(self):
        return next(self.coins)


# ======================================================================================= switches

CHANGES = {  # what of `effects` changes with which switches
    "groups": ["freeze_clip", "train_adapter"],  # (1a, 2a)
    "loss_seeding": ["drop_path", "adapter", "text_guidance"],  # (5a, 12a, 11a)
    "loss_boundary": ["aligned", "boundary_weight", "loss_crf_sxy"],  # (22a, 19a, 20a)
    "loss_score": ["chain_coattention", "class_embedding_once", "positions_resized_once",  # (8, 10)
                   "prompts", "coattention",  # (7a, 9a)
                   "score_loss_over_valid", "score_weight"],  # (24a, 35)
    "mean_std": ["clip_normalisation"],  # (26a)
    "ids": ["train_listed_twice"],  # (27a)
    "odd window": ["pad_windows"]}  # (30a)


def test_presets_are_those_of_the_audit():
    audit = (ROOT / "AUDIT.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \w+ \| `(\w+)` \| `(\S+)`.*?\| `(\S+)`", audit, re.MULTILINE)
    for column, preset in ((1, "paper"), (2, "released")):
        values = {row[0]: ast.literal_eval(row[column]) for row in rows}
        assert dataclasses.asdict(stage2.choose_switches(preset, [])) == values
    assert sorted(values) == sorted(sum(CHANGES.values(), []))


@lru_cache(maxsize=None)
def effects(switches):
    """What a small run with these switches makes of one image, by name."""
    model, g = network(switches, crop=128).train(), torch.Generator().manual_seed(1)
    x = F.interpolate(torch.randn(1, 3, 12, 12, generator=g), (96, 128), mode="bicubic")
    y = torch.randint(0, 4, (1, 96, 128), generator=g)
    y[:, :9] = IGNORE
    mean_std = stage2.colours_of(switches)
    torch.manual_seed(2)
    found = stage2.weakclip_losses(*model(x), x, y, switches)
    found = {name: loss.item() for name, loss in found.items()}
    groups = stage2.make_optimizer(model, 1e-4).param_groups
    found["groups"] = [sum(p.requires_grad for p in group["params"]) for group in groups]
    found |= {"mean_std": mean_std, "ids": training_ids(switches)}
    model.eval()
    odd = stage2.window_logits(model, x[..., :70, :90], model.encode_text())
    found["odd window"] = odd.sum().item()
    return found


def training_ids(switches, split="trainaug"):
    """Of a dataset with both lists, cut after two images: the ids that training runs over."""
    lists = {"trainaug": ["a", "b", "c"], "train": ["b", "d", "a"]}
    data = SimpleNamespace(ids=lambda split, limit=None: lists[split][:limit])
    return stage2.training_ids(data, Namespace(split=split, limit=2), switches)


@pytest.mark.parametrize("what, field", [
    (what, field) for what, fields in CHANGES.items() for field in fields])
def test_every_switch_does_something(what, field):
    """Turning one changes what it is there for: none is read by nobody."""
    paper, other = getattr(stage2.PAPER, field), getattr(stage2.RELEASED, field)
    if other == paper:
        # Half the CRF's bandwidth would be lost in rounding, being wider than the image still.
        other = False if paper is True else paper / 8
    changed = effects(stage2.Switches(**{field: other}))
    assert changed.get(what) != effects(stage2.PAPER)[what]


def test_train_images_count_twice_in_the_released_list():
    """Beside trainaug, ours (27b), and not where train is the list (27a). Limits are trainaug's."""
    found = [training_ids(switches) for switches in (stage2.PAPER, stage2.RELEASED)]
    found.append(training_ids(stage2.RELEASED, "train"))
    assert found == [["a", "b"], ["a", "b", "b", "a"], ["b", "d"]]


def test_normalisation():
    """255 times CLIP's own numbers (26b), and by which preset (26a)."""
    numbers = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    np.testing.assert_allclose(stage2.colours_of(stage2.PAPER), 255 * np.array(numbers))
    assert stage2.colours_of(stage2.RELEASED) == IMAGENETS


def test_drop_path_rises_to_a_tenth_over_the_blocks_and_only_in_training(monkeypatch):
    """From 0 at the first block, on attention and MLP (5a)."""
    seen, x, whole = [], torch.randn(1, 3, 64, 64), clip.model.stochastic_depth

    def drop(branch, rate, mode, training):
        seen.append(rate * training)
        return whole(branch, rate, mode, training)
    monkeypatch.setattr(clip.model, "stochastic_depth", drop)
    network(stage2.RELEASED).train().encode_image(x)
    assert seen == pytest.approx([0, 0, 0.05, 0.05, 0.1, 0.1])  # of three blocks
    network(stage2.RELEASED).eval().encode_image(x)
    network(stage2.PAPER).train().encode_image(x)
    assert not any(seen[6:])
    block, x = SimpleNamespace(attn=torch.ones_like, mlp=torch.zeros_like, ln_1=nn.Identity(),
                               ln_2=nn.Identity(), training=True), torch.randn(1000, 2, 8)
    out = clip.model.ResidualAttentionBlock.forward(block, x, rate=0.1) - x
    assert sorted(set(out.round(decimals=3).flatten().tolist())) == pytest.approx([0, 1.111])
    assert torch.allclose(out, out[:, :1, :1].expand_as(out), atol=1e-5)  # an image's as a whole


@torch.no_grad()
def test_in_paper_the_global_embedding_is_clips():
    """Class embedding (10a) and positions (10b) as in CLIP itself, at a size not its own."""
    x, model = torch.randn(2, 3, 48, 80), network()
    torch.testing.assert_close(model.encode_image(x)[1][:, 0], model.clip.encode_image(x))


# ========================================================================= optimizer and schedule

@pytest.mark.parametrize("freeze_clip", [True, False])
@pytest.mark.parametrize("train_adapter", [True, False])
def test_groups_of_the_optimizer(freeze_clip, train_adapter):
    """CLIP has no rate (1a) or one that starts from 0, the adapter trains or shares it (2a), all
    else has 1e-4 (79). AdamW (78); weight decay on all alike, norms and biases too (5b)."""
    switches = stage2.Switches(freeze_clip=freeze_clip, train_adapter=train_adapter)
    model = network(switches).train()
    optimizer = stage2.make_optimizer(model, 1e-4)
    rates = {id(p): group["base_lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {"clip": 0, "adapter": 1e-4 if train_adapter else 0}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        assert rates[id(parameter)] == expected.get(part, 1e-4), name
        assert parameter.requires_grad == (part != "clip" or not freeze_clip)
    for group in optimizer.param_groups:
        settings = [group[name] for name in ("betas", "eps", "weight_decay")]
        assert settings == [(0.9, 0.999), 1e-8, 3e-5] and type(optimizer) is torch.optim.AdamW


@pytest.mark.parametrize("base", [1e-4, 0])
@pytest.mark.parametrize("iters", [20_000, 400])
@pytest.mark.parametrize("done", [0, 0.0025, 0.0375, 0.075, 0.4, 0.5, 0.9975])
def test_rates(base, iters, done):
    """mmcv's cosine down to an absolute 1e-6, to which a rate of 0 rises (1a), with its linear
    warm-up, written out (1b). That takes 1,500 of 20,000 iterations, 30 of 400 (102)."""
    step, warm = round(done * iters), {20_000: 1500, 400: 30}[iters]
    rate = 1e-6 + 0.5 * (base - 1e-6) * (math.cos(math.pi * step / iters) + 1)
    if step < warm:
        rate *= 1 - (1 - step / warm) * (1 - 1e-6)
    assert stage2.warm_cosine(base, step, iters) == pytest.approx(rate, rel=1e-9, abs=1e-20)


# ============================================================================= the training loops

@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    """A ResNet-18's state dict in a file, which stands for pre-trained weights."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pt"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


class Bar(list):
    """Stands for the progress bar over (iteration, parts of the batch)."""

    def set_postfix(self, **shown):
        """What is shown beside it, here nowhere."""


@pytest.fixture()
def train_on(monkeypatch, tmp_path):
    """train_on(stage, model, x, y, iters, lr) -> (lines of the log, the optimizer at the end,
    (training?, image, output) of every pass). x, y: the only batch, in place of the stage's."""
    def train_on(stage, model, x, y, iters, lr):
        seen, saved, bar = [], [], Bar((step, [(x, y)]) for step in range(iters))
        monkeypatch.setattr(stage, "batches", lambda *given: bar)
        monkeypatch.setattr(stage, "save", lambda *given: saved.append(given[2]))
        monkeypatch.setattr(stage1, "LOG_EVERY", 1)
        model.register_forward_hook(lambda m, given, out: seen.append((m.training, *given, out)))
        args = Namespace(iters=iters, lr=lr, accumulate=1, seed=0, crop=64, seeds=None, masks=None,
                         arch="resnet18")
        values = dict(model=model, data=SimpleNamespace(classes=CLASSES), ids=[], labels={},
                      args=args, machine=CPU, folder=tmp_path, facts={})
        stage.train(**{name: values[name] for name in inspect.signature(stage.train).parameters})
        lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        return lines, saved[0], seen
    return train_on


def two_images(H, W):
    """Two images (2, 3, H, W) of four plain quarters and noise, and labels that tell them."""
    torch.manual_seed(0)
    labels = torch.tensor([[[0, 1], [2, 0]], [[3, 0], [0, 1]]])
    labels = labels.repeat_interleave(H // 2, 1).repeat_interleave(W // 2, 2)
    colours = torch.randn(4, 3)[labels].permute(0, 3, 1, 2)
    labels[:, :8, :8] = IGNORE
    return colours + 0.1 * torch.randn(2, 3, H, W), labels


def soft_margin(score, target):
    """Multi-label soft margin loss, written out."""
    return -(target * F.logsigmoid(score) + (1 - target) * F.logsigmoid(-score)).mean()


def cross_entropy(logits, target):
    """Over the pixels that are not 255, at the target's size."""
    return F.cross_entropy(F.interpolate(logits, target.shape[1:], mode="bilinear"), target,
                           ignore_index=255)


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("stage, make, lr, rule, fixed, momentum, decay", [
    (stage1, stage1.Classifier, 0.01, soft_margin, 6, 0, 1e-4),
    (stage3, stage3.DeepLab, 5e-3, cross_entropy, 0, 0.9, 5e-4)])
def test_loops_of_stages_1_and_3(
        train_on, resnet_file, stage, make, lr, rule, fixed, momentum, decay, pretrained):
    """Losses (49, 87), polynomial decay, SGD's settings (51, 85); layers and BatchNorm that stay as
    ImageNet left them (48, 86)."""
    x, y = two_images(64, 64)
    y = torch.eye(4)[:2] if stage is stage1 else y
    model = make("resnet18", str(resnet_file) if pretrained else "none", 4)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    lines, optimizer, seen = train_on(stage, model, x, y, 10, lr)
    assert lines[0]["loss"] == pytest.approx(rule(seen[0][2], y).item())
    rates = [(1 - n / 10) ** 0.9 for n in range(10)]
    assert [line["lr"] for line in lines] == [lr * rate for rate in rates]
    stay = {name for name, value in model.backbone.state_dict().items()
            if torch.equal(value, before[name])}
    assert pretrained or not stay and lines[-1]["loss"] < lines[0]["loss"] / 2
    assert not pretrained or stay == {name for name in before if int(name.split(".")[0]) < fixed
                                      or re.search("running|batches", name)}
    assert torch.equal(before["0.weight"], torch.load(resnet_file)["conv1.weight"]) == pretrained
    names = "lr", "momentum", "weight_decay", "nesterov"
    settings = [[group[name] for name in names] for group in optimizer.param_groups]
    assert settings == [[factor * lr * rates[-1], momentum if pretrained else 0.9, decay, False]
                        for factor in (1, 10)]
    new = optimizer.param_groups[1]["params"]
    assert list(map(id, new)) == list(map(id, model.classifier.parameters()))


def test_loop_of_stage_2(train_on, monkeypatch):
    """The sum of three losses (17) at an eighth of the size (67). The boundary loss's CRF has these
    constants (20b) and sees the logits of training and the augmented image (21b). Dropout is drawn
    from the iteration's number."""
    given, seeds, (x, y), model = [], [], two_images(64, 128), network()
    monkeypatch.setattr(stage2, "dense_crf", lambda p, *rest, **named: (
        given.append((p, *rest, named)) or seeds.append(torch.initial_seed()) or p))
    lines, _, seen = train_on(stage2, model, x, y, 30, 2e-3)
    assert seeds == list(range(30))
    (training, image, (logits, score)), (p, small, constants) = seen[0], given[0]
    assert training and len(seen) == len(given) == 30  # no pass for the CRF alone
    torch.testing.assert_close(p, stage2.loss_probs(logits, (8, 16), True).clamp(min=1e-4).detach())
    assert torch.equal(small, stage2.crf_image(image, (8, 16), stage2.PAPER))
    assert constants == dict(gaussian=(3, 3), bilateral=(80, 13, 10))
    (_, step), (_, lr), (_, total), *losses = lines[0].items()
    assert [name for name, _ in losses] == ["loss_seeding", "loss_boundary", "loss_score"]
    assert total == pytest.approx(sum(loss for _, loss in losses))
    assert losses[2][1] == pytest.approx(0.4 * stage2.score_loss(score, y, True).item())
    assert [line["lr"] for line in lines] == [stage2.warm_cosine(2e-3, n, 30) for n in range(30)]
    assert lines[-1]["loss_seeding"] < losses[0][1] / 3
    idle = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None}
    assert idle == {"clip"}  # (1a); every co-attention layer has a gradient (8)


def test_the_crf_of_the_loss_is_fed_with_at_least_1e_4_and_floored_so(monkeypatch):
    """(25, 68)"""
    given = []
    monkeypatch.setattr(stage2, "dense_crf", lambda p, *rest, **named: given.append(p) or p / 1e3)
    q = stage2.crf_target(torch.tensor([1e-6, 5e-4, 1]).view(1, 3, 1, 1), None, 80)
    assert given[0].flatten().tolist() == pytest.approx([1e-4, 5e-4, 1])
    assert q.flatten().tolist() == pytest.approx([1 / 12, 1 / 12, 10 / 12])


# ========================================================================================= losses

def test_score_loss_is_the_mean_over_labelled_pixels_or_over_all():
    """Weights (35, 19a) and means (24a) of the losses; tau is 0.07 (11d)."""
    score, logits = 2 * torch.rand(2, 4, 6, 8) - 1, torch.randn(2, 4, 3, 4)
    x, y = torch.randn(2, 3, 12, 16), torch.randint(0, 4, (2, 12, 16))
    y[:, :5] = IGNORE
    mean = cross_entropy(score / 0.07, y)
    other = stage2.Switches(score_weight=0.2, boundary_weight=0.5, score_loss_over_valid=False)
    whole, half = (stage2.weakclip_losses(logits, score, x, y, switches)
                   for switches in (stage2.PAPER, other))
    torch.testing.assert_close(whole["loss_score"], 0.4 * mean)
    torch.testing.assert_close(half["loss_score"], 0.2 * mean * 7 / 12)
    torch.testing.assert_close(half["loss_boundary"], whole["loss_boundary"] / 2)


def test_image_and_labels_of_the_losses_sit_on_the_same_points():
    """A cell's colour is its pixels' mean, cut (22b), its label that of its middle (22a)."""
    small = stage2.crf_image(stage1.normalise(photo(64, 64), CLIPS)[None], (8, 8), stage2.PAPER)
    cut = F.avg_pool2d(torch.tensor(photo(64, 64)).permute(2, 0, 1).float(), 8) - small[0]
    assert -1e-3 < cut.min() and cut.max() < 1 + 1e-3
    labels = stage2.resize_labels(torch.arange(64).expand(1, 64, 64), (8, 8), True)
    assert labels[0, 0].tolist() == [4, 12, 20, 28, 36, 44, 52, 60]


# ======================================================================================== network

def test_heads():
    """CLIP's encoders (36, 37) have heads of 64 (38), co-attention has 4 of 256 channels (57)."""
    with torch.device("meta"):  # sizes only
        model = stage2.WeakCLIP(clip.CLIP(), torch.zeros(21, 5, dtype=torch.int64))
    for part, heads in ((model.clip.visual, 12), (model.clip, 8)):
        assert [block.attn.heads for block in part.transformer.resblocks] == [heads] * 12
    attention = [m for m in model.modules() if isinstance(m, stage2.MultiHeadAttention)]
    assert [(m.heads, m.proj.in_features) for m in attention] == [(4, 256)] * 12


def test_dropout():
    """A tenth after projections, in the MLP and on its output (58), and of whole channels before
    the last convolution (21a)."""
    model = network()
    drops = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Dropout, nn.Dropout2d))}
    layers = [f"coattention.{side}_layers.{i}" for side in ("text", "visual") for i in range(3)]
    places = ("self_attn.drop", "cross_attn.drop", "mlp.2", "drop")
    assert set(drops) == {"decoder.drop", *(f"{layer}.{p}" for layer in layers for p in places)}
    assert {m.p for m in drops.values()} == {0.1} and type(model.decoder.drop) is nn.Dropout2d


def test_batch_statistics_are_those_of_all_gpus(monkeypatch):
    """Of one process its own (3a)."""
    monkeypatch.setattr(nn.Module, "to", lambda model, device: model)  # there may be no GPU
    machine = stage1.Machine("cpu", amp=False)
    machine.world, machine.cuda = 2, True
    kinds = [type(where.place(nn.BatchNorm2d(4))) for where in (CPU, machine)]
    assert kinds == [nn.BatchNorm2d, nn.SyncBatchNorm]


def spread(parameter):
    """Standard deviation of the numbers, whose mean is about 0."""
    assert abs(parameter.mean()) < 0.1 * parameter.std()
    return parameter.std().item()


def test_start_of_the_trained_parts():
    """Prompts (7c), gamma and beta (7d), co-attention (59), adapter (2b), decoder (4a, 4b)."""
    torch.manual_seed(0)
    model, decoder = network(), stage2.TextGuidedDecoder(789, 256, 256, 21)
    assert (model.gamma == 0.1).all() and (model.beta == 0.1).all()
    assert spread(model.contexts) == pytest.approx(0.88, rel=0.1) and model.contexts.max() <= 2
    linear = [m for m in stage2.CoAttention(512, 256, 4, True).modules() if type(m) is nn.Linear]
    *convs, last = [m for m in decoder.modules() if type(m) is nn.Conv2d]
    for modules, std in (
            (linear, 0.02), ([stage2.PyramidAdapter(768).level2[1]], 0.0104), ([last], 0.0361),
            (convs[:4], (2 / 256) ** 0.5), (convs[4:], (2 / 256 / 9) ** 0.5)):
        for module in modules:
            assert spread(module.weight) == pytest.approx(std, rel=0.05)
    assert last is decoder.classify and last.weight.abs().max() <= 1 / 16 and last.bias.any()
    zero = [module.bias for module in (*linear, *convs) if module.bias is not None]
    assert len(zero) == 2 * 3 * 4 + 4 + 8 and not any(bias.any() for bias in zero)


def test_names_are_the_datasets_own_words_in_five_tokens():
    """VOC's and COCO's (13b), background first, without a template (13c)."""
    tokens = stage2.name_tokens(VOC_CLASSES, 77)
    assert tokens.shape == (21, 5) and stage2.name_tokens(COCO_CLASSES, 77).shape == (81, 5)
    assert torch.equal(tokens, clip.tokenize(list(VOC_CLASSES))[:, :5])
    assert (tokens == 49406).sum() == (tokens == 49407).sum() == 21


# =========================================================================== augmentation, stage 2

def test_photos_are_resized_bilinearly_without_low_pass():
    """Of each cell of 4 x 4 the inner 2 x 2 count (73)."""
    image = photo(8, 8) // 2 * 2
    middle = image.reshape(2, 4, 2, 4, 3)[:, 1:3, :, 1:3].mean((1, 3)).round()
    assert np.array_equal(stage2.resize_image(image, (2, 2)), middle)


@pytest.fixture()
def sample(tmp_path, monkeypatch):
    """sample(stage, image, label, rng) -> (grey levels, labels) of stage 2 or 3, crop 64, without
    change of colours."""
    monkeypatch.setattr(stage2, "photometric_distortion", lambda rng, image: image)

    def sample(stage, image, label, rng):
        write_label(tmp_path / "a.png", label)
        given = SimpleNamespace(image=lambda image_id: image, classes=CLASSES), tmp_path, 64
        if stage is stage2:
            x, y = stage2.seeded_image(*given, stage2.PAPER, "a", rng)
        else:
            x, y = stage3.masked_image(*given, "a", rng)
        assert not x[:, y == IGNORE].any()  # padding is 0 after normalising, and unsure
        return grey_levels(x, CLIPS if stage is stage2 else IMAGENETS), y.numpy()
    return sample


@pytest.mark.parametrize("coin, step", [(0.5, 1), (0.4999, -1)])
@pytest.mark.parametrize("stage, share, drawn, padding", [
    (stage2, 0, [(0.5, 2), (0, 0), (0, 0)], np.s_[32:]),
    (stage2, 1 / 3, [(0.5, 2), (0, 0), (0, 0)], np.s_[:0]),
    (stage2, 1, [(0.5, 2), (0, 64), (0, 64)], np.s_[:0]),
    (stage3, 0, [(0.5, 1.5), (-32, 0), (-32, 0)], np.s_[:32]),
    (stage3, 0.5, [(0.5, 1.5), (0, 0), (0, 0)], np.s_[:0]),
    (stage3, 1, [(0.5, 1.5), (0, 32), (0, 32)], np.s_[:0])])
def test_scale_flip_and_padding(sample, stage, share, drawn, padding, coin, step):
    """Half to twice the size (73), a flip for each second (75), padding right and below (77);
    stage 3 half to one and a half, padded on any side (84). A photo of 64 x 64, crop 64."""
    image = photo(64, 64)
    label, dice = image[..., 0] % 4, Dice(share, coin)
    rgb, y = sample(stage, image, label, dice)
    assert dice.drawn == drawn and next(dice.coins, None) is None
    if 0 < share < 1:  # its own size
        assert np.array_equal(rgb, image[:, ::step]) and np.array_equal(y, label[:, ::step])
    assert (y[padding] == IGNORE).all() and (y[:, padding] == IGNORE).all()
    assert (y == IGNORE).sum() == (64 * 64 - 32 * 32 if share == 0 else 0)


@pytest.mark.parametrize("stage", [stage2, stage3])
def test_masks_follow_their_image(sample, stage):
    """Colours tell the class, so a shifted mask is seen, at any scale (73, 84)."""
    rng = np.random.default_rng(0)
    label = np.kron(rng.integers(0, 4, (5, 5)), np.ones((20, 24))).astype(np.uint8)
    image = (255 * np.eye(4)[label][..., 1:]).astype(np.uint8)
    for seed in range(30):
        rgb, y = sample(stage, image, label, np.random.default_rng(seed))
        seen = np.where(rgb.max(2) < 128, 0, 1 + rgb.argmax(2))
        assert (seen != y)[y != IGNORE].mean() < 0.05


def test_long_photos_may_have_four_crops(sample, monkeypatch):
    """(2048, 512) times the ratio at a crop of 512 (73), (256, 64) at 64 (102)."""
    sizes, real = [], stage2.resize_image
    monkeypatch.setattr(stage2, "resize_image", lambda x, size: sizes.append(size) or real(x, size))
    for share in (1 / 3, 0):
        sample(stage2, photo(10, 1000), np.zeros((10, 1000), np.uint8), Dice(share, 1))
    assert sizes == [(3, 256), (1, 128)]


class Corners(Dice):
    """Draws the corners (0, 0), (1, 1), (2, 2), ..."""

    def integers(self, low, high):
        self.drawn.append((low, high))
        return (len(self.drawn) - 1) // 2


def crop_of(label):
    """(the corner of a crop of 4 x 4, after how many draws)."""
    dice = Corners()
    return stage2.random_crop(dice, np.asarray(label, np.uint8), 4), len(dice.drawn) // 2


def test_a_crop_is_drawn_again_up_to_10_times_while_one_label_covers_three_quarters():
    """The eleventh stands; unsure is no label (74)."""
    label = np.zeros((30, 40))
    label[:, 3::4] = 1
    assert crop_of(label) == ((10, 10), 11)  # 12 of 16 are three quarters
    label[0, 0], label[1, 3] = 1, IGNORE
    assert crop_of(label) == ((0, 0), 1)  # 11 of 15
    unsure = np.full((30, 40), IGNORE)
    unsure[0, :4] = 1
    assert crop_of(unsure)[1] == 11
    unsure[0, :2] = 0
    assert crop_of(unsure)[1] == 1  # 2 of 4 labelled pixels, of 16


def hsv(pixel, degrees=0, saturation=1):
    """The pixel with its hue turned and its saturation scaled."""
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in pixel))
    turned = colorsys.hsv_to_rgb((h + degrees / 360) % 1, min(1, s * saturation), v)
    return [255 * c for c in turned]


SHIFT, FACTOR, TURN = (-32, 32), (0.5, 1.5), (-18, 17)
RED, PALE = (200, 100, 50), (200, 150, 120)


@pytest.mark.parametrize("pixel, coins, share, expected, drawn", [
    (RED, "00000", 1, RED, []),
    ((230, 0, 50), "10000", 1, (255, 32, 82), [SHIFT]),
    (RED, "01000", 0, (100, 50, 25), [FACTOR]),
    ((101, 100, 255), "01100", 1, (151, 150, 255), [FACTOR]),  # cut, not rounded
    (PALE, "00010", 0, hsv(PALE, saturation=0.5), [FACTOR]),
    (RED, "00001", 0, hsv(RED, degrees=-36), [TURN]),  # 18 steps of 2 degrees
    ((250, 125, 125), "01110", 1, (255, 153, 153), [FACTOR, FACTOR]),  # first: 255 187 187
    ((250, 125, 125), "01010", 1, (255, 93, 93), [FACTOR, FACTOR]),  # last: it gets 250 62 62
    (RED, "11111", 0.5, None, [SHIFT, FACTOR, FACTOR, TURN])])
def test_photometric_distortion(pixel, coins, share, expected, drawn):
    """Its steps in order (76). Coins: brightness, contrast, contrast first?, saturation, hue."""
    dice = Dice(share, *(0.4999 if coin == "1" else 0.5 for coin in coins))
    out = stage2.photometric_distortion(dice, np.full((1, 1, 3), pixel, np.uint8))[0, 0]
    assert dice.drawn == drawn and next(dice.coins, None) is None
    if expected:
        assert out.tolist() == pytest.approx(expected, abs=3 if "1" in coins[3:] else 0)


# ======================================================================= windows, views and masks

@torch.no_grad()
def test_a_window_is_padded_and_its_logits_cut_back():
    """To a multiple of 16 (30a), at least to 32, below which there is no stride 32 (34)."""
    model, x = network().eval(), torch.randn(1, 3, 48, 64)
    text, shown = model.encode_text(), []
    model.register_forward_pre_hook(lambda module, given: shown.append(given[0].shape[2:]))
    odd, padded = x[..., :41, :41], F.pad(x[..., :41, :41], (0, 7, 0, 7))
    odd, padded = (stage2.window_logits(model, window, text) for window in (odd, padded))
    torch.testing.assert_close(odd, padded[..., :41, :41])
    assert shown == [(48, 48), (48, 48)]
    assert stage2.window_logits(model, x[..., :5, :40], text).shape == (1, 4, 5, 40)
    with pytest.raises(ValueError, match="32 x 32 is the least"):
        model(torch.randn(1, 3, 31, 64))


def test_views_and_mirrors():
    """Short side crop x scale, long side at most four times that, each mirrored (30b, 102)."""
    args = Namespace(scales=[0.5, 1], flip=True)
    views = list(stage2.make_views(photo(50, 70), args, CLIPS, 64, 256))
    assert [tuple(x.shape[2:]) for x, _ in views] == [(32, 45)] * 2 + [(64, 90)] * 2
    (x, plain), (mirror, mirrored) = views[2:]
    assert (plain, mirrored) == (False, True) and torch.equal(mirror.flip(3), x)
    long = [x.shape[2:] for x, _ in stage2.make_views(photo(10, 1000), args, CLIPS, 64, 256)]
    assert long[::2] == [(1, 128), (3, 256)]


VOC, VOC_TEST, COCO = ((3, 3), (83, 5, 3)), ((1, 3), (112, 2, 3)), ((1, 3), (67, 3, 4))


@pytest.mark.parametrize("data, masks, test", [
    ("a/VOC2012", VOC, VOC_TEST), ("holiday", VOC, VOC_TEST), ("a/COCO2014", COCO, COCO)])
def test_constants_of_the_crf_after_inference(data, masks, test):
    """Of stage 2's masks (31) and at stage 3's test (72); other datasets have VOC's."""
    args = Namespace(data=data, crf=True)
    assert stage2.mask_crf(args) == masks
    assert stage2.mask_crf(args, stage3.SEGMENT_CRF) == test


@pytest.mark.parametrize("allowed, winners", [(None, [0, 1, 3, 4]), ([0, 2, 3], [0, 3])])
def test_masks_the_crf_gets_the_winning_classes_floored_and_not_renormalised(
        monkeypatch, allowed, winners):
    """(28a), of the classes that the image's labels allow (28b). Its answer decides."""
    torch.manual_seed(0)
    probs, image, given = torch.rand(5, 6, 7).softmax(0), photo(6, 7), []
    probs[2] = 0.01  # never wins
    probs[:, 0, 0] = torch.tensor([1 - 4e-9, 1e-9, 1e-9, 1e-9, 1e-9])
    monkeypatch.setattr(stage2, "dense_crf", lambda *a: given.append(a) or a[0].flip(1))
    mask = stage2.mask_from(probs, image, VOC, allowed)
    (p, rgb, *constants), = given
    assert torch.equal(p[0], probs[winners].clamp(min=1e-5)) and p[0, 1, 0, 0] == 1e-5
    assert np.array_equal(rgb[0].permute(1, 2, 0), image) and tuple(constants) == VOC
    assert np.array_equal(mask, np.array(winners)[p[0].flip(0).argmax(0)])


# ==================================================================================== defaults

SCALES = [0.5, 0.75, 1, 1.25, 1.5]


@pytest.mark.parametrize("stage, expected", [
    (stage1, dict(batch_size=16, crop=512, arch="resnet50", weights="imagenet", clip="ViT-B/16",
                  method="classifier")),  # (47, 50, 52)
    (stage2, dict(lr=1e-4, crop=512, clip="ViT-B/16", variant="paper", set=[], flip=True,
                  scales=[*SCALES, 1.75], label_filter=False)),  # (74, 79, 28b, 30b)
    (stage3, dict(lr=5e-3, crop=448, iters=20_000, batch_size=16, arch="resnet101", flip=True,
                  weights="imagenet", scales=SCALES))])  # (83, 84, 85, 88)
def test_defaults(stage, expected):
    args = vars(stage.parse_args(["--data", "x"]))
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("weights, lr", [("none", 0.01), ("file", 0.1)])
def test_stage_1_learns_for_five_epochs(
        call, dataset, resnet_file, tmp_path, monkeypatch, weights, lr):
    """So 3,305 iterations of 16 for VOC's 10,582 images (50), here of 2 for 6."""
    given = []
    monkeypatch.setattr(stage1, "seeds_from_classifier", lambda *args: given.append(args[2]) or {})
    call("stage1_cam.py", "--data", dataset, "--runs", tmp_path, "--batch-size", 2, "--arch",
         "resnet18", "--weights", resnet_file if weights == "file" else weights)
    assert (given[0].iters, given[0].lr) == (15, lr)


@pytest.mark.parametrize("name, iters, batch_size", [
    ("VOC2012", 20_000, 16), ("COCO2014", 40_000, 24)])
def test_stage_2_learns_longer_on_coco(name, iters, batch_size):
    """(80)"""
    args = stage2.parse_args(["--data", f"any/{name}"])
    assert (args.iters, args.batch_size) == (iters, batch_size)


# ================================================================================ stages 1 and 3

def test_imagenet_weights_are_torchvisions_first_with_their_hash_checked(monkeypatch):
    """(47)"""
    def fetch(url, digest, folder, instead):
        raise ValueError(f"{url} has {digest}")
    monkeypatch.setattr(clip, "fetch", fetch)
    with pytest.raises(ValueError, match="/resnet50-0676ba61.pth has 0676ba61$"):
        stage1.resnet("resnet50", "imagenet")


def test_networks():
    """Output stride 16, no bias (47); output stride 8 by dilation, DeepLabV2's head (83)."""
    x, net = torch.randn(1, 3, 64, 64), stage1.Classifier("resnet50", "none", 5).eval()
    assert net.maps(x).shape == (1, 5, 4, 4) and net.classifier.bias is None
    torch.testing.assert_close(net(x), net.maps(x).mean((2, 3)))
    net = stage3.DeepLab("resnet50", "none", 6).eval()
    for layer, d in ((6, 2), (7, 4)):
        convs = [m for m in net.backbone[layer].modules() if isinstance(m, nn.Conv2d)]
        assert {m.dilation for m in convs} == {(1, 1), (d, d)}
    head = [(c.kernel_size[0], c.dilation[0], c.padding[0]) for c in net.classifier]
    assert head == [(3, d, d) for d in (6, 12, 18, 24)] and net(x).shape == (1, 6, 8, 8)
    torch.testing.assert_close(net(x), sum(conv(net.backbone(x)) for conv in net.classifier))


@pytest.mark.parametrize("share, side, windows, corner", [
    (0, (20, 40), [(-44, 0), (-24, 0)], (44, 24)), (1, (40, 80), [(-24, 0), (0, 16)], (0, 0))])
@pytest.mark.parametrize("coin, step", [(0.5, 1), (0.4999, -1)])
def test_samples_of_stage_1(share, side, windows, corner, coin, step):
    """A long side of 5/8 to 5/4 of the crop, a flip for each second, padding anywhere (52)."""
    data = SimpleNamespace(image=lambda image_id: photo(20, 40), classes=CLASSES)
    dice = Dice(share, coin)
    x, y = stage1.labelled_image(data, {"a": [1, 3]}, 64, "a", dice)
    assert dice.drawn == [(0.625, 1.25), *windows] and y.tolist() == [1, 0, 1]
    (top, left), (h, w) = corner, side
    inside = x[:, top:top + h, left:left + w]
    assert x.shape == (3, 64, 64) and x.count_nonzero() == inside.count_nonzero() > 0
    if share == 0:
        assert np.array_equal(grey_levels(inside, IMAGENETS), photo(20, 40)[:, ::step])


def test_class_maps_sum_four_scales_and_their_mirrors():
    """Positive evidence, at stride 4, of the image's own classes, over each maximum (53)."""
    seen, answers = [], [torch.randn(2, 3, n, n + 1) for n in (4, 2, 5, 6)]
    model = SimpleNamespace(maps=lambda x: seen.append(x) or answers[len(seen) - 1])
    cams = stage1.class_maps(model, photo(50, 65), [1, 3], 64, CPU)
    assert [tuple(x.shape[2:]) for x in seen] == [(50, 65), (32, 32), (75, 98), (100, 130)]
    assert all(torch.equal(x[1], x[0].flip(2)) for x in seen)
    assert np.array_equal(grey_levels(seen[0][0], IMAGENETS), photo(50, 65))
    evidence = [part for a in answers for part in (a[:1].relu(), a[1:].relu().flip(3))]
    total = sum(F.interpolate(part, (13, 17), mode="bilinear")[0] for part in evidence)
    torch.testing.assert_close(cams, torch.stack([total[k] / total[k].max() for k in (0, 2)]))
    answers = [-a.abs() for a in answers] * 3
    for size, shown in (((160, 100), (80, 50)), ((25, 20), (60, 48))):  # as training shows photos
        assert not stage1.class_maps(model, photo(*size), [2], 64, CPU).any()  # zeros, not NaN
        assert seen[-4].shape[2:] == shown


def test_seeds_have_a_background_of_15_hundredths():
    """(54)"""
    cams = torch.tensor([[0.149, 0.151, 0.16], [0.1, 0.12, 0.17]])[:, None]
    assert stage1.label_map(stage1.cam_scores(cams, (1, 3)), [3, 7], 0).tolist() == [[0, 3, 7]]


def test_stage_3_averages_logits_not_probabilities():
    """Of five scales and their mirror images, at the photo's size (88)."""
    seen, answers = [], 5 * torch.randn(10, 3, 6, 7)
    model = nn.Identity()
    model.register_forward_hook(lambda m, given, x: seen.append(x) or answers[len(seen) - 1][None])
    predict = stage3.predictor(model, Namespace(scales=SCALES, flip=True), CPU)
    probs = predict(photo(40, 60))
    assert [x.shape[2:] for x in seen[::2]] == [(20, 30), (30, 45), (40, 60), (50, 75), (60, 90)]
    assert all(torch.equal(a.flip(3), b) for a, b in zip(seen[::2], seen[1::2]))
    assert np.array_equal(grey_levels(seen[4][0], IMAGENETS), photo(40, 60))
    big = F.interpolate(answers, (40, 60), mode="bilinear")
    torch.testing.assert_close(probs, (big[::2] + big[1::2].flip(3)).mean(0).div(2).softmax(0))


# ======================================================================= CLIP-ES, --method clip
# Step by step it is compared in test_parity.py; here is what one recorded run cannot show.

def test_texts_of_coco_and_of_a_dataset_of_ones_own():
    """VOC's spelling, 13 synonyms, 23 background words (E2)."""
    foreground, background = stage1.class_texts(Dataset(Path(), "any", COCO_CLASSES, {}))
    changed = [text for name, text in zip(COCO_CLASSES[1:], foreground) if name != text]
    spelled = {"motorbike", "aeroplane", "sofa", "pottedplant", "diningtable"}
    assert len(changed) == 13 + 5 and spelled | {"sknowboard", "dessertspoon"} < set(changed)
    assert set(stage1.BACKGROUND_WORDS) - set(background) == {"keyboard", "sign"}
    assert len(background) == 23
    own = Dataset(Path(), "any", ("background", "Ground_track", "light"), {"light": "sign"})
    own, background = stage1.class_texts(own)
    assert own == ["Ground track", "sign"] and not {"ground", "sign"} & set(background)
    plurals = Dataset(Path(), "any", ("background", "Trees", "grasses", "skies"), {})
    assert not {"tree", "grass", "sky"} & set(stage1.class_texts(plurals)[1])


def test_settings_of_the_published_numbers(monkeypatch):
    """CRF and certainty (E17), threshold of boxes (E10)."""
    assert stage1.CLIP_CRF == COCO
    Q = torch.tensor([[0.95, 0.9499, 0.04], [0.05, 0.0501, 0.96]])[:, None]
    assert stage1.label_map(Q, [7], stage1.CONFIDENCE).tolist() == [[0, IGNORE, 7]]
    made = []
    monkeypatch.setattr(stage1, "write_seeds", lambda make, *rest: made.append(make))
    for name in ("VOC2012", "COCO2014", "holiday"):
        stage1.seeds_from_clip(tiny_clip(), Dataset(Path(), name, CLASSES, {}), {}, CPU, None)
    assert [make.keywords["threshold"] for make in made] == [0.4, 0.7, 0.4]
    arrays, label = made[0](photo(70, 90), [])  # a photo without classes (E21)
    assert arrays["cam"].shape == (0, 18, 23) and label.shape == (70, 90) and not label.any()


@pytest.mark.parametrize("size, expected", [
    ((75, 110), (80, 112)), ((64, 304), (64, 304)), ((5000, 3000), (1024, 624))])
def test_photos_are_stretched_to_multiples_of_16(size, expected):
    """Neither padded nor cropped; a long side over 1,024 is reduced first (E3)."""
    x = stage1.clip_input(np.full((*size, 3), 200, np.uint8))[0]
    assert x.shape[1:] == expected and (grey_levels(x, CLIPS) == 200).all()


@torch.no_grad()
def test_a_sequence_of_77_is_an_image_too():
    """The released code takes 76 patches for a text, and runs the last block twice (E18)."""
    visual, image = tiny_clip().visual, stage1.clip_input(photo(64, 304))
    positions = clip.resize_positions(visual.positional_embedding, 4, 19)
    tokens, _ = stage1.patch_tokens(visual, image, positions)
    expected = nn.Sequential(*visual.transformer.resblocks[:-1])(visual.embed(image, positions))
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)
