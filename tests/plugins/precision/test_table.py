import pytest

from lightning.fabric.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.fabric.plugins.precision._table import PRECISIONS, build_precision, canonical


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

    @pytest.mark.parametrize("name", ["transformer-engine", "transformer-engine-float16"])
    def test_a_known_name_without_a_plugin_names_what_works(self, name):
        with pytest.raises(NotImplementedError, match=f"'{name}' is not available .* 'bf16-mixed'"):
            build_precision(name, "cuda")
