"""Learning rates over epochs."""

import math
from argparse import Namespace

import pytest
import torch

from util.lr_sched import adjust_learning_rate


def test_learning_rate_warms_up_then_follows_the_schedule():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD(
        [{"params": weights[:1]}, {"params": weights[1:], "lr_scale": 0.1}], lr=1.0
    )
    args = Namespace(lr=2.0, min_lr=0.5, warmup_epochs=10, epochs=110, lr_schedule="cosine")
    for epoch, expected in {0: 0, 2.5: 0.5, 10: 2.0, 60: 1.25, 110: 0.5}.items():
        assert adjust_learning_rate(optimizer, epoch, args) == pytest.approx(expected)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [expected, 0.1 * expected]
        )
    assert adjust_learning_rate(optimizer, 35, args) == pytest.approx(
        0.5 + 1.5 * (1 + math.cos(math.pi / 4)) / 2
    )
    args.lr_schedule = "constant"
    assert adjust_learning_rate(optimizer, 100, args) == 2.0
    args.warmup_epochs = 0
    assert adjust_learning_rate(optimizer, 0, args) == 2.0
