import argparse
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dion.megatron import environment, validation
from megatron_dion.megatron.arguments import DION_DEFAULTS, dion_config_from_args
from megatron_dion.megatron.errors import ConfigurationError
from megatron_dion.megatron.indexed_data import open_indexed_data
from tests.distributed.nursery import Nursery


def arguments(**changes: Any) -> argparse.Namespace:
    """What the checks read of a run that starts."""
    values: dict[str, Any] = {
        **DION_DEFAULTS,
        "seed": 1234,
        "save_interval": None,
        "num_attention_heads": 4,
        "rank": 0,
        "optimizer": "dion",
        "use_distributed_optimizer": True,
        "use_layer_wise_distributed_optimizer": False,
        "use_torch_fsdp2": False,
        "use_megatron_fsdp": False,
        "optimizer_cpu_offload": False,
        "fp4_param_gather": False,
        "overlap_param_gather_with_optimizer_step": False,
        "use_precision_aware_optimizer": False,
        "use_mup": False,
        "moe_single_grouped_weight": False,
        "moe_single_grouped_bias": False,
        "mla_down_proj_fusion": False,
        "use_grouped_gemm_for_dense_mlp": False,
        "tensor_parallel_num_weight_shards": None,
        "expert_tensor_parallel_num_weight_shards": None,
        "moe_shared_expert_glu_interleave_size": None,
        "experimental_attention_variant": None,
        "reuse_grad_buf_for_mxfp8_param_ag": False,
        "fp8": None,
        "fp8_recipe": "delayed",
        "fp8_emulation": False,
        "fp8_param_gather": False,
        "fp8_wgrad": True,
        "fp8_output_proj": False,
        "fp8_interval": 1,
        "fp8_margin": 0,
        "fp8_amax_history_len": 1,
        "fp8_amax_compute_algo": "most_recent",
        "te_precision_config_file": None,
        "recompute_activations": False,
        "moe_layer_recompute": False,
        "eval_micro_batch_size": None,
        "first_last_layers_bf16": False,
        "recompute_granularity": None,
        "bf16": True,
        "fp16": False,
        "seq_length": 32,
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "world_size": 1,
        "pipeline_model_parallel_size": 1,
        "rampup_batch_size": None,
        "decrease_batch_size_if_needed": False,
        "context_parallel_size": 1,
        "ckpt_step": None,
        "non_persistent_ckpt_type": None,
        "ckpt_convert_format": None,
        "no_checkpoint_hashes": False,
        "verify_integrity": False,
        "enable_msc": False,
        "lr": 0.01,
        "train_samples": None,
        "eval_interval": 100,
        "train_iters": 50,
        "lr_decay_iters": None,
        "lr_warmup_iters": 5,
        "lr_warmup_fraction": None,
        "multi_latent_attention": False,
        "transformer_impl": "local",
        "tensor_model_parallel_size": 1,
        "device": "cpu",
        "freeze_all_layers": False,
        "optimizer_cuda_graph": False,
        "inprocess_restart": False,
        "ckpt_format": "torch_dist",
        "ckpt_fully_parallel_save": True,
        "dist_ckpt_optim_fully_reshardable": False,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "use_gloo_process_groups": True,
        "load": None,
        "pretrained_checkpoint": None,
        "save": None,
        "run_dir": None,
        "tensorboard_dir": None,
        "wandb_project": None,
        "sft": False,
        "fim_data": False,
        "hybrid_context_parallel": False,
        "dataloader_inter_document_masking": False,
        "dataloader_fast_cache_load": False,
        "yaml_cfg": None,
        "mock_data": False,
        "data_path": None,
        "data_args_path": None,
        "train_data_path": None,
        "valid_data_path": None,
        "test_data_path": None,
        "per_split_data_args_path": None,
        "split": None,
        "tokenizer_type": "NullTokenizer",
        "tokenizer_model": None,
    }
    assert set(changes) <= set(values)
    return argparse.Namespace(**values | changes)


