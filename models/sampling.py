"""Generation (section 3.3, inference), planned on the CPU, run without synchronization."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.backbone import MaskedBackbone, gather_tokens
from models.channel_head import Head
from models.heads import HEADS, option_owners
from models.quantizer import ScalarQuantizer
from util.devices import to_device
from util.options import check_choices, option
from util.rng import ImageDraws

#: Orders in which tokens can be generated.
ORDERS = ("random", "raster", "confidence")
#: Guidance scale of a step, from ``cfg`` and the numbers of known and of all tokens after it.
SCHEDULES: dict[str, Callable[[float, int, int], float]] = {
    "linear": lambda cfg, known, tokens: 1 + (cfg - 1) * known / tokens,
    "constant": lambda cfg, known, tokens: cfg,
}
#: Called after each step with its number from 1, the number of steps, the values of tokens
#: ``[B, L, C]`` (0 if unknown) and the positions ``[B, N]`` that are still unknown, on the device.
OnStep = Callable[[int, int, Tensor, Tensor], None]

# --------------------------------------------------------------------------------------------------
# Options: each is declared once, here or by its head, with its default and the help of its flag.


@dataclass(frozen=True)
class TokenOptions:
    """Sampling options that do not depend on the head.

    Raises:
        ValueError: an option outside its range.
    """

    # Commands that evaluate take 256 steps by default, as the release's; calls from Python 64.
    num_iter: int = option(
        64, "autoregressive steps; the tokens they take follow a cosine", default=256
    )
    cfg: float = option(1.0, "guidance scale; 1 is without guidance")
    cfg_schedule: str = option(
        "linear",
        "guidance over the steps: growing to --cfg with the tokens known, or --cfg in every step",
        choices=tuple(SCHEDULES),
    )
    temperature: float = option(
        1.0, "temperature of every channel's distribution; 0 takes the mode"
    )
    order: str = option(
        "random",
        "order of tokens: random, row by row, or the most confident first (Figure 8)",
        choices=ORDERS,
    )
    confidence_noise: float = option(
        0.0, "scale of the Gumbel noise on confidences, which falls to 0 over the steps"
    )

    def __post_init__(self) -> None:
        if self.num_iter < 1:
            raise ValueError(f"sampling needs at least one step, got num_iter={self.num_iter}")
        if min(self.cfg, self.temperature, self.confidence_noise) < 0:
            numbers = f"{self.cfg}, {self.temperature}, {self.confidence_noise}"
            raise ValueError(
                f"cfg, temperature and confidence_noise must not be negative, got {numbers}"
            )
        check_choices(self)


#: Options of all heads. Fields of the last base come first in a dataclass.
HEAD_OPTIONS = dict.fromkeys(head.Options for head in reversed(HEADS.values()))


@dataclass(frozen=True)
class SamplingOptions(*HEAD_OPTIONS, TokenOptions):
    """All sampling options: those of :class:`TokenOptions`, then each head's own."""


def check_head_options(head: Head, options: Any) -> None:
    """Raise ValueError if an option of another head is set, or one of this head's does not fit it.

    Args:
        options: :class:`SamplingOptions`, or parsed flags.
    """
    for name, heads in option_owners().items():
        is_set = getattr(options, name) != getattr(SamplingOptions, name)
        if is_set and name not in head.option_names():
            raise ValueError(f"--{name} only applies to --head {' or '.join(heads)}. Remove it.")
    head.check_options(options)


def check_guidance(label_drop_prob: float, cfg: float, labeled: bool = True) -> None:
    """Raise ValueError if sampling takes an unconditional pass that the model was trained without.

    Args:
        label_drop_prob: the value in the model's training.
        cfg: guidance scale.
        labeled: whether images are of given classes.
    """
    if label_drop_prob == 0 and (cfg != 1 or not labeled):
        cause = f"cfg {cfg:g}" if labeled else "sampling without a class"
        raise ValueError(
            f"{cause} needs the embedding of no class, which a model of label_drop_prob 0 has "
            "never trained: choose --cfg 1 and classes, or train with --label_drop_prob 0.1"
        )


# --------------------------------------------------------------------------------------------------
# Inputs of the loop.


