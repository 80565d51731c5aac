"""Adam (Kingma and Ba, 2015) with a clip of the gradient's global norm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cartpole.network import Array

__all__ = ["Adam"]


class Adam:
    """Changes a list of parameters in place, one call of `step` an update."""

    def __init__(
        self,
        parameters: Sequence[Array],
        *,
        learning_rate: float,
        max_gradient_norm: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-5,
    ) -> None:
        """Start with zero moments for `parameters`, which are kept and changed in place."""
        self._parameters = list(parameters)
        self._mean = [np.zeros_like(parameter) for parameter in parameters]
        self._variance = [np.zeros_like(parameter) for parameter in parameters]
        self._learning_rate = learning_rate
        self._max_gradient_norm = max_gradient_norm
        self._beta1 = beta1
        self._beta2 = beta2
        self._epsilon = epsilon
        self._steps = 0

    def step(self, gradients: Sequence[Array], *, scale: float = 1.0) -> float:
        """Move the parameters down `gradients` (same order and shapes); `scale` shrinks the learning rate.

        Returns:
            The global norm of the gradients before the clip.
        """
        norm = float(np.sqrt(sum(float(np.vdot(gradient, gradient)) for gradient in gradients)))
        shrink = min(1.0, self._max_gradient_norm / (norm + 1e-12))
        self._steps += 1
        correction1 = 1.0 - self._beta1**self._steps
        correction2 = 1.0 - self._beta2**self._steps
        rate = self._learning_rate * scale / correction1
        for parameter, gradient, mean, variance in zip(
            self._parameters, gradients, self._mean, self._variance, strict=True
        ):
            clipped = gradient * shrink
            mean[...] += (1.0 - self._beta1) * (clipped - mean)
            variance[...] += (1.0 - self._beta2) * (clipped * clipped - variance)
            parameter[...] -= rate * mean / (np.sqrt(variance / correction2) + self._epsilon)
        return norm
