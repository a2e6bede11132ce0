"""Further golden files for test_parity.py, from an independent, slow restatement of the released arithmetic.

run     python tests/make_golden.py --check tests/golden/weakclip.pt         every quantity, recomputed and compared
        python tests/make_golden.py --out tests/golden/weakclip_wide.pt --seed 67
needs   scipy, and pydensecrf (PyPI: pydensecrf2) for the dense CRFs

Written from the description of the method, not from this repository's network, and in another manner: pure functions over
the flat state dict with the released key names, in float64, resizing by weight matrices, gradients by torch.autograd.grad.
--check holds it against recorded outputs of the released code (commit b72d559); as it agrees there, what --out writes for
other random weights and sizes stands for what the released code would have written. With some seeds the CRF or a gradient
enlarges float32 rounding beyond test_parity.py's tolerances; with 67 it does not.
"""
import argparse
import math
import sys

import numpy as np
import scipy.ndimage
import torch
import torch.nn.functional as F

F64 = torch.float64
TAPS = (3, 5, 7, 11)
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
# relative, for names with this in them; the CRF is fed with p and enlarges its rounding
ALLOWED = {"grads": 2e-5, "crf": 1e-4, "loss": 1e-6, "forward": 1e-5, "exact": 0}
ROUNDING_NOISE = "backbone.fpn1.1.bias"  # a bias in front of BatchNorm: its true gradient is zero
IN_LOSS = ((3, 3), (80, 13, 10))  # dense CRF: Gaussian (sxy, weight), bilateral (sxy, srgb, weight)
POST = {"voc12": ("probs", ((3, 3), (83, 5, 3))), "coco": ("probs", ((1, 3), (67, 3, 4))),
        "voc12_unnormalised": ("probs_unnormalised", ((3, 3), (83, 5, 3))), "loss_crf": ("probs", IN_LOSS)}
SOME = ("contexts", "gamma", "beta", "backbone.conv1.weight", "text_encoder.text_projection")
WITH_HEAD = SOME + ("decode_head.conv_seg.weight", "backbone.fpn1.0.weight", "neck.lateral_convs.0.conv.weight")
PER_LOSS = {"decode.loss_boundary": WITH_HEAD, "decode.loss_seeding": WITH_HEAD, "aux_identity.loss_ce": SOME}
ODD = ("contexts", "gamma", "beta", "decode_head.conv_seg.weight", "decode_head.conv_seg.bias")
GIVEN = ("slide_img", "slide_ori_hw", "aug_flip", "aug_img")  # of `eval`: inputs, not results


# ============================================================================================================== operations

def bilinear(n, m, corners):
    """(m, n) matrix that resamples n points to m."""
    at = torch.arange(m, dtype=F64)
    at = at * (n - 1) / max(m - 1, 1) if corners else ((at + 0.5) * n / m - 0.5).clamp(min=0)
    low = at.long().clamp(max=n - 1)
    weights, row = torch.zeros(m, n, dtype=F64), torch.arange(m)
    weights[row, low] += 1 - (at - low)
    weights[row, (low + 1).clamp(max=n - 1)] += at - low
    return weights


def resize(x, size, corners=False):
    return bilinear(x.shape[-2], size[0], corners) @ x @ bilinear(x.shape[-1], size[1], corners).T


