"""A language model as a table: model folder, tokens, policy, value head.  [knows no game]

A policy maps P prompts to log-probabilities of K outcomes: a table [prompt, outcome].
Where a task has few distinct prompts, one forward pass gives the whole table; then any number of
samples is drawn by indexing it. There is no sampling loop over tokens.

    load_model   a folder or a hub name -> model, tokenizer
    encode       texts -> token ids, with the answers as the model itself would write them
    Policy       model + adapter + value head; called on a Trie (trie.py) it gives the table
"""

from contextlib import contextmanager
from functools import partial
from itertools import combinations
from pathlib import Path

import huggingface_hub
import torch
from torch import distributed
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging
from transformers.modeling_layers import GradientCheckpointingLayer

import lora
from errors import InputError
from lora import active_adapter
from nf4 import quantise_layers
from trie import Trie

TINY = Path(__file__).resolve().parent / "tiny"
# "Today" in a chat template that writes the date: a prompt must not change from day to day. It is a
# macro, because transformers passes no function on to a template.
TODAY = "{% macro strftime_now(format) %}1 January 2025{% endmacro +%}"
MARK = "ANSWER-STARTS-HERE"
# A text with the signs that a chat template may change, to see whether it comes through whole.
PROBE = 'A & B <c>, "d"\nor | E?'


def load_model(path, device=None, dtype="float32", checkpointing=False):
    """(model, tokenizer) of a causal language model.

    path:   'tiny' (the embedded one), a folder, or a name on the Hugging Face hub
    device: by default a GPU where there is one;  dtype: the name of a torch type, or nf4
    checkpointing: less memory, more time, see `checkpoint_layers`
    Raises InputError if it is no causal language model, is quantised, needs code of its own, has
    no safetensors, or if weights are missing (transformers would fill them with random numbers).
    """
    path = TINY if path == "tiny" else path
    if (Path(path) / "adapter_config.json").exists():
        raise InputError(f"{path} holds an adapter: name the model that it was made for")
    if not Path(path).exists():
        check_hub()
    with quiet():
        model, report, tokenizer = read_model(path, dtype)
    lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if lacking:
        raise InputError(f"{path}: the weights lack {lacking[0]} as config.json describes it")
    if report["unexpected_keys"]:
        key = min(report["unexpected_keys"])
        raise InputError(f"{path}: config.json has no place for {key}")
    check_tokenizer(tokenizer)
    model.config.get_text_config().output_router_logits = False  # a loss that nothing here asks for
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype == "nf4":
        quantise_layers(model, torch.bfloat16 if device.type == "cuda" else torch.float32)
    if checkpointing:
        checkpoint_layers(model)
    return model.to(device), tokenizer


def check_hub():
    """Without a network, make the hub's library look at its cache only, not try again and again."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # of the network, in whatever library the hub uses
        huggingface_hub.constants.HF_HUB_OFFLINE = True


@contextmanager
def quiet():
    """No warnings and no progress bars of transformers in this block."""
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def read_model(path, dtype):
    """What transformers loads: (model, report of the weights, tokenizer). Raises InputError."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of transformers, tokenizers, the hub
        raise unloadable(path, error) from error
    if getattr(config, "quantization_config", None):
        raise InputError(f"{path} is quantised: name the model that it was made from")
    stored = "auto" if dtype == "nf4" else getattr(torch, dtype)  # NF4 is made of what is stored
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=stored,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are in the report
            output_loading_info=True,
        )
    except Exception as error:  # of transformers, safetensors, the hub
        raise unloadable(path, error) from error
    return model, report, tokenizer


def unloadable(path, error):
    """The InputError for what transformers raised while it loaded a model."""
    if "trust_remote_code" in str(error):
        error = "it needs code of its own, and none but that of transformers is run here"
    elif not Path(path).exists():
        error = f"no such folder, and on the hub: {error}"
    return InputError(f"cannot load a model from {path}: {error}")


def check_tokenizer(tokenizer):
    """Raise InputError unless it writes a prompt whole, and something can follow it."""
    heads = prompt_heads(tokenizer, [PROBE])
    if PROBE not in heads[0]:
        raise InputError("the chat template leaves a turn out, or changes its text")
    ids = tokenizer(heads, add_special_tokens=not tokenizer.chat_template)["input_ids"][0]
    if not ids:
        raise InputError("the tokenizer knows no text")
    if not tokenizer.chat_template and ids[-1] in tokenizer.all_special_ids:
        raise InputError("the tokenizer appends a token: nothing can follow a prompt")


def checkpoint_layers(model):
    """Gradient checkpointing: a layer keeps only its input and runs again in the backward pass.

    transformers' own does so only in training mode, in which some layers drop values out.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def write_chats(tokenizer, chats, **settings):
    """Chats as the tokenizer's template writes them, on a fixed date: list of str."""
    try:
        template = TODAY + tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(
            chats, tokenize=False, chat_template=template, **settings
        )
    except Exception as error:  # of the template, which is a program in Jinja
        raise InputError(f"the chat template fails: {error}") from error


