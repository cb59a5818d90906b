"""The model under FSDP: blocks sharded one by one, the head as a whole, its loss in parts."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from models import fast
from models.tokenbridge import TokenBridge
from tests.conftest import NO_DROPOUT, batch, variant
from tests.processes import in_processes


def shard(model: TokenBridge) -> None:
    """Shard ``model`` over all ranks."""
    mesh = init_device_mesh("cpu", (2,))
    for block in (*model.backbone.encoder_blocks, *model.backbone.decoder_blocks):
        fully_shard(block, mesh=mesh)
    # The loss in parts computes gradients of all of the head's parameters: they are gathered together.
    fully_shard(model.head, mesh=mesh)
    register_fsdp_forward_method(model.head, "loss")
    fully_shard(model, mesh=mesh)


def largest_difference(rank: int) -> float:
    """Largest difference between the sharded model's gradients and those of the global batch on one rank."""
    fast.TRAINING_BUDGET["cpu"] = 16 * 16 * 32  # 52 tokens in four parts
    torch.manual_seed(0)
    whole, sharded = variant(**NO_DROPOUT).train(), variant(**NO_DROPOUT).train()
    shard(sharded)
    data = batch(whole, size=8)
    whole(*data).backward()
    sharded(*(tensor.chunk(2)[rank] for tensor in data)).backward()
    pairs = zip(whole.parameters(), sharded.parameters(), strict=True)
    return max((one.grad - other.grad.full_tensor()).abs().max().item() for one, other in pairs)


def test_two_ranks_have_the_gradients_of_the_global_batch():
    assert max(in_processes(2, largest_difference)) < 1e-5
