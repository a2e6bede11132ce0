"""The two encoders of CLIP: a vision transformer for images, a causal transformer for texts, one
space for both.

B batch, L tokens of a sequence, C channels, H W pixels, h w patch grid. Sequences are (B, L, C)
throughout, where OpenAI's code has (L, B, C). Parameter names are those of OpenAI's state dicts, so
that official weights load strictly.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

# OpenAI's archives carry three scalars beside the weights; the same numbers stand in the weights'
# shapes
EXTRA_KEYS = ("input_resolution", "context_length", "vocab_size")


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), element by element.

    A fast approximation of GELU, x * Phi(x). CLIP was trained with it, and the two differ by up to
    0.02: the exact GELU, twelve blocks on end, would give other features than those that the text
    encoder was matched with.
    """

    def forward(self, x):
        gate = (1.702 * x).sigmoid_()
        # Without a graph nobody needs the gate again: the product takes its memory.
        return x * gate if torch.is_grad_enabled() else gate.mul_(x)


class Attention(nn.Module):
    """Multi-head self-attention, (B, L, C) -> (B, L, C).

    The projections of query, key and value are stacked in one matrix (3C, C), as in OpenAI's
    weights.
    """

    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} cannot be split among {heads} heads")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width ** -0.5)

    def split(self, x):
        """(B, L, C) -> query, key, value, each (B, heads, L, C / heads)."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)              # (B, L, 3C)
        qkv = qkv.unflatten(2, (3, self.heads, -1))                 # (B, L, 3, heads, C / heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x, mask=None):
        """mask (L, L) bool: whether the row's token attends to the column's; None: all to all."""
        q, k, v = self.split(x)
        # softmax(q k' / sqrt(C / heads)) v; the library's version never writes the (L, L) matrix
        # out
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, L, C / heads)
        return self.out_proj(x.transpose(1, 2).flatten(2))                     # (B, L, C)


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block, (B, L, C) -> (B, L, C): x += attention(ln_1 x), then x +=
    mlp(ln_2 x)."""

    def __init__(self, width, heads, layers):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        # by name, not by number: the weights are called mlp.c_fc.* and mlp.c_proj.*
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)
        # 2 * layers outputs are added up. Were each of the usual size, the sum would grow with the
        # depth; so each starts smaller by sqrt(2 * layers), and the sum keeps its size.
        for last in (self.attn.out_proj, self.mlp.c_proj):
            nn.init.normal_(last.weight, std=width ** -0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(self.mlp.c_fc.weight, std=(2 * width) ** -0.5)

    def forward(self, x, mask=None):
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """`layers` blocks one after another, (B, L, C) -> (B, L, C)."""

    def __init__(self, width, layers, heads):
        super().__init__()
        blocks = [ResidualAttentionBlock(width, heads, layers) for _ in range(layers)]
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


def causal_mask(L: int, device=None) -> torch.Tensor:
    """(L, L) bool for `Attention`: each token attends to itself and those before it."""
    return torch.ones(L, L, dtype=torch.bool, device=device).tril()


def resize_positions(table: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """Positional table (1 + h*w, C) of an h x w grid; the table itself where its grid is h x w
    already.

    table (1 + side*side, C): row 0 belongs to the class token, the others to a square grid, row by
    row. A position's vector is learned, but neighbours' vectors are alike, so that the grid can be
    treated as a picture with C channels and resized (bilinearly, align_corners False). The class
    token has no place in it: its row is kept.
    """
    side = math.isqrt(table.shape[0] - 1)
    if (h, w) == (side, side):
        return table
    grid = table[1:].T.unflatten(1, (side, side))[None]                        # (1, C, side, side)
    grid = F.interpolate(grid.float(), size=(h, w), mode="bilinear", align_corners=False)
    grid = grid[0].flatten(1).T                                                # (h*w, C)
    return torch.cat([table[:1], grid.to(table.dtype)])                        # (1 + h*w, C)


class VisionTransformer(nn.Module):
    """Image encoder: image (B, 3, H, W) -> feature (B, output_dim), not normalised."""

    def __init__(self, resolution, patch, width, layers, heads, output_dim):
        super().__init__()
        scale = width ** -0.5
        positions = (resolution // patch) ** 2 + 1
        # a convolution whose stride is its size is a linear map of each patch
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(positions, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim))

    def embed(self, image: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens (B, 1 + h*w, C) that enter the first block, the class token first.

        image (B, 3, H, W) normalised; pixels beyond a multiple of the patch size are dropped by the
        convolution.
        positions (1 + h*w, C): the positional table for this grid; by default CLIP's own, resized.
        """
        x = self.conv1(image)                                                  # (B, C, h, w)
        if positions is None:
            positions = resize_positions(self.positional_embedding, *x.shape[2:])
        x = x.flatten(2).transpose(1, 2)                                       # (B, h*w, C)
        # The class token holds no patch. It starts alike in every image and gathers what the blocks
        # find there.
        class_token = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)   # (B, 1, C)
        x = torch.cat([class_token, x], 1) + positions.to(x.dtype)             # (B, 1 + h*w, C)
        # Blocks add to x and never rescale it. Patches, class token and positions come in sizes of
        # their own; ln_pre (CLIP's addition to ViT) brings every token to one size before the first
        # sum.
        return self.ln_pre(x)

    def forward(self, image):
        x = self.transformer(self.embed(image))                                # (B, 1 + h*w, C)
        return self.ln_post(x[:, 0]) @ self.proj                               # (B, output_dim)


class CLIP(nn.Module):
    """CLIP with a vision transformer. Sizes are named as in OpenAI's constructor; the defaults are
    ViT-B/16's.

    Head counts cannot be read from a state dict, since all heads lie in one matrix. All of OpenAI's
    transformers have heads 64 wide: where a count is not given, it is width // 64. Initial weights
    follow the CLIP paper's code (text table std 0.02, positions 0.01, projections width**-0.5).
    """

    def __init__(
        self,
        embed_dim: int = 512,
        image_resolution: int = 224,
        vision_layers: int = 12,
        vision_width: int = 768,
        vision_patch_size: int = 16,
        context_length: int = 77,
        vocab_size: int = 49408,
        transformer_width: int = 512,
        transformer_heads: int | None = None,
        transformer_layers: int = 12,
        vision_heads: int | None = None,
    ):
        super().__init__()
        vision_heads = vision_heads or max(1, vision_width // 64)
        transformer_heads = transformer_heads or max(1, transformer_width // 64)
        scale = transformer_width ** -0.5
        self.context_length = context_length
        self.visual = VisionTransformer(
            resolution=image_resolution,
            patch=vision_patch_size,
            width=vision_width,
            layers=vision_layers,
            heads=vision_heads,
            output_dim=embed_dim,
        )
        self.transformer = Transformer(transformer_width, transformer_layers, transformer_heads)
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        positions = torch.randn(context_length, transformer_width)
        self.positional_embedding = nn.Parameter(0.01 * positions)
        self.ln_final = nn.LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(scale * torch.randn(transformer_width, embed_dim))
        # the logarithm of 1 / temperature: whatever training does to it, the temperature stays
        # positive
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor], **heads: int) -> "CLIP":
        """The model that a state dict (OpenAI's names) belongs to, loaded strictly, in float32 and
        in eval mode.

        heads: `vision_heads`, `transformer_heads` where they are not width // 64.
        Raises ValueError where a key is missing, unexpected or of another shape.
        """
        state = {k: v for k, v in state.items() if k not in EXTRA_KEYS}
        sizes = sizes_of(state)
        try:
            # Sizes come from a file that may claim any. On the "meta" device a model has shapes but
            # no memory; `assign` then makes the state's own tensors its parameters, after their
            # shapes were compared.
            with torch.device("meta"):
                model = cls(**sizes, **heads)
            copies = {k: as_float(v) for k, v in state.items()}
            model.load_state_dict(copies, assign=True)
        except (ArithmeticError, RuntimeError) as e:
            raise ValueError(f"CLIP weights do not fit: {' '.join(str(e).split())}") from None
        return model.eval()

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Features (B, embed_dim), not normalised, of images (B, 3, H, W) normalised with CLIP's
        mean and std."""
        return self.visual(image)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Features (B, embed_dim), not normalised, of tokens (B, L) int64 from `tokenize`.

        The mask is causal (CLIP kept it so that the encoder could start as a language model), so a
        token knows only what stands before it: the end token is the one that has seen the whole
        text, and the zeros that pad it are seen by none. So the feature is read there.
        """
        L = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:L]       # (B, L, C)
        x = self.ln_final(self.transformer(x, causal_mask(L, x.device)))       # (B, L, C)
        end = tokens.argmax(1)  # the end token's id is the largest of all
        rows = torch.arange(len(x), device=x.device)
        return x[rows, end] @ self.text_projection                             # (B, embed_dim)

    def forward(self, image, tokens):
        """logits_per_image (B_image, B_text) = exp(logit_scale) * cosine, and its transpose."""
        image = F.normalize(self.encode_image(image), dim=1)
        text = F.normalize(self.encode_text(tokens), dim=1)
        logits = self.logit_scale.exp() * image @ text.T
        return logits, logits.T


def as_float(tensor):
    """A copy in float32, in rows; the state dict that it comes from stays its owner's."""
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def sizes_of(state):
    """Arguments of CLIP() by name, from the shapes in a state dict. Raises ValueError where a
    tensor is missing."""
    def size(name, axis):
        if name not in state:
            raise ValueError(f"not the weights of a CLIP with a vision transformer: no {name!r}")
        if axis >= state[name].dim():
            raise ValueError(f"CLIP weights do not fit: {name!r} has too few dimensions")
        return state[name].shape[axis]

    patches = max(size("visual.positional_embedding", 0) - 1, 0)  # without the class token's row
    patch = size("visual.conv1.weight", 3)
    return {
        "embed_dim": size("text_projection", 1),
        "image_resolution": math.isqrt(patches) * patch,
        "vision_layers": count_blocks(state, "visual.transformer"),
        "vision_width": size("visual.conv1.weight", 0),
        "vision_patch_size": patch,
        "context_length": size("positional_embedding", 0),
        "vocab_size": size("token_embedding.weight", 0),
        "transformer_width": size("ln_final.weight", 0),
        "transformer_layers": count_blocks(state, "transformer"),
    }


def count_blocks(state, prefix):
    """Number of transformer blocks whose weights are in a state dict,
    `<prefix>.resblocks.<number>.<...>`."""
    start = f"{prefix}.resblocks."
    numbers = {name[len(start):].split(".")[0] for name in state if name.startswith(start)}
    return len(numbers)
