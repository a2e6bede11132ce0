"""The three stages' parts: properties, overfitting one batch, exact resume, what is frozen, optimizer and schedule."""
import argparse
import copy
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import stage1_cam as stage1
import stage2_weakclip as stage2
import stage3_segment as stage3
from conftest import CLASSES, draw_scene, tiny_clip
from eval import IGNORE, confusion, find_dataset, scores

CPU = stage1.Machine("cpu", amp=False)


def network(switches=stage2.PAPER, crop=64):
    torch.manual_seed(0)
    model = tiny_clip()
    return stage2.WeakCLIP(model, stage2.name_tokens(CLASSES, model.context_length), switches, crop)


# ==================================================================================================== order of the samples

def test_every_image_once_an_epoch_and_any_iteration_can_be_made_again():
    plan = list(stage1.batch_plan(10, 4, seed=1, step=0, steps=10, machine=CPU))
    indices, samples = zip(*(item for batch in plan for item in batch))
    assert samples == tuple(range(40)) and all(sorted(indices[e:e + 10]) == list(range(10)) for e in range(0, 40, 10))
    assert list(stage1.batch_plan(10, 4, seed=1, step=7, steps=10, machine=CPU)) == plan[7:]
    assert list(stage1.batch_plan(10, 4, seed=2, step=0, steps=10, machine=CPU)) != plan
    parts = []
    for rank in (0, 1):
        machine = copy.copy(CPU)
        machine.rank, machine.world = rank, 2
        parts.append(list(stage1.batch_plan(10, 4, 1, 0, 10, machine)))
    assert [sorted(a + b, key=lambda item: item[1]) for a, b in zip(*parts)] == plan
    assert len(next(stage1.batch_plan(3, 8, 0, 0, 1, CPU))) == 8  # fewer images than a batch: they come again


# =========================================================================================================== augmentation

@pytest.fixture(scope="module")
def colour_coded(tmp_path_factory):
    """A dataset whose pixels' colours tell their class, so that a shifted mask is seen."""
    from eval import write_label, write_text
    folder, rng = tmp_path_factory.mktemp("data") / "coded", np.random.default_rng(0)
    for i in range(3):
        mask = np.kron(rng.integers(0, 4, (5, 4 + i)), np.ones((20, 24))).astype(np.uint8)
        image = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8)[mask]
        (folder / "JPEGImages").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "JPEGImages" / f"{i}.png")
        write_label(folder / "masks" / f"{i}.png", mask)
    write_text(folder / "classes.txt", "\n".join(CLASSES))
    write_text(folder / "ImageSets" / "Segmentation" / "train.txt", "0\n1\n2\n")
    return find_dataset(str(folder))


@pytest.mark.parametrize("stage", [2, 3])
def test_masks_follow_their_image(colour_coded, stage, monkeypatch):
    monkeypatch.setattr(stage2, "photometric_distortion", lambda rng, image: image)
    data, ids, masks = colour_coded, ["0", "1", "2"], colour_coded.root / "masks"
    if stage == 2:
        samples = stage2.SeededImages(data, ids, masks, 64, 0, stage2.PAPER)
        mean, std = stage2.CLIP_MEAN, stage2.CLIP_STD
    else:
        samples, (mean, std) = stage3.MaskedImages(data, ids, masks, 64, 0), (stage1.IMAGENET_MEAN, stage1.IMAGENET_STD)
    wrong = total = padded = 0
    for s in range(30):
        x, y = samples[s % 3, s]
        assert x.shape == (3, 64, 64) and y.shape == (64, 64) and y.dtype == torch.int64
        rgb = x * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        seen = torch.where(rgb.amax(0) < 128, 0, 1 + rgb.argmax(0))
        labelled = y != IGNORE
        wrong, total, padded = wrong + (seen != y)[labelled].sum(), total + labelled.sum(), padded + (~labelled).sum()
        assert (x[:, ~labelled] == 0).all()
    assert wrong / total < 0.02 and padded > 0
    x, y = samples[1, 5]
    again, other = samples[1, 5], samples[1, 6]
    assert torch.equal(again[0], x) and torch.equal(again[1], y) and not torch.equal(other[0], x)


