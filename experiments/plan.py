"""Read the experiments of ``tables.yaml`` and plan their commands."""

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from util.errors import UserError

DEFAULT = Path(__file__).parent / "tables.yaml"
#: The result of measuring training images in place of samples.
BASELINE = "training-images"


class Row(NamedTuple):
    """A row of a table at one scale."""

    name: str
    #: "<run>/<sampling>" or "reconstruction/<name>": measured once for all tables.
    result: str
    cfg: float | None  # the guidance scale to show; None for all
    paper: tuple[float, float] | None  # gFID or rFID, and Inception Score
    paper_head: str | None = None  # the head's parameters as the paper counts them
    x: float | None = None  # position in a table that is drawn as a curve


class Step(NamedTuple):
    """A command, and the names of the steps that have to run before it."""

    name: str
    words: list[str]  # without the leading "python"
    needs: list[str]
    measures: str = ""  # the result that the command measures, if any

    def path(self, flag: str) -> Path:
        """Return the value of a flag as a path."""
        return Path(self.words[self.words.index(flag) + 1])


class Experiments:
    """The experiments of a file at one scale.

    Args:
        path: a file such as ``tables.yaml``, which documents the format.
        scale: name of a scale in the file.

    Raises:
        UserError: the file cannot be read, or does not have the scale.
    """

    def __init__(self, path: str | Path, scale: str):
        try:
            self.content: dict[str, Any] = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"cannot read the experiments of {path}: {reason}") from error
        scales = self.content["scales"]
        if scale not in scales:
            raise UserError(f"--scale {scale} is not in {path}: choose one of {', '.join(scales)}")
        self.scale, self.commands = scale, scales[scale]

    def has(self, part: str, name: str) -> bool:
        """Return whether an entry of ``runs`` or ``samplings`` exists at this scale."""
        entry = self.content[part][name]
        return isinstance(entry, str) or self.scale in entry

    def flags(self, part: str, name: str) -> str:
        """Return the flags of an entry of ``runs``, ``samplings`` or ``reconstructions``."""
        entry = self.content[part][name]
        return entry if isinstance(entry, str) else entry[self.scale]

    def tokenizer(self, run: str) -> str:
        """Return the name of the tokenizer that a run uses."""
        entry = self.content["runs"][run]
        return "plain" if isinstance(entry, str) else entry.get("tokenizer", "plain")

    def rows(self, table: str) -> list[Row]:
        """Return the rows of a table that exist at this scale."""
        rows = []
        for row in self.content["tables"][table]["rows"]:
            if "reconstruction" in row:
                exists = "reconstruction" in self.commands
                result = f"reconstruction/{row['reconstruction']}"
            else:
                sampling = row.get("sampling", "plain")
                exists = "training" in self.commands and self.has("runs", row["run"])
                exists = exists and self.has("samplings", sampling)
                result = f"{row['run']}/{sampling}"
            if exists and self.scale in row.get("scales", [self.scale]):
                paper = tuple(row["paper"]) if "paper" in row else None
                head, x = row.get("paper_head"), row.get("x")
                rows.append(Row(row["name"], result, row.get("cfg"), paper, head, x))
        return rows


def merged(*texts: str) -> list[str]:
    """Return the words of a command; later flags replace earlier ones of the same name."""
    program: list[str] = []
    flags: dict[str, list[str]] = {}
    values = program
    for word in (word for text in texts for word in shlex.split(text)):
        if word.startswith("--"):
            values = flags[word] = []
        else:
            values.append(word)
    return [*program, *(word for flag, values in flags.items() for word in (flag, *values))]


