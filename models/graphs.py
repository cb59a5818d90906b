"""CUDA graphs: what takes thousands of small kernels, recorded once for each size and replayed with one launch."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

#: Rows up to which the head waits for launches, not for its products; more go through as they are.
RECORDED_ROWS = 256


def cuda_graph(work: Callable[[], tuple[Tensor, ...]], pool: Any) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Records ``work``, which must not wait for the device: what replays it, and the outputs each replay writes.

    Args:
        pool: memory that recordings share, each of which is done with it before another starts.
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
    """Replays of a function of tensors, one for each power of two rows and each setting.

    Args:
        record: as :func:`cuda_graph`.
    """

    def __init__(self, record: Callable = cuda_graph):
        self.record = record
        self.kept: dict[tuple, tuple] = {}
        self.pool = torch.cuda.graph_pool_handle() if record is cuda_graph else None

    def __deepcopy__(self, memo: dict) -> "Recordings":
        return Recordings(self.record)  # a copy has weights of its own

    def __call__(self, work: Callable[..., tuple[Tensor, ...]], *inputs: Tensor, key: tuple[Any, ...]):
        """``work(*inputs)``: tensors whose rows belong to the inputs' rows, each for itself.

        Args:
            key: what else the result depends on; recordings are shared where it is equal.
        """
        rows = len(inputs[0])
        size = 1 << (rows - 1).bit_length()
        kind = inputs[0].device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        key = (size, autocast, *(given.dtype for given in inputs), *key)
        if key not in self.kept:
            on_device = torch.cuda.device(inputs[0].device) if kind == "cuda" else nullcontext()
            # What is kept is written again and again, within inference mode and without.
            with on_device, torch.inference_mode(False), torch.no_grad():
                places = [torch.zeros(size, *each.shape[1:], dtype=each.dtype, device=each.device) for each in inputs]
                self.kept[key] = places, *self.record(partial(work, *places), self.pool)
        places, replay, outputs = self.kept[key]
        for place, given in zip(places, inputs, strict=True):
            place[:rows].copy_(given)
        replay()
        return tuple(output[:rows].clone() for output in outputs)
