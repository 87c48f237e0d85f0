"""Nothing wrong passes silently: model folders, adapters, encodings, the environment, lost files.

Every fault ends in one line that names the option and the true cause, with exit code 2, and nothing
written; or in the figures that the plain computation gives.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import evaluate
import program
import train
from conftest import (
    ROOT,
    change_json,
    copy_run,
    cut_file,
    damaged_model,
    read_json,
    refused,
    run_training,
)
from models import TEMPLATE_DATE, write_chats
from rewards import utilitarian_regret
from runs import RunFolder

SHORT = ["--reward", "utilitarian", "--episodes", "256"]


def change_weights(folder, change):
    """Replace the dict of tensors of a model folder by change(dict)."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def first_matrix(tensors):
    return next(key for key in sorted(tensors) if tensors[key].ndim == 2 and "proj" in key)


def without_first(tensors):
    return {key: tensor for key, tensor in tensors.items() if key != first_matrix(tensors)}


def narrow_first(tensors):
    return {**tensors, first_matrix(tensors): tensors[first_matrix(tensors)][:, :-1].contiguous()}


def poisoned(tensors):
    return {key: tensor * float("nan") for key, tensor in tensors.items()}


def template(text):
    def write(folder):
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")

    return write


def weights(change):
    return lambda folder: change_weights(folder, change)


def config(**changes):
    return lambda folder: change_json(folder / "config.json", **changes)


