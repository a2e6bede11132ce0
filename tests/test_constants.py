"""The method's constants, one by one: what a changed number, order or default would break and no other test would see."""
import argparse
import colorsys
import dataclasses
import inspect
import os
import socket
import subprocess
import sys
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
from conftest import CLASSES, ROOT, draw_dataset, tiny_clip
from clip.tokenizer import encode
from eval import COCO_CLASSES, IGNORE, VOC_CLASSES, find_dataset, write_label, write_text

CPU = stage1.Machine("cpu", amp=False)
CLIP_NUMBERS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_NUMBERS = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
FIT = inspect.signature(stage1.fit)
SMALL_NET = ["--arch", "resnet18", "--weights", "none"]


def network(switches=stage2.PAPER, crop=64, **sizes):
    model = tiny_clip()
    return stage2.WeakCLIP(model, stage2.name_tokens(CLASSES, model.context_length), switches, crop, **sizes)


def replaced(**fields):
    return dataclasses.replace(stage2.PAPER, **fields)


class Dice:
    """Stands for a random generator: notes what is drawn, and answers `share` of the way; coins are told one by one."""

    def __init__(self, share=0.5, coins=()):
        self.share, self.coins, self.drawn = share, iter(coins), []

    def uniform(self, low, high):
        self.drawn.append((low, high))
        return low + self.share * (high - low)

    def integers(self, low, high):
        self.drawn.append((low, high))
        return low + int(self.share * (high - 1 - low))

    def random(self):
        return next(self.coins)


@pytest.fixture()
def roll(monkeypatch):
    """roll(share, coins): the next samples are augmented with these dice, which are returned."""
    def roll(share, coins=()):
        dice = Dice(share, coins)
        monkeypatch.setattr(np.random, "default_rng", lambda *key: dice)
        return dice
    return roll


class Started(Exception):
    pass


@pytest.fixture()
def start(monkeypatch, tmp_path):
    """start(stage, data, options...) -> what its main() hands to `fit`: model, dataset, losses, rate, args, ..."""
    def start(stage, data, *options):
        def fit(*args, **kwargs):
            raise Started(FIT.bind(*args, **kwargs).arguments)
        small = () if stage is stage2 else SMALL_NET
        options = ["--data", data, "--runs", tmp_path / "runs", "--overwrite", *small, *options]
        with monkeypatch.context() as m:
            m.setattr(stage, "fit", fit)
            m.setattr(sys, "argv", [stage.__name__, *map(str, options)])
            with pytest.raises(Started) as caught:
                stage.main()
        return SimpleNamespace(**caught.value.args[0])
    return start


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """The drawn dataset by VOC's name, with a trainaug list of six whose first two are the train list."""
    folder = draw_dataset(tmp_path_factory.mktemp("data") / "VOC2012")
    lists = folder / "ImageSets" / "Segmentation"
    write_text(lists / "trainaug.txt", (lists / "train.txt").read_text())
    write_text(lists / "train.txt", "train_0\ntrain_1\n")
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return draw_dataset(tmp_path_factory.mktemp("data") / "COCO2014")


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    """A ResNet-18's state dict in a file, which stands for pre-trained weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pt"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


@pytest.fixture()
def photo(tmp_path):
    """photo(image, label) -> (dataset, ids, label folder) with this one image."""
    def photo(image, label):
        write_label(tmp_path / "labels" / "a.png", label)
        return SimpleNamespace(image=lambda i: image, classes=CLASSES), ["a"], tmp_path / "labels"
    return photo


def grey_levels(x, mean, std):
    """Normalised (3, H, W) -> (H, W, 3) grey levels."""
    return (x * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]).permute(1, 2, 0).numpy()


# =============================================================================================================== switches

def test_the_released_list_has_the_train_images_twice(voc, clip_file, start):
    options = [voc, "--seeds", voc / "seeds", "--clip", clip_file]
    trainaug = [f"train_{i}" for i in range(6)]
    assert start(stage2, *options).dataset.ids == trainaug
    assert start(stage2, *options, "--variant", "released").dataset.ids == [*trainaug, "train_0", "train_1"]
    assert start(stage2, *options, "--set", "train_listed_twice=true").dataset.ids == [*trainaug, "train_0", "train_1"]
    assert start(stage2, *options, "--variant", "released", "--split", "train").dataset.ids == ["train_0", "train_1"]


def test_normalisation_is_clips_in_paper_and_imagenets_in_released(voc, clip_file, start, monkeypatch):
    """In the samples, in the image of the boundary loss's CRF, and in inference."""
    clips = tuple(tuple(255 * v for v in numbers) for numbers in CLIP_NUMBERS)
    for variant, expected in (("paper", clips), ("released", IMAGENET_NUMBERS)):
        run = start(stage2, voc, "--seeds", voc / "seeds", "--clip", clip_file, "--crop", 64, "--variant", variant)
        seen = [run.dataset.mean_std]
        with monkeypatch.context() as m:
            m.setattr(stage2, "weakclip_losses", lambda *given: seen.append(given[-2:]))
            m.setattr(stage2, "make_views", lambda image, scales, flip, mean_std, crop: seen.append(mean_std) or [])
            m.setattr(stage2, "probabilities", lambda *given: None)
            run.losses(run.model, torch.zeros(1, 3, 64, 64), None)
            stage2.predictor(run.model, run.args, 64, CPU)(np.zeros((64, 64, 3), np.uint8))
        assert len(seen) == 3 and all(tuple(map(tuple, s)) == expected for s in seen), variant
    grey = stage1.normalise(np.full((1, 1, 3), 200, np.uint8), *clips).flatten().tolist()
    assert grey == pytest.approx([(200 / 255 - m) / s for m, s in zip(*CLIP_NUMBERS)], rel=1e-5)


