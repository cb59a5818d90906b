"""Write the measured numbers of benchmarks/README.md and docs/ from ``benchmarks/results/``."""

from pathlib import Path

from benchmarks.common import table
from benchmarks.memory import PARTS, smallest_gpu
from util.files import read_json
from util.tables import fill, write_text

HERE = Path(__file__).parent
#: The commands for CUDA; on the CPU, benchmarks run with their default flags.
CUDA_COMMANDS = {
    "quantizer": "benchmarks.quantizer",
    "head_speed": "benchmarks.head_speed --model tokenbridge_large --compile",
    "sampling": (
        "benchmarks.sampling --model tokenbridge_large --batch 256 --num_iter 64 --ways bf16"
    ),
    "training": "benchmarks.training --model tokenbridge_large --batch 64 --compile --ways bf16",
    "tokenizer": "benchmarks.tokenizer --batch 64",
    "loader": "benchmarks.loader --workers 0 8",
    "ranks": ("benchmarks.ranks --model tokenbridge_large --img_size 256 --processes 8 --batch 64"),
    "curves": "benchmarks.curves",
}


def rows(name: str, device: str = "cpu") -> list[dict]:
    """Return the rows that a benchmark measured."""
    return read_json(HERE / "results" / f"{device}-{name}.json")["rows"]


def tables(device: str) -> str:
    """Return the tables of a device, and the commands of benchmarks that have no results."""
    sections, commands = [], []
    for name, cuda_command in CUDA_COMMANDS.items():
        path = HERE / "results" / f"{device}-{name}.json"
        if not path.exists():
            command = cuda_command if device == "cuda" else f"benchmarks.{name}"
            output = f"--json benchmarks/results/{path.name}"
            commands.append(f"python -m {command} --device {device} {output}")
            continue
        content = read_json(path)
        sections.append(f"### {name}, {device}\n\n{table(content['rows'])}")
        if path.with_suffix(".png").exists():
            sections.append(f"![{name}](results/{path.stem}.png)\n")
        sections.append(f"{describe_machine(content['machine'])}\n")
    if commands:
        sections.append("Not measured:\n\n```\n" + "\n".join(commands) + "\n```\n")
    return "\n".join(sections)


def describe_machine(machine: dict) -> str:
    """Return the device, peak rates and versions of a measurement, as a line of text."""
    peaks = ", ".join(f"{rate} TFLOP/s {p}" for p, rate in machine["matmul_tflops"].items())
    return (
        f"{machine['device']}, {machine['threads']} threads; matrix products {peaks}; "
        f"copies {machine['copy_gb_per_s']} GB/s. "
        f"torch {machine['torch_version']}, commit {machine['commit'][:12]}."
    )


def masked_head_values() -> dict[str, str]:
    """Return the masked head's numbers against the autoregressive head's, for docs/variants.md."""
    cpu, cuda = ({row["way"]: row for row in rows("training", d)} for d in ("cpu", "cuda"))
    sampling = {row["way"]: row for row in rows("sampling")}
    seconds = {
        (row["way"], row["precision"], row["tokens"]): row["median_s"] for row in rows("head_speed")
    }
    tokens = sorted({n for _, _, n in seconds})

    def pair(table: dict[str, dict], key: str, variant: str = "bf16", digits: int = 1) -> str:
        masked, autoregressive = (
            f"{table[f'ours, {head}{variant}'][key]:.{digits}f}" for head in ("masked head, ", "")
        )
        return f"{masked} instead of {autoregressive}"

    def speedups(precision: str, baseline: str) -> list[float]:
        masked = "masked head, head_steps 4"
        return [seconds[baseline, precision, n] / seconds[masked, precision, n] for n in tokens]

    diffusion = [
        ratio
        for precision in ("bf16", "fp32")
        for ratio in speedups(precision, "diffusion head (MAR), 100 steps")
    ]
    bf16, fp32 = (
        ", ".join(f"{ratio:.1f}" for ratio in speedups(precision, "channel head"))
        for precision in ("bf16", "fp32")
    )
    compiled = pair(cuda, "median_s", "bf16, compiled", 2)
    return {
        "masked_sampling": f"{pair(sampling, 'median_s')} s",
        "masked_training": f"{pair(cpu, 'median_s')} s, {pair(cpu, 'peak_memory_gib')} GiB",
        "masked_cuda": (
            f"{pair(cuda, 'median_s', digits=2)} s, {compiled} s compiled, "
            f"{pair(cuda, 'peak_memory_gib')} GiB"
        ),
        "masked_head": (
            f"{bf16} times faster in bf16, {fp32} times faster in fp32, "
            f"{min(diffusion):.0f} to {max(diffusion):.0f} times faster than MAR's diffusion head "
            "with 100 steps"
        ),
    }


