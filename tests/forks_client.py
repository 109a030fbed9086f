"""What ``python_of_forks`` in forks.py stands in for Python with: it has a program run by the process that forks."""

import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def inherited() -> list[int]:
    """Return what this process was given open: stdin, stdout, stderr, and pipes of multiprocessing."""
    found = []
    for number in map(int, os.listdir("/dev/fd")):
        try:
            os.fstat(number)
        except OSError:  # the listing itself
            continue
        found.append(number)
    return sorted(found)


def ask(address: str, words: list[str]) -> int:
    """Have a program run, and return its exit code."""
    numbers = inherited()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        for number in FORWARDED:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, _: connection.send(bytes([number])))
        asked = {"words": words, "environment": dict(os.environ), "folder": os.getcwd(), "numbers": numbers}
        data = json.dumps(asked).encode()
        socket.send_fds(connection, [len(data).to_bytes(8)], numbers)
        connection.sendall(data)
        return int.from_bytes(connection.recv(2), signed=True)


if __name__ == "__main__":
    code = ask(sys.argv[1], sys.argv[2:])
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
