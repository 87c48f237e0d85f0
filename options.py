"""The command line of train.py: what a user may type, and what is wrong with it."""

import platform
import sys
from pathlib import Path

import numpy

from envs import GAMES, STRATEGIES, memory_one, own_game
from program import number, program_parser, user_error
from prompts import LAYOUTS, NAMES, TEMPLATES, action_names, check_names
from rewards import REWARDS
from runs import check_out, check_written, read_config

# Settings of the embedded model, of any other one, and the paper's (--paper, for any model).
# None on the command line means: take them from here; None here means never.
DEFAULTS = {
    "until": (None, 0.97, None),
    "sampling": ("constrained", "free", "free"),
    "episodes": (25600, 8192, 1000),
    "batch": (256, 256, 1),
    "lr": (3e-3, 3e-4, 1.41e-5),
    "rank": (8, 16, 64),
    "alpha": (16.0, 32.0, 32.0),
    "epochs": (2, 1, 4),
    "kl_coef": (0.5, 0.2, 0.2),
}


count, positive = number(int, 1, 10**9), number(float, 0, above=True)
non_negative = number(float, 0)


def train_parser(description):
    parser = program_parser("train.py", description)

    def option(flag, help, **kwargs):
        key = flag[2:].replace("-", "_")
        if kwargs.get("default") is not None:
            default = kwargs["default"]
            shown = " ".join(default) if isinstance(default, list) else default
            help += f" [{shown}]"
        elif key in DEFAULTS:
            shown = ["never" if value is None else value for value in DEFAULTS[key]]
            help += " [embedded model {}, any other {}, --paper {}]".format(*shown)
        parser.add_argument(flag, help=help, **kwargs)

    # What is learned, from whom.
    listed = {"nargs": "+"}
    option("--reward", "what the agent is trained for", choices=REWARDS)
    option(
        "--then", "rewards of further phases (unlearning)", **listed, choices=REWARDS, default=[]
    )
    option("--switch", "first episodes of these [phases of equal length]", **listed, type=count)
    option("--model", "'tiny' (embedded), a folder, or a name on the hub", default="tiny")
    help = f"{', '.join(GAMES)}; or 'random', fresh points from 0 to 9 in every update"
    games = [*GAMES, "random"]
    option("--game", help, **listed, choices=games, metavar="GAME", default=["ipd"])
    help = "instead of --game: points of C and C, own first, then of C and D, D and C, D and D"
    option("--payoffs", help, nargs=8, type=number(int), metavar="POINTS")
    help = (
        f"one of {', '.join(STRATEGIES)}; four numbers P(C | CC CD DC DD); 'learner', a second "
        "agent that is trained, too; or a run folder, whose agent stays as it is"
    )
    option("--opponent", help, **listed, default=["tit-for-tat"])

    # What is read and answered.
    help = (
        "constrained: the answer is always one of the two names, and nothing keeps the model from "
        "drifting in all other texts; free: it may be any text, and what is no name is illegal"
    )
    option("--sampling", help, choices=("constrained", "free"))
    help = (
        "the names of C and of D; more names: every update draws two of them, in either role; "
        f"'random': out of {len(NAMES)} built-in ones"
    )
    option("--actions", help, **listed, metavar="NAME", default=["action1", "action2"])
    help = f"order of the payoff matrix' rows and columns: {', '.join(LAYOUTS)}"
    option("--layout", help, **listed, choices=LAYOUTS, metavar="LAYOUT", default=["original"])
    help = f"wording: {', '.join(TEMPLATES)}"
    option("--prompt", help, **listed, choices=TEMPLATES, metavar="WORDING", default=["structured"])

    # How much is played, and what it earns.
    option("--paper", "the paper's settings: 1000 updates of one episode", action="store_true")
    option("--episodes", "how many games are played in all", type=count)
    option("--batch", "episodes per update", type=count)
    help = "stop once the better action has more than this mean probability; 1: never"
    option("--until", help, type=number(float, 0, 1, above=True), metavar="ACCURACY")
    option("--rounds", "rounds per episode", type=count, default=5)
    option("--xi", "penalty for betraying a cooperator, points", type=non_negative, default=3.0)
    option("--illegal", "reward of an illegal answer, points", type=number(float), default=-6.0)
    help = "train for own points + this weight times the reward [the reward alone]"
    option("--moral-weight", help, type=non_negative, metavar="WEIGHT")

    # LoRA and PPO.
    option("--lr", "Adam's learning rate", type=positive)
    option("--rank", "of the LoRA adapter", type=number(int, 1, 10**5))
    option("--alpha", "of the LoRA adapter: it is scaled by alpha / rank", type=positive)
    help = "adapted linear layers, such as q_proj [all but the output head]"
    option("--targets", help, **listed, metavar="LAYER")
    option("--epochs", "optimizer steps per update", type=count)
    option("--clip", "PPO's clip of the ratio and of the value", type=positive, default=0.2)
    option("--kl-coef", "beta, the weight of the KL penalty at the start", type=non_negative)
    help = "KL in nats to which beta adapts; while KL is below it, beta falls"
    option("--kl-target", help, type=positive, default=6.0)
    option("--kl-fixed", "beta stays as it is", action="store_true")
    option("--vf-coef", "weight of the value loss", type=non_negative, default=0.1)
    discount = number(float, 0, 1)
    option("--gamma", "discount; 0: each round is its own sample", type=discount, default=0.0)

    # Where and how it runs.
    option("--seed", "of everything random", type=number(int, 0, 2**63), default=1)
    option("--device", "cpu, cuda, mps ... [cuda where there is one]")
    dtypes = ("float32", "bfloat16", "float16")
    option("--dtype", "of the frozen base [bfloat16 on cuda, else float32]", choices=dtypes)
    help = "at most so many tokens in one pass; more prompts take several passes [one pass]"
    option("--nodes", help, type=count)
    help = "recompute each layer in the backward pass: less memory, half as much work again"
    option("--checkpointing", help, action="store_true")
    option("--init", "start from the adapter and value head of this run folder", type=Path)
    option("--save-every", "updates between saved states", type=count, default=10)
    help = "continue the interrupted run in this folder; its settings are all taken from there"
    option("--resume", help, type=Path)
    option("--out", "the run folder [runs/REWARD-vs-OPPONENT-seedN]", type=Path)
    option("--overwrite", "replace the run folder if it exists", action="store_true")
    help = "also save a standalone model with the adapter merged in, in the run folder's merged/"
    option("--merge", help, action="store_true")
    return parser


