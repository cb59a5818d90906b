"""A CUDA device that computes nothing, so that tests see without a GPU what only a GPU would show.

Within :class:`FakeCuda` a tensor of the device has shape and type, but no content; tensors of the host are real. An
operation on tensors of both raises, and so does what makes the host wait for the device: reading a number, a shape that
follows from content, and a copy from one to the other unless it is ``non_blocking`` and the host's memory is pinned.
(CUDA may begin a copy from other memory by waiting for everything that the device still has to do.)
"""

import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten


class WrongPlace(AssertionError):
    """A tensor of the host where one of the device belongs."""


class HiddenWait(AssertionError):
    """The host would wait for the device."""


def site() -> str:
    """The innermost function of the project that is running, tests left out."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        ours = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] not in (
            "tests",
            ".venv",
        )
        if ours and not frame.f_code.co_name.startswith(
            "<"
        ):  # a comprehension belongs to its function
            return frame.f_code.co_name
        frame = frame.f_back
    return "the test"


class FakeCuda(TorchDispatchMode):
    """A context manager: within it CUDA is there, and nothing may wait for it that is not announced.

    Args:
        waits: functions of the project in which the host waits by design, once for each time they are named.

    Raises:
        HiddenWait: at a wait that is not announced; and in the end, if an announced one did not happen.
        WrongPlace: at an operation on tensors of both sides.
    """

    def __init__(self, *waits: str):
        super().__init__()
        self.fake, self.announced, self.patches = FakeTensorMode(), list(waits), ExitStack()

    def __enter__(self) -> "FakeCuda":
        enter = self.patches.enter_context
        enter(self.fake)
        answers = {
            "amp.common.amp_definitely_not_available": False,
            "is_bf16_supported": True,
        }  # what autocast asks
        for name, answer in answers.items():
            enter(mock.patch(f"torch.cuda.{name}", lambda *_, answer=answer, **__: answer))
        event = enter(mock.patch("torch.cuda.Event")).return_value
        event.synchronize.side_effect = lambda: self.wait("an event")
        enter(mock.patch("torch.cuda.device", nullcontext))
        enter(mock.patch("torch.Generator", lambda device=None, kind=torch.Generator: kind()))
        enter(mock.patch.object(FakeTensor, "__deepcopy__", copied))
        enter(
            mock.patch.object(FakeTensor, "tolist", lambda x: x.cpu().tolist())
        )  # its own reads them one by one
        enter(mock.patch("torch.autograd.grad", grad))
        enter(mock.patch("torch.Tensor.backward", backward))
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self.patches.close()
        if self.announced and exception[0] is None:
            raise HiddenWait(f"no wait in {', '.join(self.announced)}")

    def wait(self, what: str) -> None:
        where = site()
        if where not in self.announced:
            raise HiddenWait(f"{what} in {where} waits for the device")
        self.announced.remove(where)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if func.namespace == "prim":  # a tensor's device
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = [x for x in tensors if isinstance(x, FakeTensor)]
        target = kwargs.get("device")
        if (
            func is aten._to_copy.default
            and target is not None
            and target.type != tensors[0].device.type
        ):
            return self.moved(func, tensors[0], kwargs)
        if func is aten.copy_.default and 0 < len(on_device) < len(tensors):
            to, source = args[:2]
            from_device = isinstance(source, FakeTensor)
            self.check_copy(to if from_device else source, *args[2:], **kwargs)
            with unset_fake_temporarily():
                return to.fill_(1) if from_device else to
        if func is aten._local_scalar_dense.default and on_device:
            self.wait("reading a number")
            return 1.0 if args[0].is_floating_point() else 1
        writes = func in (aten.index_put.default, aten.index_put_.default) and args[2].numel() > 1
        if writes and any(index is not None and index.dtype == torch.bool for index in args[1]):
            self.wait("a Boolean index to write")
        if on_device or (target is not None and target.type == "cuda"):
            if any(
                x.ndim for x in tensors if not isinstance(x, FakeTensor)
            ):  # one number is handed to the kernel
                raise WrongPlace(f"{func} in {site()} takes tensors of host and device")
            if len(on_device) < len(tensors):
                args, kwargs = tree_map(
                    lambda x: self.fake.from_tensor(x) if type(x) is Tensor else x, (args, kwargs)
                )
            try:
                return func(*args, **kwargs)
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise HiddenWait(f"{func} in {site()} waits for the device") from error
        return on_host(func, args, kwargs)

    def moved(self, func, x: Tensor, kwargs: dict) -> Tensor:
        """A copy of ``x`` on the other side; what comes from the device is 1 everywhere."""
        to_device = kwargs["device"].type == "cuda"
        self.check_copy(x if to_device else None, kwargs.get("non_blocking", False))
        if to_device:
            return func(self.fake.from_tensor(x), **kwargs)
        with unset_fake_temporarily():
            return torch.ones(x.shape, dtype=kwargs.get("dtype") or x.dtype)

    def check_copy(self, host: Tensor | None, non_blocking: bool = False) -> None:
        if not non_blocking or not getattr(host, "pinned", False):
            self.wait("a copy" if not non_blocking else "a copy to or from pageable memory")

    def put(self, model: nn.Module) -> nn.Module:
        """``model``, its weights and buffers on the device."""
        for module in model.modules():
            for name, x in module._parameters.items():
                module._parameters[name] = (
                    x if x is None else nn.Parameter(self.tensor(x), x.requires_grad)
                )
            for name, x in module._buffers.items():
                module._buffers[name] = x if x is None else self.tensor(x)
        return model

    def tensor(self, x: Tensor) -> Tensor:
        """``x`` on the device."""
        return x.detach().pin_memory().to(DEVICE, non_blocking=True)


def on_host(func, args: tuple, kwargs: dict) -> Any:
    """An operation on the host alone; pinned memory, which only CUDA has, is memory with a mark."""
    if func is aten.is_pinned.default:
        return getattr(args[0], "pinned", False)
    pinned = func is aten._pin_memory.default or kwargs.pop("pin_memory", False)
    with unset_fake_temporarily():
        result = args[0].clone() if func is aten._pin_memory.default else func(*args, **kwargs)
    if pinned:
        result.pinned = True
    return result


def copied(x: FakeTensor, memo: dict) -> Tensor:
    """In place of a tensor's deep copy, which would copy the mode."""
    copy = x.detach().clone()
    return memo.setdefault(
        id(x), nn.Parameter(copy, x.requires_grad) if isinstance(x, nn.Parameter) else copy
    )