def test_drop_path_rises_from_0_to_a_tenth_over_the_blocks_and_only_in_training(monkeypatch):
    torch.manual_seed(0)
    twelve = clip.CLIP(embed_dim=64, image_resolution=32, vision_layers=12, vision_width=64, transformer_width=64,
                       transformer_layers=1)
    tokens, x, rates = stage2.name_tokens(CLASSES, 77), torch.randn(2, 3, 32, 32), []
    released = stage2.WeakCLIP(twelve, tokens, stage2.RELEASED, 32)
    with monkeypatch.context() as m:
        m.setattr(stage2, "drop_path", lambda x, rate: rates.append(rate) or x)
        released.train().encode_image(x)
        assert rates == pytest.approx([0.1 * i / 11 for i in range(1, 12) for _ in "am"])  # attention and MLP
        rates.clear()
        released.eval().encode_image(x)
        stage2.WeakCLIP(twelve, tokens, stage2.PAPER, 32).train().encode_image(x)
        assert not rates
    out = stage2.drop_path(torch.ones(20_000, 2, 3), 0.1)
    assert torch.equal(out, out[:, :1, :1].expand_as(out))                          # an image's branch as a whole
    assert sorted(set(out.flatten().tolist())) == pytest.approx([0, 1 / 0.9]) and abs(out.mean() - 1) < 0.01


def test_score_loss_is_the_mean_over_labelled_pixels_or_over_all():
    torch.manual_seed(0)
    score, y = torch.rand(2, 4, 6, 8) * 2 - 1, torch.randint(0, 4, (2, 12, 16))
    y[:, :5] = IGNORE
    big = F.interpolate(score / 0.07, (12, 16), mode="bilinear", align_corners=False)
    over_valid = F.cross_entropy(big, y, ignore_index=255)
    torch.testing.assert_close(stage2.score_loss(score, y), over_valid)
    torch.testing.assert_close(stage2.score_loss(score, y, over_valid=False), over_valid * 7 / 12)
    x, logits = torch.randn(2, 3, 12, 16), torch.randn(2, 4, 3, 4)
    terms = lambda s: stage2.weakclip_losses(logits, score, x, y, s, (100.0,) * 3, (50.0,) * 3)
    whole, half = terms(stage2.PAPER), terms(replaced(score_weight=0.2, boundary_weight=0.5))
    torch.testing.assert_close(whole["loss_score"], 0.4 * over_valid)
    torch.testing.assert_close(terms(replaced(score_loss_over_valid=False))["loss_score"], 0.4 * over_valid * 7 / 12)
    assert all(torch.isclose(half[k], whole[k] / 2) for k in ("loss_score", "loss_boundary"))
    assert list(terms(replaced(score_weight=0.0, boundary_weight=0.0))) == ["loss_seeding"]


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
@torch.no_grad()
def test_with_the_class_embedding_once_the_global_embedding_is_clips(size):
    x, model = torch.randn(2, 3, *size), network()
    torch.testing.assert_close(model.encode_image(x)[1], model.clip.encode_image(x))
    twice = network(replaced(class_embedding_once=False))
    twice.clip.visual.class_embedding.mul_(2)
    double = twice.clip.encode_image(x)
    twice.clip.visual.class_embedding.div_(2)
    torch.testing.assert_close(twice.encode_image(x)[1], double)


@pytest.mark.parametrize("text", ["drop_path=1", "drop_path=-0.1", "drop_path=nan", "boundary_weight=nan",
                                  "boundary_weight=-1", "boundary_weight=inf", "score_weight=nan", "score_weight=-1",
                                  "loss_crf_sxy=0", "loss_crf_sxy=inf"])
def test_settings_out_of_range_are_refused(text):
    with pytest.raises(ValueError, match=text.partition("=")[0] + " is from"):
        stage2.choose_switches("paper", [text])


# ======================================================================================================= CLIP and network

@pytest.fixture(scope="module")
def full_size():
    """WeakCLIP around ViT-B/16 for VOC, at its real sizes, without memory behind it."""
    tokens = stage2.name_tokens(VOC_CLASSES, 77)
    with torch.device("meta"):
        return stage2.WeakCLIP(clip.CLIP(), tokens, stage2.PAPER)


def test_heads_are_width_over_64(full_size):
    heads = lambda model: [[b.attn.heads for b in t.resblocks] for t in (model.visual.transformer, model.transformer)]
    assert heads(full_size.clip) == [[12] * 12, [8] * 12]
    small = clip.CLIP(embed_dim=64, image_resolution=32, vision_layers=1, vision_width=128, transformer_width=192,
                      transformer_layers=2, vocab_size=64)
    assert heads(small) == heads(clip.CLIP.from_state_dict(small.state_dict())) == [[2], [3, 3]]
    attention = [m for m in full_size.coattention.modules() if isinstance(m, stage2.MultiHeadAttention)]
    assert len(attention) == 12 and all((m.heads, m.proj.in_features) == (4, 256) for m in attention)


