"""usage: finetune watch RUN [port=8765] [every=10]

Serves the report of a run at http://127.0.0.1:PORT, drawn anew while the run goes on, until Ctrl+C. Only programs of
this machine reach it; from another machine use a tunnel: ssh -L 8765:127.0.0.1:8765 HOST.

Example
  finetune watch outputs/quickstart
"""

from __future__ import annotations

from contextlib import suppress

from finetune.commands.base import Command
from finetune.commands.report import run_folders
from finetune.system.arguments import Arguments
from finetune.system.console import log
from finetune.system.errors import InputError, os_errors_as


def run(arguments: Arguments) -> int:
    """Serve the page until Ctrl+C."""
    from finetune.report.live import build_server

    folders, options = run_folders(arguments), arguments.options
    if len(folders) != 1:
        found = ", ".join(map(str, folders)) or "none"
        raise InputError(f"finetune watch: expected the folder of one run, found {found}")
    with os_errors_as(InputError, f"port={options.port}: cannot be used; name another, as port=8766"):
        server = build_server(folders[0], options.port, options.every)
    log(f"watching: {folders[0]} at http://127.0.0.1:{server.server_address[1]} (Ctrl+C ends it)")
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


COMMAND = Command("watch", __doc__, run, options="WatchOptions", takes_paths=True)
