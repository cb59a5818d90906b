"""Run the experiments of ``tables.yaml``: train, sample and measure every row without a result."""

import argparse
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import util.interpreter  # noqa: F401, before all packages

import torch

from experiments.plan import DEFAULT, Experiments, Step, needed, plan
from experiments.results import RESULTS, Results, comparison_table
from util.args import add_device_arg, check_positive, new_parser
from util.checkpoint.hub import is_address
from util.data.caches import PACKED_METADATA
from util.devices import find_device
from util.errors import UserError
from util.errors import run as run_main
from util.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
#: Imported once, in the process from which all commands are forked.
PRELOADED = [
    "main_vae",
    "main_cache",
    "main_tokenbridge",
    "reconstruction",
    "tools.pack",
    "experiments.measures",
]
FAILED_STATUS = 1


def get_args_parser() -> argparse.ArgumentParser:
    """Return the command line of this script."""
    parser = new_parser(__doc__)
    text = "tables of the experiments, such as table2a, or all"
    parser.add_argument("tables", nargs="+", metavar="TABLE", help=text)
    text = "digits, cifar10, photographs, objects, or imagenet, whose commands are only printed"
    parser.add_argument("--scale", default="digits", help=text)
    text = "random seeds; each trains its own tokenizer and models"
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help=text)
    text = "images of the other scales: train/<class>/<image> and, except for photographs, val/"
    parser.add_argument("--data_path", default="", help=text)
    text = "tokenizer of photographs and objects, such as a tiny autoencoder"
    parser.add_argument("--vae_path", default="", help=text)
    text = "folder of checkpoints, caches, samples and logs"
    parser.add_argument("--output_dir", default="output/experiments", help=text)
    text = "folder of the results, a JSON file per row and seed"
    parser.add_argument("--results", default=str(RESULTS), help=text)
    text = "YAML file that defines the experiments"
    parser.add_argument("--experiments", default=str(DEFAULT), help=text)
    parser.add_argument("--jobs", type=int, default=1, help="commands to run at the same time")
    add_device_arg(parser)
    text = "print the commands without running them"
    parser.add_argument("--dry_run", action="store_true", help=text)
    return parser


# --------------------------------------------------------------------------------------------------
# Commands.


def command_line(step: Step) -> str:
    """Return a step's command as one would type it."""
    return shlex.join(["python", *step.words])


def commands_of(steps: dict[str, Step], step: Step) -> list[str]:
    """Return the command lines that lead to a step, in the order in which they run."""
    names = needed(steps, [step.name])
    return [command_line(other) for name, other in steps.items() if name in names]


def comparable(commands: list[str], paths: Mapping[str, str]) -> list[str]:
    """Return command lines without the device, and with the names of ``paths`` in their place.

    Results that differ only in these count as results of the same experiment.
    """
    lines = [re.sub(r" --device \S+", "", line) for line in commands]
    for name, path in paths.items():
        if path:
            pattern = rf"(?<= ){re.escape(path)}(?=[ /]|$)"
            lines = [re.sub(pattern, name, line) for line in lines]
    return lines


def paths_of(args: argparse.Namespace) -> dict[str, str]:
    """Return the paths on which results do not depend, as their files store them."""
    return {name: getattr(args, name) for name in ("output_dir", "data_path", "vae_path")}


def stop_with_runner() -> None:
    """Wait until the parent process ends, then send SIGTERM to this one, which may save."""
    runner = multiprocessing.parent_process()
    assert runner is not None
    runner.join()
    os.kill(os.getpid(), signal.SIGTERM)


def execute(words: list[str], log: Path) -> None:
    """Run ``python <words>`` in this forked process, with output appended to ``log``."""
    threading.Thread(target=stop_with_runner, daemon=True).start()
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


class Record:
    """A step's state on disk: seconds it has run, and whether it has finished.

    Starts from zero if the command, or a command that it depends on, has changed.

    Args:
        path: the file.
        commands: command lines, see :func:`commands_of`.
    """

    def __init__(self, path: Path, commands: list[str]):
        self.path, self.log = path, path.with_suffix(".log")
        self.content: dict[str, Any] = {"commands": commands, "seconds": 0.0, "finished": False}
        with suppress(UserError):
            saved = read_json(path)
            if saved["commands"] == commands:
                self.content = saved

    def add(self, seconds: float, finished: bool) -> None:
        """Add seconds to the record and save it."""
        self.content["seconds"] += seconds
        self.content["finished"] = finished
        write_json(self.path, self.content)


# --------------------------------------------------------------------------------------------------
# Results.


def seed_of(step: Step) -> int:
    """Return the seed of a step that has one."""
    return int(step.name.split("/")[0].removeprefix("seed"))


