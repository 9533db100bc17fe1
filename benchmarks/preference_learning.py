"""Measure what each preference objective learns from the sample pairs on the embedded base, beside plain fine-tuning.

    python -m benchmarks.preference_learning [seeds=0,1,2] [only=dpo,ipo,orpo,simpo,kto,sft] [steps=120] [answers=60]

Each objective runs as its config has it, once per seed. `sft` trains on the chosen answers alone. All are measured on
the same held-out pairs. `ranked` is the share of pairs whose chosen answer has the higher log-probability: the sum
under objectives with a reference, the mean per token under the others. It exists before training too, where every
reward with a reference is 0. `reward` is the share by the objective's own reward. Answers to the held-out prompts are
greedy.
A bar is on the worst seed, that of exact match on the means. The results file grows after each run, and judges the
bars when all runs are done.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks import report
from benchmarks.distill import Bar, judged, verdicts
from benchmarks.processes import device, parse
from finetune.config.preference_rules import NEEDS_REFERENCE

if TYPE_CHECKING:
    from finetune.config.schema import RunConfig
    from finetune.losses.preference import Answers

SFT = "sft"
# Config, and its changes.
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dpo": ("dpo.yaml", ()),
    "ipo": ("dpo.yaml", ("preference.objective=ipo", "preference.beta=1")),
    "orpo": ("orpo.yaml", ()),
    "simpo": ("simpo.yaml", ()),
    "kto": ("kto.yaml", ()),
    SFT: (
        "orpo.yaml",
        (
            "preference.objective=none",
            "preference.beta=null",
            "data.train.0.columns={completion: chosen}",
            "train.batch_size=2",  # as many chosen answers per step: a sequence of pairs has room for half of them
        ),
    ),
}
DEFAULTS = {
    "seeds": "0,1,2",
    "only": ",".join(RUNS),
    "steps": "120",
    "answers": "60",
    "results": "benchmarks/results",
}
BARS: tuple[Bar, ...] = (
    ("base", "ranked", "at_most", 0.60),
    ("dpo", "reward", "at_least", 0.95),
    *((name, "reward", "at_least", 0.90) for name in ("ipo", "orpo", "simpo", "kto")),
    ("orpo", "exact_over_sft", "at_least", 0.0),
)
COLUMNS = (
    ("ranked", "ranked_before", 100.0, ".1f"),
    ("after", "ranked", 100.0, ".1f"),
    ("reward", "reward", 100.0, ".1f"),
    ("margin", "margin", 1.0, ".2f"),
    ("chosen", "chosen_log_prob", 1.0, ".1f"),
    ("rejected", "rejected_log_prob", 1.0, ".1f"),
    ("tokens", "tokens_before", 1.0, ".1f"),
    ("after", "tokens", 1.0, ".1f"),
    ("exact", "exact_before", 100.0, ".1f"),
    ("after", "exact", 100.0, ".1f"),
    ("steps", "steps", 1.0, ".0f"),
    ("seconds", "seconds", 1.0, ".0f"),
)
_LONGEST_ANSWER = 48  # of right answers: 22 tokens
Figures = dict[str, float]


@dataclass(frozen=True)
class Measured:
    """A model on the held-out pairs. chosen, rejected: without a reference. tokens, exact: of its own answers."""

    chosen: Answers
    rejected: Answers
    tokens: float
    exact: float

    def ranked(self, objective: str) -> float:
        """Return the share of pairs whose chosen answer has the higher log-probability."""
        sides = (self.chosen, self.rejected)
        chosen, rejected = (side.log_probs_A if objective in NEEDS_REFERENCE else side.means_A for side in sides)
        return (chosen > rejected).double().mean().item()


def config_of(name: str, folder: Path, seed: int, options: Mapping[str, str], *extra: str) -> RunConfig:
    """Return the config of a run."""
    from finetune import load_config

    file, changes = RUNS[name]
    settings = (f"train.max_steps={options['steps']}", f"train.seed={seed}", f"output_dir={folder}", *extra)
    return load_config(file, [*changes, *settings])


def measure(cfg: RunConfig, adapter: Path | None, answers: int) -> Measured:
    """Score the held-out pairs with the base or an adapter, and answer the first prompts."""
    import torch

    from finetune.data.batch import build_batch, groups_of
    from finetune.data.loader import first_conversations, load_chat_template, load_data
    from finetune.data.tokens.prepare import Preparation
    from finetune.evaluation.generation import answer_rows, exact_match
    from finetune.evaluation.scoring import evaluating
    from finetune.losses.preference import Answers, answer_log_probs
    from finetune.models.adapters.files import load_adapter
    from finetune.models.load import load_base
    from finetune.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(cfg.model)
    preparation = Preparation(cfg.data, load_chat_template(cfg.data, tokenizer), objective=cfg.preference.objective)
    source = load_data(preparation).eval[0]
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_base(cfg.model, cfg.quant, place)
    if adapter is not None:
        model = load_adapter(model, adapter)
    columns = []
    with evaluating(model), torch.no_grad():
        for group in groups_of(source.documents, limit_tokens=4096):
            batch = build_batch(group, share_prefixes=True)
            log_probs_A, tokens_A = answer_log_probs(model, batch)
            columns.append(torch.stack([log_probs_A, tokens_A])[:, torch.tensor(batch.sides)].cpu())
    log_probs, tokens = torch.cat(columns, dim=1)
    sides = (Answers(log_probs[:, i], torch.zeros(len(log_probs)), tokens[:, i]) for i in (0, 1))
    given = answer_rows(
        model,
        tokenizer,
        preparation.chat,
        first_conversations(source, preparation, answers),
        max_new_tokens=_LONGEST_ANSWER,
        batch_size=answers,
    )
    lengths = [len(ids) for ids in tokenizer([answer.given for answer in given])["input_ids"]]
    return Measured(*sides, tokens=mean(lengths), exact=exact_match(given))


def figures_of(name: str, cfg: RunConfig, before: Measured, after: Measured) -> Figures:
    """Return the figures of a trained model; plain fine-tuning has no reward."""
    from dataclasses import replace

    from finetune.losses.preference import rewards

    figures = {
        "ranked_before": before.ranked(name),
        "ranked": after.ranked(name),
        "chosen_log_prob": after.chosen.log_probs_A.mean().item(),
        "rejected_log_prob": after.rejected.log_probs_A.mean().item(),
        "tokens_before": before.tokens,
        "tokens": after.tokens,
        "exact_before": before.exact,
        "exact": after.exact,
    }
    if name != SFT:
        sides = ((before.chosen, after.chosen), (before.rejected, after.rejected))
        chosen_E, rejected_E = (
            rewards(replace(now, reference_A=then.log_probs_A), cfg.preference) for then, now in sides
        )
        figures["reward"] = (chosen_E > rejected_E).double().mean().item()
        figures["margin"] = (chosen_E - rejected_E).mean().item()
    return figures


def summarize(before: Measured, runs: Mapping[str, Sequence[Figures]], complete: bool) -> dict[str, Any]:
    """Return mean, least and greatest of each figure over the seeds, and the bars once all runs are done."""
    spreads = {
        name: {
            key: {"mean": mean(values), "least": min(values), "greatest": max(values)}
            for key in done[0].keys() - {"seed"}
            for values in [[run[key] for run in done]]
        }
        for name, done in runs.items()
    }
    worst = {name: {"reward": found["reward"]["least"]} for name, found in spreads.items() if "reward" in found}
    if "orpo" in spreads and SFT in spreads:
        worst["orpo"]["exact_over_sft"] = spreads["orpo"]["exact"]["mean"] - spreads[SFT]["exact"]["mean"]
    base = {"ranked": max(before.ranked(name) for name in ("dpo", "simpo"))}
    base |= {"tokens": before.tokens, "exact": before.exact}
    lengths = {
        side: getattr(before, side).tokens_A.mean().item() for side in ("chosen", "rejected")
    }  # what the pairs would teach about length
    return {
        "base": base,
        "pair_tokens": lengths,
        "variants": spreads,
        "complete": complete,
        "bars": judged({"base": base, **worst}, BARS) if complete else [],
        "runs": dict(runs),
    }


def describe(summary: Mapping[str, Any]) -> str:
    seeds = {f"{name} {run['seed']}": run for name, done in summary["runs"].items() for run in done}
    means = {
        f"{name} mean": {key: value["mean"] for key, value in found.items()}
        for name, found in summary["variants"].items()
    }
    tokens = summary["pair_tokens"]
    sides = f"tokens of an answer of the pairs: chosen {tokens['chosen']:.2f}, rejected {tokens['rejected']:.2f}"
    return "\n".join([report.table(seeds | means, COLUMNS), sides, *verdicts(summary["bars"])])


def main(words: list[str]) -> None:
    from finetune import train

    options = parse(words, DEFAULTS)
    names, seeds, answers = options["only"].split(","), options["seeds"].split(","), int(options["answers"])
    if unknown := [name for name in names if name not in RUNS]:
        raise SystemExit(f"only={','.join(unknown)}: unknown; choose from {','.join(RUNS)}")
    machine = device()
    file = report.results_file("preference-learning", options, machine)
    runs: dict[str, list[Figures]] = {}
    summary: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        pairs = config_of("dpo", Path(work), 0, options)
        before = measure(pairs, None, answers)
        for seed in seeds:
            for name in names:
                # The benchmark measures, so the run does not.
                cfg = config_of(name, Path(work) / f"{name}-{seed}", int(seed), options, "data.eval=[]")
                result = train(cfg)
                figures = figures_of(name, cfg, before, measure(pairs, Path(cfg.output_dir), answers))
                figures |= {"seed": int(seed), "steps": result.steps, "seconds": result.train_seconds}
                runs.setdefault(name, []).append(figures)
                complete = sum(map(len, runs.values())) == len(seeds) * len(names)
                heading = report.heading("preference-learning", options, machine)
                summary = {**heading, **summarize(before, runs, complete)}
                report.write(file, summary)
                report.log(report.table({f"{name} {seed}": figures}, COLUMNS))
    report.log("\n" + describe(summary))
    print(json.dumps({key: value for key, value in summary.items() if key != "runs"}))


if __name__ == "__main__":
    main(sys.argv[1:])
