"""A process that runs one engine and leaves nothing of it behind.

    python -I -S guard.py GRACE_SECONDS -- COMMAND...

vLLM is a tree of processes, and a tree does not fall with its trunk: an engine core whose API server was
killed may live on and hold its GPU. So the launcher starts this guard, and the guard starts the engine.

- It is a child subreaper (prctl PR_SET_CHILD_SUBREAPER): whatever the engine starts, in whatever session, is
  the guard's descendant for ever, so it can be found and killed.
- Its standard input is a pipe from the launcher. When the launcher dies, however it dies, the kernel closes
  the pipe, and the guard ends the engine. SIGTERM and SIGINT do the same.
- The engine's first process is killed by the kernel when the guard itself is killed (PR_SET_PDEATHSIG). By
  itself that reaches no further down; in vLLM our plugin binds each process to its parent in the same way, so
  that the rest follows. For other commands `kill -9` on the guard is the one way to leave orphans.

Ending the engine: SIGTERM to its first process, GRACE_SECONDS for that one to leave, SIGKILL for all that is
left. When the engine ends by itself, what it left is killed too. The exit code is the engine's, 128 + n for
signal n.

Linux only. Run by its path, outside any package, it needs the standard library alone and some 10 MB.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from contextlib import suppress

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LAST_WORDS_S = 5.0
"""How long SIGKILLed processes may take to vanish (one in uninterruptible sleep takes its time)."""


def descendants(root: int) -> list[int]:
    """The process ids below ``root``, parents first; zombies left out."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file:
                # The command is in parentheses and may hold any character: split after the last one.
                state, parent = file.read().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(entry))
    found, queue = [], list(children.get(root, ()))
    while queue:
        pid = queue.pop(0)
        found.append(pid)
        queue += children.get(pid, ())
    return found


def kill_tree(root: int, timeout_s: float = LAST_WORDS_S) -> list[int]:
    """SIGKILL everything below ``root`` until nothing is left; what is left after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while (alive := descendants(root)) and time.monotonic() < deadline:
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return alive


def main(arguments: list[str]) -> int:
    """Run the command until it ends or has to end; its exit code."""
    grace_s, command = float(arguments[0]), arguments[2:]
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wake_read, wake_write = os.pipe()
    for end in (wake_read, wake_write):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake_write)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)  # the wake-up pipe carries the news
    me = os.getpid()

    def in_child() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != me:  # the guard died before the line above
            os._exit(1)

    try:
        engine = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=in_child
        )
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    deadline: float | None = None
    ending = False
    while engine.pid not in (exits := _reap()):
        for key, _ in selector.select(None if deadline is None else max(0.0, deadline - time.monotonic())):
            if key.fd == wake_read:
                numbers = os.read(wake_read, 64)
                ending |= signal.SIGTERM in numbers or signal.SIGINT in numbers
            elif not os.read(key.fd, 64):
                selector.unregister(key.fd)
                ending = True
        if ending and deadline is None:
            deadline = time.monotonic() + grace_s
            with suppress(ProcessLookupError):
                os.kill(engine.pid, signal.SIGTERM)
        if deadline is not None and time.monotonic() >= deadline:
            exits = _reap()  # it may have left in time while this process was held up
            break
    left = kill_tree(me)
    if left:
        print(f"guard: processes {left} did not die", file=sys.stderr)
    _reap_all(LAST_WORDS_S)
    status = exits.get(engine.pid)
    return 128 + signal.SIGKILL if status is None else status


def _reap() -> dict[int, int]:
    """Collect the children that have ended: their exit codes by process id."""
    exits: dict[int, int] = {}
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(ended[1])
            exits[ended[0]] = code if code >= 0 else 128 - code
    return exits


def _reap_all(timeout_s: float) -> None:
    """Wait until all that was killed has given back its ports and its memory.

    A process looks dead (a zombie) as soon as its first thread is gone, while the others still take down its
    memory and hold its sockets, an engine core even the port that it inherited. It can be reaped only when
    they are gone too.
    """
    deadline = time.monotonic() + timeout_s
    with suppress(ChildProcessError):  # none is left
        while time.monotonic() < deadline:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(0.005)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
