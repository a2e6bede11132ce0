"""The two encoders of CLIP: a vision transformer for images, a causal transformer for texts, one
space for both.

CLIP was trained on 400 million pairs of a picture and the text beside it on the web. An image
encoder f and a text encoder g map both to vectors of one length, and of a batch's B x B cosines
those of the true pairs are to be the largest in their row and in their column. So a class needs no
training pictures, only a name: the picture belongs to the text whose vector points its way.

    image (B, 3, 224, 224)                       text "a cat"
      | 16 x 16 patches, 14 x 14 of them           | tokenizer.py
      v                                            v
    196 vectors and a class token                49406 320 2368 49407 0 0 ...
      | + positions, ln_pre                        | table of vectors, + positions
      | 12 blocks, all tokens see all              | 12 blocks, each token sees none behind it
      v                                            v
    the class token, ln_post, projection         the end token, ln_final, projection
      v                                            v
    f (B, 512)  ------------ exp(logit_scale) * cosine(f, g) ------------  g (B, 512)

The sizes are those of ViT-B/16: 86,192,640 numbers in the image encoder, 63,428,097 beside it.

B batch, L tokens of a sequence, C channels, H W pixels, h w patch grid. Sequences are (B, L, C)
throughout, where OpenAI's code has (L, B, C). Parameter names are those of OpenAI's state dicts, so
that official weights load strictly.
"""
import math
from collections import Counter, OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import stochastic_depth

# OpenAI's archives carry three scalars beside the weights; the shapes of the weights say the same.
EXTRA_KEYS = ("input_resolution", "context_length", "vocab_size")


# ----------------------------------------------------------------------------- the transformer

class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), element by element: 0 far below zero, x far above it.

    A fast approximation of GELU, x * Phi(x), with Phi the normal distribution's. They differ by
    0.020 at most, at x = 2.27 and x = -2.27. CLIP was trained with this one: the exact GELU, twelve
    blocks on end, would give other features than those that the text encoder was matched with.
    AUDIT.md: (39).
    """

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention, (B, L, C) -> (B, L, C): every token gathers from the others.

    In each head, d = C / heads channels wide,

        a[i, j] = softmax over j of  q[i] . k[j] / sqrt(d) ,      out[i] = sum_j a[i, j] v[j]

    where q (what token i looks for), k (what token j offers) and v (what is passed on) are linear
    maps of the tokens. A sum of d products of numbers of size 1 is of size sqrt(d), 8 in CLIP's
    heads of d = 64: divided by that, the softmax begins neither flat nor as a hard choice.
    The three projections are stacked in one matrix (3C, C), as in OpenAI's weights. All heads lie
    in it, and their number cannot be read from it: those of OpenAI's transformers are all 64 wide.
    causal: each token attends to itself and those before it, not to all.
    AUDIT.md: (38).
    """

    def __init__(self, width, causal):
        super().__init__()
        self.heads = max(1, width // 64)
        self.causal = causal
        self.out_proj = nn.Linear(width, width)
        # A sum over `width` inputs of size 1 keeps size 1.
        scale = width ** -0.5
        self.in_proj_weight = nn.Parameter(scale * torch.randn(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))

    def split(self, x):
        """(B, L, C) -> query, key and value in one, (3, B, heads, L, C / heads)."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)              # (B, L, 3C)
        # Channels lie in the order q, k, v, and within each head by head.
        qkv = qkv.unflatten(2, (3, self.heads, -1))                 # (B, L, 3, heads, C / heads)
        return qkv.permute(2, 0, 3, 1, 4)

    def forward(self, x):
        q, k, v = self.split(x)
        # softmax(q k' / sqrt(d)) v. The library's version works in blocks and never writes the
        # (L, L) matrix out. Seeds from CLIP (stage 1) need that matrix, with q and k from `split`.
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        # Of (B, heads, L, C / heads) the heads stand side by side again, and out_proj mixes them.
        x = x.transpose(1, 2).flatten(2)                                       # (B, L, C)
        return self.out_proj(x)


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block, (B, L, C) -> (B, L, C).

        x = x + attention(ln_1(x))      tokens exchange what they know
        x = x + mlp(ln_2(x))            each token works on what it got, alone

    The norms stand inside the branches, so that x itself runs through all blocks as a plain sum.
    """

    def __init__(self, width, layers, causal):
        super().__init__()
        self.attn = Attention(width, causal)
        self.ln_1 = nn.LayerNorm(width)
        # by name, not by number: the weights are called mlp.c_fc.* and mlp.c_proj.*
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width),
            gelu=QuickGELU(),
            c_proj=nn.Linear(4 * width, width)))
        self.ln_2 = nn.LayerNorm(width)
        # 2 * layers outputs are added up. Were each of the usual size, the sum would grow with the
        # depth; so each starts smaller by sqrt(2 * layers), 4.9 for 12, and the sum keeps its size.
        std = (2 * layers * width) ** -0.5
        nn.init.normal_(self.attn.out_proj.weight, std=std)
        nn.init.normal_(self.mlp.c_proj.weight, std=std)
        nn.init.normal_(self.mlp.c_fc.weight, std=(2 * width) ** -0.5)

    def forward(self, x, rate=0.0):
        """rate: of stochastic depth, which CLIP is without and the released WeakCLIP has (5).

        In training each image keeps a branch with probability 1 - rate, times 1 / (1 - rate), so
        that on average it is what it was. At a rate of 0.1 nine of ten images get it 1.11 times.
        """
        x = x + stochastic_depth(self.attn(self.ln_1(x)), rate, "row", self.training)
        return x + stochastic_depth(self.mlp(self.ln_2(x)), rate, "row", self.training)


