"""Starts emulated engines as processes of their own, in milliseconds: it has imported everything and forks.

`python -m tests.chaos.nursery` reads one JSON list of emulator arguments a line and answers with the process
id. When its standard input ends, however its parent died, it kills all that it started.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from hexgen2.emulator import __main__ as emulator


def main() -> None:
    born: list[int] = []
    for line in sys.stdin:
        arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(2, 1)
            os._exit(emulator.main(arguments))
        born.append(pid)
        print(pid, flush=True)
    for pid in born:  # none was waited for, so no number has been given to another process
        os.kill(pid, signal.SIGKILL)
    for pid in born:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
