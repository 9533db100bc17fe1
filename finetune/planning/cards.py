"""What fits on several GPUs of a node: longest sequence and speed per model size and memory of a card."""

from __future__ import annotations

from dataclasses import dataclass, replace

from finetune.config.command_options import PlanOptions
from finetune.models.families import QWEN25_SHAPES
from finetune.planning.advice import longest_that_fits
from finetune.planning.auto_batch import estimate_memory
from finetune.planning.inputs import PlanInputs
from finetune.planning.sharded_base import shard_group
from finetune.planning.timing import estimate_time

# GB -> the card whose data sheet gives the speed of products and of the link between GPUs.
CARDS = {24: "4090", 48: "L40S", 80: "H100"}
SIZES = ("7B", "14B", "32B", "72B")
# Speed is quoted at this length: attention makes long sequences slower, in any number of cards.
SPEED_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Cell:
    """longest: tokens of the longest packed sequence. tokens_per_second: of all ranks, at SPEED_TOKENS or `longest`."""

    longest: int
    tokens_per_second: float


def cards_table(inputs: PlanInputs) -> dict[str, dict[int, Cell | None]]:
    """Return what each model size can do on `inputs.ranks` GPUs, by the memory of a card in GB; None: it does not fit.

    The longest sequence is that of a base that the GPUs share, if the config allows it. The speed is that of the
    sharing that the run would choose.
    """
    return {size: {gb: _cell(replace(inputs, shape=QWEN25_SHAPES[size]), gb) for gb in CARDS} for size in SIZES}


def _cell(inputs: PlanInputs, gb: int) -> Cell | None:
    free_bytes = gb * 1e9
    longest = longest_that_fits(replace(inputs, shard_ranks=shard_group(inputs, 0.0)), free_bytes)
    if not longest:
        return None
    run = inputs.with_settings(data={"max_length": min(SPEED_TOKENS, longest)})
    run = replace(run, shard_ranks=shard_group(run, free_bytes))
    memory = estimate_memory(run, free_bytes)
    timing = estimate_time(run, memory, rates=None, options=PlanOptions(), gpu_name=CARDS[gb])
    return Cell(longest, timing["tokens_per_second"])
