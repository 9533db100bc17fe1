"""The peak is the largest of the moments, each the sum of its parts; what settings change, changes where it should."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetune import load_config
from finetune.models.families import QWEN25_SHAPES
from finetune.planning.auto_batch import choose_micro_batch, estimate_memory
from finetune.planning.inputs import PlanInputs, plan_inputs
from finetune.planning.peak_memory import (
    CONTEXT_BYTES,
    MARGIN,
    PeakMemory,
    predict_peak,
    streamed_bytes,
    teacher_bytes,
)
from finetune.system import machine

SHAPE = QWEN25_SHAPES["0.5B"]


def run(*overrides: str, shape=SHAPE, kind: str = "cuda", ranks: int = 1) -> PlanInputs:
    cfg = load_config("lora.yaml", ["data.max_length=1024", "train.max_steps=2", *overrides], needs_data=False)
    return plan_inputs(cfg, shape, device_type=kind, ranks=ranks)


def found(*overrides: str, kind: str = "cuda", micro: int = 1, recomputed: int = 0, ranks: int = 1) -> PeakMemory:
    return predict_peak(run(*overrides, kind=kind, ranks=ranks), micro, recomputed)


def test_the_peak_is_the_largest_moment_and_its_parts_add_up():
    plan = found()
    assert plan.peak_bytes == sum(plan.parts.values()) == max(sum(m.values()) for m in plan.moments.values())
    assert plan.moment in plan.moments and all(size > 0 for moment in plan.moments.values() for size in moment.values())


def test_on_a_gpu_the_peak_is_what_the_allocator_counts_and_the_need_has_the_context():
    plan, static = found(), run().static
    before = static.total_bytes - static.parts["gradients"] + plan.parts["a dequantized matrix"]
    activations = plan.peak_bytes - before
    assert plan.peak_bytes == pytest.approx(before + plan.activations.peak_bytes(0))
    assert plan.needed_bytes == pytest.approx(plan.peak_bytes + MARGIN["gpu"] * activations + CONTEXT_BYTES)


def test_a_process_on_a_cpu_holds_its_libraries_and_tokenizers():
    parts = found(kind="cpu").parts
    assert parts["process and libraries"] > 400e6 and parts["tokenizers"] > 100e6
    assert not {"process and libraries", "tokenizers", "allocator slack"} & found().parts.keys()


def test_a_cpu_keeps_code_for_the_shapes_that_a_run_meets(monkeypatch):
    monkeypatch.setattr(machine, "has_bf16_products", lambda: True)
    sizes = [
        found(*settings, kind="cpu").parts.get("code for shapes", 0.0)
        for settings in (
            (),
            ("train.max_steps=60",),
            ("train.max_steps=null",),
            ("train.max_steps=null", "data.held_out=0.1"),
            ("train.max_steps=null", "data.held_out=0.1", "generation.num_examples=20"),
        )
    ]
    assert sizes == sorted(set(sizes)) and sizes[0] == 0
    assert "code for shapes" not in found("train.max_steps=60").parts
    assert "code for shapes" not in found("train.max_steps=60", "model.dtype=float32", kind="cpu").parts
    monkeypatch.setattr(machine, "has_bf16_products", lambda: False)  # then its products are fp32's
    assert "code for shapes" not in found("train.max_steps=60", kind="cpu").parts


def test_tokenizers_are_as_large_as_their_file(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b" " * 1000)
    parts = found(f"model.tokenizer={tmp_path}", kind="cpu").parts
    assert 1000 < parts["tokenizers"] < 50_000


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_recomputing_offloading_and_fewer_sequences_lower_the_peak(kind):
    peaks = [found(kind=kind, micro=4, recomputed=count).peak_bytes for count in (0, 12, 23)]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > peaks[-1]
    assert found(kind=kind).peak_bytes < peaks[0]
    if kind == "cuda":
        assert found("train.gradient_checkpointing=offload", micro=4, recomputed=23).peak_bytes < peaks[-1]


def test_offloaded_inputs_are_counted_in_main_memory():
    offload, micro, recomputed = "train.gradient_checkpointing=offload", 4, 23
    plan = found(offload, micro=micro, recomputed=recomputed)
    assert plan.host_bytes == recomputed * plan.activations.input
    assert found(micro=micro, recomputed=recomputed).host_bytes == 0
    assert found(offload, kind="cpu", micro=micro, recomputed=recomputed).host_bytes == 0


def test_ranks_exchange_gradients_in_buckets():
    exchanged = "gradients exchanged between ranks"
    small = found(ranks=2)
    assert small.parts[exchanged] == 4 * small.static.trained
    assert found("lora.target_modules=all-linear", "lora.rank=64", ranks=2).parts[exchanged] == 25 * 2**20


def test_an_evaluation_can_be_the_peak():
    held_out = "data.eval=[{path: rows.jsonl}]"
    short = ("data.max_length=64", held_out)
    assert found(*short, recomputed=23).moment == "evaluation"
    assert "evaluation" not in found("data.max_length=64").moments
    assert found("data.max_length=8192", held_out).moment != "evaluation"


def test_what_is_trained_in_full_makes_the_optimizers_step_the_peak():
    plan = found("data.max_length=64", "lora.modules_to_save=[embed_tokens]", recomputed=23)
    assert plan.moment == "optimizer step" and plan.parts["gradients"] == 4 * plan.static.trained


def test_a_teacher_costs_by_where_it_is():
    # Plain torch holds more in the loss of answers alone, which writes its gradient beside the logits.
    compiled = ("train.compile=true", "distill.cache=folder")
    sizes = {
        place: found("distill=recover", f"distill.teacher.placement={place}", *compiled).peak_bytes
        for place in ("resident", "streamed", "cached")
    }
    assert sizes["resident"] > sizes["streamed"] > sizes["cached"] > found("train.compile=true").peak_bytes
    unknown = found("distill=teacher", "distill.teacher.name=somebody/model")
    assert unknown.teacher_unknown and "teacher" not in unknown.parts


HELD_OUT = ("data.eval=[{path: rows.jsonl}]", "train.eval_every=1")
LOSS, _AHEAD = "training step, at the loss", "distill.teacher.steps_ahead="


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_guard_asks_its_teacher_where_it_measures_and_where_it_recovers(kind):
    plain, watched, recovering = (
        found(*HELD_OUT, *words, kind=kind).moments
        for words in ((), ("guard.max=0.1",), ("guard.max=0.1", "guard.action=recover"))
    )
    taught = found(*HELD_OUT, "distill=recover", kind=kind).moments
    teacher = teacher_bytes(run("distill=recover"))
    assert teacher and {moments[LOSS]["teacher"] for moments in (watched, recovering, taught)} == {teacher}
    # A guard that warns takes the teacher's probabilities at evaluations alone.
    assert watched[LOSS] == {**plain[LOSS], "teacher": teacher}
    assert watched["evaluation"] == recovering["evaluation"] == taught["evaluation"]
    assert sum(watched["evaluation"].values()) > sum(plain["evaluation"].values()) + teacher
    assert "asking the teacher" not in watched
    # One that recovers trains from them as a distilling run does, with moments of its own.
    assert recovering[LOSS] == {**taught[LOSS], "optimizer of a recovery": taught[LOSS]["optimizer"]}
    assert "asking the teacher" in recovering


def test_a_streamed_teacher_answers_all_sequences_of_a_step_at_once():
    signal = [
        found("distill=recover", "train.batch_size=8", f"distill.teacher.placement={place}", ahead).moments[LOSS][
            "teacher's signal"
        ]
        for place, ahead in (("resident", _AHEAD + "1"), ("streamed", _AHEAD + "1"), ("streamed", _AHEAD + "3"))
    ]
    assert signal == [1024 * 896 * 2, 8 * signal[0], 3 * signal[1]]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("shape", [SHAPE, QWEN25_SHAPES["7B"]], ids=["0.5B", "7B"])
@pytest.mark.parametrize("recomputed", [0, 5, 24])
def test_longer_sequences_larger_ranks_and_more_of_them_never_take_less(kind, shape, recomputed):
    def peaks(keys, micro=1):
        settings = (("train.compile=false", f"data.max_length={n}", f"lora.rank={rank}") for n, rank in keys)
        runs = (run(*words, shape=shape, kind=kind) for words in settings)
        return [predict_peak(inputs, micro, recomputed).peak_bytes for inputs in runs]

    for keys in ([(n, 8) for n in (64, 1024, 4096, 16384)], [(1024, rank) for rank in (1, 8, 64, 256)]):
        found = peaks(keys)
        assert found == sorted(found) and found[0] < found[-1]
    assert [peaks([(1024, 8)], micro)[0] for micro in (1, 2, 4)] == sorted(peaks([(1024, 8)], m)[0] for m in (1, 2, 4))


def test_every_moment_must_fit_not_only_the_highest():
    plan = found("distill=recover", recomputed=23)
    heavy = replace(plan, moments={"weights": {"teacher": 9e9}, "step": {"activations kept": 8.9e9}})
    assert heavy.peak_bytes == 9e9
    assert heavy.needed_bytes == pytest.approx(8.9e9 * (1 + MARGIN["gpu"]) + CONTEXT_BYTES)


def test_of_a_mapped_embedding_only_what_a_short_run_touches_is_resident():
    shape = QWEN25_SHAPES["7B"]
    short = ("data.max_length=64", "train.batch_size=1")
    long = ("data.max_length=4096", "train.max_steps=1000")

    def embedding(*words: str, kind: str) -> float:
        return predict_peak(run(*words, shape=shape, kind=kind), 1, 0).parts["embedding"]

    table = 2 * shape["vocab_size"] * shape["hidden_size"]
    assert embedding(*short, kind="cpu") == 2 * 64 * 65536 < table
    assert embedding(*short, kind="cuda") == embedding(*long, kind="cpu") == table


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("share", [1.2, 0.9, 0.6])
def test_what_is_chosen_to_fit_is_predicted_to_fit(kind, share):
    """The choice before loading and the prediction are one arithmetic."""
    inputs = run("train.batch_size=8", "data.max_length=512", kind=kind)
    first = predict_peak(inputs, 4, 0)
    free = share * first.needed_bytes
    plan = estimate_memory(inputs, free)
    assert plan.needed_bytes <= free
    assert choose_micro_batch(inputs, first.usable_bytes(free)).memory.recomputed == plan.recomputed


@pytest.mark.parametrize("name", [None, "Qwen/Qwen2.5-14B"])
def test_a_streamed_teachers_layers_are_on_a_cpu_only_while_it_is_asked_and_its_head_only_at_other_times(name):
    words = ["distill=teacher", f"distill.teacher.name={name}"] if name else ["distill=recover"]
    words += ["distill.teacher.placement=streamed", *HELD_OUT]
    layers, head = streamed_bytes(run(*words)), teacher_bytes(run(*words))
    assert layers and bool(head) == bool(name)
    on_cpu, on_gpu = (found(*words, kind=kind).moments for kind in ("cpu", "cuda"))
    assert on_cpu["asking the teacher"]["teacher"] == layers and on_cpu[LOSS].get("teacher", 0) == head
    assert {moments["teacher"] for moments in on_gpu.values()} == {layers + head}
