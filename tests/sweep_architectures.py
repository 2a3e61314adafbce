"""Compares rewards of a tiny model of every architecture with those of Transformers' own class.

    python tests/sweep_architectures.py [--only NAME ...]

Architectures: all that AutoModelForSequenceClassification knows, some that it does not, models that
also see, and variants. Each gets random weights, is saved by Transformers and read by this project;
rewards of packed sequences are compared with those of each sequence alone. Then this project saves
it, and both read it. Takes two minutes on one core.

Prints a line for each: right, refused with which line, WRONG (rewards differ by 1e-4 of their
deviation), ERROR (not a CritiqueRMError) or not built (by Transformers itself); then counts.
Exits with 1 if any is WRONG or an ERROR.
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto as auto

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import critique_rm as rm  # noqa: E402

CPU, N_TOKENS, END, TOLERANCE = torch.device("cpu"), 304, 2, 1e-4
ALPHABET = ["<pad>", "<begin>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
CLASSIFIERS = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
SEEING = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
CLASSES = {**auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **SEEING, **CLASSIFIERS}  # the last counts

SIZES = {  # of these a config takes what it has
    **{"vocab_size": N_TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3},
    **{"max_position_embeddings": 256, "sliding_window": 6, "num_labels": 1, "pad_token_id": 0},
    **{"bos_token_id": 1, "eos_token_id": END, "num_experts": 4, "num_local_experts": 4},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1},
    **{"shared_expert_intermediate_size": 16, "first_k_dense_replace": 1, "topk_group": 1},
    **{"kv_lora_rank": 8, "q_lora_rank": 8, "v_head_dim": 8, "qk_rope_head_dim": 8},
    **{"qk_nope_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
HEADS = {"num_key_value_heads": 4}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
HYBRID = {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3}
ROPE = {"rope_theta": 100.0, "factor": 4.0, "rope_type": "default", "mrope_section": [2, 1, 1]}
MROPE = {"rope_parameters": ROPE}
BOTH_ROPES = {"rope_parameters": dict.fromkeys(WINDOWS["layer_types"], ROPE)}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LONG = {"rope_parameters": ROPE | LONG}
DYNAMIC = {"rope_parameters": ROPE | {"rope_type": "dynamic"}}
EXCEPTIONS = {  # what a type of model needs to be that small
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "minicpm3", "mistral4"), HEADS),
    **dict.fromkeys(("gemma2", "gemma3_text", "exaone4", "olmo3", "modernbert-decoder"), WINDOWS),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "minimax"), LINEAR),
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"), MROPE),
    **dict.fromkeys(("zamba", "zamba2"), HYBRID),
    "axk2": HEADS | {"index_topk": 64, "index_head_dim": 16, "index_n_heads": 2},
    "cohere_compass_text": WINDOWS | BOTH_ROPES,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "gptj": {"rotary_dim": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
    "t5": {"decoder_start_token_id": 0},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
VARIANTS = {  # "type, what is special": changes
    "axk1, dense": {"mlp_layer_types": ["dense"] * 2},
    "bloom, post": {"apply_residual_connection_post_layernorm": True},
    "deepseek_v3, dense": {"first_k_dense_replace": 2},
    "doge, experts": {"is_moe": True},
    "doge, picks keys": {"keep_window_size": 4},
    "falcon, alibi": {"alibi": True},
    "falcon, new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma2, window 2": {"sliding_window": 2},
    "gemma3, whole": {"architectures": ["Gemma3ForConditionalGeneration"]},
    "gemma3_text, both ways": {"use_bidirectional_attention": True},
    "gpt2, scaled": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "gpt_bigcode, many heads": {"multi_query": False},
    "jamba, one expert": {"num_experts": 1, "num_local_experts": 1},
    "llama, dynamic": DYNAMIC | {"max_position_embeddings": 16},
    "llama, linear": {"rope_parameters": ROPE | {"rope_type": "linear"}},
    "llama, wide heads": {"head_dim": 16, "attention_bias": True, "mlp_bias": True},
    "mistral, no window": {"sliding_window": None},
    "mixtral, noise": {"router_jitter_noise": 0.1},
    "mpt, no alibi": {"attn_config": {"alibi": False}},
    "opt, layerdrop": {"layerdrop": 0.9},
    "opt, narrow": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "phi3, longrope": LONG | {"original_max_position_embeddings": 16},
    "phi3, still short": LONG | {"original_max_position_embeddings": 64},
    "qwen2, window": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3_5, whole": {"architectures": ["Qwen3_5ForConditionalGeneration"]},
    "smollm3, no rope": {"no_rope_layers": [0, 1]},
    "stablelm, parallel": {"use_parallel_residual": True, "qk_layernorm": True},
}
OTHERS = """
    mistral3 llava llava_onevision paligemma idefics3 internvl qwen2_vl qwen2_5_vl qwen3_vl mllama
    qwen3_5_moe granite cohere2 gemma4 mamba