def test_photometric_distortion_keeps_shape_and_moves_colours():
    image, rng = draw_scene(np.random.default_rng(0), 40, 50, [1, 2])[0], np.random.default_rng(1)
    out = [stage2.photometric_distortion(rng, image) for _ in range(20)]
    assert all(o.shape == image.shape and o.dtype == np.uint8 for o in out)
    moved = [np.abs(o.astype(int) - image).mean() for o in out]
    assert max(moved) > 10 and min(moved) < 5


def test_crop_or_pad():
    x = torch.arange(12.0).view(1, 3, 4)
    assert torch.equal(stage1.crop_or_pad(x, 2, 1, 2, 0), torch.tensor([[[6.0, 7], [10, 11]]]))
    assert torch.equal(stage1.crop_or_pad(x, 5, -1, 0, -9)[0], F.pad(x[0], (0, 1, 1, 1), value=-9))


# ================================================================================================================= losses

def test_unsure_pixels_do_not_matter():
    logits, y = torch.randn(2, 4, 6, 6), torch.randint(0, 4, (2, 6, 6))
    y[:, :3] = IGNORE
    other = logits.clone()
    other[:, :, :3] += 100 * torch.randn(2, 4, 3, 6)
    assert torch.equal(stage2.seeding_loss(stage2.loss_probs(logits, (6, 6)), y), stage2.seeding_loss(stage2.loss_probs(other, (6, 6)), y))
    torch.testing.assert_close(stage2.score_loss(logits, y), stage2.score_loss(other, y))
    nothing = torch.full_like(y, IGNORE)
    assert stage2.seeding_loss(stage2.loss_probs(logits, (6, 6)), nothing) == 0 and stage2.score_loss(logits, nothing) == 0


def test_seeding_loss_weighs_sides_not_pixels():
    p = torch.tensor([0.5, 0.25, 0.25]).view(1, 3, 1, 1).expand(1, 3, 2, 4)
    y = torch.tensor([[[0, 0, 0, 0], [0, 0, 0, 1]]])
    assert torch.isclose(stage2.seeding_loss(p, y), torch.tensor(math.log(2) + math.log(4)))


def test_boundary_loss_is_zero_at_agreement_and_flat_where_clipped():
    p = torch.tensor([[0.9, 0.1], [0.999, 0.001]]).T.view(1, 2, 1, 2).clone().requires_grad_()
    q = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).T.view(1, 2, 1, 2)
    assert stage2.boundary_loss(q, q) == 0
    stage2.boundary_loss(p, q).backward()
    assert (p.grad[0, 1, 0, 0] != 0) and p.grad[0, 1, 0, 1] == 0  # 0.9 / 0.001 is over 20


def test_crf_image_and_labels_sit_on_the_same_points():
    """`aligned`: a vertical step in the image and in the labels lands in the same cell."""
    image, seeds = torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.int64)
    image[..., 24:], seeds[..., 24:] = 2, 1
    small = stage2.crf_image(image, (8, 8), (100.0,) * 3, (50.0,) * 3)
    assert torch.equal(small[:, 0] > 150, stage2.loss_labels(seeds, (8, 8)) == 1)


# ============================================================================================================== inference

@pytest.mark.parametrize("length, crop, stride", [(512, 512, 341), (600, 512, 341), (300, 512, 341), (1000, 64, 42), (65, 64, 42)])
def test_windows_cover_the_axis(length, crop, stride):
    starts = stage2.window_starts(length, crop, stride)
    covered = np.zeros(length, bool)
    for s in starts:
        assert s >= 0 and (s + crop <= length or length < crop)
        covered[s:s + crop] = True
    assert covered.all() and len(starts) == len(set(starts)) == max(length - crop + stride - 1, 0) // stride + 1


@torch.no_grad()
def test_one_window_is_the_whole_image_and_padding_is_cut_back():
    model = network().eval()
    text, x = model.encode_text(), torch.randn(1, 3, 48, 64)
    torch.testing.assert_close(stage2.slide(model, x, text, 64, 42), stage2.window_logits(model, x, text, pad=True))
    torch.testing.assert_close(stage2.window_logits(model, x, text, True), stage2.window_logits(model, x, text, False))
    odd = x[..., :41, :57]
    out = stage2.window_logits(model, odd, text, pad=True)
    assert out.shape == (1, 4, 41, 57)
    torch.testing.assert_close(out, stage2.window_logits(model, F.pad(odd, (0, 7, 0, 7)), text, True)[..., :41, :57])
    with pytest.raises(ValueError, match="32 x 32"):
        model(torch.randn(1, 3, 31, 64))
    assert stage2.window_logits(model, x[..., :5, :40], text, pad=True).shape == (1, 4, 5, 40)


