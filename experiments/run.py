"""Runs the experiments of ``tables.yaml``: trains, samples and measures every row that has no result yet."""

import argparse
import multiprocessing
import os
import re
import runpy
import shlex
import signal
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.plan import DEFAULT, Experiments, Step, needed, plan
from experiments.results import RESULTS, Results, beside
from util.args import add_device_arg, check_positive, new_parser
from util.data.caches import PACKED_METADATA
from util.devices import find_device
from util.errors import UserError
from util.errors import run as run_main
from util.files import read_json, write_json
from util.metrics.sample_folder import SampleFolder

ROOT = Path(__file__).resolve().parents[1]
#: Imported once: commands are forked from a process that has them.
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
    """The command line of this script."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "tables", nargs="+", metavar="TABLE", help="table1a ... figure8, or all of them"
    )
    text = "digits, cifar10, or imagenet, whose commands are only printed"
    parser.add_argument("--scale", default="digits", help=text)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="a replicate each, from its tokenizer on"
    )
    parser.add_argument(
        "--data_path",
        default="",
        help="images of cifar10 and imagenet: train/<class>/<image>, val/",
    )
    parser.add_argument(
        "--output_dir", default="output/experiments", help="checkpoints, caches, samples, logs"
    )
    parser.add_argument(
        "--results", default=str(RESULTS), help="folder of the results, a JSON a row and seed"
    )
    parser.add_argument("--experiments", default=str(DEFAULT), help="YAML of the experiments")
    parser.add_argument("--jobs", type=int, default=1, help="commands at a time")
    add_device_arg(parser)
    parser.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")
    return parser


def shown(step: Step) -> str:
    """The step's command line, as one would type it."""
    return shlex.join(["python", *step.words])


# --------------------------------------------------------------------------------------------------------------------
# One command.


def end_with_runner() -> None:
    """Waits for the end of the process that runs everything, and asks this one, its child, to stop: it may save."""
    runner = multiprocessing.parent_process()
    assert runner is not None
    runner.join()
    os.kill(os.getpid(), signal.SIGTERM)


def execute(words: list[str], log: Path) -> None:
    """Runs ``python words`` in this process, forked for it; what it prints is added to ``log``."""
    threading.Thread(target=end_with_runner, daemon=True).start()
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
    """What is known of a step, in a file: the seconds that it took, whether it has finished.

    It starts anew where the command, or one that leads to it, has changed.

    Args:
        path: the file.
        commands: see :func:`commands_of`.
    """

    def __init__(self, path: Path, commands: list[str]):
        self.path, self.log = path, path.with_suffix(".log")
        self.content: dict[str, Any] = {"commands": commands, "seconds": 0.0, "finished": False}
        with suppress(UserError):
            before = read_json(path)
            if before["commands"] == commands:
                self.content = before

    def add(self, seconds: float, finished: bool) -> None:
        """Adds a part of the command's run."""
        self.content["seconds"] += seconds
        self.content["finished"] = finished
        write_json(self.path, self.content)


# --------------------------------------------------------------------------------------------------------------------
# All of them.


