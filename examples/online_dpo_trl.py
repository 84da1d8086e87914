"""DPO on the policy's own answers, judged as they are sampled, with TRL's OnlineDPOTrainer."""

# ruff: noqa: E402  the project's modules can be imported only after the path is set

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the project's modules
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # requirements.txt pins the release

from dpo_trl import SETTINGS, load, prepare, train_and_save  # first: it also sets HF_HUB_OFFLINE
import datasets
import numpy as np
import torch
from accelerate.utils import set_seed
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

import cli
import data
from to_hugging_face import tokenizer

LONGEST_PROMPT = 4  # tokens of `100=`


def right_and_preferred(prompts, completion_ids, **_):
    """The judge as a reward function of TRL: 1 for a right sum of three terms, else 0."""
    rewards = []
    for prompt, ids in zip(prompts, completion_ids):
        if data.END in ids:
            ids = ids[: ids.index(data.END) + 1]  # without the padding after the end token
        is_accepted = data.is_accepted(data.encode(prompt) + ids)
        rewards.append(float(is_accepted))
    return rewards


class OnlineTrainer(OnlineDPOTrainer):
    """TRL's trainer, but only on prompts of which one answer is accepted and the other rejected.

    TRL itself makes a pair of any two answers, and chooses the first if their rewards are equal.
    Such a pair says nothing, but its loss is lowest where policy and reference agree.
    """

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Sample two answers to each of n prompts, keep the pairs, leave the rest to TRL."""
        prompts = inputs["prompt"]
        n = len(prompts)
        # Answers i and i + n are those to prompt i. The last item, of images, is None.
        prompt_ids, prompt_mask, answer_ids, answer_mask, _ = super()._generate(model, prompts)
        rewards = self._calculate_rewards_from_functions(2 * prompts, None, answer_ids.tolist())
        pairs = (rewards[:n] != rewards[n:]).nonzero().ravel()  # numbers of prompts

        # TRL needs the same number of pairs in every process, and at least one. A missing pair is
        # an answer paired with itself, whose gradient is 0: here the first answer to prompt 0.
        counts = self.accelerator.gather(torch.tensor([len(pairs)], device=pairs.device))
        self.stats.setdefault("pairs", []).append(counts.sum().item())
        n_missing = max(1, int(counts.max())) - len(pairs)
        missing = pairs.new_zeros(n_missing)
        first = torch.cat([pairs, missing])
        second = torch.cat([pairs + n, missing])
        rows = torch.cat([first, second])
        self.sampled = (
            prompt_ids[rows],
            prompt_mask[rows],
            answer_ids[rows],
            answer_mask[rows],
            None,
        )
        kept_prompts = [prompts[i] for i in first]
        return super().training_step(model, {"prompt": kept_prompts})

    def _generate(self, model, prompts, images=None):
        """What TRL's own training_step asks for: the answers have been sampled already."""
        return self.sampled


def configuration(folder, beta, lr, batch_size, **more):
    """dpo.py's objective, optimizer and sampling in TRL's words.

    `batch_size` is the number of prompts of one process.
    """
    settings = SETTINGS | {
        "output_dir": str(folder),
        "learning_rate": lr,
        "logging_steps": 50,
        "per_device_train_batch_size": batch_size,
        "loss_type": "sigmoid",
        "beta": beta,
        # evaluation.sample(..., temperature=1.0); prompt and answer fit into max_length
        "temperature": 1.0,
        "max_new_tokens": data.MAX_LEN - LONGEST_PROMPT,
    }
    return OnlineDPOConfig(**(settings | more))


def trainer(policy, reference, n_prompts, config):
    """TRL's trainer of the model in the folder `policy` against the frozen one in `reference`.

    It makes one pass over n_prompts prompts.
    """
    targets = np.random.default_rng(config.seed).choice(data.TRAINING, n_prompts)
    prompts = datasets.Dataset.from_dict({"prompt": [f"{target}=" for target in targets]})
    run = OnlineTrainer(
        model=load(policy),
        ref_model=load(reference),
        args=config,
        reward_funcs=right_and_preferred,
        train_dataset=prompts,
        processing_class=tokenizer(),
    )
    set_seed(config.seed, device_specific=True)  # every process samples from a stream of its own
    return run


def parse_arguments(argv):
    formatter = argparse.ArgumentDefaultsHelpFormatter  # --help shows every default
    parser = cli.Parser(prog=sys.argv[0], description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER",
        help="what to_hugging_face.py wrote: where policy and reference start")  # fmt: skip
    add("--beta", type=cli.positive, default=0.8, help="how strongly to hold on to the reference")
    add("--rounds", type=cli.whole(1), default=2400, help="rounds of pairs, with one step each")
    add("--prompts", type=cli.whole(1), default=384,
        help="targets in a round, of all processes, with two answers each")  # fmt: skip
    add("--lr", type=cli.positive, default=1.2e-4, help="peak learning rate of Adam")
    add("--seed", type=cli.whole(0), default=0, help="of prompts and answers")
    add("--out", type=cli.checkpoint_path, default="runs/online_dpo_trl.npz",
        help="checkpoint to write, with a folder of the same name beside it")  # fmt: skip
    return parser.parse_args(argv)


def main(argv=None):
    """Train on fresh pairs."""
    arguments = parse_arguments(argv)
    start = arguments.folder
    folder, batch_size = prepare(start, arguments.out, arguments.prompts)
    config = configuration(folder, arguments.beta, arguments.lr, batch_size, seed=arguments.seed)
    n_prompts = arguments.rounds * arguments.prompts
    train_and_save(trainer(start, start, n_prompts, config), arguments.out)


if __name__ == "__main__":
    cli.run(main)
