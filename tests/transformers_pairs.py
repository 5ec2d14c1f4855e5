"""Tiny image-text models of transformers, with random weights and a tokenizer of a few letters."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def saved(family: str, folder: Path) -> tuple[Any, Any]:
    """Save a model with its processor; return both."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3, "a": 4, "b": 5, "c": 6}
    raw = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 7, "max_position_embeddings": 8, "pad_token_id": 0, "bos_token_id": 1}
    text["eos_token_id"] = 2
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    size = {"height": 32, "width": 32}
    if family == "clip":
        both = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        model = transformers.CLIPModel(both)
        images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
        processor = transformers.CLIPProcessor(images, tokenizer)
    else:
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
        images = transformers.SiglipImageProcessor(size=size)
        processor = transformers.SiglipProcessor(images, tokenizer)
    model = model.eval()
    model.save_pretrained(folder)
    images.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, processor
