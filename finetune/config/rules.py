"""What two settings may not say together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from finetune.config.problems import Problem
from finetune.config.sections import (
    DataConfig,
    DistillConfig,
    GenerationConfig,
    GuardConfig,
    LoraConfig,
    ModelConfig,
    QuantConfig,
    SourceConfig,
    TrainConfig,
)

Problems = Iterator[Problem]

_GLOB = re.compile(r"[\w.*?!\[\]-]+")
_BARE_NAMES = re.compile(r"\s*\w+\s*(,\s*\w+\s*)*")
_FILE = re.compile(r"\.(jsonl?|csv|parquet|arrow)(\.\w+)?$")
# Settings of `distill` that mean something where a teacher only measures.
_OF_THE_TEACHER = ("cache", "cache_kind", "top_k", "num_samples", "seed", "spot_check", "teacher")
_NO_HELD_OUT = "there are no held-out rows; set data.held_out=0.05 or data.eval=[{path: rows.jsonl}]"


def contradictions(sections: Mapping[str, Any]) -> list[Problem]:
    """Every rule that these sections break; a rule about a section that is not given is left out."""
    return [
        problem
        for names, rule in RULES
        if all(name in sections for name in names)
        for problem in rule(*(sections[name] for name in names))
    ]


def _attention(model: ModelConfig) -> Problems:
    if model.attention == "flash_attention_2" and model.dtype == "float32":
        yield Problem("model.attention", "flash_attention_2 has no float32 kernel; set model.dtype=bfloat16")


def _named_modules(quant: QuantConfig) -> Problems:
    for key, patterns in (("quant.skip_modules", quant.skip_modules), ("quant.int8", quant.int8)):
        yield from _twice(key, patterns)
        for index, pattern in enumerate(patterns):
            if not _GLOB.fullmatch(pattern):
                yield from _bad_regex(f"{key}.{index}", pattern)
    for pattern in sorted(set(quant.skip_modules) & set(quant.int8)):
        yield Problem("quant.int8", f"{pattern} is in quant.skip_modules too; it can be in one of them")
    if quant.int8 and quant.type != "nf4":
        yield Problem("quant.int8", f"names layers beside 4-bit ones; drop it, or set quant.type=nf4, not {quant.type}")


def _resident(quant: QuantConfig) -> Problems:
    if quant.keep_dequantized and quant.type != "nf4":
        yield Problem(
            "quant.keep_dequantized",
            f"is the 16-bit copy of 4-bit weights; drop it, or set quant.type=nf4, not {quant.type}",
        )


def _targets(lora: LoraConfig) -> Problems:
    key, targets = "lora.target_modules", lora.target_modules
    if targets == "all-linear":
        return
    if isinstance(targets, list):
        yield from _twice(key, targets)
        if not targets:
            yield Problem(key, "names no module; write [q_proj, v_proj] or all-linear")
        return
    if _BARE_NAMES.fullmatch(targets):
        names = re.sub(r"\s*,\s*", ", ", targets.strip())
        yield Problem(key, f"a text is a regex that must match a whole module name; for these names write [{names}]")
    yield from _bad_regex(key, targets)
    if lora.layers_to_transform is not None:
        yield Problem("lora.layers_to_transform", f"PEFT takes it with a list of names only; put the layers into {key}")


def _layers(lora: LoraConfig) -> Problems:
    layers = lora.layers_to_transform
    if layers is not None:
        yield from _twice("lora.layers_to_transform", layers)
        if not layers:
            yield Problem("lora.layers_to_transform", "names no layer; null is all layers")


def _saved_modules(lora: LoraConfig) -> Problems:
    yield from _twice("lora.modules_to_save", lora.modules_to_save)
    targets = lora.target_modules if isinstance(lora.target_modules, list) else []
    for name in sorted(set(targets) & set(lora.modules_to_save)):
        yield Problem("lora.modules_to_save", f"{name} is in lora.target_modules too; it can be in one of them")


def _patterns(lora: LoraConfig) -> Problems:
    for key, pattern in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for name in pattern:
            yield from _bad_regex(f"lora.{key}.{name}", name)


def _tokens(lora: LoraConfig) -> Problems:
    yield from _twice("lora.new_tokens", lora.new_tokens)
    for token in lora.new_tokens:
        if not token.strip():
            yield Problem("lora.new_tokens", "a token of white space only")
    if lora.new_tokens and "embed_tokens" in lora.modules_to_save:
        yield Problem("lora.new_tokens", "embed_tokens is in lora.modules_to_save, which trains their rows already")


def _adapter_start(quant: QuantConfig, lora: LoraConfig) -> Problems:
    if lora.init.startswith(("pissa", "olora")) and quant.type != "none":
        yield Problem("lora.init", f"{lora.init} takes apart 16-bit weights; set quant.type=none, not {quant.type}")
    if lora.init == "loftq" and quant.type != "nf4":
        yield Problem("lora.init", f"loftq makes up for what 4 bits lost; set quant.type=nf4, not {quant.type}")
    if lora.init == "orthogonal":
        for key, rank in {
            "rank": lora.rank,
            **{f"rank_pattern.{name}": r for name, r in lora.rank_pattern.items()},
        }.items():
            if rank % 2:
                yield Problem(f"lora.{key}", f"lora.init=orthogonal needs an even rank, found {rank}")
    if lora.init_adapter is not None and lora.init != "default":
        yield Problem("lora.init", f"{lora.init} starts a new adapter, but lora.init_adapter names an old one")


def _sources(data: DataConfig) -> Problems:
    for section, sources in (("train", data.train), ("eval", data.eval)):
        for index, source in enumerate(sources):
            yield from _source(f"data.{section}.{index}", source)


def _source(key: str, source: SourceConfig) -> Problems:
    if _FILE.search(source.path):
        for name, owner in (("split", "folder or hub id"), ("subset", "hub data set"), ("revision", "hub data set")):
            if getattr(source, name) is not None:
                yield Problem(f"{key}.{name}", f"is part of a {owner}, and {source.path} is a file; set it to null")
    for name, ours in _given_twice(source.columns.items()):
        yield Problem(f"{key}.columns", f"column {name} cannot be {' and '.join(ours)} at once")
    roles = [(role, name) for role, names in source.roles.items() for name in _listed(names)]
    for name, ours in _given_twice(roles):
        yield Problem(f"{key}.roles", f"role {name} cannot be {' and '.join(ours)} at once")
    if source.roles and source.format in ("alpaca", "text", "tokens"):
        yield Problem(f"{key}.roles", f"{source.format} rows name no roles")


def _given_twice(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Their names that stand beside more than one of ours, with ours."""
    ours: dict[str, list[str]] = {}
    for our_name, their_name in pairs:
        ours.setdefault(their_name, []).append(our_name)
    return ((name, names) for name, names in ours.items() if len(names) > 1)


