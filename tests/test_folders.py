"""critique_rm.py, the model: what is read from its folder and saved to it."""

import math
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import critique_rm as rm
from conftest import (
    ASKED,
    CPU,
    assistant,
    change_config,
    change_weights,
    load,
    make_tokenizer,
    save_tiny,
    talk,
    words,
)
from critique_rm import Answer, CritiqueRMError, Encoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel])
def test_weights_of_a_language_model_are_read_with_and_without_prefix(
    tmp_path, mesh, make_config, kind, dtype
):
    source = kind.from_config(make_config("Llama"), dtype=dtype)
    source.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    read = load(str(tmp_path), mesh, head_seed=3).model.state_dict()
    expected = source.base_model.state_dict()
    assert read.keys() == expected.keys()
    for name, value in read.items():
        assert value.dtype == torch.float32
        assert torch.equal(value.full_tensor(), expected[name].float())


def test_the_head_depends_on_the_seed_alone(tmp_path, mesh, make_config):
    AutoModel.from_config(make_config("Llama")).save_pretrained(tmp_path)
    heads = [load(str(tmp_path), mesh, head_seed=n).score.weight.full_tensor() for n in (3, 3, 4)]
    by_hand = torch.randn(1, 32, generator=torch.Generator().manual_seed(3)) / math.sqrt(33)
    assert torch.equal(heads[0], by_hand) and torch.equal(heads[1], by_hand)
    assert not torch.equal(heads[2], by_hand)


def pickle_weights(folder) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut(name: str, n_bytes: int):
    return lambda folder: os.truncate(folder / name, n_bytes)


NORM = "model.norm.weight"
BREAKAGES = {  # name: (how, what the message must hold)
    "no head": (change_weights(**{"score.weight": None}), "no reward head"),
    "missing key": (change_weights(**{NORM: None}), NORM),
    "other shape": (change_weights(**{NORM: torch.ones(31)}), rf"{NORM} is .31., expected .32."),
    "two labels": (change_weights(**{"score.weight": torch.ones(2, 32)}), "score.weight"),
    "pickled weights": (pickle_weights, "safetensors"),
    "cut weights": (cut("model.safetensors", 5000), "safetensors"),
    "empty weights": (cut("model.safetensors", 0), "safetensors"),
    "own code": (change_config(auto_map={"AutoConfig": "code.Config"}), "own code"),
    "unknown type": (change_config(model_type="new"), "config.json"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "cut config": (cut("config.json", 30), "config.json"),
    "config of wrong types": (change_config(hidden_size="x"), "config.json"),
    "config that does not fit": (change_config(num_attention_heads=5), "config.json"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "cut tokenizer": (cut("tokenizer.json", 300), "tokenizer"),
    "encoder": (change_config(model_type="bert"), "Bert.* no linear head .*Llama"),
    "no classifier": (change_config(model_type="mamba"), "mamba"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_model_folder_is_refused_in_one_line(reward_folder, mesh, name):
    how, expected = BREAKAGES[name]
    how(reward_folder)
    with pytest.raises(CritiqueRMError, match=expected) as caught:
        rm.load_reward_model(str(reward_folder))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "name, limit, complaint",
    [
        ("Llama", "vocab_size", "the token '<.im_end.>' is 375, the model has 64"),
        ("GPT2", "n_positions", "the model reads only 64 tokens; lower --max-length-tokens"),
    ],
)
def test_text_the_model_has_no_room_for_is_refused(
    tmp_path, mesh, make_config, name, limit, complaint
):
    save_tiny(make_config, name, tmp_path, **{limit: 64})
    make_tokenizer("chatml").save_pretrained(tmp_path)
    with pytest.raises(CritiqueRMError, match=complaint):
        rm.load_reward_model(str(tmp_path), max_length_tokens=300)


@pytest.mark.parametrize("style", ["chatml", "gemma", "mistral", "gpt2"])
def test_a_saved_model_scores_the_same_here_and_in_transformers(tmp_path, mesh, make_config, style):
    tokenizer, out = make_tokenizer(style), tmp_path / "out"
    folder = save_tiny(make_config, "Llama", tmp_path / "in", pad_token_id=tokenizer.pad_token_id)
    encoder, config = Encoder(tokenizer, 300, True), rm.load_config(folder)
    rm.choose_pad_token(config, encoder)
    assert config.pad_token_id == tokenizer.pad_token_id != encoder.end_id
    config.problem_type = "regression"
    config.critique_rm = {"critiques": True, "max_length_tokens": 300}
    model = rm.build_model(config, torch.float32, mesh)
    rm.read_weights(model, folder, CPU)
    out.mkdir()
    rm.save_model(model, encoder, out, "card")
    assert (out / "README.md").read_text() == "card"
    assert all(path.is_file() for path in out.iterdir())

    answers = [Answer(talk(ASKED), words("a", n), ("so Critique: right",)) for n in (1, 9, 3, 5)]
    expected = rm.score_answers(model, encoder, answers)
    again = rm.load_reward_model(str(out))
    assert again[1].max_length_tokens == 300 and rm.score_answers(*again, answers) == expected
    contents = [a.response + rm.SEPARATOR + a.critiques[0] for a in answers]
    texts = [encoder.render(talk([*ASKED, assistant(content)])) for content in contents]
    pipe = transformers.pipeline("text-classification", str(out), device="cpu")
    for batch_size in (1, 4) if config.pad_token_id is not None else (1,):
        scores = pipe(texts, add_special_tokens=False, batch_size=batch_size)
        assert [s["score"] for s in scores] == pytest.approx(expected, abs=1e-5)


def test_weights_in_several_files_are_read_by_us_and_by_transformers(
    tmp_path, reward_folder, mesh, monkeypatch
):
    model, encoder = rm.load_reward_model(reward_folder)
    monkeypatch.setattr(rm, "FILE_BYTES", 20_000)
    folder = tmp_path / "split"
    folder.mkdir()
    rm.save_model(model, encoder, folder, "card")
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 3 and sum(path.stat().st_size > 20_000 for path in files) == 1  # embedding
    expected = model.state_dict()

    def whole(p: torch.Tensor) -> torch.Tensor:
        return p.full_tensor() if hasattr(p, "full_tensor") else p

    for other in (
        AutoModelForSequenceClassification.from_pretrained(folder),
        rm.load_reward_model(str(folder))[0],
    ):
        found = other.state_dict()
        assert found.keys() == expected.keys()
        for name, p in found.items():
            assert torch.equal(whole(p), whole(expected[name]))


def test_the_folder_says_how_it_is_read(reward_folder, mesh, capsys):
    def settings(**changes) -> tuple:
        _, encoder = rm.load_reward_model(str(reward_folder), **changes)
        return encoder.use_critiques, encoder.max_length_tokens, encoder.keep_tail

    assert settings() == (True, 2048, True)
    change_config(critique_rm={"critiques": False, "max_length_tokens": 99})(reward_folder)
    assert settings() == (False, 99, False)
    assert "the other way round" not in capsys.readouterr().err
    assert settings(use_critiques=True, max_length_tokens=50) == (True, 50, False)
    assert "trained without critiques" in capsys.readouterr().err
