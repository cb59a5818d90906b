"""The documentation keeps its word: links lead somewhere, and commands are accepted by the programs that they call."""

import argparse
import importlib.util
import re
import shlex
from functools import lru_cache
from pathlib import Path
from unittest import mock

import pytest

from experiments.plan import DEFAULT, Experiments, plan
from experiments.report import model_of
from tests.conftest import ROOT
from util.args import NOT_NEEDED

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / folder / "README.md" for folder in ("benchmarks", "experiments")]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
#: Flags in running text that are other programs'.
FOREIGN_FLAGS = {"--max_restarts", "--nnodes", "--local_addr", "--signal"}
#: Programs before they moved, which CHANGELOG.md names.
FORMER = {
    "figures",
    "channel_order",
    "util.download",
    "util.packed",
    "util.checkpoint",
    "demo.generate",
}

# --------------------------------------------------------------------------------------------------------------------
# Reading Markdown.


def split(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Running text, and the code blocks with their languages."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), blocks


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.+)$", split(page.read_text())[0], flags=re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading.strip()).lower()
        found.append(re.sub(r"[^\w\- ]", "", text).replace(" ", "-"))
    return {f"{name}-{n}" if (n := found[:i].count(name)) else name for i, name in enumerate(found)}


def broken_links(text: str, page: Path) -> list[str]:
    """Relative links of a page that lead to no file, or to no heading of it."""
    broken = []
    for link in re.findall(r"\[[^]]*\]\(([^)\s]+)\)", split(text)[0]):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def commands(text: str) -> list[list[str]]:
    """The commands in a page's code blocks, in words: programs of this project and what is passed to them."""
    blocks = [block.replace("\\\n", " ") for language, block in split(text)[1] if not language]
    lines = "\n".join(blocks).splitlines()
    calls = [
        shlex.split(line, comments=True)
        for line in lines
        if re.match(r"(\w+=\S+ )*(python|torchrun) ", line)
    ]
    return [call for words in calls if (call := program(words))]


def program(words: list[str]) -> list[str]:
    """The script or module that ``python`` or ``torchrun`` runs, with its arguments; empty for ``python -c``."""
    for i, word in enumerate(words):
        if word.endswith(".py"):
            return [word.removesuffix(".py").replace("/", "."), *words[i + 1 :]]
        if word == "-m":
            return words[i + 1 :]
        if word == "-c":
            return []
    raise AssertionError(f"this runs nothing of the project: {' '.join(words)}")


# --------------------------------------------------------------------------------------------------------------------
# The parsers.


@lru_cache
def parser_of(module: str) -> argparse.ArgumentParser:
    """A program's parser; benchmarks make theirs when they start."""
    imported = importlib.import_module(module)
    if hasattr(imported, "get_args_parser"):
        return imported.get_args_parser()
    stop = mock.patch.object(
        argparse.ArgumentParser, "parse_args", autospec=True, side_effect=InterruptedError
    )
    with stop as parse, pytest.raises(InterruptedError):
        imported.main()
    return parse.call_args.args[0]


