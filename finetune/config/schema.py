"""RunConfig, the schema of a whole run, and the checks on combinations of its settings.

A rule yields problems. Its parameters name the sections that it needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from inspect import signature
from pathlib import PurePath
from typing import Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from finetune.config.frozen_a_rules import frozen_a
from finetune.config.media_rules import pixel_limits
from finetune.config.parallel_rules import shared_base
from finetune.config.preference_rules import (
    preference_alone,
    preference_policies,
    preference_rows,
    preference_settings,
)
from finetune.config.problems import Problem
from finetune.config.reward_rules import (
    reward_alone,
    reward_policies,
    reward_rows,
    reward_server,
    reward_settings,
    reward_steps,
)
from finetune.config.section import Dtype as Dtype
from finetune.config.section import Name, Section, Text
from finetune.config.sections import (
    DataConfig,
    DistillConfig,
    GenerationConfig,
    GuardConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    PreferenceConfig,
    QuantConfig,
    RewardConfig,
    SourceConfig,
    TrackConfig,
    TrainConfig,
)

Problems = Iterator[Problem]

_GLOB = re.compile(r"[\w.*?!\[\]-]+")
_BARE_NAMES = re.compile(r"\s*\w+\s*(,\s*\w+\s*)*")
_FILE = re.compile(r"\.(jsonl?|csv|parquet|arrow)(\.\w+)?$")
# Settings of `distill` that matter to a teacher that only measures.
_TEACHER_KEYS = ("cache", "cache_kind", "top_k", "num_samples", "seed", "spot_check", "teacher")
_NO_HELD_OUT = "needs held-out examples; set data.held_out=0.05 or data.eval=[{path: heldout.jsonl}]"


class RunConfig(Section):
    """One whole run."""

    name: Name = Field("", description="Name of the run; empty: the name of the config file without .yaml.")
    output_dir: Text = Field(
        default_factory=lambda fields: f"outputs/{fields.get('name') or 'run'}",
        description="Folder for the adapter, the checkpoints and the metrics; not given: outputs/NAME, then "
        "outputs/NAME-2 …, and outputs/NAME-latest links to the newest.",
    )
    model: ModelConfig = Field(description="The base model.")
    quant: QuantConfig = Field(QuantConfig(), description="Storage of the frozen base model.")
    lora: LoraConfig = Field(LoraConfig(), description="The adapter to train.")
    data: DataConfig = Field(description="Training and evaluation data.")
    train: TrainConfig = Field(TrainConfig(), description="Optimizer, length of training, checkpoints.")
    parallel: ParallelConfig = Field(ParallelConfig(), description="How ranks share the memory of the frozen base.")
    distill: DistillConfig = Field(DistillConfig(), description="Knowledge distillation.")
    preference: PreferenceConfig = Field(PreferenceConfig(), description="Learning from preferences.")
    reward: RewardConfig = Field(RewardConfig(), description="Reinforcement learning on rewarded answers.")
    guard: GuardConfig = Field(GuardConfig(), description="Limit on the divergence between the model and its teacher.")
    generation: GenerationConfig = Field(GenerationConfig(), description="Generated answers to held-out examples.")
    track: TrackConfig = Field(TrackConfig(), description="Experiment trackers; metrics.jsonl is always written.")

    @property
    def has_teacher(self) -> bool:
        """Return whether the run learns from a teacher or is measured against one."""
        return self.distill.objective != "none" or self.guard.max is not None

    @property
    def row_objective(self) -> str:
        """Return what the run learns from its rows: none (their answers), reward, or `preference.objective`."""
        return "reward" if self.reward.loss != "none" else self.preference.objective

    @property
    def scored_rows(self) -> str:
        """Return how rows are read to score a model on answers: as `row_objective`, but of a pair its chosen answer."""
        return "answers" if self.preference.objective != "none" else self.row_objective

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if problems := contradictions(dict(self)):
            text = "; ".join(f"{problem.key}: {problem.text}" for problem in problems)
            raise PydanticCustomError("contradiction", "{text}", {"text": text, "problems": problems})
        return self


def contradictions(sections: Mapping[str, Any]) -> list[Problem]:
    """Return a problem for every rule that these sections break; skip rules about sections that are not given."""
    return [
        problem
        for rule in RULES
        if signature(rule).parameters.keys() <= sections.keys()
        for problem in rule(*(sections[name] for name in signature(rule).parameters))
    ]


def _model(model: ModelConfig) -> Problems:
    if model.attention == "flash_attention_2" and model.dtype == "float32":
        yield Problem("model.attention", "flash_attention_2 has no float32 kernel; set model.dtype=bfloat16")


def _embedding(model: ModelConfig, lora: LoraConfig) -> Problems:
    if model.embedding == "host" and (lora.new_tokens or any("embed" in name for name in lora.modules_to_save)):
        key = "new_tokens" if lora.new_tokens else "modules_to_save"
        yield Problem("model.embedding", f"host: lora.{key} trains the embedding; set model.embedding=auto")


def _quant(quant: QuantConfig) -> Problems:
    for key, patterns in (("quant.skip_modules", quant.skip_modules), ("quant.int8", quant.int8)):
        yield from _twice(key, patterns)
        for index, pattern in enumerate(patterns):
            if not _GLOB.fullmatch(pattern):
                yield from _bad_regex(f"{key}.{index}", pattern)
    for pattern in sorted(set(quant.skip_modules) & set(quant.int8)):
        yield Problem("quant.int8", f"{pattern} is also in quant.skip_modules; name it in one of them")
    for name in ("int8", "keep_dequantized"):
        if getattr(quant, name) and quant.type != "nf4":
            yield Problem(f"quant.{name}", f"needs quant.type=nf4, found {quant.type}")


def _targets(lora: LoraConfig) -> Problems:
    key, targets = "lora.target_modules", lora.target_modules
    if targets == "all-linear":
        return
    if isinstance(targets, list):
        yield from _twice(key, targets)
        if not targets:
            yield Problem(key, "names no module, found []; set [q_proj, v_proj] or all-linear")
        return
    if _BARE_NAMES.fullmatch(targets):
        names = re.sub(r"\s*,\s*", ", ", targets.strip())
        yield Problem(key, f"text is a regex for whole module names; for names write [{names}]")
    yield from _bad_regex(key, targets)
    if lora.layers_to_transform is not None:
        yield Problem("lora.layers_to_transform", f"needs a list of names; put the layers into the regex of {key}")


def _lora(lora: LoraConfig) -> Problems:
    if lora.layers_to_transform is not None:
        yield from _twice("lora.layers_to_transform", lora.layers_to_transform)
        if not lora.layers_to_transform:
            yield Problem("lora.layers_to_transform", "names no layer, found []; null: all layers")
    yield from _twice("lora.modules_to_save", lora.modules_to_save)
    targets = lora.target_modules if isinstance(lora.target_modules, list) else []
    for name in sorted(set(targets) & set(lora.modules_to_save)):
        yield Problem("lora.modules_to_save", f"{name} is also in lora.target_modules; name it in one of them")
    for key, pattern in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for name in pattern:
            yield from _bad_regex(f"lora.{key}.{name}", name)
    yield from _twice("lora.new_tokens", lora.new_tokens)
    if any(not token.strip() for token in lora.new_tokens):
        yield Problem("lora.new_tokens", "a token is only white space")
    if lora.new_tokens and "embed_tokens" in lora.modules_to_save:
        yield Problem("lora.new_tokens", "lora.modules_to_save already trains embed_tokens; remove one of them")


def _start(quant: QuantConfig, lora: LoraConfig) -> Problems:
    if lora.init.startswith(("pissa", "olora")) and quant.type != "none":
        yield Problem("lora.init", f"{lora.init} needs quant.type=none, found {quant.type}")
    if lora.init == "loftq" and quant.type != "nf4":
        yield Problem("lora.init", f"loftq needs quant.type=nf4, found {quant.type}")
    if lora.init == "orthogonal":
        ranks = {"rank": lora.rank} | {f"rank_pattern.{name}": rank for name, rank in lora.rank_pattern.items()}
        for key, rank in ranks.items():
            if rank % 2:
                yield Problem(f"lora.{key}", f"lora.init=orthogonal needs an even rank, found {rank}")
    if lora.init_adapter is not None and lora.init != "default":
        yield Problem("lora.init", f"{lora.init} starts a new adapter; remove it or lora.init_adapter")


def _data(data: DataConfig) -> Problems:
    for section, sources in (("train", data.train), ("eval", data.eval)):
        for index, source in enumerate(sources):
            yield from _source(f"data.{section}.{index}", source)
    names = [source.name or source.split or PurePath(source.path).name.split(".")[0] for source in data.eval]
    yield from _twice("data.eval", names, "two sets have the name {}; set a name for each item")
    if data.held_out and "held_out" in names:
        yield Problem("data.eval", "held_out is the name of the set that data.held_out makes; rename this one")
    for index, source in enumerate(data.eval):
        if source.weight != 1:
            yield Problem(f"data.eval.{index}.weight", "only data.train has weights; remove it")


def _source(key: str, source: SourceConfig) -> Problems:
    if file := _FILE.search(source.path):
        for name, owner in (("split", "folder or hub dataset"), ("subset", "hub dataset"), ("revision", "hub dataset")):
            if getattr(source, name) is not None and (name, file[1]) != ("split", "json"):
                yield Problem(f"{key}.{name}", f"belongs to a {owner}, and {source.path} is a file; set it to null")
    for name, ours in _given_twice(source.columns.items()):
        yield Problem(f"{key}.columns", f"column {name} cannot be {' and '.join(ours)} at once")
    roles = [
        (role, name) for role, names in source.roles.items() for name in ([names] if isinstance(names, str) else names)
    ]
    for name, ours in _given_twice(roles):
        yield Problem(f"{key}.roles", f"role {name} cannot be {' and '.join(ours)} at once")
    if source.roles and source.format in ("alpaca", "text", "tokens"):
        yield Problem(f"{key}.roles", f"{source.format} examples have no roles")


def _given_twice(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Yield each name in the file that has more than one of our names, with those names."""
    ours: dict[str, list[str]] = {}
    for our_name, their_name in pairs:
        ours.setdefault(their_name, []).append(our_name)
    return ((name, names) for name, names in ours.items() if len(names) > 1)


