"""Equal to the released code and to OpenAI's CLIP, number for number.

Runs on tests/golden/*.pt and on every *.pt in the folder that the environment variable WEAKCLIP_GOLDEN names. What a file
holds is told by its keys, its sizes by its `config`. Tolerances are relative to the tensor: max|a - b| / max|b|.
"""
import dataclasses
import os
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
from stage1_cam import dense_crf

FORWARD, LOSS, GRADIENT, FORMULA, OWN_CRF, Q = 1e-5, 1e-6, 2e-5, 1e-5, 1e-3, 1e-4
TWO_WAYS = 1e-6  # in float64; positions are resized in float32
BFLOAT16 = 3e-2  # of logits and score map under --amp; bfloat16 rounds by 4e-3 at every step
ROUNDING_NOISE = "backbone.fpn1.1.bias"  # a bias in front of BatchNorm: its true gradient is zero
# Behind it BatchNorm takes every constant away, so that only borders are left of its gradient, a
# small rest of a large sum. The rounding is the golden's: it is 1.1e-5 from float64, where ours and
# make_golden.py's agree to 4e-8 (test_gradients_in_float64_in_two_ways); in float32 ours is as far.
NEARLY_CANCELS = "neck.fpn_convs.0.conv.bias"
FOLDERS = [Path(__file__).parent / "golden"] + [Path(f) for f in [os.environ.get("WEAKCLIP_GOLDEN")] if f]
FILES = [p for folder in FOLDERS for p in sorted(folder.glob("*.pt"))]


@lru_cache(maxsize=None)
def golden(path):
    return torch.load(path, weights_only=True)


def cases(key, names=lambda g: [None]):
    """A parameter (file, name) for every file that holds the top-level `key` and every name that `names` finds in it."""
    out = []
    for path in FILES:
        if key in golden(path):
            out += [pytest.param(path, n, id=f"{path.parent.name}/{path.stem}-{n or key}") for n in names(golden(path))]
    return out


def close(ours, theirs, tolerance):
    """Relative to the largest entry of `theirs`."""
    assert tuple(ours.shape) == tuple(theirs.shape)
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-30)
    assert error <= tolerance, f"relative difference {error:.1e}, allowed {tolerance:.0e}"


def test_there_are_goldens():
    assert any("eval" in golden(p) for p in FILES) and any("strings" in golden(p) for p in FILES)


# ============================================================================================================ CLIP alone

@lru_cache(maxsize=None)
def golden_clip(path):
    g = golden(path)
    return clip.CLIP.from_state_dict(g["state_dict"], transformer_heads=g["config"].get("transformer_heads"),
                                     vision_heads=g["config"].get("vision_heads"))


@pytest.mark.parametrize("path, _", cases("strings"))
def test_clip_tokens(path, _):
    g = golden(path)
    assert torch.equal(clip.tokenize(g["strings"], g["tokens"].shape[1]), g["tokens"])


@pytest.mark.parametrize("path, name", cases("strings", lambda g: ["image_features", "text_features", "logits_per_image"]))
@torch.no_grad()
def test_clip_features(path, name):
    g, model = golden(path), golden_clip(path)
    ours = {"image_features": lambda: model.encode_image(g["image"]), "text_features": lambda: model.encode_text(g["tokens"]),
            "logits_per_image": lambda: model(g["image"], g["tokens"])[0]}[name]()
    close(ours, g[name], FORWARD)


# =============================================================================================================== WeakCLIP

def build(path):
    """The golden's network: `--variant released`, with dropout and drop path off as when the golden was made."""
    g = golden(path)
    c = g["config"]
    model = stage2.from_released(g["state_dict"], g["token_ids"], dataclasses.replace(stage2.RELEASED, drop_path=0.0),
                                 vision_heads=c["vision_heads"], transformer_heads=c["text_heads"], coattention_heads=c["cd_heads"])
    for m in model.modules():
        if isinstance(m, (nn.Dropout, nn.Dropout2d)):
            m.p = 0.0
    return model


