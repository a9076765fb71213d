"""The planner's 32B-class shape from Qwen3-32B's for a speed-up of 1.16, Pangu Light's (`simulator.py pangu`).

No weights of that size are at hand: the damage curves are made up (tests/made_findings.py), so the shape shows what
budget and rules do, not which shape loses least. The report does not say what was run: several workloads are shown.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cli.budget import make_goal
from compress.choose import Prices, choose_plan
from compress.plan import plan_shape
from compress.recipe import Recipe
from compress.spec import resolve_model
from profiles.rules import check_shape, padding_loss

CONFIG = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 5120,
    "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
    "head_dim": 128, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "attention_bias": False,
    "tie_word_embeddings": False, "max_position_embeddings": 40960,
}  # fmt: skip
WORKLOADS = ("decode:2048+256@1", "decode:2048+256@64", "decode:2048+256@336", "prefill:2048+1@2")


def show_pangu() -> None:
    """Print one row per workload: the shape, the predicted ratio, the rules broken."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from made_findings import make_findings

    spec = resolve_model(CONFIG, None)
    findings = make_findings(spec)
    print("| workload | layers | hidden | KV | FFN | parameters | predicted ratio | padding | rules broken |")
    print("|---|---|---|---|---|---|---|---|---|")
    for workload in WORKLOADS:
        recipe = Recipe(speedup="1.16", profile="ascend-910b4-1", devices=4, format="w8a8", workload=workload)
        goal, device = make_goal(recipe, spec, 2)
        assert device is not None
        plan = choose_plan(spec, findings, recipe, Prices({}), goal=goal).plan
        shape = plan_shape(plan, spec.shape)
        ratio = device.estimate(spec.shape).total / device.estimate(shape).total
        broken = check_shape(shape, device.profile, device.workload)
        layer = shape.layers[0]
        print(
            f"| {workload} | {len(shape.layers)} | {shape.hidden} | {layer.kv_heads} | {layer.ffn} | "
            f"{shape.parameters / 1e9:.1f} B | {ratio:.3f} | "
            f"{padding_loss(shape, device.profile, device.workload):.1%} | "
            f"{'; '.join(broken) or 'none'} |"
        )
