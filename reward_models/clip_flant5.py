"""CLIP-FlanT5, the model of the VQAScore paper (Lin et al. 2024, https://arxiv.org/abs/2404.01291).

A CLIP ViT-L/14 at 336 pixels, two linear layers, and a Flan-T5 that reads the picture's patches between two pieces of
text. Its own class left with old releases of transformers; the parts are classes of any release.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .errors import RewardModelError
from .weights import (
    State,
    build_from_state,
    find_file,
    fingerprint,
    load_exactly,
    load_pretrained,
    read_part,
    take,
)

TOKENIZER = "google/flan-t5-xxl"  # that of every Flan-T5
# The wording that the published scores were computed with; the picture stands between the two.
BEFORE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: "
)
AFTER = "\n{question} ASSISTANT: "
QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
LONGEST = 2048  # tokens; the picture counts as one
_VISION = ("vision_tower.vision_tower.", "mm_projector.")


def is_clip_flant5(model: str | Path, revision: str | None = None) -> bool:
    """Whether a hub id or folder is such a checkpoint, by its ``config.json``; False where that cannot be read."""
    return _config(model, revision).get("model_type") == "clip_t5"


class ClipFlanT5:
    """How likely a given answer to a question about a picture is.

    Args:
        model: hub id or folder of a checkpoint whose ``config.json`` says ``clip_t5``: keys of T5, ``mm_projector.*``
            and, where the picture tower is part of it, ``vision_tower.vision_tower.*``.
        tokenizer: hub id or folder of Flan-T5's tokenizer; None means that in the checkpoint's folder where it is one
            that has it, else :data:`TOKENIZER`.
        vision: hub id or folder of the CLIP of the picture tower: its config, its image processor and, where the
            checkpoint has none, its weights. None means the one that the checkpoint names.
        revision: revision of the checkpoint on the hub.
        device: where it runs; the GPU when there is one.
        dtype: precision of the weights; bfloat16 on a GPU, as the makers', and float32 on the CPU when None.

    Raises:
        RewardModelError: a part cannot be found, or its keys are not the original's.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | None = None,
        vision: str | Path | None = None,
        revision: str | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessorPil

        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = dtype or (torch.float32 if self.device == "cpu" else torch.bfloat16)
        config = _config(model, revision)
        vision = vision or config["mm_vision_tower"]
        if tokenizer is None:
            tokenizer = model if (Path(model) / "tokenizer_config.json").is_file() else TOKENIZER
        self.tokenizer = load_pretrained(AutoTokenizer, tokenizer, "vqascore")
        self.preprocess = load_pretrained(CLIPImageProcessorPil, vision, "vqascore")
        self.layer, self.features = config.get("mm_vision_select_layer", -2), config.get("mm_vision_select_feature")
        self.t5 = _language(model, config, revision, self.dtype).to(self.device)
        other = read_part(model, _VISION, revision)
        self.tower = _tower(vision, take(other, _VISION[0]), self.dtype).to(self.device)
        self.projector = _projector(take(other, _VISION[1])).to(self.device, self.dtype)
        self.model = str(model)
        self.revision = fingerprint(self.t5, self.tower, self.projector)
        self.settings = {
            "dtype": str(self.dtype),
            "tokenizer": str(tokenizer),
            "vision": str(vision),
            "transformers": version("transformers"),
        }

    @torch.inference_mode()
    def probability(self, images: list[Image.Image], questions: list[str], answer: str) -> Tensor:
        """(n,) fp32 in [0, 1]: ``exp`` of the mean log-probability of the answer's tokens, the end included."""
        seen = self.projector(self._look(images))
        words, mask = self._spliced(seen, questions)
        said = torch.tensor([self.tokenizer(answer)["input_ids"]] * len(questions), device=self.device)
        before = F.pad(said[:, :-1], (1, 0), value=self.t5.config.decoder_start_token_id or 0)
        logits = self.t5(inputs_embeds=words, attention_mask=mask, decoder_input_ids=before, use_cache=False).logits
        # T5's table of words is padded; the makers cut it to the words there are.
        logs = logits[..., : len(self.tokenizer)].float().log_softmax(-1)
        return logs.gather(-1, said[..., None])[..., 0].mean(-1).exp().cpu()

    def _look(self, images: list[Image.Image]) -> Tensor:
        """(n, patches, width): what the tower's last layer but one says of each patch."""
        colour = tuple(int(255 * mean) for mean in self.preprocess.image_mean)
        squares = [_square(image, colour) for image in images]
        pixels = self.preprocess(squares, return_tensors="pt")["pixel_values"].to(self.device, self.dtype)
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[self.layer]
        return hidden if self.features == "cls_patch" else hidden[:, 1:]

    def _spliced(self, seen: Tensor, questions: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (n, longest, dim) of text, picture, text, padded on the right, and their mask."""
        head = self.tokenizer(BEFORE)["input_ids"]  # each piece of text ends with </s>, also the first, as the makers'
        rest = LONGEST - len(head) - 1
        tails = [self.tokenizer(AFTER.replace("{question}", question))["input_ids"][:rest] for question in questions]
        longest = max(map(len, tails))
        ids = torch.tensor([tail + [0] * (longest - len(tail)) for tail in tails], device=self.device)
        kept = torch.tensor([[n < len(tail) for n in range(longest)] for tail in tails], device=self.device)
        table = self.t5.get_input_embeddings()
        first = table(torch.tensor(head, device=self.device)).expand(len(tails), -1, -1)
        words = torch.cat([first, seen.to(first.dtype), table(ids)], dim=1)
        return words, F.pad(kept, (words.shape[1] - longest, 0), value=True)


def _config(model: str | Path, revision: str | None) -> dict[str, Any]:
    try:
        return dict(json.loads(find_file(model, "config.json", revision).read_text(encoding="utf-8")))
    except (RewardModelError, OSError, ValueError):
        return {}


def _language(model: str | Path, config: dict[str, Any], revision: str | None, dtype: torch.dtype) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    class FlanT5(T5ForConditionalGeneration):
        _keys_to_ignore_on_load_unexpected = [
            *T5ForConditionalGeneration._keys_to_ignore_on_load_unexpected,
            *(r"^vision_tower\.", r"^mm_projector\."),  # read apart
            r"^embed_tokens\.",  # one more name of the table of words
        ]
        _tied_weights_keys = {f"{half}.embed_tokens.weight": "shared.weight" for half in ("encoder", "decoder")}

    own = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    return load_pretrained(
        FlanT5, model, "vqascore", revision=revision, config=T5Config.from_dict(own), dtype=dtype, whole=True
    )


def _tower(vision: str | Path, state: State, dtype: torch.dtype) -> Any:
    """The picture tower: the checkpoint's where it has one, as its makers load it, else the named CLIP's."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    if not state:
        return load_pretrained(CLIPVisionModel, vision, "vqascore", dtype=dtype)
    config = load_pretrained(CLIPVisionConfig, vision, "vqascore")
    state = {key: value for key, value in state.items() if not key.endswith("position_ids")}  # of older transformers
    return build_from_state(CLIPVisionModel, config, state, "vqascore", dtype)


def _projector(state: State) -> nn.Sequential:
    try:
        (wide, width), (out, inner) = state["0.weight"].shape, state["2.weight"].shape
    except KeyError as error:
        raise RewardModelError(f"vqascore: the checkpoint lacks mm_projector.{error}.") from error
    projector = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(inner, out))
    load_exactly(projector, state, "vqascore")
    return projector.eval().requires_grad_(False)


def _square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of a square of one colour."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
