"""Generation (section 3.3, inference): planned on the host, run on the device without waiting for it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from models.backbone import gather_tokens
from models.graphs import RECORDED_ROWS

if TYPE_CHECKING:
    from models.channel_head import ChannelHead
    from models.tokenbridge import TokenBridge

#: Orders in which tokens can be generated.
ORDERS = ("random", "raster", "confidence")

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


def sampling_plan(num_iter: int, seq_len: int, cfg: float, cfg_schedule: str, unknown: int | None = None) -> list[Step]:
    """The steps that take at least one token.

    Args:
        num_iter: steps S, at least 1; with more steps than tokens some take none and are left out.
        seq_len: tokens L.
        unknown: tokens to be generated, where others are given; the schedule is of these.
        cfg: guidance scale; with the ``"linear"`` schedule, its value once all tokens but one are known.
        cfg_schedule: ``"linear"`` or ``"constant"``.

    Raises:
        ValueError: no steps, or another schedule.
    """
    if num_iter < 1:
        raise ValueError(f"sampling needs at least one step, got num_iter={num_iter}")
    if cfg_schedule not in ("linear", "constant"):
        raise ValueError(f'cfg_schedule is "linear" or "constant", not {cfg_schedule!r}')
    unknown = seq_len if unknown is None else unknown
    plan, before = [], unknown
    for step, masked in enumerate(mask_schedule(num_iter, unknown)):
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


class Noise:
    """Uniform random numbers for a batch of images.

    With ``seeds`` each image's come from its own generator, on the CPU: they depend neither on the batch around it nor
    on the device. Without, all come from the device's global generator.
    """

    def __init__(self, bsz: int, device: torch.device, seeds: Sequence[int] | None):
        self.bsz, self.device = bsz, device
        self.generators = None if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1), ``[B, *shape]``."""
        if self.generators is None:
            return torch.rand(self.bsz, *shape, device=self.device)
        return torch.stack([torch.rand(*shape, generator=each) for each in self.generators]).to(self.device)


def initial_orders(order: str, noise: Noise, seq_len: int) -> Tensor:
    """Orders ``[B, L]``, from whose ends tokens are taken: at random, or row by row.

    By confidence, where tokens sort themselves as they come, the initial order does not matter.
    """
    if order == "random":
        return noise.uniform(seq_len).argsort(dim=1)
    return torch.arange(seq_len - 1, -1, -1, device=noise.device).expand(noise.bsz, -1)


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
    repeated = (tokens.repeat(halves, 1, 1), known.repeat(halves, 1), classes, wanted.repeat(halves, 1))
    features = model.backbone(*repeated)
    if halves == 1:
        return features
    conditional, unconditional = features.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


