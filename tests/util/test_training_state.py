"""A run's state: step counts, and gradients over batches and processes."""

import argparse
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from engine_tokenbridge import Trainer
from models import fast
from models.tokenbridge import TokenBridge
from models.tokenizer import CachedMoments
from tests.conftest import (
    SMALL,
    batch,
    filled,
    load,
    new_trainer,
    published_state,
    released,
    training_state,
)
from tests.fill import deterministic_fill
from tests.processes import free_port, in_processes
from util.checkpoint.load import load_optimizer
from util.checksums import checksum
from util.errors import ReportedByRank0, UserError
from util.training_state import TrainingState, add_weight_decay


def test_step_counts_go_where_this_runs_optimizer_wants_them(small_model, tmp_path):
    state = released(small_model.train())[
        "optimizer"
    ]  # of an optimizer that is not fused, as the release's
    with torch.device("meta"):  # as a CUDA device: another one than the file's
        model = TokenBridge(**SMALL)
    optimizer = torch.optim.AdamW(
        add_weight_decay(model, 0.02), lr=1e-3, betas=(0.9, 0.95), fused=True
    )
    before = torch.optim.Optimizer.load_state_dict
    seen = []

    def load_state_dict(self, content):
        before(self, content)
        seen.extend(str(entry["step"].device) for entry in self.state.values())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Optimizer, "load_state_dict", load_state_dict)
        load_optimizer(optimizer, state, "file.pth")
    assert set(seen) == {"meta"}


def test_tensors_in_the_place_of_flags_are_named_without_their_values(small_model, tmp_path):
    content = released(small_model.train())
    content["args"] = argparse.Namespace(freeze=[torch.full((3,), 1.2345)])
    with pytest.raises(UserError, match=r"args\.freeze") as error:
        training_state(TokenBridge(**SMALL)).load(content, tmp_path / "file.pth")
    assert "1.23" not in str(error.value)


NO_DROPOUT = {**SMALL, "attn_dropout": 0.0, "proj_dropout": 0.0, "label_drop_prob": 0.0}


