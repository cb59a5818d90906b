"""KL-regularized autoencoder (Rombach et al. 2022): the continuous tokenizer, KL-16 by default."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.posterior import DiagonalGaussianDistribution
from models.pretrained import PretrainedVAE

#: The level of the encoder that has attention: resolution 16 for images of 256 pixels.
ATTENTION_LEVEL = 4

# --------------------------------------------------------------------------------------------------
# Building blocks (attribute names are those of the published weights)


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a group norm of 32 groups; fewer if the number of channels is no multiple of 32."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Residual block: two times norm, SiLU and a 3x3 convolution.

    Maps ``[B, in_channels, h, w]`` to ``[B, out_channels, h, w]``.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Self-attention with one head over the positions of a feature map."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (
            rearrange(proj(normed), "b c h w -> b 1 (h w) c") for proj in (self.q, self.k, self.v)
        )
        out = F.scaled_dot_product_attention(q, k, v)  # scale c^-1/2
        return x + self.proj_out(rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halves height and width. Zeros are padded right and bottom, as for the published weights."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbor, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, each optionally followed by attention."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(
            ResnetBlock(width_in, width_out) for width_in, width_out in pairwise(widths)
        )
        self.attn = nn.ModuleList(
            AttnBlock(out_channels) for _ in range(blocks if attention else 0)
        )

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    """Residual block, attention and residual block at the lowest resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Maps images ``[B, 3, H, W]`` to ``[B, 2 z_channels, H / s, W / s]``, s = 2^(levels - 1)."""

    def __init__(self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, z_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for i, mult in enumerate(ch_mult):
            level = Level(width, ch * mult, num_res_blocks, attention=i == ATTENTION_LEVEL)
            width = ch * mult
            if i < len(ch_mult) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(width)
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, 2 * z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Maps ``[B, z_channels, h, w]`` to images ``[B, 3, h s, w s]``, s = 2^(levels - 1).

    Each level has one block more than the encoder's.
    """

    def __init__(self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, z_channels: int):
        super().__init__()
        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = Middle(width)
        levels = []
        for i, mult in reversed(list(enumerate(ch_mult))):
            level = Level(width, ch * mult, num_res_blocks + 1, attention=False)
            width = ch * mult
            if i > 0:
                level.upsample = Upsample(width)
            levels.insert(0, level)
        # The highest resolution is number 0, and runs last.
        self.up = nn.ModuleList(levels)
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


# --------------------------------------------------------------------------------------------------
# The autoencoder


class AutoencoderKL(PretrainedVAE):
    """The KL autoencoder.

    With ``embed_dim=16, ch_mult=(1, 1, 2, 2, 4)`` and the defaults it is the published KL-16.

    Args:
        embed_dim: latent channels C.
        ch_mult: width of each resolution, in units of ``ch``; the stride is
            ``2 ** (len(ch_mult) - 1)``.
        use_variational: False for an encoder that predicts only latents; the std is then near 0.
        ckpt_path: a file of weights to load, or its address on the Hub.
        ch: base width.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
    """

    def __init__(
        self,
        embed_dim: int,
        ch_mult: Sequence[int],
        use_variational: bool = True,
        ckpt_path: str | None = None,
        *,
        ch: int = 128,
        num_res_blocks: int = 2,
    ):
        super().__init__()
        self.embed_dim = embed_dim
        self.use_variational = use_variational
        self.stride = 2 ** (len(ch_mult) - 1)
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, embed_dim)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, embed_dim)
        self.quant_conv = nn.Conv2d(2 * embed_dim, (2 if use_variational else 1) * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, embed_dim, 1)
        #: Constructor arguments as plain types, stored next to the weights.
        self.config = {
            "embed_dim": embed_dim,
            "ch_mult": list(ch_mult),
            "use_variational": use_variational,
            "ch": ch,
            "num_res_blocks": num_res_blocks,
        }
        if ckpt_path is not None:
            self.load_file(ckpt_path)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Return the posterior of the latents ``[B, C, H / stride, W / stride]``.

        Args:
            x: images ``[B, 3, H, W]`` in [-1, 1].
        """
        moments = self.quant_conv(self.encoder(x))
        if not self.use_variational:
            moments = torch.cat([moments, torch.full_like(moments, -30.0)], dim=1)
        return DiagonalGaussianDistribution(moments)

    def decode(self, z: Tensor) -> Tensor:
        """Return images ``[B, 3, h stride, w stride]``, about [-1, 1] and not clipped.

        Args:
            z: unscaled latents ``[B, C, h, w]``.
        """
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Return the reconstruction from a sample of the posterior, and the posterior."""
        posterior = self.encode(x)
        return self.decode(posterior.sample()), posterior
