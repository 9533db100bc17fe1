"""Sizes and thresholds that the kernels and the memory planner share. This module imports no torch.

Dicts have a value per `accelerator.table_key`. "Values" are elements of a tensor, whatever their dtype.
"""

from __future__ import annotations

# Logits alive at once (losses/chunked.py). 2**25 are 64 MB in bf16, 220 rows of Qwen2.5-0.5B. Half of it costs 5 % of
# the step, twice of it gains next to nothing. A GPU needs more rows, or reading the head sets the pace: 220 rows of
# Qwen2.5-7B take 1.3 times as long for their product as for reading it, 110 rows 0.6 times (an H200, by bytes and
# operations). Gradient checkpointing of a GPU, all and offload, trades that time for memory.
LOGITS_VALUES = {"cpu": 2**25, "gpu": 2**26, "all": 2**25, "offload": 2**24}
# Logits per block of softmax and divergence, per thread on a CPU: 2 MB in fp32, about one core's cache. A [128, 151936]
# chunk in bf16 takes 115 ms on one thread in one piece, mostly page faults, and 30 ms in blocks. Forward KL on
# [220, 151665] takes 140 ms (79 ms compiled); half this size 147 (86), twice this size 190 (79).
# A GPU has no such cache: there a block only bounds the temporary of a divergence.
SOFTMAX_BLOCK_VALUES = {"cpu": 2**19, "gpu": 2**24}
# Values per block of an elementwise kernel that runs as plain torch on a GPU, where it holds up to 34 bytes per value.
PLAIN_BLOCK_VALUES = 2**22
# Rows of a forward pass and tokens of a document are padded to a multiple. CPU kernels are compiled for each shape.
ROWS_MULTIPLE, DOCUMENT_TOKENS_MULTIPLE = 64, 32
# From this document length in tokens on, torch's fused attention backward is as fast as that of ops/attention.py.
FUSED_ATTENTION_FROM_TOKENS = 513
# Queries per block of the attention backward pass on a CPU.
QUERIES_PER_BLOCK = 128
# Rows per pass of the fused MLP on a CPU. With more, the allocator maps the inner matrices anew each time (10 % of a
# layer's time at 16,384 rows), and a backward pass holds up to 17 of them.
MLP_ROWS = 2048
# The same without gradients and with 16-bit weights: five inner matrices are alive, the largest of a layer.
MLP_FORWARD_ROWS = 256
# On a GPU, the MLP of a checkpointed layer runs some rows at a time: at least these, by train.gradient_checkpointing,
# and an eighth of long packs. A tile dequantizes eight matrices again: 7 % of its time with 3,072 rows on an H200, 20 %
# with 1,024 (by their bytes and operations).
MLP_TILE_ROWS, MLP_TILES, MLP_MOST_TILE_ROWS = {"all": 3072, "offload": 1024}, 8, 16384
# Work of a run, in floating-point operations, that repays the half minute of a first compilation: 0.5 billion
# parameters and 100,000 tokens.
COMPILE_FROM_FLOPS = 2e14
# Tokens per forward pass of an evaluation; a longer document is evaluated alone.
EVALUATION_TOKENS = 4096
# Batches per request to a teacher in an evaluation: a streamed teacher reads its layers once per request.
TEACHER_BATCHES = 16
# The most answers of a sampled batch, and the most tokens of its prompts and answers. The key-value cache of so many
# takes 0.9 GB at 7B; larger batches are hardly faster.
SAMPLED_ANSWERS, SAMPLED_TOKENS = 64, 2**14
# Rows whose distributions are copied at once: 20 MB with Qwen2.5's vocabulary.
ROWS_DRAWN = 32
# Gradients that ranks exchange at a time, as torch's DistributedDataParallel: enough for the full rate of a link.
GRADIENT_BUCKET_BYTES = 25 * 2**20
