"""Stage 2: seeds -> pseudo masks with WeakCLIP (Zhu et al., IJCV 133, 2025).

DOI of the paper: 10.1007/s11263-024-02224-2

run     python stage2_weakclip.py --data VOC2012
reads   VOC2012/JPEGImages/<id>.jpg
        runs/VOC2012/1_cam/seeds/<id>.png (or --seeds DIR: label PNGs of any method)
writes  runs/VOC2012/2_weakclip/{args.json, log.jsonl, checkpoint.pt}
        runs/VOC2012/2_weakclip/masks/<split>/<id>.png
cost    not measured on all of VOC; with ViT-B/16 one core of an Intel Xeon takes 5.6 s for a crop
        of 512 pixels in training (--amp 2.2 s), and 63 s with --amp for a mask of a 375 x 500 photo

CLIP knows what things look like, from 400 million captions, but not where they end. WeakCLIP keeps
CLIP frozen and trains small parts around it on the seeds. An image takes this way through them,
which is also the order of this file:
  pyramid adapter      CLIP's one coarse grid becomes four grids, at strides 4, 8, 16 and 32
  learnable prompts    class names become class texts that suit segmentation
  co-attention         texts look at pixels, pixels look at texts; their cosine is a score map
  text-guided decoder  the score map joins every level of the pyramid; an FPN makes logits of it
  losses               logits agree with the seeds, and with the image's edges (dense CRF); the
                       score map agrees with the seeds
The trained network then relabels its own training images: these are the pseudo masks. Checkpoints
and the command line come last and can be skipped at first reading.

From clip/ comes the frozen model; from eval.py come the dataset folder, images, labels and other
files; from stage1_cam.py come the dense CRF and what the training loops of all stages share.

Written from the abstract and the released code (hustvl/WeakCLIP, commit b72d559); the full text was
not at hand. Lines are marked # PAPER, # RELEASED or # GUESS:
  PAPER     the abstract, or what is plainly meant
  RELEASED  the released code does otherwise; the field of `Switches` that chooses is named
  GUESS     both are silent: what we chose, and why
Numbers in brackets, such as (22), are rows of AUDIT.md's ledger.

Shapes stand at the ends of lines: B images of a batch, K classes with background first, C channels
of the tensor at hand, D channels of CLIP's embeddings, H W pixels, h w cells of the grid at hand,
N = h*w tokens, or the rows of a sequence in attention.
"""
import dataclasses
import functools
import math
import re
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

import clip
from eval import (COCO_CLASSES, COCO_SLOTS, IGNORE, MAIN, PHOTO_ENDINGS, VOC_CLASSES, check_classes,
                  check_inputs, check_outside, dataset_name, files_digest, find_file, for_each,
                  is_finished, overlay, read_image, read_label, read_record, run, start_run,
                  update_record, write_label, write_whole)
from stage1_cam import (CLIP_COLOURS, IMAGENET_COLOURS, Machine, batches, check_output,
                        common_options, conv_layout, crop_or_pad, dense_crf, load_trained, log,
                        next_command, normalise, number, open_run, resize, resume, save)


# ===================================================================================== switches

@dataclasses.dataclass(frozen=True)
class Switches:
    """What can be chosen about the method. The defaults are `--variant paper`.

    `--variant released` is the preset of that name below. `--set field=value` changes one field,
    to study what a part of the paper, or a surprise of the released code, does. The list is to come
    back to: search for a field's name to see where it acts, and why.
    """
    # Where the released code parts from the abstract, or from what is plainly meant.
    freeze_clip: bool = True  # (1) released, False: CLIP trains, at a rate that rises to 1e-6
    train_adapter: bool = True  # (2) released, False: at that same rate, which is hardly at all
    drop_path: float = 0.0  # (5) released: 0.1 in the image encoder
    chain_coattention: bool = True  # (8) released: every layer of a stack gets the stack's input
    class_embedding_once: bool = True  # (10) released: added twice to the class token
    positions_resized_once: bool = True  # (10) released: CLIP's grid -> training's -> the window's
    # (22, 23) image, logits and labels are all read at the cells' centres; released: labels and the
    # CRF's image lie up to 3.5 pixels off the logits. (Not the same as torch's align_corners.)
    aligned: bool = True
    score_loss_over_valid: bool = True  # (24) released: divided by all pixels, unsure ones too
    clip_normalisation: bool = True  # (26) released: ImageNet's mean and standard deviation
    train_listed_twice: bool = False  # (27) released: VOC's 1,464 train images count twice
    pad_windows: bool = True  # (30) released: windows lose pixels beyond a multiple of 16

    # For study: the parts of the paper, and its constants.
    prompts: bool = True  # learnable vectors (contexts) before the class name
    adapter: bool = True  # False: the four levels are plain resizes of CLIP's grids
    coattention: bool = True  # False: score map of the unchanged pixel features and texts
    text_guidance: bool = True  # False: the score map does not enter the decoder
    boundary_weight: float = 1.0  # of the CRF loss; 0 leaves it out
    score_weight: float = 0.4  # of the score map's cross entropy; 0 leaves it out
    loss_crf_sxy: float = 80.0  # (20) bandwidth in pixels at 64 x 64: wider than the image


PAPER = Switches()
RELEASED = Switches(
    freeze_clip=False,
    train_adapter=False,
    drop_path=0.1,
    chain_coattention=False,
    class_embedding_once=False,
    positions_resized_once=False,
    aligned=False,
    score_loss_over_valid=False,
    clip_normalisation=False,
    train_listed_twice=True,
    pad_windows=False)


# ============================================================================== pyramid adapter
# A ViT-B/16 looks at patches of 16 x 16 pixels and keeps this one grid from its first block to its
# last: for a photo of 512 x 512 pixels 32 x 32 tokens. Segmentation needs more. The leg of a cow
# that is 6 pixels wide fills at most 6/16 of a token's width, so whatever the token says is said
# mostly of the grass beside it. On a grid of stride 4 the same leg, wherever it stands, fills at
# least three quarters of some cell's width. A bus, on the other hand, is too large to be judged by
# one token. Ordinary backbones have what decoders ask for, a pyramid:
#
#     stride 4    128 x 128 cells   edges and thin parts
#     stride 8     64 x  64
#     stride 16    32 x  32         CLIP's own grid
#     stride 32    16 x  16         context
#
# The adapter makes such a pyramid of CLIP's grid. CLIP's depth stands in for resolution: early
# blocks still know where things are, late ones what they are. So the tokens after a third of the
# blocks feed stride 4, those after half of them stride 8, after two thirds stride 16, and the last
# block's feed stride 32 (12).

class PyramidAdapter(nn.Module):
    """Four grids of stride 16 from four depths of CLIP -> a pyramid of strides 4, 8, 16 and 32.

    7.1 M parameters. level1 makes stride 4 of the first grid, level4 stride 32 of the last.

    # PAPER pyramid adapter. Its operations are the released ones (12).
    AUDIT.md: (55).
    """

    def __init__(self, width):
        super().__init__()
        # GroupNorm with one group, that is over a whole grid, brings every level to the same scale:
        # CLIP adds to its tokens from block to block, so that late ones are larger than early ones.
        # A transposed convolution of kernel 2 and stride 2 makes a 2 x 2 block of every cell,
        #     out[:, 2i + a, 2j + b] = W[a, b] x[:, i, j] + bias        for a, b in {0, 1},
        # and since blocks do not overlap, it is a resize x2 that has learned what to put in.
        self.level1 = nn.Sequential(
            nn.GroupNorm(1, width),
            nn.ConvTranspose2d(width, width, 2, stride=2),  # stride 16 -> 8
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, stride=2))  # stride 8 -> 4
        self.level2 = nn.Sequential(
            nn.GroupNorm(1, width),
            nn.ConvTranspose2d(width, width, 2, stride=2))  # stride 16 -> 8
        self.level3 = nn.GroupNorm(1, width)
        self.level4 = nn.Sequential(
            nn.GroupNorm(1, width),
            nn.MaxPool2d(2))  # stride 16 -> 32

    def forward(self, grids):
        """The pyramid: four grids of C channels.

        grids: four (B, C, h, w), the tokens after 1/3, 1/2, 2/3 and all of CLIP's blocks.
        """
        return [
            self.level1(grids[0]),  # (B, C, 4h, 4w)
            self.level2(grids[1]),  # (B, C, 2h, 2w)
            self.level3(grids[2]),  # (B, C, h, w)
            self.level4(grids[3])]  # (B, C, h // 2, w // 2)


def resized_pyramid(grids):
    """The adapter's four strides without a parameter, for `--set adapter=false`."""
    return [
        F.interpolate(grids[0], scale_factor=4, mode="bilinear"),  # (B, C, 4h, 4w)
        F.interpolate(grids[1], scale_factor=2, mode="bilinear"),  # (B, C, 2h, 2w)
        grids[2],  # (B, C, h, w)
        F.max_pool2d(grids[3], 2)]  # (B, C, h // 2, w // 2)