@lru_cache(maxsize=None)
@torch.no_grad()
def forward(path):
    """Every `eval` tensor of a golden, computed by ours, under the golden's names."""
    g, model = golden(path), build(path).eval()
    e, crop, stride = g["eval"], g["config"]["crop_size"], g["config"]["stride"]
    assert crop[0] == crop[1] and stride[0] == stride[1] == 2 * crop[0] // 3
    out = {}
    levels, out["global_embedding"], out["dense_embedding"] = model.encode_image(g["img"])
    text = model.encode_text()
    out["text_embeddings_encoder"] = text[None]
    pyramid = model.adapter(levels)
    visual = torch.cat([out["global_embedding"][:, None], out["dense_embedding"].flatten(2).transpose(1, 2)], 1)
    out["visual_context_in"] = visual
    out["visual_diff"], out["text_diff"] = model.coattention(visual, text.expand(len(visual), -1, -1))
    out["text_embeddings_final"] = text + model.gamma * out["text_diff"]
    out["score_map"] = model.match(out["global_embedding"], out["dense_embedding"], text)
    joined = model.join_score_map(pyramid, out["score_map"])
    neck = model.decoder.neck(model.decoder.laterals(joined))
    for i in range(4):
        out[f"pyramid{i}"], out[f"pyramid_cat{i}"], out[f"neck{i}"] = pyramid[i], joined[i], neck[i]
    out["head_features"] = model.decoder.head(neck)
    out["head_logits"], score = model(g["img"])
    close(score, e["score_map"], FORWARD)
    out["encode_decode"] = stage2.window_logits(model, g["img"], text, pad=False)
    size = tuple(e["slide_ori_hw"].tolist())
    out["slide_logits"] = stage2.slide(model, e["slide_img"], text, crop[0], stride[0], pad=False)
    out["slide_logits_rescaled"] = stage2.resize(out["slide_logits"], size)
    out["whole_logits"] = stage2.window_logits(model, e["slide_img"], text, pad=False)
    out["whole_logits_rescaled"] = stage2.resize(out["whole_logits"], size)
    out["inference_softmax"] = stage2.probabilities(model, [(e["slide_img"], False)], text, crop[0], size, pad=False)[None]
    views = [(e[f"aug_img{i}"], bool(flip)) for i, flip in enumerate(e["aug_flip"])]
    out["aug_prob_mean"] = stage2.probabilities(model, views, text, crop[0], size, pad=False)[None]
    out["aug_pred"] = out["aug_prob_mean"].argmax(1)
    return out


GIVEN = ("slide_img", "slide_ori_hw", "aug_flip", "aug_img")  # inputs of the golden, not results


@pytest.mark.parametrize("path, name", cases("eval", lambda g: [n for n in g["eval"] if not n.startswith(GIVEN)]))
def test_eval(path, name):
    ours, theirs = forward(path)[name], golden(path)["eval"][name]
    if theirs.is_floating_point():
        close(ours, theirs, FORWARD)
    else:
        assert torch.equal(ours, theirs)


@lru_cache(maxsize=None)
def train_step(path, key, own_crf, dtype=torch.float32):
    """Forward and losses in training mode on the golden's batch. key: "train" or "train_odd".

    The golden's own Q is put in, or ours is computed. Returns (model, {what: tensor}), the graph still standing.
    """
    g, model = golden(path), build(path).train().to(dtype)
    size = tuple(g[key]["crf_q"].shape[2:])
    logits, score = model(g["img"].to(dtype))
    p = stage2.loss_probs(logits, size, aligned=False)
    small = stage2.crf_image(g["img"], size, g["img_mean"].tolist(), g["img_std"].tolist(), aligned=False)
    q = stage2.crf_target(p, small, 80) if own_crf else stage2.floor_and_normalise(g[key]["crf_q"].to(dtype))
    seeds = g["gt"][:, 0]
    losses = {"decode.loss_boundary": stage2.boundary_loss(p, q),
              "decode.loss_seeding": stage2.seeding_loss(p, stage2.loss_labels(seeds, size, aligned=False)),
              "aux_identity.loss_ce": stage2.RELEASED.score_weight * stage2.score_loss(score, seeds, over_valid=False)}
    return model, {"losses": losses, "probs": p.detach(), "crf_image": small, "score": score.detach()}