def prompt_heads(tokenizer, texts):
    """What stands before the answers, as text: list of str. Raises InputError."""
    if not tokenizer.chat_template:
        return [text + " " for text in texts]
    reply = {"role": "assistant", "content": MARK}
    chats = [[{"role": "user", "content": text}, reply] for text in texts]
    written = write_chats(tokenizer, chats)
    return [chat.rpartition(MARK)[0] for chat in written]  # "" where the turn is left out


def encode(tokenizer, texts, answers):
    """Token ids of prompts and of answers: (list of P lists, list of A lists).

    The boundary is the one the model itself would write: where a chat template starts the answer;
    without one, after a space. Tokenizers glue a space to the word behind it, so a space at the
    boundary goes to the answer.
    Raises InputError if the answers cannot be told apart by their tokens.
    """
    heads = prompt_heads(tokenizer, texts)
    space = " " if heads[0].endswith(" ") else ""
    heads = [head.removesuffix(space) for head in heads]
    special = not tokenizer.chat_template  # a template writes its own special tokens
    prompts = tokenizer(heads, add_special_tokens=special)["input_ids"]
    tails = []
    for answer in answers:
        answered = [head + space + answer for head in heads]
        wholes = tokenizer(answered, add_special_tokens=special)["input_ids"]
        tails.append(answer_tokens(tokenizer, answer, prompts, wholes))
    for (one, first), (other, second) in combinations(zip(answers, tails), 2):
        shorter = min(len(first), len(second))
        if first[:shorter] == second[:shorter]:
            raise InputError(
                f"the tokens of the answers {one!r} and {other!r} cannot be told apart: choose "
                "another name"
            )
    return prompts, tails


def answer_tokens(tokenizer, answer, prompts, wholes):
    """The tokens by which each of `wholes` is longer than its prompt: list of int.

    Raises InputError if there are none, if they differ, or if one of them is special.
    """
    tail = wholes[0][len(prompts[0]) :]
    for prompt, whole in zip(prompts, wholes):
        if not tail or whole != prompt + tail:
            reason = "are not the same after every prompt"
            raise InputError(f"the tokens of the answer {answer!r} {reason}: choose another name")
    if set(tail) & set(tokenizer.all_special_ids):
        reason = "have an unknown or special one among them"
        raise InputError(f"the tokens of the answer {answer!r} {reason}: choose another name")
    return tail


def log_illegal(log_probs):
    """log(1 - sum of the legal probabilities), [..., A] -> [...]: finite, as are its gradients."""
    # Rounding can make the sum 1.
    return torch.log(-torch.expm1(torch.logsumexp(log_probs, dim=-1).clamp(max=-1e-7)))


class Policy:
    """A language model with the adapter of this name (None: without), and a value head of its own.

    free: False: one of the answers is always given, K = A (at each token only what continues an
          answer is allowed, renormalised)
          True: any text may be given, K = A + 1; the last is what begins with no answer
    """

    def __init__(self, model, tokenizer, name, free=False):
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.free = free
        width = model.get_output_embeddings().weight.shape[1]
        self.value_head = torch.nn.Linear(width, 1, device=model.device)  # float32
        torch.nn.init.zeros_(self.value_head.weight)  # at the start every value is 0
        torch.nn.init.zeros_(self.value_head.bias)
        self.tries = {}  # (texts, answers) -> Trie: prompts come again
        self.references = {}  # Trie -> log-probabilities of the base

    def parameters(self):
        """The trained tensors: the adapter's, the value head's weight [1, width] and bias [1]."""
        return lora.adapter_parameters(self.model, self.name) + list(self.value_head.parameters())

    def trie(self, texts, answers):
        """The Trie of prompts and answers, tuples of str. Raises InputError, see `encode`."""
        key = (texts, answers)
        if key not in self.tries:
            forget_oldest(self.tries)
            self.tries[key] = Trie(*encode(self.tokenizer, texts, answers))
        return self.tries[key]

    def reference(self, trie):
        """Log-probabilities of the base model, float64 [P, K]. Raises InputError if not finite."""
        if trie not in self.references:
            forget_oldest(self.references)
            self.references[trie] = self(trie, graph=False, reference=True)[0].double()
        return self.references[trie]

    def __call__(self, trie, graph=True, reference=False):
        """Log-probabilities [P, K] and values [P], float32 on the CPU.

        graph:     whether they carry their graph
        reference: whether the adapter is off, so that they are those of the base

        What is played, learned and reported is this table. So a sampling temperature would be a
        division of the logits, here.
        Raises InputError if a number is not finite.
        """
        name = None if reference else self.name
        with active_adapter(self.model, name), torch.set_grad_enabled(graph):
            logits, hidden = self.read(trie)
            log_probs = answer_log_probs(trie, logits, self.free)
            values = self.value_head(hidden)
            table = shared_table(trie, torch.cat([log_probs, values], dim=1)).cpu()
        if not table.isfinite().all():
            if reference:
                remedy = "train with --dtype float32"
                raise InputError(f"the base model's answers are not finite: {remedy}")
            self.reference(trie)  # it may be the base that is not finite
            raise InputError("the policy is no longer finite: train again with a lower --lr")
        return table[:, :-1], table[:, -1]

    def read(self, trie):
        """Run the model: logits [rows, Q, vocabulary], hidden states [rows, width], float32.

        The hidden states are what the output head reads at the end of the bare prompts, the first
        of the trie's prefixes.
        """
        seen = []
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = self.model(**trie.inputs(self.model)).logits
        finally:
            hook.remove()
        branches = trie.branches.to(self.model.device)
        hidden = seen[0].flatten(0, 1)[branches[:, 0]]
        return logits.flatten(0, 1)[branches].float(), hidden.float()

    def probabilities(self, trie):
        """What it answers: float64 numpy [P, K]."""
        return self(trie, graph=False)[0].double().exp().numpy()

    def save(self, folder):
        """Write the adapter, in PEFT's layout, and value_head.safetensors."""
        lora.save_adapter(self.model, self.name, folder)
        lora.write_tensors(folder / "value_head.safetensors", self.value_head.state_dict())

    def load(self, folder, value_head=False):
        """Take a folder's adapter, and if asked its value head. Raises InputError."""
        lora.load_adapter(self.model, self.name, folder)
        if value_head:
            self.value_head.load_state_dict(lora.read_tensors(folder / "value_head.safetensors"))


