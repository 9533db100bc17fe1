"""usage: finetune plan config=X.yaml|model=NAME [key=value …] [gpu=4090] [auto=true] [--json]
       finetune plan … [gpus=8] [nodes=2] [link_gbps=400]
       finetune plan table=true [gpus=8] [config=X.yaml] [key=value …]
       finetune plan calibrate=true [config=X.yaml]

Predicts the memory of a run by part, its peak, whether that fits into this machine or another GPU (gpu=, gpu_gb=),
the time of a step and of the run, and the smallest changes that make it fit. With gpus= of each node and nodes=, also
what ranks exchange in a step. Loads and downloads nothing.
Exit code 0: it fits; 3: it does not.
  --json   print the plan as JSON

Examples
  finetune plan model=qwen2.5-7b-instruct gpu=t4
  finetune plan config=lora.yaml model=qwen2.5-14b gpu_gb=24 data.max_length=8192 auto=true
  finetune plan model=qwen2.5-72b-instruct gpus=8 nodes=2 gpu=h100 link_gbps=400
  finetune plan table=true quant.type=none
  finetune plan table=true gpus=4
  finetune plan calibrate=true config=quickstart.yaml
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from finetune.commands.base import Command, default_config
from finetune.system.accelerator import CUDA, default_device, device_name, on_gpu
from finetune.system.arguments import Arguments
from finetune.system.console import console_for, log
from finetune.system.errors import InputError
from finetune.system.format import format_bytes, format_estimate

if TYPE_CHECKING:
    from finetune.config.command_options import PlanOptions
    from finetune.config.schema import RunConfig
    from finetune.planning.gpus import PlannedDevice
    from finetune.planning.inputs import PlanInputs


def run(arguments: Arguments) -> int:
    """Print the plan; return 3 if the run does not fit."""
    from finetune.config.compose import load_config
    from finetune.data.early_checks import check_sources

    options = arguments.options
    config = arguments.config or default_config(arguments.overrides)
    if config is None and not options.table:
        if not options.calibrate:
            raise COMMAND.missing_config()
        log(f"rates: file={calibrate()}")
        return 0
    cfg = load_config(config or "lora.yaml", arguments.overrides, needs_data=False)
    as_json = "--json" in arguments.flags
    _check_options(options, cfg)
    if not options.table:  # It covers all models, with rows of every length.
        check_sources(cfg, download=False)
    if options.calibrate:  # After every check: it takes half a minute.
        log(f"rates: file={calibrate()}")
    if not options.table:
        return _print_plan(cfg, options, as_json)
    return (
        _print_cards(cfg, options.gpus, as_json) if "gpus" in options.model_fields_set else _print_lengths(cfg, as_json)
    )


def _check_options(options: PlanOptions, cfg: RunConfig) -> None:
    """Raise InputError for an option that has no effect or contradicts the config."""
    if options.table and (idle := sorted(options.model_fields_set - {"table", "calibrate", "gpus"})):
        raise InputError(f"table=true: covers all models and GPUs\nhelp: drop {', '.join(idle)}, or drop table=true")
    ranks, wanted = options.gpus * options.nodes, cfg.train.world_size
    if options.model_fields_set & {"gpus", "nodes"} and wanted not in (None, ranks):
        wrong = f"gpus={options.gpus} nodes={options.nodes}: are {ranks} ranks, expected train.world_size={wanted}"
        raise InputError(f"{wrong}\nhelp: set train.world_size={ranks}, or drop it")
    if options.link_gbps and ranks == 1:
        raise InputError(f"link_gbps={options.link_gbps:g}: one rank sends nothing\nhelp: set gpus=2 or nodes=2")
    if (options.document_tokens or 0) > cfg.data.max_length:
        wrong = f"document_tokens={options.document_tokens}: is more than data.max_length={cfg.data.max_length}"
        raise InputError(f"{wrong}\nhelp: lower it, or raise data.max_length")


def calibrate(clock: Callable[[], float] = time.perf_counter) -> str:
    """Measure this machine with the threads of training, and return the path of the file of its rates.

    Args:
        clock: returns seconds; pass a CPU clock where other programs run.
    """
    from finetune.planning.calibrate import measure_rates
    from finetune.planning.timing import write_rates
    from finetune.system.machine import use_all_cores

    device = default_device()
    use_all_cores(device.type)
    return str(write_rates(device.type, measure_rates(device, device_name(device), log, clock)))


def _print_lengths(cfg: RunConfig, as_json: bool) -> int:
    from finetune.planning.advice import BUDGETS_GB, LONGEST, length_table
    from finetune.planning.inputs import plan_inputs

    lengths = length_table(plan_inputs(cfg, None, device_type=CUDA))
    if as_json:
        print(json.dumps({size: {str(gb): tokens for gb, tokens in row.items()} for size, row in lengths.items()}))
        return 0
    teacher = f", teacher={cfg.distill.teacher.placement}" if cfg.has_teacher else ""
    targets = cfg.lora.target_modules
    print(
        "Longest packed sequence in tokens, one per forward pass, on one GPU: "
        f"base={cfg.model.dtype if cfg.quant.type == 'none' else cfg.quant.type}{teacher}, lora.rank={cfg.lora.rank}, "
        f"lora.target_modules={targets if isinstance(targets, str) else ','.join(targets)}, "
        f"train.gradient_checkpointing={cfg.train.gradient_checkpointing}"
    )
    rows = [["model", *(f"{budget} GB" for budget in BUDGETS_GB)]]
    for size, row in lengths.items():
        counts = [row[budget] for budget in BUDGETS_GB]
        rows.append([f"Qwen2.5-{size}", *(f"{n:,}{'+' * (n >= LONGEST)}" if n else "-" for n in counts)])
    _print_columns(rows)
    return 0


def _print_cards(cfg: RunConfig, gpus: int, as_json: bool) -> int:
    from finetune.planning.advice import LONGEST
    from finetune.planning.cards import CARDS, SPEED_TOKENS, cards_table
    from finetune.planning.inputs import plan_inputs

    table = cards_table(plan_inputs(cfg, None, device_type=CUDA, ranks=gpus))
    if as_json:
        cells = {size: {str(gb): cell and asdict(cell) for gb, cell in row.items()} for size, row in table.items()}
        print(json.dumps(cells))
        return 0
    print(
        f"Longest packed sequence in tokens, and assumed tokens/s at {SPEED_TOKENS:,} tokens (or at the longest one), "
        f"GPUs: {gpus} of a node, train.batch_size={cfg.train.batch_size}, parallel.shard={cfg.parallel.shard}"
    )
    rows = [["model", *(f"{gb} GB ({name})" for gb, name in CARDS.items())]]
    for size, row in table.items():
        cells = (
            f"{cell.longest:,}{'+' * (cell.longest >= LONGEST)}  {_rounded(cell.tokens_per_second)}/s" if cell else "-"
            for cell in row.values()
        )
        rows.append([f"Qwen2.5-{size}", *cells])
    _print_columns(rows)
    return 0


def _planned_run(cfg: RunConfig, options: PlanOptions) -> tuple[PlanInputs, PlannedDevice]:
    """Return the inputs of the planned run, with what it decides for itself, and the device of each rank."""
    from finetune.planning.auto_batch import keep_copies
    from finetune.planning.gpus import planned_device, traits_of
    from finetune.planning.inputs import known_shape, plan_inputs
    from finetune.planning.sharded_base import shard_group
    from finetune.system.machine import nodes_of_run, ranks_of_run

    shape = known_shape(cfg.model.name)
    device = planned_device(options.gpu, options.gpu_gb)
    ranks, nodes = options.gpus * options.nodes, options.nodes
    if not options.model_fields_set & {"gpus", "nodes"}:
        ranks, nodes = ranks_of_run(os.environ), nodes_of_run(os.environ)
    elif device.kind == "cpu" and device.free_bytes is not None:
        device = device._replace(free_bytes=device.free_bytes / options.gpus)
    gpu = traits_of(device.gpu_name)
    inputs = plan_inputs(cfg, shape, device_type=device.kind, ranks=ranks, gpu=gpu, nodes=nodes)
    inputs = _with_rows(inputs, options)
    inputs = replace(inputs, shard_ranks=shard_group(inputs, device.free_bytes))
    return keep_copies(inputs, device.free_bytes), device


def _print_plan(cfg: RunConfig, options: PlanOptions, as_json: bool) -> int:
    from finetune.planning.advice import changes_that_fit, fastest_that_fits
    from finetune.planning.auto_batch import estimate_memory, host_shortage
    from finetune.planning.sharded_base import fewest_ranks
    from finetune.planning.timing import estimate_time, read_rates

    inputs, (device_type, free, what, gpu_name) = _planned_run(cfg, options)
    found = estimate_memory(inputs, free)
    # The main memory of a machine with another GPU is unknown.
    shortage = None if options.gpu or options.gpu_gb else host_shortage(found)
    fits = None if free is None else found.needed_bytes <= free and shortage is None
    rates = None if options.gpu or options.gpu_gb or options.tflops else read_rates(device_type)
    timing = estimate_time(inputs, found, rates=rates, options=options, gpu_name=gpu_name)
    changes = changes_that_fit(inputs, free) if free is not None and not fits else []
    fewest = fewest_ranks(inputs, free) if changes and free is not None and on_gpu(device_type) else None
    auto = None
    if options.auto and free is not None and (fastest := fastest_that_fits(inputs, free, rates)) is not None:
        overrides, memory, chosen = fastest
        auto = {
            "overrides": overrides,
            "peak_bytes": memory.peak_bytes,
            "needed_bytes": memory.needed_bytes,
            "tokens_per_second": estimate_time(chosen, memory, rates=rates, options=options, gpu_name=gpu_name)[
                "tokens_per_second"
            ],
        }
    content = {
        "fits": fits,
        "ranks": inputs.ranks,
        "nodes": inputs.nodes,
        "shard_ranks": inputs.shard_ranks,
        "fewest_gpus": fewest,
        "device": what,
        "free_bytes": free,
        "peak_bytes": found.peak_bytes,
        "needed_bytes": found.needed_bytes,
        "host_bytes": found.host_bytes,
        "moment": found.moment,
        "parts": dict(found.parts),
        "moments": {name: sum(parts.values()) for name, parts in found.moments.items()},
        "parameters": found.static.parameters,
        "trained": found.static.trained,
        "micro_batch": found.micro_batch,
        "recomputed_layers": found.recomputed,
        "layers": found.activations.layers,
        **timing,
        "media": _media_of(inputs),
        "changes": [{"overrides": c.overrides, "saved_bytes": c.saved_bytes, "fits": c.fits} for c in changes],
        "auto": auto,
        "teacher_unknown": found.teacher_unknown,
    }
    if as_json:
        print(json.dumps(content, indent=1))
    else:
        _describe(cfg, content, options.auto)
        if shortage:
            print(shortage)
    return 3 if fits is False else 0


def _with_rows(inputs: PlanInputs, options: PlanOptions) -> PlanInputs:
    """Return the inputs with the options' rows. Raises: InputError for media of a model that reads text only."""
    if "media_share" in options.model_fields_set and not inputs.towers:
        found = f"media_share={options.media_share:g}: {inputs.model.name} reads text only"
        raise InputError(f"{found}\nhelp: drop it")
    return inputs.with_rows(options.document_tokens, options.target_share, options.media_share)


