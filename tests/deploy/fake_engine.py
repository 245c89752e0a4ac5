"""A small stand-in for an engine's processes: `fake_engine.py PORT BEHAVIOUR PIDFILE`.

Every behaviour writes the ids of all its processes to PIDFILE, one a line. What serves ends with a segmentation
fault when it is asked for /crash.
"""

from __future__ import annotations

import http.server
import os
import signal
import sys
import time


def note(path: str) -> None:
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")


def fork_sleeper(path: str, own_session: bool, stubborn: bool, depth: int = 1) -> None:
    """A child, and children of it, that sleep for ever; ``stubborn`` ones do not heed SIGTERM."""
    if os.fork():
        return
    if own_session:
        os.setsid()
    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if depth > 1:
        fork_sleeper(path, own_session, stubborn, depth - 1)
    note(path)
    time.sleep(3600)


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    port, behaviour, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    note(path)
    print("starting", flush=True)
    if behaviour == "dies":
        print("(EngineCore pid=1) ERROR 11-22 09:00:00 [x.py:1] ValueError: no such model", flush=True)
        sys.exit(3)
    if behaviour == "family":
        fork_sleeper(path, own_session=True, stubborn=False, depth=2)
    if behaviour == "stubborn":
        fork_sleeper(path, own_session=True, stubborn=True, depth=3)
        fork_sleeper(path, own_session=False, stubborn=True)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if behaviour == "silent":
        time.sleep(3600)
    if behaviour == "slow":
        time.sleep(1.0)
    if behaviour == "orphaning":
        fork_sleeper(path, own_session=True, stubborn=True)
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Health).serve_forever()


if __name__ == "__main__":
    main()
