"""A streamed teacher gives a resident one's bits in the memory of two layers, and cleans up after failures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from finetune.config.schema import ModelConfig, QuantConfig
from finetune.data.batch import Batch, build_batch, dummy_batch
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.distill import layer_reader
from finetune.distill.stream import StreamedModel
from finetune.losses.hidden_states import target_states
from finetune.models.adapters.files import load_adapter
from finetune.models.fused import fuse_layers
from finetune.models.load import load_base
from finetune.models.safetensors_index import Stored
from finetune.ops import attention
from finetune.system.errors import ConfigError, IntegrityError

WORDS, WIDTH = 97, 64
CPU = torch.device("cpu")
PLAIN = QuantConfig(type="none", double=False)


def write_model(folder: Path, *, layers: int = 3, tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random model in shards that cut through its layers; biases and norms are random too."""
    attention.register()
    torch.manual_seed(layers)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=WORDS,
            hidden_size=WIDTH,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def document(length: int, seed: int, opening: int = 0) -> Document:
    """Random tokens after `opening` that all documents share; every third position carries a target."""
    ids = np.random.default_rng(seed).integers(WORDS, size=length, dtype=np.int32)
    ids[:opening] = np.arange(opening)
    labels = np.where(np.arange(length) % 3 == 0, np.roll(ids, -1), IGNORE_INDEX).astype(np.int32)
    return Document(ids, labels, f"rows:{seed}")


def macro_batch() -> list[Batch]:
    """Packed documents, documents that share rows, none with a target, a single one of another length."""
    shared = build_batch([document(60, 1, opening=40), document(50, 2, opening=40)], share_prefixes=True)
    assert shared.rows < shared.tokens
    packed = build_batch([document(40, 3), document(90, 4), document(5, 5)])
    return [packed, shared, dummy_batch(document(4, 6)), build_batch([document(130, 7)])]


def resident_states(cfg: ModelConfig, batches: list[Batch], adapter: Path | None = None) -> list[Tensor]:
    """The hidden states of the whole model in memory at the targets."""
    model: nn.Module = load_base(cfg, PLAIN, CPU)
    if adapter is not None:
        model = load_adapter(model, adapter)
    fuse_layers(model)
    with torch.no_grad():
        return [target_states(model, batch).hidden_ND for batch in batches]


def streamed(cfg: ModelConfig, adapter: Path | None = None) -> StreamedModel:
    return StreamedModel(cfg, CPU, adapter)


def assert_equal_states(found: list[Tensor], expected: list[Tensor]) -> None:
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def assert_nothing_left(model: StreamedModel) -> None:
    """No layer has storage, no thread that read is alive."""
    assert all(parameter.is_meta for layer in model._layers for parameter in layer.parameters())
    assert not [thread.name for thread in threading.enumerate() if "teacher" in thread.name]


@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("stored", "dtype"), [("bfloat16", "bfloat16"), ("float32", "float32"), ("float32", "bfloat16")]
)
def test_hidden_states_equal_a_resident_models_bit_for_bit(layers, tied, stored, dtype, tmp_path, monkeypatch):
    # So small that every matrix is read in several pieces.
    monkeypatch.setattr(layer_reader, "_PIECE_BYTES", 1 << 12)
    write_model(tmp_path, layers=layers, tied=tied, dtype=getattr(torch, stored))
    cfg = ModelConfig(name=str(tmp_path), dtype=dtype)
    batches = macro_batch()
    expected = resident_states(cfg, batches)
    model = streamed(cfg)
    assert expected[0].dtype == getattr(torch, dtype) and expected[2].shape == (0, WIDTH)
    assert_equal_states(model.hidden_states(batches), expected)
    assert_equal_states(model.hidden_states(batches[1:]), expected[1:])
    assert_nothing_left(model)
    head = load_base(cfg, PLAIN, CPU).get_output_embeddings()
    assert torch.equal(model.head(expected[0]), head(expected[0]))
    assert model.head is model.head and not any(p.requires_grad for p in model.head.parameters())