def write_data(prefix: Path, documents: list[list[int]]) -> str:
    lengths = np.array([len(document) for document in documents], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64) * 2])
    tokens = np.concatenate([np.array(document, dtype=np.uint16) for document in documents])
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(documents), len(documents) + 1)
    bounds = np.arange(len(documents) + 1, dtype=np.int64)
    index = header + lengths.tobytes() + offsets.astype(np.int64).tobytes() + bounds.tobytes()
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    return str(prefix)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_data(tmp_path / "data", [[1, 2, 3], [4, 500], [6, 7, 8, 9]])


def complain(check: Callable[..., None], *args: Any) -> str:
    """The one line with which a check refuses."""
    with pytest.raises(ConfigurationError) as refusal:
        check(*args)
    message = str(refusal.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank_fraction", 0.0),
        ("rank_fraction", 1.01),
        ("rank_fraction", float("nan")),
        ("rank_multiple_of", 0),
        ("momentum", -0.1),
        ("momentum", 1.0),
        ("oversample", 0.9),
        ("exchange_buffer_mib", 0.0),
        ("eps", 0.0),
        ("eps", -1e-8),
        ("extra_scale_factor", 0.0),
        ("scalar_lr_mult", 0.0),
    ],
)
def test_hyperparameters_out_of_range_are_named(field: str, value: float) -> None:
    message = complain(validation.check_dion_hyperparameters, arguments(**{f"dion_{field}": value}))
    assert message.startswith(f"--dion-{field.replace('_', '-')} must be ")
    assert repr(value) in message


def test_hyperparameters_reach_dion() -> None:
    config = dion_config_from_args(arguments(dion_rank_fraction=0.5, dion_momentum=0.9, seed=7))
    assert (config.rank_fraction, config.momentum, config.seed) == (0.5, 0.9, 7)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_distributed_optimizer": False}, "--use-distributed-optimizer"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp"),
        ({"optimizer_cpu_offload": True}, "--optimizer-cpu-offload"),
        ({"fp4_param_gather": True}, "--fp4-param-gather"),
        ({"overlap_param_gather_with_optimizer_step": True}, "--overlap-param-gather-with-opt"),
        ({"use_precision_aware_optimizer": True}, "--use-precision-aware-optimizer"),
        ({"use_mup": True}, "--use-mup"),
        ({"moe_single_grouped_weight": True}, "--moe-single-grouped-weight"),
        ({"moe_single_grouped_bias": True}, "--moe-single-grouped-bias"),
        ({"mla_down_proj_fusion": True}, "--mla-down-proj-fusion"),
        ({"moe_shared_expert_glu_interleave_size": 8}, "--moe-shared-expert-glu-interleave-size"),
        ({"use_grouped_gemm_for_dense_mlp": True}, "--use-grouped-gemm-for-dense-mlp"),
        ({"tensor_parallel_num_weight_shards": 2}, "--tensor-parallel-num-weight-shards 2"),
        ({"expert_tensor_parallel_num_weight_shards": 2}, "--expert-tensor-parallel-num-weight"),
        ({"experimental_attention_variant": "dsa"}, "--experimental-attention-variant dsa"),
        ({"optimizer_cuda_graph": True}, "--optimizer-cuda-graph"),
        ({"freeze_all_layers": True}, "--freeze-all-layers"),
        ({"ckpt_format": "torch"}, "--ckpt-format torch"),
        ({"non_persistent_ckpt_type": "global"}, "--non-persistent-ckpt-type global"),
        ({"ckpt_convert_format": "torch"}, "--ckpt-convert-format torch"),
    ],
)
def test_dion_refuses_what_it_does_not_go_with(change: dict[str, Any], named: str) -> None:
    assert named in complain(validation.check_dion_surroundings, arguments(**change))
    validation.check_dion_surroundings(arguments(optimizer="adam", **change))


