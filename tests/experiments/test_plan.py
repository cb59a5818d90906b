"""The experiments of tables.yaml, and the commands that they make."""

import shlex

import pytest

from experiments import run as runner
from experiments.plan import DEFAULT, Experiments, merged, needed, plan
from tests.test_docs import program, refusal

ALL = {scale: Experiments(DEFAULT, scale) for scale in ("digits", "cifar10", "imagenet")}
TABLES = [
    (scale, table) for scale, of in ALL.items() for table in of.content["tables"] if of.rows(table)
]


@pytest.mark.parametrize(("scale", "table"), TABLES)
def test_dry_runs_print_commands_that_their_programs_accept(scale, table, run, capsys, tmp_path):
    run("experiments.run", f"{table} --scale {scale} --dry_run --seeds 3 --output_dir {tmp_path}")
    lines = capsys.readouterr().out.splitlines()
    assert len({*lines}) == len(lines) >= 2 and not [*tmp_path.iterdir()]
    order = (
        tmp_path / scale / "seed3" / "tokenizers" / "plain" / "channel_order.json"
    )  # is read by the parser
    for line in lines:
        assert not {"&", "|", ";", ">", "<", "{", "}"} & {*line}
        assert refusal(program(shlex.split(line)), capsys) == "", line
    assert not order.exists()


def test_the_issues_tables_are_there():
    asked = "table1a table1b table2a table2b table2c table2d table2e table3 heads quantizers guidance steps figure8"
    assert {*ALL["digits"].content["tables"]} == {*asked.split()}
    assert {table for scale, table in TABLES if scale == "digits"} == {*asked.split()}


def test_rows_are_named_once_and_findings_name_them():
    for scale, table in TABLES:
        names = [row.name for row in ALL[scale].rows(table)]
        assert len({*names}) == len(names), (scale, table)
    for scale, findings in ALL["digits"].content["findings"].items():
        for finding in findings:
            assert {*finding["rows"]} <= {row.name for row in ALL[scale].rows(finding["table"])}, (
                finding["claim"]
            )


def test_steps_come_after_what_they_need_and_once_for_all_tables():
    steps = plan(ALL["digits"], ALL["digits"].content["tables"], [0, 1], "out", "", "cpu")
    names = [*steps]
    assert all(
        names.index(need) < names.index(name) for name, step in steps.items() for need in step.needs
    )
    outputs = [step.words[step.words.index("--output_dir") + 1] for step in steps.values() if "--epochs" in step.words
               and "--output_dir" in step.words]  # fmt: skip
    assert len({*outputs}) == len(outputs)
    assert needed(steps, ["seed1/ar/plain-measuring"]) >= {
        "data",
        "seed1/features",
        "seed1/ar/training",
    }
    assert not any(name.startswith("seed0") for name in needed(steps, ["seed1/ar/plain-measuring"]))


def test_later_flags_replace_earlier_ones():
    assert merged("main.py --a 1 2 --b", "--a 3 --c 4") == [
        "main.py",
        "--a",
        "3",
        "--b",
        "--c",
        "4",
    ]


def test_folder_source_and_device_do_not_matter_for_results():
    made = runner.comparable(["python a.py --source /x --device cuda --at old/seed0"], "old", "/x")
    assert made == runner.comparable(
        ["python a.py --source y --device cpu --at new/seed0"], "new", "y"
    )
    assert made != runner.comparable(
        ["python a.py --source y --device cpu --at new/seed1"], "new", "y"
    )


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("table9", "there is no table table9"),
        ("table2a --scale mnist", "has digits, cifar10, imagenet"),
        ("table3 --scale cifar10 --dry_run", "none of these tables has rows"),
        ("heads --scale cifar10", "needs --data_path"),
        ("heads --jobs 0", "--jobs"),
        ("heads --experiments nowhere.yaml", "cannot read the experiments of nowhere.yaml"),
    ],
)
def test_what_cannot_be_run_is_refused(flags, told, refused):
    assert told in refused("experiments.run", flags)
