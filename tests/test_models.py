"""Other people's models: which weights and which head are meant, and where a reward is read."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import critique_rm as rm
import evaluate
import train
from conftest import (
    CPU,
    TINY,
    assistant,
    change_config,
    change_weights,
    load,
    make_tokenizer,
    random_groups,
    rewards_alone,
    rewards_together,
    run_here,
    run_script,
    save_tiny,
    talk,
    user,
)
from critique_rm import Answer, CritiqueRMError

ANSWERS = [("Name a river", "The Po."), ("Name a river", "A cloud, perhaps."), ("2 + 2?", "5")]


@pytest.fixture
def language_model(tmp_path, make_config):
    """The folder of a tiny language model with a tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config("Llama"))
    model.save_pretrained(tmp_path)
    make_tokenizer("chatml").save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def reward_folder(tmp_path, make_config):
    """A reward model of others, whose template writes a line break behind its end token."""
    save_tiny(make_config, "Llama", tmp_path)
    make_tokenizer("chatml").save_pretrained(tmp_path)
    return tmp_path


def norm_of(folder, mesh, **options) -> float:
    model = load(str(folder), mesh, head_seed=0, **options)
    return model.model.norm.weight.full_tensor().abs().max().item()


# --------------------------------------------------------------------------------------------------
# Which weights


@pytest.mark.parametrize("name", ["consolidated", "model.fp16", "model-00001-of-00001", "zz-old"])
def test_a_second_set_of_weights_is_not_read(language_model, mesh, name):
    zeros = {k: torch.zeros_like(v) for k, v in load_file(language_model / "model.safetensors").items()}
    save_file(zeros, language_model / f"{name}.safetensors", metadata={"format": "pt"})
    assert norm_of(language_model, mesh) == 1.0


