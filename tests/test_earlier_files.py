"""Files that version 0.1.0 wrote load, resume and sample as they did then.

``tests/earlier`` holds a tokenizer, a cache, a run's checkpoint, what ``save_pretrained`` wrote, and in
``expected.safetensors`` the weights after two more epochs, latents sampled from the EMA, and images.
"""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models import tokenbridge
from models.pipeline import TokenBridgePipeline
from tests.conftest import ROOT, load

EARLIER = ROOT / "tests" / "earlier"
#: Encoder, decoder and head of the run: smaller than tokenbridge_tiny, so that the files are small.
SIZE = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
        {"embed_dim": 32, "depth": 1, "num_heads": 2}.items()}  # fmt: skip
SIZE |= {"channel_embed_dim": 32, "channel_depth": 1, "channel_heads": 2}
TRAIN = (
    "--model tokenbridge_tiny --img_size 16 --class_num 4 --buffer_size 4 --quant_bits 3 --num_workers 0 "
    "--batch_size 4 --precision fp32 --device cpu --warmup_epochs 0 --lr 1e-3 --lr_schedule constant --use_cached"
)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(EARLIER / "expected.safetensors")


def test_a_run_resumes_to_the_same_weights(run, tmp_path, monkeypatch, expected):
    monkeypatch.setitem(tokenbridge.SIZES, "tokenbridge_tiny", SIZE)
    shutil.copytree(EARLIER / "run", tmp_path / "run")
    folders = f"--cached_path {EARLIER}/cache --output_dir {tmp_path}/run --resume {tmp_path}/run"
    run("main_tokenbridge", f"{TRAIN} --epochs 4 {folders}")
    weights = load(tmp_path / "run")["model"]
    names = [name for name in weights if name != "channel_mask"]
    assert {f"model.{name}" for name in names} == {
        name for name in expected if name.startswith("model.")
    }
    for name in names:
        if name.endswith(
            "qkv.bias"
        ):  # keys' biases have no gradient but rounding, which Adam scales up
            continue
        torch.testing.assert_close(weights[name], expected[f"model.{name}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("folder", ["run", "pretrained"])
def test_a_model_samples_the_same_images(folder, expected):
    pipeline = TokenBridgePipeline.from_pretrained(EARLIER / folder, tokenizer=EARLIER / "vae.ckpt")
    latents = pipeline.model.sample_tokens(
        4, num_iter=4, cfg=2.0, labels=torch.arange(4), seeds=[0, 1, 2, 3]
    )
    torch.testing.assert_close(latents, expected["sampled"])
    images = np.stack(
        [np.array(image) for image in pipeline([0, 1, 2, 3], num_iter=4, cfg=2.0).images]
    )
    assert np.abs(images.astype(int) - expected["images"].numpy()).max() <= 1