def nearest(x, size):
    rows, cols = (torch.arange(m) * n // m for n, m in zip(x.shape[-2:], size))
    return x[..., rows[:, None], cols]


def linear(s, name, x):
    return F.linear(x, s[name + ".weight"], s.get(name + ".bias"))


def conv(s, name, x):
    return F.conv2d(x, s[name + ".weight"], s.get(name + ".bias"), padding=s[name + ".weight"].shape[-1] // 2)


def per_channel(v):
    return v[:, None, None]


def standardise(x, dims):
    x = x - x.mean(dims, keepdim=True)
    return x / (x.square().mean(dims, keepdim=True) + 1e-5).sqrt()


def layer_norm(s, name, x):
    return standardise(x, -1) * s[name + ".weight"] + s[name + ".bias"]


def scale_shift(s, name, x):
    return x * per_channel(s[name + ".weight"]) + per_channel(s[name + ".bias"])


def batch_norm(s, name, x, after):
    """after None: eval mode. Else batch statistics, and the new running ones are put into it."""
    mean, var, count = (s[f"{name}.{b}"] for b in BUFFERS)
    if after is None:
        return scale_shift(s, name, (x - per_channel(mean)) / per_channel(var + 1e-5).sqrt())
    now = x.detach().transpose(0, 1).flatten(1)  # (C, B*H*W)
    after |= zip((f"{name}.{b}" for b in BUFFERS), (0.9 * mean + 0.1 * now.mean(1), 0.9 * var + 0.1 * now.var(1), count + 1))
    return scale_shift(s, name, standardise(x, (0, 2, 3)))


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def attend(q, k, v, heads, mask=0.0):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, N, C / heads)
    a = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + mask, -1)
    return (a @ v).transpose(1, 2).flatten(2)


# ================================================================================================================= network

def clip_block(s, name, x, heads, mask=0.0):
    y = layer_norm(s, name + ".ln_1", x)
    qkv = y @ s[name + ".attn.in_proj_weight"].T + s[name + ".attn.in_proj_bias"]
    x = x + linear(s, name + ".attn.out_proj", attend(*qkv.chunk(3, -1), heads, mask))
    y = linear(s, name + ".mlp.c_fc", layer_norm(s, name + ".ln_2", x))
    return x + linear(s, name + ".mlp.c_proj", y * torch.sigmoid(1.702 * y))


def encode_image(s, c, img):
    """-> four taps (B, C, h, w), all tokens projected (B, 1 + h*w, D), global first."""
    patches = F.conv2d(img, s["backbone.conv1.weight"], stride=c["patch_size"])
    grid = patches.shape[2:]
    pos, once = s["backbone.positional_embedding"], s["backbone.class_embedding"]
    side = math.isqrt(len(pos) - 1)
    spatial = resize(pos[1:].T.unflatten(1, (side, side)), grid).flatten(1).T
    first = (pos[0] + 2 * once).expand(len(img), 1, -1)  # the class embedding is added twice
    x = layer_norm(s, "backbone.ln_pre", torch.cat([first, patches.flatten(2).transpose(1, 2) + spatial], 1))
    taps = []
    for i in range(c["vision_layers"]):
        x = clip_block(s, f"backbone.transformer.resblocks.{i}", x, c["vision_heads"])
        if i in TAPS:
            taps.append(x[:, 1:].transpose(1, 2).unflatten(2, grid))
    return taps, layer_norm(s, "backbone.ln_post", x) @ s["backbone.proj"]


def encode_text(s, c, ids):
    words, contexts = s["text_encoder.token_embedding.weight"][ids], s["contexts"].expand(len(ids), -1, -1)
    x = torch.cat([words[:, :1], contexts, words[:, 1:]], 1)
    x = x + s["text_encoder.positional_embedding"][:x.shape[1]]
    mask = torch.full((x.shape[1], x.shape[1]), -math.inf, dtype=F64).triu(1)
    for i in range(c["text_layers"]):
        x = clip_block(s, f"text_encoder.transformer.resblocks.{i}", x, c["text_heads"], mask)
    eos = ids.argmax(1) + contexts.shape[1]
    return layer_norm(s, "text_encoder.ln_final", x)[torch.arange(len(ids)), eos] @ s["text_encoder.text_projection"]


def adapter(s, taps, after):
    norms = ("fpn1.0", "fpn2.0", "fpn3", "fpn4.0")
    a, b, c, d = (scale_shift(s, f"backbone.{name}", standardise(x, (1, 2, 3))) for name, x in zip(norms, taps))
    double = lambda name, x: F.conv_transpose2d(x, s[name + ".weight"], s[name + ".bias"], stride=2)
    a = gelu(batch_norm(s, "backbone.fpn1.2", double("backbone.fpn1.1", a), after))
    return [double("backbone.fpn1.4", a), double("backbone.fpn2.1", b), c, F.max_pool2d(d, 2)]


