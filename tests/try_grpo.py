"""Two steps of TRL's GRPOTrainer on a tiny policy, with a run of ours as its reward.

    pip install trl datasets
    python tests/try_grpo.py RUN

Prints the rewards that the trainer logged; exits with 1 if it logged none. The policy is random, and
so are its completions: what is tried is that the trainer can call the reward function.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import critique_rm as rm  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="folder of train.py")
    args = parser.parse_args()
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.run)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "vocab_size": len(tokenizer)}
    policy = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    prompts = [[{"role": "user", "content": f"{n} + {n}?"}] for n in range(8)]
    reward = rm.make_reward_function(args.run, critic=lambda prompt, response: "It is wrong.")
    reward.__name__ = "critique_rm"
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=16,
            max_steps=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
        )
        trainer = GRPOTrainer(
            model=policy,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
        )
        trainer.train()
    logged = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    print(f"rewards of {len(logged)} steps: {logged}")
    return 0 if len(logged) == 2 else 1


if __name__ == "__main__":
    rm.leave(main())
