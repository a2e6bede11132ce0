"""Stage 2: seeds -> pseudo masks with WeakCLIP (Zhu et al., IJCV 133, 2025).

DOI of the paper: 10.1007/s11263-024-02224-2

run     python stage2_weakclip.py --data VOC2012
reads   VOC2012/JPEGImages/<id>.jpg
        runs/VOC2012/1_cam/seeds/<id>.png (or --seeds DIR: label PNGs of any method)
writes  runs/VOC2012/2_weakclip/{args.json, log.jsonl, checkpoint.pt, preview.png}
        runs/VOC2012/2_weakclip/masks/<split>/<id>.png

CLIP knows what things look like, from 400 million captions, but not where they end. WeakCLIP keeps
CLIP frozen and trains small parts around it on the seeds, in the order of this file:
  pyramid adapter      CLIP's one coarse grid -> four resolutions
  learnable prompts    class names -> class texts that suit segmentation
  co-attention         texts look at pixels, pixels look at texts; their cosine is a score map
  text-guided decoder  the score map joins every level of the pyramid; an FPN makes logits of it
  losses               agree with the seeds, with the image's edges (dense CRF), and with the text
The trained network then relabels its own training images: the pseudo masks. Checkpoints and the
command line come last and can be skipped at first reading.

From clip/ comes the frozen model. From eval.py come the dataset folder and the reading and writing
of images, labels and other files. From stage1_cam.py come the training loop, the dense CRF and the
run folder: all stages share them, because exact resume and the CRF's lattice must be written, and
proven, only once.

Written from the abstract and the released code (hustvl/WeakCLIP, commit b72d559); the full text was
not at hand. Lines are marked # PAPER, # RELEASED or # GUESS:
  PAPER     the abstract, or what is plainly meant
  RELEASED  the released code does otherwise; the field of `Switches` that chooses is named
  GUESS     both are silent: what we chose, and why
Numbers in brackets, such as (22), are findings: the column "no." of AUDIT.md's ledger, not the
places in its list of ten surprises.

Shapes stand at the ends of lines: B images of a batch, K classes with background first, C channels,
D channels of CLIP's embeddings, H W pixels, h w cells of a grid, N = h*w tokens.
"""
# first: while all else is imported, which takes seconds, eval.py sees to Ctrl-C
from eval import (COCO_CLASSES, COCO_SLOTS, IGNORE, VOC_CLASSES, check_inputs, dataset_name,
                  folder_digest, for_each, label_path, overlay, photo_files, read_args,
                  read_image, read_label, run, write_json, write_label, write_whole)

import argparse
import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import clip
from stage1_cam import (CLIP_MEAN, CLIP_STD, DAMAGED, IMAGENET_MEAN, IMAGENET_STD, Machine,
                        check_output, check_unchanged, common_options, conv_layout, crop_or_pad,
                        delete_folder, dense_crf, first_names, fit, is_finished, is_whole,
                        load_checkpoint, load_clip, load_trained, mark_finished, mark_unfinished,
                        next_command, normalise, not_finite, note_if_blank, open_run, photo_faults,
                        preview_ids, read_checkpoint, refuse_own_input, set_provenance, start_run,
                        truth_pictures, unchanged, work_on, write_preview)


# ===================================================================================== switches

@dataclass(frozen=True)
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
    # (22, 23) image, logits and labels are all read at the cells' centres; released: up to 3.5
    # pixels apart. (torch's align_corners is something else, and part of what was released.)
    aligned: bool = True
    score_loss_over_valid: bool = True  # (24) released: divided by all pixels, unsure ones too
    clip_normalisation: bool = True  # (26) released: ImageNet's mean and standard deviation
    train_listed_twice: bool = False  # (27) released: VOC's 1,464 train images count twice
    pad_windows: bool = True  # (30) released: windows lose columns beyond a multiple of 16

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
    freeze_clip=False, train_adapter=False, drop_path=0.1, chain_coattention=False,
    class_embedding_once=False, positions_resized_once=False, aligned=False,
    score_loss_over_valid=False, clip_normalisation=False, train_listed_twice=True,
    pad_windows=False)

# ============================================================================== pyramid adapter
# A ViT-B/16 looks at patches of 16 x 16 pixels and keeps this one grid from its first block to its
# last: for a photo of 512 x 512 pixels 32 x 32 tokens. Segmentation needs more. A thin leg is lost
# between two tokens, and a bus is too large to be judged by one. Ordinary backbones have what
# decoders ask for: a pyramid with strides 4, 8, 16 and 32, fine levels for edges, coarse ones for
# context. The adapter makes such a pyramid of CLIP's grid.
#
# CLIP's depth stands in for resolution. Early blocks still know where things are, late ones what
# they are; so the tokens after a third of the blocks feed stride 4, those after half of them
# stride 8, after two thirds stride 16, and the last block's stride 32 (12).

def resize(x: Tensor, size, align_corners=False) -> Tensor:
    """x (B, C, H, W) at another size (h, w), bilinear; x itself where it has that size."""
    if x.shape[2:] == size:
        return x  # torch would compute a copy, and its gradient
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


class GridNorm(nn.GroupNorm):
    """GroupNorm of a grid (B, C, h, w) whose channels lie side by side in memory, as tokens' do.

    Only a way round a fault: with torch up to 2.8 the gradient of GroupNorm's weights crashes on a
    CPU where x is laid out so and needs no gradient itself, as below the frozen CLIP.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w), normalised."""
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


def double(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.conv_transpose2d(x, weight, bias, stride=2) for a kernel of 2 x 2: (B, F, 2h, 2w).

    x (B, C, h, w), weight (C, F, 2, 2), bias (F,). Every cell becomes 2 x 2 cells, and none of them
    overlap: one product of x with four matrices. On a CPU torch's kernel takes twice as long.
    """
    matrix = weight.permute(2, 3, 1, 0).flatten(0, 2)  # (2 * 2 * F, C)
    x = F.linear(x.permute(0, 2, 3, 1), matrix, bias.repeat(4))  # (B, h, w, 2 * 2 * F)
    x = x.unflatten(3, (2, 2, -1)).transpose(2, 3)  # (B, h, 2, w, 2, F)
    return x.flatten(1, 2).flatten(2, 3).permute(0, 3, 1, 2)  # channels last in memory


class Doubling(nn.ConvTranspose2d):
    """Doubles the resolution and learns how: (B, inputs, h, w) -> (B, outputs, 2h, 2w)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """See `double`."""
        return double(x, self.weight, self.bias)


class PyramidAdapter(nn.Module):
    """Four grids of stride 16 from four depths of CLIP -> a pyramid of strides 4, 8, 16 and 32.

    7.1 M parameters. level1 makes stride 4 of the first grid, level4 stride 32 of the last.

    # PAPER pyramid adapter. Its operations are the released ones (12).
    """

    def __init__(self, width: int):
        super().__init__()
        # GroupNorm with one group brings every level to the same scale: CLIP's residual stream
        # grows with depth. A transposed convolution then doubles the resolution and learns how.
        self.level1 = nn.Sequential(
            GridNorm(1, width),
            Doubling(width, width),
            nn.BatchNorm2d(width),
            nn.GELU(),
            Doubling(width, width))
        self.level2 = nn.Sequential(
            GridNorm(1, width),
            Doubling(width, width))
        self.level3 = GridNorm(1, width)
        self.level4 = nn.Sequential(
            GridNorm(1, width),
            nn.MaxPool2d(2))

    def before_last(self, grids: list[Tensor]) -> list[Tensor]:
        """The pyramid before its last convolutions: strides 4 and 8 at half their resolution.

        Split off so that the last convolutions can be merged with the decoder's first ones, see
        `lateral_of_upsampled`. grids: four (B, C, h, w), the tokens after 1/3, 1/2, 2/3 and all of
        CLIP's blocks.
        """
        return [
            self.level1[:-1](grids[0]),  # (B, C, 2h, 2w)
            self.level2[:-1](grids[1]),  # (B, C, h, w)
            self.level3(grids[2]),  # (B, C, h, w)
            self.level4(grids[3])]  # (B, C, h // 2, w // 2)

    def forward(self, grids: list[Tensor]) -> list[Tensor]:
        """The pyramid: (B, C, 4h, 4w), (B, C, 2h, 2w), (B, C, h, w), (B, C, h // 2, w // 2).

        grids as in `before_last`.
        """
        x = self.before_last(grids)
        return [self.level1[-1](x[0]), self.level2[-1](x[1]), x[2], x[3]]


def resized_pyramid(grids: list[Tensor]) -> list[Tensor]:
    """The adapter's four strides without a parameter, for `--set adapter=false`."""
    h, w = grids[0].shape[2:]
    return [
        resize(grids[0], (4 * h, 4 * w)),  # (B, C, 4h, 4w)
        resize(grids[1], (2 * h, 2 * w)),  # (B, C, 2h, 2w)
        grids[2],  # (B, C, h, w)
        F.max_pool2d(grids[3], 2)]  # (B, C, h // 2, w // 2)


# ============================================================================ learnable prompts
# CLIP was trained on captions, and a bare class name is no caption. People write templates around
# it ("a photo of a {}"); here the words around the name are vectors that are trained with the rest.
# They suit the task rather than the English language. The text encoder itself stays frozen: the
# gradient passes through it to the vectors, 4,096 numbers in all. Here are only the names' token
# ids; the vectors are `WeakCLIP.contexts`, as the released code calls them, put before the names in
# `WeakCLIP.encode_text`.

def name_tokens(classes, context_length: int, contexts: int = 8) -> Tensor:
    """Token ids (K, L) int64 of the class names: [start, name, end, 0 ...].

    The names stand as in the dataset, without a template. L is that of the longest name: 5 for
    VOC and for COCO, instead of CLIP's 77. The text encoder's cost falls with it, and since its
    mask is causal, padding behind the end token changes nothing. Raises ValueError where name and
    learned vectors (contexts) together do not fit into `context_length`.
    """
    tokens = clip.tokenize(list(classes))
    # The end token has the largest id, so argmax finds its place.
    L = int(tokens.argmax(1).max()) + 1
    if L + contexts > context_length:
        raise ValueError(f"the longest class name has {L} tokens; "
                         f"with {contexts} prompts CLIP's {context_length} are too few")
    return tokens[:, :L]


# ================================================================================= co-attention
# CLIP compares a whole photo with a whole sentence; no pixel ever met a word in its training. Two
# small stacks of attention layers introduce them to each other. Texts look at pixels, so that
# "dog" can become the dog of this photo: its breed, its pose, its light. Pixels look at texts, so
# that each can move towards the classes in question, away from what does not matter here. What the
# stacks return is added to CLIP's features with a small weight, so that it changes little at first.
#
# Texts and pixels can be compared at all because CLIP projects both into one space. There, a photo
# has one global embedding, of its class token, and dense embeddings, one of each patch: the
# "pixels" of this section.

class MultiHeadAttention(nn.Module):
    """softmax(q k' / sqrt(C / heads)) v, then a projection.

    No bias on q, k and v; dropout on the output only, not on the attention weights (9).
    """

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, N, C / heads)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """What x (B, N, C) sees when it looks at memory (B, M, C): (B, N, C)."""
        q = self.split_heads(self.q_proj(x))  # (B, heads, N, C / heads)
        k = self.split_heads(self.k_proj(memory))  # (B, heads, M, C / heads)
        v = self.split_heads(self.v_proj(memory))  # (B, heads, M, C / heads)
        if min(q.shape[2], k.shape[2]) > 256:
            # Among the 1 + 32 * 32 pixels of a 512 crop the weights are a large matrix. The library
            # never writes it out.
            seen = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, C / heads)
        else:
            # With texts they are few, and are kept for backward. The library's kernel for a CPU
            # computes them anew there, with up to 3 times the rounding error in gradients.
            weights = (q / q.shape[3] ** 0.5 @ k.transpose(2, 3)).softmax(3)  # (B, heads, N, M)
            seen = weights @ v  # (B, heads, N, C / heads)
        return self.drop(self.proj(seen.transpose(1, 2).flatten(2)))  # (B, N, C)


