"""Stage 2: seeds -> pseudo masks with WeakCLIP (Zhu et al., IJCV 133, 2025, DOI 10.1007/s11263-024-02224-2).

run     python stage2_weakclip.py --data VOC2012
reads   VOC2012/JPEGImages/<id>.jpg, runs/VOC2012/1_cam/seeds/<id>.png (or --seeds DIR: any method's label PNGs)
writes  runs/VOC2012/2_weakclip/{args.json, log.jsonl, checkpoint.pt, masks/<split>/<id>.png, preview.png}

CLIP knows what things look like, from 400 million captions, but not where they end. WeakCLIP keeps CLIP frozen and
trains small parts around it on the seeds, in the order of this file:
  pyramid adapter      CLIP's one coarse grid -> four resolutions
  learnable prompts    class names -> class texts that suit segmentation
  co-attention         texts look at pixels, pixels look at texts; their cosine is a score map
  text-guided decoder  the score map joins every level of the pyramid; an FPN makes logits of it
  losses               agree with the seeds, with the image's edges (dense CRF), and with the text
The trained network then relabels its own training images: the pseudo masks.

# PAPER what the abstract says, # RELEASED where the released code (hustvl/WeakCLIP, b72d559) does otherwise, # GUESS where
both are silent. Numbers such as (22) are rows of AUDIT.md.
"""
import argparse
import dataclasses
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

import clip
from eval import (COCO_CLASSES, COCO_SLOTS, IGNORE, VOC_CLASSES, check_inputs, dataset_name, folder_digest, for_each,
                  read_args, read_image, read_label, run, write_json, write_label, write_whole)
from stage1_cam import (IMAGENET_MEAN, IMAGENET_STD, Machine, common_options, crop_or_pad, dense_crf, fit, load_trained,
                        normalise, open_run, preview_ids, read_checkpoint, set_provenance, start_run, truth_pictures,
                        write_preview)

CLIP_MEAN = tuple(255 * v for v in (0.48145466, 0.4578275, 0.40821073))  # of grey levels 0..255, R G B
CLIP_STD = tuple(255 * v for v in (0.26862954, 0.26130258, 0.27577711))
TAU = 0.07  # temperature of the score map's cross entropy: CLIP's own starting value, here fixed (11)


# ============================================================================================================= switches

@dataclass(frozen=True)
class Switches:
    """What can be chosen. The defaults are `--variant paper`; `--variant released` is RELEASED below.

    `--set field=value` changes one field at a time: to study what each surprise of the released code does.
    """
    # where the released code parts from the abstract, or from what is plainly meant
    freeze_clip: bool = True             # (1) released: CLIP trains, at a rate that rises from 0 to 1e-6
    train_adapter: bool = True           # (2) released: the adapter has CLIP's rate, so hardly trains
    drop_path: float = 0.0               # (5) released: 0.1 in the image encoder
    chain_coattention: bool = True       # (8) released: every layer of a stack gets the stack's input
    class_embedding_once: bool = True    # (10) released: added twice to the class token
    positions_resized_once: bool = True  # (10) released: CLIP's table -> training grid -> window's grid
    aligned: bool = True                 # (22) released: image, logits and labels are sampled up to 3.5 px apart
    score_loss_over_valid: bool = True   # (24) released: divides by all pixels, ignored ones too
    clip_normalisation: bool = True      # (26) released: ImageNet's mean and std
    train_listed_twice: bool = False     # (27) released: train + trainaug, so VOC's 1,464 train images count twice
    pad_windows: bool = True             # (30) released: a window that is no multiple of 16 loses columns, is stretched
    # for study: the parts of the paper, and its constants
    prompts: bool = True                 # learnable contexts before the class name
    adapter: bool = True                 # False: the four levels are plain resizes of CLIP's grids
    coattention: bool = True             # False: score map of the unchanged features and texts
    text_guidance: bool = True           # False: the score map does not enter the decoder
    boundary_weight: float = 1.0         # of the CRF loss
    score_weight: float = 0.4            # of the score map's cross entropy
    loss_crf_sxy: float = 80.0           # (20) bandwidth in pixels at 64 x 64: wider than the image


PAPER = Switches()
RELEASED = Switches(freeze_clip=False, train_adapter=False, drop_path=0.1, chain_coattention=False,
                    class_embedding_once=False, positions_resized_once=False, aligned=False, score_loss_over_valid=False,
                    clip_normalisation=False, train_listed_twice=True, pad_windows=False)


RANGES = {"drop_path": (0, 1), "boundary_weight": (0, math.inf), "score_weight": (0, math.inf),
          "loss_crf_sxy": (0.1, math.inf)}


def choose_switches(variant, settings):
    """Preset name and ["field=value", ...] -> Switches. Raises ValueError for an unknown field or a value it cannot have."""
    switches = {"paper": PAPER, "released": RELEASED}[variant]
    types = {f.name: f.type for f in dataclasses.fields(Switches)}
    for text in settings:
        name, _, value = text.partition("=")
        if name not in types:
            raise ValueError(f"--set {text}: the fields are {', '.join(types)}")
        try:
            value = {"true": True, "false": False}[value.lower()] if types[name] is bool else float(value)
        except (KeyError, ValueError):
            raise ValueError(f"--set {text}: {name} is {'true or false' if types[name] is bool else 'a number'}") from None
        if name in RANGES and not RANGES[name][0] <= value < RANGES[name][1]:
            raise ValueError(f"--set {text}: {name} is from {RANGES[name][0]} to below {RANGES[name][1]}")
        switches = dataclasses.replace(switches, **{name: value})
    return switches


# ====================================================================================================== pyramid adapter

def resize(x, size, align_corners=False):
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


class PyramidAdapter(nn.Module):
    """# PAPER CLIP's grid has stride 16 only; one small op per level makes strides 4, 8, 16 and 32 of it.

    levels: four (B, C, h, w), tokens after 1/3, 1/2, 2/3 and all of CLIP's blocks; the finest comes from the shallowest (12).
    Returns (B, C, 4h, 4w), (B, C, 2h, 2w), (B, C, h, w), (B, C, h // 2, w // 2).
    """

    def __init__(self, width):
        super().__init__()
        up = lambda: nn.ConvTranspose2d(width, width, 2, stride=2)
        self.level1 = nn.Sequential(nn.GroupNorm(1, width), up(), nn.BatchNorm2d(width), nn.GELU(), up())
        self.level2 = nn.Sequential(nn.GroupNorm(1, width), up())
        self.level3 = nn.GroupNorm(1, width)
        self.level4 = nn.Sequential(nn.GroupNorm(1, width), nn.MaxPool2d(2))

    def forward(self, levels):
        return [op(x) for op, x in zip((self.level1, self.level2, self.level3, self.level4), levels)]


