"""ZeRO: optimizer state, gradients and weights shared out over the ranks.    package: deepspeed"""

import functools
import logging
import os
import shutil
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.checkpoint.saving import Prepared
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.fabric.plugins.precision.precision import Precision
from lightning.fabric.strategies._deepspeed_config import (
    LossScaling,
    ZeroOptions,
    accumulation_steps,
    block,
    check_precision,
    choose_config,
    complete,
    overlaps_at_first_stage,
    zero_stage,
)
from lightning.fabric.strategies._deepspeed_files import (
    OWN_STATE,
    FolderOfAnEngine,
    Loading,
    checkpoint_folder,
    gathered,
    gathered_state,
    state_of,
)
from lightning.fabric.strategies._deepspeed_holding import gradients_of, held_whole, part_of
from lightning.fabric.strategies._deepspeed_steps import Window, zero_grad, zero_gradient_buffers
from lightning.fabric.strategies._holding import Holding
from lightning.fabric.strategies._single_file import check_module
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.strategy import _Sharded
from lightning.fabric.utilities.compilation import uncompiled
from lightning.fabric.utilities.imports import require
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.fabric.utilities.types import _PATH
from lightning.fabric.utilities.warnings import PossibleUserWarning

# ---- the strategy ----------------------------------------------------------------------------------------------------


