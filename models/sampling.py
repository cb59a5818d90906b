"""Generation (section 3.3, inference), planned on the CPU, run without synchronization."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.backbone import MaskedBackbone, gather_tokens
from models.channel_head import Head
from models.heads import HEADS, option_owners
from models.quantizer import ScalarQuantizer
from util.devices import to_device
from util.options import check_choices, check_numbers, option
from util.rng import ImageDraws

#: Guidance scale of a step, from ``cfg`` and the numbers of known and of all tokens after it.
SCHEDULES: dict[str, Callable[[float, int, int], float]] = {
    "linear": lambda cfg, known, tokens: 1 + (cfg - 1) * known / tokens,
    "constant": lambda cfg, known, tokens: cfg,
}
#: Called after each step with its number from 1, the number of steps, the values of tokens
#: ``[B, L, C]`` (0 if unknown) and the positions ``[B, N]`` that are still unknown, on the device.
OnStep = Callable[[int, int, Tensor, Tensor], None]

# --------------------------------------------------------------------------------------------------
# Schedules: how many tokens the steps take.


def two_stage_schedule(num_iter: int, seq_len: int) -> list[int]:
    """Return the number of tokens that are still masked after each step, in two stages.

    The first three quarters of the steps take half of the tokens, the others the rest; each stage
    takes about equally many tokens per step. The last entry is 1, as in :func:`cosine_schedule`.
    """
    second = num_iter // 4 or num_iter // 2
    first, half = num_iter - second, seq_len // 2 if second else 0
    taken = [(seq_len - half) * (step + 1) // first for step in range(first)]
    taken += [seq_len - half + half * (step + 1) // second for step in range(second)]
    return [max(1, seq_len - count) for count in taken]


def cosine_schedule(num_iter: int, seq_len: int) -> list[int]:
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


#: Number of unknown tokens after each step, from the number of steps and of unknown tokens.
STEP_SCHEDULES: dict[str, Callable[[int, int], list[int]]] = {
    "cosine": cosine_schedule,
    "two-stage": two_stage_schedule,
}

# --------------------------------------------------------------------------------------------------
# Orders of B images: positions [B, L], of which steps take the last unknown ones.


def random_order(draws: ImageDraws, seq_len: int) -> Tensor:
    """Return a random order for each image, as in MAR."""
    return draws.uniform(seq_len).argsort(dim=1)


def raster_order(draws: ImageDraws, seq_len: int) -> Tensor:
    """Return the order row by row."""
    return torch.arange(seq_len - 1, -1, -1, device=draws.device).expand(draws.bsz, -1)


@cache
def halton_positions(side: int) -> list[int]:
    """Return all positions of a square grid in the order of a Halton sequence (bases 2 and 3).

    Any first few of them are spread well (Halton-MaskGIT, Besnier et al. 2025).
    """

    def digits_reversed(number: int, base: int) -> float:
        value, scale = 0.0, 1.0
        while number:
            scale /= base
            value += scale * (number % base)
            number //= base
        return value

    positions: dict[int, None] = {}
    number = 0
    while len(positions) < side**2:
        number += 1
        row, column = (int(side * digits_reversed(number, base)) for base in (2, 3))
        positions[row * side + column] = None
    return list(positions)


def halton_order(draws: ImageDraws, seq_len: int) -> Tensor:
    """Return :func:`halton_positions`, shifted around the edges at random."""
    side = math.isqrt(seq_len)
    positions = torch.tensor(halton_positions(side)[::-1], device=draws.device)
    shift = (draws.uniform(2) * side).long()  # [B, 2]
    rows = (positions // side + shift[:, :1]) % side
    return rows * side + (positions % side + shift[:, 1:]) % side


def checkerboard_order(draws: ImageDraws, seq_len: int) -> Tensor:
    """Return a random order in which all squares of one color come first."""
    side = math.isqrt(seq_len)
    numbers = torch.arange(seq_len, device=draws.device)
    second = (numbers // side + numbers % side) % 2
    return (draws.uniform(seq_len) - second).argsort(dim=1)


#: Orders of tokens. By confidence, every step sorts the unknown tokens: any first order will do.
ORDERS: dict[str, Callable[[ImageDraws, int], Tensor]] = {
    "random": random_order,
    "raster": raster_order,
    "halton": halton_order,
    "confidence": raster_order,
}

# --------------------------------------------------------------------------------------------------
# Options: each is declared once, here or by its head, with its default and the help of its flag.


@dataclass(frozen=True)
class TokenOptions:
    """Sampling options that do not depend on the head.

    Raises:
        ValueError: an option outside its range.
    """

    # Commands that evaluate take 256 steps by default, as the release's; calls from Python 64.
    num_iter: int = option(64, "autoregressive steps", default=256)
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
        "order of tokens: random, row by row, well spread (a Halton sequence, at a random offset), "
        "or the most confident first (Figure 8)",
        choices=tuple(ORDERS),
    )
    confidence_noise: float = option(
        0.0, "scale of the Gumbel noise on confidences, which falls to 0 over the steps"
    )
    step_schedule: str = option(
        "cosine",
        "tokens that the steps take: by a cosine; or, in two stages, half of the tokens in a "
        "checkerboard over three quarters of the steps, then the other half",
        choices=tuple(STEP_SCHEDULES),
    )
    cfg_interval: tuple[float, float] = option(
        (0.0, 1.0),
        "guide only the steps that start with a share of known tokens from LOW to below HIGH; the "
        "other steps take half of the operations",
        nargs=2,
        metavar=("LOW", "HIGH"),
    )
    cfg_reuse: int = option(
        1,
        "compute the difference between conditional and unconditional features in every N-th "
        "guided step only, and reuse it in the others",
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.num_iter < 1:
            raise ValueError(f"sampling needs at least one step, got num_iter={self.num_iter}")
        if min(self.cfg, self.temperature, self.confidence_noise) < 0:
            numbers = f"{self.cfg}, {self.temperature}, {self.confidence_noise}"
            raise ValueError(
                f"cfg, temperature and confidence_noise must not be negative, got {numbers}"
            )
        low, high = self.cfg_interval
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"cfg_interval is {low:g} to {high:g}: LOW and HIGH are shares of tokens, "
                "0 <= LOW < HIGH <= 1"
            )
        if self.cfg_reuse < 1:
            raise ValueError(f"cfg_reuse is a number of steps, at least 1, not {self.cfg_reuse}")
        if self.step_schedule == "two-stage" and self.order != "random":
            raise ValueError(
                f"the two-stage schedule has an order of its own: remove --order {self.order}"
            )
        if self.confidence_noise and self.order != "confidence":
            raise ValueError("confidence_noise only applies to --order confidence. Remove it.")
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
    both_halves: bool  # computes the unconditional features, too


def sampling_plan(
    options: TokenOptions, seq_len: int, unknown: int | None = None
) -> list[SamplingStep]:
    """Return the steps that generate ``unknown`` tokens, by default all L.

    Steps that take no token are left out.
    Guidance follows :data:`SCHEDULES`; the last step counts one token as unknown, as in MAR. It is
    1 outside ``options.cfg_interval``. Every ``options.cfg_reuse``-th guided step computes both
    halves.

    Raises:
        ValueError: a two-stage schedule has more steps than there are tokens.
    """
    if options.step_schedule == "two-stage" and options.num_iter > seq_len:
        raise ValueError(
            f"a two-stage schedule has at most {seq_len} steps, the number of tokens, "
            f"not {options.num_iter}"
        )
    guidance = SCHEDULES[options.cfg_schedule]
    low, high = options.cfg_interval
    before = seq_len if unknown is None else unknown
    guided_steps, plan = 0, []
    for step, masked in enumerate(STEP_SCHEDULES[options.step_schedule](options.num_iter, before)):
        left = 0 if step == options.num_iter - 1 else masked
        if left < before:
            scale = guidance(options.cfg, seq_len - masked, seq_len)
            if not low <= (seq_len - before) / seq_len < high:
                scale = 1.0
            both_halves = scale != 1.0 and guided_steps % options.cfg_reuse == 0
            guided_steps += scale != 1.0
            plan.append(SamplingStep(before, left, scale, both_halves))
            before = left
    return plan


# --------------------------------------------------------------------------------------------------
# The parts of a step.


def class_embeddings(
    backbone: MaskedBackbone, bsz: int, labels: Tensor | None, cfg: float
) -> Tensor:
    """Return class embeddings ``[B, D]``; with guidance ``[2B, D]``, the conditional ones first."""
    unconditional = backbone.fake_latent.expand(bsz, -1)
    if labels is None:
        return unconditional  # also with guidance: both halves would be equal
    conditional = backbone.class_emb(to_device(labels, unconditional.device))
    return conditional if cfg == 1.0 else torch.cat([conditional, unconditional])


class GuidedFeatures:
    """Computes features with guidance: z_u + guidance (z_c - z_u).

    Args:
        classes: output of :func:`class_embeddings`; both halves go through the backbone in one
            batch.
        reuse: whether a guided step may read the z_c - z_u of an earlier one, which is then
            computed at all unknown positions.
    """

    def __init__(self, backbone: MaskedBackbone, classes: Tensor, reuse: bool):
        self.backbone, self.classes, self.reuse = backbone, classes, reuse
        self.difference: Tensor | None = None  # z_c - z_u of all positions, [B, L, D]

    def __call__(
        self, tokens: Tensor, orders: Tensor, step: SamplingStep, first_wanted: int
    ) -> Tensor:
        """Return features ``[B, W, D]`` at the positions ``orders[:, first_wanted:step.masked]``.

        Args:
            tokens: ``[B, L, C]``, of which the known ones are read.
            orders: ``[B, L]``, the unknown tokens first.
        """
        bsz = len(tokens)
        known, wanted = orders[:, step.masked :], orders[:, first_wanted : step.masked]
        if len(self.classes) == bsz or not step.both_halves:
            conditional = self.backbone(tokens, known, self.classes[:bsz], wanted)
            if step.guidance == 1.0 or self.difference is None:
                return conditional
            difference = gather_tokens(self.difference, wanted)
            return conditional + (step.guidance - 1) * difference
        positions = orders[:, : step.masked] if self.reuse else wanted
        halves = tokens.repeat(2, 1, 1), known.repeat(2, 1), self.classes, positions.repeat(2, 1)
        conditional, unconditional = self.backbone(*halves).chunk(2)
        difference = conditional - unconditional
        if self.reuse:
            index = positions[..., None].expand_as(difference)
            empty = difference.new_zeros(bsz, tokens.shape[1], difference.shape[2])
            self.difference = empty.scatter(1, index, difference)
            unconditional, difference = (x[:, first_wanted:] for x in (unconditional, difference))
        return unconditional + step.guidance * difference


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
        ValueError: orders are given, and the options choose another; see also
            :func:`check_head_options`.
    """
    check_head_options(head, options)
    chosen = options.order if options.order != "random" else options.step_schedule
    if chosen not in ("random", "cosine") and given.orders is not None:
        raise ValueError(f"'{chosen}' chooses its own order: do not pass orders")
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
    two_stage = options.step_schedule == "two-stage"
    orders = (checkerboard_order if two_stage else ORDERS[options.order])(draws, length)
    orders = orders if given.orders is None else to_device(given.orders, device)
    tokens = torch.zeros(bsz, length, head.channels, device=device)
    if given.known is not None and given.tokens is not None:
        is_known = to_device(given.known, device)
        tokens = torch.where(is_known[..., None], given.tokens, tokens)
        known_last = is_known.gather(1, orders).int().argsort(dim=1, stable=True)
        orders = orders.gather(1, known_last)
    classes = class_embeddings(backbone, bsz, given.labels, options.cfg)
    guided_features = GuidedFeatures(backbone, classes, options.cfg_reuse > 1)
    confidence = torch.zeros(bsz, length, device=device)

    plan = sampling_plan(options, length, length - known_count)
    uniforms = draws.uniform(length, head.sample_numbers)
    head_options = {name: getattr(options, name) for name in head.option_names()}
    for number, step in enumerate(plan):
        known = orders[:, step.masked :]
        # By confidence all unknown tokens are sampled, and most of them dropped.
        first_wanted = 0 if by_confidence else step.left
        wanted = orders[:, first_wanted : step.masked]
        features = guided_features(tokens, orders, step, first_wanted)
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
