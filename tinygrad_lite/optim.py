"""Adam, gradient clipping and the learning-rate schedule."""
import math

import numpy as np

from .tensor import Tensor


class Adam:
    """Adam (Kingma & Ba 2015, Algorithm 1), in the parameters' dtype. Matrices, not vectors, also
    shrink by lr * weight_decay in a step (Loshchilov & Hutter 2019, Algorithm 2). A slower mean of
    the gradients, of decay rate beta3, counts `alpha` times (AdEMAMix, Pagliardini et al. 2025,
    section 3). Raises TypeError unless `parameters` is a list of Tensors."""
    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                 alpha=0.0, beta3=0.995):
        if not isinstance(parameters, list) or not all(isinstance(p, Tensor) for p in parameters):
            raise TypeError(f"parameters must be a list of Tensors, not {type(parameters)}")
        self.parameters, self.lr, self.betas, self.eps = parameters, lr, betas, eps
        self.weight_decay, self.alpha, self.beta3, self.steps = weight_decay, alpha, beta3, 0
        self.mean, self.slow_mean, self.square = (  # m, s, v
            [np.zeros_like(p.data) for p in parameters] for _ in range(3))

    def step(self):
        """p -= lr (m' + alpha s) / (sqrt(v') + eps), m' = m / (1 - b1^t), v' = v / (1 - b2^t)."""
        self.steps += 1
        (beta1, beta2), t = self.betas, self.steps
        for p, m, s, v in zip(self.parameters, self.mean, self.slow_mean, self.square):
            grad = np.zeros_like(p.data) if p.grad is None else p.grad
            m += (1 - beta1) * (grad - m)
            s += (1 - self.beta3) * (grad - s)
            v += (1 - beta2) * (grad * grad - v)
            if self.weight_decay and p.ndim > 1:
                p.data *= 1 - self.lr * self.weight_decay
            mean = m / (1 - beta1 ** t) + self.alpha * s
            p.data -= self.lr * mean / (np.sqrt(v / (1 - beta2 ** t)) + self.eps)

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None


def clip_grad_norm(parameters, max_norm):
    """Scale the gradients so that their joint norm is at most `max_norm`; return it as it was."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = math.sqrt(sum(np.square(grad, dtype=np.float64).sum() for grad in grads))
    if norm > max_norm:
        for grad in grads:
            grad *= max_norm / norm
    return norm


def cosine_schedule(step, total, peak, warmup):
    """The learning rate of `step` (from 0): linearly up to `peak`, then a half cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