def resized_pyramid(levels):
    """`--set adapter=false`: the same four strides without a parameter."""
    h, w = levels[0].shape[2:]
    return [resize(levels[0], (4 * h, 4 * w)), resize(levels[1], (2 * h, 2 * w)), levels[2], F.max_pool2d(levels[3], 2)]


# =========================================================================================================== co-attention

class MultiHeadAttention(nn.Module):
    """softmax(q k' / sqrt(C / heads)) v; no bias on q, k, v; dropout on the output only (9)."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.proj, self.drop = nn.Linear(width, width), nn.Dropout(dropout)

    def forward(self, x, memory):
        """x (B, N, C) looks at memory (B, M, C) -> (B, N, C)."""
        heads = lambda t: t.unflatten(2, (self.heads, -1)).transpose(1, 2)          # (B, heads, N or M, C / heads)
        x = F.scaled_dot_product_attention(heads(self.q_proj(x)), heads(self.k_proj(memory)), heads(self.v_proj(memory)))
        return self.drop(self.proj(x.transpose(1, 2).flatten(2)))


class CoAttentionLayer(nn.Module):
    """Pre-norm decoder layer: look at oneself, look at the other side (as it is, not normed again), think."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.self_attn = MultiHeadAttention(width, heads, dropout)
        self.cross_attn = MultiHeadAttention(width, heads, dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x, memory):
        y = self.norm1(x)
        x = x + self.self_attn(y, y)
        x = x + self.cross_attn(self.norm2(x), memory)
        return x + self.drop(self.mlp(self.norm3(x)))


class CoAttention(nn.Module):
    """# PAPER co-attention matching. Texts look at pixels and pixels at texts, each starting from the other's input (9).

    visual (B, 1+N, C) global and dense embeddings, text (B, K, C); returns what to add: (B, K, C) and (B, 1+N, C).
    chain: layer i feeds layer i + 1. # RELEASED chain_coattention: all get the input, so only the last one counts (8).
    """

    def __init__(self, channels, width, heads, chain, layers=3, dropout=0.1):
        super().__init__()
        self.chain = chain
        layers_of = lambda: nn.ModuleList(CoAttentionLayer(width, heads, dropout) for _ in range(layers))
        self.visual_in = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width), nn.LayerNorm(width))
        self.text_in = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))
        self.text_layers, self.visual_layers = layers_of(), layers_of()
        self.text_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels))
        self.visual_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels))
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def stack(self, layers, x, memory):
        out = x
        for layer in layers:
            out = layer(out if self.chain else x, memory)
        return out

    def forward(self, visual, text):
        v, t = self.visual_in(visual), self.text_in(text)                           # (B, 1+N, width), (B, K, width)
        text_diff = self.text_out(self.stack(self.text_layers, t, v))               # (B, K, C)
        visual_diff = self.visual_out(self.stack(self.visual_layers, v, t))         # (B, 1+N, C)
        return text_diff, visual_diff


# ==================================================================================================== text-guided decoder

class ConvNormReLU(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()


class TextGuidedDecoder(nn.Module):
    """# PAPER every level sees the score map. Feature pyramid (Lin et al., CVPR 2017), then the Semantic-FPN head
    (Kirillov et al., CVPR 2019): each level climbs to stride 4 by 3x3 convolutions and x2 steps, and all are summed.

    pyramid: four (B, C, ., .) at strides 4, 8, 16, 32, each joined by the score map. forward -> logits (B, K, H/4, W/4).
    """

    def __init__(self, channels, fpn_channels, head_channels, classes):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(channels, fpn_channels, 1) for _ in range(4))
        self.smooth = nn.ModuleList(nn.Conv2d(fpn_channels, fpn_channels, 3, padding=1) for _ in range(4))
        self.climb = nn.ModuleList()
        for i in range(4):  # level i: max(1, i) steps
            steps = []
            for j in range(max(1, i)):
                steps.append(ConvNormReLU(fpn_channels if j == 0 else head_channels, head_channels))
                if i > 0:
                    steps.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.climb.append(nn.Sequential(*steps))
        for m in self.modules():  # He's start, as the released code's building block has it (4)
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        self.drop = nn.Dropout2d(0.1)
        self.classify = nn.Conv2d(head_channels, classes, 1)                        # torch's own start (4)

    def neck(self, pyramid):
        x = [conv(p) for conv, p in zip(self.lateral, pyramid)]                     # (B, fpn_channels, ., .)
        for i in (2, 1, 0):  # top down, nearest *to the finer size*: a factor of 2 fails on odd grids
            x[i] = x[i] + F.interpolate(x[i + 1], x[i].shape[2:], mode="nearest")
        return [conv(y) for conv, y in zip(self.smooth, x)]

    def head(self, levels):
        x = [climb(y) for climb, y in zip(self.climb, levels)]
        return x[0] + sum(resize(y, x[0].shape[2:]) for y in x[1:])                 # (B, head_channels, H/4, W/4)

    def forward(self, pyramid):
        return self.classify(self.drop(self.head(self.neck(pyramid))))


# =============================================================================================================== WeakCLIP

def drop_path(x, rate):
    """Stochastic depth: the residual branch x (B, N, C) of some images is dropped, the others scaled up."""
    keep = torch.rand(len(x), 1, 1, device=x.device) >= rate
    return x * keep / (1 - rate)