class Given(NamedTuple):
    """Inputs for each of B images; the sampler decides those that are None."""

    labels: Tensor | None  # classes [B]; without them generation is unconditional
    orders: Tensor | None  # [B, L]; tokens are taken from the end
    seeds: Sequence[int] | None  # of each image's random numbers
    tokens: Tensor | None  # values [B, L, C], read where `known` is true
    known: (
        Tensor | None
    )  # [B, L], true where a token is kept; on the CPU, or counting them synchronizes

    def images(self, rows: Sequence[int]) -> "Given":
        """Return the inputs of the images numbered ``rows``."""
        seeds = self.seeds if self.seeds is None else [self.seeds[row] for row in rows]
        # Row by row: indexing by a list would synchronize with the device.
        tensors = {name: x for name, x in self._asdict().items() if isinstance(x, Tensor)}
        chosen = {name: torch.stack([x[row] for row in rows]) for name, x in tensors.items()}
        return self._replace(**chosen, seeds=seeds)


# --------------------------------------------------------------------------------------------------
# The plan: how many tokens each step takes, and its guidance scale.


class SamplingStep(NamedTuple):
    """One step of the plan."""

    masked: int  # unknown tokens before the step
    left: int  # unknown tokens after it
    guidance: float  # guidance scale


def mask_schedule(num_iter: int, seq_len: int) -> list[int]:
    """Return the number of tokens that are still masked after each step, by the cosine rule.

    It is at least 1, and one fewer than before where possible. The last entry is 1, too, although
    the last step takes all tokens: the guidance scale is computed from it.
    """
    masked, schedule = seq_len, []
    for step in range(num_iter):
        by_cosine = math.floor(seq_len * math.cos(math.pi / 2 * (step + 1) / num_iter))
        masked = max(1, min(masked - 1, by_cosine))
        schedule.append(masked)
    return schedule


def sampling_plan(
    options: TokenOptions, seq_len: int, unknown: int | None = None
) -> list[SamplingStep]:
    """Return the steps that generate ``unknown`` tokens, by default all L.

    Steps that take no token are left out.
    Guidance follows :data:`SCHEDULES`; the last step counts one token as unknown, as in MAR.
    """
    guidance = SCHEDULES[options.cfg_schedule]
    before = seq_len if unknown is None else unknown
    plan = []
    for step, masked in enumerate(mask_schedule(options.num_iter, before)):
        left = 0 if step == options.num_iter - 1 else masked
        if left < before:
            scale = guidance(options.cfg, seq_len - masked, seq_len)
            plan.append(SamplingStep(before, left, scale))
            before = left
    return plan


# --------------------------------------------------------------------------------------------------
# The parts of a step.


def initial_orders(order: str, draws: ImageDraws, seq_len: int) -> Tensor:
    """Return orders ``[B, L]``, random or row by row; tokens are taken from their ends.

    By confidence, every step sorts the unknown tokens, so that the initial order does not matter.
    """
    if order == "random":
        return draws.uniform(seq_len).argsort(dim=1)
    return torch.arange(seq_len - 1, -1, -1, device=draws.device).expand(draws.bsz, -1)


def class_embeddings(
    backbone: MaskedBackbone, bsz: int, labels: Tensor | None, cfg: float
) -> Tensor:
    """Return class embeddings ``[B, D]``; with guidance ``[2B, D]``, the conditional ones first."""
    unconditional = backbone.fake_latent.expand(bsz, -1)
    if labels is None:
        return unconditional  # also with guidance: both halves would be equal
    conditional = backbone.class_emb(to_device(labels, unconditional.device))
    return conditional if cfg == 1.0 else torch.cat([conditional, unconditional])


def guided_features(
    backbone: MaskedBackbone,
    tokens: Tensor,
    known: Tensor,
    classes: Tensor,
    wanted: Tensor,
    guidance: float,
) -> Tensor:
    """Return features ``[B, W, D]`` at the ``wanted [B, W]`` positions: z_u + guidance (z_c - z_u).

    Args:
        tokens: ``[B, L, C]``, of which those at the ``known [B, N]`` positions are read.
        classes: output of :func:`class_embeddings`; both halves go through the backbone in one
            batch.
        guidance: scale.
    """
    halves = len(classes) // len(tokens)
    tokens, known, wanted = (
        tokens.repeat(halves, 1, 1),
        known.repeat(halves, 1),
        wanted.repeat(halves, 1),
    )
    features = backbone(tokens, known, classes, wanted)
    if halves == 1:
        return features
    conditional, unconditional = features.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


# --------------------------------------------------------------------------------------------------
# The loop.