BOTH = [pytest.param(own, id="own-crf" if own else "golden-q") for own in (False, True)]


def step_cases(names):
    """(file, "train" or "train_odd", name) for all that a golden's training step recorded."""
    return [pytest.param(path, key, n, id=f"{path.parent.name}/{path.stem}-{key}-{n}")
            for path in FILES for key in ("train", "train_odd") if key in golden(path) for n in names(golden(path)[key])]


@pytest.mark.parametrize("own_crf", BOTH)
@pytest.mark.parametrize("path, key, name", step_cases(lambda t: [n for n in t if n.startswith("losses.") and "acc" not in n] + ["loss_total"]))
def test_losses(path, key, name, own_crf):
    losses = train_step(path, key, own_crf)[1]["losses"]
    ours = sum(losses.values()) if name == "loss_total" else losses[name.removeprefix("losses.")]
    close(ours.detach(), golden(path)[key][name], OWN_CRF if own_crf else LOSS)


@pytest.mark.parametrize("path, key, name", step_cases(lambda t: ["losses.aux_identity.acc_seg"]))
def test_seed_accuracy(path, key, name):
    """Percent of all pixels whose label the score map has; unsure pixels count as missed."""
    g = golden(path)
    seeds = g["gt"][:, 0]
    hit = stage2.resize(train_step(path, key, False)[1]["score"], seeds.shape[1:]).argmax(1) == seeds
    close(100 * hit.float().mean()[None], g[key][name], LOSS)


@pytest.mark.parametrize("path, key, name", step_cases(lambda t: ["crf_probs_in"]))
def test_probabilities_that_enter_the_crf(path, key, name):
    close(train_step(path, key, False)[1]["probs"], golden(path)[key][name], FORWARD)


@pytest.mark.parametrize("path, key, name", step_cases(lambda t: ["crf_image_uint8"]))
def test_crf_image(path, key, name):
    assert torch.equal(train_step(path, key, False)[1]["crf_image"].permute(0, 2, 3, 1), golden(path)[key][name])


@pytest.mark.parametrize("path, key, name", step_cases(lambda t: ["crf_q"]))
def test_crf_of_the_loss(path, key, name):
    t = golden(path)[key]
    ours = dense_crf(t["crf_probs_in"].clamp(min=1e-4), t["crf_image_uint8"].permute(0, 3, 1, 2))
    assert (ours - t[name]).abs().max() <= Q and torch.equal(ours.argmax(1), t[name].argmax(1))
    close(stage2.floor_and_normalise(ours).log(), t["crf_result_log"], OWN_CRF)


@lru_cache(maxsize=None)
def gradients(path, key, own_crf, loss, dtype=torch.float32):
    """{released name: gradient} of one loss, or of the sum (loss None); None where there is none."""
    model, step = train_step(path, key, own_crf, dtype)
    value = sum(step["losses"].values()) if loss is None else step["losses"][loss]
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if n != "clip.logit_scale"))
    grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return {stage2.released_name(n): g for n, g in zip(names, grads)}


def check_gradients(ours, theirs, tolerance):
    assert theirs
    for name, grad in theirs.items():
        assert ours[name] is not None, f"{name} gets no gradient"
        if name == ROUNDING_NOISE:
            assert (ours[name] - grad).abs().max() <= 1e-6
            continue
        try:
            close(ours[name], grad, tolerance)
        except AssertionError as e:
            raise AssertionError(f"{name}: {e}") from None


