"""Measure what parties with different rows learn together, alone, and on all rows at one place.

    python -m benchmarks.federated [rounds=10] [steps=12] [rate=1e-2] [max_norm=20] [answers=40] [seed=0] [only=all]

Each party has another kind of the sample rows: orders that become records; orders with a question for a person or an
item; with one for a town or a day. All are measured on the same held-out rows, as many of each kind. `ffa` and
`fedavg` run the functions of `finetune train`, `clip` and `aggregate`; in a round, each party takes `steps` steps.
`central` takes as many steps as all parties of a federation together, a party alone as many as it takes in one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import report
from benchmarks.distill import Bar, judged, verdicts
from benchmarks.processes import ROOT, device, parse

if TYPE_CHECKING:
    from finetune.config.schema import RunConfig

SAMPLE = ROOT / "data" / "sample"
DEFAULTS = {
    "rounds": "10",
    "steps": "12",
    "rate": "1e-2",
    "max_norm": "20",
    "answers": "40",
    "seed": "0",
    "only": "all",
    "results": "benchmarks/results",
}
# Party -> file of its rows, of its held-out rows, and the ends of its prompts ("" ends each).
PARTIES = {
    "records": ("train.jsonl", "heldout.jsonl", ("",)),
    "who, what": ("prompts.jsonl", "prompts-heldout.jsonl", ("For whom?", "What is needed?")),
    "where, when": ("prompts.jsonl", "prompts-heldout.jsonl", ("Which town?", "Before when?")),
}
LOCAL = tuple(f"{name} alone" for name in PARTIES)
FEDERATED = ("ffa", "fedavg")
BARS: tuple[Bar, ...] = (
    ("ffa", "of_central", "at_least", 0.95),
    ("ffa", "rounds", "at_most", 10),
    *((name, "of_central", "at_most", 0.9499) for name in LOCAL),
)
COLUMNS = (
    ("exact", "exact", 100.0, ".1f"),
    *((name, name, 100.0, ".1f") for name in PARTIES),
    ("of central", "of_central", 100.0, ".1f"),
    ("rounds", "rounds", 1.0, ".0f"),
    ("steps", "steps", 1.0, ".0f"),
    ("error", "factor_error", 100.0, ".1f"),
)
_LONGEST_ANSWER = 64
Figures = dict[str, Any]
Row = dict[str, str]


def split(answers: int) -> tuple[dict[str, list[Row]], list[Row]]:
    """Return the rows of each party, and the held-out rows: `answers` of each kind, in the order of the parties."""
    parties = {name: rows_of(file, ends) for name, (file, _, ends) in PARTIES.items()}
    held_out = [row for _, file, ends in PARTIES.values() for row in rows_of(file, ends)[:answers]]
    return parties, held_out


def rows_of(file: str, ends: tuple[str, ...]) -> list[Row]:
    """Return the rows of a file whose prompts end so, as prompt and completion: a file of rows has one format."""
    rows = [json.loads(line) for line in (SAMPLE / file).read_text(encoding="utf-8").splitlines()]
    pairs = [
        {"prompt": row["messages"][0]["content"], "completion": row["messages"][1]["content"]}
        if "messages" in row
        else {"prompt": row["prompt"], "completion": row["completion"]}
        for row in rows
    ]
    return [row for row in pairs if row["prompt"].endswith(ends)]


def config_of(rows: Sequence[Path], out: Path, steps: int, seed: int, *words: str) -> RunConfig:
    """Return the config of a run: the quickstart on other rows, without its measurements."""
    from finetune import load_config

    common = ("data.eval=[]", "generation.num_examples=0", "train.batch_size=4", f"train.max_steps={steps}")
    train = f"data.train=[{','.join(map(str, rows))}]"
    return load_config("quickstart.yaml", [train, f"output_dir={out}", f"train.seed={seed}", *common, *words])


def federate(method: str, rows: Mapping[str, Path], work: Path, options: Mapping[str, str]) -> list[Path]:
    """Run the rounds of a federation, and return the adapter of each."""
    from finetune import train
    from finetune.config.command_options import AggregateOptions, ClipOptions
    from finetune.federation.aggregate import aggregate
    from finetune.federation.clip import clip

    adapters: list[Path] = []
    for number in range(1, int(options["rounds"]) + 1):
        folder = work / method / f"round-{number}"
        start = str(adapters[-1]) if adapters else None
        words = [f"train.learning_rate={options['rate']}", f"lora.freeze_a={str(method == 'ffa').lower()}"]
        words += [] if start is None else [f"lora.init_adapter={start}"]
        sent = []
        for path in rows.values():
            out = folder / path.stem
            train(config_of([path], out, int(options["steps"]), int(options["seed"]) + number - 1, *words))
            if method == "ffa":
                given = {"start": start, "max_norm": float(options["max_norm"])}
                clip(ClipOptions(adapter=str(out), out=f"{out}-sent", **given), report.log)
                out = Path(f"{out}-sent")
            sent.append(str(out))
        given = {"start": start, "method": method, "max_error": 0.0 if method == "ffa" else 1e9}
        aggregate(AggregateOptions(adapters=sent, out=str(folder / "mean"), **given), report.log)
        adapters.append(folder / "mean")
    return adapters


def exact_of(adapter: Path, held_out: Path) -> dict[str, float]:
    """Return the share of held-out rows that an adapter answers exactly: of each kind, and of all."""
    import torch

    from finetune import load_config
    from finetune.data.loader import first_conversations, load_chat_template, load_data
    from finetune.data.tokens.prepare import Preparation
    from finetune.evaluation.generation import answer_rows, exact_match
    from finetune.evaluation.scoring import evaluating
    from finetune.models.adapters.files import load_adapter
    from finetune.models.load import load_base
    from finetune.models.tokenizer import load_tokenizer

    cfg = load_config("quickstart.yaml", [f"data.eval={held_out}"])
    tokenizer = load_tokenizer(cfg.model)
    preparation = Preparation(cfg.data, load_chat_template(cfg.data, tokenizer))
    source = load_data(preparation).eval[0]
    rows = first_conversations(source, preparation, len(source.documents))
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_adapter(load_base(cfg.model, cfg.quant, place), adapter)
    with evaluating(model), torch.no_grad():
        given = answer_rows(model, tokenizer, preparation.chat, rows, max_new_tokens=_LONGEST_ANSWER, batch_size=40)
    size = len(given) // len(PARTIES)
    parts = {name: exact_match(given[size * k : size * (k + 1)]) for k, name in enumerate(PARTIES)}
    return {"exact": exact_match(given), **parts}


def measure(name: str, rows: Mapping[str, Path], held_out: Path, work: Path, options: Mapping[str, str]) -> Figures:
    """Train one variant and measure it; a federation after each round, with the error of means of factors."""
    from finetune import train

    rounds = int(options["rounds"])
    total = rounds * int(options["steps"]) * len(rows)
    if name in FEDERATED:
        adapters = federate(name, rows, work, options)
        records = [json.loads((adapter / "federation.json").read_text()) for adapter in adapters]
        errors = [record["factor_error"] for record in records]
        by_round = [exact_of(adapter, held_out) for adapter in adapters]
        more = {"rounds": rounds, "by_round": by_round, "error_by_round": errors, "factor_error": max(errors)}
        return {**by_round[-1], "steps": total, **more}
    places = [*rows.values()] if name == "central" else [rows[name.removesuffix(" alone")]]
    steps = total if name == "central" else total // len(rows)
    out = work / str(len(list(work.iterdir())))
    train(config_of(places, out, steps, int(options["seed"])))
    return {**exact_of(out, held_out), "steps": steps}


def summarize(found: Mapping[str, Figures]) -> dict[str, Any]:
    """Return the figures with their ratio to training on all rows, and the verdicts on the bars."""
    central = found.get("central", {}).get("exact")
    variants = {
        name: figures | ({"of_central": figures["exact"] / central} if central else {})
        for name, figures in found.items()
    }
    return {"variants": variants, "bars": judged(variants, BARS)}


def main(words: list[str]) -> None:
    options, machine = parse(words, DEFAULTS), device()
    known = ("central", "ffa", *LOCAL, "fedavg")
    names = known if options["only"] == "all" else tuple(options["only"].split(";"))
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"only={';'.join(unknown)}: unknown; choose from {';'.join(known)}")
    found: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as work:
        parts, test = split(int(options["answers"]))
        rows = {party: Path(work) / f"{number}.jsonl" for number, party in enumerate(parts)}
        held_out = Path(work) / "held-out.jsonl"
        for file, lines in [*((rows[party], parts[party]) for party in parts), (held_out, test)]:
            file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        for name in names:
            found[name] = measure(name, rows, held_out, Path(work), options)
            report.log(report.table({name: found[name]}, COLUMNS))
    summary = {**report.heading("federated", options, machine), **summarize(found)}
    text = "\n".join([report.table(summary["variants"], COLUMNS), *verdicts(summary["bars"])])
    report.conclude("federated", options, machine, summary, text)


if __name__ == "__main__":
    main(sys.argv[1:])