def result_path(args: argparse.Namespace, step: Step) -> Path:
    """Return the file for the result of a measuring step."""
    name = step.measures.replace("/", "-")
    return Path(args.results) / args.scale / f"{name}-seed{seed_of(step)}.json"


def has_result(steps: dict[str, Step], step: Step, args: argparse.Namespace) -> bool:
    """Return whether a result of ``step`` exists that the same commands produced."""
    path = result_path(args, step)
    if not path.exists():
        return False
    result = read_json(path)
    paths = paths_of(args)
    saved = comparable(result["commands"], {name: result.get(name, "") for name in paths})
    return saved == comparable(commands_of(steps, step), paths)


def missing(steps: dict[str, Step], args: argparse.Namespace) -> dict[str, Step]:
    """Return the steps that lead to results that do not exist."""
    targets = [
        step.name for step in steps.values() if step.measures and not has_result(steps, step, args)
    ]
    names = needed(steps, targets)
    return {name: step for name, step in steps.items() if name in names}


def device_name(device: str) -> str:
    """Return the name of a GPU, or the CPU's instruction set and number of threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU, {capability}, {os.environ['OMP_NUM_THREADS']} threads"


# --------------------------------------------------------------------------------------------------
# Running all steps.


class Job(NamedTuple):
    """A step whose command is running."""

    step: Step
    process: Any
    started: float  # time.perf_counter()


class Runner:
    """Runs steps in parallel, each as soon as the steps that it needs have finished.

    Args:
        steps: all steps by name. Steps whose results exist are skipped; the others start in this
            order where possible.
        args: the command line.
        space: what distances of samples are measured in, ``pixels`` or ``features``.
    """

    def __init__(self, steps: dict[str, Step], args: argparse.Namespace, space: str):
        self.steps, self.args, self.space = steps, args, space
        folder = Path(args.output_dir) / args.scale / "steps"
        self.records = {
            name: Record(folder / f"{name.replace('/', '-')}.json", commands_of(steps, step))
            for name, step in steps.items()
        }
        self.waiting: list[Step] = []
        self.jobs: dict[Any, Job] = {}  # by sentinel of the process
        self.failures: dict[str, str] = {}  # reasons by step name
        self.total = self.done = 0
        self.device = device_name(args.device)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)

    def run(self) -> None:
        """Run all steps that have not finished.

        On Ctrl-C or SIGTERM, terminate running commands, which save their state.
        """
        for step in missing(self.steps, self.args).values():
            # Measured before, but interrupted, or for another --results folder.
            if step.measures and self.finished(step):
                self.write_result(step)
        steps = missing(self.steps, self.args).values()
        self.waiting = [step for step in steps if not self.finished(step)]
        self.total = len(self.waiting)
        # A shell starts background jobs with SIGINT ignored. Both signals stop this run anyway.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        try:
            while self.waiting or self.jobs:
                self.start_ready_steps()
                for sentinel in wait([*self.jobs]) if self.jobs else ():
                    self.finish(self.jobs.pop(sentinel))
        except KeyboardInterrupt:
            for job in self.jobs.values():
                job.process.terminate()
            for job in self.jobs.values():
                self.record(job)
            raise

    def finished(self, step: Step) -> bool:
        """Return whether a step's command has finished, in this run or an earlier one."""
        return self.records[step.name].content["finished"]

    def start_ready_steps(self) -> None:
        """Start steps whose needs have finished, up to ``--jobs``; fail those that cannot run."""
        unfinished = {step.name for step in self.waiting}
        unfinished |= {job.step.name for job in self.jobs.values()}
        waiting, self.waiting = self.waiting, []
        for step in waiting:
            failed = [need for need in step.needs if need in self.failures]
            if failed:
                self.fail(step, f"needs {failed[0]}")
            elif len(self.jobs) < self.args.jobs and unfinished.isdisjoint(step.needs):
                self.start(step)
            else:
                self.waiting.append(step)

    def start(self, step: Step) -> None:
        """Start a step's command in its own process."""
        record = self.records[step.name]
        record.path.parent.mkdir(parents=True, exist_ok=True)
        if "tools.pack" in step.words:  # which refuses a folder that has a cache
            (step.path("--output_dir") / PACKED_METADATA).unlink(missing_ok=True)
        process = self.context.Process(target=execute, args=(step.words, record.log))
        process.start()
        self.jobs[process.sentinel] = Job(step, process, time.perf_counter())

    def record(self, job: Job) -> float:
        """Wait for a job to end, record its seconds and whether it succeeded; return seconds."""
        job.process.join()
        seconds = time.perf_counter() - job.started
        self.records[job.step.name].add(seconds, finished=job.process.exitcode == 0)
        return seconds

    def finish(self, job: Job) -> None:
        """Record a job that has ended, and write its result if it has one."""
        step, seconds = job.step, self.record(job)
        if job.process.exitcode:
            log = self.records[step.name].log
            self.fail(step, f"ended with status {job.process.exitcode}, see {log}")
            return
        self.done += 1
        print(f"[{self.done}/{self.total}] {step.name}: {seconds:.0f} s", flush=True)
        if step.measures:
            self.write_result(step)

    def fail(self, step: Step, reason: str) -> None:
        """Report that a step failed."""
        self.failures[step.name] = reason
        print(f"failed: {step.name} {reason}", file=sys.stderr, flush=True)

    def write_result(self, step: Step) -> None:
        """Write a measured result with its commands and device; delete the samples."""
        seed = seed_of(step)
        training = self.records.get(f"seed{seed}/{step.measures.split('/')[0]}/training")
        result = {
            "scale": self.args.scale,
            "result": step.measures,
            "seed": seed,
            "space": self.space,
            **read_json(step.path("--json")),
            "device": self.device,
            "jobs": self.args.jobs,
            "training_seconds": training and round(training.content["seconds"], 1),
            **paths_of(self.args),
            "commands": commands_of(self.steps, step),
        }
        write_json(result_path(self.args, step), result)
        images = step.path("--images")
        for folder in [*images.glob("samples*/"), *images.glob("*/real"), *images.glob("*/recon")]:
            shutil.rmtree(folder)  # the picture of some of them stays
            self.records[step.needs[0]].add(0.0, finished=False)