def _listed(value: list[str] | str) -> list[str]:
    return [value] if isinstance(value, str) else value


def _evaluation_sets(data: DataConfig) -> Problems:
    names = [source.name or source.split or PurePath(source.path).name.split(".")[0] for source in data.eval]
    for name in _repeated(names):
        yield Problem("data.eval", f"two sets are called {name}; give each item its own name")
    if data.held_out and "held_out" in names:
        yield Problem("data.eval", "a set is called held_out, as the rows that data.held_out keeps are; rename it")
    for index, source in enumerate(data.eval):
        if source.weight != 1:
            yield Problem(f"data.eval.{index}.weight", "held-out rows are read once; weight is for data.train")


def _length(train: TrainConfig) -> Problems:
    if train.max_steps is not None and train.epochs is not None:
        yield Problem("train.epochs", "train.max_steps is given too; set one of them to null")
    if train.max_steps is not None and (train.warmup_steps or 0) >= train.max_steps:
        yield Problem(
            "train.warmup_steps", f"{train.warmup_steps} steps leave none of train.max_steps={train.max_steps}"
        )


def _batch(train: TrainConfig) -> Problems:
    if train.micro_batch_size is not None and train.micro_batch_size > train.batch_size:
        yield Problem("train.micro_batch_size", f"is larger than train.batch_size={train.batch_size}")
    if train.world_size is not None and train.world_size > train.batch_size:
        yield Problem("train.world_size", f"so many ranks cannot share train.batch_size={train.batch_size} sequences")


