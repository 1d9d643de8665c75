import importlib

import pytest
import torch
from tests import transformer_engine_stand_in as stand_in

from lightning.fabric.plugins.precision import (
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
    TransformerEnginePrecision,
)
from lightning.fabric.plugins.precision._table import _TABLE, PRECISIONS, build_precision, canonical
from lightning.fabric.utilities.imports import package_available


class TestCanonical:
    @pytest.mark.parametrize("name", PRECISIONS)
    def test_canonical_names_stay(self, name):
        assert canonical(name) == name

    @pytest.mark.parametrize(
        ("given", "name"), [(None, "32-true"), (32, "32-true"), ("32", "32-true"), (64, "64-true"), ("64", "64-true")]
    )
    def test_short_forms(self, given, name):
        assert canonical(given) == name

    @pytest.mark.parametrize(("given", "name"), [(16, "16-mixed"), ("16", "16-mixed"), ("bf16", "bf16-mixed")])
    def test_ambiguous_short_forms_come_with_a_nudge(self, given, name):
        with pytest.warns(UserWarning, match=f"precision={given!r} means '{name}'"):
            assert canonical(given) == name

    @pytest.mark.parametrize("given", ["16-miixed", "fp16", "bnb.nf4", "", 8, 32.0, True, b"32-true", ["32"]])
    def test_anything_else_is_refused_with_the_choices(self, given):
        with pytest.raises(ValueError, match=r"Unknown precision .* Known: '64-true', '32-true'"):
            canonical(given)

    def test_a_typo_gets_a_suggestion(self):
        with pytest.raises(ValueError, match="Did you mean 'bf16-mixed'?"):
            canonical("BF16-mixd")


class TestBuild:
    @pytest.mark.parametrize(
        ("name", "cls"),
        [
            ("64-true", DoublePrecision),
            ("32-true", Precision),
            ("16-true", HalfPrecision),
            ("bf16-true", HalfPrecision),
            ("16-mixed", MixedPrecision),
            ("bf16-mixed", MixedPrecision),
        ],
    )
    def test_class_and_name(self, name, cls):
        precision = build_precision(name, "cpu")
        assert type(precision) is cls
        assert precision.precision == name

    def test_mixed_precision_computes_on_the_device_type(self):
        assert build_precision("bf16-mixed", "cuda").device == "cuda"

    @pytest.mark.parametrize(
        ("name", "dtype"), [("transformer-engine", torch.bfloat16), ("transformer-engine-float16", torch.float16)]
    )
    def test_names_of_the_transformer_engine(self, name, dtype, monkeypatch):
        package_available.cache_clear()
        stand_in.install(monkeypatch)
        precision = build_precision(name, "cuda")
        package_available.cache_clear()
        assert type(precision) is TransformerEnginePrecision
        assert precision.precision == name
        assert precision.weights_dtype == precision.fallback_compute_dtype == dtype

    @pytest.mark.skipif(package_available("transformer_engine"), reason="the package is here")
    @pytest.mark.parametrize("name", ["transformer-engine", "transformer-engine-float16"])
    def test_without_its_package_a_name_says_how_to_get_it(self, name):
        with pytest.raises(
            ModuleNotFoundError, match=r'needs the package `transformer_engine`.*"transformer-engine\[py'
        ):
            build_precision(name, "cuda")

    @pytest.mark.parametrize("name", PRECISIONS)
    def test_every_name_is_that_of_a_class(self, name):
        module, _, cls = _TABLE[name].target.partition(":")
        assert issubclass(getattr(importlib.import_module(module), cls), Precision)
