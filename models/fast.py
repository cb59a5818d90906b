"""What makes the models fast and lets them fit in memory, applied from outside by :func:`speed_up`.

Plain classes hold the mathematics. :data:`FAST` gives each a subclass that overrides what can be computed faster, and
``TokenBridge.__init__`` has them take over last. Results are equal up to rounding, and up to what dropout draws.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from models.backbone import MaskedBackbone, gather_tokens
from models.channel_head import ChannelAttention, ChannelBlock, ChannelHead, Head
from models.masked_head import MaskedBlock, MaskedHead

# --------------------------------------------------------------------------------------------------------------------
# Dropout that does not wait for random numbers: on the CPU PyTorch draws them one by one, in one thread.

RESOLUTION = 2**16


class DropBits(torch.autograd.Function):
    """Zeroes entries where 16 random bits fall below a threshold, and scales the others; keeps one byte an entry."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        threshold = round(p * RESOLUTION)
        # The seed comes from torch's generator: whoever seeds, saves or restores that one decides the masks.
        seed = int(torch.randint(2**62, ()))
        words = -(-x.numel() // 4)
        bits = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64, size=words, dtype=np.uint64)
        bits = torch.from_numpy(bits.view(np.int16))[: x.numel()].view(x.shape)
        kept = bits >= threshold - RESOLUTION // 2
        ctx.save_for_backward(kept)
        ctx.scale = RESOLUTION / (RESOLUTION - threshold)  # of the probability as rounded: nothing is biased
        return (x * kept.to(x.dtype)).mul_(ctx.scale)  # products are vectorized, filling by a mask is not

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (grad * kept.to(grad.dtype)).mul_(ctx.scale), None


def dropout(x: Tensor, p: float) -> Tensor:
    """``x`` with each entry zeroed with probability ``p``, in [0, 1], the others scaled by ``1 / (1 - p)``.

    On the CPU ``p`` is rounded to a multiple of 2^-16.
    """
    if p == 0:
        return x
    if round(p * RESOLUTION) >= RESOLUTION:
        return x * 0
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    return DropBits.apply(x, p)


class FastDropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x


# --------------------------------------------------------------------------------------------------------------------
# Attention by the kernel that is fastest for sequences of at most some hundred: on CUDA PyTorch's fused one; on the CPU
# plain products, since the fused kernel is 2 to 8 times slower there, most of all its bf16 backward pass.


#: Most M x H in a call of the fused kernel: CUDA's limit for two of a grid's axes, which some versions do not look at.
LAUNCH_ROWS = 2**16 - 1


def fused(q: Tensor, k: Tensor, v: Tensor, causal: bool, drop: float) -> Tensor:
    """:func:`attend` by PyTorch's kernel, :data:`LAUNCH_ROWS` at a time."""
    kernel, rows = partial(F.scaled_dot_product_attention, dropout_p=drop, is_causal=causal), LAUNCH_ROWS // q.shape[1]
    if len(q) <= rows:
        return kernel(q, k, v)
    return torch.cat([kernel(*part) for part in zip(*(x.split(rows) for x in (q, k, v)), strict=True)])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, drop: float = 0.0) -> Tensor:
    """Softmax attention ``[M, H, N, d]`` with scale 1/sqrt(d); a ``mask [N, N]`` must be the causal one."""
    if q.is_cuda:
        return fused(q, k, v, mask is not None, drop)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    return dropout(scores.softmax(dim=-1), drop) @ v


class FastAttention(Attention):
    """timm's attention, which has the fused kernel and the plain products, told which to take."""

    @property
    def fused_attn(self) -> bool:
        return self.qkv.weight.is_cuda


