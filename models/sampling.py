"""Generation (section 3.3, inference): planned on the host, run on the device without waiting for it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.backbone import MaskedBackbone, gather_tokens
from models.channel_head import Head
from models.quantizer import ScalarQuantizer
from util.devices import to_device
from util.rng import ImageDraws

#: Orders in which tokens can be generated.
ORDERS = ("random", "raster", "confidence")
#: Inputs of the head's first channel step: as in training, or as the release samples.
FIRST_PLACES = ("trained", "released")
#: Called after each step with its number from 1, the number of steps, the tokens' values ``[B, L, C]`` (0 for unknown
#: ones) and the positions ``[B, N]`` that are still unknown, on the device.
OnStep = Callable[[int, int, Tensor, Tensor], None]
#: Which channels a step of the masked head takes.
HEAD_ORDERS = ("random", "frequency", "confidence")

# --------------------------------------------------------------------------------------------------------------------
# Settings, and what is given for each image.


@dataclass(frozen=True)
class SamplingOptions:
    """How a batch is generated: arguments of :meth:`models.tokenbridge.TokenBridge.sample_tokens`.

    Raises:
        ValueError: an option outside its range.
    """

    num_iter: int = 64
    cfg: float = 1.0
    cfg_schedule: str = "linear"
    temperature: float = 1.0
    order: str = "random"
    confidence_noise: float = 0.0
    first_place: str = "trained"
    head_steps: int | None = None
    head_order: str | None = None

    def __post_init__(self):
        if self.num_iter < 1:
            raise ValueError(f"sampling needs at least one step, got num_iter={self.num_iter}")
        if self.cfg_schedule not in ("linear", "constant"):
            raise ValueError(f'cfg_schedule is "linear" or "constant", not {self.cfg_schedule!r}')
        if min(self.cfg, self.temperature, self.confidence_noise) < 0:
            numbers = f"{self.cfg}, {self.temperature}, {self.confidence_noise}"
            raise ValueError(
                f"cfg, temperature and confidence_noise must not be negative, got {numbers}"
            )
        if self.order not in ORDERS:
            raise ValueError(f"order is one of {ORDERS}, not {self.order!r}")
        if self.first_place not in FIRST_PLACES:
            raise ValueError(f"first_place is one of {FIRST_PLACES}, not {self.first_place!r}")
        if self.head_order not in (None, *HEAD_ORDERS):
            raise ValueError(f"head_order is one of {HEAD_ORDERS}, not {self.head_order!r}")


def check_head_options(head: Head, how: Any) -> None:
    """Raises ValueError if ``how`` has options of another head, or steps that the masked head cannot take.

    Args:
        how: :class:`SamplingOptions`, or anything with their names: flags.
    """
    if "first_place" not in head.sampling_options and how.first_place != FIRST_PLACES[0]:
        raise ValueError("first_place is for models of head ar, this is none: leave it out")
    if "head_steps" not in head.sampling_options and (how.head_steps, how.head_order) != (
        None,
        None,
    ):
        raise ValueError(
            "head_steps and head_order are for models of head masked, this is none: leave them out"
        )
    if how.head_steps is not None and not 1 <= how.head_steps <= head.channel_steps:
        raise ValueError(
            f"head_steps {how.head_steps}: the head takes 1 to {head.channel_steps}, its channel steps"
        )


def check_guidance(label_drop_prob: float, cfg: float, labeled: bool = True) -> None:
    """Raise ValueError if sampling takes an unconditional pass that the model was trained without.

    Args:
        label_drop_prob: of the model's training.
        labeled: whether images are of given classes.
    """
    if label_drop_prob == 0 and (cfg != 1 or not labeled):
        asked = f"cfg {cfg:g}" if labeled else "sampling without a class"
        raise ValueError(
            f"{asked} needs the embedding of no class, which a model of label_drop_prob 0 has never trained: choose "
            "--cfg 1 and classes, or train with --label_drop_prob 0.1"
        )


class Given(NamedTuple):
    """What is given for each of B images; None leaves it to the sampler."""

    labels: Tensor | None  # classes [B]; without them generation is unconditional
    orders: Tensor | None  # [B, L]; tokens are taken from the end
    seeds: Sequence[int] | None  # of each image's random numbers
    tokens: Tensor | None  # values [B, L, C]; those count that `known` marks
    known: (
        Tensor | None
    )  # [B, L], true where a token is kept; counting them waits for a device that it is on

    def images(self, rows: Sequence[int]) -> "Given":
        """What is given for the images numbered ``rows``."""
        seeds = self.seeds if self.seeds is None else [self.seeds[row] for row in rows]
        # Row by row: a list of rows would be a tensor that the device is waited for to take.
        tensors = {name: x for name, x in self._asdict().items() if isinstance(x, Tensor)}
        chosen = {name: torch.stack([x[row] for row in rows]) for name, x in tensors.items()}
        return self._replace(**chosen, seeds=seeds)


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
        masked = max(
            1, min(masked - 1, math.floor(seq_len * math.cos(math.pi / 2 * (step + 1) / num_iter)))
        )
        schedule.append(masked)
    return schedule


def sampling_plan(options: SamplingOptions, seq_len: int, unknown: int | None = None) -> list[Step]:
    """The steps that generate ``unknown`` tokens, by default all L, each at least one; others are left out.

    The guidance scale is ``options.cfg``, or with the ``"linear"`` schedule 1 + (cfg - 1) times the share of tokens
    known after the step; the last step counts one as unknown, as in MAR.
    """
    before = seq_len if unknown is None else unknown
    plan = []
    for step, masked in enumerate(mask_schedule(options.num_iter, before)):
        linear = 1 + (options.cfg - 1) * (seq_len - masked) / seq_len
        left = 0 if step == options.num_iter - 1 else masked
        if left < before:
            plan.append(
                Step(before, left, options.cfg if options.cfg_schedule == "constant" else linear)
            )
            before = left
    return plan


# --------------------------------------------------------------------------------------------------------------------
# The parts of a step.


def initial_orders(order: str, draws: ImageDraws, seq_len: int) -> Tensor:
    """Orders ``[B, L]``, from whose ends tokens are taken: at random, or row by row.

    By confidence, where every step sorts the unknown tokens anew, the initial order does not matter.
    """
    if order == "random":
        return draws.uniform(seq_len).argsort(dim=1)
    return torch.arange(seq_len - 1, -1, -1, device=draws.device).expand(draws.bsz, -1)


def class_embeddings(
    backbone: MaskedBackbone, bsz: int, labels: Tensor | None, cfg: float
) -> Tensor:
    """Class embeddings ``[B, D]``; with guidance ``[2B, D]``, conditional ones, then unconditional ones."""
    unconditional = backbone.fake_latent.expand(bsz, -1)
    if labels is None:
        return unconditional  # with guidance, too: both halves would be the same
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
    """Features ``[B, W, D]`` at the ``wanted [B, W]`` positions, guided: z_u + guidance (z_c - z_u).

    They follow from the tokens ``[B, L, C]`` at the ``known [B, N]`` positions, and from :func:`class_embeddings`,
    whose two halves go through the backbone in one batch.
    """
    halves = len(classes) // len(tokens)
    features = backbone(
        tokens.repeat(halves, 1, 1), known.repeat(halves, 1), classes, wanted.repeat(halves, 1)
    )
    if halves == 1:
        return features
    conditional, unconditional = features.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


# --------------------------------------------------------------------------------------------------------------------
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
    """Token values ``[B, L, C]``, and the joint log-probability ``[B, L]`` that each had when it was taken.

    Images with different numbers of known tokens take their steps apart, and ``on_step`` hears of each group.

    Raises:
        ValueError: orders are given for an order by confidence; see also :func:`check_head_options` and the head's
            ``sample``.
    """
    check_head_options(head, options)
    if options.order == "confidence" and given.orders is not None:
        raise ValueError("with order='confidence' tokens find their own order: leave orders out")
    if given.known is None:
        return generate(backbone, head, quantizer, bsz, given, options, on_step=on_step)
    # Images with equally many known tokens make a batch: all its shapes follow from their number.
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
    """:func:`sample_tokens` for images that have ``known_count`` given tokens each."""
    device, length, by_confidence = (
        backbone.fake_latent.device,
        backbone.seq_len,
        options.order == "confidence",
    )
    draws = ImageDraws(bsz, device, given.seeds)
    orders = initial_orders(
        options.order, draws, length
    )  # drawn in any case: later numbers do not depend on it
    orders = orders if given.orders is None else to_device(given.orders, device)
    tokens = torch.zeros(bsz, length, head.channels, device=device)
    if given.known is not None and given.tokens is not None:
        is_known = to_device(given.known, device)
        tokens = torch.where(is_known[..., None], given.tokens, tokens)
        orders = orders.gather(
            1, is_known.gather(1, orders).int().argsort(dim=1, stable=True)
        )  # known ones last
    classes = class_embeddings(backbone, bsz, given.labels, options.cfg)
    confidence = torch.zeros(bsz, length, device=device)

    plan = sampling_plan(options, length, length - known_count)
    uniforms = draws.uniform(length, head.numbers)
    of_head = {name: getattr(options, name) for name in head.sampling_options}
    for number, step in enumerate(plan):
        known = orders[:, step.masked :]
        # By confidence all unknown tokens are sampled, and most of them dropped.
        wanted = orders[:, 0 if by_confidence else step.left : step.masked]
        features = guided_features(backbone, tokens, known, classes, wanted, step.guidance).flatten(
            0, 1
        )  # [M, D]
        uniform = gather_tokens(uniforms, wanted).flatten(
            0, 1
        )  # [M, S] or more, S steps of the head
        levels, log_probs = head.sample(features, options.temperature, uniform, **of_head)
        new, log_probs = (
            quantizer.dequantize(levels).unflatten(0, (bsz, -1)),
            log_probs.unflatten(0, (bsz, -1)),
        )
        if by_confidence:
            score = log_probs
            if options.confidence_noise:
                noise = -torch.log(
                    -torch.log(draws.uniform(length).clamp(1e-20, 1 - 1e-7))
                )  # Gumbel, [B, L]
                scale = options.confidence_noise * (1 - (number + 1) / len(plan))
                score = score + scale * noise.gather(1, wanted)
            ranked = score.argsort(dim=1, stable=True)  # the most confident last
            orders = torch.cat([wanted.gather(1, ranked), known], dim=1)
            taken = ranked[:, step.left :]
            wanted, log_probs, new = (
                wanted.gather(1, taken),
                log_probs.gather(1, taken),
                gather_tokens(new, taken),
            )
            uniforms = draws.uniform(length, head.numbers)
        tokens = tokens.scatter(1, wanted[..., None].expand(-1, -1, head.channels), new)
        confidence = confidence.scatter(1, wanted, log_probs)
        if on_step is not None:
            on_step(number + 1, len(plan), tokens, orders[:, : step.left])
    return tokens, confidence
