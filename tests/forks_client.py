"""What ``python_of_forks`` in forks.py stands in for Python with: it has a program run by the process that forks."""

import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ask(address: str, words: list[str]) -> int:
    """Have a program run, and return its exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        for number in FORWARDED:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, _: connection.send(bytes([number])))
        asked = {"words": words, "environment": dict(os.environ), "folder": os.getcwd()}
        data = json.dumps(asked).encode()
        socket.send_fds(connection, [len(data).to_bytes(8)], [0, 1, 2])
        connection.sendall(data)
        return int.from_bytes(connection.recv(2), signed=True)


if __name__ == "__main__":
    code = ask(sys.argv[1], sys.argv[2:])
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
