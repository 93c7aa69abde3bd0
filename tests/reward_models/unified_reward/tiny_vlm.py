"""Real vision-language models at toy size, saved as checkpoints: true classes, a byte tokenizer, a chat template."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

SPECIAL = [
    "<|pad|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE_HERE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Single bytes, and a few whole words that answers are made of."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|im_end|>", model_max_length=4096
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.add_tokens(
        [
            "Image",
            " is",
            " better",
            "Both",
            " images",
            " are",
            " equally",
            " good",
            "Yes",
            "No",
            "Final Score",
            "rate",
            "red",
        ]
    )
    return tokenizer


def tiny_qwen2_vl(seed: int = 0) -> tuple[Qwen2VLForConditionalGeneration, Qwen2VLProcessor]:
    tokenizer = tiny_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(
                text_config={
                    **TEXT,
                    "vocab_size": len(tokenizer),
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
                    "bos_token_id": None,
                    "eos_token_id": ids["<|im_end|>"],
                    "pad_token_id": ids["<|pad|>"],
                },
                vision_config={
                    "depth": 1,
                    "embed_dim": 32,
                    "hidden_size": 32,
                    "num_heads": 2,
                    "mlp_ratio": 2,
                    "patch_size": 4,
                },
                image_token_id=ids["<|image_pad|>"],
                video_token_id=ids["<|video_pad|>"],
                vision_start_token_id=ids["<|vision_start|>"],
                vision_end_token_id=ids["<|vision_end|>"],
            )
        )
    size = {"shortest_edge": 64, "longest_edge": 1024}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(patch_size=4, size=size),
        tokenizer,
        Qwen2VLVideoProcessor(patch_size=4, size=size),
        chat_template=CHAT_TEMPLATE.replace("IMAGE_HERE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return model.eval(), processor


def tiny_llava_onevision(seed: int = 0) -> tuple[LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor]:
    tokenizer = tiny_tokenizer()
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    size = {"height": 16, "width": 16}
    pinpoints = [[16, 16], [16, 32], [32, 16], [32, 32]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaOnevisionForConditionalGeneration(
            LlavaOnevisionConfig(
                text_config={
                    **TEXT,
                    "model_type": "qwen2",
                    "vocab_size": len(tokenizer),
                    "eos_token_id": ids["<|im_end|>"],
                    "pad_token_id": ids["<|pad|>"],
                },
                vision_config={
                    "model_type": "siglip_vision_model",
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": 16,
                    "patch_size": 8,
                    "vision_use_head": False,
                },
                image_token_id=ids["<|image_pad|>"],
                video_token_id=ids["<|video_pad|>"],
                image_grid_pinpoints=pinpoints,
                vision_feature_select_strategy="full",
            )
        )
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        chat_template=CHAT_TEMPLATE.replace("IMAGE_HERE", "<|image_pad|>"),
    )
    return model.eval(), processor


def teach(model: torch.nn.Module, processor, lessons: list[tuple[list[Image.Image], str, str]]) -> None:
    """Train until the model answers as told: lessons are (pictures, question, answer)."""
    end = processor.tokenizer.eos_token
    texts = []
    for pictures, question, answer in lessons:
        content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": question}]
        turn = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(turn, add_generation_prompt=True) + answer + end)
    processor.tokenizer.padding_side = "left"
    inputs = processor(
        text=texts,
        images=[pictures for pictures, _, _ in lessons],
        padding=True,
        add_special_tokens=False,
        return_tensors="pt",
    )
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (_, _, answer) in enumerate(lessons):
        length = len(processor.tokenizer.encode(answer + end, add_special_tokens=False))
        labels[row, -length:] = inputs["input_ids"][row, -length:]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(300):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        if loss < 0.03:
            break
    model.eval()


def save(folder: Path, model: torch.nn.Module, processor) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