def transformer(width, layers, causal=False):
    """`layers` blocks one after another, (B, L, C) -> (B, L, C); they are its `resblocks`."""
    blocks = [ResidualAttentionBlock(width, layers, causal) for _ in range(layers)]
    resblocks = nn.Sequential(*blocks)
    # The name is OpenAI's: weights are called transformer.resblocks.11.ln_1.bias.
    return nn.Sequential(OrderedDict(resblocks=resblocks))


# --------------------------------------------------------------------------- the image encoder

def resize_positions(table, h, w):
    """Positional table (1 + h*w, C) of an h x w grid.

    table (1 + side*side, C): row 0 belongs to the class token, the others to a square grid, row by
    row. A position's vector is learned, but neighbours' vectors are alike, so that the grid can be
    treated as a picture with C channels and resized (bilinearly, align_corners False). The class
    token has no place in it: its row is kept. One channel of a 2 x 2 grid, made 2 x 4:

        0   4      0   1   3   4
        8  12      8   9  11  12
    AUDIT.md: (41).
    """
    side = math.isqrt(len(table) - 1)
    grid = table[1:].T                                                         # (C, side*side)
    grid = grid.unflatten(1, (side, side))[None]                               # (1, C, side, side)
    grid = F.interpolate(grid, (h, w), mode="bilinear")                        # (1, C, h, w)
    grid = grid[0].flatten(1).T                                                # (h*w, C)
    return torch.cat([table[:1], grid])                                        # (1 + h*w, C)


