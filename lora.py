"""LoRA by hand: low-rank adapters on the linear layers of a frozen model.  [torch; knows no game]

    y = W x + (alpha / rank) B A x      Hu et al. (2021), section 4.1
                                        A: [rank, in] random, B: [out, rank] zero

At the start B A = 0, so the adapted model *is* the base model, and switching the adapters off gives
the base model back at any time: that is the reference of the KL penalty, without a second
copy of the weights. Several named adapters can share one base; at most one of them is active.

    >>> add_adapter(model, "player", rank=8, alpha=16)
    >>> with active_adapter(model, "player"): logits = model(ids).logits
    >>> with active_adapter(model, None): reference_logits = model(ids).logits
    >>> save_adapter(model, "player", "runs/x")    # PEFT and vLLM can read it
"""

import json
import math
import re
import zlib
from collections import Counter
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn
from transformers.pytorch_utils import Conv1D

from errors import InputError
from nf4 import NF4Linear, is_linear


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
        self.train(base.training)

    @property
    def weight(self):
        """That of the frozen layer, for models that look at its shape or type."""
        return self.base.weight

    def add(self, name, rank, alpha):
        device = next(chain(self.base.parameters(), self.base.buffers())).device
        self.A[name] = nn.Parameter(torch.empty(rank, self.n_in, device=device))
        self.B[name] = nn.Parameter(torch.zeros(self.n_out, rank, device=device))
        self.scale[name] = alpha / rank
        # As in loralib and PEFT: uniform within 1 / sqrt(in).
        nn.init.kaiming_uniform_(self.A[name], a=math.sqrt(5))

    def forward(self, x):
        """[..., in] -> [..., out], in the type of the base."""
        y = self.base(x)
        if self.active is None:
            return y
        a = self.A[self.active]
        b = self.B[self.active]
        # The base may be bfloat16. The adapter stays in float32 and is added in float32, so that a
        # small optimizer step is not rounded away before the sum. One fused product and sum, and
        # the scale on the narrow side, make no further tensors of the layer's width.
        low_rank = nn.functional.linear(x.flatten(0, -2).to(a.dtype), a) * self.scale[self.active]
        total = torch.addmm(y.flatten(0, -2).to(a.dtype), low_rank, b.T)
        return total.to(y.dtype).view_as(y)


def lora_layers(model):
    """The wrapped layers by their names in the base model: dict name -> LoRALinear."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def text_model(model):
    """The part of a model that reads text. Vision and audio towers stand outside."""
    decoder = model.get_decoder()
    # get_decoder returns what is called "decoder", in some classes the output head.
    return model if decoder is model.get_output_embeddings() else decoder


def linear_layers(model):
    """The layers that can be adapted, by their names: dict name -> module.

    They are all linear layers of the text model, but for the output head.
    """
    inside = set(text_model(model).modules())
    layers = {}
    for path, module in model.named_modules():
        if module not in inside or path.endswith(".base"):
            continue
        linear = isinstance(module, LoRALinear) or is_linear(module)
        if linear and module is not model.get_output_embeddings():
            layers[path] = module
    return layers


def add_adapter(model, name, rank, alpha, paths=None):
    """Freeze the model and put a new adapter `name` on its linear layers.

    paths: full names of the layers to adapt; by default all of `linear_layers`
    An adapter of that name is replaced. All adapters take gradients; the base does not.
    Raises InputError if a path is no linear layer of the model, or there is nothing to adapt.
    """
    layers = linear_layers(model)
    if paths is None:
        paths = list(layers)
    for path in paths:
        if path not in layers:
            raise InputError(f"the adapter is for another model: this one has no layer {path}")
    if not paths:
        raise InputError("the model has no linear layers to adapt")
    model.requires_grad_(False)
    for layer in lora_layers(model).values():  # remove an older adapter of this name everywhere
        if name in layer.A:
            del layer.A[name], layer.B[name]
    for path in paths:
        if not isinstance(layers[path], LoRALinear):
            layers[path] = LoRALinear(layers[path])
            model.set_submodule(path, layers[path])
        layers[path].add(name, rank, alpha)
    for layer in lora_layers(model).values():
        layer.A.requires_grad_(True)
        layer.B.requires_grad_(True)


def coverage(model):
    """A line that warns if LoRA adapts less than 95 % of the layers' weights, else "".

    Experts of a mixture that are one three-dimensional tensor, for example, are no linear layers:
    they are neither adapted nor kept in 4 bits. Embeddings and the output head are not counted.
    """
    skipped = {id(model.get_output_embeddings().weight)}
    adapted = 0
    for module in text_model(model).modules():
        if isinstance(module, LoRALinear):
            adapted += module.n_in * module.n_out
        if isinstance(module, LoRALinear | nn.Embedding):
            skipped |= {id(tensor) for tensor in module.parameters()}
    others = Counter()  # name, with * for the numbers of layers -> how many weights
    for path, tensor in text_model(model).named_parameters():
        if tensor.ndim > 1 and id(tensor) not in skipped:
            others[re.sub(r"\b\d+\b", "*", path)] += tensor.numel()
    share = adapted / (adapted + others.total())
    if share > 0.95:
        return ""
    names = ", ".join(name for name, _ in others.most_common())
    return f"LoRA (and --dtype nf4) covers {share:.0%} of the layers' weights, not {names}\n"


def adapter_parameters(model, name):
    """The trainable tensors of one adapter, in a fixed order: A [rank, in], B [out, rank], ..."""
    parameters = []
    for layer in lora_layers(model).values():
        if name in layer.A:
            parameters += [layer.A[name], layer.B[name]]
    return parameters


@contextmanager
def active_adapter(model, name):
    """Run the model with adapter `name` in this block, or with none of them (None: the base)."""
    layers = list(lora_layers(model).values())
    if name is not None and not any(name in layer.A for layer in layers):
        raise KeyError(f"no adapter {name!r}")
    before = [layer.active for layer in layers]
    for layer in layers:
        layer.active = name if name in layer.A else None
    try:
        yield
    finally:
        for layer, active in zip(layers, before):
            layer.active = active


PREFIX = "base_model.model."  # how PEFT names the wrapped model inside an adapter file


def save_adapter(model, name, folder):
    """Write one adapter in PEFT's layout: adapter_model.safetensors and adapter_config.json."""
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.A}
    tensors = {}
    for path, layer in layers.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.A[name].detach().cpu().contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = layer.B[name].detach().cpu().contiguous()
    write_tensors(Path(folder) / "adapter_model.safetensors", tensors)
    first = next(iter(layers.values()))
    config = adapter_config(
        base=model.config.name_or_path,
        paths=list(layers),
        rank=len(first.A[name]),
        alpha=first.scale[name] * len(first.A[name]),
        transposed=first.transposed,
    )
    text = json.dumps(config, indent=2) + "\n"
    (Path(folder) / "adapter_config.json").write_text(text, encoding="utf-8")


