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

import ctypes
import json
import math
import mmap
import sys
import zlib
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn
from transformers.pytorch_utils import Conv1D

PREFIX = "base_model.model."  # how PEFT names the wrapped model inside an adapter file
# What plain LoRA may have in adapter_config.json: these keys at any value, these at these values,
# any other only off: null, false or empty. Other initialisations change the base, too.
ANY_VALUE = (
    "base_model_name_or_path exclude_modules fan_in_fan_out inference_mode layers_pattern "
    "layers_to_transform lora_alpha lora_dropout megatron_core peft_version qalora_group_size r "
    "revision target_modules task_type"
).split()
SOME_VALUES = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, "gaussian"]}


# NF4 (Dettmers et al., 2023, appendix E): 16 levels, quantiles of a normal distribution, and one
# scale for BLOCK weights.
LEVELS = torch.tensor(
    [-1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0]
    + [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1]
)
BLOCK = 64


def quantise(weight):
    """NF4 of n weights, filled up to blocks: two codes a byte, uint8 [n / 2]; float32 [n / BLOCK].

    A block is scaled by its largest weight in size; a weight takes the code of the nearest level.
    """
    blocks = nn.functional.pad(weight.flatten().float(), (0, -weight.numel() % BLOCK))
    blocks = blocks.view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled, codes = blocks * (1 / absmax.clamp(min=1e-38))[:, None], 0
    for middle in ((LEVELS[1:] + LEVELS[:-1]) / 2).tolist():
        codes = codes + (scaled > middle).to(torch.uint8)
    return codes.flatten()[::2] << 4 | codes.flatten()[1::2], absmax


class NF4Linear(nn.Module):
    """A frozen linear layer [in -> out] whose weight is kept as NF4."""

    def __init__(self, base):
        super().__init__()
        weight = base.weight.data.T if isinstance(base, Conv1D) else base.weight.data
        self.kind, self.shape, self.bias = type(base), weight.shape, base.bias
        for name, tensor in zip(("codes", "absmax"), quantise(weight)):
            self.register_buffer(name, tensor)

    @property
    def weight(self):
        """Dequantised, float32 [out, in]."""
        pairs = torch.cartesian_prod(LEVELS, LEVELS).to(self.codes.device)  # of each byte
        blocks = nn.functional.embedding(self.codes.int(), pairs).view(-1, BLOCK)
        blocks *= self.absmax[:, None]
        return blocks.flatten()[: self.shape.numel()].view(self.shape)

    def forward(self, x):
        y = NF4Product.apply(x, self)
        return y if self.bias is None else y + self.bias


class NF4Product(torch.autograd.Function):
    """x W', the weight dequantised anew in each direction: none stays in the graph."""

    @staticmethod
    def forward(context, x, layer):
        context.layer = layer
        return x @ layer.weight.to(x.dtype).T

    @staticmethod
    def backward(context, gradient):
        return gradient @ context.layer.weight.to(gradient.dtype), None


def quantise_layers(model, computing):
    """All linear layers but the output head to NF4, one by one; the rest to the computing type."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings():
            model.set_submodule(path, NF4Linear(module))
            forget(module.weight.data)
    for parameter in model.parameters():
        stored, parameter.data = parameter.data, torch.empty(parameter.shape, dtype=computing)
        stored, computed = (data.flatten().split(2**24) for data in (stored, parameter.data))
        for part, target in zip(stored, computed):
            target.copy_(part)
            forget(part)


def forget(weight):
    """Give back the memory of a weight that is mapped from a file, and what quantising left."""
    if sys.platform == "linux" and weight.device.type == "cpu":
        page, libc = mmap.PAGESIZE, ctypes.CDLL(None)
        start = -(-weight.data_ptr() // page) * page  # of the pages that are all its own
        length = max(0, (weight.data_ptr() + weight.nbytes) // page * page - start)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
        libc.malloc_trim(0)


def give_back_at_once():
    """Blocks above 1 MB go back as soon as they are freed; else the C library keeps gaps."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-3, 2**20)  # -3: M_MMAP_THRESHOLD


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

    @property
    def weight(self):
        """Of the frozen layer, for models that look at its shape or type."""
        return self.base.weight

    def add(self, name, rank, alpha):
        device = next(chain(self.base.parameters(), self.base.buffers())).device
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


