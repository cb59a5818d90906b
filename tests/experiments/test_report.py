"""The report reproduces the committed pages and plots, and formats results correctly."""

import json

import matplotlib
import pytest
from PIL import Image

from experiments import report
from experiments.plan import DEFAULT, Experiments
from experiments.results import (
    BASELINE_ROW,
    RESULTS,
    Results,
    comparison_table,
    finding_table,
    row_table,
)
from util.metrics.plots import save_figure


def test_committed_pages_are_up_to_date():
    for path, text in report.pages().items():
        assert path.read_text() == text, f"{path}: run python -m experiments.report"


def test_head_sizes_of_tables_2d_and_2e():
    rows = [line.strip("| ").split(" | ") for line in report.head_sizes().splitlines()[2:]]
    counts = {paper: float(ours.removesuffix("M")) for _, _, paper, ours in rows}
    # Our counts agree with the paper's in Table 2d, but not in Table 2e.
    assert counts == {
        "60M": 60.1, "63M": 63.5, "530M": 529.6,
        "3M": 4.5, "10M": 16.3, "13M": 21.0, "65M": 80.8, "94M": 118.6,
    }  # fmt: skip


def test_committed_plots_are_up_to_date(tmp_path):
    plots = report.plots()
    assert {*plots} == {*RESULTS.rglob("*.png")}
    for path, figure in plots.items():
        software = Image.open(path).info["Software"].split(",")[0]
        if software != f"Matplotlib version{matplotlib.__version__}":
            pytest.skip("plots were drawn by another version of matplotlib")
        save_figure(figure, tmp_path / "plot.png")
        drawn, committed = (Image.open(file).tobytes() for file in (tmp_path / "plot.png", path))
        assert drawn == committed, f"{path}: run python -m experiments.report"


def test_result_files_have_commands_and_device():
    others = {*report.CURVES_FOLDER.iterdir(), *report.COST_FOLDER.iterdir()}
    for path in {*RESULTS.glob("*/*.json")} - others:
        content = json.loads(path.read_text())
        assert path.stem == f"{content['result'].replace('/', '-')}-seed{content['seed']}"
        assert content["commands"] and content["device"] and len(content["commit"]) >= 40


def write(folder, result: str, seed: int, **numbers) -> None:
    """Write a result file of the scale ``digits``."""
    images = {cfg: {"pixels": {"frechet": value}} for cfg, value in numbers.pop("frechet").items()}
    content = {"result": result, "seed": seed, "images": images, "device": "CPU, AVX2"}
    content["training_seconds"] = 5.0
    path = folder / "digits" / f"{result.replace('/', '-')}-seed{seed}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**content, **numbers}))


@pytest.fixture
def written(tmp_path):
    """Results of Table 2a: three seeds of one row, one seed of the other row."""
    for seed, value in enumerate((10.0, 12.0, 14.0)):
        write(tmp_path, "ar/plain", seed, frechet={"1": value, "2": value + 10}, nats=2.0 + seed)
    write(tmp_path, "parallel/plain", 0, frechet={"1": 30.0})
    write(tmp_path, "training-images", 0, frechet={"images": 3.0}, training_seconds=None)
    return tmp_path


def test_tables_show_mean_std_and_interval(written):
    rows = Experiments(DEFAULT, "digits").rows("table2a")
    table = row_table(Results(written, "digits"), [BASELINE_ROW, *rows]).splitlines()
    assert table[2] == "| training images (baseline) | - | 1 CPU | 3.0 | - | - |"
    assert table[3] == "| parallel | 1 | 1 CPU: 5 | 30.0 | - | 15.7, 158.5 |"
    # 4.303 * 2 * sqrt(4 / 3) = 9.94
    start = "| autoregressive | 1 | 3 CPU: 5 | 12.0 ± 2.0 (2.1 to 21.9) | 3.000 ± 1.000 ("
    assert table[4].startswith(start)
    assert table[5].startswith("| autoregressive | 2 | 3 CPU: 5 | 22.0 ± 2.0 (12.1 to 31.9) |")


def test_intervals_are_clipped_and_cells_with_fewer_seeds_say_so(tmp_path):
    for seed, value in enumerate((0.9, 0.95, 1.0)):
        write(tmp_path, "ar/plain", seed, frechet={"1": 5.0}, **({"nats": 1.0} if seed else {}))
        path = tmp_path / "digits" / f"ar-plain-seed{seed}.json"
        content = json.loads(path.read_text())
        content["images"]["1"]["pixels"]["recall"] = value
        path.write_text(json.dumps(content))
    rows = Experiments(DEFAULT, "digits").rows("table2a")
    table = row_table(Results(tmp_path, "digits"), rows).splitlines()
    # Equal values have no interval. 0.95 - 4.303 * 0.05 * sqrt(4 / 3) = 0.702.
    assert "| 5.0 | 0.950 ± 0.050 (0.702 to 1.000) | 1.000, 2 seeds |" in table[3]


def test_a_seed_is_compared_with_the_interval_of_the_others(written):
    write(written, "ar/plain", 3, frechet={"1": 15.0})
    rows = Experiments(DEFAULT, "digits").rows("table2a")
    results = Results(written, "digits", seeds=[3])
    others = Results(written, "digits", without=[3])
    table = comparison_table(results, others, rows).splitlines()
    assert len(table) == 3
    assert table[2].startswith("| autoregressive | 1 | 3 | 15.0 (2.1 to 21.9) |")


def test_findings_compare_the_seeds_of_both_rows(written):
    experiments = Experiments(DEFAULT, "digits")
    table = finding_table(Results(written, "digits"), experiments).splitlines()
    cells = "1.94 and 15.7 | Frechet distance, guidance 1 | 10.0 and 30.0 | -20.0 (-) | 1 | "
    cells += "inconclusive (1 of 1 seeds agree)"
    assert len(table) == 3 and cells in table[2]
    for seed in (1, 2):
        write(written, "parallel/plain", seed, frechet={"1": 32.0})
    table = finding_table(Results(written, "digits"), experiments).splitlines()
    assert table[2].endswith("| 3 | holds |")