@torch.no_grad()
def test_views_and_mirrors():
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    views = list(stage2.make_views(image, [0.5, 1], True, (stage2.CLIP_MEAN, stage2.CLIP_STD), crop=64))
    assert [tuple(x.shape) for x, _ in views] == [(1, 3, 32, 45)] * 2 + [(1, 3, 64, 90)] * 2
    assert [m for _, m in views] == [False, True] * 2 and torch.equal(views[3][0].flip(3), views[2][0])
    model = network().eval()
    text = model.encode_text()
    p = stage2.probabilities(model, views[2:], text, 64, (50, 70))
    mirrored = stage2.probabilities(model, [(x.flip(3), m) for x, m in views[2:]], text, 64, (50, 70))
    torch.testing.assert_close(p, mirrored.flip(2))  # a mirrored photo gives the mirrored answer
    torch.testing.assert_close(p.sum(0), torch.ones(50, 70))


def test_masks_keep_to_the_winning_and_allowed_classes():
    probs = torch.rand(5, 12, 14).softmax(0)
    probs[2] = 1e-9
    image = np.random.default_rng(0).integers(0, 256, (12, 14, 3), dtype=np.uint8)
    mask, kept = stage2.mask_from(probs, image, None)
    assert np.array_equal(mask, probs.argmax(0).numpy()) and 2 not in kept
    for crf in (None, stage2.MASK_CRF["VOC2012"]):
        mask, kept = stage2.mask_from(probs, image, crf, allowed=[0, 3])
        assert set(np.unique(mask)) <= {0, 3} and set(kept) <= {0, 3}
    sure = torch.zeros(5, 12, 14)
    sure[4] = 1
    assert (stage2.mask_from(sure, image, stage2.MASK_CRF["VOC2012"])[0] == 4).all()


def test_seeds_from_cams():
    cams = torch.zeros(2, 4, 5)
    cams[0, 0], cams[1, 3] = 1, 0.6
    seeds = stage1.seeds_from_cams(np.array([3, 7], np.uint8), cams, (16, 20))
    assert seeds.shape == (16, 20) and seeds[0, 0] == 3 and seeds[15, 0] == 7 and seeds[8, 0] == 0
    assert not stage1.seeds_from_cams(np.array([], np.uint8), torch.zeros(0, 4, 5), (16, 20)).any()


@pytest.mark.parametrize("arch, channels", [("resnet18", 512), ("resnet50", 2048)])
def test_output_strides(arch, channels):
    x = torch.randn(1, 3, 64, 64)
    assert stage1.Classifier(arch, "none", 5).eval().maps(x).shape == (1, 5, 4, 4)
    net = stage3.DeepLab(arch, "none", 6).eval()
    assert net.backbone(x).shape == (1, channels, 8, 8) and net(x).shape == (1, 6, 8, 8)


# ====================================================================================================== overfit one batch

@pytest.fixture(scope="module")
def four():
    """Four drawn images (4, 3, 128, 128) uint8-valued, their masks (4, 128, 128) and image labels (4, 3)."""
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng, 128, 128, c) for c in ([1], [2], [3], [1, 2])]
    images = torch.stack([torch.from_numpy(i).permute(2, 0, 1) for i, _ in scenes]).float()
    masks = torch.stack([torch.from_numpy(m.astype(np.int64)) for _, m in scenes])
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    return images, masks, labels


def miou(prediction, truth, K):
    return scores(sum(confusion(t.numpy().astype(np.uint8), p.numpy().astype(np.uint8), K) for p, t in zip(prediction, truth)))["miou"]


def test_stage1_overfits(four):
    images, _, labels = four
    torch.manual_seed(0)
    model = stage1.Classifier("resnet18", "none", 3)
    optimizer = stage1.make_optimizer(model, SimpleNamespace(lr=0.01))
    x = (images - 110) / 60
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.multilabel_soft_margin_loss(model(x), labels)
        loss.backward()
        optimizer.step()
    assert loss < 0.05 and torch.equal((model(x) > 0).float(), labels)


