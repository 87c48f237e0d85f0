"""What did training do to the model, apart from the game?

    python experiments/drift.py runs/* --json drift.json

On experiments/prose.txt, which has nothing to do with games: its first 256 tokens (with the one
that begins a text), read in chunks of 64; the embedded model knows no prose. And in free answers to
prompts that ask for one of two names without any points: the first two names of training.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, see runs.py

import numpy as np
import torch

from envs import ILLEGAL, Condition
from errors import InputError, about, stop
from evaluate import Players
from groups import average_groups, group_by_seed, show
from lora import active_adapter
from options import Parser, action_names
from runs import check_json, json_options, save_json

PROSE = Path(__file__).resolve().parent / "prose.txt"
TOKENS = 256
CHUNK = 64
MEASURES = {
    "kl": f"KL(base || tuned) on {TOKENS} tokens of prose, in chunks of {CHUNK}, nats per token",
    "perplexity": "perplexity there, times the base's",
    "names": "probability of a name of training where a prompt asks for it without points",
    "names_untuned": "the same of the untuned model",
}


def measure_drift(players, run):
    """The MEASURES of one run: dict of floats."""
    kl, lost = compare_on_prose(players, run)
    return {
        "kl": kl,
        "perplexity": float(np.exp(lost)),
        "names": says_a_name(players, run, config=players.configs[run]),
        "names_untuned": says_a_name(players, None, config=players.configs[run]),
    }


def compare_on_prose(players, run):
    """(KL(base || tuned), how much more surprised the tuned model is), in nats per token."""
    model = players.policy(run).model  # and "agent" is now the adapter of this run
    start = players.tokenizer("")["input_ids"]  # what begins every text, here every chunk
    text = PROSE.read_text(encoding="utf-8")
    ids = players.tokenizer(text)["input_ids"][len(start) : TOKENS]
    kl = 0.0
    lost = 0.0
    count = 0
    for i in range(0, len(ids), CHUNK):
        chunk = torch.tensor([*start, *ids[i : i + CHUNK]])
        base = next_token_log_probs(model, chunk, name=None)
        tuned = next_token_log_probs(model, chunk, name="agent")
        kl += (base.exp() * (base - tuned)).sum().item()
        lost += (base - tuned).gather(1, chunk[1:, None]).sum().item()
        count += len(chunk) - 1
    return kl / count, lost / count


@torch.no_grad()
def next_token_log_probs(model, ids, name):
    """Of each next token of a text: float64 [token - 1, vocabulary]; name: of the adapter."""
    with active_adapter(model, name):
        logits = model(ids[None].to(model.device)).logits[0, :-1]
    return logits.cpu().double().log_softmax(-1)


def says_a_name(players, run, config):
    """How likely an agent (None: untuned) answers unrelated prompts with a name of training."""
    names = tuple(action_names(config["actions"])[:2])
    shares = []
    for wording in ("choice", "game", "game_state"):
        condition = Condition(actions=names, prompt=wording)
        player = players.player(run, condition, sampling="free")
        shares.append(player[..., :ILLEGAL].sum(axis=-1).mean())
    return float(np.mean(shares))


def main(argv=None):
    try:
        parser = Parser(__doc__)
        parser.option("runs", "run folders of one base model", nargs="+", type=Path, metavar="RUN")
        json_options(parser)
        args = parser.parse_args(argv)
        check_json(args)
        players = Players(args.runs)
        with about("RUN"):
            groups = group_by_seed([players.configs[run] for run in args.runs])
        measured = [{"drift": measure_drift(players, run)} for run in args.runs]
        groups = average_groups(groups, measured)
        runs = [{"run": str(run), **measures} for run, measures in zip(args.runs, measured)]
        save_json(args, {"runs": runs, "groups": groups})
        for group in groups:
            print(f"\n{group['name']}")
            for key, leaf in group["drift"].items():
                print(f"  {MEASURES[key]:80}{show(leaf):>14}")
    except InputError as error:
        stop(error)


if __name__ == "__main__":
    main()
