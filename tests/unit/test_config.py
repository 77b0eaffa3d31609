import math

import pytest

from megatron_dion.algorithm.config import DionConfig

SCALE_MODES = ("dion", "spectral", "unit_rms_norm")


@pytest.mark.parametrize(
    ("m", "n", "fraction", "multiple", "rank"),
    [
        (64, 32, 0.25, 1, 8),
        (10, 99, 0.25, 1, 3),  # ceil(2.5)
        (30, 30, 0.1, 1, 3),  # 0.1 * 30 = 3.0000000000000004
        (49, 50, 1 / 49, 1, 1),  # 49 * (1 / 49) = 0.9999999999999999
        (100, 70, 0.1, 8, 8),  # 7 rounded up
        (100, 90, 0.1, 8, 16),  # 9 rounded up
        (100, 30, 1.0, 8, 30),  # 32 does not fit
        (100, 5, 0.1, 8, 5),
        (64, 64, 1e-12, 1, 1),
        (1, 1, 0.01, 1, 1),
        (500, 1, 0.25, 4, 1),
    ],
)
def test_rank_is_the_rounded_share_of_the_smaller_side(
    m: int, n: int, fraction: float, multiple: int, rank: int
) -> None:
    assert DionConfig(rank_fraction=fraction, rank_multiple_of=multiple).rank(m, n) == rank


@pytest.mark.parametrize(
    ("mode", "m", "n", "scale"),
    [
        ("dion", 16, 4, 2.0),
        ("dion", 4, 16, 0.5),
        ("unit_rms_norm", 16, 4, 2.0),
        ("unit_rms_norm", 4, 16, 0.5),
        ("spectral", 100, 4, 2.0),
        ("spectral", 4, 100, 2.0),
        ("spectral", 25, 25, 1.0),
    ],
)
def test_scale(mode: str, m: int, n: int, scale: float) -> None:
    assert DionConfig(scale_mode=mode).scale(m, n) == pytest.approx(scale, rel=1e-15)
    tripled = DionConfig(scale_mode=mode, extra_scale_factor=3.0)
    assert tripled.scale(m, n) == pytest.approx(3 * scale, rel=1e-15)


@pytest.mark.parametrize(
    ("name", "values", "what"),
    [
        ("momentum", (-0.1, 1.0, 2.0, math.nan), "in [0, 1)"),
        ("rank_fraction", (0.0, -0.5, 1.0001, math.nan), "in (0, 1]"),
        ("rank_multiple_of", (0, -8), "at least 1"),
        ("scale_mode", ("", "Dion", "muon"), f"one of {SCALE_MODES}"),
        (
            "extra_scale_factor",
            (0.0, -1.0, math.inf, math.nan),
            "positive and finite",
        ),
        ("comm_dtype", ("", "fp16"), "one of ('fp32', 'bf16')"),
        ("exchange_sets", (0, -1), "at least 1"),
        ("eps", (0.0, -1e-8, math.inf, math.nan), "positive and finite"),
    ],
)
def test_value_out_of_range_is_refused_by_name(
    name: str, values: tuple[object, ...], what: str
) -> None:
    for value in values:
        with pytest.raises(ValueError) as error:  # noqa: PT011 (compared below)
            DionConfig(**{name: value})  # type: ignore[arg-type]
        assert str(error.value) == f"{name} must be {what}, not {value!r}"