def test_stage2_overfits(four):
    images, masks, _ = four
    model = network(crop=128).train()
    mean, std = stage2.CLIP_MEAN, stage2.CLIP_STD
    x = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    optimizer = stage2.make_optimizer(model, 2e-3)
    for _ in range(120):
        optimizer.zero_grad()
        logits, score = model(x)
        sum(stage2.weakclip_losses(logits, score, x, masks, model.switches, mean, std).values()).backward()
        optimizer.step()
    model.eval()
    prediction = stage2.loss_probs(model(x)[0], (16, 16)).argmax(1)
    assert miou(prediction, stage2.loss_labels(masks, (16, 16)), 4) > 95


def test_stage3_overfits(four):
    images, masks, _ = four
    torch.manual_seed(0)
    model = stage3.DeepLab("resnet18", "none", 4)
    optimizer = stage3.make_optimizer(model, 5e-3)
    x = (images - 110) / 60
    for _ in range(60):
        optimizer.zero_grad()
        logits = stage2.resize(model(x), (128, 128))
        F.cross_entropy(logits, masks, ignore_index=IGNORE).backward()
        optimizer.step()
    assert miou(stage2.resize(model(x), (128, 128)).argmax(1), masks, 4) > 95


# =========================================================================================================== exact resume

def stage_under_test(stage, data):
    """(model, dataset, optimizer, losses, rate, frozen) of a stage, small."""
    ids, size = data.ids("train"), 64
    torch.manual_seed(0)
    if stage == 1:
        model = stage1.Classifier("resnet18", "none", 3)
        samples = stage1.LabelledImages(data, ids, data.image_labels(ids), size, 0)
        loss = lambda m, x, y: {"loss_multilabel": F.multilabel_soft_margin_loss(m(x), y)}
        return model, samples, stage1.make_optimizer(model, SimpleNamespace(lr=0.01)), loss, stage1.poly(6), ()
    if stage == 2:
        model = network()
        samples = stage2.SeededImages(data, ids, data.root / "seeds", size, 0, stage2.PAPER)
        loss = lambda m, x, y: stage2.weakclip_losses(*m(x), x, y, m.switches, stage2.CLIP_MEAN, stage2.CLIP_STD)
        return model, samples, stage2.make_optimizer(model, 1e-3), loss, stage2.warm_cosine(6), ("clip.",)
    model = stage3.DeepLab("resnet18", "none", 4)
    samples = stage3.MaskedImages(data, ids, data.root / "seeds", size, 0)
    loss = lambda m, x, y: {"loss_cross_entropy": F.cross_entropy(stage2.resize(m(x), y.shape[1:]), y, ignore_index=IGNORE)}
    return model, samples, stage3.make_optimizer(model, 5e-3), loss, stage1.poly(6), ()


@pytest.mark.parametrize("stage, parts", [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2)])
def test_three_and_three_iterations_are_six(dataset, tmp_path, stage, parts, monkeypatch):
    monkeypatch.setattr(stage1, "SAVE_EVERY", 3)
    monkeypatch.setattr(stage1, "LOG_EVERY", 1)
    data, args = find_dataset(str(dataset)), argparse.Namespace(iters=6, batch_size=4, accumulate=parts, seed=3, workers=0)
    facts = {"stage": str(stage)}

    def train(folder, cut=None):
        model, samples, optimizer, loss, rate, frozen = stage_under_test(stage, data)
        calls = iter(range(100))

        def losses(model, image, target):
            assert len(image) == len(target) == 4 // parts
            if next(calls) == cut:
                raise KeyboardInterrupt
            return loss(model, image, target)
        stage1.fit(model, samples, optimizer, losses, rate, args, CPU, folder, facts, frozen)
        return stage1.read_checkpoint(folder / "checkpoint.pt")
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", cut=5 * parts - 1)  # in the fifth iteration; the checkpoint is of three
    assert stage1.read_checkpoint(tmp_path / "parts" / "checkpoint.pt")["step"] == 3
    resumed = train(tmp_path / "parts")
    assert whole["step"] == resumed["step"] == 6 and whole["model"].keys() == resumed["model"].keys()
    assert all(torch.equal(v, resumed["model"][k]) for k, v in whole["model"].items())
    for a, b in zip(whole["optimizer"]["state"].values(), resumed["optimizer"]["state"].values()):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    assert (tmp_path / "whole" / "log.jsonl").read_text() == (tmp_path / "parts" / "log.jsonl").read_text()
    facts["stage"] = "another"
    with pytest.raises(ValueError, match="another run"):
        train(tmp_path / "parts")