def _train(train: TrainConfig) -> Problems:
    if train.max_steps is not None and train.epochs is not None:
        yield Problem("train.epochs", "train.max_steps is also set; set one of them to null")
    if train.max_steps is not None and (train.warmup_steps or 0) >= train.max_steps:
        yield Problem("train.warmup_steps", f"must be < train.max_steps={train.max_steps}, found {train.warmup_steps}")
    for name in ("micro_batch_size", "world_size"):
        if (value := getattr(train, name)) is not None and value > train.batch_size:
            yield Problem(f"train.{name}", f"must be at most train.batch_size={train.batch_size}, found {value}")
    if train.min_lr_ratio and train.schedule not in ("cosine", "linear", "wsd"):
        yield Problem("train.min_lr_ratio", f"needs train.schedule=cosine, linear or wsd, found {train.schedule}")
    if train.decay_ratio != type(train).model_fields["decay_ratio"].default and train.schedule != "wsd":
        yield Problem("train.decay_ratio", f"needs train.schedule=wsd, found {train.schedule}")
    if train.early_stopping is not None and train.eval_every is None:
        yield Problem("train.early_stopping", "needs evaluations; set train.eval_every")


def _order(model: ModelConfig, train: TrainConfig) -> Problems:
    if train.deterministic and model.attention in ("sdpa", "flash_attention_2"):
        text = f"model.attention={model.attention} adds in no fixed order on a GPU; set model.attention=auto"
        yield Problem("train.deterministic", text)


