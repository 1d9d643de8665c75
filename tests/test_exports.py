"""Every path that programs import from, and that each package says exactly what it has."""

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import lightning.fabric

# module -> names, relative to lightning.fabric
PROMISED = {
    "": "Fabric seed_everything is_wrapped",
    "fabric": "Fabric",
    "wrappers": "_FabricModule _FabricOptimizer _FabricDataLoader _unwrap_objects _unwrap_compiled is_wrapped",
    "connector": "_Connector _PRECISION_INPUT _PLUGIN_INPUT _is_using_cli",
    "accelerators": "Accelerator CPUAccelerator CUDAAccelerator MPSAccelerator XLAAccelerator TPUAccelerator"
    " ACCELERATOR_REGISTRY find_usable_cuda_devices",
    "accelerators.accelerator": "Accelerator",
    "accelerators.cpu": "CPUAccelerator",
    "accelerators.cuda": "CUDAAccelerator find_usable_cuda_devices",
    "accelerators.mps": "MPSAccelerator",
    "accelerators.xla": "XLAAccelerator",
    "accelerators.registry": "ACCELERATOR_REGISTRY",
    "strategies": "Strategy ParallelStrategy SingleDeviceStrategy DataParallelStrategy DDPStrategy STRATEGY_REGISTRY"
    " FSDPStrategy DeepSpeedStrategy ModelParallelStrategy XLAStrategy XLAFSDPStrategy SingleDeviceXLAStrategy",
    "strategies.strategy": "Strategy TBroadcast _BackwardSyncControl _Sharded _apply_filter"
    " _validate_keys_for_strict_loading",
    "strategies.parallel": "ParallelStrategy",
    "strategies.single_device": "SingleDeviceStrategy",
    "strategies.ddp": "DDPStrategy",
    "strategies.dp": "DataParallelStrategy",
    "strategies.fsdp": "FSDPStrategy",
    "strategies.deepspeed": "DeepSpeedStrategy",
    "strategies.model_parallel": "ModelParallelStrategy",
    "strategies.xla": "XLAStrategy",
    "strategies.xla_fsdp": "XLAFSDPStrategy _activation_checkpointing_auto_wrapper",
    "strategies.registry": "STRATEGY_REGISTRY",
    "strategies.launchers.subprocess_script": "_SubprocessScriptLauncher",
    "strategies.launchers.multiprocessing": "_MultiProcessingLauncher",
    "strategies.launchers.launcher": "_Launcher",
    "strategies.launchers.xla": "_XLALauncher",
    "plugins": "Precision DoublePrecision MixedPrecision HalfPrecision ClusterEnvironment LightningEnvironment"
    " TorchElasticEnvironment CheckpointIO TorchCheckpointIO Collective TorchCollective SingleDeviceCollective"
    " FSDPPrecision DeepSpeedPrecision XLAPrecision XLAEnvironment XLACheckpointIO BitsandbytesPrecision"
    " Float8Precision TransformerEnginePrecision",
    "plugins.precision": "Precision DoublePrecision MixedPrecision HalfPrecision FSDPPrecision DeepSpeedPrecision"
    " XLAPrecision BitsandbytesPrecision Float8Precision TransformerEnginePrecision",
    "plugins.precision.bitsandbytes": "BitsandbytesPrecision _BITSANDBYTES_AVAILABLE",
    "plugins.precision.precision": "Precision _PRECISION_INPUT",
    "plugins.collectives": "Collective TorchCollective SingleDeviceCollective",
    "plugins.collectives.torch_collective": "TorchCollective default_pg_timeout",
    "plugins.environments": "ClusterEnvironment LightningEnvironment TorchElasticEnvironment XLAEnvironment",
    "plugins.environments.cluster_environment": "ClusterEnvironment",
    "plugins.io": "CheckpointIO TorchCheckpointIO XLACheckpointIO",
    "plugins.io.checkpoint_io": "CheckpointIO",
    "plugins.io.torch_io": "TorchCheckpointIO",
    "observe": "Explanation",
    "loggers": "Logger CSVLogger TensorBoardLogger",
    "loggers.logger": "Logger rank_zero_experiment",
    "loggers.csv_logs": "CSVLogger",
    "loggers.tensorboard": "TensorBoardLogger log",
    "utilities": "rank_zero_only rank_zero_info rank_zero_warn rank_zero_deprecation move_data_to_device"
    " AttributeDict ThroughputMonitor measure_flops is_shared_filesystem suggested_max_num_workers"
    " disable_possible_user_warnings LightningEnum",
    "utilities.rank_zero": "rank_zero_only rank_zero_info rank_zero_warn rank_zero_debug rank_zero_deprecation",
    "utilities.cloud_io": "get_filesystem _is_dir _is_local_file_protocol _load _atomic_save",
    "utilities.distributed": "ReduceOp DistributedSamplerWrapper _distributed_is_initialized"
    " _get_default_process_group_backend_for_device _init_dist_connection _sync_ddp_if_available"
    " is_shared_filesystem",
    "utilities.load": "_lazy_load _NotYetLoadedTensor _METADATA_FILENAME _move_state_into",
    "utilities.init": "_materialize_meta_tensors _EmptyInit _has_meta_device_parameters_or_buffers",
    "utilities.seed": "seed_everything reset_seed isolate_rng pl_worker_init_function _collect_rng_states"
    " _set_rng_states",
    "utilities.throughput": "Throughput ThroughputMonitor measure_flops get_available_flops",
    "utilities.types": "_PATH _Stateful _DEVICE _MAP_LOCATION_TYPE _Wrappable Optimizable LRScheduler ReduceOp",
    "utilities.imports": "_IS_WINDOWS _TORCH_GREATER_EQUAL_2_1 _TORCH_GREATER_EQUAL_2_4 _TORCH_GREATER_EQUAL_2_10",
    "utilities.data": "AttributeDict suggested_max_num_workers has_iterable_dataset sized_len"
    " _replace_dunder_methods _set_sampler_epoch",
    "utilities.device_dtype_mixin": "_DeviceDtypeModuleMixin",
    "utilities.apply_func": "apply_to_collection move_data_to_device convert_to_tensors convert_tensors_to_scalars",
    "utilities.logger": "_convert_params _sanitize_callable_params _flatten_dict _add_prefix",
    "utilities.exceptions": "MisconfigurationException",
    "utilities.warnings": "PossibleUserWarning disable_possible_user_warnings",
    "utilities.spike": "SpikeDetection TrainingSpikeException",
    "utilities.optimizer": "_optimizers_to_device",
    "utilities.enums": "LightningEnum",
    "utilities.registry": "",
    "utilities.device_parser": "",
    "testing": "on_ranks check_strategy",
}
ROOT = Path(lightning.fabric.__file__).parent
PACKAGES = ["lightning.fabric"] + [
    found.name for found in pkgutil.walk_packages([str(ROOT)], "lightning.fabric.") if found.ispkg
]


def _full(module: str) -> str:
    return f"lightning.fabric.{module}".removesuffix(".")


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in PROMISED.items() for name in names.split() or [""]]
)
def test_promised_name_imports(module: str, name: str) -> None:
    found = importlib.import_module(_full(module))
    assert not name or getattr(found, name) is not None


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_exports_what_it_lists_and_shows_it_to_type_checkers(package: str) -> None:
    module = importlib.import_module(package)
    listed = getattr(module, "__all__", [])
    assert sorted(_shown_to_type_checkers(module.__file__)) == sorted(listed)
    for name in listed:
        assert getattr(module, name) is not None
    assert set(listed) <= set(dir(module))


@pytest.mark.parametrize("module", [module for module in PROMISED if _full(module) in PACKAGES])
def test_a_package_lists_the_public_names_that_it_promises(module: str) -> None:
    assert set(PROMISED[module].split()) <= set(importlib.import_module(_full(module)).__all__)


def _shown_to_type_checkers(file: str | None) -> list[str]:
    tree = ast.parse(Path(file or "").read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return [alias.asname for node in imports for alias in node.names if alias.asname == alias.name]