@torch.no_grad()
def sample_tokens(
    backbone: MaskedBackbone,
    head: Head,
    quantizer: ScalarQuantizer,
    bsz: int,
    given: Given,
    options: SamplingOptions,
    on_step: OnStep | None = None,
) -> tuple[Tensor, Tensor]:
    """Return token values ``[B, L, C]``, and their log-probabilities ``[B, L]`` when taken.

    Images with different numbers of known tokens are generated in separate batches; ``on_step`` is
    called for each batch.

    Raises:
        ValueError: orders are given for an order by confidence; see also
            :func:`check_head_options`.
    """
    check_head_options(head, options)
    if options.order == "confidence" and given.orders is not None:
        raise ValueError("order='confidence' chooses its own order: do not pass orders")
    if given.known is None:
        return generate(backbone, head, quantizer, bsz, given, options, on_step=on_step)
    # Images with equally many known tokens make a batch, since shapes follow from their number.
    counts = given.known.sum(dim=1).tolist()
    images = {}
    for count in sorted(set(counts)):
        rows = [row for row in range(bsz) if counts[row] == count]
        part = generate(
            backbone, head, quantizer, len(rows), given.images(rows), options, count, on_step
        )
        images |= dict(zip(rows, zip(*part, strict=True), strict=True))
    tokens, confidence = zip(*(images[row] for row in range(bsz)), strict=True)
    return torch.stack(tokens), torch.stack(confidence)


def generate(
    backbone: MaskedBackbone,
    head: Head,
    quantizer: ScalarQuantizer,
    bsz: int,
    given: Given,
    options: SamplingOptions,
    known_count: int = 0,
    on_step: OnStep | None = None,
) -> tuple[Tensor, Tensor]:
    """Run :func:`sample_tokens` for images that have ``known_count`` given tokens each."""
    device, length = backbone.fake_latent.device, backbone.seq_len
    by_confidence = options.order == "confidence"
    draws = ImageDraws(bsz, device, given.seeds)
    # Drawn even if orders are given, so that later random numbers do not depend on that.
    orders = initial_orders(options.order, draws, length)
    orders = orders if given.orders is None else to_device(given.orders, device)
    tokens = torch.zeros(bsz, length, head.channels, device=device)
    if given.known is not None and given.tokens is not None:
        is_known = to_device(given.known, device)
        tokens = torch.where(is_known[..., None], given.tokens, tokens)
        known_last = is_known.gather(1, orders).int().argsort(dim=1, stable=True)
        orders = orders.gather(1, known_last)
    classes = class_embeddings(backbone, bsz, given.labels, options.cfg)
    confidence = torch.zeros(bsz, length, device=device)

    plan = sampling_plan(options, length, length - known_count)
    uniforms = draws.uniform(length, head.sample_numbers)
    head_options = {name: getattr(options, name) for name in head.option_names()}
    for number, step in enumerate(plan):
        known = orders[:, step.masked :]
        # By confidence all unknown tokens are sampled, and most of them dropped.
        wanted = orders[:, 0 if by_confidence else step.left : step.masked]
        features = guided_features(backbone, tokens, known, classes, wanted, step.guidance)
        uniform = gather_tokens(uniforms, wanted).flatten(0, 1)  # [M, sample_numbers]
        levels, log_probs = head.sample(
            features.flatten(0, 1), options.temperature, uniform, **head_options
        )
        new = quantizer.dequantize(levels).unflatten(0, (bsz, -1))  # [B, W, C]
        log_probs = log_probs.unflatten(0, (bsz, -1))
        if by_confidence:
            score = log_probs
            if options.confidence_noise:
                numbers = draws.uniform(length).clamp(1e-20, 1 - 1e-7)
                noise = -torch.log(-torch.log(numbers))  # Gumbel, [B, L]
                scale = options.confidence_noise * (1 - (number + 1) / len(plan))
                score = score + scale * noise.gather(1, wanted)
            ranked = score.argsort(dim=1, stable=True)  # the most confident last
            orders = torch.cat([wanted.gather(1, ranked), known], dim=1)
            taken = ranked[:, step.left :]
            wanted, log_probs = wanted.gather(1, taken), log_probs.gather(1, taken)
            new = gather_tokens(new, taken)
            uniforms = draws.uniform(length, head.sample_numbers)
        tokens = tokens.scatter(1, wanted[..., None].expand(-1, -1, head.channels), new)
        confidence = confidence.scatter(1, wanted, log_probs)
        if on_step is not None:
            on_step(number + 1, len(plan), tokens, orders[:, : step.left])
    return tokens, confidence
