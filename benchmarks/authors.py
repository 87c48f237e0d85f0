"""The authors' training loop, written from what docs/PAPER.md says of it: to be timed by speed.py.

An uncached pass over one sequence for each token of an answer, five rounds an update, a second full
model as the reference, four epochs accumulated into one optimizer step.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from lora import adapter

ROUNDS = 5


def plain_inputs(model, prompts, answers):
    """Plain sequences for the model, left-padded: prompts, and an answer up to its last token."""
    rows = [torch.tensor(prompt + answers[0][:-1]) for prompt in prompts]
    ones = [torch.ones_like(row) for row in rows]
    ids, mask = (pad_sequence(x, batch_first=True, padding_side="left") for x in (rows, ones))
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": mask.to(model.device),
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0).to(model.device),
        "use_cache": False,
    }


def authors_update(job, reference, optimizer):
    """One PPO step on one episode; `job`: of speed.py, `reference`: a copy of its model."""
    model, length = job.model, len(job.answers[0])

    def log_probs(network):
        tail = network(**inputs).logits[:, -length - 1 : -1].float().log_softmax(-1)
        return tail.gather(2, inputs["input_ids"][:, -length:, None]).sum((1, 2))

    with adapter(model, "player"), adapter(reference, None):
        chosen = []
        for _ in range(ROUNDS):
            prompt = list(job.prompts[job.rng.integers(len(job.prompts))])
            with torch.no_grad():
                for _ in range(length):
                    ids = torch.tensor([prompt], device=model.device)
                    logits = model(input_ids=ids, use_cache=False).logits[0, -1]
                    prompt.append(int(torch.multinomial(logits.float().softmax(-1), 1)))
            chosen.append(prompt)
        inputs = plain_inputs(model, chosen, [[0]])
        with torch.no_grad():
            old, against = log_probs(model), log_probs(reference)
        reward = torch.tensor(job.rng.normal(size=ROUNDS), dtype=torch.float32).to(model.device)
        advantage = reward - 0.2 * (old - against)
        optimizer.zero_grad()
        for _ in range(4):
            ratio = (log_probs(model) - old).exp()
            loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).mean()
            (loss / 4).backward()
        optimizer.step()
