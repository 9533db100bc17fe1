"""A run's folder: its description and results, and the checkpoint to continue from."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune.config.compose import to_yaml
from finetune.config.keys import schema_fields
from finetune.config.schema import RunConfig
from finetune.evaluation.generation import Answer, worst_answers
from finetune.evaluation.probe import FILE as PROBE
from finetune.models.digest import base_fingerprint
from finetune.objectives.user_rewards import OPTION, UserReward
from finetune.report.run import CONFIG, FACTS, METRICS, RESULT, REWARD_FUNCTIONS, REWARDED, SAMPLES, TEACHER, WORST
from finetune.system.atomic import write_text
from finetune.system.console import Log, log_once
from finetune.system.errors import ConfigError
from finetune.system.manifest import differences, record_files, sha256_of
from finetune.system.origin import command_line, git_commit, hardware
from finetune.training.checkpoint import newest_valid, read_state, verify_checkpoint
from finetune.training.output_folder import check_resume

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "safetensors")
# Files that a run writes until its end.
_FIGURES = (METRICS, RESULT, SAMPLES, REWARDED, WORST, TEACHER, PROBE)
_MOST_WORST = 10
_MOST_REWARDED = 4
# Settings that may change between a run and its continuation, because they do not decide its result.
_FREE = {
    "train": {
        "max_steps",
        "epochs",
        "micro_batch_size",
        "gradient_checkpointing",
        "kernels",
        "share_prefixes",
        "compile",
        "deterministic",
        "eval_every",
        "save_every",
        "keep_checkpoints",
        "early_stopping",
        "pause_at",
        "resume",
        "world_size",
    },
    "quant": {"cache", "keep_dequantized"},
    # The digest of the tokens is compared instead.
    "data": {"train", "eval", "workers", "cache", "on_bad_row", "max_bad_share"},
    "model": {"attention", "embedding"},
    "distill": {"cache", "spot_check"},
    "preference": {"cache"},
}


@dataclass
class RunResult:
    """The content of result.json.

    Attributes:
        status: finished | paused | stopped | failed.
        final_loss: training loss of the last step in nats per target token; eval_loss likewise on the held-out sets.
        evaluations_before: of the untrained model, empty if not measured.
        exact_match_before: share of held-out rows answered exactly, in [0, 1]; None if not measured.
        reward_before: mean of the rewards of answers to held-out rows, mean of the sets; None if not measured.
        teacher_kl_before: KL(teacher || model) in nats per target, mean of the held-out sets; None if not measured.
        recovered: share of teacher_kl_before that is gone, for objective=recover.
        breaches: entries of guard.py: step, teacher_kl, action, and teacher_kl `after` a recovery.
        micro_batch: sequences per forward pass at the end; None if no step began.
        halvings: steps that were repeated because memory ran out, each with its new `micro_batch`.
        duration_seconds: from the start of this process's part of the run to its end, with loading and evaluations.
        tokens_per_second: all tokens over training time.
        peak_bytes: CUDA's maximum allocated, or the peak resident size on CPU.
        predicted_peak_bytes: the plan's prediction of peak_bytes; predicted_train_seconds likewise of train_seconds.
        predicted_time_source: the rates of the time: measured on a device, or assumed.
        adapter: folder of the final adapter, None if there is none yet.
    """

    status: str
    steps: int = 0
    target_tokens: int = 0
    final_loss: float | None = None
    eval_loss: float | None = None
    evaluations: dict[str, float] = field(default_factory=dict)
    eval_loss_before: float | None = None
    evaluations_before: dict[str, float] = field(default_factory=dict)
    exact_match_before: float | None = None
    exact_match_after: float | None = None
    reward_before: float | None = None
    reward_after: float | None = None
    teacher_kl_before: float | None = None
    teacher_kl_after: float | None = None
    recovered: float | None = None
    breaches: list[dict[str, Any]] = field(default_factory=list)
    micro_batch: int | None = None
    halvings: list[dict[str, int]] = field(default_factory=list)
    train_seconds: float = 0.0
    duration_seconds: float | None = None
    tokens_per_second: float | None = None
    peak_bytes: int = 0
    predicted_peak_bytes: int | None = None
    predicted_train_seconds: float | None = None
    predicted_time_source: str | None = None
    world_size: int = 1
    adapter: str | None = None
    error: str | None = None


def find_checkpoint(cfg: RunConfig, warn: Log) -> Path | None:
    """Return the verified checkpoint to continue from; None for a new run."""
    if cfg.train.resume == "never":
        return None
    if cfg.train.resume == "auto":
        return newest_valid(Path(cfg.output_dir), warn)
    check_resume(cfg)
    folder = Path(cfg.train.resume)
    verify_checkpoint(folder)
    return folder


def trajectory(cfg: RunConfig, functions: Sequence[UserReward] = ()) -> dict[str, Any]:
    """Return what decides the result of a run: settings by dotted key, and digests of the files of its rewards."""
    recovers = cfg.guard.max is not None and cfg.guard.action == "recover"
    names = {"model", "quant", "lora", "data", "train"} | ({"guard"} if recovers else set())
    names |= {"preference"} if cfg.preference.objective != "none" else set()
    names |= {"reward"} if cfg.reward.loss != "none" else set()
    names |= {"distill"} if cfg.distill.objective != "none" or recovers else set()
    sections = cfg.model_dump(include=names)
    found = {
        f"{section}.{key}": value
        for section, values in sections.items()
        for key, value in values.items()
        if key not in _FREE.get(section, set())
    }
    if "reward.json_schema" in found and (schema := Path(cfg.reward.json_schema or "").expanduser()).is_file():
        found["reward.json_schema"] = f"sha256={sha256_of(schema)[:12]}"
    own = [f"{function.name} sha256={(function.digest or '')[:12]}" for function in functions]
    return found | ({OPTION: own} if own else {})


def check_continuation(
    cfg: RunConfig, data_digest: str, checkpoint: Path, functions: Sequence[UserReward] = ()
) -> None:
    """Compare a run with its checkpoint. Raises: ConfigError naming every setting that differs."""
    state = read_state(checkpoint)
    current = json.loads(json.dumps(trajectory(cfg, functions)))
    # A checkpoint of an older version lacks newer keys: it was trained with what is their default now.
    before = {key: schema_fields()[key].default for key in current if key in schema_fields()} | state.trajectory
    differing = [
        f"{key}: {before.get(key)!r} then, {current.get(key)!r} now"
        for key in sorted(current.keys() | before.keys())
        if current.get(key) != before.get(key)
    ]
    if state.data_digest != data_digest:
        differing.append("data.train: the rows, their weights, the chat template or their tokens differ")
    if differing:
        help_line = "help: restore these settings, or start a new run from its adapter with lora.init_adapter"
        raise ConfigError("\n".join([f"train.resume: this run differs from {checkpoint}:", *differing, help_line]))


def describe_run(
    cfg: RunConfig,
    data_digest: str,
    functions: Sequence[UserReward] = (),
    *,
    started: datetime,
    device_type: str,
    world_size: int,
) -> None:
    """Write config.yaml (resolved) and run.json (start, command, commit, hardware, versions, seed, digests).

    functions: of the user, that judge answers.
    started: of this process, with a time zone.
    """
    folder = Path(cfg.output_dir)
    for problem in differences(folder, [name for name in _FIGURES if (folder / name).is_file()]):
        log_once(f"WARNING: {folder}: {problem} since the run wrote it; the weights are checked by themselves")
    write_text(folder / CONFIG, to_yaml(cfg))
    model = cfg.model
    described = {own.name: {"word": own.word, "digest": own.digest} for own in functions}
    facts = {
        "started": started.isoformat(timespec="seconds"),
        "command": command_line(sys.argv),
        "commit": git_commit(Path.cwd()),
        "hardware": hardware(device_type),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}},
        "platform": platform.platform(),
        "seed": cfg.train.seed,
        "base": {"name": model.name, "revision": model.revision, "fingerprint": base_fingerprint(model.name)},
        "data_digest": data_digest,
        **({REWARD_FUNCTIONS: described} if described else {}),
        "world_size": world_size,
    }
    write_text(folder / FACTS, json.dumps(facts, indent=2) + "\n")
    record_files(folder, [CONFIG, FACTS], forget=_FIGURES)


def write_samples(folder: Path, before: Sequence[Answer], after: Sequence[Answer] = ()) -> None:
    """Write samples.json: a list of `{prompt, expected, before, after}`, null without an answer.

    With rewards, also `before_reward` and `after_reward`; with media, also `media`. before: of the untrained model.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, answers in (("before", before), ("after", after)):
        for answer in answers:
            empty = {"before": None, "after": None, **_asked(answer)}
            row = rows.setdefault((answer.prompt, answer.expected, answer.media), empty)
            row[name] = answer.given
            if answer.reward is not None:
                row[f"{name}_reward"] = answer.reward
    if rows:
        write_text(folder / SAMPLES, json.dumps(list(rows.values()), indent=1, ensure_ascii=False) + "\n")