def test_dropout_is_a_tenth_everywhere_and_acts_in_training_only(full_size):
    for model in (full_size, network()):
        drops = {n: m for n, m in model.train().named_modules() if type(m).__name__.startswith("Dropout")}
        assert type(drops.pop("decoder.drop")) is nn.Dropout2d and model.decoder.drop.p == 0.1
        assert len(drops) == 4 * 3 * 2 and all(type(m) is nn.Dropout and m.p == 0.1 for m in drops.values())
        ends = [f"{s}_layers.{i}.{place}" for s in ("text", "visual") for i in range(3)
                for place in ("self_attn.drop", "cross_attn.drop", "mlp.2", "drop")]
        assert sorted(drops) == sorted(f"coattention.{e}" for e in ends)
    dropped = {}
    for name, m in (*drops.items(), ("decoder.drop", model.decoder.drop)):
        m.register_forward_hook(lambda m, i, o, name=name: dropped.update({name: (i[0], o)}))
    attention = model.coattention.text_layers[0].cross_attn
    attention.register_forward_hook(lambda m, i, o: dropped.update(out=o))
    model.decoder.classify.register_forward_pre_hook(lambda m, i: dropped.update(classify=i[0]))
    x = torch.randn(4, 3, 64, 64)
    model(x)
    pairs = {n: dropped[n] for n in (*drops, "decoder.drop")}
    assert all((i[o == 0].numel() > 0 and torch.allclose(o[o != 0], i[o != 0] / 0.9)) for i, o in pairs.values())
    assert dropped["out"] is pairs["coattention.text_layers.0.cross_attn.drop"][1]  # after the projection
    channels = pairs["decoder.drop"][1].flatten(2)
    assert dropped["classify"] is pairs["decoder.drop"][1] and (channels == 0).all(2).any()  # whole channels
    model.eval()(x)
    assert all(torch.equal(*dropped[n]) for n in pairs)


def spread(parameter, std, tolerance=0.03):
    return abs(parameter.mean().item()) < 0.1 * std and parameter.std().item() == pytest.approx(std, rel=tolerance)