def stack(s, c, name, x, memory):
    """Every layer of the released stacks is given the stack's input, so only the last one counts."""
    name = f"context_decoder.{name}.{c['cd_layers'] - 1}"
    attention = lambda part, q, kv: linear(s, f"{name}.{part}.proj", attend(
        *(linear(s, f"{name}.{part}.{p}_proj", t) for p, t in zip("qkv", (q, kv, kv))), c["cd_heads"]))
    y = layer_norm(s, name + ".norm1", x)
    x = x + attention("self_attn", y, y)
    x = x + attention("cross_attn", layer_norm(s, name + ".norm2", x), memory)
    return x + linear(s, name + ".mlp.3", gelu(linear(s, name + ".mlp.0", layer_norm(s, name + ".norm3", x))))


def co_attention(s, c, visual, text):
    into = lambda name, x: linear(s, f"context_decoder.{name}.1", layer_norm(s, f"context_decoder.{name}.0", x))
    v, t = layer_norm(s, "context_decoder.memory_proj.2", into("memory_proj", visual)), into("text_proj", text)
    return into("out_proj", stack(s, c, "decoder", t, v)), into("anti_out_proj", stack(s, c, "anti_decoder", v, t))


def feature_pyramid(s, maps):
    x = [conv(s, f"neck.lateral_convs.{i}.conv", m) for i, m in enumerate(maps)]
    for i in (2, 1, 0):
        x[i] = x[i] + nearest(x[i + 1], x[i].shape[2:])
    return [conv(s, f"neck.fpn_convs.{i}.conv", m) for i, m in enumerate(x)]


def head(s, maps, after):
    total = 0
    for i, x in enumerate(maps):
        for step in range(max(1, i)):
            name = f"decode_head.scale_heads.{i}.{2 * step}"
            x = batch_norm(s, name + ".bn", conv(s, name + ".conv", x), after).clamp(min=0)
            x = resize(x, (2 * x.shape[2], 2 * x.shape[3])) if i else x
        total = total + resize(x, maps[0].shape[2:])
    return total


def network(s, c, ids, img, after=None):
    """Every quantity on the way, under its golden name. after: see batch_norm."""
    taps, tokens = encode_image(s, c, img)
    grid, text, pyramid = taps[0].shape[2:], encode_text(s, c, ids), adapter(s, taps, after)
    text_diff, visual_diff = co_attention(s, c, tokens, text.expand(len(img), -1, -1))
    v, t = tokens + s["beta"] * visual_diff, text + s["gamma"] * text_diff
    unit = lambda x: x / x.square().sum(-1, keepdim=True).sqrt()
    score = (unit(t) @ unit(v[:, 1:]).transpose(1, 2)).unflatten(2, grid)  # (B, K, h, w)
    joined = [torch.cat([m, resize(score, m.shape[2:], corners=True)], 1) for m in pyramid]
    neck = feature_pyramid(s, joined)
    out = {f"{name}{i}": m for name, maps in (("pyramid", pyramid), ("pyramid_cat", joined), ("neck", neck))
           for i, m in enumerate(maps)}
    out |= {"global_embedding": tokens[:, 0], "dense_embedding": tokens[:, 1:].transpose(1, 2).unflatten(2, grid),
            "visual_context_in": tokens, "text_embeddings_encoder": text[None], "text_embeddings_final": t,
            "text_diff": text_diff, "visual_diff": visual_diff, "score_map": score, "head_features": head(s, neck, after)}
    out["head_logits"] = conv(s, "decode_head.conv_seg", out["head_features"])
    out["encode_decode"] = resize(out["head_logits"], img.shape[2:])
    return out


# ================================================================================================================ inference