def _rows(data: DataConfig, train: TrainConfig) -> Problems:
    if data.stream_rows is not None and train.max_steps is None:
        yield Problem("data.stream_rows", "the length of a stream is unknown; set train.max_steps")
    if data.stream_rows is not None and data.held_out:
        yield Problem("data.held_out", "a stream (data.stream_rows) cannot hold out examples; set data.eval")
    for name in ("eval_every", "early_stopping"):
        if getattr(train, name) is not None and not data.eval and not data.held_out:
            yield Problem(f"train.{name}", _NO_HELD_OUT)


def _objective(distill: DistillConfig, guard: GuardConfig) -> Problems:
    teacher = distill.teacher
    other = teacher.name is not None or teacher.lora is not None
    changed = _changed(distill)
    if distill.objective == "none":
        idle = [key for key in changed if guard.max is None or key not in _TEACHER_KEYS]
        if idle:
            yield Problem("distill.objective", f"distill.{idle[0]} needs recover, sft+anchor or distill, found none")
        return
    if distill.objective == "recover":
        if other:
            key = "name" if teacher.name is not None else "lora"
            yield Problem(f"distill.teacher.{key}", "needs distill.objective=distill, found recover")
        if distill.weight is not None:
            yield Problem("distill.weight", "recover minimizes only the divergence; set it to null")
    if distill.objective == "distill" and not other and teacher.placement != "server":
        advice = "name a teacher (or distill.teacher.lora), or set distill.objective=recover or sft+anchor"
        yield Problem("distill.teacher.name", f"is missing; {advice}")
    for name, owner in (("beta", "jsd"), ("alpha", "skew_kl")):
        if name in changed and distill.divergence != owner:
            yield Problem(f"distill.{name}", f"needs distill.divergence={owner}, found {distill.divergence}")