def test_start_of_prompts_adapter_and_coattention():
    torch.manual_seed(0)
    wide = clip.CLIP(embed_dim=64, image_resolution=32, vision_layers=3, vision_width=64, transformer_width=1024,
                     transformer_heads=1, transformer_layers=1, vocab_size=64)
    model = stage2.WeakCLIP(wide, torch.tensor([[62, 5, 63], [62, 6, 63]]))
    assert model.contexts.shape == (1, 8, 1024) and spread(model.contexts, 0.88) and 1.9 < model.contexts.abs().max() <= 2
    assert all(torch.equal(p, torch.full((64,), 0.1)) for p in (model.gamma, model.beta))
    linear = [m for m in stage2.CoAttention(512, 256, 4, True).modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 2 * 3 * 10 + 4 and all(spread(m.weight, 0.02) for m in linear)
    assert not any(m.bias.any() for m in linear if m.bias is not None)
    assert spread(stage2.PyramidAdapter(768).level2[1].weight, 0.0104)             # torch's default


def test_start_of_the_decoder_is_he_over_fan_out_but_for_the_last_convolution():
    torch.manual_seed(0)
    decoder = stage2.TextGuidedDecoder(789, 256, 256, 21)
    convs = {n: m for n, m in decoder.named_modules() if isinstance(m, nn.Conv2d)}
    last = convs.pop("classify")
    stds = {(1, 1): (2 / 256) ** 0.5, (3, 3): (2 / 256 / 9) ** 0.5}                  # 0.088 and 0.029
    assert len(convs) == 4 + 4 + 7 and all(spread(m.weight, stds[m.kernel_size]) for m in convs.values())
    assert all(m.weight.abs().max() > 3.5 * stds[m.kernel_size] for m in convs.values())  # normal, not uniform
    assert not any(m.bias.any() for m in convs.values() if m.bias is not None)
    assert sum(m.bias is not None for m in convs.values()) == 8
    assert spread(last.weight, 0.0361, 0.1) and last.weight.abs().max() <= 1 / 16 and last.bias.any()  # torch's default


def test_names_are_vocs_own_words_in_five_tokens(voc, tmp_path):
    assert VOC_CLASSES == (
        "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
        "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
    (tmp_path / "new" / "JPEGImages").mkdir(parents=True)
    assert find_dataset(str(tmp_path / "new")).classes == VOC_CLASSES               # no classes.txt
    tokens = stage2.name_tokens(VOC_CLASSES, 77)
    assert tokens.shape == (21, 5) and stage2.name_tokens(COCO_CLASSES, 77).shape == (81, 5)
    for row, name in zip(tokens.tolist(), VOC_CLASSES):                             # no template
        ids = [49406, *encode(name), 49407]
        assert row == ids + [0] * (5 - len(ids))


def test_digests_are_those_of_openais_archives(monkeypatch):
    assert clip.MODELS == {
        "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"}
    monkeypatch.setattr(clip.weights, "cached_file", lambda url, digest, instead: (url, digest))
    url, digest = clip.locate("ViT-B/16")
    assert digest == clip.MODELS["ViT-B/16"] and url.startswith("https://openaipublic.")
    assert url.endswith(f"/clip/models/{digest}/ViT-B-16.pt") and stage2.parse_args(["--data", "x"]).clip == "ViT-B/16"


# ================================================================================================================= losses

def test_losses_are_at_an_eighth_and_their_crf_sees_training_logits_and_the_augmented_image(
        voc, clip_file, start, monkeypatch):
    run = start(stage2, voc, "--seeds", voc / "seeds", "--clip", clip_file, "--crop", 64)
    x, y = (torch.stack(t) for t in zip(run.dataset[0, 0], run.dataset[1, 1]))
    x, y = torch.cat([x, x], 3), torch.cat([y, y], 2)                                # (2, 3, 64, 128)
    passes, crf, at = [], [], {}
    run.model.register_forward_hook(lambda m, i, o: passes.append((m.training, m.decoder.training, i[0], *o)))
    monkeypatch.setattr(stage2, "dense_crf", lambda p, small, **k: crf.append((p, small, k)) or p)
    for name in ("loss_labels", "mean_cross_entropy"):
        real = getattr(stage2, name)
        noted = lambda a, b, *c, name=name, real=real: at.update({name: (a, b)}) or real(a, b, *c)
        monkeypatch.setattr(stage2, name, noted)
    terms = run.losses(run.model.train(), x, y)
    (training, decoder, image, logits, _), = passes                                  # one pass, none for the CRF alone
    assert training and decoder and image is x and list(terms) == ["loss_seeding", "loss_boundary", "loss_score"]
    (p, small, constants), = crf
    torch.testing.assert_close(p, stage2.loss_probs(logits, (8, 16)).clamp(min=1e-4).detach())
    assert torch.equal(small, stage2.crf_image(x, (8, 16), stage2.CLIP_MEAN, stage2.CLIP_STD)) and not p.requires_grad
    assert constants == dict(gaussian=(3, 3), bilateral=(80.0, 13, 10))
    assert at["loss_labels"] == (y, (8, 16)) and at["mean_cross_entropy"][0].shape == (2, 4, 64, 128)
    assert inspect.signature(stage1.dense_crf).parameters["iterations"].default == 10


# =================================================================================================== augmentation, stage 2

def test_fit_size_obeys_both_sides_and_is_never_0():
    assert stage2.fit_size(375, 500, 512, 2048) == (512, 683) and stage2.fit_size(500, 375, 512, 2048) == (683, 512)
    assert stage2.fit_size(100, 1000, 512, 2048) == (205, 2048)                      # the long side is the limit
    assert stage2.fit_size(1, 5000, 256, 1024) == (1, 1024) and stage2.fit_size(5000, 1, 256, 1024) == (1024, 1)


def test_images_are_resized_bilinearly_without_low_pass():
    image = np.random.default_rng(0).integers(0, 128, (8, 8, 3), dtype=np.uint8) * 2
    middle = image.reshape(2, 4, 2, 4, 3)[:, 1:3, :, 1:3].mean((1, 3))                # of each 4 x 4 cell the inner 2 x 2
    assert np.array_equal(stage2.resize_image(image, (2, 2)), middle.round().astype(np.uint8))


@pytest.fixture()
def plain(monkeypatch):
    """Stage 2 without colour jitter -> list of the sizes that images are resized to."""
    sizes = []
    monkeypatch.setattr(stage2, "photometric_distortion", lambda rng, image: image)
    real = stage2.resize_image
    monkeypatch.setattr(stage2, "resize_image", lambda image, size: sizes.append(size) or real(image, size))
    return sizes


def test_stage_2_scales_by_half_to_2_and_flips_half_of_the_time(photo, roll, plain):
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), rng.integers(0, 4, (64, 64), dtype=np.uint8)
    given = photo(image, label)
    for share, side in ((0, 32), (1 / 3, 64), (1, 128)):
        for coin, step in ((0.5, 1), (0.4999, -1)):
            dice = roll(share, [coin])
            x, y = stage2.SeededImages(*given, 64, 0, stage2.PAPER)[0, 0]
            assert plain.pop() == (side, side) and dice.drawn[0] == (0.5, 2) and dice.drawn[1] == (0, max(side - 64, 0) + 1)
            rgb = grey_levels(x, stage2.CLIP_MEAN, stage2.CLIP_STD)
            if side == 64:
                assert np.allclose(rgb, image[:, ::step], atol=1e-3) and np.array_equal(y.numpy(), label[:, ::step])
            elif side == 32:                                                         # 0 and 255 right and below
                small = stage2.resize_image(image, (32, 32))[:, ::step]
                assert plain.pop() and np.allclose(rgb[:32, :32], small, atol=1e-3) and (y[:32, :32] < 4).all()
                assert not x[:, 32:].any() and not x[:, :, 32:].any() and (y[32:] == 255).all() and (y[:, 32:] == 255).all()


def test_stage_2_fits_images_to_crop_and_4_crops(photo, roll, plain):
    roll(1 / 3, [1])
    data, ids, labels = photo(np.zeros((10, 1000, 3), np.uint8), np.zeros((10, 1000), np.uint8))
    stage2.SeededImages(data, ids, labels, 512, 0, stage2.PAPER)[0, 0]
    roll(0, [1])
    stage2.SeededImages(data, ids, labels, 512, 0, stage2.PAPER)[0, 0]
    assert plain == [(20, 2048), (10, 1024)]


def test_stage_2_normalises_after_the_colours(photo, roll, monkeypatch):
    roll(1 / 3, [1])
    monkeypatch.setattr(stage2, "photometric_distortion", lambda rng, image: np.full_like(image, 7))
    given = photo(np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8))
    x, _ = stage2.SeededImages(*given, 64, 0, stage2.PAPER)[0, 0]
    assert np.allclose(grey_levels(x, stage2.CLIP_MEAN, stage2.CLIP_STD), 7, atol=1e-4)


class Corners(Dice):
    """Draws (0, 0), (1, 1), (2, 2), ..."""

    def integers(self, low, high):
        self.drawn.append((low, high))
        return (len(self.drawn) - 1) // 2


def crop_of(label):
    dice = Corners()
    return stage2.random_crop(dice, np.asarray(label, np.uint8), 4), len(dice.drawn) // 2, dice.drawn[0]


def test_a_crop_is_drawn_again_up_to_10_times_while_one_label_covers_three_quarters():
    label = np.zeros((30, 40))
    assert crop_of(label) == ((10, 10), 11, (0, 27))                                 # one label: the eleventh draw stands
    label[:, 3::4] = 1
    assert crop_of(label) == ((10, 10), 11, (0, 27))                                 # 12 of 16 are three quarters
    label[0, 0], label[1, 3] = 1, IGNORE
    assert crop_of(label)[1] == 1                                                    # 11 of 15
    unsure = np.full((30, 40), IGNORE)
    unsure[0, :4] = 1
    assert crop_of(unsure)[1] == 11                                                  # unsure is no label
    unsure[0, :2] = 0
    assert crop_of(unsure)[1] == 1                                                   # 2 of 4 labelled pixels, of 16
    assert crop_of(np.zeros((3, 9)))[2] == (0, 1) and stage2.random_crop(Dice(1), np.zeros((3, 9), np.uint8), 4) == (0, 5)


