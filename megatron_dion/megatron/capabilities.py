"""What Dion needs of megatron-core, looked for in the installed one before any of it is imported.

A release is judged by the names in its source files, not by its number. Imports need no entry, for
they fail by themselves. The entries are methods that are overridden, attributes that are set or
read, and parameters that are passed, whose absence would be found out late, or never.
"""

import ast
import importlib.util
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from megatron_dion.checkpointing import errors
from megatron_dion.megatron.errors import ConfigurationError, refuse, say

TESTED = ("0.18.2", "0.19.0", "0.19.2")  # `make test-versions` runs on each
FIX = f"pip install megatron-core=={TESTED[-1]}"

# What a file must have: names that its code uses, and its functions, `function(parameters)` or
# `Class.method(parameters)`, with at least these parameters. One of those between bars is enough.
NEEDED = {
    "core/distributed/param_and_grad_buffer.py": """
        is_managed_by_layer_wise_optimizer param_index_map params_list communication_stream
        intra_distributed_optimizer_instance_group inter_distributed_optimizer_instance_group
        next_param_gather_bucket_group is_float8tensor is_nvfp4tensor""",
    "core/distributed/distributed_data_parallel.py": """
        buffers expert_parallel_buffers bucket_groups expert_parallel_bucket_groups
        param_to_bucket_group DistributedDataParallel.zero_grad_buffer()
        DistributedDataParallel.start_param_sync(force_sync)""",
    "core/optimizer/__init__.py": """
        _get_megatron_optimizer_based_on_param_groups(config,param_groups,pg_collection)
        _get_param_groups(model_chunks,config,config_overrides) default_config""",
    "core/optimizer/distrib_optimizer.py": """
        DistributedOptimizer.__init__(model_chunks,per_model_buffers,data_parallel_group)
        DistributedOptimizer.__init__(data_parallel_group_gloo,data_parallel_group_idx)
        DistributedOptimizer.__init__(distributed_optimizer_instance_id) is_stub_optimizer
        model_fp32_groups model_float16_groups shard_fp32_groups shard_fp32_from_float16_groups
        model_param_gbuf_map _defer_param_sync DistributedOptimizer._get_model_param_range_map()
        DistributedOptimizer._get_main_param_and_optimizer_states()
        DistributedOptimizer._copy_model_grads_to_main_grads()
        DistributedOptimizer._copy_main_params_to_param_buffer()
        DistributedOptimizer._copy_main_params_to_model_params()
        DistributedOptimizer._compute_per_buffer_param_layout(params,bucket_size)
        DistributedOptimizer.step_with_ready_grads()""",
    "core/optimizer/optimizer.py": """
        MegatronOptimizer.get_grads_for_grad_norm|MegatronOptimizer.get_main_grads_for_grad_norm()
        MixedPrecisionOptimizer._unscale_main_grads_and_check_for_nan() found_inf
        ChainedOptimizer.prepare_grads() ChainedOptimizer.get_grad_norm() chained_optimizers
        ChainedOptimizer.step_with_ready_grads() ChainedOptimizer._step() grad_stats_parallel_group
        ChainedOptimizer._should_defer_mxfp8_param_sync() ChainedOptimizer.load_state_dict()
        ChainedOptimizer.sharded_state_dict(model_sharded_state_dict,is_loading)""",
    "core/process_groups_config.py": """
        ProcessGroupCollection.setup_process_groups_for_optimizer(pg_collection,model_chunks)
        ProcessGroupCollection.setup_process_groups_for_optimizer(use_gloo_process_groups)
        inter_dist_opt_group intra_dist_opt_group intra_dp_cp_group intra_expt_dp_group
        expt_tp_pp_group mp_group""",
    "core/dist_checkpointing/mapping.py": "allow_shape_mismatch prepend_axis_num replica_id",
    "core/dist_checkpointing/serialization.py": "save(sharded_state_dict,checkpoint_dir)",
    "training/arguments.py": """
        parse_args(extra_args_provider,ignore_unknown_args) validate_args(args,defaults)
        use_layer_wise_distributed_optimizer""",
    "training/global_vars.py": "build_tokenizer",
    "training/training.py": """
        pretrain() setup_model_and_optimizer() get_megatron_optimizer load_checkpoint evaluate()
        train_step(optimizer) training_log(loss_dict,learning_rate,iteration,grad_norm,skipped_iter)
        evaluate_and_print_results(prefix,iteration)""",
    "training/checkpointing.py": "read_metadata() load_args_from_checkpoint() dist_checkpointing",
}


def _names(module: ast.Module) -> Iterator[Any]:
    """What a file has, in the words of `NEEDED`; among other things that stand in its code."""
    classes = [(f"{one.name}.", one.body) for one in module.body if isinstance(one, ast.ClassDef)]
    for prefix, body in (("", module.body), *classes):
        for function in (one for one in body if isinstance(one, ast.FunctionDef)):
            takes = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
            yield from (f"{prefix}{function.name}({one})" for one in ["", *(a.arg for a in takes)])
    for node in ast.walk(module):  # of names, attributes, arguments, and getattr(..., "name")
        yield from map(vars(node).get, ("id", "attr", "arg", "value"))


def missing(megatron: Path) -> Iterator[str]:
    """What a folder with Megatron's packages lacks of what Dion needs."""
    for file, needed in NEEDED.items():
        path = megatron / file
        has = set(_names(ast.parse(path.read_bytes(), file)) if path.is_file() else ())
        for entry in needed.split():
            names, bracket, parameters = entry.rstrip(")").partition("(")
            for one in parameters.split(","):
                either = [f"{name}({one})" if bracket else name for name in names.split("|")]
                if has.isdisjoint(either):
                    yield f"{' or '.join(either)} in megatron/{file}"


def check_megatron() -> tuple[str, bool]:
    """The version of the megatron-core that an import would find, and whether it is a tested one.

    A checkout of Megatron-LM beside a script comes before what is installed.

    Raises:
        ConfigurationError: there is none, or it lacks something.
    """
    spec = importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.core")
    refuse(f"megatron-core is not installed: {FIX}", when=spec is None)
    core = Path(str(spec and spec.origin)).parent
    numbers = re.findall(r"(?:MAJOR|MINOR|PATCH) = (\d+)", (core / "package_info.py").read_text())
    with importing("Dion"):
        version, lacks = ".".join(numbers), list(missing(core.parent))
    refuse(
        f"megatron-core {version} in {core.parent} has no {', no '.join(lacks[:2])}"
        f"{f' (and {len(lacks) - 2} more)' if lacks[2:] else ''}, which Dion needs: {FIX}",
        when=lacks,
    )
    return version, version in TESTED


def begin_with_megatron() -> None:
    """`check_megatron`, which says in one line that the version is not a tested one."""
    version, is_tested = check_megatron()
    if not is_tested:
        say(f"megatron-core {version} is not tested ({', '.join(TESTED)} are)")


def importing(what: str) -> AbstractContextManager[None]:
    """Says in one line which name an import of something that builds on megatron does not find."""
    context = f"{what} needs another megatron-core ({FIX})"
    causes = (AttributeError, ImportError, RuntimeError, SyntaxError)
    return errors.in_one_line(ConfigurationError, context, *causes)