# ============================================================================ learnable prompts
# CLIP was trained on captions, and a bare class name is no caption. People write templates around
# it ("a photo of a {}"); here the words around the name are vectors that are trained with the rest.
# They suit the task rather than the English language. The text encoder itself stays frozen: the
# gradient passes through it to the vectors, 8 with 512 numbers each, the same for all classes.
# Of "dog" the text encoder reads, a column for each token,
#
#     [start] [context 1] ... [context 8] [dog] [end]
#
# Here are only the names' token ids, without contexts; the vectors are `WeakCLIP.contexts`, as the
# released code calls them, and are put before the names in `WeakCLIP.encode_text`.

CONTEXTS = 8  # vectors before a name, as released (7)


def name_tokens(classes, context_length):
    """Token ids (K, L) int64 of the class names: [start, name, end, 0 ...].

    The names stand as in the dataset, without a template. L is that of the longest name: 5 for
    VOC and for COCO, instead of CLIP's 77. The text encoder's cost falls with it, and since its
    mask is causal, padding behind the end token changes nothing. Raises ValueError where name and
    learned vectors (contexts) together do not fit into `context_length`, which is the number of
    positions that CLIP's text encoder knows.
    AUDIT.md: (13b), (13c).
    """
    tokens = clip.tokenize(classes, context_length - CONTEXTS)
    # The end token has the largest id, so argmax finds its place.
    ends = tokens.argmax(1)  # (K,)
    return tokens[:, :ends.max() + 1]  # (K, L)


# ================================================================================= co-attention
# CLIP compares a whole photo with a whole sentence; no pixel ever met a word in its training. Two
# small stacks of attention layers introduce them to each other. Texts look at pixels, so that
# "dog" can become the dog of this photo: its breed, its pose, its light. Pixels look at texts, so
# that each can move towards the classes in question, away from what does not matter here. What the
# stacks return is added to CLIP's features with a small weight, so that it changes little at first.
#
# Texts and pixels can be compared at all because CLIP projects both into one space. There, a photo
# has one global embedding, of its class token, and dense embeddings, one of each patch: the
# "pixels" of this section. With V = [global; dense] (1 + N, D) and the texts T (K, D) of a photo:
#
#     T' = T + gamma * texts_look(T, V)         V' = V + beta * pixels_look(V, T)
#     score map = cosine of every dense row of V' with every row of T'

