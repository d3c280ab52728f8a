"""Linear layers that read the same vectors, as one matrix product: fewer launches in a decode step.

The projections to queries, keys and values of a layer become one product, and so do the gate and up projections of its
MLP. Names and values of the weights stay: they become views of the matrix that is multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FUSED_CHILDREN = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # names of children of one module


class FusedProduct:
    """The joint matrix [sum of out_features, in_features] of several linear layers, and their last outputs."""

    def __init__(self, linears: list[nn.Linear]):
        self.weight = torch.cat([linear.weight.detach() for linear in linears])
        self.bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
        self.sizes = [linear.out_features for linear in linears]
        self.vectors: Tensor | None = None
        self.outputs: tuple[Tensor, ...] = ()


class FusedLinear(nn.Module):
    """One of the linear layers of a product. The first that is called multiplies; the last drops the outputs."""

    def __init__(self, linear: nn.Linear, product: FusedProduct, index: int):
        super().__init__()
        self.product, self.index = product, index
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        rows = slice(sum(product.sizes[:index]), sum(product.sizes[: index + 1]))
        self.weight.data = product.weight[rows]
        if self.bias is not None:
            self.bias.data = product.bias[rows]

    def forward(self, vectors: Tensor) -> Tensor:
        product = self.product
        if product.vectors is not vectors:
            product.vectors = vectors
            product.outputs = nn.functional.linear(vectors, product.weight, product.bias).split(product.sizes, dim=-1)
        output = product.outputs[self.index]
        if self.index == len(product.sizes) - 1:
            product.vectors, product.outputs = None, ()
        return output


def fuse_linears(model: nn.Module) -> int:
    """Fuse linear layers that read the same vectors, in place, for inference; calling it again does nothing.

    Layers with LoRA, of other classes or with biases on some only are left alone. Do not move the model to another
    device afterwards.

    Returns:
        The number of products made.
    """
    products = 0
    for module in list(model.modules()):
        for names in FUSED_CHILDREN:
            linears = [getattr(module, name, None) for name in names]
            if all(type(linear) is nn.Linear for linear in linears) and can_be_fused(linears):
                product = FusedProduct(linears)
                for index, (name, linear) in enumerate(zip(names, linears)):
                    setattr(module, name, FusedLinear(linear, product, index))
                products += 1
    return products


def can_be_fused(linears: list[nn.Linear]) -> bool:
    """Whether these layers can become one product."""
    first = linears[0]
    return all(
        (each.in_features, each.weight.dtype, each.weight.device, each.bias is None)
        == (first.in_features, first.weight.dtype, first.weight.device, first.bias is None)
        for each in linears
    )