def test_dion_flags_without_dion_are_refused() -> None:
    change = {"optimizer": "adam", "dion_rank_fraction": 0.5}
    complaint = complain(validation.check_dion_hyperparameters, arguments(**change))
    assert "--dion-rank-fraction 0.5 has no effect with --optimizer adam" in complaint
    validation.check_dion_hyperparameters(arguments(optimizer="adam"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"device": "cuda"}, "--transformer-impl local: use transformer_engine"),
        ({"tensor_model_parallel_size": 2}, "--tensor-model-parallel-size 2"),
    ],
)
def test_latent_attention_of_plain_torch_is_limited(change: dict[str, Any], named: str) -> None:
    args = arguments(multi_latent_attention=True, **change)
    assert named in complain(validation.check_latent_attention, args)
    validation.check_latent_attention(arguments(multi_latent_attention=True))
    args.transformer_impl = "transformer_engine"
    validation.check_latent_attention(args)


FP8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise", "fp8_emulation": True}
MXFP8 = {**FP8, "fp8_recipe": "mxfp8", "fp8_param_gather": True}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fp8_emulation": True}, "--fp8-emulation has no effect without --fp8-format"),
        ({"fp8_param_gather": True}, "--fp8-param-gather has no effect without --fp8-format"),
        ({"fp8": "hybrid"}, "--fp8-format hybrid has no effect with --transformer-impl local"),
        ({**FP8, "fp8_recipe": "delayed", "first_last_layers_bf16": True}, "--first-last-layers-"),
        ({**FP8, "fp8_param_gather": True, "bf16": False}, "add --bf16"),
        (MXFP8, "add --reuse-grad-buf-for-mxfp8-param-ag"),
        ({**FP8, "reuse_grad_buf_for_mxfp8_param_ag": True}, "--reuse-grad-buf-for-mxfp8-param-ag"),
    ],
)
def test_fp8_that_would_not_be(change: dict[str, Any], named: str) -> None:
    assert named in complain(validation.check_fp8, arguments(**change))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"device": "cuda"}, "--fp8-emulation does not go with --device cuda"),
        ({"fp8_recipe": "custom"}, "--fp8-emulation does not know --fp8-recipe custom"),
        ({"fp8_wgrad": False}, "--fp8-emulation does not know --no-fp8-wgrad"),
        ({"fp8_output_proj": True}, "--fp8-emulation does not know --fp8-output-proj"),
        ({"fp8_interval": 2}, "--fp8-emulation does not know --fp8-interval"),
        (
            {"recompute_granularity": "full"},
            "--fp8-emulation does not know --recompute-granularity",
        ),
        ({"recompute_activations": True}, "--fp8-emulation does not know --recompute-activations"),
        ({"eval_micro_batch_size": 2, "seq_length": 24, "micro_batch_size": 4}, None),
        ({"eval_micro_batch_size": 3, "seq_length": 24, "micro_batch_size": 4}, "72 tokens"),
        ({"seq_length": 24}, "24 tokens on a rank, which is not a multiple of 16"),
        ({"fp8_recipe": "mxfp8", "seq_length": 48}, "not a multiple of 32"),
        ({"context_parallel_size": 4}, "8 tokens on a rank"),
    ],
)
def test_emulation_is_limited(change: dict[str, Any], named: str | None) -> None:
    args = arguments(**{**FP8, **change})
    if named is None:
        validation.check_fp8_emulation(args)
    else:
        assert named in complain(validation.check_fp8_emulation, args)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fp8_margin": 1}, "--fp8-margin 1 has no effect with --fp8-recipe none"),
        ({**FP8, "fp8_amax_history_len": 8}, "--fp8-amax-history-len 8 has no effect"),
        ({**FP8, "fp8_amax_compute_algo": "max"}, "--fp8-amax-compute-algo max has no effect"),
        ({**FP8, "fp8_recipe": "delayed", "fp8_amax_history_len": 0}, "must be at least 1, not 0"),
        (
            {"fp8": "hybrid", "device": "cuda", "load": "saved"},
            "set NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1",
        ),
    ],
)
def test_delayed_scaling_is_checked(
    change: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", raising=False)
    assert named in complain(validation.check_delayed_scaling, arguments(**change))
    delayed = {**FP8, "fp8_recipe": "delayed", "load": "saved", "fp8_amax_history_len": 8}
    validation.check_delayed_scaling(arguments(**delayed))
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    validation.check_delayed_scaling(arguments(**{**delayed, "fp8_emulation": False}))


@pytest.mark.parametrize(
    "change",
    [
        {},
        FP8,
        {**FP8, "fp8_param_gather": True},
        {**MXFP8, "reuse_grad_buf_for_mxfp8_param_ag": True},
        {"fp8": "e4m3", "transformer_impl": "transformer_engine", "first_last_layers_bf16": True,
         "fp8_recipe": "blockwise", "fp8_param_gather": True},
    ],
)  # fmt: skip
def test_fp8_that_is_known(change: dict[str, Any]) -> None:
    validation.check_fp8(arguments(**change))
    validation.check_fp8_emulation(arguments(**change))


def test_batches_are_whole() -> None:
    sizes = {"micro_batch_size": 3, "world_size": 8, "pipeline_model_parallel_size": 2}
    validation.check_batches(arguments(global_batch_size=24, **sizes))
    complaint = complain(validation.check_batches, arguments(global_batch_size=20, **sizes))
    assert "--global-batch-size 20 is not a multiple of --micro-batch-size 3 times 4" in complaint
    validation.check_batches(arguments(global_batch_size=None, **sizes))


@pytest.mark.parametrize("interval", [None, 0])
def test_evaluation_needs_an_interval(interval: int | None) -> None:
    complaint = complain(validation.check_evaluation, arguments(eval_interval=interval))
    assert f"--eval-interval must be a number of iterations, not {interval}" in complaint


@pytest.mark.parametrize("decay", [None, 20])
def test_warmup_ends_before_the_run(decay: int | None) -> None:
    change = {"lr_decay_iters": decay, "lr_warmup_iters": decay or 50}
    complaint = complain(validation.check_schedule, arguments(**change))
    assert f"--lr-warmup-iters {decay or 50}" in complaint


def test_tensor_parallel_ranks_have_whole_heads() -> None:
    said = complain(validation.check_heads, arguments(tensor_model_parallel_size=3))
    assert said.startswith("--num-attention-heads 4 is not a multiple of --tensor-model-parallel-")
    validation.check_heads(arguments(tensor_model_parallel_size=2))
    validation.check_heads(arguments(num_attention_heads=None))  # Megatron asks for it


def test_mock_data_are_not_mixed_with_others(nursery: Nursery) -> None:
    args = arguments(mock_data=True, data_path=["some/where"])
    [said] = nursery.run(1, first_complaint, args)
    assert said.startswith("--mock-data does not go with the data some/where:")


def test_a_run_that_may_start_passes(prefix: str, nursery: Nursery) -> None:
    args = arguments(data_path=[prefix], split="67,33,0")
    assert nursery.run(1, first_complaint, args) == [None]


def test_distributed_optimizer_is_kept() -> None:
    # As megatron's validation leaves them.
    args = arguments(use_layer_wise_distributed_optimizer=True, use_distributed_optimizer=False)
    validation.keep_distributed_optimizer(args)
    assert args.use_distributed_optimizer
    assert not args.use_layer_wise_distributed_optimizer
    assert args.dist_ckpt_optim_fully_reshardable


@pytest.mark.parametrize(
    "change",
    [
        {
            "use_gloo_process_groups": False,
            "distrib_optim_fully_reshardable_mem_efficient": True,
        },
        {"ckpt_fully_parallel_save": False},
    ],
)
def test_checks_that_megatron_skipped_are_made_up_for(change: dict[str, Any]) -> None:
    complain(validation.keep_distributed_optimizer, arguments(**change))


@pytest.mark.parametrize("change", [{"verify_integrity": True}, {"enable_msc": True}])
def test_flags_that_contradict_how_checkpoints_are_saved(change: dict[str, Any]) -> None:
    args = arguments(no_checkpoint_hashes=True, **change)
    assert "leave" in complain(validation.check_checkpoint_flags, args)


@pytest.mark.parametrize("flag", ["load", "pretrained_checkpoint"])
def test_load_needs_a_checkpoint(flag: str, tmp_path: Path) -> None:
    args = arguments(**{flag: str(tmp_path)})
    assert str(tmp_path) in complain(validation.check_checkpoint_exists, args)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    assert "no folder iter_0000005" in complain(validation.check_checkpoint_exists, args)
    (tmp_path / "iter_0000005").mkdir()
    validation.check_checkpoint_exists(args)


def test_load_needs_the_chosen_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    (tmp_path / "iter_0000005").mkdir()
    args = arguments(load=str(tmp_path), ckpt_step=4)
    assert "no folder iter_0000004" in complain(validation.check_checkpoint_exists, args)


@pytest.mark.parametrize(("missing", "flag"), [("lr", "--lr"), ("train_iters", "--train-iters")])
def test_schedule_needs_its_numbers(missing: str, flag: str) -> None:
    assert flag in complain(validation.check_schedule, arguments(**{missing: None}))


def test_flags_of_other_scripts_are_refused() -> None:
    assert complain(validation.check_data_mode, arguments(sft=True)).startswith("--sft ")
    assert "--yaml-cfg x" in complain(validation.check_data_mode, arguments(yaml_cfg="x"))


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation.importlib.util, "find_spec", lambda name: None)
    message = complain(validation.check_packages, arguments(save="somewhere"))
    assert message == "--save needs the package psutil: pip install psutil"
    message = complain(validation.check_packages, arguments(optimizer="muon"))
    assert message.endswith("pip install emerging-optimizers")
    validation.check_packages(arguments())


