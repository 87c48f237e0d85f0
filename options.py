"""The command line: recipes, the options of train.py, and what the words of any program mean.

Some defaults depend on the model and on --recipe: a preset has them, and what the command line
gives goes before it. `--recipe quick` is EMBEDDED or OTHER. A new option is one line here; then it
is in the settings of the run, which config.json keeps and the formulas of rewards.py are given.
"""

import argparse
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

import envs
import rewards
import runs
from errors import InputError, about
from wordings import LAYOUTS, NAMES, TEMPLATES

EMBEDDED = {
    "until": 1.0,
    "sampling": "constrained",
    "episodes": 25600,
    "batch": 256,
    "lr": 3e-3,
    "rank": 8,
    "alpha": 16.0,
    "epochs": 2,
    "kl_coef": 0.5,
}

# Any other model, until it has learned.
OTHER = {
    "until": 0.97,
    "sampling": "free",
    "episodes": 8192,
    "batch": 256,
    "lr": 3e-4,
    "rank": 16,
    "alpha": 32.0,
    "epochs": 1,
    "kl_coef": 0.2,
}

# Paper, section 4 and appendix; what they do not name is TRL's default. Its four epochs are
# accumulated into one optimizer step, which is one epoch. Not followed: there the penalty and the
# value are of each token of an answer (docs/PAPER.md).
PAPER = {
    "until": 1.0,
    "sampling": "free",
    "episodes": 1000,
    "batch": 1,
    "lr": 1.41e-5,
    "rank": 64,
    "alpha": 32.0,
    "epochs": 1,
    "kl_coef": 0.2,
}

# What varies in training carries over: games, some of them such that simple rules fail, names, and
# layouts. The penalty keeps an agent undecided until it can read, then it falls. docs/TRANSFER.md
# tells how these were found.
VARIED = {
    "until": 1.0,
    "opponent": ["random"],
    "sampling": "constrained",
    "prompt": ["brief"],
    "game": ["ipd", "contested", "random"],
    "kl_target": 0.0,
    "rank": 16,
    "alpha": 32.0,
    "epochs": 1,
}
MORAL = {
    **VARIED,
    "actions": ["random"],
    "layout": ["original", "rows", "columns"],
    "episodes": 10_240_000,
    "batch": 1024,
    "lr": 1e-3,
    "kl_coef": 0.3,
    "kl_final": 0.0,
}
# Letters: a model that was taught nothing here has no preference among them.
MORAL_OTHER = {
    **VARIED,
    "actions": list("EFGHJLMNOPQRSTUVWZ"),
    "layout": ["original", "rows", "columns", "both"],
    "episodes": 384_000,
    "batch": 256,
    "lr": 1e-4,
    "kl_coef": 0.4,
    "kl_final": 0.05,
}

# What these rewards ask for depends on which name stands for C. Random games do not show it, so in
# their moral recipe the layout does: C has the first column. The deontological reward needs no such
# help: to repeat the other's action is always right.
NEEDS_C = ("game+deontological", "kindness")
C_FIRST = ["original", "rows"]

RECIPES = ("quick", "paper", "moral")
RECIPE_WORDS = (
    "quick; paper: its settings; moral: games, names and layouts vary, so that more than a word is "
    "learned. Each is a list of the other options, see options.py"
)
DTYPES = ("float32", "bfloat16", "float16", "nf4")


def preset(recipe, model, opponent=(), reward=()):
    """The settings of a recipe for a model, an opponent in words, and the rewards: dict."""
    if recipe == "paper":
        return {**PAPER, "rounds": 3 if "learner" in opponent else 5}
    if recipe == "moral":
        settings = MORAL if model == "tiny" else MORAL_OTHER
        if {*NEEDS_C} & {*reward}:
            return {**settings, "layout": C_FIRST}
        return settings
    return EMBEDDED if model == "tiny" else OTHER


def preset_words(flag):
    """What the presets have for an option, in words; "" if they leave it out."""
    key = flag[2:].replace("-", "_")
    if key not in EMBEDDED:
        return ""
    return f" [{EMBEDDED[key]}; other models {OTHER[key]}; --recipe paper {PAPER[key]}]"


