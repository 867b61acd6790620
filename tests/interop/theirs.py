"""Models of `transformers`, small and random, every family with its variants."""

import torch
import transformers

VOCAB = 1001
GPT2 = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 4}
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 32,
}
LLAMA = {**COMMON, "num_key_value_heads": 2}
OWN = {"embedding_size": 48, "num_hidden_groups": 2}
MODELS = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2 untied, inner width, exact gelu": (
        "GPT2LMHeadModel",
        {**GPT2, "tie_word_embeddings": False, "n_inner": 72, "activation_function": "gelu"},
    ),
    "llama grouped": ("LlamaForCausalLM", LLAMA),
    "llama tied, one key head, long wavelengths": (
        "LlamaForCausalLM",
        {
            **COMMON,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "rms_norm_eps": 1e-3,
        },
    ),
    "llama with biases": ("LlamaForCausalLM", {**COMMON, "attention_bias": True, "mlp_bias": True}),
    "bert": ("BertForMaskedLM", COMMON),
    "bert untied, tanh gelu": (
        "BertForMaskedLM",
        {**COMMON, "tie_word_embeddings": False, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
    ),
    "bert without a head": ("BertModel", COMMON),
    "bert with a pair head": ("BertForPreTraining", COMMON),
    "bert with a pair head alone": ("BertForNextSentencePrediction", COMMON),
    "albert with its order head": ("AlbertForPreTraining", {**COMMON, **OWN}),
    "electra": ("ElectraForPreTraining", {**COMMON, "embedding_size": 48}),
}
GENERATOR = {**COMMON, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 40, "embedding_size": 48}


def make(name, dtype=torch.float32):
    """The model, in eval mode; of ELECTRA the discriminator."""
    architecture, fields = MODELS[name]
    return _random(architecture, fields, 3).to(dtype).eval()


def make_generator(discriminator):
    """A generator that shares the discriminator's embeddings."""
    generator = _random("ElectraForMaskedLM", GENERATOR, 4)
    generator.electra.embeddings.load_state_dict(discriminator.electra.embeddings.state_dict())
    return generator.to(discriminator.dtype).eval()


def _random(architecture, fields, seed):
    """Every parameter is random, biases and norms too, and large enough to be told apart."""
    cls = getattr(transformers, architecture)
    model = cls(cls.config_class(**fields, attn_implementation="eager"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.13, generator=generator)
        if hasattr(model, "albert"):
            mapping = model.albert.encoder.embedding_hidden_mapping_in
            mapping.weight.copy_(torch.eye(48))
            mapping.bias.zero_()
        if architecture.startswith("Bert") and not model.config.tie_word_embeddings:
            model.cls.predictions.bias.copy_(model.cls.predictions.decoder.bias)  # the idle one
    return model


def save(name, folder, dtype=torch.float32, **options):
    """The model in a folder, ELECTRA's two in two; returns it."""
    model = make(name, dtype)
    if name != "electra":
        model.save_pretrained(folder, **options)
        return model
    model.save_pretrained(folder / "discriminator", **options)
    make_generator(model).save_pretrained(folder / "generator", **options)
    return model
