"""A tokenizer of ours as `transformers` opens it: the same file, and what its classes want to know of special tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_pretrain.core.vocabulary import BEGIN
from ds_pretrain.data.tokenizer import ALIASES, TextTokenizer
from ds_pretrain.interop.sentencepiece import converted
from ds_pretrain.objectives import Objective

NAMED = {
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "eos_token": "<eod>",
    "cls_token": "<cls>",
    "sep_token": "<sep>",
    "mask_token": "<mask>",
}
"""Their names and ours."""


def special_ids(tokenizer: TextTokenizer, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of config.json and generation_config.json. generation: of the model that came in, which may end a text in
    several ways. Where nothing but <eod> could pad there is no padding: its row of the embedding would not be trained."""
    vocab = tokenizer.vocabulary
    ends = vocab.ends(generation.get("eos_token_id"))
    padding = {"pad_token_id": vocab.pad} if vocab.pad != vocab.eod else {}
    return {"bos_token_id": vocab.begin, "eos_token_id": ends if len(ends) > 1 else ends[0], **padding}


def save_tokenizer(tokenizer: TextTokenizer, objective: Objective, folder: Path, more: Mapping[str, Any]) -> None:
    """Write the tokenizer's own file, tokenizer.json where that is another, and tokenizer_config.json; for an encoder with
    [CLS] and [SEP] put around a text, or its end behind it, as it was trained; for LLaMA with <s> before it. more: further
    fields of the latter."""
    (folder / tokenizer.file).write_bytes(tokenizer.model)
    known = tokenizer.model if tokenizer.file == "tokenizer.json" else converted(tokenizer.model).to_str().encode()
    ids = tokenizer.specials
    found = {theirs: (tokenizer.spelling(ids[ours]), ours) for theirs, ours in NAMED.items()}
    real = {theirs: name for theirs, (name, ours) in found.items() if name in (ours, *ALIASES[ours])}  # no stand-ins
    begin = tokenizer.spelling(tokenizer.vocabulary.begin)
    names = {**real, "eos_token": found["eos_token"][0], "bos_token": begin}
    content = json.loads(known)
    content["added_tokens"] += [_added(name, i) for name, i in tokenizer.appended.items()]
    if objective.kind == "full" and objective.framed:
        content["post_processor"] = _template(tokenizer, ["<cls>"], ("<sep>", 0), ["<sep>"])
    elif objective.kind == "full":
        content["post_processor"] = _template(tokenizer, [], ("<eod>", 0), ["<eod>"])
    elif tokenizer.file == "tokenizer.model" and BEGIN in ids:
        content["post_processor"] = _template(tokenizer, [BEGIN], (BEGIN, 1), [])
    same = content == json.loads(known)  # then byte for byte: it is known by its digest
    (folder / "tokenizer.json").write_bytes(known if same else json.dumps(content, ensure_ascii=False).encode())
    config: dict[str, object] = {**names, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if objective.kind == "full":
        config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    config |= more
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _added(name: str, token: int) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": name, **flags, "special": True}


def _template(
    tokenizer: TextTokenizer, before: Sequence[str], between: tuple[str, int], after: Sequence[str]
) -> dict[str, object]:
    """Special tokens, by our names, around a text A, and around and between texts A and B, as the tokenizers library writes it.
    between: with its kind, that of the text it belongs to."""
    ids = tokenizer.specials
    spelled = {name: tokenizer.spelling(ids[name]) for name in (*before, between[0], *after)}

    def special(names: Sequence[str], kind: int) -> list[dict[str, object]]:
        return [{"SpecialToken": {"id": spelled[name], "type_id": kind}} for name in names]

    first: list[dict[str, object]] = [*special(before, 0), {"Sequence": {"id": "A", "type_id": 0}}]
    second: list[dict[str, object]] = [*special([between[0]], between[1]), {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": [*first, *special(after, 0)],
        "pair": [*first, *second, *special(after, 1)],
        "special_tokens": {name: {"id": name, "ids": [ids[ours]], "tokens": [name]} for ours, name in spelled.items()},
    }
