"""Reads the experiments of ``tables.yaml``, and plans the commands that they need."""

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from util.errors import UserError

DEFAULT = Path(__file__).parent / "tables.yaml"
FLOOR = "training-images"  # the row of training images, against which others are read


class Row(NamedTuple):
    """A row of a table at one scale."""

    name: str
    result: str  # "run/sampling" or "reconstruction/name": what is run and measured, once for all tables
    cfg: float | None  # guidance scale, where one is shown alone
    paper: tuple[float, float] | None  # gFID or rFID, and Inception Score
    paper_head: str | None = None  # the head's parameters as the paper counts them


class Step(NamedTuple):
    """A command, in the words behind ``python``, and the names of the steps that it needs."""

    name: str
    words: list[str]
    needs: list[str]
    measures: str = ""  # the result that it measures, if it does

    def path(self, flag: str) -> Path:
        """The path that the command has for a flag."""
        return Path(self.words[self.words.index(flag) + 1])


class Experiments:
    """The experiments of a file, at one scale.

    Args:
        path: a file such as ``tables.yaml``, which explains its parts.
        scale: one of its scales.

    Raises:
        UserError: there is no such file, or no such scale in it.
    """

    def __init__(self, path: str | Path, scale: str):
        try:
            self.content: dict[str, Any] = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise UserError(
                f"cannot read the experiments of {path}: {' '.join(str(error).split())}"
            ) from error
        if scale not in self.content["scales"]:
            raise UserError(f"--scale {scale}: {path} has {', '.join(self.content['scales'])}")
        self.scale, self.commands = scale, self.content["scales"][scale]

    def has(self, part: str, name: str) -> bool:
        """Whether the scale has an entry of ``runs`` or ``samplings``."""
        return isinstance(self.content[part][name], str) or self.scale in self.content[part][name]

    def flags(self, part: str, name: str) -> str:
        """The flags of an entry of ``runs``, ``samplings`` or ``reconstructions``."""
        flags = self.content[part][name]
        return flags if isinstance(flags, str) else flags[self.scale]

    def rows(self, table: str) -> list[Row]:
        """The rows of a table that the scale has."""
        found = []
        for row in self.content["tables"][table]["rows"]:
            paper = tuple(row["paper"]) if "paper" in row else None
            if "reconstruction" in row:
                there, result = (
                    "reconstruction" in self.commands,
                    f"reconstruction/{row['reconstruction']}",
                )
            else:
                sampling = row.get("sampling", "plain")
                there = self.has("runs", row["run"]) and self.has("samplings", sampling)
                result = f"{row['run']}/{sampling}"
            if there and self.scale in row.get("scales", [self.scale]):
                found.append(Row(row["name"], result, row.get("cfg"), paper, row.get("paper_head")))
        return found


def merged(*texts: str) -> list[str]:
    """The words of a command: a program with flags, and further flags, which replace those of the same name."""
    program, flags = [], {}
    for word in (word for text in texts for word in shlex.split(text)):
        if word.startswith("--"):
            flags[word] = values = []
        elif flags:
            values.append(word)
        else:
            program.append(word)
    return [*program, *(word for flag, values in flags.items() for word in (flag, *values))]


