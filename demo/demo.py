"""The whole pipeline on handwritten digits, with the scripts that ImageNet uses: ``make demo``."""

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
IMG_SIZE = 16
SAMPLES_PER_DIGIT = 10
#: Folders and files that the demo makes.
MADE = [
    "data",
    "cache",
    "reconstruction",
    "tokenizer_log",
    "samples",
    "args.json",
    "samples.json",
    "results.json",
]
MADE += ["vae.ckpt", "vae.json", "vae-last*.pth", "checkpoint-last*.pth", "events.out.tfevents.*"]
MADE += ["samples.png", "reconstruction.png", "loss.png"]


def write_digits(folder: Path) -> None:
    """Writes ``train/<digit>/`` and ``val/<digit>/`` (every fifth image), 16x16 PNGs, bright on black.

    A digit is 8x8 values of 0 to 16; each becomes a square of ``255 value / 16``, so that a box reduction to 8x8 gives
    the original back.
    """
    digits = load_digits()
    zoom = IMG_SIZE // digits.images.shape[-1]
    for number, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        part = "val" if number % 5 == 4 else "train"
        path = folder / part / str(digit) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (
            np.round(image * 255 / 16).astype(np.uint8).repeat(zoom, axis=0).repeat(zoom, axis=1)
        )
        Image.fromarray(pixels).save(path)


def read_digits(paths: list[Path]) -> np.ndarray:
    """Images as the classifier sees them: 8x8 values of 0 to 16 each, ``[N, 64]``."""
    small = [Image.open(path).convert("L").resize((8, 8), Image.Resampling.BOX) for path in paths]
    return np.stack(small).reshape(len(paths), -1) * (16 / 255)


def digit_classifier(data: Path) -> SVC:
    """A classifier trained on the real digits of ``data/train``."""
    paths = sorted((data / "train").glob("*/*.png"))
    return SVC(gamma=0.001).fit(read_digits(paths), [int(path.parent.name) for path in paths])


def recognized(data: Path, samples: Path) -> dict[str, float]:
    """Accuracies of the classifier: on held-out real digits, and on samples by their class."""
    classifier, real = digit_classifier(data), sorted((data / "val").glob("*/*.png"))
    drawn = sorted(samples.glob("*.png"))
    return {
        "recognized_val": classifier.score(
            read_digits(real), [int(path.parent.name) for path in real]
        ),
        "recognized_samples": classifier.score(
            read_digits(drawn), np.arange(len(drawn)) // SAMPLES_PER_DIGIT
        ),
    }


def plot_loss(log: Path, path: Path) -> None:
    """Plots the training loss in TensorBoard's ``log`` to ``path``, a PNG."""
    events = EventAccumulator(str(log)).Reload().Scalars("train/loss")
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([event.step for event in events], [event.value for event in events])
    axes.set(xlabel="step", ylabel="cross-entropy (nats a channel)", title="TokenBridge on digits")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def remove_earlier(out: Path) -> None:
    """Remove what an earlier demo left in ``out``, and nothing else."""
    for path in (path for pattern in MADE for path in out.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def run(command: str) -> None:
    """Shows a command as one would type it, and runs it from the project's root."""
    print(f"\n$ python {command}", flush=True)
    result = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT)
    if result.returncode:
        sys.exit(f"demo: this command ended with status {result.returncode}: python {command}")


def main() -> None:
    """Runs every step; all files go to ``output/demo``."""
    started = time.perf_counter()
    out = ROOT / "output" / "demo"
    remove_earlier(out)
    write_digits(out / "data")
    common = f"--img_size {IMG_SIZE} --num_workers 0"
    vae = "--vae_path output/demo/vae.ckpt"
    model = "--model tokenbridge_tiny --class_num 10 --buffer_size 8 --quant_bits 5 --output_dir output/demo"

    run(
        f"main_vae.py {common} --data_path output/demo/data --output_dir output/demo --no_mirror "
        "--vae_embed_dim 8 --ch 32 --ch_mult 1 2 2 --num_res_blocks 1 "
        "--batch_size 64 --epochs 20 --lr 3e-3 --kl_weight 1e-2 --ema_rate 0.99"
    )
    run(
        f"main_cache.py {common} {vae} --data_path output/demo/data --cached_path output/demo/cache"
    )
    run(
        f"reconstruction.py {common} {vae} --image_dir output/demo/data/val "
        "--output_dir output/demo/reconstruction --bits 5"
    )
    run(
        f"main_tokenbridge.py {common} {model} --use_cached --cached_path output/demo/cache --no_mirror "
        "--batch_size 64 --epochs 38 --warmup_epochs 3 --lr 2e-3 --ema_rate 0.99 --attn_dropout 0 --proj_dropout 0"
    )
    run(
        f"main_tokenbridge.py {common} {model} {vae} --evaluate --resume output/demo "
        f"--num_images {10 * SAMPLES_PER_DIGIT} --no_metrics --eval_bsz 100 --num_iter 16 --cfg 2.0 --temperature 0.95"
    )

    shutil.copy(
        next((out / "reconstruction").glob("*/reconstruction.png")), out / "reconstruction.png"
    )
    plot_loss(out, out / "loss.png")
    results = recognized(out / "data", out / "samples")
    results["minutes"] = (time.perf_counter() - started) / 60
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(
        f"\nThe classifier recognizes {results['recognized_val']:.1%} of held-out digits "
        f"and {results['recognized_samples']:.1%} of the samples ({results['minutes']:.1f} minutes in all)."
    )
    for name in ("samples.png", "reconstruction.png", "loss.png", "samples", "results.json"):
        print(f"output/demo/{name}")


if __name__ == "__main__":
    main()
