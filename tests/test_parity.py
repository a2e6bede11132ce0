"""Equal to the released code and to OpenAI's CLIP, number for number.

Runs on tests/golden/*.pt and on every *.pt in the folder that the environment variable
WEAKCLIP_GOLDEN names. What a file holds is told by its keys, its sizes by its `config`. Tolerances
are relative to the largest entry of a tensor, max|a - b| / max|b|. Numbers in brackets, such as
(22b), are rows of AUDIT.md.
"""
import dataclasses
import os
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clip
import stage1_cam as stage1
import stage2_weakclip as stage2
from eval import COCO_CLASSES, VOC_CLASSES, Dataset

FORWARD = 1e-5
LOSS = 1e-6
OWN_CRF = 1e-3  # of losses and gradients where the CRF's answer is ours too
Q = 1e-4  # of the CRF's answer, absolute
LOSS_CRF = (3, 3), (80, 13, 10)  # bandwidths and weights of the boundary loss's CRF
BFLOAT16 = 3e-2  # of logits and score map under --amp; bfloat16 rounds by 4e-3 at every step
# Gradients are compared twice. In float64 the formula is: what is left is the golden's rounding. In
# float32 the library's attention adds its own, since on a CPU it computes its softmax anew in
# backward.
GRADIENT = {torch.float64: 1e-5, torch.float32: 2e-5}
# A bias in front of BatchNorm: its true gradient is zero, and what is recorded is rounding alone.
ROUNDING_NOISE = "adapter.level1.1.bias"
# Behind this bias BatchNorm takes every constant away, so that only borders are left of its
# gradient, a small rest of a large sum. The rounding is the golden's: it is 1.1e-5 from float64,
# where two gradients that were written independently agreed to 4e-8 (commit 8197e13).
NEARLY_CANCELS = {"decoder.smooth.0.bias": 2e-5}
FOLDERS = [Path(__file__).parent / "golden", Path(os.environ.get("WEAKCLIP_GOLDEN", "none"))]
FILES = [path for folder in FOLDERS for path in sorted(folder.glob("*.pt"))]


@lru_cache(maxsize=None)
def golden(path):
    """What a file holds: {key: value}. A list of images becomes the keys images0, images1, ..."""
    held = torch.load(path, weights_only=True)
    for key in ("images", "images_float_pos"):
        held |= {f"{key}{i}": image for i, image in enumerate(held.pop(key, []))}
    return held


def files(key):
    """(file, what it holds) of the files that hold `key`, as test parameters."""
    return pytest.mark.parametrize("path, g", [
        pytest.param(path, golden(path), id=f"{path.parent.name}/{path.stem}")
        for path in FILES if key in golden(path)])


def entries(keys, names=".*"):
    """(file, key, name, value) of all that files hold under keys and names of these patterns."""
    return pytest.mark.parametrize("path, key, name, theirs", [
        pytest.param(path, key, name, value, id=f"{path.parent.name}/{path.stem}-{key}-{name}")
        for path in FILES
        for key, held in golden(path).items() if re.fullmatch(keys, key)
        for name, value in held.items() if re.fullmatch(names, name)])


def close(ours, theirs, tolerance, what=""):
    """Assert that all entries are near; numbers that are no floats, and tolerance 0, mean equal."""
    assert ours.shape == theirs.shape, what
    if tolerance == 0 or not theirs.is_floating_point():
        assert torch.equal(ours, theirs), what
        return
    largest = theirs.double().abs().max().clamp(min=1e-30)
    error = (ours.double() - theirs.double()).abs().max() / largest
    assert error <= tolerance, f"{what} off by {error:.1e}, allowed {tolerance:.0e}"


def test_there_are_goldens():
    assert set().union(*map(golden, FILES)) >= {
        "strings", "eval", "train_odd", "grads_per_loss", "post_crf", "images0", "box_cases"}


def golden_clip(path):
    """The CLIP of a golden; its head counts are in `config`, by one of two names."""
    config = golden(path)["config"]
    model = clip.CLIP.from_state_dict(golden(path)["state_dict"])
    set_heads(model.visual, config.get("vision_heads"))
    set_heads(model, config.get("transformer_heads") or config.get("text_heads"))
    return model


def set_heads(part, heads):
    """Of an encoder; None leaves them 64 wide."""
    for block in part.transformer.resblocks:
        block.attn.heads = heads or block.attn.heads


