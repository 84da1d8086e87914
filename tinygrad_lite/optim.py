"""Adam, gradient clipping and the learning-rate schedule."""
import math

import numpy as np

from .tensor import Tensor


class Adam:
    """Adam with bias correction (Kingma & Ba 2015, Algorithm 1), in the parameters' dtype; a step
    also shrinks matrices by lr * weight_decay (Loshchilov & Hutter 2019, Algorithm 2). Raises
    TypeError unless `parameters` is a list of Tensors."""
    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        if not isinstance(parameters, list) or not all(isinstance(p, Tensor) for p in parameters):
            raise TypeError(f"parameters must be a list of Tensors, not {type(parameters)}")
        self.parameters, self.weight_decay = parameters, weight_decay
        self.lr, self.betas, self.eps, self.steps = lr, betas, eps, 0
        # One long vector each: dozens of small arrays would cost a call each.
        self.mean = self.square = np.zeros_like(flat_gradients(parameters))  # m and v

    def step(self):
        """p -= lr m' / (sqrt(v') + eps), where m' = m / (1 - b1^t), v' = v / (1 - b2^t)."""
        self.steps += 1
        (beta1, beta2), t = self.betas, self.steps
        grad = flat_gradients(self.parameters)
        self.mean = self.mean + (1 - beta1) * (grad - self.mean)
        self.square = self.square + (1 - beta2) * (grad * grad - self.square)
        update = (self.mean * (self.lr / (1 - beta1 ** t))
                  / (np.sqrt(self.square / (1 - beta2 ** t)) + self.eps))
        for p, piece in zip(self.parameters, split_like(update, self.parameters)):
            if self.weight_decay and p.ndim > 1:
                p.data *= 1 - self.lr * self.weight_decay
            p.data -= piece

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None


def flat_gradients(parameters):
    """All gradients one after the other in one vector, zeros for a .grad of None."""
    return np.concatenate([(np.zeros_like(p.data) if p.grad is None else p.grad).ravel()
                           for p in parameters])


def split_like(vector, parameters):
    """The inverse: a vector cut into arrays of the parameters' shapes."""
    ends = np.cumsum([p.size for p in parameters])
    return [piece.reshape(p.shape) for p, piece in zip(parameters, np.split(vector, ends[:-1]))]


def clip_grad_norm(parameters, max_norm):
    """Scale the gradients so that their joint norm is at most `max_norm`; return it as it was."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = math.sqrt(sum(np.square(grad, dtype=np.float64).sum() for grad in grads))
    if norm > max_norm:
        for grad in grads:
            grad *= max_norm / norm
    return norm


def cosine_schedule(step, total, peak, warmup):
    """The learning rate of `step` (from 0): up to `peak` in a line, then a half cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