@contextmanager
def weights_cast_once(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block, autocast keeps the low-precision copies of frozen weights instead of making them each time.

    By itself it keeps those of weights that may need gradients.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad and torch.is_autocast_enabled(device.type)]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


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
    order: str = "random",
    confidence_noise: float = 0.0,
    known_latents: Tensor | None = None,
    known_mask: Tensor | None = None,
    return_confidence: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Latents ``[bsz, C, h, w]``, scaled by the latent factor, generated in ``num_iter`` steps, without dropout.

    A method of :class:`models.tokenbridge.TokenBridge`. Autocast is the caller's.

    Args:
        num_iter: steps; the number of tokens they take follows a cosine.
        cfg: guidance scale on features; at 1 the conditional pass runs alone.
        cfg_schedule: ``"linear"``, growing with the tokens known, or ``"constant"``.
        labels: classes ``[bsz]``; without them generation is unconditional.
        temperature: of every channel's distribution; 0 takes the most probable level.
        orders: ``[bsz, L]``, tokens are taken from the end; by default as ``order`` says.
        first_place: ``"trained"``, or ``"released"`` for the published sampler's input at the head's first place.
        seeds: one for each image, which then does not depend on the others in the batch.
        order: ``"random"``; ``"raster"``, row by row; or ``"confidence"``: each step samples all unknown tokens and
            takes those whose channels have the highest joint log-probability (section 4.3, Figure 8).
        confidence_noise: scale of the Gumbel noise added to that, falling linearly to 0 over the steps (MaskGIT).
        known_latents, known_mask: latents ``[bsz, C, h, w]`` and ``[bsz, L]``, true where their token is given and to
            be kept (quantized); any number of them in each image.
        return_confidence: also return ``[bsz, L]``, the joint log-probability in nats, at temperature 1, that each
            token had when it was taken; 0 for those given.

    Raises:
        ValueError: labels outside the classes, or arguments outside the ranges above.
    """
    check_arguments(model, bsz, temperature, order, confidence_noise, orders, known_latents, known_mask)
    per_image = {"labels": labels, "orders": orders, "seeds": seeds}
    for name, given in per_image.items():
        if given is not None and len(given) != bsz:
            raise ValueError(f"{len(given)} {name} for {bsz} images")
    shared = {
        "num_iter": num_iter, "cfg": cfg, "cfg_schedule": cfg_schedule, "temperature": temperature, "order": order,
        "first_place": first_place, "confidence_noise": confidence_noise,
    }  # fmt: skip
    training = model.training
    model.eval()
    with weights_cast_once(model, model.device):
        if known_mask is None:
            tokens, confidence = generate(model, bsz, **per_image, **shared)
        else:
            # Images with equally many known tokens make a batch: all its shapes follow from their number.
            given = model.quantize(model.patchify(known_latents.to(model.device)))[1]
            known_mask = known_mask.to(model.device).bool()
            counts = known_mask.sum(dim=1).tolist()
            tokens, confidence = torch.empty_like(given), given.new_empty(bsz, model.seq_len)
            for count in sorted(set(counts)):
                rows = [row for row in range(bsz) if counts[row] == count]
                part = {
                    name: None if value is None else [value[r] for r in rows] if name == "seeds" else value[rows]
                    for name, value in per_image.items()
                }
                tokens[rows], confidence[rows] = generate(
                    model,
                    len(rows),
                    **part,
                    **shared,
                    given=given[rows],
                    known_mask=known_mask[rows],
                    known_count=count,
                )
    model.train(training)
    latents = model.unpatchify(tokens)
    return (latents, confidence) if return_confidence else latents


def check_arguments(
    model: "TokenBridge",
    bsz: int,
    temperature: float,
    order: str,
    confidence_noise: float,
    orders: Tensor | None,
    known_latents: Tensor | None,
    known_mask: Tensor | None,
) -> None:
    """Raises ValueError for values that :func:`sample_tokens` cannot take."""
    if temperature < 0 or confidence_noise < 0:
        raise ValueError(
            f"temperature and confidence_noise must not be negative, got {temperature}, {confidence_noise}"
        )
    if order not in ORDERS:
        raise ValueError(f"order is one of {ORDERS}, not {order!r}")
    if order == "confidence" and orders is not None:
        raise ValueError("with order='confidence' tokens find their own order: leave orders out")
    if (known_latents is None) != (known_mask is None):
        raise ValueError("known_latents and known_mask go together")
    if known_mask is not None:
        side = model.grid_size * model.patch_size
        shapes = ((bsz, model.vae_embed_dim, side, side), (bsz, model.seq_len))
        if (tuple(known_latents.shape), tuple(known_mask.shape)) != shapes:
            raise ValueError(
                f"known_latents and known_mask are {list(known_latents.shape)} and {list(known_mask.shape)}, "
                f"expected {list(shapes[0])} and {list(shapes[1])}"
            )


def generate(
    model: "TokenBridge",
    bsz: int,
    num_iter: int,
    cfg: float,
    cfg_schedule: str,
    labels: Tensor | None,
    temperature: float,
    orders: Tensor | None,
    first_place: str,
    seeds: Sequence[int] | None,
    order: str,
    confidence_noise: float,
    given: Tensor | None = None,
    known_mask: Tensor | None = None,
    known_count: int = 0,
) -> tuple[Tensor, Tensor]:
    """:func:`sample_tokens` for images with equally many known tokens: tokens ``[B, L, C]``, confidences ``[B, L]``.

    Args:
        given: dequantized tokens ``[B, L, C]``, of which those in ``known_mask [B, L]`` count.
    """
    length, places = model.seq_len, model.head.places
    plan = sampling_plan(num_iter, length, cfg, cfg_schedule, length - known_count)
    noise = Noise(bsz, model.device, seeds)
    drawn = initial_orders(order, noise, length)
    orders = drawn if orders is None else orders.to(model.device)
    tokens = torch.zeros(bsz, length, model.token_dim, device=model.device)
    if known_mask is not None:
        tokens = torch.where(known_mask[..., None], given, tokens)
        orders = orders.gather(1, known_mask.gather(1, orders).int().argsort(dim=1, stable=True))  # known ones last
    confidence = torch.zeros(bsz, length, device=model.device)

    unconditional = model.backbone.fake_latent.expand(bsz, -1)
    classes = unconditional if labels is None else model.class_emb(model.check_labels(labels).to(model.device))
    if labels is not None and cfg != 1.0:  # without labels both halves would be the same
        classes = torch.cat([classes, unconditional])

    uniforms = noise.uniform(length, places)
    for number, step in enumerate(plan):
        known = orders[:, step.masked :]
        # By confidence all unknown tokens are sampled, and most of them dropped.
        wanted = orders[:, 0 if order == "confidence" else step.left : step.masked]
        features = guided_features(model, tokens, known, classes, wanted, step.guidance).flatten(0, 1)  # [M, D]
        uniform = gather_tokens(uniforms, wanted).flatten(0, 1)  # [M, places]
        chosen, log_probs = sample_classes(model.head, features, temperature, uniform, first_place)
        new = model.quantizer.dequantize(model.to_levels(chosen)[:, model.from_generation_order])  # [M, C]
        new, log_probs = new.unflatten(0, (bsz, -1)), log_probs.unflatten(0, (bsz, -1))
        if order == "confidence":
            score = log_probs
            if confidence_noise:
                gumbel = -torch.log(-torch.log(noise.uniform(length).clamp(1e-20, 1 - 1e-7)))
                score = score + confidence_noise * (1 - (number + 1) / len(plan)) * gumbel.gather(1, wanted)
            ranked = score.argsort(dim=1, stable=True)  # the most confident last
            orders = torch.cat([wanted.gather(1, ranked), known], dim=1)
            taken = ranked[:, step.left :]
            wanted, log_probs, new = wanted.gather(1, taken), log_probs.gather(1, taken), gather_tokens(new, taken)
            uniforms = noise.uniform(length, places)
        tokens = tokens.scatter(1, wanted[..., None].expand(-1, -1, model.token_dim), new)
        confidence = confidence.scatter(1, wanted, log_probs)
    return tokens, confidence


def sample_classes(
    head: "ChannelHead", features: Tensor, temperature: float, uniform: Tensor, first_place: str
) -> tuple[Tensor, Tensor]:
    """Classes ``[M, places]`` in generation order and their joint log-probabilities ``[M]``, in parts that fit.

    Args:
        features: ``[M, D]``.
        uniform: one number a place, ``[M, places]``.
    """

    def sample(z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = torch.zeros(len(z), device=z.device)

        def choose(logits: Tensor, place: int) -> Tensor:
            chosen = sample_categorical(logits, temperature, u[:, place])
            log_probs.add_(logits.log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0])
            return chosen

        return head.sample(z, choose, first_place), log_probs

    rows = head.rows_at_once()
    if head.recordings is not None and len(features) <= min(rows, RECORDED_ROWS):
        return head.recordings(sample, features, uniform, key=(temperature, first_place))
    parts = [sample(z, u) for z, u in zip(features.split(rows), uniform.split(rows), strict=True)]
    return tuple(torch.cat(results) for results in zip(*parts, strict=True))
