"""Autocast, float64 where a device has it, and checks for NaN."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from util.errors import (
    NotFinite,
)
from util.log import log, warn

CPUINFO = Path("/proc/cpuinfo")
#: How a CPU's instructions for products of bf16 and fp16 show: checks of torch.cpu, which has others in each version,
#: and flags of Linux (the last one ARM's).
INSTRUCTIONS = {
    "bf16": (
        ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        {"avx512_bf16", "amx_bf16", "bf16"},
    ),
    "fp16": (("_is_amx_fp16_supported",), {"avx512_fp16", "amx_fp16", "asimdhp"}),
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


NO_FLOAT64 = {"mps"}  # types of devices
# Of torch\'s two interfaces to TF32, the older one exists in all versions and also sets the newer one.
# They must not be mixed. Some versions call the older one deprecated.
warnings.filterwarnings("ignore", "Please use the new API settings to control TF32")


@cache
def cpu_multiplies(precision: str) -> bool:
    """Return whether this CPU has instructions for matrix products in ``precision``, ``"bf16"`` or ``"fp16"``.

    Without them PyTorch emulates such products, which takes longer than fp32. False if neither torch nor Linux reports
    any. The answer is not measured: all ranks of a run, and a run and its resumption, must get the same one.
    """
    checks, flags = INSTRUCTIONS[precision]
    known = [getattr(torch.cpu, check)() for check in checks if hasattr(torch.cpu, check)]
    listed = CPUINFO.read_text().split() if CPUINFO.exists() else []
    return any(known) or not flags.isdisjoint(listed)


@lru_cache
def effective_precision(device_type: str, precision: str) -> str:
    """Return ``precision``, but fp32 instead of bf16 on CPUs without bf16 instructions.

    There PyTorch emulates bf16 products: with AVX-512 at a fifth of the rate of fp32, with less at a hundredth.
    """
    if device_type != "cpu" or precision == "fp32" or cpu_multiplies(precision):
        return precision
    if precision == "bf16":
        log.info(
            "this CPU has no bf16 instructions: bf16 runs as fp32, which is faster and more exact"
        )
        return "fp32"
    warn("this CPU has no fp16 instructions, PyTorch emulates them: --precision fp32 is faster")
    return precision


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Within the block, compute float32 convolutions on CUDA in float32.

    PyTorch's default is TF32, whose mantissa has 10 bits. (Matrix products are in float32 by default.)
    """
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Autocast for a ``--precision``: of ``bf16`` or ``fp16``; ``fp32`` means none, and :func:`exact_convolutions`.

    See :func:`effective_precision`.
    """
    precision = effective_precision(device.type, precision)
    if precision == "fp32":
        return exact_convolutions() if device.type == "cuda" else nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[precision])


def double(x: Tensor) -> Tensor:
    """Return ``x`` in float64: on its device, or on the CPU if the device is an Apple GPU, which has no float64."""
    return (x.cpu() if x.device.type in NO_FLOAT64 else x).double()


def extremes(values: Tensor) -> Tensor:
    """Return the least and the greatest of ``values``, float64 ``[2]``: both are finite exactly if all values are."""
    return double(torch.stack(values.detach().aminmax()))


def check_finite(values: Tensor, stage: str, precision: str, flag: str = "--precision") -> None:
    """Check what a stage of the model computed; values on a device are waited for.

    Args:
        stage: its name, for the message.
        precision: ``bf16``, ``fp16`` or ``fp32``, which it computed in.
        flag: the flag that sets this precision.

    Raises:
        NotFinite: one of the values is NaN or infinite.
    """
    if values.isfinite().all():
        return
    advice = {
        "fp16": f"pass {flag} fp32 or bf16, which do not overflow",
        "bf16": f"pass {flag} fp32; if it stays, the weights are at fault",
        "fp32": "the weights are at fault, or what it was given",
    }
    raise NotFinite(f"{stage} computed NaN or infinity in {precision}: {advice[precision]}")