def test_save_needs_an_interval() -> None:
    args = arguments(save="somewhere")
    message = complain(validation.check_checkpoint_flags, args)
    assert message.startswith("--save somewhere needs --save-interval: ")
    validation.check_checkpoint_flags(arguments(save="somewhere", save_interval=5))


def test_tokenizer_needs_a_type_and_a_model(tmp_path: Path) -> None:
    message = complain(validation.check_tokenizer, arguments(tokenizer_type=None))
    assert "--tokenizer-type is missing" in message
    args = arguments(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tmp_path / "no"))
    assert "--tokenizer-model" in complain(validation.check_tokenizer, args)


def test_whole_data_are_read(prefix: str) -> None:
    data = open_indexed_data(prefix)
    assert (data.sequences, data.tokens, data.largest_token()) == (3, 9, 500)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_files_are_named(prefix: str, suffix: str) -> None:
    Path(prefix + suffix).unlink()
    assert prefix + suffix in complain(open_indexed_data, prefix)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_files_that_were_cut_off_are_named(prefix: str, suffix: str) -> None:
    path = Path(prefix + suffix)
    path.write_bytes(path.read_bytes()[:-1])
    message = complain(open_indexed_data, prefix)  # type: ignore[arg-type]
    assert f"{path} has {path.stat().st_size} bytes" in message


