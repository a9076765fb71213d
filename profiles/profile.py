"""What a device profile says: peaks, memory, fixed costs, shape rules, formats and the habits of its runtime.

Every number has its unit in its name. Efficiencies are the share of a peak that large operations reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Compute:
    """Matrix and vector units of one device.

    `matrix_tflops`: dense peak by type (`fp32`, `fp16`, `bf16`, `int8`; int8 counts operations); a type that is absent
    has no arithmetic of its own. `matrix_efficiency`: share of the peak that large products reach. `half_rows`: rows of
    a product at which half of that is reached; `half_width`: the same for the narrower side of its weight. `overlap`:
    share of the shorter of computing and moving that hides behind the longer. `attention_efficiency`: share of the peak
    that attention scores and mixing reach. `vector_gelements_per_s`: elements of a norm, an activation or a softmax
    that the vector units work through per second, in units of 10^9, memory left aside. `cores` share a product, one
    more for each `grain` multiply-adds that it has (0: all of them always).
    """

    matrix_tflops: Mapping[str, float]
    matrix_efficiency: float
    attention_efficiency: float
    half_rows: float
    overlap: float
    vector_gelements_per_s: float
    half_width: float = 0.0
    cores: int = 1
    grain: float = 0.0


@dataclass(frozen=True)
class Memory:
    """Memory of one device, and its last cache (0: none that outlives an operation).

    `weight_efficiency`, `state_efficiency`: share of the bandwidth that reading weights, and keys and values, reaches.
    """

    capacity_gib: float
    bandwidth_gb_per_s: float
    weight_efficiency: float
    state_efficiency: float
    cache_mib: float
    cache_gb_per_s: float


@dataclass(frozen=True)
class Overhead:
    """Fixed costs: of each matrix operation, vector operation and collective, and of each forward pass.

    `parallel_us`: added to each operation over more than one token, where threads start for it; `head_us`: of each
    key/value head of each sequence, where attention runs head by head.
    """

    matrix_op_us: float
    vector_op_us: float
    collective_us: float
    step_us: float
    parallel_us: float = 0.0
    head_us: float = 0.0


@dataclass(frozen=True)
class Link:
    """Devices that one model may be split over, and one device's bandwidth to its peers (0 where there is one)."""

    devices: int
    bandwidth_gb_per_s: float
    efficiency: float


@dataclass(frozen=True)
class Rules:
    """What shapes the device wants.

    `tiles`: (K, N) step of a product by type of its weights; counts per device are padded to it. `width_multiple`:
    multiple of hidden and FFN width that large products like. `head_multiple`, `vocab_multiple`: of the head dimension
    and of the vocabulary. `uneven_layers`: whether the runtime opens layers of different sizes.
    """

    tiles: Mapping[str, tuple[int, int]]
    width_multiple: int
    head_multiple: int
    vocab_multiple: int
    uneven_layers: bool


@dataclass(frozen=True)
class Formats:
    """Types that the device computes with, the first of each being the default; `quantisations` by name."""

    weights: tuple[str, ...]
    activations: tuple[str, ...]
    kv: tuple[str, ...]
    quantisations: tuple[str, ...]


@dataclass(frozen=True)
class Runtime:
    """How the profile's runtime runs a layer.

    `name`; `export`: what Lightpress writes for it (`onnx`, `ascend-om`, `ascend-hf`). `head_passes`:
    vector operations over queries, keys and values (rotary embedding, transposes). `score_passes`: vector operations
    over the stored attention scores (0: attention is fused, scores are never stored). `state_passes`: times
    that keys and values cross memory in a step (1: read once, in place). `vector_ops`, `matrix_ops`: operations per
    layer, norms left out, that cost a fixed time each. `all_logits`: whether prefill computes all positions' logits.
    """

    name: str
    export: str
    head_passes: float
    score_passes: float
    state_passes: float
    vector_ops: float
    matrix_ops: float
    all_logits: bool


@dataclass(frozen=True)
class Profile:
    """One device as software sees it (a chip, a die, or a CPU socket); `sources` says where each field comes from."""

    name: str
    description: str
    kind: str
    compute: Compute
    memory: Memory
    overhead: Overhead
    link: Link
    rules: Rules
    formats: Formats
    runtime: Runtime
    sources: Mapping[str, str] = field(default_factory=dict)
