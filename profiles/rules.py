"""What a device wants of shapes: the multiples that pruned counts keep to, what padding costs, and broken rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from compress.shapes import LayerShape, ModelShape
from profiles.cost import TYPE_BYTES, Estimator, Step, Workload, kv_bytes, weight_bytes
from profiles.profile import Profile

LARGE = 8  # multiples of the wanted width from which on a dense size counts as large
GIB = 2**30


@dataclass(frozen=True)
class Steps:
    """Multiples that pruned counts keep to: of the hidden width, of FFN channels, and of KV heads in a layer."""

    hidden: int
    ffn: int
    kv_heads: int


def shape_steps(profile: Profile, workload: Workload, shape: ModelShape) -> Steps:
    """Return the multiples for pruning the dense `shape`.

    FFN channels and hidden width are K of one product and N of another, so both steps of the tile hold; FFN channels
    are split over the devices, the hidden width is not. Large widths go in the profile's `width_multiple`, where the
    dense ones do. A step may be above a small dense size, which then cannot be cut.
    """
    devices, wide = workload.devices, profile.rules.width_multiple
    tile = tile_step(profile, workload)
    hidden = raise_step(math.lcm(tile, tile_step(profile, workload, head=True)), wide, [shape.hidden])
    ffn = raise_step(tile * devices, wide * devices, [layer.ffn for layer in shape.layers])
    return Steps(hidden, ffn, kv_step(shape, devices))


def tile_step(profile: Profile, workload: Workload, head: bool = False) -> int:
    """Return the count that fills whole tiles of the weights (of the output head) both as K and as N of a product."""
    own = find_float(profile, workload) if head else workload.weights
    return math.lcm(*profile.rules.tiles.get((workload.head or own) if head else own, (1, 1)))


def find_float(profile: Profile, workload: Workload) -> str:
    """Return the type of activations where they are not quantised: the output head's unless the workload names one."""
    return Estimator(profile, workload, Step(1, 1, 1)).float_type


def raise_step(step: int, wide: int, dense: list[int]) -> int:
    """Return `step`, or a multiple of `wide` as well where all dense sizes are large multiples of `wide`."""
    large = all(size % wide == 0 and size >= LARGE * wide for size in dense)
    return math.lcm(step, wide) if large and dense else step


def kv_step(shape: ModelShape, devices: int) -> int:
    """Return the multiple of KV heads that leaves each device equally many query heads.

    KV heads are split where they suffice. Where they are fewer than the devices they are copied, and only the query
    heads behind them need to divide.
    """
    steps = [1]
    for layer in (layer for layer in shape.layers if layer.kv_heads):
        split = layer.kv_heads % devices == 0
        step = devices if split else devices // math.gcd(devices, layer.group)
        steps.append(step if layer.kv_heads % step == 0 else 1)
    return math.lcm(*steps)


# Padding


def list_products(shape: ModelShape, estimator: Estimator) -> Iterator[tuple[float, float, str]]:
    """Yield (K, N, type of the weights) of every product on one device, as the cost model counts them."""
    work, hidden = estimator.workload, shape.hidden
    for layer in shape.layers:
        query, kv = estimator.heads(layer)
        ffn = estimator.share(layer.ffn)
        for k, n in ((hidden, query + 2 * kv), (query, hidden), (hidden, ffn), (hidden, ffn), (ffn, hidden)):
            yield k, n, work.weights
    yield hidden, estimator.share(shape.vocab), work.head or estimator.float_type


def padding_loss(shape: ModelShape, profile: Profile, workload: Workload) -> float:
    """Return the share, 0 to 1, of multiply-adds in projections and head that only fill up tiles after the split."""
    estimator = Estimator(profile, workload, Step(1, 1, 1))
    used = done = 0.0
    for k, n, weights in list_products(shape, estimator):
        used += k * n
        done += estimator.padded(k, n, weights)
    return 1 - used / done if done else 0.0


# Broken rules


def check_shape(shape: ModelShape, profile: Profile, workload: Workload) -> list[str]:
    """Return a sentence for each rule of the device that the shape or the workload breaks; none when all is well."""
    checks = (check_types, check_devices, check_widths, check_heads, check_ends, check_evenness, check_memory)
    return [sentence for check in checks for sentence in check(shape, profile, workload)]


def check_types(shape: ModelShape, profile: Profile, workload: Workload) -> Iterator[str]:
    """Yield a sentence for each type that the device lacks."""
    formats = profile.formats
    wanted = (
        ("weights", workload.weights, formats.weights),
        ("activations", workload.activations, formats.activations),
        ("keys and values", workload.kv, formats.kv),
        ("weights of the output head", workload.head or formats.weights[0], formats.weights),
    )
    for what, own, allowed in wanted:
        if own not in allowed:
            others = f" (or {', '.join(allowed[1:])})" if allowed[1:] else ""
            yield f"{profile.name} has no {own} for {what}: use {allowed[0]}{others}."