class MultiHeadAttention(nn.Module):
    """softmax(q k' / sqrt(C / heads)) v of each head, then a projection.

    Every row of x asks (q), every row of memory offers a key (k) and a value (v); a row of the
    answer is the mean of the values, weighted by how well their keys fit the question:

        a[i, j] = softmax over j of  q[i] . k[j] / sqrt(C / heads) ,     out[i] = sum_j a[i, j] v[j]

    Each head does so in C / heads channels of its own: 64 of 256, for ViT-B/16. Where 21 texts look
    at a crop of 512, i runs over 21 rows and j over 1 + 32 * 32. No bias on q, k and v; dropout on
    the output only, not on the attention weights (9).
    AUDIT.md: (9d).
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)

    def split(self, x):
        """(B, N, C) -> (B, heads, N, C / heads): each head takes its own C / heads channels."""
        x = x.unflatten(2, (self.heads, -1))  # (B, N, heads, C / heads)
        return x.transpose(1, 2)

    def forward(self, x, memory):
        """What x (B, N, C) sees when it looks at memory (B, M, C): (B, N, C)."""
        q = self.split(self.q_proj(x))  # (B, heads, N, C / heads)
        k = self.split(self.k_proj(memory))  # (B, heads, M, C / heads)
        v = self.split(self.v_proj(memory))  # (B, heads, M, C / heads)
        # The library's softmax(q k' / sqrt(C / heads)) v never writes the (N, M) weights out: among
        # the 1 + 32 * 32 pixels of a 512 crop they would be a million numbers a head and photo.
        seen = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, C / heads)
        seen = seen.transpose(1, 2).flatten(2)  # (B, N, C), the heads side by side again
        return self.drop(self.proj(seen))  # (B, N, C)


class CoAttentionLayer(nn.Module):
    """Pre-norm decoder layer: look at oneself, look at the other side, think.

        x = x + self_attn(norm1(x))
        x = x + cross_attn(norm2(x), memory)
        x = x + mlp(norm3(x))

    memory is not normed again: the other side comes as `CoAttention` has projected it (9).
    AUDIT.md: (58).
    """

    def __init__(self, width, heads):
        super().__init__()
        self.self_attn = MultiHeadAttention(width, heads)
        self.cross_attn = MultiHeadAttention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(4 * width, width))
        self.drop = nn.Dropout(0.1)

    def forward(self, x, memory):
        """x (B, N, C) after one layer; memory (B, M, C), the other side, comes as it is."""
        # Self-attention lets the texts tell themselves apart, and the pixels of one object find
        # each other; only then each looks at the other side.
        normed = self.norm1(x)
        x = x + self.self_attn(normed, normed)
        x = x + self.cross_attn(self.norm2(x), memory)
        return x + self.drop(self.mlp(self.norm3(x)))


class CoAttention(nn.Module):
    """What co-attention matching adds to V, global and dense embeddings (B, 1 + N, D), and to the
    texts T (B, K, D).

    channels: D, of CLIP's embeddings; width, heads: inside the stacks, of three layers each.
    chain: layer i feeds layer i + 1.
    # PAPER co-attention matching; sizes are the released ones, 6.84 M parameters (9).
    # RELEASED chain_coattention: all layers get the stack's input, so only the last counts (8).
    AUDIT.md: (56), (59), (61).
    """

    def __init__(self, channels, width, heads, chain):
        super().__init__()
        self.chain = chain
        # Both sides are projected from CLIP's embedding (D = 512 for ViT-B/16) to `width` (256),
        # and back at the end. Only `visual_in` closes with a LayerNorm, `text_in` does not (9).
        self.visual_in = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, width),
            nn.LayerNorm(width))
        self.text_in = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))
        self.text_layers = nn.ModuleList(CoAttentionLayer(width, heads) for _ in range(3))
        self.visual_layers = nn.ModuleList(CoAttentionLayer(width, heads) for _ in range(3))
        self.text_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels))
        self.visual_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels))
        # As released (9). What keeps the sum near CLIP's at first are gamma and beta, 0.1.
        for name, value in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(value)
            elif value.ndim == 2:  # a matrix; those of one dimension scale, in LayerNorm
                nn.init.trunc_normal_(value, std=0.02)

    def forward(self, visual, text):
        """What is to be added: to visual (B, 1 + N, D), and to the texts (B, K, D).

        visual: global and dense embeddings.
        """
        visual = self.visual_in(visual)  # (B, 1 + N, width)
        text = self.text_in(text)  # (B, K, width)
        # Each side looks at the other's input, not at the other's output: neither waits for the
        # other, and what one side has already concluded does not come back to it as evidence (9).
        pixels, names = visual, text
        for visual_layer, text_layer in zip(self.visual_layers, self.text_layers):
            if not self.chain:
                pixels, names = visual, text
            pixels = visual_layer(pixels, text)  # (B, 1 + N, width)
            names = text_layer(names, visual)  # (B, K, width)
        return self.visual_out(pixels), self.text_out(names)


# ========================================================================== text-guided decoder
# The pyramid knows edges and parts, but its channels have no names; a decoder that sees it alone
# must learn from noisy seeds what a cow is. The score map says per place how well each class name
# fits, with all that CLIP read. So it joins the channels of every level (`WeakCLIP.join_score_map`:
# 768 + 21 = 789 for VOC), and what is left to the decoder is to bring a named but coarse guess to
# the image's detail. Its way, with sides for a crop of 512 pixels:
#
#     stride   pyramid     lateral     top down, added       smooth      head, climbs to stride 4
#        4     789 x 128   256 x 128   what comes from 8     256 x 128   conv
#        8     789 x  64   256 x  64   what comes from 16    256 x  64   conv up
#       16     789 x  32   256 x  32   what comes from 32    256 x  32   conv up conv up
#       32     789 x  16   256 x  16                         256 x  16   conv up conv up conv up
#
# 789 x 128 are 789 channels of 128 x 128 cells; "up" is a bilinear step to twice the resolution;
# `neck` does the columns "top down" and "smooth". The four ends of the head, 256 x 128 each, are
# added up, and a 1x1 convolution makes K logits.

def conv_norm_relu(inputs, outputs):
    """(B, inputs, h, w) -> (B, outputs, h, w): a 3x3 convolution, BatchNorm, ReLU."""
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),  # BatchNorm would undo a bias
        bn=nn.BatchNorm2d(outputs),
        relu=nn.ReLU()))


class TextGuidedDecoder(nn.Module):
    """Pyramid joined by the score map -> logits at stride 4; 7.3 M parameters.

    A feature pyramid (Lin et al., CVPR 2017) carries meaning down from coarse levels to fine ones.
    The Semantic-FPN head (Kirillov et al., CVPR 2019) then lets every level climb to stride 4 by
    convolutions and steps x2, and sums the four.
    # PAPER text guidance on every level.
    AUDIT.md: (12d).
    """

    def __init__(self, channels, fpn_channels, head_channels, n_classes):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(channels, fpn_channels, 1) for _ in range(4))
        self.smooth = nn.ModuleList(
            nn.Conv2d(fpn_channels, fpn_channels, 3, padding=1) for _ in range(4))
        self.climb = nn.ModuleList()
        for level in range(4):
            # A convolution before each step x2 mends what the upsampling before it blurred.
            # Level 0 is at stride 4 already and gets one convolution; level 3 has three steps x2.
            steps = [conv_norm_relu(fpn_channels, head_channels)]
            for step in range(level):
                if step > 0:
                    steps.append(conv_norm_relu(head_channels, head_channels))
                steps.append(nn.Upsample(scale_factor=2, mode="bilinear"))
            self.climb.append(nn.Sequential(*steps))
        # Kaiming He's initialisation over fan-out, std = sqrt(2 / (outputs * kernel area)), as the
        # released code's building block has it (4): 0.088 for 1x1, 0.029 for 3x3.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.drop = nn.Dropout2d(0.1)  # whole channels at a time: neighbouring cells are alike
        # The last convolution keeps torch's default initialisation (4).
        self.classify = nn.Conv2d(head_channels, n_classes, 1)

    def neck(self, pyramid):
        """Four (B, fpn_channels, ., .), each with all coarser levels added to it.

        pyramid: four (B, channels, ., .) at strides 4, 8, 16 and 32, each joined by the score map.
        AUDIT.md: (62).
        """
        # Laterals: the same channels for all levels, so that they add up. A 1x1 convolution is a
        # linear layer at every place: it also weighs the K scores against the adapter's channels,
        # which is where the text guides.
        x = [conv(level) for conv, level in zip(self.lateral, pyramid)]
        # Top down. Upsampling goes to the finer level's size and not by a factor of 2, because a
        # grid of 33 tokens has 16 below it.
        for i in (2, 1, 0):
            size = x[i].shape[2:]
            x[i] = x[i] + F.interpolate(x[i + 1], size, mode="nearest")
        # 3x3 convolutions smooth the blocks that nearest upsampling leaves.
        return [conv(level) for conv, level in zip(self.smooth, x)]

    def head(self, levels):
        """The four levels at stride 4, summed: (B, head_channels, H/4, W/4).

        AUDIT.md: (63).
        """
        x = [climb(level) for climb, level in zip(self.climb, levels)]
        # On odd grids the coarser levels come out a little off and are resized to the finest: of 33
        # tokens a side, stride 32 has 16, which climb to 128, where stride 4 has 132.
        size = x[0].shape[2:]  # (H/4, W/4)
        return sum(resize(level, size) for level in x)

    def forward(self, pyramid):
        """Logits (B, K, H/4, W/4) of a joined pyramid, four (B, channels, ., .)."""
        # In bfloat16 the channels of a place come to lie side by side in memory, which makes all
        # convolutions from here on faster; on a CPU a training step by a fifth.
        pyramid = [conv_layout(level) for level in pyramid]
        features = self.head(self.neck(pyramid))  # (B, head_channels, H/4, W/4)
        return self.classify(self.drop(features))


# ===================================================================================== WeakCLIP
# The network is CLIP with the four parts around it. `forward`, at the end of the class, is the
# whole data flow, and the methods before it are its steps:
#
#     image -> encode_image -> four grids ------> adapter -> pyramid --> join -> decoder -> logits
#                         \-> global, dense \                           /
#                                            match -> score map --------
#     names -> encode_text -> texts --------/
#
# CLIP is frozen. A gradient runs from the logits back through decoder and adapter to CLIP's grids,
# where it ends; and from the score map back through co-attention and through the text encoder,
# whose weights stay as they are, to the prompts.
#
# Sizes for ViT-B/16, VOC and a crop of 512 pixels: h = w = 32, N = 1,024 tokens, C = 768 channels
# in CLIP's image encoder and 512 in its text encoder, D = 512, K = 21. Of the 171 million numbers
# 21 million are trained.

class WeakCLIP(nn.Module):
    """The network: image (B, 3, H, W) -> logits (B, K, H/4, W/4), score map (B, K, H/16, W/16).

    clip_model: a CLIP of patch 16. token_ids (K, L): from `name_tokens`, background first.
    crop: training crop in pixels. The sizes of the trained parts follow CLIP's embedding: for
    ViT-B/16 co-attention is 256 wide with 4 heads, and the decoder has 256 channels.
    AUDIT.md: (57), (7d), (64).
    """

    def __init__(self, clip_model, token_ids, switches=PAPER, crop=512):
        super().__init__()
        self.clip = clip_model
        self.switches = switches
        self.crop = crop
        # What begins so is left out of checkpoints, which would each hold the same 150 M numbers.
        self.frozen = ("clip.",) if switches.freeze_clip else ()
        self.outputs = slice(None)  # channels that are classes: all; 81 of released COCO's 91 (32)
        self.register_buffer("token_ids", token_ids, persistent=False)
        K = len(token_ids)
        visual = clip_model.visual
        width, channels = visual.proj.shape  # of a token inside CLIP, of an embedding
        # GUESS trained parts shrink and grow with CLIP; half its embedding is ViT-B/16's 256
        half = channels // 2

        self.adapter = PyramidAdapter(width) if switches.adapter else resized_pyramid
        if switches.prompts:
            # PAPER learnable prompts. One set serves all classes, as the sentence around a name
            # would; 8 vectors of standard deviation 1 before truncation are as released (7).
            text_width = clip_model.token_embedding.embedding_dim
            contexts = torch.empty(1, CONTEXTS, text_width)
            nn.init.trunc_normal_(contexts)
            self.contexts = nn.Parameter(contexts)
        if switches.coattention:
            heads = max(1, half // 64)
            self.coattention = CoAttention(channels, half, heads, switches.chain_coattention)
            # How much is added per channel: gamma to the texts, beta to the pixels. At 0.1
            # co-attention changes little at first, and the score map begins nearly as
            # CLIP's own.
            self.gamma = nn.Parameter(0.1 * torch.ones(channels))
            self.beta = nn.Parameter(0.1 * torch.ones(channels))
        level_channels = width
        if switches.text_guidance:
            level_channels += K
        self.decoder = TextGuidedDecoder(level_channels, half, half, K)

        if not switches.positions_resized_once:
            # RELEASED positions_resized_once: stored at the training grid, resized from there (10)
            table = clip.resize_positions(visual.positional_embedding, crop // 16, crop // 16)
            visual.positional_embedding = nn.Parameter(table)
        if switches.freeze_clip:
            # PAPER CLIP is frozen: what it learned from 400 million pairs, 10,582 noisy
            # seeds could only spoil. # RELEASED freeze_clip: all of it trains, at a tiny rate (1)
            clip_model.requires_grad_(False)

    def encode_image(self, image):
        """Four grids (B, C, h, w), and V = [global; dense], the embeddings (B, 1 + h*w, D).

        image (B, 3, H, W) normalised; h = H // 16, w = W // 16; C is CLIP's width, D its
        embedding's, which images share with texts. CLIP drops the pixels beyond a multiple of 16.
        Raises ValueError below 32 pixels, where stride 32 has no cell (34).
        """
        H, W = image.shape[2:]
        if min(H, W) < 32:
            raise ValueError(f"an image of {H} x {W} pixels: 32 x 32 is the least")
        visual = self.clip.visual
        h = H // 16
        w = W // 16
        # CLIP learned 14 x 14 places, of photos of 224 pixels. Resized, the table tells the same
        # about 32 x 32 of them: what is left, right, above and below.
        positions = clip.resize_positions(visual.positional_embedding, h, w)  # (1 + h*w, C)
        if not self.switches.class_embedding_once:
            # RELEASED class_embedding_once: the class token gets its embedding twice (10)
            positions[0] += visual.class_embedding
        # Nothing of a frozen CLIP needs a gradient, so torch keeps none of its activations: a batch
        # of crops fits into a fraction of the memory, and backward ends at the adapter.
        x = visual.embed(image, positions)  # (B, 1 + h*w, C)
        after = [x]  # after[n]: the tokens after n blocks
        blocks = visual.transformer.resblocks
        # RELEASED drop_path: rising from 0 at the first block to 0.1 at the last (5)
        rates = np.linspace(0, self.switches.drop_path, len(blocks))
        for block, rate in zip(blocks, rates):
            x = block(x, rate=rate)  # (B, 1 + h*w, C)
            after.append(x)
        # CLIP projects its class token only. The same projection of every other token gives each
        # place a feature that can be compared with texts.
        embedded = visual.ln_post(x)  # (B, 1 + h*w, C)
        embedded = embedded @ visual.proj  # (B, 1 + h*w, D)
        # For ViT-B/16 the tokens after blocks 4, 6, 8 and 12.
        # GUESS the same parts of the depth for another CLIP
        parts = (1 / 3, 1 / 2, 2 / 3, 1)
        taps = [round(len(blocks) * part) for part in parts]
        # Token 0 is the class token. It belongs to no place, so the grids leave it out. Of the
        # others number i*w + j is row i, column j.
        grids = []
        for n in taps:
            places = after[n][:, 1:].transpose(1, 2)  # (B, C, h*w)
            grid = places.unflatten(2, (h, w))  # (B, C, h, w)
            grids.append(grid.contiguous())
        return grids, embedded

    def encode_text(self):
        """Class texts (K, D): of each class [start, contexts, name, end], read at the end token.

        The mask is causal, every token sees itself and those before it; so the end token has
        seen the whole name, and what pads the shorter names behind it is not seen.
        A class of VOC takes P + L = 8 + 5 tokens, P of them contexts. All K go through the encoder
        as one batch, once in a forward pass of training, and once for all masks: no text depends
        on an image.
        """
        x = self.clip.token_embedding(self.token_ids)  # (K, L, C)
        end = self.token_ids.argmax(1)  # (K,): the end token has the largest id
        if self.switches.prompts:
            contexts = self.contexts.expand(len(x), -1, -1)  # (K, P, C)
            start = x[:, :1]  # (K, 1, C)
            names = x[:, 1:]  # (K, L - 1, C), with their end tokens and padding
            x = torch.cat([start, contexts, names], 1)  # (K, P + L, C)
            end = end + contexts.shape[1]  # the contexts moved it back by P
        return self.clip.encode_vectors(x, end)  # (K, D)

    def match(self, visual, text, size):
        """Score map (B, K, h, w) in [-1, 1]: cosine of each place with each class text.

            s[b, k, u] = < V'[b, u] / |V'[b, u]| ,  T'[b, k] / |T'[b, k]| >
        visual: V (B, 1 + h*w, D), text (K, D), size (h, w). V' and T' are what co-attention makes
        of the embeddings and the texts; u runs over the h*w places.
        AUDIT.md: (60).
        """
        text = text.expand(len(visual), -1, -1)  # (B, K, D)
        if self.switches.coattention:
            # The global embedding takes part as one more token: texts may look at the whole photo.
            visual_diff, text_diff = self.coattention(visual, text)  # (B, 1+h*w, D), (B, K, D)
            text = text + self.gamma * text_diff  # T'
            visual = visual + self.beta * visual_diff  # V'
        # CLIP was trained to compare directions, not lengths, so both sides come to length one,
        # and their product is the cosine.
        text = F.normalize(text, dim=2)  # (B, K, D)
        visual = visual[:, 1:]  # (B, h*w, D); the global token has served
        visual = F.normalize(visual, dim=2)
        score = text @ visual.transpose(1, 2)  # (B, K, h*w)
        return score.unflatten(2, size)  # (B, K, h, w)

    def join_score_map(self, pyramid, score):
        """Text guidance: the pyramid with the score map as further channels, (B, C + K, ., .).

        The map (B, K, h, w) enters as cosine, without the temperature of `score_loss`, resized.
        """
        if not self.switches.text_guidance:
            return pyramid
        # With corners aligned, unlike all other resizes: as released (11). So the map's cells are
        # off the places that they speak of, at the borders by 6 pixels at stride 4, 4 at stride 8
        # and 8 at stride 32. The decoder learns with the shift, so no switch undoes it.
        joined = []
        for level in pyramid:
            guide = resize(score, level.shape[2:], align_corners=True)  # (B, K, ., .)
            joined.append(torch.cat([level, guide], 1))  # (B, C + K, ., .)
        return joined

    def forward(self, image, text=None):
        """Logits (B, K, 4h, 4w), a quarter of the image's size, and score map (B, K, h, w).

        image (B, 3, H, W) normalised; h = H // 16. text (K, D) from `encode_text`, to compute it
        once for many images. Raises ValueError for an image under 32 pixels.
        """
        grids, visual = self.encode_image(image)  # four (B, C, h, w); V (B, 1 + h*w, D)
        if text is None:
            text = self.encode_text()  # (K, D)
        size = grids[0].shape[2:]  # (h, w)
        score = self.match(visual, text, size)  # (B, K, h, w)
        pyramid = self.adapter(grids)  # four (B, C, ., .) at strides 4, 8, 16 and 32
        joined = self.join_score_map(pyramid, score)  # four (B, C + K, ., .)
        return self.decoder(joined), score


# ======================================================================================= losses
# There is no true mask to learn from, only seeds: right in the middle of objects, wrong or unsure
# near their boundaries. Each of three losses (seeding, boundary, score) covers what another
# cannot see; `weakclip_losses` adds them up. Seeding and boundary are taken at an eighth of the
# image's size, because the dense CRF runs at every step: it redraws probabilities so that near and
# like-coloured pixels agree (stage 1). The default seeds of stage 1 leave nothing unsure; padding,
# and seeds of other methods, do.

def seeding_loss(p, y):
    """Negative log likelihood of the seeds, a scalar: background and all objects weigh the same.

        L = mean over images of  - 1/|bg| sum_{y=0} log p_0  -  1/|fg| sum_{0<y<255} log p_y
    p (B, K, h, w) probabilities; y (B, h, w) int64, 255 = unsure. A side without a pixel adds 0.
    # PAPER seeding.

    Pulls every seed pixel to its label. It cannot see unsure pixels, and it believes a seed that
    spills over an object's boundary.
    """
    nll = F.nll_loss(p.log(), y, ignore_index=IGNORE, reduction="none")  # (B, h, w)
    # In most photos background covers more than all objects together. In a plain mean "all is
    # background" would be a good answer; so each side has a mean of its own, and the same weight.
    # With 96 seed pixels of a bird among 64 * 64 = 4,096, each weighs as much as 42 of the sky.
    background = y == 0  # (B, h, w)
    foreground = (y > 0) & (y != IGNORE)  # (B, h, w)
    loss = 0
    for side in (background, foreground):
        pixels = side.sum((1, 2)).clamp(min=1)  # (B,)
        loss = loss + (nll * side).sum((1, 2)) / pixels  # (B,)
    return loss.mean()


def boundary_loss(p, q):
    """Disagreement with the dense CRF's answer to p, a scalar: KL(q || p), each ratio clipped.

        L = mean over images and pixels of  sum_k q_k log clip(q_k / p_k, 0.05, 20)
    p (B, K, h, w) probabilities; q (B, K, h, w) from `crf_target`, without gradient. Where the
    clip cuts, the gradient is zero. All pixels count, padding and unsure ones too (19).
    # PAPER boundary.

    The CRF moves the boundaries of p's regions to where colours change, so this loss teaches the
    network to draw them there by itself, unsure pixels included. It cannot see names: a cow called
    a horse is as good as one called a cow, if its outline is right. That is left to the seeds. Nor
    does it see where p and q differ more than twentyfold: there it is silent.
    """
    # Unclipped, log(q / p) reaches 16 where the network is sure (p is at least 1e-7) and the CRF
    # says otherwise; a few such pixels, which may well be the CRF's mistakes, would rule the batch.
    ratio = (q / p).clamp(0.05, 20)  # (B, K, h, w)
    divergence = (q * ratio.log()).sum(1)  # (B, h, w)
    return divergence.mean()


@torch.no_grad()
def crf_target(p, image, sxy):
    """Dense CRF's answer (B, K, h, w) to the network's probabilities p (B, K, h, w) (21).

    image (B, 3, h, w) from `crf_image`: the augmented one, which the network saw as well.
    sxy: bandwidth in pixels of this size.

    It has no gradient on purpose. The answer is a teacher for this one step; if the network could
    also move the teacher, the two would soonest agree on a flat p, to which the CRF adds nothing.
    AUDIT.md: (25), (68).
    """
    p = p.clamp(min=1e-4)
    # Pixels pull each other to the same class: a little where they are near (Gaussian: 3 pixels,
    # weight 3), much where they have like colours (bilateral: 13 grey levels, weight 10; its 80
    # pixels are wider than the image, so that place hardly matters to it).
    q = dense_crf(p, image, gaussian=(3, 3), bilateral=(sxy, 13, 10))
    q = q.clamp(min=1e-4)  # as released: what the CRF rules out keeps a little
    return q / q.sum(1, keepdim=True)


def mean_cross_entropy(logits, labels, over_valid=True):
    """Cross entropy, a scalar: mean over labelled pixels, 0 without any.

    logits (B, K, H, W); labels (B, H, W) int64, 255 = unsure.
    # RELEASED score_loss_over_valid: mean over all pixels, unsure ones add 0 (24).
    """
    # Summed by itself: with reduction "sum" a GPU has no --deterministic way.
    nll = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")  # (B, H, W)
    nll = nll.sum()
    if not over_valid:
        return nll / labels.numel()
    valid = labels != IGNORE  # (B, H, W)
    return nll / valid.sum().clamp(min=1)


# Temperature of the score map's cross entropy. Cosines are within a few tenths of each other;
# divided by 0.07 their differences are large enough for a softmax: 0.1 more makes a class 4 times
# as likely. It is the value that CLIP's own training started from, and here it stays fixed (11).
TAU = 0.07


def score_loss(score, seeds, over_valid):
    """Cross entropy of the score map / tau with the seeds, a scalar.

    score (B, K, h, w) cosines, here resized to the seeds; seeds (B, H, W) int64, 255 = unsure.
    # PAPER text-to-pixel matching learns from the seeds.

    Pulls each place's feature to the text of its class and away from the other texts, so that the
    score map is a segmentation already before the decoder. Without it, matching would hear of the
    seeds only through the decoder. It cannot see anything finer than CLIP's stride of 16.
    AUDIT.md: (11d).
    """
    logits = resize(score / TAU, seeds.shape[1:])  # (B, K, H, W)
    return mean_cross_entropy(logits, seeds, over_valid)


def loss_probs(logits, size, aligned):
    """Class probabilities (B, K, h, w) at the losses' resolution, bounded away from zero.

    logits (B, K, ., .) of the decoder; size (h, w).
    # RELEASED aligned: corners are aligned where h and w are odd, so never at crop 512 (23).
    """
    odd = size[0] * size[1] % 2 == 1  # a product is odd where both sides are
    corners = odd and not aligned
    logits = resize(logits, size, align_corners=corners)  # (B, K, h, w)
    # The losses take logarithms, and a softmax in float32 can round to 0; hence the 1e-7.
    p = logits.softmax(1) + 1e-7
    return p / p.sum(1, keepdim=True)  # (B, K, h, w)


def resize_labels(seeds, size, aligned):
    """Seeds (B, h, w) int64 by nearest pixel, from seeds (B, H, W): class numbers do not mix.

    Read at the cells' centres, where the logits are too.
    # RELEASED aligned: the pixel at a cell's first corner, not the one in its middle (22).
    """
    mode = "nearest-exact" if aligned else "nearest"
    seeds = seeds[:, None].float()  # (B, 1, H, W)
    seeds = F.interpolate(seeds, size, mode=mode)  # (B, 1, h, w)
    return seeds[:, 0].long()


def crf_image(image, size, switches):
    """What the boundary loss's CRF sees: (B, 3, h, w) uint8, whole grey levels.

    image (B, 3, H, W) normalised as `colours_of` says, which is undone; size (h, w).
    # RELEASED aligned: corner-aligned samples of the normalised image, without low-pass (22).
    """
    if switches.aligned:
        # GUESS the low-pass is a plain average: a cell's colour is that of all its pixels
        x = F.interpolate(image, size, mode="area")
    else:
        # In float64, as the released code's scipy has it (22), on the CPU because MPS has none.
        x = image.cpu().double()  # (B, 3, H, W)
        x = resize(x, size, align_corners=True)
        x = x.float().to(image)
    colours = torch.tensor(colours_of(switches), device=x.device)  # (2, 3)
    mean, std = colours[..., None, None]  # (3, 1, 1) each
    x = x * std + mean  # (B, 3, h, w)
    # Cut, not rounded, in both variants, as the released code does (22).
    return x.clamp(0, 255).byte()


def weakclip_losses(logits, score, image, seeds, switches):
    """The losses of a batch by name, scalars, weighted: their sum is minimised.

        L = seeding_loss + boundary_weight * boundary_loss + score_weight * score_loss  (1 and 0.4)
    logits (B, K, ., .), score (B, K, h, w), image (B, 3, H, W) normalised, seeds (B, H, W) int64.
    All is computed in float32.
    AUDIT.md: (35), (17), (67).
    """
    H, W = image.shape[2:]
    size = (H // 8, W // 8)
    p = loss_probs(logits.float(), size, switches.aligned)  # (B, K, H/8, W/8)
    y = resize_labels(seeds, size, switches.aligned)  # (B, H/8, W/8)
    terms = {"loss_seeding": seeding_loss(p, y)}
    if switches.boundary_weight:
        small = crf_image(image, size, switches)  # (B, 3, H/8, W/8)
        q = crf_target(p, small, switches.loss_crf_sxy)  # (B, K, H/8, W/8)
        terms["loss_boundary"] = switches.boundary_weight * boundary_loss(p, q)
    if switches.score_weight:
        cross_entropy = score_loss(score.float(), seeds, switches.score_loss_over_valid)
        terms["loss_score"] = switches.score_weight * cross_entropy
    return terms


# ========================================================================================= data
# Augmentation is the released code's: scale, crop, colours, flip, padding. Every random number of
# a sample comes from a generator seeded with the run's seed and the sample's number, so that a
# resumed run draws exactly what the first one would have drawn.

def fit_size(H, W, short, long):
    """Size (h, w) of an H x W image, ratio kept, that fits the two sides; at least 1.

    The image becomes as large as possible with its short side at most `short` and its long side
    at most `long`: 375 x 500 becomes 512 x 683 for (512, 2048), and 100 x 1000, whose long side is
    the limit, 205 x 2048.
    AUDIT.md: (73).
    """
    scale = min(long / max(H, W), short / min(H, W))
    h = max(1, int(H * scale + 0.5))
    w = max(1, int(W * scale + 0.5))
    return h, w


def resize_image(image, size):
    """(H, W, 3) uint8 -> (h, w, 3) uint8, bilinear.

    No low-pass comes before a reduction: the released code's OpenCV has none either.
    """
    x = torch.from_numpy(image).permute(2, 0, 1)  # (3, H, W)
    x = resize(x[None].float(), size)[0]  # (3, h, w)
    # Rounded, not cut: cutting would make every resized photo half a grey level darker.
    x = x.round().byte()
    return x.permute(1, 2, 0).numpy()


def stretch(x, factor, shift=0):
    """x * factor + shift, cut to uint8 as OpenCV's arrays are after each step."""
    x = np.float32(x) * factor + shift
    return np.uint8(np.clip(x, 0, 255))


