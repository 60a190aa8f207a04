"""Scripts in processes of their own, in a tenth of a second each.

A new interpreter imports PyTorch and diffusers for seconds. These children are forked from a server that has imported
everything and computed nothing, so they start like a new interpreter: no threads, no state of Accelerate.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
if hasattr(CONTEXT, "set_forkserver_preload"):
    CONTEXT.set_forkserver_preload(
        ["conftest", "latent_dmmd.experiments.stages", "latent_dmmd.editing", "latent_dmmd.experiments.diagnosis"]
    )


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_here(source, arguments, environment, folder, stdout, stderr):
    """The body of a child: a script's file, or Python source."""
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if "OMP_NUM_THREADS" in environment:  # read when the server started
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = [str(source) if isinstance(source, Path) else "-c", *arguments]
    sys.path.insert(0, str(source.parent) if isinstance(source, Path) else str(ROOT / "tests"))
    if isinstance(source, Path):
        runpy.run_path(str(source), run_name="__main__")
    else:
        exec(compile(source, "-c", "exec"), {"__name__": "__main__"})


class Child:
    """A running script: `Path` to one, or Python source. Keywords are added to its environment."""

    def __init__(self, source, *arguments, folder=".", **environment):
        self.files = [tempfile.mktemp() for _ in range(2)]
        environment = {**os.environ, **{name: str(value) for name, value in environment.items()}}
        how = (source, [str(a) for a in arguments], environment, str(folder), *self.files)
        self.process = CONTEXT.Process(target=run_here, args=how)
        self.process.start()

    def running(self):
        return self.process.is_alive()

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def wait(self, timeout=120):
        """Its exit code, negative for a signal, and what it printed. A hang is a failure."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.send_signal(signal.SIGKILL)
            self.process.join()
        texts = [Path(f).read_text() if Path(f).exists() else "" for f in self.files]
        for f in self.files:
            Path(f).unlink(missing_ok=True)
        return Result(self.process.exitcode, *texts)


def run(source, *arguments, **options):
    """A script to its end."""
    return Child(source, *arguments, **options).wait()


def ranks(source, *arguments, count=2, **environment):
    """The children of a distributed run on this machine's CPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
    common |= dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS=1) | environment
    return [Child(source, *arguments, RANK=rank, LOCAL_RANK=rank, **common) for rank in range(count)]


def wait_until(condition, timeout=60):
    """Poll a condition; a test that waits for ever fails here."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