def split(folder) -> list:
    """The weights in several files with an index."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    return sorted(folder.glob("model-*.safetensors"))


def test_what_the_index_names_is_read_and_nothing_beside_it(language_model, mesh):
    files = split(language_model)
    zeros = {k: torch.zeros_like(v) for file in files for k, v in load_file(file).items()}
    save_file(zeros, language_model / "old.safetensors", metadata={"format": "pt"})
    assert norm_of(language_model, mesh) == 1.0
    # as Transformers does, which looks for it first
    save_file(zeros, language_model / "model.safetensors", metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(language_model)
    assert norm_of(language_model, mesh) == theirs.model.norm.weight.max().item() == 0.0


def test_a_missing_shard_is_named(language_model, mesh):
    lost = split(language_model)[1]
    lost.unlink()
    with pytest.raises(CritiqueRMError, match=f"index.json names '{lost.name}', which is not in the"):
        norm_of(language_model, mesh)


def test_a_name_in_the_index_cannot_leave_the_folder(language_model, mesh):
    split(language_model)
    index = language_model / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    names["weight_map"] = dict.fromkeys(names["weight_map"], "../../etc/passwd")
    index.write_text(json.dumps(names))
    with pytest.raises(CritiqueRMError, match="index.json names .*passwd', which is not in the"):
        norm_of(language_model, mesh)


def test_weights_under_another_name_alone_are_not_guessed(language_model, mesh):
    (language_model / "model.safetensors").rename(language_model / "consolidated.safetensors")
    with pytest.raises(CritiqueRMError, match="consolidated.safetensors, but neither model.safetensors nor its index"):
        norm_of(language_model, mesh)


GATE = "model.layers.0.mlp.gate_proj"
SCALE = {f"{GATE}.weight_scale_inv": torch.ones(1, 1)}
CODES = torch.zeros(48, 32, dtype=torch.int8)
NOT_READ = {  # what is changed in a language model's folder, and what the message must hold
    "an adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "a PEFT adapter.*merge",
    ),
    "quantised, by its config": (
        change_config(quantization_config={"quant_method": "fp8"}),
        "quantization_config; quantised weights .*dequantize",
    ),
    "quantised, by a scale": (change_weights(**SCALE), f"{GATE}.weight_scale_inv.*dequantize"),
    "quantised, by a dtype": (
        change_weights(**{f"{GATE}.weight": CODES}),
        f"{GATE}.weight is I8; quantised",
    ),
    "eight bits of a float": (
        change_weights(**{f"{GATE}.weight": CODES.to(torch.float8_e4m3fn)}),
        f"{GATE}.weight is F8_E4M3; quantised",
    ),
    "a bias that the model has no place for": (
        change_weights(**{f"{GATE}.bias": torch.ones(48)}),
        f"1 of its weights have no place in LlamaForSequenceClassification, such as {GATE}.bias",
    ),
    "the weights of one more layer": (
        change_weights(**{"model.layers.2.mlp.gate_proj.weight": torch.ones(48, 32)}),
        "no place in .*layers.2",
    ),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_weights_that_would_be_misread_are_refused(language_model, mesh, name):
    how, expected = NOT_READ[name]
    how(language_model)
    with pytest.raises(CritiqueRMError, match=expected) as caught:
        norm_of(language_model, mesh)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["an adapter", "quantised, by its config", "quantised, by a dtype"])
def test_a_plan_refuses_what_could_not_be_trained(language_model, mesh, name):
    how, expected = NOT_READ[name]
    how(language_model)
    with pytest.raises(CritiqueRMError, match=expected):
        train.plan(train.parse_arguments(["--plan", "--model", str(language_model)]))


def test_experts_in_files_of_their_own_are_told_how_to_be_saved(tmp_path, make_config, mesh):
    config = make_config("Mixtral", num_local_experts=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(CritiqueRMError, match="keys do not match; .*save_original_format=False"):
        load(str(tmp_path), mesh, head_seed=0)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "new", save_original_format=False)
    model = load(str(tmp_path / "new"), mesh, head_seed=0)
    ids = torch.arange(9)[None] + 3
    with torch.no_grad():
        expected = again.model(ids).last_hidden_state
        found = model.model(ids).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_other_tensors_are_said(language_model, mesh, capsys):
    more = {"v_head.summary.weight": torch.ones(1, 32), "visual.patch.weight": torch.ones(3)}
    change_weights(**more, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})(language_model)
    assert norm_of(language_model, mesh) == 1.0
    err = capsys.readouterr().err
    assert f"{language_model}: 2 tensors do not belong to a reward model, not read: v_head" in err


# --------------------------------------------------------------------------------------------------
# Which head


def head_of(folder, mesh, **options) -> torch.Tensor:
    model = rm.build_model(rm.load_config(str(folder)), torch.float32, mesh)
    rm.read_weights(model, str(folder), CPU, **options)
    return model.score.weight.full_tensor()


def test_a_reward_head_is_kept_and_a_new_one_is_said(reward_folder, mesh, capsys):
    stored = load_file(reward_folder / "model.safetensors")["score.weight"]
    assert torch.equal(head_of(reward_folder, mesh, head_seed=3), stored)
    assert "a reward model; its head is kept (--new-head draws a new one)" in capsys.readouterr().err
    drawn = torch.randn(1, 32, generator=torch.Generator().manual_seed(3)) / math.sqrt(33)
    assert torch.equal(head_of(reward_folder, mesh, head_seed=3, new_head=True), drawn)
    assert "a new reward head is drawn" in capsys.readouterr().err
    change_weights(**{"score.weight": torch.ones(2, 32)})(reward_folder)
    with pytest.raises(CritiqueRMError, match=r"score.weight is \[2, 32\], .*--new-head"):
        head_of(reward_folder, mesh, head_seed=3)
    assert torch.equal(head_of(reward_folder, mesh, head_seed=3, new_head=True), drawn)


@pytest.mark.parametrize("where", ["model.norm.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_are_named_as_such(reward_folder, mesh, where):
    weights = load_file(reward_folder / "model.safetensors")[where]
    change_weights(**{where: torch.full_like(weights, math.nan)})(reward_folder)
    model, encoder = rm.load_reward_model(str(reward_folder), False, 64)
    with pytest.raises(CritiqueRMError, match="not finite; are its weights whole"):
        rm.score_answers(model, encoder, [Answer(talk([user("p")]), "r")])


@pytest.mark.parametrize(
    "settings",
    [[1], "x", {"keep_tial": True}, {"critiques": "no"}, {"max_length_tokens": 0}, {"keep_tail": 1}],
)
def test_settings_of_a_run_are_checked(reward_folder, mesh, tmp_path, settings):
    change_config(critique_rm=settings)(reward_folder)
    with pytest.raises(CritiqueRMError, match="critique_rm in its config.json is"):
        rm.load_reward_model(str(reward_folder))
    args = ["--model", str(reward_folder), "--out", str(tmp_path / "out"), "--max-pairs", "4"]
    with pytest.raises(CritiqueRMError, match="critique_rm in its config.json is"):
        train.run(train.parse_arguments(args))
    assert not (tmp_path / "out").exists()


def test_a_chat_template_that_is_no_text_is_refused(reward_folder, mesh):
    for path in reward_folder.glob("chat_template*"):
        path.unlink()
    path = reward_folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": 3}))
    with pytest.raises(CritiqueRMError, match="chat template|tokenizer"):
        rm.load_reward_model(str(reward_folder))


def test_weights_that_are_not_finite_leave_no_run_behind(language_model, mesh, tmp_path):
    change_weights(**{"model.norm.weight": torch.full((32,), math.nan)})(language_model)
    args = ["--model", str(language_model), "--out", str(tmp_path / "out"), "--max-pairs", "4"]
    with pytest.raises(CritiqueRMError, match="not finite; are its weights whole"):
        train.run(train.parse_arguments(args))
    assert not (tmp_path / "out").exists()


def test_a_head_with_a_bias_is_refused(reward_folder, mesh):
    change_weights(**{"score.bias": torch.ones(1)})(reward_folder)
    with pytest.raises(CritiqueRMError, match="no place in .*score.bias"):
        head_of(reward_folder, mesh)


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>"])
def test_training_on_goes_on_from_the_same_rewards(
    reward_folder, test_file, mesh, tmp_path, pad, capsys
):
    """Steps of 1e-30 change nothing: the run scores as evaluate.py scores what it began with."""
    tokenizer = make_tokenizer("chatml")
    change_config(pad_token_id=tokenizer.convert_tokens_to_ids(pad))(reward_folder)
    before, run = tmp_path / "before.jsonl", tmp_path / "run"
    data = ["--train", test_file, "--test", test_file, "--max-length-tokens", 1024]
    run_here("--model", reward_folder, *data, "--lr", 1e-30, "--out", run)
    assert "its head is kept" in capsys.readouterr().err
    options = ["--data", test_file, "--max-length-tokens", "1024", "--save-scores", before]
    for folder in (reward_folder, run):
        args = evaluate.parse_arguments([str(folder), *map(str, options)])
        assert evaluate.evaluate_pairs(args) == 0
        first, then = (
            [json.loads(line)["chosen_reward"] for line in path.read_text().splitlines()]
            for path in (before, run / "scores-test.jsonl")
        )
        assert np.std(first) > 0.1 and then == pytest.approx(first, abs=1e-5)
    assert json.loads((run / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]
    assert (run / "model.safetensors").exists() and not list(run.glob("*.index.json"))


# --------------------------------------------------------------------------------------------------
# Models in other models

IMAGE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE |= {"image_size": 28, "patch_size": 14}


def save_gemma3(folder) -> None:
    text = {**TINY, "head_dim": 8, "sliding_window": 4, "eos_token_id": 2, "bos_token_id": 1}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=IMAGE,
        mm_tokens_per_image=4,
        image_token_index=700,
        boi_token_index=701,
        eoi_token_index=702,
    )
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)


def save_mistral3(folder) -> None:
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**TINY),
        vision_config=transformers.PixtralVisionConfig(**IMAGE),
        image_token_index=700,
    )
    torch.manual_seed(0)
    transformers.Mistral3ForConditionalGeneration(config).save_pretrained(folder)


def load_head(model) -> torch.Tensor:
    weight = model.score.weight  # gathered, after a forward pass
    return getattr(weight, "full_tensor", lambda: weight)()


@pytest.mark.parametrize("save, name", [(save_gemma3, "Gemma3Text"), (save_mistral3, "Mistral")])
def test_the_text_part_of_a_model_that_sees_is_a_text_model(tmp_path, mesh, capsys, save, name):
    save(tmp_path)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path)
    model = load(str(tmp_path), mesh, head_seed=0)
    assert type(model).__name__ == f"{name}ForSequenceClassification"
    err = capsys.readouterr().err
    assert "the part that reads text is used" in err and "tensors do not belong to a reward" in err
    groups = random_groups(1, 3)
    with torch.no_grad():
        together = rewards_together(model, groups)
        hidden = [
            whole(input_ids=torch.from_numpy(s.astype(np.int64))[None], output_hidden_states=True)
            for group in groups
            for s in group
        ]
        head = load_head(model)
        expected = [head @ outputs.hidden_states[-1][0, -1] for outputs in hidden]
    torch.testing.assert_close(together, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_a_model_without_a_text_class_is_told_which_to_take(tmp_path):
    transformers.Qwen2_5_VLConfig().save_pretrained(tmp_path)
    with pytest.raises(CritiqueRMError, match="qwen2_5_vl models .*take a text-only one, such as Qwen/Qwen2.5"):
        rm.load_config(str(tmp_path))


# --------------------------------------------------------------------------------------------------
# A reward depends on its own sequence alone

LONG = {"short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 1.5]}
SCALED = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **LONG}


def save_phi3(folder, make_config) -> str:
    config = make_config("Phi3", max_position_embeddings=256, original_max_position_embeddings=64,
                         rope_parameters=SCALED)  # fmt: skip
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return str(folder)


def test_positions_scaled_by_the_longest_are_noticed(tmp_path, mesh, make_config):
    """Of up to 64 tokens all is well; above, a short sequence would depend on a long one."""
    model = load(save_phi3(tmp_path, make_config), mesh)
    assert rm.shares_prefixes(model, 40)
    groups = random_groups(1, 2, 3)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = rewards_alone(theirs, groups).tolist()
    assert sum(rm.score_groups(model, groups, 500), []) == pytest.approx(expected, abs=1e-5)
    long = [np.arange(100, dtype=np.int32) + 3]
    with pytest.raises(CritiqueRMError, match="phi3 .* up to 100 tokens, a reward depends on what else"):
        rm.score_groups(model, [*groups, long], 500)


@pytest.mark.parametrize(
    "name, changes, expected",
    [
        ("Llama", {"num_hidden_layers": 8}, True),
        ("Bloom", {}, False),
        ("GPTNeo", {"attention_types": [[["global", "local"], 1]], "window_size": 4, "num_layers": 2}, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_told_from_a_reward_that_depends_on_others(
    tmp_path, mesh, make_config, capsys, name, changes, expected, dtype
):
    """bf16 makes states of the deep model differ by a hundredth between shapes; fp32 by 1e-6."""
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(make_config(name, **changes)).save_pretrained(tmp_path)
    model = rm.build_model(rm.load_config(str(tmp_path)), dtype, mesh)
    rm.read_weights(model.eval(), str(tmp_path), CPU)
    assert rm.shares_prefixes(model, 300) is expected
    assert ("one sequence a row, without shared" in capsys.readouterr().err) is not expected


@pytest.mark.parametrize("n_keys, is_right", [(8, False), (64, False), (512, True)])
def test_keys_picked_among_those_of_a_row_are_noticed(tmp_path, mesh, make_config, n_keys, is_right):
    """Doge keeps so many keys for each query; fewer than a sequence has, and others' compete."""
    config = make_config("Doge", keep_window_size=n_keys, max_position_embeddings=512)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    model = load(str(tmp_path), mesh)
    rng = np.random.default_rng(0)
    groups = [[rng.integers(3, 700, n).astype(np.int32)] for n in (20, 30, 150)]
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    try:
        ours = sum(rm.score_groups(model, groups, 500), [])
    except CritiqueRMError:
        assert not is_right
        return
    with torch.no_grad():
        assert ours == pytest.approx(rewards_alone(theirs, groups).tolist(), abs=1e-4)