def photometric_distortion(rng, image):
    """The image (H, W, 3) uint8 in other colours.

    A sheep at dusk is a sheep. Seen in many lights, the trained parts learn to rest on shape and
    texture, and on CLIP's tokens, rather than on the green that was under most sheep of the list.
    Only the image changes: its seeds stay true, whatever colour their pixels have.

    Brightness +-32, contrast x 0.5..1.5, saturation x 0.5..1.5, hue +-36 degrees, each with
    probability 0.5; contrast comes before or after saturation and hue, at random.
    AUDIT.md: (76).
    """
    def coin():
        return rng.random() < 0.5

    if coin():
        image = stretch(image, 1, rng.uniform(-32, 32))
    contrast = rng.uniform(0.5, 1.5) if coin() else 1
    contrast_first = coin()
    if contrast_first:
        image = stretch(image, contrast)
    saturation = rng.uniform(0.5, 1.5) if coin() else 1
    # The released hue has 180 steps of 2 degrees, Pillow's 256; uint8 wraps as a circle.
    steps = int(rng.integers(-18, 18)) if coin() else 0
    hue = round(steps * 256 / 180)
    if hue or saturation != 1:
        picture = Image.fromarray(image).convert("HSV")
        hsv = np.array(picture)  # (H, W, 3)
        hsv[..., 1] = stretch(hsv[..., 1], saturation)
        hsv[..., 0] += np.uint8(hue % 256)
        picture = Image.fromarray(hsv, "HSV").convert("RGB")
        image = np.array(picture)
    return image if contrast_first else stretch(image, contrast)