def _guard(data: DataConfig, train: TrainConfig, guard: GuardConfig) -> Problems:
    if guard.max is None:
        if changed := _changed(guard):
            yield Problem("guard.max", f"guard.{changed[0]} needs a limit, found null; set for example guard.max=0.1")
        return
    if not data.eval and not data.held_out:
        yield Problem("guard.max", _NO_HELD_OUT)
    if train.eval_every is None:
        yield Problem("guard.max", "needs evaluations; set train.eval_every")
    if guard.action == "recover" and data.stream_rows is not None:
        yield Problem("guard.action", "recover repeats examples, and data.stream_rows keeps none; set warn or stop")
    if guard.action != "recover" and guard.steps != type(guard).model_fields["steps"].default:
        yield Problem("guard.steps", f"needs guard.action=recover, found {guard.action}")


def _changed(section: DistillConfig | GuardConfig) -> list[str]:
    """Return the keys that differ from their default."""
    return [key for key, field in type(section).model_fields.items() if getattr(section, key) != field.get_default()]


def _placement(distill: DistillConfig, guard: GuardConfig) -> Problems:
    placement = distill.teacher.placement
    if distill.objective == "none" and guard.max is None:
        return
    if placement in ("cached", "server") and distill.cache is None:
        yield Problem("distill.cache", f"is missing; placement={placement} needs a folder of teacher outputs")
    if placement == "server" and distill.teacher.url is None:
        yield Problem("distill.teacher.url", "is missing; set for example http://host:8000/v1")
    for key in ("url", "served_as"):
        if placement != "server" and getattr(distill.teacher, key) is not None:
            yield Problem(f"distill.teacher.{key}", f"needs placement=server, found {placement}")
    if placement != "streamed" and distill.teacher.steps_ahead != 1:
        yield Problem("distill.teacher.steps_ahead", f"needs placement=streamed, found {placement}")
    if placement == "server" or (placement == "cached" and distill.cache_kind == "sampled"):
        yield from _exactness(distill, "a server" if placement == "server" else "a sampled cache")
    if distill.on_policy and placement in ("cached", "server"):
        yield Problem("distill.on_policy", f"needs placement=resident or streamed, found placement={placement}")
    if distill.on_policy and distill.teacher.steps_ahead != 1:
        yield Problem("distill.teacher.steps_ahead", "must be 1 with distill.on_policy: later answers do not exist yet")


def _exactness(distill: DistillConfig, source: str) -> Problems:
    """Sampled probabilities give unbiased results only for expectations that are linear in them."""
    exact = "set cache_kind=hidden, or placement=resident or streamed"
    if distill.divergence != "forward_kl":
        yield Problem("distill.divergence", f"{source} gives only forward_kl, found {distill.divergence}; {exact}")
    if distill.temperature != 1:
        yield Problem("distill.temperature", f"{source} has temperature 1, found {distill.temperature:g}; {exact}")
    if distill.hidden_weight:
        yield Problem("distill.hidden_weight", f"{source} has no hidden states; {exact}")


def _streamed(data: DataConfig, distill: DistillConfig, guard: GuardConfig) -> Problems:
    if data.stream_rows is not None and (distill.objective != "none" or guard.max is not None):
        if distill.teacher.placement in ("cached", "server"):
            yield Problem("data.stream_rows", f"a stream cannot be cached, found placement={distill.teacher.placement}")
        if distill.on_policy:
            yield Problem("data.stream_rows", "does not work with distill.on_policy; set one of them to its default")


def _answers(data: DataConfig, generation: GenerationConfig) -> Problems:
    if not data.eval and not data.held_out:
        for name in ("num_examples", "every", "metrics"):
            if getattr(generation, name):
                yield Problem(f"generation.{name}", _NO_HELD_OUT)
    if generation.every is not None and not generation.samples:
        yield Problem("generation.every", "needs generation.samples of at least 1, found 0")
    if generation.metrics and not generation.num_examples:
        yield Problem("generation.metrics", "needs answers, found generation.num_examples=0; set it to 100")
    yield from _twice("generation.metrics", generation.metrics)


def _twice(key: str, values: Sequence[Any], text: str = "{} occurs twice") -> Problems:
    for value in sorted({value for value in values if values.count(value) > 1}):
        yield Problem(key, text.format(value))


def _bad_regex(key: str, pattern: str) -> Problems:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        yield Problem(key, f"{pattern} is not a valid regular expression: {error}")


RULES: tuple[Callable[..., Problems], ...] = (
    _model,
    _embedding,
    _quant,
    _targets,
    _lora,
    _start,
    frozen_a,
    _data,
    pixel_limits,
    _train,
    _order,
    shared_base,
    _rows,
    _objective,
    _placement,
    _streamed,
    _guard,
    _answers,
    preference_settings,
    preference_policies,
    preference_rows,
    preference_alone,
    reward_settings,
    reward_policies,
    reward_server,
    reward_rows,
    reward_steps,
    reward_alone,
)
