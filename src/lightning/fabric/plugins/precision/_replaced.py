"""What precisions that put other layers in the place of torch's have in common."""

from torch import nn


def stay_off_fast_paths(module: nn.Module) -> None:
    """Let layers of torch's that contain replaced ones call them.

    Without gradients, in ``eval``, a ``TransformerEncoderLayer`` computes with the parameters of its parts, past their
    ``forward``; not if this attribute says that its activation is another.
    """
    for layer in module.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            layer.activation_relu_or_gelu = 0