# --------------------------------------------------------------------------------------------------
# Command line.


def complete_args(args: argparse.Namespace, experiments: Experiments) -> None:
    """Check the arguments and set those that depend on others.

    Raises:
        UserError: an argument is invalid or missing.
    """
    check_positive(args, "jobs")
    if "all" in args.tables:
        args.tables = [*experiments.content["tables"]]
    if not args.data_path:
        needs_images = "{source}" in str(experiments.commands)
        if needs_images and not args.dry_run and "launcher" not in experiments.commands:
            raise UserError(
                f"--scale {args.scale} needs --data_path: "
                "a folder with train/<class>/<image> and val/ or test/"
            )
        args.data_path = f"data/{args.scale}"
    if not args.vae_path and "{vae_path}" in str(experiments.commands):
        if not args.dry_run:
            raise UserError(f"--scale {args.scale} needs --vae_path: a tokenizer")
        args.vae_path = "tokenizer"
    if Path.cwd() != ROOT:  # commands run in ROOT
        for name in ("data_path", "output_dir", "results", "vae_path"):
            value = getattr(args, name)
            if value and not is_address(value):
                setattr(args, name, os.path.abspath(value))
    device, problem = find_device(args.device)
    if problem and not args.dry_run:
        raise UserError(problem)
    args.device = args.device or device.type


def print_commands(steps: dict[str, Step], launcher: str | None) -> None:
    """Print the commands of all steps, scripts with ``launcher``."""
    for step in steps.values():
        if launcher is None or step.words[0] == "-m":
            print(command_line(step))
        else:
            print(shlex.join([*shlex.split(launcher), *step.words]))


def print_results(args: argparse.Namespace, experiments: Experiments) -> None:
    """Print the results of this run's seeds and the intervals predicted by committed results."""
    results = Results(args.results, args.scale, seeds=args.seeds)
    committed = Results(RESULTS, args.scale, without=args.seeds)
    for table in args.tables:
        title = experiments.content["tables"][table]["title"]
        text = comparison_table(results, committed, experiments.rows(table))
        print(f"\n{title}: values (95% prediction intervals)\n\n{text}", end="")


def main() -> None:
    """Run the command line."""
    args = get_args_parser().parse_args()
    experiments = Experiments(args.experiments, args.scale)
    complete_args(args, experiments)
    folder = f"{args.output_dir}/{args.scale}"
    steps = plan(
        experiments, args.tables, args.seeds, folder, args.data_path, args.device, args.vae_path
    )
    launcher = experiments.commands.get("launcher")
    if args.dry_run or launcher:
        print_commands(steps, launcher)
        return
    os.chdir(ROOT)
    pythonpath = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(pythonpath)
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    runner = Runner(steps, args, experiments.commands.get("space", "pixels"))
    runner.run()
    print_results(args, experiments)
    if runner.failures:
        count = f"{len(runner.failures)} of {runner.total}"
        print(f"{count} commands failed; run the same command to retry them", file=sys.stderr)
        sys.exit(FAILED_STATUS)


if __name__ == "__main__":
    run_main(main)