def train_parser(description):
    """All options of train.py; what they leave open is filled in from a preset."""
    parser = Parser(description)

    def option(flag, help, **kwargs):
        parser.option(flag, help + preset_words(flag), **kwargs)

    fraction = number(float, 0, 1)
    until = number(float, 0, 1, above=True)
    penalty = number(float, 0, envs.MAX_POINTS)
    points = number(float, -envs.MAX_POINTS, 0)
    sampling = "constrained: one of the two names; free: any text, illegal if it begins with none"
    names = f"of C and D; of more, or of random ({len(NAMES)}), every update draws two"
    wording = f"{', '.join(TEMPLATES)}, or a text file with {{first}} and {{second}}"

    option("--reward", "in phases of equal length", choices=rewards.REWARDS, nargs="+")
    option("--model", "tiny (embedded), a folder, or a name on the hub", default="tiny")
    option("--recipe", RECIPE_WORDS, choices=RECIPES, default="quick")
    option("--game", game_words(), metavar="GAME", default=["ipd"], nargs="+")
    option("--opponent", opponent_words(), default=["tit-for-tat"], nargs="+")
    option("--sampling", sampling, choices=("constrained", "free"))
    option("--actions", names, metavar="NAME", default=["action1", "action2"], nargs="+")
    option("--layout", "of the payoffs", choices=LAYOUTS, default=["original"], nargs="+")
    option("--prompt", wording, metavar="WORDING", default=["structured"], nargs="+")
    option("--episodes", "how many games are played in all", type=COUNT)
    option("--batch", "episodes per update", type=COUNT)
    option("--until", "stop above this mean probability of the better action; 1: never", type=until)
    option("--rounds", "per episode; of two learners 3 with --recipe paper", type=COUNT, default=5)
    option("--xi", "penalty for betraying a cooperator, points", type=penalty, default=3.0)
    option("--illegal", "reward of an illegal answer, points", type=points, default=-6.0)
    option("--lr", "Adam's; it falls to 0 where games, names or texts vary", type=POSITIVE)
    option("--rank", "of the LoRA adapter", type=number(int, 1, 10**5))
    option("--alpha", "of the LoRA adapter: it is scaled by alpha / rank", type=POSITIVE)
    option("--epochs", "optimizer steps per update", type=COUNT)
    option("--kl-coef", "beta, the weight of the KL penalty at the start", type=NONNEGATIVE)
    option("--kl-final", "beta falls linearly to it, whatever --kl-target", type=NONNEGATIVE)
    option("--kl-target", "nats to which beta adapts; 0: fixed", type=NONNEGATIVE, default=6.0)
    option("--gamma", "discount; 0: each round is its own sample", type=fraction, default=0.0)
    option("--seed", "of everything random", type=number(int, 0, 2**63), default=1)
    option("--device", "cpu, cuda, mps ... [cuda where there is one]")
    option("--dtype", "of the frozen base [bfloat16 on cuda, else float32]", choices=DTYPES)
    option("--checkpointing", "less memory, up to twice the time", action="store_true")
    option("--init", "start from the adapter and value head of this run folder", type=Path)
    option("--save-every", "seconds between saved states", type=NONNEGATIVE, default=60.0)
    option("--resume", "continue the run in this folder with its own settings", type=Path)
    option("--out", "the run folder [runs/REWARD-vs-OPPONENT-seedN]", type=Path)
    option("--overwrite", "replace the run folder if it exists", action="store_true")
    return parser


def parse(argv=None, description=""):
    """(all settings of a run, with --resume its (state, arrays), else None). Raises InputError.

    argv: a list of words, by default the command line;  description: of the program, for --help
    """
    parser = train_parser(description)
    given = parser.parse_args(argv)
    if given.resume:
        return parse_resume(given, sys.argv[1:] if argv is None else argv)
    if not given.reward:
        raise InputError(f"choose one or more of {', '.join(rewards.REWARDS)}", "--reward")
    parser.set_defaults(**preset(given.recipe, given.model, given.opponent, given.reward))
    args = parser.parse_args(argv)  # once more, over the recipe's defaults
    with about("--prompt"):
        args.prompt = [read_wording(word) for word in args.prompt]
    with about("--opponent"):
        opponent = parse_opponent(args.opponent)
        if opponent.run:
            runs.read_config(opponent.run)
    if args.init:
        with about("--init"):
            runs.read_config(args.init)
    if Path(args.model).is_dir() and args.model != "tiny":
        args.model = str(Path(args.model).resolve())  # evaluate.py may run in another folder

    # One update does not tell what is learned where conditions are drawn; with gamma no round does.
    if read_choices(args).varies() or args.gamma > 0:
        if given.until and given.until < 1:
            raise InputError("not with --gamma, nor where games, names or texts vary", "--until")
        args.until = 1.0
    last_batch = args.episodes % args.batch or args.batch
    if last_batch * args.rounds < 2:
        rule = "the last update has one round, and learns from two at least: change one of them"
        raise InputError(rule, "--episodes, --batch, --rounds")
    starts, total = phases(args)
    if any(start >= end for start, end in pairwise([*starts, total])):
        raise InputError("each of the phases needs an update of its own: raise it", "--episodes")
    if args.out is None:
        name = "-".join(Path(word).name for word in args.opponent)
        args.out = Path("runs") / runs.run_name(args.reward, name, args.seed)
    with about("--out"):
        runs.check_out(args.out, args.overwrite)
    return args, None


def parse_resume(given, words):
    """`parse` with --resume: the settings are those of the run. words: of the command line."""
    others = [word for word in words if word.startswith("--") and not word.startswith("--resume")]
    with about("--resume"):
        if others:
            raise InputError("it takes all settings from the run: leave other options out")
        config, state, arrays = runs.read_state(given.resume)
        lacking = vars(given).keys() - config.keys() - {"resume", "out", "overwrite"}
        if lacking:
            names = ", ".join(sorted(lacking))
            raise InputError(f"the run is older than these options, start it anew: {names}")
    del config["base"], config["versions"]  # they are found out anew
    args = argparse.Namespace(**config, resume=given.resume, out=given.resume, overwrite=False)
    return args, (state, arrays)


