"""Who does well among others? Points against classic strategies and against each other, exactly.

    python studies/society.py runs/*                    # in the Prisoner's Dilemma
    python studies/society.py runs/* --game chicken --rounds 10 --json society.json

For each agent its four numbers, P(C | CC CD DC DD), as a memory-one strategy, and its points per
round against everybody, over --rounds and in the long run. Options as in evaluate.py.
"""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from agents import Evaluator
from envs import (
    STRATEGIES,
    C,
    frequencies,
    legal_moves,
    long_run,
    memory_one,
    opening,
    payoff_matrix,
    transitions,
)
from evaluate import condition_from, condition_parser, read_runs
from rewards import reward_array
from runs import user_error


def meet(player, other, other_opening, payoffs, rounds, illegal=-6.0):
    """Points per round of the first of two players: dict.

    rounds, long_run:   over so many rounds, and in the limit
    depends_on_opening: whether the latter depends on the moves before the first round
    """
    points = reward_array("game", payoffs, illegal=illegal)[:, : player.shape[-1]]

    def mean_points(length):
        return float((frequencies(player, other, length, other_opening) * points).sum())

    visits = long_run(transitions(player, other))
    return {
        "rounds": mean_points(rounds),
        "long_run": mean_points(math.inf),
        "depends_on_opening": bool(np.ptp(visits, axis=0).max() > 1e-6),
    }


def society(args, configs):
    """Everybody's meetings: {agent: {"strategy": four numbers, "society": {other: `meet`}}}."""
    game = args.game[0]
    condition = condition_from(args, game)
    evaluator = Evaluator(configs[0], args.sampling, args.actions)
    agents = {"untuned": None} | {str(run): run for run in args.runs}
    others = {}
    for name, strategy in STRATEGIES.items():
        others[name] = memory_one(strategy), opening(strategy)
    for name, run in agents.items():  # whom one meets sits on the other side of the game
        others[name] = evaluator.player(run, condition, second=True), 0.5
    results = {}
    for name, run in agents.items():
        player, meetings = evaluator.player(run, condition), {}
        for other, (opponent, first) in others.items():
            settings = payoff_matrix(game), args.rounds, args.illegal
            meetings[other] = meet(player, opponent, first, *settings)
        strategy = legal_moves(player)[:, C].tolist()
        results[name] = {"strategy": strategy, "society": meetings}
    return results


def main(argv=None):
    args = condition_parser("society.py", __doc__, games=["ipd"]).parse_args(argv)
    configs = read_runs(args)
    with user_error("RUN", ValueError, OSError):
        results = society(args, configs)
    width = max(40, *(len(name) for name in results))
    for name, agent in results.items():
        numbers = ", ".join(f"{p:.4f}" for p in agent["strategy"])
        title = f"exact points per round in {args.game[0]} against"
        print(f"\n{name} as a memory-one strategy: ({numbers})")
        print(f"  {title:{width}}{args.rounds:>3} rounds  long run")
        for other, points in agent["society"].items():
            note = ""
            if points["depends_on_opening"]:
                note = "  (depends on the opening moves; mean over them)"
            print(f"  {other:{width}}{points['rounds']:10.3f}{points['long_run']:10.3f}{note}")
    if args.json:
        with user_error("--json", OSError):
            args.json.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
