"""The settings of one run: every key, its type, its legal range and one line about it.

A key's name is its field's name is its path on the command line (`train.max_steps=10`). Models are frozen and refuse
unknown keys and values of another type. What two settings may not say together stands in rules.py.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def _number(value: Any) -> Any:
    """`2e-4` is text to PyYAML and a number to OmegaConf: both ways of reading a file give the same run."""
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def _printable(text: str) -> str:
    """A resolved config is saved as UTF-8 YAML and read back; `???` is how YAML says that a value is missing."""
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("text must not hold a NUL character or half of a surrogate pair")
    if text == "???":
        raise ValueError("a value is missing")
    return text


Text = Annotated[str, StringConstraints(min_length=1), AfterValidator(_printable)]
Name = Annotated[str, StringConstraints(pattern=r"^[^/\\\x00-\x1f]*$"), AfterValidator(_printable)]
Number = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]

SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_LONG_DTYPES = {short: long for long, short in SHORT_DTYPES.items()}


def _long_dtype(value: Any) -> Any:
    return _LONG_DTYPES.get(value, value) if isinstance(value, str) else value


# Accepts the short names as well; the value is always the long name.
Dtype = Annotated[Literal["bfloat16", "float16", "float32"], BeforeValidator(_long_dtype)]


class Section(BaseModel):
    """Frozen, strict about types, no unknown keys, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class ModelConfig(Section):
    """The base model."""

    name: Text = Field(description="Hub id or local folder of the base model.")
    revision: Text | None = Field(None, description="Branch, tag or commit of a hub model; null is its main branch.")
    tokenizer: Text | None = Field(
        None, description="Folder or hub id of a tokenizer of the same vocabulary, used in place of the model's own."
    )
    dtype: Dtype = Field("bfloat16", description="Type of the weights that are not quantized.")
    attention: Literal["auto", "segmented", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="Attention kernel; auto takes the fastest that the machine has."
    )


class QuantConfig(Section):
    """How the frozen base is stored."""

    type: Literal["nf4", "int8", "none"] = Field("nf4", description="Storage of the frozen linear weights.")
    double: bool = Field(True, description="Quantize the 4-bit scales as well (saves 0.4 bit a weight).")
    compute_dtype: Dtype = Field("bfloat16", description="Type that 4-bit weights are multiplied in.")
    skip_modules: list[Text] = Field(
        [], description="Modules kept in 16 bit: names, globs or regexes; lm_head always is."
    )
    int8: list[Text] = Field([], description="Modules kept in 8 bit beside 4-bit ones: names, globs or regexes.")
    cache: bool = Field(
        True, description="Keep the quantized model in $FINETUNE_CACHE, else ~/.cache/finetune, for the next start."
    )
    keep_dequantized: bool = Field(
        False, description="Keep a 16-bit copy of 4-bit weights too: same numbers, more memory, none dequantized twice."
    )


class LoraConfig(Section):
    """The adapter that is trained."""

    rank: Count = Field(8, description="Rank of the update.")
    alpha: Positive = Field(16.0, description="Scale of the update: it is multiplied by alpha / rank.")
    dropout: Share = Field(0.0, description="Dropout on the adapter's input.")
    target_modules: list[Text] | Text = Field(
        ["q_proj", "v_proj"], description="Layers that get an adapter: a list of names, one regex, or all-linear."
    )
    layers_to_transform: list[Index] | None = Field(None, description="Layer numbers that get one; null is all layers.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (rank-stabilized LoRA).")
    dora: bool = Field(False, description="Learn magnitude and direction apart (DoRA).")
    init: Literal["default", "gaussian", "pissa", "pissa_niter_16", "olora", "orthogonal", "loftq"] = Field(
        "default", description="How the adapter starts; pissa and olora need quant.type=none."
    )
    modules_to_save: list[Text] = Field([], description="Modules trained in full and saved with the adapter.")
    rank_pattern: dict[Text, Count] = Field({}, description="Rank for modules whose name matches the key.")
    alpha_pattern: dict[Text, Positive] = Field({}, description="Alpha for modules whose name matches the key.")
    init_adapter: Text | None = Field(None, description="Folder or hub id of an adapter to go on training on new data.")
    new_tokens: list[Text] = Field([], description="Tokens added to the vocabulary; only their rows are trained.")