class FastChannelAttention(ChannelAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return attend(q, k, v, mask, self.attn_dropout if self.training else 0.0)


# --------------------------------------------------------------------------------------------------------------------
# The backbone in sampling: the last block attends from the positions whose features are wanted, no others.


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


class FastBackbone(MaskedBackbone):
    def decode(self, encoded: Tensor, known: Tensor, wanted: Tensor | None = None) -> Tensor:
        if wanted is None or self.training or not len(self.decoder_blocks):
            return super().decode(encoded, known, wanted)
        x = self.run("decoder", self.decoder_blocks[:-1], self.decoder_input(encoded, known))
        x = block_at(self.decoder_blocks[-1], x, self.buffer_size + wanted)
        return self.decoder_norm(x) + gather_tokens(self.output_pos_embed.expand(len(x), -1, -1), wanted)


# --------------------------------------------------------------------------------------------------------------------
# The head, in parts that fit memory and cache; and on CUDA, few tokens with one launch.

#: Elements of AdaLN modulations and logits held at once in sampling; more tokens than that allows go through in turn.
MODULATION_BUDGET = 2**28
#: Elements of the sequence (tokens x the head's places x width) that train at once, by device.
TRAINING_BUDGET = {"cpu": 2**22, "cuda": 2**25}
#: Rows up to which the head waits for launches, not for its products; more go through without a recording.
RECORDED_ROWS = 256


class LossInParts(torch.autograd.Function):
    """The head's loss and its gradients, ``rows`` tokens at a time, so that the activations of no more are held.

    They are most of a training step's memory, 16 channel steps for each token. Nothing is computed twice: gradients are
    taken while a part's activations are there, and scaled in the backward pass. They are those of the sum of losses:
    at the logits within [-1, 1] (the masked head's within [-S, S]), which fp16 holds whatever the scale that the loss
    only gets later.
    """

    @staticmethod
    def forward(ctx, head: Head, rows: int, features: Tensor, given: Tensor, *learned: Tensor) -> Tensor:
        total = torch.zeros((), device=features.device)
        for_backbone = ctx.needs_input_grad[2]  # not if the backbone is frozen
        feature_grads, sums = [], []
        for z, part in zip(features.split(rows), given.split(rows), strict=True):
            with torch.enable_grad():
                z = z.detach().requires_grad_(for_backbone)
                loss = head.summed_loss(z, part)
            # As every backward pass: with autocast, sums over rows would be of float32 copies.
            with torch.autocast(features.device.type, enabled=False):
                grads = list(torch.autograd.grad(loss, [*[z] * for_backbone, *learned], materialize_grads=True))
            total += loss.detach()
            if for_backbone:
                feature_grads.append(grads.pop(0))
            if not sums:
                sums = grads
            elif learned:
                torch._foreach_add_(sums, grads)
        ctx.save_for_backward(torch.cat(feature_grads) if for_backbone else None, *sums)
        ctx.losses = len(features) * head.channel_steps
        return total / ctx.losses

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple[Tensor | None, ...]:
        features, *learned = ctx.saved_tensors
        scale = scale / ctx.losses
        scaled = torch._foreach_mul(learned, scale) if learned else ()
        return None, None, None if features is None else features * scale, None, *scaled


def cuda_graph(work: Callable[[], tuple[Tensor, ...]], pool: Any) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Records ``work``, which must not wait for the device: what replays it, and the outputs each replay writes.

    Recordings share the memory of ``pool``: each is done with it before another starts.
    """
    # Copies that autocast keeps must be of the graph's own memory, and live in no other.
    torch.clear_autocast_cache()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):  # libraries choose kernels and allocate when they are first called
            work()
    torch.cuda.current_stream().wait_stream(aside)
    torch.clear_autocast_cache()
    graph = torch.cuda.CUDAGraph()
    # Other threads, of loaders and collectives, may go on meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outputs = work()
    torch.clear_autocast_cache()
    return graph.replay, outputs


class Recordings:
    """Records functions of tensors, once for each power of two rows and each setting, and replays them.

    A recording by :func:`cuda_graph` makes one launch of thousands of small kernels.
    """

    def __init__(self, record: Callable = cuda_graph):
        self.record = record
        self.kept: dict[tuple, tuple] = {}
        self.pool = torch.cuda.graph_pool_handle() if record is cuda_graph else None

    def __deepcopy__(self, memo: dict) -> "Recordings":
        return Recordings(self.record)  # a copy has weights of its own

    def __call__(self, work: Callable[..., tuple[Tensor, ...]], *inputs: Tensor, key: tuple[Any, ...]):
        """``work(*inputs)``, each of whose rows follows from that row of the inputs, and from ``key``."""
        rows = len(inputs[0])
        size = 1 << (rows - 1).bit_length()
        kind = inputs[0].device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        key = (size, autocast, *(given.dtype for given in inputs), *key)
        if key not in self.kept:
            on_device = torch.cuda.device(inputs[0].device) if kind == "cuda" else nullcontext()
            # What is kept is written again and again, within inference mode and without.
            with on_device, torch.inference_mode(False), torch.no_grad():
                buffers = [torch.zeros(size, *each.shape[1:], dtype=each.dtype, device=each.device) for each in inputs]
                self.kept[key] = buffers, *self.record(partial(work, *buffers), self.pool)
        buffers, replay, outputs = self.kept[key]
        for buffer, given in zip(buffers, inputs, strict=True):
            buffer[:rows].copy_(given)
        replay()
        return tuple(output[:rows].clone() for output in outputs)


class FastHead(Head):
    """Runs the tokens in parts; where :func:`compile_blocks` gave it ``recordings``, replays the sampling of few."""

    recordings: Recordings | None = None

    def loss(self, features: Tensor, targets: Tensor, *uniform: Tensor) -> Tensor:
        kind, learned = features.device.type, [p for p in self.parameters() if p.requires_grad]
        rows = max(1, TRAINING_BUDGET.get(kind, 2**25) // (self.places * self.dim))
        training = torch.is_grad_enabled() and (features.requires_grad or learned)
        if len(features) <= rows or not training:
            return super().loss(features, targets, *uniform)
        return LossInParts.apply(self, rows, features, self.given(targets, *uniform), *learned)

    @torch.no_grad()
    def sample(self, features: Tensor, temperature: float, uniform: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        plain = super().sample

        def sample(z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            return plain(z, temperature, u, **options)

        rows = self.rows_at_once()
        if self.recordings is not None and len(features) <= min(rows, RECORDED_ROWS):
            return self.recordings(sample, features, uniform, key=(temperature, *options.values()))
        parts = [sample(z, u) for z, u in zip(features.split(rows), uniform.split(rows), strict=True)]
        return tuple(torch.cat(results) for results in zip(*parts, strict=True))

    def rows_at_once(self) -> int:
        """Tokens that fit :data:`MODULATION_BUDGET`."""
        return max(1, MODULATION_BUDGET // self.held_by_token())

    def _apply(self, *args, **kwargs) -> "FastHead":
        if self.recordings is not None:
            self.recordings.kept.clear()  # weights may move, and recordings read them where they lay
        return super()._apply(*args, **kwargs)


class FastChannelHead(FastHead, ChannelHead):
    def held_by_token(self) -> int:
        """Elements of a token's modulations and logits."""
        logits = self.classes * (1 if self.autoregressive else self.channel_steps)
        return self.channel_steps * self.dim * (6 * self.depth + 2) + logits


class FastMaskedHead(FastHead, MaskedHead):
    def held_by_token(self) -> int:
        """Elements of a token's modulations, of its activations in a block, and of its logits."""
        return (3 * self.depth + 10) * self.dim + 3 * self.channel_steps * self.classes


# --------------------------------------------------------------------------------------------------------------------
# Applied to whole models.

#: Plain types, and what takes their place.
FAST = {
    nn.Dropout: FastDropout,
    Attention: FastAttention,
    ChannelAttention: FastChannelAttention,
    MaskedBackbone: FastBackbone,
    ChannelHead: FastChannelHead,
    MaskedHead: FastMaskedHead,
}


def speed_up(model: nn.Module) -> None:
    """Has all parts of ``model``, itself included, compute the same in the faster way."""
    for module in model.modules():
        if type(module) in FAST:
            module.__class__ = FAST[type(module)]


@cache
def compiled(kind: type[nn.Module], *methods: str) -> type[nn.Module]:
    """A subclass of ``kind`` whose ``methods`` are fused by ``torch.compile``."""
    # Methods of the class, not of an instance: a deep copy, such as the average of the weights, computes with its own.
    programs = {name: torch.compile(getattr(kind, name), dynamic=True) for name in methods}
    return type(f"Compiled{kind.__name__}", (kind,), programs)


def compile_blocks(model: nn.Module) -> None:
    """Has ``torch.compile`` fuse what lies between the blocks' matrix products, in training and in sampling.

    Blocks of a kind share one program, made for any number of tokens: each training step masks another one, each
    sampling step takes another one. To be called on the model's device: on CUDA, the head's sampling of few tokens
    becomes one launch, too.
    """
    # Else programs compiled within DDP are cut where its buckets end, to send gradients early. A block is short enough.
    torch._dynamo.config.optimize_ddp = False
    for module in model.modules():
        if isinstance(module, Block | MaskedBlock):
            module.compile(dynamic=True)
        elif type(module) is ChannelBlock:
            module.__class__ = compiled(ChannelBlock, "all_steps", "one_step")
        elif isinstance(module, FastHead) and module.condition_proj.weight.is_cuda:
            module.recordings = Recordings()


@contextmanager
def weights_cast_once(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block, autocast keeps its low-precision copies of frozen weights, as it does of trained ones."""
    frozen = [p for p in model.parameters() if not p.requires_grad and torch.is_autocast_enabled(device.type)]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
