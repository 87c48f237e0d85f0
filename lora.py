"""LoRA by hand: low-rank adapters on the linear layers of a frozen model.  [torch; knows no game]

    y = W x + (alpha / rank) B A x      Hu et al. (2021), section 4.1
                                        A: [rank, in] random, B: [out, rank] zero

At the start B A = 0, so the adapted model *is* the base model, and switching the adapters off gives
the base model back at any time: that is the reference of the KL penalty, without a second
copy of the weights. Several named adapters can share one base; at most one of them is active.

    >>> add_adapter(model, "player", rank=8, alpha=16)
    >>> with adapter(model, "player"): logits = model(ids).logits
    >>> with adapter(model, None): reference_logits = model(ids).logits
    >>> save_adapter(model, "player", "runs/x")    # loads in PEFT and vLLM
"""

import json
import math
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

PREFIX = "base_model.model."  # how PEFT names the wrapped model inside an adapter file


class LoRALinear(nn.Module):
    """A frozen linear layer [in -> out] with named adapters, of which at most one is active."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        # GPT-2's Conv1D keeps its weight as [in, out], nn.Linear as [out, in].
        self.transposed = isinstance(base, Conv1D)
        shape = base.weight.shape
        self.n_out, self.n_in = shape[::-1] if self.transposed else shape
        self.A = nn.ParameterDict()  # name -> float32 [rank, in]
        self.B = nn.ParameterDict()  # name -> float32 [out, rank]
        self.scale = {}  # name -> alpha / rank
        self.active = None

    def add(self, name, rank, alpha):
        device = self.base.weight.device
        self.A[name] = nn.Parameter(torch.empty(rank, self.n_in, device=device))
        self.B[name] = nn.Parameter(torch.zeros(self.n_out, rank, device=device))
        self.scale[name] = alpha / rank
        # As in loralib and PEFT: uniform within 1 / sqrt(in).
        nn.init.kaiming_uniform_(self.A[name], a=math.sqrt(5))

    def forward(self, x):
        y = self.base(x)
        if self.active is None:
            return y
        a, b = self.A[self.active], self.B[self.active]
        # The base may be bfloat16. The adapter is kept, computed and added in float32: what a small
        # optimizer step changes is rounded once, with the sum. One fused product and sum, and the
        # scale on the narrow side, make no further tensors of the layer's width.
        low_rank = nn.functional.linear(x.flatten(0, -2).to(a.dtype), a) * self.scale[self.active]
        total = torch.addmm(y.flatten(0, -2).to(a.dtype), low_rank, b.T)
        return total.to(y.dtype).view_as(y)

    def merge(self, name):
        """Add the adapter into the base weight, in place."""
        delta = self.scale[name] * self.B[name] @ self.A[name]
        if self.transposed:
            delta = delta.T
        self.base.weight.data += delta.to(self.base.weight.dtype)


def lora_layers(model):
    """The wrapped layers by their names in the base model: dict name -> LoRALinear."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, LoRALinear)}


def linear_layers(model):
    """What can be adapted: all linear layers but the output head, wrapped ones included."""
    head = model.get_output_embeddings()
    layers = {}
    for path, module in model.named_modules():
        linear = isinstance(module, nn.Linear | Conv1D | LoRALinear)
        if linear and module is not head and not path.endswith(".base"):
            layers[path] = module
    return layers


def add_adapter(model, name, rank, alpha, targets=None):
    """Freeze the model and put a new adapter `name` on its linear layers.

    targets: the layers to adapt, by their full names or the last part of these (q_proj); by default
             all but the output head
    An adapter of that name is replaced. All adapters take gradients; the base does not.

    Raises ValueError where a target is no linear layer of the model, or there is nothing to adapt.
    """
    layers = linear_layers(model)
    if targets is not None:
        named = {path: {path, path.rpartition(".")[2]} & set(targets) for path in layers}
        missing = sorted(set(targets).difference(*named.values()))
        if missing:
            raise ValueError(
                f"the adapter is for another model: this one has no linear layer {missing[0]}"
            )
        layers = {path: layers[path] for path, names in named.items() if names}
    if not layers:
        raise ValueError("the model has no linear layers to adapt")
    for layer in lora_layers(model).values():
        if name in layer.A:
            del layer.A[name], layer.B[name]
    model.requires_grad_(False)
    for path, layer in layers.items():
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear(layer)
            model.set_submodule(path, layer)
        layer.add(name, rank, alpha)
    for layer in lora_layers(model).values():
        layer.A.requires_grad_(True)
        layer.B.requires_grad_(True)


