"""tools.scaling: the pages are what it writes, its figures follow from the models, its numbers can be changed."""

import pytest
import torch

from models.sampling import SamplingOptions
from models.tokenbridge import tokenbridge_large, tokenbridge_tiny
from tests.conftest import load
from tools import scaling
from util.tables import fill

ARGS = scaling.get_args_parser().parse_args([])


@pytest.fixture(scope="module")
def counts():
    """What is counted of the models."""
    return scaling.Counts.make()


def table(text: str) -> list[list[str]]:
    """A Markdown table's rows."""
    return [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]


def test_the_pages_are_what_the_script_writes(counts, monkeypatch):
    monkeypatch.setattr(scaling.Counts, "make", lambda: counts)
    for path, text in scaling.filled_pages(ARGS).items():
        assert path.read_text() == text, f"{path.name}: run python -m tools.scaling --write"


def test_hours_follow_from_operations_and_peak(counts):
    args = scaling.get_args_parser().parse_args(["--utilization", "0.5"])
    with torch.device("meta"):
        flops = tokenbridge_large(quant_levels=64).training_flops()
    hours = 400 * 1281167 * flops / 312e12 / 0.5 / 3600
    row = table(scaling.hours(counts, args))[0]
    assert row[:4] == ["large", "400", "cached", "A100"]
    assert [float(cell.replace(",", "")) for cell in row[5:]] == [
        round(hours / n, 1) for n in (8, 32, 256)
    ]
    images = table(scaling.hours(counts, args))[2]
    assert images[2] == "images" and float(images[5]) > float(row[5])


def test_the_slowest_link_of_the_ring_decides():
    args, gpu = ARGS, scaling.GPUS["A100"]
    assert scaling.all_reduce_seconds(300e9, 8, gpu, args, ports=1) == pytest.approx(
        2 * 7 / 8
    )  # NVLink
    assert scaling.all_reduce_seconds(300e9, 16, gpu, args, ports=1) == pytest.approx(
        2 * 15 / 16 * 12
    )
    assert scaling.all_reduce_seconds(300e9, 16, gpu, args, ports=100) == pytest.approx(2 * 15 / 16)


def test_files_have_the_bytes_that_are_told(counts, run, trained, cached, tmp_path):
    # What the table says of large and of ImageNet, held against a small checkpoint and a small packed cache.
    content = load(trained)
    state = [
        value
        for each in content["optimizer"]["state"].values()
        for value in (each["exp_avg"], each["exp_avg_sq"])
    ]
    size = sum(value.nbytes for value in [*content["model_ema"].values(), *state])
    learned = [content["model"][name] for name in content["model_ema"]]
    assert size + sum(value.nbytes for value in learned) == 16 * sum(
        value.numel() for value in learned
    )
    run("tools.pack", f"--cached_path {cached} --output_dir {tmp_path}/packed --num_workers 0")
    values = (
        (tmp_path / "packed" / "shard-00000.npy").stat().st_size / 4 / 16
    )  # an image: 2 views of 2 x 8 x 4 x 4
    assert 2 * 2 * 8 * 4 * 4 <= values < 2 * 2 * 8 * 4 * 4 + 10
    rows = {row[0]: float(row[1]) for row in table(scaling.files(counts, ARGS))}
    assert rows["cache, fp32"] == pytest.approx(
        1281167 * 2 * 2 * 16 * 16 * 16 * 4 / 2**30, abs=0.05
    )
    assert rows["checkpoint, large"] == pytest.approx(16 * 486.89e6 / 2**30, abs=0.01)


def test_small_batches_are_bound_by_launches():
    with torch.device("meta"):
        model = tokenbridge_tiny().eval()  # two blocks in encoder, decoder and head
    args = scaling.get_args_parser().parse_args(["--eval_bsz", "1"])
    gpu, options = scaling.GPUS["A100"], SamplingOptions(4, cfg=2.0)
    times = scaling.sampling_seconds(model, options, gpu, args)
    assert times == pytest.approx([4 * 35 * 5e-6 * blocks for blocks in (4, 32)])
    args.eval_bsz = 10**9
    backbone, head = scaling.sampling_seconds(model, options, gpu, args)
    assert head == pytest.approx(1e9 * 256 * model.head.sampling_flops() / 312e12 / 0.4)
    unguided, _ = scaling.sampling_seconds(model, SamplingOptions(4), gpu, args)
    assert backbone == pytest.approx(2 * unguided)  # guidance takes two passes
    operations = 1e9 / 312e12 / 0.4 * model.sampling_flops(options)
    assert backbone + head == pytest.approx(operations)


def test_places_are_filled_and_must_be_there():
    text = "a <!-- x -->1<!-- end --> b <!-- y --><!-- end -->"
    assert (
        fill(fill(text, "x", r"\1"), "y", "2")
        == r"a <!-- x -->\1<!-- end --> b <!-- y -->2<!-- end -->"
    )
    with pytest.raises(ValueError, match="z"):
        fill(text, "z", "")