@files("strings")
@torch.no_grad()
def test_clip(path, g):
    """Tokens (44, 45), both encoders (36, 37, 39, 10c) and logits (40) are OpenAI's."""
    model = golden_clip(path)
    assert torch.equal(clip.tokenize(g["strings"], g["tokens"].shape[1]), g["tokens"])
    close(model.encode_image(g["image"]), g["image_features"], FORWARD, "image")
    close(model.encode_text(g["tokens"]), g["text_features"], FORWARD, "text")
    close(model(g["image"], g["tokens"]), g["logits_per_image"], FORWARD, "logits")


# ======================================================================================= WeakCLIP

def build(path):
    """The golden's network, `--variant released`, with dropout and drop path off as there."""
    g, switches = golden(path), dataclasses.replace(stage2.RELEASED, drop_path=0.0)
    config = g["config"]
    state = {stage2.our_name(name): value for name, value in g["state_dict"].items()}
    state["clip.logit_scale"] = torch.zeros(())
    clip_model = clip.CLIP.from_state_dict(
        {name[5:]: value for name, value in state.items() if name.startswith("clip.")})
    set_heads(clip_model.visual, config["vision_heads"])
    set_heads(clip_model, config["text_heads"])
    model = stage2.WeakCLIP(clip_model, g["token_ids"], switches, config["crop_size"][0] // 16 * 16)
    # Its sizes are odd ones; ours follow from CLIP's.
    width, channels = clip_model.visual.proj.shape
    model.contexts = nn.Parameter(state["contexts"].clone())
    model.coattention = stage2.CoAttention(channels, config["cd_width"], config["cd_heads"], False)
    model.decoder = stage2.TextGuidedDecoder(
        width + config["num_classes"], config["fpn_channels"], config["head_channels"],
        config["num_classes"])
    model.load_state_dict(state)
    model.crop = config["crop_size"][0]
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
    return model


@lru_cache(maxsize=None)
@torch.no_grad()
def forward(path):
    """Every tensor of a golden's `eval`, computed by ours, under its name there."""
    g, model = golden(path), build(path).eval()
    given, crop = g["eval"], model.crop
    assert g["config"]["crop_size"] == [crop] * 2 and g["config"]["stride"] == [2 * crop // 3] * 2
    out = {}
    grids, visual = model.encode_image(g["img"])
    size = grids[0].shape[2:]
    out["global_embedding"] = visual[:, 0]
    out["dense_embedding"] = visual[:, 1:].transpose(1, 2).unflatten(2, size)
    text = model.encode_text()
    out["text_embeddings_encoder"] = text[None]
    out["visual_context_in"] = visual
    out["visual_diff"], out["text_diff"] = model.coattention(
        visual, text.expand(len(visual), -1, -1))
    out["text_embeddings_final"] = text + model.gamma * out["text_diff"]
    out["score_map"] = model.match(visual, text, size)
    levels = {"pyramid": model.adapter(grids)}
    levels["pyramid_cat"] = model.join_score_map(levels["pyramid"], out["score_map"])
    levels["neck"] = model.decoder.neck(levels["pyramid_cat"])
    out["head_features"] = model.decoder.head(levels["neck"])
    for name, level in levels.items():
        out |= {f"{name}{i}": level[i] for i in range(4)}
    out["head_logits"], score = model(g["img"])
    close(score, given["score_map"], FORWARD, "the score map of forward")
    out["encode_decode"] = stage2.window_logits(model, g["img"], text)
    whole, size = given["slide_img"], tuple(given["slide_ori_hw"].tolist())
    out["slide_logits"] = stage2.slide(model, whole, text)
    out["whole_logits"] = stage2.window_logits(model, whole, text)
    for name in ("slide_logits", "whole_logits"):
        out[f"{name}_rescaled"] = stage2.resize(out[name], size)
    views = [(given[f"aug_img{i}"], bool(flip)) for i, flip in enumerate(given["aug_flip"])]
    for name, seen in (("inference_softmax", [(whole, False)]), ("aug_prob_mean", views)):
        out[name] = stage2.probabilities(model, seen, size, text)[None]
    out["aug_pred"] = out["aug_prob_mean"].argmax(1)
    return out


@entries("eval", "(?!slide_img|slide_ori_hw|aug_flip|aug_img).*")
def test_eval(path, key, name, theirs):
    """All that the network makes of an image in eval mode.

    Adapter (12b, 12c, 12d), positions (41, 10a, 10b), texts (13a), co-attention (9b, 9c, 9d, 60)
    and its score map (11b, 11c), decoder (62, 63), windows and views (81, 82, 30a).
    """
    close(forward(path)[name], theirs, FORWARD)


@files("eval")
@torch.no_grad()
def test_eval_in_bfloat16(path, g):
    with torch.autocast("cpu", torch.bfloat16):
        logits, score = build(path).eval()(g["img"])
    close(logits, g["eval"]["head_logits"], BFLOAT16, "logits")
    close(score, g["eval"]["score_map"], BFLOAT16, "score map")


def floored(q):
    """The CRF's answer as the boundary loss takes it (68)."""
    q = q.clamp(min=1e-4)
    return q / q.sum(1, keepdim=True)


@lru_cache(maxsize=None)
def train_step(path, key, own_crf=False, dtype=torch.float32):
    """Forward and losses in training mode on the golden's batch, by the golden's CRF or ours.

    key: "train" or "train_odd". Returns (model, {what: tensor}), the graph still standing.
    """
    g, model = golden(path), build(path).train().to(dtype)
    recorded, seeds = g[key], g["gt"][:, 0]
    size = tuple(recorded["crf_q"].shape[2:])
    logits, score = model(g["img"].to(dtype))
    p = stage2.loss_probs(logits, size, aligned=False)
    mean_std = torch.stack([g["img_mean"], g["img_std"]])
    close(torch.tensor(stage2.colours_of(stage2.RELEASED)), mean_std, FORWARD)
    small = stage2.crf_image(g["img"], size, stage2.RELEASED)
    if own_crf:
        q = stage2.crf_target(p, small, stage2.RELEASED.loss_crf_sxy)
    else:
        q = floored(recorded["crf_q"].to(dtype))
    y = stage2.resize_labels(seeds, size, aligned=False)
    found = {
        "losses.decode.loss_boundary": stage2.boundary_loss(p, q),
        "losses.decode.loss_seeding": stage2.seeding_loss(p, y),
        "losses.aux_identity.loss_ce":
            stage2.RELEASED.score_weight * stage2.score_loss(score, seeds, over_valid=False)}
    found["loss_total"] = sum(found.values())
    hit = stage2.resize(score.detach(), seeds.shape[1:]).argmax(1) == seeds
    found["losses.aux_identity.acc_seg"] = 100 * hit.float().mean()[None]
    found |= {"crf_probs_in": p.detach(), "crf_image_uint8": small.permute(0, 2, 3, 1)}
    return model, found


@pytest.mark.parametrize("own_crf", [False, True])
@entries("train|train_odd", "loss.*")
def test_losses(path, key, name, theirs, own_crf):
    """Each loss and their sum, one after the other (17, 18, 19b, 24b, 11d, 20a, 20b, 25, 22a, 24a).

    acc_seg: percent of all pixels whose label the score map has; unsure ones count as missed.
    """
    ours = train_step(path, key, own_crf)[1][name].detach()
    close(ours, theirs, OWN_CRF if own_crf else LOSS)


@entries("train|train_odd", "crf_probs_in|crf_image_uint8")
def test_what_enters_the_crf_of_the_loss(path, key, name, theirs):
    """Probabilities, corners aligned at odd sizes (23), and the image in whole levels (22b)."""
    close(train_step(path, key)[1][name], theirs, FORWARD)


@entries("train|train_odd", "crf_q")
def test_crf_of_the_loss(path, key, name, theirs):
    """Mean field (69) on the lattice (70), fed with at least 1e-4 (25) and floored again (68)."""
    recorded = golden(path)[key]
    image = recorded["crf_image_uint8"].permute(0, 3, 1, 2)
    ours = stage1.dense_crf(recorded["crf_probs_in"].clamp(min=1e-4), image, *LOSS_CRF)
    assert (ours - theirs).abs().max() <= Q
    assert torch.equal(ours.argmax(1), theirs.argmax(1))
    close(floored(ours).log(), recorded["crf_result_log"], OWN_CRF)


def check_gradients(path, key, loss, theirs, dtype=torch.float32, own_crf=False):
    """Assert that the gradients of a loss are `theirs`, by released name; returns all, by ours."""
    model, found = train_step(path, key, own_crf, dtype)
    names, parameters = zip(*model.named_parameters())
    ours = torch.autograd.grad(found[loss], parameters, retain_graph=True, allow_unused=True)
    ours = dict(zip(names, ours))
    assert theirs
    for name, gradient in theirs.items():
        name = stage2.our_name(name)
        assert ours[name] is not None, f"{name} gets no gradient"
        tolerance = max(OWN_CRF if own_crf else GRADIENT[dtype], NEARLY_CANCELS.get(name, 0))
        if name == ROUNDING_NOISE:
            assert (ours[name] - gradient).abs().max() <= 1e-6
        else:
            close(ours[name], gradient, tolerance, name)
    return ours


@pytest.mark.parametrize("dtype, own_crf", [
    (torch.float64, False), (torch.float32, False), (torch.float32, True)])
@entries("train|train_odd", "grads")
def test_gradient_of_every_parameter(path, key, name, theirs, dtype, own_crf):
    check_gradients(path, key, "loss_total", theirs, dtype, own_crf)


@entries("grads_per_loss")
def test_gradient_of_each_loss(path, key, name, theirs):
    check_gradients(path, "train", f"losses.{name}", theirs)


@files("train")
def test_who_gets_no_gradient(path, g):
    """Two of three co-attention layers (8); beside them only CLIP's scale, which nothing reads."""
    recorded = g["train"]
    ours = check_gradients(path, "train", "loss_total", recorded["grads"])
    idle = {name for name, gradient in ours.items() if gradient is None}
    recorded_idle = map(stage2.our_name, recorded["params_without_grad"])
    assert idle == {*recorded_idle, "clip.logit_scale"}
    assert set(ours) == {*map(stage2.our_name, recorded["grads"]), *idle}
    model, _ = train_step(path, "train")
    assert all(p.requires_grad for p in model.parameters()) and not recorded["params_frozen"]


@files("train")
def test_batchnorm_after_the_step(path, g):
    """Batch statistics, momentum 0.1 (3a)."""
    state = train_step(path, "train")[0].state_dict()
    for name, theirs in g["train"]["bn_after"].items():
        close(state[stage2.our_name(name)], theirs, FORWARD, name)


VOC, COCO = stage2.MASK_CRF["VOC2012"], stage2.MASK_CRF["COCO2014"]
POST = {"voc12": ("probs", VOC), "coco": ("probs", COCO), "loss_crf": ("probs", LOSS_CRF),
        "voc12_unnormalised": ("probs_unnormalised", VOC)}


@entries("post_crf", "|".join(POST))
def test_crf_after_inference(path, key, name, theirs):
    """At full size, with the constants of VOC's and COCO's masks (31) and with the loss's (20b)."""
    recorded, (probs, constants) = golden(path)[key], POST[name]
    image = recorded["image_uint8"].permute(2, 0, 1)[None]
    ours = stage1.dense_crf(recorded[probs][None].clamp(min=1e-5), image, *constants)[0]
    assert (ours - theirs).abs().max() <= Q
    assert torch.equal(ours.argmax(0), theirs.argmax(0))


# ============================================================ CLIP-ES: seeds from CLIP alone

# Tolerances of each recorded quantity, a map's relative to its own class; 0: equal.
CLIP_ES = {
    "input_uint8": 0, "input": 1e-6, "positions": 0, "tokens": 3e-6, "activations": 3e-6,
    "attn": 5e-6, "attn_mean": 5e-6, "probs": 2e-5, "weights": 3e-5, "cam_raw": 3e-5, "cam": 3e-5,
    "box_mask": 0, "refined": 3e-5, "resized": 3e-5, "saved_keys": 0, "crf_image": 0,
    "crf_out": 2e-2, "crf_in": 1e-3}
MAPS = ("cam_raw", "cam", "refined", "resized")
AFFINITY, LABELS = 3e-6, 1e-3


@lru_cache(maxsize=None)
@torch.no_grad()
def clip_es_model(path):
    """(the golden's CLIP, its text features: foreground first)."""
    model = golden_clip(path).requires_grad_(False)
    return model, F.normalize(model.encode_text(golden(path)["tokens"].long()), dim=1)


@lru_cache(maxsize=None)
def clip_es(path, key):
    """What ours makes of an image, under the golden's names; each step from our own before it."""
    g, (model, texts) = golden(path), clip_es_model(path)
    given, visual, last = g[key.replace("_float_pos", "")], model.visual, g["config"]["last_blocks"]
    image, labels, n = given["image"].numpy(), given["labels"], len(g["fg_names"])
    texts = torch.cat([texts[:n][labels], texts[n:]])
    out = {"input": stage1.clip_input(image)[0], "saved_keys": labels}
    mean, std = torch.tensor(stage1.CLIP_COLOURS)[..., None, None]
    out["input_uint8"] = (out["input"] * std + mean).round().byte().permute(1, 2, 0)
    h, w = out["input"].shape[1] // 16, out["input"].shape[2] // 16
    positions = clip.resize_positions(visual.positional_embedding, h, w)
    out["positions"] = positions.half()
    if "float_pos" not in key:
        positions = positions.half().float()
    tokens, attentions = stage1.patch_tokens(visual, out["input"][None], positions)
    out["probs"], out["weights"], raw, last_attention = stage1.grad_cam(
        visual, tokens, texts, len(labels), model.logit_scale.exp())
    attentions.append(last_attention)
    out |= {"tokens": tokens[0], "attn": torch.cat(attentions), "cam_raw": raw.unflatten(1, (h, w))}
    activations = visual.transformer.resblocks[-1].ln_1(tokens)[0, 1:].detach()
    out["activations"] = activations.T.unflatten(1, (h, w))
    out["attn_mean"] = out["attn"][-last:, 1:, 1:].mean(0)
    out["cam"] = stage1.min_max(stage1.min_max(out["cam_raw"].relu()))
    boxes = torch.stack([stage1.box_mask(cam, g["config"]["threshold"]) for cam in out["cam"]])
    out |= {"box_mask": boxes.byte(), "square": stage1.affinity(attentions, last)}
    out["refined"] = stage1.class_aware_affinity(out["square"], out["cam"], boxes)
    after = stage1.min_max(out["refined"])
    out["resized"] = F.interpolate(after[None], image.shape[:2], mode="bilinear")[0]
    out["crf_in"] = stage1.clip_scores(after, image.shape[:2])
    out["crf_image"] = stage1.wrapped_colours(image).permute(1, 2, 0)
    out["crf_out"] = stage1.crf_of_scores(out["crf_in"], image)
    classes = (labels + 1).tolist()
    out["label"] = torch.from_numpy(stage1.label_map(out["crf_out"], classes, 0.95))
    out["label_full"] = torch.tensor([0, *classes])[out["crf_out"].argmax(0)]
    return out


@files("fg_names")
def test_clip_es_texts(path, g):
    """The texts that ours makes of VOC's or COCO's class names (E1, E2), and their features."""
    classes = {"voc": VOC_CLASSES, "coco": COCO_CLASSES}[g["config"]["dataset"]]
    foreground, background = stage1.class_texts(Dataset(Path(), "any", classes, {}))
    assert (foreground, background) == (g["fg_names"], g["bg_names"])
    assert stage1.TEMPLATE == g["template"]
    tokens = clip.tokenize([stage1.TEMPLATE.format(text) for text in foreground + background])
    assert torch.equal(tokens, g["tokens_real"].long())
    close(clip_es_model(path)[1], torch.cat([g["fg_features"], g["bg_features"]]), 2e-6)


@entries(r"images.*\d", "|".join(CLIP_ES))
def test_clip_es_step(path, key, name, theirs):
    """The photo (E3), positions with rounding and without (E4), Grad-CAM (E5, E6, E7), attention
    (E8), boxes (E11), refined maps (E13, E14), wrapped colours (E16), the CRF's answer (E17)."""
    ours = clip_es(path, key)[name]
    assert len(ours) == len(theirs)
    for part, recorded in zip(ours, theirs) if name in MAPS else [(ours, theirs)]:
        close(part, recorded, CLIP_ES[name])


@entries(r"images.*\d", "affinity")
def test_clip_es_affinity(path, key, name, theirs):
    """Three rounds, mean with the transpose, square (E9): on recorded attention, and on our own."""
    A = golden(path)[key]["attn_mean"]
    for rounds in (1, 2, 3):
        before = stage1.balance(A, rounds - 1)
        close(before / before.sum(0, keepdim=True), theirs[f"col{rounds}"], AFFINITY)
        close(stage1.balance(A, rounds), theirs[f"row{rounds}"], AFFINITY)
    balanced = stage1.balance(A)
    symmetric = (balanced + balanced.T) / 2
    close(symmetric, theirs["sym"], AFFINITY)
    close(clip_es(path, key)["square"], theirs["square"], AFFINITY)


@entries("box_cases")
def test_clip_es_boxes(path, key, name, theirs):
    """Boxes of made-up maps (E10), some at the border (E11), some with holes (E12)."""
    ours = stage1.box_mask(theirs["map"], theirs["threshold"])
    assert torch.equal(ours.byte(), theirs["mask"])


@entries(r"images.*\d", "crf_in|crf_unary|label|label_full")
def test_clip_es_crf_and_labels(path, key, name, theirs, monkeypatch):
    """What enters the CRF is off by one step of float16 at most, in 1 % of the values (E15)."""
    recorded, ours = golden(path)[key], clip_es(path, key)
    if name == "crf_in":
        assert ours[name].dtype == torch.float16
        assert (ours[name] != theirs).float().mean() <= 0.01
        answer = stage1.crf_of_scores(theirs, recorded["image"].numpy())
        close(answer, recorded["crf_out"], 1e-3)
    elif name == "crf_unary":
        monkeypatch.setattr(stage1, "dense_crf", lambda probs, *rest: probs)
        probs = stage1.crf_of_scores(recorded["crf_in"], recorded["image"].numpy())
        close(-probs.log(), theirs, 1e-3)
    else:
        assert (ours[name] != theirs).float().mean() <= LABELS


@entries(r"images\d", "label")
def test_clip_es_in_one(path, key, name, theirs, monkeypatch):
    """All steps in the script's own order, with its own defaults (E4, E7, E8, E9, E10, E14)."""
    given, patch_tokens = [], stage1.patch_tokens
    monkeypatch.setattr(stage1, "patch_tokens", lambda *x: given.append(x[2]) or patch_tokens(*x))
    g, (model, texts), machine = golden(path), clip_es_model(path), stage1.Machine("cpu", amp=False)
    image, labels, n = g[key]["image"].numpy(), g[key]["labels"], len(g["fg_names"])
    arrays, seed = stage1.clip_seed(model, (texts[:n], texts[n:]), image, (labels + 1).tolist(),
                                    g["config"]["threshold"], machine)
    close(torch.as_tensor(arrays["before"]).float(), g[key]["cam"], 1e-3)
    close(torch.as_tensor(arrays["boxes"]).byte(), g[key]["box_mask"], 0)
    assert (torch.from_numpy(seed) != theirs).float().mean() <= LABELS
    assert torch.equal(given[0], given[0].half().float())


# ====================================================================== sizes of the paper's model

COUNTS = {  # parameters of each part, by the beginnings of their names
    ("clip.visual.",): 86_828_544, ("adapter.",): 7_087_872, ("contexts", "gamma", "beta"): 5_120,
    ("coattention.",): 6_840_832, ("decoder.lateral.", "decoder.smooth."): 3_169_280,
    ("decoder.climb.", "decoder.classify."): 4_137_749}


def test_parameter_counts_of_the_full_model():
    """ViT-B/16 (36, 37), 512 x 512, 21 classes, 8 prompts (7b): adapter (55), co-attention of
    width 256 (56, 61), neck (62), head (63), all (64).

    The released table of positions has 1 + 32 * 32 rows (10b), CLIP's own has 197.
    """
    with torch.device("meta"):  # sizes only
        tokens = torch.zeros(21, 5, dtype=torch.int64)
        model = stage2.WeakCLIP(clip.CLIP(), tokens, stage2.RELEASED)
        own = stage2.WeakCLIP(clip.CLIP(), tokens)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for prefixes, count in COUNTS.items():
        assert sum(sizes[name] for name in sizes if name.startswith(prefixes)) == count, prefixes
    # text positions that 8 prompts and 5 tokens do not reach, and the logit scale
    unread = (77 - 13) * 512 + 1
    assert sum(sizes.values()) == 171_464_725 + unread
    assert sum(parameter.numel() for parameter in own.clip.visual.parameters()) == 86_192_640