def test_a_loss_that_is_no_number_stops_the_run(dataset, tmp_path):
    data, args = find_dataset(str(dataset)), argparse.Namespace(iters=6, batch_size=2, accumulate=1, seed=3, workers=0)
    model, samples, optimizer, loss, rate, frozen = stage_under_test(1, data)
    nan = lambda m, x, y: {"loss_multilabel": loss(m, x, y)["loss_multilabel"] * math.nan}
    with pytest.raises(ValueError, match="iteration 0: a loss is no number"):
        stage1.fit(model, samples, optimizer, nan, rate, args, CPU, tmp_path, {}, frozen)
    assert not (tmp_path / "checkpoint.pt").exists()


# ==================================================================================================== parts of a batch

def gradients_in(parts, losses, model, batch):
    """Every parameter's gradient, by name, and the losses, of a batch shown in so many parts."""
    model.zero_grad()
    terms = stage1.add_gradients(model, batch, losses, parts)
    assert not any(term.requires_grad for term in terms.values())
    return {name: p.grad.clone() for name, p in model.named_parameters()}, terms


def mean_losses(model, image, seeds):
    """Losses of every stage that are means over photos, or over all of their pixels."""
    logits = model(image)
    p = stage2.loss_probs(logits, (8, 8))
    q = stage2.floor_and_normalise(p.detach().flip(1))
    labels = F.one_hot(seeds[:, 0, :3], 5).amax(1)[:, 1:].double()
    return {"loss_seeding": stage2.seeding_loss(p, stage2.loss_labels(seeds, (8, 8))),
            "loss_boundary": stage2.boundary_loss(p, q),
            "loss_over_all": stage2.mean_cross_entropy(logits, seeds, over_valid=False),
            "loss_multilabel": F.multilabel_soft_margin_loss(logits[:, 1:].mean((2, 3)), labels)}


def labelled_loss(model, image, seeds):
    """Stage 3's loss: a mean over labelled pixels."""
    return {"loss_cross_entropy": stage2.mean_cross_entropy(model(image), seeds)}


def test_gradients_of_parts_are_those_of_the_batch_where_losses_are_means_over_it():
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.Conv2d(6, 5, 3, padding=1))
    model = torch.nn.Sequential(*layers).double().eval()
    batch = torch.randn(8, 3, 16, 16).double(), torch.randint(0, 5, (8, 16, 16))
    batch[1][0, 2:] = IGNORE  # a photo of which little is sure

    def furthest(losses, parts, batch=batch):
        whole, terms = gradients_in(1, losses, model, batch)
        summed, their_terms = gradients_in(parts, losses, model, batch)
        assert terms.keys() == their_terms.keys()
        off = [(a - b).abs().max() / a.abs().max() for a, b in zip(whole.values(), summed.values())]
        return max(off + [(terms[k] - their_terms[k]).abs() for k in terms])
    for parts in (2, 4, 8):
        assert furthest(mean_losses, parts) < 1e-12
        # A mean over labelled pixels differs while the parts have not equally many of them ...
        assert furthest(labelled_loss, parts) > 1e-3
        assert furthest(labelled_loss, parts, (batch[0], torch.randint(0, 5, (8, 16, 16)))) < 1e-12
    # ... and is then the mean of the parts' own.
    halves = [gradients_in(1, labelled_loss, model, half)[0] for half in zip(*[t.chunk(2) for t in batch])]
    summed, _ = gradients_in(2, labelled_loss, model, batch)
    for name, gradient in summed.items():
        torch.testing.assert_close(gradient, (halves[0][name] + halves[1][name]) / 2, rtol=1e-12, atol=1e-12)
    model.train()  # BatchNorm norms each part by itself
    assert furthest(mean_losses, 2) > 1e-3


# ============================================================================================ what trains, and how fast

def one_step(model, lr=1e-4, iters=20_000, step=8000):
    optimizer, rate = stage2.make_optimizer(model, lr), stage2.warm_cosine(iters)
    x, y = torch.randn(2, 3, 64, 64), torch.randint(0, 4, (2, 64, 64))
    for group in optimizer.param_groups:
        group["lr"] = rate(group, step)
    sum(stage2.weakclip_losses(*model(x), x, y, model.switches, stage2.CLIP_MEAN, stage2.CLIP_STD).values()).backward()
    optimizer.step()
    return optimizer