def slide(s, c, ids, img):
    starts = lambda length, crop, stride: [min(i * stride, max(length - crop, 0))
                                           for i in range(max(length - crop + stride - 1, 0) // stride + 1)]
    total = torch.zeros(len(img), len(ids), *img.shape[2:], dtype=F64)
    count, (h, w) = torch.zeros_like(total), c["crop_size"]
    for y in starts(img.shape[2], h, c["stride"][0]):
        for x in starts(img.shape[3], w, c["stride"][1]):
            window = ..., slice(y, y + h), slice(x, x + w)
            total[window] += network(s, c, ids, img[window])["encode_decode"]
            count[window] += 1
    return total / count


def inference(s, c, ids, given):
    """The `eval` entries beyond one pass over the batch; `given` holds slide_img, slide_ori_hw, aug_img*, aug_flip."""
    img, size = given["slide_img"].double(), given["slide_ori_hw"].tolist()
    out = {"slide_logits": slide(s, c, ids, img), "whole_logits": network(s, c, ids, img)["encode_decode"]}
    out |= {k + "_rescaled": resize(v, size) for k, v in out.items()}
    out["inference_softmax"] = torch.softmax(out["slide_logits_rescaled"], 1)
    probs = [torch.softmax(resize(slide(s, c, ids, given[f"aug_img{i}"].double()), size), 1).flip([3] * flip)
             for i, flip in enumerate(given["aug_flip"].tolist())]
    out["aug_prob_mean"] = sum(probs) / len(probs)
    return out | {"aug_pred": out["aug_prob_mean"].argmax(1)}


def dense_crf(probs, image, floor, settings):
    """pydensecrf's Q (K, H, W) float32 of float32 probs (K, H, W) and uint8 image (H, W, 3)."""
    import pydensecrf.densecrf
    K, H, W = probs.shape
    (sxy, weight), (far, srgb, strong) = settings
    crf = pydensecrf.densecrf.DenseCRF2D(W, H, K)
    crf.setUnaryEnergy(np.ascontiguousarray(-np.log(np.clip(probs.float().numpy(), floor, 1)).reshape(K, -1)))
    crf.addPairwiseGaussian(sxy=sxy, compat=weight)
    crf.addPairwiseBilateral(sxy=far, srgb=srgb, rgbim=np.ascontiguousarray(image.numpy()), compat=strong)
    return torch.from_numpy(np.array(crf.inference(10)).reshape(K, H, W))


# ================================================================================================================= training

def losses(g, logits, score, size):
    """-> (the three losses, what the step records) at feature size `size`."""
    p = torch.softmax(resize(logits, size, corners=size[0] % 2 == 1 and size[1] % 2 == 1), 1) + 1e-7
    p = p / p.sum(1, keepdim=True)
    zoom = (1, *(n / m for n, m in zip(size, g["img"].shape[2:])))  # corner-aligned; float64, then rounded to float32
    small = torch.from_numpy(np.stack([scipy.ndimage.zoom(x.numpy(), zoom, order=1) for x in g["img"]]))
    crf_image = (small * per_channel(g["img_std"]) + per_channel(g["img_mean"])).clamp(0, 255).byte().permute(0, 2, 3, 1)
    crf_in = p.detach().float()
    raw = torch.stack([dense_crf(a, b, 1e-4, IN_LOSS) for a, b in zip(crf_in, crf_image)])
    q = raw.double().clamp(min=1e-4)
    q = q / q.sum(1, keepdim=True)
    seeds, y = g["gt"][:, 0], nearest(g["gt"][:, 0], size)
    own = p.log().gather(1, torch.where(y == 255, 0, y)[:, None])[:, 0]  # log p of each pixel's label
    seeding = 0
    for side in (y == 0, (y > 0) & (y != 255)):
        seeding = seeding - ((own * side).sum((1, 2)) / side.sum((1, 2)).clamp(min=1e-4)).mean()
    logp = torch.log_softmax(resize(score / g["config"]["tau"], seeds.shape[1:]), 1)
    known = seeds != 255
    ce = -(logp.gather(1, torch.where(known, seeds, 0)[:, None])[:, 0] * known).mean()  # over all pixels
    loss = {"decode.loss_boundary": (q * (q / p).clamp(0.05, 20).log()).sum(1).mean(), "decode.loss_seeding": seeding,
            "aux_identity.loss_ce": g["config"]["identity_loss_weight"] * ce}
    record = {"losses." + k: v.detach() for k, v in loss.items()} | {"loss_total": sum(loss.values()).detach()}
    record["losses.aux_identity.acc_seg"] = 100 * (logp.argmax(1) == seeds).double().mean()[None]
    return loss, record | {"crf_image_uint8": crf_image, "crf_probs_in": crf_in, "crf_q": raw, "crf_result_log": q.log()}


def training(g, s):
    """-> the entries train, train_odd and grads_per_loss."""
    c, after = g["config"], {}
    s = {k: v if k.endswith(BUFFERS) else v.clone().requires_grad_() for k, v in s.items()}
    trained = [k for k, v in s.items() if v.requires_grad]

    grads = lambda value, names: dict(zip(names, torch.autograd.grad(value, [s[k] for k in names], retain_graph=True,
                                                                     allow_unused=True)))
    out = network(s, c, g["token_ids"], g["img"].double(), after)
    loss, train = losses(g, out["head_logits"], out["score_map"], c["feature_size"])
    all_grads = grads(sum(loss.values()), trained)
    train["grads"] = {k: v for k, v in all_grads.items() if v is not None}
    train |= {"params_without_grad": [k for k, v in all_grads.items() if v is None], "params_frozen": [], "bn_after": after}
    odd_loss, odd = losses(g, out["head_logits"], out["score_map"], c["odd_feature_size"])
    odd |= {"feature_size": c["odd_feature_size"], "grads": grads(sum(odd_loss.values()), ODD)}
    return {"train": train, "train_odd": odd, "grads_per_loss": {k: grads(loss[k], names) for k, names in PER_LOSS.items()}}


def compute(g):
    """The whole golden file from its inputs (which may stand among recorded results: those are not looked at)."""
    s = {k: v.double() if v.is_floating_point() else v for k, v in g["state_dict"].items()}
    c, ids, given = g["config"], g["token_ids"], {k: v for k, v in g["eval"].items() if k.startswith(GIVEN)}
    with torch.no_grad():
        out = {"eval": given | network(s, c, ids, g["img"].double()) | inference(s, c, ids, given)}
    post = {k: g["post_crf"][k] for k in ("image_uint8", "probs", "probs_unnormalised")}
    post |= {k: dense_crf(post[probs], post["image_uint8"], 1e-5, settings) for k, (probs, settings) in POST.items()}
    return g | out | training(g, s) | {"post_crf": post}


# =============================================================================================================== the program

def draw(seed, prompts):
    """Inputs of a golden file unlike the recorded ones: other sizes, prompts, views and form of the images."""
    rng, words, K, sot = torch.Generator().manual_seed(seed), 6, 7, 38
    V, T, D, C, N, M = 8, 9, 10, 9, 6, 7  # widths: vision, text, shared, co-attention, neck, head
    c = {"vision_layers": 12, "patch_size": 16, "input_resolution": 48, "vocab_size": sot + 2, "context_length": words,
         "text_context_length": prompts + words, "cd_layers": 3, "identity_loss_weight": 0.4, "tau": 0.07, "seed": seed,
         "num_classes": K, "vision_width": V, "vision_heads": 2, "output_dim": D, "text_width": T, "text_heads": 3,
         "text_layers": 2, "cd_width": C, "cd_heads": 3, "fpn_channels": N, "head_channels": M, "post_crf_labels": K,
         "crop_size": [50, 50], "stride": [33, 33], "feature_size": [7, 12], "odd_feature_size": [5, 11],
         "train_hw": [33, 83], "slide_hw": [36, 66], "slide_ori_hw": [19, 36]}
    normal = lambda *shape: torch.randn(*shape, generator=rng)
    s = {"contexts": normal(1, prompts, T) / 3, "gamma": 0.3 + 0.15 * normal(D), "beta": 0.3 + 0.15 * normal(D),
         "backbone.class_embedding": 0.35 * normal(V), "backbone.positional_embedding": 0.4 * normal(1 + 3 * 3, V),
         "backbone.proj": normal(V, D) / V ** 0.5, "text_encoder.positional_embedding": 0.4 * normal(prompts + words, T),
         "text_encoder.text_projection": normal(T, D) / T ** 0.5,
         "text_encoder.token_embedding.weight": normal(sot + 2, T) / 2}

    def add(prefix, leaves, *shape, bias=True):
        """A weight and bias for each leaf. A vector is a norm's weight, others scale with their fan-in."""
        for name in (prefix + leaf + ("_" if leaf.endswith("in_proj") else ".") for leaf in leaves.split()):
            s[name + "weight"] = normal(*shape) / math.prod(shape[1:]) ** 0.5 if shape[1:] else 1 + 0.2 * normal(*shape)
            s.update({name + "bias": 0.15 * normal(shape[0])} if bias else {})

    add("backbone.", "conv1", V, 3, 16, 16, bias=False)
    add("backbone.", "ln_pre ln_post fpn1.0 fpn1.2 fpn2.0 fpn3 fpn4.0", V)
    add("backbone.", "fpn1.1 fpn1.4 fpn2.1", V, V, 2, 2)
    add("text_encoder.", "ln_final", T)
    for part, width, layers in (("backbone", V, c["vision_layers"]), ("text_encoder", T, c["text_layers"])):
        for name in (f"{part}.transformer.resblocks.{i}." for i in range(layers)):
            add(name, "ln_1 ln_2", width)
            add(name, "attn.in_proj", 3 * width, width)
            add(name, "attn.out_proj", width, width)
            add(name, "mlp.c_fc", 4 * width, width)
            add(name, "mlp.c_proj", width, 4 * width)
    add("context_decoder.", "memory_proj.0 text_proj.0", D)
    add("context_decoder.", "memory_proj.1 text_proj.1", C, D)
    add("context_decoder.", "memory_proj.2 out_proj.0 anti_out_proj.0", C)
    add("context_decoder.", "out_proj.1 anti_out_proj.1", D, C)
    for name in (f"context_decoder.{side}.{i}." for side in ("decoder", "anti_decoder") for i in range(c["cd_layers"])):
        add(name, "norm1 norm2 norm3", C)
        for part in ("self_attn.", "cross_attn."):
            add(name + part, "q_proj k_proj v_proj", C, C, bias=False)
            add(name + part, "proj", C, C)
        add(name, "mlp.0", 4 * C, C)
        add(name, "mlp.3", C, 4 * C)
    add("decode_head.", "conv_seg", K, M, 1, 1)
    for i in range(4):
        add("neck.", f"lateral_convs.{i}.conv", N, V + K, 1, 1)
        add("neck.", f"fpn_convs.{i}.conv", N, N, 3, 3)
        for name in (f"decode_head.scale_heads.{i}.{2 * step}." for step in range(max(1, i))):
            add(name, "conv", M, N if name.endswith(".0.") else M, 3, 3, bias=False)
            add(name, "bn", M)
    for name in [k.removesuffix("weight") for k in s if k.endswith(("bn.weight", "fpn1.2.weight"))]:
        n = len(s[name + "weight"])
        s |= {name + "running_mean": 0.3 * normal(n), name + "running_var": 0.4 + torch.rand(n, generator=rng),
              name + "num_batches_tracked": torch.tensor(3)}

    def photo(B, H, W):
        """Smooth blobs with a little noise, (B, 3, H, W) of whole numbers 0..255."""
        return (130 + 70 * resize(normal(B, 3, 5, 7).double(), (H, W)) + 4 * normal(B, 3, H, W)).clamp(0, 255).round()

    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    normalised = lambda x: (x.float() - per_channel(mean)) / per_channel(std)
    img, scene = photo(3, *c["train_hw"]), photo(1, *c["slide_hw"])
    gt = nearest(torch.randint(0, K, (3, 1, 5, 9), generator=rng), c["train_hw"])
    gt[1][gt[1] == 0], gt[2] = 4, 0  # image 1 has no background pixel, image 2 no foreground
    gt[nearest(torch.rand(3, 1, 9, 13, generator=rng) < 0.2, c["train_hw"])] = 255
    ids = torch.zeros(K, words, dtype=torch.int64)
    for row, n in zip(ids, (1, 3, 2, 4, 1, 2, 4)):  # words in the name
        row[0], row[1:n + 1], row[n + 1] = sot, torch.randint(1, sot, (n,), generator=rng), sot + 1
    flips = [1, 0, 1]
    views = [normalised(resize(scene, hw)).flip([3] * flip) for flip, hw in zip(flips, ([33, 44], [50, 34], [34, 84]))]
    given = {"slide_img": normalised(scene), "slide_ori_hw": torch.tensor(c["slide_ori_hw"]),
             "aug_flip": torch.tensor(flips)}
    probs = torch.softmax(1.5 * resize(normal(K, 4, 5).double(), (14, 23)) + 0.4 * normal(K, 14, 23), 0).float()
    post = {"image_uint8": photo(1, 14, 23)[0].byte().permute(1, 2, 0), "probs": probs, "probs_unnormalised": 0.8 * probs}
    return {"meta.made_by": "tests/make_golden.py", "config": c, "state_dict": s, "img": normalised(img),
            "img_uint8": img.byte().permute(0, 2, 3, 1), "gt": gt, "token_ids": ids, "img_mean": mean, "img_std": std,
            "eval": given | {f"aug_img{i}": view for i, view in enumerate(views)}, "post_crf": post}


def walk(tree, path=""):
    for k, v in tree.items():
        yield from walk(v, f"{path}{k}/") if isinstance(v, dict) else [(path + k, v)]


def check(g):
    """Print the relative difference of every recorded result; True if each is within what it is allowed."""
    theirs, ours, worst = dict(walk(g)), dict(walk(compute(g))), {}
    assert set(theirs) == set(ours), set(theirs) ^ set(ours)
    for name, b in theirs.items():
        a, number = ours[name], torch.is_tensor(b) and b.is_floating_point()
        if a is b:  # an input
            continue
        assert not torch.is_tensor(b) or a.shape == b.shape, name
        if number:
            difference = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)
            difference = difference.nan_to_num(math.inf).item()
        else:
            difference = float(not (torch.equal(a, b) if torch.is_tensor(b) else a == b))
        kind = next((k for k in ("grads", "crf", "loss") if k in name), "forward") if number else "exact"
        print(f"{difference:.1e}  {name}")
        if not name.endswith(ROUNDING_NOISE):
            worst[kind] = max(worst.get(kind, (0.0, "")), (difference, name))
    for kind, (difference, name) in worst.items():
        print(f"worst of {kind}: {difference:.1e} ({ALLOWED[kind]:.0e} allowed)  {name}")
    return all(difference <= ALLOWED[kind] for kind, (difference, _) in worst.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", help="golden file to recompute")
    parser.add_argument("--out", help="golden file to write")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights and images")
    parser.add_argument("--prompts", type=int, default=5, help="learned context vectors")
    args = parser.parse_args()
    if args.check:
        sys.exit(not check(torch.load(args.check, weights_only=True)))
    single = lambda tree: {k: single(v) if isinstance(v, dict) else v.float() if torch.is_tensor(v) and v.dtype == F64 else v
                           for k, v in tree.items()}
    torch.save(single(compute(draw(args.seed, args.prompts))), args.out)


if __name__ == "__main__":
    main()