class WeakCLIP(nn.Module):
    """The network.

    clip_model: a CLIP with patch 16; token_ids (K, L) int64: tokenised class names, background first; crop: training crop in
    pixels; contexts: number of learnable prompts; cd_width, cd_heads ("context decoder", the released name of co-attention),
    fpn_channels, head_channels: sizes of the trained parts, by default half of CLIP's embedding (256 and 4 heads for
    ViT-B/16, the paper's).
    """

    def __init__(self, clip_model, token_ids, switches=PAPER, crop=512, contexts=8, cd_width=None, cd_heads=None,
                 fpn_channels=None, head_channels=None):
        super().__init__()
        self.clip, self.switches, self.crop = clip_model, switches, crop
        width, channels = clip_model.visual.proj.shape
        half, K = channels // 2, len(token_ids)  # GUESS trained parts shrink and grow with CLIP; 256 for ViT-B/16
        cd_width = cd_width or half
        guided = width + K if switches.text_guidance else width
        self.register_buffer("token_ids", token_ids, persistent=False)
        if switches.adapter:
            self.adapter = PyramidAdapter(width)
        if switches.prompts:
            # PAPER learnable prompts, shared by all classes; 8 vectors of standard deviation 1 are the released constants (7)
            text_width = clip_model.token_embedding.weight.shape[1]
            self.contexts = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, contexts, text_width)))
        if switches.coattention:
            heads = cd_heads or max(1, cd_width // 64)
            self.coattention = CoAttention(channels, cd_width, heads, switches.chain_coattention)
            self.gamma = nn.Parameter(0.1 * torch.ones(channels))                   # how much of it is added, per channel
            self.beta = nn.Parameter(0.1 * torch.ones(channels))
        self.decoder = TextGuidedDecoder(guided, fpn_channels or half, head_channels or half, K)
        if not switches.positions_resized_once:
            # RELEASED positions_resized_once: the table is stored at the training grid, later resized again from there
            table = clip_model.visual.positional_embedding
            clip_model.visual.positional_embedding = nn.Parameter(
                clip.resize_positions(table.detach(), crop // 16, crop // 16).clone())
        if switches.freeze_clip:
            # PAPER CLIP is frozen. RELEASED freeze_clip: every parameter trains, at a tiny rate (1)
            self.clip.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        if self.switches.freeze_clip:  # holds no dropout or BatchNorm today; frozen must stay frozen
            self.clip.eval()
        return self

    def encode_image(self, image):
        """image (B, 3, H, W) normalised -> four token grids (B, C, h, w), global (B, D), dense (B, D, h, w); h = H // 16."""
        if min(image.shape[2:]) < 32:
            raise ValueError(f"an image of {tuple(image.shape[2:])} pixels has no stride-32 level; 32 x 32 is the least (34)")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.switches.freeze_clip):
            visual, s = self.clip.visual, self.switches
            h, w = image.shape[2] // 16, image.shape[3] // 16
            positions = clip.resize_positions(visual.positional_embedding, h, w)    # (1 + h*w, C)
            if not s.class_embedding_once:
                # RELEASED class_embedding_once: the class token gets the class embedding a second time (10)
                positions = torch.cat([positions[:1] + visual.class_embedding, positions[1:]])
            x = visual.embed(image, positions)                                      # (B, 1 + h*w, C)
            blocks = visual.transformer.resblocks
            # GUESS the same parts of the depth for another CLIP; blocks 4, 6, 8, 12 of ViT-B/16's 12 (12)
            taps = [round(len(blocks) * part) for part in (1 / 3, 1 / 2, 2 / 3, 1)]
            levels = {}
            for i, block in enumerate(blocks):
                rate = s.drop_path * i / max(1, len(blocks) - 1) if self.training else 0
                if rate:  # RELEASED drop_path: 0 at the first block to 0.1 at the last (5)
                    x = x + drop_path(block.attn(block.ln_1(x)), rate)
                    x = x + drop_path(block.mlp(block.ln_2(x)), rate)
                else:
                    x = block(x)
                levels[i + 1] = x
            grid = lambda t: t.transpose(1, 2).unflatten(2, (h, w))                 # (B, h*w, C) -> (B, C, h, w)
            out = visual.ln_post(x) @ visual.proj                                   # (B, 1 + h*w, D)
            return [grid(levels[t][:, 1:]) for t in taps], out[:, 0], grid(out[:, 1:])

    def encode_text(self):
        """Class texts (K, D): [start, contexts, name, end], read at the end token's place."""
        x, end = self.clip.token_embedding(self.token_ids), self.token_ids.argmax(1)  # (K, L, C), (K,)
        if self.switches.prompts:
            x = torch.cat([x[:, :1], self.contexts.expand(len(x), -1, -1), x[:, 1:]], 1)  # (K, contexts + L, C)
            end = end + self.contexts.shape[1]
        return self.clip.text_features(x, end)                                      # (K, D)

    def match(self, global_, dense, text):
        """Co-attention matching. global_ (B, D), dense (B, D, h, w), text (K, D) -> score map (B, K, h, w) in [-1, 1]."""
        h, w = dense.shape[2:]
        visual = torch.cat([global_[:, None], dense.flatten(2).transpose(1, 2)], 1)  # (B, 1 + h*w, D)
        text = text.expand(len(visual), -1, -1)                                     # (B, K, D)
        if self.switches.coattention:
            text_diff, visual_diff = self.coattention(visual, text)
            text, visual = text + self.gamma * text_diff, visual + self.beta * visual_diff
        text, visual = F.normalize(text, dim=2), F.normalize(visual[:, 1:], dim=2)
        return (text @ visual.transpose(1, 2)).unflatten(2, (h, w))                 # cosine, (B, K, h, w)

    def guide(self, pyramid, score):
        """Text guidance: the score map, resized to each level, joins its channels: (B, C + K, ., .)."""
        if not self.switches.text_guidance:
            return pyramid
        return [torch.cat([p, resize(score, p.shape[2:], align_corners=True)], 1) for p in pyramid]  # raw cosine (11)

    def forward(self, image, text=None):
        """image (B, 3, H, W) normalised; text (K, D) from encode_text, to compute it once for many images.

        Returns logits (B, K, 4h, 4w), about a quarter of the image's size, and the score map (B, K, h, w), h = H // 16.
        Raises ValueError for an image under 32 pixels.
        """
        levels, global_, dense = self.encode_image(image)
        score = self.match(global_, dense, self.encode_text() if text is None else text)
        pyramid = self.adapter(levels) if self.switches.adapter else resized_pyramid(levels)
        return self.decoder(self.guide(pyramid, score)), score


# Our parameter names -> those of a released checkpoint.
RELEASED_NAMES = [(re.compile(ours), theirs) for ours, theirs in (
    (r"^clip\.visual\.", "backbone."), (r"^clip\.", "text_encoder."), (r"^adapter\.level", "backbone.fpn"),
    (r"^coattention\.visual_in\.", "context_decoder.memory_proj."), (r"^coattention\.text_in\.", "context_decoder.text_proj."),
    (r"^coattention\.text_layers\.", "context_decoder.decoder."), (r"^coattention\.text_out\.", "context_decoder.out_proj."),
    (r"^coattention\.visual_layers\.", "context_decoder.anti_decoder."),
    (r"^coattention\.visual_out\.", "context_decoder.anti_out_proj."),
    (r"^decoder\.lateral\.(\d)\.", r"neck.lateral_convs.\1.conv."),
    (r"^decoder\.smooth\.(\d)\.", r"neck.fpn_convs.\1.conv."),
    (r"^decoder\.climb\.", "decode_head.scale_heads."), (r"^decoder\.classify\.", "decode_head.conv_seg."))]


def released_name(name):
    """Our parameter name -> the released code's."""
    for ours, theirs in RELEASED_NAMES:
        name, hit = ours.subn(theirs, name)
        if hit:
            break
    return name


def from_released(state, token_ids, switches=RELEASED, vision_heads=None, transformer_heads=None, cd_heads=None):
    """State dict with released names -> WeakCLIP; sizes are read from the tensors, head counts are width // 64.

    token_ids (K, L): as for WeakCLIP. Raises ValueError naming every key that does not fit.
    """
    ours = {re.sub(r"^backbone\.(?!fpn)", "visual.", re.sub(r"^text_encoder\.", "", k)): v for k, v in state.items()}
    parts = ("visual.", "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
    clip_state = {k: v for k, v in ours.items() if k.startswith(parts)} | {"logit_scale": torch.tensor(math.log(1 / TAU))}
    try:
        sizes = dict(contexts=state["contexts"].shape[1], cd_width=len(state["context_decoder.text_proj.1.weight"]),
                     fpn_channels=len(state["neck.fpn_convs.0.conv.weight"]),
                     head_channels=state["decode_head.conv_seg.weight"].shape[1])
        crop = 16 * math.isqrt(len(state["backbone.positional_embedding"]) - 1)
    except KeyError as e:
        raise ValueError(f"no released WeakCLIP checkpoint: it lacks {e.args[0]}") from None
    clip_model = clip.CLIP.from_state_dict(clip_state, vision_heads=vision_heads, transformer_heads=transformer_heads)
    model = WeakCLIP(clip_model, token_ids, switches, crop, cd_heads=cd_heads, **sizes)
    named = {released_name(k): k for k in model.state_dict()}
    load_trained(model, {named.get(k, k): v for k, v in state.items()}, frozen=("clip.logit_scale",))
    return model


# ================================================================================================================= losses

def loss_probs(logits, size, aligned=True):
    """Head logits (B, K, ., .) -> class probabilities at the losses' resolution `size`, bounded away from zero.

    # RELEASED aligned: corners are aligned where both sizes are odd (23).
    """
    corners = not aligned and size[0] % 2 == 1 and size[1] % 2 == 1
    p = resize(logits, size, align_corners=corners).softmax(1) + 1e-7
    return p / p.sum(1, keepdim=True)                                               # (B, K, h, w)


def loss_labels(seeds, size, aligned=True):
    """Seeds (B, H, W) -> (B, h, w) by nearest pixel, at cell centres.

    # RELEASED aligned: at cell corners (22).
    """
    mode = "nearest-exact" if aligned else "nearest"
    return F.interpolate(seeds[:, None].float(), size, mode=mode)[:, 0].long()


def guide_image(image, size, mean, std, aligned=True):
    """Normalised image (B, 3, H, W) -> what the CRF of the boundary loss sees: (B, 3, h, w) of whole grey levels.

    Ours averages each cell. # RELEASED aligned: corner-aligned samples of the normalised image, without low-pass (22).
    """
    if aligned:
        # GUESS the low-pass is a plain average; grey levels are cut to whole numbers, as in the released code
        x = F.interpolate(image.float(), size, mode="area")
    else:
        x = image.cpu() if image.device.type == "mps" else image                     # MPS has no float64
        x = F.interpolate(x.double(), size, mode="bilinear", align_corners=True).float().to(image.device)
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (mean, std))
    return (x * std + mean).clamp(0, 255).to(torch.uint8)


def seeding_loss(p, y):
    """# PAPER seeding: class-balanced log likelihood of the seeds.

        L = mean over images of  - 1/|bg| sum_{y=0} log p_0  -  1/|fg| sum_{y>0} log p_y
    p (B, K, h, w) probabilities; y (B, h, w) int64, 255 = unsure. A side without a pixel adds 0. Returns a scalar.
    Background pixels outnumber all others, so each side has a mean of its own.
    """
    nll = F.nll_loss(p.log(), y, ignore_index=IGNORE, reduction="none")             # (B, h, w)
    fg, bg = (y > 0) & (y != IGNORE), y == 0
    mean = lambda side: (nll * side).sum((1, 2)) / side.sum((1, 2)).clamp(min=1)    # (B,)
    return (mean(bg) + mean(fg)).mean()


def boundary_loss(p, q):
    """# PAPER boundary: agreement with the dense CRF's answer to p, so that the network learns to end where colours change.

    KL(q || p), each ratio clipped:
        L = mean over images and pixels of  sum_k q_k log clip(q_k / p_k, 0.05, 20)
    p (B, K, h, w) probabilities; q (B, K, h, w) from `crf_target`, no gradient. Where the clip cuts, the gradient is zero.
    Runs over all pixels and classes, padding and unsure pixels too (19). Returns a scalar.
    """
    return (q * (q / p).clamp(0.05, 20).log()).sum(1).mean()


def floor_and_normalise(q):
    """The CRF's answer (B, K, h, w), floored at 1e-4 and made to sum to one again."""
    q = q.clamp(min=1e-4)
    return q / q.sum(1, keepdim=True)


@torch.no_grad()
def crf_target(p, guide, sxy):
    """Dense CRF of the network's probabilities, on the augmented image (21). p (B, K, h, w), guide (B, 3, h, w)."""
    return floor_and_normalise(dense_crf(p.clamp(min=1e-4), guide, gaussian=(3, 3), bilateral=(sxy, 13, 10)))


def mean_cross_entropy(logits, labels, over_valid=True):
    """Cross entropy of logits (B, K, H, W) and labels (B, H, W), 255 = unsure: mean over labelled pixels, 0 without any.

    # RELEASED score_loss_over_valid: mean over all pixels, unsure ones add 0 (24).
    """
    nll = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return nll / ((labels != IGNORE).sum().clamp(min=1) if over_valid else labels.numel())


def score_loss(score, seeds, over_valid=True):
    """# PAPER text-to-pixel matching learns from the seeds: the score map (B, K, h, w) / tau, resized to theirs (B, H, W)."""
    return mean_cross_entropy(resize(score / TAU, seeds.shape[1:]), seeds, over_valid)


def weakclip_losses(logits, score, image, seeds, switches, mean, std):
    """The three losses of a batch, in float32, weighted: their sum is trained.

    logits (B, K, ., .), score (B, K, h, w), image (B, 3, H, W) normalised, seeds (B, H, W). Returns {name: scalar}.
    """
    s, size = switches, (image.shape[2] // 8, image.shape[3] // 8)
    p = loss_probs(logits.float(), size, s.aligned)
    terms = {"loss_seeding": seeding_loss(p, loss_labels(seeds, size, s.aligned))}
    if s.boundary_weight:
        q = crf_target(p, guide_image(image, size, mean, std, s.aligned), s.loss_crf_sxy)
        terms["loss_boundary"] = s.boundary_weight * boundary_loss(p, q)
    if s.score_weight:
        terms["loss_score"] = s.score_weight * score_loss(score.float(), seeds, s.score_loss_over_valid)
    return terms


# =================================================================================================================== data

def fit_size(H, W, short, long):
    """Size (h, w) of an H x W image scaled, ratio kept, to fit `short` and `long` sides."""
    scale = min(long / max(H, W), short / min(H, W))
    return max(1, int(H * scale + 0.5)), max(1, int(W * scale + 0.5))


def resize_image(image, size):
    """(H, W, 3) uint8 -> (h, w, 3) uint8, bilinear without low-pass, as the released code's OpenCV does."""
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    return resize(x, size)[0].round().to(torch.uint8).permute(1, 2, 0).numpy()


def photometric_distortion(rng, image):
    """Brightness +-32, contrast x 0.5..1.5, saturation x 0.5..1.5, hue +-36 degrees, each with probability 0.5.

    image (H, W, 3) uint8; contrast comes before or after saturation and hue, at random. Cut to uint8 after each step.
    """
    def linear(x, factor, shift=0.0):
        return np.clip(x.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)
    coin = lambda: rng.random() < 0.5
    if coin():
        image = linear(image, 1, rng.uniform(-32, 32))
    contrast, first = (rng.uniform(0.5, 1.5) if coin() else 1), coin()
    if first:
        image = linear(image, contrast)
    if coin():
        hsv = np.array(Image.fromarray(image).convert("HSV"))
        hsv[..., 1] = linear(hsv[..., 1], rng.uniform(0.5, 1.5))
        image = np.array(Image.fromarray(hsv, "HSV").convert("RGB"))
    if coin():
        hsv = np.array(Image.fromarray(image).convert("HSV"))                       # hue 0..255 is the full circle
        hsv[..., 0] += np.uint8(round(int(rng.integers(-18, 18)) * 256 / 180) % 256)  # released steps of 2 degrees; wraps
        image = np.array(Image.fromarray(hsv, "HSV").convert("RGB"))
    return image if first else linear(image, contrast)


def random_crop(rng, label, crop):
    """Corner (top, left) of a crop in which no label covers 75 % of what is labelled; drawn anew up to 10 times."""
    H, W = label.shape
    draw = lambda: (int(rng.integers(0, max(H - crop, 0) + 1)), int(rng.integers(0, max(W - crop, 0) + 1)))
    top, left = draw()
    for _ in range(10):
        part = label[top:top + crop, left:left + crop]
        counts = np.bincount(part[part != IGNORE], minlength=2)
        if counts.max() < 0.75 * counts.sum():                                      # so at least two labels
            break
        top, left = draw()
    return top, left


class SeededImages(torch.utils.data.Dataset):
    """Item (index, sample) -> image (3, crop, crop) normalised, seeds (crop, crop) int64: scale, crop, flip, colours, pad."""

    def __init__(self, data, ids, seeds, crop, seed, switches):
        self.data, self.ids, self.seeds, self.crop, self.seed = data, ids, seeds, crop, seed
        self.aligned, self.mean_std = switches.aligned, mean_and_std(switches)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, item):
        index, sample = item
        rng = np.random.default_rng([self.seed, sample, 2])
        i, crop = self.ids[index], self.crop
        image = self.data.image(i)
        label = torch.from_numpy(read_label(self.seeds / f"{i}.png", len(self.data.classes), image.shape[:2]))
        ratio = rng.uniform(0.5, 2)
        size = fit_size(*image.shape[:2], int(crop * ratio), int(4 * crop * ratio))
        image = resize_image(image, size)
        # RELEASED aligned: labels are taken at cell corners, half a pixel off the image (22)
        label = F.interpolate(label[None, None], size, mode="nearest-exact" if self.aligned else "nearest")[0, 0].numpy()
        top, left = random_crop(rng, label, crop)
        image, label = image[top:top + crop, left:left + crop], label[top:top + crop, left:left + crop]
        if rng.random() < 0.5:
            image, label = image[:, ::-1], label[:, ::-1]
        x = normalise(photometric_distortion(rng, np.ascontiguousarray(image)), *self.mean_std)
        y = torch.from_numpy(label.astype(np.int64))
        return crop_or_pad(x, crop, 0, 0, 0), crop_or_pad(y, crop, 0, 0, IGNORE)    # padded right and below


def mean_and_std(switches):
    """# RELEASED clip_normalisation: ImageNet's (26)."""
    return (CLIP_MEAN, CLIP_STD) if switches.clip_normalisation else (IMAGENET_MEAN, IMAGENET_STD)


# ============================================================================================================== training

def make_optimizer(model, lr):
    """AdamW, weight decay 3e-5 on everything. Groups differ in their base rate only.

    # RELEASED freeze_clip, train_adapter: CLIP and adapter are in a group of base rate 0 (1, 2).
    """
    slow = ("clip.",) if model.switches.train_adapter else ("clip.", "adapter.")
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in named if n.startswith(slow)], "base_lr": 0.0},
              {"params": [p for n, p in named if not n.startswith(slow)], "base_lr": lr}]
    # the trained parts first: the log shows the first group's rate
    return torch.optim.AdamW([g for g in groups if g["params"]][::-1], lr=lr, weight_decay=3e-5)


