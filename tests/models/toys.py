"""One tiny model per architecture: the class that carries its output head, and a configuration."""

import torch
import transformers
from transformers import AutoConfig
from transformers.utils import logging

from tenfold.models.invariances.residual_rotation import helmert

logging.set_verbosity_error()
logging.disable_progress_bar()

SMALL = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BLOCKS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SMALL, **BLOCKS, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT = {**SMALL, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
ENCODER = {**SMALL, **BLOCKS, "max_position_embeddings": 64}
T5 = {**SMALL, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
OPT = {**ENCODER, "ffn_dim": 48}
GEMMA = {**GROUPED, "head_dim": 8, "sliding_window": 16}
IMAGES = {"boi_token_index": 94, "eoi_token_index": 95, "image_token_index": 96, "mm_tokens_per_image": 4}
VISION = {**BLOCKS, "hidden_size": 16, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
ALBERT = {**ENCODER, "embedding_size": 16}
MOE = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
OWN_HEAD, TIED_HEAD = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}

# name -> class, model_type, configuration
TOYS: dict[str, tuple[str, str, dict]] = {
    "gpt2": ("GPT2LMHeadModel", "gpt2", GPT),
    "gpt2-untied": ("GPT2LMHeadModel", "gpt2", {**GPT, **OWN_HEAD}),
    "openai-gpt": ("OpenAIGPTLMHeadModel", "openai-gpt", GPT),
    "gpt_neox": ("GPTNeoXForCausalLM", "gpt_neox", ENCODER),
    "gpt_neox-tied": ("GPTNeoXForCausalLM", "gpt_neox", {**ENCODER, **TIED_HEAD}),
    "opt": ("OPTForCausalLM", "opt", OPT),
    "opt-projected": ("OPTForCausalLM", "opt", {**OPT, "word_embed_proj_dim": 16}),
    "llama": ("LlamaForCausalLM", "llama", GROUPED),
    "llama-tied": ("LlamaForCausalLM", "llama", {**GROUPED, **TIED_HEAD}),
    "mistral": ("MistralForCausalLM", "mistral", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", {**GROUPED, "head_dim": 16, **TIED_HEAD}),
    "gemma3_text": ("Gemma3ForCausalLM", "gemma3_text", GEMMA),
    "gemma3": ("Gemma3ForConditionalGeneration", "gemma3", {**IMAGES, "text_config": GEMMA, "vision_config": VISION}),
    "phi": ("PhiForCausalLM", "phi", GROUPED),
    "bert": ("BertForMaskedLM", "bert", ENCODER),
    "roberta": ("RobertaForMaskedLM", "roberta", ENCODER),
    "albert": ("AlbertForMaskedLM", "albert", ALBERT),
    "albert-groups": ("AlbertForMaskedLM", "albert", {**ALBERT, "num_hidden_layers": 4, "num_hidden_groups": 2}),
    "t5": ("T5ForConditionalGeneration", "t5", T5),
    "t5-gated": ("T5ForConditionalGeneration", "t5", {**T5, "feed_forward_proj": "gated-gelu", **OWN_HEAD}),
}

# with a mixture of experts in their MLPs
EXPERTS: dict[str, tuple[str, str, dict]] = {
    "mixtral": ("MixtralForCausalLM", "mixtral", {**GROUPED, "num_local_experts": 4}),
    "olmoe": ("OlmoeForCausalLM", "olmoe", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "qwen2_moe", {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "qwen3_moe", {**MOE, "num_experts": 4, "head_dim": 8, "mlp_only_layers": [0]}),
}


def config(name: str, **changes):
    _, kind, settings = (TOYS | EXPERTS)[name]
    return AutoConfig.for_model(kind, **settings | changes)


def build(name: str, seed: int = 0, **changes) -> transformers.PreTrainedModel:
    """The toy ``name`` with random weights whose biases and norms are random too, ready to evaluate."""
    torch.manual_seed(seed)
    model = getattr(transformers, (TOYS | EXPERTS)[name][0])(config(name), **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def inputs(model) -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 27).reshape(2, 12)
    return {"input_ids": ids} | ({"decoder_input_ids": ids + 30} if model.config.is_encoder_decoder else {})


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """What ``model`` makes of a fixed input: logits, or hidden states where it has no head."""
    return model(**inputs(model))[0]


def rotation(width: int, keeps_ones: bool = False) -> torch.Tensor:
    """Return a random rotation, with ``Q 1 = 1`` if ``keeps_ones``."""
    if not keeps_ones:
        return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]
    basis = helmert(width)
    return torch.full((width, width), 1 / width).double() + basis @ rotation(width - 1) @ basis.T


@torch.no_grad()
def shake(model):
    """Return ``model`` with norms and biases far from one and from zero, ready to evaluate."""
    for name, parameter in model.named_parameters():
        if "norm" in name.lower() or ".ln_" in name:
            parameter.uniform_(-0.6, 0.6) if name.endswith("bias") else parameter.uniform_(0.5, 2.0)
        elif name.endswith("bias"):
            parameter.uniform_(-0.3, 0.3)
    return model.eval()


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_untouched(model, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], value) for name, value in before.items())
