"""The Slurm scripts, under a Slurm of the test's own: one node, this machine."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import ROOT, load, same
from tests.scripts.conftest import BASE, QUICK, pictures

SCRIPTS = {path.stem: path.read_text() for path in (ROOT / "tools/slurm").glob("*.slurm")}
#: Numbers of jobs, which ports follow from, are others than those of a Slurm beside it.
CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
FirstJobId={ports[1]}
SlurmUser=root
AuthInfo=socket={folder}/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
NodeName=localhost NodeAddr=127.0.0.1 CPUs=6
PartitionName=all Nodes=ALL Default=YES
"""


def wait_until(true: Callable[[], bool], seconds: float = 300) -> None:
    """Looks ten times a second."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def processes(file: str, *words: str) -> list[int]:
    """Numbers of the processes whose ``cmdline`` or ``environ`` in /proc holds the words."""
    found = []
    for path in Path("/proc").glob(f"[0-9]*/{file}"):
        with suppress(OSError):  # it may have ended meanwhile
            text = path.read_bytes().decode(errors="replace")
            if all(word in text for word in words):
                found.append(int(path.parent.name))
    return found


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Slurm:
    """Slurm's daemons and commands; all that they write lies in ``folder``."""

    def __init__(self, folder: Path):
        self.folder, self.config, self.daemons = folder, folder / "slurm.conf", []
        self.config.write_text(CONFIG.format(folder=folder, ports=free_ports(2)))
        for name in ("state", "spool"):
            (folder / name).mkdir()
        (folder / "key").touch(0o600)
        (folder / "key").write_bytes(os.urandom(1024))
        path = f"{Path(sys.executable).parent}:/usr/sbin:{os.environ['PATH']}"
        # The configuration's place is in the environment of every process that comes from here.
        self.environment = {**os.environ, "PATH": path, "SLURM_CONF": str(self.config)}

    def start(self) -> None:
        """Returns when the node takes jobs."""
        # Forced: pytest's folders are closed to other users, which munged takes for a mistake.
        munged = "munged --foreground --force --socket=socket --key-file=key --pid-file=pid --log-file=log --seed-file=seed"
        for command in (
            munged.replace("=", f"={self.folder}/"),
            "slurmctld -D",
            "slurmd -D -N localhost",
        ):
            with open(self.folder / f"{command.split()[0]}.out", "w") as out:
                self.daemons.append(
                    subprocess.Popen(command.split(), env=self.environment, stdout=out, stderr=out)
                )
        wait_until(lambda: "idle" in self("sinfo", check=False))

    def stop(self) -> None:
        """Kills the daemons, and the jobs with all their processes."""
        while pids := processes("environ", f"SLURM_CONF={self.config}"):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        for daemon in self.daemons:
            daemon.wait()

    def __call__(self, command: str, check: bool = True) -> str:
        """What a command prints."""
        done = subprocess.run(
            command.split(), cwd=ROOT, env=self.environment, capture_output=True, text=True
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, name: str, command: str) -> str:
        """Submits ``tools/slurm/<name>.slurm`` with another command, for two processes on CPUs; the job's number."""
        text, count = re.subn(
            r"^main_tokenbridge.py (.*\\\n)*.*?(?= &$|$)",
            command,
            SCRIPTS[name],
            flags=re.MULTILINE,
        )
        assert count == 1
        script = self.folder / f"{name}.slurm"
        script.write_text(text)
        options = f"--nodes=1 --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1 --output={self.folder}/%j.log"
        return self(f"sbatch --parsable {options} {script}").strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, ExitCode, Restarts."""
        return dict(re.findall(r"(\w+)=(\S+)", self(f"scontrol show job {number}")))

    def ended(self, number: str) -> dict[str, str]:
        """Waits for a job's end."""
        wait_until(
            lambda: self.job(number)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        )
        return self.job(number)

    def log(self, number: str) -> str:
        """What a job has printed."""
        return (self.folder / f"{number}.log").read_text()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    """One node with six processors."""
    missing = [
        name
        for name in ("munged", "slurmctld", "slurmd")
        if not shutil.which(name, path="/usr/sbin:/usr/bin")
    ]
    if missing or os.geteuid() != 0:
        pytest.skip(
            f"NOT TESTED: Slurm needs root, and of Debian's slurm-wlm and munge: {missing or 'all is there'}"
        )
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


@pytest.fixture
def training(cached) -> str:
    """A command, up to the folder it writes to."""
    return f"main_tokenbridge.py {BASE} --batch_size 2 --use_cached --cached_path {cached} --save_every_steps 4"


