"""Can the embedded model add before it is fine-tuned? Asked in words, in transfer.py's games.

    python experiments/ceiling.py            # two minutes

The embedded model was pretrained on such questions, with every layout (tiny/README.md). It is asked
in a long wording, in one state and order, so an agent may do better. The answer is held to the two
names.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, see runs.py
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tiny"))

import numpy as np
import torch

from envs import C, fields, payoff_matrix
from options import MORAL, Parser
from policy import load_model
from pretrain import answer_logits, pack, word_ids
from texts import ANSWER, ASK, MATRIX_WORDINGS, MODEL, STATE, USER, Text
from transfer import DEVELOPMENT, make_cases, print_line, score

QUESTION = "Which action is best for both in all if they choose at random?"
BATCH = 40


@torch.no_grad()
def answer_question(model, tokenizer, conditions, rng):
    """P(C) and P(D) as the answer to the QUESTION in each Condition: float [N, 2].

    The last moves and the order of the names are drawn by the numpy Generator `rng`.
    """
    texts = []
    for condition in conditions:
        own, other, order = rng.integers((2, 2, 4))
        payoffs = payoff_matrix(condition.game)
        words = fields(payoffs, condition.actions, condition.layout, own, other, order)
        context = " ".join([USER, ASK, MATRIX_WORDINGS[0], STATE]).format(**words)
        question = f"{QUESTION} {ANSWER.format(**words)} {MODEL}"
        texts.append(Text(context, [[(question, condition.actions[C])]]))
    logits, _ = answer_logits(model, *pack(tokenizer, texts))  # where the name would be answered
    probabilities = []
    for row, condition in zip(logits, conditions):
        tokens = [word_ids(tokenizer, name)[0] for name in condition.actions]
        probabilities.append(row[tokens].softmax(0).numpy())
    return np.array(probabilities)


def main(argv=None):
    Parser(__doc__).parse_args(argv)
    model, tokenizer = load_model("tiny", "cpu")
    config = {"reward": ["utilitarian"], "xi": 3.0, "illegal": -6.0}
    config["layout"] = MORAL["layout"]
    config["prompt"] = MORAL["prompt"]
    cases = make_cases(DEVELOPMENT, config)
    rng = np.random.default_rng(0)
    parts = []
    for start in range(0, len(cases.conditions), BATCH):
        chosen = cases.conditions[start : start + BATCH]
        parts.append(answer_question(model, tokenizer, chosen, rng))
    answers = np.concatenate(parts)
    every_state = np.repeat(answers[:, None], 4, axis=1)  # the last moves do not matter to it
    scores = score(every_state, cases)
    print(f"{'':48}" + "".join(f"{name:>8}" for name in scores))
    print_line(QUESTION[:48], [leaf["p"] for leaf in scores.values()])
    print_line("  ± over games", [leaf["interval"] for leaf in scores.values()])
    print_line("  share decided right", [leaf["share"] for leaf in scores.values()])


if __name__ == "__main__":
    main()
