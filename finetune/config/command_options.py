"""The settings of commands that take no run's config: every key, its type, its range and one line about it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from finetune.config.section import (
    Count,
    Dtype,
    Fraction,
    Index,
    Name,
    NotNegative,
    Number,
    Positive,
    Section,
    Seed,
    Share,
    Text,
)
from finetune.config.sections import (
    ON_OBJECT_HELP,
    REASONING_HELP,
    TURN_ORDER_HELP,
    OnBadRow,
    OnObject,
    QuantType,
    ReasoningRule,
    SourceConfig,
    Sources,
    TurnOrder,
)

Base = Literal["auto", "original", "dequantized"]
MergedType = Literal["auto"] | Dtype
Combination = Literal["linear", "ties", "dare_linear", "dare_ties"]


class KlCheckOptions(Section):
    """Comparison of the merged model with the trained one, and the limit of their distance."""

    data: Sources | None = Field(None, description="Examples to compare on; null: the run's data.eval.")
    num_examples: Index = Field(64, description="Number of held-out examples, from the first on; 0: no comparison.")
    max_kl: NotNegative | None = Field(None, description="Limit on KL(trained || merged), nats per target; null: none.")


class TrainOptions(Section):
    """`finetune train`, beside its config: what a config cannot hold, because it runs the user's code."""

    reward_function: list[Text] | Text = Field(
        [], description="Functions that judge answers, with reward.loss: FILE.py:NAME or module:NAME, or a list."
    )


class DataOptions(Section):
    """`finetune data`, beside its config."""

    show: Index = Field(0, description="Training rows to print, evenly spaced, with the trained tokens colored.")
    html: Text | None = Field(None, description="HTML page to write: the report and 10 rows, or as many as show.")
    dump: Text | None = Field(None, description="JSONL file to write: every row as tokens and labels.")


class RowOptions(SourceConfig):
    """The keys of an item of data.train, and the settings of the data section that decide what a row means."""

    reasoning: ReasoningRule = Field("error", description=REASONING_HELP)
    on_object: OnObject = Field("error", description=ON_OBJECT_HELP)
    turn_order: TurnOrder = Field("any", description=TURN_ORDER_HELP)


class ConvertOptions(RowOptions):
    """`finetune data convert`: the keys of an item of data.train, and what to do with bad rows."""

    out: Text = Field(description="File to write; it must not exist.")
    answers: Text | None = Field(None, description="Output file of a batch API for the requests of path.")
    on_bad_row: OnBadRow = Field("error", description="At invalid rows: list and stop, or skip.")
    max_bad_share: Share = Field(0.05, description="Share of skipped rows above which nothing is written.")


class RecipesOptions(Section):
    """`finetune recipes`."""

    out: Text | None = Field(None, description="Config to write; it must not exist. null: print the recipe.")


class InitOptions(RowOptions):
    """`finetune init`: the keys of an item of data.train, and what to plan for."""

    path: Text = Field("", description="The dataset; the word without a key.")  # type: ignore[assignment]
    out: Text = Field("finetune.yaml", description="Config to write; it must not exist.")
    model: Text | None = Field(None, description="Option of the group model; null: the largest up to 7B that fits.")
    gpu: Text | None = Field(None, description="A known GPU, as 4090, t4 or a100-80; null: the device here.")
    gpu_gb: Positive | None = Field(None, description="Free GB (10^9 bytes) of a GPU; null: the device here.")


class MigrateOptions(Section):
    """`finetune migrate`."""

    out: Text = Field("migrated.yaml", description="Config to write; it must not exist.")
    framework: Literal["auto", "axolotl", "llama-factory", "ms-swift", "trl", "unsloth"] = Field(
        "auto", description="Framework of the file; auto: recognized by its keys."
    )


class ChatOptions(Section):
    """`finetune chat`, beside the keys of a run's config."""

    adapter: Text | None = Field(None, description="Run folder, checkpoint or adapter folder to load onto its base.")
    model: Text | None = Field(
        None,
        description="Base: hub id or folder. With config=, a model group as in training. With url=, the name of a "
        "served model; null: the first adapter, else the first model.",
    )
    url: Text | None = Field(None, description="Address of a server with OpenAI's API; nothing is loaded here.")
    max_new_tokens: Count = Field(512, description="Longest answer in tokens.")
    temperature: NotNegative = Field(0.0, description="Sampling temperature; 0: always the most probable token.")
    system: str | None = Field(None, description="System message; null: the template's own.")


