"""The server app: asks the parties for updates, round after round, and averages them with `finetune aggregate`."""

from __future__ import annotations

from collections.abc import Mapping
from logging import INFO

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common import log
from flwr.serverapp import Grid, ServerApp

from federated.messages import adapter_of, put_adapter
from federated.party import Task
from federated.rounds import Answer, Federation, Settings

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds of a federation."""
    settings = Settings.from_config(context.run_config)
    timeout = float(context.run_config["timeout-seconds"])

    def exchange(tasks: Mapping[int, Task]) -> dict[int, Answer]:
        messages = [_message(node, task) for node, task in tasks.items()]
        replies = grid.send_and_receive(messages, timeout=timeout)
        return {reply.metadata.src_node_id: _answer(reply) for reply in replies}

    Federation(settings, lambda: list(grid.get_node_ids()), exchange, lambda text: log(INFO, text)).run()


def _message(node: int, task: Task) -> Message:
    content = RecordDict()
    content["task"] = ConfigRecord(
        {"federation": task.federation, "round": task.round, "method": task.method, "seed": task.seed}
    )
    put_adapter(content, task.start)
    return Message(content, dst_node_id=node, message_type="train", group_id=str(task.round))


def _answer(reply: Message) -> Answer:
    if reply.has_error():
        return Answer("", None, f"{reply.error.reason or 'no reason'} (Flower's error {reply.error.code})")
    party = reply.content.config_records.get("party", {})
    return Answer(str(party.get("name", "")), adapter_of(reply.content), str(party.get("error", "no update")))