@pytest.mark.parametrize("own_crf", BOTH)
@pytest.mark.parametrize("path, key, name", step_cases(lambda t: ["grads"]))
def test_gradient_of_every_parameter(path, key, name, own_crf):
    check_gradients(gradients(path, key, own_crf, None), golden(path)[key][name], OWN_CRF if own_crf else GRADIENT)


@pytest.mark.parametrize("path, key, name", step_cases(lambda t: ["grads"]))
def test_gradient_of_every_parameter_in_float64(path, key, name):
    """The formula, without our rounding. What is left is the golden's own, in float32."""
    ours, theirs = gradients(path, key, False, None, torch.float64), dict(golden(path)[key][name])
    if NEARLY_CANCELS in theirs:
        close(ours[NEARLY_CANCELS], theirs.pop(NEARLY_CANCELS), GRADIENT)
    check_gradients(ours, theirs, FORMULA)


@pytest.mark.parametrize("path, _", cases("train"))
def test_gradients_in_float64_in_two_ways(path, _, monkeypatch):
    """Ours and make_golden.py's, which share no line, on the golden's Q: what the golden is further off is its own rounding."""
    pytest.importorskip("scipy")
    import make_golden
    g = golden(path)
    recorded = iter([*g["train"]["crf_q"], *g["train_odd"]["crf_q"]])
    monkeypatch.setattr(make_golden, "dense_crf", lambda *args: next(recorded))
    state = {k: v.double() if v.is_floating_point() else v for k, v in g["state_dict"].items()}
    theirs = make_golden.training(g, state)["train"]["grads"]
    check_gradients(gradients(path, "train", False, None, torch.float64), theirs, TWO_WAYS)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("path, _", cases("eval"))
def test_adapter_and_lateral_in_one_step(path, _, guided):
    """Equal to "adapter, then decoder", values and gradients, where rounding hides nothing."""
    model = build(path).eval().double()
    model.switches = dataclasses.replace(model.switches, text_guidance=guided)
    if not guided:
        for conv in model.decoder.lateral:
            conv.weight = nn.Parameter(conv.weight[:, :model.adapter.level2[1].out_channels])
    levels, global_, dense = model.encode_image(golden(path)["img"].double())
    score = model.match(global_, dense, model.encode_text())
    plain = model.decoder.laterals(model.join_score_map(model.adapter(levels), score))
    composed = model.adapted_laterals(levels, score)
    parameters = [*model.adapter.parameters(), *model.decoder.lateral.parameters(), model.clip.visual.proj]
    found = [torch.autograd.grad(sum(x.square().sum() for x in way), parameters, retain_graph=True, allow_unused=True)
             for way in (composed, plain)]
    for ours, theirs in zip([*composed, *found[0]], [*plain, *found[1]]):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            close(ours, theirs, 1e-12)


@pytest.mark.parametrize("path, _", cases("eval"))
@torch.no_grad()
def test_eval_in_bfloat16(path, _):
    with torch.autocast("cpu", torch.bfloat16):
        logits, score = build(path).eval()(golden(path)["img"])
    close(logits, golden(path)["eval"]["head_logits"], BFLOAT16)
    close(score, golden(path)["eval"]["score_map"], BFLOAT16)


@pytest.mark.parametrize("path, name", cases("grads_per_loss", lambda g: list(g["grads_per_loss"])))
def test_gradient_of_each_loss(path, name):
    check_gradients(gradients(path, "train", False, name), golden(path)["grads_per_loss"][name], GRADIENT)


@pytest.mark.parametrize("path, _", cases("train"))
def test_who_gets_no_gradient(path, _):
    t, ours = golden(path)["train"], gradients(path, "train", False, None)
    # text rows beyond prompts and name do not exist in the golden's table, so nothing else may be without
    assert {n for n, g in ours.items() if g is None} == set(t["params_without_grad"])
    assert set(ours) == set(t["grads"]) | set(t["params_without_grad"])
    frozen = {stage2.released_name(n) for n, p in train_step(path, "train", False)[0].named_parameters() if not p.requires_grad}
    assert frozen == set(t["params_frozen"])