def forget_oldest(cache, size=128):
    """Make room for one more in a dict that holds `size` entries at most."""
    if len(cache) >= size:
        del cache[next(iter(cache))]


def answer_log_probs(trie, logits, free):
    """Log-probabilities of the answers, and if free of any other text: [rows, K].

    logits: [rows, Q, vocabulary]
    """
    # Constrained, the tokens that continue an answer share the mass; free, all tokens do.
    totals = []
    for q, children in enumerate(trie.children):
        shared = logits[:, q] if free else logits[:, q, children]
        totals.append(shared.logsumexp(dim=-1))

    # An answer's log-probability is the sum along its path.
    answers = []
    for path in trie.paths:
        log_prob = 0
        for q, token in path:
            log_prob = log_prob + logits[:, q, token] - totals[q]
        answers.append(log_prob)
    log_probs = torch.stack(answers, dim=-1)
    if not free:
        return log_probs
    return torch.cat([log_probs, log_illegal(log_probs)[:, None]], dim=-1)


def shared_table(trie, table_rows):
    """The table [P, K + 1] of this process' rows, with their graph, and the others', constants."""
    table = torch.zeros(len(trie.prompts), table_rows.shape[1], device=table_rows.device)
    table[trie.rows] = table_rows
    if distributed.is_initialized():
        others = table.detach().clone()
        distributed.all_reduce(others)  # a row is 0 but in the process that has it
        others[trie.rows] = 0
        table = table + others
    return table


@torch.no_grad()
def check_runs(model, trie):
    """Raise InputError if the bare model cannot run a trie. No adapter is in this pass."""
    inputs = trie.inputs(model)
    try:
        model(**inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the model's own code
        rule = "cannot run a token trie: it must take positions and a 4-D mask, and ALiBi does not"
        raise InputError(f"{type(model).__name__} {rule}: {error}") from error


@torch.no_grad()
def check_causal(policy, trie):
    """Raise InputError if a plain forward pass over prompt and answer disagrees with the trie's.

    The adapter is on in both, so that it has run once before anything is written.
    """
    # The prompt that is packed last. Its nodes are not next to each other, so a model that ignores
    # positions or mask is found out.
    row = max(trie.rows, key=trie.prompts.__getitem__)
    prompt = trie.prompts[row]
    answer = trie.answers[-1]
    ids = torch.tensor([[*prompt, *answer[:-1]]], device=policy.model.device)
    with active_adapter(policy.model, policy.name):
        packed, _ = policy.read(trie)
        plain = policy.model(input_ids=ids, use_cache=False).logits[0].float()
    difference = 0.0  # of the answer's log-probability
    for scores, (q, token) in zip(plain[len(prompt) - 1 :], trie.paths[-1]):
        log_probs = packed[trie.rows.index(row), q].log_softmax(dim=-1)
        difference += (log_probs - scores.log_softmax(dim=-1))[token].item()
    if abs(difference) > (0.01 if policy.model.dtype == torch.float32 else 0.5):
        rule = "it must be a causal decoder that takes the positions and the mask that it is given"
        raise InputError(
            f"its answers differ by {abs(difference):.2g} nats from plain ones: {rule}"
        )