class Runner:
    """Runs steps, several at a time, each once those that it needs have finished.

    Args:
        steps: by name, in the order in which they start where there is a choice; those that lead to results which are
            there are left out.
        args: the command line.
    """

    def __init__(self, steps: dict[str, Step], args: argparse.Namespace):
        self.steps, self.args, self.folder = steps, args, Path(args.output_dir) / args.scale
        self.records = {
            name: Record(
                self.folder / "steps" / f"{name.replace('/', '-')}.json", commands_of(steps, step)
            )
            for name, step in steps.items()
        }
        self.failed: dict[str, str] = {}  # why, by name
        self.running: dict[Any, tuple[Step, Any, float]] = {}  # by sentinel
        self.device = device_name(args.device)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)

    def run(self) -> None:
        """Runs all steps that have not finished; Ctrl-C and SIGTERM stop those that run, which save."""
        for step in missing(self.steps, self.args).values():
            if step.measures and self.finished(
                step
            ):  # for other --results, or in a run that was stopped just then
                self.write_result(step)
        waiting = [
            step for step in missing(self.steps, self.args).values() if not self.finished(step)
        ]
        self.total, self.done = len(waiting), 0
        # A shell starts background jobs with SIGINT ignored; commands hear it all the same.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        try:
            while waiting or self.running:
                waiting = self.start_some(waiting)
                for sentinel in wait([*self.running]) if self.running else ():
                    self.end(sentinel)
        except KeyboardInterrupt:
            for _, process, _ in self.running.values():
                process.terminate()
            for step, process, started in self.running.values():
                process.join()
                self.records[step.name].add(
                    time.perf_counter() - started, finished=process.exitcode == 0
                )
            raise

    def finished(self, step: Step) -> bool:
        """Whether a step's command has finished, in this run or before."""
        return self.records[step.name].content["finished"]

    def start_some(self, waiting: list[Step]) -> list[Step]:
        """Starts what can start; returns what still waits."""
        unfinished = {step.name for step in waiting} | {
            step.name for step, _, _ in self.running.values()
        }
        left = []
        for step in waiting:
            if lost := [need for need in step.needs if need in self.failed]:
                self.fail(step, f"needs {lost[0]}")
            elif len(self.running) < self.args.jobs and unfinished.isdisjoint(step.needs):
                self.start(step)
            else:
                left.append(step)
        return left

    def start(self, step: Step) -> None:
        """Starts a step's command in a process of its own."""
        record = self.records[step.name]
        record.path.parent.mkdir(parents=True, exist_ok=True)
        if "tools.pack" in step.words:  # which refuses a folder that holds a cache
            (step.path("--output_dir") / PACKED_METADATA).unlink(missing_ok=True)
        process = self.context.Process(target=execute, args=(step.words, record.log))
        process.start()
        self.running[process.sentinel] = step, process, time.perf_counter()

    def end(self, sentinel: Any) -> None:
        """Notes that a step's process has ended, and writes the result if it has measured one."""
        step, process, started = self.running.pop(sentinel)
        process.join()
        record, seconds = self.records[step.name], time.perf_counter() - started
        record.add(seconds, finished=process.exitcode == 0)
        if process.exitcode:
            self.fail(step, f"ended with status {process.exitcode}, see {record.log}")
            return
        self.done += 1
        print(f"[{self.done}/{self.total}] {step.name}: {seconds:.0f} s", flush=True)
        if step.measures:
            self.write_result(step)

    def fail(self, step: Step, why: str) -> None:
        """Notes that a step failed."""
        self.failed[step.name] = why
        print(f"failed: {step.name} {why}", file=sys.stderr, flush=True)

    def write_result(self, step: Step) -> None:
        """Writes what a step has measured, and how it came about, to the results; removes its images."""
        figures = read_json(step.path("--json"))
        seed = seed_of(step)
        training = self.records.get(f"seed{seed}/{step.measures.split('/')[0]}/training")
        result = {
            "scale": self.args.scale,
            "result": step.measures,
            "seed": seed,
            **figures,
            "device": self.device,
            "jobs": self.args.jobs,
            "training_seconds": training and round(training.content["seconds"], 1),
            "output_dir": self.args.output_dir,
            "data_path": self.args.data_path,
            "commands": commands_of(self.steps, step),
        }
        write_json(result_path(self.args, step.measures, seed), result)
        for folder in step.path("--images").glob("samples*/"):
            SampleFolder(folder).remove_images()  # a grid of some stays beside it
            self.records[step.needs[0]].add(0.0, finished=False)


