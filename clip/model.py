"""The two encoders of CLIP. Parameter names are those of OpenAI's state dicts, so official weights load strictly.

B batch, L tokens of a sequence, C channels, H W pixels, h w patch grid. Sequences are (B, L, C) throughout.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

# what OpenAI's archives carry beside the weights: three scalars that are no parameters
EXTRA_KEYS = ("input_resolution", "context_length", "vocab_size")


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): the approximation of GELU that CLIP was trained with (the exact GELU gives other features)."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention; query, key and value projections are stacked in one matrix (3C, C)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width ** -0.5)

    def split(self, x):
        """(B, L, C) -> query, key, value, each (B, heads, L, C / heads)."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)                       # (B, L, 3C)
        return qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x, causal=False):
        q, k, v = self.split(x)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)                   # (B, heads, L, C / heads)
        return self.out_proj(x.transpose(1, 2).flatten(2))                              # (B, L, C)


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block: x += attention(ln_1 x); x += mlp(ln_2 x)."""

    def __init__(self, width, heads, layers):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)
        for last in (self.attn.out_proj, self.mlp.c_proj):  # the residual sum keeps its size at any depth
            nn.init.normal_(last.weight, std=width ** -0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(self.mlp.c_fc.weight, std=(2 * width) ** -0.5)

    def forward(self, x, causal=False):
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads):
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads, layers) for _ in range(layers))

    def forward(self, x, causal=False):
        for block in self.resblocks:
            x = block(x, causal)
        return x


def resize_positions(table, h, w):
    """Positional table of a square grid -> table of an h x w grid.

    table (1 + side*side, C), row 0 the class token's, kept; the grid is resized bilinearly (align_corners False).
    Returns (1 + h*w, C); the table itself where the grid is already h x w.
    """
    side = math.isqrt(table.shape[0] - 1)
    if (h, w) == (side, side):
        return table
    grid = table[1:].T.unflatten(1, (side, side))[None]                                 # (1, C, side, side)
    grid = F.interpolate(grid.float(), size=(h, w), mode="bilinear", align_corners=False)
    return torch.cat([table[:1], grid[0].flatten(1).T.to(table.dtype)])                 # (1 + h*w, C)


class VisionTransformer(nn.Module):
    def __init__(self, resolution, patch, width, layers, heads, output_dim):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn((resolution // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width ** -0.5 * torch.randn(width, output_dim))

    def embed(self, image, positions=None):
        """Tokens that enter the first block.

        image (B, 3, H, W) normalised; pixels beyond a multiple of the patch size are dropped by the convolution.
        positions (1 + h*w, C): the positional table for this grid; by default CLIP's own, resized.
        Returns (B, 1 + h*w, C), the class token first.
        """
        x = self.conv1(image)                                                           # (B, C, h, w)
        if positions is None:
            positions = resize_positions(self.positional_embedding, *x.shape[2:])
        x = x.flatten(2).transpose(1, 2)                                                # (B, h*w, C)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1)   # (B, 1 + h*w, C)
        return self.ln_pre(x + positions.to(x.dtype))

    def forward(self, image):
        x = self.transformer(self.embed(image))
        return self.ln_post(x[:, 0]) @ self.proj                                        # (B, output_dim)


class CLIP(nn.Module):
    """CLIP with a vision transformer. Sizes are named as in OpenAI's constructor.

    Head counts are not in a state dict: where not given they are width // 64, as in all of OpenAI's models.
    Initial weights follow the CLIP paper's code (text table std 0.02, positions 0.01, projections width**-0.5).
    """

    def __init__(self, embed_dim=512, image_resolution=224, vision_layers=12, vision_width=768, vision_patch_size=16,
                 context_length=77, vocab_size=49408, transformer_width=512, transformer_heads=None,
                 transformer_layers=12, vision_heads=None):
        super().__init__()
        self.context_length = context_length
        self.visual = VisionTransformer(image_resolution, vision_patch_size, vision_width, vision_layers,
                                        vision_heads or max(1, vision_width // 64), embed_dim)
        self.transformer = Transformer(transformer_width, transformer_layers,
                                       transformer_heads or max(1, transformer_width // 64))
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, transformer_width))
        self.ln_final = nn.LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(transformer_width ** -0.5 * torch.randn(transformer_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    @classmethod
    def from_state_dict(cls, state, **heads):
        """Build the model that a state dict (OpenAI's names) belongs to and load it strictly, in float32.

        heads: `vision_heads`, `transformer_heads` where they are not width // 64.
        Raises ValueError where a key is missing, unexpected or of another shape.
        """
        state = {k: v.float() for k, v in state.items() if k not in EXTRA_KEYS}
        try:
            patches = state["visual.positional_embedding"].shape[0] - 1
            width, patch = state["visual.conv1.weight"].shape[0], state["visual.conv1.weight"].shape[-1]
            sizes = dict(
                embed_dim=state["text_projection"].shape[1], image_resolution=math.isqrt(patches) * patch,
                vision_layers=count_blocks(state, "visual.transformer"), vision_width=width, vision_patch_size=patch,
                context_length=state["positional_embedding"].shape[0],
                vocab_size=state["token_embedding.weight"].shape[0],
                transformer_width=state["ln_final.weight"].shape[0],
                transformer_layers=count_blocks(state, "transformer"))
        except KeyError as e:
            raise ValueError(f"not the weights of a CLIP with a vision transformer: no {e.args[0]!r}") from None
        model = cls(**sizes, **heads)
        try:
            model.load_state_dict(state)
        except RuntimeError as e:
            raise ValueError(f"CLIP weights do not fit: {' '.join(str(e).split())}") from None
        return model.eval()

    def encode_image(self, image):
        """image (B, 3, H, W), normalised with CLIP's mean and std -> features (B, embed_dim), not normalised."""
        return self.visual(image)

    def text_features(self, x, end):
        """Token embeddings (B, L, C) without positions and each text's end position (B,) -> (B, embed_dim)."""
        x = x + self.positional_embedding[:x.shape[1]].to(x.dtype)
        x = self.ln_final(self.transformer(x, causal=True))                             # (B, L, C)
        return x[torch.arange(len(x), device=x.device), end] @ self.text_projection

    def encode_text(self, tokens):
        """tokens (B, L) int64 from `tokenize` -> features (B, embed_dim), not normalised, read at the end token."""
        return self.text_features(self.token_embedding(tokens), tokens.argmax(1))       # the end token has the top id

    def forward(self, image, tokens):
        """Returns logits_per_image (B_image, B_text) = exp(logit_scale) * cosine, and its transpose."""
        image = F.normalize(self.encode_image(image), dim=1)
        text = F.normalize(self.encode_text(tokens), dim=1)
        logits = self.logit_scale.exp() * image @ text.T
        return logits, logits.T


def count_blocks(state, prefix):
    return len({k[len(prefix):].split(".")[2] for k in state if k.startswith(prefix + ".resblocks.")})
