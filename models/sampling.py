"""Generation (section 3.3, inference): planned on the host, run on the device without waiting for it."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from models.backbone import gather_tokens

if TYPE_CHECKING:
    from models.channel_head import ChannelHead
    from models.tokenbridge import TokenBridge

# --------------------------------------------------------------------------------------------------------------------
# The plan: how many tokens each step takes, at which guidance scale.


class Step(NamedTuple):
    """``masked`` tokens are unknown before the step, ``left`` after it; ``guidance`` is its scale."""

    masked: int
    left: int
    guidance: float


def mask_schedule(num_iter: int, seq_len: int) -> list[int]:
    """Tokens still masked after each step by the cosine rule, at least 1 and one fewer than before where possible.

    The last entry is 1 too, although the last step takes all that is left: guidance counts with it.
    """
    masked, schedule = seq_len, []
    for step in range(num_iter):
        masked = max(1, min(masked - 1, math.floor(seq_len * math.cos(math.pi / 2 * (step + 1) / num_iter))))
        schedule.append(masked)
    return schedule


def sampling_plan(num_iter: int, seq_len: int, cfg: float, cfg_schedule: str) -> list[Step]:
    """The steps that take at least one token.

    Args:
        num_iter: steps S, at least 1; with more steps than tokens some take none and are left out.
        seq_len: tokens L.
        cfg: guidance scale; with the ``"linear"`` schedule, its value once all tokens but one are known.
        cfg_schedule: ``"linear"`` or ``"constant"``.

    Raises:
        ValueError: no steps, or another schedule.
    """
    if num_iter < 1:
        raise ValueError(f"sampling needs at least one step, got num_iter={num_iter}")
    if cfg_schedule not in ("linear", "constant"):
        raise ValueError(f'cfg_schedule is "linear" or "constant", not {cfg_schedule!r}')
    plan, before = [], seq_len
    for step, masked in enumerate(mask_schedule(num_iter, seq_len)):
        guidance = cfg if cfg_schedule == "constant" else 1 + (cfg - 1) * (seq_len - masked) / seq_len
        left = 0 if step == num_iter - 1 else masked
        if left < before:
            plan.append(Step(before, left, guidance))
        before = left
    return plan


# --------------------------------------------------------------------------------------------------------------------
# Randomness: orders of tokens and one uniform number a channel, from the global generator or one seed an image.


def random_orders(bsz: int, seq_len: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A random permutation of the L positions for each sample: ``[B, L]``."""
    return torch.rand(bsz, seq_len, device=device, generator=generator).argsort(dim=1)


