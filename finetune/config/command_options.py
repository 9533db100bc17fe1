"""The settings of commands that take no run's config: every key, its type, its range and one line about it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from finetune.config.sections import (
    Count,
    Dtype,
    Index,
    NotNegative,
    Number,
    Positive,
    Section,
    Share,
    SourceConfig,
    Text,
)

Base = Literal["auto", "original", "dequantized"]
MergedType = Literal["auto"] | Dtype
Combination = Literal["linear", "ties", "dare_linear", "dare_ties"]


class KlCheckOptions(Section):
    """Comparison of the merged model with the trained one, and the limit of their distance."""

    data: list[SourceConfig] | None = Field(None, description="Examples to compare on; null: the run's data.eval.")
    num_examples: Index = Field(64, description="Number of held-out examples, from the first on; 0: no comparison.")
    max_kl: NotNegative | None = Field(
        None, description="Largest allowed KL(trained || merged) in nats per target token; null: report it only."
    )


class DataOptions(Section):
    """`finetune data`, beside its config."""

    show: Index = Field(0, description="Print so many training rows, evenly spaced, with the trained tokens colored.")
    html: Text | None = Field(None, description="Page to write: the report and 10 rows, or as many as show.")
    dump: Text | None = Field(None, description="JSONL file to write: every row as tokens and labels.")


class ConvertOptions(SourceConfig):
    """`finetune data convert`: the keys of an item of data.train, and what to do with bad rows."""

    out: Text = Field(description="File to write; it must not exist.")
    on_bad_row: Literal["error", "skip"] = Field("error", description="What happens at a row that cannot be used.")
    max_bad_share: Share = Field(0.05, description="Share of skipped rows above which nothing is written.")


class ChatOptions(Section):
    """`finetune chat`, beside the keys of a run's config."""

    adapter: Text | None = Field(None, description="Run folder, checkpoint or adapter folder to put on its base.")
    model: Text | None = Field(
        None, description="Base model: hub id or folder. With config=, model= chooses a model group as in training."
    )
    max_new_tokens: Count = Field(512, description="Longest answer in tokens.")
    temperature: NotNegative = Field(0.0, description="0 takes the most probable token; above 0 samples.")
    system: str | None = Field(None, description="System message; null is the template's own.")


class MergeOptions(Section):
    """`finetune merge`."""

    OLD_KEYS: ClassVar[dict[str, str]] = {
        "gate.data": "it is now kl_check.data",
        "gate.rows": "it is now kl_check.num_examples",
        "gate.max_kl": "it is now kl_check.max_kl",
        "compare": "it was removed; merge once with each base= and compare the kl_check lines",
    }
    adapter: list[Text] | Text = Field(description="Run folder, checkpoint, adapter folder or hub id; or a list.")
    out: Text = Field(description="Folder to write; it must not exist.")
    base: Base = Field(
        "auto",
        description="Weights to add the update to: original 16-bit ones, or those that 4-bit training saw (dequantized)"
        "; auto is dequantized for adapters that learned to make up for quantization, original for all others.",
    )
    dtype: MergedType = Field("auto", description="Type to round to; auto is the base's.")
    shard_size: Text = Field("4GB", description="Most that one safetensors file holds, as 4GB or 500MB.")
    model: Text | None = Field(None, description="Base model, where the adapter's own entry is not to be used.")
    weights: list[Number] | None = Field(None, description="Factor of each adapter; null is 1 for each.")
    combination: Combination = Field("linear", description="How several adapters are added up.")
    density: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        None, description="Share of each update that ties or dare keep."
    )
    seed: Index = Field(0, description="Seed of what dare drops.")
    kl_check: KlCheckOptions = Field(
        KlCheckOptions(), description="Comparison of the trained model with the merged one on held-out examples."
    )


class ExportOptions(Section):
    """`finetune export`."""

    adapter: Text | None = Field(None, description="Run folder, checkpoint, adapter folder or hub id to merge first.")
    model: Text | None = Field(None, description="Base of the adapter; without one, the model folder to export.")
    format: Text = Field(description="Format to write; --help lists them.")
    out: Text = Field(description="Folder to write; it must not exist.")
    type: Text | None = Field(None, description="Number format within the format; --help lists them.")
    merge: bool = Field(True, description="false writes the adapter itself, not the merged model (gguf).")
    base: Base = Field("auto", description="As for merge.")
    shard_size: Text = Field("4GB", description="Most that one safetensors file holds.")
    verify: bool = Field(True, description="Read what was written with its own reader and compare.")
    prompts: Count = Field(4, description="Prompts to compare on.")
    tokens: Count = Field(64, description="Tokens that the source model answers each of them with.")


