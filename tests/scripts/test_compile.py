"""Training with --compile in several processes."""

import shutil

import pytest

from tests.conftest import SHORT, TINY, load, torchrun


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_two_processes_train_the_same_weights_compiled(cached, tmp_path):
    command = f"main_tokenbridge.py {TINY} {SHORT} --use_cached --cached_path {cached} --epochs 2 --precision fp32"
    command += " --device cpu --attn_dropout 0 --proj_dropout 0"
    command += f" --online_nll --eval_freq 2 --cached_val_path {cached}"  # with the EMA's blocks
    weights = []
    for flags in ("", "--compile"):
        folder = tmp_path / f"run{flags}"
        result = torchrun(f"{command} {flags} --output_dir {folder}")
        assert result.returncode == 0, result.stderr
        weights.append(load(folder))
    plain, compiled = (content["model"] for content in weights)
    for name in weights[0]["model_ema"]:
        # Adam takes steps of up to 1e-3 whatever a gradient's size, and the sign of the smallest is rounding's.
        assert (plain[name] - compiled[name]).abs().mean() < 1e-5, name