def ranks(folder: Path) -> list[int]:
    """The process numbers of a run, without those of srun."""
    return processes("cmdline", "python\0main_tokenbridge.py", f"{folder}\0")


@pytest.mark.slow
def test_a_preempted_run_ends_as_an_unbroken_one_and_is_evaluated(
    slurm, training, vae_path, tmp_path
):
    checkpoint = tmp_path / "cut" / "checkpoint-last.pth"
    command = f"{training} --epochs 40 --output_dir {tmp_path}"
    whole = slurm.submit("train", f"{command}/whole")  # beside the other one, on the same node
    cut = slurm.submit("train", f"{command}/cut --resume {tmp_path}/cut")
    wait_until(checkpoint.exists)
    slurm(f"scontrol requeue {cut}")
    wait_until(lambda: slurm.log(cut).count("resumed from") == 1)
    written = checkpoint.stat().st_mtime_ns
    wait_until(lambda: checkpoint.stat().st_mtime_ns > written)  # it listens to signals

    # Held until Slurm sees, within half a minute, that only five minutes are left: it lets them go on with its signal.
    held = ranks(tmp_path / "cut")
    assert len(held) == 2
    for pid in held:
        os.kill(pid, signal.SIGSTOP)
    slurm(f"scontrol update JobId={cut} TimeLimit=5")
    wait_until(lambda: slurm.job(cut)["Restarts"] == "2")
    slurm(f"scontrol update JobId={cut} TimeLimit=60")
    ends = [slurm.ended(job) for job in (cut, whole)]
    assert [(end["JobState"], end["Restarts"]) for end in ends] == [
        ("COMPLETED", "2"),
        ("COMPLETED", "0"),
    ]
    log = slurm.log(cut)
    assert (log.count("starting a new run"), log.count("resumed from")) == (
        1,
        2,
    ) and "by SIGUSR1, saved at" in log
    contents = [load(tmp_path / name) for name in ("whole", "cut")]
    assert contents[0]["epoch"] == 39
    for name in ("model", "model_ema", "optimizer"):
        assert same(*(content[name] for content in contents)), name

    flags = f"--vae_path {vae_path} --num_images 40 --num_iter 2 --eval_bsz 2 --no_metrics --output_dir {tmp_path}/samples"
    sampled = tmp_path / "samples" / "samples"
    job = slurm.submit(
        "eval", f"main_tokenbridge.py --evaluate {QUICK} --resume {tmp_path}/cut {flags}"
    )
    wait_until(lambda: any(sampled.glob("*.png")))
    slurm(f"scancel --batch --signal=USR1 {job}")  # as Slurm does before the time is up
    end = slurm.ended(job)
    assert (end["JobState"], end["Restarts"], len(pictures(sampled))) == ("COMPLETED", "1", 40)


FAILING = """
import os, sys, time
count = len(os.listdir(sys.argv[1]))
if os.environ["RANK"] == "1":
    time.sleep(2)  # the other one has counted
    sys.exit(0)
open(f"{sys.argv[1]}/{count}", "w").close()
os.abort() if count < int(sys.argv[2]) else sys.exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("failures, state, restarts", [(2, "COMPLETED", "2"), (9, "FAILED", "2")])
@pytest.mark.parametrize("name", ["train", "eval"])
def test_a_crash_is_tried_again_but_not_for_ever(slurm, tmp_path, name, failures, state, restarts):
    (tmp_path / "failing.py").write_text(FAILING)
    (tmp_path / "counted").mkdir()
    job = slurm.submit(name, f"{tmp_path}/failing.py {tmp_path}/counted {failures}")
    end = slurm.ended(job)
    assert (end["JobState"], end["Restarts"]) == (state, restarts)
    assert slurm.log(job).count("status 134 after") == (2 if state == "COMPLETED" else 3)
    assert not list(ROOT.glob(".slurm-failures-*"))


@pytest.mark.slow
def test_errors_fail_and_cancelled_jobs_stay_cancelled(slurm, training, tmp_path):
    wrong = slurm.submit("train", f"{training} --epochs 0 --output_dir {tmp_path}/wrong")
    long = slurm.submit(
        "train", f"{training} --epochs 100000 --output_dir {tmp_path}/long --resume {tmp_path}/long"
    )
    end = slurm.ended(wrong)
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "0", "2:0")
    assert "error: --epochs" in slurm.log(wrong)
    wait_until((tmp_path / "long" / "checkpoint-last.pth").exists)
    slurm(f"scancel {long}")
    wait_until(
        lambda: "stopped: by SIGTERM, saved" in slurm.log(long) and not ranks(tmp_path / "long")
    )
    end = slurm.ended(long)
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0")