def random_crop(rng, label, crop):
    """Corner (top, left) of a crop in which no label covers 75 % of what is labelled.

    label (H, W) of numbers. The corner is drawn anew up to 10 times, then the last one stands.
    AUDIT.md: (74).
    """
    H, W = label.shape
    # An image smaller than the crop has one place only, 0: what it lacks is padded later.
    last_top = max(H - crop, 0)
    last_left = max(W - crop, 0)
    # A crop of nothing but background teaches little, and the seeding loss would have one side.
    # Where one object covers an eighth of the photo few corners are better: so 11 draws at most.
    for _ in range(11):
        top = rng.integers(0, last_top + 1)
        left = rng.integers(0, last_left + 1)
        part = label[top:top + crop, left:left + crop]
        labelled = part[part != IGNORE]  # a row of class numbers
        counts = np.bincount(labelled, minlength=2)
        if counts.max() < 0.75 * counts.sum():  # so at least two labels are there
            break
    return top, left


def colours_of(switches):
    """Mean and standard deviation, in grey levels, that images are normalised with: CLIP's.

    # RELEASED clip_normalisation: ImageNet's (26).
    """
    return CLIP_COLOURS if switches.clip_normalisation else IMAGENET_COLOURS


def seeded_image(data, seeds, crop, switches, image_id, rng):
    """A sample: image (3, crop, crop) float32, normalised, and its seeds (crop, crop) int64.

    seeds: folder of label PNGs; rng: numpy's generator, of this sample alone.
    AUDIT.md: (46), (75).
    """
    image = data.image(image_id)  # (H, W, 3)
    H, W = image.shape[:2]
    path = find_file(seeds, image_id)
    label = read_label(path, len(data.classes), (H, W))  # (H, W)
    # Objects are shown half to twice as large as with the photo's short side at one crop; the
    # long side is at most 4 * crop * ratio, as released. A photo of 375 x 500 gets
    # 256 x 341 pixels at least, which leaves two thirds of a crop of 512 to padding, and 1024 x
    # 1365 at most, of which the crop shows a fifth.
    ratio = rng.uniform(0.5, 2)
    short = int(crop * ratio)
    long = int(4 * crop * ratio)
    size = fit_size(H, W, short, long)  # (h, w)
    image = resize_image(image, size)  # (h, w, 3)
    # Where not aligned, labels end up half a pixel off the image (22).
    label = torch.from_numpy(label)[None]  # (1, H, W)
    label = resize_labels(label, size, switches.aligned)[0]  # (h, w)
    top, left = random_crop(rng, label.numpy(), crop)
    window = np.s_[top:top + crop, left:left + crop]
    image = photometric_distortion(rng, image[window])
    x = normalise(image, colours_of(switches))  # (3, h, w), at most (3, crop, crop)
    y = label[window]  # (h, w)
    # A horse that looks to the left is as much of a horse.
    if rng.random() < 0.5:
        x = x.flip(2)
        y = y.flip(1)
    # What the image does not fill is padded right and below: grey, that is 0 after normalising, and
    # unsure.
    x = crop_or_pad(x, crop, 0)  # (3, crop, crop)
    y = crop_or_pad(y, crop, IGNORE)  # (crop, crop)
    return x, y