def parse_train(description, argv=None):
    """All settings of a run, complete: nothing is changed in them from here on.

    What can be checked without the model is checked; a wrong input ends the program.
    """
    parser = train_parser(description)
    args = parser.parse_args(argv)
    resume = args.resume
    if resume:
        with user_error("--resume", ValueError, OSError):
            words = resumed_options(resume, sys.argv[1:] if argv is None else argv)
        args = parser.parse_args(words)
        args.resume = args.out = resume
    if args.reward is None:
        parser.error("the following arguments are required: --reward")
    set_defaults(parser, args)
    with user_error("--opponent"):
        opponent_strategy(args.opponent)
    with user_error("--actions"):
        check_names(action_names(args.actions))
    if args.batch * args.rounds == 1:
        parser.error(
            "--batch: an update of one round has no advantage to learn from: raise --batch or "
            "--rounds"
        )
    if args.payoffs and args.game != ["ipd"]:
        parser.error("--payoffs: it is the game: leave --game out")
    with user_error("--switch" if args.switch else "--episodes"):
        args.switch = phase_starts(args)[1:]
    if args.out is None:
        rewards = "-then-".join([args.reward, *args.then])
        opponent = "-".join(Path(word).name for word in args.opponent)
        args.out = Path("runs") / f"{rewards}-vs-{opponent}-seed{args.seed}"
    if not resume:
        with user_error("--out", ValueError, OSError):
            check_out(args.out, args.overwrite)
    # torch is imported here and not above: --help and a bad option answer at once.
    from models import default_device

    args.device = args.device or default_device()
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args