def all_parsers() -> list[argparse.ArgumentParser]:
    """Every parser of the project's programs, those of subcommands included."""
    modules = [path.stem for path in [*ROOT.glob("main_*.py"), ROOT / "reconstruction.py"]]
    modules += ["generate", "demo.web"]
    modules += [
        f"experiments.{name}" for name in ("run", "data", "features", "measures", "unequal")
    ]
    modules += [
        f"tools.{path.stem}" for path in (ROOT / "tools").glob("*.py") if path.stem != "__init__"
    ]
    modules += [
        f"benchmarks.{name}"
        for name in ("quantizer", "head_speed", "sampling", "training", "loader", "ranks", "curves")
    ]
    parsers = [parser_of(module) for module in modules]
    actions = [action for parser in parsers for action in parser._actions]
    nested = [
        action.choices.values()
        for action in actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    return parsers + [parser for choices in nested for parser in choices]


def refusal(call: list[str], capsys) -> str:
    """What a program says about a command that it does not accept; empty if it accepts it."""
    module, *words = call
    if not words and not hasattr(importlib.import_module(module), "get_args_parser"):
        return ""  # such as benchmarks.table, which takes no flags
    try:
        parser_of(module).parse_args([word for word in words if word != "..."])
    except SystemExit as stop:
        return capsys.readouterr().err.strip().splitlines()[-1] if stop.code else ""
    return ""


# --------------------------------------------------------------------------------------------------------------------
# The tests.


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    assert broken_links(page.read_text(), page) == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_are_accepted(page, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")  # recipes
    for language, block in split(page.read_text())[1]:
        if language == "yaml":  # its first line names the file
            Path(block.split()[1]).write_text(block)
    refused = {
        shlex.join(call): why
        for call in commands(page.read_text())
        if (why := refusal(call, capsys))
    }
    assert refused == {}


def test_commands_build_models_of_the_sizes_that_pages_tell():
    counts = {}
    for call in commands((ROOT / "README.md").read_text()):
        if call[0] == "main_tokenbridge":
            model = model_of(call)
            counts.setdefault(
                f"-{call[call.index('--model') + 1].split('_')[1][0].upper()}", set()
            ).add(sum(parameter.numel() for parameter in model.parameters()) // 10**6)
    told = re.findall(
        r"^\| TokenBridge(-\w) \(paper\) \| (\d+)M",
        (ROOT / "README.md").read_text(),
        flags=re.MULTILINE,
    )
    assert counts == {name: {int(count)} for name, count in told} and len(told) == 2


def test_the_parallel_head_of_the_documentation_is_that_of_table_2a():
    page = (ROOT / "docs/variants.md").read_text()
    (call,) = [
        call for call in commands(page) if "parallel" in call and call[0] == "main_tokenbridge"
    ]
    row = plan(Experiments(DEFAULT, "imagenet"), ["table2a"], [0], "", "", "cuda")[
        "seed0/parallel/training"
    ].words
    documented, planned = (
        vars(parser_of("main_tokenbridge").parse_args(words[1:])) for words in (call, row)
    )
    of_the_folder = {"cached_path", "output_dir", "resume", "seed"}
    assert {name for name in planned if documented[name] != planned[name]} <= of_the_folder


@pytest.mark.parametrize("script", [path.name for path in (ROOT / "tools/slurm").glob("*.slurm")])
def test_commands_of_slurm_scripts_are_accepted(script, capsys):
    lines = (ROOT / "tools/slurm" / script).read_text().replace("\\\n", " ").splitlines()
    (command,) = [shlex.split(line.removesuffix("&")) for line in lines if line.startswith("srun ")]
    assert refusal(program(command), capsys) == ""


def test_flags_in_running_text_exist():
    known = {
        flag for parser in all_parsers() for flag in parser._option_string_actions
    } | FOREIGN_FLAGS
    known |= {f"--{name}" for name in NOT_NEEDED}
    for page in PAGES:
        spans = re.findall(r"`([^`]+)`", split(page.read_text())[0])
        flags = {flag for span in spans for flag in re.findall(r"(?<![\w-])--\w+", span)}
        assert flags <= known, page


def test_every_flag_has_help():
    actions = [action for parser in all_parsers() for action in parser._actions]
    bare = [
        action
        for action in actions
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    ]
    assert [action.option_strings or action.dest for action in bare] == []


def test_programs_in_running_text_exist():
    for page in PAGES:
        spans = re.findall(r"`(python [^`]+)`", split(page.read_text())[0])
        named = {program(span.split())[0] for span in spans} - FORMER
        assert {name for name in named if importlib.util.find_spec(name) is None} == set(), page


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"(?:^|`)make ([\w-]+)", page.read_text(), flags=re.MULTILINE)
        assert set(named) <= targets, page


def test_what_is_wrong_is_found(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `page`, with words\n\n[a](#a-page-with-words) [b](#b) [c](c.md) [d](https://example.com/x)\n"
    )
    assert broken_links(page.read_text(), page) == ["#b", "c.md"]
    text = "```\n# a comment\nX=1 torchrun --nnodes=2 \\\nmain_cache.py --split val --no_flag ${X}  # why\n```\n"
    (call,) = commands(text)
    assert call == ["main_cache", "--split", "val", "--no_flag", "${X}"]
    assert "--no_flag" in refusal(call, capsys)
    assert "invalid choice" in refusal(["tools.figures", "level"], capsys)
    assert not refusal(["tools.figures", "levels", "--quant_bits", "6"], capsys)
    with pytest.raises(ModuleNotFoundError):
        refusal(["tools.nothing", "--help"], capsys)