class Planner:
    """Collects the steps of experiments, each once.

    Args:
        experiments: what the steps are for.
        folder: of everything that the steps write.
        source: of the images, where the scale does not make them.
        device: of the commands.
    """

    def __init__(self, experiments: Experiments, folder: str, source: str, device: str):
        self.experiments, self.commands, self.folder = experiments, experiments.commands, folder
        self.names = {"source": source, "data": f"{folder}/data", "device": device}
        self.steps: dict[str, Step] = {}

    def add(
        self,
        name: str,
        seed: int | None,
        needs: list[str],
        *texts: str,
        measures: str = "",
        **names: str,
    ) -> str:
        """Adds a step, unless it is there, with the scale's names filled in; returns its name."""
        at = self.folder if seed is None else f"{self.folder}/seed{seed}"
        name = name if seed is None else f"seed{seed}/{name}"
        names = {**self.names, "at": at, "seed": str(seed), **names}
        words = merged(*(text.format(**names) for text in texts))
        self.steps.setdefault(name, Step(name, words, needs, measures))
        return name

    def base(self, seed: int, tokenizer: str) -> list[str]:
        """The steps that every training of a seed needs: data, tokenizer and caches of its latents."""
        commands, options = self.commands, {"tokenizer": tokenizer}
        tokenizers = commands["tokenizers"]
        needs = [self.add("data", None, [], commands["data"])] if "data" in commands else []
        trained = self.add("tokenizers/plain", seed, needs, tokenizers["plain"])
        if tokenizer != "plain":
            trained = self.add(f"tokenizers/{tokenizer}", seed, [trained], tokenizers[tokenizer])
        steps = {}
        for name, need in {
            "cache": trained,
            "val_cache": trained,
            "pack": "cache",
            "order": "pack",
        }.items():
            if name in commands:
                done = f"tokenizers/{tokenizer}-{name}"
                steps[name] = self.add(
                    done, seed, [steps.get(need, need)], commands[name], **options
                )
        return [trained, *steps.values()]

    def add_row(self, result: str, seed: int) -> None:
        """Adds all steps that a row's result of a seed needs."""
        commands, (run, sampling) = self.commands, result.split("/")
        if run == "reconstruction":
            needs, options = self.base(seed, "plain")[:1], {"result": result, "tokenizer": "plain"}
            texts = commands["reconstruction"], self.experiments.flags("reconstructions", sampling)
        else:
            entry = self.experiments.content["runs"][run]
            tokenizer = "plain" if isinstance(entry, str) else entry.get("tokenizer", "plain")
            options = {"result": result, "run": run, "tokenizer": tokenizer}
            flags = self.experiments.flags("runs", run)
            needs = self.base(seed, tokenizer)
            needs = [
                self.add(f"{run}/training", seed, needs, commands["training"], flags, **options)
            ]
            texts = commands["sampling"], self.experiments.flags("samplings", sampling)
        needs = [
            self.add(
                f"{result}-sampling" if run != "reconstruction" else result,
                seed,
                needs,
                *texts,
                **options,
            )
        ]
        more = ""
        if "--evaluate_nll" in texts[1]:
            more = "--resume {at}/{run} --cached_val_path {at}/tokenizers/{tokenizer}/val_cache"
        self.measure(seed, needs, more, **options)

    def measure(self, seed: int, needs: list[str], more: str, **options: str) -> None:
        """Adds the measuring of a result, where the scale's commands do not measure themselves."""
        if "measuring" not in self.commands:
            return
        data = self.add("data", None, [], self.commands["data"])
        net = self.add("features", seed, [data], self.commands["features"])
        name = f"{options['result']}-measuring"
        self.add(
            name,
            seed,
            [*needs, net],
            self.commands["measuring"],
            more,
            measures=options["result"],
            **options,
        )

    def add_floor(self, seed: int) -> None:
        """Adds the measuring of training images."""
        if "measuring" in self.commands:
            self.measure(seed, [], self.commands["floor"], result=FLOOR)


def plan(
    experiments: Experiments,
    tables: Iterable[str],
    seeds: Iterable[int],
    folder: str,
    source: str,
    device: str,
) -> dict[str, Step]:
    """All steps of some tables, by name: those of the first seed first, each after those that it needs.

    Raises:
        UserError: there is no such table, or none of them has a row at this scale.
    """
    known = experiments.content["tables"]
    if unknown := [table for table in tables if table not in known]:
        raise UserError(f"there is no table {unknown[0]}: choose of {', '.join(known)}, or all")
    results = dict.fromkeys(row.result for table in tables for row in experiments.rows(table))
    if not results:
        raise UserError(
            f"none of these tables has rows at --scale {experiments.scale}: {', '.join(tables)}"
        )
    planner = Planner(experiments, folder, source, device)
    for seed in seeds:
        planner.add_floor(seed)
        for result in results:
            planner.add_row(result, seed)
    return planner.steps


def needed(steps: Mapping[str, Step], targets: Iterable[str]) -> set[str]:
    """The names of the steps ``targets``, and of all that they need."""
    found: set[str] = set()
    for target in targets:
        found |= {target} | needed(steps, steps[target].needs)
    return found
