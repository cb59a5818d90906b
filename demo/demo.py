"""Train and evaluate on handwritten digits, with the scripts for ImageNet: ``make demo``."""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    # The project root instead of demo/, where this file would hide the package of its name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import util.interpreter  # noqa: F401, before all packages

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
IMG_SIZE = 16
SAMPLES_PER_DIGIT = 10
#: Folders and files that the demo writes.
OUTPUTS = [
    "data",
    "cache",
    "reconstruction",
    "tokenizer_log",
    "samples",
    "args.json",
    "samples.json",
    "results.json",
    "vae.ckpt",
    "vae.json",
    "vae-last*.pth",
    "checkpoint-last*.pth",
    "events.out.tfevents.*",
    "samples.png",
    "reconstruction.png",
    "loss.png",
]


def write_digits(folder: Path) -> None:
    """Write 16x16 PNGs, bright on black, to ``train/<digit>/`` and ``val/<digit>/``.

    Every fifth image is for validation. A digit has 8x8 values from 0 to 16. Each value becomes a
    square of gray value ``255 value / 16``, so that box filtering to 8x8 restores the original.
    """
    digits = load_digits()
    zoom = IMG_SIZE // digits.images.shape[-1]
    for number, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "val" if number % 5 == 4 else "train"
        path = folder / split / str(digit) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        gray = np.round(image * 255 / 16).astype(np.uint8)
        Image.fromarray(gray.repeat(zoom, axis=0).repeat(zoom, axis=1)).save(path)


def read_digits(paths: list[Path]) -> np.ndarray:
    """Return images as inputs of the classifier: 8x8 values from 0 to 16, ``[N, 64]``."""
    small = [Image.open(path).convert("L").resize((8, 8), Image.Resampling.BOX) for path in paths]
    pixels = np.stack([np.asarray(image) for image in small])
    return pixels.reshape(len(paths), -1) * (16 / 255)


def digit_classifier(data: Path) -> SVC:
    """Return a classifier trained on the real digits in ``data/train``."""
    paths = sorted((data / "train").glob("*/*.png"))
    return SVC(gamma=0.001).fit(read_digits(paths), [int(path.parent.name) for path in paths])


def recognized(data: Path, samples: Path) -> dict[str, float]:
    """Return the accuracy of a classifier on held-out real digits, and on generated samples."""
    classifier = digit_classifier(data)
    real = sorted((data / "val").glob("*/*.png"))
    real_labels = [int(path.parent.name) for path in real]
    generated = sorted(samples.glob("*.png"))
    generated_labels = np.arange(len(generated)) // SAMPLES_PER_DIGIT
    return {
        "recognized_val": classifier.score(read_digits(real), real_labels),
        "recognized_samples": classifier.score(read_digits(generated), generated_labels),
    }


def plot_loss(log: Path, path: Path) -> None:
    """Plot the training loss in the TensorBoard folder ``log`` as the PNG ``path``."""
    events = EventAccumulator(str(log)).Reload().Scalars("train/loss")
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([event.step for event in events], [event.value for event in events])
    axes.set(
        xlabel="step", ylabel="cross-entropy (nats per channel)", title="TokenBridge on digits"
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def remove_earlier(out: Path) -> None:
    """Remove the :data:`OUTPUTS` of an earlier demo from ``out``, and nothing else."""
    for path in [path for pattern in OUTPUTS for path in out.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def run_command(command: str) -> None:
    """Print a command and run it in the project root; exit if it fails."""
    print(f"\n$ python {command}", flush=True)
    result = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT)
    if result.returncode:
        sys.exit(f"demo: this command failed with status {result.returncode}: python {command}")


def main() -> None:
    """Run all steps. All files are written to ``output/demo``."""
    argparse.ArgumentParser(description=__doc__).parse_args()  # no flags, only --help
    started = time.perf_counter()
    out = ROOT / "output" / "demo"
    remove_earlier(out)
    write_digits(out / "data")
    common = f"--img_size {IMG_SIZE} --num_workers 0"
    vae = "--vae_path output/demo/vae.ckpt"
    model = (
        "--model tokenbridge_tiny --class_num 10 --buffer_size 8 --quant_bits 5 "
        "--output_dir output/demo"
    )

    # Train the tokenizer, cache its latents, and measure its reconstructions
    run_command(
        f"main_vae.py {common} --data_path output/demo/data --output_dir output/demo --no_mirror "
        "--vae_embed_dim 8 --ch 32 --ch_mult 1 2 2 --num_res_blocks 1 "
        "--batch_size 64 --epochs 20 --lr 3e-3 --kl_weight 1e-2 --ema_rate 0.99"
    )
    run_command(
        f"main_cache.py {common} {vae} --data_path output/demo/data --cached_path output/demo/cache"
    )
    run_command(
        f"reconstruction.py {common} {vae} --image_dir output/demo/data/val "
        "--output_dir output/demo/reconstruction --bits 5"
    )
    # Train the model, and generate images
    run_command(
        f"main_tokenbridge.py {common} {model} --use_cached --cached_path output/demo/cache "
        "--no_mirror --batch_size 64 --epochs 38 --warmup_epochs 3 --lr 2e-3 --ema_rate 0.99 "
        "--attn_dropout 0 --proj_dropout 0"
    )
    run_command(
        f"main_tokenbridge.py {common} {model} {vae} --evaluate --resume output/demo "
        f"--num_images {10 * SAMPLES_PER_DIGIT} --no_metrics --eval_bsz 100 --num_iter 16 "
        "--cfg 2.0 --temperature 0.95"
    )

    # Plots and accuracy
    reconstruction = next((out / "reconstruction").glob("*/reconstruction.png"))
    shutil.copy(reconstruction, out / "reconstruction.png")
    plot_loss(out, out / "loss.png")
    results = recognized(out / "data", out / "samples")
    results["minutes"] = (time.perf_counter() - started) / 60
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(
        f"\nThe classifier recognizes {results['recognized_val']:.1%} of held-out digits "
        f"and {results['recognized_samples']:.1%} of the samples "
        f"({results['minutes']:.1f} minutes in total)."
    )
    for name in ("samples.png", "reconstruction.png", "loss.png", "samples", "results.json"):
        print(f"output/demo/{name}")


if __name__ == "__main__":
    main()
