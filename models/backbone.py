"""The masked autoregressive backbone (section 3.3; MAR's encoder and decoder): known tokens in, features z out."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import attend
from models.dropout import with_fast_dropout


def gather_tokens(x: Tensor, positions: Tensor) -> Tensor:
    """Rows of ``x [B, L, D]`` at ``positions [B, N]``: ``[B, N, D]``."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def block_at(block: Block, x: Tensor, rows: Tensor) -> Tensor:
    """A timm block's output at ``rows [B, N]`` of ``x [B, S, D]`` alone, ``[B, N, D]``; without dropout."""
    attention, width = block.attn, x.shape[-1]
    normed = block.norm1(x)
    weight, bias = attention.qkv.weight, attention.qkv.bias
    q = F.linear(gather_tokens(normed, rows), weight[:width], bias[:width])
    k, v = F.linear(normed, weight[width:], bias[width:]).chunk(2, dim=-1)
    q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=attention.num_heads) for part in (q, k, v))
    x = gather_tokens(x, rows) + attention.proj(rearrange(attend(q, k, v), "b h n d -> b n (h d)"))
    return x + block.mlp(block.norm2(x))


class MaskedBackbone(nn.Module):
    """An encoder over the known tokens and a decoder over all positions, both timm ViT blocks.

    Args:
        token_dim: channels of a token C.
        seq_len: tokens L of an image.
        buffer_size: positions in front of the tokens that all hold the class embedding.
        (others): as in :class:`models.tokenbridge.TokenBridge`.
    """

    def __init__(
        self,
        token_dim: int,
        seq_len: int,
        class_num: int,
        buffer_size: int,
        encoder_embed_dim: int,
        encoder_depth: int,
        encoder_num_heads: int,
        decoder_embed_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        mlp_ratio: float,
        norm_layer: Callable[[int], nn.Module],
        label_drop_prob: float,
        attn_dropout: float,
        proj_dropout: float,
        checkpointed: Sequence[str],
    ):
        super().__init__()
        self.seq_len, self.buffer_size = seq_len, buffer_size
        self.label_drop_prob, self.checkpointed = label_drop_prob, checkpointed

        def blocks(dim: int, depth: int, heads: int) -> nn.ModuleList:
            options = {"qkv_bias": True, "norm_layer": norm_layer, "proj_drop": proj_dropout, "attn_drop": attn_dropout}
            return nn.ModuleList(with_fast_dropout(Block(dim, heads, mlp_ratio, **options)) for _ in range(depth))

        # Registered in the order of the published optimizer states: free parameters first, then layers.
        self.fake_latent = nn.Parameter(torch.zeros(1, encoder_embed_dim))
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, buffer_size + seq_len, encoder_embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, buffer_size + seq_len, decoder_embed_dim))
        self.output_pos_embed = nn.Parameter(torch.zeros(1, seq_len, decoder_embed_dim))
        self.class_emb = nn.Embedding(class_num, encoder_embed_dim)
        self.z_proj = nn.Linear(token_dim, encoder_embed_dim)
        self.z_proj_ln = norm_layer(encoder_embed_dim)
        self.encoder_blocks = blocks(encoder_embed_dim, encoder_depth, encoder_num_heads)
        self.encoder_norm = norm_layer(encoder_embed_dim)
        self.decoder_embed = nn.Linear(encoder_embed_dim, decoder_embed_dim)
        self.decoder_blocks = blocks(decoder_embed_dim, decoder_depth, decoder_num_heads)
        self.decoder_norm = norm_layer(decoder_embed_dim)

    def _run(self, part: str, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            # On the CPU timm's plain products beat PyTorch's fused kernel, whose bf16 backward is 2 to 8 times slower.
            block.attn.fused_attn = x.is_cuda
            if part in self.checkpointed and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def encode(self, tokens: Tensor, known: Tensor, class_embedding: Tensor) -> Tensor:
        """Tokens ``[B, L, C]`` at ``known [B, N]`` positions and class embeddings ``[B, D]`` to ``[B, buffer + N, D]``.

        In training each sample's class embedding gives way to ``fake_latent`` with probability ``label_drop_prob``.
        """
        if self.training:
            drop = torch.rand(len(tokens), 1, device=tokens.device) < self.label_drop_prob
            class_embedding = torch.where(drop, self.fake_latent, class_embedding)
        buffer_pos, token_pos = self.encoder_pos_embed_learned.split([self.buffer_size, self.seq_len], dim=1)
        # Only known tokens are embedded; each still gets the position of its own place.
        x = self.z_proj(gather_tokens(tokens, known)) + gather_tokens(token_pos.expand(len(tokens), -1, -1), known)
        x = torch.cat([class_embedding[:, None] + buffer_pos, x], dim=1)  # [B, buffer + N, D]
        return self.encoder_norm(self._run("encoder", self.encoder_blocks, self.z_proj_ln(x)))

    def decode(self, encoded: Tensor, known: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Encoded buffer and known tokens ``[B, buffer + N, D]`` to features z ``[B, L, D]`` of every position.

        Without dropout, features of the ``wanted [B, W]`` positions alone, ``[B, W, D]``, cost less: the last block
        attends from these.
        """
        buffer, x = self.decoder_embed(encoded).tensor_split([self.buffer_size], dim=1)
        tokens = self.mask_token.to(x.dtype).expand(len(x), self.seq_len, -1)
        tokens = tokens.scatter(1, known[..., None].expand(-1, -1, x.shape[-1]), x)  # [B, L, D]
        x = torch.cat([buffer, tokens], dim=1) + self.decoder_pos_embed_learned
        if wanted is None or self.training or not len(self.decoder_blocks):
            x = self._run("decoder", self.decoder_blocks, x)
            x = self.decoder_norm(x)[:, self.buffer_size :] + self.output_pos_embed
            return x if wanted is None else gather_tokens(x, wanted)
        x = self._run("decoder", self.decoder_blocks[:-1], x)
        x = block_at(self.decoder_blocks[-1], x, self.buffer_size + wanted)
        return self.decoder_norm(x) + gather_tokens(self.output_pos_embed.expand(len(x), -1, -1), wanted)

    def forward(self, tokens: Tensor, known: Tensor, class_embedding: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Features from the known tokens, of all or the ``wanted`` positions: :meth:`encode`, then :meth:`decode`."""
        return self.decode(self.encode(tokens, known, class_embedding), known, wanted)