class CoAttentionLayer(nn.Module):
    """Pre-norm decoder layer: look at oneself, look at the other side, think."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.self_attn = MultiHeadAttention(width, heads, dropout)
        self.cross_attn = MultiHeadAttention(width, heads, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x (B, N, C) after one layer; memory (B, M, C), the other side, comes as it is."""
        # Self-attention lets the texts of one photo tell themselves apart, and pixels of one
        # object find each other; only then each looks at the other side.
        normed = self.norm1(x)
        x = x + self.self_attn(normed, normed)
        x = x + self.cross_attn(self.norm2(x), memory)
        return x + self.drop(self.mlp(self.norm3(x)))


class CoAttention(nn.Module):
    """What co-attention matching adds to global and dense embeddings (B, 1 + N, D) and to the
    texts (B, K, D).

    channels: D, of CLIP's embeddings; width, heads: inside the stacks, of `layers` layers each.
    chain: layer i feeds layer i + 1.
    # PAPER co-attention matching; sizes are the released ones, 6.84 M parameters (9).
    # RELEASED chain_coattention: all layers get the stack's input, so only the last counts (8).
    """

    def __init__(self, channels: int, width: int, heads: int, chain: bool, layers: int = 3,
                 dropout: float = 0.1):
        super().__init__()
        self.chain = chain
        # Both sides are projected from CLIP's embedding (D = 512 for ViT-B/16) to `width` (256),
        # and back at the end. Only the visual side ends in a LayerNorm: as released (9).
        self.visual_in = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, width), nn.LayerNorm(width))
        self.text_in = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))
        self.text_layers = self.make_layers(layers, width, heads, dropout)
        self.visual_layers = self.make_layers(layers, width, heads, dropout)
        self.text_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels))
        self.visual_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @staticmethod
    def make_layers(layers: int, width: int, heads: int, dropout: float) -> nn.ModuleList:
        """A stack of layers."""
        return nn.ModuleList([CoAttentionLayer(width, heads, dropout) for _ in range(layers)])

    def stack(self, layers: nn.ModuleList, x: Tensor, memory: Tensor) -> Tensor:
        """x (B, N, C) after a stack of layers that all look at the same memory (B, M, C)."""
        out = x
        for layer in layers:
            out = layer(out if self.chain else x, memory)
        return out

    def forward(self, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """What is to be added: to visual (B, 1 + N, D), and to the texts (B, K, D).

        visual: global and dense embeddings.
        """
        visual = self.visual_in(visual)  # (B, 1 + N, width)
        text = self.text_in(text)  # (B, K, width)
        # Each side looks at the other's input, not at the other's output: neither waits for the
        # other, and what one side has already concluded does not come back to it as evidence (9).
        text_diff = self.text_out(self.stack(self.text_layers, text, visual))  # (B, K, D)
        visual_diff = self.visual_out(self.stack(self.visual_layers, visual, text))  # (B, 1+N, D)
        return visual_diff, text_diff


# ========================================================================== text-guided decoder
# The pyramid knows edges and parts, but its channels have no names; a decoder that sees it alone
# must learn from noisy seeds what a cow is. The score map says per place how well each class name
# fits, with all that CLIP read. So it joins the channels of every level, and the decoder is left
# with what it is good at: bringing a named but coarse guess to the image's detail.

class ConvNormReLU(nn.Module):
    """A 3x3 convolution, BatchNorm, ReLU; resolution stays."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h, w)."""
        return self.bn(self.conv(x)).relu()


class TextGuidedDecoder(nn.Module):
    """Pyramid joined by the score map -> logits at stride 4; 7.3 M parameters.

    A feature pyramid (Lin et al., CVPR 2017) carries meaning down from coarse levels to fine ones.
    The Semantic-FPN head (Kirillov et al., CVPR 2019) then lets every level climb to stride 4 by
    convolutions and steps x2, and sums the four. `forward` starts behind the first convolutions,
    `laterals`, because `WeakCLIP.adapted_laterals` computes them in fewer steps; the plain form is
    decoder(decoder.laterals(pyramid)).
    # PAPER text guidance on every level.
    """

    def __init__(self, channels: int, fpn_channels: int, head_channels: int, n_classes: int):
        super().__init__()
        self.lateral = nn.ModuleList()
        for _ in range(4):
            self.lateral.append(nn.Conv2d(channels, fpn_channels, 1))
        self.smooth = nn.ModuleList()
        for _ in range(4):
            self.smooth.append(nn.Conv2d(fpn_channels, fpn_channels, 3, padding=1))
        self.climb = nn.ModuleList()
        for level in range(4):
            # A convolution before each step x2 mends what the upsampling before it blurred.
            # Level 0 is at stride 4 already and gets one convolution; level 3 has three steps x2.
            steps = [ConvNormReLU(fpn_channels, head_channels)]
            for step in range(level):
                if step > 0:
                    steps.append(ConvNormReLU(head_channels, head_channels))
                steps.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.climb.append(nn.Sequential(*steps))
        # Kaiming He's initialisation over fan-out, as the released code's building block has
        # it (4).
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.drop = nn.Dropout2d(0.1)
        # The last convolution keeps torch's default initialisation (4).
        self.classify = nn.Conv2d(head_channels, n_classes, 1)

    def laterals(self, pyramid: list[Tensor]) -> list[Tensor]:
        """Four (B, fpn_channels, ., .): the same channels for all levels, so that they add up.

        pyramid: four (B, channels, ., .) at strides 4, 8, 16 and 32, each joined by the score map.
        """
        return [conv(level) for conv, level in zip(self.lateral, pyramid)]

    def neck(self, laterals: list[Tensor]) -> list[Tensor]:
        """Four (B, fpn_channels, ., .), each with all coarser levels added to it."""
        x = list(laterals)
        # Top down. Upsampling goes to the finer level's size and not by a factor of 2, because a
        # grid of 33 tokens has 16 below it.
        for i in (2, 1, 0):
            x[i] = x[i] + F.interpolate(x[i + 1], x[i].shape[2:], mode="nearest")
        # 3x3 convolutions smooth the blocks that nearest upsampling leaves.
        return [conv(level) for conv, level in zip(self.smooth, x)]

    def head(self, levels: list[Tensor]) -> Tensor:
        """The four levels at stride 4, summed: (B, head_channels, H/4, W/4)."""
        x = [climb(level) for climb, level in zip(self.climb, levels)]
        total = x[0]
        for level in x[1:]:
            # On odd grids the coarser levels come out a little off and are resized to the finest.
            total = total + resize(level, total.shape[2:])
        return total

    def forward(self, laterals: list[Tensor]) -> Tensor:
        """Logits (B, K, H/4, W/4), from what `laterals` or `WeakCLIP.adapted_laterals` returns."""
        laterals = [conv_layout(level) for level in laterals]
        features = self.head(self.neck(laterals))  # (B, head_channels, H/4, W/4)
        return self.classify(self.drop(features))


def resized_score(score: Tensor, size) -> Tensor:
    """The score map (B, K, h, w) at a level's size (h, w): the cosine, not divided by TAU.

    With corners aligned, unlike all other resizes: as released (11). The decoder learns with the
    small shift, so no switch undoes it.
    """
    return resize(score, size, align_corners=True)


def lateral_of_upsampled(lateral: nn.Conv2d, up: Doubling, x: Tensor,
                         score: Tensor | None) -> Tensor:
    """lateral([up(x), score]) without the map up(x): (B, fpn_channels, 2h, 2w).

    lateral: the decoder's 1x1 convolution of a level; up: the adapter's last one of that level;
    x (B, C, h, w), what enters it; score (B, K, ., .), or None without text guidance.

    Between the two nothing bends, so together they are one linear map, and its weight is their
    product. That leaves a third of the multiplications, and C channels at stride 4, the largest
    map of all, never exist. Values and gradients of both weights are the same but for rounding.
    """
    C = up.out_channels
    of_map = lateral.weight[:, :C, 0, 0]  # (fpn_channels, C)
    weight = torch.einsum("icyx,fc->ifyx", up.weight, of_map)  # (C, fpn_channels, 2, 2)
    bias = of_map @ up.bias + lateral.bias  # (fpn_channels,)
    out = double(x, weight, bias)  # (B, fpn_channels, 2h, 2w)
    if score is not None:
        out = out + F.conv2d(resized_score(score, out.shape[2:]), lateral.weight[:, C:])
    return out


# ===================================================================================== WeakCLIP

def drop_path(x: Tensor, rate: float) -> Tensor:
    """Residual branch x (B, N, C), dropped for some images and scaled up for the others.

    Stochastic depth: on average the branch is what it was.
    """
    keep = torch.rand(len(x), 1, 1, device=x.device) >= rate
    return x * keep / (1 - rate)


def prefix_mask(P: int, K: int, L: int, device) -> Tensor:
    """Who attends to whom in [P tokens, then K texts of L tokens]: (P + K * L, P + K * L) bool.

    Each token to those before it, as in CLIP, but a text's tokens to no other text's.
    """
    causal = clip.causal_mask(P + L, device)
    mask = torch.block_diag(causal[:P, :P], *[causal[P:, P:]] * K)
    mask[P:, :P] = True
    return mask


def to_grid(tokens: Tensor, h: int, w: int) -> Tensor:
    """Tokens (B, h*w, C) -> grid (B, C, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, (h, w))


class WeakCLIP(nn.Module):
    """The network: image (B, 3, H, W) -> logits (B, K, H/4, W/4), score map (B, K, H/16, W/16).

    clip_model: a CLIP of patch 16. token_ids (K, L): from `name_tokens`, background first.
    crop: training crop in pixels. contexts: number of learnable prompts. The other sizes are those
    of the trained parts; by default they follow CLIP's embedding (256 wide, 4 heads for ViT-B/16).
    """

    def __init__(self, clip_model, token_ids: Tensor, switches=PAPER, crop=512, contexts=8,
                 coattention_width=None, coattention_heads=None, fpn_channels=None,
                 head_channels=None):
        super().__init__()
        self.clip = clip_model
        self.switches = switches
        self.crop = crop
        self.register_buffer("token_ids", token_ids, persistent=False)
        K = len(token_ids)
        width, channels = clip_model.visual.proj.shape  # of a token inside CLIP, of an embedding
        # GUESS trained parts shrink and grow with CLIP; half its embedding is ViT-B/16's 256
        half = channels // 2

        if switches.adapter:
            self.adapter = PyramidAdapter(width)
        if switches.prompts:
            # PAPER learnable prompts. One set serves all classes, as the sentence around a name
            # would; 8 vectors of standard deviation 1 before truncation are as released (7).
            text_width = clip_model.token_embedding.weight.shape[1]
            start = torch.empty(1, contexts, text_width)
            self.contexts = nn.Parameter(nn.init.trunc_normal_(start))
        if switches.coattention:
            coattention_width = coattention_width or half
            heads = coattention_heads or max(1, coattention_width // 64)
            self.coattention = CoAttention(
                channels, coattention_width, heads, switches.chain_coattention)
            # How much is added per channel: gamma to the texts, beta to the pixels. At 0.1
            # co-attention changes little at first.
            self.gamma = nn.Parameter(0.1 * torch.ones(channels))
            self.beta = nn.Parameter(0.1 * torch.ones(channels))
        level_channels = width + K if switches.text_guidance else width
        self.decoder = TextGuidedDecoder(
            level_channels, fpn_channels or half, head_channels or half, K)
        self.prepare_clip()

    def prepare_clip(self):
        """Freeze CLIP, and store its table of positions as the variant has it."""
        if not self.switches.positions_resized_once:
            # RELEASED positions_resized_once: stored at the training grid, resized from there (10)
            visual = self.clip.visual
            side = self.crop // 16
            table = clip.resize_positions(visual.positional_embedding.detach(), side, side)
            visual.positional_embedding = nn.Parameter(table.clone())
        if self.switches.freeze_clip:
            # PAPER CLIP is frozen: what it learned from 400 million pairs, a few thousand noisy
            # seeds could only spoil. # RELEASED freeze_clip: all of it trains, at a tiny rate (1)
            self.clip.requires_grad_(False)

    def train(self, mode=True):
        """As in torch, but a frozen CLIP stays in eval mode: frozen must stay frozen."""
        super().train(mode)
        if self.switches.freeze_clip:
            self.clip.eval()
        return self

    def encode_image(self, image: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Four grids (B, C, h, w), global (B, D) and dense (B, D, h, w) embeddings.

        image (B, 3, H, W) normalised; h = H // 16, w = W // 16; C is CLIP's width, D its
        embedding's, which images share with texts. Raises ValueError below 32 pixels (34).
        """
        if min(image.shape[2:]) < 32:
            raise ValueError(f"an image of {tuple(image.shape[2:])} pixels has no stride-32 level; "
                             "32 x 32 is the least")
        # Without a graph through the frozen encoder, its activations need not be kept: a batch
        # of crops fits into a fraction of the memory, and backward ends at the adapter.
        graph = torch.is_grad_enabled() and not self.switches.freeze_clip
        with torch.set_grad_enabled(graph):
            visual = self.clip.visual
            h, w = image.shape[2] // 16, image.shape[3] // 16
            x = visual.embed(image, self.image_positions(h, w))  # (B, 1 + h*w, C)
            blocks = visual.transformer.resblocks
            # GUESS the same parts of the depth for another CLIP; for ViT-B/16 blocks 4, 6, 8, 12
            taps = [round(len(blocks) * part) for part in (1 / 3, 1 / 2, 2 / 3, 1)]
            after = {}
            for i, block in enumerate(blocks):
                x = self.run_block(block, x, depth=i / max(1, len(blocks) - 1))
                after[i + 1] = x
            # Token 0 is the class token. It belongs to no place, so the grids leave it out.
            grids = [to_grid(after[tap][:, 1:], h, w) for tap in taps]  # four (B, C, h, w)
            # CLIP projects its class token only. The same projection of every other token gives
            # each place a feature that can be compared with texts.
            embedded = visual.ln_post(x) @ visual.proj  # (B, 1 + h*w, D)
            return grids, embedded[:, 0], to_grid(embedded[:, 1:], h, w)

    def image_positions(self, h: int, w: int) -> Tensor:
        """CLIP's table of positions for a grid of h x w tokens: (1 + h*w, C)."""
        visual = self.clip.visual
        # CLIP learned 14 x 14 places, of photos of 224 pixels. Resized, the table tells the same
        # about 32 x 32 of them: what is left, right, above and below.
        positions = clip.resize_positions(visual.positional_embedding, h, w)
        if not self.switches.class_embedding_once:
            # RELEASED class_embedding_once: the class token gets its embedding a second time (10)
            positions = torch.cat([positions[:1] + visual.class_embedding, positions[1:]])
        return positions

    def run_block(self, block, x: Tensor, depth: float) -> Tensor:
        """Tokens (B, 1 + N, C) after one of CLIP's blocks; depth from 0, the first, to 1."""
        rate = self.switches.drop_path * depth if self.training else 0
        if not rate:
            return block(x)
        # RELEASED drop_path: rising from 0 at the first block to 0.1 at the last (5)
        x = x + drop_path(block.attn(block.ln_1(x)), rate)
        return x + drop_path(block.mlp(block.ln_2(x)), rate)

    def encode_text(self) -> Tensor:
        """Class texts (K, D): [start, contexts, name, end], read at the end token's place.

        Start and contexts are the same in every text, and no token of them sees the names behind
        them. So they go through the encoder once, in one sequence with all names.
        """
        x = self.clip.token_embedding(self.token_ids)  # (K, L, C)
        prefix, names = x[0, :1], x[:, 1:]  # (1, C), (K, L - 1, C)
        if self.switches.prompts:
            prefix = torch.cat([prefix, self.contexts[0]])  # (P, C)
        P, (K, L, _) = len(prefix), names.shape
        positions = self.clip.positional_embedding[:P + L]
        prefix = prefix + positions[:P]
        names = names + positions[P:]  # each name as if it stood right behind the prefix
        x = torch.cat([prefix, names.flatten(0, 1)])[None]  # (1, P + K * L, C)
        x = self.clip.transformer(x, prefix_mask(P, K, L, x.device))
        names = self.clip.ln_final(x[0, P:]).unflatten(0, (K, L))
        end = self.token_ids.argmax(1) - 1  # in `names`, which lack the start
        rows = torch.arange(K, device=x.device)
        return names[rows, end] @ self.clip.text_projection  # (K, D)

    def match(self, global_: Tensor, dense: Tensor, text: Tensor) -> Tensor:
        """Score map (B, K, h, w) in [-1, 1]: cosine of each place with each class text.

        global_ (B, D), dense (B, D, h, w), text (K, D).
        """
        h, w = dense.shape[2:]
        pixels = dense.flatten(2).transpose(1, 2)  # (B, h*w, D)
        # The global embedding takes part as one more token: texts may look at the whole photo too.
        visual = torch.cat([global_[:, None], pixels], 1)  # (B, 1 + h*w, D)
        text = text.expand(len(visual), -1, -1)  # (B, K, D)
        if self.switches.coattention:
            visual_diff, text_diff = self.coattention(visual, text)
            text = text + self.gamma * text_diff
            visual = visual + self.beta * visual_diff
        # The score map. CLIP was trained to compare directions, not lengths, so both sides come to
        # length one, and their product is the cosine.
        text = F.normalize(text, dim=2)  # (B, K, D)
        visual = F.normalize(visual[:, 1:], dim=2)  # (B, h*w, D); the global token has served
        return (text @ visual.transpose(1, 2)).unflatten(2, (h, w))  # (B, K, h, w)

    def join_score_map(self, pyramid: list[Tensor], score: Tensor) -> list[Tensor]:
        """Text guidance: the pyramid with the score map as further channels, (B, C + K, ., .)."""
        if not self.switches.text_guidance:
            return pyramid
        joined = []
        for level in pyramid:
            joined.append(torch.cat([level, resized_score(score, level.shape[2:])], 1))
        return joined

    def adapted_laterals(self, grids: list[Tensor], score: Tensor) -> list[Tensor]:
        """decoder.laterals(join_score_map(adapter(grids), score)): four (B, fpn_channels, ., .).

        Computed in fewer steps at strides 4 and 8: see `lateral_of_upsampled`.
        """
        adapter, lateral = self.adapter, self.decoder.lateral
        x = adapter.before_last(grids)
        x3, x4 = self.join_score_map(x[2:], score)
        guide = score if self.switches.text_guidance else None
        return [
            lateral_of_upsampled(lateral[0], adapter.level1[-1], x[0], guide),  # stride 4
            lateral_of_upsampled(lateral[1], adapter.level2[-1], x[1], guide),  # stride 8
            lateral[2](x3),  # stride 16
            lateral[3](x4)]  # stride 32

    def forward(self, image: Tensor, text: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, K, 4h, 4w), a quarter of the image's size, and score map (B, K, h, w).

        image (B, 3, H, W) normalised; h = H // 16. text (K, D) from `encode_text`, to compute it
        once for many images. Raises ValueError for an image under 32 pixels.
        """
        grids, global_, dense = self.encode_image(image)
        if text is None:
            text = self.encode_text()
        score = self.match(global_, dense, text)
        if self.switches.adapter:
            # As below, with pyramid = self.join_score_map(self.adapter(grids), score), but for
            # the largest maps, which are never made.
            laterals = self.adapted_laterals(grids, score)
        else:
            pyramid = self.join_score_map(resized_pyramid(grids), score)
            laterals = self.decoder.laterals(pyramid)
        return self.decoder(laterals), score


# ======================================================================================= losses
# There is no true mask to learn from, only seeds: right in the middle of objects, wrong or unsure
# near their boundaries. Each of three losses (seeding, boundary, score) covers what another
# cannot see; `weakclip_losses` adds them up. Seeding and boundary are taken at an eighth of the
# image's size, because the dense CRF runs at every step. For now: a dense CRF redraws
# probabilities so that near and like-coloured pixels agree (stage 1, part II). The default seeds
# of stage 1 leave nothing unsure; padding, and seeds of other methods, do.

def seeding_loss(p: Tensor, y: Tensor) -> Tensor:
    """Class-balanced log likelihood of the seeds, a scalar.

        L = mean over images of  - 1/|bg| sum_{y=0} log p_0  -  1/|fg| sum_{y>0} log p_y
    p (B, K, h, w) probabilities; y (B, h, w) int64, 255 = unsure. A side without a pixel adds 0.
    # PAPER seeding.

    Pulls every seed pixel to its label. It cannot see unsure pixels, and it believes a seed that
    spills over an object's boundary.
    """
    nll = F.nll_loss(p.log(), y, ignore_index=IGNORE, reduction="none")  # (B, h, w)
    background = y == 0
    foreground = (y > 0) & (y != IGNORE)
    # In most photos background covers more than all objects together. In a plain mean "all is
    # background" would be a good answer; so each side has a mean of its own, and the same weight.
    return (mean_over(nll, background) + mean_over(nll, foreground)).mean()


def mean_over(values: Tensor, side: Tensor) -> Tensor:
    """Mean (B,) of the values (B, h, w) where side (B, h, w) is true; 0 where it never is."""
    return (values * side).sum((1, 2)) / side.sum((1, 2)).clamp(min=1)


def boundary_loss(p: Tensor, q: Tensor) -> Tensor:
    """Disagreement with the dense CRF's answer to p, a scalar: KL(q || p), each ratio clipped.

        L = mean over images and pixels of  sum_k q_k log clip(q_k / p_k, 0.05, 20)
    p (B, K, h, w) probabilities; q (B, K, h, w) from `crf_target`, without gradient. Where the
    clip cuts, the gradient is zero. All pixels count, padding and unsure ones too (19).
    # PAPER boundary.

    The CRF moves the boundaries of p's regions to where colours change, so this loss teaches the
    network to draw them there by itself, unsure pixels included. It cannot see names: a cow called
    a horse is as good as one called a cow, if its outline is right. That is left to the seeds.
    """
    # Unclipped, log(q / p) reaches 16 where the network is sure (p is at least 1e-7) and the CRF
    # says otherwise; a few such pixels, which may well be the CRF's mistakes, would rule the batch.
    return (q * (q / p).clamp(0.05, 20).log()).sum(1).mean()


def floor_and_normalise(q: Tensor) -> Tensor:
    """The CRF's answer (B, K, h, w), at least 1e-4 everywhere and summing to one again."""
    q = q.clamp(min=1e-4)  # as released: what the CRF rules out keeps a little
    return q / q.sum(1, keepdim=True)


@torch.no_grad()
def crf_target(p: Tensor, image: Tensor, sxy: float) -> Tensor:
    """Dense CRF's answer (B, K, h, w) to the network's probabilities p (B, K, h, w) (21).

    image (B, 3, h, w) from `crf_image`: the augmented one, which the network saw as well.
    sxy: bandwidth in pixels of this size.

    It has no gradient on purpose. The answer is a teacher for this one step; if the network could
    also move the teacher, the two would soonest agree on a flat p, to which the CRF adds nothing.
    """
    # Pixels pull each other to the same class: a little where they are near (Gaussian: 3 pixels,
    # weight 3), much where they have like colours (bilateral: 13 grey levels, weight 10; its 80
    # pixels are wider than the image, so that place hardly matters to it).
    q = dense_crf(p.clamp(min=1e-4), image, gaussian=(3, 3), bilateral=(sxy, 13, 10))
    return floor_and_normalise(q)


def mean_cross_entropy(logits: Tensor, labels: Tensor, over_valid=True) -> Tensor:
    """Cross entropy, a scalar: mean over labelled pixels, 0 without any.

    logits (B, K, H, W); labels (B, H, W) int64, 255 = unsure.
    # RELEASED score_loss_over_valid: mean over all pixels, unsure ones add 0 (24).
    """
    nll = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    if not over_valid:
        return nll / labels.numel()
    return nll / (labels != IGNORE).sum().clamp(min=1)


# Temperature of the score map's cross entropy. Cosines are within a few tenths of each other;
# divided by 0.07 their differences are large enough for a softmax. It is the value that CLIP's own
# training started from, and here it stays fixed (11).
TAU = 0.07


def score_loss(score: Tensor, seeds: Tensor, over_valid=True) -> Tensor:
    """Cross entropy of the score map / tau with the seeds, a scalar.

    score (B, K, h, w) cosines, resized to the seeds' size; seeds (B, H, W) int64, 255 = unsure.
    # PAPER text-to-pixel matching learns from the seeds.

    Pulls each place's feature to the text of its class and away from the other texts, so that the
    score map is a segmentation already before the decoder. Without it, matching would hear of the
    seeds only through the decoder. It cannot see anything finer than CLIP's stride of 16.
    """
    return mean_cross_entropy(resize(score / TAU, seeds.shape[1:]), seeds, over_valid)


def loss_probs(logits: Tensor, size, aligned=True) -> Tensor:
    """Class probabilities (B, K, h, w) at the losses' resolution, bounded away from zero.

    logits (B, K, ., .) of the decoder; size (h, w).
    # RELEASED aligned: corners are aligned where both sizes are odd (23).
    """
    # The losses take logarithms, and a softmax in float32 can round to 0; hence the 1e-7.
    corners = not aligned and size[0] % 2 == 1 and size[1] % 2 == 1
    p = resize(logits, size, align_corners=corners).softmax(1) + 1e-7
    return p / p.sum(1, keepdim=True)  # (B, K, h, w)


def loss_labels(seeds: Tensor, size, aligned=True) -> Tensor:
    """Seeds (B, h, w) int64 by nearest pixel, from seeds (B, H, W); size (h, w).

    Read at the cells' centres, where the logits are too.
    # RELEASED aligned: at the cells' corners (22).
    """
    return nearest(seeds[:, None].float(), size, aligned)[:, 0].long()


def nearest(labels: Tensor, size, aligned: bool) -> Tensor:
    """labels (B, 1, H, W) at another size (h, w) by nearest pixel: class numbers do not mix.

    # RELEASED aligned: the pixel at a cell's first corner, not the one in its middle (22).
    """
    return F.interpolate(labels, size, mode="nearest-exact" if aligned else "nearest")


def crf_image(image: Tensor, size, mean, std, aligned=True) -> Tensor:
    """What the boundary loss's CRF sees: (B, 3, h, w) uint8, whole grey levels.

    image (B, 3, H, W) normalised with mean and std, which are undone; size (h, w).
    # RELEASED aligned: corner-aligned samples of the normalised image, without low-pass (22).
    """
    if aligned:
        # GUESS the low-pass is a plain average: a cell's colour is that of all its pixels
        x = F.interpolate(image.float(), size, mode="area")
    else:
        # In float64, as the released code's scipy has it (22); MPS has none.
        x = image.cpu() if image.device.type == "mps" else image
        x = F.interpolate(x.double(), size, mode="bilinear", align_corners=True)
        x = x.float().to(image.device)
    mean = torch.tensor(mean, device=x.device)[:, None, None]  # (3, 1, 1)
    std = torch.tensor(std, device=x.device)[:, None, None]
    # Cut, not rounded, in both variants, as the released code does (22).
    return (x * std + mean).clamp(0, 255).to(torch.uint8)


def weakclip_losses(logits: Tensor, score: Tensor, image: Tensor, seeds: Tensor,
                    switches: Switches, mean, std) -> dict[str, Tensor]:
    """The losses of a batch by name, scalars, weighted: their sum is trained.

    logits (B, K, ., .), score (B, K, h, w), image (B, 3, H, W) normalised with mean and std,
    seeds (B, H, W) int64. All is computed in float32.
    """
    aligned = switches.aligned
    size = (image.shape[2] // 8, image.shape[3] // 8)
    p = loss_probs(logits.float(), size, aligned)  # (B, K, H/8, W/8)
    y = loss_labels(seeds, size, aligned)  # (B, H/8, W/8)
    terms = {"loss_seeding": seeding_loss(p, y)}
    if switches.boundary_weight:
        small = crf_image(image, size, mean, std, aligned)  # (B, 3, H/8, W/8)
        q = crf_target(p, small, switches.loss_crf_sxy)  # (B, K, H/8, W/8)
        terms["loss_boundary"] = switches.boundary_weight * boundary_loss(p, q)
    if switches.score_weight:
        cross_entropy = score_loss(score.float(), seeds, switches.score_loss_over_valid)
        terms["loss_score"] = switches.score_weight * cross_entropy
    return terms


# ========================================================================================= data
# Augmentation is the released code's: scale, crop, flip, colours, padding. Every random number of
# a sample comes from a generator seeded with the run's seed and the sample's number, so that a
# resumed run draws exactly what the first one would have drawn.

def fit_size(H: int, W: int, short: float, long: float) -> tuple[int, int]:
    """Size (h, w) of an H x W image, ratio kept, that fits the two sides; at least 1.

    The image becomes as large as possible with its short side at most `short` and its long side
    at most `long`.
    """
    scale = min(long / max(H, W), short / min(H, W))
    return max(1, int(H * scale + 0.5)), max(1, int(W * scale + 0.5))


def resize_image(image: np.ndarray, size) -> np.ndarray:
    """(H, W, 3) uint8 -> (h, w, 3) uint8, bilinear.

    No low-pass comes before a reduction: the released code's OpenCV has none either.
    """
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()  # (1, 3, H, W)
    # Rounded, not cut: cutting would make every resized photo half a grey level darker.
    x = resize(x, size)[0].round().to(torch.uint8)  # (3, h, w)
    return x.permute(1, 2, 0).numpy()


def stretch(x: np.ndarray, factor: float, shift: float = 0.0) -> np.ndarray:
    """x * factor + shift, cut to uint8 as OpenCV's arrays are after each step."""
    return np.clip(x.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)


def to_hsv(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> HSV; hue 0..255 is the full circle."""
    return np.array(Image.fromarray(image).convert("HSV"))


def from_hsv(hsv: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 HSV -> RGB."""
    return np.array(Image.fromarray(hsv, "HSV").convert("RGB"))


def photometric_distortion(rng, image: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) uint8 in other colours.

    Brightness +-32, contrast x 0.5..1.5, saturation x 0.5..1.5, hue +-36 degrees, each with
    probability 0.5; contrast comes before or after saturation and hue, at random.
    """
    def coin():
        return rng.random() < 0.5

    if coin():
        image = stretch(image, 1, rng.uniform(-32, 32))
    contrast = rng.uniform(0.5, 1.5) if coin() else 1
    contrast_first = coin()
    if contrast_first:
        image = stretch(image, contrast)
    if coin():
        hsv = to_hsv(image)
        hsv[..., 1] = stretch(hsv[..., 1], rng.uniform(0.5, 1.5))
        image = from_hsv(hsv)
    if coin():
        hsv = to_hsv(image)
        # The released hue has 180 steps of 2 degrees, ours 256 steps; uint8 wraps as a circle.
        steps = int(rng.integers(-18, 18))
        hsv[..., 0] += np.uint8(round(steps * 256 / 180) % 256)
        image = from_hsv(hsv)
    return image if contrast_first else stretch(image, contrast)


def random_crop(rng, label: np.ndarray, crop: int) -> tuple[int, int]:
    """Corner (top, left) of a crop in which no label covers 75 % of what is labelled.

    label (H, W) uint8. The corner is drawn anew up to 10 times, then the last one stands.
    """
    H, W = label.shape

    def draw():
        top = int(rng.integers(0, max(H - crop, 0) + 1))
        left = int(rng.integers(0, max(W - crop, 0) + 1))
        return top, left

    # A crop of nothing but background teaches little, and the seeding loss would have one side.
    top, left = draw()
    for _ in range(10):
        part = label[top:top + crop, left:left + crop]
        counts = np.bincount(part[part != IGNORE], minlength=2)
        if counts.max() < 0.75 * counts.sum():  # so at least two labels are there
            break
        top, left = draw()
    return top, left


def mean_and_std(switches: Switches):
    """Mean and standard deviation, in grey levels, that images are normalised with: CLIP's.

    # RELEASED clip_normalisation: ImageNet's (26).
    """
    if switches.clip_normalisation:
        return CLIP_MEAN, CLIP_STD
    return IMAGENET_MEAN, IMAGENET_STD


class SeededImages(torch.utils.data.Dataset):
    """Item (index, sample) -> image (3, crop, crop) float32, seeds (crop, crop) int64.

    index: which of the ids; sample: how many samples came before in the run, a number from which,
    with the run's random `seed`, all chance is drawn. data: the dataset folder; ids: images to
    learn from; seeds: folder of their label PNGs.
    """

    def __init__(self, data, ids: list[str], seeds: Path, crop: int, seed: int,
                 switches: Switches):
        self.data = data
        self.ids = ids
        self.seeds = seeds
        self.crop = crop
        self.seed = seed
        self.aligned = switches.aligned
        self.mean_std = mean_and_std(switches)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, item):
        index, sample = item
        rng = np.random.default_rng([self.seed, sample, 2])  # 2: another stream than stage 1's
        image_id, crop = self.ids[index], self.crop
        image = self.data.image(image_id)  # (H, W, 3)
        path = label_path(self.seeds, image_id)
        label = read_label(path, len(self.data.classes), image.shape[:2])  # (H, W)

        # Objects are shown half to twice as large as in the photo whose short side is the crop.
        ratio = rng.uniform(0.5, 2)
        # The long side may have up to four crops times the ratio, as released.
        size = fit_size(*image.shape[:2], int(crop * ratio), int(4 * crop * ratio))
        image = resize_image(image, size)
        label = self.resize_label(label, size)
        top, left = random_crop(rng, label, crop)
        image = image[top:top + crop, left:left + crop]
        label = label[top:top + crop, left:left + crop]
        if rng.random() < 0.5:
            image = image[:, ::-1]
            label = label[:, ::-1]
        image = photometric_distortion(rng, np.ascontiguousarray(image))

        # What the image does not fill is padded right and below: grey, that is 0 after
        # normalising, and unsure.
        x = normalise(image, *self.mean_std)  # (3, h, w)
        y = torch.from_numpy(label.astype(np.int64))  # (h, w)
        return crop_or_pad(x, crop, 0, 0, 0), crop_or_pad(y, crop, 0, 0, IGNORE)

    def resize_label(self, label: np.ndarray, size) -> np.ndarray:
        """(H, W) uint8 -> (h, w) uint8; not aligned, half a pixel off the image (22)."""
        return nearest(torch.from_numpy(label)[None, None], size, self.aligned)[0, 0].numpy()


def training_ids(data, args, switches: Switches) -> list[str]:
    """Ids that training runs over: the training list; VOC's train twice if so released."""
    ids = data.ids(args.split, args.limit)
    if switches.train_listed_twice and args.split == "trainaug" and data.has("train"):
        # RELEASED train_listed_twice: trainaug contains train, and both lists are read (27)
        ids = ids + data.ids("train", args.limit)
    return ids


# ===================================================================================== training

def make_optimizer(model: WeakCLIP, lr: float) -> torch.optim.Optimizer:
    """AdamW, weight decay 3e-5 on everything that trains; groups differ in their base rate only.

    # RELEASED freeze_clip, train_adapter: CLIP and adapter are in a group of base rate 0 (1, 2).
    """
    slow_parts = ("clip.",) if model.switches.train_adapter else ("clip.", "adapter.")
    slow, fast = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = slow if name.startswith(slow_parts) else fast
        group.append(parameter)
    # The trained parts come first: the log shows the first group's rate.
    groups = [{"params": fast, "base_lr": lr}]
    if slow:
        groups.append({"params": slow, "base_lr": 0.0})
    return torch.optim.AdamW(groups, lr=lr, weight_decay=3e-5)


def warm_cosine(iters: int, low: float = 1e-6, warm_ratio: float = 1e-6):
    """rate(group, step) -> learning rate: a cosine, times a linear warm-up.

    The cosine runs from the group's base rate at iteration 0 to `low` at the end. `low` is
    absolute, so the rate of a group whose base rate is 0 *rises* to it (1). The warm-up takes
    1,500 of 20,000 iterations, and as large a part of a shorter run.
    """
    warm = min(1500, int(0.075 * iters))

    def rate(group, step):
        lr = low + (group["base_lr"] - low) * (1 + math.cos(math.pi * step / iters)) / 2
        if step < warm:
            # AdamW's running means start empty; small first steps keep them from throwing the
            # new layers far off on the evidence of a few batches.
            lr = lr * (1 - (1 - step / warm) * (1 - warm_ratio))
        return lr
    return rate


def train(model: WeakCLIP, facts, data, ids: list[str], args, machine: Machine, folder: Path):
    """Train the parts around CLIP on the seeds, from the folder's last checkpoint if there is one.

    facts: what tells this network's checkpoint from another's. The loop is stage 1's `fit`.
    """
    switches = model.switches
    mean, std = mean_and_std(switches)

    def losses(model, image, seeds):
        # Only the network may run in bfloat16. Its 8 bits of precision are too few for the
        # logarithms of the losses, which are outside.
        with machine.autocast():
            logits, score = model(image)  # (B, K, H/4, W/4), (B, K, H/16, W/16)
        return weakclip_losses(logits, score, image, seeds, switches, mean, std)

    samples = SeededImages(data, ids, args.seeds, args.crop, args.seed, switches)
    # A frozen CLIP is not saved: every checkpoint would hold the same 150 M numbers.
    frozen = ("clip.",) if switches.freeze_clip else ()
    # In `fit`, a step is: take a batch, set the rate, add up the losses, backward, optimizer step.
    fit(model, samples, make_optimizer(model, args.lr), losses, warm_cosine(args.iters), args,
        machine, folder, facts, frozen=frozen)


# ==================================================================================== inference
# A photo is looked at in several sizes, each as it is and mirrored, through windows of the size
# that training showed. Whatever the views agree on is likely right, so their probabilities are
# averaged.

def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Starts of the sliding windows on one axis; the last is shifted back to end at the border."""
    count = max(length - crop + stride - 1, 0) // stride + 1
    return [max(min(k * stride, length - crop), 0) for k in range(count)]


def window_logits(model: WeakCLIP, x: Tensor, text: Tensor, pad: bool) -> Tensor:
    """Logits (B, K, h, w) of windows x (B, 3, h, w).

    pad: CLIP reads whole patches of 16 pixels, so a window is padded to a multiple of 16, at least
    32, and its logits are cut back.
    # RELEASED pad_windows: up to 15 columns are lost and the logits stretched over them (30).
    """
    h, w = x.shape[2:]
    if pad:
        # GUESS with the mean colour, right and below, as training pads
        right = max(-w % 16, 32 - w)
        below = max(-h % 16, 32 - h)
        x = F.pad(x, (0, right, 0, below))
    logits, _ = model(x, text)  # (B, K, ., .) at a quarter
    return resize(logits.float(), x.shape[2:])[..., :h, :w]


def slide(model: WeakCLIP, x: Tensor, text: Tensor, crop: int, stride: int, pad=True,
          batch: int = 8) -> Tensor:
    """Logits (1, K, H, W) of a whole view x (1, 3, H, W), averaged where windows overlap.

    CLIP's grid at the training crop is what adapter and decoder know; a larger view is therefore
    not shown as a whole but in windows of that size. batch: windows at a time.
    """
    H, W = x.shape[2:]
    corners = []
    for top in window_starts(H, crop, stride):
        for left in window_starts(W, crop, stride):
            corners.append((top, left))
    total = x.new_zeros(1, len(text), H, W)
    count = x.new_zeros(1, 1, H, W)
    for first in range(0, len(corners), batch):
        part = corners[first:first + batch]
        # All windows of a view have one size, that of the crop or of a smaller view.
        windows = [x[..., top:top + crop, left:left + crop] for top, left in part]
        logits = window_logits(model, torch.cat(windows), text, pad)  # (n, K, h, w)
        for window, (top, left) in zip(logits, part):
            total[..., top:top + crop, left:left + crop] += window
            count[..., top:top + crop, left:left + crop] += 1
    return total / count


def probabilities(model: WeakCLIP, views, text: Tensor, crop: int, size, pad=True) -> Tensor:
    """Mean class probabilities (K, H, W) over the views of one photo.

    views: (image (1, 3, h, w) normalised, mirrored?) of each; size (H, W) of the photo.
    """
    total = 0
    for x, mirrored in views:
        # Windows overlap by a third: most borders are seen again with context around them.
        logits = slide(model, x, text, crop, 2 * crop // 3, pad)  # (1, K, h, w)
        # Logits are resized before the softmax, not probabilities after it: between a sure
        # "cat" and a sure "sofa" the logits cross at one place and leave a sharp end there,
        # while interpolated probabilities would fade from one to the other.
        p = resize(logits, size).softmax(1)  # (1, K, H, W)
        # The mirror is undone last, when the view has the photo's size: resizing and softmax do
        # not care, and here all views meet pixel on pixel.
        if mirrored:
            p = p.flip(3)
        total = total + p
    return (total / len(views))[0]


def make_views(image: np.ndarray, scales, flip: bool, mean_std, crop: int | None = None):
    """Yields (view (1, 3, h, w) normalised, mirrored?) of a photo (H, W, 3) uint8.

    One view a scale, and its mirror image if `flip`. With crop given, scale 1 has a short side of
    `crop` and a long side of at most 4 crop; without, it is the photo's own size (stage 3).
    """
    H, W = image.shape[:2]
    for scale in scales:
        if crop:
            short, long = int(crop * scale), int(4 * crop * scale)
        else:
            short, long = min(H, W) * scale, max(H, W) * scale
        resized = resize_image(image, fit_size(H, W, short, long))
        x = normalise(resized, *mean_std)[None]  # (1, 3, h, w)
        yield x, False
        if flip:
            yield x.flip(3), True


def predictor(model: WeakCLIP, args, crop: int, machine: Machine, outputs=None):
    """predict(photo (H, W, 3) uint8) -> class probabilities (K, H, W), over all views.

    outputs: which channels to return, None for all.
    """
    model.to(machine.device).eval()
    mean_std = mean_and_std(model.switches)
    with torch.no_grad(), machine.autocast():
        text = model.encode_text()  # (K, D); the same for every photo, so computed once

    @torch.no_grad()
    def predict(image):
        views = []
        for x, mirrored in make_views(image, args.scales, not args.no_flip, mean_std, crop):
            views.append((x.to(machine.device), mirrored))
        with machine.autocast():
            probs = probabilities(model, views, text, crop, image.shape[:2],
                                  model.switches.pad_windows)
        return probs if outputs is None else probs[outputs]
    return predict


# ================================================================================= pseudo masks
# The network has seen seeds of these very images, and yet its masks can be better than they: what
# seeds get wrong in one image and not in the next is hard to learn, what they get right repeats. An
# error that all seeds share stays, unless CLIP or the CRF speaks against it.
# A last dense CRF, at full resolution, brings the ends of the masks to the image's edges. All
# this serves stage 3 as well, whose masks are made of its own network's probabilities.

# Of the CRF after inference: (Gaussian sxy, weight), (bilateral sxy, srgb, weight). They are not
# the loss's constants: here a pixel is a pixel, there it is a cell of 8 x 8 (31).
MASK_CRF = {"VOC2012": ((3, 3), (83, 5, 3)), "COCO2014": ((1, 3), (67, 3, 4))}

# Options that change masks but not the model that makes them.
MASK_OPTIONS = ("scales", "no_flip", "no_crf", "label_filter", "save_probs", "images")


def mask_from(probs: Tensor, image: np.ndarray, crf, allowed=None):
    """Mask (H, W) uint8 of a photo, and the class numbers (J,) that were left to choose from.

    probs (K, H, W) class probabilities; image (H, W, 3) uint8; crf: an entry of MASK_CRF, None
    for none; allowed: the only classes that may win, by the image's labels, None for all (28).
    """
    if allowed is not None:
        probs = probs[allowed]
    # The CRF sees the classes that win somewhere. The others would hardly change its answer, and
    # its time grows with their number. What is left is not renormalised, as released.
    kept = probs.argmax(0).unique()
    probs = probs[kept]  # (J, H, W)
    if crf and len(kept) > 1:  # where one class is left, nothing is to be decided
        rgb = torch.from_numpy(image).permute(2, 0, 1)[None].to(probs.device)  # (1, 3, H, W)
        # The floor: a class that is impossible at a pixel could never return there.
        probs = dense_crf(probs.clamp(min=1e-5)[None], rgb, *crf)[0]  # (J, H, W)
    # From places in what is kept, by places in what is allowed, back to class numbers.
    classes = kept.cpu().numpy()
    if allowed is not None:
        classes = np.asarray(allowed)[classes]
    mask = classes[probs.argmax(0).cpu().numpy()].astype(np.uint8)  # (H, W)
    return mask, classes


def write_masks(predict, ids: list[str], read, folder: Path, machine: Machine, crf, allowed=None,
                probs_folder: Path | None = None):
    """Write folder/<id>.png for every id whose file does not exist.

    predict: photo (H, W, 3) uint8 -> probabilities (K, H, W); read: id -> photo;
    allowed: {id: class numbers}, None for all. probs_folder: gets <id>.npz too, of the classes
    that win somewhere (keys: class numbers (J,) uint8, prob: (J, H, W) float16, before the CRF).
    """
    # Where several processes run, each takes its share of the ids.
    share = machine.share(ids)
    with tqdm(share, desc=f"masks {folder.name}", disable=not machine.main) as bar:
        for image_id in bar:
            if all(map(is_whole, mask_files(folder, [image_id], probs_folder))):
                continue
            image = read(image_id)
            with photo_faults(image_id, image, "--no-crf, fewer or smaller --scales"):
                probs = predict(image)
                check_output(image_id, probs)
                allowed_here = allowed[image_id] if allowed else None
                mask, kept = mask_from(probs, image, crf, allowed_here)
            if probs_folder:
                arrays = {"keys": kept.astype(np.uint8),
                          "prob": probs[torch.as_tensor(kept)].cpu().numpy().astype(np.float16)}
                write_whole(probs_folder / f"{image_id}.npz",
                            lambda f: np.savez_compressed(f, **arrays))
            write_label(folder / f"{image_id}.png", mask)
    machine.wait()


def mask_files(folder: Path, ids: list[str], probs_folder: Path | None) -> list[Path]:
    """What `write_masks` writes for these ids."""
    files = []
    for image_id in ids:
        files.append(folder / f"{image_id}.png")
        if probs_folder:
            files.append(probs_folder / f"{image_id}.npz")
    return files


def write_all_masks(predict, data, lists, folder: Path, args, machine: Machine, crf):
    """Write folder/masks/<split>/<id>.png for every list in lists {split: ids}.

    The image-label filter acts on the training list only: what is in a val image, nobody told.
    """
    for split, ids in lists.items():
        allowed = None
        if args.label_filter and split == args.split:
            labels = data.image_labels(ids)
            allowed = {image_id: [0, *labels[image_id]] for image_id in ids}
        probs_folder = folder / "probs" / split if args.save_probs else None
        write_masks(predict, ids, data.image, folder / "masks" / split, machine, crf, allowed,
                    probs_folder)


# From here on bookkeeping, to skip at a first reading: which masks are current, which options made
# them, and masks of one's own photos.

def mask_photos(predict, args, iters, digest: str, folder: Path, machine: Machine, crf,
                classes):
    """`--images DIR`: write masks of a folder of photos to `folder`/images/<DIR's name>.

    <name>.png holds class numbers; <name>.jpg beside it is to be looked at: the photo with its mask
    laid over it and the names of `classes` on it. digest: of the checkpoint that `predict` is of.
    """
    paths = photo_files(args.images)
    if not paths:
        raise ValueError(f"--images {args.images}: no photos there (.jpg, .jpeg, .png)")

    def read(name):
        return read_image(paths[name])

    def check(name):
        read(name)  # for its error alone; the photos are not kept

    out = folder / "images" / args.images.resolve().name
    record = mask_provenance(args, iters)
    record["checkpoint"] = digest
    record["photos"] = str(args.images.resolve())
    refuse_own_input(out, args)
    with work_on(out, args, machine):
        if machine.main:
            for_each(check, list(paths), "checking photos")
            if read_args(out) != record:
                delete_folder(out)
                write_json(out / "args.json", record)
        machine.wait()
        write_masks(predict, list(paths), read, out, machine, crf,
                    probs_folder=out / "probs" if args.save_probs else None)
        for name in tqdm(machine.share(list(paths)), "pictures", disable=not machine.main):
            label = read_label(out / f"{name}.png", len(classes))
            picture = Image.fromarray(overlay(read(name), label, classes, 800))
            write_whole(out / f"{name}.jpg", lambda f: picture.save(f, "JPEG", quality=90))
        machine.wait()
        if machine.main:
            print(f"{out}: {len(paths)} masks (.png), and pictures to look at (.jpg)")


def mask_provenance(args, iters) -> dict:
    """Provenance of masks: what changes them, and what eval.py prints beside their score."""
    return {"iters": iters, "scales": list(args.scales), "flip": not args.no_flip,
            "crf": not args.no_crf, "label_filter": args.label_filter,
            "save_probs": args.save_probs}


def masks_are_current(folder: Path, provenance: dict, lists) -> bool:
    """Whether the folder is finished, its masks made as `provenance` says, and none missing or cut.

    lists: {split: ids} of the masks that are wanted.
    """
    files = []
    for split, ids in lists.items():
        probs_folder = folder / "probs" / split if provenance["save_probs"] else None
        files += mask_files(folder / "masks" / split, ids, probs_folder)
    return read_args(folder).get("provenance") == provenance and is_finished(folder, files)


def open_masks(folder: Path, provenance: dict, args, machine: Machine):
    """Before masks are written: drop what other options left, and note how they are made now.

    In this order a run may be cut off anywhere: first args.json's "finished" goes, then the old
    masks, each folder at one stroke, and only then does the record name the new options. So what
    lies in the folder was made as the record says, or is not there.
    """
    if machine.main:
        mark_unfinished(folder)
        if read_args(folder).get("provenance") != provenance:
            delete_folder(folder / "masks")
            delete_folder(folder / "probs")
            (folder / "preview.png").unlink(missing_ok=True)
            options = {name: getattr(args, name) for name in MASK_OPTIONS}
            set_provenance(folder, provenance, options)
    machine.wait()


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    if float(text) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def mask_options(parser, scales: list[float], size: str):
    """Add the options that change masks but not the model, for stages 2 and 3.

    size: what scale 1 is, for --help.
    """
    masks = parser.add_argument_group(
        "masks (a finished model rewrites them; nothing is trained again)")
    masks.add_argument(
        "--scales", type=positive, nargs="+", default=scales, metavar="SCALE",
        help=f"sizes at which a photo is looked at, as multiples of {size}; each takes its own "
             f"pass, large ones see small objects [{' '.join(map(str, scales))}]")
    masks.add_argument(
        "--no-flip", action="store_true",
        help="leave out the mirror images: half the passes")
    masks.add_argument(
        "--no-crf", action="store_true",
        help="leave out the dense CRF: quicker, but masks end where the network's grid does, not "
             "where colours change")
    masks.add_argument(
        "--label-filter", action="store_true",
        help="training list: only background and the classes that the image's labels name may win")
    masks.add_argument(
        "--save-probs", action="store_true",
        help="also write the probabilities before the CRF to probs/<split>/<id>.npz, float16; "
             "up to 2 bytes a pixel and class")
    masks.add_argument(
        "--images", type=Path, metavar="DIR",
        help="write masks of the photos in DIR to images/ and stop; needs a trained model but no "
             "dataset; the CRF takes about 2 KB of memory a pixel")


def mask_crf(args, table=MASK_CRF):
    """The dataset's constants of the CRF after inference; None with --no-crf.

    A dataset that is not in the table gets VOC's.
    """
    if args.no_crf:
        return None
    return table.get(dataset_name(args.data), table["VOC2012"])


# ================================================================================== checkpoints
# Ours hold the trained parts and the digest of the CLIP that they were trained around. Released
# ones hold their own CLIP and are told from ours by their keys; a table translates the names.

def new_network(args, data, switches: Switches, machine: Machine):
    """An untrained WeakCLIP, and its facts: what tells its checkpoint from another's."""
    clip_model, digest = load_clip(args.clip, args.seed, machine)
    torch.manual_seed(args.seed)
    tokens = name_tokens(data.classes, clip_model.context_length)
    model = WeakCLIP(clip_model, tokens, switches, args.crop)
    facts = {"stage": "2_weakclip", "classes": list(data.classes), "clip": digest,
             "crop": args.crop, "switches": dataclasses.asdict(switches)}
    return model, facts


def open_checkpoint(path: Path, args, machine: Machine, classes=None):
    """A trained network from our checkpoint.pt, or from a released one.

    classes: the dataset's, None to take the checkpoint's. Returns (network, crop, iterations or
    None, outputs: the channels that are the dataset's classes, None for all). The network bears
    the names of what it tells apart, `classes`, and the file's sha256, `digest`. Raises ValueError
    for a file of another kind, dataset or CLIP.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint; "
                         f"python stage2_weakclip.py --data {args.data} trains one")
    with unchanged(path) as digest:  # a training that is at work replaces its checkpoint
        saved = clip.read_foreign(path)
        if isinstance(saved, dict) and "state_dict" in saved:
            opened = open_released(path, saved, args, classes)
        else:
            opened = open_own(path, args, machine, classes)
    opened[0].digest = digest
    return opened


def open_own(path: Path, args, machine: Machine, classes=None):
    """The same from a checkpoint.pt of this stage; the strict reader builds plain values only."""
    saved = read_checkpoint(path)
    facts = saved["facts"]
    if facts.get("stage") != "2_weakclip":
        raise ValueError(f"{path}: neither a checkpoint of stage 2 nor a released one; "
                         "name another")
    if classes and list(classes) != facts["classes"]:
        raise ValueError(f"{path} knows {', '.join(facts['classes'])}; "
                         f"the dataset has {', '.join(classes)}")
    clip_model, digest = load_clip(args.clip, args.seed, machine)
    if digest != facts["clip"]:
        raise ValueError(f"{path} was trained with another CLIP than --clip {args.clip}; "
                         "name that one")
    switches = saved_switches(path, facts["switches"])
    if with_settings(switches, args.set) != switches:
        raise ValueError(f"--set {' '.join(args.set)}: {path} was trained otherwise; leave it out")
    tokens = name_tokens(facts["classes"], clip_model.context_length)
    model = WeakCLIP(clip_model, tokens, switches, facts["crop"])
    model.classes = facts["classes"]
    load_checkpoint(path, saved, model, ("clip.",) if switches.freeze_clip else ())
    return model, facts["crop"], saved["step"], None


def saved_switches(path: Path, values: dict) -> Switches:
    """The switches that a checkpoint of ours names; ValueError for others than there are."""
    names = [field.name for field in dataclasses.fields(Switches)]
    if sorted(values) != sorted(names):
        raise ValueError(f"{path}: its switches are not those of this version; "
                         "use the version that made it")
    try:
        return choose_switches("paper", [f"{name}={values[name]}" for name in names])
    except ValueError as error:
        reason = f"its switch {str(error).removeprefix('--set ')}"
        raise ValueError(f"{path}: not a readable checkpoint ({reason}); {DAMAGED}") from None


def open_released(path: Path, saved: dict, args, classes=None):
    """The same from a released checkpoint {"meta": ..., "state_dict": ...}.

    It holds its own CLIP, so `--clip` is not read. The switches are `--variant released` with
    `--set` on top. Of COCO's 91 released slots only 80 and background are classes (32).
    """
    state = released_state(path, saved)
    K = len(state["decode_head.conv_seg.weight"])
    if classes is None:
        classes = {len(VOC_CLASSES): VOC_CLASSES, len(COCO_SLOTS): COCO_CLASSES}.get(K, ())
    names, outputs = tuple(classes), None
    if K == len(COCO_SLOTS) and names == COCO_CLASSES:
        names = COCO_SLOTS
        outputs = [COCO_SLOTS.index(name) for name in COCO_CLASSES]
    if len(names) != K:
        raise ValueError(f"{path} has {K} classes, the dataset {len(names)}")

    switches = choose_switches("released", args.set)
    try:
        context_length = len(state["text_encoder.positional_embedding"])
        tokens = name_tokens(names, context_length, contexts=state["contexts"].shape[1])
        model = from_released(state, tokens, switches)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    model.classes = classes
    meta = saved.get("meta")
    step = meta.get("iter") if isinstance(meta, dict) else None
    return model, model.crop, step if type(step) is int and step > 0 else None, outputs


# The tensors that sizes of a released network are read from -> their numbers of dimensions.
RELEASED_SIZES = {
    "contexts": 3, "decode_head.conv_seg.weight": 4, "context_decoder.text_proj.1.weight": 2,
    "neck.fpn_convs.0.conv.weight": 4, "backbone.positional_embedding": 2,
    "text_encoder.positional_embedding": 2}


def released_state(path: Path, saved: dict) -> dict[str, Tensor]:
    """The tensors of a released checkpoint by name; ValueError where it can be none.

    Like `read_checkpoint` it sees to what can be seen without the network.
    """
    fault = None
    state = {}
    if isinstance(saved["state_dict"], dict):
        for name, value in saved["state_dict"].items():
            if isinstance(name, str) and isinstance(value, Tensor):
                state[name] = value
    for name, dimensions in RELEASED_SIZES.items():
        if name not in state:
            fault = f"it lacks {name}"
        elif state[name].dim() != dimensions:
            fault = f"{name} has {state[name].dim()} dimensions for {dimensions}"
    bad = not_finite(state)
    if bad:
        fault = f"{first_names(bad)} infinite or no number"
    if fault:
        raise ValueError(f"{path}: no released WeakCLIP checkpoint: {fault}")
    return state


# Our parameter names, as patterns -> those of a released checkpoint.
RELEASED_NAMES = {
    r"^clip\.visual\.": "backbone.",
    r"^clip\.": "text_encoder.",
    r"^adapter\.level": "backbone.fpn",
    r"^coattention\.visual_in\.": "context_decoder.memory_proj.",
    r"^coattention\.text_in\.": "context_decoder.text_proj.",
    r"^coattention\.text_layers\.": "context_decoder.decoder.",
    r"^coattention\.text_out\.": "context_decoder.out_proj.",
    r"^coattention\.visual_layers\.": "context_decoder.anti_decoder.",
    r"^coattention\.visual_out\.": "context_decoder.anti_out_proj.",
    r"^decoder\.lateral\.(\d)\.": r"neck.lateral_convs.\1.conv.",
    r"^decoder\.smooth\.(\d)\.": r"neck.fpn_convs.\1.conv.",
    r"^decoder\.climb\.": "decode_head.scale_heads.",
    r"^decoder\.classify\.": "decode_head.conv_seg."}


def released_name(name: str) -> str:
    """The released code's name of our parameter."""
    for ours, theirs in RELEASED_NAMES.items():
        if re.search(ours, name):
            return re.sub(ours, theirs, name)
    return name


def from_released(state: dict, token_ids: Tensor, switches=RELEASED, vision_heads=None,
                  transformer_heads=None, coattention_heads=None) -> WeakCLIP:
    """A WeakCLIP with the weights of a released state dict.

    token_ids (K, L): as for WeakCLIP. Sizes are read from the tensors; heads cannot be and are
    width // 64 unless given. Raises ValueError naming every key that does not fit.
    """
    sizes = {"contexts": state["contexts"].shape[1],
             "coattention_width": len(state["context_decoder.text_proj.1.weight"]),
             "fpn_channels": len(state["neck.fpn_convs.0.conv.weight"]),
             "head_channels": state["decode_head.conv_seg.weight"].shape[1]}
    # The table of positions is stored at the training grid: 1 + (crop / 16)^2 rows.
    rows = len(state["backbone.positional_embedding"])
    crop = 16 * math.isqrt(max(0, rows - 1))
    if not crop or rows != 1 + (crop // 16) ** 2:
        raise ValueError(f"backbone.positional_embedding: {rows} rows are no square grid's")
    clip_model = clip.CLIP.from_state_dict(
        released_clip(state), vision_heads=vision_heads, transformer_heads=transformer_heads)
    model = WeakCLIP(clip_model, token_ids, switches, crop, coattention_heads=coattention_heads,
                     **sizes)
    ours = {released_name(name): name for name in model.state_dict()}
    # A key without a name of ours keeps its own, so that load_trained complains of it by name.
    renamed = {ours.get(name, name): value for name, value in state.items()}
    load_trained(model, renamed, may_lack=("clip.logit_scale",))
    return model


def released_clip(state: dict) -> dict:
    """CLIP's own state dict, under OpenAI's names, out of a released one.

    "backbone." is the image encoder, but for the adapter, which the released code keeps there.
    """
    clip_state = {}
    for name, value in state.items():
        if name.startswith("backbone.") and not name.startswith("backbone.fpn"):
            clip_state["visual." + name.removeprefix("backbone.")] = value
        elif name.startswith("text_encoder."):
            clip_state[name.removeprefix("text_encoder.")] = value
    # Released checkpoints lack the logit scale, and WeakCLIP does not read it; CLIP wants one.
    clip_state["logit_scale"] = torch.tensor(math.log(1 / TAU))
    return clip_state


# ================================================================================= command line

# From (included) and to (left out) for the switches that are numbers.
RANGES = {"drop_path": (0, 1), "boundary_weight": (0, math.inf), "score_weight": (0, math.inf),
          "loss_crf_sxy": (0.1, math.inf)}


def choose_switches(variant: str, settings: list[str]) -> Switches:
    """The switches of a preset ("paper" or "released") with the settings "field=value" on top."""
    return with_settings({"paper": PAPER, "released": RELEASED}[variant], settings)


def with_settings(switches: Switches, settings: list[str]) -> Switches:
    """The switches with the settings "field=value" on top.

    Raises ValueError for an unknown field or a value that the field cannot have.
    """
    types = {field.name: field.type for field in dataclasses.fields(Switches)}
    for text in settings:
        name, _, value = text.partition("=")
        if name not in types:
            raise ValueError(f"--set {text}: the fields are {', '.join(types)}")
        if types[name] is bool:
            if value.lower() not in ("true", "false"):
                raise ValueError(f"--set {text}: {name} is true or false")
            value = value.lower() == "true"
        else:
            try:
                value = float(value)
            except ValueError:
                raise ValueError(f"--set {text}: {name} is a number") from None
            low, high = RANGES[name]
            if not low <= value < high:
                raise ValueError(f"--set {text}: {name} is from {low} to below {high}")
        switches = dataclasses.replace(switches, **{name: value})
    return switches


def parse_args(argv=None):
    """The command line's options; argv None for the real one."""
    description = __doc__.splitlines()[0]
    parser, method = common_options(description, iters="20,000; COCO2014: 40,000", lr=1e-4,
                                    batch_size="16; COCO2014: 24", crop=512)
    method.add_argument(
        "--clip", default="ViT-B/16", metavar="NAME|PATH|random",
        help="the frozen model: a name (downloaded), or a file, of patch 16; random, an untrained "
             "one, tries the program out [%(default)s]")
    method.add_argument(
        "--seeds", type=Path, metavar="DIR",
        help="folder of label PNGs <id>.png to learn from, of any method; better seeds give better "
             "masks [stage 1's]")
    method.add_argument(
        "--variant", choices=("paper", "released"), default="paper",
        help="the abstract, or the released code wherever a switch exists [%(default)s]")
    fields = ", ".join(field.name for field in dataclasses.fields(Switches))
    method.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE",
        help="change one switch of the variant, to see what it does; may be given several times; "
             f"class Switches, at the head of this script, explains them: {fields}")
    method.add_argument(
        "--checkpoint", type=Path, metavar="FILE",
        help="train nothing, make masks with this checkpoint, ours (as it was trained, whatever "
             "--variant is) or a released one")
    mask_options(parser, [0.5, 0.75, 1.0, 1.25, 1.5, 1.75], "a short side of --crop pixels")
    return parser.parse_args(argv)


def label_photos(args):
    """`--images`: needs a checkpoint (the run's, or --checkpoint) and CLIP, but no dataset."""
    machine = Machine(args.device, args.amp)
    folder = args.runs / dataset_name(args.data) / "2_weakclip"
    path = args.checkpoint or folder / "checkpoint.pt"
    model, crop, iters, outputs = open_checkpoint(path, args, machine)
    predict = predictor(model, args, crop, machine, outputs)
    mask_photos(predict, args, iters, model.digest, folder, machine, mask_crf(args), model.classes)


def preview(data, ids: list[str], args, folder: Path):
    """Write preview.png: photo | seeds | mask | true mask, of some training images."""
    rows = []
    masks = []
    for image_id in preview_ids(ids):
        row = [data.image(image_id)]
        for labels in (args.seeds, folder / "masks" / args.split):
            # With --checkpoint a run may have no seeds.
            path = label_path(labels, image_id)
            if path.is_file():
                row.append(read_label(path))
        masks.append(row[-1])
        rows.append(row + truth_pictures(data, image_id))
    write_preview(folder / "preview.png", rows)
    note_if_blank(folder, masks)


def prepare(args):
    """Fill in what the dataset decides, and check all input -> (data, machine, lists, learned).

    lists: {split: ids} of the masks to be made; learned: ids to learn from. Raises ValueError.
    """
    coco = dataset_name(args.data) == "COCO2014"
    if args.iters is None:
        args.iters = 40_000 if coco else 20_000
    if args.batch_size is None:
        args.batch_size = 24 if coco else 16
    data, machine = open_run(args)
    if args.seeds is None:
        args.seeds = args.runs / data.name / "1_cam" / "seeds"
    lists = {args.split: data.ids(args.split, args.limit)}
    if data.has("val"):
        lists["val"] = data.ids("val", args.limit)
    if args.label_filter:
        # Called for its error alone: a missing label ends the command now, not after training.
        data.image_labels(lists[args.split])
    learned = training_ids(data, args, choose_switches(args.variant, args.set))
    if machine.main:
        seeds = None if args.checkpoint else args.seeds
        check_inputs(data, sorted(set(learned)), seeds, data.known_labels(learned))
        for split in lists:
            if split != args.split:
                check_inputs(data, lists[split])
    return data, machine, lists, learned


def main():
    """Train, make masks, show some; continue where an earlier run of the command stopped."""
    args = parse_args()
    switches = choose_switches(args.variant, args.set)
    if args.images:
        return label_photos(args)
    data, machine, lists, learned = prepare(args)
    folder = args.runs / data.name / "2_weakclip"
    training_list = lists[args.split]

    if args.checkpoint:
        opened = open_checkpoint(args.checkpoint, args, machine, data.classes)
        model, args.crop, args.iters, outputs = opened
        inputs = {"checkpoint": model.digest}
    else:
        model, facts = new_network(args, data, switches, machine)
        outputs = None
        inputs = {"clip": facts["clip"], "seeds": folder_digest(args.seeds, training_list)}
    wanted = mask_provenance(args, args.iters)
    with work_on(folder, args, machine):
        # Refuses to go on with what other options, lists, seeds or another CLIP began.
        start_run(folder, args, machine, {**data.digests(*lists), **inputs}, MASK_OPTIONS)
        if masks_are_current(folder, wanted, lists):
            print(f"{folder}: finished; --overwrite starts afresh")
            return
        open_masks(folder, wanted, args, machine)
        if not args.checkpoint:
            # Returns at once where the checkpoint is of the last iteration already.
            train(model.to(machine.device), facts, data, learned, args, machine, folder)
            check_unchanged(args.seeds, inputs["seeds"], folder_digest(args.seeds, training_list))
        predict = predictor(model, args, args.crop, machine, outputs)
        write_all_masks(predict, data, lists, folder, args, machine, mask_crf(args))
        if machine.main:
            preview(data, training_list, args, folder)
            mark_finished(folder)
            next_one = next_command("stage3_segment.py", data, args, "runs", "split", "limit")
            print(f"{folder}: masks of {', '.join(lists)}. Next: {next_one}")


if __name__ == "__main__":
    run(main)