class VisionTransformer(nn.Module):
    """Image encoder: image (B, 3, H, W) -> feature (B, output_dim), not normalised.

    An image becomes a sequence: each patch of 16 x 16 pixels, 768 numbers in three colours, is one
    token. 224 x 224 pixels make 14 x 14 patches and, with the class token, L = 197.
    AUDIT.md: (36).
    """

    def __init__(self, resolution, patch, width, layers, output_dim):
        super().__init__()
        # `width` numbers of this size make a vector of length 1.
        scale = width ** -0.5
        side = resolution // patch
        positions = 1 + side * side
        # A convolution whose stride is its size is one linear map, the same for each patch.
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(positions, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = transformer(width, layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim))

    def embed(self, image, positions=None):
        """Tokens (B, 1 + h*w, C) that enter the first block, the class token first.

            x = ln_pre([class; conv1(patch 1); ...; conv1(patch h*w)] + positions)

        image (B, 3, H, W), normalised with CLIP's mean and std; pixels beyond a multiple of the
        patch size are dropped by the convolution, so h = H // patch and w = W // patch.
        positions (1 + h*w, C): the positional table for this grid; by default CLIP's own, resized.
        """
        x = self.conv1(image)                                                  # (B, C, h, w)
        if positions is None:
            h, w = x.shape[2:]
            positions = resize_positions(self.positional_embedding, h, w)
        x = x.flatten(2).transpose(1, 2)                                       # (B, h*w, C)
        # The class token holds no patch. It starts alike in every image and gathers what the blocks
        # find there.
        class_token = self.class_embedding.to(x.dtype)                         # (C,)
        class_token = class_token.expand(len(x), 1, -1)                        # (B, 1, C)
        x = torch.cat([class_token, x], 1)                                     # (B, 1 + h*w, C)
        # Attention does not see order: shuffled tokens would give shuffled outputs. Where a patch
        # lies is known only by the vector added here.
        x = x + positions.to(x.dtype)
        # Blocks add to x and never rescale it. Patches, class token and positions come in sizes of
        # their own; ln_pre (CLIP's addition to ViT) brings every token to one size before the first
        # sum.
        return self.ln_pre(x)

    def forward(self, image):
        x = self.embed(image)                                                  # (B, 1 + h*w, C)
        x = self.transformer(x)                                                # (B, 1 + h*w, C)
        # Only the class token was trained to lie near texts. Stages 1 (--method clip) and 2 send
        # the patches' tokens through these two maps as well.
        x = self.ln_post(x[:, 0])                                              # (B, C)
        return x @ self.proj                                                   # (B, output_dim)


# -------------------------------------------------------------------------------- both together

