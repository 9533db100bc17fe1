# Two GPUs; the accumulation is computed by the shell.
nproc_per_node=2

CUDA_VISIBLE_DEVICES=0,1 \
NPROC_PER_NODE=$nproc_per_node \
swift sft \
    --model Qwen/Qwen2.5-7B-Instruct \
    --train_type lora \
    --dataset rows.jsonl \
    --val_dataset heldout.jsonl#200 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 4 \
    --max_length 4096 \
    --packing true \
    --learning_rate 1e-4 \
    --gradient_accumulation_steps $(expr 16 / $nproc_per_node) \
    --eval_steps 50 \
    --early_stop_interval 3 \
    --use_liger_kernel true
