"""GPU memory of a training step, counted without a GPU on tensors that have shapes but no data.

Counts all tensors of a step that starts from images: weights, optimizer state, EMA, gradients
(which DDP keeps), activations and the tokenizer. Does not count fragmentation, workspaces of
libraries, NCCL and the CUDA context.
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

from benchmarks.common import new_trainer
from engine_tokenbridge import Trainer
from models import fast
from models.quantizer import GaussianQuantizer
from models.tokenbridge import MODELS
from models.tokenizer import LatentEncoder, Tokenizer
from models.vae import AutoencoderKL
from util.args import new_parser
from util.files import write_json
from util.model_config import CHECKPOINTED, KL16_CONFIG
from util.precision import PRECISIONS
from util.provenance import provenance
from util.tables import markdown

#: Columns of the table: the parts that recompute activations.
PARTS = {"none": (), "decoder": ("decoder",), "all": CHECKPOINTED}
#: GB by which a GPU is sold, and the GiB that a program can use (A100; A100 and H100; H200).
GPUS = {40: 39.4, 80: 79.1, 141: 139.7}
#: GiB for libraries, NCCL and the CUDA context.
RESERVE = 1.5
#: Fragmentation, as a fraction of the tensors' memory.
FRAGMENTATION = 0.1


def smallest_gpu(gib: float) -> int | None:
    """Return the GB of the smallest of :data:`GPUS` for ``gib`` GiB of tensors, or None."""
    total = gib * (1 + FRAGMENTATION) + RESERVE
    return next((gb for gb, usable in GPUS.items() if total <= usable), None)


class PeakMemory(TorchDispatchMode):
    """Context manager that counts the bytes of all tensors that operations create.

    Attributes:
        live: bytes that are allocated now.
        peak: the maximum of ``live``.
    """

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
        """Count a storage until no tensor refers to it."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known[key] = weakref.ref(storage, lambda _: self.remove(key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def remove(self, key: int, size: int) -> None:
        """Stop counting a storage."""
        del self.known[key]
        self.live -= size


@contextmanager
def kernels_of_cuda() -> Iterator[None]:
    """Run the kernels of CUDA on fake CPU tensors.

    Without a GPU, autograd does not accept fake CUDA tensors.
    """

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
    ) -> Tensor:
        if q.dtype == torch.float32:
            kernel = torch.ops.aten._scaled_dot_product_efficient_attention
            grad = torch.is_grad_enabled()
            return kernel(q, k, v, attn_mask, grad, dropout_p, is_causal)[0]
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]

    def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
        return torch.native_dropout(x, p, training)[0]

    plain_norm = F.layer_norm

    def layer_norm(x: Tensor, *args) -> Tensor:
        return plain_norm(x.float(), *args)  # CUDA's autocast runs it in float32

    with (
        mock.patch.object(FakeTensor, "is_cuda", True, create=True),
        mock.patch.dict(fast.TRAINING_BUDGET, cpu=fast.TRAINING_BUDGET["cuda"]),
        mock.patch.multiple(
            F, scaled_dot_product_attention=attention, dropout=dropout, layer_norm=layer_norm
        ),
        # These depend on the type of the device.
        mock.patch("models.layers.dropout", lambda x, p: F.dropout(x, p) if p else x),
        mock.patch("models.tokenbridge.TokenBridge.check_labels"),
        mock.patch("util.precision.effective_precision", lambda kind, precision: precision),
    ):
        yield


@contextmanager
def fake_training(
    name: str, precision: str, **options: Any
) -> Iterator[tuple[Trainer, PeakMemory]]:
    """Build a training run of model ``name`` from fake tensors, as it is after a first step.

    Yields the run and the counter of its tensors.

    Args:
        precision: bf16, fp16 or fp32.
        options: further arguments of :class:`models.tokenbridge.TokenBridge`.
    """
    quantizer = GaussianQuantizer(64)  # built outside, since its tables need data
    with (
        mock.patch(
            "models.tokenbridge.build_quantizer", lambda _: quantizer._apply(torch.empty_like)
        ),
        FakeTensorMode(allow_non_fake_inputs=True),
        PeakMemory() as memory,
    ):
        model = MODELS[name](quant_levels=64, **options).train()
        trainer = new_trainer(model, precision)
        trainer.state.scaler.scale(torch.zeros(()))  # allocates the scaler's state
        end_step(trainer)
        yield trainer, memory


def end_step(trainer: Trainer) -> None:
    """Take the part of a step after the backward pass.

    Gradients stay allocated before and after it, as in DDP.
    """
    allocate_gradients(trainer.state.model)
    trainer.clip_and_step(torch.zeros(()), lr=1e-4)
    trainer.state.update_ema()
    allocate_gradients(trainer.state.model)


def allocate_gradients(model: torch.nn.Module) -> None:
    """Set missing gradients to 0."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def step_memory(
    trainer: Trainer,
    memory: PeakMemory,
    tokenizer: LatentEncoder,
    batch: int,
    parts: Sequence[str],
) -> float:
    """Return the GiB of a training step on ``batch`` images, or on cached moments.

    The fewest tokens are masked, since the encoder then takes most memory.

    Args:
        parts: the parts that recompute activations.
    """
    model: Any = trainer.state.model
    model.draw_num_masked = partial(model.num_masked_at, 0.0)
    model.backbone.checkpointed, model.head.grad_checkpointing = parts, "head" in parts
    _, *sides = model.latent_shape
    shape = (2 * model.vae_embed_dim, *sides)
    if isinstance(tokenizer, Tokenizer):
        shape = (3, *[model.config["img_size"]] * 2)
    images = torch.empty(batch, *shape), torch.empty(batch, dtype=torch.int64)
    memory.peak = memory.live
    with kernels_of_cuda():
        trainer.tokenizer = tokenizer
        trainer.backward([images])
    end_step(trainer)
    return memory.peak / 2**30


def main() -> None:
    """Run the command line."""
    parser = new_parser(__doc__)
    text = "sizes of the model"
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS)[1:], help=text)
    text = "batch sizes per GPU"
    parser.add_argument("--batch", nargs="+", type=int, default=[32, 64], help=text)
    precisions = ["bf16", "fp32"]
    text = "autocast precisions; fp32 means no autocast"
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=precisions, help=text)
    parser.add_argument("--json", help="file to write the results to")
    args, rows = parser.parse_args(), []
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    for name, precision in itertools.product(args.model, args.precision):
        with fake_training(name, precision) as (trainer, memory):
            vae_config: dict[str, Any] = KL16_CONFIG
            tokenizer = Tokenizer(AutoencoderKL(**vae_config).requires_grad_(False), 1.0)
            for batch in args.batch:
                gib = {
                    title: step_memory(trainer, memory, tokenizer, batch, parts)
                    for title, parts in PARTS.items()
                }
                rows.append({"model": name, "precision": precision, "batch": batch, **gib})
                print(markdown(list(rows[-1]), [list(rows[-1].values())]), flush=True)
    if args.json:
        write_json(args.json, {"benchmark": "memory", "machine": provenance(), "rows": rows})


if __name__ == "__main__":
    main()
