"""PPO on a task of your own, without a game: what to do at a traffic light.

    python experiments/own_task.py

Three prompts, three answers, a reward for each pair of them. Nothing else is needed: policy.py and
ppo.py know no game.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, see runs.py

import numpy as np
import torch

from lora import add_adapter
from policy import Policy, load_model
from ppo import Learner

PROMPTS = tuple(f"The light is {light}. What do you do?" for light in ("red", "yellow", "green"))
ANSWERS = ("stop", "slow", "go")
REWARD = np.array([[1, 0, -1], [0, 1, 0], [-1, 0, 1]])  # [prompt, answer]

argparse.ArgumentParser(description=__doc__).parse_args()
torch.manual_seed(0)
rng = np.random.default_rng(0)
model, tokenizer = load_model("tiny")
add_adapter(model, "driver", rank=8, alpha=16)
policy = Policy(model, tokenizer, "driver")
trie = policy.trie(PROMPTS, ANSWERS)
learner = Learner(policy, lr=3e-3, epochs=2)

for update in range(30):
    table = policy(trie)  # log-probabilities [prompt, answer] and values [prompt]
    row = rng.integers(len(PROMPTS), size=(64, 1))  # 64 episodes of one round
    # The last answer takes what rounding leaves of the total.
    limits = table[0].detach().exp().cumsum(dim=1).numpy()[:, :-1]
    action = (rng.random((64, 1, 1)) >= limits[row]).sum(axis=-1)
    reward = REWARD[row, action]
    stats = learner.update(trie, table, row, action, reward)
    print(f"update {update}: reward {reward.mean():+.2f}, KL {stats['kl']:.3f}")

print(f"\n{'':40}" + "".join(f"{answer:>8}" for answer in ANSWERS))
for text, row in zip(PROMPTS, policy.probabilities(trie)):
    print(f"{text:40}" + "".join(f"{p:8.3f}" for p in row))
