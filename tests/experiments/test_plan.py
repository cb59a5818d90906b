"""The experiments of tables.yaml and their commands."""

import shlex

import pytest

from experiments.plan import DEFAULT, Experiments, merged, needed, plan
from experiments.run import comparable
from tests.test_docs import program, refusal

SCALES = ("digits", "cifar10", "photographs", "objects", "objects3", "imagenet")
ALL = {scale: Experiments(DEFAULT, scale) for scale in SCALES}
TABLES = [
    (scale, table)
    for scale, experiments in ALL.items()
    for table in experiments.content["tables"]
    if experiments.rows(table)
]


@pytest.mark.parametrize(("scale", "table"), TABLES)
def test_scripts_accept_the_commands_of_dry_runs(scale, table, run, capsys, tmp_path):
    flags = f"--scale {scale} --dry_run --seeds 3 --output_dir {tmp_path}"
    run("experiments.run", f"{table} {flags}")
    lines = capsys.readouterr().out.splitlines()
    assert len({*lines}) == len(lines) >= 2 and not [*tmp_path.iterdir()]
    for line in lines:
        assert not {"&", "|", ";", ">", "<", "{", "}"} & {*line}
        assert refusal(program(shlex.split(line)), capsys) == "", line


def test_tables_have_rows_on_digits_or_on_natural_images():
    names = "table1a table1b table2a table2b table2c table2d table2e table3"
    names += " heads quantizers guidance steps figure8"
    assert {*ALL["digits"].content["tables"]} == {*names.split(), "epochs"}
    assert {table for scale, table in TABLES if scale == "digits"} == {*names.split()}
    natural = {scale: {table for name, table in TABLES if name == scale} for scale in SCALES[2:5]}
    assert natural == {
        "photographs": {"table1a", "table1b"},
        "objects": {"table1a", "table1b", "epochs"},
        "objects3": {"table1a", "table1b", "table2a"},
    }


def test_row_names_are_unique_and_findings_refer_to_them():
    for scale, table in TABLES:
        names = [row.name for row in ALL[scale].rows(table)]
        assert len({*names}) == len(names), (scale, table)
    for scale, findings in ALL["digits"].content["findings"].items():
        for finding in findings:
            names = {row.name for row in ALL[scale].rows(finding["table"])}
            assert {*finding["rows"]} <= names, finding["claim"]


def test_steps_are_unique_and_follow_those_they_need():
    steps = plan(ALL["digits"], ALL["digits"].content["tables"], [0, 1], "out", "", "cpu")
    names = [*steps]
    for name, step in steps.items():
        assert all(names.index(need) < names.index(name) for need in step.needs)
    trainings = [step for step in steps.values() if {"--epochs", "--output_dir"} <= {*step.words}]
    outputs = [step.path("--output_dir") for step in trainings]
    assert len({*outputs}) == len(outputs)
    found = needed(steps, ["seed1/ar/plain-measuring"])
    assert found >= {"data", "seed1/features", "seed1/ar/training"}
    assert not any(name.startswith("seed0") for name in found)


def test_later_flags_replace_earlier_ones():
    words = merged("main.py --a 1 2 --b", "--a 3 --c 4")
    assert words == ["main.py", "--a", "3", "--b", "--c", "4"]


def test_results_are_comparable_across_folders_sources_and_devices():
    def lines(folder: str, source: str, device: str, end: str = "seed0") -> list[str]:
        command = f"python a.py --source {source} --device {device} --output_dir {folder}/{end}"
        return comparable([command], {"output_dir": folder, "data_path": source})

    expected = lines("output/experiments", "data", "cpu")
    for folder in ("o", "/x/output"):
        assert lines(folder, "images/cifar", "cuda:1") == expected
        assert lines(folder, "data", "cpu", end="seed1") != expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("table9", "there is no table table9"),
        ("table2a --scale mnist", "choose one of digits, cifar10, photographs"),
        ("table1a --scale photographs --data_path x", "needs --vae_path"),
        ("table3 --scale cifar10 --dry_run", "none of these tables has rows"),
        ("heads --scale cifar10", "needs --data_path"),
        ("heads --jobs 0", "--jobs"),
        ("heads --experiments nowhere.yaml", "cannot read the experiments of nowhere.yaml"),
    ],
)
def test_invalid_arguments_are_refused(flags, message, refused):
    assert message in refused("experiments.run", flags)