def training_ids(data, args, switches):
    """Ids that training runs over: the training list; VOC's train twice if so released."""
    ids = data.ids(args.split, args.limit)
    if switches.train_listed_twice and args.split == "trainaug":
        # RELEASED train_listed_twice: trainaug contains train, and both lists are read (27)
        again = [image_id for image_id in data.ids("train") if image_id in ids]
        ids = ids + again
    return ids


# ===================================================================================== training
# An iteration takes a batch of crops with their seeds (16; COCO 24), sets the learning rate, runs
# network and losses in as many parts as --accumulate says, each of which adds its gradients to
# those before, averages the gradients of all processes, and takes one step of AdamW. Every 10
# iterations log.jsonl gets a line with each loss under its name, every 500 iterations the
# checkpoint is replaced.
#
# VOC's 10,582 images make 661 iterations of 16, so that 20,000 of them show each image some 30
# times, at another scale, place and colour each time. What the losses say at first can be told
# beforehand. With 21 classes and nothing learned, every seed pixel costs log 21 = 3.0, and seeding
# has two means of such, of background and of foreground: 6.1. The score map's cross entropy is some
# 3 too, and enters with 0.4. The boundary loss starts small, since the CRF has little to say about
# a flat p, and can grow only once the network has opinions.
#
# First weights come from the run's seed, order and augmentation from the seed and the sample's
# number, dropout from the seed, the iteration and the process. So a run that was cut off goes on
# from its last checkpoint and ends in the same bits as one that was not. What the loop calls is
# shared by all stages: `batches` yields the numbered batches, in parts, from iteration `start` on,
# `resume` and `save` read and write the checkpoint, and `log` refuses a loss that is no number.

def make_optimizer(model, lr):
    """AdamW, weight decay 3e-5 on everything that trains; groups differ in their base rate only.

        w <- w - rate * (3e-5 w + m / (sqrt(v) + 1e-8))
    with m, v the running means of gradient and squared gradient (0.9 and 0.999), freed of their
    start at zero. m / sqrt(v) is near 1 where the gradients of many batches agree and near 0 where
    they contradict each other, however large they are: so one rate suits prompts, co-attention and
    decoder alike, whose gradients differ by orders of magnitude. At a rate of 1e-4 a weight moves
    by about 1e-4 a step at most. Over 20,000 iterations the rates add up to about 1, so that weight
    decay alone takes 0.003 % off a weight: it hardly matters.
    # RELEASED freeze_clip, train_adapter: CLIP and adapter are in a group of base rate 0 (1, 2).
    AUDIT.md: (78).
    """
    slow_parts = ("clip.",) if model.switches.train_adapter else ("clip.", "adapter.")
    fast = {"params": [], "base_lr": lr}
    slow = {"params": [], "base_lr": 0.0}
    for name, parameter in model.named_parameters():
        group = slow if name.startswith(slow_parts) else fast
        group["params"].append(parameter)
    # A frozen CLIP is among the slow ones too: AdamW passes over what has no gradient.
    return torch.optim.AdamW([fast, slow], lr=lr, weight_decay=3e-5)


def warm_cosine(base_lr, step, iters):
    """Learning rate at an iteration: a cosine from base_lr to 1e-6, times a linear warm-up.

        [1e-6 + (base_lr - 1e-6) * (1 + cos(pi * step / iters)) / 2]
        * [1 - (1 - step / warm) * (1 - 1e-6)]                           while step < warm
    The warm-up takes 1,500 of 20,000 iterations, and as large a part of a shorter run. It is there
    for AdamW: of its first gradients v knows next to nothing, so that m / sqrt(v) is +1 or -1 for
    every weight, noise or not, and the decoder, which starts from noise, sends noise back to
    prompts and co-attention. Small steps wait until both have something to say. The cosine is for
    the end: large steps cross the valley, small ones settle in it, and average out what single
    batches want. It runs from iteration 0 on, not from the end of the warm-up. With a base rate of
    1e-4 in a run of 20,000 iterations:

        iteration        0       750      1500     10000     20000
        cosine       1.00e-4   9.97e-5   9.86e-5   5.05e-5   1.00e-6
        rate         1.00e-10  4.98e-5   9.86e-5   5.05e-5   1.00e-6

    The end of 1e-6 is absolute, so the rate of a group whose base rate is 0 *rises* to it: 0 at
    first, 5e-7 at iteration 10,000, 1e-6 at the end (1).
    """
    warm = min(1500, int(0.075 * iters))
    falling = (1 + math.cos(math.pi * step / iters)) / 2  # from 1 at the start to 0 at the end
    lr = 1e-6 + (base_lr - 1e-6) * falling
    if step < warm:
        lr *= 1 - (1 - step / warm) * (1 - 1e-6)
    return lr


def train(model, data, ids, args, machine, folder, facts):
    """Train the parts around CLIP on the seeds, from the folder's last checkpoint if there is one.

    What an iteration does is what `for step, parts in bar` holds, from top to bottom: chance, rate,
    losses and their gradients, step, log, checkpoint. All of it depends on the iteration's number
    and on what the checkpoint holds, and on nothing else.
    facts: what tells this network's checkpoint from another's; see `new_network`.
    """
    switches = model.switches
    make = functools.partial(seeded_image, data, args.seeds, args.crop, switches)
    optimizer = make_optimizer(model, args.lr)
    start = resume(folder, model, optimizer, facts, model.frozen)
    model.train()
    bar = batches(ids, make, args, start, machine)
    for step, parts in bar:
        # Dropout draws from (seed, iteration, process), so that a resumed run draws the same.
        torch.manual_seed((args.seed << 32) + step * machine.world + machine.rank)
        for group in optimizer.param_groups:
            group["lr"] = warm_cosine(group["base_lr"], step, args.iters)
        optimizer.zero_grad()
        terms = defaultdict(int)  # each loss's mean over the parts, for the log
        for image, seeds in parts:
            # Only the network may run in bfloat16. Its 8 bits of precision are too few for the
            # logarithms of the losses, which are outside.
            with machine.autocast:
                logits, score = model(image)  # (B, K, H/4, W/4), (B, K, H/16, W/16)
            losses = weakclip_losses(logits, score, image, seeds, switches)
            # Divided, so that the gradients that the parts add up are their mean.
            total = sum(losses.values()) / args.accumulate
            total.backward()
            for name, loss in losses.items():
                terms[name] += loss.detach() / args.accumulate
        machine.average_gradients(model)
        optimizer.step()
        log(folder, bar, step, optimizer, terms)
        save(folder, model, optimizer, step + 1, args.iters, facts, model.frozen)
    machine.share_buffers(model)


# ==================================================================================== inference
# A photo is looked at in several sizes, each as it is and mirrored, through windows of the size
# that training showed. Whatever the views agree on is likely right, so their probabilities are
# averaged. By default they are 6 scales x 2: a photo of 375 x 500 is seen as 256 x 341 up to
# 896 x 1195, in 26 windows, each of them twice. Small views show a bus as a whole, large ones give
# the bird on the wire a dozen cells; where one of them is at a loss, its probabilities are flat and
# the others decide.

def window_starts(length, crop):
    """Starts of the sliding windows on one axis; the last is shifted back to end at the border.

    Windows begin every 2/3 of a crop, so that neighbours share a third: most borders of a window
    are seen again with context around them. An axis of 700 pixels has two windows of 512: the first
    begins at 0, the second would at 341 and end at 853, so it begins at 188. They share 324 pixels.
    AUDIT.md: (81).
    """
    last = max(length - crop, 0)
    step = 2 * crop // 3
    return [*range(0, last, step), last]


def window_logits(model, x, text):
    """Logits (B, K, h, w) of windows x (B, 3, h, w).

    CLIP reads whole patches of 16 pixels, so a window is padded to a multiple of 16, at least 32,
    and its logits are cut back.
    # RELEASED pad_windows: up to 15 rows and columns are lost, the logits stretched over them (30).
    """
    h, w = x.shape[2:]
    if model.switches.pad_windows:
        # GUESS with the mean colour, right and below, as training pads
        right = max(-w % 16, 32 - w)
        below = max(-h % 16, 32 - h)
        x = F.pad(x, (0, right, 0, below))
    logits, _ = model(x, text)  # (B, K, ., .) at a quarter
    logits = resize(logits.float(), x.shape[2:])  # at the padded size
    return logits[..., :h, :w]


def slide(model, x, text):
    """Logits (1, K, H, W) of a whole view x (1, 3, H, W), averaged where windows overlap.

    CLIP's grid at the training crop is what adapter and decoder know; a larger view is therefore
    not shown as a whole but in windows of that size, a row of them at a time.
    """
    H, W = x.shape[2:]
    total = x.new_zeros(1, len(text), H, W)
    count = x.new_zeros(1, 1, H, W)
    crop = model.crop
    lefts = window_starts(W, crop)
    for top in window_starts(H, crop):
        # All windows of a view have one size, that of the crop or of a smaller view.
        rows = slice(top, top + crop)
        places = [np.s_[..., rows, left:left + crop] for left in lefts]
        windows = torch.cat([x[place] for place in places])  # (n, 3, h, w)
        logits = window_logits(model, windows, text)  # (n, K, h, w)
        for place, seen in zip(places, logits):
            total[place] += seen  # (K, h, w)
            count[place] += 1
    return total / count


