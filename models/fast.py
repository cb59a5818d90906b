"""Speed and memory: the head's loss in parts, CUDA graphs, and weights prepared for sampling."""

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

#: Largest number of elements of AdaLN modulations and logits in sampling; more tokens are sampled
#: in parts.
MODULATION_BUDGET = 2**28
#: Largest number of elements (tokens x sequence length x width of the head) in training, by device.
TRAINING_BUDGET = {"cpu": 2**22, "cuda": 2**25}
#: Tokens up to which sampling is bound by kernel launches and is recorded; more are sampled without
#: a recording.
RECORDED_ROWS = 256
#: Names of the processors that the packed layout was measured on.
X86 = ("x86_64", "amd64")


class LossInParts(torch.autograd.Function):
    """The head's loss and its gradients, ``rows`` tokens at a time, to save memory.

    These activations are most of a training step's memory, with 16 channel steps per token. Nothing
    is computed twice: gradients are taken while a part's activations exist, and scaled in the
    backward pass. They are gradients of the sum of losses: at the logits within [-1, 1] (the masked
    head's within [-S, S]), which fp16 represents whatever the scale of the loss, which is only
    known in the backward pass.
    """

    @staticmethod
    def forward(
        ctx, head: Any, rows: int, features: Tensor, given: Tensor, *learned: Tensor
    ) -> Tensor:
        total = torch.zeros((), device=features.device)
        for_backbone = ctx.needs_input_grad[2]  # not if the backbone is frozen
        feature_grads, sums = [], []
        for z, part in zip(features.split(rows), given.split(rows), strict=True):
            with torch.enable_grad():
                z = z.detach().requires_grad_(for_backbone)
                loss = head.summed_loss(z, part)
            # As every backward pass: with autocast, sums over rows would be of float32 copies.
            with torch.autocast(features.device.type, enabled=False):
                grads = list(
                    torch.autograd.grad(
                        loss, [*[z] * for_backbone, *learned], materialize_grads=True
                    )
                )
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


def loss_in_parts(head: Any, features: Tensor, given: Tensor) -> Tensor:
    """Return the mean loss over tokens and channel steps, computed in parts that fit in memory.

    Args:
        features: ``[M, D]`` of the backbone, one row per token.
        given: the second argument of ``head.summed_loss``, one row per token.
    """
    learned = [parameter for parameter in head.parameters() if parameter.requires_grad]
    rows = max(
        1, TRAINING_BUDGET.get(features.device.type, 2**25) // (head.sequence_length * head.dim)
    )
    training = torch.is_grad_enabled() and (features.requires_grad or learned)
    if len(features) <= rows or not training:
        return head.summed_loss(features, given) / (len(features) * head.channel_steps)
    return LossInParts.apply(head, rows, features, given, *learned)


def cuda_graph(
    work: Callable[[], tuple[Tensor, ...]], pool: Any
) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Record ``work`` as a CUDA graph; return the function that replays it, and its outputs.

    Recordings share the memory of ``pool``: each has finished with it before another starts.

    Args:
        work: must not synchronize with the device.
    """
    # Autocast's copies of weights must lie in the graph's own memory, and be used in no other.
    torch.clear_autocast_cache()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):  # libraries choose kernels and allocate when they are first called
            work()
    torch.cuda.current_stream().wait_stream(aside)
    torch.clear_autocast_cache()
    graph = torch.cuda.CUDAGraph()
    # Other threads, of loaders and collectives, may use CUDA at the same time.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outputs = work()
    torch.clear_autocast_cache()
    return graph.replay, outputs


class Recordings:
    """Records functions of tensors, once per power of two rows and per setting, and replays them.

    A recording by :func:`cuda_graph` launches thousands of small kernels as one.
    """

    def __init__(self, record: Callable = cuda_graph):
        self.record = record
        self.kept: dict[tuple, tuple] = {}
        self.pool = torch.cuda.graph_pool_handle() if record is cuda_graph else None

    def __deepcopy__(self, memo: dict) -> "Recordings":
        return Recordings(self.record)  # a copy has weights of its own

    def __call__(
        self, work: Callable[..., tuple[Tensor, ...]], *inputs: Tensor, key: tuple[Any, ...]
    ):
        """Return ``work(*inputs)``, whose rows depend on that row of the inputs and on ``key``."""
        rows = len(inputs[0])
        size = 1 << (rows - 1).bit_length()
        kind = inputs[0].device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        key = (size, autocast, *(given.dtype for given in inputs), *key)
        if key not in self.kept:
            on_device = torch.cuda.device(inputs[0].device) if kind == "cuda" else nullcontext()
            # Replays write to these tensors inside inference mode and outside of it.
            with on_device, torch.inference_mode(False), torch.no_grad():
                buffers = [
                    torch.zeros(size, *each.shape[1:], dtype=each.dtype, device=each.device)
                    for each in inputs
                ]
                self.kept[key] = buffers, *self.record(partial(work, *buffers), self.pool)
        buffers, replay, outputs = self.kept[key]
        for buffer, given in zip(buffers, inputs, strict=True):
            buffer[:rows].copy_(given)
        replay()
        return tuple(output[:rows].clone() for output in outputs)


@cache
def compiled(method: Callable) -> Callable:
    """Return a method of a class compiled by ``torch.compile``, for any number of tokens.

    All blocks of a class share it. A copy of a block, such as the EMA's, runs it with weights of
    its own.
    """
    return torch.compile(method, dynamic=True)


def packed_linear(linear: nn.Linear, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return the function of a linear layer with weights of type ``dtype`` in oneDNN's layout."""
    weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype))
    bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, "none", [], "")

    return forward


def can_pack(dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies matrices of this type on this CPU."""
    if not torch.backends.mkldnn.is_available() or platform.machine().lower() not in X86:
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@contextmanager
def prepared_weights(
    model: nn.Module, device: torch.device, compiled: bool = False
) -> Iterator[None]:
    """Prepare a model's weights once for many passes without gradients within the block.

    On x86 CPUs, linear layers multiply with oneDNN and packed weights: in bf16 they need not be
    packed in each pass, and in float32 PyTorch otherwise multiplies with MKL, which takes 2 to 4
    times as long on AMD's CPUs. Elsewhere, autocast keeps its copies of frozen weights.

    Args:
        compiled: whether parts of the model are, which oneDNN's products cannot be.
    """
    cast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if cast else torch.float32
    linears: list[Any] = []
    if device.type == "cpu" and can_pack(dtype) and not compiled:
        linears = [module for module in model.modules() if type(module) is nn.Linear]
    frozen = [weight for weight in model.parameters() if cast and not weight.requires_grad]
    for linear in linears:
        linear.forward = packed_linear(linear, dtype)
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for linear in linears:
            vars(linear).pop("forward", None)  # another thread may have removed it
        for weight in frozen:
            weight.requires_grad_(False)