class GivenMasks(torch.nn.Module):
    """A model whose masks come with the labels."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, latents, labels_and_mask):
        return self.model(latents, labels_and_mask[:, 0].long(), labels_and_mask[:, 1:])


def whole_batch() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(8, 16, 4, 4, generator=random)
    mask = (torch.rand(8, 16, generator=random).argsort(dim=1) < 12).float()
    return latents, torch.cat([torch.arange(8)[:, None] % 4, mask], dim=1)


def test_two_processes_with_half_the_batch_give_the_gradients_of_one(tmp_path):
    def gradients_of_half(rank: int) -> None:
        fast.TRAINING_BUDGET["cpu"] = 20 * 16 * 32  # 48 tokens in three parts
        model = filled(TokenBridge(**NO_DROPOUT)).train()
        latents, labels = whole_batch()
        half = slice(4 * rank, 4 * rank + 4)
        wrapped = DistributedDataParallel(GivenMasks(model))
        wrapped(latents[half], labels[half]).backward()
        torch.save({name: p.grad for name, p in model.named_parameters()}, tmp_path / f"{rank}.pt")

    in_processes(2, gradients_of_half)
    model = filled(TokenBridge(**NO_DROPOUT)).train()
    GivenMasks(model)(*whole_batch()).backward()
    for rank in range(2):
        halves = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, p in model.named_parameters():
            assert torch.allclose(halves[name], p.grad, atol=1e-5), name


@pytest.mark.slow
@torch._dynamo.config.patch(optimize_ddp=True)  # monkeypatch would leave the entry deleted
def test_within_ddp_each_kind_of_block_is_compiled_once_and_whole(monkeypatch):
    address = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    programs = []

    def compile_fx(graph, *args, **options):
        programs.append(graph)
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    torch.compiler.reset()
    try:
        # Blocks of more than a bucket of gradients.
        model = filled(
            TokenBridge(**{**NO_DROPOUT, "encoder_embed_dim": 256, "channel_embed_dim": 256})
        ).train()
        wrapped = DistributedDataParallel(GivenMasks(model), bucket_cap_mb=1)
        model.compile_blocks()
        wrapped(*whole_batch()).backward()
    finally:
        dist.destroy_process_group()
        torch.compiler.reset()
    assert len(programs) == 3  # encoder's, decoder's, head's


def test_accumulated_gradients_are_those_of_the_whole_batch():
    latents, labels = torch.randn(8, 16, 4, 4), torch.arange(8) % 4
    # All tokens masked, so that the drawn masks are the same for every part.
    model = TokenBridge(**NO_DROPOUT, mask_ratio_min=1.0)
    model.load_state_dict(deterministic_fill(published_state(model)))
    trainer = new_trainer(model, tokenizer=CachedMoments(1.0))
    moments = torch.cat(
        [latents, torch.full_like(latents, -30.0)], dim=1
    )  # whose samples are their means
    results = []
    for parts in (1, 4):
        model.zero_grad()
        batches = list(zip(moments.chunk(parts), labels.chunk(parts), strict=True))
        loss = trainer.backward(batches)
        results.append((loss, [p.grad.clone() for p in model.parameters()]))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(results[0][1], results[1][1], strict=True)
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_all_processes_go_on_from_what_the_main_one_read(tmp_path, precision):
    def trainer(mask_token: float) -> Trainer:
        model = TokenBridge(**NO_DROPOUT)
        model.metadata = {}
        torch.nn.init.constant_(model.backbone.mask_token, mask_token)
        trainer = new_trainer(model, precision=precision, output_dir=tmp_path)
        trainer.state.scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0, growth_interval=1, enabled=precision == "fp16"
        )
        return trainer

    def step(trainer: Trainer, gradient: float) -> TrainingState:
        state = trainer.state
        loss = state.scaler.scale(
            sum(parameter.sum() for parameter in state.model.parameters()) * gradient
        )
        loss.backward()
        trainer.clip_and_step(loss.detach(), 1e-3)
        trainer.finish_step()
        return state

    def described(state: TrainingState) -> tuple:
        moments = [state.optimizer.state[each] for each in state.model.parameters()]
        tensors = [value for entry in moments for name, value in sorted(entry.items())]
        tensors += [*state.model.state_dict().values(), *state.ema_model.state_dict().values()]
        return state.epoch, state.step, state.scaler.get_scale(), checksum(tensors)

    run = trainer(0.5)
    saved = step(run, 0.1)
    saved.save()
    saved.saver.finish()

    def resume(rank: int) -> tuple:
        resumed = trainer(float(rank))
        content = load(tmp_path) if rank == 0 else {}
        resumed.state.load(content, tmp_path / "checkpoint-last.pth")
        return described(step(resumed, 0.2))

    assert in_processes(2, resume) == [described(step(run, 0.2))] * 2


def test_a_damaged_checkpoint_ends_all_processes_and_one_tells():
    def resume(rank: int) -> None:
        training_state(TokenBridge(**NO_DROPOUT)).load({}, Path("here.pth"))

    first, second = in_processes(2, resume)
    assert "here.pth has no weights" in str(first)
    assert str(second) == str(first) and isinstance(second, ReportedByRank0)


def test_a_step_that_the_scaler_leaves_out_changes_neither_weights_nor_average():
    model = TokenBridge(**NO_DROPOUT)
    model.load_state_dict(deterministic_fill(published_state(model)))
    trainer = new_trainer(model, precision="fp16", ema_rate=0.5)
    state = trainer.state
    for overflows in (False, True, False):
        state.scaler.scale(model(torch.randn(2, 16, 4, 4), torch.tensor([0, 1]))).backward()
        if overflows:
            next(model.parameters()).grad.fill_(torch.inf)
        before = [
            parameter.clone()
            for kept in (model, state.ema_model)
            for parameter in kept.parameters()
        ]
        trainer.clip_and_step(torch.tensor(1.0), 1e-3)
        _, finite, taken = trainer.wait_for_step()
        if taken:
            state.update_ema()
        after = [parameter for kept in (model, state.ema_model) for parameter in kept.parameters()]
        assert finite and taken == (not overflows)
        assert all(map(torch.equal, before, after)) == overflows
    assert state.scaler.get_scale() == 2**15


def test_processes_share_buffers_at_the_start_and_do_not_send_them_at_every_step():
    def train(rank: int) -> list[float]:
        warnings.simplefilter(
            "error", FutureWarning
        )  # of an argument that a later torch does not know
        model = TokenBridge(**NO_DROPOUT)
        tables = model.quantizer.thresholds, model.quantizer.boundaries  # one of them is not saved
        for table in tables:
            table.fill_(float(rank))
        state = training_state(model)
        shared = [table.mean().item() for table in tables]
        tables[1].fill_(float(rank))
        state.wrapped(*batch(model))
        return [*shared, tables[1].mean().item()]

    assert in_processes(2, train) == [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