""".split()
AS_IN_MEMORY = ", as in memory"  # experts in one tensor; in most files each has one of its own
WITH_EXPERTS = """
    axk1 axk2 deepseek_v2 deepseek_v3 hunyuan_v1_moe jamba minimax mixtral phimoe qwen2_moe
    qwen3_moe qwen3_next
""".split()
CASES = {kind: {} for kind in (*CLASSIFIERS, *OTHERS)} | VARIANTS
CASES |= {kind + AS_IN_MEMORY: {} for kind in WITH_EXPERTS}
CASES |= {
    "axk2, picks keys" + AS_IN_MEMORY: {"index_topk": 4},
    "mixtral, noise" + AS_IN_MEMORY: VARIANTS["mixtral, noise"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME", default=CASES)
    transformers.logging.set_verbosity_error()
    counts: Counter[str] = Counter()
    for name in parser.parse_args().only:
        outcome = sweep(name)
        counts[outcome.partition(":")[0]] += 1
        print(f"{name:36} {outcome}", flush=True)
    for outcome, n in counts.most_common():
        print(f"{n:4} {outcome}")
    return int(counts["WRONG"] + counts["ERROR"] > 0)


def sweep(name: str) -> str:
    """The outcome of one case."""
    groups = random_groups()
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = tiny_config(name.partition(",")[0], CASES[name])
            save_tiny(config, Path(folder), not name.endswith(AS_IN_MEMORY))
            expected = rewards_alone(Path(folder), sum(groups, []))
            assert expected.std() > 1e-3, "its rewards are all the same"
        except Exception as error:  # of many kinds
            return f"not built: {first_line(error)}"
        try:
            return compare(Path(folder), groups, expected)
        except rm.CritiqueRMError as error:
            return f"refused: {error}".replace(folder, "FOLDER")
        except Exception as error:
            return f"ERROR: {first_line(error)}"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def tiny_config(kind: str, changes: dict) -> PreTrainedConfig:
    """A small config of a type of model, its parts included."""
    made = transformers.CONFIG_MAPPING[kind]
    names = {*made.__dataclass_fields__, *made.attribute_map, "num_labels"}
    settings = {name: value for name, value in SIZES.items() if name in names}
    for name in made.sub_configs:
        part = getattr(made(), name, None)
        if part is not None and part.model_type in transformers.CONFIG_MAPPING:
            settings[name] = tiny_config(part.model_type, {})
    settings["architectures"] = [CLASSES.get(kind)]
    return made(**(settings | EXCEPTIONS.get(kind, {}) | changes))


def save_tiny(config: PreTrainedConfig, folder: Path, as_published: bool) -> None:
    """Saves a classifier, or another model with the weights of a reward head beside its own."""
    torch.manual_seed(0)
    model = getattr(transformers, config.architectures[0])(config)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():  # biases, norms and others that begin as 0 or 1
                value += 0.1 * torch.randn_like(value)
    model.save_pretrained(folder, save_original_format=as_published)
    if not is_classifier(config):
        path = folder / "model.safetensors"
        head = {"score.weight": torch.randn(1, SIZES["hidden_size"])}
        save_file(load_file(path) | head, path, metadata={"format": "pt"})


def is_classifier(config: PreTrainedConfig) -> bool:
    return config.architectures[0].endswith("ForSequenceClassification")


@torch.no_grad()
def rewards_alone(folder: Path, sequences: list[np.ndarray]) -> np.ndarray:
    """Rewards from Transformers' own class, sequence by sequence."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()
    batches = [torch.from_numpy(sequence.astype(np.int64))[None] for sequence in sequences]
    if is_classifier(config):
        return np.array([model(input_ids=ids).logits[0, 0].item() for ids in batches])
    trunk, head = model.base_model, load_file(folder / "model.safetensors")["score.weight"][0]
    return np.array([(trunk(input_ids=i).last_hidden_state[0, -1] @ head).item() for i in batches])


