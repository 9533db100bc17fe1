"""Names of settings in TRL, PEFT, Axolotl, LLaMA-Factory, ms-swift and Unsloth, and in older versions of our own.

PEERS answers a peer's name with our key, and with the value or the difference where the meaning differs. A name that
both sides share is not listed. A name that has this meaning in one place only is listed with its whole path.
REFUSED answers a name with the reason why a run has no such setting. RENAMED answers an old key with the new one.
"""

from __future__ import annotations

# Our key -> the names of peers for it.
_NAMES = {
    "model.name": (
        "model_name_or_path model_name model_id model_id_or_path base_model base_model_name_or_path "
        "pretrained_model_name_or_path"
    ),
    "model.revision": "model_revision revision_of_model",
    "model.dtype": "torch_dtype",
    "model.dtype=bfloat16": "bf16 bfloat16 pure_bf16",
    "model.dtype=float16": "fp16 float16",
    "model.dtype=float32": "float32",
    "model.attention": "attn_implementation attn_impl",
    "model.attention=flash_attention_2": "flash_attn flash_attention use_flash_attention_2",
    "model.attention=sdpa": "sdp_attention",
    "model.attention=eager": "eager_attention",
    "quant.type=nf4": "load_in_4bit",
    "quant.type=int8": "load_in_8bit",
    "quant.type=none": "load_in_16bit",
    "quant.type (4 is nf4, 8 is int8)": "quantization_bit quant_bits",
    "quant.type": "quantization_type quantization_config bnb_4bit_quant_type",
    "quant.type, quant.double and quant.compute_dtype": "bnb_config_kwargs",
    "quant.double": "bnb_4bit_use_double_quant use_bnb_nested_quant double_quantization",
    "quant.compute_dtype": "bnb_4bit_compute_dtype",
    "quant.skip_modules": "llm_int8_skip_modules",
    "distill.teacher.name": "teacher_model teacher_model_name_or_path",
    "distill.teacher.revision": "teacher_model_revision",
    "distill.teacher.url": "teacher_model_server_url",
    "distill.teacher.dtype": "teacher_model_init_kwargs",
    "distill.on_policy": "lmbda seq_kd",
    "distill.weight": "kd_alpha kd_ratio",
    "distill.weight (the loss on the rows weighs 1)": "kd_ce_alpha",
    "distill.temperature": "kd_temperature",
    "distill.objective=distill": "kd_trainer rlhf_type",
    "distill.top_k": "gkd_logits_topk logprobs_chunk loss_top_k",
    "lora.rank": "r lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.target_modules": "lora_target lora_target_modules",
    "lora.target_modules=all-linear": "lora_target_linear",
    "lora.target_modules (a text is a regex)": "target_regex",
    "lora.layers_to_transform": "peft_layers_to_transform",
    "lora.rslora": "use_rslora peft_use_rslora",
    "lora.dora": "use_dora peft_use_dora",
    "lora.init": "init_lora_weights peft_init_lora_weights",
    "lora.init=pissa": "pissa_init",
    "lora.init=loftq": "loftq_config",
    "lora.modules_to_save": "lora_modules_to_save additional_target",
    "lora.init_adapter": "lora_model_dir adapter_name_or_path adapters",
    "lora.new_tokens": (
        "add_tokens add_special_tokens additional_special_tokens new_special_tokens trainable_token_indices "
        "peft_trainable_token_indices"
    ),
    "lora.new_tokens (the embedding grows by itself)": (
        "resize_vocab resize_token_embeddings resize_token_embeddings_to_32x"
    ),
    "quant.type (qlora is nf4, lora is none); the adapter itself is lora.rank, lora.alpha and so on": "adapter",
    "quant.type (every run trains a LoRA adapter)": "finetuning_type train_type tuner_type sft_type",
    "lora.rank (every run trains a LoRA adapter)": "use_peft",
    "data.train=[{path: rows.jsonl}]": "dataset datasets dataset_name dataset_path train_dataset train_file data_path",
    "data.train=[{path: folder/rows.jsonl}]": "dataset_dir",
    "path, in an item of data.train": "data_files hf_hub_url file_name",
    "subset, in an item of data.train": "dataset_config dataset_config_name subset_name",
    "revision, in an item of data.train": "dataset_revision",
    "split, in an item of data.train": "dataset_train_split",
    "split, in an item of data.eval": "dataset_test_split",
    "format, in an item of data.train": "formatting ds_type data.train.*.type dataset_type",
    "columns={text: THEIRS}, in an item of data.train": "dataset_text_field text_column field",
    "columns={instruction: THEIRS}, in an item of data.train": "field_instruction",
    "columns={input: THEIRS}, in an item of data.train": "field_input",
    "columns={output: THEIRS}, in an item of data.train": "field_output",
    "columns={system: THEIRS}, in an item of data.train": "field_system",
    "columns={tools: THEIRS}, in an item of data.train": "field_tools",
    "columns={messages: THEIRS}, in an item of data.train": "field_messages",
    "columns and roles, in an item of data.train": "message_property_mappings tags",
    "roles={user: THEIRS}, in an item of data.train": "user_tag",
    "roles={assistant: THEIRS}, in an item of data.train": "assistant_tag function_tag",
    "roles={system: THEIRS}, in an item of data.train": "system_tag",
    "roles={tool: THEIRS}, in an item of data.train": "observation_tag",
    "data.eval=[{path: rows.jsonl}]": "eval_dataset val_dataset test_datasets validation_file",
    "data.held_out (a share, from 0 to 1)": "val_set_size val_size split_dataset_ratio test_size",
    "limit, in an item of data.train": "max_samples",
    "weight, in an item of data.train": "interleave_probs mix_strategy",
    "data.stream_rows (rows read at a time)": (
        "streaming buffer_size shuffle_buffer_size streaming_multipack_buffer_size"
    ),
    "data.workers": "dataset_num_proc dataset_processes preprocessing_num_workers num_proc",
    "data.cache": "dataset_prepared_path tokenized_path",
    "data.on_bad_row=skip": "skip_bad_rows",
    "data.max_length": "cutoff_len sequence_len max_seq_length max_seq_len model_max_length",
    "data.packing": "sample_packing neat_packing padding_free batch_flattening",
    "data.packing=false (sequences are never padded to data.max_length)": "pad_to_sequence_len pad_to_max_length",
    "data.truncation": "truncation_mode truncation_strategy excess_length_strategy",
    "data.train_on=all": "train_on_inputs train_on_prompt",
    "data.train_on=assistant": "completion_only_loss assistant_only_loss",
    "data.train_on": "roles_to_train loss_scale",
    "data.train_on=last": "mask_history",
    "data.system": "default_system default_system_message system_prompt",
    "data.chat_template (null is the tokenizer's own)": "template",
    "data.chat_template": "chat_template_path chat_template_jinja",
    "train.epochs": "num_epochs num_train_epochs",
    "train.max_steps": "num_steps total_steps max_iters",
    "train.learning_rate": "lr",
    "train.schedule": "lr_scheduler lr_scheduler_type",
    "train.warmup_steps": "num_warmup_steps",
    "train.batch_size (sequences a step over all ranks)": "train_batch_size total_batch_size global_batch_size",
    "train.micro_batch_size": (
        "per_device_batch_size per_device_train_batch_size per_device_eval_batch_size eval_batch_size"
    ),
    "train.batch_size (accumulation is batch_size / (micro_batch_size * ranks))": (
        "gradient_accumulation_steps grad_accum"
    ),
    "train.max_grad_norm": "gradient_clipping clip_grad_norm",
    "train.beta1": "adam_beta1",
    "train.beta2": "adam_beta2",
    "train.eps": "adam_epsilon",
    "train.optimizer": "optim",
    "train.lora_plus_ratio": "loraplus_lr_ratio lorap_lr_ratio",
    "train.min_lr_ratio": "cosine_min_lr_ratio min_lr_rate",
    "train.neftune_alpha": "neftune_noise_alpha",
    "train.gradient_checkpointing=all": "activation_checkpointing use_gradient_checkpointing",
    "train.gradient_checkpointing=offload": "activation_offloading",
    "train.gradient_checkpointing=none": "disable_gradient_checkpointing",
    "train.eval_every": "eval_steps eval_strategy evaluation_strategy",
    "train.eval_every (steps)": "evals_per_epoch",
    "train.save_every": "save_steps save_strategy",
    "train.save_every (steps)": "saves_per_epoch",
    "train.keep_checkpoints": "save_total_limit",
    "train.keep_checkpoints (the best checkpoint is always kept)": "load_best_model_at_end",
    "train.early_stopping": "early_stopping_patience",
    "train.resume": "resume_from_checkpoint",
    "train.resume=auto": "auto_resume_from_checkpoints",
    "train.seed": "random_seed random_state data_seed",
    "train.world_size (a check; the launcher starts the ranks)": "nproc_per_node num_processes",
    "parallel.shard (full_shard is full, hybrid_shard is hybrid)": (
        "fsdp fsdp_config fsdp_version fsdp_sharding_strategy sharding_strategy"
    ),
    "parallel.shard=full": "dp_shard_size data_parallel_shard_degree",
    "parallel.shard=hybrid (a copy per machine)": "dp_replicate_size data_parallel_replicate_degree",
    "parallel.offload": "fsdp_offload_params offload_params fsdp_cpu_offload offload_param",
    "generation.max_new_tokens": "eval_max_new_tokens",
    "generation.samples": "eval_table_size",
    "generation.num_examples": "predict_with_generate",
    "track.wandb, track.tensorboard, track.mlflow or track.trackio": "report_to",
    "track.wandb": "use_wandb",
    "track.tensorboard": "use_tensorboard",
    "track.mlflow": "use_mlflow",
    "track.mlflow (and the environment's MLFLOW_TRACKING_URI)": "mlflow_tracking_uri",
    "track.trackio": "use_trackio",
    "track.project": "wandb_project mlflow_experiment_name trackio_project_name",
    "track.run_name": "wandb_name wandb_run_name wandb_run_id mlflow_run_name trackio_run_name",
    "track.wandb (and the environment's WANDB_MODE)": "wandb_mode",
    "output_dir": "output_path output_folder out_dir save_dir logging_dir",
    "output_dir (of a new folder) or train.resume": "overwrite_output_dir",
}