@pytest.mark.parametrize("content", [b"", b"MMIDIDX", b"x" * 100])
def test_what_is_no_index_is_named(prefix: str, content: bytes) -> None:
    Path(prefix + ".idx").write_bytes(content)
    message = complain(open_indexed_data, prefix)  # type: ignore[arg-type]
    assert "is not the index of a Megatron dataset" in message


@pytest.mark.parametrize("position", [9, 17])  # version, type of the tokens
def test_unknown_formats_are_named(prefix: str, position: int) -> None:
    path = Path(prefix + ".idx")
    content = bytearray(path.read_bytes())
    content[position] = 99
    path.write_bytes(content)
    assert "format version" in complain(open_indexed_data, prefix)  # type: ignore[arg-type]


def first_complaint(args: argparse.Namespace) -> str | None:
    """Run all checks, in a process that has imported Megatron."""
    try:
        for check in validation.CHECKS:
            check(args)
        validation.check_token_ids(args, vocabulary=501)
    except ConfigurationError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, "no data: give --data-path"),
        ({"data_path": ["nowhere"]}, "nowhere.idx"),
        ({"data_args_path": "nowhere"}, "--data-args-path nowhere is not a file"),
    ],
)
def test_runs_without_data_are_refused(
    change: dict[str, Any], named: str, nursery: Nursery
) -> None:
    [message] = nursery.run(1, first_complaint, arguments(**change))
    assert named in message