def _stopping(train: TrainConfig) -> Problems:
    if train.early_stopping is not None and train.eval_every is None:
        yield Problem("train.early_stopping", "counts evaluations; set train.eval_every as well")


def _stream(data: DataConfig, train: TrainConfig) -> Problems:
    if data.stream_rows is None:
        return
    if train.max_steps is None:
        yield Problem("data.stream_rows", "a stream is not counted before it is read; set train.max_steps")
    if data.held_out:
        yield Problem("data.held_out", "rows of a stream cannot be held out; name others in data.eval")


def _held_out(data: DataConfig, train: TrainConfig) -> Problems:
    if data.eval or data.held_out:
        return
    for name in ("eval_every", "early_stopping"):
        if getattr(train, name) is not None:
            yield Problem(f"train.{name}", _NO_HELD_OUT)


def _distillation(distill: DistillConfig, guard: GuardConfig) -> Problems:
    teacher = distill.teacher
    other = teacher.name is not None or teacher.lora is not None
    changed = _changed(distill)
    if distill.objective == "none":
        idle = [key for key in changed if guard.max is None or key not in _OF_THE_TEACHER]
        if idle:
            yield Problem("distill.objective", f"is none, so distill.{idle[0]} does nothing; set recover or distill")
        return
    if distill.objective == "recover":
        if other:
            key = "name" if teacher.name is not None else "lora"
            yield Problem(f"distill.teacher.{key}", "recover learns from the student's own base; set objective=distill")
        if distill.weight is not None:
            yield Problem("distill.weight", "recover minimizes the divergence alone; set it to null")
    if distill.objective == "distill" and not other and teacher.placement != "server":
        yield Problem(
            "distill.teacher.name",
            "is missing: the student's own base can teach it nothing new; name a teacher (or distill.teacher.lora), "
            "or set distill.objective=recover or sft+anchor",
        )
    for name, owner in (("beta", "jsd"), ("alpha", "skew_kl")):
        if name in changed and distill.divergence != owner:
            yield Problem(f"distill.{name}", f"belongs to distill.divergence={owner}, not {distill.divergence}")


def _guard(data: DataConfig, train: TrainConfig, guard: GuardConfig) -> Problems:
    if guard.max is None:
        if changed := _changed(guard):
            yield Problem("guard.max", f"is null, so guard.{changed[0]} does nothing; name a limit, as guard.max=0.1")
        return
    if not data.eval and not data.held_out:
        yield Problem("guard.max", _NO_HELD_OUT)
    if train.eval_every is None:
        yield Problem("guard.max", "is looked at when held-out rows are; set train.eval_every as well")
    if guard.action == "recover" and data.stream_rows is not None:
        yield Problem("guard.action", "recover goes back to rows of earlier steps, which a stream has left behind")
    if guard.action != "recover" and guard.steps != type(guard).model_fields["steps"].default:
        yield Problem("guard.steps", f"belongs to guard.action=recover, not {guard.action}")


def _changed(section: DistillConfig | GuardConfig) -> list[str]:
    """Keys that are not at their default."""
    return [key for key, field in type(section).model_fields.items() if getattr(section, key) != field.get_default()]