def _media_of(inputs: PlanInputs) -> Mapping[str, Any]:
    """Return the lines about the towers, and the tokens of the largest file of each kind."""
    from finetune.planning.describe import tower_lines
    from finetune.planning.media import most_tokens

    return {"towers": tower_lines(inputs), "largest_tokens": most_tokens(inputs.towers, inputs.data)}


def _print_media(cfg: RunConfig, content: Mapping[str, Any]) -> None:
    """Print the towers, the limits of files in tokens, and what frozen towers take before training."""
    for line in content["media"]["towers"]:
        print(line)
    limits = {
        "image": f"{cfg.data.image.max_pixels:,} pixels, 784 per token",
        "video": f"{cfg.data.video.max_frames} frames",
        "audio": f"{cfg.data.audio.max_seconds:g} s, 25 tokens/s",
    }
    for kind, tokens in content["media"]["largest_tokens"].items():
        print(f"  {kind}: at most {tokens:,} tokens ({limits[kind]}; data.max_length={cfg.data.max_length})")
    if content["media_seconds"]:
        assumed = "assumed " if content["rates"].startswith("assumed") else ""
        seconds, size = format_estimate(content["media_seconds"]), format_bytes(content["media_bytes"])
        print(f"  before training: {assumed}{seconds}, embeddings on disk {size}")


