"""Write the tables of benchmarks/README.md and docs/training.md from ``benchmarks/results/``."""

import shlex
from pathlib import Path

from benchmarks.common import table
from benchmarks.gpu import COMMANDS, command_of
from benchmarks.memory import PARTS, smallest_gpu
from util.files import read_json
from util.log import counted
from util.tables import fill, write_text

HERE = Path(__file__).parent


def benchmark_tables(device: str) -> str:
    """Return the tables of a device, and the commands of benchmarks that have no results."""
    sections, commands = [], []
    for name in COMMANDS:
        if device == "cpu" and "-" in name:
            continue  # a variant of the flags for CUDA
        path = HERE / "results" / f"{device}-{name}.json"
        if not path.exists():
            commands.append(shlex.join(["python", *command_of(name, device)]))
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
    threads = counted(machine["threads"], "thread")
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