class DeepSpeedStrategy(DDPStrategy, _Sharded):
    """DeepSpeed's engine: shares optimizer state (stage 1), gradients (2) and parameters (3) out over the processes.

    Runs on CUDA, and on the CPU with gloo. Module and optimizer are set up together, one optimizer per module; a module
    alone is for inference. A step uses the gradients of all backwards since the last one, as elsewhere; DeepSpeed's
    own counting is used where the configuration sets ``gradient_accumulation_steps``.

    A ``scheduler`` given to ``fabric.setup`` is stepped by the engine, after each step of the optimizer, and is part of
    checkpoints. To step it yourself, do not pass it.

    Checkpoints are folders of DeepSpeed's, which ``zero_to_fp32.py`` inside turns into full weights. DeepSpeed reads
    them with ``pickle``, which runs whatever code they hold: load only files that you trust.

    Args:
        zero_optimization: False is the same as ``stage=0``.
        stage: what is shared out: 1 optimizer state, 2 gradients too, 3 parameters too; 0: nothing.
        remote_device: where parameters that are made under ``init_module`` at stage 3 are kept: ``cpu`` or ``nvme``;
            None: where ``offload_parameters`` says, else the device of the process.
        offload_optimizer: keep and update the optimizer's state in CPU memory or on NVMe.
        offload_parameters: keep parameters there too, at stage 3.
        offload_params_device: ``cpu`` or ``nvme``.
        nvme_path: folder on the NVMe disk. DeepSpeed needs its ``async_io`` operator (libaio) for it.
        params_buffer_count, params_buffer_size, max_in_cpu: buffers of parameters offloaded to NVMe.
        offload_optimizer_device: ``cpu`` or ``nvme``.
        optimizer_buffer_count: buffers of optimizer state offloaded to NVMe.
        block_size, queue_depth, single_submit, overlap_events, thread_count: how NVMe is read and written.
        pin_memory: offload to page-locked memory.
        sub_group_size: number of parameters updated at a time, at stage 3.
        contiguous_gradients: copy gradients into one buffer as they are made.
        overlap_comm: average gradients while backward goes on; from stage 2 on.
        allgather_partitions: collect updated parameters by all-gather, not by broadcasts.
        reduce_scatter: average gradients by reduce-scatter, not by all-reduce.
        allgather_bucket_size, reduce_bucket_size: number of elements communicated at once.
        zero_allow_untested_optimizer: accept optimizers that DeepSpeed has not tested.
        logging_batch_size_per_gpu: what DeepSpeed's log of throughput reckons with; None: 1.
        config: a configuration of DeepSpeed, as a dict or the path of a JSON file, which wins over the arguments above;
            None: the file that the variable ``PL_DEEPSPEED_CONFIG_PATH`` names, if any.
        logging_level: level of DeepSpeed's own logger.
        parallel_devices: the devices of this machine; None: Fabric chooses.
        cluster_environment: owner of ranks and addresses; None: detected.
        loss_scale, initial_scale_power, loss_scale_window, hysteresis, min_loss_scale: scaling of the loss in float16;
            ``loss_scale=0``: dynamic.
        partition_activations, cpu_checkpointing, contiguous_memory_optimization, synchronize_checkpoint_boundary: what
            ``deepspeed.checkpointing.checkpoint`` does in your model.
        load_full_weights: ``fabric.load`` also accepts a file of full weights.
        precision: a :class:`DeepSpeedPrecision`; None: Fabric chooses.
        process_group_backend: None: nccl on CUDA, gloo on CPU.
        timeout: how long a collective waits for the other processes.
        exclude_frozen_parameters: leave parameters that are not trained out of checkpoints.
        accelerator: kind of device; None: Fabric chooses.

    Raises:
        ModuleNotFoundError: if the package ``deepspeed`` is missing.
        FileNotFoundError: if there is no such configuration.
        ValueError: if arguments, configuration and precision do not go together.

    """

    runs_on: ClassVar[frozenset[str] | None] = frozenset({"cpu", "cuda"})
    engine = "deepspeed"

    def __init__(
        self,
        zero_optimization: bool = True,
        stage: int = 2,
        remote_device: str | None = None,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        offload_params_device: str = "cpu",
        nvme_path: str = "/local_nvme",
        params_buffer_count: int = 5,
        params_buffer_size: float = 100_000_000,
        max_in_cpu: float = 1_000_000_000,
        offload_optimizer_device: str = "cpu",
        optimizer_buffer_count: int = 4,
        block_size: int = 1048576,
        queue_depth: int = 8,
        single_submit: bool = False,
        overlap_events: bool = True,
        thread_count: int = 1,
        pin_memory: bool = False,
        sub_group_size: float = 1_000_000_000_000,
        contiguous_gradients: bool = True,
        overlap_comm: bool = True,
        allgather_partitions: bool = True,
        reduce_scatter: bool = True,
        allgather_bucket_size: float = 200_000_000,
        reduce_bucket_size: float = 200_000_000,
        zero_allow_untested_optimizer: bool = True,
        logging_batch_size_per_gpu: int | None = None,
        config: _PATH | Mapping[str, Any] | None = None,
        logging_level: int = logging.WARNING,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        loss_scale: float = 0,
        initial_scale_power: int = 16,
        loss_scale_window: int = 1000,
        hysteresis: int = 2,
        min_loss_scale: int = 1,
        partition_activations: bool = False,
        cpu_checkpointing: bool = False,
        contiguous_memory_optimization: bool = False,
        synchronize_checkpoint_boundary: bool = False,
        load_full_weights: bool = False,
        precision: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
        exclude_frozen_parameters: bool = False,
        *,
        accelerator: Accelerator | None = None,
    ) -> None:
        require("deepspeed", "strategy='deepspeed'")
        options = ZeroOptions(
            zero_optimization=zero_optimization,
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            offload_params_device=offload_params_device,
            nvme_path=nvme_path,
            params_buffer_count=params_buffer_count,
            params_buffer_size=params_buffer_size,
            max_in_cpu=max_in_cpu,
            offload_optimizer_device=offload_optimizer_device,
            optimizer_buffer_count=optimizer_buffer_count,
            block_size=block_size,
            queue_depth=queue_depth,
            single_submit=single_submit,
            overlap_events=overlap_events,
            thread_count=thread_count,
            pin_memory=pin_memory,
            sub_group_size=sub_group_size,
            contiguous_gradients=contiguous_gradients,
            overlap_comm=overlap_comm,
            allgather_partitions=allgather_partitions,
            reduce_scatter=reduce_scatter,
            allgather_bucket_size=allgather_bucket_size,
            reduce_bucket_size=reduce_bucket_size,
            zero_allow_untested_optimizer=zero_allow_untested_optimizer,
            logging_batch_size_per_gpu=logging_batch_size_per_gpu,
            partition_activations=partition_activations,
            cpu_checkpointing=cpu_checkpointing,
            contiguous_memory_optimization=contiguous_memory_optimization,
            synchronize_checkpoint_boundary=synchronize_checkpoint_boundary,
        )
        self.config = choose_config(config, options)
        self._scaling = LossScaling(loss_scale, initial_scale_power, loss_scale_window, hysteresis, min_loss_scale)
        self._remote_device = remote_device
        self._logging_level = logging_level
        self._load_full_weights = load_full_weights
        self._exclude_frozen_parameters = exclude_frozen_parameters
        self._variables_before: dict[str, str | None] = {}
        self._engines = _Engines()
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            precision=None,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.precision = precision
        self._backward_sync_control = None  # when gradients are averaged is for the engine to decide

    # -- parts

    @property
    def precision(self) -> DeepSpeedPrecision:
        """Dtypes and loss scaling; full precision unless set."""
        return self._precision if isinstance(self._precision, DeepSpeedPrecision) else _FULL_PRECISION

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        if type(precision) is Precision:
            precision = _FULL_PRECISION
        if precision is not None and not isinstance(precision, DeepSpeedPrecision):
            raise ValueError(
                f"DeepSpeed works in its own way with dtypes, so it needs a `DeepSpeedPrecision`, but got "
                f"{type(precision).__name__}. Pass `precision='bf16-mixed'` or the like to Fabric."
            )
        if precision is not None:
            check_precision(self.config, precision.precision)
        self._precision = precision
        self._step_hooks = None

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """Reads files of full weights; checkpoints are DeepSpeed's own."""
        return super().checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        raise NotImplementedError(
            f"DeepSpeed writes and reads checkpoints itself, so {type(self).__name__} cannot use {io!r}. Leave it out."
        )

    @property
    def zero_stage_3(self) -> bool:
        """Whether parameters are shared out."""
        return zero_stage(self.config) == 3

    # -- processes

    def setup_environment(self) -> None:
        if self.root_device.type == "cpu" and self.precision.precision.startswith("16"):
            raise ValueError(
                f"precision={self.precision.precision!r} computes in float16, which DeepSpeed cannot do on the CPU. "
                f"Use precision='bf16-{self.precision.precision.split('-')[1]}'."
            )
        self._join_world(self._process_group_backend, self._timeout)
        self._join_deepspeed()

    def _join_deepspeed(self) -> None:
        """Let DeepSpeed work on the device and in the process group of this strategy."""
        self._set_variables()
        import deepspeed

        kind = deepspeed.get_accelerator().device_name()
        if kind != self.root_device.type:
            raise RuntimeError(
                f"DeepSpeed has been imported for {kind!r}, but the devices of this run are "
                f"{self.root_device.type!r}. Set DS_ACCELERATOR={self.root_device.type} in the environment."
            )
        logger = deepspeed.utils.logger
        for talker in (logger, *logger.handlers):
            talker.setLevel(self._logging_level)
        # torch says so of DeepSpeed's collectives, several times in every step
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
        with redirect_stdout(StringIO()):  # where every rank says that it has its operators
            deepspeed.init_distributed(self._process_group_backend, auto_mpi_discovery=False)
        if activations := block(self.config, "activation_checkpointing"):
            deepspeed.checkpointing.configure(
                mpu_=None,
                partition_activations=activations.get("partition_activations"),
                contiguous_checkpointing=activations.get("contiguous_memory_optimization"),
                num_checkpoints=activations.get("number_checkpoints"),
                checkpoint_in_cpu=activations.get("cpu_checkpointing"),
                synchronize=activations.get("synchronize_checkpoint_boundary"),
                profile=activations.get("profile"),
            )

    def _set_variables(self) -> None:
        """Set the variables from which DeepSpeed learns, at any time, who this process is; until teardown."""
        wanted = {
            "RANK": str(self.global_rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "DS_ACCELERATOR": self.root_device.type,
        }
        beside_python = Path(sys.executable).parent
        if shutil.which("ninja") is None and (beside_python / "ninja").exists():
            # DeepSpeed compiles operators with it, and looks for it where an environment that is not activated is not
            wanted["PATH"] = f"{beside_python}{os.pathsep}{os.environ.get('PATH', '')}"
        self._variables_before = self._variables_before or {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)

    def _restore_variables(self) -> None:
        for name, value in self._variables_before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._variables_before = {}

    # -- objects

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Modules made inside are in the dtype of the precision; at stage 3 each rank keeps its part of each parameter.

        Collective at stage 3, where parameters get rank 0's values and ``empty_init=True`` makes no difference.

        Raises:
            NotImplementedError: for ``empty_init=False`` at stage 3.

        """
        if not self.zero_stage_3:
            with super().module_init_context(empty_init):
                yield
            return
        if empty_init is False:
            raise NotImplementedError(
                "empty_init=False asks for whole parameters, but at stage 3 DeepSpeed shares them out as they are "
                "made. Leave `empty_init` out."
            )
        with self.precision.module_init_context(), self.module_sharded_context():
            yield

    def module_sharded_context(self) -> AbstractContextManager[None]:
        """Return the context in which layers are made and their parameters shared out; nothing before stage 3."""
        return self._zero_init() if self.zero_stage_3 else nullcontext()

    @contextmanager
    def _zero_init(self) -> Iterator[None]:
        self._need_group("init_module")
        import deepspeed

        with deepspeed.zero.Init(
            remote_device=self._remote_device,
            pin_memory=bool(block(block(self.config, "zero_optimization"), "offload_param").get("pin_memory")),
            config_dict_or_path=self._engine_config(),
        ):
            yield

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Return DeepSpeed's engine for ``module`` and its one optimizer.

        The optimizer is the user's own, over this rank's part of the parameters. Collective.
        """
        if len(optimizers) != 1:
            raise ValueError(
                f"DeepSpeed sets up one optimizer with each module, but got {len(optimizers)}. Call "
                "`fabric.setup(model, optimizer)`; with several optimizers, once for each and its own module."
            )
        (optimizer,) = optimizers
        if isinstance(optimizer, LBFGS):
            raise ValueError("DeepSpeed's engine steps without a closure, which LBFGS needs. Use another optimizer.")
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(
                "DeepSpeed's engine steps the scheduler that `setup` gets, and has no metric for ReduceLROnPlateau. "
                "Leave `scheduler` out of `setup` and step it yourself."
            )
        self._warn_of_optimizer(optimizer)
        groups = [[p for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]
        engine = self._make_engine(module, self._engine_config(), optimizer, scheduler)
        self._engines[engine] = window = Window(scheduler, groups)
        drop_all = functools.partial(zero_grad, weakref.ref(engine), window)
        optimizer.zero_grad = drop_all  # type: ignore[method-assign]
        return engine, [optimizer], scheduler

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Return an engine for inference. Collective."""
        config = self._engine_config()
        unwanted = ["optimizer", "scheduler"]
        if zero_stage(config) < 3:
            # before stage 3 it shares out nothing that inference has, and in 16 bits it wants to make an optimizer
            unwanted += ["zero_optimization", "fp16", "bf16"]
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(self.precision.dtype)
        for name in unwanted:
            config.pop(name, None)
        engine = self._make_engine(module, config)
        self._engines[engine] = Window()
        return engine

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Not possible on its own: raises ``NotImplementedError``."""
        raise NotImplementedError(
            "DeepSpeed sets up a module and its optimizer together. Call `fabric.setup(model, optimizer)` instead of "
            "`setup_module` and `setup_optimizers`."
        )

    def _make_engine(
        self, module: nn.Module, config: dict[str, Any], optimizer: Any = None, scheduler: Any = None
    ) -> Any:
        self._need_group("setup")
        import deepspeed

        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            model_parameters=[p for p in module.parameters() if p.requires_grad],
            config=config,
            dist_init_required=False,
        )
        if "torch._dynamo" in sys.modules:  # nothing is compiled else
            _leave_out_of_graphs("deepspeed")
        return engine

    def _engine_config(self) -> dict[str, Any]:
        from deepspeed.runtime import constants

        known = hasattr(constants, "MANAGED_GRADIENT_ACCUMULATION")  # DeepSpeed 0.19.6 and later
        return complete(self.config, self.precision.precision, self._scaling, can_accumulate=known)

    def _warn_of_optimizer(self, optimizer: Optimizer) -> None:
        if "optimizer" in self.config:
            rank_zero_warn(
                f"The DeepSpeed configuration has an optimizer, but {type(optimizer).__name__}, which `setup` got, is "
                "the one that is used. Take `optimizer` out of the configuration.",
                category=PossibleUserWarning,
            )
        offloaded = block(block(self.config, "zero_optimization"), "offload_optimizer").get("device") == "cpu"
        if offloaded and self.root_device.type != "cpu" and not type(optimizer).__module__.startswith("deepspeed."):
            rank_zero_warn(
                f"{type(optimizer).__name__} is slow on optimizer state that is offloaded to the CPU. Use "
                "`deepspeed.ops.adam.DeepSpeedCPUAdam` if you can.",
                category=PossibleUserWarning,
            )

    # -- the step

    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Compute gradients of the loss ``tensor`` through the engine; extra arguments go to the engine's ``backward``.

        Raises:
            RuntimeError: without ``module``, if several were set up with optimizers.

        """
        engine = self._engine_of_step(module)
        window = self._engines[engine]
        if window.backwards and not window.may_accumulate(engine):
            raise RuntimeError(_one_backward_message(self.config))
        if hasattr(engine.optimizer, "clear_backward_seen_flag"):
            # otherwise done by forward alone: at stage 3 a second backward without one between would replace the first
            engine.optimizer.clear_backward_seen_flag()
        window.backwards += 1
        super().backward(tensor, engine, *args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, **kwargs: Any) -> Any:
        """Let the engine step, and with it the scheduler; ``closure=`` is the only keyword. Returns its loss."""
        engine = next((engine for engine in self._engines if engine.client_optimizer is optimizer), None)
        if engine is None:
            raise RuntimeError(
                f"{type(optimizer).__name__} was not set up with a module, so there is no engine to step. Call "
                "`fabric.setup(model, optimizer)` and step what it returns."
            )
        window = self._engines[engine]
        window.check_scheduler()
        loss = super().optimizer_step(engine, **kwargs)
        zero_gradient_buffers(engine)
        window.close()
        return loss

    def _engine_of_step(self, module: nn.Module | None) -> Any:
        training = [engine for engine in self._engines if engine.client_optimizer is not None]
        if module is None:
            if len(training) == 1:
                return training[0]
            raise RuntimeError(
                f"{len(training)} models were set up with optimizers, so `backward` cannot know whose engine to use. "
                "Pass the model: `fabric.backward(loss, model=model)`."
                if training
                else "No model was set up with an optimizer. Call `fabric.setup(model, optimizer)` before `backward`."
            )
        engine = self._engine_of(module)
        if engine in training:
            return engine
        raise RuntimeError(
            f"{type(module if engine is None else engine.module).__name__} was set up without an optimizer, which is "
            "for inference. Call `fabric.setup(model, optimizer)` to train it."
        )

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """The engine alone can clip: raises ``NotImplementedError``."""
        raise NotImplementedError(
            "DeepSpeed clips gradients in its own step. Instead of `clip_gradients`, set the norm in its "
            f"configuration: `DeepSpeedStrategy(config={{..., 'gradient_clipping': {max_norm!r}}})`."
        )

    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float) -> None:
        """Not possible: raises ``NotImplementedError``."""
        raise NotImplementedError(
            "DeepSpeed cannot clip gradients by value. It clips their norm: set `gradient_clipping` in its "
            "configuration."
        )

    # -- files

    def _prepare_checkpoint(
        self,
        state: MutableMapping[str, Any],
        storage_options: Any,
        filter: Mapping[str, Callable[[str, Any], bool]],
    ) -> Prepared:
        """Collective: a folder of DeepSpeed's; its path is seen by all ranks.

        ``state`` has exactly one module with an engine; its optimizer and scheduler are saved with it in any case.
        """
        if storage_options is not None:
            raise TypeError(f"DeepSpeed writes files itself and has no use for storage_options={storage_options!r}.")
        if filter:
            raise TypeError("DeepSpeed writes the whole of its state, so it cannot apply a `filter`. Leave it out.")
        engine = self._engine_in(state, "save")
        others = {OWN_STATE: {key: state_of(obj) for key, obj in self._besides(engine, state).items()}}
        options = {"client_state": others, "exclude_frozen_parameters": self._exclude_frozen_parameters}
        return FolderOfAnEngine(engine, options, self.global_rank).prepared()

    def load_checkpoint(
        self,
        path: _PATH,
        state: nn.Module | Optimizer | MutableMapping[str, Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Collective: restore ``state`` in place from what ``save_checkpoint`` wrote, and return what is left.

        Optimizer state is restored if ``state`` has the optimizer, and needs as many ranks as there were in saving.
        With ``load_full_weights``, ``path`` may be a file with full weights under the names of ``state``. A bare module
        in ``state`` takes a file that holds a bare state dict.

        Raises:
            ValueError: if ``state`` lacks a module that was set up, or ``path`` holds no checkpoint of DeepSpeed's.
            TypeError: for ``weights_only=True``, which DeepSpeed's way of reading folders cannot honour.

        """
        if isinstance(state, Optimizer):
            raise NotImplementedError(_NO_PLAIN_OPTIMIZER_STATE)
        if isinstance(state, nn.Module):
            return super().load_checkpoint(path, state, strict, weights_only)
        if not state:
            raise ValueError(
                "DeepSpeed loads into a model, so `state` is needed. Pass e.g. "
                "{'model': model, 'optimizer': optimizer}."
            )
        engine = self._engine_in(state, "load")
        if os.path.isfile(path) and self._load_full_weights:
            return self._load_full(path, state, strict, weights_only)
        if weights_only:
            raise TypeError(
                "weights_only=True cannot be honoured: DeepSpeed unpickles its files. Leave it out, for files that "
                "you trust."
            )
        return Loading(self, engine, checkpoint_folder(path), state, strict).run()

    def _load_full(
        self, path: _PATH, state: MutableMapping[str, Any], strict: bool, weights_only: bool | None
    ) -> dict[str, Any]:
        if any(isinstance(obj, Optimizer) for obj in state.values()):
            raise NotImplementedError(_NO_PLAIN_OPTIMIZER_STATE)
        return super().load_checkpoint(path, state, strict, weights_only)

    def _engine_in(self, state: Mapping[str, Any], doing: str) -> Any:
        engines = [
            engine
            for obj in state.values()
            if isinstance(obj, nn.Module) and (engine := self._engine_of(obj)) is not None
        ]
        if len(engines) == 1:
            if engines[0].checkpoint_engine is None:
                raise NotImplementedError(
                    f"DeepSpeed cannot {doing} a model that was set up at stage 3 without an optimizer. Set it up with "
                    "one, or use full weights: `fabric.strategy.get_module_state_dict(model.module)` and "
                    "`fabric.load_raw`."
                )
            return engines[0]
        raise ValueError(
            f"DeepSpeed can {doing} one model that was set up, with other values beside it, but `state` has "
            f"{len(engines)} such models among its keys {list(state)}. "
            + (f"Call `{doing}` once for each, with another path." if engines else "Pass the model itself.")
        )

    def _engine_of(self, module: nn.Module) -> Any:
        """The engine that ``module`` is, or is inside of; None: it has none."""
        for engine in self._engines:
            if module is engine or uncompiled(module) in (engine, uncompiled(engine.module)):
                return engine
        return None

    def _besides(self, engine: Any, state: Mapping[str, Any]) -> dict[str, Any]:
        """What in ``state`` the engine does not save itself."""
        return {
            key: obj
            for key, obj in state.items()
            if obj is not engine.client_optimizer
            and not (isinstance(obj, nn.Module) and self._engine_of(obj) is engine)
        }

    def _module_with_state(self, module: nn.Module) -> nn.Module:
        engine = self._engine_of(module)
        return module if engine is None else engine.module

    def _check_fits(self, name: str, obj: Any, saved: Any, strict: bool) -> None:
        if isinstance(obj, nn.Module) and self._engine_of(obj) is not None and self.zero_stage_3:
            with gathered(obj.parameters()):
                check_module(self._module_with_state(obj), saved, strict, name)
        else:
            super()._check_fits(name, obj, saved, strict)

    def state_dict(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`get_module_state_dict` at stage 3, where what a rank has of a parameter has no name or shape."""
        if not self.zero_stage_3 or self._engine_of(module) is None:
            return super().state_dict(module, *args, **kwargs)
        if args or kwargs:
            raise NotImplementedError("`state_dict` at ZeRO stage 3 takes no arguments. Leave them out.")
        return self.get_module_state_dict(module)

    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """Collective at stage 3: then rank 0 gets all of the state, in CPU memory, the others nothing."""
        engine = self._engine_of(module)
        if engine is None or not self.zero_stage_3:
            return super().get_module_state_dict(module)
        state = gathered_state(engine.module, keep=self.is_global_zero)
        return state if self.is_global_zero else {}

    def load_module_state_dict(self, module: nn.Module, state_dict: dict[str, Any], strict: bool = True) -> Any:
        """Collective: copy ``state_dict``, with the user's names and full tensors on every rank, into ``module``."""
        engine = self._engine_of(module)
        if engine is None:
            return super().load_module_state_dict(module, state_dict, strict)
        try:
            with gathered(engine.module.parameters(), write=True):
                return engine.module.load_state_dict(state_dict, strict=strict)
        finally:
            if hasattr(engine.optimizer, "refresh_fp32_params"):
                # the copy that is updated; the next step would bring the old weights back
                engine.optimizer.refresh_fp32_params()

    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Each rank has a part that only DeepSpeed can put together: raises ``NotImplementedError`` unless stage 0."""
        if zero_stage(self.config):
            raise NotImplementedError(_NO_PLAIN_OPTIMIZER_STATE)
        return super().get_optimizer_state(optimizer)

    def load_optimizer_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """As :meth:`get_optimizer_state`."""
        if zero_stage(self.config):
            raise NotImplementedError(_NO_PLAIN_OPTIMIZER_STATE)
        super().load_optimizer_state(optimizer, state_dict)

    # -- what was done

    def holdings(self, module: nn.Module, forward_module: nn.Module) -> list[Holding]:
        engine = self._engine_of(forward_module)
        if engine is None:
            return super().holdings(module, forward_module)
        gradients = gradients_of(engine)
        return [
            part_of(engine, name, parameter, gradients)
            if hasattr(parameter, "ds_tensor")
            else held_whole(engine, name, parameter, gradients)
            for name, parameter in module.named_parameters(remove_duplicate=False)
        ]

    def tracked(self, optimizer: Optimizer) -> list[list[Tensor]]:
        """The module's parameters: ``optimizer`` itself has flat pieces of them, which the engine copies back."""
        engine = next((engine for engine in self._engines if engine.client_optimizer is optimizer), None)
        return super().tracked(optimizer) if engine is None else self._engines[engine].groups

    def remarks(self) -> list[str]:
        stage = zero_stage(self.config)
        found = [*super().remarks(), f"ZeRO stage {stage}: {_SHARED_OUT[stage]}"]
        zero = block(self.config, "zero_optimization")
        for name, what in (("offload_optimizer", "The optimizer's state is"), ("offload_param", "Parameters are")):
            if device := block(zero, name).get("device"):
                found.append(f"{what} kept on {device}.")
        if norm := self.config.get("gradient_clipping"):
            found.append(f"Gradients are clipped to the norm {norm} in each step.")
        if (steps := accumulation_steps(self.config)) > 1:
            found.append(f"The engine updates weights at every {steps}th step of the optimizer.")
        return found

    # -- end

    def teardown(self) -> None:
        owned = self._owns_group
        super().teardown()
        self._restore_variables()
        if owned and (groups := sys.modules.get("deepspeed.utils.groups")) is not None:
            _forget_groups(groups)


_FULL_PRECISION = DeepSpeedPrecision("32-true")
_SHARED_OUT = {
    0: "nothing is shared out; every rank has parameters, gradients and optimizer state.",
    1: "each rank has a part of the optimizer state, and all parameters and gradients.",
    2: "each rank has a part of the optimizer state and of the gradients, and all parameters.",
    3: "each rank has a part of the optimizer state, of the gradients and of the parameters.",
}
_NO_PLAIN_OPTIMIZER_STATE = (
    "DeepSpeed shares the optimizer's state out over the ranks, in a form of its own, so there is no plain state "
    "dict of it. Save and load it with the model: `fabric.save(path, {'model': model, 'optimizer': optimizer})`."
)


def _one_backward_message(config: Mapping[str, Any]) -> str:
    steps = accumulation_steps(config)
    if steps > 1:
        return (
            f"The DeepSpeed configuration says gradient_accumulation_steps={steps}: the engine counts, so "
            "`optimizer.step()` has to follow each `backward`. Take it out of the configuration to count yourself."
        )
    if overlaps_at_first_stage(config):
        return (
            "The DeepSpeed configuration says overlap_comm=true at a stage below 2, with which gradients of several "
            "backwards cannot add up. Set it to false, use stage 2, or call `optimizer.step()` after each `backward`."
        )
    return (
        "With this configuration or version of DeepSpeed, gradients of several backwards cannot add up. Use "
        "deepspeed>=0.19.6 without `managed_gradient_accumulation`, or call `optimizer.step()` after each `backward`."
    )


@functools.cache
def _leave_out_of_graphs(package: str) -> None:
    """Let the compiler look for the module's own code at once, where it would trace ``package``'s in many small graphs.

    What the engine does around forward breaks graphs, and the compiler gives up after having compiled it a few times.
    """
    from torch._dynamo import trace_rules

    trace_rules.add(package)


def _forget_groups(groups: Any) -> None:
    """Let DeepSpeed make its process groups anew, after the ones that it remembers were destroyed with the world."""
    if hasattr(groups, "_release_process_group_references"):
        groups._release_process_group_references()
    else:  # DeepSpeed up to 0.19.6
        groups._WORLD_GROUP = None


class _Engines(weakref.WeakKeyDictionary[Any, "Window"]):
    """The engines of this process, for as long as somebody uses them."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Engines, ()  # in another process there are none