PEERS = {name: ours for ours, names in _NAMES.items() for name in names.split()}

# Why a run has no such setting -> the names of peers for it.
_REASONS = {
    "a config names no code to run": "_target_ _recursive_ _partial_ _convert_ _args_",
    "a config names no code to run; pass reward_function=FILE.py:NAME to finetune train": (
        "reward_function reward_functions reward_funcs"
    ),
    "a run never executes code from a model or dataset": "trust_remote_code custom_register_path plugins",
    "secrets come from the environment (HF_TOKEN, WANDB_API_KEY), never from a config": (
        "token use_auth_token hub_token hf_token hf_hub_token wandb_api_key api_key"
    ),
    "the launcher chooses devices and ranks, see launch/accelerate": "ddp_backend ddp_timeout local_rank device_map",
    "torch's FSDP2 shares the base, not DeepSpeed; set parallel.shard=full in place of ZeRO-3": (
        "deepspeed deepspeed_config deepspeed_plugin zero_stage zero_optimization"
    ),
    "there is no tensor parallelism; parallel.shard=full shares the base over GPUs": (
        "tensor_parallel_size tensor_parallel tensor_model_parallel_size tp_size tp_plan"
    ),
    "there is no pipeline parallelism; parallel.shard=full shares the base over GPUs": (
        "pipeline_parallel_size pipeline_model_parallel_size pp_size"
    ),
    "a sequence lies on one GPU; train.gradient_checkpointing=offload makes room for long ones": (
        "context_parallel_size cp_size sequence_parallel_size sequence_parallel_degree sequence_parallel sp_size"
    ),
    "no supported model has experts": "expert_parallel_size expert_model_parallel_size ep_size",
    "every step writes a line to metrics.jsonl": "logging_steps logging_strategy",
    "the token cache is keyed by the content of rows and settings, so it is never stale": (
        "overwrite_cache load_from_cache_file skip_prepare_dataset"
    ),
    "a run uploads nothing; the adapter is in output_dir": "push_to_hub hub_model_id hub_strategy",
}

REFUSED = {name: reason for reason, names in _REASONS.items() for name in names.split()}

# Old keys by their whole path.
RENAMED = {
    "train.recompute": "train.gradient_checkpointing",
    "train.lean": "train.share_prefixes",
    "train.fast": "train.kernels (true: fused, false: peft)",
    "train.keep": "train.keep_checkpoints",
    "train.warmup": "train.warmup_ratio (a share of the steps) or train.warmup_steps (a number of steps)",
    "quant.keep": "quant.skip_modules",
    "quant.resident": "quant.keep_dequantized",
    "distill.head": "distill.top_k",
    "distill.samples": "distill.num_samples",
    "distill.tier": "distill.cache_kind",
    "generation.rows": "generation.num_examples",
}
