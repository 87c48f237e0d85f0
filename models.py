"""A model folder or a hub name becomes a model, and texts become its tokens.  [knows no game]

load_model     -> model, tokenizer
encode         texts -> token ids, with the answers as the model itself would write them
ending_tokens  what may follow an answer without changing it

Whatever is wrong with a model folder is refused here, with its true cause.
"""

import re
from datetime import date
from pathlib import Path

import huggingface_hub
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

EMBEDDED = Path(__file__).resolve().parent / "tiny"
# "Today" in a chat template that writes the date: a prompt must not change from day to day.
TEMPLATE_DATE = date(2025, 1, 1)


class ModelError(ValueError):
    """The model folder is at fault, not what is asked of it."""


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device):
    """Raise ValueError where torch cannot compute on a device of this name."""
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # torch raises many kinds, by the kind of device
        reason = str(error).splitlines()[0]
        raise ValueError(f"{device} cannot be used here: {reason}") from None


def load_model(path, device=None, dtype="float32"):
    """(model, tokenizer) of a causal language model.

    path:   'tiny' (the embedded one), a folder, or a name on the Hugging Face hub
    device: by default a GPU where there is one;  dtype: the name of a torch type
    Only safetensors weights and the classes that transformers ships are loaded, and all weights
    must be there: transformers would fill the missing ones with random numbers.
    Raises ModelError with a one-line reason where that cannot be done.
    """
    path = EMBEDDED if path == "tiny" else path
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()  # the error below tells how its retries ended
    if (Path(path) / "adapter_config.json").exists():
        raise ModelError(f"{path} holds an adapter: name the model that it was made for")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        # The fused attention kernels know no soft-capping of attention logits (Gemma 2).
        soft_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            attn_implementation="eager" if soft_capped else "sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are in the report, with their names
            output_loading_info=True,
        )
    except Exception as error:  # transformers, tokenizers, safetensors, the hub: kinds of their own
        reason = " ".join(str(error).split())[:300]
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own, and none but that of transformers is run here"
        if not Path(path).exists():
            local = str(path).startswith(("/", ".", "~"))
            reason = "there is no such folder" + ("" if local else f", and on the hub: {reason}")
        raise ModelError(f"cannot load a model from {path}: {reason}") from error
    lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if lacking:
        raise ModelError(f"the weights in {path} lack {lacking[0]} as config.json describes it")
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ModelError(f"the tokenizer in {path} knows no text: are its files complete?")
    return model.to(device or default_device()).eval(), tokenizer


def checkpoint_layers(model):
    """Gradient checkpointing: a layer keeps only its input and runs again in the backward pass."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            # It acts only in training mode. What is inside stays in eval mode, without dropout.
            module.training = True


def ending_tokens(tokenizer):
    """Tokens that add nothing to an answer: special ones and white space; a tuple of ids."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    blank = {token for token, text in enumerate(texts) if not text.strip()}
    return tuple(sorted(blank | set(tokenizer.all_special_ids)))


def write_chats(tokenizer, chats, **settings):
    """Chats as the tokenizer's template writes them: list of str. Raises ModelError."""

    def fixed(call):
        return repr(TEMPLATE_DATE.strftime(call[2]))

    template = re.sub(r"strftime_now\((['\"])(.*?)\1\)", fixed, tokenizer.chat_template)
    if "strftime_now(" in template:
        raise ModelError("the model's chat template asks for today's date in an unknown way")
    settings = {"chat_template": template, "tokenize": False, **settings}
    try:
        return tokenizer.apply_chat_template(chats, **settings)
    except Exception as error:  # jinja2's own kinds, TypeError ...: whatever a template runs into
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"the model's chat template cannot write a plain chat: {reason}") from None


def prompt_heads(tokenizer, texts):
    """What stands before the answers, as text: list of str. Raises ModelError."""
    if not tokenizer.chat_template:
        return [text + " " for text in texts]
    mark = "ANSWER-STARTS-HERE"
    reply = {"role": "assistant", "content": mark}
    written = write_chats(tokenizer, [[{"role": "user", "content": t}, reply] for t in texts])
    for chat, text in zip(written, texts):
        if text.strip() not in chat or mark not in chat:
            raise ModelError("the model's chat template leaves a turn out, or changes its text")
    return [chat[: chat.rindex(mark)] for chat in written]


def encode(tokenizer, texts, answers):
    """Token ids of prompts and of answers: (list of P lists, list of A lists).

    The boundary is the one the model itself would write: with a chat template, the prompt ends
    where the assistant's text starts; without one, the answer follows after a space. Tokenizers
    glue a space to the word behind it, so a space at the boundary goes to the answer.
    Raises ValueError where an answer's tokens depend on the prompt, the tokenizer does not know an
    answer, or the tokens of one answer are the first ones of another; ModelError where the
    tokenizer or its chat template is at fault.
    """
    heads = prompt_heads(tokenizer, texts)
    space = " " if heads[0].endswith(" ") else ""
    heads = [head.removesuffix(space) for head in heads]
    special = not tokenizer.chat_template  # a template writes its own special tokens
    prompts = tokenizer(heads, add_special_tokens=special)["input_ids"]
    if special and prompts[0][-1] in tokenizer.all_special_ids:
        token = tokenizer.convert_ids_to_tokens(prompts[0][-1])
        raise ModelError(f"the model's tokenizer appends {token} to a text: nothing can follow it")
    tails = []
    for answer in answers:
        answered = [head + space + answer for head in heads]
        wholes = tokenizer(answered, add_special_tokens=special)["input_ids"]
        pairs = list(zip(prompts, wholes))
        endings = {tuple(whole[len(prompt) :]) for prompt, whole in pairs}
        if len(endings) > 1 or any(whole[: len(prompt)] != prompt for prompt, whole in pairs):
            raise ValueError(
                f"the tokens of the answer {answer!r} are not the same after every prompt: "
                "choose another name"
            )
        tails.append(list(endings.pop()))
        if set(tails[-1]) & set(tokenizer.all_special_ids):
            raise ValueError(
                f"the answer {answer!r} has an unknown or special token in it: choose another name"
            )
    for i, tail in enumerate(tails):
        for j, other in enumerate(tails):
            if i != j and other[: len(tail)] == tail:
                raise ValueError(
                    f"the tokens of {answers[i]!r} are the first ones of {answers[j]!r}: choose "
                    "names that can be told apart"
                )
    return prompts, tails