class SourceConfig(Section):
    """Rows of one shape: a file, a glob of files, a folder or a data set of the hub."""

    path: Text = Field(
        description="File of rows (jsonl, json, csv, parquet, arrow; also compressed), a glob, a folder, or a hub id."
    )
    name: Text | None = Field(None, description="Name in messages and metrics; null is the split's or the file's name.")
    format: Literal["auto", "messages", "sharegpt", "prompt_completion", "alpaca", "text", "tokens"] = Field(
        "auto", description="Shape of a row; auto looks at the columns of the first."
    )
    columns: dict[Text, Text] = Field(
        {}, description="Columns called otherwise, ours: theirs, as {prompt: question, completion: answer}."
    )
    roles: dict[Literal["system", "user", "assistant", "tool"], list[Text] | Text] = Field(
        {}, description="Roles called otherwise, ours: theirs, as {user: customer, assistant: [agent, bot]}."
    )
    split: Text | None = Field(None, description="Part of a folder or hub id to read; null where path is a file.")
    subset: Text | None = Field(None, description="Configuration of a hub data set, as main of openai/gsm8k.")
    revision: Text | None = Field(None, description="Branch, tag or commit of a hub data set; null is its main branch.")
    weight: Positive = Field(1.0, description="Copies of these rows that one epoch holds (training only).")
    limit: Count | None = Field(None, description="Read only the first so many rows.")


class DataConfig(Section):
    """What is trained and evaluated on."""

    train: Annotated[list[SourceConfig], Field(min_length=1)] = Field(description="Sources of training rows.")
    eval: list[SourceConfig] = Field([], description="Sources of held-out rows; each gets its own metrics.")
    held_out: Share = Field(
        0.0, description="Share of the training rows kept for evaluation, chosen by a hash of each row's content."
    )
    max_length: Annotated[int, Field(ge=2)] = Field(2048, description="Tokens of the longest sequence.")
    packing: bool = Field(True, description="Put several rows into one sequence; none sees another.")
    truncation: Literal["drop", "left", "right", "split", "error"] = Field(
        "drop", description="What happens to a row longer than max_length."
    )
    train_on: Literal["assistant", "answer", "last", "all"] = Field(
        "assistant",
        description="Targets: every assistant turn, the same without what it thinks in <think>, the last one, or every "
        "token.",
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="What happens to a row that cannot be used.")
    max_bad_share: Share = Field(0.05, description="Share of skipped rows above which a source is refused.")
    system: Text | None = Field(None, description="System message for rows that have none.")
    chat_template: Text | None = Field(None, description="Jinja file used in place of the tokenizer's template.")
    stream_rows: Count | None = Field(
        None, description="Read and tokenize so many rows at a time while training; null is all of them before."
    )
    workers: Count | None = Field(None, description="Processes that tokenize; null is one for each core.")
    cache: Text | None = Field(
        None, description="Folder of tokenized rows; null is $FINETUNE_CACHE, else ~/.cache/finetune/tokens."
    )