def warm_cosine(iters, low=1e-6, warm_ratio=1e-6):
    """Rate of a group: a cosine from its base rate to `low`, from iteration 0 on, times a linear warm-up.

    `low` is absolute, so a group whose base rate is 0 *rises* to it (1). Warm-up: min(1500, 0.075 iters) iterations.
    """
    warm = min(1500, int(0.075 * iters))

    def rate(group, step):
        lr = low + (group["base_lr"] - low) * (1 + math.cos(math.pi * step / iters)) / 2
        return lr * (1 - (1 - step / warm) * (1 - warm_ratio)) if step < warm else lr
    return rate


# ============================================================================================================= inference

def window_starts(length, crop, stride):
    """Starts of the sliding windows on one axis; the last is shifted back to end at the border."""
    count = max(length - crop + stride - 1, 0) // stride + 1
    return [max(min(k * stride, length - crop), 0) for k in range(count)]


def window_logits(model, x, text, pad):
    """Windows (B, 3, h, w) -> logits (B, K, h, w).

    pad: to a multiple of 16, and cut back. # RELEASED pad_windows: up to 15 columns are lost, the rest is stretched (30).
    """
    h, w = x.shape[2:]
    if pad:  # GUESS with the mean colour, right and below, as in training
        x = F.pad(x, (0, max(-w % 16, 32 - w), 0, max(-h % 16, 32 - h)))
    return resize(model(x, text)[0].float(), x.shape[2:])[..., :h, :w]