def distorted(pixel, coins, share):
    """One pixel, distorted, and what was drawn. Coins: brightness, contrast, contrast first?, saturation, hue."""
    dice = Dice(share, [0.4999 if c else 0.5 for c in coins])
    out = stage2.photometric_distortion(dice, np.full((1, 1, 3), pixel, np.uint8))[0, 0].tolist()
    assert next(dice.coins, None) is None
    return out, dice.drawn


def hsv_moved(pixel, degrees=0, saturation=1):
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in pixel))
    return [255 * c for c in colorsys.hsv_to_rgb((h + degrees / 360) % 1, min(1, s * saturation), v)]


def test_photometric_distortion_in_its_steps():
    pixel, near = (200, 100, 50), lambda values: pytest.approx(values, abs=3)
    assert distorted(pixel, (0, 0, 0, 0, 0), 1) == distorted(pixel, (0, 0, 1, 0, 0), 1) == (list(pixel), [])
    assert distorted(pixel, (1, 0, 0, 0, 0), 0) == ([168, 68, 18], [(-32, 32)])
    assert distorted((230, 100, 50), (1, 0, 0, 0, 0), 1)[0] == [255, 132, 82]
    assert distorted((20, 100, 50), (1, 0, 0, 0, 0), 0)[0] == [0, 68, 18]
    for first in (0, 1):
        assert distorted(pixel, (0, 1, first, 0, 0), 0) == ([100, 50, 25], [(0.5, 1.5)])
        assert distorted((101, 100, 255), (0, 1, first, 0, 0), 1)[0] == [151, 150, 255]  # cut, not rounded
    for share, factor in ((0, 0.5), (1, 1.5)):
        out, drawn = distorted((200, 150, 120), (0, 0, 0, 1, 0), share)
        assert out == near(hsv_moved((200, 150, 120), saturation=factor)) and drawn == [(0.5, 1.5)]
    for share, steps in ((0, -18), (1, 17)):                                         # of 2 degrees; the top is left out
        out, drawn = distorted(pixel, (0, 0, 0, 0, 1), share)
        assert out == near(hsv_moved(pixel, degrees=2 * steps)) and drawn == [(-18, 18)]
    assert distorted((250, 125, 125), (0, 1, 1, 1, 0), 1)[0] == near([255, 153, 153])  # contrast first: 255 187 187
    assert distorted((250, 125, 125), (0, 1, 0, 1, 0), 1)[0] == near([255, 93, 93])    # last: saturation gives 250 62 62
    assert [d for d in distorted(pixel, (1, 1, 1, 1, 1), 0.5)[1]] == [(-32, 32), (0.5, 1.5), (0.5, 1.5), (-18, 18)]


# =============================================================================================================== defaults

