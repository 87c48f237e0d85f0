"""NF4 by hand: the weights of a frozen base in 4 bits.  [torch; imports nothing of ours]

A block of 64 weights is stored as one scale, its largest absolute value, and a code of 4 bits for
each weight: the nearest of 16 levels, which are quantiles of a normal distribution. Dettmers et
al. (2023), QLoRA, section 3 and appendix E.
"""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

LEVELS = torch.tensor(
    [-1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0]
    + [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1]
)
BLOCK = 64


def quantise(weight):
    """n weights, filled up to whole blocks -> (codes, scales).

    codes:  uint8 [n / 2], two in a byte;  scales: float32 [n / BLOCK]
    """
    blocks = nn.functional.pad(weight.flatten().float(), (0, -weight.numel() % BLOCK))
    blocks = blocks.view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    scaled = blocks * (1 / scales.clamp(min=1e-38))[:, None]
    codes = torch.zeros_like(scaled, dtype=torch.uint8)
    for middle in ((LEVELS[1:] + LEVELS[:-1]) / 2).tolist():
        codes += scaled > middle
    codes = codes.flatten()
    return codes[::2] << 4 | codes[1::2], scales


class NF4Linear(nn.Module):
    """A frozen linear layer [in -> out] whose weight is kept as NF4."""

    def __init__(self, base):
        super().__init__()
        self.transposed = isinstance(base, Conv1D)  # its weight is [in, out]
        weight = base.weight.data.T if self.transposed else base.weight.data
        self.shape = weight.shape
        self.bias = base.bias
        codes, scales = quantise(weight)
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", scales)

    @property
    def weight(self):
        """Dequantised, float32 [out, in]."""
        pairs = torch.cartesian_prod(LEVELS, LEVELS).to(self.codes.device)  # of each byte
        blocks = nn.functional.embedding(self.codes.int(), pairs).view(-1, BLOCK)
        blocks *= self.absmax[:, None]
        return blocks.flatten()[: self.shape.numel()].view(self.shape)

    def forward(self, x):
        """[..., in] -> [..., out]"""
        y = NF4Product.apply(x, self)
        return y if self.bias is None else y + self.bias

    def dequantised(self):
        """The layer as it was, an nn.Linear or a Conv1D, with the weights that NF4 has kept."""
        n_out, n_in = self.shape
        if self.transposed:
            layer = Conv1D(n_out, n_in)
            layer.weight.data = self.weight.T.contiguous()
        else:
            layer = nn.Linear(n_in, n_out, bias=False)
            layer.weight.data = self.weight
        layer.bias = self.bias
        return layer


class NF4Product(torch.autograd.Function):
    """x W'. The weight is dequantised anew in each direction, so that none stays in the graph."""

    @staticmethod
    def forward(context, x, layer):
        context.layer = layer
        return x @ layer.weight.to(x.dtype).T

    @staticmethod
    def backward(context, gradient):
        return gradient @ context.layer.weight.to(gradient.dtype), None


def is_linear(module):
    """Whether a module computes x W' + bias and nothing else.

    A subclass of nn.Linear may do more: a router returns several tensors. So it is tried.
    """
    if type(module) in (nn.Linear, Conv1D, NF4Linear):
        return True
    if not isinstance(module, nn.Linear):
        return False
    x = torch.linspace(-3, 3, module.in_features).to(module.weight)[None]
    try:
        y = module(x)
    except Exception:  # of the model's own code
        return False
    product = nn.functional.linear(x, module.weight, module.bias).float()
    if not isinstance(y, torch.Tensor) or y.shape != product.shape:
        return False
    return bool((y.float() - product).norm() <= 0.02 * product.norm())  # 16 bits round otherwise


def quantise_layers(model, dtype):
    """Replace every linear layer except the output head by an NF4Linear.

    dtype: the type to which all other parameters are cast
    """
    for path, module in list(model.named_modules()):
        if is_linear(module) and module is not model.get_output_embeddings():
            model.set_submodule(path, NF4Linear(module))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