class Planner:
    """Collects the steps of experiments without repetition.

    Args:
        experiments: the experiments of one scale.
        folder: output folder of all steps.
        source: folder of images, for scales that do not generate them.
        vae_path: tokenizer, for scales that do not train one.
        device: device of the commands.
    """

    def __init__(
        self, experiments: Experiments, folder: str, source: str, vae_path: str, device: str
    ):
        self.experiments, self.commands = experiments, experiments.commands
        self.folder = folder
        self.placeholders = {
            "source": source,
            "vae_path": vae_path,
            "data": f"{folder}/data",
            "device": device,
        }
        self.steps: dict[str, Step] = {}

    def add(
        self,
        name: str,
        seed: int | None,
        needs: list[str],
        *texts: str,
        measures: str = "",
        **placeholders: str,
    ) -> str:
        """Add a step if it is new, with placeholders replaced, and return its name."""
        seed_dir = self.folder if seed is None else f"{self.folder}/seed{seed}"
        name = name if seed is None else f"seed{seed}/{name}"
        common = {**self.placeholders, "seed_dir": seed_dir, "seed": str(seed)}
        words = merged(*(text.format(**{**common, **placeholders}) for text in texts))
        self.steps.setdefault(name, Step(name, words, needs, measures))
        return name

    def add_tokenizer(self, seed: int, tokenizer: str) -> list[str]:
        """Add data, tokenizer and caches of its latents, if the scale has them; return the names.

        The first one is the tokenizer's.
        """
        commands, tokenizers = self.commands, self.commands.get("tokenizers", {})
        needs = self.add_data()
        for name in dict.fromkeys(("plain", tokenizer)):
            if name in tokenizers:
                needs = [self.add(f"tokenizers/{name}", seed, needs, tokenizers[name])]
        added = {"tokenizer": needs}
        parents = {"cache": "tokenizer", "val_cache": "tokenizer", "pack": "cache", "order": "pack"}
        for name, parent in parents.items():
            if name in commands:
                step = f"tokenizers/{tokenizer}-{name}"
                command = self.add(step, seed, added[parent], commands[name], tokenizer=tokenizer)
                added[name] = [command]
        return [name for names in added.values() for name in names]

    def add_data(self) -> list[str]:
        """Add the command that writes the images; return its name, or nothing if there is none."""
        commands = self.commands
        return [self.add("data", None, [], commands["data"])] if "data" in commands else []

    def add_result(self, result: str, seed: int) -> None:
        """Add all steps that lead to a result of one seed."""
        run, sampling = result.split("/")
        if run == "reconstruction":
            needs = self.add_tokenizer(seed, "plain")[:1]
            names = {"result": result, "tokenizer": "plain"}
            flags = self.experiments.flags("reconstructions", sampling)
            command = self.commands["reconstruction"]
            step = self.add(result, seed, needs, command, flags, **names)
        else:
            names = {"result": result, "run": run, "tokenizer": self.experiments.tokenizer(run)}
            needs = self.add_tokenizer(seed, names["tokenizer"])
            flags = self.experiments.flags("runs", run)
            command = self.commands["training"]
            training = self.add(f"{run}/training", seed, needs, command, flags, **names)
            flags = self.experiments.flags("samplings", sampling)
            command = self.commands["sampling"]
            step = self.add(f"{result}-sampling", seed, [training], command, flags, **names)
        likelihood = ""
        if "--evaluate_nll" in flags:
            likelihood = (
                "--resume {seed_dir}/{run} "
                "--cached_val_path {seed_dir}/tokenizers/{tokenizer}/val_cache"
            )
        self.add_measuring(seed, [step], likelihood, **names)

    def add_measuring(self, seed: int, needs: list[str], flags: str, **names: str) -> None:
        """Add the command that measures a result, if the scale has one."""
        if "measuring" not in self.commands:
            return
        result, command = names["result"], self.commands["measuring"]
        if "features" in self.commands:
            features = self.add("features", seed, self.add_data(), self.commands["features"])
            needs = [*needs, features]
        self.add(f"{result}-measuring", seed, needs, command, flags, measures=result, **names)

    def add_baseline(self, seed: int) -> None:
        """Add the measuring of training images in place of samples, if the scale has it."""
        if "baseline" in self.commands:
            self.add_measuring(seed, [], self.commands["baseline"], result=BASELINE)


def plan(
    experiments: Experiments,
    tables: Iterable[str],
    seeds: Iterable[int],
    folder: str,
    source: str,
    device: str,
    vae_path: str = "",
) -> dict[str, Step]:
    """Return all steps of some tables by name: seed after seed, each step after those it needs.

    Raises:
        UserError: a table does not exist, or none of them has a row at this scale.
    """
    known = experiments.content["tables"]
    if unknown := [table for table in tables if table not in known]:
        raise UserError(
            f"there is no table {unknown[0]}: choose from {', '.join(known)}, or pass all"
        )
    results = dict.fromkeys(row.result for table in tables for row in experiments.rows(table))
    if not results:
        names = ", ".join(tables)
        raise UserError(f"none of these tables has rows at --scale {experiments.scale}: {names}")
    planner = Planner(experiments, folder, source, vae_path, device)
    for seed in seeds:
        planner.add_baseline(seed)
        for result in results:
            planner.add_result(result, seed)
    return planner.steps


def needed(steps: Mapping[str, Step], targets: Iterable[str]) -> set[str]:
    """Return the names of ``targets`` and of all steps that they need."""
    found: set[str] = set()
    for target in targets:
        found |= {target} | needed(steps, steps[target].needs)
    return found
