"""Start runs from a process that has imported everything: many short runs on a CPU take seconds less each.

    python -m benchmarks.warm serve SOCKET          # forks a process per run
    python -m benchmarks.warm run SOCKET word …     # `finetune train word …` there; its output is this one's

`sweep.launch='python -m benchmarks.warm run SOCKET'` starts the runs of a sweep so.
"""

from __future__ import annotations

import json
import os
import socket
import sys

_LONGEST_REQUEST = 1 << 20


def serve(path: str) -> None:
    """Answer each connection with the exit code of its run, one run at a time."""
    from finetune.cli import main
    from finetune.training import recipe  # noqa: F401 - what every run imports

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        while True:
            connection, _ = server.accept()
            with connection:
                request, outputs, *_ = socket.recv_fds(connection, _LONGEST_REQUEST, 2)
                child = os.fork()
                if child == 0:
                    os.dup2(outputs[0], 1)
                    os.dup2(outputs[1], 2)
                    os._exit(main(["train", *json.loads(request)]))
                for each in outputs:
                    os.close(each)
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                connection.sendall(bytes([code % 256]))


def run(path: str, words: list[str]) -> int:
    """Run `finetune train` with these words in the serving process, and return its exit code."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        socket.send_fds(client, [json.dumps(words).encode()], [1, 2])
        return client.recv(1)[0]


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(run(sys.argv[2], sys.argv[3:]))
