"""The masked autoregressive backbone (section 3.3): MAR's encoder and decoder."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.layers import Block, gather_tokens
from util.model_config import ModelConfig


class MaskedBackbone(nn.Module):
    """Map known tokens to features z: an encoder over known tokens, a decoder over all positions.

    Args:
        config: arguments of :class:`models.tokenbridge.TokenBridge`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.seq_len, self.buffer_size = config.seq_len, config.buffer_size
        self.label_drop_prob = config.label_drop_prob
        #: Parts whose blocks are recomputed in the backward pass: "encoder", "decoder".
        self.checkpointed = config.recomputed
        encoder_dim, decoder_dim = config.encoder_embed_dim, config.decoder_embed_dim
        positions = self.buffer_size + self.seq_len

        # The order of registration is that of the published optimizer states, see
        # models/published.py.
        self.fake_latent = nn.Parameter(torch.zeros(1, encoder_dim))
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, positions, encoder_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, positions, decoder_dim))
        self.output_pos_embed = nn.Parameter(torch.zeros(1, self.seq_len, decoder_dim))
        self.class_emb = nn.Embedding(config.class_num, encoder_dim)
        self.z_proj = nn.Linear(config.token_dim, encoder_dim)
        self.z_proj_ln = config.norm_layer(encoder_dim)
        self.encoder_blocks = nn.ModuleList(
            Block(encoder_dim, config.encoder_num_heads, config)
            for _ in range(config.encoder_depth)
        )
        self.encoder_norm = config.norm_layer(encoder_dim)
        self.decoder_embed = nn.Linear(encoder_dim, decoder_dim)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, config.decoder_num_heads, config)
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = config.norm_layer(decoder_dim)

    def run(self, part: str, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        """Apply ``blocks`` of the ``"encoder"`` or the ``"decoder"`` to ``x [B, N, D]``."""
        for block in blocks:
            if part in self.checkpointed and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def encode(self, tokens: Tensor, known: Tensor, class_embedding: Tensor) -> Tensor:
        """Encode the known tokens and the class: ``[B, buffer + N, D]``.

        In training, each sample's class embedding is replaced by ``fake_latent`` with probability
        ``label_drop_prob``.

        Args:
            tokens: ``[B, L, C]``; only those at known positions are read.
            known: positions ``[B, N]``.
            class_embedding: ``[B, D]``.
        """
        if self.training:
            drop = torch.rand(len(tokens), 1, device=tokens.device) < self.label_drop_prob
            class_embedding = torch.where(drop, self.fake_latent, class_embedding)
        sizes = [self.buffer_size, self.seq_len]
        buffer_pos, token_pos = self.encoder_pos_embed_learned.split(sizes, dim=1)
        # Only known tokens are embedded, each with its own position.
        x = self.z_proj(gather_tokens(tokens, known))
        x = x + gather_tokens(token_pos.expand(len(tokens), -1, -1), known)
        x = torch.cat([class_embedding[:, None] + buffer_pos, x], dim=1)  # [B, buffer + N, D]
        return self.encoder_norm(self.run("encoder", self.encoder_blocks, self.z_proj_ln(x)))

    def decoder_input(self, encoded: Tensor, known: Tensor) -> Tensor:
        """Put the encoded tokens among mask tokens and add positions: ``[B, buffer + L, D]``.

        Args:
            encoded: buffer and known tokens ``[B, buffer + N, D]``.
            known: their positions ``[B, N]``.
        """
        buffer, x = self.decoder_embed(encoded).tensor_split([self.buffer_size], dim=1)
        tokens = self.mask_token.to(x.dtype).expand(len(x), self.seq_len, -1)
        tokens = tokens.scatter(1, known[..., None].expand(-1, -1, x.shape[-1]), x)  # [B, L, D]
        return torch.cat([buffer, tokens], dim=1) + self.decoder_pos_embed_learned

    def decode(self, encoded: Tensor, known: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Return features z of all positions ``[B, L, D]``, or of ``wanted`` ones ``[B, W, D]``.

        Args:
            encoded: buffer and known tokens ``[B, buffer + N, D]``.
            known: their positions ``[B, N]``.
            wanted: positions ``[B, W]``; in sampling, the last block attends only from these.
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
        """Return features of all or the ``wanted`` positions: encode, then decode."""
        return self.decode(self.encode(tokens, known, class_embedding), known, wanted)

    def flops(self, num_masked: float) -> float:
        """Count the operations of the forward pass for an image with ``num_masked`` masked."""
        known = self.seq_len - num_masked
        encoded, decoded = self.buffer_size + known, self.buffer_size + self.seq_len
        projection = known * self.z_proj.in_features * self.z_proj.out_features
        embedding = encoded * self.decoder_embed.in_features * self.decoder_embed.out_features
        blocks = sum(block.flops(encoded) for block in self.encoder_blocks)
        blocks += sum(block.flops(decoded) for block in self.decoder_blocks)
        return blocks + 2 * (projection + embedding)
