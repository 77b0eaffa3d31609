"""What `pip install megatron-dion` would bring."""

from importlib.metadata import requires

from packaging.requirements import Requirement


def requirements(extra: str) -> set[str]:
    found = map(Requirement, requires("megatron-dion") or [])
    return {
        one.name for one in found if one.marker is None or one.marker.evaluate({"extra": extra})
    }


def test_only_its_extra_brings_transformer_engine() -> None:
    for extra in ("", "data", "run", "dev"):
        assert "transformer-engine" not in requirements(extra)
    assert "transformer-engine" in requirements("te")


def test_nothing_brings_apex() -> None:
    # The package index has an unrelated project of that name.
    assert all("apex" not in requirements(extra) for extra in ("", "data", "run", "dev", "te"))