def draw_noise(
    bsz: int, seq_len: int, channels: int, device: torch.device, seeds: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """Orders ``[B, L]`` and uniforms ``[B, L, C]`` in [0, 1).

    With ``seeds`` each sample's come from its own seed, on the CPU: they depend neither on the batch around it nor on
    the device.
    """
    if seeds is None:
        return random_orders(bsz, seq_len, device), torch.rand(bsz, seq_len, channels, device=device)
    orders, uniforms = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        orders.append(random_orders(1, seq_len, torch.device("cpu"), generator))
        uniforms.append(torch.rand(1, seq_len, channels, generator=generator))
    return torch.cat(orders).to(device), torch.cat(uniforms).to(device)


def sample_categorical(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Levels ``[M]`` from ``logits [M, K]`` by inverting the distribution function at ``uniform [M]``.

    Temperature 0 is the argmax; otherwise softmax(logits / temperature) is sampled.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    cdf = torch.softmax(logits.float() / temperature, dim=-1).cumsum(dim=-1)
    threshold = uniform[:, None] * cdf[:, -1:]  # rounding may leave the sum beside 1
    return torch.searchsorted(cdf, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


# --------------------------------------------------------------------------------------------------------------------
# The loop.


def guided_features(
    model: "TokenBridge", tokens: Tensor, known: Tensor, classes: Tensor, wanted: Tensor, guidance: float
) -> Tensor:
    """Features ``[B, N, D]`` at the ``wanted [B, N]`` positions, guided: z_u + w (z_c - z_u).

    ``classes`` is ``[B, D]`` for one pass, or ``[2B, D]``, conditional half first, for both in one batch.
    """
    halves = len(classes) // len(tokens)
    features = model.backbone(tokens.repeat(halves, 1, 1), known.repeat(halves, 1), classes)
    features = gather_tokens(features, wanted.repeat(halves, 1))
    if halves == 1:
        return features
    conditional, unconditional = features.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def sample_tokens(
    model: "TokenBridge",
    bsz: int,
    num_iter: int = 64,
    cfg: float = 1.0,
    cfg_schedule: str = "linear",
    labels: Tensor | None = None,
    temperature: float = 1.0,
    orders: Tensor | None = None,
    first_place: str = "trained",
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """Latents ``[bsz, C, h, w]``, scaled by the latent factor, generated in ``num_iter`` steps, without dropout.

    A method of :class:`models.tokenbridge.TokenBridge`. Autocast is the caller's.

    Args:
        num_iter: steps; the number of tokens they take follows a cosine.
        cfg: guidance scale on features; at 1 the conditional pass runs alone.
        cfg_schedule: ``"linear"``, growing with the tokens known, or ``"constant"``.
        labels: classes ``[bsz]``; without them generation is unconditional.
        temperature: of every channel's distribution; 0 takes the most probable level.
        orders: ``[bsz, L]``, tokens are taken from the end; drawn if not given.
        first_place: ``"trained"``, or ``"released"`` for the published sampler's input at the head's first place.
        seeds: one for each image, which then does not depend on the others in the batch.

    Raises:
        ValueError: labels outside the classes, or arguments outside the ranges above.
    """
    if temperature < 0:
        raise ValueError(f"the temperature must not be negative, got {temperature}")
    for name, given in {"labels": labels, "orders": orders, "seeds": seeds}.items():
        if given is not None and len(given) != bsz:
            raise ValueError(f"{len(given)} {name} for {bsz} images")
    plan = sampling_plan(num_iter, model.seq_len, cfg, cfg_schedule)
    drawn_orders, uniforms = draw_noise(bsz, model.seq_len, model.token_dim, model.device, seeds)
    orders = drawn_orders if orders is None else orders.to(model.device)

    unconditional = model.backbone.fake_latent.expand(bsz, -1)
    classes = unconditional if labels is None else model.class_emb(model.check_labels(labels).to(model.device))
    if labels is not None and cfg != 1.0:  # without labels both halves would be the same
        classes = torch.cat([classes, unconditional])

    training = model.training
    model.eval()
    tokens = torch.zeros(bsz, model.seq_len, model.token_dim, device=model.device)
    for step in plan:
        known, wanted = orders[:, step.masked :], orders[:, step.left : step.masked]
        features = guided_features(model, tokens, known, classes, wanted, step.guidance).flatten(0, 1)  # [M, D]
        uniform = gather_tokens(uniforms, wanted).flatten(0, 1)  # [M, C]
        levels = sample_levels(model.head, features, temperature, uniform, first_place)
        new = model.quantizer.dequantize(levels[:, model.from_generation_order])  # [M, C]
        tokens = tokens.scatter(1, wanted[..., None].expand(-1, -1, model.token_dim), new.unflatten(0, (bsz, -1)))
    model.train(training)
    return model.unpatchify(tokens)


def sample_levels(
    head: "ChannelHead", features: Tensor, temperature: float, uniform: Tensor, first_place: str
) -> Tensor:
    """Levels ``[M, C]`` in generation order, from features ``[M, D]`` and uniforms ``[M, C]``, in parts that fit."""
    rows = head.rows_at_once()
    parts = []
    for z, u in zip(features.split(rows), uniform.split(rows), strict=True):

        def choose(logits: Tensor, place: int, u: Tensor = u) -> Tensor:
            return sample_categorical(logits, temperature, u[:, place])

        parts.append(head.sample(z, choose, first_place))
    return torch.cat(parts)
