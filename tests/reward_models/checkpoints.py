"""Small checkpoints in the very formats of the published ones: the same keys, config classes and files, tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLModel,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.tiny import TEXT_WIDTH, tiny_t5_tokenizer, tiny_text_config, tiny_tokenizer

SIZE = 32  # pixels of every tiny CLIP
ODD_SIZES = [(40, 50), (57, 33), (33, 64), (32, 32), (31, 32), (97, 41), (20, 21), (64, 31)]
PROMPTS = ["a red circle", "two blue stars", "?", "a", "red", "a long prompt " * 9, "a square", "blue"]


def pictures() -> list[Image.Image]:
    """Eight pictures of odd sizes with edges, gradients and colours."""
    made = []
    for n, (width, height) in enumerate(ODD_SIZES):
        y, x = np.mgrid[0:height, 0:width]
        waves = [127.5 + 127.5 * np.sin((x * (n + 1) + y * c) / (3 + c)) * (x > n) for c in range(3)]
        made.append(Image.fromarray(np.stack(waves, -1).astype(np.uint8)))
    return made


def seeded(n: int) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def spread(module: torch.nn.Module, seed: int, scale: float = 0.3) -> torch.nn.Module:
    """Weights large enough that every part of a network shows in its output."""
    generator = seeded(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_norm else noise * scale)
    return module.eval()


def clip_folder(folder: Path, seed: int = 0) -> CLIPModel:
    """A ``CLIPModel`` with tokenizer and image processor, as PickScore_v1 and LAION's CLIP-H are stored."""
    tokenizer = tiny_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=8
    )
    text = tiny_text_config(tokenizer)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=TEXT_WIDTH))
    spread(model, seed)
    model.logit_scale.data.fill_(np.log(100.0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(
        folder
    )
    return model.eval()


TINY_OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIZE, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def open_clip_model(folder: Path, seed: int = 0, name: str = "tiny-scorer-test"):
    """A small architecture registered with open_clip, randomly filled."""
    (folder / f"{name}.json").write_text(json.dumps(TINY_OPEN_CLIP))
    open_clip.add_model_config(folder)
    model = open_clip.CLIP(**open_clip.get_model_config(name))
    spread(model, seed)
    model.logit_scale.data.fill_(np.log(100.0))
    return model


def hps_file(path: Path, seed: int = 0):
    """As HPS_v2.1_compressed.pt: open_clip's keys under ``state_dict``."""
    model = open_clip_model(path.parent, seed)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, path)
    return model


def aesthetic_v2_file(path: Path, width: int = TEXT_WIDTH) -> torch.nn.Sequential:
    """As sac+logos+ava1-l14-linearMSE.pth: keys ``layers.{0,2,4,6,7}``."""
    head = head_layers(width)
    torch.save({f"layers.{key}": value for key, value in head.state_dict().items()}, path)
    return head


def head_layers(width: int, seed: int = 3) -> torch.nn.Sequential:
    linear, dropout = torch.nn.Linear, torch.nn.Dropout
    return spread(
        torch.nn.Sequential(
            linear(width, 32), dropout(0.2), linear(32, 24), dropout(0.2), linear(24, 16), dropout(0.1), linear(16, 8),
            linear(8, 1),
        ),
        seed,
    )  # fmt: skip


def aesthetic_v1_file(path: Path, width: int = TEXT_WIDTH) -> torch.nn.Linear:
    """As sa_0_4_vit_l_14_linear.pth: keys ``weight`` and ``bias``."""
    head = spread(torch.nn.Linear(width, 1), 4)
    torch.save(head.state_dict(), path)
    return head


BLIP_WIDTH, BLIP_INNER, BLIP_LAYERS, BLIP_PATCH, BLIP_VOCABULARY = 128, 96, 2, 8, 60


def imagereward_file(folder: Path, seed: int = 5) -> dict[str, torch.Tensor]:
    """ImageReward.pt's keys: BLIP's as its makers named them, leftovers of pretraining, and the head."""
    generator = seeded(seed)
    state: dict[str, torch.Tensor] = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        state[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator) * 0.2
        state[f"{name}.bias"] = torch.randn(outputs, generator=generator) * 0.1

    def norm(name: str) -> None:
        state[f"{name}.weight"] = 1 + torch.randn(BLIP_WIDTH, generator=generator) * 0.1
        state[f"{name}.bias"] = torch.randn(BLIP_WIDTH, generator=generator) * 0.1

    width, vision, text = BLIP_WIDTH, "blip.visual_encoder", "blip.text_encoder"
    state[f"{vision}.cls_token"] = torch.randn(1, 1, width, generator=generator)
    state[f"{vision}.pos_embed"] = torch.randn(1, 1 + (SIZE // BLIP_PATCH) ** 2, width, generator=generator)
    state[f"{vision}.patch_embed.proj.weight"] = torch.randn(width, 3, BLIP_PATCH, BLIP_PATCH, generator=generator) / 8
    state[f"{vision}.patch_embed.proj.bias"] = torch.randn(width, generator=generator)
    for n in range(BLIP_LAYERS):
        block = f"{vision}.blocks.{n}"
        norm(f"{block}.norm1")
        norm(f"{block}.norm2")
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        linear(f"{block}.mlp.fc1", BLIP_INNER, width)
        linear(f"{block}.mlp.fc2", width, BLIP_INNER)
    norm(f"{vision}.norm")
    state[f"{text}.embeddings.position_ids"] = torch.arange(64)[None]
    state[f"{text}.embeddings.word_embeddings.weight"] = torch.randn(BLIP_VOCABULARY, width, generator=generator)
    state[f"{text}.embeddings.position_embeddings.weight"] = torch.randn(64, width, generator=generator)
    norm(f"{text}.embeddings.LayerNorm")
    for n in range(BLIP_LAYERS):
        layer = f"{text}.encoder.layer.{n}"
        for attention in ("attention", "crossattention"):
            for part in ("query", "key", "value"):
                linear(f"{layer}.{attention}.self.{part}", width, width)
            linear(f"{layer}.{attention}.output.dense", width, width)
            norm(f"{layer}.{attention}.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", BLIP_INNER, width)
        linear(f"{layer}.output.dense", width, BLIP_INNER)
        norm(f"{layer}.output.LayerNorm")
    linear("blip.vision_proj", 8, width)
    linear("blip.text_proj", 8, width)
    state |= {f"mlp.layers.{key}": value for key, value in head_layers(width).state_dict().items()}
    torch.save(state, folder / "ImageReward.pt")
    return state


def bert_folder(folder: Path) -> BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "star", "stars", "two", "long"]
    words += ["prompt", "square", "?", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    tokenizer = BertTokenizer(vocab={word: n for n, word in enumerate(words)}, do_lower_case=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def mps_file(folder: Path, seed: int = 6) -> dict[str, torch.Tensor]:
    """The state dict of MPS's module: CLIP under ``model.``, the blocks as its makers wrapped and named them."""
    generator, dim, heads, head_width, inner = seeded(seed), TEXT_WIDTH, 3, 8, 40
    clip = clip_folder(folder, seed)
    clip.text_model.embeddings.token_embedding.weight.data *= 20  # words unlike one another, so that some are hidden
    clip.save_pretrained(folder)
    state = {f"model.{key}": value for key, value in clip.state_dict().items()}
    state["model.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    for n in range(2):
        first, second = f"cross_model.layers.{n}.0.fn.", f"cross_model.layers.{n}.1.fn."
        shapes = {
            first + "to_q": (heads * head_width, dim),
            first + "to_kv": (2 * head_width, dim),
            first + "to_out": (dim, heads * head_width),
            first + "ff.0": (2 * inner, dim),
            first + "ff.2": (dim, inner),
            second + "fused_attn_ff_proj": (heads * head_width + 2 * head_width + 2 * inner, dim),
            second + "attn_out": (dim, heads * head_width),
            second + "ff_out.1": (dim, inner),
        }
        state |= {f"{key}.weight": torch.randn(shape, generator=generator) * 0.4 for key, shape in shapes.items()}
        for block in (first, second):
            state[block + "norm.weight"] = 1 + torch.randn(dim, generator=generator) * 0.1
            state[block + "norm.bias"] = torch.zeros(dim)
        state[second + "rotary_emb.inv_freq"] = 1.0 / (10000 ** (torch.arange(0, head_width, 2) / head_width))
    torch.save(state, folder / "mps_overall.pt")
    return state


INSTRUCTION = "Judge it.\nPrompt - {text_prompt}\nRating: <|Reward|>\n"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_folder(folder: Path) -> Qwen2VLConfig:
    """Config and processor of a small Qwen2-VL whose words are bytes."""
    letters = list(bytes_to_unicode().values())
    tokenizer = Qwen2Tokenizer(
        vocab={letter: n for n, letter in enumerate(letters)}, merges=[], pad_token="<|endoftext|>"
    )
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_tokens(["<|endoftext|>", *special], special_tokens=True)
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end", "image_pad")}
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": len(tokenizer) + 40,  # padded, as Qwen's is
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "max_position_embeddings": 2048,
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=ids["image_pad"],
        video_token_id=ids["image_pad"] + 1,
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    config.save_pretrained(folder)
    return config


def hpsv3_file(folder: Path, *, old_keys: bool, seed: int = 7) -> tuple[Qwen2VLModel, torch.nn.Sequential]:
    """As HPSv3.safetensors: network, unused ``lm_head``, ``rm_head``; embeddings cut to the tokenizer's size."""
    config = qwen_folder(folder)
    rows = config.text_config.vocab_size - 40 + 1
    config.text_config.vocab_size = rows
    model = spread(Qwen2VLModel(config), seed)
    linear = torch.nn.Linear
    head = torch.nn.Sequential(
        linear(32, 24), torch.nn.ReLU(), torch.nn.Dropout(0.05), linear(24, 16), torch.nn.ReLU(), linear(16, 2)
    )
    spread(head, seed + 1)
    state = {}
    for key, value in model.state_dict().items():
        if old_keys:
            key = key if key.startswith("visual.") else "model." + key.removeprefix("language_model.")
        else:
            key = f"model.{key}"
        state[key] = value.contiguous()
    state["lm_head.weight"] = torch.zeros(rows, 32)
    state |= {f"rm_head.{key}": value for key, value in head.state_dict().items()}
    save_file(state, folder / "HPSv3.safetensors")
    return model, head


def clip_flant5_folder(folder: Path, seed: int = 14, *, tower: bool = True) -> dict[str, torch.Tensor]:
    """As clip-flant5-xl: T5's keys, ``mm_projector`` and, with ``tower``, the picture tower, in two pickled shards.

    ``folder/vision`` is the CLIP that its config names, with other weights than ``tower``, as fine-tuning leaves them.
    """
    tokenizer = tiny_t5_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer) + 28,  # padded, as Flan-T5's is
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=SIZE, patch_size=8
    )
    named = spread(CLIPVisionModel(vision), seed + 1)
    named.save_pretrained(folder / "vision")
    crop = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    CLIPImageProcessorPil(**crop).save_pretrained(folder / "vision")
    state = spread(T5ForConditionalGeneration(config), seed).state_dict()
    state["lm_head.weight"] = torch.randn(config.vocab_size, 24, generator=seeded(seed)) * 0.3  # untied, as Flan-T5's
    projector = spread(torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.GELU(), torch.nn.Linear(24, 24)), seed)
    state |= {f"mm_projector.{key}": value for key, value in projector.state_dict().items()}
    state["embed_tokens.weight"] = state["shared.weight"]
    if tower:
        tuned = spread(CLIPVisionModel(vision), seed + 2).state_dict()
        state |= {f"vision_tower.vision_tower.vision_model.{key}": value for key, value in tuned.items()}
        state["vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    parts = {"encoder": "pytorch_model-00001-of-00002.bin", "": "pytorch_model-00002-of-00002.bin"}
    place = {key: parts["encoder" if key.startswith("encoder.") else ""] for key in state}
    for name in parts.values():
        torch.save({key: value for key, value in state.items() if place[key] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    own = {"model_type": "clip_t5", "architectures": ["CLIPT5ForConditionalGeneration"], "mm_hidden_size": 32}
    own |= {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    own |= {"mm_vision_tower": str(folder / "vision"), "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config.to_dict() | own))
    tokenizer.save_pretrained(folder)
    return state