def _placement(distill: DistillConfig, guard: GuardConfig) -> Problems:
    placement = distill.teacher.placement
    if distill.objective == "none" and guard.max is None:
        return
    if placement in ("cached", "server") and distill.cache is None:
        yield Problem("distill.cache", f"placement={placement} keeps the teacher's signal in a folder; name it")
    if placement == "server" and distill.teacher.url is None:
        yield Problem("distill.teacher.url", "is missing: where is the server? as http://host:8000/v1")
    for key in ("url", "served_as"):
        if placement != "server" and getattr(distill.teacher, key) is not None:
            yield Problem(f"distill.teacher.{key}", f"is for placement=server, not {placement}")
    if placement != "streamed" and distill.teacher.steps_ahead != 1:
        yield Problem("distill.teacher.steps_ahead", f"is for placement=streamed, not {placement}")
    if placement == "server" or (placement == "cached" and distill.cache_kind == "sampled"):
        yield from _exactness(distill, "a server's" if placement == "server" else "a sampled cache's")
    if distill.on_policy and placement in ("cached", "server"):
        yield Problem("distill.on_policy", f"asks the teacher about new answers, which placement={placement} cannot")
    if distill.on_policy and distill.teacher.steps_ahead != 1:
        yield Problem("distill.teacher.steps_ahead", "what the student will write later is not known; set it to 1")


def _exactness(distill: DistillConfig, whose: str) -> Problems:
    """What part of the probabilities gives without bias: expectations that are linear in them."""
    exact = "set cache_kind=hidden, or placement=resident or streamed"
    if distill.divergence != "forward_kl":
        yield Problem("distill.divergence", f"{whose} signal gives forward_kl only, not {distill.divergence}; {exact}")
    if distill.temperature != 1:
        yield Problem("distill.temperature", f"{whose} signal is of temperature 1; {exact}")
    if distill.hidden_weight:
        yield Problem("distill.hidden_weight", f"{whose} signal has no hidden states; {exact}")


def _cached_rows(data: DataConfig, distill: DistillConfig, guard: GuardConfig) -> Problems:
    if data.stream_rows is not None and (distill.objective != "none" or guard.max is not None):
        if distill.teacher.placement in ("cached", "server"):
            yield Problem("data.stream_rows", "rows of a stream are not known when the teacher's signal is cached")
        if distill.on_policy:
            yield Problem("data.stream_rows", "cannot be combined with distill.on_policy")


def _answers(data: DataConfig, generation: GenerationConfig) -> Problems:
    if not data.eval and not data.held_out:
        for name in ("num_examples", "every"):
            if getattr(generation, name):
                yield Problem(f"generation.{name}", _NO_HELD_OUT)
    if generation.every is not None and not generation.samples:
        yield Problem("generation.every", "generation.samples=0 shows no answer")


def _twice(key: str, values: Sequence[Any]) -> Problems:
    for value in _repeated(values):
        yield Problem(key, f"{value} stands in it twice")


def _repeated(values: Sequence[Any]) -> list[Any]:
    return sorted({value for value in values if values.count(value) > 1})


def _bad_regex(key: str, pattern: str) -> Problems:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        yield Problem(key, f"{pattern} is not a regular expression: {error}")


RULES: list[tuple[tuple[str, ...], Callable[..., Problems]]] = [
    (("model",), _attention),
    (("quant",), _named_modules),
    (("quant",), _resident),
    (("lora",), _targets),
    (("lora",), _layers),
    (("lora",), _saved_modules),
    (("lora",), _patterns),
    (("lora",), _tokens),
    (("quant", "lora"), _adapter_start),
    (("data",), _sources),
    (("data",), _evaluation_sets),
    (("train",), _length),
    (("train",), _batch),
    (("train",), _stopping),
    (("data", "train"), _stream),
    (("data", "train"), _held_out),
    (("distill", "guard"), _distillation),
    (("distill", "guard"), _placement),
    (("data", "distill", "guard"), _cached_rows),
    (("data", "train", "guard"), _guard),
    (("data", "generation"), _answers),
]