class EvalOptions(Section):
    """`finetune eval`."""

    adapter: Text | None = Field(None, description="Run folder, checkpoint, adapter folder or hub id to measure.")
    model: Text | None = Field(None, description="Or a model alone: a folder, as a merged one, or a hub id.")
    data: list[SourceConfig] | None = Field(
        None, description="Held-out rows; null is the data.eval, or the held-out part, of the adapter's run."
    )
    forgetting: list[SourceConfig] = Field([], description="Other held-out rows, which the adapter should not harm.")
    variants: list[Literal["base", "quantized", "trained", "merged"]] | None = Field(
        None, description="Models to compare; null is all that there are."
    )
    quant: Literal["nf4", "int8", "none"] | None = Field(
        None, description="Storage of the quantized base; null is the run's, for a model alone none."
    )
    merged: Text | None = Field(None, description="Folder of the merged model; null merges into one that goes again.")
    limit: Count | None = Field(None, description="Rows of each set, the first so many; null is all.")
    on_bad_row: Literal["error", "skip"] | None = Field(
        None, description="What happens at a row that cannot be used; null is what the run does, or error."
    )
    answers: Index = Field(200, description="Rows of each set of data that are answered; 0 is none.")
    metric: Text = Field(
        "exact", description="What makes an answer right: exact, number, regex, or FILE.py:FUNCTION, which is run."
    )
    pattern: Text | None = Field(None, description="Of metric=regex: its first group, or all of it, is compared.")
    max_new_tokens: Count | None = Field(None, description="Longest answer; null is the run's, or 256.")
    batch_size: Count = Field(32, description="Rows answered at a time.")
    tasks: list[Text] = Field([], description="Tasks of lm-evaluation-harness: their YAML files or names.")
    tasks_as_chat: bool = Field(True, description="Ask the tasks' questions through the chat template.")
    resamples: Annotated[int, Field(ge=100, le=100_000)] = Field(1000, description="Resamples behind the intervals.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="Of the resamples.")
    out: Text | None = Field(None, description="Folder for gap.json, gap.md and gap.png; null is the adapter's run.")


class CompareOptions(Section):
    """`finetune compare`."""

    out: Text | None = Field(None, description="Page to write, as compare.html; null prints the table alone.")


class SensitivityOptions(Section):
    """`finetune sensitivity`, beside its config."""

    out: Text = Field("sensitivity", description="Folder of the measurements; given again, it goes on.")
    rows: Count = Field(128, description="Rows of data.train to measure on, evenly spaced.")
    type: Literal["both", "nf4", "int8"] = Field(
        "both", description="Storage to measure; both is int8 and the config's 4-bit type."
    )


class AllocateOptions(Section):
    """`finetune allocate`, beside its config."""

    sensitivity: Text = Field("sensitivity", description="Folder that finetune sensitivity wrote.")
    budget_gb: Positive = Field(description="Most that the base's weights may take, in 10^9 bytes, embedding included.")
    out: Text = Field("configs/quant/allocated.yaml", description="File to write, for quant=allocated.")
    measure: bool = Field(True, description="Measure the choice, and simple ones of its size, on held-out rows.")
    rows: Count = Field(256, description="Held-out rows to measure on; where there are none, rows of data.train.")


class SweepSettings(Section):
    """How runs are chosen, judged and kept."""

    out: Text | None = Field(None, description="Folder of the runs and the table; null is outputs/NAME-sweep.")
    metric: Text = Field(
        "eval_loss",
        description="What is judged: eval_loss, final_loss, exact_match_after, teacher_kl_after, recovered, "
        "peak_bytes, train_seconds, tokens_per_second, or a figure of one set, as eval/heldout/accuracy.",
    )
    direction: Literal["auto", "minimize", "maximize"] = Field(
        "auto", description="Which way is better; auto knows it of each metric."
    )
    trials: Count | None = Field(
        None, description="Runs that a search (Optuna's TPE) makes; null is the grid, every combination."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="Of the search.")
    launch: Text | None = Field(
        None, description="What starts a run, as 'accelerate launch finetune/train.py'; null is finetune train."
    )


class SweepOptions(Section):
    """`finetune sweep`."""

    sweep: SweepSettings = Field(SweepSettings(), description="How runs are chosen, judged and kept.")


class PlanOptions(Section):
    """`finetune plan`, beside the keys of a run's config."""

    gpu_gb: Positive | None = Field(
        None, description="Plan for a GPU of so many GB (10^9 bytes), all of them free; null is this machine's device."
    )
    tflops: Positive | None = Field(
        None, description="Products the device reaches, in 10^12 operations a second; null is measured or assumed."
    )
    tokens: Count | None = Field(
        None, description="Training tokens of an epoch; null is estimated from the size of local files."
    )
    document_tokens: Count | None = Field(None, description="Length of a row; null takes each sequence for one row.")
    target_share: Annotated[Number, Field(gt=0, le=1)] = Field(
        1.0, description="Share of the tokens that are trained on; `finetune data` tells it."
    )
    calibrate: bool = Field(False, description="Measure this machine first (half a minute) and keep its rates.")
    auto: bool = Field(False, description="Find the fastest settings that fit, as overrides to paste.")
    table: bool = Field(False, description="Longest packed sequence for every Qwen2.5 size and common GPU sizes.")