def test_a_pass_reads_each_layer_once_and_only_the_needed_embedding_rows(tmp_path):
    model = streamed(ModelConfig(name=str(write_model(tmp_path, layers=4)), dtype="bfloat16"))
    batches = [build_batch([document(40, 1)]), build_batch([document(30, 2)])]
    model.hidden_states(batches)
    sizes = {name: tensor.nbytes for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    layers = sum(size for name, size in sizes.items() if ".layers." in name)
    used = len(torch.unique(torch.cat([batch.input_ids for batch in batches], dim=1)))
    assert used < WORDS
    assert model.read_bytes == layers + used * WIDTH * 2


def test_the_next_layer_is_read_while_this_one_computes(tmp_path, monkeypatch):
    model = streamed(ModelConfig(name=str(write_model(tmp_path))))
    last = list(model._slots[1])[-1]
    place = model._files.tensors[f"model.layers.1.{last}"]
    read, touch = threading.Event(), layer_reader.Reads._touch

    def tell(reads, stored, raw, start):
        touch(reads, stored, raw, start)
        if stored == place:
            read.set()

    monkeypatch.setattr(layer_reader.Reads, "_touch", tell)
    waited = []
    model._layers[0].register_forward_pre_hook(lambda *_: waited.append(read.wait(60)))
    model.hidden_states(macro_batch()[:1])
    assert waited == [True]


def write_adapter(folder: Path, base: Path, **settings) -> Path:
    """An adapter of random factors, as PEFT saves it."""
    model = load_base(ModelConfig(name=str(base)), PLAIN, CPU)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=7, **settings))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.5},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["down_proj"], "modules_to_save": ["input_layernorm"], "use_rslora": True},
    ],
)
def test_a_streamed_adapter_equals_a_resident_one(settings, tmp_path):
    base = write_model(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base, **settings)
    cfg, batches = ModelConfig(name=str(base)), macro_batch()
    expected = resident_states(cfg, batches, adapter)
    assert not torch.equal(expected[0], resident_states(cfg, batches)[0])
    model = streamed(cfg, adapter)
    assert_equal_states(model.hidden_states(batches), expected)
    real = [name for name, parameter in model._base.named_parameters() if ".layers." in name and not parameter.is_meta]
    assert real and all("lora_" in name or "modules_to_save" in name for name in real)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
        {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    ],
)
def test_an_adapter_on_more_than_decoder_layers_is_refused_with_help(settings, tmp_path):
    base = write_model(tmp_path / "base", dtype=torch.float32)
    adapter = write_adapter(tmp_path / "adapter", base, **settings)
    with pytest.raises(ConfigError, match=r"distill\.teacher\.placement=resident"):
        streamed(ModelConfig(name=str(base)), adapter)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    base = write_model(tmp_path / "base")
    other = write_adapter(tmp_path / "adapter", write_model(tmp_path / "other", layers=4), target_modules=["q_proj"])
    with pytest.raises(IntegrityError, match=r"does not fit the teacher.* .*layers\.3\."):
        streamed(ModelConfig(name=str(base)), other)


def shorten(place: Stored) -> None:
    with place.file.open("r+b") as stream:
        stream.truncate(place.offset + 10)


def rewrite(place: Stored) -> None:
    tensors = {name: tensor + 1 for name, tensor in load_file(place.file).items()}
    save_file(tensors, place.file, metadata={"format": "pt"})


def remove(place: Stored) -> None:
    place.file.unlink()


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (shorten, IntegrityError, "too short for its header"),
        (rewrite, IntegrityError, "changed while"),
        (remove, FileNotFoundError, "No such file"),
    ],
)
def test_a_changed_file_ends_the_pass_and_cleans_up(damage, error, says, tmp_path):
    model = streamed(ModelConfig(name=str(write_model(tmp_path, layers=5))))
    # Of the last layer: read long after the pass began.
    place = model._files.tensors["model.layers.4.mlp.up_proj.weight"]
    handle = model._layers[0].register_forward_pre_hook(lambda *_: damage(place))
    with pytest.raises(error, match=says):
        model.hidden_states(macro_batch()[:1])
    assert_nothing_left(model)
    handle.remove()
    # Nor does the next pass go through files that are other ones than the model was opened with.
    with pytest.raises(IntegrityError, match="changed while"):
        model.hidden_states(macro_batch()[:1])


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_pass_can_be_repeated(failure, tmp_path):
    cfg = ModelConfig(name=str(write_model(tmp_path, layers=5)))
    model, batches = streamed(cfg), macro_batch()

    def fail(*_):
        raise failure

    handle = model._layers[2].register_forward_pre_hook(fail)
    with pytest.raises(failure):
        model.hidden_states(batches)
    assert_nothing_left(model)
    handle.remove()
    assert_equal_states(model.hidden_states(batches), resident_states(cfg, batches))


