"""A model folder or a hub name becomes a model, and texts become its tokens.  [knows no game]

load_model  -> model, tokenizer
encode      texts -> token ids, with the answers as the model itself would write them
"""

from pathlib import Path

import huggingface_hub
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

EMBEDDED = Path(__file__).resolve().parent / "tiny"


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
    Only safetensors weights and the classes that transformers ships are loaded.
    Raises ValueError with a one-line reason where that cannot be done.
    """
    path = EMBEDDED if path == "tiny" else path
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()  # the error below tells how its retries ended
    try:
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        # The fused attention kernels know no soft-capping of attention logits (Gemma 2).
        soft_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            attn_implementation="eager" if soft_capped else "sdpa",
            use_safetensors=True,
        )
    except Exception as error:  # transformers, tokenizers, safetensors, the hub: kinds of their own
        reason = " ".join(str(error).split())[:300]
        if not Path(path).exists():
            local = str(path).startswith(("/", ".", "~"))
            reason = "there is no such folder" + ("" if local else f", and on the hub: {reason}")
        raise ValueError(f"cannot load a model from {path}: {reason}") from error
    return model.to(device or default_device()).eval(), tokenizer


def checkpoint_layers(model):
    """Gradient checkpointing: a layer keeps only its input and runs again in the backward pass."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            # It acts only in training mode. What is inside stays in eval mode, without dropout.
            module.training = True


def encode(tokenizer, texts, answers):
    """Token ids of prompts and of answers: (list of P lists, list of A lists).

    The boundary is the one the model itself would write: with a chat template, the prompt ends
    where the assistant's text starts; without one, the answer follows after a space. Tokenizers
    glue a space to the word behind it, so a space at the boundary goes to the answer.
    Raises ValueError where an answer's tokens depend on the prompt, the tokenizer does not know an
    answer, or the tokens of one answer are the first ones of another.
    """
    heads = [text + " " for text in texts]
    if tokenizer.chat_template:
        mark = "ANSWER-STARTS-HERE"
        reply = {"role": "assistant", "content": mark}
        chats = [[{"role": "user", "content": text}, reply] for text in texts]
        written = tokenizer.apply_chat_template(chats, tokenize=False)
        heads = [chat[: chat.rindex(mark)] for chat in written]
    space = " " if heads[0].endswith(" ") else ""
    heads = [head.removesuffix(space) for head in heads]
    special = not tokenizer.chat_template  # a template writes its own special tokens
    prompts = tokenizer(heads, add_special_tokens=special)["input_ids"]
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