def write_rewarded(folder: Path, answers: Sequence[Answer]) -> None:
    """Write rewarded_answers.json: how many held-out answers were judged, and those with the best and worst rewards.

    answers: with rewards. `best` and `worst` have at most a half each.
    """
    ordered = sorted(answers, key=lambda answer: -(answer.reward or 0.0))
    count = min(_MOST_REWARDED, len(ordered) // 2)

    def rows(some: Sequence[Answer]) -> list[dict[str, Any]]:
        return [{**_asked(a), "after": a.given, "after_reward": a.reward} for a in some]

    content = {"answered": len(answers), "best": rows(ordered[:count]), "worst": rows(ordered[::-1][:count])}
    write_text(folder / REWARDED, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _asked(answer: Answer) -> dict[str, Any]:
    """Return the prompt, its media, and the expected answer: None if a reward judges without one."""
    expected = None if answer.reward is not None and not answer.expected else answer.expected
    media = {"media": [each.as_dict() for each in answer.media]} if answer.media else {}
    return {"prompt": answer.prompt, "expected": expected, **media}


def write_worst(folder: Path, answers: Sequence[Answer]) -> None:
    """Write worst_answers.json: how many held-out rows were answered, how many wrongly, and the worst answers."""
    wrong = [answer for answer in answers if not answer.exact]
    rows = [{**_asked(a), "after": a.given} for a in worst_answers(wrong, _MOST_WORST)]
    content = {"answered": len(answers), "wrong": len(wrong), "rows": rows}
    write_text(folder / WORST, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_result(folder: Path, result: RunResult) -> None:
    """Write result.json, and enter it and the other files of figures into the manifest of the folder."""
    write_text(folder / RESULT, json.dumps(asdict(result), indent=2) + "\n")
    record_files(folder, _FIGURES)