class TrainConfig(Section):
    """The optimization, its length, its checkpoints."""

    max_steps: Count | None = Field(None, description="Optimizer steps; give this or epochs.")
    epochs: Positive | None = Field(None, description="Passes over the training rows; 1 when max_steps is null too.")
    learning_rate: Annotated[Positive, Field(le=1)] = Field(2e-4, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Learning rate after the warm-up.")
    warmup_ratio: Share = Field(0.03, description="Share of the steps in which the learning rate rises.")
    warmup_steps: Count | None = Field(None, description="Steps in which it rises; null: train.warmup_ratio decides.")
    batch_size: Count = Field(16, description="Sequences an optimizer step, summed over all ranks.")
    micro_batch_size: Count | None = Field(None, description="Sequences a forward pass on one rank; null derives it.")
    max_grad_norm: NotNegative = Field(1.0, description="Gradients are clipped to this norm; 0 is off.")
    weight_decay: Share = Field(0.0, description="AdamW's weight decay.")
    beta1: Share = Field(0.9, description="AdamW's first-moment decay.")
    beta2: Share = Field(0.999, description="AdamW's second-moment decay.")
    eps: Positive = Field(1e-8, description="AdamW's epsilon.")
    neftune_alpha: NotNegative = Field(0.0, description="NEFTune noise on the embeddings; 0 is off.")
    gradient_checkpointing: Literal["auto", "none", "all", "offload"] | Count = Field(
        "auto",
        description="Layers recomputed in backward to save memory: as many as needed, none, all, all with their inputs "
        "kept in main memory, or a number.",
    )
    kernels: Literal["fused", "peft"] = Field(
        "fused", description="fused: the kernels of this package; peft: the modules of PEFT and transformers."
    )
    share_prefixes: bool = Field(
        True,
        description="With fused kernels, compute only tokens that a target needs, and shared prefixes once.",
    )
    compile: bool | None = Field(
        None, description="Compile elementwise kernels; null does where the run is long enough to repay it."
    )
    eval_every: Count | None = Field(None, description="Steps between evaluations; null is only at the end.")
    save_every: Count | None = Field(None, description="Steps between checkpoints; null is only at the end.")
    keep_checkpoints: Count = Field(2, description="Newest checkpoints kept; the best is kept besides.")
    early_stopping: Count | None = Field(None, description="Stop after so many evaluations without improvement.")
    resume: Text = Field("never", description="never, auto (newest whole checkpoint), or a checkpoint folder.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="Seed of everything random.")
    world_size: Count | None = Field(None, description="Refuse to run with another number of ranks.")


class TeacherConfig(Section):
    """The teacher and where it is."""

    name: Text | None = Field(
        None, description="Hub id or local folder of the teacher; null is the student's own base."
    )
    revision: Text | None = Field(None, description="Branch, tag or commit of a hub teacher; null is its main branch.")
    dtype: Dtype = Field("bfloat16", description="Type that the teacher computes in; its weights are not quantized.")
    lora: Text | None = Field(None, description="Folder or hub id of an adapter that belongs on the teacher.")
    placement: Literal["resident", "streamed", "cached", "server"] = Field(
        "resident",
        description="In memory; read layer by layer; not at all, but distill.cache; or at distill.teacher.url.",
    )
    steps_ahead: Count = Field(1, description="Steps whose rows a streamed teacher answers each time it is read.")
    url: Text | None = Field(None, description="OpenAI-compatible endpoint, as http://host:8000/v1 (server only).")
    served_as: Text | None = Field(
        None, description="What the server calls the teacher; null is its name, or the one model that is served."
    )
    requests: Count = Field(8, description="Requests in flight at a server.")


class DistillConfig(Section):
    """Learning from a teacher's probabilities."""

    objective: Literal["none", "recover", "sft+anchor", "distill"] = Field(
        "none",
        description="none; recover what quantization lost (divergence alone); learn the rows and stay close to the own "
        "base; learn the rows and from a larger or tuned teacher.",
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl"] = Field(
        "forward_kl", description="Distance of the student's probabilities from the teacher's."
    )
    beta: Annotated[Positive, Field(lt=1)] = Field(0.5, description="The teacher's share in the mixture of jsd.")
    alpha: Annotated[Positive, Field(lt=1)] = Field(0.1, description="The teacher's share in the mixture of skew_kl.")
    temperature: Positive = Field(1.0, description="Both sides' logits are divided by it before the divergence.")
    weight: NotNegative | None = Field(
        None, description="Of the divergence beside the loss on the rows; null is 0.2 for sft+anchor, 1 for distill."
    )
    hidden_weight: NotNegative = Field(
        0.0, description="Of the mean squared difference of the final hidden states; 0 is off."
    )
    on_policy: Annotated[Number, Field(ge=0, le=1)] = Field(
        0.0, description="Share of the rows whose answers the student writes itself, for the teacher to judge."
    )
    on_policy_tokens: Count = Field(128, description="Longest answer that the student writes, in tokens.")
    on_policy_temperature: Positive = Field(1.0, description="Temperature at which the student writes.")
    cache: Text | None = Field(None, description="Folder of the teacher's signal, written by `finetune cache`.")
    cache_kind: Literal["sampled", "hidden"] = Field(
        "sampled", description="What is cached: probabilities (180 bytes a target), or exact hidden states."
    )
    top_k: Annotated[int, Field(ge=1, le=256)] = Field(32, description="Most probable tokens kept of each target.")
    num_samples: Annotated[int, Field(ge=1, le=256)] = Field(
        16, description="Tokens drawn from the rest, without bias."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="Seed of what is drawn for a cache.")
    spot_check: Index = Field(
        2, description="Cached documents compared with the teacher at the start, where it is here."
    )
    teacher: TeacherConfig = Field(TeacherConfig(), description="The teacher and where it is.")


class GuardConfig(Section):
    """A limit to how far a run may take the model from its teacher: by default from the base as it was in 16 bit."""

    metric: Literal["teacher_kl"] = Field(
        "teacher_kl", description="What is watched at each evaluation: KL(teacher || model), mean over held-out sets."
    )
    max: Positive | None = Field(None, description="Limit in nats a target token; null watches nothing.")
    action: Literal["warn", "recover", "stop"] = Field(
        "warn",
        description="Beyond the limit: say so; learn from the teacher alone for guard.steps and measure again; or save "
        "and end.",
    )
    steps: Count = Field(20, description="Steps of a recovery, over the rows of the run's latest steps.")


class GenerationConfig(Section):
    """Answers to held-out rows, before, during and after the training."""

    num_examples: Index = Field(0, description="Held-out rows answered for exact match before and after; 0 is off.")
    max_new_tokens: Count = Field(128, description="Longest answer in tokens.")
    batch_size: Count = Field(32, description="Rows answered at a time.")
    samples: Index = Field(2, description="Answers shown before and after.")
    every: Count | None = Field(None, description="Steps between sampled answers during training; null is never.")


class TrackConfig(Section):
    """Where the metrics go besides metrics.jsonl."""

    wandb: bool = Field(False, description="Log to Weights & Biases (offline without a key).")
    tensorboard: bool = Field(False, description="Write TensorBoard event files.")
    project: Text = Field("finetune", description="Project name for Weights & Biases.")
    run_name: Text | None = Field(None, description="Run name for Weights & Biases; null takes the run's name.")