def device_name(device: str) -> str:
    """The name of the device that commands compute on, and of the CPU's cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        f"CPU, {torch.backends.cpu.get_cpu_capability()}, {os.environ['OMP_NUM_THREADS']} threads"
    )


def result_path(args: argparse.Namespace, result: str, seed: int) -> Path:
    """The file of a result of one seed."""
    return Path(args.results) / args.scale / f"{result.replace('/', '-')}-seed{seed}.json"


def seed_of(step: Step) -> int:
    """The seed of a step that has one."""
    return int(step.name.split("/")[0].removeprefix("seed"))


def commands_of(steps: dict[str, Step], step: Step) -> list[str]:
    """The command lines that lead to a step, in the order in which they run."""
    names = needed(steps, [step.name])
    return [shown(each) for name, each in steps.items() if name in names]


def comparable(commands: list[str], folder: str, source: str) -> list[str]:
    """Command lines without what does not matter for their results: folder, source of the images, and device."""
    lines = [re.sub(r" --device \S+", "", line) for line in commands]
    lines = [re.sub(rf"(?<= ){re.escape(folder)}/", "FOLDER/", line) for line in lines]
    return [line.replace(f"--source {source} ", "--source SOURCE ") for line in lines]


def is_there(steps: dict[str, Step], step: Step, args: argparse.Namespace) -> bool:
    """Whether there is a result of ``step``, made by the same commands."""
    path = result_path(args, step.measures, seed_of(step))
    if not path.exists():
        return False
    before, commands = read_json(path), commands_of(steps, step)
    made = comparable(before["commands"], before["output_dir"], before["data_path"])
    return made == comparable(commands, args.output_dir, args.data_path)


def missing(steps: dict[str, Step], args: argparse.Namespace) -> dict[str, Step]:
    """The steps that lead to results which are not there."""
    targets = [
        step.name for step in steps.values() if step.measures and not is_there(steps, step, args)
    ]
    names = needed(steps, targets)
    return {name: step for name, step in steps.items() if name in names}


def fill_in(args: argparse.Namespace, experiments: Experiments) -> None:
    """Fills in what flags leave open; UserError for values that cannot work."""
    check_positive(args, "jobs")
    if "all" in args.tables:
        args.tables = [*experiments.content["tables"]]
    if not args.data_path:
        if (
            "{source}" in str(experiments.commands)
            and not args.dry_run
            and "prints" not in experiments.commands
        ):
            wanted = "a folder of train/<class>/<image>, and val/ or test/ likewise"
            raise UserError(f"--scale {args.scale} needs --data_path, {wanted}")
        args.data_path = f"data/{args.scale}"
    if Path.cwd() != ROOT:  # where commands run
        for name in ("data_path", "output_dir", "results"):
            setattr(args, name, os.path.abspath(getattr(args, name)))
    device, problem = find_device(args.device)
    if problem and not args.dry_run:
        raise UserError(problem)
    args.device = args.device or device.type


def print_results(args: argparse.Namespace, experiments: Experiments) -> None:
    """Prints what this run's seeds have, beside the intervals in which the committed results expect them."""
    ours = Results(args.results, args.scale, seeds=args.seeds)
    others = Results(RESULTS, args.scale, without=args.seeds)
    for table in args.tables:
        title = experiments.content["tables"][table]["title"]
        print(
            f"\n{title}: values (95% prediction intervals)\n\n{beside(ours, others, experiments.rows(table))}",
            end="",
        )


def main() -> None:
    """Runs the command line."""
    args = get_args_parser().parse_args()
    experiments = Experiments(args.experiments, args.scale)
    fill_in(args, experiments)
    folder = f"{args.output_dir}/{args.scale}"
    steps = plan(experiments, args.tables, args.seeds, folder, args.data_path, args.device)
    launcher = experiments.commands.get("prints")
    if args.dry_run or launcher:
        for step in steps.values():
            alone = launcher is None or step.words[0] == "-m"
            print(shown(step) if alone else shlex.join([*shlex.split(launcher), *step.words]))
        return
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    runner = Runner(steps, args)
    runner.run()
    print_results(args, experiments)
    if runner.failed:
        count = f"{len(runner.failed)} of {runner.total}"
        print(f"{count} commands failed; the same command tries them again", file=sys.stderr)
        sys.exit(FAILED_STATUS)


if __name__ == "__main__":
    run_main(main)