def test_doubling_is_a_transposed_convolution():
    torch.manual_seed(0)
    up, x = stage2.Doubling(3, 5).double(), torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    found = [up(x), F.conv_transpose2d(x, up.weight, up.bias, stride=2)]
    w = torch.randn_like(found[0])
    gradients = [torch.autograd.grad((y * w).sum(), [x, up.weight, up.bias]) for y in found]
    assert found[0].shape == (2, 5, 8, 12)
    for ours, theirs in zip([found[0], *gradients[0]], [found[1], *gradients[1]]):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prompts", [True, False])
def test_texts_in_one_sequence_are_texts_one_by_one(prompts):
    model = network(dataclasses.replace(stage2.PAPER, prompts=prompts)).double()
    text_encoder, texts = model.clip, []
    for ids in model.token_ids:
        x = text_encoder.token_embedding(ids)
        if prompts:
            x = torch.cat([x[:1], model.contexts[0], x[1:]])
        end = int(ids.argmax()) + len(x) - len(ids)
        x = (x + text_encoder.positional_embedding[:len(x)])[None, :end + 1]
        x = text_encoder.ln_final(text_encoder.transformer(x, clip.causal_mask(end + 1)))
        texts.append(x[0, end] @ text_encoder.text_projection)
    assert torch.allclose(model.encode_text(), torch.stack(texts), rtol=0, atol=1e-12)


def test_attention_among_many_is_attention_among_few():
    """Few tokens are told from many by their number; the formula is the same."""
    torch.manual_seed(0)
    attention = stage2.MultiHeadAttention(8, 2, dropout=0.0).double()
    many = torch.randn(1, 300, 8, dtype=torch.float64)
    ours = attention(many, many)  # with the library's kernel
    parts = torch.cat([attention(part, many) for part in many.split(100, 1)], 1)  # without
    assert torch.allclose(ours, parts, rtol=0, atol=1e-12)


def test_paper_clip_is_frozen():
    model = network().train()
    before = copy.deepcopy(model.clip.state_dict())
    for _ in range(3):
        optimizer = one_step(model, lr=1e-2)
    assert all(torch.equal(v, before[k]) for k, v in model.clip.state_dict().items())
    assert not any(m.training for m in model.clip.modules()) and model.decoder.training
    clip_parameters = set(model.clip.parameters())
    assert all(p.grad is None and not p.requires_grad for p in clip_parameters)
    assert not clip_parameters & {p for g in optimizer.param_groups for p in g["params"]} and not clip_parameters & set(optimizer.state)
    assert all(p.grad is not None for n, p in model.named_parameters() if not n.startswith("clip."))  # all else trains
    levels, global_, dense = model.encode_image(torch.randn(1, 3, 64, 64))
    assert not any(t.requires_grad for t in (*levels, global_, dense))


RATES = [0, 1, 750, 1500, 8000, 10000, 19999]


def released_rate(base, step, iters=20_000, low=1e-6, warm=1500, ratio=1e-6):
    """The released rule, written out: mmcv's cosine between `low` and the group's base rate, linear warm-up on top."""
    regular = low + 0.5 * (base - low) * (math.cos(math.pi * step / iters) + 1)
    return regular * (1 - (1 - step / warm) * (1 - ratio)) if step < warm else regular


@pytest.mark.parametrize("step", RATES)
def test_released_rates(step):
    optimizer = stage2.make_optimizer(network(stage2.RELEASED), 1e-4)
    rate = stage2.warm_cosine(20_000)
    fast, slow = optimizer.param_groups
    assert math.isclose(rate(fast, step), released_rate(1e-4, step), rel_tol=1e-9)
    assert math.isclose(rate(slow, step), released_rate(0, step), rel_tol=1e-9, abs_tol=1e-20)


