"""Autocast, float64 on devices that support it, and checks for NaN."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from util.errors import NotFinite
from util.log import log, warn

CPUINFO = Path("/proc/cpuinfo")
#: How to detect a CPU's instructions for products of bf16 and fp16: checks in torch.cpu, which
#: differ between versions of torch, and flags in Linux's cpuinfo (the last one is ARM's).
INSTRUCTIONS = {
    "bf16": (
        ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
        {"avx512_bf16", "amx_bf16", "bf16"},
    ),
    "fp16": (("_is_amx_fp16_supported",), {"avx512_fp16", "amx_fp16", "asimdhp"}),
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Device types without float64
NO_FLOAT64 = {"mps"}

# torch has two interfaces to TF32, which must not be mixed. The older one exists in all versions
# and also sets the newer one. Some versions call it deprecated.
warnings.filterwarnings("ignore", "Please use the new API settings to control TF32")


@cache
def cpu_multiplies(precision: str) -> bool:
    """Return whether this CPU has matrix-product instructions for ``"bf16"`` or ``"fp16"``.

    Without them PyTorch emulates such products, which takes longer than fp32. The result is False
    if neither torch nor Linux reports any. Nothing is measured: all ranks of a run, and a run and
    its resumption, must get the same result.
    """
    checks, flags = INSTRUCTIONS[precision]
    known = [getattr(torch.cpu, check)() for check in checks if hasattr(torch.cpu, check)]
    listed = CPUINFO.read_text().split() if CPUINFO.exists() else []
    return any(known) or not flags.isdisjoint(listed)


@lru_cache
def effective_precision(device_type: str, precision: str) -> str:
    """Return ``precision``, but fp32 instead of bf16 on CPUs without bf16 instructions.

    Such CPUs emulate bf16 products: with AVX-512 at a fifth of the speed of fp32, without it at a
    hundredth.
    """
    if device_type != "cpu" or precision == "fp32" or cpu_multiplies(precision):
        return precision
    if precision == "bf16":
        log.info(
            "this CPU has no bf16 instructions: bf16 runs as fp32, which is faster and more precise"
        )
        return "fp32"
    warn("this CPU has no fp16 instructions, and PyTorch emulates them: --precision fp32 is faster")
    return precision


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Compute float32 convolutions on CUDA in float32 within the block.

    PyTorch's default is TF32, whose mantissa has 10 bits. (Matrix products are in float32 by
    default.)
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return a context manager for :func:`effective_precision` of a ``--precision``.

    With ``bf16`` or ``fp16`` it is torch's autocast, with ``fp32`` :func:`exact_convolutions`.
    """
    precision = effective_precision(device.type, precision)
    if precision == "fp32":
        return exact_convolutions() if device.type == "cuda" else nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[precision])


def double(x: Tensor) -> Tensor:
    """Return ``x`` in float64, on its device or, as Apple GPUs have no float64, on the CPU."""
    return (x.cpu() if x.device.type in NO_FLOAT64 else x).double()


def extremes(values: Tensor) -> Tensor:
    """Return minimum and maximum of ``values``, float64 ``[2]``.

    Both are finite if and only if all values are.
    """
    return double(torch.stack(values.detach().aminmax()))


def check_finite(values: Tensor, stage: str, precision: str, flag: str = "--precision") -> None:
    """Check the output of a stage of the model for NaN and infinity. This waits for the device.

    Args:
        values: the output.
        stage: the name of the stage, for the message.
        precision: the precision of the stage: ``bf16``, ``fp16`` or ``fp32``.
        flag: the flag that sets this precision.

    Raises:
        NotFinite: a value is NaN or infinite.
    """
    if values.isfinite().all():
        return
    advice = {
        "fp16": f"pass {flag} fp32 or bf16, which do not overflow",
        "bf16": f"pass {flag} fp32; if that does not help, the weights are at fault",
        "fp32": "the weights or the input are at fault",
    }
    raise NotFinite(f"{stage} computed NaN or infinity in {precision}: {advice[precision]}")
