"""Every node of a graph against the operator table: domain, opset, type, attributes, element types, and the chip.

ATC looks each node up as domain :: opset of that domain :: type, and takes only an exact match (ascend.md 2.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from onnx import NodeProto, helper

from backends.ascend_graph import OpenGraph, name_element, name_node, walk_graphs
from backends.ascend_rules import (
    ASCEND,
    ERROR,
    STANDARD,
    WARNING,
    Chip,
    Finding,
    holds_opset,
    list_operators,
    load_rules,
    show_names,
    show_opsets,
)

FLOAT_BYTES: Mapping[str, int] = {"FLOAT": 4, "FLOAT16": 2, "BFLOAT16": 2}


def check_nodes(graph: OpenGraph, chip: Chip | None, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what is wrong with a graph's opsets and nodes; `config` is the model's config.json, or empty."""
    yield from check_stamp(graph)
    yield from check_domains(graph)
    yield from check_wiring(graph)
    for node in graph.nodes:
        problem = explain_operator(graph, node)
        if problem:
            yield find("operator", ERROR, graph, node, problem)
            continue
        yield from check_limits(graph, node)
        yield from check_types(graph, node)
        if chip is not None:
            yield from check_kernel(graph, node, chip)
    yield from check_epsilon(graph, config)
    yield from check_elements(graph, chip)


def find(rule: str, severity: str, graph: OpenGraph, node: NodeProto | str, sentence: str) -> Finding:
    """Return a finding about a node of a graph, or about a value."""
    return Finding(rule, severity, graph.name, node if isinstance(node, str) else name_node(node), sentence)


def check_stamp(graph: OpenGraph) -> Iterator[Finding]:
    """Yield a finding when the opset of ai.onnx is not one that ATC reads (ascend.md 2.1)."""
    stamp, limits = graph.opsets.get(STANDARD), load_rules()["stamp"]
    if stamp is not None and not limits["low"] <= stamp <= limits["high"]:
        yield find(
            "opset",
            ERROR,
            graph,
            "",
            f"The graph is stamped opset {stamp}, and ATC reads {limits['low']} to {limits['high']}: not one node "
            f"would convert; export it again at opset {limits['high']}.",
        )


def check_domains(graph: OpenGraph) -> Iterator[Finding]:
    """Yield a finding for each domain that nodes use and opset_import lacks (E19999 in onnx_parser.cc)."""
    used: dict[str, list[NodeProto]] = {}
    for node in graph.nodes:
        used.setdefault(node.domain or STANDARD, []).append(node)
    for domain, nodes in used.items():
        if domain not in graph.opsets:
            yield find(
                "domain",
                ERROR,
                graph,
                nodes[0],
                f"{len(nodes)} node(s) use the domain {domain}, which opset_import does not name: ATC stops "
                "with E19999; add it to opset_import.",
            )


def check_wiring(graph: OpenGraph) -> Iterator[Finding]:
    """Yield nodes that read a value which nothing makes, and graph outputs that nothing makes."""
    made = {*graph.makers, *graph.constants}
    made |= {entry.name for part in walk_graphs(graph.model.graph) for entry in part.input}
    for node in graph.nodes:
        missing = [name for name in node.input if name and name not in made]
        if missing:
            text = f"{node.op_type} reads {show_names(missing)}, which nothing makes; export the graph again."
            yield find("wiring", ERROR, graph, node, text)
    unmade = [entry.name for entry in graph.model.graph.output if entry.name not in made]
    if unmade:
        yield find("wiring", ERROR, graph, unmade[0], f"Nothing makes the output {unmade[0]}; export the graph again.")


def explain_operator(graph: OpenGraph, node: NodeProto) -> str:
    """Return why a node's type does not convert and what to write instead; empty when it is registered."""
    rules, kind = load_rules(), node.op_type
    operator = list_operators().get(kind)
    domain = node.domain or STANDARD
    if kind in rules["banned"] and operator is None:
        return f"{kind} is not registered with ATC; {rules['banned'][kind]}."
    if kind in rules["unverified"]["names"]:
        return f"The opsets of {kind} are not verified, so it may not convert; write it with standard operators."
    if domain not in (STANDARD, ASCEND):
        return f"ATC registers nothing in the domain {domain}: {kind} does not convert; export with standard operators."
    if operator is None:
        return f"{kind} is not in the table of operators that convert; write it with standard operators of the table."
    return explain_opset(graph, domain, kind)


