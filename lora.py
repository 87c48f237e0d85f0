"""LoRA by hand: low-rank adapters on the linear layers of a frozen model.  [torch; knows no game]

    y = W x + (alpha / rank) B A x          Hu et al. (2021), section 4.1;  A: [rank, in] random, B: [out, rank] zero

At the start B A = 0, so the adapted model *is* the base model, and switching the adapters off gives the base model back at any
time: that is the reference policy of the KL penalty, without a second copy of the weights. Several named adapters can share
one base; one or none of them is active at a time.

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
    """A frozen linear layer [in -> out] with named low-rank corrections, of which at most one (`active`) is added."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        # GPT-2's Conv1D keeps its weight as [in, out], nn.Linear as [out, in].
        self.transposed = isinstance(base, Conv1D)
        self.n_out, self.n_in = base.weight.shape[::-1] if self.transposed else base.weight.shape
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()  # name -> float32 [rank, in], [out, rank]
        self.scale = {}                                          # name -> alpha / rank
        self.active = None

    def add(self, name, rank, alpha):
        device = self.base.weight.device
        self.A[name] = nn.Parameter(torch.empty(rank, self.n_in, device=device))
        self.B[name] = nn.Parameter(torch.zeros(self.n_out, rank, device=device))
        self.scale[name] = alpha / rank
        nn.init.kaiming_uniform_(self.A[name], a=math.sqrt(5))  # as in loralib and PEFT: uniform within 1 / sqrt(in)

    def forward(self, x):
        y = self.base(x)
        if self.active is None:
            return y
        a, b = self.A[self.active], self.B[self.active]
        # The base may be bfloat16: the adapter is kept and computed in float32, so that small optimizer steps are not rounded away.
        return y + (nn.functional.linear(nn.functional.linear(x.to(a.dtype), a), b) * self.scale[self.active]).to(y.dtype)

    def merge(self, name):
        """Add the adapter into the base weight, in place."""
        delta = self.scale[name] * self.B[name] @ self.A[name]
        self.base.weight.data += (delta.T if self.transposed else delta).to(self.base.weight.dtype)


def lora_layers(model):
    """The wrapped layers by their names in the base model: dict name -> LoRALinear."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_adapter(model, name, rank, alpha, targets=None):
    """Freeze the model and put a new adapter `name` on its linear layers: all but the output head, or only the module names in `targets`.

    An adapter of that name is replaced.

    Raises ValueError where a target is no linear layer of the model, or there is nothing to adapt.
    """
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)
              or (isinstance(m, (nn.Linear, Conv1D)) and m is not head and not n.endswith(".base"))}
    if targets is not None:
        missing = sorted(set(targets) - set(layers))
        if missing:
            raise ValueError(f"the adapter is for another model: this one has no linear layer {missing[0]}")
        layers = {n: layers[n] for n in targets}
    if not layers:
        raise ValueError("the model has no linear layers to adapt")
    for layer in lora_layers(model).values():
        if name in layer.A:
            del layer.A[name], layer.B[name]
    for path, layer in layers.items():
        if not isinstance(layer, LoRALinear):
            parent, _, child = path.rpartition(".")
            layer = LoRALinear(layer)
            setattr(model.get_submodule(parent), child, layer)
        layer.add(name, rank, alpha)
    for layer in lora_layers(model).values():  # all adapters train; the base does not
        layer.A.requires_grad_(True)
        layer.B.requires_grad_(True)


def adapter_parameters(model, name):
    """The trainable tensors of one adapter, in a fixed order: list of float32 [rank, in] and [out, rank]."""
    return [p for layer in lora_layers(model).values() if name in layer.A for p in (layer.A[name], layer.B[name])]


@contextmanager
def adapter(model, name):
    """Run the model with adapter `name` in this block, or with none of them (`None`: the base model)."""
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
    first = next(iter(layers.values()))
    rank = first.A[name].shape[0]
    tensors = {f"{PREFIX}{path}.lora_{which}.weight": getattr(layer, which)[name].detach().cpu().contiguous()
               for path, layer in layers.items() for which in "AB"}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model.config.name_or_path,
        "r": rank, "lora_alpha": first.scale[name] * rank, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        "target_modules": sorted({path.rpartition(".")[2] for path in layers}), "fan_in_fan_out": first.transposed,
    }
    save_file(tensors, Path(folder) / "adapter_model.safetensors")
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model, name, folder):
    """Add the adapter of a folder (written here or by PEFT) to the model under `name`.

    Raises OSError where a file is missing, ValueError where it is damaged, for another model, or of a kind not read here
    (only plain LoRA is: no DoRA, no rank-stabilised scaling, no per-layer ranks, no biases or further trained modules).
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        rank, alpha = config["r"], config["lora_alpha"]
    except OSError:
        raise
    except Exception as error:  # safetensors raises its own kind, JSON another, a foreign file KeyError or TypeError
        raise ValueError(f"cannot read the adapter in {folder}: {error}") from None
    unread = [key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save") if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unread:
        raise ValueError(f"the adapter in {folder} is not plain LoRA ({', '.join(unread) or config.get('peft_type')})")
    suffixes = (".lora_A.weight", ".lora_B.weight")
    odd = [key for key in tensors if not (key.startswith(PREFIX) and key.endswith(suffixes))]
    if odd or not tensors:
        raise ValueError(f"the adapter in {folder} is not plain LoRA (tensor {odd[0] if odd else 'missing'})")
    paths = sorted({key[len(PREFIX):-len(suffixes[0])] for key in tensors})
    add_adapter(model, name, rank, alpha, paths)
    for path in paths:
        layer = model.get_submodule(path)
        for which, parameter in (("A", layer.A[name]), ("B", layer.B[name])):
            tensor = tensors.get(f"{PREFIX}{path}.lora_{which}.weight")
            if tensor is None or tensor.shape != parameter.shape:
                raise ValueError(f"the adapter in {folder} is for another model: {path} wants lora_{which} {list(parameter.shape)}, "
                                 f"the file has {None if tensor is None else list(tensor.shape)}")
            parameter.data.copy_(tensor)


def merge_adapter(model, name):
    """Add adapter `name` into the base weights and unwrap every layer: afterwards the model is a plain one, ready to save."""
    for path, layer in lora_layers(model).items():
        if name in layer.A:
            layer.merge(name)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)