def probabilities(model, views, size, text):
    """Mean class probabilities (K, H, W) over the views of one photo.

    views: (image (1, 3, h, w) normalised, mirrored?) of each; size (H, W) of the photo;
    text (K, D) from `WeakCLIP.encode_text`.
    AUDIT.md: (82).
    """
    total = 0
    for x, mirrored in views:
        logits = slide(model, x.to(text.device), text)  # (1, K, h, w)
        # Logits are resized before the softmax, not probabilities after it: between a sure
        # "cat" and a sure "sofa" the logits cross at one place and leave a sharp end there,
        # while interpolated probabilities would fade from one to the other.
        p = resize(logits, size).softmax(1)  # (1, K, H, W)
        # The mirror is undone last, when the view has the photo's size: resizing and softmax do
        # not care, and here all views meet pixel on pixel.
        if mirrored:
            p = p.flip(3)
        total += p
    return (total / len(views))[0]


def make_views(image, args, colours, short, long):
    """Yields (view (1, 3, h, w) normalised, mirrored?) of a photo (H, W, 3) uint8.

    One view for each of args.scales and, with args.flip, its mirror image. At scale 1 it fits the
    sides `short` and `long`, as `fit_size` says.
    """
    H, W = image.shape[:2]
    for scale in args.scales:
        size = fit_size(H, W, short * scale, long * scale)  # (h, w)
        resized = resize_image(image, size)  # (h, w, 3)
        x = normalise(resized, colours)[None]  # (1, 3, h, w)
        yield x, False
        if args.flip:
            yield x.flip(3), True


def predictor(model, args, machine):
    """predict(photo (H, W, 3) uint8) -> class probabilities (K, H, W), over all views.

    At scale 1 a photo's short side is that of the training crop, its long side at most 4 crops.
    AUDIT.md: (102).
    """
    model.to(machine.device).eval()
    with torch.no_grad(), machine.autocast:
        text = model.encode_text()  # (K, D); the same for all photos, so computed once
    colours = colours_of(model.switches)

    @torch.no_grad()
    def predict(image):
        views = list(make_views(image, args, colours, model.crop, 4 * model.crop))
        with machine.autocast:
            probs = probabilities(model, views, image.shape[:2], text)  # (K, H, W)
        return probs[model.outputs]  # released COCO: 81 of its 91 channels
    return predict


# ================================================================================= pseudo masks
# The network has seen seeds of these very images, and yet its masks can be better than they: what
# seeds get wrong in one image and not in the next is hard to learn, what they get right repeats. An
# error that all seeds share stays, unless CLIP or the CRF speaks against it.
#
# A last dense CRF, at full resolution, brings the ends of the masks to the image's edges. All
# this serves stage 3 as well, whose masks are made of its own network's probabilities.

# Of the CRF after inference: (Gaussian sxy, weight), (bilateral sxy, srgb, weight). They are not
# the loss's constants: here a pixel is a pixel, there it is a cell of 8 x 8 (31).
MASK_CRF = {"VOC2012": ((3, 3), (83, 5, 3)),
            "COCO2014": ((1, 3), (67, 3, 4))}

# Options that change masks but not the model that makes them.
MASK_OPTIONS = ("scales", "flip", "crf", "label_filter")


def mask_from(probs, image, crf, allowed):
    """Mask (H, W) uint8 of class numbers.

    probs (K, H, W) class probabilities; image (H, W, 3) uint8; crf: an entry of MASK_CRF, None
    for none; allowed: the only classes that may win, by the image's labels, None for all (28).
    """
    classes = torch.tensor(allowed or range(len(probs)), device=probs.device)
    # The CRF sees the classes that win somewhere. The others would hardly change its answer, and
    # its time grows with their number. What is left is not renormalised, as released.
    winners = probs[classes].argmax(0).unique()  # (J,) places in `classes`
    classes = classes[winners]  # (J,) class numbers
    probs = probs[classes]  # (J, H, W)
    if crf and len(classes) > 1:  # where one class is left, nothing is to be decided
        rgb = torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, 3, H, W)
        # The floor: a class that is impossible at a pixel could never return there.
        probs = probs.clamp(min=1e-5)[None]  # (1, J, H, W)
        probs = dense_crf(probs, rgb, *crf)[0]  # (J, H, W)
    mask = classes[probs.argmax(0)]  # (H, W)
    return mask.byte().cpu().numpy()


def plan_masks(data, lists, folder, args, machine):
    """{folder/masks/<split>/<id>.png: (photo, classes that may win)} of every list {split: ids}.

    Masks that other options have made go first, and only then does the record say how the new ones
    are made. So a run may be cut off anywhere: what lies in the folder was made as the record says,
    or is not there. `start_run` has let pass only options that leave the model as it is.
    AUDIT.md: (29a).
    """
    # What changes masks, and what eval.py prints beside their score.
    provenance = {name: getattr(args, name) for name in ("iters", *MASK_OPTIONS)}
    if MAIN and read_record(folder).get("provenance") != provenance:
        for mask in folder.glob("masks/*/*"):
            mask.unlink()
        update_record(folder, provenance=provenance, finished=False)
    machine.wait()
    masks = {}
    for split, ids in lists.items():
        # The filter acts on the training list only: what is in a val image, nobody told.
        filtered = args.label_filter and split == args.split
        labels = data.image_labels(ids) if filtered else None
        for image_id in ids:
            allowed = [0, *labels[image_id]] if filtered else None
            path = folder / f"masks/{split}/{image_id}.png"
            masks[path] = data.image_path(image_id), allowed
    return masks


def write_masks(predict, masks, machine, crf, classes=None):
    """Write a PNG of class numbers at every path of {path: (photo, allowed)}, where it is not yet.

    predict: photo (H, W, 3) uint8 -> probabilities (K, H, W). allowed: as in `mask_from`. classes:
    names for a picture <id>.jpg beside each mask, which is to be looked at: the photo with its mask
    laid over it; None for no such picture.
    AUDIT.md: (29b).
    """
    # Where several processes run, each takes its share of the photos.
    share = machine.share(list(masks))
    for path in tqdm(share, "masks", disable=not MAIN):
        if path.exists():
            continue
        photo, allowed = masks[path]
        image = read_image(photo)
        probs = predict(image)
        check_output(photo, probs)
        mask = mask_from(probs, image, crf, allowed)
        if classes:
            picture = Image.fromarray(overlay(image, mask, classes))
            write_whole(path.with_suffix(".jpg"), lambda f: picture.save(f, "JPEG", quality=90))
        write_label(path, mask)
    machine.wait()


def mask_photos(predict, args, folder, machine, crf, classes):
    """`--images DIR`: masks of a folder of photos, anew, in `folder`/images/<DIR's name>.

    <name>.png holds class numbers; <name>.jpg beside it is to be looked at. Raises ValueError where
    DIR has no photos, one of them cannot be read, or DIR is where they go.
    """
    place = args.images.resolve()
    files = sorted(place.glob("[!.]*"))
    photos = [path for path in files if path.suffix.lower() in PHOTO_ENDINGS]
    out = folder / "images" / place.name
    masks = {out / f"{path.stem}.png": (path, None) for path in photos}
    if len(masks) < max(1, len(photos)):
        raise ValueError(f"--images {place}: no photos (.jpg, .jpeg, .png), or two of one name")
    if MAIN:
        check_outside(out, args)
        for_each(read_image, photos, "checking photos")
        for made in out.glob("*"):  # it may be of another folder's photos
            made.unlink()
    machine.wait()
    write_masks(predict, masks, machine, crf, classes)
    if MAIN:
        print(f"{out}: of {len(photos)} of {len(files)} files, masks (.png) and a look (.jpg)")


def mask_options(parser, scales, size):
    """Add the options that change masks but not the model, for stages 2 and 3.

    size: what scale 1 is, for --help.
    """
    parser.add_argument("--scales", type=number(0.01), nargs="+", default=scales,
                        help=f"sizes at which a photo is looked at, as multiples of {size}; large "
                             "ones see small objects [%(default)s]")
    parser.add_argument("--no-flip", dest="flip", action="store_false",
                        help="leave out the mirror images")
    parser.add_argument("--no-crf", dest="crf", action="store_false",
                        help="leave out the dense CRF: quicker")
    parser.add_argument("--label-filter", action="store_true",
                        help="training list: only background and the image's own labels may win")
    parser.add_argument("--images", type=Path,
                        help="write masks of a folder of photos to images/ and stop: no dataset is "
                             "needed, but a trained model")


def mask_crf(args, table=MASK_CRF):
    """The dataset's constants of the CRF after inference; None with --no-crf.

    A dataset that is not in the table gets VOC's.
    """
    if not args.crf:
        return None
    return table.get(dataset_name(args.data), table["VOC2012"])


# ============================================================== checkpoints of the released code
# Ours hold what was trained, and the digest of the CLIP that it was trained around. Released
# ones hold their own CLIP and are told from ours by their keys; a table translates the names.

