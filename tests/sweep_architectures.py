"""Compares rewards of a tiny model of every architecture with those of Transformers' own class.

    python tests/sweep_architectures.py [--only NAME ...]

The architectures are all that AutoModelForSequenceClassification knows, text parts of models that
also see, and variants whose settings depend on the length or mix kinds of layers. Each is made with
random weights, saved by Transformers and read by this project, and rewards of packed sequences are
compared with those of each sequence alone; then it is saved by this project and read by both.

Prints a line for each: right, refused with what line, WRONG (rewards differ by 1e-4 of their
deviation), ERROR (of another kind than CritiqueRMError) or not built (by Transformers); at last
counts. Exits with 1 if any is WRONG or an ERROR. Takes minutes on one core.
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
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import critique_rm as rm  # noqa: E402

CLASSES = {  # the class to make of each type of config; the last that knows it
    **modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    **modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
CPU, N_TOKENS, END, TOLERANCE = torch.device("cpu"), 304, 2, 1e-4
SIZES = {  # of these, a config takes what it has
    **{"vocab_size": N_TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3},
    **{"max_position_embeddings": 256, "sliding_window": 6, "num_labels": 1},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "first_k_dense_replace": 1},
    **{"n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
SAME_HEADS = {"num_key_value_heads": 4}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
EXCEPTIONS: dict[str, dict] = {  # of a type of model: what it needs to be that small
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "minicpm3", "mistral4"), SAME_HEADS),
    **dict.fromkeys(("gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "cohere2"), WINDOWS),
    **dict.fromkeys(("exaone4", "olmo3", "modernbert-decoder", "cohere_compass_text"), WINDOWS),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "minimax"), LINEAR),
    "axk2": SAME_HEADS | {"index_topk": 64, "index_head_dim": 16, "index_n_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "gptj": {"rotary_dim": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
}
VARIANTS: dict[str, tuple[str, dict]] = {  # name: (type, changes)
    "llama, dynamic rope": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONGROPE}),
    "falcon, alibi": ("falcon", {"alibi": True}),
}
VARIANTS |= {name: (name, {}) for name in "mistral3 llava qwen2_5_vl granite mamba".split()}


def tiny_config(kind: str, changes: dict) -> PreTrainedConfig:
    """A small config of a type of model, and of its parts."""
    made = transformers.CONFIG_MAPPING[kind]
    names = {*made.__dataclass_fields__, *made.attribute_map, "num_labels"}
    settings = {name: value for name, value in SIZES.items() if name in names}
    for name in made.sub_configs:
        part = getattr(made(), name, None)
        if part is not None and part.model_type in transformers.CONFIG_MAPPING:
            settings[name] = tiny_config(part.model_type, {})
    settings |= EXCEPTIONS.get(kind, {})
    return made(**({"architectures": [CLASSES.get(kind)]} | settings | changes))


def save_tiny(config: PreTrainedConfig, folder: Path) -> None:
    """Saves a classifier, or a model of a type that has none with a reward head beside it."""
    torch.manual_seed(0)
    model = getattr(transformers, config.architectures[0])(config)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():  # none is to be 0 or 1
                value += 0.1 * torch.randn_like(value)
    model.save_pretrained(folder)
    if not is_classifier(config):
        path = folder / "model.safetensors"
        head = torch.randn(1, SIZES["hidden_size"])
        save_file(load_file(path) | {"score.weight": head}, path, metadata={"format": "pt"})


def is_classifier(config: PreTrainedConfig) -> bool:
    return config.architectures[0].endswith("ForSequenceClassification")


@torch.no_grad()
def rewards_of_transformers(folder: Path, sequences: list[np.ndarray]) -> np.ndarray:
    """Rewards from Transformers' own class, sequence by sequence."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()
    batches = [torch.from_numpy(sequence.astype(np.int64))[None] for sequence in sequences]
    if is_classifier(config):
        return np.array([model(input_ids=ids).logits[0, 0].item() for ids in batches])
    trunk = model.base_model
    head = load_file(folder / "model.safetensors")["score.weight"][0]
    return np.array([(trunk(input_ids=i).last_hidden_state[0, -1] @ head).item() for i in batches])


