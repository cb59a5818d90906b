"""Seeds, and shares of several processes."""

from unittest import mock

import torch

from util import misc
from util.rng import seed_everything


def test_every_part_of_a_seed_counts():
    draws = set()
    for seeds in ((1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0)):
        seed_everything(*seeds)
        draws.add(torch.rand(()).item())
    assert len(draws) == 4
    seed_everything(7)
    first = torch.rand(())
    torch.manual_seed(7)
    assert torch.rand(()) == first


def test_shares_come_back_in_order():
    # 11 rows over 3 processes, each holding rank, rank + 3, ...
    rows = torch.arange(22.0).view(11, 2)
    shares = [torch.cat([rows[rank::3], torch.zeros(4 - len(rows[rank::3]), 2)]) for rank in range(3)]

    def all_gather(out, own):
        for place, share in zip(out, shares, strict=True):
            place.copy_(share)

    with mock.patch("util.misc.get_world_size", return_value=3), mock.patch("torch.distributed.all_gather", all_gather):
        assert torch.equal(misc.gather_shares(rows[1::3], 11), rows)