class ServeSettings(Section):
    """How requests are answered, and within which limits."""

    max_batch: Count = Field(32, description="Most answers written at the same time.")
    window_ms: Index = Field(100, description="Time that the first request of an idle server waits for others.")
    prefill_tokens: Count = Field(512, description="Most tokens of prompts computed between two tokens of an answer.")
    cache_tokens: Count | None = Field(None, description="Tokens of keys and values kept; null: by free memory.")
    context_tokens: Count | None = Field(None, description="Longest prompt with its answer; null: the model's.")
    queue: Index = Field(256, description="Most requests that wait; others are refused with 429.")
    max_request: Text = Field("4MB", description="Largest body of a request.")
    deadline_seconds: Positive = Field(600, description="Longest time of a request, whatever was measured.")
    deadline_floor_seconds: Positive = Field(30, description="Shortest time that a request is given.")
    deadline_factor: Positive = Field(4, description="Time of a request: this factor times the p99 of measured ones.")
    drain_seconds: NotNegative = Field(30, description="Time for the running answers after SIGTERM.")
    cache: Text = Field("memory", description="Answers of repeated requests: none, memory, or redis://HOST:PORT/DB.")
    cache_entries: Count = Field(1024, description="Answers kept in memory.")
    allow_adapters: bool = Field(False, description="Load and unload adapters by POST /v1/adapters.")
    adapters_folder: Text | None = Field(None, description="Folder of the adapters that a request may load by name.")
    max_adapters: Count = Field(16, description="Adapters in memory; the least recently used one leaves.")
    check: Text | None = Field(None, description="Run whose trained model the answers must equal; null: the adapter's.")
    check_rows: Index = Field(8, description="Held-out rows of that comparison; 0: none.")
    max_kl: NotNegative = Field(0.02, description="Limit on KL(trained || served), nats per target.")
    grpc_port: Annotated[int, Field(ge=0, lt=2**16)] | None = Field(None, description="Port for gRPC; null: none.")


class ServeOptions(Section):
    """`finetune serve`, beside the keys of a run's config."""

    adapter: Text | None = Field(None, description="Run folder, checkpoint or adapter folder to serve on its base.")
    adapters: dict[Name, Text] = Field({}, description="More adapters of the base, as {name: FOLDER, …}.")
    model: Text | None = Field(None, description="Base: hub id or folder; without an adapter, the model to serve.")
    engine: Literal["embedded", "vllm", "sglang", "llamacpp", "tensorrt_llm"] = Field(
        "embedded", description="Program that computes: this package's own, or a server that it starts and watches."
    )
    engine_args: list[Text] = Field([], description="More arguments of that server, as it takes them.")
    host: Text = Field("127.0.0.1", description="Address to listen at; 0.0.0.0: every one of this machine.")
    port: Annotated[int, Field(ge=0, lt=2**16)] = Field(8000, description="Port to listen at; 0: any free one.")
    serve: ServeSettings = Field(ServeSettings(), description="How requests are answered.")


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
        description="Weights to add the update to: original (16 bit) or dequantized (the weights of 4-bit training). "
        "auto: dequantized for adapters that compensate for quantization, original for all others.",
    )
    dtype: MergedType = Field("auto", description="Data type to round to; auto: the type of the base.")
    shard_size: Text = Field("4GB", description="Maximum size of a safetensors file, as 4GB or 500MB.")
    model: Text | None = Field(None, description="Base model; null: the base that the adapter names.")
    weights: list[Number] | None = Field(None, description="Factor of each adapter; null: 1 for each.")
    combination: Combination = Field("linear", description="Method that combines several adapters.")
    density: Fraction | None = Field(None, description="Share of each update that ties or dare keeps.")
    seed: Index = Field(0, description="Seed of the values that dare drops.")
    kl_check: KlCheckOptions = Field(KlCheckOptions(), description="Comparison with the trained model.")


class ClipOptions(Section):
    """`finetune clip`."""

    adapter: Text = Field(description="Run folder, checkpoint or adapter folder of this party.")
    start: Text | None = Field(None, description="Adapter that the round started from; null: an untrained one, B = 0.")
    out: Text = Field(description="Folder to write; it must not exist.")
    max_norm: Positive = Field(1.0, description="Limit on the L2 norm of adapter - start, over all trained tensors.")
    noise: NotNegative = Field(0.0, description="Standard deviation of each value's noise over max_norm; 0: none.")
    seed: Seed | None = Field(
        None, description="Seed of the noise, for tests: who knows it can remove the noise. null: drawn by the system."
    )
    rounds: Count = Field(1, description="Updates with this noise that the party sends in all, for epsilon.")
    delta: Fraction | None = Field(
        None, description="Probability with which the printed epsilon may fail; null: no epsilon is computed."
    )


