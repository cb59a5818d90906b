"""Writes the figures of ``benchmarks/README.md`` and of pages in ``docs/`` from the files in ``benchmarks/results``."""

from pathlib import Path

from benchmarks.common import table
from benchmarks.memory import PARTS, smallest_gpu
from util.files import read_json
from util.tables import fill, write_text

HERE = Path(__file__).parent
COMMANDS = {
    "quantizer": "python -m benchmarks.quantizer",
    "head_speed": "python -m benchmarks.head_speed --model tokenbridge_large --tokens 1 4 16 64 --compile",
    "sampling": "python -m benchmarks.sampling --model tokenbridge_large --batch 256 --num_iter 64 --ways bf16",
    "training": "python -m benchmarks.training --model tokenbridge_large --batch 64 --compile --ways bf16",
    "tokenizer": "python -m benchmarks.tokenizer --batch 64",
    "loader": "python -m benchmarks.loader --workers 0 8",
    "ranks": "python -m benchmarks.ranks --model tokenbridge_large --img_size 256 --processes 8 --batch 64",
    "curves": "python -m benchmarks.curves",
}


def tables(device: str) -> str:
    """The section of ``device``, cpu or cuda: a table for each benchmark, or the command that would measure it."""
    parts = []
    for name, command in COMMANDS.items():
        path = HERE / "results" / f"{device}-{name}.json"
        parts.append(f"### {name}, {device}\n")
        if not path.exists():
            command = command if device == "cuda" else f"python -m benchmarks.{name}"
            parts.append(f"Not measured. `{command} --device {device} --json benchmarks/results/{path.name}`\n")
            continue
        content = read_json(path)
        hardware = content["machine"]
        parts.append(table(content["rows"]))
        if path.with_suffix(".png").exists():
            parts.append(f"![{name}](results/{path.stem}.png)\n")
        peaks = ", ".join(f"{value} TFLOP/s {precision}" for precision, value in hardware["matmul_tflops"].items())
        rates = f"matrix products {peaks}; copies {hardware['copy_gb_per_s']} GB/s"
        versions = f"torch {hardware['torch_version']}, commit {hardware['commit'][:12]}"
        parts.append(f"{hardware['device']}, {hardware['threads']} threads; {rates}. {versions}.\n")
    return "\n".join(parts)


def rows(name: str, device: str = "cpu") -> list[dict]:
    """The rows that a benchmark measured."""
    return read_json(HERE / "results" / f"{device}-{name}.json")["rows"]


def masked_head() -> dict[str, str]:
    """What docs/variants.md tells of the masked head's speed against the autoregressive one's, by place."""
    cpu, cuda = ({row["way"]: row for row in rows("training", device)} for device in ("cpu", "cuda"))
    sampling = {row["way"]: row for row in rows("sampling")}
    seconds = {(row["way"], row["precision"], row["tokens"]): row["median_s"] for row in rows("head_speed")}
    tokens = sorted({key[2] for key in seconds})

    def pair(table: dict[str, dict], key: str, ways: str = "bf16", form: str = ".1f") -> str:
        return ", not ".join(f"{table[f'ours, {head}{ways}'][key]:{form}}" for head in ("masked head, ", ""))

    def times(precision: str, of: str) -> list[float]:
        return [seconds[of, precision, n] / seconds["masked head, head_steps 4", precision, n] for n in tokens]

    mar = [ratio for precision in ("bf16", "fp32") for ratio in times(precision, "diffusion head (MAR), 100 steps")]
    faster = {p: ", ".join(f"{ratio:.1f}" for ratio in times(p, "channel head")) for p in ("bf16", "fp32")}
    return {
        "masked_sampling": f"{pair(sampling, 'median_s')} s",
        "masked_training": f"{pair(cpu, 'median_s')} s, and {pair(cpu, 'peak_memory_gib')} GiB",
        "masked_cuda": f"{pair(cuda, 'median_s', form='.2f')} s, compiled "
        f"{pair(cuda, 'median_s', 'bf16, compiled', '.2f')}, and {pair(cuda, 'peak_memory_gib')} GiB",
        "masked_head": f"{faster['bf16']} times faster in bf16, {faster['fp32']} times in fp32, and {min(mar):.0f} to "
        f"{max(mar):.0f} times faster than MAR's diffusion head does with 100 steps",
    }


def reached() -> dict[str, str]:
    """What was measured of each target of the README's first table, by the name of its place there."""
    quantizer = [row["ratio"] for row in rows("quantizer") if row["way"] == "bucketize" and row["levels"] == 64]
    heads = {(row["way"], row["precision"], row["tokens"]): row for row in rows("head_speed")}
    head = heads["channel head", "fp32", 64]["times faster than recomputing"]
    sampling, training = ({row["way"]: row for row in rows(name)} for name in ("sampling", "training"))
    loader = {(row["cache"], row["workers"]): row["ratio"] for row in rows("loader")}
    ranks = {row["way"]: row["ratio"] for row in rows("ranks")}
    ends = [row for row in rows("curves") if row["processes x batch x accumulation"] != "1 x 64 x 1"]
    memory = training["ours, bf16"]["peak_memory_gib"] * 2**30 / 1e9
    cuda = {row["way"]: row["utilization"] for row in rows("training", "cuda")}
    return {
        "quantizer": " and ".join(f"{ratio:.1f}" for ratio in quantizer),
        "head": f"{head:.1f}",
        "sampling": f"{sampling['ours, bf16']['ratio']:.1f} (bf16), {sampling['ours, fp32']['ratio']:.1f} (fp32)",
        "training": f"{training['ours, bf16']['ratio']:.1f} (bf16), {memory:.1f} GB",
        "loader": f"{loader['packed, fp32', 0]:.1f} in one process, {loader['packed, fp32', 2]:.1f} with 2 workers",
        "ranks": f"{ranks['same batch a process']:.2f}, {ranks['same whole batch']:.2f}; runs of their own "
        f"{ranks['runs of their own']:.2f}",
        "cuda_training": f"{cuda['ours, bf16, compiled']:.0%} compiled, {cuda['ours, bf16']:.0%} not",
        "curves": f"{max(abs(row['off_the_mean']) for row in ends):.4f} of {ends[0]['another_seed_within']:.4f}",
    }


def memory() -> str:
    """The table of docs/training.md: GiB, and the smallest GPU."""
    rows = read_json(HERE / "results" / "memory.json")["rows"]
    for row in rows:
        row.update({part: f"{row[part]:.1f} ({smallest_gpu(row[part]) or 'no'} GB)" for part in PARTS})
    return table(rows)


def main() -> None:
    """Fills in the tables."""
    path = HERE / "README.md"
    text = path.read_text()
    for name, value in reached().items():
        text = fill(text, name, value)
    for device in ("cpu", "cuda"):
        text = fill(text, device, f"\n{tables(device)}")
    write_text(path, text)
    docs = HERE.parent / "docs"
    for name, values in {"training": {"memory": f"\n{memory()}"}, "variants": masked_head()}.items():
        text = (docs / f"{name}.md").read_text()
        for place, value in values.items():
            text = fill(text, place, value)
        write_text(docs / f"{name}.md", text)


if __name__ == "__main__":
    main()