def target_values() -> dict[str, str]:
    """Return the measured column of the README's table of targets, by marker name."""
    quantizer = [
        f"{row['ratio']:.1f}"
        for row in rows("quantizer")
        if row["way"] == "bucketize" and row["levels"] == 64
    ]
    heads = {(row["way"], row["precision"], row["tokens"]): row for row in rows("head_speed")}
    head = heads["channel head", "fp32", 64]["speedup over recomputation"]
    sampling, training = (
        {row["way"]: row for row in rows(name)} for name in ("sampling", "training")
    )
    loader = {
        row["workers"]: row["ratio"] for row in rows("loader") if row["cache"] == "packed, fp32"
    }
    ranks = {row["way"]: row["ratio"] for row in rows("ranks")}
    divided = [row for row in rows("curves") if row["ranks x batch x accumulation"] != "1 x 64 x 1"]
    largest = max(abs(row["difference_from_mean"]) for row in divided)
    memory = training["ours, bf16"]["peak_memory_gib"] * 2**30 / 1e9
    cuda = {row["way"]: row["utilization"] for row in rows("training", "cuda")}
    return {
        "quantizer": " and ".join(quantizer),
        "head": f"{head:.1f}",
        "sampling": (
            f"{sampling['ours, bf16']['ratio']:.1f} (bf16), "
            f"{sampling['ours, fp32']['ratio']:.1f} (fp32)"
        ),
        "training": f"{training['ours, bf16']['ratio']:.1f} (bf16), {memory:.1f} GB",
        "loader": f"{loader[0]:.1f} without workers, {loader[2]:.1f} with 2 workers",
        "ranks": (
            f"{ranks['same batch size per process']:.2f} (same batch size per rank), "
            f"{ranks['same global batch size']:.2f} (same global batch size), "
            f"{ranks['independent runs']:.2f} (2 independent runs)"
        ),
        "curves": f"{largest:.4f} of {divided[0]['interval_half_width']:.4f}",
        "cuda_training": (
            f"{cuda['ours, bf16, compiled']:.0%} compiled, {cuda['ours, bf16']:.0%} not compiled"
        ),
    }


def memory_table() -> str:
    """Return the table of docs/training.md: GiB of a training step, and the smallest GPU."""
    lines = read_json(HERE / "results" / "memory.json")["rows"]
    for row in lines:
        for part in PARTS:
            row[part] = f"{row[part]:.1f} ({smallest_gpu(row[part]) or 'no'} GB)"
    return table(lines)


def main() -> None:
    """Fill in all pages."""
    docs = HERE.parent / "docs"
    pages = {
        HERE / "README.md": {
            **target_values(),
            **{device: f"\n{tables(device)}" for device in ("cpu", "cuda")},
        },
        docs / "training.md": {"memory": f"\n{memory_table()}"},
        docs / "variants.md": masked_head_values(),
    }
    for path, values in pages.items():
        text = path.read_text()
        for name, value in values.items():
            text = fill(text, name, value)
        write_text(path, text)


if __name__ == "__main__":
    main()
