"""The sections of a run's config: every key with its type, range, default and meaning.

The path of a key on the command line is section.field: `train.max_steps=10`. schema.py checks combinations of keys.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from finetune.config.section import (
    Count,
    Dtype,
    Fraction,
    Index,
    NotNegative,
    Number,
    Positive,
    Section,
    Seed,
    Share,
    Text,
)

RewardName = Literal["exact", "number", "regex", "json_schema", "length", "format"]
RowFormatName = Literal[
    "auto", "messages", "sharegpt", "prompt_completion", "prompt", "preference", "alpaca", "text", "tokens"
]
QuantType = Literal["nf4", "int8", "none"]
OnBadRow = Literal["error", "skip"]
ReasoningRule = Literal["error", "think", "drop"]
OnObject = Literal["error", "json"]
TurnOrder = Literal["any", "strict"]
REASONING_HELP = "Reasoning in a field of a message, as reasoning_content: refuse, write as <think> text, or leave out."
ON_OBJECT_HELP = "Objects and lists instead of texts: refuse, or write as JSON text."
TURN_ORDER_HELP = "Unusual orders of turns: all that the chat template writes unchanged, or none."


class ModelConfig(Section):
    """The base model."""

    name: Text = Field(description="Hub id or local folder of the base model.")
    revision: Text | None = Field(None, description="Branch, tag or commit of a hub model; null: the main branch.")
    tokenizer: Text | None = Field(None, description="Another tokenizer of the same vocabulary; null: the model's own.")
    dtype: Dtype = Field("bfloat16", description="Data type of the weights that are not quantized.")
    attention: Literal["auto", "segmented", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="Attention kernel; auto: the fastest kernel that works on this machine."
    )
    embedding: Literal["auto", "device", "host"] = Field(
        "auto",
        description="Where a GPU run keeps the input embedding; host: main memory, same results; auto: host where "
        "layers are recomputed or memory is short, unless it is trained or tied to the head.",
    )


class QuantConfig(Section):
    """Storage of the frozen base model."""

    type: QuantType = Field("nf4", description="Storage of the linear weights: 4-bit NormalFloat, int8, or unchanged.")
    double: bool = Field(True, description="Quantize the scales of 4-bit weights too, which saves 0.4 bits per weight.")
    compute_dtype: Dtype = Field("bfloat16", description="Data type of matrix products with 4-bit weights.")
    skip_modules: list[Text] = Field([], description="Modules in 16 bit, as lm_head always: names, globs or regexes.")
    int8: list[Text] = Field([], description="Modules in 8 bit in a 4-bit base: names, globs or regexes.")
    cache: bool = Field(True, description="Cache the quantized weights in $FINETUNE_CACHE, else ~/.cache/finetune.")
    keep_dequantized: bool = Field(False, description="Keep 16-bit copies of 4-bit weights: more memory, same results.")


class LoraConfig(Section):
    """The adapter to train."""

    rank: Count = Field(8, description="Rank of the adapter matrices.")
    alpha: Positive = Field(16.0, description="Scale of the adapter; the update is multiplied by alpha / rank.")
    dropout: Share = Field(0.0, description="Dropout rate on the adapter's input; 0: no dropout.")
    target_modules: list[Text] | Text = Field(
        ["q_proj", "v_proj"],
        description="Linear layers that get an adapter: a list of names, one regex, or all-linear.",
    )
    towers: list[Literal["vision", "audio"]] = Field(
        [], description="Towers of a model that reads media which get an adapter too; they are frozen otherwise."
    )
    layers_to_transform: list[Index] | None = Field(None, description="Decoder layers that get an adapter; null: all.")
    rslora: bool = Field(False, description="Scale the update by alpha / sqrt(rank) (rank-stabilized LoRA).")
    dora: bool = Field(False, description="Train magnitude and direction of the weights separately (DoRA).")
    init: Literal["default", "gaussian", "pissa", "pissa_niter_16", "olora", "orthogonal", "loftq"] = Field(
        "default", description="Initialization of the adapter; pissa and olora need quant.type=none."
    )
    freeze_a: bool = Field(
        False, description="Train B alone; A, drawn from train.seed, stays equal at all parties of federated learning."
    )
    modules_to_save: list[Text] = Field([], description="Modules to train in full and to save with the adapter.")
    rank_pattern: dict[Text, Count] = Field({}, description="Ranks for single modules, as {name or regex: rank}.")
    alpha_pattern: dict[Text, Positive] = Field({}, description="Alphas for single modules, as {name or regex: alpha}.")
    init_adapter: Text | None = Field(None, description="Adapter to continue from, folder or hub id; null: a new one.")
    new_tokens: list[Text] = Field([], description="Tokens to add to the vocabulary; trains only their embeddings.")


class SourceConfig(Section):
    """One dataset: a file, a glob of files, a folder or a hub dataset; all examples of a file have one format."""

    path: Text = Field(description="File (jsonl, json, csv, parquet, arrow; also compressed), glob, folder or hub id.")
    name: Text | None = Field(None, description="Name in messages and metrics; null: name of the split or file.")
    format: RowFormatName = Field(
        "auto", description="Format of an example; auto: recognized from the columns of each file's first one."
    )
    columns: dict[Text, Text] = Field({}, description="Your columns as {our name: yours}, like {prompt: question}.")
    roles: dict[Literal["system", "user", "assistant", "tool"], list[Text] | Text] = Field(
        {}, description="Your role names as {our name: yours}, like {assistant: [agent, bot]}."
    )
    split: Text | None = Field(None, description="Split of a folder or hub dataset, or key of a .json file.")
    subset: Text | None = Field(None, description="Subset (configuration) of a hub dataset; null: its default.")
    revision: Text | None = Field(None, description="Branch, tag or commit of a hub dataset; null: the main branch.")
    weight: Positive = Field(1.0, description="How often one epoch takes each example, on average (training only).")
    limit: Count | None = Field(None, description="Number of examples to read, from the start; null: all.")


def _sources(value: Any) -> Any:
    """Convert a path, or paths in a list, to sources."""
    items = [value] if isinstance(value, str | dict) else value
    return [{"path": item} if isinstance(item, str) else item for item in items] if isinstance(items, list) else value


Sources = Annotated[list[SourceConfig], BeforeValidator(_sources)]


class ImageConfig(Section):
    """Images of examples. An image has one token per 28 x 28 pixels, after it is resized."""

    min_pixels: Count = Field(56 * 56, description="Pixels that a smaller image is enlarged to.")
    max_pixels: Count = Field(1280 * 28 * 28, description="Pixels that a larger image is reduced to.")


class VideoConfig(Section):
    """Videos of examples. Two frames have one token per 28 x 28 pixels, after they are resized."""

    fps: Positive = Field(2.0, description="Frames to read per second of video.")
    max_frames: Annotated[int, Field(ge=2)] = Field(768, description="Most frames of a video; then fps is lower.")
    min_pixels: Count = Field(128 * 28 * 28, description="Pixels that a smaller frame is enlarged to.")
    max_pixels: Count = Field(768 * 28 * 28, description="Pixels that a larger frame is reduced to.")


class AudioConfig(Section):
    """Audio of examples: 25 tokens per second."""

    max_seconds: Positive = Field(300.0, description="Longest audio; longer audio is an invalid example.")


class DataConfig(Section):
    """Training and evaluation data."""

    train: Sources = Field([], description="Sources of training examples; every training needs one.")
    eval: Sources = Field([], description="Sources of held-out examples; each source gets its own metrics.")
    held_out: Share = Field(0.0, description="Share of data.train to hold out, by a hash of the content; 0: none.")
    max_length: Annotated[int, Field(ge=2)] = Field(2048, description="Longest sequence in tokens.")
    packing: bool = Field(True, description="Put several examples into one sequence; attention stays inside each.")
    truncation: Literal["drop", "left", "right", "split", "error"] = Field(
        "drop", description="What to do with an example longer than max_length."
    )
    train_on: Literal["assistant", "answer", "last", "all"] = Field(
        "assistant",
        description="Trained tokens: assistant turns, the same without <think> parts, the last turn, or all tokens.",
    )
    on_bad_row: OnBadRow = Field("error", description="At invalid examples: list and stop, or skip.")
    max_bad_share: Share = Field(0.05, description="Share of invalid examples above which a source is refused.")
    reasoning: ReasoningRule = Field("error", description=REASONING_HELP)
    on_object: OnObject = Field("error", description=ON_OBJECT_HELP)
    turn_order: TurnOrder = Field("any", description=TURN_ORDER_HELP)
    system: Text | None = Field(None, description="System message for examples without one; null: none.")
    chat_template: Text | None = Field(None, description="File with a Jinja chat template; null: the tokenizer's own.")
    stream_rows: Count | None = Field(None, description="Examples to tokenize at a time; null: all before training.")
    workers: Count | None = Field(None, description="Number of tokenizing processes; null: one per CPU core.")
    cache: Text | None = Field(None, description="Token cache folder; null: $FINETUNE_CACHE or ~/.cache/finetune.")
    image: ImageConfig = Field(ImageConfig(), description="Images of examples.")
    video: VideoConfig = Field(VideoConfig(), description="Videos of examples.")
    audio: AudioConfig = Field(AudioConfig(), description="Audio of examples.")
    allow_urls: bool = Field(False, description="Download images, audio and videos that examples name by URL.")
    media_cache: bool = Field(True, description="Cache the outputs of frozen towers: each file is computed once.")


class TrainConfig(Section):
    """Optimizer, length of training, checkpoints."""

    max_steps: Count | None = Field(None, description="Number of optimizer steps; null: train.epochs decides.")
    epochs: Positive | None = Field(None, description="Passes over the data; null: max_steps decides, else 1.")
    learning_rate: Annotated[Positive, Field(le=1)] = Field(2e-4, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = Field(
        "cosine", description="Learning rate after the warm-up; wsd: constant, then a fall over train.decay_ratio."
    )
    min_lr_ratio: Share = Field(0.0, description="Share of the peak that cosine, linear and wsd fall to.")
    decay_ratio: Fraction = Field(0.1, description="Share of the steps in which wsd falls.")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "lion_8bit"] = Field(
        "adamw",
        description="AdamW or Lion; 8bit: moments in 8 bits; paged: moments move to main memory if the GPU is full.",
    )
    lora_plus_ratio: Annotated[Number, Field(ge=1)] | None = Field(
        None, description="Learning rate of LoRA's B matrices over that of A (LoRA+); null: the same."
    )
    warmup_ratio: Share = Field(0.03, description="Share of the steps in which the learning rate rises to its peak.")
    warmup_steps: Count | None = Field(None, description="Steps in which it rises; null: train.warmup_ratio decides.")
    batch_size: Count = Field(16, description="Sequences per optimizer step, over all processes.")
    micro_batch_size: Count | None = Field(None, description="Sequences per forward pass of a process; null: auto.")
    max_grad_norm: NotNegative = Field(1.0, description="Norm above which gradients are clipped; 0: no clipping.")
    weight_decay: Share = Field(0.0, description="Weight decay of AdamW.")
    beta1: Share = Field(0.9, description="Decay rate of AdamW's first moment.")
    beta2: Share = Field(0.999, description="Decay rate of AdamW's second moment.")
    eps: Positive = Field(1e-8, description="Epsilon of AdamW.")
    neftune_alpha: NotNegative = Field(0.0, description="Strength of NEFTune noise on the embeddings; 0: no noise.")
    gradient_checkpointing: Literal["auto", "none", "all", "offload"] | Count = Field(
        "auto",
        description="Layers to recompute in the backward pass: auto (as memory needs), none, all, offload (all, with "
        "inputs in main memory), or a number.",
    )
    kernels: Literal["fused", "peft"] = Field(
        "fused", description="fused: this package's kernels; peft: those of PEFT."
    )
    share_prefixes: bool = Field(True, description="Skip unneeded tokens, compute shared prefixes once; fused only.")
    compile: bool | None = Field(None, description="Compile elementwise kernels; null: if the run is long enough.")
    deterministic: bool = Field(
        False, description="Same bits in every run on a GPU, for memory and time; runs on a CPU have them without."
    )
    eval_every: Count | None = Field(None, description="Steps between evaluations; null: evaluate only at the end.")
    save_every: Count | None = Field(None, description="Steps between checkpoints; null: save only at the end.")
    keep_checkpoints: Count = Field(2, description="Newest checkpoints to keep; the best one is always kept.")
    early_stopping: Count | None = Field(None, description="Evaluations without improvement before a stop; null: off.")
    pause_at: Count | None = Field(None, description="Step to save and stop at; train.resume=auto continues later.")
    resume: Text = Field("never", description="never, auto (the newest valid checkpoint), or a checkpoint folder.")
    seed: Seed = Field(0, description="Seed of all random numbers.")
    world_size: Count | None = Field(None, description="Required number of processes; null: any number.")


class ParallelConfig(Section):
    """How the ranks of a run share the memory of the frozen base."""

    shard: Literal["auto", "none", "full", "hybrid"] = Field(
        "auto",
        description="Split the frozen base over the ranks: none (a whole copy each), full (over all ranks), hybrid "
        "(over the ranks of each machine); auto: full where a whole copy does not fit.",
    )
    offload: bool = Field(False, description="Keep each rank's part of a sharded base in main memory.")


class TeacherConfig(Section):
    """The teacher model and where it runs."""

    name: Text | None = Field(None, description="Hub id or local folder of the teacher; null: the student's base.")
    revision: Text | None = Field(None, description="Branch, tag or commit of a hub teacher; null: the main branch.")
    dtype: Dtype = Field("bfloat16", description="Data type of the teacher, whose weights are not quantized.")
    lora: Text | None = Field(None, description="Folder or hub id of an adapter for the teacher; null: none.")
    placement: Literal["resident", "streamed", "cached", "server"] = Field(
        "resident",
        description="In memory, read layer by layer, only as the files in distill.cache, or at distill.teacher.url.",
    )
    steps_ahead: Count = Field(1, description="Steps that a streamed teacher computes per pass over its layers.")
    url: Text | None = Field(None, description="OpenAI-compatible endpoint, as http://host:8000/v1 (server only).")
    served_as: Text | None = Field(None, description="Model name at the server; null: the teacher's, or the only one.")
    requests: Count = Field(8, description="Number of parallel requests to a server.")


class DistillConfig(Section):
    """Knowledge distillation."""

    objective: Literal["none", "recover", "sft+anchor", "distill"] = Field(
        "none",
        description="recover: repair the quantization loss; sft+anchor: learn the data and stay close to the 16-bit "
        "base; distill: learn from data and teacher.",
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl"] = Field(
        "forward_kl", description="Divergence between the probabilities of teacher and student."
    )
    beta: Annotated[Positive, Field(lt=1)] = Field(0.5, description="Share of the teacher in the mixture of jsd.")
    alpha: Annotated[Positive, Field(lt=1)] = Field(0.1, description="Share of the teacher in the mixture of skew_kl.")
    temperature: Positive = Field(1.0, description="Divisor of both models' logits in the divergence.")
    weight: NotNegative | None = Field(
        None, description="Weight of the divergence beside cross-entropy; null: 0.2 for sft+anchor, 1 for distill."
    )
    hidden_weight: NotNegative = Field(0.0, description="Weight of the MSE of the final hidden states; 0: off.")
    on_policy: Annotated[Number, Field(ge=0, le=1)] = Field(0.0, description="Share of student-generated answers.")
    on_policy_tokens: Count = Field(128, description="Longest generated answer in tokens.")
    on_policy_temperature: Positive = Field(1.0, description="Sampling temperature of generated answers.")
    cache: Text | None = Field(None, description="Folder of teacher outputs, written by `finetune cache`; null: none.")
    cache_kind: Literal["sampled", "hidden"] = Field(
        "sampled",
        description="What a cache holds: sampled probabilities (178 bytes per trained token) or exact hidden states.",
    )
    top_k: Annotated[int, Field(ge=1, le=256)] = Field(32, description="Most probable tokens stored per trained token.")
    num_samples: Annotated[int, Field(ge=1, le=256)] = Field(16, description="Samples from the other tokens, unbiased.")
    seed: Seed = Field(0, description="Seed of the samples in a cache.")
    spot_check: Index = Field(2, description="Cached documents to compare with the teacher at the start, if present.")
    teacher: TeacherConfig = Field(TeacherConfig(), description="The teacher model and where it runs.")


class PreferenceConfig(Section):
    """Learning from preferences: which of two answers is better, or whether an answer is good."""

    objective: Literal["none", "dpo", "ipo", "orpo", "simpo", "kto"] = Field(
        "none", description="Loss on pairs of a chosen and a rejected answer; kto: also on answers with a verdict."
    )
    beta: Positive | None = Field(
        None, description="Strength of the preference, see docs/preference.md; null: 0.1, for simpo 2."
    )
    gamma: NotNegative = Field(1.0, description="Margin between the rewards of both answers (simpo only).")
    label_smoothing: Annotated[Number, Field(ge=0, lt=0.5)] = Field(
        0.0, description="Expected share of pairs whose sides are exchanged (dpo and simpo)."
    )
    desirable_weight: Positive = Field(1.0, description="Weight of desirable answers (kto only).")
    undesirable_weight: Positive = Field(1.0, description="Weight of undesirable answers (kto only).")
    sft_weight: NotNegative | None = Field(
        None, description="Weight of the cross-entropy of chosen answers, per token; null: 1 for orpo, otherwise 0."
    )
    reference: Literal["auto", "base", "init_adapter", "cached"] = Field(
        "auto",
        description="The policy that training stays close to (dpo, ipo, kto); auto: lora.init_adapter if it is set, "
        "otherwise the base; cached: the log-probabilities in preference.cache.",
    )
    cache: Text | None = Field(
        None, description="Folder of the reference's log-probabilities, written by `finetune cache`; null: none."
    )


class RewardConfig(Section):
    """Reinforcement learning: the model writes a group of answers to each prompt, and rewards judge them (GRPO)."""

    loss: Literal["none", "grpo", "dr_grpo", "dapo"] = Field(
        "none", description="What the loss of a step is divided by: each answer's tokens, the longest answer, or all."
    )
    functions: dict[RewardName, Number] = Field({}, description="Rewards of an answer with their weights.")
    group_size: Annotated[int, Field(ge=2)] = Field(8, description="Answers to each prompt; they are compared.")
    max_new_tokens: Count = Field(128, description="Longest answer in tokens; data.max_length includes it.")
    temperature: Positive = Field(1.0, description="Sampling temperature of the answers.")
    updates: Count = Field(1, description="Optimizer steps on the same answers.")
    clip_low: Annotated[Positive, Field(lt=1)] = Field(
        0.2, description="How far below 1 the ratio of new to old probability may push an answer down."
    )
    clip_high: Positive | None = Field(None, description="The same above 1, pushing up; null: as reward.clip_low.")
    beta: NotNegative = Field(0.0, description="Weight of the divergence from the reference, per token; 0: none.")
    reference: Literal["auto", "base", "init_adapter"] = Field(
        "auto",
        description="The policy of reward.beta; auto: lora.init_adapter if it is set, otherwise the base.",
    )
    skip_unfinished: bool = Field(
        False, description="Do not train on answers that reached reward.max_new_tokens; they are still compared."
    )
    pattern: Text | None = Field(
        None, description="Regular expression of the reward `regex`: its group 1 (or match) must equal the row's."
    )
    format: Text | None = Field(
        None,
        description="Regular expression that the whole answer must match, of the reward `format`; null: "
        "reasoning in <think> tags, then text.",
    )
    json_schema: Text | None = Field(None, description="File with the JSON schema of the reward `json_schema`.")
    length: Count | None = Field(
        None, description="Tokens from which the reward `length` falls, from 0 to -1 at reward.max_new_tokens."
    )
    engine: Literal["process", "server"] = Field(
        "process", description="Where answers are sampled: in this process, or at a vLLM server."
    )
    url: Text | None = Field(None, description="The vLLM server, as http://host:8000 (engine=server only).")


class GuardConfig(Section):
    """Limit on the divergence between the model and its teacher; the default teacher is the 16-bit base."""

    metric: Literal["teacher_kl"] = Field("teacher_kl", description="Mean KL(teacher || model) over the held-out sets.")
    max: Positive | None = Field(None, description="Limit in nats per trained token; null: no guard.")
    action: Literal["warn", "recover", "stop"] = Field(
        "warn",
        description="Above the limit: warn; recover (train on the divergence for guard.steps); or save and stop.",
    )
    steps: Count = Field(20, description="Number of recovery steps, on the data of the latest steps.")


class GenerationConfig(Section):
    """Generated answers to held-out examples before, during and after training."""

    num_examples: Index = Field(0, description="Held-out examples to answer before and after training; 0: none.")
    max_new_tokens: Count = Field(128, description="Longest answer in tokens.")
    batch_size: Count = Field(32, description="Answers to generate at a time.")
    samples: Index = Field(2, description="Answers to show before and after training.")
    every: Count | None = Field(None, description="Steps between sample answers during training; null: never.")
    metrics: list[Literal["exact_match", "contains", "number", "token_f1", "rouge_l", "json_valid"]] = Field(
        [], description="Scores of the answers to generation.num_examples examples, at each evaluation."
    )


class TrackConfig(Section):
    """Experiment trackers; metrics.jsonl is always written."""

    wandb: bool = Field(False, description="Log to Weights & Biases (offline without an API key).")
    tensorboard: bool = Field(False, description="Write TensorBoard event files.")
    mlflow: bool = Field(False, description="Log to MLflow: MLFLOW_TRACKING_URI, else mlflow.db in the run's folder.")
    trackio: bool = Field(False, description="Log to trackio (a local folder without TRACKIO_SPACE_ID).")
    project: Text = Field("finetune", description="Name of the project, or of MLflow's experiment.")
    run_name: Text | None = Field(None, description="Name of the run in the trackers; null: the name of the config.")