def test_unsupported_settings_of_a_streamed_teacher_are_refused_early(tmp_path):
    write_model(tmp_path, layers=2)
    with pytest.raises(ConfigError, match=r"model\.attention: .*sdpa"):
        streamed(ModelConfig(name=str(tmp_path), attention="sdpa"))
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 128', '"intermediate_size": 136'))
    with pytest.raises(IntegrityError, match="other tensors than its config"):
        streamed(ModelConfig(name=str(tmp_path)))


# Sixteen layers of 12.3 MB and, as in every Qwen2.5, a head larger than two of them: three times what the test allows.
LARGE = {
    "vocab_size": 30_000,
    "hidden_size": 512,
    "intermediate_size": 3584,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 16,
    "tie_word_embeddings": False,
}
LENGTHS = (64, 50, 40)
UNDER_A_LIMIT = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from finetune.config.schema import ModelConfig
from finetune.distill.stream import StreamedModel
from finetune.system.errors import ResourceError
from finetune.models.load import load_base
from finetune.models.safetensors_index import Stored
from tests.unit.distill.test_stream import CPU, LENGTHS, PLAIN, build_batch, document

small, large, out, allowed_bytes = *sys.argv[1:4], int(sys.argv[4])
batches = [build_batch([document(length, seed)]) for seed, length in enumerate(LENGTHS)]

def stream(folder):
    model = StreamedModel(ModelConfig(name=folder), CPU)
    for _ in range(2):  # the second pass begins with a head that was used
        hidden = model.hidden_states(batches)
        model.head.weight.amax()  # touches all of it; a matrix product would add memory of its own
    return model, hidden

def load(folder):
    return [parameter.clone() for parameter in load_base(ModelConfig(name=folder), PLAIN, CPU).parameters()]

def memory():
    rows = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[-1] == "kB"}

stream(small), load(small)  # what libraries and threads take is there from here on
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
before = memory()
resource.setrlimit(resource.RLIMIT_DATA, (before["VmData"] + allowed_bytes,) * 2)
model, hidden = stream(large)
print("peak:", memory()["VmHWM"] - before["VmRSS"])
save_file({"hidden": torch.cat(hidden), "logits": model.head(hidden[0])}, out)
try:
    load(large)
except (ResourceError, MemoryError, RuntimeError) as error:
    print("resident:", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux alone")
def test_a_model_larger_than_memory_streams_through_it(repo_root, tmp_path):
    small, large, out = write_model(tmp_path / "small"), tmp_path / "large", tmp_path / "out.safetensors"
    torch.manual_seed(0)
    model = Qwen2ForCausalLM._from_config(Qwen2Config(**LARGE), dtype=torch.bfloat16)
    # Opening a shard maps it for a moment, which a limit counts: small ones.
    model.save_pretrained(large, max_shard_size="6MB")
    layer_bytes = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    states_bytes = sum(LENGTHS) * LARGE["hidden_size"] * 2
    # What a batch's activations take, torch's kernels, the skeleton, lies within: layers and head are never in at once.
    allowed_bytes = 2 * layer_bytes + model.lm_head.weight.nbytes + states_bytes
    assert 3 * allowed_bytes < sum(p.nbytes for p in model.parameters())
    command = [sys.executable, "-c", UNDER_A_LIMIT, str(small), str(large), str(out), str(allowed_bytes)]
    # One arena of the heap: how many threads open one depends on how busy the machine is, and the limit counts them.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "PYTHONPATH": str(repo_root)}
    done = subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resident:" in done.stdout and "allocate memory" in done.stdout
    # The limit counts what is the process's own; its peak counts mapped pages of files too.
    peak_bytes = int(re.search(r"peak: (\d+)", done.stdout)[1])
    assert model.lm_head.weight.nbytes < peak_bytes < allowed_bytes
    batches = [build_batch([document(length, seed)]) for seed, length in enumerate(LENGTHS)]
    expected = resident_states(ModelConfig(name=str(large)), batches)
    found = load_file(out)
    assert torch.equal(found["hidden"], torch.cat(expected))
    assert torch.equal(found["logits"], model.lm_head(expected[0]))