def other_class(kind):
    """Weights of another class of model, with the embedded model's tokenizer."""

    def write(folder):
        torch.manual_seed(0)
        size = {"vocab_size": len(AutoTokenizer.from_pretrained(ROOT / "tiny"))}
        if kind == "bert":  # sees what comes after, too
            layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
            model = BertLMHeadModel(BertConfig(**size, **layers, hidden_size=32))
        elif kind == "bart":  # counts its positions itself
            layers = {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
            model = BartForCausalLM(BartConfig(**size, **layers, d_model=32, init_std=0.3))
        else:  # "untied": an output head of its own
            layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
            model = LlamaForCausalLM(LlamaConfig(**size, **layers, hidden_size=32))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder)
        if kind == "untied":
            change_weights(folder, lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"})

    return write


def code_of_its_own(folder):
    mark = folder.parent / "executed"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change_json(folder / "config.json", model_type="unheard-of", auto_map=auto)


def adapter_inside(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def small_vocabulary(tensors):
    cut = {"model.embed_tokens.weight", "lm_head.weight"}
    return {k: v[:400].contiguous() if k in cut else v for k, v in tensors.items()}


def fewer_embeddings(folder):
    change_weights(folder, small_vocabulary)
    change_json(folder / "config.json", vocab_size=400)


def appends_a_token(folder):
    (folder / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    token, number = tokenizer.eos_token, tokenizer.eos_token_id
    after = processors.TemplateProcessing(single=f"$A {token}", special_tokens=[(token, number)])
    tokenizer.backend_tokenizer.post_processor = after
    tokenizer.save_pretrained(folder)


def missing_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    tensors = load_file(folder / "model-00001-of-00002.safetensors")
    places = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    places["model.norm.weight"] = "model-00002-of-00002.safetensors"
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


TURN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
MODELS = {  # what is done to a model folder -> words of the line that refuses it
    "a weight is missing": (weights(without_first), ["lack", "proj"]),
    "an untied head is missing": (other_class("untied"), ["lack lm_head.weight"]),
    "all keys have a prefix": (
        weights(lambda t: {f"base_model.model.{k}": v for k, v in t.items()}),
        ["lack"],
    ),
    "another shape": (weights(narrow_first), ["proj"]),
    "more layers than weights": (
        config(num_hidden_layers=7, layer_types=["full_attention"] * 7),
        ["lack", "layers.6"],
    ),
    "a shard is missing": (missing_shard, ["00002"]),
    "weights that are not finite": (weights(poisoned), ["not finite", "weights"]),
    "an encoder": (other_class("bert"), ["nats", "causal"]),
    "positions of its own": (other_class("bart"), ["nats", "positions"]),
    "code in the folder": (code_of_its_own, ["code of its own"]),
    "an adapter in the folder": (adapter_inside, ["holds an adapter"]),
    "the tokenizer of a larger model": (fewer_embeddings, ["tokenizer", "another model"]),
    "a tokenizer that appends a token": (appends_a_token, ["appends"]),
    "a template that wants a system turn": (
        template("{{ raise_exception('a system turn first') }}"),
        ["chat template", "a system turn first"],
    ),
    "a template that is no Jinja": (template("{% for %}"), ["chat template"]),
    "a template that wants lists": (
        template("{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}"),
        ["chat template"],
    ),
    "a template without the user": (
        template("{% for m in messages %}{% if m['role'] != 'user' %}{{ m['content'] }}{% endif %}"
                 "{% endfor %}"),
        ["chat template", "leaves a turn out"],
    ),
    "a template without the assistant": (
        template("{{ messages[0]['content'] }}"),
        ["chat template", "leaves a turn out"],
    ),
    "a template that shouts": (
        template("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"),
        ["chat template", "changes its text"],
    ),
    "a date that cannot be fixed": (
        template("{% set f = '%d' %}{{ strftime_now(f) }}" + TURN),
        ["chat template", "date"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", MODELS)
def test_models(fault, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # "run the code?"
    damage, words = MODELS[fault]
    model = damaged_model(tmp_path / "model", damage)
    with refused(capsys, "--model", *words):
        run_training(tmp_path / "run", *SHORT, "--model", model)
    assert not (tmp_path / "run").exists() and not (tmp_path / "executed").exists()


def test_a_name_that_the_model_cannot_read_is_refused_when_it_is_drawn(capsys, tmp_path, tiny):
    _, tokenizer = tiny
    [token] = tokenizer(" moon", add_special_tokens=False)["input_ids"]

    def poison(tensors):
        tensors["model.embed_tokens.weight"][token] = float("nan")
        return tensors

    model = damaged_model(tmp_path / "model", weights(poison))
    options = ["--actions", "sun", "river", "moon", "--sampling", "constrained", "--batch", "16"]
    with refused(capsys, "--model", "not finite"):
        run_training(tmp_path / "run", *SHORT, "--model", model, *options)
    assert (tmp_path / "run" / "metrics.csv").exists()  # it had begun


def test_the_date_in_a_template_stands_still(tiny):
    _, tokenizer = tiny
    dated = AutoTokenizer.from_pretrained(ROOT / "tiny")
    dated.chat_template = "{{ strftime_now('%d %b %Y') }} " + TURN
    [text] = write_chats(dated, [[{"role": "user", "content": "Hi."}]])
    assert text == TEMPLATE_DATE.strftime("%d %b %Y") + " Hi."
    [same] = write_chats(tokenizer, [[{"role": "user", "content": "Hi."}]])
    assert same == tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi."}], tokenize=False
    )


# ----------------------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one update."""
    out = tmp_path_factory.mktemp("faults") / "run"
    run_training(out, *SHORT)
    return out


KINDS = {
    "init_lora_weights": "pissa",
    "use_dora": True,
    "use_rslora": True,
    "use_qalora": True,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "modules_to_save": ["lm_head"],
    "lora_bias": True,
    "bias": "all",
    "peft_type": "IA3",
    "loftq_config": {"loftq_bits": 4},
    "layer_replication": [[0, 2]],
    "target_parameters": ["experts.weight"],
    "trainable_token_indices": [1],
    "alora_invocation_tokens": [1],
    "eva_config": {"rho": 2},
    "a_kind_of_next_year": "on",
}


@pytest.mark.parametrize("key", KINDS)
def test_adapters_that_are_not_plain_lora(key, run, capsys, tmp_path):
    other = copy_run(run, tmp_path / "other")
    change_json(other / "adapter_config.json", **{key: KINDS[key]})
    with refused(capsys, "RUN", "not plain LoRA", key):
        evaluate.main([str(other)])


def test_what_peft_writes_is_plain_lora(run, capsys, tmp_path):
    """An adapter that PEFT has loaded and saved gives the same figures."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    other = copy_run(run, tmp_path / "other")
    base = AutoModelForCausalLM.from_pretrained(ROOT / "tiny")
    PeftModel.from_pretrained(base, run).save_pretrained(other)
    options = ["--game", "ipd", "--overwrite", "--json", str(tmp_path / "results.json")]
    evaluate.main([str(run), str(other), *options])
    first, second = read_json(tmp_path / "results.json")["runs"]
    for part in ("games", "swapped", "drift"):
        assert first[part] == second[part]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("file", ["adapter_model", "value_head"])
def test_numbers_that_are_not_finite(file, number, run, capsys, tmp_path):
    """Refused at the door, whoever loads them."""
    other = copy_run(run, tmp_path / "other")
    path = other / f"{file}.safetensors"
    tensors = load_file(path)
    key = sorted(tensors)[0]
    tensors[key].flatten()[0] = number
    save_file(tensors, path)
    new = ["--reward", "game", "--out", str(tmp_path / "new")]
    commands = {"--init": lambda: train.main([*new, "--init", str(other)])}
    if file == "adapter_model":
        commands["--opponent"] = lambda: train.main([*new, "--opponent", str(other)])
        commands["RUN"] = lambda: evaluate.main([str(other)])
    for option, command in commands.items():
        with refused(capsys, option, "not finite", path.name, key):
            command()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["[]", "{}", '{"r": 8}', "{"])
def test_adapter_configurations_that_say_nothing(text, run, capsys, tmp_path):
    other = copy_run(run, tmp_path / "other")
    (other / "adapter_config.json").write_text(text)
    with refused(capsys, "RUN", "cannot read the adapter"):
        evaluate.main([str(other)])


def test_other_weights_than_in_training(run, capsys, tmp_path):
    """In evaluation, and on resume."""
    change = weights(lambda tensors: {key: 1.01 * tensor for key, tensor in tensors.items()})
    changed = damaged_model(tmp_path / "model", change)
    with refused(capsys, "RUN", "other weights"):
        evaluate.main([str(copy_run(run, tmp_path / "moved", model=changed))])

    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(RunFolder, "log", stop)
        run_training(tmp_path / "stopped", *SHORT)
    copy_run(tmp_path / "stopped", tmp_path / "again", model=changed)
    with refused(capsys, "--resume", "no longer the same"):
        train.main(["--resume", str(tmp_path / "again")])


# ------------------------------------------------------------------------- encodings and terminals


def in_ascii(*command):
    """A program of the project under a locale that knows nothing but ASCII."""
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    environment = {**os.environ, **plain, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_any_locale(tmp_path):
    """Names, wordings and files in other alphabets; what a terminal lacks is shown by number."""
    wording = tmp_path / "wording.txt"
    wording.write_text("Wähle {first} oder {second}. Your answer:", encoding="utf-8")
    names = ["a", "b"]
    done = in_ascii("train.py", *SHORT, "--actions", *names, "--out", tmp_path / "ä")
    assert done.returncode == 0, done.stderr
    options = ["--prompt-file", wording, "--actions", *names, "--game", "ipd"]
    done = in_ascii("evaluate.py", tmp_path / "ä", *options, "--json", tmp_path / "ö.json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ö.json").exists()


def test_letters_that_the_terminal_lacks():
    """They are shown by their numbers; nothing ends because of them."""
    code = "import program; program.program_parser('x', ''); print('\\u0438\\u043c\\u044f')"
    done = in_ascii("-c", code)
    assert done.returncode == 0 and done.stdout == "\\u0438\\u043c\\u044f\n"


@pytest.mark.parametrize("before, after", [("\ufeff", ""), ("", "\n"), ("\ufeff", "\r\n")])
def test_a_wording_is_its_text(before, after, run, tmp_path):
    """Neither a byte order mark nor a final newline changes a figure."""
    results = []
    for i, (start, end) in enumerate([("", ""), (before, after)]):
        file = tmp_path / f"{i}.txt"
        file.write_bytes(f"{start}Choose {{first}} or {{second}}. Your answer:{end}".encode())
        path = tmp_path / f"{i}.json"
        evaluate.main([str(run), "--prompt-file", str(file), "--game", "ipd", "--json", str(path)])
        results.append(read_json(path)["runs"])
    assert results[0] == results[1]


def test_a_wording_that_is_no_text(run, capsys, tmp_path):
    (tmp_path / "wording.txt").write_bytes(b"\xff\xfe{first}")
    with refused(capsys, "--prompt-file", "utf-8"):
        evaluate.main([str(run), "--prompt-file", str(tmp_path / "wording.txt")])


# ------------------------------------------------------------------------------- results and files


def test_results_are_kept_when_printing_fails(run, tmp_path):
    path = tmp_path / "results.json"
    command = f"{sys.executable} evaluate.py {run} --json {path} | head -1"
    done = subprocess.run(command, cwd=ROOT, shell=True, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1 and "Traceback" not in done.stderr
    assert read_json(path)["runs"]


@pytest.mark.parametrize("option, place", [("--json", "no/such/file.json"), ("--json", ".")])
def test_places_that_cannot_be_written(option, place, run, capsys, tmp_path, monkeypatch):
    """Refused before the work."""
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("worked for nothing"))
    with refused(capsys, option):
        evaluate.main([str(run), option, str(tmp_path / place)])


def test_figures_where_a_file_is(run, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    with refused(capsys, "--plot"):
        evaluate.main([str(run), "--plot", str(tmp_path / "file")])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_part_that_fails_costs_that_part(run, capsys, tmp_path):
    """One wording is too long for the model: the other conditions of --axes are there."""

    def shorten(folder):
        change_json(folder / "config.json", max_position_embeddings=125)

    model = damaged_model(tmp_path / "model", shorten)
    short = copy_run(run, tmp_path / "short", model=model)
    path = tmp_path / "results.json"
    evaluate.main([str(short), "--game", "ipd", "--axes", "--json", str(path)])
    axes = read_json(path)["runs"][0]["axes"]
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    left_out = set(evaluate.AXES["prompt"]) - set(axes["prompt"])
    assert left_out and len(warnings) >= len(left_out)
    assert all("--axes" in line and "tokens" in line for line in warnings)
    assert axes["prompt"]["structured"]["policy"] and axes["layout"]["both"]["policy"]


def test_a_stopped_evaluation_keeps_what_it_has(run, capsys, tmp_path, monkeypatch):
    from evaluator import Evaluator

    second, path = copy_run(run, tmp_path / "second", seed=2), tmp_path / "results.json"
    drift, calls = Evaluator.drift, []

    def interrupted(self, which, names):
        calls.append(which)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return drift(self, which, names)

    monkeypatch.setattr(Evaluator, "drift", interrupted)
    evaluate.main([str(run), str(second), "--game", "ipd", "--json", str(path)])
    assert "1 of 2" in capsys.readouterr().err
    assert [entry["run"] for entry in read_json(path)["runs"]] == [str(run)]


def test_permissions_are_the_usual_ones(tmp_path):
    before = os.umask(0o022)
    try:
        run_training(tmp_path / "run", *SHORT, "--merge")
    finally:
        os.umask(before)
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file() and path.name != ".lock":
            assert path.stat().st_mode & 0o777 == 0o644, path


def test_a_link_in_the_run_folder(run, capsys, tmp_path):
    """What it leads to is not deleted, and nothing else is before that is known."""
    out = tmp_path / "out"
    shutil.copytree(run, out)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    (out / "merged").symlink_to(tmp_path / "elsewhere")
    with refused(capsys, "--out", "merged", "link"):
        run_training(out, *SHORT, "--overwrite")
    assert (out / "result.json").exists() and (tmp_path / "elsewhere" / "mine").exists()


def test_a_run_that_could_not_begin_is_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json.tmp").write_text("{")
    run_training(out, *SHORT, "--overwrite")
    assert not (out / "config.json.tmp").exists()


def test_nothing_is_said_to_be_saved_where_nothing_is(capsys, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "create", full)
    with pytest.raises(SystemExit):
        run_training(tmp_path / "run", *SHORT)
    written = capsys.readouterr().err
    assert "--out" in written and "No space" in written and "--resume" not in written


def test_a_file_system_without_locks(capsys, tmp_path, monkeypatch):
    from filelock import FileLock

    def no_lock(*_, **__):
        raise NotImplementedError("this file system has no flock")

    monkeypatch.setattr(FileLock, "acquire", no_lock)
    run_training(tmp_path / "run", *SHORT)
    assert "warning" in capsys.readouterr().err and (tmp_path / "run" / "result.json").exists()


# --------------------------------------------------------------------------------- the environment


WHOLE = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "two", **WHOLE},
        {"WORLD_SIZE": "2", **WHOLE, "RANK": "2"},
        {"WORLD_SIZE": "2", **WHOLE, "RANK": "-1"},
        {"WORLD_SIZE": "2", **WHOLE, "MASTER_PORT": ""},
        {"WORLD_SIZE": "0", **WHOLE},
    ],
)
def test_half_of_what_torchrun_says(variables, capsys, tmp_path, monkeypatch):
    for key in program.TORCHRUN:
        monkeypatch.delenv(key, raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    with refused(capsys, "torchrun", "WORLD_SIZE"):
        run_training(tmp_path / "run", *SHORT)
    assert not (tmp_path / "run").exists()


def test_processes_that_would_share_one_gpu_are_refused(capsys, tmp_path, monkeypatch):
    for key, value in {"WORLD_SIZE": "2", **WHOLE}.items():
        monkeypatch.setenv(key, value)
    with refused(capsys, "--device", "give cuda"):
        run_training(tmp_path / "run", *SHORT, "--device", "cuda:0", "--dtype", "float32")


def test_a_rank_without_the_rest_means_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    run_training(tmp_path / "run", *SHORT, "--merge")
    assert (tmp_path / "run" / "merged" / "model.safetensors").exists()


# -------------------------------------------------------------------------------------------- games


def test_regret_where_a_payoff_is_below_the_illegal_reward():
    payoffs = np.array([[[3, 3], [-20, 0]], [[0, -20], [1, 1]]])
    assert utilitarian_regret(6, payoffs) == 0 and utilitarian_regret(-20, payoffs) == 1


def test_regret_where_all_totals_are_equal(run, tmp_path):
    """A zero-sum game with --illegal 0: there is no better and no worse, and it says so."""
    path = tmp_path / "results.json"
    zero = ["--payoffs", "0", "0", "1", "-1", "-1", "1", "0", "0", "--illegal", "0"]
    evaluate.main([str(run), *zero, "--json", str(path), "--plot", str(tmp_path / "figures")])
    results = read_json(path)["runs"][0]["games"]["0,0 1,-1 -1,1 0,0"]
    assert results["regret"]["utilitarian"] is None and results["reward"]["utilitarian"] == 0


def test_a_model_that_reads_the_weight_of_a_wrapped_layer():
    from lora import LoRALinear

    layer = torch.nn.Linear(3, 2)
    assert LoRALinear(layer).weight is layer.weight


def test_damaged_state(capsys, run, tmp_path):
    """Cut, or with a number in it that is not finite."""
    out = copy_run(run, tmp_path / "out")
    (out / "result.json").unlink()
    save_file({"0.0.parameter": torch.tensor([float("nan")])}, out / "state.safetensors")
    with refused(capsys, "--resume", "not finite"):
        train.main(["--resume", str(out)])
    cut_file(out / "state.safetensors", 20)
    with refused(capsys, "--resume", "state.safetensors"):
        train.main(["--resume", str(out)])