def lora_layers(model):
    """The wrapped layers by their names in the base model: dict name -> LoRALinear."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_adapter(model, name, rank, alpha, paths=None):
    """Freeze the model and put a new adapter `name` on its linear layers.

    paths: full names of the layers to adapt; by default all but the output head
    An adapter of that name is replaced. All adapters take gradients; the base does not.
    Raises ValueError where a path is no linear layer of the model, or there is nothing to adapt.
    """
    layers = {}
    for path, module in model.named_modules():
        linear = isinstance(module, nn.Linear | Conv1D | NF4Linear | LoRALinear)
        if linear and not path.endswith(".base") and module is not model.get_output_embeddings():
            layers[path] = module
    paths = list(layers) if paths is None else paths
    foreign = [path for path in paths if path not in layers]
    if foreign or not paths:
        reason = f"no linear layer {foreign[0]}" if foreign else "no linear layers"
        raise ValueError(f"the adapter is for another model: this one has {reason}")
    model.requires_grad_(False)
    for layer in lora_layers(model).values():  # of another adapter of that name nothing stays
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


def adapter_parameters(model, name):
    """The trainable tensors of one adapter, in a fixed order: A [rank, in], B [out, rank], ..."""
    adapted = [layer for layer in lora_layers(model).values() if name in layer.A]
    return [parameter for layer in adapted for parameter in (layer.A[name], layer.B[name])]


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
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0}
    config |= {"base_model_name_or_path": model.config.name_or_path, "inference_mode": True}
    config |= {"r": rank, "lora_alpha": first.scale[name] * rank}
    config["target_modules"] = sorted({path.rpartition(".")[2] for path in layers})
    config["fan_in_fan_out"] = first.transposed
    write_tensors(Path(folder) / "adapter_model.safetensors", tensors)
    text = json.dumps(config, indent=2) + "\n"
    (Path(folder) / "adapter_config.json").write_text(text, encoding="utf-8")


def write_tensors(path, tensors):
    """A safetensors file with the usual permissions (its own `save_file` shuts others out)."""
    Path(path).write_bytes(save(tensors))


def read(path):
    """What a JSON or safetensors file holds. Raises ValueError if it is damaged or not finite."""
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(path)
    except Exception as error:  # of the file system, of JSON, of safetensors
        raise ValueError(f"cannot read {path}: {error}") from None
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path} has numbers in {key} that are not finite")
    return tensors


def load_adapter(model, name, folder):
    """Add the adapter of a folder (written here or by PEFT) to the model under `name`.

    Raises ValueError where a file is missing or damaged (`read`), for another model, or no plain
    LoRA: whatever its configuration turns on beside that is not read here.
    """
    tensors = read(Path(folder) / "adapter_model.safetensors")
    config = read(Path(folder) / "adapter_config.json")
    config = config if isinstance(config, dict) else {}
    rank, alpha = config.get("r"), config.get("lora_alpha")
    odd = [key for key in tensors if not key.startswith(PREFIX) or ".lora_" not in key]
    for key, value in config.items():
        if key not in ANY_VALUE and value and value not in SOME_VALUES.get(key, []):
            odd.append(f"{key}: {value}")
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float)):
        odd.append(f"r: {rank}, lora_alpha: {alpha}")
    if odd or config.get("peft_type") != "LORA":
        raise ValueError(f"the adapter in {folder} is not plain LoRA ({', '.join(odd[:1])})")
    paths = sorted({key[len(PREFIX) : key.index(".lora_")] for key in tensors})
    add_adapter(model, name, rank, alpha, paths)
    for path in paths:
        layer = model.get_submodule(path)
        for which, parameter in (("A", layer.A[name]), ("B", layer.B[name])):
            tensor = tensors.get(f"{PREFIX}{path}.lora_{which}.weight", torch.empty(0))
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"the adapter in {folder} is for another model: {path} wants lora_{which} "
                    f"{list(parameter.shape)}, the file has {list(tensor.shape)}"
                )
            parameter.data.copy_(tensor)


def merge_adapter(model, name):
    """Add adapter `name` into the base weights and unwrap every layer: a plain model is left.

    A layer in NF4 is dequantised.
    """
    for path, layer in lora_layers(model).items():
        base, weight = layer.base, layer.base.weight.data
        if isinstance(base, NF4Linear):
            transposed = base.kind is Conv1D
            base = Conv1D(*base.shape) if transposed else nn.Linear(*base.shape[::-1], bias=False)
            base.weight.data, base.bias = weight.T if transposed else weight, layer.base.bias
            weight = base.weight.data
        if name in layer.A:
            delta = layer.scale[name] * layer.B[name] @ layer.A[name]
            weight += (delta.T if isinstance(base, Conv1D) else delta).to(weight.dtype)
        model.set_submodule(path, base)


def base_fingerprint(model):
    """A few characters for the base weights: they change with any of some 97 numbers a tensor."""
    checksum = 0
    for name, tensor in sorted(model.state_dict().items()):
        if ".A." not in name and ".B." not in name:
            some = tensor.detach().flatten()[:: max(1, tensor.numel() // 97)].float().cpu()
            checksum = zlib.crc32(name.replace(".base.", ".").encode(), checksum)
            checksum = zlib.crc32(some.numpy().tobytes(), checksum)
    return f"{checksum:08x}"
