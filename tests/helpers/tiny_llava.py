"""A tiny random LLaVA, images for it, and prompts with them."""

from __future__ import annotations

from functools import cache
from typing import Any

import tiny_models
import torch
import transformers
from torch import Tensor

#: The id of a feature's token, and how many features an image has.
IMAGE, FEATURES = 127, 16


@cache
def model() -> Any:
    torch.manual_seed(0)
    text = tiny_models.build("llama").config
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=FEATURES
    )
    made = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in made.model.language_model.parameters():
            if weight.ndim > 1:
                weight.mul_(6)
    return made


@cache
def pixels() -> Tensor:
    """(3, 3, 56, 56): three images."""
    return torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(2))


def prompt(images: int, after: int, seed: int) -> list[int]:
    """Token ids: three of text, then each image with two behind it, then `after` random ones."""
    made = torch.Generator().manual_seed(seed)
    words = torch.randint(2, 120, (after,), generator=made).tolist()
    return [1, 5, 6, *([IMAGE] * FEATURES + [9, 8]) * images, *words]


def processor() -> Any:
    """Of the tiny model: "<image>" stands for an image's tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(126)} | {"<unk>": 126, "<image>": IMAGE}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<image>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="w0")
    size = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    return transformers.LlavaProcessor(
        image_processor=kind(**size), tokenizer=fast, patch_size=14, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