def slide(model, x, text, crop, stride, pad=True, batch=8):
    """Logits of a whole image (1, 3, H, W) -> (1, K, H, W): windows of `crop`, averaged where they overlap."""
    H, W = x.shape[2:]
    places = [(top, left) for top in window_starts(H, crop, stride) for left in window_starts(W, crop, stride)]
    total, count = x.new_zeros(1, len(text), H, W), x.new_zeros(1, 1, H, W)
    for part in (places[k:k + batch] for k in range(0, len(places), batch)):
        windows = torch.cat([x[..., t:t + crop, l:l + crop] for t, l in part])      # (n, 3, h, w), all of one size
        for logits, (t, l) in zip(window_logits(model, windows, text, pad), part):
            total[..., t:t + crop, l:l + crop] += logits
            count[..., t:t + crop, l:l + crop] += 1
    return total / count


def probabilities(model, views, text, crop, size, pad=True):
    """Mean class probabilities over views of one photo.

    views: [(image (1, 3, H, W) normalised, mirrored?)]; size (H, W) of the photo. Returns (K, H, W).
    Logits are resized to the photo's size first, softmax comes after, and the mirror is undone last.
    """
    total = 0
    for x, mirrored in views:
        p = resize(slide(model, x, text, crop, 2 * crop // 3, pad), size).softmax(1)
        total = total + (p.flip(3) if mirrored else p)
    return (total / len(views))[0]


def make_views(image, scales, flip, mean_std, crop=None):
    """Photo (H, W, 3) uint8 -> its views at all scales, each with its mirror image if `flip`.

    crop given: scale 1 has short side `crop`, long side at most 4 crop; else the photo's own size.
    """
    for scale in scales:
        H, W = image.shape[:2]
        short, long = (int(crop * scale), int(4 * crop * scale)) if crop else (min(H, W) * scale, max(H, W) * scale)
        x = normalise(resize_image(image, fit_size(H, W, short, long)), *mean_std)[None]
        yield from [(x, False), (x.flip(3), True)] if flip else [(x, False)]


# (Gaussian sxy, weight), (bilateral sxy, srgb, weight) after inference
MASK_CRF = {"VOC2012": ((3, 3), (83, 5, 3)), "COCO2014": ((1, 3), (67, 3, 4))}


def mask_from(probs, image, crf, allowed=None):
    """Class probabilities -> mask.

    probs (K, H, W); image (H, W, 3) uint8; crf: an entry of MASK_CRF, None for none; allowed: the only classes that may
    win (image-level labels), None for all (28). The CRF sees the classes that win somewhere, floored at 1e-5 and not
    renormalised. Returns (H, W) uint8 and the kept class numbers (J,).
    """
    if allowed is not None:
        probs = probs[allowed]
    kept = probs.argmax(0).unique()
    probs = probs[kept]
    if crf and len(kept) > 1:
        guide = torch.from_numpy(image).permute(2, 0, 1)[None].to(probs.device)
        probs = dense_crf(probs.clamp(min=1e-5)[None], guide, *crf)[0]
    names = kept.cpu().numpy() if allowed is None else np.asarray(allowed)[kept.cpu().numpy()]
    return names[probs.argmax(0).cpu().numpy()].astype(np.uint8), names


@torch.no_grad()
def write_masks(predict, images, folder, machine, crf, allowed=None, probs_folder=None):
    """masks/<split>/<id>.png for every image; what exists is done. Serves stages 2 and 3.

    predict: photo (H, W, 3) uint8 -> probabilities (K, H, W); images: [(id, function that reads the photo)];
    allowed: {id: class numbers}, or None. probs_folder: also <id>.npz (keys: class numbers, prob: float16 (J, H, W)).
    """
    for i, read in tqdm(machine.share(images), desc=f"masks {folder.name}", disable=not machine.main):
        path = folder / f"{i}.png"
        if path.is_file():
            continue
        image = read()
        probs = predict(image)
        mask, kept = mask_from(probs, image, crf, allowed and allowed[i])
        if probs_folder:
            prob = probs[torch.as_tensor(kept)].cpu().numpy().astype(np.float16)
            write_whole(probs_folder / f"{i}.npz", lambda f: np.savez_compressed(f, keys=kept.astype(np.uint8), prob=prob))
        write_label(path, mask)
    machine.wait()


# ========================================================================================================= command line

def load_clip(name, seed, machine):
    """`--clip` -> (CLIP on the CPU, what tells it from another: the file's sha256). Raises ValueError."""
    if name == "random":
        if machine.main:
            print("--clip random: an untrained ViT-B/16, for tests and timings; masks will be no better than the seeds")
        torch.manual_seed(seed)
        return clip.CLIP(), f"random, seed {seed}"
    if name in clip.MODELS and not name.endswith("/16"):
        raise ValueError(f"--clip {name}: the pyramid adapter is made for patch 16, so ViT-B/16")
    if not machine.main:
        machine.wait()                                                              # one process downloads
    path = clip.locate(name)
    if machine.main:
        machine.wait()
    model = clip.CLIP.from_state_dict(clip.read_state_dict(path))
    if model.visual.conv1.kernel_size != (16, 16):
        raise ValueError(f"--clip {name}: patch size {model.visual.conv1.kernel_size[0]}; the pyramid adapter is made for 16")
    return model, clip.file_sha256(path)


def name_tokens(classes, context_length, prompts=8):
    """Class names, as they stand in the dataset, without template -> token ids (K, L), L that of the longest (13)."""
    tokens = clip.tokenize(list(classes))
    L = int(tokens.argmax(1).max()) + 1
    if L + prompts > context_length:
        raise ValueError(f"the longest class name has {L} tokens; with {prompts} prompts CLIP's {context_length} are too few")
    return tokens[:, :L]


def new_network(args, data, switches, machine):
    """An untrained WeakCLIP around a frozen CLIP -> (network, facts: what tells its checkpoint from another's)."""
    clip_model, digest = load_clip(args.clip, args.seed, machine)
    torch.manual_seed(args.seed)
    model = WeakCLIP(clip_model, name_tokens(data.classes, clip_model.context_length), switches, args.crop)
    return model, {"stage": "2_weakclip", "classes": list(data.classes), "clip": digest, "crop": args.crop,
                   "switches": dataclasses.asdict(switches)}


def open_checkpoint(path, args, machine, classes=None):
    """A trained network from our checkpoint.pt or from a released one, which is told by its keys.

    classes: the dataset's, None to take the checkpoint's. Returns (network, crop, iterations or None, outputs: the channels
    that are the dataset's classes, None for all). Raises ValueError for a file of another kind, dataset or CLIP.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint; python stage2_weakclip.py --data {args.data} trains one")
    saved = clip.read_foreign(path)
    if isinstance(saved, dict) and "state_dict" in saved:
        return open_released(path, saved, args, classes)
    saved = read_checkpoint(path)
    facts = saved.get("facts", {})
    if facts.get("stage") != "2_weakclip":
        raise ValueError(f"{path}: neither a checkpoint of stage 2 nor a released one")
    if classes and list(classes) != facts["classes"]:
        raise ValueError(f"{path} knows {', '.join(facts['classes'])}; the dataset has {', '.join(classes)}")
    clip_model, digest = load_clip(args.clip, args.seed, machine)
    if digest != facts["clip"]:
        raise ValueError(f"{path} was trained with another CLIP than --clip {args.clip}; name that one")
    switches = Switches(**facts["switches"])
    model = WeakCLIP(clip_model, name_tokens(facts["classes"], clip_model.context_length), switches, facts["crop"])
    load_trained(model, saved["model"], ("clip.",) if switches.freeze_clip else ())
    return model, facts["crop"], saved["step"], None


def open_released(path, saved, args, classes=None):
    """The same from a released checkpoint {"meta": ..., "state_dict": ...}: it holds its own CLIP, `--clip` is not read.

    The switches are `--variant released`, `--set` on top. Of COCO's 91 released slots 80 and background are classes (32).
    """
    state = {k: v for k, v in saved["state_dict"].items() if isinstance(v, torch.Tensor)}
    K, outputs = len(state.get("decode_head.conv_seg.weight", ())), None
    context_length = len(state.get("text_encoder.positional_embedding", ()))
    names = classes or {len(VOC_CLASSES): VOC_CLASSES, len(COCO_SLOTS): COCO_CLASSES}.get(K, ())
    if K == len(COCO_SLOTS) and tuple(names) == COCO_CLASSES:
        names, outputs = COCO_SLOTS, [COCO_SLOTS.index(n) for n in COCO_CLASSES]
    if not K or "contexts" not in state:
        raise ValueError(f"{path}: no released WeakCLIP checkpoint: it lacks decode_head.conv_seg.weight or contexts")
    if len(names) != K:
        raise ValueError(f"{path} has {K} classes, the dataset {len(names)}")
    tokens = name_tokens(names, context_length, state["contexts"].shape[1])
    model = from_released(state, tokens, choose_switches("released", args.set))
    meta = saved.get("meta")
    step = meta.get("iter") if isinstance(meta, dict) else None
    return model, model.crop, step if type(step) is int else None, outputs


def positive(text):
    if float(text) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def mask_options(p, scales):
    """The options of stages 2 and 3 that change masks but not the model."""
    masks = p.add_argument_group("masks (a finished model rewrites them; nothing is trained again)")
    masks.add_argument("--scales", type=positive, nargs="+", default=scales, help="test scales [%(default)s]")
    masks.add_argument("--no-flip", action="store_true", help="leave out the mirror images")
    masks.add_argument("--no-crf", action="store_true", help="leave out the dense CRF")
    masks.add_argument("--label-filter", action="store_true", help="training list: only the image's classes may win (28)")
    masks.add_argument("--save-probs", action="store_true", help="also write probs/<split>/<id>.npz, float16")
    masks.add_argument("--images", type=Path, metavar="DIR",
                       help="write masks of the photos in DIR to images/ and stop; the CRF takes about 2 KB a pixel")
    return masks


MASK_OPTIONS = ("scales", "no_flip", "no_crf", "label_filter", "save_probs", "images")


def mask_crf(args, table=MASK_CRF):
    """The dataset's constants of the dense CRF after inference, VOC's for an unknown one; None with --no-crf."""
    return None if args.no_crf else table.get(dataset_name(args.data), table["VOC2012"])


def mask_facts(args, iters):
    """How masks were made: what changes them, and what a score must say."""
    return dict(iters=iters, scales=list(args.scales), flip=not args.no_flip, crf=not args.no_crf,
                label_filter=args.label_filter, save_probs=args.save_probs)


def masks_are_current(folder, args, iters, machine):
    """True if the masks in `folder` were finished with these options; else what other options left is removed."""
    facts = mask_facts(args, iters)
    same = read_args(folder).get("provenance") == facts
    if same and (folder / "preview.png").is_file():                                 # written last
        return True
    if machine.main and not same:
        for part in ("masks", "probs"):
            shutil.rmtree(folder / part, ignore_errors=True)
        (folder / "preview.png").unlink(missing_ok=True)
        set_provenance(folder, facts, {k: v for k, v in vars(args).items() if k in MASK_OPTIONS})
    machine.wait()
    return False


def mask_photos(predict, args, iters, checkpoint, folder, machine, crf):
    """`--images DIR`: masks of a folder of photos, in `folder`/images/<DIR's name>; serves stages 2 and 3."""
    paths = sorted(p for p in args.images.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths or len({p.stem for p in paths}) < len(paths):
        raise ValueError(f"--images {args.images}: photos (.jpg, .jpeg, .png) with different names are expected")
    out = folder / "images" / args.images.resolve().name
    facts = {**mask_facts(args, iters), "checkpoint": clip.file_sha256(checkpoint), "photos": str(args.images.resolve())}
    if machine.main:
        for_each(lambda p: read_image(p).shape, paths, "checking photos")
        if read_args(out) != facts:
            shutil.rmtree(out, ignore_errors=True)
            write_json(out / "args.json", facts)
    machine.wait()
    write_masks(predict, [(p.stem, lambda p=p: read_image(p)) for p in paths], out, machine, crf,
                probs_folder=out / "probs" if args.save_probs else None)
    if machine.main:
        print(f"{out}: {len(paths)} masks")


def write_all_masks(predict, data, splits, folder, args, machine, crf):
    """Masks of every list in `splits`; the image-label filter acts on the training list only."""
    for split in splits:
        ids = data.ids(split, args.limit)
        allowed = None
        if args.label_filter and split == args.split:
            allowed = {i: [0, *keys] for i, keys in data.image_labels(ids).items()}
        write_masks(predict, [(i, lambda i=i: data.image(i)) for i in ids], folder / "masks" / split, machine, crf, allowed,
                    folder / "probs" / split if args.save_probs else None)


def parse_args(argv=None):
    p, method = common_options(__doc__.splitlines()[0], lr=1e-4, batch_size=None, crop=512)
    method.add_argument("--clip", default="ViT-B/16", metavar="NAME|PATH|random",
                        help="the frozen model, patch 16 [%(default)s]")
    method.add_argument("--seeds", type=Path, metavar="DIR", help="label PNGs to learn from, any method's [stage 1's]")
    method.add_argument("--variant", choices=("paper", "released"), default="paper",
                        help="the abstract, or the released code to the letter [%(default)s]")
    method.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE",
                        help="change one switch; " + ", ".join(f.name for f in dataclasses.fields(Switches)))
    method.add_argument("--checkpoint", type=Path, metavar="FILE", help="train nothing, make masks with this checkpoint")
    mask_options(p, [0.5, 0.75, 1.0, 1.25, 1.5, 1.75])
    return p.parse_args(argv)


def predictor(model, args, crop, machine, outputs=None):
    """photo (H, W, 3) uint8 -> class probabilities (K, H, W), over all scales and mirror images.

    outputs: which channels to return, None for all.
    """
    model.to(machine.device).eval()
    mean_std = mean_and_std(model.switches)
    with torch.no_grad(), machine.autocast():
        text = model.encode_text()

    def predict(image):
        views = [(x.to(machine.device), m) for x, m in make_views(image, args.scales, not args.no_flip, mean_std, crop)]
        with machine.autocast():
            probs = probabilities(model, views, text, crop, image.shape[:2], model.switches.pad_windows)
        return probs if outputs is None else probs[outputs]
    return predict


def label_photos(args):
    """`--images`: needs a checkpoint (the run's, or --checkpoint) and CLIP, but no dataset."""
    machine, folder = Machine(args.device, args.amp), args.runs / dataset_name(args.data) / "2_weakclip"
    path = args.checkpoint or folder / "checkpoint.pt"
    model, crop, iters, outputs = open_checkpoint(path, args, machine)
    mask_photos(predictor(model, args, crop, machine, outputs), args, iters, path, folder, machine, mask_crf(args))


def train(model, facts, data, ids, args, machine, folder):
    """Train the parts around CLIP on the seeds, from the last checkpoint if there is one."""
    switches, mean_std = model.switches, mean_and_std(model.switches)

    def losses(model, image, seeds):
        with machine.autocast():
            logits, score = model(image)
        return weakclip_losses(logits, score, image, seeds, switches, *mean_std)

    fit(model, SeededImages(data, ids, args.seeds, args.crop, args.seed, switches), make_optimizer(model, args.lr), losses,
        warm_cosine(args.iters), args, machine, folder, facts, frozen=("clip.",) if switches.freeze_clip else ())


def preview(data, ids, args, folder):
    """image | seeds | masks | truth, of some training images."""
    rows = []
    for i in preview_ids(ids):
        labels = [p for p in (args.seeds / f"{i}.png", folder / "masks" / args.split / f"{i}.png") if p.is_file()]
        rows.append([data.image(i), *map(read_label, labels), *truth_pictures(data, i)])
    write_preview(folder / "preview.png", rows)


def main():
    args = parse_args()
    switches = choose_switches(args.variant, args.set)
    if args.images:
        return label_photos(args)
    coco = dataset_name(args.data) == "COCO2014"
    args.iters = (40_000 if coco else 20_000) if args.iters is None else args.iters
    args.batch_size = (24 if coco else 16) if args.batch_size is None else args.batch_size
    data, machine = open_run(args)
    args.seeds = args.seeds or args.runs / data.name / "1_cam" / "seeds"
    folder, ids = args.runs / data.name / "2_weakclip", data.ids(args.split, args.limit)
    splits = [args.split] + (["val"] if data.has("val") and args.split != "val" else [])
    if args.label_filter:
        data.image_labels(ids)
    listed = ids
    if switches.train_listed_twice and args.split == "trainaug" and data.has("train"):
        # RELEASED train_listed_twice: trainaug contains train, and both lists are read (27)
        listed = ids + data.ids("train", args.limit)
    if machine.main:
        check_inputs(data, sorted(set(listed)), None if args.checkpoint else args.seeds)
        check_inputs(data, [i for split in splits[1:] for i in data.ids(split, args.limit)])

    if args.checkpoint:
        model, args.crop, args.iters, outputs = open_checkpoint(args.checkpoint, args, machine, data.classes)
        came_from = {"checkpoint": clip.file_sha256(args.checkpoint)}
    else:
        (model, facts), outputs = new_network(args, data, switches, machine), None
        came_from = {"clip": facts["clip"], "seeds": folder_digest(args.seeds, ids)}
    start_run(folder, args, machine, {**data.digests(*splits), **came_from}, MASK_OPTIONS)
    if masks_are_current(folder, args, args.iters, machine):
        return print(f"{folder}: finished; --overwrite starts afresh")
    if not args.checkpoint:
        train(model.to(machine.device), facts, data, listed, args, machine, folder)
    write_all_masks(predictor(model, args, args.crop, machine, outputs), data, splits, folder, args, machine, mask_crf(args))
    if machine.main:
        preview(data, ids, args, folder)
        print(f"{folder}: masks of {', '.join(splits)}. Next: python stage3_segment.py --data {args.data}")


if __name__ == "__main__":
    run(main)