@pytest.mark.parametrize("split", ["90,10,0", "67,23,10", "1,98,1"])
def test_splits_without_documents_are_refused(split: str, prefix: str, nursery: Nursery) -> None:
    [message] = nursery.run(1, first_complaint, arguments(data_path=[prefix], split=split))
    assert f"--split {split} gives the" in message


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path, nursery: Nursery) -> None:
    prefix = write_data(tmp_path / "data", [[1, 501]])
    [message] = nursery.run(1, first_complaint, arguments(data_path=[prefix]))
    assert "hold the token 501" in message


def test_tokenizer_is_compared_with_what_was_noted(prefix: str, tmp_path: Path) -> None:
    model = tmp_path / "tokenizer.model"
    model.write_bytes(b"pieces")
    noted = {
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model_sha256": hashlib.sha256(b"pieces").hexdigest(),
        "unigram_entropy_nats": 6.5,
    }
    Path(prefix + ".json").write_text(json.dumps(noted))
    args = arguments(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(model))
    check = validation.check_made_with_this_tokenizer
    check(args, prefix)
    assert "--tokenizer-type NullTokenizer" in complain(check, arguments(), prefix)
    model.write_bytes(b"other pieces")
    assert f"--tokenizer-model {model}" in complain(check, args, prefix)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_notes_are_named(prefix: str, content: str) -> None:
    Path(prefix + ".json").write_text(content)
    message = complain(validation.check_made_with_this_tokenizer, arguments(), prefix)
    assert f"{prefix}.json is not" in message


def test_other_versions_of_megatron_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    environment.check_megatron_version()
    monkeypatch.setattr(environment.importlib.metadata, "version", lambda name: "0.18.0")
    message = complain(environment.check_megatron_version)
    assert "megatron-core 0.18.0 is installed" in message


def test_the_other_apex_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "pip uninstall apex" in complain(environment.check_apex)
    (package / "multi_tensor_apply").mkdir()  # as NVIDIA's has
    environment.check_apex()


def test_cuda_is_refused_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.torch.cuda, "is_available", lambda: False)
    assert "--device cuda" in complain(environment.check_device, "cuda")
    environment.check_device("cpu")


def test_entropy_is_that_of_the_training_data(tmp_path: Path, nursery: Nursery) -> None:
    prefixes = {}
    for split, nats in (("train", 6.5), ("valid", 5.5)):
        prefixes[split] = write_data(tmp_path / split, [[1, 2, 3]])
        Path(f"{prefixes[split]}.json").write_text(json.dumps({"unigram_entropy_nats": nats}))
    apart = arguments(
        train_data_path=[prefixes["train"]], valid_data_path=[prefixes["valid"]], split=None
    )
    together = arguments(data_path=[prefixes["valid"]], split="90,10,0")
    assert nursery.run(1, validation.unigram_entropy, apart) == [6.5]
    assert nursery.run(1, validation.unigram_entropy, together) == [5.5]