def random_groups() -> list[list[np.ndarray]]:
    """Groups of sequences that share a prompt, and within it the responses."""
    rng, groups = np.random.default_rng(0), []
    for n_critiques in (1, 2, 4, 1):
        prompt, *answers = (rng.integers(3, N_TOKENS - 4, n) for n in rng.integers(4, 12, 3))
        groups.append([])
        for answer in [*answers] * n_critiques:
            critique = rng.integers(3, N_TOKENS - 4, rng.integers(1, 9))
            groups[-1].append(np.concatenate([prompt, answer, critique, [END]]).astype(np.int32))
    return groups


@torch.no_grad()
def rewards_together(model: transformers.PreTrainedModel, groups: list) -> tuple[np.ndarray, bool]:
    """Rewards from one batch, and whether prefixes were shared: two tries are then in a row."""
    share = rm.shares_prefixes(model, max(len(s) for group in groups for s in group))
    tries, n = [], 0
    for group in groups:
        tries += rm.build_tries(group, range(n, n + len(group)), share)
        n += len(group)
    rows = [tries[:2], *([trie] for trie in tries[2:])] if share else [[trie] for trie in tries]
    batch = rm.collate(rows, CPU)
    return rm.compute_rewards(model, batch, share)[batch.numbers.argsort()].numpy(), share


def make_encoder(config: PreTrainedConfig) -> rm.Encoder:
    """A tokenizer of bytes."""
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(ALPHABET)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder = rm.Encoder(
        PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>"),
        200,
        use_critiques=True,
    )
    rm.choose_pad_token(config, encoder)
    return encoder


ALPHABET = ["<pad>", "<begin>", "<end>"] + sorted(pre_tokenizers.ByteLevel.alphabet())


def compare(folder: Path, groups: list, expected: np.ndarray) -> str:
    """Reads the model, computes, saves it, reads it again; what came out."""
    sequences = sum(groups, [])

    def differs(found: np.ndarray) -> float:
        return np.abs(found - expected).max() / expected.std()

    config = rm.load_config(str(folder))
    encoder = make_encoder(config)
    model = rm.build_model(config, torch.float32, rm.start_processes()[1])
    rm.read_weights(model, str(folder), CPU)
    rewards, share = rewards_together(model.train(), groups)  # training has no dropout
    differences = {"read": differs(rewards)}
    saved = folder / "saved"
    saved.mkdir()
    config.critique_rm = {"critiques": True, "max_length_tokens": 200}
    rm.save_model(model, encoder, saved, "card")
    again, _ = rm.load_reward_model(str(saved))
    differences["read again"] = differs(np.array(sum(rm.score_groups(again, groups, 200), [])))
    differences["read by Transformers"] = differs(rewards_of_transformers(saved, sequences))
    wrong = [f"{how} by {d:.2g}" for how, d in differences.items() if not d < TOLERANCE]
    if wrong:
        return f"WRONG: {', '.join(wrong)}, {'shared' if share else 'one a row'}"
    return "right, shared prefixes" if share else "right, one sequence a row"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def try_architecture(kind: str, changes: dict) -> str:
    groups = random_groups()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            save_tiny(tiny_config(kind, changes), folder)
            expected = rewards_of_transformers(folder, sum(groups, []))
            assert expected.std() > 0, "rewards are all the same"
        except Exception as error:
            return f"not built: {first_line(error)}"
        try:
            return compare(folder, groups, expected)
        except rm.CritiqueRMError as error:
            return f"refused: {str(error).replace(name, 'MODEL')}"
        except Exception as error:
            return f"ERROR: {first_line(error)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", help="names of architectures or variants")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    counts: Counter[str] = Counter()
    cases = {kind: (kind, {}) for kind in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES} | VARIANTS
    for name in args.only or cases:
        outcome = try_architecture(*cases[name])
        counts[outcome.partition(":")[0]] += 1
        print(f"{name:28} {outcome}", flush=True)
    for outcome, n in counts.most_common():
        print(f"{n:4} {outcome}")
    return int(bool(counts["WRONG"] or counts["ERROR"]))


if __name__ == "__main__":
    sys.exit(main())
