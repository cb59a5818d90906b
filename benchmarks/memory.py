"""Memory that a training step takes on a GPU, counted without one: tensors have shapes but no content.

Counted are all tensors of a step from images: weights, optimizer, average, gradients, which DDP keeps, activations, and
the tokenizer. Not counted are gaps between them, workspaces of libraries, NCCL and the CUDA context.
"""

import itertools
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import training_state
from engine_tokenbridge import backward
from models import fast
from models.quantizer import GaussianQuantizer
from models.tokenbridge import MODELS
from models.vae import AutoencoderKL
from util import misc
from util.args import new_parser
from util.files import write_json
from util.model_config import CHECKPOINTED, KL16_CONFIG
from util.provenance import provenance
from util.tables import markdown
from util.training_state import TrainingState

#: Columns of the table: parts whose blocks are recomputed.
PARTS = {"none": (), "decoder": ("decoder",), "all": CHECKPOINTED}
#: GB of GPUs, and the GiB that a program can use, about: A100; A100 and H100; H200.
GPUS = {40: 39.4, 80: 79.1, 141: 139.7}
#: GiB for what is not counted but gaps, and the gaps' share.
RESERVE, GAPS = 1.5, 0.1


def smallest_gpu(gib: float) -> int | None:
    """GB of the smallest of :data:`GPUS` where tensors of ``gib`` GiB fit, gaps and :data:`RESERVE` included."""
    return next((gb for gb, usable in GPUS.items() if gib * (1 + GAPS) + RESERVE <= usable), None)


class PeakMemory(TorchDispatchMode):
    """Within it, ``live`` and ``peak`` count the bytes of all tensors that operations made and something holds."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage for as long as a tensor holds it."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known[key] = weakref.ref(storage, lambda _: self.remove(key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def remove(self, key: int, size: int) -> None:
        """Forgets a storage."""
        del self.known[key]
        self.live -= size


@contextmanager
def kernels_of_cuda() -> Iterator[None]:
    """Lets tensors without content go the ways of CUDA, although they are the host's: autograd takes no others here."""

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask=None, dropout_p: float = 0.0, is_causal: bool = False):
        if q.dtype == torch.float32:
            kernel = torch.ops.aten._scaled_dot_product_efficient_attention
            return kernel(q, k, v, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal)[0]
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]

    def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
        return torch.native_dropout(x, p, training)[0]

    plain_norm = F.layer_norm

    def layer_norm(x: Tensor, *args) -> Tensor:
        return plain_norm(x.float(), *args)  # as CUDA's autocast has it

    with (
        mock.patch.object(FakeTensor, "is_cuda", True, create=True),
        mock.patch.dict(fast.TRAINING_BUDGET, cpu=fast.TRAINING_BUDGET["cuda"]),
        mock.patch.multiple(F, scaled_dot_product_attention=attention, dropout=dropout, layer_norm=layer_norm),
        # These two ask for the type of the device.
        mock.patch("models.layers.dropout", lambda x, p: F.dropout(x, p) if p else x),
        mock.patch("models.tokenbridge.TokenBridge.check_labels"),
        mock.patch("util.misc.effective_precision", lambda kind, precision: precision),
    ):
        yield


@contextmanager
def run_without_content(name: str, precision: str, **options: Any) -> Iterator[tuple[TrainingState, PeakMemory]]:
    """A run of the model ``name`` after its first step, all of whose tensors are counted.

    Args:
        precision: bf16, fp16 or fp32.
        options: further arguments of :class:`models.tokenbridge.TokenBridge`.
    """
    quantizer = GaussianQuantizer(64)  # it has to look at its numbers
    with (
        mock.patch("models.tokenbridge.build_quantizer", lambda _: quantizer._apply(torch.empty_like)),
        FakeTensorMode(allow_non_fake_inputs=True),
        PeakMemory() as memory,
    ):
        model = MODELS[name](quant_levels=64, **options).train()
        state = training_state(model, precision)
        state.scaler.scale(torch.zeros(()))  # it and the optimizer make what they keep
        end_step(state)
        yield state, memory


def end_step(state: TrainingState) -> None:
    """The part of a step that follows the backward pass, before and after which gradients are held as in DDP."""
    for ends in (False, True):
        if ends:
            state.take_step(torch.zeros(()), 1e-4)
            state.average.update(state.model)
        for parameter in state.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def step_memory(
    state: TrainingState,
    memory: PeakMemory,
    vae: AutoencoderKL | None,
    batch: int,
    precision: str,
    parts: Sequence[str],
) -> float:
    """GiB of a training step on ``batch`` images, or their moments where ``vae`` is None.

    The fewest tokens are masked: then the encoder has most.

    Args:
        parts: the blocks of which are recomputed.
    """
    model = state.model
    model.draw_num_masked = partial(model.num_masked_at, 0.0)
    model.backbone.checkpointed, model.head.grad_checkpointing = parts, "head" in parts
    _, *sides = model.latent_shape
    shape = (3, *[model.config["img_size"]] * 2) if vae else (2 * model.vae_embed_dim, *sides)
    images = torch.empty(batch, *shape), torch.empty(batch, dtype=torch.int64)
    memory.peak = memory.live
    with kernels_of_cuda():
        backward(state, [images], vae, 1.0, precision)
    end_step(state)
    return memory.peak / 2**30


def main() -> None:
    """Runs the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS)[1:], help="sizes of the model")
    parser.add_argument("--batch", nargs="+", type=int, default=[32, 64], help="images of a GPU")
    parser.add_argument(
        "--precision", nargs="+", choices=misc.PRECISIONS, default=["bf16", "fp32"], help="of autocast; fp32 means none"
    )
    parser.add_argument("--json", help="file to write the results to")
    args, rows = parser.parse_args(), []
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    for name, precision in itertools.product(args.model, args.precision):
        with run_without_content(name, precision) as (state, memory):
            vae = AutoencoderKL(**KL16_CONFIG).requires_grad_(False)
            for batch in args.batch:
                figures = {to: step_memory(state, memory, vae, batch, precision, parts) for to, parts in PARTS.items()}
                rows.append({"model": name, "precision": precision, "batch": batch, **figures})
                print(markdown(list(rows[-1]), [list(rows[-1].values())]), flush=True)
    if args.json:
        write_json(args.json, {"benchmark": "memory", "machine": provenance(), "rows": rows})


if __name__ == "__main__":
    main()
