"""speed.py measures something."""

import torch
from peft import LoraConfig, get_peft_model

import speed
from policy import load_model


def test_its_figures(monkeypatch, capsys):
    kept, measure = [], speed.measure
    monkeypatch.setattr(speed, "measure", lambda *job: kept.append(measure(*job)) or kept[0])
    monkeypatch.setattr(speed, "SIZES", (1, 16))
    monkeypatch.setattr(speed, "ROUNDS", 2)
    speed.main(["--repeats", "1"])
    figures, printed = kept[0], capsys.readouterr().out
    assert all(f"{name} " in printed for name in figures)
    for key in ("update / floor", "16 padded prompts / trie", "peak memory, GB"):
        assert figures[key] > 0
    assert min(figures["rounds per second"].values()) > 0


def test_a_job_without_an_adapter_of_ours():
    """beside_trl.py: what PEFT trains in the model is what the job's policy answers."""
    model, tokenizer = load_model("tiny", "cpu")
    theirs = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    job = speed.Job(model, tokenizer, free=True, name=None)
    before, _ = job.policy(job.trie, graph=False)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    after, _ = job.policy(job.trie, graph=False)
    assert (after - before).abs().max() > 0.01
