"""Write the tables of benchmarks/README.md and docs/training.md from ``benchmarks/results/``."""

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
    "ranks": "benchmarks.ranks --model tokenbridge_large --img_size 256 --processes 8 --batch 64",
    "curves": "benchmarks.curves",
}


def benchmark_tables(device: str) -> str:
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
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    return (
        f"{machine['device']}, {threads}; matrix products {peaks}; "
        f"copies {machine['copy_gb_per_s']} GB/s. "
        f"torch {machine['torch_version']}, commit {machine['commit'][:12]}."
    )


def memory_table() -> str:
    """Return the table of docs/training.md: GiB of a training step, and the smallest GPU."""
    rows = read_json(HERE / "results" / "memory.json")["rows"]
    for row in rows:
        for part in PARTS:
            row[part] = f"{row[part]:.1f} ({smallest_gpu(row[part]) or 'no'} GB)"
    return table(rows)


def main() -> None:
    """Write all tables."""
    pages = {
        HERE / "README.md": {"cpu": benchmark_tables("cpu"), "cuda": benchmark_tables("cuda")},
        HERE.parent / "docs" / "training.md": {"memory": memory_table()},
    }
    for path, contents in pages.items():
        text = path.read_text()
        for name, content in contents.items():
            text = fill(text, name, f"\n{content}")
        write_text(path, text)


if __name__ == "__main__":
    main()
