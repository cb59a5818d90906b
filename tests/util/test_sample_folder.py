"""The file of all images: read back by NumPy, written in little memory, whole or not at all."""

import tracemalloc

import numpy as np
import pytest
import torch

from util.files import read_arrays
from util.metrics.sample_folder import SampleFolder


class Images:
    """Images that are made when they are asked for; one of them cannot be read."""

    def __init__(self, unreadable: int | None = None):
        self.unreadable = unreadable

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == self.unreadable:
            raise RuntimeError("cannot read it")
        return (
            (torch.arange(3 * 64 * 80) % (index + 1))
            .to(torch.uint8)
            .view(64, 80, 3)
            .permute(2, 0, 1)
        )


def test_the_npz_is_written_image_by_image_and_read_back_by_numpy(tmp_path):
    folder = SampleFolder(tmp_path / "samples")
    tracemalloc.start()
    folder.write_npz(Images())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    expected = np.stack([Images()[i].permute(1, 2, 0).numpy() for i in range(200)])
    assert peak < expected.nbytes / 4
    with np.load(tmp_path / "samples.npz") as arrays:
        assert list(arrays) == ["arr_0"] and np.array_equal(arrays["arr_0"], expected)
        assert arrays["arr_0"].dtype == np.uint8
    assert np.array_equal(read_arrays(tmp_path / "samples.npz", "arr_0")["arr_0"], expected)
    before = (tmp_path / "samples.npz").read_bytes()
    with pytest.raises(RuntimeError):
        folder.write_npz(Images(unreadable=150))
    assert (tmp_path / "samples.npz").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