def test_attention_that_counts_keys_of_others_is_noticed(tmp_path, mesh, make_config, monkeypatch):
    """Keys are picked for a whole row, as sparse attention might: only for long sequences."""
    model = load(save_tiny(make_config, "Llama", tmp_path), mesh)
    layer = model.model.layers[0]
    forward = type(layer).forward

    def mixing(self, hidden_states, *args, **options):
        if hidden_states.shape[1] > 50:
            hidden_states = hidden_states + 0.1 * hidden_states.mean((0, 1), keepdim=True)
        return forward(self, hidden_states, *args, **options)

    monkeypatch.setattr(type(layer), "forward", mixing)
    assert rm.shares_prefixes(model, 30)
    with pytest.raises(CritiqueRMError, match="a reward depends on what else is computed with it"):
        rm.shares_prefixes(model, 60)


# --------------------------------------------------------------------------------------------------
# Where others read, and what is no number


def theirs(folder, answers) -> list[float]:
    """Rewards of Hugging Face's own class, from what its tokenizer makes of the messages."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer, rewards = AutoTokenizer.from_pretrained(folder), []
    for prompt, response in answers:
        text = tokenizer.apply_chat_template([user(prompt), assistant(response)], tokenize=False)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        rewards.append(model(**inputs).logits.item())
    return rewards


@pytest.mark.parametrize("style", ["chatml", "mistral", "gemma", "gpt2"])
@pytest.mark.parametrize("pad", ["end", "another", None])
def test_another_models_reward_is_that_of_its_own_class(tmp_path, mesh, make_config, style, pad, capsys):
    tokenizer = make_tokenizer(style)
    if style == "chatml":
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = rm.PLAIN_TEMPLATE
    end = tokenizer(tokenizer.apply_chat_template([user("a"), assistant("b")], tokenize=False))
    ids = {"end": end["input_ids"][-1], "another": 0, None: None}
    folder = save_tiny(make_config, "Llama", tmp_path, pad_token_id=ids[pad])
    tokenizer.save_pretrained(folder)
    model, encoder = rm.load_reward_model(folder, use_critiques=False, max_length_tokens=300)
    ours = rm.score_answers(model, encoder, [Answer(talk([user(p)]), r) for p, r in ANSWERS])
    assert ours == pytest.approx(theirs(folder, ANSWERS), abs=1e-5)
    assert ("as its class does" in capsys.readouterr().err) == (pad == "end")


def test_rewards_that_are_no_numbers_end_scoring(reward_folder, mesh, tmp_path):
    weight = torch.ones(1, 32)
    weight[0, 3] = math.nan
    change_weights(**{"score.weight": weight})(reward_folder)
    data, out = tmp_path / "a.jsonl", tmp_path / "out"
    data.write_text(json.dumps({"id": "x", "prompt": "p", "chosen": "c", "rejected": "r"}) + "\n")
    options = ["--data", str(data), "--no-critiques", "--json", str(out), "--save-scores", str(out)]
    with pytest.raises(CritiqueRMError, match="a.jsonl:1, pair x: the reward is nan"):
        evaluate.evaluate_pairs(evaluate.parse_arguments([str(reward_folder), *options]))
    assert not out.exists()
    model, encoder = rm.load_reward_model(str(reward_folder), False, 64)
    with pytest.raises(CritiqueRMError, match="^answer 1: the reward is nan"):
        rm.score_answers(model, encoder, [Answer(talk([user("p")]), "r")])
    with pytest.raises(ValueError, match="not JSON compliant"):
        rm.to_json({"a": math.inf})


def test_single_answers_that_the_template_refuses_are_named_or_null(tmp_path, mesh, make_config):
    folder = save_tiny(make_config, "Llama", tmp_path)
    make_tokenizer("gemma").save_pretrained(folder)
    model, encoder = rm.load_reward_model(folder, False, 64)
    bad = talk([{"role": "system", "content": "s"}, user("p")])
    answers = [Answer(talk([user("p")]), "r"), Answer(bad, "r", where="f:2")]
    with pytest.raises(CritiqueRMError, match="^f:2: the chat template refuses"):
        rm.score_answers(model, encoder, answers)
    rewards = rm.score_answers(model, encoder, answers, skip_bad=True)
    assert rewards[0] is not None and rewards[1] is None and len(encoder.refusals) == 1


def test_pairs_that_the_template_refuses_are_skipped_on_request(
    language_model, mesh, tmp_path, capsys
):
    """In training, in testing and in scoring; without it the run ends before it begins."""
    make_tokenizer("gemma").save_pretrained(language_model)  # it knows no system role
    rows = [{"id": str(n), "prompt": f"p{n}", "chosen": "c", "rejected": "r"} for n in range(4)]
    rows[2]["system"] = "s"
    data, out = tmp_path / "a.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", language_model, "--train", data, "--test", data, "--no-critiques"]
    options = [str(option) for option in [*options, "--max-length-tokens", 64, "--out", out]]
    with pytest.raises(CritiqueRMError, match="a.jsonl:3: the chat template refuses .*no.* supported"):
        train.run(train.parse_arguments(options))
    assert not out.exists()
    assert train.run(train.parse_arguments([*options, "--skip-bad"]))["pairs"] == 3
    assert len((out / "scores-a.jsonl").read_text().splitlines()) == 3
    said = f"{data}: 3 of 4 pairs used; 1 refused, the first: {data}:3: the chat template refuses"
    assert capsys.readouterr().err.count(said) == 2
    options = [str(out), "--data", str(data)]
    with pytest.raises(CritiqueRMError, match="a.jsonl:3: "):
        evaluate.evaluate_pairs(evaluate.parse_arguments(options))
    assert evaluate.evaluate_pairs(evaluate.parse_arguments([*options, "--skip-bad"])) == 0
    assert "| all | 3 |" in capsys.readouterr().out


def test_a_debugging_developer_sees_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("CRITIQUE_RM_DEBUG", "1")
    code, _, err = run_script("train.py", "--model", tmp_path, "--out", tmp_path / "run")
    assert code == 1 and "Traceback" in err
    assert err.splitlines()[-1].startswith(f"train.py: {tmp_path}: no usable config.json")
