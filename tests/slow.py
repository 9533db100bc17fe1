"""The one list of slow tests. `bash launch/test.sh` leaves them out; `.ci/run` and `-m "slow or not slow"` run them."""

from __future__ import annotations

# A test file, a test, or one case of a test -> the fast test that holds the same law in every run of the suite.
SLOW: dict[str, str] = {
    "tests/unit/sweep/test_auto.py::test_a_search_that_is_killed_at_any_moment_makes_the_same_choices[1]": (
        "tests/unit/sweep/test_auto.py::test_a_search_that_is_killed_at_any_moment_makes_the_same_choices"
    ),
    "tests/unit/sweep/test_auto.py::test_a_search_that_is_killed_at_any_moment_makes_the_same_choices[2]": (
        "tests/unit/sweep/test_auto.py::test_a_search_that_is_killed_at_any_moment_makes_the_same_choices"
    ),
    "tests/unit/sweep/test_auto.py::test_a_search_that_is_killed_at_any_moment_makes_the_same_choices[3]": (
        "tests/unit/sweep/test_auto.py::test_a_search_that_is_killed_at_any_moment_makes_the_same_choices"
    ),
    "tests/unit/sweep/test_auto.py::test_a_search_that_is_killed_at_any_moment_makes_the_same_choices[4]": (
        "tests/unit/sweep/test_auto.py::test_a_search_that_is_killed_at_any_moment_makes_the_same_choices"
    ),
    "tests/integration/test_other_device.py::test_a_run_there_learns_as_on_the_cpu": (
        "tests/integration/test_other_device.py::test_the_device_computes_and_refuses_tensors_of_the_cpu"
    ),
    "tests/families/test_exports.py::test_an_onnx_graph_computes_the_logits_of_its_source": (
        "tests/families/test_exports.py::test_a_gguf_file_is_read_back_with_the_logits_of_its_source"
    ),
    "tests/cuda_trace/test_trace.py::test_other_paths_keep_the_laws": (
        "tests/cuda_trace/test_trace.py::test_a_path_keeps_the_laws"
    ),
    "tests/cuda_trace/test_trace.py::test_the_plan_is_what_is_allocated": (
        "tests/cuda_trace/test_trace.py::test_a_path_keeps_the_laws"
    ),
    "tests/cuda_trace/test_trace.py::test_launches_a_layer": (
        "tests/cuda_trace/test_trace.py::test_a_path_keeps_the_laws"
    ),
    "tests/cuda_trace/test_trace.py::test_bytes_a_token": "tests/cuda_trace/test_trace.py::test_a_path_keeps_the_laws",
    "tests/cuda_trace/test_roofline.py::test_the_modeled_share_of_an_h200": (
        "tests/cuda_trace/test_roofline.py::test_operations_and_bytes"
    ),
    "tests/integration/test_flower.py": (
        "tests/unit/test_flower_app.py::test_rounds_leave_out_a_dropped_party_by_name_and_send_a_once"
    ),
    "tests/integration/test_benchmarks.py": "tests/unit/benchmarks/test_accounting.py",
    "tests/equivalence/test_federation.py": "tests/unit/federation/test_aggregate.py",
    "tests/equivalence/test_traffic.py": (
        "tests/unit/planning/test_communication.py::test_a_step_gathers_each_layer_twice_a_pass_and_both_tables_once"
    ),
    "tests/equivalence/test_serving_http.py::test_greedy_answers_of_a_mixed_batch_are_those_of_generate": (
        "tests/equivalence/test_serving_engine.py::test_base_and_adapters_in_one_batch_answer_as_generate"
    ),
    "tests/unit/serving/http/test_fuzz.py::test_requests_by_the_document": (
        "tests/unit/serving/http/test_fuzz.py::test_bodies_with_a_part_replaced"
    ),
    "tests/integration/test_notebooks.py::test_a_notebook_runs_from_top_to_bottom[02_your_own_data]": (
        "tests/integration/test_notebooks.py::test_a_notebook_runs_from_top_to_bottom"
    ),
    "tests/integration/test_notebooks.py::test_a_notebook_runs_from_top_to_bottom[03_distill_and_gap]": (
        "tests/integration/test_notebooks.py::test_a_notebook_runs_from_top_to_bottom"
    ),
    "tests/integration/test_notebooks.py::test_a_notebook_runs_from_top_to_bottom[04_merge_and_export]": (
        "tests/integration/test_notebooks.py::test_a_notebook_runs_from_top_to_bottom"
    ),
    "tests/integration/test_notebooks.py::test_a_notebook_runs_from_top_to_bottom[05_preferences_and_rewards]": (
        "tests/integration/test_notebooks.py::test_a_notebook_runs_from_top_to_bottom"
    ),
    "tests/integration/test_notebooks.py::test_a_notebook_runs_from_top_to_bottom[06_pictures_and_sounds]": (
        "tests/integration/test_notebooks.py::test_a_notebook_runs_from_top_to_bottom"
    ),
    "tests/integration/test_quickstart_media.py": "tests/unit/test_sample_media.py",
    "tests/integration/test_mixed_precision.py": "tests/unit/mixed_precision/test_choose.py",
    "tests/integration/test_tiny_base.py": "tests/unit/test_sample_data.py",
    "tests/integration/test_tiny_omni.py": "tests/unit/test_sample_media.py",
    "tests/unit/migration/test_migrate.py::test_the_written_config_trains_a_step": (
        "tests/unit/migration/test_migrate.py::test_a_config_becomes_the_same_training"
    ),
    "tests/unit/planning/test_starter.py::test_the_config_of_any_file_trains_a_step": (
        "tests/unit/planning/test_starter.py::test_the_config_of_any_file_loads_and_fits"
    ),
    "tests/integration/test_sweep.py": "tests/unit/sweep/test_sweep.py",
    "tests/integration/test_launchers.py": "tests/integration/test_launch_files.py",
    **dict.fromkeys(
        (
            "tests/integration/test_serve.py::test_the_base_and_three_adapters_answer_as_they_were_trained",
            "tests/integration/test_serve.py::test_two_commands_lead_from_data_to_an_answer",
            "tests/integration/test_serve.py::test_a_drifted_gguf_and_a_wrong_adapter_are_refused_with_figures",
        ),
        "tests/unit/serving/test_probe.py::test_the_embedded_engine_answers_as_the_run_recorded",
    ),
    **dict.fromkeys(
        (
            "tests/equivalence/test_media_runs.py::test_two_ranks_equal_one",
            "tests/equivalence/test_media_runs.py::test_the_same_weights_teach_what_quantization_lost",
            "tests/equivalence/test_media_runs.py::test_preferences_between_answers_to_media_are_learned",
            "tests/equivalence/test_media_runs.py::test_rewards_of_sampled_answers_to_media_are_learned_from",
        ),
        "tests/parity/test_media_models.py::test_packed_documents_are_computed_as_if_alone",
    ),
    "tests/equivalence/test_busy_machine.py": (
        "tests/unit/ops/test_attention.py::test_gradients_of_shared_rows_have_the_same_bits_with_many_threads"
    ),
    "tests/equivalence/test_deterministic_operations.py::test_other_trainings": (
        "tests/equivalence/test_deterministic_operations.py::test_training_with_evaluations"
    ),
    "tests/parity/test_training_curve.py": "tests/parity/test_fused_layers.py",
    "tests/parity/test_trainers.py::test_two_ranks_equal_one_without_fused_layers": (
        "tests/parity/test_trainers.py::test_sft_trainer_gives_the_same_losses_and_weights"
    ),
    "tests/equivalence/test_resume.py::test_kills_at_random_moments_give_the_same_adapter_and_metrics[10-40]": (
        "tests/equivalence/test_resume.py::test_kills_at_random_moments_give_the_same_adapter_and_metrics"
    ),
    "tests/faults/test_kills.py::test_every_command_survives_kills": (
        "tests/faults/test_kills.py::test_killed_commands_end_in_the_files_of_undisturbed_ones"
    ),
    "tests/faults/test_damage.py::test_no_damage_is_missed": (
        "tests/faults/test_damage.py::test_a_reader_that_checks_nothing_loses_cases"
    ),
    "tests/faults/test_disk.py::test_a_failing_disk_leaves_the_old_state_or_the_new_one": (
        "tests/faults/test_disk.py::test_a_save_that_is_not_one_rename_loses_cases"
    ),
    "tests/faults/test_places.py": (
        "tests/equivalence/test_resume.py::test_a_corrupt_checkpoint_is_skipped_and_the_result_is_the_same"
    ),
    "tests/equivalence/test_resume.py::test_a_killed_run_on_preferences_keeps_its_reference": (
        "tests/equivalence/test_preference.py::test_a_resumed_run_equals_an_unbroken_one"
    ),
    "tests/equivalence/test_on_policy.py::test_two_ranks_write_the_same_answers_as_one": (
        "tests/equivalence/test_ranks.py::test_two_ranks_equal_one"
    ),
    "tests/equivalence/test_preference.py::test_two_ranks_equal_one": (
        "tests/equivalence/test_ranks.py::test_two_ranks_equal_one"
    ),
    "tests/equivalence/test_rewards.py::test_two_ranks_equal_one": (
        "tests/equivalence/test_ranks.py::test_two_ranks_equal_one"
    ),
    "tests/equivalence/test_distillation.py::test_two_ranks_equal_one": (
        "tests/equivalence/test_ranks.py::test_two_ranks_equal_one"
    ),
    "tests/equivalence/test_sharding_objectives.py": "tests/unit/parallel/test_in_step.py::test_two_ranks",
    "tests/integration/test_data_command.py::test_a_reader_that_goes_early_gets_no_traceback": (
        "tests/unit/test_cli.py::test_a_reader_that_has_gone_is_no_bug"
    ),
    "tests/integration/test_data_command.py::test_without_colors_it_says_the_same": (
        "tests/integration/test_data_command.py::test_a_terminal_gets_colors"
    ),
    "tests/integration/test_launch.py::test_quickstart_trains_from_any_folder": (
        "tests/integration/test_launch.py::test_quickstart_writes_where_it_is_told"
    ),
    "tests/integration/test_launch.py::test_the_command_for_two_cpu_ranks_really_starts_two": (
        "tests/equivalence/test_ranks.py::test_two_ranks_equal_one"
    ),
    "tests/integration/test_merge_export.py::test_a_full_disk_leaves_nothing[export]": (
        "tests/integration/test_merge_export.py::test_a_full_disk_leaves_nothing"
    ),
    "tests/integration/test_merge_export.py::test_64_greedy_tokens_of_the_trained_model_are_the_same[onnx fp32]": (
        "tests/integration/test_merge_export.py::test_64_greedy_tokens_of_the_trained_model_are_the_same"
    ),
    "tests/integration/test_merge_export.py::test_a_layer_of_a_7b_is_merged_in_a_block_of_memory": (
        "tests/unit/export/merge/test_merge.py"
    ),
    "tests/integration/test_serving_replicas.py::test_a_replica_that_ends_under_load_loses_no_request": (
        "tests/integration/test_serving_replicas.py::test_sigterm_in_the_middle_of_32_streams_ends_none"
    ),
    "tests/integration/test_serving_replicas.py::test_a_stream_is_not_held_back_and_a_broken_one_is_not_continued": (
        "tests/integration/test_serving_replicas.py::test_sigterm_in_the_middle_of_32_streams_ends_none"
    ),
    "tests/integration/test_serving_replicas.py::test_two_full_replicas_say_when_to_come_back": (
        "tests/unit/serving/test_service.py::test_beyond_batch_and_queue_a_request_is_refused_and_a_repeat_is_not"
    ),
    "tests/integration/test_serving_replicas.py::test_redis_stopped_and_started_in_the_middle_is_not_seen": (
        "tests/unit/serving/test_answer_cache.py::test_a_redis_that_stops_is_left_alone_and_found_again"
    ),
    "tests/integration/test_serving_replicas.py::test_nginx_refuses_what_concerns_one_replica_and_what_is_too_large": (
        "tests/integration/test_serving_replicas.py::test_the_compose_file_names_services_and_options_that_exist"
    ),
    "tests/equivalence/test_out_of_memory.py::test_every_objective_repeats_a_step_that_ran_out[teacher]": (
        "tests/unit/training/test_micro_batch.py::test_a_repeated_step_has_the_bits_of_one_with_the_smaller_micro_batch"
    ),
    "tests/equivalence/test_out_of_memory.py::test_every_objective_repeats_a_step_that_ran_out[kto]": (
        "tests/unit/training/test_micro_batch.py::test_a_repeated_step_has_the_bits_of_one_with_the_smaller_micro_batch"
    ),
    "tests/equivalence/test_out_of_memory.py::test_every_objective_repeats_a_step_that_ran_out[rewards]": (
        "tests/unit/training/test_micro_batch.py::test_a_repeated_step_has_the_bits_of_one_with_the_smaller_micro_batch"
    ),
    "tests/equivalence/test_out_of_memory.py::test_every_objective_repeats_a_step_that_ran_out[pairs]": (
        "tests/unit/training/test_micro_batch.py::test_a_repeated_step_has_the_bits_of_one_with_the_smaller_micro_batch"
    ),
    "tests/equivalence/test_out_of_memory.py::test_two_ranks_halve_together_when_one_runs_out": (
        "tests/unit/training/test_micro_batch.py::test_a_repeated_step_has_the_bits_of_one_with_the_smaller_micro_batch"
    ),
    "tests/equivalence/test_out_of_memory.py::test_a_limit_of_memory_is_met_with_smaller_passes": (
        "tests/unit/training/test_micro_batch.py::test_a_repeated_step_has_the_bits_of_one_with_the_smaller_micro_batch"
    ),
    "tests/equivalence/test_out_of_memory.py::test_a_sharded_run_leaves_the_smaller_micro_batch_to_its_next_start": (
        "tests/unit/training/test_micro_batch.py::test_a_rank_of_a_sharded_base_leaves_half_the_micro_batch_to_the_restart"
    ),
    "tests/integration/test_lost_ranks.py": (
        "tests/unit/parallel/test_heartbeat.py::test_a_rank_that_stops_beating_ends_the_others_with_its_name"
    ),
}


def is_slow(node: str) -> bool:
    """Return whether the list names this test, its file, or this case of it."""
    return any(node == name or node.startswith((f"{name}::", f"{name}[")) for name in SLOW)
