"""The client app: one round at a party, with `finetune train` and `finetune clip` on its own base and rows."""

from __future__ import annotations

from logging import ERROR

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import log

from federated.commands import CommandFailed
from federated.messages import adapter_of, put_adapter
from federated.party import BadTask, Party, Task

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer with this party's update; an error leaves it as the name of a command and its exit code."""
    party = Party.from_config(context.node_config)
    task = message.content.config_records["task"]
    content, error = RecordDict(), ""
    try:
        names = ("federation", "round", "method", "seed")
        update = party.update(Task(*(task[name] for name in names), start=adapter_of(message.content)))
        put_adapter(content, update)
    except (BadTask, CommandFailed) as problem:
        error = str(problem)
        log(ERROR, "%s: %s", party.name, error)
    except OSError as problem:
        error = type(problem).__name__  # its text has paths
        log(ERROR, "%s: %s", party.name, problem)
    content["party"] = ConfigRecord({"name": party.name, "error": error})
    return Message(content, reply_to=message)