def adapter_config(base, paths, rank, alpha, transposed):
    """What PEFT has to know of an adapter: dict. paths: full names of the layers."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(paths),
        "fan_in_fan_out": transposed,
    }


def write_tensors(path, tensors):
    """A safetensors file with the usual permissions (its own `save_file` shuts others out)."""
    Path(path).write_bytes(save(tensors))


def read_tensors(path):
    """Tensors by name. Raises InputError if the file is damaged, or a number is not finite."""
    try:
        tensors = load_file(path)
    except Exception as error:  # of the file system, of safetensors
        raise InputError(f"cannot read {path}: {error}") from None
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{path} has numbers in {key} that are not finite")
    return tensors


def load_adapter(model, name, folder):
    """Add the adapter of a folder, which `save_adapter` has written, to the model under `name`.

    Raises InputError if a file is missing or damaged, is for another model, or was written by
    another program: what else its configuration may turn on is not read here.
    """
    folder = Path(folder)
    tensors = read_tensors(folder / "adapter_model.safetensors")
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank = int(config["r"])
        alpha = float(config["lora_alpha"])
        transposed = config["fan_in_fan_out"]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise InputError(f"cannot read {folder / 'adapter_config.json'}: {error!r}") from None
    paths = sorted({key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors})
    written = adapter_config(config.get("base_model_name_or_path"), paths, rank, alpha, transposed)
    for key in config.keys() | written.keys():
        if config.get(key) != written.get(key):
            raise InputError(
                f"the adapter in {folder} is not one of train.py: it has another {key}"
            )
    add_adapter(model, name, rank, alpha, paths)
    for path in paths:
        layer = model.get_submodule(path)
        for which, parameter in (("A", layer.A[name]), ("B", layer.B[name])):
            tensor = tensors.get(f"{PREFIX}{path}.lora_{which}.weight", torch.empty(0))
            if tensor.shape != parameter.shape:
                raise InputError(
                    f"the adapter in {folder} is for another model: {path} wants lora_{which} "
                    f"{list(parameter.shape)}, the file has {list(tensor.shape)}"
                )
            parameter.data.copy_(tensor)


def merge_adapter(model, name):
    """Add adapter `name` into the base weights and unwrap every layer: a plain model is left.

    A layer in NF4 is dequantised, also where it has no adapter (a vision tower's).
    """
    for path, layer in lora_layers(model).items():
        base = layer.base
        if isinstance(base, NF4Linear):
            base = base.dequantised()
        if name in layer.A:
            delta = layer.scale[name] * layer.B[name] @ layer.A[name]
            if isinstance(base, Conv1D):
                delta = delta.T
            base.weight.data += delta.to(base.weight.dtype)
        model.set_submodule(path, base)
    for path, module in list(model.named_modules()):
        if isinstance(module, NF4Linear):
            model.set_submodule(path, module.dequantised())


def base_fingerprint(model):
    """A checksum of 193 numbers of each tensor at most: it tells one base model from another.

    In NF4 the other tensors are bfloat16 on a GPU and float32 on a CPU: it is the same for both.
    """
    checksum = 0
    four_bits = any(isinstance(module, NF4Linear) for module in model.modules())
    for name, tensor in sorted(model.state_dict().items()):
        if ".A." not in name and ".B." not in name:
            sample = tensor.detach().flatten()[:: max(1, tensor.numel() // 97)].float().cpu()
            if four_bits:
                sample = sample.bfloat16().float()
            checksum = zlib.crc32(name.replace(".base.", ".").encode(), checksum)
            checksum = zlib.crc32(sample.numpy().tobytes(), checksum)
    return f"{checksum:08x}"