class AggregateOptions(Section):
    """`finetune aggregate`."""

    adapters: list[Text] = Field(min_length=1, description="Adapter folders or runs of the parties.")
    out: Text = Field(description="Folder to write; it must not exist.")
    start: Text | None = Field(None, description="Adapter that the round started from; null: an untrained one, B = 0.")
    weights: list[Number] | None = Field(None, description="Weight of each party, as its rows; null: equal.")
    method: Literal["ffa", "fedavg", "fedex"] = Field(
        "ffa",
        description="ffa: mean of B with one frozen A, exact; fedavg: means of A and B, with an error; fedex: the same "
        "means, and the rest for the base, exact.",
    )
    max_error: NotNegative = Field(0.0, description="Accepted error of fedavg, over the norm of the mean update.")
    max_norm: Positive | None = Field(None, description="Norm above which an update is bad; null: no limit.")
    on_bad_party: Literal["error", "leave_out"] = Field("error", description="At bad parties: list and stop, or go on.")


class ExportOptions(Section):
    """`finetune export`."""

    adapter: Text | None = Field(None, description="Run folder, checkpoint, adapter folder or hub id to merge first.")
    model: Text | None = Field(None, description="Base of the adapter; without an adapter, the model to export.")
    format: Text = Field(description="Format to write: safetensors, adapter, gguf, ollama or onnx.")
    out: Text = Field(description="Folder to write; it must not exist.")
    type: Text | None = Field(None, description="Number type within the format; null: the format's default.")
    merge: bool = Field(True, description="false: write the adapter itself, not the merged model (gguf).")
    base: Base = Field("auto", description="Weights to add the update to, as for merge.")
    imatrix: Sources | None = Field(
        None, description="Rows whose activations weight the rounding of GGUF's k- and iq-types; null: no weights."
    )
    shard_size: Text = Field("4GB", description="Maximum size of a safetensors file.")
    verify: bool = Field(True, description="Read the result with the reader of its format, and compare.")
    prompts: Count = Field(4, description="Prompts to compare on.")
    tokens: Count = Field(64, description="Tokens of the source model's answer to each prompt.")
    kl_check: KlCheckOptions = Field(KlCheckOptions(), description="Comparison on held-out examples.")


class EvalOptions(Section):
    """`finetune eval`."""

    adapter: Text | None = Field(None, description="Run folder, checkpoint, adapter folder or hub id to evaluate.")
    model: Text | None = Field(None, description="Model to evaluate without an adapter: folder or hub id.")
    data: Sources | None = Field(None, description="Held-out rows; null: the held-out rows of the run.")
    forgetting: Sources = Field([], description="Other held-out rows, on which the adapter should not lose.")
    variants: list[Literal["base", "quantized", "trained", "merged"]] | None = Field(
        None, description="Models to compare; null: all that exist."
    )
    quant: QuantType | None = Field(None, description="Storage of the quantized base; null: the run's, else none.")
    merged: Text | None = Field(None, description="Folder of the merged model; null: merge into a temporary one.")
    limit: Count | None = Field(None, description="Rows of each set, from the first on; null: all.")
    on_bad_row: OnBadRow | None = Field(None, description="At invalid rows: stop or skip; null: the run's, else error.")
    answers: Index = Field(200, description="Rows of each set of data to answer; 0: none.")
    metric: Text = Field(
        "exact_match",
        description="Score of answers: a name of generation.metrics, regex, or FILE.py:FUNCTION (executed).",
    )
    pattern: Text | None = Field(None, description="For metric=regex: its first group, or all of it, is compared.")
    max_new_tokens: Count | None = Field(None, description="Longest answer in tokens; null: the run's, else 256.")
    batch_size: Count = Field(32, description="Answers to generate at a time.")
    tasks: list[Text] = Field([], description="Tasks of lm-evaluation-harness: their YAML files or names.")
    tasks_as_chat: bool = Field(True, description="Put the questions of tasks into the chat template.")
    resamples: Annotated[int, Field(ge=100, le=100_000)] = Field(1000, description="Resamples of the intervals.")
    seed: Seed = Field(0, description="Seed of the resamples.")
    out: Text | None = Field(None, description="Folder for gap.json, gap.md and gap.png; null: the adapter's run.")


class PushOptions(Section):
    """`finetune push`."""

    adapter: Text | None = Field(None, description="Run folder, checkpoint or adapter folder to upload.")
    model: Text | None = Field(None, description="Or a folder that merge or export wrote.")
    repo: Text = Field(description="Repository, as USER/NAME.")
    private: bool = Field(True, description="Whether a new repository is private.")
    message: Text = Field("Upload with finetune", description="Message of the commit.")


