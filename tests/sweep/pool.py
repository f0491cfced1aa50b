"""Processes that judge, one model type at a time; one that hangs or dies becomes a row and is started again."""

from __future__ import annotations

import multiprocessing.connection
import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any

from .load import FORK

SECONDS = 100  # for one edit of one type


def work(pipe: Any) -> None:
    """Judge what the pipe asks for. The process without the plugin is forked before hf_compress is imported."""
    import warnings

    os.setsid()  # so that it can be killed with the processes that it starts
    warnings.filterwarnings("ignore")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    import torch
    import transformers

    from .load import Loader

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    assert "hf_compress" not in sys.modules
    plain = Loader(runs=False)

    from .judge import judge_type

    loader = Loader(runs=True)
    try:
        while True:
            job = pipe.recv()
            if job is None:
                return
            for row in judge_type(job[0], job[1], loader, plain):
                pipe.send(row)
            pipe.send(None)
    finally:
        loader.close()
        plain.close()


class Worker:
    def __init__(self) -> None:
        self.pipe, other = FORK.Pipe()
        self.process = FORK.Process(target=work, args=(other,), daemon=False)
        self.process.start()
        self.job: tuple[str, list[str]] | None = None
        self.since = 0.0

    def give(self, job: tuple[str, list[str]]) -> None:
        self.job, self.since = (job[0], list(job[1])), time.monotonic()
        self.pipe.send(job)

    def end(self, hard: bool) -> None:
        if not hard and self.process.is_alive():
            self.pipe.send(None)
            self.process.join(20)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        self.process.join(20)


def sweep(jobs: list[tuple[str, list[str]]], processes: int, report: Any) -> None:
    workers: list[Worker] = [Worker() for _ in range(min(processes, len(jobs)))]
    jobs = list(jobs)
    for worker in workers:
        worker.give(jobs.pop(0))
    try:
        _serve(workers, jobs, report)
    except BaseException:
        for worker in workers:
            worker.end(hard=True)
        raise
    for worker in workers:
        worker.end(hard=False)


def _serve(workers: list[Worker], jobs: list[tuple[str, list[str]]], report: Any) -> None:
    while any(w.job for w in workers):
        ready = multiprocessing.connection.wait([w.pipe for w in workers if w.job], timeout=5)
        for i, worker in enumerate(workers):
            if not worker.job:
                continue
            row: Any = ...
            if worker.pipe in ready:
                try:
                    row = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    row = "the process died"
            elif time.monotonic() - worker.since > SECONDS:
                row = f"not done after {SECONDS} s"
            if row is ...:
                continue
            if isinstance(row, dict):
                report(row)
                worker.job[1].remove(row["edit"])
                worker.since = time.monotonic()
                continue
            if isinstance(row, str):
                kind, edits = worker.job
                report(
                    {
                        "type": kind,
                        "edit": edits[0],
                        "verdict": f"wrong: {row}",
                        "seconds": round(time.monotonic() - worker.since, 1),
                    }
                )
                worker.end(hard=True)
                worker = workers[i] = Worker()
                if edits[1:]:
                    worker.give((kind, edits[1:]))
                    continue
            worker.job = None
            if jobs:
                worker.give(jobs.pop(0))