def check_devices(shape: ModelShape, profile: Profile, workload: Workload) -> Iterator[str]:
    """Yield a sentence where a model is split over more devices than there are."""
    if workload.devices > profile.link.devices:
        yield f"{profile.name} joins at most {profile.link.devices} devices, not {workload.devices}: use fewer."


def find_layers(shape: ModelShape, broken: Callable[[LayerShape], bool]) -> tuple[LayerShape, str] | None:
    """Return the first layer that breaks a rule, with words on which ones do."""
    found = [(index, layer) for index, layer in enumerate(shape.layers) if broken(layer)]
    if not found:
        return None
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return found[0][1], "of every layer" if len(found) == len(shape.layers) else f"of layer {found[0][0]}{more}"


def check_widths(shape: ModelShape, profile: Profile, workload: Workload) -> Iterator[str]:
    """Yield a sentence where FFN channels or the hidden width do not fill whole tiles on each device."""
    step, devices = tile_step(profile, workload), workload.devices
    found = find_layers(shape, lambda layer: layer.ffn % (step * devices) != 0)
    if found:
        layer, which = found
        part = f" are {layer.ffn / devices:g} on each of {devices} devices," if devices > 1 else " are"
        wanted = f"make it a multiple of {step * devices}"
        yield f"The {layer.ffn} FFN channels {which}{part} not a multiple of {profile.name}'s {step}: {wanted}."
    step = math.lcm(step, tile_step(profile, workload, head=True))
    if shape.hidden % step:
        yield f"The hidden width {shape.hidden} is not a multiple of {profile.name}'s {step}: make it one."


def check_heads(shape: ModelShape, profile: Profile, workload: Workload) -> Iterator[str]:
    """Yield a sentence where heads are of a wrong size, or do not divide among the devices."""
    devices = workload.devices
    # Keys and values are the weights of the scores' products: in int8 their tiles are larger.
    step = math.lcm(profile.rules.head_multiple, *profile.rules.tiles.get(workload.kv, (1, 1))[:1])
    found = find_layers(shape, lambda layer: layer.head_dim % step != 0)
    if found:
        layer, which = found
        yield (
            f"The head dimension {layer.head_dim} {which} is not a multiple of the {step} that {profile.name} wants "
            f"with {workload.kv} keys and values: pad the heads."
        )
    found = find_layers(shape, lambda layer: not divides(layer, devices))
    if found:
        layer, which = found
        yield (
            f"The {layer.query_heads} query and {layer.kv_heads} KV heads {which} do not divide among {devices} "
            "devices: keep a multiple of the devices, or use fewer."
        )


def divides(layer: LayerShape, devices: int) -> bool:
    """Whether each device gets as many query heads, and whole KV heads or copies of one."""
    kv = layer.kv_heads
    return not layer.query_heads or (layer.query_heads % devices == 0 and (kv % devices == 0 or devices % kv == 0))


def check_ends(shape: ModelShape, profile: Profile, workload: Workload) -> Iterator[str]:
    """Yield a sentence where the vocabulary, split over the devices, does not fill whole tiles."""
    step = profile.rules.vocab_multiple * workload.devices
    if shape.vocab % step:
        split = f" on {workload.devices} devices" if workload.devices > 1 else ""
        yield (
            f"The vocabulary of {shape.vocab} is not a multiple of the {step} that {profile.name} wants{split}: pad it "
            f"to {math.ceil(shape.vocab / step) * step}."
        )


def check_evenness(shape: ModelShape, profile: Profile, workload: Workload) -> Iterator[str]:
    """Yield a sentence where layers differ and the runtime opens none that do."""
    if not shape.uniform and not profile.rules.uneven_layers:
        yield (
            f"Layers differ in size or norms, and {profile.runtime.name}, the runtime of {profile.name}, opens only "
            "models whose layers are all alike: plan with --shapes uniform."
        )


def check_memory(shape: ModelShape, profile: Profile, workload: Workload) -> Iterator[str]:
    """Yield a sentence where weights with keys and values are more than the device holds."""
    if not {workload.weights, workload.activations, workload.kv, workload.head or "fp16"} <= TYPE_BYTES.keys():
        return  # said by check_types
    weights, state = weight_bytes(shape, workload, profile) / GIB, kv_bytes(shape, workload) / GIB
    if weights + state > profile.memory.capacity_gib:
        yield (
            f"Weights of {weights:.1f} GiB with keys and values of {state:.1f} GiB are more than the "
            f"{profile.memory.capacity_gib:g} GiB of {profile.name}: use a smaller model, batch, context or type, or "
            "more devices."
        )