def explain_opset(graph: OpenGraph, domain: str, kind: str) -> str:
    """Return why a listed operator is not registered for the graph's opset; empty when it is."""
    operator, limits = list_operators()[kind], load_rules()["stamp"]
    opset = graph.opsets.get(domain)
    if domain == ASCEND:
        if not operator.npu:
            return f"{kind} is not registered in the domain {ASCEND}; put it into ai.onnx."
        wrong = opset not in (None, 1)
        return f"{kind} is registered for {ASCEND} at opset 1, and opset_import says {opset}; write 1." if wrong else ""
    if not operator.opsets:
        return f"{kind} is registered in the domain {ASCEND} only; give the node that domain at opset 1."
    # An opset outside the documented range is one finding for the graph, not one for each node.
    if opset is None or not limits["low"] <= opset <= limits["high"] or holds_opset(operator, opset):
        return ""
    other = f", or give the node the domain {ASCEND} at opset 1" if operator.npu else ""
    return (
        f"{kind} is registered for the opsets {show_opsets(operator)} of ai.onnx, and the graph is stamped {opset}; "
        f"export at another opset{other}."
    )


# Attributes


def check_limits(graph: OpenGraph, node: NodeProto) -> Iterator[Finding]:
    """Yield findings for what the table says of one operator's inputs and attributes."""
    limits = load_rules()["limits"].get(node.op_type, {})
    given = read_attributes(node)
    for problem in explain_attributes(node.op_type, given, limits):
        yield find("attribute", ERROR, graph, node, problem)
    if "inputs" in limits:
        inputs = sum(bool(name) for name in node.input)
        if inputs > limits["inputs"]:
            text = f"{node.op_type} with {inputs} inputs failed on CANN 8.0; {limits['avoid']}."
            yield find("attribute", ERROR, graph, node, text)
        elif "avoid" in limits:
            text = f"{node.op_type} is fragile in ATC; {limits['avoid']}."
            yield find("attribute", WARNING, graph, node, text)
    if "target" in limits:
        yield from check_target(graph, node, given.get(limits["target"]))