def _describe(cfg: RunConfig, content: Mapping[str, Any], auto: bool) -> None:
    """Print the plan: verdict, memory by part, time, changes."""
    _print_verdict(content)
    moments = ", ".join(f"{name}={format_bytes(size)}" for name, size in content["moments"].items())
    recomputed = f"gradient checkpointing={content['recomputed_layers']} of {content['layers']} layers"
    print(
        f"{cfg.model.name}: {content['parameters']:,} parameters, {content['trained']:,} trained; "
        f"micro_batch={content['micro_batch']} x {cfg.data.max_length} tokens, {recomputed}"
        + (f", on each of {content['ranks']} processes" if content["ranks"] > 1 else "")
    )
    sizes = dict(sorted(content["parts"].items(), key=lambda item: -item[1]))
    sizes |= {"predicted peak": content["peak_bytes"], "with the safety margin": content["needed_bytes"]}
    head = (f"memory at the peak ({content['moment']})", "GB")
    _print_columns([head, *((name, f"{size / 1e9:.3f}") for name, size in sizes.items())])
    print(f"peaks: {moments}")
    _print_media(cfg, content)
    if content["host_bytes"]:
        print(f"main memory: {format_bytes(content['host_bytes'])} per process for what is kept there")
    if content["teacher_unknown"]:
        print("teacher: has unknown shapes, so its memory is not counted")
    parts = ", ".join(f"{name} {share:.0%}" for name, share in content["seconds_shares"].items() if share >= 0.005)
    assumed = "assumed " if content["rates"].startswith("assumed") else ""
    print(f"work: {content['step_flops'] / 1e12:,.2f} TFLOP per step; {content['rates']}")
    speed = _rounded(content["tokens_per_second"])
    print(f"time: {assumed}{format_estimate(content['step_seconds'])} per step, {speed} tokens/s; {parts}")
    if content["ranks"] > 1:
        _print_ranks(content)
    if content["total_seconds"] is not None:
        total = format_estimate(content["total_seconds"])
        print(f"      {assumed}{total} in total, {content['steps']:,} steps{content['steps_from']}")
    if content["fewest_gpus"]:
        print(f"  fits on {content['fewest_gpus']} such GPUs that share the base, as these settings are:")
        launcher = "accelerate launch --config_file launch/accelerate/ddp.yaml"
        print(f"    {launcher} --num_processes {content['fewest_gpus']} finetune/train.py …")
    for change in content["changes"]:
        alone = "" if change["fits"] else " (not enough by itself)"
        print(f"  {' '.join(change['overrides'])}   saves {format_bytes(change['saved_bytes'])}{alone}")
    if auto:
        answer = "none, at any sequence length"
        if found := content["auto"]:
            faster = found["tokens_per_second"] / content["tokens_per_second"]
            needs = f"needs {format_bytes(found['needed_bytes'])}, {assumed}{faster:.2f} times as fast"
            answer = f"{' '.join(found['overrides'])}   {needs}"
        print(f"fastest that fits: {answer}")


