"""The memory of a training step as benchmarks/memory.py counts it."""

import pytest
import torch

from benchmarks.memory import PeakMemory, fake_training, smallest_gpu, step_memory
from models import fast, layers
from models.tokenizer import CachedMoments
from tests.conftest import SMALL
from util.model_config import CHECKPOINTED

BYTES = 2**30
OPTIONS = {name: value for name, value in SMALL.items() if name != "quant_levels"}


def test_what_operations_make_counts_for_as_long_as_it_is_held():
    with PeakMemory() as memory:
        x = torch.ones(1000, 1000, requires_grad=True)
        assert memory.live == 4e6
        y = x.relu().view(-1)
        assert memory.live == 8e6  # a view takes nothing
        y = y.square().sum()  # autograd keeps what is squared
        assert memory.live == 8e6 + 4 and memory.peak == 12e6 + 4
        y.backward()
        del y
        assert memory.live == 8e6  # a gradient stays


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_a_run_holds_weights_average_gradients_and_two_moments():
    with fake_training("tokenbridge_tiny", "bf16", **OPTIONS) as (trainer, memory):
        parameters = sum(p.numel() for p in trainer.state.model.parameters())
        assert 5 * 4 * parameters < memory.live < 5 * 4 * parameters * 1.05


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_a_steps_peak_is_that_of_cudas_kernels(monkeypatch):
    calls, peaks = [], {}
    kernel = layers.fused
    monkeypatch.setattr(layers, "fused", lambda *args: (calls.append(1), kernel(*args))[1])
    monkeypatch.setattr(layers.DropBits, "apply", None)
    monkeypatch.setitem(fast.TRAINING_BUDGET, "cuda", 2**30)
    for precision in ("bf16", "fp16", "fp32"):
        with fake_training("tokenbridge_tiny", precision, **OPTIONS) as (trainer, memory):
            held = memory.live / BYTES

            def peak(batch: int, parts=(), trainer=trainer, memory=memory, held=held) -> float:
                return step_memory(trainer, memory, CachedMoments(1.0), batch, parts) - held

            peaks[precision] = peak(64)
            assert memory.live / BYTES == pytest.approx(held, rel=0.01)  # nothing of the step stays
            if precision == "fp32":
                continue
            # Activations: twice the images take twice the memory; fewer are held where blocks are recomputed.
            assert peak(128) == pytest.approx(2 * peaks[precision], rel=0.05)
            assert peak(64, CHECKPOINTED) < peak(64, ("decoder",)) < peaks[precision]
            monkeypatch.setitem(fast.TRAINING_BUDGET, "cuda", 2**17)  # 256 of 768 tokens at once
            peaks[precision, "parts"] = peak(64)
            monkeypatch.setitem(fast.TRAINING_BUDGET, "cuda", 2**30)
    assert (
        calls
        and peaks["fp16"] == pytest.approx(peaks["bf16"], rel=0.01)
        and peaks["fp32"] > 1.3 * peaks["bf16"]
    )
    for precision in ("bf16", "fp16"):
        assert peaks[precision, "parts"] < 0.6 * peaks[precision]


def test_a_gpu_has_room_for_more_than_the_tensors():
    assert [smallest_gpu(gib) for gib in (30.0, 39.0, 70.0, 79.0, 139.0)] == [40, 80, 80, 141, None]