def set_defaults(parser, args):
    """Fill in what is not on the command line and depends on the model."""
    games, names, layouts, wordings = choices(args)
    drawn = games == ["random"] or len(names) > 2 or max(map(len, (games, layouts, wordings))) > 1
    endless = drawn or args.gamma > 0  # then one update's accuracy does not tell what is learned
    if args.until and endless:
        parser.error("--until: not with --gamma, nor where games, names, layouts or wordings vary")
    for key, (embedded, other, paper) in DEFAULTS.items():
        if getattr(args, key) is None:
            own = embedded if args.model == "tiny" else other
            setattr(args, key, paper if args.paper else own)
    if endless:
        args.until = None


def choices(args):
    """What an update's condition is drawn from: games, names, layouts and wordings."""
    games = [own_game(args.payoffs)] if args.payoffs else args.game
    return games, action_names(args.actions), args.layout, args.prompt


def run_settings(args, base):
    """What config.json holds: the settings as they are, and the versions. Prints the former.

    base: `lora.base_fingerprint` of the model
    """
    import torch
    import transformers

    settings = {}
    for key, value in vars(args).items():
        if key not in ("resume", "out", "overwrite"):
            settings[key] = str(value) if isinstance(value, Path) else value
    shown = []
    for key, value in settings.items():
        if value not in (None, []):
            words = " ".join(map(str, value)) if isinstance(value, list) else value
            shown.append(f"{key.replace('_', '-')}={words}")
    print("  ".join(shown))
    settings["base"] = base
    settings["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
    }
    return settings


def phase_starts(args):
    """The first episode of each phase.

    Raises ValueError unless each phase has an update of its own.
    """
    phases = len(args.then) + 1
    starts = [0, *(args.switch or [args.episodes * i // phases for i in range(1, phases)])]
    updates = [-(-episode // args.batch) for episode in (*starts, args.episodes)]
    if len(starts) != phases or updates != sorted(set(updates)):
        raise ValueError(
            f"each of the {phases} phases needs an update of its own: one episode for each reward "
            f"of --then, rising, between 0 and {args.episodes}, in different batches of "
            f"{args.batch}"
        )
    return starts


def parse_strategy(words):
    """One name of STRATEGIES or four numbers -> four floats. Raises ValueError."""
    if len(words) == 1 and words[0] in STRATEGIES:
        return STRATEGIES[words[0]]
    try:
        strategy = tuple(float(word) for word in words)
    except ValueError:
        raise ValueError(
            f"'{' '.join(words)}' is neither one of {', '.join(STRATEGIES)} nor four numbers"
        ) from None
    memory_one(strategy)
    return strategy


def is_run(words):
    """Whether an opponent is given as a run folder."""
    return len(words) == 1 and words[0] not in STRATEGIES and Path(words[0]).is_dir()


def opponent_strategy(words):
    """Four numbers of a fixed opponent, None for a learner or a run folder. Raises ValueError."""
    if words == ["learner"]:
        return None
    if is_run(words):
        read_config(Path(words[0]))
        return None
    try:
        return parse_strategy(words)
    except ValueError as error:
        more = "; nor is it 'learner' or a run folder" if len(words) == 1 else ""
        raise ValueError(f"{error}{more}") from None


def resumed_options(run, argv):
    """The command line of an interrupted run, from its config.json.

    argv: what was typed, which may have nothing beside --resume
    Raises ValueError or OSError where the run cannot be continued.
    """
    typed = {word.split("=")[0] for word in argv if word.startswith("--")}
    if typed != {"--resume"}:
        raise ValueError("it takes all settings from the run: leave the other options out")
    check_written(run)
    if (run / "result.json").exists():
        raise ValueError(f"{run} is finished")
    words = []
    for key, value in read_config(run).items():
        option = "--" + key.replace("_", "-")
        if key in ("base", "versions") or value is None or value is False or value == []:
            continue
        if value is True:
            words += [option]
        elif isinstance(value, list):
            words += [option, *map(str, value)]
        else:
            words += [f"{option}={value}"]
    return words