def test_defaults_of_stage_2(voc, coco, clip_file, start):
    for data, iters, batch in ((voc, 20_000, 16), (coco, 40_000, 24)):
        run = start(stage2, data, "--seeds", data / "seeds", "--clip", clip_file)
        args = run.args
        assert (args.lr, args.iters, args.batch_size, args.crop, args.variant) == (1e-4, iters, batch, 512, "paper")
        assert args.scales == [0.5, 0.75, 1, 1.25, 1.5, 1.75] and not (args.no_flip or args.no_crf or args.label_filter)
        group, = run.optimizer.param_groups
        assert type(run.optimizer) is torch.optim.AdamW and (group["base_lr"], group["weight_decay"]) == (1e-4, 3e-5)
        assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8 and run.dataset.crop == 512
        assert run.dataset.seeds == data / "seeds" and run.frozen == ("clip.",)
        assert run.rate(group, iters // 2) == pytest.approx(5.05e-5) and run.rate(group, iters) == pytest.approx(1e-6)
    args = SimpleNamespace(data="somewhere/VOC2012", no_crf=False)
    assert stage2.mask_crf(args) == ((3, 3), (83, 5, 3)) and stage2.mask_crf(args, stage3.SEGMENT_CRF) == ((1, 3), (112, 2, 3))
    args.data = "holiday"
    assert stage2.mask_crf(args) == ((3, 3), (83, 5, 3)) and stage2.mask_crf(args, stage3.SEGMENT_CRF) == ((1, 3), (112, 2, 3))
    args.data = "somewhere/COCO2014"
    assert stage2.mask_crf(args) == stage2.mask_crf(args, stage3.SEGMENT_CRF) == ((1, 3), (67, 3, 4))
    args.no_crf = True
    assert stage2.mask_crf(args) is None and stage2.mask_crf(args, stage3.SEGMENT_CRF) is None


def test_masks_the_crf_gets_the_winning_classes_floored_and_not_renormalised(monkeypatch):
    torch.manual_seed(0)
    probs, image, given = torch.rand(5, 6, 7).softmax(0), np.arange(6 * 7 * 3, dtype=np.uint8).reshape(6, 7, 3), []
    probs[2] = 0.01                                                                  # never wins
    probs[:, 0, 0] = torch.tensor([1 - 4e-9, 1e-9, 1e-9, 1e-9, 1e-9])
    monkeypatch.setattr(stage2, "dense_crf", lambda *a: given.append(a) or a[0].flip(1))
    for allowed, rows in ((None, [0, 1, 3, 4]), ([0, 2, 3], [0, 3])):
        mask, kept = stage2.mask_from(probs, image, stage2.MASK_CRF["VOC2012"], allowed)
        p, rgb, *constants = given.pop()
        assert kept.tolist() == rows and torch.equal(p[0], probs[rows].clamp(min=1e-5)) and p[0, 1, 0, 0] == 1e-5
        assert torch.equal(rgb[0], torch.from_numpy(image).permute(2, 0, 1)) and constants == [(3, 3), (83, 5, 3)]
        assert np.array_equal(mask, np.array(rows)[p[0].flip(0).argmax(0).numpy()])  # the CRF's answer decides
    stage2.mask_from(probs, image, None)
    assert not given


# ================================================================================================================ stage 1

def small_backward(model):
    model.train()
    loss = model(torch.randn(2, 3, 64, 64)).square().mean()
    loss.backward()
    return {n for n, p in model.named_parameters() if p.grad is not None}


def batchnorms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_stage_1_with_weights_fixes_stem_two_layers_and_batchnorm_and_has_no_momentum(resnet_file):
    torch.manual_seed(0)
    model = stage1.Classifier("resnet18", str(resnet_file), 3)
    given = torch.load(resnet_file)
    assert torch.equal(model.stem[0].weight, given["conv1.weight"])
    assert torch.equal(model.layer4[1].conv2.weight, given["layer4.1.conv2.weight"])
    before = {n: b.clone() for n, b in model.named_buffers()}
    trained = small_backward(model)
    assert {n.split(".")[0] for n in trained} == {"layer3", "layer4", "classifier"} and model.classifier.bias is None
    assert trained == {n for n, p in model.named_parameters() if n.startswith(("layer3", "layer4", "classifier"))}
    assert len(batchnorms(model)) == 20 and not any(m.training for m in batchnorms(model)) and model.layer4.training
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    optimizer = stage1.make_optimizer(model, SimpleNamespace(lr=0.1))
    assert type(optimizer) is torch.optim.SGD and [g["base_lr"] for g in optimizer.param_groups] == [0.1, 1.0]
    assert all((g["momentum"], g["weight_decay"], g["nesterov"]) == (0, 1e-4, False) for g in optimizer.param_groups)
    names = {p: n for n, p in model.named_parameters()}
    old, new = ({names[p] for p in g["params"]} for g in optimizer.param_groups)
    assert old == trained - new and new == {"classifier.weight"}


def test_stage_1_without_weights_trains_all_with_momentum():
    torch.manual_seed(0)
    model = stage1.Classifier("resnet18", "none", 3)
    assert small_backward(model) == {n for n, _ in model.named_parameters()} and all(m.training for m in batchnorms(model))
    groups = stage1.make_optimizer(model, SimpleNamespace(lr=0.01)).param_groups
    assert [g["base_lr"] for g in groups] == pytest.approx([0.01, 0.1])
    assert all((g["momentum"], g["weight_decay"]) == (0.9, 1e-4) for g in groups)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_defaults_of_stage_1(start, resnet_file, tmp_path, monkeypatch):
    """5 epochs of 10,582 images in whole batches of 16 are 3,305 iterations."""
    folder, ids = tmp_path / "many", [f"i{n}" for n in range(10_582)]
    (folder / "JPEGImages").mkdir(parents=True)
    write_text(folder / "classes.txt", "\n".join(CLASSES))
    write_text(folder / "ImageSets" / "Segmentation" / "trainaug.txt", "\n".join(ids))
    write_text(folder / "image_labels.txt", "\n".join(f"{i} cat" for i in ids))
    monkeypatch.setattr(stage1, "check_inputs", lambda data, ids, **options: None)
    for weights, lr in (("none", 0.01), (resnet_file, 0.1)):
        run = start(stage1, folder, "--weights", weights)
        assert (run.args.lr, run.args.iters, run.args.batch_size, run.args.crop) == (lr, 3305, 16, 512)
        assert [g["base_lr"] for g in run.optimizer.param_groups] == pytest.approx([lr, 10 * lr])
    assert run.dataset.crop == 512 and len(run.dataset) == 10_582 and run.rate({"base_lr": 1}, 0) == 1
    assert run.rate({"base_lr": 2}, 661) == pytest.approx(2 * 0.8 ** 0.9)            # polynomial, one epoch of five
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    term, = run.losses(run.model.eval(), x, y).values()
    s = run.model(x)
    torch.testing.assert_close(term, -(y * F.logsigmoid(s) + (1 - y) * F.logsigmoid(-s)).mean())
    args = stage1.parse_args(["--data", "x"])
    assert (args.arch, args.weights) == ("resnet50", "imagenet")


def test_stage_1_has_a_long_side_of_five_eighths_to_five_quarters_of_the_crop(roll):
    ramp = np.broadcast_to(np.arange(50, 90, dtype=np.uint8)[None, :, None], (20, 40, 3))
    data = SimpleNamespace(image=lambda i: ramp, classes=CLASSES)
    samples = stage1.LabelledImages(data, ["a"], {"a": [1, 3]}, 64, 0)
    for share, (h, w), windows in ((0, (20, 40), [(-44, 1), (-24, 1)]), (1, (40, 80), [(-24, 1), (0, 17)])):
        for coin, sign in ((0.5, 1), (0.4999, -1)):
            dice = roll(share, [coin])
            x, y = samples[0, 0]
            assert dice.drawn == [(0.625, 1.25), *windows] and y.tolist() == [1, 0, 1] and x.shape == (3, 64, 64)
            inside = x.ne(0).all(0)
            rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
            assert (len(rows), len(columns)) == (h, min(w, 64)) and not x[:, ~inside].any()
            assert (rows[0], columns[0]) == ((64 - h, 64 - w) if share == 0 else (0, 0))  # padding on any side
            rgb = grey_levels(x, *IMAGENET_NUMBERS)[rows[0], columns[0]:columns[-1] + 1, 0]
            assert (sign * np.diff(rgb) > -1e-3).all() and sign * (rgb[-1] - rgb[0]) > 20  # mirrored or not
            assert not share == 0 or np.allclose(rgb[::sign], ramp[0, :, 0], atol=1e-3)


def test_class_maps_sum_four_scales_and_their_mirrors(monkeypatch):
    torch.manual_seed(0)
    seen, answers = [], [torch.randn(2, 3, n, n + 1) for n in (4, 2, 5, 6)]
    model = SimpleNamespace(maps=lambda x: seen.append(x) or answers[len(seen) - 1])
    image = np.random.default_rng(0).integers(0, 256, (50, 65, 3), dtype=np.uint8)
    cams = stage1.class_maps(model, image, [1, 3], 64, CPU)
    assert [tuple(x.shape[2:]) for x in seen] == [(50, 65), (32, 32), (75, 98), (100, 130)]  # 1, 0.5 (at least 32), 1.5, 2
    assert all(torch.equal(x[1], x[0].flip(2)) for x in seen)
    assert np.allclose(grey_levels(seen[0][0], *IMAGENET_NUMBERS), image, atol=1e-3)
    total = sum(F.interpolate(part, (13, 17), mode="bilinear", align_corners=False)[0]
                for a in answers for part in (a[:1].clamp(min=0), a[1:].clamp(min=0).flip(3)))
    torch.testing.assert_close(cams, torch.stack([total[k] / total[k].max() for k in (0, 2)]))  # the image's classes only
    answers[:], seen[:] = [-a.abs() for a in answers], []
    assert not stage1.class_maps(model, image, [2], 64, CPU).any()                    # no evidence: zeros, not NaN
    seen.clear()
    stage1.class_maps(model, np.zeros((160, 100, 3), np.uint8), [1], 64, CPU)
    assert seen[0].shape == (2, 3, 80, 50)                                            # never larger than in training
    seen.clear()
    stage1.class_maps(model, np.zeros((25, 20, 3), np.uint8), [1], 64, CPU)
    assert seen[0].shape == (2, 3, 60, 48)                                            # nor smaller than its mean


def test_imagenet_weights_are_torchvisions_first_with_their_hash_checked(monkeypatch):
    asked, read = [], []
    with torch.device("meta"):                                        # sizes without memory
        state = torchvision.models.resnet50().state_dict()

        def cached_file(url, digest, instead, folder):
            asked.append((url, digest))
            return folder / "compared"

        def read_state_dict(path):                                    # the reader that runs nothing
            read.append(path.name)
            return state

        monkeypatch.setattr(clip, "cached_file", cached_file)
        monkeypatch.setattr(clip, "read_state_dict", read_state_dict)
        stage1.resnet("resnet50", "imagenet", (None, 1))
    (url, digest), = asked
    assert url.endswith("/resnet50-0676ba61.pth") and digest == "0676ba61" and read == ["compared"]


def test_seeds_have_a_background_of_15_hundredths():
    cams = torch.tensor([0.149, 0.151, 0.16]).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    assert [int(stage1.seeds_from_cams(np.array([3]), c, (8, 8)).max()) for c in cams] == [0, 3, 3]


# ================================================================================================================ stage 3

def test_stage_3_network_and_optimizer(resnet_file):
    torch.manual_seed(0)
    model = stage3.DeepLab("resnet18", "none", 6)
    head = [(c.kernel_size[0], c.dilation[0], c.padding[0]) for c in model.classifier]
    assert head == [(3, d, d) for d in (6, 12, 18, 24)]
    assert all(spread(c.weight, 0.01) and not c.bias.any() for c in model.classifier)
    for layer, d in ((model.backbone[6], 2), (model.backbone[7], 4)):
        convs = [m for m in layer.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert {(c.dilation[0], c.padding[0], c.stride[0]) for c in convs} == {(d, d, 1)}
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        model.eval()
        torch.testing.assert_close(model(x), sum(c(model.backbone(x)) for c in model.classifier))
    optimizer = stage3.make_optimizer(model, 5e-3)
    assert type(optimizer) is torch.optim.SGD and [g["base_lr"] for g in optimizer.param_groups] == [5e-3, 5e-2]
    assert all((g["momentum"], g["weight_decay"]) == (0.9, 5e-4) for g in optimizer.param_groups)
    assert [{id(p) for p in g["params"]} for g in optimizer.param_groups] == [
        {id(p) for p in part.parameters()} for part in (model.backbone, model.classifier)]
    assert all(m.training for m in batchnorms(model.train()))                         # BatchNorm: trains without weights,
    fixed = stage3.DeepLab("resnet18", str(resnet_file), 6).train()                   # fixed with
    assert len(batchnorms(fixed)) == 20 and not any(m.training for m in batchnorms(fixed)) and fixed.backbone.training


def test_defaults_of_stage_3_and_its_loss_is_over_labelled_pixels(voc, coco, start):
    for data in (voc, coco):
        run = start(stage3, data, "--masks", data / "seeds")
        args = run.args
        assert (args.lr, args.iters, args.batch_size, args.crop, args.predict) == (5e-3, 20_000, 16, 448, "val")
        assert args.scales == [0.5, 0.75, 1, 1.25, 1.5] and not (args.no_flip or args.no_crf) and run.dataset.crop == 448
        assert [g["base_lr"] for g in run.optimizer.param_groups] == pytest.approx([5e-3, 5e-2])
    assert run.rate({"base_lr": 1}, 4000) == pytest.approx(0.8 ** 0.9)
    args = stage3.parse_args(["--data", "x"])
    assert (args.arch, args.weights) == ("resnet101", "imagenet")
    logits, y = torch.randn(2, 4, 3, 5, requires_grad=True), torch.randint(0, 4, (2, 24, 40))
    y[:, :7] = IGNORE
    big = F.interpolate(logits, (24, 40), mode="bilinear", align_corners=False)       # at the mask's size
    loss = run.losses(lambda image: logits, None, y)["loss_cross_entropy"]
    torch.testing.assert_close(loss, F.cross_entropy(big, y, ignore_index=255))
    nothing = run.losses(lambda image: logits, None, torch.full_like(y, IGNORE))["loss_cross_entropy"]
    nothing.backward()
    assert nothing == 0 and not logits.grad.any()


def test_stage_3_scales_by_half_to_one_and_a_half_and_leaves_colours(photo, roll):
    rng = np.random.default_rng(0)
    image, label = rng.integers(1, 256, (64, 64, 3), dtype=np.uint8), rng.integers(0, 4, (64, 64), dtype=np.uint8)
    samples = stage3.MaskedImages(*photo(image, label), 64, 0)
    for share, side, window in ((0, 32, (-32, 1)), (0.5, 64, (0, 1)), (1, 96, (0, 33))):
        for coin, step in ((0.5, 1), (0.4999, -1)):
            dice = roll(share, [coin])
            x, y = samples[0, 0]
            assert dice.drawn == [(0.5, 1.5), window, window] and next(dice.coins, None) is None
            if side == 64:
                assert np.allclose(grey_levels(x, *IMAGENET_NUMBERS), image[:, ::step], atol=1e-3)
                assert np.array_equal(y.numpy(), label[:, ::step])
            elif side == 32:
                assert not x[:, :32].any() and not x[:, :, :32].any() and (y[:32] == 255).all() and (y[:, :32] == 255).all()
                assert (y[32:, 32:] < 4).all()


def test_stage_3_averages_logits_not_probabilities():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.logits = [], torch.randn(10, 3, 6, 7)

        def forward(self, x):
            self.seen.append(x)
            return 5 * self.logits[len(self.seen) - 1:][:1]
    torch.manual_seed(0)
    model, image = Network().train(), np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    args = argparse.Namespace(scales=[0.5, 0.75, 1, 1.25, 1.5], no_flip=False)
    probs = stage3.predictor(model, args, CPU)(image)
    assert [tuple(x.shape[2:]) for x in model.seen[::2]] == [(20, 30), (30, 45), (40, 60), (50, 75), (60, 90)]
    assert all(torch.equal(a.flip(3), b) for a, b in zip(model.seen[::2], model.seen[1::2])) and not model.training
    assert np.allclose(grey_levels(model.seen[4][0], *IMAGENET_NUMBERS), image, atol=1e-3)
    big = F.interpolate(5 * model.logits, (40, 60), mode="bilinear", align_corners=False)
    torch.testing.assert_close(probs, ((big[::2] + big[1::2].flip(3)).sum(0) / 10).softmax(0))


# ====================================================================================================== several processes

PROCESSES = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from torch import nn
sys.path.insert(0, sys.argv[1])
import stage1_cam as stage1

class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 7
    def __getitem__(self, item):
        g = torch.Generator().manual_seed(item[1])
        return item[1] + torch.randn(3, 8, 8, generator=g), torch.randn(2, generator=g)

def part(rank, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank))
    machine = stage1.Machine("cpu", amp=False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 6), nn.Flatten())
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "base_lr": 0.01}], lr=0.01, momentum=0.9)
    args = SimpleNamespace(iters=3, batch_size=4, accumulate=int(sys.argv[3]), seed=0, workers=0)
    losses = lambda m, x, y: {"loss_square": (m(x) - y).square().mean()}
    stage1.fit(model, Numbers(), optimizer, losses, stage1.poly(3), args, machine, folder, {})
    torch.save(model.state_dict(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()

if __name__ == "__main__":  # the imports are paid for once
    torch.multiprocessing.start_processes(part, (Path(sys.argv[2]),), 2, start_method="fork")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("parts", [1, 2])
def test_all_processes_end_with_the_same_parameters_and_running_statistics(tmp_path, parts):
    (tmp_path / "part.py").write_text(PROCESSES)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, tmp_path / "part.py", ROOT, tmp_path, str(parts)]
    r = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert r.returncode == 0, r.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    saved = stage1.read_checkpoint(tmp_path / "checkpoint.pt")["model"]
    assert first.keys() == second.keys() == saved.keys() and "1.running_var" in first
    assert all(torch.equal(first[k], second[k]) and torch.equal(first[k], saved[k]) for k in first)
    assert first["1.num_batches_tracked"] == 3 * parts and first["1.running_mean"].any()


def two_gpus():
    """What a process sees where there are two GPUs, as far as none is needed."""
    machine = stage1.Machine("cpu", amp=False)
    machine.world, machine.device = 2, torch.device("cuda", 0)
    return machine


def test_several_gpus_share_their_batch_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    weight = model[1].weight
    CPU.synchronise_batchnorm(model)
    assert type(model[1]) is nn.BatchNorm2d                                           # one process: nothing to share
    two_gpus().synchronise_batchnorm(model)
    assert type(model[1]) is nn.SyncBatchNorm and model[1].weight is weight and model.train()[1].training


def test_several_gpus_leave_fixed_batchnorm_fixed(resnet_file):
    for model in (stage1.Classifier("resnet18", str(resnet_file), 3), stage3.DeepLab("resnet18", str(resnet_file), 4)):
        two_gpus().synchronise_batchnorm(model)                                       # as `fit` does, and then
        model.train()
        assert len(batchnorms(model)) == 20 and not any(m.training for m in batchnorms(model))
