"""PPO on a task of your own, without a game: what to do at a traffic light.

    python examples/own_task.py

Three prompts, three answers, a reward for each pair of them. Nothing else is needed: policy.py and
ppo.py know no game.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from lora import add_adapter
from models import encode, load_model
from policy import Policy
from ppo import Learner, act

PROMPTS = [f"The light is {light}. What do you do?" for light in ("red", "yellow", "green")]
ANSWERS = ["stop", "slow", "go"]
REWARD = np.array([[1, 0, -1], [0, 1, 0], [-1, 0, 1]])  # [prompt, answer]

torch.manual_seed(0)
rng = np.random.default_rng(0)
model, tokenizer = load_model("tiny")
add_adapter(model, "driver", rank=8, alpha=16)
policy = Policy(model, "driver", *encode(tokenizer, PROMPTS, ANSWERS))
learner = Learner(policy.parameters(), lr=3e-3, epochs=2)

for update in range(30):
    acted = act(policy)
    prompt = rng.integers(len(PROMPTS), size=(64, 1))  # 64 episodes of one round
    passed = rng.random((64, 1, 1)) >= acted.probabilities.cumsum(axis=1)[prompt]
    # The last answer takes what rounding leaves of the total.
    action = passed[..., :-1].sum(axis=-1)
    reward = REWARD[prompt, action]
    stats = learner.update(acted, prompt, action, reward)
    print(f"update {update}: reward {reward.mean():+.2f}, KL {stats['kl']:.3f}")

print(f"\n{'':40}" + "".join(f"{answer:>8}" for answer in ANSWERS))
for text, row in zip(PROMPTS, policy.probabilities()):
    print(f"{text:40}" + "".join(f"{p:8.3f}" for p in row))
