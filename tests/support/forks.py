"""Processes that need torch and transformers, without importing them in each: one server imports them, and forks for every job.

The import takes seconds of CPU time, which most tests of several processes spent more on than on what they test. The server runs
no code of torch itself, so it has no threads that a fork would lose.

What a job has made lives until the process ends without destructors. Otherwise the destructor of `DistributedDataParallel` can
hang: it joins a thread of gloo and holds the interpreter's lock, for which that thread waits (torch 2.13).
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from handshake import Child

_SERVER = """
import json, os, sys, traceback
import accelerate, datasets, torch, transformers
import sparsort.curriculum.loading.trainer.trainer, sparsort.recipes.cli.app
import sparsort.recipes.train.train, sparsort.scoring.loading.load

def run(job):
    code = 1
    names = {"__name__": "__main__"}
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, name in ((1, "out"), (2, "err")):
            file = os.open(f"{job['log']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, descriptor)
        os.environ.update(job["env"])
        sys.argv[1:] = job["arguments"]
        try:
            exec(compile(job["code"], "<job>", "exec"), names)
            code = 0
        except SystemExit as end:
            code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

for line in sys.stdin:
    pids = []
    for job in json.loads(line):
        if (pid := os.fork()) == 0:
            run(job)
        pids.append(pid)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""


class ForkServer(Child):
    """Runs programs in forks of a process that has imported torch, transformers, sparsort and `modules`."""

    def __init__(self, *modules: str) -> None:
        super().__init__("".join(f"import {module}\n" for module in modules) + _SERVER)

    def run(self, log: Path, *jobs: tuple[str, list[Any], dict[str, str]]) -> list[int]:
        """Run jobs at once, each of its source code, arguments and environment; their exit codes, -9 for a kill.

        What job n prints is in the files `log` with the endings `-n.out` and `-n.err`.
        """
        rows = [
            {"code": code, "arguments": [*map(str, arguments)], "env": env, "log": f"{log}-{number}"}
            for number, (code, arguments, env) in enumerate(jobs)
        ]
        assert self.stdin is not None
        self.stdin.write(json.dumps(rows) + "\n")
        self.stdin.flush()
        codes: list[int] = json.loads(self.line())
        return codes

    def run_ranks(self, log: Path, code: str, *arguments: object, world_size: int = 2) -> list[int]:
        """Run the ranks of one distributed program, under the variables that torchrun sets and on one thread each."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
        return self.run(log, *((f"{_ONE_THREAD}{code}", list(arguments), rank) for rank in ranks))


_ONE_THREAD = "import torch; torch.set_num_threads(1)\n"
