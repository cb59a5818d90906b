"""Names and defaults of the flags of all scripts; a file of flags trains as typing them does."""

import main_cache
import main_tokenbridge
import main_vae
import reconstruction
from tests.conftest import load, same


def test_flags_have_the_releases_names_and_defaults():
    expected = {
        main_tokenbridge: {
            "model": "tokenbridge_large", "img_size": 256, "vae_path": "pretrained_models/vae/kl16.ckpt",
            "vae_embed_dim": 16, "vae_stride": 16, "patch_size": 1, "buffer_size": 64, "class_num": 1000,
            "attn_dropout": 0.1, "proj_dropout": 0.1, "label_drop_prob": 0.1, "mask_ratio_min": 0.7,
            "grad_checkpointing": False, "quant_bits": 6, "quant_min": -5.0, "quant_max": 5.0, "batch_size": 16,
            "epochs": 400, "lr": None, "blr": 1e-4, "min_lr": 0.0, "lr_schedule": "cosine", "warmup_epochs": 100,
            "weight_decay": 0.02, "grad_clip": 1.0, "ema_rate": 0.9999, "seed": 1, "start_epoch": 0,
            "save_last_freq": 5, "num_iter": 256, "num_images": 50000, "cfg": 1.0, "cfg_schedule": "linear",
            "temperature": 1.0, "eval_bsz": 64, "eval_freq": 40, "online_eval": False, "evaluate": False,
            "data_path": "./data/imagenet", "output_dir": "./output_dir", "resume": "", "use_cached": False,
            "cached_path": "", "pin_mem": True, "device": None, "precision": "bf16",
        },
        main_cache: {
            "batch_size": 128, "img_size": 256, "vae_path": "pretrained_models/vae/kl16.ckpt", "vae_embed_dim": 16,
            "data_path": "./data/imagenet", "cached_path": "", "seed": 0, "pin_mem": True,
        },
        reconstruction: {
            "vae_path": "pretrained_models/vae/kl16.ckpt", "image_dir": "./data/imagenet/train", "bits": 6,
            "output_dir": "quantization_results", "range": 5.0, "images_per_class": 50,
        },
        main_vae: {"img_size": 256, "vae_embed_dim": 16, "ch": 128, "ch_mult": [1, 1, 2, 2, 4]},
    }  # fmt: skip
    for script, defaults in expected.items():
        args = vars(script.get_args_parser().parse_args([]))
        assert {name: args[name] for name in defaults} == defaults
    assert not main_tokenbridge.get_args_parser().parse_args(["--no_pin_mem"]).pin_mem


def test_a_run_of_a_file_of_flags_is_that_of_typed_ones(train, tmp_path):
    (tmp_path / "run.yaml").write_text("{epochs: 2, lr: 5e-4, mirror: false, blr: 1}")
    typed, read = (
        train("typed", "--epochs 2 --no_mirror"),
        train("read", f"--config {tmp_path}/run.yaml"),
    )
    assert same(load(typed)["model"], load(read)["model"])
    assert load(read)["epoch"] == 1


def test_a_typed_value_that_equals_the_default_is_not_overruled(trained, vae_path, refused):
    common = f"--evaluate --resume {trained} --vae_path {vae_path} --no_metrics --device cpu"
    line = refused("main_tokenbridge", f"{common} --model tokenbridge_large")
    assert "tokenbridge_large" in line and "tokenbridge_tiny" in line
    line = refused("main_tokenbridge", f"{common} --quant_bits 6")
    assert "quant" in line