class WatchOptions(Section):
    """`finetune watch`."""

    port: Annotated[int, Field(ge=0, lt=2**16)] = Field(8765, description="Port on this machine; 0: any free one.")
    every: Count = Field(10, description="Seconds after which a browser loads the page again, while the run goes on.")


class CompareOptions(Section):
    """`finetune compare`."""

    out: Text | None = Field(None, description="Page to write, as compare.html; null: print the table only.")


class SensitivityOptions(Section):
    """`finetune sensitivity`, beside its config."""

    out: Text = Field("sensitivity", description="Folder of the measurements; an existing one is continued.")
    rows: Count = Field(128, description="Rows of data.train to measure on, evenly spaced.")
    type: Literal["both", "nf4", "int8"] = Field("both", description="Storage to measure; both: int8 and nf4.")


class AllocateOptions(Section):
    """`finetune allocate`, beside its config."""

    sensitivity: Text = Field("sensitivity", description="Folder that finetune sensitivity wrote.")
    budget_gb: Positive = Field(description="Limit on the weights of the base in 10^9 bytes, with the embedding.")
    out: Text = Field("configs/quant/allocated.yaml", description="File to write, for quant=allocated.")
    measure: bool = Field(True, description="Measure the allocation and simple ones of its size on held-out rows.")
    rows: Count = Field(256, description="Held-out rows to measure on, or rows of data.train if there are none.")


class SweepSettings(Section):
    """How runs are chosen, compared and kept."""

    out: Text | None = Field(None, description="Folder of the runs and the table; null: outputs/NAME-sweep.")
    metric: Text = Field(
        "eval_loss",
        description="Metric to rank by: eval_loss, final_loss, exact_match_after, teacher_kl_after, recovered, "
        "peak_bytes, train_seconds, tokens_per_second, or a metric of one set, as eval/heldout/accuracy.",
    )
    direction: Literal["auto", "minimize", "maximize"] = Field("auto", description="Better direction; auto: by metric.")
    trials: Count | None = Field(None, description="Runs of a search (Optuna's TPE); null: every combination.")
    space: Literal["auto"] | None = Field(
        None, description="auto: search ranks, targets, bits, learning rate and packing length; null: the given values."
    )
    budget: Annotated[Number, Field(ge=1)] | None = Field(
        None, description="Steps of space=auto, in full runs; null: 12."
    )
    memory_gb: Positive | None = Field(
        None, description="Limit on the predicted memory of a run of space=auto in 10^9 bytes; null: what is free here."
    )
    hours: Positive | None = Field(None, description="Limit on the predicted time of a run of space=auto; null: none.")
    seed: Seed = Field(0, description="Seed of the search.")
    launch: Text | None = Field(
        None, description="Launcher, as 'accelerate launch finetune/train.py'; null: finetune train."
    )


class SweepOptions(Section):
    """`finetune sweep`."""

    sweep: SweepSettings = Field(SweepSettings(), description="How runs are chosen, compared and kept.")


class PlanOptions(Section):
    """`finetune plan`, beside the keys of a run's config."""

    gpu: Text | None = Field(None, description="A known GPU, as 4090, t4 or a100-80; null: the device here.")
    gpu_gb: Positive | None = Field(None, description="Free GB (10^9 bytes) of a GPU; null: the device here.")
    gpus: Count = Field(1, description="GPUs of each node (without a GPU: processes).")
    nodes: Count = Field(1, description="Machines of the run.")
    link_gbps: Positive | None = Field(
        None, description="10^9 bits/s of each node's network, or between the GPUs of the only node; null: assumed."
    )
    tflops: Positive | None = Field(None, description="Speed in 10^12 operations/s; null: measured or assumed.")
    tokens: Count | None = Field(None, description="Training tokens of an epoch; null: estimated from local files.")
    document_tokens: Count | None = Field(None, description="Length of a row; null: a row fills a sequence.")
    target_share: Fraction = Field(1.0, description="Share of trained tokens; `finetune data` reports it.")
    media_share: Annotated[Number, Field(ge=0, le=1)] = Field(
        1.0, description="Share of tokens that are images, video or sound."
    )
    calibrate: bool = Field(False, description="Measure the speed of this machine first (half a minute) and keep it.")
    auto: bool = Field(False, description="Find the fastest settings that fit, as overrides to paste.")
    table: bool = Field(False, description="Longest packed sequence for every Qwen2.5 size and common GPU sizes.")