@pytest.mark.parametrize("path, name", cases("train", lambda g: list(g["train"]["bn_after"])))
def test_batchnorm_after_the_step(path, name):
    model = train_step(path, "train", False)[0]
    ours = {stage2.released_name(n): b for n, b in model.state_dict().items()}[name]
    theirs = golden(path)["train"]["bn_after"][name]
    if theirs.is_floating_point():
        close(ours, theirs, FORWARD)
    else:
        assert torch.equal(ours, theirs)


# ============================================================ CLIP-ES: seeds from CLIP alone

# Tolerances of each recorded quantity, a map's relative to its own class; 0: equal.
CLIP_ES = {"fg_features": 2e-6, "bg_features": 2e-6, "input_uint8": 0, "input": 1e-6, "positions": 0,
           "tokens": 3e-6, "activations": 3e-6, "attn": 5e-6, "attn_mean": 5e-6, "probs": 2e-5,
           "weights": 3e-5, "cam_raw": 3e-5, "cam": 3e-5, "box_mask": 0, "refined": 3e-5,
           "resized": 3e-5, "saved_keys": 0, "crf_image": 0, "crf_out": 2e-2}
AFFINITY, CRF_FROM_THEIRS, LABELS = 3e-6, 1e-3, 1e-3


def clip_es_cases(names):
    """(file, "images" or "images_float_pos", image number, name) for all recorded `names`."""
    out = []
    for path in FILES:
        for key in ("images", "images_float_pos"):
            for i, recorded in enumerate(golden(path).get(key, [])):
                where = f"{path.parent.name}/{path.stem}-{key}{i}"
                out += [pytest.param(path, key, i, n, id=f"{where}-{n}") for n in recorded if n in names]
    return out


@lru_cache(maxsize=None)
def clip_es_model(path):
    """(the golden's CLIP, its text features: foreground first)."""
    g = golden(path)
    model = clip.CLIP.from_state_dict(g["state_dict"], vision_heads=g["config"]["vision_heads"],
                                      transformer_heads=g["config"]["text_heads"])
    return model, stage1.encode_texts(model, g["tokens"].long())


