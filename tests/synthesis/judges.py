"""Scorers of the generator's tests, found by their dotted paths as a user's own would be."""

from __future__ import annotations

import numpy as np
import torch


def red(images, prompts):
    return [float(np.asarray(image)[..., 0].mean()) for image in images]


def spread(images, prompts):
    return [float(np.asarray(image).std()) for image in images]


def blind_to_dogs(images, prompts):
    return [None if "dog" in prompt else value for prompt, value in zip(prompts, red(images, prompts), strict=True)]


def blind(images, prompts):
    return [None] * len(prompts)


class GreenJudge:
    """A judge of pairs: the greener picture is better."""

    name = "green"
    identity = {"id": "green", "revision": None, "code_version": "1"}

    def compare(self, pairs, prompts):
        means = [[float(np.asarray(image)[..., 1].mean()) for image in pair] for pair in pairs]
        return torch.tensor([0.9 if first > second else 0.2 for first, second in means])


class BothJudge(GreenJudge):
    """Likes red in single pictures, green in pairs."""

    def score(self, images, prompts):
        return torch.tensor(red(images, prompts))


class Sure(GreenJudge):
    """Its probabilities are none."""

    def compare(self, pairs, prompts):
        return super().compare(pairs, prompts) * 100


class Miscounting:
    """Forgets the last picture."""

    name = "miscounting"
    identity = {"id": "miscounting", "revision": None, "code_version": "1"}

    def score(self, images, prompts):
        return torch.zeros(len(prompts) - 1)


class Eye:
    """Its embedding of a picture is the mean colour."""

    name = "eye"
    identity = {"id": "eye", "revision": None, "code_version": "1"}

    def score(self, images, prompts):
        return torch.tensor(red(images, prompts))

    def embed(self, images):
        means = torch.tensor(np.stack([np.asarray(image, dtype=np.float32).mean((0, 1)) for image in images]))
        return torch.nn.functional.normalize(means, dim=-1)
