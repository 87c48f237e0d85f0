"""The run folder: what training writes, and how a stopped run continues.

    config.json         all settings and versions; the first file that is written
    metrics.csv         a row per update
    state.safetensors   while training: all that --resume needs (parameters, Adam's moments,
                        generator ...), its JSON in the file's metadata
    adapter_model.safetensors, adapter_config.json, value_head.safetensors, result.json
                        when training has finished
    opponent/, merged/  a learning opponent's adapter; the standalone model of --merge

JSON files and the state are written beside and renamed, metrics.csv is cut to the state: a run
without result.json can be resumed whatever the moment at which it was killed. Nothing is ever
unpickled.
"""

import csv
import errno
import json
import os
import shutil
import sys
import time
from contextlib import contextmanager

from envs import ILLEGAL, C, by_state
from program import beside, check_replaceable, is_first

WRITTEN = (
    "config.json metrics.csv state.safetensors adapter_model.safetensors adapter_config.json "
    "value_head.safetensors result.json opponent merged"
).split()
LOCK = ".lock"
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # errors of a file system without locks
SETTINGS = (  # what others read of config.json
    "model dtype reward then switch opponent game payoffs actions layout prompt seed sampling rank "
    "alpha targets xi versions"
).split()


def read_config(run):
    """The settings of a run folder. Raises ValueError where it is none."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        for key in SETTINGS:
            config[key]  # a KeyError where it is missing
        return config
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{run} is not a run folder of train.py ({reason})") from None


def config_on(model, run):
    """The settings of a run, which must have this base model. Raises ValueError."""
    config = read_config(run)
    if config["model"] != model:
        raise ValueError(f"{run} was trained on {config['model']}, not on {model}")
    return config


def check_written(out):
    """Raise OSError where something in a folder is not what training could have written there."""
    for name in WRITTEN:
        check_replaceable(out / name, folder=name in ("opponent", "merged"))


def check_out(out, overwrite):
    """Raise ValueError or OSError unless `out` is free, or a run folder that may be replaced."""
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: choose another folder, or give --overwrite to replace it")
    check_written(out)  # before any of it is read: a FIFO would never end
    ours = {LOCK, "config.json.tmp"}  # what is left where a run could not even begin
    if out.exists() and not (out.is_dir() and set(os.listdir(out)) <= ours):
        read_config(out)


def load_value_head(value_head, folder):
    """Raises OSError or ValueError where the file is missing, damaged or of another width."""
    from lora import read_tensors

    tensors = read_tensors(folder / "value_head.safetensors")
    try:
        value_head.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"cannot read the value head in {folder}: {error}") from None


@contextmanager
def replacing(path):
    """A path beside `path`, renamed to it at the end of the block: a whole file, or none.

    Raises OSError where it is not a regular file that would be replaced.
    """
    check_replaceable(path)
    yield beside(path)
    beside(path).replace(path)


def write_json(path, content):
    with replacing(path) as new:
        new.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


class RunFolder:
    """A run that is being written.

    path:     the folder;  settings: what config.json holds
    learners: the ppo.Learners, whose state is saved
    """

    def __init__(self, path, settings, learners):
        self.path, self.settings, self.learners = path, settings, learners
        self.started, self.earlier_seconds = time.perf_counter(), 0

    @property
    def seconds(self):
        """Spent on this run so far, those before an interruption included."""
        return self.earlier_seconds + time.perf_counter() - self.started

    @contextmanager
    def locked(self):
        """Make the folder and hold its lock, which ends with the process.

        Raises OSError where another process holds it. Where the file system knows no locks there
        is a warning instead.
        """
        from filelock import FileLock, Timeout

        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise OSError(f"another process is training in {self.path}") from None
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            print(f"warning: no lock can be held in {self.path}: {error}", file=sys.stderr)
        try:
            yield
        finally:
            lock.release()

    def hint(self):
        """How to go on after an error: said only where there is something to go on from."""
        if not (self.path / "state.safetensors").exists():
            return ""
        return f"what was saved is kept: python train.py --resume {self.path}"

    def create(self):
        """Take away what train.py wrote for an earlier run, and nothing else; start anew.

        Returns the state of a run at its start.
        """
        for name in WRITTEN:
            path = self.path / name
            beside(path).unlink(missing_ok=True)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        write_json(self.path / "config.json", self.settings)
        (self.path / "metrics.csv").touch()
        return {}

    def log(self, row):
        """Add a dict of numbers and strings to metrics.csv; the first one's keys are the header."""
        shown = {}
        for key, value in row.items():
            shown[key] = value if isinstance(value, int | str) else f"{value:.6g}"
        with open(self.path / "metrics.csv", "a+", newline="", encoding="utf-8") as file:
            file.seek(0)
            header = next(csv.reader(file), list(shown))
            if set(header) != set(shown):
                raise ValueError("a row with other columns than metrics.csv has")
            writer = csv.DictWriter(file, header, lineterminator="\n")
            if file.seek(0, os.SEEK_END) == 0:
                writer.writeheader()
            writer.writerow(shown)

    def save_state(self, before, rng, updates):
        """All that `load_state` needs, in one file.

        before: the players as they were before training;  rng: numpy's;  updates: done so far
        """
        from lora import write_tensors

        tensors, numbers = {}, []
        for i, learner in enumerate(self.learners):
            own_tensors, own_numbers = learner.state()
            numbers.append(own_numbers)
            for key, value in own_tensors.items():
                tensors[f"{i}.{key}"] = value.cpu().contiguous()
        content = {
            "settings": self.settings,
            "updates": updates,
            "rng": rng.bit_generator.state,
            "learners": numbers,
            "before": [player.tolist() for player in before],
            "seconds": self.seconds,
        }
        with replacing(self.path / "state.safetensors") as new:
            write_tensors(new, tensors, {"json": json.dumps(content, allow_nan=False)})

    def load_state(self, source):
        """Put the learners where the state in the folder `source` was, cut metrics.csv to it.

        Returns the rest of the state. Raises ValueError or OSError.
        """
        from safetensors import SafetensorError, safe_open

        from lora import read_tensors

        path = source / "state.safetensors"
        try:
            tensors = read_tensors(path)
            with safe_open(path, "pt") as file:
                state = json.loads(file.metadata()["json"])
            self.check_settings(state["settings"])
            for i, learner in enumerate(self.learners):
                mark = f"{i}."
                own = {k.removeprefix(mark): v for k, v in tensors.items() if k.startswith(mark)}
                learner.load_state(own, state["learners"][i])
            count = state["updates"] + 1 if state["updates"] else 0  # the header is a line, too
            lines = (
                (source / "metrics.csv")
                .read_text(encoding="utf-8")
                .splitlines(keepends=True)[:count]
            )
            if len(lines) != count:
                raise ValueError(f"metrics.csv has fewer than the {count} lines of the saved state")
        except FileNotFoundError as error:
            raise ValueError(f"{error.filename or path} is not there") from None
        except (SafetensorError, LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"cannot continue from {path}: {error}") from None
        with replacing(self.path / "metrics.csv") as new:
            new.write_text("".join(lines), encoding="utf-8")
        self.earlier_seconds = state["seconds"]
        return state

    def check_settings(self, saved):
        """Raise ValueError where a state was saved with other settings than config.json's."""
        if saved.get("base") != self.settings["base"]:
            raise ValueError(f"the weights of {self.settings['model']} are no longer the same")
        for key, value in self.settings.items():
            if key != "versions" and saved.get(key) != value:
                raise ValueError(
                    f"it was saved with {key}={saved.get(key)}, config.json has {value}"
                )

    def finish(self, agents, before, after, merge):
        """Write what remains of a finished run; then the state is no longer needed.

        agents:        those that learned, the player first
        before, after: their probabilities [state, order, outcome]
        merge:         also save a standalone model
        Returns the seconds that training took.
        """
        from lora import merge_adapter, save_adapter, write_tensors

        seconds = round(self.seconds, 2)
        for agent, folder in zip(agents, (self.path, self.path / "opponent")):
            folder.mkdir(exist_ok=True)
            save_adapter(agent.model, agent.name, folder)
            write_tensors(folder / "value_head.safetensors", agent.value_head.state_dict())
            if folder != self.path:  # to be read by evaluate.py like any other
                write_json(folder / "config.json", {**self.settings, "side": "opponent"})
        if merge and is_first():  # torchrun: one copy is enough
            merge_adapter(agents[0].model, agents[0].name)
            agents[0].model.save_pretrained(self.path / "merged")
            agents[0].tokenizer.save_pretrained(self.path / "merged")
            for path in (self.path / "merged").iterdir():  # safetensors shuts others out
                path.chmod((self.path / "config.json").stat().st_mode)
        result = {key: self.settings[key] for key in ("reward", "then") if self.settings[key]}
        result["opponent"] = " ".join(self.settings["opponent"])
        result |= {"seed": self.settings["seed"], "seconds": seconds}
        for side, untuned, trained in zip(("", "opponent_"), before, after):
            for kind, outcome in (("policy", C), ("illegal", ILLEGAL)):
                result[f"{side}{kind}_before"] = by_state(untuned, outcome)
                result[f"{side}{kind}_after"] = by_state(trained, outcome)
        write_json(self.path / "result.json", result)
        # Not there where torchrun's other processes write, unless it was saved since --resume.
        (self.path / "state.safetensors").unlink(missing_ok=True)
        return seconds