class CLIP(nn.Module):
    """CLIP with a vision transformer. Sizes are named as in OpenAI's constructor; the defaults are
    ViT-B/16's.

    Initial weights follow the CLIP paper's code (text table std 0.02, positions 0.01, projections
    width**-0.5).
    """

    def __init__(self, embed_dim=512,
                 image_resolution=224, vision_layers=12, vision_width=768, vision_patch_size=16,
                 context_length=77, vocab_size=49408,
                 transformer_width=512, transformer_layers=12):
        super().__init__()
        self.visual = VisionTransformer(image_resolution, vision_patch_size, vision_width,
                                        vision_layers, embed_dim)
        self.transformer = transformer(transformer_width, transformer_layers, causal=True)
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        positions = 0.01 * torch.randn(context_length, transformer_width)
        self.positional_embedding = nn.Parameter(positions)
        self.ln_final = nn.LayerNorm(transformer_width)
        scale = transformer_width ** -0.5
        projection = scale * torch.randn(transformer_width, embed_dim)
        self.text_projection = nn.Parameter(projection)
        # The logarithm of 1 / temperature: whatever training does to it, the temperature stays
        # positive. It began at log(1 / 0.07) = 2.66 and ended at its limit, log(100) = 4.61.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    @classmethod
    def from_state_dict(cls, state, source="its CLIP"):
        """The model that a state dict (OpenAI's names) belongs to, loaded strictly, in float32 and
        in eval mode. The numbers are copied.

        Raises ValueError (one line that begins with `source`) where a key is missing, unexpected or
        of another shape.
        AUDIT.md: (15).
        """
        try:
            # OpenAI's archives hold half precision, which CPUs are slow in and training is unstable
            # in.
            floats = {}
            for name, value in state.items():
                if name not in EXTRA_KEYS:
                    floats[name] = value.clone().float()
            # On the "meta" device a model has shapes but no memory, so that 150 million numbers
            # need not be drawn first; `assign` then makes the copies its parameters.
            with torch.device("meta"):
                model = cls(**sizes_of(floats))
            model.load_state_dict(floats, assign=True)
        except (AttributeError, LookupError, RuntimeError, TypeError) as e:
            reason = " ".join(str(e).split())
            raise ValueError(f"{source}: not a CLIP (HuggingFace's form of it has other names); "
                             "wanted is OpenAI's ViT-B-16.pt or its state dict; missing or wrong: "
                             f"{reason}") from None
        return model.eval()

    def encode_image(self, image):
        """Features (B, embed_dim), not normalised, of images (B, 3, H, W) normalised with CLIP's
        mean and std."""
        return self.visual(image)

    def encode_text(self, tokens):
        """Features (B, embed_dim), not normalised, of tokens (B, L) int64 from `tokenize`.

            g = ln_final(transformer(embedding[tokens] + positions))[end] @ text_projection

        The mask is causal (CLIP kept it so that the encoder could start as a language model), so a
        token knows only itself and what stands before it. The end token has seen the whole text,
        and none of the zeros that pad it. So the feature is read there.
        AUDIT.md: (37).
        """
        # The end token's id, 49407, is the largest of all; of several the first is taken.
        end = tokens.argmax(1)                                                 # (B,)
        return self.encode_vectors(self.token_embedding(tokens), end)          # (B, embed_dim)

    def encode_vectors(self, x, end):
        """The same of texts that are vectors already, x (B, L, C); end (B,): where each text ends.

        So stage 2 puts vectors of its own among those of a class's name.
        """
        x = x + self.positional_embedding[:x.shape[1]]                         # (B, L, C)
        x = self.transformer(x)                                                # (B, L, C)
        x = self.ln_final(x)                                                   # (B, L, C)
        # x[0, end[0]], x[1, end[1]], ...
        rows = torch.arange(len(x), device=x.device)                           # (B,)
        x = x[rows, end]                                                       # (B, C)
        return x @ self.text_projection                                        # (B, embed_dim)

    def forward(self, image, tokens):
        """logits_per_image (B_image, B_text) = exp(logit_scale) * cosine.

        A softmax over a row says which text belongs to the image. With the scale 100, a cosine
        larger by 0.01 makes a text e times as likely: CLIP's cosines lie close together.
        AUDIT.md: (40).
        """
        image = F.normalize(self.encode_image(image))       # every row is of unit length
        text = F.normalize(self.encode_text(tokens))
        return self.logit_scale.exp() * image @ text.T                         # (B_image, B_text)


def sizes_of(state):
    """Arguments of CLIP() by name, from the shapes in a state dict. Raises KeyError where one of
    the tensors is missing.

    ViT-B/16: 197 positions are 1 + 14 * 14, and 14 patches of 16 make 224 pixels.
    """
    width, _, _, patch = state["visual.conv1.weight"].shape
    # One norm ln_1 stands in each block, and its weights have names like
    # visual.transformer.resblocks.11.ln_1.bias and transformer.resblocks.11.ln_1.bias.
    norms = [name for name in state if name.endswith(".ln_1.bias")]
    layers = Counter(name.split(".")[0] for name in norms)  # of "visual" and of "transformer"
    positions = len(state["visual.positional_embedding"])
    side = math.isqrt(positions - 1)
    return {
        "embed_dim": state["text_projection"].shape[1],
        "image_resolution": side * patch,
        "vision_layers": layers["visual"],
        "vision_width": width,
        "vision_patch_size": patch,
        "context_length": len(state["positional_embedding"]),
        "vocab_size": len(state["token_embedding.weight"]),
        "transformer_width": len(state["ln_final.weight"]),
        "transformer_layers": layers["transformer"],
    }
