"""The masked autoregressive backbone (section 3.3; MAR's encoder and decoder): known tokens in, features z out."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.layers import Block, gather_tokens


class MaskedBackbone(nn.Module):
    """An encoder over the known tokens and a decoder over all positions, both of pre-norm transformer blocks.

    Args:
        config: arguments of :class:`models.tokenbridge.TokenBridge`.
        token_dim: channels C of a token.
        seq_len: tokens L of an image.
        norm_layer: makes a norm from a width.
    """

    def __init__(self, config: Mapping[str, Any], token_dim: int, seq_len: int, norm_layer: Any):
        super().__init__()
        self.seq_len, self.buffer_size = seq_len, config["buffer_size"]
        self.label_drop_prob = config["label_drop_prob"]
        #: Parts whose blocks are recomputed in the backward pass: "encoder", "decoder".
        self.checkpointed: tuple[str, ...] = ()
        encoder_dim, decoder_dim = config["encoder_embed_dim"], config["decoder_embed_dim"]
        positions = self.buffer_size + seq_len

        def blocks(part: str) -> nn.ModuleList:
            sizes = config[f"{part}_embed_dim"], config[f"{part}_num_heads"], config["mlp_ratio"]
            options = norm_layer, config["attn_dropout"], config["proj_dropout"]
            return nn.ModuleList(Block(*sizes, *options) for _ in range(config[f"{part}_depth"]))

        # The order of registration is that of the published optimizer states, see models/published.py.
        self.fake_latent = nn.Parameter(torch.zeros(1, encoder_dim))
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, positions, encoder_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, positions, decoder_dim))
        self.output_pos_embed = nn.Parameter(torch.zeros(1, seq_len, decoder_dim))
        self.class_emb = nn.Embedding(config["class_num"], encoder_dim)
        self.z_proj = nn.Linear(token_dim, encoder_dim)
        self.z_proj_ln = norm_layer(encoder_dim)
        self.encoder_blocks = blocks("encoder")
        self.encoder_norm = norm_layer(encoder_dim)
        self.decoder_embed = nn.Linear(encoder_dim, decoder_dim)
        self.decoder_blocks = blocks("decoder")
        self.decoder_norm = norm_layer(decoder_dim)

    def run(self, part: str, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        """``x [B, N, D]`` through ``blocks`` of the ``"encoder"`` or the ``"decoder"``."""
        for block in blocks:
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
        buffer_pos, token_pos = self.encoder_pos_embed_learned.split(
            [self.buffer_size, self.seq_len], dim=1
        )
        # Only known tokens are embedded; each still gets the position of its own place.
        x = self.z_proj(gather_tokens(tokens, known)) + gather_tokens(
            token_pos.expand(len(tokens), -1, -1), known
        )
        x = torch.cat([class_embedding[:, None] + buffer_pos, x], dim=1)  # [B, buffer + N, D]
        return self.encoder_norm(self.run("encoder", self.encoder_blocks, self.z_proj_ln(x)))

    def decoder_input(self, encoded: Tensor, known: Tensor) -> Tensor:
        """Encoded buffer and known tokens ``[B, buffer + N, D]`` among mask tokens: ``[B, buffer + L, D]``."""
        buffer, x = self.decoder_embed(encoded).tensor_split([self.buffer_size], dim=1)
        tokens = self.mask_token.to(x.dtype).expand(len(x), self.seq_len, -1)
        tokens = tokens.scatter(1, known[..., None].expand(-1, -1, x.shape[-1]), x)  # [B, L, D]
        return torch.cat([buffer, tokens], dim=1) + self.decoder_pos_embed_learned

    def decode(self, encoded: Tensor, known: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Encoded buffer and known tokens ``[B, buffer + N, D]`` to features z ``[B, L, D]`` of all positions.

        With ``wanted [B, W]`` to those of these positions alone, ``[B, W, D]``: in sampling the last block then
        attends from no others.
        """
        x, blocks = self.decoder_input(encoded, known), self.decoder_blocks
        if wanted is not None and len(blocks) and not self.training:
            x = blocks[-1].at(self.run("decoder", blocks[:-1], x), self.buffer_size + wanted)
            return self.decoder_norm(x) + gather_tokens(
                self.output_pos_embed.expand(len(x), -1, -1), wanted
            )
        z = (
            self.decoder_norm(self.run("decoder", blocks, x))[:, self.buffer_size :]
            + self.output_pos_embed
        )
        return z if wanted is None else gather_tokens(z, wanted)

    def forward(
        self, tokens: Tensor, known: Tensor, class_embedding: Tensor, wanted: Tensor | None = None
    ) -> Tensor:
        """:meth:`encode` from the known tokens, then :meth:`decode` to features of all or the ``wanted`` positions."""
        return self.decode(self.encode(tokens, known, class_embedding), known, wanted)
