"""Adam, AdEMAMix, gradient clipping and the learning-rate schedule."""

import math

import numpy as np

from .tensor import Tensor


class Adam:
    """Adam (Kingma & Ba 2015, Algorithm 1) with decoupled weight decay.

    parameters: a list of Tensors (TypeError for anything else).
    lr: the learning rate, an attribute that may change from step to step.
    weight_decay: before each update, matrices (not vectors) are multiplied by
        1 - lr * weight_decay, as in PyTorch's AdamW. (In Loshchilov & Hutter 2019, Algorithm 2, the
        factor depends on the schedule, but not on the base rate.)

    As in PyTorch, a parameter without a gradient is left alone: neither its momentum nor weight
    decay moves it.
    """

    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        if not isinstance(parameters, list) or not all(isinstance(p, Tensor) for p in parameters):
            raise TypeError("parameters must be a list of Tensors")
        self.parameters = parameters
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.steps = [0 for _ in parameters]  # how often each has been updated: t
        self.mean = [np.zeros_like(p.data) for p in parameters]  # of its gradients: m
        self.square = [np.zeros_like(p.data) for p in parameters]  # mean of their squares: v

    def step(self):
        """p -= lr m_hat / (sqrt(v_hat) + eps), where m_hat = m / (1 - beta1^t) and
        v_hat = v / (1 - beta2^t)."""
        for i, p in enumerate(self.parameters):
            if p.grad is None:
                continue
            self.steps[i] += 1
            direction = self._direction(i, p.grad)
            if self.weight_decay and p.ndim > 1:
                p.data *= 1 - self.lr * self.weight_decay
            p.data -= self.lr * direction

    def _direction(self, i, grad):
        """m_hat / (sqrt(v_hat) + eps) of parameter i, after taking in its new gradient."""
        mean_hat = self._mean_hat(i, grad)
        beta2 = self.betas[1]
        self.square[i] += (1 - beta2) * (grad * grad - self.square[i])
        square_hat = self.square[i] / (1 - beta2 ** self.steps[i])
        return mean_hat / (np.sqrt(square_hat) + self.eps)

    def _mean_hat(self, i, grad):
        beta1 = self.betas[0]
        self.mean[i] += (1 - beta1) * (grad - self.mean[i])
        return self.mean[i] / (1 - beta1 ** self.steps[i])  # corrects for m starting at 0

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None


class AdEMAMix(Adam):
    """Adam with a second, slower mean s of the gradients (Pagliardini et al. 2025, section 3).

        p -= lr (m_hat + alpha s) / (sqrt(v_hat) + eps)

    As in the paper, s is not corrected for starting at 0. Unlike there, beta3 is constant.

    beta3: the decay rate of s.
    alpha: the weight of s, an attribute to be raised from step to step. It starts at 0: plain Adam.
    """

    def __init__(self, parameters, *arguments, beta3=0.995, **options):
        super().__init__(parameters, *arguments, **options)
        self.beta3 = beta3
        self.alpha = 0.0
        self.slow_mean = [np.zeros_like(p.data) for p in parameters]

    def _mean_hat(self, i, grad):
        self.slow_mean[i] += (1 - self.beta3) * (grad - self.slow_mean[i])
        return super()._mean_hat(i, grad) + self.alpha * self.slow_mean[i]


def clip_grad_norm(parameters, max_norm):
    """Scale all gradients by one factor so that their joint norm is at most max_norm.

    Returns the norm before. Parameters without a gradient do not count.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = math.sqrt(sum(np.square(grad, dtype=np.float64).sum() for grad in grads))
    if norm > max_norm:
        for grad in grads:
            grad *= max_norm / norm
    return norm


def cosine_schedule(step, total, peak, warmup):
    """The learning rate of step 0, 1, ... total - 1: a linear rise to `peak` within the first
    `warmup` steps, then half a cosine down towards 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)  # from 0 to just below 1
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