def test_released_groups_and_rising_rates():
    model = network(stage2.RELEASED)
    fast, slow = stage2.make_optimizer(model, 1e-4).param_groups
    names = {p: stage2.released_name(n) for n, p in model.named_parameters()}
    assert all(names[p].startswith(("backbone.", "text_encoder.")) for p in slow["params"])  # the adapter is in `backbone`
    assert not any(names[p].startswith(("backbone.", "text_encoder.")) for p in fast["params"])
    assert len(slow["params"]) + len(fast["params"]) == len(names) and slow["base_lr"] == 0
    rate = stage2.warm_cosine(20_000)
    assert [f"{rate(slow, s):.1e}" for s in (1500, 8000, 19999)] == ["1.4e-08", "3.5e-07", "1.0e-06"]
    assert all(g["weight_decay"] == 3e-5 and g["betas"] == (0.9, 0.999) for g in (fast, slow))


def test_released_adamw_step():
    """One step of decoupled AdamW, by hand: m / (1 - b1) and v / (1 - b2) are g and g^2 at the first step."""
    model = network(dataclasses.replace(stage2.RELEASED, drop_path=0.0)).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    one_step(model)
    for n, p in model.named_parameters():
        slow = n.startswith(("clip.", "adapter."))
        lr = released_rate(0 if slow else 1e-4, 8000)
        if p.grad is None:
            assert torch.equal(p, before[n])
            continue
        g = p.grad
        torch.testing.assert_close(p.detach(), before[n] * (1 - lr * 3e-5) - lr * g / (g.abs() + 1e-8), rtol=1e-5, atol=1e-9)
        if slow and g.abs().max() > 1e-5:
            assert not torch.equal(p, before[n])  # "frozen" CLIP moves


def test_warm_up_scales_with_the_run():
    group = {"base_lr": 1e-4}
    short, long = stage2.warm_cosine(400), stage2.warm_cosine(20_000)
    assert short(group, 30) == pytest.approx(long(group, 1500), rel=1e-6) and short(group, 0) < 1e-9


# =============================================================================================================== switches

def test_presets_and_settings():
    assert stage2.choose_switches("paper", []) == stage2.PAPER
    s = stage2.choose_switches("released", ["freeze_clip=true", "drop_path=0.2"])
    assert s == dataclasses.replace(stage2.RELEASED, freeze_clip=True, drop_path=0.2)
    for text, said in (("nothing=1", "the fields are"), ("prompts=maybe", "true or false"), ("drop_path=x", "a number")):
        with pytest.raises(ValueError, match=said):
            stage2.choose_switches("paper", [text])


# `train_listed_twice` changes the list alone: tests/test_constants.py
@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(stage2.Switches) if f.name != "train_listed_twice"])
def test_every_switch_does_something(field):
    """Turning one switch changes the network, its loss or its rates: none is read by nobody."""
    base = stage2.PAPER
    value = getattr(stage2.RELEASED, field)
    if value == getattr(base, field):
        # half the CRF's bandwidth, wider than the image all the same, is lost in the loss's rounding on some machines
        part = 8 if field == "loss_crf_sxy" else 2
        value = (not value) if isinstance(value, bool) else value / part
    other = dataclasses.replace(base, **{field: value})

    def fingerprint(switches):
        torch.manual_seed(0)
        model = network(switches, crop=128).train()
        g = torch.Generator().manual_seed(1)
        image = F.interpolate(60 * torch.randn(1, 3, 12, 12, generator=g), (96, 128), mode="bicubic")
        y = torch.randint(0, 4, (1, 96, 128), generator=g)
        y[:, :9] = IGNORE
        mean, std = stage2.mean_and_std(switches)
        x = image / torch.tensor(std)[:, None, None]
        torch.manual_seed(2)
        terms = stage2.weakclip_losses(*model(x), x, y, switches, mean, std)
        model.eval()
        with torch.no_grad():
            odd = stage2.window_logits(model, x[..., :70, :90], model.encode_text(), switches.pad_windows)
        groups = [(g["base_lr"], sum(p.numel() for p in g["params"])) for g in stage2.make_optimizer(model, 1e-4).param_groups]
        return {**{k: v.item() for k, v in terms.items()}, "odd": odd.sum().item(), "groups": groups}
    assert fingerprint(other) != fingerprint(base)


def test_a_preview_of_blank_masks_is_said(tmp_path, capsys):
    blank, full = np.zeros((4, 5), np.uint8), np.full((4, 5), 3, np.uint8)
    stage1.note_if_blank(tmp_path, [blank, full])
    assert capsys.readouterr().err == ""
    stage1.note_if_blank(tmp_path, [blank, np.full((2, 2), 255, np.uint8)])
    assert "none of the 2 masks" in capsys.readouterr().err