def read_attributes(node: NodeProto) -> dict[str, Any]:
    """Return a node's attributes as Python values, texts decoded; graphs and tensors are left out."""
    plain = (entry for entry in node.attribute if not (entry.HasField("g") or entry.HasField("t") or entry.graphs))
    values = {entry.name: helper.get_attribute_value(entry) for entry in plain}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def explain_attributes(kind: str, given: Mapping[str, Any], limits: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each attribute that is missing, fixed to another value, or not allowed."""
    for name in limits.get("required", ()):
        if name not in given:
            yield f"{kind} needs the attribute {name}, which is missing; give it."
    for name, value in limits.get("fixed", {}).items():
        if name in given and not is_close(given[name], value):
            yield (
                f"{kind} always computes with {name} {value:g}, whatever the attribute says, and it says "
                f"{given[name]:g}; write the norm with standard operators."
            )
    for name, values in limits.get("allowed", {}).items():
        if name in given and given[name] not in values:
            names = ", ".join(value for value in values if isinstance(value, str))
            yield f"{name} of {kind} is {given[name]}, and only {names} convert; choose one of them."


def is_close(value: float, wanted: float) -> bool:
    """Return whether a float32 attribute is a number."""
    return abs(value - wanted) <= 1e-5 * abs(wanted)


def check_target(graph: OpenGraph, node: NodeProto, code: Any) -> Iterator[Finding]:
    """Yield a finding when a Cast goes to an element type that the parser does not map."""
    name = name_element(code or 0)
    if name not in load_rules()["elements"]["types"]:
        text = f"{node.op_type} goes to {name}, which ATC's parser does not map; cast to another type."
        yield find("dtype", ERROR, graph, node, text)


def check_epsilon(graph: OpenGraph, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield a finding when fused norms stand in a graph whose model has another epsilon than theirs (ascend.md 2.4)."""
    fused = [node for node in graph.nodes if node.op_type in load_rules()["rms_norms"]["names"]]
    epsilon = config.get("rms_norm_eps")
    fixed = load_rules()["limits"]["NPURmsNorm"]["fixed"]["epsilon"]
    if fused and isinstance(epsilon, int | float) and not is_close(epsilon, fixed):
        text = (
            f"{len(fused)} fused norm(s) compute with epsilon {fixed:g}, and config.json says rms_norm_eps {epsilon:g}"
            "; write the norms with standard operators."
        )
        yield find("epsilon", ERROR, graph, fused[0], text)


# Element types


def check_types(graph: OpenGraph, node: NodeProto) -> Iterator[Finding]:
    """Yield a finding for an input of a float operator that has another element type."""
    floats = load_rules()["float_operators"]
    if node.op_type not in floats["names"]:
        return
    # Axes, and the indices, scales and masks of Ascend's own operators, have types of their own.
    judged = node.input if node.op_type in floats["all_inputs"] else node.input[:1]
    wrong = {name: name_element(code) for name in judged if (code := graph.element(name))}
    wrong = {name: element for name, element in wrong.items() if element not in floats["types"]}
    for name, element in wrong.items():
        text = f"{node.op_type} reads {name} as {element}; the chip computes it in float16 or float32: cast it before."
        yield find("dtype", ERROR, graph, node, text)


def check_elements(graph: OpenGraph, chip: Chip | None) -> Iterator[Finding]:
    """Yield findings for element types that the parser does not map, and bfloat16 where the chip has none."""
    mapped = load_rules()["elements"]["types"]
    found: dict[str, list[str]] = {}
    for name, value in graph.values.items():
        if value.element:
            found.setdefault(name_element(value.element), []).append(name)
    for element, names in found.items():
        if element not in mapped:
            text = f"{show_names(names)} have the type {element}, which ATC's parser does not map; store another type."
            yield find("dtype", ERROR, graph, names[0], text)
        if element == "BFLOAT16" and chip is not None and not chip.bf16:
            text = f"{show_names(names)} are bfloat16, which {chip.soc} does not have; export float16."
            yield find("bf16", ERROR, graph, names[0], text)


# The chip


def check_kernel(graph: OpenGraph, node: NodeProto, chip: Chip) -> Iterator[Finding]:
    """Yield findings for an operator that has no kernel on the chip, or whose kernel has limits there (2.5, 4.5)."""
    operator = list_operators()[node.op_type]
    if node.op_type in chip.lacks:
        text = f"{chip.soc} has no kernel for {node.op_type}; write it with standard operators."
        yield find("kernel", ERROR, graph, node, text)
    elif operator.own and chip.primitive:
        text = f"{chip.soc} is known to take standard operators only; {node.op_type} may not convert: replace it."
        yield find("kernel", WARNING, graph, node, text)
    if chip.family == "310P":
        yield from check_small_norm(graph, node)
    if node.op_type == "NPUPromptFlashAttention":
        yield from check_prompt_attention(graph, node, chip)


def check_small_norm(graph: OpenGraph, node: NodeProto) -> Iterator[Finding]:
    """Yield a finding for a fused norm whose last axis is too short on 310P (ascend.md 2.5)."""
    rule = load_rules()["rms_norms"]
    value = graph.values.get(first_input(node)) if node.op_type in rule["names"] else None
    if value is None or not value.dims or not isinstance(value.dims[-1], int):
        return
    size = value.dims[-1] * FLOAT_BYTES.get(name_element(value.element), 2)
    if size < rule["least_bytes"]:
        least = rule["least_bytes"]
        text = f"The last axis of {node.op_type} has {size} bytes, and needs {least}; use standard operators."
        yield find("kernel", ERROR, graph, node, text)


def first_input(node: NodeProto) -> str:
    """Return the name of a node's first input, empty where there is none."""
    return str(node.input[0]) if node.input else ""


def check_prompt_attention(graph: OpenGraph, node: NodeProto, chip: Chip) -> Iterator[Finding]:
    """Yield findings for fused attention over the limits of its kernel (ascend.md 4.5)."""
    limits, heads = load_rules()["prompt_attention"], read_attributes(node).get("num_heads")
    value = graph.values.get(first_input(node))
    sizes = explain_attention_sizes(value.dims if value else None, read_attributes(node), limits)
    if chip.family == "310P":
        if isinstance(heads, int) and heads > limits["heads"]:
            sizes.append(f"has {heads} heads, more than {limits['heads']}")
        if value and name_element(value.element) not in ("FLOAT16", "UNDEFINED"):
            sizes.append("is not float16")
    for problem in sizes:
        text = f"The query of {node.op_type} {problem}; write attention with standard operators."
        yield find("kernel", ERROR, graph, node, text)


def explain_attention_sizes(dims: Any, given: Mapping[str, Any], limits: Mapping[str, int]) -> list[str]:
    """Return what is too large in a query of layout BSH, BNSD or BSND."""
    layout, heads = given.get("input_layout", ""), given.get("num_heads")
    if dims is None or len(dims) != len(layout):
        return []
    sizes = {axis: size for axis, size in zip(layout, dims, strict=True) if isinstance(size, int)}
    if "H" in sizes and isinstance(heads, int) and heads > 0:
        sizes["D"] = sizes["H"] // heads
    named = {"B": "batch", "S": "sequence", "D": "head_dim"}
    problems = [
        f"has {name} {sizes[axis]}, more than {limits[name]}"
        for axis, name in named.items()
        if sizes.get(axis, 0) > limits[name]
    ]
    if sizes.get("D", 0) % load_rules()["fused_attention"]["head_multiple"]:
        problems.append(f"has head_dim {sizes['D']}, no multiple of 16")
    return problems
