"""A W8A8 folder as a server reads it, from its files alone: nothing here comes from the code that writes them.

Integers are multiplied as int64 by numpy. What is shared with Lightpress is the float forward of a family
(compress.decoder), into which the projections are put; the tests also run them inside of transformers' classes.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open

from compress.decoder import compute_logits, make_frame, run_layer
from compress.spec import resolve_model, role_shape

META = {"version", "model_quant_type", "metadata", "group_size", "optional"}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def load_tensors(folder):
    """Every tensor of every safetensors file, placed by the index where there is one."""
    indexes = list(folder.glob("*.safetensors.index.json"))
    tensors, places = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), "pt") as stream:
            for name in stream.keys():
                assert name not in tensors, f"{name} is stored twice"
                tensors[name], places[name] = stream.get_tensor(name), path.name
    if indexes:
        assert len(indexes) == 1
        index = json.loads(indexes[0].read_text())
        assert index["weight_map"] == places
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return tensors


class IntLinear:
    """One projection as the files describe it; `rows` cuts a part out of a fused one."""

    def __init__(self, kind, tensors, prefix, dtype, compressed=False):
        self.kind, self.dtype, self.compressed = kind, dtype, compressed
        part = {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
        self.codes = part["weight"].numpy().astype(np.int64)
        assert part["weight"].dtype == torch.int8
        self.bias = part["bias"].float().numpy() if "bias" in part else None
        self.scale = part["weight_scale"].to(dtype).float().numpy()[:, 0]
        self.input_scale = part.get("input_scale")
        self.offset = int(part["input_offset"].float()) if "input_offset" in part else 0
        self.quant_bias = part["quant_bias"].numpy().astype(np.int64) if "quant_bias" in part else None
        self.factor = self.read_factor(part)

    def read_factor(self, part):
        if self.kind == "W8A8_DYNAMIC":
            return None
        if self.compressed:  # the server multiplies both scales in the model's type
            return (part["input_scale"] * part["weight_scale"][:, 0]).float().numpy()
        if part["deq_scale"].dtype == torch.int64:
            bits = part["deq_scale"].numpy()
            assert ((bits >= 0) & (bits < 2**31)).all()
            return bits.astype(np.uint32).view(np.float32)
        return part["deq_scale"].numpy()

    def cut(self, rows):
        """A copy with some of the rows."""
        own = object.__new__(IntLinear)
        own.__dict__ = dict(self.__dict__)
        for name in ("codes", "bias", "scale", "quant_bias", "factor"):
            value = getattr(self, name)
            setattr(own, name, None if value is None else value[rows])
        return own

    def encode(self, x):
        """Codes int64 of float32 inputs, and their scale per token for dynamic ones."""
        if self.kind == "W8A8_DYNAMIC":
            scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
            return np.clip(np.rint(x / np.where(scale > 0, scale, np.float32(1))), -128, 127).astype(np.int64), scale
        inverse = np.float32((1 / self.input_scale.to(self.dtype)).float().item())  # rounded to the model's type
        return np.clip(np.rint(x * inverse + np.float32(self.offset)), -128, 127).astype(np.int64), None

    def integers(self, x):
        """What the integer product gives, quant_bias included."""
        codes, scale = self.encode(x)
        sums = codes @ self.codes.T
        return (sums if self.quant_bias is None else sums + self.quant_bias), scale

    def __call__(self, x):
        sums, scale = self.integers(x.numpy())
        assert np.abs(sums).max() < 2**31
        y = sums.astype(np.float32) * (scale * 1 if scale is not None else self.factor)
        if scale is not None:
            y = y * self.scale
        if self.bias is not None and self.quant_bias is None:
            y = y + self.bias
        return torch.from_numpy(y.astype(np.float32))

    def dequantise(self):
        """The weight's float values."""
        step = self.scale if self.factor is None else self.factor / float(self.input_scale.float())
        return torch.from_numpy((self.codes * step[:, None]).astype(np.float32))

    @property
    def shape(self):
        return torch.Size(self.codes.shape)

    @classmethod
    def __torch_function__(cls, function, types, args=(), keywords=None):
        assert function is F.linear
        return args[1](args[0])


class Folder:
    """A folder read from its files."""

    def __init__(self, path: Path):
        self.config = json.loads((path / "config.json").read_text())
        self.tensors = load_tensors(path)
        self.dtype = DTYPES[self.config["torch_dtype"]]
        description = path / "quant_model_description.json"
        scheme = self.config.get("quantization_config")
        self.description = json.loads(description.read_text()) if description.exists() else None
        assert not (self.description and scheme)
        if self.description is not None:
            self.kinds = {n: k for n, k in self.description.items() if n not in META}
        else:
            self.kinds = read_scheme(scheme, self.tensors)
        self.spec = resolve_model(strip(self.config), None)

    def linear(self, name):
        """The projection whose weight is `name`, or its float weight."""
        kind = self.kinds.get(name, "FLOAT")
        if kind == "FLOAT":
            return self.tensors[name].float()
        prefix = name.removesuffix(".weight")
        return IntLinear(kind, self.tensors, prefix, self.dtype, compressed=self.description is None)

    def layer(self, index):
        """Tensors by role, fused ones cut into their parts."""
        layer, weights = self.spec.layers[index], {}
        for role, name in layer.names.items():
            whole, start = self.linear(name), 0
            parts = layer.parts.get(role)
            if parts is None:
                weights[role] = whole
                continue
            for part in parts:
                stop = start + role_shape(self.spec.shape, layer.shape, part)[0]
                weights[part] = whole.cut(slice(start, stop)) if isinstance(whole, IntLinear) else whole[start:stop]
                start = stop
        return weights

    def logits(self, ids):
        """Logits of token ids `[batch, length]`."""
        spec, embed = self.spec, self.tensors[self.spec.names["embed"]].float()
        x, frame = embed[ids] * spec.embedding_multiplier, make_frame(spec, *ids.shape)
        for index, layer in enumerate(spec.layers):
            x, _ = run_layer(spec, layer, self.layer(index), x, frame)
        head = embed if spec.shape.tied else self.linear(spec.names["head"])
        return compute_logits(spec, {"final_norm": self.tensors[spec.names["final_norm"]].float(), "head": head}, x)


def strip(config):
    """config.json without what a quantised format added."""
    return {key: value for key, value in config.items() if key not in ("quantization_config", "quantize")}


def read_scheme(scheme, tensors):
    """Kinds by weight name from compressed-tensors' scheme: its one group is for all linears but those ignored."""
    if scheme is None:
        return {}
    (group,) = scheme["config_groups"].values()
    assert group["targets"] == ["Linear"] and scheme["format"] == "int-quantized"
    kind = "W8A8_DYNAMIC" if group["input_activations"]["dynamic"] else "W8A8"
    plain = {f"{name}.weight" for name in scheme["ignore"]}
    return {name: kind for name, t in tensors.items() if name not in plain and t.dtype == torch.int8}
