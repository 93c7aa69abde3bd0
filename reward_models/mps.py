"""Multi-dimensional Preference Score (Zhang et al. 2024, https://arxiv.org/abs/2405.14705), its overall dimension."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .errors import RewardModelError
from .mps_fusion import Fusion
from .weights import (
    State,
    WeightsRewardModel,
    build_from_state,
    find_file,
    load_exactly,
    load_pretrained,
    read_state,
    refuse_rest,
    take,
)

BACKBONE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
FILE = "mps_overall.pt"
# What "overall" means to the model: words whose likes in a prompt decide where the picture is looked at.
OVERALL = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
_BUFFERS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")  # of older transformers


class MPS(WeightsRewardModel):
    """``exp(logit_scale) * cosine`` of the prompt and the picture as seen through the prompt's words that matter.

    A word matters when its likeness to some word of ``condition`` is above ``threshold`` times the likeness of the
    prompt's best word. The original takes that best word over the whole batch, so that a score depends on its
    neighbours; here each prompt has its own, which is the original's result for one prompt at a time.

    The original checkpoint is a pickled module, which is never loaded here. Convert it once, in the environment its
    makers describe: ``torch.save(torch.load(path).state_dict(), "mps_overall.pt")``.

    Args:
        checkpoint: that file, or the folder it is in.
        backbone: hub id or folder of the CLIP it was tuned from: its config, tokenizer and image processor are used.
        condition: what is judged; the released weights were trained for :data:`OVERALL` only.
        threshold: see above; 0.3 in the original's evaluation.
        revision: revision of the backbone on the hub.
        device: where it runs; the GPU when there is one.
        dtype: precision of the weights; embeddings are compared in fp32.
        batch_size: pictures scored at once.

    Raises:
        RewardModelError: no checkpoint, a pickled one, or one with other keys.
    """

    name = "mps"
    licence = "MIT (code); the weights come without a statement of their own"
    requires = ("transformers",)

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        backbone: str | Path = BACKBONE,
        condition: str = OVERALL,
        threshold: float = 0.3,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> None:
        from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

        super().__init__(device, dtype, batch_size)
        if checkpoint is None:
            raise RewardModelError(
                "mps: its weights are published only as a pickled module; convert them once as docs/reward-models.md "
                "says and give checkpoint=PATH."
            )
        state = read_state(find_file(checkpoint, FILE))
        refuse_rest(state, ("model.", "cross_model.layers."), self.name)
        config = load_pretrained(CLIPConfig, backbone, self.name, revision=revision)
        clip = take(state, "model.", drop=_BUFFERS)
        self.model = build_from_state(CLIPModel, config, clip, self.name, dtype).to(self.device)
        self.fusion = _fusion(take(state, "cross_model."), self.name).to(self.device, dtype)
        self.tokenizer = load_pretrained(AutoTokenizer, backbone, self.name, revision=revision)
        self.preprocess = load_pretrained(CLIPImageProcessorPil, backbone, self.name, revision=revision)
        self.threshold = threshold
        settings = {"backbone": str(backbone), "condition": condition, "threshold": threshold}
        self._identify(checkpoint, self.model, self.fusion, **settings)
        with torch.inference_mode():
            self.condition = self._read([condition])[0]

    @torch.inference_mode()
    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        pixels = self.preprocess(images, return_tensors="pt")["pixel_values"].to(self.device, self.dtype)
        words, told = self._read(prompts)
        likeness = (words.float() @ self.condition.float().mT).amax(-1)  # (n, tokens), best over the condition's
        matters = likeness / likeness.amax(-1, keepdim=True) > self.threshold
        patches = self.model.visual_projection(self.model.vision_model(pixels).last_hidden_state)
        seen = self.fusion(patches, words, matters)
        cosine = (F.normalize(seen.float(), dim=-1) * F.normalize(told.float(), dim=-1)).sum(-1)
        return self.model.logit_scale.float().exp() * cosine

    def _read(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Projected embeddings of all tokens (n, 77, dim), padding included as in the original, and of the last one."""
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        read = self.model.text_model(input_ids=tokens.input_ids.to(self.device))
        return self.model.text_projection(read.last_hidden_state), self.model.text_projection(read.pooler_output)


def _fusion(state: State, label: str) -> Fusion:
    """The fusion with its sizes read off the shapes of ``state``, loaded."""
    state = {key.replace(".fn.", ".", 1): value for key, value in state.items() if "rotary_emb" not in key}
    try:
        heads_out, dim = state["layers.0.0.to_q.weight"].shape
        head_width = state["layers.0.0.to_kv.weight"].shape[0] // 2
        inner = state["layers.0.0.ff.2.weight"].shape[1]
    except KeyError as error:
        raise RewardModelError(f"{label}: the checkpoint lacks cross_model's {error}.") from error
    count = 1 + max(int(re.findall(r"\d+", key)[0]) for key in state)
    fusion = Fusion(dim, count, heads_out // head_width, head_width, inner)
    load_exactly(fusion, state, label)
    return fusion.eval().requires_grad_(False)