# --------------------------------------------------------------------------------------------------------------------
# Gradients. PyTorch's engine refuses to start without a GPU; its operations, called one by one, do not.


@torch.no_grad()
def gradients(output: Tensor) -> dict[Tensor, Tensor]:
    """The gradient of the scalar ``output`` for each leaf of its graph."""
    order, seen, stack = [], set(), [(output.grad_fn, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack += [
                (node, True),
                *((after, False) for after, _ in node.next_functions if after is not None),
            ]
    leaves, arrived = {}, {output.grad_fn: {0: torch.ones_like(output)}}
    for node in reversed(order):
        given = arrived.pop(node, {})
        if hasattr(node, "variable"):
            leaves[node.variable] = given[0]
            continue
        given = [given.get(i) for i in range(len(node._input_metadata))]
        edges = node.next_functions
        if hasattr(
            node, "needs_input_grad"
        ):  # an autograd.Function: some of its inputs may be no tensors
            edges = iter(edge for edge in edges if edge[0] is not None)
            edges = [next(edges) if needed else (None, 0) for needed in node.needs_input_grad]
            results = node.apply(*given)
        else:
            results = node(*given)
        results = results if isinstance(results, tuple) else (results,)
        for (after, number), result in zip(edges, results, strict=True):
            if after is not None and result is not None:
                wanted, there = after._input_metadata[number], arrived.setdefault(after, {})
                result = result.sum_to_size(wanted.shape).to(wanted.dtype)
                there[number] = there[number] + result if number in there else result
    return leaves


def grad(output: Tensor, inputs: list[Tensor], materialize_grads: bool) -> list[Tensor]:
    """In place of torch.autograd.grad."""
    found = gradients(output)
    return [found[x] if x in found else torch.zeros_like(x) for x in inputs]


def backward(output: Tensor) -> None:
    """In place of Tensor.backward."""
    for leaf, gradient in gradients(output).items():
        leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
