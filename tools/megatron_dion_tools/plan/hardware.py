"""Rates of machines, from data sheets or files, and what share of them is assumed to be reached."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

GB = 1e9


@dataclass(frozen=True)
class Hardware:
    """One device, and its links. Peak rates; times take the shares named `..._share` of them.

    Attributes:
        name: for people.
        source: where the figures are from.
        half: operations per second of bf16 products.
        tf32: of float32 products whose operands may be rounded to TF32.
        single: of float32 products.
        memory: bytes.
        bandwidth: of memory, bytes per second.
        node_link: bytes per second that a device sends to others of its node.
        network: bytes per second that it sends to other nodes.
        ranks_per_node: devices of a node.
        device: `cuda` or `cpu`, which decides how Dion orthonormalizes.
        latency: seconds of a collective without bytes.
        product_share: of the rate of products.
        factorization_share: of the rate of float32 products, for QR, Cholesky and solves.
        bandwidth_share: of the memory's bandwidth.
        link_share: of links.
    """

    name: str
    source: str
    half: float
    tf32: float
    single: float
    memory: float
    bandwidth: float
    node_link: float
    network: float
    ranks_per_node: int = 8
    device: str = "cuda"
    latency: float = 30e-6
    product_share: float = 0.6
    factorization_share: float = 0.1
    bandwidth_share: float = 0.8
    link_share: float = 0.7


# Per device and direction; data sheets give NVLink in both directions together. Nothing was
# measured on the GPUs, and their shares are assumptions.
PRESETS = {
    "h100": Hardware(
        name="h100",
        source="NVIDIA H100 data sheet, SXM (dense); DGX H100: 400 Gb/s per GPU; not measured",
        half=989e12,
        tf32=494e12,
        single=67e12,
        memory=80 * GB,
        bandwidth=3350 * GB,
        node_link=450 * GB,
        network=50 * GB,
    ),
    "h200": Hardware(
        name="h200",
        source="NVIDIA H200 data sheet, SXM (dense); DGX H200: 400 Gb/s per GPU; not measured",
        half=989e12,
        tf32=494e12,
        single=67e12,
        memory=141 * GB,
        bandwidth=4800 * GB,
        node_link=450 * GB,
        network=50 * GB,
    ),
    "b200": Hardware(
        name="b200",
        source="NVIDIA HGX B200 data sheet, an eighth (dense); 400 Gb/s per GPU; not measured",
        half=2250e12,
        tf32=1125e12,
        single=75e12,
        memory=180 * GB,
        bandwidth=7700 * GB,
        node_link=900 * GB,
        network=50 * GB,
    ),
    "cpu": Hardware(
        name="cpu",
        source="one thread of the machine of the tests, measured by planning/calibration.py",
        half=108e9,
        tf32=108e9,
        single=108e9,
        memory=8 * GB,
        bandwidth=66.5 * GB,
        node_link=0.597 * GB,
        network=0.597 * GB,
        device="cpu",
        latency=99e-6,
        product_share=1.0,
        factorization_share=0.43,
        bandwidth_share=1.0,
        link_share=1.0,
    ),
}


def hardware(name: str) -> Hardware:
    """A preset, or what a YAML file with the attributes of `Hardware` says.

    Raises:
        ValueError: there is no such preset or file, or it lacks or has other attributes.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"--hardware {name}: no file, and none of {', '.join(PRESETS)}")
    import yaml

    known = {field.name for field in fields(Hardware)}
    try:
        content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--hardware {name}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ValueError(f"--hardware {name}: write lines such as `half: 989e12`")
    if unknown := sorted(set(map(str, content)) - known):
        raise ValueError(f"--hardware {name}: unknown {', '.join(unknown)}: take {sorted(known)}")
    words = ("name", "source", "device")
    try:
        values: dict[str, Any] = {k: v if k in words else float(v) for k, v in content.items()}
        if "ranks_per_node" in values:
            values["ranks_per_node"] = int(values["ranks_per_node"])
        return Hardware(**values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"--hardware {name}: {error}") from error