def new_network(args, classes, switches):
    """An untrained WeakCLIP, and its facts: what tells its checkpoint from another's."""
    clip_model, digest = clip.load(args.clip, args.seed)
    torch.manual_seed(args.seed)
    tokens = name_tokens(classes, len(clip_model.positional_embedding))
    model = WeakCLIP(clip_model, tokens, switches, args.crop)
    facts = {"stage": "2_weakclip", "classes": list(classes), "clip": digest,
             "crop": args.crop, "switches": dataclasses.asdict(switches)}
    return model, facts


def open_checkpoint(path, args, classes=None):
    """A trained network, from our checkpoint.pt or a released one, and the classes' names.

    classes: the dataset's, None to take the checkpoint's. args.crop and args.iters become what the
    network was trained with. Raises ValueError for a file of another kind, dataset or CLIP.
    AUDIT.md: (66).
    """
    saved = clip.read_file(path, "checkpoint; train first, or name another")
    try:
        if "state_dict" in dict(saved):
            return open_released(saved, args, classes)
        facts = saved["facts"]
        switches = Switches(**facts["switches"])
        if args.set and choose_switches(args.variant, args.set) != switches:
            raise ValueError(f"--set {' '.join(args.set)}: it was trained otherwise; leave it out")
        args.crop = facts["crop"]
        args.iters = saved["step"]
        classes = classes or facts["classes"]
        model, wanted = new_network(args, classes, switches)
        if facts != wanted:  # crop and switches are the checkpoint's
            raise ValueError("it was trained with other classes or another CLIP; give its --clip")
        load_trained(model, saved["model"], model.frozen)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no WeakCLIP, ours or released, that fits: {error}") from None
    return model, facts["classes"]


def open_released(saved, args, classes):
    """A network and its classes' names, of a released checkpoint {"meta": ..., "state_dict": ...}.

    It holds its own CLIP, so `--clip` is not read. The switches are `--variant released` with
    `--set` on top (its table of positions stays resized). Of COCO's 91 released slots only 80 and
    background are classes (32). Raises KeyError or ValueError naming what does not fit.
    """
    state = {our_name(name): value for name, value in saved["state_dict"].items()}
    # It lacks the logit scale, which WeakCLIP does not read; CLIP wants one.
    state["clip.logit_scale"] = torch.zeros(())
    clip_state = {}
    for name, value in state.items():
        if name.startswith("clip."):
            clip_state[name.removeprefix("clip.")] = value
    clip_model = clip.CLIP.from_state_dict(clip_state)
    K = len(state["decoder.classify.weight"])
    classes = classes or (COCO_CLASSES if K == len(COCO_SLOTS) else VOC_CLASSES)
    names = COCO_SLOTS if classes == COCO_CLASSES else classes
    if len(names) != K:
        raise ValueError(f"it has {K} classes, the dataset {len(classes)}")
    # The table of positions is stored at the training grid: 1 + (crop / 16)^2 rows.
    table = clip_model.visual.positional_embedding
    args.crop = 16 * math.isqrt(len(table) - 1)
    args.iters = saved.get("meta", {}).get("iter")
    tokens = name_tokens(names, len(clip_model.positional_embedding))
    switches = choose_switches("released", args.set)
    model = WeakCLIP(clip_model, tokens, switches, args.crop)
    load_trained(model, state)
    model.outputs = [names.index(name) for name in classes]
    return model, classes


# Parameter names of the released code, as patterns -> ours. What it calls backbone is CLIP's image
# encoder and the adapter. Prompts, gamma and beta are called alike.
OUR_NAMES = {
    r"^backbone\.fpn": "adapter.level",
    r"^backbone\.": "clip.visual.",
    r"^text_encoder\.": "clip.",
    r"^context_decoder\.memory_proj\.": "coattention.visual_in.",
    r"^context_decoder\.text_proj\.": "coattention.text_in.",
    r"^context_decoder\.decoder\.": "coattention.text_layers.",
    r"^context_decoder\.out_proj\.": "coattention.text_out.",
    r"^context_decoder\.anti_decoder\.": "coattention.visual_layers.",
    r"^context_decoder\.anti_out_proj\.": "coattention.visual_out.",
    r"^neck\.lateral_convs\.(\d)\.conv\.": r"decoder.lateral.\1.",
    r"^neck\.fpn_convs\.(\d)\.conv\.": r"decoder.smooth.\1.",
    r"^decode_head\.scale_heads\.": "decoder.climb.",
    r"^decode_head\.conv_seg\.": "decoder.classify."}


def our_name(name):
    """A parameter's name in the released code -> its name in ours; any other name stays."""
    for theirs, ours in OUR_NAMES.items():
        name = re.sub(theirs, ours, name)
    return name


# ================================================================================= command line

def choose_switches(variant, settings):
    """The switches of a preset ("paper" or "released") with the settings "field=value" on top.

    Raises ValueError for an unknown field or a value that the field cannot have.
    """
    fields = dataclasses.asdict(RELEASED if variant == "released" else PAPER)
    for text in settings:
        name, _, word = text.partition("=")
        before = fields.get(name)
        if isinstance(before, bool) and word in ("true", "false"):
            fields[name] = word == "true"
        elif isinstance(before, float) and re.fullmatch(r"\d*\.?\d+", word):
            fields[name] = float(word)
        else:
            raise ValueError(f"--set {text}: FIELD=true, false or a number such as 0.5 is wanted; "
                             f"the fields are {', '.join(fields)}")
    return Switches(**fields)


def parse_args(argv=None):
    """The command line's options; argv None for the real one.

    AUDIT.md: (79), (80).
    """
    parser = common_options(__doc__, "20,000; COCO2014 40,000", 1e-4, "16; COCO2014 24", 512)
    parser.add_argument("--clip", default="ViT-B/16",
                        help="OpenAI's (downloaded), a file, or random: untrained [%(default)s]")
    parser.add_argument("--seeds", type=Path,
                        help="folder of label PNGs to learn from, of any method [stage 1's]")
    parser.add_argument("--variant", choices=("paper", "released"), default="paper",
                        help="the abstract, or the released code where they part [%(default)s]")
    parser.add_argument("--set", action="append", default=[],
                        help="FIELD=VALUE changes a field of class Switches, to see what it does; "
                             "may be given several times: " + ", ".join(dataclasses.asdict(PAPER)))
    parser.add_argument("--checkpoint", type=Path,
                        help="train nothing, make masks with this checkpoint, ours (as it was "
                             "trained, whatever --variant is) or a released one")
    mask_options(parser, [0.5, 0.75, 1.0, 1.25, 1.5, 1.75], "a short side of --crop pixels")
    args = parser.parse_args(argv)
    coco = dataset_name(args.data) == "COCO2014"
    args.iters = args.iters or (40_000 if coco else 20_000)
    args.batch_size = args.batch_size or (24 if coco else 16)
    return args


def main():
    """Train and make masks; continue where an earlier run of the command stopped."""
    args = parse_args()
    switches = choose_switches(args.variant, args.set)
    machine = Machine(args.device, args.amp)
    folder = args.runs / dataset_name(args.data) / "2_weakclip"
    crf = mask_crf(args)
    if args.images:  # needs a checkpoint (the run's, or --checkpoint) and CLIP, but no dataset
        model, classes = open_checkpoint(args.checkpoint or folder / "checkpoint.pt", args)
        predict = predictor(model, args, machine)
        return mask_photos(predict, args, folder, machine, crf, classes)

    data = open_run(args, machine)
    args.seeds = args.seeds or folder.parent / "1_cam/seeds"
    learned = training_ids(data, args, switches)
    lists = {}
    for split in (args.split, "val"):
        if data.has(split):
            lists[split] = data.ids(split, args.limit)
    ids = lists[args.split]
    if MAIN:
        if args.checkpoint:
            check_inputs(data, ids)
        else:
            check_classes(data, args.seeds.parent)
            check_inputs(data, ids, args.seeds, data.known_labels(ids), tolerated=0)
        check_inputs(data, lists.get("val", []))

    digests = data.digests(*lists)
    if args.checkpoint:
        model, _ = open_checkpoint(args.checkpoint, args, data.classes)
        digests["checkpoint"] = clip.file_sha256(args.checkpoint)
    else:
        model, facts = new_network(args, data.classes, switches)
        digests["clip"] = facts["clip"]
        digests["seeds"] = files_digest([find_file(args.seeds, i) for i in ids])
    if MAIN:
        # Refuses to go on with what other options, lists, photos, seeds or another CLIP began.
        start_run(folder, args, data, lists, digests, machine.description, MASK_OPTIONS)
    masks = plan_masks(data, lists, folder, args, machine)
    if is_finished(folder, masks):
        return
    if not args.checkpoint:
        # Returns at once where the checkpoint is of the last iteration already.
        model = machine.place(model)
        train(model, data, learned, args, machine, folder, facts)
    predict = predictor(model, args, machine)
    write_masks(predict, masks, machine, crf)
    if MAIN:
        update_record(folder, options=vars(args), finished=True)
        command = next_command("stage3_segment.py", args, "split", "limit")
        print(f"{folder}: masks of {', '.join(lists)}. Next: {command}")


if __name__ == "__main__":
    run(main)