def adapter_parameters(model, name):
    """The trainable tensors of one adapter, in a fixed order: A [rank, in], B [out, rank], ..."""
    parameters = []
    for layer in lora_layers(model).values():
        if name in layer.A:
            parameters += [layer.A[name], layer.B[name]]
    return parameters


@contextmanager
def adapter(model, name):
    """Run the model with adapter `name` in this block, or with none of them (None: the base)."""
    layers = list(lora_layers(model).values())
    before = [layer.active for layer in layers]
    for layer in layers:
        layer.active = name if name in layer.A else None
    try:
        yield
    finally:
        for layer, active in zip(layers, before):
            layer.active = active


def save_adapter(model, name, folder):
    """Write one adapter in PEFT's layout: adapter_model.safetensors and adapter_config.json."""
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.A}
    tensors = {}
    for path, layer in layers.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.A[name].detach().cpu().contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = layer.B[name].detach().cpu().contiguous()
    first = next(iter(layers.values()))
    rank = len(first.A[name])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.config.name_or_path,
        "r": rank,
        "lora_alpha": first.scale[name] * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({path.rpartition(".")[2] for path in layers}),
        "fan_in_fan_out": first.transposed,
    }
    save_file(tensors, Path(folder) / "adapter_model.safetensors")
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_adapter(folder):
    """(config, tensors) of an adapter folder. Errors as in `load_adapter`."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        config["r"], config["lora_alpha"]  # a KeyError where they are missing
    except OSError:
        raise
    except Exception as error:  # safetensors raises its own kind, a foreign file KeyError ...
        raise ValueError(f"cannot read the adapter in {folder}: {error}") from None
    other_kinds = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
    used = [key for key in other_kinds if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or used:
        reason = ", ".join(used) or config.get("peft_type")
        raise ValueError(f"the adapter in {folder} is not plain LoRA ({reason})")
    return config, tensors


def load_adapter(model, name, folder):
    """Add the adapter of a folder (written here or by PEFT) to the model under `name`.

    Raises OSError where a file is missing; ValueError where it is damaged, for another model, or no
    plain LoRA: DoRA, rank-stabilised scaling, per-layer ranks, biases and further trained modules
    are not read here.
    """
    folder = Path(folder)
    config, tensors = read_adapter(folder)
    suffixes = (".lora_A.weight", ".lora_B.weight")
    foreign = [k for k in tensors if not (k.startswith(PREFIX) and k.endswith(suffixes))]
    if foreign or not tensors:
        reason = f"tensor {foreign[0]}" if foreign else "no tensors"
        raise ValueError(f"the adapter in {folder} is not plain LoRA ({reason})")
    paths = sorted({key[len(PREFIX) : -len(suffixes[0])] for key in tensors})
    add_adapter(model, name, config["r"], config["lora_alpha"], paths)
    for path in paths:
        layer = model.get_submodule(path)
        for which, parameter in (("A", layer.A[name]), ("B", layer.B[name])):
            tensor = tensors.get(f"{PREFIX}{path}.lora_{which}.weight")
            shape = None if tensor is None else list(tensor.shape)
            if shape != list(parameter.shape):
                raise ValueError(
                    f"the adapter in {folder} is for another model: {path} wants lora_{which} "
                    f"{list(parameter.shape)}, the file has {shape}"
                )
            parameter.data.copy_(tensor)


def merge_adapter(model, name):
    """Add adapter `name` into the base weights and unwrap every layer: a plain model is left."""
    for path, layer in lora_layers(model).items():
        if name in layer.A:
            layer.merge(name)
        model.set_submodule(path, layer.base)
