"""What did training do to the model beside the game?

    python experiments/drift.py runs/* --json drift.json

On experiments/prose.txt, which has nothing to do with games: its first 256 tokens, read in chunks
of 64 (the embedded model knows no prose). And in free answers to prompts that show no points.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from envs import ILLEGAL, Condition, action_names
from evaluate import Players, group_by_seed, show
from lora import adapter
from runs import InputError, Parser, check_free, stop, write_json

PROSE, TOKENS, CHUNK = Path(__file__).resolve().parent / "prose.txt", 256, 64
MEASURES = {
    "kl": f"KL(base || tuned) on {TOKENS} tokens of prose, in chunks of {CHUNK}, nats per token",
    "perplexity": "perplexity there, times the base's",
    "names": "probability of an action name of training as the answer to unrelated prompts",
    "names_untuned": "the same of the untuned model",
}


def drift(players, run):
    """The MEASURES of one run: dict of floats."""
    model, tokenizer, sums = players.policy(run).model, players.tokenizer, np.zeros(3)
    start = tokenizer("")["input_ids"]  # what begins every text, here every chunk
    ids = tokenizer(PROSE.read_text(encoding="utf-8"))["input_ids"][len(start) : TOKENS]
    for i in range(0, len(ids), CHUNK):
        chunk, log_probs = torch.tensor([*start, *ids[i : i + CHUNK]]), []
        for name in (None, "agent"):
            with torch.no_grad(), adapter(model, name):
                logits = model(chunk[None].to(model.device)).logits[0, :-1]
            log_probs.append(logits.cpu().double().log_softmax(-1))
        base, lost = log_probs[0].exp(), log_probs[0] - log_probs[1]
        sums += (base * lost).sum(), lost.gather(1, chunk[1:, None]).sum(), len(chunk) - 1
    names, said = tuple(action_names(players.configs[run]["actions"])[:2]), []
    for wording in ("choice", "game", "game_state"):
        condition = Condition(names=names, wording=wording)
        answers = [players.player(who, condition, sampling="free") for who in (run, None)]
        said.append([player[..., :ILLEGAL].sum(axis=-1).mean() for player in answers])
    kl, surprise = sums[:2] / sums[2]
    return dict(zip(MEASURES, map(float, (kl, np.exp(surprise), *np.mean(said, axis=0)))))


def main(argv=None):
    try:
        parser = Parser(__doc__)
        parser.option("runs", "run folders of one base model", nargs="+", type=Path, metavar="RUN")
        parser.option("--json", "write everything to this file", type=Path, metavar="FILE")
        parser.option("--overwrite", "replace this file", action="store_true")
        args = parser.parse_args(argv)
        if args.json:
            check_free("--json", args.json, args.overwrite)
        players = Players(args.runs)
        runs = [{"run": str(run), "drift": drift(players, run)} for run in players.configs]
        _, *groups = group_by_seed({"drift": {}}, runs, list(players.configs.values()))
        if args.json:
            write_json(args.json, {"runs": runs, "groups": groups})
        for group in groups:
            lines = [f"  {MEASURES[key]:80}{show(x):>14}" for key, x in group["drift"].items()]
            print(f"\n{group['name']}", *lines, sep="\n")
    except InputError as error:
        stop(error)


if __name__ == "__main__":
    main()