def random_groups() -> list[list[np.ndarray]]:
    """Groups of sequences: a prompt, two responses to it, some critiques of each, the end."""
    rng, groups = np.random.default_rng(0), []
    for n_critiques in (1, 2, 4, 8):
        prompt, *answers = (rng.integers(3, N_TOKENS, n) for n in rng.integers(4, 12, 3))
        group = []
        for answer in answers * n_critiques:
            critique = rng.integers(3, N_TOKENS, rng.integers(1, 9))
            group.append(np.concatenate([prompt, answer, critique, [END]]).astype(np.int32))
        groups.append(group)
    return groups


def compare(folder: Path, groups: list[list[np.ndarray]], expected: np.ndarray) -> str:
    """Reads a model, computes, saves it and has it read again: what came of it."""
    config, encoder = rm.load_config(str(folder)), make_encoder()
    rm.choose_pad_token(config, encoder)
    config.critique_rm = {"critiques": True, "max_length_tokens": 200}
    model = rm.build_model(config, torch.float32, rm.start_processes()[1])
    rm.read_weights(model, str(folder), CPU)
    found = {}
    found["read"], share_prefixes = rewards_together(model.eval(), groups)  # there must be no dropout
    saved = folder / "saved"
    saved.mkdir()
    rm.save_model(model, encoder, saved, "card")
    again, _ = rm.load_reward_model(str(saved))
    found["saved and read"] = np.array(sum(rm.score_groups(again, groups, 200), []))
    found["saved and read by Transformers"] = rewards_alone(saved, sum(groups, []))
    layout = "shared prefixes" if share_prefixes else "one sequence a row"
    wrong = []
    for how, rewards in found.items():
        difference = np.abs(rewards - expected).max() / expected.std()
        if not difference < TOLERANCE:
            wrong.append(f"{difference:.2g} when {how}")
    return f"WRONG: {', '.join(wrong)}, {layout}" if wrong else f"right, {layout}"


def make_encoder() -> rm.Encoder:
    """With a token for each byte."""
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(ALPHABET)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = {"pad_token": "<pad>", "bos_token": "<begin>", "eos_token": "<end>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    return rm.Encoder(tokenizer, 200, use_critiques=True)


@torch.no_grad()
def rewards_together(
    model: PreTrainedModel, groups: list[list[np.ndarray]]
) -> tuple[np.ndarray, bool]:
    """Rewards from one batch, and whether it held tries: then two are in its first row."""
    share_prefixes = rm.shares_prefixes(model, max(len(s) for group in groups for s in group))
    tries, n = [], 0
    for group in groups:
        tries += rm.build_tries(group, range(n, n + len(group)), share_prefixes)
        n += len(group)
    rows = [tries[:2], *([trie] for trie in tries[2:])] if share_prefixes else [[trie] for trie in tries]
    batch = rm.collate(rows, CPU)
    return rm.compute_rewards(model, batch, share_prefixes)[batch.owners.argsort()].numpy(), share_prefixes


if __name__ == "__main__":
    sys.exit(main())
