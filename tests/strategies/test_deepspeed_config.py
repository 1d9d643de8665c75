"""DeepSpeed's configuration: what arguments become, what is completed, and what contradicts. Without the package."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning.fabric.strategies._deepspeed_config import (
    LossScaling,
    ZeroOptions,
    accumulation_steps,
    check_precision,
    choose_config,
    complete,
    read_config,
    zero_stage,
)
from lightning.fabric.utilities.warnings import PossibleUserWarning

_VARIABLE = "PL_DEEPSPEED_CONFIG_PATH"


def _complete(config: dict[str, Any], precision: str = "32-true", **kwargs: Any) -> dict[str, Any]:
    return complete(config, precision, LossScaling(), **kwargs)


class TestArguments:
    def test_the_defaults_are_stage_2(self) -> None:
        assert ZeroOptions().check().as_config() == {
            "activation_checkpointing": {
                "partition_activations": False,
                "cpu_checkpointing": False,
                "contiguous_memory_optimization": False,
                "synchronize_checkpoint_boundary": False,
            },
            "zero_optimization": {
                "stage": 2,
                "contiguous_gradients": True,
                "overlap_comm": True,
                "allgather_partitions": True,
                "reduce_scatter": True,
                "allgather_bucket_size": 200_000_000,
                "reduce_bucket_size": 200_000_000,
                "sub_group_size": 1_000_000_000_000,
            },
            "zero_allow_untested_optimizer": True,
        }

    @pytest.mark.parametrize("options", [ZeroOptions(zero_optimization=False), ZeroOptions(stage=0)])
    def test_zero_can_be_off(self, options: ZeroOptions) -> None:
        config = options.check().as_config()
        assert "zero_optimization" not in config
        assert zero_stage(config) == 0

    def test_at_stage_1_nothing_overlaps_so_that_gradients_can_add_up(self) -> None:
        assert ZeroOptions(stage=1).as_config()["zero_optimization"]["overlap_comm"] is False
        assert ZeroOptions(stage=3, overlap_comm=False).as_config()["zero_optimization"]["overlap_comm"] is False

    def test_what_is_offloaded_is_said_only_if_asked_for(self) -> None:
        config = ZeroOptions(stage=3, offload_optimizer=True, offload_parameters=True, max_in_cpu=5.0).as_config()
        assert config["zero_optimization"]["offload_optimizer"] == {
            "device": "cpu",
            "nvme_path": "/local_nvme",
            "buffer_count": 4,
            "pin_memory": False,
        }
        assert config["zero_optimization"]["offload_param"] == {
            "device": "cpu",
            "nvme_path": "/local_nvme",
            "buffer_count": 5,
            "buffer_size": 100_000_000,
            "max_in_cpu": 5,
            "pin_memory": False,
        }
        assert config["zero_force_ds_cpu_optimizer"] is False
        assert "aio" not in config

    def test_nvme_comes_with_how_it_is_read(self) -> None:
        config = ZeroOptions(
            stage=3, offload_optimizer=True, offload_optimizer_device="nvme", nvme_path="/disk", queue_depth=4
        ).as_config()
        assert config["zero_optimization"]["offload_optimizer"]["device"] == "nvme"
        assert config["zero_optimization"]["offload_optimizer"]["nvme_path"] == "/disk"
        assert config["aio"] == {
            "block_size": 1048576,
            "queue_depth": 4,
            "single_submit": False,
            "overlap_events": True,
            "thread_count": 1,
        }

    def test_activations_are_checkpointed_as_asked_for(self) -> None:
        config = ZeroOptions(partition_activations=True, cpu_checkpointing=True).as_config()
        assert config["activation_checkpointing"]["partition_activations"] is True
        assert config["activation_checkpointing"]["cpu_checkpointing"] is True

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"stage": 4}, "stage must be 0, 1, 2 or 3, but got 4"),
            ({"stage": 2, "offload_parameters": True}, "stage 3 shares out, but this is stage 2"),
            ({"zero_optimization": False, "stage": 3, "offload_parameters": True}, "but this is stage 0"),
            ({"stage": 0, "offload_optimizer": True}, "needs ZeRO, which is off"),
            ({"offload_optimizer_device": "disk"}, "offload_optimizer_device must be 'cpu' or 'nvme', but got 'disk'"),
        ],
    )
    def test_what_deepspeed_would_ignore_is_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ZeroOptions(**options).check()


class TestChoice:
    def test_a_configuration_wins_over_arguments_and_says_so(self) -> None:
        config = {"zero_optimization": {"stage": 1}}
        with pytest.warns(PossibleUserWarning, match="used as it is, without stage=3, pin_memory=True"):
            assert choose_config(config, ZeroOptions(stage=3, pin_memory=True)) == config

    def test_the_users_dict_stays_as_it_is(self) -> None:
        config: dict[str, Any] = {"zero_optimization": {"stage": 1}}
        chosen = choose_config(config, ZeroOptions())
        chosen["zero_optimization"]["stage"] = 2
        assert config == {"zero_optimization": {"stage": 1}}

    def test_it_may_be_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
        assert choose_config(path, ZeroOptions()) == choose_config(str(path), ZeroOptions())
        assert zero_stage(choose_config(path, ZeroOptions())) == 1

    def test_the_environment_may_name_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
        monkeypatch.setenv(_VARIABLE, str(path))
        assert zero_stage(choose_config(None, ZeroOptions())) == 3
        assert choose_config({}, ZeroOptions()) == {}

    def test_without_either_the_arguments_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(_VARIABLE, raising=False)
        assert zero_stage(choose_config(None, ZeroOptions(stage=1))) == 1

    def test_a_missing_file_is_missed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(_VARIABLE, str(tmp_path / "none.json"))
        with pytest.raises(FileNotFoundError, match=r"no DeepSpeed configuration at .*none\.json"):
            choose_config(None, ZeroOptions())

    @pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[1]", r"object, but it is \[1\]")])
    def test_a_file_of_something_else_is_refused(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "ds.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(path)

    def test_anything_else_is_refused(self) -> None:
        with pytest.raises(TypeError, match="must be a dict or the path of a JSON file, but got 3"):
            read_config(3)  # type: ignore[arg-type]


class TestCompletion:
    def test_what_deepspeed_insists_on_is_filled_in(self) -> None:
        config = {"zero_optimization": {"stage": 2}}
        assert _complete(config) == {
            **config,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "managed_gradient_accumulation": False,
        }

    def test_what_the_user_said_stays(self) -> None:
        config = {"train_micro_batch_size_per_gpu": 7, "gradient_clipping": 2.0, "managed_gradient_accumulation": True}
        assert _complete(config) == config

    def test_a_total_batch_size_is_enough(self) -> None:
        assert "train_micro_batch_size_per_gpu" not in _complete({"train_batch_size": 8})

    @pytest.mark.parametrize(
        ("precision", "expected"),
        [
            ("32-true", {}),
            ("bf16-true", {"bf16": {"enabled": True}}),
            ("bf16-mixed", {"bf16": {"enabled": True}}),
            ("16-mixed", {"fp16": {**vars(LossScaling()), "enabled": True}}),
            ("16-true", {"fp16": {**vars(LossScaling()), "enabled": True}}),
        ],
    )
    def test_precisions_switch_their_block_on(self, precision: str, expected: dict[str, Any]) -> None:
        completed = _complete({}, precision)
        assert {name: completed[name] for name in ("fp16", "bf16") if name in completed} == expected

    def test_loss_scaling_is_the_users(self) -> None:
        config = {"fp16": {"loss_scale": 8}}
        completed = complete(config, "16-mixed", LossScaling(loss_scale=2, hysteresis=5))
        assert completed["fp16"] == {**vars(LossScaling(hysteresis=5)), "loss_scale": 8, "enabled": True}

    def test_who_counts_the_backwards(self) -> None:
        key = "managed_gradient_accumulation"
        assert _complete({"gradient_accumulation_steps": 1})[key] is False
        assert key not in _complete({"gradient_accumulation_steps": 4})
        assert key not in _complete({"zero_optimization": {"stage": 1, "overlap_comm": True}})
        assert _complete({"zero_optimization": {"stage": 2, "overlap_comm": True}})[key] is False
        assert key not in _complete({}, can_accumulate=False)
        assert accumulation_steps({"gradient_accumulation_steps": 4}) == 4
        assert accumulation_steps({}) == 1

    def test_the_configuration_given_stays_as_it_is(self) -> None:
        config: dict[str, Any] = {"bf16": {}}
        _complete(config, "bf16-true")
        assert config == {"bf16": {}}


class TestPrecisionTwice:
    @pytest.mark.parametrize(
        ("config", "precision", "way_out"),
        [
            ({"bf16": {"enabled": True}}, "32-true", "Pass precision='bf16-mixed'"),
            ({"fp16": {"enabled": True}}, "bf16-true", "Pass precision='16-mixed'"),
            ({"fp16": {"enabled": False}}, "16-true", "Pass precision='32-true'"),
        ],
    )
    def test_contradiction(self, config: dict[str, Any], precision: str, way_out: str) -> None:
        with pytest.raises(ValueError, match=f"precision is set twice.*{precision}.*{way_out}"):
            check_precision(config, precision)
        with pytest.raises(ValueError, match="precision is set twice"):
            _complete(config, precision)

    @pytest.mark.parametrize(
        ("config", "precision"),
        [
            ({"bf16": {"enabled": True}}, "bf16-mixed"),
            ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, "16-true"),
            ({"bf16": {"enabled": "auto"}}, "bf16-true"),
            ({"fp16": {"enabled": False}}, "32-true"),
            ({}, "16-mixed"),
        ],
    )
    def test_agreement(self, config: dict[str, Any], precision: str) -> None:
        check_precision(config, precision)
