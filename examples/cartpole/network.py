"""A small fully connected network: tanh between the layers, hand-written gradients, no framework.

x0 = input        z_i = x_{i-1} W_i + b_i        x_i = tanh(z_i)  (the last layer stays linear)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Network"]

Array = npt.NDArray[Any]


class Network:
    """Weights of one network and its two passes.

    Attributes:
        sizes: widths of input, hidden layers and output.
        parameters: [W_1, b_1, W_2, b_2, …], W_i of shape (sizes[i-1], sizes[i]); changed in place by the optimiser.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        rng: np.random.Generator,
        *,
        output_gain: float = 1.0,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        """Draw orthogonal weights (gain sqrt(2) inside, `output_gain` at the end) and zero biases."""
        self.sizes = tuple(sizes)
        self.parameters: list[Array] = []
        last = len(self.sizes) - 2
        for index, (width_in, width_out) in enumerate(pairwise(self.sizes)):
            gain = output_gain if index == last else float(np.sqrt(2.0))
            self.parameters.append((gain * _orthogonal(width_in, width_out, rng)).astype(dtype))
            self.parameters.append(np.zeros(width_out, dtype))

    def forward(self, inputs: Array) -> tuple[Array, list[Array]]:
        """Run a batch through the network.

        Args:
            inputs: shape (batch, sizes[0]).

        Returns:
            The output of shape (batch, sizes[-1]) and the input of every layer, which `backward` needs.
        """
        layer_inputs = [inputs]
        current = inputs
        last = len(self.parameters) - 2
        for index in range(0, len(self.parameters), 2):
            current = current @ self.parameters[index]
            current += self.parameters[index + 1]
            if index != last:
                np.tanh(current, out=current)
                layer_inputs.append(current)
        return current, layer_inputs

    def backward(self, layer_inputs: Sequence[Array], output_gradient: Array) -> list[Array]:
        """Turn the loss's gradient by the output into its gradient by each parameter.

        Args:
            layer_inputs: what `forward` returned for this batch.
            output_gradient: dLoss/dOutput, shape (batch, sizes[-1]).

        Returns:
            Gradients in the order and the shapes of `parameters`.
        """
        gradients: list[Array] = []
        upstream = output_gradient
        for layer in range(len(layer_inputs) - 1, -1, -1):
            inputs = layer_inputs[layer]
            gradients.append(upstream.sum(axis=0))
            gradients.append(inputs.T @ upstream)
            if layer > 0:
                upstream = (upstream @ self.parameters[2 * layer].T) * (1.0 - inputs * inputs)
        gradients.reverse()
        return gradients

    def to_bytes(self) -> bytes:
        """All parameters as little-endian float32, one after another: what goes to the rollout workers."""
        return b"".join(parameter.astype("<f4").tobytes() for parameter in self.parameters)

    def load_bytes(self, blob: bytes) -> None:
        """Take over parameters from `to_bytes` of a network of the same sizes.

        Raises:
            ValueError: the blob has another length than this network's parameters.
        """
        flat = np.frombuffer(blob, "<f4")
        expected = sum(parameter.size for parameter in self.parameters)
        if flat.size != expected:
            raise ValueError(f"{flat.size} weights arrived for a network of {expected}")
        offset = 0
        for parameter in self.parameters:
            parameter[...] = flat[offset : offset + parameter.size].reshape(parameter.shape)
            offset += parameter.size


def _orthogonal(width_in: int, width_out: int, rng: np.random.Generator) -> Array:
    """An orthogonal matrix of shape (width_in, width_out) (Saxe et al., 2013)."""
    square = rng.standard_normal((max(width_in, width_out), min(width_in, width_out)))
    basis, triangle = np.linalg.qr(square)
    basis *= np.sign(np.diag(triangle))
    return basis if width_in >= width_out else basis.T