@lru_cache(maxsize=None)
def clip_es(path, key, i):
    """All that ours makes of an image, under the golden's names; each step from our own step before."""
    g, (model, texts) = golden(path), clip_es_model(path)
    image, labels = g["images"][i]["image"].numpy(), g["images"][i]["labels"]
    n_fg, J, visual = len(g["fg_names"]), len(labels), model.visual
    texts = torch.cat([texts[:n_fg][labels], texts[n_fg:]])
    out = {"input": stage1.clip_input(image)[0], "saved_keys": labels}
    mean, std = (torch.tensor(v)[:, None, None] for v in (stage1.CLIP_MEAN, stage1.CLIP_STD))
    out["input_uint8"] = (out["input"] * std + mean).round().byte().permute(1, 2, 0)
    h, w = (n // 16 for n in out["input"].shape[1:])
    out["positions"] = stage1.half_positions(visual, h, w).half()
    positions = out["positions"].float()
    if key == "images_float_pos":
        positions = clip.resize_positions(visual.positional_embedding, h, w)
    tokens, attentions = stage1.patch_tokens(visual, out["input"][None], positions)
    found = stage1.grad_cam(visual, tokens, texts, J, model.logit_scale.exp())
    attentions = [*attentions, found["attention"]]
    out["tokens"], out["attn"] = tokens[0], torch.cat(attentions)
    activations = visual.transformer.resblocks[-1].ln_1(tokens)[0, 1:].T.unflatten(1, (h, w))
    out |= {"activations": activations.detach(), "probs": found["probs"], "weights": found["weights"]}
    out["attn_mean"] = out["attn"][-g["config"]["last_blocks"]:, 1:, 1:].mean(0)
    out["cam_raw"] = found["raw"].view(J, h, w)
    out["cam"] = stage1.min_max(stage1.min_max(out["cam_raw"].relu()))
    out["boxes"] = torch.stack([stage1.box_mask(cam, g["config"]["threshold"]) for cam in out["cam"]])
    out["box_mask"] = out["boxes"].byte()
    out["square"] = stage1.affinity(attentions, g["config"]["last_blocks"])
    out["refined"] = stage1.class_aware_affinity(out["square"], out["cam"], out["boxes"])
    after = stage1.min_max(out["refined"])
    out["resized"] = F.interpolate(after[None], image.shape[:2], mode="bilinear")[0]
    out["crf_in"] = stage1.clip_scores(after, image.shape[:2])
    out["crf_image"] = stage1.wrapped_colours(image).permute(1, 2, 0)
    out["crf_out"] = stage1.crf_of_scores(out["crf_in"], image)
    out["label"] = torch.from_numpy(stage1.confident_labels(out["crf_out"], labels.numpy() + 1))
    out["label_full"] = torch.cat([torch.zeros(1), labels + 1]).byte()[out["crf_out"].argmax(0)]
    return out


@pytest.mark.parametrize("path, g_key", [pytest.param(*c.values, id=c.id) for c in cases("fg_names")])
def test_clip_es_texts(path, g_key):
    """The golden's texts are those that ours makes of VOC's or COCO's class names."""
    g = golden(path)
    classes = {"voc": VOC_CLASSES, "coco": COCO_CLASSES}[g["config"]["dataset"]]
    foreground, background = stage1.class_texts(Dataset(Path(), "any", classes, {}))
    assert (foreground, background, stage1.TEMPLATE) == (g["fg_names"], g["bg_names"], g["template"])
    assert torch.equal(stage1.text_tokens(foreground + background, 77), g["tokens_real"].long())


@pytest.mark.parametrize("path, g_key", [pytest.param(*c.values, id=c.id) for c in cases("fg_names")])
def test_clip_es_text_features(path, g_key):
    ours, g = clip_es_model(path)[1], golden(path)
    close(ours[:len(g["fg_names"])], g["fg_features"], CLIP_ES["fg_features"])
    close(ours[len(g["fg_names"]):], g["bg_features"], CLIP_ES["bg_features"])


@pytest.mark.parametrize("path, key, i, name", clip_es_cases(CLIP_ES))
def test_clip_es_step(path, key, i, name):
    ours, theirs = clip_es(path, key, i)[name], golden(path)[key][i][name]
    if CLIP_ES[name] == 0:
        assert torch.equal(ours, theirs)
    elif name in ("cam_raw", "cam", "refined", "resized"):
        assert len(ours) == len(theirs)
        for k in range(len(ours)):
            close(ours[k], theirs[k], CLIP_ES[name])
    else:
        close(ours, theirs, CLIP_ES[name])


@pytest.mark.parametrize("path, key, i, name", clip_es_cases(["affinity"]))
def test_clip_es_affinity(path, key, i, name):
    """Every step on the recorded attention, and all of them on our own."""
    recorded, A = golden(path)[key][i][name], golden(path)[key][i]["attn_mean"]
    for n in (1, 2, 3):
        column = stage1.balance(A, n - 1)
        close(column / column.sum(0, keepdim=True), recorded[f"col{n}"], AFFINITY)
        close(stage1.balance(A, n), recorded[f"row{n}"], AFFINITY)
    symmetric = (stage1.balance(A) + stage1.balance(A).T) / 2
    close(symmetric, recorded["sym"], AFFINITY)
    close(symmetric @ symmetric, recorded["square"], AFFINITY)
    close(clip_es(path, key, i)["square"], recorded["square"], AFFINITY)


@pytest.mark.parametrize("path, name", cases("box_cases", lambda g: list(g["box_cases"])))
def test_clip_es_boxes(path, name):
    case = golden(path)["box_cases"][name]
    assert torch.equal(stage1.box_mask(case["map"], case["threshold"]).byte(), case["mask"])


@pytest.mark.parametrize("path, key, i, name", clip_es_cases(["crf_in"]))
def test_clip_es_crf(path, key, i, name):
    """What enters differs by one step of float16 at most, in 1 % of values; what comes out of theirs is theirs."""
    g, ours = golden(path)["images"][i], clip_es(path, key, i)["crf_in"]
    assert ours.dtype == torch.float16 and (ours != g["crf_in"]).float().mean() <= 0.01
    close(ours, g["crf_in"], 1e-3)
    close(stage1.crf_of_scores(g["crf_in"], g["image"].numpy()), g["crf_out"], CRF_FROM_THEIRS)


@pytest.mark.parametrize("path, key, i, name", clip_es_cases(["crf_unary"]))
def test_clip_es_unary(path, key, i, name):
    g = golden(path)["images"][i]
    close(-stage1.log_scores(g["crf_in"]), g["crf_unary"], 1e-3)


@pytest.mark.parametrize("path, key, i, name", clip_es_cases(["label", "label_full"]))
def test_clip_es_labels(path, key, i, name):
    differ = clip_es(path, key, i)[name] != golden(path)[key][i][name]
    assert differ.float().mean() <= LABELS


# ================================================================================================ dense CRF at full size

VOC, COCO, LOSS_CRF = stage2.MASK_CRF["VOC2012"], stage2.MASK_CRF["COCO2014"], ((3, 3), (80, 13, 10))
POST = {"voc12": ("probs", VOC), "coco": ("probs", COCO), "voc12_unnormalised": ("probs_unnormalised", VOC),
        "loss_crf": ("probs", LOSS_CRF)}


@pytest.mark.parametrize("path, name", cases("post_crf", lambda g: [n for n in g["post_crf"] if n in POST]))
def test_crf_after_inference(path, name):
    t = golden(path)["post_crf"]
    probs, settings = POST[name]
    ours = dense_crf(t[probs][None].clamp(min=1e-5), t["image_uint8"].permute(2, 0, 1)[None], *settings)[0]
    assert (ours - t[name]).abs().max() <= Q and torch.equal(ours.argmax(0), t[name].argmax(0))


# ================================================================================================ sizes of the paper's model

def test_parameter_counts_of_the_full_model():
    """ViT-B/16, 512 x 512, 21 classes. The released table of positions has 1 + 32*32 rows; CLIP's own has 197."""
    with torch.device("meta"):  # sizes only
        model = stage2.WeakCLIP(clip.CLIP(), torch.zeros(21, 5, dtype=torch.int64), stage2.RELEASED)
        own = stage2.WeakCLIP(clip.CLIP(), model.token_ids)
    count = lambda *prefixes: sum(p.numel() for n, p in model.named_parameters() if n.startswith(prefixes))
    assert count("clip.visual.") == 86_828_544
    assert count("adapter.") == 7_087_872
    assert count("contexts", "gamma", "beta") == 5_120
    assert count("coattention.") == 6_840_832
    assert count("decoder.lateral.", "decoder.smooth.") == 3_169_280
    assert count("decoder.climb.", "decoder.classify.") == 4_137_749
    unused = (77 - 13) * 512 + 1  # text positions that 8 prompts and 5 tokens do not reach, and logit_scale
    assert count("clip.transformer.", "clip.token", "clip.positional", "clip.ln", "clip.text", "clip.logit") == 63_395_328 + unused
    assert sum(p.numel() for p in model.parameters()) == 171_464_725 + unused
    assert sum(p.numel() for p in own.clip.visual.parameters()) == 86_192_640