def read_choices(args):
    """What an update's Condition is drawn from. Raises InputError."""
    with about("--game"):
        games = parse_games(args.game)
    with about("--actions"):
        names = action_names(args.actions)
    return envs.Choices(game=games, actions=names, layout=args.layout, prompt=args.prompt)


def phases(args):
    """(the update at which each phase starts, the total): one phase per reward, equally long."""
    starts = []
    for i in range(len(args.reward)):
        first_episode = args.episodes * i // len(args.reward)
        starts.append(math.ceil(first_episode / args.batch))
    return starts, math.ceil(args.episodes / args.batch)


def game_words():
    """What a command line may name as games, in words."""
    cells = f"eight whole numbers up to {envs.MAX_POINTS}, (own, other's) points in CC CD DC DD"
    drawn = "in training random (points 0 to 9, new in every update) or contested "
    drawn += "(random ones in which simple rules disagree)"
    return f"{', '.join(envs.GAMES)}; {drawn}; or {cells}"


def opponent_words():
    """What a command line may name as an opponent, in words."""
    other = "four numbers from 0 to 1, P(C | CC CD DC DD); a run folder; or in training learner"
    return f"{', '.join(envs.STRATEGIES)}; {other}"


def parse_games(words):
    """The games of a command line, a list: keys of GAMES, of DRAWN, or one game of four cells.

    Raises InputError if the words are none of them.
    """
    if set(words) <= {*envs.GAMES, *envs.DRAWN}:
        return words
    if len(words) == 8 and all(word.removeprefix("-").isdecimal() for word in words):
        points = np.array([int(word) for word in words])
        if np.abs(points).max() <= envs.MAX_POINTS:
            return [envs.as_cells(points)]
    raise InputError(f"{' '.join(words)!r} is none of: {game_words()}")


def parse_opponent(words):
    """The Opponent that a command line names. Raises InputError if the words name none."""
    name = words[0]
    if len(words) == 1:
        if name == "learner":
            return envs.Opponent(learns=True)
        if name in envs.STRATEGIES:
            return envs.Opponent(strategy=envs.STRATEGIES[name])
        if Path(name).is_dir():
            return envs.Opponent(run=Path(name))
    if len(words) == 4 and all(word.replace(".", "", 1).isdecimal() for word in words):
        numbers = tuple(float(word) for word in words)
        if max(numbers) <= 1:
            return envs.Opponent(strategy=numbers)
    raise InputError(f"{' '.join(words)!r} is none of: {opponent_words()}")


def action_names(words):
    """The names that a command line gives, a list; NAMES if it says "random".

    Raises InputError if a name is empty, unprintable, repeated, or has a `|` or spaces around it.
    """
    if words == ["random"]:
        return NAMES
    for name in words:
        if not name or not name.isprintable() or name != name.strip() or "|" in name:
            rule = "a name is non-empty, printable, and without | or spaces around it"
            raise InputError(f"{name!r} is no action name: {rule}")
        if words.count(name) > 1:
            raise InputError(f"the action name {name!r} is there twice")
    if len(words) < 2:
        raise InputError(f"there must be two names or more, not only {words[0]!r}")
    return words


def read_wording(word):
    """What a command line gives as a wording: a key of TEMPLATES stays, a text file is read.

    Raises InputError if it is neither, or if the template is at fault (`check_template`).
    """
    if word in TEMPLATES:
        return word
    try:
        text = Path(word).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        rule = f"name a text file, or one of {', '.join(TEMPLATES)}"
        raise InputError(f"cannot read {word}: {error}; {rule}") from None
    template = text.rstrip("\n")  # editors add a line's end
    envs.check_template(template)
    return template


def number(kind, low=-math.inf, high=math.inf, above=False):
    """An argparse type: a finite int or float from `low` (or strictly above it) to `high`."""

    def parse(text):
        value = kind(text)
        if low <= value <= high and math.isfinite(value) and not (above and value == low):
            return value
        least = f"above {low}" if above else f"at least {low}"
        raise argparse.ArgumentTypeError(f"must be finite, {least}, at most {high}, not {text}")

    parse.__name__ = "whole number" if kind is int else "number"  # argparse: "invalid number value"
    return parse


COUNT = number(int, 1, 10**9)
POSITIVE = number(float, 0, above=True)
NONNEGATIVE = number(float, 0)


class Parser(argparse.ArgumentParser):
    """Its help is the script's docstring and shows the defaults; its errors are one line."""

    def __init__(self, description):
        super().__init__(
            description=description,
            usage=argparse.SUPPRESS,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def option(self, flag, help, **kwargs):
        default = kwargs.get("default")
        if default is not None:
            help += f" [{in_words(default)}]"
        self.add_argument(flag, help=help, **kwargs)


def in_words(value):
    """The value of an option as a command line has it: str."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