def _print_ranks(content: Mapping[str, Any]) -> None:
    """Print how ranks share the base, what each sends in a step, and what they are worth."""
    from finetune.planning.communication import describe_sent

    ranks, nodes, group = content["ranks"], content["nodes"], content["shard_ranks"]
    base = f"the base is split over {group} of them" if group > 1 else "each holds a whole base"
    print(f"ranks: {ranks} on {nodes} node{'s' * (nodes > 1)}; {base}")
    print(f"sent per rank and step: {describe_sent(content['sent_bytes'])}; {content['link']}")
    print(f"efficiency: {content['efficiency']:.0%} of {ranks} times one rank with a whole base")


def _print_verdict(content: Mapping[str, Any]) -> None:
    peak, needed = content["peak_bytes"], content["needed_bytes"]
    if content["fits"] is None:
        print(f"may fit: {_gb(peak)} GB, {_gb(needed)} with margin; the free memory of {content['device']} is unknown")
        print("help: set gpu_gb=24")
        return
    verdict, style = ("fits", "bold green") if content["fits"] else ("DOES NOT FIT", "bold red")
    sizes = f"{_gb(peak)} of {_gb(content['free_bytes'])} GB, {_gb(needed)} with margin ({content['device']})"
    console_for(sys.stdout).print(f"{verdict}: {sizes}", style=style)


def _rounded(speed: float) -> str:
    return f"{float(f'{speed:.2g}'):,.0f}"


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:,.{1 if size_bytes >= 1e9 else 2}f}"


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        numbers = (text.rjust(width) for text, width in zip(others, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *numbers]))


COMMAND = Command("plan", __doc__, run, options="PlanOptions", flags=("--json",), config="optional")
