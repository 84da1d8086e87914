"""DPO on the policy's own answers, judged as they are sampled, with TRL's OnlineDPOTrainer."""

import os
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the project's modules
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # the trainer may change; requirements.txt holds it
import cli  # noqa: E402  before NumPy, for the number of BLAS threads
import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate.utils import set_seed  # noqa: E402

import data  # noqa: E402
from dpo_trl import SETTINGS, load, prepare, train_and_save  # noqa: E402
from to_hugging_face import tokenizer  # noqa: E402
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer  # noqa: E402

LONGEST_PROMPT = 4  # tokens of `100=`


def right_and_preferred(prompts, completion_ids, **_):
    """TRL's reward function, data.judge: 1 for a right sum of three terms, 0 for all else."""
    rewards = []
    for prompt, ids in zip(prompts, completion_ids):
        answer = ids[: ids.index(data.END) + 1] if data.END in ids else ids  # without padding
        outcome = data.judge(data.encode(prompt) + answer).outcome
        rewards.append(float(outcome == data.OUTCOMES[0]))
    return rewards


class OnlineTrainer(OnlineDPOTrainer):
    """TRL's trainer, on the prompts whose two answers were judged differently.

    By itself it makes a pair of any two answers; of two that are judged alike the first is chosen.
    Such a pair says nothing, but its loss is lowest where policy and reference agree.
    """

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Sample two answers to each prompt, keep the pairs, leave the rest to TRL."""
        prompts = inputs["prompt"]
        answers = super()._generate(model, prompts)[:4]  # a first one to each, then a second
        rewards = self._calculate_rewards_from_functions(2 * prompts, None, answers[2].tolist())
        first, second = rewards.chunk(2)
        pairs = (first != second).nonzero().ravel()
        # TRL wants as many pairs in every process, and at least one. What is missing is made up by
        # an answer against itself, whose gradient is 0.
        counts = self.accelerator.gather(torch.tensor([len(pairs)], device=pairs.device))
        self.stats.setdefault("pairs", []).append(counts.sum().item())
        missing = pairs.new_zeros(max(1, int(counts.max())) - len(pairs))
        kept = torch.cat([pairs, missing])
        rows = torch.cat([kept, pairs + len(prompts), missing])
        self.sampled = (*(array[rows] for array in answers), None)  # None: there are no images
        return super().training_step(model, {"prompt": [prompts[i] for i in kept]})

    def _generate(self, *_):
        """What TRL's own step asks for."""
        return self.sampled


def configuration(folder, beta, lr, batch_size, **more):
    """dpo.py's objective, optimizer and sampling in TRL's words."""
    return OnlineDPOConfig(
        **{
            **SETTINGS,
            "output_dir": str(folder),
            "learning_rate": lr,
            "logging_steps": 50,
            "per_device_train_batch_size": batch_size,
            "loss_type": "sigmoid",
            "beta": beta,
            # evaluation.sample(..., temperature=1.0); the prompt and what follows stay in max_length
            "temperature": 1.0,
            "max_new_tokens": data.MAX_LEN - LONGEST_PROMPT,
            **more,
        }
    )


def trainer(policy, reference, n_prompts, config):
    """TRL's trainer of the model in the folder `policy` against the frozen one in `reference`, for
    one pass over n_prompts prompts."""
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
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="what to_hugging_face.py wrote: where policy and reference start",
    )
    add("--beta", type=cli.positive, default=0.8, help="how strongly to hold on to the reference")
    add("--rounds", type=cli.whole(1), default=2400, help="rounds of pairs, with one step each")
    add(
        "--prompts",
        type=cli.whole(1),
        default=384,
        help="targets in a round, two answers each, of all processes",
    )
    add("--lr", type=cli.positive, default=1.2e-4, help="peak learning rate of Adam")
    add("--seed", type=cli.whole(0), default=0, help="of prompts and answers")
    add(
        "--out",
        type=cli.checkpoint_path,
        default=Path("runs/online_dpo_trl.npz"),
        help="the checkpoint to write; a folder of this name without .npz goes beside it",
    )
    return parser.parse_args(argv)


def main(argv=None):
    """Train on fresh pairs."""
    arguments = parse_arguments(argv)
    start = arguments.folder
    folder, batch_size = prepare(start, arguments.out, arguments.prompts)
    config = configuration(folder, arguments.beta, arguments.lr, batch_size, seed=arguments.seed)
    train_and_save(
        trainer(start, start, arguments.rounds * arguments.prompts, config), arguments.out
    )


if __name__ == "__main__":
    cli.run(main)
